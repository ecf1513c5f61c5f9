"""Optimizers: what an update makes of a parameter, its gradient and what is remembered of the gradients before.

Each is a few operations in the graph of the training step, so that its states are part of the plan, of checkpoints and
of the memory that is predicted. States are named ``optimizer.<kind>.<parameter>`` and have the parameter's shape unless
said otherwise; ``ema.<parameter>`` is the running average of the weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy.typing as npt

from pyrformer import bfloat16
from pyrformer.errors import ConfigError
from pyrformer.nn import Parameter, Tensor, Trace
from pyrformer.nn import functional as F

STATES, AVERAGES = "optimizer.", "ema."


@dataclass(frozen=True)
class Step:
    """One parameter within one update.

    Attributes:
        trace: the program's trace.
        parameter: which one.
        p: its values.
        raw: its gradient before clipping.
        clip: the factor on gradients, [], which divides by their scale, too.
        lr: the learning rate, [].
        decay: its weight decay.
    """

    trace: Trace
    parameter: Parameter
    p: Tensor
    raw: Tensor
    clip: Tensor
    lr: Tensor
    decay: float

    @property
    def g(self) -> Tensor:
        """The clipped gradient."""
        return self.raw * self.clip

    @property
    def decayed(self) -> Tensor:
        """p · (1 − lr · decay): decay beside the gradient (Loshchilov and Hutter 2019, equation 9)."""
        return self.p if self.decay == 0.0 else self.p * (self.trace.fill(1.0) - self.lr * self.decay)

    @property
    def with_decay(self) -> Tensor:
        """g + decay · p: decay as a part of the gradient."""
        return self.g if self.decay == 0.0 else self.g + self.p * self.decay

    def state(self, kind: str, shape: Sequence[int] | None = None) -> Tensor:
        """A state of this parameter, zero at the beginning."""
        name = f"{STATES}{kind}.{self.parameter.name}"
        return self.trace.state(name, self.parameter.shape if shape is None else shape)

    def average(self, kind: str, new: Tensor, keep: float) -> Tensor:
        """Updates a state to keep · state + (1 − keep) · new and gives that."""
        state = self.state(kind)
        value = state * keep + new * (1.0 - keep)
        self.trace.update(state, value)
        return value


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all optimizers share; the learning rate is an input of the step.

    Attributes:
        weight_decay: of parameters with two or more axes: biases and norms have none.
        weight_decay_groups: decay of the parameters whose names match a pattern (``*``, ``?``, ``[…]``), in place of
            the above; the first match counts.
        max_grad_norm: bound on the global norm of the gradient; 0: none.
        ema_decay: d of the running average of weights, ema ← d · ema + (1 − d) · p after each update; 0: none.
    """

    weight_decay: float = 0.0
    weight_decay_groups: Mapping[str, float] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0

    def decay(self, parameter: Parameter) -> float:
        """The weight decay of a parameter."""
        for pattern, decay in self.weight_decay_groups.items():
            if fnmatchcase(parameter.name, pattern):
                return decay
        return self.weight_decay if len(parameter.shape) >= 2 else 0.0

    def update(
        self,
        trace: Trace,
        parameters: Sequence[Parameter],
        grads: Sequence[Tensor],
        norm: Tensor | None = None,
        *,
        scaled: bool = False,
    ) -> None:
        """Traces the update of all parameters: input ``lr []``, output ``grad_norm []``, and :meth:`inputs`.

        Args:
            norm: of the gradient, [], where it has more than these parts.
            scaled: gradients, and so their norm, are to be multiplied by the input ``unscale []``, a power of two.
        """
        lr = trace.input("lr", trace.dtype, ())
        unscale = trace.input("unscale", trace.dtype, ()) if scaled else None
        with trace.scope("optimizer"):
            if norm is None:
                norm = F.global_norm(grads)
                trace.output("grad_norm", norm)
            if unscale is not None:
                norm = norm * unscale
            clip = F.clip_factor(norm, self.max_grad_norm) if self.max_grad_norm > 0 else trace.fill(1.0)
            if unscale is not None:
                clip = clip * unscale
            # All updates come first: those that follow one another may share a launch.
            values = []
            for parameter, grad in zip(parameters, grads, strict=True):
                p = trace.parameter(parameter)
                values.append(self.rule(Step(trace, parameter, p, grad, clip, lr, self.decay(parameter))))
                trace.update(p, values[-1])
            for parameter, new in zip(parameters, values, strict=True):
                if self.ema_decay > 0:
                    ema = trace.state(AVERAGES + parameter.name, parameter.shape)
                    trace.update(ema, ema * self.ema_decay + new * (1.0 - self.ema_decay))

    def rule(self, s: Step) -> Tensor:
        """The new values of a parameter; states are updated on the way."""
        raise NotImplementedError

    def inputs(self, step: int) -> dict[str, Any]:
        """The values of further inputs at an update, counted from 1."""
        return {}

    def first(self, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the values of a parameter become before its first update."""
        return value


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), in one kernel. States: moments ``m``, ``v``.

    Attributes:
        stochastic_rounding: weights have values of bfloat16, and with ``bf16`` a device keeps them in it without a copy
            in float32. New ones are rounded up or down by chance, the likelier the nearer, so that small changes are
            not lost on the average (Zamirai et al. 2020, "Revisiting BFloat16 Training"); those before the first update
            are rounded to the nearest.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    stochastic_rounding: bool = False

    def rule(self, s: Step) -> Tensor:
        step = s.trace.input("step", "int32", ())
        m, v = s.state("m"), s.state("v")
        hyper: dict[str, Any] = {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "weight_decay": s.decay,
        }
        rng = []
        if self.stochastic_rounding:
            # By name, so that bits do not depend on which parameters are trained, here or by other processes.
            hyper["rounding"], rng = zlib.crc32(s.parameter.name.encode()), [s.trace.rng()]
        p, new_m, new_v = F.adamw(s.p, s.raw, m, v, s.clip, s.lr, step, *rng, **hyper)
        s.trace.update(m, new_m)
        s.trace.update(v, new_v)
        return p

    def inputs(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def first(self, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not self.stochastic_rounding:
            return value
        return bfloat16.widened(bfloat16.narrowed(value)).astype(value.dtype)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum as ``torch.optim.SGD`` has it: decay is a part of the gradient. State: ``m`` with
    momentum. ``nesterov`` looks one step ahead (Sutskever et al. 2013, section 2)."""

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0.0:
            raise ConfigError("[train] nesterov needs a momentum above 0")

    def rule(self, s: Step) -> Tensor:
        g = s.with_decay
        if self.momentum == 0.0:
            return s.p - g * s.lr
        m = s.state("m")
        new = m * self.momentum + g
        s.trace.update(m, new)
        return s.p - (g + new * self.momentum if self.nesterov else new) * s.lr


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """RMSprop (Hinton 2012, lecture 6e) with ``torch.optim.RMSprop``'s momentum: decay is a part of the gradient.
    States: ``v``, and ``m`` with momentum."""

    alpha: float = 0.99
    momentum: float = 0.0
    eps: float = 1e-8

    def rule(self, s: Step) -> Tensor:
        g = s.with_decay
        d = g / (F.sqrt(s.average("v", g * g, self.alpha)) + s.trace.fill(self.eps))
        if self.momentum > 0.0:
            m = s.state("m")
            d = m * self.momentum + d
            s.trace.update(m, d)
        return s.p - d * s.lr


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011, section 1): decay is a part of the gradient. State: ``v``, the sum of squares."""

    eps: float = 1e-10

    def rule(self, s: Step) -> Tensor:
        g, v = s.with_decay, s.state("v")
        new = v + g * g
        s.trace.update(v, new)
        return s.p - g / (F.sqrt(new) + s.trace.fill(self.eps)) * s.lr


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2). State: ``m``. It takes a third to a tenth of AdamW's learning rate."""

    beta1: float = 0.9
    beta2: float = 0.99

    def rule(self, s: Step) -> Tensor:
        m, g = s.state("m"), s.g
        direction = F.sign(m * self.beta1 + g * (1.0 - self.beta1))
        s.average("m", g, self.beta2)
        return s.decayed - direction * s.lr


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) with a learning rate from outside, without momentum.

    The second moments of a matrix [N, C] are kept as their means over rows and columns, states ``row [N]`` and ``column
    [C]``; tensors of more axes count as matrices of their first axis and the rest, vectors keep ``v``.

    Attributes:
        decay_rate: second moments at update t keep the share 1 − t^decay_rate.
        clip_threshold: bound on the root mean square of the direction.
        eps: added to squares.
    """

    decay_rate: float = -0.8
    clip_threshold: float = 1.0
    eps: float = 1e-30

    def rule(self, s: Step) -> Tensor:
        trace, shape = s.trace, s.parameter.shape
        beta2 = trace.input("beta2", trace.dtype, ())
        rest = trace.fill(1.0) - beta2
        n = math.prod(shape[:1])
        c = math.prod(shape) // n

        def average(kind: str, size: Sequence[int], new: Tensor) -> Tensor:
            state = s.state(kind, size)
            value = state * beta2 + F.reshape(new, size) * rest
            trace.update(state, value)
            return value

        if len(shape) < 2:
            g = s.g
            d = g / F.sqrt(average("v", shape, g * g + trace.fill(self.eps)))
        else:
            g = F.reshape(s.g, (n, c))
            square = g * g + trace.fill(self.eps)
            row = F.reshape(average("row", (n,), F.linear(square, trace.fill(1.0 / c, (1, c)))), (n, 1))
            column = average("column", (c,), F.sum_to(square, (c,)) * (1.0 / n))
            row = F.sqrt(row / (F.sum_to(row, (1,)) * (1.0 / n)))
            d = F.reshape(g / F.linear(row, F.reshape(F.sqrt(column), (c, 1))), shape)
        bound = self.clip_threshold * math.sqrt(n * c)
        return s.decayed - d * F.clip_factor(F.global_norm([d]), bound) * s.lr

    def inputs(self, step: int) -> dict[str, Any]:
        return {"beta2": 1.0 - float(step) ** self.decay_rate}


#: The polynomial of Newton-Schulz steps. Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers".
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the layers; AdamW for all else: embeddings, heads, norms, biases.

    The momentum of a matrix [N, C], state ``m``, is brought near an orthogonal one by Newton-Schulz steps in float32.

    Attributes:
        momentum: the share of the momentum that an update keeps.
        nesterov: look one step ahead.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: "match_rms_adamw": times 0.2·√max(N, C), so that AdamW's learning rate and decay fit (Liu et al.
            2025, equation 4); "original": times √max(1, N / C).
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        if self.adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ConfigError(
                f"[train] adjust_lr_fn must be 'match_rms_adamw' or 'original', got {self.adjust_lr_fn!r}"
            )
        if self.stochastic_rounding:
            raise ConfigError("[train] muon has no stochastic_rounding; use adamw")

    def rule(self, s: Step) -> Tensor:
        if not hidden_matrix(s.parameter):
            return super().rule(s)
        g = s.g
        m = s.average("m", g, self.momentum)
        x = orthogonal(g * (1.0 - self.momentum) + m * self.momentum if self.nesterov else m, self.ns_steps)
        rows, columns = s.parameter.shape
        size = (
            0.2 * math.sqrt(max(rows, columns))
            if self.adjust_lr_fn == "match_rms_adamw"
            else math.sqrt(max(1.0, rows / columns))
        )
        return s.decayed - x * (s.lr * size)


def hidden_matrix(parameter: Parameter) -> bool:
    """Whether a parameter is a matrix of one of the numbered layers, neither an embedding nor a head."""
    name = parameter.name
    return len(parameter.shape) == 2 and bool(re.search(r"\.\d+\.", name)) and not name.endswith("bias")


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """U·Vᵀ of x = U·Σ·Vᵀ, roughly: singular values come out between 0.7 and 1.2. ``x [N, C]``."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = x / (F.global_norm([x]) + x.trace.fill(1e-7))
    for _ in range(steps):
        gram = F.matmul(x, x, ta=True) if tall else F.matmul(x, x, tb=True)
        power = gram * b + F.matmul(gram, gram) * c
        x = x * a + (F.matmul(x, power) if tall else F.matmul(power, x))
    return x


