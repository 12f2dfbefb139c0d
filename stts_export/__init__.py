"""Token-pruned video language models on real devices."""

from stts_export._version import __version__
from stts_export.errors import (
    InputError,
    MissingDependencyError,
    SttsError,
    VerificationError,
)
from stts_export.runtime.session import Answer, EncodedClip, Session

__all__ = [
    "Answer",
    "EncodedClip",
    "InputError",
    "MissingDependencyError",
    "Session",
    "SttsError",
    "VerificationError",
    "__version__",
]
