//! Reads documents from text, JSON lines and separated values, one at a time: memory holds one document (a few megabytes
//! of a `.txt` file), whatever the size of the input.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::csv;
use crate::error::{Error, Result};
use crate::open::{Packing, io_error, open};

/// What to do with bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecodeErrors {
    /// Stop with [`Error::Utf8`].
    #[default]
    Strict,
    /// Put U+FFFD in their place, one for each maximal invalid sequence.
    Replace,
}

/// What a source is read as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Documents to learn from: a `.txt` file is one, and nothing but the text is kept.
    #[default]
    Documents,
    /// Rows to work on: each is a JSON object with all its fields in their order, the text among them. A line of a
    /// `.txt` file that is not blank is one, with the text alone, without the line's end.
    Rows,
}

/// How to read documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadOptions {
    /// The field of a `.jsonl` object, or the column of a table, that holds the text; default `"text"`.
    pub column: String,
    /// What to do with bytes that are not UTF-8; default [`DecodeErrors::Strict`].
    pub errors: DecodeErrors,
    /// What the source is read as; default [`Form::Documents`].
    pub form: Form,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { column: "text".to_owned(), errors: DecodeErrors::Strict, form: Form::Documents }
    }
}

/// An iterator over the documents of files, in the order of the paths and, within a file, of its lines.
///
/// A `.txt` file is one document, or several where it is longer than 4 MiB: each ends with the first line after so many
/// bytes (between two characters, where no line ends within as many again). A `.jsonl` file has one for each line that is not blank, the string in its field
/// `options.column`; a `.csv` or `.tsv` file one for each record after the header, the field in that column. Each may
/// be compressed (`.gz`, `.zst` after the extension). The path `-` is standard input: JSON lines if its first byte is
/// `{`, otherwise as a `.txt` file. Extensions are read without regard to case; a leading byte-order mark is dropped.
///
/// What cannot be read is given in its place, as a [`Rejected`]: a line or record that has no string in the column or is
/// not UTF-8 (with [`DecodeErrors::Strict`]), after which the next one follows; a file that is damaged or without a
/// document, after which the next file follows; and, at the end, a path that is missing, a directory or unreadable.
pub struct Documents {
    paths: std::vec::IntoIter<PathBuf>,
    options: ReadOptions,
    source: Option<Source>,
    taken: Arc<AtomicU64>,
}

impl Documents {
    /// The documents of `paths`; no file is opened yet.
    ///
    /// # Errors
    /// If no path is given, or one has an unknown extension.
    pub fn new(paths: Vec<PathBuf>, options: ReadOptions) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::NoFiles);
        }
        for path in &paths {
            kind(path)?;
        }
        Ok(Self { paths: paths.into_iter(), options, source: None, taken: Arc::default() })
    }

    /// Bytes read from the files so far, as they are on the disk.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    fn advance(&mut self) -> Result<Option<String>, Rejected> {
        loop {
            if let Some(source) = &mut self.source {
                if let Some(document) = source.next(&self.options)? {
                    source.empty &= document.is_empty();
                    return Ok(Some(document));
                }
                let source = self.source.take();
                if let Some(Source { path, empty: true, .. }) = source {
                    return Err(Error::Empty { path }.into());
                }
            }
            let Some(path) = self.paths.next() else { return Ok(None) };
            self.source = Some(Source::open(path, Arc::clone(&self.taken))?);
        }
    }
}

impl Iterator for Documents {
    type Item = Result<String, Rejected>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if let Err(rejected) = &next {
            match rejected.extent {
                Extent::Record => {
                    // A file whose documents are all rejected is not empty as well.
                    if let Some(source) = &mut self.source {
                        source.empty = false;
                    }
                }
                Extent::File => self.source = None,
                Extent::All => {
                    self.source = None;
                    self.paths = Vec::new().into_iter();
                }
            }
        }
        next.transpose()
    }
}

/// What could not be read, and why.
#[derive(Debug)]
pub struct Rejected {
    /// Why.
    pub error: Error,
    /// The line or record, with U+FFFD where it is not UTF-8; empty where it is a file.
    pub raw: String,
    extent: Extent,
}

