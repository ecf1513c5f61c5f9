"""Work spread over a cluster by Ray (``pip install pyrformer[ray]``); the only file that imports it.

The process that was started reads and cleans the text, in its order; workers tokenize it, each a chunk at a time, by
the function that one machine uses; results are taken in the order of the chunks. So what is written is the same to the
byte, and a worker that dies costs the chunk that it had: Ray gives that to another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

from pyrformer.data.documents import tokenize
from pyrformer.errors import InputError, InternalError
from pyrformer.tokenizers import Ragged, Tokenizer

T = TypeVar("T")
#: Chunks under way or waiting, for each core of the cluster: what bounds memory.
AHEAD = 2


def _import() -> Any:
    try:
        import ray
    except ImportError as e:
        raise InputError("[prepare] engine 'ray' needs Ray; run: pip install 'pyrformer[ray]'") from e
    return ray


def tokenized(
    chunks: Iterator[tuple[T, list[str]]], tokenizer: Tokenizer, objective: str
) -> Iterator[tuple[T, Ragged]]:
    """The ids of named chunks, in their order.

    A cluster that the process is connected to already, or that ``RAY_ADDRESS`` names, is used; without one, Ray starts
    on this machine. Workers need this version of pyrformer.

    Raises:
        InputError: Ray is not installed.
        InternalError: workers died again and again.
    """
    ray = _import()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")

    @ray.remote(max_retries=10)  # type: ignore[untyped-decorator]
    def work(tokenizer: Tokenizer, documents: list[str]) -> Ragged:
        return tokenize(tokenizer, documents, objective=objective, threads=1)

    shared = ray.put(tokenizer)
    most = max(2, AHEAD * int(ray.cluster_resources().get("CPU", 1)))
    under_way: deque[tuple[T, Any]] = deque()

    def first() -> tuple[T, Ragged]:
        name, result = under_way.popleft()
        try:
            return name, ray.get(result)
        except ray.exceptions.RayTaskError as e:
            raise e.cause from None
        except ray.exceptions.RayError as e:
            raise InternalError(f"[prepare] Ray gave a chunk up: {str(e).splitlines()[0]}") from None

    for name, documents in chunks:
        under_way.append((name, work.remote(shared, documents)))
        if len(under_way) >= most:
            yield first()
    while under_way:
        yield first()
