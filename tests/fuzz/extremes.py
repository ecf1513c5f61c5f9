"""Numbers of every size for every option: ``python extremes.py FOLDER [CHOICE [NUMBERS]]``.

A table of calls, each with one number left open. Every number of ``VALUES`` is put in, in a forked child with bounds on
its memory and time. The call may work or be refused by one of the package's errors, at the command line by one line and
exit code 2. Anything else is a finding: a signal, another exception, a panic, more than ``SECONDS``. Prints one JSON
line: how many were read and refused, and the findings. CHOICE is a regular expression for the
names of calls, NUMBERS a JSON list in place of ``VALUES``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import pyrformer as pf
from pyrformer import cli
from pyrformer.data.batches import Masking
from pyrformer.data.documents import Documents
from pyrformer.evaluate import evaluate, independence_gap, masked_accuracy
from pyrformer.generation.config import NAMES
from pyrformer.models import FAMILIES
from pyrformer.serve.server import Settings, serve
from pyrformer.training import finders

SECONDS, MEMORY = 10, 6 << 30
LARGE = [1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64]
VALUES: list[Any] = [0, -1, *LARGE, -(1 << 64), float("inf"), float("nan"), True, "a"]
TEXT = "the cat sat on the mat, and the dog lay by the door. " * 12

Call = Callable[[Any], object]
CALLS: dict[str, Call] = {}
#: Calls for which a large number means much work, honestly: they are given two seconds, and may take more.
LONG = re.compile(
    r"(gibbs|mask_predict) (iterations|num_return_sequences)|num_return_sequences drawn|num_labels"
    r"|explain|(evaluate|compare).* spans|find_lr updates"
    r"|(bench.*|sample|train) --(steps|iterations|batch|batch-size|gradient-accumulation-steps|vocab|seq)"
    r"|sample (--(max|min)-|-n|--num-beams)"
    r"|train (\w+ )?(batch_size|gradient_accumulation_steps)"
    r"|config \w+ \w*(size|dim|embeddings|positions|inner|d_model|d_head|n_embd|heads)"
)


# -- What is called ----------------------------------------------------------------------------------------------------


def families() -> dict[str, dict[str, Any]]:
    """A small configuration of each family, by ``model_type``."""
    small = {
        "layers": 1,
        "width": 32,
        "heads": 2,
        "positions": 16,
    }
    made = {}
    for name, (config, _) in FAMILIES.items():
        sizes = {config.SIZES[k]: v for k, v in small.items() if k in config.SIZES}
        inner = dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "hidden_dim"), 16)
        known = {f.name for f in dataclasses.fields(config)}
        extra = {
            k: v
            for k, v in {**inner, "num_key_value_heads": 2, "word_embed_proj_dim": 32}.items()
            if k in known
        }
        made[name] = {**config(vocab_size=300, **sizes, **extra).to_dict(), "model_type": name}
    return made


def prepare_table(folder: Path) -> None:
    """Fills ``CALLS``; the files they read are made in ``folder``."""
    text, lines = folder / "t.txt", folder / "t.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    rows = [{"text": TEXT[i:], "label": "ab"[i % 2]} for i in range(20)]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = pf.Tokenizer.train(iter([TEXT]), kind="bpe", vocab_size=280)
    masked = pf.Tokenizer.train(iter([TEXT]), preset="bert-uncased", vocab_size=280)
    configs = families()
    gpt2 = {**configs["gpt2"], "vocab_size": 280}
    model = pf.Model.from_config(gpt2, tokenizer=tokenizer, threads=1)
    bert = pf.Model.from_config(
        {**configs["bert"], "vocab_size": masked.vocab_size}, tokenizer=masked, threads=1
    )
    xlnet = pf.Model.from_config(configs["xlnet"], threads=1)
    model.save(folder / "gpt2")
    bert.save(folder / "bert")
    tokenizer.save(folder / "tokenizer.json")
    pf.prepare([str(lines)], folder / "prepared", tokenizer, threads=1)
    pf.prepare([str(lines)], folder / "masked", masked, objective="mlm", threads=1)
    corpus, other = pf.Prepared.open(folder / "prepared").corpus, pf.Prepared.open(folder / "masked").corpus

    # Training: all options, for all objectives that read them.
    run: dict[str, Any] = {"files": [str(text)], "out": str(folder / "run"), "overwrite": True, "threads": 1}
    run |= {"seq_len": 8, "batch_size": 2, "max_steps": 2, "log_every": 1, "save_every": 0, "max_time": "1s"}
    plain = {**run, "model": configs["gpt2"], "tokenizer": {"kind": "char"}}
    objectives = {
        "ar": plain,
        "mlm": {
            **run,
            "objective": "mlm",
            "model": configs["bert"],
            "tokenizer": {"path": str(folder / "bert")},
        },
        "plm": {**plain, "objective": "plm", "model": configs["xlnet"]},
        "sentence": {**run, "objective": "sentence", "files": [str(lines)], "model": configs["bert"]}
        | {"tokenizer": {"path": str(folder / "bert")}},
    }

    def train(options: dict[str, Any], **more: Any) -> None:
        options = {**options, **more}
        if more.get("sample_every"):
            options["sample_prompts"] = ["the"]
        pf.train(pf.TrainConfig(**options))

    for f in dataclasses.fields(pf.TrainConfig):
        if "int" in str(f.type) or "float" in str(f.type):
            own = {"plm_probability": "plm", "max_span_length": "plm"}.get(f.name)
            own = own or ("mlm" if "mask" in f.name or "span" in f.name or "mlm" in f.name else "ar")
            CALLS[f"train {f.name}"] = lambda v, n=f.name, o=own: train(objectives[o], **{n: v})
            if f.name in ("batch_size", "seq_len", "gradient_accumulation_steps"):
                for o in ("mlm", "plm", "sentence"):
                    CALLS[f"train {o} {f.name}"] = lambda v, n=f.name, o=o: train(objectives[o], **{n: v})
    for name in ("vocab_size", "min_frequency"):
        CALLS[f"train tokenizer {name}"] = lambda v, n=name: train(plain, tokenizer={"kind": "bpe", n: v})
    for name in ("r", "alpha", "lora_alpha", "dropout"):
        CALLS[f"train lora {name}"] = lambda v, n=name: train(plain, lora={"r": 2, n: v})
    for optim, names in {
        "sgd": ("momentum", "dampening"),
        "rmsprop": ("alpha", "momentum"),
        "adagrad": ("lr_decay", "initial_accumulator_value"),
        "adafactor": ("beta2_decay", "d", "eps"),
        "muon": ("momentum", "ns_steps", "lr"),
        "lion": ("betas",),
    }.items():
        for name in names:
            CALLS[f"train {optim} {name}"] = lambda v, o=optim, n=name: train(
                plain, optim=o, optim_args={n: v}
            )
    for scheduler, names in {
        "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio"),
        "cosine": ("num_cycles",),
        "polynomial": ("power", "lr_end"),
        "inverse_sqrt": ("timescale",),
    }.items():
        for name in names:
            CALLS[f"train {scheduler} {name}"] = lambda v, s=scheduler, n=name: train(
                plain, lr_scheduler_type=s, lr_scheduler_kwargs={n: v}
            )
    CALLS["train weight_decay_groups"] = lambda v: train(plain, weight_decay_groups={"*.bias": v})
    CALLS["train max_time"] = lambda v: train(plain, max_time=f"{v}s")
    CALLS["train memory"] = lambda v: train(plain, memory=f"{v}GB")
    CALLS["train save_every text"] = lambda v: train(plain, save_every=str(v))
    for name in ("low", "high", "updates"):
        CALLS[f"find_lr {name}"] = lambda v, n=name: finders.find_learning_rate(
            pf.TrainConfig(**plain), **{"updates": 10, n: v}
        )
    CALLS["find_batch_size"] = lambda v: finders.find_batch_size(pf.TrainConfig(**plain), f"{v}GB")

    # Data.
    for objective, (texts, tok) in {
        "ar": (corpus, None),
        "prefix": (corpus, None),
        "mlm": (other, masked),
        "plm": (corpus, None),
    }.items():
        for name in (
            "seq_len",
            "batch_size",
            "seed",
            "rank",
            "world_size",
            "plm_probability",
            "max_span_length",
        ):
            CALLS[f"Batches {objective} {name}"] = lambda v, o=objective, n=name, c=texts, t=tok: pf.Batches(
                c, o, tokenizer=t, **{"seq_len": 8, "batch_size": 2, n: v}
            ).batch(0)
        made = pf.Batches(texts, objective, tokenizer=tok, seq_len=8, batch_size=2)
        for method in ("batch", "documents"):
            CALLS[f"Batches {objective} {method}"] = lambda v, b=made, m=method: getattr(b, m)(v)
    for f in dataclasses.fields(Masking):
        if f.name != "whole_word":
            CALLS[f"Masking {f.name}"] = lambda v, n=f.name: pf.Batches(
                other,
                "mlm",
                tokenizer=masked,
                seq_len=8,
                batch_size=2,
                masking=Masking(**{"span_p": 0.2 if n == "span_max_length" else 0.0, n: v}),
            ).batch(0)
    CALLS["Documents min-length"] = lambda v: list(Documents(str(text), clean=[f"min-length={v}"]))
    for name in ("shard_tokens", "threads"):
        CALLS[f"prepare {name}"] = lambda v, n=name: pf.prepare(
            [str(lines)], folder / f"p{os.getpid()}", tokenizer, **{n: v}
        )
    for kind in ("bpe", "wordpiece", "char", "unigram"):
        for name in ("vocab_size", "min_frequency", "threads"):
            options = {"preset": "xlnet"} if kind == "unigram" else {"kind": kind}
            CALLS[f"Tokenizer.train {kind} {name}"] = lambda v, n=name, o=options: pf.Tokenizer.train(
                iter([TEXT]), **{"vocab_size": 280, **o, n: v}
            )
    CALLS["Tokenizer threads"] = lambda v: tokenizer.encode_batch(["the"], threads=v)
    CALLS["Tokenizer decode"] = lambda v: tokenizer.decode([v])
    CALLS["Tokenizer begins_word"] = lambda v: tokenizer.begins_word([v])
    CALLS["Tokenizer id_to_token"] = lambda v: tokenizer.id_to_token(v)
    CALLS["Tokenizer is_special"] = lambda v: tokenizer.is_special(v)
    CALLS["Tokenizer stream"] = lambda v: tokenizer.stream_decoder().push(v)

    # Models.
    for family, config in configs.items():
        for name, value in config.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number or value is None:
                CALLS[f"config {family} {name}"] = lambda v, c=config, n=name: use(c | {n: v})
        for part in ("rope_parameters", "rope_scaling"):
            for name in ("rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"):
                for kind in ("linear", "dynamic", "yarn", "llama3"):
                    if "rope_parameters" in config:
                        base = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0}
                        base |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}
                        CALLS[f"config {family} {part} {kind} {name}"] = (
                            lambda v, c=config, p=part, b=base, n=name: use(c | {p: b | {n: v}})
                        )
    CALLS["config num_labels"] = lambda v: use(
        configs["bert"] | {"architectures": ["BertForSequenceClassification"], "num_labels": v}
    )
    CALLS["from_config seed"] = lambda v: pf.Model.from_config(gpt2, seed=v, threads=1)
    CALLS["from_config threads"] = lambda v: pf.Model.from_config(gpt2, threads=v)([[1, 2]])
    CALLS["load threads"] = lambda v: pf.load(folder / "gpt2", threads=v)([[1, 2]])
    CALLS["save max_shard_size"] = lambda v: model.save(folder / "saved", max_shard_size=v)
    CALLS["add_lora r"] = lambda v: pf.Model.from_config(gpt2, threads=1).add_lora(r=v)
    CALLS["add_lora seed"] = lambda v: pf.Model.from_config(gpt2, threads=1).add_lora(r=1, seed=v)

    def view(rows: int, cols: int) -> Any:
        return np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (rows, cols), (0, 0))

    CALLS["call id"] = lambda v: model([[v, 1]])
    CALLS["call rows"] = lambda v: model(view(v, 1) if whole(v) else v)
    CALLS["call width"] = lambda v: model(view(1, v) if whole(v) else v)
    CALLS["call bert rows"] = lambda v: bert(view(v, 1) if whole(v) else v)
    CALLS["call xlnet rows"] = lambda v: xlnet(view(v, 1) if whole(v) else v)
    for name in ("attention_mask", "token_type_ids", "labels", "position_ids"):
        CALLS[f"call {name}"] = lambda v, n=name: model([[1, 2]], **{n: [[v, 1]]})
        CALLS[f"call bert {name}"] = lambda v, n=name: bert([[1, 2]], **{n: [[v, 1]]})
    CALLS["call prefix"] = lambda v: model([[1, 2]], prefix=[v])
    CALLS["call labels rows"] = lambda v: bert([[1, 2]], labels=view(v, 1) if whole(v) else v)
    CALLS["call perm_mask"] = lambda v: xlnet([[1, 2]], perm_mask=[[[v, 0], [0, 1]]])

    # Generating and measuring.
    words = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    beams = {"length_penalty", "num_beam_groups", "diversity_penalty", "patience"}
    for name in sorted(NAMES - {"max_time"} | {"first_sequence", "output_steps"}):
        extra: dict[str, Any] = {"max_new_tokens": 4, "max_time": 2.0}
        extra |= {"do_sample": True} if name in words else {}
        extra |= {"num_beams": 4} if name in beams else {}
        CALLS[f"generate {name}"] = lambda v, n=name, e=extra: model.generate("the cat", **{**e, n: v})
        CALLS[f"generate list {name}"] = lambda v, n=name, e=extra: model.generate(
            "the cat", **{**e, n: [[v], v]}
        )
        CALLS[f"stream {name}"] = lambda v, n=name, e=extra: list(model.stream("the cat", **{**e, n: v}))
    CALLS["stream ids"] = lambda v: list(model.stream([v], max_new_tokens=2))
    CALLS["astream max_new_tokens"] = lambda v: asyncio.run(
        read(model.astream("the", max_new_tokens=v, max_time=2.0))
    )
    CALLS["generate num_return_sequences drawn"] = lambda v: model.generate(
        "the", max_new_tokens=2, do_sample=True, num_return_sequences=v
    )
    CALLS["generate num_beams and results"] = lambda v: model.generate(
        "the", max_new_tokens=2, num_beams=v, num_return_sequences=v
    )
    CALLS["generate max_time"] = lambda v: model.generate("the", max_new_tokens=2, max_time=v)
    CALLS["generate ids"] = lambda v: model.generate([[v]], max_new_tokens=2)
    CALLS["generate suppress_tokens"] = lambda v: model.generate("the", max_new_tokens=2, suppress_tokens=[v])
    CALLS["generate drafts"] = lambda v: model.generate(
        "the cat",
        max_new_tokens=4,
        assistant_model=pf.load(folder / "gpt2", threads=1),
        num_assistant_tokens=v,
    )
    CALLS["generate contrast"] = lambda v: model.generate("the", max_new_tokens=2, penalty_alpha=0.5, top_k=v)
    for name in ("top_k", "top_p", "temperature", "min_p", "typical_p", "min_tokens_to_keep", "top_h"):
        CALLS[f"filter_logits {name}"] = lambda v, n=name: pf.filter_logits(
            np.zeros((2, 5), np.float32), **{n: v}
        )
    CALLS["filter_logits rows"] = lambda v: pf.filter_logits(view(v, 1) if whole(v) else v, top_k=1)
    for name in ("context", "stride", "mask_token_id", "order"):
        CALLS[f"score {name}"] = lambda v, n=name: model.score([TEXT], **{n: v})
        CALLS[f"score masked {name}"] = lambda v, n=name: bert.score(["the cat sat"], **{n: v})
    CALLS["score ids"] = lambda v: model.score([[v, 1]])
    CALLS["embed ids"] = lambda v: bert.embed([[v, 1]])
    CALLS["fill_mask top_k"] = lambda v: bert.fill_mask("the [MASK] cat", top_k=v)
    filling = {
        "mask_predict": ("iterations", "mask_token_id"),
        "gibbs": ("iterations", "mask_token_id", "num_return_sequences", "seed", "top_k", "temperature"),
    }
    for function, names in filling.items():
        for name in names:
            CALLS[f"{function} {name}"] = lambda v, f=function, n=name: getattr(bert, f)(
                "the [MASK] cat", **{n: v}
            )
    CALLS["explain max_tokens"] = lambda v: model.explain("the cat", max_tokens=v)
    CALLS["evaluate stride"] = lambda v: evaluate(model, [TEXT], stride=v)
    CALLS["evaluate orders"] = lambda v: evaluate(xlnet, [[5, 6, 7]], orders=[v])
    for name in ("length", "spans", "seed"):
        CALLS[f"evaluate gap {name}"] = lambda v, n=name: independence_gap(bert, [TEXT], **{n: v})
    for name in ("rate", "seed"):
        CALLS[f"evaluate accuracy {name}"] = lambda v, n=name: masked_accuracy(bert, [TEXT], **{n: v})
    CALLS["mbr weights"] = lambda v: pf.mbr(["a", "b"], weights=[v, 1.0])
    CALLS["attention ids"] = lambda v: model.attention([v, 1])
    CALLS["attention perm_mask"] = lambda v: xlnet.attention([1, 2], perm_mask=[[[v, 0], [0, 1]]])
    CALLS["Tokenizer decode_after"] = lambda v: tokenizer.decode_after([v], [v])
    command_line(folder, text, lines)
    serving(folder, model, bert)


def serving(folder: Path, model: pf.Model, bert: pf.Model) -> None:
    """The server's options, and the fields of its requests."""
    template = folder / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    chats, said = {"chat_template": str(template)}, [{"role": "user", "content": "the cat"}]
    asked = {"prompt": "the cat", "max_tokens": 2}
    numbers = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "logprobs", "best_of"]
    numbers += ["presence_penalty", "frequency_penalty", "repetition_penalty", "echo", "stream", "stop"]
    for name in numbers:
        for kind, more in {
            "": {},
            "stream ": {"stream": True},
            "echo ": {"echo": True, "logprobs": 1},
        }.items():
            CALLS[f"serve {kind}{name}"] = lambda v, n=name, m=more: ask(
                model, "/v1/completions", {**asked, **m, n: v}
            )
    for name in (*numbers[:7], "max_completion_tokens", "top_logprobs"):
        CALLS[f"serve chat {name}"] = lambda v, n=name: ask(
            model, "/v1/chat/completions", {"messages": said, "logprobs": True, n: v}, **chats
        )
    for name, body in {"logit_bias": lambda v: {"1": v}, "logit_bias id": lambda v: {str(v): 1}}.items():
        CALLS[f"serve {name}"] = lambda v, b=body: ask(
            model, "/v1/completions", {**asked, "logit_bias": b(v)}
        )
    CALLS["serve prompt"] = lambda v: ask(model, "/v1/completions", {**asked, "prompt": [v]})
    CALLS["serve input"] = lambda v: ask(bert, "/v1/embeddings", {"input": [v]})
    for name in ("max_length", "max_rows", "max_waiting", "max_body", "timeout"):
        CALLS[f"serve settings {name}"] = lambda v, n=name: ask(model, "/v1/completions", asked, **{n: v})
    for name in ("port", "stop_seconds"):
        CALLS[f"serve {name}"] = lambda v, n=name: briefly(
            lambda: serve({"m": model}, Settings(), **{"port": 0, n: v})
        )


