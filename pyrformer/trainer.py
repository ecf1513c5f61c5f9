"""Training: from text files to a run folder in Hugging Face's layout.

A run folder holds ``config.json``, ``model.safetensors``, ``tokenizer.json``, ``generation_config.json`` (the model as
it stands), ``training.json`` (all options), ``metrics.jsonl`` (a line per log step) and ``checkpoint/`` (weights,
moments and step, to go on from). The batch of a step is a pure function of (seed, step), so going on gives the
bits that a straight run gives.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pyrformer import _core, programs
from pyrformer.batch import Batch
from pyrformer.checkpoint import read_json, write_json
from pyrformer.data import Batches, Masking, read_documents, tokenize
from pyrformer.errors import ConfigError, FileError, InputError
from pyrformer.executors import DEVICES
from pyrformer.fields import check_types
from pyrformer.initial import apply_changes, initial_model
from pyrformer.model import Model
from pyrformer.programs import AdamW
from pyrformer.schedules import SCHEDULES, learning_rate
from pyrformer.supervised import Labelled, LabelledBatches, PermutationBatches, labelled, read_labelled
from pyrformer.tokenizers import Ragged, Tokenizer

OBJECTIVES = ("ar", "mlm", "plm", "sentence")

#: What happens, as ``on_event`` sees it: "stage", "start", "step", "eval", "save" or "end", and its numbers.
Event = Callable[[str, dict[str, Any]], None]

#: The tokenizer of an objective where none is configured.
DEFAULT_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ar": {"preset": "gpt2", "vocab_size": 4096},
    "mlm": {"preset": "bert-uncased", "vocab_size": 4096},
    "plm": {"preset": "gpt2", "vocab_size": 4096},
    "sentence": {"preset": "bert-uncased", "vocab_size": 4096},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run.

    Attributes:
        files: ``.txt`` or ``.jsonl`` files to learn from.
        out: the run folder.
        valid: files to measure on; without any, ``valid_fraction`` of the text is held out.
        objective: "ar" (next token), "mlm" (masked tokens), "plm" (tokens in a random order) or "sentence" (a class
            of each text, from field ``label_column`` of ``.jsonl`` files).
        model: fields of ``config.json``; sizes of the vocabulary and special ids come from the tokenizer.
        init_from: a model folder to begin with; its tokenizer is used unless another is given.
        freeze: names of parameters that stay as they are; see :func:`pyrformer.finetune.freeze`.
        lora: fields of :class:`pyrformer.finetune.LoraConfig`, to train low-rank changes in place of the weights.
        tokenizer: {"path": …} of one to use, or {"kind", "vocab_size", "preset", "min_frequency"} of one to train.
        seq_len: tokens in a row, at most; 0: as many as the model has positions.
        batch_size: rows in a batch.
        gradient_accumulation_steps: batches per update; gradients are averaged over all their labels.
        max_steps: updates.
        learning_rate, min_learning_rate, warmup_steps, lr_scheduler_type: see
            :func:`pyrformer.schedules.learning_rate`.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: of AdamW; decay applies to matrices only.
        max_grad_norm: bound on the global gradient norm; 0: none.
        label_smoothing_factor, z_loss: see :class:`pyrformer.programs.LossOptions`; the logged loss includes them.
        mlm_probability, whole_word_mask: see :class:`pyrformer.data.Masking`.
        plm_probability, max_span_length: see :class:`pyrformer.supervised.PermutationBatches`.
        cross_documents: for "ar", let tokens see the document before their own.
        column, errors, clean: see :func:`pyrformer.data.read_documents`.
        eval_every, log_every, save_every: in updates; 0: only at the end.
        seed: of weights, order, masks and dropout.
        device: "cpu" or "cuda".
        threads: 0: ``PYRFORMER_NUM_THREADS``, or all the machine has.
        overwrite: replace a run that is there.
        resume: go on with a run that is there.
    """

    files: list[str]
    out: str
    valid: list[str] = field(default_factory=list)
    valid_fraction: float = 0.05
    objective: str = "ar"
    model: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""
    freeze: list[str] = field(default_factory=list)
    lora: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_steps: int = 1000
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    lr_scheduler_type: str = "cosine"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    z_loss: float = 0.0
    mlm_probability: float = 0.15
    whole_word_mask: bool = False
    plm_probability: float = 1 / 6
    max_span_length: int = 5
    cross_documents: bool = False
    column: str = "text"
    label_column: str = "label"
    errors: str = "strict"
    clean: list[str] = field(default_factory=list)
    eval_every: int = 250
    log_every: int = 10
    save_every: int = 500
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(f"[train] {message}")

        check_types(self, "train")
        require(bool(self.files), "give at least one file to learn from")
        require(
            self.objective in OBJECTIVES, f"objective must be one of {OBJECTIVES}, got {self.objective!r}"
        )
        require(
            self.lr_scheduler_type in SCHEDULES,
            f"lr_scheduler_type must be one of {SCHEDULES}, got {self.lr_scheduler_type!r}",
        )
        require(
            0 < self.plm_probability <= 1, f"plm_probability must be in (0, 1], got {self.plm_probability}"
        )
        for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "max_span_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seq_len", "warmup_steps", "eval_every", "log_every", "save_every", "seed", "threads"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "max_grad_norm", "z_loss"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} must be a number of 0 or more, got {value}")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        require(
            0 < self.valid_fraction < 1, f"valid_fraction must be between 0 and 1, got {self.valid_fraction}"
        )
        require(self.device in DEVICES, f"device must be one of {DEVICES}, got {self.device!r}")
        require(not (self.overwrite and self.resume), "overwrite and resume exclude each other")

    def comparable(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        free = (
            "out",
            "overwrite",
            "resume",
            "device",
            "threads",
            "max_steps",
            "eval_every",
            "log_every",
            "save_every",
        )
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is; ``pyrformer.load(folder)`` opens it.
        model: the trained model.
        steps: updates made.
        train_loss: mean of the last logged losses, nats per label.
        valid_loss: loss over the whole held-out text, nats per label.
        seconds: time spent in updates and their data, evaluation and saving aside.
    """

    folder: Path
    model: Model
    steps: int
    train_loss: float
    valid_loss: float
    seconds: float


def train(config: TrainConfig, on_event: Event | None = None) -> Run:
    """Trains a model and writes its run folder.

    Args:
        config: all options.
        on_event: called with what happens, for progress displays.

    Raises:
        ConfigError, DataError, FileError, TokenizerError: something given is wrong; nothing is left behind then.
        KeyboardInterrupt: passed on after the state was saved.
    """
    return _Trainer(config, on_event or (lambda _kind, _numbers: None)).run()


@dataclass(frozen=True)
class _Documents:
    """Texts and, for "sentence", their labels."""

    texts: list[str]
    labels: list[str]

    def where(self, keep: Callable[[int], bool]) -> _Documents:
        """Those whose number is kept."""
        texts = [t for i, t in enumerate(self.texts) if keep(i)]
        return _Documents(texts, [x for i, x in enumerate(self.labels) if keep(i)])


class _Trainer:
    def __init__(self, config: TrainConfig, on_event: Event):
        self.config, self.on_event = config, on_event
        self.folder = Path(config.out)
        self.done = self._prepare_folder()
        self.on_event("stage", {"what": "reading"})
        train_docs, valid_docs = self._documents()
        self.labels = sorted(set(train_docs.labels))
        self.tokenizer = self._tokenizer(train_docs.texts, valid_docs.texts)
        self.model = self._model()
        self.seq_len = config.seq_len or self.model.family.max_positions
        if self.seq_len > self.model.family.max_positions:
            most = self.model.family.max_positions
            raise ConfigError(f"[train] seq_len ({self.seq_len}) is more than the model's {most} positions")
        self.on_event("stage", {"what": "tokenizing"})
        self.corpus, self.held_out = self._tokenized(train_docs), self._tokenized(valid_docs)
        self.batches = self._batches(self.corpus, shuffle=True)
        self.evaluation = self._batches(self.held_out, shuffle=False)
        self.optimizer = AdamW(
            config.adam_beta1,
            config.adam_beta2,
            config.adam_epsilon,
            config.weight_decay,
            config.max_grad_norm,
        )
        self.loss_options = programs.LossOptions(config.label_smoothing_factor, config.z_loss)
        self.loss = "sentence_loss" if config.objective == "sentence" else "loss"
        self.seconds = 0.0
        self.recent: list[float] = []

    # -- Preparation ------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> int:
        """Checks the run folder; gives the updates that it already holds."""
        if not self.folder.exists() or not any(self.folder.iterdir() if self.folder.is_dir() else [1]):
            if self.config.resume:
                raise FileError(f"[train] there is no run at {self.folder} to resume")
            return 0
        if not self.folder.is_dir():
            raise FileError(f"[train] {self.folder} is a file; choose another --out")
        if self.config.overwrite:
            if not (self.folder / "training.json").is_file():
                raise FileError(
                    f"[train] {self.folder} is not a run folder, so it is not overwritten; choose another one"
                )
            return 0
        if not self.config.resume:
            raise FileError(
                f"[train] {self.folder} exists; give --resume to go on with it or --overwrite to replace it"
            )
        state = read_json(self.folder / "checkpoint" / "trainer_state.json")
        before, now = state["config"], json.loads(json.dumps(self.config.comparable()))
        changed = sorted(k for k in now if before.get(k) != now[k])
        if changed:
            raise ConfigError(
                f"[train] {self.folder} was trained with another {', '.join(changed)}; use the same to resume"
            )
        return int(state["step"])

    def _documents(self) -> tuple[_Documents, _Documents]:
        """What to learn from and what to measure on."""
        c = self.config
        documents = self._read(c.files)
        if c.valid:
            return documents, self._read(c.valid)
        if len(documents.texts) > 1:
            # Every k-th document, so that ordered files are represented.
            every = max(2, round(1 / c.valid_fraction))
            return documents.where(lambda i: i % every > 0), documents.where(lambda i: i % every == 0)
        text = documents.texts[0]
        cut = int(len(text) * (1 - c.valid_fraction))
        return _Documents([text[:cut]], []), _Documents([text[cut:]], [])

    def _read(self, files: list[str]) -> _Documents:
        c = self.config
        if c.objective == "sentence":
            return _Documents(*read_labelled(files, column=c.column, label_column=c.label_column))
        return _Documents(read_documents(files, column=c.column, errors=c.errors, clean=c.clean), [])

    def _tokenized(self, documents: _Documents) -> Ragged | Labelled:
        c, texts = self.config, documents.texts
        if c.objective == "sentence":
            return labelled(self.tokenizer, texts, documents.labels, self.labels, self.seq_len)
        kind = "mlm" if c.objective == "mlm" else "ar"
        return tokenize(self.tokenizer, texts, objective=kind, threads=c.threads or None)

    def _tokenizer(self, documents: list[str], held_out: list[str]) -> Tokenizer:
        if self.done:
            return Tokenizer.load(self.folder)
        options = dict(self.config.tokenizer)
        if self.config.init_from and not options:
            return Tokenizer.load(self.config.init_from)
        if not {"path", "kind", "preset"} & options.keys():
            options = {**DEFAULT_TOKENIZERS[self.config.objective], **options}
        known = {"path", "kind", "vocab_size", "preset", "min_frequency", "special_tokens"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(
                f"[train] unknown tokenizer option {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        for name in ("vocab_size", "min_frequency"):
            value = options.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"[train] the tokenizer's {name} must be a whole number of 1 or more, got {value!r}"
                )
        for name in ("path", "kind", "preset"):
            if not isinstance(options.get(name, ""), str):
                raise ConfigError(f"[train] the tokenizer's {name} must be a string, got {options[name]!r}")
        if "path" in options:
            return Tokenizer.load(options["path"])
        self.on_event("stage", {"what": "training the tokenizer"})
        defaults = {"kind": "bpe", "vocab_size": 4096, "threads": self.config.threads or None}
        if "char" in (options.get("kind"), options.get("preset")):
            # An alphabet is not learned: characters of the held-out text alone would be unknown.
            documents = documents + held_out
        return Tokenizer.train(iter(documents), **{**defaults, **options})

    def _model(self) -> Model:
        if self.done:
            fields = read_json(self.folder / "config.json")
            model = Model.from_config(
                fields,
                seed=self.config.seed,
                tokenizer=self.tokenizer,
                threads=self.config.threads or None,
                device=self.config.device,
            )
            apply_changes(model, self.config)
            return model
        return initial_model(self.config, self.tokenizer, self.labels)

    def _batches(
        self, corpus: Ragged | Labelled, *, shuffle: bool
    ) -> Batches | PermutationBatches | LabelledBatches:
        c = self.config
        shared: dict[str, Any] = {
            "seq_len": self.seq_len,
            "batch_size": c.batch_size,
            "seed": c.seed,
            "shuffle": shuffle,
        }
        if isinstance(corpus, Labelled):
            return LabelledBatches(corpus, pad_token_id=self.tokenizer.pad_token_id, **shared)
        if c.objective == "plm":
            return PermutationBatches(
                corpus, **shared, plm_probability=c.plm_probability, max_span_length=c.max_span_length
            )
        return Batches(
            corpus,
            c.objective,
            **shared,
            tokenizer=self.tokenizer,
            cross_documents=c.cross_documents,
            masking=Masking(c.mlm_probability, whole_word=c.whole_word_mask),
        )

    # -- The loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        c = self.config
        if self.config.overwrite and self.folder.is_dir():
            shutil.rmtree(self.folder)
        if self.done:
            self._load_checkpoint()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(self.folder / "tokenizer.json")
            write_json(self.folder / "training.json", dataclasses.asdict(c))
            with self._open_metrics() as metrics:
                return self._loop(metrics)
        except OSError as e:
            self._discard()
            raise (
                e if isinstance(e, FileError) else FileError(f"[train] {self.folder}: {e.strerror or e}")
            ) from None
        except Exception:
            self._discard()
            raise

    def _discard(self) -> None:
        """Removes a run folder that holds no checkpoint to go on from."""
        if not (self.folder / "checkpoint").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open_metrics(self) -> TextIO:
        """``metrics.jsonl`` for appending; what an interrupted run logged after its checkpoint is cut off."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if self.done and path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.done]
        _core.write_file(path, "".join(f"{line}\n" for line in kept).encode())
        return path.open("a", encoding="utf-8")

    def _loop(self, metrics: TextIO) -> Run:
        c, step = self.config, self.done
        tokens = c.batch_size * self.seq_len * c.gradient_accumulation_steps
        self.on_event(
            "start",
            {
                "steps": c.max_steps,
                "done": step,
                "parameters": self.model.parameter_count,
                "train_tokens": len(self.corpus.ids),
                "valid_tokens": len(self.held_out.ids),
                "vocab_size": self.tokenizer.vocab_size,
                "tokens_per_step": tokens,
            },
        )
        try:
            while step < c.max_steps:
                # An interrupt waits for the end of the update, so that what is saved is the state after a whole step.
                with _interrupt_deferred():
                    numbers = {"step": step + 1, **self._step(step)}
                    step += 1
                    if c.log_every and step % c.log_every == 0:
                        _write(metrics, numbers)
                self.on_event("step", numbers)
                if c.eval_every and step % c.eval_every == 0 and step < c.max_steps:
                    self._evaluate(step, metrics)
                if c.save_every and step % c.save_every == 0 and step < c.max_steps:
                    self._save(step)
        except KeyboardInterrupt:
            self._save(step)
            raise
        valid_loss = self._evaluate(step, metrics)
        self._save(step)
        last = float(np.mean(self.recent[-100:])) if self.recent else math.nan
        run = Run(self.folder, self.model, step, last, valid_loss, self.seconds)
        self.on_event(
            "end", {"train_loss": last, "valid_loss": valid_loss, "seconds": self.seconds, "steps": step}
        )
        return run

    def _step(self, step: int) -> dict[str, float]:
        c, start = self.config, time.perf_counter()
        lr = learning_rate(
            step,
            kind=c.lr_scheduler_type,
            peak=c.learning_rate,
            floor=min(c.min_learning_rate, c.learning_rate),
            warmup_steps=c.warmup_steps,
            total_steps=c.max_steps,
        )
        parts = c.gradient_accumulation_steps
        batches = [self.batches.ready(step * parts + i) for i in range(parts)]
        labels = max(1, sum(b.labels + b.sentence_labels for b in batches))
        losses = [self._run(batch, step * parts + i, labels, step, lr) for i, batch in enumerate(batches)]
        out = losses[-1]
        if parts > 1:
            make = partial(programs.apply_step, self.model.family, self.optimizer)
            out = self.model.program(("apply_step",), make)(lr=lr, step=step + 1)
        loss = sum(float(o[self.loss]) for o in losses)
        loss, norm = loss / labels, float(out["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"[train] step {step + 1}: the loss is {loss} and the gradient norm {norm}; "
                "lower learning_rate, or raise warmup_steps"
            )
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.recent = [*self.recent[-99:], loss]
        tokens = sum(b.sizes.batch * b.sizes.tokens for b in batches)
        return {
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": norm,
            "tokens_per_s": tokens / seconds,
            "seconds": self.seconds,
        }

    def _run(self, batch: Batch, draw: int, labels: int, step: int, lr: float) -> dict[str, Any]:
        """One forward and backward pass, with the update where it is the step's only one."""
        inputs: dict[str, Any] = {**self._arrays(batch), programs.SCALES[self.loss]: 1.0 / labels}
        if self.config.gradient_accumulation_steps == 1:
            make = partial(
                programs.train_step, self.model.family, batch.sizes, self.optimizer, options=self.loss_options
            )
            program = self.model.program(("train_step", batch.sizes), make)
            inputs |= {"lr": lr, "step": step + 1}
        else:
            make = partial(
                programs.accumulate_step, self.model.family, batch.sizes, options=self.loss_options
            )
            program = self.model.program(("accumulate_step", batch.sizes), make)
        if any(name == "rng" for name, _, _ in program.plan.inputs):
            inputs["rng"] = np.array([self.config.seed, draw], np.uint64).view(np.int32)
        return program(**inputs)

    def _arrays(self, batch: Batch) -> dict[str, Any]:
        """A batch's arrays as the family takes them: positions from its first row on, types only where it has some."""
        arrays = dict(batch.arrays)
        arrays["position_ids"] = arrays["position_ids"] + np.int32(self.model.family.position_offset)
        if not self.model.family.uses_token_types:
            arrays.pop("token_type_ids", None)
        elif "token_type_ids" not in arrays:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
        return arrays

    def _evaluate(self, step: int, metrics: TextIO) -> float:
        total, labels = 0.0, 0
        for i in range(self.evaluation.batches_per_pass):
            batch = self.evaluation.ready(i)
            make = partial(programs.evaluate, self.model.family, batch.sizes)
            run = self.model.program(("evaluate", batch.sizes), make)
            total += float(run(**self._arrays(batch))[self.loss])
            labels += batch.labels + batch.sentence_labels
        loss = total / max(1, labels)
        numbers = {"step": step, "valid_loss": loss, "valid_labels": labels}
        _write(metrics, numbers)
        self.on_event("eval", numbers)
        return loss

    # -- Checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        self.model.save(self.folder)
        directory = _core.AtomicDir(self.folder / "checkpoint")
        path = Path(directory.path or "")
        names = [name for name, _, _ in self.model.store.types() if name.startswith("adamw.")]
        _core.write_safetensors(path / "model.safetensors", self.model.state_dict())
        _core.write_safetensors(path / "optimizer.safetensors", {n: self.model.store.get(n) for n in names})
        state = {"step": step, "seconds": self.seconds, "config": self.config.comparable()}
        write_json(path / "trainer_state.json", state)
        directory.commit(replace=True)
        self.on_event("save", {"step": step, "folder": str(self.folder)})

    def _load_checkpoint(self) -> None:
        path = self.folder / "checkpoint"
        weights = _core.SafeTensors(path / "model.safetensors")
        self.model.load_state_dict({name: weights.get(name) for name, _, _ in weights.tensors()})
        moments = _core.SafeTensors(path / "optimizer.safetensors")
        for name, _, _ in moments.tensors():
            self.model.store.set(name, moments.get(name))
        self.seconds = float(read_json(path / "trainer_state.json")["seconds"])


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block; a second one is not held back. Only the main thread gets signals,
    so elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def _write(metrics: TextIO, numbers: dict[str, Any]) -> None:
    metrics.write(json.dumps(numbers) + "\n")
    metrics.flush()
