//! The launches of attention: of whole sequences, over a cache, with relative positions.

use pyrformer_graph::op::AttentionExtras;
use pyrformer_graph::{AttentionSpec, DType, RelativeSpec, TensorType};

use super::{Recorder, groups, keep, suffix};
use crate::launch::{Arg, Matrix};

/// The widest head that attention over a cache holds in registers.
const WIDEST: usize = 256;
const NO_WINDOW: usize = i32::MAX as usize;
/// Decoding reads few tokens at a time, and a query of a head has but one block: its positions are cut into spans of at
/// least so many slots, at most so many of them, where a sequence reads at most so many tokens.
const SPAN: usize = 128;
const SPANS: usize = 64;
const FEW: usize = 16;

/// Spans that a cache's positions are cut into, and the slots of one. The number of sequences does not enter, so that no
/// result depends on what is decoded beside it.
fn spans(tokens: usize, slots: usize) -> (usize, usize) {
    let span = if tokens > FEW { slots } else { SPAN.max(slots.div_ceil(SPANS)) }.max(1);
    (slots.div_ceil(span).max(1), span)
}

/// Elements of the work space of attention over a cache: sums, and two numbers a span.
pub(super) fn span_elements(spec: &AttentionSpec, inputs: &[&TensorType]) -> usize {
    let (q, slots) = (&inputs[0].shape.0, inputs[1].shape.0[1]);
    let (n, _) = spans(q[1], slots);
    if n > 1 { n * q[0] * q[1] * (q[2] + 2 * spec.heads) } else { 0 }
}

/// Blocks of relative attention for `rows` of a head of `width` columns: of 64 rows and up to 128 columns.
fn relative_blocks(rows: usize, width: usize) -> usize {
    rows.div_ceil(64) * width.div_ceil(128)
}

/// The arguments that all launches of relative attention share.
struct Relative {
    /// B, T, S, U, D.
    sizes: [usize; 5],
    operands: Vec<Arg>,
    strides: Vec<Arg>,
    tail: Vec<Arg>,
}

impl Relative {
    /// T, S, U, D.
    fn counts(&self) -> Vec<Arg> {
        self.sizes[1..].iter().map(|&n| n.into()).collect()
    }
}

