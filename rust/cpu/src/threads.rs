//! A pool of threads that runs numbered tasks.
//!
//! [`Pool::run`] publishes a job; the caller and the workers claim task numbers from one atomic counter until none are
//! left. Which thread runs which task is left to chance, so a task's result may depend on its number only, never on the
//! worker; the worker's number selects scratch memory.
//!
//! How it stays cheap: workers spin for some tens of microseconds after a job, then sleep; a job that is over before a
//! worker wakes up does not wait for it (workers enter an open job, the caller closes it and waits for those inside);
//! nothing is allocated per run.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work watches for some before it sleeps. Steps of a plan follow each other within this.
const SPIN: Duration = Duration::from_micros(50);

/// `PYRFORMER_NUM_THREADS` is not a positive number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("[threads] PYRFORMER_NUM_THREADS is {0:?}; set it to a number from 1 to {MAX_THREADS}, or unset it")]
pub struct ThreadCountError(String);

/// More threads than this are refused: a typing error rather than a wish.
pub const MAX_THREADS: usize = 1024;

/// The number of threads to use: `PYRFORMER_NUM_THREADS`, or else what the machine offers to this process.
///
/// # Errors
/// [`ThreadCountError`] if the variable is set to anything but a number from 1 to [`MAX_THREADS`].
pub fn default_threads() -> Result<usize, ThreadCountError> {
    let asked = std::env::var_os("PYRFORMER_NUM_THREADS").map(|value| value.to_string_lossy().into_owned());
    parse_threads(asked.as_deref())
}

fn parse_threads(asked: Option<&str>) -> Result<usize, ThreadCountError> {
    match asked {
        None => Ok(std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS))),
        Some(text) => match text.trim().parse() {
            Ok(n) if (1..=MAX_THREADS).contains(&n) => Ok(n),
            _ => Err(ThreadCountError(text.to_owned())),
        },
    }
}

/// Runs tasks on a fixed number of threads, the caller's included.
///
/// Dropping the pool ends its threads. After `fork` the child has none of them: its first run starts new ones.
#[derive(Debug)]
pub struct Pool {
    threads: usize,
    /// The crew of the current process; after a fork it is replaced, and the parent's leaked.
    crew: AtomicPtr<Crew>,
}

