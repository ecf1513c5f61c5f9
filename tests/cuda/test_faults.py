"""The checks of memory and synchronisation find what they are for, and leave correct code alone."""

import numpy as np
import pytest
import sim
from kernels import nvrtc

PARTS = {
    # Each kernel is launched with blocks of 64 threads, x [64 · blocks] written and y [64 · blocks] not.
    "exchange": """
        __shared__ float s[64];
        s[t] = x[t];
        __syncthreads();  // A
        y[i] = s[63 - t];
    """,
    "reuse": """
        __shared__ float s[64];
        for (int n = 0; n < 3; ++n) {
            s[t] = x[t] + n;
            __syncthreads();
            y[i] = s[63 - t];
            __syncthreads();  // B
        }
    """,
    "warp": """
        __shared__ float s[64];
        s[t] = x[t];
        __syncwarp();  // C
        y[i] = s[t ^ 1];
    """,
    "neighbours": """
        __shared__ float a[64], b[64];
        a[t] = x[t];
        b[t] = -x[t];
        __syncthreads();
        y[i] = a[t] + b[63 - t];  // D
    """,
    "once": """
        y[i] = x[i];  // E
    """,
    "partial": """
        if (t < 40) y[i] = x[i];
        __syncthreads();  // F
        if (t >= 40) y[i] = x[i];
    """,
    "wide": """
        if (t < 15) *(float4*)(y + 4 * t) = *(const float4*)(x + 4 * t);  // G
    """,
    "shuffle": """
        float v = x[i];
        v += __shfl_xor_sync(0xffffffffu, v, 1);  // H
        y[i] = v;
    """,
}
KERNEL = (
    'extern "C" __global__ void k(const float* x, float* y, float* z) '
    "{{ int t = threadIdx.x, i = blockIdx.x * 64 + t; {} }}"
)


def launch(part, old="", new="", blocks=1):
    text = KERNEL.format(PARTS[part])
    assert text.count(old) == 1 or not old
    device = sim.Device(sim.load(nvrtc.ptx(text.replace(old, new), "k", 80)), 1 << 14)
    x, y = device.array(np.arange(64 * blocks)), device.empty((64 * blocks,))
    device.launch("k", blocks, 64, x, y, device.array(np.zeros(4)))
    return device.read(y)


@pytest.mark.parametrize("part", PARTS)
def test_correct_code_raises_nothing(part):
    launch(part)


@pytest.mark.parametrize(
    ("part", "old", "new", "blocks", "message"),
    [
        ("exchange", "__syncthreads();  // A", "", 1, "race: read unsynchronised with block 0 thread"),
        ("exchange", "__syncthreads();  // A", "__syncwarp();", 1, "race: read unsynchronised"),
        ("reuse", "__syncthreads();  // B", "", 1, "race: write after a read unsynchronised"),
        ("warp", "__syncwarp();  // C", "", 1, "race: read unsynchronised"),
        ("warp", "s[t ^ 1]", "s[t ^ 33]", 1, "race: read unsynchronised"),
        ("neighbours", "b[63 - t];  // D", "b[64 - t];", 1, "read out of bounds of shared memory"),
        ("neighbours", "a[t] + b", "a[t + 1] + b", 1, "read out of bounds of shared memory"),
        ("neighbours", "b[t] = -x[t];", "if (t) b[t] = -x[t];", 1, "read of uninitialised shared memory"),
        (
            "once",
            "y[i] = x[i];  // E",
            "y[i] = x[i + 1];",
            2,
            "read out of bounds of global memory .* block 1 thread 63",
        ),
        ("once", "y[i] = x[i];  // E", "y[i + 1] = x[i];", 2, "write out of bounds of global memory"),
        ("once", "y[i] = x[i];  // E", "y[t] = x[i];", 2, "race: block . thread . writes"),
        ("once", "y[i] = x[i];  // E", "y[t / 2] = x[i];", 1, "writes the same word in the same instruction"),
        (
            "once",
            "y[i] = x[i];  // E",
            "y[i] = z[0]; if (i == 127) z[0] = 1;",
            2,
            "race: write after a read unsync",
        ),
        ("once", "y[i] = x[i];  // E", "y[i] += x[i];", 1, "read of uninitialised global memory"),
        ("partial", "__syncthreads();  // F", "if (t < 40) __syncthreads();", 1, "deadlock|exited"),
        ("partial", "__syncthreads();  // F", "if (t < 40) return; __syncthreads();", 1, "deadlock|exited"),
        (
            "wide",
            "*(const float4*)(x + 4 * t)",
            "*(const float4*)(x + 4 * t + 1)",
            1,
            "misaligned read of global memory",
        ),
        ("shuffle", "0xffffffffu", "0x0000ffffu", 1, "its mask leaves out"),
        ("shuffle", "v += __shfl", "if (t != 5) v += __shfl", 1, "deadlock"),
    ],
)
def test_faults_are_found(part, old, new, blocks, message):
    with pytest.raises(sim.Fault, match=message):
        launch(part, old, new, blocks)


