"""Each optimizer against PyTorch's results, and against its formulas in float64 on random gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import pyrformer as pf
from pyrformer import _core
from pyrformer.compile import Traced
from pyrformer.nn import Parameter, Trace
from pyrformer.nn.module import ZEROS
from pyrformer.optimizers import OPTIMIZERS, Muon, Optimizer, make_optimizer

Arrays = dict[str, Any]


def run(
    optimizer: Optimizer, start: Arrays, grads: list[Arrays], lr: float, dtype: str = "float32"
) -> list[Arrays]:
    """The parameters after each update, and the states as ``optimizer.…``."""
    trace = Trace(dtype)
    parameters = [Parameter(x.shape, ZEROS) for x in start.values()]
    for parameter, name in zip(parameters, start, strict=True):
        parameter.name = name
    inputs = [trace.input(f"grad.{name}", dtype, x.shape) for name, x in start.items()]
    optimizer.update(trace, parameters, inputs)
    store = _core.Store()
    program = Traced("test", trace).lower().compile(store)
    for name, x in start.items():
        store.set(name, np.asarray(x, dtype))
    results = []
    for step, grad in enumerate(grads, 1):
        known = {name for name, _, _ in program.plan.inputs}
        given = {k: v for k, v in optimizer.inputs(step).items() if k in known}
        program(lr=lr, **given, **{f"grad.{name}": np.asarray(g, dtype) for name, g in grad.items()})
        results.append({name: store.get(name) for name, _, _ in store.types()})
    return results


#: Which of ours is one of PyTorch's; its arguments that ours has under another name or does not have.
NAMES = {"AdamW": "adamw", "SGD": "sgd", "RMSprop": "rmsprop", "Adagrad": "adagrad"}


def test_the_results_of_the_reference(fixtures: Path) -> None:
    about = json.loads((fixtures / "optim" / "optimizers.json").read_text("utf-8"))
    tensors = load_file(fixtures / "optim" / "optimizers.safetensors")
    compared = set()
    for case in about["cases"]:
        settings = dict(case["settings"])
        if case["optimizer"] not in NAMES or {"amsgrad", "dampening"} & settings.keys():
            continue
        lr, decay, betas = (
            settings.pop("lr"),
            settings.pop("weight_decay", 0.0),
            settings.pop("betas", (0.9, 0.999)),
        )
        name, prefix = NAMES[case["optimizer"]], f"case{case['index']}"
        eps = settings.pop("eps", 1e-8)
        arguments = {"momentum": 0.0, **settings} if name == "sgd" else settings
        arguments |= {"eps": eps} if name in ("rmsprop", "adagrad") else {}
        start = {k.removeprefix("start."): v for k, v in tensors.items() if k.startswith("start.")}
        # PyTorch decays vectors too.
        shared = {"weight_decay_groups": {"*": decay}, "max_grad_norm": 0.0}
        grads = [
            {n: tensors[f"grad.{s}.{n}"] for n in start}
            for s in first_steps(tensors, "grad.", about["steps"])
        ]
        got = run(make_optimizer(name, arguments, betas=betas, eps=eps, **shared), start, grads, lr)
        for key, want in tensors.items():
            if key.startswith(f"{prefix}.after"):
                step, parameter = key.removeprefix(f"{prefix}.after").split(".", 1)
                np.testing.assert_allclose(
                    got[int(step) - 1][parameter], want, rtol=1e-5, atol=1e-6, err_msg=key
                )
                compared.add((name, case["index"]))
    assert {name for name, _ in compared} == set(NAMES.values())


def first_steps(tensors: Arrays, prefix: str, steps: int) -> range:
    """The steps as the file counts them, from 0 or 1."""
    first = min(int(k.removeprefix(prefix).split(".")[0]) for k in tensors if k.startswith(prefix))
    return range(first, first + steps)


def muon(settings: dict[str, Any]) -> Muon:
    arguments = {k: v for k, v in settings.items() if k in ("momentum", "nesterov", "ns_steps")}
    arguments["adjust_lr_fn"] = settings["adjust_lr_fn"] or "original"
    decay = settings["weight_decay"]
    optimizer = make_optimizer(
        "muon", arguments, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay, max_grad_norm=0.0
    )
    assert isinstance(optimizer, Muon)
    return optimizer


def test_muon_against_the_reference(fixtures: Path) -> None:
    about = json.loads((fixtures / "optim" / "optimizers.json").read_text("utf-8"))
    tensors = load_file(fixtures / "optim" / "optimizers.safetensors")
    starts = {k.removeprefix("muon.start."): v for k, v in tensors.items() if k.startswith("muon.start.")}
    steps = first_steps(tensors, "muon.grad.", about["steps"])
    grads = [{f"a.0.{n}": tensors[f"muon.grad.{s}.{n}"] for n in starts} for s in steps]
    compared = 0
    for case in about["muon_cases"]:
        start = {f"a.0.{n}": v for n, v in starts.items()}
        got = run(muon(case["settings"]), start, grads, case["settings"]["lr"])
        for key, want in tensors.items():
            prefix = f"muon.case{case['index']}.exact"
            if key.startswith(prefix):
                step, name = key.removeprefix(prefix).split(".", 1)
                np.testing.assert_allclose(
                    got[int(step) - 1][f"a.0.{name}"], want, rtol=1e-5, atol=1e-5, err_msg=key
                )
                compared += 1
    assert compared


# -- Formulas in float64 ----------------------------------------------------------------------------------------------


def lion(p: Any, g: Any, memory: Arrays, step: int, lr: float, decay: float) -> Any:
    m = memory.get("m", np.zeros_like(p))
    memory["m"] = 0.99 * m + 0.01 * g
    return p - lr * (np.sign(0.9 * m + 0.1 * g) + decay * p)


def adafactor(p: Any, g: Any, memory: Arrays, step: int, lr: float, decay: float) -> Any:
    keep, square = 1.0 - step**-0.8, g * g + 1e-30
    if p.ndim == 1:
        memory["v"] = v = keep * memory.get("v", 0.0) + (1.0 - keep) * square
    else:
        memory["r"] = r = keep * memory.get("r", 0.0) + (1.0 - keep) * square.mean(axis=1)
        memory["c"] = c = keep * memory.get("c", 0.0) + (1.0 - keep) * square.mean(axis=0)
        v = np.outer(r, c) / r.mean()
    d = g / np.sqrt(v)
    d /= max(1.0, float(np.sqrt(np.mean(d * d))))
    return p - lr * decay * p - lr * d


@pytest.mark.parametrize(
    ("name", "rule", "dtype", "tolerance"),
    [
        ("lion", lion, "float64", 1e-12),
        ("lion", lion, "float32", 1e-5),
        ("adafactor", adafactor, "float64", 2e-6),
        ("adafactor", adafactor, "float32", 2e-5),
    ],
)
def test_formulas(name: str, rule: Callable[..., Any], dtype: str, tolerance: float) -> None:
    """Adafactor's bound on the direction divides by norm + 1e-6, as the one on gradients."""
    draw = np.random.default_rng()
    shapes = {"a.0.w": (7, 13), "wide": (1, 5), "tall": (33, 2), "bias": (11,)}
    start = {n: draw.normal(size=s) for n, s in shapes.items()}
    sizes = [1.0, 1e-3, 30.0, 1e-5, 2.0]
    grads = [{n: size * draw.normal(size=s) for n, s in shapes.items()} for size in sizes]
    optimizer = make_optimizer(name, {}, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, max_grad_norm=0.0)
    got = run(optimizer, start, grads, 0.01, dtype)
    for parameter, p in start.items():
        memory: Arrays = {}
        for step, grad in enumerate(grads, 1):
            decay = 0.1 if p.ndim == 2 else 0.0
            p = rule(p, grad[parameter], memory, step, 0.01, decay)
            np.testing.assert_allclose(got[step - 1][parameter], p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_gradients_of_zero_and_huge_ones_stay_finite(name: str) -> None:
    start = {"a.0.w": np.ones((4, 6)), "bias": np.ones(3)}
    optimizer = make_optimizer(name, {}, betas=(0.9, 0.95), eps=1e-8)
    grads = [{n: np.full(x.shape, value) for n, x in start.items()} for value in (0.0, 1e15, 0.0, 1e-15)]
    for state in run(optimizer, start, grads, 0.1):
        assert all(np.isfinite(x).all() for x in state.values())


def test_states_that_are_kept() -> None:
    """Adafactor keeps N + C numbers for a matrix, Muon one moment for a hidden one, SGD none without momentum."""

    def kept(name: str, **arguments: Any) -> set[tuple[str, tuple[int, ...]]]:
        start = {"a.0.w": np.ones((4, 6)), "head": np.ones((2, 3)), "bias": np.ones(3)}
        optimizer = make_optimizer(name, arguments, betas=(0.9, 0.95), eps=1e-8)
        last = run(optimizer, start, [start], 0.1)[-1]
        return {
            (k.removeprefix("optimizer."), v.shape) for k, v in last.items() if k.startswith("optimizer.")
        }

    assert kept("adafactor") == {
        *(("row.a.0.w", (4,)), ("column.a.0.w", (6,)), ("row.head", (2,)), ("column.head", (3,))),
        ("v.bias", (3,)),
    }
    assert kept("muon") == {
        *(("m.a.0.w", (4, 6)), ("m.head", (2, 3)), ("v.head", (2, 3)), ("m.bias", (3,)), ("v.bias", (3,))),
    }
    assert kept("sgd", momentum=0.0) == set()


def test_weight_decay_groups_and_running_averages() -> None:
    start = {"embedding": np.ones((4, 6)), "other": np.ones((2, 3)), "bias": np.ones(3)}
    zero = {n: np.zeros_like(x) for n, x in start.items()}
    optimizer = make_optimizer(
        "sgd",
        {"momentum": 0.0},
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.5,
        weight_decay_groups={"emb*": 0.0, "bia?": 0.1},
        ema_decay=0.75,
    )
    one, two = run(optimizer, start, [zero, zero], 0.1, "float64")
    assert np.all(two["embedding"] == 1.0)
    np.testing.assert_allclose(two["other"], 0.95**2, rtol=1e-12)
    np.testing.assert_allclose(two["bias"], 0.99**2, rtol=1e-12)
    np.testing.assert_allclose(two["ema.other"], 0.75 * one["ema.other"] + 0.25 * two["other"], rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_has_kernels_for_every_update(name: str) -> None:
    trace = Trace()
    parameter = Parameter((4, 6), ZEROS)
    parameter.name = "a.0.w"
    optimizer = make_optimizer(name, {}, betas=(0.9, 0.95), eps=1e-8)
    optimizer.update(trace, [parameter], [trace.input("grad", "float32", (4, 6))])
    assert _core.cuda_program(Traced("test", trace).lower("cuda").plan)


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("adam", {}, "optim must be one of"),
        ("sgd", {"beta1": 0.9}, "no argument 'beta1'"),
        ("sgd", {"momentum": 1.5}, "momentum"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "nesterov"),
        ("sgd", {"nesterov": 1}, "nesterov"),
        ("muon", {"ns_steps": 0}, "ns_steps"),
        ("muon", {"adjust_lr_fn": "none"}, "adjust_lr_fn"),
        ("adafactor", {"decay_rate": 0.8}, "decay_rate"),
        ("lion", {"beta1": float("nan")}, "beta1"),
        ("sgd", {"weight_decay": 0.1}, "no argument 'weight_decay'"),
        ("adamw", {"stochastic_rounding": 1}, "stochastic_rounding of the optimizer must be true or false"),
        ("lion", {"stochastic_rounding": True}, "lion has no argument 'stochastic_rounding'"),
        ("muon", {"stochastic_rounding": True}, "muon has no stochastic_rounding; use adamw"),
    ],
)
def test_what_is_refused(name: str, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(pf.Error, match=word):
        pf.TrainConfig(files=["a.txt"], out="run", optim=name, optim_args=arguments)
