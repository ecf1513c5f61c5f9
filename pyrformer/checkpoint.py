"""Model folders in Hugging Face's layout: ``config.json``, ``model.safetensors`` (or shards), ``tokenizer.json``,
``generation_config.json``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from pyrformer import _core
from pyrformer.errors import FileError, InputError
from pyrformer.fields import checked, parse_json
from pyrformer.finetune import merged
from pyrformer.gguf.file import Gguf
from pyrformer.gguf.layouts import POOLER
from pyrformer.gguf.model import config_of, tensor_names, tensor_of
from pyrformer.model import Model
from pyrformer.models import build
from pyrformer.models.base import Family
from pyrformer.origin import Origin

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: Element types of a folder's weights, and their bytes.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Where weights are cut into several files.
MAX_SHARD_SIZE = "5GB"
#: What holds a tokenizer, in a folder without a ``tokenizer.json`` of ours.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "merges.txt")
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FileError: the file cannot be read or holds no JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"[load] {path.parent} has no {path.name}; is it a model folder?") from None
    except (OSError, ValueError) as e:
        raise FileError(f"[load] {path}: {e}") from None
    if not isinstance(value, dict):
        raise FileError(f"[load] {path} must hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object to a JSON file that appears whole or not at all."""
    _core.write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@checked("load", threads=1)
def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    load_in_8bit: bool = False,
    mmap: bool = False,
) -> Model:
    """Opens a model folder or a ``.gguf`` file.

    Args:
        folder: holds ``config.json`` and safetensors in any of float32, float16, bfloat16, float64; or a GGUF file, see
            :mod:`pyrformer.gguf.layouts`.
        device: "cpu", or "cuda" for an NVIDIA GPU (`pip install pyrformer[cuda13]`).
        dtype: "float32" (the default) or "float64", for computing; on "cuda" also "bfloat16" or "float16":
            activations and what products read of weights are of that type, tensor cores compute, sums and results are
            float32. float16 is for GPUs older than compute capability 8.0, and holds numbers up to 65504.
        threads: how many to use; default: ``PYRFORMER_NUM_THREADS``, or all the machine has.
        load_in_8bit: keep the weights of products in 8 bits, with a scale for each output feature: a quarter of the
            memory and faster decoding, for a small loss (see docs/generation.md). Such a model generates, scores and
            embeds; it is not trained or saved. CPU and float32 only.
        mmap: do not copy weights that are stored as they are computed with, but map them from the file: all processes
            that do so share their memory, and a page is copied where it is written. The files must not be rewritten in
            place meanwhile; replacing them by renaming, as saving does, is fine. Folders on the CPU; without effect
            elsewhere. Handles that come out of pickles are opened so.

    Raises:
        FileError: a file is missing, truncated, or does not fit the configuration.
        ConfigError: the family is unknown or the configuration contradictory.
        DeviceError: CUDA is asked for and cannot be used; the message says what is missing.
    """
    folder = Path(folder)
    halves = ("bfloat16", "float16")
    if dtype not in (None, "float32", "float64", *halves):
        raise InputError(f"[load] dtype must be 'float32', 'float64', 'bfloat16' or 'float16', got {dtype!r}")
    if dtype in halves and device == "cpu":
        raise InputError(
            f"[load] {dtype} is computed on tensor cores only; use device 'cuda', or leave out dtype"
        )
    if load_in_8bit and (device != "cpu" or dtype not in (None, "float32")):
        raise InputError("[load] load_in_8bit computes in float32 on the CPU; leave out dtype and device")
    # The marks are taken before anything is read: what is written meanwhile is seen as a change.
    origin = Origin.of(folder, device=device, dtype=dtype, threads=threads, load_in_8bit=load_in_8bit)
    precision = dtype if dtype in halves else "float32"
    kept = "float64" if dtype == "float64" else "float32"
    if folder.suffix == ".gguf" and folder.is_file():
        model = _load_gguf(folder, kept, threads, device, origin, precision)
        if load_in_8bit:
            model.quantise()
        return model
    if not folder.is_dir():
        raise FileError(f"[load] there is no folder {folder}")
    family = build(read_json(folder / CONFIG))
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    tokenizer = None
    if any((folder / name).is_file() for name in TOKENIZERS):
        from pyrformer.tokenizers import Tokenizer

        tokenizer = Tokenizer.load(folder)
    loaded: dict[str, Any] = {"generation_config": generation, "pooling": _pooling(folder)}
    model = Model(
        family, tokenizer, kept, threads, device=device, precision=precision, origin=origin, **loaded
    )
    copy_into(model, *_tensors(folder, family), mmap=mmap)
    if load_in_8bit:
        model.quantise()
    return model


