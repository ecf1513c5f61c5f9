"""Tokenizers against recorded results, against the ``tokenizers`` library, and against the laws they obey."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrformer as pf
from pyrformer.data.documents import tokenize

RECORDED = [
    "bert_uncased",
    "bert_cased",
    "gpt2_bytelevel",
    "roberta_bytelevel",
    "llama2_byte_fallback",
    "llama2_metaspace",
    "llama3_bytelevel",
    "xlnet_unigram",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't care.",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein — naïve café, 12 345,67 €.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸跳过了懒狗。 すばしこい茶色の狐。",
    "def f(x):\n\treturn x  # tabs,\r\n  spaces and 🙂👩‍👩‍👧 signs\n",
] * 8
#: Preset or kind, and a vocabulary large enough for the alphabet and some merges.
TRAINED: dict[str, dict[str, Any]] = {
    "bpe": {"kind": "bpe", "vocab_size": 400},
    "wordpiece": {"kind": "wordpiece", "vocab_size": 400},
    "bert-cased": {"preset": "bert-cased", "vocab_size": 400},
    "multilingual": {"preset": "multilingual", "vocab_size": 400},
    "unigram": {"kind": "unigram", "vocab_size": 400},
    "llama": {"preset": "llama", "vocab_size": 600},
    "char": {"kind": "char"},
}
#: Any text, and text out of the corpus' words, which meets merges more often.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(
        st.sampled_from([*" ".join(CORPUS[:5]).split(" "), " ", "\n", "[MASK]", "<|endoftext|>"]), max_size=12
    ).map(" ".join),
)
#: What the corpus has, which a tokenizer without an unknown token needs.
KNOWN = st.text(st.sampled_from(sorted(set("".join(CORPUS)))), max_size=60)


def trained(name: str, **more: Any) -> pf.Tokenizer:
    return pf.Tokenizer.train(iter(CORPUS), **{**TRAINED[name], **more})


@pytest.fixture(scope="module", params=TRAINED)
def tokenizer(request: pytest.FixtureRequest) -> pf.Tokenizer:
    return trained(request.param)


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request: pytest.FixtureRequest, fixtures: Path) -> Path:
    folder = fixtures / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"no recorded results at {folder}")
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- Recorded results -----------------------------------------------------------------------------------------------


def test_encodings(recorded: Path) -> None:
    tokenizer = pf.Tokenizer.load(recorded)
    cases = rows(recorded / "encodings.jsonl")
    for case in cases:
        e = tokenizer.encode(case["text"], case.get("pair"), case.get("add_special_tokens", True))
        said = repr((case["text"], case.get("pair")))
        assert e.ids == case["ids"], said
        assert e.tokens == case["tokens"], said
        assert [list(o) for o in e.offsets] == case["offsets"], said
        assert e.type_ids == case["type_ids"], said
        assert e.special_tokens_mask == case["special"], said
        assert e.attention_mask == [1] * len(e), said
        assert tokenizer.decode(e.ids) == case["decoded"], said
        if "decoded_with_special" in case:
            assert tokenizer.decode(e.ids, skip_special_tokens=False) == case["decoded_with_special"], said
    assert len(cases) > 50


def test_decodings(recorded: Path) -> None:
    tokenizer = pf.Tokenizer.load(recorded)
    cases = rows(recorded / "decodings.jsonl")
    for case in cases:
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["ids"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded_with_special"]
    assert len(cases) >= 30


def test_batches_of_recorded_texts(recorded: Path) -> None:
    tokenizer = pf.Tokenizer.load(recorded)
    cases = [c for c in rows(recorded / "encodings.jsonl") if not {"pair", "add_special_tokens"} & c.keys()]
    for threads in (1, 2, 5):
        ragged = tokenizer.encode_batch([case["text"] for case in cases], threads=threads)
        assert [ids.tolist() for ids in ragged] == [case["ids"] for case in cases]


# ---- The library reads what is trained ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, known=KNOWN)
def test_the_library_agrees(tokenizer: pf.Tokenizer, text: str, known: str) -> None:
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(tokenizer.to_json())
    assert library.get_vocab_size() == tokenizer.vocab_size
    text = known if tokenizer.kind == "char" else text
    ours, theirs = tokenizer.encode(text), library.encode(text)
    assert ours.ids == theirs.ids
    assert ours.tokens == theirs.tokens
    assert ours.offsets == theirs.offsets
    assert ours.type_ids == theirs.type_ids
    assert tokenizer.decode(ours.ids) == library.decode(theirs.ids)
    if tokenizer.kind != "char":
        assert tokenizer.encode(text, known).ids == library.encode(text, known).ids


# ---- Laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_byte_level_gives_back_any_text(text: str) -> None:
    tokenizer = _BYTES
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(text=KNOWN)
def test_characters_give_back_known_text(text: str) -> None:
    ids = _CHARACTERS.encode(text).ids
    assert _CHARACTERS.decode(ids) == text
    assert len(ids) == len(text)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_stream_is_decode(tokenizer: pf.Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Any ids, so that characters are broken in all ways, and no piece holds half of one."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream_decoder(skip_special_tokens=skip)
    pieces = [piece for piece in map(stream.push, ids) if piece is not None]
    pieces += [piece for piece in [stream.finish()] if piece is not None]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert "" not in pieces


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.one_of(KNOWN, st.just("")), max_size=8),
    special=st.booleans(),
    threads=st.integers(1, 4),
)
def test_a_batch_is_its_texts(tokenizer: pf.Tokenizer, texts: list[str], special: bool, threads: int) -> None:
    ragged = tokenizer.encode_batch(texts, add_special_tokens=special, threads=threads)
    assert ragged.ids.dtype == np.uint32
    assert ragged.offsets.dtype == np.int64
    assert len(ragged) == len(texts)
    assert [ids.tolist() for ids in ragged] == [
        tokenizer.encode(t, add_special_tokens=special).ids for t in texts
    ]


@settings(max_examples=100, deadline=None)
@given(text=KNOWN)
def test_offsets_stand_in_the_text(tokenizer: pf.Tokenizer, text: str) -> None:
    e = tokenizer.encode(text, add_special_tokens=False)
    for start, end in e.offsets:
        assert 0 <= start <= end <= len(text)
    if tokenizer.kind == "char":
        assert [text[a:b] for a, b in e.offsets] == e.tokens


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_reproducible(name: str, tmp_path: Path) -> None:
    texts = {trained(name, threads=threads).to_json() for threads in (1, 2, 3, None)}
    assert len(texts) == 1
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in CORPUS) + "\n", encoding="utf-8")
    assert pf.Tokenizer.train([file], **TRAINED[name]).to_json() in texts


@pytest.mark.parametrize("name", TRAINED)
def test_vocabulary_is_whole(name: str) -> None:
    tokenizer = trained(name)
    assert tokenizer.vocab_size <= TRAINED[name].get("vocab_size", 10_000)
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert None not in tokens
    assert len(set(tokens)) == len(tokens)
    assert [tokenizer.token_to_id(t or "") for t in tokens] == list(range(len(tokens)))
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.token_to_id("no such token") is None


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    trained("bpe", progress=lambda *what: seen.append(what))
    assert {stage for stage, _, _ in seen} == {"count", "merge"}
    assert all(0 <= done <= total for _, done, total in seen)
    seen.clear()
    trained("unigram", progress=lambda *what: seen.append(what))
    assert seen[-1] == ("prune", 1000, 1000)


def test_training_does_not_hold_the_text(tmp_path: Path) -> None:
    """96 MB are learned from in less than half of that."""
    file = tmp_path / "big.txt"
    line = "the dog and the fox, 123 naïve words; " * 25 + "\n"
    with file.open("w", encoding="utf-8") as out:
        for _ in range(100):
            out.write(line * (960_000 // len(line)))
    code = (
        "import resource, pyrformer as pf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pf.Tokenizer.train(iter(['a small text']), 'bpe', 300)\n"
        "before = peak()\n"
        f"pf.Tokenizer.train([{str(file)!r}], 'bpe', 300)\n"
        "print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 48_000, f"{out.stdout} KB"


def test_without_truncation(tmp_path: Path) -> None:
    """What a file cuts is whole where it is trained on or measured."""
    tokenizer = trained("bpe")
    file = json.loads(tokenizer.to_json())
    file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    cut = pf.Tokenizer.load(tmp_path)
    text = "the dog and the fox"
    whole = tokenizer.encode(text).ids
    assert len(whole) > 2
    assert cut.encode(text).ids == whole[:2]
    assert cut.without_truncation().encode(text).ids == whole
    ragged = tokenize(cut, [text, text], objective="mlm")
    assert [ragged[0].tolist(), ragged[1].tolist()] == [whole, whole]


def test_special_tokens() -> None:
    tokenizer = trained("wordpiece")
    cls, sep, pad, mask = tokenizer.masking_ids()
    assert len({cls, sep, pad, mask}) == 4
    assert tokenizer.encode("the dog", "the fox").ids.count(sep) == 2
    assert tokenizer.encode("the dog").special_tokens_mask[0] == 1
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (mask, pad)
    assert all(map(tokenizer.is_special, (cls, sep, pad, mask)))
    assert not tokenizer.is_special(tokenizer.token_to_id("the") or 0)
    assert trained("bpe").eos_token_id is not None


# ---- Files and processes --------------------------------------------------------------------------------------------


def test_saved_and_pickled_are_the_same(tokenizer: pf.Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (
        pf.Tokenizer.load(tmp_path),
        pf.Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy.to_json() == tokenizer.to_json()
        assert copy.kind == tokenizer.kind
        assert len(copy) == len(tokenizer)
        assert copy.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def _ids_of_a_child(texts: list[str]) -> list[int]:
    return _BYTES.encode_batch(texts, threads=2).ids.tolist()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_children_encode() -> None:
    """After the parent has encoded on threads, with no environment variable set."""
    expected = _ids_of_a_child(CORPUS)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_ids_of_a_child, [CORPUS] * 4).get(timeout=60) == [expected] * 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {"type": "Quantum"}}',
        '{"model": {"type": "BPE", "vocab": 3, "merges": []}}',
    ],
)
def test_bad_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(pf.Error) as caught:
        pf.Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(pf.Error, match="nowhere"):
        pf.Tokenizer.load(tmp_path / "nowhere.json")
    with pytest.raises(pf.Error, match="syllables"):
        trained("bpe", kind="syllables")
    with pytest.raises(pf.Error, match="gpt9"):
        trained("bpe", preset="gpt9")
    with pytest.raises(pf.Error, match="vocab_size"):
        trained("bpe", vocab_size=10)
    with pytest.raises(pf.Error):
        pf.Tokenizer.train(iter([]), kind="bpe", vocab_size=300)
    tokenizer = trained("char")
    with pytest.raises(pf.Error, match=str(tokenizer.vocab_size)):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(pf.Error):
        tokenizer.stream_decoder().push(tokenizer.vocab_size)
    with pytest.raises(pf.Error, match="U\\+2603"):
        tokenizer.encode("☃")


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_out_of_range(bad: int) -> None:
    with pytest.raises(pf.Error):
        _CHARACTERS.decode([bad])


@pytest.mark.parametrize("method", ["encode", "encode_batch"])
def test_lone_surrogates(method: str) -> None:
    text = "a\ud800b"
    with pytest.raises((pf.Error, UnicodeEncodeError)):
        getattr(_BYTES, method)(text if method == "encode" else [text])


_BYTES = trained("bpe")
_CHARACTERS = trained("char")
