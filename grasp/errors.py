"""Exceptions of our own, for what a caller may want to tell apart."""


class GraspError(Exception):
    """Something the user can put right; the message has what was got, what was expected and the remedy."""


class NonFiniteError(GraspError, ValueError):
    """Weights, gradients or a loss are NaN or infinite."""


class CalibrationError(GraspError, ValueError):
    """The calibration text is missing or too short."""


class TrainingDataError(GraspError, ValueError):
    """The data to fine-tune on cannot be read, or are too few."""


class UnsupportedModelError(GraspError, TypeError):
    """The model's decoder layers cannot be found, or hold nothing that can be compressed."""


class CheckpointError(GraspError, ValueError):
    """A checkpoint folder does not hold what its configuration says."""


class ModelNotFoundError(GraspError, ValueError):
    """There is no model of that name, or the hub that may have it cannot be reached."""


class MissingPackageError(GraspError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""


class ResumeError(GraspError, ValueError):
    """An unfinished run cannot be continued: it was another request, its folder is damaged, in use or not writable."""


class DistributedError(GraspError, RuntimeError):
    """One of the processes that compress a model together has failed, is gone, or was given something else."""


class OutOfMemoryError(GraspError, MemoryError):
    """The device has too little memory for the job."""


class ResultsError(GraspError, ValueError):
    """A file of benchmark results cannot be read, is damaged, or is of another schema."""


class CostTableError(GraspError, ValueError):
    """A table of decode costs cannot be read, or is not for this model."""


class TaskError(GraspError, ValueError):
    """A task of lm-eval is not known, or its documents are missing, unreadable or out of reach."""


class HubError(GraspError, RuntimeError):
    """The hub refuses an upload, or cannot be reached."""
