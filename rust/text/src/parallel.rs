//! Work in numbered pieces on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Hands out the numbers of pieces, each once, to the threads that ask.
pub(crate) struct Queue {
    n: usize,
    next: AtomicUsize,
}

impl Queue {
    /// The numbers that fall to the thread that iterates.
    pub(crate) fn take(&self) -> impl Iterator<Item = usize> {
        std::iter::from_fn(|| Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < self.n))
    }
}

/// Runs `worker` on `threads` threads (0: one per core) that share the pieces `0..n`. What the workers return comes
/// in no particular order.
pub(crate) fn run<T: Send>(n: usize, threads: usize, worker: impl Fn(&Queue) -> T + Sync) -> Vec<T> {
    let queue = Queue { n, next: AtomicUsize::new(0) };
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    if threads.min(n) <= 1 {
        return vec![worker(&queue)];
    }
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.min(n)).map(|_| scope.spawn(|| worker(&queue))).collect();
        let join = |h: std::thread::ScopedJoinHandle<'_, T>| {
            h.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        handles.into_iter().map(join).collect()
    })
}

/// Runs `work` on the pieces `0..n`, each with the state of its thread; the results come in the order of the pieces.
pub(crate) fn map<S, T: Send>(
    n: usize,
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(usize, &mut S) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<(usize, T)> = run(n, threads, |queue| {
        let mut state = state();
        queue.take().map(|i| (i, work(i, &mut state))).collect::<Vec<_>>()
    })
    .into_iter()
    .flatten()
    .collect();
    results.sort_by_key(|&(i, _)| i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Cuts a sequence of items of the given sizes into runs of about `target`: the starts of the runs, and the end.
pub(crate) fn bounds(sizes: impl Iterator<Item = usize>, target: usize) -> Vec<usize> {
    let mut bounds = vec![0];
    let (mut n, mut size) = (0, 0);
    for item in sizes {
        n += 1;
        size += item + 1;
        if size >= target {
            bounds.push(n);
            size = 0;
        }
    }
    if bounds.last() != Some(&n) {
        bounds.push(n);
    }
    bounds
}
