"""``pyrformer sample``: continues texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

import pyrformer as pf
from pyrformer.fields import parse_json

from ._files import texts_of
from ._masked import fill


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
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
@click.option("--load-in-8bit", is_flag=True, help="Keep weights in 8 bits: a quarter of the memory, faster.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation.")
def command(
    run: str,
    prompt: str | None,
    file: str | None,
    column: str,
    batch_size: int,
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
    Prompts from .jsonl lines, or --json, give a JSON object for each continuation: prompt, text, ids, token_logprobs,
    score, finish_reason.

    With a masked model the masks in PROMPT are filled: drawn by Gibbs sampling, or with --greedy by mask-predict.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("give either PROMPT or --prompts")
    if (show_beams or show_probs) and (file is not None or as_json):
        raise click.UsageError("--show-beams and --show-probs take one PROMPT, without --json")
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
        fill(model, [prompt] if prompt is not None else list(texts_of(file or "-", column)), asked, as_json)
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
        _many(model, file or "-", column, batch_size, settings, as_json, mbr)
    elif show_beams or show_probs:
        _show(model, prompt, settings, show_beams, show_probs, html_file)
    elif as_json or settings.get("num_beams", 1) != 1 or settings.get("num_return_sequences", 1) != 1:
        _print(prompt, model.generate(prompt, **settings), as_json, mbr)
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


def _print(prompt: str, out: pf.Generation, as_json: bool, mbr: str | None = None) -> None:
    """Prints continuations of a prompt, or the best of them."""
    if mbr is not None:
        best = pf.mbr(out.texts, mbr).best
        out = _part(out, slice(best, best + 1))
    for i, text in enumerate(out.texts):
        score = out.scores[i]
        if as_json:
            row = {
                "prompt": prompt,
                "text": text,
                "ids": out.ids[i],
                "token_logprobs": out.token_logprobs[i],
                "score": score,
                "finish_reason": out.finish_reasons[i],
            }
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        if len(out.texts) > 1:
            click.secho(f"--- {i + 1}" + (f"  score {score:.4f}" if score is not None else ""), dim=True)
        click.echo(prompt + text)


def _many(
    model: pf.Model,
    file: str,
    column: str,
    batch_size: int,
    settings: dict[str, Any],
    as_json: bool,
    mbr: str | None,
) -> None:
    """Continues the prompts of a file. What is drawn depends on a prompt's place in it, not on the batch."""
    prompts = list(texts_of(file, column))
    number = settings.get("num_return_sequences", 1)
    for at in _progress(range(0, len(prompts), batch_size), batch_size, len(prompts)):
        batch = prompts[at : at + batch_size]
        out = model.generate(batch, **settings, first_sequence=at * number)
        for i, prompt in enumerate(batch):
            _print(prompt, _part(out, slice(i * number, (i + 1) * number)), as_json, mbr)


def _part(out: pf.Generation, part: slice) -> pf.Generation:
    """Some of the sequences."""
    lists = (out.texts[part], out.ids[part], out.scores[part], out.token_logprobs[part])
    return pf.Generation(*lists, out.finish_reasons[part])


def _progress(starts: range, size: int, total: int) -> Iterator[int]:
    """The starts of batches, with a bar on standard error where that is a terminal and standard output is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or sys.stdout.isatty():
        yield from starts
        return
    with Progress(MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=total)
        for start in starts:
            yield start
            progress.update(task, completed=min(start + size, total))


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
        _print(prompt, out, False)
