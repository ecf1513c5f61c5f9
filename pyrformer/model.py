"""A model with weights: what :func:`pyrformer.load` gives and training leaves.

Letters: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, programs
from pyrformer.compile import Array, Compiled, Traced
from pyrformer.errors import InputError, StateError
from pyrformer.models import build
from pyrformer.models.base import Family
from pyrformer.programs import SCALES, Sizes

if TYPE_CHECKING:
    from pyrformer.generate import Generation
    from pyrformer.tokenizers import Tokenizer

IGNORE = -100
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Output:
    """What a call of a model gives.

    Attributes:
        logits: of tokens ``[B, T, V]``; of classes ``[B, N]`` where whole sequences are classified; None for a model
            without a head.
        hidden: the last hidden state ``[B, T, C]``.
        loss: mean cross-entropy over the labels in nats; None without labels.
        seq_relationship_logits: BERT's for pre-training, ``[B, 2]``: does the second text follow the first?
        hidden_states: with ``output_hidden_states``, embeddings and each layer's result, ``[B, T, C]`` each.
    """

    logits: Array | None
    hidden: Array
    loss: float | None = None
    seq_relationship_logits: Array | None = None
    hidden_states: list[Array] | None = None


@dataclass(frozen=True)
class FillMask:
    """One proposal for a masked token.

    Attributes:
        score: its probability.
        token: id of the token.
        token_str: its text.
        sequence: the text with the proposal in place of the mask.
    """

    score: float
    token: int
    token_str: str
    sequence: str


@dataclass(eq=False)
class Batch:
    """A batch made ready for the programs: its sizes, its arrays by input name, and how many tokens and how many
    sequences have labels."""

    sizes: Sizes
    arrays: dict[str, Ints]
    labels: int = 0
    sentence_labels: int = 0

    @property
    def scales(self) -> dict[str, float]:
        """The inputs that make means of the summed losses."""
        counts = {"loss_scale": self.labels, "sentence_scale": self.sentence_labels}
        return {name: 1.0 / count for name, count in counts.items() if count}

    def mean(self, out: dict[str, Array]) -> float:
        """The loss of a run's outputs: the mean over tokens plus the mean over sequences."""
        scales = self.scales
        return sum(float(out[name]) * scales.get(scale, 0.0) for name, scale in SCALES.items() if name in out)


