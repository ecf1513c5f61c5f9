"""`pf.train` on the pretended device: as on the CPU, in bfloat16, and when the device is lost in mid-run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sim.card import Card

import pyrformer as pf
from pyrformer.errors import ConfigError, DeviceError, NonFiniteError
from pyrformer.executors import cuda
from pyrformer.training import loss_scale, updates
from pyrformer.training.failure import replay
from pyrformer.training.loss_scale import LossScale
from pyrformer.training.passes import Passes, Update
from pyrformer.training.updates import Updates

LOST = "[cuda] the device failed: cudaErrorIllegalAddress; this process has lost it, start again"


class Mortal(Card):
    """A card that fails at one of its replays, and from then on."""

    def __init__(self, replays: int) -> None:
        super().__init__(None, 1 << 19)
        self.left = replays

    def replay(self, stream: Any, graph: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise DeviceError(LOST)
        super().replay(stream, graph)

    def download(self, stream: Any, host: np.ndarray, start: int) -> None:
        if self.left < 0:
            raise DeviceError(LOST)
        super().download(stream, host, start)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)

    def run(name: str, card: Card | None = None, on_event: Any = None, **options: Any) -> pf.Run:
        monkeypatch.setattr(cuda, "CudaDevice", lambda **_: card)
        monkeypatch.setattr(cuda, "require", lambda _: {})
        config: dict[str, Any] = {
            "files": [str(text)], "out": str(tmp_path / name), "tokenizer": {"kind": "char"}, "max_steps": 8,
            "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}, "batch_size": 2, "seq_len": 8,
            "save_every": 3, "device": "cuda" if card else "cpu",
        }  # fmt: skip
        return pf.train(pf.TrainConfig(**{**config, **options}), on_event)

    return run


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_follows_that_of_the_cpu(train: Any, tmp_path: Path) -> None:
    want, got, fast = (
        train("cpu"),
        train("gpu", Card(None, 1 << 19)),
        train("bf16", Card(None, 1 << 19), bf16=True),
    )
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(tmp_path / "cpu"), rtol=2e-2)
    assert got.valid_loss == pytest.approx(want.valid_loss, rel=1e-4)
    assert fast.valid_loss == pytest.approx(want.valid_loss, rel=2e-2)
    assert "bfloat16 on cuda" in repr(fast.model)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the gradient of one update infinite."""
    ready = Passes.ready

    def go(step: int) -> None:
        def poisoned(self: Passes, batch: Any, draw: int, update: Update) -> Any:
            program, inputs = ready(self, batch, draw, update)
            if update.step == step:
                inputs["loss_scale"] = np.inf
            return program, inputs

        monkeypatch.setattr(Passes, "ready", poisoned)

    return go


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_that_is_not_finite_is_found_kept_and_left_out(
    train: Any, poison: Any, tmp_path: Path, parts: int
) -> None:
    poison(4)
    options = {"gradient_accumulation_steps": parts, "save_every": 2}
    with pytest.raises(NonFiniteError, match=r"loss_scale, which .* was not finite before.*kept in"):
        train("stop", Card(None, 1 << 20), **options)
    stopped = tmp_path / "stop" / "failed-step-5"
    kept, before = (f / "model.safetensors" for f in (stopped, tmp_path / "stop" / "checkpoint-4"))
    assert kept.read_bytes() == before.read_bytes()
    runs = {
        what: train(what, Card(None, 1 << 20), on_nonfinite=what, **options) for what in ("skip", "rollback")
    }
    cpu = train("cpu", on_nonfinite="skip", **options)
    want, got, back = (run.model.state_dict() for run in (cpu, *runs.values()))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(back[name], got[name], err_msg=name)
    facts = [
        json.loads((tmp_path / out / "failed-step-5" / "failure.json").read_text()) for out in ("cpu", "skip")
    ]
    one, two = (f["finding"] for f in facts)
    assert all(one[key] == two[key] for key in ("program", "batch", "operation", "layer"))


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_replay_makes_an_update_of_a_device_again(train: Any, tmp_path: Path, half: str) -> None:
    """Weights of 1e25 overflow in the first layer; in float16, at the least scale of the loss, too."""
    options = {half: True, "learning_rate": 1e25, "max_grad_norm": 0.0, "warmup_steps": 0, "max_steps": 20}
    with pytest.raises(NonFiniteError, match=r"in h\.0.* made .* not finite") as caught:
        train("run", Card(None, 1 << 19), **options)
    assert ("at loss scale 1, the least" in str(caught.value)) == (half == "fp16")
    found, facts = replay(tmp_path / "run")
    assert found is not None
    assert facts["step"] == (18 if half == "fp16" else 2)
    assert dataclasses.asdict(found) == facts["finding"]


