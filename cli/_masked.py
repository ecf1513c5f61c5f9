"""``pyrformer sample`` with a masked model: fills the masks of prompts."""

from __future__ import annotations

from typing import Any

import click

import pyrformer as pf
from pyrformer.pipeline import Maker

#: What may be said of the draws.
DRAWS = {
    "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "min_tokens_to_keep", "seed", "num_return_sequences",
}  # fmt: skip


def filler(model: pf.Model, settings: dict[str, Any]) -> Maker:
    """What gives each prompt's rows, its masks filled: drawn, or with ``do_sample=False`` by repeated prediction."""
    drawn = settings.pop("do_sample", True)
    known = {"iterations", *(DRAWS if drawn else ())}
    unknown = sorted(settings.keys() - known)
    if unknown:
        way = "Gibbs sampling" if drawn else "mask-predict (--greedy)"
        name = unknown[0].replace("_", "-")
        raise click.UsageError(f"--{name} means nothing for a masked model, whose masks are filled by {way}")

    def rows(prompts: list[str], first: int) -> list[list[dict[str, Any]]]:
        return [one(prompt) for prompt in prompts]

    def one(prompt: str) -> list[dict[str, Any]]:
        out = model.gibbs(prompt, **settings) if drawn else model.mask_predict(prompt, **settings)
        return [
            {"prompt": prompt, "text": text, "ids": ids, "token_logprobs": logprobs}
            for text, ids, logprobs in zip(out.texts, out.ids, out.token_logprobs, strict=True)
        ]

    return rows
