//! One rule for each operation: step → launch records, and the work space they need. Updates by AdamW that follow one
//! another are one launch.
//!
//! Geometry and arguments are those that the heads of `cuda/*.cu` state. Sums go through chunks whose number depends on
//! shapes alone. A contiguous tensor is given to elementwise kernels as one row.

use std::collections::HashSet;

use pyrformer_graph::op::DropoutSpec;
use pyrformer_graph::{Binary, DType, Epilogue, LossSpec, Op, Space, Step, Target, TensorType, Unary};

use crate::launch::{Arg, Launch, Matrix, Memory, Place, Product, Record};

/// A list of arguments of mixed types.
macro_rules! args {
    ($($x:expr),* $(,)?) => { vec![$(Arg::from($x)),*] };
}

mod attention;

/// A CUDA device as a target of lowering: how much work space the launches of a step need.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cuda;

/// Elements of logits held at a time: chunks of some hundred rows keep tensor cores busy at usual vocabularies.
const LOGITS: usize = 32 << 20;
/// Sums of more rows or elements than this go through partial sums, of which there are at most [`PARTS`].
const ROWS_PER_PART: usize = 32;
/// The same of the rows whose gradients a block of a norm's kernel adds up; eight warps walk over them.
const NORM_ROWS: usize = 16;
const ELEMENTS_PER_PART: usize = 4096;
const PARTS: usize = 256;
/// Elements of a gradient whose squares one block adds up.
const NORM_CHUNK: usize = 16384;
/// Groups of four columns that one block of AdamW updates.
const UPDATE_GROUPS: usize = 1024;

/// Values that one partial sum has, given all of them.
fn per_part(n: usize, least: usize) -> usize {
    least.max(n.div_ceil(PARTS))
}

fn chunk_rows(rows: usize, classes: usize) -> usize {
    (LOGITS / classes.max(1)).next_multiple_of(16).min(rows).max(1)
}

/// Partial sums of a row-wise sum, none where one launch does it.
fn row_parts(copies: usize, result: usize) -> usize {
    let parts = copies.div_ceil(per_part(copies, ROWS_PER_PART));
    if parts > 1 { parts * result } else { 0 }
}

fn element_parts(n: usize) -> usize {
    let parts = n.div_ceil(per_part(n, ELEMENTS_PER_PART));
    if parts > 1 { parts } else { 0 }
}

/// The most columns that a launch of `best` chooses from at once, and the most that it leaves of them.
const PIECE: usize = 4096;
const MOST_BEST: usize = 256;

/// The columns, and those of a piece, that the launches of `best` choose from, until one piece is left.
fn best_pieces(cols: usize, count: usize) -> Vec<(usize, usize)> {
    let mut launches = vec![(cols, PIECE)];
    while let Some(&(cols, piece)) = launches.last()
        && cols > piece
    {
        launches.push((cols.div_ceil(piece) * count, PIECE / count * count));
    }
    launches
}

/// Elements between the launches of `best`: what is left, its tokens, and five numbers for each piece.
fn best_elements(rows: usize, cols: usize, count: usize) -> usize {
    let between = best_pieces(cols, count.clamp(1, MOST_BEST));
    between[1..].iter().map(|(cols, _)| rows * (2 * cols + 5 * (cols / count))).sum()
}

impl Target for Cuda {
    fn scratch_bytes(&self, op: &Op, inputs: &[&TensorType], outputs: &[&TensorType]) -> usize {
        let elements = match op {
            Op::SumTo if outputs[0].shape.rank() == 0 => element_parts(inputs[0].shape.elements()),
            Op::SumTo => {
                let (x, y) = (inputs[0].shape.elements(), outputs[0].shape.elements());
                row_parts(x / y.max(1), y)
            }
            Op::LayerNormGrad { .. } => {
                let x = &inputs[1].shape;
                2 * x.rows().div_ceil(per_part(x.rows(), NORM_ROWS)) * x.cols()
            }
            Op::AttentionGrad(_) => inputs[5].shape.elements(),
            Op::CachedAttention(spec) => attention::span_elements(spec, inputs),
            Op::Best { count } => best_elements(inputs[0].shape.rows(), inputs[0].shape.cols(), *count),
            Op::RelativeAttentionGrad(spec) => 5 * inputs[8].shape.elements() * spec.heads,
            Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_) | Op::LinearTokenLosses { .. } => {
                let (rows, classes) = (inputs[0].shape.rows(), inputs[1].shape.0[0]);
                let dtype = inputs[0].dtype;
                let logits = chunk_rows(rows, classes) * logits_ld(classes, dtype) * dtype.size() / 4;
                logits + rows + element_parts(rows) + classes
            }
            Op::GlobalNorm => inputs.iter().map(|t| t.shape.elements().div_ceil(NORM_CHUNK)).sum(),
            _ => 0,
        };
        4 * elements
    }
}

