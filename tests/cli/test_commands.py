"""The installed command, run as users run it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = shutil.which("pyrformer", path=Path(sys.executable).parent) or shutil.which("pyrformer")
pytestmark = pytest.mark.skipif(COMMAND is None, reason="the pyrformer command is not installed")

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 60
SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--seq-len", "16", "--batch-size", "4"]
STEPS = ["--max-steps", "40", "--warmup-steps", "2", "--learning-rate", "1e-2", "--log-every", "1"]


def pyrformer(*args: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command; where it should fail, checks that it says so in one line."""
    assert COMMAND is not None
    command = [COMMAND, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(*args: object, cwd: Path | None = None) -> str:
    """The one line that a command refused with code 2 writes on standard error, after the stages that went well."""
    done = pyrformer(*args, code=2, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if not line.endswith("…")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pyrformer: error: ")
    assert done.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and two runs: ``gpt`` and ``bert``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    text = folder / "text.txt"
    done = pyrformer("train", text, "--out", folder / "gpt", "--tokenizer", "char", *SMALL, *STEPS)
    assert "trained 40 steps" in done.stdout
    assert "validation loss" in done.stderr
    masked = ["--objective", "mlm", "--tokenizer", "bert-uncased", "--vocab-size", "80"]
    pyrformer("train", text, "--out", folder / "bert", *masked, *SMALL, *STEPS)
    return folder


# ---- train ----------------------------------------------------------------------------------------------------------


def test_train_writes_a_run(folder: Path) -> None:
    names = {p.name for p in (folder / "gpt").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "checkpoint-40"} <= names
    config = json.loads((folder / "gpt" / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["n_layer"], config["n_embd"], config["n_head"]) == ("gpt2", 1, 16, 2)
    config = json.loads((folder / "bert" / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 1, 16)


def test_print_config(folder: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('[model]\nn_layer = 3\n[tokenizer]\nkind = "char"\n[train]\nbatch_size = 7\nseed = 5\n')
    args = ["train", folder / "text.txt", "--out", tmp_path / "run", "--config", toml, "--seed", "6"]
    printed = json.loads(pyrformer(*args, "--print-config").stdout)
    assert (printed["batch_size"], printed["seed"]) == (7, 6)  # flags override the file
    assert printed["model"]["n_layer"] == 3
    assert printed["tokenizer"] == {"kind": "char"}
    assert printed["max_steps"] == 1000  # a default
    assert not (tmp_path / "run").exists()


def test_vocab_size_alone_keeps_the_preset(folder: Path, tmp_path: Path) -> None:
    args = ["--objective", "mlm", "--vocab-size", "80", *SMALL, "--max-steps", "2"]
    pyrformer("train", folder / "text.txt", "--out", tmp_path / "run", *args)
    assert "[MASK]" in (tmp_path / "run" / "tokenizer.json").read_text("utf-8")


def test_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "gpt", run)
    args = ["train", folder / "text.txt", "--out", run, "--tokenizer", "char", *SMALL, *STEPS]
    pyrformer(*args, "--resume", "--max-steps", "50")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(steps) == 50
    again = refused(*args)
    assert "--resume" in again
    assert "--overwrite" in again


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_and_resume(folder: Path, tmp_path: Path, number: int, code: int) -> None:
    """A signal in the middle of a step saves, and going on gives the bits of a run that nobody disturbed."""
    assert COMMAND is not None
    args = ["train", folder / "text.txt", "--tokenizer", "char", *SMALL, *STEPS]
    args += ["--width", "48", "--layers", "2", "--batch-size", "32"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    pyrformer(*args, "--out", straight)
    process = subprocess.Popen(
        [COMMAND, *map(str, args), "--out", str(parts)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        metrics = parts / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text("utf-8").count("\n") >= 4):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert errors.splitlines()[-1].startswith("pyrformer: interrupted after step ")
    assert "Traceback" not in errors
    state = json.loads(next(parts.glob("checkpoint-*/trainer_state.json")).read_text("utf-8"))
    assert 4 <= state["step"] < 40
    pyrformer(*args, "--out", parts, "--resume")
    assert (parts / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


# ---- sample ---------------------------------------------------------------------------------------------------------


def test_sample_is_reproducible(folder: Path) -> None:
    run = folder / "gpt"

    def sample(*options: object) -> str:
        return pyrformer("sample", run, "the ", "--max-new-tokens", 40, *options).stdout

    greedy = sample("--greedy")
    assert greedy == sample("--greedy")
    assert greedy.startswith("the ")
    assert len(greedy) == len("the ") + 40 + 1
    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample("--top-k", 1) == greedy
    assert sample("--seed", 4, "--threads", 1) == sample("--seed", 4, "--threads", 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--beams", "3"],
        ["--beams", "3", "--length-penalty", "2", "-n", "2"],
        ["--top-p", "0.9"],
        ["--top-k", "5", "--temperature", "0.7"],
        ["--min-p", "0.1", "--repetition-penalty", "1.2"],
        ["--greedy", "--no-repeat-ngram-size", "3"],
        ["-n", "3"],
    ],
    ids=" ".join,
)
def test_sample_as_json(folder: Path, options: list[str]) -> None:
    done = pyrformer("sample", folder / "gpt", "the ", "--max-new-tokens", 12, "--json", *options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (int(options[options.index("-n") + 1]) if "-n" in options else 1)
    for row in rows:
        assert row["prompt"] == "the "
        assert len(row["ids"]) == len(row["text"]) == 12  # one character, one token
    plain = pyrformer("sample", folder / "gpt", "the ", "--max-new-tokens", 12, *options).stdout
    assert all("the " + row["text"] in plain for row in rows)


def test_stream_is_what_generate_gives(folder: Path) -> None:
    """What is printed piece by piece is the text that comes at once."""
    options = ["--max-new-tokens", "30", "--seed", "3"]
    streamed = pyrformer("sample", folder / "gpt", "the cat", *options).stdout
    whole = json.loads(pyrformer("sample", folder / "gpt", "the cat", "--json", *options).stdout)
    assert streamed == "the cat" + whole["text"] + "\n"


# ---- fill-mask, plan ------------------------------------------------------------------------------------------------


def test_fill_mask(folder: Path) -> None:
    text = "the [MASK] sat on the [MASK]"
    done = pyrformer("fill-mask", folder / "bert", text, "--top-k", 3, "--json")
    masks = json.loads(done.stdout)
    assert [len(m) for m in masks] == [3, 3]
    for proposals in masks:
        assert [p["score"] for p in proposals] == sorted((p["score"] for p in proposals), reverse=True)
    plain = pyrformer("fill-mask", folder / "bert", text, "--top-k", 3).stdout
    assert len(plain.splitlines()) == 2 + 6
    assert "mask 1" in plain


@pytest.mark.parametrize("program", ["train_step", "forward", "evaluate", "decode_step"])
@pytest.mark.parametrize("run", ["gpt", "bert"])
def test_plan(folder: Path, run: str, program: str) -> None:
    args = ["plan", folder / run, "--program", program, "--batch", 2, "--seq", 8]
    if run == "bert" and program == "decode_step":
        assert "decode_step" in pyrformer(*args, code=2).stderr
        return
    table = pyrformer(*args).stdout
    assert f"{program} of [2, 8]" in table
    assert "attention" in table
    plan = json.loads(pyrformer(*args, "--json").stdout)
    assert isinstance(plan, dict)
    assert "attention" in pyrformer(*args, "--graph").stdout


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("aaaa")
    (tmp_path / "broken.jsonl").write_text("{}\n{\n")
    for name in ("nowhere.txt", "empty.txt", "latin1.txt", "broken.jsonl"):
        assert name in refused("train", name, "--out", "run", "--tokenizer", "char", *SMALL, cwd=tmp_path)
    refused("train", "short.txt", "--out", "run", "--tokenizer", "char", *SMALL, cwd=tmp_path)
    assert not (tmp_path / "run").exists()
    args = ["train", "latin1.txt", "--out", "run", "--tokenizer", "char", *SMALL, "--max-steps", 2]
    pyrformer(*args, "--errors", "replace", cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tokenizer", "bpe", "--vocab-size", "10"], "vocab"),
        (["--tokenizer", "wordpiece", "--vocab-size", "8"], "vocab"),
        (["--tokenizer", "nowhere/tokenizer.json"], "nowhere"),
        (["--family", "gpt9"], "gpt9"),
        (["--width", "15"], "head"),
        (["--objective", "mlm", "--family", "gpt2"], "mlm"),
        (["--lr-scheduler-type", "zigzag"], "zigzag"),
        (["--clean", "soap"], "soap"),
        (["--batch-size", "0"], "batch_size"),
        (["--max-steps", "-1"], "max_steps"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--resume"], "resume"),
        (["--resume", "--overwrite"], "overwrite"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_bad_options(folder: Path, tmp_path: Path, options: list[str], named: str) -> None:
    text = folder / "text.txt"
    small = ["--layers", "1", "--width", "16", "--heads", "2", "--seq-len", "16", "--max-steps", "2"]
    assert named in refused("train", text, "--out", "run", *small, *options, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("[train]\nbatchsize = 4\n", "batchsize"),
        ("[model]\nn_layers = 4\n", "n_layers"),
        ("[tokenizer]\nsize = 4\n", "size"),
        ("[trainer]\nseed = 4\n", "trainer"),
        ("[train\n", "run.toml"),
        ("seed = 4\n", "seed"),
        ("train = 4\n", "train"),
        ("model = 4\n", "model"),
        ("[train]\nbatch_size = 'four'\n", "batch_size"),
        ("[train]\nfiles = 'text.txt'\n", "files"),
        ("[train]\nobjective = 3\n", "objective"),
        ("[tokenizer]\nvocab_size = 'many'\n", "vocab_size"),
        ("[model]\nvocab_size = 'many'\n", "vocab_size"),
        ("[model]\nn_layer = 'two'\n", "n_layer"),
    ],
    ids=lambda x: x.strip() if "\n" in x else x,
)
def test_bad_toml(folder: Path, tmp_path: Path, toml: str, named: str) -> None:
    (tmp_path / "run.toml").write_text(toml)
    files = [] if "files" in toml else [folder / "text.txt"]
    args = ["train", *files, "--out", "out", "--config", "run.toml", "--seq-len", "16", "--max-steps", "2"]
    assert named in refused(*args, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    "command", [["sample", "{}", "the"], ["fill-mask", "{}", "the [MASK]"], ["plan", "{}"]]
)
def test_bad_runs(folder: Path, tmp_path: Path, command: list[str]) -> None:
    def at(run: Path) -> list[str]:
        return [part.format(run) for part in command]

    assert "nowhere" in refused(*at(tmp_path / "nowhere"))
    (tmp_path / "hollow").mkdir()
    assert "hollow" in refused(*at(tmp_path / "hollow"))
    source = folder / ("bert" if command[0] == "fill-mask" else "gpt")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        broken = tmp_path / name.partition(".")[0]
        shutil.copytree(source, broken)
        file = broken / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert name in refused(*at(broken))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["sample", "gpt", "the ", "--top-p", "1.5"], "top_p"),
        (["sample", "gpt", "the ", "--temperature", "-1"], "temperature"),
        (["sample", "gpt", "the ", "--beams", "0"], "num_beams"),
        (["sample", "gpt", "the ", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["sample", "gpt", "the ", "--max-new-tokens", "0"], "max_new_tokens"),
        (["sample", "gpt", "the ", "--greedy", "-n", "2"], "num_return_sequences"),
        (["sample", "gpt", "the ", "-n", "0"], "num_return_sequences"),
        (["sample", "gpt", "the " * 50], "positions"),
        (["sample", "gpt", "QQQ"], "Q"),
        (["sample", "bert", "the [MASK]", "--top-p", "2"], "top_p"),
        (["sample", "bert", "the [MASK]", "--iterations", "0"], "iterations"),
        (["fill-mask", "gpt", "the cat"], "generate"),
        (["fill-mask", "bert", "the cat"], "MASK"),
        (["fill-mask", "bert", "the [MASK]", "--top-k", "0"], "top_k"),
        (["fill-mask", "bert", "[MASK] cat " * 500], "positions"),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else x,
)
def test_bad_requests(folder: Path, args: list[str], named: str) -> None:
    assert named in refused(*args, cwd=folder)


@pytest.mark.parametrize(
    "args",
    [
        ["dance"],
        ["train"],
        ["train", "text.txt"],
        ["sample", "gpt"],
        ["sample", "gpt", "the ", "--greedy", "--top-k", "3"],
        ["sample", "gpt", "the ", "--top-k", "three"],
        ["sample", "gpt", "the ", "--threads", "-1"],
        ["plan", "gpt", "--seq", "100000"],
        ["plan", "gpt", "--program", "dream"],
    ],
    ids=" ".join,
)
def test_wrong_usage(folder: Path, args: list[str]) -> None:
    """Usage errors are click's: the usage, and one line that starts with "Error:"."""
    done = pyrformer(*args, code=2, cwd=folder)
    assert sum(line.startswith("Error:") for line in done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_help_and_version() -> None:
    listed = pyrformer("--help").stdout
    for command in ("train", "sample", "fill-mask", "plan"):
        assert command in listed
        assert pyrformer(command, "--help").stdout.startswith("Usage: ")
    assert pyrformer("--version").stdout.startswith("pyrformer ")


def test_a_batch_is_shown_with_the_masks_of_its_objective(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer = tmp_path / "tokenizer.json"
    pyrformer(
        "tokenizer",
        "train",
        tmp_path / "a.txt",
        "--kind",
        "wordpiece",
        "--vocab-size",
        80,
        "--out",
        tokenizer,
    )
    command = ["data", "show", tmp_path / "a.txt", "--tokenizer", tokenizer, "--seq-len", 16]
    masked = pyrformer(*command, "--objective", "mlm", "--span-p", 0.3).stdout
    assert "[" in masked
    # Lines are cut between tokens.
    assert all(line.rstrip().endswith(("·", "padding")) for line in masked.splitlines()[1:])
    assert "--span-p" in refused(*command, "--span-p", 0.3)
