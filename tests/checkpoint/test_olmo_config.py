"""`config.yaml` of training runs: what is honoured, what has no effect, what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stts_export.checkpoint.olmo_config import config_files_from_yaml
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.preprocessing import image_preprocessing, video_preprocessing
from stts_export.runtime.layout import prompt_layout
from tests.checkpoint.olmo_folders import olmo_config, write_config
from tests.helpers import small_config

_IMAGE = {
    "crop_mode": "overlap-and-resize-c2", "max_crops": 8, "max_multi_image_crops": 8,
    "max_images": 5, "use_single_crop_col_tokens": False, "use_single_crop_start_token": True,
    "overlap_margins": [1, 1], "high_res_max_crops": 24, "p_high_res": 0, "use_col_tokens": True,
}  # fmt: skip


_SAMPLING = {
    "use_frame_special_tokens": True, "frame_sample_mode": "uniform_last_frame",
    "time_sampling": True, "max_fps": [2],
}  # fmt: skip


def _read(folder: Path, config: dict[str, Any]) -> tuple[ModelConfig, Path]:
    """The configuration, and a folder with the files made from the rest."""
    write_config(folder, config)
    values, _, texts = config_files_from_yaml(folder / "config.yaml", 32)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return ModelConfig.from_dict(values, has_scorer=True), folder


def _changed(folder: Path, **changes: Any) -> ModelConfig:
    return _read(folder, olmo_config(**changes))[0]


def test_a_run_has_the_configuration_of_its_hugging_face_form(tmp_path: Path):
    theirs = ModelConfig.from_dict(small_config(), has_scorer=True)
    assert _changed(tmp_path) == theirs


@pytest.mark.parametrize(("changes", "attribute", "value"), [
    ({"llm__rope_theta": 1e6}, "text.rope_theta", 1e6),
    ({"llm__n_kv_heads": None}, "text.num_kv_heads", 4),
    ({"llm__head_dim": None}, "text.head_dim", 8),
    ({"llm__mlp_hidden_size": None}, "text.intermediate_size", 64),
    ({"llm__mlp_hidden_size": None, "llm__mlp_ratio": 2}, "text.intermediate_size", 32),
    ({"llm__layer_norm_eps": None}, "text.rms_norm_eps", 1e-5),
    ({"llm__max_sequence_length": 9686}, "text.max_position_embeddings", 9686),
    ({"llm__max_position_embeddings": 999}, "text.max_position_embeddings", 999),
    ({"llm__embedding_size": None}, "text.vocab_size", 512),
    ({"llm__embedding_size": 600, "llm__fix_pad_tokenizer": True}, "tokens.im_patch", 602),
    ({"vision_backbone__vit__prune_at": 2, "vision_backbone__vit_layers": [-1]},
     "vision.pruning.prune_at", 2),
    ({"vision_backbone__vit__topk": 0.3}, "vision.pruning.trained_prune_ratio", 0.3),
    ({"vision_backbone__vit__rescale_bias_min": 0.5}, "vision.pruning.rescale_bias_min", 0.5),
    ({"vision_backbone__vit__image_norm_eps": 1e-5}, "vision.layer_norm_eps", 1e-5),
    ({"vision_backbone__pooling_attention_mask": False}, "connector.pooling_attention_mask", False),
    ({"vision_backbone__pooling_attention_mask": ...}, "connector.pooling_attention_mask", False),
    ({"bi_directional_attn": None}, "bidirectional_visual", False),
    ({"mm_preprocessor__use_frame_special_tokens": False}, "use_frame_special_tokens", False),
    ({"mm_preprocessor": {"video": {}}}, "use_frame_special_tokens", True),
])  # fmt: skip
def test_what_changes_the_result_is_honoured(
    tmp_path: Path, changes: dict[str, Any], attribute: str, value: Any
):
    config: Any = _changed(tmp_path, **changes)
    for name in attribute.split("."):
        config = getattr(config, name)
    assert config == value


def test_causal_attention_survives_the_way_through_config_json(tmp_path: Path):
    config = _changed(tmp_path, bi_directional_attn=None)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.extra)), has_scorer=True)
    assert again == config
    assert not again.bidirectional_visual


@pytest.mark.parametrize(("nested", "per_frame"), [(False, True), (True, False)])
def test_older_and_newer_runs_say_the_same_about_video(
    tmp_path: Path, nested: bool, per_frame: bool
):
    video = {
        "max_frames": 128, "max_fps": [2], "time_mode": "per-frame-compact", "pooling_w": 3,
        "pooling_h": 3, "frame_sample_mode": "uniform_last_frame", "time_sampling": True,
        "loading_method": "torchcodec_exact", "candidate_sampling_fps": [0.25],
        "cache_videos": True, "subtitle_mode": "frame_1", "max_subtitle_tokens": None,
        "use_frame_special_tokens": False,
    }  # fmt: skip
    section = {"video": video, "image": _IMAGE} if nested else {**video, "image": _IMAGE}
    config, folder = _read(tmp_path, olmo_config(mm_preprocessor=section))
    found = video_preprocessing(folder, config.vision)
    assert (found.num_frames, found.max_fps) == (128, 2.0)
    layout = prompt_layout(folder, config)
    assert not layout.frame_tokens
    assert layout.around_each_frame == per_frame
    assert layout.image_columns
    assert not layout.overview_columns
    images = image_preprocessing(folder, config.vision)
    assert (images.max_crops, images.overlap_margins) == (8, (1, 1))


def test_newer_runs_may_ask_for_tokens_around_each_frame(tmp_path: Path):
    section = {"video": {"per_frame_special_token": True}}
    config, folder = _read(tmp_path, olmo_config(mm_preprocessor=section))
    assert prompt_layout(folder, config).around_each_frame


@pytest.mark.parametrize(("changes", "message"), [
    ({"llm__rope_type": "llama3"}, "model.llm.rope_type = llama3"),
    ({"llm__rope": False}, "model.llm.rope = false"),
    ({"llm__qkv_bias": True}, "model.llm.qkv_bias = true"),
    ({"llm__include_bias": ...}, "model.llm.include_bias = true"),
    ({"llm__attention_layer_norm": ...}, "model.llm.attention_layer_norm = false"),
    ({"llm__layer_norm_type": "default"}, "model.llm.layer_norm_type = default"),
    ({"llm__clip_qkv": 8.0}, "model.llm.clip_qkv = 8.0"),
    ({"llm__scale_logits": True}, "model.llm.scale_logits = true"),
    ({"llm__normalize_input_embeds": True}, "model.llm.normalize_input_embeds = true"),
    ({"llm__block_type": "moe"}, "model.llm.block_type = moe"),
    ({"llm__activation_type": "silu"}, "model.llm.activation_type = silu"),
    ({"llm__additional_vocab_size": None}, "model.llm.additional_vocab_size is null"),
    ({"llm__d_model": "wide"}, "model.llm.d_model is wide"),
    ({"vision_backbone__vit__image_model_type": "openai"}, "vit.image_model_type = openai"),
    ({"vision_backbone__vit__resize_mode": "dino"}, "vit.resize_mode = dino"),
    ({"vision_backbone__vit__normalize": ...}, "vit.normalize = openai"),
    ({"vision_backbone__vit__prune_method": "random"}, "vit.prune_method = random"),
    ({"vision_backbone__vit__prune_from_frame": 4}, "vit.prune_from_frame = 4"),
    ({"vision_backbone__vit__pruning_in_scorer": False}, "vit.pruning_in_scorer = false"),
    ({"vision_backbone__vit__merge": True}, "vit.merge = true"),
    ({"vision_backbone__image_pooling_2d": "attention"}, "image_pooling_2d = attention"),
    ({"vision_backbone__image_projector": "linear"}, "image_projector = linear"),
    ({"vision_backbone__image_padding_embed": "pad_embed"}, "image_padding_embed = pad_embed"),
    ({"vision_backbone__use_deepstack": True}, "use_deepstack = true"),
    ({"bi_directional_attn": "within_image"}, "bi_directional_attn is within_image"),
    ({"data_formatter": {"message_format": "role"}}, "data_formatter.message_format = role"),
    ({"mm_preprocessor__time_mode": "none"}, "mm_preprocessor.time_mode = none"),
    ({"mm_preprocessor": {**_SAMPLING, "max_fps": [1, 2]}}, "mm_preprocessor.max_fps is [1, 2]"),
    ({"mm_preprocessor": {**_SAMPLING, "max_fps": None}}, "mm_preprocessor.max_fps is null"),
    ({"mm_preprocessor": {**_SAMPLING, "time_sampling": False}}, "time_sampling = false"),
    # Beside other keys of sampling, absent ones have the reference's defaults.
    ({"mm_preprocessor__time_sampling": True}, "mm_preprocessor.frame_sample_mode = fps"),
    ({"mm_preprocessor__max_fps": 2}, "mm_preprocessor.frame_sample_mode = fps"),
    ({"mm_preprocessor__loading_method": "av"}, "mm_preprocessor.frame_sample_mode = fps"),
    ({"mm_preprocessor__frame_sample_mode": "uniform_last_frame"}, "time_sampling = false"),
    ({"mm_preprocessor__max_frames": "x"}, "mm_preprocessor.max_frames is x"),
    ({"llm__mm_rope": True}, "model.llm.mm_rope = true"),
    ({"llm__debug": True}, "model.llm.debug = true"),
    ({"debug": True}, "model.debug = true"),
    ({"llm__mlp_hidden_size": "x"}, "model.llm.mlp_hidden_size is x"),
    ({"llm__n_heads": 0}, "model.llm.n_heads is 0"),
    ({"llm__head_dim": 0}, "model.llm.head_dim is 0"),
    ({"llm__embedding_size": "1k"}, "model.llm.embedding_size is 1k"),
    ({"model_name": ["x"]}, "model.model_name is ['x']"),
    ({"vision_backbone__vit__image_default_input_size": [378]},
     "image_default_input_size is [378]"),
    ({"data_formatter": {"message_format": "qwen3", "surprise": 1}},
     "unknown key model.data_formatter.surprise"),
    ({"mm_preprocessor__use_frame_special_tokens": ...}, "use_frame_special_tokens is missing"),
    ({"mm_preprocessor__topk": 0.7}, "mm_preprocessor.topk is 0.7"),
    ({"mm_preprocessor__max_crops": 4}, "mm_preprocessor.max_crops = 4"),
    ({"mm_preprocessor__image": {**_IMAGE, "crop_mode": "resize"}}, "image.crop_mode = resize"),
    ({"mm_preprocessor__image": {**_IMAGE, "max_crops": 9}}, "image.max_multi_image_crops = 8"),
    ({"mm_preprocessor__subtitle_mode": "all"}, "mm_preprocessor.subtitle_mode = all"),
    ({"mm_preprocessor__subtitle_mode": "frame_3"}, "mm_preprocessor.subtitle_mode = frame_3"),
    ({"mm_preprocessor__max_subtitle_tokens": 0}, "mm_preprocessor.max_subtitle_tokens = 0"),
    ({"mm_preprocessor": {"video": {"max_subtitle_tokens": 512}}},
     "mm_preprocessor.video.max_subtitle_tokens = 512"),
    ({"mm_preprocessor": {"video": {"subtitle_mode": "ignore"}}},
     "mm_preprocessor.video.subtitle_mode = ignore"),
    ({"llm": ...}, "model.llm is missing"),
])  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(InputError) as error:
        _changed(tmp_path, **changes)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("path", "near"), [
    ("llm__rope_tehta", "rope_theta"),
    ("vision_backbone__vit__prune_att", "prune_at"),
    ("vision_backbone__pooling_atention_mask", "pooling_attention_mask"),
    ("mm_preprocessor__max_frame", "max_frames"),
    ("bi_directional_atn", "bi_directional_attn"),
])  # fmt: skip
def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path: Path, path: str, near: str):
    with pytest.raises(InputError) as error:
        _changed(tmp_path, **{path: 1})
    name = "model." + path.replace("__", ".")
    assert f"unknown key {name} (did you mean '{near}'?)" in str(error.value)


def test_settings_without_effect_are_accepted(tmp_path: Path):
    changes = {
        "llm__residual_dropout": 0.1, "llm__attention_type": "flash", "llm__compile": "blocks",
        "llm__moe_top_k": 2, "llm__tokenizer": {"identifier": "Qwen/Qwen3-4B"},
        "llm__init_path": "gs://somewhere", "llm__rope_factor": None,
        "vision_backbone__normalize_on_gpu": True, "vision_backbone__compile_vit": None,
        "vision_backbone__vit__sdpa_backend": "efficient", "vision_backbone__vit__prune": True,
        "vision_backbone__vit__sim_reg_loss_coefficient": 0.5,
        "data_formatter": {
            "message_format": "qwen3", "system_prompt": "demo_or_style_v2", "image_last": False,
            "prompt_templates": "uber_model_v2", "p_one_message": 0.1, "select_answer": "best",
        },
        "mm_preprocessor__loss_token_weighting": "root_subsegments", "cp_enabled": False,
        "mm_preprocessor__topk": 0.5, "model_name": "something_new", "debug": False,
        "llm__mm_rope": False,
    }  # fmt: skip
    assert _changed(tmp_path, **changes) == _changed(tmp_path)


@pytest.mark.parametrize(("changes", "family"), [
    ({"llm__norm_after": True, "llm__rope_type": "yarn"}, "Molmo2-O-7B (Olmo-3 decoder"),
    ({"llm__full_attention_layers": [3, 7]}, "Molmo2-O-7B (Olmo-3 decoder"),
    ({"model_name": "molmo_point"}, "MolmoPoint"),
    ({"model_name": "molmo"}, "Molmo (the first one)"),
])  # fmt: skip
def test_other_families_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], family: str):
    with pytest.raises(InputError, match="is of the family") as error:
        _changed(tmp_path, **changes)
    assert family in str(error.value)
    assert "Molmo2-8B" in str(error.value)


def test_the_longest_clip_is_the_reference_s_when_absent(tmp_path: Path):
    section = {"use_frame_special_tokens": True}
    config, folder = _read(tmp_path, olmo_config(mm_preprocessor=section))
    assert video_preprocessing(folder, config.vision).num_frames == 8


@pytest.mark.parametrize("content", [
    "a: [", "- 1", "!!python/object/apply:os.system ['true']", "", "a: !!timestamp x",
    "a: !!int ''", "[" * 200_000,
])  # fmt: skip
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml: (cannot be read|is not a YAML mapping)"):
        config_files_from_yaml(tmp_path / "config.yaml")


def test_a_file_of_other_things_names_what_is_missing(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 1}))
    with pytest.raises(InputError, match="model is missing"):
        config_files_from_yaml(tmp_path / "config.yaml")
