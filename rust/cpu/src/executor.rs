//! Runs a plan: copies the inputs in, walks the steps, copies the outputs out. Nothing is allocated inside a step.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use pyrformer_graph::op::DropoutSpec;
use pyrformer_graph::plan::Port;
use pyrformer_graph::{
    AttentionSpec, DType, LossSpec, Op, Operand, Plan, RelativeSpec, Space, Step, Target, TensorType,
};

use crate::error::{Error, Result, room};
use crate::gemm::{Factor, PackBuffers, Packed};
use crate::kernels::attention::{self, Mask, Saved};
use crate::kernels::cache::{Cache8, Kept, KeptMut};
use crate::kernels::dropout::{Keep, dropout};
use crate::kernels::loss::{self, Gradients, Head, linear_cross_entropy};
use crate::kernels::matmul::{Fused, matmul};
use crate::kernels::optimizer::{self, AdamW};
use crate::kernels::relative::{self, Relative};
use crate::kernels::rounding::Rounding;
use crate::kernels::{cache, cast, elementwise, norm, positions, rows};
use crate::memory::{Block, Form, PerWorker, State, Store};
use crate::real::Real;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// The CPU as a target of lowering: how much work space its kernels need.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Target for Cpu {
    fn scratch_bytes(&self, op: &Op, inputs: &[&TensorType], outputs: &[&TensorType]) -> usize {
        let size = |t: &TensorType| t.dtype.size();
        match op {
            Op::SumTo => {
                let (x, y) = (&inputs[0].shape, &outputs[0].shape);
                elementwise::sum_to_scratch(x.rows(), y.rows(), y.elements()) * size(inputs[0])
            }
            Op::LayerNormGrad { .. } => {
                let x = &inputs[1].shape;
                norm::layer_norm_grad_scratch(x.rows(), x.cols()) * size(inputs[1])
            }
            Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_) | Op::LinearTokenLosses { .. } => {
                loss::scratch_elements(inputs[0].shape.rows(), inputs[1].shape.0[0]) * size(inputs[0])
            }
            Op::GlobalNorm => {
                let shapes = inputs.iter().map(|t| (t.shape.rows(), t.shape.cols()));
                optimizer::global_norm_parts(shapes) * size_of::<f64>()
            }
            _ => 0,
        }
    }
}

/// Bytes of work memory each worker needs for a plan.
fn worker_bytes(plan: &Plan) -> usize {
    let need = |s: &Step| match &s.op {
        Op::Attention(spec) | Op::AttentionGrad(spec) => {
            let q = &s.inputs[usize::from(matches!(s.op, Op::AttentionGrad(_)))].ty;
            let (t, d) = (q.shape.0[1], q.shape.cols() / spec.heads);
            if q.dtype == DType::F64 {
                attention::worker_bytes::<f64>(t, d)
            } else {
                attention::worker_bytes::<f32>(t, d)
            }
        }
        Op::RelativeAttention(spec) | Op::RelativeAttentionGrad(spec) => {
            let k = &s.inputs[3 + usize::from(matches!(s.op, Op::RelativeAttentionGrad(_)))].ty;
            let d = k.shape.cols() / spec.heads;
            if k.dtype == DType::F64 {
                relative::worker_bytes::<f64>(k.shape.0[1], d)
            } else {
                relative::worker_bytes::<f32>(k.shape.0[1], d)
            }
        }
        Op::CachedAttention(spec) => {
            let (slots, d) = (s.inputs[1].ty.shape.0[1], s.inputs[0].ty.shape.cols() / spec.heads);
            if s.inputs[0].ty.dtype == DType::F64 {
                cache::worker_bytes::<f64>(spec, slots, d)
            } else {
                cache::worker_bytes::<f32>(spec, slots, d)
            }
        }
        _ => 0,
    };
    plan.steps.iter().map(need).max().unwrap_or(0)
}

/// A value given for an input, or made for an output: its type and little-endian bytes, row-major without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// Type.
    pub ty: TensorType,
    /// Elements.
    pub bytes: Vec<u8>,
}

/// What one run at a time uses. A store has one, as large as its largest plan needs: plans keep nothing in it between
/// runs, so they share it.
pub(crate) struct Work {
    threads: usize,
    arena: Block,
    workers: PerWorker,
    packs_f32: PackBuffers<f32>,
    packs_f64: PackBuffers<f64>,
}

