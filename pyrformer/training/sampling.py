"""Texts by the model while it learns. Weights, draws of the training and its bits stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from pyrformer.errors import ConfigError
from pyrformer.model import Model

#: Tokens that continue a prompt, at most.
TOKENS = 64


def check_prompts(model: Model, prompts: Sequence[str], objective: str) -> None:
    """Refuses prompts that the model could not do anything with.

    Raises:
        ConfigError: the objective gives no text, or a prompt is empty, too long, or lacks a mask.
        TokenizerError: a prompt has a character that the vocabulary lacks.
    """
    if prompts and objective in ("sentence", "tokens"):
        raise ConfigError("[train] sample_prompts: a model that learns classes continues no text")
    for prompt in prompts:
        tokenizer = model.require_tokenizer()
        ids = list(tokenizer.encode(prompt).ids)
        most = model.family.max_positions
        if not 1 <= len(ids) <= most:
            raise ConfigError(
                f"[train] the sample prompt {prompt!r} has {len(ids)} tokens; give 1 to {most}, the model's positions"
            )
        if model.family.objective == "mlm" and tokenizer.mask_token_id not in ids:
            raise ConfigError(
                f"[train] the sample prompt {prompt!r} has no mask token; a masked model fills those"
            )


def samples(model: Model, prompts: Sequence[str], seed: int) -> list[str]:
    """A text for each prompt: its continuation, drawn with ``seed``, or the text with its masks filled."""
    if model.family.objective == "mlm":
        return model.mask_predict(list(prompts)).texts
    drawn = model.generate(list(prompts), max_new_tokens=TOKENS, do_sample=True, seed=seed)
    return [prompt + text for prompt, text in zip(prompts, drawn.texts, strict=True)]
