"""Mutated files: ``python fuzz.py FOLDER TARGET CASES SEED``.

Each target makes sound files once; every case changes one of them a little and reads it. That may work or raise one of
the package's errors. Anything else ends the process: a panic, another exception, a time of more than 10 s, more than 1
GiB of memory. The files of the case at hand lie in FOLDER/case, and its seed in FOLDER/seed, for looking at it again.
Prints a JSON line: cases read and refused, and how many different messages there were.

``corpus.zip`` holds changed files, one for each message that readers had, and those that once ended a process. They are
read before all others, and many cases change one of them further. What gives a message that is not known is left in
FOLDER/found; ``python fuzz.py --merge FOLDER…`` adds that to the corpus.
"""

from __future__ import annotations

import base64
import csv
import faulthandler
import gzip
import json
import random
import re
import resource
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import pyrformer as pf
from pyrformer import _core
from pyrformer.checkpoint import read_json
from pyrformer.cli.train import read_toml
from pyrformer.data.documents import Documents
from pyrformer.data.prepared import Prepared, prepare
from pyrformer.data.supervised import read_labelled
from pyrformer.data.tagging import read_tagged
from pyrformer.models import FAMILIES, build
from pyrformer.report import report
from pyrformer.training.checkpoints import Checkpoints, read_state
from pyrformer.training.failure import replay

SECONDS, MEMORY = 10, 1 << 30
CORPUS = Path(__file__).with_name("corpus.zip")
#: The largest changed file that the corpus takes, and how many of a target, the smallest ones; how often a case begins
#: with one of its files.
MOST_FILE, MOST_FILES, SHARE = 6 << 10, 40, 0.3
TEXT = "the cat sat on the mat, and the dog lay by the door. " * 12
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}
#: What numbers and values of texts are replaced by.
NUMBERS = ("-1", "0", "1", "65536", "2147483648", "4294967296", "9223372036854775807", "1e400", "-1.5", "NaN")
VALUES = (
    *(None, True, -1, 0, 1.5, 1 << 31, 1 << 63, 1 << 64, float("inf"), float("nan")),
    *("", "x", "\ud83d", [], {}, [[]]),
)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, *b'"{}[],:\n\r\t 0-\\')


# -- Changes ----------------------------------------------------------------------------------------------------------


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, removed, doubled or moved."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at = draw.randrange(len(out) + 1)
        length = min(draw.choice((1, 2, 4, 8, 16, 64, 1024)), len(out) - at)
        kind = draw.randrange(7)
        if kind == 0 and length:
            out[draw.randrange(at, at + length)] ^= 1 << draw.randrange(8)
        elif kind == 1 and length:
            out[at] = draw.choice(INTERESTING)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 8)))
        elif kind == 5:
            del out[at:]
        elif length >= 8:  # a length or an offset
            out[at : at + 8] = draw.choice((1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1, len(out))).to_bytes(
                8, "little"
            )
    return bytes(out)