async def read(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


def ask(model: pf.Model, path: str, body: dict[str, Any], **settings: Any) -> None:
    """Sends a request to a server that begins and ends here, without a socket."""
    from pyrformer.serve.app import Server

    server = Server({"m": model}, Settings(**settings))
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}
    unread, sent = [{"type": "http.request", "body": json.dumps(body).encode()}], []

    async def receive() -> dict[str, Any]:
        while not unread:
            await asyncio.sleep(60)
        return unread.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(server.app(scope, receive, send))
    status, text = sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()
    for one in server.served.values():
        one.engine.stop()
    if status != 200 or '{"error"' in text:
        said = json.loads(text.removeprefix("data: ").split("\n\n")[0])["error"]["message"]
        if "internal error" in said or "Error: " in said or "\n" in said:
            raise AssertionError(f"status {status}: {said}")
        raise pf.Error("[serve] refused")


def briefly(work: Callable[[], object]) -> None:
    """Runs what serves; it ends as soon as it takes connections."""
    import uvicorn

    async def nothing(_: Any) -> None:
        return

    uvicorn.Server.main_loop = nothing  # type: ignore[method-assign]
    work()


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 61


def use(config: dict[str, Any]) -> None:
    """Builds a model and reads three tokens with it."""
    pf.Model.from_config(config, threads=1)([[1, 2, 3]])


