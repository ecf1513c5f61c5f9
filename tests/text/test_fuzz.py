"""Differential fuzzing against the ``tokenizers`` library: generated strings, the same ids, offsets and texts.

The recorded tokenizers run on the fast path; of the pipelines made here (``pipelines.py``) most do not.
The number of strings for each tokenizer is ``PYRFORMER_FUZZ`` (``make fuzz``: 15,000). Folders with a
``tokenizer.json`` below ``PYRFORMER_VOCABS`` are tried beside the recorded ones.
"""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from pipelines import PIPELINES, pipeline

import pyrformer as pf

STRINGS = int(os.environ.get("PYRFORMER_FUZZ", "300"))
NAMES = [
    "bert_uncased",
    "bert_cased",
    "gpt2_bytelevel",
    "roberta_bytelevel",
    "llama2_byte_fallback",
    "llama2_metaspace",
    "llama3_bytelevel",
    "xlnet_unigram",
]
VOCABS = (
    sorted(Path(os.environ["PYRFORMER_VOCABS"]).glob("*/tokenizer.json"))
    if "PYRFORMER_VOCABS" in os.environ
    else []
)
#: First and last code points of blocks: every script in use, signs, emoji, and the ends of planes.
BLOCKS = [
    (0x20, 0x7E), (0x20, 0x7E), (0x61, 0x7A), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2AF), (0x2B0, 0x2FF),
    (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x74F),
    (0x780, 0x7BF), (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F), (0xA80, 0xAFF), (0xB00, 0xB7F), (0xB80, 0xBFF),
    (0xC00, 0xC7F), (0xC80, 0xCFF), (0xD00, 0xD7F), (0xD80, 0xDFF), (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF),
    (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF), (0x1400, 0x167F),
    (0x1680, 0x16FF), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x1D00, 0x1DBF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
    (0x2070, 0x20CF), (0x20D0, 0x20FF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2460, 0x27BF), (0x2C00, 0x2DFF),
    (0x2E80, 0x303F), (0x3040, 0x30FF), (0x3100, 0x33FF), (0x3400, 0x34FF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF),
    (0xA640, 0xA7FF), (0xAB30, 0xABFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF),
    (0xFE00, 0xFE6F), (0xFF00, 0xFFEF), (0x10000, 0x100FF), (0x10280, 0x1044F), (0x10900, 0x10A6F),
    (0x11000, 0x111FF), (0x12000, 0x123FF), (0x13000, 0x1342F), (0x1D100, 0x1D7FF), (0x1E900, 0x1E95F),
    (0x1F100, 0x1F1FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x200FF), (0x2A700, 0x2B8FF),
    (0x2F800, 0x2FA1F), (0x30000, 0x300FF), (0xE0000, 0xE01EF), (0x10FF00, 0x10FFFF),
]  # fmt: skip
CONTROLS = [
    *range(0x20),
    *range(0x7F, 0xA1),
    0xAD,
    0x200B,
    0x200C,
    0x200D,
    0x200E,
    0x2028,
    0x2029,
    0x2060,
    0xFEFF,
    0xFFFD,
]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "❤️", "1️⃣", "🧑🏿‍🚀"]
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u2009",
    " \n ",
    "\u1680",
    "\u0085",
]
PROSE = """
the The THE don't I'LL we're they've 'S naïve café Straße İstanbul ﬁne 12345 3.14 a_b x=y; // http://example.org/a?b=c
return self.x ... !? -- “quotes” ½ Ⅷ ² ① ㎏ HelloWorld camelCaseWord 你好 世界 こんにちは 안녕하세요 Привет مرحبا שלום
สวัสดี नमस्ते ΑΒΓ ſ ŉ ǆ ǅ ΐ ẞ Å Ω
"""
WORDS = PROSE.split()


#: Old enough for every table of Unicode involved: the library, its dependencies and ours carry different versions.
def known(c: str) -> bool:
    return unicodedata.category(c) not in ("Cn", "Cs") and unicodedata.ucd_3_2_0.category(c) != "Cn"