def change_text(data: bytes, draw: random.Random) -> bytes:
    """One number replaced by another."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not numbers:
        return change_bytes(data, draw)
    found = draw.choice(numbers)
    return data[: found.start()] + draw.choice(NUMBERS).encode() + data[found.end() :]


def change_json(data: bytes, draw: random.Random) -> bytes:
    """One value of a JSON text replaced, removed, doubled, or nested deeply."""
    if draw.random() < 0.02:
        depth = draw.choice((100, 10_000, 200_000))
        return b"[" * depth + b"]" * draw.choice((depth, 0))
    value = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    if places:
        node, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node[key], list):
            node[key] = node[key] * 2
        elif kind == 2:
            other, place = draw.choice(places)
            with suppress(KeyError, IndexError):
                node[key] = json.loads(json.dumps(other[place]))
        else:
            node[key] = draw.choice(VALUES)
    return json.dumps(value).encode()


def changed(name: str, data: bytes, draw: random.Random) -> bytes:
    """A file with something changed, in the manner of its kind."""
    how = draw.random()
    if name.endswith(".json") and how < 0.6:
        return change_json(data, draw)
    if name.endswith((".jsonl", ".csv", ".tsv", ".toml", ".txt", ".tiktoken", ".json")) and how < 0.75:
        return change_text(data, draw)
    if name.endswith(".safetensors") and how < 0.6:
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        header = change_json(header, draw) if draw.random() < 0.6 else change_text(header, draw)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if name.endswith(".gz") and how < 0.5:
        return gzip.compress(change_bytes(gzip.decompress(data), draw), 1)
    return change_bytes(data, draw)


# -- Targets: files, and what reads them ------------------------------------------------------------------------------


class Target:
    """Files that are changed, and a function that reads the changed ones; ``only``: what may be changed."""

    def __init__(
        self, folder: Path, read: Callable[[Path], object], only: Callable[[str], bool] = lambda _: True
    ):
        self.folder, self.read = folder, read
        self.files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and only(p.name))


def tokenizer() -> pf.Tokenizer:
    return pf.Tokenizer.train(iter([TEXT]), kind="bpe", vocab_size=280)


def use_tokenizer(path: Path, **options: Any) -> None:
    tok = pf.Tokenizer.load(path, **options)
    ids = tok.encode("the cat, a [MASK] ☃\n", pair=None).ids
    tok.decode(ids)
    tok.decode(ids, skip_special_tokens=False)


def safetensors(folder: Path) -> Target:
    arrays = {
        "a": np.ones((2, 3), np.float32),
        "b.c": np.zeros(5, np.float64),
        "i": np.arange(4, dtype=np.int32),
    }
    _core.write_safetensors(folder / "x.safetensors", arrays)

    def read(path: Path) -> None:
        stored = _core.SafeTensors(path / "x.safetensors")
        for name, dtype, _ in stored.tensors():
            (stored.get_int32 if dtype == "I32" else stored.get)(name)

    return Target(folder, read)


def model_folder(folder: Path) -> Target:
    pf.Model.from_config({**GPT2, "vocab_size": 280}, tokenizer=tokenizer(), threads=1).save(folder)

    def read(path: Path) -> None:
        model = pf.load(path, threads=1)
        model.generate("the", max_new_tokens=2)

    return Target(folder, read, lambda name: name != "tokenizer.json")


def gguf(folder: Path) -> Target:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "vocab_size": 280,
    }
    pf.Model.from_config(config, tokenizer=tokenizer(), threads=1).save(folder / "x.gguf")
    return Target(folder, lambda path: pf.load(path / "x.gguf", threads=1))


def tokenizer_json(kind: str, preset: str | None = None) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        options = {"preset": preset} if preset else {"kind": kind}
        pf.Tokenizer.train(iter([TEXT]), vocab_size=280, **options).save(folder / "tokenizer.json")
        return Target(folder, lambda path: use_tokenizer(path / "tokenizer.json"))

    return make


def vocabularies(folder: Path) -> Target:
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" c", b"at"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))
    (folder / "x.tiktoken").write_bytes(lines)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a", "the", "##t"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")

    def read(path: Path) -> None:
        use_tokenizer(path / "x.tiktoken", split="cl100k")
        use_tokenizer(path / "vocab.txt")

    return Target(folder, read)


def merges(folder: Path) -> Target:
    tok = json.loads(tokenizer().to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(tok["vocab"]), encoding="utf-8")
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in tok["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return Target(folder, lambda path: use_tokenizer(path / "vocab.json"))


def sentencepiece(folder: Path) -> Target:
    """SentencePiece's ``.model``: a message of protocol buffers, written by hand. Source: sentencepiece_model.proto."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)

    def message(field: int, content: bytes) -> bytes:
        return number(field << 3 | 2) + number(len(content)) + content

    def varint(field: int, value: int) -> bytes:
        return number(field << 3) + number(value)

    def piece(text: str, score: float, kind: int) -> bytes:
        return message(1, message(1, text.encode()) + b"\x15" + np.float32(score).tobytes() + varint(3, kind))

    special = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
    words = ["▁", "▁the", "▁cat", "at", "▁a", *"abcdefghijklmnopqrstuvwxyz,."]
    for name, kind in (("unigram", 1), ("bpe", 2)):
        pieces = [piece(word, -1.0 - i, 1) for i, word in enumerate(words)]
        bytes_ = [piece(f"<0x{i:02X}>", 0, 6) for i in range(256)] if kind == 2 else []
        trainer = message(2, varint(3, kind) + (varint(35, 1) if kind == 2 else b""))
        normalizer = message(3, message(1, b"identity") + varint(3, 1) + varint(4, 1) + varint(5, 1))
        (folder / f"{name}.model").write_bytes(b"".join([*special, *bytes_, *pieces, trainer, normalizer]))
    return Target(folder, lambda path: [use_tokenizer(f) for f in sorted(path.iterdir())])


