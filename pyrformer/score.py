"""How probable texts are, and what they mean as vectors: batched by length, with results that no batch changes.

Rows of a like length go through one program of a fixed shape, so that a text's result does not depend on what it was
batched with. Texts are read in stretches of :data:`STRETCH`, so an iterable of any length needs little memory.

Letters: N texts, B rows, T tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer import programs
from pyrformer.arrow import Columns
from pyrformer.errors import InputError
from pyrformer.fields import checked, token_ids
from pyrformer.programs import Sizes

if TYPE_CHECKING:
    from pyrformer.model import Model

#: Texts that are sorted by length together.
STRETCH = 512
#: Tokens of a batch, about.
TOKENS = 2048
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores(Columns):
    """Log-probabilities of texts; a table with a row per text for readers of Arrow.

    Attributes:
        log_likelihood: of each text, nats, float64[N]; a masked model's is the pseudo-log-likelihood (Salazar et al.
            2020): the sum over tokens of log p(token | all others).
        tokens: how many tokens were scored, int64[N].
        bytes: UTF-8 bytes of each text, int64[N]; 0 where ids were given.
        token_logprobs: of each text, nats, float64[tokens].
    """

    log_likelihood: Floats
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    token_logprobs: list[Floats]

    def _columns(self) -> Iterator[tuple[str, Any]]:
        for name in ("log_likelihood", "tokens", "bytes", "bits_per_byte", "token_logprobs"):
            yield name, getattr(self, name)

    @property
    def bits_per_byte(self) -> Floats:
        """−log₂ p over the bytes of each text, float64[N]; NaN for texts without bytes."""
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = -self.log_likelihood / math.log(2) / self.bytes
        return np.where(self.bytes > 0, bits, np.nan)

    @property
    def perplexity(self) -> float:
        """exp of the mean −log p over all scored tokens; a masked model's is the pseudo-perplexity."""
        return math.exp(-self.log_likelihood.sum() / max(1, self.tokens.sum()))


@dataclass
class Row:
    """Ids that go through the model together, and which of their labels are kept where."""

    text: int
    ids: list[int]
    #: Place in ``ids`` whose token is scored, and its number among the text's scored tokens.
    places: list[tuple[int, int]]
    #: Of masked models: the token at the scored place.
    target: int = -1
    #: Of permutation models: when each place is predicted, −1 for what is given; None: from left to right.
    ranks: npt.NDArray[np.int32] | None = None


