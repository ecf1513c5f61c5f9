//! The one way from Python into the core: detach from the interpreter, run, turn errors and panics into exceptions.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyType};

/// An error on its way to Python: the name of its class in `pyrformer.errors`, and its message.
#[derive(Debug)]
pub(crate) struct Failure {
    class: &'static str,
    message: String,
}

impl Failure {
    pub(crate) fn new(class: &'static str, error: impl ToString) -> Self {
        // A value of a damaged file may stand in the message; that stays one line.
        let message = error.to_string().replace('\n', "\\n").replace('\r', "\\r");
        Self { class, message }
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| match class(py, failure.class) {
            Ok(class) => PyErr::from_type(class, (failure.message,)),
            Err(e) => e,
        })
    }
}

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyType>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = MODULE.get_or_try_init(py, || Ok::<_, PyErr>(py.import("pyrformer.errors")?.unbind()))?;
    Ok(module.bind(py).getattr(PyString::new(py, name))?.cast_into::<PyType>()?)
}

impl From<pyrformer_graph::Error> for Failure {
    fn from(e: pyrformer_graph::Error) -> Self {
        use pyrformer_graph::Error as E;
        let class = match e {
            E::Shape { .. } | E::DType { .. } => "ShapeError",
            E::Name(_) | E::Derivative(_) => "GraphError",
            E::Internal(_) => "InternalError",
        };
        Self::new(class, e)
    }
}

impl From<pyrformer_cpu::Error> for Failure {
    fn from(e: pyrformer_cpu::Error) -> Self {
        use pyrformer_cpu::Error as E;
        let class = match e {
            E::Index { .. } | E::Input(_) => "InputError",
            E::State(_) => "StateError",
            E::Unsupported(..) => "DeviceError",
            E::Memory(_) => "ResourceError",
            E::Internal(_) => "InternalError",
        };
        Self::new(class, e)
    }
}

/// Where the last panic of any thread happened; shown with it.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps panics from printing: they reach Python as `InternalError`.
pub(crate) fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line()));
        if let Ok(mut last) = LAST_PANIC.lock() {
            *last = place;
        }
    }));
}

/// Runs `f` without the interpreter. An error becomes an exception; so does a panic, as `InternalError`.
pub(crate) fn enter<T: Send, E>(py: Python<'_>, f: impl FnOnce() -> Result<T, E> + Send) -> PyResult<T>
where
    Failure: From<E>,
    E: Send,
{
    match py.detach(|| catch_unwind(AssertUnwindSafe(f))) {
        Ok(result) => result.map_err(|e| Failure::from(e).into()),
        Err(panic) => Err(Failure::new("InternalError", describe(&*panic)).into()),
    }
}

fn describe(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown panic".to_owned());
    let place = LAST_PANIC.lock().ok().and_then(|mut last| last.take()).unwrap_or_default();
    format!("[core] internal error, please report it: {text}{place}")
}
