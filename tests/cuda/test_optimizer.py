"""optimizer.cu against float64."""

import numpy as np
import pytest
from kernels import launches as run
from kernels import reference

from pyrformer.compile import Traced
from pyrformer.executors import open_store
from pyrformer.nn import Trace
from pyrformer.nn import functional as F

LAYOUTS = pytest.mark.parametrize("layout", run.LAYOUTS.values(), ids=run.LAYOUTS)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 260)])
@pytest.mark.parametrize(("step", "half"), [(1, "bf16"), (2, "f16"), (1000, "bf16"), (100_000, "")])
def test_adamw(device, rng, close, shape, step, half, layout):
    p, g, m = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    v = rng.random(size=shape).astype(np.float32)
    settings = {"clip": 0.5, "lr": 0.01, "step": step, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.1}
    want = reference.adamw(p, g, m, v, **settings)
    for in_place in (True, False):
        got = run.adamw(device, p, g, m, v, **settings, layout=layout, in_place=in_place, copy=half)
        for x, y in zip(got, want, strict=False):
            close(x, y)
        if half:
            np.testing.assert_array_equal(got[3], run.rounded(got[0], half))


def test_many_tensors_in_one_launch_get_the_bits_that_each_gets_alone(device, rng):
    shapes = [(1, 1), (3, 1030), (1, 5000), (70, 61), (1, 4096), (2, 4)]
    tensors = [tuple(np.abs(rng.normal(size=s)).astype(np.float32) for _ in range(4)) for s in shapes]
    scalars = {"clip": 0.5, "lr": 0.01, "step": 7, "betas": (0.9, 0.999), "eps": 1e-8}
    decays, copies = [0.1, 0.0, 0.2, 0.1, 0.0, 0.3], ["bf16", ""] * 3
    for layout in run.LAYOUTS.values():
        many = run.adamw_of_all(device, tensors, **scalars, decays=decays, layout=layout, copies=copies)
        for got, tensor, decay, copy in zip(many, tensors, decays, copies, strict=True):
            alone = run.adamw(device, *tensor, **scalars, decay=decay, layout=layout, copy=copy)
            for x, y in zip(got, alone, strict=True):
                np.testing.assert_array_equal(x, y)


@LAYOUTS
def test_weights_rounded_by_chance(device, rng, close, layout):
    """What the update gives, rounded by the bits of its elements, however it is stored; moments are as ever."""
    shapes = [(5, 7), (3, 1030), (1, 5000), (2, 4)]
    tensors = [tuple(np.abs(rng.normal(size=s)).astype(np.float32) for _ in range(4)) for s in shapes]
    tensors = [(run.rounded(p, "bf16"), g, m, v) for p, g, m, v in tensors]
    scalars = {"clip": 0.5, "lr": 0.01, "step": 7, "betas": (0.9, 0.999), "eps": 1e-8}
    decays, streams = [0.1, 0.0, 0.2, 0.1], [3, 2**32 - 1, 0, 3]
    state = np.array([5, -7, 11, 1], np.int32)
    plain = run.adamw_of_all(device, tensors, **scalars, decays=decays, layout=layout)
    for narrow in ([True, False, True, False], [False, True, False, True]):
        for in_place in (True, False):
            chance = run.Chance(state, streams, narrow)
            options = {
                "layout": layout,
                "in_place": in_place,
                "copies": ["" if n else "bf16" for n in narrow],
                "chance": chance,
            }
            found = run.adamw_of_all(device, tensors, **scalars, decays=decays, **options)
            for got, exact, stream in zip(found, plain, streams, strict=True):
                words = reference.words(state, stream, 0xB16F, exact[0].size).reshape(exact[0].shape)
                for x in (got[0], *got[3:]):  # the copy is the same
                    np.testing.assert_array_equal(x, reference.by_chance(exact[0], words))
                for x, y in zip(got[1:3], exact[1:3], strict=True):
                    np.testing.assert_array_equal(x, y)


