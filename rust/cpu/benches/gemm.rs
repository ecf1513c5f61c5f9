//! GFLOP/s of matrix products, beside the peak of the machine: `cargo bench -p pyrformer-cpu --bench gemm [filter]`.
//!
//! The peak is a loop of independent multiply-adds in registers. A figure is the best of several runs, since other
//! processes can only slow a run down. Thin products (decoding) also show GB/s of B, the operand that is streamed; each
//! run takes the next of several copies, so that B comes from memory.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pyrformer_cpu::gemm::{
    Factor, Gemm, Int8, PackBuffers, Packed, Scratch, gemm, gemm_by, gemm_serial, no_epilogue,
};
use pyrformer_cpu::simd;
use pyrformer_cpu::threads::Pool;
use pyrformer_cpu::view::{Mat, MatMut};

/// Seconds of the fastest of `runs` calls.
fn best(runs: usize, mut call: impl FnMut()) -> f64 {
    call();
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;

    pub(super) const STEPS: usize = 1 << 17;

    /// Floating-point operations of one call of the loop for the level in use.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2() -> (f32, usize) {
        let (x, y) = (_mm256_set1_ps(0.999), _mm256_set1_ps(1e-9));
        let mut sums = [_mm256_set1_ps(1.0); 12];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        let total = sums.into_iter().reduce(|a, b| _mm256_add_ps(a, b)).map_or(0.0, |v| _mm256_cvtss_f32(v));
        (total, STEPS * 12 * 8 * 2)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512() -> (f32, usize) {
        let (x, y) = (_mm512_set1_ps(0.999), _mm512_set1_ps(1e-9));
        let mut sums = [_mm512_set1_ps(1.0); 12];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        let total = sums.into_iter().reduce(|a, b| _mm512_add_ps(a, b)).map_or(0.0, |v| _mm512_cvtss_f32(v));
        (total, STEPS * 12 * 16 * 2)
    }
}

/// GFLOP/s of threads that do nothing but multiply-adds; 0 where there is no such loop for the level.
fn peak(threads: usize) -> f64 {
    let pool = Pool::new(threads);
    let flops = AtomicUsize::new(0);
    let seconds = best(50, || {
        flops.store(0, Ordering::Relaxed);
        pool.run(threads, &|_, _| {
            #[cfg(target_arch = "x86_64")]
            {
                let (_, done) = match simd::level() {
                    // SAFETY: `level` names only what the CPU has.
                    simd::Level::Avx512 => black_box(unsafe { peak::avx512() }),
                    // SAFETY: as above.
                    simd::Level::Avx2 => black_box(unsafe { peak::avx2() }),
                    simd::Level::Baseline => (0.0, 0),
                };
                flops.fetch_add(done, Ordering::Relaxed);
            }
        });
    });
    flops.into_inner() as f64 / seconds / 1e9
}

fn random(elements: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..elements).map(|_| next()).collect()
}

struct Shape {
    what: &'static str,
    m: usize,
    n: usize,
    k: usize,
    ta: bool,
    tb: bool,
}

impl Shape {
    fn label(&self) -> String {
        let t = |t| if t { "T" } else { "N" };
        format!("{:<9} {}{} m={} n={} k={}", self.what, t(self.ta), t(self.tb), self.m, self.n, self.k)
    }

    fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// Seconds per product, given something that computes one. Each call gets the next of `copies` of B.
    fn time(&self, copies: usize, mut product: impl FnMut(&Gemm<'_, f32>)) -> f64 {
        let Shape { m, n, k, ta, tb, .. } = *self;
        let (a, b) = (random(m * k), random(copies * k * n));
        let mut c = vec![0.0f32; m * n];
        let (a_rows, a_cols) = if ta { (k, m) } else { (m, k) };
        let (b_rows, b_cols) = if tb { (n, k) } else { (k, n) };
        // Several products per measurement if one is shorter than the clock's noise.
        let repeat = (2e7 / self.flops()).ceil().max(1.0) as usize;
        let runs = (4e9 / self.flops() / repeat as f64).clamp(5.0, 60.0) as usize;
        let mut copy = 0;
        let seconds = best(runs, || {
            for _ in 0..repeat {
                copy = (copy + 1) % copies;
                let b = &b[copy * k * n..][..k * n];
                let (a, b) = (Mat::new(&a, a_rows, a_cols), Mat::new(b, b_rows, b_cols));
                product(&Gemm { a, ta, b, tb, c: MatMut::new(&mut c, m, n), accumulate: false });
            }
        });
        black_box(&c);
        seconds / repeat as f64
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let peaks = [1, 2].map(peak);
    println!("{}, peak {:.1} GFLOP/s with 1 thread, {:.1} with 2", simd::level().name(), peaks[0], peaks[1]);
    let peak = peaks[0];
    let shape = |what, m, n, k, ta, tb| Shape { what, m, n, k, ta, tb };
    let mut shapes = vec![];
    for n in [65, 128, 384, 512] {
        shapes.push(shape("small", 768, n, 128, false, false));
    }
    shapes.push(shape("small", 768, 128, 512, false, false));
    shapes.push(shape("small", 768, 128, 512, false, true));
    for (n, k) in
        [(384, 384), (1152, 384), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072)]
    {
        shapes.push(shape("large", 512, n, k, false, false));
    }
    shapes.push(shape("large", 2048, 1536, 384, false, false));
    shapes.push(shape("large", 2048, 3072, 768, false, false));
    shapes.push(shape("large", 2048, 768, 3072, false, true));
    shapes.push(shape("logits", 512, 50257, 768, false, true));
    // The head of a masked model: logits, gradients of rows and of words.
    shapes.push(shape("head", 336, 30522, 256, false, true));
    shapes.push(shape("head", 336, 256, 30522, false, false));
    shapes.push(shape("head", 30522, 256, 336, true, false));
    shapes.push(shape("gradient", 128, 512, 768, true, false));
    shapes.push(shape("gradient", 384, 1536, 2048, true, false));
    shapes.push(shape("gradient", 768, 3072, 2048, true, false));
    let shapes = shapes.into_iter().filter(|shape| shape.label().contains(&filter));
    println!("{:<40} {:>9} {:>7} {:>9} {:>7}", "", "1 thread", "peak", "2 threads", "peak");
    for shape in shapes {
        let rates = [1, 2].map(|threads| {
            let (pool, buffers) = (Pool::new(threads), PackBuffers::new(threads).expect("there is memory"));
            // SAFETY: C is the benchmark's alone.
            let seconds = shape.time(1, |g| unsafe { gemm(&pool, &buffers, g, &no_epilogue) });
            shape.flops() / seconds / 1e9
        });
        let percent = [rates[0] / peaks[0] * 100.0, rates[1] / peaks[1] * 100.0];
        println!(
            "{:<40} {:>9.1} {:>6.0}% {:>9.1} {:>6.0}%",
            shape.label(),
            rates[0],
            percent[0],
            rates[1],
            percent[1]
        );
    }

    let mut serial = vec![];
    for (m, n, k) in [(64, 64, 32), (64, 64, 64), (64, 128, 64), (32, 32, 32), (17, 23, 32)] {
        for (ta, tb) in [(false, false), (false, true), (true, false)] {
            serial.push(shape("serial", m, n, k, ta, tb));
        }
    }
    for shape in serial.into_iter().filter(|shape| shape.label().contains(&filter)) {
        let mut scratch = Scratch::new().expect("there is memory");
        // SAFETY: C is the benchmark's alone.
        let seconds = shape.time(1, |g| unsafe { gemm_serial(&mut scratch, g) });
        let rate = shape.flops() / seconds / 1e9;
        println!("{:<40} {rate:>9.1} {:>6.0}%", shape.label(), rate / peak * 100.0);
    }

    let mut thin = vec![];
    for m in [1, 2, 4, 8, 12, 16, 32, 128] {
        for tb in [false, true] {
            thin.push(shape("thin", m, 2304, 768, false, tb));
            thin.push(shape("thin", m, 768, 3072, false, tb));
        }
    }
    thin.push(shape("thin", 1, 50257, 768, false, true));
    for shape in thin.into_iter().filter(|shape| shape.label().contains(&filter)) {
        let bytes = (shape.k * shape.n * 4) as f64;
        let copies = (128e6 / bytes).ceil() as usize;
        let rates = [1, 2].map(|threads| {
            let (pool, buffers) = (Pool::new(threads), PackBuffers::new(threads).expect("there is memory"));
            // SAFETY: C is the benchmark's alone.
            let seconds = shape.time(copies, |g| unsafe { gemm(&pool, &buffers, g, &no_epilogue) });
            (shape.flops() / seconds / 1e9, bytes / seconds / 1e9)
        });
        println!(
            "{:<40} {:>9.1} {:>5.1} GB/s {:>6.1} {:>5.1} GB/s",
            shape.label(),
            rates[0].0,
            rates[0].1,
            rates[1].0,
            rates[1].1
        );
    }

    let pool = Pool::new(2);
    for m in [1, 4, 6, 8, 12, 16, 20, 32, 128] {
        for (n, k) in [(2304, 768), (3072, 768), (768, 3072), (768, 768)] {
            let weight = random(n * k);
            let weight = Mat::new(&weight, k, n);
            // As many copies as are read from memory and not from cache.
            let copies = 128_000_000 / (n * k * 4);
            kept(Shape { what: "packed", m, n, k, ta: false, tb: false }, &filter, 4, || {
                (0..copies).filter_map(|_| Packed::new(&pool, &weight, false)).collect()
            });
            kept(Shape { what: "int8", m, n, k, ta: false, tb: false }, &filter, 1, || {
                (0..copies).map(|_| Int8::new(&weight, false).expect("there is memory")).collect()
            });
        }
    }
}

/// A right factor kept in an order of its own.
trait Kept {
    fn factor(&self) -> Factor<'_, f32>;
}

impl Kept for Packed<f32> {
    fn factor(&self) -> Factor<'_, f32> {
        Factor::Packed(self)
    }
}

impl Kept for Int8 {
    fn factor(&self) -> Factor<'_, f32> {
        Factor::Int8(self)
    }
}

/// Prints the rates of products by such factors, of so many bytes an element.
fn kept<K: Kept>(shape: Shape, filter: &str, size: usize, make: impl FnOnce() -> Vec<K>) {
    if !shape.label().contains(filter) {
        return;
    }
    let weights = make();
    let rates = [1, 2].map(|threads| {
        let (pool, buffers) = (Pool::new(threads), PackBuffers::new(threads).expect("there is memory"));
        let mut copy = 0;
        let seconds = shape.time(1, |g| {
            copy = (copy + 1) % weights.len();
            let b = weights[copy].factor();
            // SAFETY: C is the benchmark's alone.
            unsafe { gemm_by(&pool, &buffers, (g.a, false), b, (g.c, false), &no_epilogue) };
        });
        (shape.flops() / seconds / 1e9, (size * shape.n * shape.k) as f64 / seconds / 1e9)
    });
    let [(one, one_read), (two, two_read)] = rates;
    println!("{:<40} {one:>9.1} {one_read:>5.1} GB/s {two:>6.1} {two_read:>5.1} GB/s", shape.label());
}
