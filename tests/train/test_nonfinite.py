"""Updates whose loss or gradient is no finite number: named, kept, made again, left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from recipes import OBJECTIVES, TEXT, write_text

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.training.comm import Alone
from pyrformer.training.failure import Failure, examine, replay
from pyrformer.training.passes import Passes, Update
from pyrformer.training.trainer import Trainer

SENTENCES = "".join(f"the cat sat on mat {i}. the dog lay by the door. it was late.\n\n" for i in range(24))
#: Besides the recipes: rotary positions and gated layers.
MORE: dict[str, dict[str, Any]] = {
    "llama": {
        "objective": "ar",
        "model": {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "tokenizer": {"kind": "char"},
    },
}


def config(tmp_path: Path, name: str = "ar", out: str = "run", **more: Any) -> pf.TrainConfig:
    text = tmp_path / ("rows.jsonl" if name in ("sentence", "tokens") else "text.txt")
    if not text.exists():
        write_text(tmp_path, name)
        if name == "mlm+nsp":
            text.write_text(SENTENCES, encoding="utf-8")
    small = {
        "seq_len": 32,
        "batch_size": 4,
        "max_steps": 10,
        "warmup_steps": 1,
        "save_every": 2,
        "log_every": 1,
    }
    given = {**small, **{**OBJECTIVES, **MORE}[name], **more}
    return pf.TrainConfig(files=[str(text)], out=str(tmp_path / out), **given)


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the gradient of one update infinite."""
    ready = Passes.ready

    def poisoned(self: Passes, batch: Any, draw: int, update: Update) -> Any:
        program, inputs = ready(self, batch, draw, update)
        if update.step == step:
            inputs["loss_scale"] = np.inf
        return program, inputs

    monkeypatch.setattr(Passes, "ready", poisoned)


