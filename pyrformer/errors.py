"""What can go wrong, as exceptions with one root.

Every message is one sentence that says what is wrong, where, and what to do. Each class also derives from the built-in
exception that Python users expect.
"""


class Error(Exception):
    """The root of all errors of this package."""


class InputError(Error, ValueError):
    """A value given by the caller is wrong: an option, a text, an index."""


class ConfigError(InputError):
    """A configuration is contradictory or incomplete."""


class ShapeError(Error, ValueError):
    """Tensors whose shapes or types do not fit."""


class GraphError(Error, ValueError):
    """A graph that cannot be built or differentiated."""


class StateError(Error, ValueError):
    """A parameter or other state that is missing or of another type."""


class DataError(InputError):
    """A text file or corpus that cannot be read, or cut into batches."""


class TokenizerError(InputError):
    """A tokenizer that cannot be trained, read or used."""


class NonFiniteError(Error, ArithmeticError):
    """A loss or a gradient that is no finite number."""


class Stopped(KeyboardInterrupt):
    """A run that was ended by a signal, after its state was saved.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, signal: int, step: int, folder: object):
        super().__init__(f"interrupted after step {step}; {folder} is saved, go on with --resume")
        self.signal = signal


class FileError(Error, OSError):
    """A file that cannot be read or written, or does not hold what it should."""


class ResourceError(Error, MemoryError):
    """Memory or threads that cannot be had."""


class DeviceError(Error, RuntimeError):
    """A device that is missing, too small, or cannot do what a plan asks of it."""


class InternalError(Error, RuntimeError):
    """A broken invariant: a fault of pyrformer."""
