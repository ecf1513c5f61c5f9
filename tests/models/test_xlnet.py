"""XLNet beyond the reference files: generation, clamped distances, one-way attention."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import Error, InputError

CONFIG = {"model_type": "xlnet", "vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
CONFIG |= {"dropout": 0.0, "initializer_range": 0.5, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 5}


def model(**more: Any) -> pf.Model:
    return pf.Model.from_config({**CONFIG, **more}, seed=1, dtype="float64")


def next_logits(m: pf.Model, ids: list[int]) -> np.ndarray:
    """After ids, by what transformers' prepare_inputs_for_generation feeds: a dummy token that nobody sees."""
    t = len(ids) + 1
    perm, mapping = np.zeros((1, t, t)), np.zeros((1, 1, t))
    perm[:, :, -1] = mapping[0, 0, -1] = 1
    return m([[*ids, 0]], perm_mask=perm, target_mapping=mapping).logits[0, 0]


@pytest.mark.parametrize("more", [{}, {"attn_type": "uni"}, {"clamp_len": 3}])
def test_greedy(more: dict[str, Any]) -> None:
    m = model(**more)
    prompts = [[7, 8, 9], [11, 12, 13, 14, 15, 6, 30], [3]]
    got = m.generate(prompts, max_new_tokens=6, eos_token_id=None)
    for prompt, ids, logprobs in zip(prompts, got.ids, got.token_logprobs, strict=True):
        text = list(prompt)
        for token, logprob in zip(ids, logprobs, strict=True):
            logits = next_logits(m, text)
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-4)
            text.append(token)
        assert len(ids) == 6


def test_beams_find_what_exhaustion_finds() -> None:
    m = model(vocab_size=8)
    found = m.generate([[7, 6]], max_new_tokens=2, num_beams=8, eos_token_id=None, length_penalty=0.0)
    best: tuple[float, list[int]] = (-np.inf, [])
    first = next_logits(m, [7, 6])
    for a in range(8):
        second = next_logits(m, [7, 6, a])
        for b in range(8):
            logs = [x[t] - np.log(np.exp(x).sum()) for x, t in ((first, a), (second, b))]
            best = max(best, (float(sum(logs)), [a, b]))
    assert found.ids[0] == best[1]
    assert found.scores[0] == pytest.approx(best[0], abs=1e-4)


def test_sampling_is_reproducible_and_text_goes_on_beyond_the_positions() -> None:
    m = model(n_positions=16)
    options = {"do_sample": True, "seed": 4, "max_new_tokens": 40, "eos_token_id": None}
    assert m.generate([[7]], **options).ids == m.generate([[7]], **options).ids
    assert len(m.generate([[7]], **options).ids[0]) == 40


