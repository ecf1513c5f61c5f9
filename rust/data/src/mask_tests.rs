//! Laws of masked batches: coverage, purity, rates, words, shapes.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::masker::{SpanLengths, Spans, Words};

const CLS: u32 = 1;
const SEP: u32 = 2;
const PAD: u32 = 0;
const HIDDEN: u32 = 3;
const VOCAB: usize = 3000;

fn options(batch_size: usize, max_length: usize) -> MaskedOptions {
    MaskedOptions::new(batch_size, max_length, VOCAB, [CLS, SEP, PAD, HIDDEN])
}

/// Words that begin with the ids for which `begins` holds.
fn begun_by(begins: impl Fn(u32) -> bool + Send + Sync + 'static) -> Words {
    Words::new(move |ids| ids.iter().map(|&id| begins(id)).collect())
}

fn held(ids: Vec<u32>, offsets: &[u64]) -> Corpus {
    Corpus::held(ids.into(), offsets.into()).unwrap()
}

/// Documents of the given lengths with ids from 4 on.
fn corpus(lengths: &[usize], options: MaskedOptions) -> MaskedBatches {
    let mut offsets = vec![0u64];
    for &len in lengths {
        offsets.push(offsets[offsets.len() - 1] + len as u64);
    }
    let total = offsets[offsets.len() - 1] as usize;
    let tokens: Vec<u32> = (0..total).map(|i| 4 + (i % (VOCAB - 4)) as u32).collect();
    MaskedBatches::new(held(tokens, &offsets), options).unwrap()
}

