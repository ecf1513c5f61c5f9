"""Every family against transformers itself, on tiny models of unusual configurations: logits, loss and every gradient,
without padding, padded on either side, with a row of nothing but padding, and of one token.

Needs torch and transformers, which nothing else here does; skipped where they are absent. Tolerances as in
``test_reference.py``.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

GPT2 = {"vocab_size": 37, "n_positions": 19, "n_embd": 20, "n_layer": 2, "n_head": 5}
BERT = {
    "vocab_size": 41,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 13,
    "max_position_embeddings": 19,
}
DISTIL = {"vocab_size": 41, "dim": 20, "n_layers": 2, "n_heads": 5, "hidden_dim": 13}
DISTIL = {**DISTIL, "max_position_embeddings": 17}
MODERN = {**BERT, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
MODERN = {**MODERN, "sep_token_id": 2, "local_attention": 6, "num_hidden_layers": 4}
LLAMA = {
    "vocab_size": 43,
    "hidden_size": 24,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 6,
}
NEOX = {
    "vocab_size": 43,
    "hidden_size": 24,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}
OPT = {
    "vocab_size": 43,
    "hidden_size": 20,
    "ffn_dim": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 21,
}
FALCON = {
    "vocab_size": 43,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}
XLNET = {"vocab_size": 43, "d_model": 20, "n_layer": 2, "n_head": 5, "d_inner": 13}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0]}
ROPES = {
    "linear": rope("linear", factor=3.0),
    "dynamic": rope("dynamic", factor=2.5) | {"max_position_embeddings": 8},
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=8),
    "yarn_all": rope(
        "yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5, truncate=False
    ),
    "yarn_mscale": rope(
        "yarn", factor=4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.4
    ),
    "yarn_attention_factor": rope(
        "yarn", factor=4.0, original_max_position_embeddings=8, attention_factor=0.8
    ),
    "llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    "longrope_long": rope("longrope", original_max_position_embeddings=8, factor=4.0, **LONG),
    "longrope_short": rope("longrope", original_max_position_embeddings=16, factor=2.0, **LONG),
    "longrope_scale": rope("longrope", original_max_position_embeddings=8, attention_factor=1.3, **LONG),
    "partial": rope("default", partial_rotary_factor=0.67),
}
KNOWN = ("relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "tanh", "sigmoid")
KNOWN += ("swish", "gelu_fast", "gelu_python", "mish")
UNKNOWN = ("leaky_relu", "relu6", "linear", "gelu_10")

CASES: dict[str, tuple[str, dict[str, Any]]] = {}


def add(architecture: str, base: dict[str, Any], **variants: dict[str, Any]) -> None:
    for name, change in variants.items():
        CASES[f"{architecture}-{name}"] = (architecture, {**base, **change})


def acts(key: str, names: tuple[str, ...] = ("silu", "relu6")) -> dict[str, dict[str, Any]]:
    return {f"act_{act}": {key: act} for act in names}


add(
    "GPT2LMHeadModel",
    GPT2,
    plain={},
    untied={"tie_word_embeddings": False},
    one_layer={"n_layer": 1, "n_inner": 7},
    unscaled={"scale_attn_weights": False},
    inverse={"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    upcast={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    epsilon={"layer_norm_epsilon": 0.1},
    pad={"pad_token_id": 5},
    **acts("activation_function", KNOWN + UNKNOWN),
)
for head in ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "Model"):
    add(
        f"Bert{head}",
        BERT,
        plain={},
        types={"type_vocab_size": 5, "pad_token_id": 7, "layer_norm_eps": 0.1},
        labels={"num_labels": 7},
    )
    if head != "ForPreTraining":
        add(
            f"Roberta{head}",
            BERT,
            plain={},
            types={"type_vocab_size": 1, "pad_token_id": 4, "layer_norm_eps": 0.1},
            labels={"num_labels": 7},
        )
        add(
            f"DistilBert{head}",
            DISTIL,
            plain={},
            sinusoids={"sinusoidal_pos_embds": True},
            labels={"num_labels": 7},
        )
        add(
            f"ModernBert{head}",
            MODERN,
            plain={},
            labels={"num_labels": 7, "classifier_bias": True, "classifier_activation": "relu"},
            mean={"classifier_pooling": "mean"},
        )
for head in ("BertForMaskedLM", "RobertaForMaskedLM"):
    add(head, BERT, untied={"tie_word_embeddings": False}, one_layer={"num_hidden_layers": 1})
    add(head, BERT, decoder={"is_decoder": True}, **acts("hidden_act"))
add("DistilBertForMaskedLM", DISTIL, untied={"tie_word_embeddings": False}, **acts("activation"))
FULL, SLIDING = "full_attention", "sliding_attention"
add(
    "ModernBertForMaskedLM",
    MODERN,
    untied={"tie_word_embeddings": False},
    biases={"norm_bias": True, "attention_bias": True, "mlp_bias": True, "norm_eps": 0.1},
    no_decoder_bias={"decoder_bias": False},
    layers={"layer_types": [SLIDING, SLIDING, FULL, FULL]},
    one_kind={"layer_types": [SLIDING] * 4},
    every={"global_attn_every_n_layers": 2},
    odd_window={"local_attention": 5},
    narrow={"local_attention": 1},
    head_act={"classifier_activation": "relu"},
    classifier_bias={"classifier_bias": True},
    thetas={
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
            SLIDING: {"rope_type": "default", "rope_theta": 20.0},
        }
    },
    **acts("hidden_activation"),
)
SLIDES = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_hidden_layers": 3}
for model in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    add(
        f"{model}ForCausalLM",
        LLAMA,
        plain={},
        tied={"tie_word_embeddings": True},
        epsilon={"rms_norm_eps": 0.1},
        gqa4={"num_key_value_heads": 1, "num_attention_heads": 4, "num_hidden_layers": 1},
        heads={"num_key_value_heads": 8},
        **ROPES,
    )
add(
    "LlamaForCausalLM",
    LLAMA,
    biases={"attention_bias": True, "mlp_bias": True},
    derived={"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": None},
    pretraining_tp={"pretraining_tp": 2},
    **acts("hidden_act"),
)
add("MistralForCausalLM", LLAMA, window={"sliding_window": 3}, no_window={"sliding_window": None})
add("MistralForCausalLM", LLAMA, one={"sliding_window": 1}, derived={"head_dim": None, "hidden_size": 48})
for model in ("Qwen2", "Qwen3"):
    add(
        f"{model}ForCausalLM",
        LLAMA,
        slides=SLIDES,
        layers={"use_sliding_window": True, "sliding_window": 2, "layer_types": [SLIDING, FULL]},
    )
add("Qwen3ForCausalLM", LLAMA, biases={"attention_bias": True})
add(
    "GPTNeoXForCausalLM",
    NEOX,
    plain={},
    serial={"use_parallel_residual": False},
    no_bias={"attention_bias": False},
    tied={"tie_word_embeddings": True},
    epsilon={"layer_norm_eps": 0.1},
    whole=rope("default", partial_rotary_factor=1.0),
    half=rope("linear", partial_rotary_factor=0.5, factor=2.0),
    dynamic=rope("dynamic", partial_rotary_factor=1.0, factor=2.0) | {"max_position_embeddings": 8},
    **acts("hidden_act"),
)
add(
    "OPTForCausalLM",
    OPT,
    plain={},
    after={"do_layer_norm_before": False},
    narrow={"word_embed_proj_dim": 6},
    narrow_after={"word_embed_proj_dim": 6, "do_layer_norm_before": False},
    wide={"word_embed_proj_dim": 30},
    untied={"tie_word_embeddings": False},
    no_bias={"enable_bias": False},
    not_affine={"layer_norm_elementwise_affine": False},
    no_final={"_remove_final_layer_norm": True},
    pad={"pad_token_id": 3},
    **acts("activation_function"),
)
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
add(
    "FalconForCausalLM",
    FALCON,
    plain={},
    forty=NEW,
    forty_one_norm={**NEW, "num_ln_in_parallel_attn": 1},
    forty_two_norms={**NEW, "num_ln_in_parallel_attn": 2},
    forty_alibi={**NEW, "alibi": True},
    forty_bias={**NEW, "bias": True, "ffn_hidden_size": 11},
    forty_one_head={**NEW, "num_kv_heads": 1},
    forty_no_kv={"new_decoder_architecture": True},
    rw=RW,
    rw_rope={**RW, "alibi": False},
    rw_multi_query={**RW, "multi_query": True},
    serial={"parallel_attn": False},
    multi_head={"multi_query": False},
    multi_head_kv={"multi_query": False, "num_kv_heads": 6},
    seven_alibi={"alibi": True},
    untied={"tie_word_embeddings": False},
    epsilon={"layer_norm_epsilon": 0.1},
    ffn={"ffn_hidden_size": 9},
    theta=rope("default"),
    dynamic=rope("dynamic", factor=2.0) | {"max_position_embeddings": 8},
    **acts("activation"),
)
add(
    "XLNetLMHeadModel",
    XLNET,
    plain={},
    uni={"attn_type": "uni"},
    clamp={"clamp_len": 3},
    untied={"tie_word_embeddings": False},
    one_layer={"n_layer": 1, "layer_norm_eps": 0.1},
    bi_data={"bi_data": True},
    bi_data_clamp={"bi_data": True, "clamp_len": 2},
    bi_data_uni={"bi_data": True, "attn_type": "uni"},
    same_length={"same_length": True, "mem_len": 4},
    mem_len={"mem_len": 4, "use_mems_eval": True},
    d_head={"d_head": 4},
    **acts("ff_activation"),
)

#: Configurations that are refused, and what the message names.
REFUSED = {
    **{name: "must be one of gelu" for name in CASES if name.endswith(tuple(f"act_{a}" for a in UNKNOWN))},
    **{name: "partial_rotary_factor" for name in CASES if name.endswith("ForCausalLM-partial")},
    **{name: "is_decoder" for name in CASES if name.endswith("-decoder")},
}


def made(architecture: str, options: dict[str, Any], folder: Path) -> Any:
    """A model with large random weights, saved to a folder."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**options)
    library = "sdpa" if getattr(config, "alibi", False) else "eager"
    torch.manual_seed(zlib.crc32(repr((architecture, options)).encode()))
    model = model_class._from_config(config, attn_implementation=library).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name.lower() or ".ln_" in name
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if norm and name.endswith("weight") else 0.0))
    model.save_pretrained(folder)
    return model


