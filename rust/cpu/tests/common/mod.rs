//! Builds small graphs with random leaves and runs them both ways.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses its part"
)]

use std::collections::HashMap;
use std::sync::Arc;

use pyrformer_cpu::kernels::cast::{narrowed, widened};
use pyrformer_cpu::reference::{Tensor, evaluate};
use pyrformer_cpu::threads::Pool;
use pyrformer_cpu::{Cpu, CpuExecutor, Store};
use pyrformer_graph::{DType, Graph, Op, Shape, TensorType, ValueId, lower, passes, verify::verify};
use pyrformer_random::Stream;

/// A graph under construction with values for its leaves.
pub struct Case {
    pub g: Graph,
    pub leaves: HashMap<String, Tensor>,
    pub states: Vec<String>,
    pub floats: Vec<(String, ValueId)>,
    dtype: DType,
    random: Stream,
}

impl Case {
    pub fn new(dtype: DType, seed: u64) -> Self {
        let (g, leaves) = (Graph::new(), HashMap::new());
        Self { g, leaves, states: vec![], floats: vec![], dtype, random: Stream::new(seed, 1, 2) }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn draw(&mut self, n: usize, low: f64, high: f64) -> Tensor {
        let draws = (0..n).map(|_| {
            let x = low + (high - low) * self.random.next_f64();
            // What f32 can hold, so that both types compute from the same numbers.
            f64::from(x as f32)
        });
        Tensor::Float(draws.collect())
    }

    /// A float input with elements in [low, high).
    pub fn float_in(&mut self, name: &str, shape: &[usize], low: f64, high: f64) -> ValueId {
        let values = self.draw(shape.iter().product(), low, high);
        self.leaves.insert(name.to_owned(), values);
        let v = self.g.input(name, TensorType::new(self.dtype, Shape(shape.to_vec()))).unwrap();
        self.floats.push((name.to_owned(), v));
        v
    }

    pub fn float(&mut self, name: &str, shape: &[usize]) -> ValueId {
        self.float_in(name, shape, -1.5, 1.5)
    }

    pub fn state(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let values = self.draw(shape.iter().product(), 0.1, 1.5);
        self.leaves.insert(name.to_owned(), values);
        self.states.push(name.to_owned());
        self.g.state(name, TensorType::new(self.dtype, Shape(shape.to_vec()))).unwrap()
    }

    pub fn ints(&mut self, name: &str, shape: &[usize], values: Vec<i32>) -> ValueId {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        self.leaves.insert(name.to_owned(), Tensor::Int(values));
        self.g.input(name, TensorType::new(DType::I32, Shape(shape.to_vec()))).unwrap()
    }

    /// Integers drawn from 0..below.
    pub fn indices(&mut self, name: &str, shape: &[usize], below: u32) -> ValueId {
        let n = shape.iter().product();
        let values = (0..n).map(|_| self.random.below(below) as i32).collect();
        self.ints(name, shape, values)
    }

    pub fn op(&mut self, op: Op, inputs: &[ValueId]) -> Vec<ValueId> {
        self.g.add(op, inputs).unwrap()
    }

    pub fn op1(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        self.g.add1(op, inputs).unwrap()
    }

    pub fn as_shape(&mut self, op: Op, x: ValueId, shape: &[usize]) -> ValueId {
        let ty = TensorType::new(self.dtype, Shape(shape.to_vec()));
        self.g.add_as(op, &[x], ty).unwrap()
    }

    /// What the definitions give.
    pub fn expected(&self) -> HashMap<String, Tensor> {
        evaluate(&self.g, &self.leaves)
    }

    /// What the executor gives, after all passes or none.
    pub fn computed(&self, optimise: bool, threads: usize) -> HashMap<String, Tensor> {
        verify(&self.g).unwrap();
        let graph = if optimise { passes::optimise(&self.g).unwrap() } else { self.g.clone() };
        run(&graph, &self.leaves, threads)
    }
}

fn bytes(dtype: DType, x: &Tensor) -> Vec<u8> {
    match (dtype, x) {
        (DType::F32, Tensor::Float(x)) => x.iter().flat_map(|&v| (v as f32).to_ne_bytes()).collect(),
        (DType::F64, Tensor::Float(x)) => x.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        (DType::Bf16, Tensor::Float(x)) => x.iter().flat_map(|&v| narrowed(v as f32).to_ne_bytes()).collect(),
        (DType::I32, Tensor::Int(x)) => x.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        _ => panic!("a leaf of the wrong kind"),
    }
}

fn tensor(ty: &TensorType, raw: &[u8]) -> Tensor {
    match ty.dtype {
        DType::F32 => {
            Tensor::Float(raw.as_chunks().0.iter().map(|&c| f64::from(f32::from_ne_bytes(c))).collect())
        }
        DType::F64 => Tensor::Float(raw.as_chunks().0.iter().map(|&c| f64::from_ne_bytes(c)).collect()),
        DType::Bf16 => {
            let value = |&c| f64::from(widened(u16::from_ne_bytes(c)));
            Tensor::Float(raw.as_chunks().0.iter().map(value).collect())
        }
        DType::I32 => Tensor::Int(raw.as_chunks().0.iter().map(|&c| i32::from_ne_bytes(c)).collect()),
        DType::F16 => panic!("float16 on the CPU"),
    }
}

/// Runs a graph on the executor; gives outputs and states after the run.
pub fn run(graph: &Graph, leaves: &HashMap<String, Tensor>, threads: usize) -> HashMap<String, Tensor> {
    let plan = Arc::new(lower(graph, &Cpu).unwrap());
    let store = Arc::new(Store::new());
    for s in &plan.states {
        store.set(&s.name, &s.ty, &bytes(s.ty.dtype, &leaves[&s.name])).unwrap();
    }
    let executor = CpuExecutor::new(plan.clone(), store.clone(), Arc::new(Pool::new(threads))).unwrap();
    let inputs: Vec<(&str, TensorType, Vec<u8>)> = plan
        .inputs
        .iter()
        .map(|p| (p.name.as_str(), p.operand.ty.clone(), bytes(p.operand.ty.dtype, &leaves[&p.name])))
        .collect();
    let borrowed: Vec<(&str, TensorType, &[u8])> =
        inputs.iter().map(|(n, t, b)| (*n, t.clone(), &b[..])).collect();
    let results = executor.run(&borrowed).unwrap();
    let mut found: HashMap<String, Tensor> =
        plan.outputs.iter().zip(results).map(|(p, a)| (p.name.clone(), tensor(&a.ty, &a.bytes))).collect();
    for s in plan.states.iter().filter(|s| s.updated) {
        let (ty, raw) = store.get(&s.name).unwrap();
        found.insert(s.name.clone(), tensor(&ty, &raw));
    }
    found
}

/// Asserts that two sets of results agree to `tolerance` relative to the largest element of each.
pub fn assert_close(
    what: &str,
    got: &HashMap<String, Tensor>,
    want: &HashMap<String, Tensor>,
    tolerance: f64,
) {
    assert_eq!(got.len(), want.len(), "{what}: other results");
    for (name, w) in want {
        let (g, w) = (got[name].floats(), w.floats());
        assert_eq!(g.len(), w.len(), "{what} {name}");
        let scale = w.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
        for (i, (&g, &w)) in g.iter().zip(w).enumerate() {
            let same = g == w || (g.is_nan() && w.is_nan());
            assert!(same || (g - w).abs() <= tolerance * scale, "{what} {name}[{i}]: {g} is not {w}");
        }
    }
}
