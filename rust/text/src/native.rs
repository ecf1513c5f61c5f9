//! The fast way: a pipeline of this crate's own parts.
//!
//! A text passes through added tokens (cut out first), normalizer, pre-tokenizer, model and template. `encode` keeps
//! track of where everything came from; `ids` only makes ids, word by word through a cache, and gives the same ones.

use crate::added::Finder;
use crate::bytes::write_bytes;
use crate::decode::Stages;
use crate::encoding::Encoding;
use crate::format::Parts;
use crate::ids::Pool;
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::pretokenize::Words;
use crate::template::Template;
use crate::text::{Origin, Text};
use crate::{Error, Result};

/// A tokenizer of parts that are all known here.
pub(crate) struct Native {
    pub(crate) parts: Parts,
    pub(crate) words: Words,
    pub(crate) template: Template,
    stages: Stages,
    /// Added tokens found in the text as it is, and those found once it is normalized.
    pub(crate) raw: Finder,
    pub(crate) normalized: Finder,
    /// By id: the string of an added token as the decoder sees it, and whether it is special.
    added: Vec<Option<(String, bool)>>,
    /// The bytes of all tokens, where the decoder is byte-level, and by id where they end.
    byte_tokens: Option<(Vec<u8>, Vec<u32>)>,
    pub(crate) pool: Pool,
}

impl Clone for Native {
    fn clone(&self) -> Self {
        Self::new(self.parts.clone()).expect("the parts made a tokenizer before")
    }
}

impl Native {
    /// Puts a tokenizer together, checking that the parts fit.
    pub(crate) fn new(mut parts: Parts) -> Result<Self> {
        parts.added_tokens.sort_by_key(|t| t.id);
        parts.normalizer.iter().try_for_each(Normalizer::check)?;
        let words = Words::new(parts.pre_tokenizer.as_ref())?;
        let template = Template::new(parts.post_processor.as_ref())?;
        let stages = Stages::new(parts.decoder.as_ref())?;
        let vocab = parts.model.vocab();
        let mut added: Vec<Option<(String, bool)>> = vec![];
        let (mut raw, mut normalized) = (vec![], vec![]);
        for token in &parts.added_tokens {
            let clash = vocab.token(token.id).is_some_and(|t| t != token.content)
                || vocab.id(&token.content).is_some_and(|id| id != token.id);
            let id = token.id as usize;
            if clash || id > vocab.id_bound() + (1 << 20) || added.get(id).is_some_and(Option::is_some) {
                let problem =
                    format!("{:?} cannot have id {id}: the vocabulary says otherwise", token.content);
                return Err(Error::format("added_tokens", problem));
            }
            added.resize(added.len().max(id + 1), None);
            let mut string = token.content.clone();
            if token.normalized {
                if let Some(normalizer) = &parts.normalizer {
                    let mut text = Text::<()>::new(&string, 0);
                    normalizer.apply(&mut text);
                    string = text.to_text();
                }
                normalized.push((string.clone(), token.clone()));
            } else {
                raw.push((string.clone(), token.clone()));
            }
            added[id] = Some((string, token.special));
        }
        let mut native = Self {
            words,
            template,
            stages,
            raw: Finder::new(raw.into_iter()),
            normalized: Finder::new(normalized.into_iter()),
            added,
            byte_tokens: None,
            pool: Pool::default(),
            parts,
        };
        if native.stages.is_byte_level() {
            let (mut bytes, mut ends) = (vec![], Vec::with_capacity(native.vocab_size()));
            for id in 0..native.vocab_size() as u32 {
                write_bytes(native.decoder_token(id).unwrap_or_default(), &mut bytes);
                ends.push(bytes.len() as u32);
            }
            native.byte_tokens = Some((bytes, ends));
        }
        Ok(native)
    }

    /// One more than the highest id: the rows an embedding needs.
    pub(crate) fn vocab_size(&self) -> usize {
        self.parts.model.vocab().id_bound().max(self.added.len())
    }

