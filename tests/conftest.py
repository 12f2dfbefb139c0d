"""Bundles that are expensive to build, built once per test run and shared by its workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock

from stts_export.build import BuildSpec, bundle_from_bundle, bundle_from_checkpoint
from stts_export.checkpoint import save_checkpoint
from stts_export.tensors import Precision
from stts_export.training.config import ModelShape, model_json
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.helpers import GOLDEN, random_checkpoint, random_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def small_checkpoint(shared_folder: Path) -> Path:
    folder = shared_folder / "small_checkpoint"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            random_checkpoint(folder)
    return folder


def _bundle(shared_folder: Path, name: str, checkpoint: Path, precision: Precision) -> Path:
    folder = shared_folder / f"{name}-{precision}"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            bundle_from_checkpoint(checkpoint, folder, BuildSpec(precision=precision))
    return folder


@pytest.fixture(scope="session")
def small_bundle(shared_folder: Path, small_checkpoint: Path) -> Path:
    """fp32, 6x9 patches, 6 windows a frame; read only."""
    return _bundle(shared_folder, "small", small_checkpoint, "fp32")


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def golden_bundle(shared_folder: Path, request: pytest.FixtureRequest) -> Path:
    """The golden checkpoint at both precisions; read only."""
    return _bundle(shared_folder, "golden", GOLDEN, request.param)


@pytest.fixture(scope="session")
def text_bundle(shared_folder: Path) -> Path:
    """Random weights with the training's tokenizer, so that prompts can be text; read only."""
    bundle = shared_folder / "text"
    with FileLock(str(bundle) + ".lock"):
        if not bundle.exists():
            tokenizer, vocab_size = build_tokenizer()
            shape = ModelShape(
                image_size=48, patch_size=4, vision_width=32, vision_heads=2, vision_mlp=48,
                vision_blocks=4, prune_at=0, taps=(3, 2), connector_mlp=48, text_width=32,
                text_heads=2, text_kv_heads=1, text_mlp=48, text_layers=2,
            )  # fmt: skip
            checkpoint = shared_folder / "text_checkpoint"
            values = model_json(shape, vocab_size, max_frames=8, ratio=0.5)
            save_checkpoint(random_model(values), checkpoint)
            save_tokenizer_files(tokenizer, checkpoint, max_frames=8)
            bundle_from_checkpoint(checkpoint, bundle)
    return bundle


@pytest.fixture(scope="session")
def rtx_bundle(shared_folder: Path, golden_bundle: Path) -> Path:
    """The golden bundle with TensorRT for RTX engines for two GPUs; read only."""
    bundle = shared_folder / f"{golden_bundle.name}-rtx"
    with FileLock(str(bundle) + ".lock"):
        if not bundle.exists():
            spec = BuildSpec(
                backends=("tensorrt-rtx",), targets=("sm89", "sm120"), max_frames=16,
                max_tokens=2048,
            )  # fmt: skip
            bundle_from_bundle(golden_bundle, bundle, spec)
    return bundle
