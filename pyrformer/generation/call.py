"""One call of generation: its options and prompts, checked, and the searches and strategies that they ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import InputError
from pyrformer.fields import MOST, token_ids, whole
from pyrformer.generation.config import STORED, GenerationConfig
from pyrformer.generation.decoder import slots_for
from pyrformer.generation.grammar import KINDS, Grammar
from pyrformer.generation.steps import Recorder
from pyrformer.generation.strategies import (
    Assistant,
    Contrastive,
    Emitted,
    Lockstep,
    Lookup,
    Proposer,
    Speculative,
    Strategy,
)
from pyrformer.model import Model

if TYPE_CHECKING:
    from pyrformer.tokenizers import Tokenizer

#: Options that mean nothing without sampling, or without beams.
SAMPLING = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
BEAMS = {
    "length_penalty",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
    "patience",
    "stochastic_beams",
    "force_words_ids",
    "ordered_constraints",
}
#: The most tokens of a sequence.
MOST_TOKENS = 1 << 31
#: Tokens that an assistant drafts at once, unless ``num_assistant_tokens`` says otherwise.
DRAFTED = 5


class Call:
    """One generation: its options, its searches, and when it stops."""

    def __init__(self, model: Model, prompts: Any, config: Any, given: dict[str, Any]):
        given = dict(given)
        mask = given.pop("attention_mask", None)
        first = _optional("first_sequence", given.pop("first_sequence", None), 0, MOST_TOKENS)
        self.allowed = given.pop("prefix_allowed_tokens_fn", None)
        self.processor = given.pop("logits_processor", None)
        rules = {kind: given.pop(kind) for kind in KINDS if given.get(kind) is not None}
        criterion, self.assistant = given.pop("stopping_criteria", None), given.pop("assistant_model", None)
        watched = given.pop("output_steps", None)
        stored = config.options if isinstance(config, GenerationConfig) else config
        self.options = options = merged_options(model, stored, given)
        stop_strings, self.max_time = _stops(options)
        self.model = model
        ids, padding = _prompt_ids(model, prompts, mask)
        grammar = self._grammar(rules) if rules else None
        if grammar is not None:
            starts = [len(p) for p in ids]
            self.allowed = lambda prompt, ids: grammar.allowed(ids[starts[prompt] :])
        asked = stop_strings or criterion or grammar
        self.ends = ending(model, stop_strings, criterion, grammar) if asked else None
        self.lookup = _optional("prompt_lookup_num_tokens", options.pop("prompt_lookup_num_tokens", None), 1)
        self.ngram = _optional("max_matching_ngram_size", options.pop("max_matching_ngram_size", None), 1)
        self.drafted = _optional("num_assistant_tokens", options.pop("num_assistant_tokens", None), 1)
        self.alpha = options.pop("penalty_alpha", None)
        self.in_8bit = _quantized(model, options.pop("cache_implementation", None))
        asked_for = options.get("num_return_sequences")
        number = _optional("num_return_sequences", asked_for, 0, _core.MOST_SEQUENCES) or 1
        self.prompts, self.started = len(ids), time.monotonic()
        limits = ("max_new_tokens", "max_length")
        wanted = [_optional(name, options.get(name), 0, MOST_TOKENS) for name in limits]
        self.slots = slots_for(model, ids, *wanted)
        self.recorder = None if watched is None else Recorder(whole("generate", "output_steps", watched, 1))
        firsts = [None if first is None else first + i * number for i in range(len(ids))]
        if model.family.objective == "plm":
            self._check_plain()
        if self.lookup or self.assistant is not None:
            self._check_drafts()
            options["num_return_sequences"] = 1
            self.searches = [
                self._search([(p, pad, (first or 0) + i * number + j)], i)
                for i, (p, pad) in enumerate(zip(ids, padding, strict=True))
                for j in range(number)
            ]
        else:
            for name, value in (
                ("max_matching_ngram_size", self.ngram),
                ("num_assistant_tokens", self.drafted),
            ):
                if value is not None and name in given:
                    needed = "prompt_lookup_num_tokens" if name.startswith("max") else "assistant_model"
                    raise InputError(f"[generate] {name} needs {needed}; give that or leave it out")
            if self.alpha is not None:
                self._check_contrast()
            self.searches = [self._search(list(zip(ids, padding, firsts, strict=True)))]
        self.ids = ids if len(self.searches) == 1 else [list(p) for p in ids for _ in range(number)]

    def _search(self, places: list[tuple[list[int], int, int | None]], number: int = 0) -> _core.Search:
        """A search over prompts, the first of which is number ``number`` of the call."""
        vocabulary, allowed = self.model.family.config.vocab_size, self.allowed
        if allowed is not None and number > 0:
            function = allowed
            allowed = lambda prompt, ids: function(number + prompt, ids)  # noqa: E731
        return _core.Search(self.options, places, vocabulary, allowed, self.processor, self.ends)

    def _grammar(self, rules: dict[str, Any]) -> Grammar:
        if len(rules) > 1 or self.allowed is not None:
            first, second = [*rules, "prefix_allowed_tokens_fn"][:2]
            raise InputError(f"[generate] {first} and {second} exclude each other")
        [(kind, source)] = rules.items()
        eos = self.options.get("eos_token_id", [])
        model = self.model
        ends = [eos] if isinstance(eos, int) else list(eos)
        return Grammar(model.require_tokenizer(), kind, source, ends, model.family.config.vocab_size)

    def _check_plain(self) -> None:
        for name, value in (
            ("prompt_lookup_num_tokens", self.lookup),
            ("assistant_model", self.assistant),
            ("penalty_alpha", self.alpha),
        ):
            if value is not None:
                raise InputError(
                    f"[generate] {name} needs a model with a cache, which permutation models lack"
                )

    def _check_drafts(self) -> None:
        options, assistant = self.options, self.assistant
        if self.lookup and assistant is not None:
            raise InputError("[generate] prompt_lookup_num_tokens and assistant_model exclude each other")
        name = "assistant_model" if assistant is not None else "prompt_lookup_num_tokens"
        if options.get("num_beams", 1) != 1:
            raise InputError(f"[generate] {name} needs num_beams=1; leave one of them out")
        if self.alpha is not None or self.recorder is not None:
            other = "penalty_alpha" if self.alpha is not None else "output_steps"
            raise InputError(f"[generate] {name} and {other} exclude each other")
        if assistant is None:
            return
        vocabulary = self.model.family.config.vocab_size
        if assistant is self.model or assistant.family.objective != "ar":
            raise InputError("[generate] assistant_model must be another model that continues text")
        if assistant.family.config.vocab_size != vocabulary:
            theirs = assistant.family.config.vocab_size
            raise InputError(
                f"[generate] assistant_model has a vocabulary of {theirs} tokens, the model one of {vocabulary}"
            )

    def _check_contrast(self) -> None:
        options = self.options
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise InputError(f"[generate] penalty_alpha must be in 0..1, got {self.alpha!r}")
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise InputError("[generate] penalty_alpha needs do_sample=False and num_beams=1")
        self.candidates = whole("generate", "top_k", options.pop("top_k", None), 2)
        self.candidates = min(self.candidates, self.model.family.config.vocab_size)

    def run(self, steps: int | None = None) -> Iterator[Emitted]:
        """Goes on until the searches or the time are over; gives the tokens that became certain, of at most ``steps``
        steps at a time."""
        for number, search in enumerate(self.searches):
            strategy = self._strategy(number, search, steps)
            while (emitted := strategy.step()) is not None:
                yield emitted
                if self.max_time is not None and time.monotonic() - self.started >= self.max_time:
                    break

    def _strategy(self, number: int, search: _core.Search, steps: int | None) -> Strategy:
        model, slots, options = self.model, self.slots, self.options
        if self.lookup or self.assistant is not None:
            proposer: Proposer
            if self.assistant is not None:
                proposer = Assistant(self.assistant, self.drafted or DRAFTED, slots)
            else:
                proposer = Lookup(self.lookup or 0, self.ngram or 2)
            sampled = options.get("do_sample", False)
            return Speculative(model, self.ids[number], search, slots, proposer, sampled, self.in_8bit)
        if self.alpha is not None:
            chosen = (self.alpha, self.candidates)
            return Contrastive(model, self.ids, search, slots, *chosen, self.recorder, self.in_8bit)
        rows = len(self.ids) * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        hooked = any(f is not None for f in (self.allowed, self.processor, self.ends))
        return Lockstep(model, self.ids, search, slots, rows, self.recorder, steps, hooked, self.in_8bit)

    def finish(self) -> list[tuple[int, Any]]:
        """The results, prompts in order, each with the number of its search."""
        return [(n, result) for n, search in enumerate(self.searches) for result in search.finish()]

    def prompt_of(self, number: int, result: Any) -> list[int]:
        """The ids of the prompt that a result of search ``number`` continues."""
        return self.ids[number if len(self.searches) > 1 else result["prompt"]]


def ending(
    model: Model,
    stop_strings: list[str],
    criterion: Callable[[list[int]], bool] | None,
    grammar: Grammar | None = None,
) -> Callable[[int, list[int]], bool]:
    """Whether a sequence, of which the first so many ids are its prompt, ends here."""
    tokenizer = model.require_tokenizer() if stop_strings else None
    longest = max(map(len, stop_strings), default=0)

    def ends(prompt: int, ids: list[int]) -> bool:
        if criterion is not None and criterion(ids):
            return True
        if grammar is not None and grammar.is_over(ids[prompt:]):
            return True
        if tokenizer is None:
            return False
        text = _end_of_text(tokenizer, ids, prompt, longest)
        return any(stop in text for stop in stop_strings)

    return ends


def _end_of_text(tokenizer: Tokenizer, ids: list[int], prompt: int, longest: int) -> str:
    """What the last of ``ids`` adds to the text and ``longest`` characters or more before it, or all that stands behind
    the prompt: as much as a string that the last token completes can cover, whatever the length of the text."""
    width = longest + 8
    while True:
        start = max(len(ids) - width, prompt)
        pieces = tokenizer.stream_decoder()
        # A few tokens before say how the first one is written.
        for i in ids[max(start - 4, 0) : start]:
            pieces.push(i)
        before = "".join(pieces.push(i) or "" for i in ids[start:-1])
        if start == prompt or len(before) >= longest:
            return before + (pieces.push(ids[-1]) or "") + (pieces.finish() or "")
        width *= 2


def _optional(name: str, value: Any, least: int, most: int = MOST) -> int | None:
    """A whole number, or None for none."""
    return None if value is None else whole("generate", name, value, least, most)


def _quantized(model: Model, kind: Any) -> bool:
    """Whether keys and values are to be kept in 8 bits."""
    if kind not in (None, "dynamic", "quantized"):
        raise InputError(f"[generate] cache_implementation must be 'dynamic' or 'quantized', got {kind!r}")
    if kind == "quantized" and (model.device != "cpu" or model.dtype != "float32"):
        raise InputError("[generate] cache_implementation 'quantized' is for models of float32 on the CPU")
    if kind is not None and model.family.objective == "plm":
        raise InputError("[generate] cache_implementation: permutation models have no cache")
    return bool(kind == "quantized")


def _stops(options: dict[str, Any]) -> tuple[list[str], float | None]:
    """Takes out what the search does not know: stop strings, and the time in seconds."""
    stops, seconds = options.pop("stop_strings", []), options.pop("max_time", None)
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"[generate] stop_strings must be non-empty strings, got {stops!r}")
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise InputError(f"[generate] max_time must be a number of seconds above 0, got {seconds!r}")
    return list(stops), seconds


def merged_options(model: Model, config: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a call, the model's own defaults first."""
    if model.family.objective not in ("ar", "plm"):
        raise InputError(
            "[generate] this model does not continue text; one for masked tokens has fill_mask, mask_predict and gibbs"
        )
    stored = {k: v for k, v in model.generation_config.items() if k in STORED}
    eos = {"eos_token_id": model.family.config.eos_token_id}
    asked = {**(config or {}), **options}
    # A stored default that the caller's own choice makes meaningless is not the caller's mistake.
    if not asked.get("do_sample", stored.get("do_sample", False)):
        stored = {k: v for k, v in stored.items() if k not in SAMPLING}
    if asked.get("num_beams", stored.get("num_beams", 1)) == 1:
        stored = {k: v for k, v in stored.items() if k not in BEAMS}
    return {k: v for k, v in {**eos, **stored, **asked}.items() if v is not None}