impl Recorder<'_> {
    /// Sizes [B, T, H, K, D] of attention whose q is operand `q`, and the arguments after the strides.
    fn attention_sizes(&self, spec: &AttentionSpec, q: usize) -> ([usize; 5], Vec<Arg>) {
        let d = self.dims(q);
        let sizes = [d[0], d[1], spec.heads, spec.kv_heads, d[2] / spec.heads];
        let mut tail = args![spec.causal, spec.window.unwrap_or(NO_WINDOW), spec.scale];
        tail.extend(keep(spec.dropout.as_ref()));
        (sizes, tail)
    }

    /// Segments, key bias, prefix, random state: null where absent.
    fn attention_extras(&self, at: AttentionExtras) -> [Arg; 4] {
        [at.segments, at.key_bias, at.prefix, at.rng].map(|i| Arg::from(i.map(|i| self.x(i))))
    }

    /// The kernel for heads of `width` columns, its block, rows of a block, and how many blocks share a head's columns: on
    /// tensor cores where the tensors are 16-bit floats.
    fn attention_kernel(
        &self,
        way: &str,
        width: usize,
    ) -> Result<(String, [usize; 3], usize, usize), String> {
        let dtype = self.step.inputs[0].ty.dtype;
        if !dtype.is_half() {
            return Ok((format!("attention_{way}_f32"), [256, 1, 1], 64, width.div_ceil(128)));
        }
        // In float16 all is for GPUs with 64 KB of shared memory, too.
        let small = dtype == DType::F16;
        let most = if small { 128 } else { 256 };
        let widest = [64, 128, 256].into_iter().find(|&w| width <= w && width.is_multiple_of(8));
        let widest = widest.filter(|&w| w <= most).ok_or_else(|| {
            format!("heads of {width} columns, its kernels in {dtype} take multiples of 8 up to {most}")
        })?;
        let keys = way == "dkv_backward";
        let few = keys || (small && way == "dq_backward");
        let rows = if widest == 256 || (widest == 128 && few) { 64 } else { 128 };
        let slices = if widest == 256 && keys { 2 } else { 1 };
        Ok((format!("attention{widest}_{way}_{dtype}"), [128, 1, 1], rows, slices))
    }

    pub(super) fn attention(&mut self, spec: &AttentionSpec) -> Result<(), String> {
        let ([b, t, h, kv, d], tail) = self.attention_sizes(spec, 0);
        let [q, k, v] = [0, 1, 2].map(|i| self.x(i));
        let (out, lse) = (self.y(0), self.y(1));
        let mut args = args![q, k, v];
        args.extend(self.attention_extras(spec.extras(3)));
        args.extend(args![out, lse]);
        args.extend(args![b, t, h, kv, d, q.ld, k.ld, v.ld, out.ld]);
        args.extend(tail);
        let (kernel, block, rows, slices) = self.attention_kernel("forward", d)?;
        self.launch(kernel, [t.div_ceil(rows), h, b * slices], block, args);
        Ok(())
    }

    pub(super) fn attention_grad(&mut self, spec: &AttentionSpec) -> Result<(), String> {
        let ([b, t, h, kv, d], tail) = self.attention_sizes(spec, 1);
        let [dout, q, k, v, out, lse] = [0, 1, 2, 3, 4, 5].map(|i| self.x(i));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.y(i));
        let delta = self.scratch(0, b * h, t)?;
        let args = args![dout, out, delta, b, t, h, d, dout.ld, out.ld];
        // A warp, or a quarter of one, has the columns of a head of a token.
        let dtype = self.step.inputs[0].ty.dtype;
        let rows = if dtype.is_half() { 16 } else { 4 };
        let kernel = format!("attention_delta_backward_{}", suffix(dtype));
        self.launch(kernel, [(b * t * h).div_ceil(rows), 1, 1], [128, 1, 1], args);

        let mut operands = args![dout, q, k, v, lse, delta];
        operands.extend(self.attention_extras(spec.extras(6)));
        let sizes = args![b, t, h, kv, d, dout.ld, q.ld, k.ld, v.ld];
        let args = [&operands[..], &[dq.into()], &sizes, &[dq.ld.into()], &tail].concat();
        let (kernel, block, rows, slices) = self.attention_kernel("dq_backward", d)?;
        self.launch(kernel, [t.div_ceil(rows), h, b * slices], block, args);
        let args =
            [&operands[..], &[dk.into(), dv.into()], &sizes, &[dk.ld.into(), dv.ld.into()], &tail].concat();
        let (kernel, block, rows, slices) = self.attention_kernel("dkv_backward", d)?;
        self.launch(kernel, [t.div_ceil(rows), kv, b * slices], block, args);
        Ok(())
    }

    /// Sizes [B, T, S, U, D] of relative attention whose queries are operand `q`, its operands from there on with hidden
    /// and rng null where absent, and the strides of those that have one.
    fn relative(&self, spec: &RelativeSpec, q: usize) -> Relative {
        let (queries, keys) = (self.dims(q), self.dims(q + 3));
        let sizes = [queries[0], queries[1], keys[1], self.dims(q + 8)[1], queries[2] / spec.heads];
        let mut operands: Vec<Arg> = (q..q + 10).map(|i| self.x(i).into()).collect();
        operands.push(Arg::from(spec.hidden.then(|| self.x(q + 10))));
        let rng = q + 10 + usize::from(spec.hidden);
        operands.push(Arg::from(spec.dropout.as_ref().map(|_| self.x(rng))));
        let mut tail = args![spec.sees_itself, spec.scale];
        tail.extend(keep(spec.dropout.as_ref()));
        let strides = (q..q + 7).map(|i| self.x(i).ld.into()).collect();
        Relative { sizes, operands, strides, tail }
    }

    pub(super) fn relative_attention(&mut self, spec: &RelativeSpec) {
        let at = self.relative(spec, 0);
        let ([b, t, ..], out) = (at.sizes, self.y(0));
        let args = [&at.operands[..], &[out.into()], &at.counts(), &at.strides, &[out.ld.into()], &at.tail];
        let grid = [relative_blocks(t, at.sizes[4]), spec.heads, b];
        self.launch("relative_attention_forward_f32", grid, [256, 1, 1], args.concat());
    }

    pub(super) fn relative_attention_grad(&mut self, spec: &RelativeSpec) -> Result<(), String> {
        let (at, h) = (self.relative(spec, 1), spec.heads);
        let [b, t, s, u, d] = at.sizes;
        let dout = self.x(0);
        let [dq_k, dq_r, dq_s, dk, dv, dr, dkinds] = [0, 1, 2, 3, 4, 5, 6].map(|i| self.y(i));
        let rows = b * h * t;
        let [largest, inverse, delta] = [0, 1, 2].map(|i| self.scratch(i * rows, 1, rows));
        let (largest, inverse, delta) = (largest?, inverse?, delta?);
        let by_kind = self.scratch(3 * rows, 2, rows)?;
        let operands = [&[dout.into()], &at.operands[..]].concat();
        let strides = [&[dout.ld.into()], &at.strides[..]].concat();
        let saved = args![largest, inverse, delta];

        let results = args![dq_k, dq_r, dq_s, largest, inverse, delta, by_kind];
        let more = args![dq_k.ld, dq_r.ld, dq_s.ld];
        let args = [&operands[..], &results, &at.counts(), &strides, &more, &at.tail].concat();
        self.launch("relative_attention_dq_backward_f32", [relative_blocks(t, d), h, b], [256, 1, 1], args);

        let (results, more) = (args![dk, dv], args![dk.ld, dv.ld]);
        let args = [&operands[..], &saved, &results, &at.counts(), &strides, &more, &at.tail].concat();
        self.launch("relative_attention_dkv_backward_f32", [relative_blocks(s, d), h, b], [256, 1, 1], args);

        let results = args![dr, b];
        let args =
            [&operands[..], &saved, &results, &at.counts(), &strides, &[dr.ld.into()], &at.tail].concat();
        self.launch(
            "relative_attention_dr_backward_f32",
            [relative_blocks(s + u, d), h, 1],
            [256, 1, 1],
            args,
        );

        let q_s = self.x(3);
        let args = args![by_kind, q_s, dkinds, b, t, h, d, q_s.ld, dkinds.ld];
        self.launch("relative_attention_dkinds_backward_f32", [d.div_ceil(32), 2, h], [32, 8, 1], args);
        Ok(())
    }

    pub(super) fn cache_write(&mut self) {
        let (old, new, cache) = (self.x(0), self.x(1), self.y(0));
        // The state is updated in place; where it is not, the rest of it comes first.
        if old != cache {
            self.copy(old, cache);
        }
        let (c, n) = (self.dims(0), self.dims(1));
        let mut args = args![new, self.x(2), self.x(3), self.x(4), cache];
        args.extend(args![n[0], n[1], n[2], new.ld, c[0], c[1]]);
        let grid = groups(Matrix { rows: n[0] * n[1], cols: n[2], ..new });
        self.launch(format!("cache_write_forward_{}", suffix(new.dtype)), grid, [256, 1, 1], args);
    }

    pub(super) fn cached_attention(&mut self, spec: &AttentionSpec) -> Result<(), String> {
        let (d, slots) = (self.dims(0), self.dims(1));
        let width = d[2] / spec.heads;
        if width > WIDEST {
            return Err(format!("heads of {width} columns, its kernel takes up to {WIDEST}"));
        }
        let (q, out) = (self.x(0), self.y(0));
        let bias = spec.key_bias.then(|| self.x(6));
        let (batch, tokens, heads) = (d[0], d[1], spec.heads);
        let (n, span) = spans(tokens, slots[1]);
        let rows = batch * tokens * heads * n;
        let sums = if n > 1 { Some(self.scratch(0, rows, width)?) } else { None };
        let bounds = if n > 1 { Some(self.scratch(rows * width, rows, 2)?) } else { None };
        let whole = sums.is_none().then_some(out);
        let mut args = args![q, self.x(1), self.x(2), self.x(3), self.x(4), self.x(5), bias];
        args.extend(args![whole, sums, bounds]);
        args.extend(args![tokens, heads, spec.kv_heads, width, q.ld, out.ld, slots[0], slots[1]]);
        args.extend(args![spec.window.unwrap_or(NO_WINDOW), spec.scale, n, span]);
        let kernel = |what: &str| format!("cached_attention{what}_forward_{}", suffix(q.dtype));
        self.launch(kernel(""), [n * tokens, heads, batch], [128, 1, 1], args);
        if n > 1 {
            let args = args![sums, bounds, out, tokens, heads, width, out.ld, n];
            self.launch(kernel("_join"), [tokens, heads, batch], [128, 1, 1], args);
        }
        Ok(())
    }
}
