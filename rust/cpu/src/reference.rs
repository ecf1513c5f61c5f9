//! The naive twin of the executor: every operation as plain loops over owned `f64` tensors, straight from its definition.
//!
//! It interprets a [`Graph`] node by node, with no views, no reuse of memory and no threads, so that a comparison with
//! the executor checks kernels, passes, lowering and memory plan together. Slow on purpose.

use std::collections::HashMap;

use pyrformer_graph::op::{AttentionSpec, DropoutSpec, Epilogue, LossSpec, RelativeSpec};
use pyrformer_graph::{Binary, DType, Graph, Op, Shape, Unary};

use crate::kernels::cast::round_bf16;
use crate::kernels::dropout::Keep;
use crate::kernels::rounding::Rounding;

/// A tensor in plain memory.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    /// Floating-point elements, row-major.
    Float(Vec<f64>),
    /// Integer elements, row-major.
    Int(Vec<i32>),
}

impl Tensor {
    /// The floating-point elements.
    ///
    /// # Panics
    /// If they are integers.
    #[must_use]
    pub fn floats(&self) -> &[f64] {
        match self {
            Self::Float(x) => x,
            Self::Int(_) => panic!("an integer tensor where floats are expected"),
        }
    }

    /// The integer elements.
    ///
    /// # Panics
    /// If they are floats.
    #[must_use]
    pub fn ints(&self) -> &[i32] {
        match self {
            Self::Int(x) => x,
            Self::Float(_) => panic!("a float tensor where integers are expected"),
        }
    }
}

/// Computes all outputs and updated states of a graph, by name. `leaves` holds inputs and states by name.
///
/// # Panics
/// If a leaf is missing, or an index is out of range: this is a test oracle.
#[must_use]
pub fn evaluate(graph: &Graph, leaves: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let mut values: Vec<Option<Tensor>> = vec![None; graph.value_count()];
    for node in graph.nodes() {
        let ins: Vec<(&Shape, &Tensor)> = node
            .inputs
            .iter()
            .map(|&v| (&graph.ty(v).shape, values[v.0 as usize].as_ref().expect("nodes are in order")))
            .collect();
        let outs: Vec<&Shape> = node.outputs.iter().map(|&v| &graph.ty(v).shape).collect();
        let results = match &node.op {
            Op::Input { name } | Op::State { name } => {
                vec![leaves.get(name).unwrap_or_else(|| panic!("no value for {name:?}")).clone()]
            }
            op => apply(op, &ins, &outs),
        };
        for (&v, result) in node.outputs.iter().zip(results) {
            values[v.0 as usize] = Some(kept(graph.ty(v).dtype, result));
        }
    }
    let get = |v: pyrformer_graph::ValueId| values[v.0 as usize].clone().expect("every value is computed");
    let mut found: HashMap<String, Tensor> =
        graph.outputs().iter().map(|(n, v)| (n.clone(), get(*v))).collect();
    for &(state, v) in graph.updates() {
        if let Op::State { name } = &graph.producer(state).op {
            found.insert(name.clone(), get(v));
        }
    }
    found
}

/// A value as memory keeps it: float64 but for bfloat16, which every value of that type is rounded to.
fn kept(dtype: DType, value: Tensor) -> Tensor {
    match value {
        Tensor::Float(x) if dtype == DType::Bf16 => Tensor::Float(x.into_iter().map(round_bf16).collect()),
        value => value,
    }
}

/// f(x). The error function is libm's.
#[must_use]
pub fn unary(f: Unary, x: f64) -> f64 {
    match f {
        Unary::Scale(s) => s * x,
        Unary::Exp => x.exp(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Unary::Relu => x.max(0.0),
        Unary::Gelu => x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt())),
        Unary::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        Unary::Silu => x / (1.0 + (-x).exp()),
        Unary::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Unary::Relu2 => x.max(0.0).powi(2),
        Unary::Mish => x * x.exp().ln_1p().tanh(),
        Unary::Sqrt => x.sqrt(),
        Unary::Sign if x == 0.0 => 0.0,
        Unary::Sign => x.signum(),
    }
}

