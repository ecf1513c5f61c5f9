"""What a run shows: a live line in a terminal, plain lines where output is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

#: Characters of a sampled text that are shown.
SHOWN = 160
#: Told the bytes read of files, and what else there is to say.
Told: TypeAlias = Callable[[int, str], None]


@contextmanager
def files_bar(inputs: Sequence[str], *, hidden: bool = False) -> Iterator[Told]:
    """A bar over the bytes of files, with the time left, on standard error where that is a terminal.

    Raises:
        DataError: a folder or pattern stands for no file.
    """
    from pyrformer.data.documents import expand

    console = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.fields[numbers]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
    )
    size = sum(path.stat().st_size for path in expand(inputs) if path.is_file()) or None
    task = bar.add_task("", total=None if "-" in inputs else size, numbers="")
    with bar:
        yield lambda read, numbers: bar.update(task, completed=read, numbers=numbers)


class Display:
    """Turns a run's events into output on standard error."""

    def __init__(self, log_every: int):
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.log_every = log_every or 100
        self.valid = ""
        self.progress = Progress(
            TextColumn("{task.completed:>5}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=False,
        )
        self.task: Any = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.task is not None and self.live:
            self.progress.stop()

    def event(self, kind: str, n: dict[str, Any]) -> None:
        """Takes one event of :func:`pyrformer.train`."""
        if kind == "stage":
            self._line(f"{n['what']} …")
        elif kind == "note":
            self._line(n["what"])
        elif kind == "start":
            if "train_tokens" in n:
                text = f"{n['train_tokens']:,} tokens to learn from, {n['valid_tokens']:,} held out"
            else:
                text = f"{n['text_bytes'] / 1e6:,.1f} MB of text, which is tokenized beside the training"
            self._line(f"{n['parameters']:,} parameters, vocabulary {n['vocab_size']:,}; {text}")
            if self.live:
                self.task = self.progress.add_task("", total=n["steps"], completed=n["done"], numbers="")
                self.progress.start()
        elif kind == "step":
            numbers = f"loss {n['loss']:.3f} lr {n['learning_rate']:.1e} {_short(n['tokens_per_s'])} tok/s{self.valid}"
            if self.live:
                self.progress.update(self.task, completed=n["step"], numbers=numbers)
            elif n["step"] % (10 * self.log_every) == 0:
                self._line(f"step {n['step']}: {numbers}")
        elif kind == "eval":
            self.valid = f" valid {n['valid_loss']:.3f}"
            if not self.live:
                self._line(f"step {n['step']}: validation loss {n['valid_loss']:.4f}")

        elif kind == "sample":
            for sample in n["samples"]:
                text = sample["text"]
                self._line(f"step {n['step']}: {text[:SHOWN]!r}{' …' if len(text) > SHOWN else ''}")

    def _line(self, text: str) -> None:
        if self.live:
            self.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201


def _short(n: float) -> str:
    return f"{n / 1000:.1f}k" if n >= 1000 else f"{n:.0f}"