def inputs(architecture: str, model: Any, kind: str) -> dict[str, np.ndarray]:
    """A batch, padded as ``kind`` says."""
    config = model.config
    rng = np.random.default_rng(5)
    b, t = (2, 1) if kind == "one" else (4, 12)
    ids = rng.integers(8, config.vocab_size, (b, t))
    mask = np.ones((b, t), int)
    if kind in ("right", "empty"):
        mask[1, 7:], mask[2, 1:] = 0, 0
    if kind == "left":
        mask[1, :7], mask[2, :-1] = 0, 0
    if kind == "empty":
        mask[3] = 0
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids = np.where(mask, ids, pad)
    given = {"input_ids": ids}
    if kind not in ("none", "one"):
        given["attention_mask"] = mask
    if architecture.startswith(("Bert", "Roberta")):
        given["token_type_ids"] = rng.integers(0, config.type_vocab_size, (b, t))
    if architecture.startswith("XLNet"):
        given["token_type_ids"] = rng.integers(0, 3, (b, t))
    if architecture.endswith("SequenceClassification"):
        given["labels"] = rng.integers(0, config.num_labels, b)
        given["labels"][mask[:, 0] == 0] = -100
    elif not architecture.endswith("Model") or architecture == "XLNetLMHeadModel" or "GPT2" in architecture:
        classes = config.num_labels if architecture.endswith("TokenClassification") else config.vocab_size
        causal = "Causal" in architecture or "GPT2" in architecture
        wanted = ids if causal else rng.integers(0, classes, (b, t))
        given["labels"] = np.where((mask == 1) & (rng.random((b, t)) < 0.7), wanted, -100)
        given["labels"][0, -1] = wanted[0, -1]
        if causal:
            # What padding would predict: the library's gradient passes through scores that are all masked.
            given["labels"][:, 1:][mask[:, :-1] == 0] = -100
        if "PreTraining" in architecture:
            given["next_sentence_label"] = np.where(mask[:, 0] == 1, rng.integers(0, 2, b), -100)
    return given


