"""``pyrformer sample``: every option, prompts from files, and the views."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.generation.config import NAMES


@pytest.fixture(scope="module")
def run(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random model and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_text("the cat sat on the mat")
    tokenizer = pf.Tokenizer.train([folder / "text.txt"], kind="char", vocab_size=40)
    config = pf.load(fixtures / "models" / "gpt2").config
    config |= {"vocab_size": tokenizer.vocab_size, "eos_token_id": None, "bos_token_id": None}
    model = pf.Model.from_config(config, seed=3)
    model.tokenizer = tokenizer
    model.save(folder / "run")
    return str(folder / "run")


def sample(*args: Any, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["sample", *map(str, args)], env={"COLUMNS": "80"})
    assert done.exit_code == code, done.output
    return done


def test_every_option_of_the_config_is_an_option(run: str) -> None:
    options = set(re.findall(r"--([a-z-]+)", sample("--help").output))
    assert {name.replace("_", "-") for name in NAMES} <= options


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["--num-beams", "3", "--early-stopping", "never"], {"num_beams": 3, "early_stopping": "never"}),
        (["--greedy", "--suppress-tokens", "[1, 2]"], {"suppress_tokens": [1, 2]}),
        (
            ["--num-beams", "4", "--force-words-ids", "[[[2], [3]], [1]]", "--ordered-constraints"],
            {"num_beams": 4, "force_words_ids": [[[2], [3]], [1]], "ordered_constraints": True},
        ),
        (["--penalty-alpha", "0.6", "--top-k", "4"], {"penalty_alpha": 0.6, "top_k": 4}),
        (["--typical-p", "0.5", "--seed", "3"], {"do_sample": True, "typical_p": 0.5, "temperature": 0.8, "seed": 3}),
        (["--greedy", "--stop-strings", "t", "--stop-strings", "a"], {"stop_strings": ["t", "a"]}),
        (["--greedy", "--prompt-lookup-num-tokens", "3"], {}),
        (["--stochastic-beams", "--beams", "3", "--temperature", "1"],
         {"do_sample": True, "stochastic_beams": True, "num_beams": 3}),
    ],
)  # fmt: skip
def test_options_mean_what_they_mean_in_python(run: str, args: list[str], options: dict[str, Any]) -> None:
    row = json.loads(sample(run, "the ", "--max-new-tokens", 9, "--json", *args).stdout)
    want = pf.load(run).generate("the ", max_new_tokens=9, **options)
    assert row["ids"] == want.ids[0]
    assert row["token_logprobs"] == pytest.approx(want.token_logprobs[0])
    assert row["finish_reason"] == want.finish_reasons[0]


def test_prompts_of_a_file(run: str, tmp_path: Path) -> None:
    lines = ["the cat", "a", "on the m", "cat", "he"]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"ask": line}) + "\n" for line in lines))
    options = ["--max-new-tokens", 6, "-n", 2, "--seed", 4]
    plain = sample(run, "--prompts", tmp_path / "p.txt", *options).stdout
    outputs = [
        sample(
            run, "--prompts", tmp_path / "p.jsonl", "--column", "ask", "--batch-size", size, *options
        ).stdout
        for size in (1, 2, 8)
    ]
    assert outputs[0] != ""
    rows = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    assert [row["prompt"] for row in rows[0]] == [line for line in lines for _ in range(2)]
    for row in rows[0]:
        assert row["prompt"] + row["text"] in plain
    assert [[r["ids"] for r in part] for part in rows[1:]] == [[r["ids"] for r in rows[0]]] * 2
    command = [
        sys.executable,
        "-c",
        "from pyrformer.cli import main; main()",
        "sample",
        run,
        "--prompts",
        "-",
        "--json",
    ]
    piped = subprocess.run(
        [*command, *map(str, options)], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    assert [json.loads(line)["ids"] for line in piped.splitlines()] == [r["ids"] for r in rows[0]]


def test_prompts_go_on_where_they_were_ended(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["the cat", "a", "on the m", "cat", "he", "the", "mat"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts))
    options = [
        "--prompts",
        tmp_path / "p.jsonl",
        "--max-new-tokens",
        5,
        "-n",
        2,
        "--seed",
        4,
        "--batch-size",
        2,
    ]
    whole = sample(run, *options).stdout
    generate, calls = pf.Model.generate, []

    def counted(self: pf.Model, given: Any, *rest: Any, **more: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        return generate(self, given, *rest, **more)

    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(pf.Model, "generate", counted)
    assert CliRunner().invoke(main, ["sample", run, *map(str, options), "--out", str(out)]).exit_code == 130
    assert not out.exists()
    assert len((tmp_path / ".out.jsonl.partial").read_text().splitlines()) == 8
    monkeypatch.setattr(pf.Model, "generate", lambda *a, **k: (calls.append(a[1]), generate(*a, **k))[1])
    sample(run, *options, "--out", out)
    assert calls == [prompts[:2], prompts[2:4], prompts[4:6], prompts[6:]]
    assert out.read_text() == whole
    refused = CliRunner().invoke(main, ["sample", run, *map(str, options), "--out", str(out)])
    assert (refused.exit_code, "exists" in refused.output) == (2, True)


def test_the_tree_of_hypotheses(run: str, tmp_path: Path) -> None:
    options = ["--num-beams", 3, "-n", 2, "--max-new-tokens", 5]
    rows = [json.loads(line) for line in sample(run, "the ", *options, "--json").stdout.splitlines()]
    drawn = sample(run, "the ", *options, "--show-beams", "--html", tmp_path / "tree.html").stdout
    page = (tmp_path / "tree.html").read_text(encoding="utf-8")
    for rank, row in enumerate(rows, 1):
        assert f"#{rank} score {row['score']:.4f}" in drawn
        assert f"#{rank} score {row['score']:.4f}" in page
    assert "src=" not in page
    assert "<li class=lost>" in page
    # Each line: a run of text and its probability; those of siblings sum to at most 1.
    numbers = [float(x) for x in re.findall(r"─ \S.*?  ([\d.e-]+)", drawn)]
    assert numbers
    assert all(0 < p <= 1 for p in numbers)
    tops = [float(x) for x in re.findall(r"^[├└]── .*?  ([\d.e-]+)", drawn, re.M)]
    assert sum(tops) <= 1 + 1e-6


@pytest.mark.parametrize(
    "options", [["--top-k", "2"], ["--greedy"], ["--num-beams", "3"], ["--top-k", "3", "-n", "2"]]
)
def test_the_candidates_of_each_step(run: str, tmp_path: Path, options: list[str]) -> None:
    args = [run, "the ", "--max-new-tokens", 6, *options]
    shown = sample(*args, "--show-probs", "--html", tmp_path / "probs.html").stdout
    results = 2 if "-n" in options else 1
    steps = re.findall(r"^ +(\d)  (\S+) +([\d.]+) ", shown, re.M)
    assert [int(number) for number, _, _ in steps] == [1, 2, 3, 4, 5, 6] * results
    assert all(len(line) <= 80 for line in shown.splitlines())
    rows = [json.loads(line) for line in sample(*args, "--json").stdout.splitlines()]
    for row, at in zip(rows, (0, 6), strict=False):
        told = [float(p) for _, _, p in steps[at : at + 6]]
        assert told == pytest.approx([2.718281828**v for v in row["token_logprobs"]], abs=6e-4)
    page = (tmp_path / "probs.html").read_text(encoding="utf-8")
    assert page.count("class='c chosen") == 6 * results
    if "--top-k" in options:
        kept = int(options[1])
        first = page.split("<tr>")[2]
        assert first.count("<span class='c") - first.count(" cut'") == kept


def test_a_stored_config(run: str, tmp_path: Path) -> None:
    pf.GenerationConfig(num_beams=3, max_new_tokens=4).save(tmp_path / "g.json")
    row = json.loads(sample(run, "the", "--generation-config", tmp_path / "g.json", "--json").stdout)
    assert row["ids"] == pf.load(run).generate("the", num_beams=3, max_new_tokens=4).ids[0]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "PROMPT"),
        (["a", "--prompts", "-"], "PROMPT"),
        (["a", "--show-beams"], "--num-beams"),
        (["a", "--html", "x"], "--show"),
        (["a", "--greedy", "--top-k", "2"], "--top-k"),
        (["a", "--suppress-tokens", "[["], "JSON"),
        (["a", "--show-probs", "--html", "/no/such/place.html"], "cannot be written"),
    ],
)
def test_contradictions_are_usage_errors(run: str, args: list[str], named: str) -> None:
    assert named in sample(run, *args, code=2).output


def test_an_assistant_leaves_the_text_as_it_is(run: str, tmp_path: Path) -> None:
    model = pf.load(run)
    other = pf.Model.from_config(model.config, seed=9)
    other.save(tmp_path / "other")
    args = [run, "the ", "--greedy", "--max-new-tokens", 9, "--json"]
    plain, helped = sample(*args).stdout, sample(*args, "--assistant-model", tmp_path / "other").stdout
    assert json.loads(helped)["ids"] == json.loads(plain)["ids"]
