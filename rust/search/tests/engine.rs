//! Laws of the search, on models that are tables: the logits after a token depend on that token alone.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use proptest::prelude::*;
use pyrformer_random::Stream;
use pyrformer_search::{
    EarlyStopping, Error, Filters, FinishReason, GenerationOptions, Hooks, Hypothesis, Prompt, Search,
    filter_logits,
};

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

    fn row(&self, token: u32) -> &[f32] {
        &self.logits[token as usize * self.v..][..self.v]
    }

    fn logprob(&self, before: u32, token: u32) -> f64 {
        let row = self.row(before);
        let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        f64::from(row[token as usize]) - total.ln()
    }

    fn rows(&self, tokens: &[u32]) -> Vec<f32> {
        tokens.iter().flat_map(|&t| self.row(t)).copied().collect()
    }

    fn generate(&self, options: &GenerationOptions, prompts: &[Prompt]) -> Vec<Hypothesis> {
        let mut search = Search::new(options.clone(), prompts.to_vec(), self.v).unwrap();
        while let Some(step) = search.step() {
            let logits = self.rows(&step.tokens);
            search.advance(&logits).unwrap();
        }
        search.finish()
    }
}

fn prompts(list: &[&[u32]]) -> Vec<Prompt> {
    list.iter().map(|ids| Prompt::from(ids.to_vec())).collect()
}

