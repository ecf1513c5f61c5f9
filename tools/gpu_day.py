"""Everything that needs a GPU, in one command: ``python tools/gpu_day.py [--out FOLDER]``.

Development has none, so kernels and programs are proven without one (docs/cuda.md). This checks what remains, in the
order in which a failure would explain the next ones, and goes on behind failures: versions; every test of a kernel,
run on the device; every program against the CPU; thousands of replays without an allocation; times of steps and kernels
beside the estimate and beside PyTorch; compute-sanitizer's four tools, which take longest. ``report.md`` and
``report.json`` are written after each stage. Exit code 1 if a stage failed, 2 if there is no device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "cuda"
sys.path.insert(0, str(TESTS))  # tiny models and their inputs

from kernels import programs as tiny

from pyrformer import programs
from pyrformer.bench.estimate import GAP, PRODUCTS, bars, cost, estimate
from pyrformer.bench.gpus import GPUS, Gpu
from pyrformer.bench.train_step import Shape, times
from pyrformer.doctor import examine
from pyrformer.errors import DeviceError
from pyrformer.executors.device import Device
from pyrformer.executors.program import Executor, Store
from pyrformer.model import Model
from pyrformer.optimizers import AdamW

#: The files whose tests launch one kernel each.
KERNEL_TESTS = (
    "attention", "best", "cache", "elementwise", "halves", "loss", "norm", "optimizer", "positions", "reduce",
    "relative", "rows",
)  # fmt: skip
STAGES = (
    "doctor", "kernels", "programs", "bfloat16", "float16", "replays", "step times", "kernel times", "sanitizer",
)  # fmt: skip
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Relative and absolute, between programs on the device and float32 programs on the CPU.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
REPLAYS = 3000
SHAPES = (
    Shape("gpt2", layers=12, width=768, heads=12, vocab=50257, batch=8, seq=1024),
    Shape("bert", layers=12, width=768, heads=12, vocab=30522, batch=16, seq=512),
    Shape("llama", layers=8, width=1024, heads=16, vocab=32000, batch=4, seq=2048),
)


@dataclass
class Stage:
    """What one part of the day found. ``state``: "ok", "failed" or "skipped"; ``table``: rows, the first its head."""

    name: str
    state: str
    text: str
    table: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0


# ---- The stages -----------------------------------------------------------------------------------------------------


def doctor() -> Stage:
    """What is installed."""
    found = examine()
    table = [["", "found"], *([f.name, f.text] for f in found)]
    missing = [f.name for f in found if not f.ok]
    return Stage("doctor", "failed" if missing else "ok", ", ".join(missing) or "everything is there", table)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _pytest(out: Path, run: Run, prefix: list[str], name: str) -> tuple[int, list[list[str]], str]:
    """Runs the tests of kernels on the device: how many there are, those that failed, and what was printed last."""
    log = out / f"{name}.xml"
    files = [str(TESTS / f"test_{file}.py") for file in KERNEL_TESTS]
    command = [
        *prefix,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={log}",
        *files,
    ]
    env = {**os.environ, "PYRFORMER_TEST_DEVICE": "cuda"}
    done = run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    tail = (done.stdout + done.stderr).strip()[-2000:]
    if not log.exists():
        return 0, [], tail
    cases = list(ElementTree.parse(log).iter("testcase"))
    failed = []
    for case in cases:
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                lines = (problem.get("message") or "").splitlines()
                failed.append([f"{case.get('classname')}.{case.get('name')}", lines[0] if lines else kind])
    if done.returncode and not failed:
        failed.append(["pytest", f"exit code {done.returncode}"])
    return len(cases), failed, tail


def kernels(out: Path, run: Run = subprocess.run) -> Stage:
    """Every test of a kernel, on the device, against float64."""
    count, failed, tail = _pytest(out, run, [], "kernels")
    if not count:
        return Stage("kernels", "failed", f"pytest ran nothing: {tail}")
    text = f"{count - len(failed)} of {count} tests of kernels passed"
    return Stage("kernels", "failed" if failed else "ok", text, [["test", "what"], *failed] if failed else [])


def on_device(cpu: Model, device: Device, *, precision: str = "float32") -> Model:
    """The same model, its states copied."""
    store = Store(device)
    for name, _, _ in cpu.store.types():
        store.set(name, cpu.store.get(name))
    return Model(cpu.family, device="cuda", precision=precision, store=store)


def _apart(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error, relative to 1 + |want|; infinite where one is finite and the other not."""
    got, want = np.asarray(got, float), np.asarray(want, float)
    if not (np.isfinite(got) == np.isfinite(want)).all():
        return float("inf")
    inside = np.isfinite(want)
    error = np.abs(got[inside] - want[inside]) / (1 + np.abs(want[inside]))
    return float(error.max()) if error.size else 0.0


