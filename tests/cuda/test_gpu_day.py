"""tools/gpu_day.py on the pretended device: what will judge a GPU is itself judged here."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sim
from kernels import launches, reference
from kernels.hardware import Hardware
from sim.card import Card

from pyrformer.bench.gpus import GPUS
from pyrformer.bench.train_step import Shape
from pyrformer.errors import DeviceError
from pyrformer.executors.cuda import describe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_day.py"
TINY = Shape("gpt2", layers=1, width=16, heads=2, vocab=37, batch=2, seq=8)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_day", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_day"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# ---- Kernels' tests on a device -------------------------------------------------------------------------------------


def test_the_tests_of_kernels_run_on_any_device(
    programs_80: dict[str, sim.Program], rng: Any, close: Any
) -> None:
    device = Hardware(Card(programs_80, how="interpreter"), 1 << 18)
    logits, labels = rng.normal(size=(5, 70)).astype(np.float32), np.array([3, -1, 69, 0, 8])
    want, gradient = reference.cross_entropy(logits, labels)
    for layout in launches.LAYOUTS.values():
        loss, got = launches.cross_entropy(device.fresh(), logits, labels, None, 1.0, layout)
        close(loss, want)
        close(got, gradient)
    x = rng.normal(size=(3, 9)).astype(np.float32)
    close(launches.unary(device.fresh(), "gelu", x, launches.LAYOUTS["crooked"]), reference.UNARY["gelu"](x))


def test_every_test_of_a_kernel_is_run_on_a_device(tool: ModuleType) -> None:
    """Those are the ones that take a device, or one with tensors of another type, and nothing of the interpreter's."""
    takes = re.compile(r"^def test_\w+\((?:[^)]*\b)?(?:device|narrow)\b", re.MULTILINE)
    found = {
        p.stem.removeprefix("test_") for p in tool.TESTS.glob("test_*.py") if takes.search(p.read_text())
    }
    assert set(tool.KERNEL_TESTS) == found - {"estimate", "mutants"}


def test_a_write_beside_an_array_is_found(programs_80: dict[str, sim.Program]) -> None:
    device = Hardware(Card(programs_80, how="interpreter"), 1 << 18)
    (row, _) = device.strided(2, 5, 8, np.float32)
    i32 = launches.i32
    with pytest.raises(sim.Fault, match=r"fill_forward_f32 wrote to byte .* belongs to nothing"):
        device.launch("fill_forward_f32", 1, 256, row, i32(2), i32(6), i32(8), np.float32(1))
    with pytest.raises(MemoryError):
        device.empty((1 << 20,))


# ---- Stages ---------------------------------------------------------------------------------------------------------


def test_programs_are_compared_and_a_wrong_one_is_named(tool: ModuleType) -> None:
    cases = [("gpt2", "train_step"), ("bert", "forward"), ("llama", "decode_step")]
    stage = tool.whole_programs(Card(None), cases)
    assert stage.state == "ok", stage
    assert len(stage.table) == 1 + len(cases)

    class Broken(Card):
        def launch(self, stream: Any, kernel: str, grid: Any, block: Any, args: Any) -> None:
            if kernel == "rope_table_forward_f32":
                args = (*args[:-1], 2 * args[-1])
            super().launch(stream, kernel, grid, block, args)

    stage = tool.whole_programs(Broken(None), [("gpt2", "forward"), ("llama", "forward")])
    assert stage.state == "failed"
    assert stage.text.startswith("1 of 2 programs agree")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_programs_in_16_bits_agree_too(tool: ModuleType, precision: str) -> None:
    cases = [("llama", "train_step"), ("falcon", "decode_best")]
    stage = tool.whole_programs(Card(None), cases, precision=precision)
    assert stage.state == "ok", stage
    assert all(row[2] > (1e-4 if precision == "bfloat16" else 1e-6) for row in stage.table[1:])


def test_replays_take_no_memory_and_give_the_same_bits(tool: ModuleType) -> None:
    stage = tool.replays(Card(None, 1 << 19), 12)
    assert (stage.state, stage.text[:10]) == ("ok", "24 replays")

    class Leaking(Card):
        def replay(self, stream: Any, graph: Any) -> None:
            super().replay(stream, graph)
            self.kept = [*getattr(self, "kept", []), self.memory(64)]

    stage = tool.replays(Leaking(None, 1 << 19), 4)
    assert stage.state == "failed"
    assert "bytes of device memory were taken" in stage.text


