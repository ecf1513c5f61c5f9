//! A program in single-assignment form: nodes in an order that respects their operands.

use std::collections::HashMap;

use crate::dtype::{DType, TensorType};
use crate::error::{Error, Result};
use crate::op::{Binary, Op};

/// A node's place in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// A value's place in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// One application of an operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// From which values.
    pub inputs: Vec<ValueId>,
    /// Into which values.
    pub outputs: Vec<ValueId>,
    /// The part of the model it belongs to, as a path like `transformer.h.0.attn`.
    pub scope: String,
}

/// A tensor of the program.
#[derive(Clone, Debug)]
pub struct Value {
    /// Its type.
    pub ty: TensorType,
    /// The node that computes it.
    pub node: NodeId,
    /// Which of that node's results it is.
    pub slot: usize,
}

/// A program: inputs and states in, outputs and updated states out.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    values: Vec<Value>,
    outputs: Vec<(String, ValueId)>,
    updates: Vec<(ValueId, ValueId)>,
    leaves: HashMap<String, ValueId>,
    scope: String,
}

impl Graph {
    /// An empty graph.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The nodes in order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node with this id.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// The value with this id.
    #[must_use]
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Number of values; ids run below it.
    #[must_use]
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// The type of a value.
    #[must_use]
    pub fn ty(&self, id: ValueId) -> &TensorType {
        &self.value(id).ty
    }

    /// The node that computes a value.
    #[must_use]
    pub fn producer(&self, id: ValueId) -> &Node {
        self.node(self.value(id).node)
    }

    /// Named results, in the order they were declared.
    #[must_use]
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// Pairs (state, its value after the run).
    #[must_use]
    pub fn updates(&self) -> &[(ValueId, ValueId)] {
        &self.updates
    }

    /// What a run gives out and writes: the values of outputs and of updates.
    pub fn ends(&self) -> impl Iterator<Item = ValueId> {
        self.outputs.iter().map(|o| o.1).chain(self.updates.iter().map(|u| u.1))
    }

    /// The input or state of this name.
    #[must_use]
    pub fn leaf(&self, name: &str) -> Option<ValueId> {
        self.leaves.get(name).copied()
    }

    /// Sets the scope that following nodes carry; gives the one before.
    pub fn set_scope(&mut self, scope: impl Into<String>) -> String {
        std::mem::replace(&mut self.scope, scope.into())
    }

    /// Adds a node whose result types follow from its operands.
    ///
    /// # Errors
    /// When the operands do not fit; the graph is unchanged then.
    pub fn add(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        self.push(op, inputs, None)
    }

    /// As [`Graph::add`], for an operation with one result.
    ///
    /// # Errors
    /// When the operands do not fit.
    pub fn add1(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        Ok(self.add(op, inputs)?[0])
    }

    /// Adds a node whose result type is declared: `Fill`, `Reshape`, `SumTo`, `Broadcast`.
    ///
    /// # Errors
    /// When operand and declared type do not fit.
    pub fn add_as(&mut self, op: Op, inputs: &[ValueId], ty: TensorType) -> Result<ValueId> {
        Ok(self.push(op, inputs, Some(&ty))?[0])
    }

    /// As [`Graph::add_as`], with all results; `ty` is the first one's.
    ///
    /// # Errors
    /// As [`Graph::add_as`].
    pub(crate) fn add_all_as(&mut self, op: Op, inputs: &[ValueId], ty: &TensorType) -> Result<Vec<ValueId>> {
        self.push(op, inputs, Some(ty))
    }

