//! Memory of the executor: aligned blocks, named states, and one block per worker.

use std::any::Any;
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pyrformer_graph::{Plan, TensorType};

use crate::error::{Error, Result, room};
use crate::executor::Work;
use crate::gemm::{Int8, Packed};
use crate::kernels::cache::Cache8;
use crate::threads::Pool;
use crate::view::Mat;
use crate::weights;
use crate::zeroed::Zeroed;

/// Keeps memory alive that a store did not allocate.
pub type Owner = Arc<dyn Any + Send + Sync>;

/// A block of memory: its own, zeroed, on a 64-byte boundary, or lent by an owner.
#[derive(Debug)]
pub(crate) enum Block {
    Own(Zeroed),
    Lent {
        data: *mut u8,
        #[expect(dead_code, reason = "held for its drop")]
        owner: Owner,
    },
}

// SAFETY: the owner keeps the memory alive; who writes when is settled by the lock or worker that holds the block.
unsafe impl Send for Block {}
// SAFETY: as above: `&Block` gives out a raw pointer only.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates `bytes` zeros.
    ///
    /// # Errors
    /// When there is no such memory.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let own = Zeroed::new(bytes);
        own.map(Self::Own).ok_or_else(|| Error::no_memory(bytes))
    }

    /// The size of its own memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Own(memory) => memory.bytes(),
            Self::Lent { .. } => 0,
        }
    }

    /// The first byte.
    #[must_use]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self {
            Self::Own(memory) => memory.as_ptr(),
            Self::Lent { data, .. } => *data,
        }
    }
}

/// One tensor kept between runs.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) ty: TensorType,
    /// Changed by who has the store alone, read under its lock.
    form: UnsafeCell<Form>,
    /// The ways, as [`Self::way`] numbers them, in which plans have read it.
    ways: AtomicU8,
}

/// How a tensor is kept.
#[derive(Debug)]
pub(crate) enum Form {
    /// Row-major without gaps.
    Plain(Block),
    /// In the order of the kernels of products: the same numbers.
    Packed(Packed<f32>),
    /// Rounded to 8 bits, for good.
    Int8(Int8),
    /// A cache of keys or values in 8 bits, for good.
    Cache8(Cache8),
}

// SAFETY: a form owns its memory; the lock of the store settles who changes it when.
unsafe impl Sync for State {}

impl State {
    fn new(ty: &TensorType, form: Form) -> Self {
        Self { ty: ty.clone(), form: UnsafeCell::new(form), ways: AtomicU8::new(0) }
    }

    /// A bit for each way to read a state: as a factor `[K, N]` or `[N, K]`, and any other.
    fn way(uses: Option<Option<bool>>) -> u8 {
        match uses {
            Some(None) => 0,
            Some(Some(false)) => 1,
            Some(Some(true)) => 2,
            None => 4,
        }
    }

    /// How it is kept.
    ///
    /// # Safety
    /// The caller holds the store's access lock for as long as it uses the result.
    pub(crate) unsafe fn form(&self) -> &Form {
        // SAFETY: nobody changes it meanwhile, by the caller's promise.
        unsafe { &*self.form.get() }
    }

