"""The model's configuration, read from a Hugging Face Molmo2 `config.json`.

Every key is either used, known to be without effect on the result, or refused by name: a key that
changes numerics and is silently ignored would break the promise of equal windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stts_export.errors import InputError, did_you_mean
from stts_export.files import json_object
from stts_export.transformers_config import original_names

# Keys of transformers' PretrainedConfig and of generation, without effect on the forward pass.
_INERT = frozenset(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attn_implementation
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache
    attention_dropout embedding_dropout residual_dropout image_feature_dropout float32_attention
    """.split()
)
# Pruning keys of the training code: they steer training or its dead heuristics, not inference.
_INERT_PRUNING = frozenset({"new_ref_threshold", "sim_reg_loss_coefficient", "skip_unused_layers"})


OLMO3_FAMILY = "Molmo2-O-7B (Olmo-3 decoder: post-norm, sliding layers, YaRN)"


def unsupported_family(family: str, where: str) -> InputError:
    """Make the error for a family that is known and not implemented."""
    return InputError(
        f"is of the family {family}, which is not supported",
        where=where,
        allowed="Molmo2 with a Qwen3 decoder, such as Molmo2-4B or Molmo2-8B",
    )


class _Section:
    """One JSON object, read key by key; `close` refuses the keys that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.seen: set[str] = set()

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.values.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right:
            problem = "is missing" if key not in self.values else f"is {value!r}"
            raise InputError(
                f"{key} {problem}", where=self.where, allowed=f"a JSON {_JSON_NAMES[kind]}"
            )
        return value

    def demand(self, key: str, *allowed: Any) -> None:
        """Accept an absent key or one of the values that this project implements."""
        self.seen.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise InputError(
                f"{key} = {self.values[key]!r} is not supported",
                where=self.where,
                allowed=" or ".join(repr(value) for value in allowed),
                fix="this setting changes the model's result and is not implemented here",
            )

    def close(self, inert: frozenset[str]) -> None:
        for key in self.values:
            if key not in self.seen and key not in inert:
                raise InputError(
                    f"unknown key {key!r}{did_you_mean(key, self.seen)}",
                    where=self.where,
                    allowed=", ".join(sorted(self.seen)),
                    fix="remove the key if it has no effect on the model, "
                    "or report the checkpoint's family",
                )


def _check_ranges(config: object, section: str, at_least_one: tuple[str, ...]) -> None:
    """Refuse sizes below 1."""
    for name in at_least_one:
        value = getattr(config, name)
        if value < 1:
            raise InputError(f"{name} is {value}", where=section, allowed="1 or more")


def _check_number(name: str, value: float, section: str, low: float, high: float) -> None:
    """Refuse numbers outside the open interval (low, high), and NaN."""
    if not low < value < high:
        raise InputError(f"{name} is {value}", where=section, allowed=f"above {low}, below {high}")


_JSON_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array"}


@dataclass(frozen=True)
class PruningConfig:
    """How the checkpoint prunes (reference: `TemporalVitConfig`)."""

    prune_at: int = 3
    """0-based block whose output is scored; windows are removed after block `prune_at + 1`."""
    trained_prune_ratio: float = 0.5
    """The ratio the checkpoint was trained with (`topk`); the default at run time."""
    rescale_bias_min: float = math.exp(-2)
    """Smallest rescaled score, so that the log-bias stays within [log(min), 0]."""

    def __post_init__(self) -> None:
        if self.prune_at < 0:
            raise InputError(
                f"prune_at is {self.prune_at}", where="vit_config", allowed="0 or more"
            )
        if not 0 <= self.trained_prune_ratio < 1:
            raise InputError(
                f"topk is {self.trained_prune_ratio}", where="vit_config", allowed="[0, 1)"
            )
        _check_number("rescale_bias_min", self.rescale_bias_min, "vit_config", 0, 1)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2-style vision tower; sizes in pixels, patches and channels."""

    image_size: tuple[int, int]
    """(height, width) of the model's input in pixels."""
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    num_layers: int
    """Blocks that are built: up to the deepest tapped one."""
    taps: tuple[int, ...]
    """0-based blocks whose outputs are concatenated, in this order, for the connector."""
    layer_norm_eps: float = 1e-6
    pool: int = 3
    """Side of a window in patches."""
    pruning: PruningConfig | None = None
    """None when the checkpoint has no scorer."""

    def __post_init__(self) -> None:
        sizes = ("patch_size", "hidden_size", "intermediate_size", "num_heads", "head_dim")
        _check_ranges(self, "vit_config", sizes)
        _check_number("layer_norm_eps", self.layer_norm_eps, "vit_config", 0, 1)
        unit = self.patch_size * self.pool
        if any(side % unit or side <= 0 for side in self.image_size):
            raise InputError(
                f"image size {self.image_size} does not divide into windows",
                where="vit_config.image_default_input_size",
                allowed=f"multiples of {unit} (patch {self.patch_size} x pool {self.pool})",
            )
        if self.pruning is not None and min(self.taps) <= self.pruning.prune_at + 1:
            raise InputError(
                f"connector taps {self.taps} reach below the removal",
                where="adapter_config.vit_layers",
                allowed=f"blocks above {self.pruning.prune_at + 1} (prune_at + 1)",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def window_grid(self) -> tuple[int, int]:
        """(rows, columns) of windows."""
        return self.grid[0] // self.pool, self.grid[1] // self.pool

    @property
    def windows(self) -> int:
        """W: windows of a frame."""
        return self.window_grid[0] * self.window_grid[1]

    @property
    def patches_per_window(self) -> int:
        """G: patches of a window."""
        return self.pool * self.pool

    @property
    def split_at(self) -> int:
        """Number of blocks in the lower part of the tower."""
        # Without a scorer nothing is ever removed; the lower part is then kept as small as allowed.
        return self.pruning.prune_at + 2 if self.pruning else min(5, min(self.taps))


@dataclass(frozen=True)
class ConnectorConfig:
    """Window pooling by attention and the SwiGLU projection into the decoder's width."""

    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    pooling_attention_mask: bool = True
    """Where a pooled token of an image has fewer patches than others, the missing ones take no part
    in it; otherwise they count as zeros. Windows of video are always full."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "head_dim", "intermediate_size")
        _check_ranges(self, "adapter_config", sizes)


@dataclass(frozen=True)
class TextConfig:
    """Qwen3-style decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    additional_vocab_size: int
    rope_theta: float
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "vocab_size", "max_position_embeddings",
        )  # fmt: skip
        _check_ranges(self, "text_config", sizes)
        _check_number("rope_theta", self.rope_theta, "text_config", 0, math.inf)
        _check_number("layer_norm_eps", self.rms_norm_eps, "text_config", 0, 1)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_key_value_heads is {self.num_kv_heads}",
                where="text_config",
                allowed=f"a divisor of num_attention_heads = {self.num_heads}",
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim is {self.head_dim}",
                where="text_config",
                allowed="an even number, for rotary embedding",
            )


