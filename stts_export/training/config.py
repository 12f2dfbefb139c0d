"""The configuration of a training run, read from YAML and checked before any work starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from stts_export.errors import InputError, did_you_mean
from stts_export.training.selectors import SELECTORS

Section = TypeVar("Section")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}", where="training configuration", allowed=allowed)


def _require_unset(section: Any, names: Sequence[str], prefix: str, reason: str) -> None:
    """Refuse values that would have no effect."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(section)}
    for name in names:
        value = getattr(section, name)
        _require(value == defaults[name], f"{prefix}{name}", value, f"absent: {reason}")


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
    scorer: bool = True
    """False leaves it out: a plain Molmo2, for a run that gives it one later."""

    def __post_init__(self) -> None:
        _require(self.patch_size >= 1, "model.patch_size", self.patch_size, "1 or more")
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
class SourceSettings:
    """Where examples come from: the synthetic set, or a file of questions about videos."""

    kind: str = "synthetic"
    """"synthetic" or "file"."""
    weight: float = 1.0
    """Share of the examples, relative to the other sources."""
    path: str = ""
    """Of a file: JSON Lines, or another layout of `records`; relative to the working directory."""
    layout: str = ""
    """Of a file: told from its name and content when empty."""
    media: str = ""
    """Folder that its videos and images are in; the file's own when empty."""
    split: str = ""
    """Of a dataset of Hugging Face that has several."""
    allow_missing: int = 0
    """Videos and images of the file that may be missing."""
    level_steps: tuple[int, ...] = (0, 0, 0)
    """Of the synthetic set: optimizer steps at which levels 0, 1, 2 of difficulty begin."""
    easier_share: float = 0.2
    """Of the synthetic set: fraction of clips drawn from the levels below the current one."""
    max_questions: int = 6
    """Most questions of an example that are asked at once."""

    def __post_init__(self) -> None:
        _require(self.kind in ("synthetic", "file"), "kind", self.kind, "synthetic or file")
        _require(self.weight > 0, "weight", self.weight, "above 0")
        _require(
            (self.kind == "file") == bool(self.path), "path", self.path, "set for kind: file only"
        )
        other = (
            ("level_steps", "easier_share")
            if self.kind == "file"
            else ("layout", "media", "split", "allow_missing")
        )
        _require_unset(self, other, "", f"it has no effect on kind: {self.kind}")
        _require(self.allow_missing >= 0, "allow_missing", self.allow_missing, "0 or more")
        _require(
            len(self.level_steps) == 3
            and self.level_steps[0] == 0
            and list(self.level_steps) == sorted(self.level_steps),
            "level_steps",
            self.level_steps,
            "three ascending steps, the first 0",
        )
        _require(0 <= self.easier_share <= 1, "easier_share", self.easier_share, "0 to 1")
        _require(self.max_questions >= 1, "max_questions", self.max_questions, "1 or more")


@dataclass(frozen=True)
class DataSettings:
    """What an optimizer step is made of."""

    sources: tuple[SourceSettings, ...] = (SourceSettings(),)
    batch_size: int = 8
    """Examples of an optimizer step, over all processes."""
    micro_batch: int = 8
    """Examples that a process runs at once; the rest of its share accumulates."""
    sequence_length: int = 0
    """Several examples share a row of at most so many tokens; 0: each has a row of its own."""
    max_frames: int = 16
    """Most sampled frames of a clip; stored with a checkpoint that is trained from scratch."""
    workers: int = 0
    """Processes that decode and draw; 0: the training process does."""
    max_broken: int = 0
    """Examples that may be left out because they cannot be decoded or do not fit."""

    def __post_init__(self) -> None:
        _require(bool(self.sources), "data.sources", self.sources, "one source or more")
        for name in ("batch_size", "micro_batch", "max_frames"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name}", value, "1 or more")
        for name in ("sequence_length", "workers", "max_broken"):
            value = getattr(self, name)
            _require(value >= 0, f"data.{name}", value, "0 or more")
        _require(
            self.batch_size % self.micro_batch == 0,
            "data.batch_size",
            self.batch_size,
            f"a multiple of micro_batch = {self.micro_batch}",
        )


