//! Graph → Plan: views instead of layout operations, results in place where that is safe, a memory plan for the rest.
//!
//! The schedule is the graph's own order. Reshape, split and concat cost nothing where they can be views: a split's
//! parts are column ranges of its operand, a concat's operands are computed straight into column ranges of the result.
//! A state's new value is computed over the old one when nobody reads the old one later, and copied at the end otherwise.

use std::collections::HashMap;

use crate::cost::cost;
use crate::dtype::TensorType;
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::memory::{Lifetime, place};
use crate::op::Op;
use crate::plan::{Operand, Plan, Port, Space, StateSlot, Step};

/// What lowering must know of the executor that will run the plan.
pub trait Target {
    /// Bytes of work space that the kernel of `op` needs on operands of these types.
    fn scratch_bytes(&self, op: &Op, inputs: &[&TensorType], outputs: &[&TensorType]) -> usize;
}

/// Lowers an optimised graph.
///
/// # Errors
/// When an update exchanges two states, which has no order; internal errors otherwise.
pub fn lower(graph: &Graph, target: &dyn Target) -> Result<Plan> {
    let mut lowering = Lowering::new(graph)?;
    for i in 0..graph.nodes().len() {
        lowering.node(i)?;
    }
    lowering.finish(target)
}

/// Read after the last step: an output or an update.
const END: usize = usize::MAX;

/// Rows of a buffer, before the buffer has an address.
#[derive(Clone, Copy, Debug, PartialEq)]
struct View {
    buffer: usize,
    offset: usize,
    row_stride: usize,
}

#[derive(Debug)]
struct Buffer {
    state: Option<usize>,
    bytes: usize,
    /// The last node that reads any value in it, as known so far.
    last_use: usize,
    /// Steps that touch it.
    first: usize,
    last: usize,
}

struct Draft {
    op: Op,
    inputs: Vec<(TensorType, View)>,
    outputs: Vec<(TensorType, View)>,
    scope: String,
}

struct Lowering<'a> {
    graph: &'a Graph,
    states: Vec<StateSlot>,
    inputs: Vec<(String, ValueId)>,
    buffers: Vec<Buffer>,
    views: Vec<Option<View>>,
    last_use: Vec<usize>,
    /// Values computed straight into a concat's result: (result, first column).
    parts: HashMap<ValueId, (ValueId, usize)>,
    /// Values computed over the state they update.
    over_state: HashMap<ValueId, ValueId>,
    drafts: Vec<Draft>,
}

impl<'a> Lowering<'a> {
    fn new(graph: &'a Graph) -> Result<Self> {
        let mut lowering = Self {
            graph,
            states: Vec::new(),
            inputs: Vec::new(),
            buffers: Vec::new(),
            views: vec![None; graph.value_count()],
            last_use: last_uses(graph),
            parts: HashMap::new(),
            over_state: HashMap::new(),
            drafts: Vec::new(),
        };
        for node in graph.nodes().iter().filter(|n| n.op == Op::Concat) {
            let mut column = 0;
            for &v in &node.inputs {
                let from = graph.producer(v);
                let computed = !from.op.is_layout() && !from.op.is_leaf();
                let fresh =
                    computed && !lowering.parts.contains_key(&v) && !graph.updates().iter().any(|u| u.1 == v);
                if fresh {
                    lowering.parts.insert(v, (node.outputs[0], column));
                }
                column += graph.ty(v).shape.cols();
            }
        }
        for &(state, v) in graph.updates() {
            if matches!(graph.producer(v).op, Op::State { .. }) && v != state {
                return Err(Error::Name(
                    "a state cannot be updated to another state; compute something".to_owned(),
                ));
            }
            if lowering.may_overwrite(state, v) {
                lowering.over_state.insert(v, state);
            }
        }
        Ok(lowering)
    }

    /// Whether `v` can be computed over `state`: its kernel allows it, and nobody else reads the old value later.
    fn may_overwrite(&self, state: ValueId, v: ValueId) -> bool {
        let at = self.graph.value(v).node.0 as usize;
        let node = &self.graph.nodes()[at];
        let pair = node
            .op
            .in_place()
            .into_iter()
            .any(|(i, o)| node.outputs.get(o) == Some(&v) && node.inputs.get(i) == Some(&state));
        let once = node.inputs.iter().filter(|&&x| x == state).count() == 1;
        pair && once && self.last_use[state.0 as usize] == at
    }

    fn buffer(&mut self, bytes: usize, state: Option<usize>) -> usize {
        self.buffers.push(Buffer { state, bytes, last_use: 0, first: usize::MAX, last: 0 });
        self.buffers.len() - 1
    }

    fn fresh(&mut self, ty: &TensorType) -> View {
        View { buffer: self.buffer(ty.bytes(), None), offset: 0, row_stride: ty.shape.cols() }
    }

