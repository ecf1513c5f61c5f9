"""A model into a GGUF file: tensors, sizes, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrformer.errors import InputError
from pyrformer.finetune import merged
from pyrformer.gguf.blocks import Array
from pyrformer.gguf.file import ALIASES, KINDS, write_gguf
from pyrformer.gguf.layouts import (
    LAYOUTS,
    POOLER,
    TRANSPOSED,
    TWO_NORMS,
    WHOLE,
    groups_of,
    permuted,
    separated,
)

if TYPE_CHECKING:
    from pyrformer.model import Model

#: How llama.cpp's names of byte-level BPE split a text: digits one by one, and Hugging Face's split patterns.
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**GPT2_SPLIT, "use_regex": False},
    ]


SPLITS: dict[str, list[dict[str, Any]]] = {
    "default": [GPT2_SPLIT],
    "gpt-2": [GPT2_SPLIT],
    "smollm": [DIGITS, GPT2_SPLIT],
    "llama-bpe": _split(LLAMA3_PATTERN),
    "qwen2": _split(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def save_gguf(model: Model, path: str | Path, dtype: str = "float16") -> None:
    """Writes a model and its tokenizer as GGUF; the file appears whole or not at all.

    Args:
        dtype: "float32", "float16", "bfloat16" or "q8_0", for matrices; vectors are float32 always.

    Raises:
        InputError: the family or its tokenizer cannot be written, or the dtype is unknown.
        FileError: the file cannot be written.
    """
    config, kind = model.config, model.config["model_type"]
    known = {layout.model_type: name for name, layout in LAYOUTS.items()}
    if kind not in known:
        raise InputError(f"[gguf] a {kind} model cannot be written; {', '.join(known)} can")
    dtype = ALIASES.get(dtype, dtype)
    if dtype not in KINDS:
        raise InputError(f"[gguf] dtype must be one of {', '.join(KINDS)}, got {dtype!r}")
    _require_known(model)
    layout = LAYOUTS[known[kind]]
    if kind == "falcon" and any(".ln_attn." in name for name, _ in model.family.named_parameters()):
        layout = TWO_NORMS
    tensors: dict[str, tuple[Array, int]] = {}
    absent = {name: np.zeros(shape, np.float32) for name, shape in model.family.absent_tensors()}
    for name, value in {**merged(model), **absent}.items():
        if name.startswith(POOLER):
            continue
        stored = layout.stored(name)
        if name.endswith(TRANSPOSED):
            value = value.T
        elif kind == "llama" and ".q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        elif kind == "llama" and ".k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        elif ".query_key_value." in name:
            value = separated(value, *groups_of(config))
        whole = value.ndim == 1 or stored.startswith(WHOLE) or (dtype == "q8_0" and value.shape[-1] % 32)
        tensors[stored] = (np.ascontiguousarray(value, np.float32), 0 if whole else KINDS[dtype])
    if kind in ("llama", "qwen2", "qwen3"):
        tensors |= _rope_freqs(model)
    write_gguf(path, {**_described(model, dtype), **_tokenizer_metadata(model)}, tensors)


def _require_known(model: Model) -> None:
    """Raises InputError where llama.cpp's program of a family differs from the configuration."""
    c, kind = model.config, model.config["model_type"]

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"[gguf] a {kind} model with {what} cannot be written")

    require(c.get("prefix_lm") is not True, "prompts that are read both ways")
    own = {"gpt2": ("learned", "sinusoidal"), "bert": ("absolute", "sinusoidal")}.get(kind, ("rope",))
    positions = c.get("position_embedding_type", own[0])
    require(positions in own, f"{positions!r} positions")
    if kind == "falcon":
        require(not c["alibi"] and (c["parallel_attn"] or c["new_decoder_architecture"]), "ALiBi")
        require(not c["bias"], "biases")
    if kind == "bert":
        head = model.family.config.architecture
        require(head == "BertModel", f"the head of {head} (llama.cpp holds BertModel alone)")
    act = c.get("hidden_act", c.get("activation"))
    require(kind not in ("falcon", "gpt_neox", "bert") or act == "gelu", f"the activation {act!r}")
    rope = c.get("rope_parameters", {}).get("rope_type", "default")
    require(kind not in ("falcon", "gpt_neox") or rope == "default", f"{rope!r} rope scaling")


def _rope_freqs(model: Model) -> dict[str, tuple[Array, int]]:
    """Divisors of the rotary frequencies, for the scalings that llama.cpp takes from there."""
    config = model.config
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("llama3", "longrope"):
        return {}
    theta, d = rope["rope_theta"], config["head_dim"]
    plain = theta ** -(np.arange(0, d, 2) / d)
    scaled = model.family.config.rope(1)  # type: ignore[attr-defined]
    if scaled.scale != 1.0:
        raise InputError("[gguf] longrope with an attention factor cannot be written")
    return {"rope_freqs.weight": ((plain / np.array(scaled.inv_freq)).astype(np.float32), 0)}


