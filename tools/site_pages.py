"""A hook of mkdocs: pages made of the commands and of the examples; links that leave the folder of documents."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: A link to a file outside docs/: it becomes the file's path.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)[^)]*\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    for name, lines in (("reference/commands.md", commands()), ("frames.md", examples())):
        files.append(File.generated(config, name, content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links to files of the repository into their paths."""
    return OUTSIDE.sub(lambda m: f"`{m[2]}`", markdown)


def examples() -> Iterator[str]:
    """The lines of the page of examples/pipelines: its words, then each script."""
    folder = ROOT / "examples" / "pipelines"
    yield (folder / "README.md").read_text("utf-8").partition("\n| script")[0]
    for script in sorted(folder.glob("*.py")):
        code = script.read_text("utf-8")
        said = ast.get_docstring(ast.parse(code)) or ""
        yield f"## {script.name}\n\n{said}\n\n```python\n{code.split(chr(34) * 3, 2)[2].strip()}\n```\n"


def commands() -> Iterator[str]:
    """The lines of the page of commands: a section for each."""
    from pyrformer.cli import main

    yield "# Commands\n\nMade from the commands themselves; `pyrformer COMMAND --help` says the same.\n"
    yield from below(main, "pyrformer", click.Context(main, info_name="pyrformer"))


def below(group: click.Group, name: str, context: click.Context) -> Iterator[str]:
    """The commands of a group, and those below them."""
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if command is None:
            continue
        inner, whole = click.Context(command, parent=context, info_name=word), f"{name} {word}"
        yield f"{'#' * (1 + whole.count(' '))} {whole}\n"
        yield f"```text\n{' '.join([whole, *command.collect_usage_pieces(inner)])}\n```\n"
        yield "\n\n".join(told(part) for part in (command.help or "").split("\n\n")) + "\n"
        yield from options(command, inner)
        if isinstance(command, click.Group):
            yield from below(command, whole, inner)


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The table of a command's options."""
    found = (p.get_help_record(context) for p in command.get_params(context) if isinstance(p, click.Option))
    rows = [row for row in found if row is not None and "--help" not in row[0]]
    if rows:
        yield "| option | meaning |\n| --- | --- |"
        yield from (f"| <code>{bare(names)}</code> | {told(meaning)} |" for names, meaning in rows)
        yield ""


def told(text: str) -> str:
    """A help text in Markdown: code stays code, and what else means something there is a character."""
    parts = " ".join(text.split()).split("`")
    return "".join(f"<code>{bare(part)}</code>" if i % 2 else bare(part) for i, part in enumerate(parts))


def bare(text: str) -> str:
    """Text that neither Markdown nor HTML reads anything into."""
    return re.sub(r"[\[\]*_|`~\\#]", lambda m: f"&#{ord(m[0])};", html.escape(text, quote=False))
