"""A model with weights: what :func:`pyrformer.load` gives and training leaves.

Letters: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from pyrformer import _core, programs
from pyrformer.batch import Batch, make_batch
from pyrformer.compile import Array, Compiled, Traced
from pyrformer.errors import InputError, ResourceError, StateError
from pyrformer.executors import AnyStore, open_store
from pyrformer.fields import checked, whole
from pyrformer.models import build
from pyrformer.models.base import Family
from pyrformer.origin import Origin, reopen

if TYPE_CHECKING:
    from pyrformer.classify import Classes
    from pyrformer.finetune import LoraConfig
    from pyrformer.generation.generate import Generation
    from pyrformer.generation.masked import Filling
    from pyrformer.score import Scores
    from pyrformer.tokenizers import Tokenizer


@dataclass(frozen=True)
class Output:
    """What a call of a model gives.

    Attributes:
        logits: of tokens ``[B, T, V]``; of classes ``[B, N]`` where whole sequences are classified; None for a model
            without a head.
        hidden: the last hidden state ``[B, T, C]``.
        loss: mean cross-entropy over the labels in nats; None where no label counts.
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


@dataclass(eq=False, repr=False)
class Model:
    """A family with its weights, its tokenizer and its compiled programs.

    Any number of threads may use one model at once; their results are those of one after the other. A forked child may
    use the model of its parent. Where it was opened from a path and not changed since, a model can be pickled: the
    other process opens the path again (:mod:`pyrformer.origin`).

    Attributes:
        family: the model's Python, which programs are traced from.
        tokenizer: None where the folder has none.
        dtype: "float32" or "float64".
        device: "cpu" or "cuda".
        precision: "float32", or "bfloat16" or "float16". On "cuda", activations, their gradients and the weights that
            products read are then of this type in memory, and tensor cores compute; weights that are trained, sums,
            losses and results are float32. On "cpu", which takes "bfloat16" only, what the forward pass leaves to the
            backward pass is kept in it, and all is computed in ``dtype``: losses are the same, gradients those of
            rounded activations.
        threads: how many to use; None: ``PYRFORMER_NUM_THREADS``, or all the machine has.
    """

    family: Family
    tokenizer: Tokenizer | None = None
    dtype: str = "float32"
    threads: int | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    #: How :meth:`embed` makes a text's vector, where the model's folder says it: "pooling" and "normalize".
    pooling: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    #: Whether the weights of products are kept in 8 bits.
    in_8bit: bool = False
    precision: str = "float32"
    #: States by name, on the device; made unless given.
    store: AnyStore = field(default_factory=_core.Store)
    #: Where it was opened, while it is as it was then.
    origin: Origin | None = None
    _programs: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)
    #: Shapes (R, S) of the decoding caches that no generation uses, and whether they are of 8 bits, by name; and how
    #: many caches were made.
    _caches: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    _made: int = 0
    #: Guards the programs and the caches.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        if self.threads is not None:
            self.threads = whole("model", "threads", self.threads, 1)
        if self.device != "cpu" and isinstance(self.store, _core.Store):
            self.store = open_store(self.device, precision=self.precision)
        self._settings = self._current_settings()
        _models.add(self)

    def __repr__(self) -> str:
        config = self.family.config
        layers, width = (getattr(config, config.SIZES[size], "?") for size in ("layers", "width"))
        where = f", {self.origin.path}" if self.origin else ""
        shown = self.dtype if self.device == "cpu" else self.precision
        return (
            f"Model({config.model_type}: {layers} layers of width {width}, {self.parameter_count:,} parameters, "
            f"{shown} on {self.device}{where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (self._require_origin(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        return self._require_origin().open()

    def _require_origin(self) -> Origin:
        if self.origin is None or self._settings != self._current_settings():
            raise StateError(
                "[model] a model that was made or changed in memory cannot be pickled or copied; save it, and open "
                "what was saved"
            )
        return self.origin

    def _current_settings(self) -> tuple[Any, ...]:
        """What users may set on a model besides its weights."""
        return id(self.tokenizer), deepcopy(self.generation_config), deepcopy(self.pooling)

    @classmethod
    @checked("model")
    def from_config(cls, config: dict[str, Any], *, seed: int = 0, **options: Any) -> Model:
        """A freshly initialised model; each tensor's values depend on (seed, its number) only.

        Raises:
            ConfigError: the family is unknown or the configuration contradictory.
        """
        model = cls(build(config), **options)
        model.initialise(seed)
        return model

    def initialise(self, seed: int) -> None:
        """Sets the parameters that the store does not hold as a fresh model has them.

        Raises:
            ResourceError: they are larger than this machine's memory.
        """
        held = {name for name, _, _ in self.store.types()}
        size = np.dtype(self.dtype).itemsize * sum(
            math.prod(p.shape) for name, p in self.family.named_parameters() if name not in held
        )
        if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise ResourceError(
                f"[model] the weights take {size / 1e9:,.0f} GB, more than this machine's memory; lower the sizes"
            )
        for index, (name, parameter) in enumerate(self.family.named_parameters()):
            if name not in held:
                values = parameter.init.values(parameter.shape, seed, index)
                self.store.set(name, np.ascontiguousarray(values, dtype=self.dtype))

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

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.model(self)

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
        self.origin = None
        for name in parameters:
            self.store.set(name, np.ascontiguousarray(tensors[name], dtype=self.dtype))

    def save(
        self,
        folder: str | Path,
        dtype: str | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Writes Hugging Face's layout: ``config.json``, ``model.safetensors``, ``tokenizer.json``,
        ``generation_config.json``; or, where the name ends in ``.gguf``, one file for llama.cpp. Each file appears
        whole or not at all.

        Args:
            dtype: of a folder's weights: "float32" (the default), "float16" or "bfloat16", rounded to nearest even; of
                a GGUF file: also "q8_0", and "float16" is the default.
            max_shard_size: weights beyond this many bytes ("500MB", "2GiB") go into several files, with an index.

        Warns:
            UserWarning: the model has what other programs that open such folders do not know of, such as positions of
                another kind than its family's.

        Raises:
            FileError: the folder cannot be written, or a number is too large for float16; the tensor is named.
            InputError: the dtype or the size, or, for GGUF, the family is not one that can be written.
        """
        if self.in_8bit:
            raise InputError(
                "[save] the weights are rounded to 8 bits; load the model without load_in_8bit to save it"
            )
        if str(folder).endswith(".gguf"):
            from pyrformer.gguf.save import save_gguf

            save_gguf(self, folder, dtype or "float16")
            return
        from pyrformer.checkpoint import save

        departure = self.family.config.departure
        if departure:
            warnings.warn(
                f"[save] {departure}: pyrformer opens {folder}, others compute something else from it",
                stacklevel=2,
            )
        save(self, folder, dtype=dtype or "float32", max_shard_size=max_shard_size)

    def quantise(self) -> None:
        """Keeps the weights of products in 8 bits from here on; see ``load_in_8bit`` of :func:`pyrformer.load`.

        Raises:
            InputError: the model is not of float32 on the CPU.
        """
        if not isinstance(self.store, _core.Store) or self.dtype != "float32":
            raise InputError("[model] weights of 8 bits are for models of float32 on the CPU")
        traced = programs.forward(self.family, programs.Sizes(1, 1), self.dtype)
        with self._lock:
            self.store.quantise(traced.lower(self.device).plan)
            self._programs.clear()
            self.in_8bit = True

    def program(
        self,
        key: tuple[Any, ...],
        trace: Callable[[], Traced],
        *,
        recompute: bool = False,
        memory: int = 0,
        **kept: bool,
    ) -> Compiled:
        """The compiled program of this key, made on first use; options as of :meth:`pyrformer.compile.Traced.lower` and
        (``kept``) of :meth:`pyrformer.compile.Lowered.compile`."""
        with self._lock:
            if key not in self._programs:
                traced = trace()
                if not traced.trace.updated.isdisjoint(name for name, _ in self.family.named_parameters()):
                    self.origin = None
                lowered = traced.lower(
                    self.device, precision=self.precision, recompute=recompute, memory=memory
                )
                self._programs[key] = lowered.compile(self.store, self.threads, **kept)
            return self._programs[key]

    def family_changed(self) -> None:
        """Drops what was made of the family as it was: compiled programs, and the link to its folder."""
        with self._lock:
            self._programs.clear()
            self.origin = None

    def freeze(self, patterns: Sequence[str]) -> None:
        """Makes training leave parameters alone; see :func:`pyrformer.finetune.freeze`."""
        from pyrformer.finetune import freeze

        freeze(self, patterns)

    @checked("lora")
    def add_lora(self, config: LoraConfig | None = None, *, seed: int = 0, **options: Any) -> None:
        """Trains low-rank changes in place of the weights; ``options`` are the fields of
        :class:`pyrformer.finetune.LoraConfig`. Saving merges them."""
        from pyrformer.finetune import LoraConfig, add_lora

        add_lora(self, config or LoraConfig(**options), seed)

    def take_cache(self, rows: int, slots: int, in_8bit: bool = False) -> str:
        """The name of a decoding cache of shape (R, S), for one generation alone until :meth:`give_cache`. A cache that
        was used before serves again; unused ones of other kinds are dropped, with their programs."""
        kind = (rows, slots, in_8bit)
        with self._lock:
            for name, other in list(self._caches.items()):
                if other != kind:
                    self._drop_cache(name)
            if not self._caches:
                self._made += 1
                self._caches[f"cache{self._made}"] = kind
            name, _ = self._caches.popitem()
        return name

    def give_cache(self, name: str, rows: int, slots: int, in_8bit: bool = False) -> None:
        """Lets other generations use a cache."""
        with self._lock:
            self._caches[name] = (rows, slots, in_8bit)

    def _drop_cache(self, name: str) -> None:
        del self._caches[name]
        self._programs = {k: v for k, v in self._programs.items() if k[:2] != ("decode", name)}
        for state, _, _ in self.store.types():
            if state.startswith(f"{name}."):
                self.store.remove(state)

    def batch(self, input_ids: npt.ArrayLike, *arrays: Any, **more: Any) -> Batch:
        """Arrays ``[B, T]`` made ready for the programs; see :func:`pyrformer.batch.make_batch`."""
        return make_batch(self.family, input_ids, *arrays, **more)

    @checked("model")
    def __call__(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
        **more: Any,
    ) -> Output:
        """Logits, hidden states and, with labels, the mean loss, for arrays in Hugging Face's conventions.

        :func:`pyrformer.batch.make_batch` describes the arguments, and ``more``: position_ids, next_sentence_label,
        perm_mask, target_mapping, mems.

        Raises:
            InputError: an array does not fit.
        """
        batch = self.batch(input_ids, attention_mask, token_type_ids, labels, **more)
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

    @checked("model")
    def loss_and_grads(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        **more: Any,
    ) -> tuple[float, dict[str, Array]]:
        """The mean loss and its gradient by parameter name; a tied parameter has one gradient, under its first name.
        Arguments as in a call.

        Raises:
            InputError: an array does not fit, or no label counts.
        """
        batch = self.batch(input_ids, attention_mask, token_type_ids, labels, **more)
        if not batch.scales:
            raise InputError("[model] every label is ignored: there is no loss to differentiate")
        make = partial(programs.gradients, self.family, batch.sizes, self.dtype)
        out = self.program(("gradients", batch.sizes), make)(**batch.arrays, **batch.scales)
        grads = {k.removeprefix("grad."): v for k, v in out.items() if k.startswith("grad.")}
        return batch.mean(out), grads

    def generate(self, prompts: Any, config: Any = None, **options: Any) -> Generation:
        """Continues prompts; see :func:`pyrformer.generation.generate.generate`."""
        from pyrformer.generation.generate import generate

        return generate(self, prompts, config, **options)

    def stream(self, prompt: Any, config: Any = None, **options: Any) -> Iterator[str]:
        """Continues one prompt, giving text as it comes; see :func:`pyrformer.generation.generate.stream`."""
        from pyrformer.generation.generate import stream

        return stream(self, prompt, config, **options)

    def astream(self, prompt: Any, config: Any = None, **options: Any) -> AsyncIterator[str]:
        """:meth:`stream` for ``async for``."""
        from pyrformer.generation.generate import astream

        return astream(self, prompt, config, **options)

    def score(self, texts: Iterable[str | Sequence[int]], **options: Any) -> Scores:
        """Log-probabilities of texts; see :func:`pyrformer.score.score`."""
        from pyrformer.score import score

        return score(self, texts, **options)

    def embed(self, texts: Iterable[str | Sequence[int]], **options: Any) -> npt.NDArray[np.float32]:
        """Vectors of texts, float32 ``[N, C]``; see :func:`pyrformer.score.embed`."""
        from pyrformer.score import embed

        return embed(self, texts, **options)

    def attention(self, text: str | Sequence[int], **options: Any) -> list[npt.NDArray[np.float32]]:
        """The attention weights of each layer for a text, ``[H, T, T]``; see :func:`pyrformer.look.attention`."""
        from pyrformer.look import attention

        return attention(self, text, **options)

    def explain(self, text: str, *, max_tokens: int = 64) -> str:
        """An HTML page that follows a text through the model; see :func:`pyrformer.explain.explain`."""
        from pyrformer.explain import explain

        return explain(self, text, max_tokens=max_tokens)

    def classify(self, texts: Iterable[str | Sequence[int]]) -> Classes:
        """Classes of texts or of their tokens; see :func:`pyrformer.classify.classify`."""
        from pyrformer.classify import classify

        return classify(self, texts)

    def mask_predict(self, texts: str | Iterable[str | Sequence[int]], **options: Any) -> Filling:
        """Fills all masks of texts by repeated prediction; see :func:`pyrformer.generation.masked.mask_predict`."""
        from pyrformer.generation.masked import mask_predict

        return mask_predict(self, texts, **options)

    def gibbs(self, texts: str | Iterable[str | Sequence[int]], **options: Any) -> Filling:
        """Draws all masks of texts by Gibbs sampling; see :func:`pyrformer.generation.masked.gibbs`."""
        from pyrformer.generation.masked import gibbs

        return gibbs(self, texts, **options)

    @overload
    def fill_mask(self, text: str, top_k: int = 5) -> list[list[FillMask]]: ...  # type: ignore[overload-overlap]
    @overload
    def fill_mask(self, text: Iterable[str], top_k: int = 5) -> list[list[list[FillMask]]]: ...
    def fill_mask(self, text: Any, top_k: int = 5) -> Any:
        """The ``top_k`` most probable tokens for each mask of a text, most probable first; a list of several texts
        gives a list.

        Raises:
            InputError: the model has no masked objective or no tokenizer, or a text has no mask token.
        """
        from pyrformer.generation.masked import fill_mask

        found = fill_mask(self, [text] if isinstance(text, str) else text, top_k)
        return found[0] if isinstance(text, str) else found

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError("[model] the model's folder has no tokenizer.json, so it takes ids, not text")
        return self.tokenizer


#: All models, whose locks a forked child makes anew: the threads that held them are its parent's.
_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    for model in _models:
        model._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
