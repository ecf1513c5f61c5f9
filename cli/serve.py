"""``pyrformer serve``: models behind HTTP."""

from __future__ import annotations

from pathlib import Path

import click

import pyrformer as pf

from ._files import DEVICE


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key",
    envvar="PYRFORMER_API_KEY",
    help="What clients must send; needed where others can reach the host.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="A model's name for clients, for each RUN.  [default: the folder's]",
)
@click.option("--chat-template", type=click.Path(), help="A file of Jinja.  [default: the model's own]")
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens, prompt included."
)
@click.option(
    "--max-rows", type=click.IntRange(1), default=8, show_default=True, help="Sequences decoded together."
)
@click.option(
    "--max-waiting", type=click.IntRange(1), default=64, show_default=True, help="Prompts in the queue."
)
@click.option(
    "--max-body", type=click.IntRange(1), default=1 << 20, show_default=True, help="Bytes of a request."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds a request may take.",
)
@click.option(
    "--stop-seconds", type=click.IntRange(0), default=30, show_default=True, help="Seconds to finish in."
)
@DEVICE
@click.option("--load-in-8bit", is_flag=True, help="Keep weights in 8 bits: a quarter of the memory, faster.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
def command(
    runs: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    names: tuple[str, ...],
    chat_template: str | None,
    max_length: int,
    max_rows: int,
    max_waiting: int,
    max_body: int,
    timeout: float,
    stop_seconds: int,
    device: str,
    load_in_8bit: bool,
    threads: int | None,
) -> None:
    """Serve the models in the folders RUNS, in the manner of OpenAI's API: /v1/completions, /v1/chat/completions,
    /v1/embeddings, /v1/models, /health.

    Needs `pip install pyrformer[serve]`. SIGTERM and Ctrl-C finish what was asked, then end.
    """
    from pyrformer.errors import InputError
    from pyrformer.serve.server import Settings, serve

    if names and len(names) != len(runs):
        raise InputError(f"[serve] {len(runs)} models were given and {len(names)} names")
    names = names or tuple(Path(run).absolute().name for run in runs)
    if len(set(names)) < len(names):
        raise InputError("[serve] two models have one name; give each its own with --name")
    settings = Settings(
        api_key or None,
        max_length,
        max_rows,
        max_waiting,
        max_body,
        timeout,
        chat_template,
    )
    opened = [pf.load(run, device=device, threads=threads, load_in_8bit=load_in_8bit) for run in runs]
    serve(
        dict(zip(names, opened, strict=True)),
        settings,
        host=host,
        port=port,
        stop_seconds=stop_seconds,
        on_ready=lambda url: click.echo(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} served at {url}/v1; Ctrl-C ends it"
        ),
    )
