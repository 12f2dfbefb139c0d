"""Token-pruned video language models on real devices."""

from stts_export._version import __version__
from stts_export.errors import (
    InputError,
    MissingDependencyError,
    SttsError,
    VerificationError,
)
from stts_export.live.events import LiveAnswer, LiveEnd, LiveNotice
from stts_export.runtime.logits import Sampling, TokenLogprob
from stts_export.runtime.prompt import Subtitle, multiple_choice
from stts_export.runtime.session import Answer, EncodedClip, Session
from stts_export.runtime.subtitles import read_subtitles
from stts_export.runtime.visuals import EncodedImage, VisualSummary

__all__ = [
    "Answer",
    "EncodedClip",
    "EncodedImage",
    "InputError",
    "LiveAnswer",
    "LiveEnd",
    "LiveNotice",
    "MissingDependencyError",
    "Sampling",
    "Session",
    "SttsError",
    "Subtitle",
    "TokenLogprob",
    "VerificationError",
    "VisualSummary",
    "__version__",
    "multiple_choice",
    "read_subtitles",
]
