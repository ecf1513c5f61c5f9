"""The native half of pyrformer: what ``rust/python`` exports. Not public; users go through ``pyrformer``.

Arrays given must be C-contiguous; arrays returned are new. Errors are those of ``pyrformer.errors``.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "MOST_PAIRS",
    "MOST_SEQUENCES",
    "AtomicDir",
    "CausalBatches",
    "Cleaner",
    "Corpus",
    "Documents",
    "Executor",
    "Gguf",
    "Graph",
    "MaskedBatches",
    "PairBatches",
    "PermutedBatches",
    "Plan",
    "SafeTensors",
    "Search",
    "Store",
    "StreamDecoder",
    "Tokenizer",
    "Trainer",
    "__version__",
    "cuda_bars",
    "cuda_dynamic_bytes",
    "cuda_program",
    "cuda_sources",
    "filter_logits",
    "norm_parts",
    "normal",
    "simd_levels",
    "uniform",
    "write_file",
    "write_safetensors",
    "write_shard",
    "zstd_frame",
]

_DType = Literal["float32", "float64", "bfloat16", "int32"]
_Typed = tuple[str, _DType, list[int]]
# A tensor, its least and its greatest finite value, and how many values are not finite.
_Values = tuple[tuple[str, str, list[int]], float, float, int]
"""A name, an element type and a shape."""
_Path = str | os.PathLike[str]
_Array = npt.NDArray[Any]
_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.uint32]
_Offsets = npt.NDArray[np.int64]

class _Result(TypedDict):
    """One sequence that a search found."""

    prompt: int
    ids: list[int]
    score: float
    token_logprobs: list[float]
    beam_indices: list[int]
    finish_reason: str

class _Encoding(TypedDict):
    """One text, or a pair, as tokens; lists of equal length."""

    ids: list[int]
    type_ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]
    attention_mask: list[int]

__version__: str
#: The most pairs of tokens that a permutation model reads at once, and sequences of a prompt.
MOST_PAIRS: int
MOST_SEQUENCES: int

# ---- rust/python/src/graph.rs ---------------------------------------------------------------------------------------

@final
class Graph:
    """A program under construction. Values are numbers, counted from 0."""

    def __new__(cls) -> Graph: ...
    def input(self, name: str, dtype_: str, shape: Sequence[int]) -> int: ...
    def state(self, name: str, dtype_: str, shape: Sequence[int]) -> int: ...
    def add(
        self, op: str, inputs: Sequence[int], declared: tuple[str, Sequence[int]] | None = None
    ) -> list[int]:
        """Adds an operation given as JSON; ``declared`` is the result's type where nothing else determines it."""
    def type(self, value: int) -> tuple[_DType, list[int]]: ...
    def gradients(self, loss: int, wrt: Sequence[int]) -> list[int]:
        """Adds the gradients of the scalar ``loss``; gives their values in the order of ``wrt``."""
    def output(self, name: str, value: int) -> None: ...
    def update(self, state: int, value: int) -> None:
        """The state takes this value at the end of a run."""
    def set_scope(self, scope: str) -> str:
        """Names the part of the model that the next nodes belong to; gives the name before."""
    def layers(self) -> list[str]:
        """The scopes of the layers that can be recomputed in the backward pass, in order."""
    def recompute(self, count: int) -> Graph:
        """The graph with the first ``count`` layers recomputed in the backward pass."""
    def narrow(self, to: str) -> Graph:
        """The graph, in float32, with "bfloat16" or "float16" in memory where that may be: activations, their
        gradients, and the weights that products read."""
    def stash(self) -> Graph:
        """The graph, in float32, with what its forward pass leaves to the backward pass kept in bfloat16."""
    def optimise(self) -> Graph:
        """The graph after all passes."""
    def lower(self, target: str = "cpu") -> Plan:
        """The plan of this graph, as it is, for an executor: "cpu" or "cuda"."""
    def __len__(self) -> int: ...

