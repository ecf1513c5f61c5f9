//! Training: from documents to a tokenizer.
//!
//! Words are counted in parallel, then merges are learned one by one ([`merges`]). The result depends on the documents
//! and options only: counts are 64-bit sums, words are put in order before use, and of two pairs that are equally
//! frequent the one with the smaller ids wins (left first), so that neither threads nor hash order show.

mod count;
mod merges;
mod unigram;

use rustc_hash::FxHashMap;

use crate::added::AddedToken;
use crate::bpe::{Bpe, BpeOptions};
use crate::bytes::byte_to_char;
use crate::format::Parts;
use crate::model::Model;
use crate::native::Native;
use crate::presets::Preset;
use crate::unigram::Unigram;
use crate::vocab::Vocab;
use crate::wordpiece::WordPiece;
use crate::{Error, Result, Tokenizer};

use count::Counts;
use merges::Symbols;

/// How to train. [`TrainOptions::new`] sets the defaults.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Kind and treatment of text.
    pub preset: Preset,
    /// Most tokens, special ones included. Characters ([`Preset::Char`]) ignore it.
    pub vocab_size: usize,
    /// Pairs seen less often are not merged; default 2.
    pub min_frequency: u64,
    /// Special tokens in the order of their ids, first of all; default those of the preset. WordPiece needs `[UNK]`,
    /// `[CLS]` and `[SEP]` among them. With `[UNK]` or `<unk>` a character vocabulary has an unknown token, without,
    /// an unknown character is an error.
    pub special_tokens: Option<Vec<String>>,
    /// Most characters in the alphabet, the most frequent ones; default the preset's: 1000 for BERT's two, no limit for
    /// the others. Byte-level BPE has its 256 bytes whatever is said here.
    pub limit_alphabet: Option<usize>,
    /// Threads; default 0, one per core. They do not change the result.
    pub threads: usize,
}

impl TrainOptions {
    /// The defaults of `preset`.
    #[must_use]
    pub fn new(preset: Preset, vocab_size: usize) -> Self {
        let bert = matches!(preset, Preset::BertUncased | Preset::BertCased);
        Self {
            preset,
            vocab_size,
            min_frequency: 2,
            special_tokens: None,
            limit_alphabet: bert.then_some(1000),
            threads: 0,
        }
    }
}

/// How far training is: `done` of `total` steps of `stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `"merge"` (tokens of the vocabulary) or `"prune"` (Unigram, in thousandths).
    pub stage: &'static str,
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
}

/// Training in steps: documents are counted as they come and need not be kept.
pub struct Trainer {
    options: TrainOptions,
    special: Vec<String>,
    /// The tokenizer without what is to be learned: it finds the words.
    blank: Native,
    counts: Counts,
}

impl Trainer {
    /// A trainer that has seen no text.
    ///
    /// # Errors
    /// [`Error::Option`] for special tokens that are missing, empty or twice.
    pub fn new(options: TrainOptions) -> Result<Self> {
        let special: Vec<String> = match &options.special_tokens {
            Some(tokens) => tokens.clone(),
            None => options.preset.special_tokens().iter().map(|&t| t.to_owned()).collect(),
        };
        check_special(&special)?;
        let blank = empty(options.preset, &special)?;
        let counts = match options.preset {
            Preset::Char => Counts::Characters(FxHashMap::default()),
            _ => Counts::Words(FxHashMap::default()),
        };
        Ok(Self { options, special, blank, counts })
    }

    /// Counts documents.
    pub fn add<S: AsRef<str> + Sync>(&mut self, documents: &[S]) {
        self.counts.add(documents, &self.blank, self.options.threads);
    }

    /// Learns the vocabulary of what was counted. `progress` hears of each stage as it goes, from this thread.
    ///
    /// # Errors
    /// [`Error::Train`] if there is no text, or `vocab_size` does not even hold special tokens and alphabet.
    pub fn finish(self, progress: &mut dyn FnMut(Progress)) -> Result<Tokenizer> {
        let Self { options, special, blank, counts } = self;
        let model = match counts {
            Counts::Characters(counts) => characters(counts, &special, &options)?,
            Counts::Words(counts) => {
                let words = count::words(counts, &blank);
                let learn = match options.preset {
                    Preset::Gpt2 | Preset::Char => bytes,
                    Preset::Llama => byte_fallback,
                    Preset::Xlnet => pieces,
                    Preset::BertUncased | Preset::BertCased | Preset::Multilingual => wordpiece,
                };
                learn(&words, &special, &options, progress)?
            }
        };
        Tokenizer::new(Parts { model, ..blank.parts })
    }
}

impl Tokenizer {
    /// Trains a tokenizer on `documents`: a [`Trainer`] that is given all of them at once.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Trainer::finish`].
    pub fn train<S: AsRef<str> + Sync>(
        documents: &[S],
        options: &TrainOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let mut trainer = Trainer::new(options.clone())?;
        trainer.add(documents);
        trainer.finish(progress)
    }
}

