"""Exceptions that a caller may want to handle separately."""


class GraspError(Exception):
    """An error that the user can correct; its message has the value, the expectation and the remedy."""


class NonFiniteError(GraspError, ValueError):
    """Weights, gradients or a loss are NaN or infinite."""


class CalibrationError(GraspError, ValueError):
    """The calibration text is missing or too short."""


class TrainingDataError(GraspError, ValueError):
    """The training data cannot be read, or there is too little."""


class UnsupportedModelError(GraspError, TypeError):
    """The model's decoder layers cannot be found, or have no linears that can be compressed."""


class CheckpointError(GraspError, ValueError):
    """A checkpoint folder cannot be read or written, or does not match its configuration."""


class OccupiedError(GraspError):
    """Something else appeared at an output while it was written; both are kept."""


class ModelNotFoundError(GraspError, ValueError):
    """No model has this name, or the hub cannot be reached."""


class MissingPackageError(GraspError, ImportError):
    """An optional package is not installed; the message has the installing command."""


class ResumeError(GraspError, ValueError):
    """A run cannot be resumed: its folder belongs to another request, is damaged, in use or not writable."""


class DistributedError(GraspError, RuntimeError):
    """One of the processes of a compression has failed, has ended, or has other inputs."""


class OutOfMemoryError(GraspError, MemoryError):
    """The device has too little memory."""


class ResultsError(GraspError, ValueError):
    """A file of results cannot be read, is damaged, or has another schema."""


class CostTableError(GraspError, ValueError):
    """A cost table cannot be read, or does not cover this model."""


class TaskError(GraspError, ValueError):
    """A task of lm-eval is unknown, or its documents are missing, unreadable or unreachable."""


class HubError(GraspError, RuntimeError):
    """The hub refuses an upload, or cannot be reached."""


class ServerError(GraspError, RuntimeError):
    """A server does not start, does not answer or gives no valid answer, or its benchmark client fails."""