def copy_into(model: Model, stored: _core.SafeTensors, names: dict[str, str], *, mmap: bool = False) -> None:
    """Sets a model's states by their names from the tensors of files: each is copied once, from the memory map, or
    stays there."""
    if isinstance(model.store, _core.Store):
        pairs = list(names.items())
        if mmap:
            pairs = stored.map_into(model.store, pairs, model.dtype)
        if pairs:
            stored.load_into(model.store, pairs, model.dtype, model.threads)
        return
    for name, there in names.items():
        model.store.set(name, stored.get(there).astype(model.dtype, copy=False))


def _load_gguf(
    path: Path, dtype: str, threads: int | None, device: str, origin: Origin, precision: str
) -> Model:
    file = Gguf(path)
    config = config_of(file)
    family = build(config)
    names = tensor_names(file)
    tokenizer = None
    if "tokenizer.ggml.model" in file.metadata:
        from pyrformer.tokenizers import Tokenizer

        tokenizer = Tokenizer.load(path)
    model = Model(family, tokenizer, dtype, threads, device=device, precision=precision, origin=origin)
    for name, parameter in family.named_parameters():
        if name not in names and name.startswith(POOLER):
            model.store.set(name, np.zeros(parameter.shape, dtype))
            continue
        if name not in names:
            raise FileError(f"[load] {path} has no tensor for {name!r}")
        value = tensor_of(file, name, names[name], config)
        if value.shape != parameter.shape:
            raise FileError(
                f"[load] {path}: tensor {names[name]!r} is {list(value.shape)}, its metadata say "
                f"{list(parameter.shape)}"
            )
        model.store.set(name, value.astype(dtype, copy=False))
    return model


def _pooling(folder: Path) -> dict[str, Any]:
    """What sentence-transformers' files say of a text's vector."""
    if not (folder / "1_Pooling" / "config.json").is_file():
        return {}
    raw = read_json(folder / "1_Pooling" / "config.json")
    kinds = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "last": "pooling_mode_lasttoken",
    }
    chosen = [kind for kind, name in kinds.items() if raw.get(name)]
    if len(chosen) != 1:
        raise FileError(
            f"[load] {folder}/1_Pooling/config.json asks for a pooling other than {', '.join(kinds)}"
        )
    modules = folder / "modules.json"
    normalize = modules.is_file() and "Normalize" in modules.read_text(encoding="utf-8")
    return {"pooling": chosen[0], "normalize": normalize}