/// What holds for every batch.
fn check(batches: &MaskedBatches, batch: &MaskedBatch, rows: &[Row]) {
    let o = &batches.masker.options;
    let width = batch.seq_len;
    assert_eq!((batch.batch_size, batch.rows), (o.batch_size, rows.len()));
    for array in [&batch.input_ids, &batch.attention_mask, &batch.token_type_ids, &batch.labels] {
        assert_eq!(array.len(), o.batch_size * width);
    }
    assert!(batch.token_type_ids.iter().all(|&t| t == 0));
    for b in 0..o.batch_size {
        let mut row = vec![PAD as i32; width];
        let mut len = 0;
        if let Some(&r) = rows.get(b) {
            let piece = batches.piece(r);
            len = piece.len() + 2;
            row[0] = CLS as i32;
            row[len - 1] = SEP as i32;
            (0..piece.len()).for_each(|i| row[i + 1] = piece[i] as i32);
        }
        for (t, &token) in row.iter().enumerate() {
            let place = b * width + t;
            assert_eq!(batch.attention_mask[place], i32::from(t < len));
            if batch.labels[place] == -100 {
                assert_eq!(batch.input_ids[place], token);
            } else {
                assert_eq!(batch.labels[place], token);
                assert!(t > 0 && t + 1 < len && !batches.masker.special[token as usize]);
            }
        }
    }
    let places: Vec<i32> =
        (0..batch.labels.len() as i32).filter(|&p| batch.labels[p as usize] != -100).collect();
    let count = places.len();
    assert_eq!(batch.labels_count, count);
    assert_eq!(batch.positions.len(), count.div_ceil(32).max(1) * 32);
    assert_eq!(batch.positions[..count], places);
    assert!(batch.positions[count..].iter().all(|&p| p == 0));
    for (i, &label) in batch.masked_labels.iter().enumerate() {
        assert_eq!(label, if i < count { batch.labels[places[i] as usize] } else { -100 });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn an_epoch_holds_each_piece_once(
        lengths in prop::collection::vec(0usize..40, 1..60), batch_size in 1usize..7, max_length in 3usize..20,
        seed: u64,
    ) {
        prop_assume!(lengths.iter().any(|&len| len > 0));
        let batches = corpus(&lengths, MaskedOptions { seed, ..options(batch_size, max_length) });
        let epochs = 3;
        let steps = (epochs * batches.pieces()).div_ceil(batch_size);
        let mut seen = HashMap::new();
        for step in (0..steps as u64).rev() {
            let rows = batches.rows(step);
            let batch = batches.batch(step);
            prop_assert!(batch.labels_count > 0 && batch.rows == batch_size);
            check(&batches, &batch, &rows);
            rows.into_iter().for_each(|row| *seen.entry(row).or_insert(0) += 1);
        }
        for epoch in 0..epochs as u64 {
            for piece in 0..batches.pieces() {
                prop_assert_eq!(seen.get(&Row { epoch, piece }), Some(&1));
            }
        }
    }

    #[test]
    fn settled_batches_are_those_of_a_longer_corpus(
        lengths in prop::collection::vec(1usize..60_000, 20..60), cut in 1usize..20, batch_size in 1usize..7, seed: u64,
    ) {
        let options = MaskedOptions { seed, ..options(batch_size, 500) };
        let (part, whole) = (corpus(&lengths[..lengths.len() - cut], options.clone()), corpus(&lengths, options));
        prop_assert!(part.settled_steps() <= whole.settled_steps());
        prop_assert!(part.settled_steps() < part.batches_per_pass());
        let settled = part.settled_steps();
        for step in (0..settled).step_by(1 + settled as usize / 9).chain(settled.checked_sub(1)) {
            prop_assert_eq!(part.batch(step), whole.batch(step));
            prop_assert_eq!(part.documents(step), whole.documents(step));
        }
    }

    #[test]
    fn an_evaluation_holds_each_piece_once_in_order(
        lengths in prop::collection::vec(1usize..40, 1..30), batch_size in 1usize..7,
    ) {
        let batches = corpus(&lengths, MaskedOptions { shuffle: false, ..options(batch_size, 12) });
        let mut pieces = Vec::new();
        for step in 0..batches.batches_per_pass() {
            let rows = batches.rows(step);
            check(&batches, &batches.batch(step), &rows);
            pieces.extend(rows.into_iter().map(|row| row.piece));
        }
        prop_assert_eq!(pieces, (0..batches.pieces()).collect::<Vec<_>>());
        prop_assert_eq!(batches.batch(batches.batches_per_pass()), batches.batch(0));
    }
}

#[test]
fn more_than_one_pool_covers_the_epoch_and_sorts_lengths() {
    let lengths: Vec<usize> = (0..1000).map(|i| 1 + i * 7 % 100).collect();
    let batches = corpus(&lengths, options(4, 128));
    let mut seen = vec![0; 1000];
    let mut spread = 0;
    for step in 0..250 {
        let rows = batches.rows(step);
        let lens: Vec<usize> = rows.iter().map(|row| batches.pieces[row.piece].1).collect();
        spread += lens[3] - lens[0];
        rows.iter().for_each(|row| seen[row.piece] += 1);
    }
    assert!(seen.iter().all(|&count| count == 1));
    // Random rows of four would spread over some 60 tokens; sorted pools of 128 over about 3.
    assert!(spread / 250 < 6, "{}", spread / 250);
}

#[test]
fn documents_are_cut_and_rows_padded_as_asked() {
    let plain = MaskedOptions { shuffle: false, ..options(3, 7) };
    let batches = corpus(&[11, 0, 2], plain.clone());
    assert_eq!(batches.pieces, [(0, 5), (5, 5), (10, 1), (11, 2)]);
    assert_eq!(batches.batch(0).seq_len, 7, "rounded up to 8, but not beyond max_length");
    let wide = MaskedOptions { max_length: 20, ..plain.clone() };
    let batch = corpus(&[11, 0, 2], wide.clone()).batch(0);
    assert_eq!((batch.seq_len, batch.rows), (16, 2));
    assert_eq!(
        corpus(&[11, 2], MaskedOptions { pad_to_multiple_of: 1, ..wide.clone() }).batch(0).seq_len,
        13
    );
    let fixed = MaskedOptions { fixed_length: Some(32), ..wide };
    let batch = corpus(&[11, 2], fixed).batch(0);
    assert_eq!(batch.seq_len, 32);
    assert!(batch.input_ids[64..].iter().all(|&id| id == PAD as i32));
}

#[test]
fn masks_depend_on_seed_epoch_piece_and_position_only() {
    let lengths = [30; 40];
    let of = |batch_size, seed, step| {
        corpus(&lengths, MaskedOptions { seed, shuffle: false, ..options(batch_size, 32) }).batch(step)
    };
    assert_eq!(of(8, 5, 1), of(8, 5, 1));
    assert_ne!(of(8, 5, 1).labels, of(8, 6, 1).labels);
    // Row 9 alone, and as the second row of a batch of eight.
    let (together, alone) = (of(8, 5, 1), of(1, 5, 9));
    assert!(alone.labels_count > 1);
    assert_eq!(together.labels[32..64], alone.labels);
    assert_eq!(together.input_ids[32..64], alone.input_ids);
    // One piece: each step is an epoch, with masks of its own.
    let one = corpus(&[100], options(1, 128));
    assert_ne!(one.batch(0).labels, one.batch(1).labels);
    assert_eq!(one.batch(u64::MAX).rows, 1);
}

#[test]
fn rates_agree_with_the_rule() {
    for (p, mask, random) in [(0.15, 0.8, 0.1), (0.15, 1.0, 0.0), (0.3, 0.5, 0.4), (0.2, 0.0, 1.0)] {
        let rates =
            MaskedOptions { mlm_probability: p, mask_rate: mask, random_rate: random, ..options(10, 102) };
        let batches = corpus(&[100; 1000], MaskedOptions { seed: 11, ..rates });
        // Not chosen, [MASK], another token, unchanged.
        let mut counts = [0f64; 4];
        for step in 0..100 {
            let rows = batches.rows(step);
            let batch = batches.batch(step);
            for (b, row) in rows.iter().enumerate() {
                for (i, &original) in batches.piece(*row).iter().enumerate() {
                    let place = b * batch.seq_len + 1 + i;
                    let id = batch.input_ids[place] as u32;
                    let kind = match batch.labels[place] {
                        -100 => 0,
                        _ if id == HIDDEN => 1,
                        _ if id != original => 2,
                        _ => 3,
                    };
                    counts[kind] += 1.0;
                }
            }
        }
        assert_eq!(counts.iter().sum::<f64>(), 1e5);
        // A random token is [MASK] or the original once in VOCAB each.
        let v = VOCAB as f64;
        let same = mask + random * (1.0 - 1.0 / v);
        let exact = [1.0 - p, p * (mask + random / v), p * random * (1.0 - 2.0 / v), p * (1.0 - same)];
        // Cells that expect less than five say nothing in a chi-square.
        let cells = counts.iter().zip(exact.map(|e| e * 1e5)).filter(|(_, e)| *e >= 5.0);
        let chi: f64 = cells.map(|(c, e)| (c - e).powi(2) / e).sum();
        // Chi-square with at most 3 degrees of freedom: 16.3 is passed once in a thousand seeds.
        assert!(chi < 16.3, "{chi} {counts:?}");
    }
}

#[test]
fn random_tokens_come_from_the_whole_vocabulary() {
    let all = MaskedOptions {
        mlm_probability: 1.0,
        mask_rate: 0.0,
        random_rate: 1.0,
        ..MaskedOptions::new(1, 1002, 10, [CLS, SEP, PAD, HIDDEN])
    };
    let batches = MaskedBatches::new(held(vec![5; 20_000], &[0, 20_000]), all).unwrap();
    let mut counts = [0f64; 10];
    for step in 0..20 {
        let batch = batches.batch(step);
        batch.positions[..batch.labels_count]
            .iter()
            .for_each(|&p| counts[batch.input_ids[p as usize] as usize] += 1.0);
    }
    let chi: f64 = counts.iter().map(|c| (c - 2000.0).powi(2) / 2000.0).sum();
    // Chi-square with 9 degrees of freedom: 27.9 is passed once in a thousand seeds.
    assert!(chi < 27.9, "{chi} {counts:?}");
}

#[test]
fn whole_words_stay_together() {
    // Ids divisible by 3 begin a word; id 499 is special and breaks one.
    let begun = begun_by(|id| id % 3 == 0);
    let mut words = MaskedOptions { special_ids: vec![499], ..options(4, 64) }.with_whole_words(begun);
    let rate = |batches: &MaskedBatches| {
        let (mut drawn, mut all, mut replaced) = (0, 0, 0);
        for step in 0..500 {
            let rows = batches.rows(step);
            let batch = batches.batch(step);
            check(batches, &batch, &rows);
            for (b, row) in rows.iter().enumerate() {
                let piece = batches.piece(*row);
                let chosen = |i: usize| batch.labels[b * batch.seq_len + 1 + i] != -100;
                for i in 0..piece.len() {
                    if piece[i] == 499 {
                        assert!(!chosen(i));
                    } else if i > 0 && !piece[i].is_multiple_of(3) && piece[i - 1] != 499 {
                        assert_eq!(chosen(i), chosen(i - 1), "a word is masked whole or not at all");
                    } else {
                        all += 1;
                        drawn += i32::from(chosen(i));
                    }
                    let id = batch.input_ids[b * batch.seq_len + 1 + i];
                    replaced += i32::from(chosen(i) && id != HIDDEN as i32);
                }
            }
        }
        let rate = f64::from(drawn) / f64::from(all);
        let error = (0.15 * 0.85 / f64::from(all)).sqrt();
        assert!((rate - 0.15).abs() < 4.0 * error, "{rate}");
        replaced
    };
    assert_eq!(rate(&corpus(&[200; 500], words.clone())), 0);
    (words.mask_rate, words.random_rate) = (0.8, 0.1);
    assert!(rate(&corpus(&[200; 500], words)) > 0);
}

#[test]
fn a_word_begins_after_a_special_token() {
    let begun = begun_by(|_| false);
    let all = MaskedOptions { special_ids: vec![499], mlm_probability: 1.0, ..options(1, 16) };
    let tokens = vec![5, 499, 6, 7];
    let batches = MaskedBatches::new(held(tokens, &[0, 4]), all.with_whole_words(begun)).unwrap();
    assert_eq!(batches.batch(0).labels, [-100, 5, -100, 6, 7, -100, -100, -100]);
}

#[test]
fn a_batch_has_a_label_if_it_can() {
    let rare = MaskedOptions { mlm_probability: 1e-7, ..options(2, 10) };
    let batches = corpus(&[5; 100], rare.clone());
    assert!((0..50).all(|step| batches.batch(step).labels_count == 1));
    let begun = begun_by(|_| false);
    let words = corpus(&[5; 100], rare.clone().with_whole_words(begun));
    assert!((0..50).all(|step| words.batch(step).labels_count == 5));
    let hidden = MaskedBatches::new(held(vec![HIDDEN; 6], &[0, 6]), rare).unwrap().batch(0);
    assert_eq!((hidden.labels_count, hidden.positions.len()), (0, 32));
}

#[test]
fn errors_say_what_to_do() {
    let of = |change: &dyn Fn(&mut MaskedOptions)| {
        let mut o = options(2, 16);
        change(&mut o);
        MaskedBatches::new(held(vec![5; 9], &[0, 9]), o).unwrap_err().to_string()
    };
    for (text, part) in [
        (of(&|o| o.batch_size = 0), "batch_size is 0"),
        (of(&|o| o.max_length = 2), "max_length is 2"),
        (of(&|o| o.max_length = usize::MAX), "16777216"),
        (of(&|o| o.fixed_length = Some(15)), "fixed_length is 15; it must be at least max_length (16)"),
        (of(&|o| o.pad_to_multiple_of = 0), "pad_to_multiple_of is 0"),
        (of(&|o| o.mlm_probability = 0.0), "mlm_probability is 0"),
        (of(&|o| o.mlm_probability = f64::NAN), "mlm_probability is NaN"),
        (of(&|o| o.mask_rate = 1.5), "mask_rate is 1.5"),
        (of(&|o| o.random_rate = 0.5), "random_rate is 0.5"),
        (of(&|o| o.vocab_size = 3), "mask is 3; it must be below vocab_size (3)"),
        (of(&|o| o.vocab_size = 5), "token 0 of the corpus is 5"),
        (of(&|o| o.special_ids = vec![9999]), "special_ids is 9999"),
    ] {
        assert!(text.starts_with("[data] ") && text.contains(part), "{text}");
    }
    let empty = MaskedBatches::new(held(Vec::new(), &[0, 0, 0]), options(2, 16)).unwrap_err();
    assert!(empty.to_string().contains("all 2 documents are empty"));
}

#[test]
fn spans_cover_the_share_asked_for_everywhere_in_a_row() {
    for (p, max_length, mlm_probability) in [(0.2, 10, 0.15), (0.5, 3, 0.4), (1.0, 1, 0.3), (0.01, 40, 0.15)]
    {
        let spans = Some(Spans { p, max_length });
        let batches = corpus(&[30; 400], MaskedOptions { spans, mlm_probability, ..options(400, 32) });
        let mut chosen = [0u32; 30];
        for step in 0..40 {
            let batch = batches.batch(step);
            check(&batches, &batch, &batches.rows(step));
            for row in batch.labels.chunks(batch.seq_len) {
                (0..30).for_each(|t| chosen[t] += u32::from(row[t + 1] != -100));
            }
        }
        for (t, &count) in chosen.iter().enumerate() {
            let (share, error) =
                (f64::from(count) / 16e3, (mlm_probability * (1.0 - mlm_probability) / 16e3).sqrt());
            assert!((share - mlm_probability).abs() < 5.0 * error, "p {p}, place {t}: {share}");
        }
    }
}

#[test]
fn lengths_of_spans_are_geometric_and_their_tokens_share_one_fate() {
    let lengths = SpanLengths::new(Some(Spans { p: 0.2, max_length: 10 }), 0.15);
    let mean = (0..1 << 16).map(|i| lengths.draw(i << 16)).sum::<usize>() as f64 / f64::from(1 << 16);
    // SpanBERT, section 3.1: a mean of 3.8.
    assert!((mean - 3.797).abs() < 0.002, "{mean}");
    // Spans so rare that they seldom touch: a run is a span.
    let spans = Some(Spans { p: 0.2, max_length: 10 });
    let rare =
        MaskedOptions { spans, mlm_probability: 0.002, random_rate: 0.2, mask_rate: 0.6, ..options(1, 502) };
    let batches = corpus(&vec![500; 2000], rare);
    let (mut runs, mut total, mut mixed, mut fates) = (0, 0, 0, [0; 3]);
    for step in 0..2000 {
        let batch = batches.batch(step);
        let places = &batch.positions[..batch.labels_count];
        let fate = |place: i32| match batch.input_ids[place as usize] {
            id if id == HIDDEN as i32 => 0,
            id if id == batch.labels[place as usize] => 1,
            _ => 2,
        };
        if batch.labels_count < 2 {
            continue;
        }
        for run in places.chunk_by(|a, b| a + 1 == *b) {
            mixed += u32::from(run.iter().any(|&place| fate(place) != fate(run[0])));
            (runs, total) = (runs + 1, total + run.len());
            fates[fate(run[0])] += 1;
        }
    }
    // Two spans side by side have two fates.
    assert!(mixed * 50 < runs, "{mixed} of {runs}");
    // Batches without a span, where one token is chosen by force, are left out, and with them some spans of length 1.
    assert!(runs > 400 && total as f64 / f64::from(runs) > 3.5, "{runs} runs, {total} tokens");
    assert!(fates[0] > 2 * fates[2] && fates[1] > 40 && fates[2] > 40, "{fates:?}");
}

#[test]
fn spans_keep_words_whole_and_end_at_special_tokens() {
    // Words of three tokens, the special 499 behind every fourth word.
    let tokens: Vec<u32> = (0..13 * 60).map(|i| if i % 13 == 12 { 499 } else { 500 + i % 13 % 3 }).collect();
    let begun = begun_by(|id| id != 501 && id != 502);
    let spans = Some(Spans { p: 0.3, max_length: 5 });
    let words = MaskedOptions { special_ids: vec![499], spans, whole_word: Some(begun), ..options(4, 132) };
    let batches = MaskedBatches::new(held(tokens, &[0, 780]), words).unwrap();
    for step in 0..20 {
        let batch = batches.batch(step);
        for row in batch.labels.chunks(batch.seq_len) {
            for word in row[1..131].chunks(13).flat_map(|part| part[..12.min(part.len())].chunks(3)) {
                assert!(word.iter().all(|&l| (l == -100) == (word[0] == -100)), "{word:?}");
            }
        }
    }
    let mut wrong = options(1, 8);
    wrong.spans = Some(Spans { p: 0.0, max_length: 3 });
    assert!(wrong.check().unwrap_err().to_string().contains("span_p"));
    wrong.spans = Some(Spans { p: 0.5, max_length: 0 });
    assert!(wrong.check().unwrap_err().to_string().contains("span_max_length"));
}
