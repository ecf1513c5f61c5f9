"""``pyrformer sample``: continues texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click

import pyrformer as pf
from pyrformer.fields import parse_json
from pyrformer.pipeline import Made, Maker

from ._files import DEVICE, through
from ._masked import filler
from ._progress import files_bar


def json_value(text: str) -> Any:
    """A value written as JSON; a word that is none stands for itself."""
    try:
        return parse_json(text)
    except ValueError:
        if text.isalpha():
            return text
        raise click.BadParameter(f"{text!r} is not JSON") from None


# fmt: off
#: The options of pf.GenerationConfig: name → (type, help). Those that are None unless given.
OPTIONS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "Tokens to add at most.  [default: 200]"),
    "max_length": (int, "Tokens at most, the prompt's included."),
    "min_new_tokens": (int, "Tokens before the text may end."),
    "min_length": (int, "Tokens before the text may end, the prompt's included."),
    "temperature": (float, "Flatten (> 1) or sharpen (< 1) what is drawn from.  [default: 0.8]"),
    "top_k": (int, "Draw from the k most probable tokens."),
    "top_p": (float, "Draw from the fewest tokens with this much probability (nucleus)."),
    "min_p": (float, "Draw from tokens with this share of the best one's probability."),
    "top_h": (float, "Draw from tokens with this share of the entropy."),
    "typical_p": (float, "Draw from the most typical tokens with this much probability."),
    "epsilon_cutoff": (float, "Draw from tokens with at least this probability."),
    "eta_cutoff": (float, "The same, lowered where the entropy is high."),
    "min_tokens_to_keep": (int, "What no filter goes below."),
    "num_beams": (int, "Beam search of this width; with a sampling option, drawn."),
    "num_beam_groups": (int, "Groups of beams that avoid each other's tokens."),
    "diversity_penalty": (float, "How much they avoid them."),
    "length_penalty": (float, "For beams: above 0 favours long texts."),
    "early_stopping": (json_value, "When beams stop: true, false or never."),
    "patience": (float, "How many finished beams are waited for, in widths."),
    "stochastic_beams": (bool, "Draw distinct texts without replacement."),
    "force_words_ids": (json_value, "Token ids that must occur (beams): [[1, 2], [[3], [4]]]."),
    "ordered_constraints": (bool, "They must occur in this order."),
    "penalty_alpha": (float, "Contrastive search, with --top-k from 2 on."),
    "prompt_lookup_num_tokens": (int, "Draft so many tokens from the text itself."),
    "max_matching_ngram_size": (int, "The longest n-gram that is looked up.  [default: 2]"),
    "num_assistant_tokens": (int, "Tokens that --assistant-model drafts at once.  [default: 5]"),
    "repetition_penalty": (float, "Above 1: tokens that occurred become less probable."),
    "encoder_repetition_penalty": (float, "Above 1: tokens of the prompt become more probable."),
    "presence_penalty": (float, "Taken from the score of each token that was added."),
    "frequency_penalty": (float, "The same, as often as it was added."),
    "no_repeat_ngram_size": (int, "No run of this many tokens occurs twice."),
    "encoder_no_repeat_ngram_size": (int, "No run of this many tokens comes from the prompt."),
    "bad_words_ids": (json_value, "Runs of token ids that must not occur: [[1, 2], [3]]."),
    "sequence_bias": (json_value, "What runs of token ids add to scores: [[[1, 2], -5.0]]."),
    "suppress_tokens": (json_value, "Token ids never chosen: [1, 2]."),
    "begin_suppress_tokens": (json_value, "Token ids not chosen first."),
    "forced_bos_token_id": (int, "The token that follows a prompt of one token."),
    "forced_eos_token_id": (json_value, "The token that stands at the length limit."),
    "exponential_decay_length_penalty": (json_value, "[start, factor]: the end grows likelier."),
    "renormalize_logits": (bool, "Beam scores are renormalised after processors."),
    "remove_invalid_values": (bool, "Replace NaN and infinite scores."),
    "eos_token_id": (json_value, "The token, or tokens, that end a text.  [default: the model's]"),
    "cache_implementation": (click.Choice(["dynamic", "quantized"]), "quantized: keys and values in 8 bits."),
    "max_time": (float, "Seconds after which to stop."),
    "seed": (int, "The same seed draws the same text.  [default: 0]"),
}
# fmt: on
#: Second names.
SHORT = {"num_beams": ["--beams"]}
#: Options that ask for draws.
DRAWING = ["temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
#: Candidates that --show-probs records for each step.
CANDIDATES = 12


def generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of pf.GenerationConfig to a command."""
    for name, (kind, text) in reversed(OPTIONS.items()):
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(command)
        else:
            command = click.option(flag, *SHORT.get(name, []), name, type=kind, help=text)(command)
    return command


