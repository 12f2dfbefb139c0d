"""`config.json` as current transformers writes it, in the words of the original Molmo2 folders.

Tensor names are the same in both; sections and some keys are called otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stts_export.errors import InputError

_VISION = {
    "image_size": "image_default_input_size",
    "patch_size": "image_patch_size",
    "num_position_embeddings": "image_num_pos",
}
_ADAPTER = {"vision_feature_layer": "vit_layers"}
_TEXT = {"rms_norm_eps": "layer_norm_eps", "attention_bias": "qkv_bias"}
# What the original format does not name because it is always so.
_FIXED: dict[str, dict[str, Any]] = {
    "vision_config": {"num_channels": 3, "attention_bias": True},
    "adapter_config": {"attention_bias": True, "mlp_bias": False},
}


def original_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate a configuration that has a `vision_config`; others are returned as they are.

    Raises:
        InputError: a value that the original format cannot express.
    """
    if not isinstance(values.get("vision_config"), dict):
        return dict(values)
    translated = {key: value for key, value in values.items() if key != "vision_config"}
    for section, keys in _FIXED.items():
        for key, expected in keys.items():
            _demand(values, section, key, expected, where)
    translated["vit_config"] = _renamed(values["vision_config"], _VISION, _FIXED["vision_config"])
    if isinstance(values.get("adapter_config"), dict):
        adapter = values["adapter_config"]
        translated["adapter_config"] = {
            "pooling_attention_mask": True,  # transformers has no other form and no key for it
            **_renamed(adapter, _ADAPTER, _FIXED["adapter_config"]),
        }
    if isinstance(values.get("text_config"), dict):
        translated["text_config"] = _text(values["text_config"], where)
    return translated


def _renamed(
    section: Mapping[str, Any], names: Mapping[str, str], dropped: Mapping[str, Any]
) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in section.items() if key not in dropped}


def _text(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = _renamed(section, _TEXT, {"rope_parameters": None, "rope_scaling_layers": None})
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict) or set(rope) - {"rope_theta", "rope_type"}:
        raise _unsupported("rope_parameters", rope, where)
    if rope.get("rope_type", "default") != "default":
        raise _unsupported("rope_parameters.rope_type", rope["rope_type"], where)
    scaled = section.get("rope_scaling_layers")
    layers = section.get("num_hidden_layers")
    if scaled is not None and (type(layers) is not int or scaled != list(range(layers))):
        raise _unsupported("rope_scaling_layers", scaled, where)
    text.setdefault("use_qk_norm", True)
    return text | {"rope_theta": rope.get("rope_theta")}


def _demand(
    values: Mapping[str, Any], section: str, key: str, expected: object, where: str
) -> None:
    holder = values.get(section)
    if isinstance(holder, dict) and holder.get(key, expected) != expected:
        raise _unsupported(f"{section}.{key}", holder[key], where)


def _unsupported(key: str, value: object, where: str) -> InputError:
    return InputError(
        f"{key} = {value!r} is not supported",
        where=where,
        fix="this setting changes the model's result and is not implemented here",
    )