@checked("score")
def score(
    model: Model,
    texts: Iterable[str | Sequence[int]],
    *,
    context: int | None = None,
    stride: int | None = None,
    within_word: bool = False,
    mask_token_id: int | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    order: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Log-probabilities of texts or lists of ids.

    Autoregressive and permutation models (from left to right) give exact ones. A text is scored after the model's start
    token, or else its end token, so that its first token counts; with neither, and for ids, the first token is not
    scored. Texts longer than the model's positions are read in windows; each token is scored once, in the first window
    that holds it and at least one token before it. A model learned with prefixes lets the tokens of the prompt see each
    other, and so those of a window that an earlier one scored.

    Masked models give pseudo-log-likelihoods, one pass a token; special tokens are not scored. Ids must hold theirs,
    one at either end, unless there is a tokenizer to tell them; longer texts are cut into pieces with the same ends.

    Args:
        context: the longest window in tokens; default: the model's positions.
        stride: tokens between the starts of two windows; default: half of the positions.
        within_word: masked models also hide the rest of a token's word (Kauf and Ivanova 2023: "within-word l2r").
        mask_token_id: default: the tokenizer's.
        prompts: of autoregressive and permutation models: what each text continues, one a text.
        order: of permutation models: the seed of an order that is drawn for each text (each window of a long one, of
            the tokens that it scores); default: left to right.
        progress: called after each batch with the number of tokens scored so far.

    Raises:
        InputError: the model predicts no tokens, or an option makes no sense.
    """
    if model.family.objective not in ("ar", "plm", "mlm"):
        raise InputError("[score] this model predicts no tokens")
    most = model.family.max_positions
    if context is not None and not 3 <= context <= most:
        raise InputError(f"[score] context must be in 3..{most}, got {context}")
    context = context or most
    if stride is not None and not 1 <= stride <= context:
        raise InputError(f"[score] stride must be in 1..{context}, got {stride}")
    if order is not None and (model.family.objective != "plm" or model.family.unseen(1) is not None):
        raise InputError(
            "[score] another order than that of reading needs a permutation model with attn_type 'bi'"
        )
    masked = model.family.objective == "mlm"
    mask = (
        mask_token_id
        if mask_token_id is not None or model.tokenizer is None
        else model.tokenizer.mask_token_id
    )
    if masked and mask is not None and mask >= model.family.config.vocab_size:
        most = model.family.config.vocab_size
        raise InputError(f"[score] mask_token_id must be below the vocabulary's size, {most}, got {mask}")
    if masked and mask is None:
        raise InputError("[score] a masked model needs a tokenizer with a mask token, or mask_token_id")
    if masked and within_word and model.tokenizer is None:
        raise InputError("[score] within_word needs a tokenizer")
    if prompts is not None:
        texts = list(texts)
        if masked:
            raise InputError(
                "[score] a masked model sees both sides of a token; put the prompt into the text"
            )
        if isinstance(prompts, str) or len(prompts) != len(texts):
            raise InputError(f"[score] prompts must be a list with one for each of the {len(texts)} texts")
    plan: Callable[[int, list[int], bool, list[int] | None], Iterator[Row]] = (
        partial(_masked_rows, model, mask or 0, within_word, context)
        if masked
        else partial(_window_rows, model, context, stride or max(1, context // 2))
    )
    found: list[Floats] = []
    sizes: list[int] = []
    scored = 0
    for stretch in stretches(texts):
        part: list[Floats] = []
        counts = np.zeros(len(stretch), np.int64)

        # Made as they are needed: those of a long text are many times as large as it is.
        def rows(
            stretch: list[str | Sequence[int]] = stretch, part: list[Floats] = part, done: int = len(found)
        ) -> Iterator[Row]:
            for i, text in enumerate(stretch):
                ids = text_ids(model, text)
                sizes.append(len(text.encode("utf-8")) if isinstance(text, str) else 0)
                part.append(np.zeros(len(ids) + 1))
                prompt = None if prompts is None else prompts[done + i]
                before = None if prompt is None else text_ids(model, prompt)
                for row in plan(i, ids, isinstance(text if prompt is None else prompt, str), before):
                    if order is not None:
                        row.ranks = _ranks(row, [order, done + i, row.places[0][1]])
                    yield row

        for batch in batches_of(model, rows()):
            for row, values in zip(batch, logprobs(model, batch), strict=True):
                counts[row.text] += len(row.places)
                for (_, number), value in zip(row.places, values, strict=True):
                    part[row.text][number] = value
                scored += len(row.places)
            if progress is not None:
                progress(scored)
        found += [values[:count].copy() for values, count in zip(part, counts, strict=True)]
    return Scores(
        np.array([f.sum() for f in found]),
        np.array([len(f) for f in found], np.int64),
        np.array(sizes, np.int64),
        found,
    )


@checked("embed")
def embed(
    model: Model,
    texts: Iterable[str | Sequence[int]],
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> npt.NDArray[np.float32]:
    """One vector a text, float32 ``[N, C]``, from the last hidden state; texts are cut to the model's positions.

    Args:
        pooling: "mean" over the tokens, "cls" (the first) or "last"; default: what the model's folder says
            (sentence-transformers' ``1_Pooling/config.json``), or "mean".
        normalize: scale to length 1; default: what the folder says, or True.

    Raises:
        InputError: the pooling is unknown.
    """
    pooling = pooling or model.pooling.get("pooling", "mean")
    normalize = model.pooling.get("normalize", True) if normalize is None else normalize
    if pooling not in ("mean", "cls", "last"):
        raise InputError(f"[embed] pooling must be 'mean', 'cls' or 'last', got {pooling!r}")
    most = model.family.max_positions
    parts: list[npt.NDArray[np.float32]] = []
    for stretch in stretches(texts):
        rows = [Row(i, cut(text_ids(model, text, framed=True), most), []) for i, text in enumerate(stretch)]
        vectors: dict[int, npt.NDArray[Any]] = {}
        for batch in batches_of(model, rows):
            sizes, arrays = arrays_of(model, batch)
            make = partial(programs.encode, model.family, sizes, model.dtype)
            hidden = model.program(("encode", sizes), make)(**arrays)["hidden"]
            for state, row in zip(hidden, batch, strict=False):
                real = state[: len(row.ids)].astype(np.float64)
                vectors[row.text] = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[pooling]
        parts += [vectors[i].astype(np.float32) for i in range(len(stretch))]
    if not parts:
        return np.zeros((0, 0), np.float32)
    found = np.stack(parts)
    if normalize:
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found.astype(np.float32)


def stretches(texts: Iterable[str | Sequence[int]]) -> Iterator[list[str | Sequence[int]]]:
    """Texts in lists of at most :data:`STRETCH`; pyarrow's scalars become Python's values.

    Raises:
        InputError: something is neither a text nor a list of ids.
    """
    if isinstance(texts, str):
        raise InputError("[score] give a list of texts, not one text")
    source = (text.as_py() if hasattr(text, "as_py") else text for text in texts)
    first = 0
    while stretch := list(islice(source, STRETCH)):
        for i, text in enumerate(stretch, first):
            if not isinstance(text, (str, Sequence, np.ndarray)):
                raise InputError(f"[score] text {i} is {text!r}; give strings, or lists of ids")
        yield stretch
        first += len(stretch)


def text_ids(model: Model, text: str | Sequence[int], *, framed: bool = False) -> list[int]:
    """The ids of a text: with special tokens for masked models, and where ``framed``."""
    if not isinstance(text, str):
        return token_ids("score", text)
    special = framed or model.family.objective == "mlm"
    encoding = model.require_tokenizer().encode(text, add_special_tokens=special)
    return [i for i, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real]


def start_ids(model: Model) -> list[int]:
    """What a text is scored after, so that its first token counts: the start token, else the end token, else none."""
    config = model.family.config
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    start = start[0] if isinstance(start, list) else start
    return [] if start is None else [start]


def cut(ids: list[int], most: int) -> list[int]:
    """At most ``most`` ids; the last one, which may be special, is kept."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def _window_rows(
    model: Model, context: int, step: int, text: int, ids: list[int], whole: bool, prompt: list[int] | None
) -> Iterator[Row]:
    before = (start_ids(model) if whole else []) + (prompt or [])
    ids, number = before + ids, 0
    done = 0 if prompt is None else len(before)
    for begin in range(0, max(1, len(ids)), step):
        window = ids[begin : begin + context]
        first = max(1, done - begin)
        places = [(place, number + k) for k, place in enumerate(range(first, len(window)))]
        if places:
            yield Row(text, window, places)
        number, done = number + len(places), max(done, begin + len(window))
        if done >= len(ids):
            break


def _ranks(row: Row, seed: list[int]) -> npt.NDArray[np.int32]:
    """A random order of a row's scored places, int32[T]; the others are given."""
    ranks = np.full(len(row.ids), -1, np.int32)
    ranks[[place for place, _ in row.places]] = np.random.default_rng(seed).permutation(len(row.places))
    return ranks


def _masked_rows(
    model: Model,
    mask: int,
    within_word: bool,
    context: int,
    text: int,
    ids: list[int],
    whole: bool,
    prompt: list[int] | None,
) -> Iterator[Row]:
    assert prompt is None
    tokenizer = model.tokenizer
    number = 0
    for piece in pieces(ids, context):
        begins = tokenizer.begins_word(piece) if tokenizer and within_word else None
        for at, token in enumerate(piece):
            ends = at in (0, len(piece) - 1)
            if ends if tokenizer is None else tokenizer.is_special(token):
                continue
            row = list(piece)
            row[at] = mask
            after = at + 1
            while begins is not None and after < len(piece) - 1 and not begins[after]:
                row[after] = mask
                after += 1
            yield Row(text, row, [(at, number)], token)
            number += 1


def pieces(ids: list[int], context: int) -> list[list[int]]:
    """Ids in pieces of at most ``context``, each with the first and the last id at its ends."""
    if len(ids) <= context:
        return [ids]
    body = ids[1:-1]
    return [[ids[0], *body[at : at + context - 2], ids[-1]] for at in range(0, len(body), context - 2)]


def _width(n: int, most: int) -> int:
    """The width of the program for n tokens: few distinct ones, at most 1/8 wasted."""
    step = max(8, 1 << max(0, n.bit_length() - 3))
    return min(-(-n // step) * step, most)


def batches_of(model: Model, rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows of one width each, at most as many as its program takes, as soon as there are so many."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        width = _width(len(row.ids), model.family.max_positions)
        group = groups.setdefault(width, [])
        group.append(row)
        if len(group) == max(1, TOKENS // width):
            yield groups.pop(width)
    yield from (group for _, group in sorted(groups.items()))


def arrays_of(model: Model, batch: list[Row]) -> tuple[Sizes, dict[str, npt.NDArray[Any]]]:
    """The inputs that all programs share: rows padded to the program's shape, which depends on the width alone."""
    width = _width(len(batch[0].ids), model.family.max_positions)
    size = max(1, TOKENS // width)
    pad = model.family.config.pad_token_id or 0
    ids = np.full((size, width), pad, np.int32)
    mask = np.zeros((size, width), np.int32)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = 1
    vocab = model.family.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocab:
        raise InputError(f"[score] ids must be in 0..{vocab - 1}")
    arrays: dict[str, npt.NDArray[Any]] = {
        "input_ids": ids,
        "position_ids": model.family.position_rows(ids, mask, None),
        "segments": mask,
    }
    if model.family.uses_token_types:
        arrays["token_type_ids"] = np.zeros_like(ids)
    if model.family.config.prefix_lm:
        # What comes before the first scored token is the prompt; without one, all is.
        prompts = [row.places[0][0] if row.places else len(row.ids) for row in batch]
        arrays["prefix"] = np.array([*prompts, *[0] * (size - len(batch))], np.int32)
        return Sizes(size, width, segments=True, prefix=True), arrays
    if model.family.objective != "plm":
        return Sizes(size, width, segments=True), arrays
    # Left to right: a token sees those before it, and a target sees no token at its own place or after it.
    arrays.pop("segments")
    later = np.triu(np.ones((width, width), np.int32))[None]
    hidden = np.array(np.broadcast_to(later, (size, width, width)))
    for i, row in enumerate(batch):
        if row.ranks is not None:
            n, ranks = len(row.ids), row.ranks
            hidden[i, :n, :n] = (ranks[:, None] <= ranks[None, :]) & (ranks[None, :] >= 0)
    arrays["hidden"] = np.maximum(hidden, 1 - mask[:, None, :]).astype(np.int32)
    arrays["targets"] = np.where(mask > 0, np.arange(width), -1).astype(np.int32)
    return Sizes(size, width, targets=width, hidden=True), arrays


def logprobs(model: Model, batch: list[Row]) -> list[list[float]]:
    """log p of each row's scored tokens."""
    sizes, arrays = arrays_of(model, batch)
    b, t = sizes.batch, sizes.tokens
    if model.family.objective == "ar":
        labels = np.full((b, t), -100, np.int32)
        for i, row in enumerate(batch):
            for place, _ in row.places:
                labels[i, place - 1] = row.ids[place]
        arrays["labels"] = labels
    else:
        each = t if model.family.objective == "plm" else 1
        positions = np.zeros((b, each), np.int32)
        labels = np.full((b, each), -100, np.int32)
        for i, row in enumerate(batch):
            for k, (place, _) in enumerate(row.places):
                positions[i, k] = i * t + place
                labels[i, k] = row.ids[place] if row.target < 0 else row.target
        arrays |= {"positions": positions.reshape(-1), "labels": labels.reshape(-1)}
        sizes = replace(sizes, labelled=b * each)
    make = partial(programs.token_losses, model.family, sizes, model.dtype)
    losses = model.program(("token_losses", sizes), make)(**arrays)["losses"].reshape(b, -1)
    if model.family.objective == "ar":
        return [[-float(losses[i, place - 1]) for place, _ in row.places] for i, row in enumerate(batch)]
    return [[-float(x) for x in losses[i, : len(row.places)]] for i, row in enumerate(batch)]
