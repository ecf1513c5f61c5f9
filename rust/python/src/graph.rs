//! Graph, plan, states and the CPU executor.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyrformer_cpu::{Cpu, CpuExecutor, Summary, simd, threads};
use pyrformer_cuda::Cuda;
use pyrformer_graph::autodiff::gradients;
use pyrformer_graph::verify::verify;
use pyrformer_graph::{DType, Op, Shape, Target, TensorType, ValueId, lower, passes};

use crate::array::{Given, to_numpy};
use crate::enter::{Failure, enter};

fn dtype(name: &str) -> PyResult<DType> {
    match name {
        "float32" => Ok(DType::F32),
        "float64" => Ok(DType::F64),
        "bfloat16" => Ok(DType::Bf16),
        "float16" => Ok(DType::F16),
        "int32" => Ok(DType::I32),
        _ => Err(Failure::new(
            "ShapeError",
            format!("[graph] unknown dtype {name:?}; use float32, float64, bfloat16, float16 or int32"),
        )
        .into()),
    }
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F64 => "float64",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::I32 => "int32",
    }
}

/// A name, an element type and a shape.
type Typed = (String, &'static str, Vec<usize>);
/// A tensor, its least and its greatest finite value, and how many values are not finite.
type Values = (Typed, f64, f64, usize);
/// A step's number, what it reads, what it makes.
type Looked = (usize, Vec<Values>, Vec<Values>);

fn typed(name: &str, ty: &TensorType) -> Typed {
    (name.to_owned(), dtype_name(ty.dtype), ty.shape.0.clone())
}

/// A program under construction. Values are numbers; the Python class `Tensor` wraps them.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Graph {
    inner: Mutex<pyrformer_graph::Graph>,
}

impl Graph {
    fn lock(&self) -> MutexGuard<'_, pyrformer_graph::Graph> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a pass makes of the graph, verified.
    fn after(
        &self,
        py: Python<'_>,
        pass: impl FnOnce(&pyrformer_graph::Graph) -> Result<pyrformer_graph::Graph, pyrformer_graph::Error>
        + Send,
    ) -> PyResult<Self> {
        let graph = self.lock().clone();
        let graph = enter(py, move || {
            let graph = pass(&graph)?;
            verify(&graph)?;
            Ok::<_, pyrformer_graph::Error>(graph)
        })?;
        Ok(Self { inner: Mutex::new(graph) })
    }

    fn known(&self, values: &[u32]) -> PyResult<Vec<ValueId>> {
        let count = self.lock().value_count();
        match values.iter().find(|&&v| v as usize >= count) {
            Some(v) => Err(Failure::new("GraphError", format!("[graph] there is no value {v}")).into()),
            None => Ok(values.iter().map(|&v| ValueId(v)).collect()),
        }
    }
}

#[pymethods]
impl Graph {
    #[new]
    fn new() -> Self {
        Self { inner: Mutex::new(pyrformer_graph::Graph::new()) }
    }

    fn input(&self, name: &str, dtype_: &str, shape: Vec<usize>) -> PyResult<u32> {
        let ty = TensorType::new(dtype(dtype_)?, Shape(shape));
        Ok(self.lock().input(name, ty).map_err(Failure::from)?.0)
    }

    fn state(&self, name: &str, dtype_: &str, shape: Vec<usize>) -> PyResult<u32> {
        let ty = TensorType::new(dtype(dtype_)?, Shape(shape));
        Ok(self.lock().state(name, ty).map_err(Failure::from)?.0)
    }

    /// Adds an operation given as JSON, `"gather"` or `{"matmul": {...}}`; `declared` is the result's type where the
    /// operation does not determine it.
    #[pyo3(signature = (op, inputs, declared=None))]
    fn add(&self, op: &str, inputs: Vec<u32>, declared: Option<(String, Vec<usize>)>) -> PyResult<Vec<u32>> {
        let op: Op =
            serde_json::from_str(op).map_err(|e| Failure::new("GraphError", format!("[graph] {op}: {e}")))?;
        let inputs = self.known(&inputs)?;
        let mut graph = self.lock();
        let values = match declared {
            None => graph.add(op, &inputs).map_err(Failure::from)?,
            Some((name, shape)) => {
                let ty = TensorType::new(dtype(&name)?, Shape(shape));
                vec![graph.add_as(op, &inputs, ty).map_err(Failure::from)?]
            }
        };
        Ok(values.into_iter().map(|v| v.0).collect())
    }

