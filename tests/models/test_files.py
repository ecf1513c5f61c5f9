"""Model folders: half precision and shards out and in, conversion, hostile indices, runs that begin with a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import pyrformer as pf
from pyrformer.checkpoint import parsed_size, shards
from pyrformer.cli import main
from pyrformer.errors import Error, FileError, InputError

SMALL = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16}


def small(**options: Any) -> pf.Model:
    return pf.Model.from_config({**SMALL, "tie_word_embeddings": False}, seed=3, **options)


def stored_types(path: Path) -> set[str]:
    with safe_open(path, "np") as file:
        return {file.get_slice(name).get_dtype() for name in list(file.keys())}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 by exact arithmetic: of the two around a number, the nearer, at a tie the even one."""
    bits = values.astype(np.float32).view(np.uint32)
    down, up = bits >> 16 << 16, (bits >> 16) + 1 << 16
    low, high = (b.astype(np.uint32).view(np.float32).astype(np.float64) for b in (down, up))
    below, above = np.abs(values - low), np.abs(high - values)
    even = (down >> 16) % 2 == 0
    return np.where((below < above) | ((below == above) & even), low, high).astype(np.float32)


@pytest.mark.parametrize(("dtype", "rounded"), [("float16", np.float16), ("bfloat16", bfloat16)])
def test_half_precision(tmp_path: Path, dtype: str, rounded: Any) -> None:
    model = small()
    tie = np.float32(1 + 2**-8 + 2**-11)
    before = model.state_dict()
    name = "model.layers.0.mlp.gate_proj.weight"
    before[name][0, :4] = [tie, -tie, 1e-7, 65519.0]
    model.load_state_dict(before)
    model.save(tmp_path / "half", dtype=dtype)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    assert stored_types(tmp_path / "half" / "model.safetensors") == {"F16" if dtype == "float16" else "BF16"}
    again = pf.load(tmp_path / "half")
    for key, value in before.items():
        want = rounded(value).astype(np.float32)
        assert np.array_equal(again.state_dict()[key], want), key
    again.save(tmp_path / "twice", dtype=dtype)
    first, second = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("half", "twice"))
    assert first == second


@pytest.mark.parametrize("value", [65520.0, -7e4])
def test_beyond_float16(tmp_path: Path, value: float) -> None:
    model = small()
    state = model.state_dict()
    state["model.norm.weight"][5] = value
    model.load_state_dict(state)
    with pytest.raises(FileError, match=r"model\.norm\.weight.*element 5.*F16"):
        model.save(tmp_path / "half", dtype="float16")
    assert not list((tmp_path / "half").iterdir())
    model.save(tmp_path / "half", dtype="bfloat16")