/// f'(x), from the formula.
#[must_use]
pub fn unary_grad(f: Unary, x: f64) -> f64 {
    match f {
        Unary::Scale(s) => s,
        Unary::Exp => x.exp(),
        Unary::Tanh => 1.0 - x.tanh().powi(2),
        Unary::Sigmoid => {
            let s = unary(f, x);
            s * (1.0 - s)
        }
        Unary::Relu => f64::from(u8::from(x > 0.0)),
        Unary::Gelu => {
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            0.5 * (1.0 + libm::erf(x / 2f64.sqrt())) + x * density
        }
        Unary::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (x + 0.044715 * x.powi(3))).tanh();
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x)
        }
        Unary::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            s * (1.0 + x * (1.0 - s))
        }
        Unary::QuickGelu => {
            let s = 1.0 / (1.0 + (-1.702 * x).exp());
            s * (1.0 + 1.702 * x * (1.0 - s))
        }
        Unary::Relu2 => 2.0 * x.max(0.0),
        Unary::Mish => {
            let t = x.exp().ln_1p().tanh();
            t + x * (1.0 - t * t) / (1.0 + (-x).exp())
        }
        Unary::Sqrt => 0.5 / x.sqrt(),
        Unary::Sign => 0.0,
    }
}

fn apply(op: &Op, ins: &[(&Shape, &Tensor)], outs: &[&Shape]) -> Vec<Tensor> {
    let f = |i: usize| ins[i].1.floats();
    let n = |i: usize| ins[i].1.ints();
    let dims = |i: usize| &ins[i].0.0;
    let one = |x: Vec<f64>| vec![Tensor::Float(x)];
    match op {
        Op::Input { .. } | Op::State { .. } => unreachable!("leaves are given"),
        Op::Iota { start, step } => {
            vec![Tensor::Int((0..outs[0].elements() as i32).map(|i| start + step * i).collect())]
        }
        Op::Fill { value } => one(vec![*value; outs[0].elements()]),
        // What a cast rounds, `evaluate` rounds, as every value of that type.
        Op::Reshape | Op::Copy | Op::Cast(_) => vec![ins[0].1.clone()],
        Op::Split { sizes } => {
            let cols = ins[0].0.cols();
            let mut at = 0;
            let part = |&size: &usize| {
                let from = at;
                at += size;
                match ins[0].1 {
                    Tensor::Float(x) => {
                        Tensor::Float(x.chunks(cols).flat_map(|r| r[from..from + size].to_vec()).collect())
                    }
                    Tensor::Int(x) => {
                        Tensor::Int(x.chunks(cols).flat_map(|r| r[from..from + size].to_vec()).collect())
                    }
                }
            };
            sizes.iter().map(part).collect()
        }
        Op::Concat => {
            let rows = outs[0].rows();
            let row = |r: usize| {
                ins.iter().flat_map(move |(s, x)| x.floats()[r * s.cols()..(r + 1) * s.cols()].to_vec())
            };
            one((0..rows).flat_map(row).collect())
        }
        Op::Gather => {
            let c = ins[0].0.cols();
            one(n(1).iter().flat_map(|&i| f(0)[i as usize * c..(i as usize + 1) * c].to_vec()).collect())
        }
        Op::ScatterAdd { rows } => {
            let c = ins[0].0.cols();
            let mut y = if ins.len() == 3 { f(2).to_vec() } else { vec![0.0; rows * c] };
            for (r, &i) in n(1).iter().enumerate() {
                for j in 0..c {
                    y[i as usize * c + j] += f(0)[r * c + j];
                }
            }
            one(y)
        }
        Op::Unary(g) => one(f(0).iter().map(|&x| unary(*g, x)).collect()),
        Op::UnaryGrad(g) => one(f(0).iter().zip(f(1)).map(|(&x, &dy)| dy * unary_grad(*g, x)).collect()),
        Op::Gated(g) => one(f(0).iter().zip(f(1)).map(|(&gate, &up)| unary(*g, gate) * up).collect()),
        Op::GatedGrad(g) => {
            let each = f(0).iter().zip(f(1).iter().zip(f(2)));
            let (dgate, dup) = each
                .map(|(&dy, (&gate, &up))| (dy * up * unary_grad(*g, gate), dy * unary(*g, gate)))
                .unzip();
            vec![Tensor::Float(dgate), Tensor::Float(dup)]
        }
        Op::Binary(g) => {
            let b = f(1);
            one(f(0).iter().enumerate().map(|(i, &a)| binary(*g, a, b[i % b.len()])).collect())
        }
        Op::SumTo => {
            let mut y = vec![0.0; outs[0].elements()];
            let len = y.len();
            for (i, &x) in f(0).iter().enumerate() {
                y[i % len] += x;
            }
            one(y)
        }
        Op::Broadcast => one((0..outs[0].elements()).map(|i| f(0)[i % f(0).len()]).collect()),
        Op::Dropout(spec) => {
            let keep = keep(spec, n(1));
            let mut y: Vec<f64> = f(0).iter().enumerate().map(|(i, &x)| x * keep.factor(i as u64)).collect();
            if ins.len() == 3 {
                y.iter_mut().zip(f(2)).for_each(|(y, &residual)| *y += residual);
            }
            one(y)
        }
        Op::MatMul { ta, tb, epilogue } => matmul(ins, outs[0], *ta, *tb, epilogue),
        Op::LayerNorm { eps, center } => {
            let c = ins[0].0.cols();
            let (mut y, mut means, mut rstds) = (vec![], vec![], vec![]);
            for x in f(0).chunks(c) {
                let mean = if *center { x.iter().sum::<f64>() / c as f64 } else { 0.0 };
                let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
                let rstd = 1.0 / (var + eps).sqrt();
                let bias = |j: usize| if ins.len() == 3 { f(2)[j] } else { 0.0 };
                y.extend((0..c).map(|j| (x[j] - mean) * rstd * f(1)[j] + bias(j)));
                means.push(mean);
                rstds.push(rstd);
            }
            vec![Tensor::Float(y), Tensor::Float(means), Tensor::Float(rstds)]
        }
        Op::LayerNormGrad { center } => layer_norm_grad(ins, *center),
        Op::RopeTable { inv_freq, scale, .. } => {
            let row = |&p: &i32| {
                let angles: Vec<f64> = inv_freq.iter().map(|f| f64::from(p) * f).collect();
                let (cos, sin) =
                    (angles.iter().map(|a| a.cos() * scale), angles.iter().map(|a| a.sin() * scale));
                cos.chain(sin).collect::<Vec<f64>>()
            };
            one(n(0).iter().flat_map(row).collect())
        }
        Op::Rope { heads, inverse } => {
            let (c, r) = (ins[0].0.cols(), ins[1].0.cols());
            let (d, half) = (c / heads, r / 2);
            let sign = if *inverse { -1.0 } else { 1.0 };
            let element = |at: usize| {
                let (row, i) = (at / c, at % c % d);
                let angle = |j: usize| (f(1)[row * r + j], sign * f(1)[row * r + half + j]);
                match i {
                    _ if i < half => angle(i).0 * f(0)[at] - angle(i).1 * f(0)[at + half],
                    _ if i < r => angle(i - half).0 * f(0)[at] + angle(i - half).1 * f(0)[at - half],
                    _ => f(0)[at],
                }
            };
            one((0..f(0).len()).map(element).collect())
        }
        Op::AlibiBias { slopes, scale, round, .. } => {
            let keep = |x: f64| if *round { round_bf16(x) } else { x };
            let t = ins[0].0.cols();
            let element = |at: usize| {
                let (row, slope) = (at / t / slopes.len(), slopes[at / t % slopes.len()]);
                scale * keep(keep(slope) * f64::from(n(0)[row * t + at % t]))
            };
            one((0..outs[0].elements()).map(element).collect())
        }
        Op::Attention(spec) => attention(spec, ins),
        Op::AttentionGrad(spec) => attention_grad(spec, ins),
        Op::RelativeAttention(spec) => vec![relative_attention(spec, ins, 0).0],
        Op::RelativeAttentionGrad(spec) => relative_attention(spec, ins, 1).1,
        Op::LinearCrossEntropy(spec) => one(vec![cross_entropy(ins, spec).iter().map(|r| r.0).sum()]),
        Op::LinearTokenLosses { bias } => {
            one(cross_entropy(ins, &LossSpec { bias: *bias, ..LossSpec::default() })
                .iter()
                .map(|r| r.0)
                .collect())
        }
        Op::LinearCrossEntropyGrad(spec) => cross_entropy_grad(ins, spec),
        Op::CountLabels { .. } => one(vec![n(0).iter().filter(|&&l| l >= 0).count() as f64]),
        Op::Best { count } => {
            let (mut best, mut tokens, mut masses) = (vec![], vec![], vec![]);
            for (row, t) in f(0).chunks(ins[0].0.cols()).zip(f(1)) {
                let mut order: Vec<usize> = (0..row.len()).collect();
                order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                let m = row[order[0]];
                best.extend(order.iter().take(*count).map(|&token| row[token]));
                tokens.extend(order.iter().take(*count).map(|&token| token as i32));
                let mass = |t: f64| row.iter().map(|x| (x / t - m / t).exp()).sum::<f64>();
                masses.extend([mass(1.0), 0.0, mass(*t), 0.0]);
            }
            vec![Tensor::Float(best), Tensor::Int(tokens), Tensor::Float(masses)]
        }
        Op::CacheWrite => {
            let (slots, c, t) = (dims(0)[1], dims(0)[2], dims(1)[1]);
            let mut cache = f(0).to_vec();
            for b in 0..dims(1)[0] {
                for i in 0..n(4)[b] as usize {
                    let to = (n(2)[b] as usize * slots + n(3)[b] as usize + i) * c;
                    cache[to..to + c].copy_from_slice(&f(1)[(b * t + i) * c..][..c]);
                }
            }
            one(cache)
        }
        Op::CachedAttention(spec) => cached_attention(spec, ins),
        Op::GlobalNorm => {
            one(vec![ins.iter().map(|g| g.1.floats().iter().map(|x| x * x).sum::<f64>()).sum::<f64>().sqrt()])
        }
        Op::ClipFactor { max_norm } => one(vec![(max_norm / (f(0)[0] + 1e-6)).min(1.0)]),
        Op::AdamW { beta1, beta2, eps, weight_decay, rounding } => {
            let (clip, lr, step) = (f(4)[0], f(5)[0], n(6)[0]);
            let (mut p, mut m, mut v) = (f(0).to_vec(), f(2).to_vec(), f(3).to_vec());
            for i in 0..p.len() {
                let g = f(1)[i] * clip;
                p[i] *= 1.0 - lr * weight_decay;
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let (mh, vh) = (m[i] / (1.0 - beta1.powi(step)), v[i] / (1.0 - beta2.powi(step)));
                p[i] -= lr * mh / (vh.sqrt() + eps);
            }
            if let Some(stream) = rounding {
                Rounding::new(*stream, [n(7)[0], n(7)[1], n(7)[2], n(7)[3]]).apply(&mut p, 0);
            }
            let copy = (ins.len() == 8 + usize::from(rounding.is_some())).then(|| Tensor::Float(p.clone()));
            [Tensor::Float(p), Tensor::Float(m), Tensor::Float(v)].into_iter().chain(copy).collect()
        }
    }
}

