"""Every kernel compiles for every architecture as CuPy would compile it, and stays under its bars."""

import itertools
import re

import pytest
from kernels import bars, nvrtc

from pyrformer import _core

# Kernels whose rows are read and written four columns at a time where alignment allows.
WIDE = (
    *("elementwise", "norm", "loss", "optimizer", "rows", "cache", "attention"),
    *(f"{file}_{half}" for file in ("elementwise", "norm", "loss", "rows") for half in ("bf16", "f16")),
)
NARROW = {
    "attention_delta_backward_f32",
    "cached_attention_join_forward_f32",
    "count_labels_forward_f32",
}  # positions.cu is narrow throughout: the halves of a head need not be aligned


@pytest.mark.parametrize(
    ("file", "arch"),
    [
        *itertools.product(nvrtc.files(), bars.ARCHITECTURES if nvrtc.LONG else (75, 80, 90, 120)),
        (nvrtc.HOPPER, bars.OWN),
    ],
)
def test_registers_shared_and_local_memory(file, arch):
    expected = bars.read(file)
    measured = bars.reports(file, arch)
    assert set(measured) == set(expected), "bars.toml lists other kernels: run kernels/bars.py"
    asked = {name: bar["dynamic_bytes"] for name, bar in expected.items() if "dynamic_bytes" in bar}
    assert bars.dynamic(file) == asked
    limit = bars.TURING_LIMIT if file.endswith("_f16") else bars.DYNAMIC_LIMIT
    limit = bars.HOPPER_LIMIT if file == nvrtc.HOPPER else limit
    assert all(size <= limit for size in asked.values())
    for name, found in measured.items():
        assert found["local_bytes"] == 0, f"{name} spills, or indexes an array that is not in registers"
        assert found["registers"] <= expected[name]["registers"][f"sm_{arch}"], name
        assert found["shared_bytes"] <= min(expected[name]["shared_bytes"], bars.SHARED_LIMIT), name


@pytest.mark.parametrize("arch", [80, 100])
def test_rows_are_moved_in_128_bits(arch):
    for file in WIDE:
        text = nvrtc.ptx(nvrtc.unit(file), file, arch)
        for name, body in re.findall(r"\.entry (\w+)\(.*?\{(.*?)\n\}", text, re.DOTALL):
            if name in NARROW:
                continue
            wide_store = re.search(r"st\.global\.v(4\.[bfu]32|2\.b64)", body)
            wide_load = re.search(r"ld\.global(\.nc)?\.v(4\.[bfu]32|2\.b64)", body)
            single_result = name.startswith(("cross_entropy_forward", "cached_attention_forward"))
            assert wide_store or single_result, name
            assert wide_load or name.startswith("fill_forward"), name


@pytest.mark.parametrize(
    ("half", "arch"), [("bf16", 80), ("bf16", 100), ("f16", 75), ("f16", 80), ("f16", 100)]
)
def test_tensor_cores_are_used_where_meant(half, arch):
    name = f"attention_mma_{half}"
    text = nvrtc.ptx(nvrtc.unit(name), name, arch)
    factors = f"f32.{half}.{half}.f32"
    for name, body in re.findall(r"\.entry (attention\d+\w+)\(.*?\{(.*?)\n\}", text, re.DOTALL):
        assert f"mma.sync.aligned.m16n8k{8 if arch == 75 else 16}.row.col.{factors}" in body, name
        assert "ldmatrix.sync.aligned.m8n8.x4.trans" in body, name
        assert ("cp.async.cg.shared.global" in body) == (arch >= 80), name
        assert re.search(r"st\.global\.v4\.[bu]32", body), name


def test_products_of_warpgroups_are_used_where_meant():
    text = nvrtc.ptx(nvrtc.unit(nvrtc.HOPPER), nvrtc.HOPPER, bars.OWN)
    kernels = re.findall(r"\.entry (attention\d+\w+)\(.*?\{(.*?)\n\}", text, re.DOTALL)
    assert len(kernels) == 9
    product = r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16\.bf16 \{[^}]*\}, \{"  # from registers
    for name, body in kernels:
        assert "mma.sync" not in body, name
        assert re.search(product, body), name
        assert "cp.async.cg.shared.global" in body, name
        assert re.search(r"st\.global\.v4\.[bu]32", body), name


def test_products_that_the_compiler_must_wait_for_are_refused():
    unit = nvrtc.unit(nvrtc.HOPPER)
    first = unit[: unit.index('extern "C" __device__ unsigned WORD(attention128_forward')]
    early = first.replace("            wait<0>();\n            hold(p);", "            hold(p);")
    assert early != first
    with pytest.raises(AssertionError, match="C75"):
        bars.reports(nvrtc.HOPPER, bars.OWN, early)


def test_the_embedded_list_names_the_same_kernels():
    for name, _, kernels, _ in _core.cuda_sources():
        assert set(kernels) == set(bars.read(name)), name


def test_an_error_names_the_file_and_the_line():
    broken = nvrtc.unit("reduce").replace("*y = factor > 1.f", "*y = factr > 1.f")
    line = 1 + (nvrtc.KERNELS / "reduce.cu").read_text()[
        : (nvrtc.KERNELS / "reduce.cu").read_text().index("*y = factor")
    ].count("\n")
    with pytest.raises(nvrtc.CompileError, match=rf'reduce\.cu"?\({line}\).*error'):
        nvrtc.build(broken, "reduce", ("-arch=compute_80", *nvrtc.OPTIONS))
