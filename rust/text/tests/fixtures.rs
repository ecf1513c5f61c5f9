//! Every value of the reference tokenizers: encodings, decodings, padding and truncation, exactly.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyrformer_text::{
    Direction, Encoding, Padding, PaddingStrategy, StreamDecoder, Tokenizer, Truncation, TruncationStrategy,
};
use serde_json::Value;

const NAMES: [&str; 8] = [
    "bert_uncased",
    "bert_cased",
    "gpt2_bytelevel",
    "roberta_bytelevel",
    "llama3_bytelevel",
    "llama2_byte_fallback",
    "llama2_metaspace",
    "xlnet_unigram",
];

/// The folder of fixtures, or none with the reason printed.
fn fixtures() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures/tokenizers");
    if !folder.is_dir() {
        eprintln!("skipped: {} is absent", folder.display());
        return None;
    }
    Some(folder)
}

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn offsets(value: &Value) -> Vec<(u32, u32)> {
    value.as_array().unwrap().iter().map(numbers).map(|v| (v[0], v[1])).collect()
}

fn input(value: &Value) -> (String, Option<String>) {
    match value {
        Value::String(text) => (text.clone(), None),
        _ => (value[0].as_str().unwrap().into(), Some(value[1].as_str().unwrap().into())),
    }
}