def test_times_stand_beside_the_estimate(tool: ModuleType) -> None:
    card = Card(None, 1 << 19)
    stage = tool.step_times(card, GPUS["t4"], (TINY,), steps=2)
    rows = stage.table[1:]
    assert stage.state == "ok"
    assert [row[0].rsplit(" ", 1)[1] for row in rows] == ["float32", "float16"]
    assert all(isinstance(x, float) and x > 0 for row in rows for x in row[1:3])
    stage = tool.kernel_times(Card(None, 1 << 19), GPUS["t4"], TINY, repeats=1)
    named = {tuple(row[:2]): row for row in stage.table[1:]}
    assert {
        ("matrix products", "float32"), ("attention_dkv_backward_f32", "float32"), ("adamw_forward_f32", "float32"),
        ("attention64_dkv_backward_f16", "float16"),
    } <= named.keys()  # fmt: skip
    assert all(row[3] > 0 and row[4] > 0 for row in named.values())
    assert tool.kernel_times(Card(None, 1 << 19), None, TINY, repeats=1).state == "ok"
    stage = tool.kernel_times(Card(None, 1 << 19), GPUS["h200"], TINY, repeats=1)
    assert {
        ("matrix products", "float32"), ("matrix products", "bfloat16"),
        ("attention64_dkv_backward_bf16", "bfloat16"), ("attention_forward_f32", "float32"),
    } <= {tuple(row[:2]) for row in stage.table[1:]}  # fmt: skip
    assert " in float32, " in stage.text
    assert tool.gpu_of("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert tool.gpu_of("NVIDIA H200") is GPUS["h200"]
    assert tool.gpu_of("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert tool.gpu_of("Quadro P400") is None


def junit(path: str, cases: str) -> None:
    Path(path).write_text(f'<testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>')


def runner(cases: str, code: int, printed: str = "") -> Any:
    """Stands in for subprocess.run: writes what pytest would."""

    def run(command: list[str], **options: Any) -> Any:
        assert options["env"]["PYRFORMER_TEST_DEVICE"] == "cuda"
        (log,) = (part.split("=", 1)[1] for part in command if part.startswith("--junitxml="))
        if cases:
            junit(log, cases)
        return subprocess.CompletedProcess(command, code, printed, "")

    return run


PASSED = '<testcase classname="test_norm" name="test_a"/>'
FAILED = (
    '<testcase classname="test_norm" name="test_b"><failure message="assert 1 == 2&#10;more"/></testcase>'
)


def test_failed_tests_of_kernels_are_listed(tool: ModuleType, tmp_path: Path) -> None:
    stage = tool.kernels(tmp_path, runner(PASSED, 0))
    assert (stage.state, stage.text) == ("ok", "1 of 1 tests of kernels passed")
    stage = tool.kernels(tmp_path, runner(PASSED + FAILED, 1))
    assert (stage.state, stage.text) == ("failed", "1 of 2 tests of kernels passed")
    assert stage.table[1:] == [["test_norm.test_b", "assert 1 == 2"]]
    stage = tool.kernels(tmp_path / "other", runner("", 4, "no tests"))
    assert (stage.state, stage.text) == ("failed", "pytest ran nothing: no tests")


def test_each_tool_of_the_sanitizer_must_be_clean(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = runner(PASSED, 0, "========= ERROR SUMMARY: 0 errors")
    assert tool.sanitizer(tmp_path, clean, "compute-sanitizer").state == "ok"
    stage = tool.sanitizer(
        tmp_path, runner(PASSED, 9, "========= ERROR SUMMARY: 3 errors"), "compute-sanitizer"
    )
    assert stage.state == "failed"
    assert stage.text == "not clean: memcheck, racecheck, synccheck, initcheck"
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    assert tool.sanitizer(tmp_path, clean).state == "skipped"


def test_a_report_is_written_whatever_happens(tool: ModuleType, tmp_path: Path) -> None:
    def breaks() -> Any:
        raise ValueError("a | b")

    stages = tool.day(
        tmp_path, {"one": breaks, "two": lambda: tool.Stage("two", "ok", "fine", [["n"], [1.23456]])}
    )
    assert [s.state for s in stages] == ["failed", "ok"]
    assert json.loads((tmp_path / "report.json").read_text())[0]["text"] == "ValueError: a | b"
    report = (tmp_path / "report.md").read_text()
    assert "| one | failed | ValueError: a \\| b |" in report
    assert "| 1.23 |" in report
    assert "breaks" in (tmp_path / "one.traceback.txt").read_text()


def test_without_a_device_there_is_one_line(tmp_path: Path) -> None:
    try:
        describe()
    except DeviceError as e:
        why = str(e)
    else:
        pytest.skip("there is a device here")
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "out"), "--stage", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"gpu_day: error: {why}\n"
    assert not (tmp_path / "out").exists()
