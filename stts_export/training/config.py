"""The configuration of a training run, read from YAML and checked before any work starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from stts_export.errors import InputError, did_you_mean

Section = TypeVar("Section")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}", where="training configuration", allowed=allowed)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; lengths in pixels, widths in channels."""

    image_size: int = 120
    """Side of the square input; a multiple of three patches."""
    patch_size: int = 10
    vision_width: int = 96
    vision_heads: int = 3
    vision_mlp: int = 256
    vision_blocks: int = 6
    prune_at: int = 1
    """0-based block whose output is scored."""
    taps: tuple[int, ...] = (5, 3)
    """0-based blocks that feed the connector, above `prune_at + 1`."""
    connector_mlp: int = 256
    text_width: int = 128
    text_heads: int = 4
    text_kv_heads: int = 2
    text_mlp: int = 320
    text_layers: int = 3
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        unit = 3 * self.patch_size
        _require(
            self.image_size > 0 and self.image_size % unit == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of {unit} (three patches)",
        )
        for name, width, heads in (
            ("model.vision_heads", self.vision_width, self.vision_heads),
            ("model.text_heads", self.text_width, self.text_heads),
        ):
            fits = heads > 0 and width % heads == 0 and (width // heads) % 2 == 0
            _require(fits, name, heads, f"a divisor of {width} that leaves an even head width")
        _require(
            self.text_kv_heads > 0 and self.text_heads % self.text_kv_heads == 0,
            "model.text_kv_heads",
            self.text_kv_heads,
            f"a divisor of text_heads = {self.text_heads}",
        )
        _require(
            bool(self.taps)
            and min(self.taps) > self.prune_at + 1
            and max(self.taps) == self.vision_blocks - 1,
            "model.taps",
            self.taps,
            f"blocks above prune_at + 1 = {self.prune_at + 1}, the last one "
            f"({self.vision_blocks - 1}) among them",
        )
        _require(self.prune_at >= 0, "model.prune_at", self.prune_at, "0 or more")


@dataclass(frozen=True)
class DataSettings:
    """What a step is made of."""

    clips_per_step: int = 8
    questions_per_clip: int = 6
    """At most; a clip has no more questions than its content allows."""
    max_frames: int = 16
    """Upper limit of sampled frames, stored with the checkpoint."""
    label_frames: int = 48
    """Single frames of a step of the first stage; see `optim.label_steps`."""
    easier_share: float = 0.2
    """Fraction of clips drawn from the levels below the current one."""
    advance_at: float = 0.8
    """Mean dev accuracy at which the next level begins."""
    advance_after: tuple[int, ...] = (1300, 2400)
    """Steps at which levels 1 and 2 begin at the latest."""

    def __post_init__(self) -> None:
        for name in ("clips_per_step", "questions_per_clip", "label_frames"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name}", value, "1 or more")
        _require(self.max_frames >= 10, "data.max_frames", self.max_frames, "10 or more")
        for name in ("easier_share", "advance_at"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"data.{name}", value, "0 to 1")
        _require(
            len(self.advance_after) == 2 and 0 <= self.advance_after[0] <= self.advance_after[1],
            "data.advance_after",
            self.advance_after,
            "two ascending numbers of steps",
        )


@dataclass(frozen=True)
class PruningSettings:
    """How much is removed in training, and what teaches the scores."""

    full_share: float = 0.15
    """Fraction of clips from which nothing is removed."""
    min_ratio: float = 0.3
    max_ratio: float = 0.8
    """Prune ratios of the other clips: triangular between the two, most often their middle."""
    similarity_coefficient: float = 10.0
    """Weight of the loss that pulls a score to 1 - similarity with the frame before.

    Far above the reference's 0.5, which here lets scores fall towards 0 until ties decide.
    """

    def __post_init__(self) -> None:
        _require(0 <= self.full_share <= 1, "pruning.full_share", self.full_share, "0 to 1")
        _require(
            0 < self.min_ratio < self.max_ratio < 1,
            "pruning.min_ratio, max_ratio",
            (self.min_ratio, self.max_ratio),
            "0 < min_ratio < max_ratio < 1",
        )
        _require(
            self.similarity_coefficient >= 0,
            "pruning.similarity_coefficient",
            self.similarity_coefficient,
            "0 or more",
        )


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up, a constant rate, and a linear descent to zero."""

    steps: int = 3000
    """Optimizer steps of both stages together."""
    label_steps: int = 500
    """Steps of the first stage: the vision tower names what the windows of single frames show."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    cooldown_share: float = 0.25
    """Last fraction of the steps, over which the rate falls."""
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    label_coefficient: float = 0.5
    """Weight in the second stage of naming what each kept window shows."""
    bfloat16: bool = False
    """Run the matrix products in bfloat16; scorer and losses stay in float32."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "optim.steps", self.steps, "1 or more")
        _require(
            0 <= self.label_steps < self.steps,
            "optim.label_steps",
            self.label_steps,
            f"0 or more, below steps = {self.steps}",
        )
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "above 0")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(
            0 < self.cooldown_share <= 1, "optim.cooldown_share", self.cooldown_share, "0 to 1"
        )
        for name in ("weight_decay", "label_coefficient"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.{name}", value, "0 or more")
        _require(self.gradient_clip > 0, "optim.gradient_clip", self.gradient_clip, "above 0")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output: str
    """Folder of the run, relative to the working directory."""
    seed: int = 0
    threads: int = 1
    log_every: int = 20
    """Optimizer steps between two lines of the log."""
    dev_every: int = 250
    """Optimizer steps between two evaluations on dev clips, each followed by a checkpoint."""
    dev_clips: int = 60
    keep_checkpoints: int = 3
    """Newest step folders that stay on disk."""
    model: ModelShape = field(default_factory=ModelShape)
    data: DataSettings = field(default_factory=DataSettings)
    pruning: PruningSettings = field(default_factory=PruningSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", self.output, "the name of a folder")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name in ("threads", "log_every", "dev_every", "dev_clips", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")

    @staticmethod
    def from_file(path: Path) -> TrainConfig:
        """Read a YAML file.

        Raises:
            InputError: the file cannot be read, a key is unknown, or a value is not allowed.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                "no such file", where=str(path), fix="pass a file such as configs/demo.yaml"
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot be read as YAML: {error}", where=str(path)) from None
        return _section(TrainConfig, values, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they are written in YAML and JSON."""
        return dataclasses.asdict(self)


def _section(kind: type[Section], values: object, where: str) -> Section:
    """Build a dataclass from a mapping; refuse unknown keys and values of another type."""
    if not isinstance(values, Mapping):
        raise InputError(f"is {values!r}", where=where, allowed="a mapping of keys to values")
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(str(key), hints)}",
                where=where,
                allowed=", ".join(hints),
            )
        arguments[key] = _value(hints[key], value, f"{where}: {key}")
    missing = [
        entry.name
        for entry in dataclasses.fields(kind)  # type: ignore[arg-type]
        if entry.name not in arguments
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{missing[0]} is missing", where=where)
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(error.message, where=where, allowed=error.allowed) from None


def _value(hint: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    scalar = {
        tuple[int, ...]: (int, "a list of integers"),
        tuple[float, ...]: (float, "a list of numbers"),
    }
    if hint in scalar:
        kind, allowed = scalar[hint]
        if not isinstance(value, list):
            raise InputError(f"is {value!r}", where=where, allowed=allowed)
        return tuple(_value(kind, item, where) for item in value)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        fix = "write 1.0e-3 for 1e-3: YAML reads the latter as text" if hint is float else None
        raise InputError(f"is {value!r}", where=where, allowed=names[hint], fix=fix)
    return value


def model_json(shape: ModelShape, vocab_size: int, max_frames: int, ratio: float) -> dict[str, Any]:
    """Return the `config.json` of a Hugging Face Molmo2 folder for a model of this shape.

    Args:
        shape: the sizes.
        vocab_size: tokens of the tokenizer before the visual ones, which follow directly.
        max_frames: sets the longest sequence the model is meant for.
        ratio: the prune ratio that a user gets by default.
    """
    side = shape.image_size // shape.patch_size
    vision_head = shape.vision_width // shape.vision_heads
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "tie_word_embeddings": False,
        "use_frame_special_tokens": True,
        "image_start_token_id": vocab_size,
        "image_end_token_id": vocab_size + 1,
        "image_patch_id": vocab_size + 2,
        "image_high_res_id": vocab_size + 2,
        "image_col_id": vocab_size + 3,
        "low_res_image_start_token_id": vocab_size + 4,
        "image_low_res_id": vocab_size + 6,
        "frame_start_token_id": vocab_size + 7,
        "frame_end_token_id": vocab_size + 8,
        "vit_config": {
            "model_type": "molmo2",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_mlp,
            "num_hidden_layers": shape.vision_blocks,
            "num_attention_heads": shape.vision_heads,
            "num_key_value_heads": shape.vision_heads,
            "head_dim": vision_head,
            "layer_norm_eps": 1e-6,
            "image_default_input_size": [shape.image_size, shape.image_size],
            "image_patch_size": shape.patch_size,
            "image_num_pos": side * side,
            "prune": True,
            "prune_method": "scorer",
            "prune_at": shape.prune_at,
            "topk": ratio,
            "rescale_bias_min": math.exp(-2),
            "prune_from_frame": 0,
            "pruning_in_scorer": True,
        },
        "adapter_config": {
            "model_type": "molmo2",
            "hidden_act": "silu",
            "vit_layers": [tap - shape.vision_blocks for tap in shape.taps],
            "pooling_attention_mask": True,
            "hidden_size": shape.vision_width,
            "num_attention_heads": shape.vision_heads,
            "num_key_value_heads": shape.vision_heads,
            "head_dim": vision_head,
            "intermediate_size": shape.connector_mlp,
            "text_hidden_size": shape.text_width,
        },
        "text_config": {
            "model_type": "molmo2_text",
            "hidden_act": "silu",
            "hidden_size": shape.text_width,
            "intermediate_size": shape.text_mlp,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": shape.text_kv_heads,
            "head_dim": shape.text_width // shape.text_heads,
            "vocab_size": vocab_size,
            "additional_vocab_size": 128,
            "qkv_bias": False,
            "use_qk_norm": True,
            "qk_norm_type": "qwen3",
            "layer_norm_eps": 1e-6,
            "norm_after": False,
            "rope_theta": shape.rope_theta,
            "max_position_embeddings": 256 + max_frames * (8 + (side // 3) ** 2),
        },
    }