#[test]
fn encodings() {
    let Some(folder) = fixtures() else { return };
    for name in NAMES {
        let tokenizer = Tokenizer::load(folder.join(name)).unwrap();
        for case in lines(&folder.join(name).join("encodings.jsonl")) {
            let text = case["text"].as_str().unwrap();
            let pair = case.get("pair").and_then(Value::as_str);
            let special = case.get("add_special_tokens").and_then(Value::as_bool).unwrap_or(true);
            let got = tokenizer.encode(text, pair, special).unwrap();
            let context = format!("{name} {text:?} {pair:?}");
            assert_eq!(got.ids, numbers(&case["ids"]), "{context}");
            let tokens: Vec<&str> =
                case["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
            assert_eq!(got.tokens, tokens, "{context}");
            assert_eq!(got.offsets, offsets(&case["offsets"]), "{context}");
            assert_eq!(got.type_ids, numbers(&case["type_ids"]), "{context}");
            assert_eq!(got.special_tokens_mask, numbers(&case["special"]), "{context}");
            let words: Vec<Option<u32>> =
                case["words"].as_array().unwrap().iter().map(|w| w.as_u64().map(|w| w as u32)).collect();
            assert_eq!(got.word_ids, words, "{context}");
            if let Some(Value::Array(expected)) = case.get("sequence_ids") {
                let expected: Vec<Option<u32>> =
                    expected.iter().map(|w| w.as_u64().map(|w| w as u32)).collect();
                assert_eq!(got.sequence_ids, expected, "{context}");
            }
            if pair.is_none() {
                let mut ids = vec![];
                tokenizer.encode_ids(text, special, &mut ids).unwrap();
                assert_eq!(ids, got.ids, "fast path, {context}");
                tokenizer.encode_ids(text, special, &mut ids).unwrap();
                assert_eq!(ids[got.len()..], got.ids, "cached, {context}");
            }
            assert_eq!(
                tokenizer.decode(&got.ids, true).unwrap(),
                case["decoded"].as_str().unwrap(),
                "{context}"
            );
            if let Some(expected) = case.get("decoded_with_special").and_then(Value::as_str) {
                assert_eq!(tokenizer.decode(&got.ids, false).unwrap(), expected, "{context}");
            }
        }
    }
}

#[test]
fn decodings() {
    let Some(folder) = fixtures() else { return };
    for name in NAMES {
        let tokenizer = Arc::new(Tokenizer::load(folder.join(name)).unwrap());
        for case in lines(&folder.join(name).join("decodings.jsonl")) {
            let ids = numbers(&case["ids"]);
            for (key, skip) in [("decoded", true), ("decoded_with_special", false)] {
                let expected = case[key].as_str().unwrap();
                assert_eq!(tokenizer.decode(&ids, skip).unwrap(), expected, "{name} {ids:?}");
                let mut stream = StreamDecoder::new(tokenizer.clone(), skip);
                let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
                streamed.extend(stream.finish());
                assert_eq!(streamed, expected, "{name} {ids:?} as a stream");
            }
        }
    }
}

fn direction(value: Option<&Value>) -> Direction {
    if value.and_then(Value::as_str) == Some("left") { Direction::Left } else { Direction::Right }
}

fn truncation(settings: &Value) -> Option<Truncation> {
    Some(Truncation {
        max_length: settings.get("max_length")?.as_u64()? as usize,
        stride: settings.get("stride").and_then(Value::as_u64).unwrap_or(0) as usize,
        direction: direction(settings.get("direction")),
        strategy: match settings.get("strategy").and_then(Value::as_str) {
            Some("only_first") => TruncationStrategy::OnlyFirst,
            Some("only_second") => TruncationStrategy::OnlySecond,
            _ => TruncationStrategy::LongestFirst,
        },
    })
}

fn compare(got: &Encoding, expected: &Value, context: &str) {
    assert_eq!(got.ids, numbers(&expected["ids"]), "{context}");
    assert_eq!(got.offsets, offsets(&expected["offsets"]), "{context}");
    for (key, column) in [
        ("type_ids", &got.type_ids),
        ("attention_mask", &got.attention_mask),
        ("special", &got.special_tokens_mask),
    ] {
        if let Some(values) = expected.get(key) {
            assert_eq!(column, &numbers(values), "{key}, {context}");
        }
    }
}

#[test]
fn padding_and_truncation() {
    let Some(folder) = fixtures() else { return };
    for name in NAMES {
        let plain = Tokenizer::load(folder.join(name)).unwrap();
        for case in lines(&folder.join(name).join("padding_truncation.jsonl")) {
            let settings = &case["settings"];
            let context = format!("{name} {settings}");
            let padding = settings.get("pad").map(|pad| {
                let pad_id = case["pad_id"].as_u64().unwrap() as u32;
                Padding {
                    strategy: pad
                        .as_u64()
                        .map_or(PaddingStrategy::BatchLongest, |n| PaddingStrategy::Fixed(n as usize)),
                    direction: direction(settings.get("pad_direction")),
                    pad_to_multiple_of: settings
                        .get("pad_to_multiple_of")
                        .and_then(Value::as_u64)
                        .map(|n| n as usize),
                    pad_id,
                    pad_type_id: 0,
                    pad_token: plain.id_to_token(pad_id).unwrap().into(),
                }
            });
            let tokenizer =
                plain.clone().with_truncation(truncation(settings)).unwrap().with_padding(padding);
            // What is set is saved and read back.
            let tokenizer = Tokenizer::from_json(&tokenizer.to_json().unwrap()).unwrap();
            let inputs: Vec<_> = case["inputs"].as_array().unwrap().iter().map(input).collect();
            let inputs: Vec<_> = inputs.iter().map(|(a, b)| (a.as_str(), b.as_deref())).collect();
            let got = tokenizer.encode_all(&inputs, true);
            if case.get("error").is_some_and(|e| !e.is_null()) {
                assert!(got.is_err(), "{context}");
                continue;
            }
            for (got, expected) in got.unwrap().iter().zip(case["outputs"].as_array().unwrap()) {
                compare(got, expected, &context);
                assert_eq!(
                    got.overflowing.len() as u64,
                    expected["n_overflowing"].as_u64().unwrap(),
                    "{context}"
                );
                for (part, expected) in
                    got.overflowing.iter().zip(expected["overflowing"].as_array().unwrap())
                {
                    compare(part, expected, &context);
                }
            }
        }
    }
}

#[test]
fn what_is_written_reads_back() {
    let Some(folder) = fixtures() else { return };
    for name in NAMES {
        let text = std::fs::read_to_string(folder.join(name).join("tokenizer.json")).unwrap();
        let written = Tokenizer::from_json(&text).unwrap().to_json().unwrap();
        let (a, b): (Value, Value) =
            (serde_json::from_str(&text).unwrap(), serde_json::from_str(&written).unwrap());
        assert!(a == b, "{name}");
    }
}
