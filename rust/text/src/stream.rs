//! Text as it is generated: ids in, pieces of text out.

use std::sync::Arc;

use crate::decode::Stages;
use crate::tokenizer::Engine;
use crate::{Result, Tokenizer};

/// Decodes ids one at a time. All pieces together are what [`Tokenizer::decode`] says of all ids; none ends inside a
/// character.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    state: State,
    skip_special_tokens: bool,
}

/// What is kept between ids.
#[derive(Debug)]
enum State {
    Native(Stages),
    Library(Window),
}

/// The library decodes whole lists only: the last ids are decoded with and without those that came since text was last
/// given out, and the difference is the text that is due.
#[derive(Debug, Default)]
struct Window {
    /// The ids of the text given out last, and those since.
    ids: Vec<u32>,
    /// How many of them have been given out.
    given: usize,
    /// The text of those.
    text: String,
}

impl Window {
    /// The text that is due: at the end all of it, before that only whole characters.
    fn due(&mut self, tokenizer: &Tokenizer, end: bool) -> Result<String> {
        let text = tokenizer.decode(&self.ids, false)?;
        let Some(fresh) = text.strip_prefix(self.text.as_str()).filter(|fresh| !fresh.is_empty()) else {
            return Ok(String::new());
        };
        if !end && fresh.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let fresh = fresh.to_owned();
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        self.text = tokenizer.decode(&self.ids, false)?;
        Ok(fresh)
    }
}

impl State {
    fn new(tokenizer: &Tokenizer) -> Self {
        match &tokenizer.engine {
            Engine::Native(native) => Self::Native(native.stages()),
            Engine::Library(_) => Self::Library(Window::default()),
        }
    }
}

impl StreamDecoder {
    /// A decoder before its first id.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = State::new(&tokenizer);
        Self { tokenizer, state, skip_special_tokens }
    }

    /// Takes an id and returns the text that is certain, if any.
    ///
    /// # Errors
    /// [`crate::Error::UnknownId`] for an id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let skipped = self.skip_special_tokens && self.tokenizer.is_special(id);
        let mut out = String::new();
        let token = self.tokenizer.checked_token(id)?;
        match &mut self.state {
            State::Native(stages) if !skipped => stages.push(token, &mut out),
            State::Library(window) if !skipped => {
                window.ids.push(id);
                out = window.due(&self.tokenizer, false)?;
            }
            _ => {}
        }
        Ok((!out.is_empty()).then_some(out))
    }

    /// The text that was held back at the end, if any; then the decoder starts afresh.
    pub fn finish(&mut self) -> Option<String> {
        let mut out = String::new();
        match &mut self.state {
            State::Native(stages) => stages.finish(&mut out),
            // Every id was decoded when it came.
            State::Library(window) => {
                out = window.due(&self.tokenizer, true).unwrap_or_default();
            }
        }
        self.state = State::new(&self.tokenizer);
        (!out.is_empty()).then_some(out)
    }
}
