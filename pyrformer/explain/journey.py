"""What happens to a sentence, measured: :func:`travel` runs the model and keeps what the page shows.

Letters: T tokens, C width, H query heads, K key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer.errors import InputError
from pyrformer.look import Inside, Layer, logits_at, look_inside
from pyrformer.score import Row, arrays_of, start_ids

if TYPE_CHECKING:
    from pyrformer.model import Model
    from pyrformer.tokenizers import Tokenizer

Array = npt.NDArray[Any]
#: How many proposals a page shows at each place.
TOP = 10


@dataclass(frozen=True)
class Token:
    """One token of the row: its id, the vocabulary's string, where it stands in the text (start, end), whether it was
    added to the text, and what the page calls it."""

    id: int
    string: str
    offsets: tuple[int, int]
    added: bool
    label: str


@dataclass(frozen=True)
class Prediction:
    """What the model expects at one place.

    Attributes:
        place: of the token that is predicted.
        top: the most probable tokens or classes, and their probabilities.
        actual: the token that stands there, "" where none does.
        p: its probability; rank: how many are more probable, plus 1; both 0 where none stands there.
    """

    place: int
    top: list[tuple[str, float]]
    actual: str = ""
    p: float = 0.0
    rank: int = 0


@dataclass(frozen=True)
class Journey:
    """A sentence in a model.

    Attributes:
        model: the model.
        text: the sentence.
        tokens: the row that the model reads.
        row: that row as the programs get it, padded: arrays by input name, ``[T']``.
        inside: embeddings, states, attention.
        predictions: of each place that has one.
        losses: −log p by place, nats.
        vector: the text's vector ``[C]``, of a model without a head.
        classes: of a model that classifies texts: names and probabilities.
    """

    model: Model
    text: str
    tokens: list[Token]
    row: dict[str, Array]
    inside: Inside
    predictions: list[Prediction]
    losses: dict[int, float]
    vector: Array | None
    classes: list[tuple[str, float]]

    @property
    def title(self) -> str:
        """The page's title: the sentence, cut."""
        return self.text if len(self.text) <= 80 else f"{self.text[:79]}…"

    @property
    def norms(self) -> list[Array]:
        """The length of each state, by layer, ``[T]`` each."""
        return [np.linalg.norm(s.astype(np.float64), axis=-1) for s in self.inside.states]

    @property
    def objective(self) -> str:
        """What the model's head predicts; see :class:`pyrformer.models.base.Family`."""
        return self.model.family.objective

    def data(self) -> dict[str, Any]:
        """The figures that the page's script draws, as plain data for JSON."""
        return {
            "tokens": [t.label for t in self.tokens],
            "strips": {
                name: _strip(values[None])
                for name, values in (
                    *self.inside.embeddings.items(),
                    ("sum", self.inside.states[0]),
                    *([] if self.vector is None else [("vector", self.vector[None])]),
                )
            },
            "layers": [_layer(layer) for layer in self.inside.layers],
            "norms": [[_digits(x) for x in norms] for norms in self.norms],
            "predictions": [
                {
                    "place": p.place,
                    "top": [[name, _digits(q)] for name, q in p.top],
                    "actual": p.actual,
                    "p": _digits(p.p),
                    "rank": p.rank,
                }
                for p in self.predictions
            ],
            "losses": [[place, _digits(nats)] for place, nats in self.losses.items()],
            "next": self.objective == "ar",
        }


def travel(model: Model, text: str, max_tokens: int) -> Journey:
    """Runs ``model`` on ``text`` and keeps what the page shows.

    Raises:
        InputError: the text has no tokens or too many, or the model has no tokenizer.
    """
    tokens = _tokens(model, text)
    if all(t.added for t in tokens):
        raise InputError("[explain] the text has no tokens")
    most = min(max_tokens, model.family.max_positions)
    if len(tokens) > most:
        whose = "the page shows" if most == max_tokens else "the model has positions for"
        raise InputError(
            f"[explain] the text has {len(tokens)} tokens, and {whose} {most} at most; shorten the text"
        )
    ids = [t.id for t in tokens]
    padded = arrays_of(model, [Row(0, ids, [])])[1]
    row: dict[str, Array] = {}
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if name in padded:
            row[name] = padded[name][0]
    row["attention_mask"] = (np.arange(len(row["input_ids"])) < len(ids)).astype(np.int32)
    predictions: list[Prediction] = []
    losses: dict[int, float] = {}
    classes: list[tuple[str, float]] = []
    vector = None
    objective = model.family.objective
    if objective in ("ar", "plm", "mlm"):
        predictions = _predictions(model, tokens)
        found = model.score([text]).token_logprobs[0]
        losses = {place: -float(x) for place, x in zip(_scored(model, tokens), found, strict=True)}
    elif objective == "none":
        vector = model.embed([ids])[0]
    else:
        named = model.classify([ids])
        scores = named.scores[0].astype(np.float64)
        if objective == "sentence":
            classes = _best(named.names, scores)
        else:
            predictions = [Prediction(i, _best(named.names, p)) for i, p in enumerate(scores)]
    inside = look_inside(model, ids, perm_mask=_later(len(ids)) if objective == "plm" else None)
    return Journey(model, text, tokens, row, inside, predictions, losses, vector, classes)


def _later(n: int) -> Array:
    """The ``perm_mask`` of reading from left to right: a target sees neither its own place nor those after it."""
    return np.triu(np.ones((1, n, n), np.int32))


def _tokens(model: Model, text: str) -> list[Token]:
    """The row that :func:`pyrformer.score.score` reads; models without a token head read the template's tokens."""
    tokenizer = model.require_tokenizer()
    plain = model.family.objective in ("ar", "plm")
    encoding = tokenizer.encode(text, add_special_tokens=not plain)
    before = start_ids(model) if plain else []
    tokens = [_token(tokenizer, i, (0, 0), True) for i in before]
    real = [k for k, kept in enumerate(encoding.attention_mask) if kept]
    return tokens + [
        _token(tokenizer, encoding.ids[k], encoding.offsets[k], bool(encoding.special_tokens_mask[k]))
        for k in real
    ]


def _token(tokenizer: Tokenizer, token: int, offsets: tuple[int, int], added: bool) -> Token:
    return Token(token, tokenizer.id_to_token(token) or "", offsets, added, label(tokenizer, token))


def label(tokenizer: Tokenizer, token: int) -> str:
    """A short name of a token: its text, with a dot for a space before it and signs for line ends and tabs."""
    string = tokenizer.id_to_token(token)
    if string is None:
        # Models may have more rows than their tokenizer has tokens.
        return f"#{token}"
    if tokenizer.is_special(token) or string.startswith("##"):
        return string
    text = tokenizer.decode([token], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        return string
    if string.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def _scored(model: Model, tokens: Sequence[Token]) -> list[int]:
    """The places whose losses ``model.score`` gives."""
    if model.family.objective != "mlm":
        return list(range(1, len(tokens)))
    tokenizer = model.require_tokenizer()
    return [i for i, t in enumerate(tokens) if not tokenizer.is_special(t.id)]


def _predictions(model: Model, tokens: Sequence[Token]) -> list[Prediction]:
    """Of models with a token head: the best tokens at each place, from what the objective lets it see there."""
    ids = np.array([[t.id for t in tokens]], np.int32)
    n = ids.shape[1]
    tokenizer = model.require_tokenizer()
    objective = model.family.objective
    if objective == "ar":
        # The logits at a place are of the token after it.
        places, logits = list(range(1, n + 1)), np.asarray(model(ids).logits)[0]
    elif objective == "plm":
        out = model(ids, perm_mask=_later(n), target_mapping=np.eye(n, dtype=np.int32)[None])
        places, logits = list(range(1, n)), np.asarray(out.logits)[0][1:]
    else:
        mask = tokenizer.mask_token_id
        if mask is None:
            raise InputError("[explain] a masked model needs a tokenizer with a mask token")
        places = [i for i in range(n) if ids[0, i] == mask or not tokenizer.is_special(int(ids[0, i]))]
        rows = np.repeat(ids, len(places), axis=0)
        rows[np.arange(len(places)), places] = mask
        logits = logits_at(model, rows, places)
    found = []
    for place, values in zip(places, logits.astype(np.float64), strict=True):
        p = np.exp(values - values.max())
        p /= p.sum()
        top = [(label(tokenizer, int(i)), float(p[i])) for i in np.argsort(-p, kind="stable")[:TOP]]
        actual = int(ids[0, place]) if place < n else None
        if actual is None or (objective == "mlm" and actual == tokenizer.mask_token_id):
            found.append(Prediction(place, top))
        else:
            rank = int((p > p[actual]).sum()) + 1
            found.append(Prediction(place, top, tokens[place].label, float(p[actual]), rank))
    return found


def _best(names: Sequence[str], p: Array) -> list[tuple[str, float]]:
    return [(names[i], float(p[i])) for i in np.argsort(-p, kind="stable")[:TOP].tolist()]


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "causal": layer.causal,
        "window": layer.window,
        "heads": len(layer.weights),
        "weights": _packed(np.round(layer.weights * 65535), "<u2"),
        "q": _strip(layer.q),
        "k": _strip(layer.k),
        "v": _strip(layer.v),
    }


def _strip(values: Array) -> dict[str, Any]:
    """Values ``[N, T, C]`` as bytes: each is its byte times ``scale``; and the norms of the rows."""
    scale = float(np.abs(values).max()) / 127 or 1.0
    return {
        "count": values.shape[0],
        "columns": values.shape[2],
        "scale": scale,
        "values": _packed(np.round(values / scale), "i1"),
        "norms": [_digits(x) for x in np.linalg.norm(values.astype(np.float64), axis=-1).reshape(-1)],
    }


def _packed(values: Array, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def _digits(x: float) -> float:
    """``x`` to six digits."""
    return float(f"{x:.6g}")
