"""How llama.cpp's architectures name and order what the families hold.

In files of LLaMA the rows of q and k lie in llama.cpp's order, whose rotation turns neighbouring pairs; in models they
lie in halves. In files of Falcon and GPT-NeoX all q come first, then k, then v; in models they are
interleaved. Of BERT llama.cpp has what makes vectors: no pooler, no head.

Source: llama.cpp's ``gguf-py/gguf/tensor_mapping.py`` and ``constants.py`` for the names, its converters for the order
of rows. Letters: H query heads, K key-value heads, D head width, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrformer.errors import FileError
from pyrformer.gguf.blocks import Array
from pyrformer.gguf.file import Gguf


@dataclass(frozen=True)
class Layout:
    """How an architecture of llama.cpp names what a family holds.

    Attributes:
        model_type: the family.
        top: names outside the blocks → Hugging Face's.
        layers: what stands before a block's number in Hugging Face's names.
        parts: names of a block's parts → Hugging Face's.
    """

    model_type: str
    top: dict[str, str]
    layers: str
    parts: dict[str, str]

    def stored(self, name: str) -> str:
        """The file's name of one of Hugging Face's."""
        stem, _, last = name.rpartition(".")
        for theirs, ours in self.top.items():
            if ours == stem:
                return f"{theirs}.{last}"
        number, _, part = stem.removeprefix(f"{self.layers}.").partition(".")
        return f"blk.{number}.{next(k for k, v in self.parts.items() if v == part)}.{last}"


_LLAMA = {
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
_LLAMA_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_FALCON = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_TOP = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_TOP = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "lm_head",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_BERT_TOP = {
    "token_embd": "bert.embeddings.word_embeddings",
    "position_embd": "bert.embeddings.position_embeddings",
    "token_types": "bert.embeddings.token_type_embeddings",
    "token_embd_norm": "bert.embeddings.LayerNorm",
}
#: llama.cpp's architectures.
LAYOUTS = {
    "llama": Layout("llama", _LLAMA_TOP, "model.layers", _LLAMA),
    "qwen2": Layout("qwen2", _LLAMA_TOP, "model.layers", _LLAMA),
    "qwen3": Layout("qwen3", _LLAMA_TOP, "model.layers", _LLAMA),
    "gpt2": Layout("gpt2", _GPT2_TOP, "transformer.h", _GPT2),
    "falcon": Layout("falcon", _FALCON_TOP, "transformer.h", {"attn_norm": "input_layernorm", **_FALCON}),
    "gptneox": Layout("gpt_neox", _NEOX_TOP, "gpt_neox.layers", _NEOX),
    "bert": Layout("bert", _BERT_TOP, "bert.encoder.layer", _BERT),
}
#: Falcon 40B: attention and MLP have a norm each.
TWO_NORMS = Layout(
    "falcon",
    _FALCON_TOP,
    "transformer.h",
    {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn", **_FALCON},
)
#: Layers that GPT-2 stores transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
#: What llama.cpp's BERT does without: zeros take its place.
POOLER = "bert.pooler."
#: llama.cpp keeps these in float32.
WHOLE = ("position_embd.", "token_types.")


def layout_of(file: Gguf) -> Layout:
    """The layout of a file.

    Raises:
        FileError: the family is unknown.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in LAYOUTS:
        raise FileError(f"[gguf] {file.path} holds a {kind!r} model; {', '.join(LAYOUTS)} can be read")
    if "blk.0.attn_norm_2.weight" in file.shapes and kind == "falcon":
        return TWO_NORMS
    return LAYOUTS[str(kind)]


def groups_of(config: dict[str, Any]) -> tuple[int, int]:
    """Query heads and key-value heads of a fused q, k and v."""
    heads = config["num_attention_heads"]
    if config["model_type"] == "gpt_neox":
        return heads, heads
    if config.get("multi_query", True) and not config["new_decoder_architecture"]:
        return heads, 1
    return heads, config["num_kv_heads"] or heads


def interleaved(value: Array, heads: int, groups: int) -> Array:
    """Rows ``[(H + 2·K)·D, ..]`` of all q, then k, then v into K groups of q … q, k, v."""
    if value.shape[0] % (heads + 2 * groups):
        raise FileError(f"[gguf] {value.shape[0]} rows of q, k and v do not divide into {heads} heads")
    d = value.shape[0] // (heads + 2 * groups)
    q, k, v = np.split(value, [heads * d, (heads + groups) * d])
    parts = [part.reshape(groups, -1, *value.shape[1:]) for part in (q, k, v)]
    return np.ascontiguousarray(np.concatenate(parts, axis=1)).reshape(value.shape)


def separated(value: Array, heads: int, groups: int) -> Array:
    """The reverse of :func:`interleaved`."""
    each = heads // groups
    d = value.shape[0] // (heads + 2 * groups)
    grouped = value.reshape(groups, (each + 2) * d, *value.shape[1:])
    parts = np.split(grouped, [each * d, (each + 1) * d], axis=1)
    return np.concatenate([part.reshape(-1, *value.shape[1:]) for part in parts])


def unpermuted(value: Array, heads: int) -> Array:
    """Rows of q or k ``[H·D, C]`` from pairs of neighbours into halves."""
    rows = value.shape[0]
    if rows % (2 * heads):
        raise FileError(f"[gguf] {rows} rows of q or k do not divide into {heads} heads")
    pairs = value.reshape(heads, rows // heads // 2, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)


def permuted(value: Array, heads: int) -> Array:
    """Rows of q or k ``[H·D, C]`` from halves into pairs of neighbours."""
    rows = value.shape[0]
    halves = value.reshape(heads, 2, rows // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
