//! Work in numbered pieces on several threads, results in the order of the numbers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Hands out the numbers of pieces and takes their results.
pub(crate) struct Queue<T> {
    n: usize,
    next: AtomicUsize,
    results: Mutex<Vec<Option<T>>>,
}

impl<T> Queue<T> {
    /// The next piece nobody has taken.
    pub(crate) fn next(&self) -> Option<usize> {
        let i = self.next.fetch_add(1, Ordering::Relaxed);
        (i < self.n).then_some(i)
    }

    /// Delivers the result of piece `i`.
    pub(crate) fn done(&self, i: usize, result: T) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)[i] = Some(result);
    }
}

/// The number of threads that `threads` asks for; 0 asks for one per core.
pub(crate) fn count(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

/// Runs `worker` on `threads` threads (0: one per core) over pieces `0..n`. A worker takes pieces until there are none
/// left and delivers a result for each.
pub(crate) fn map<T: Send>(n: usize, threads: usize, worker: impl Fn(&Queue<T>) + Sync) -> Vec<T> {
    let mut results = Vec::with_capacity(n);
    results.resize_with(n, || None);
    let queue = Queue { n, next: AtomicUsize::new(0), results: Mutex::new(results) };
    match count(threads).min(n) {
        0 | 1 => worker(&queue),
        threads => std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| worker(&queue));
            }
        }),
    }
    let results = queue.results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().map(|r| r.expect("workers deliver every piece they take")).collect()
}
