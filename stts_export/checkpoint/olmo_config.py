"""`config.yaml` of an olmo training run, in the words of a Hugging Face Molmo2 folder.

Only `model:` matters; its defaults are those of the reference's dataclasses. As in `config.py`,
every key is used, known to be without effect on the result, or refused by name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stts_export.config import OLMO3_FAMILY, unsupported_family
from stts_export.errors import InputError, did_you_mean

FILE = "config.yaml"

# Order fixed by `olmo/tokenizer.py: EXTRA_TOKENS` (spec 1.5): ids from the padded vocabulary on.
_TOKEN_IDS = {
    "image_start_token_id": 0, "image_end_token_id": 1, "image_patch_id": 2,
    "image_high_res_id": 2, "image_col_id": 3, "low_res_image_start_token_id": 4,
    "image_low_res_id": 6, "frame_start_token_id": 7, "frame_end_token_id": 8,
}  # fmt: skip
_OTHER_FAMILIES = {
    "molmo": "Molmo (the first one)",
    "molmo_point": "MolmoPoint",
    "token_indexing_video_molmo2": "MolmoPoint",
}

# Keys without effect on the result: training, initialisation, speed, precision of 2-byte runs,
# and what another setting switches off (`moe_*`, `rope_*` beside the default rope).
_INERT_MODEL = "cp_enabled apply_cp_to_vision_backbone shared_low_high_embedding"
_INERT_LLM = """
    activation_checkpoint attention_dropout attention_type compile embedding_dropout
    float32_attention init_cutoff_factor init_fn init_incremental init_path init_std
    initializer_range new_embedding_init_range residual_dropout
    response_residual_dropout rope_full_precision sliding_attention_rope_scaling tokenizer
    moe_num_experts moe_top_k moe_mlp_impl moe_log_expert_assignment moe_shared_expert
    moe_lbl_in_fp32 moe_interleave moe_loss_weight moe_zloss_weight moe_dropless
    moe_capacity_factor
    rope_factor rope_high_freq_factor rope_low_freq_factor rope_original_max_position_embeddings
    rope_attention_factor rope_beta_fast rope_beta_slow rope_mscale rope_mscale_all_dim
    rope_truncate
"""
_INERT_BACKBONE = """
    skip_unused_layers share_connector image_feature_dropout connector_activation_checkpointing
    compile_vit compile_connector normalize_on_gpu fix_image_padding
"""
_INERT_VIT = """
    image_dropout_rate attention_dropout residual_dropout initializer_range float32_attention
    attention_type sdpa_backend activation_checkpointing init_path pad_value truncate_pos_ids
    prune sim_reg_loss_coefficient new_ref_threshold
"""
_INERT_TEXT = "max_answer_len last_message_loss_only max_text_tokens loss_token_weighting"
_INERT_VIDEO = "candidate_sampling_fps cache_videos loading_method"
# How training questions and answers were made up.
_INERT_FORMATTER = """
    prompt_templates system_prompt default_inference_len select_answer debug format_message_list
    p_one_message eval_system_prompt_mapping p_choice_content_in_mc template_video_mc_questions
    pointing_format points_decimal_places use_seperate_non_pointing_qa_style timestamp_mode
    output_timestamp_mode seconds_decimal_places p_multi_point_all_image
    use_seperate_count_without_pointing_style sample_random_initial_point
"""
_SAMPLING = (
    "frame_sample_mode", "time_sampling", "max_fps", "candidate_sampling_fps", "loading_method",
    "cache_videos",
)  # fmt: skip
_INERT_IMAGE = "high_res_max_crops p_high_res max_images legacy_image_mask"
# What older runs say about crops of video frames, of which there is one.
_INERT_FLAT = """
    crop_mode use_col_tokens high_res_max_crops p_high_res overlap_margins max_images
    max_multi_image_crops multi_image_pooling_w multi_image_pooling_h legacy_image_mask
    use_single_crop_col_tokens use_single_crop_start_token