def whole_programs(
    device: Device, cases: list[tuple[str, str]] | None = None, *, precision: str = "float32"
) -> Stage:
    """Every program of every family, walked, captured and replayed, against the CPU: outputs and states."""
    allowed = TOLERANCES[precision]
    rows: list[list[Any]] = []
    for name, which in cases or tiny.cases():
        try:
            rows.append([name, which, *_compare(name, which, device, precision)])
        except Exception as e:
            rows.append([name, which, float("nan"), f"{type(e).__name__}: {e}"])
    bad = [row for row in rows if row[3] or not row[2] <= allowed]
    worst = max((row[2] for row in rows if not row[3]), default=float("nan"))
    text = f"{len(rows) - len(bad)} of {len(rows)} programs agree with the CPU; largest error {worst:.1e}"
    return Stage(
        "programs" if precision == "float32" else precision,
        "failed" if bad else "ok",
        text,
        [["family", "program", "error", "what"], *rows],
    )


def _compare(name: str, which: str, device: Device, precision: str) -> tuple[float, str]:
    cpu, rng = tiny.model(name), np.random.default_rng(20)
    other = on_device(cpu, device, precision=precision)
    traced = tiny.PROGRAMS[which](cpu)
    one, two = (traced.lower(m.device, precision=m.precision).compile(m.store) for m in (cpu, other))
    worst = 0.0
    for step in range(3):
        given = tiny.inputs(cpu, one.plan, rng, step)
        want, got = one(**given), two(**given)
        # In half precision two tokens of nearly one logit change places.
        judged = [k for k in want if precision == "float32" or want[k].dtype.kind == "f"]
        worst = max([worst, *(_apart(got[k], want[k]) for k in judged)])
    for state, _, _ in cpu.store.types():
        worst = max(worst, _apart(other.store.get(state), cpu.store.get(state)))
    return worst, ""


