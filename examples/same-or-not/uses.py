"""What each of the three models of docs/same-or-not.md is good for, measured: ``python uses.py RUNS TEXT``.

Order: of a line and the same line with two neighbouring words exchanged, how often the real one is more probable.
Gaps: how often a token of a line is the model's first guess, from what its objective lets it see.
Vectors: how often the vector of a line is nearest to that of the line after it, among 50 others.
"""

import random
import sys
from pathlib import Path

import numpy as np

import pyrformer as pf
from pyrformer.look import logits_at

LINES, OTHERS = 300, 50


def exchanged(line: str, draw: random.Random) -> str:
    words = line.split()
    i = draw.choice([i for i in range(len(words) - 1) if words[i] != words[i + 1]])
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def order(model: pf.Model, lines: list[str]) -> float:
    draw = random.Random(1)
    real = model.score(lines).log_likelihood
    wrong = model.score([exchanged(line, draw) for line in lines]).log_likelihood
    return float((real > wrong).mean())


def gaps(model: pf.Model, lines: list[str]) -> float:
    tokenizer = model.require_tokenizer()
    right = count = 0
    for line in lines:
        ids = np.array([tokenizer.encode(line).ids], np.int32)
        # Not the first token of a line: the autoregressive model has nothing to guess it from.
        places = np.arange(2, ids.shape[1] - 1)
        if model.family.objective == "mlm":
            rows = np.repeat(ids, len(places), axis=0)
            rows[np.arange(len(places)), places] = tokenizer.mask_token_id
            guesses = logits_at(model, rows, places.tolist()).argmax(-1)
        elif model.family.objective == "plm":
            # Each place from all others: last in the order, as it were.
            ids = ids[:, 1:-1]
            places = np.arange(1, ids.shape[1])
            hidden = np.zeros((len(places), ids.shape[1], ids.shape[1]))
            hidden[np.arange(len(places)), :, places] = 1
            sought = hidden[:, :1].copy()
            rows = np.repeat(ids, len(places), axis=0)
            guesses = np.asarray(model(rows, perm_mask=hidden, target_mapping=sought).logits)[:, 0].argmax(-1)
        else:
            # Without the special tokens.
            ids = ids[:, 1:-1]
            places = np.arange(1, ids.shape[1])
            guesses = np.asarray(model(ids).logits)[0, :-1].argmax(-1)
        right += int((guesses == ids[0, places]).sum())
        count += len(places)
    return right / count


def vectors(model: pf.Model, lines: list[str]) -> float:
    found = model.embed(lines, pooling="mean")
    found = found - found.mean(0)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    draw = np.random.default_rng(1)
    hits = 0
    for i in range(len(lines) - 1):
        others = draw.choice([k for k in range(len(lines)) if abs(k - i) > 1], OTHERS, replace=False)
        hits += bool(found[i] @ found[i + 1] > (found[others] @ found[i]).max())
    return hits / (len(lines) - 1)


def main() -> None:
    runs, text = map(Path, sys.argv[1:])
    lines = [line.strip() for line in text.read_text("utf-8").splitlines()]
    lines = [line for line in lines if 6 <= len(set(line.split())) <= 12][:LINES]
    print(f"{'':8}{'order':>10}{'gaps':>10}{'vectors':>10}")
    for name in ("gpt", "bert", "xlnet"):
        model = pf.load(runs / name)
        print(f"{name:8}" + "".join(f"{f(model, lines):>10.1%}" for f in (order, gaps, vectors)), flush=True)


if __name__ == "__main__":
    main()