def close(got: Any, want: Any, what: str) -> None:
    want = want.detach().numpy() if hasattr(want, "detach") else want
    bound = 1e-4 * np.abs(want) + 1e-5 * max(1.0, np.abs(want).max(initial=0))
    assert got.shape == want.shape, f"{what}: {got.shape} against {want.shape}"
    worst = (np.abs(got - want) / bound).max(initial=0)
    assert worst <= 1.0, f"{what}: {worst:.1f} times the tolerance"


def compare(ours: pf.Model, theirs: Any, given: dict[str, np.ndarray]) -> None:
    """Logits, loss and gradients of both."""
    causal = ours.family.objective == "ar"
    theirs.zero_grad()
    tensors = {k: torch.tensor(v) for k, v in given.items()}
    want = theirs(**tensors, **({"use_cache": False} if causal else {}))
    got = ours(**given)
    real = given.get("attention_mask", np.ones_like(given["input_ids"])).astype(bool)
    logits = want.get("prediction_logits", want.get("logits"))
    assert np.isfinite(got.hidden).all()
    if logits is None:
        close(got.hidden[real], want.last_hidden_state.detach().numpy()[real], "hidden")
        return
    per_token = logits.ndim == 3
    rows = real if per_token else real[:, 0]
    close(got.logits[rows], logits.detach().numpy()[rows], "logits")
    if "seq_relationship_logits" in want:
        rows = real[:, 0]
        close(
            got.seq_relationship_logits[rows],
            want.seq_relationship_logits.detach().numpy()[rows],
            "seq_relationship_logits",
        )
    if want.loss is None or not torch.isfinite(want.loss):
        return
    assert got.loss == pytest.approx(want.loss.item(), rel=1e-5)
    want.loss.backward()
    loss, grads = ours.loss_and_grads(**given)
    assert loss == pytest.approx(want.loss.item(), rel=1e-5)
    wanted = {
        ours.family.rename(name) or name: p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.grad is not None
        # Sinusoids stay as they are.
        and not ("position_embeddings" in name and ours.config.get("sinusoidal_pos_embds"))
    }
    zero = {name for name, g in grads.items() if name not in wanted and not g.any()}
    assert grads.keys() - zero == wanted.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    for name, gradient in wanted.items():
        error = np.abs(grads[name] - gradient).max()
        assert error <= 1e-3 * np.abs(gradient).max() + 1e-6 * largest, name


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    architecture, options = CASES[name]
    theirs = made(architecture, options, tmp_path)
    if name in REFUSED:
        with pytest.raises(pf.errors.ConfigError, match=REFUSED[name]):
            pf.load(tmp_path)
        return
    ours = pf.load(tmp_path)
    # The library refuses masks beside "uni".
    kinds = (
        ("none", "one") if options.get("attn_type") == "uni" else ("none", "right", "left", "empty", "one")
    )
    if architecture.endswith("ForSequenceClassification") and options.get("classifier_pooling") == "mean":
        # Theirs divides by the number of tokens, which is 0.
        kinds = tuple(kind for kind in kinds if kind != "empty")
    for kind in kinds:
        try:
            compare(ours, theirs, inputs(architecture, theirs, kind))
        except Exception as e:
            raise AssertionError(f"{kind}: {type(e).__name__}: {e}") from e
    # What we write, transformers opens to the same weights.
    ours.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    again, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    unused = dict(ours.family.absent_tensors())
    for key, value in theirs.state_dict().items():
        if key in unused:
            continue
        assert torch.equal(value, again.state_dict()[key]), key
