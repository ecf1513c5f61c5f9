"""Generation: continuing prompts, whole or as a stream, and what comes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.arrow import Columns
from pyrformer.errors import InputError
from pyrformer.fields import checked
from pyrformer.generation.call import Call
from pyrformer.generation.config import GenerationConfig
from pyrformer.generation.steps import Step
from pyrformer.model import Model


@dataclass(frozen=True)
class Generation(Columns):
    """What was generated, one entry per returned sequence (prompts in order, ``num_return_sequences`` each); a table
    for readers of Arrow.

    Attributes:
        texts: what the new tokens add to the prompt, special ones left out; empty strings without a tokenizer.
        ids: the new tokens only, end token included.
        scores: Hugging Face's ``sequences_scores`` in beam search, None otherwise.
        token_logprobs: the model's own log-probability of each token, nats.
        finish_reasons: "stop" (end token, stop string, stopping criterion) or "length" (or the time ran out).
        steps: with ``output_steps``, what the search looked at; empty otherwise.
    """

    texts: list[str]
    ids: list[list[int]]
    scores: list[float | None]
    token_logprobs: list[list[float]]
    finish_reasons: list[str]
    steps: list[Step] = field(default_factory=list)

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.generation(self)

    def _columns(self) -> Iterator[tuple[str, Any]]:
        for column in ("text", "ids", "score", "token_logprobs", "finish_reason"):
            yield column, getattr(self, column if column in ("ids", "token_logprobs") else f"{column}s")


@checked("generate")
def generate(
    model: Model, prompts: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> Generation:
    """Continues prompts.

    Args:
        prompts: a string, a list of strings, a list of ids, lists of ids, or a padded integer array ``[B, T]`` with
            ``attention_mask`` among the options (padding counts in min_length and max_length, nowhere else).
        config: options; keywords override it, and it overrides the model's ``generation_config.json``.
        options: Hugging Face's names: max_new_tokens, max_length, min_new_tokens, do_sample, num_beams,
            num_beam_groups, diversity_penalty, force_words_ids, num_return_sequences, temperature, top_k, top_p,
            min_p, typical_p, repetition_penalty, no_repeat_ngram_size, length_penalty, early_stopping, eos_token_id,
            stop_strings, max_time (seconds), …; besides presence_penalty, frequency_penalty, patience,
            stochastic_beams, ordered_constraints and seed. And those of one call:
            ``prefix_allowed_tokens_fn(prompt, ids) -> token ids`` that may follow;
            ``logits_processor(ids, scores [V]) -> scores [V]``, after all processors, before temperature and filters;
            ``stopping_criteria(ids) -> bool``, whether the sequence ends here.
            ``first_sequence`` numbers the first sequence in the coordinates of draws: with 3, the one sequence that is
            drawn is the fourth of a call that draws many with this seed.
            ``output_steps=K`` records each step's K most probable continuations.
            ``prompt_lookup_num_tokens=K`` (with ``max_matching_ngram_size``, default 2) or ``assistant_model`` (a model
            of the same vocabulary; with ``num_assistant_tokens``, default 5) draft tokens that one pass checks: faster
            where they are often right, with the same distribution of results, one sequence after the other.
            ``penalty_alpha`` with ``top_k`` (from 2 on) is contrastive search.
            ``cache_implementation="quantized"`` keeps keys and values in 8 bits (CPU, float32).
            ``regex``, ``json_schema`` or ``grammar`` (Lark's syntax): the text follows it, and ends where nothing else
            can follow; see :class:`pyrformer.generation.grammar.Grammar`.

    A text longer than the model's positions goes on: when they are used up, the older half is dropped from view.

    Raises:
        InputError: an option is unknown or contradictory, a prompt is empty or too long, or a function failed.
    """
    call = Call(model, prompts, config, options)
    for _ in call.run():
        pass
    results = call.finish()
    tokenizer = model.tokenizer
    texts = [
        "" if tokenizer is None else tokenizer.decode_after(call.prompt_of(n, r), r["ids"])
        for n, r in results
    ]
    return Generation(
        texts,
        [r["ids"] for _, r in results],
        [r["score"] for _, r in results],
        [r["token_logprobs"] for _, r in results],
        [r["finish_reason"] for _, r in results],
        call.recorder.steps if call.recorder else [],
    )


@checked("stream")
def stream(
    model: Model, prompt: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> Iterator[str]:
    """Continues one prompt (greedy or sampled) and gives pieces of text as they become certain, never half a character.

    Raises:
        InputError: as :func:`generate`; also for several prompts or sequences, and for beam search.
    """
    model.require_tokenizer()
    call = Call(model, prompt, config, options)
    if (
        call.prompts != 1
        or call.options.get("num_beams", 1) != 1
        or call.options.get("num_return_sequences", 1) != 1
    ):
        raise InputError(
            "[stream] only one prompt with num_beams=1 and num_return_sequences=1 can be streamed"
        )
    pieces = model.require_tokenizer().stream_decoder(skip_special_tokens=True)
    for token in call.ids[0]:
        pieces.push(token)
    for emitted in call.run(steps=1):
        for _, token, _ in emitted:
            piece = pieces.push(token)
            if piece:
                yield piece
    last = pieces.finish()
    if last:
        yield last


async def astream(
    model: Model, prompt: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[str]:
    """:func:`stream` for ``async for``: each step runs in a thread, so the event loop goes on."""
    import asyncio  # slow to import, and few need it

    pieces = stream(model, prompt, config, **options)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


@checked("filter_logits")
def filter_logits(logits: npt.ArrayLike, **options: Any) -> npt.NDArray[np.float32]:
    """The distribution that sampling draws from: ``logits [.., V]`` filtered and renormalised, float32 ``[.., V]``.

    Args:
        options: temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, min_tokens_to_keep;
            they apply in this order.

    Raises:
        InputError: an option is unknown or out of range, or a row has NaN or no finite logit.
    """
    try:
        array = np.ascontiguousarray(logits, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as e:
        raise InputError(f"[filter_logits] logits are no array of numbers: {e}") from None
    if array.ndim == 0 or array.size == 0:
        raise InputError(f"[filter_logits] logits must be a non-empty array [.., V], got {list(array.shape)}")
    return _core.filter_logits(array.reshape(-1, array.shape[-1]), options).reshape(array.shape)
