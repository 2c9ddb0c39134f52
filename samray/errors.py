"""Everything samray raises on purpose.

    SamrayError
     +- ConfigError       a setting, option or folder is invalid
     +- AnnotationError   an annotation or its image cannot be used
     +- DatasetError      a prepared dataset is missing, empty, damaged or another one
     +- EmptyMaskError    a mask has no pixel
     +- CheckpointError   weights or a run folder cannot be used
     +- StorageError      a bucket or an object in it cannot be read or written
     +- DownloadError     official weights could not be downloaded
     +- ClusterError      the Ray cluster lacks what the run asks for
     +- EndpointError     an endpoint does not answer, or rejects a request
     +- TrainingError     training failed (the loss is not a number)
     +- SweepError        no trial of a sweep finished, or some were not run
     +- StoreError        a store of models or a version cannot be used
     +- GuardError        a model is not good enough to be promoted

The user can correct the cause of each, so the command line prints its one line and exits with
status 2. Any other exception is a bug and keeps its traceback.
"""

import re

_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")  # user and password of a URL
_QUERY = re.compile(r"(://[^\s?'\")]*)\?[^\s;,'\")]*")  # e.g. the signature of a link into a bucket


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost what may be secret: user, password and query."""
    return _QUERY.sub(r"\1", _LOGIN.sub("", text))


class SamrayError(Exception):
    """Base of every error that samray raises on purpose.

    Messages are printed, and kept in the logs of Ray, so URLs in them are shown without secrets.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(SamrayError, ValueError):
    """A setting, option or folder that the user chose is invalid."""


class AnnotationError(SamrayError, ValueError):
    """One annotation, or the image it refers to, cannot be used.

    Args:
        field: where in the file, e.g. ``shapes[2].points``.
        reason: what was expected, what was found, and what to do.
        num_shapes: the shapes of a file that is not used as a whole, as far as they were counted.
    """

    def __init__(self, field: str, reason: str, num_shapes: int = 0) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.num_shapes = num_shapes

    def __reduce__(self) -> tuple[type["AnnotationError"], tuple[str, str, int]]:
        """Support pickling; the default would pass the whole message as the only argument."""
        return type(self), (self.field, self.reason, self.num_shapes)


class DatasetError(SamrayError, ValueError):
    """A dataset is missing, has no usable content, is damaged or is not the expected one."""


class EmptyMaskError(SamrayError, ValueError):
    """A mask has no pixel, so no prompt can be drawn from it."""


class CheckpointError(SamrayError, ValueError):
    """Weights or a RUN folder cannot be used."""


class StorageError(SamrayError, OSError):
    """A bucket or an object in it cannot be read or written."""


class DownloadError(SamrayError, OSError):
    """Official weights could not be downloaded completely."""


class ClusterError(SamrayError, RuntimeError):
    """The Ray cluster lacks what the run asks for."""


class EndpointError(SamrayError, OSError):
    """An endpoint that samray calls as a client does not answer, or rejects the request.

    Args:
        code: error code of the rejection, if any.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class TrainingError(SamrayError, RuntimeError):
    """Training cannot continue, e.g. because the loss is not a number."""


class SweepError(SamrayError, RuntimeError):
    """No trial of a sweep finished, or Ray Tune did not run all of them."""


class StoreError(SamrayError, ValueError):
    """A store of models or a version in it cannot be used."""


class GuardError(SamrayError, RuntimeError):
    """A model is not good enough to replace the current version."""
