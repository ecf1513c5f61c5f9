"""Runs CUDA kernels on the CPU: NVRTC's PTX, executed by NumPy with one array element per thread.

`ptx` reads PTX, `ops` turns each basic block into a Python function by a rule for each instruction, `machine` schedules
threads, barriers and warp operations, `memory` checks every access. Nothing about a kernel is replaced by an
emulation header: what runs is what the compiler made of the shipped source.

Where it differs from hardware: `.approx` functions are exact here; fma.rn is rounded twice, which shows about once in
2^29; memory is sequentially consistent within one step.
"""

from .counter import Counter
from .machine import Buffer, Device, Program, load
from .memory import Fault
from .ptx import UnknownInstruction

__all__ = ["Buffer", "Counter", "Device", "Fault", "Program", "UnknownInstruction", "load"]
