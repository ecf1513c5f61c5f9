"""The page of ``pyrformer report``: curves, options and machine of one or several runs, in one file without network.

Python gathers and thins the numbers and writes the tables; the page's script draws the curves as SVG, so that
smoothing, axes and the choice of runs answer at once. All that comes from run folders is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrformer.errors import InputError
from pyrformer.page import assemble
from pyrformer.report.runs import Record
from pyrformer.training.config import TrainConfig

__all__ = ["report"]

#: Points of a curve on the page; of longer ones, the least and the greatest value of each stretch is kept.
POINTS = 2000
#: Figures of metrics.jsonl → (title, unit). "valid_loss" is drawn into the chart of "loss".
CHARTS = {
    "loss": ("Loss", "nats per label"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm, before clipping", ""),
    "loss_scale": ("Loss scale", ""),
    "update_ratio": ("Update / weights, median over matrices", ""),
    "tokens_per_s": ("Throughput", "tokens per second"),
    "loader_wait_seconds": ("Wait for data in an update", "seconds"),
    "rss_bytes": ("Memory of the process", "bytes"),
    "utilisation": ("Processor utilisation", "share of all cores"),
    "save_stall_seconds": ("Wait for checkpoints, in total", "seconds"),
}
#: Colours there are; runs beyond are refused.
MOST_RUNS = 8
#: Steps whose samples are shown; of more, those that are evenly spread.
SAMPLES_SHOWN = 20
#: Options without influence on what is learned; they are no difference worth a line.
ASIDE = ("out", "overwrite", "resume")

esc = html.escape


def report(runs: Sequence[str | Path]) -> str:
    """A page about runs, as HTML.

    Args:
        runs: 1 to 8 run folders.

    Raises:
        FileError: one is no run folder, or cannot be read.
        InputError: there are none, or more than 8.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise InputError(f"[report] give 1 to {MOST_RUNS} runs, got {len(runs)}")
    records = [Record.read(Path(run)) for run in runs]
    names = _names([r.folder for r in records])
    data = {
        "charts": [{"key": key, "title": title, "unit": unit} for key, (title, unit) in CHARTS.items()],
        "runs": [
            {"name": name, "series": {key: _thinned(r.values(key)) for key in (*CHARTS, "valid_loss")}}
            for name, r in zip(names, records, strict=True)
        ],
    }
    sections = [
        ("curves", "Curves", _CURVES),
        *([("samples", "Samples", _samples(names, records))] if any(r.samples for r in records) else []),
        ("options", "Differences" if len(records) > 1 else "Options", _options(names, records)),
        ("text", "Text", _table("", names, [r.data for r in records])),
        ("environment", "Machine", _table("", names, [r.environment for r in records])),
    ]
    title = ", ".join(names)
    told = "".join(f'<section id="{key}"><h2>{what}</h2>{text}</section>' for key, what, text in sections)
    body = (
        f'<main><header><p>pyrformer report<button id="theme" type="button">light / dark</button></p>'
        f"<h1>{esc(title)}</h1></header>{_summaries(names, records)}{told}</main>"
    )
    numbers = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return assemble("pyrformer.report", f"{esc(title)} – pyrformer", body, numbers)


_CURVES = (
    '<div class="controls"><div id="legend"></div>'
    '<label>smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0">'
    '<output id="smoothed">0.00</output></label>'
    '<label><input id="log-y" type="checkbox"> log y</label>'
    '<label><input id="log-x" type="checkbox"> log x</label></div>'
    f'<div id="charts"></div><noscript><p>Curves need JavaScript.</p></noscript><p class="note">Smoothing is an '
    "exponential mean, corrected for its start; the raw curve stays behind it. Dots are measured on held-out text. Of "
    f"more than {POINTS:,} points, the least and the greatest of each stretch are shown.</p>"
)


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart; a run given twice is numbered."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in paths]
    return [n if names.count(n) == 1 else f"{n} ({names[:i].count(n) + 1})" for i, n in enumerate(names)]


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """[steps, values]: at most :data:`POINTS`, six digits each; the first, the last and all extremes stay."""
    if len(points) > POINTS:
        stretches, inner = POINTS // 2 - 1, points[1:-1]
        kept = [points[0]]
        for i in range(stretches):
            part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
            kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
        points = [*kept, points[-1]]
    return [[step for step, _ in points], [float(f"{value:.6g}") for _, value in points]]


