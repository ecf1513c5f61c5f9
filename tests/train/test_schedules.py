"""The rate of each update against Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pyrformer as pf
from pyrformer.schedules import SCHEDULES, learning_rate

#: What Hugging Face's settings are here: the lower bound is one number, whatever it is called there.
FLOORS = {"lr_end", "min_lr", "min_lr_rate", "min_lr_ratio"}


def test_the_rates_of_the_reference(fixtures: Path) -> None:
    compared = set()
    for case in json.loads((fixtures / "optim" / "schedules.json").read_text("utf-8"))["cases"]:
        kind, given, peak = case["name"], case["settings"], case["base_lr"]
        kind = "cosine" if kind == "cosine_with_min_lr" else kind
        (name,) = FLOORS & given.keys() or {""}
        floor = given.get(name, 0.0) * (peak if name in ("min_lr_rate", "min_lr_ratio") else 1.0)
        for step, want in enumerate(case["lr"]):
            got = learning_rate(
                step,
                kind=kind,
                peak=peak,
                floor=floor,
                warmup_steps=case["num_warmup_steps"] or 0,
                total_steps=case["num_training_steps"] or 1,
                settings={k: v for k, v in given.items() if k not in FLOORS},
            )
            assert got == pytest.approx(want, rel=1e-12, abs=1e-18), (case["name"], step)
        compared.add(kind)
    assert compared == set(SCHEDULES)


def test_shapes_that_are_refused() -> None:
    with pytest.raises(pf.Error, match="decay_type"):
        pf.TrainConfig(
            files=["a.txt"],
            out="run",
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"decay_type": "square"},
        )


@pytest.mark.parametrize(
    "settings",
    [{"power": 2}, {"num_cycles": 0}, {"num_cycles": True}, {"num_cycles": "1"}, {"decay_type": "linear"}],
)
def test_settings_that_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(pf.Error, match=next(iter(settings))):
        pf.TrainConfig(files=["a.txt"], out="run", lr_scheduler_kwargs=settings)