/// How much is lost with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    Record,
    File,
    All,
}

impl Rejected {
    /// Whether reading ends with it: a path is missing or cannot be opened, which no document is to blame for.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.extent == Extent::All
    }

    fn record(error: Error, raw: impl Into<String>) -> Self {
        Self { error, raw: raw.into(), extent: Extent::Record }
    }
}

/// An error that is not about one record.
impl From<Error> for Rejected {
    fn from(error: Error) -> Self {
        let extent = match &error {
            Error::Missing { .. } | Error::Directory { .. } | Error::Io { .. } => Extent::All,
            _ => Extent::File,
        };
        Self { error, raw: String::new(), extent }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Lines,
    Table(char),
}

/// What a path's extensions say.
fn kind(path: &Path) -> Result<(Kind, Packing)> {
    if path == Path::new("-") {
        return Ok((Kind::Text, Packing::Plain));
    }
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let (name, packing) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Packing::Gzip),
        Some((stem, "zst")) => (stem, Packing::Zstd),
        _ => (name.as_str(), Packing::Plain),
    };
    let kind = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("txt") => Kind::Text,
        Some("jsonl") => Kind::Lines,
        Some("csv") => Kind::Table(','),
        Some("tsv") => Kind::Table('\t'),
        _ if path.is_dir() => return Err(Error::Directory { path: path.to_owned() }),
        _ => return Err(Error::Extension { path: path.to_owned() }),
    };
    Ok((kind, packing))
}

/// Bytes of a `.txt` file after which a document ends with its line.
const PIECE: usize = 1 << 22;

/// How far to read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The end of the line.
    Line,
    /// The end of a piece of a text.
    Piece,
}

/// Adds to `raw` the bytes of a piece: [`PIECE`] of them and the rest of the line, but less than twice as many.
fn piece(bytes: &mut impl BufRead, raw: &mut Vec<u8>) -> std::io::Result<usize> {
    let before = raw.len();
    bytes.by_ref().take((PIECE - before) as u64).read_to_end(raw)?;
    if raw.len() == PIECE && raw.last() != Some(&b'\n') {
        bytes.take(PIECE as u64).read_until(b'\n', raw)?;
    }
    Ok(raw.len() - before)
}

/// How many bytes at the end are the beginning of a character that goes on behind them.
fn begun(bytes: &[u8]) -> usize {
    let length = |lead: u8| match lead {
        0xC2..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF4 => 4,
        _ => 1,
    };
    let last = bytes.len() - bytes.len().min(3);
    let lead = bytes[last..].iter().rposition(|&byte| byte & 0xC0 != 0x80);
    let lead = lead.map(|at| last + at).filter(|&at| length(bytes[at]) > bytes.len() - at);
    lead.map_or(0, |at| bytes.len() - at)
}

/// One open file.
struct Source {
    path: PathBuf,
    kind: Kind,
    packing: Packing,
    bytes: Box<dyn BufRead + Send + Sync>,
    /// 1-based number of the line last read.
    line: usize,
    /// Bytes before the line to be read next.
    offset: usize,
    /// Bytes of a character that was cut.
    left: Vec<u8>,
    /// The header's fields and the place of the text among them.
    header: Option<(Vec<String>, usize)>,
    /// No document had a character so far.
    empty: bool,
}

impl Source {
    fn open(path: PathBuf, taken: Arc<AtomicU64>) -> Result<Self> {
        let (mut kind, packing) = kind(&path)?;
        let mut bytes = open(&path, packing, taken)?;
        if path == Path::new("-")
            && bytes.fill_buf().map_err(|source| io_error(&path, source))?.starts_with(b"{")
        {
            kind = Kind::Lines;
        }
        Ok(Self {
            path,
            kind,
            packing,
            bytes,
            line: 0,
            offset: 0,
            left: Vec::new(),
            header: None,
            empty: true,
        })
    }

