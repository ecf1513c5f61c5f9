//! A decoding program of the CPU as the model that a search takes turns with.
//!
//! Letters: B sequences that the program is made for, S cache slots, V vocabulary size.

use pyrformer_cpu::CpuExecutor;
use pyrformer_graph::plan::Port;
use pyrformer_search::{Model, Positions, Step};

use crate::enter::Failure;

/// The names of a decoding program's inputs: tokens and positions [B, 1], the table [B, S], and of each sequence the
/// cache row it writes to, where it begins, how many tokens it reads, and after which token of all logits are wanted.
const INPUTS: [&str; 7] = ["input_ids", "position_ids", "rows", "row", "start", "count", "last"];

/// A program of one token a sequence, and what one step after the other is fed with.
pub(crate) struct Program<'a> {
    executor: &'a CpuExecutor,
    batch: usize,
    slots: usize,
    /// The number of the first position.
    offset: i32,
    /// In the order of [`INPUTS`].
    values: [Vec<i32>; 7],
    /// Of each of the plan's inputs, its number there.
    order: Vec<usize>,
    logits: Vec<f32>,
}

impl<'a> Program<'a> {
    /// Looks whether `executor` runs such a program.
    ///
    /// # Errors
    /// When it runs another one.
    pub(crate) fn new(executor: &'a CpuExecutor, slots: usize, offset: i32) -> Result<Self, Failure> {
        let plan = executor.plan();
        let rows = plan.inputs.iter().find(|p| p.name == "rows").map(|p| p.operand.ty.shape.0.clone());
        let batch = match rows.as_deref() {
            Some(&[batch, s]) if s == slots => batch,
            _ => 0,
        };
        let sizes = Self::sizes(batch, slots);
        let number = |port: &Port| {
            let number = INPUTS.iter().position(|name| *name == port.name)?;
            (port.operand.ty.shape.elements() == sizes[number]).then_some(number)
        };
        let order: Option<Vec<usize>> = plan.inputs.iter().map(number).collect();
        let Some(order) = order.filter(|_| batch > 0 && plan.outputs.len() == 1) else {
            let message =
                format!("[decode] this is no program that reads a token of each sequence with {slots} slots");
            return Err(Failure::new("InputError", message));
        };
        let mut values = sizes.map(|size| vec![0; size]);
        // Each sequence has one token, the last.
        values[6] = (0..batch as i32).collect();
        Ok(Self { executor, batch, slots, offset, values, order, logits: Vec::new() })
    }

    fn sizes(batch: usize, slots: usize) -> [usize; 7] {
        [batch, batch, batch * slots, batch, batch, batch, batch]
    }
}

impl Model for Program<'_> {
    type Error = Failure;

    /// Half as many sequences, or fewer, are for a smaller program.
    fn takes(&self, active: usize) -> bool {
        active.next_power_of_two() == self.batch
    }

    fn read(&mut self, step: &Step, positions: &Positions) -> Result<&[f32], Failure> {
        let active = step.tokens.len();
        let [ids, places, rows, row, start, count, _] = &mut self.values;
        // What stands behind the active sequences writes nothing: it has no tokens.
        count.fill(0);
        for i in 0..active {
            let at = positions.lengths()[i] - 1;
            ids[i] = step.tokens[i].cast_signed();
            places[i] = at + self.offset;
            row[i] = step.sequences[i].cast_signed();
            (start[i], count[i]) = (at, 1);
        }
        rows[..active * self.slots].copy_from_slice(positions.rows());
        let ports = self.executor.plan().inputs.iter().zip(&self.order);
        let inputs: Vec<_> = ports
            .map(|(port, &number)| {
                let values = &self.values[number][..];
                // SAFETY: integers have no padding, and any byte may be read.
                let bytes =
                    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
                (port.name.as_str(), port.operand.ty.clone(), bytes)
            })
            .collect();
        self.logits.clear();
        self.executor.run_into(&inputs, active, &mut self.logits)?;
        Ok(&self.logits)
    }
}
