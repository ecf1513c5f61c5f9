//! Filters: which tokens a draw may choose from.
//!
//! A filter removes tokens by their standing in the distribution. They apply in the order of [`Filters`]' fields, each
//! to what the one before left, renormalised. Arithmetic is in float64.
//! Source: transformers 5.23 `generation/logits_process.py` (the `…LogitsWarper` classes) for order and edge cases;
//! the paper of each filter stands at its field.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::sample::{check_row, log_sum_exp};
use crate::{Error, Result};

/// Settings of the filters, in order of application; the defaults remove nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filters {
    /// Divides the logits; > 0, default 1. Below 1 sharpens, above 1 flattens.
    pub temperature: f64,
    /// Keeps the most probable tokens while their summed entropy terms −p·ln p stay within this fraction of the whole
    /// entropy, both taken over the 100 most probable; in (0, 1], default off.
    /// Source: Potraghloo et al. 2025, "Top-H Decoding", algorithm 1.
    pub top_h: Option<f64>,
    /// Keeps the k largest logits and all that equal the k-th; 0, the default, is off.
    /// Differs: Hugging Face's own default is 50, because no filter should act unasked.
    /// Source: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4.
    pub top_k: usize,
    /// Keeps the smallest set of most probable tokens whose mass reaches this; in [0, 1], default 1 (off).
    /// Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    pub top_p: f64,
    /// Keeps tokens of at least this fraction of the largest probability; in [0, 1], default 0 (off).
    /// Source: Nguyen et al. 2025, "Turning Up the Heat: Min-p Sampling", section 3.
    pub min_p: f64,
    /// Keeps the tokens whose surprisal is closest to the entropy until their mass reaches this; in (0, 1], default 1
    /// (off). Source: Meister et al. 2023, "Locally Typical Sampling", section 4.
    pub typical_p: f64,
    /// Keeps tokens of at least this probability; in [0, 1), default 0 (off).
    /// Source: Hewitt et al. 2022, "Truncation Sampling as Language Model Desmoothing", section 4.3.
    pub epsilon_cutoff: f64,
    /// Keeps tokens of probability at least min(ε, √ε·exp(−entropy)); in [0, 1), default 0 (off).
    /// Source: Hewitt et al. 2022, section 4.4.
    pub eta_cutoff: f64,
    /// How many of the best tokens no filter but `top_h` removes; ≥ 1, default 1.
    pub min_tokens_to_keep: usize,
}

impl Default for Filters {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_h: None,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
            min_tokens_to_keep: 1,
        }
    }
}

/// A token still in play.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: usize,
    logit: f64,
    probability: f64,
}

/// Greater is better: by logit, then by lower token, so that ties break the same way everywhere.
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// How many tokens top-h considers. Source: transformers 5.23, `TopHLogitsWarper.top_n`.
pub(crate) const TOP_H_TOKENS: usize = 100;

