//! Looks for the first number of a run that is not finite: the values of each step before and after it, one by one.

use std::ops::ControlFlow;

use pyrformer_graph::{DType, Op, Operand, Space, Step, TensorType};

use crate::error::{Error, Result};
use crate::executor::{CpuExecutor, Memory, Moment};
use crate::kernels::cast::widened;
use crate::real::Real;
use crate::view::Mat;

/// An operand or result of a step, and what values it holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Where it comes from: the name of an input or a state, or `step 12`; empty for a result.
    pub name: String,
    /// Its type.
    pub ty: TensorType,
    /// The least of the finite values; +∞ where there is none.
    pub min: f64,
    /// The greatest of the finite values; −∞ where there is none.
    pub max: f64,
    /// How many values are not finite.
    pub nonfinite: usize,
}

/// Where a run stops being finite.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// The number of the step.
    pub step: usize,
    /// What it reads. Where one of these is not finite, it was given so, as an input or a state, and the step did not
    /// run.
    pub inputs: Vec<Summary>,
    /// What it makes; empty where it did not run.
    pub outputs: Vec<Summary>,
}

impl CpuExecutor {
    /// Runs the plan up to the first step that reads or makes a value that is not finite; `None` where all steps ran.
    /// As in any run, a plan's states keep their values where its global norm is not finite.
    ///
    /// The −∞ that attention keeps for a row that sees nothing is no finding.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn find_nonfinite(&self, inputs: &[(&str, TensorType, &[u8])]) -> Result<Option<NonFinite>> {
        let (mut read, mut found) = (Vec::new(), None);
        self.watched(
            inputs,
            |moment, memory| {
                match moment {
                    Moment::Before(number) => {
                        let step = &self.plan().steps[number];
                        read = (0..step.inputs.len())
                            .map(|i| {
                                let o = &step.inputs[i];
                                let void = matches!(step.op, Op::AttentionGrad(_)) && i == 5;
                                summary(memory, o, self.origin(number, o), void)
                            })
                            .collect::<Result<_>>()?;
                        if read.iter().any(|s| s.nonfinite > 0) {
                            let inputs = std::mem::take(&mut read);
                            found = Some(NonFinite { step: number, inputs, outputs: Vec::new() });
                        }
                    }
                    Moment::After(number) => {
                        let made = results(memory, &self.plan().steps[number])?;
                        if made.iter().any(|s| s.nonfinite > 0) {
                            let inputs = std::mem::take(&mut read);
                            found = Some(NonFinite { step: number, inputs, outputs: made });
                        }
                    }
                }
                Ok(if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            },
            |_| (),
        )?;
        Ok(found)
    }

    /// What wrote an operand of a step.
    fn origin(&self, number: usize, operand: &Operand) -> String {
        let plan = self.plan();
        if let Space::State(i) = operand.space {
            return plan.states[i].name.clone();
        }
        let holds = |o: &Operand| {
            o.space == operand.space
                && o.offset <= operand.offset
                && operand.offset < o.end().max(o.offset + 1)
        };
        let before = plan.steps[..number].iter().rposition(|s| s.outputs.iter().any(holds));
        let port = || plan.inputs.iter().find(|p| holds(&p.operand)).map(|p| p.name.clone());
        before.map(|step| format!("step {step}")).or_else(port).unwrap_or_default()
    }
}

fn results(memory: &Memory<'_>, step: &Step) -> Result<Vec<Summary>> {
    let void = |i: usize| matches!(step.op, Op::Attention(_)) && i == 1;
    step.outputs.iter().enumerate().map(|(i, o)| summary(memory, o, String::new(), void(i))).collect()
}

/// The values of an operand; with `void`, −∞ counts as finite.
fn summary(memory: &Memory<'_>, o: &Operand, name: String, void: bool) -> Result<Summary> {
    let (min, max, nonfinite) = match o.ty.dtype {
        DType::I32 => {
            let view: Mat<'_, i32> = memory.mat(o);
            let all = || (0..view.rows).flat_map(|r| view.row(r)).map(|&x| f64::from(x));
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max), 0)
        }
        DType::F32 => match memory.laid_out(o)? {
            Some(floats) => range(Mat::new(&floats, 1, floats.len()), void),
            None => range::<f32>(memory.mat(o), void),
        },
        DType::F64 => range::<f64>(memory.mat(o), void),
        DType::F16 => return Err(Error::Unsupported("a value", DType::F16)),
        DType::Bf16 => {
            let view: Mat<'_, u16> = memory.mat(o);
            let floats: Vec<f32> = (0..view.rows).flat_map(|r| view.row(r)).map(|&x| widened(x)).collect();
            range(Mat::new(&floats, 1, floats.len()), void)
        }
    };
    Ok(Summary { name, ty: o.ty.clone(), min, max, nonfinite })
}

/// Least and greatest finite value, and how many are not finite.
fn range<T: Real>(view: Mat<'_, T>, void: bool) -> (f64, f64, usize) {
    let mut found = (f64::INFINITY, f64::NEG_INFINITY, 0);
    for &x in (0..view.rows).flat_map(|r| view.row(r)) {
        let x = x.to_f64();
        if x.is_finite() {
            found = (found.0.min(x), found.1.max(x), found.2);
        } else if !(void && x == f64::NEG_INFINITY) {
            found.2 += 1;
        }
    }
    found
}