def command_line(folder: Path, text: Path, lines: Path) -> None:
    """All options of all commands that take a number."""
    gpt2, bert, tokenizer = str(folder / "gpt2"), str(folder / "bert"), str(folder / "tokenizer.json")
    small = ["--layers", "1", "--width", "8", "--heads", "2", "--seq-len", "8", "--batch-size", "2"]
    small += ["--max-steps", "2", "--max-time", "1s", "--overwrite", "--tokenizer", "char", "--threads", "1"]
    commands: dict[str, list[str]] = {
        "bench train-step": [
            "--layers",
            "1",
            "--width",
            "8",
            "--heads",
            "2",
            "--seq",
            "8",
            "--batch",
            "2",
            "--steps",
            "1",
        ],
        "compare": [gpt2, gpt2, str(text)],
        "data show": [str(text), "--tokenizer", tokenizer],
        "eval": [gpt2, str(text)],
        "explain": [gpt2, "the cat", "--out", str(folder / "page.html")],
        "fill-mask": [bert, "the [MASK] cat"],
        "plan": [gpt2],
        "prepare": [str(lines), "--tokenizer", tokenizer, "--out", str(folder / "q")],
        "sample": [gpt2, "the cat"],
        "score": [gpt2, str(text)],
        "embed": [bert, str(text)],
        "tokenize": [tokenizer, str(text)],
        "tokenizer train": [str(text), "--out", str(folder / "new.json")],
        "train": [str(text), "--out", str(folder / "run"), *small],
        "serve": [gpt2, "--port", "0"],
    }
    for name, base in commands.items():
        command: click.Command = cli.main
        for part in name.split():
            found = (
                command.get_command(click.Context(command), part)
                if isinstance(command, click.Group)
                else None
            )
            if found is None:
                raise SystemExit(f"there is no command {name}")
            command = found
        for option in command.params:
            if (
                not isinstance(option, click.Option)
                or option.is_flag
                or isinstance(option.type, click.Choice)
            ):
                continue
            plain = isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType))
            if (
                plain
                or option.name in ("memory", "find_batch_size", "max_time", "save_every")
                or "json" in repr(option.type)
            ):
                flag = option.opts[0]
                CALLS[f"cli {name} {flag}"] = lambda v, c=name, b=base, f=flag: (
                    briefly if c == "serve" else apply
                )(lambda: called([*c.split(), *b, f, str(v)]))


