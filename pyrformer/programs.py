"""The programs that a model is compiled into: forward, gradients, training step, evaluation, decoding step.

Each function traces one for fixed sizes. Letters: B batch, T tokens, M labelled positions (masked objectives), S cache
slots, R cache rows, C width, V vocabulary.

Labels are given ready for the loss: for "ar" families ``labels int32[B, T]`` holds the *next* token of each position;
for "mlm", "plm" and "tokens" families ``positions int32[M]`` are flat indices of the last hidden state's rows and
``labels int32[M]`` their tokens or classes; ``sentence_labels int32[B]`` are the classes of whole sequences. −100 is
ignored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pyrformer.compile import Traced
from pyrformer.errors import ConfigError, InputError
from pyrformer.models.base import PROBLEMS, Cache, Family, Inputs
from pyrformer.nn import Parameter, Tensor, Trace
from pyrformer.nn import functional as F
from pyrformer.optimizers import Optimizer


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch: B, T, M (0 where every position has a label, or none has), and whether there are segments,
    prefixes (``prefix int32[B]``: so many first tokens that all may see), labels of sequences and, for permutation
    models, P targets (0: every token), ``hidden int32[B, T, T]``, M remembered states and mirrored rows
    (``models.base.Inputs``)."""

    batch: int
    tokens: int
    labelled: int = 0
    segments: bool = False
    prefix: bool = False
    sentences: bool = False
    targets: int = 0
    hidden: bool = False
    remembered: int = 0
    mirrored: bool = False


#: The input that scales each loss.
SCALES = {"loss": "loss_scale", "sentence_loss": "sentence_scale"}


@dataclass(frozen=True)
class LossOptions:
    """What training adds to the cross-entropy; measurements have neither.

    ``smoothing`` ε of label smoothing (Szegedy et al. 2016, section 7); ``z_loss``, a factor of log² of the softmax's
    denominator (Chowdhery et al. 2022, section 5).
    """

    smoothing: float = 0.0
    z_loss: float = 0.0


def trainable(model: Family) -> list[Parameter]:
    """The parameters that training changes."""
    return [p for _, p in model.named_parameters() if p.trainable]


def batch_inputs(trace: Trace, model: Family, s: Sizes) -> Inputs:
    """The symbolic inputs of a batch of these sizes."""
    shape = (s.batch, s.tokens)
    types = trace.input("token_type_ids", "int32", shape) if model.uses_token_types else None
    segments = trace.input("segments", "int32", shape) if s.segments else None
    prefix = trace.input("prefix", "int32", (s.batch,)) if s.prefix else None
    ids, positions = trace.input("input_ids", "int32", shape), trace.input("position_ids", "int32", shape)
    if model.objective != "plm":
        return Inputs(ids, positions, types, segments, prefix)
    targets = trace.input("targets", "int32", (s.batch, s.targets)) if s.targets else None
    hidden = trace.input("hidden", "int32", (s.batch, s.tokens, s.tokens)) if s.hidden else None
    mems: tuple[Tensor, ...] = ()
    key_types = None
    if s.remembered:
        states = (s.batch, s.remembered, model.width)
        mems = tuple(trace.input(f"mems.{i}", trace.dtype, states) for i in range(model.depth))
        key_types = trace.input("key_types", "int32", (s.batch, s.remembered + s.tokens))
    return Inputs(
        ids,
        positions,
        types,
        targets=targets,
        hidden=hidden,
        mems=mems,
        key_types=key_types,
        mirrored=s.mirrored,
    )


def _losses(
    x: Inputs, model: Family, hidden: Tensor, s: Sizes, options: LossOptions | None = None
) -> dict[str, Tensor]:
    """The summed losses that the batch has labels for: "loss" over tokens, "sentence_loss" over sequences."""
    extras, trace = asdict(options or LossOptions()), hidden.trace
    losses = {}
    if model.objective == "ar":
        losses["loss"] = model.loss(hidden, trace.input("labels", "int32", (s.batch, s.tokens)), **extras)
    elif s.labelled:
        losses["loss"] = model.loss(*_labelled_rows(trace, hidden, s), **extras)
    head = model.sentence_output(hidden, x) if s.sentences else None
    if head is not None:
        pooled, weight, bias = head
        problem = model.config.extra.get("problem_type")
        if problem not in (None, PROBLEMS[-1]):
            raise ConfigError(
                f"[model] there is no loss for problem_type {problem!r}, only for {PROBLEMS[-1]!r}"
            )
        labels = trace.input("sentence_labels", "int32", (s.batch,))
        with trace.scope("sentence"):
            losses["sentence_loss"] = F.linear_cross_entropy(
                pooled, trace.parameter(weight), bias, labels, **extras
            )
    return losses


def _labelled_rows(trace: Trace, hidden: Tensor, s: Sizes) -> tuple[Tensor, Tensor]:
    """The rows of ``hidden [B, T, C]`` that have labels ``[M, C]``, and the labels."""
    return _rows_at_positions(trace, hidden, s), trace.input("labels", "int32", (s.labelled,))


