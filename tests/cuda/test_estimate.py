"""The estimate of a step on paper: its rules against what the kernels' PTX does, its sums, its command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sim
from click.testing import CliRunner
from kernels import launches as run
from kernels.checks import attention_operands, relative_operands
from kernels.narrow import Narrow
from kernels.nvrtc import LONG
from kernels.programs import inputs
from sim.card import Card

from pyrformer import _core
from pyrformer.bench import work
from pyrformer.bench.estimate import bars, estimate, times
from pyrformer.bench.gpus import GPUS
from pyrformer.bench.train_step import Shape
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


@pytest.mark.parametrize(
    "which",
    ["train_step", "train_step in bfloat16", "train_step rounded", "decode_step", "decode_step in bfloat16"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_rules_say_what_the_kernels_do(
    name: str, which: str, programs_80: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    model = Model.from_config(CONFIGS[name])
    card = Card(programs_80, 1 << 21, how="interpreter")
    rounded = which.endswith("rounded")
    half = which.endswith("bfloat16") or rounded
    store = Store(card)
    for state, _, _ in model.store.types():
        store.set(state, model.store.get(state))
    traced = (
        train_step(model.family, Sizes(B, T), AdamW(stochastic_rounding=rounded))
        if which.startswith("train_step")
        else decode_step(model.family, 2, 1, (2, 256), "cache", best=40)
    )
    plan = traced.lower("cuda", precision="bfloat16" if half else "float32").plan
    executor = Executor(plan, store)
    counted: list[tuple[str, sim.Counter]] = []
    run = card.device.launch

    def launch(kernel: str, *args: Any) -> None:
        card.device.counter = sim.Counter(card.device.memory)
        counted.append((kernel, card.device.counter))
        run(kernel, *args)

    card.device.launch = launch  # type: ignore[method-assign]
    given = inputs(model, plan, rng)
    if which.startswith("decode_step"):  # every slot is filled, as the rule for attention assumes
        given |= {
            "start": np.array([255, 255], np.int32),
            "rows": np.array([[0], [1]], np.int32).repeat(256, 1),
        }
        given["row"] = np.array([0, 1], np.int32)
    executor.run(given)
    launches = [record for _, record in executor.records if "launch" in record]
    # Copies in bfloat16 are made before.
    counted, copies = counted[-len(launches) :], counted[: -len(launches)]
    assert {kernel for kernel, _ in copies} == ({"narrow_forward_bf16"} if half and not rounded else set())
    for record, (kernel, found) in zip(launches, counted, strict=True):
        if which.startswith("decode_step") and not kernel.startswith(("best", "cache")):
            continue  # of two rows
        said = work.work(record)
        where = f"{kernel} {record['launch']['grid']}: {said}"
        # Rows that a table is not asked for, or that have no label, are in the rule's bytes, threads that leave early
        # in its sectors.
        partly = kernel.startswith(("gather", "scatter", "cross_entropy_backward"))
        assert found.unique <= said.unique <= (1.5 if partly else 1) * found.unique, where
        assert found.sectors / 1.2 <= said.sectors <= 1.4 * found.sectors + 2, where
        if kernel.startswith("attention"):
            exact = 0.1 if kernel.endswith("_bf16") else 0
            assert said.passes == pytest.approx(found.passes, rel=exact), where
            assert said.flops == pytest.approx(found.flops + found.tensor, rel=0.12), where
        elif not kernel.startswith(("dropout", "adamw_rounded")):  # whose integers are counted as FLOPs
            assert found.flops / 2 <= said.flops <= 2 * found.flops, where
        # What memory gives and takes is what the kernel is for: no sectors of which a part is used, but for scalars.
        assert found.moved <= 1.1 * found.unique + 8 * sim.counter.SECTOR, where


class Watched(sim.Device):
    """A device that keeps, of each launch, its counter and what the rules say of it."""

    def __init__(self, programs: dict[str, sim.Program], rules: dict[str, work.Rule] = work.RULES) -> None:
        super().__init__(programs, 1 << 19)
        self.rules = rules
        self.launches: list[tuple[str, sim.Counter, work.Work]] = []

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any) -> None:
        self.counter = sim.Counter(self.memory)
        super().launch(kernel, grid, block, *args)
        numbers = (x.item() if isinstance(x, np.generic) else x and x.address for x in args)
        grid = grid if isinstance(grid, tuple) else (grid,)
        self.launches.append((kernel, self.counter, self.rules[kernel](grid, *numbers)))


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((1, 256, 2, 1, 64), {"causal": True}),
        ((2, 200, 1, 1, 64), {}),
        ((1, 192, 2, 1, 128), {"causal": True, "window": 70}),
        ((1, 192, 1, 1, 256), {"causal": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("half", "own"), [*((half, False) for half in run.HALVES), ("bf16", True)])
def test_rules_say_what_attention_on_tensor_cores_does(
    programs_80: dict[str, sim.Program], programs_90a: dict[str, sim.Program], rng: np.random.Generator,
    shape: Any, mask: dict[str, Any], half: str, own: bool,
) -> None:  # fmt: skip
    """And that it does it well: no two rows of a request meet in a bank, no sector is asked for in part."""
    if shape[-1] > max(run.TENSOR_ROWS[half]) or (half == "f16" and "window" not in mask and not LONG):
        pytest.skip("heads of float16 have up to 128 columns; of the others one where time is short")
    rules = work.RULES | work.OWN_RULES["sm_90a"] if own else work.RULES
    device = Watched(programs_80 | programs_90a if own else programs_80, rules)
    q, k, v, dout = attention_operands(rng, *shape)
    run.attention(device, q, k, v, 0.1, dout=dout, half=half, **mask)
    assert len(device.launches) == 4
    for kernel, found, said in device.launches:
        where = f"{kernel}: {said}"
        assert said.unique == found.unique, where
        assert said.tensor == found.tensor, where
        assert said.sectors == pytest.approx(found.sectors, rel=0.01), where
        # Only the rows inside a last tile are written out.
        assert found.passes <= said.passes <= 1.03 * found.passes, where
        assert said.flops - said.tensor == pytest.approx(found.flops, rel=0.1), where
        assert found.passes <= 1.1 * found.least_passes, where
        assert found.sectors <= 1.2 * found.least_sectors, where


@pytest.mark.parametrize("half", ["", "bf16"])
@pytest.mark.parametrize("shape", [(40, 768), (20, 1280), (3, 8448)], ids=str)
def test_rules_say_what_norms_do(
    programs_80: dict[str, sim.Program], rng: np.random.Generator, shape: tuple[int, int], half: str
) -> None:
    """And that each row is read once, but for what 8 warps do not hold, and that no two threads meet in a bank."""
    watched = Watched(programs_80)
    device: Any = Narrow(watched, half) if half else watched
    x, dy, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    weight = np.ones(shape[1], np.float32)
    _, mean, rstd = run.layer_norm(device, x, weight, weight, 1e-5)
    run.layer_norm_grad(device, dy, x, weight, mean, rstd, residual, chunk=16)
    for kernel, found, said in watched.launches:
        where = f"{kernel}: {said}"
        assert said.unique == found.unique, where
        assert said.sectors == pytest.approx(found.sectors, rel=0.05), where
        assert found.flops / 2 <= said.flops <= 2 * found.flops, where
        assert found.passes == found.least_passes, where
        # Tensors, and rows of weights and sums that threads of 16-bit tensors ask for in two halves.
        tensors = {"forward": 2, "backward": 4}[kernel.split("_")[2]] if kernel.startswith("layer") else 0
        if tensors and shape[1] <= 8192:
            once = tensors * shape[0] * shape[1] * (2 if half else 4) // sim.counter.SECTOR
            weights = 2 * shape[0] * shape[1] * 4 // sim.counter.SECTOR * (2 if half else 1)
            assert found.sectors - weights <= 1.2 * once, where


@pytest.mark.parametrize("sizes", [(1, 128, 192, 128, 1, 64), (1, 64, 128, 128, 1, 136)], ids=str)
def test_rules_say_what_relative_attention_does(
    programs_80: dict[str, sim.Program], rng: np.random.Generator, sizes: tuple[int, ...]
) -> None:
    """Of queries in the order of their places."""
    device = Watched(programs_80)
    x = relative_operands(rng, *sizes)
    batch, tokens, _, places, *_ = sizes
    x["at"] = np.linspace(0, places - 1, tokens).astype(int)[None].repeat(batch, 0)
    run.relative_attention(device, x, 0.1, dout=rng.normal(size=x["q_k"].shape).astype(np.float32))
    assert len(device.launches) == 5
    for kernel, found, said in device.launches:
        where = f"{kernel}: {said}"
        assert said.unique == pytest.approx(found.unique, rel=0.01), where
        for got, want in ((said.sectors, found.sectors), (said.flops, found.flops)):
            assert got == pytest.approx(want, rel=0.2), where
        assert said.passes == pytest.approx(found.passes, rel=0.25) or "dkinds" in kernel, where


#: Shares of the tensor cores' peak, by the width of heads, that each launch of attention may reach on paper; what is
#: between it and half of the peak where it is less stands in docs/cuda.md.
REACHED = {
    "a100": {64: (0.6, 0.7, 0.75), 128: (0.6, 0.75, 0.6), 256: (0.5, 0.49, 0.33)},
    "h100": {64: (0.6, 0.5, 0.55), 128: (0.5, 0.5, 0.5), 256: (0.5, 0.5, 0.5)},
    "rtx4090": {64: (0.85, 0.9, 0.9), 128: (0.9, 0.9, 0.9), 256: (0.9, 0.9, 0.6)},
    "t4": {64: (0.75, 0.85, 0.85), 128: (0.8, 0.6, 0.55)},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize(
    ("gpu", "width"), [(gpu, width) for gpu, widths in REACHED.items() for width in widths]
)
def test_attention_reaches_its_share_of_the_tensor_peak_on_paper(gpu: str, width: int, causal: bool) -> None:
    """Counted is what the mask leaves of the products: two forward, three for dq, four for dk and dv. The bound is the
    estimate's, by bytes, sectors, rows of shared memory and arithmetic."""
    half = "bf16" if "bfloat16" in GPUS[gpu].precisions else "f16"
    for tokens in (1024, 4096):
        batch, heads = 32 * 1024 // tokens, 768 // width
        pairs = batch * heads * (tokens * (tokens + 1) // 2 if causal else tokens**2)
        sizes, mask = (batch, tokens, heads, heads, width), (int(causal), 2**31 - 1)
        for way, pointers, products, share in zip(
            ("forward", "dq_backward", "dkv_backward"), ((3, 2), (6, 1), (6, 2)), (2, 3, 4), REACHED[gpu][width],
            strict=True,
        ):  # fmt: skip
            rows = run.TENSOR_ROWS[half][width][way]
            slices = 2 if width == 256 and way == "dkv_backward" else 1
            grid = (-(-tokens // rows), heads, batch * slices)
            strides = [width] * {"forward": 4, "dq_backward": 5, "dkv_backward": 6}[way]
            args = [1] * pointers[0] + [None] * 4 + [1] * pointers[1] + [*sizes, *strides, *mask]
            rules = work.RULES | work.OWN_RULES.get(GPUS[gpu].own, {})
            said = rules[f"attention{width}_{way}_{half}"](grid, *args)
            bound = max(times(replace(said, blocks=math.prod(grid)), GPUS[gpu]).values())
            assert 2 * products * width * pairs / bound / GPUS[gpu].tensor >= share, (way, tokens)


def test_an_architecture_is_estimated_by_kernels_of_its_own() -> None:
    shape = Shape("gpt2", layers=1, width=512, heads=4, vocab=72, batch=4, seq=1024)
    own, general = (
        {k.name: k for k in estimate(shape, gpu, precision="bfloat16").kernels}
        for gpu in (GPUS["h100"], replace(GPUS["h100"], general=True))
    )
    kernel = "attention128_dkv_backward_bf16"
    assert own[kernel].ms < 0.6 * general[kernel].ms
    assert own[kernel].registers == bars()["sm_90a"][kernel]["registers"]["sm_90a"]
    assert general[kernel].registers == bars()[kernel]["registers"]["sm_90"]


def test_every_kernel_has_a_rule_and_bars() -> None:
    kernels = {kernel for _, _, names, _ in _core.cuda_sources() for kernel in names}
    compiled = bars()
    own = {only: set(names) for _, _, names, only in _core.cuda_sources() if only}
    assert {only: set(compiled.pop(only)) for only in own} == own
    assert {only: set(rules) for only, rules in work.OWN_RULES.items()} == own
    assert set(work.RULES) == kernels == set(compiled)


def test_a_product_is_counted_with_what_it_adds() -> None:
    def matrix(rows: int, cols: int, offset: int = 0) -> dict[str, Any]:
        place = {"space": "arena", "offset": offset}
        return {"place": place, "rows": rows, "cols": cols, "ld": cols, "dtype": "f32"}

    p = {
        "a": matrix(9, 5),
        "ta": True,
        "b": matrix(9, 7),
        "tb": False,
        "c": None,
        "bias": None,
        "y": matrix(5, 7),
    }
    narrow = {**p, **{x: {**p[x], "dtype": "bf16"} for x in ("a", "b")}}
    assert work.work({"product": p}).flops == 2 * 5 * 7 * 9
    assert work.work({"product": p}).unique == 4 * (45 + 63 + 35)
    assert work.work({"product": p}).tensor == 0
    assert work.work({"product": narrow}).tensor == 2 * 5 * 7 * 9
    assert work.work({"product": narrow}).unique == 2 * (45 + 63) + 4 * 35
    onto, added = {**p, "c": p["y"]}, {**p, "c": matrix(5, 7, 512), "bias": p["y"]["place"]}
    assert work.work({"product": onto}).unique == 4 * (45 + 63 + 70)  # read, and written
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
        "h100": 66.9, "h200": 66.9, "a100": 19.5, "rtx4090": 82.6, "t4": 8.1
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
    assert "matrix products" in on_tensor_cores
    assert fast["ms_per_step"] < plain["ms_per_step"] / 2
    refused = CliRunner().invoke(command, [*arguments[1:], "--bf16"])
    assert refused.exit_code == 2 or "T4 has no bfloat16; use --fp16" in str(refused.exception)
    older = json.loads(CliRunner().invoke(command, [*arguments[1:], "--fp16", "--json"]).output)
    assert older["ms_per_step"] < found["ms_per_step"]
    assert any(k["name"].endswith("_f16") and k["tensor_share"] for k in older["kernels"])
    for flags in (["--bf16", "--fp16"], ["--fp16"]):
        refused = CliRunner().invoke(command, ["train-step", *flags])
        assert (refused.exit_code, "--fp16" in refused.output) == (2, True)
    refused = CliRunner().invoke(command, [*arguments[1:], "--profile"])
    assert refused.exit_code == 2
    assert "--estimate runs nothing" in refused.output