def test_rounding_by_chance_gives_the_bits_of_the_cpu(device, rng):
    """With a learning rate of 0 the update is the weight itself, so that both round the same numbers: any float32, and
    those at the ends of the range."""
    p = rng.integers(0, 2**32, (37, 129), np.uint32).view(np.float32)
    p[np.abs(p) < 2.0**-126] = 1.0  # the device has no subnormals
    p[0, :4] = np.inf, -np.inf, 0.0, -0.0
    p[np.isnan(p)] = 3.0e38
    zero = np.zeros_like(p)
    state = np.array([9, -2, 4, 0], np.int32)
    trace = Trace("float32")
    states = [trace.state(name, p.shape) for name in "pmv"]
    given = [
        trace.input(*x) for x in (("g", "float32", p.shape), ("clip", "float32", ()), ("lr", "float32", ()))
    ]
    step = trace.input("step", "int32", ())
    hyper = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "rounding": 77}
    new = F.adamw(states[0], given[0], *states[1:], *given[1:], step, trace.rng(), **hyper)
    for x, y in zip(states, new, strict=True):
        trace.update(x, y)
    store = open_store("cpu")
    for name, value in zip("pmv", (p, zero, zero), strict=True):
        store.set(name, value)
    program = Traced("test", trace).lower("cpu").compile(store)
    program(g=zero, clip=np.float32(1), lr=np.float32(0), step=np.int32(4), rng=state)
    for narrow in (False, True):
        start = run.rounded(p, "bf16") if narrow else p
        if narrow:
            store.set("p", start)
            program(g=zero, clip=np.float32(1), lr=np.float32(0), step=np.int32(4), rng=state)
        chance = run.Chance(state, [77], [narrow])
        ((got, _, _),) = run.adamw_of_all(
            device, [(start, zero, zero, zero)], 1.0, 0.0, 4, (0.9, 0.99), 1e-8, [0.1], chance=chance
        )
        np.testing.assert_array_equal(got.view(np.uint32), store.get("p").view(np.uint32))
        assert not (got.view(np.uint32) & 0xFFFF)[np.isfinite(got)].any()


def test_the_first_step_moves_by_the_learning_rate(device, rng):
    """Bias correction makes m̂ / √v̂ = ±1 at step 1: 1 − β² ≈ 1e-3 must keep its digits."""
    g = rng.normal(size=(1, 100)).astype(np.float32)
    zero = np.zeros_like(g)
    p, _, _ = run.adamw(device, zero, g, zero, zero, 1.0, 0.25, 1, (0.9, 0.9999), 1e-12, 0.0)
    np.testing.assert_allclose(p, -0.25 * np.sign(g), rtol=3e-6)


def test_a_halted_update_changes_nothing(device, rng):
    p, g, m = (rng.normal(size=(3, 7)).astype(np.float32) for _ in range(3))
    for halt in (0, 1):
        word = device.array([halt], np.int32)
        got = run.adamw(device, p, g, m, m * m, 1.0, 0.1, 1, (0.9, 0.95), 1e-8, 0.1, halt=word)
        for new, old in zip(got, (p, m, m * m), strict=True):
            assert (new == old).all() == halt


def test_ten_steps_follow_the_reference(device, rng, close):
    p = rng.normal(size=(3, 5)).astype(np.float32)
    state, exact = (p, 0 * p, 0 * p), (p.astype(float), 0.0 * p, 0.0 * p)
    for step in range(1, 11):
        g = rng.normal(size=p.shape).astype(np.float32)
        state = run.adamw(device, state[0], g, *state[1:], 1.0, 1e-2, step, (0.9, 0.95), 1e-8, 0.01)
        exact = reference.adamw(exact[0], g, *exact[1:], 1.0, 1e-2, step, (0.9, 0.95), 1e-8, 0.01)
    for x, y in zip(state, exact, strict=True):
        close(x, y)
