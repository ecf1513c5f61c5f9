//! Decoding search and logits filters.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use pyrformer_cpu::room;
use pyrformer_search::{
    Best, Draft, EarlyStopping, Filters, GenerationOptions, Hooks, Positions, Prompt, Row,
};

use crate::decode::Program;
use crate::enter::{Failure, enter};
use crate::graph::Executor;

impl From<pyrformer_search::Error> for Failure {
    fn from(e: pyrformer_search::Error) -> Self {
        Self::new("InputError", e)
    }
}

fn wrong(option: &str, value: &Bound<'_, PyAny>, wanted: &str) -> PyErr {
    let got = value.repr().map_or_else(|_| "something else".to_owned(), |r| r.to_string());
    Failure::new("InputError", format!("[search] {option} must be {wanted}, got {got}")).into()
}

/// Sets one filter by name; false if there is none of this name.
fn set_filter(filters: &mut Filters, name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    macro_rules! take {
        ($field:ident, $wanted:literal) => {
            filters.$field = value.extract().map_err(|_| wrong(name, value, $wanted))?
        };
    }
    match name {
        "temperature" => take!(temperature, "a number"),
        "top_k" => take!(top_k, "a whole number of 0 or more"),
        "top_p" => take!(top_p, "a number"),
        "top_h" => take!(top_h, "a number"),
        "min_p" => take!(min_p, "a number"),
        "typical_p" => take!(typical_p, "a number"),
        "epsilon_cutoff" => take!(epsilon_cutoff, "a number"),
        "eta_cutoff" => take!(eta_cutoff, "a number"),
        "min_tokens_to_keep" => take!(min_tokens_to_keep, "a whole number of 1 or more"),
        _ => return Ok(false),
    }
    Ok(true)
}

/// One number or a list of them.
fn tokens(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if let Ok(one) = value.extract::<u32>() {
        return Ok(vec![one]);
    }
    value.extract().map_err(|_| wrong(name, value, "a token id or a list of them"))
}

/// Two items, in a tuple or a list (as JSON has it).
fn pair<'py, A: FromPyObjectOwned<'py>, B: FromPyObjectOwned<'py>>(
    value: &Bound<'py, PyAny>,
) -> PyResult<(A, B)> {
    let item = |i: usize| value.get_item(i);
    Ok((item(0)?.extract().map_err(Into::into)?, item(1)?.extract().map_err(Into::into)?))
}

/// A list of constraints: phrases (token ids) or lists of alternative phrases.
fn constraints(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<Vec<u32>>>> {
    let wanted = "a list of phrases (token ids) or of lists of alternative phrases";
    let items = value.try_iter().map_err(|_| wrong(name, value, wanted))?;
    items
        .map(|item| {
            let item = item?;
            if let Ok(phrase) = item.extract::<Vec<u32>>()
                && !phrase.is_empty()
            {
                return Ok(vec![phrase]);
            }
            item.extract().map_err(|_| wrong(name, value, wanted))
        })
        .collect()
}

/// Wraps the caller's functions: `allowed(prompt, ids) -> token ids`, `processor(ids, scores [V]) -> scores [V]` and
/// `ends(prompt's length, ids) -> bool`.
fn hooks(allowed: Option<Py<PyAny>>, processor: Option<Py<PyAny>>, ends: Option<Py<PyAny>>) -> Hooks {
    let mut hooks = Hooks::default();
    if let Some(function) = allowed {
        hooks.allowed_tokens = Some(Box::new(move |prompt, ids| {
            Python::attach(|py| {
                let tokens = function.call1(py, (prompt, ids.to_vec()))?;
                let tokens = tokens.bind(py);
                if let Ok(array) = tokens.extract::<PyReadonlyArray1<'_, u32>>() {
                    return Ok(array.as_array().to_vec());
                }
                let tokens = tokens.try_iter()?.map(|token| token?.extract::<u32>());
                tokens.collect::<PyResult<_>>()
            })
            .map_err(|e| e.to_string())
        }));
    }
    if let Some(function) = processor {
        hooks.processor = Some(Box::new(move |ids, row| {
            Python::attach(|py| {
                let scores = PyArray1::from_slice(py, row);
                let changed = function.call1(py, (ids.to_vec(), scores))?;
                let changed = changed.bind(py);
                if let Ok(array) = changed.extract::<PyReadonlyArray1<'_, f32>>() {
                    return Ok(array.as_array().to_vec());
                }
                let changed: Vec<f32> = changed.try_iter()?.map(|x| x?.extract()).collect::<PyResult<_>>()?;
                Ok::<_, PyErr>(changed)
            })
            .map_err(|e| e.to_string())
            .and_then(|changed| {
                if changed.len() != row.len() {
                    return Err(format!("returned {} scores for {} tokens", changed.len(), row.len()));
                }
                row.copy_from_slice(&changed);
                Ok(())
            })
        }));
    }
    if let Some(function) = ends {
        hooks.ends = Some(Box::new(move |prompt_len, ids| {
            Python::attach(|py| function.call1(py, (prompt_len, ids.to_vec()))?.is_truthy(py))
                .map_err(|e| e.to_string())
        }));
    }
    hooks
}

