//! A plan: the flat list of kernels that an executor walks, every operand at a fixed place in memory.
//!
//! A plan is data. It can be printed ([`Plan::table`]), serialised (serde), costed and compared; it holds no pointer and
//! no code, so that the CPU and the CUDA executor walk the same one.

use serde::{Deserialize, Serialize};

use crate::cost::Cost;
use crate::dtype::TensorType;
use crate::op::Op;
use crate::print::describe;

/// Which memory an operand lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Space {
    /// The plan's own memory, reused from step to step.
    Arena,
    /// The state with this index in [`Plan::states`], kept between runs.
    State(usize),
}

/// Where a tensor lies: rows of `ty.shape.cols()` elements, `row_stride` apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operand {
    /// Element type and shape.
    pub ty: TensorType,
    /// Which memory.
    pub space: Space,
    /// Bytes from its start.
    pub offset: usize,
    /// Elements from one row to the next; the row length where there are no gaps.
    pub row_stride: usize,
}

impl Operand {
    /// Whether its rows follow one another without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.row_stride == self.ty.shape.cols() || self.ty.shape.rows() <= 1
    }

    /// The bytes it touches, gaps included: `offset .. end`.
    #[must_use]
    pub fn end(&self) -> usize {
        let (rows, cols) = (self.ty.shape.rows(), self.ty.shape.cols());
        let elements = if rows == 0 { 0 } else { (rows - 1) * self.row_stride + cols };
        self.offset + elements * self.ty.dtype.size()
    }
}

/// One kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What is computed.
    pub op: Op,
    /// Operands, in the operation's order.
    pub inputs: Vec<Operand>,
    /// Results, in the operation's order. Some may share memory with an operand (`Op::in_place`).
    pub outputs: Vec<Operand>,
    /// Work space that lives only during the step.
    pub scratch: Option<Operand>,
    /// The part of the model it belongs to.
    pub scope: String,
    /// Arithmetic and traffic.
    pub cost: Cost,
}

/// A named operand of the plan as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub operand: Operand,
}

/// A named tensor kept between runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateSlot {
    /// Its name.
    pub name: String,
    /// Its type; always contiguous.
    pub ty: TensorType,
    /// Whether a run changes it.
    pub updated: bool,
}

/// A compiled program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What the caller must fill before a run.
    pub inputs: Vec<Port>,
    /// What the caller may read after a run.
    pub outputs: Vec<Port>,
    /// What is kept between runs.
    pub states: Vec<StateSlot>,
    /// The kernels in order.
    pub steps: Vec<Step>,
    /// Size of the arena: the peak of all inputs, intermediate values, work space and outputs.
    pub arena_bytes: usize,
    /// The largest sum of what is alive at one step: no plan with this schedule can need less.
    pub live_bytes: usize,
}

impl Plan {
    /// Bytes of all states.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.states.iter().map(|s| s.ty.bytes()).sum()
    }

    /// Floating-point operations of one run.
    #[must_use]
    pub fn flops(&self) -> u64 {
        self.steps.iter().map(|s| s.cost.flops).sum()
    }

    /// Bytes that the kernels of one run read and write.
    #[must_use]
    pub fn traffic_bytes(&self) -> u64 {
        self.steps.iter().map(|s| s.cost.bytes).sum()
    }

    /// The plan as JSON.
    ///
    /// # Errors
    /// None in practice: a plan has no value that JSON lacks but non-finite attributes.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// The steps as rows of text: number, operation, operands, results, where those lie (an offset into the arena, or
    /// "state"), bytes, FLOPs, scope.
    #[must_use]
    pub fn table(&self) -> Vec<[String; 8]> {
        let types = |ports: &[Operand]| ports.iter().map(|o| o.ty.to_string()).collect::<Vec<_>>().join(" ");
        let place = |o: &Operand| match o.space {
            Space::Arena => o.offset.to_string(),
            Space::State(_) => "state".to_owned(),
        };
        self.steps
            .iter()
            .enumerate()
            .map(|(i, s)| {
                [
                    i.to_string(),
                    describe(&s.op),
                    types(&s.inputs),
                    types(&s.outputs),
                    s.outputs.iter().map(place).collect::<Vec<_>>().join(" "),
                    s.cost.bytes.to_string(),
                    s.cost.flops.to_string(),
                    s.scope.clone(),
                ]
            })
            .collect()
    }
}
