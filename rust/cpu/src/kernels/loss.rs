//! Linear layer and cross-entropy in one, over chunks of rows: the logits of one chunk are all that is ever held.

use pyrformer_graph::LossSpec;

use crate::error::{Error, Result};
use crate::gemm::{Factor, Gemm, PackBuffers, gemm, gemm_by, no_epilogue};
use crate::kernels::elementwise::add_row;
use crate::kernels::{for_rows, rows_per_task};
use crate::real::Real;
use crate::simd::{LANES, fold_lanes, max, reduce};
use crate::simd_fn;
use crate::threads::Pool;
use crate::view::{Mat, MatMut};

/// About as many elements of logits are held at a time.
const LOGITS: usize = 12 << 20;
/// Columns of a task that sums the gradient of the bias.
const STRIP: usize = 4096;

/// Rows whose logits are held at a time, a function of the shape: chunks of equal size, as each reads all weights and
/// adds to all of their gradients.
pub(crate) fn chunk_rows(rows: usize, vocab: usize) -> usize {
    let chunks = (rows * vocab).div_ceil(LOGITS).max(1);
    rows.div_ceil(chunks).next_multiple_of(24).min(rows).max(1)
}

/// Elements of scratch: the logits of a chunk and the loss of each row.
pub(crate) fn scratch_elements(rows: usize, vocab: usize) -> usize {
    chunk_rows(rows, vocab) * vocab + rows
}

/// The layer and its labels. Shapes: x [N, C], weight [V, C], bias [V], labels [N]. Gradients need a weight of floats.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a, T> {
    pub(crate) spec: LossSpec,
    pub(crate) x: Mat<'a, T>,
    pub(crate) weight: Factor<'a, T>,
    pub(crate) vocab: usize,
    pub(crate) bias: Option<Mat<'a, T>>,
    pub(crate) labels: &'a [i32],
}

/// The gradients to fill. Shapes: dx [N, C], dweight [V, C], dbias [V].
#[derive(Clone, Copy)]
pub(crate) struct Gradients<'a, T> {
    /// Cotangent of the summed loss.
    pub(crate) dloss: T,
    pub(crate) dx: MatMut<'a, T>,
    pub(crate) dweight: MatMut<'a, T>,
    pub(crate) dbias: Option<MatMut<'a, T>>,
}

simd_fn! {
    /// The loss of one row of logits at its label; leaves its gradient times `scale` in `row`. Without smoothing and z-loss
    /// they are −log softmax(row)[label] and softmax(row) − onehot(label).
    fn loss_row<T: Real>(row: &mut [T], label: usize, scale: T, smoothing: T, z_loss: T) -> T {
        let largest = max(row);
        let even = smoothing / T::from_f64(row.len() as f64);
        let mut target = (T::ONE - smoothing) * row[label];
        if even > T::ZERO {
            target += even * reduce(row, T::ZERO, |x| x, |a, b| a + b);
        }
        let mut lanes = [T::ZERO; LANES];
        let (chunks, rest) = row.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for l in 0..LANES {
                chunk[l] = (chunk[l] - largest).exp_normal::<FUSED>();
                lanes[l] += chunk[l];
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = (*x - largest).exp_normal::<FUSED>();
            *lane += *x;
        }
        let sum = fold_lanes(lanes, |a, b| a + b);
        let lse = sum.ln() + largest;
        let factor = scale * (T::ONE + (z_loss + z_loss) * lse) / sum;
        let even = scale * even;
        for x in row.iter_mut() {
            *x = *x * factor - even;
        }
        row[label] -= scale * (T::ONE - smoothing);
        lse - target + z_loss * lse * lse
    }
}

/// The loss of each row into `loss` [N], or their sum where that is [] (or N is 1), and the gradients if asked for.
///
/// # Errors
/// When a label is not below V.
pub(crate) fn linear_cross_entropy<T: Real>(
    pool: &Pool,
    packs: &PackBuffers<T>,
    head: Head<'_, T>,
    loss: MatMut<'_, T>,
    gradients: Option<Gradients<'_, T>>,
    scratch: MatMut<'_, T>,
) -> Result<()> {
    let Head { spec, x, weight, vocab, bias, labels } = head;
    let (smoothing, z_loss) = (T::from_f64(spec.smoothing), T::from_f64(spec.z_loss));
    let rows = x.rows;
    if let Some(at) = labels.iter().position(|&l| l >= 0 && l as usize >= vocab) {
        let message = format!("label {} at place {at} is outside 0..{vocab}", labels[at]);
        return Err(Error::Index { op: "linear_cross_entropy", message });
    }
    let chunk = chunk_rows(rows, vocab);
    let losses = scratch.block(0, 1, chunk * vocab, rows);
    for from in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - from);
        // SAFETY: the scratch holds `chunk · vocab` elements before the losses.
        let logits = unsafe { MatMut::from_raw(scratch.as_ptr(), n, vocab, vocab) };
        let xs = x.block(from, n, 0, x.cols);
        let add_bias = |_, col, piece: &mut [T]| {
            if let Some(bias) = &bias {
                add_row(bias.block(0, 1, col, piece.len()).row(0), piece);
            }
        };
        // SAFETY: the logits are this kernel's scratch.
        unsafe { gemm_by(pool, packs, (xs, false), weight, (logits, false), &add_bias) };
        let scale = gradients.as_ref().map_or(T::ZERO, |g| g.dloss);
        for_rows(pool, n, rows_per_task(4 * vocab), |r| {
            // SAFETY: one task a row.
            let row = unsafe { logits.row_mut(r) };
            let label = labels[from + r];
            let value = if label < 0 {
                row.fill(T::ZERO);
                T::ZERO
            } else {
                loss_row(row, label as usize, scale, smoothing, z_loss)
            };
            // SAFETY: as above.
            unsafe { losses.set(0, from + r, value) };
        });
        let (Some(g), Factor::Floats(weight, _)) = (&gradients, weight) else { continue };
        // SAFETY: the rows are finished, and read only from here on.
        let d = unsafe { logits.as_mat() };
        let dx = g.dx.block(from, n, 0, x.cols);
        let dx = Gemm { a: d, ta: false, b: weight, tb: false, c: dx, accumulate: false };
        let dw = Gemm { a: d, ta: true, b: xs, tb: false, c: g.dweight, accumulate: from > 0 };
        // SAFETY: dx and dweight are results of this step and overlap no operand.
        unsafe {
            gemm(pool, packs, &dx, &no_epilogue);
            gemm(pool, packs, &dw, &no_epilogue);
        }
        if let Some(dbias) = &g.dbias {
            pool.run(vocab.div_ceil(STRIP), &|task, _| {
                let (col, cols) = (task * STRIP, STRIP.min(vocab - task * STRIP));
                // SAFETY: tasks have different columns.
                let sum = unsafe { dbias.block(0, 1, col, cols).row_mut(0) };
                if from == 0 {
                    sum.fill(T::ZERO);
                }
                (0..n).for_each(|r| add_row(d.block(r, 1, col, cols).row(0), sum));
            });
        }
    }
    if loss.cols == rows {
        // SAFETY: no task runs.
        unsafe { loss.row_mut(0) }.copy_from_slice(unsafe { losses.as_mat() }.row(0));
        return Ok(());
    }
    // SAFETY: no task runs.
    unsafe {
        let total: f64 = losses.row_mut(0).iter().map(|x| x.to_f64()).sum();
        loss.row_mut(0)[0] = T::from_f64(total);
    }
    Ok(())
}