def sanitizer(out: Path, run: Run = subprocess.run, where: str | None = None) -> Stage:
    """The tests of kernels under compute-sanitizer's four tools."""
    program = where or shutil.which("compute-sanitizer")
    if program is None:
        return Stage(
            "sanitizer", "skipped", "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        )
    rows = []
    for tool in SANITIZER_TOOLS:
        prefix = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        count, failed, tail = _pytest(out, run, prefix, tool)
        clean = "ERROR SUMMARY: 0 errors" in tail
        rows.append(
            [tool, count, len(failed), "clean" if clean else tail.splitlines()[-1] if tail else "no output"]
        )
    bad = [row[0] for row in rows if row[2] or row[3] != "clean"]
    text = f"not clean: {', '.join(bad)}" if bad else "all four tools are clean"
    return Stage(
        "sanitizer", "failed" if bad else "ok", text, [["tool", "tests", "failed", "summary"], *rows]
    )


def replays(device: Device, steps: int = REPLAYS) -> Stage:
    """Thousands of replays of one training step: no memory is taken, the loss falls, twice the same bits."""
    ends, taken = [], 0
    losses: list[float] = []
    for _ in range(2):
        cpu, rng = tiny.model("gpt2"), np.random.default_rng(20)
        model = on_device(cpu, device)
        traced = programs.train_step(cpu.family, tiny.sizes(cpu), tiny.OPTIMIZER)
        compiled = traced.lower("cuda").compile(model.store)
        executor = compiled.executor
        assert isinstance(executor, Executor)
        given = tiny.inputs(cpu, compiled.plan, rng)
        given["lr"] = np.array(1e-3, np.float32)
        for _ in range(3):
            executor.run(given)
        before, losses, pending = device.free_bytes(), [], None
        for step in range(steps):
            started = executor.start({**given, "step": np.array(step + 4, np.int32)})
            if pending is not None:
                losses.append(float(pending.result()["loss"]))
            pending = started
        losses.append(float(pending.result()["loss"]))
        taken += before - device.free_bytes()
        ends.append({name: model.store.get(name) for name, _, _ in model.store.types()})
    same = all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    falls = bool(np.isfinite(losses).all()) and losses[-1] < losses[0]
    wrong = [] if same else ["two runs differ in their bits"]
    wrong += [] if falls else [f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"]
    wrong += [f"{taken} bytes of device memory were taken"] if taken > 0 else []
    text = "; ".join(wrong) or f"{2 * steps} replays: no memory taken, the same bits twice, the loss falls"
    return Stage("replays", "failed" if wrong else "ok", text)


def gpu_of(device_name: str) -> Gpu | None:
    """The row of the table of GPUs that a device's name stands for."""
    words = device_name.lower().replace(" ", "")
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


def step_times(device: Device, gpu: Gpu | None, shapes: tuple[Shape, ...] = SHAPES, steps: int = 20) -> Stage:
    """The time of whole training steps, beside the estimate and beside PyTorch."""
    rows: list[list[Any]] = []
    kinds = gpu.precisions if gpu else ("float32",)
    for shape, precision in [(shape, kind) for shape in shapes for kind in kinds]:
        name = f"{shape.family} {shape.layers}x{shape.width}, {shape.batch}x{shape.seq}"
        row: list[Any] = [f"{name}, {precision}"]
        try:
            compiled, inputs = _training(shape, device, precision)
            compiled(**inputs)  # walks; the next is captured
            row.append(1e3 * float(np.median(times(lambda c=compiled, i=inputs: c(**i), steps))))
            del compiled
        except DeviceError as e:
            rows.append([*row, str(e), "", ""])
            continue
        row.append(estimate(shape, gpu, precision=precision).ms_per_step if gpu else "")
        rows.append([*row, _torch(shape, steps, precision)])
    numbers = [row for row in rows if isinstance(row[1], float)]
    state = "ok" if numbers else "failed"
    text = f"{len(numbers)} of {len(rows)} steps timed" + (
        "" if gpu else "; no estimate: the GPU is not in the table"
    )
    return Stage("step times", state, text, [["step", "ms", "on paper", "PyTorch"], *rows])


def _training(shape: Shape, device: Device, precision: str = "float32") -> tuple[Any, dict[str, Any]]:
    model = on_device(Model.from_config(shape.config()), device, precision=precision)
    ids, labels = shape.tokens()
    batch = model.batch(ids, labels=labels)
    lowered = programs.train_step(model.family, batch.sizes, AdamW()).lower("cuda", precision=precision)
    compiled = lowered.compile(model.store)
    return compiled, {**batch.arrays, **batch.scales, "lr": 1e-4, "step": 1}


def _torch(shape: Shape, steps: int, precision: str) -> float | str:
    try:
        from pyrformer.bench.torch_peer import training_step
    except ImportError:
        return "not installed"
    try:
        return 1e3 * float(
            np.median(times(training_step(shape, os.cpu_count() or 1, "cuda", precision=precision), steps))
        )
    except (RuntimeError, AssertionError) as e:
        return str(e).splitlines()[0]


def kernel_times(device: Device, gpu: Gpu | None, shape: Shape = SHAPES[0], repeats: int = 20) -> Stage:
    """The time of each kernel and matrix product of one step, launched again and again, beside the estimate."""
    rows: list[list[Any]] = []
    texts: list[str] = []
    for kind in gpu.precisions if gpu else ("float32",):
        found = _kernel_times(device, gpu, shape, repeats, kind)
        rows += [[name, kind, *row] for name, *row in found]
        texts.append(
            f"{sum(row[2] for row in found) + 1e3 * GAP * sum(row[1] for row in found):.2f} ms in {kind}"
        )
    head = ["kernel", "program", "count", "ms", "on paper", "measured / paper"]
    return Stage(
        "kernel times", "ok", f"kernels of one {shape.family} step: {', '.join(texts)}", [head, *rows]
    )


def _kernel_times(
    device: Device, gpu: Gpu | None, shape: Shape, repeats: int, precision: str
) -> list[list[Any]]:
    """Name, count, milliseconds, those on paper and their quotient, by time."""
    compiled, inputs = _training(shape, device, precision)
    compiled(**inputs)
    executor, compiled_bars = compiled.executor, bars()
    store = executor.store
    found: dict[str, list[float]] = {}
    timed: dict[str, float] = {}
    for (_, record), call in zip(executor.records, executor.calls, strict=True):
        key = json.dumps(_sizes(record))
        if key not in timed:
            timed[key] = _one(device, store, call, repeats)
        costed = cost(record, gpu, compiled_bars) if gpu else None
        name = costed.name if costed else record.get("launch", {}).get("kernel", PRODUCTS)
        row = found.setdefault(name, [0, 0.0, 0.0])
        for i, value in enumerate((1, timed[key], costed.taken if costed else 0.0)):
            row[i] += value
    rows = [
        [name, int(n), 1e3 * s, 1e3 * p if p else "", s / p if p else ""] for name, (n, s, p) in found.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def _sizes(record: dict[str, Any]) -> Any:
    """A record without addresses: records alike take the same time."""
    if "launch" in record:
        launch = record["launch"]
        numbers = [next(iter(a.values())) for a in launch["args"] if "pointer" not in a]
        return [launch["kernel"], launch["grid"], numbers]
    p = record["product"]
    return [[(p[k]["rows"], p[k]["cols"], p[k]["ld"]) if p[k] else None for k in "abcy"], p["ta"], p["tb"]]


def _one(device: Device, store: Store, call: tuple[Any, ...], repeats: int) -> float:
    """Seconds of one launch among many."""

    def run(count: int) -> float:
        store.wait()
        start = time.perf_counter()
        for _ in range(count):
            device.product(store.compute, call[0]) if len(call) == 1 else device.launch(store.compute, *call)
        store.wait()
        return time.perf_counter() - start

    run(2)
    return run(repeats) / repeats


# ---- The report -----------------------------------------------------------------------------------------------------


def _cell(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x).replace("|", "\\|").replace("\n", " ")


def markdown(stages: list[Stage]) -> str:
    """The report as people read it."""
    lines = ["# GPU day", "", "| stage | state | what | s |", "| --- | --- | --- | --- |"]
    lines += [f"| {s.name} | {s.state} | {_cell(s.text)} | {s.seconds:.0f} |" for s in stages]
    for stage in stages:
        if stage.table:
            head, *rows = stage.table
            lines += ["", f"## {stage.name}", "", "| " + " | ".join(map(_cell, head)) + " |"]
            lines += [
                "|" + " --- |" * len(head),
                *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
            ]
    return "\n".join(lines) + "\n"


def day(out: Path, work: dict[str, Callable[[], Stage]]) -> list[Stage]:
    """Runs the stages, each whatever became of those before, and writes the report after each."""
    out.mkdir(parents=True, exist_ok=True)
    stages: list[Stage] = []
    for name, act in work.items():
        start = time.perf_counter()
        try:
            stage = act()
        except Exception as e:
            stage = Stage(name, "failed", f"{type(e).__name__}: {e}")
            (out / f"{name}.traceback.txt").write_text(traceback.format_exc())
        stage.seconds = time.perf_counter() - start
        stages.append(stage)
        click.echo(f"{stage.name:14}{stage.state:9}{stage.text}")
        (out / "report.md").write_text(markdown(stages))
        (out / "report.json").write_text(json.dumps([asdict(s) for s in stages], indent=1))
    return stages


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu-day"), show_default=True)
@click.option("--replays", "steps", type=click.IntRange(1), default=REPLAYS, show_default=True)
@click.option(
    "--stage", "chosen", multiple=True, type=click.Choice(STAGES), help="This one, and others so named."
)
@click.option(
    "--general", is_flag=True, help="With the kernels that every architecture has, without this one's own."
)
def main(out: Path, steps: int, chosen: tuple[str, ...], general: bool) -> None:
    """Check and time on this machine's GPU all that cannot be checked without one; write a report."""
    from pyrformer.executors.cuda import BF16, CudaDevice, describe

    try:
        facts = describe()
        device = CudaDevice(general=general)
    except DeviceError as e:
        click.echo(f"gpu_day: error: {e}", err=True)
        sys.exit(2)
    gpu = gpu_of(facts["device"])
    gpu = replace(gpu, general=general) if gpu else None

    work = {
        "doctor": doctor,
        "kernels": lambda: kernels(out),
        "programs": lambda: whole_programs(device),
        "bfloat16": lambda: (
            whole_programs(device, precision="bfloat16")
            if facts["capability"] >= BF16
            else Stage("bfloat16", "skipped", "the device has none")
        ),
        "float16": lambda: whole_programs(device, precision="float16"),
        "replays": lambda: replays(device, steps),
        "step times": lambda: step_times(device, gpu),
        "kernel times": lambda: kernel_times(device, gpu),
        "sanitizer": lambda: sanitizer(out),
    }
    stages = day(out, {name: work[name] for name in STAGES if name in (chosen or STAGES)})
    sys.exit(1 if any(stage.state == "failed" for stage in stages) else 0)


if __name__ == "__main__":
    main()
