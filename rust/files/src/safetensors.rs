//! The safetensors format: a JSON table of tensors, then their bytes.
//!
//! Layout of a file: `n` as u64 little-endian; `n` bytes of JSON, an object from tensor name to
//! `{"dtype", "shape", "data_offsets": [begin, end]}` plus an optional `"__metadata__"` object of strings, padded with
//! spaces; then the data, to which the offsets refer. Values are little-endian and row-major.
//! Source: safetensors 0.8, `README.md` (Format) and `safetensors/src/tensor.rs` (the rules a reader enforces).
//!
//! A checkpoint may be spread over several such files; `model.safetensors.index.json` then says which tensor lies
//! where. [`SafeTensors`] is one view over either form. Files are memory-mapped: opening costs the header, and a
//! tensor's bytes are read when touched.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut, MmapOptions};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::{Error, Result, atomic};

/// Largest header accepted, the reference implementation's own limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

macro_rules! dtypes {
    ($($name:ident $text:literal $size:literal,)*) => {
        /// Element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "the names are the format's own")]
        pub enum DType { $($name,)* }

        impl DType {
            /// The format's name, as "BF16".
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Bytes per element.
            #[must_use]
            pub fn size(self) -> usize {
                match self { $(Self::$name => $size,)* }
            }

            /// The type of that name, if it is known.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)* _ => None }
            }
        }
    };
}

// In ascending order of element size: files store the widest first, so that every tensor lies aligned.
dtypes! {
    Bool "BOOL" 1,
    U8 "U8" 1,
    I8 "I8" 1,
    F8E5M2 "F8_E5M2" 1,
    F8E4M3 "F8_E4M3" 1,
    F8E8M0 "F8_E8M0" 1,
    I16 "I16" 2,
    U16 "U16" 2,
    F16 "F16" 2,
    BF16 "BF16" 2,
    I32 "I32" 4,
    U32 "U32" 4,
    F32 "F32" 4,
    C64 "C64" 8,
    F64 "F64" 8,
    I64 "I64" 8,
    U64 "U64" 8,
}

/// A tensor's type, shape and little-endian row-major bytes, borrowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Lengths of the axes, outermost first; empty for a scalar.
    pub shape: Cow<'a, [usize]>,
    /// The elements: product(shape) × dtype size bytes.
    pub bytes: Cow<'a, [u8]>,
}

/// Elements that are converted at a time while a file is written.
const PIECE: usize = 1 << 16;

impl<'a> TensorView<'a> {
    /// A float32 tensor stored as `dtype`: F32 as it is, F16 and BF16 rounded to nearest even, F64 widened.
    ///
    /// `None` for a type that does not hold real numbers of these widths.
    #[must_use]
    pub fn from_f32(dtype: DType, shape: &'a [usize], values: &[f32]) -> Option<Self> {
        let bytes = f32_as(dtype, values.iter().copied())?;
        Some(Self { dtype, shape: Cow::Borrowed(shape), bytes: Cow::Owned(bytes) })
    }