fn binary(f: Binary, a: f64, b: f64) -> f64 {
    match f {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
    }
}

fn keep(spec: &DropoutSpec, rng: &[i32]) -> Keep {
    Keep::new(spec, [rng[0], rng[1], rng[2], rng[3]])
}

fn matmul(ins: &[(&Shape, &Tensor)], out: &Shape, ta: bool, tb: bool, e: &Epilogue) -> Vec<Tensor> {
    let (a, b) = (ins[0].1.floats(), ins[1].1.floats());
    let (ac, bc) = (ins[0].0.cols(), ins[1].0.cols());
    let (m, n) = (out.rows(), out.cols());
    let k = if ta { ins[0].0.rows() } else { ac };
    let mut next = 2;
    let mut operand = |present: bool| {
        present.then(|| {
            next += 1;
            ins[next - 1].1.floats()
        })
    };
    let (bias, x, residual) = (operand(e.bias), operand(e.act_grad.is_some()), operand(e.residual));
    let (mut y, mut pre) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for j in 0..n {
            let at = i * n + j;
            let mut sum: f64 = (0..k)
                .map(|l| {
                    (if ta { a[l * ac + i] } else { a[i * ac + l] })
                        * (if tb { b[j * bc + l] } else { b[l * bc + j] })
                })
                .sum();
            sum += bias.map_or(0.0, |bias| bias[j]);
            pre[at] = sum;
            sum = e.act.map_or(sum, |f| unary(f, sum));
            sum *= e.act_grad.zip(x).map_or(1.0, |(f, x)| unary_grad(f, x[at]));
            y[at] = sum + residual.map_or(0.0, |r| r[at]);
        }
    }
    let mut results = vec![Tensor::Float(y)];
    results.extend(e.keep_pre.then_some(Tensor::Float(pre)));
    results
}

