//! Text as it is generated: ids in, pieces of text out.

use std::sync::Arc;

use crate::decode::Stages;
use crate::{Result, Tokenizer};

/// Decodes ids one at a time. All pieces together are what [`Tokenizer::decode`] says of all ids; none ends inside a
/// character.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    stages: Stages,
    skip_special_tokens: bool,
}

impl StreamDecoder {
    /// A decoder before its first id.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let stages = tokenizer.stages();
        Self { tokenizer, stages, skip_special_tokens }
    }

    /// Takes an id and returns the text that is certain, if any.
    ///
    /// # Errors
    /// [`crate::Error::UnknownId`] for an id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let token = self.tokenizer.checked_token(id)?;
        let mut out = String::new();
        if !(self.skip_special_tokens && self.tokenizer.is_special(id)) {
            self.stages.push(token, &mut out);
        }
        Ok((!out.is_empty()).then_some(out))
    }

    /// The text that was held back at the end, if any; then the decoder starts afresh.
    pub fn finish(&mut self) -> Option<String> {
        let mut out = String::new();
        self.stages.finish(&mut out);
        self.stages = self.tokenizer.stages();
        (!out.is_empty()).then_some(out)
    }
}