/// How many of the first steps one launch makes: updates by AdamW that differ in their tensors and decay alone, of which
/// none touches what another writes.
pub(crate) fn together(steps: &[Step]) -> usize {
    let shared = |step: &Step| match step.op {
        Op::AdamW { beta1, beta2, eps, rounding, .. } => {
            let scalars = &step.inputs[4..7 + usize::from(rounding.is_some())];
            Some(([beta1, beta2, eps], scalars.to_vec()))
        }
        _ => None,
    };
    let Some(first) = shared(&steps[0]) else { return 1 };
    let (mut written, mut touched) = (HashSet::new(), HashSet::new());
    let joins = |step: &&Step| {
        // States are memories of their own; what is in the arena may take the place of what was.
        let apart = step.outputs.iter().all(|o| o.space != Space::Arena && !touched.contains(&o.space))
            && step.inputs.iter().all(|o| !written.contains(&o.space));
        written.extend(step.outputs.iter().map(|o| o.space));
        touched.extend(step.inputs.iter().chain(&step.outputs).map(|o| o.space));
        apart && shared(step).as_ref() == Some(&first)
    };
    steps.iter().take_while(joins).count().max(1)
}

/// The records of steps that share a launch, or what is missing for them; with `halts`, they set the word that ends a
/// program, or heed it.
pub(crate) fn record(steps: &[Step], halts: bool, constants: &mut Vec<u32>) -> Result<Vec<Record>, String> {
    let step = &steps[0];
    let heeds = matches!(step.op, Op::Copy | Op::Broadcast | Op::Binary(_) | Op::AdamW { .. });
    if halts && !heeds && step.outputs.iter().any(|o| matches!(o.space, Space::State(_))) {
        return Err("it writes a state behind the global norm, whether that is finite or not".to_owned());
    }
    let mut r = Recorder { step, steps, halts, constants, records: Vec::new() };
    r.step()?;
    Ok(r.records)
}

struct Recorder<'a> {
    step: &'a Step,
    /// The step, and those that share its launch.
    steps: &'a [Step],
    /// The step sets, or heeds, the word that ends a program.
    halts: bool,
    constants: &'a mut Vec<u32>,
    records: Vec<Record>,
}

/// How names of kernels for tensors of a type end. Where only bits are moved, integers are floats.
fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

/// Elements in 128 bits.
fn group(dtype: DType) -> usize {
    16 / dtype.size()
}

/// Elements from one row of logits to the next: on a boundary of 128 bits each.
fn logits_ld(classes: usize, dtype: DType) -> usize {
    classes.next_multiple_of(group(dtype))
}

/// Contiguous tensors of one shape as one row each.
fn flat<const N: usize>(x: [Matrix; N]) -> [Matrix; N] {
    if x.iter().all(Matrix::is_contiguous) { x.map(|m| m.part(0, 1, m.elements())) } else { x }
}

/// The grid of a kernel with a thread for each group of columns of a matrix that it makes.
fn groups(y: Matrix) -> [usize; 3] {
    [(y.rows * y.cols.div_ceil(group(y.dtype))).div_ceil(256), 1, 1]
}

/// The grid of a kernel with a thread for each of `n` things.
fn threads(n: usize) -> [usize; 3] {
    [n.div_ceil(256), 1, 1]
}

/// The part of a turn that is left of an angle in radians, times 2⁶⁴, as (low, high) words.
fn turn(angle: f64) -> [u32; 2] {
    let part = (angle / std::f64::consts::TAU).rem_euclid(1.0);
    // 2⁶⁴ times a float64 below 1 is an integer or rounds down to one.
    let fixed = (part * 18_446_744_073_709_551_616.0) as u64;
    [fixed as u32, (fixed >> 32) as u32]
}

