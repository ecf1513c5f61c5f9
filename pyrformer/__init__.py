"""pyrformer trains and runs transformers without PyTorch.

    import pyrformer as pf
    run = pf.train(pf.TrainConfig(files=["shakespeare.txt"], out="runs/first"))
    model = pf.load("runs/first")
    print(model.generate("ROMEO.", max_new_tokens=64, do_sample=True, top_p=0.9).texts[0])

Names are loaded on first use, so importing the package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyrformer._core import __version__

if TYPE_CHECKING:
    from pyrformer.checkpoint import load
    from pyrformer.data.batches import Batches
    from pyrformer.data.documents import Documents
    from pyrformer.data.prepared import Prepared, prepare
    from pyrformer.errors import Error
    from pyrformer.generation.config import GenerationConfig
    from pyrformer.generation.generate import Generation, filter_logits
    from pyrformer.generation.rerank import mbr
    from pyrformer.model import Model
    from pyrformer.tokenizers import Tokenizer
    from pyrformer.training.trainer import Run, TrainConfig, train

_HOME = {
    "Batches": "data.batches",
    "Documents": "data.documents",
    "Error": "errors",
    "Generation": "generation.generate",
    "GenerationConfig": "generation.config",
    "Model": "model",
    "Prepared": "data.prepared",
    "Run": "training.trainer",
    "Tokenizer": "tokenizers",
    "TrainConfig": "training.trainer",
    "filter_logits": "generation.generate",
    "load": "checkpoint",
    "mbr": "generation.rerank",
    "prepare": "data.prepared",
    "train": "training.trainer",
}

__all__ = [
    "Batches",
    "Documents",
    "Error",
    "Generation",
    "GenerationConfig",
    "Model",
    "Prepared",
    "Run",
    "Tokenizer",
    "TrainConfig",
    "__version__",
    "filter_logits",
    "load",
    "mbr",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyrformer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pyrformer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
