"""Falcon: decoders in three styles. Source: Almazrouei et al. 2023; transformers' ``modeling_falcon.py``.

7B style: one norm, attention and MLP side by side, one key-value head (Shazeer 2019). 40B style
(``new_decoder_architecture``): a norm each for attention and MLP, grouped key-value heads. RW style: attention, then
MLP, with ALiBi (Press et al. 2022) in place of rotary positions::

    parallel:    x ← x + attention(n) + mlp(m),  n = ln(x), m = n or ln'(x)
    sequential:  x ← x + attention(ln(x));  x ← x + mlp(ln'(x))

Letters: B batch, T tokens, C hidden_size, H heads, K key-value heads, D head width, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.models.base import (
    CausalLM,
    Inputs,
    Ints,
    Positions,
    RotaryConfig,
    masked_positions,
    position_table,
)
from pyrformer.models.positions import alibi_slopes
from pyrformer.nn import Embedding, LayerNorm, Linear, Module, Normal, Tensor
from pyrformer.nn import functional as F

#: What a model may know of positions: rotations or ALiBi (Falcon's own), a learned table, sinusoids, or nothing.
POSITIONS = ("rope", "alibi", "learned", "sinusoidal", "none")


@dataclass(frozen=True, kw_only=True)
class FalconConfig(RotaryConfig):
    """Hugging Face's ``FalconConfig``, and one of our own: ``position_embedding_type`` (one of ``POSITIONS``; default:
    what ``alibi`` says)."""

    model_type: ClassVar[str] = "falcon"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("FalconForCausalLM",)
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"apply_residual_connection_post_layernorm": (False,)}
    ACTIVATION: ClassVar[str] = "activation"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("rope", "alibi")

    SMALL: ClassVar[dict[str, Any]] = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4}

    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None
    num_ln_in_parallel_attn: int | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    position_embedding_type: str = ""

    @classmethod
    def modernise(cls, raw: dict[str, Any]) -> dict[str, Any]:
        # The files first published say n_layer and n_head.
        older = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
        return super().modernise({older.get(k, k): v for k, v in raw.items()})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            ffn_hidden_size=self.ffn_hidden_size or 1,
        )
        self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_probabilities(hidden_dropout=self.hidden_dropout, attention_dropout=self.attention_dropout)
        norms = self.num_ln_in_parallel_attn
        self.require(norms in (None, 1, 2), f"num_ln_in_parallel_attn must be 1 or 2, got {norms}")
        heads, kv = self.num_attention_heads, self.kv_heads
        self.require(
            kv > 0 and heads % kv == 0,
            f"num_attention_heads ({heads}) is not divisible by num_kv_heads ({kv})",
        )
        self.fill(
            num_kv_heads=self.num_kv_heads or heads,
            ffn_hidden_size=self.ffn_hidden_size or 4 * self.hidden_size,
        )
        kind = self.position_embedding_type or ("alibi" if self.alibi else "rope")
        self.check_positions(kind, POSITIONS, self.hidden_size, self.head_dim)
        self.require(
            kind == "alibi" or not self.alibi,
            f"alibi and position_embedding_type {kind!r} contradict each other",
        )
        self.fill(position_embedding_type=kind, alibi=kind == "alibi")
        if kind == "rope":
            self.rope(1)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """K: one with ``multi_query`` unless the architecture is the new one."""
        if self.multi_query and not self.new_decoder_architecture:
            return 1
        return self.num_kv_heads or self.num_attention_heads

    @property
    def parallel_norms(self) -> int:
        """How many norms stand before attention and MLP where they are side by side."""
        return self.num_ln_in_parallel_attn or (2 if self.new_decoder_architecture else 1)

    @property
    def side_by_side(self) -> bool:
        """Whether attention and MLP read the same residual."""
        return self.new_decoder_architecture or self.parallel_attn

    def rotary_width(self) -> int:
        return self.head_dim


class Attention(Module):
    """Causal self-attention with q, k and v from one product, interleaved as the style has it."""

    def __init__(self, c: FalconConfig, layer: int, init: Normal):
        self._heads, self._kv, self._d = c.num_attention_heads, c.kv_heads, c.head_dim
        self._layer, self._dropout = layer, c.attention_dropout
        # All q, then k, then v, for multi-query; else groups of (q … q, k, v), one a key-value head.
        self._groups = 1 if c.kv_heads == 1 else c.kv_heads
        columns = (self._heads + 2 * self._kv) * self._d
        self.query_key_value = Linear(c.hidden_size, columns, init, bias=c.bias)
        self.dense = Linear(c.hidden_size, c.hidden_size, init, bias=c.bias)
        self._spec = F.attention_spec(self._heads, self._kv, self._d, causal=True)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        each = self._heads // self._groups * self._d
        q, k, v = F.split_groups(self.query_key_value(h), self._groups, [each, self._d, self._d])
        if at.table is not None:
            q, k = F.rope(q, at.table, self._heads), F.rope(k, at.table, self._kv)
        return self.dense(x.attend(self._layer, q, k, v, self._spec, self._dropout, at.key_bias))


class MLP(Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: FalconConfig, init: Normal):
        inner = c.ffn_hidden_size or 0
        self.dense_h_to_4h = Linear(c.hidden_size, inner, init, bias=c.bias)
        self.dense_4h_to_h = Linear(inner, c.hidden_size, init, bias=c.bias)
        self._act = c.activation

    def __call__(self, h: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.activation(self._act, self.dense_h_to_4h(h)))


class Layer(Module):
    """One block, in the configuration's style."""

    def __init__(self, c: FalconConfig, layer: int, init: Normal):
        def norm() -> LayerNorm:
            return LayerNorm(c.hidden_size, c.layer_norm_epsilon)

        self.self_attention = Attention(c, layer, init)
        self.mlp = MLP(c, init)
        two = c.side_by_side and c.parallel_norms == 2
        self.ln_attn = norm() if two else None
        self.ln_mlp = norm() if two else None
        self.input_layernorm = None if two else norm()
        self.post_attention_layernorm = None if c.side_by_side else norm()
        self._dropout = c.hidden_dropout

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        before = self.ln_attn or self.input_layernorm
        assert before is not None
        normed = before(h)
        with h.trace.scope("attn"):
            attended = self.self_attention(normed, x, at)
        with h.trace.scope("mlp"):
            if self.post_attention_layernorm is not None:
                h = h + F.dropout(attended, self._dropout)
                return h + F.dropout(self.mlp(self.post_attention_layernorm(h)), self._dropout)
            mlp = self.mlp(normed if self.ln_mlp is None else self.ln_mlp(h))
            return h + F.dropout(mlp + attended, self._dropout)


