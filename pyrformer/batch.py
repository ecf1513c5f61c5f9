"""From arrays in Hugging Face's conventions to what the programs take: checked, shifted, counted.

Letters: B batch, T tokens, P targets, M remembered states, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer._core import MOST_PAIRS
from pyrformer.errors import InputError
from pyrformer.models.base import MOST_SIZE, Family
from pyrformer.programs import SCALES, Sizes

#: The label that is ignored.
IGNORE = -100
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int32]


@dataclass(eq=False)
class Batch:
    """A batch made ready for the programs: its sizes, its arrays by input name, and how many tokens and how many
    sequences have labels."""

    sizes: Sizes
    arrays: dict[str, Array]
    labels: int = 0
    sentence_labels: int = 0

    @property
    def scales(self) -> dict[str, float]:
        """The inputs that make means of the summed losses."""
        counts = {"loss_scale": self.labels, "sentence_scale": self.sentence_labels}
        return {name: 1.0 / count for name, count in counts.items() if count}

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.batch(self)

    def mean(self, out: dict[str, Array]) -> float:
        """The loss of a run's outputs: the mean over tokens plus the mean over sequences."""
        scales = self.scales
        return sum(float(out[name]) * scales.get(scale, 0.0) for name, scale in SCALES.items() if name in out)


