//! Groups, constraints, patience and stochastic beams, against enumeration of all sequences of tiny models.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use std::collections::{BTreeMap, BTreeSet};

use pyrformer_random::Stream;
use pyrformer_search::{EarlyStopping, GenerationOptions, Hooks, Hypothesis, Search};

/// Logits [V, V]: row t is what follows token t.
struct Table {
    v: usize,
    logits: Vec<f32>,
}

impl Table {
    fn random(v: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 0, 0);
        let logits = (0..v * v).map(|_| (stream.normal_pair().0 * 2.0) as f32).collect();
        Self { v, logits }
    }

    fn logprobs(&self, before: u32) -> Vec<f64> {
        let row = &self.logits[before as usize * self.v..][..self.v];
        let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        row.iter().map(|&x| f64::from(x) - total.ln()).collect()
    }

    /// Every sequence of at most `longest` tokens after token 1, with its log-probability, best first.
    fn all(&self, longest: usize, eos: &[u32]) -> Vec<(f64, Vec<u32>)> {
        let (mut all, mut open) = (Vec::new(), vec![(0.0, vec![])]);
        while let Some((sum, ids)) = open.pop() {
            if ids.len() == longest || ids.last().is_some_and(|t| eos.contains(t)) {
                all.push((sum, ids));
                continue;
            }
            for (token, p) in self.logprobs(*ids.last().unwrap_or(&1)).into_iter().enumerate() {
                open.push((sum + p, [&ids[..], &[token as u32]].concat()));
            }
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        all
    }

    fn run(&self, mut search: Search) -> Vec<Hypothesis> {
        while let Some(step) = search.step() {
            let rows = step.tokens.iter().flat_map(|&t| &self.logits[t as usize * self.v..][..self.v]);
            let logits: Vec<f32> = rows.copied().collect();
            search.advance(&logits).unwrap();
        }
        search.finish()
    }

    fn generate(&self, options: &GenerationOptions) -> Vec<Hypothesis> {
        self.run(Search::new(options.clone(), [vec![1].into()], self.v).unwrap())
    }
}

#[test]
fn a_wide_constrained_beam_is_exhaustive_search_among_what_meets_the_constraints() {
    let contains = |ids: &[u32], words: &[u32]| ids.windows(words.len()).any(|w| w == words);
    for seed in 0..15 {
        let table = Table::random(4, seed);
        for force in [vec![vec![vec![2, 3]]], vec![vec![vec![3, 3], vec![1]], vec![vec![2]]]] {
            let meets = |ids: &[u32]| force.iter().all(|c| c.iter().any(|words| contains(ids, words)));
            let wanted: Vec<_> = table.all(4, &[0]).into_iter().filter(|(_, ids)| meets(ids)).collect();
            let options = GenerationOptions {
                max_new_tokens: Some(4),
                eos_token_id: vec![0],
                num_beams: 256,
                num_return_sequences: wanted.len(),
                length_penalty: 0.0,
                early_stopping: EarlyStopping::Never,
                force_words_ids: force.clone(),
                ..Default::default()
            };
            let found = table.generate(&options);
            assert_eq!(
                found.iter().map(|h| &h.ids).collect::<BTreeSet<_>>(),
                wanted.iter().map(|(_, ids)| ids).collect(),
            );
            for (h, (score, _)) in found.iter().zip(&wanted) {
                assert!((h.score.unwrap() - score).abs() < 1e-5, "seed {seed}: {h:?}, expected {score}");
            }
            // An end token waits for the constraints; what the length cut off before it met them comes after the rest.
            let more = GenerationOptions { num_return_sequences: 256, ..options.clone() };
            for h in &table.generate(&more)[wanted.len()..] {
                assert!(!meets(&h.ids) && h.ids.len() == 4 && h.ids[..3].iter().all(|t| *t != 0), "{h:?}");
                assert!(*h.ids.last().unwrap() != 0, "{h:?}");
            }
            // A narrow beam meets them too, for the longest of them fits into the length.
            let narrow = GenerationOptions { num_beams: 4, num_return_sequences: 1, ..options };
            assert!(meets(&table.generate(&narrow)[0].ids), "seed {seed}");
        }
    }
}