class Transformer(Module):
    """Everything but the head."""

    def __init__(self, c: FalconConfig, init: Normal):
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, init)
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.position_embeddings = position_table(kind, rows, c.hidden_size, init)
        self.h = [Layer(c, i, init) for i in range(c.num_hidden_layers)]
        self.ln_f = LayerNorm(c.hidden_size, c.layer_norm_epsilon)


class Falcon(CausalLM):
    """Falcon with its language-model head."""

    def __init__(self, config: FalconConfig):
        self.config: FalconConfig = config
        self.max_positions = config.max_position_embeddings
        init = Normal(config.initializer_range)
        self.transformer = Transformer(config, init)
        self.make_head(config.hidden_size, init, self.transformer.word_embeddings)

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        c = self.config
        with x.trace.scope("embed"):
            table = self.transformer.position_embeddings
            h = self.transformer.word_embeddings(x.input_ids)
            states = [h if table is None else h + table(x.position_ids)]
            kind = c.position_embedding_type
            if kind == "alibi":
                slopes = alibi_slopes(c.num_attention_heads)
                bias = F.alibi_bias(x.key_positions, slopes, scale=c.head_dim**-0.5, rounded=True)
                at = Positions(key_bias=bias)
            else:
                at = Positions.of(
                    x, kind, c.num_attention_heads, c.rope(x.length) if kind == "rope" else None
                )
        for i, layer in enumerate(self.transformer.h):
            with x.trace.scope(f"h.{i}"):
                states.append(layer(states[-1], x, at))
        with x.trace.scope("ln_f"):
            states[-1] = self.transformer.ln_f(states[-1])
        return states

    def position_rows(self, ids: Ints, mask: Ints | None, given: Ints | None) -> Ints:
        # ALiBi counts what the mask shows, whatever the caller's positions.
        if self.config.alibi and mask is not None:
            return (masked_positions(mask) * mask).astype(mask.dtype)
        return super().position_rows(ids, mask, given)
