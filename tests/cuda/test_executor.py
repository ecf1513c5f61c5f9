"""The executor on a pretended GPU: whole programs against the CPU executor, graphs, streams and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sim
from kernels.nvrtc import LONG
from kernels.programs import CONFIGS, FAMILIES, OPTIMIZER, PROGRAMS, cases, inputs, model, sizes
from sim.card import Card

import pyrformer as pf
from pyrformer import _core
from pyrformer.compile import Compiled
from pyrformer.errors import DeviceError, InputError, StateError
from pyrformer.executors.program import SIZES, Executor, Store
from pyrformer.generation import decoder, strategies
from pyrformer.model import Model
from pyrformer.optimizers import OPTIMIZERS, AdamW
from pyrformer.programs import Sizes, accumulate_step, apply_step, train_step
from pyrformer.serve.engine import Completion, Engine
from pyrformer.training.passes import Passes

# float32 sums of some hundred terms in another order, after a few layers.
TOLERANCE = 2e-5
#: The 16-bit floats, how names of their kernels end, and how much of bfloat16's rounding they leave.
HALVES = {"bfloat16": ("bf16", 1.0), "float16": ("f16", 0.5)}
PRECISIONS = pytest.mark.parametrize("precision", HALVES)


def in_halves(rows: list[Any], often: list[Any]) -> list[Any]:
    """Rows of cases in bfloat16, and in float16 those of `often`, or all of them where time is long."""
    return [("bfloat16", *row) for row in rows] + [("float16", *row) for row in (rows if LONG else often)]


def on_card(cpu: Model, card: Card, *, precision: str = "float32") -> Model:
    """The same model on a card, without the caches of generations, which each model names for itself."""
    store = Store(card)
    for name, _, _ in cpu.store.types():
        if not name.startswith("cache"):
            store.set(name, cpu.store.get(name))
    return Model(cpu.family, device="cuda", precision=precision, store=store)


def assert_close(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float = TOLERANCE
) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance, err_msg=name)


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """The size of the difference over the size of what is wanted, both as roots of mean squares."""
    return float(
        np.sqrt(np.mean((got - want) ** 2)) / (np.sqrt(np.mean(np.square(want, dtype=float))) + 1e-2)
    )


def states(m: Model) -> dict[str, np.ndarray]:
    return {name: m.store.get(name) for name, _, _ in m.store.types()}


@pytest.mark.parametrize(("name", "which"), cases())
def test_every_program_gives_what_the_cpu_gives(name: str, which: str, rng: np.random.Generator) -> None:
    cpu = model(name)
    card = Card(None)
    device = on_card(cpu, card)
    traced = PROGRAMS[which](cpu)
    one, two = (traced.lower(m.device).compile(m.store) for m in (cpu, device))
    for step in range(3):  # walked, captured, replayed
        given = inputs(cpu, one.plan, rng, step)
        assert_close(two(**given), one(**given))
    assert_close(states(device), states(cpu))
    assert card.replays == 2


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "falcon_alibi", "xlnet"])
def test_a_training_step_of_the_compiled_kernels(
    name: str, programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    """The interpreter runs every kernel of the step, and each launch is compared with its twin."""
    cpu = model(name)
    card = Card(programs, how="both")
    device = on_card(cpu, card)
    traced = train_step(cpu.family, sizes(cpu, segments=name not in ("falcon_alibi", "xlnet")), OPTIMIZER)
    one, two = (traced.lower(m.device).compile(m.store) for m in (cpu, device))
    for step in range(2):
        given = inputs(cpu, one.plan, rng, step)
        assert_close(two(**given), one(**given))
    assert_close(states(device), states(cpu), 1e-4)
    assert len(card.kernels) >= 16


def test_decoding_far_into_a_text_by_the_compiled_kernels(
    programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    """Attention over the cache is cut into spans, which a second launch joins."""
    for precision, kind, near in (
        ("float32", "f32", TOLERANCE), ("bfloat16", "bf16", 3e-2), ("float16", "f16", 4e-3),
    ):  # fmt: skip
        cpu, card = model("llama"), Card(programs, how="both")
        device = on_card(cpu, card, precision=precision)
        one, two = (
            PROGRAMS["decode_far"](m).lower(m.device, precision=m.precision).compile(m.store)
            for m in (cpu, device)
        )
        for step in range(3):
            given = inputs(cpu, one.plan, rng, step)
            given["start"] = np.array([step, 297 + step], np.int32)
            assert_close(two(**given), one(**given), near)
        assert f"cached_attention_join_forward_{kind}" in card.kernels
        caches = [dtype for name, dtype, _ in device.store.types() if name.startswith("far.")]
        assert caches == [precision] * 4


#: Heads of 16 columns: tensor cores take multiples of 8.
WIDER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 37, "n_positions": 24},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 40, "vocab_size": 37, "max_position_embeddings": 24,
    },
}  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("name", WIDER)
def test_training_on_tensor_cores(
    name: str, precision: str, programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    """One step of the compiled kernels, then twenty of their twins: near float32's, and not float32's."""
    half, finer = HALVES[precision]
    cpu = Model.from_config({"model_type": name, **WIDER[name]})
    card = Card(programs, 1 << 19, how="both")
    one = train_step(cpu.family, sizes(cpu), OPTIMIZER).lower("cpu").compile(cpu.store)
    for steps in (1, 20):
        device = on_card(cpu, card, precision=precision)
        lowered = train_step(cpu.family, sizes(cpu), OPTIMIZER).lower("cuda", precision=precision)
        two = lowered.compile(device.store)
        given = inputs(cpu, one.plan, rng)
        losses = []
        for step in range(steps):
            given["step"] = np.array(step + 1, np.int32)
            losses.append((two(**given)["loss"], one(**given)["loss"]))
        got, want = np.array(losses, float).T
        np.testing.assert_allclose(got, want, rtol=2e-2 * finer)
        assert not np.allclose(got, want, rtol=1e-7)
        card.how = "twins"
    assert want[-1] < 0.9 * want[0]
    kinds = {
        kernel.rsplit("_", 1)[1] for kernel in card.kernels if kernel.startswith(("attention", "layer_norm"))
    }
    assert kinds == {half}
    expected = ("attention64_forward", "attention64_dkv_backward", "narrow_forward", "adamw_forward")
    assert {f"{kernel}_{half}" for kernel in expected} <= card.kernels
    assert f"widen_forward_{half}" not in card.kernels
    # The copies that AdamW leaves are the weights, rounded; nobody makes them again.
    copied = [name for name, dtype, _ in two.plan.states if dtype == precision]
    assert len(copied) == (17 if name == "gpt2" else 15)
    assert isinstance(two.executor, Executor)
    assert two.executor.written == [
        n for n, _, _ in two.plan.states if f"{n}@{half}" not in copied and n not in copied
    ]


@pytest.mark.skipif(not LONG, reason="all kernels are compiled again")
@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_training_step_of_older_gpus(
    name: str, precision: str, programs_75: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    cpu = Model.from_config({"model_type": name, **WIDER[name]})
    device = on_card(cpu, Card(programs_75, 1 << 19, how="both"), precision=precision)
    traced = train_step(cpu.family, sizes(cpu), OPTIMIZER)
    one, two = (traced.lower(m.device, precision=m.precision).compile(m.store) for m in (cpu, device))
    given = inputs(cpu, one.plan, rng)
    np.testing.assert_allclose(two(**given)["loss"], one(**given)["loss"], rtol=1e-2)


@pytest.mark.parametrize(
    ("precision", "name", "which"), in_halves(cases(), [case for case in cases() if case[0] == "llama"])
)
def test_every_program_in_16_bits_is_near_float32(
    precision: str, name: str, which: str, rng: np.random.Generator
) -> None:
    """By the size of each result. An update by AdamW sees the signs of gradients near 0, a ReLU those of what it is
    given."""
    cpu = model(name)
    card = Card(None)
    device = on_card(cpu, card, precision=precision)
    traced = PROGRAMS[which](cpu)
    one, two = (traced.lower(m.device, precision=m.precision).compile(m.store) for m in (cpu, device))
    for step in range(3):
        given = inputs(cpu, one.plan, rng, step)
        want, got = one(**given), two(**given)
        for key, value in want.items():
            assert got[key].dtype == value.dtype, key
            if key == "tokens":  # two of nearly one logit change places
                assert np.mean(got[key] != value) < 0.3
                continue
            assert apart(got[key], value) <= (1e-1 if key.startswith("grad") else 1e-2), key
    found = states(device)
    for key, value in states(cpu).items():
        assert apart(found[key], value) <= (0.4 if which.endswith("_step") else 2e-2), key
    assert card.replays == 2


@pytest.mark.parametrize(
    ("precision", "name"), in_halves([(name,) for name in FAMILIES], [("gpt2",), ("modernbert",)])
)
def test_twenty_steps_in_16_bits_follow_the_cpu(precision: str, name: str, rng: np.random.Generator) -> None:
    cpu = model(name)
    device = on_card(cpu, Card(None), precision=precision)
    traced = train_step(cpu.family, sizes(cpu), OPTIMIZER)
    one, two = (traced.lower(m.device, precision=m.precision).compile(m.store) for m in (cpu, device))
    same = inputs(cpu, one.plan, rng)
    losses = []
    for step in range(20):
        own = {k: v for k, v in inputs(cpu, one.plan, rng, step).items() if k in ("step", "rng")}
        losses.append([float(program(**same | own)["loss"]) for program in (one, two)])
    want, got = np.array(losses).T
    np.testing.assert_allclose(got, want, rtol=1.5e-2 * HALVES[precision][1])
    assert want[-1] < 0.9 * want[0]


@pytest.mark.parametrize("how", ["twins", "interpreter"])
def test_what_overflows_in_float16_ends_the_update(
    how: str, programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    """Gradients beyond 65504 are infinite, not the largest number, and so is their norm, which changes nothing."""
    cpu = Model.from_config({"model_type": "llama", **WIDER["llama"]})
    device = on_card(cpu, Card(programs, 1 << 19, how=how), precision="float16")
    two = (
        train_step(cpu.family, sizes(cpu), OPTIMIZER).lower("cuda", precision="float16").compile(device.store)
    )
    given = inputs(cpu, two.plan, rng)
    for scale, finite in ((1e9, False), (1.0, True)):
        before = states(device)
        norm = two(**given | {"loss_scale": np.array(scale, np.float32)})["grad_norm"]
        assert np.isfinite(norm) == finite
        same = [(value == before[name]).all() for name, value in states(device).items()]
        assert all(same) == (not finite)


@PRECISIONS
def test_copies_in_16_bits_follow_their_weights(precision: str, rng: np.random.Generator) -> None:
    """An evaluation reads copies: behind updates, replayed ones too, and behind a weight that is set. Against the CPU's
    with the device's weights."""
    cpu, card = model("gpt2"), Card(None)
    device = on_card(cpu, card, precision=precision)
    step = PROGRAMS["train_step"](cpu).lower("cuda", precision=precision).compile(device.store)
    measure = [
        PROGRAMS["evaluate"](cpu).lower(m.device, precision=m.precision).compile(m.store)
        for m in (cpu, device)
    ]
    same, text = inputs(cpu, step.plan, rng), inputs(cpu, measure[0].plan, rng)
    losses = []
    for number in range(4):
        step(**same | {"step": np.array(number + 1, np.int32), "lr": np.array(0.03, np.float32)})
        for name, _, _ in cpu.store.types():
            cpu.store.set(name, device.store.get(name))
        losses.append([float(program(**text)["loss"]) for program in measure])
    want, got = np.array(losses).T
    np.testing.assert_allclose(got, want, rtol=2e-3)
    assert (np.abs(np.diff(want)) > 6e-3 * want[1:]).all()
    device.store.set("transformer.wte.weight", np.zeros((37, 12), np.float32))
    labels = int((text["labels"] >= 0).sum())
    assert measure[1](**text)["loss"] == pytest.approx(labels * np.log(37), rel=1e-5)
    narrow = {name for name, dtype, _ in measure[1].plan.states if dtype == precision}
    assert f"transformer.wte.weight@{HALVES[precision][0]}" in narrow
    assert not any("ln_f" in name for name in narrow)
    assert device.store.get("transformer.wte.weight").dtype == np.float32