/// The warps of a norm's kernel that have a row together: the fewest that hold it, at 1024 columns each, of up to 8.
fn row_warps(cols: usize) -> usize {
    cols.div_ceil(1024).next_power_of_two().min(8)
}

fn keep(spec: Option<&DropoutSpec>) -> [Arg; 3] {
    let (stream, p) = spec.map_or((0, 0.0), |s| (s.stream, s.p));
    [stream.into(), p.into(), (1.0 / (1.0 - p)).into()]
}

/// Numbers in `enum Function` of elementwise.cu; 0 is none.
fn function(f: Option<Unary>) -> Result<Arg, String> {
    let number: usize = match f {
        None => 0,
        Some(Unary::Exp) => 1,
        Some(Unary::Tanh) => 2,
        Some(Unary::Sigmoid) => 3,
        Some(Unary::Relu) => 4,
        Some(Unary::Gelu) => 5,
        Some(Unary::GeluTanh) => 6,
        Some(Unary::Silu) => 7,
        Some(Unary::QuickGelu) => 8,
        Some(Unary::Relu2) => 9,
        Some(Unary::Mish) => 10,
        Some(Unary::Sqrt) => 11,
        Some(Unary::Sign) => 12,
        Some(Unary::Scale(_)) => return Err("a fused activation does not scale".to_owned()),
    };
    Ok(number.into())
}

