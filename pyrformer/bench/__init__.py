"""Measurements of this machine: what ``pyrformer bench`` and ``benchmarks/`` print."""
