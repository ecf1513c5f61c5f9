//! The operations: a closed set, few and large, and the type rule of each.
//!
//! `Op` is one short enum so that adding a member makes the compiler list every place to fill: its type rule here, its
//! derivative in `autodiff`, its cost in `cost`, its kernel in each executor, its naive twin in the CPU crate's
//! `reference`. `docs/adding-an-op.md` is the checklist.

use serde::{Deserialize, Serialize};

use crate::dtype::{DType, Shape, TensorType};
use crate::error::{Error, Result};

/// An elementwise function of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unary {
    /// x · s.
    Scale(f64),
    /// eˣ.
    Exp,
    /// tanh x.
    Tanh,
    /// 1 / (1 + e⁻ˣ).
    Sigmoid,
    /// max(x, 0).
    Relu,
    /// x · Φ(x) with the normal distribution's Φ by erf. Source: Hendrycks and Gimpel 2016, section 2.
    Gelu,
    /// The tanh form of GELU, `gelu_new`. Source: Hendrycks and Gimpel 2016, section 2.
    GeluTanh,
    /// x · sigmoid(x). Source: Elfwing et al. 2017.
    Silu,
    /// x · sigmoid(1.702 x). Source: Hendrycks and Gimpel 2016, section 2.
    QuickGelu,
    /// max(x, 0)². Source: So et al. 2021.
    Relu2,
    /// x · tanh(ln(1 + eˣ)). Source: Misra 2019.
    Mish,
    /// √x.
    Sqrt,
    /// −1, 0 or 1.
    Sign,
}

impl Unary {
    /// The name used in printed graphs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scale(_) => "scale",
            Self::Exp => "exp",
            Self::Tanh => "tanh",
            Self::Sigmoid => "sigmoid",
            Self::Relu => "relu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Silu => "silu",
            Self::QuickGelu => "quick_gelu",
            Self::Relu2 => "relu2",
            Self::Mish => "mish",
            Self::Sqrt => "sqrt",
            Self::Sign => "sign",
        }
    }
}

/// An elementwise function of two arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Binary {
    /// a + b.
    Add,
    /// a − b.
    Sub,
    /// a · b.
    Mul,
    /// a / b.
    Div,
}

impl Binary {
    /// The name used in printed graphs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
        }
    }
}

/// What a matrix product does to a finished tile while it is still in cache; filled in by the `fuse` pass.
///
/// y = act(A·B + bias) ⊙ act_grad'(x) + residual, each part optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Epilogue {
    /// Operand `bias [N]` is added.
    pub bias: bool,
    /// The activation applied.
    pub act: Option<Unary>,
    /// The value before the activation is a second result (the backward pass wants it).
    pub keep_pre: bool,
    /// Operand `x` (shape of the result): the product is multiplied by this function's derivative at `x`.
    pub act_grad: Option<Unary>,
    /// Operand `residual` (shape of the result) is added last.
    pub residual: bool,
}

impl Epilogue {
    /// Whether nothing is fused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Dropout of one site of the model: which elements fall out is a pure function of (rng, stream, element).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DropoutSpec {
    /// Probability of a zero; the rest is scaled by 1 / (1 − p).
    pub p: f64,
    /// The site: different sites draw independently.
    pub stream: u32,
}

/// Scaled dot-product attention: which keys each query sees. Source: Vaswani et al. 2017, equation 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Query heads, H.
    pub heads: usize,
    /// Key-value heads, K; H is a multiple (grouped-query attention, Ainslie et al. 2023).
    pub kv_heads: usize,
    /// Queries see no later keys.
    pub causal: bool,
    /// Query i sees only keys j with |i − j| < window.
    pub window: Option<usize>,
    /// Factor on q·k, usually 1/√D.
    pub scale: f64,
    /// An operand `segments i32[B, T]` is present: a key is seen from its own segment and from padding (segment 0);
    /// a padding key never. A query that sees nothing averages all T values, as Hugging Face's eager attention does
    /// (its mask adds the same huge negative number everywhere).
    pub segments: bool,
    /// An operand `key_bias [B, H, T]` is present and added to the scaled scores of each key; it gets no gradient.
    pub key_bias: bool,
    /// An operand `prefix i32[B]` is present: sequence b's first prefix[b] keys are seen by all its queries, whatever
    /// `causal` says. Source: Raffel et al. 2020, section 3.2.1.
    pub prefix: bool,
    /// Dropout on the probabilities.
    pub dropout: Option<DropoutSpec>,
}

/// A cross-entropy and what is added to it. Both extras are 0 in measurements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// Whether the bias operand (and its gradient) is present.
    pub bias: bool,
    /// ε of label smoothing.
    #[serde(default)]
    pub smoothing: f64,
    /// Factor of log² of the softmax's denominator.
    #[serde(default)]
    pub z_loss: f64,
}

/// Attention with relative positions and kinds of tokens: XLNet's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelativeSpec {
    /// Heads, H.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// An operand `hidden i32[B, U, U]` is present: where it is not 0, the query at the first position does not see the
    /// key at the second; remembered keys are always seen. A query that sees nothing weighs all S keys alike, and
    /// gradients flow as if its scores were equal (transformers subtracts 1e30 from each).
    pub hidden: bool,
    /// Queries see the key at their own position whatever `hidden` says: the content stream.
    pub sees_itself: bool,
    /// Dropout on the probabilities.
    pub dropout: Option<DropoutSpec>,
}

/// Places of attention's optional operands.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionExtras {
    /// `segments i32[B, T]`.
    pub segments: Option<usize>,
    /// `key_bias [B, H, T]`.
    pub key_bias: Option<usize>,
    /// `prefix i32[B]`.
    pub prefix: Option<usize>,
    /// `rng i32[4]`.
    pub rng: Option<usize>,
    /// One past the last operand.
    pub end: usize,
}

