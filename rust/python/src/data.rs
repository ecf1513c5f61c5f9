//! Reading, cleaning, and batches for training.

use std::path::PathBuf;

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use pyrformer_data::{CausalOptions, DecodeErrors, Form, MaskedOptions, ReadOptions, Rejected, Spans, Step};

use crate::enter::{Failure, enter};

impl From<pyrformer_data::Error> for Failure {
    fn from(e: pyrformer_data::Error) -> Self {
        Self::new("DataError", e)
    }
}

/// A cleaning step, documents changed, documents dropped, characters removed.
type Cleaned = (String, u64, u64, i64);

/// The documents of files, a few at a time.
#[pyclass(module = "pyrformer._core")]
pub(crate) struct Documents {
    inner: pyrformer_data::Documents,
    /// Go on after what cannot be read.
    lenient: bool,
    /// What could not be read, and why, since it was last asked for.
    rejected: Vec<(String, String)>,
    /// An error that came after documents: it is raised by the next call.
    failed: Option<pyrformer_data::Error>,
}

#[pymethods]
impl Documents {
    #[new]
    #[pyo3(signature = (paths, column, replace_errors, lenient, rows = false))]
    fn new(
        paths: Vec<PathBuf>,
        column: String,
        replace_errors: bool,
        lenient: bool,
        rows: bool,
    ) -> PyResult<Self> {
        let errors = if replace_errors { DecodeErrors::Replace } else { DecodeErrors::Strict };
        let form = if rows { Form::Rows } else { Form::Documents };
        let inner = pyrformer_data::Documents::new(paths, ReadOptions { column, errors, form });
        Ok(Self { inner: inner.map_err(Failure::from)?, lenient, rejected: Vec::new(), failed: None })
    }

    /// Documents of about `size` bytes together, or rows as JSON objects; `None` at the end.
    fn read(&mut self, py: Python<'_>, size: usize) -> PyResult<Option<Vec<String>>> {
        enter(py, || {
            let (mut documents, mut bytes, mut ended) = (Vec::new(), 0, false);
            while bytes < size && self.failed.is_none() && !ended {
                match self.inner.next() {
                    Some(Ok(document)) => {
                        // A document of no bytes costs memory, too.
                        bytes += document.len() + 1;
                        documents.push(document);
                    }
                    Some(Err(rejected)) if self.lenient && !rejected.is_final() => {
                        let Rejected { error, raw, .. } = rejected;
                        bytes += raw.len() + 1;
                        self.rejected.push((error.to_string(), raw));
                    }
                    Some(Err(rejected)) => self.failed = Some(rejected.error),
                    None => ended = true,
                }
            }
            match self.failed.take_if(|_| documents.is_empty()) {
                Some(error) => Err(error),
                None => Ok((bytes > 0).then_some(documents)),
            }
        })
    }

    /// Bytes read from the files so far, as they are on the disk.
    #[getter]
    fn bytes_read(&self) -> u64 {
        self.inner.bytes_read()
    }

    /// What could not be read since the last call: why, and the line or record (empty for a file).
    fn rejected(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.rejected)
    }
}

/// Bytes as a frame of zstd.
#[pyfunction]
pub(crate) fn zstd_frame<'py>(py: Python<'py>, content: &[u8]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &py.detach(|| pyrformer_data::zstd_frame(content)))
}

/// Named cleaning steps and the counts of what they did.
#[pyclass(module = "pyrformer._core")]
pub(crate) struct Cleaner {
    inner: pyrformer_data::Cleaner,
}

#[pymethods]
impl Cleaner {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn new(steps: Vec<String>) -> PyResult<Self> {
        let steps: Vec<Step> =
            steps.iter().map(|s| s.parse()).collect::<Result<_, _>>().map_err(Failure::from)?;
        Ok(Self { inner: pyrformer_data::Cleaner::new(&steps) })
    }

    /// The documents after all steps, without those that a step drops.
    fn clean(&mut self, py: Python<'_>, documents: Vec<String>) -> Vec<String> {
        py.detach(|| documents.into_iter().filter_map(|d| self.inner.clean(d)).collect())
    }