    fn r#type(&self, value: u32) -> PyResult<(&'static str, Vec<usize>)> {
        let value = self.known(&[value])?[0];
        let graph = self.lock();
        let ty = graph.ty(value);
        Ok((dtype_name(ty.dtype), ty.shape.0.clone()))
    }

    fn gradients(&self, loss: u32, wrt: Vec<u32>) -> PyResult<Vec<u32>> {
        let (loss, wrt) = (self.known(&[loss])?[0], self.known(&wrt)?);
        let values = gradients(&mut self.lock(), loss, &wrt).map_err(Failure::from)?;
        Ok(values.into_iter().map(|v| v.0).collect())
    }

    fn output(&self, name: &str, value: u32) -> PyResult<()> {
        let value = self.known(&[value])?[0];
        Ok(self.lock().output(name, value).map_err(Failure::from)?)
    }

    fn update(&self, state: u32, value: u32) -> PyResult<()> {
        let values = self.known(&[state, value])?;
        Ok(self.lock().update(values[0], values[1]).map_err(Failure::from)?)
    }

    fn set_scope(&self, scope: &str) -> String {
        self.lock().set_scope(scope)
    }

    /// The graph after all passes.
    fn optimise(&self, py: Python<'_>) -> PyResult<Self> {
        self.after(py, passes::optimise)
    }

    /// The scopes of the layers that can be recomputed in the backward pass, in order.
    fn layers(&self) -> Vec<String> {
        passes::layers(&self.lock()).into_iter().map(str::to_owned).collect()
    }

    /// The graph with the first `count` layers recomputed in the backward pass.
    fn recompute(&self, py: Python<'_>, count: usize) -> PyResult<Self> {
        self.after(py, |graph| passes::recompute(graph, count))
    }

    /// The graph with a narrow type in memory where that may be: see the pass.
    fn narrow(&self, py: Python<'_>, to: &str) -> PyResult<Self> {
        let to = dtype(to)?;
        self.after(py, |graph| passes::narrow(graph, to))
    }

    /// The graph with what its forward pass leaves to the backward pass kept in bfloat16: see the pass.
    fn stash(&self, py: Python<'_>) -> PyResult<Self> {
        self.after(py, passes::stash)
    }

    /// The plan of this graph, as it is, for an executor: "cpu" or "cuda".
    #[pyo3(signature = (target="cpu"))]
    fn lower(&self, py: Python<'_>, target: &str) -> PyResult<Plan> {
        let target: &(dyn Target + Sync) = match target {
            "cpu" => &Cpu,
            "cuda" => &Cuda,
            _ => {
                let message = format!("[device] there is no device {target:?}; use \"cpu\" or \"cuda\"");
                return Err(Failure::new("InputError", message).into());
            }
        };
        let graph = self.lock().clone();
        Ok(Plan { inner: Arc::new(enter(py, move || lower(&graph, target))?) })
    }

    fn __str__(&self) -> String {
        self.lock().to_string()
    }

    fn __len__(&self) -> usize {
        self.lock().nodes().len()
    }
}

/// A compiled program: steps over planned memory.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Plan {
    inner: Arc<pyrformer_graph::Plan>,
}

impl Plan {
    pub(crate) fn shared(&self) -> Arc<pyrformer_graph::Plan> {
        self.inner.clone()
    }
}

#[pymethods]
impl Plan {
    #[getter]
    fn inputs(&self) -> Vec<Typed> {
        self.inner.inputs.iter().map(|p| typed(&p.name, &p.operand.ty)).collect()
    }

    #[getter]
    fn outputs(&self) -> Vec<Typed> {
        self.inner.outputs.iter().map(|p| typed(&p.name, &p.operand.ty)).collect()
    }