impl AttentionSpec {
    /// Where the optional operands are, if `fixed` operands come before them.
    #[must_use]
    pub fn extras(&self, fixed: usize) -> AttentionExtras {
        let mut end = fixed;
        let mut place = |present: bool| {
            end += usize::from(present);
            present.then(|| end - 1)
        };
        let (segments, key_bias) = (place(self.segments), place(self.key_bias));
        let (prefix, rng) = (place(self.prefix), place(self.dropout.is_some()));
        AttentionExtras { segments, key_bias, prefix, rng, end }
    }
}

/// An operation. Shapes use the crate's dimension letters; `..` stands for any leading axes.
///
/// Floats of an operation are of one type. Where that is bf16 or f16, these are f32 all the same: statistics, sums and losses;
/// weights and biases of norms; biases of losses; gradients of all of those and of tables; key biases, tables of angles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    // ---- Leaves ------------------------------------------------------------------------------------------------
    /// A value the caller gives at each run.
    Input {
        /// Its name.
        name: String,
    },
    /// A value kept between runs: a parameter, an optimiser moment, a cache.
    State {
        /// Its name.
        name: String,
    },
    /// A tensor of one repeated value.
    Fill {
        /// The value.
        value: f64,
    },
    /// start, start + step, start + 2·step, …: `→ i32[N]`.
    Iota {
        /// The first element.
        start: i32,
        /// The difference of neighbours.
        step: i32,
    },

    // ---- Layout: views where possible, a copy otherwise --------------------------------------------------------
    /// The same elements under another shape.
    Reshape,
    /// Cuts the last axis into parts: `[.., Σ sizes] → [.., sizes[i]]` each.
    Split {
        /// Extents of the parts.
        sizes: Vec<usize>,
    },
    /// Joins along the last axis.
    Concat,
    /// The same elements in memory of their own; put in by lowering.
    Copy,
    /// The same values in another type, f32 and bf16 or f16: narrowing rounds to the nearest, ties to even; beyond the largest
    /// number it is infinite.
    Cast(DType),

    // ---- Rows by index -----------------------------------------------------------------------------------------
    /// `table [R, C], index i32[..] → [.., C]`; rows of an f32 table may be declared as bf16 or f16.
    Gather,
    /// `source [.., C], index i32[..], (base [R, C]) → [R, C]`: base (or zero) plus each source row at its index, in
    /// the order of the rows.
    ScatterAdd {
        /// R.
        rows: usize,
    },

    // ---- Elementwise and reductions ----------------------------------------------------------------------------
    /// f(x).
    Unary(Unary),
    /// `x, dy → f'(x) · dy`.
    UnaryGrad(Unary),
    /// `gate, up → f(gate) ⊙ up`, all of one shape. Source: Shazeer 2020, equation 6.
    Gated(Unary),
    /// `dy, gate, up → dgate, dup`: dy ⊙ up ⊙ f'(gate) and dy ⊙ f(gate).
    GatedGrad(Unary),
    /// `a, b → a ∘ b`; b's shape is a's or a suffix of it, repeated over a's leading axes.
    Binary(Binary),
    /// Sums leading axes away: `[.., S] → [S]`, in fixed order.
    SumTo,
    /// Repeats over leading axes: `[S] → [.., S]`.
    Broadcast,
    /// `x, rng i32[4], (residual [..]) → x · mask / (1 − p) (+ residual)`. Source: Srivastava et al. 2014.
    Dropout(DropoutSpec),

    // ---- Transformer parts -------------------------------------------------------------------------------------
    /// `a [.., K], b [K, N] → [.., N]`, of factors in bf16 or f16 in that type or, where declared so, with its operands in f32;
    /// with `tb`, b is `[N, K]`; with `ta`, a is `[.., M]` and b `[.., N]`, both seen as
    /// rows: `[M, N]`. Then the epilogue's operands in its order: bias, x, residual.
    #[serde(rename = "matmul")]
    MatMul {
        /// Transpose a.
        ta: bool,
        /// Transpose b.
        tb: bool,
        /// What is fused.
        epilogue: Epilogue,
    },
    /// `x [.., C], weight [C], (bias [C]) → y [.., C], mean [..], rstd [..]`. Source: Ba et al. 2016, equation 4; without
    /// `center` the mean is taken to be 0: RMSNorm, Zhang and Sennrich 2019, equation 4.
    LayerNorm {
        /// Added to the variance.
        eps: f64,
        /// Whether the mean is subtracted.
        center: bool,
    },
    /// `dy, x, weight, mean, rstd, (residual [.., C]) → dx (+ residual), dweight [C], dbias [C]`.
    LayerNormGrad {
        /// Whether the mean was subtracted.
        center: bool,
    },
    /// `positions i32[..] → [.., R]`: cos of the angles position · inv_freq[i] in the first R/2 columns, sin in the rest,
    /// both times `scale`. Source: Su et al. 2021, equation 34, in transformers' `modeling_rope_utils.py` layout.
    RopeTable {
        /// Radians a position, R/2 of them.
        inv_freq: Vec<f64>,
        /// Factor on both, 1 but for YaRN and LongRoPE (their attention factor).
        scale: f64,
        /// Type of the result.
        dtype: DType,
    },
    /// `x [.., H·D], table [.., R] → [.., H·D]`: in each head the pairs (i, i + R/2), i < R/2, are turned by the table's
    /// angles; columns from R on stay.
    Rope {
        /// Heads, H.
        heads: usize,
        /// Turns backwards: the transpose.
        inverse: bool,
    },
    /// `positions i32[.., T] → [.., H, T]`: slope of the head · position · scale, a key bias for attention. Source: Press et
    /// al. 2022, section 3; a softmax does not see that slope · (j − i) lost its constant −slope · i.
    AlibiBias {
        /// One a head.
        slopes: Vec<f64>,
        /// Factor on the product.
        scale: f64,
        /// Slope and slope · position are rounded to bfloat16 before scaling, as Falcon has it
        /// (transformers' `build_alibi_tensor`).
        round: bool,
        /// Type of the result.
        dtype: DType,
    },
    /// `q [B, T, H·D], k [B, T, K·D], v [B, T, K·D], (segments i32[B, T]), (key_bias [B, H, T]), (prefix i32[B]),
    /// (rng i32[4]) → out [B, T, H·D], lse [B, H, T]`; lse is the log of the softmax's denominator (−∞ where a query sees
    /// nothing).
    Attention(AttentionSpec),
    /// `dout, q, k, v, out, lse, (segments), (key_bias), (prefix), (rng) → dq, dk, dv`. Source: Dao et al. 2022,
    /// algorithm 4.
    AttentionGrad(AttentionSpec),
    /// `q_k, q_r, q_s [B, T, H·D], k, v [B, S, H·D], r [S + U, H·D], kinds [2, H·D], at i32[B, T], q_kinds i32[B, U],
    /// k_kinds i32[B, S], (hidden i32[B, U, U]), (rng i32[4]) → [B, T, H·D]`. Query t of sequence b
    /// stands at position p = at[b, t] of the sequence's U tokens, before which S − U tokens are remembered; its score
    /// against key j is scale · (q_k·k[j] + q_r·r[U − p + j] + q_s·kinds[q_kinds[b, p] ≠ k_kinds[b, j]]). A query at −1
    /// gives zeros. Source: Yang et al. 2019, sections 2.3 and 2.5; Dai et al. 2019, equation 5.
    RelativeAttention(RelativeSpec),
    /// `dout, q_k, q_r, q_s, k, v, r, kinds, at, q_kinds, k_kinds, (hidden), (rng) → dq_k, dq_r, dq_s, dk, dv, dr,
    /// dkinds`.
    RelativeAttentionGrad(RelativeSpec),
    /// `x [.., C], weight [V, C], (bias [V]), labels i32[..] → loss []`: the sum over labels ≥ 0 of −log softmax(x·Wᵀ + b),
    /// in chunks of rows; the logits are never held in full. Other labels (−100) are ignored. With smoothing ε the target
    /// is (1 − ε)·onehot + ε/V (Szegedy et al. 2016, section 7); z_loss · log² of the softmax's denominator is added
    /// (Chowdhery et al. 2022, section 5).
    LinearCrossEntropy(LossSpec),
    /// `x, weight, (bias), labels, dloss [] → loss [], dx, dweight, (dbias)`.
    LinearCrossEntropyGrad(LossSpec),
    /// `x [.., C], weight [V, C], (bias [V]), labels i32[..] → losses [..]`: −log softmax(x·Wᵀ + b) of each row at its
    /// label, 0 without one, in chunks of rows as above.
    LinearTokenLosses {
        /// Whether the bias operand is present.
        bias: bool,
    },
    /// `labels i32[..] → []`: how many labels are ≥ 0, as `dtype`.
    CountLabels {
        /// Type of the result.
        dtype: DType,
    },

    // ---- Decoding ----------------------------------------------------------------------------------------------
    /// `logits [.., V], temperature [R] → best [R, K], tokens i32[R, K], masses [R, 4]`: the K = `count` greatest logits of
    /// each of R rows, the greatest first and of equals that of the lower token, and their tokens; with m = `best[r, 0]` the
    /// sum of exp(x − m) over all V, and that of exp(x/t − m/t) with t = `temperature[r]`, each as two numbers whose sum it
    /// is. What is NaN, or more than all numbers, makes the sums NaN.
    Best {
        /// K, at most V.
        count: usize,
    },
    /// `cache [R, S, C], new [B, T, C], row i32[B], start i32[B], count i32[B] → cache`: sequence b's first count[b] tokens
    /// go to cache row row[b] from slot start[b] on.
    CacheWrite,
    /// `q [B, T, H·D], k_cache [R, S, K·D], v_cache [R, S, K·D], rows i32[B, S], start i32[B], count i32[B],
    /// (key_bias [H, S]) → [B, T, H·D]`.
    /// Query t of sequence b stands at position start[b] + t and sees positions p up to its own, each read from cache
    /// row rows[b, p]: sequences share prefixes without copies. Queries from count[b] on give zeros.
    CachedAttention(AttentionSpec),

    // ---- Optimiser ---------------------------------------------------------------------------------------------
    /// `g₀, g₁, … → []`: √(Σ ‖gᵢ‖²).
    GlobalNorm,
    /// `norm [] → min(1, max_norm / (norm + 1e-6)) []`. Source: torch.nn.utils.clip_grad_norm_.
    ClipFactor {
        /// The bound on the global norm.
        max_norm: f64,
    },
    /// `p, g, m, v, clip [], lr [], step i32[], (rng i32[4]), (copy) → p, m, v, (copy)`; step counts from 1; the copy is the
    /// new p in bf16 or f16, whatever the old one is. Source: Loshchilov and Hutter 2019, algorithm 2, in torch.optim.AdamW's
    /// order (decay by lr·weight_decay first).
    #[serde(rename = "adamw")]
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// The new p is rounded by chance to a value of bf16, as which p may be kept then: 16 random bits, a pure function
        /// of (rng, this stream, element), are added below the bits that stay. Source: Zamirai et al. 2020, "Revisiting
        /// BFloat16 Training", section 4.1.
        #[serde(default)]
        rounding: Option<u32>,
    },
}