def make_batch(
    family: Family,
    input_ids: npt.ArrayLike,
    attention_mask: npt.ArrayLike | None = None,
    token_type_ids: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
    *,
    position_ids: npt.ArrayLike | None = None,
    next_sentence_label: npt.ArrayLike | None = None,
    perm_mask: npt.ArrayLike | None = None,
    target_mapping: npt.ArrayLike | None = None,
    mems: Sequence[npt.ArrayLike] | None = None,
    prefix: npt.ArrayLike | None = None,
) -> Batch:
    """Checks arrays in Hugging Face's conventions and makes them ready for a family's programs.

    Args:
        input_ids: ``[B, T]``; so are attention_mask (0: padding), token_type_ids and position_ids.
        labels: ``[B, T]``, −100 is ignored; autoregressive models shift inside. ``[B]`` for a model that classifies
            whole sequences, ``[B, P]`` with ``target_mapping``.
        position_ids: where they start again, documents are packed and do not see each other (autoregressive models
            without ``attention_mask``).
        next_sentence_label: ``[B]``, BERT for pre-training.
        perm_mask: ``[B, T, T]``, 1 where the first token does not see the second (XLNet).
        target_mapping: ``[B, P, T]``, each row one-hot at the token to predict, or zero (XLNet).
        prefix: ``[B]``, how many first tokens, padding included, all tokens may see (autoregressive models).
        mems: for each layer the states ``[M, B, C]`` of an earlier part (XLNet).

    Raises:
        InputError: a shape differs, a value is out of range, or the input is longer than the model's positions.
    """
    ids = _ints("input_ids", input_ids, None, family.config.vocab_size)
    b, t = ids.shape
    longest = int(family.max_positions * family.config.stretch)
    if t > longest and position_ids is None:
        raise InputError(
            f"[model] {t} tokens are more than the model's {longest} positions; truncate the input"
        )
    mask = given = None
    if attention_mask is not None:
        mask = (_ints("attention_mask", attention_mask, ids.shape, None) != 0).astype(np.int32)
    if position_ids is not None:
        most = longest + family.position_offset
        given = _ints("position_ids", position_ids, ids.shape, most)
    arrays: dict[str, Array] = {"input_ids": ids, "position_ids": family.position_rows(ids, mask, given)}
    sizes: dict[str, Any] = {}
    if family.uses_token_types:
        types = np.zeros_like(ids) if token_type_ids is None else token_type_ids
        arrays["token_type_ids"] = _ints("token_type_ids", types, ids.shape, family.token_types)
    if family.objective == "plm":
        _permutation(family, arrays, sizes, mask, perm_mask, target_mapping, mems)
    elif perm_mask is not None or target_mapping is not None or mems is not None:
        raise InputError("[model] perm_mask, target_mapping and mems are for permutation models only")
    elif mask is not None:
        if not mask.all():
            arrays["segments"] = mask
    elif given is not None and family.objective == "ar" and (np.diff(given, axis=1) != 1).any():
        starts = np.diff(given, axis=1, prepend=given[:, :1] - 1) != 1
        arrays["segments"] = (np.cumsum(starts, axis=1) + 1).astype(np.int32)
    if prefix is not None:
        arrays["prefix"], sizes["prefix"] = _prefix(family, prefix, ids.shape), True
    count = labelled = sentences = 0
    if family.objective == "sentence":
        labels, next_sentence_label = None, labels
    if next_sentence_label is not None:
        arrays["sentence_labels"] = _sentence_labels(family, next_sentence_label, b)
        sentences = int((arrays["sentence_labels"] >= 0).sum())
    if labels is not None:
        wanted = _labels(family, labels, (b, sizes.get("targets") or t))
        if family.objective == "ar":
            shifted = np.full_like(wanted, IGNORE)
            shifted[:, :-1] = wanted[:, 1:]
            wanted = shifted
        count = int((wanted >= 0).sum())
        if count and family.objective == "ar":
            arrays["labels"] = wanted
        elif count:
            at = np.flatnonzero(wanted >= 0).astype(np.int32)
            labelled = max(8, -(-count // 8) * 8)
            pad = (0, labelled - count)
            arrays["positions"] = np.pad(at, pad)
            arrays["labels"] = np.pad(wanted.reshape(-1)[at], pad, constant_values=IGNORE)
    made = Sizes(b, t, labelled, "segments" in arrays, sentences="sentence_labels" in arrays, **sizes)
    return Batch(made, arrays, count, sentences)


def _prefix(family: Family, value: npt.ArrayLike, shape: tuple[int, ...]) -> Ints:
    counts = _array("prefix", value)
    if family.objective != "ar":
        raise InputError("[model] prefix is for autoregressive models only")
    if counts.shape != shape[:1] or not np.issubdtype(counts.dtype, np.integer):
        raise InputError(
            f"[model] prefix must be an integer array [{shape[0]}], got {counts.dtype}{list(counts.shape)}"
        )
    if counts.min() < 0 or counts.max() > shape[1]:
        raise InputError(f"[model] prefix must be in 0..{shape[1]}")
    return counts.astype(np.int32)


def _permutation(
    family: Family,
    arrays: dict[str, Array],
    sizes: dict[str, Any],
    mask: Ints | None,
    perm_mask: npt.ArrayLike | None,
    target_mapping: npt.ArrayLike | None,
    mems: Sequence[npt.ArrayLike] | None,
) -> None:
    """Adds what only permutation models read: targets, what is hidden, remembered states."""
    b, t = arrays["input_ids"].shape
    if getattr(family.config, "bi_data", False):
        if b % 2:
            raise InputError(
                f"[model] bi_data reads half of the rows from right to left: give an even number of rows, not {b}"
            )
        sizes["mirrored"] = True
    if b * t * t > MOST_PAIRS:
        raise InputError(
            f"[model] {b} rows of {t} tokens have {b * t * t} pairs; give at most {MOST_PAIRS} at once"
        )
    hidden = np.zeros((b, t, t), bool)
    if mask is not None:
        hidden |= mask[:, None, :] == 0
    if perm_mask is not None:
        hidden |= _floats("perm_mask", perm_mask, (b, t, t)) > 0
    unseen = family.unseen(t)
    if unseen is not None:
        hidden |= unseen > 0
    if hidden.any():
        arrays["hidden"], sizes["hidden"] = hidden.astype(np.int32), True
    if target_mapping is not None:
        rows = _floats("target_mapping", target_mapping, (b, None, t))
        sums = rows.sum(-1)
        if not np.isin(rows, (0, 1)).all() or not np.isin(sums, (0, 1)).all():
            raise InputError("[model] each row of target_mapping must be one-hot at its target, or zero")
        arrays["targets"] = np.where(sums > 0, rows.argmax(-1), -1).astype(np.int32)
        sizes["targets"] = rows.shape[1]
    if mems is not None:
        if len(mems) != family.depth:
            raise InputError(
                f"[model] mems must hold states for each of the {family.depth} layers, got {len(mems)}"
            )
        states = [_floats(f"mems[{i}]", m, (None, b, family.width)) for i, m in enumerate(mems)]
        remembered = states[0].shape[0]
        if remembered == 0 or any(s.shape[0] != remembered for s in states):
            raise InputError("[model] mems of all layers must hold as many states, and at least one")
        sizes["remembered"] = remembered
        arrays |= {f"mems.{i}": np.ascontiguousarray(s.swapaxes(0, 1)) for i, s in enumerate(states)}
        # Remembered tokens count as type 0.
        arrays["key_types"] = np.pad(arrays["token_type_ids"], ((0, 0), (remembered, 0)))


def _array(name: str, value: npt.ArrayLike) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as e:
        raise InputError(f"[model] {name} is no array: {e}") from None


def _floats(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> Array:
    array = _array(name, value)
    fits = array.ndim == len(shape) and all(
        w is None or w == n for w, n in zip(shape, array.shape, strict=True)
    )
    if not fits or not np.issubdtype(array.dtype, np.number):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"[model] {name} must be an array [{wanted}], got {array.dtype}{list(array.shape)}")
    return array


def _ints(name: str, value: npt.ArrayLike, shape: tuple[int, ...] | None, below: int | None) -> Ints:
    array = _array(name, value)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        kind = f"{array.dtype}{list(array.shape)}"
        raise InputError(f"[model] {name} must be a non-empty integer array [B, T], got {kind}")
    if array.size > MOST_SIZE:
        raise InputError(f"[model] {name} has {array.size} places; give at most {MOST_SIZE} at once")
    if shape is not None and array.shape != shape:
        raise InputError(f"[model] {name} must be {list(shape)}, got {list(array.shape)}")
    if below is not None and (array.min() < 0 or array.max() >= below):
        bad = array.min() if array.min() < 0 else array.max()
        raise InputError(f"[model] {name} must be in 0..{below - 1}, got {bad}")
    return array.astype(np.int32)


def _sentence_labels(family: Family, value: npt.ArrayLike, batch: int) -> Ints:
    labels = _array("labels", value)
    classes = family.config.num_labels if family.objective == "sentence" else 2
    if labels.shape != (batch,) or not np.issubdtype(labels.dtype, np.integer):
        kind = f"{labels.dtype}{list(labels.shape)}"
        raise InputError(f"[model] labels of sequences must be an integer array [{batch}], got {kind}")
    if ((labels < 0) & (labels != IGNORE)).any() or (labels >= classes).any():
        raise InputError(f"[model] labels of sequences must be in 0..{classes - 1}, or {IGNORE}")
    return labels.astype(np.int32)


def _labels(family: Family, value: npt.ArrayLike, shape: tuple[int, ...]) -> Ints:
    if family.objective == "none":
        raise InputError("[model] this model has no head to learn from labels")
    labels = _ints("labels", value, shape, None)
    classes = family.config.num_labels if family.objective == "tokens" else family.config.vocab_size
    if ((labels < 0) & (labels != IGNORE)).any() or (labels >= classes).any():
        raise InputError(f"[model] labels must be in 0..{classes - 1}, or {IGNORE} to be ignored")
    return labels