fn check_special(tokens: &[String]) -> Result<()> {
    for (i, token) in tokens.iter().enumerate() {
        if token.is_empty() || tokens[..i].contains(token) {
            return Err(Error::option("train", "special_tokens", format!("holds {token:?}, empty or twice")));
        }
    }
    Ok(())
}

/// A tokenizer of `preset` that knows its special tokens and nothing else.
fn empty(preset: Preset, special: &[String]) -> Result<Native> {
    let vocab = Vocab::new(&special.iter().zip(0..).collect::<Vec<_>>())?;
    let added = special.iter().zip(0..).map(|(token, id)| AddedToken::special(token, id)).collect();
    let model = Model::Bpe(Bpe::with_ids(vocab, vec![], BpeOptions::default(), false)?);
    let needed: &[&str] = match preset {
        Preset::BertUncased | Preset::BertCased | Preset::Multilingual => &["[UNK]", "[CLS]", "[SEP]"],
        Preset::Xlnet | Preset::Llama => &["<unk>"],
        Preset::Gpt2 | Preset::Char => &[],
    };
    if let Some(token) = needed.iter().find(|token| !special.iter().any(|s| s == *token)) {
        return Err(Error::option(
            "train",
            "special_tokens",
            format!("lacks {token}, which this kind of tokenizer needs"),
        ));
    }
    Native::new(preset.parts(added, model))
}

fn no_text() -> Error {
    Error::Train("there is no text to learn from; give documents that hold more than white space".into())
}

/// `(character, count)` of all words, the most frequent first, equal ones by code point.
fn alphabet(counts: impl Iterator<Item = (char, u64)>, limit: Option<usize>) -> Vec<char> {
    let mut sums = FxHashMap::default();
    for (c, n) in counts {
        *sums.entry(c).or_insert(0u64) += n;
    }
    let mut chars: Vec<(char, u64)> = sums.into_iter().collect();
    chars.sort_unstable_by_key(|&(c, n)| (std::cmp::Reverse(n), c));
    chars.truncate(limit.unwrap_or(chars.len()));
    let mut chars: Vec<char> = chars.into_iter().map(|(c, _)| c).collect();
    chars.sort_unstable();
    chars
}

/// The alphabet of `words`; without a limit, the characters that make up 99.95 % of them, SentencePiece's
/// `character_coverage`.
fn covering_alphabet(words: &[(String, u64)], limit: Option<usize>) -> Vec<char> {
    let counts = || words.iter().flat_map(|(word, n)| word.chars().map(|c| (c, *n)));
    let limit = limit.unwrap_or_else(|| {
        let mut sums = FxHashMap::default();
        counts().for_each(|(c, n)| *sums.entry(c).or_insert(0u64) += n);
        let mut sums: Vec<u64> = sums.into_values().collect();
        sums.sort_unstable_by_key(|&n| std::cmp::Reverse(n));
        let mut uncovered = sums.iter().sum::<u64>();
        let spare = uncovered / 2000;
        let covering = sums.iter().take_while(|&&n| {
            let wanted = uncovered > spare;
            uncovered -= n;
            wanted
        });
        covering.count()
    });
    alphabet(counts(), Some(limit.min(usize::from(u16::MAX) - 1)))
}

/// The vocabulary before the first merge must fit.
fn check_size(symbols: &Symbols, n_special: usize, options: &TrainOptions) -> Result<()> {
    if symbols.len() <= options.vocab_size {
        return Ok(());
    }
    Err(Error::Train(format!(
        "vocab_size is {}, but {n_special} special tokens and an alphabet of {} need at least {}; raise it{}",
        options.vocab_size,
        symbols.len() - n_special,
        symbols.len(),
        if options.preset == Preset::Gpt2 { "" } else { " or set limit_alphabet" },
    )))
}

