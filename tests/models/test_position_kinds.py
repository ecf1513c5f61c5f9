"""Families with positions other than their own: what shifts and orders change, decoding, training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.errors import Error
from pyrformer.models import FAMILIES
from pyrformer.models.positions import sinusoids

CAUSAL = ("learned", "sinusoidal", "rope", "alibi", "none")
DECODERS = ("gpt2", "llama", "qwen3", "falcon", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
CASES = [(kind, p) for kind in DECODERS for p in CAUSAL]
CASES += [(kind, p) for kind in ENCODERS for p in ("absolute", "sinusoidal", "rope", "none")]


def model(kind: str, positions: str, **more: Any) -> pf.Model:
    sizes = FAMILIES[kind][0].SIZES
    config: dict[str, Any] = {"model_type": kind, "vocab_size": 30, "position_embedding_type": positions}
    config |= {sizes["layers"]: 2, sizes["width"]: 16, sizes["heads"]: 2, sizes["positions"]: 32}
    config |= {"initializer_range": 0.5, "init_std": 0.5, "pad_token_id": 1, **more}
    if kind == "gpt_neox":
        config |= {"rope_parameters": {"partial_rotary_factor": 0.5}}
    if kind == "modernbert":
        config |= {"local_attention": 4, "layer_types": ["sliding_attention", "full_attention"]}
    if kind == "qwen3":
        config |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
    return pf.Model.from_config(config, seed=1, dtype="float64")


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_shifts_and_orders(kind: str, positions: str) -> None:
    m = model(kind, positions)
    ids, at = np.array([[7, 8, 9, 10, 11, 12]]), np.arange(6)[None]
    if kind == "roberta":
        at = at + 2
    here, there = m(ids, position_ids=at).logits, m(ids, position_ids=at + 5).logits
    # Relative kinds do not see a shift of all positions; tables do.
    moved = np.abs(here - there).max() > 1e-6
    assert moved == (positions in ("absolute", "learned", "sinusoidal"))
    np.testing.assert_allclose(m(ids).logits, here, atol=1e-12)
    padded = m(np.pad(ids, ((0, 0), (0, 3)), constant_values=1), attention_mask=[[1] * 6 + [0] * 3])
    np.testing.assert_allclose(padded.logits[:, :6], here, atol=1e-12)
    swapped = m(ids[:, [1, 0, 2, 3, 4, 5]]).logits[0, -1]
    # A windowed layer tells what is near, positions or none.
    if kind in ENCODERS and kind != "modernbert":
        assert (np.abs(swapped - here[0, -1]).max() > 1e-6) == (positions != "none")


def test_alibi_and_sinusoids_are_the_papers() -> None:
    m = model("llama", "sinusoidal")
    np.testing.assert_allclose(m.state_dict()["model.embed_positions.weight"], sinusoids(32, 16), atol=1e-7)
    # Without positions, one layer's attention differs from ALiBi's by the bias −slope·distance alone.
    plain, biased = model("llama", "none"), model("llama", "alibi")
    rows = [x.attention([7, 8, 9, 10, 11])[0].astype(np.float64) for x in (plain, biased)]
    distance = np.arange(5)[:, None] - np.arange(5)[None, :]
    for head, slope in enumerate((2.0**-4, 2.0**-8)):
        want = rows[0][head] * np.exp(-slope * distance)
        np.testing.assert_allclose(rows[1][head], want / want.sum(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(("kind", "positions"), [c for c in CASES if c[0] in DECODERS])
def test_decoding_agrees_with_the_whole(kind: str, positions: str) -> None:
    m = model(kind, positions)
    text = [7, 8, 9]
    for token in m.generate([text], max_new_tokens=5, eos_token_id=None).ids[0]:
        assert token == int(m([text]).logits[0, -1].argmax())
        text.append(token)


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_training_and_files(tmp_path: Path, kind: str, positions: str) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 100)
    masked = kind in ENCODERS
    arguments = ["train", str(tmp_path / "t.txt"), "--out", str(tmp_path / "run"), "--family", kind]
    arguments += ["--objective", "mlm" if masked else "ar", "--position-embedding-type", positions]
    arguments += ["--tokenizer", "bert-uncased" if masked else "char", "--layers", "1", "--width", "16"]
    arguments += ["--heads", "2", "--seq-len", "16", "--batch-size", "4", "--max-steps", "3"]
    if masked:
        arguments += ["--vocab-size", "60"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    m = pf.load(tmp_path / "run")
    assert m.config["position_embedding_type"] == positions
    if positions in ("none", "rope"):
        said = "turns queries and keys" if positions == "rope" else "without a bias or rotation"
        assert said in m.explain("the cat sat")
    foreign = positions not in FAMILIES[kind][0].OWN_POSITIONS
    assert ("pyrformer's own" in done.output) == foreign
    if foreign:
        with pytest.warns(UserWarning, match=f"{positions!r} are pyrformer's own"):
            m.save(tmp_path / "saved")
    else:
        m.save(tmp_path / "saved")
    text = m(np.arange(4, 11)[None])
    assert np.array_equal(pf.load(tmp_path / "saved")(np.arange(4, 11)[None]).logits, text.logits)
    tables = [v for n, v in m.state_dict().items() if "position" in n or ".wpe." in n]
    assert len(tables) == (positions in ("absolute", "learned", "sinusoidal"))
    if positions == "sinusoidal":
        assert np.array_equal(tables[0], sinusoids(*tables[0].shape))


def test_refusals(tmp_path: Path) -> None:
    for kind, positions in (
        ("bert", "alibi"),
        ("bert", "relative_key"),
        ("llama", "absolute"),
        ("gpt2", "?"),
        ("modernbert", "alibi"),
        ("xlnet", "rope"),
    ):
        with pytest.raises(Error, match="position_embedding_type"):
            model(kind, positions)
    with pytest.raises(Error, match="even width of heads"):
        model("gpt2", "rope", n_embd=6, n_head=2)
    with pytest.raises(Error, match="contradict"):
        model("falcon", "rope", alibi=True)
    with pytest.raises(Error, match="contradict"):
        model("distilbert", "none", sinusoidal_pos_embds=True)
    for kind, positions in (
        ("llama", "alibi"),
        ("gpt2", "rope"),
        ("gpt_neox", "none"),
        ("falcon", "learned"),
    ):
        with pytest.raises(Error, match="positions cannot be written"):
            model(kind, positions).save(tmp_path / "m.gguf")
    (tmp_path / "t.txt").write_text("the cat. " * 100)
    arguments = ["train", str(tmp_path / "t.txt"), "--out", str(tmp_path / "run"), "--family", "xlnet"]
    done = CliRunner().invoke(main, [*arguments, "--objective", "plm", "--position-embedding-type", "rope"])
    assert done.exit_code == 2
    assert "by relative distances alone" in done.output