def _rows_at_positions(trace: Trace, hidden: Tensor, s: Sizes) -> Tensor:
    """The rows ``[M, C]`` of ``hidden [B, T, C]`` at the input ``positions int32[M]``."""
    positions = trace.input("positions", "int32", (s.labelled,))
    with trace.scope("labelled"):
        flat = F.reshape(hidden, (hidden.shape[0] * hidden.shape[1], hidden.shape[2]))
        return F.gather(flat, positions)


def forward(
    model: Family, s: Sizes, dtype: str = "float32", *, all_hidden: bool = False, loss: bool = False
) -> Traced:
    """Outputs ``hidden [B, T, C]``; ``logits [B, T, V]`` and ``sentence_logits [B, N]`` of families that have them;
    with ``all_hidden`` each ``hidden.i``; with ``loss`` the summed ``loss []`` and ``sentence_loss []`` that the batch
    has labels for."""
    trace = Trace(dtype)
    x = batch_inputs(trace, model, s)
    states = model.hidden_states(x)
    trace.output("hidden", states[-1])
    if all_hidden:
        for i, state in enumerate(states):
            trace.output(f"hidden.{i}", state)
    if model.objective in ("ar", "mlm", "plm", "tokens"):
        trace.output("logits", model.logits(states[-1]))
    head = model.sentence_output(states[-1], x)
    if head is not None:
        pooled, weight, bias = head
        with trace.scope("sentence"):
            trace.output("sentence_logits", F.linear(pooled, trace.parameter(weight), bias))
    if loss:
        for name, value in _losses(x, model, states[-1], s).items():
            trace.output(name, value)
    return Traced("forward", trace)


def evaluate(model: Family, s: Sizes, dtype: str = "float32") -> Traced:
    """Outputs the summed ``loss []`` and ``sentence_loss []`` that the batch has labels for, without logits."""
    trace = Trace(dtype)
    x = batch_inputs(trace, model, s)
    for name, value in _losses(x, model, model.hidden_states(x)[-1], s).items():
        trace.output(name, value)
    return Traced("evaluate", trace)


def token_losses(model: Family, s: Sizes, dtype: str = "float32") -> Traced:
    """Outputs ``losses``, −log p of each label: ``[B, T]`` for "ar" families, ``[M]`` otherwise; 0 without a label."""
    trace = Trace(dtype)
    hidden = model.hidden_states(batch_inputs(trace, model, s))[-1]
    if model.objective == "ar":
        rows, labels = hidden, trace.input("labels", "int32", (s.batch, s.tokens))
    else:
        rows, labels = _labelled_rows(trace, hidden, s)
    trace.output("losses", model.token_losses(rows, labels))
    return Traced("token_losses", trace)


def token_logits(model: Family, s: Sizes, dtype: str = "float32") -> Traced:
    """Outputs ``logits [M, V]`` at the flat indices ``positions int32[M]`` of the batch."""
    trace = Trace(dtype)
    hidden = model.hidden_states(batch_inputs(trace, model, s))[-1]
    trace.output("logits", model.logits(_rows_at_positions(trace, hidden, s)))
    return Traced("token_logits", trace)


def encode(model: Family, s: Sizes, dtype: str = "float32") -> Traced:
    """Outputs the last hidden state ``hidden [B, T, C]``, without the head."""
    trace = Trace(dtype)
    trace.output("hidden", model.hidden_states(batch_inputs(trace, model, s))[-1])
    return Traced("encode", trace)


def _backward(
    trace: Trace, model: Family, s: Sizes, options: LossOptions | None = None
) -> tuple[list[Parameter], list[Tensor]]:
    """Traces the losses as outputs, and the gradients of their sum, each scaled by its own input: ``loss_scale`` and
    ``sentence_scale`` are 1 / number of labels in the whole (accumulated) batch: means are taken over labels."""
    x = batch_inputs(trace, model, s)
    total = None
    for name, loss in _losses(x, model, model.hidden_states(x)[-1], s, options).items():
        trace.output(name, loss)
        scaled = loss * trace.input(SCALES[name], trace.dtype, ())
        total = scaled if total is None else total + scaled
    if total is None:
        raise InputError("[model] the batch has no label that this model learns from")
    parameters = trainable(model)
    return parameters, trace.gradients(total, [trace.parameter(p) for p in parameters])


def gradients(
    model: Family,
    s: Sizes,
    dtype: str = "float32",
    options: LossOptions | None = None,
    *,
    training: bool = False,
) -> Traced:
    """Outputs the summed ``loss []`` and ``grad.<parameter>`` of loss · loss_scale; with ``training`` under dropout."""
    trace = Trace(dtype, training=training)
    parameters, grads = _backward(trace, model, s, options)
    for parameter, grad in zip(parameters, grads, strict=True):
        trace.output(f"grad.{parameter.name}", grad)
    return Traced("gradients", trace)