impl Recorder<'_> {
    fn x(&self, i: usize) -> Matrix {
        Matrix::of(&self.step.inputs[i])
    }

    fn y(&self, i: usize) -> Matrix {
        Matrix::of(&self.step.outputs[i])
    }

    fn dims(&self, i: usize) -> &[usize] {
        &self.step.inputs[i].ty.shape.0
    }

    /// The work space as one row, from element `skip` on.
    fn scratch(&self, skip: usize, rows: usize, cols: usize) -> Result<Matrix, String> {
        let whole = self.step.scratch.as_ref().ok_or("the plan was lowered for another target")?;
        let whole = Matrix::of(whole);
        if skip + rows * cols > whole.elements() {
            return Err("the plan was lowered for another target".to_owned());
        }
        Ok(whole.part(skip, rows, cols))
    }

    /// The word that ends a program, where the step sets it or heeds it: only what writes a state has to.
    fn halt(&self) -> Arg {
        let state = self.step.outputs.iter().any(|o| matches!(o.space, Space::State(_)));
        let concerned = self.halts && (state || self.step.op == Op::GlobalNorm);
        Arg::Pointer(concerned.then_some(Place { space: Memory::Halt, offset: 0 }))
    }

    fn launch(&mut self, kernel: impl Into<String>, grid: [usize; 3], block: [usize; 3], args: Vec<Arg>) {
        self.records.push(Record::Launch(Launch { kernel: kernel.into(), grid, block, args }));
    }

    fn copy(&mut self, x: Matrix, y: Matrix) {
        let [x, y] = flat([x, y]);
        self.repeat(x, y);
    }

    /// y = x repeated over leading axes.
    fn repeat(&mut self, x: Matrix, y: Matrix) {
        let args = args![x, y, y.rows, y.cols, x.rows, x.cols, x.ld, y.ld, self.halt()];
        self.launch(format!("broadcast_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
    }

    fn fill(&mut self, y: Matrix, value: f32) {
        let [y] = flat([y]);
        let args = vec![y.into(), y.rows.into(), y.cols.into(), y.ld.into(), Arg::F32(value)];
        self.launch(format!("fill_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
    }

    /// y [M, C] = x [copies · M, C] summed over copies, by way of `parts`.
    fn sum_rows(&mut self, x: Matrix, y: Matrix, parts: Option<Matrix>) -> Result<(), String> {
        if !y.is_contiguous() {
            return Err("the result has gaps between rows".to_owned());
        }
        let copies = x.elements() / y.elements().max(1);
        let blocks = y.elements().div_ceil(32);
        let mut pass = |x: Matrix, to: Matrix, copies: usize, per: usize| {
            let grid = [blocks, copies.div_ceil(per), 1];
            let args = args![x, to, Arg::Pointer(None), copies, y.rows, y.cols, x.ld, per];
            self.launch(format!("sum_to_forward_{}", suffix(x.dtype)), grid, [32, 8, 1], args);
        };
        match parts {
            None => pass(x, y, copies, copies.max(1)),
            Some(parts) => {
                pass(x, parts, copies, per_part(copies, ROWS_PER_PART));
                pass(parts, y, parts.elements() / y.elements(), PARTS);
            }
        }
        Ok(())
    }

    /// y [] = the sum of x, by way of `parts`.
    fn sum_all(&mut self, x: Matrix, y: Matrix, parts: Option<Matrix>) {
        let n = x.elements();
        let mut pass = |x: Matrix, to: Matrix, n: usize, per: usize| {
            let args = args![x, to, n, x.cols, x.ld, per];
            let kernel = format!("sum_forward_{}", suffix(x.dtype));
            self.launch(kernel, [n.div_ceil(per), 1, 1], [256, 1, 1], args);
        };
        match parts {
            None => pass(x, y, n, n),
            Some(parts) => {
                pass(x, parts, n, per_part(n, ELEMENTS_PER_PART));
                pass(parts, y, parts.elements(), parts.elements());
            }
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let step = self.step;
        match &step.op {
            Op::Copy => self.copy(self.x(0), self.y(0)),
            Op::Cast(to) => {
                let [x, y] = flat([self.x(0), self.y(0)]);
                let (way, half) = if to.is_half() { ("narrow", y.dtype) } else { ("widen", x.dtype) };
                let grid = groups(Matrix { dtype: half, ..y });
                self.launch(
                    format!("{way}_forward_{}", suffix(half)),
                    grid,
                    [256, 1, 1],
                    args![x, y, y.rows, y.cols, x.ld, y.ld],
                );
            }
            Op::Fill { value } => {
                let integer = step.outputs[0].ty.dtype == DType::I32;
                // The kernel writes 32 bits, whatever they mean.
                let bits = if integer { f32::from_bits(*value as i32 as u32) } else { *value as f32 };
                self.fill(self.y(0), bits);
            }
            Op::Gather => {
                let (table, y) = (self.x(0), self.y(0));
                let args = args![table, self.x(1), y, table.rows, y.rows, y.cols, table.ld, y.ld];
                let way = if table.dtype == y.dtype { "gather" } else { "gather_narrow" };
                self.launch(format!("{way}_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
            }
            Op::ScatterAdd { rows } => self.scatter_add(*rows),
            Op::Unary(Unary::Scale(s)) => self.scale(*s, self.x(0)),
            Op::UnaryGrad(Unary::Scale(s)) => self.scale(*s, self.x(1)),
            Op::Unary(f) => {
                let [x, y] = flat([self.x(0), self.y(0)]);
                let args = args![x, y, y.rows, y.cols, x.ld, y.ld];
                let kernel = format!("{}_forward_{}", f.name(), suffix(y.dtype));
                self.launch(kernel, groups(y), [256, 1, 1], args);
            }
            Op::UnaryGrad(f) => {
                let [x, dy, dx] = flat([self.x(0), self.x(1), self.y(0)]);
                let args = args![x, dy, dx, dx.rows, dx.cols, x.ld, dy.ld, dx.ld];
                let kernel = format!("{}_backward_{}", f.name(), suffix(dx.dtype));
                self.launch(kernel, groups(dx), [256, 1, 1], args);
            }
            Op::Gated(f) => {
                let [gate, up, y] = flat([self.x(0), self.x(1), self.y(0)]);
                let mut args = args![gate, up, y, y.rows, y.cols, gate.ld, up.ld, y.ld];
                args.push(function(Some(*f))?);
                self.launch(format!("gated_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
            }
            Op::GatedGrad(f) => {
                let [dy, gate, up, dgate, dup] =
                    flat([self.x(0), self.x(1), self.x(2), self.y(0), self.y(1)]);
                let mut args = args![dy, gate, up, dgate, dup, dy.rows, dy.cols];
                args.extend(args![dy.ld, gate.ld, up.ld, dgate.ld, dup.ld]);
                args.push(function(Some(*f))?);
                self.launch(format!("gated_backward_{}", suffix(dy.dtype)), groups(dy), [256, 1, 1], args);
            }
            Op::Binary(f) => self.binary(*f, self.x(0), self.x(1), self.y(0)),
            Op::SumTo => self.sum_to()?,
            Op::Broadcast => self.repeat(self.x(0), self.y(0)),
            Op::Dropout(spec) => {
                let (x, y) = (self.x(0), self.y(0));
                let added = step.inputs.len() == 3;
                let [x, residual, y] = flat([x, if added { self.x(2) } else { x }, y]);
                let residual = added.then_some(residual);
                let mut args = args![x, self.x(1), residual, y, y.rows, y.cols, x.ld];
                args.extend(args![residual.map_or(0, |r| r.ld), y.ld]);
                args.extend(keep(Some(spec)));
                self.launch(format!("dropout_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
            }
            Op::MatMul { ta, tb, epilogue } => self.matmul(*ta, *tb, epilogue)?,
            Op::LayerNorm { eps, center } => {
                let (x, y) = (self.x(0), self.y(0));
                let bias = (step.inputs.len() == 3).then(|| self.x(2));
                let (mean, rstd) = (self.y(1), self.y(2));
                let warps = row_warps(y.cols);
                let mut args = args![x, self.x(1), bias, y, mean, rstd, y.rows, y.cols, x.ld, y.ld];
                args.extend(args![*eps, *center, warps]);
                let kernel = format!("layer_norm_forward_{}", suffix(y.dtype));
                self.launch(kernel, [(y.rows * warps).div_ceil(8), 1, 1], [256, 1, 1], args);
            }
            Op::LayerNormGrad { center } => self.layer_norm_grad(*center)?,
            Op::Iota { start, step } => {
                let y = self.y(0).part(0, 1, self.y(0).elements());
                let args = vec![y.into(), y.cols.into(), Arg::I32(*start), Arg::I32(*step)];
                self.launch("iota_forward_f32", threads(y.cols), [256, 1, 1], args);
            }
            Op::RopeTable { inv_freq, scale, .. } => self.rope_table(inv_freq, *scale),
            Op::Rope { heads, inverse } => {
                let (x, table, y) = (self.x(0), self.x(1), self.y(0));
                let (width, half) = (x.cols / heads, table.cols / 2);
                let sign = if *inverse { -1.0 } else { 1.0 };
                let args = args![x, table, y, x.rows, *heads, width, half, x.ld, table.ld, y.ld, sign];
                let kernel = format!("rope_forward_{}", suffix(y.dtype));
                self.launch(kernel, threads(x.rows * heads * (width - half)), [256, 1, 1], args);
            }
            Op::AlibiBias { slopes, scale, round, .. } => {
                let (positions, bias) = (self.x(0), self.y(0));
                let (heads, tokens) = (slopes.len(), bias.cols);
                let at = self.constant(slopes.iter().map(|s| (*s as f32).to_bits()));
                let rows = bias.rows / heads;
                let args = args![positions, at, bias, rows, heads, tokens, bias.ld, *scale, *round];
                self.launch("alibi_bias_forward_f32", threads(bias.elements()), [256, 1, 1], args);
            }
            Op::Attention(spec) => self.attention(spec)?,
            Op::AttentionGrad(spec) => self.attention_grad(spec)?,
            Op::RelativeAttention(spec) => self.relative_attention(spec),
            Op::RelativeAttentionGrad(spec) => self.relative_attention_grad(spec)?,
            Op::LinearCrossEntropy(spec) => self.cross_entropy(spec, false)?,
            Op::LinearCrossEntropyGrad(spec) => self.cross_entropy(spec, true)?,
            Op::LinearTokenLosses { bias } => {
                self.cross_entropy(&LossSpec { bias: *bias, ..LossSpec::default() }, false)?;
            }
            Op::CountLabels { .. } => {
                let args = args![self.x(0), self.y(0), self.x(0).elements()];
                self.launch("count_labels_forward_f32", [1; 3], [256, 1, 1], args);
            }
            Op::Best { count } => self.best(*count)?,
            Op::CacheWrite => self.cache_write(),
            Op::CachedAttention(spec) => self.cached_attention(spec)?,
            Op::GlobalNorm => self.global_norm()?,
            Op::ClipFactor { max_norm } => {
                let args = args![self.x(0), self.y(0), *max_norm];
                self.launch("clip_factor_forward_f32", [1; 3], [1; 3], args);
            }
            Op::AdamW { beta1, beta2, eps, rounding, .. } => {
                let rng = rounding.map(|_| self.x(7));
                self.adamw(*beta1, *beta2, *eps, rng);
            }
            _ => return Err("it has no kernel".to_owned()),
        }
        Ok(())
    }

    /// Words that kernels read.
    fn constant(&mut self, words: impl IntoIterator<Item = u32>) -> Place {
        // Pairs of words are read at once.
        self.constants.resize(self.constants.len().next_multiple_of(2), 0);
        let place = Place { space: Memory::Constants, offset: 4 * self.constants.len() };
        self.constants.extend(words);
        place
    }

    fn rope_table(&mut self, inv_freq: &[f64], scale: f64) {
        let (positions, table) = (self.x(0), self.y(0));
        let turns = self.constant(inv_freq.iter().flat_map(|&f| turn(f)));
        let half = inv_freq.len();
        let args = args![positions, turns, table, table.rows, half, table.ld, scale];
        self.launch("rope_table_forward_f32", threads(table.rows * half), [256, 1, 1], args);
    }

    fn scale(&mut self, s: f64, x: Matrix) {
        let [x, y] = flat([x, self.y(0)]);
        let args = args![x, y, y.rows, y.cols, x.ld, y.ld, s];
        self.launch(format!("scale_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
    }

    fn binary(&mut self, f: Binary, a: Matrix, b: Matrix, y: Matrix) {
        let [a, b, y] = if b.elements() == a.elements() { flat([a, b, y]) } else { [a, b, y] };
        let args = args![a, b, y, y.rows, y.cols, b.rows, b.cols, a.ld, b.ld, y.ld, self.halt()];
        let kernel = format!("{}_forward_{}", f.name(), suffix(y.dtype));
        self.launch(kernel, groups(y), [256, 1, 1], args);
    }

    fn scatter_add(&mut self, table_rows: usize) {
        let (source, y) = (self.x(0), self.y(0));
        if self.step.inputs.len() == 3 {
            let base = self.x(2);
            if base != y {
                self.copy(base, y);
            }
        } else {
            self.fill(y, 0.0);
        }
        let args = args![source, self.x(1), y, table_rows, source.rows, source.cols, source.ld, y.ld];
        let grid = [source.rows.div_ceil(4), source.cols.div_ceil(32 * group(source.dtype)), 1];
        self.launch(format!("scatter_add_forward_{}", suffix(source.dtype)), grid, [128, 1, 1], args);
    }

    fn sum_to(&mut self) -> Result<(), String> {
        let (x, y) = (self.x(0), self.y(0));
        if self.step.outputs[0].ty.shape.rank() == 0 {
            let parts = element_parts(x.elements());
            let parts = if parts > 0 { Some(self.scratch(0, 1, parts)?) } else { None };
            self.sum_all(x, y, parts);
            return Ok(());
        }
        let parts = row_parts(x.elements() / y.elements().max(1), y.elements());
        let parts = if parts > 0 { Some(self.scratch(0, parts / y.cols, y.cols)?) } else { None };
        self.sum_rows(x, y, parts)
    }

    /// The product with what cuBLASLt adds by itself; an activation or its derivative takes a launch of its own.
    fn matmul(&mut self, ta: bool, tb: bool, e: &Epilogue) -> Result<(), String> {
        let (a, b, y) = (self.x(0), self.x(1), self.y(0));
        let mut next = 2;
        let mut operand = |present: bool| {
            next += usize::from(present);
            present.then(|| self.x(next - 1))
        };
        let (bias, x, residual) = (operand(e.bias), operand(e.act_grad.is_some()), operand(e.residual));
        // A transposed factor's rows are the inner dimension, all leading axes together.
        let bias = bias.map(|b| b.place);
        if e.act.is_none() && e.act_grad.is_none() {
            self.records.push(Record::Product(Product { a, ta, b, tb, c: residual, bias, y }));
            return Ok(());
        }
        let product = if e.keep_pre { self.y(1) } else { y };
        self.records.push(Record::Product(Product { a, ta, b, tb, c: None, bias, y: product }));
        let none = None::<Matrix>;
        let ld = |m: Option<Matrix>| Arg::from(m.map_or(0, |m| m.ld));
        let mut args = args![product, none, x, residual, y, none, y.rows, y.cols, product.ld];
        args.extend([
            ld(x),
            ld(residual),
            y.ld.into(),
            0_usize.into(),
            function(e.act)?,
            function(e.act_grad)?,
        ]);
        self.launch(format!("epilogue_forward_{}", suffix(y.dtype)), groups(y), [256, 1, 1], args);
        Ok(())
    }

    fn layer_norm_grad(&mut self, center: bool) -> Result<(), String> {
        let [dy, x, weight, mean, rstd] = [0, 1, 2, 3, 4].map(|i| self.x(i));
        let residual = (self.step.inputs.len() == 6).then(|| self.x(5));
        let dx = self.y(0);
        let per = per_part(x.rows, NORM_ROWS);
        let chunks = x.rows.div_ceil(per);
        let parts = self.scratch(0, 2 * chunks, x.cols)?;
        let mut args = args![dy, x, weight, mean, rstd, residual, dx, parts, x.rows, x.cols, dy.ld, x.ld];
        args.extend(args![residual.map_or(0, |r| r.ld), dx.ld, per, center, row_warps(x.cols)]);
        let kernel = format!("layer_norm_backward_{}", suffix(x.dtype));
        self.launch(kernel, [chunks, 1, 1], [256, 1, 1], args);
        let args = args![parts, self.y(1), self.y(2), chunks, 1_usize, x.cols, x.cols, chunks];
        self.launch("sum_to_forward_f32", [x.cols.div_ceil(32), 1, 2], [32, 8, 1], args);
        Ok(())
    }

    /// The linear layer and its loss over chunks of rows: their sum, or each where the result has as many; with gradients,
    /// dx, dweight and dbias of each chunk while its logits exist.
    fn cross_entropy(&mut self, spec: &LossSpec, gradients: bool) -> Result<(), String> {
        let with_bias = spec.bias;
        let tail = args![spec.smoothing, spec.z_loss];
        let (x, weight) = (self.x(0), self.x(1));
        let bias = with_bias.then(|| self.x(2));
        let labels = self.x(2 + usize::from(with_bias));
        let (rows, classes) = (x.rows, weight.rows);
        let labels = labels.part(0, rows, 1);
        let chunk = chunk_rows(rows, classes);
        let ld = logits_ld(classes, x.dtype);
        let kernel = |way: &str| format!("cross_entropy_{way}_{}", suffix(x.dtype));
        let mut at = chunk * ld * x.dtype.size() / 4;
        let all = Matrix { cols: classes, ld, dtype: x.dtype, ..self.scratch(0, 1, at)? };
        let summed = self.step.outputs[0].ty.shape.rank() == 0;
        let losses = if summed { self.scratch(at, rows, 1)? } else { self.y(0).part(0, rows, 1) };
        at += rows;
        let parts = element_parts(rows);
        let loss_parts = if parts > 0 { Some(self.scratch(at, 1, parts)?) } else { None };
        at += parts;
        let bias_part = self.scratch(at, 1, classes)?;
        for from in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - from);
            let (xs, logits) = (x.rows(from, n), Matrix { rows: n, ..all });
            let (labels, losses) = (labels.rows(from, n), losses.rows(from, n));
            let product = Product { a: xs, ta: false, b: weight, tb: true, c: None, bias: None, y: logits };
            self.records.push(Record::Product(product));
            if !gradients {
                let args = [args![logits, bias, labels, losses, classes, ld], tail.clone()].concat();
                self.launch(kernel("forward"), [n, 1, 1], [256, 1, 1], args);
                continue;
            }
            let dloss = self.x(3 + usize::from(with_bias));
            let args = [args![logits, bias, labels, dloss, losses, classes, ld], tail.clone()].concat();
            self.launch(kernel("backward"), [n, 1, 1], [256, 1, 1], args);
            let (dx, dw) = (self.y(1).rows(from, n), self.y(2));
            let onto = (from > 0).then_some(dw);
            let a = logits;
            let products = [
                Product { a, ta: false, b: weight, tb: false, c: None, bias: None, y: dx },
                Product { a, ta: true, b: xs, tb: false, c: onto, bias: None, y: dw },
            ];
            self.records.extend(products.map(Record::Product));
            if with_bias {
                let dbias = self.y(3).part(0, 1, classes);
                self.sum_rows(logits, if from > 0 { bias_part } else { dbias }, None)?;
                if from > 0 {
                    self.binary(Binary::Add, dbias, bias_part, dbias);
                }
            }
        }
        if summed {
            self.sum_all(losses.part(0, 1, rows), self.y(0), loss_parts);
        }
        Ok(())
    }

    fn best(&mut self, count: usize) -> Result<(), String> {
        if count > MOST_BEST {
            return Err(format!("{count} of each row, its kernel finds up to {MOST_BEST}"));
        }
        let (x, temperature, none) = (self.x(0), self.x(1), None::<Matrix>);
        let (rows, launches) = (x.rows, best_pieces(x.cols, count));
        let (mut from, mut at) = (args![x, none, none], 0);
        for (i, &(cols, piece)) in launches.iter().enumerate() {
            let stride = if i == 0 { x.ld } else { cols };
            let pieces = cols.div_ceil(piece);
            let to = if i + 1 == launches.len() {
                [self.y(0), self.y(1), self.y(2)]
            } else {
                let mut next = |cols: usize| {
                    at += rows * cols;
                    self.scratch(at - rows * cols, rows, cols)
                };
                [next(pieces * count)?, next(pieces * count)?, next(5 * pieces)?]
            };
            let mut args = std::mem::replace(&mut from, to.map(Arg::from).to_vec());
            args.push(temperature.into());
            args.extend_from_slice(&from);
            args.extend(args![cols, stride, piece, count]);
            self.launch("best_forward_f32", [pieces, rows, 1], [512, 1, 1], args);
        }
        Ok(())
    }

    fn global_norm(&mut self) -> Result<(), String> {
        let gradients: Vec<Matrix> = (0..self.step.inputs.len()).map(|i| self.x(i)).collect();
        let first = first_blocks(gradients.iter().map(|g| g.elements().div_ceil(NORM_CHUNK)));
        let (count, chunks) = (gradients.len(), first[gradients.len()]);
        let table = gradients.iter().flat_map(|g| args![*g, g.elements(), g.cols, g.ld, NORM_CHUNK]);
        let parts = self.scratch(0, 1, chunks)?;
        let args = args![Arg::Table(table.collect()), numbers(&first), count, parts];
        self.launch("global_norm_parts_forward_f32", [chunks, 1, 1], [256, 1, 1], args);
        let args = args![parts, self.y(0), chunks, self.halt()];
        self.launch("global_norm_forward_f32", [1; 3], [256, 1, 1], args);
        Ok(())
    }

    /// The updates of all steps; with `rng`, new weights are rounded by chance.
    fn adamw(&mut self, beta1: f64, beta2: f64, eps: f64, rng: Option<Matrix>) {
        let (mut table, mut blocks, mut stored) = (Vec::new(), Vec::new(), DType::F32);
        for step in self.steps {
            let Op::AdamW { weight_decay, rounding, .. } = step.op else { continue };
            let [p, g, m, v] = flat([0, 1, 2, 3].map(|i| Matrix::of(&step.inputs[i])));
            let made = |i: usize| step.outputs.get(i).map(Matrix::of);
            let half = made(3).map_or(p.dtype, |copy| copy.dtype);
            stored = if half.is_half() { half } else { stored };
            table.extend(args![p, g, m, v, made(0), made(1), made(2), made(3)]);
            let (stream, narrow) = (rounding.unwrap_or(0), p.dtype == DType::Bf16);
            table.extend(args![p.rows, p.cols, g.ld, weight_decay, stream, narrow]);
            blocks.push((p.rows * p.cols.div_ceil(4)).div_ceil(UPDATE_GROUPS));
        }
        let first = first_blocks(blocks);
        let count = self.steps.len();
        let mut args = args![Arg::Table(table), numbers(&first), count, self.x(4), self.x(5), self.x(6)];
        args.extend(rng.map(Arg::from));
        args.extend(args![beta1, beta2, 1.0 - beta1, 1.0 - beta2, beta1.ln(), beta2.ln(), eps, self.halt()]);
        let kind = if rng.is_some() { "adamw_rounded" } else { "adamw" };
        let kernel = format!("{kind}_forward_{}", suffix(stored));
        self.launch(kernel, [first[count], 1, 1], [256, 1, 1], args);
    }
}

/// Of tensors with so many blocks each, the number of each one's first, and how many there are.
fn first_blocks(blocks: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut first = vec![0];
    first.extend(blocks.into_iter().scan(0, |end, n| {
        *end += n;
        Some(*end)
    }));
    first
}

/// Integers in device memory.
fn numbers(x: &[usize]) -> Arg {
    Arg::Table(x.iter().map(|&n| n.into()).collect())
}
