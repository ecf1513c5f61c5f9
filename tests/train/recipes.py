"""Recipes of runs of a few milliseconds a step, for all tests here."""

from __future__ import annotations

from typing import Any

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 60
#: Dropout is on, so that its draws are compared too.
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ar": {"objective": "ar", "model": GPT2, "tokenizer": {"kind": "char"}},
    "mlm": {"objective": "mlm", "model": BERT, "tokenizer": {"preset": "bert-uncased", "vocab_size": 80}},
}
#: A run of twelve updates, each of them logged.
SMALL = {"seq_len": 16, "batch_size": 4, "max_steps": 12, "warmup_steps": 1, "log_every": 1}