fn layer_norm_grad(ins: &[(&Shape, &Tensor)], center: bool) -> Vec<Tensor> {
    let f = |i: usize| ins[i].1.floats();
    let c = ins[1].0.cols();
    let (mut dx, mut dw, mut db) = (vec![], vec![0.0; c], vec![0.0; c]);
    for r in 0..ins[1].0.rows() {
        let (dy, x) = (&f(0)[r * c..(r + 1) * c], &f(1)[r * c..(r + 1) * c]);
        let hat: Vec<f64> = x.iter().map(|x| (x - f(3)[r]) * f(4)[r]).collect();
        let dhat: Vec<f64> = dy.iter().zip(f(2)).map(|(dy, w)| dy * w).collect();
        let mean = if center { dhat.iter().sum::<f64>() / c as f64 } else { 0.0 };
        let along = dhat.iter().zip(&hat).map(|(a, b)| a * b).sum::<f64>() / c as f64;
        for j in 0..c {
            dw[j] += dy[j] * hat[j];
            db[j] += dy[j];
            let residual = if ins.len() == 6 { f(5)[r * c + j] } else { 0.0 };
            dx.push(f(4)[r] * (dhat[j] - mean - hat[j] * along) + residual);
        }
    }
    vec![Tensor::Float(dx), Tensor::Float(dw), Tensor::Float(db)]
}