impl Work {
    fn new(arena_bytes: usize, threads: usize, worker_bytes: usize) -> Result<Self> {
        Ok(Self {
            threads,
            arena: Block::new(arena_bytes)?,
            workers: PerWorker::new(threads, worker_bytes)?,
            packs_f32: PackBuffers::new(threads)?,
            packs_f64: PackBuffers::new(threads)?,
        })
    }

    /// Grows until a plan fits.
    fn fit(slot: &mut Option<Self>, arena_bytes: usize, threads: usize, worker_bytes: usize) -> Result<()> {
        let Some(work) = slot else {
            *slot = Some(Self::new(arena_bytes, threads, worker_bytes)?);
            return Ok(());
        };
        if work.threads < threads {
            let (arena, worker) =
                (work.arena.bytes().max(arena_bytes), work.workers.bytes().max(worker_bytes));
            *work = Self::new(arena, threads, worker)?;
        }
        if work.arena.bytes() < arena_bytes {
            work.arena = Block::new(arena_bytes)?;
        }
        if work.workers.bytes() < worker_bytes {
            work.workers = PerWorker::new(work.threads, worker_bytes)?;
        }
        Ok(())
    }
}

/// The element types, each with its buffers for matrix products.
trait Element: Real {
    fn packs(work: &Work) -> &PackBuffers<Self>;

    /// A packed state, which is of float32.
    fn packed(state: &Packed<f32>) -> Option<&Packed<Self>>;
}

impl Element for f32 {
    fn packs(work: &Work) -> &PackBuffers<Self> {
        &work.packs_f32
    }

    fn packed(state: &Packed<f32>) -> Option<&Packed<Self>> {
        Some(state)
    }
}

impl Element for f64 {
    fn packs(work: &Work) -> &PackBuffers<Self> {
        &work.packs_f64
    }

    fn packed(_: &Packed<f32>) -> Option<&Packed<Self>> {
        None
    }
}

/// A moment of a run: before or after the step of a number.
#[derive(Clone, Copy)]
pub(crate) enum Moment {
    Before(usize),
    After(usize),
}

/// A plan bound to its states, its memory and a pool of threads.
pub struct CpuExecutor {
    plan: Arc<Plan>,
    store: Arc<Store>,
    states: Vec<Arc<State>>,
    pool: Arc<Pool>,
}

impl CpuExecutor {
    /// Binds a plan to a store; states that the store lacks are made, zero.
    ///
    /// # Errors
    /// When a state has another type, the memory cannot be had, or the plan computes in bfloat16, which the CPU keeps
    /// and casts only, or has float16.
    pub fn new(plan: Arc<Plan>, store: Arc<Store>, pool: Arc<Pool>) -> Result<Self> {
        for step in &plan.steps {
            let moved = matches!(step.op, Op::Cast(_) | Op::Copy);
            let narrow = |d: &DType| d.is_half() && !(moved && *d == DType::Bf16);
            if let Some(d) = step.inputs.iter().chain(&step.outputs).map(|o| o.ty.dtype).find(narrow) {
                return Err(Error::Unsupported(step.op.name(), d));
            }
        }
        let states = store.link(&plan)?;
        Work::fit(&mut store.work(), plan.arena_bytes, pool.threads(), worker_bytes(&plan))?;
        Ok(Self { plan, store, states, pool })
    }

    /// Keeps the weights that the plan multiplies by in the order of the kernels, so that no product packs them again;
    /// see [`Store`]. No bit of a result changes.
    pub fn pack_weights(&self) {
        self.store.pack(&self.plan, &self.states, &self.pool);
    }

    /// Keeps the plan's caches of keys and values in 8 bits for all plans of the store: a quarter of the memory.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn quantise_caches(&self) -> Result<()> {
        self.store.quantise_caches(&self.plan, &self.states)
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Runs the plan once. `inputs` names a value for each of the plan's inputs; gives the outputs in the plan's order.
    ///
    /// A global norm that is no finite number ends the run there if no state was changed before: all states keep their
    /// values, and outputs of later steps are arbitrary.
    ///
    /// # Errors
    /// When an input is missing, unknown or of another type, an index is out of range, or there is no memory.
    pub fn run(&self, inputs: &[(&str, TensorType, &[u8])]) -> Result<Vec<Array>> {
        let outputs = |memory: &Memory<'_>| self.plan.outputs.iter().map(|port| memory.read(port)).collect();
        self.watched(inputs, |_, _| Ok(ControlFlow::Continue(())), outputs)?
    }

