//! NumPy arrays in and out.

use numpy::{PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyrformer_cpu::kernels::cast::widened;
use pyrformer_cpu::room;
use pyrformer_files::f16_to_f32;
use pyrformer_graph::{DType, Shape, TensorType};

use crate::enter::Failure;

/// A contiguous array of a type the graph knows, borrowed from Python.
pub(crate) enum Given<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F64(PyReadonlyArrayDyn<'py, f64>),
    I32(PyReadonlyArrayDyn<'py, i32>),
}

impl<'py> Given<'py> {
    /// Takes an array; `name` is for the error.
    pub(crate) fn new(name: &str, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        let wrong = |what: &str| -> PyErr {
            let message =
                format!("[input] {name:?} must be a C-contiguous array of float32, float64 or int32, {what}");
            Failure::new("InputError", message).into()
        };
        let given = if let Ok(a) = value.extract() {
            Self::F32(a)
        } else if let Ok(a) = value.extract() {
            Self::I32(a)
        } else if let Ok(a) = value.extract() {
            Self::F64(a)
        } else {
            return Err(wrong(&format!("got {}", value.get_type().name()?)));
        };
        if given.bytes().is_none() { Err(wrong("got one with gaps")) } else { Ok(given) }
    }

    pub(crate) fn ty(&self) -> TensorType {
        let (dtype, shape) = match self {
            Self::F32(a) => (DType::F32, a.shape()),
            Self::F64(a) => (DType::F64, a.shape()),
            Self::I32(a) => (DType::I32, a.shape()),
        };
        TensorType::new(dtype, Shape(shape.to_vec()))
    }

    /// The elements as bytes; `None` where the array has gaps.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        fn cast<T>(x: &[T]) -> &[u8] {
            // SAFETY: numbers have no padding, and any byte may be read.
            unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
        }
        match self {
            Self::F32(a) => a.as_slice().ok().map(cast),
            Self::F64(a) => a.as_slice().ok().map(cast),
            Self::I32(a) => a.as_slice().ok().map(cast),
        }
    }
}

/// A new array of this type and these bytes; of float32 for 16-bit floats.
pub(crate) fn to_numpy<'py>(py: Python<'py>, ty: &TensorType, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    fn make<'py, T: numpy::Element>(
        py: Python<'py>,
        dims: &[usize],
        items: Vec<T>,
    ) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
        PyArray1::from_vec(py, items).reshape(dims)
    }
    let dims = &ty.shape.0[..];
    Ok(match ty.dtype {
        DType::F32 => make(py, dims, items(bytes, f32::from_ne_bytes)?)?.into_any(),
        DType::F64 => make(py, dims, items(bytes, f64::from_ne_bytes)?)?.into_any(),
        DType::Bf16 => make(py, dims, items(bytes, |x| widened(u16::from_ne_bytes(x)))?)?.into_any(),
        DType::F16 => make(py, dims, items(bytes, |x| f16_to_f32(u16::from_ne_bytes(x)))?)?.into_any(),
        DType::I32 => make(py, dims, items(bytes, i32::from_ne_bytes)?)?.into_any(),
    })
}

fn items<T, const N: usize>(bytes: &[u8], item: impl Fn([u8; N]) -> T) -> Result<Vec<T>, Failure> {
    let mut items = room(bytes.len() / N)?;
    items.extend(bytes.as_chunks::<N>().0.iter().map(|&chunk| item(chunk)));
    Ok(items)
}
