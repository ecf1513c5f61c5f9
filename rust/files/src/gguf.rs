//! The GGUF format of llama.cpp: typed metadata, a table of tensors, then their bytes.
//!
//! Layout of a file, little-endian throughout: `GGUF`, version as u32 (2 or 3), number of tensors and of metadata entries
//! as u64; the entries, each a key (u64 length, UTF-8), a type (u32) and a value; the tensors, each a name, the number of
//! dimensions (u32), the dimensions (u64, fastest first), a type (u32) and an offset (u64) into the data, which starts at
//! the next multiple of `general.alignment` (32 unless stated).
//! Source: ggml, `docs/gguf.md`; block sizes from `src/ggml-common.h`.
//!
//! Nothing is allocated that the file is not long enough to fill, so that a damaged header costs no more than its bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// Most dimensions of a tensor, as in the reference.
const MAX_DIMS: usize = 4;
/// Deepest nesting of arrays that is read.
const MAX_DEPTH: usize = 4;

/// A metadata value. Widths are not kept: an integer of any width is a `U64` or, if its type has a sign, an `I64`.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum GgufValue {
    Bool(bool),
    U64(u64),
    I64(i64),
    F64(f64),
    String(String),
    /// An array of strings, which a vocabulary has many of.
    Strings(Vec<String>),
    /// An array of anything else.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// The integer, if this is one that is not negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(x) => Some(x),
            Self::I64(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    /// The integer, if this is one.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::I64(x) => Some(x),
            Self::U64(x) => i64::try_from(x).ok(),
            _ => None,
        }
    }

    /// The number, integers included.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F64(x) => Some(x),
            Self::I64(x) => Some(x as f64),
            Self::U64(x) => Some(x as f64),
            _ => None,
        }
    }

    /// The truth value, if this is one.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(x) = *self { Some(x) } else { None }
    }

    /// The string, if this is one.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(s) = self { Some(s) } else { None }
    }

    /// The strings, if this is an array of them.
    #[must_use]
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Self::Strings(s) = self { Some(s) } else { None }
    }

    /// The values, if this is an array of anything but strings.
    #[must_use]
    pub fn as_array(&self) -> Option<&[GgufValue]> {
        if let Self::Array(a) = self { Some(a) } else { None }
    }
}

/// How the elements of a tensor are stored, by ggml's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GgmlType(pub u32);

impl GgmlType {
    /// `(name, elements of a block, bytes of a block)`, if the type is known.
    fn info(self) -> Option<(&'static str, u64, u64)> {
        Some(match self.0 {
            0 => ("F32", 1, 4),
            1 => ("F16", 1, 2),
            2 => ("Q4_0", 32, 18),
            3 => ("Q4_1", 32, 20),
            6 => ("Q5_0", 32, 22),
            7 => ("Q5_1", 32, 24),
            8 => ("Q8_0", 32, 34),
            9 => ("Q8_1", 32, 36),
            10 => ("Q2_K", 256, 84),
            11 => ("Q3_K", 256, 110),
            12 => ("Q4_K", 256, 144),
            13 => ("Q5_K", 256, 176),
            14 => ("Q6_K", 256, 210),
            15 => ("Q8_K", 256, 292),
            16 => ("IQ2_XXS", 256, 66),
            17 => ("IQ2_XS", 256, 74),
            18 => ("IQ3_XXS", 256, 98),
            19 => ("IQ1_S", 256, 50),
            20 => ("IQ4_NL", 32, 18),
            21 => ("IQ3_S", 256, 110),
            22 => ("IQ2_S", 256, 82),
            23 => ("IQ4_XS", 256, 136),
            24 => ("I8", 1, 1),
            25 => ("I16", 1, 2),
            26 => ("I32", 1, 4),
            27 => ("I64", 1, 8),
            28 => ("F64", 1, 8),
            29 => ("IQ1_M", 256, 56),
            30 => ("BF16", 1, 2),
            34 => ("TQ1_0", 256, 54),
            35 => ("TQ2_0", 256, 66),
            39 => ("MXFP4", 32, 17),
            _ => return None,
        })
    }

    /// The name, as "Q4_0", if the type is known.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        self.info().map(|(name, _, _)| name)
    }

    /// Elements and bytes of a block, if the type is known.
    #[must_use]
    pub fn block(self) -> Option<(usize, usize)> {
        self.info().map(|(_, elements, bytes)| (elements as usize, bytes as usize))
    }
}

/// One entry of the tensor table.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Dimensions as the file has them, fastest first: a `[rows, columns]` matrix says `[columns, rows]`.
    pub dims: Vec<usize>,
    /// How elements are stored.
    pub dtype: GgmlType,
    /// Where its bytes start, counted from the start of the data.
    pub offset: u64,
    /// Where its bytes lie in the file; none if the type is not known.
    bytes: Option<Range<usize>>,
}

/// A GGUF file, mapped into memory; metadata and tensor table are checked completely when it is opened.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    version: u32,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped; [`Error::Gguf`] if it is not a GGUF file of version 2 or 3, is cut
    /// off, or a tensor does not lie inside it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Before opening, which would wait for a writer if this were a pipe.
        if !fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
            return Err(Error::gguf(path, "this is not a regular file; name a .gguf file"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only; as with safetensors, a file that another process truncates meanwhile is the one
        // thing a map cannot guard against.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (version, metadata, tensors) =
            parse(&map).map_err(|problem| Error::gguf(path, format!("{problem}; download it again")))?;
        Ok(Self { path: path.to_owned(), map, version, metadata, tensors })
    }

    /// Version of the format.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The metadata by key.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// The bytes of tensor `name`, blocks of its type one after the other.
    ///
    /// # Errors
    /// [`Error::Gguf`] if there is no such tensor, or its type is not known.
    pub fn data(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.tensors.get(name);
        let tensor =
            tensor.ok_or_else(|| Error::gguf(&self.path, format!("there is no tensor '{name}' in it")))?;
        match &tensor.bytes {
            Some(range) => Ok(&self.map[range.clone()]),
            None => Err(Error::gguf(
                &self.path,
                format!(
                    "tensor '{name}' has the type {}, which is not known; convert it to F16",
                    tensor.dtype.0
                ),
            )),
        }
    }
}