    /// Runs the plan once as [`run`](Self::run) does, and appends the first `rows` rows of its first output, which is of
    /// floats, to `to`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_into(
        &self,
        inputs: &[(&str, TensorType, &[u8])],
        rows: usize,
        to: &mut Vec<f32>,
    ) -> Result<()> {
        let output = &self.plan.outputs[0].operand;
        let append = |memory: &Memory<'_>| match output.ty.dtype {
            DType::F64 => {
                let view = memory.mat::<f64>(output);
                (0..rows).for_each(|r| to.extend(view.row(r).iter().map(|&x| x as f32)));
            }
            _ => {
                let view = memory.mat::<f32>(output);
                (0..rows).for_each(|r| to.extend_from_slice(view.row(r)));
            }
        };
        self.watched(inputs, |_, _| Ok(ControlFlow::Continue(())), append)
    }

    /// Runs the plan once as [`run`](Self::run) does, and tells each output as soon as the last step that writes it is
    /// done, while those behind it are still computed: its number, and its value. Ends where it is told to break off.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_telling(
        &self,
        inputs: &[(&str, TensorType, &[u8])],
        mut tell: impl FnMut(usize, Array) -> ControlFlow<()>,
    ) -> Result<()> {
        let done: Vec<usize> = self.plan.outputs.iter().map(|port| self.written_by(&port.operand)).collect();
        let last = self.plan.steps.len().saturating_sub(1);
        let watch = |moment: Moment, memory: &Memory<'_>| {
            let Moment::After(number) = moment else { return Ok(ControlFlow::Continue(())) };
            for (i, port) in self.plan.outputs.iter().enumerate() {
                if done[i].min(last) == number && tell(i, memory.read(port)?).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        };
        self.watched(inputs, watch, |_| ())
    }

    /// The number of the last step that writes into an operand's memory; the number of steps where none does.
    fn written_by(&self, operand: &Operand) -> usize {
        let meets =
            |o: &Operand| o.space == operand.space && o.offset < operand.end() && operand.offset < o.end();
        let writes = |step: &Step| step.outputs.iter().any(meets);
        self.plan.steps.iter().rposition(writes).unwrap_or(self.plan.steps.len())
    }

    /// Runs the plan once as [`run`](Self::run) does, and gives the seconds that each step took.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn profile(&self, inputs: &[(&str, TensorType, &[u8])]) -> Result<Vec<f64>> {
        let mut seconds = vec![0.0; self.plan.steps.len()];
        let mut began = Instant::now();
        self.watched(
            inputs,
            |moment, _| {
                match moment {
                    Moment::Before(_) => began = Instant::now(),
                    Moment::After(step) => seconds[step] = began.elapsed().as_secs_f64(),
                }
                Ok(ControlFlow::Continue(()))
            },
            |_| (),
        )?;
        Ok(seconds)
    }

    /// Runs the plan once, calling `watch` before and after each step until it breaks off the run, and `read` at the end.
    pub(crate) fn watched<R>(
        &self,
        inputs: &[(&str, TensorType, &[u8])],
        mut watch: impl FnMut(Moment, &Memory<'_>) -> Result<ControlFlow<()>>,
        read: impl FnOnce(&Memory<'_>) -> R,
    ) -> Result<R> {
        let slot = self.store.work();
        let Some(work) = slot.as_ref() else {
            return Err(Error::Internal("a store without work memory".to_owned()));
        };
        let _access = self.store.lock(&self.plan);
        let memory = Memory { arena: &work.arena, states: &self.states };
        self.check(inputs)?;
        for port in &self.plan.inputs {
            let Some((_, _, bytes)) = inputs.iter().find(|i| i.0 == port.name) else {
                return Err(Error::Input(format!("input {:?} is missing", port.name)));
            };
            // SAFETY: `check` compared the sizes, inputs are contiguous, and this run has the arena alone.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.address(&port.operand), bytes.len())
            };
        }
        let mut changed = false;
        for (number, step) in self.plan.steps.iter().enumerate() {
            if watch(Moment::Before(number), &memory)?.is_break() {
                break;
            }
            let run = Run { memory, pool: &self.pool, work, step };
            match step.outputs[0].ty.dtype {
                _ if matches!(step.op, Op::Cast(_)) => run.cast(),
                DType::I32 => run.integers()?,
                DType::F32 => run.floats::<f32>()?,
                DType::F64 => run.floats::<f64>()?,
                // Of what else the plan may hold in bfloat16, only copies are steps.
                DType::Bf16 | DType::F16 => elementwise::copy::<u16>(run.pool, run.x(0), run.y(0)),
            }
            changed |= step.outputs.iter().any(|o| matches!(o.space, Space::State(_)));
            let spoiled = !changed && step.op == Op::GlobalNorm && !run.is_finite();
            if watch(Moment::After(number), &memory)?.is_break() || spoiled {
                break;
            }
        }
        Ok(read(&memory))
    }

    fn check(&self, inputs: &[(&str, TensorType, &[u8])]) -> Result<()> {
        for (name, ty, bytes) in inputs {
            let Some(port) = self.plan.inputs.iter().find(|p| p.name == *name) else {
                let known: Vec<&str> = self.plan.inputs.iter().map(|p| p.name.as_str()).collect();
                return Err(Error::Input(format!(
                    "there is no input {name:?}; the inputs are {}",
                    known.join(", ")
                )));
            };
            if port.operand.ty != *ty || bytes.len() != ty.bytes() {
                return Err(Error::Input(format!("input {name:?} must be {}, got {ty}", port.operand.ty)));
            }
        }
        Ok(())
    }
}