def test_a_lost_device_leaves_the_last_checkpoint(train: Any, tmp_path: Path) -> None:
    train("whole", Card(None, 1 << 19))
    with pytest.raises(DeviceError) as caught:
        train("lost", Mortal(4))
    assert str(caught.value) == f"{LOST}; --resume goes on from step 3"
    assert [p.name for p in (tmp_path / "lost").glob("checkpoint-*")] == ["checkpoint-3"]
    train("lost", Card(None, 1 << 19), resume=True)
    whole, resumed = (pf.load(tmp_path / name).state_dict() for name in ("whole", "lost"))
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_card_that_is_too_small_is_told_before_anything_is_written(
    train: Any, tmp_path: Path, parts: int
) -> None:
    """With several batches an update, the moments come with the last of its programs."""
    words = 10000 if parts == 1 else 24000
    with pytest.raises(DeviceError, match=r"needs .* are free; use smaller batches .* recompute") as caught:
        train("run", Card(None, words), gradient_accumulation_steps=parts)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("where", "parts"), [("cpu", 2), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)], ids=str
)
def test_a_run_that_rounds_by_chance_goes_on_with_the_same_bits(
    train: Any, tmp_path: Path, where: str, parts: int
) -> None:
    """Its weights are values of bfloat16 in every checkpoint, and its averages are not; measuring those changes
    nothing."""

    def stop(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == 3:
            raise KeyboardInterrupt

    def run(name: str, on_event: Any = None, **more: Any) -> Path:
        card = None if where == "cpu" else Card(None, 1 << 20)
        options: dict[str, Any] = {
            "optim_args": {"stochastic_rounding": True}, "ema_decay": 0.9, "gradient_accumulation_steps": parts,
            "bf16": where == "bfloat16", "eval_every": 2, "save_total_limit": 0, "log_every": 1,
            "learning_rate": 1e-2, "warmup_steps": 0,
        }  # fmt: skip
        train(name, card, on_event, **options | more)
        return tmp_path / name

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("run", stop)
    assert everything(run("run", resume=True)) == everything(straight)
    for step in (3, 6, 8):
        weights = load_file(straight / f"checkpoint-{step}" / "model.safetensors")
        assert not any((x.view(np.uint32) & 0xFFFF).any() for x in weights.values())
    averages = load_file(straight / "checkpoint-8" / "optimizer.safetensors")
    assert all((averages[f"ema.{name}"].view(np.uint32) & 0xFFFF).any() for name in weights)
    quiet = run("quiet", eval_every=0)
    assert (
        everything(quiet)["checkpoint-8/model.safetensors"]
        == everything(straight)["checkpoint-8/model.safetensors"]
    )
    want = load_file(quiet / "checkpoint-8" / "optimizer.safetensors")
    for name, value in averages.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_rounding_by_chance_follows_the_run_with_masters_and_leaves_frozen_weights(
    train: Any, tmp_path: Path
) -> None:
    rounding = {"optim_args": {"stochastic_rounding": True}}
    plain = {"learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 30, "log_every": 1}
    for device, options in {"cpu": {}, "float32": {}, "bfloat16": {"bf16": True}}.items():
        card = None if device == "cpu" else Card(None, 1 << 20)
        for name, more in {"plain": {}, "rounded": rounding}.items():
            train(f"{device}-{name}", card and Card(None, 1 << 20), **plain, **options, **more)
        one, two = (losses(tmp_path / f"{device}-{name}") for name in ("plain", "rounded"))
        np.testing.assert_allclose(two, one, rtol=5e-2)
        assert two[-1] < 0.9 * two[0]
    base = load_file(tmp_path / "cpu-plain" / "model.safetensors")
    for device in ("cpu", "gpu"):
        card = None if device == "cpu" else Card(None, 1 << 20)
        options = {
            "init_from": str(tmp_path / "cpu-plain"),
            "model": {},
            "max_steps": 3,
            "bf16": device == "gpu",
        }
        train(f"{device}-frozen", card, **rounding, freeze=["*.mlp.*"], **options)
        got = load_file(tmp_path / f"{device}-frozen" / "model.safetensors")
        for name, value in got.items():
            frozen = ".mlp." in name
            assert (value == base[name]).all() == frozen, name
            assert (value.view(np.uint32) & 0xFFFF).any() == frozen, name


# ---- One update ahead -----------------------------------------------------------------------------------------------

#: What clocks say, and what was asked for.
CLOCKS = {
    "seconds", "tokens_per_s", "loader_wait_seconds", "save_stall_seconds", "rss_bytes", "utilisation", "config",
}  # fmt: skip


def everything(run: Path) -> dict[str, Any]:
    """All numbers and weights that a run leaves."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and "tokens" not in p.parts):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
        elif path.name == "trainer_state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in CLOCKS}
    return found


@contextmanager
def waiting() -> Iterator[None]:
    """Training that waits for each update before it begins the next one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updates, "_go_ahead", lambda _self, _begun, _busy: None)
        yield


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """When updates were begun and waited for."""
    begin, seen = Updates.begin, []

    def noted(self: Updates, step: int, *given: Any) -> Any:
        seen.append(("begin", step + 1))
        made = begin(self, step, *given)

        def numbers() -> dict[str, Any]:
            seen.append(("wait", step + 1))
            return made.numbers()

        return dataclasses.replace(made, numbers=numbers)

    monkeypatch.setattr(Updates, "begin", noted)
    return seen


def test_the_next_update_is_begun_before_a_loss_is_waited_for(train: Any, begun: list[Any]) -> None:
    train("gpu", Card(None, 1 << 19), eval_every=4, save_every=6)
    order = [f"{what} {step}" for what, step in begun]
    assert order == [
        "begin 1", "begin 2", "wait 1", "begin 3", "wait 2", "begin 4", "wait 3", "wait 4",
        "begin 5", "begin 6", "wait 5", "wait 6", "begin 7", "begin 8", "wait 7", "wait 8",
    ]  # fmt: skip
    begun.clear()
    train("cpu")
    assert begun == [(what, step) for step in range(1, 9) for what in ("begin", "wait")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "ema_decay": 0.9},
        {"eval_every": 2, "sample_every": 5, "sample_prompts": ["the"], "load_best_model_at_end": True},
        {"objective": "mlm", "tokenizer": {"preset": "bert-uncased", "vocab_size": 60},
         "model": {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
                   "intermediate_size": 16}},
    ],
    ids=["plain", "parts", "evaluated", "masked"],
)  # fmt: skip
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_a_run_one_update_ahead_leaves_what_one_that_waits_leaves(
    train: Any, tmp_path: Path, options: dict[str, Any], early: bool
) -> None:
    options = {"log_every": 1, "save_total_limit": 0, **options}
    train("ahead", Card(None, 1 << 20, early=early), **options)
    with waiting():
        train("waits", Card(None, 1 << 20, early=early), **options)
    got, want = everything(tmp_path / "ahead"), everything(tmp_path / "waits")
    assert len([name for name in want if name.endswith("model.safetensors")]) >= 4
    assert got == want


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("what", ["skip", "rollback", "loss"])
def test_a_failure_one_update_ahead_leaves_what_one_that_waits_leaves(
    train: Any, poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, parts: int
) -> None:
    """Also where only the sum of losses is not finite, so that the update and the one behind it were made."""
    if what == "loss":
        begin = Updates.begin

        def spoiled(self: Updates, step: int, *given: Any) -> Any:
            begun = begin(self, step, *given)
            more = {"loss": np.inf} if step == 4 else {}
            return dataclasses.replace(begun, numbers=lambda: begun.numbers() | more)

        monkeypatch.setattr(Updates, "begin", spoiled)
    else:
        poison(4)
    options = {
        "gradient_accumulation_steps": parts, "log_every": 1, "save_every": 3, "max_steps": 9,
        "on_nonfinite": "rollback" if what == "rollback" else "skip",
    }  # fmt: skip
    train("ahead", Card(None, 1 << 20), **options)
    with waiting():
        train("waits", Card(None, 1 << 20), **options)
    got, want = everything(tmp_path / "ahead"), everything(tmp_path / "waits")
    assert [row["step"] for row in got["metrics.jsonl"]] == [1, 2, 3, 4, 6, 7, 8, 9, 9]
    if what == "loss":  # its weights are those behind the update that had been begun
        got.pop("failed-step-5/model.safetensors")
        want.pop("failed-step-5/model.safetensors")
    assert got == want