@final
class Plan:
    """A compiled program: steps over planned memory."""

    @property
    def inputs(self) -> list[_Typed]: ...
    @property
    def outputs(self) -> list[_Typed]: ...
    @property
    def states(self) -> list[_Typed]: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def live_bytes(self) -> int:
        """The least that any memory plan for this schedule could need."""
    @property
    def state_bytes(self) -> int: ...
    @property
    def flops(self) -> int: ...
    @property
    def traffic_bytes(self) -> int: ...
    def table(self) -> list[list[str]]:
        """A row per step: number, operation, operands, results, offsets, bytes, FLOPs, scope."""
    def to_json(self) -> str: ...
    def __len__(self) -> int: ...

@final
class Store:
    """Named tensors that plans share."""

    def __new__(cls) -> Store: ...
    def types(self) -> list[_Typed]: ...
    def set(self, name: str, value: _Array) -> None: ...
    def get(self, name: str) -> _Array: ...
    def remove(self, name: str) -> None: ...
    def quantise(self, plan: Plan) -> list[str]:
        """Keeps the weights that a plan multiplies by in 8 bits from here on; their names."""

@final
class Executor:
    """A plan bound to a store, run on the CPU."""

    def __new__(cls, plan: Plan, store: Store, threads: int | None = None) -> Executor: ...
    def pack_weights(self) -> None:
        """Keeps the weights that the plan multiplies by in the order of the kernels, for all plans of the store."""
    def quantise_caches(self) -> None:
        """Keeps the plan's caches of keys and values in 8 bits for all plans of the store."""
    def run(self, inputs: dict[str, _Array]) -> dict[str, _Array]: ...
    def run_telling(self, inputs: dict[str, _Array], tell: Callable[[str, _Array], object]) -> None:
        """Runs once and calls ``tell(name, array)`` with each output as soon as it is computed."""
    def profile(self, inputs: dict[str, _Array]) -> list[float]:
        """Runs once; the seconds that each step of the plan took."""
    def find_nonfinite(self, inputs: dict[str, _Array]) -> tuple[int, list[_Values], list[_Values]] | None:
        """Runs up to the first step that reads or makes a value that is not finite: its number, what it reads and what
        it makes."""

