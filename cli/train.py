"""``pyrformer train``: text files in, a run folder out, with a progress bar."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import pyrformer as pf
from pyrformer.errors import ConfigError
from pyrformer.models import FAMILIES
from pyrformer.training.initial import DEFAULT_FAMILY
from pyrformer.training.trainer import OBJECTIVES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a TOML file: ``[model]``, ``[tokenizer]``, and ``[train]`` for everything else."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"[config] cannot read {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"[config] {path}: {e}") from None
    unknown = sorted(raw.keys() - {"model", "tokenizer", "train"})
    if unknown:
        raise ConfigError(f"[config] {path}: unknown table {unknown[0]!r}; use [model], [tokenizer], [train]")
    for name, table in raw.items():
        if not isinstance(table, dict):
            raise ConfigError(f"[config] {path}: {name} must be a table, [{name}]")
    known = {f.name for f in dataclasses.fields(pf.TrainConfig)} - {"model", "tokenizer"}
    strange = sorted(raw.get("train", {}).keys() - known)
    if strange:
        raise ConfigError(f"[config] {path}: unknown option {strange[0]!r} in [train]")
    return {**raw.get("train", {}), "model": raw.get("model", {}), "tokenizer": raw.get("tokenizer", {})}


def tokenizer_options(tokenizer: str | None, vocab_size: int | None, base: dict[str, Any]) -> dict[str, Any]:
    """--tokenizer is a file or folder, a preset, or a kind."""
    options = dict(base)
    if tokenizer is not None:
        if tokenizer in ("bpe", "wordpiece", "char"):
            options = {"kind": tokenizer}
        elif Path(tokenizer).exists():
            options = {"path": tokenizer}
        else:
            options = {"preset": tokenizer}
    if vocab_size is not None:
        options["vocab_size"] = vocab_size
    return options


def model_options(given: dict[str, Any], base: dict[str, Any], objective: str) -> dict[str, Any]:
    """--family, --layers, --width, --heads under the family's own names."""
    asked_family = given.pop("family")
    family = asked_family or base.get("model_type") or DEFAULT_FAMILY.get(objective, "gpt2")
    positions = given.pop("position_embedding_type")
    sizes = {key: given.pop(key) for key in ("layers", "width", "heads")}
    asked = {key: value for key, value in sizes.items() if value is not None}
    if asked and family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"[config] unknown family {family!r}; known families: {known}")
    model = {**base, **{FAMILIES[family][0].SIZES[key]: value for key, value in asked.items()}}
    if positions is not None:
        model["position_embedding_type"] = positions
    if asked or model or asked_family:
        model["model_type"] = family
    return model


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, the value read as JSON where it is some."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.strip().rpartition("=")
        if not equals or not name:
            raise ConfigError(f"[config] give NAME=VALUE, got {text!r}")
        try:
            values[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            values[name] = value
    return values


def find(config: pf.TrainConfig, memory: str | None) -> None:
    """Prints the largest batch that fits, or a table of learning rates and losses with a suggestion."""
    from pyrformer.training.finders import find_batch_size, find_learning_rate

    if memory:
        rows, size = find_batch_size(config, memory)
        click.echo(f"--batch-size {rows}: {size / 1e6:,.0f} MB predicted of {memory}")
        return
    search = find_learning_rate(config)
    low, high = min(search.losses), max(search.losses)
    click.echo("learning rate  loss")
    for rate, loss in list(zip(search.rates, search.losses, strict=True))[::4]:
        bar = "█" * round(40 * (loss - low) / (high - low or 1.0))
        click.echo(f"{rate:13.2e}  {loss:7.4f} {bar}")
    click.echo(f"the loss falls fastest at --learning-rate {search.suggestion:.2g}")


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--out", type=click.Path(), help="The run folder to write.")
@click.option("--config", "config_file", type=click.Path(), help="A TOML file; flags override it.")
@click.option("--valid", multiple=True, type=click.Path(), help="A file to measure on; may be given again.")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    help="Next token, also behind a prefix; masked tokens, also with pairs of texts; permuted tokens; a class of each "
    "text, or of each word.  [default: ar]",
)
@click.option("--family", help="gpt2, llama, falcon, bert, xlnet, …  [default: by the objective]")
@click.option("--init-from", help="A model folder to begin with.")
@click.option("--freeze", multiple=True, help="Names of parameters to leave alone; may be given again.")
@click.option(
    "--lora",
    type=click.IntRange(1),
    metavar="RANK",
    help="Train changes of this rank beside all linear layers.",
)
@click.option("--layers", type=int, help="Number of layers.")
@click.option("--width", type=int, help="Width of the model.")
@click.option("--heads", type=int, help="Number of attention heads.")
@click.option(
    "--position-embedding-type", help="rope, learned, sinusoidal, alibi, none: what the family knows."
)
@click.option(
    "--tokenizer", help="A tokenizer.json, a preset (gpt2, bert-uncased, …) or a kind (bpe, wordpiece, char)."
)
@click.option("--vocab-size", type=int, help="Tokens to learn.")
@click.option("--seq-len", type=int, help="Tokens in a row.")
@click.option("--batch-size", type=int, help="Rows in a batch.")
@click.option("--gradient-accumulation-steps", type=int, help="Batches per update.")
@click.option("--max-steps", type=int, help="Updates.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--min-learning-rate", type=float, help="Learning rate at the end.")
@click.option("--warmup-steps", type=int, help="Updates until the peak.")
@click.option("--lr-scheduler-type", help="cosine, linear, warmup_stable_decay, …")
@click.option(
    "--optimizer", "optim", help="adamw, sgd, rmsprop, adagrad, lion, adafactor, muon.  [default: adamw]"
)
@click.option(
    "--optim-args",
    help="The optimizer's own arguments: momentum=0.9,nesterov=true (sgd), stochastic_rounding=true (adamw)",
)
@click.option("--weight-decay", type=float, help="On matrices only.")
@click.option(
    "--weight-decay-group",
    "weight_decay_groups",
    multiple=True,
    metavar="PATTERN=DECAY",
    help="Decay of parameters by name; may be given again.",
)
@click.option("--ema-decay", type=float, help="Keep, measure and save a running average of the weights.")
@click.option("--early-stopping-patience", type=int, help="Evaluations without a better loss until the end.")
@click.option("--early-stopping-threshold", type=float, help="How much better the loss must be.")
@click.option("--max-grad-norm", type=float, help="Bound on the gradient norm; 0: none.")
@click.option("--label-smoothing-factor", type=float, help="Share of the target spread over all tokens.")
@click.option("--z-loss", type=float, help="Factor of log² of the softmax's denominator, added to the loss.")
@click.option("--mlm-probability", type=float, help="Share of tokens that are masked.")
@click.option("--whole-word-mask/--no-whole-word-mask", default=None, help="Mask words, not tokens.")
@click.option("--mask-replace-prob", type=float, help="Share of masked tokens that become [MASK].")
@click.option("--random-replace-prob", type=float, help="Share that becomes a random token.")
@click.option("--span-p", type=float, help="Mask runs of words; p of their geometric lengths.")
@click.option("--span-max-length", type=int, help="The greatest length of such a run.")
@click.option("--column", help="Field or column that holds the text.  [default: text]")
@click.option("--label-column", help="Field that holds the class.  [default: label]")
@click.option(
    "--errors", type=click.Choice(["strict", "replace"]), help="What to do with bytes that are not UTF-8."
)
@click.option(
    "--clean",
    multiple=True,
    help="A cleaning step: nfc, nfkc, control, whitespace, html, duplicates, min-length=N; may be given again.",
)
@click.option("--eval-every", type=int, help="Updates between evaluations.")
@click.option("--sample-every", type=int, help="Updates between texts by the model.  [default: at the end]")
@click.option(
    "--sample-prompt",
    "sample_prompts",
    multiple=True,
    help="What it continues, or whose masks it fills; may be given again.",
)
@click.option(
    "--tensorboard/--no-tensorboard", default=None, help="Write event files for TensorBoard into the run."
)
@click.option("--save-every", help='Updates ("500") or time ("10m") between checkpoints.')
@click.option("--save-total-limit", type=int, help="Checkpoints to keep; 0: all.")
@click.option(
    "--load-best-model-at-end/--no-load-best-model-at-end",
    default=None,
    help="Keep the checkpoint of the lowest held-out loss and end with its weights.",
)
@click.option("--max-time", help="Stop after this time (90s, 30m, 8h), saved and resumable.")
@click.option(
    "--on-nonfinite",
    type=click.Choice(["stop", "skip", "rollback"]),
    help="When loss or gradient are no finite numbers.",
)
@click.option("--log-every", type=int, help="Updates between lines of metrics.jsonl.")
@click.option(
    "--recompute/--no-recompute", default=None, help="Trade time for memory: keep less for the backward pass."
)
@click.option("--memory", help="Recompute as few layers as keep the memory within this: 2GB.")
@click.option("--seed", type=int, help="Seed of weights, order, masks and dropout.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute.  [default: cpu]")
@click.option(
    "--bf16/--no-bf16",
    default=None,
    help="On cuda: bfloat16 in memory, on tensor cores; weights, sums, losses float32. On cpu: activations are kept in "
    "bfloat16 for the backward pass.",
)
@click.option(
    "--fp16/--no-fp16",
    default=None,
    help="On cuda: as --bf16, in float16, for GPUs without bfloat16; losses are scaled.",
)
@click.option("--threads", type=int, help="Threads to use.")
@click.option("--resume", is_flag=True, default=None, help="Go on with the run in --out.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace the run in --out.")
@click.option(
    "--find-lr", is_flag=True, help="Try growing learning rates, show what the loss does, and stop."
)
@click.option("--find-batch-size", metavar="MEMORY", help="Say how many rows fit into 2GB, and stop.")
@click.option("--print-config", is_flag=True, help="Print all options as JSON and stop.")
def command(
    files: tuple[str, ...],
    config_file: str | None,
    print_config: bool,
    find_lr: bool,
    find_batch_size: str | None,
    **given: Any,
) -> None:
    """Train a model on text files.

    FILES are .txt (one document each), .jsonl, .csv, .tsv or .parquet (one a record), the first four also with .gz or
    .zst; folders of these, patterns, or - for standard input. The run folder opens with `pyrformer sample`,
    `pyrformer fill-mask`, pf.load, and Hugging Face's transformers.
    """
    options = read_toml(config_file) if config_file else {"model": {}, "tokenizer": {}}
    objective = given["objective"] or options.get("objective", "ar")
    options["model"] = model_options(given, options["model"], objective)
    options["tokenizer"] = tokenizer_options(
        given.pop("tokenizer"), given.pop("vocab_size"), options["tokenizer"]
    )
    rank = given.pop("lora")
    if rank is not None:
        options["lora"] = {**options.get("lora", {}), "r": rank}
    for key, texts in (
        ("optim_args", (given.pop("optim_args") or "").split(",")),
        ("weight_decay_groups", given.pop("weight_decay_groups")),
    ):
        texts = [text for text in texts if text]
        if texts:
            options[key] = options.get(key, {}) | assignments(texts)
    for key in ("valid", "clean", "freeze", "sample_prompts"):
        given[key] = list(given[key]) or None
    options |= {key: value for key, value in given.items() if value is not None}
    if files:
        options["files"] = list(files)
    if find_lr or find_batch_size:
        options.setdefault("out", "run")
    for name in ("files", "out"):
        if not options.get(name):
            raise click.UsageError(
                f"give {'FILES' if name == 'files' else '--out RUN'}, or set it in the --config file"
            )
    config = pf.TrainConfig(**options)
    if print_config:
        click.echo(json.dumps(dataclasses.asdict(config), indent=2))
        return
    if find_lr or find_batch_size:
        find(config, find_batch_size)
        return
    from pyrformer.training.comm import launched_rank

    from ._progress import Display

    if launched_rank() > 0:
        # The first of several processes speaks for all.
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with Display(config.log_every) as display:
        run = pf.train(config, display.event)
    click.echo(
        f"trained {run.steps} steps in {run.seconds:.1f} s: training loss {run.train_loss:.4f}, "
        f"validation loss {run.valid_loss:.4f} nats per token; saved to {run.folder}"
    )
