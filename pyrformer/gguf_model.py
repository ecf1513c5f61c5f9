"""A model out of a GGUF file and into one: its configuration and its tensors.

Families: llama (Mistral too), qwen2, qwen3, gpt2. In files of LLaMA the rows of q and k lie in llama.cpp's order, whose
rotation turns neighbouring pairs; here they lie in halves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrformer.errors import FileError, InputError
from pyrformer.finetune import merged
from pyrformer.gguf import ALIASES, KINDS, Array, Gguf, write_gguf

if TYPE_CHECKING:
    from pyrformer.model import Model

#: Names of a block's parts → those of Hugging Face's LLaMA.
LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
#: Layers that GPT-2 stores transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def config_of(file: Gguf) -> dict[str, Any]:
    """The ``config.json`` that a file's metadata describes.

    Raises:
        FileError: the family is unknown, or a field is missing.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise FileError(
            f"[gguf] {file.path} holds a {kind!r} model; llama, qwen2, qwen3 and gpt2 can be read"
        )

    def field(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise FileError(f"[gguf] {file.path} lacks {kind}.{name}")
        return value

    if "token_embd.weight" not in file.shapes:
        raise FileError(f"[gguf] {file.path} has no tensor 'token_embd.weight'")
    heads = field("attention.head_count")
    shared: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": file.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if kind == "gpt2":
        return {
            **shared,
            "n_positions": field("context_length"),
            "n_embd": field("embedding_length"),
            "n_layer": field("block_count"),
            "n_head": heads,
            "n_inner": field("feed_forward_length"),
            "layer_norm_epsilon": field("attention.layer_norm_epsilon"),
        }
    width = field("embedding_length")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)}
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": field("rope.scaling.factor")}
        before = file.metadata.get(f"{kind}.rope.scaling.original_context_length")
        rope |= {"original_max_position_embeddings": before} if before else {}
    elif scaling != "none":
        raise FileError(f"[gguf] {file.path}: unknown rope scaling {scaling!r}")
    if "rope_freqs.weight" in file.shapes:
        # Divisors of the frequencies, as LongRoPE has them at every length.
        factors = [float(f) for f in file.tensor("rope_freqs.weight")]
        rope |= {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }
    return {
        **shared,
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": file.metadata.get(f"{kind}.attention.key_length", width // heads),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }


def tensor_names(file: Gguf) -> dict[str, str]:
    """Hugging Face's name of each tensor → the file's.

    Raises:
        FileError: a tensor is not part of the family.
    """
    gpt2 = file.metadata.get("general.architecture") == "gpt2"
    top, parts, layers = (GPT2_TOP, GPT2, "transformer.h") if gpt2 else (LLAMA_TOP, LLAMA, "model.layers")
    found = {}
    for name in file.shapes:
        if name == "rope_freqs.weight":
            continue
        stem, _, last = name.rpartition(".")
        if stem in top:
            found[f"{top[stem]}.{last}"] = name
            continue
        pieces = stem.split(".")
        if len(pieces) != 3 or pieces[0] != "blk" or pieces[2] not in parts:
            raise FileError(f"[gguf] {file.path}: tensor {name!r} is not part of this family")
        found[f"{layers}.{pieces[1]}.{parts[pieces[2]]}.{last}"] = name
    return found


def tensor_of(file: Gguf, name: str, stored: str, config: dict[str, Any]) -> Array:
    """A tensor as Hugging Face has it, float32."""
    value = file.tensor(stored)
    if name.endswith(TRANSPOSED):
        return np.ascontiguousarray(value.T)
    if config["model_type"] == "llama" and ".q_proj." in name:
        return unpermuted(value, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".k_proj." in name:
        return unpermuted(value, config["num_key_value_heads"])
    return value


def unpermuted(value: Array, heads: int) -> Array:
    """Rows of q or k ``[H·D, C]`` from pairs of neighbours into halves."""
    rows = value.shape[0]
    if rows % (2 * heads):
        raise FileError(f"[gguf] {rows} rows of q or k do not divide into {heads} heads")
    pairs = value.reshape(heads, rows // heads // 2, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)


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


# -- Writing ----------------------------------------------------------------------------------------------------------


def save_gguf(model: Model, path: str | Path, dtype: str = "float16") -> None:
    """Writes a model and its tokenizer as GGUF; the file appears whole or not at all.

    Args:
        dtype: "float32", "float16", "bfloat16" or "q8_0", for matrices; vectors are float32 always.

    Raises:
        InputError: the family or its tokenizer cannot be written, or the dtype is unknown.
        FileError: the file cannot be written.
    """
    kind = model.config["model_type"]
    if kind not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise InputError(f"[gguf] a {kind} model cannot be written; llama, qwen2, qwen3 and gpt2 can")
    dtype = ALIASES.get(dtype, dtype)
    if dtype not in KINDS:
        raise InputError(f"[gguf] dtype must be one of {', '.join(KINDS)}, got {dtype!r}")
    gpt2 = kind == "gpt2"
    positions = model.config["position_embedding_type"]
    if positions not in (("learned", "sinusoidal") if gpt2 else ("rope",)):
        raise InputError(f"[gguf] a {kind} model with {positions!r} positions cannot be written")
    top, parts, layers = (GPT2_TOP, GPT2, "transformer.h.") if gpt2 else (LLAMA_TOP, LLAMA, "model.layers.")
    top_back, parts_back = {v: k for k, v in top.items()}, {v: k for k, v in parts.items()}
    config, tensors = model.config, {}
    absent = {name: np.zeros(shape, np.float32) for name, shape in model.family.absent_tensors()}
    for name, value in {**merged(model), **absent}.items():
        stem, _, last = name.rpartition(".")
        if stem in top_back:
            stored = f"{top_back[stem]}.{last}"
        else:
            number, _, part = stem.removeprefix(layers).partition(".")
            stored = f"blk.{number}.{parts_back[part]}.{last}"
        if name.endswith(TRANSPOSED):
            value = value.T
        elif kind == "llama" and ".q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        elif kind == "llama" and ".k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        whole = value.ndim == 1 or (dtype == "q8_0" and value.shape[-1] % 32)
        tensors[stored] = (np.ascontiguousarray(value, np.float32), 0 if whole else KINDS[dtype])
    if not gpt2:
        tensors |= _rope_freqs(model)
    write_gguf(path, {**_described(model, dtype), **_tokenizer_metadata(model)}, tensors)


def permuted(value: Array, heads: int) -> Array:
    """Rows of q or k ``[H·D, C]`` from halves into pairs of neighbours."""
    rows = value.shape[0]
    halves = value.reshape(heads, 2, rows // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)


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
        "general.architecture": kind,
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


def _tokenizer_metadata(model: Model) -> dict[str, Any]:
    """Byte-level BPE as llama.cpp has it; nothing without a tokenizer."""
    if model.tokenizer is None:
        return {}
    raw = json.loads(model.tokenizer.to_json())
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