@pytest.mark.parametrize("parts", [1, 2])
def test_an_overflow_one_update_ahead_leaves_what_one_that_waits_leaves(
    train: Any, poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Also where the scale grows behind an update that is under way, and as on the CPU."""
    monkeypatch.setattr(updates, "first_scale", lambda _: LossScale())
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    poison(4)
    options = {
        "gradient_accumulation_steps": parts, "log_every": 1, "save_every": 6, "max_steps": 12, "save_total_limit": 0,
    }  # fmt: skip
    train("ahead", Card(None, 1 << 20), **options)
    with waiting():
        train("waits", Card(None, 1 << 20), **options)
    got = everything(tmp_path / "ahead")
    assert got == everything(tmp_path / "waits")
    scales = [round(np.log2(row["loss_scale"])) for row in got["metrics.jsonl"] if "loss" in row]
    assert scales == [16, 16, 16, 17, 16, 16, 16, 17, 17, 17, 18]
    known = got["checkpoint-6/trainer_state.json"]["loss_scale"]
    assert known == {"value": 65536.0, "finite": 1, "overflows": 1}
    train("cpu", **options)
    np.testing.assert_allclose(losses(tmp_path / "ahead"), losses(tmp_path / "cpu"), rtol=1e-4)


def test_an_interrupt_ends_a_run_behind_the_update_under_way(train: Any, tmp_path: Path) -> None:
    def stop(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == 4:
            raise KeyboardInterrupt

    straight = train("straight", Card(None, 1 << 19), log_every=1, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        train("run", Card(None, 1 << 19), stop, log_every=1, save_every=0)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    train("run", Card(None, 1 << 19), log_every=1, save_every=0, resume=True, save_total_limit=1)
    assert straight.steps == 8
    assert everything(tmp_path / "run") == everything(tmp_path / "straight")


def test_an_update_that_cannot_be_begun_is_told_behind_the_row_of_the_one_before(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Passes.ready

    def fails(self: Passes, batch: Any, draw: int, update: Update) -> Any:
        if update.step == 4:
            raise DeviceError("[cuda] too small")
        return ready(self, batch, draw, update)

    monkeypatch.setattr(Passes, "ready", fails)
    with pytest.raises(DeviceError, match="too small"):
        train("run", Card(None, 1 << 19), log_every=1)
    assert [row["step"] for row in everything(tmp_path / "run")["metrics.jsonl"]] == [1, 2, 3, 4]


# ---- float16 --------------------------------------------------------------------------------------------------------

LAYERS = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "bert": {
        "objective": "mlm", "mlm_probability": 0.5, "tokenizer": {"preset": "bert-uncased", "vocab_size": 60},
        "model": {"model_type": "bert", **LAYERS, "intermediate_size": 16},
    },
    "llama": {"model": {"model_type": "llama", **LAYERS, "num_key_value_heads": 1, "intermediate_size": 24}},
    "falcon": {"model": {"model_type": "falcon", **LAYERS}},
}  # fmt: skip


def scales(folder: Path) -> list[int]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [round(np.log2(row["loss_scale"])) for row in rows if "loss" in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_updates_in_float16_follow_the_cpu(train: Any, tmp_path: Path, family: str) -> None:
    options = {"max_steps": 20, "log_every": 1, "save_every": 0, **FAMILIES[family]}
    want = train("cpu", **options)
    got = train("fp16", Card(None, 1 << 20), fp16=True, **options)
    np.testing.assert_allclose(losses(tmp_path / "fp16"), losses(tmp_path / "cpu"), rtol=5e-3)
    assert got.valid_loss == pytest.approx(want.valid_loss, rel=5e-3)
    assert scales(tmp_path / "fp16") == [16] * 20
    assert "float16 on cuda" in repr(got.model)


def test_updates_that_overflow_in_float16_are_left_out(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gradients of logits do at a large scale; as a run on the CPU that leaves the same ones out."""
    options = {"max_steps": 20, "log_every": 1, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(updates, "first_scale", lambda _: LossScale(2.0**24))
    notes: list[str] = []
    note = lambda kind, n: notes.append(n["what"]) if kind == "note" else None  # noqa: E731
    train("fp16", Card(None, 1 << 20), note, fp16=True, **options)
    lost = sum("the gradient overflows at loss scale" in what for what in notes)
    assert 2 <= lost <= 8
    assert scales(tmp_path / "fp16") == [24 - lost] * (20 - lost)
    ready = Passes.ready

    def planted(self: Passes, batch: Any, draw: int, update: Update) -> Any:
        program, inputs = ready(self, batch, draw, update)
        return program, inputs | ({"loss_scale": np.inf} if update.step < lost else {})

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "ready", planted)
        train("cpu", **options)
    np.testing.assert_allclose(losses(tmp_path / "fp16"), losses(tmp_path / "cpu"), rtol=5e-3)


def test_a_run_in_float16_goes_on_to_the_same_bits(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an overflow before and behind the checkpoint, where the scale has grown too far."""
    monkeypatch.setattr(updates, "first_scale", lambda _: LossScale(2.0**20))
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    options = {"fp16": True, "max_steps": 14, "log_every": 1, "save_every": 7, "save_total_limit": 0}
    train("straight", Card(None, 1 << 20), **options)
    known = [everything(tmp_path / "straight")[f"checkpoint-{step}/trainer_state.json"] for step in (7, 14)]
    first, last = (state["loss_scale"]["overflows"] for state in known)
    assert 0 < first < last

    def stop(kind: str, numbers: dict[str, Any]) -> None:
        found = re.match(r"step (\d+): the gradient overflows", numbers.get("what", ""))
        if found and int(found[1]) > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("run", Card(None, 1 << 20), stop, **options)
    train("run", Card(None, 1 << 20), resume=True, **options)
    assert everything(tmp_path / "run") == everything(tmp_path / "straight")


def test_low_rank_changes_are_trained_in_float16(train: Any, tmp_path: Path) -> None:
    train("base")
    options = {
        "init_from": str(tmp_path / "base"),
        "tokenizer": {},
        "model": {},
        "lora": {"r": 4},
        "log_every": 1,
    }
    train("cpu", **options)
    train("fp16", Card(None, 1 << 20), fp16=True, **options)
    np.testing.assert_allclose(losses(tmp_path / "fp16"), losses(tmp_path / "cpu"), rtol=5e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fp16": True}, "[train] fp16 is for device 'cuda'; on 'cpu' give bf16"),
        ({"fp16": True, "bf16": True, "device": "cuda"}, "[train] bf16 and fp16 exclude each other"),
    ],
)
def test_float16_is_refused(train: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train("run", **options)
    assert str(caught.value) == said