impl Filters {
    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`Error::Option`] naming the first one out of range.
    pub fn validate(&self) -> Result<()> {
        let range = |name, value: f64, valid: bool, range: &str| {
            if valid { Ok(()) } else { Error::option(name, format!("is {value}; it must be {range}")) }
        };
        let t = self.temperature;
        range(
            "temperature",
            t,
            t > 0.0 && t.is_finite(),
            "positive and finite (for the most probable token, use do_sample=False)",
        )?;
        let h = self.top_h.unwrap_or(1.0);
        range("top_h", h, h > 0.0 && h <= 1.0, "above 0 and at most 1")?;
        range("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "within 0 and 1")?;
        range("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "within 0 and 1")?;
        range(
            "typical_p",
            self.typical_p,
            self.typical_p > 0.0 && self.typical_p <= 1.0,
            "above 0 and at most 1",
        )?;
        range(
            "epsilon_cutoff",
            self.epsilon_cutoff,
            (0.0..1.0).contains(&self.epsilon_cutoff),
            "at least 0 and below 1",
        )?;
        range(
            "eta_cutoff",
            self.eta_cutoff,
            (0.0..1.0).contains(&self.eta_cutoff),
            "at least 0 and below 1",
        )?;
        range("min_tokens_to_keep", self.min_tokens_to_keep as f64, self.min_tokens_to_keep > 0, "at least 1")
    }

    /// The name of the first setting that is not at its default, if any.
    pub(crate) fn first_set(&self) -> Option<&'static str> {
        let default = Self::default();
        let is_default = [
            ("temperature", self.temperature == default.temperature),
            ("top_h", self.top_h == default.top_h),
            ("top_k", self.top_k == default.top_k),
            ("top_p", self.top_p == default.top_p),
            ("min_p", self.min_p == default.min_p),
            ("typical_p", self.typical_p == default.typical_p),
            ("epsilon_cutoff", self.epsilon_cutoff == default.epsilon_cutoff),
            ("eta_cutoff", self.eta_cutoff == default.eta_cutoff),
            ("min_tokens_to_keep", self.min_tokens_to_keep == default.min_tokens_to_keep),
        ];
        is_default.iter().find(|(_, is)| !is).map(|(name, _)| *name)
    }

    /// What logits are divided by: in float32 like the reference, for at large logits the rounding of the quotient shows
    /// in the probabilities.
    pub(crate) fn divisor(&self) -> f32 {
        (self.temperature as f32).max(f32::MIN_POSITIVE)
    }

    /// Filters `row` `[V]` in place: temperature divides, every removed token becomes −∞.
    ///
    /// The row must hold a finite logit and neither NaN nor +∞.
    pub(crate) fn apply(&self, row: &mut [f32]) {
        self.scale(row);
        self.remove(row, None);
    }

    /// Divides `row` by the temperature.
    pub(crate) fn scale(&self, row: &mut [f32]) {
        if self.temperature != 1.0 {
            let temperature = self.divisor();
            // A tiny temperature may overflow; then the largest logit becomes 0, which changes no probability.
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let shift = if (largest / temperature).is_finite() { 0.0 } else { largest };
            row.iter_mut().for_each(|x| *x = (*x - shift) / temperature);
        }
    }

    /// Makes the tokens −∞ that the filters but temperature remove. With `others`, `row` is a part of the tokens: whether
    /// the first filter that acts removes the others; where that is not certain, `row` is as it was.
    pub(crate) fn remove(&self, row: &mut [f32], mut others: Option<Others>) -> bool {
        let (temperature, min_tokens_to_keep) = (self.temperature, self.min_tokens_to_keep);
        if *self == (Self { temperature, min_tokens_to_keep, ..Self::default() }) {
            return others.is_none();
        }
        let mut candidates: Vec<_> = (0..row.len())
            .filter(|&token| row[token] > f32::NEG_INFINITY)
            .map(|token| Candidate { token, logit: f64::from(row[token]), probability: 0.0 })
            .collect();
        let mass = |others: &Option<Others>| others.map(|o| o.mass);
        if let Some(fraction) = self.top_h {
            top_h(&mut candidates, fraction);
            if !are_gone(&mut others, &candidates) {
                return false;
            }
        }
        if self.top_k > 0 {
            let threshold = kth_largest(&candidates, self.top_k.max(self.min_tokens_to_keep));
            candidates.retain(|c| c.logit >= threshold);
            if !are_gone(&mut others, &candidates) {
                return false;
            }
        }
        if self.top_p < 1.0 {
            top_p(&mut candidates, self.top_p, self.min_tokens_to_keep, mass(&others));
            if !are_gone(&mut others, &candidates) {
                return false;
            }
        }
        if self.min_p > 0.0 {
            normalize(&mut candidates, mass(&others));
            let largest = candidates.iter().map(|c| c.probability).fold(0.0, f64::max);
            at_least(&mut candidates, self.min_p * largest, self.min_tokens_to_keep);
            if !are_gone(&mut others, &candidates) {
                return false;
            }
        }
        if self.typical_p < 1.0 {
            if others.is_some() {
                return false;
            }
            typical(&mut candidates, self.typical_p, self.min_tokens_to_keep);
        }
        if self.epsilon_cutoff > 0.0 {
            normalize(&mut candidates, mass(&others));
            at_least(&mut candidates, self.epsilon_cutoff, self.min_tokens_to_keep);
            if !are_gone(&mut others, &candidates) {
                return false;
            }
        }
        if self.eta_cutoff > 0.0 {
            if others.is_some() {
                return false;
            }
            let entropy = normalize(&mut candidates, None);
            let eta = self.eta_cutoff.min(self.eta_cutoff.sqrt() * (-entropy).exp());
            at_least(&mut candidates, eta, self.min_tokens_to_keep);
        }
        // Survivors are in no particular order: mark them, then clear the rest.
        let mut keep = vec![false; row.len()];
        candidates.iter().for_each(|c| keep[c.token] = true);
        for (x, keep) in row.iter_mut().zip(keep) {
            if !keep {
                *x = f32::NEG_INFINITY;
            }
        }
        true
    }
}

