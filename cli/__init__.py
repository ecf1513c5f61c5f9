"""The ``pyrformer`` command.

Installed as ``pyrformer.cli``: modules here import each other relatively, and of the rest only the public names of
``pyrformer``. Each command lives in the file of its name, loaded when it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

#: Command → (file, first line of its help).
COMMANDS = {
    "bench": ("bench", "Measure this machine."),
    "classify": ("classify", "Print the classes of texts."),
    "compare": ("compare", "Compare two models on a text."),
    "convert": ("convert", "Write a model in another form: half precision, shards, GGUF."),
    "data": ("data", "Look at text and batches."),
    "doctor": ("doctor", "Say what works on this machine, and what is missing."),
    "embed": ("embed", "Print vectors of texts."),
    "eval": ("eval", "Measure a model on a text."),
    "explain": ("explain", "Write a page that follows a text through a model."),
    "fill-mask": ("fill_mask", "Propose tokens for the masks in a text."),
    "plan": ("plan", "Print the compiled plan of a model."),
    "prepare": ("prepare", "Tokenize text once, for many runs."),
    "replay": ("replay", "Make an update that was not finite again, and say where."),
    "report": ("report", "Write a page about runs: curves, options, machine."),
    "runs": ("runs", "List runs."),
    "sample": ("sample", "Continue a text."),
    "score": ("score", "Print how probable texts are."),
    "serve": ("serve", "Serve a model over HTTP."),
    "tokenize": ("tokenize", "Print the ids of texts."),
    "tokenizer": ("tokenizer", "Train a tokenizer, use one, compare them."),
    "train": ("train", "Train a model on text files."),
}


class Commands(click.Group):
    """A group whose commands are imported when they are called; the list of them costs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{COMMANDS[name][0]}", __name__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(COMMANDS.items())])

    def invoke(self, ctx: click.Context) -> Any:
        """Turns errors of the package into one line on standard error: exit code 2 for input, 1 for our own faults."""
        from pyrformer.errors import Error, InternalError, NonFiniteError, Stopped

        try:
            return super().invoke(ctx)
        except Error as e:
            click.echo(f"pyrformer: error: {e}", err=True)
            sys.exit(1 if isinstance(e, (InternalError, NonFiniteError)) else 2)
        except MemoryError as e:
            click.echo(
                f"pyrformer: error: [memory] there is not enough ({e}); ask for less at once", err=True
            )
            sys.exit(2)
        except KeyboardInterrupt as e:
            click.echo(f"pyrformer: {e}" if isinstance(e, Stopped) else "pyrformer: interrupted", err=True)
            sys.exit(128 + e.signal if isinstance(e, Stopped) else 130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyrformer", message="%(prog)s %(version)s")
def main() -> None:
    """Train and run transformers without PyTorch."""