def _tensors(folder: Path, family: Family) -> tuple[_core.SafeTensors, dict[str, str]]:
    """A folder's files and where each parameter of a family is in them, after checking all names and shapes."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise FileError(
            f"[load] {folder}: {pickled[0]} is a pickle, which can run code, so it is not opened; convert it where you "
            "trust it: transformers' AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    stored = _core.SafeTensors(folder)
    parameters = dict(family.named_parameters())
    tied = family.tied_names()
    found: dict[str, str] = {}
    for name, _, shape in stored.tensors():
        ours = family.rename(name)
        # A tensor under its own name goes before one under another name for it.
        if ours is None or ours in tied or (ours in found and name != ours):
            continue
        if ours not in parameters:
            if _absent_bias(family, ours):
                _require_zero(folder, name, stored.get(name))
                continue
            raise FileError(
                f"[load] {folder}: tensor {name!r} is not part of a {family.config.model_type} model"
            )
        if tuple(shape) != parameters[ours].shape:
            want = list(parameters[ours].shape)
            raise FileError(f"[load] {folder}: tensor {name!r} is {shape}, the configuration says {want}")
        found[ours] = name
    missing = [name for name in parameters if name not in found]
    if missing:
        raise FileError(f"[load] {folder}: {len(missing)} tensors are missing, first {missing[0]!r}")
    return stored, found


def _absent_bias(family: Family, name: str) -> bool:
    return name.endswith(".bias") and getattr(family.config, "bias", True) is False


def _require_zero(folder: Path, name: str, tensor: Any) -> None:
    if np.any(tensor):
        raise FileError(
            f'[load] {folder}: tensor {name!r} is not zero, but the configuration says "bias": false'
        )


def stored_tensors(model: Model, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """What ``model.safetensors`` holds: float32 under the names of the reference.

    Args:
        state: the parameters; default: the model's own.
    """
    tensors = {name: array.astype(np.float32, copy=False) for name, array in merged(model, state).items()}
    tensors = {model.family.stored_name(name): array for name, array in tensors.items()}
    return tensors | {name: np.zeros(shape, np.float32) for name, shape in model.family.absent_tensors()}


def save(
    model: Model,
    folder: str | Path,
    tensors: dict[str, Any] | None = None,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a model folder; each file appears whole or not at all. See :meth:`pyrformer.model.Model.save`.

    Args:
        tensors: of :func:`stored_tensors`, taken earlier; default: taken here.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise InputError(f"[save] a folder holds {', '.join(DTYPES)}; got dtype {dtype!r}")
    limit = parsed_size(max_shard_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"[save] {folder}: {e.strerror}") from None
    tensors = stored_tensors(model) if tensors is None else tensors
    parts = shards({name: math.prod(t.shape) * DTYPES[dtype] for name, t in tensors.items()}, limit)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [WEIGHTS]
    if any((folder / name).exists() for name in names if name != WEIGHTS):
        # Better no model than, after a power cut, one half of each.
        (folder / INDEX).unlink(missing_ok=True)
    for name, part in zip(names, parts, strict=True):
        _core.write_safetensors(folder / name, {key: tensors[key] for key in part}, dtype)
    if len(parts) > 1:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(math.prod(t.shape) for t in tensors.values())
        metadata = {"total_parameters": total, "total_size": total * DTYPES[dtype]}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
        names.append(INDEX)
    # What an earlier model left: a single file is read before an index, and an index before loose shards.
    for path in [folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        if path.name not in names:
            path.unlink(missing_ok=True)
    save_config(model, folder, dtype)


def chat_template(folder: Path) -> str | None:
    """The template of chats in a model folder: ``chat_template.jinja``, or what ``tokenizer_config.json`` has, the one
    named "default" where that has several; None where there is none.

    Raises:
        FileError: a file cannot be read.
    """
    path = folder / CHAT_TEMPLATE
    try:
        if path.is_file():
            return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"[load] cannot read {path}: {e}") from None
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    text: Any = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(text, list):
        text = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}.get("default")
    return text if isinstance(text, str) else None


def parsed_size(size: int | str, what: str = "[save] max_shard_size") -> int:
    """Bytes of a size such as "5GB" (10⁹ bytes) or "500MiB" (2²⁰ bytes); ``what`` is named where it is none.

    Raises:
        InputError: it is no positive number of bytes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", str(size), re.IGNORECASE)
    unit = (found[2] or "").lower() if found else ""
    power = " kmgt".index(unit[:1] or " ")
    number = int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** power) if found else 0
    if number < 1:
        raise InputError(f"{what} must be like '5GB' or a number of bytes, got {size!r}")
    return number


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into parts of at most ``limit`` bytes; a larger tensor is alone in its part."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if parts[-1] and held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


def save_config(model: Model, folder: Path, dtype: str = "float32") -> None:
    """Writes what a model folder holds beside the weights, which are of ``dtype``."""
    if model.tokenizer is not None:
        # Templates are of the tokenizer's files, and not known to it; it may be about to write over its own.
        template = chat_template(model.origin.path) if model.origin else None
        # Into the folder: tokenizer.json alone does not say which token ends a text.
        model.tokenizer.save(folder)
        if template is not None:
            _core.write_file(folder / CHAT_TEMPLATE, template.encode())
    config = model.family.config
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {**{k: v for k, v in ids.items() if v is not None}, **model.generation_config}
    write_json(folder / GENERATION, generation)
    write_json(folder / CONFIG, {**model.config, "dtype": dtype})