/// Probabilities of one attention, before dropout: `p[b][h][i][j]`, zero where hidden, and lse.
fn probabilities(
    spec: &AttentionSpec,
    q: (&Shape, &[f64]),
    k: (&Shape, &[f64]),
    extras: &Extras<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let (b, t, h) = (q.0.0[0], q.0.0[1], spec.heads);
    let d = q.0.cols() / h;
    let group = h / spec.kv_heads;
    let mut p = vec![0.0; b * h * t * t];
    let mut lse = vec![f64::NEG_INFINITY; b * h * t];
    for bi in 0..b {
        for hi in 0..h {
            for i in 0..t {
                let seen = |j: usize| {
                    (!spec.causal || j <= i || extras.prefix.is_some_and(|p| (j as i32) < p[bi]))
                        && spec.window.is_none_or(|w| i.abs_diff(j) < w)
                        && extras.segments.is_none_or(|s| {
                            let (own, other) = (s[bi * t + i], s[bi * t + j]);
                            other != 0 && (own == other || own == 0)
                        })
                };
                let score = |j: usize| {
                    let (qr, kr) = (
                        &q.1[(bi * t + i) * h * d + hi * d..],
                        &k.1[(bi * t + j) * spec.kv_heads * d + hi / group * d..],
                    );
                    let bias = extras.key_bias.map_or(0.0, |bias| bias[(bi * h + hi) * t + j]);
                    spec.scale * (0..d).map(|x| qr[x] * kr[x]).sum::<f64>() + bias
                };
                let scores: Vec<(usize, f64)> = (0..t).filter(|&j| seen(j)).map(|j| (j, score(j))).collect();
                let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.1));
                let sum: f64 = scores.iter().map(|s| (s.1 - max).exp()).sum();
                let at = (bi * h + hi) * t + i;
                if scores.is_empty() {
                    p[at * t..(at + 1) * t].fill(1.0 / t as f64);
                    continue;
                }
                lse[at] = max + sum.ln();
                for (j, s) in scores {
                    p[at * t + j] = (s - lse[at]).exp();
                }
            }
        }
    }
    (p, lse)
}

