"""Tokenizers read from the other files that hold one: the same ids from each."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from pipelines import PROSE

import pyrformer as pf

TEXT = "The cat's 12345 mats:  naïve 中文\n\nÜber HelloWorld, isn't it? 🙂"
CORPUS = [TEXT, "the cat sat on the mat and the cat sat", "Hello World hello World 中文中文"] * 8


@pytest.fixture(scope="module")
def gpt2() -> pf.Tokenizer:
    return pf.Tokenizer.train(iter(CORPUS), preset="gpt2", vocab_size=320)


def tokens_of(tokenizer: pf.Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]


def alphabet() -> dict[str, int]:
    """The character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def string(s: str) -> bytes:
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """Writes a GGUF file of metadata alone."""

    def value(v: Any) -> bytes:
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        head = {
            str: (8, string),
            float: (6, lambda x: struct.pack("<f", x)),
            int: (5, lambda x: struct.pack("<i", x)),
        }
        kind, write = head[type(v[0])]
        return struct.pack("<IIQ", 9, kind, len(v)) + b"".join(map(write, v))

    entries = b"".join(string(f"tokenizer.ggml.{k}") + value(v) for k, v in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + entries)
    return path


def test_vocab_and_merges(gpt2: pf.Tokenizer, tmp_path: Path) -> None:
    model = json.loads(gpt2.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        assert pf.Tokenizer.load(path).encode(TEXT) == gpt2.encode(TEXT)


def test_vocab_txt(tmp_path: Path) -> None:
    tokenizer = pf.Tokenizer.train(iter(CORPUS), preset="bert-cased", vocab_size=150)
    (tmp_path / "vocab.txt").write_text("\n".join(tokens_of(tokenizer)) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert pf.Tokenizer.load(path).encode(TEXT, "the cat") == tokenizer.encode(TEXT, "the cat")


def test_tiktoken(gpt2: pf.Tokenizer, tmp_path: Path) -> None:
    byte = alphabet()
    ranks = [bytes(byte[c] for c in t) for t in tokens_of(gpt2)[1:]]
    file = tmp_path / "x.tiktoken"
    file.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks)))
    for path in (tmp_path, file):
        ids = pf.Tokenizer.load(path, split="gpt2").encode(TEXT).ids
        assert [i + 1 for i in ids] == gpt2.encode(TEXT).ids
    with pytest.raises(pf.Error, match="318 ranks"):
        pf.Tokenizer.load(file)
    with pytest.raises(pf.Error, match="gpt9"):
        pf.Tokenizer.load(file, split="gpt9")
    peer = pytest.importorskip("tiktoken")
    patterns = {
        "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    }
    for split, pattern in patterns.items():
        theirs = peer.Encoding(
            "x", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(ranks)}, special_tokens={}
        )
        assert pf.Tokenizer.load(file, split=split).encode(TEXT).ids == theirs.encode(TEXT)


@pytest.mark.parametrize("damage", ["YQ== x\n", "Y 1\n", "YQ==\n", "YQ== 0\nYg== 0\n", "\xff 1\n"])
def test_damaged_tiktoken(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "x.tiktoken"
    file.write_text(damage, encoding="latin-1")
    with pytest.raises(pf.Error, match=r"x\.tiktoken"):
        pf.Tokenizer.load(file, split="gpt2")


def test_gguf_bytes(gpt2: pf.Tokenizer, tmp_path: Path) -> None:
    model = json.loads(gpt2.to_json())["model"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens_of(gpt2),
        "token_type": [3] + [1] * (gpt2.vocab_size - 1),
        "merges": [" ".join(m) for m in model["merges"]],
        "eos_token_id": 0,
    }
    loaded = pf.Tokenizer.load(gguf(tmp_path / "m.gguf", metadata))
    assert loaded.encode(TEXT + "<|endoftext|>") == gpt2.encode(TEXT + "<|endoftext|>")
    assert loaded.eos_token_id == 0
    with_bos = pf.Tokenizer.load(
        gguf(tmp_path / "b.gguf", {**metadata, "add_bos_token": True, "bos_token_id": 0})
    )
    assert with_bos.encode("the").ids == [0, *gpt2.encode("the").ids]
    for wrong, said in [({"pre": "gpt-9"}, "gpt-9"), ({"model": "rwkv"}, "rwkv"), ({"merges": ["ab"]}, "ab")]:
        with pytest.raises(pf.Error, match=said):
            pf.Tokenizer.load(gguf(tmp_path / "w.gguf", {**metadata, **wrong}))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:900])
    with pytest.raises(pf.Error, match=r"cut\.gguf.*ends"):
        pf.Tokenizer.load(tmp_path / "cut.gguf")


