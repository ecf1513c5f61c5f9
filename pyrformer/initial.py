"""The model that a run begins with: freshly made, or opened from a folder; whole, frozen in part, or with LoRA."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pyrformer.checkpoint import load
from pyrformer.errors import ConfigError
from pyrformer.finetune import LoraConfig
from pyrformer.model import Model
from pyrformer.models import FAMILIES, build

if TYPE_CHECKING:
    from pyrformer.tokenizers import Tokenizer
    from pyrformer.trainer import TrainConfig

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
    learns = model.family.objective
    if learns != LEARNS.get(config.objective, config.objective):
        kind = model.family.config.model_type
        raise ConfigError(
            f"[train] a {kind} model learns {learns!r}, not {config.objective!r}; "
            f"set objective to {learns!r} or choose another model_type"
        )
    if config.objective == "mlm+nsp" and not model.family.config.architecture.endswith(PRETRAINING):
        raise ConfigError("[train] the objective 'mlm+nsp' needs the architecture BertForPreTraining")
    apply_changes(model, config)
    return model


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
    fields = dict(config.model)
    kind = fields.setdefault("model_type", DEFAULT_FAMILY[config.objective])
    if kind not in FAMILIES:
        raise ConfigError(
            f"[train] unknown model_type {kind!r}; known families: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind][0]
    known = {f.name for f in dataclasses.fields(family)} - {"extra", "architecture"} | {"model_type"}
    unknown = sorted(fields.keys() - known - {"architectures"})
    if unknown:
        raise ConfigError(f"[train] a {kind} model has no option {unknown[0]!r}")
    given = fields.setdefault("vocab_size", tokenizer.vocab_size)
    if isinstance(given, int) and given < tokenizer.vocab_size:
        raise ConfigError(
            f"[train] vocab_size ({given}) is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    fields = {**family.SMALL, **fields}
    if config.seq_len:
        # RoBERTa counts positions from the padding's id.
        before = (fields["pad_token_id"] or 0) + 1 if kind == "roberta" else 0
        fields.setdefault(family.SIZES["positions"], config.seq_len + before)
    fields |= _head(config.objective, family.ARCHITECTURES, labels)
    if config.objective == "prefix":
        fields["prefix_lm"] = True
    return Model.from_config(
        fields,
        seed=config.seed,
        tokenizer=tokenizer,
        threads=config.threads or None,
        device=config.device,
        bf16=config.bf16,
    )


def _opened(config: TrainConfig, tokenizer: Tokenizer, labels: list[str]) -> Model:
    """The model of ``init_from``, with the fields of ``model`` on top; a classifier gets a fresh head."""
    dtype = "bfloat16" if config.bf16 else None
    base = load(config.init_from, threads=config.threads or None, device=config.device, dtype=dtype)
    if base.family.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"[train] the tokenizer's {tokenizer.vocab_size} tokens are more than the "
            f"{base.family.config.vocab_size} of {config.init_from}"
        )
    fields = {**base.config, **config.model}
    fields.pop("prefix_lm", None)
    if config.objective == "prefix":
        fields["prefix_lm"] = True
    fields |= _head(config.objective, type(base.family.config).ARCHITECTURES, labels)
    model = Model(
        build(fields),
        tokenizer,
        threads=base.threads,
        generation_config=base.generation_config,
        device=base.device,
        bf16=base.bf16,
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


def _head(objective: str, architectures: tuple[str, ...], labels: list[str]) -> dict[str, Any]:
    """The fields that give a model the objective's head."""
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
