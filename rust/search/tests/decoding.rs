//! Whole searches against the reference library's `generate`, on two tiny models.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod common;

use common::{Model, fixtures, json};
use pyrformer_search::{EarlyStopping, FinishReason, GenerationOptions, Hypothesis, Prompt, Search};
use serde_json::Value;

fn list(value: &Value) -> Vec<u32> {
    match value.as_array() {
        Some(items) => items.iter().map(|x| x.as_u64().unwrap() as u32).collect(),
        None => vec![value.as_u64().unwrap() as u32],
    }
}

fn options(settings: &Value) -> GenerationOptions {
    let mut options = GenerationOptions { eos_token_id: vec![2], ..Default::default() };
    for (name, value) in settings.as_object().unwrap() {
        let count = || value.as_u64().unwrap() as usize;
        let number = || value.as_f64().unwrap();
        match name.as_str() {
            "do_sample" => options.do_sample = value.as_bool().unwrap(),
            "max_new_tokens" => options.max_new_tokens = Some(count()),
            "max_length" => options.max_length = Some(count()),
            "min_new_tokens" => options.min_new_tokens = Some(count()),
            "min_length" => options.min_length = count(),
            "eos_token_id" => options.eos_token_id = list(value),
            "no_repeat_ngram_size" => options.no_repeat_ngram_size = count(),
            "repetition_penalty" => options.repetition_penalty = number(),
            "forced_bos_token_id" => options.forced_bos_token_id = Some(count() as u32),
            "forced_eos_token_id" => options.forced_eos_token_id = list(value),
            "exponential_decay_length_penalty" => {
                let start = value[0].as_u64().unwrap() as usize;
                options.exponential_decay_length_penalty = Some((start, value[1].as_f64().unwrap()));
            }
            "bad_words_ids" => options.bad_words_ids = value.as_array().unwrap().iter().map(list).collect(),
            "suppress_tokens" => options.suppress_tokens = list(value),
            "begin_suppress_tokens" => options.begin_suppress_tokens = list(value),
            "sequence_bias" => {
                let pairs = value.as_array().unwrap();
                options.sequence_bias = pairs.iter().map(|p| (list(&p[0]), p[1].as_f64().unwrap())).collect();
            }
            "renormalize_logits" => options.renormalize_logits = value.as_bool().unwrap(),
            "num_beams" => options.num_beams = count(),
            "num_return_sequences" => options.num_return_sequences = count(),
            "length_penalty" => options.length_penalty = number(),
            "early_stopping" => {
                options.early_stopping = match value {
                    Value::Bool(true) => EarlyStopping::FirstComplete,
                    Value::Bool(false) => EarlyStopping::Heuristic,
                    other if other == "never" => EarlyStopping::Never,
                    other => panic!("early_stopping {other}"),
                }
            }
            // How the reference computes, not what.
            "use_cache" => {}
            other => panic!("the fixture has an option '{other}' without a test"),
        }
    }
    options
}

/// Runs the loop of the crate's page; what each row stands for is known from `tokens` and `parents` alone.
fn generate(model: &mut Model, options: GenerationOptions, prompts: &[Prompt]) -> Vec<Hypothesis> {
    let mut search = Search::new(options, prompts.to_vec(), model.vocab_size).unwrap();
    let mut rows: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.clone()).collect();
    while let Some(step) = search.step() {
        if step.index > 0 {
            let continued = step.parents.iter().zip(&step.tokens);
            rows =
                continued.map(|(&parent, &token)| [&rows[parent as usize][..], &[token]].concat()).collect();
        }
        let logits: Vec<f32> = rows.iter().flat_map(|ids| model.after(ids).logits.clone()).collect();
        search.advance(&logits).unwrap();
    }
    search.finish()
}

fn run_cases(name: &str) {
    let Some(root) = fixtures() else { return };
    let fixture = json(&root.join(format!("decoding/{name}.json")));
    let mut model = Model::load(&root.join("models").join(name));
    let mut failures = Vec::new();
    let cases = fixture["cases"].as_array().unwrap();
    for case in cases {
        let batch = &fixture["prompts"][case["prompts"].as_str().unwrap()];
        let rows =
            batch["input_ids"].as_array().unwrap().iter().zip(batch["attention_mask"].as_array().unwrap());
        let prompts: Vec<Prompt> = rows
            .map(|(ids, mask)| {
                let left_padding = list(mask).iter().filter(|m| **m == 0).count();
                Prompt { ids: list(ids)[left_padding..].to_vec(), left_padding, first_sequence: None }
            })
            .collect();
        let width = list(&batch["input_ids"][0]).len();
        let options = options(&case["settings"]);
        let beams = options.num_beams > 1;
        let results = generate(&mut model, options, &prompts);
        let sequences = case["sequences"].as_array().unwrap();
        assert_eq!(results.len(), sequences.len(), "{}", case["name"]);
        for (i, (result, expected)) in results.iter().zip(sequences).enumerate() {
            let expected = &list(expected)[width..];
            let n = result.ids.len();
            let filler = if result.finish_reason == FinishReason::Stop {
                n <= expected.len()
            } else {
                n == expected.len()
            };
            let mut same = filler && result.ids == expected[..n.min(expected.len())];
            if beams {
                let score = case["sequences_scores"][i].as_f64().unwrap();
                same &= (result.score.unwrap() - score).abs() <= 1e-4 * score.abs().max(1.0);
                let origin = case["beam_indices"][i].as_array().unwrap().iter().map(|x| x.as_i64().unwrap());
                let origin: Vec<u32> = origin.take_while(|x| *x >= 0).map(|x| x as u32).collect();
                same &= result.beam_indices == origin;
            }
            if !same {
                failures.push(format!(
                    "{} [{i}]: {result:?}\n expected {expected:?}, score {}, beams {}",
                    case["name"], case["sequences_scores"][i], case["beam_indices"][i]
                ));
            }
        }
    }
    assert!(cases.len() > 100);
    assert!(
        failures.is_empty(),
        "{} of {} cases differ:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

#[test]
fn gpt2_decodes_as_the_reference() {
    run_cases("gpt2");
}

#[test]
fn llama_decodes_as_the_reference() {
    run_cases("llama");
}