fn options(given: &Bound<'_, PyDict>) -> PyResult<GenerationOptions> {
    let mut o = GenerationOptions::default();
    for (name, value) in given.iter() {
        let name: String = name.extract()?;
        if value.is_none() || set_filter(&mut o.filters, &name, &value)? {
            continue;
        }
        macro_rules! take {
            ($field:ident, $wanted:literal) => {
                o.$field = value.extract().map_err(|_| wrong(&name, &value, $wanted))?
            };
        }
        match name.as_str() {
            "max_new_tokens" => take!(max_new_tokens, "a whole number of 1 or more"),
            "max_length" => take!(max_length, "a whole number of 1 or more"),
            "min_length" => take!(min_length, "a whole number of 0 or more"),
            "min_new_tokens" => take!(min_new_tokens, "a whole number of 0 or more"),
            "do_sample" => take!(do_sample, "True or False"),
            "num_beams" => take!(num_beams, "a whole number of 1 or more"),
            "num_return_sequences" => take!(num_return_sequences, "a whole number of 1 or more"),
            "repetition_penalty" => take!(repetition_penalty, "a number"),
            "encoder_repetition_penalty" => take!(encoder_repetition_penalty, "a number"),
            "presence_penalty" => take!(presence_penalty, "a number"),
            "frequency_penalty" => take!(frequency_penalty, "a number"),
            "num_beam_groups" => take!(num_beam_groups, "a whole number of 1 or more"),
            "diversity_penalty" => take!(diversity_penalty, "a number"),
            "patience" => take!(patience, "a number"),
            "stochastic_beams" => take!(stochastic_beams, "True or False"),
            "ordered_constraints" => take!(ordered_constraints, "True or False"),
            "force_words_ids" => o.force_words_ids = constraints(&name, &value)?,
            "no_repeat_ngram_size" => take!(no_repeat_ngram_size, "a whole number of 0 or more"),
            "encoder_no_repeat_ngram_size" => {
                take!(encoder_no_repeat_ngram_size, "a whole number of 0 or more")
            }
            "bad_words_ids" => take!(bad_words_ids, "a list of lists of token ids"),
            "sequence_bias" => {
                let pairs: PyResult<Vec<_>> =
                    value.try_iter().and_then(|items| items.map(|i| pair(&i?)).collect());
                o.sequence_bias = pairs.map_err(|_| wrong(&name, &value, "a list of (token ids, number)"))?;
            }
            "suppress_tokens" => o.suppress_tokens = tokens(&name, &value)?,
            "begin_suppress_tokens" => o.begin_suppress_tokens = tokens(&name, &value)?,
            "forced_bos_token_id" => take!(forced_bos_token_id, "a token id"),
            "forced_eos_token_id" => o.forced_eos_token_id = tokens(&name, &value)?,
            "length_penalty" => take!(length_penalty, "a number"),
            "early_stopping" => {
                o.early_stopping = match (value.extract::<bool>(), value.extract::<String>().as_deref()) {
                    (Ok(false), _) => EarlyStopping::Heuristic,
                    (Ok(true), _) => EarlyStopping::FirstComplete,
                    (_, Ok("never")) => EarlyStopping::Never,
                    _ => return Err(wrong(&name, &value, "True, False or \"never\"")),
                }
            }
            "exponential_decay_length_penalty" => {
                let found = pair(&value).map_err(|_| wrong(&name, &value, "a pair (start, factor)"))?;
                o.exponential_decay_length_penalty = Some(found);
            }
            "renormalize_logits" => take!(renormalize_logits, "True or False"),
            "remove_invalid_values" => take!(remove_invalid_values, "True or False"),
            "eos_token_id" => o.eos_token_id = tokens(&name, &value)?,
            "seed" => take!(seed, "a whole number of 0 or more"),
            _ => return Err(Failure::new("InputError", format!("[search] unknown option {name:?}")).into()),
        }
    }
    Ok(o)
}

