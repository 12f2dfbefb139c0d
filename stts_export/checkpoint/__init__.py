"""Readers and writers of trained models."""

from stts_export.checkpoint.huggingface import (
    Checkpoint,
    check_tensors,
    model_from_checkpoint,
    open_checkpoint,
    save_checkpoint,
)

__all__ = [
    "Checkpoint",
    "check_tensors",
    "model_from_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
