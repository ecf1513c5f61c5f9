"""XLNet: a permutation language model. Source: Yang et al. 2019; transformers' ``modeling_xlnet.py``.

Each token is predicted from those before it in some order of the text. Two streams run side by side: the content h of a
token, which sees the token itself, and the query g of a target, which knows the target's place only. Scores compare
contents, distances and kinds of tokens::

    h ← words[ids];  g ← mask_emb                                   (g where there are targets)
    x ← LN(x + Wo·attention(q(x), k(h), v(h)));  x ← LN(x + W₂·gelu(W₁·x))    for each layer, x = h and x = g
    score(i, j) = (q + r_w)·k_j + (q + r_r)·R_{i−j} + (q + r_s)·kinds[i, j],  R_δ = Wr·sinusoids(δ)
    logits = g·wordsᵀ + b                                           (h·wordsᵀ + b without targets)

``attn_type`` "uni" hides later tokens, ``clamp_len`` bounds distances; ``perm_mask`` says what else is hidden,
``target_mapping`` which places are predicted, ``mems`` are the states of an earlier part of the text.

Letters: B batch, T tokens, P targets, S keys (remembered ones and T), C d_model, H heads, D d_head, V vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pyrformer.errors import InputError
from pyrformer.models.base import Attended, Family, Inputs, Ints, ModelConfig
from pyrformer.nn import ZEROS, Embedding, LayerNorm, Linear, Module, Normal, Parameter, Tensor, Trace
from pyrformer.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class XLNetConfig(ModelConfig):
    """Hugging Face's ``XLNetConfig``.

    ``bi_data``: in calls with arrays, distances of the batch's second half count the other way, for texts that are
    given from right to left. What reads texts itself (training, scores, generation) gives none, so it mirrors none.
    """

    model_type: ClassVar[str] = "xlnet"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("XLNetLMHeadModel",)
    ACTIVATION: ClassVar[str] = "ff_activation"

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "n_layer",
        "width": "d_model",
        "heads": "n_head",
        "positions": "n_positions",
    }
    SMALL: ClassVar[dict[str, Any]] = {"n_layer": 4, "d_model": 128, "n_head": 4, "d_inner": 512}

    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_head: int | None = None
    d_inner: int = 4096
    ff_activation: str = "gelu"
    attn_type: str = "bi"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    bi_data: bool = False
    clamp_len: int = -1
    #: XLNet has no table of positions; this bounds training and text, as other families' tables do. A key of our own:
    #: transformers opens no XLNet whose file says max_position_embeddings.
    n_positions: int = 512
    #: Relative distances, and nothing else: the query stream is told its target's place by them alone.
    position_embedding_type: str = "relative"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("relative",)

    @classmethod
    def modernise(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return {"n_positions" if k == "max_position_embeddings" else k: v for k, v in raw.items()}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            n_layer=self.n_layer,
            d_inner=self.d_inner,
            n_positions=self.n_positions,
            d_head=self.d_head or 1,
        )
        self.check_heads("d_model", self.d_model, "n_head", self.n_head)
        self.check_probabilities(dropout=self.dropout)
        self.require(
            self.position_embedding_type in self.OWN_POSITIONS,
            f"position_embedding_type must be 'relative', got {self.position_embedding_type!r}: what predicts a token "
            "knows that token's place by relative distances alone",
        )
        self.require(self.d_model % 2 == 0, f"d_model must be even, got {self.d_model}")
        self.require(
            self.attn_type in ("bi", "uni"), f"attn_type must be 'bi' or 'uni', got {self.attn_type!r}"
        )
        self.require(
            not (self.extra.get("same_length") and self.attn_type == "uni"),
            "same_length beside attn_type 'uni' is not supported",
        )
        self.fill(d_head=self.d_head or self.d_model // self.n_head)


@dataclass(frozen=True)
class Context:
    """What all layers of one pass share.

    Attributes:
        distances: sinusoids of key distances ``[S + T, C]``; where half of the batch is mirrored, of both halves.
        content, query: the places of the streams' rows, int32[B, T] and int32[B, P].
        kinds, key_kinds: token types of rows int32[B, T] and keys int32[B, S].
        hidden: what is hidden from which place, int32[B, T, T].
        mems: for each layer, the remembered states ``[B, M, C]``.
        seen: what each layer's attention was given; see :class:`pyrformer.models.base.Inputs`.
    """

    distances: tuple[Tensor, ...]
    content: Tensor
    query: Tensor | None
    kinds: Tensor
    key_kinds: Tensor
    hidden: Tensor | None
    mems: tuple[Tensor, ...]
    seen: dict[int, Attended]


class RelativeAttention(Module):
    """Attention of one stream's rows to the content stream."""

    def __init__(self, c: XLNetConfig, layer: int, init: Normal):
        d = c.d_head or 0
        shape = (c.d_model, c.n_head, d)
        self.q, self.k, self.v = Parameter(shape, init), Parameter(shape, init), Parameter(shape, init)
        self.o, self.r = Parameter(shape, init), Parameter(shape, init)
        self.r_r_bias = Parameter((c.n_head, d), init)
        self.r_s_bias = Parameter((c.n_head, d), init)
        self.r_w_bias = Parameter((c.n_head, d), init)
        self.seg_embed = Parameter((2, c.n_head, d), init)
        self.layer_norm = LayerNorm(c.d_model, c.layer_norm_eps)
        self._c, self._layer, self._width = c, layer, c.n_head * d

    def keys(self, content: Tensor, at: Context) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Keys and values ``[B, S, H·D]`` of the remembered and present contents, and distances ``[S + T, H·D]``."""
        distances = [self._head(self.r, d) for d in at.distances]
        return self._head(self.k, content), self._head(self.v, content), distances

    def __call__(
        self, x: Tensor, kvr: tuple[Tensor, Tensor, list[Tensor]], at: Context, *, content: bool
    ) -> Tensor:
        trace, c = x.trace, self._c
        k, v, r = kvr
        q = self._head(self.q, x)
        q_k, q_r, q_s = (q + self._flat(b, trace) for b in (self.r_w_bias, self.r_r_bias, self.r_s_bias))
        kinds = F.reshape(trace.parameter(self.seg_embed), (2, self._width))
        places = at.content if content or at.query is None else at.query
        scale = (c.d_head or 1) ** -0.5
        if content:
            operands = {"q": q_k, "q_r": q_r, "q_s": q_s, "k": k, "v": v, "r": r[0], "kinds": kinds}
            at.seen[self._layer] = Attended(operands, {"heads": c.n_head, "scale": scale})
        rows = [
            q_k,
            q_r,
            q_s,
            k,
            v,
            places,
            at.kinds,
            at.key_kinds,
            *([] if at.hidden is None else [at.hidden]),
        ]
        # Each half of a batch has distances of its own.
        cut = [_parts(row, len(r)) for row in rows]
        y = _joined(
            [
                F.relative_attention(
                    (q1, q2, q3),
                    keys,
                    values,
                    distances,
                    kinds,
                    where,
                    row_kinds,
                    key_kinds,
                    heads=c.n_head,
                    scale=scale,
                    hidden=hidden[0] if hidden else None,
                    sees_itself=content,
                    dropout_p=c.dropout,
                )
                for distances, (q1, q2, q3, keys, values, where, row_kinds, key_kinds, *hidden) in zip(
                    r, zip(*cut, strict=True), strict=True
                )
            ]
        )
        o = F.reshape(trace.parameter(self.o), (c.d_model, self._width))
        return self.layer_norm(F.dropout(F.linear(y, o), c.dropout) + x)

    def _head(self, parameter: Parameter, x: Tensor) -> Tensor:
        weight = F.reshape(x.trace.parameter(parameter), (self._c.d_model, self._width))
        return F.linear(x, weight, transposed=True)

    def _flat(self, parameter: Parameter, trace: Trace) -> Tensor:
        return F.reshape(trace.parameter(parameter), (self._width,))


def _parts(x: Tensor, n: int) -> list[Tensor]:
    """A batch cut into ``n`` equal parts."""
    if n == 1:
        return [x]
    flat = F.reshape(x, (math.prod(x.shape),))
    return [F.reshape(part, (x.shape[0] // n, *x.shape[1:])) for part in F.split(flat, n)]


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts of a batch put together again."""
    if len(parts) == 1:
        return parts[0]
    shape = parts[0].shape
    flat = F.concat([F.reshape(part, (math.prod(shape),)) for part in parts])
    return F.reshape(flat, (shape[0] * len(parts), *shape[1:]))