/// A search over a batch of prompts.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Search {
    inner: Mutex<Option<pyrformer_search::Search>>,
}

/// Index, tokens, parents and sequences of a step.
type Step<'py> = (usize, Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i32>>);

/// Lengths [A] and rows [A, S] of positions, and (sequence, token, log-probability) of what became certain.
type Decoded<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray2<i32>>, Vec<(usize, u32, f64)>);

fn gaps(_: numpy::AsSliceError) -> Failure {
    Failure::new("InputError", "[search] logits must be a C-contiguous array")
}

fn signed(items: &[u32]) -> Vec<i32> {
    items.iter().map(|&x| x.cast_signed()).collect()
}

impl Search {
    fn lock(&self) -> MutexGuard<'_, Option<pyrformer_search::Search>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` on the search with the interpreter released.
    fn with<T: Send, E>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut pyrformer_search::Search) -> Result<T, E> + Send,
    ) -> PyResult<T>
    where
        Failure: From<E>,
    {
        let inner = &self.inner;
        enter::<_, Failure>(py, || match inner.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(search) => f(search).map_err(Failure::from),
            None => Err(Self::over()),
        })
    }

    fn over() -> Failure {
        Failure::new("InputError", "[search] the search is finished")
    }
}

#[pymethods]
impl Search {
    /// `prompts` holds the ids of each, the padding that stood before them, and the number of its first sequence.
    #[new]
    #[pyo3(signature = (options_, prompts, vocab_size, allowed_tokens=None, processor=None, ends=None))]
    fn new(
        options_: &Bound<'_, PyDict>,
        prompts: Vec<(Vec<u32>, usize, Option<u32>)>,
        vocab_size: usize,
        allowed_tokens: Option<Py<PyAny>>,
        processor: Option<Py<PyAny>>,
        ends: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let prompt = |(ids, left_padding, first_sequence)| Prompt { ids, left_padding, first_sequence };
        let prompts = prompts.into_iter().map(prompt);
        let search =
            pyrformer_search::Search::new(options(options_)?, prompts, vocab_size).map_err(Failure::from)?;
        let search = search.with_hooks(hooks(allowed_tokens, processor, ends));
        Ok(Self { inner: Mutex::new(Some(search)) })
    }