@dataclass(eq=False)
class Model:
    """A family with its weights, its tokenizer and its compiled programs.

    Attributes:
        family: the model's Python, which programs are traced from.
        tokenizer: None where the folder has none.
        dtype: "float32" or "float64".
        threads: how many to use; None: ``PYRFORMER_NUM_THREADS``, or all the machine has.
    """

    family: Family
    tokenizer: Tokenizer | None = None
    dtype: str = "float32"
    threads: int | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    store: _core.Store = field(default_factory=_core.Store)
    _programs: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)
    _cache: tuple[int, int] | None = None
    #: One generation at a time writes to the cache.
    decoding: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, seed: int = 0, **options: Any) -> Model:
        """A freshly initialised model; each tensor's values depend on (seed, its number) only.

        Raises:
            ConfigError: the family is unknown or the configuration contradictory.
        """
        model = cls(build(config), **options)
        for index, (name, parameter) in enumerate(model.family.named_parameters()):
            values = parameter.init.values(parameter.shape, seed, index)
            model.store.set(name, np.ascontiguousarray(values, dtype=model.dtype))
        return model

    @property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        return self.family.config.to_dict()

    @property
    def parameter_count(self) -> int:
        """Number of trained values, tied ones once."""
        return sum(int(np.prod(p.shape)) for p in programs.trainable(self.family))

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by Hugging Face's names, tied ones under their first name."""
        return {name: self.store.get(name) for name, _ in self.family.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Array]) -> None:
        """Sets parameters from arrays by name.

        Raises:
            StateError: a name is unknown or missing, or a shape differs; nothing is changed then.
        """
        parameters = dict(self.family.named_parameters())
        unknown, missing = (
            sorted(tensors.keys() - parameters.keys()),
            sorted(parameters.keys() - tensors.keys()),
        )
        if unknown or missing:
            raise StateError(f"[model] unknown tensors: {unknown[:5]}; missing tensors: {missing[:5]}")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise StateError(
                    f"[model] {name} must be {list(parameter.shape)}, got {list(tensors[name].shape)}"
                )
        for name in parameters:
            self.store.set(name, np.ascontiguousarray(tensors[name], dtype=self.dtype))

    def save(self, folder: str | Path) -> None:
        """Writes Hugging Face's layout: ``config.json``, ``model.safetensors``, ``tokenizer.json``,
        ``generation_config.json``. Each file appears whole or not at all.

        Raises:
            FileError: the folder cannot be written.
        """
        from pyrformer.checkpoint import save

        save(self, folder)

    def program(self, key: tuple[Any, ...], trace: Callable[[], Traced]) -> Compiled:
        """The compiled program of this key, made on first use."""
        if key not in self._programs:
            self._programs[key] = trace().lower().compile(self.store, self.threads)
        return self._programs[key]

    def use_cache(self, shape: tuple[int, int]) -> None:
        """Makes (R, S) the shape of the decoding cache; programs and states of another shape are dropped."""
        if self._cache != shape:
            self._programs = {k: v for k, v in self._programs.items() if k[0] != "decode"}
            for name, _, _ in self.store.types():
                if name.startswith("cache."):
                    self.store.remove(name)
            self._cache = shape

    def batch(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        next_sentence_label: npt.ArrayLike | None = None,
    ) -> Batch:
        """Checks arrays ``[B, T]`` in Hugging Face's conventions and makes them ready for the programs.

        Raises:
            InputError: a shape differs, an id is out of range, or the input is longer than the model's positions.
        """
        ids = self._ints("input_ids", input_ids, None, self.family.config.vocab_size)
        b, t = ids.shape
        if t > self.family.max_positions and position_ids is None:
            raise InputError(
                f"[model] {t} tokens are more than the model's {self.family.max_positions} positions; "
                "truncate the input"
            )
        mask = None
        if attention_mask is not None:
            mask = (self._ints("attention_mask", attention_mask, ids.shape, None) != 0).astype(np.int32)
        given = None
        if position_ids is not None:
            given = self._ints("position_ids", position_ids, ids.shape, self.family.max_positions)
        positions = self.family.position_rows(ids, mask, given)
        arrays = {"input_ids": ids, "position_ids": positions}
        if self.family.uses_token_types:
            types = np.zeros_like(ids) if token_type_ids is None else token_type_ids
            arrays["token_type_ids"] = self._ints("token_type_ids", types, ids.shape, None)
        if mask is not None:
            if not mask.all():
                arrays["segments"] = mask
        elif given is not None and self.family.objective == "ar" and (np.diff(given, axis=1) != 1).any():
            # Positions that start again mark packed documents; they do not see each other.
            starts = np.diff(given, axis=1, prepend=given[:, :1] - 1) != 1
            arrays["segments"] = (np.cumsum(starts, axis=1) + 1).astype(np.int32)
        count = labelled = sentences = 0
        if self.family.objective == "sentence":
            labels, next_sentence_label = None, labels
        if next_sentence_label is not None:
            arrays["sentence_labels"] = self._sentence_labels(next_sentence_label, ids.shape[0])
            sentences = int((arrays["sentence_labels"] >= 0).sum())
        if labels is not None:
            wanted = self._labels(labels, ids.shape)
            if self.family.objective == "ar":
                shifted = np.full_like(wanted, IGNORE)
                shifted[:, :-1] = wanted[:, 1:]
                arrays["labels"], count = shifted, int((shifted >= 0).sum())
            else:
                at = np.flatnonzero(wanted >= 0).astype(np.int32)
                count = len(at)
                labelled = max(8, -(-count // 8) * 8)
                arrays["positions"] = np.pad(at, (0, labelled - count))
                arrays["labels"] = np.pad(
                    wanted.reshape(-1)[at], (0, labelled - count), constant_values=IGNORE
                )
        sizes = Sizes(b, t, labelled, "segments" in arrays, sentences="sentence_labels" in arrays)
        return Batch(sizes, arrays, count, sentences)

    def _ints(
        self, name: str, value: npt.ArrayLike, shape: tuple[int, ...] | None, below: int | None
    ) -> Ints:
        array = np.asarray(value)
        if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            kind = f"{array.dtype}{list(array.shape)}"
            raise InputError(f"[model] {name} must be a non-empty integer array [B, T], got {kind}")
        if shape is not None and array.shape != shape:
            raise InputError(f"[model] {name} must be {list(shape)} like input_ids, got {list(array.shape)}")
        if below is not None and (array.min() < 0 or array.max() >= below):
            bad = array.min() if array.min() < 0 else array.max()
            raise InputError(f"[model] {name} must be in 0..{below - 1}, got {bad}")
        return array.astype(np.int32)

    def _sentence_labels(self, value: npt.ArrayLike, batch: int) -> Ints:
        labels = np.asarray(value)
        classes = self.family.config.num_labels if self.family.objective == "sentence" else 2
        if labels.shape != (batch,) or not np.issubdtype(labels.dtype, np.integer):
            kind = f"{labels.dtype}{list(labels.shape)}"
            raise InputError(f"[model] labels of sequences must be an integer array [{batch}], got {kind}")
        if ((labels < 0) & (labels != IGNORE)).any() or (labels >= classes).any():
            raise InputError(f"[model] labels of sequences must be in 0..{classes - 1}, or {IGNORE}")
        return labels.astype(np.int32)

    def _labels(self, value: npt.ArrayLike, shape: tuple[int, ...]) -> Ints:
        labels = self._ints("labels", value, shape, None)
        if self.family.objective == "none":
            raise InputError("[model] this model has no head to learn from labels")
        tokens = self.family.objective in ("ar", "mlm")
        vocab = self.family.config.vocab_size if tokens else self.family.config.num_labels
        if ((labels < 0) & (labels != IGNORE)).any() or (labels >= vocab).any():
            raise InputError(f"[model] labels must be in 0..{vocab - 1}, or {IGNORE} to be ignored")
        return labels

    def __call__(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        next_sentence_label: npt.ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Output:
        """Logits, hidden states and, with labels, the mean loss, for integer arrays ``[B, T]``.

        Labels follow Hugging Face: −100 is ignored, autoregressive models shift inside; a model that classifies whole
        sequences takes ``labels [B]``, BERT for pre-training ``next_sentence_label [B]`` as well. Without
        ``attention_mask``, positions that restart mark packed documents.

        Raises:
            InputError: an array does not fit.
        """
        batch = self.batch(
            input_ids, attention_mask, token_type_ids, position_ids, labels, next_sentence_label
        )
        labelled = bool(batch.scales)
        make = partial(
            programs.forward,
            self.family,
            batch.sizes,
            self.dtype,
            all_hidden=output_hidden_states,
            loss=labelled,
        )
        out = self.program(("forward", batch.sizes, output_hidden_states, labelled), make)(**batch.arrays)
        states = [out[f"hidden.{i}"] for i in range(len(out)) if f"hidden.{i}" in out]
        loss = batch.mean(out) if labelled else None
        if self.family.objective == "sentence":
            return Output(out["sentence_logits"], out["hidden"], loss, None, states or None)
        return Output(out.get("logits"), out["hidden"], loss, out.get("sentence_logits"), states or None)

    def loss_and_grads(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        next_sentence_label: npt.ArrayLike | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """The mean loss and its gradient by parameter name; a tied parameter has one gradient, under its first name.

        Raises:
            InputError: an array does not fit, or no label counts.
        """
        batch = self.batch(
            input_ids, attention_mask, token_type_ids, position_ids, labels, next_sentence_label
        )
        if not batch.scales:
            raise InputError("[model] every label is ignored: there is no loss to differentiate")
        make = partial(programs.gradients, self.family, batch.sizes, self.dtype)
        out = self.program(("gradients", batch.sizes), make)(**batch.arrays, **batch.scales)
        grads = {k.removeprefix("grad."): v for k, v in out.items() if k.startswith("grad.")}
        return batch.mean(out), grads

    def generate(self, prompts: Any, config: dict[str, Any] | None = None, **options: Any) -> Generation:
        """Continues prompts; see :func:`pyrformer.generate.generate`."""
        from pyrformer.generate import generate

        return generate(self, prompts, config, **options)

    def stream(self, prompt: Any, config: dict[str, Any] | None = None, **options: Any) -> Iterator[str]:
        """Continues one prompt, giving text as it comes; see :func:`pyrformer.generate.stream`."""
        from pyrformer.generate import stream

        return stream(self, prompt, config, **options)

    def fill_mask(self, text: str, top_k: int = 5) -> list[list[FillMask]]:
        """The ``top_k`` most probable tokens for each mask token of ``text``, most probable first.

        Raises:
            InputError: the model has no masked objective or no tokenizer, or the text has no mask token.
        """
        tokenizer = self.require_tokenizer()
        mask = tokenizer.mask_token_id
        if self.family.objective != "mlm" or mask is None:
            raise InputError("[fill_mask] this model was not trained on masked tokens; use generate instead")
        ids = np.array(tokenizer.encode(text).ids)
        masks = np.flatnonzero(ids == mask)
        if len(masks) == 0:
            raise InputError(f"[fill_mask] the text has no {tokenizer.id_to_token(mask)} token")
        if not 1 <= top_k <= self.family.config.vocab_size:
            raise InputError(f"[fill_mask] top_k must be in 1..{self.family.config.vocab_size}, got {top_k}")
        logits = np.asarray(self(ids[None]).logits)[0, masks].astype(np.float64)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        return [
            self._proposals(tokenizer, ids, int(at), p, top_k)
            for at, p in zip(masks, probabilities, strict=True)
        ]

    def _proposals(self, tokenizer: Tokenizer, ids: Array, at: int, p: Array, top_k: int) -> list[FillMask]:
        proposals = []
        for token in np.argsort(-p, kind="stable")[:top_k].tolist():
            filled: Sequence[int] = [*ids[:at].tolist(), token, *ids[at + 1 :].tolist()]
            sequence = tokenizer.decode(filled, skip_special_tokens=True)
            proposals.append(FillMask(float(p[token]), token, tokenizer.decode([token]), sequence))
        return proposals

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError("[model] the model's folder has no tokenizer.json, so it takes ids, not text")
        return self.tokenizer