HALVES = """extern "C" __global__ void k(const unsigned short* x, unsigned short* y) {
    __shared__ unsigned short s[64];
    int t = threadIdx.x, i = blockIdx.x * 63 + t;
    if (t >= 63) return;
    s[t] = x[i];  // A
    y[i] = s[t];  // B
}"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", ""),
        ("s[t];  // B", "s[62 - t];", "race: read unsynchronised"),
        ("y[i] = s[t];  // B", "y[i + 1] = s[t];", "write out of bounds|race"),
        ("y[i] = s[t];  // B", "if (t != 7) y[i] = s[t];", "unwritten"),
        ("x[i];  // A", "x[i + 1];", "read out of bounds of global memory"),
        ("y[i] = s[t];  // B", "*(unsigned*)(y + i) = s[t];", "misaligned write"),
        ("y[i] = s[t];  // B", "*(unsigned*)(y + i / 2 * 2) = s[t];", "race: .* writes the same"),
        ("y[i] = s[t];  // B", "y[i & ~1] = s[t];", "race"),
    ],
)
def test_neighbours_in_a_word_are_apart(old, new, message):
    """63 halves a block: words that two blocks share, or two threads, are nobody's race; their halves are."""
    assert HALVES.count(old) == 1 or not old
    device = sim.Device(sim.load(nvrtc.ptx(HALVES.replace(old, new), "k", 80)), 1 << 14)
    x, y = device.array(np.arange(126), np.uint16), device.empty((126,), np.uint16)

    def run():
        device.launch("k", 2, 64, x, y)
        device.launch("k", 2, 64, y, x)  # reads what was written

    if message == "unwritten":
        message = "read of uninitialised global memory"
    if message:
        with pytest.raises(sim.Fault, match=message):
            run()
        return
    run()
    assert device.read(x).tolist() == list(range(126))


def test_a_fault_names_the_source_line():
    with pytest.raises(sim.Fault, match=r"at k\.cu:3 \[ld\.global"):
        launch("once", "y[i] = x[i];  // E", "\n y[i] = x[i + 64];")


def test_a_division_by_zero_raises():
    with pytest.raises(ZeroDivisionError):
        launch("once", "y[i] = x[i];  // E", "y[i] = 7 / (t - 3);")


def test_launches_of_one_stream_are_ordered():
    text = 'extern "C" __global__ void k(float* y) { y[threadIdx.x] += 1; }'
    device = sim.Device(sim.load(nvrtc.ptx(text, "k", 80)), 1 << 14)
    y = device.array(np.zeros(8))
    device.launch("k", 1, 8, y)
    device.launch("k", 1, 8, y)
    assert device.read(y).tolist() == [2] * 8
    with pytest.raises(sim.Fault, match="race"):
        device.launch("k", 2, 8, y)