def _summaries(names: list[str], records: list[Record]) -> str:
    """What ``pyrformer runs`` says, as a table."""
    head = [
        "run",
        "family",
        "parameters",
        "step",
        "state",
        "last loss",
        "best held-out loss",
        "tokens",
        "seconds",
    ]
    rows = []
    for i, (name, record) in enumerate(zip(names, records, strict=True)):
        s = record.summary(name)
        cells = [
            *(s.family or "?", _count(s.parameters), f"{s.step:,} / {_count(s.steps)}", s.state),
            *(_loss(s.loss), _loss(s.best), _count(s.tokens), f"{s.seconds:,.1f}"),
        ]
        marked = f'<th scope="row"><i class="key c{i}"></i>{esc(name)}</th>'
        rows.append(f"<tr>{marked}{''.join(f'<td>{esc(cell)}</td>' for cell in cells)}</tr>")
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return _framed(columns, rows, ' id="runs"')


def _options(names: list[str], records: list[Record]) -> str:
    """Options and model fields: those that differ, and all of them behind a fold."""
    every = [{**_flat("", r.options), **_flat("config.", r.model)} for r in records]
    if len(records) > 1:
        shown = [{k: v for k, v in one.items() if k.split(".")[0] not in ASIDE} for one in every]
        keys = [k for k in _keys(shown) if len({_text(one.get(k)) for one in shown}) > 1]
        note = "Options and fields of <code>config.json</code> that differ between the runs."
    else:
        keys = [k for k in _keys(every) if _changed(k, every[0][k])]
        note = "Options other than their defaults."
    first = _table(f'<p class="note">{note}</p>', names, every, keys)
    return f"{first}<details><summary>All options</summary>{_table('', names, every)}</details>"


def _samples(names: list[str], records: list[Record]) -> str:
    """For each prompt a table of its texts, the newest first: a row for each step, a column for each run."""
    told: dict[str, dict[int, dict[int, str]]] = {}
    for i, record in enumerate(records):
        for row in record.samples:
            prompt, text = row.get("prompt"), row.get("text")
            if isinstance(prompt, str) and isinstance(text, str):
                told.setdefault(prompt, {}).setdefault(row["step"], {})[i] = text
    with_samples = [i for i, record in enumerate(records) if record.samples]
    head = "".join(f'<th scope="col"><i class="key c{i}"></i>{esc(names[i])}</th>' for i in with_samples)
    parts = []
    for number, (prompt, by_step) in enumerate(told.items()):
        rows = []
        for step in reversed(_spread(sorted(by_step), SAMPLES_SHOWN)):
            texts = by_step[step]
            cells = "".join(f"<td>{esc(texts.get(i, '–'))}</td>" for i in with_samples)
            rows.append(f'<tr><th scope="row">{step:,}</th>{cells}</tr>')
        table = _framed(f'<th scope="col">step</th>{head}', rows, ' class="texts"')
        opened = "" if number else " open"
        parts.append(f"<details{opened}><summary>{esc(prompt)}</summary>{table}</details>")
    return "".join(parts)


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many of an ascending list, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)]


def _changed(key: str, value: object) -> bool:
    """Whether an option is given and not its default."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    field = fields.get(key)
    if field is None:
        return not key.startswith("config.")
    empty = field.default_factory is not dataclasses.MISSING and value in ([], {})
    return not empty and value != field.default


def _flat(prefix: str, value: dict[str, Any]) -> dict[str, Any]:
    """Nested objects with their keys joined by dots."""
    out: dict[str, Any] = {}
    for key, one in value.items():
        out |= _flat(f"{prefix}{key}.", one) if isinstance(one, dict) and one else {f"{prefix}{key}": one}
    return out


def _keys(tables: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table))


def _table(before: str, names: list[str], tables: list[dict[str, Any]], keys: list[str] | None = None) -> str:
    """A row for each key, a column for each run; values that are not the first run's are marked."""
    keys = _keys(tables) if keys is None else keys
    if not keys:
        return f'{before}<p class="note">None.</p>'
    head = "".join(
        f'<th scope="col"><i class="key c{i}"></i>{esc(name)}</th>' for i, name in enumerate(names)
    )
    rows = []
    for key in keys:
        values = [_text(table.get(key)) for table in tables]
        cells = "".join(f"<td{_mark(value != values[0])}>{esc(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{esc(key)}</th>{cells}</tr>')
    return before + _framed(f"<th></th>{head}", rows)


def _framed(head: str, rows: list[str], attributes: str = "") -> str:
    """A table that scrolls sideways where it is too wide."""
    table = f"<table{attributes}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _mark(other: bool) -> str:
    return ' class="other"' if other else ""


def _text(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