impl Op {
    /// The name used in printed graphs, plans and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Input { .. } => "input",
            Self::State { .. } => "state",
            Self::Fill { .. } => "fill",
            Self::Iota { .. } => "iota",
            Self::Reshape => "reshape",
            Self::Split { .. } => "split",
            Self::Concat => "concat",
            Self::Copy => "copy",
            Self::Cast(_) => "cast",
            Self::Gather => "gather",
            Self::ScatterAdd { .. } => "scatter_add",
            Self::Unary(f) => f.name(),
            Self::UnaryGrad(_) => "unary_grad",
            Self::Gated(_) => "gated",
            Self::GatedGrad(_) => "gated_grad",
            Self::Binary(f) => f.name(),
            Self::SumTo => "sum_to",
            Self::Broadcast => "broadcast",
            Self::Dropout(_) => "dropout",
            Self::MatMul { .. } => "matmul",
            Self::LayerNorm { center: true, .. } => "layer_norm",
            Self::LayerNorm { center: false, .. } => "rms_norm",
            Self::LayerNormGrad { center: true } => "layer_norm_grad",
            Self::LayerNormGrad { center: false } => "rms_norm_grad",
            Self::RopeTable { .. } => "rope_table",
            Self::Rope { .. } => "rope",
            Self::AlibiBias { .. } => "alibi_bias",
            Self::Attention(_) => "attention",
            Self::AttentionGrad(_) => "attention_grad",
            Self::RelativeAttention(_) => "relative_attention",
            Self::RelativeAttentionGrad(_) => "relative_attention_grad",
            Self::LinearCrossEntropy(_) => "linear_cross_entropy",
            Self::LinearCrossEntropyGrad(_) => "linear_cross_entropy_grad",
            Self::LinearTokenLosses { .. } => "linear_token_losses",
            Self::CountLabels { .. } => "count_labels",
            Self::Best { .. } => "best",
            Self::CacheWrite => "cache_write",
            Self::CachedAttention(_) => "cached_attention",
            Self::GlobalNorm => "global_norm",
            Self::ClipFactor { .. } => "clip_factor",
            Self::AdamW { .. } => "adamw",
        }
    }

    /// Whether the operation has no kernel: lowering turns it into a view.
    #[must_use]
    pub fn is_layout(&self) -> bool {
        matches!(self, Self::Reshape | Self::Split { .. } | Self::Concat)
    }

    /// Whether the value comes from outside the plan.
    #[must_use]
    pub fn is_leaf(&self) -> bool {
        matches!(self, Self::Input { .. } | Self::State { .. })
    }

    /// Pairs (operand, result) that a kernel may put into the same memory, because it reads each element of the operand
    /// before it writes that element of the result.
    #[must_use]
    pub fn in_place(&self) -> Vec<(usize, usize)> {
        match self {
            Self::Unary(_) | Self::Binary(_) | Self::Rope { .. } | Self::CacheWrite => vec![(0, 0)],
            Self::Dropout(_) => vec![(2, 0), (0, 0)],
            Self::UnaryGrad(_) => vec![(1, 0), (0, 0)],
            Self::Gated(_) => vec![(1, 0), (0, 0)],
            Self::GatedGrad(_) => vec![(1, 0), (2, 1), (0, 0)],
            Self::ScatterAdd { .. } => vec![(2, 0)],
            Self::LayerNormGrad { .. } => vec![(5, 0), (0, 0)],
            // The product is then accumulated onto the residual, so nothing may come between the two.
            Self::MatMul { epilogue: e, .. } if e.residual && e.act.is_none() && e.act_grad.is_none() => {
                vec![(2 + usize::from(e.bias), 0)]
            }
            Self::AdamW { rounding, .. } => {
                vec![(0, 0), (2, 1), (3, 2), (7 + usize::from(rounding.is_some()), 3)]
            }
            _ => vec![],
        }
    }

    /// The types of the results, or why the operands do not fit.
    ///
    /// `Input`, `State`, `Fill`, `Reshape`, `SumTo` and `Broadcast` are given their result type: `declared`; `Gather` and
    /// `MatMul` may be, where they have a choice.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::DType`], naming the operation and all operand types.
    pub fn infer(&self, operands: &[&TensorType], declared: Option<&TensorType>) -> Result<Vec<TensorType>> {
        Check { op: self, operands }.infer(declared)
    }
}