    #[getter]
    fn states(&self) -> Vec<Typed> {
        self.inner.states.iter().map(|s| typed(&s.name, &s.ty)).collect()
    }

    #[getter]
    fn arena_bytes(&self) -> usize {
        self.inner.arena_bytes
    }

    #[getter]
    fn live_bytes(&self) -> usize {
        self.inner.live_bytes
    }

    #[getter]
    fn state_bytes(&self) -> usize {
        self.inner.state_bytes()
    }

    #[getter]
    fn flops(&self) -> u64 {
        self.inner.flops()
    }

    #[getter]
    fn traffic_bytes(&self) -> u64 {
        self.inner.traffic_bytes()
    }

    fn table(&self) -> Vec<[String; 8]> {
        self.inner.table()
    }

    fn to_json(&self) -> PyResult<String> {
        Ok(self.inner.to_json().map_err(|e| Failure::new("InternalError", e))?)
    }

    fn __len__(&self) -> usize {
        self.inner.steps.len()
    }
}

/// Named tensors that plans share.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Store {
    pub(crate) inner: Arc<pyrformer_cpu::Store>,
}

#[pymethods]
impl Store {
    #[new]
    fn new() -> Self {
        Self { inner: Arc::new(pyrformer_cpu::Store::new()) }
    }

    fn types(&self) -> Vec<Typed> {
        self.inner.types().iter().map(|(name, ty)| typed(name, ty)).collect()
    }

    fn set(&self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let given = Given::new(name, value)?;
        let (ty, bytes) = (given.ty(), given.bytes().unwrap_or_default());
        enter(py, || self.inner.set(name, &ty, bytes))
    }

    fn get<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let (ty, bytes) = enter(py, || self.inner.get(name))?;
        to_numpy(py, &ty, &bytes)
    }

    fn remove(&self, name: &str) {
        self.inner.remove(name);
    }

    /// Keeps the weights that a plan multiplies by in 8 bits from here on; gives their names.
    fn quantise(&self, py: Python<'_>, plan: &Plan) -> PyResult<Vec<String>> {
        enter(py, || self.inner.quantise(&plan.inner))
    }
}

/// A plan bound to a store, run on the CPU.
#[pyclass(frozen, module = "pyrformer._core")]
pub(crate) struct Executor {
    pub(crate) inner: CpuExecutor,
}

/// The vector instructions that the CPU has, and those that kernels use (`PYRFORMER_SIMD` may lower them).
#[pyfunction]
pub(crate) fn simd_levels() -> PyResult<(&'static str, &'static str)> {
    let used = simd::check().map_err(|e| Failure::new("InputError", e))?;
    Ok((simd::detect().name(), used.name()))
}