@dataclass(frozen=True)
class TokenIds:
    """Special token ids of the prompt."""

    im_patch: int
    im_start: int
    im_end: int
    im_col: int
    im_low: int
    low_res_im_start: int
    frame_start: int
    frame_end: int

    @property
    def visual(self) -> tuple[int, ...]:
        """Ids that see each other in both directions (reference: `IMAGE_TOKENS`)."""
        return tuple(
            sorted({
                self.im_patch, self.im_col, self.im_start, self.low_res_im_start,
                self.frame_start, self.im_end, self.frame_end, self.im_low,
            })
        )  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the forward pass depends on."""

    vision: VisionConfig
    connector: ConnectorConfig
    text: TextConfig
    tokens: TokenIds
    use_frame_special_tokens: bool
    bidirectional_visual: bool = True
    """Visual tokens of one clip see each other in both directions. The Hugging Face format has no
    key for it and means True; `bidirectional_visual` is our addition, for runs without."""
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The `config.json` this was read from, for writing it back unchanged."""

    @staticmethod
    def from_file(path: Path, *, has_scorer: bool) -> ModelConfig:
        """Read `config.json`; see `from_dict`."""
        values = json_object(path)
        if not values and not path.exists():
            raise InputError(
                "config.json is missing",
                where=str(path.parent),
                fix="pass a Hugging Face Molmo2 folder or a folder written by `stts-export train`",
            )
        return ModelConfig.from_dict(values, has_scorer=has_scorer, where=str(path))

    @staticmethod
    def from_dict(
        values: Mapping[str, Any], *, has_scorer: bool, where: str = "config.json"
    ) -> ModelConfig:
        """Parse a Molmo2 configuration.

        Args:
            values: the JSON object.
            has_scorer: whether scorer tensors are present; decides over flags that contradict them.
            where: name for error messages.

        Raises:
            InputError: a key is missing, unknown, or has a value that is not implemented.
        """
        if values.get("model_type") != "molmo2":
            raise InputError(
                f"model_type is {values.get('model_type')!r}",
                where=where,
                allowed="'molmo2'",
                fix="pass a Molmo2 checkpoint folder, with or without STTS scorer weights",
            )
        text = values.get("text_config")
        if isinstance(text, dict) and (
            text.get("norm_after") is True or text.get("qk_norm_type") == "olmo"
        ):
            raise unsupported_family(OLMO3_FAMILY, where)
        original, values = values, original_names(values, where)
        top = _Section(values, where)
        sections = {}
        for name in ("vit_config", "adapter_config", "text_config"):
            top.seen.add(name)
            if not isinstance(values.get(name), dict):
                raise InputError(f"{name} is missing", where=where, allowed="a JSON object")
            sections[name] = _Section(values[name], f"{where}: {name}")
        vision = _vision(sections["vit_config"], sections["adapter_config"], has_scorer)
        connector = _connector(sections["adapter_config"])
        text = _text(sections["text_config"])
        tokens = TokenIds(
            im_patch=top.take("image_patch_id", int),
            im_start=top.take("image_start_token_id", int),
            im_end=top.take("image_end_token_id", int),
            im_col=top.take("image_col_id", int),
            im_low=top.take("image_low_res_id", int),
            low_res_im_start=top.take("low_res_image_start_token_id", int),
            frame_start=top.take("frame_start_token_id", int),
            frame_end=top.take("frame_end_token_id", int),
        )
        top.demand("image_high_res_id", tokens.im_patch)
        use_frame_special_tokens = top.take("use_frame_special_tokens", bool, True)
        bidirectional = top.take("bidirectional_visual", bool, True)
        top.close(_INERT)
        limit = text.vocab_size + text.additional_vocab_size
        if max(tokens.visual) >= limit:
            raise InputError(
                f"special token id {max(tokens.visual)} is outside the embedding",
                where=where,
                allowed=f"ids below vocab_size + additional_vocab_size = {limit}",
            )
        return ModelConfig(
            vision,
            connector,
            text,
            tokens,
            use_frame_special_tokens,
            bidirectional,
            extra=dict(original),
        )