/// What is known of the tokens that a row lacks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Others {
    /// The sum of exp(x − largest) over all tokens, these and those in the row.
    pub(crate) mass: f64,
    /// No logit of theirs is greater.
    pub(crate) floor: f64,
}

/// Whether a filter, the first that acts, has removed what might be among the others: all that is left is above them.
fn are_gone(others: &mut Option<Others>, left: &[Candidate]) -> bool {
    others.take().is_none_or(|o| left.iter().all(|c| c.logit > o.floor))
}

/// The filtered, renormalised distribution of one row of logits `[V]`.
///
/// # Errors
/// [`Error::Option`] for a setting out of range; [`Error::Logits`] (step 0, sequence 0) for NaN, +∞, or no finite
/// logit at all.
pub fn filter_logits(row: &[f32], filters: &Filters) -> Result<Vec<f32>> {
    filters.validate()?;
    check_row(row).map_err(|problem| Error::Logits { step: 0, sequence: 0, problem })?;
    let mut row = row.to_vec();
    filters.apply(&mut row);
    let normalizer = log_sum_exp(&row);
    Ok(row.iter().map(|&x| (f64::from(x) - normalizer).exp() as f32).collect())
}

/// Fills in the probabilities of `candidates` among themselves, or among all that weigh `mass`; returns the entropy of
/// the former in nats.
fn normalize(candidates: &mut [Candidate], mass: Option<f64>) -> f64 {
    let largest = candidates.iter().map(|c| c.logit).fold(f64::NEG_INFINITY, f64::max);
    let mut total = 0.0;
    for c in candidates.iter_mut() {
        c.probability = (c.logit - largest).exp();
        total += c.probability;
    }
    total = mass.unwrap_or(total);
    let mut mean_logit = 0.0;
    for c in candidates.iter_mut() {
        c.probability /= total;
        mean_logit += c.probability * (c.logit - largest);
    }
    total.ln() - mean_logit
}