/// The pool that all executors of one thread count share.
fn pool(threads: usize) -> Arc<threads::Pool> {
    static POOLS: Mutex<Vec<Arc<threads::Pool>>> = Mutex::new(Vec::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.iter().find(|p| p.threads() == threads) {
        return pool.clone();
    }
    let pool = Arc::new(threads::Pool::new(threads));
    pools.push(pool.clone());
    pool
}

#[pymethods]
impl Executor {
    #[new]
    #[pyo3(signature = (plan, store, threads=None))]
    fn new(py: Python<'_>, plan: &Plan, store: &Store, threads: Option<usize>) -> PyResult<Self> {
        simd::check().map_err(|e| Failure::new("InputError", e))?;
        let threads = match threads {
            Some(n) if (1..=threads::MAX_THREADS).contains(&n) => n,
            Some(n) => {
                let most = threads::MAX_THREADS;
                return Err(
                    Failure::new("InputError", format!("[threads] {n} threads; give 1 to {most}")).into()
                );
            }
            None => threads::default_threads().map_err(|e| Failure::new("InputError", e))?,
        };
        let (plan, store) = (plan.inner.clone(), store.inner.clone());
        Ok(Self { inner: enter(py, move || CpuExecutor::new(plan, store, pool(threads)))? })
    }

    /// Keeps the weights that the plan multiplies by in the order of the kernels, for all plans of the store.
    fn pack_weights(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, || {
            self.inner.pack_weights();
            Ok::<_, pyrformer_cpu::Error>(())
        })
    }

    /// Keeps the plan's caches of keys and values in 8 bits for all plans of the store.
    fn quantise_caches(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, || self.inner.quantise_caches())
    }

    /// Runs the plan once: a dict of arrays in, a dict of new arrays out.
    fn run<'py>(&self, py: Python<'py>, inputs: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyDict>> {
        let given = given(inputs)?;
        let raw = raw(&given);
        let results = enter(py, || self.inner.run(&raw))?;
        let out = PyDict::new(py);
        for (port, array) in self.inner.plan().outputs.iter().zip(results) {
            out.set_item(&port.name, to_numpy(py, &array.ty, &array.bytes)?)?;
        }
        Ok(out)
    }

    /// Runs the plan once and calls `tell(name, array)` with each output as soon as it is computed. An exception of
    /// `tell` ends the run and is passed on.
    fn run_telling(&self, py: Python<'_>, inputs: &Bound<'_, PyDict>, tell: Py<PyAny>) -> PyResult<()> {
        let given = given(inputs)?;
        let raw = raw(&given);
        let mut error = None;
        enter(py, || {
            self.inner.run_telling(&raw, |number, array| {
                let name = &self.inner.plan().outputs[number].name;
                let told = Python::attach(|py| {
                    tell.call1(py, (name, to_numpy(py, &array.ty, &array.bytes)?)).map(|_| ())
                });
                match told {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(e) => {
                        error = Some(e);
                        ControlFlow::Break(())
                    }
                }
            })
        })?;
        error.map_or(Ok(()), Err)
    }

    /// Runs the plan once and gives the seconds that each step took.
    fn profile(&self, py: Python<'_>, inputs: &Bound<'_, PyDict>) -> PyResult<Vec<f64>> {
        let given = given(inputs)?;
        let raw = raw(&given);
        enter(py, || self.inner.profile(&raw))
    }

    /// Runs the plan up to the first step that reads or makes a value that is not finite: its number, what it reads and
    /// what it makes, each as (name, dtype, shape, least and greatest finite value, values that are not finite).
    fn find_nonfinite(&self, py: Python<'_>, inputs: &Bound<'_, PyDict>) -> PyResult<Option<Looked>> {
        let given = given(inputs)?;
        let raw = raw(&given);
        let found = enter(py, || self.inner.find_nonfinite(&raw))?;
        let values = |all: Vec<Summary>| {
            let one = |s: Summary| (typed(&s.name, &s.ty), s.min, s.max, s.nonfinite);
            all.into_iter().map(one).collect()
        };
        Ok(found.map(|f| (f.step, values(f.inputs), values(f.outputs))))
    }
}

/// The partial sums of squares of a gradient, float64: what `global_norm` adds up in the order of the gradients.
#[pyfunction]
pub(crate) fn norm_parts<'py>(
    py: Python<'py>,
    gradient: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let Given::F32(array) = Given::new("gradient", gradient)? else {
        return Err(Failure::new("InputError", "[norm] the gradient must be float32").into());
    };
    let cols = array.shape().last().copied().unwrap_or(1);
    Ok(PyArray1::from_vec(py, pyrformer_cpu::norm_parts(array.as_slice()?, cols)))
}

/// The arrays of a dict by name.
fn given<'py>(inputs: &Bound<'py, PyDict>) -> PyResult<Vec<(String, Given<'py>)>> {
    inputs
        .iter()
        .map(|(name, value)| {
            let name: String = name.extract()?;
            let value = Given::new(&name, &value)?;
            Ok((name, value))
        })
        .collect()
}

fn raw<'a>(given: &'a [(String, Given<'_>)]) -> Vec<(&'a str, TensorType, &'a [u8])> {
    given.iter().map(|(name, g)| (name.as_str(), g.ty(), g.bytes().unwrap_or_default())).collect()
}
