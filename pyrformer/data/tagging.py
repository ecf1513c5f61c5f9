"""Words with a class each: read from files, given to a text's tokens, and made entities again.

A class belongs to a word and is learned at the word's first token; the word's other tokens have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer.errors import DataError, FileError

if TYPE_CHECKING:
    from pyrformer.model import Model
    from pyrformer.tokenizers import Encoding, Tokenizer

#: Fields of a row that may hold the classes of its "tokens", where none is named.
LABELS = ("labels", "ner_tags", "tags")
Span = tuple[int, int]


@dataclass(frozen=True)
class Tagged:
    """A text of words, joined by spaces, and the class of each word."""

    words: list[str]
    labels: list[str]

    @property
    def text(self) -> str:
        """The words with a space between each two."""
        return " ".join(self.words)

    @property
    def spans(self) -> list[Span]:
        """Where each word lies in the text, in characters."""
        spans, at = [], 0
        for word in self.words:
            spans.append((at, at + len(word)))
            at += len(word) + 1
        return spans


def read_tagged(files: Sequence[str], label_column: str | None = None) -> list[Tagged]:
    """Texts of files: ``.jsonl`` with the fields "tokens" (strings) and "labels", "ner_tags" or "tags" (strings or
    whole numbers), or CoNLL's columns (a word a line, its class last, a blank line behind each text).

    Raises:
        FileError: a file cannot be read.
        DataError: a text does not have a class for each word; the message names the place.
    """
    found: list[Tagged] = []
    for name in files:
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise FileError(f"[data] {name}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"[data] {name} is no UTF-8") from None
        rows = _json_rows if name.endswith(".jsonl") else _columns
        found += rows(name, lines, label_column)
    if not found:
        raise DataError(f"[data] {', '.join(files)}: there is no text with classes")
    return found


def _json_rows(name: str, lines: list[str], label_column: str | None) -> list[Tagged]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError:
            raise DataError(f"[data] {name}:{number} is no JSON") from None
        field = label_column or next((f for f in LABELS if isinstance(row, dict) and f in row), LABELS[0])
        words, labels = (row.get(f) if isinstance(row, dict) else None for f in ("tokens", field))
        if (
            not (isinstance(words, list) and words and isinstance(labels, list) and len(words) == len(labels))
            or not all(isinstance(w, str) for w in words)
            or not all(isinstance(x, (str, int)) and not isinstance(x, bool) for x in labels)
        ):
            raise DataError(
                f'[data] {name}:{number} must have words in "tokens" and as many classes, strings or whole numbers, '
                f'in "{field}"'
            )
        rows.append(Tagged(words, [str(x) for x in labels]))
    return rows


def _columns(name: str, lines: list[str], label_column: str | None) -> list[Tagged]:
    rows: list[Tagged] = []
    words: list[str] = []
    labels: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if words:
                rows.append(Tagged(words, labels))
            words, labels = [], []
            continue
        if len(parts) < 2:
            raise DataError(f"[data] {name}:{number} must have a word and, last, its class")
        words.append(parts[0])
        labels.append(parts[-1])
    return rows


def class_names(rows: Sequence[Tagged]) -> list[str]:
    """All classes in order: numbers by value, names by the alphabet."""
    names = {label for row in rows for label in row.labels}
    numbers = all(name.isdigit() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def first_tokens(tokenizer: Tokenizer, row: Tagged, most: int) -> tuple[list[int], list[int | None]]:
    """The ids of a text, special tokens included, of at most ``most``; and for each word the place of its first token,
    None where it was cut off or has none."""
    encoding: Encoding = tokenizer.encode(row.text)
    real = [i for i, m in enumerate(encoding.attention_mask) if m]
    if len(real) > most:
        special = [real[-1]] if encoding.special_tokens_mask[real[-1]] else []
        real = [*real[: most - len(special)], *special]
    places: list[int | None] = [None] * len(row.words)
    spans, word = row.spans, 0
    for place, i in enumerate(real):
        start, end = encoding.offsets[i]
        if end <= start or encoding.special_tokens_mask[i]:
            continue
        # A token may begin with the space before its word, so its last character says which word it is of.
        while word < len(spans) and spans[word][1] < end:
            word += 1
        if word < len(spans) and places[word] is None and spans[word][0] < end:
            places[word] = place
    return [encoding.ids[i] for i in real], places


@dataclass(frozen=True)
class Entity:
    """A run of words of one class.

    Attributes:
        entity_group: the class, without "B-" or "I-".
        start, end: where it lies in the text, in characters.
        word: that part of the text.
        score: the mean probability of its tokens' classes.
    """

    entity_group: str
    score: float
    word: str
    start: int
    end: int


def entities(
    text: str, offsets: Sequence[Span], labels: Sequence[str], scores: npt.NDArray[Any]
) -> list[Entity]:
    """Neighbouring tokens of one class as one entity, as Hugging Face's pipelines do with the aggregation "simple":
    "B-" begins another one, class "O" is none.

    Args:
        offsets: of the tokens in the text, in characters; special ones are left out.
        labels, scores: the class of each token, and its probability.
    """
    found: list[list[Any]] = []
    before = "O"
    for (start, end), label, score in zip(offsets, labels, scores.tolist(), strict=True):
        kind = _kind(label)
        if kind != "O":
            if kind == before and not label.startswith("B-"):
                found[-1][2] = end
                found[-1][3].append(score)
            else:
                found.append([kind, start, end, [score]])
        before = kind
    made = []
    for kind, start, end, each in found:
        # Byte-level tokens hold the space before a word.
        start += len(text[start:end]) - len(text[start:end].lstrip())
        made.append(Entity(kind, float(np.mean(each)), text[start:end], start, end))
    return made


def _kind(label: str) -> str:
    return label[2:] if label[:2] in ("B-", "I-") else label


def chunks(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities of a text's words as (class, first word, word after the last). Source: the CoNLL-2000 evaluation, in
    which "I-" after another class begins one, too."""
    found, begin, before = set(), 0, "O"
    for i, label in enumerate([*labels, "O"]):
        kind = _kind(label)
        if kind != before or label.startswith("B-"):
            if before != "O":
                found.add((before, begin, i))
            begin = i
        before = kind
    return found