def shards(folder: Path) -> Target:
    model = pf.Model.from_config({**GPT2, "vocab_size": 280}, tokenizer=tokenizer(), threads=1)
    model.save(folder, max_shard_size=2000)
    return Target(
        folder, lambda path: pf.load(path, threads=1), lambda name: name.endswith(".safetensors.index.json")
    )


def generation(folder: Path) -> Target:
    model = pf.Model.from_config({**GPT2, "vocab_size": 280}, tokenizer=tokenizer(), threads=1)
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": 5, "temperature": 0.7, "eos_token_id": [1, 2]}
    options |= {"bad_words_ids": [[1, 2]], "sequence_bias": [[[3], -1.0]], "repetition_penalty": 1.2}
    options |= {"stop_strings": ["x"], "num_return_sequences": 2, "min_length": 2, "max_time": 1.0}
    beams = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_length": 8}
    beams |= {"early_stopping": "never", "length_penalty": 0.7, "exponential_decay_length_penalty": [2, 1.1]}
    for name, found in (("drawn", options), ("beams", beams)):
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")

    def read(path: Path) -> None:
        for file in sorted(path.iterdir()):
            stored = pf.GenerationConfig.load(file)
            model.generate("the", stored, max_time=0.5)

    return Target(folder, read)


def labelled(folder: Path) -> Target:
    rows = [{"tokens": ["the", "cat"], "tags": ["O", "B-X"]}, {"tokens": ["a"], "tags": [1]}]
    (folder / "words.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "words.conll").write_text("the DT O\ncat NN B-X\n\nsat VB O\n", encoding="utf-8")
    texts = [{"text": "the cat", "label": "a"}, {"text": "the dog", "label": 3}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts), encoding="utf-8")
    (folder / "texts.csv").write_text('text,label\nthe cat,a\n"the ""dog""",b\n', encoding="utf-8")
    (folder / "texts.tsv").write_text("label\ttext\na\tthe cat\nb\tthe dog\n", encoding="utf-8")

    def read(path: Path) -> None:
        for file in sorted(path.iterdir()):
            (read_tagged if file.stem == "words" else read_labelled)([str(file)])

    return Target(folder, read)


def prepared(folder: Path) -> Target:
    text = folder.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(20)), encoding="utf-8")
    folder.rmdir()
    prepare([str(text)], folder, tokenizer())

    def read(path: Path) -> None:
        opened = Prepared.open(path)
        batches = pf.Batches(opened.corpus, "ar", seq_len=8, batch_size=2)
        for step in range(3):
            batches.batch(step)

    return Target(folder, read, lambda name: not name.startswith("tokenizer"))