    /// Per step: its name, documents changed, documents dropped, characters removed.
    fn report(&self) -> Vec<Cleaned> {
        let row = |r: &pyrformer_data::StepReport| {
            (r.step.to_string(), r.documents_changed, r.documents_dropped, r.characters_removed)
        };
        self.inner.reports().iter().map(row).collect()
    }
}

/// Offsets as Rust counts them.
fn starts(offsets: &PyReadonlyArray1<'_, i64>) -> Result<Vec<u64>, Failure> {
    let offsets = offsets.as_slice().map_err(|_| gaps())?;
    offsets.iter().map(|&o| u64::try_from(o).map_err(|_| gaps())).collect()
}

fn gaps() -> Failure {
    Failure::new("InputError", "[data] ids and offsets must be C-contiguous, offsets not negative")
}

/// Token ids of documents: in memory, or mapped from prepared shards.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Corpus {
    inner: pyrformer_data::Corpus,
}

#[pymethods]
impl Corpus {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn new(ids: PyReadonlyArray1<'_, u32>, offsets: PyReadonlyArray1<'_, i64>) -> PyResult<Self> {
        let starts = starts(&offsets)?;
        let ids = ids.as_slice().map_err(|_| gaps())?;
        let inner = pyrformer_data::Corpus::held(ids.into(), starts.into()).map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// Shards one after another, memory-mapped.
    #[staticmethod]
    fn open(py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<Self> {
        Ok(Self { inner: enter(py, || pyrformer_data::Corpus::open(&paths))? })
    }

    /// The corpora of what is not held out and of what is.
    fn split(&self, held_out: f64) -> (Self, Self) {
        let (inner, rest) = self.inner.split(held_out);
        (Self { inner }, Self { inner: rest })
    }

    /// The number of tokens.
    #[getter]
    fn tokens(&self) -> usize {
        self.inner.len()
    }

    /// The number of documents.
    #[getter]
    fn documents(&self) -> usize {
        self.inner.documents().len().saturating_sub(1)
    }

    /// The number of a document in the corpus that this one was split from.
    fn number(&self, document: usize) -> usize {
        self.inner.number(document)
    }

    /// The ids of document `index`.
    fn document<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let Some(&[start, end]) = self.inner.documents().get(index..).and_then(|d| d.first_chunk()) else {
            let count = self.documents();
            let text = format!("[data] there is no document {index}; the corpus has {count}");
            return Err(Failure::new("InputError", text).into());
        };
        Ok(PyArray1::from_slice(py, &self.inner.ids(start as usize..end as usize)))
    }
}

/// Writes a shard of prepared tokens; it appears whole or not at all.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
pub(crate) fn write_shard(
    py: Python<'_>,
    path: PathBuf,
    ids: PyReadonlyArray1<'_, u32>,
    offsets: PyReadonlyArray1<'_, i64>,
    vocab_size: usize,
) -> PyResult<()> {
    let starts = starts(&offsets)?;
    let ids = ids.as_slice().map_err(|_| gaps())?;
    enter(py, || pyrformer_data::write_shard(&path, ids, &starts, vocab_size))
}

fn put(dict: &Bound<'_, PyDict>, name: &str, items: Vec<i32>, cols: Option<usize>) -> PyResult<()> {
    let flat = PyArray1::from_vec(dict.py(), items);
    match cols {
        Some(cols) => {
            let rows = flat.len()? / cols.max(1);
            dict.set_item(name, flat.reshape([rows, cols])?)
        }
        None => dict.set_item(name, flat),
    }
}

/// Packed rows for next-token prediction.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct CausalBatches {
    inner: pyrformer_data::CausalBatches,
}

