"""The parts of a training run: options, sources, checkpoints, signals, what is watched. The loop is
``pyrformer.trainer``."""