ROUNDED = AdamW(weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.9, stochastic_rounding=True)


def with_rounded_weights(name: str) -> Model:
    """A model whose weights are those that a run with stochastic rounding begins with."""
    cpu = model(name)
    for state, _, _ in cpu.store.types():
        cpu.store.set(state, ROUNDED.first(cpu.store.get(state)))
    return cpu


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "xlnet"])
def test_weights_that_are_rounded_by_chance_are_bfloat16_alone(
    name: str, parts: bool, rng: np.random.Generator
) -> None:
    """What products read is the weight itself; programs in float32 read copies of it. Against the CPU's with the
    device's weights, and near the CPU's own."""
    cpu, card = with_rounded_weights(name), Card(None)
    device = on_card(cpu, card, precision="bfloat16")
    whole = train_step(cpu.family, sizes(cpu), ROUNDED)
    traced = [accumulate_step(cpu.family, sizes(cpu)), apply_step(cpu.family, ROUNDED)] if parts else [whole]
    pairs = [
        [t.lower(m.device, precision=m.precision).compile(m.store) for m in (cpu, device)] for t in traced
    ]
    watched = PROGRAMS["evaluate"](cpu)
    measure = [watched.lower("cpu").compile(model(name).store)]
    measure += [watched.lower("cuda", precision=p).compile(device.store) for p in ("bfloat16", "float32")]
    assert isinstance(measure[0].executor, _core.Executor)
    given = {k: v for p in pairs for k, v in inputs(cpu, p[0].plan, rng).items()}
    text = inputs(cpu, watched.lower("cpu").plan, rng)
    for step in range(4):
        given |= {"step": np.array(step + 1, np.int32), "rng": np.array([5, -7, step, 0], np.int32)}
        for pair in pairs:
            one, two = (
                {k: v for k, v in given.items() if k in {n for n, _, _ in p.plan.inputs}} for p in pair
            )
            want, got = pair[0](**one), pair[1](**two)
            for key in ("loss", "grad_norm"):
                if key in want:
                    np.testing.assert_allclose(got[key], want[key], rtol=5e-2)
        here = Model(cpu.family, store=_core.Store())
        for state, _, _ in cpu.store.types():
            here.store.set(state, device.store.get(state))
        want = watched.lower("cpu").compile(here.store)(**text)["loss"]
        np.testing.assert_allclose(measure[1](**text)["loss"], want, rtol=5e-3)
        np.testing.assert_allclose(measure[2](**text)["loss"], want, rtol=1e-5)
    kinds = {state: dtype for state, dtype, _ in device.store.types()}
    parameters = {p: x.shape for p, x in cpu.family.named_parameters()}
    for p, shape in parameters.items():
        value = device.store.get(p)
        assert not (value.view(np.uint32) & 0xFFFF).any(), p
        assert kinds[f"optimizer.m.{p}"] == kinds[f"ema.{p}"] == "float32"
        assert apart(value, cpu.store.get(p)) < 0.2, p
        # Norms read float32; without a pass in the program that updates, vectors stay so, too.
        if "norm" in p or "ln_" in p or (parts and len(shape) == 1):
            assert kinds[p] == "float32", p
        elif name != "xlnet":
            assert kinds[p] == "bfloat16", p
    if not parts:
        plain = train_step(cpu.family, sizes(cpu), replace(ROUNDED, stochastic_rounding=False))
        plan = plain.lower("cuda", precision="bfloat16").plan
        copied = {state.removesuffix("@bf16") for state, dtype, _ in plan.states if dtype == "bfloat16"}
        saved = plan.state_bytes - pairs[0][1].plan.state_bytes
        # Tables of which rows are read have no copies.
        narrow = [p for p in parameters if kinds[p] == "bfloat16"]
        assert saved == sum(np.prod(parameters[p]) * (4 if p in copied else 2) for p in narrow)
        assert len(copied.intersection(narrow)) >= 8