    fn ty(&self, v: ValueId) -> &'a TensorType {
        self.graph.ty(v)
    }

    fn view(&self, v: ValueId) -> Result<View> {
        self.views[v.0 as usize].ok_or_else(|| Error::Internal(format!("value {} has no memory", v.0)))
    }

    fn set(&mut self, v: ValueId, view: View) {
        self.views[v.0 as usize] = Some(view);
        let buffer = &mut self.buffers[view.buffer];
        buffer.last_use = buffer.last_use.max(self.last_use[v.0 as usize]);
    }

    fn copy(&mut self, ty: &TensorType, from: View, to_ty: &TensorType, to: View, scope: &str) {
        self.drafts.push(Draft {
            op: Op::Copy,
            inputs: vec![(ty.clone(), from)],
            outputs: vec![(to_ty.clone(), to)],
            scope: scope.to_owned(),
        });
    }

    fn node(&mut self, i: usize) -> Result<()> {
        let node = &self.graph.nodes()[i];
        match &node.op {
            Op::Input { name } => {
                let v = node.outputs[0];
                let view = self.fresh(self.ty(v));
                self.buffers[view.buffer].first = 0;
                self.inputs.push((name.clone(), v));
                self.set(v, view);
            }
            Op::State { name } => {
                let v = node.outputs[0];
                let ty = self.ty(v).clone();
                let updated = self.graph.updates().iter().any(|u| u.0 == v);
                let buffer = self.buffer(ty.bytes(), Some(self.states.len()));
                let row_stride = ty.shape.cols();
                self.states.push(StateSlot { name: name.clone(), ty, updated });
                self.set(v, View { buffer, offset: 0, row_stride });
            }
            Op::Reshape => {
                let (x, y) = (node.inputs[0], node.outputs[0]);
                let (from, old, new) = (self.view(x)?, self.ty(x), self.ty(y));
                let contiguous = from.row_stride == old.shape.cols() || old.shape.rows() <= 1;
                let view = if contiguous {
                    View { row_stride: new.shape.cols(), ..from }
                } else if old.shape.cols() == new.shape.cols() {
                    from
                } else {
                    let to = self.fresh(old);
                    self.copy(old, from, old, to, &node.scope);
                    View { row_stride: new.shape.cols(), ..to }
                };
                self.set(y, view);
            }
            Op::Split { .. } => {
                let from = self.view(node.inputs[0])?;
                let mut column = 0;
                for &y in &node.outputs {
                    let ty = self.ty(y);
                    self.set(y, View { offset: from.offset + column * ty.dtype.size(), ..from });
                    column += ty.shape.cols();
                }
            }
            Op::Concat => {
                let y = node.outputs[0];
                let whole = self.concat_view(y);
                let mut column = 0;
                for &x in &node.inputs {
                    let ty = self.ty(x);
                    let part = View { offset: whole.offset + column * ty.dtype.size(), ..whole };
                    let from = self.view(x)?;
                    if from != part {
                        self.copy(ty, from, ty, part, &node.scope);
                    }
                    column += ty.shape.cols();
                }
            }
            _ => self.kernel(i, node)?,
        }
        Ok(())
    }

    /// The memory of a concat's result, made when its first part is computed.
    fn concat_view(&mut self, y: ValueId) -> View {
        if let Some(view) = self.views[y.0 as usize] {
            return view;
        }
        let view = self.fresh(self.ty(y));
        self.set(y, view);
        view
    }

    fn kernel(&mut self, i: usize, node: &Node) -> Result<()> {
        let inputs: Result<Vec<_>> =
            node.inputs.iter().map(|&x| Ok((self.ty(x).clone(), self.view(x)?))).collect();
        let inputs = inputs?;
        let pairs = node.op.in_place();
        let mut taken: Vec<usize> = Vec::new();
        let mut outputs = Vec::new();
        for (slot, &y) in node.outputs.iter().enumerate() {
            let ty = self.ty(y).clone();
            let view = if let Some(&(whole, column)) = self.parts.get(&y) {
                let whole = self.concat_view(whole);
                View { offset: whole.offset + column * ty.dtype.size(), ..whole }
            } else if let Some(&state) = self.over_state.get(&y) {
                self.view(state)?
            } else {
                let reuse = pairs.iter().filter(|p| p.1 == slot).find_map(|&(operand, _)| {
                    let (from_ty, from) = inputs.get(operand)?;
                    let dies = self.buffers[from.buffer].state.is_none()
                        && self.buffers[from.buffer].last_use == i
                        && !taken.contains(&from.buffer);
                    let alone =
                        inputs.iter().enumerate().all(|(k, x)| k == operand || x.1.buffer != from.buffer);
                    (dies && alone && *from_ty == ty).then_some(*from)
                });
                match reuse {
                    Some(view) => view,
                    None => self.fresh(&ty),
                }
            };
            taken.push(view.buffer);
            self.set(y, view);
            outputs.push((ty, view));
        }
        self.drafts.push(Draft { op: node.op.clone(), inputs, outputs, scope: node.scope.clone() });
        Ok(())
    }

    fn finish(mut self, target: &dyn Target) -> Result<Plan> {
        let mut outputs = Vec::new();
        for (name, v) in self.graph.outputs() {
            let (ty, mut view) = (self.ty(*v), self.view(*v)?);
            // The caller reads after the updates: what it asked for is the value before.
            if self.graph.producer(*v).op.is_leaf() {
                let to = self.fresh(ty);
                self.copy(ty, view, ty, to, "");
                view = to;
            }
            outputs.push((name.clone(), ty.clone(), view));
        }
        for &(state, v) in self.graph.updates() {
            let (from, to) = (self.view(v)?, self.view(state)?);
            if from != to {
                self.copy(self.ty(v), from, self.ty(state), to, "");
            }
        }
        let scratch = self.lifetimes(target, &outputs);
        let arena: Vec<usize> =
            (0..self.buffers.len()).filter(|&b| self.buffers[b].state.is_none()).collect();
        let lifetimes: Vec<Lifetime> = arena
            .iter()
            .map(|&b| {
                let Buffer { bytes, first, last, .. } = self.buffers[b];
                Lifetime { bytes, first: first.min(last), last }
            })
            .collect();
        let layout = place(&lifetimes);
        let mut base = vec![0; self.buffers.len()];
        for (&b, &offset) in arena.iter().zip(&layout.offsets) {
            base[b] = offset;
        }
        let operand = |(ty, view): &(TensorType, View)| Operand {
            ty: ty.clone(),
            space: self.buffers[view.buffer].state.map_or(Space::Arena, Space::State),
            offset: base[view.buffer] + view.offset,
            row_stride: view.row_stride,
        };
        let port = |name: &str, ty: &TensorType, view: View| Port {
            name: name.to_owned(),
            operand: operand(&(ty.clone(), view)),
        };
        let steps = self
            .drafts
            .iter()
            .zip(scratch)
            .map(|(d, scratch)| {
                let (ins, outs): (Vec<_>, Vec<_>) =
                    (d.inputs.iter().map(|x| &x.0).collect(), d.outputs.iter().map(|x| &x.0).collect());
                Step {
                    cost: cost(&d.op, &ins, &outs),
                    op: d.op.clone(),
                    inputs: d.inputs.iter().map(operand).collect(),
                    outputs: d.outputs.iter().map(operand).collect(),
                    scratch: scratch.as_ref().map(operand),
                    scope: d.scope.clone(),
                }
            })
            .collect();
        let inputs: Result<Vec<Port>> =
            self.inputs.iter().map(|(name, v)| Ok(port(name, self.ty(*v), self.view(*v)?))).collect();
        Ok(Plan {
            inputs: inputs?,
            outputs: outputs.iter().map(|(name, ty, view)| port(name, ty, *view)).collect(),
            states: self.states.clone(),
            steps,
            arena_bytes: layout.arena_bytes,
            live_bytes: layout.live_bytes,
        })
    }

    /// Fills in which steps touch each buffer, and makes the work space of each step.
    fn lifetimes(
        &mut self,
        target: &dyn Target,
        outputs: &[(String, TensorType, View)],
    ) -> Vec<Option<(TensorType, View)>> {
        let mut scratch = Vec::new();
        for step in 0..self.drafts.len() {
            let draft = &self.drafts[step];
            let (ins, outs): (Vec<_>, Vec<_>) =
                (draft.inputs.iter().map(|x| &x.0).collect(), draft.outputs.iter().map(|x| &x.0).collect());
            let bytes = target.scratch_bytes(&draft.op, &ins, &outs);
            let touched: Vec<usize> = draft.inputs.iter().chain(&draft.outputs).map(|x| x.1.buffer).collect();
            let work = (bytes > 0).then(|| {
                let ty = TensorType::new(crate::DType::I32, [bytes.div_ceil(4)]);
                let view = self.fresh(&ty);
                (ty, view)
            });
            for b in touched.into_iter().chain(work.as_ref().map(|w| w.1.buffer)) {
                let buffer = &mut self.buffers[b];
                buffer.first = buffer.first.min(step);
                buffer.last = buffer.last.max(step);
            }
            scratch.push(work);
        }
        for (_, _, view) in outputs {
            let buffer = &mut self.buffers[view.buffer];
            buffer.first = buffer.first.min(self.drafts.len());
            buffer.last = self.drafts.len();
        }
        scratch
    }
}

/// For each value, the last node that reads it, directly or through a view of it; [`END`] for outputs and updates.
fn last_uses(graph: &Graph) -> Vec<usize> {
    let mut last = vec![0; graph.value_count()];
    for (_, v) in graph.outputs() {
        last[v.0 as usize] = END;
    }
    for (_, v) in graph.updates() {
        last[v.0 as usize] = END;
    }
    for (i, node) in graph.nodes().iter().enumerate().rev() {
        let through = if node.op.is_layout() {
            node.outputs.iter().map(|v| last[v.0 as usize]).max().unwrap_or(0)
        } else {
            0
        };
        for v in &node.inputs {
            let slot = &mut last[v.0 as usize];
            *slot = (*slot).max(i).max(through);
        }
    }
    last
}