def test_gguf_sentencepiece(tmp_path: Path) -> None:
    """Scores fall with the id, as SentencePiece writes them: the ids are those of the merges."""
    llama = pf.Tokenizer.train(iter(CORPUS), preset="llama", vocab_size=400)
    tokens = tokens_of(llama)
    chars = [t for t in tokens[259:] if len(t) == 1]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-1e9 if t in chars else -float(i) for i, t in enumerate(tokens[259:])],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "unknown_token_id": 0,
    }
    loaded = pf.Tokenizer.load(gguf(tmp_path / "m.gguf", metadata))
    for text in (TEXT, "the cat", "☃ the\tcat", "a  b"):
        assert loaded.encode(text).ids == llama.encode(text).ids
        assert loaded.decode(loaded.encode(text).ids) == text


def message(*values: tuple[int, int | float | bytes]) -> bytes:
    """A protocol buffer of numbered fields."""
    out = b""
    for number, value in values:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3) + varint(value)
    return out


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    llama = pf.Tokenizer.train(iter(CORPUS), preset="llama", vocab_size=400)
    tokens = tokens_of(llama)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-1e9 if len(t) == 1 else -float(i) for i, t in enumerate(tokens[259:])]
    pieces = [
        (1, message((1, token.encode()), (2, score), (3, kind)))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    trainer = message((3, 2), (35, 1), (40, 0))
    plain = message((1, b"identity"), (3, int(prefix)), (4, 0))
    file = tmp_path / "tokenizer.model"
    file.write_bytes(message(*pieces, (2, trainer), (3, plain)))
    loaded = pf.Tokenizer.load(tmp_path)
    for text in (TEXT, "the cat", "☃ the\tcat", "a  b", " a "):
        ids = loaded.encode(text).ids
        if prefix and text[0] != " ":
            assert ids == llama.encode(text).ids
        assert loaded.decode(ids) == text
    for how, what, problem in (
        (trainer, plain + message((2, b"map")), "character map"),
        (trainer + varint(24 << 3) + b"\1", plain, "behind words"),
    ):
        file.write_bytes(message(*pieces, (2, how), (3, what)))
        with pytest.raises(pf.Error, match=problem):
            pf.Tokenizer.load(file)
    file.write_bytes(message(*pieces)[:-3])
    with pytest.raises(pf.Error, match="no model of SentencePiece"):
        pf.Tokenizer.load(file)


def test_gguf_wordpiece(tmp_path: Path) -> None:
    bert = pf.Tokenizer.train(iter(CORPUS), preset="bert-uncased", vocab_size=150)
    tokens = [
        t if t[0] == "[" and t[-1] == "]" and len(t) > 1 else t[2:] if t.startswith("##") else "▁" + t
        for t in tokens_of(bert)
    ]
    metadata = {
        "model": "bert",
        "tokens": tokens,
        "token_type": [3] * 5 + [1] * (len(tokens) - 5),
        "unknown_token_id": 1,
    }
    loaded = pf.Tokenizer.load(gguf(tmp_path / "m.gguf", metadata))
    assert loaded.encode(TEXT, "the cat") == bert.encode(TEXT, "the cat")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(pf.Error, match=r"tokenizer\.json"):
        pf.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0d")
    with pytest.raises(pf.Error, match="SentencePiece"):
        pf.Tokenizer.load(tmp_path)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("normalization", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": False}, {"byte_fallback": True}])
def test_sentencepiece_itself(
    tmp_path: Path, model_type: str, normalization: str, options: dict[str, bool]
) -> None:
    """The library writes the file and is asked for the ids: character maps, runs of spaces, bytes."""
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *PROSE.splitlines()] * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=420 if options.get("byte_fallback") else 160,
        hard_vocab_limit=False,
        model_type=model_type,
        normalization_rule_name=normalization,
        minloglevel=2,
        **options,
    )
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    ours = pf.Tokenizer.load(tmp_path)
    assert ours.fallback is None
    # A tokenizer.json says the same.
    again = pf.Tokenizer.load(_saved(ours, tmp_path / "saved"))
    rng = random.Random(2)
    # Half-width characters with their voicing are looked up one by one, as in a tokenizer.json.
    pieces = [word for word in (TEXT + PROSE).split() if "ｶﾞ" not in word]
    pieces += [" ", "  ", "ﬁ", "①", "\u00a0", "☃", "Ⅷ", "\u3000", "한"]
    for _ in range(300):
        text = rng.choice(["", " "]).join(rng.choice(pieces) for _ in range(rng.randrange(9)))
        ids, expected = ours.encode(text).ids, theirs.encode(text)
        if ids != expected:
            # Of splits that are as likely, which one wins depends on the last bit.
            assert model_type == "unigram", repr(text)
            assert sum(map(theirs.get_score, ids)) == pytest.approx(
                sum(map(theirs.get_score, expected)), 1e-5
            )
        assert again.encode(text).ids == ids, repr(text)


def _saved(tokenizer: pf.Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(folder)
    return folder