def _prompt_ids(model: Model, prompts: Any, mask: npt.ArrayLike | None) -> tuple[list[list[int]], list[int]]:
    """The ids of each prompt, and how many padding tokens stood among them."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, np.ndarray):
        keep = np.ones(prompts.shape, bool) if mask is None else np.asarray(mask) != 0
        if prompts.ndim != 2 or keep.shape != prompts.shape:
            raise InputError(
                f"[generate] prompts and attention_mask must be arrays [B, T], got {list(prompts.shape)}"
            )
        ids = [row[k].tolist() for row, k in zip(prompts, keep, strict=True)]
        return ids, (~keep).sum(1).tolist()
    prompts = list(prompts)
    if prompts and all(isinstance(p, (int, np.integer)) for p in prompts):
        return [token_ids("generate", prompts)], [0]
    ids = []
    # What XLNet's template adds stands at the end.
    framed = model.family.objective == "ar"
    for i, prompt in enumerate(prompts):
        found = (
            model.require_tokenizer().encode(prompt, add_special_tokens=framed).ids
            if isinstance(prompt, str)
            else token_ids("generate", prompt)
        )
        if not found and model.family.config.bos_token_id is not None:
            found = [model.family.config.bos_token_id]
        if not found:
            raise InputError(f"[generate] prompt {i} is empty; give at least one token to continue")
        ids.append(found)
    if not ids:
        raise InputError("[generate] there is no prompt")
    return ids, [0] * len(ids)
