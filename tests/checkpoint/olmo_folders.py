"""Small training folders in olmo's formats, laid out as the reference's own writers do."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stts_export.checkpoint.names import checkpoint_name
from stts_export.model.vlm import SttsModel
from tests.helpers import small_config


@dataclass
class _StorageInfo:
    relative_path: str
    offset: int
    length: int


def olmo_config(
    values: dict[str, Any] | None = None, *, tied: bool = False, **changes: Any
) -> dict[str, Any]:
    """`config.yaml` of the model of a Hugging Face configuration.

    Args:
        values: `small_config()` if absent.
        tied: whether the head is the embedding.
        changes: keys below `model`, with double underscores in place of dots.
    """
    values = values or small_config()
    vit, adapter, text = (values[f"{name}_config"] for name in ("vit", "adapter", "text"))
    model: dict[str, Any] = {
        "model_name": "temporal_video_olmo",
        "llm": {
            "d_model": text["hidden_size"],
            "n_heads": text["num_attention_heads"],
            "n_kv_heads": text["num_key_value_heads"],
            "head_dim": text["head_dim"],
            "n_layers": text["num_hidden_layers"],
            "mlp_hidden_size": 2 * text["intermediate_size"],
            "rope": True,
            "rope_theta": text["rope_theta"],
            "attention_layer_norm": True,
            "attention_layer_norm_type": "qwen3",
            "layer_norm_type": "rms",
            "layer_norm_eps": text["layer_norm_eps"],
            "include_bias": False,
            "weight_tying": tied,
            "vocab_size": text["vocab_size"],
            "embedding_size": text["vocab_size"],
            "additional_vocab_size": text["additional_vocab_size"],
            "max_sequence_length": text["max_position_embeddings"],
        },
        "vision_backbone": {
            "vit": {
                "image_model_type": "siglip",
                "image_default_input_size": vit["image_default_input_size"],
                "image_patch_size": vit["image_patch_size"],
                "image_emb_dim": vit["hidden_size"],
                "image_num_heads": vit["num_attention_heads"],
                "image_num_key_value_heads": vit["num_key_value_heads"],
                "image_num_layers": vit["num_hidden_layers"],
                "image_head_dim": vit["head_dim"],
                "image_mlp_dim": vit["intermediate_size"],
                "image_mlp_activations": "gelu_pytorch_tanh",
                "image_num_pos": vit["image_num_pos"],
                "image_norm_eps": vit["layer_norm_eps"],
                "resize_mode": "siglip",
                "normalize": "siglip",
                "prune_at": vit["prune_at"],
                "topk": vit["topk"],
            },
            "pooling_attention_mask": adapter["pooling_attention_mask"],
            "vit_layers": adapter["vit_layers"],
        },
        "bi_directional_attn": "image_tokens",
        "mm_preprocessor": {"max_frames": 64, "use_frame_special_tokens": True},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = model
        for section in sections:
            target = target.setdefault(section, {})
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return {"run_name": "test", "seed": 1, "model": model, "optimizer": {"name": "adamw"}}


def olmo_state(model: SttsModel, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """The parameters by olmo's names."""
    state = {}
    for name, parameter in model.named_parameters():
        theirs = checkpoint_name(name)
        if theirs == "lm_head.weight":
            if tied:
                continue
            theirs = "model.transformer.ff_out.weight"
        theirs = theirs.removeprefix("model.").replace(".self_attn.", ".").replace(".mlp.ff", ".ff")
        state[theirs] = parameter.detach().clone()
    return state


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")


def write_unsharded(
    folder: Path, state: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Path:
    write_config(folder, config or olmo_config())
    torch.save(dict(state), folder / "model.pt")
    return folder


def write_sharded(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    ranks: int = 1,
) -> Path:
    """Write as `ranks` processes would that share every tensor along its first axis."""
    write_config(folder, config or olmo_config())
    (folder / "model_and_optim").mkdir()
    metadata = Metadata({}, storage_data={}, storage_meta=StorageMeta("model_and_optim"))
    for rank in range(ranks):
        file = folder / "model_and_optim" / f"__{rank}_0.distcp"
        with file.open("wb") as shard:
            shard.write(b"x" * 3)  # so that nothing is aligned
            for name, tensor in state.items():
                _write_piece(shard, metadata, f"model.{name}", tensor, rank, ranks)
    metadata.state_dict_metadata["optim.param_groups"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("optim.param_groups")] = _StorageInfo("gone.distcp", 0, 9)
    write_metadata(folder, metadata)
    return folder


def _write_piece(
    shard: Any, metadata: Metadata, name: str, tensor: torch.Tensor, rank: int, ranks: int
) -> None:
    rows = -(-len(tensor) // ranks)  # of the last ranks less, or none
    part = tensor[rank * rows : (rank + 1) * rows].clone()
    zeros = [0] * (tensor.ndim - 1)
    offsets = torch.Size([min(rank * rows, len(tensor)), *zeros])
    entry = metadata.state_dict_metadata.setdefault(
        name, TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [])
    )
    entry.chunks.append(ChunkStorageMetadata(offsets, part.shape))  # type: ignore[union-attr]
    if part.numel():
        start = shard.tell()
        torch.save(part, shard)
        info = _StorageInfo(Path(shard.name).name, start, shard.tell() - start)
        metadata.storage_data[MetadataIndex(name, offsets)] = info


def write_metadata(folder: Path, metadata: object) -> None:
    """Pickle under the names of the reference's classes."""
    with _reference_module():
        data = pickle.dumps(metadata)
    (folder / "model_and_optim" / ".metadata").write_bytes(data)


def read_metadata(folder: Path) -> Any:
    """The metadata of a folder, to be changed and written again."""
    with _reference_module():
        return pickle.loads((folder / "model_and_optim" / ".metadata").read_bytes())


@contextmanager
def _reference_module() -> Iterator[None]:
    """Let pickle find our class where the reference has its own."""
    names = ("olmo", "olmo.train", "olmo.train.remote_filesystem")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]]._StorageInfo = _StorageInfo  # type: ignore[attr-defined]
    _StorageInfo.__module__ = names[-1]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
