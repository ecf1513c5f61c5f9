"""The options of a generation as an object that reads and writes ``generation_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyrformer.errors import FileError, InputError
from pyrformer.fields import parse_json

# fmt: off
#: What a stored ``generation_config.json`` may say about a search; its other keys concern other libraries.
STORED = frozenset([
    "max_new_tokens", "max_length", "min_length", "min_new_tokens", "do_sample", "num_beams", "num_beam_groups",
    "diversity_penalty", "patience", "stochastic_beams", "force_words_ids", "ordered_constraints",
    "penalty_alpha", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens",
    "num_return_sequences", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "early_stopping",
    "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "eos_token_id",
    "stop_strings", "max_time",
])
# fmt: on
#: Options of one call only, which no file holds besides.
NAMES = STORED | {"seed", "min_tokens_to_keep", "cache_implementation"}


class GenerationConfig:
    """Options of a generation under Hugging Face's names; those left out have their defaults.

    Attributes:
        options: what was set.

    Raises:
        InputError: there is no option of a name.
    """

    def __init__(self, **options: Any):
        unknown = options.keys() - NAMES
        if unknown:
            raise InputError(f"[GenerationConfig] unknown option {min(unknown)!r}")
        self.options = options

    @classmethod
    def load(cls, path: str | Path) -> GenerationConfig:
        """Reads ``generation_config.json``, or that of a folder; keys of other libraries are passed over.

        Raises:
            FileError: there is no such file, or it is not a JSON object.
        """
        path = Path(path)
        path = path / "generation_config.json" if path.is_dir() else path
        try:
            stored = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise FileError(f"[GenerationConfig] {path} cannot be read: {e}") from e
        if not isinstance(stored, dict):
            raise FileError(f"[GenerationConfig] {path} holds no JSON object")
        return cls(**{k: v for k, v in stored.items() if k in NAMES and v is not None})

    def save(self, path: str | Path) -> None:
        """Writes ``generation_config.json``, into a folder if ``path`` is one.

        Raises:
            FileError: the file cannot be written.
        """
        path = Path(path)
        path = path / "generation_config.json" if path.is_dir() else path
        try:
            path.write_text(json.dumps(self.options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as e:
            raise FileError(f"[GenerationConfig] {path} cannot be written: {e}") from e

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.options == other.options

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"
