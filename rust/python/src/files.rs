//! Model files: safetensors in and out, directories that appear whole or not at all.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::{PyArray1, PyArrayMethods};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use pyrformer_files::{DType as Stored, GgufValue, TensorView};
use pyrformer_graph::{DType, TensorType};

use crate::array::Given;
use crate::enter::{Failure, enter};

impl From<pyrformer_files::Error> for Failure {
    fn from(e: pyrformer_files::Error) -> Self {
        Self::new("FileError", e)
    }
}

/// The tensors of one file, or of a directory's `model.safetensors` or its shards.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct SafeTensors {
    inner: pyrformer_files::SafeTensors,
}

#[pymethods]
impl SafeTensors {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let open = || {
            if path.is_dir() {
                pyrformer_files::SafeTensors::open_dir(&path)
            } else {
                pyrformer_files::SafeTensors::open(&path)
            }
        };
        Ok(Self { inner: enter(py, open)? })
    }

    /// Name → (element type as the format names it, shape).
    fn tensors(&self) -> Vec<(String, &'static str, Vec<usize>)> {
        let entry = |name: &str| {
            let t = self.inner.get(name)?;
            Some((name.to_owned(), t.dtype.name(), t.shape.to_vec()))
        };
        self.inner.names().filter_map(entry).collect()
    }

    /// A tensor as float32.
    fn get<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let missing = |what: &str| Failure::new("FileError", format!("[safetensors] tensor {name:?} {what}"));
        let tensor = self.inner.get(name).ok_or_else(|| missing("is not in the file"))?;
        let shape = tensor.shape.to_vec();
        let values = enter(py, || tensor.to_f32().ok_or_else(|| missing("does not hold real numbers")))?;
        Ok(PyArray1::from_vec(py, values).reshape(shape)?.into_any())
    }
}

/// A GGUF file: metadata, and tensors as the bytes of their blocks.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Gguf {
    inner: pyrformer_files::Gguf,
}

#[pymethods]
impl Gguf {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self { inner: enter(py, || pyrformer_files::Gguf::open(&path))? })
    }

    /// The metadata by key.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for (key, value) in self.inner.metadata() {
            out.set_item(key, gguf_value(py, value)?)?;
        }
        Ok(out)
    }

    /// Name → (shape, outermost axis first; ggml's number of the element type).
    fn tensors(&self) -> BTreeMap<String, (Vec<usize>, u32)> {
        let entry = |(name, t): (&String, &pyrformer_files::GgufTensor)| {
            (name.clone(), (t.dims.iter().rev().copied().collect(), t.dtype.0))
        };
        self.inner.tensors().iter().map(entry).collect()
    }

    /// The bytes of a tensor.
    fn data<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let bytes = self.inner.data(name).map_err(Failure::from)?;
        Ok(PyArray1::from_slice(py, bytes).into_any())
    }
}

fn gguf_value<'py>(py: Python<'py>, value: &GgufValue) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        GgufValue::Bool(x) => x.into_bound_py_any(py)?,
        GgufValue::U64(x) => x.into_bound_py_any(py)?,
        GgufValue::I64(x) => x.into_bound_py_any(py)?,
        GgufValue::F64(x) => x.into_bound_py_any(py)?,
        GgufValue::String(x) => x.into_bound_py_any(py)?,
        GgufValue::Strings(x) => x.into_bound_py_any(py)?,
        GgufValue::Array(x) => {
            let items: PyResult<Vec<_>> = x.iter().map(|item| gguf_value(py, item)).collect();
            PyList::new(py, items?)?.into_any()
        }
    })
}

/// Writes arrays by name to a file that appears whole or not at all.
#[pyfunction]
pub(crate) fn write_safetensors(py: Python<'_>, path: PathBuf, tensors: &Bound<'_, PyDict>) -> PyResult<()> {
    let given: Vec<(String, Given<'_>)> = tensors
        .iter()
        .map(|(name, value)| {
            let name: String = name.extract()?;
            let value = Given::new(&name, &value)?;
            Ok((name, value))
        })
        .collect::<PyResult<_>>()?;
    let types: Vec<TensorType> = given.iter().map(|(_, g)| g.ty()).collect();
    let views: Vec<(&str, TensorView<'_>)> = given
        .iter()
        .zip(&types)
        .map(|((name, g), ty)| {
            let dtype = match ty.dtype {
                DType::F32 => Stored::F32,
                DType::F64 => Stored::F64,
                DType::I32 => Stored::I32,
            };
            let bytes = Cow::Borrowed(g.bytes().unwrap_or_default());
            (name.as_str(), TensorView { dtype, shape: Cow::Borrowed(&ty.shape.0[..]), bytes })
        })
        .collect();
    enter(py, || pyrformer_files::write_safetensors(&path, &views))
}

/// Writes bytes to a file that appears whole or not at all.
#[pyfunction]
pub(crate) fn write_file(py: Python<'_>, path: PathBuf, data: &[u8]) -> PyResult<()> {
    enter(py, || pyrformer_files::write_file(&path, data))
}

/// A directory under construction; it takes its name on `commit`, and is removed if that never comes.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct AtomicDir {
    inner: Mutex<Option<pyrformer_files::AtomicDir>>,
}

#[pymethods]
impl AtomicDir {
    #[new]
    fn new(py: Python<'_>, target: PathBuf) -> PyResult<Self> {
        let dir = enter(py, || pyrformer_files::AtomicDir::new(&target))?;
        Ok(Self { inner: Mutex::new(Some(dir)) })
    }

    /// Where to write meanwhile; None after the end.
    #[getter]
    fn path(&self) -> Option<PathBuf> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.as_ref().map(|dir| dir.path().to_owned())
    }

    /// Gives the directory its name; with `replace`, in the place of one that is there.
    fn commit(&self, py: Python<'_>, replace: bool) -> PyResult<()> {
        match self.inner.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(dir) => enter(py, move || dir.commit(replace)),
            None => {
                Err(Failure::new("FileError", "[files] the directory is already committed or discarded")
                    .into())
            }
        }
    }

    /// Removes what was written.
    fn discard(&self) {
        drop(self.inner.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
