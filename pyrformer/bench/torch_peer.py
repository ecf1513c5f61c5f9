"""The peer: the same training step in PyTorch, eager, float32, for comparison only. Nothing else imports PyTorch.

Letters: B batch, T tokens, C width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from pyrformer.bench.train_step import Shape


class Attention(nn.Module):
    """Self-attention, rotary where asked."""

    def __init__(self, c: int, heads: int, *, bias: bool, causal: bool, rotary: bool):
        super().__init__()
        self.qkv, self.out = nn.Linear(c, 3 * c, bias=bias), nn.Linear(c, c, bias=bias)
        self.heads, self.causal, self.rotary = heads, causal, rotary

    def forward(self, x: Any) -> Any:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(c, 2))
        if self.rotary:
            d = c // self.heads
            at = torch.arange(t, device=x.device)
            angles = at[:, None] / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

            def turned(z: Any) -> Any:
                return z * cos + torch.cat([-z[..., d // 2 :], z[..., : d // 2]], -1) * sin

            q, k = turned(q), turned(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, c: int, inner: int):
        super().__init__()
        self.gate, self.up = nn.Linear(c, inner, bias=False), nn.Linear(c, inner, bias=False)
        self.down = nn.Linear(inner, c, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, pre-norm or (BERT) post-norm."""

    def __init__(self, s: Shape, config: dict[str, Any]):
        super().__init__()
        llama, bert = s.family == "llama", s.family == "bert"
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.n1, self.n2, self.post = norm(s.width), norm(s.width), bert
        self.attn = Attention(s.width, s.heads, bias=not llama, causal=not bert, rotary=llama)
        if llama:
            self.mlp: nn.Module = Gated(s.width, config["intermediate_size"])
        else:
            act = nn.GELU() if bert else nn.GELU(approximate="tanh")
            self.mlp = nn.Sequential(nn.Linear(s.width, 4 * s.width), act, nn.Linear(4 * s.width, s.width))

    def forward(self, x: Any) -> Any:
        if self.post:
            x = self.n1(x + self.attn(x))
            return self.n2(x + self.mlp(x))
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Twin(nn.Module):
    """The model of a shape, with its head tied to its embeddings; a masked one computes logits where labels are."""

    def __init__(self, s: Shape):
        super().__init__()
        self.words, self.places = nn.Embedding(s.vocab, s.width), nn.Embedding(s.seq, s.width)
        self.blocks = nn.ModuleList(Block(s, s.config()) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width) if s.family == "llama" else nn.LayerNorm(s.width)
        self.dense = nn.Linear(s.width, s.width) if s.family == "bert" else None
        self.bias = nn.Parameter(torch.zeros(s.vocab)) if s.family == "bert" else None
        self.rotary = s.family == "llama"

    def forward(self, ids: Any, labels: Any) -> Any:
        x = self.words(ids)
        if not self.rotary:
            x = x + self.places.weight[: ids.shape[1]]
        if self.dense is not None:
            x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        if self.dense is None:
            return F.cross_entropy(
                F.linear(self.norm(x)[:, :-1], self.words.weight).flatten(0, 1), labels[:, 1:].flatten()
            )
        seen = labels >= 0
        return F.cross_entropy(
            F.linear(self.norm(F.gelu(self.dense(x[seen]))), self.words.weight, self.bias), labels[seen]
        )


def training_step(
    shape: Shape, threads: int, device: str = "cpu", *, precision: str = "float32"
) -> Callable[[], object]:
    """One step of the twin: forward, backward, clipping, fused AdamW where there is one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    half = torch.float16 if precision == "float16" else torch.bfloat16
    model = Twin(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    ids, labels = (torch.from_numpy(x).to(device) for x in shape.tokens())

    def step() -> object:
        with torch.autocast(device, half, enabled=precision != "float32"):
            loss = model(ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step