def weights(run: pf.Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_operation_the_layer_and_the_documents_are_named(tmp_path: Path, parts: int) -> None:
    """Weights of 1e25 overflow where the first of them are multiplied, which is in the first layer."""
    options = {"learning_rate": 1e25, "max_grad_norm": 0.0, "warmup_steps": 0, "save_every": 1}
    files = tmp_path / "many.jsonl"
    files.write_text("".join(json.dumps({"text": f"{i}: {TEXT[:90]}"}) + "\n" for i in range(30)))
    given = dataclasses.replace(
        config(tmp_path, gradient_accumulation_steps=parts, **options), files=[str(files)]
    )
    with pytest.raises(
        pf.Error, match=r"in h\.0.* made .* not finite from .*documents \d+, \d+.*replay"
    ) as caught:
        pf.train(given)
    folder = tmp_path / "run" / "failed-step-2"
    assert str(folder) in str(caught.value)
    facts = json.loads((folder / "failure.json").read_text("utf-8"))
    lines = files.read_text("utf-8").splitlines()
    for row in facts["rows"]:
        # The row begins inside of its first document; the others begin with their numbers.
        assert row["text"][0] in json.loads(lines[row["documents"][0]])["text"]
        for document in row["documents"][1:]:
            assert f"{document}: "[: len(row["text"])] in row["text"] + ": "
    assert {row["batch"] for row in facts["rows"]} == set(range(parts))
    # The update changed nothing: what is kept is what the checkpoint before holds.
    kept, before = (f / "model.safetensors" for f in (folder, tmp_path / "run" / "checkpoint-1"))
    assert kept.read_bytes() == before.read_bytes()

    found, _ = replay(tmp_path / "run")
    assert found is not None
    assert dataclasses.asdict(found) == facts["finding"]
    assert found.layer.startswith("h.0")
    assert all(v.nonfinite == 0 for v in found.inputs)
    assert any(v.nonfinite > 0 for v in found.outputs)
    assert replay(folder, threads=2)[0] == found

    files.unlink()  # nothing but the folder is needed
    shown = CliRunner().invoke(main, ["replay", str(tmp_path / "run")])
    assert shown.exit_code == 0
    assert found.operation in shown.output
    assert "not finite" in shown.output
    as_json = CliRunner().invoke(main, ["replay", str(folder), "--json"])
    assert json.loads(as_json.stdout)["finding"] == facts["finding"]


@pytest.mark.parametrize("parts", [1, 2])
def test_leaving_out_and_going_back_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    plain = pf.train(config(tmp_path, out="plain", gradient_accumulation_steps=parts))
    poison(monkeypatch, 5)
    notes: list[str] = []
    runs = {
        what: pf.train(
            config(tmp_path, out=what, on_nonfinite=what, gradient_accumulation_steps=parts, save_every=4),
            lambda kind, n: notes.append(n["what"]) if kind == "note" else None,
        )
        for what in ("skip", "rollback")
    }
    assert weights(runs["skip"]) == weights(runs["rollback"]) != weights(plain)
    assert [n.split(";")[-1].strip() for n in notes] == ["going on without update 6"] * 2
    # A run that goes on from before the update leaves it out, too.
    folder = tmp_path / "skip"
    assert (folder / "failed-step-6").is_dir()
    with pytest.raises(pf.Error, match="loss_scale, which"):
        pf.train(config(tmp_path, out="stop", gradient_accumulation_steps=parts, save_every=4))
    assert (
        pf.train(
            config(
                tmp_path,
                out="stop",
                on_nonfinite="skip",
                resume=True,
                gradient_accumulation_steps=parts,
                save_every=4,
            )
        ).steps
        == 10
    )
    assert (tmp_path / "stop" / "model.safetensors").read_bytes() == weights(runs["skip"])


def test_too_many_in_a_row_stop(tmp_path: Path) -> None:
    options = {"learning_rate": 1e25, "max_grad_norm": 0.0, "warmup_steps": 0}
    with pytest.raises(pf.Error, match="step 7"):
        pf.train(config(tmp_path, on_nonfinite="skip", **options))
    assert [p.name for p in (tmp_path / "run").glob("failed-step-*")] == ["failed-step-7"]


@pytest.mark.parametrize("name", [*OBJECTIVES, *MORE])
def test_nothing_is_found_in_a_sound_update(tmp_path: Path, name: str) -> None:
    run = Trainer(config(tmp_path, name), lambda _kind, _numbers: None, (), Alone())
    batches = [(i, run.batches.ready(i)) for i in range(1)]
    labels = sum(b.labels for _, b in batches), sum(b.sentence_labels for _, b in batches)
    update = Update(0, 0, 1e-3, run.updates.passes.counts(*labels))
    assert examine(run.updates.passes, Failure(update, batches, [])) is None
    # And each row's documents are known.
    documents = run.batches.documents(0)
    assert len(documents) == len(batches[0][1].arrays["input_ids"])


def test_spoiled_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last update makes the weights no numbers; its own loss and gradient are finite."""
    rate = pf.TrainConfig.rate
    monkeypatch.setattr(pf.TrainConfig, "rate", lambda c, step: np.nan if step == 3 else rate(c, step))
    with pytest.raises(pf.Error, match=r"after update 4 .*not finite; it is not saved"):
        pf.train(config(tmp_path, max_steps=4))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(np.isfinite(v).all() for v in pf.load(tmp_path / "run").state_dict().values())


@pytest.mark.parametrize("broken", ["no failure", "no weights", "no json", "other json", "cut batch"])
def test_replay_refuses(tmp_path: Path, broken: str) -> None:
    run = tmp_path / "run"
    if broken == "no failure":
        pf.train(config(tmp_path, max_steps=1))
    else:
        with pytest.raises(pf.Error):
            pf.train(config(tmp_path, learning_rate=1e25, max_grad_norm=0.0, warmup_steps=0))
        folder = run / "failed-step-2"
        if broken == "no weights":
            (folder / "model.safetensors").unlink()
        elif broken == "no json":
            (folder / "failure.json").unlink()
        elif broken == "other json":
            (folder / "failure.json").write_text('{"step": 2, "config": {"files": 1}}')
        else:
            cut = (folder / "batch.safetensors").read_bytes()[:-3]
            (folder / "batch.safetensors").write_bytes(cut)
    shown = CliRunner().invoke(main, ["replay", str(run)])
    assert shown.exit_code == 2, shown.output
    assert "pyrformer: error: " in shown.output
    assert "Traceback" not in shown.output