@click.command()
@click.argument("run", type=click.Path())
@click.argument("prompt", required=False)
@click.option(
    "--prompts", "file", type=click.Path(), help="Prompts, as files of pyrformer score; - reads input."
)
@click.option("--column", default="text", show_default=True, help="Field or column that holds the prompt.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts taken together."
)
@click.option(
    "--out",
    type=click.Path(),
    help="A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file for what --prompts give.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, and forget what was begun.")
@click.option("--do-sample/--greedy", default=None, help="Draw tokens, or take the most probable.")
@click.option(
    "-n",
    "--num-return-sequences",
    type=int,
    default=1,
    show_default=True,
    help="Continuations of each prompt.",
)
@generation_options
@click.option("--iterations", type=int, help="Masked models: visits to each mask.  [default: 10, drawing 20]")
@click.option("--stop-strings", multiple=True, help="End at this text; may be given several times.")
@click.option("--assistant-model", type=click.Path(), help="A run whose model drafts tokens.")
@click.option("--regex", help="The text follows this regular expression.")
@click.option("--json-schema", type=click.Path(), help="The text is JSON that fits the schema in this file.")
@click.option("--grammar", type=click.Path(), help="The text follows the Lark grammar in this file.")
@click.option(
    "--mbr", type=click.Choice(["chrf", "f1"]), help="Of -n texts, print the one most like the others."
)
@click.option("--generation-config", type=click.Path(), help="A generation_config.json; options override it.")
@click.option("--show-beams", is_flag=True, help="Draw the tree of hypotheses.")
@click.option("--show-probs", is_flag=True, help="Show what could have come at each step.")
@click.option("--html", "html_file", type=click.Path(), help="Write these views to a page.")
@DEVICE
@click.option("--load-in-8bit", is_flag=True, help="Keep weights in 8 bits: a quarter of the memory, faster.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation.")
def command(
    run: str,
    prompt: str | None,
    file: str | None,
    column: str,
    batch_size: int,
    out: str | None,
    overwrite: bool,
    num_return_sequences: int,
    iterations: int | None,
    stop_strings: tuple[str, ...],
    assistant_model: str | None,
    regex: str | None,
    json_schema: str | None,
    grammar: str | None,
    mbr: str | None,
    generation_config: str | None,
    show_beams: bool,
    show_probs: bool,
    html_file: str | None,
    device: str,
    load_in_8bit: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT, or each of --prompts, with the model in the folder RUN.

    Tokens are drawn at temperature 0.8 unless --greedy, --num-beams, --penalty-alpha or --generation-config is given.
    Prompts from .jsonl lines, --out, or --json, give a JSON object for each continuation: prompt, text, ids,
    token_logprobs, score, finish_reason. Those of a batch are written when it is done; with --out, what was ended
    goes on when the same command is given again.

    With a masked model the masks in PROMPT are filled: drawn by Gibbs sampling, or with --greedy by mask-predict.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("give either PROMPT or --prompts")
    if (show_beams or show_probs) and (file is not None or as_json):
        raise click.UsageError("--show-beams and --show-probs take one PROMPT, without --json")
    if out is not None and file is None:
        raise click.UsageError("--out is for --prompts")
    if html_file is not None and not (show_beams or show_probs):
        raise click.UsageError("--html needs --show-beams or --show-probs")
    settings = {k: v for k, v in options.items() if v is not None}
    if stop_strings:
        settings["stop_strings"] = list(stop_strings)
    if num_return_sequences != 1:
        settings["num_return_sequences"] = num_return_sequences
    if regex is not None:
        settings["regex"] = regex
    for name, path in (("json_schema", json_schema), ("grammar", grammar)):
        if path is not None:
            settings[name] = _text(path)
    if mbr is not None and (num_return_sequences < 2 or show_beams or show_probs):
        raise click.UsageError("--mbr chooses among several continuations: give -n above 1, and no view")
    as_json = as_json or bool(file and file.endswith(".jsonl"))
    model = pf.load(run, device=device, threads=threads, load_in_8bit=load_in_8bit)
    if model.family.objective == "mlm":
        others = {
            "iterations": iterations,
            "assistant_model": assistant_model,
            "generation_config": generation_config,
            "mbr": mbr,
            "show_beams": show_beams or None,
            "show_probs": show_probs or None,
        }
        asked = {**settings, **{k: v for k, v in others.items() if v is not None}}
        rows = filler(model, dict(asked))
        if prompt is not None:
            _tell(rows([prompt], 0)[0], as_json, filled=True)
        else:
            _many(model, rows, file or "-", column, batch_size, asked, as_json, out, overwrite)
        return
    if iterations is not None:
        raise click.UsageError("--iterations is for masked models")
    if show_beams and settings.get("num_beams", 1) == 1:
        raise click.UsageError("--show-beams needs --num-beams above 1")
    if generation_config is not None:
        settings = {**pf.GenerationConfig.load(generation_config).options, **settings}
    else:
        settings = _defaults(settings)
    if assistant_model is not None:
        settings["assistant_model"] = pf.load(assistant_model, device=device, threads=threads)
    if prompt is None:
        rows, deciding = _continuer(model, settings, mbr), {**settings, "mbr": mbr}
        if assistant_model is not None:
            deciding["assistant_model"] = str(Path(assistant_model).absolute())
        _many(model, rows, file or "-", column, batch_size, deciding, as_json, out, overwrite)
    elif show_beams or show_probs:
        _show(model, prompt, settings, show_beams, show_probs, html_file)
    elif as_json or settings.get("num_beams", 1) != 1 or settings.get("num_return_sequences", 1) != 1:
        _tell(_rows(prompt, model.generate(prompt, **settings), mbr), as_json)
    else:
        pieces = model.stream(prompt, **settings)
        first = next(pieces, "")
        click.echo(prompt + first, nl=False)
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds what the command does where nothing is said."""
    drawing = [
        name for name in DRAWING if name in settings and not ("penalty_alpha" in settings and name == "top_k")
    ]
    if settings.get("do_sample") is False and drawing:
        raise click.UsageError(f"--greedy draws nothing: leave out --{drawing[0].replace('_', '-')}")
    exact = "penalty_alpha" in settings or ("num_beams" in settings and not settings.get("stochastic_beams"))
    if "do_sample" not in settings and (drawing or not exact):
        settings["do_sample"] = True
    if settings.get("do_sample"):
        settings.setdefault("temperature", 0.8)
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", 200)
    return settings


def _text(path: str) -> str:
    """The contents of a file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise click.UsageError(f"{path} cannot be read: {e}") from None


def _rows(prompt: str, out: pf.Generation, mbr: str | None = None) -> list[dict[str, Any]]:
    """A row for each continuation of a prompt, or for the best of them."""
    if mbr is not None:
        best = pf.mbr(out.texts, mbr).best
        out = _part(out, slice(best, best + 1))
    return [
        {
            "prompt": prompt,
            "text": text,
            "ids": out.ids[i],
            "token_logprobs": out.token_logprobs[i],
            "score": out.scores[i],
            "finish_reason": out.finish_reasons[i],
        }
        for i, text in enumerate(out.texts)
    ]


def _tell(rows: list[dict[str, Any]], as_json: bool, *, filled: bool = False) -> None:
    """Prints the rows of a prompt; of those ``filled``, the text holds the prompt."""
    for i, row in enumerate(rows):
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        if len(rows) > 1 and not filled:
            score = row["score"]
            click.secho(f"--- {i + 1}" + (f"  score {score:.4f}" if score is not None else ""), dim=True)
        click.echo(row["text"] if filled else row["prompt"] + row["text"])


def _continuer(model: pf.Model, settings: dict[str, Any], mbr: str | None) -> Maker:
    """What continues the prompts of a file. What is drawn depends on a prompt's place in it, not on the batch."""
    number = settings.get("num_return_sequences", 1)

    def rows(prompts: list[str], first: int) -> list[list[dict[str, Any]]]:
        if not prompts:
            return []
        out = model.generate(prompts, **settings, first_sequence=first * number)
        parts = (_part(out, slice(i * number, (i + 1) * number)) for i in range(len(prompts)))
        return [_rows(prompt, part, mbr) for prompt, part in zip(prompts, parts, strict=True)]

    return rows


def _many(
    model: pf.Model,
    rows: Maker,
    file: str,
    column: str,
    batch_size: int,
    deciding: dict[str, Any],
    as_json: bool,
    out: str | None,
    overwrite: bool,
) -> None:
    """Puts the prompts of a file through ``rows``, batch by batch, to standard output or a file."""
    if out is not None:
        deciding = {k: v for k, v in deciding.items() if not isinstance(v, pf.Model)}
        through((Made(rows), model, deciding), [file], column, out, "", "fail", overwrite, stretch=batch_size)
        return
    documents = pf.Documents([file], column=column)
    prompts = (row[column] for row in documents.rows())
    done = 0
    with files_bar([file], hidden=sys.stdout.isatty()) as told:
        while batch := list(islice(prompts, batch_size)):
            for made in rows(batch, done):
                _tell(made, as_json, filled=model.family.objective == "mlm")
            sys.stdout.flush()
            done += len(batch)
            told(documents.bytes_read, f"{done:,} prompts")


def _part(out: pf.Generation, part: slice) -> pf.Generation:
    """Some of the sequences."""
    lists = (out.texts[part], out.ids[part], out.scores[part], out.token_logprobs[part])
    return pf.Generation(*lists, out.finish_reasons[part])


def _show(
    model: pf.Model, prompt: str, settings: dict[str, Any], beams: bool, probs: bool, html_file: str | None
) -> None:
    from rich.console import Console

    from ._hypotheses import beam_tree, draw_moments, draw_tree, ids_as_text, moments, page

    out = model.generate(prompt, **settings, output_steps=CANDIDATES)
    tokenizer = model.tokenizer
    decode = ids_as_text
    if tokenizer is not None:
        decode = partial(tokenizer.decode_after, tokenizer.encode(prompt).ids)
    tree = beam_tree(out, decode) if beams else None
    results = [moments(out, i, decode) for i in range(len(out.ids))] if probs else []
    if html_file is not None:
        try:
            Path(html_file).write_text(page(prompt, tree, results), encoding="utf-8")
        except OSError as e:
            raise click.UsageError(f"--html: {html_file} cannot be written: {e.strerror}") from None
    console = Console(highlight=False)
    if tree is not None:
        console.print(draw_tree(tree, prompt))
    for i, steps in enumerate(results):
        if len(results) > 1:
            console.print(f"--- {i + 1}", style="dim")
        console.print(draw_moments(steps))
    if tree is None:
        _tell(_rows(prompt, out), as_json=False)
