"""Tiny models and their programs, for what walks whole plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyrformer.compile import Traced
from pyrformer.model import Model
from pyrformer.optimizers import AdamW
from pyrformer.programs import (
    LossOptions,
    Sizes,
    accumulate_step,
    apply_step,
    decode_step,
    evaluate,
    forward,
    gradients,
    token_losses,
    train_step,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 12, "n_head": 2, "vocab_size": 37, "n_positions": 24},
    "bert": {
        "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2,
        "intermediate_size": 20, "vocab_size": 37, "max_position_embeddings": 24,
    },
    "llama": {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 20, "vocab_size": 37, "max_position_embeddings": 24,
    },
    "falcon": {
        "model_type": "falcon", "num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 37,
        "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False,
    },
    "falcon_alibi": {
        "model_type": "falcon", "num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 37,
        "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False, "bias": True, "alibi": True,
    },
    "modernbert": {
        "model_type": "modernbert", "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2,
        "intermediate_size": 20, "vocab_size": 37, "max_position_embeddings": 24, "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
    "opt": {
        "model_type": "opt", "num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 20,
        "vocab_size": 37, "max_position_embeddings": 24, "word_embed_proj_dim": 12,
    },
    "xlnet": {
        "model_type": "xlnet", "n_layer": 2, "d_model": 12, "n_head": 2, "d_inner": 20, "vocab_size": 37,
    },
}  # fmt: skip
#: Families whose every program runs on a device.
FAMILIES = list(CONFIGS)
OPTIMIZER = AdamW(weight_decay=0.1, max_grad_norm=0.5)
BATCH, TOKENS = 2, 7
#: Tokens of each row that XLNet predicts.
TARGETS = 4


def model(name: str, **options: Any) -> Model:
    """A freshly initialised tiny model."""
    return Model.from_config(CONFIGS[name], seed=3, **options)


def sizes(model: Model, segments: bool = False) -> Sizes:
    """Two rows of seven tokens."""
    if model.family.objective == "plm":
        return Sizes(BATCH, TOKENS, BATCH * TARGETS, targets=TARGETS, hidden=True)
    return Sizes(BATCH, TOKENS, 0 if model.family.objective == "ar" else 8, segments)


PROGRAMS: dict[str, Callable[[Model], Traced]] = {
    "forward": lambda m: forward(m.family, sizes(m), loss=True),
    "segments": lambda m: forward(m.family, sizes(m, segments=True)),
    "evaluate": lambda m: evaluate(m.family, sizes(m)),
    "gradients": lambda m: gradients(m.family, sizes(m)),
    "train_step": lambda m: train_step(m.family, sizes(m), OPTIMIZER),
    "smoothed_step": lambda m: train_step(m.family, sizes(m), OPTIMIZER, options=LossOptions(0.1, 0.01)),
    "token_losses": lambda m: token_losses(m.family, sizes(m)),
    "accumulate_step": lambda m: accumulate_step(m.family, sizes(m)),
    "apply_step": lambda m: apply_step(m.family, OPTIMIZER),
    "decode_step": lambda m: decode_step(m.family, 2, 3, (3, 8), "cache"),
    "decode_far": lambda m: decode_step(m.family, 2, 1, (3, 300), "far"),
    "decode_best": lambda m: decode_step(m.family, 2, 3, (3, 8), "best", best=9),
}


def cases() -> list[tuple[str, str]]:
    """(family, program), without decoding of models that do not continue text."""
    return [
        (name, program)
        for name in FAMILIES
        for program in PROGRAMS
        if not program.startswith("decode") or model(name).family.objective == "ar"
    ]


def inputs(model: Model, plan: Any, rng: np.random.Generator, step: int = 0) -> dict[str, np.ndarray]:
    """Values for all inputs of a plan."""
    vocab, m, plm = model.family.config.vocab_size, 8, model.family.objective == "plm"
    shapes = {name: tuple(shape) for name, _, shape in plan.inputs}
    tokens, (_, slots) = shapes.get("input_ids", (0, 0))[-1], shapes.get("rows", (0, 0))
    count = np.minimum([3, 2], tokens)
    own = {
        "input_ids": lambda shape: rng.integers(vocab, size=shape),
        "position_ids": lambda shape: np.broadcast_to(np.arange(shape[1]), shape),
        "token_type_ids": lambda shape: rng.integers(2, size=shape),
        "segments": lambda shape: np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7]),
        "positions": lambda shape: rng.integers(BATCH * (TARGETS if plm else TOKENS), size=shape),
        "targets": lambda shape: np.array([[3, 6, -1, 0], [5, 1, 4, 2]]),
        "hidden": lambda shape: rng.integers(2, size=shape),
        "labels": lambda shape: np.where(rng.random(shape) < 0.2, -100, rng.integers(vocab, size=shape)),
        "rng": lambda shape: np.array([5, -7, step, 0]),
        "loss_scale": lambda shape: np.array(1 / m),
        "beta2": lambda shape: np.array(1 - (step + 1) ** -0.8),
        "lr": lambda shape: np.array(0.01),
        "step": lambda shape: np.array(step + 1),
        "rows": lambda shape: rng.integers(3, size=shape),
        "row": lambda shape: np.array([2, 0]),
        "start": lambda shape: np.array([slots - 8, max(0, slots - 160)]),
        "count": lambda shape: count,
        "temperature": lambda shape: np.array([0.7, 1.0]),
        "last": lambda shape: np.arange(2) * tokens + count - 1,
    }
    return {
        name: np.ascontiguousarray(own[name](tuple(shape)), dtype).reshape(shape)
        for name, dtype, shape in plan.inputs
    }
