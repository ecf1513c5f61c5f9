//! What a model says of the tokens that follow: all logits, or the best ones and what all of them weigh.
//!
//! A device that finds the best of a row leaves the host a few hundred numbers of it. They are all that greedy search,
//! beams, and draws that filters restrict to them, look at; whether they suffice is checked where they are used, and what
//! comes of them is what comes of the whole row.

use crate::filters::{Others, TOP_H_TOKENS};
use crate::sample::log_sum_exp;
use crate::search::Setup;
use crate::{Error, GenerationOptions, Result};

/// The best of a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Best<'a> {
    /// The K greatest, in descending order; of equals that of the lower token first.
    pub logits: &'a [f32],
    /// Their tokens.
    pub tokens: &'a [i32],
    /// With m the greatest, Σ exp(x − m) over all V logits, and Σ exp(x/t − m/t) at [`crate::Search::wants_best`]'s
    /// temperature t, quotients rounded to float32.
    pub masses: [f64; 2],
}

/// One row of logits.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// All of them, `[V]`.
    Whole(&'a [f32]),
    /// The best.
    Best(Best<'a>),
}

/// What a search looks at of a row.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Ascending; empty where all are known.
    tokens: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    /// ln Σ exp over all logits.
    pub(crate) normalizer: f64,
    /// What is not known, if anything.
    pub(crate) rest: Option<Rest>,
}

/// What is known of the tokens beside the best.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    /// No logit of theirs is greater, and none that equals it is of a lower token.
    pub(crate) lowest: f32,
    /// What all weigh at the temperature, those of the best included.
    mass: f64,
}

impl Known {
    /// The token of the logit in this place.
    pub(crate) fn token(&self, place: usize) -> u32 {
        self.tokens.get(place).map_or(place as u32, |&token| token)
    }
}

/// Whether options look at nothing but the best `count` of each row, as long as these suffice, and the temperature at
/// which they are weighed.
pub(crate) fn wants_best(options: &GenerationOptions, count: usize, vocab_size: usize) -> Option<f32> {
    // What changes scores may bring any token to the top.
    let plain = GenerationOptions {
        max_new_tokens: options.max_new_tokens,
        max_length: options.max_length,
        do_sample: options.do_sample,
        num_beams: options.num_beams,
        num_return_sequences: options.num_return_sequences,
        filters: options.filters,
        patience: options.patience,
        length_penalty: options.length_penalty,
        early_stopping: options.early_stopping,
        eos_token_id: options.eos_token_id.clone(),
        seed: options.seed,
        ..GenerationOptions::default()
    };
    let f = options.filters;
    // Of the filters that act, the first one has to need no more than probabilities of the best.
    let first = f.top_h.is_some()
        || f.top_k > 0
        || f.top_p < 1.0
        || f.min_p > 0.0
        || (f.typical_p == 1.0 && f.epsilon_cutoff > 0.0);
    let restricted = !options.do_sample || (options.num_beams == 1 && first);
    let wanted = match f.top_h {
        _ if options.num_beams > 1 => options.beam_candidates(),
        // Its budget is an entropy of so many.
        Some(_) => TOP_H_TOKENS.min(vocab_size),
        None => f.top_k.max(1),
    };
    let can = *options == plain && restricted && wanted <= count;
    can.then_some(if options.do_sample { f.divisor() } else { 1.0 })
}

impl Setup {
    /// What a row says; `None` if its best do not tell what to make of it.
    pub(crate) fn know(&self, row: Row<'_>, step: usize, sequence: usize) -> Result<Option<Known>> {
        let best = match row {
            Row::Whole(logits) => {
                let mut known = Known::default();
                self.read_row(logits, step, sequence, &mut known.logits)?;
                known.normalizer = log_sum_exp(&known.logits);
                return Ok(Some(known));
            }
            Row::Best(best) => best,
        };
        let (count, [mass, heated]) = (best.logits.len(), best.masses);
        let usable = |mass: f64| mass > 0.0 && mass.is_finite();
        if !(usable(mass) && usable(heated) && best.logits.iter().all(|x| *x < f32::INFINITY)) {
            return Ok(None);
        }
        if count == 0 || best.tokens.len() != count || !best.logits.is_sorted_by(|a, b| a >= b) {
            return Err(Error::Outside("the best of a row are not in order".to_owned()));
        }
        let mut order: Vec<(u32, f32)> = Vec::with_capacity(count);
        for (&token, &logit) in best.tokens.iter().zip(best.logits) {
            match u32::try_from(token) {
                Ok(token) if (token as usize) < self.vocab_size => order.push((token, logit)),
                _ => return Err(Error::Outside(format!("there is no token {token}"))),
            }
        }
        order.sort_unstable_by_key(|(token, _)| *token);
        let (tokens, logits) = order.into_iter().unzip();
        let rest = Rest { lowest: best.logits[count - 1], mass: heated };
        Ok(Some(Known {
            tokens,
            logits,
            normalizer: f64::from(best.logits[0]) + mass.ln(),
            rest: (count < self.vocab_size).then_some(rest),
        }))
    }

