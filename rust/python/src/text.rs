//! Tokenizers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use pyrformer_text::{Preset, Progress, TrainOptions};

use crate::enter::{Failure, enter};

impl From<pyrformer_text::Error> for Failure {
    fn from(e: pyrformer_text::Error) -> Self {
        use pyrformer_text::Error as E;
        let class = match e {
            E::Io { .. } | E::File(_) => "FileError",
            _ => "TokenizerError",
        };
        Self::new(class, e)
    }
}

/// Text to ids and back.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Tokenizer {
    pub(crate) inner: Arc<pyrformer_text::Tokenizer>,
}

/// An id that may be one: a whole number, of Python or numpy, whatever its size.
struct Id(u32);

impl<'py> FromPyObject<'_, 'py> for Id {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        object.extract().map(Self).map_err(|_| {
            let id = object.repr().map_or_else(|_| "it".to_owned(), |r| r.to_string());
            Failure::new("TokenizerError", format!("[decode] id {id} is no token's")).into()
        })
    }
}

impl Id {
    fn all(ids: &[Self]) -> Vec<u32> {
        ids.iter().map(|id| id.0).collect()
    }
}

/// Flat ids uint32 and offsets int64.
type Ragged<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>);

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf, split: Option<&str>) -> PyResult<Self> {
        Ok(Self { inner: Arc::new(enter(py, || pyrformer_text::Tokenizer::load_split(&path, split))?) })
    }

    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        Ok(Self { inner: Arc::new(enter(py, || pyrformer_text::Tokenizer::from_json(text))?) })
    }

    fn to_json(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || self.inner.to_json())
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        enter(py, || self.inner.save(&path))
    }

    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    /// Why the pipeline runs on the `tokenizers` library, if it does.
    #[getter]
    fn fallback(&self) -> Option<&str> {
        self.inner.fallback()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn id_to_token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?).map(str::to_owned)
    }

    fn is_special(&self, id: i64) -> bool {
        u32::try_from(id).is_ok_and(|id| self.inner.is_special(id))
    }

    /// For each id of a sequence, whether a word begins with it.
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn begins_word<'py>(&self, py: Python<'py>, ids: Vec<Id>) -> Bound<'py, PyArray1<bool>> {
        let ids = Id::all(&ids);
        PyArray1::from_vec(py, py.detach(|| self.inner.begins_word(&ids)))
    }

    /// Role → id, for the roles that are filled.
    fn special_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let ids = self.inner.special_ids();
        let dict = PyDict::new(py);
        for (role, id) in [
            ("unk", ids.unk),
            ("pad", ids.pad),
            ("cls", ids.cls),
            ("sep", ids.sep),
            ("mask", ids.mask),
            ("bos", ids.bos),
            ("eos", ids.eos),
        ] {
            if let Some(id) = id {
                dict.set_item(role, id)?;
            }
        }
        Ok(dict)
    }

    /// A dict: ids, type_ids, tokens, offsets, special_tokens_mask, attention_mask.
    #[pyo3(signature = (text, pair, add_special_tokens))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &str,
        pair: Option<&str>,
        add_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let e = enter(py, || self.inner.encode(text, pair, add_special_tokens))?;
        let dict = PyDict::new(py);
        dict.set_item("ids", e.ids)?;
        dict.set_item("type_ids", e.type_ids)?;
        dict.set_item("tokens", e.tokens)?;
        dict.set_item("offsets", e.offsets)?;
        dict.set_item("special_tokens_mask", e.special_tokens_mask)?;
        dict.set_item("attention_mask", e.attention_mask)?;
        Ok(dict)
    }

    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<String>,
        add_special_tokens: bool,
        threads: usize,
    ) -> PyResult<Ragged<'py>> {
        let ragged = enter(py, || self.inner.encode_batch(&texts, add_special_tokens, threads))?;
        Ok((PyArray1::from_vec(py, ragged.ids), PyArray1::from_vec(py, ragged.offsets)))
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn decode(&self, py: Python<'_>, ids: Vec<Id>, skip_special_tokens: bool) -> PyResult<String> {
        let ids = Id::all(&ids);
        enter(py, || self.inner.decode(&ids, skip_special_tokens))
    }

    /// The same tokenizer, which keeps long texts whole.
    fn without_truncation(&self, py: Python<'_>) -> PyResult<Self> {
        if self.inner.truncation().is_none() {
            return Ok(Self { inner: self.inner.clone() });
        }
        let whole = enter(py, || pyrformer_text::Tokenizer::clone(&self.inner).with_truncation(None))?;
        Ok(Self { inner: Arc::new(whole) })
    }

    fn stream_decoder(&self, skip_special_tokens: bool) -> StreamDecoder {
        let inner = pyrformer_text::StreamDecoder::new(self.inner.clone(), skip_special_tokens);
        StreamDecoder { inner: Mutex::new(inner) }
    }
}

/// Documents in, a tokenizer out.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Trainer {
    /// None once finished.
    inner: Mutex<Option<pyrformer_text::Trainer>>,
}

#[pymethods]
impl Trainer {
    /// `kind` is used where no preset is named.
    #[new]
    fn new(
        kind: &str,
        preset: Option<&str>,
        vocab_size: usize,
        min_frequency: u64,
        special_tokens: Option<Vec<String>>,
        threads: usize,
    ) -> PyResult<Self> {
        let preset = preset.map_or_else(|| Preset::of_kind(kind), str::parse).map_err(Failure::from)?;
        let mut options = TrainOptions::new(preset, vocab_size);
        (options.min_frequency, options.special_tokens, options.threads) =
            (min_frequency, special_tokens, threads);
        let inner = pyrformer_text::Trainer::new(options).map_err(Failure::from)?;
        Ok(Self { inner: Mutex::new(Some(inner)) })
    }

    /// Counts documents.
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn add(&self, py: Python<'_>, documents: Vec<String>) -> PyResult<()> {
        enter(py, || match &mut *self.inner.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(trainer) => {
                trainer.add(&documents);
                Ok(())
            }
            None => Err(finished()),
        })
    }

    /// Learns the vocabulary. `progress(stage, done, total)` is called now and then.
    fn finish(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<Tokenizer> {
        let trainer = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        let trainer = trainer.ok_or_else(finished)?;
        let mut report = |p: Progress| {
            if let Some(call) = &progress {
                // A display that fails must not end the training.
                Python::attach(|py| drop(call.call1(py, (p.stage, p.done, p.total))));
            }
        };
        let inner = enter(py, || trainer.finish(&mut report))?;
        Ok(Tokenizer { inner: Arc::new(inner) })
    }
}

fn finished() -> Failure {
    Failure::new("TokenizerError", "[train] the trainer has finished; make another")
}

/// Ids in, pieces of text out.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct StreamDecoder {
    inner: Mutex<pyrformer_text::StreamDecoder>,
}

#[pymethods]
impl StreamDecoder {
    #[expect(clippy::needless_pass_by_value, reason = "extracted arguments")]
    fn push(&self, id: Id) -> PyResult<Option<String>> {
        let id = id.0;
        Ok(self.inner.lock().unwrap_or_else(PoisonError::into_inner).push(id).map_err(Failure::from)?)
    }

    fn finish(&self) -> Option<String> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).finish()
    }
}
