"""A served model under N clients at once: tokens a second, latency, and the memory of the server.

    python benchmarks/bench_serve.py [--rounds 4] [--tokens 64]

Starts ``pyrformer serve`` on a model with fresh weights (GPT-2, 6 layers of width 384) and lets N clients ask one after
the other, all at once. Memory is read before and after each row: it should stay where it is.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyrformer as pf

CONFIG = {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 512}
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the king of the mountain. "


def resident_mb(process: int) -> float:
    """Resident memory of a process, MB; 0 where the system does not say."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS")), 0.0)


def ask(port: int, tokens: int, seed: int) -> tuple[float, int]:
    """Seconds and tokens of one completion."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": TEXT, "max_tokens": tokens, "seed": seed}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return time.perf_counter() - began, answer["usage"]["completion_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each request")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = pf.Tokenizer.train(iter([TEXT] * 9), kind="bpe", vocab_size=300)
        config = {**CONFIG, "vocab_size": tokenizer.vocab_size}
        pf.Model.from_config(config, tokenizer=tokenizer).save(Path(folder) / "model")
        code = "from pyrformer.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", f"{folder}/model", "--port", "0", "--max-rows", "16"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("/v1")[0].rsplit(":", 1)[1])
            ask(port, options.tokens, 0)
            print(
                f"{'clients':>8}{'requests':>10}{'tok/s':>9}{'p50 s':>8}{'max s':>8}{'MB before':>11}{'MB after':>10}"
            )
            for clients in (1, 2, 4, 8, 16, 32):
                before, began = resident_mb(server.pid), time.perf_counter()
                seeds = range(clients * options.rounds)
                with ThreadPoolExecutor(clients) as pool:
                    found = list(pool.map(lambda seed: ask(port, options.tokens, seed), seeds))
                seconds = time.perf_counter() - began
                latency = [s for s, _ in found]
                print(
                    f"{clients:8}{len(found):10}{sum(n for _, n in found) / seconds:9.0f}"
                    f"{statistics.median(latency):8.2f}{max(latency):8.2f}"
                    f"{before:11.0f}{resident_mb(server.pid):10.0f}"
                )
            server.terminate()


if __name__ == "__main__":
    main()
