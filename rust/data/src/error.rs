//! What can go wrong between a text file and a batch.

use std::path::PathBuf;

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a text file and a batch; each message is one sentence that ends in what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No path was given to read.
    #[error("[data] no file was given to read; name at least one file, or - for standard input")]
    NoFiles,
    /// A path does not exist.
    #[error("[data] {} does not exist; check the path", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A path is a directory.
    #[error("[data] {} is a directory; name the files in it", path.display())]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// A compressed file ends early or does not decompress.
    #[error("[data] {} is cut short or damaged ({reason}); fetch or write it again", path.display())]
    Compressed {
        /// The path.
        path: PathBuf,
        /// The decoder's reason.
        reason: String,
    },
    /// A record of a .csv or .tsv file is malformed.
    #[error("[data] {}:{line} is not valid CSV ({reason}); quote the field and double the quotes in it", path.display())]
    Csv {
        /// The path.
        path: PathBuf,
        /// 1-based number of the line in which the record begins.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A file's extension is none of the known ones.
    #[error("[data] {} has no known extension; rename or convert it to one of .txt, .jsonl, .csv, .tsv, each also with .gz or .zst", path.display())]
    Extension {
        /// The path.
        path: PathBuf,
    },
    /// A file holds no text.
    #[error("[data] {} holds no document; remove it from the list or check how it was written", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused to read a file.
    #[error("[data] {} could not be read ({source}); check its permissions and the disk", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is not UTF-8.
    #[error("[data] {} is not valid UTF-8 at byte {byte}; convert it, or read it with errors=replace", path.display())]
    Utf8 {
        /// The path.
        path: PathBuf,
        /// 0-based offset of the first byte that is not UTF-8, counted from the file's first byte.
        byte: usize,
    },
    /// A line of a .jsonl file is not JSON.
    #[error("[data] {}:{line} is not valid JSON ({reason}); write one object on each line", path.display())]
    Json {
        /// The path.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The parser's reason, with the column.
        reason: String,
    },
    /// A line of a .jsonl file is JSON, but not an object.
    #[error("[data] {}:{line} is {found}, not an object; write one object on each line", path.display())]
    NotAnObject {
        /// The path.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The JSON type found.
        found: &'static str,
    },
    /// An object lacks the text field.
    #[error("[data] {}:{line} has no field {column:?}; set column to one of its fields: {fields}", path.display())]
    NoColumn {
        /// The path.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The field asked for.
        column: String,
        /// The fields that the object has, comma-separated.
        fields: String,
    },
    /// The text field is not a string.
    #[error("[data] {}:{line} holds {found} in field {column:?}; the text must be a string", path.display())]
    ColumnType {
        /// The path.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The field asked for.
        column: String,
        /// The JSON type found.
        found: &'static str,
    },
    /// A cleaning step is not known.
    #[error("[data] there is no cleaning step {name:?}; choose from {known}")]
    UnknownStep {
        /// The name given.
        name: String,
        /// The known names, comma-separated.
        known: String,
    },
    /// An option's value is outside its range.
    #[error("[data] {option} is {value}; it must be {rule}")]
    OptionValue {
        /// The option's name.
        option: &'static str,
        /// The value given.
        value: String,
        /// What the value must be.
        rule: String,
    },
    /// Document offsets do not describe the tokens.
    #[error(
        "[data] document offset {index} is {found}, but offsets must start at 0, never fall and end at the token count \
         {tokens}; prepare the corpus again"
    )]
    Offsets {
        /// Which offset is wrong (0 for an empty list).
        index: usize,
        /// Its value (or `missing`).
        found: String,
        /// The number of tokens.
        tokens: usize,
    },
    /// A token id is outside the vocabulary.
    #[error(
        "[data] token {position} of the corpus is {id}, but ids must be below {limit}; prepare the corpus with this \
         model's tokenizer"
    )]
    TokenId {
        /// Where in the corpus.
        position: usize,
        /// The id.
        id: u32,
        /// The first id that is too large.
        limit: usize,
    },
    /// The corpus is too short to hold one block and the token after it.
    #[error(
        "[data] the corpus has {tokens} tokens, but seq_len = {seq_len} needs at least {needed}; add text or lower \
         seq_len",
        needed = seq_len + 1
    )]
    ShortCorpus {
        /// Tokens in the corpus.
        tokens: usize,
        /// Tokens in a block.
        seq_len: usize,
    },
    /// A file of prepared tokens is not one.
    #[error("[data] {} {what}; prepare the corpus again", path.display())]
    Shard {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// A file of prepared tokens cannot be read or written.
    #[error(transparent)]
    File(#[from] pyrformer_files::Error),
    /// There are no two texts that could or could not follow each other.
    #[error(
        "[data] pairs of sentences need two paragraphs or more, one of them with two sentences; give more text, or files \
         to measure on with --valid"
    )]
    NoPairs,
    /// No document has a token.
    #[error("[data] all {documents} documents are empty; add text")]
    NoTokens {
        /// Number of documents.
        documents: usize,
    },
}

impl Error {
    /// An [`Error::OptionValue`] of anything that prints.
    pub(crate) fn option(option: &'static str, value: impl ToString, rule: impl Into<String>) -> Self {
        Self::OptionValue { option, value: value.to_string(), rule: rule.into() }
    }
}

/// Checks that `offsets` cut `tokens` ids into documents.
pub(crate) fn check_offsets(tokens: usize, offsets: &[u64]) -> Result<()> {
    let wrong = |index: usize| Error::Offsets {
        index,
        found: offsets.get(index).map_or("missing".to_owned(), u64::to_string),
        tokens,
    };
    if offsets.first() != Some(&0) {
        return Err(wrong(0));
    }
    if let Some(index) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        return Err(wrong(index + 1));
    }
    if offsets[offsets.len() - 1] != tokens as u64 {
        return Err(wrong(offsets.len() - 1));
    }
    Ok(())
}

/// The most tokens of a batch; its arrays take half a gigabyte, and no model reads as many at once.
pub(crate) const MOST_TOKENS: usize = 1 << 24;

/// Checks that a batch of `rows` × `width` places is neither empty nor beyond `most` places.
pub(crate) fn check_size(rows: usize, width_name: &'static str, width: usize, most: usize) -> Result<()> {
    if rows == 0 {
        return Err(Error::option("batch_size", rows, "at least 1"));
    }
    match rows.checked_mul(width) {
        Some(places) if places <= most => Ok(()),
        _ => Err(Error::option(
            "batch_size",
            rows,
            format!("small enough that batch_size × {width_name} ({width}) stays within {most}"),
        )),
    }
}