    /// The floats of a block as a matrix.
    ///
    /// # Safety
    /// The state is of float32, and `block` its memory; the caller has the store's access lock.
    unsafe fn matrix<'a>(&self, block: &'a Block) -> Mat<'a, f32> {
        let (rows, cols) = (self.ty.shape.rows(), self.ty.shape.cols());
        // SAFETY: the caller's promise.
        unsafe { Mat::from_raw(block.as_ptr().cast(), rows, cols, cols) }
    }

    /// Its elements, row-major without gaps.
    ///
    /// # Errors
    /// When there is no memory for them.
    ///
    /// # Safety
    /// As [`form`](Self::form).
    pub(crate) unsafe fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = room(self.ty.bytes())?;
        let mut floats = |row: &dyn Fn(usize, &mut [f32])| {
            let mut one = vec![0f32; self.ty.shape.cols()];
            for r in 0..self.ty.shape.rows() {
                row(r, &mut one);
                bytes.extend(one.iter().flat_map(|x| x.to_ne_bytes()));
            }
        };
        // SAFETY: the caller's promise; the block holds `ty.bytes()` initialised bytes.
        match unsafe { self.form() } {
            Form::Plain(block) => {
                // SAFETY: as above.
                bytes.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(block.as_ptr(), self.ty.bytes())
                });
            }
            Form::Packed(packed) => floats(&|r, to| packed.row(r, to)),
            Form::Int8(int8) => floats(&|r, to| int8.row(r, to)),
            Form::Cache8(_) => bytes.resize(self.ty.bytes(), 0),
        }
        Ok(bytes)
    }

    /// Lays its elements out as plans that do more than multiply by them read them, if they are packed.
    ///
    /// # Errors
    /// When there is no memory for it.
    ///
    /// # Safety
    /// The caller has the store alone.
    unsafe fn unpack(&self) -> Result<()> {
        // SAFETY: the caller's promise, here and below.
        if let Form::Packed(packed) = unsafe { self.form() } {
            let block = Block::new(self.ty.bytes())?;
            let cols = self.ty.shape.cols();
            for r in 0..self.ty.shape.rows() {
                // SAFETY: the block holds rows × cols zeros, which are floats, and is ours.
                packed.row(r, unsafe {
                    std::slice::from_raw_parts_mut(block.as_ptr().cast::<f32>().add(r * cols), cols)
                });
            }
            // SAFETY: as above.
            unsafe { *self.form.get() = Form::Plain(block) };
        }
        Ok(())
    }
}

