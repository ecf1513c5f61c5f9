"""LLaMA and its close kin: Mistral, Qwen2, Qwen3. Source: Touvron et al. 2023; transformers' ``modeling_llama.py``,
``modeling_mistral.py``, ``modeling_qwen2.py``, ``modeling_qwen3.py``.

Pre-norm decoder blocks with RMSNorm, rotary positions, a gated MLP, and keys and values shared by groups of heads::

    x ← embed[ids]
    x ← x + Wo·attention(rope(Wq·n), rope(Wk·n), Wv·n),  n = rms(x)        for each layer
    x ← x + W_down·(silu(W_gate·n) ⊙ (W_up·n)),          n = rms(x)
    logits = W_head·rms(x)

Mistral's queries see a window of keys; Qwen2 has biases on q, k and v; Qwen3 normalises each head of q and k instead.

Letters: B batch, T tokens, C hidden_size, H query heads, K key-value heads, D head_dim, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.models.base import CausalLM, Inputs, Positions, RotaryConfig, position_table
from pyrformer.nn import Embedding, Linear, Module, Normal, RMSNorm, Tensor
from pyrformer.nn import functional as F

#: What a model may know of positions: rotations (LLaMA's own), a learned table, sinusoids, ALiBi, or nothing.
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(RotaryConfig):
    """Hugging Face's ``LlamaConfig``, and one of our own: ``position_embedding_type`` (one of ``POSITIONS``)."""

    model_type: ClassVar[str] = "llama"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("rope",)

    # The gated MLP has three matrices: 8/3 of the width makes it as large as one of two.
    SMALL: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 384,
    }

    tie_word_embeddings: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    position_embedding_type: str = "rope"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )
        self.check_probabilities(attention_dropout=self.attention_dropout)
        if self.head_dim is None:
            self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        self.require(
            kv_heads > 0 and self.num_attention_heads % kv_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) is not divisible by num_key_value_heads ({kv_heads})",
        )
        self.fill(
            num_key_value_heads=kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
        )
        self.check_positions(self.position_embedding_type, POSITIONS, self.hidden_size, self.head_dim or 0)
        if self.position_embedding_type == "rope":
            self.rope(1)

    def rotary_width(self) -> int:
        return self.head_dim or 0

    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias

    def output_bias(self) -> bool:
        """Whether attention's output has a bias."""
        return self.attention_bias

    def head_norms(self) -> bool:
        """Whether each head of q and k is normalised."""
        return False

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees; None: all before it."""
        return None


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Hugging Face's ``MistralConfig``."""

    model_type: ClassVar[str] = "mistral"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("MistralForCausalLM",)

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def window(self, layer: int) -> int | None:
        return self.sliding_window


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Hugging Face's ``Qwen2Config``."""

    model_type: ClassVar[str] = "qwen2"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM",)

    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("full_attention", "sliding_attention")
        types = self.layer_types
        self.require(
            types is None or (len(types) == self.num_hidden_layers and all(t in known for t in types)),
            f"layer_types must hold one of {known} for each of the {self.num_hidden_layers} layers",
        )

    def qkv_bias(self) -> bool:
        return True

    def output_bias(self) -> bool:
        return False

    def window(self, layer: int) -> int | None:
        if self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = self.use_sliding_window and layer >= self.max_window_layers
        return self.sliding_window if slides else None


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Hugging Face's ``Qwen3Config``."""

    model_type: ClassVar[str] = "qwen3"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("Qwen3ForCausalLM",)

    head_dim: int | None = 128

    def qkv_bias(self) -> bool:
        return self.attention_bias

    def output_bias(self) -> bool:
        return self.attention_bias

    def head_norms(self) -> bool:
        return True


class Attention(Module):
    """Causal self-attention over rotated queries and keys."""

    def __init__(self, c: LlamaConfig, layer: int, init: Normal):
        self._heads, self._kv_heads = c.num_attention_heads, c.num_key_value_heads or 0
        self._d, self._layer, self._dropout = c.head_dim or 0, layer, c.attention_dropout
        q, kv = self._heads * self._d, self._kv_heads * self._d
        self.q_proj = Linear(c.hidden_size, q, init, bias=c.qkv_bias())
        self.k_proj = Linear(c.hidden_size, kv, init, bias=c.qkv_bias())
        self.v_proj = Linear(c.hidden_size, kv, init, bias=c.qkv_bias())
        self.o_proj = Linear(q, c.hidden_size, init, bias=c.output_bias())
        self.q_norm = RMSNorm(self._d, c.rms_norm_eps) if c.head_norms() else None
        self.k_norm = RMSNorm(self._d, c.rms_norm_eps) if c.head_norms() else None
        window = c.window(layer)
        c.require(window is None or window >= 1, f"sliding_window must be at least 1, got {window}")
        self._spec = F.attention_spec(self._heads, self._kv_heads, self._d, causal=True, window=window)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        q, k = self._normed(q, self.q_norm, self._heads), self._normed(k, self.k_norm, self._kv_heads)
        if at.table is not None:
            q, k = F.rope(q, at.table, self._heads), F.rope(k, at.table, self._kv_heads)
        return self.o_proj(x.attend(self._layer, q, k, v, self._spec, self._dropout, at.key_bias))

    def _normed(self, y: Tensor, norm: RMSNorm | None, heads: int) -> Tensor:
        if norm is None:
            return y
        return F.reshape(norm(F.reshape(y, (*y.shape[:-1], heads, self._d))), y.shape)


class MLP(Module):
    """The gated MLP (Shazeer 2020): SwiGLU with ``hidden_act`` "silu"."""

    def __init__(self, c: LlamaConfig, init: Normal):
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, init, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, init, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, init, bias=c.mlp_bias)
        self._act = c.hidden_act

    def __call__(self, h: Tensor) -> Tensor:
        return self.down_proj(F.gated(self._act, self.gate_proj(h), self.up_proj(h)))


class Layer(Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, c: LlamaConfig, layer: int, init: Normal):
        self.self_attn = Attention(c, layer, init)
        self.mlp = MLP(c, init)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        with h.trace.scope("attn"):
            h = h + self.self_attn(self.input_layernorm(h), x, at)
        with h.trace.scope("mlp"):
            return h + self.mlp(self.post_attention_layernorm(h))


class LlamaModel(Module):
    """Everything but the head."""

    def __init__(self, c: LlamaConfig, init: Normal):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, init)
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.embed_positions = position_table(kind, rows, c.hidden_size, init)
        self.layers = [Layer(c, i, init) for i in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(CausalLM):
    """A LLaMA-like decoder with its language-model head."""

    def __init__(self, config: LlamaConfig):
        self.config: LlamaConfig = config
        self.max_positions = config.max_position_embeddings
        init = Normal(config.initializer_range)
        self.model = LlamaModel(config, init)
        self.make_head(config.hidden_size, init, self.model.embed_tokens)

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        with x.trace.scope("embed"):
            c, m = self.config, self.model
            h = m.embed_tokens(x.input_ids)
            states = [h if m.embed_positions is None else h + m.embed_positions(x.position_ids)]
            kind = c.position_embedding_type
            at = Positions.of(x, kind, c.num_attention_heads, c.rope(x.length) if kind == "rope" else None)
        for i, layer in enumerate(self.model.layers):
            with x.trace.scope(f"layers.{i}"):
                states.append(layer(states[-1], x, at))
        with x.trace.scope("norm"):
            states[-1] = self.model.norm(states[-1])
        return states

    def rename(self, name: str) -> str | None:
        # Files of older versions hold the frequencies as a buffer.
        return None if name.endswith(".rotary_emb.inv_freq") else name
