"""The stages before the first number: cleaned text, tokens, special tokens, the padded row.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

from pyrformer.explain.journey import Journey
from pyrformer.explain.stage import Stage, esc

#: Steps of a tokenizer's normalizer, for a reader.
NORMALIZERS = {
    "Lowercase": "letters become lower-case",
    "StripAccents": "accents are dropped",
    "NFC": "Unicode form C",
    "NFD": "Unicode form D (letters and accents apart)",
    "NFKC": "Unicode form KC",
    "NFKD": "Unicode form KD (letters and accents apart, variants made plain)",
    "Nmt": "control characters are dropped",
    "Strip": "spaces at the ends are dropped",
    "Prepend": "a space sign is put in front",
    "Replace": "some characters are replaced",
}


def text(j: Journey) -> Stage:
    """The text, with what normalization changed."""
    pieces, at, changed = [], 0, 0
    for start, end, surface in _surfaces(j):
        pieces.append(esc(j.text[at:start]))
        source = j.text[start:end]
        if source.strip() == surface.strip():
            pieces.append(esc(source))
        else:
            changed += 1
            pieces.append(f"<del>{esc(source)}</del><ins>{esc(surface.strip())}</ins>")
        at = end
    pieces.append(esc(j.text[at:]))
    steps = _normalizer(json.loads(j.model.require_tokenizer().to_json()).get("normalizer"))
    rules = (
        f"This tokenizer’s rules: {esc('; '.join(steps))}." if steps else "This tokenizer has no such rules."
    )
    outcome = (
        f"{changed} piece{'s' if changed > 1 else ''} of the text changed, as marked."
        if changed
        else "Nothing of this text changed."
    )
    size = len(j.text.encode("utf-8"))
    return Stage(
        "text",
        "Text, cleaned",
        f"Before it is cut, a text may be normalized, so that spellings that mean the same look the same. {rules} "
        f"{outcome}",
        "text → normalize(text)",
        f'<p class="sentence">{"".join(pieces)}</p>'
        f'<p class="note">{len(j.text)} characters, {size} bytes in UTF-8. '
        "<del>struck out</del> as typed, <ins>underlined</ins> as the model reads it.</p>",
    )


def _surfaces(j: Journey) -> list[tuple[int, int, str]]:
    """Stretches of the text (start, end) with what their tokens spell; tokens that share a character go together."""
    tokenizer = j.model.require_tokenizer()
    groups: list[tuple[int, int, list[int]]] = []
    for t in j.tokens:
        start, end = t.offsets
        if t.added or end <= start:
            continue
        if groups and start < groups[-1][1]:
            first, last, ids = groups[-1]
            groups[-1] = (first, max(last, end), [*ids, t.id])
        else:
            groups.append((start, end, [t.id]))
    return [
        (start, end, tokenizer.decode(ids, skip_special_tokens=False).removeprefix("##"))
        for start, end, ids in groups
    ]


def _normalizer(part: Any) -> list[str]:
    if not isinstance(part, dict):
        return []
    kind = part.get("type")
    if kind == "Sequence":
        return [step for inner in part.get("normalizers", []) for step in _normalizer(inner)]
    if kind != "BertNormalizer":
        return [NORMALIZERS.get(str(kind), str(kind))]
    lower = bool(part.get("lowercase"))
    accents = lower if part.get("strip_accents") is None else bool(part["strip_accents"])
    chosen = [
        (part.get("clean_text"), "control characters are dropped"),
        (part.get("handle_chinese_chars"), "Chinese characters stand alone"),
        (accents, "accents are dropped"),
        (lower, "letters become lower-case"),
    ]
    return [text for on, text in chosen if on]


def tokens(j: Journey) -> Stage:
    """The pieces of the text, their ids and places."""
    tokenizer = j.model.require_tokenizer()
    cards = "".join(
        f'<li class="chip c{i % 5}"><code>{esc(t.string)}</code><b>{t.id}</b><small>{t.offsets[0]}–{t.offsets[1]}'
        "</small></li>"
        for i, t in enumerate(t for t in j.tokens if not t.added)
    )
    count = sum(not t.added for t in j.tokens)
    per = len(j.text.encode("utf-8")) / count
    return Stage(
        "tokens",
        "Tokens",
        f"The {esc(tokenizer.kind)} tokenizer cuts the text into {count} pieces that it knows and gives each its "
        f"number among {tokenizer.vocab_size:,}; rare words fall into several pieces.",
        "text → (x<sub>1</sub>, …, x<sub>n</sub>), &nbsp; x<sub>i</sub> ∈ {0, …, V−1}",
        f'<ul class="chips">{cards}</ul><p class="note">The vocabulary’s string, <b>its id</b>, and the characters of '
        f"the text that it stands for. {per:.2f} bytes a token. A “Ġ” or “▁” is a space; “##” goes on with a word.</p>",
    )


def special(j: Journey) -> Stage:
    """What is put around the text."""
    added = [t for t in j.tokens if t.added]
    line = "".join(
        f'<li class="chip{" special" if t.added else ""}"><code>{esc(t.label)}</code><b>{t.id}</b></li>'
        for t in j.tokens
    )
    if j.objective in ("ar", "plm"):
        lead = (
            "A first token has nothing before it to be guessed from, so a start token is put in front of the text."
            if added
            else "Some models read a start token first. This one has none, so its first token cannot be guessed."
        )
    else:
        lead = (
            "Tokens that are not of the text frame it: one in front, whose state can stand for the whole, and one at "
            "the end."
            if added
            else "Many encoders frame a text with special tokens; this tokenizer adds none."
        )
    frame = " ".join(t.label if t.added else "x" for t in j.tokens)
    while "x x" in frame:
        frame = frame.replace("x x", "x")
    return Stage(
        "special",
        "Special tokens",
        lead,
        f"{esc(frame).replace('x', 'x<sub>1</sub> … x<sub>n</sub>', 1) if added else 'x<sub>1</sub> … x<sub>n</sub>'}",
        f'<ul class="chips">{line}</ul><p class="note">{len(added)} added, {len(j.tokens)} in all.</p>',
    )


def row(j: Journey) -> Stage:
    """The padded row that the program reads."""
    width = len(j.row["input_ids"])
    names = [n for n in ("input_ids", "attention_mask", "position_ids", "token_type_ids") if n in j.row]
    body = "".join(
        f"<tr><th>{name}</th>"
        + "".join(
            f"<td{'' if i < len(j.tokens) else ' class=pad'}>{int(x)}</td>" for i, x in enumerate(j.row[name])
        )
        + "</tr>"
        for name in names
    )
    head = "".join(
        f"<td>{esc(j.tokens[i].label)}</td>" if i < len(j.tokens) else "<td class=pad>·</td>"
        for i in range(width)
    )
    padding = width - len(j.tokens)
    return Stage(
        "row",
        "Batch and padding",
        "Texts go through the model many at a time, as rows of one rectangular array. Shorter rows are filled up with "
        "padding, and a mask of 0 and 1 tells attention to leave it out, so that it changes nothing.",
        "ids ∈ ℤ<sup>B×T</sup>, &nbsp; mask ∈ {0, 1}<sup>B×T</sup>",
        f'<div class="scroll"><table class="row"><tr><th></th>{head}</tr>{body}</table></div>'
        f'<p class="note">One row as the scoring program reads it: {len(j.tokens)} tokens and {padding} of '
        f"padding, {width} wide.</p>",
    )
