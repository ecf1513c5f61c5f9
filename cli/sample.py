"""``pyrformer sample``: continues a text, as it comes."""

from __future__ import annotations

import json
from typing import Any

import click

import pyrformer as pf


@click.command()
@click.argument("run", type=click.Path())
@click.argument("prompt")
@click.option("--max-new-tokens", type=int, default=200, show_default=True, help="Tokens to add at most.")
@click.option("--greedy", is_flag=True, help="Take the most probable token instead of drawing one.")
@click.option(
    "--temperature", type=float, help="Flatten (> 1) or sharpen (< 1) what is drawn from.  [default: 0.8]"
)
@click.option("--top-k", type=int, help="Draw from the k most probable tokens.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens with this much probability (nucleus).")
@click.option("--min-p", type=float, help="Draw from tokens with this share of the best one's probability.")
@click.option("--beams", type=int, help="Beam search of this width; with a sampling option, drawn.")
@click.option("--length-penalty", type=float, help="For beams: above 0 favours long texts.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens that occurred become less probable.")
@click.option("--no-repeat-ngram-size", type=int, help="No run of this many tokens occurs twice.")
@click.option(
    "-n",
    "--num-return-sequences",
    type=int,
    default=1,
    show_default=True,
    help="How many continuations.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws the same text.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation.")
def command(
    run: str,
    prompt: str,
    greedy: bool,
    beams: int | None,
    num_return_sequences: int,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with the model in the folder RUN.

    Tokens are drawn at temperature 0.8 unless --greedy or --beams is given.
    """
    drawing = {k: options.pop(k) for k in ("temperature", "top_k", "top_p", "min_p")}
    asked = {k: v for k, v in drawing.items() if v is not None}
    if greedy and asked:
        raise click.UsageError(f"--greedy draws nothing: leave out --{next(iter(asked)).replace('_', '-')}")
    settings = {k: v for k, v in options.items() if v is not None}
    if beams is not None:
        settings["num_beams"] = beams
    if asked or not (greedy or beams):
        settings |= {"do_sample": True, "seed": seed, "temperature": 0.8, **asked}
    model = pf.load(run, device=device, threads=threads)
    if as_json or beams is not None or num_return_sequences != 1:
        out = model.generate(prompt, **settings, num_return_sequences=num_return_sequences)
        for i, text in enumerate(out.texts):
            if as_json:
                fields = {"ids": out.ids[i], "score": out.scores[i], "finish_reason": out.finish_reasons[i]}
                click.echo(json.dumps({"prompt": prompt, "text": text, **fields}, ensure_ascii=False))
            else:
                score = out.scores[i]
                if len(out.texts) > 1:
                    click.secho(
                        f"--- {i + 1}" + (f"  score {score:.4f}" if score is not None else ""), dim=True
                    )
                click.echo(prompt + text)
        return
    pieces = model.stream(prompt, **settings)
    first = next(pieces, "")
    click.echo(prompt + first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
