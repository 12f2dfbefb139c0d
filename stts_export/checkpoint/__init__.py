"""Readers and writers of trained models."""

from stts_export.checkpoint.huggingface import (
    Checkpoint,
    model_from_checkpoint,
    open_checkpoint,
    save_checkpoint,
)

__all__ = ["Checkpoint", "model_from_checkpoint", "open_checkpoint", "save_checkpoint"]
