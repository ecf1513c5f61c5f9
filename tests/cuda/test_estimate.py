"""The estimate of a step on paper: its rules against what the kernels' PTX does, its sums, its command."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import sim
from click.testing import CliRunner
from kernels.programs import inputs
from sim.card import Card

from pyrformer import _core
from pyrformer.bench import work
from pyrformer.bench.estimate import bars, times
from pyrformer.bench.gpus import GPUS
from pyrformer.cli.bench import command
from pyrformer.executors.program import Executor, Store
from pyrformer.model import Model
from pyrformer.optimizers import AdamW
from pyrformer.programs import Sizes, decode_step, train_step

B, T = 1, 80
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 72, "n_positions": T},
    "llama": {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 72, "vocab_size": 72, "max_position_embeddings": T,
    },
}  # fmt: skip


@pytest.mark.parametrize("which", ["train_step", "decode_step"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rules_say_what_the_kernels_do(
    name: str, which: str, programs_80: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    model = Model.from_config(CONFIGS[name])
    card = Card(programs_80, 1 << 21, how="interpreter")
    store = Store(card)
    for state, _, _ in model.store.types():
        store.set(state, model.store.get(state))
    traced = (
        train_step(model.family, Sizes(B, T), AdamW())
        if which == "train_step"
        else decode_step(model.family, 2, 1, (2, 256), "cache", best=40)
    )
    plan = traced.lower("cuda").plan
    executor = Executor(plan, store)
    counted: list[tuple[str, sim.Counter]] = []
    run = card.device.launch

    def launch(kernel: str, *args: Any) -> None:
        card.device.counter = sim.Counter(card.device.memory)
        counted.append((kernel, card.device.counter))
        run(kernel, *args)

    card.device.launch = launch  # type: ignore[method-assign]
    given = inputs(model, plan, rng)
    if which == "decode_step":  # every slot is filled, as the rule for attention assumes
        given |= {
            "start": np.array([255, 255], np.int32),
            "rows": np.array([[0], [1]], np.int32).repeat(256, 1),
        }
        given["row"] = np.array([0, 1], np.int32)
    executor.run(given)
    launches = [record for _, record in executor.records if "launch" in record]
    assert len(launches) == len(counted)
    for record, (kernel, found) in zip(launches, counted, strict=True):
        if which == "decode_step" and not kernel.startswith(("best", "cache")):
            continue  # of two rows
        said = work.work(record)
        where = f"{kernel} {record['launch']['grid']}: {said}"
        # Rows that a table is not asked for are in the rule's bytes, threads that leave early in its sectors.
        lookup = kernel.startswith(("gather", "scatter"))
        assert found.unique <= said.unique <= (1.5 if lookup else 1) * found.unique, where
        assert found.sectors / 1.2 <= said.sectors <= 1.4 * found.sectors + 2, where
        if kernel.startswith("attention"):
            assert said.passes == found.passes, where
            assert said.flops == pytest.approx(found.flops, rel=0.12), where
        elif not kernel.startswith("dropout"):  # whose integers are counted as FLOPs
            assert found.flops / 2 <= said.flops <= 2 * found.flops, where


def test_every_kernel_has_a_rule_and_bars() -> None:
    kernels = {kernel for _, _, names in _core.cuda_sources() for kernel in names}
    assert set(work.RULES) == kernels == set(bars())


def test_a_product_is_counted_with_what_it_adds() -> None:
    def matrix(rows: int, cols: int, offset: int = 0) -> dict[str, Any]:
        return {"place": {"space": "arena", "offset": offset}, "rows": rows, "cols": cols, "ld": cols}

    p = {
        "a": matrix(9, 5),
        "ta": True,
        "b": matrix(9, 7),
        "tb": False,
        "c": None,
        "bias": None,
        "y": matrix(5, 7),
        "bf16": False,
    }
    assert work.work({"product": p}).flops == 2 * 5 * 7 * 9
    assert work.work({"product": p}).unique == 4 * (45 + 63 + 35)
    assert work.work({"product": {**p, "bf16": True}}).tensor == 2 * 5 * 7 * 9
    onto, added = {**p, "c": p["y"]}, {**p, "c": matrix(5, 7, 512), "bias": p["y"]["place"]}
    assert work.work({"product": onto}).unique == 4 * (45 + 63 + 35)
    assert work.work({"product": added}).unique == 4 * (45 + 63 + 70 + 7)


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "blocks"),
    [
        ("a100", 256, 32, 0, 8),  # warps
        ("a100", 256, 128, 34816, 2),  # registers
        ("a100", 256, 33, 0, 6),  # registers, in units of 256 a warp
        ("a100", 32, 16, 0, 32),  # blocks
        ("a100", 128, 32, 48 << 10, 3),  # shared memory, of which each block costs 1 KB more
        ("t4", 256, 32, 0, 4),
        ("rtx4090", 256, 32, 0, 6),
        ("h100", 256, 222, 34816, 1),
    ],
)
def test_occupancy_is_that_of_nvidia_s_calculator(
    gpu: str, threads: int, registers: int, shared: int, blocks: int
) -> None:
    assert GPUS[gpu].occupancy(threads, registers, shared) == blocks


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert {name: round(gpu.flops / 1e12, 1) for name, gpu in GPUS.items()} == {
        "h100": 66.9, "a100": 19.5, "rtx4090": 82.6, "t4": 8.1
    }  # fmt: skip


def test_an_idle_multiprocessor_makes_a_launch_slower() -> None:
    h100 = GPUS["h100"]
    full = times(work.Work(0, 0, 1e9, blocks=132), h100)["arithmetic"]
    assert full == pytest.approx(1e9 / h100.flops)
    assert times(work.Work(0, 0, 1e9, blocks=133), h100)["arithmetic"] == pytest.approx(264 / 133 * full)
    assert times(work.Work(0, 0, 1e9, blocks=33), h100)["arithmetic"] == pytest.approx(4 * full)


def test_the_command_prints_what_json_says() -> None:
    arguments = ["bench", "train-step", "--estimate", "t4", "--layers", "1", "--batch", "2"]
    found = json.loads(CliRunner().invoke(command, [*arguments[1:], "--json"]).output)
    assert found["gpu"] == "T4"
    assert found["fits"]
    assert found["launches"] == sum(k["count"] for k in found["kernels"])
    assert found["ms_per_step"] == pytest.approx(sum(k["ms"] for k in found["kernels"]))
    assert found["bound_ms"] < found["ms_per_step"]
    lines = CliRunner().invoke(command, arguments[1:]).output.splitlines()
    assert any(line.startswith("attention_forward") for line in lines)
    wide = [
        "train-step",
        "--estimate",
        "a100",
        "--width",
        "768",
        "--heads",
        "12",
        "--batch",
        "8",
        "--seq",
        "1024",
        "--json",
    ]
    plain, fast = (
        json.loads(CliRunner().invoke(command, [*wide, *more]).output) for more in ([], ["--bf16"])
    )
    on_tensor_cores = {k["name"] for k in fast["kernels"] if k["tensor_share"]}
    assert {"attention64_forward_bf16", "matrix products"} <= on_tensor_cores
    assert fast["ms_per_step"] < plain["ms_per_step"] / 2
    refused = CliRunner().invoke(command, [*arguments[1:], "--bf16"])
    assert refused.exit_code == 2 or "T4 has no bfloat16" in str(refused.exception)
    refused = CliRunner().invoke(command, [*arguments[1:], "--profile"])
    assert refused.exit_code == 2
    assert "--estimate runs nothing" in refused.output