def test_infinity_stays(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    state["model.norm.weight"][:2] = [np.inf, np.nan]
    model.load_state_dict(state)
    model.save(tmp_path / "half", dtype="float16")
    got = pf.load(tmp_path / "half").state_dict()["model.norm.weight"]
    assert np.isinf(got[0])
    assert np.isnan(got[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards(tmp_path: Path, dtype: str) -> None:
    model, folder = small(), tmp_path / "m"
    model.save(folder)
    whole = load_file(folder / "model.safetensors")
    model.save(folder, dtype=dtype, max_shard_size="10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size = 2 if dtype == "float16" else 4
    assert index["metadata"]["total_size"] == size * sum(v.size for v in whole.values())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    n = len(files)
    assert n > 2
    assert files == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    assert sorted(set(index["weight_map"].values())) == files
    found: dict[str, np.ndarray] = {}
    for name in files:
        part = load_file(folder / name)
        assert len(part) == 1 or sum(v.nbytes for v in part.values()) <= 10_000
        assert all(index["weight_map"][key] == name for key in part)
        found |= part
    assert found.keys() == whole.keys()
    again = pf.load(folder).state_dict()
    for key, value in model.state_dict().items():
        assert np.array_equal(again[key], value.astype(dtype).astype(np.float32)), key
    # A single file takes the place of the shards, and fewer shards that of more.
    model.save(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) < n or dtype == "float16"
    assert len(
        set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    ) == len(list(folder.glob("*.safetensors")))
    model.save(folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]


def test_cutting() -> None:
    assert shards({"a": 5, "b": 5, "c": 1, "d": 30, "e": 2}, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards({"a": 50, "b": 5}, 10) == [["a"], ["b"]]
    sizes = {"5GB": 5 * 10**9, "500MiB": 500 << 20, "1.5 kb": 1500, 17: 17, "3": 3, "2TB": 2 * 10**12}
    assert {given: parsed_size(given) for given in sizes} == sizes
    for bad in ("", "GB", "-5GB", "0", "5XB", "nan"):
        with pytest.raises(InputError, match="max_shard_size"):
            parsed_size(bad)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", "C:x", ""]
)
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    small().save(folder, max_shard_size="10KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = sorted(index["weight_map"])[0]
    (tmp_path / "other.safetensors").write_bytes((folder / index["weight_map"][key]).read_bytes())
    index["weight_map"][key] = name
    path.write_text(json.dumps(index))
    with pytest.raises(FileError, match="plain names"):
        pf.load(folder)


def test_float64_is_read_whole(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    small().save(tmp_path / "m")
    exact = {k: v.astype(np.float64) / 3 for k, v in load_file(tmp_path / "m" / "model.safetensors").items()}
    save_file(exact, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    wide, narrow = pf.load(tmp_path / "m", dtype="float64", threads=3), pf.load(tmp_path / "m", threads=1)
    for name, value in exact.items():
        assert np.array_equal(wide.state_dict()[name], value)
        assert np.array_equal(narrow.state_dict()[name], value.astype(np.float32))


def test_refusals(tmp_path: Path) -> None:
    for bad in ({"dtype": "int8"}, {"dtype": "f16"}, {"max_shard_size": "many"}):
        with pytest.raises(InputError):
            small().save(tmp_path / "m", **bad)
    assert not (tmp_path / "m").exists()


def test_convert(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "m")

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(main, ["convert", *map(str, arguments)])

    done = run(tmp_path / "m", tmp_path / "half", "--dtype", "bfloat16", "--max-shard-size", "10KB")
    assert done.exit_code == 0, done.output
    assert stored_types(next((tmp_path / "half").glob("model-00001-*"))) == {"BF16"}
    again = run(tmp_path / "m", tmp_path / "half")
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert run(tmp_path / "m", tmp_path / "half", "--overwrite").exit_code == 0
    assert np.array_equal(pf.load(tmp_path / "half")([[1, 2]]).logits, model([[1, 2]]).logits)
    for dtype, tolerance in (("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 2e-2)):
        path = tmp_path / f"{dtype}.gguf"
        assert run(tmp_path / "m", path, "--dtype", dtype).exit_code == 0
        assert np.abs(pf.load(path)([[1, 2]]).logits - model([[1, 2]]).logits).max() <= tolerance
    back = run(tmp_path / "float32.gguf", tmp_path / "back")
    assert back.exit_code == 0
    assert np.array_equal(pf.load(tmp_path / "back")([[1, 2]]).logits, model([[1, 2]]).logits)
    wrong = run(tmp_path / "m", tmp_path / "x", "--dtype", "q8_0")
    assert wrong.exit_code == 2
    assert "pyrformer: error" in wrong.output
    assert not (tmp_path / "x").exists()


def test_roles_of_tokens_survive(tmp_path: Path) -> None:
    """A folder may say, beside its tokenizer, that texts end with another token than the usual one."""
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 200)
    tokenizer = pf.Tokenizer.train(
        [text], kind="bpe", vocab_size=280, special_tokens=["<|endoftext|>", "<start>", "<stop>"]
    )
    model = pf.Model.from_config({**SMALL, "vocab_size": 280}, tokenizer=tokenizer)
    model.save(tmp_path / "m")
    roles = {"bos_token": "<start>", "eos_token": "<stop>", "pad_token": "<stop>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(roles))
    opened = pf.load(tmp_path / "m")
    assert opened.tokenizer is not None
    opened.save(tmp_path / "again")
    again = pf.load(tmp_path / "again").tokenizer
    assert again is not None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(opened.tokenizer, name) is not None
    assert opened.tokenizer.eos_token_id == tokenizer.token_to_id("<stop>")
    options: dict[str, Any] = {"files": [str(text)], "seq_len": 16, "init_from": str(tmp_path / "m")}
    options |= {"out": str(tmp_path / "run"), "save_every": 1}
    pf.train(pf.TrainConfig(**options, max_steps=1))
    assert pf.train(pf.TrainConfig(**options, max_steps=2, resume=True)).steps == 2


def test_a_run_begins_with_the_weights_of_a_folder(tmp_path: Path) -> None:
    """``init_from`` and ``--resume`` open weights without drawing any first."""
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 200)
    options: dict[str, Any] = {
        "files": [str(text)],
        "seq_len": 16,
        "batch_size": 4,
        "tokenizer": {"kind": "char"},
    }
    first = pf.train(
        pf.TrainConfig(out=str(tmp_path / "a"), max_steps=2, model=SMALL | {"vocab_size": 300}, **options)
    )
    with pytest.raises(Error, match="configured shape"):
        pf.train(
            pf.TrainConfig(
                out=str(tmp_path / "b"),
                init_from=str(tmp_path / "a"),
                max_steps=1,
                model={"intermediate_size": 40},
                **options,
            )
        )
    more = pf.train(
        pf.TrainConfig(
            out=str(tmp_path / "b"),
            init_from=str(tmp_path / "a"),
            max_steps=1,
            learning_rate=1e-12,
            **options,
        )
    )
    for name, value in first.model.state_dict().items():
        np.testing.assert_allclose(more.model.state_dict()[name], value, atol=1e-9)


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention", "quantization_config", "problem_type"])
def test_keys_that_would_change_the_mathematics_are_refused(key: str) -> None:
    config = {"model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(pf.errors.ConfigError, match=key):
        pf.Model.from_config({**config, key: "x" if key == "problem_type" else True})


def test_a_part_of_a_head_that_the_reference_would_turn_whole_is_refused() -> None:
    config = {"model_type": "llama", "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(pf.errors.ConfigError, match="partial_rotary_factor"):
        pf.Model.from_config({**config, "rope_parameters": {"partial_rotary_factor": 0.5}})


def test_an_unknown_activation_is_refused_at_once() -> None:
    with pytest.raises(pf.errors.ConfigError, match="activation_function must be one of"):
        pf.Model.from_config({"model_type": "gpt2", "vocab_size": 20, "activation_function": "relu6"})


@pytest.mark.parametrize(("kind", "names"), [("bert", "cls.predictions"), ("roberta", "lm_head")])
def test_an_untied_head_has_its_own_bias(kind: str, names: str, tmp_path: Path) -> None:
    """transformers reads the decoder's bias; its older versions wrote the head's under both names, or one."""
    config = {"model_type": kind, "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 1, "intermediate_size": 8, "tie_word_embeddings": False}
    model = pf.Model.from_config(config)
    bias = np.arange(20, dtype=np.float32)
    model.load_state_dict(model.state_dict() | {f"{names}.decoder.bias": bias})
    model.save(tmp_path)
    assert np.array_equal(pf.load(tmp_path).state_dict()[f"{names}.decoder.bias"], bias)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{names}.decoder.bias"]
    save_file(tensors | {f"{names}.bias": bias + 1}, tmp_path / "model.safetensors")
    assert np.array_equal(pf.load(tmp_path).state_dict()[f"{names}.decoder.bias"], bias + 1)


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    model = pf.Model.from_config(
        {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 1}
    )
    out = model([[3]], labels=[[3]])
    assert out.loss is None
    assert np.shape(out.logits) == (1, 1, 20)