@dataclass(frozen=True)
class TagFigures:
    """How well a model finds the classes of words.

    Attributes:
        objective: "tokens".
        words: with a class, that fit into the model's positions.
        accuracy: of those, how many got theirs.
        precision, recall, f1: of whole entities: class, first and last word.
        entities: how many there are.
    """

    objective: str
    words: int
    accuracy: float
    entities: int
    precision: float
    recall: float
    f1: float


def figures(rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> TagFigures:
    """Of (true classes, found classes) of the words of each text."""
    words = right = true = found = both = 0
    for wanted, given in rows:
        words += len(wanted)
        right += sum(a == b for a, b in zip(wanted, given, strict=True))
        a, b = chunks(wanted), chunks(given)
        true, found, both = true + len(a), found + len(b), both + len(a & b)
    precision, recall = both / max(1, found), both / max(1, true)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return TagFigures("tokens", words, right / max(1, words), true, precision, recall, f1)


def measure(model: Model, files: Sequence[str], label_column: str | None = None) -> TagFigures:
    """The figures of a model that classifies tokens, on files as :func:`read_tagged` takes them. Words beyond the
    model's positions, and words without a token, are not counted.

    Raises:
        DataError, FileError: as :func:`read_tagged`.
        InputError: the model has no tokenizer, or does not classify tokens.
    """
    rows = read_tagged(files, label_column)
    tokenizer, most = model.require_tokenizer(), model.family.max_positions
    placed = [first_tokens(tokenizer, row, most) for row in rows]
    found = model.classify([ids for ids, _ in placed])
    pairs = []
    for row, (_, places), labels in zip(rows, placed, found.labels, strict=True):
        kept = [(label, labels[p]) for label, p in zip(row.labels, places, strict=True) if p is not None]
        pairs.append(([a for a, _ in kept], [b for _, b in kept]))
    return figures(pairs)