def generate(rng: random.Random, special: list[str]) -> str:
    def piece() -> str:
        kind = rng.randrange(10)
        if kind < 3:
            return rng.choice(WORDS)
        if kind == 3:
            return rng.choice(SPACES) * rng.choice([1, 1, 2, 5])
        if kind == 4:
            return chr(rng.choice(CONTROLS))
        if kind == 5:
            return rng.choice(EMOJI)
        if kind == 6:
            return rng.choice(special) if special else "<mask>"
        if kind == 7:
            base = rng.choice(WORDS)
            return "".join(
                c + "".join(chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randrange(3))) for c in base
            )
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))

    text = rng.choice(["", " ", ""]).join(
        piece() + rng.choice(["", "", " "]) for _ in range(rng.choice([1, 2, 4, 8, 20]))
    )
    return "".join(c for c in text if known(c))


def agree(ours: pf.Tokenizer, theirs: Any, text: str) -> None:
    a, b = ours.encode(text), theirs.encode(text)
    assert a.ids == b.ids, repr(text)
    assert a.offsets == b.offsets, repr(text)
    assert a.tokens == b.tokens, repr(text)
    assert ours.decode(a.ids, skip_special_tokens=False) == theirs.decode(b.ids, skip_special_tokens=False), (
        repr(text)
    )


@pytest.fixture(
    scope="module",
    params=[*NAMES, *PIPELINES, *VOCABS],
    ids=lambda p: p if isinstance(p, str) else p.parent.name,
)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pf.Tokenizer, Any]:
    library = pytest.importorskip("tokenizers").Tokenizer
    if request.param in PIPELINES:
        file = tmp_path_factory.mktemp("pipeline") / "tokenizer.json"
        file.write_text(pipeline(request.param), encoding="utf-8")
    elif isinstance(request.param, str):
        file = request.getfixturevalue("fixtures") / "tokenizers" / request.param / "tokenizer.json"
        if not file.is_file():
            pytest.skip(f"no tokenizer at {file}")
    else:
        file = request.param
    theirs = library.from_file(str(file))
    theirs.no_padding()
    theirs.no_truncation()
    # As the library writes it, without padding and truncation.
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(theirs.to_str(), encoding="utf-8")
    return pf.Tokenizer.load(folder), theirs


def test_generated_strings(both: tuple[pf.Tokenizer, Any]) -> None:
    ours, theirs = both
    special = [t.content for t in theirs.get_added_tokens_decoder().values()]
    rng = random.Random(1)
    texts = [generate(rng, special) for _ in range(STRINGS)]
    for text in texts:
        agree(ours, theirs, text)
    batch = ours.encode_batch(texts)
    assert all(batch[i].tolist() == e.ids for i, e in enumerate(theirs.encode_batch(texts)))
    for text, pair in zip(texts[::10], texts[1::10], strict=False):
        a, b = ours.encode(text, pair), theirs.encode(text, pair)
        assert (a.ids, a.type_ids, a.offsets) == (b.ids, b.type_ids, b.offsets), repr((text, pair))


@pytest.mark.parametrize("both", NAMES, indirect=True)
@pytest.mark.parametrize("character", ["a", " ", "=", "中", "\u0301"])
def test_a_megabyte_of_one_character(both: tuple[pf.Tokenizer, Any], character: str) -> None:
    """Linear, or nearly: the library is asked for a short run only, whose tokens ours must continue."""
    ours, theirs = both
    run = character * 2000
    agree(ours, theirs, run)
    text = character * (1_000_000 // len(character.encode()))
    (ids,) = ours.encode_batch([text], add_special_tokens=False)
    assert (
        ours.encode(text[:1000], add_special_tokens=False).ids
        == ours.encode_batch([text[:1000]], False)[0].tolist()
    )
    assert len(ids) <= len(text.encode()) + 8