"""


class _Section:
    """One mapping of the file, read key by key; `close` refuses the keys nobody asked for."""

    def __init__(self, values: Any, name: str, file: Path) -> None:
        if not isinstance(values, dict):
            problem = "is missing" if values is None else f"is {_shown(values)}"
            raise InputError(f"{name} {problem}", where=str(file), allowed="a section")
        self.values = values
        self.name = name
        self.file = file
        self.seen: set[str] = set()

    def section(self, key: str, default: Any = None) -> _Section:
        self.seen.add(key)
        return _Section(self.values.get(key, default), f"{self.name}.{key}", self.file)

    def take(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None) -> int:
        value = self.take(key, default)
        if type(value) is not int:
            raise self.refused(key, value, "an integer")
        return value

    def size(self, key: str, default: int | None, *, otherwise: int | None = None) -> int:
        """An integer, 1 or more; `otherwise` when it is null, if null is allowed."""
        value = self.take(key, default)
        if value is None and otherwise is not None:
            return otherwise
        if type(value) is not int or value < 1:
            raise self.refused(key, value, "an integer, 1 or more")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float):
            raise self.refused(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.refused(key, value, "true or false")
        return value

    def integers(self, key: str, default: list[int]) -> list[int]:
        value = self.take(key, default)
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise self.refused(key, value, "a list of integers")
        return value

    def demand(self, key: str, *allowed: Any, default: Any) -> None:
        """Accept only what this project implements, whether written or by default."""
        value = self.take(key, default)
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise InputError(
                f"{self.name}.{key} = {_shown(value)} is not supported",
                where=str(self.file),
                allowed=" or ".join(map(_shown, allowed)),
                fix="this setting changes the model's result and is not implemented here",
            )

    def refused(self, key: str, value: Any, allowed: str) -> InputError:
        problem = "is missing" if key not in self.values else f"is {_shown(value)}"
        return InputError(f"{self.name}.{key} {problem}", where=str(self.file), allowed=allowed)

    def close(self, inert: str) -> None:
        known = self.seen | set(inert.split())
        for key in self.values:
            if key not in known:
                raise InputError(
                    f"unknown key {self.name}.{key}{did_you_mean(str(key), known)}",
                    where=str(self.file),
                    allowed=", ".join(sorted(known)),
                    fix="remove the key if it has no effect on the model, "
                    "or report the checkpoint's family",
                )


def config_files_from_yaml(
    file: Path, projector_size: int | None = None
) -> tuple[dict[str, Any], bool, dict[str, str]]:
    """Read the configuration of a training run.

    Args:
        file: `config.yaml`.
        projector_size: inner width of the projector by its tensors; they decide where they differ
            from the decoder's width, which is the reference's rule.

    Returns:
        The values of `config.json`; whether the head is the embedding; and by name the text of
        the files that Hugging Face folders have for the rest.

    Raises:
        InputError: not readable, another family, or a key or value that is not implemented.
    """
    model = _Section(_yaml(file).get("model"), "model", file)
    _check_family(model)
    llm = model.section("llm")
    text, tied = _text(llm)
    backbone = model.section("vision_backbone")
    vit, adapter = _vision(backbone, text, projector_size)
    bidirectional = model.take("bi_directional_attn")
    if bidirectional not in (None, "image_tokens"):
        raise model.refused("bi_directional_attn", bidirectional, "null or image_tokens")
    if model.take("data_formatter") is not None:
        _check_formatter(model.section("data_formatter"))
    model.demand("debug", False, None, default=False)
    files, frame_tokens = _preprocessing(model.section("mm_preprocessor"), vit)
    model.close(_INERT_MODEL)
    first = _first_token(llm, text)
    config = {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "vit_config": vit,
        "adapter_config": adapter,
        "text_config": text,
        **{name: first + index for name, index in _TOKEN_IDS.items()},
        "use_frame_special_tokens": frame_tokens,
        "bidirectional_visual": bidirectional is not None,
        "tie_word_embeddings": False,
    }
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in files.items()}
    return config, tied, texts


def tokenizer_name(file: Path) -> str | None:
    """Return the tokenizer that the run was started with, for messages."""
    node: Any = _yaml(file)
    for key in ("model", "llm", "tokenizer", "identifier"):
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None


def _yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "is missing", where=str(file), fix="copy it from the training folder, with the weights"
        ) from None
    except (
        OSError, ValueError, yaml.YAMLError, RecursionError,
        AttributeError, LookupError, TypeError,  # of values that are none of their tag's
    ) as error:  # fmt: skip
        raise InputError(f"cannot be read as YAML: {error}", where=str(file)) from None
    if not isinstance(values, dict):
        raise InputError("is not a YAML mapping", where=str(file))
    return values


def _check_family(model: _Section) -> None:
    """Refuse other families at once, before one of their many keys is met."""
    name = model.take("model_name")
    if not isinstance(name, str | None):
        raise model.refused("model_name", name, "a name")
    llm = model.values.get("llm")
    olmo = isinstance(llm, dict) and (
        llm.get("norm_after") is True
        or llm.get("full_attention_layers") is not None
        or llm.get("attention_layer_norm_type") == "olmo"
    )
    if str(name) in _OTHER_FAMILIES or olmo:
        raise unsupported_family(_OTHER_FAMILIES.get(str(name), OLMO3_FAMILY), str(model.file))


def _text(llm: _Section) -> tuple[dict[str, Any], bool]:
    """`text_config`, and whether the head is the embedding."""
    llm.demand("block_type", "sequential", default="sequential")
    llm.demand("activation_type", "swiglu", default="swiglu")
    llm.demand("rope", True, default=False)
    llm.demand("rope_type", "default", default="default")
    llm.demand("layer_norm_type", "rms", default="default")
    llm.demand("layer_norm_with_affine", True, default=True)
    llm.demand("attention_layer_norm", True, default=False)
    llm.demand("attention_layer_norm_type", "qwen3", default="olmo")
    llm.demand("attention_layer_norm_with_affine", True, default=True)
    llm.demand("include_bias", False, default=True)
    llm.demand("bias_for_layer_norm", None, False, default=None)
    llm.demand("qkv_bias", False, default=False)
    llm.demand("norm_after", False, default=False)
    llm.demand("full_attention_layers", None, default=None)
    llm.demand("clip_qkv", None, default=None)
    llm.demand("scale_logits", False, default=False)
    llm.demand("normalize_input_embeds", False, default=False)
    llm.demand("can_predict_extra_tokens", False, default=False)
    llm.demand("use_position_ids", True, default=True)
    # Older code had these two.
    llm.demand("mm_rope", False, None, default=False)
    llm.demand("debug", False, None, default=False)
    width, heads = llm.size("d_model", 768), llm.size("n_heads", 12)
    inner = llm.size("mlp_ratio", 4) * width
    eps = llm.take("layer_norm_eps")
    text = {
        "model_type": "molmo2_text",
        "hidden_size": width,
        "intermediate_size": llm.size("mlp_hidden_size", None, otherwise=inner) // 2,
        "num_hidden_layers": llm.size("n_layers", 12),
        "num_attention_heads": heads,
        "num_key_value_heads": llm.size("n_kv_heads", None, otherwise=heads),
        "head_dim": llm.size("head_dim", None, otherwise=width // heads),
        "vocab_size": llm.size("embedding_size", 50304, otherwise=llm.size("vocab_size", 50257)),
        "additional_vocab_size": llm.integer("additional_vocab_size", 128),
        "max_position_embeddings": llm.size(
            "max_position_embeddings", None, otherwise=llm.size("max_sequence_length", 1024)
        ),
        "rope_theta": llm.number("rope_theta", 10000.0),
        "rope_scaling": None,
        "rope_scaling_layers": None,
        "layer_norm_eps": 1e-5 if eps is None else llm.number("layer_norm_eps", 1e-5),
        "hidden_act": "silu",
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "norm_after": False,
    }
    tied = llm.flag("weight_tying", True)
    llm.take("fix_pad_tokenizer")
    llm.close(_INERT_LLM)
    return text, tied


def _first_token(llm: _Section, text: Mapping[str, Any]) -> int:
    """The id of the first special token: the tokenizer is padded up to it."""
    padded: int = (
        text["vocab_size"]
        if llm.flag("fix_pad_tokenizer", False)
        else llm.integer("vocab_size", 50257)
    )
    return padded


def _vision(
    backbone: _Section, text: Mapping[str, Any], projector_size: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`vit_config` and `adapter_config`."""
    vit = backbone.section("vit")
    vit.demand("image_model_type", "siglip", default="openai")
    vit.demand("image_mlp_activations", "gelu_pytorch_tanh", default="gelu")
    vit.demand("resize_mode", "siglip", default="default")
    vit.demand("normalize", "siglip", default="openai")
    vit.demand("prune_method", "scorer", default="scorer")
    vit.demand("prune_from_frame", 0, default=0)
    vit.demand("pruning_in_scorer", True, default=True)
    vit.demand("merge", False, default=False)
    heads, patch = vit.size("image_num_heads", 16), vit.size("image_patch_size", 14)
    size = vit.integers("image_default_input_size", [336, 336])
    if len(size) != 2:
        raise vit.refused("image_default_input_size", size, "[height, width]")
    vit.demand("image_num_key_value_heads", heads, default=16)
    vit.demand("image_pos_patch_size", patch, default=14)
    tower = {
        "model_type": "molmo2",
        "hidden_size": vit.integer("image_emb_dim", 1024),
        "intermediate_size": vit.integer("image_mlp_dim", 4096),
        "num_hidden_layers": vit.integer("image_num_layers", 24),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": vit.integer("image_head_dim", 64),
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vit.number("image_norm_eps", 1e-5),
        "image_default_input_size": size,
        "image_patch_size": patch,
        "image_num_pos": vit.integer("image_num_pos", 577),
    }
    if "topk" in vit.values or "prune_at" in vit.values:
        tower |= {"prune_method": "scorer", "prune_from_frame": 0, "pruning_in_scorer": True}
    for key in ("topk", "prune_at", "rescale_bias_min"):
        if key in vit.values:
            tower[key] = vit.take(key)
    vit.close(_INERT_VIT)
    backbone.demand("image_pooling_2d", "attention_meanq", default="attention_meanq")
    backbone.demand("image_projector", "mlp", default="mlp")
    backbone.demand("image_padding_embed", None, default=None)
    backbone.demand("use_deepstack", False, default=False)
    for key in ("residual_patch_features", "patch_residual", "patch_residual_thresh", "debug",
                "frame_embedding", "pool_size_embeds"):  # fmt: skip
        backbone.demand(key, None, False, 0, 0.0, default=None)
    for key in ("image_pooling_h", "image_pooling_w"):
        backbone.demand(key, 2, default=2)
    adapter = {
        "model_type": "molmo2",
        "vit_layers": backbone.integers("vit_layers", [-1]),
        "pooling_attention_mask": backbone.flag("pooling_attention_mask", False),
        "hidden_size": tower["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": tower["head_dim"],
        "hidden_act": "silu",
        "intermediate_size": projector_size or text["intermediate_size"],
        "text_hidden_size": text["hidden_size"],
    }
    backbone.close(_INERT_BACKBONE)
    return tower, adapter


def _check_formatter(formatter: _Section) -> None:
    """Refuse another chat template."""
    formatter.demand("message_format", "qwen3", default="none")
    formatter.demand("always_start_with_space", False, default=False)
    formatter.demand("image_last", False, default=False)
    formatter.close(_INERT_FORMATTER)


def _preprocessing(
    section: _Section, vit: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Contents of the preprocessors' files by name, and whether frames have their own tokens.

    Older runs have the keys of video beside `image`, newer ones in `video`.
    """
    files: dict[str, dict[str, Any]] = {}
    height, width = vit["image_default_input_size"]
    common = {"size": {"height": height, "width": width}, "patch_size": vit["image_patch_size"]}
    nested = "video" in section.values
    video = section.section("video") if nested else section
    # The tokens around frames changed their default with the new form.
    frame_tokens = video.flag("use_frame_special_tokens", True if nested else None)  # type: ignore[arg-type]
    each_frame = video.flag("per_frame_special_token", not nested)
    video.demand("time_mode", "per-frame-compact", default="per-frame-compact")
    video.demand("subtitle_mode", "frame_1", default="frame_1")
    video.demand("max_subtitle_tokens", None, default=None)
    pooling = [video.integer("pooling_h", 3), video.integer("pooling_w", 3)]
    fps = _sampling(video)
    files["video_preprocessor_config.json"] = _present({
        **common,
        "pooling_size": pooling,
        "num_frames": video.size("max_frames", 8),
        "frame_sample_mode": "uniform_last_frame",
        "max_fps": fps,
    })  # fmt: skip
    ratio = section.take("topk")
    if ratio is not None and ratio != vit.get("topk", ratio):
        raise section.refused("topk", ratio, f"{vit['topk']}, model.vision_backbone.vit.topk")
    processor: dict[str, Any] = {
        "use_frame_special_tokens": frame_tokens,
        "per_frame_special_token": each_frame,
    }
    if section.values.get("image") is not None:
        image = section.section("image")
        files["preprocessor_config.json"] = {**common, **_image(image, processor)}
        image.close(_INERT_IMAGE)
    section.take("image")
    if nested:
        video.close(_INERT_VIDEO)
        section.close(_INERT_TEXT)
    else:
        section.demand("max_crops", 1, default=1)
        section.demand("periodic_high_res_frame", None, default=None)
        section.demand("image_padding_mask", False, default=False)
        section.demand("query_based_resolution_selection", False, default=False)
        section.close(f"{_INERT_TEXT} {_INERT_VIDEO} {_INERT_FLAT}")
    files["processor_config.json"] = processor
    return files, frame_tokens


def _sampling(video: _Section) -> float | None:
    """The most frames a second; None where the file says nothing about sampling.

    It is sampled as all these models are then. Runs write all keys, or none when made by hand:
    beside one of them, another that is absent has its default.
    """
    if not any(key in video.values for key in _SAMPLING):
        return None
    video.demand("frame_sample_mode", "uniform_last_frame", default="fps")
    video.demand("time_sampling", True, default=False)
    fps = video.take("max_fps")
    if isinstance(fps, list) and len(fps) == 1:
        fps = fps[0]
    if type(fps) not in (int, float):
        raise video.refused("max_fps", fps, "one number")
    return float(fps)


def _image(image: _Section, processor: dict[str, Any]) -> dict[str, Any]:
    """What says how pictures are cut and pooled; the tokens around them go into `processor`."""
    image.demand("crop_mode", "overlap-and-resize-c2", default="resize")
    crops = image.integer("max_crops", 6)
    pooling = [image.integer("pooling_h", 2), image.integer("pooling_w", 2)]
    # A prompt with several pictures is laid out as one with a single picture.
    image.demand("multi_image_pooling_h", pooling[0], default=2)
    image.demand("multi_image_pooling_w", pooling[1], default=2)
    if image.values.get("max_images") is not None:
        image.demand("max_multi_image_crops", crops, default=4)
    image.take("max_multi_image_crops")
    columns = image.flag("use_col_tokens", True)
    single = image.take("use_single_crop_col_tokens")
    processor |= {
        "image_use_col_tokens": columns,
        "use_single_crop_col_tokens": columns if single is None else single,
        "use_single_crop_start_token": image.flag("use_single_crop_start_token", False),
    }
    return {
        "pooling_size": pooling,
        "max_crops": crops,
        "overlap_margins": image.integers("overlap_margins", [4, 4]),
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _shown(value: Any) -> str:
    """As it stands in the file."""
    if isinstance(value, bool | None):
        return json.dumps(value)
    return f"{value}" if isinstance(value, int | float | str) else reprlib.repr(value)