def apply(work: Callable[[], object]) -> None:
    work()


def called(arguments: list[str]) -> None:
    """Runs a command; what it prints is looked at."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(args=arguments, prog_name="pyrformer")
    except SystemExit as e:
        said = err.getvalue().strip()
        if e.code in (0, None):
            return
        if "Traceback" in said or not (
            "pyrformer: error: [" in said or "Error: " in said or "nonfinite" in said
        ):
            raise AssertionError(f"exit code {e.code}: {said[-300:]}") from None
        raise pf.Error("[cli] refused") from None


# -- The children ------------------------------------------------------------------------------------------------------


def outcomes(call: Call, values: list[Any], seconds: int) -> list[str]:
    """What becomes of a call with each value, in a child, or in another where one ended it: "ok", "refused", or what
    went wrong."""
    found: list[str] = []
    while len(found) < len(values):
        end, begin = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(end)
            _child(call, values[len(found) :], begin, seconds)
        os.close(begin)
        with open(end, "rb") as pipe:
            *told, rest = pipe.read().decode("utf-8", "replace").split("\0")
        found += [one.rpartition("\1")[2] for one in told]  # what was printed before is left out
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            found.append("time ran out" if number == signal.SIGALRM else f"signal {number}: {rest[:200]}")
    return found


def _child(call: Call, values: list[Any], pipe: int, seconds: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(pipe, 2)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for value in values:
        signal.alarm(seconds)
        try:
            call(value)
            said = "ok"
        except pf.Error as e:
            said = "refused" if "\n" not in str(e).strip() and str(e).startswith("[") else f"no sentence: {e}"
            said = f"internal: {e}" if "internal error" in str(e) else said
        except BaseException as e:
            trace = e.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            said = f"{type(e).__name__}: {e} at {place}"[:300]
        os.write(pipe, b"\1" + said.replace("\0", "").encode("utf-8", "replace") + b"\0")
    os._exit(0)


def main(folder: Path, choice: str, values: list[Any]) -> None:
    prepare_table(folder)
    totals: Counter[str] = Counter()
    findings = []
    for name, call in CALLS.items():
        if not re.search(choice, name):
            continue
        totals["calls"] += 1
        long = bool(LONG.search(name))
        for value, found in zip(values, outcomes(call, values, 2 if long else SECONDS), strict=True):
            honest = found == "time ran out" and long
            if honest or found in ("ok", "refused"):
                totals["ok" if honest else found] += 1
                continue
            findings.append(f"{name} = {value!r}: {found}")
            sys.stderr.write(findings[-1] + "\n")
            sys.stderr.flush()
        for left in folder.glob("p[0-9]*"):
            shutil.rmtree(left, ignore_errors=True)
    sys.stdout.write(json.dumps({**totals, "findings": findings}) + "\n")


if __name__ == "__main__":
    chosen = json.loads(sys.argv[3]) if len(sys.argv) > 3 else VALUES
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "", chosen)
