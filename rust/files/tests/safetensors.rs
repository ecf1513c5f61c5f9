//! The reader against damage, the writer against the reader, both against files of the reference implementation.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use pyrformer_files::{DType, Error, MAX_HEADER_BYTES, SafeTensors, TensorView, write_safetensors};

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<SafeTensors, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    SafeTensors::open(path)
}

fn view<'a>(dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
    TensorView { dtype, shape: Cow::Borrowed(shape), bytes: Cow::Borrowed(bytes) }
}

#[test]
fn each_defect_has_its_message() {
    let entry = |rest: &str| format!(r#"{{"a":{{{rest}}}}}"#);
    let good = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "truncated"),
        (vec![1, 0, 0, 0, 0, 0, 0], "truncated"),
        (9u64.to_le_bytes().to_vec(), "header says 17 bytes, file has 8"),
        ((MAX_HEADER_BYTES + 1).to_le_bytes().to_vec(), "beyond the limit"),
        (u64::MAX.to_le_bytes().to_vec(), "beyond the limit"),
        (file("", b""), "does not begin with '{'"),
        (file(" {}", b""), "does not begin with '{'"),
        (file("[1]", b""), "does not begin with '{'"),
        (file("{\"a\":", b""), "not the JSON table"),
        (file("{}x", b""), "not the JSON table"),
        (file("{\"\u{fffd}", b""), "not the JSON table"),
        (file("{}", b"1"), "header says 10 bytes, file has 11"),
        (file(&entry(good), &[0; 7]), "truncated: header says 70 bytes, file has 69"),
        (file(&entry(good), &[0; 9]), "header says 70 bytes, file has 71"),
        (file(&entry(&good.replace("F32", "Q4")), &[0; 8]), "dtype 'Q4' is not known"),
        (file(&entry(&good.replace("[2]", "[3]")), &[0; 8]), "takes 12 bytes, its offsets span 8"),
        (file(&entry(&good.replace("[2]", "[-2]")), &[0; 8]), "needs dtype, shape and data_offsets"),
        (file(&entry(&good.replace("[2]", "[4294967296,4294967296]")), &[0; 8]), "more elements than memory"),
        (file(&entry(&good.replace("[0,8]", "[8,0]")), &[0; 8]), "ends before it begins"),
        (file(&entry(&good.replace("[0,8]", "[0,18446744073709551615]")), &[0; 8]), "truncated"),
        (file(&entry(&good.replace("[0,8]", "[0,8,9]")), &[0; 8]), "needs dtype"),
        (file(&entry(&good.replace("\"dtype\"", "\"type\"")), &[0; 8]), "needs dtype"),
        (file(&entry(&format!(r#"{good},"dtype":"F32""#)), &[0; 8]), "duplicate field"),
        (file(&entry(&good.replace("[0,8]", "[4,12]")), &[0; 12]), "leaves a hole after the header"),
        (file(&format!(r#"{{"a":{{{good}}},"a":{{{good}}}}}"#), &[0; 8]), "'a': it occurs twice"),
        (file(&format!(r#"{{"a":{{{good}}},"b":{{{good}}}}}"#), &[0; 8]), "'b': its data overlaps a"),
        (
            file(&format!(r#"{{"a":{{{good}}},"b":{{{}}}}}"#, good.replace("[0,8]", "[12,20]")), &[0; 20]),
            "'b': its data leaves a hole after a",
        ),
        (file(r#"{"__metadata__":{"n":1}}"#, b""), "must map strings to strings"),
        (file(r#"{"__metadata__":{},"__metadata__":{}}"#, b""), "__metadata__ occurs twice"),
    ];
    for (bytes, expected) in cases {
        let message = open_bytes(&bytes).expect_err(expected).to_string();
        assert!(message.contains(expected), "expected '{expected}' in: {message}");
        assert!(message.contains("x.safetensors"), "the file is not named: {message}");
    }
}

#[test]
fn what_is_no_file_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    assert!(SafeTensors::open(directory.path()).unwrap_err().to_string().contains("not a regular file"));
    assert!(matches!(SafeTensors::open(directory.path().join("absent")), Err(Error::Io { .. })));
}

#[test]
fn odd_but_valid_files_open() {
    assert_eq!(open_bytes(&file("{}", b"")).unwrap().names().len(), 0);
    assert_eq!(open_bytes(&file("{}   ", b"")).unwrap().names().len(), 0);
    let header = r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "e":{"dtype":"F16","shape":[0,5],"data_offsets":[4,4]},"é":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}"#;
    let tensors = open_bytes(&file(header, &[0, 0, 128, 63, 7])).unwrap();
    assert_eq!(tensors.names().collect::<Vec<_>>(), ["e", "s", "é"]);
    assert_eq!(tensors.get("s").unwrap().to_f32().unwrap(), [1.0]);
    assert_eq!(tensors.get("e").unwrap().to_f32().unwrap(), [0f32; 0]);
    assert_eq!(tensors.get("é").unwrap().bytes.as_ref(), [7]);
    assert!(tensors.get("é").unwrap().to_f32().is_none());
    assert!(tensors.get("none").is_none());
}

#[test]
fn the_writer_lays_out_as_the_reference_does() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let tensors = [
        ("z\"\n", view(DType::U8, &[3], &[1, 2, 3])),
        ("b", view(DType::F32, &[1], &[0; 4])),
        ("a", view(DType::F32, &[1, 1], &[1; 4])),
        ("c", view(DType::I64, &[], &[0; 8])),
    ];
    write_safetensors(&path, &tensors, DType::F32).unwrap();
    let bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(header % 8, 0);
    let json = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
    let order: Vec<_> =
        ["\"c\"", "\"a\"", "\"b\"", "\"z\\\"\\n\""].iter().map(|n| json.find(n).unwrap()).collect();
    assert!(order.is_sorted(), "{json}");
    let back = SafeTensors::open(&path).unwrap();
    assert_eq!(back.metadata().get("format").map(String::as_str), Some("pt"));
    for (name, tensor) in &tensors {
        assert_eq!(back.get(name).as_ref(), Some(tensor));
    }
    for bad in [
        vec![("a", view(DType::F32, &[2], &[0; 4]))],
        vec![("__metadata__", view(DType::U8, &[1], &[0]))],
        vec![("a", view(DType::U8, &[1], &[0])), ("a", view(DType::U8, &[1], &[0]))],
    ] {
        assert!(matches!(write_safetensors(&path, &bad, DType::F32), Err(Error::Tensor { .. })));
    }
    assert_eq!(fs::read(&path).unwrap(), bytes, "a refused write must not touch the file");
}

#[test]
fn floats_are_stored_as_asked_and_converted_on_the_way_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    // More than a piece, so that pieces meet.
    let values: Vec<f32> = (0..70_001).map(|i| (i as f32 - 35_000.0) * 1.37).collect();
    let shape = [values.len()];
    let whole = TensorView::from_f32(DType::F32, &shape, &values).unwrap();
    let tensors = [("x", whole), ("n", view(DType::U8, &[1], &[7]))];
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        write_safetensors(&path, &tensors, dtype).unwrap();
        let back = SafeTensors::open(&path).unwrap();
        let x = back.get("x").unwrap();
        assert_eq!(x, TensorView::from_f32(dtype, &shape, &values).unwrap());
        assert_eq!(back.get("n").unwrap(), tensors[1].1);
        for (wanted, size) in [(DType::F32, 4), (DType::F64, 8)] {
            let mut bytes = vec![0; values.len() * size];
            x.copy_to(wanted, &mut bytes).unwrap();
            let narrow = x.to_f32().unwrap();
            let same = match wanted {
                DType::F32 => narrow.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>(),
                _ => narrow.iter().flat_map(|&v| f64::from(v).to_ne_bytes()).collect(),
            };
            assert_eq!(bytes, same);
            assert!(x.copy_to(wanted, &mut bytes[size..]).is_none());
            assert!(x.copy_to(DType::I32, &mut bytes[..4 * values.len()]).is_none());
        }
    }
    assert!(matches!(write_safetensors(&path, &tensors, DType::U8), Err(Error::Format { .. })));
}

#[test]
fn what_would_become_infinite_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let largest_bf16 = f32::from_bits(0x7F7F_0000);
    for (dtype, fits, not) in [
        (DType::F16, 65_519.996, 65_520.0),
        (DType::BF16, f32::from_bits(0x7F7F_7FFF), f32::from_bits(0x7F7F_8000)),
    ] {
        for sign in [1.0, -1.0] {
            let good = [sign * fits, f32::INFINITY, f32::NAN, 0.0];
            let good = TensorView::from_f32(DType::F32, &[4], &good).unwrap();
            write_safetensors(&path, &[("w", good)], dtype).unwrap();
            let back = SafeTensors::open(&path).unwrap().get("w").unwrap().to_f32().unwrap();
            assert_eq!(back[0], sign * if dtype == DType::F16 { 65504.0 } else { largest_bf16 });
            let bad = [1.0, sign * not];
            let bad = TensorView::from_f32(DType::F32, &[2], &bad).unwrap();
            let error = write_safetensors(&path, &[("w", bad)], dtype).unwrap_err().to_string();
            assert!(error.contains("'w'") && error.contains("element 1"), "{error}");
        }
    }
}

fn write_model(directory: &Path, file: &str, names: &[&str]) {
    let tensors: Vec<_> = names.iter().map(|n| (*n, view(DType::U8, &[1], &n.as_bytes()[..1]))).collect();
    write_safetensors(directory.join(file), &tensors, DType::F32).unwrap();
}

fn write_index(directory: &Path, pairs: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
    let text = serde_json::json!({"metadata": {"total_size": 2}, "weight_map": map}).to_string();
    fs::write(directory.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn shards_merge_and_defects_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let d = directory.path();
    let message = |d: &Path| SafeTensors::open_dir(d).unwrap_err().to_string();
    assert!(message(d).contains("neither model.safetensors nor"));
    fs::write(d.join("pytorch_model.bin"), b"").unwrap();
    assert!(message(d).contains("pickle"));
    assert!(message(&d.join("absent")).contains("absent"));

    write_model(d, "s1.safetensors", &["a"]);
    write_model(d, "s2.safetensors", &["b", "c"]);
    write_index(d, &[("a", "s1.safetensors"), ("b", "s2.safetensors")]);
    let all = SafeTensors::open_dir(d).unwrap();
    assert_eq!(all.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(all.get("b").unwrap().bytes.as_ref(), b"b");
    assert_eq!(all.file_of("c"), Some(d.join("s2.safetensors").as_path()));

    for escape in ["../s1.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "C:x"] {
        write_index(d, &[("a", escape)]);
        assert!(message(d).contains("only plain names"), "{escape}");
    }
    write_index(d, &[("a", "s3.safetensors")]);
    assert!(message(d).contains("s3.safetensors"));
    write_index(d, &[("b", "s1.safetensors")]);
    assert!(message(d).contains("'b': the index places it in 's1.safetensors', which does not hold it"));
    write_model(d, "s3.safetensors", &["b"]);
    write_index(d, &[("a", "s2.safetensors"), ("b", "s3.safetensors")]);
    assert!(message(d).contains("it is also in"));
    fs::write(d.join("model.safetensors.index.json"), "{}").unwrap();
    assert!(message(d).contains("weight_map"));

    write_model(d, "model.safetensors", &["whole"]);
    assert_eq!(SafeTensors::open_dir(d).unwrap().names().collect::<Vec<_>>(), ["whole"]);
}

fn fixtures() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures");
    if !path.is_dir() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn reference_files_open() {
    let Some(root) = fixtures() else { return };
    let mut opened = 0;
    for group in ["models", "layouts"] {
        for directory in fs::read_dir(root.join(group)).unwrap().map(|e| e.unwrap().path()) {
            let tensors = SafeTensors::open_dir(&directory).unwrap();
            assert!(tensors.names().len() > 5, "{}", directory.display());
            for name in tensors.names() {
                let values = tensors.get(name).unwrap().to_f32().unwrap_or_default();
                assert!(values.iter().all(|x| !x.is_nan()), "{name}");
            }
            let files = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().path());
            for path in files.filter(|p| p.extension().is_some_and(|x| x == "safetensors")) {
                SafeTensors::open(&path).unwrap();
                opened += 1;
            }
        }
    }
    assert!(opened > 40, "{opened}");
}

#[test]
fn a_reference_file_is_reproduced_byte_for_byte() {
    let Some(root) = fixtures() else { return };
    let source = root.join("models/gpt2/model.safetensors");
    let tensors = SafeTensors::open(&source).unwrap();
    let views: Vec<_> = tensors.names().map(|n| (n, tensors.get(n).unwrap())).collect();
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("copy.safetensors");
    write_safetensors(&copy, &views, DType::F32).unwrap();
    let (source, copy) = (fs::read(source).unwrap(), fs::read(copy).unwrap());
    let header = |b: &[u8]| String::from_utf8_lossy(&b[..300]).into_owned();
    assert!(source == copy, "{} / {}", header(&source), header(&copy));
}

const DTYPES: [DType; 6] = [DType::U8, DType::BF16, DType::F16, DType::F32, DType::F64, DType::I64];

fn tensors() -> impl Strategy<Value = Vec<(String, DType, Vec<usize>, Vec<u8>)>> {
    let tensor = (
        "\\PC{0,12}",
        prop::sample::select(&DTYPES[..]),
        prop::collection::vec(0usize..4, 0..4),
        any::<u64>(),
    );
    prop::collection::vec(tensor, 0..6).prop_map(|list| {
        let unique: std::collections::BTreeMap<_, _> =
            list.into_iter().map(|(name, dtype, shape, seed)| (name, (dtype, shape, seed))).collect();
        let fill = |n: usize, seed: u64| (0..n).map(|i| (seed.rotate_left(i as u32) >> 3) as u8).collect();
        unique
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, (dtype, shape, seed))| {
                let bytes = fill(shape.iter().product::<usize>() * dtype.size(), seed);
                (name, dtype, shape, bytes)
            })
            .collect()
    })
}

fn written(list: &[(String, DType, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.safetensors");
    let views: Vec<_> = list.iter().map(|(n, d, s, b)| (n.as_str(), view(*d, s, b))).collect();
    write_safetensors(&path, &views, DType::F32).unwrap();
    fs::read(&path).unwrap()
}

/// Touches everything a reader offers; only a panic is a failure.
fn exercise(bytes: &[u8]) -> Result<(), Error> {
    let tensors = open_bytes(bytes)?;
    for name in tensors.names() {
        let tensor = tensors.get(name).unwrap();
        assert_eq!(tensor.bytes.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.size());
        let _ = tensor.to_f32();
    }
    Ok(())
}

proptest! {
    #[test]
    fn round_trip(list in tensors()) {
        let back = open_bytes(&written(&list)).unwrap();
        prop_assert_eq!(back.names().len(), list.len());
        for (name, dtype, shape, bytes) in &list {
            prop_assert_eq!(back.get(name).unwrap(), view(*dtype, shape, bytes));
        }
    }

    #[test]
    fn any_truncation_is_an_error(list in tensors(), cut in any::<prop::sample::Index>()) {
        let bytes = written(&list);
        prop_assert!(exercise(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn anything_appended_is_an_error(list in tensors(), more in prop::collection::vec(any::<u8>(), 1..20)) {
        let mut bytes = written(&list);
        bytes.extend(more);
        prop_assert!(exercise(&bytes).is_err());
    }

    #[test]
    fn corruption_never_panics(list in tensors(), hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = written(&list);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in hits {
            bytes[at.index(8 + header)] = value;
        }
        let _ = exercise(&bytes);
    }

    #[test]
    fn digit_corruption_never_panics(list in tensors(), hits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..6)) {
        // Changed digits keep the JSON valid, so they reach the checks behind it.
        let mut bytes = written(&list);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let digits: Vec<_> = (8..8 + header).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (at, value) in hits {
            if !digits.is_empty() {
                bytes[digits[at.index(digits.len())]] = value;
            }
        }
        let _ = exercise(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = exercise(&bytes);
        let _ = exercise(&file(&String::from_utf8_lossy(&bytes), &bytes));
    }

    #[test]
    fn float32_survives_every_wide_enough_type(values in prop::collection::vec(any::<f32>(), 0..20)) {
        for dtype in [DType::F32, DType::F64] {
            let shape = [values.len()];
            let tensor = TensorView::from_f32(dtype, &shape, &values).unwrap();
            let back = tensor.to_f32().unwrap();
            prop_assert!(back.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()));
        }
    }
}