def _vision(vit: _Section, adapter: _Section, has_scorer: bool) -> VisionConfig:
    size = vit.take("image_default_input_size", list)
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise InputError(
            f"image_default_input_size is {size!r}", where=vit.where, allowed="[height, width]"
        )
    layers = vit.take("num_hidden_layers", int)
    taps = adapter.take("vit_layers", list)
    if not taps or not all(isinstance(tap, int) and -layers <= tap < layers for tap in taps):
        raise InputError(
            f"vit_layers is {taps!r}",
            where=adapter.where,
            allowed=f"indices into {layers} blocks",
        )
    # Negative taps count over the configured blocks, although only those up to the deepest exist.
    absolute = tuple(tap % layers for tap in taps)
    heads = vit.take("num_attention_heads", int)
    vit.demand("num_key_value_heads", heads)
    vit.demand("hidden_act", "gelu_pytorch_tanh")
    vit.demand("prune_method", "scorer")
    vit.demand("prune_from_frame", 0)
    vit.demand("pruning_in_scorer", True)
    vit.demand("merge", False)
    pruning = PruningConfig(
        prune_at=vit.take("prune_at", int, 3),
        trained_prune_ratio=vit.take("topk", float, 0.5),
        rescale_bias_min=vit.take("rescale_bias_min", float, math.exp(-2)),
    )
    vit.seen.add("prune")  # the scorer's tensors decide, not this flag
    config = VisionConfig(
        image_size=(size[0], size[1]),
        patch_size=vit.take("image_patch_size", int),
        hidden_size=vit.take("hidden_size", int),
        intermediate_size=vit.take("intermediate_size", int),
        num_heads=heads,
        head_dim=vit.take("head_dim", int),
        num_layers=max(absolute) + 1,
        taps=absolute,
        layer_norm_eps=vit.take("layer_norm_eps", float, 1e-6),
        pruning=pruning if has_scorer else None,
    )
    vit.demand("image_num_pos", config.grid[0] * config.grid[1])
    vit.close(_INERT | _INERT_PRUNING)
    return config


def _connector(adapter: _Section) -> ConnectorConfig:
    heads = adapter.take("num_attention_heads", int)
    adapter.demand("num_key_value_heads", heads)
    adapter.demand("hidden_act", "silu")
    adapter.seen.add("text_hidden_size")
    config = ConnectorConfig(
        hidden_size=adapter.take("hidden_size", int),
        num_heads=heads,
        head_dim=adapter.take("head_dim", int),
        intermediate_size=adapter.take("intermediate_size", int),
        pooling_attention_mask=adapter.take("pooling_attention_mask", bool, False),
    )
    adapter.close(_INERT)
    return config


def _text(text: _Section) -> TextConfig:
    text.demand("hidden_act", "silu")
    text.demand("qkv_bias", False)
    text.demand("use_qk_norm", True)
    text.demand("qk_norm_type", "qwen3")
    text.demand("norm_after", False)
    text.demand("rope_scaling", None)
    text.demand("rope_scaling_layers", None)
    config = TextConfig(
        hidden_size=text.take("hidden_size", int),
        intermediate_size=text.take("intermediate_size", int),
        num_layers=text.take("num_hidden_layers", int),
        num_heads=text.take("num_attention_heads", int),
        num_kv_heads=text.take("num_key_value_heads", int),
        head_dim=text.take("head_dim", int),
        vocab_size=text.take("vocab_size", int),
        additional_vocab_size=text.take("additional_vocab_size", int),
        rope_theta=text.take("rope_theta", float),
        max_position_embeddings=text.take("max_position_embeddings", int),
        rms_norm_eps=text.take("layer_norm_eps", float, 1e-6),
    )
    text.close(_INERT)
    return config