/// Group beam search of one prompt, written out: groups one after the other, no end tokens, fixed length. Token 1 is
/// left out: three tokens then never tie by making the same transitions in another order.
fn diverse(table: &Table, groups: usize, width: usize, penalty: f64, length: usize) -> Vec<(f64, Vec<u32>)> {
    let mut beams = vec![vec![(0.0, Vec::<u32>::new())]; groups];
    for _ in 0..length {
        let mut taken = vec![0.0; table.v];
        for beam in &mut beams {
            let mut next = Vec::new();
            for (sum, ids) in &*beam {
                for (token, p) in table.logprobs(*ids.last().unwrap_or(&1)).into_iter().enumerate() {
                    if token == 1 {
                        continue;
                    }
                    let ids = [&ids[..], &[token as u32]].concat();
                    next.push((sum + p - penalty * taken[token], ids));
                }
            }
            next.sort_by(|a, b| b.0.total_cmp(&a.0));
            next.truncate(width);
            next.iter().for_each(|(_, ids)| taken[*ids.last().unwrap() as usize] += 1.0);
            *beam = next;
        }
    }
    let mut all = beams.concat();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all
}

#[test]
fn groups_avoid_each_other() {
    for seed in 0..20 {
        let table = Table::random(9, seed);
        for (groups, width) in [(2, 2), (3, 1), (2, 3)] {
            let options = GenerationOptions {
                max_new_tokens: Some(3),
                suppress_tokens: vec![1],
                num_beams: groups * width,
                num_return_sequences: groups * width,
                num_beam_groups: groups,
                diversity_penalty: 0.8,
                length_penalty: 0.0,
                ..Default::default()
            };
            let found = table.generate(&options);
            let wanted = diverse(&table, groups, width, 0.8, 3);
            for (h, (score, ids)) in found.iter().zip(&wanted) {
                assert_eq!(&h.ids, ids, "seed {seed}");
                assert!((h.score.unwrap() - score).abs() < 1e-4);
            }
            assert_eq!(found.len(), wanted.len());
        }
    }
}

#[test]
fn patience_waits_for_more_finished_hypotheses() {
    let mut longer = 0;
    for seed in 0..20 {
        let table = Table::random(6, seed);
        let steps = |patience| {
            let options = GenerationOptions {
                max_new_tokens: Some(12),
                eos_token_id: vec![0],
                num_beams: 3,
                early_stopping: EarlyStopping::FirstComplete,
                patience,
                ..Default::default()
            };
            let mut search = Search::new(options, [vec![1].into()], 6).unwrap();
            let mut steps = 0;
            while let Some(step) = search.step() {
                let rows = step.tokens.iter().flat_map(|&t| &table.logits[t as usize * 6..][..6]);
                let logits: Vec<f32> = rows.copied().collect();
                search.advance(&logits).unwrap();
                steps += 1;
            }
            (steps, search.finish()[0].score.unwrap())
        };
        let ((few, first), (many, second)) = (steps(1.0), steps(3.0));
        assert!(many >= few && second >= first, "seed {seed}");
        longer += usize::from(many > few);
    }
    assert!(longer > 5, "{longer}");
}

#[test]
fn stochastic_beams_draw_sequences_without_replacement() {
    let table = Table::random(3, 4);
    let all = table.all(2, &[0]);
    let place: BTreeMap<_, _> = all.iter().enumerate().map(|(i, (_, ids))| (ids.clone(), i)).collect();
    let p: Vec<f64> = all.iter().map(|(logprob, _)| logprob.exp()).collect();
    let n = 40_000;
    let mut counts = vec![vec![0f64; all.len()]; all.len()];
    for seed in 0..n {
        let options = GenerationOptions {
            max_new_tokens: Some(2),
            eos_token_id: vec![0],
            do_sample: true,
            stochastic_beams: true,
            num_beams: 2,
            num_return_sequences: 2,
            seed,
            ..Default::default()
        };
        let drawn = table.generate(&options);
        let [a, b] = [&drawn[0], &drawn[1]].map(|h| place[&h.ids]);
        assert!((drawn[0].score.unwrap() - all[a].0).abs() < 1e-5);
        counts[a][b] += 1.0;
    }
    let (mut chi, mut cells) = (0.0, 0);
    for a in 0..all.len() {
        assert_eq!(counts[a][a], 0.0);
        for b in (0..all.len()).filter(|&b| b != a) {
            let expected = n as f64 * p[a] * p[b] / (1.0 - p[a]);
            if expected >= 5.0 {
                chi += (counts[a][b] - expected).powi(2) / expected;
                cells += 1;
            }
        }
    }
    // A chi-square of n degrees lies below n + 3.1·√(2n) + 6 but once in a thousand seeds.
    let bound = f64::from(cells) + 3.1 * (2.0 * f64::from(cells)).sqrt() + 6.0;
    assert!(cells > 20 && chi < bound, "{chi} over {cells} cells");
}