    /// The elements as float32: exact from F32, F16 and BF16, rounded to nearest even from F64.
    ///
    /// `None` for any other type.
    #[must_use]
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        self.is_real().then(|| {
            let mut out = vec![0.0; self.bytes.len() / self.dtype.size()];
            self.each(out.iter_mut(), |to, x| *to = x, |to, x| *to = x as f32);
            out
        })
    }

    /// Whether the elements are real numbers that [`TensorView::to_f32`] and [`TensorView::copy_to`] convert.
    #[must_use]
    pub fn is_real(&self) -> bool {
        matches!(self.dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }

    /// Writes the elements to `out` as F32 or F64 in the machine's byte order, converted as by [`TensorView::to_f32`]
    /// (F64 to F64 as it is).
    ///
    /// `None`, and nothing is written, for other types or where `out` has not the size of all elements.
    pub fn copy_to(&self, dtype: DType, out: &mut [u8]) -> Option<()> {
        if !self.is_real() || out.len() / dtype.size() != self.bytes.len() / self.dtype.size() {
            return None;
        }
        if self.dtype == dtype && cfg!(target_endian = "little") {
            out.copy_from_slice(&self.bytes);
            return Some(());
        }
        match dtype {
            DType::F32 => {
                let out = out.as_chunks_mut().0.iter_mut();
                self.each(out, |to, x| *to = x.to_ne_bytes(), |to, x| *to = (x as f32).to_ne_bytes());
            }
            DType::F64 => {
                let out = out.as_chunks_mut().0.iter_mut();
                self.each(out, |to, x| *to = f64::from(x).to_ne_bytes(), |to, x| *to = x.to_ne_bytes());
            }
            _ => return None,
        }
        Some(())
    }

    /// Gives each place of `out` an element: by `narrow` where float32 holds it exactly, by `wide` from F64.
    fn each<T>(&self, out: impl Iterator<Item = T>, narrow: impl Fn(T, f32), wide: impl Fn(T, f64)) {
        fn both<T, const N: usize>(bytes: &[u8], out: impl Iterator<Item = T>, item: impl Fn(T, [u8; N])) {
            out.zip(bytes.as_chunks().0).for_each(|(to, &raw)| item(to, raw));
        }
        match self.dtype {
            DType::F32 => both(&self.bytes, out, |to, c| narrow(to, f32::from_le_bytes(c))),
            DType::F16 => both(&self.bytes, out, |to, c| narrow(to, f16_to_f32(u16::from_le_bytes(c)))),
            DType::BF16 => both(&self.bytes, out, |to, c| narrow(to, bf16_to_f32(u16::from_le_bytes(c)))),
            DType::F64 => both(&self.bytes, out, |to, c| wide(to, f64::from_le_bytes(c))),
            _ => {}
        }
    }

    /// The first finite element of a float32 tensor that `dtype` would round to infinity, and its number.
    fn overflow(&self, dtype: DType) -> Option<(usize, f32)> {
        // Half a unit in the last place above the largest finite value: a tie there rounds up, to the even side.
        let bound: u32 = match dtype {
            DType::F16 => 65520.0_f32.to_bits(),
            DType::BF16 => 0x7F7F_8000,
            _ => return None,
        };
        let values = self.bytes.as_chunks().0.iter().map(|&c| u32::from_le_bytes(c));
        let beyond = |bits: &u32| (bound..f32::INFINITY.to_bits()).contains(&(bits & 0x7FFF_FFFF));
        values.enumerate().find(|(_, bits)| beyond(bits)).map(|(i, bits)| (i, f32::from_bits(bits)))
    }
}