/// Where the operands of a plan are.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    arena: &'a Block,
    states: &'a [Arc<State>],
}

impl<'a> Memory<'a> {
    fn address(&self, o: &Operand) -> *mut u8 {
        let base = match o.space {
            Space::Arena => self.arena.as_ptr(),
            Space::State(i) => match self.form(i) {
                Form::Plain(block) => block.as_ptr(),
                // Only the steps that `weights` names read these, and they do not ask for an address.
                Form::Packed(_) | Form::Int8(_) | Form::Cache8(_) => unreachable!("a state in another form"),
            },
        };
        // SAFETY: the memory plan keeps every operand inside its block.
        unsafe { base.add(o.offset) }
    }

    /// How a state is kept.
    fn form(&self, state: usize) -> &'a Form {
        // SAFETY: a run holds the store's access lock.
        unsafe { self.states[state].form() }
    }

    /// The floats of an operand that is a state in another form than row by row.
    pub(crate) fn laid_out(&self, o: &Operand) -> Result<Option<Vec<f32>>> {
        let Space::State(i) = o.space else { return Ok(None) };
        if let Form::Plain(_) = self.form(i) {
            return Ok(None);
        }
        // SAFETY: as above.
        let bytes = unsafe { self.states[i].bytes() }?;
        let mut floats = room(bytes.len() / 4)?;
        floats.extend(bytes.as_chunks().0.iter().map(|x| f32::from_ne_bytes(*x)));
        Ok(Some(floats))
    }

    pub(crate) fn mat<T>(&self, o: &Operand) -> Mat<'a, T> {
        let shape = &o.ty.shape;
        // SAFETY: the memory plan gives the operand these rows, and no step writes to what it reads but as
        // `Op::in_place` allows, which kernels respect.
        unsafe { Mat::from_raw(self.address(o).cast(), shape.rows(), shape.cols(), o.row_stride) }
    }

    fn mat_mut<T>(&self, o: &Operand) -> MatMut<'a, T> {
        let shape = &o.ty.shape;
        // SAFETY: as above; the run has the arena alone, and updated states through the store's lock.
        unsafe { MatMut::from_raw(self.address(o).cast(), shape.rows(), shape.cols(), o.row_stride) }
    }

    fn read(&self, port: &Port) -> Result<Array> {
        let ty = port.operand.ty.clone();
        let (rows, row_bytes) = (ty.shape.rows(), ty.shape.cols() * ty.dtype.size());
        let view: Mat<'_, u8> =
            // SAFETY: the operand's rows, seen as bytes.
            unsafe { Mat::from_raw(self.address(&port.operand), rows, row_bytes, port.operand.row_stride * ty.dtype.size()) };
        let mut bytes = room(ty.bytes())?;
        (0..rows).for_each(|r| bytes.extend_from_slice(view.row(r)));
        Ok(Array { ty, bytes })
    }
}