@dataclass(frozen=True)
class DevSettings:
    """Accuracy on clips that are not trained on, by teacher forcing."""

    every: int = 250
    """Optimizer steps between two evaluations."""
    clips: int = 80
    prune_ratio: float = 0.5
    path: str = ""
    """File of questions; the dev split of the synthetic set, at its last level, when empty."""
    layout: str = ""
    media: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        for name in ("every", "clips"):
            _require(getattr(self, name) >= 1, f"dev.{name}", getattr(self, name), "1 or more")
        _require(0 <= self.prune_ratio < 1, "dev.prune_ratio", self.prune_ratio, "[0, 1)")
        if not self.path:
            _require_unset(self, ("layout", "media", "split"), "dev.", "dev.path is")


@dataclass(frozen=True)
class PruningSettings:
    """How much is removed in training, and what teaches the scores."""

    selector: str = "stts"
    """What chooses the windows: "stts" for the scores, or another one to compare with."""
    refill: bool = True
    """Frames alone in their bin get their removed windows back as context (spec 2.7)."""
    full_share: float = 0.15
    """Fraction of clips from which nothing is removed."""
    min_ratio: float = 0.3
    max_ratio: float = 0.8
    """Prune ratios of the other clips: triangular between the two, most often their middle; both
    alike for one ratio."""
    trained_ratio: float = 0.5
    """Stored with the checkpoint: what its users get by default."""
    similarity_coefficient: float = 0.5
    """Weight of the loss that pulls a score to 1 - similarity with the frame before."""

    def __post_init__(self) -> None:
        _require(
            self.selector in SELECTORS, "pruning.selector", self.selector, ", ".join(SELECTORS)
        )
        _require(0 <= self.full_share <= 1, "pruning.full_share", self.full_share, "0 to 1")
        _require(
            0 < self.min_ratio <= self.max_ratio < 1,
            "pruning.min_ratio, max_ratio",
            (self.min_ratio, self.max_ratio),
            "0 < min_ratio <= max_ratio < 1",
        )
        _require(0 <= self.trained_ratio < 1, "pruning.trained_ratio", self.trained_ratio, "[0, 1)")
        _require(
            self.similarity_coefficient >= 0,
            "pruning.similarity_coefficient",
            self.similarity_coefficient,
            "0 or more",
        )


