"""A training run: the loop (:mod:`.trainer`) over its parts: options, the model to begin with, sources, passes,
checkpoints, signals, what is watched."""