#[test]
fn a_beam_wide_enough_is_exhaustive_search() {
    let (v, longest, eos) = (4, 3, 0);
    for seed in 0..20 {
        let table = Table::random(v, seed);
        for (length_penalty, eos_token_id) in
            [(1.0, vec![]), (0.0, vec![eos]), (1.0, vec![eos]), (-0.7, vec![eos]), (2.0, vec![eos])]
        {
            let mut all: Vec<(f64, Vec<u32>)> = Vec::new();
            let mut open: Vec<(f64, Vec<u32>)> = vec![(0.0, vec![])];
            for length in 1..=longest {
                let mut next = Vec::new();
                for (sum, ids) in &open {
                    for token in 0..v as u32 {
                        let sum = sum + table.logprob(*ids.last().unwrap_or(&1), token);
                        let ids = [&ids[..], &[token]].concat();
                        let over = length == longest || eos_token_id.contains(&token);
                        let score = sum / (length as f64).powf(length_penalty);
                        if over { all.push((score, ids)) } else { next.push((sum, ids)) }
                    }
                }
                open = next;
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let options = GenerationOptions {
                max_new_tokens: Some(longest),
                num_beams: 64,
                num_return_sequences: all.len(),
                early_stopping: EarlyStopping::Never,
                length_penalty,
                eos_token_id,
                ..Default::default()
            };
            let found = table.generate(&options, &prompts(&[&[1]]));
            let distinct: std::collections::BTreeSet<_> = found.iter().map(|h| &h.ids).collect();
            assert_eq!(distinct.len(), all.len());
            for (hypothesis, (score, ids)) in found.iter().zip(&all) {
                // Paths over the same transitions tie, so ranks are compared by score.
                let own = all.iter().find(|(_, ids)| *ids == hypothesis.ids).unwrap().0;
                assert!(
                    (hypothesis.score.unwrap() - own).abs() < 1e-5 && (own - score).abs() < 1e-5,
                    "seed {seed}: {hypothesis:?}, expected {ids:?}"
                );
                let mut before = 1;
                for (&token, logprob) in hypothesis.ids.iter().zip(&hypothesis.token_logprobs) {
                    assert!((table.logprob(before, token) - logprob).abs() < 1e-5);
                    before = token;
                }
            }
        }
    }
}

#[test]
fn penalties_move_scores_but_not_token_logprobs() {
    let table = Table::random(5, 3);
    for num_beams in [1, 3] {
        let options = GenerationOptions {
            max_new_tokens: Some(4),
            num_beams,
            repetition_penalty: 3.0,
            suppress_tokens: vec![2],
            ..Default::default()
        };
        let result = &table.generate(&options, &prompts(&[&[1]]))[0];
        let mut before = 1;
        for (&token, logprob) in result.ids.iter().zip(&result.token_logprobs) {
            assert!(token != 2 && (table.logprob(before, token) - logprob).abs() < 1e-5);
            before = token;
        }
        assert_eq!(result.score.is_some(), num_beams > 1);
    }
}

#[test]
fn samples_follow_the_filtered_distribution() {
    let table = Table::random(6, 5);
    let filters = Filters { temperature: 1.3, top_k: 4, ..Filters::default() };
    let n = 30_000;
    let options = GenerationOptions {
        max_new_tokens: Some(2),
        do_sample: true,
        num_return_sequences: n,
        filters,
        seed: 9,
        ..Default::default()
    };
    let mut counts = [[0f64; 6]; 6];
    for sample in table.generate(&options, &prompts(&[&[2]])) {
        counts[sample.ids[0] as usize][sample.ids[1] as usize] += 1.0;
    }
    let first = filter_logits(table.row(2), &filters).unwrap();
    let (mut chi, mut cells) = (0.0, 0);
    for a in 0..6 {
        let second = filter_logits(table.row(a as u32), &filters).unwrap();
        for b in 0..6 {
            let expected = n as f64 * f64::from(first[a]) * f64::from(second[b]);
            if expected == 0.0 {
                assert_eq!(counts[a][b], 0.0);
            } else {
                chi += (counts[a][b] - expected).powi(2) / expected;
                cells += 1;
            }
        }
    }
    // 16 cells, 15 degrees of freedom: 37.7 is passed once in a thousand seeds.
    assert!(cells == 16 && chi < 37.7, "{chi} over {cells} cells");
}

fn strategies() -> Vec<GenerationOptions> {
    let base = GenerationOptions { max_new_tokens: Some(9), eos_token_id: vec![0], ..Default::default() };
    let filters = Filters { temperature: 1.5, top_p: 0.95, ..Filters::default() };
    vec![
        base.clone(),
        GenerationOptions { do_sample: true, num_return_sequences: 3, seed: 4, filters, ..base.clone() },
        GenerationOptions { num_beams: 4, num_return_sequences: 3, ..base.clone() },
        GenerationOptions {
            num_beams: 3,
            do_sample: true,
            seed: 4,
            filters,
            no_repeat_ngram_size: 3,
            ..base
        },
    ]
}

#[test]
fn a_batch_gives_the_bits_of_each_prompt_alone() {
    let table = Table::random(11, 8);
    let batch: Vec<Prompt> = [&[1u32][..], &[5, 2, 7], &[3, 3], &[9, 8, 7, 6]]
        .iter()
        .enumerate()
        .map(|(i, ids)| Prompt { ids: ids.to_vec(), left_padding: 0, first_sequence: Some(i as u32 * 3) })
        .collect();
    for options in strategies() {
        let together = table.generate(&options, &batch);
        let alone = batch.iter().enumerate().flat_map(|(i, prompt)| {
            let mut results = table.generate(&options, std::slice::from_ref(prompt));
            for result in &mut results {
                result.prompt = i;
                result.beam_indices.iter_mut().for_each(|b| *b += (i * options.num_beams) as u32);
            }
            results
        });
        assert_eq!(together, alone.collect::<Vec<_>>());
    }
}

#[test]
fn one_sample_of_many_can_be_redrawn_alone() {
    let table = Table::random(11, 8);
    let options = GenerationOptions {
        do_sample: true,
        num_return_sequences: 8,
        max_new_tokens: Some(12),
        ..Default::default()
    };
    let all = table.generate(&options, &prompts(&[&[1], &[1]]));
    assert!(
        all[0].ids != all[1].ids && all[0].ids != all[8].ids,
        "sequences must differ, equal prompts included"
    );
    assert_eq!(all, table.generate(&options, &prompts(&[&[1], &[1]])));
    for index in [3, 11] {
        let again = GenerationOptions { num_return_sequences: 1, ..options.clone() };
        let prompt = Prompt { first_sequence: Some(index), ..Prompt::from(vec![1]) };
        assert_eq!(table.generate(&again, &[prompt])[0].ids, all[index as usize].ids);
    }
    let other = GenerationOptions { seed: 1, ..options };
    assert_ne!(table.generate(&other, &prompts(&[&[1], &[1]])), all);
}

#[test]
fn finished_sequences_leave_and_parents_say_who_moved() {
    // After 1 and 2 comes the end token 0; after 3 always 3.
    let mut table = Table { v: 4, logits: vec![0.0; 16] };
    for (before, token) in [(1, 2), (2, 0), (3, 3)] {
        table.logits[before * 4 + token] = 9.0;
    }
    let options = GenerationOptions { max_new_tokens: Some(4), eos_token_id: vec![0], ..Default::default() };
    let mut search = Search::new(options, prompts(&[&[2], &[3], &[1], &[3]]), 4).unwrap();
    let mut seen = Vec::new();
    let mut streamed = vec![vec![]; 4];
    while let Some(step) = search.step().cloned() {
        search.advance(&table.rows(&step.tokens)).unwrap();
        search.emitted().iter().for_each(|e| streamed[e.sequence].push(e.token));
        seen.push((step.index, step.tokens, step.parents, step.sequences));
    }
    assert_eq!(
        seen,
        [
            (0, vec![2, 3, 1, 3], vec![0, 1, 2, 3], vec![0, 1, 2, 3]),
            (1, vec![3, 2, 3], vec![1, 2, 3], vec![1, 2, 3]),
            (2, vec![3, 3], vec![0, 2], vec![1, 3]),
            (3, vec![3, 3], vec![0, 1], vec![1, 3]),
        ]
    );
    search.advance(&[]).unwrap();
    let results = search.finish();
    let ids: Vec<_> = results.iter().map(|r| r.ids.clone()).collect();
    assert_eq!(ids, [vec![0], vec![3; 4], vec![2, 0], vec![3; 4]]);
    assert_eq!(ids, streamed);
    let reasons: Vec<_> = results.iter().map(|r| r.finish_reason.name()).collect();
    assert_eq!(reasons, ["stop", "length", "stop", "length"]);
}

#[test]
fn samples_and_beams_fan_out_from_one_row_per_prompt() {
    let table = Table::random(7, 2);
    for (options, width) in strategies().into_iter().zip([1, 3, 4, 3]) {
        let mut search = Search::new(options, prompts(&[&[1], &[2]]), 7).unwrap();
        let first = search.step().unwrap().clone();
        assert_eq!((first.parents, first.tokens), (vec![0, 1], vec![1, 2]));
        search.advance(&table.rows(&[1, 2])).unwrap();
        let second = search.step().unwrap();
        assert!(second.parents.iter().all(|p| *p < 2) && second.parents.is_sorted());
        for (parent, sequence) in second.parents.iter().zip(&second.sequences) {
            assert_eq!(sequence / width, *parent);
        }
    }
}

/// Ends a sequence whose last two tokens are equal.
fn ends_at_a_double() -> Hooks {
    let ends = |prompt: usize, ids: &[u32]| {
        assert!(ids.len() > prompt, "asked about additions only");
        Ok(ids.len() > prompt + 1 && ids[ids.len() - 1] == ids[ids.len() - 2])
    };
    Hooks { ends: Some(Box::new(ends)), ..Hooks::default() }
}

#[test]
fn a_function_ends_sequences_where_it_says() {
    let table = Table::random(4, 2);
    let options = GenerationOptions {
        max_new_tokens: Some(12),
        do_sample: true,
        num_return_sequences: 6,
        ..Default::default()
    };
    let whole = table.generate(&options, &prompts(&[&[1]]));
    let mut search = Search::new(options, prompts(&[&[1]]), 4).unwrap().with_hooks(ends_at_a_double());
    while let Some(step) = search.step() {
        let logits = table.rows(&step.tokens);
        search.advance(&logits).unwrap();
    }
    let mut stopped = 0;
    for (cut, whole) in search.finish().iter().zip(&whole) {
        let end = whole.ids.windows(2).position(|w| w[0] == w[1]).map_or(12, |at| at + 2);
        assert_eq!(cut.ids, whole.ids[..end]);
        let is_stopped = whole.ids[..end].windows(2).any(|w| w[0] == w[1]);
        assert_eq!(cut.finish_reason == FinishReason::Stop, is_stopped);
        stopped += usize::from(is_stopped);
    }
    assert!(stopped > 0);
}

#[test]
fn beams_that_a_function_ends_compete_with_the_others() {
    // Exhaustive: all sequences up to four tokens, ended at a double or by the length.
    let (v, longest) = (3, 4);
    for seed in 0..10 {
        let table = Table::random(v, seed);
        let mut all: Vec<(f64, Vec<u32>)> = Vec::new();
        let mut open: Vec<(f64, Vec<u32>)> = vec![(0.0, vec![])];
        while let Some((sum, ids)) = open.pop() {
            for token in 0..v as u32 {
                let sum = sum + table.logprob(*ids.last().unwrap_or(&1), token);
                let longer = [&ids[..], &[token]].concat();
                let over = longer.len() == longest || ids.last() == Some(&token);
                if over { all.push((sum / longer.len() as f64, longer)) } else { open.push((sum, longer)) }
            }
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let options = GenerationOptions {
            max_new_tokens: Some(longest),
            num_beams: 90,
            num_return_sequences: all.len(),
            early_stopping: EarlyStopping::Never,
            ..Default::default()
        };
        let mut search = Search::new(options, prompts(&[&[1]]), v).unwrap().with_hooks(ends_at_a_double());
        while let Some(step) = search.step() {
            let logits = table.rows(&step.tokens);
            search.advance(&logits).unwrap();
        }
        let found = search.finish();
        assert_eq!(found.len(), all.len());
        for (hypothesis, (score, _)) in found.iter().zip(&all) {
            assert!((hypothesis.score.unwrap() - score).abs() < 1e-5);
        }
        // Different orders of the same steps have equal scores.
        let mut ids: [Vec<_>; 2] =
            [found.into_iter().map(|h| h.ids).collect(), all.into_iter().map(|a| a.1).collect()];
        ids.iter_mut().for_each(|list| list.sort());
        assert_eq!(ids[0], ids[1]);
    }
}

/// Two steps of the table's distribution with drafts from another table: counts of each pair of tokens.
fn drafted_pairs(table: &Table, cheap: &Table, options: &GenerationOptions, draws: u32) -> (Vec<f64>, f64) {
    let mut counts = vec![0.0; table.v * table.v];
    let (mut kept, mut offered) = (0.0, 0.0);
    for first in 0..draws {
        let prompt = Prompt { ids: vec![1], first_sequence: Some(first), ..Prompt::default() };
        let mut search = Search::new(options.clone(), [prompt], table.v).unwrap();
        while let Some(step) = search.step().cloned() {
            let mut after = Vec::new();
            let mut drafts = Vec::new();
            let mut last = step.tokens[0];
            for _ in 0..2 - step.index {
                let draft = search.draft(&after, cheap.row(last)).unwrap();
                last = draft.token;
                after.push(last);
                drafts.push(draft);
            }
            let mut last = step.tokens[0];
            for draft in drafts {
                offered += 1.0;
                let is_kept = search.advance_drafted(table.row(last), &draft).unwrap();
                kept += f64::from(u8::from(is_kept));
                last = draft.token;
                if !is_kept {
                    break;
                }
            }
        }
        let ids = &search.finish()[0].ids;
        counts[ids[0] as usize * table.v + ids[1] as usize] += 1.0;
    }
    (counts, kept / offered)
}

#[test]
fn drafts_leave_the_distribution_as_it_is() {
    let (table, mut cheap) = (Table::random(5, 2), Table::random(5, 2));
    let noise = Table::random(5, 3);
    cheap.logits.iter_mut().zip(&noise.logits).for_each(|(x, n)| *x += 0.4 * n);
    let filters = Filters { temperature: 1.3, top_k: 4, ..Filters::default() };
    let options = GenerationOptions {
        max_new_tokens: Some(2),
        do_sample: true,
        repetition_penalty: 1.2,
        filters,
        ..Default::default()
    };
    let n = 40_000;
    let (counts, kept) = drafted_pairs(&table, &cheap, &options, n);
    // What `advance` draws from, by enumeration.
    let probabilities = |search: &Search, after: &[u32], last: u32| {
        let scores = search.scores(0, after, table.row(last)).unwrap();
        let weights: Vec<_> = scores.iter().map(|&x| f64::from(x).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(move |w| w / total).collect::<Vec<_>>()
    };
    let search = Search::new(options, prompts(&[&[1]]), 5).unwrap();
    let first = probabilities(&search, &[], 1);
    let (mut chi, mut cells) = (0.0, 0);
    for a in 0..5u32 {
        let second = probabilities(&search, &[a], a);
        for b in 0..5u32 {
            let expected = f64::from(n) * first[a as usize] * second[b as usize];
            let count = counts[(a * 5 + b) as usize];
            if expected == 0.0 {
                assert_eq!(count, 0.0, "a filtered token was drawn");
            } else {
                chi += (count - expected).powi(2) / expected;
                cells += 1;
            }
        }
    }
    // 16 cells, 15 degrees of freedom: 37.7 is passed once in a thousand seeds.
    assert_eq!(cells, 16);
    assert!(chi < 37.7, "{chi}");
    assert!(kept > 0.7, "drafts of a like model are mostly kept: {kept}");
}

#[test]
fn tokens_can_be_chosen_outside() {
    let table = Table::random(6, 1);
    let options = GenerationOptions { max_new_tokens: Some(3), eos_token_id: vec![0], ..Default::default() };
    let mut search = Search::new(options.clone(), prompts(&[&[1], &[2]]), 6).unwrap();
    search.choose(&[(4, -0.5), (0, -1.0)]).unwrap();
    assert_eq!(search.step().unwrap().sequences, [0]);
    assert!(matches!(search.choose(&[(9, 0.0)]), Err(Error::Outside(_))));
    assert!(matches!(search.scores(1, &[], table.row(0)), Err(Error::Shape { .. })));
    search.choose(&[(3, -2.0)]).unwrap();
    assert_eq!(search.path_scores(), [(0.0, -2.0)]);
    search.choose(&[(3, -2.5)]).unwrap();
    let found = search.finish();
    assert_eq!((&found[0].ids[..], &found[1].ids[..]), (&[4, 3, 3][..], &[0][..]));
    assert_eq!(found[0].token_logprobs, [-0.5, -2.0, -2.5]);
    let beams = GenerationOptions { num_beams: 2, ..options };
    let mut search = Search::new(beams, prompts(&[&[1]]), 6).unwrap();
    assert!(matches!(search.choose(&[(1, 0.0)]), Err(Error::Outside(_))));
}

#[test]
fn a_search_cut_short_returns_what_it_has() {
    let table = Table::random(7, 2);
    for options in strategies() {
        let expected = options.num_return_sequences;
        let mut search = Search::new(options.clone(), prompts(&[&[1]]), 7).unwrap();
        assert!(search.step().is_some());
        for _ in 0..2 {
            let tokens = search.step().unwrap().tokens.clone();
            search.advance(&table.rows(&tokens)).unwrap();
        }
        let results = search.finish();
        assert_eq!(results.len(), expected);
        assert!(results.iter().all(|r| r.ids.len() <= 2 && !r.ids.is_empty()));
        // Without a single step there is nothing to say in beam search, and nothing said otherwise.
        let none = Search::new(options, prompts(&[&[1]]), 7).unwrap().finish();
        assert!(none.iter().all(|r| r.ids.is_empty()));
    }
}

#[test]
fn bad_logits_are_named_and_can_be_replaced() {
    let table = Table::random(5, 1);
    for options in strategies() {
        let beams = options.num_beams;
        let mut search = Search::new(options.clone(), prompts(&[&[1], &[2]]), 5).unwrap();
        search.advance(&table.rows(&[1, 2])).unwrap();
        let step = search.step().unwrap().clone();
        let good = table.rows(&step.tokens);
        let last = step.tokens.len() - 1;
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = good.clone();
            logits[last * 5 + 3] = bad;
            let error = search.advance(&logits).unwrap_err();
            let sequence = step.sequences[last];
            let message = error.to_string();
            assert!(
                message.contains(&format!("step 1, sequence {sequence}: the logit of token 3 is")),
                "{message}"
            );
            assert_eq!(search.step(), Some(&step), "an error changes nothing ({beams} beams)");
        }
        assert!(matches!(search.advance(&good[1..]), Err(Error::Shape { active, .. }) if active == last + 1));
        search.advance(&good).unwrap();

        let repaired = GenerationOptions { remove_invalid_values: true, ..options };
        let mut search = Search::new(repaired, prompts(&[&[1]]), 5).unwrap();
        search.advance(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, f32::NAN]).unwrap();
        assert!(search.step().unwrap().tokens.contains(&1));
    }
}

#[test]
fn banning_everything_is_an_error_and_nearly_everything_is_not() {
    for num_beams in [1, 3] {
        let options = GenerationOptions {
            max_new_tokens: Some(2),
            num_beams,
            num_return_sequences: num_beams,
            suppress_tokens: vec![0, 1, 2],
            ..Default::default()
        };
        let mut search = Search::new(options.clone(), prompts(&[&[1]]), 3).unwrap();
        let message = search.advance(&[0.0; 3]).unwrap_err().to_string();
        assert!(message.contains("ban every token"), "{message}");
        let options = GenerationOptions { suppress_tokens: vec![0, 2], ..options };
        let results = Table { v: 3, logits: vec![0.0; 9] }.generate(&options, &prompts(&[&[1]]));
        assert_eq!(results.len(), 1, "one result exists, {num_beams} were asked for");
        assert_eq!(results[0].ids, [1, 1]);
    }
}

#[test]
fn faulty_options_and_prompts_are_named() {
    let d = GenerationOptions::default;
    let cases = [
        (GenerationOptions { max_new_tokens: Some(0), ..d() }, "max_new_tokens is 0"),
        (GenerationOptions { num_beams: 0, ..d() }, "num_beams is 0"),
        (GenerationOptions { num_return_sequences: 0, ..d() }, "num_return_sequences is 0"),
        (GenerationOptions { num_return_sequences: 2, ..d() }, "num_return_sequences is above 1, but greedy"),
        (
            GenerationOptions { num_return_sequences: 3, num_beams: 2, ..d() },
            "num_return_sequences is 3, above num_beams",
        ),
        (
            GenerationOptions { min_new_tokens: Some(5), max_new_tokens: Some(4), ..d() },
            "min_new_tokens is 5",
        ),
        (GenerationOptions { repetition_penalty: 0.0, ..d() }, "repetition_penalty is 0"),
        (GenerationOptions { encoder_repetition_penalty: -1.0, ..d() }, "encoder_repetition_penalty is -1"),
        (
            GenerationOptions { exponential_decay_length_penalty: Some((1, f64::NAN)), ..d() },
            "exponential_decay_length_penalty is NaN",
        ),
        (GenerationOptions { length_penalty: f64::INFINITY, num_beams: 2, ..d() }, "length_penalty is inf"),
        (GenerationOptions { length_penalty: 2.0, ..d() }, "length_penalty is set but needs num_beams"),
        (
            GenerationOptions { early_stopping: EarlyStopping::Never, ..d() },
            "early_stopping is set but needs num_beams",
        ),
        (
            GenerationOptions { filters: Filters { top_p: 0.9, ..Filters::default() }, ..d() },
            "top_p is set but needs do_sample",
        ),
        (
            GenerationOptions {
                filters: Filters { top_p: 9.0, ..Filters::default() },
                do_sample: true,
                ..d()
            },
            "top_p is 9",
        ),
        (
            GenerationOptions { eos_token_id: vec![10], ..d() },
            "eos_token_id has token 10, but the vocabulary ends at 10",
        ),
        (
            GenerationOptions { bad_words_ids: vec![vec![1], vec![2, 11]], ..d() },
            "bad_words_ids has token 11",
        ),
        (GenerationOptions { bad_words_ids: vec![vec![]], ..d() }, "bad_words_ids has an empty sequence"),
        (GenerationOptions { sequence_bias: vec![(vec![1], f64::NAN)], ..d() }, "sequence_bias has [1]: NaN"),
        (GenerationOptions { forced_bos_token_id: Some(99), ..d() }, "forced_bos_token_id has token 99"),
    ];
    for (options, expected) in cases {
        let message = Search::new(options, prompts(&[&[1]]), 10).unwrap_err().to_string();
        assert!(message.starts_with(&format!("[search] {expected}")), "expected '{expected}' in: {message}");
    }
    let message = |options, list: &[&[u32]]| Search::new(options, prompts(list), 10).unwrap_err().to_string();
    assert!(message(d(), &[&[1], &[]]).contains("prompt 1 is empty"));
    assert!(message(d(), &[&[12]]).contains("prompt 0 has token 12"));
    let short = GenerationOptions { max_length: Some(2), ..d() };
    assert!(message(short, &[&[1], &[1, 2]]).contains("prompt 1 has 2 tokens, max_length is 2"));
    let none = Search::new(d(), [], 10).unwrap();
    assert!(none.step().is_none() && none.finish().is_empty());
}

#[test]
fn extreme_settings_stay_searchable() {
    let table = Table { v: 4, logits: [3e38, -3e38, 0.0, -0.0].repeat(4) };
    for options in strategies() {
        for repetition_penalty in [1e-44, 1e38] {
            let options = GenerationOptions {
                repetition_penalty,
                sequence_bias: vec![
                    (vec![0], 3e38),
                    (vec![0], 3e38),
                    (vec![1], -3e38),
                    (vec![2], f64::NEG_INFINITY),
                ],
                exponential_decay_length_penalty: Some((0, 1e30)),
                bad_words_ids: vec![vec![2], vec![3, 0]],
                ..options.clone()
            };
            for result in table.generate(&options, &prompts(&[&[1, 2, 0]])) {
                assert!(
                    result.ids.iter().all(|t| *t != 2) && !result.score.is_some_and(f64::is_nan),
                    "{result:?}"
                );
            }
        }
    }
}

#[test]
fn the_default_length_is_twenty_new_tokens() {
    let table = Table::random(5, 1);
    let lengths = |options: GenerationOptions| table.generate(&options, &prompts(&[&[1, 2, 3]]))[0].ids.len();
    assert_eq!(lengths(GenerationOptions::default()), 20);
    assert_eq!(lengths(GenerationOptions { max_length: Some(8), ..Default::default() }), 5);
    assert_eq!(
        lengths(GenerationOptions { max_length: Some(8), max_new_tokens: Some(7), ..Default::default() }),
        7
    );
}

fn any_options() -> impl Strategy<Value = GenerationOptions> {
    let tokens = |n| prop::collection::vec(0u32..7, 0..n);
    (
        (1usize..6, 0usize..4, any::<bool>(), 1usize..5, 1usize..5, 0.3..3.0f64),
        (0usize..4, prop::collection::vec(prop::collection::vec(0u32..7, 1..3), 0..3), tokens(3), tokens(3)),
        (
            tokens(3),
            -2.0..2.0f64,
            0usize..3,
            prop::option::of((0usize..3, 0.5..2.0f64)),
            any::<bool>(),
            any::<u64>(),
        ),
    )
        .prop_map(
            |(
                (max, min, do_sample, num_beams, returned, penalty),
                (ngram, bad, suppress, forced),
                (eos, lp, stopping, decay, renormalize, seed),
            )| {
                let beams = num_beams > 1;
                let filters = Filters { temperature: 1.5, top_k: 4, top_p: 0.9, ..Filters::default() };
                GenerationOptions {
                    max_new_tokens: Some(max),
                    min_length: min,
                    do_sample,
                    num_beams,
                    num_return_sequences: if beams {
                        returned.min(num_beams)
                    } else if do_sample {
                        returned
                    } else {
                        1
                    },
                    filters: if do_sample { filters } else { Filters::default() },
                    repetition_penalty: penalty,
                    no_repeat_ngram_size: ngram,
                    bad_words_ids: bad,
                    suppress_tokens: suppress,
                    forced_eos_token_id: forced,
                    eos_token_id: eos,
                    length_penalty: if beams { lp } else { 1.0 },
                    early_stopping: match stopping {
                        1 if beams => EarlyStopping::FirstComplete,
                        2 if beams => EarlyStopping::Never,
                        _ => EarlyStopping::Heuristic,
                    },
                    exponential_decay_length_penalty: decay,
                    renormalize_logits: renormalize,
                    seed,
                    ..Default::default()
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn any_search_ends_well_formed(options in any_options(), seed: u64, holes in prop::collection::vec(0usize..49, 0..30)) {
        let mut table = Table::random(7, seed);
        holes.into_iter().for_each(|at| table.logits[at] = f32::NEG_INFINITY);
        let limit = options.max_new_tokens.unwrap();
        let mut search = Search::new(options.clone(), prompts(&[&[1], &[2, 3, 2]]), 7).unwrap();
        let mut steps = 0;
        let mut rows = 2;
        while let Some(step) = search.step().cloned() {
            prop_assert_eq!(step.index, steps);
            prop_assert!(step.parents.iter().all(|p| (*p as usize) < rows));
            prop_assert!(step.sequences.windows(2).all(|s| s[0] < s[1]));
            rows = step.tokens.len();
            steps += 1;
            prop_assert!(steps <= limit);
            if let Err(error) = search.advance(&table.rows(&step.tokens)) {
                // Bans or the table's holes may leave nothing; anything else is a defect.
                let message = error.to_string();
                prop_assert!(message.contains("ban every token") || message.contains("-inf"), "{}", message);
                return Ok(());
            }
        }
        let results = search.finish();
        for prompt in 0..2 {
            let count = results.iter().filter(|r| r.prompt == prompt).count();
            let fits = if options.num_beams > 1 { 1..=options.num_return_sequences } else { options.num_return_sequences..=options.num_return_sequences };
            prop_assert!(fits.contains(&count), "{} results", count);
        }
        for pair in results.windows(2) {
            prop_assert!(pair[0].prompt < pair[1].prompt || pair[0].score >= pair[1].score);
        }
        for r in &results {
            prop_assert!(!r.ids.is_empty() && r.ids.len() <= limit && r.token_logprobs.len() == r.ids.len());
            let (last, before) = r.ids.split_last().unwrap();
            prop_assert!(before.iter().all(|t| !options.eos_token_id.contains(t)));
            let ended = options.eos_token_id.contains(last);
            prop_assert_eq!(ended, r.finish_reason == FinishReason::Stop);
            prop_assert!(ended || r.ids.len() == limit);
            prop_assert!(!r.score.is_some_and(f64::is_nan));
        }
    }
}
