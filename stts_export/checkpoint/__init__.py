"""Readers and writers of trained models."""

from stts_export.checkpoint.opening import open_checkpoint
from stts_export.checkpoint.stored import (
    Checkpoint,
    StoredTensor,
    check_tensors,
    model_from_checkpoint,
)
from stts_export.checkpoint.streamed import streamed_model
from stts_export.checkpoint.writing import save_checkpoint

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "check_tensors",
    "model_from_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "streamed_model",
]
