//! Products against three loops in `f64`.

use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::simd::Level;

const LEVELS: [Level; 3] = [Level::Baseline, Level::Avx2, Level::Avx512];

fn levels() -> impl Iterator<Item = Level> {
    LEVELS.into_iter().filter(|&level| level <= simd::detect())
}

/// A matrix inside a wider one, whose gaps hold NaN.
struct Wide<T> {
    data: Vec<T>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<T: Real> Wide<T> {
    fn new(rows: usize, cols: usize, gap: usize, seed: usize) -> Self {
        let stride = cols + gap;
        let nan = T::from_f64(f64::NAN);
        let data = (0..rows * stride)
            .map(|at| {
                let mixed = (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ (seed as u64) << 17) >> 40;
                if at % stride < cols { T::from_f64(mixed as f64 / 8_388_608.0 - 1.0) } else { nan }
            })
            .collect();
        Self { data, rows, cols, stride }
    }

    fn view(&self) -> Mat<'_, T> {
        // SAFETY: the data hold `rows` rows of `stride`.
        unsafe { Mat::from_raw(self.data.as_ptr(), self.rows, self.cols, self.stride) }
    }

    fn view_mut(&mut self) -> MatMut<'_, T> {
        // SAFETY: as above.
        unsafe { MatMut::from_raw(self.data.as_mut_ptr(), self.rows, self.cols, self.stride) }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.stride + j].to_f64()
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    ta: bool,
    tb: bool,
    accumulate: bool,
    gap: usize,
}

impl Case {
    fn operands<T: Real>(&self) -> (Wide<T>, Wide<T>, Wide<T>) {
        let Case { m, n, k, ta, tb, gap, .. } = *self;
        let a = if ta { Wide::new(k, m, gap, 1) } else { Wide::new(m, k, gap, 1) };
        let b = if tb { Wide::new(n, k, 2 * gap, 2) } else { Wide::new(k, n, 2 * gap, 2) };
        (a, b, Wide::new(m, n, 3 * gap, 3))
    }

    fn check<T: Real>(&self, level: Level, pool: Option<&Pool>) -> Vec<T> {
        self.check_on(T::kernel(level), pool)
    }

    /// Runs the product with `kernel` on `pool` (or serially), checks it, and returns C.
    fn check_on<T: Real>(&self, kernel: Kernel<T>, pool: Option<&Pool>) -> Vec<T> {
        let Case { m, n, k, ta, tb, accumulate, .. } = *self;
        let (a, b, mut c) = self.operands::<T>();
        let before = c.data.clone();
        let stride = c.stride;
        let g = Gemm { a: a.view(), ta, b: b.view(), tb, c: c.view_mut(), accumulate };
        if let Some(pool) = pool {
            let seen: Vec<AtomicU32> = (0..m * n).map(|_| AtomicU32::new(0)).collect();
            let buffers = PackBuffers::with_kernel(pool.threads(), kernel).unwrap();
            let epilogue = |row: usize, column: usize, finished: &mut [T]| {
                for (j, x) in finished.iter_mut().enumerate() {
                    seen[row * n + column + j].fetch_add(1, Ordering::Relaxed);
                    *x += T::ONE;
                }
            };
            // SAFETY: `c` is ours.
            unsafe { gemm(pool, &buffers, &g, &epilogue) };
            assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{self:?}: epilogue calls");
            if !ta {
                self.check_packed(kernel, pool, &c.data);
            }
        } else {
            // SAFETY: `c` is ours.
            unsafe { gemm_serial(&mut Scratch::with_kernel(kernel).unwrap(), &g) };
        }
        let epsilon = if size_of::<T>() == 4 { 1.2e-7 } else { 2.3e-16 };
        for i in 0..m {
            for j in 0..n {
                let start = if accumulate { before[i * stride + j].to_f64() } else { 0.0 };
                let (mut sum, mut size) = (start, start.abs());
                for p in 0..k {
                    let x = if ta { a.at(p, i) } else { a.at(i, p) };
                    let y = if tb { b.at(j, p) } else { b.at(p, j) };
                    sum += x * y;
                    size += (x * y).abs();
                }
                let want = if pool.is_some() { sum + 1.0 } else { sum };
                let got = c.at(i, j);
                let bound = epsilon * ((k + 2) as f64).sqrt() * 4.0 * (size + 1.0);
                assert!((got - want).abs() <= bound, "{self:?} {kernel:?} [{i}, {j}]: {got} for {want}");
            }
            for at in i * stride + n..(i + 1) * stride {
                assert!(c.data[at].is_nan(), "{self:?} {kernel:?}: wrote beyond row {i}");
            }
        }
        c.data
    }

