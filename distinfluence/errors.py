"""Every error that the package raises on purpose.

Each class is a `DistinfluenceError` and also the builtin that a caller would catch. Messages name the argument in
backticks, say what was expected, what came, and what to do. Numerical failure (a row that did not converge) is no
error: it is a field of the result.
"""


class DistinfluenceError(Exception):
    """Serves as the base of all errors raised by distinfluence."""


class ShapeError(DistinfluenceError, ValueError):
    """An array has the wrong shape, or two arrays that belong together differ in length."""


class DtypeError(DistinfluenceError, TypeError):
    """An array has a dtype that the computation cannot take."""


class NonFiniteError(DistinfluenceError, ValueError):
    """Data, parameters, losses or gradients hold NaN or infinity."""


class EmptyDataError(DistinfluenceError, ValueError):
    """A data set, batch or parameter set has no elements."""


class ModelModeError(DistinfluenceError, ValueError):
    """The model is in train mode with layers whose output is random or depends on the rest of the batch."""


class NonDeterministicModelError(DistinfluenceError, RuntimeError):
    """Two evaluations of the model on the same batch gave different losses."""


class NonDeterministicDataError(DistinfluenceError, RuntimeError):
    """A data set gave other values for the same sample when it was read again."""


class InPlaceError(DistinfluenceError, RuntimeError):
    """A model writes to its own parameters when it is called."""


class DerivativeError(DistinfluenceError, ArithmeticError):
    """Derivatives do not match what the model or the loss computes."""


class UnsupportedModelError(DistinfluenceError, TypeError):
    """A model is wrapped, compiled, quantised or incomplete in a way that keeps it from being differentiated."""


class ModelError(DistinfluenceError, RuntimeError):
    """A model, a loss or an objective raised an error of its own, which is the cause of this one."""


class LossError(DistinfluenceError, ValueError):
    """The loss cannot be written as one value per sample."""


class ParameterBlockError(DistinfluenceError, ValueError):
    """A block of parameters is unknown, empty, or overlaps another."""


class SettingError(DistinfluenceError, ValueError):
    """A hyperparameter is outside its range or not one of the allowed names."""


class UnsupportedOperatorError(DistinfluenceError, TypeError):
    """An operator lacks what a solver needs of it."""


class LayoutError(DistinfluenceError, RuntimeError):
    """A model does not use its layers in the same way for every batch."""


class DecompositionError(DistinfluenceError, ArithmeticError):
    """A matrix could not be decomposed."""


class NotFittedError(DistinfluenceError, RuntimeError):
    """A method was called that needs `fit` first."""


class ChunkError(DistinfluenceError, ValueError):
    """Chunks of arrays that belong together do not line up."""


class RecipeError(DistinfluenceError, ValueError):
    """A model, loss or data set cannot be built from its reference, or is not the one that was promised."""


class ClusterError(DistinfluenceError, RuntimeError):
    """The cluster has no workers, or workers that cannot do the work (several threads, no shared folder)."""


class ChunkFailedError(DistinfluenceError, RuntimeError):
    """Some chunks failed every time they were tried; everything else has been computed and written."""


class RetrainingError(DistinfluenceError, RuntimeError):
    """A model could not be trained again on a part of the data, or does not depend on the part that was asked for."""


class SampleError(DistinfluenceError, RuntimeError):
    """Samples could not be loaded or evaluated; the message says which, its cause is the original error."""


class PlanError(DistinfluenceError, MemoryError):
    """A run needs more memory than its workers have, however it is cut, or with the chunk sizes that were given."""


class ConfigError(DistinfluenceError, ValueError):
    """A job file has an unknown key, a missing key, or a value of the wrong kind."""


class MissingDependencyError(DistinfluenceError, ImportError):
    """An optional package is needed for this call."""


class StoreError(DistinfluenceError, OSError):
    """A result on disk cannot be read or written."""


class DiskFullError(StoreError):
    """The disk is full, a quota used up, or the file system read-only: nothing more can be written by anyone."""


class ForeignStoreError(StoreError, FileExistsError):
    """The path holds something that distinfluence did not write."""


class FingerprintError(StoreError, ValueError):
    """The result on disk belongs to another model, data set or solver."""


class IncompleteResultError(StoreError, LookupError):
    """What was asked for has not been computed yet."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no result at the path."""


class StoreExistsError(StoreError, FileExistsError):
    """The path holds a result already, and neither resuming nor overwriting was asked for."""


class CorruptStoreError(StoreError, ValueError):
    """Bytes of a result on disk are not those that were written."""


class IndexRangeError(DistinfluenceError, IndexError):
    """An index lies outside the axis that it counts along."""
