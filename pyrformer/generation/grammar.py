"""Texts that follow a grammar: regular expressions, JSON schemas and Lark grammars, through the package llguidance.

At each step a matcher says which tokens may follow; it works on the bytes of tokens, which :func:`token_bytes` knows.
A matcher is kept for each beginning that a search stands at, so beams fork it as they fork.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer.errors import InputError
from pyrformer.tokenizers import Tokenizer

#: The options that give a grammar.
KINDS = ("regex", "json_schema", "grammar")
#: Beginnings whose matchers are kept.
KEPT = 512


class Grammar:
    """What may follow a text under a grammar.

    Args:
        kind: one of :data:`KINDS`.
        source: a regular expression (Rust's syntax, no look-around), a JSON schema as text or dict, or a Lark grammar
            as llguidance reads it.
        eos: the tokens that end a text; they may follow where the grammar is satisfied.
        vocab_size: of the model; what the tokenizer lacks of it never follows.

    Raises:
        InputError: llguidance is missing, the grammar is wrong, or the tokenizer's tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str, source: Any, eos: Sequence[int], vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise InputError(
                f"[generate] {kind} needs the package llguidance; install pyrformer[grammar]"
            ) from None
        self.vocab_size = vocab_size
        tokens = token_bytes(tokenizer)
        special = [i for i in range(len(tokens)) if tokenizer.is_special(i)]
        if not eos:
            # A matcher wants an end; this one is no token of the model's.
            eos = [len(tokens)]
            tokens.append(b"")
        wrapped = _Wrapper(tokenizer, tokens, [*special, *eos], eos[0])
        wrapper = llguidance.TokenizerWrapper(wrapped)
        if not isinstance(source, str) and kind != "json_schema":
            raise InputError(f"[generate] {kind} must be a string, got {source!r}")
        try:
            compilers: dict[str, Any] = {
                "regex": llguidance.LLMatcher.grammar_from_regex,
                "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
                "grammar": llguidance.LLMatcher.grammar_from_lark,
            }
            text = compilers[kind](source)
            vocabulary = llguidance.LLTokenizer(wrapper, eos_token=list(eos))
        except (ValueError, TypeError) as e:
            raise InputError(f"[generate] {kind}: {_line(e)}") from None
        first = llguidance.LLMatcher(vocabulary, text, log_level=0)
        if first.is_error():
            raise InputError(f"[generate] {kind}: {_line(first.get_error())}")
        self.kind = kind
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict({(): first})

    def allowed(self, added: list[int]) -> npt.NDArray[np.uint32]:
        """The tokens that may follow the tokens ``added``, ascending."""
        mask = self._matcher(tuple(added)).compute_bitmask()
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: self.vocab_size]
        return np.flatnonzero(bits).astype(np.uint32)

    def is_over(self, added: list[int]) -> bool:
        """Whether nothing but an end can follow."""
        return bool(self._matcher(tuple(added)).is_stopped())

    def _matcher(self, added: tuple[int, ...]) -> Any:
        """The matcher that has seen ``added``, forked from the longest beginning that is kept."""
        kept = self._matchers
        if added in kept:
            kept.move_to_end(added)
            return kept[added]
        at = len(added) - 1
        while added[:at] not in kept:
            at -= 1
        matcher = kept[added[:at]].deep_copy()
        if not matcher.consume_tokens(list(added[at:])):
            raise InputError(f"[generate] {self.kind}: {_line(matcher.get_error())}")
        kept[added] = matcher
        kept.move_to_end(())
        if len(kept) > KEPT:
            kept.popitem(last=False)
        return matcher


class _Wrapper:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos: int):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only")
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _line(error: object) -> str:
    """The first line of an error."""
    return str(error).strip().split("\n")[0]


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id adds to a text, empty for special tokens.

    Raises:
        InputError: what a token adds depends on its neighbours, as WordPiece's spaces do.
    """
    decoder = json.loads(tokenizer.to_json()).get("decoder")
    stages = _stages(decoder)
    kinds = {stage["type"] for stage in stages}
    if "WordPiece" in kinds or not stages:
        raise InputError(
            "[generate] grammars need a tokenizer whose tokens have bytes of their own, as BPE and Unigram; "
            f"this is {tokenizer.kind}"
        )
    found = []
    for i in range(tokenizer.vocab_size):
        token = tokenizer.id_to_token(i)
        if token is None or tokenizer.is_special(i):
            found.append(b"")
        elif "ByteLevel" in kinds:
            values = [_ALPHABET.get(c) for c in token]
            # Added tokens stand for themselves.
            found.append(token.encode() if None in values else bytes(v for v in values if v is not None))
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            for stage in stages:
                token = _replaced(token, stage)
            found.append(token.encode())
    return found


def _stages(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return (
        [s for d in decoder["decoders"] for s in _stages(d)] if decoder["type"] == "Sequence" else [decoder]
    )


def _replaced(token: str, stage: dict[str, Any]) -> str:
    if stage["type"] == "Metaspace":
        return token.replace(stage["replacement"], " ")
    if stage["type"] == "Replace" and "String" in stage["pattern"]:
        return token.replace(stage["pattern"]["String"], stage["content"])
    return token


def _alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: printable ones stand for themselves, the others for 256 + n.
    Source: Radford et al. 2019, ``encoder.py`` of GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()
