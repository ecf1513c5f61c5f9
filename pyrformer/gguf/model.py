"""A model out of a GGUF file: its configuration and its tensors. Architectures: ``layouts.LAYOUTS``."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrformer.errors import FileError
from pyrformer.gguf.blocks import Array
from pyrformer.gguf.file import Gguf
from pyrformer.gguf.layouts import TRANSPOSED, TWO_NORMS, groups_of, interleaved, layout_of, unpermuted


def config_of(file: Gguf) -> dict[str, Any]:
    """The ``config.json`` that a file's metadata describes.

    Raises:
        FileError: the family is unknown, or a field is missing.
    """
    layout, kind = layout_of(file), file.metadata.get("general.architecture")

    def field(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise FileError(f"[gguf] {file.path} lacks {kind}.{name}")
        return value

    if "token_embd.weight" not in file.shapes:
        raise FileError(f"[gguf] {file.path} has no tensor 'token_embd.weight'")
    heads = field("attention.head_count")
    shared: dict[str, Any] = {
        "model_type": layout.model_type,
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
    rope: dict[str, Any]
    if kind in ("falcon", "gptneox", "bert"):
        sizes = {
            **shared,
            "hidden_size": width,
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "max_position_embeddings": field("context_length"),
        }
        eps, inner = field("attention.layer_norm_epsilon"), field("feed_forward_length")
        rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)}
        if kind == "falcon":
            kv = field("attention.head_count_kv", 1)
            norms = 2 if layout is TWO_NORMS else 1
            new = {"new_decoder_architecture": kv > 1 or norms == 2, "num_ln_in_parallel_attn": norms}
            sizes |= {"num_kv_heads": kv, "layer_norm_epsilon": eps, "ffn_hidden_size": inner, **new}
            return {**sizes, "rope_parameters": rope}
        sizes |= {"layer_norm_eps": eps, "intermediate_size": inner}
        if kind == "bert":
            types = file.shapes.get("token_types.weight", (1,))[0]
            return {**sizes, "architectures": ["BertModel"], "type_vocab_size": types}
        turning = field("rope.dimension_count", width // heads)
        return {
            **sizes,
            "rope_parameters": {**rope, "partial_rotary_factor": turning * heads / width},
            "use_parallel_residual": field("use_parallel_residual", True),
            "attention_bias": "blk.0.attn_qkv.bias" in file.shapes,
        }
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)}
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
    layout = layout_of(file)
    found = {}
    for name in file.shapes:
        if name == "rope_freqs.weight":
            continue
        stem, _, last = name.rpartition(".")
        if stem in layout.top:
            found[f"{layout.top[stem]}.{last}"] = name
            continue
        pieces = stem.split(".")
        if len(pieces) != 3 or pieces[0] != "blk" or pieces[2] not in layout.parts:
            raise FileError(f"[gguf] {file.path}: tensor {name!r} is not part of this family")
        found[f"{layout.layers}.{pieces[1]}.{layout.parts[pieces[2]]}.{last}"] = name
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
    if ".query_key_value." in name:
        return interleaved(value, *groups_of(config))
    return value
