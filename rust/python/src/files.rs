//! Model files: safetensors in and out, directories that appear whole or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use numpy::{PyArray1, PyArrayMethods};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use pyrformer_files::{DType as Stored, GgufValue, TensorView};
use pyrformer_graph::{DType, Shape, TensorType};

use crate::array::Given;
use crate::enter::{Failure, enter};
use crate::graph::Store;

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
        let tensor = self.tensor(name)?;
        let shape = tensor.shape.to_vec();
        let values = enter(py, || tensor.to_f32().ok_or_else(|| not_real(name)))?;
        Ok(PyArray1::from_vec(py, values).reshape(shape)?.into_any())
    }

    /// A tensor of int32.
    fn get_int32<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let tensor = self.tensor(name)?;
        if tensor.dtype != Stored::I32 {
            let text = format!("[safetensors] tensor {name:?} does not hold int32");
            return Err(Failure::new("FileError", text).into());
        }
        let values = tensor.bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
        Ok(PyArray1::from_vec(py, values).reshape(tensor.shape.to_vec())?.into_any())
    }

    /// Makes states of tensors without copying them, each under the first name of its pair, from the second: those that
    /// are stored as `dtype`, on a boundary of its elements. Their pages are shared with all processes that do so, until
    /// they are written. Gives the pairs that are left, to be copied.
    fn map_into(
        &self,
        py: Python<'_>,
        store: &Store,
        names: Vec<(String, String)>,
        dtype: &str,
    ) -> PyResult<Vec<(String, String)>> {
        let (dtype, stored) = match dtype {
            "float64" => (DType::F64, Stored::F64),
            _ => (DType::F32, Stored::F32),
        };
        enter(py, || -> Result<_, Failure> {
            let maps = self.inner.private_maps()?.into_iter().map(|mut map| {
                let start = map.as_mut_ptr().expose_provenance();
                (start, Arc::new(map))
            });
            let maps: Vec<_> = maps.collect();
            let (mut left, mut taken) = (Vec::new(), BTreeSet::new());
            for (ours, theirs) in names {
                let is_first = taken.insert(theirs.clone());
                let tensor = self.inner.get(&theirs).filter(|t| is_first && t.dtype == stored);
                let found = tensor.zip(self.inner.place(&theirs)).map(|(tensor, (number, bytes))| {
                    let (start, map) = &maps[number];
                    (TensorType::new(dtype, Shape(tensor.shape.to_vec())), start + bytes.start, map)
                });
                match found {
                    Some((ty, at, map)) if cfg!(target_endian = "little") && at % dtype.size() == 0 => {
                        let data = std::ptr::with_exposed_provenance_mut(at);
                        // SAFETY: the place was checked to lie in the file and to have the type's size; the map is
                        // private, its tensors do not overlap and each is taken once, so only this state reads and writes these bytes.
                        unsafe { store.inner.adopt(&ours, &ty, data, Arc::clone(map) as _) }?;
                    }
                    _ => left.push((ours, theirs)),
                }
            }
            Ok(left)
        })
    }

    /// Copies tensors into a store as `dtype`, each under the first name of its pair, from the second.
    #[pyo3(signature = (store, names, dtype, threads=None))]
    fn load_into(
        &self,
        py: Python<'_>,
        store: &Store,
        names: Vec<(String, String)>,
        dtype: &str,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let (dtype, stored) = match dtype {
            "float64" => (DType::F64, Stored::F64),
            _ => (DType::F32, Stored::F32),
        };
        let mut tensors = Vec::with_capacity(names.len());
        for (ours, theirs) in &names {
            let tensor = self.tensor(theirs)?;
            if !tensor.is_real() {
                return Err(not_real(theirs).into());
            }
            tensors.push((ours, tensor));
        }
        // The largest first: no thread is left with one at the end.
        tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.bytes.len()));
        let threads = match threads {
            Some(n) => n,
            None => pyrformer_cpu::threads::default_threads().map_err(|e| Failure::new("InputError", e))?,
        };
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), Failure> {
            while let Some((name, tensor)) = tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
                let ty = TensorType::new(dtype, Shape(tensor.shape.to_vec()));
                store.inner.fill(name, &ty, |bytes| {
                    tensor.copy_to(stored, bytes).expect("the type and the size were checked");
                })?;
            }
            Ok(())
        };
        enter(py, || {
            thread::scope(|scope| {
                let others: Vec<_> = (1..threads.min(tensors.len())).map(|_| scope.spawn(work)).collect();
                let own = work();
                let rest = others.into_iter().map(|t| t.join().unwrap_or_else(|p| resume_unwind(p)));
                rest.fold(own, Result::and)
            })
        })
    }
}

impl SafeTensors {
    fn tensor(&self, name: &str) -> PyResult<TensorView<'_>> {
        let missing = || Failure::new("FileError", format!("[safetensors] no file has a tensor {name:?}"));
        Ok(self.inner.get(name).ok_or_else(missing)?)
    }
}

fn not_real(name: &str) -> Failure {
    Failure::new("FileError", format!("[safetensors] tensor {name:?} does not hold real numbers"))
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

/// Writes arrays by name to a file that appears whole or not at all, those of float32 as `dtype`: "float32", "float16" or
/// "bfloat16".
#[pyfunction]
#[pyo3(signature = (path, tensors, dtype="float32"))]
pub(crate) fn write_safetensors(
    py: Python<'_>,
    path: PathBuf,
    tensors: &Bound<'_, PyDict>,
    dtype: &str,
) -> PyResult<()> {
    let float = match dtype {
        "float32" => Stored::F32,
        "float16" => Stored::F16,
        "bfloat16" => Stored::BF16,
        _ => {
            let message = format!("[save] dtype must be 'float32', 'float16' or 'bfloat16', got {dtype:?}");
            return Err(Failure::new("InputError", message).into());
        }
    };
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
                DType::Bf16 => Stored::BF16,
                DType::F16 => Stored::F16,
            };
            let bytes = Cow::Borrowed(g.bytes().unwrap_or_default());
            (name.as_str(), TensorView { dtype, shape: Cow::Borrowed(&ty.shape.0[..]), bytes })
        })
        .collect();
    enter(py, || pyrformer_files::write_safetensors(&path, &views, float))
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
