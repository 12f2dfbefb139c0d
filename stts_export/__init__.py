"""Token-pruned video language models on real devices."""

from stts_export._version import __version__

__all__ = ["__version__"]