    /// The id of a token string, added tokens included.
    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        let added = self.parts.added_tokens.iter().find(|t| t.content == token).map(|t| t.id);
        added.or_else(|| self.parts.model.vocab().id(token))
    }

    /// The token string of an id, as the vocabulary has it.
    pub(crate) fn id_to_token(&self, id: u32) -> Option<&str> {
        let at = self.parts.added_tokens.binary_search_by_key(&id, |t| t.id);
        match at {
            Ok(i) => Some(&self.parts.added_tokens[i].content),
            Err(_) => self.parts.model.vocab().token(id),
        }
    }

    /// Whether `id` is a special token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        matches!(self.added.get(id as usize), Some(Some((_, true))))
    }

    /// Encodes one text or two; truncation applies, padding does not.
    pub(crate) fn encode(
        &self,
        text: &str,
        pair: Option<&str>,
        add_special_tokens: bool,
    ) -> Result<Encoding> {
        let mut first = self.encode_one(text, 0)?;
        let mut second = pair.map(|pair| self.encode_one(pair, 1)).transpose()?;
        if let Some(truncation) = &self.parts.truncation {
            let n_added = if add_special_tokens { self.template.n_added(pair.is_some()) } else { 0 };
            truncation.apply(&mut first, second.as_mut(), n_added)?;
        }
        Ok(self.template.apply(first, second, add_special_tokens))
    }

    /// One text through everything but the template.
    fn encode_one(&self, text: &str, sequence: u32) -> Result<Encoding> {
        if u32::try_from(text.len()).is_err() {
            return Err(Error::Encode(format!("a text of {} bytes is too long, split it", text.len())));
        }
        let positions = CodePoints::new(text);
        let mut scratch = self.pool.borrow();
        let mut out = Encoding::default();
        let mut word = 0;
        let result = self.pieces::<(u32, u32)>(text, &mut |piece| {
            let (prepared, origin) = match piece {
                Piece::Token { id, start, end } => {
                    let token = self.id_to_token(id).unwrap_or_default();
                    // A token that takes white space along shows it.
                    let shown = if end - start == token.len() { token } else { &text[start..end] };
                    out.push(id, shown, positions.range(start, end), Some(word), Some(sequence), 0);
                    word += 1;
                    return Ok(());
                }
                Piece::Text(prepared, origin) => (prepared, origin),
            };
            let mut failed = Ok(());
            self.words.split(prepared, &mut |start, end| {
                if failed.is_err() {
                    return;
                }
                match self.parts.model.tokenize(&prepared[start..end], &mut scratch) {
                    Ok(pieces) => {
                        let bytes = &prepared.as_bytes()[start..end];
                        let misplaced = match &self.parts.model {
                            Model::Bpe(bpe) => bpe.misplaced(bytes, pieces),
                            _ => None,
                        };
                        let mut at = start;
                        for (i, &(id, len)) in pieces.iter().enumerate() {
                            let (first, last) = match &misplaced {
                                Some(places) => (start + places[i].0, start + places[i].1),
                                None => (at, at + len as usize - 1),
                            };
                            let (from, to) = origin[first].to(origin[last]);
                            let token = self.parts.model.shown(id, prepared, first..last + 1);
                            out.push(id, token, positions.range(from, to), Some(word), Some(sequence), 0);
                            at = last + 1;
                        }
                        word += 1;
                    }
                    Err(error) => failed = Err(error),
                }
            });
            failed
        });
        result.map(|()| out)
    }

    /// Cuts `text` at added tokens and prepares what lies between for the splitters.
    pub(crate) fn pieces<O: Origin>(
        &self,
        text: &str,
        visit: &mut dyn FnMut(Piece<'_, O>) -> Result<()>,
    ) -> Result<()> {
        for part in self.raw.split(text) {
            if let Some(id) = part.token {
                visit(Piece::Token { id, start: part.start, end: part.end })?;
                continue;
            }
            let mut normalized = Text::<O>::new(&text[part.start..part.end], part.start);
            if let Some(normalizer) = &self.parts.normalizer {
                normalizer.apply(&mut normalized);
            }
            if self.normalized.is_empty() {
                self.prepared(normalized, part.start == 0, visit)?;
                continue;
            }
            let string = normalized.to_text();
            for inner in self.normalized.split(&string) {
                let n_before = string[..inner.start].chars().count();
                let n = string[inner.start..inner.end].chars().count();
                let chars = &normalized.chars[n_before..n_before + n];
                let (start, end) = chars[0].1.to(chars[n - 1].1);
                match inner.token {
                    Some(id) => visit(Piece::Token { id, start, end })?,
                    None => self.prepared(Text { chars: chars.to_vec() }, start == 0, visit)?,
                }
            }
        }
        Ok(())
    }

    fn prepared<O: Origin>(
        &self,
        mut text: Text<O>,
        first: bool,
        visit: &mut dyn FnMut(Piece<'_, O>) -> Result<()>,
    ) -> Result<()> {
        self.words.prepare(&mut text, first);
        let mut origin = Vec::with_capacity(text.chars.len());
        for &(c, o) in &text.chars {
            origin.extend(std::iter::repeat_n(o, c.len_utf8()));
        }
        visit(Piece::Text(&text.to_text(), &origin))
    }

    /// The text of `ids`; without special tokens if so asked.
    pub(crate) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let kept = |id: u32| !(skip_special_tokens && self.is_special(id));
        if let Some((all, ends)) = &self.byte_tokens {
            let mut bytes = vec![];
            for &id in ids {
                self.checked_token(id)?;
                if kept(id) {
                    let id = id as usize;
                    let start = id.checked_sub(1).map_or(0, |before| ends[before]);
                    bytes.extend_from_slice(&all[start as usize..ends[id] as usize]);
                }
            }
            return Ok(String::from_utf8(bytes)
                .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()));
        }
        let mut stages = self.stages.clone();
        let mut out = String::new();
        for &id in ids {
            let token = self.checked_token(id)?;
            if kept(id) {
                stages.push(token, &mut out);
            }
        }
        stages.finish(&mut out);
        Ok(out)
    }

    /// The stages of the decoder, fresh.
    pub(crate) fn stages(&self) -> Stages {
        self.stages.clone()
    }

    /// The string of `id` as the decoder sees it.
    fn decoder_token(&self, id: u32) -> Option<&str> {
        match self.added.get(id as usize) {
            Some(Some((token, _))) => Some(token),
            _ => self.parts.model.vocab().token(id),
        }
    }

    /// The string of `id` as the decoder sees it, or the error that there is none.
    pub(crate) fn checked_token(&self, id: u32) -> Result<&str> {
        self.decoder_token(id).ok_or(Error::UnknownId { id, vocab_size: self.vocab_size() })
    }
}

/// A part of a text on its way to the model.
pub(crate) enum Piece<'a, O> {
    /// An added token and its byte range.
    Token { id: u32, start: usize, end: usize },
    /// A prepared text and the origin of each byte.
    Text(&'a str, &'a [O]),
}

/// Byte positions to positions in code points.
struct CodePoints(Option<Vec<u32>>);

impl CodePoints {
    fn new(text: &str) -> Self {
        // In ASCII both are the same.
        if text.is_ascii() {
            return Self(None);
        }
        let mut table = vec![0; text.len() + 1];
        let mut n = 0;
        for (i, c) in text.char_indices() {
            table[i..i + c.len_utf8()].fill(n);
            n += 1;
        }
        table[text.len()] = n;
        Self(Some(table))
    }

    fn range(&self, start: usize, end: usize) -> (u32, u32) {
        match &self.0 {
            None => (start as u32, end as u32),
            Some(table) => (table[start], table[end]),
        }
    }
}