def _described(model: Model, dtype: str) -> dict[str, Any]:
    c, kind = model.config, model.config["model_type"]
    general = {
        "general.architecture": next(n for n, layout in LAYOUTS.items() if layout.model_type == kind),
        "general.name": kind,
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}[dtype],
    }
    if kind == "gpt2":
        sizes: dict[str, Any] = {
            "context_length": c["n_positions"],
            "embedding_length": c["n_embd"],
            "block_count": c["n_layer"],
            "feed_forward_length": c["n_inner"] or 4 * c["n_embd"],
            "attention.head_count": c["n_head"],
            "attention.layer_norm_epsilon": float(c["layer_norm_epsilon"]),
        }
        return {**general, **{f"gpt2.{k}": v for k, v in sizes.items()}}
    if kind in ("falcon", "gpt_neox", "bert"):
        return {**general, **_other_sizes(model)}
    rope = c["rope_parameters"]
    sizes = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.dimension_count": c["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": c["vocab_size"],
    }
    if rope["rope_type"] in ("linear", "yarn"):
        sizes |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        before = rope.get("original_max_position_embeddings")
        sizes |= {"rope.scaling.original_context_length": before} if before else {}
    elif rope["rope_type"] == "dynamic":
        raise InputError("[gguf] dynamic rope scaling cannot be written")
    return {**general, **{f"{kind}.{k}": v for k, v in sizes.items()}}


def _other_sizes(model: Model) -> dict[str, Any]:
    """The sizes of Falcon, GPT-NeoX and BERT under llama.cpp's keys."""
    c, kind = model.config, model.config["model_type"]
    sizes: dict[str, Any] = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["ffn_hidden_size" if kind == "falcon" else "intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.layer_norm_epsilon": float(
            c["layer_norm_epsilon" if kind == "falcon" else "layer_norm_eps"]
        ),
    }
    if kind == "bert":
        kinds = {"mean": 1, "cls": 2, "last": 3}
        pooling = kinds.get(model.pooling.get("pooling", "mean"), 1)
        more = {"tokenizer.ggml.token_type_count": c["type_vocab_size"]}
        sizes |= {"attention.causal": False, "pooling_type": pooling}
        return {**{f"bert.{k}": v for k, v in sizes.items()}, **more}
    rope = c["rope_parameters"]
    sizes["rope.freq_base"] = float(rope["rope_theta"])
    if kind == "falcon":
        sizes |= {"attention.head_count_kv": groups_of(c)[1], "tensor_data_layout": "jploski"}
        return {f"falcon.{k}": v for k, v in sizes.items()}
    head = c["hidden_size"] // c["num_attention_heads"]
    sizes["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    sizes["use_parallel_residual"] = c["use_parallel_residual"]
    return {f"gptneox.{k}": v for k, v in sizes.items()}


def _word_pieces(model: Model, raw: dict[str, Any]) -> dict[str, Any]:
    """WordPiece as llama.cpp has it: starts of words are marked, not what follows within them."""
    tokenizer, size = model.require_tokenizer(), model.family.config.vocab_size
    normalizer = raw.get("normalizer") or {}
    if raw["model"].get("type") != "WordPiece" or not normalizer.get("lowercase"):
        raise InputError("[gguf] only WordPiece tokenizers that lowercase can be written with BERT")
    special = {token["id"]: token["content"] for token in raw["added_tokens"] if token["special"]}
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, i in raw["model"]["vocab"].items():
        tokens[i], types[i] = token[2:] if token.startswith("##") else f"▁{token}", 1
    for i, token in special.items():
        tokens[i], types[i] = token, 3
    cls, sep, pad, mask = tokenizer.masking_ids()
    unknown = raw["model"]["vocab"][raw["model"]["unk_token"]]
    ids = {
        "bos": cls,
        "cls": cls,
        "eos": sep,
        "seperator": sep,
        "unknown": unknown,
        "padding": pad,
        "mask": mask,
    }
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()},
    }


def _tokenizer_metadata(model: Model) -> dict[str, Any]:
    """Byte-level BPE, or BERT's WordPiece, as llama.cpp has it; nothing without a tokenizer."""
    if model.tokenizer is None:
        return {}
    raw = json.loads(model.tokenizer.to_json())
    if model.config["model_type"] == "bert":
        return _word_pieces(model, raw)
    bpe = raw["model"]
    splits = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or [raw.get("pre_tokenizer")]
    names = [name for name, parts in SPLITS.items() if _same(parts, splits)]
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or not names:
        raise InputError("[gguf] only byte-level BPE tokenizers with a known split can be written")
    size = model.family.config.vocab_size
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, i in bpe["vocab"].items():
        tokens[i], types[i] = token, 1
    for token in raw["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], 3 if token["special"] else 4
    pairs = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    c = model.family.config
    ids = {"bos": c.bos_token_id, "eos": c.eos_token_id, "padding": c.pad_token_id}
    known = {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items() if isinstance(v, int)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[-1] if names[-1] != "default" else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": pairs,
        "tokenizer.ggml.add_bos_token": model.tokenizer.encode("").ids[:1] == [c.bos_token_id],
        **known,
    }


def _same(ours: list[dict[str, Any]], theirs: list[dict[str, Any] | None]) -> bool:
    """Whether two lists of splits cut alike; where offsets are trimmed does not matter."""

    def core(part: dict[str, Any] | None) -> dict[str, Any]:
        return {k: v for k, v in (part or {}).items() if k != "trim_offsets"}

    return [core(p) for p in ours] == [core(p) for p in theirs]