#[pymethods]
impl CausalBatches {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn new(
        corpus: PyRef<'_, Corpus>,
        seq_len: usize,
        batch_size: usize,
        seed: u64,
        shuffle: bool,
        separate_documents: bool,
    ) -> PyResult<Self> {
        let options = CausalOptions { seq_len, batch_size, seed, shuffle, separate_documents };
        let inner =
            pyrformer_data::CausalBatches::new(corpus.inner.clone(), options).map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// Batches that visit every block once.
    #[getter]
    fn batches_per_pass(&self) -> u64 {
        self.inner.batches_per_pass()
    }

    /// How many of the first batches a longer corpus that begins with this one would leave as they are.
    #[getter]
    fn settled_steps(&self) -> u64 {
        self.inner.settled_steps()
    }

    /// The numbers of the documents in each row of batch `step`.
    fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        self.inner.documents(step)
    }

    /// Batch `step` as arrays, and its number of labels.
    fn batch<'py>(&self, py: Python<'py>, step: u64) -> PyResult<(Bound<'py, PyDict>, usize)> {
        let b = py.detach(|| self.inner.batch(step));
        let dict = PyDict::new(py);
        let cols = Some(b.seq_len);
        put(&dict, "input_ids", b.input_ids, cols)?;
        put(&dict, "labels", b.labels, cols)?;
        put(&dict, "position_ids", b.position_ids, cols)?;
        if let Some(segments) = b.segment_ids {
            put(&dict, "segments", segments, cols)?;
        }
        Ok((dict, b.labels_count))
    }
}

/// Padded rows with masked tokens.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct MaskedBatches {
    inner: pyrformer_data::MaskedBatches,
}

#[pymethods]
impl MaskedBatches {
    /// `special` are the ids of [CLS], [SEP], [PAD], [MASK]; `continues[id]` says whether a token continues a word, for
    /// whole-word masking; `spans` are p and the greatest length of masked spans.
    #[new]
    #[pyo3(signature = (corpus, max_length, batch_size, seed, shuffle, vocab_size, special, mlm_probability,
        mask_rate, random_rate, continues=None, spans=None, pad_to_multiple_of=8))]
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn new(
        corpus: PyRef<'_, Corpus>,
        max_length: usize,
        batch_size: usize,
        seed: u64,
        shuffle: bool,
        vocab_size: usize,
        special: [u32; 4],
        mlm_probability: f64,
        mask_rate: f64,
        random_rate: f64,
        continues: Option<Vec<bool>>,
        spans: Option<(f64, usize)>,
        pad_to_multiple_of: usize,
    ) -> PyResult<Self> {
        let mut options = MaskedOptions::new(batch_size, max_length, vocab_size, special);
        (options.seed, options.shuffle) = (seed, shuffle);
        (options.mlm_probability, options.mask_rate, options.random_rate) =
            (mlm_probability, mask_rate, random_rate);
        options.whole_word = continues.map(Into::into);
        options.spans = spans.map(|(p, max_length)| Spans { p, max_length });
        options.pad_to_multiple_of = pad_to_multiple_of;
        let inner =
            pyrformer_data::MaskedBatches::new(corpus.inner.clone(), options).map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// Batches that visit every piece once.
    #[getter]
    fn batches_per_pass(&self) -> u64 {
        self.inner.batches_per_pass()
    }

    /// How many of the first batches a longer corpus that begins with this one would leave as they are.
    #[getter]
    fn settled_steps(&self) -> u64 {
        self.inner.settled_steps()
    }

    /// The numbers of the documents in each row of batch `step`.
    fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        self.inner.documents(step)
    }

    /// Batch `step` as arrays, and its number of labels.
    fn batch<'py>(&self, py: Python<'py>, step: u64) -> PyResult<(Bound<'py, PyDict>, usize)> {
        let b = py.detach(|| self.inner.batch(step));
        let dict = PyDict::new(py);
        let cols = Some(b.seq_len);
        put(&dict, "input_ids", b.input_ids, cols)?;
        put(&dict, "attention_mask", b.attention_mask, cols)?;
        put(&dict, "token_type_ids", b.token_type_ids, cols)?;
        put(&dict, "labels", b.labels, cols)?;
        put(&dict, "positions", b.positions, None)?;
        put(&dict, "masked_labels", b.masked_labels, None)?;
        Ok((dict, b.labels_count))
    }
}