def test_what_needs_a_cache_is_refused() -> None:
    for option in ({"penalty_alpha": 0.6, "top_k": 4}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(InputError, match="cache"):
            model().generate([[7, 8]], max_new_tokens=3, **option)


def test_the_reference_continues(fixtures: Path) -> None:
    m = pf.load(fixtures / "models" / "xlnet", dtype="float64")
    ids = m.generate([[10, 11, 12]], max_new_tokens=5, eos_token_id=None).ids[0]
    assert [int(next_logits(m, [10, 11, 12, *ids[:i]]).argmax()) for i in range(5)] == ids


def by_formula(m: pf.Model, ids: list[int]) -> np.ndarray:
    """The content stream in numpy, from the formulas of the paper (Yang et al. 2019, appendix A.2)."""
    c, w, t = m.config, m.state_dict(), len(ids)
    h, d, heads = w["transformer.word_embedding.weight"][ids], c["d_head"], c["n_head"]
    distance = np.arange(t)[:, None] - np.arange(t)[None, :]
    if c["clamp_len"] > 0:
        distance = np.clip(distance, -c["clamp_len"], c["clamp_len"])
    angle = distance[..., None] / 10000.0 ** (np.arange(0, c["d_model"], 2) / c["d_model"])
    sinusoids = np.concatenate([np.sin(angle), np.cos(angle)], -1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        from math import erf

        return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))

    for i in range(c["n_layer"]):
        a = f"transformer.layer.{i}.rel_attn"
        q, k, v = (np.einsum("tc,chd->thd", h, w[f"{a}.{x}"]) for x in "qkv")
        r = np.einsum("ijc,chd->ijhd", sinusoids, w[f"{a}.r"])
        score = np.einsum("ihd,jhd->hij", q + w[f"{a}.r_w_bias"], k)
        score += np.einsum("ihd,ijhd->hij", q + w[f"{a}.r_r_bias"], r)
        score += np.einsum("ihd,hd->hi", q + w[f"{a}.r_s_bias"], w[f"{a}.seg_embed"][0])[:, :, None]
        score *= d**-0.5
        if c["attn_type"] == "uni":
            score = np.where(np.triu(np.ones((t, t)), 1) > 0, -np.inf, score)
        p = np.exp(score - score.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y = np.einsum("hij,jhd,chd->ic", p, v, w[f"{a}.o"])
        h = norm(y + h, f"{a}.layer_norm")
        f = f"transformer.layer.{i}.ff"
        y = gelu(h @ w[f"{f}.layer_1.weight"].T + w[f"{f}.layer_1.bias"])
        h = norm(y @ w[f"{f}.layer_2.weight"].T + w[f"{f}.layer_2.bias"] + h, f"{f}.layer_norm")
    assert heads == c["n_head"]
    return h @ w["transformer.word_embedding.weight"].T + w["lm_loss.bias"]


@pytest.mark.parametrize("clamp_len", [-1, 1, 2, 6, 50])
@pytest.mark.parametrize("attn_type", ["bi", "uni"])
def test_against_the_formulas(attn_type: str, clamp_len: int) -> None:
    m = model(attn_type=attn_type, clamp_len=clamp_len)
    for ids in ([7, 8, 9, 10, 3, 4, 7, 12], [6]):
        np.testing.assert_allclose(m([ids]).logits[0], by_formula(m, ids), atol=1e-9)


def test_one_way_attention_sees_nothing_later() -> None:
    m = model(attn_type="uni")
    one, two = m([[7, 8, 9, 10]]).logits, m([[7, 8, 9, 30]]).logits
    np.testing.assert_allclose(one[0, :3], two[0, :3], atol=1e-12)
    assert np.abs(one[0, 3] - two[0, 3]).max() > 1e-3
    # Remembered tokens are seen by all.
    mems = [np.random.default_rng(i).normal(size=(3, 1, 16)) for i in range(2)]
    assert np.abs(m([[7, 8, 9, 10]], mems=mems).logits - one).max() > 1e-3


def test_one_way_training(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 200)
    small = {
        k: v
        for k, v in CONFIG.items()
        if k not in ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
    }
    config = pf.TrainConfig(
        files=[str(text)],
        out=str(tmp_path / "run"),
        objective="plm",
        model={**small, "attn_type": "uni", "clamp_len": 4, "initializer_range": 0.02},
        tokenizer={"kind": "char"},
        seq_len=16,
        batch_size=4,
        max_steps=30,
    )
    run = pf.train(config)
    assert run.train_loss < 3.2
    assert run.model.generate("the c", max_new_tokens=4).texts[0]


@pytest.mark.parametrize("more", [{}, {"clamp_len": 3}])
def test_half_of_the_batch_is_read_backwards(more: dict[str, Any]) -> None:
    plain, mirrored = model(**more), model(bi_data=True, **more)
    text = np.array([[7, 8, 9, 11, 12], [30, 31, 32, 33, 34]])
    types = np.array([[0, 0, 1, 1, 2], [1, 0, 0, 1, 1]])
    labels = np.array([[7, -100, 3, 4, 5], [-100, 6, 7, 8, 9]])
    perm = (np.random.default_rng(1).random((2, 5, 5)) < 0.3).astype(float)

    def turned(x: np.ndarray, axes: tuple[int, ...] = (0,)) -> np.ndarray:
        return np.stack([x[0], np.flip(x[1], axes)])

    want = plain(text, token_type_ids=types, labels=labels, perm_mask=perm)
    given = {"token_type_ids": turned(types), "labels": turned(labels), "perm_mask": turned(perm, (0, 1))}
    got = mirrored(turned(text), **given)
    np.testing.assert_allclose(turned(got.logits), want.logits, atol=1e-10)
    _, grads = plain.loss_and_grads(text, labels, token_type_ids=types, perm_mask=perm)
    _, same = mirrored.loss_and_grads(turned(text), given.pop("labels"), **given)
    for name, gradient in grads.items():
        np.testing.assert_allclose(same[name], gradient, atol=1e-10)
    with pytest.raises(InputError, match="even number"):
        mirrored(text[:1])


def test_refusals() -> None:
    for more in ({"same_length": True, "attn_type": "uni"}, {"attn_type": "sideways"}):
        with pytest.raises(Error, match=next(iter(more))):
            model(**more)


def test_every_order_gives_a_distribution() -> None:
    config = {"model_type": "xlnet", "vocab_size": 4, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12}
    m = pf.Model.from_config({**config, "initializer_range": 0.6}, seed=2, dtype="float64")
    texts = [[1, *rest] for rest in itertools.product(range(4), repeat=3)]
    found = {}
    for order in (None, 0, 1, 2):
        # One at a time: the order of a text is drawn by its number.
        found[order] = np.array([m.score([text], order=order).log_likelihood[0] for text in texts])
        assert np.exp(found[order]).sum() == pytest.approx(1, abs=1e-6)
    assert any(np.abs(found[order] - found[None]).max() > 1e-3 for order in (0, 1, 2))
    prompted = [
        m.score([list(rest)], prompts=[[1, 2]], order=3).log_likelihood[0]
        for rest in itertools.product(range(4), repeat=2)
    ]
    assert np.exp(prompted).sum() == pytest.approx(1, abs=1e-6)
    # Windows of a long text: what an earlier one scored is given.
    long = m.score([[1, 2, 3, 0, 1, 2, 3, 1]], order=1, context=4, stride=2)
    assert long.tokens[0] == 7
    with pytest.raises(Error, match="attn_type 'bi'"):
        pf.Model.from_config({**config, "attn_type": "uni"}).score([texts[0]], order=1)
    with pytest.raises(Error, match="permutation model"):
        pf.Model.from_config({"model_type": "gpt2", "vocab_size": 4, "n_embd": 8, "n_head": 2}).score(
            [[1]], order=1
        )
