"""Everything samray raises on purpose.

    SamrayError
     +- ConfigError       a setting, option or folder the user chose cannot work
     +- AnnotationError   an annotation or its image cannot be used
     +- DatasetError      a prepared dataset is missing, empty, damaged or the wrong one
     +- EmptyMaskError    a mask has no pixel to point at
     +- CheckpointError   weights or a run folder cannot be used
     +- StorageError      a bucket, or what is in it, cannot be read or written
     +- DownloadError     official weights could not be fetched whole
     +- ClusterError      Ray has not what the run asks for
     +- EndpointError     an endpoint does not answer, or refuses
     +- TrainingError     training itself went wrong (a loss that is not a number)

All are the user's to mend, so the command line prints their one line and ends with
status 2; anything else is a bug of ours and keeps its traceback.
"""


class SamrayError(Exception):
    """Base of every error that samray raises on purpose."""


class ConfigError(SamrayError, ValueError):
    """A setting, option or folder that the user chose cannot work."""


class AnnotationError(SamrayError, ValueError):
    """One annotation, or the image it speaks of, cannot be used.

    Args:
        field: where in the file, e.g. ``shapes[2].points``.
        reason: what was expected, what came, and what to do.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type["AnnotationError"], tuple[str, str]]:
        """Let it cross processes; the default would call it with the whole message alone."""
        return type(self), (self.field, self.reason)


class DatasetError(SamrayError, ValueError):
    """A dataset is missing, has nothing usable, is damaged or is not the expected one."""


class EmptyMaskError(SamrayError, ValueError):
    """A mask has no pixel, so there is nothing to point at."""


class CheckpointError(SamrayError, ValueError):
    """Weights or a run folder cannot be used."""


class StorageError(SamrayError, OSError):
    """A bucket, or what is in it, cannot be read or written."""


class DownloadError(SamrayError, OSError):
    """Official weights could not be fetched whole."""


class ClusterError(SamrayError, RuntimeError):
    """The Ray cluster lacks what the run asks for."""


class EndpointError(SamrayError, OSError):
    """An endpoint that samray asks as a client does not answer, or refuses.

    Args:
        code: of its refusal, where it has one.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class TrainingError(SamrayError, RuntimeError):
    """Training cannot go on, e.g. the loss is no longer a number."""


class SweepError(SamrayError, RuntimeError):
    """No trial of a sweep came to an end."""


class StoreError(SamrayError, ValueError):
    """A store of models, or a version in it, cannot be used."""


class GuardError(SamrayError, RuntimeError):
    """A model is not good enough to replace what is there."""