/// Attention's optional operands.
struct Extras<'a> {
    segments: Option<&'a [i32]>,
    key_bias: Option<&'a [f64]>,
    prefix: Option<&'a [i32]>,
    keep: Option<Keep>,
}

impl<'a> Extras<'a> {
    fn of(spec: &AttentionSpec, ins: &[(&Shape, &'a Tensor)], fixed: usize) -> Self {
        let at = spec.extras(fixed);
        Self {
            segments: at.segments.map(|i| ins[i].1.ints()),
            key_bias: at.key_bias.map(|i| ins[i].1.floats()),
            prefix: at.prefix.map(|i| ins[i].1.ints()),
            keep: spec.dropout.as_ref().zip(at.rng).map(|(d, i)| keep(d, ins[i].1.ints())),
        }
    }
}

fn attention(spec: &AttentionSpec, ins: &[(&Shape, &Tensor)]) -> Vec<Tensor> {
    let (q, k, v) = (ins[0].1.floats(), ins[1].1.floats(), ins[2].1.floats());
    let (b, t, h) = (ins[0].0.0[0], ins[0].0.0[1], spec.heads);
    let (d, group) = (ins[0].0.cols() / h, h / spec.kv_heads);
    let extras = Extras::of(spec, ins, 3);
    let (p, lse) = probabilities(spec, (ins[0].0, q), (ins[1].0, k), &extras);
    let mut out = vec![0.0; q.len()];
    for bi in 0..b {
        for hi in 0..h {
            for i in 0..t {
                for j in 0..t {
                    let at = ((bi * h + hi) * t + i) * t + j;
                    let p = p[at] * extras.keep.as_ref().map_or(1.0, |k| k.factor(at as u64));
                    for x in 0..d {
                        out[(bi * t + i) * h * d + hi * d + x] +=
                            p * v[(bi * t + j) * spec.kv_heads * d + hi / group * d + x];
                    }
                }
            }
        }
    }
    vec![Tensor::Float(out), Tensor::Float(lse)]
}

fn attention_grad(spec: &AttentionSpec, ins: &[(&Shape, &Tensor)]) -> Vec<Tensor> {
    let (dout, q, k, v) = (ins[0].1.floats(), ins[1].1.floats(), ins[2].1.floats(), ins[3].1.floats());
    let (b, t, h) = (ins[1].0.0[0], ins[1].0.0[1], spec.heads);
    let (d, group) = (ins[1].0.cols() / h, h / spec.kv_heads);
    let extras = Extras::of(spec, ins, 6);
    let (p, lse) = probabilities(spec, (ins[1].0, q), (ins[2].0, k), &extras);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for bi in 0..b {
        for hi in 0..h {
            for i in 0..t {
                let at = ((bi * h + hi) * t + i) * t;
                let qo = (bi * t + i) * h * d + hi * d;
                let ko = |j: usize| (bi * t + j) * spec.kv_heads * d + hi / group * d;
                let factor = |j: usize| extras.keep.as_ref().map_or(1.0, |k| k.factor((at + j) as u64));
                let dp: Vec<f64> = (0..t)
                    .map(|j| factor(j) * (0..d).map(|x| dout[qo + x] * v[ko(j) + x]).sum::<f64>())
                    .collect();
                let mean: f64 = (0..t).map(|j| p[at + j] * dp[j]).sum();
                for j in 0..t {
                    // Where nothing is seen, the probabilities depend on no score.
                    let seen = f64::from(u8::from(lse[(bi * h + hi) * t + i].is_finite()));
                    let ds = seen * p[at + j] * (dp[j] - mean) * spec.scale;
                    for x in 0..d {
                        dq[qo + x] += ds * k[ko(j) + x];
                        dk[ko(j) + x] += ds * q[qo + x];
                        dv[ko(j) + x] += p[at + j] * factor(j) * dout[qo + x];
                    }
                }
            }
        }
    }
    vec![Tensor::Float(dq), Tensor::Float(dk), Tensor::Float(dv)]
}

/// The result of relative attention and, where operand 0 is dout (`q` 1), the gradients.
fn relative_attention(spec: &RelativeSpec, ins: &[(&Shape, &Tensor)], q: usize) -> (Tensor, Vec<Tensor>) {
    let at = q + 7;
    let f = |i: usize| ins[q + i].1.floats();
    let n = |i: usize| ins[at + i].1.ints();
    let (b, t, c) = (ins[q].0.0[0], ins[q].0.0[1], ins[q].0.cols());
    let (s, u, h) = (ins[q + 3].0.0[1], ins[at + 1].0.0[1], spec.heads);
    let d = c / h;
    let hidden = spec.hidden.then(|| n(3));
    let keep = spec.dropout.as_ref().map(|p| keep(p, n(3 + usize::from(spec.hidden))));
    let dout = (q == 1).then(|| ins[0].1.floats());
    let mut out = vec![0.0; b * t * c];
    let mut grads: Vec<Vec<f64>> = (0..7).map(|i| vec![0.0; f(i).len()]).collect();
    for (bi, hi, i) in (0..b).flat_map(|bi| (0..h).flat_map(move |hi| (0..t).map(move |i| (bi, hi, i)))) {
        let Ok(p) = usize::try_from(n(0)[bi * t + i]) else { continue };
        let qo = (bi * t + i) * c + hi * d;
        let ko = |j: usize| (bi * s + j) * c + hi * d;
        let ro = |j: usize| (u - p + j) * c + hi * d;
        let so = |j: usize| usize::from(n(1)[bi * u + p] != n(2)[bi * s + j]) * c + hi * d;
        let seen = |j: usize| {
            j < s - u
                || (spec.sees_itself && j == s - u + p)
                || hidden.is_none_or(|x| x[(bi * u + p) * u + j - (s - u)] == 0)
        };
        let score = |j: usize| {
            let term = |x: usize| {
                f(0)[qo + x] * f(3)[ko(j) + x]
                    + f(1)[qo + x] * f(5)[ro(j) + x]
                    + f(2)[qo + x] * f(6)[so(j) + x]
            };
            spec.scale * (0..d).map(term).sum::<f64>()
        };
        let any = (0..s).any(seen);
        let scores: Vec<f64> = (0..s).map(|j| if seen(j) { score(j) } else { f64::NEG_INFINITY }).collect();
        let largest = scores.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
        let total: f64 = scores.iter().map(|x| (x - largest).exp()).sum();
        let prob = |j: usize| if any { (scores[j] - largest).exp() / total } else { 1.0 / s as f64 };
        let factor =
            |j: usize| keep.as_ref().map_or(1.0, |k| k.factor((((bi * h + hi) * t + i) * s + j) as u64));
        for j in 0..s {
            (0..d).for_each(|x| out[qo + x] += prob(j) * factor(j) * f(4)[ko(j) + x]);
        }
        let Some(dout) = dout else { continue };
        let dp: Vec<f64> =
            (0..s).map(|j| factor(j) * (0..d).map(|x| dout[qo + x] * f(4)[ko(j) + x]).sum::<f64>()).collect();
        let mean: f64 = (0..s).map(|j| prob(j) * dp[j]).sum();
        for j in 0..s {
            let ds = spec.scale * prob(j) * (dp[j] - mean);
            for x in 0..d {
                grads[0][qo + x] += ds * f(3)[ko(j) + x];
                grads[1][qo + x] += ds * f(5)[ro(j) + x];
                grads[2][qo + x] += ds * f(6)[so(j) + x];
                grads[3][ko(j) + x] += ds * f(0)[qo + x];
                grads[4][ko(j) + x] += prob(j) * factor(j) * dout[qo + x];
                grads[5][ro(j) + x] += ds * f(1)[qo + x];
                grads[6][so(j) + x] += ds * f(2)[qo + x];
            }
        }
    }
    (Tensor::Float(out), grads.into_iter().map(Tensor::Float).collect())
}

/// Loss, probabilities and log of the denominator of each row; rows without a label have loss 0 and no probabilities.
fn cross_entropy(ins: &[(&Shape, &Tensor)], spec: &LossSpec) -> Vec<(f64, Vec<f64>, f64)> {
    let bias = spec.bias;
    let (x, w) = (ins[0].1.floats(), ins[1].1.floats());
    let labels = ins[2 + usize::from(bias)].1.ints();
    let (c, v) = (ins[0].0.cols(), ins[1].0.0[0]);
    let row = |(r, &label): (usize, &i32)| {
        if label < 0 {
            return (0.0, vec![], 0.0);
        }
        let logit = |j: usize| {
            let dot: f64 = (0..c).map(|i| x[r * c + i] * w[j * c + i]).sum();
            dot + if bias { ins[2].1.floats()[j] } else { 0.0 }
        };
        let logits: Vec<f64> = (0..v).map(logit).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, &l| m.max(l));
        let lse = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        let (e, mean) = (spec.smoothing, logits.iter().sum::<f64>() / v as f64);
        let target = (1.0 - e) * logits[label as usize] + e * mean;
        (lse - target + spec.z_loss * lse * lse, logits.iter().map(|l| (l - lse).exp()).collect(), lse)
    };
    labels.iter().enumerate().map(row).collect()
}

fn cross_entropy_grad(ins: &[(&Shape, &Tensor)], spec: &LossSpec) -> Vec<Tensor> {
    let bias = spec.bias;
    let (x, w) = (ins[0].1.floats(), ins[1].1.floats());
    let labels = ins[2 + usize::from(bias)].1.ints();
    let scale = ins[3 + usize::from(bias)].1.floats()[0];
    let (c, v) = (ins[0].0.cols(), ins[1].0.0[0]);
    let rows = cross_entropy(ins, spec);
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; v]);
    for (r, (_, p, lse)) in rows.iter().enumerate() {
        for (j, &p) in p.iter().enumerate() {
            let onehot = f64::from(u8::from(labels[r] as usize == j));
            let target = (1.0 - spec.smoothing) * onehot + spec.smoothing / v as f64;
            let dl = scale * (p * (1.0 + 2.0 * spec.z_loss * lse) - target);
            db[j] += dl;
            for i in 0..c {
                dx[r * c + i] += dl * w[j * c + i];
                dw[j * c + i] += dl * x[r * c + i];
            }
        }
    }
    let loss = vec![rows.iter().map(|r| r.0).sum()];
    let mut results = vec![Tensor::Float(loss), Tensor::Float(dx), Tensor::Float(dw)];
    results.extend(bias.then_some(Tensor::Float(db)));
    results
}