    /// A packed factor gives the very bits of the other, and its rows.
    fn check_packed<T: Real>(&self, kernel: Kernel<T>, pool: &Pool, want: &[T]) {
        let Case { tb, accumulate, .. } = *self;
        let (a, b, mut c) = self.operands::<T>();
        let packed = Packed::with_kernel(pool, &kernel, &b.view(), tb).expect("there is memory");
        let (buffers, add_one) =
            (PackBuffers::with_kernel(pool.threads(), kernel).unwrap(), |_, _, finished: &mut [T]| {
                finished.iter_mut().for_each(|x| *x += T::ONE);
            });
        let (by, to) = (Factor::Packed(&packed), (c.view_mut(), accumulate));
        // SAFETY: `c` is ours.
        unsafe { gemm_by(pool, &buffers, (a.view(), false), by, to, &add_one) };
        assert!(bits(&c.data) == bits(want), "{self:?} {kernel:?}: packed");
        let mut row = vec![T::ZERO; b.cols];
        for r in 0..b.rows {
            packed.row(r, &mut row);
            assert!(row == b.view().row(r), "{self:?} {kernel:?}: row {r}");
        }
    }
}

/// All NaN are one: what bits they keep on their way through operations is not said.
fn bits<T: Real>(c: &[T]) -> Vec<u64> {
    c.iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_f64().to_bits() }).collect()
}

fn transpositions(mut visit: impl FnMut(bool, bool)) {
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        visit(ta, tb);
    }
}

#[test]
fn awkward_shapes() {
    let pool = Pool::new(2);
    let shapes = [
        (0, 3, 2),
        (3, 0, 2),
        (3, 2, 0),
        (20, 20, 0),
        (1, 1, 1),
        (2, 1, 3),
        (1, 17, 5),
        (8, 65, 9),
        (9, 65, 9),
        (7, 16, 8),
        (6, 16, 1),
        (13, 33, 7),
        (12, 32, 384),
        (12, 32, 385),
        (64, 64, 32),
        (145, 15, 3),
        (31, 300, 50),
        (300, 31, 50),
        (10, 10, 800),
        (5, 1030, 6),
        (3, 7, 1000),
        (150, 530, 40),
    ];
    for (m, n, k) in shapes {
        transpositions(|ta, tb| {
            for (accumulate, gap) in [(false, 0), (true, 0), (false, 5), (true, 1)] {
                let case = Case { m, n, k, ta, tb, accumulate, gap };
                for level in levels() {
                    case.check::<f32>(level, Some(&pool));
                    case.check::<f32>(level, None);
                    case.check::<f64>(level, Some(&pool));
                }
            }
        });
    }
}

/// The kernels of machines other than x86-64.
#[test]
fn portable_kernels() {
    let (pool, case) =
        (Pool::new(2), Case { m: 20, n: 37, k: 50, ta: false, tb: false, accumulate: true, gap: 1 });
    // Miri takes a thousand times as long.
    let rows: &[usize] = if cfg!(miri) { &[8] } else { &[1, 3, 8, 20] };
    for &m in rows {
        transpositions(|ta, tb| {
            let case = Case { m, ta, tb, ..case };
            case.check_on::<f32>(micro::portable::kernel_f32(Level::Baseline), Some(&pool));
            case.check_on::<f64>(micro::portable::kernel_f64(Level::Baseline), None);
        });
    }
}