/// Float32 values as the little-endian bytes of `dtype`: F32, F16 and BF16 (rounded to nearest even), F64.
fn f32_as(dtype: DType, values: impl Iterator<Item = f32>) -> Option<Vec<u8>> {
    Some(match dtype {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.flat_map(|x| f32_to_f16(x).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|x| f32_to_bf16(x).to_le_bytes()).collect(),
        DType::F64 => values.flat_map(|x| f64::from(x).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// One or several memory-mapped safetensors files, seen as one table of tensors.
///
/// The files must not be shortened or rewritten in place while this is open (replacing them by renaming is fine):
/// like every memory map, it shows the file as it is at the moment of reading.
#[derive(Debug)]
pub struct SafeTensors {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// Position in the file, header included.
    bytes: Range<usize>,
}

impl SafeTensors {
    /// Opens one file and checks its whole header.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] or [`Error::Tensor`] if it is cut short, overlong or
    /// inconsistent.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let mut all = Self { shards: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        all.add(path.as_ref())?;
        Ok(all)
    }

    /// Opens a model directory: its `model.safetensors`, or all files of its `model.safetensors.index.json`.
    ///
    /// # Errors
    /// As [`SafeTensors::open`]; [`Error::Format`] also if the directory holds neither, if the index names a file
    /// outside the directory, or if a tensor is missing from the file the index names or occurs in two.
    pub fn open_dir(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let single = directory.join(SINGLE_FILE);
        if single.exists() {
            return Self::open(single);
        }
        let index = directory.join(INDEX_FILE);
        if index.exists() {
            return Self::open_index(directory, &index);
        }
        // Reading the directory comes last, and only to word the error.
        let entries = fs::read_dir(directory).map_err(Error::io("open", directory))?;
        let pickle = entries
            .flatten()
            .any(|e| e.path().extension().is_some_and(|x| x == "bin" || x == "pt" || x == "ckpt"));
        let remedy = if pickle {
            "; its weights are pickled, which is not read because a pickle can run code: convert them to safetensors"
        } else {
            "; name the directory that holds the weights"
        };
        Err(Error::format(directory, format!("there is neither {SINGLE_FILE} nor {INDEX_FILE} here{remedy}")))
    }

    fn open_index(directory: &Path, index: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = fs::read(index).map_err(Error::io("read", index))?;
        let index_content: Index = serde_json::from_slice(&text).map_err(|e| {
            Error::format(index, format!("this is not a weight index ({e}); download it again"))
        })?;
        let mut all = Self { shards: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        let mut shard_of: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, file) in &index_content.weight_map {
            if !shard_of.contains_key(file.as_str()) {
                if !is_plain_name(file) {
                    let problem = format!(
                        "the index places it in '{file}'; only plain names of files beside it are read"
                    );
                    return Err(Error::tensor(index, tensor, problem));
                }
                shard_of.insert(file, all.shards.len());
                all.add(&directory.join(file))?;
            }
        }
        for (tensor, file) in &index_content.weight_map {
            let found = all.entries.get(tensor).map(|entry| entry.shard);
            if found != shard_of.get(file.as_str()).copied() {
                let problem =
                    format!("the index places it in '{file}', which does not hold it; download both again");
                return Err(Error::tensor(index, tensor, problem));
            }
        }
        Ok(all)
    }

    /// Maps one file and merges its table into this view.
    fn add(&mut self, path: &Path) -> Result<()> {
        // Before opening, which would wait for a writer if this were a pipe.
        let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
        if !metadata.is_file() {
            return Err(Error::format(path, "this is not a regular file; name a .safetensors file"));
        }
        if metadata.len() < 8 {
            let problem = format!(
                "the file is truncated: the format begins with 8 bytes of header length, file has {}; copy it again",
                metadata.len()
            );
            return Err(Error::format(path, problem));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only and private to `Shard`, which hands out shared slices bounded by its own
        // lifetime. That nobody shortens or rewrites the file meanwhile is the documented condition on callers.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let shard = self.shards.len();
        let header = parse_header(path, &map)?;
        for (name, mut entry) in header.tensors {
            entry.shard = shard;
            if let Some(other) = self.entries.get(&name) {
                let problem =
                    format!("it is also in {}; keep one of the two", self.shards[other.shard].path.display());
                return Err(Error::tensor(path, &name, problem));
            }
            self.entries.insert(name, entry);
        }
        self.metadata.extend(header.metadata);
        self.shards.push(Shard { path: path.to_owned(), file, map });
        Ok(())
    }

    /// Maps each file once more, privately: who writes gets a copy of the page, all other pages are shared with every
    /// process that maps the file. The condition on the files (see the type) holds while these maps live.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn private_maps(&self) -> Result<Vec<MmapMut>> {
        let map = |shard: &Shard| {
            // SAFETY: the map is private, so nothing written to it reaches the file or another map; that nobody
            // shortens or rewrites the file meanwhile is the documented condition on callers.
            unsafe { MmapOptions::new().map_copy(&shard.file) }.map_err(Error::io("map", &shard.path))
        };
        self.shards.iter().map(map).collect()
    }

    /// Where a tensor is: the number of its file, and its bytes there.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<(usize, Range<usize>)> {
        self.entries.get(name).map(|entry| (entry.shard, entry.bytes.clone()))
    }

    /// All tensor names, ascending by bytes.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor of that name, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.entries.get(name)?;
        Some(TensorView {
            dtype: entry.dtype,
            shape: Cow::Borrowed(&entry.shape),
            bytes: Cow::Borrowed(&self.shards[entry.shard].map[entry.bytes.clone()]),
        })
    }

    /// The file that holds the tensor of that name, for messages.
    #[must_use]
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).map(|entry| self.shards[entry.shard].path.as_path())
    }

    /// The free-form strings of the headers, all files together.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Whether `name` is a file name and nothing more on every system: no separator, no drive, not `.` or `..`.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