fn cached_attention(spec: &AttentionSpec, ins: &[(&Shape, &Tensor)]) -> Vec<Tensor> {
    let (q, k, v) = (ins[0].1.floats(), ins[1].1.floats(), ins[2].1.floats());
    let (rows, start, count) = (ins[3].1.ints(), ins[4].1.ints(), ins[5].1.ints());
    let (b, t, slots, h) = (ins[0].0.0[0], ins[0].0.0[1], ins[1].0.0[1], spec.heads);
    let (d, group) = (ins[0].0.cols() / h, h / spec.kv_heads);
    let mut out = vec![0.0; q.len()];
    for bi in 0..b {
        for i in 0..count[bi] as usize {
            let position = start[bi] as usize + i;
            let first = spec.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for hi in 0..h {
                let qo = (bi * t + i) * h * d + hi * d;
                let ko = |p: usize| {
                    (rows[bi * slots + p] as usize * slots + p) * spec.kv_heads * d + hi / group * d
                };
                let scores: Vec<f64> = (first..=position)
                    .map(|p| {
                        let bias = if spec.key_bias { ins[6].1.floats()[hi * slots + p] } else { 0.0 };
                        spec.scale * (0..d).map(|x| q[qo + x] * k[ko(p) + x]).sum::<f64>() + bias
                    })
                    .collect();
                let max = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (p, s) in (first..=position).zip(&scores) {
                    for x in 0..d {
                        out[qo + x] += (s - max).exp() / sum * v[ko(p) + x];
                    }
                }
            }
        }
    }
    vec![Tensor::Float(out)]
}
