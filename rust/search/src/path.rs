//! Hypotheses: what a search follows and what it returns.

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// By an end token, or because [`crate::Hooks::ends`] said so.
    Stop,
    /// At the length limit, or because the search was cut short.
    Length,
}

impl FinishReason {
    /// "stop" or "length".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A finished sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The prompt it continues, from 0.
    pub prompt: usize,
    /// The tokens added, end token included.
    pub ids: Vec<u32>,
    /// In beam search, the sum of processed log-probabilities over length^length_penalty (Hugging Face's
    /// `sequences_scores`); otherwise none.
    pub score: Option<f64>,
    /// The model's own log-probability of each of `ids`, in nats: from its logits, before processors and filters.
    pub token_logprobs: Vec<f64>,
    /// In beam search, the sequence (as in [`crate::Step::sequences`]) that each of `ids` continued; otherwise empty.
    pub beam_indices: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A sequence in progress.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    pub(crate) prompt: usize,
    /// Prompt and addition.
    pub(crate) ids: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) token_logprobs: Vec<f64>,
    pub(crate) beam_indices: Vec<u32>,
    /// Sum of processed log-probabilities; stays 0 outside beam search.
    pub(crate) score: f64,
    /// The row of the current step whose logits continue this path.
    pub(crate) row: usize,
    /// Why it is over; of an open path, why it would be if the search were cut short.
    pub(crate) reason: FinishReason,
}

impl Path {
    pub(crate) fn added(&self) -> usize {
        self.ids.len() - self.prompt_len
    }

    pub(crate) fn last(&self) -> u32 {
        *self.ids.last().expect("prompts have a token")
    }

    pub(crate) fn push(&mut self, token: u32, logprob: f64) {
        self.ids.push(token);
        self.token_logprobs.push(logprob);
    }

    /// Closes the path.
    pub(crate) fn into_hypothesis(self, score: Option<f64>) -> Hypothesis {
        Hypothesis {
            prompt: self.prompt,
            ids: self.ids[self.prompt_len..].to_vec(),
            score,
            token_logprobs: self.token_logprobs,
            beam_indices: self.beam_indices,
            finish_reason: self.reason,
        }
    }
}
