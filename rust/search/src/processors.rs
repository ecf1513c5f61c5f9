//! Processors: penalties, bans, biases and forced tokens.
//!
//! Each is a pure function of the ids so far and a row of scores `[V]`: logits in greedy search and sampling,
//! log-probabilities in beam search. Banned tokens become −∞; no score rises beyond the largest finite number. Token
//! ids must be below V.
//! Source: transformers 5.23 `generation/logits_process.py`; the order is that of `_get_logits_processor` in
//! `generation/utils.py`.

use crate::sample::{check_row, log_softmax};
use crate::{Error, GenerationOptions, Result};

/// Where a hypothesis stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    /// Prompt and addition.
    pub(crate) ids: &'a [u32],
    /// Tokens of `ids` that are prompt.
    pub(crate) prompt_len: usize,
    /// Prompt with the padding before it.
    pub(crate) width: usize,
    /// Position of the prompt in the batch.
    pub(crate) prompt: usize,
    /// Tokens that earlier beam groups of the prompt took in this step.
    pub(crate) taken: &'a [u32],
}

/// Bans all tokens but those it returns, for the ids of a sequence and the position of its prompt in the batch.
pub type AllowedTokens = dyn Fn(usize, &[u32]) -> Result<Vec<u32>, String> + Send + Sync;
/// Changes a row of scores `[V]`, for the ids of a sequence.
pub type Processor = dyn Fn(&[u32], &mut [f32]) -> Result<(), String> + Send + Sync;

/// Whether a sequence ends here, for the number of its ids that are prompt, and its ids.
pub type Ends = dyn Fn(usize, &[u32]) -> Result<bool, String> + Send + Sync;

/// Functions of the caller's; the messages of their failures end the search.
#[derive(Default)]
pub struct Hooks {
    /// Hugging Face's `prefix_allowed_tokens_fn`; acts before forced tokens.
    pub allowed_tokens: Option<Box<AllowedTokens>>,
    /// Acts after all processors, before the filters.
    pub processor: Option<Box<Processor>>,
    /// Ends sequences besides end tokens and lengths, as stop strings do; asked for each token that a strategy chose.
    pub ends: Option<Box<Ends>>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = (self.allowed_tokens.is_some(), self.processor.is_some(), self.ends.is_some());
        f.debug_tuple("Hooks").field(&set).finish()
    }
}

/// Applies every processor that `options` set to `row` `[V]`, in the reference's order, then the filters when sampling,
/// then the renormalisation.
pub(crate) fn process(
    options: &GenerationOptions,
    hooks: &Hooks,
    context: Context<'_>,
    row: &mut [f32],
) -> Result<()> {
    let Context { ids, prompt_len, width, prompt: number, taken } = context;
    let prompt = &ids[..prompt_len];
    let added = ids.len() - prompt_len;
    let length = width + added;
    let eos = &options.eos_token_id;

    for (sequence, bias) in &options.sequence_bias {
        sequence_bias(ids, sequence, *bias, row);
    }
    taken.iter().for_each(|&token| row[token as usize] -= options.diversity_penalty as f32);
    if options.encoder_repetition_penalty != 1.0 {
        repetition_penalty(prompt, 1.0 / options.encoder_repetition_penalty, row);
    }
    if options.repetition_penalty != 1.0 {
        repetition_penalty(ids, options.repetition_penalty, row);
    }
    additive_penalties(&ids[prompt_len..], options.presence_penalty, options.frequency_penalty, row);
    no_repeat_ngram(ids, ids, options.no_repeat_ngram_size, row);
    no_repeat_ngram(ids, prompt, options.encoder_no_repeat_ngram_size, row);
    for words in &options.bad_words_ids {
        if !(words.len() == 1 && eos.contains(&words[0])) {
            sequence_bias(ids, words, f64::NEG_INFINITY, row);
        }
    }
    if added < options.new_token_minimum(width) {
        ban(eos, row);
    }
    if let Some(function) = &hooks.allowed_tokens {
        let allowed = function(number, ids)
            .map_err(|problem| Error::Hook { name: "prefix_allowed_tokens_fn", problem })?;
        keep_only(&allowed, row)
            .map_err(|problem| Error::Hook { name: "prefix_allowed_tokens_fn", problem })?;
    }
    if let Some(bos) = options.forced_bos_token_id
        && length == 1
    {
        force(&[bos], row);
    }
    if !options.forced_eos_token_id.is_empty() && added + 1 == options.new_token_limit(width) {
        force(&options.forced_eos_token_id, row);
    }
    if let Some((start, factor)) = options.exponential_decay_length_penalty {
        exponential_decay(eos, added.saturating_sub(start), factor, row);
    }
    ban(&options.suppress_tokens, row);
    // A forced first token comes before what counts as the beginning.
    let begin = usize::from(width == 1 && options.forced_bos_token_id.is_some());
    if added == begin {
        ban(&options.begin_suppress_tokens, row);
    }
    if let Some(function) = &hooks.processor {
        function(ids, row).map_err(|problem| Error::Hook { name: "logits_processor", problem })?;
        check_row(row).or_else(|problem| {
            let banned = row.iter().all(|x| *x == f32::NEG_INFINITY);
            if banned { Ok(()) } else { Err(Error::Hook { name: "logits_processor", problem }) }
        })?;
    }
    // With everything banned there is nothing to filter; the caller reports it.
    if options.do_sample && row.iter().any(|x| *x > f32::NEG_INFINITY) {
        let mut filters = options.filters;
        if options.num_beams > 1 {
            // So many that a beam survives even if all end tokens are drawn.
            filters.min_tokens_to_keep = filters.min_tokens_to_keep.max(eos.len() + 1).max(2);
        }
        filters.apply(row);
    }
    if options.renormalize_logits {
        log_softmax(row);
    }
    Ok(())
}

