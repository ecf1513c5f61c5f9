"""GPT-2: a decoder that predicts the next token. Source: Radford et al. 2019; transformers' ``modeling_gpt2.py``.

Pre-norm blocks, learned positions (or another kind, ``POSITIONS``), GELU, output tied to input::

    x ← wte[ids] + wpe[positions]
    x ← x + attention(ln_1(x));  x ← x + mlp(ln_2(x))        for each block
    logits = ln_f(x)·wteᵀ

Letters: B batch, T tokens, C n_embd, V vocab_size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.models.base import CausalLM, Inputs, ModelConfig, Positions, position_table
from pyrformer.models.positions import rope
from pyrformer.nn import (
    Conv1D,
    Embedding,
    Init,
    LayerNorm,
    Module,
    Normal,
    Tensor,
)
from pyrformer.nn import functional as F

#: What a model may know of positions: a learned table (GPT-2's own), sinusoids, rotations, ALiBi, or nothing.
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Hugging Face's ``GPT2Config``, and two of our own: ``bias`` (nanoGPT's: biases in linear layers and norms) and
    ``position_embedding_type`` (one of ``POSITIONS``)."""

    model_type: ClassVar[str] = "gpt2"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("GPT2LMHeadModel",)
    ACTIVATION: ClassVar[str] = "activation_function"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("learned",)

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "n_layer",
        "width": "n_embd",
        "heads": "n_head",
        "positions": "n_positions",
    }
    SMALL: ClassVar[dict[str, Any]] = {"n_layer": 4, "n_embd": 128, "n_head": 4}

    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bias: bool = True
    position_embedding_type: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            n_positions=self.n_positions,
            n_layer=self.n_layer,
            n_inner=self.n_inner or 1,
        )
        self.check_heads("n_embd", self.n_embd, "n_head", self.n_head)
        self.check_probabilities(
            resid_pdrop=self.resid_pdrop, embd_pdrop=self.embd_pdrop, attn_pdrop=self.attn_pdrop
        )
        kind, head = self.position_embedding_type, self.n_embd // self.n_head
        self.check_positions(kind, POSITIONS, self.n_embd, head)


class Attention(Module):
    """Causal self-attention with q, k and v from one product."""

    def __init__(self, c: GPT2Config, layer: int, out: Init):
        self.c_attn = Conv1D(c.n_embd, 3 * c.n_embd, Normal(c.initializer_range), bias=c.bias)
        self.c_proj = Conv1D(c.n_embd, c.n_embd, out, bias=c.bias)
        self._c, self._layer = c, layer
        scale = (c.n_embd // c.n_head) ** -0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        self._spec = F.attention_spec(c.n_head, c.n_head, c.n_embd // c.n_head, causal=True, scale=scale)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = F.split(self.c_attn(h), 3)
        if at.table is not None:
            q, k = (F.rope(y, at.table, self._c.n_head) for y in (q, k))
        y = x.attend(self._layer, q, k, v, self._spec, self._c.attn_pdrop, at.key_bias)
        return F.dropout(self.c_proj(y), self._c.resid_pdrop)


class MLP(Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: GPT2Config, out: Init):
        inner = c.n_inner or 4 * c.n_embd
        self.c_fc = Conv1D(c.n_embd, inner, Normal(c.initializer_range), bias=c.bias)
        self.c_proj = Conv1D(inner, c.n_embd, out, bias=c.bias)
        self._c = c

    def __call__(self, h: Tensor) -> Tensor:
        h = F.activation(self._c.activation_function, self.c_fc(h))
        return F.dropout(self.c_proj(h), self._c.resid_pdrop)


class Block(Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, c: GPT2Config, layer: int):
        # Projections that add to the residual stream begin smaller: Radford et al. 2019, section 2.3.
        out = Normal(c.initializer_range / math.sqrt(2 * c.n_layer))
        self.ln_1 = LayerNorm(c.n_embd, c.layer_norm_epsilon, bias=c.bias)
        self.attn = Attention(c, layer, out)
        self.ln_2 = LayerNorm(c.n_embd, c.layer_norm_epsilon, bias=c.bias)
        self.mlp = MLP(c, out)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        with h.trace.scope("attn"):
            h = h + self.attn(self.ln_1(h), x, at)
        with h.trace.scope("mlp"):
            return h + self.mlp(self.ln_2(h))


class Transformer(Module):
    """Everything but the head."""

    def __init__(self, c: GPT2Config):
        std = Normal(c.initializer_range)
        self.wte = Embedding(c.vocab_size, c.n_embd, std)
        self.wpe = position_table(c.position_embedding_type, c.n_positions, c.n_embd, std)
        self.h = [Block(c, i) for i in range(c.n_layer)]
        self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon, bias=c.bias)


class GPT2(CausalLM):
    """GPT-2 with its language-model head."""

    def __init__(self, config: GPT2Config):
        self.config: GPT2Config = config
        self.max_positions = config.n_positions
        self.transformer = Transformer(config)
        self.make_head(config.n_embd, Normal(config.initializer_range), self.transformer.wte)

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        trace, t = x.input_ids.trace, self.transformer
        with trace.scope("embed"):
            h = t.wte(x.input_ids)
            h = h if t.wpe is None else h + t.wpe(x.position_ids)
            states = [F.dropout(h, self.config.embd_pdrop)]
            c = self.config
            kind, angles = c.position_embedding_type, None
            if kind == "rope":
                angles = rope({}, c.n_embd // c.n_head, c.n_positions, x.length, c.model_type)
            at = Positions.of(x, kind, c.n_head, angles)
        for i, block in enumerate(t.h):
            with trace.scope(f"h.{i}"):
                states.append(block(states[-1], x, at))
        with trace.scope("ln_f"):
            states[-1] = t.ln_f(states[-1])
        return states

    def absent_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        if self.config.bias:
            return []
        names = dict(self.named_parameters())
        return [
            (f"{name.removesuffix('weight')}bias", p.shape[-1:])
            for name, p in names.items()
            if name.startswith(("transformer.h.", "transformer.ln_f."))
        ]

    def rename(self, name: str) -> str | None:
        # The files first published lack the prefix, and hold the causal mask as buffers.
        if re.search(r"\.attn\.(masked_)?bias$", name):
            return None
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
