//! GFLOP/s of attention, forward and backward, through the executor: `cargo bench -p pyrformer-cpu --bench attention
//! [filter]`. FLOPs are those of the pairs that the mask leaves, as the plan counts them; a figure is the best of several
//! runs, since other processes can only slow a run down.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::sync::Arc;

use pyrformer_cpu::threads::Pool;
use pyrformer_cpu::{Cpu, CpuExecutor, Store};
use pyrformer_graph::autodiff::gradients;
use pyrformer_graph::op::AttentionSpec;
use pyrformer_graph::{DType, Graph, Op, TensorType, Unary, lower, passes};

struct Shape {
    what: &'static str,
    b: usize,
    t: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    causal: bool,
}

impl Shape {
    /// Seconds and FLOPs of the forward and the backward pass, the best of `runs`.
    fn measure(&self, threads: usize, runs: usize) -> Result<[(f64, u64); 2], Box<dyn std::error::Error>> {
        let &Self { b, t, heads, kv_heads, d, causal, .. } = self;
        let spec = AttentionSpec {
            heads,
            kv_heads,
            causal,
            window: None,
            scale: 1.0 / (d as f64).sqrt(),
            segments: false,
            key_bias: false,
            prefix: false,
            dropout: None,
        };
        let mut g = Graph::new();
        let types = [heads, kv_heads, kv_heads].map(|h| TensorType::new(DType::F32, [b, t, h * d]));
        let mut leaves = vec![];
        for (name, ty) in ["q", "k", "v"].into_iter().zip(&types) {
            leaves.push(g.input(name, ty.clone())?);
        }
        // A step in front, so that no thread sleeps when attention begins.
        let q = g.add1(Op::Unary(Unary::Tanh), &leaves[..1])?;
        let out = g.add1(Op::Attention(spec), &[q, leaves[1], leaves[2]])?;
        let loss = g.add_as(Op::SumTo, &[out], TensorType::new(DType::F32, []))?;
        for (name, d) in ["dq", "dk", "dv"].into_iter().zip(gradients(&mut g, loss, &leaves)?) {
            g.output(name, d)?;
        }
        let plan = Arc::new(lower(&passes::optimise(&g)?, &Cpu)?);
        let pool = Arc::new(Pool::new(threads));
        let executor = CpuExecutor::new(plan.clone(), Arc::new(Store::new()), pool)?;
        let numbers: Vec<Vec<u8>> = types
            .iter()
            .map(|ty| {
                (0..ty.shape.elements()).flat_map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0).to_ne_bytes())
            })
            .map(Iterator::collect)
            .collect();
        let inputs: Vec<(&str, TensorType, &[u8])> =
            ["q", "k", "v"].into_iter().zip(types).zip(&numbers).map(|((n, t), x)| (n, t, &x[..])).collect();
        let mut best = [(f64::INFINITY, 0); 2];
        for _ in 0..runs {
            for (step, seconds) in plan.steps.iter().zip(executor.profile(&inputs)?) {
                let at = match step.op {
                    Op::Attention(_) => 0,
                    Op::AttentionGrad(_) => 1,
                    _ => continue,
                };
                best[at] = (best[at].0.min(seconds), step.cost.flops);
            }
        }
        Ok(best)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let shape = |what, b, t, heads, kv_heads, d, causal| Shape { what, b, t, heads, kv_heads, d, causal };
    let shapes = [
        shape("4 x 128", 12, 64, 4, 4, 32, true),
        shape("6 x 384", 8, 256, 6, 6, 64, true),
        shape("bert", 16, 128, 4, 4, 64, false),
        shape("grouped", 4, 256, 8, 2, 64, true),
        shape("gpt2", 2, 256, 12, 12, 64, true),
        shape("long", 1, 2048, 4, 4, 64, true),
        shape("wide", 2, 256, 4, 4, 128, true),
    ];
    println!("{:<50} {:>17} {:>17}   GFLOP/s, forward and backward", "", "1 thread", "2 threads");
    for s in shapes {
        let &Shape { what, b, t, heads, kv_heads, d, causal } = &s;
        let label = format!("{what:<8} {b} x {t}, {heads} heads, {kv_heads} of keys, x {d} causal={causal}");
        if !label.contains(&filter) {
            continue;
        }
        print!("{label:<50}");
        for threads in [1, 2] {
            let [f, b] = s.measure(threads, 60)?.map(|(seconds, flops)| flops as f64 / seconds / 1e9);
            print!(" {f:>8.0} {b:>8.0}");
        }
        println!();
    }
    Ok(())
}
