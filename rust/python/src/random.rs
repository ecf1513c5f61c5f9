//! Random numbers for initialising weights, and for draws that Python makes.

use numpy::PyArray1;
use pyo3::prelude::*;
use pyrformer_cpu::room;
use pyrformer_random::Stream;

use crate::enter::{Failure, enter};

/// The purpose of draws for initial weights, so that they meet no other use of a seed.
const INIT: u32 = 0x1A17;

/// The purpose of draws of masked tokens.
const GIBBS: u32 = 0x61BB;

/// `count` draws from [0, 1) of coordinate `index`, float64.
#[pyfunction]
pub(crate) fn uniform(
    py: Python<'_>,
    seed: u64,
    index: u64,
    count: usize,
) -> PyResult<Bound<'_, PyArray1<f64>>> {
    let mut stream = Stream::new(seed, GIBBS, index);
    let mut values = room(count).map_err(Failure::from)?;
    values.extend((0..count).map(|_| stream.next_f64()));
    Ok(PyArray1::from_vec(py, values))
}

/// `count` draws from N(0, 1) for tensor `index` of a model, float32.
#[pyfunction]
pub(crate) fn normal(
    py: Python<'_>,
    seed: u64,
    index: u64,
    count: usize,
) -> PyResult<Bound<'_, PyArray1<f32>>> {
    let values = enter(py, || {
        let mut stream = Stream::new(seed, INIT, index);
        let mut values = room(count.saturating_add(1))?;
        while values.len() < count {
            let (a, b) = stream.normal_pair();
            values.extend([a as f32, b as f32]);
        }
        values.truncate(count);
        Ok::<_, pyrformer_cpu::Error>(values)
    })?;
    Ok(PyArray1::from_vec(py, values))
}