/// More steps and columns than the buffers hold at once.
#[test]
fn several_rounds_of_panels() {
    let pool = Pool::new(3);
    transpositions(|ta, tb| {
        for (m, n, k) in [(10, 20, 7000), (11, 600, 3100), (9, 9000, 20)] {
            let case = Case { m, n, k, ta, tb, accumulate: true, gap: 1 };
            case.check::<f32>(simd::detect(), Some(&pool));
            case.check::<f32>(simd::detect(), None);
        }
    });
}

#[test]
fn bits_do_not_depend_on_threads() {
    let pools = [1, 2, 3, 5].map(Pool::new);
    for (m, n, k) in [(150, 210, 20), (7, 900, 50), (30, 140, 800), (300, 65, 30), (20, 500, 50)] {
        transpositions(|ta, tb| {
            let case = Case { m, n, k, ta, tb, accumulate: true, gap: 0 };
            for level in levels() {
                let all: Vec<_> =
                    pools.iter().map(|pool| bits(&case.check::<f32>(level, Some(pool)))).collect();
                assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{case:?} {level:?}");
            }
        });
    }
}

/// A row of C is the same bits whatever rows stand beside it: streamed, packed, or in a serial product.
#[test]
fn bits_do_not_depend_on_other_rows() {
    let pool = Pool::new(2);
    for (n, k) in [(16, 64), (64, 400), (150, 33), (37, 130), (300, 9)] {
        transpositions(|ta, tb| {
            let case = |m| Case { m, n, k, ta, tb, accumulate: true, gap: 0 };
            for level in levels() {
                let first = |m: usize, pool| {
                    let (a, b, mut c) = case(70).operands::<f32>();
                    let view = a.view();
                    let a = if ta { view.block(0, k, 0, m) } else { view.block(0, m, 0, k) };
                    let g =
                        Gemm { a, ta, b: b.view(), tb, c: c.view_mut().block(0, m, 0, n), accumulate: true };
                    let kernel = f32::kernel(level);
                    // SAFETY: `c` is ours.
                    unsafe {
                        match pool {
                            Some(pool) => {
                                gemm(pool, &PackBuffers::with_kernel(2, kernel).unwrap(), &g, &no_epilogue)
                            }
                            None => gemm_serial(&mut Scratch::with_kernel(kernel).unwrap(), &g),
                        }
                    }
                    bits(&c.data[..n])
                };
                let want = first(70, Some(&pool));
                for m in [1, 2, 4, 5, 6, 7, 13, 30, 48, 49] {
                    assert_eq!(first(m, Some(&pool)), want, "{m} rows of {n} x {k}, {ta} {tb} {level:?}");
                    assert_eq!(first(m, None), want, "serial {m} rows of {n} x {k}, {ta} {tb} {level:?}");
                }
            }
        });
    }
}

#[test]
#[should_panic(expected = "does not give")]
fn shapes_must_fit() {
    let (a, b, mut c) = ([0.0f32; 6], [0.0f32; 8], [0.0f32; 8]);
    let g = Gemm {
        a: Mat::new(&a, 2, 3),
        ta: false,
        b: Mat::new(&b, 2, 4),
        tb: false,
        c: MatMut::new(&mut c, 2, 4),
        accumulate: false,
    };
    // SAFETY: `c` is ours.
    unsafe { gemm_serial(&mut Scratch::new().unwrap(), &g) };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_product(
        m in 0usize..70, n in 0usize..140, k in 0usize..90, ta: bool, tb: bool, accumulate: bool,
        gap in 0usize..4, threads in 1usize..4,
    ) {
        let case = Case { m, n, k, ta, tb, accumulate, gap };
        let pool = Pool::new(threads);
        for level in levels() {
            case.check::<f32>(level, Some(&pool));
            case.check::<f32>(level, None);
            case.check::<f64>(level, Some(&pool));
            case.check::<f64>(level, None);
        }
    }
}
