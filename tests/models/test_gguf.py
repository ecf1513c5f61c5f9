"""GGUF in and out: blocks against their definitions, models and tokenizers round trip, broken files are refused."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrformer as pf
from pyrformer.errors import Error, FileError
from pyrformer.gguf.blocks import BLOCKS
from pyrformer.gguf.file import Gguf, write_gguf

FAMILIES = ["llama", "llama_gqa_tied", "llama3_rope", "qwen2", "qwen3", "gpt2"]
FAMILIES += ["falcon_7b_style", "falcon_40b_style", "gpt_neox"]


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def by_definition(name: str, b: bytes) -> list[float]:
    """One block, element by element."""
    if name == "Q8_0":
        return [half(b[:2]) * q for q in struct.unpack("32b", b[2:])]
    if name in ("Q4_0", "Q4_1"):
        at = 2 if name == "Q4_0" else 4
        q = [x & 15 for x in b[at:]] + [x >> 4 for x in b[at:]]
        return [half(b[:2]) * (x - 8) if at == 2 else half(b[:2]) * x + half(b[2:4]) for x in q]
    y = [0.0] * 256
    if name == "Q4_K":
        d, dmin, s, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
        for group in range(8):
            if group < 4:
                scale, low = s[group] & 63, s[group + 4] & 63
            else:
                scale = (s[group + 4] & 15) | (s[group - 4] >> 6 << 4)
                low = (s[group + 4] >> 4) | (s[group] >> 6 << 4)
            for i in range(32):
                byte = qs[group // 2 * 32 + i]
                y[group * 32 + i] = d * scale * (byte >> 4 if group % 2 else byte & 15) - dmin * low
        return y
    d, ql, qh, scales = half(b[208:]), b[:128], b[128:192], struct.unpack("16b", b[192:208])
    for n in range(2):
        for i in range(32):
            low, high = ql[n * 64 :], qh[n * 32 + i]
            q = [low[i] & 15, low[i + 32] & 15, low[i] >> 4, low[i + 32] >> 4]
            for k in range(4):
                value = (q[k] | (high >> 2 * k & 3) << 4) - 32
                y[n * 128 + k * 32 + i] = d * scales[n * 8 + i // 16 + 2 * k] * value
    return y


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_blocks(name: str) -> None:
    block = next(b for b in BLOCKS.values() if b.name == name)
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (50, block.nbytes), dtype=np.uint8)
    # Scales that are finite.
    for at in {"Q4_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[name]:
        raw[:, at : at + 2] = rng.normal(size=50).astype(np.float16).view(np.uint8).reshape(50, 2)
    want = np.array([by_definition(name, row.tobytes()) for row in raw])
    np.testing.assert_allclose(block.read(raw), want, rtol=1e-5, atol=1e-5)


def test_blocks_of_every_type_are_read_as_the_reference_reads_them() -> None:
    """Three blocks of random bytes a type, beside what ``dequantize`` of the package ``gguf`` 0.19 makes of them."""
    stored = np.load(Path(__file__).parent / "gguf_blocks.npz")
    for block in BLOCKS.values():
        if block.name.startswith(("Q", "IQ")):
            raw, want = stored[f"{block.name}.raw"], stored[f"{block.name}.values"]
            np.testing.assert_allclose(block.read(raw), want, rtol=1e-6, atol=1e-6, err_msg=block.name)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_round_trip(fixtures: Path, name: str, tmp_path: Path) -> None:
    model = pf.load(fixtures / "models" / name)
    ids = np.arange(20).reshape(2, 10) + 6
    want = model(ids).logits
    for dtype, most in [("f32", 1e-4), ("f16", 0.02), ("q8_0", 0.3)]:
        path = tmp_path / f"{dtype}.gguf"
        model.save(path, dtype=dtype)
        got = pf.load(path)(ids).logits
        assert np.abs(got - want).max() <= most * max(1, np.abs(want).max()), dtype


def test_q_and_k_are_turned(fixtures: Path, tmp_path: Path) -> None:
    """llama.cpp turns neighbouring pairs: row 1 of a head in the file is row D/2 of the model's."""
    model = pf.load(fixtures / "models" / "llama")
    model.save(tmp_path / "m.gguf", dtype="f32")
    stored = Gguf(tmp_path / "m.gguf").tensor("blk.0.attn_q.weight")
    ours = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    d = model.config["head_dim"]
    assert np.array_equal(stored[1], ours[d // 2])
    assert np.array_equal(stored[d + 3], ours[d + 1 + d // 2])


@pytest.mark.parametrize(
    ("name", "heads", "groups"), [("falcon_7b_style", 4, 1), ("falcon_40b_style", 4, 2), ("gpt_neox", 4, 4)]
)
def test_queries_come_first(fixtures: Path, tmp_path: Path, name: str, heads: int, groups: int) -> None:
    model = pf.load(fixtures / "models" / name)
    model.save(tmp_path / "m.gguf", dtype="f32")
    stored = Gguf(tmp_path / "m.gguf").tensor("blk.1.attn_qkv.weight")
    ours = next(
        v for n, v in model.state_dict().items() if "1.attention.query" in n or "1.self_attention.query" in n
    )
    d, each = len(ours) // (heads + 2 * groups), heads // groups
    rows = ours.reshape(groups, each + 2, d, -1)
    for group in range(groups):
        for i in range(each):
            at = (group * each + i) * d
            assert np.array_equal(stored[at : at + d], rows[group, i])
        for j in range(2):
            at = (heads + j * groups + group) * d
            assert np.array_equal(stored[at : at + d], rows[group, each + j])


def test_bert_makes_the_same_vectors(tmp_path: Path) -> None:
    text = "the cat sat on the mat. The dogs lay by the door, and all was well! " * 30
    tokenizer = pf.Tokenizer.train(iter([text]), preset="bert-uncased", vocab_size=120)
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": tokenizer.vocab_size}
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = pf.Model.from_config({**config, "initializer_range": 0.3}, seed=2, tokenizer=tokenizer)
    model.save(tmp_path / "m.gguf", dtype="float32")
    file = Gguf(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "bert"
    assert file.metadata["bert.attention.causal"] is False
    assert not [name for name in file.shapes if "pool" in name]
    again = pf.load(tmp_path / "m.gguf")
    texts = ["The cat sat.", "dogs, DOORS and mats!", "unknown ☃ things"]
    assert again.tokenizer is not None
    for sample in texts:
        assert again.tokenizer.encode(sample).ids == tokenizer.encode(sample).ids
    np.testing.assert_allclose(again.embed(texts), model.embed(texts), atol=1e-6)
    model.save(tmp_path / "h.gguf")
    assert set(Gguf(tmp_path / "h.gguf").metadata) >= {"bert.pooling_type", "bert.context_length"}
    np.testing.assert_allclose(pf.load(tmp_path / "h.gguf").embed(texts), model.embed(texts), atol=2e-2)


@pytest.mark.parametrize("name", ["falcon_rw_style", "bert_mlm", "xlnet", "opt"])
def test_what_llama_cpp_lacks(fixtures: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(Error, match="cannot be written"):
        pf.load(fixtures / "models" / name).save(tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_trained_run_with_its_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and 12 dogs lay by the door. " * 60, encoding="utf-8")
    small = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    options = {"seq_len": 16, "batch_size": 4, "max_steps": 5, "model": small}
    tokenizer = {"preset": "gpt2", "vocab_size": 300}
    run = pf.train(
        pf.TrainConfig(files=[str(text)], out=str(tmp_path / "run"), tokenizer=tokenizer, **options)
    )
    run.model.save(tmp_path / "run.gguf", dtype="f32")
    again = pf.load(tmp_path / "run.gguf")
    assert again.tokenizer is not None
    assert run.model.tokenizer is not None
    for sample in ["the cat, 12 dogs", "  é😀\n\nx", "<|endoftext|>the"]:
        assert again.tokenizer.encode(sample).ids == run.model.tokenizer.encode(sample).ids
    prompt = {"max_new_tokens": 8}
    assert again.generate("the cat", **prompt).ids == run.model.generate("the cat", **prompt).ids


def test_refusals(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="bert"):
        pf.load(fixtures / "models" / "bert_mlm").save(tmp_path / "x.gguf")
    with pytest.raises(Error, match="dtype"):
        pf.load(fixtures / "models" / "llama").save(tmp_path / "x.gguf", dtype="q2")
    assert not list(tmp_path.iterdir())
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "parrot"}, {})
    with pytest.raises(FileError, match="parrot"):
        pf.load(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def valid(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    pf.load(fixtures / "models" / "llama_gqa_tied").save(path, dtype="q8_0")
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_broken_files_are_refused_or_read(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any cut, and any change of bytes in the head, gives a model or one error of ours."""
    raw = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(4000, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path_factory.mktemp("broken") / "m.gguf"
    path.write_bytes(bytes(raw))
    with contextlib.suppress(Error):
        pf.load(path)
