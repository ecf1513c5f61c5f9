//! GGUF files made by hand, whole and damaged.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use proptest::prelude::*;
use pyrformer_files::{GgmlType, Gguf, GgufValue};

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A file of some metadata of each type, an F32 tensor [2, 3] and a Q8_0 tensor of 64 elements.
fn sample() -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    b.extend(3u32.to_le_bytes());
    b.extend(2u64.to_le_bytes());
    b.extend(6u64.to_le_bytes());
    let mut entry = |key: &str, kind: u32, value: &[u8]| {
        b.extend(string(key));
        b.extend(kind.to_le_bytes());
        b.extend(value);
    };
    entry("general.architecture", 8, &string("llama"));
    entry("a.count", 4, &7u32.to_le_bytes());
    entry("a.least", 5, &(-2i32).to_le_bytes());
    entry("a.rate", 6, &0.5f32.to_le_bytes());
    entry("a.on", 7, &[1]);
    let tokens = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("a"), &string("▁b")].concat();
    entry("tokens", 9, &tokens);
    for (name, dims, kind, offset) in [("x", vec![3u64, 2], 0u32, 0u64), ("q", vec![64], 8, 32)] {
        b.extend(string(name));
        b.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
        b.extend(kind.to_le_bytes());
        b.extend(offset.to_le_bytes());
    }
    b.resize(b.len().next_multiple_of(32), 0);
    (0..6).for_each(|i| b.extend((i as f32).to_le_bytes()));
    b.resize(b.len().next_multiple_of(32), 0);
    b.extend([5; 68]);
    b
}

fn open(bytes: &[u8]) -> pyrformer_files::Result<Gguf> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(path)
}

#[test]
fn metadata_and_tensors_come_back() {
    let file = open(&sample()).unwrap();
    let get = |key: &str| &file.metadata()[key];
    assert_eq!(file.version(), 3);
    assert_eq!(get("general.architecture").as_str(), Some("llama"));
    assert_eq!(get("a.count").as_u64(), Some(7));
    assert_eq!(get("a.least").as_i64(), Some(-2));
    assert_eq!(get("a.least").as_u64(), None);
    assert_eq!(get("a.rate"), &GgufValue::F64(0.5));
    assert_eq!(get("a.on").as_bool(), Some(true));
    assert_eq!(get("tokens").as_strings(), Some(&["a".to_owned(), "▁b".to_owned()][..]));
    assert_eq!(file.tensors()["x"].dims, [3, 2]);
    assert_eq!(file.tensors()["q"].dtype.name(), Some("Q8_0"));
    assert_eq!(GgmlType(8).block(), Some((32, 34)));
    assert_eq!(file.data("x").unwrap()[4..8], 1f32.to_le_bytes());
    assert_eq!(file.data("q").unwrap(), [5; 68]);
    assert!(file.data("y").unwrap_err().to_string().contains("'y'"));
}

#[test]
fn every_shorter_file_is_refused() {
    let whole = sample();
    for n in 0..whole.len() {
        let error = open(&whole[..n]).unwrap_err().to_string();
        assert!(error.contains("m.gguf") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn lengths_that_lie_cost_nothing() {
    let mut bytes = sample();
    // The length of the first key, then the number of entries.
    for at in [24, 16, 8] {
        let mut lie = bytes.clone();
        lie[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(open(&lie).is_err());
    }
    bytes[4] = 9;
    assert!(open(&bytes).unwrap_err().to_string().contains("version 9"));
}

#[test]
fn an_axis_without_elements_is_refused() {
    let mut bytes = sample();
    let entry = [&string("x")[..], &2u32.to_le_bytes()].concat();
    let at = bytes.windows(entry.len()).position(|w| w == entry).unwrap() + entry.len();
    bytes[at..at + 8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    bytes[at + 8..at + 16].copy_from_slice(&0u64.to_le_bytes());
    assert!(open(&bytes).unwrap_err().to_string().contains("no element"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damage_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = sample();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(file) = open(&bytes) {
            for name in file.tensors().keys() {
                let _ = file.data(name);
            }
        }
    }
}
