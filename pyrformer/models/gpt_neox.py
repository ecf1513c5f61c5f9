"""GPT-NeoX: a decoder with partly rotary positions and parallel residuals. Source: Black et al. 2022; transformers'
``modeling_gpt_neox.py``.

Attention and MLP read the same residual, each through a norm of its own (``use_parallel_residual``)::

    x ← embed_in[ids]
    x ← x + attention(ln(x)) + mlp(ln'(x))        for each layer
    logits = W·ln_f(x)

Letters: B batch, T tokens, C hidden_size, H heads, D head width, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.models.base import CausalLM, Inputs, Positions, RotaryConfig, position_table
from pyrformer.nn import Embedding, LayerNorm, Linear, Module, Normal, Tensor
from pyrformer.nn import functional as F

#: What a model may know of positions: rotations (GPT-NeoX's own), a learned table, sinusoids, ALiBi, or nothing.
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(RotaryConfig):
    """Hugging Face's ``GPTNeoXConfig``, and one of our own: ``position_embedding_type`` (one of ``POSITIONS``)."""

    model_type: ClassVar[str] = "gpt_neox"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("GPTNeoXForCausalLM",)

    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("rope",)
    PARTIAL: ClassVar[bool] = True
    ROPE: ClassVar[dict[str, Any]] = {**RotaryConfig.ROPE, "partial_rotary_factor": 0.25}

    tie_word_embeddings: bool = False
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    position_embedding_type: str = "rope"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
        )
        self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_probabilities(hidden_dropout=self.hidden_dropout, attention_dropout=self.attention_dropout)
        self.check_positions(self.position_embedding_type, POSITIONS, self.hidden_size, self.head_dim)
        if self.position_embedding_type == "rope":
            self.rope(1)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    def rotary_width(self) -> int:
        return self.head_dim


class Attention(Module):
    """Causal self-attention; one product gives q, k and v of each head side by side."""

    def __init__(self, c: GPTNeoXConfig, layer: int, init: Normal):
        self.query_key_value = Linear(c.hidden_size, 3 * c.hidden_size, init, bias=c.attention_bias)
        self.dense = Linear(c.hidden_size, c.hidden_size, init, bias=c.attention_bias)
        self._heads, self._d = c.num_attention_heads, c.head_dim
        self._layer, self._dropout = layer, c.attention_dropout
        self._spec = F.attention_spec(self._heads, self._heads, self._d, causal=True)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = F.split_groups(self.query_key_value(h), self._heads, [self._d] * 3)
        if at.table is not None:
            q, k = (F.rope(y, at.table, self._heads) for y in (q, k))
        return self.dense(x.attend(self._layer, q, k, v, self._spec, self._dropout, at.key_bias))


class MLP(Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: GPTNeoXConfig, init: Normal):
        self.dense_h_to_4h = Linear(c.hidden_size, c.intermediate_size, init)
        self.dense_4h_to_h = Linear(c.intermediate_size, c.hidden_size, init)
        self._act = c.hidden_act

    def __call__(self, h: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.activation(self._act, self.dense_h_to_4h(h)))


class Layer(Module):
    """Attention and MLP, side by side or one after the other."""

    def __init__(self, c: GPTNeoXConfig, layer: int, init: Normal):
        self.input_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attention = Attention(c, layer, init)
        self.mlp = MLP(c, init)
        self._parallel, self._dropout = c.use_parallel_residual, c.hidden_dropout

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        with h.trace.scope("attn"):
            attended = F.dropout(self.attention(self.input_layernorm(h), x, at), self._dropout)
        with h.trace.scope("mlp"):
            after = h + attended
            mlp = self.mlp(self.post_attention_layernorm(h if self._parallel else after))
            return after + F.dropout(mlp, self._dropout)


class GPTNeoXModel(Module):
    """Everything but the head."""

    def __init__(self, c: GPTNeoXConfig, init: Normal):
        self.embed_in = Embedding(c.vocab_size, c.hidden_size, init)
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.embed_positions = position_table(kind, rows, c.hidden_size, init)
        self.layers = [Layer(c, i, init) for i in range(c.num_hidden_layers)]
        self.final_layer_norm = LayerNorm(c.hidden_size, c.layer_norm_eps)


class GPTNeoX(CausalLM):
    """GPT-NeoX with its language-model head."""

    def __init__(self, config: GPTNeoXConfig):
        self.config: GPTNeoXConfig = config
        self.max_positions = config.max_position_embeddings
        init = Normal(config.initializer_range)
        self.gpt_neox = GPTNeoXModel(config, init)
        self.make_head(config.hidden_size, init, self.gpt_neox.embed_in)

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        with x.trace.scope("embed"):
            c, m = self.config, self.gpt_neox
            h = m.embed_in(x.input_ids)
            states = [h if m.embed_positions is None else h + m.embed_positions(x.position_ids)]
            kind = c.position_embedding_type
            at = Positions.of(x, kind, c.num_attention_heads, c.rope(x.length) if kind == "rope" else None)
        for i, layer in enumerate(self.gpt_neox.layers):
            with x.trace.scope(f"layers.{i}"):
                states.append(layer(states[-1], x, at))
        with x.trace.scope("final_layer_norm"):
            states[-1] = self.gpt_neox.final_layer_norm(states[-1])
        return states

    def rename(self, name: str) -> str | None:
        # Older files hold the causal mask and the frequencies as buffers.
        if name.endswith((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")):
            return None
        return "lm_head.weight" if name == "embed_out.weight" else name

    def stored_name(self, name: str) -> str:
        return "embed_out.weight" if name == "lm_head.weight" else name
