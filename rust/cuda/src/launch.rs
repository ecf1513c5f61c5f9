//! Launch records: a plan's steps as what a CUDA device is told, in order, as data.
//!
//! A record is a kernel with its geometry and typed arguments, or a matrix product for cuBLASLt. Pointers are places (a
//! memory and an offset), so that records are made once, before any memory exists, and can be printed and tested anywhere.

use pyrformer_graph::plan::Port;
use pyrformer_graph::{DType, Op, Operand, Plan, Space};
use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::limits::{Limit, limits};
use crate::steps::{record, together};

/// A memory on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// The plan's own memory.
    Arena,
    /// The state with this index in `Plan::states`.
    State(usize),
    /// [`Program::constants`].
    Constants,
    /// A word that all programs of a device share: a global norm that is not finite sets it, and as long as it is set,
    /// no program writes a state behind its global norm.
    Halt,
}

impl From<Space> for Memory {
    fn from(space: Space) -> Self {
        match space {
            Space::Arena => Self::Arena,
            Space::State(i) => Self::State(i),
        }
    }
}

/// A place in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Which memory.
    pub space: Memory,
    /// Bytes from its start.
    pub offset: usize,
}

/// A kernel's argument.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arg {
    /// A pointer; `None` is null.
    Pointer(Option<Place>),
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `float`; serialised as its bits, because JSON has no infinities.
    #[serde(serialize_with = "bits")]
    F32(f32),
    /// A pointer to these in device memory, one behind the other: an array of structs, which have no gaps.
    Table(Vec<Arg>),
}

fn bits<S: Serializer>(x: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u32(x.to_bits())
}

impl From<usize> for Arg {
    /// [`program`] has checked that every count fits.
    fn from(n: usize) -> Self {
        Self::I32(i32::try_from(n).unwrap_or(i32::MAX))
    }
}

impl From<bool> for Arg {
    fn from(x: bool) -> Self {
        Self::I32(i32::from(x))
    }
}

impl From<u32> for Arg {
    fn from(n: u32) -> Self {
        Self::U32(n)
    }
}

impl From<f64> for Arg {
    fn from(x: f64) -> Self {
        Self::F32(x as f32)
    }
}

impl From<Place> for Arg {
    fn from(place: Place) -> Self {
        Self::Pointer(Some(place))
    }
}

impl From<Matrix> for Arg {
    fn from(matrix: Matrix) -> Self {
        Self::Pointer(Some(matrix.place))
    }
}

impl From<Option<Matrix>> for Arg {
    fn from(matrix: Option<Matrix>) -> Self {
        Self::Pointer(matrix.map(|m| m.place))
    }
}

/// One launch of a kernel. Shared memory is static in all kernels, so there is nothing to say of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Launch {
    /// The kernel's `extern "C"` name; `sources::of_kernel` tells its file.
    pub kernel: String,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: [usize; 3],
    /// Arguments in the kernel's order.
    pub args: Vec<Arg>,
}

/// Rows of elements in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// The first element.
    pub place: Place,
    /// Rows.
    pub rows: usize,
    /// Columns; a row is contiguous.
    pub cols: usize,
    /// Elements from row to row.
    pub ld: usize,
    /// Type of the elements.
    pub dtype: DType,
}

impl Matrix {
    /// An operand, leading axes as rows.
    #[must_use]
    pub fn of(o: &Operand) -> Self {
        let (rows, cols) = (o.ty.shape.rows(), o.ty.shape.cols());
        let place = Place { space: o.space.into(), offset: o.offset };
        Self { place, rows, cols, ld: o.row_stride, dtype: o.ty.dtype }
    }

    /// Whether rows follow one another without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.ld == self.cols || self.rows <= 1
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// `rows × cols` elements without gaps, from element `skip` of this contiguous matrix on.
    #[must_use]
    pub fn part(&self, skip: usize, rows: usize, cols: usize) -> Self {
        let offset = self.place.offset + self.dtype.size() * skip;
        Self { place: Place { offset, ..self.place }, rows, cols, ld: cols, ..*self }
    }

