"""OPT: a decoder with learned positions. Source: Zhang et al. 2022; transformers' ``modeling_opt.py``.

Pre-norm blocks (post-norm with ``do_layer_norm_before`` false); positions count what the attention mask shows; the
embeddings may be narrower than the blocks, with a projection on either side::

    x ← in·tokens[ids] + positions[p + 2]
    x ← x + attention(ln(x));  x ← x + W₂·relu(W₁·ln'(x))        for each layer
    logits = out·ln_f(x)·tokensᵀ

Letters: B batch, T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pyrformer.models.base import (
    CausalLM,
    Inputs,
    Ints,
    ModelConfig,
    Positions,
    masked_positions,
    position_table,
)
from pyrformer.models.positions import rope
from pyrformer.nn import Embedding, LayerNorm, Linear, Module, Normal, Tensor
from pyrformer.nn import functional as F

#: What a model may know of positions: a learned table (OPT's own), sinusoids, rotations, ALiBi, or nothing.
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """Hugging Face's ``OPTConfig``, and one of our own: ``position_embedding_type`` (one of ``POSITIONS``)."""

    model_type: ClassVar[str] = "opt"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("OPTForCausalLM",)
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"layerdrop": (0.0,)}
    ACTIVATION: ClassVar[str] = "activation_function"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("learned",)

    SMALL: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_dim": 512,
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    init_std: float = 0.02
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    _remove_final_layer_norm: bool = False
    position_embedding_type: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            ffn_dim=self.ffn_dim,
            max_position_embeddings=self.max_position_embeddings,
            word_embed_proj_dim=self.word_embed_proj_dim or 1,
        )
        self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_probabilities(dropout=self.dropout, attention_dropout=self.attention_dropout)
        self.fill(word_embed_proj_dim=self.word_embed_proj_dim or self.hidden_size)
        self.check_positions(self.position_embedding_type, POSITIONS, self.hidden_size, self.head_dim)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """The rows of the learned table before the first token's."""
        return 2 if self.position_embedding_type == "learned" else 0

    def norm(self) -> LayerNorm:
        """A norm over C as the configuration has it."""
        return LayerNorm(self.hidden_size, 1e-5, affine=self.layer_norm_elementwise_affine)


class Attention(Module):
    """Causal self-attention."""

    def __init__(self, c: OPTConfig, layer: int, init: Normal):
        def linear() -> Linear:
            return Linear(c.hidden_size, c.hidden_size, init, bias=c.enable_bias)

        self.k_proj, self.v_proj, self.q_proj, self.out_proj = linear(), linear(), linear(), linear()
        self._layer, self._dropout = layer, c.attention_dropout
        self._heads = heads = c.num_attention_heads
        self._spec = F.attention_spec(heads, heads, c.head_dim, causal=True)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if at.table is not None:
            q, k = (F.rope(y, at.table, self._heads) for y in (q, k))
        return self.out_proj(x.attend(self._layer, q, k, v, self._spec, self._dropout, at.key_bias))


class Layer(Module):
    """Attention and two linear layers, each with a norm before or after its residual."""

    def __init__(self, c: OPTConfig, layer: int, init: Normal):
        self.self_attn = Attention(c, layer, init)
        self.self_attn_layer_norm = c.norm()
        self.fc1 = Linear(c.hidden_size, c.ffn_dim, init, bias=c.enable_bias)
        self.fc2 = Linear(c.ffn_dim, c.hidden_size, init, bias=c.enable_bias)
        self.final_layer_norm = c.norm()
        self._c = c

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        c, before = self._c, self._c.do_layer_norm_before
        with h.trace.scope("attn"):
            inner = self.self_attn_layer_norm(h) if before else h
            h = h + F.dropout(self.self_attn(inner, x, at), c.dropout)
            h = h if before else self.self_attn_layer_norm(h)
        with h.trace.scope("mlp"):
            inner = self.final_layer_norm(h) if before else h
            inner = self.fc2(F.activation(c.activation_function, self.fc1(inner)))
            h = h + F.dropout(inner, c.dropout)
            return h if before else self.final_layer_norm(h)


class Decoder(Module):
    """Everything but the head."""

    def __init__(self, c: OPTConfig, init: Normal):
        narrow = c.word_embed_proj_dim or c.hidden_size
        projected = narrow != c.hidden_size
        self.embed_tokens = Embedding(c.vocab_size, narrow, init)
        rows = c.max_position_embeddings + c.position_offset
        self.embed_positions = position_table(c.position_embedding_type, rows, c.hidden_size, init)
        self.project_out = Linear(c.hidden_size, narrow, init, bias=False) if projected else None
        self.project_in = Linear(narrow, c.hidden_size, init, bias=False) if projected else None
        last = c.do_layer_norm_before and not c._remove_final_layer_norm
        self.final_layer_norm = c.norm() if last else None
        self.layers = [Layer(c, i, init) for i in range(c.num_hidden_layers)]


class Body(Module):
    def __init__(self, c: OPTConfig, init: Normal):
        self.decoder = Decoder(c, init)


class OPT(CausalLM):
    """OPT with its language-model head."""

    def __init__(self, config: OPTConfig):
        self.config: OPTConfig = config
        self.max_positions = config.max_position_embeddings
        self.position_offset = config.position_offset
        init = Normal(config.init_std)
        self.model = Body(config, init)
        narrow = config.word_embed_proj_dim or config.hidden_size
        self.make_head(narrow, init, self.model.decoder.embed_tokens)

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        d = self.model.decoder
        with x.trace.scope("embed"):
            tokens = d.embed_tokens(x.input_ids)
            tokens = tokens if d.project_in is None else d.project_in(tokens)
            tokens = tokens if d.embed_positions is None else tokens + d.embed_positions(x.position_ids)
            states = [F.dropout(tokens, self.config.dropout)]
            c, kind, angles = self.config, self.config.position_embedding_type, None
            if kind == "rope":
                angles = rope({}, c.head_dim, c.max_position_embeddings, x.length, c.model_type)
            at = Positions.of(x, kind, c.num_attention_heads, angles)
        for i, layer in enumerate(d.layers):
            with x.trace.scope(f"layers.{i}"):
                states.append(layer(states[-1], x, at))
        with x.trace.scope("final"):
            last = states[-1] if d.final_layer_norm is None else d.final_layer_norm(states[-1])
            states[-1] = last if d.project_out is None else d.project_out(last)
        return states

    def position_rows(self, ids: Ints, mask: Ints | None, given: Ints | None) -> Ints:
        if given is None and mask is not None:
            # Padding reads the row before the first token's; without an offset there is none.
            given = np.maximum(masked_positions(mask), -self.position_offset)
        return super().position_rows(ids, mask, given) + self.position_offset

    def rename(self, name: str) -> str | None:
        # The files first published lack the prefix.
        return f"model.{name}" if name.startswith("decoder.") else name