    /// The next document or row; `None` at the end.
    fn next(&mut self, options: &ReadOptions) -> Result<Option<String>, Rejected> {
        match self.kind {
            Kind::Text if options.form == Form::Rows => {
                let line = self.line(options)?;
                Ok(line.map(|line| object_of(&[&options.column], &[line.trim_end_matches(['\n', '\r'])])))
            }
            Kind::Text => self.text(Until::Piece, options),
            Kind::Lines => {
                let Some(content) = self.line(options)? else { return Ok(None) };
                match self.object(&content, &options.column) {
                    Ok(_) if options.form == Form::Rows => Ok(Some(content)),
                    Ok(text) => Ok(Some(text)),
                    Err(error) => Err(Rejected::record(error, content)),
                }
            }
            Kind::Table(delimiter) => self.record(delimiter, options),
        }
    }

    /// The next line that is not blank; `None` at the end.
    fn line(&mut self, options: &ReadOptions) -> Result<Option<String>, Rejected> {
        while let Some(content) = self.text(Until::Line, options)? {
            if !content.trim().is_empty() {
                return Ok(Some(content));
            }
        }
        Ok(None)
    }

    /// The next text; `None` at the end.
    fn text(&mut self, until: Until, options: &ReadOptions) -> Result<Option<String>, Rejected> {
        let mut raw = std::mem::take(&mut self.left);
        let count = match until {
            Until::Line => self.bytes.read_until(b'\n', &mut raw),
            Until::Piece => piece(&mut self.bytes, &mut raw),
        };
        count.map_err(|source| match self.packing {
            Packing::Plain => io_error(&self.path, source),
            _ => Error::Compressed { path: self.path.clone(), reason: source.to_string() },
        })?;
        if until == Until::Piece && raw.len() >= 2 * PIECE {
            // No line ended: what may be the beginning of a character goes to the next piece.
            self.left = raw.split_off(raw.len() - begun(&raw));
        }
        let count = raw.len();
        if count == 0 {
            return Ok(None);
        }
        let start = self.offset;
        self.offset += count;
        self.line += 1;
        let mut text = match (String::from_utf8(raw), options.errors) {
            (Ok(text), _) => text,
            (Err(invalid), DecodeErrors::Replace) => String::from_utf8_lossy(invalid.as_bytes()).into_owned(),
            (Err(invalid), DecodeErrors::Strict) => {
                let byte = start + invalid.utf8_error().valid_up_to();
                let error = Error::Utf8 { path: self.path.clone(), byte };
                return Err(Rejected::record(error, String::from_utf8_lossy(invalid.as_bytes())));
            }
        };
        if start == 0 && text.starts_with('\u{FEFF}') {
            text.drain(..'\u{FEFF}'.len_utf8());
        }
        Ok(Some(text))
    }

    /// The text of a line of JSON.
    fn object(&self, content: &str, column: &str) -> Result<String> {
        let (path, line, column) = (self.path.clone(), self.line, column.to_owned());
        match serde_json::from_str(content) {
            Err(error) => Err(Error::Json { path, line, reason: place_in_line(&error) }),
            Ok(Value::Object(mut object)) => match object.remove(&column) {
                Some(Value::String(document)) => Ok(document),
                Some(other) => Err(Error::ColumnType { path, line, column, found: type_name(&other) }),
                None => Err(Error::NoColumn {
                    path,
                    line,
                    column,
                    fields: listed(object.keys().map(String::as_str)),
                }),
            },
            Ok(other) => Err(Error::NotAnObject { path, line, found: type_name(&other) }),
        }
    }

    /// The text of the next record of a table; the first one is the header.
    fn record(&mut self, delimiter: char, options: &ReadOptions) -> Result<Option<String>, Rejected> {
        loop {
            let Some(mut record) = self.text(Until::Line, options)? else { return Ok(None) };
            let line = self.line;
            // A quoted field may hold line ends. The count of quotes is kept, not taken again over all that was read.
            let mut is_open = csv::is_open(&record);
            while is_open {
                let Some(more) = self.text(Until::Line, options)? else { break };
                is_open ^= csv::is_open(&more);
                record.push_str(&more);
            }
            let content = record.strip_suffix('\n').unwrap_or(&record);
            let content = content.strip_suffix('\r').unwrap_or(content);
            if content.is_empty() {
                continue;
            }
            let path = || self.path.clone();
            let malformed = |reason| {
                let error = Error::Csv { path: path(), line, reason };
                // Without a header, no record of the file means anything.
                if self.header.is_some() { Rejected::record(error, content) } else { error.into() }
            };
            let mut fields = csv::fields(content, delimiter).map_err(malformed)?;
            let Some((names, place)) = &self.header else {
                let Some(place) = fields.iter().position(|name| *name == options.column) else {
                    let column = options.column.clone();
                    let fields = listed(fields.iter().map(String::as_str));
                    return Err(Error::NoColumn { path: path(), line, column, fields }.into());
                };
                self.header = Some((fields, place));
                continue;
            };
            if fields.len() != names.len() {
                let reason = format!("{} fields, but the header has {}", fields.len(), names.len());
                return Err(malformed(reason));
            }
            return Ok(Some(match options.form {
                Form::Documents => fields.swap_remove(*place),
                Form::Rows => object_of(names, &fields),
            }));
        }
    }
}