/// Named tensors that several plans share: parameters, optimiser moments, caches.
///
/// Many plans may read at once; a plan that updates a state, and [`Store::set`], have the store to themselves.
#[derive(Default)]
pub struct Store {
    states: RwLock<BTreeMap<String, Arc<State>>>,
    access: RwLock<()>,
    work: Mutex<Option<Work>>,
}

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Names and types of all states, in the order of their names.
    #[must_use]
    pub fn types(&self) -> Vec<(String, TensorType)> {
        read(&self.states).iter().map(|(name, s)| (name.clone(), s.ty.clone())).collect()
    }

    /// Makes sure that a state of this name and type exists; a new one is zero.
    ///
    /// # Errors
    /// When it exists with another type.
    pub(crate) fn ensure(&self, name: &str, ty: &TensorType) -> Result<Arc<State>> {
        let mut states = write(&self.states);
        if let Some(state) = states.get(name) {
            if state.ty == *ty {
                return Ok(state.clone());
            }
            return Err(Error::State(format!("state {name:?} is {}, the plan wants {ty}", state.ty)));
        }
        let state = Arc::new(State::new(ty, Form::Plain(Block::new(ty.bytes())?)));
        states.insert(name.to_owned(), state.clone());
        Ok(state)
    }

    /// Sets a state, making it if there is none.
    ///
    /// # Errors
    /// When it exists with another type, or `bytes` is not its size.
    pub fn set(&self, name: &str, ty: &TensorType, bytes: &[u8]) -> Result<()> {
        if bytes.len() != ty.bytes() {
            let want = ty.bytes();
            return Err(Error::State(format!("state {name:?} takes {want} bytes, got {}", bytes.len())));
        }
        self.fill(name, ty, |to| to.copy_from_slice(bytes))
    }

    /// Sets a state, making it if there is none, by what `put` writes into all of its bytes. Threads may make several
    /// at once.
    ///
    /// # Errors
    /// When it exists with another type.
    pub fn fill(&self, name: &str, ty: &TensorType, put: impl FnOnce(&mut [u8])) -> Result<()> {
        if read(&self.states).contains_key(name) {
            let state = self.ensure(name, ty)?;
            let _alone = write(&self.access);
            // SAFETY: nobody else has access; the block holds `ty.bytes()` initialised bytes.
            unsafe {
                state.unpack()?;
                let Form::Plain(block) = state.form() else {
                    return Err(Error::State(format!("state {name:?} is kept in 8 bits and cannot be set")));
                };
                put(std::slice::from_raw_parts_mut(block.as_ptr(), ty.bytes()));
            }
            return Ok(());
        }
        let block = Block::new(ty.bytes())?;
        // SAFETY: the block holds `ty.bytes()` initialised bytes, and nobody else knows it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), ty.bytes()) };
        put(bytes);
        match write(&self.states).entry(name.to_owned()) {
            Entry::Vacant(place) => {
                place.insert(Arc::new(State::new(ty, Form::Plain(block))));
                return Ok(());
            }
            Entry::Occupied(_) => {}
        }
        // Made by another thread meanwhile, and perhaps held by a plan.
        self.set(name, ty, bytes)
    }

    /// Makes a state of memory that `owner` lends, in the place of one of this name; plans bound before go on with
    /// what they hold.
    ///
    /// # Errors
    /// When `data` is not aligned for the elements.
    ///
    /// # Safety
    /// `data` points to `ty.bytes()` initialised bytes, valid for reads and writes while `owner` lives, and nobody else
    /// reads or writes them meanwhile.
    pub unsafe fn adopt(&self, name: &str, ty: &TensorType, data: *mut u8, owner: Owner) -> Result<()> {
        if !data.addr().is_multiple_of(ty.dtype.size()) {
            return Err(Error::Memory(format!("the bytes of {name:?} are not aligned")));
        }
        let block = Block::Lent { data, owner };
        write(&self.states).insert(name.to_owned(), Arc::new(State::new(ty, Form::Plain(block))));
        Ok(())
    }

    /// A copy of a state's type and bytes.
    ///
    /// # Errors
    /// When there is none of this name, or no memory for a copy.
    pub fn get(&self, name: &str) -> Result<(TensorType, Vec<u8>)> {
        let state = read(&self.states)
            .get(name)
            .cloned()
            .ok_or_else(|| Error::State(format!("there is no state called {name:?}")))?;
        let _shared = read(&self.access);
        // SAFETY: the lock is held.
        Ok((state.ty.clone(), unsafe { state.bytes() }?))
    }

    /// Keeps the weights of a plan in 8 bits from here on: the float32 states that it only multiplies by, or takes rows
    /// of. Plans bound before go on with what they hold. Gives the names.
    ///
    /// # Errors
    /// When a state of the plan has another type, or there is no memory.
    pub fn quantise(&self, plan: &Plan) -> Result<Vec<String>> {
        let mut names = vec![];
        for (number, state) in self.link(plan)?.into_iter().enumerate() {
            let Some(Some(transposed)) = weights::uses(plan, number) else { continue };
            let kept = {
                let _alone = write(&self.access);
                // SAFETY: nobody else has access; a float32 state holds rows × cols floats.
                unsafe {
                    state.unpack()?;
                    let Form::Plain(block) = state.form() else { continue };
                    Int8::new(&state.matrix(block), transposed)?
                }
            };
            let name = &plan.states[number].name;
            write(&self.states).insert(name.clone(), Arc::new(State::new(&state.ty, Form::Int8(kept))));
            names.push(name.clone());
        }
        Ok(names)
    }

    /// Keeps the weights of a plan in the order of the kernels from here on, so that products need not pack them: the
    /// float32 states that it multiplies by, if no plan reads them in another way and nobody lent their memory. Where
    /// there is no memory to do so, they stay as they are.
    ///
    /// A plan that is bound later and reads one in another way has it laid out row by row again, for good.
    pub(crate) fn pack(&self, plan: &Plan, states: &[Arc<State>], pool: &Pool) {
        for (number, state) in states.iter().enumerate() {
            let Some(Some(transposed)) = weights::uses(plan, number) else { continue };
            let _alone = write(&self.access);
            // SAFETY: nobody else has access.
            if let Form::Plain(block) = unsafe { state.form() }
                && matches!(block, Block::Own(_))
                && state.ways.load(Ordering::Relaxed) == State::way(Some(Some(transposed)))
                // SAFETY: a float32 state holds rows × cols floats.
                && let Some(packed) = Packed::new(pool, &unsafe { state.matrix(block) }, transposed)
            {
                // SAFETY: as above; the reference into the old form ends here.
                unsafe { *state.form.get() = Form::Packed(packed) };
            }
        }
    }

    /// Keeps the caches of keys and values of a plan in 8 bits from here on: the float32 states that it writes tokens to
    /// and attends over. What they hold is rounded.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub(crate) fn quantise_caches(&self, plan: &Plan, states: &[Arc<State>]) -> Result<()> {
        for (number, state) in states.iter().enumerate() {
            let Some(Some(heads)) = weights::cached(plan, number) else { continue };
            let _alone = write(&self.access);
            // SAFETY: nobody else has access; a float32 state holds rows × cols floats; no reference into the old form
            // is left when it goes.
            unsafe {
                let Form::Plain(block) = state.form() else { continue };
                let tokens = state.matrix(block);
                let cache = Cache8::new(tokens.rows, heads, tokens.cols / heads)?;
                (0..tokens.rows).for_each(|r| cache.write(r, tokens.row(r)));
                *state.form.get() = Form::Cache8(cache);
            }
        }
        Ok(())
    }

    /// Forgets a state; plans that hold it keep it alive.
    pub fn remove(&self, name: &str) {
        write(&self.states).remove(name);
    }

    /// The states of a plan, in its order.
    pub(crate) fn link(&self, plan: &Plan) -> Result<Vec<Arc<State>>> {
        let states: Vec<Arc<State>> =
            plan.states.iter().map(|s| self.ensure(&s.name, &s.ty)).collect::<Result<_>>()?;
        for (number, state) in states.iter().enumerate() {
            let uses = weights::uses(plan, number);
            let _alone = write(&self.access);
            let ways = state.ways.fetch_or(State::way(uses), Ordering::Relaxed) | State::way(uses);
            // SAFETY: nobody else has access.
            let kept = match unsafe { state.form() } {
                Form::Plain(_) => continue,
                Form::Packed(kept) => kept.transposed(),
                Form::Int8(kept) => kept.transposed(),
                Form::Cache8(kept) => {
                    if weights::cached(plan, number)
                        .is_some_and(|heads| heads.is_none_or(|h| h == kept.heads()))
                    {
                        continue;
                    }
                    let name = &plan.states[number].name;
                    return Err(Error::State(format!(
                        "{name} is a cache of 8 bits and cannot be read otherwise"
                    )));
                }
            };
            if ways & !State::way(Some(Some(kept))) == 0 {
                continue;
            }
            // SAFETY: as above.
            unsafe {
                state.unpack()?;
                if let Form::Int8(_) = state.form() {
                    let name = &plan.states[number].name;
                    return Err(Error::State(format!(
                        "{name} is kept in 8 bits, which serves generation, scoring and embedding only; load the \
                         model without load_in_8bit"
                    )));
                }
            }
        }
        Ok(states)
    }

    /// The memory that runs of this store's plans use, one at a time.
    pub(crate) fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the plan may run: alone if it updates a state, beside other readers otherwise.
    pub(crate) fn lock(&self, plan: &Plan) -> Access<'_> {
        if plan.states.iter().any(|s| s.updated) {
            Access::Alone(write(&self.access))
        } else {
            Access::Shared(read(&self.access))
        }
    }
}

