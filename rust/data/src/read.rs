//! Reads documents from `.txt` files (one document a file) and `.jsonl` files (one document a line).

use std::borrow::Cow;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

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

/// How to read documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadOptions {
    /// The field of a `.jsonl` object that holds the text; default `"text"`.
    pub column: String,
    /// What to do with bytes that are not UTF-8; default [`DecodeErrors::Strict`].
    pub errors: DecodeErrors,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { column: "text".to_owned(), errors: DecodeErrors::Strict }
    }
}

/// The documents of `paths`, in the order of the paths and, within a file, of its lines.
///
/// A `.txt` file is one document, a `.jsonl` file one for each line that is not blank: the string in its field
/// `options.column`. Extensions are read without regard to case; a leading byte-order mark is dropped.
///
/// # Errors
/// If no path is given; if a path is missing, a directory, of another extension, unreadable or without a document;
/// if a file is not UTF-8 (with [`DecodeErrors::Strict`]); if a line is not an object with a string in the field.
pub fn read_documents(paths: &[PathBuf], options: &ReadOptions) -> Result<Vec<String>> {
    if paths.is_empty() {
        return Err(Error::NoFiles);
    }
    let mut documents = Vec::new();
    for path in paths {
        let before = documents.len();
        match kind(path)? {
            Kind::Text => documents.push(decode(path, options.errors)?),
            Kind::Lines => read_lines(path, options, &mut documents)?,
        }
        if documents[before..].iter().all(String::is_empty) {
            return Err(Error::Empty { path: path.clone() });
        }
    }
    Ok(documents)
}

enum Kind {
    Text,
    Lines,
}

fn kind(path: &Path) -> Result<Kind> {
    let metadata = fs::metadata(path).map_err(|source| io_error(path, source))?;
    if metadata.is_dir() {
        return Err(Error::Directory { path: path.to_owned() });
    }
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        Some("txt") => Ok(Kind::Text),
        Some("jsonl") => Ok(Kind::Lines),
        _ => Err(Error::Extension { path: path.to_owned() }),
    }
}

fn io_error(path: &Path, source: std::io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::NotFound => Error::Missing { path },
        _ => Error::Io { path, source },
    }
}

/// The text of a file without its byte-order mark.
fn decode(path: &Path, errors: DecodeErrors) -> Result<String> {
    let bytes = fs::read(path).map_err(|source| io_error(path, source))?;
    let mut text = match (String::from_utf8(bytes), errors) {
        (Ok(text), _) => text,
        (Err(invalid), DecodeErrors::Replace) => match String::from_utf8_lossy(invalid.as_bytes()) {
            Cow::Owned(text) => text,
            Cow::Borrowed(text) => text.to_owned(),
        },
        (Err(invalid), DecodeErrors::Strict) => {
            return Err(Error::Utf8 { path: path.to_owned(), byte: invalid.utf8_error().valid_up_to() });
        }
    };
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

fn read_lines(path: &Path, options: &ReadOptions, documents: &mut Vec<String>) -> Result<()> {
    let text = decode(path, options.errors)?;
    for (index, content) in text.lines().enumerate() {
        if content.trim().is_empty() {
            continue;
        }
        let (path, line, column) = (path.to_owned(), index + 1, options.column.clone());
        match serde_json::from_str(content) {
            Err(error) => return Err(Error::Json { path, line, reason: place_in_line(&error) }),
            Ok(Value::Object(mut object)) => match object.remove(&column) {
                Some(Value::String(document)) => documents.push(document),
                Some(other) => {
                    return Err(Error::ColumnType { path, line, column, found: type_name(&other) });
                }
                None => {
                    let names: Vec<&str> = object.keys().map(String::as_str).collect();
                    let fields = if names.is_empty() { "(none)".to_owned() } else { names.join(", ") };
                    return Err(Error::NoColumn { path, line, column, fields });
                }
            },
            Ok(other) => return Err(Error::NotAnObject { path, line, found: type_name(&other) }),
        }
    }
    Ok(())
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
        read_documents(&paths, options)
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
        let text = message(&[("a.csv", b"x")]);
        assert!(text.contains(".txt, .jsonl"), "{text}");
        let options = ReadOptions::default();
        let of = |path: &Path| read_documents(&[path.to_owned()], &options).unwrap_err();
        assert!(matches!(of(Path::new("/no/such/file.txt")), Error::Missing { .. }));
        assert!(matches!(of(tempfile::tempdir().unwrap().path()), Error::Directory { .. }));
        assert!(matches!(read_documents(&[], &options), Err(Error::NoFiles)));
    }
}