    /// Filters the best's `scores` in place, for a search without beams; whether what is left is what would be left of
    /// the whole row.
    pub(crate) fn filter_best(&self, rest: Rest, scores: &mut [f32]) -> bool {
        let greatest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !self.options.do_sample {
            return greatest > rest.lowest;
        }
        let filters = self.options.filters;
        if !(greatest / filters.divisor()).is_finite() {
            return false;
        }
        filters.scale(scores);
        let floor = scores.iter().copied().fold(f32::INFINITY, f32::min);
        filters.remove(scores, Some(Others { mass: rest.mass, floor: f64::from(floor) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EarlyStopping, Filters, Search};
    use proptest::prelude::*;

    const VOCAB: usize = 40;

    /// What a device leaves of a row.
    struct Left {
        logits: Vec<f32>,
        tokens: Vec<i32>,
        masses: [f64; 2],
    }

    fn best_of(row: &[f32], count: usize, temperature: f32) -> Left {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(count);
        let greatest = row[order[0]];
        let mass = |t: f32| row.iter().map(|x| (f64::from(x / t) - f64::from(greatest / t)).exp()).sum();
        Left {
            logits: order.iter().map(|&token| row[token]).collect(),
            tokens: order.iter().map(|&token| token as i32).collect(),
            masses: [mass(1.0), mass(temperature)],
        }
    }

    /// Logits of a step, the same whenever asked; `levels` of them, so that few levels make many equals.
    fn logits(seed: u32, step: usize, row: usize, levels: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761) ^ (step as u32) << 16 ^ row as u32;
        (0..VOCAB)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) % levels) as f32 * 12.0 / levels as f32
            })
            .collect()
    }

    /// Results, and how many rows were asked for whole.
    type Outcome = (Vec<(Vec<u32>, Vec<f64>, Option<f64>)>, usize);

    fn run(options: &GenerationOptions, seed: u32, levels: u32, count: Option<usize>) -> Outcome {
        let prompts = [vec![1, 2], vec![3]];
        let mut search =
            Search::new(options.clone(), prompts.iter().map(|p| p.clone().into()), VOCAB).expect("valid");
        let mut whole = 0;
        while let Some(step) = search.step() {
            let (index, active) = (step.index, step.tokens.len());
            // What follows depends on what was said.
            let said: Vec<u32> = step.tokens.iter().zip(&step.sequences).map(|(t, s)| t * 31 + s).collect();
            let all: Vec<Vec<f32>> = (0..active).map(|i| logits(seed ^ said[i], index, i, levels)).collect();
            let Some(temperature) = count.and_then(|count| search.wants_best(count)) else {
                search.advance(&all.concat()).expect("valid");
                whole += active;
                continue;
            };
            let left: Vec<Left> =
                all.iter().map(|row| best_of(row, count.expect("some"), temperature)).collect();
            let best = left
                .iter()
                .map(|l| Row::Best(Best { logits: &l.logits, tokens: &l.tokens, masses: l.masses }));
            let mut rows: Vec<Row<'_>> = best.collect();
            loop {
                let missing = search.advance_rows(&rows).expect("valid");
                if missing.is_empty() {
                    break;
                }
                whole += missing.len();
                missing.iter().for_each(|&i| rows[i] = Row::Whole(&all[i]));
            }
        }
        let results = search.finish().into_iter().map(|h| (h.ids, h.token_logprobs, h.score));
        (results.collect(), whole)
    }

    fn same(options: &GenerationOptions, seed: u32, levels: u32, count: usize) -> usize {
        let (want, _) = run(options, seed, levels, None);
        let (got, whole) = run(options, seed, levels, Some(count));
        assert_eq!(want.len(), got.len());
        for (a, b) in want.iter().zip(&got) {
            assert_eq!(a.0, b.0, "{options:?}");
            assert!(a.1.iter().zip(&b.1).all(|(a, b)| (a - b).abs() < 1e-12), "{options:?}");
            assert!((a.2.unwrap_or(0.0) - b.2.unwrap_or(0.0)).abs() < 1e-12, "{options:?}");
        }
        whole
    }

    fn base() -> GenerationOptions {
        GenerationOptions { max_new_tokens: Some(6), eos_token_id: vec![7], ..Default::default() }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn the_best_give_what_whole_rows_give(
            seed in any::<u32>(),
            levels in prop::sample::select(vec![3_u32, 40, 100_000]),
            count in 1..=VOCAB,
            do_sample in any::<bool>(),
            beams in 1_usize..4,
            temperature in prop::sample::select(vec![1.0, 0.3, 1.7, 1e-3, 1e-38]),
            top_h in prop::sample::select(vec![None, Some(0.5)]),
            top_k in prop::sample::select(vec![0_usize, 1, 5, 39]),
            top_p in prop::sample::select(vec![1.0, 0.9, 0.2]),
            min_p in prop::sample::select(vec![0.0, 0.1]),
            typical_p in prop::sample::select(vec![1.0, 0.8]),
            epsilon_cutoff in prop::sample::select(vec![0.0, 0.02]),
            eta_cutoff in prop::sample::select(vec![0.0, 0.05]),
            keep in 1_usize..4,
        ) {
            let filters = Filters {
                temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff,
                min_tokens_to_keep: keep,
            };
            let sampled = GenerationOptions {
                do_sample, num_beams: beams, num_return_sequences: if do_sample { beams } else { 1 }, seed: 9,
                filters: if do_sample { filters } else { Filters::default() }, ..base()
            };
            same(&sampled, seed, levels, count);
        }
    }

    #[test]
    fn few_rows_are_asked_for_whole() {
        let filtered = |filters| GenerationOptions { do_sample: true, filters, ..base() };
        let beams = GenerationOptions { num_beams: 3, early_stopping: EarlyStopping::Never, ..base() };
        let top_k = Filters { top_k: 5, temperature: 0.7, ..Filters::default() };
        let sharp = Filters { top_p: 0.5, temperature: 0.2, ..Filters::default() };
        for options in [base(), beams, filtered(top_k), filtered(sharp)] {
            assert_eq!(same(&options, 3, 1 << 20, 12), 0, "{options:?}");
        }
        // All logits equal: nothing tells the best from the rest.
        assert!(same(&base(), 3, 1, 12) > 0);
    }

    #[test]
    fn what_needs_whole_rows_says_so() {
        let wants = |change: &dyn Fn(&mut GenerationOptions)| {
            let mut options = base();
            change(&mut options);
            Search::new(options, [vec![1].into()], VOCAB).expect("valid").wants_best(12)
        };
        assert_eq!(wants(&|_| ()), Some(1.0));
        assert_eq!(wants(&|o| o.num_beams = 6), Some(1.0));
        let sampled = |o: &mut GenerationOptions| (o.do_sample, o.filters.temperature) = (true, 0.5);
        assert_eq!(
            wants(&|o| {
                sampled(o);
                o.filters.top_k = 12;
            }),
            Some(0.5)
        );
        assert_eq!(wants(&sampled), None, "draws from all tokens");
        assert_eq!(wants(&|o| o.num_beams = 7), None, "14 candidates");
        let top_h = |o: &mut GenerationOptions| (o.do_sample, o.filters.top_h) = (true, Some(0.5));
        assert_eq!(wants(&top_h), None, "an entropy of 40 tokens, all there are");
        assert_eq!(wants(&|o| o.repetition_penalty = 1.1), None);
        assert_eq!(wants(&|o| o.min_new_tokens = Some(2)), None);
        assert_eq!(wants(&|o| o.remove_invalid_values = true), None);
        let typical = |o: &mut GenerationOptions| (o.do_sample, o.filters.typical_p) = (true, 0.5);
        assert_eq!(wants(&typical), None, "needs the entropy of all");
    }

    #[test]
    fn what_is_no_row_is_refused_or_asked_for_whole() {
        let mut search = Search::new(base(), [vec![1].into()], VOCAB).expect("valid");
        let (logits, tokens) = ([2.0, 1.0], [3, 5]);
        let row = |logits, tokens, mass| [Row::Best(Best { logits, tokens, masses: [mass, mass] })];
        for mass in [f64::NAN, f64::INFINITY, 0.0] {
            assert_eq!(search.advance_rows(&row(&logits, &tokens, mass)).expect("valid"), [0]);
        }
        assert!(search.advance_rows(&row(&logits, &[3, 40], 2.0)).is_err());
        assert!(search.advance_rows(&row(&logits, &[-1, 4], 2.0)).is_err());
        assert!(search.advance_rows(&row(&[1.0, 2.0], &tokens, 2.0)).is_err());
        assert!(search.advance_rows(&row(&logits, &[3], 2.0)).is_err());
        assert!(search.advance_rows(&[]).is_err());
        assert!(search.advance_rows(&[Row::Whole(&logits)]).is_err());
        assert!(search.advance_rows(&row(&logits, &tokens, 2.0)).expect("valid").is_empty());
        assert_eq!(search.emitted()[0].token, 3);
    }
}