@dataclass(frozen=True)
class LabelSettings:
    """Naming what windows of synthetic clips show, by heads that exist in training only.

    Not in the paper, whose models can see already: a model from scratch learns to see this way.
    """

    steps: int = 0
    """Optimizer steps at the beginning that do only this, with single frames."""
    frames: int = 48
    """Single frames of such a step, over all processes."""
    coefficient: float = 0.0
    """Weight of the same loss afterwards, on the windows that are kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "coefficient"):
            value = getattr(self, name)
            _require(value >= 0, f"labels.{name}", value, "0 or more")
        _require(self.frames >= 1, "labels.frames", self.frames, "1 or more")


@dataclass(frozen=True)
class Rates:
    """Highest learning rate of each part; 0 freezes it."""

    language: float = 1e-5
    vision: float = 5e-6
    connector: float = 5e-6
    scorer: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("language", "vision", "connector", "scorer"):
            _require(getattr(self, name) >= 0, f"optim.rates.{name}", getattr(self, name), ">= 0")
        _require(
            max(self.language, self.vision, self.connector, self.scorer) > 0,
            "optim.rates",
            self,
            "one of them above 0",
        )


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up and a cosine descent (`olmo/train/optim.py`)."""

    steps: int = 6250
    """Optimizer steps."""
    rates: Rates = field(default_factory=Rates)
    warmup_steps: int = 200
    final_share: float = 0.1
    """What the cosine descends to, as a fraction of the highest rate."""
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    """On matrices; biases and norms have none."""
    gradient_clip: float = 1.0
    """Largest norm of the scorer's gradient, and of everything else's."""
    bfloat16: bool = True
    """Autocast matrix products to bfloat16; the scorer's outputs and losses stay in float32."""
    activation_checkpointing: bool = False
    """Keep only what enters a block, and run it again in the backward pass."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "optim.steps", self.steps, "1 or more")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.final_share <= 1, "optim.final_share", self.final_share, "0 to 1")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        _require(self.eps > 0, "optim.eps", self.eps, "above 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(self.gradient_clip > 0, "optim.gradient_clip", self.gradient_clip, "above 0")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the decoder's projections (peft), for `train: lora`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "start.lora.rank", self.rank, "1 or more")
        _require(self.alpha > 0, "start.lora.alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "start.lora.dropout", self.dropout, "[0, 1)")


@dataclass(frozen=True)
class StartSettings:
    """Which weights the run begins with, and which of them it changes."""

    checkpoint: str = ""
    """A folder, relative to the working directory, or hub name: Molmo2 without a scorer, or a
    checkpoint with one. From scratch, in the shape of `model`, when empty."""
    revision: str = ""
    """Branch, tag or commit on the hub."""
    fresh_scorer: bool = False
    """Draw a new scorer although the checkpoint has one."""
    prune_at: int = -1
    """Block (0-based) that a new scorer reads; -1: as in the checkpoint's configuration, or 3."""
    train: str = "all"
    """"all", "scorer" (alone), or "lora" (adapters on the decoder, and the scorer)."""
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        _require(
            self.train in ("all", "scorer", "lora"), "start.train", self.train, "all, scorer, lora"
        )
        _require(self.prune_at >= -1, "start.prune_at", self.prune_at, "0 or more, or -1")
        _require(
            bool(self.checkpoint) or self.train == "all",
            "start.train",
            self.train,
            "all, as the run starts from scratch",
        )
        if not self.checkpoint:
            names = ("revision", "fresh_scorer", "prune_at")
            _require_unset(self, names, "start.", "start.checkpoint is")
        _require(
            self.train == "lora" or self.lora == LoraSettings(),
            "start.lora",
            "set",
            f"absent: start.train is {self.train}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output: str
    """Folder of the run, relative to the working directory."""
    seed: int = 0
    threads: int = 0
    """Of each process on the CPU; torch's own choice when 0."""
    device: str = "auto"
    """"cpu", "cuda", or "auto" for a GPU where there is one."""
    parallel: str = "ddp"
    """Under torchrun: "ddp" copies the model to every process, "fsdp" shards it."""
    log_every: int = 20
    """Optimizer steps between two lines of the log."""
    save_every: int = 250
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest step folders that stay on disk."""
    picture_every: int = 0
    """Optimizer steps between two pictures of kept windows; 0: none."""
    start: StartSettings = field(default_factory=StartSettings)
    model: ModelShape = field(default_factory=ModelShape)
    data: DataSettings = field(default_factory=DataSettings)
    dev: DevSettings = field(default_factory=DevSettings)
    pruning: PruningSettings = field(default_factory=PruningSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", self.output, "the name of a folder")
        _require(self.seed < 50, "seed", self.seed, "below 50: others draw the same clips again")
        for name in ("seed", "threads", "picture_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("log_every", "save_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(self.parallel in ("ddp", "fsdp"), "parallel", self.parallel, "ddp or fsdp")
        _require(
            self.labels.steps < self.optim.steps,
            "labels.steps",
            self.labels.steps,
            f"below optim.steps = {self.optim.steps}",
        )
        _require(
            self.model == ModelShape() or not self.start.checkpoint,
            "model",
            "set",
            "absent: start.checkpoint has a shape already",
        )
        if not self.model.scorer:
            reason = "as model.scorer is false"
            for name, value, only in (
                ("pruning.full_share", self.pruning.full_share, 1),
                ("dev.prune_ratio", self.dev.prune_ratio, 0),
                ("picture_every", self.picture_every, 0),
            ):
                _require(value == only, name, value, f"{only}, {reason}")
        synthetic = all(source.kind == "synthetic" for source in self.data.sources)
        labelled = self.labels.steps > 0 or self.labels.coefficient > 0
        _require(
            synthetic or not labelled,
            "labels",
            self.labels,
            "absent: only synthetic clips have it",
        )

    @staticmethod
    def from_file(path: Path) -> TrainConfig:
        """Read a YAML file.

        Raises:
            InputError: the file cannot be read, a key is unknown, or a value is not allowed.
        """
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first of the two would have no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        repeated = [key for number, key in enumerate(keys) if key in keys[:number]]
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


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
        with suppress(OverflowError):
            value = float(value)
    if hint == tuple[SourceSettings, ...]:
        if not isinstance(value, list):
            raise InputError(f"is {value!r}", where=where, allowed="a list of sources")
        return tuple(
            _section(SourceSettings, item, f"{where}[{index}]") for index, item in enumerate(value)
        )
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