struct Header {
    tensors: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

/// Checks a whole file's header against the file; afterwards every entry's range lies inside `file`.
fn parse_header(path: &Path, file: &[u8]) -> Result<Header> {
    let (length, rest) = file.split_first_chunk().ok_or_else(|| Error::format(path, "the file is empty"))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let problem = format!(
            "the header length reads {length} bytes, beyond the limit of {MAX_HEADER_BYTES}; \
             this is not a safetensors file, or its first bytes are damaged"
        );
        return Err(Error::format(path, problem));
    }
    let length = usize::try_from(length).expect("the limit on headers fits usize");
    if length > rest.len() {
        let problem = format!(
            "the file is truncated: header says {} bytes, file has {}; copy it again",
            length + 8,
            file.len()
        );
        return Err(Error::format(path, problem));
    }
    let (json, data) = rest.split_at(length);
    let damaged = |e: &dyn std::fmt::Display| {
        Error::format(
            path,
            format!("the header is not the JSON table of this format ({e}); copy the file again"),
        )
    };
    // JSON would allow white space here; the format does not, so that the file type can be told by its ninth byte.
    if json.first() != Some(&b'{') {
        return Err(damaged(&"it does not begin with '{'"));
    }
    let Pairs(pairs) = serde_json::from_slice(json).map_err(|e| damaged(&e))?;

    let mut metadata = None;
    let mut tensors = Vec::with_capacity(pairs.len());
    for (name, raw) in pairs {
        if name == "__metadata__" {
            let table: BTreeMap<String, String> = serde_json::from_str(raw.get()).map_err(|e| {
                Error::format(path, format!("__metadata__ must map strings to strings ({e})"))
            })?;
            if metadata.replace(table).is_some() {
                return Err(Error::format(
                    path,
                    "__metadata__ occurs twice in the header; write the file again",
                ));
            }
        } else {
            let info: TensorInfo = serde_json::from_str(raw.get()).map_err(|e| {
                Error::tensor(path, &name, format!("its entry needs dtype, shape and data_offsets ({e})"))
            })?;
            let entry = check_tensor(path, &name, info, data.len(), file.len() - data.len())?;
            tensors.push((name, entry));
        }
    }
    check_layout(path, &mut tensors, 8 + length..file.len())?;
    Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
}

/// A JSON object as a list, so that repeated names are seen.
struct Pairs(Vec<(String, Box<serde_json::value::RawValue>)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

/// A tensor's entry in the header; the fields' order is the order of writing.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

fn check_tensor(
    path: &Path,
    name: &str,
    info: TensorInfo,
    data_len: usize,
    data_start: usize,
) -> Result<Entry> {
    let fail = |problem: String| Err(Error::tensor(path, name, problem));
    let TensorInfo { dtype, shape, data_offsets: (begin, end) } = info;
    let Some(dtype) = DType::from_name(&dtype) else {
        return fail(format!("its dtype '{dtype}' is not known; convert it to one of F64, F32, F16, BF16"));
    };
    if begin > end {
        return fail(format!(
            "its data ends before it begins (offsets {begin} and {end}); write the file again"
        ));
    }
    if end > data_len {
        return fail(format!(
            "the file is truncated: header says {} bytes, file has {}; copy it again",
            end.saturating_add(data_start),
            data_len + data_start
        ));
    }
    match shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n)) {
        Some(bytes) if bytes == end - begin => {}
        Some(bytes) => {
            let (dtype, span) = (dtype.name(), end - begin);
            return fail(format!(
                "shape {shape:?} of {dtype} takes {bytes} bytes, its offsets span {span}; write the file again"
            ));
        }
        None => return fail(format!("shape {shape:?} has more elements than memory; write the file again")),
    }
    Ok(Entry { shard: 0, dtype, shape, bytes: data_start + begin..data_start + end })
}

