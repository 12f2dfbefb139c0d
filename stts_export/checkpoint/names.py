"""Names of parameters: ours beside those of a Hugging Face Molmo2 folder (spec 3.2, 3.3)."""

from __future__ import annotations

import re

SCORER_PREFIX = "model.vision_backbone.image_vit.transformer.temporal_token_scorer."
LM_HEAD = "lm_head.weight"
TOKEN_EMBEDDING = "model.transformer.wte.embedding"

_VIT = "model.vision_backbone.image_vit"
# Ours -> theirs; the first pattern that matches a whole name decides.
_TABLE: tuple[tuple[str, str], ...] = (
    (r"vision\.embedding\.positional", rf"{_VIT}.positional_embedding"),
    (r"vision\.embedding\.projection\.(.+)", rf"{_VIT}.patch_embedding.\1"),
    (r"vision\.blocks\.(.+)", rf"{_VIT}.transformer.resblocks.\1"),
    (r"vision\.scorer\.pooler\.(.+)", rf"{SCORER_PREFIX}patch_token_pooler.\1"),
    (r"vision\.scorer\.(w[123]\..+)", rf"{SCORER_PREFIX}mlp.\1"),
    (r"vision\.connector\.pooling\.(.+)", r"model.vision_backbone.image_pooling_2d.\1"),
    (r"vision\.connector\.(w[123]\..+)", r"model.vision_backbone.image_projector.\1"),
    (r"language\.embedding", TOKEN_EMBEDDING),
    (r"language\.new_embedding", "model.transformer.wte.new_embedding"),
    (r"language\.norm\.(.+)", r"model.transformer.ln_f.\1"),
    (r"language\.lm_head\.weight", LM_HEAD),
    (
        r"language\.blocks\.(\d+)\.(att_proj|attn_out|q_norm|k_norm)\.(.+)",
        r"model.transformer.blocks.\1.self_attn.\2.\3",
    ),
    (
        r"language\.blocks\.(\d+)\.(ff_proj|ff_out)\.(.+)",
        r"model.transformer.blocks.\1.mlp.\2.\3",
    ),
    (r"language\.blocks\.(\d+)\.(attn_norm|ff_norm)\.(.+)", r"model.transformer.blocks.\1.\2.\3"),
)


def checkpoint_name(parameter: str) -> str:
    """Translate a parameter name of `SttsModel` into the checkpoint's."""
    for pattern, replacement in _TABLE:
        match = re.fullmatch(pattern, parameter)
        if match:
            return match.expand(replacement)
    raise KeyError(parameter)
