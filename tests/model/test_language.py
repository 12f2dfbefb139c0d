"""Rotary positions that are not the order of tokens."""

from __future__ import annotations

import torch

from stts_export.model.vlm import SttsModel
from tests.helpers import random_model


def _prompt(model: SttsModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text, tokens = model.config.text, model.config.tokens
    ids = torch.randint(0, text.vocab_size, (12,), generator=generator)
    ids[2:7] = tokens.im_patch
    return ids, torch.randn(5, text.hidden_size, generator=generator)


@torch.no_grad()
def test_positions_only_turn_queries_and_keys():
    """Rotation is relative: a shift changes nothing, a gap does; the mask goes by the order."""
    model = random_model()
    ids, features = _prompt(model)
    groups = model.visual_groups(ids[None])
    order = torch.arange(12)[None]
    gapped = order + 4 * (order > 6)
    plain = model.language(ids[None], features, groups)
    assert torch.equal(model.language(ids[None], features, groups, order), plain)
    shifted = model.language(ids[None], features, groups, order + 9)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    apart = model.language(ids[None], features, groups, gapped)
    torch.testing.assert_close(apart[:, :7], plain[:, :7])
    assert (apart - plain)[:, 7:].abs().max() > 1e-3


@torch.no_grad()
def test_new_tokens_go_on_after_the_last_position():
    model = random_model()
    ids, features = _prompt(model)
    assert model.greedy(ids, features, 3, torch.arange(12)) == model.greedy(ids, features, 3)

    gapped = torch.arange(12) + 4 * (torch.arange(12) > 6)
    tokens = model.greedy(ids, features, 3, gapped)
    whole = torch.cat([ids, torch.tensor(tokens)])[None]
    places = torch.cat([gapped, torch.arange(16, 19)])[None]
    logits = model.language(whole, features, model.visual_groups(whole), places)
    assert logits[0, 11:-1].argmax(-1).tolist() == tokens
