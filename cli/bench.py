"""``pyrformer bench``: what this machine does."""

from __future__ import annotations

import json

import click

from pyrformer.bench.estimate import GPUS, Estimate, estimate
from pyrformer.bench.train_step import FAMILIES, Result, Shape, measure
from pyrformer.models.base import MOST_SIZE


@click.group()
def command() -> None:
    """Measure this machine."""


@command.command("train-step")
@click.option("--family", type=click.Choice(FAMILIES), default="gpt2", show_default=True)
@click.option("--layers", type=click.IntRange(1, MOST_SIZE), default=4, show_default=True)
@click.option("--width", type=click.IntRange(1, MOST_SIZE), default=128, show_default=True)
@click.option("--heads", type=click.IntRange(1, MOST_SIZE), default=4, show_default=True)
@click.option("--vocab", type=click.IntRange(2, MOST_SIZE), default=65, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1, MOST_SIZE), default=12, show_default=True, help="Rows in a step."
)
@click.option(
    "--seq", type=click.IntRange(2, MOST_SIZE), default=64, show_default=True, help="Tokens in a row."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option(
    "--profile", is_flag=True, help="Also the time of each operation and its share of the roofline."
)
@click.option("--peer", type=click.Choice(["torch"]), help="Also time the same step there, turn by turn.")
@click.option(
    "--estimate",
    "gpu",
    type=click.Choice(list(GPUS)),
    help="Measure nothing: what the step would take on this GPU, on paper.",
)
@click.option(
    "--bf16",
    is_flag=True,
    help="Keep activations in bfloat16 for the backward pass; with --estimate: bfloat16 in memory, on tensor cores.",
)
@click.option("--fp16", is_flag=True, help="With --estimate: float16 in memory, on tensor cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train_step(
    steps: int,
    threads: int | None,
    profile: bool,
    peer: str | None,
    gpu: str | None,
    bf16: bool,
    fp16: bool,
    as_json: bool,
    **sizes: object,
) -> None:
    """Time one training step of a freshly made model on random tokens: forward, backward, clipping, AdamW."""
    if bf16 and fp16:
        raise click.UsageError("--bf16 and --fp16 exclude each other.")
    if fp16 and gpu is None:
        raise click.UsageError("--fp16 is for --estimate: the CPU does not compute in float16.")
    precision = "bfloat16" if bf16 else "float16" if fp16 else "float32"
    shape = Shape(**sizes)  # type: ignore[arg-type]
    if gpu is not None:
        if profile or peer:
            raise click.UsageError("--estimate runs nothing: leave out --profile and --peer.")
        expected = estimate(shape, GPUS[gpu], precision=precision)
        if as_json:
            click.echo(json.dumps(expected.to_dict()))
        else:
            _print_estimate(expected)
        return
    result = measure(
        shape, steps=steps, threads=threads, profile=profile, peer=peer is not None, precision=precision
    )
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    _print(result)


def _print(r: Result) -> None:
    s = r.shape
    click.echo(
        f"{s.family}, {s.layers} layers × {s.width}, {s.heads} heads, vocabulary {s.vocab}: "
        f"{r.parameters / 1e6:.2f} M parameters\n"
        f"{s.batch} × {s.seq} tokens a step, {r.threads} threads\n\n"
        f"  time        {r.ms_per_step:10.1f} ms a step (median of {r.steps}; {r.ms_min:.1f} … {r.ms_max:.1f})\n"
        f"  throughput  {r.tokens_per_s:10.0f} tokens/s\n"
        f"  arithmetic  {r.gflop_per_step:10.2f} GFLOP a step\n"
        f"  sgemm peak  {r.peak_gflops:10.0f} GFLOP/s (NumPy, in this run)\n"
        f"  utilisation {r.utilisation:10.2f} of that peak\n"
        f"  memory      {r.peak_bytes / 1e6:10.1f} MB: arena {r.arena_bytes / 1e6:.1f}, "
        f"states {r.state_bytes / 1e6:.1f}\n"
        f"  compiling   {r.compile_ms:10.1f} ms"
    )
    if r.peer is not None:
        p = r.peer
        click.echo(
            f"\n  PyTorch     {p['ms_per_step']:10.1f} ms a step ({p['ms_min']:.1f} … {p['ms_max']:.1f}): "
            f"{p['speedup']:.2f} times ours"
        )
    if r.operations:
        click.echo(
            f"\n{'operation':28}{'steps':>6}{'ms':>9}{'share':>8}{'GFLOP':>9}{'MB':>9}{'roofline':>10}"
        )
        total = sum(o.ms for o in r.operations)
        for o in r.operations:
            click.echo(
                f"{o.name:28}{o.count:6}{o.ms:9.2f}{o.ms / total:8.1%}{o.gflop:9.2f}{o.mb:9.1f}{o.roofline:10.2f}"
            )


def _print_estimate(e: Estimate) -> None:
    s = e.shape
    need = (e.arena_bytes + e.state_bytes) / 1e9
    click.echo(
        f"{s.family}, {s.layers} layers × {s.width}, {s.heads} heads, vocabulary {s.vocab}, "
        f"{s.batch} × {s.seq} tokens: a step on {e.gpu} ({e.arch}), on paper\n\n"
        f"  time        {e.ms_per_step:10.2f} ms a step, no less than {e.bound_ms:.2f}\n"
        f"  throughput  {e.tokens_per_s:10.0f} tokens/s\n"
        f"  arithmetic  {e.gflop_per_step:10.1f} GFLOP a step, {e.utilisation:.2f} of the float32 peak\n"
        f"  memory      {need:10.2f} GB of {e.memory_bytes / 1e9:.0f}"
        + ("" if e.fits else ": too small")
        + "\n"
        f"  launches    {e.launches:10}\n\n"
        f"{'kernel':32}{'count':>6}{'MB':>9}{'moved':>9}{'sectors':>12}{'GFLOP':>9}{'tensor':>7}{'regs':>5}{'warps':>7}"
        f"{'limit':>12}{'bound':>8}{'ms':>8}"
    )
    for k in e.kernels:
        registers, warps = k.registers or "", "" if k.occupancy is None else f"{k.occupancy:.0%}"
        click.echo(
            f"{k.name.removesuffix('_f32'):32}{k.count:6}{k.unique_mb:9.1f}{k.moved_mb:9.1f}{k.sectors:12}"
            f"{k.gflop:9.2f}{k.tensor_share:7.0%}{registers:>5}{warps:>7}{k.limit:>12}{k.bound_ms:8.3f}{k.ms:8.3f}"
        )