/// The k-th largest logit, or the smallest if there are fewer.
fn kth_largest(candidates: &[Candidate], k: usize) -> f64 {
    if k >= candidates.len() {
        return f64::NEG_INFINITY;
    }
    let mut logits: Vec<_> = candidates.iter().map(|c| c.logit).collect();
    *logits.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Keeps candidates of at least `cutoff` probability, and the `keep` largest with all that equal the last of them.
fn at_least(candidates: &mut Vec<Candidate>, cutoff: f64, keep: usize) {
    let threshold = kth_largest(candidates, keep);
    candidates.retain(|c| c.probability >= cutoff || c.logit >= threshold);
}

fn top_p(candidates: &mut Vec<Candidate>, mass: f64, keep: usize, all: Option<f64>) {
    normalize(candidates, all);
    // Building a heap is linear; only what is kept gets sorted.
    let mut heap = BinaryHeap::from(std::mem::take(candidates));
    let mut total = 0.0;
    while total < mass || candidates.len() < keep {
        let Some(best) = heap.pop() else { break };
        total += best.probability;
        candidates.push(best);
    }
}

fn top_h(candidates: &mut Vec<Candidate>, fraction: f64) {
    let mut heap = BinaryHeap::from(std::mem::take(candidates));
    let mut best: Vec<_> = std::iter::from_fn(|| heap.pop()).take(TOP_H_TOKENS).collect();
    let budget = fraction * normalize(&mut best, None);
    let mut spent = 0.0;
    for (i, c) in best.into_iter().enumerate() {
        spent -= c.probability * c.probability.ln();
        // A vanished probability, whose term is NaN, ends the set as in the reference.
        if i > 0 && (spent.is_nan() || spent > budget) {
            break;
        }
        candidates.push(c);
    }
}

fn typical(candidates: &mut Vec<Candidate>, mass: f64, keep: usize) {
    let entropy = normalize(candidates, None);
    let normalizer = log_sum_exp_of(candidates);
    let distance = |c: &Candidate| (normalizer - c.logit - entropy).abs();
    candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.token.cmp(&b.token)));
    let mut total = 0.0;
    let before = candidates.iter().take_while(|c| {
        total += c.probability;
        total < mass
    });
    let last = before.count().min(candidates.len().saturating_sub(1));
    let Some(threshold) = candidates.get(last).map(distance) else { return };
    // Sorted, so what is kept is a prefix.
    let kept = candidates.partition_point(|c| distance(c) <= threshold);
    candidates.truncate(kept.max(keep));
}