/// One step under way.
struct Run<'a> {
    memory: Memory<'a>,
    pool: &'a Pool,
    work: &'a Work,
    step: &'a Step,
}

impl<'a> Run<'a> {
    fn x<T>(&self, i: usize) -> Mat<'a, T> {
        self.memory.mat(&self.step.inputs[i])
    }

    fn y<T>(&self, i: usize) -> MatMut<'a, T> {
        self.memory.mat_mut(&self.step.outputs[i])
    }

    /// A right factor, `[N, K]` if transposed.
    fn factor<T: Element>(&self, i: usize, transposed: bool) -> Factor<'a, T> {
        let kept = match self.step.inputs[i].space {
            Space::State(number) => match self.memory.form(number) {
                Form::Plain(_) => None,
                Form::Packed(packed) => T::packed(packed).map(Factor::Packed),
                Form::Int8(int8) => Some(Factor::Int8(int8)),
                Form::Cache8(_) => None,
            },
            Space::Arena => None,
        };
        kept.unwrap_or_else(|| Factor::Floats(self.x(i), transposed))
    }

    /// A cache that is kept in 8 bits.
    fn cache8(&self, i: usize) -> Option<&'a Cache8> {
        let Space::State(number) = self.step.inputs[i].space else { return None };
        match self.memory.form(number) {
            Form::Cache8(cache) => Some(cache),
            _ => None,
        }
    }

    /// A contiguous integer operand, flattened.
    fn ints(&self, i: usize) -> &'a [i32] {
        let o = &self.step.inputs[i];
        // SAFETY: integer operands are inputs or whole results, without gaps.
        let flat: Mat<'a, i32> =
            unsafe { Mat::from_raw(self.memory.address(o).cast(), 1, o.ty.shape.elements(), 0) };
        flat.row(0)
    }

    /// A contiguous floating-point operand, flattened to one row.
    fn flat<T>(&self, i: usize) -> &'a [T] {
        let o = &self.step.inputs[i];
        debug_assert!(o.is_contiguous());
        // SAFETY: statistics and vectors are whole results or states, without gaps.
        let flat: Mat<'a, T> =
            unsafe { Mat::from_raw(self.memory.address(o).cast(), 1, o.ty.shape.elements(), 0) };
        flat.row(0)
    }

    /// A contiguous result as one row.
    fn flat_mut<T>(&self, i: usize) -> MatMut<'a, T> {
        let o = &self.step.outputs[i];
        // SAFETY: as `flat`, and the kernel has the result alone.
        unsafe { MatMut::from_raw(self.memory.address(o).cast(), 1, o.ty.shape.elements(), 0) }
    }

    fn scratch<T>(&self) -> MatMut<'a, T> {
        match &self.step.scratch {
            // SAFETY: the scratch holds as many bytes as `Cpu::scratch_bytes` asked for.
            Some(o) => unsafe {
                MatMut::from_raw(self.memory.address(o).cast(), 1, o.ty.bytes() / size_of::<T>(), 0)
            },
            None => MatMut::new(&mut [], 0, 0),
        }
    }

    fn scalar<T: Real>(&self, i: usize) -> f64 {
        self.x::<T>(i).row(0)[0].to_f64()
    }

    /// Whether the first result, a scalar, is a finite number.
    fn is_finite(&self) -> bool {
        let o = &self.step.outputs[0];
        match o.ty.dtype {
            DType::F32 => self.memory.mat::<f32>(o).row(0)[0].is_finite(),
            DType::F64 => self.memory.mat::<f64>(o).row(0)[0].is_finite(),
            DType::I32 | DType::Bf16 | DType::F16 => true,
        }
    }

    fn rng(&self, operand: usize) -> [i32; 4] {
        let rng = self.ints(operand);
        [rng[0], rng[1], rng[2], rng[3]]
    }

    fn keep(&self, spec: &DropoutSpec, operand: usize) -> Keep {
        Keep::new(spec, self.rng(operand))
    }

    fn mask<T>(&self, spec: &AttentionSpec, fixed: usize) -> Mask<'a, T> {
        let at = spec.extras(fixed);
        Mask {
            spec: *spec,
            segments: at.segments.map(|i| self.ints(i)),
            key_bias: at.key_bias.map(|i| self.x(i)),
            prefix: at.prefix.map(|i| self.ints(i)),
            keep: spec.dropout.as_ref().zip(at.rng).map(|(d, i)| self.keep(d, i)),
        }
    }

    /// The operands of relative attention, from operand `q` on.
    fn relative<T: Element>(&self, spec: &RelativeSpec, q: usize) -> Relative<'a, T> {
        let (at, extra) = (q + 7, q + 10);
        let rng = extra + usize::from(spec.hidden);
        Relative {
            spec: *spec,
            batch: self.batch(q),
            q: [self.x(q), self.x(q + 1), self.x(q + 2)],
            k: self.x(q + 3),
            v: self.x(q + 4),
            r: self.x(q + 5),
            kinds: self.x(q + 6),
            at: self.ints(at),
            q_kinds: self.ints(at + 1),
            k_kinds: self.ints(at + 2),
            hidden: spec.hidden.then(|| self.ints(extra)),
            keep: spec.dropout.as_ref().map(|d| self.keep(d, rng)),
        }
    }

    fn batch(&self, operand: usize) -> usize {
        self.step.inputs[operand].ty.shape.0[0]
    }

    /// float32 from bfloat16, or bfloat16 from float32.
    fn cast(&self) {
        match self.step.outputs[0].ty.dtype {
            DType::Bf16 => cast::narrow(self.pool, self.x(0), self.y(0)),
            _ => cast::widen(self.pool, self.x(0), self.y(0)),
        }
    }

    /// Steps whose first result is integer: only layout and rows.
    fn integers(&self) -> Result<()> {
        match &self.step.op {
            Op::Copy => elementwise::copy::<i32>(self.pool, self.x(0), self.y(0)),
            Op::Gather => {
                let table: Mat<'_, i32> = self.x(0);
                let copy = |r: usize, to: &mut [i32]| to.copy_from_slice(table.row(r));
                rows::gather(self.pool, (table.rows, copy), self.ints(1), self.y(0))?;
            }
            Op::Fill { value } => {
                let y: MatMut<'_, i32> = self.y(0);
                // SAFETY: no task runs.
                (0..y.rows).for_each(|r| unsafe { y.row_mut(r) }.fill(*value as i32));
            }
            Op::Iota { start, step } => {
                let y: MatMut<'_, i32> = self.flat_mut(0);
                // SAFETY: no task runs.
                let row = unsafe { y.row_mut(0) };
                row.iter_mut().enumerate().for_each(|(i, y)| *y = start + step * i as i32);
            }
            op => return Err(Error::Internal(format!("{} on integers", op.name()))),
        }
        Ok(())
    }

    fn floats<T: Element>(&self) -> Result<()> {
        let pool = self.pool;
        match &self.step.op {
            Op::Copy => elementwise::copy::<T>(pool, self.x(0), self.y(0)),
            Op::Fill { value } => elementwise::fill::<T>(pool, *value, self.y(0)),
            Op::Gather => {
                let rows = self.step.inputs[0].ty.shape.rows();
                let table: Factor<'_, T> = self.factor(0, false);
                rows::gather(pool, (rows, |r, to: &mut [T]| table.row(r, to)), self.ints(1), self.y(0))?;
            }
            Op::ScatterAdd { .. } => {
                let base = (self.step.inputs.len() == 3).then(|| self.x::<T>(2));
                rows::scatter_add(pool, self.x::<T>(0), self.ints(1), base, self.y(0))?;
            }
            Op::Unary(f) => elementwise::unary::<T>(pool, *f, self.x(0), self.y(0)),
            Op::UnaryGrad(f) => elementwise::unary_grad::<T>(pool, *f, self.x(0), self.x(1), self.y(0)),
            Op::Gated(f) => elementwise::gated::<T>(pool, *f, self.x(0), self.x(1), self.y(0)),
            Op::GatedGrad(f) => {
                let d = [self.y(0), self.y(1)];
                elementwise::gated_grad::<T>(pool, *f, self.x(0), self.x(1), self.x(2), d);
            }
            Op::Binary(f) => elementwise::binary::<T>(pool, *f, self.x(0), self.x(1), self.y(0)),
            Op::SumTo => elementwise::sum_to::<T>(pool, self.x(0), self.y(0), self.scratch()),
            Op::Broadcast => elementwise::broadcast::<T>(pool, self.x(0), self.y(0)),
            Op::Dropout(spec) => {
                let residual = (self.step.inputs.len() == 3).then(|| self.x::<T>(2));
                dropout::<T>(pool, &self.keep(spec, 1), self.x(0), residual, self.y(0));
            }
            Op::MatMul { ta, tb, epilogue: e } => {
                let mut next = 2;
                let mut operand = |present: bool| {
                    next += usize::from(present);
                    present.then(|| self.x::<T>(next - 1))
                };
                let fused = Fused {
                    epilogue: *e,
                    bias: operand(e.bias),
                    x: operand(e.act_grad.is_some()),
                    residual: operand(e.residual),
                    pre: e.keep_pre.then(|| self.y(1)),
                };
                matmul::<T>(
                    pool,
                    T::packs(self.work),
                    (self.x(0), *ta),
                    self.factor(1, *tb),
                    self.y(0),
                    fused,
                );
            }
            Op::LayerNorm { eps, center } => {
                let bias: &[T] = if self.step.inputs.len() == 3 { self.flat(2) } else { &[] };
                let (mean, rstd) = (self.flat_mut(1), self.flat_mut(2));
                norm::layer_norm(pool, *eps, *center, self.x(0), self.flat(1), bias, self.y(0), mean, rstd);
            }
            Op::LayerNormGrad { center } => {
                let residual = (self.step.inputs.len() == 6).then(|| self.x::<T>(5));
                let (mean, rstd) = (self.flat(3), self.flat(4));
                let (dw, db) = (self.flat_mut(1), self.flat_mut(2));
                norm::layer_norm_grad(
                    pool,
                    *center,
                    self.x(0),
                    self.x(1),
                    self.flat(2),
                    mean,
                    rstd,
                    residual,
                    self.y(0),
                    dw,
                    db,
                    self.scratch(),
                );
            }
            Op::RopeTable { inv_freq, scale, .. } => {
                positions::rope_table::<T>(pool, self.ints(0), inv_freq, *scale, self.y(0));
            }
            Op::Rope { heads, inverse } => {
                positions::rope::<T>(pool, *heads, *inverse, self.x(0), self.x(1), self.y(0));
            }
            Op::AlibiBias { slopes, scale, round, .. } => {
                positions::alibi_bias::<T>(slopes, *scale, *round, self.ints(0), self.y(0));
            }
            Op::Attention(spec) => {
                let (mask, qkv) = (self.mask(spec, 3), [self.x::<T>(0), self.x(1), self.x(2)]);
                attention::attention(
                    pool,
                    &self.work.workers,
                    T::packs(self.work),
                    &mask,
                    self.batch(0),
                    qkv,
                    self.y(0),
                    self.y(1),
                );
            }
            Op::AttentionGrad(spec) => {
                let mask = self.mask(spec, 6);
                let [dout, q, k, v, out, lse] = [0, 1, 2, 3, 4, 5].map(|i| self.x::<T>(i));
                let saved = Saved { dout, q, k, v, out, lse };
                let d = [self.y(0), self.y(1), self.y(2)];
                attention::attention_grad(
                    pool,
                    &self.work.workers,
                    T::packs(self.work),
                    &mask,
                    self.batch(1),
                    saved,
                    d,
                );
            }
            Op::RelativeAttention(spec) => {
                let x = self.relative::<T>(spec, 0);
                relative::relative_attention(pool, &self.work.workers, &x, self.y(0))?;
            }
            Op::RelativeAttentionGrad(spec) => {
                let x = self.relative::<T>(spec, 1);
                let d = [0, 1, 2, 3, 4, 5, 6].map(|i| self.y(i));
                relative::relative_attention_grad(pool, &self.work.workers, &x, self.x(0), d)?;
            }
            Op::LinearCrossEntropy(spec) => self.loss::<T>(spec, None)?,
            Op::LinearTokenLosses { bias } => {
                self.loss::<T>(&LossSpec { bias: *bias, ..LossSpec::default() }, None)?;
            }
            Op::LinearCrossEntropyGrad(spec) => {
                let dloss = self.x::<T>(3 + usize::from(spec.bias)).row(0)[0];
                let dbias = spec.bias.then(|| self.flat_mut(3));
                self.loss(spec, Some(Gradients { dloss, dx: self.y(1), dweight: self.y(2), dbias }))?;
            }
            Op::CountLabels { .. } => rows::count_labels::<T>(self.ints(0), self.y(0)),
            Op::Best { .. } => {
                rows::best::<T>(pool, self.x(0), self.flat(1), self.y(0), self.y(1), self.y(2));
            }
            Op::CacheWrite => {
                let at = cache::Places { start: self.ints(3), count: self.ints(4) };
                let dims = &self.step.inputs[0].ty.shape.0;
                let to = match self.cache8(0) {
                    Some(cache) => KeptMut::Int8(cache),
                    None => {
                        // The state is updated in place; where it is not, the rest of it comes first.
                        let (old, new): (Mat<'_, T>, MatMut<'_, T>) = (self.x(0), self.y(0));
                        if !std::ptr::eq(old.as_ptr(), new.as_ptr()) {
                            elementwise::copy(pool, old, new);
                        }
                        KeptMut::Floats(new)
                    }
                };
                cache::cache_write(self.x::<T>(1), self.ints(2), at, (dims[0], dims[1]), to)?;
            }
            Op::CachedAttention(spec) => {
                let at = cache::Places { start: self.ints(4), count: self.ints(5) };
                let dims = &self.step.inputs[1].ty.shape.0;
                let kv = [1, 2].map(|i| match self.cache8(i) {
                    Some(cache) => Kept::Int8(cache),
                    None => Kept::Floats(self.x::<T>(i)),
                });
                let (workers, rows) = (&self.work.workers, self.ints(3));
                let bias = spec.key_bias.then(|| self.x(6));
                cache::cached_attention(
                    pool,
                    workers,
                    T::packs(self.work),
                    spec,
                    self.x(0),
                    kv,
                    (dims[0], dims[1]),
                    rows,
                    at,
                    bias,
                    self.y(0),
                )?;
            }
            Op::GlobalNorm => {
                let scratch: MatMut<'_, f64> = self.scratch();
                let shapes = self.step.inputs.iter().map(|o| (o.ty.shape.rows(), o.ty.shape.cols()));
                let parts = scratch.block(0, 1, 0, optimizer::global_norm_parts(shapes));
                let count = self.step.inputs.len();
                optimizer::global_norm(pool, count, &|i| self.x::<T>(i), self.y(0), parts);
            }
            Op::ClipFactor { max_norm } => {
                let factor = (max_norm / (self.scalar::<T>(0) + 1e-6)).min(1.0);
                elementwise::fill::<T>(pool, factor, self.y(0));
            }
            Op::AdamW { beta1, beta2, eps, weight_decay, rounding } => {
                let h = AdamW {
                    beta1: *beta1,
                    beta2: *beta2,
                    eps: *eps,
                    weight_decay: *weight_decay,
                    clip: self.scalar::<T>(4),
                    lr: self.scalar::<T>(5),
                    step: self.ints(6)[0],
                    rounding: rounding.map(|stream| Rounding::new(stream, self.rng(7))),
                };
                let y = [self.y(0), self.y(1), self.y(2)];
                optimizer::adamw::<T>(pool, h, [self.x(0), self.x(1), self.x(2), self.x(3)], y);
            }
            op @ (Op::Iota { .. }
            | Op::Input { .. }
            | Op::State { .. }
            | Op::Cast(_)
            | Op::Reshape
            | Op::Split { .. }
            | Op::Concat) => {
                return Err(Error::Internal(format!("{} has no kernel", op.name())));
            }
        }
        Ok(())
    }

    fn loss<T: Element>(&self, spec: &LossSpec, gradients: Option<Gradients<'_, T>>) -> Result<()> {
        let labels = self.ints(2 + usize::from(spec.bias));
        let bias = spec.bias.then(|| self.x(2));
        let vocab = self.step.inputs[1].ty.shape.0[0];
        let head = Head { spec: *spec, x: self.x(0), weight: self.factor(1, true), vocab, bias, labels };
        let loss = self.flat_mut(0);
        linear_cross_entropy(self.pool, T::packs(self.work), head, loss, gradients, self.scratch())
    }
}