def train_step(
    model: Family,
    s: Sizes,
    optimizer: Optimizer,
    dtype: str = "float32",
    options: LossOptions | None = None,
    *,
    scaled: bool = False,
) -> Traced:
    """One whole step: forward, loss, backward, global-norm clipping, the optimizer's update.

    Inputs besides the batch: ``loss_scale []``, ``lr []``, those of the optimizer (``Optimizer.inputs``), with dropout
    ``rng int32[4]``. Outputs the summed ``loss []`` and ``grad_norm []``. States: parameters, and the optimizer's.
    With ``scaled`` gradients are times a power of two, which is a part of ``loss_scale``, and ``unscale []`` is one by
    that: ``grad_norm`` is the norm of what was scaled, the update that of gradients that were not.
    """
    trace = Trace(dtype, training=True)
    parameters, grads = _backward(trace, model, s, options)
    optimizer.update(trace, parameters, grads, scaled=scaled)
    return Traced("train_step", trace)


def accumulate_step(
    model: Family, s: Sizes, dtype: str = "float32", options: LossOptions | None = None
) -> Traced:
    """A part of a step: adds its gradients to the states ``grad_sum.<parameter>``. Outputs the summed ``loss []``.

    Each gradient is computed to its end before it is added, so the sums are those that several processes make.
    """
    trace = Trace(dtype, training=True)
    parameters, grads = _backward(trace, model, s, options)
    for parameter, grad in zip(parameters, grads, strict=True):
        total = trace.state(f"grad_sum.{parameter.name}", parameter.shape)
        trace.update(total, total + grad)
    return Traced("accumulate_step", trace)


def apply_step(
    model: Family,
    optimizer: Optimizer,
    dtype: str = "float32",
    *,
    owned: frozenset[str] | None = None,
    scaled: bool = False,
) -> Traced:
    """The end of an accumulated step: clips and applies the states ``grad_sum.<parameter>`` and zeroes them. Outputs
    ``grad_norm []``. With ``owned``, of these parameters only, by the input ``norm []`` of all gradients. ``scaled``:
    see :func:`train_step`; so is ``norm``."""
    trace = Trace(dtype)
    parameters = [p for p in trainable(model) if owned is None or p.name in owned]
    totals = [trace.state(f"grad_sum.{p.name}", p.shape) for p in parameters]
    norm = None if owned is None else trace.input("norm", dtype, ())
    optimizer.update(trace, parameters, totals, norm, scaled=scaled)
    for total in totals:
        trace.update(total, trace.fill(0.0, total.shape))
    return Traced("apply_step", trace)


def decode_step(
    model: Family,
    batch: int,
    tokens: int,
    cache: tuple[int, int],
    prefix: str,
    dtype: str = "float32",
    *,
    outputs: int = 1,
    hidden: bool = False,
    prompts: bool = False,
    best: int = 0,
) -> Traced:
    """Feeds up to T tokens of B sequences through the cache ``(R, S)`` named ``prefix``.

    Inputs: ``input_ids``, ``position_ids int32[B, T]``; ``rows int32[B, S]``, ``row``, ``start``, ``count int32[B]``
    (see ``models.base.Cache``); ``last int32[B·N]``, flat indices of the tokens after which logits are wanted, N =
    ``outputs`` of each sequence. Outputs ``logits [B·N, V]`` at those, with ``hidden`` also the last states
    ``hidden [B, T, C]``. With ``best`` K > 0 they stay in the state ``<prefix>.logits<B·N> [B·N, V]``, and the
    outputs are ``best [B·N, K]``, ``tokens int32[B·N, K]`` and ``masses [B·N, 4]`` of
    :func:`pyrformer.nn.functional.best`, at the input ``temperature [B·N]``. With ``prompts``, each ``start`` is 0, and
    there is the input ``prefix int32[B]``: so many first tokens that all may see.
    """
    trace = Trace(dtype)
    shape = (batch, tokens)
    ids, positions = trace.input("input_ids", "int32", shape), trace.input("position_ids", "int32", shape)
    rows = trace.input("rows", "int32", (batch, cache[1]))
    row, start, count = (trace.input(n, "int32", (batch,)) for n in ("row", "start", "count"))
    last = trace.input("last", "int32", (batch * outputs,))
    seen = trace.input("prefix", "int32", (batch,)) if prompts else None
    x = Inputs(ids, positions, cache=Cache(prefix, cache, rows, row, start, count, seen))
    states = model.hidden_states(x)[-1]
    if hidden:
        trace.output("hidden", states)
    with trace.scope("last"):
        flat = F.reshape(states, (batch * tokens, states.shape[-1]))
        final = F.gather(flat, last)
    logits = model.logits(final)
    if not best:
        trace.output("logits", logits)
        return Traced("decode_step", trace)
    trace.update(trace.state(f"{prefix}.logits{batch * outputs}", logits.shape), logits)
    temperature = trace.input("temperature", dtype, (batch * outputs,))
    for name, value in zip(("best", "tokens", "masses"), F.best(logits, temperature, best), strict=True):
        trace.output(name, value)
    return Traced("decode_step", trace)