    /// The forward pass wanted next, or None at the end.
    fn step<'py>(&self, py: Python<'py>) -> Option<Step<'py>> {
        let inner = self.lock();
        let step = inner.as_ref()?.step()?;
        let [tokens, parents, sequences] = [&step.tokens, &step.parents, &step.sequences].map(|x| signed(x));
        let array = |x| PyArray1::from_vec(py, x);
        Some((step.index, array(tokens), array(parents), array(sequences)))
    }

    /// Takes logits [active, V].
    fn advance(&self, py: Python<'_>, logits: PyReadonlyArray2<'_, f32>) -> PyResult<()> {
        let slice = logits.as_slice().map_err(gaps)?;
        self.with(py, |search| search.advance(slice))
    }

    /// The temperature at which `advance_best` wants the best `count` of each row weighed; None: it wants whole rows.
    fn wants_best(&self, count: usize) -> Option<f32> {
        self.lock().as_ref().and_then(|search| search.wants_best(count))
    }

    /// Takes the best of each active row, logits and tokens [A, K] and masses [A, 2], and the rows `places` whole, [n, V].
    /// Gives the rows whose best do not suffice; then nothing has changed.
    fn advance_best(
        &self,
        py: Python<'_>,
        logits: PyReadonlyArray2<'_, f32>,
        tokens: PyReadonlyArray2<'_, i32>,
        masses: PyReadonlyArray2<'_, f64>,
        places: Vec<usize>,
        whole: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<Vec<usize>> {
        let (active, count) = (logits.as_array().nrows(), logits.as_array().ncols());
        let fits = tokens.as_array().dim() == (active, count)
            && masses.as_array().dim() == (active, 2)
            && whole.as_array().nrows() == places.len()
            && places.iter().all(|&place| place < active);
        if !fits || count == 0 {
            return Err(Failure::new("InputError", "[search] the best of rows do not fit together").into());
        }
        let (logits, tokens, masses) = (
            logits.as_slice().map_err(gaps)?,
            tokens.as_slice().map_err(gaps)?,
            masses.as_slice().map_err(gaps)?,
        );
        let (vocab_size, whole) = (whole.as_array().ncols(), whole.as_slice().map_err(gaps)?);
        let best = logits.chunks_exact(count).zip(tokens.chunks_exact(count)).zip(masses.chunks_exact(2));
        let best = best.map(|((logits, tokens), m)| Best { logits, tokens, masses: [m[0], m[1]] });
        let mut rows: Vec<Row<'_>> = best.map(Row::Best).collect();
        for (i, &place) in places.iter().enumerate() {
            rows[place] = Row::Whole(&whole[i * vocab_size..(i + 1) * vocab_size]);
        }
        self.with(py, |search| search.advance_rows(&rows))
    }

    /// Takes turns with a decoding program of one token a sequence, whose cache row for a sequence is its number: at most
    /// so many steps (None: any number) or seconds, and as long as the program is made for the number of sequences.
    /// `positions` are lengths [A] and rows [A, S]. Gives them as they are then, and what became certain.
    #[pyo3(signature = (executor, positions, offset, steps, seconds))]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        executor: &Executor,
        positions: (PyReadonlyArray1<'py, i32>, PyReadonlyArray2<'py, i32>),
        offset: i32,
        steps: Option<usize>,
        seconds: f64,
    ) -> PyResult<Decoded<'py>> {
        let (lengths, rows) = (positions.0.as_array().to_vec(), positions.1.as_array());
        let (slots, rows) = (rows.ncols(), rows.iter().copied().collect());
        let mut positions = Positions::new(slots, lengths, rows).map_err(Failure::from)?;
        let mut program = Program::new(&executor.inner, slots, offset)?;
        let (began, mut left) = (Instant::now(), steps.unwrap_or(usize::MAX));
        let enough = || {
            let over = left == 0 || began.elapsed().as_secs_f64() >= seconds;
            left = left.saturating_sub(1);
            over
        };
        let emitted = self.with(py, |search| search.decode(&mut positions, &mut program, enough))?;
        let rows = PyArray1::from_slice(py, positions.rows()).reshape([positions.lengths().len(), slots])?;
        let emitted = emitted.iter().map(|e| (e.sequence, e.token, e.logprob)).collect();
        Ok((PyArray1::from_slice(py, positions.lengths()), rows, emitted))
    }

    /// Prompt and new tokens of each active row.
    fn texts(&self) -> Vec<Vec<u32>> {
        self.lock().as_ref().map_or_else(Vec::new, |search| search.texts().map(<[u32]>::to_vec).collect())
    }

    /// (sequence, token, log-probability) of each token made certain by the last `advance`.
    fn emitted(&self) -> Vec<(usize, u32, f64)> {
        let inner = self.lock();
        inner
            .as_ref()
            .map_or_else(Vec::new, |s| s.emitted().iter().map(|e| (e.sequence, e.token, e.logprob)).collect())
    }

    /// Processed and filtered scores [V] after the tokens `after` in an active row, from logits [V].
    fn scores<'py>(
        &self,
        py: Python<'py>,
        row: usize,
        after: Vec<u32>,
        logits: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let slice = logits.as_slice().map_err(gaps)?;
        let scores = self.with(py, |search| search.scores(row, &after, slice))?;
        Ok(PyArray1::from_vec(py, scores))
    }

    /// (summed log-probability, log-probability of the last token) of each active row.
    fn path_scores(&self) -> Vec<(f64, f64)> {
        self.lock().as_ref().map_or_else(Vec::new, pyrformer_search::Search::path_scores)
    }

    /// Appends (token, log-probability) to each active row.
    fn choose(&self, py: Python<'_>, tokens: Vec<(u32, f64)>) -> PyResult<()> {
        self.with(py, |search| search.choose(&tokens))
    }

    /// A proposal for what follows the one active sequence and `after`, from a cheaper model's logits [V]: the token,
    /// and the distribution [V] it was drawn from.
    fn draft<'py>(
        &self,
        py: Python<'py>,
        after: Vec<u32>,
        logits: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<(u32, Bound<'py, PyArray1<f32>>)> {
        let slice = logits.as_slice().map_err(gaps)?;
        let draft = self.with(py, |search| search.draft(&after, slice))?;
        Ok((draft.token, PyArray1::from_vec(py, draft.probabilities)))
    }

    /// Takes logits [V] and a proposal; whether it was kept.
    fn advance_drafted(
        &self,
        py: Python<'_>,
        logits: PyReadonlyArray1<'_, f32>,
        token: u32,
        probabilities: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<bool> {
        let slice = logits.as_slice().map_err(gaps)?;
        let draft = Draft { token, probabilities: probabilities.as_slice().map_err(gaps)?.to_vec() };
        self.with(py, |search| search.advance_drafted(slice, &draft))
    }

    /// Ends the search: a dict per result.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let search = self.lock().take().ok_or_else(Self::over)?;
        let list = PyList::empty(py);
        for h in search.finish() {
            let dict = PyDict::new(py);
            dict.set_item("prompt", h.prompt)?;
            dict.set_item("ids", h.ids)?;
            dict.set_item("score", h.score)?;
            dict.set_item("token_logprobs", h.token_logprobs)?;
            dict.set_item("beam_indices", h.beam_indices)?;
            dict.set_item("finish_reason", h.finish_reason.name())?;
            list.append(dict)?;
        }
        Ok(list)
    }
}

/// Filtered and renormalised probabilities of logits [N, V].
#[pyfunction]
pub(crate) fn filter_logits<'py>(
    py: Python<'py>,
    logits: PyReadonlyArray2<'py, f32>,
    options_: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let mut filters = Filters::default();
    for (name, value) in options_.iter() {
        let name: String = name.extract()?;
        if !value.is_none() && !set_filter(&mut filters, &name, &value)? {
            return Err(Failure::new("InputError", format!("[filter_logits] unknown option {name:?}")).into());
        }
    }
    let (rows, cols) = (logits.shape()[0], logits.shape()[1]);
    let gaps = |_| Failure::new("InputError", "[filter_logits] logits must be a C-contiguous array");
    let slice = logits.as_slice().map_err(gaps)?;
    let all = enter(py, || {
        let mut all = room(slice.len())?;
        for row in slice.chunks(cols.max(1)) {
            all.extend(pyrformer_search::filter_logits(row, &filters)?);
        }
        Ok::<_, Failure>(all)
    })?;
    PyArray1::from_vec(py, all).reshape([rows, cols])
}
