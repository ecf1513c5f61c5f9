"""Models learned with prefixes: what reads a prompt reads it both ways, and what follows from left to right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import Error

PROMPT = [7, 8, 9, 10, 11]
KINDS = ("gpt2", "llama", "mistral", "falcon", "gpt_neox", "opt")


def model(kind: str = "gpt2", *, prefix: bool = True, **more: Any) -> pf.Model:
    from pyrformer.models import FAMILIES

    sizes = FAMILIES[kind][0].SIZES
    config: dict[str, Any] = {"model_type": kind, "vocab_size": 30, "initializer_range": 0.4, "init_std": 0.4}
    config |= {sizes["layers"]: 2, sizes["width"]: 16, sizes["heads"]: 2, sizes["positions"]: 32}
    config |= {"prefix_lm": True} if prefix else {}
    config |= (
        {"num_key_value_heads": 1, "intermediate_size": 24, "sliding_window": 3} if kind == "mistral" else {}
    )
    return pf.Model.from_config({**config, **more}, seed=3, dtype="float64")


def logprobs(m: pf.Model, ids: list[int], prefix: int) -> np.ndarray:
    logits = m([ids], prefix=[prefix]).logits[0].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_who_sees_whom() -> None:
    m = model()
    base = m([PROMPT], prefix=[3]).logits[0]
    # Within the prefix the last token matters to the first; behind it, later ones do not.
    for place, reaches in ((2, 0), (3, 3), (4, 4)):
        changed = list(PROMPT)
        changed[place] = 20
        differs = np.abs(m([changed], prefix=[3]).logits[0] - base).max(-1) > 1e-9
        assert differs.tolist() == [i >= reaches for i in range(5)]
    np.testing.assert_array_equal(m([PROMPT], prefix=[1]).logits, m([PROMPT]).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_and_cached_decoding_are_the_whole(kind: str, beams: int) -> None:
    m = model(kind)
    prompts = [PROMPT, PROMPT[:2], [3]]
    out = m.generate(prompts, max_new_tokens=6, num_beams=beams, eos_token_id=None)
    for prompt, new, found in zip(prompts, out.ids, out.token_logprobs, strict=True):
        want = logprobs(m, prompt + new, len(prompt))
        rows = np.arange(len(prompt) - 1, len(prompt) + 5)
        np.testing.assert_allclose(found, want[rows, new], atol=1e-5)
        if beams == 1:
            assert want[rows].argmax(-1).tolist() == new
        causal = logprobs(m, prompt + new, 1)
        assert (np.abs(causal - want)[rows].max() > 1e-6) == (len(prompt) > 1)


def test_drafts_contrast_and_long_texts() -> None:
    m = model()
    greedy = m.generate([PROMPT * 2], max_new_tokens=8, eos_token_id=None).ids
    drafted = m.generate([PROMPT * 2], max_new_tokens=8, eos_token_id=None, prompt_lookup_num_tokens=3).ids
    assisted = m.generate([PROMPT * 2], max_new_tokens=8, eos_token_id=None, assistant_model=model("opt")).ids
    assert greedy == drafted == assisted
    first = m.generate([PROMPT], max_new_tokens=3, eos_token_id=None, penalty_alpha=1e-6, top_k=2)
    assert first.ids == m.generate([PROMPT], max_new_tokens=3, eos_token_id=None).ids
    # Past the positions the newer half is read again, as a prompt; sequences that go on stand beside it.
    text = list(np.arange(20) + 3)
    both = m.generate([text, PROMPT], max_new_tokens=20, eos_token_id=None).ids
    assert both[0] == m.generate([text], max_new_tokens=20, eos_token_id=None).ids[0]
    assert both[1] == m.generate([PROMPT], max_new_tokens=20, eos_token_id=None).ids[0]
    again = (text + both[0][:13])[-16:]
    assert logprobs(m, again, 16)[-1].argmax() == both[0][13]


def test_scores() -> None:
    m, plain = model(), model(prefix=False)
    text = [5, 6, 7, 8]
    want = logprobs(m, PROMPT + text, 5)
    found = m.score([text], prompts=[PROMPT])
    np.testing.assert_allclose(found.token_logprobs[0], want[np.arange(4, 8), text], atol=1e-6)
    causal = logprobs(plain, PROMPT + text, 0)
    found = plain.score([text], prompts=[PROMPT])
    np.testing.assert_allclose(found.token_logprobs[0], causal[np.arange(4, 8), text], atol=1e-6)
    # Of a long text, what a window shares with the one before is its prompt.
    ids = list(np.arange(12) + 3)
    found = m.score([ids], context=8, stride=4)
    whole, later = logprobs(m, ids[:8], 1), logprobs(m, ids[4:], 4)
    together = [*whole[np.arange(7), ids[1:8]], *later[np.arange(3, 7), ids[8:]]]
    np.testing.assert_allclose(found.token_logprobs[0], together, atol=1e-6)
    with pytest.raises(Error, match="one for each"):
        m.score([text], prompts=[])
    pooled = m.embed([PROMPT], pooling="last", normalize=False)[0]
    np.testing.assert_allclose(pooled, m([PROMPT], prefix=[5]).hidden[0, -1], atol=1e-5)


def test_the_objective_is_kept_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 100)
    shared: dict[str, Any] = {
        "files": [str(tmp_path / "t.txt")],
        "max_steps": 2,
        "batch_size": 2,
        "seq_len": 16,
    }
    shared["tokenizer"] = {"kind": "char"}
    small = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    said: list[Any] = []
    config = pf.TrainConfig(**shared, out=str(tmp_path / "a"), objective="prefix", model=small)
    pf.train(config, lambda kind, n: said.append(n.get("what")))
    assert any("read both ways" in str(what) for what in said)
    learned = pf.load(tmp_path / "a")
    assert learned.config["prefix_lm"] is True
    ids = learned.require_tokenizer().encode("the cat").ids
    out = learned.generate("the cat", max_new_tokens=1)
    assert out.token_logprobs[0][0] == pytest.approx(
        logprobs(learned, ids, len(ids))[-1, out.ids[0][0]], abs=1e-5
    )
    config = pf.TrainConfig(**shared, out=str(tmp_path / "b"), objective="ar", init_from=str(tmp_path / "a"))
    pf.train(config)
    assert "prefix_lm" not in pf.load(tmp_path / "b").config
    with pytest.raises(Error, match="read both ways"):
        learned.save(tmp_path / "m.gguf")


def test_refusals() -> None:
    with pytest.raises(Error, match="ALiBi exclude each other"):
        model("falcon", alibi=True)
    with pytest.raises(Error, match="ALiBi exclude each other"):
        model("gpt2", position_embedding_type="alibi")
    with pytest.raises(Error, match=r"prefix must be in 0\.\.5"):
        model()([PROMPT], prefix=[6])
    with pytest.raises(Error, match="autoregressive models only"):
        model("bert", prefix=False)([PROMPT], prefix=[2])


def test_prompts_in_a_cache_of_8_bits() -> None:
    """The program of prompts does not attend over the cache; what it wrote there is rounded, not lost."""
    m = pf.Model.from_config({**model("llama").config, "vocab_size": 30}, seed=3)
    prompts, options = [PROMPT, PROMPT[:2], [3]], {"max_new_tokens": 6, "min_new_tokens": 6}
    floats = m.generate(prompts, **options)
    for _ in range(2):  # The second call finds the cache as the first left it.
        rounded = m.generate(prompts, cache_implementation="quantized", **options)
        for prompt, new, found in zip(prompts, rounded.ids, rounded.token_logprobs, strict=True):
            want = logprobs(m, prompt + new, len(prompt))
            rows = np.arange(len(prompt) - 1, len(prompt) + 5)
            np.testing.assert_allclose(found, want[rows, new], atol=0.05)
    assert floats.ids[0][0] == rounded.ids[0][0]
