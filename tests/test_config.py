"""config.json: every key is used, known to be inert, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from tests.helpers import GOLDEN, small_config


def _parse(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(values, has_scorer=True)


def test_golden_geometry():
    config = ModelConfig.from_file(GOLDEN / "config.json", has_scorer=True)
    assert config.vision.grid == (27, 27)
    assert config.vision.windows == 81
    assert config.vision.taps == (13, 7)
    assert config.vision.num_layers == 14
    assert config.vision.split_at == 5
    assert config.tokens.visual == (512, 513, 514, 515, 516, 518, 519, 520)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.qkv_bias", True),
        ("text_config.qk_norm_type", "olmo3"),
        ("text_config.use_qk_norm", False),
        ("text_config.rope_scaling", {"type": "yarn"}),
        ("text_config.hidden_act", "gelu"),
        ("vit_config.hidden_act", "gelu"),
        ("vit_config.prune_method", "random"),
        ("vit_config.pruning_in_scorer", False),
        ("vit_config.prune_from_frame", 4),
        ("vit_config.merge", True),
        ("vit_config.num_key_value_heads", 1),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(key: str, value: Any):
    section, name = key.split(".")
    with pytest.raises(InputError) as error:
        _parse(small_config(**{key: value}))
    assert name in str(error.value)
    assert section in str(error.value)


def test_unknown_keys_are_refused_with_the_nearest_known_one():
    with pytest.raises(InputError, match=r"'rescale_bias_mim' \(did you mean 'rescale_bias_min'"):
        _parse(small_config(**{"vit_config.rescale_bias_mim": 0.1}))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rope_theta"])
def test_missing_keys_are_named(key: str):
    values = small_config()
    del values["text_config"][key]
    with pytest.raises(InputError, match=f"{key} is missing"):
        _parse(values)


@pytest.mark.parametrize(
    ("key", "value"), [("text_config.hidden_size", "96"), ("text_config.num_hidden_layers", True)]
)
def test_wrong_types_are_refused(key: str, value: Any):
    with pytest.raises(InputError, match="JSON integer"):
        _parse(small_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vit_config.prune_at", -3),
        ("vit_config.topk", 1.5),
        ("vit_config.topk", float("nan")),
        ("vit_config.rescale_bias_min", -1.0),
        ("vit_config.image_patch_size", 0),
        ("vit_config.hidden_size", -3),
        ("vit_config.layer_norm_eps", float("nan")),
        ("adapter_config.intermediate_size", 0),
        ("text_config.num_key_value_heads", 3),
        ("text_config.head_dim", 15),
        ("text_config.rope_theta", 0.0),
        ("text_config.max_position_embeddings", 0),
    ],
)
def test_values_outside_their_range_are_refused_by_name(key: str, value: Any):
    section, name = key.split(".")
    name = {"image_patch_size": "patch_size", "num_key_value_heads": "num_key_value"}.get(
        name, name
    )
    with pytest.raises(InputError, match=name) as error:
        _parse(small_config(**{key: value}))
    assert section in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_what_current_transformers_saves_is_read(tmp_path: Path):
    from transformers import Molmo2Config

    values = small_config()
    Molmo2Config(**values).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "vision_config" in saved
    assert _parse(saved) == _parse(values)
    saved["text_config"]["rope_parameters"]["rope_type"] = "yarn"
    with pytest.raises(InputError, match="rope_type = 'yarn'"):
        _parse(saved)


_OLMO3 = {
    "norm_after": True,
    "qk_norm_type": "olmo",
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
    "rope_scaling_layers": [1],
}


def test_the_olmo3_family_is_refused_by_name():
    values = small_config(**{f"text_config.{key}": value for key, value in _OLMO3.items()})
    with pytest.raises(InputError, match=r"is of the family Molmo2-O-7B \(Olmo-3 decoder"):
        _parse(values)


@pytest.mark.filterwarnings("ignore")
def test_the_olmo3_family_is_refused_as_current_transformers_saves_it(tmp_path: Path):
    from transformers import Molmo2Config

    values = small_config(**{"text_config.norm_after": True, "text_config.qk_norm_type": "olmo"})
    Molmo2Config(**values).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is of the family Molmo2-O-7B"):
        ModelConfig.from_file(tmp_path / "config.json", has_scorer=True)


def test_causal_visual_tokens_are_our_addition():
    assert _parse(small_config()).bidirectional_visual
    assert not _parse(small_config(bidirectional_visual=False)).bidirectional_visual


def test_a_grid_that_does_not_divide_is_refused():
    values = small_config(**{"vit_config.image_default_input_size": [84, 112]})
    with pytest.raises(InputError, match="multiples of 42"):
        _parse(values)


def test_taps_below_the_removal_are_refused():
    with pytest.raises(InputError, match="prune_at"):
        _parse(small_config(**{"adapter_config.vit_layers": [-1, 2]}))


def test_a_special_token_outside_the_embedding_is_refused():
    with pytest.raises(InputError, match="outside the embedding"):
        _parse(small_config(frame_end_token_id=640))


def test_another_model_type_is_refused():
    with pytest.raises(InputError, match="qwen3"):
        _parse(small_config(model_type="qwen3"))


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_broken_json_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path / "config.json", has_scorer=True)


def test_the_file_is_kept_for_writing_back():
    values = small_config()
    assert json.loads(json.dumps(_parse(values).extra)) == values