/// Checks that the tensors are distinct and tile `data` (a range of the file) exactly.
///
/// Bytes that no tensor owns are refused, as in the reference: a file has one reading.
fn check_layout(path: &Path, tensors: &mut [(String, Entry)], data: Range<usize>) -> Result<()> {
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::tensor(path, &pair[0].0, "it occurs twice in the header; write the file again"));
    }
    tensors.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
    let mut end = data.start;
    let mut before = "the header";
    for (name, entry) in tensors.iter() {
        if entry.bytes.start != end {
            let what = if entry.bytes.start < end { "overlaps" } else { "leaves a hole after" };
            return Err(Error::tensor(path, name, format!("its data {what} {before}; write the file again")));
        }
        end = entry.bytes.end;
        before = name;
    }
    if end != data.end {
        let problem = format!("header says {end} bytes, file has {}; copy it again", data.end);
        return Err(Error::format(path, problem));
    }
    Ok(())
}

/// Writes `tensors` to `path` as one file, atomically (see [`crate::write_file`]); those of float32 as `float`, one of
/// F32, F16, BF16 and F64, rounded to nearest even.
///
/// The widest types come first, then names ascend; the header is padded so that data begin at a multiple of 8 bytes:
/// every tensor is aligned to its element. The metadata are `{"format": "pt"}`, which Hugging Face's loader asks for.
///
/// # Errors
/// [`Error::Tensor`] for a repeated or reserved name, for bytes that do not fit the shape, or for a finite number that
/// `float` would make infinite; [`Error::Format`] where `float` is another type; [`Error::Io`].
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(&str, TensorView<'_>)],
    float: DType,
) -> Result<()> {
    let path = path.as_ref();
    if f32_as(float, std::iter::empty()).is_none() {
        let problem = format!("float32 cannot be stored as {}; name F32, F16, BF16 or F64", float.name());
        return Err(Error::format(path, problem));
    }
    let stored = |t: &TensorView<'_>| if t.dtype == DType::F32 { float } else { t.dtype };
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by(|(a, x), (b, y)| stored(y).size().cmp(&stored(x).size()).then(a.cmp(b)));

    let mut seen = std::collections::BTreeSet::new();
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut begin = 0;
    for (name, tensor) in &order {
        let fail = |problem: &str| Err(Error::tensor(path, name, problem));
        if *name == "__metadata__" || !seen.insert(name) {
            return fail("the name is reserved or occurs twice; rename it");
        }
        let bytes = tensor.shape.iter().try_fold(tensor.dtype.size(), |bytes, &n| bytes.checked_mul(n));
        if bytes != Some(tensor.bytes.len()) {
            let (shape, dtype, given) = (&tensor.shape, tensor.dtype.name(), tensor.bytes.len());
            return fail(&format!("{given} bytes were given for shape {shape:?} of {dtype}"));
        }
        let dtype = stored(tensor);
        if let Some((i, value)) = tensor.overflow(dtype).filter(|_| tensor.dtype == DType::F32) {
            let problem = format!(
                "its element {i} is {value:e}, beyond the largest number of {}; store it as BF16 or F32",
                dtype.name()
            );
            return fail(&problem);
        }
        let end = begin + tensor.bytes.len() / tensor.dtype.size() * dtype.size();
        let info = TensorInfo {
            dtype: dtype.name().to_owned(),
            shape: tensor.shape.to_vec(),
            data_offsets: (begin, end),
        };
        let info = serde_json::to_string(&info).expect("names and integers are valid JSON");
        header.push_str(&format!(",{}:{info}", serde_json::Value::from(*name)));
        begin = end;
    }
    header.push('}');
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    if header.len() as u64 > MAX_HEADER_BYTES {
        let problem = format!(
            "the header would take {} bytes, beyond {MAX_HEADER_BYTES}; write fewer tensors",
            header.len()
        );
        return Err(Error::format(path, problem));
    }
    atomic::write_file_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for (_, tensor) in &order {
            if stored(tensor) == tensor.dtype {
                file.write_all(&tensor.bytes)?;
                continue;
            }
            for piece in tensor.bytes.as_chunks().0.chunks(PIECE) {
                let values = piece.iter().map(|&c| f32::from_le_bytes(c));
                file.write_all(&f32_as(float, values).unwrap_or_default())?;
            }
        }
        Ok(())
    })
}