/// Subtracts `presence` once, and `frequency` for each occurrence, from the scores of the tokens of the addition.
pub(crate) fn additive_penalties(addition: &[u32], presence: f64, frequency: f64, row: &mut [f32]) {
    if presence == 0.0 && frequency == 0.0 {
        return;
    }
    let mut tokens = addition.to_vec();
    tokens.sort_unstable();
    for run in tokens.chunk_by(|a, b| a == b) {
        let score = &mut row[run[0] as usize];
        *score = (*score - (presence + frequency * run.len() as f64) as f32).min(f32::MAX);
    }
}

/// Bans all tokens but `allowed`, which keep their scores.
fn keep_only(allowed: &[u32], row: &mut [f32]) -> Result<(), String> {
    let before = row.to_vec();
    row.fill(f32::NEG_INFINITY);
    for &token in allowed {
        let problem = || format!("allowed token {token}, but the vocabulary ends at {}", before.len());
        let score = *before.get(token as usize).ok_or_else(problem)?;
        row[token as usize] = score;
    }
    Ok(())
}

/// Divides the positive scores, and multiplies the negative ones, of all tokens in `ids` by `penalty`, once each.
pub(crate) fn repetition_penalty(ids: &[u32], penalty: f64, row: &mut [f32]) {
    let penalty = penalty as f32;
    let mut tokens = ids.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    for token in tokens {
        let score = &mut row[token as usize];
        let penalized = if *score < 0.0 { *score * penalty } else { *score / penalty };
        *score = penalized.min(f32::MAX);
    }
}

