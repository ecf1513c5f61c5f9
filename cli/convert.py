"""``pyrformer convert``: a model in another form."""

from __future__ import annotations

from pathlib import Path

import click

import pyrformer as pf
from pyrformer.errors import FileError


@click.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "q8_0"]),
    help="Type of the weights; q8_0 for .gguf only.  [default: float32 of a folder, float16 of a .gguf]",
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    help='Weights of a folder beyond this ("500MB", "2GiB") go into several files.',
)
@click.option("--overwrite", is_flag=True, help="Replace what OUT holds.")
def command(model: str, out: str, dtype: str | None, max_shard_size: str, overwrite: bool) -> None:
    """Write the MODEL (a folder or a .gguf file) to OUT: a folder in Hugging Face's layout, or NAME.gguf."""
    target = Path(out)
    if not overwrite and target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileError(f"[convert] {target} exists; give --overwrite to replace what it holds")
    opened = pf.load(model)
    opened.save(target, dtype=dtype, max_shard_size=max_shard_size)
    click.echo(f"wrote {opened.parameter_count:,} parameters to {target}")
