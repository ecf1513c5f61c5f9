"""Recipes of runs of a few milliseconds a step, for all tests here."""

from __future__ import annotations

import json
from pathlib import Path
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
XLNET = {"model_type": "xlnet", "n_layer": 1, "d_model": 16, "n_head": 2, "d_inner": 32}
WORDPIECE = {"preset": "bert-uncased", "vocab_size": 80}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ar": {"model": GPT2, "tokenizer": {"kind": "char"}},
    "prefix": {"model": GPT2, "tokenizer": {"kind": "char"}},
    "mlm": {"model": BERT, "tokenizer": WORDPIECE},
    "mlm+nsp": {"model": BERT, "tokenizer": WORDPIECE},
    "plm": {"model": XLNET, "tokenizer": {"preset": "xlnet", "vocab_size": 60}},
    "sentence": {"model": BERT, "tokenizer": WORDPIECE},
    "tokens": {"model": BERT, "tokenizer": WORDPIECE},
}
OBJECTIVES = {name: {"objective": name, **recipe} for name, recipe in OBJECTIVES.items()}
#: A run of twelve updates, each of them logged.
SMALL = {"seq_len": 16, "batch_size": 4, "max_steps": 12, "warmup_steps": 1, "log_every": 1}


def write_text(folder: Path, objective: str) -> Path:
    """A file to learn from, of the kind that an objective reads."""
    sentences = TEXT.split(". ")
    if objective in ("sentence", "tokens"):
        rows = [
            {"text": s, "label": "ab"[i % 2]}
            if objective == "sentence"
            else {"tokens": s.split(), "tags": ["B-X" if w in ("cat", "dog") else "O" for w in s.split()]}
            for i, s in enumerate(sentences)
            if s
        ]
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    path = folder / "text.txt"
    parts = ["The cat sat. The dog lay by the door. One cat ran.\n\n" * 20] if "nsp" in objective else [TEXT]
    path.write_text("".join(parts), encoding="utf-8")
    return path