    /// Declares an input.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<ValueId> {
        self.leaf_node(name, Op::Input { name: name.to_owned() }, ty)
    }

    /// Declares a state.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn state(&mut self, name: &str, ty: TensorType) -> Result<ValueId> {
        self.leaf_node(name, Op::State { name: name.to_owned() }, ty)
    }

    /// Makes `value` a result called `name`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn output(&mut self, name: &str, value: ValueId) -> Result<()> {
        if self.outputs.iter().any(|(n, _)| n == name) {
            return Err(Error::Name(format!("there are two outputs called {name:?}")));
        }
        self.outputs.push((name.to_owned(), value));
        Ok(())
    }

    /// Makes `value` what `state` holds after the run.
    ///
    /// # Errors
    /// When `state` is not a state, is updated twice, or the types differ.
    pub fn update(&mut self, state: ValueId, value: ValueId) -> Result<()> {
        let Op::State { name } = &self.producer(state).op else {
            return Err(Error::Name("only a state can be updated".to_owned()));
        };
        if self.updates.iter().any(|(s, _)| *s == state) {
            return Err(Error::Name(format!("state {name:?} is updated twice")));
        }
        if self.ty(state) != self.ty(value) {
            let (old, new) = (self.ty(state), self.ty(value));
            return Err(Error::Name(format!("state {name:?} is {old}, its update is {new}")));
        }
        self.updates.push((state, value));
        Ok(())
    }

    /// `a + b`, for rules and passes.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn sum(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.add1(Op::Binary(Binary::Add), &[a, b])
    }

    /// A scalar or tensor of zeros of a value's type.
    ///
    /// # Errors
    /// None in practice.
    pub fn zeros_like(&mut self, value: ValueId) -> Result<ValueId> {
        let ty = self.ty(value).clone();
        self.add_as(Op::Fill { value: 0.0 }, &[], ty)
    }

    /// The values read by each value: how often each value is an operand, an output or an update.
    #[must_use]
    pub fn use_counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.values.len()];
        let reads = self.nodes.iter().flat_map(|n| &n.inputs);
        let ends = self.outputs.iter().map(|(_, v)| v).chain(self.updates.iter().map(|(_, v)| v));
        for v in reads.chain(ends) {
            counts[v.0 as usize] += 1;
        }
        counts
    }

    /// Type of the first floating-point leaf: what the model computes in.
    #[must_use]
    pub fn float_type(&self) -> DType {
        let leaf = self.nodes.iter().find(|n| n.op.is_leaf() && self.ty(n.outputs[0]).dtype.is_float());
        leaf.map_or(DType::F32, |n| self.ty(n.outputs[0]).dtype)
    }

    fn leaf_node(&mut self, name: &str, op: Op, ty: TensorType) -> Result<ValueId> {
        if self.leaves.contains_key(name) {
            return Err(Error::Name(format!("there are two inputs or states called {name:?}")));
        }
        let id = self.push(op, &[], Some(&ty))?[0];
        self.leaves.insert(name.to_owned(), id);
        Ok(id)
    }

    fn push(&mut self, op: Op, inputs: &[ValueId], declared: Option<&TensorType>) -> Result<Vec<ValueId>> {
        if let Some(v) = inputs.iter().find(|v| v.0 as usize >= self.values.len()) {
            return Err(Error::Internal(format!("{} reads value {} of another graph", op.name(), v.0)));
        }
        let types: Vec<&TensorType> = inputs.iter().map(|&v| self.ty(v)).collect();
        let fits = |ty: &TensorType| {
            let message = || format!("{ty} is larger than any memory; check the sizes");
            if ty.fits() {
                Ok(())
            } else {
                Err(Error::Shape { op: op.name().to_owned(), message: message() })
            }
        };
        declared.map_or(Ok(()), fits)?;
        let results = op.infer(&types, declared)?;
        results.iter().try_for_each(fits)?;
        let node = NodeId(self.nodes.len() as u32);
        let outputs: Vec<ValueId> = results
            .into_iter()
            .enumerate()
            .map(|(slot, ty)| {
                self.values.push(Value { ty, node, slot });
                ValueId(self.values.len() as u32 - 1)
            })
            .collect();
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            scope: self.scope.clone(),
        });
        Ok(outputs)
    }

    /// Rebuilds the graph node by node. `rule` adds what stands for an old node to `Rewrite::to` and gives the new ids of
    /// its results; `None` copies the node as it is, an empty list drops it (whoever reads it must then be replaced too).
    ///
    /// # Errors
    /// What `rule` gives, or an operand that no longer fits.
    pub fn rewrite(
        &self,
        rule: impl FnMut(&mut Rewrite<'_>, NodeId, &Node) -> Result<Option<Vec<ValueId>>>,
    ) -> Result<Self> {
        self.rewrite_in((0..self.nodes.len() as u32).map(NodeId), rule)
    }

    /// As [`Graph::rewrite`], visiting the nodes in another order.
    ///
    /// # Errors
    /// As [`Graph::rewrite`]; also when `order` puts a node before its operands.
    pub fn rewrite_in(
        &self,
        order: impl IntoIterator<Item = NodeId>,
        mut rule: impl FnMut(&mut Rewrite<'_>, NodeId, &Node) -> Result<Option<Vec<ValueId>>>,
    ) -> Result<Self> {
        let mut rw = Rewrite { from: self, to: Self::new(), map: vec![None; self.values.len()] };
        for id in order {
            let node = self.node(id);
            rw.to.set_scope(node.scope.clone());
            let new = match rule(&mut rw, id, node)? {
                Some(new) => new,
                None => rw.copy(node)?,
            };
            for (&old, new) in node.outputs.iter().zip(new) {
                rw.map[old.0 as usize] = Some(new);
            }
        }
        for (name, v) in &self.outputs {
            let v = rw.get(*v)?;
            rw.to.output(name, v)?;
        }
        for &(state, v) in &self.updates {
            let (state, v) = (rw.get(state)?, rw.get(v)?);
            rw.to.update(state, v)?;
        }
        rw.to.scope.clear();
        Ok(rw.to)
    }
}

/// A rewrite under way: the old graph, the new one, and which new value stands for which old one.
pub struct Rewrite<'a> {
    from: &'a Graph,
    /// The graph being built.
    pub to: Graph,
    map: Vec<Option<ValueId>>,
}

impl Rewrite<'_> {
    /// The new value that stands for an old one.
    ///
    /// # Errors
    /// When it was dropped.
    pub fn get(&self, old: ValueId) -> Result<ValueId> {
        self.map[old.0 as usize].ok_or_else(|| {
            let name = self.from.producer(old).op.name();
            Error::Internal(format!("a result of {name} was rewritten away while still in use"))
        })
    }

    /// The new values of a node's operands.
    ///
    /// # Errors
    /// When one was dropped.
    pub fn operands(&self, node: &Node) -> Result<Vec<ValueId>> {
        node.inputs.iter().map(|&v| self.get(v)).collect()
    }

    /// Says that `new` stands for `old` from here on.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        self.map[old.0 as usize] = Some(new);
    }

    /// Copies a node as it is.
    ///
    /// # Errors
    /// When an operand was dropped or no longer fits.
    pub fn copy(&mut self, node: &Node) -> Result<Vec<ValueId>> {
        let ty = self.from.ty(node.outputs[0]).clone();
        match &node.op {
            Op::Input { name } => Ok(vec![self.to.input(name, ty)?]),
            Op::State { name } => Ok(vec![self.to.state(name, ty)?]),
            op => {
                let inputs = self.operands(node)?;
                self.to.push(op.clone(), &inputs, Some(&ty))
            }
        }
    }
}
