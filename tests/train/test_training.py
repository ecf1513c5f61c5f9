"""Training from files to a run folder: what is written, what is learnt, what is reproducible, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import GPT2, OBJECTIVES, TEXT
from safetensors.numpy import load_file

import pyrformer as pf


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def options(text: Path, out: Path, objective: str = "ar", **more: Any) -> dict[str, Any]:
    """The fields of a run of a few milliseconds a step."""
    small = {"seq_len": 16, "batch_size": 4, "max_steps": 6, "warmup_steps": 1, "log_every": 1, "seed": 3}
    return {"files": [str(text)], "out": str(out), **small, **OBJECTIVES[objective], **more}


def train(text: Path, out: Path, objective: str = "ar", **more: Any) -> pf.Run:
    return pf.train(pf.TrainConfig(**options(text, out, objective, **more)))


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_run_folder(text: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    config = pf.TrainConfig(**options(text, tmp_path / "run", eval_every=3, save_every=4))
    run = pf.train(config, lambda kind, _numbers: seen.append(kind))
    names = {p.name for p in run.folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "metrics.jsonl",
        "training.json",
        "tokens",
        "checkpoint-4",
        "checkpoint-6",
    }
    assert json.loads((run.folder / "config.json").read_text())["model_type"] == "gpt2"
    assert json.loads((run.folder / "training.json").read_text())["seq_len"] == 16
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "valid_loss" in row] == [3, 6]
    assert rows[-1]["valid_loss"] == run.valid_loss
    assert run.steps == 6
    assert run.folder == tmp_path / "run"
    assert (seen.count("step"), seen.count("eval"), seen.count("save")) == (6, 2, 2)
    assert (seen[0], seen[-1]) == ("stage", "end")


def test_the_run_opens_as_it_was_trained(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path / "run")
    loaded = pf.load(tmp_path / "run")
    ids = np.array([run.model.require_tokenizer().encode("the cat sat").ids])
    assert np.array_equal(run.model(ids).logits, loaded(ids).logits)
    one, two = (m.generate("the ", max_new_tokens=8).texts for m in (run.model, loaded))
    assert one == two


@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_loss_falls(text: Path, tmp_path: Path, objective: str) -> None:
    model = {**OBJECTIVES[objective]["model"]}
    model |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if objective == "ar" else {}
    run = train(text, tmp_path / "run", objective, model=model, max_steps=120, learning_rate=1e-2)
    first = losses(run.folder)[1]
    assert run.valid_loss < 0.6 * first
    vocab = run.model.require_tokenizer().vocab_size
    assert first == pytest.approx(np.log(vocab), rel=0.1)  # as good as guessing


class Stop:
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_resumed_is_straight(text: Path, tmp_path: Path, objective: str, accumulate: int) -> None:
    more = {"gradient_accumulation_steps": accumulate}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(text, straight, objective, **more)
    given = options(text, parts, objective, **more)
    with pytest.raises(KeyboardInterrupt):
        pf.train(pf.TrainConfig(**given), Stop(3))
    assert weights(parts) != weights(straight)
    run = pf.train(pf.TrainConfig(**given, resume=True))
    assert run.steps == 6
    assert weights(parts) == weights(straight)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (parts / "checkpoint-6" / name).read_bytes() == (straight / "checkpoint-6" / name).read_bytes()
    assert losses(parts) == losses(straight)


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adagrad", "lion", "adafactor", "muon"])
def test_every_optimizer_resumes_and_learns(text: Path, tmp_path: Path, optim: str) -> None:
    """With a running average, whose weights are saved, measured and resumed with the rest."""
    rate = {"sgd": 0.05, "adagrad": 0.05, "lion": 1e-3}.get(optim, 5e-3)
    more = {"optim": optim, "learning_rate": rate, "ema_decay": 0.5, "max_steps": 12, "eval_every": 4}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    run = train(text, straight, **more)
    given = options(text, parts, **more)
    with pytest.raises(KeyboardInterrupt):
        pf.train(pf.TrainConfig(**given), Stop(5))
    again = pf.train(pf.TrainConfig(**given, resume=True))
    assert weights(parts) == weights(straight)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (parts / "checkpoint-12" / name).read_bytes() == (
            straight / "checkpoint-12" / name
        ).read_bytes()
    assert losses(parts) == losses(straight)
    assert again.valid_loss == run.valid_loss
    assert losses(straight)[12] < losses(straight)[1]
    # The run's model is the average: of the weights before and after the last update, of which it keeps half.
    saved = load_file(straight / "model.safetensors")
    last = load_file(straight / "checkpoint-12" / "model.safetensors")
    average = load_file(straight / "checkpoint-12" / "optimizer.safetensors")
    for name, value in saved.items():
        assert np.array_equal(value, average[f"ema.{name}"])
        assert np.array_equal(value, run.model.state_dict()[name])
    assert any(not np.array_equal(value, last[name]) for name, value in saved.items())


def test_the_best_average_is_kept(text: Path, tmp_path: Path) -> None:
    more = {"ema_decay": 0.9, "load_best_model_at_end": True, "eval_every": 2, "learning_rate": 0.5}
    run = train(text, tmp_path / "run", **more)
    saved, model = load_file(tmp_path / "run" / "model.safetensors"), run.model.state_dict()
    best = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text("utf-8"))[
        "best_step"
    ]
    average = load_file(tmp_path / "run" / f"checkpoint-{best}" / "optimizer.safetensors")
    assert all(np.array_equal(saved[n], average[f"ema.{n}"]) for n in saved)
    assert all(np.array_equal(saved[n], model[n]) for n in saved)


def test_early_stopping(text: Path, tmp_path: Path) -> None:
    """No evaluation is better by 100 nats than the one before: the first counts from infinity, two more end it."""
    more = {"max_steps": 40, "eval_every": 3, "early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    run = train(text, tmp_path / "run", **more)
    assert run.steps == 9
    again = train(text, tmp_path / "run", **more, resume=True)
    assert again.steps == 9
    given = options(text, tmp_path / "parts", **more)
    with pytest.raises(KeyboardInterrupt):
        pf.train(pf.TrainConfig(**given), Stop(7))
    assert pf.train(pf.TrainConfig(**given, resume=True)).steps == 9
    assert weights(tmp_path / "parts") == weights(tmp_path / "run")


@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_threads_do_not_matter(text: Path, tmp_path: Path, objective: str) -> None:
    runs = [train(text, tmp_path / str(threads), objective, threads=threads) for threads in (1, 2, 3)]
    assert len({weights(run.folder) for run in runs}) == 1
    assert len({(run.folder / "tokenizer.json").read_bytes() for run in runs}) == 1
    assert len({run.valid_loss for run in runs}) == 1


def test_seed_matters(text: Path, tmp_path: Path) -> None:
    one, two, again = (train(text, tmp_path / name, seed=s) for name, s in (("a", 1), ("b", 2), ("c", 1)))
    assert weights(one.folder) == weights(again.folder) != weights(two.folder)


def test_masked_model_fills_masks(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path / "run", "mlm", max_steps=150, learning_rate=1e-2)
    model = pf.load(tmp_path / "run")
    first, second = model.fill_mask("the cat [MASK] on the [MASK], and the dog", top_k=3)
    for proposals in (first, second):
        scores = [p.score for p in proposals]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1
    assert first[0].token_str in first[0].sequence


def test_jsonl_and_files_to_measure_on(tmp_path: Path) -> None:
    data, valid = tmp_path / "data.jsonl", tmp_path / "valid.jsonl"
    rows = [{"body": f"line {i}: the cat sat on the mat. " * 4, "n": i} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    valid.write_text("\n".join(map(json.dumps, rows[:3])) + "\n", encoding="utf-8")
    run = train(data, tmp_path / "run", column="body", valid=[str(valid)])
    assert np.isfinite(run.valid_loss)
    with pytest.raises(pf.Error, match="text"):
        train(data, tmp_path / "other")


def test_overwrite(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(text, out, seed=1)
    before = weights(out)
    train(text, out, seed=2, overwrite=True)
    assert weights(out) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(pf.Error, match="foreign"):
        train(text, foreign, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_failed_overwrite_keeps_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(text, out)
    before = weights(out)
    with pytest.raises(pf.Error):
        train(text, out, overwrite=True, seq_len=100_000)
    assert weights(out) == before


def test_replaced_bytes(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(TEXT.encode() + b"caf\xe9 " + TEXT.encode())
    with pytest.raises(pf.Error, match=str(len(TEXT) + 3)):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = train(path, tmp_path / "run", errors="replace")
    assert run.model.require_tokenizer().token_to_id("\N{REPLACEMENT CHARACTER}") is not None


#: What is given → what the message must name.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"files": ["nowhere.txt"]}, "nowhere.txt"),
    "empty file": ({"files": ["empty.txt"]}, "empty.txt"),
    "unknown kind of file": ({"files": ["table.parquet"]}, "table.parquet"),
    "not json": ({"files": ["broken.jsonl"]}, "broken.jsonl"),
    "no files": ({"files": []}, "file"),
    "missing valid": ({"valid": ["nowhere.txt"]}, "nowhere.txt"),
    "short text": ({"files": ["short.txt"]}, "seq_len|tokens"),
    "small vocabulary of bpe": ({"tokenizer": {"kind": "bpe", "vocab_size": 10}}, "vocab_size|vocabulary"),
    "small vocabulary of wordpiece": (
        {**OBJECTIVES["mlm"], "tokenizer": {"kind": "wordpiece", "vocab_size": 8}},
        "vocab_size|vocabulary",
    ),
    "small vocabulary of the model": ({"model": {**GPT2, "vocab_size": 5}}, "vocab_size"),
    "unknown family": ({"model": {"model_type": "gpt9"}}, "gpt9"),
    "unknown preset": ({"tokenizer": {"preset": "gpt9"}}, "gpt9"),
    "unknown kind": ({"tokenizer": {"kind": "syllables"}}, "syllables"),
    "unknown tokenizer option": ({"tokenizer": {"kind": "char", "size": 3}}, "size"),
    "missing tokenizer": ({"tokenizer": {"path": "nowhere.json"}}, "nowhere.json"),
    "unknown model option": ({"model": {**GPT2, "n_layers": 3}}, "n_layers"),
    "heads": ({"model": {**GPT2, "n_embd": 15}}, "n_head"),
    "no layers": ({"model": {**GPT2, "n_layer": 0}}, "n_layer"),
    "wrong type": ({"model": {**GPT2, "n_layer": "two"}}, "n_layer"),
    "objective of another family": ({"objective": "mlm"}, "mlm"),
    "unknown objective": ({"objective": "sop"}, "sop"),
    "unknown schedule": ({"lr_scheduler_type": "zigzag"}, "zigzag"),
    "unknown cleaning": ({"clean": ["soap"]}, "soap"),
    "unknown errors": ({"errors": "ignore"}, "ignore"),
    "no masks in the tokenizer": ({**OBJECTIVES["mlm"], "tokenizer": {"kind": "char"}}, "MASK"),
    "positions": ({"model": {**GPT2, "n_positions": 8}}, "positions"),
    "no steps": ({"max_steps": 0}, "max_steps"),
    "steps that are no number": ({"max_steps": "many"}, "max_steps"),
    "negative batch": ({"batch_size": -1}, "batch_size"),
    "learning rate": ({"learning_rate": float("nan")}, "learning_rate"),
    "probability": ({**OBJECTIVES["mlm"], "mlm_probability": 1.5}, "mlm_probability"),
    "dropout": ({"model": {**GPT2, "resid_pdrop": 1.5}}, "dropout|resid_pdrop"),
    "negative seed": ({"seed": -1}, "seed"),
    "out under a file": ({"out": "short.txt/run"}, "short.txt"),
    "out is a file": ({"out": "short.txt"}, "short.txt"),
    "nothing to resume": ({"resume": True}, "run"),
    "resume and overwrite": ({"resume": True, "overwrite": True}, "overwrite"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("aaaa")
    Path("table.parquet").write_bytes(b"PAR1")
    Path("broken.jsonl").write_text('{"text": "the cat"}\n{"text": \n')
    before = sorted(tmp_path.rglob("*"))
    bad, named = BAD[name]
    with pytest.raises(pf.Error, match=named) as caught:
        pf.train(pf.TrainConfig(**{**options(text, Path("run")), **bad}))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("[")
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_an_existing_run_is_not_touched_unasked(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(text, out)
    before = weights(out)
    with pytest.raises(pf.Error, match="--resume"):
        train(text, out)
    with pytest.raises(pf.Error, match="learning_rate"):
        train(text, out, resume=True, learning_rate=0.5)
    assert weights(out) == before


def test_a_run_from_before_an_option_goes_on_with_its_default(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(text, out, max_steps=1)
    shutil.rmtree(out / "checkpoint-1")
    options = json.loads((out / "training.json").read_text("utf-8"))
    del options["bf16"]
    (out / "training.json").write_text(json.dumps(options), encoding="utf-8")
    with pytest.raises(pf.Error, match="another bf16"):
        train(text, out, max_steps=1, resume=True, bf16=True)
    assert train(text, out, max_steps=1, resume=True).steps == 1


def test_divergence_is_said(text: Path, tmp_path: Path) -> None:
    with pytest.raises(pf.Error, match="learning_rate"):
        train(text, tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, max_steps=20)