type Parsed = (u32, BTreeMap<String, GgufValue>, BTreeMap<String, GgufTensor>);

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4, "the magic bytes")? != b"GGUF" {
        return Err("it does not start with the bytes of a GGUF file".into());
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(format!(
            "it has version {version} of the format, or big-endian numbers; 2 and 3 are read"
        ));
    }
    let n_tensors = cursor.u64("the number of tensors")?;
    let n_entries = cursor.u64("the number of metadata entries")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..n_entries {
        let key = cursor.string("a metadata key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key, 0)?;
        if metadata.contains_key(&key) {
            return Err(format!("'{key}' stands twice in its metadata"));
        }
        metadata.insert(key, value);
    }
    let mut tensors = BTreeMap::new();
    for _ in 0..n_tensors {
        let name = cursor.string("the name of a tensor")?;
        let n_dims = cursor.u32(&name)? as usize;
        if n_dims > MAX_DIMS {
            return Err(format!("tensor '{name}' has {n_dims} dimensions, more than {MAX_DIMS}"));
        }
        let dims = (0..n_dims).map(|_| cursor.size(&name)).collect::<Result<_, _>>()?;
        let dtype = GgmlType(cursor.u32(&name)?);
        let offset = cursor.u64(&name)?;
        if tensors.insert(name.clone(), GgufTensor { dims, dtype, offset, bytes: None }).is_some() {
            return Err(format!("tensor '{name}' stands twice in its table"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => value
            .as_u64()
            .filter(|a| a.is_power_of_two() && *a <= 1 << 20)
            .ok_or("its general.alignment is no power of two")?,
    };
    let start = (cursor.at as u64).next_multiple_of(alignment);
    for (name, tensor) in &mut tensors {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(format!("tensor '{name}' starts at {}, no multiple of {alignment}", tensor.offset));
        }
        tensor.bytes =
            place(tensor, start, bytes.len()).map_err(|problem| format!("tensor '{name}' {problem}"))?;
    }
    Ok((version, metadata, tensors))
}

/// Where in a file of `size` bytes, whose data starts at `start`, a tensor lies; none if its type is not known.
fn place(tensor: &GgufTensor, start: u64, size: usize) -> Result<Option<Range<usize>>, String> {
    let Some((_, elements, block_bytes)) = tensor.dtype.info() else { return Ok(None) };
    if tensor.dims.contains(&0) {
        return Err(format!("of shape {:?} has no element", tensor.dims));
    }
    let row = tensor.dims.first().copied().unwrap_or(1) as u64;
    if !row.is_multiple_of(elements) {
        return Err(format!("has rows of {row} elements, which are no whole blocks of {elements}"));
    }
    let count = tensor.dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
    let end = count
        .and_then(|n| (n / elements).checked_mul(block_bytes))
        .zip(start.checked_add(tensor.offset))
        .and_then(|(length, first)| Some((first, first.checked_add(length)?)))
        .filter(|&(_, end)| end <= size as u64);
    // Both ends are below `size`, which is a `usize`.
    end.map(|(first, end)| Some(first as usize..end as usize))
        .ok_or_else(|| format!("of shape {:?} lies beyond the end of the file", tensor.dims))
}

/// The rest of the bytes; each step names what it reads, for the error if they end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], String> {
        if n > self.left() {
            return Err(format!("it ends inside {what}"));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        Ok(self.take(N, what)?.try_into().expect("as many bytes were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn size(&mut self, what: &str) -> Result<usize, String> {
        let n = self.u64(what)?;
        usize::try_from(n).map_err(|_| format!("{what} has a length of {n}"))
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let n = self.size(what)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<GgufValue, String> {
        use GgufValue as V;
        Ok(match kind {
            0 => V::U64(self.array::<1>(key)?[0].into()),
            1 => V::I64(i8::from_le_bytes(self.array(key)?).into()),
            2 => V::U64(u16::from_le_bytes(self.array(key)?).into()),
            3 => V::I64(i16::from_le_bytes(self.array(key)?).into()),
            4 => V::U64(self.u32(key)?.into()),
            5 => V::I64(i32::from_le_bytes(self.array(key)?).into()),
            6 => V::F64(f32::from_le_bytes(self.array(key)?).into()),
            7 => V::Bool(self.array::<1>(key)?[0] != 0),
            8 => V::String(self.string(key)?),
            9 => {
                let element = self.u32(key)?;
                let n = self.size(key)?;
                let least = match element {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                if n > self.left() / least {
                    return Err(format!("it ends inside {key}"));
                }
                if depth == MAX_DEPTH {
                    return Err(format!("{key} has arrays more than {MAX_DEPTH} deep"));
                }
                if element == 8 {
                    V::Strings((0..n).map(|_| self.string(key)).collect::<Result<_, _>>()?)
                } else {
                    V::Array((0..n).map(|_| self.value(element, key, depth + 1)).collect::<Result<_, _>>()?)
                }
            }
            10 => V::U64(self.u64(key)?),
            11 => V::I64(i64::from_le_bytes(self.array(key)?)),
            12 => V::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("{key} has the unknown type {kind}")),
        })
    }
}