/// One operation with its operands while they are checked.
struct Check<'a> {
    op: &'a Op,
    operands: &'a [&'a TensorType],
}

impl Check<'_> {
    fn shape_error(&self, expected: &str) -> Error {
        let got: Vec<String> = self.operands.iter().map(ToString::to_string).collect();
        Error::Shape {
            op: self.op.name().to_owned(),
            message: format!("expected {expected}, got {}", got.join(", ")),
        }
    }

    fn require(&self, ok: bool, expected: &str) -> Result<()> {
        if ok { Ok(()) } else { Err(self.shape_error(expected)) }
    }

    fn count(&self, from: usize, to: usize) -> Result<()> {
        let n = self.operands.len();
        if (from..=to).contains(&n) {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op.name().to_owned(),
            message: format!("expected {from} to {to} operands, got {n}"),
        })
    }

    fn dtype(&self, i: usize, expected: DType) -> Result<()> {
        let got = self.operands[i].dtype;
        if got == expected {
            return Ok(());
        }
        Err(Error::DType {
            op: self.op.name().to_owned(),
            message: format!("operand {i} must be {expected}, got {got}"),
        })
    }

    /// Operands `floats` share one floating-point type, operands `ints` are i32.
    fn dtypes(&self, floats: &[usize], ints: &[usize]) -> Result<DType> {
        let dtype = self.operands[floats[0]].dtype;
        if !dtype.is_float() {
            return Err(Error::DType {
                op: self.op.name().to_owned(),
                message: format!("operand {} must be a float type, got {dtype}", floats[0]),
            });
        }
        floats.iter().try_for_each(|&i| self.dtype(i, dtype))?;
        ints.iter().try_for_each(|&i| self.dtype(i, DType::I32))?;
        Ok(dtype)
    }

    /// Operands `narrow` share one floating-point type, those of `wide` are of the type of its sums, `ints` of i32.
    fn mixed(&self, narrow: &[usize], wide: &[usize], ints: &[usize]) -> Result<DType> {
        let dtype = self.dtypes(narrow, ints)?;
        wide.iter().filter(|&&i| i < self.operands.len()).try_for_each(|&i| self.dtype(i, dtype.sums()))?;
        Ok(dtype)
    }

    fn shape(&self, i: usize) -> &Shape {
        &self.operands[i].shape
    }

    fn infer(&self, declared: Option<&TensorType>) -> Result<Vec<TensorType>> {
        let all: Vec<usize> = (0..self.operands.len()).collect();
        let like = |i: usize| self.operands[i].clone();
        let is = |i: usize, dims: &[usize]| self.operands[i].shape.0 == dims;
        let declared = || {
            declared
                .cloned()
                .ok_or_else(|| Error::Internal(format!("{} without a declared type", self.op.name())))
        };
        match self.op {
            Op::Input { .. } | Op::State { .. } | Op::Fill { .. } => {
                self.count(0, 0)?;
                Ok(vec![declared()?])
            }
            Op::Iota { .. } => {
                self.count(0, 0)?;
                let to = declared()?;
                if to.dtype != DType::I32 || to.shape.rank() != 1 {
                    return Err(self.shape_error(&format!("a result i32[N], not {to}")));
                }
                Ok(vec![to])
            }
            Op::Reshape => {
                self.count(1, 1)?;
                let to = declared()?;
                self.require(
                    to.shape.elements() == self.shape(0).elements() && to.dtype == self.operands[0].dtype,
                    &format!("as many elements as {to}"),
                )?;
                Ok(vec![to])
            }
            Op::Copy => {
                self.count(1, 1)?;
                Ok(vec![like(0)])
            }
            Op::Cast(to) => {
                self.count(1, 1)?;
                let from = self.operands[0].dtype;
                if !((from == DType::F32 && to.is_half()) || (from.is_half() && *to == DType::F32)) {
                    let message = format!("f32 and a 16-bit float become each other, not {from} {to}");
                    return Err(Error::DType { op: self.op.name().to_owned(), message });
                }
                Ok(vec![TensorType::new(*to, self.shape(0).clone())])
            }
            Op::Split { sizes } => {
                self.count(1, 1)?;
                let total: usize = sizes.iter().sum();
                self.require(
                    self.shape(0).rank() > 0 && self.shape(0).cols() == total && !sizes.contains(&0),
                    &format!("[.., {total}] for parts {sizes:?}"),
                )?;
                let part = |&s| TensorType::new(self.operands[0].dtype, self.shape(0).with_cols(s));
                Ok(sizes.iter().map(part).collect())
            }
            Op::Concat => {
                self.count(1, usize::MAX)?;
                let first = self.operands[0];
                let fits = |t: &&TensorType| {
                    t.dtype == first.dtype && t.shape.rank() > 0 && t.shape.leading() == first.shape.leading()
                };
                self.require(self.operands.iter().all(fits), "operands that differ in their last axis only")?;
                let cols = self.operands.iter().map(|t| t.shape.cols()).sum();
                Ok(vec![TensorType::new(first.dtype, first.shape.with_cols(cols))])
            }
            Op::Gather => {
                self.count(2, 2)?;
                self.dtype(1, DType::I32)?;
                self.require(self.shape(0).rank() == 2, "table [R, C], index i32[..]")?;
                let mut dims = self.shape(1).0.clone();
                dims.push(self.shape(0).cols());
                let dtype = match (self.operands[0].dtype, declared().map(|t| t.dtype)) {
                    (DType::F32, Ok(to)) if to.is_half() => to,
                    (dtype, _) => dtype,
                };
                Ok(vec![TensorType::new(dtype, Shape(dims))])
            }
            Op::ScatterAdd { rows } => {
                self.count(2, 3)?;
                let dtype = self.mixed(&[0], &[2], &[1])?.sums();
                let to = [*rows, self.shape(0).cols()];
                let fits = self.shape(0).rank() > 0
                    && self.shape(0).leading() == self.shape(1).0
                    && (self.operands.len() == 2 || is(2, &to));
                self.require(fits, "source [.., C], index i32[..], base [R, C]")?;
                Ok(vec![TensorType::new(dtype, to)])
            }
            Op::Unary(_) => {
                self.count(1, 1)?;
                self.dtypes(&[0], &[])?;
                Ok(vec![like(0)])
            }
            Op::UnaryGrad(_) => {
                self.count(2, 2)?;
                self.dtypes(&[0, 1], &[])?;
                self.require(self.shape(0) == self.shape(1), "x and dy of one shape")?;
                Ok(vec![like(0)])
            }
            Op::Gated(_) => {
                self.count(2, 2)?;
                self.dtypes(&[0, 1], &[])?;
                self.require(self.shape(0) == self.shape(1), "gate and up of one shape")?;
                Ok(vec![like(0)])
            }
            Op::GatedGrad(_) => {
                self.count(3, 3)?;
                self.dtypes(&[0, 1, 2], &[])?;
                let fits = (1..3).all(|i| self.shape(i) == self.shape(0));
                self.require(fits, "dy, gate and up of one shape")?;
                Ok(vec![like(1), like(2)])
            }
            Op::Binary(_) => {
                self.count(2, 2)?;
                self.dtypes(&[0, 1], &[])?;
                let fits = self.shape(1).is_suffix_of(self.shape(0));
                self.require(fits, "the second shape to equal the first or its last axes")?;
                Ok(vec![like(0)])
            }
            Op::SumTo | Op::Broadcast => {
                self.count(1, 1)?;
                self.dtypes(&[0], &[])?;
                let to = declared()?;
                let from = self.operands[0].dtype;
                let (small, large, dtype) = if *self.op == Op::SumTo {
                    (&to.shape, self.shape(0), from.sums())
                } else {
                    (self.shape(0), &to.shape, from)
                };
                let fits = small.is_suffix_of(large) && to.dtype == dtype;
                self.require(fits, &format!("a shape that shares its last axes with {to}"))?;
                Ok(vec![to])
            }
            Op::Dropout(spec) => {
                self.count(2, 3)?;
                self.dtypes(if all.len() == 3 { &[0, 2] } else { &[0] }, &[1])?;
                let fits = is(1, &[4]) && (all.len() == 2 || self.shape(2) == self.shape(0));
                self.require(fits, "x [..], rng i32[4], residual [..]")?;
                self.probability(spec)?;
                Ok(vec![like(0)])
            }
            Op::MatMul { ta, tb, epilogue } => self.matmul(*ta, *tb, epilogue, declared().ok().as_ref()),
            Op::LayerNorm { .. } => {
                self.count(2, 3)?;
                let dtype = self.mixed(&[0], &all[1..], &[])?.sums();
                let c = [self.shape(0).cols()];
                let fits = self.shape(0).rank() > 0 && (1..all.len()).all(|i| is(i, &c));
                self.require(fits, "x [.., C], weight [C], bias [C]")?;
                let stat = TensorType::new(dtype, Shape(self.shape(0).leading().to_vec()));
                Ok(vec![like(0), stat.clone(), stat])
            }
            Op::LayerNormGrad { .. } => {
                self.count(5, 6)?;
                let narrow: &[usize] = if all.len() == 6 { &[0, 1, 5] } else { &[0, 1] };
                let dtype = self.mixed(narrow, &[2, 3, 4], &[])?.sums();
                let c = [self.shape(1).cols()];
                let fits = self.shape(0) == self.shape(1)
                    && is(2, &c)
                    && is(3, self.shape(1).leading())
                    && is(4, self.shape(1).leading())
                    && (all.len() == 5 || self.shape(5) == self.shape(1));
                self.require(
                    fits,
                    "dy [.., C], x [.., C], weight [C], mean [..], rstd [..], residual [.., C]",
                )?;
                let w = TensorType::new(dtype, c);
                Ok(vec![like(1), w.clone(), w])
            }
            Op::RopeTable { inv_freq, dtype, .. } => {
                self.count(1, 1)?;
                self.dtype(0, DType::I32)?;
                self.require(!inv_freq.is_empty(), "at least one frequency")?;
                let mut dims = self.shape(0).0.clone();
                dims.push(2 * inv_freq.len());
                Ok(vec![TensorType::new(*dtype, Shape(dims))])
            }
            Op::Rope { heads, .. } => {
                self.count(2, 2)?;
                self.mixed(&[0], &[1], &[])?;
                let (x, table) = (self.shape(0), self.shape(1));
                let fits = x.rank() > 0
                    && table.rank() > 0
                    && x.leading() == table.leading()
                    && *heads > 0
                    && x.cols().is_multiple_of(*heads)
                    && table.cols().is_multiple_of(2)
                    && table.cols() <= x.cols() / heads;
                self.require(fits, &format!("x [.., {heads}·D], table [.., R] with R even and at most D"))?;
                Ok(vec![like(0)])
            }
            Op::AlibiBias { slopes, dtype, .. } => {
                self.count(1, 1)?;
                self.dtype(0, DType::I32)?;
                self.require(self.shape(0).rank() > 0 && !slopes.is_empty(), "positions i32[.., T]")?;
                let mut dims = self.shape(0).leading().to_vec();
                dims.extend([slopes.len(), self.shape(0).cols()]);
                Ok(vec![TensorType::new(*dtype, Shape(dims))])
            }
            Op::Attention(spec) => {
                let [b, t] = self.attention(spec, 0, 3)?;
                let dtype = self.operands[0].dtype.sums();
                Ok(vec![like(0), TensorType::new(dtype, [b, spec.heads, t])])
            }
            Op::AttentionGrad(spec) => {
                let [b, t] = self.attention(spec, 1, 6)?;
                self.mixed(&[0, 1, 4], &[5], &[])?;
                let fits = self.shape(0) == self.shape(1)
                    && self.shape(4) == self.shape(1)
                    && is(5, &[b, spec.heads, t]);
                self.require(fits, "dout, q, k, v, out [B, T, H·D], lse [B, H, T]")?;
                Ok(vec![like(1), like(2), like(3)])
            }
            Op::RelativeAttention(spec) => {
                self.relative_attention(spec, 0)?;
                Ok(vec![like(0)])
            }
            Op::RelativeAttentionGrad(spec) => {
                self.relative_attention(spec, 1)?;
                self.dtypes(&[0, 1], &[])?;
                self.require(self.shape(0) == self.shape(1), "dout [B, T, H·D]")?;
                Ok((1..8).map(like).collect())
            }
            Op::LinearCrossEntropy(spec) => {
                self.loss_spec(spec)?;
                self.cross_entropy(spec.bias, 0)?;
                Ok(vec![TensorType::new(self.operands[0].dtype.sums(), Shape::scalar())])
            }
            Op::LinearTokenLosses { bias } => {
                self.cross_entropy(*bias, 0)?;
                let rows = self.shape(2 + usize::from(*bias)).clone();
                Ok(vec![TensorType::new(self.operands[0].dtype.sums(), rows)])
            }
            Op::LinearCrossEntropyGrad(spec) => {
                self.loss_spec(spec)?;
                self.cross_entropy(spec.bias, 1)?;
                let dtype = self.operands[0].dtype.sums();
                let last = self.operands.len() - 1;
                self.dtype(last, dtype)?;
                self.require(is(last, &[]), "dloss []")?;
                let dweight = TensorType::new(dtype, self.shape(1).clone());
                let mut types = vec![TensorType::new(dtype, Shape::scalar()), like(0), dweight];
                if spec.bias {
                    types.push(like(2));
                }
                Ok(types)
            }
            Op::CountLabels { dtype } => {
                self.count(1, 1)?;
                self.dtype(0, DType::I32)?;
                Ok(vec![TensorType::new(*dtype, Shape::scalar())])
            }
            Op::Best { count } => {
                self.count(2, 2)?;
                let dtype = self.dtypes(&[0, 1], &[])?;
                let (rows, classes) = (self.shape(0).rows(), self.shape(0).cols());
                let fits = is(1, &[rows]) && (1..=classes).contains(count);
                self.require(fits, &format!("logits [.., V], temperature [R], with {count} of V"))?;
                let best = |dtype| TensorType::new(dtype, [rows, *count]);
                Ok(vec![best(dtype), best(DType::I32), TensorType::new(dtype, [rows, 4])])
            }
            Op::CacheWrite => {
                self.count(5, 5)?;
                self.dtypes(&[0, 1], &[2, 3, 4])?;
                let (cache, new) = (self.shape(0), self.shape(1));
                let fits = cache.rank() == 3
                    && new.rank() == 3
                    && cache.cols() == new.cols()
                    && (2..5).all(|i| is(i, &new.0[..1]));
                self.require(fits, "cache [R, S, C], new [B, T, C], row, start, count i32[B]")?;
                Ok(vec![like(0)])
            }
            Op::CachedAttention(spec) => {
                self.count(6 + usize::from(spec.key_bias), 6 + usize::from(spec.key_bias))?;
                let dtype = self.dtypes(&[0, 1, 2], &[3, 4, 5])?;
                if spec.key_bias {
                    self.dtype(6, dtype.sums())?;
                }
                let (q, cache) = (self.shape(0), self.shape(1));
                let fits = q.rank() == 3
                    && cache.rank() == 3
                    && self.shape(1) == self.shape(2)
                    && self.heads_fit(spec, q.cols(), cache.cols())
                    && is(3, &[q.0[0], cache.0[1]])
                    && is(4, &q.0[..1])
                    && is(5, &q.0[..1])
                    && (!spec.key_bias || is(6, &[spec.heads, cache.0[1]]));
                self.require(
                    fits,
                    "q [B, T, H·D], caches [R, S, K·D], rows i32[B, S], start i32[B], count i32[B], key_bias [H, S]",
                )?;
                Ok(vec![like(0)])
            }
            Op::GlobalNorm => {
                self.count(1, usize::MAX)?;
                let dtype = self.dtypes(&all, &[])?;
                Ok(vec![TensorType::new(dtype, Shape::scalar())])
            }
            Op::ClipFactor { .. } => {
                self.count(1, 1)?;
                self.dtypes(&[0], &[])?;
                self.require(is(0, &[]), "norm []")?;
                Ok(vec![like(0)])
            }
            Op::AdamW { rounding, .. } => {
                let copy = 7 + usize::from(rounding.is_some());
                self.count(copy, copy + 1)?;
                let floats = if self.operands[0].dtype == DType::Bf16 && rounding.is_some() { 1 } else { 0 };
                self.dtypes(&all[floats..6], &all[6..copy])?;
                let fits = (1..4).chain(copy..all.len()).all(|i| self.shape(i) == self.shape(0))
                    && (4..7).all(|i| is(i, &[]))
                    && (7..copy).all(|i| is(i, &[4]));
                let expected = "p, g, m, v, copy of one shape, clip [], lr [], step i32[], rng i32[4]";
                self.require(fits, expected)?;
                let half = self.operands.get(copy).map_or(DType::Bf16, |copy| copy.dtype);
                self.require(half.is_half(), "a copy in bf16 or f16")?;
                Ok([0, 2, 3].into_iter().chain(copy..all.len()).map(like).collect())
            }
        }
    }

    fn probability(&self, spec: &DropoutSpec) -> Result<()> {
        if (0.0..1.0).contains(&spec.p) {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op.name().to_owned(),
            message: format!("the dropout probability must be in [0, 1), got {}", spec.p),
        })
    }

    fn matmul(
        &self,
        ta: bool,
        tb: bool,
        e: &Epilogue,
        declared: Option<&TensorType>,
    ) -> Result<Vec<TensorType>> {
        let extra = [e.bias, e.act_grad.is_some(), e.residual].iter().filter(|&&x| x).count();
        self.count(2 + extra, 2 + extra)?;
        let dtype = match (self.dtypes(&[0, 1], &[])?, declared.map(|t| t.dtype)) {
            (from, Some(DType::F32)) if from.is_half() => DType::F32,
            (dtype, _) => dtype,
        };
        (2..self.operands.len()).try_for_each(|i| self.dtype(i, dtype))?;
        let (a, b) = (self.shape(0), self.shape(1));
        self.require(a.rank() > 0 && b.rank() > 0, "matrices")?;
        let shape = match (ta, tb) {
            (true, false) => {
                self.require(a.rows() == b.rows(), "a [.., M] and b [.., N] with as many rows")?;
                Shape::from([a.cols(), b.cols()])
            }
            (false, false) => {
                self.require(b.rank() == 2 && b.0[0] == a.cols(), "a [.., K], b [K, N]")?;
                a.with_cols(b.0[1])
            }
            (false, true) => {
                self.require(b.rank() == 2 && b.0[1] == a.cols(), "a [.., K], b [N, K]")?;
                a.with_cols(b.0[0])
            }
            (true, true) => return Err(self.shape_error("at most one transposed operand")),
        };
        let mut next = 2;
        if e.bias {
            self.require(self.shape(next).0 == [shape.cols()], "bias [N]")?;
            next += 1;
        }
        if e.act_grad.is_some() {
            self.require(*self.shape(next) == shape, "x of the result's shape")?;
            next += 1;
        }
        if e.residual {
            self.require(*self.shape(next) == shape, "a residual of the result's shape")?;
        }
        let y = TensorType::new(dtype, shape);
        Ok(if e.keep_pre { vec![y.clone(), y] } else { vec![y] })
    }

    fn heads_fit(&self, spec: &AttentionSpec, q_cols: usize, kv_cols: usize) -> bool {
        let (h, k) = (spec.heads, spec.kv_heads);
        h > 0
            && k > 0
            && h.is_multiple_of(k)
            && q_cols.is_multiple_of(h)
            && kv_cols.is_multiple_of(k)
            && q_cols / h == kv_cols / k
    }

    /// Checks q, k, v from operand `at` on, then what follows operand `fixed`; gives [B, T].
    fn attention(&self, spec: &AttentionSpec, at: usize, fixed: usize) -> Result<[usize; 2]> {
        let extras = spec.extras(fixed);
        self.count(extras.end, extras.end)?;
        let ints: Vec<usize> = (fixed..extras.end).filter(|&i| Some(i) != extras.key_bias).collect();
        self.dtypes(&[at, at + 1, at + 2], &ints)?;
        let (q, k, v) = (self.shape(at), self.shape(at + 1), self.shape(at + 2));
        let fits = q.rank() == 3
            && k == v
            && k.rank() == 3
            && q.leading() == k.leading()
            && self.heads_fit(spec, q.cols(), k.cols());
        self.require(fits, &format!("q [B, T, {}·D], k and v [B, T, {}·D]", spec.heads, spec.kv_heads))?;
        let [b, t] = [q.0[0], q.0[1]];
        if let Some(i) = extras.segments {
            self.require(self.shape(i).0 == [b, t], "segments i32[B, T]")?;
        }
        if let Some(i) = extras.key_bias {
            self.dtype(i, self.operands[at].dtype.sums())?;
            self.require(self.shape(i).0 == [b, spec.heads, t], "key_bias [B, H, T]")?;
        }
        if let Some(i) = extras.prefix {
            self.require(self.shape(i).0 == [b], "prefix i32[B]")?;
        }
        if let (Some(i), Some(dropout)) = (extras.rng, &spec.dropout) {
            self.require(self.shape(i).0 == [4], "rng i32[4]")?;
            self.probability(dropout)?;
        }
        Ok([b, t])
    }

    /// Checks q_k and all that follows it, from operand `at` on.
    fn relative_attention(&self, spec: &RelativeSpec, at: usize) -> Result<()> {
        let fixed = at + 10;
        let extra = usize::from(spec.hidden) + usize::from(spec.dropout.is_some());
        self.count(fixed + extra, fixed + extra)?;
        let ints: Vec<usize> = (fixed - 3..fixed + extra).collect();
        self.dtypes(&(at..at + 7).collect::<Vec<_>>(), &ints)?;
        let (q, k, r) = (self.shape(at), self.shape(at + 3), self.shape(at + 5));
        let place = self.shape(fixed - 3);
        let (q_kinds, k_kinds) = (self.shape(fixed - 2), self.shape(fixed - 1));
        let ranks = q.rank() == 3 && k.rank() == 3 && r.rank() == 2 && q_kinds.rank() == 2;
        self.require(ranks, "q_k, q_r, q_s [B, T, H·D], k, v [B, S, H·D], r [S + U, H·D], kinds [2, H·D]")?;
        let (b, t, c, s, u) = (q.0[0], q.0[1], q.cols(), k.0[1], q_kinds.0[1]);
        let fits = spec.heads > 0
            && c.is_multiple_of(spec.heads)
            && (at + 1..at + 3).all(|i| self.shape(i) == q)
            && k.0 == [b, s, c]
            && self.shape(at + 4) == k
            && u <= s
            && r.0 == [s + u, c]
            && self.shape(at + 6).0 == [2, c]
            && place.0 == [b, t]
            && q_kinds.0[0] == b
            && k_kinds.0 == [b, s];
        self.require(
            fits,
            "sizes that agree: at i32[B, T], q_kinds i32[B, U], k_kinds i32[B, S], r [S + U, H·D]",
        )?;
        if spec.hidden {
            self.require(self.shape(fixed).0 == [b, u, u], "hidden i32[B, U, U]")?;
        }
        if let Some(dropout) = &spec.dropout {
            self.require(self.shape(fixed + extra - 1).0 == [4], "rng i32[4]")?;
            self.probability(dropout)?;
        }
        Ok(())
    }

    fn loss_spec(&self, spec: &LossSpec) -> Result<()> {
        if (0.0..1.0).contains(&spec.smoothing) && spec.z_loss >= 0.0 && spec.z_loss.is_finite() {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op.name().to_owned(),
            message: format!(
                "label smoothing must be in [0, 1) and the z-loss 0 or more, got {} and {}",
                spec.smoothing, spec.z_loss
            ),
        })
    }

    fn cross_entropy(&self, bias: bool, extra: usize) -> Result<()> {
        let n = 3 + usize::from(bias);
        self.count(n + extra, n + extra)?;
        let wide: &[usize] = if bias { &[2] } else { &[] };
        self.mixed(&[0, 1], wide, &[n - 1])?;
        let (x, w, labels) = (self.shape(0), self.shape(1), self.shape(n - 1));
        let fits = x.rank() > 0
            && w.rank() == 2
            && w.cols() == x.cols()
            && x.leading() == labels.0
            && (!bias || self.shape(2).0 == w.0[..1]);
        self.require(fits, "x [.., C], weight [V, C], bias [V], labels i32[..]")
    }
}
