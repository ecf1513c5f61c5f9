"""Generating text on the CPU: tokens a second beside CTranslate2 and transformers, in turns of one run.

    python benchmarks/bench_generate.py [--turns 5] [--threads 2] [--new 32] [--prompt 128]
    python benchmarks/bench_generate.py --perplexity MODEL FILE

The model has the shape of GPT-2 (124M) and fresh weights; the prompt's time is included. Peers that are not installed
are left out (`pip install ctranslate2 transformers torch`). The first table gives median tokens a second and the range
of the turns; the second says how fast one greedy step reads the weights, beside a plain read of as many bytes. With
--perplexity, what weights of 8 bits cost: the perplexity of a text under a model of yours, with and without them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import pyrformer as pf

CONFIG = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
#: Prompts and beams.
ROWS = [(1, 1), (8, 1), (1, 4), (4, 4)]

Generate = Callable[[list[list[int]], int, int], object]


def ours(folder: Path, load_in_8bit: bool) -> Generate:
    model = pf.load(folder, load_in_8bit=load_in_8bit)

    def generate(prompts: list[list[int]], beams: int, new: int) -> object:
        return model.generate(prompts, max_new_tokens=new, min_new_tokens=new, num_beams=beams)

    return generate


def ctranslate2(folder: Path, compute_type: str, threads: int) -> Generate:
    import ctranslate2 as ct2

    if not (folder / "ct2").exists():
        ct2.converters.TransformersConverter(str(folder / "peer")).convert(str(folder / "ct2"))
    generator = ct2.Generator(str(folder / "ct2"), compute_type=compute_type, intra_threads=threads)

    def generate(prompts: list[list[int]], beams: int, new: int) -> object:
        tokens = [[f"t{i}" for i in prompt] for prompt in prompts]
        return generator.generate_batch(
            tokens, max_length=new, min_length=new, beam_size=beams, include_prompt_in_result=False
        )

    return generate


def transformers(folder: Path, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], beams: int, new: int) -> object:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {"num_beams": beams, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
            )

    return generate


def read_seconds(size: int, threads: int) -> float:
    """The fastest of several plain reads of ``size`` bytes by so many threads."""
    parts = [np.ones(size // 4 // threads, np.float32) for _ in range(threads)]
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        workers = [threading.Thread(target=part.sum) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - began)
    return best


def save_model(folder: Path) -> None:
    """Into ``folder``; and into ``peer`` inside it with words t0, t1, …, for the peer that takes no ids."""
    model = pf.Model.from_config(CONFIG)
    model.save(folder)
    folder = folder / "peer"
    model.save(folder)
    words = {f"t{i}": i for i in range(CONFIG["vocab_size"])}
    vocabulary = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    stages = dict.fromkeys(
        ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    )
    tokenizer = {"version": "1.0", "added_tokens": [], **stages, "model": vocabulary}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "t0",
        "eos_token": "t0",
        "unk_token": "t0",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def print_perplexity(folder: str, file: str) -> None:
    text = Path(file).read_text(encoding="utf-8")[:10_000]
    found = {}
    for name, load_in_8bit in (("float32", False), ("int8", True)):
        scores = pf.load(folder, load_in_8bit=load_in_8bit).score([text], context=512)
        found[name] = math.exp(-float(scores.log_likelihood[0]) / int(scores.tokens[0]))
    print(
        f"perplexity on {file}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), end=""
    )
    print(f" ({100 * (found['int8'] / found['float32'] - 1):+.2f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--perplexity", nargs=2, metavar=("MODEL", "FILE"))
    parser.add_argument("--only", default="", help="those whose name contains this")
    o = parser.parse_args()
    os.environ["PYRFORMER_NUM_THREADS"] = str(o.threads)
    if o.perplexity:
        print_perplexity(*o.perplexity)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        makers: dict[str, Callable[[], Generate]] = {
            "pyrformer float32": lambda: ours(folder, False),
            "pyrformer int8": lambda: ours(folder, True),
        }
        if find_spec("ctranslate2") and find_spec("transformers"):
            makers["CTranslate2 float32"] = lambda: ctranslate2(folder, "float32", o.threads)
            makers["CTranslate2 int8"] = lambda: ctranslate2(folder, "int8", o.threads)
        if find_spec("transformers"):
            makers["transformers"] = lambda: transformers(folder, o.threads)
        engines = {name: make() for name, make in makers.items() if o.only in name}
        heads = [f"{b} × {k} beams" if k > 1 else f"batch {b}" for b, k in ROWS]
        print(f"{'tokens/s':22}" + "".join(f"{head:>22}" for head in heads))
        rng = np.random.default_rng(0)
        found: dict[str, list[str]] = {name: [] for name in engines}
        step = dict.fromkeys(engines, 0.0)
        for batch, beams in ROWS:
            prompts = rng.integers(1, CONFIG["vocab_size"], (batch, o.prompt)).tolist()
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for turn in range(o.turns + 1):
                for name, generate in engines.items():
                    began = time.perf_counter()
                    generate(prompts, beams, o.new)
                    if turn:  # The first makes programs and wakes threads.
                        seconds[name].append(time.perf_counter() - began)
            for name, times in seconds.items():
                rates = sorted(batch * o.new / s for s in times)
                found[name].append(f"{statistics.median(rates):.1f} ({rates[0]:.1f}–{rates[-1]:.1f})")
            if (batch, beams) == (1, 1):
                for name, generate in engines.items():
                    spans = []
                    for new in (2, 2 + o.new) * 3:
                        began = time.perf_counter()
                        generate(prompts, 1, new)
                        spans.append(time.perf_counter() - began)
                    step[name] = (min(spans[1::2]) - min(spans[::2])) / o.new
        for name, cells in found.items():
            print(f"{name:22}" + "".join(f"{cell:>22}" for cell in cells))
        weights = 4 * sum(p.size for p in pf.load(folder).state_dict().values())
        plain = read_seconds(weights, o.threads)
        print(f"\n{weights / 1e6:.0f} MB of float32 weights: a plain read takes {1e3 * plain:.1f} ms")
        for name, s in step.items():
            print(f"{name:22}{1e3 * s:8.1f} ms a step at batch 1")


if __name__ == "__main__":
    main()
