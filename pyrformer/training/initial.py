"""The model that a run begins with: freshly made, or opened from a folder; whole, frozen in part, or with LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrformer.checkpoint import CONFIG, load, read_json
from pyrformer.errors import ConfigError
from pyrformer.finetune import LoraConfig
from pyrformer.model import Model
from pyrformer.models import Family, build, find

if TYPE_CHECKING:
    from pyrformer.tokenizers import Tokenizer
    from pyrformer.training.trainer import TrainConfig

#: The family of an objective where none is configured.
DEFAULT_FAMILY = {
    "ar": "gpt2",
    "prefix": "gpt2",
    "mlm": "bert",
    "mlm+nsp": "bert",
    "plm": "xlnet",
    "sentence": "bert",
    "tokens": "bert",
}
#: What a model learns (``Family.objective``), where the run's objective has a name of its own.
LEARNS = {"prefix": "ar", "mlm+nsp": "mlm"}
#: The ids of a model's configuration that its tokenizer gives.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
#: The head of "mlm+nsp", and its parameters beyond those of a head for masked tokens.
PRETRAINING, PAIR_HEAD = "ForPreTraining", (".pooler.", ".seq_relationship.")


def initial_model(config: TrainConfig, tokenizer: Tokenizer, labels: list[str]) -> Model:
    """The model of a new run.

    Args:
        tokenizer: gives the vocabulary's size and the special ids of a fresh model.
        labels: names of the classes, for "sentence" and "tokens".

    Raises:
        ConfigError, FileError, InputError: the options contradict each other, or the folder to begin with.
    """
    model = _opened(config, tokenizer, labels) if config.init_from else _fresh(config, tokenizer, labels)
    _check_objective(config, model.family)
    apply_changes(model, config)
    return model


def check_model(config: TrainConfig) -> None:
    """Finds what is wrong with the configured model, whatever the text will hold: reading that may take long.

    Raises:
        ConfigError, FileError: as :func:`initial_model`.
    """
    labels = ["0", "1"] if config.objective in ("sentence", "tokens") else []
    if not config.init_from:
        fields = _fields(config, 1, dict.fromkeys(SPECIAL, 0), labels)
    elif (path := Path(config.init_from)).is_dir():
        fields = _changed(read_json(path / CONFIG), config, labels)
    else:
        return  # one file, which is read as a whole
    _check_objective(config, build(fields))


def _check_objective(config: TrainConfig, family: Family) -> None:
    learns = family.objective
    if learns != LEARNS.get(config.objective, config.objective):
        raise ConfigError(
            f"[train] a {family.config.model_type} model learns {learns!r}, not {config.objective!r}; "
            f"set objective to {learns!r} or choose another model_type"
        )
    if config.objective == "mlm+nsp" and not family.config.architecture.endswith(PRETRAINING):
        raise ConfigError("[train] the objective 'mlm+nsp' needs the architecture BertForPreTraining")


def apply_changes(model: Model, config: TrainConfig) -> None:
    """Freezes parameters and adds low-rank changes as the options say.

    Raises:
        ConfigError, InputError: an option is unknown or matches nothing.
    """
    if config.freeze:
        model.freeze(config.freeze)
    if config.lora:
        known = {f.name for f in dataclasses.fields(LoraConfig)}
        unknown = sorted(config.lora.keys() - known)
        if unknown:
            raise ConfigError(
                f"[train] lora has no option {unknown[0]!r}; known ones: {', '.join(sorted(known))}"
            )
        model.add_lora(LoraConfig(**config.lora), seed=config.seed)


def _fresh(config: TrainConfig, tokenizer: Tokenizer, labels: list[str]) -> Model:
    ids = {name: getattr(tokenizer, name) for name in SPECIAL}
    return Model.from_config(
        _fields(config, tokenizer.vocab_size, ids, labels),
        seed=config.seed,
        tokenizer=tokenizer,
        threads=config.threads or None,
        device=config.device,
        precision=config.precision,
    )


def _fields(
    config: TrainConfig, vocab_size: int, ids: dict[str, int | None], labels: list[str]
) -> dict[str, Any]:
    """The configuration of a fresh model for a tokenizer of ``vocab_size`` tokens, ``ids`` those of :data:`SPECIAL`."""
    fields = dict(config.model)
    kind = fields.setdefault("model_type", DEFAULT_FAMILY[config.objective])
    family = find(kind, "train")[0]
    known = {f.name for f in dataclasses.fields(family)} - {"extra", "architecture"} | {"model_type"}
    unknown = sorted(fields.keys() - known - {"architectures"})
    if unknown:
        raise ConfigError(f"[train] a {kind} model has no option {unknown[0]!r}")
    given = fields.setdefault("vocab_size", vocab_size)
    if isinstance(given, int) and given < vocab_size:
        raise ConfigError(f"[train] vocab_size ({given}) is smaller than the tokenizer's {vocab_size}")
    fields = {**family.SMALL, **ids, **fields}
    if config.seq_len:
        # RoBERTa counts positions from the padding's id.
        before = (fields["pad_token_id"] or 0) + 1 if kind == "roberta" else 0
        fields.setdefault(family.SIZES["positions"], config.seq_len + before)
    return fields | _head(config.objective, family.ARCHITECTURES, labels)


def _opened(config: TrainConfig, tokenizer: Tokenizer, labels: list[str]) -> Model:
    """The model of ``init_from``, with the fields of ``model`` on top; a classifier gets a fresh head."""
    dtype = config.precision if config.device != "cpu" else None
    base = load(config.init_from, threads=config.threads or None, device=config.device, dtype=dtype)
    if base.family.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"[train] the tokenizer's {tokenizer.vocab_size} tokens are more than the "
            f"{base.family.config.vocab_size} of {config.init_from}"
        )
    model = Model(
        build(_changed(base.config, config, labels)),
        tokenizer,
        threads=base.threads,
        generation_config=base.generation_config,
        device=base.device,
        precision=config.precision,
        store=base.store,
    )
    parameters = dict(model.family.named_parameters())
    known = {name: tuple(shape) for name, _, shape in model.store.types()}
    for name, parameter in parameters.items():
        fresh = config.objective in ("sentence", "tokens") or (
            config.objective == "mlm+nsp" and any(part in f".{name}" for part in PAIR_HEAD)
        )
        if known.get(name) != parameter.shape and not fresh:
            raise ConfigError(f"[train] {config.init_from} has no tensor {name!r} of the configured shape")
    for name, shape in known.items():
        if name not in parameters or parameters[name].shape != shape:
            model.store.remove(name)
    model.initialise(config.seed)
    return model


def _changed(base: dict[str, Any], config: TrainConfig, labels: list[str]) -> dict[str, Any]:
    """The configuration of a model that begins as another, whose one is ``base``."""
    fields = {**base, **config.model}
    fields.pop("prefix_lm", None)
    family = find(fields.get("model_type"), "train")[0]
    return fields | _head(config.objective, family.ARCHITECTURES, labels)


def _head(objective: str, architectures: tuple[str, ...], labels: list[str]) -> dict[str, Any]:
    """The fields that give a model the objective's head, or its prefix."""
    if objective == "prefix":
        return {"prefix_lm": True}
    if objective == "mlm+nsp":
        return {"architectures": [a for a in architectures if a.endswith(PRETRAINING)][:1]}
    if not labels:
        return {}
    what = "tokens" if objective == "tokens" else "texts"
    kind = {"tokens": "ForTokenClassification", "texts": "ForSequenceClassification"}[what]
    found = [a for a in architectures if a.endswith(kind)]
    if not found:
        raise ConfigError(f"[train] this family has no head that classifies {what}")
    return {
        "architectures": found[:1],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