def documents(folder: Path) -> Target:
    rows = [{"text": TEXT[i : i + 60], "n": i} for i in range(0, 200, 20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with (folder / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["n", "text"])
        writer.writeheader()
        writer.writerows([{**row, "text": row["text"] + '"\n'} for row in rows])
    (folder / "d.txt").write_text(TEXT + "äöü☃", encoding="utf-8")
    with suppress(ImportError):
        import zstandard

        (folder / "e.txt.zst").write_bytes(zstandard.compress(TEXT.encode()))

    def read(path: Path) -> None:
        for file in sorted(path.iterdir()):
            list(Documents(str(file)))

    return Target(folder, read)


def parquet(folder: Path) -> Target:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for codec in ("snappy", "none", "zstd"):
        pq.write_table(
            pa.table({"text": [TEXT[i:] for i in range(9)]}), folder / f"{codec}.parquet", compression=codec
        )
    return Target(folder, lambda path: [list(Documents(str(file))) for file in path.iterdir()])


def config_toml(folder: Path) -> Target:
    (folder / "c.toml").write_text(
        "[train]\nfiles = ['a.txt']\nout = 'run'\nmax_steps = 10\nlearning_rate = 1e-3\nsave_every = '10m'\n"
        "memory = '2GB'\noptim = 'sgd'\noptim_args = {momentum = 0.9}\nweight_decay_groups = {'*.bias' = 0.0}\n"
        "lr_scheduler_type = 'warmup_stable_decay'\nlr_scheduler_kwargs = {num_decay_steps = 2}\n"
        "[model]\nmodel_type = 'gpt2'\nn_layer = 2\n[tokenizer]\nkind = 'bpe'\nvocab_size = 300\n",
        encoding="utf-8",
    )
    return Target(
        folder, lambda path: pf.TrainConfig(**{"files": ["a"], "out": "b"} | read_toml(str(path / "c.toml")))
    )


def config_json(folder: Path) -> Target:
    for name, (config, _) in FAMILIES.items():
        made = config(vocab_size=100).to_dict()
        (folder / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")

    def read(path: Path) -> None:
        for file in sorted(path.iterdir()):
            build(read_json(file))

    return Target(folder, read)


def a_run(folder: Path, **options: Any) -> None:
    text = folder.parent / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small: dict[str, Any] = {
        "seq_len": 8,
        "batch_size": 2,
        "max_steps": 3,
        "save_every": 1,
        "log_every": 1,
        "threads": 1,
    }
    config = {**small, "model": GPT2, "tokenizer": {"kind": "char"}, "sample_prompts": ["the"], **options}
    with suppress(pf.Error):
        pf.train(pf.TrainConfig(files=[str(text)], out=str(folder), overwrite=True, **config))


def run_folder(folder: Path) -> Target:
    a_run(folder)

    def read(path: Path) -> None:
        report([path])

    return Target(
        folder, read, lambda n: n in ("training.json", "metrics.jsonl", "samples.jsonl", "config.json")
    )


def checkpoint(folder: Path) -> Target:
    a_run(folder)

    def read(path: Path) -> None:
        checkpoints = Checkpoints(path, 0)
        newest, _ = checkpoints.newest()
        read_state(checkpoints.path(newest or 0))
        # And without the manifest's protection.
        pf.load(path / "checkpoint-3", threads=1)
        read_state(path / "checkpoint-3")

    return Target(folder, read, lambda name: name in ("manifest.json", "trainer_state.json", "config.json"))


def failure(folder: Path) -> Target:
    a_run(folder, learning_rate=1e25, max_grad_norm=0.0, warmup_steps=0)
    names = ("failure.json", "batch.safetensors")
    return Target(folder, replay, lambda name: name in names)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": safetensors,
    "model": model_folder,
    "gguf": gguf,
    "bpe": tokenizer_json("bpe"),
    "wordpiece": tokenizer_json("wordpiece", "bert-uncased"),
    "unigram": tokenizer_json("unigram", "xlnet"),
    "vocabularies": vocabularies,
    "merges": merges,
    "sentencepiece": sentencepiece,
    "shards": shards,
    "generation": generation,
    "labelled": labelled,
    "prepared": prepared,
    "documents": documents,
    "parquet": parquet,
    "toml": config_toml,
    "config": config_json,
    "run": run_folder,
    "checkpoint": checkpoint,
    "failure": failure,
}


def write(path: Path, data: bytes) -> None:
    """Writes a new file: some file systems flush one that is cut off and written again."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def kind_of(message: str) -> str:
    """A message without what differs from file to file: names, numbers, places."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|[^\s]*/[^\s]*|[-\w.]*\d[-\w.]*", "", message)
    return "-".join(re.findall(r"[a-z]+", plain.lower())[:9])[:60]


def corpus_of(target: str) -> list[tuple[Path, bytes]]:
    """The changed files of a target: their names among its sound files, and their contents."""
    if not CORPUS.exists():
        return []
    with zipfile.ZipFile(CORPUS) as stored:
        names = [name for name in sorted(stored.namelist()) if name.startswith(f"{target}/")]
        return [(Path(*Path(name).parts[1:-1]), stored.read(name)) for name in names]


def merge(folders: list[Path]) -> int:
    """Adds what runs found to the corpus, of each message the smallest file; its size. A file that ended a process is
    called ``TARGET/NAME/once-failed-…`` and stays."""
    kept: dict[str, bytes] = {}
    if CORPUS.exists():
        with zipfile.ZipFile(CORPUS) as stored:
            kept = {name: stored.read(name) for name in stored.namelist()}
    for folder in folders:
        for path in sorted((folder / "found").rglob("*")):
            name = str(path.relative_to(folder / "found"))
            if path.is_file() and len(data := path.read_bytes()) < len(kept.get(name, bytes(MOST_FILE))):
                kept[name] = data
    counts: Counter[str] = Counter()
    with zipfile.ZipFile(CORPUS, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as stored:
        for name in sorted(kept, key=lambda name: (len(kept[name]), name)):
            target = name.partition("/")[0]
            counts[target] += 1
            if counts[target] <= MOST_FILES or "once-failed" in name:
                stored.writestr(
                    zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), kept[name], zipfile.ZIP_DEFLATED
                )
    return CORPUS.stat().st_size


def _limit(seconds: float) -> None:
    """Ends the process, telling where it was, after so many seconds of the processor, or ten times as many of the
    wall clock; 0: lets it be."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


class Reader:
    """Reads a target's files with one of them changed, and counts what becomes of it."""

    def __init__(self, place: Path, target: Target, name: str):
        self.place, self.target, self.name = place, target, name
        self.outcomes: Counter[str] = Counter()
        self.messages: dict[str, int] = {}

    def read(self, file: Path, data: bytes, known: bool = False) -> None:
        case, sound = self.place / "case" / file, (self.place / "sound" / file).read_bytes()
        write(case, data)
        _limit(SECONDS)
        try:
            self.target.read(self.place / "case")
            self.outcomes["read"] += 1
        except pf.Error as e:
            if "\n" in str(e).strip() or not str(e).startswith("[") or "internal error" in str(e):
                raise SystemExit(f"no sentence of ours: {e}") from None
            self.outcomes["refused"] += 1
            self._note(kind_of(str(e)), file, data, known)
        finally:
            _limit(0)
        write(case, sound)

    def _note(self, kind: str, file: Path, data: bytes, known: bool) -> None:
        """Leaves the smallest file that gave a message which the corpus does not give."""
        size = -1 if known else len(data)
        if size < self.messages.get(kind, MOST_FILE):
            self.messages[kind] = size
            if not known:
                out = self.place / "found" / self.name / file / kind
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(data)


def fuzz(place: Path, name: str, cases: int, seed: int) -> Counter[str]:
    """Reads the corpus, then changes and reads; what became of the cases."""
    sound = place / "sound"
    sound.mkdir()
    target = TARGETS[name](sound)
    target.read(sound)
    shutil.copytree(sound, place / "case")
    for number in (signal.SIGALRM, signal.SIGPROF):
        faulthandler.register(number, chain=True)  # tells where, then ends the process
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    at = (place / "seed").open("w", encoding="ascii")
    reader = Reader(place, target, name)
    stored = [(file, data) for file, data in corpus_of(name) if file in target.files]
    for i, (file, data) in enumerate(stored):
        at.seek(0)
        at.write(f"corpus {i} {file}\n")
        at.flush()
        reader.read(file, data, known=True)
    for i in range(cases):
        draw = random.Random(f"{name} {seed} {i}")
        at.seek(0)
        at.truncate()
        at.write(f"{seed} {i}")
        at.flush()
        file = draw.choice(target.files)
        data = (sound / file).read_bytes()
        others = [d for f, d in stored if f == file]
        if others and draw.random() < SHARE:
            data = draw.choice(others)
        try:
            made = changed(file.name, data, draw)
        except Exception:  # what is no JSON, or no gzip, is not changed as such
            made = change_bytes(data, draw)
        reader.read(file, made)
    reader.outcomes["messages"] = len(reader.messages)
    return reader.outcomes


if __name__ == "__main__":
    if sys.argv[1] == "--merge":
        sys.stdout.write(f"{merge([Path(p) for p in sys.argv[2:]])} bytes\n")
    else:
        where, which, number, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        sys.stdout.write(json.dumps(fuzz(where, which, number, first)) + "\n")