/// Bans every token that would complete an n-gram of `source` after `ids`; `source` is `ids` itself or the prompt.
/// Nothing happens for `n` = 0 or while `ids` are shorter than `n` (n − 1, if `source` is another text).
pub(crate) fn no_repeat_ngram(ids: &[u32], source: &[u32], n: usize, row: &mut [f32]) {
    if n == 0 || ids.len() + 1 < n {
        return;
    }
    let prefix = &ids[ids.len() + 1 - n..];
    for window in source.windows(n) {
        if window[..n - 1] == *prefix {
            row[window[n - 1] as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Adds `bias` to the last token of `sequence` if the tokens before it end `ids`. A sequence longer than `ids` is
/// passed over, one of a single token always applies.
pub(crate) fn sequence_bias(ids: &[u32], sequence: &[u32], bias: f64, row: &mut [f32]) {
    let Some((last, before)) = sequence.split_last() else { return };
    if before.is_empty() || (sequence.len() <= ids.len() && ids.ends_with(before)) {
        let score = &mut row[*last as usize];
        *score = (*score + bias as f32).min(f32::MAX);
    }
}

/// Bans `tokens`.
pub(crate) fn ban(tokens: &[u32], row: &mut [f32]) {
    tokens.iter().for_each(|&token| row[token as usize] = f32::NEG_INFINITY);
}

/// Bans all but `tokens`, which score 0.
pub(crate) fn force(tokens: &[u32], row: &mut [f32]) {
    row.fill(f32::NEG_INFINITY);
    tokens.iter().for_each(|&token| row[token as usize] = 0.0);
}

/// Raises the end tokens' scores by |score|·(factorⁿ − 1), n the tokens past the start of the rule; nothing at n = 0.
pub(crate) fn exponential_decay(eos: &[u32], n: usize, factor: f64, row: &mut [f32]) {
    if n > 0 {
        let growth = (factor.powi(i32::try_from(n).unwrap_or(i32::MAX)) - 1.0) as f32;
        for &token in eos {
            let score = &mut row[token as usize];
            // A banned end token stays banned: |−∞| times anything would make it NaN or the only choice.
            if *score > f32::NEG_INFINITY {
                *score = (*score + score.abs() * growth).min(f32::MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Filters;
    use crate::sample::log_sum_exp;
    use pyrformer_files::SafeTensors;
    use serde_json::Value;

    fn apply(options: &GenerationOptions, ids: &[u32], prompt_len: usize, width: usize, row: &mut [f32]) {
        let context = Context { ids, prompt_len, width, prompt: 0, taken: &[] };
        process(options, &Hooks::default(), context, row).unwrap();
    }

    fn list(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    }

    #[test]
    fn every_processor_agrees_with_the_reference() {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures/sampling");
        if !folder.is_dir() {
            eprintln!("skipped: {} is absent", folder.display());
            return;
        }
        let cases: Value =
            serde_json::from_slice(&std::fs::read(folder.join("processors.json")).unwrap()).unwrap();
        let tensors = SafeTensors::open(folder.join("processors.safetensors")).unwrap();
        let (t, v) = (14, 40);
        let ids: Vec<u32> = tensors
            .get("input_ids")
            .unwrap()
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|&c| i64::from_le_bytes(c) as u32)
            .collect();
        let logits = tensors.get("logits").unwrap().to_f32().unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let (index, kind, settings) =
                (&case["index"], case["processor"].as_str().unwrap(), &case["settings"]);
            let expected = tensors.get(&format!("out.{index}")).unwrap().to_f32().unwrap();
            let number = |key: &str| settings[key].as_f64().unwrap();
            let count = |key: &str| settings[key].as_u64().unwrap() as usize;
            let mut options = GenerationOptions { max_new_tokens: Some(1000), ..Default::default() };
            options.eos_token_id = settings["eos_token_id"].as_u64().map(|x| x as u32).into_iter().collect();
            let mut prompt_len = settings["prompt_length"].as_u64().unwrap_or(t as u64) as usize;
            match kind {
                "repetition_penalty" => options.repetition_penalty = number("penalty"),
                "encoder_repetition_penalty" => options.encoder_repetition_penalty = number("penalty"),
                "no_repeat_ngram" => options.no_repeat_ngram_size = count("size"),
                "bad_words" => {
                    options.bad_words_ids = settings["words"].as_array().unwrap().iter().map(list).collect()
                }
                "sequence_bias" => {
                    let pairs = settings["bias"].as_array().unwrap();
                    options.sequence_bias =
                        pairs.iter().map(|p| (list(&p[0]), p[1].as_f64().unwrap())).collect();
                }
                "min_length" => options.min_length = count("min_length"),
                "min_new_tokens" => options.min_new_tokens = Some(count("min_new_tokens")),
                "forced_bos" => options.forced_bos_token_id = Some(count("token") as u32),
                "forced_eos" => {
                    options.forced_eos_token_id = vec![count("token") as u32];
                    (options.max_new_tokens, options.max_length) = (None, Some(count("max_length")));
                }
                "suppress" => options.suppress_tokens = list(&settings["tokens"]),
                "begin_suppress" => {
                    options.begin_suppress_tokens = list(&settings["tokens"]);
                    prompt_len = count("begin_index");
                }
                "exponential_decay" => {
                    options.exponential_decay_length_penalty = Some((count("start"), number("factor")));
                }
                "log_softmax" => options.renormalize_logits = true,
                "temperature" => {
                    options.do_sample = true;
                    options.filters = Filters { temperature: number("temperature"), ..Filters::default() };
                }
                other => panic!("the fixture has a processor '{other}' without a test"),
            }
            for (row, ids) in ids.chunks(t).enumerate() {
                let mut scores = logits[row * v..][..v].to_vec();
                if settings["ignore_leading"].is_array() {
                    let skip = list(&settings["ignore_leading"])[row] as usize;
                    repetition_penalty(&ids[skip..], options.repetition_penalty, &mut scores);
                } else {
                    apply(&options, ids, prompt_len, prompt_len, &mut scores);
                }
                for (token, (a, b)) in scores.iter().zip(&expected[row * v..]).enumerate() {
                    let close = a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0);
                    assert!(close, "case {index} ({kind}), row {row}, token {token}: {a} is not {b}");
                }
            }
        }
    }

    #[test]
    fn forced_first_tokens_wait_for_a_prompt_of_one() {
        let options = GenerationOptions {
            forced_bos_token_id: Some(2),
            begin_suppress_tokens: vec![1],
            ..Default::default()
        };
        let run = |ids: &[u32], prompt_len, width| {
            let mut row = [1.0, 2.0, 0.5];
            apply(&options, ids, prompt_len, width, &mut row);
            row
        };
        let no = f32::NEG_INFINITY;
        assert_eq!(run(&[0], 1, 1), [no, no, 0.0]);
        assert_eq!(run(&[0, 2], 1, 1), [1.0, no, 0.5]);
        assert_eq!(run(&[0, 0], 2, 2), [1.0, no, 0.5]);
        assert_eq!(run(&[0], 1, 2), [1.0, no, 0.5], "padding counts as length");
    }

    #[test]
    fn prompt_ngrams_are_banned_from_the_addition_only() {
        let mut row = [0.0; 5];
        no_repeat_ngram(&[1, 2, 3, 4, 1], &[1, 2, 3], 2, &mut row);
        assert_eq!(row.map(f32::is_finite), [true, true, false, true, true]);
        let mut row = [0.0; 5];
        no_repeat_ngram(&[1, 2, 3, 4, 1, 4], &[1, 2, 3], 2, &mut row);
        assert_eq!(row, [0.0; 5]);
        no_repeat_ngram(&[1], &[1], 3, &mut row);
        assert_eq!(row, [0.0; 5]);
    }

    #[test]
    fn biases_wait_for_their_sequence() {
        let biased = |ids: &[u32], sequence: &[u32]| {
            let mut row = [0.0; 3];
            sequence_bias(ids, sequence, 1.5, &mut row);
            row
        };
        assert_eq!(biased(&[0], &[2]), [0.0, 0.0, 1.5]);
        assert_eq!(biased(&[0, 1], &[1, 2]), [0.0, 0.0, 1.5]);
        assert_eq!(biased(&[1, 0], &[1, 2]), [0.0; 3]);
        // One token would complete it, but the reference asks for as many tokens as the sequence has.
        assert_eq!(biased(&[1], &[1, 2]), [0.0; 3]);
        assert_eq!(biased(&[1], &[]), [0.0; 3]);
    }

    #[test]
    fn additive_penalties_count_the_addition_only() {
        let mut row = [1.0f32; 4];
        let options =
            GenerationOptions { presence_penalty: 0.5, frequency_penalty: 0.25, ..Default::default() };
        apply(&options, &[3, 3, 1, 2, 1], 2, 2, &mut row);
        assert_eq!(row, [1.0, 0.0, 0.25, 1.0]);
    }

    #[test]
    fn decay_keeps_bans_and_stays_finite() {
        let mut row = [f32::NEG_INFINITY, 1e30, -2.0];
        exponential_decay(&[0, 1, 2], 5000, 1.5, &mut row);
        assert!(row[0] == f32::NEG_INFINITY && row[1] == f32::MAX && row[2] == f32::MAX, "{row:?}");
        assert!(log_sum_exp(&row).is_finite());
    }
}
