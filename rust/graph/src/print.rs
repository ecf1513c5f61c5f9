//! The text form of a graph, which people read and snapshot tests compare.
//!
//! One line a node: `%results = op{attributes} %operands : types  # scope`.

use std::fmt::{self, Write};

use crate::graph::{Graph, ValueId};
use crate::op::{AttentionSpec, DropoutSpec, Epilogue, Op};

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for node in self.nodes() {
            let types: Vec<String> = node.outputs.iter().map(|&v| self.ty(v).to_string()).collect();
            let mut line = format!("{} = {}", list(&node.outputs), describe(&node.op));
            if !node.inputs.is_empty() {
                write!(line, " {}", list(&node.inputs))?;
            }
            write!(line, " : {}", types.join(", "))?;
            if node.scope.is_empty() {
                writeln!(f, "{line}")?;
            } else {
                writeln!(f, "{line}  # {}", node.scope)?;
            }
        }
        for (name, v) in self.outputs() {
            writeln!(f, "output {name:?} = %{}", v.0)?;
        }
        for (state, v) in self.updates() {
            if let Op::State { name } = &self.producer(*state).op {
                writeln!(f, "update {name:?} <- %{}", v.0)?;
            }
        }
        Ok(())
    }
}

fn list(values: &[ValueId]) -> String {
    values.iter().map(|v| format!("%{}", v.0)).collect::<Vec<_>>().join(", ")
}

/// An operation with its attributes, as printed: `matmul{tb, bias, gelu_tanh}`.
#[must_use]
pub fn describe(op: &Op) -> String {
    let attributes = attributes(op);
    if attributes.is_empty() {
        op.name().to_owned()
    } else {
        format!("{}{{{}}}", op.name(), attributes.join(", "))
    }
}

fn attributes(op: &Op) -> Vec<String> {
    let mut out = Vec::new();
    match op {
        Op::Input { name } | Op::State { name } => out.push(format!("{name:?}")),
        Op::Fill { value } => out.push(value.to_string()),
        Op::Split { sizes } => out.push(format!("{sizes:?}")),
        Op::ScatterAdd { rows } => out.push(format!("rows={rows}")),
        Op::Unary(crate::op::Unary::Scale(s)) => out.push(s.to_string()),
        Op::UnaryGrad(f) | Op::Gated(f) | Op::GatedGrad(f) => out.push(f.name().to_owned()),
        Op::Dropout(spec) => dropout(&mut out, spec),
        Op::MatMul { ta, tb, epilogue } => {
            out.extend(ta.then(|| "ta".to_owned()));
            out.extend(tb.then(|| "tb".to_owned()));
            fused(&mut out, epilogue);
        }
        Op::LayerNorm { eps, .. } => out.push(format!("eps={eps:e}")),
        Op::Attention(s) | Op::AttentionGrad(s) | Op::CachedAttention(s) => attention(&mut out, s),
        Op::LinearTokenLosses { bias } => out.extend(bias.then(|| "bias".to_owned())),
        Op::LinearCrossEntropy(s) | Op::LinearCrossEntropyGrad(s) => {
            out.extend(s.bias.then(|| "bias".to_owned()));
            out.extend((s.smoothing > 0.0).then(|| format!("smoothing={}", s.smoothing)));
            out.extend((s.z_loss > 0.0).then(|| format!("z_loss={}", s.z_loss)));
        }
        Op::RopeTable { inv_freq, scale, .. } => {
            out.push(format!("{} frequencies", inv_freq.len()));
            out.extend((*scale != 1.0).then(|| format!("scale={scale}")));
        }
        Op::Rope { heads, inverse } => {
            out.push(format!("heads={heads}"));
            out.extend(inverse.then(|| "inverse".to_owned()));
        }
        Op::AlibiBias { slopes, scale, round, .. } => {
            out.push(format!("heads={}, scale={scale}", slopes.len()));
            out.extend(round.then(|| "round".to_owned()));
        }
        Op::Iota { start, step } => out.push(format!("{start}, step {step}")),
        Op::RelativeAttention(s) | Op::RelativeAttentionGrad(s) => {
            out.push(format!("heads={}", s.heads));
            out.extend(s.hidden.then(|| "hidden".to_owned()));
            out.extend(s.sees_itself.then(|| "sees_itself".to_owned()));
            if let Some(spec) = &s.dropout {
                dropout(&mut out, spec);
            }
        }
        Op::Best { count } => out.push(count.to_string()),
        Op::ClipFactor { max_norm } => out.push(format!("max_norm={max_norm}")),
        Op::AdamW { beta1, beta2, eps, weight_decay, rounding } => {
            out.push(format!("betas={beta1}/{beta2}, eps={eps:e}, weight_decay={weight_decay}"));
            out.extend(rounding.map(|stream| format!("rounding={stream}")));
        }
        Op::Reshape
        | Op::Concat
        | Op::Copy
        | Op::Gather
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::SumTo
        | Op::Broadcast
        | Op::LayerNormGrad { .. }
        | Op::CountLabels { .. }
        | Op::CacheWrite
        | Op::Cast(_)
        | Op::GlobalNorm => {}
    }
    out
}

fn fused(out: &mut Vec<String>, e: &Epilogue) {
    out.extend(e.bias.then(|| "bias".to_owned()));
    out.extend(e.act.map(|f| if e.keep_pre { format!("{}+pre", f.name()) } else { f.name().to_owned() }));
    out.extend(e.act_grad.map(|f| format!("{}'", f.name())));
    out.extend(e.residual.then(|| "residual".to_owned()));
}

fn dropout(out: &mut Vec<String>, spec: &DropoutSpec) {
    out.push(format!("p={}, stream={}", spec.p, spec.stream));
}

fn attention(out: &mut Vec<String>, s: &AttentionSpec) {
    out.push(format!("heads={}", s.heads));
    out.extend((s.kv_heads != s.heads).then(|| format!("kv_heads={}", s.kv_heads)));
    out.extend(s.causal.then(|| "causal".to_owned()));
    out.extend(s.window.map(|w| format!("window={w}")));
    out.extend(s.segments.then(|| "segments".to_owned()));
    out.extend(s.key_bias.then(|| "key_bias".to_owned()));
    out.extend(s.prefix.then(|| "prefix".to_owned()));
    if let Some(spec) = &s.dropout {
        dropout(out, spec);
    }
}
