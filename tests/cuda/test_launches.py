"""Plans as launch records: complete, well-formed, and refused with a reason where a kernel is missing."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from kernels import nvrtc
from kernels.programs import CONFIGS, PROGRAMS, cases, model, sizes

from pyrformer import _core
from pyrformer.compile import Traced
from pyrformer.errors import DeviceError, InputError
from pyrformer.models import build
from pyrformer.nn import Trace
from pyrformer.nn import functional as F
from pyrformer.optimizers import OPTIMIZERS
from pyrformer.programs import apply_step, decode_step, train_step

#: The programs that update weights.
UPDATES = ("train_step", "smoothed_step", "apply_step")


def program(traced: Traced) -> dict[str, Any]:
    return json.loads(_core.cuda_program(traced.lower("cuda").plan))


def signatures() -> dict[str, list[str]]:
    """The parameters of each kernel: "pointer", "table" for one to structs, or the C type, from the source."""
    types = {"int": "i32", "unsigned": "u32", "float": "f32"}
    structs = ("const Tensor*", "const Gradient*")
    found: dict[str, list[str]] = {}
    for name in nvrtc.files():
        source = re.sub(r"//.*", "", nvrtc.unit(name))
        for macro in re.findall(r"#define (\w+_PARAMETERS)((?:.*\\\n)+.*)", source):
            source = source.replace(f"({macro[0]})", f"({macro[1]})".replace("\\\n", "\n"))
        # Macros that define kernels are written out.
        for macro in re.findall(r"(#define (UNARY|BINARY)\(name, \w+\)((?:.*\\\n)+.*))", source):
            source = source.replace(macro[0], "")
            for use in re.findall(rf"^{macro[1]}\((\w+),", source, re.MULTILINE):
                source += macro[2].replace("\\\n", "\n").replace("name##", use)
        for kernel in re.finditer(r'extern "C" __global__.*?\n?\s*(\w+_f32)\(([^)]*)\)', source, re.DOTALL):
            params = [p.strip().rsplit(" ", 1)[0] for p in kernel[2].split(",")]
            named = re.search(rf"#define {kernel[1]} (\w+)", source)
            found[named[1] if named else kernel[1]] = [
                "table" if p in structs else "pointer" if "*" in p else types[p] for p in params
            ]
    return found


@pytest.mark.parametrize(("name", "which"), cases())
def test_every_step_has_records_that_fit_the_kernels(name: str, which: str) -> None:
    traced = PROGRAMS[which](model(name))
    plan = traced.lower("cuda").plan
    made = program(traced)
    known = signatures()
    steps = {step for step, _ in made["records"]}
    operations = [row[1] for row in plan.table()]
    # An update by AdamW may be in the launch of the one before.
    shared = set(range(len(plan))) - steps
    assert all(operations[i].startswith("adamw") and operations[i - 1].startswith("adamw") for i in shared)
    assert len([i for i in steps if operations[i].startswith("adamw")]) == (which in UPDATES)
    for _, record in made["records"]:
        if "product" in record:
            p = record["product"]
            inner = p["a"]["rows" if p["ta"] else "cols"]
            assert inner == p["b"]["cols" if p["tb"] else "rows"]
            assert p["y"]["rows"] == p["a"]["cols" if p["ta"] else "rows"]
            assert p["y"]["cols"] == p["b"]["rows" if p["tb"] else "cols"]
            continue
        launch = record["launch"]
        kinds = [next(iter(arg)) for arg in launch["args"]]
        # Integers in device memory are a table too.
        wanted = known[launch["kernel"]]
        assert kinds == [
            "table" if (kind, want) == ("table", "pointer") else want
            for kind, want in zip(kinds, wanted, strict=True)
        ], launch["kernel"]
        assert all(1 <= n < 65536 for n in launch["grid"][1:])
        assert launch["grid"][0] >= 1
        assert np.prod(launch["block"]) <= 1024


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_dropout_and_the_residual_stream_are_one_launch(name: str, precision: str) -> None:
    """In each of two layers behind attention and behind the MLP; those of embeddings, and of gradients, add nothing."""
    plan = PROGRAMS["train_step"](model(name)).lower("cuda", precision=precision).plan
    launches = [
        record["launch"]
        for _, record in json.loads(_core.cuda_program(plan))["records"]
        if "launch" in record
    ]
    dropouts = [launch for launch in launches if launch["kernel"].startswith("dropout")]
    assert len(dropouts) == 2 * (2 * 2 + 1)
    assert sum(launch["args"][2]["pointer"] is not None for launch in dropouts) == 2 * 2
    # What else is added are embeddings.
    added = sum(launch["kernel"].startswith("add_") for launch in launches)
    assert added == {"gpt2": 1, "bert": 2}[name]
    on_cpu = json.loads(PROGRAMS["train_step"](model(name)).lower("cpu").plan.to_json())["steps"]
    assert sum("dropout" in step["op"] for step in on_cpu if isinstance(step["op"], dict)) == len(dropouts)
    assert sum(step["op"] == {"binary": "add"} for step in on_cpu) == added


def test_indices_are_limited_by_what_they_index() -> None:
    limits = program(PROGRAMS["train_step"](model("gpt2")))["limits"]
    found = {limit["input"]: (limit["least"], limit["below"]) for limit in limits}
    assert found == {"input_ids": (0, 37), "position_ids": (0, 24), "labels": (None, 37)}


def test_a_head_too_wide_for_decoding_is_one_line() -> None:
    config = {**CONFIGS["llama"], "hidden_size": 600, "num_attention_heads": 2, "num_key_value_heads": 1}
    plan = decode_step(build(config), 1, 1, (1, 8), "cache").lower("cuda").plan
    with pytest.raises(DeviceError) as caught:
        _core.cuda_program(plan)
    assert str(caught.value).endswith(
        "cached_attention cannot run on a CUDA device: heads of 300 columns, its kernel takes up to 256; use device "
        '"cpu"'
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_writes_a_state_behind_the_norm_heeds_the_halt(optimizer: str) -> None:
    m = model("llama")
    rule = OPTIMIZERS[optimizer](weight_decay=0.1, ema_decay=0.9)
    for traced in (train_step(m.family, sizes(m), rule), apply_step(m.family, rule)):
        made = program(traced)
        assert made["halts"]
        written = set()
        for _, record in made["records"]:
            launch = record.get("launch", {"kernel": "", "args": []})
            pointers = [arg["pointer"] for arg in launch["args"] if "pointer" in arg]
            if {"space": "halt", "offset": 0} not in pointers or launch[
                "kernel"
            ] == "global_norm_forward_f32":
                continue
            if launch["kernel"] == "adamw_forward_f32":  # p, m and v of each tensor
                table = launch["args"][0]["table"]
                results = [table[row + i]["pointer"] for row in range(0, len(table), 14) for i in (4, 5, 6)]
            else:
                results = [pointers[1 if launch["kernel"] == "broadcast_forward_f32" else 2]]
            written |= {result["space"]["state"] for result in results}
        assert written == set(range(len(traced.lower("cuda").plan.states)))


def test_updates_share_a_launch_up_to_one_that_touches_what_another_writes() -> None:
    trace = Trace("float32")
    scalars = [
        trace.input("clip", "float32", ()),
        trace.input("lr", "float32", ()),
        trace.input("step", "int32", ()),
    ]

    def update(name: str, g: Any, decay: float = 0.0, beta2: float = 0.99) -> Any:
        states = [trace.state(f"{name}.{kind}", (2, 3)) for kind in "pmv"]
        hyper = {"beta1": 0.9, "beta2": beta2, "eps": 1e-8, "weight_decay": decay}
        new = F.adamw(states[0], g, *states[1:], *scalars, **hyper)
        for state, value in zip(states, new, strict=True):
            trace.update(state, value)
        return states[0], new[0]

    g = trace.input("g", "float32", (2, 3))
    _, new = update("a", g)
    update("b", g, decay=0.1)
    update("c", new)  # reads what the first writes
    old, _ = update("d", g)
    update("e", g, beta2=0.9)
    update("f", g, beta2=0.9)
    trace.output("old", old + g)  # so that the new one is not computed over it
    made = program(Traced("test", trace))
    adamw = [
        r["launch"] for _, r in made["records"] if r.get("launch", {}).get("kernel") == "adamw_forward_f32"
    ]
    assert [launch["args"][2]["i32"] for launch in adamw] == [2, 1, 1, 2]
    first, *_ = adamw
    assert [cell["i32"] for cell in first["args"][1]["table"]] == [0, 1, 2]
    decays = [np.uint32(first["args"][0]["table"][i]["f32"]).view(np.float32) for i in (11, 25)]
    assert decays == [0.0, np.float32(0.1)]


def test_a_state_that_is_written_before_or_without_a_norm_needs_no_halt() -> None:
    m = model("gpt2")
    for which in ("accumulate_step", "decode_step", "forward"):
        assert not program(PROGRAMS[which](m))["halts"]
    trace = Trace("float32")
    state = trace.state("s", (3,))
    x = trace.input("x", "float32", (3,))
    trace.update(state, state + x)
    trace.output("norm", F.global_norm([x]))
    assert not program(Traced("test", trace))["halts"]


def test_a_kernel_that_would_spoil_a_state_behind_the_norm_is_refused() -> None:
    trace = Trace("float32")
    x, state = trace.input("x", "float32", (2, 3)), trace.state("s", (2, 3))
    norm = F.global_norm([x])
    trace.output("norm", norm)
    trace.update(state, F.activation("relu", state))
    with pytest.raises(
        DeviceError, match=r"step \d+: relu cannot run .*writes a state behind the global norm"
    ):
        program(Traced("test", trace))


def test_a_missing_kernel_is_named_with_its_step() -> None:
    trace = Trace("float64")
    trace.output("y", F.activation("relu", trace.input("x", "float64", (2, 3))))
    with pytest.raises(DeviceError, match=r"step 0: relu cannot run .*float32"):
        program(Traced("test", trace))


def test_a_plan_for_the_other_executor_is_refused() -> None:
    plan = PROGRAMS["gradients"](model("gpt2")).lower("cpu").plan
    with pytest.raises(DeviceError, match="lowered for another target"):
        _core.cuda_program(plan)
    with pytest.raises(InputError, match='no device "tpu"'):
        PROGRAMS["forward"](model("gpt2")).lower("tpu")