/// Byte-level BPE. Ids: special tokens, the 256 bytes in the order of their characters, merges.
fn bytes(
    words: &[(String, u64)],
    special: &[String],
    options: &TrainOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Model> {
    if words.is_empty() {
        return Err(no_text());
    }
    let mut symbols = Symbols::new(special, "");
    let mut chars: Vec<char> = (0..=255).map(byte_to_char).collect();
    chars.sort_unstable();
    chars.iter().for_each(|c| {
        symbols.add(&c.to_string());
    });
    check_size(&symbols, special.len(), options)?;
    let ids: Vec<u32> = (0..=255).map(|byte| symbols.add(&byte_to_char(byte).to_string())).collect();
    let split = words.iter().map(|(word, n)| (word.bytes().map(|b| ids[b as usize]).collect(), *n));
    let merges = merges::learn(split, &mut symbols, options.vocab_size, options.min_frequency, progress);
    let model = Bpe::new(symbols.into_vocab()?, &merges, BpeOptions::default(), true)?;
    Ok(Model::Bpe(model))
}

/// BPE on characters, with bytes for those outside the alphabet. Ids: special tokens, `<0x00>` … `<0xFF>`, merges,
/// characters; the order of SentencePiece.
fn byte_fallback(
    words: &[(String, u64)],
    special: &[String],
    options: &TrainOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Model> {
    let alphabet = covering_alphabet(words, options.limit_alphabet);
    if alphabet.is_empty() {
        return Err(no_text());
    }
    let mut symbols = Symbols::new(special, "");
    for byte in 0..=255u8 {
        symbols.add(&format!("<0x{byte:02X}>"));
    }
    let ids: Vec<u32> = alphabet.iter().map(|c| symbols.add(&c.to_string())).collect();
    check_size(&symbols, special.len(), options)?;
    // A character outside the alphabet ends a run of symbols: nothing is merged across the bytes it becomes.
    let mut split: Vec<(Vec<u32>, u64)> = vec![];
    for (word, n) in words {
        let known = |c: char| alphabet.binary_search(&c).ok().map(|i| ids[i]);
        let mut run = vec![];
        for id in word.chars().map(known).chain([None]) {
            match id {
                Some(id) => run.push(id),
                None if run.is_empty() => {}
                None => split.push((std::mem::take(&mut run), *n)),
            }
        }
    }
    let merges =
        merges::learn(split.into_iter(), &mut symbols, options.vocab_size, options.min_frequency, progress);
    let unk_token = special.iter().find(|t| *t == "<unk>").cloned();
    let options = BpeOptions { unk_token, fuse_unk: true, byte_fallback: true, ..BpeOptions::default() };
    Ok(Model::Bpe(Bpe::new(symbols.into_vocab()?, &merges, options, false)?))
}

/// Unigram. Ids: special tokens, then pieces, the likeliest first.
fn pieces(
    words: &[(String, u64)],
    special: &[String],
    options: &TrainOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Model> {
    let alphabet = covering_alphabet(words, options.limit_alphabet);
    if alphabet.is_empty() {
        return Err(no_text());
    }
    let mut symbols = Symbols::new(special, "");
    for c in &alphabet {
        symbols.add(&c.to_string());
    }
    check_size(&symbols, special.len(), options)?;
    let room = options.vocab_size - special.len();
    let learned = unigram::learn(words, &alphabet, room, options.threads, progress);
    let learned = learned.into_iter().filter(|(piece, _)| !special.contains(piece));
    let entries: Vec<_> = special.iter().map(|token| (token.clone(), 0.0)).chain(learned).collect();
    let unk_id = special.iter().position(|token| token == "<unk>").map(|id| id as u32);
    Ok(Model::Unigram(Unigram::new(&entries, unk_id, false)?))
}

/// WordPiece, learned as BPE over pieces of which those inside a word carry `##`. Ids: special tokens, characters,
/// characters inside words, merges. Characters outside the alphabet are left out of their words.
fn wordpiece(
    words: &[(String, u64)],
    special: &[String],
    options: &TrainOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Model> {
    let counts = words.iter().flat_map(|(word, n)| word.chars().map(|c| (c, *n)));
    let alphabet = alphabet(counts, options.limit_alphabet);
    if alphabet.is_empty() {
        return Err(no_text());
    }
    let mut symbols = Symbols::new(special, "##");
    let starts: Vec<u32> = alphabet.iter().map(|c| symbols.add(&c.to_string())).collect();
    let known = |c: char| alphabet.binary_search(&c).ok();
    let mut inside = vec![false; alphabet.len()];
    for (word, _) in words {
        word.chars().skip(1).filter_map(known).for_each(|i| inside[i] = true);
    }
    let insides: Vec<u32> = (0..alphabet.len())
        .map(|i| if inside[i] { symbols.add(&format!("##{}", alphabet[i])) } else { u32::MAX })
        .collect();
    check_size(&symbols, special.len(), options)?;
    let piece = |(at, c): (usize, char)| known(c).map(|i| if at == 0 { starts[i] } else { insides[i] });
    let split = words.iter().map(|(word, n)| (word.chars().enumerate().filter_map(piece).collect(), *n));
    merges::learn(split, &mut symbols, options.vocab_size, options.min_frequency, progress);
    let model = WordPiece::new(symbols.into_vocab()?, "[UNK]".into(), "##".into(), 100)?;
    Ok(Model::WordPiece(model))
}

/// One token for each character. Ids: special tokens, characters by code point.
fn characters(counts: FxHashMap<char, u64>, special: &[String], options: &TrainOptions) -> Result<Model> {
    let n_chars = counts.len();
    let alphabet = alphabet(counts.into_iter(), options.limit_alphabet);
    if alphabet.is_empty() {
        return Err(no_text());
    }
    let unk_token = special.iter().find(|t| matches!(t.as_str(), "[UNK]" | "<unk>")).cloned();
    if alphabet.len() < n_chars && unk_token.is_none() {
        let problem = format!("is {} of {n_chars} characters; give [UNK] as a special token", alphabet.len());
        return Err(Error::option("train", "limit_alphabet", problem));
    }
    let mut symbols = Symbols::new(special, "");
    for c in alphabet {
        symbols.add(&c.to_string());
    }
    let options = BpeOptions { unk_token, ..BpeOptions::default() };
    Ok(Model::Bpe(Bpe::with_ids(symbols.into_vocab()?, vec![], options, false)?))
}
