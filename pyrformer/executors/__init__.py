"""What runs a plan besides the CPU executor of the core: CUDA devices.

* :mod:`~pyrformer.executors.device` — what a device can do, as a small interface;
* :mod:`~pyrformer.executors.program` — walks a plan's launch records on any such device;
* :mod:`~pyrformer.executors.cublaslt` — matrix products;
* :mod:`~pyrformer.executors.cuda` — a real device, by CuPy; the only file that imports it.

Tests put a simulated device behind the same interface, so that everything but the last file runs without a GPU.
"""