class FeedForward(Module):
    """Two linear layers with an activation between them, beside a residual."""

    def __init__(self, c: XLNetConfig, init: Normal):
        self.layer_norm = LayerNorm(c.d_model, c.layer_norm_eps)
        self.layer_1 = Linear(c.d_model, c.d_inner, init)
        self.layer_2 = Linear(c.d_inner, c.d_model, init)
        self._c = c

    def __call__(self, x: Tensor) -> Tensor:
        c = self._c
        y = F.dropout(F.activation(c.ff_activation, self.layer_1(x)), c.dropout)
        return self.layer_norm(F.dropout(self.layer_2(y), c.dropout) + x)


class Layer(Module):
    """One layer of both streams."""

    def __init__(self, c: XLNetConfig, layer: int, init: Normal):
        self.rel_attn = RelativeAttention(c, layer, init)
        self.ff = FeedForward(c, init)

    def __call__(
        self, h: Tensor, g: Tensor | None, memory: Tensor | None, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        with h.trace.scope("attn"):
            contents = h if memory is None else F.concat_tokens(memory, h)
            kvr = self.rel_attn.keys(contents, at)
            content = self.rel_attn(h, kvr, at, content=True)
            query = None if g is None else self.rel_attn(g, kvr, at, content=False)
        with h.trace.scope("ff"):
            return self.ff(content), None if query is None else self.ff(query)


class Transformer(Module):
    """Everything but the head."""

    def __init__(self, c: XLNetConfig, init: Normal):
        self.mask_emb = Parameter((1, 1, c.d_model), init)
        self.word_embedding = Embedding(c.vocab_size, c.d_model, init)
        self.layer = [Layer(c, i, init) for i in range(c.n_layer)]


class Projector(Module):
    """Output weights, tied to the word embeddings where configured, and their bias."""

    def __init__(self, c: XLNetConfig, init: Normal):
        self.weight = Parameter((c.vocab_size, c.d_model), init)
        self.bias = Parameter((c.vocab_size,), ZEROS)


class XLNet(Family):
    """XLNet with its language-model head."""

    objective = "plm"
    uses_token_types = True

    def __init__(self, config: XLNetConfig):
        self.config: XLNetConfig = config
        self.max_positions = config.n_positions
        self.width, self.depth = config.d_model, config.n_layer
        init = Normal(config.initializer_range)
        self.transformer = Transformer(config, init)
        self.lm_loss = Projector(config, init)
        if config.tie_word_embeddings:
            self.lm_loss.weight = self.transformer.word_embedding.weight
        self.name_parameters()

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        if x.token_type_ids is None or x.cache is not None:
            raise InputError("[xlnet] token_type_ids are needed, and there is no decoding with a cache")
        c, t, trace = self.config, self.transformer, x.trace
        with trace.scope("embed"):
            h = F.dropout(t.word_embedding(x.input_ids), c.dropout)
            g = None
            if x.targets is not None:
                mask = F.reshape(trace.parameter(t.mask_emb), (c.d_model,))
                g = F.dropout(trace.fill(0.0, (*x.targets.shape, c.d_model)) + mask, c.dropout)
            at = self._context(x)
        states = [h] if g is None else [h, g]
        for i, layer in enumerate(t.layer):
            with trace.scope(f"layer.{i}"):
                h, g = layer(h, g, at.mems[i] if at.mems else None, at)
                states.extend([h] if g is None else [h, g])
        states[-1] = F.dropout(states[-1], c.dropout)
        return states

    def _context(self, x: Inputs) -> Context:
        trace, t = x.trace, x.input_ids.shape[1]
        m = x.mems[0].shape[1] if x.mems else 0
        assert x.token_type_ids is not None
        kinds = x.token_type_ids
        turned = [F.split(self._distances(trace, m + t, t, s), 2) for s in ((1, -1) if x.mirrored else (1,))]
        distances = tuple(F.dropout(F.concat([sin, cos]), self.config.dropout) for cos, sin in turned)
        return Context(
            distances, x.position_ids, x.targets, kinds, x.key_types or kinds, x.hidden, x.mems, x.seen
        )

    def _distances(self, trace: Trace, keys: int, rows: int, sign: int) -> Tensor:
        """Cosines and sines of ``sign`` times the distances ``keys`` to 1 − ``rows``, descending, clamped to
        ±``clamp_len`` where it is above 0: ``[keys + rows, C]``."""
        limit = self.config.clamp_len if self.config.clamp_len > 0 else keys + rows
        first, last = min(keys, limit), max(1 - rows, -limit)
        half = np.arange(0, self.config.d_model, 2) / self.config.d_model
        runs = [(keys - first, first, 0), (first - last + 1, first, -1), (last - (1 - rows), last, 0)]
        tables = [
            F.rope_table(F.iota(trace, n, sign * start, sign * step), (10000.0**-half).tolist())
            for n, start, step in runs
            if n
        ]
        flat = F.concat([F.reshape(table, (table.shape[0] * table.shape[1],)) for table in tables])
        return F.reshape(flat, (keys + rows, self.config.d_model))

    def unseen(self, length: int) -> Ints | None:
        if self.config.attn_type == "bi":
            return None
        return np.triu(np.ones((length, length), np.int32), 1)

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        return self.lm_loss.weight, trace.parameter(self.lm_loss.bias)