def norm_parts(gradient: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Partial sums of squares of a gradient: what the norm of several adds up in the order of the gradients."""

def simd_levels() -> tuple[str, str]:
    """The vector instructions that the CPU has, and those that kernels use."""

# ---- rust/python/src/cuda.rs ----------------------------------------------------------------------------------------

def cuda_bars() -> str:
    """Registers by architecture and shared memory of each kernel, as TOML: the text of ``cuda/bars.toml``."""

def cuda_dynamic_bytes(kernel: str, only: str) -> int:
    """Bytes of shared memory that launches of a kernel ask for, beside what it declares; ``only``: of the one for a
    single target, or "" for the one for all."""

def cuda_program(plan: Plan) -> str:
    """The launch records of a plan that was lowered for "cuda", as JSON."""

def cuda_sources() -> list[tuple[str, str, list[str], str]]:
    """Each file of kernels: its name, its text for NVRTC, the kernels in it, and the only target it is for, as in
    "sm_90a", where its kernels take the place of those of the same names before it; or ""."""

# ---- rust/python/src/random.rs --------------------------------------------------------------------------------------

def uniform(seed: int, index: int, count: int) -> npt.NDArray[np.float64]:
    """Draws from [0, 1) of coordinate ``index``."""

def normal(seed: int, index: int, count: int) -> _Floats:
    """``count`` draws from N(0, 1) for tensor ``index`` of a model."""

# ---- rust/python/src/search.rs --------------------------------------------------------------------------------------

@final
class Search:
    """A search over a batch of prompts. Letters: A active sequences, V vocabulary."""

    def __new__(
        cls,
        options_: dict[str, Any],
        prompts: Sequence[tuple[Sequence[int], int, int | None]],
        vocab_size: int,
        allowed_tokens: Callable[[int, list[int]], Sequence[int]] | None = None,
        processor: Callable[[list[int], _Floats], _Floats] | None = None,
        ends: Callable[[int, list[int]], bool] | None = None,
    ) -> Search:
        """Each prompt: its ids, the padding that stood before them, the number of its first sequence for draws."""

    def step(self) -> tuple[int, _Ints, _Ints, _Ints] | None:
        """The forward pass wanted next: its number, tokens [A], parents [A], sequences [A]; None at the end."""
    def advance(self, logits: _Floats) -> None:
        """Takes the logits [A, V] of that pass."""
    def wants_best(self, count: int) -> float | None:
        """The temperature at which ``advance_best`` wants the best ``count`` of each row weighed; None: it wants whole
        rows."""
    def advance_best(
        self,
        logits: _Floats,
        tokens: _Ints,
        masses: npt.NDArray[np.float64],
        places: Sequence[int],
        whole: _Floats,
    ) -> list[int]:
        """Takes the best of each row, logits float32[A, K] in descending order, tokens int32[A, K] and masses
        float64[A, 2], and the rows ``places`` whole, [n, V]. Gives the rows whose best do not suffice; then nothing has
        changed."""
    def decode(
        self,
        executor: Executor,
        positions: tuple[_Ints, _Ints],
        offset: int,
        steps: int | None,
        seconds: float,
    ) -> tuple[_Ints, _Ints, list[tuple[int, int, float]]]:
        """Takes turns with a decoding program of one token a sequence, for at most so many steps or seconds: positions
        are lengths int32[A] and rows int32[A, S]; gives them as they are then, and what became certain."""
    def texts(self) -> list[list[int]]:
        """Prompt and new tokens of each active row."""
    def emitted(self) -> list[tuple[int, int, float]]:
        """(sequence, token, log-probability) of each token that the last ``advance`` made certain."""
    def scores(self, row: int, after: Sequence[int], logits: _Floats) -> _Floats:
        """Processed and filtered scores [V] behind the tokens ``after`` in an active row, from logits [V]."""
    def path_scores(self) -> list[tuple[float, float]]:
        """Of each active row: summed log-probability (0 without beams), log-probability of the last token."""
    def choose(self, tokens: Sequence[tuple[int, float]]) -> None:
        """Appends a token, with its log-probability, to each active row; not for beams."""
    def draft(self, after: Sequence[int], logits: _Floats) -> tuple[int, _Floats]:
        """A proposal for what follows the one active sequence and ``after``, from a cheaper model's logits [V]: the
        token, and the distribution [V] it was drawn from."""
    def advance_drafted(self, logits: _Floats, token: int, probabilities: _Floats) -> bool:
        """Takes logits [V] and a proposal; whether it was kept."""
    def finish(self) -> list[_Result]: ...

def filter_logits(logits: _Floats, options_: dict[str, Any]) -> _Floats:
    """Filtered and renormalised probabilities [N, V] of logits [N, V]."""

# ---- rust/python/src/files.rs ---------------------------------------------------------------------------------------

@final
class Gguf:
    """A GGUF file: metadata, and tensors as the bytes of their blocks."""

    def __new__(cls, path: _Path) -> Gguf: ...
    def metadata(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, tuple[list[int], int]]:
        """Name → (shape, outermost axis first; ggml's number of the element type)."""
    def data(self, name: str) -> npt.NDArray[np.uint8]: ...

@final
class SafeTensors:
    """The tensors of one file, or of a folder's ``model.safetensors`` or its shards."""

    def __new__(cls, path: _Path) -> SafeTensors: ...
    def tensors(self) -> list[tuple[str, str, list[int]]]:
        """Name, element type as the format names it, and shape of each."""
    def get(self, name: str) -> _Floats:
        """A tensor as float32."""
    def get_int32(self, name: str) -> _Ints:
        """A tensor of int32."""
    def map_into(self, store: Store, names: list[tuple[str, str]], dtype: str) -> list[tuple[str, str]]:
        """Makes states of tensors without copying them, where they are stored as "float32" or "float64" already; their
        pages are shared between processes until they are written. The pairs that are left, to be copied."""

    def load_into(
        self, store: Store, names: list[tuple[str, str]], dtype: str, threads: int | None = None
    ) -> None:
        """Copies tensors into a store as "float32" or "float64": pairs of the name there and the name here."""

def write_safetensors(path: _Path, tensors: dict[str, _Array], dtype: str = "float32") -> None:
    """Writes arrays by name to a file that appears whole or not at all, those of float32 as ``dtype``: "float32",
    "float16" or "bfloat16"."""

def write_file(path: _Path, data: bytes) -> None:
    """Writes bytes to a file that appears whole or not at all."""

@final
class AtomicDir:
    """A folder under construction: it takes its name on ``commit``, and is removed if that never comes."""

    def __new__(cls, target: _Path) -> AtomicDir: ...
    @property
    def path(self) -> Path | None:
        """Where to write meanwhile; None after the end."""
    def commit(self, replace: bool) -> None: ...
    def discard(self) -> None: ...

# ---- rust/python/src/data.rs ----------------------------------------------------------------------------------------

@final
class Documents:
    """The documents of files, a few at a time."""

    def __new__(
        cls,
        paths: Sequence[_Path],
        column: str,
        replace_errors: bool,
        lenient: bool,
        rows: bool = False,
    ) -> Documents: ...
    def read(self, size: int) -> list[str] | None:
        """Documents of about ``size`` bytes together, or rows as JSON objects; ``None`` at the end."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far, as they are on the disk."""

    def rejected(self) -> list[tuple[str, str]]:
        """What a lenient reader could not read since the last call: why, and the line or record (empty for a file)."""

@final
class Cleaner:
    """Named cleaning steps and the counts of what they did."""

    def __new__(cls, steps: Sequence[str]) -> Cleaner: ...
    def clean(self, documents: Sequence[str]) -> list[str]:
        """The documents after all steps, without those that a step drops."""

    def report(self) -> list[tuple[str, int, int, int]]:
        """Per step: its name, documents changed, documents dropped, characters removed."""

@final
class Corpus:
    """Token ids of documents: in memory, or mapped from prepared shards."""

    def __new__(cls, ids: _Ids, offsets: _Offsets) -> Corpus: ...
    @staticmethod
    def open(paths: Sequence[_Path]) -> Corpus:
        """Shards one after another, memory-mapped."""

    def split(self, held_out: float) -> tuple[Corpus, Corpus]:
        """The corpora of what is not held out and of what is."""
    @property
    def tokens(self) -> int:
        """The number of tokens."""
    @property
    def documents(self) -> int:
        """The number of documents."""
    def number(self, document: int) -> int:
        """The number of a document in the corpus that this one was split from."""
    def document(self, index: int) -> _Ids:
        """The ids of document ``index``."""

def zstd_frame(content: bytes) -> bytes:
    """Bytes as a frame of zstd."""

def write_shard(path: _Path, ids: _Ids, offsets: _Offsets, vocab_size: int) -> None:
    """Writes a shard of prepared tokens; it appears whole or not at all."""

@final
class CausalBatches:
    """Packed rows for next-token prediction. Letters: B rows, S tokens in a row."""

    def __new__(
        cls,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        separate_documents: bool,
        prefix: bool,
    ) -> CausalBatches: ...
    @property
    def batches_per_pass(self) -> int:
        """Batches that visit every block once."""
    @property
    def settled_steps(self) -> int:
        """How many of the first batches a longer corpus that begins with this one would leave as they are."""
    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row."""
    def batch(self, step: int) -> tuple[dict[str, _Ints], int]:
        """input_ids, labels, position_ids, where documents are separate segments, [B, S] each, where there are prefixes
        prefix [B]; number of labels."""

@final
class MaskedBatches:
    """Padded rows with masked tokens. Letters: B rows, S tokens in a row, P labelled positions."""

    def __new__(cls, corpus: Corpus, options: dict[str, Any]) -> MaskedBatches:
        """``options``: max_length, batch_size, seed, shuffle, vocab_size, special (ids of [CLS], [SEP], [PAD], [MASK]),
        rates (mlm_probability; of [MASK] and of random tokens), words (a tokenizer, or None), spans (p and the greatest
        length, or None), pad_to_multiple_of."""
    @property
    def batches_per_pass(self) -> int:
        """Batches that visit every piece once."""
    @property
    def settled_steps(self) -> int:
        """How many of the first batches a longer corpus that begins with this one would leave as they are."""
    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row."""
    def batch(self, step: int) -> tuple[dict[str, _Ints], int]:
        """input_ids, attention_mask, token_type_ids, labels [B, S], positions, masked_labels [P]; number of labels."""

@final
class PairBatches:
    """Rows of two texts with masked tokens. Letters as in :class:`MaskedBatches`."""

    def __new__(cls, corpus: Corpus, bounds: _Offsets, options: dict[str, Any]) -> PairBatches:
        """``corpus``: of sentences; ``bounds``: the number of the first one of each document, then of all; ``options``
        as for :class:`MaskedBatches`."""
    @property
    def batches_per_pass(self) -> int:
        """Batches that visit every run of sentences once."""
    @property
    def settled_steps(self) -> int:
        """0: second texts come from anywhere in the corpus."""
    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents that the rows begin in."""
    def batch(self, step: int) -> tuple[dict[str, _Ints], int]:
        """The arrays of :class:`MaskedBatches`, and next_sentence_label [B], −100 in missing rows; number of labels."""

@final
class PermutedBatches:
    """Packed rows, some tokens of which are predicted in a random order. Letters: B rows, S tokens, P targets."""

    def __new__(
        cls,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        plm_probability: float,
        max_span_length: int,
    ) -> PermutedBatches: ...
    @property
    def batches_per_pass(self) -> int:
        """Batches that visit every block once."""
    @property
    def settled_steps(self) -> int:
        """How many of the first batches a longer corpus that begins with this one would leave as they are."""
    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row."""
    def batch(self, step: int) -> tuple[dict[str, _Ints], int]:
        """input_ids [B, S], perm_mask [B, S, S], targets (−1 where there is none), labels [B, P]; number of labels."""

# ---- rust/python/src/text.rs ----------------------------------------------------------------------------------------

@final
class Trainer:
    def __new__(
        cls,
        kind: str,
        preset: str | None,
        vocab_size: int,
        min_frequency: int,
        special_tokens: list[str] | None,
        threads: int,
    ) -> Trainer: ...
    def add(self, documents: list[str]) -> None: ...
    def finish(self, progress: Callable[[str, int, int], None] | None) -> Tokenizer: ...

@final
class Tokenizer:
    """Text to ids and back."""

    @staticmethod
    def load(path: _Path, split: str | None) -> Tokenizer: ...
    @staticmethod
    def from_json(text: str) -> Tokenizer: ...
    def to_json(self) -> str: ...
    def save(self, path: _Path) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def fallback(self) -> str | None: ...
    @property
    def vocab_size(self) -> int: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, id: int) -> str | None: ...  # noqa: A002
    def is_special(self, id: int) -> bool: ...  # noqa: A002
    def begins_word(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]: ...
    def special_ids(self) -> dict[str, int]:
        """Role (unk, pad, cls, sep, mask, bos, eos) → id, for the roles that are filled."""
    def encode(self, text: str, pair: str | None, add_special_tokens: bool) -> _Encoding: ...
    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, threads: int
    ) -> tuple[_Ids, _Offsets]:
        """All ids, one text after another, and the start of each text followed by the end of the last."""
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def without_truncation(self) -> Tokenizer: ...
    def stream_decoder(self, skip_special_tokens: bool) -> StreamDecoder: ...

@final
class StreamDecoder:
    """Ids in, pieces of text out; the pieces together are what ``decode`` gives."""

    def push(self, id: int) -> str | None:  # noqa: A002
        """The text that this id makes certain, if any."""
    def finish(self) -> str | None:
        """What was held back."""
