"""Pipelines of published families in small: what their ``tokenizer.json`` asks for, on vocabularies learned here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROSE = """The quick brown fox jumps over the lazy dog, 1234567 times a day; it's HelloWorld's fault.
def f(self, x): return {"a": x[0] + 3.14, 'b': "naïve café"}  # don't  ...\n\n\tÜber Straße ﬁne ½ Ⅷ
你好世界，今天天气很好。 こんにちは世界 カタカナ ｶﾞ 안녕하세요 Привет, мир! مرحبا بالعالم नमस्ते สวัสดี 😀👍🏽 ©™ ①②
"""
DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+""" + (
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BYTE_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def split(
    pattern: str, behavior: str = "Isolated", invert: bool = False, literal: bool = False
) -> dict[str, Any]:
    kind = "String" if literal else "Regex"
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def replace(pattern: str, content: str, literal: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String" if literal else "Regex": pattern}, "content": content}


def sequence(part: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", part: list(parts)}


def words(*parts: dict[str, Any]) -> dict[str, Any]:
    return sequence("pretokenizers", *parts)


def changes(*parts: dict[str, Any]) -> dict[str, Any]:
    return sequence("normalizers", *parts)


#: Name → (kind of model, its settings, normalizer, pre-tokenizer, decoder).
PIPELINES: dict[str, tuple[str, dict[str, Any], Any, Any, Any]] = {
    "deepseek": (
        "bytes", {}, changes(),
        words(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTES), BYTE_DECODER,
    ),
    "tekken": ("bytes", {"ignore_merges": True}, None, words(split(TEKKEN), BYTES), BYTE_DECODER),
    "qwen": ("bytes", {}, {"type": "NFC"}, words(split(QWEN35), BYTES), BYTE_DECODER),
    "phi": ("bytes", {}, None, {**BYTES, "use_regex": True, "add_prefix_space": True}, BYTE_DECODER),
    "falcon": (
        "bytes", {}, None,
        words({"type": "Punctuation", "behavior": "Contiguous"}, {**BYTES, "use_regex": True},
              {"type": "Digits", "individual_digits": False}, split(r"[0-9][0-9][0-9]")), BYTE_DECODER,
    ),
    "starcoder": ("bytes", {}, None, words({"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}),
                  BYTE_DECODER),
    # A byte-level vocabulary that lacks most bytes: they are left out.
    "holes": ("holes", {}, None, {**BYTES, "use_regex": True}, BYTE_DECODER),
    "gemma": (
        "bpe", {"fuse_unk": True, "byte_fallback": True, "unk_token": "<unk>"}, replace(" ", "▁", literal=True),
        split(" ", "MergedWithPrevious", literal=True),
        sequence("decoders", replace("▁", " ", literal=True), {"type": "ByteFallback"}, {"type": "Fuse"}),
    ),
    "clip": (
        "bpe", {"end_of_word_suffix": "</w>", "unk_token": "<unk>"},
        changes({"type": "NFC"}, replace(r"\s+", " "), {"type": "Lowercase"}),
        words(split(CLIP, "Removed", True)), {"type": "BPEDecoder", "suffix": "</w>"},
    ),
    "prefixed": (
        "bpe", {"continuing_subword_prefix": "##", "unk_token": "<unk>"}, {"type": "Strip", "strip_left": True,
        "strip_right": True}, {"type": "Whitespace"}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "words": ("wordlevel", {"unk_token": "<unk>"}, {"type": "Nmt"}, {"type": "Whitespace"}, None),
    "scripts": ("bpe", {"unk_token": "<unk>"}, {"type": "NFKD"}, words({"type": "UnicodeScripts"},
                {"type": "CharDelimiterSplit", "delimiter": ","}), {"type": "Fuse"}),
    "deberta": (
        "unigram", {}, changes({"type": "Strip", "strip_left": True, "strip_right": True}, replace(" {2,}", " "),
                               replace(r"\n+", "\n")), METASPACE, METASPACE,
    ),
    **{
        behavior.lower(): ("bpe", {"unk_token": "<unk>"}, None, split(r"\s+|\d", behavior, invert), {"type": "Fuse"})
        for behavior, invert in [("Removed", False), ("Isolated", True), ("MergedWithNext", False),
                                 ("MergedWithPrevious", False), ("Contiguous", False)]
    },
}  # fmt: skip


def model(kind: str, settings: dict[str, Any], pre_tokenizer: Any, normalizer: Any) -> dict[str, Any]:
    """A small model of this kind, learned from ``PROSE`` with the library's trainers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned: Any
    trainer: Any
    if kind == "wordlevel":
        learned = models.WordLevel(unk_token="<unk>")
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"])
    elif kind == "unigram":
        learned = models.Unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
        )
    else:
        learned = models.BPE(unk_token=settings.get("unk_token"))
        affixes = {
            k: v for k, v in settings.items() if k in ("end_of_word_suffix", "continuing_subword_prefix")
        }
        special = ["<unk>", "<s>"]
        if settings.get("byte_fallback"):
            special += [f"<0x{b:02X}>" for b in range(256)]
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **affixes
        )
    blank = Tokenizer(learned)
    file = json.loads(blank.to_str())
    file.update(pre_tokenizer=pre_tokenizer, normalizer=normalizer)
    blank = Tokenizer.from_str(json.dumps(file))
    blank.train_from_iterator([PROSE, *PROSE.splitlines(), *PROSE.split()], trainer)
    made: dict[str, Any] = json.loads(blank.to_str())["model"]
    if settings.get("end_of_word_suffix"):
        # Single characters inside a word and at its end.
        vocab = made["vocab"]
        for c in sorted(set(PROSE.lower())):
            for token in (c, c + "</w>"):
                vocab.setdefault(token, len(vocab))
    return {**made, **settings}


def pipeline(name: str) -> str:
    """The ``tokenizer.json`` of a pipeline."""
    kind, settings, normalizer, pre_tokenizer, decoder = PIPELINES[name]
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, token in enumerate(["<unk>", "<s>"])
    ]  # fmt: skip
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "<s>", "type_id": 1}}]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": around,
                "pair": around + second,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": decoder,
            "model": model(kind, settings, pre_tokenizer, normalizer),
        },
        ensure_ascii=False,
    )


def write(name: str, folder: Path) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(pipeline(name), encoding="utf-8")
    return file
