"""The page of `pyrformer report`: it shows the runs' own figures, nothing breaks out of it, and a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyrformer.cli import main
from pyrformer.errors import FileError, InputError
from pyrformer.report import POINTS, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&'


class Page(HTMLParser):
    """The elements of a page, its tables by section, and its numbers."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.section, self.script = "", ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.data = json.loads(self.script)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.section = dict(attrs).get("id") or self.section if tag in ("section", "table") else self.section
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[self.section][-1][-1] += data
        if self.open[-1:] == ["script"] and not self.script:
            self.script = data


def make(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """A run folder as a run leaves it."""
    folder.mkdir(parents=True)
    facts = {"files": ["a.txt"], "max_steps": 100, "learning_rate": 1e-3, **options}
    (folder / "training.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(count: int, shift: float = 0.0) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        out.append(
            {"step": i, "loss": shift + 4 / i, "learning_rate": 1e-3 / i, "grad_norm": 1.0, "seconds": i / 10}
        )
        if i % 5 == 0:
            out.append({"step": i, "valid_loss": shift + 4.1 / i})
    return out


def test_the_numbers_are_the_runs_own(tmp_path: Path) -> None:
    page = Page(report([make(tmp_path / "a", rows(20)), make(tmp_path / "b", rows(10, 1.0))]))
    a, b = page.data["runs"]
    assert (a["name"], b["name"]) == ("a", "b")
    assert a["series"]["loss"][0] == list(range(1, 21))
    assert a["series"]["loss"][1] == [float(f"{4 / i:.6g}") for i in range(1, 21)]
    assert b["series"]["valid_loss"] == [[5, 10], [1.82, 1.41]]
    assert a["series"]["rss_bytes"] == [[], []]
    assert page.tables["runs"][1][:5] == ["a", "gpt2", page.tables["runs"][1][2], "20 / 100", "stopped"]


def test_differences(tmp_path: Path) -> None:
    first = make(tmp_path / "a", rows(3), out="a", lora={"r": 8}, data={"train_tokens": 7})
    second = make(
        tmp_path / "b", rows(3), out="b", learning_rate=3e-4, lora={"r": 4}, environment={"cpu": "x86"}
    )
    text = report([first, second])
    different = text[text.index('<section id="options">') : text.index("<details>")]
    assert [re.sub("<.*?>", "", row) for row in re.findall("<tr>(.*?)</tr>", different)[1:]] == [
        "learning_rate0.0010.0003",
        "lora.r84",
    ]
    assert different.count('class="other"') == 2
    page = Page(text)
    assert ["train_tokens", "7", "–"] in page.tables["text"]
    assert ["cpu", "–", "x86"] in page.tables["environment"]
    alone = Page(report([second])).tables["options"]
    assert ["learning_rate", "0.0003"] in alone[:4]
    assert ["max_steps", "100"] in alone[:4]


def test_nothing_breaks_out(tmp_path: Path) -> None:
    name = "<b>x" + "&'\""
    folder = make(
        tmp_path / name, rows(3), files=[EVIL], **{EVIL: EVIL}, data={EVIL: EVIL}, environment={EVIL: EVIL}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": EVIL}))
    page, plain = Page(report([folder])), Page(report([make(tmp_path / "plain", rows(3))]))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not [
        a for _, attributes in page.elements for a in attributes if a in ("src", "href") or a.startswith("on")
    ]
    assert [EVIL, EVIL] in page.tables["text"]
    assert page.tables["runs"][1][0] == name
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_it_needs_no_network(tmp_path: Path) -> None:
    text = report([make(tmp_path / "a", rows(3))])
    assert set(re.findall(r"[a-z]+://[^\"' )]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(#" in text
    assert not re.search(r"url\((?!#)", text)


def test_long_runs_are_thinned_and_keep_their_extremes(tmp_path: Path) -> None:
    many = [{"step": i, "loss": 2.0 + (i % 7) / 10} for i in range(1, 50001)]
    many[33333]["loss"], many[12345]["loss"] = 99.0, -5.0
    steps, values = Page(report([make(tmp_path / "a", many)])).data["runs"][0]["series"]["loss"]
    assert len(steps) == len(values) <= POINTS
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 50000)
    assert values[steps.index(33334)] == 99.0
    assert values[steps.index(12346)] == -5.0


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    one, two = make(tmp_path / "x" / "run", rows(2)), make(tmp_path / "y" / "run", rows(2))
    assert [r["name"] for r in Page(report([one, two])).data["runs"]] == ["x/run", "y/run"]
    assert [r["name"] for r in Page(report([one, one])).data["runs"]] == ["run (1)", "run (2)"]


def test_an_empty_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}])
    assert Page(report([folder])).data["runs"][0]["series"]["loss"] == [[], []]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"\[report\] .* has no training.json"):
        report([tmp_path])
    with pytest.raises(InputError, match="1 to 8 runs, got 9"):
        report([tmp_path] * 9)
    run = make(tmp_path / "a", rows(2))
    result = CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "no" / "r.html")])
    assert result.exit_code == 2
    assert result.stderr.startswith("pyrformer: error: [report] cannot write")
    result = CliRunner().invoke(main, ["report", str(run), "--out", "-"])
    assert result.exit_code == 0
    assert result.stdout == report([run])


@pytest.mark.skipif(BROWSER is None, reason="no chromium to draw the page")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"r{i}", rows(40, i)) for i in range(2)]
    probe = """<script>setTimeout(() => {
      const seen = {}, $ = (q) => document.querySelectorAll(q);
      seen.charts = $("figure").length; seen.curves = $("path.curve").length; seen.held = $("path.held").length;
      seen.drawn = $("path.curve")[0].getAttribute("d").split("L").length;
      const slider = $("#smoothing")[0]; slider.value = 0.5; slider.dispatchEvent(new Event("input"));
      seen.raw = $("path.raw").length;
      const places = (anchor) => [...$("svg")].map((s) => s.querySelectorAll(`text[text-anchor=${anchor}]`).length);
      seen.ticks = Math.min(...places("middle"), ...places("end")) > 1;
      $("#log-y")[0].click(); $("#log-x")[0].click();
      seen.strange = [...$("path")].filter((p) => /NaN|Infinity/.test(p.getAttribute("d"))).length;
      for (let i = 0; i < 2; i++) $("svg")[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      seen.tip = $(".tip")[0].hidden ? "" : [...$(".tip")[0].children].map((e) => e.textContent);
      $("#legend button")[0].click(); seen.left = $("figure.wide path.curve:not(.raw)").length;
      document.body.dataset.seen = JSON.stringify(seen);
    }, 300);</script></body>"""
    (tmp_path / "page.html").write_text(report(runs).replace("</body>", probe), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [
            *map(str, command),
            profile,
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search("data-seen='?\"?(.*?)\"?'?>", done.stdout)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert seen == {
        "charts": 3,
        "curves": 2 * 2 + 2 * 2,
        "held": 2,
        "drawn": 40,
        "raw": 4,
        "ticks": True,
        "strange": 0,
        "tip": [
            "step 2",
            "r0: 2, smoothed 2.6667",
            "r0, held out: 0.82 (step 5)",
            "r1: 3, smoothed 3.6667",
            "r1, held out: 1.82 (step 5)",
        ],
        "left": 2,
    }
