//! Arithmetic on one row `[V]`: normalisation, the largest token, and draws. Sums are in float64.

use pyrformer_random::Stream;

/// Names the draws of this crate to the random generator; beams draw apart from single sequences.
pub(crate) const SAMPLE_PURPOSE: u32 = 0x5345_0001;
pub(crate) const BEAM_PURPOSE: u32 = 0x5345_0002;
pub(crate) const GUMBEL_PURPOSE: u32 = 0x5345_0003;
pub(crate) const DRAFT_PURPOSE: u32 = 0x5345_0004;
pub(crate) const VERIFY_PURPOSE: u32 = 0x5345_0005;

/// What makes a row of logits unusable, with the remedy, if anything does.
pub(crate) fn check_row(row: &[f32]) -> Result<(), String> {
    if let Some(token) = row.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        let value = row[token];
        return Err(format!(
            "the logit of token {token} is {value}; check the weights and the data type, or set remove_invalid_values"
        ));
    }
    if row.iter().all(|x| *x == f32::NEG_INFINITY) {
        return Err("every logit is -inf; loosen the bans that the options or the model set".to_owned());
    }
    Ok(())
}

/// ln Σ exp(row), stable; −∞ for a row of nothing but −∞.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + row.iter().map(|&x| (f64::from(x) - largest).exp()).sum::<f64>().ln()
}

/// Turns logits into log-probabilities, in place.
pub(crate) fn log_softmax(row: &mut [f32]) {
    let normalizer = log_sum_exp(row);
    row.iter_mut().for_each(|x| *x = (f64::from(*x) - normalizer) as f32);
}

/// The token of the largest logit, the first of equals.
pub(crate) fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (token, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = token;
        }
    }
    best
}

/// Draws a token with probability ∝ exp(row), by inverting the cumulative distribution.
///
/// The draw is a function of `(seed, sequence, step)` alone.
pub(crate) fn draw(row: &[f32], seed: u64, sequence: u32, step: usize) -> usize {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weights: Vec<_> = row.iter().map(|&x| (f64::from(x) - largest).exp()).collect();
    let uniform = Stream::new(seed, SAMPLE_PURPOSE, coordinate(sequence, step)).next_f64();
    pick(&weights, uniform)
}

/// Draws up to `count` distinct indices one after the other, each ∝ exp(scores) among those left; in drawing order.
pub(crate) fn draw_distinct(scores: &[f64], count: usize, seed: u64, prompt: u32, step: usize) -> Vec<usize> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<_> = scores.iter().map(|&x| (x - largest).exp()).collect();
    let mut stream = Stream::new(seed, BEAM_PURPOSE, coordinate(prompt, step));
    let available = weights.iter().filter(|w| **w > 0.0).count();
    (0..count.min(available))
        .map(|_| {
            let index = pick(&weights, stream.next_f64());
            weights[index] = 0.0;
            index
        })
        .collect()
}

/// The coordinate of the draws of one sequence (or prompt) at one step.
pub(crate) fn coordinate(sequence: u32, step: usize) -> u64 {
    u64::from(sequence) << 32 | step as u64
}

/// The index at which the running sum of `weights` passes `uniform` of the total; never one of weight zero.
pub(crate) fn pick(weights: &[f64], uniform: f64) -> usize {
    let target = uniform * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut last = 0;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            sum += weight;
            last = index;
            if sum > target {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let row = [0.5f32, -1.0, f32::NEG_INFINITY, 2.0, 0.0];
        let normalizer = log_sum_exp(&row);
        let n = 40_000;
        let mut counts = [0f64; 5];
        for sequence in 0..n {
            counts[draw(&row, 7, sequence, 3)] += 1.0;
        }
        assert_eq!(counts[2], 0.0);
        let chi: f64 = [0, 1, 3, 4]
            .iter()
            .map(|&t| {
                let expected = f64::from(n) * (f64::from(row[t]) - normalizer).exp();
                (counts[t] - expected).powi(2) / expected
            })
            .sum();
        // Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand seeds.
        assert!(chi < 16.3, "{chi}");
        // Along steps the draws are as independent as along sequences.
        let mean: f64 = (0..10_000).map(|step| f64::from(u8::from(draw(&[0.0; 2], 7, 0, step) == 1))).sum();
        assert!((mean - 5000.0).abs() < 4.0 * 50.0, "{mean}");
    }

    #[test]
    fn distinct_draws_follow_the_sequential_law() {
        // P(first = a, second = b) = p_a · p_b / (1 − p_a).
        let p = [0.5, 0.3, 0.2];
        let scores: Vec<f64> = p.iter().map(|x: &f64| x.ln()).collect();
        let n = 30_000;
        let mut counts = [[0f64; 3]; 3];
        for prompt in 0..n {
            let drawn = draw_distinct(&scores, 2, 11, prompt, 0);
            counts[drawn[0]][drawn[1]] += 1.0;
        }
        let mut chi = 0.0;
        for a in 0..3 {
            assert_eq!(counts[a][a], 0.0);
            for b in (0..3).filter(|&b| b != a) {
                let expected = f64::from(n) * p[a] * p[b] / (1.0 - p[a]);
                chi += (counts[a][b] - expected).powi(2) / expected;
            }
        }
        // Five degrees of freedom.
        assert!(chi < 20.5, "{chi}");
    }

    #[test]
    fn distinct_draws_stop_when_nothing_is_left() {
        let scores = [f64::NEG_INFINITY, 0.0, f64::NEG_INFINITY, -1.0];
        let mut drawn = draw_distinct(&scores, 4, 0, 0, 0);
        drawn.sort_unstable();
        assert_eq!(drawn, [1, 3]);
    }

    #[test]
    fn extreme_uniforms_never_pick_a_zero() {
        let weights = [0.0, 1.0, 0.0, 2.0, 0.0];
        assert_eq!(pick(&weights, 0.0), 1);
        assert_eq!(pick(&weights, 1.0 - f64::EPSILON / 2.0), 3);
    }

    #[test]
    fn normalisation_is_stable() {
        assert_eq!(log_sum_exp(&[f32::MAX, f32::MAX]), f64::from(f32::MAX) + 2f64.ln());
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
        let mut row = [1e4f32, 1e4 - 1.0, f32::NEG_INFINITY];
        log_softmax(&mut row);
        assert!((row[0] + 0.313_261_7).abs() < 1e-6 && row[2] == f32::NEG_INFINITY);
    }
}
