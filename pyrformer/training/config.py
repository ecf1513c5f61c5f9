"""All options of a run, checked."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pyrformer.checkpoint import parsed_size
from pyrformer.errors import ConfigError
from pyrformer.executors import DEVICES
from pyrformer.fields import check_types
from pyrformer.optimizers import Optimizer, make_optimizer
from pyrformer.schedules import SCHEDULES, check_settings, learning_rate

OBJECTIVES = ("ar", "prefix", "mlm", "mlm+nsp", "plm", "sentence", "tokens")
ON_NONFINITE = ("stop", "skip", "rollback")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run.

    Attributes:
        files: paths to learn from, as :class:`pyrformer.Documents` takes them, or one prepared folder. Text is
            tokenized beside the training, into ``OUT/tokens``.
        out: the run folder.
        valid: files to measure on; without any, ``valid_fraction`` of the text is held out: of every shard (a million
            tokens) so many documents, or the end. A tokenizer that is learned here sees all text.
        objective: "ar" (next token), "prefix" (the same behind a prefix that is read both ways), "mlm" (masked tokens),
            "mlm+nsp" (and whether one text follows another; see :mod:`pyrformer.data.pairs`), "plm" (tokens in a random
            order), "sentence" (a class of each text, from field ``label_column``) or "tokens" (a class of each word;
            see :func:`pyrformer.data.tagging.read_tagged`).
        model: fields of ``config.json``; sizes of the vocabulary and special ids come from the tokenizer.
        init_from: a model folder to begin with; its tokenizer is used unless another is given.
        freeze: names of parameters that stay as they are; see :func:`pyrformer.finetune.freeze`.
        lora: fields of :class:`pyrformer.finetune.LoraConfig`, to train low-rank changes in place of the weights.
        tokenizer: {"path": …} of one to use, or {"kind", "vocab_size", "preset", "min_frequency"} of one to train.
        seq_len: tokens in a row, at most; 0: as many as the model has positions.
        batch_size: rows in a batch.
        gradient_accumulation_steps: batches per update; gradients are averaged over all their labels.
        max_steps: updates.
        learning_rate, min_learning_rate, warmup_steps, lr_scheduler_type, lr_scheduler_kwargs: see
            :func:`pyrformer.schedules.learning_rate`.
        optim: "adamw", "sgd", "rmsprop", "adagrad", "lion", "adafactor" or "muon"; see :mod:`pyrformer.optimizers`.
        optim_args: the optimizer's own arguments, such as ``stochastic_rounding`` of AdamW; see
            :mod:`pyrformer.optimizers`.
        adam_beta1, adam_beta2, adam_epsilon: of AdamW (also in Muon); Lion takes the betas.
        weight_decay, weight_decay_groups, max_grad_norm, ema_decay: see :class:`pyrformer.optimizers.Optimizer`. With a
            running average, that is what is evaluated and what the run folder's model holds.
        early_stopping_patience: stop after so many evaluations without a lower held-out loss; 0: never.
        early_stopping_threshold: how much lower it must be.
        label_smoothing_factor, z_loss: see :class:`pyrformer.programs.LossOptions`; the logged loss includes them.
        mlm_probability, mask_replace_prob, random_replace_prob, whole_word_mask, span_p, span_max_length: see
            :class:`pyrformer.data.batches.Masking`.
        plm_probability, max_span_length: see :class:`pyrformer.data.batches.Batches`.
        cross_documents: for "ar", let tokens see the document before their own.
        column, errors, clean: see :class:`pyrformer.Documents`.
        eval_every, log_every: in updates; 0: only at the end.
        sample_every: updates between texts by the model; 0: only at the end.
        sample_prompts: what it continues then (64 tokens, drawn with ``seed``) or, for masked models, whose masks it
            fills; ``samples.jsonl`` holds the texts.
        tensorboard: write event files for TensorBoard into ``OUT/tensorboard``.
        save_every: updates (500, "500") or time ("30s", "10m", "2h") between checkpoints; 0: only at the end.
        save_total_limit: how many checkpoints are kept, the newest ones; 0: all.
        load_best_model_at_end: save whenever the held-out loss is the lowest so far, keep that checkpoint, and leave
            its weights in the run folder at the end.
        max_time: stop after this time ("8h"), saved and resumable; "": none.
        on_nonfinite: at a loss or gradient that is no finite number, "stop"; or leave out that update, which has
            changed nothing yet ("skip"); or go back to the last checkpoint and leave it out ("rollback").
        recompute: compute what the layers made again in the backward pass instead of keeping it; the bits are the same.
        memory: as ``recompute``, for the fewest layers with which weights, optimizer and an update's work memory stay
            within a size such as "2GB"; "": no bound.
        seed: of weights, order, masks and dropout.
        device: "cpu" or "cuda".
        bf16: on "cuda", keep activations, their gradients and the weights that products read in bfloat16, and compute
            on tensor cores; weights as the optimizer has them, unless it rounds them by chance, its states, sums and
            losses are float32. On "cpu", keep in bfloat16 what the forward pass leaves to the backward pass, and
            compute in float32: less memory, the same losses from the same weights, gradients of rounded activations.
        fp16: on "cuda", as ``bf16``, but in float16, which older GPUs have tensor cores for. Losses are scaled, for
            small gradients are zero in it; see :class:`pyrformer.training.loss_scale.LossScale`.
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
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    optim: str = "adamw"
    optim_args: dict[str, Any] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    weight_decay_groups: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0
    label_smoothing_factor: float = 0.0
    z_loss: float = 0.0
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word_mask: bool = False
    span_p: float = 0.0
    span_max_length: int = 10
    plm_probability: float = 1 / 6
    max_span_length: int = 5
    cross_documents: bool = False
    column: str = "text"
    label_column: str = "label"
    errors: str = "strict"
    clean: list[str] = field(default_factory=list)
    eval_every: int = 250
    log_every: int = 10
    sample_every: int = 0
    sample_prompts: list[str] = field(default_factory=list)
    tensorboard: bool = False
    save_every: int | str = 500
    save_total_limit: int = 2
    load_best_model_at_end: bool = False
    max_time: str = ""
    on_nonfinite: str = "stop"
    recompute: bool = False
    memory: str = ""
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    fp16: bool = False
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
            f"lr_scheduler_type must be one of {tuple(SCHEDULES)}, got {self.lr_scheduler_type!r}",
        )
        require(
            0 < self.plm_probability <= 1, f"plm_probability must be in (0, 1], got {self.plm_probability}"
        )
        require(
            not self.span_p or self.objective in ("mlm", "mlm+nsp"),
            f"span_p is for objectives 'mlm' and 'mlm+nsp', got objective {self.objective!r}",
        )
        for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "max_span_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "seq_len",
            "warmup_steps",
            "eval_every",
            "log_every",
            "sample_every",
            "save_total_limit",
            "early_stopping_patience",
            "seed",
            "threads",
        ):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "min_learning_rate",
            "weight_decay",
            "max_grad_norm",
            "z_loss",
            "early_stopping_threshold",
        ):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} must be a number of 0 or more, got {value}")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        require(
            0 < self.valid_fraction < 1, f"valid_fraction must be between 0 and 1, got {self.valid_fraction}"
        )
        require(self.device in DEVICES, f"device must be one of {DEVICES}, got {self.device!r}")
        require(
            self.on_nonfinite in ON_NONFINITE,
            f"on_nonfinite must be one of {ON_NONFINITE}, got {self.on_nonfinite!r}",
        )
        for pattern, decay in self.weight_decay_groups.items():
            number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
            require(
                number and 0 <= decay < math.inf,
                f"the weight decay of {pattern!r} must be a number of 0 or more, got {decay!r}",
            )
        require(
            self.early_stopping_patience == 0 or self.eval_every > 0,
            "early_stopping_patience counts evaluations; set eval_every",
        )
        require(not self.sample_every or bool(self.sample_prompts), "sample_every needs sample_prompts")
        self.optimizer()
        check_settings(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        steps_or_seconds(self.save_every)
        if self.max_time:
            seconds(self.max_time)
        if self.memory:
            parsed_size(self.memory, "[train] memory")
        require(not (self.overwrite and self.resume), "overwrite and resume exclude each other")
        require(not (self.bf16 and self.fp16), "bf16 and fp16 exclude each other")
        require(not self.fp16 or self.device != "cpu", "fp16 is for device 'cuda'; on 'cpu' give bf16")

    @property
    def precision(self) -> str:
        """What activations are kept in: :attr:`pyrformer.model.Model.precision`."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    def optimizer(self) -> Optimizer:
        """The optimizer that ``optim`` names."""
        return make_optimizer(
            self.optim,
            self.optim_args,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            weight_decay_groups=self.weight_decay_groups,
            max_grad_norm=self.max_grad_norm,
            ema_decay=self.ema_decay,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return learning_rate(
            step,
            kind=self.lr_scheduler_type,
            peak=self.learning_rate,
            floor=min(self.min_learning_rate, self.learning_rate),
            warmup_steps=self.warmup_steps,
            total_steps=self.max_steps,
            settings=self.lr_scheduler_kwargs,
        )

    def comparable(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE}


#: Options that change neither the numbers of a step nor the data.
_FREE = (
    *("out", "overwrite", "resume", "device", "threads", "max_steps", "max_time", "eval_every", "log_every"),
    *("save_every", "save_total_limit", "load_best_model_at_end", "on_nonfinite"),
    *("sample_every", "sample_prompts", "tensorboard"),
    *("early_stopping_patience", "early_stopping_threshold", "recompute", "memory"),
)


def seconds(text: str) -> float:
    """A time such as "90s", "10m", "2h" or "1d" in seconds.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"[train] a time is a number and s, m, h or d, as in 90s or 10m, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def steps_or_seconds(value: int | str) -> tuple[int, float]:
    """An interval in updates (500, "500") or in time ("10m"): (updates, 0.0) or (0, seconds).

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, int) or re.fullmatch(r"\d{1,18}", value.strip()):
        steps = int(value)
        if steps < 0:
            raise ConfigError(f"[train] save_every must not be negative, got {value}")
        return steps, 0.0
    return 0, seconds(value)