impl Pool {
    /// Starts `threads − 1` workers, or as many as the system grants. 0 counts as 1.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, MAX_THREADS);
        Self { threads, crew: AtomicPtr::new(Crew::start(threads)) }
    }

    /// The number of threads; worker numbers are below it.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `task(number, worker)` once for each number below `tasks` and returns when all calls have returned.
    ///
    /// `worker` is below [`threads`](Self::threads), and no two calls that run at the same time have the same one. The
    /// caller takes part as worker 0. A run inside a task of the same pool happens on the task's own thread, under its
    /// worker number. Runs from several threads wait for one another.
    ///
    /// # Panics
    /// With the panic of a task, after the others have ended; tasks not yet started are dropped. The pool stays usable.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if tasks == 0 {
            return;
        }
        let shared = &*self.crew().shared;
        if let Some(worker) = Frame::worker_of(shared) {
            (0..tasks).for_each(|number| task(number, worker));
            return;
        }
        let _turn = lock(&shared.turn);
        Frame::within(shared, 0, || {
            if tasks == 1 || self.threads == 1 {
                (0..tasks).for_each(|number| task(number, 0));
            } else {
                shared.run(tasks, task);
            }
        });
    }

    fn crew(&self) -> &Crew {
        let current = self.crew.load(Ordering::Acquire);
        // SAFETY: the pointer came from `Crew::start`, and is freed only by `drop`.
        let crew = unsafe { &*current };
        if crew.shared.pid == std::process::id() {
            return crew;
        }
        let fresh = Crew::start(self.threads);
        match self.crew.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: as above.
            Ok(_) => unsafe { &*fresh },
            Err(winner) => {
                // SAFETY: nobody else has seen `fresh`.
                drop(unsafe { Box::from_raw(fresh) });
                // SAFETY: as above.
                unsafe { &*winner }
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Crew::start`; `&mut self` says that no run is under way.
        drop(unsafe { Box::from_raw(*self.crew.get_mut()) });
    }
}

/// The threads of one process.
#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

impl Crew {
    fn start(threads: usize) -> *mut Crew {
        let shared = Arc::new(Shared::new());
        let handles = (1..threads)
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                let body = move || Frame::within(&shared, worker, || shared.work(worker));
                std::thread::Builder::new().name(format!("pyrformer-{worker}")).spawn(body).ok()
            })
            .collect();
        Box::into_raw(Box::new(Crew { shared, handles }))
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if self.shared.pid != std::process::id() {
            // The threads are the parent's: there is nobody to wait for here.
            self.handles.drain(..).for_each(std::mem::forget);
            return;
        }
        self.shared.quit.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for handle in self.handles.drain(..) {
            // A worker catches the panics of tasks, so it ends without one.
            let _ = handle.join();
        }
    }
}

type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// `Shared::state`: the lowest bits count the workers inside the job, one bit says that it is open for more, the rest
/// number the job.
const INSIDE: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
const NEXT_JOB: u64 = 1 << 17;

/// On its own cache lines, so that claiming tasks does not disturb those who watch `state`.
#[repr(align(128))]
#[derive(Debug)]
struct Padded<T>(T);

struct Shared {
    pid: u32,
    /// Held by the thread whose job runs.
    turn: Mutex<()>,
    state: Padded<AtomicU64>,
    next: Padded<AtomicUsize>,
    tasks: AtomicUsize,
    /// Written by the caller while no worker is inside, read by workers inside.
    task: UnsafeCell<Option<Task<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    quit: AtomicBool,
    /// Guards the two sleeps below; the counters tell the other side whether to bother.
    sleep: Mutex<()>,
    wake: Condvar,
    sleepers: AtomicUsize,
    done: Condvar,
    caller_sleeps: AtomicBool,
}

// SAFETY: `task` is written only while the job is closed and no worker is inside, and read only by workers inside.
unsafe impl Sync for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Locks, whatever a panicking holder has left: the guarded data are valid at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new() -> Self {
        Self {
            pid: std::process::id(),
            turn: Mutex::new(()),
            state: Padded(AtomicU64::new(0)),
            next: Padded(AtomicUsize::new(0)),
            tasks: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            panic: Mutex::new(None),
            quit: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            done: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
        }
    }

    /// The caller's side of a job; `turn` is held.
    fn run(&self, tasks: usize, task: Task<'_>) {
        // SAFETY: the longer lifetime ends with this function, which returns only when nobody can use it any more: no
        // worker is inside and the job is closed.
        let task: Task<'static> = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: the job is closed and no worker is inside.
        unsafe { *self.task.get() = Some(task) };
        self.tasks.store(tasks, Ordering::Relaxed);
        self.next.0.store(0, Ordering::Relaxed);
        let job = (self.state.0.load(Ordering::Relaxed) & !(OPEN | INSIDE)) + NEXT_JOB;
        self.state.0.store(job | OPEN, Ordering::SeqCst);
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        if sleepers > 0 {
            drop(lock(&self.sleep));
            (1..tasks).take(sleepers).for_each(|_| self.wake.notify_one());
        }

        self.claim(task, 0);

        self.state.0.fetch_and(!OPEN, Ordering::SeqCst);
        self.wait_until_empty();
        if let Some(payload) = lock(&self.panic).take() {
            resume_unwind(payload);
        }
    }

    /// Runs tasks until none is left. A panic ends the job and is kept for the caller.
    fn claim(&self, task: Task<'_>, worker: usize) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let number = self.next.0.fetch_add(1, Ordering::Relaxed);
                if number >= tasks {
                    break;
                }
                task(number, worker);
            }
        }));
        if let Err(payload) = result {
            self.next.0.store(tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    fn wait_until_empty(&self) {
        let empty = || self.state.0.load(Ordering::SeqCst) & INSIDE == 0;
        if spin_until(empty) {
            return;
        }
        let mut guard = lock(&self.sleep);
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while !empty() {
            guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }

    /// The life of a worker.
    fn work(&self, worker: usize) {
        let mut last = 0;
        loop {
            let ready = || {
                let state = self.state.0.load(Ordering::SeqCst);
                (state & OPEN != 0 && state / NEXT_JOB != last) || self.quit.load(Ordering::SeqCst)
            };
            if !spin_until(ready) {
                let mut guard = lock(&self.sleep);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while !ready() {
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            if self.quit.load(Ordering::SeqCst) {
                return;
            }
            let state = self.state.0.load(Ordering::SeqCst);
            if state & OPEN == 0
                || self
                    .state
                    .0
                    .compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::SeqCst)
                    .is_err()
            {
                continue;
            }
            last = state / NEXT_JOB;
            // SAFETY: this worker is inside, so the caller does not write.
            if let Some(task) = unsafe { *self.task.get() } {
                self.claim(task, worker);
            }
            let left = self.state.0.fetch_sub(1, Ordering::SeqCst) - 1;
            if left & (OPEN | INSIDE) == 0 && self.caller_sleeps.load(Ordering::SeqCst) {
                drop(lock(&self.sleep));
                self.done.notify_one();
            }
        }
    }
}

/// Watches `ready` for [`SPIN`]; whether it came.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if ready() {
                return true;
            }
            spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

thread_local! {
    /// The innermost frame of this thread.
    static INNERMOST: Cell<*const Frame> = const { Cell::new(std::ptr::null()) };
}

/// "This thread is worker `worker` of `shared`": a list through the nested runs of a thread.
struct Frame {
    shared: *const Shared,
    worker: usize,
    outer: *const Frame,
}

impl Frame {
    /// Runs `body` as worker `worker` of `shared`.
    fn within<R>(shared: &Shared, worker: usize, body: impl FnOnce() -> R) -> R {
        /// Leaves the frame, also when `body` panics.
        struct Leave(*const Frame);
        impl Drop for Leave {
            fn drop(&mut self) {
                INNERMOST.set(self.0);
            }
        }
        let frame = Frame { shared, worker, outer: INNERMOST.get() };
        let _leave = Leave(frame.outer);
        INNERMOST.set(&raw const frame);
        body()
    }

    /// Which worker of `shared` this thread is, if it is one.
    fn worker_of(shared: &Shared) -> Option<usize> {
        let mut at = INNERMOST.get();
        // SAFETY: frames in the list live on this thread's stack, below `within`, which takes them out when it ends.
        while let Some(frame) = unsafe { at.as_ref() } {
            if std::ptr::eq(frame.shared, shared) {
                return Some(frame.worker);
            }
            at = frame.outer;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pool: &Pool, tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|number, worker| {
            assert!(worker < pool.threads());
            counts[number].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn each_task_runs_once() {
        for threads in [0, 1, 2, 3, 5, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 7, 1000] {
                assert_eq!(counts(&pool, tasks), vec![1; tasks], "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn workers_wake_up_again_and_again() {
        let pool = Pool::new(3);
        for round in 0..2000 {
            if round % 200 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(counts(&pool, 1 + round % 5), vec![1; 1 + round % 5]);
        }
    }

    #[test]
    fn a_worker_number_is_never_used_twice_at_once() {
        let pool = Pool::new(4);
        let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
        let job = || {
            pool.run(200, &|_, worker| {
                assert!(!busy[worker].swap(true, Ordering::SeqCst));
                (0..50).for_each(|_| spin_loop());
                busy[worker].store(false, Ordering::SeqCst);
            });
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(job);
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            for bad in [0, 3, 99] {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(100, &|number, _| {
                        if number == bad {
                            resume_unwind(Box::new("task failed"));
                        }
                    });
                }));
                assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"task failed"));
                assert_eq!(counts(&pool, 50), vec![1; 50]);
            }
        }
    }

    #[test]
    fn nested_runs_stay_on_their_thread() {
        let (outer, other) = (Pool::new(3), Pool::new(2));
        let total = AtomicUsize::new(0);
        outer.run(10, &|_, worker| {
            let thread = std::thread::current().id();
            outer.run(10, &|_, inner| {
                assert_eq!((inner, std::thread::current().id()), (worker, thread));
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
        outer.run(2, &|_, _| {
            other.run(3, &|_, _| {
                outer.run(4, &|_, _| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
        });
        assert!(total.load(Ordering::Relaxed) >= 100);
    }

    /// A child of `fork` has the caller's thread alone; its first run starts workers of its own.
    #[cfg(unix)]
    #[test]
    fn a_forked_child_can_run_tasks() {
        use std::collections::HashSet;

        unsafe extern "C" {
            fn fork() -> i32;
            fn waitpid(process: i32, status: *mut i32, options: i32) -> i32;
            fn _exit(status: i32) -> !;
        }
        let pool = Pool::new(3);
        assert_eq!(counts(&pool, 50), vec![1; 50]);
        // SAFETY: the child uses its own memory only and leaves by `_exit`.
        let child = unsafe { fork() };
        if child == 0 {
            let works = catch_unwind(AssertUnwindSafe(|| {
                let workers = Mutex::new(HashSet::new());
                let all = counts(&pool, 50) == vec![1; 50];
                pool.run(3, &|_, worker| {
                    std::thread::sleep(Duration::from_millis(50));
                    lock(&workers).insert(worker);
                });
                drop(pool);
                all && lock(&workers).len() == 3
            }));
            // SAFETY: ends the child at once.
            unsafe { _exit(if matches!(works, Ok(true)) { 0 } else { 1 }) };
        }
        assert!(child > 0);
        let mut status = -1;
        // SAFETY: waits for the child above.
        assert_eq!(unsafe { waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(counts(&pool, 50), vec![1; 50]);
    }

    #[test]
    fn the_variable_is_followed_or_refused() {
        assert_eq!(parse_threads(Some("3")), Ok(3));
        assert!(parse_threads(None).is_ok_and(|n| n >= 1));
        for wrong in ["", "0", "-1", "two", "1e3", "99999999"] {
            assert_eq!(parse_threads(Some(wrong)), Err(ThreadCountError(wrong.to_owned())));
        }
    }
}