/// The right to run a plan on a store, until dropped.
#[expect(dead_code, reason = "held for its drop")]
pub(crate) enum Access<'a> {
    Alone(RwLockWriteGuard<'a, ()>),
    Shared(RwLockReadGuard<'a, ()>),
}

// A panic elsewhere leaves tensors of numbers, which are as valid as before: poisoning is ignored.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// One block of work memory per worker of a pool.
#[derive(Debug)]
pub(crate) struct PerWorker {
    blocks: Vec<UnsafeCell<Block>>,
    bytes: usize,
}

// SAFETY: `get` hands block `worker` to that worker only.
unsafe impl Sync for PerWorker {}

impl PerWorker {
    /// `bytes` for each of `workers`.
    ///
    /// # Errors
    /// When the size is beyond the address space.
    pub(crate) fn new(workers: usize, bytes: usize) -> Result<Self> {
        let blocks: Result<_> = (0..workers).map(|_| Ok(UnsafeCell::new(Block::new(bytes)?))).collect();
        Ok(Self { blocks: blocks?, bytes })
    }

    /// Size of each block.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first `len` elements of a worker's block, with whatever was left in them.
    ///
    /// # Safety
    /// * only the task that runs as `worker` uses the result, and lets it go before the task ends;
    /// * any bit pattern is a valid `T`.
    ///
    /// # Panics
    /// If the block is too small: the executor sized it wrongly.
    #[must_use]
    #[expect(clippy::mut_from_ref, reason = "a cell per worker: the caller promises to be the only one")]
    pub(crate) unsafe fn get<T>(&self, worker: usize, len: usize) -> &mut [T] {
        assert!(
            len * size_of::<T>() <= self.bytes,
            "worker memory of {} bytes is too small for {len}",
            self.bytes
        );
        // SAFETY: large enough, aligned to 64, zero-initialised, and used by this worker alone.
        unsafe { std::slice::from_raw_parts_mut((*self.blocks[worker].get()).as_ptr().cast(), len) }
    }
}