#[test]
fn a_wide_stochastic_beam_finds_every_sequence() {
    let table = Table::random(3, 5);
    let options = GenerationOptions {
        max_new_tokens: Some(3),
        eos_token_id: vec![0],
        do_sample: true,
        stochastic_beams: true,
        num_beams: 40,
        num_return_sequences: 40,
        ..Default::default()
    };
    let found: BTreeSet<_> = table.generate(&options).into_iter().map(|h| h.ids).collect();
    assert_eq!(found, table.all(3, &[0]).into_iter().map(|(_, ids)| ids).collect());
}

#[test]
fn functions_of_the_caller_choose_and_change() {
    let table = Table::random(5, 6);
    for num_beams in [1, 3] {
        let options = GenerationOptions { max_new_tokens: Some(4), num_beams, ..Default::default() };
        let search = || Search::new(options.clone(), [vec![1].into()], 5).unwrap();
        let even = Hooks { allowed_tokens: Some(Box::new(|_, _| Ok(vec![0, 2, 4]))), ..Hooks::default() };
        let ids = &table.run(search().with_hooks(even))[0].ids;
        assert!(ids.iter().all(|t| t % 2 == 0), "{ids:?}");
        let last = Hooks {
            processor: Some(Box::new(|ids, row| {
                row.fill(f32::NEG_INFINITY);
                row[(*ids.last().unwrap() as usize + 1) % 5] = 0.0;
                Ok(())
            })),
            ..Hooks::default()
        };
        assert_eq!(table.run(search().with_hooks(last))[0].ids, [2, 3, 4, 0]);
        for (hooks, named) in [
            (
                Hooks { allowed_tokens: Some(Box::new(|_, _| Ok(vec![5]))), ..Hooks::default() },
                "prefix_allowed_tokens_fn: allowed token 5",
            ),
            (
                Hooks { processor: Some(Box::new(|_, _| Err("no".to_owned()))), ..Hooks::default() },
                "logits_processor: no",
            ),
            (
                Hooks {
                    processor: Some(Box::new(|_, row| {
                        row[0] = f32::NAN;
                        Ok(())
                    })),
                    ..Hooks::default()
                },
                "logits_processor: the logit of token 0 is NaN",
            ),
        ] {
            let message = search().with_hooks(hooks).advance(&[0.0; 5]).unwrap_err().to_string();
            assert!(message.starts_with(&format!("[search] {named}")), "{message}");
        }
    }
}

#[test]
fn contradictions_are_named() {
    let d = GenerationOptions::default;
    let force = vec![vec![vec![2]]];
    for (options, named) in [
        (GenerationOptions { num_beam_groups: 2, diversity_penalty: 1.0, ..d() }, "num_beam_groups is set"),
        (GenerationOptions { num_beams: 4, num_beam_groups: 2, ..d() }, "diversity_penalty is 0"),
        (GenerationOptions { num_beams: 4, diversity_penalty: 1.0, ..d() }, "diversity_penalty is set"),
        (
            GenerationOptions { num_beams: 4, num_beam_groups: 3, diversity_penalty: 1.0, ..d() },
            "num_beam_groups is 3; it must divide",
        ),
        (GenerationOptions { num_beams: 4, patience: 0.0, ..d() }, "patience is 0"),
        (GenerationOptions { patience: 2.0, ..d() }, "patience is set"),
        (GenerationOptions { force_words_ids: force.clone(), ..d() }, "force_words_ids is set"),
        (
            GenerationOptions { force_words_ids: force.clone(), num_beams: 2, do_sample: true, ..d() },
            "force_words_ids cannot",
        ),
        (
            GenerationOptions { force_words_ids: force, num_beams: 2, eos_token_id: vec![2], ..d() },
            "force_words_ids has an end token",
        ),
        (
            GenerationOptions { force_words_ids: vec![vec![]], num_beams: 2, ..d() },
            "force_words_ids has an empty list",
        ),
        (GenerationOptions { stochastic_beams: true, num_beams: 2, ..d() }, "stochastic_beams is set but"),
        (
            GenerationOptions {
                stochastic_beams: true,
                num_beams: 2,
                do_sample: true,
                length_penalty: 2.0,
                ..d()
            },
            "length_penalty has no meaning",
        ),
        (GenerationOptions { presence_penalty: f64::NAN, ..d() }, "presence_penalty is NaN"),
    ] {
        let message = Search::new(options, [vec![1].into()], 10).unwrap_err().to_string();
        assert!(message.starts_with(&format!("[search] {named}")), "expected '{named}' in: {message}");
    }
}