#: Optimizers by name.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
    "lion": Lion,
    "adafactor": Adafactor,
    "muon": Muon,
}


def make_optimizer(
    name: str, arguments: Mapping[str, Any], *, betas: tuple[float, float], eps: float, **shared: Any
) -> Optimizer:
    """The optimizer of a name.

    Args:
        arguments: its own fields.
        betas, eps: taken as ``beta1``, ``beta2`` and, by AdamW and Muon, ``eps``, unless among the arguments.
        shared: fields of :class:`Optimizer`.

    Raises:
        ConfigError: there is no such optimizer, or an argument is unknown, of another type or out of range.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"[train] optim must be one of {tuple(OPTIMIZERS)}, got {name!r}")
    kind = OPTIMIZERS[name]
    common = {f.name for f in dataclasses.fields(Optimizer)}
    own = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in common}
    for key, value in arguments.items():
        if key not in own:
            raise ConfigError(f"[train] {name} has no argument {key!r}; it takes {tuple(own)}")
        _check(key, value, own[key])
    given: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1]}
    if issubclass(kind, AdamW):
        given["eps"] = eps
    return kind(**shared, **{k: v for k, v in given.items() if k in own} | dict(arguments))


def _check(key: str, value: Any, default: Any) -> None:
    """Raises ConfigError unless a value is what the argument takes: one of its default's type, and in its range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, (bool, str)):
        ok, wanted = type(value) is type(default), "true or false" if isinstance(default, bool) else "a name"
    elif isinstance(default, int):
        ok, wanted = number and isinstance(value, int) and 1 <= value <= 100, "a whole number from 1 to 100"
    elif key == "decay_rate":
        ok, wanted = number and value < 0, "a number below 0"
    elif key in ("eps", "clip_threshold"):
        ok, wanted = number and value > 0, "a number above 0"
    else:
        ok, wanted = number and 0 <= value < 1, "in [0, 1)"
    if not ok:
        raise ConfigError(f"[train] {key} of the optimizer must be {wanted}, got {value!r}")