/// A JSON object of texts, in the order given; of fields of one name, the first.
fn object_of<T: AsRef<str>, U: AsRef<str>>(names: &[T], texts: &[U]) -> String {
    let mut object = String::from("{");
    for (i, (name, text)) in names.iter().zip(texts).enumerate() {
        if names[..i].iter().any(|before| before.as_ref() == name.as_ref()) {
            continue;
        }
        let comma = if i > 0 { "," } else { "" };
        object += &format!("{comma}{}:{}", Value::from(name.as_ref()), Value::from(text.as_ref()));
    }
    object + "}"
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "(none)".to_owned() } else { names.join(", ") }
}

/// The parser counts lines within the one line it was given: only its column says something.
fn place_in_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::io::Write;

    use super::*;

    fn read(files: &[(&str, &[u8])], options: &ReadOptions) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = files
            .iter()
            .map(|(name, bytes)| {
                let path = folder.path().join(name);
                fs::write(&path, bytes).unwrap();
                path
            })
            .collect();
        let documents = Documents::new(paths, options.clone())?;
        documents.map(|next| next.map_err(|rejected| rejected.error)).collect()
    }

    fn message(files: &[(&str, &[u8])]) -> String {
        read(files, &ReadOptions::default()).unwrap_err().to_string()
    }

    #[test]
    fn texts_and_lines_come_in_order() {
        let files: &[(&str, &[u8])] = &[
            ("a.txt", b"\xEF\xBB\xBFone\r\ntwo\n"),
            ("b.JSONL", "\u{FEFF}{\"text\":\"é\"}\r\n\n  \n{\"id\":1,\"text\":\"\\n\"}".as_bytes()),
        ];
        assert_eq!(read(files, &ReadOptions::default()).unwrap(), ["one\r\ntwo\n", "é", "\n"]);
        let column = ReadOptions { column: "body".into(), ..Default::default() };
        assert_eq!(read(&[("c.jsonl", b"{\"text\":1,\"body\":\"b\"}")], &column).unwrap(), ["b"]);
    }

    #[test]
    fn long_texts_are_cut_behind_lines_or_between_characters() {
        // Lines of 1000 bytes: the piece ends with the line that crosses the border.
        let lines = ("é".repeat(499) + "a\n").repeat(9000);
        let pieces = read(&[("a.txt", lines.as_bytes())], &ReadOptions::default()).unwrap();
        assert_eq!(pieces.concat(), lines);
        assert_eq!(pieces.iter().map(String::len).collect::<Vec<_>>(), [4_195_000, 4_195_000, 610_000]);
        // One line of characters of three bytes, behind one of one byte, and a byte that is none at its end.
        let line = "a".to_owned() + &"語".repeat(3_000_000);
        let pieces = read(&[("a.txt", line.as_bytes())], &ReadOptions::default()).unwrap();
        assert_eq!(pieces.concat(), line);
        assert_eq!(pieces.len(), 2);
        let text = message(&[("a.txt", &[line.as_bytes(), b"\xE8\xAA"].concat())]);
        assert!(text.contains("at byte 9000001"), "{text}");
        let nothing = "\0".repeat(2 * PIECE);
        assert_eq!(read(&[("a.txt", nothing.as_bytes())], &ReadOptions::default()).unwrap(), [nothing]);
    }

    #[test]
    fn frames_without_text_are_skipped() {
        let options = ReadOptions::default();
        let frame = |text: &str| zstd(format!("{{\"text\":\"{text}\"}}\n").as_bytes());
        let skipped = |magic: u8, bytes: &[u8]| {
            [&[magic, 0x2A, 0x4D, 0x18][..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
        };
        let file = [
            skipped(0x50, b"table"),
            frame("1"),
            skipped(0x5E, b""),
            frame("2"),
            skipped(0x5F, &[7; 300_000]),
        ];
        assert_eq!(read(&[("a.jsonl.zst", &file.concat())], &options).unwrap(), ["1", "2"]);
        for cut in [1, 3, 6, 12] {
            let text = message(&[("a.jsonl.zst", &file[0][..cut])]);
            assert!(text.contains("cut short"), "{cut}: {text}");
        }
        assert!(message(&[("a.jsonl.zst", &file[0])]).contains("holds no document"));
    }

    #[test]
    fn invalid_bytes_are_named_or_replaced() {
        let bytes = b"ab\xFFc\xE2\x82";
        let text = message(&[("a.txt", bytes)]);
        assert!(
            text.contains("a.txt") && text.contains("byte 2") && text.contains("errors=replace"),
            "{text}"
        );
        let replace = ReadOptions { errors: DecodeErrors::Replace, ..Default::default() };
        assert_eq!(read(&[("a.txt", bytes)], &replace).unwrap(), ["ab\u{FFFD}c\u{FFFD}"]);
        assert_eq!(read(&[("a.jsonl", b"{\"text\":\"\xFF\"}")], &replace).unwrap(), ["\u{FFFD}"]);
    }

    #[test]
    fn each_error_names_its_place_and_remedy() {
        for (content, parts) in [
            ("{\"text\":\"a\"}\n\n{\"text\" 1}\n", &["a.jsonl:3", "valid JSON", "at column 9"][..]),
            ("[1]", &["a.jsonl:1", "an array"]),
            ("\n{\"body\":\"x\",\"id\":1}", &["a.jsonl:2", "\"text\"", "body, id"]),
            ("{}", &["(none)"]),
            ("{\"text\":null}", &["a.jsonl:1", "null", "string"]),
            ("\n \n", &["holds no document"]),
        ] {
            let text = message(&[("a.jsonl", content.as_bytes())]);
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        assert!(message(&[("a.txt", b"")]).contains("a.txt holds no document"));
        assert!(message(&[("a.txt", b"\xEF\xBB\xBF")]).contains("holds no document"));
        let text = message(&[("a.doc", b"x")]);
        assert!(text.contains(".txt, .jsonl, .csv"), "{text}");
        let options = ReadOptions::default();
        let of = |path: &Path| {
            let documents = Documents::new(vec![path.to_owned()], options.clone());
            let first = documents.map(|mut documents| documents.next().unwrap().unwrap_err());
            first.map_or_else(|error| error, |rejected| rejected.error)
        };
        assert!(matches!(of(Path::new("/no/such/file.txt")), Error::Missing { .. }));
        assert!(matches!(of(tempfile::tempdir().unwrap().path()), Error::Directory { .. }));
        assert!(matches!(Documents::new(vec![], options.clone()), Err(Error::NoFiles)));
    }

    #[test]
    fn tables_give_their_column() {
        let options = ReadOptions::default();
        let table = "\u{FEFF}id,text\r\n1,\"a, \"\"b\"\"\nc\"\r\n\n2,d\n3,";
        assert_eq!(read(&[("a.csv", table.as_bytes())], &options).unwrap(), ["a, \"b\"\nc", "d", ""]);
        assert_eq!(read(&[("a.tsv", b"text\tid\nx, y\t1\n")], &options).unwrap(), ["x, y"]);
        for (content, parts) in [
            ("id,body\n1,x\n", &["a.csv:1", "\"text\"", "id, body"][..]),
            ("text\nx\n\"y\nz", &["a.csv:3", "never closed in field 1"]),
            ("text,id\nx,1\ny\n", &["a.csv:3", "1 fields", "has 2"]),
            ("text\n", &["holds no document"]),
        ] {
            let text = message(&[("a.csv", content.as_bytes())]);
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
    }

    #[test]
    fn rows_come_with_the_object_they_stand_in() {
        let folder = tempfile::tempdir().unwrap();
        let files: &[(&str, &[u8])] = &[
            ("a.txt", b"\xEF\xBB\xBFone \"1\"\r\n\n  two\n"),
            ("b.jsonl", b"{\"z\": 1.0, \"text\": \"b\", \"a\": [2]}\n"),
            ("c.csv", b"z,text,a,z\n\"1,\",c,,2\n"),
        ];
        let paths = files.iter().map(|(name, bytes)| {
            fs::write(folder.path().join(name), bytes).unwrap();
            folder.path().join(name)
        });
        let options = ReadOptions { form: Form::Rows, ..Default::default() };
        let rows: Result<Vec<String>, Rejected> = Documents::new(paths.collect(), options).unwrap().collect();
        let expected = [
            r#"{"text":"one \"1\""}"#,
            r#"{"text":"  two"}"#,
            "{\"z\": 1.0, \"text\": \"b\", \"a\": [2]}\n",
            r#"{"z":"1,","text":"c","a":""}"#,
        ];
        assert_eq!(rows.unwrap(), expected);
    }

    #[test]
    fn what_follows_a_rejected_line_or_file_is_read() {
        let cut = &gzip(&b"{\"text\":\"x\"}\n".repeat(5000))[..60];
        let files: &[(&str, &[u8])] = &[
            ("a.jsonl", b"{\"text\":\"1\"}\nno\n{\"text\":2}\n\xFF\n{\"text\":\"3\"}\n"),
            ("b.csv", b"body\nx\n"),
            ("c.jsonl.gz", cut),
            ("d.csv", b"text,id\ny,1\nonly\n\"z\",2\n"),
            ("e.jsonl", b"{}\n"),
            ("f.txt", b""),
            ("g.txt", b"end"),
        ];
        let folder = tempfile::tempdir().unwrap();
        let put = |(name, bytes): &(&str, &[u8])| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let mut paths: Vec<PathBuf> = files.iter().map(put).collect();
        paths.extend([folder.path().join("none.txt"), folder.path().join("g.txt")]);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for next in Documents::new(paths, ReadOptions::default()).unwrap() {
            match next {
                Ok(document) => good.push(document),
                Err(rejected) => bad.push((rejected.raw.clone(), rejected.is_final())),
            }
        }
        assert!(good.starts_with(&["1".into(), "3".into()]) && good.ends_with(&["z".into(), "end".into()]));
        let raw: Vec<&str> = bad.iter().map(|(raw, _)| raw.as_str()).collect();
        assert_eq!(raw, ["no\n", "{\"text\":2}\n", "\u{FFFD}\n", "", "", "only", "{}\n", "", ""]);
        assert_eq!(bad.iter().position(|(_, last)| *last), Some(bad.len() - 1));
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn compressed_files_read_as_plain_ones_and_cut_ones_are_errors() {
        let options = ReadOptions::default();
        let first: String = (0..2000).map(|i| format!("{{\"text\":\"line {i}\"}}\n")).collect();
        let plain = read(&[("a.jsonl", first.repeat(2).as_bytes())], &options).unwrap();
        for (name, whole) in [("a.jsonl.gz", gzip(first.as_bytes())), ("a.jsonl.ZST", zstd(first.as_bytes()))]
        {
            // Members and frames follow each other, as `cat` and parallel compressors write them.
            assert_eq!(read(&[(name, &whole.repeat(2))], &options).unwrap(), plain, "{name}");
            for cut in [0, 1, 3, 11, whole.len() / 2, whole.len() - 1] {
                let text = message(&[(name, &whole[..cut])]);
                let expected = if cut == 0 && name.ends_with("ZST") { "no document" } else { "cut short" };
                assert!(text.contains(expected), "{name} cut at {cut}: {text}");
            }
            let mut garbled = whole.clone();
            let middle = garbled.len() / 2;
            garbled[middle] ^= 0x55;
            assert!(read(&[(name, &garbled)], &options).is_err(), "{name}");
        }
    }
}