fn log_sum_exp_of(candidates: &[Candidate]) -> f64 {
    let largest = candidates.iter().map(|c| c.logit).fold(f64::NEG_INFINITY, f64::max);
    largest + candidates.iter().map(|c| (c.logit - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pyrformer_files::SafeTensors;
    use serde_json::Value;

    fn from_json(settings: &Value) -> Filters {
        let mut filters = Filters::default();
        for (name, value) in settings.as_object().unwrap() {
            let number = value.as_f64().unwrap();
            match name.as_str() {
                "temperature" => filters.temperature = number,
                "top_h" => filters.top_h = Some(number),
                "top_k" => filters.top_k = number as usize,
                "top_p" => filters.top_p = number,
                "min_p" => filters.min_p = number,
                "typical_p" => filters.typical_p = number,
                "epsilon_cutoff" => filters.epsilon_cutoff = number,
                "eta_cutoff" => filters.eta_cutoff = number,
                "min_tokens_to_keep" => filters.min_tokens_to_keep = number as usize,
                other => panic!("the fixture has a filter '{other}' without a test"),
            }
        }
        filters
    }

    #[test]
    fn every_filter_agrees_with_the_reference() {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures/sampling");
        if !folder.is_dir() {
            eprintln!("skipped: {} is absent", folder.display());
            return;
        }
        let cases: Value =
            serde_json::from_slice(&std::fs::read(folder.join("filters.json")).unwrap()).unwrap();
        let tensors = SafeTensors::open(folder.join("filters.safetensors")).unwrap();
        let logits = tensors.get("logits").unwrap();
        let v = logits.shape[1];
        let logits = logits.to_f32().unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let (index, filters) = (&case["index"], from_json(&case["settings"]));
            let keep = tensors.get(&format!("keep.{index}")).unwrap().bytes;
            let exact = tensors.get(&format!("exact.{index}")).unwrap().bytes;
            let expected = tensors.get(&format!("probs.{index}")).unwrap().to_f32().unwrap();
            for (row, logits) in logits.chunks(v).enumerate().filter(|(row, _)| exact[*row] == 1) {
                let probabilities = filter_logits(logits, &filters).unwrap();
                let mut filtered = logits.to_vec();
                filters.apply(&mut filtered);
                for token in 0..v {
                    let at = row * v + token;
                    let place = format!("case {index} {}, row {row}, token {token}", case["settings"]);
                    assert_eq!(filtered[token].is_finite(), keep[at] == 1, "{place}");
                    let (a, b) = (probabilities[token], expected[at]);
                    assert!((a - b).abs() <= 1e-6, "{place}: {a} is not {b}");
                }
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = |filters: Filters, name: &str| match filters.validate() {
            Err(Error::Option { option, .. }) => assert_eq!(option, name),
            other => panic!("{name}: {other:?}"),
        };
        let d = Filters::default();
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            bad(Filters { temperature, ..d }, "temperature");
        }
        bad(Filters { top_h: Some(0.0), ..d }, "top_h");
        bad(Filters { top_h: Some(1.1), ..d }, "top_h");
        bad(Filters { top_p: 1.5, ..d }, "top_p");
        bad(Filters { top_p: f64::NAN, ..d }, "top_p");
        bad(Filters { min_p: -0.1, ..d }, "min_p");
        bad(Filters { typical_p: 0.0, ..d }, "typical_p");
        bad(Filters { epsilon_cutoff: 1.0, ..d }, "epsilon_cutoff");
        bad(Filters { eta_cutoff: -1.0, ..d }, "eta_cutoff");
        bad(Filters { min_tokens_to_keep: 0, ..d }, "min_tokens_to_keep");
    }

    #[test]
    fn unusable_rows_are_errors() {
        let message = |row: &[f32]| filter_logits(row, &Filters::default()).unwrap_err().to_string();
        assert!(message(&[0.0, f32::NAN]).contains("token 1 is NaN"));
        assert!(message(&[f32::INFINITY]).contains("token 0 is inf"));
        assert!(message(&[f32::NEG_INFINITY; 2]).contains("every logit is -inf"));
        assert!(message(&[]).contains("every logit is -inf"));
    }

    #[test]
    fn a_tiny_temperature_is_the_argmax() {
        for temperature in [1e-40, 1e-300] {
            let filters = Filters { temperature, ..Filters::default() };
            assert_eq!(filter_logits(&[1e4, 9e3, -1e4, 1e4 - 1.0], &filters).unwrap(), [1.0, 0.0, 0.0, 0.0]);
        }
    }

    fn any_filters() -> impl Strategy<Value = Filters> {
        let off_or = |low: f64, high: f64, off: f64| prop_oneof![Just(off), low..high];
        (
            0.05..5.0f64,
            prop::option::of(0.01..1.0f64),
            0usize..12,
            off_or(0.0, 1.0, 1.0),
            off_or(0.0, 1.0, 0.0),
            off_or(0.01, 1.0, 1.0),
            off_or(0.0, 0.9, 0.0),
            off_or(0.0, 0.9, 0.0),
            1usize..4,
        )
            .prop_map(
                |(temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, keep)| {
                    let min_tokens_to_keep = keep;
                    Filters {
                        temperature,
                        top_h,
                        top_k,
                        top_p,
                        min_p,
                        typical_p,
                        epsilon_cutoff,
                        eta_cutoff,
                        min_tokens_to_keep,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn a_distribution_comes_out(row in prop::collection::vec(prop_oneof![-50f32..50.0, Just(0.0), Just(f32::NEG_INFINITY)], 1..40), filters in any_filters()) {
            prop_assume!(row.iter().any(|x| x.is_finite()));
            let p = filter_logits(&row, &filters).unwrap();
            prop_assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-4);
            // What survives keeps its order and is never a banned token.
            for (i, a) in row.iter().enumerate() {
                prop_assert!(p[i] >= 0.0 && (a.is_finite() || p[i] == 0.0));
                for (j, b) in row.iter().enumerate() {
                    if a > b && p[i] > 0.0 && p[j] > 0.0 {
                        prop_assert!(p[i] >= p[j]);
                    }
                }
            }
        }
    }
}
