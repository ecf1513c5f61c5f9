"""What a run tells while it goes on: callbacks, event files, texts by the model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from recipes import OBJECTIVES, SMALL, TEXT

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.report import report

PROMPTS = {"ar": ["the cat", "a dog"], "mlm": ["the [MASK] sat on [MASK] mat"]}


def config(tmp_path: Path, name: str = "ar", out: str = "run", **more: Any) -> pf.TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    given = {**SMALL, "save_every": 4, "eval_every": 6, **OBJECTIVES[name], **more}
    return pf.TrainConfig(files=[str(text)], out=str(tmp_path / out), **given)


def rows(run: pf.Run, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text("utf-8").splitlines()]


def weights(run: pf.Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


# -- Callbacks ------------------------------------------------------------------------------------------------------


class Everything:
    """Notes all that a callback is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def log(self, data: dict[str, Any], step: int) -> None:
        assert data["step"] == step
        self.told.append(("log", step))

    def on_evaluate(self, step: int, numbers: dict[str, Any]) -> None:
        self.told.append(("evaluate", (step, numbers["valid_loss"])))

    def on_sample(self, step: int, samples: list[dict[str, str]]) -> None:
        self.told.append(("sample", (step, [s["prompt"] for s in samples])))

    def on_save(self, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.told.append(("save", step))

    def on_end(self, numbers: dict[str, Any]) -> None:
        self.told.append(("end", numbers["steps"]))


def test_callbacks_are_told_everything(tmp_path: Path) -> None:
    callback = Everything()
    run = pf.train(config(tmp_path, sample_prompts=["the cat"]), callbacks=[callback])
    of = {kind: [what for k, what in callback.told if k == kind] for kind, _ in callback.told}
    assert of["log"] == [row["step"] for row in rows(run)]
    assert of["evaluate"] == [(row["step"], row["valid_loss"]) for row in rows(run) if "valid_loss" in row]
    assert of["sample"] == [(12, ["the cat"])]
    assert of["save"] == [4, 8, 12]
    assert of["end"] == [12]
    assert callback.told[-1] == ("end", 12)


def test_a_failing_callback_leaves_a_resumable_run(tmp_path: Path) -> None:
    class Fails(Everything):
        def on_evaluate(self, step: int, numbers: dict[str, Any]) -> None:
            raise RuntimeError("no connection")

    straight = pf.train(config(tmp_path, out="straight"))
    with pytest.raises(RuntimeError, match="no connection"):
        pf.train(config(tmp_path), callbacks=[Fails()])
    assert weights(pf.train(config(tmp_path, resume=True))) == weights(straight)


# -- Event files ----------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition: polynomial 0x1EDC6F41, bits reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            feedback = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 if feedback else 0)
    return ~crc & 0xFFFFFFFF


def unmasked(stored: int) -> int:
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer's message: numbers, bytes, or 4 or 8 raw bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at

    out: list[tuple[int, Any]] = []
    at = 0
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
            out.append((key >> 3, value))
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            assert key & 7 == 2
            size, at = varint(at)
        out.append((key >> 3, data[at : at + size]))
        at += size
    assert at == len(data)
    return out


def events(folder: Path) -> list[tuple[int, str, Any]]:
    """(step, tag, value) of all scalars in the order of the files, and (step, "start", None)."""
    out: list[tuple[int, str, Any]] = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            body = data[at + 12 : at + 12 + length]
            assert unmasked(struct.unpack_from("<I", data, at + 8)[0]) == crc32c(data[at : at + 8])
            assert unmasked(struct.unpack_from("<I", data, at + 12 + length)[0]) == crc32c(body)
            event = dict(fields(body))
            if at == 0:
                assert event[3] == b"brain.Event:2"
            elif 7 in event:
                assert fields(event[7]) == [(1, 1)]
                out.append((event[2], "start", None))
            else:
                for number, value in fields(event[5]):
                    assert number == 1
                    one = dict(fields(value))
                    out.append((event[2], one[1].decode(), struct.unpack("<f", one[2])[0]))
            at += length + 16
    return out


def test_crc() -> None:
    from pyrformer.training import tensorboard

    # RFC 3720, appendix B.4.
    assert tensorboard.crc32c(bytes(32)) == crc32c(bytes(32)) == 0x8A9136AA
    assert tensorboard.crc32c(bytes(range(32))) == 0x46DD794E


def test_event_files_hold_the_metrics(tmp_path: Path) -> None:
    run = pf.train(config(tmp_path, tensorboard=True, max_steps=130, eval_every=0))
    pf.train(config(tmp_path, tensorboard=True, max_steps=134, eval_every=0, resume=True))
    found = events(run.folder / "tensorboard")
    assert [step for step, tag, _ in found if tag == "start"] == [1, 131]
    values = {(step, tag): value for step, tag, value in found if tag != "start"}
    expected = {
        (
            row["step"],
            f"{'valid' if 'valid_loss' in row else 'train'}/{name.removeprefix('valid_')}",
        ): np.float32(v)
        for row in rows(run)
        for name, v in row.items()
        if name != "step"
    }
    assert values == expected
    assert (134, "valid/loss") in values


def test_tensorboard_itself_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pf.train(config(tmp_path, tensorboard=True))
    pf.train(config(tmp_path, tensorboard=True, max_steps=14, resume=True))
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    losses = {row["step"]: np.float32(row["loss"]) for row in rows(run) if "loss" in row}
    assert {e.step: np.float32(e.value) for e in board.Scalars("train/loss")} == losses
    assert [e.step for e in board.Scalars("valid/loss")] == [6, 12, 14]


# -- Samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_samples_change_no_bit(tmp_path: Path, name: str, ema: float) -> None:
    """Weights, optimizer and figures are those of a run without samples; the texts are those of its checkpoints."""
    prompts = PROMPTS[name]
    options: dict[str, Any] = {"ema_decay": ema, "save_total_limit": 0}
    plain = pf.train(config(tmp_path, name, out="plain", **options))
    run = pf.train(config(tmp_path, name, sample_every=4, sample_prompts=prompts, **options))
    assert weights(run) == weights(plain)
    for file in ("optimizer.safetensors", "model.safetensors"):
        assert (run.folder / "checkpoint-12" / file).read_bytes() == (
            plain.folder / "checkpoint-12" / file
        ).read_bytes()
    figures = [
        [{k: row.get(k) for k in ("step", "loss", "grad_norm", "valid_loss")} for row in rows(r)]
        for r in (plain, run)
    ]
    assert figures[0] == figures[1]

    told = rows(run, "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in told] == [(step, p) for step in (4, 8, 12) for p in prompts]
    model = pf.load(run.folder)
    for sample in told[-len(prompts) :]:
        if name == "ar":
            drawn = model.generate(prompts, max_new_tokens=64, do_sample=True, seed=0)
            assert sample["text"] == sample["prompt"] + drawn.texts[prompts.index(sample["prompt"])]
        else:
            assert sample["text"] == model.mask_predict(prompts).texts[0]
            assert "[MASK]" not in sample["text"]


def test_samples_go_on_with_the_run(tmp_path: Path) -> None:
    """What a killed process wrote after its checkpoint is cut off; a straight run's file is the same."""
    options: dict[str, Any] = {"sample_every": 3, "sample_prompts": ["the cat"]}
    straight = pf.train(config(tmp_path, out="straight", **options))
    run = pf.train(config(tmp_path, max_steps=8, **options))
    with (run.folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "prompt": "the cat", "text": "from nowhere"}\n{"step": 9, "pro')
    run = pf.train(config(tmp_path, resume=True, **options))
    steps = [s["step"] for s in rows(run, "samples.jsonl")]
    assert steps == [3, 6, 8, 9, 12]  # 8 was an end
    expected = {s["step"]: s["text"] for s in rows(straight, "samples.jsonl")}
    assert all(expected.get(s["step"], s["text"]) == s["text"] for s in rows(run, "samples.jsonl"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ar", {"sample_every": 3}, "sample_prompts"),
        ("ar", {"sample_prompts": [""]}, "0 tokens"),
        ("ar", {"sample_prompts": ["the cat " * 9]}, "positions"),
        ("ar", {"sample_prompts": ["☃"]}, "☃"),
        ("mlm", {"sample_prompts": ["the cat"]}, "mask"),
        ("ar", {"sample_prompts": "the"}, "sample_prompts"),
        ("ar", {"sample_every": -1, "sample_prompts": ["the"]}, "negative"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(pf.Error, match=message):
        pf.train(config(tmp_path, name, **options))
    assert not (tmp_path / "run").exists()


def test_samples_are_shown(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small = "--layers 1 --width 16 --heads 2 --seq-len 16 --batch-size 4 --max-steps 4 --tokenizer char"
    arguments = ["train", str(text), "--out", str(tmp_path / "run"), *small.split(), "--sample-every", "2"]
    arguments += ["--sample-prompt", "the <b>", "--tensorboard"]
    text.write_text(TEXT + "<b>", encoding="utf-8")
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "step 2: 'the <b>" in shown.output
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    page = report([tmp_path / "run"])
    assert 'id="samples"' in page
    assert page.count("the &lt;b&gt;") >= 3  # the prompt, and both texts
    assert "the <b>" not in page
