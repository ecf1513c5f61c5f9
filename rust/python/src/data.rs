//! Reading, cleaning, and batches for training.

use std::path::PathBuf;

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use pyrformer_data::{
    CausalOptions, DecodeErrors, Form, MaskedBatch, MaskedOptions, PermutedOptions, ReadOptions, Rejected,
    Spans, Step, Words,
};

use crate::enter::{Failure, enter};
use crate::text::Tokenizer;

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
        prefix: bool,
    ) -> PyResult<Self> {
        let options = CausalOptions { seq_len, batch_size, seed, shuffle, separate_documents, prefix };
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
        if let Some(prefix) = b.prefix {
            put(&dict, "prefix", prefix, None)?;
        }
        Ok((dict, b.labels_count))
    }
}

/// How rows are masked, from a dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Masked {
    max_length: usize,
    batch_size: usize,
    seed: u64,
    shuffle: bool,
    vocab_size: usize,
    /// Ids of [CLS], [SEP], [PAD], [MASK].
    special: [u32; 4],
    /// Share of chosen tokens, and of those, of [MASK] and of random tokens.
    rates: (f64, f64, f64),
    /// For whole words: whose words they are.
    words: Option<Py<Tokenizer>>,
    /// p and the greatest length of masked spans.
    spans: Option<(f64, usize)>,
    pad_to_multiple_of: usize,
}

impl From<Masked> for MaskedOptions {
    fn from(m: Masked) -> Self {
        let mut options = Self::new(m.batch_size, m.max_length, m.vocab_size, m.special);
        (options.seed, options.shuffle) = (m.seed, m.shuffle);
        (options.mlm_probability, options.mask_rate, options.random_rate) = m.rates;
        options.whole_word = m.words.map(|tokenizer| {
            let tokenizer = tokenizer.get().inner.clone();
            Words::new(move |ids| tokenizer.begins_word(ids))
        });
        options.spans = m.spans.map(|(p, max_length)| Spans { p, max_length });
        options.pad_to_multiple_of = m.pad_to_multiple_of;
        options
    }
}

fn masked_arrays<'py>(py: Python<'py>, b: MaskedBatch) -> PyResult<(Bound<'py, PyDict>, usize)> {
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

/// Padded rows with masked tokens.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct MaskedBatches {
    inner: pyrformer_data::MaskedBatches,
}

#[pymethods]
impl MaskedBatches {
    #[new]
    fn new(corpus: PyRef<'_, Corpus>, options: Masked) -> PyResult<Self> {
        let inner = pyrformer_data::MaskedBatches::new(corpus.inner.clone(), options.into());
        Ok(Self { inner: inner.map_err(Failure::from)? })
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
        masked_arrays(py, py.detach(|| self.inner.batch(step)))
    }
}

/// Rows of two texts with masked tokens; the second one follows the first, or does not.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct PairBatches {
    inner: pyrformer_data::PairBatches,
}

#[pymethods]
impl PairBatches {
    /// `corpus` holds sentences; `bounds` are the numbers of the first one of each document, and of all.
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn new(corpus: PyRef<'_, Corpus>, bounds: PyReadonlyArray1<'_, i64>, options: Masked) -> PyResult<Self> {
        let inner = pyrformer_data::PairBatches::new(corpus.inner.clone(), &starts(&bounds)?, options.into());
        Ok(Self { inner: inner.map_err(Failure::from)? })
    }

    /// Batches that visit every run of sentences once.
    #[getter]
    fn batches_per_pass(&self) -> u64 {
        self.inner.batches_per_pass()
    }

    /// None: second texts come from anywhere in the corpus.
    #[getter]
    fn settled_steps(&self) -> u64 {
        0
    }

    /// The numbers of the documents that the rows of batch `step` begin in.
    fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        self.inner.documents(step)
    }

    /// Batch `step` as arrays, and its number of labels.
    fn batch<'py>(&self, py: Python<'py>, step: u64) -> PyResult<(Bound<'py, PyDict>, usize)> {
        let b = py.detach(|| self.inner.batch(step));
        let (dict, count) = masked_arrays(py, b.rows)?;
        put(&dict, "next_sentence_label", b.sentence_labels, None)?;
        Ok((dict, count))
    }
}

/// Packed rows, some tokens of which are predicted in a random order.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct PermutedBatches {
    inner: pyrformer_data::PermutedBatches,
}

#[pymethods]
impl PermutedBatches {
    #[new]
    fn new(
        corpus: PyRef<'_, Corpus>,
        seq_len: usize,
        batch_size: usize,
        seed: u64,
        shuffle: bool,
        plm_probability: f64,
        max_span_length: usize,
    ) -> PyResult<Self> {
        let (separate_documents, prefix) = (false, false);
        let rows = CausalOptions { seq_len, batch_size, seed, shuffle, separate_documents, prefix };
        let options = PermutedOptions { rows, plm_probability, max_span_length };
        let inner = pyrformer_data::PermutedBatches::new(corpus.inner.clone(), options);
        Ok(Self { inner: inner.map_err(Failure::from)? })
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
        let (dict, cols) = (PyDict::new(py), Some(b.seq_len));
        put(&dict, "input_ids", b.input_ids, cols)?;
        let rows = b.perm_mask.len() / b.seq_len.pow(2).max(1);
        let hidden = PyArray1::from_vec(py, b.perm_mask);
        dict.set_item("perm_mask", hidden.reshape([rows, b.seq_len, b.seq_len])?)?;
        put(&dict, "targets", b.targets, Some(b.targets_len))?;
        put(&dict, "labels", b.labels, Some(b.targets_len))?;
        Ok((dict, b.labels_count))
    }
}