def test_rounding_by_chance_by_the_compiled_kernels(
    programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    """Of weights in float32 the CPU's bits: but where updates differ in their last bits, and rounding with them."""
    cpu = with_rounded_weights("llama")  # without biases of keys, whose gradients are 0 but for rounding
    traced = train_step(cpu.family, sizes(cpu), ROUNDED)
    one = traced.lower("cpu").compile(cpu.store)
    given = inputs(cpu, one.plan, rng)
    for precision in ("bfloat16", "float16", "float32"):
        card = Card(programs, 1 << 19, how="both")
        device = on_card(cpu, card, precision=precision)
        traced.lower("cuda", precision=precision).compile(device.store)(**given)
        assert any(kernel.startswith("adamw_rounded_forward") for kernel in card.kernels)
    one(**given)
    for p, _ in cpu.family.named_parameters():
        assert np.mean(device.store.get(p) != cpu.store.get(p)) < 0.01, p


@pytest.mark.parametrize("rounding", [False, True], ids=["masters", "rounded"])
def test_states_take_the_bytes_that_are_predicted(rounding: bool) -> None:
    """Of an update over several batches, whose programs share weights, copies and sums of gradients."""
    cpu = model("gpt2")
    device = on_card(cpu, Card(None), precision="bfloat16")
    config = pf.TrainConfig(
        files=["text"], out="run", gradient_accumulation_steps=2, optim_args={"stochastic_rounding": rounding},
        device="cuda", bf16=True,
    )  # fmt: skip
    passes, store = Passes(device, config), device.store
    lowered = accumulate_step(cpu.family, sizes(cpu)).lower("cuda", precision="bfloat16")
    predicted = lowered.plan.state_bytes + passes.apart(lowered)
    for program in (lowered, apply_step(cpu.family, config.optimizer()).lower("cuda", precision="bfloat16")):
        program.compile(store)
    held = sum(SIZES[dtype] * int(np.prod(shape)) for _, dtype, shape in store.types())
    assert held + sum(copy.size for copy in store._copies.values()) == predicted


def test_a_weight_in_bfloat16_takes_what_it_is_set_to_and_refuses_what_writes_float32(
    rng: np.random.Generator,
) -> None:
    cpu = model("llama")
    device = on_card(cpu, Card(None), precision="bfloat16")
    free = device.store.device.free_bytes()
    train_step(cpu.family, sizes(cpu), ROUNDED).lower("cuda", precision="bfloat16").compile(device.store)
    name = "model.layers.0.mlp.down_proj.weight"
    value = rng.normal(size=(16, 20)).astype(np.float32)
    np.testing.assert_array_equal(device.store.get(name), ROUNDED.first(cpu.store.get(name)))
    device.store.set(name, value)
    np.testing.assert_array_equal(device.store.get(name), ROUNDED.first(value))
    with pytest.raises(StateError, match=r"is bfloat16\[16, 20\] on the device, not float32\[20, 16\]"):
        device.store.set(name, value.T)
    with pytest.raises(StateError, match=r"is bfloat16.* on the device, not float32"):
        train_step(cpu.family, sizes(cpu), OPTIMIZER).lower("cuda", precision="bfloat16").compile(
            device.store
        )
    assert free > device.store.device.free_bytes()


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_follow_the_cpu_and_allocate_nothing(
    name: str, early: bool, rng: np.random.Generator
) -> None:
    cpu = model(name)
    card = Card(None, early=early)
    device = on_card(cpu, card)
    traced = train_step(cpu.family, sizes(cpu), OPTIMIZER)
    one, two = (traced.lower(m.device).compile(m.store) for m in (cpu, device))
    assert isinstance(two.executor, Executor)
    losses: list[tuple[Any, Any]] = []
    pending = []
    same = inputs(cpu, one.plan, rng)
    allocations = card.allocations
    for step in range(20):
        given = {
            **same,
            **{k: v for k, v in inputs(cpu, one.plan, rng, step).items() if k in ("step", "rng")},
        }
        # Results are read one step later, as training does.
        pending.append(two.executor.start(given))
        if step:
            losses[-1] = (losses[-1][0], pending[-2].result()["loss"])
        losses.append((one(**given)["loss"], None))
    losses[-1] = (losses[-1][0], pending[-1].result()["loss"])
    want, got = np.array(losses, float).T
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert want[-1] < 0.9 * want[0]
    assert card.allocations == allocations
    assert card.kernels == card.prepared
    assert card.replays == 19


@pytest.mark.parametrize("how", ["twins", "interpreter"])
def test_a_norm_that_is_not_finite_ends_the_update_and_those_begun_behind_it(
    how: str, programs: dict[str, sim.Program], rng: np.random.Generator
) -> None:
    cpu = model("llama")  # without biases of keys, whose gradients are 0 but for rounding
    card = Card(programs, how=how)
    device = on_card(cpu, card)
    one, two = (
        train_step(m.family, sizes(m), OPTIMIZER).lower(m.device).compile(m.store) for m in (cpu, device)
    )
    assert isinstance(two.executor, Executor)
    same = inputs(cpu, one.plan, rng)
    for bad in range(3):  # walked, captured, replayed
        spoiled = {**same, "loss_scale": np.array(np.inf, np.float32)}
        before = states(device)
        runs = [two.executor.start(given) for given in (spoiled, same)]
        assert not any(np.isfinite(run.result()["grad_norm"]) for run in runs), bad
        for name, value in states(device).items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        assert np.isnan(one(**spoiled)["grad_norm"])
        for _ in range(2):
            assert_close(two(**same), one(**same))
    assert_close(states(device), states(cpu))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_s_update_is_that_of_the_cpu(optimizer: str, rng: np.random.Generator) -> None:
    cpu = model("llama")  # without biases of keys, whose gradients are 0 but for rounding
    device = on_card(cpu, Card(None))
    traced = train_step(cpu.family, sizes(cpu), OPTIMIZERS[optimizer](weight_decay=0.1, max_grad_norm=0.5))
    one, two = (traced.lower(m.device).compile(m.store) for m in (cpu, device))
    given = inputs(cpu, one.plan, rng)
    for step in range(3):
        given |= {name: inputs(cpu, one.plan, rng, step)[name] for name in ("step", "rng") if name in given}
        assert_close(two(**given), one(**given), 1e-4)
    # Where a gradient is near 0, updates that look at its sign or divide by its root see the last bits.
    for name, want in states(cpu).items():
        assert np.mean(np.abs(states(device)[name] - want) > 1e-3) < 0.02, name


def test_beam_search_and_sampling_give_the_cpu_s_tokens() -> None:
    cpu = model("gpt2")
    prompts = [[1, 2, 3], [4, 5], [6]]
    for options in ({"num_beams": 3}, {"do_sample": True, "seed": 4, "temperature": 0.9, "top_k": 9}, {}):
        device = on_card(cpu, Card(None))
        options = {"max_new_tokens": 8, **options}
        one, two = (m.generate(prompts, **options) for m in (cpu, device))
        assert one.ids == two.ids
        if one.scores[0] is not None:
            np.testing.assert_allclose(two.scores, one.scores, rtol=1e-4)


@PRECISIONS
def test_generation_in_16_bits_keeps_its_cache_in_them(precision: str) -> None:
    cpu = model("gpt2")
    device = on_card(cpu, Card(None, 1 << 19), precision=precision)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        one, two = (m.generate([[1, 2, 3], [4]], max_new_tokens=6, seed=1, **options) for m in (cpu, device))
        assert [len(ids) for ids in two.ids] == [len(ids) for ids in one.ids]
        # The first token of each, whatever followed.
        for a, b in zip(one.token_logprobs, two.token_logprobs, strict=True):
            np.testing.assert_allclose(b[0], a[0], atol=5e-2)
    kinds = {name.split(".")[0]: dtype for name, dtype, _ in device.store.types() if name.endswith("key")}
    assert set(kinds.values()) == {precision}


class Counting(Card):
    """A card that counts the bytes that come back from it."""

    def __init__(self) -> None:
        super().__init__(None, 1 << 19)
        self.came = 0

    def download(self, stream: Any, host: np.ndarray, start: int) -> None:
        self.came += host.nbytes
        super().download(stream, host, start)


WORDY = {**CONFIGS["gpt2"], "vocab_size": 700}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 0),
        ({"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [5]}, 0),
        ({"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}, 0),
        ({"do_sample": True, "temperature": 0.02, "top_p": 0.9, "num_return_sequences": 3}, 0),
        ({"do_sample": True, "temperature": 0.9, "min_p": 0.5}, 0),
        # Even at that: all 18 rows are asked for.
        ({"do_sample": True, "top_p": 0.95}, 18),
        # These look at whole rows from the start.
        ({"do_sample": True, "temperature": 0.8}, None),
        ({"repetition_penalty": 1.3}, None),
    ],
    ids=str,
)
def test_a_search_that_sees_the_best_of_each_row_finds_what_one_that_sees_all_finds(
    options: dict[str, Any], rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one and the same device; and the vocabulary stays there where the best suffice."""
    monkeypatch.setattr(decoder, "BEST", 64)
    monkeypatch.setattr(strategies, "BEST", 64)
    cpu = Model.from_config(WORDY, seed=3)
    for name, _, _ in cpu.store.types():  # far from even
        cpu.store.set(name, 4 * cpu.store.get(name))
    prompts = [[1, 2, 3], [4, 5], [6]]
    options = {"max_new_tokens": 6, "seed": 4, **options}
    asked: list[int] = []
    monkeypatch.setattr(Store, "rows", counted(Store.rows, asked))
    card = Counting()
    best = on_card(cpu, card).generate(prompts, **options)
    came = card.came
    with monkeypatch.context() as patch:
        patch.setattr(decoder.Decoder, "follow_up", lambda self, feeds, into, _: decoder.Following.whole(
            self.read(feeds, into)[0][:, 0]))  # fmt: skip
        card = Counting()
        whole = on_card(cpu, card).generate(prompts, **options)
    assert best.ids == whole.ids
    for one, two in ((best.scores, whole.scores), (best.token_logprobs, whole.token_logprobs)):
        if one and one[0] is not None:
            for a, b in zip(one, two, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    assert sum(asked) == (rows or 0)
    if rows == 0:
        assert came < card.came / 4


def counted(rows: Any, asked: list[int]) -> Any:
    """A function of rows that notes how many were asked for."""

    def go(self: Store, name: str, wanted: Any) -> Any:
        asked.append(len(wanted))
        return rows(self, name, wanted)

    return go


def test_a_server_s_requests_together_get_what_each_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that see the best of each row beside one that wants probabilities and those that see whole rows."""
    cpu = Model.from_config(WORDY, seed=3)
    wanted: list[dict[str, Any]] = [
        {}, {"do_sample": True, "top_k": 20, "temperature": 0.7}, {"do_sample": True, "temperature": 1.2}, {},
        {"repetition_penalty": 1.3}, {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    ]  # fmt: skip
    asked: list[int] = []
    monkeypatch.setattr(Store, "rows", counted(Store.rows, asked))
    told: list[list[Any]] = [[] for _ in wanted]
    engine = Engine(on_card(cpu, Card(None, 1 << 19)), rows=8, slots=24, waiting=9)
    engine.submit(
        [
            Completion(
                [1, 2, 3 + i], {"max_new_tokens": 5, "seed": 4, **options}, [], 0, 3 * (i == 3), 60.0, told[i].append
            )
            for i, options in enumerate(wanted)
        ]
    )  # fmt: skip
    engine.stop()
    for i, options in enumerate(wanted):
        alone = cpu.generate([[1, 2, 3 + i]], max_new_tokens=5, seed=4, **options)
        *parts, reasons = told[i]
        assert reasons == ["length"] * len(alone.ids)
        tokens = [token for part in parts for token in part]
        for number, ids in enumerate(alone.ids):
            assert [t.id for t in tokens if t.sequence == number] == ids[-5:], options
    assert asked


def test_rows_that_are_no_logits_are_an_error_of_a_device_too() -> None:
    cpu = Model.from_config(WORDY, seed=3)
    device = on_card(cpu, Card(None, 1 << 19))
    device.store.set("transformer.ln_f.bias", np.full(12, np.nan, np.float32))
    with pytest.raises(pf.Error, match="the logit of token 0 is NaN"):
        device.generate([[1, 2]], max_new_tokens=3)


def test_a_call_and_gradients_of_a_model_on_a_device(rng: np.random.Generator) -> None:
    cpu = model("bert")
    device = on_card(cpu, Card(None))
    ids = rng.integers(37, size=(2, 5))
    labels = np.where(ids > 20, ids, -100)
    mask = np.array([[1, 1, 1, 1, 0], [1] * 5])
    one, two = (m(ids, mask, labels=labels) for m in (cpu, device))
    np.testing.assert_allclose(two.logits, one.logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert two.loss == pytest.approx(one.loss, rel=TOLERANCE)
    (_, want), (_, got) = (m.loss_and_grads(ids, labels, mask) for m in (cpu, device))
    assert_close(got, want)


def test_a_larger_program_moves_the_arena_and_smaller_ones_still_run(rng: np.random.Generator) -> None:
    cpu = model("gpt2")
    device = on_card(cpu, Card(None))
    ids = rng.integers(37, size=(4, 20))
    for rows in (1, 1, 1, 4, 1, 1, 1):
        one, two = (m(ids[:rows]) for m in (cpu, device))
        np.testing.assert_allclose(two.logits, one.logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_tables_of_tensors_follow_the_arena(rng: np.random.Generator) -> None:
    cpu = model("gpt2")
    device = on_card(cpu, Card(None))

    def pair(s: Sizes) -> list[Compiled]:
        return [train_step(m.family, s, OPTIMIZER).lower(m.device).compile(m.store) for m in (cpu, device)]

    def run(programs: list[Compiled], step: int) -> None:
        given = inputs(cpu, programs[0].plan, rng, step)
        one, two = (program(**given) for program in programs)
        assert_close(two, one)

    small = pair(sizes(cpu))
    for step in range(3):
        run(small, step)
    large = pair(Sizes(5, 19))  # its arena takes the place of the other one
    for step in range(3, 6):
        run(small, step)
        run(large, step)
    assert_close(states(device), states(cpu), 1e-4)


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_indices_are_checked_before_they_are_uploaded(rng: np.random.Generator) -> None:
    device = on_card(model("gpt2"), Card(None))
    compiled = PROGRAMS["evaluate"](device).lower("cuda").compile(device.store)
    given = inputs(device, compiled.plan, rng)
    for name, value, message in (
        ("input_ids", 37, r"\[gather\] input_ids 37 at place 3 is outside 0..37"),
        ("position_ids", -1, "position_ids -1"),
        ("labels", 40, "labels 40"),
    ):
        bad = {**given, name: given[name].copy()}
        bad[name].reshape(-1)[3] = value
        with pytest.raises(InputError, match=message):
            compiled(**bad)
    with pytest.raises(InputError, match="input 'labels' is missing"):
        compiled(**{k: v for k, v in given.items() if k != "labels"})
    with pytest.raises(InputError, match="there is no input 'mask'"):
        compiled(**given, mask=0)
    with pytest.raises(InputError, match=r"must be int32\[2, 7\], got int32\[2, 3\]"):
        compiled(**{**given, "labels": np.zeros((2, 3), np.int32)})


def test_a_card_that_is_too_small_is_refused_before_the_run() -> None:
    device = on_card(model("gpt2"), Card(None, words=1 << 13))
    with pytest.raises(DeviceError, match=r"needs [\d.]+ KiB .* are free; use smaller batches"):
        device(np.zeros((4, 24), int))


def test_a_state_keeps_its_type() -> None:
    store = Store(Card(None))
    store.set("a", np.zeros((2, 3), np.float32))
    with pytest.raises(StateError, match=r"'a' is float32\[2, 3\] on the device"):
        store.set("a", np.zeros((3, 2), np.float32))
    with pytest.raises(StateError, match="no state 'b'"):
        store.get("b")
    store.remove("a")
    assert store.types() == []


# ---- The pretended card finds what it is for ------------------------------------------------------------------------


def test_work_waits_until_it_is_needed() -> None:
    card = Card(None)
    memory, host, stream, event = card.memory(8), card.pinned(8), card.stream(), card.event()
    host[:] = 1
    card.upload(stream, memory.address, host)
    host[:] = 2  # too early: the copy has not happened
    card.record(event, stream)
    card.synchronize(event)
    back = card.pinned(8)
    card.download(stream, back, memory.address)
    assert (back == 0xFF).all()
    card.record(event, stream)
    card.synchronize(event)
    assert (back == 2).all()


def test_a_stream_without_a_wait_reads_what_is_not_there() -> None:
    card = Card(None)
    a, b, host = card.memory(8), card.memory(8), card.pinned(8)
    one, two, event = card.stream(), card.stream(), card.event()
    card.upload(two, a.address, host)
    card.copy(one, b.address, a.address, 8)
    card.record(event, one)
    with pytest.raises(sim.Fault, match="uninitialised"):
        card.synchronize(event)


@pytest.mark.parametrize("what", ["memory", "upload", "download", "synchronize", "capture"])
def test_a_capture_forbids_what_cuda_forbids(what: str) -> None:
    card = Card(None)
    memory, host, stream, event = card.memory(8), card.pinned(8), card.stream(), card.event()
    card.begin_capture(stream)
    act = {
        "memory": lambda: card.memory(4),
        "upload": lambda: card.upload(stream, memory.address, host),
        "download": lambda: card.download(stream, host, memory.address),
        "synchronize": lambda: card.synchronize(event),
        "capture": lambda: card.begin_capture(stream),
    }[what]
    with pytest.raises(sim.Fault, match="captured"):
        act()


def test_a_graph_whose_memory_is_gone_faults() -> None:
    card = Card(None)
    memory, stream, event = card.memory(8, zero=True), card.stream(), card.event()
    card.begin_capture(stream)
    card.copy(stream, memory.address, memory.address, 8)
    graph = card.end_capture(stream)
    del memory
    card.replay(stream, graph)
    card.record(event, stream)
    with pytest.raises(sim.Fault, match="out of bounds"):
        card.synchronize(event)