    /// Rows `from .. from + rows`.
    #[must_use]
    pub fn rows(&self, from: usize, rows: usize) -> Self {
        let offset = self.place.offset + self.dtype.size() * from * self.ld;
        Self { place: Place { offset, ..self.place }, rows, ..*self }
    }
}

/// A matrix product `y = op(a)·op(b) (+ c) (+ bias)`, all row-major. Shapes: op(a) [M, K], op(b) [K, N], y, c [M, N],
/// bias [N]. `c` may be `y`'s memory. Factors are of one type, all others of the result's: factors of bfloat16, which
/// tensor cores take, give either; sums are float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Product {
    /// First factor, [K, M] if transposed.
    pub a: Matrix,
    /// Whether it is.
    pub ta: bool,
    /// Second factor, [N, K] if transposed.
    pub b: Matrix,
    /// Whether it is.
    pub tb: bool,
    /// What is added.
    pub c: Option<Matrix>,
    /// The row that is added to each row.
    pub bias: Option<Place>,
    /// The result.
    pub y: Matrix,
}

/// One thing that the device does.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Record {
    /// A kernel.
    Launch(Launch),
    /// A matrix product.
    Product(Product),
}

/// A plan, ready for a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Program {
    /// In order; each with the number of its step, the first where several share a launch.
    pub records: Vec<(usize, Record)>,
    /// 32-bit words that kernels read, uploaded once.
    pub constants: Vec<u32>,
    /// Where inputs are put.
    pub inputs: Vec<Port>,
    /// Where outputs are found.
    pub outputs: Vec<Port>,
    /// What the values of the inputs must satisfy, checked before they are uploaded: kernels cannot raise errors.
    pub limits: Vec<Limit>,
    /// The states that it writes, by their index in `Plan::states`.
    pub written: Vec<usize>,
    /// Whether a global norm that is not finite ends the program: it then sets [`Memory::Halt`].
    pub halts: bool,
}

/// The records of a plan.
///
/// A global norm that is no finite number ends the writing of states there if none was written before, as on the CPU.
///
/// # Errors
/// When a step has no kernel, a tensor is too large to be counted, or a kernel behind the global norm would write a state
/// whatever that is.
pub fn program(plan: &Plan) -> Result<Program> {
    let (mut records, mut constants) = (Vec::new(), Vec::new());
    let (mut halts, mut changed) = (false, false);
    let mut i = 0;
    while i < plan.steps.len() {
        let steps = &plan.steps[i..i + together(&plan.steps[i..])];
        let op = || steps[0].op.name().to_owned();
        for o in steps.iter().flat_map(|s| s.inputs.iter().chain(&s.outputs).chain(&s.scratch)) {
            let elements = o.ty.shape.rows() * o.row_stride.max(o.ty.shape.cols());
            if elements > i32::MAX as usize {
                return Err(Error::TooLarge { step: i, op: op(), elements });
            }
            if o.ty.dtype == DType::F64 {
                let why = "kernels compute in float32; load the model with dtype \"float32\"".to_owned();
                return Err(Error::Unsupported { step: i, op: op(), why });
            }
        }
        let norm = steps[0].op == Op::GlobalNorm;
        halts |= norm && !changed;
        match record(steps, if norm { !changed } else { halts }, &mut constants) {
            Ok(made) => records.extend(made.into_iter().map(|r| (i, r))),
            Err(why) => return Err(Error::Unsupported { step: i, op: op(), why }),
        }
        changed |= steps.iter().flat_map(|s| &s.outputs).any(|o| matches!(o.space, Space::State(_)));
        i += steps.len();
    }
    Ok(Program {
        records,
        constants,
        inputs: plan.inputs.clone(),
        outputs: plan.outputs.clone(),
        limits: limits(plan),
        written: (0..plan.states.len()).filter(|&i| plan.states[i].updated).collect(),
        halts,
    })
}

impl Program {
    /// The program as JSON, for the executor.
    ///
    /// # Errors
    /// None in practice: every field has a JSON form.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}
