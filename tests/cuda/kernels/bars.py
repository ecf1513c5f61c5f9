"""What ptxas says of each kernel, and the bars it must stay under.

`python -m kernels.bars`, from tests/cuda, measures all kernels and rewrites cuda/bars.toml: run it when a kernel earns
lower numbers, or when a higher one was decided on, and look at the diff.
"""

from __future__ import annotations

import re
import sys

from kernels import nvrtc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = nvrtc.KERNELS / "bars.toml"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
#: The target of `nvrtc.HOPPER`.
OWN = "90a"
# Static shared memory beyond this needs an opt-in on every architecture; with it, some give a block no more than this.
SHARED_LIMIT, DYNAMIC_LIMIT = 48 * 1024, 99 * 1024
# The most that Turing gives a block, for which float16 is, and that compute capability 9.0 does.
TURING_LIMIT, HOPPER_LIMIT = 64 * 1024, 227 * 1024

_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def reports(name: str, arch: int | str, text: str = "") -> dict[str, dict[str, int]]:
    """Of each kernel of a file, or of a text in its place: registers, shared bytes, bytes of stack and spills."""
    found, log = {}, nvrtc.cubin(text or nvrtc.unit(name), name, arch)
    # C7510 and the codes behind it: products of warpgroups that are run one after the other, or waited for elsewhere.
    assert "(C75" not in log, log
    for m in _REPORT.finditer(log):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        found[m["name"]] = {
            "registers": int(m["registers"]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "local_bytes": int(m["stack"]) + int(m["stores"]) + int(m["loads"]),
        }
    return found


def dynamic(name: str) -> dict[str, int]:
    """Of the kernels of a file that use such: the shared memory that launches ask for, from the words beside them."""
    words = re.findall(
        r"\.global \.align 4 \.u32 (\w+)_shared = (\d+);",
        nvrtc.ptx(nvrtc.unit(name), name, OWN if name == nvrtc.HOPPER else 80),
    )
    return {kernel: int(size) for kernel, size in words}


def read(file: str) -> dict[str, dict]:
    """The bars of the kernels of a file: `file`, `shared_bytes`, `registers` by architecture, `dynamic_bytes` if it has
    such."""
    bars = tomllib.loads(FILE.read_text())
    own = bars.pop(f"sm_{OWN}")
    return own if file == nvrtc.HOPPER else {name: bar for name, bar in bars.items() if bar["file"] == file}


def _measure() -> str:
    lines = [
        "# The most registers of a thread by architecture, the most static shared memory of a block, and the dynamic",
        "# one that launches ask for, with the NVRTC of tests/cuda/requirements.txt. Written by kernels/bars.py there.",
        "# Local memory and spills are never allowed. Last, the kernels that a target has of its own.",
    ]
    for file in [*nvrtc.files(), nvrtc.HOPPER]:
        own = file == nvrtc.HOPPER
        targets = (OWN,) if own else ARCHITECTURES
        measured = {arch: reports(file, arch) for arch in targets}
        asked = dynamic(file)
        for kernel in sorted(measured[targets[0]]):
            registers = ", ".join(f"sm_{a} = {measured[a][kernel]['registers']}" for a in targets)
            shared = max(measured[a][kernel]["shared_bytes"] for a in targets)
            lines += [
                "",
                f"[sm_{OWN}.{kernel}]" if own else f"[{kernel}]",
                f'file = "{file}"',
                f"shared_bytes = {shared}",
                *([f"dynamic_bytes = {asked[kernel]}"] if kernel in asked else []),
                f"registers = {{ {registers} }}",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(_measure())
