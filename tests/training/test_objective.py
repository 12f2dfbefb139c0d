from __future__ import annotations

import numpy as np
import pytest
import torch

from stts_export.runtime.prompt import VideoTokens
from stts_export.training.batches import dev_examples, train_examples
from stts_export.training.loop import Trainer
from stts_export.training.objective import encode_batch, run_batch, similarity_loss


def _spec_loss(hidden: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Spec 2.10 as written, for one clip: Gram matrix of all windows, entries (f, j, f+1, j)."""
    frames, windows = scores.shape
    flat = hidden.reshape(frames * windows, -1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    gram = (flat @ flat.T).reshape(frames, windows, frames, windows)
    total = torch.zeros(())
    for f in range(1, frames):
        for j in range(windows):
            total = total + (scores[f, j] - (1 - gram[f - 1, j, f, j])) ** 2
    return total / (windows * (frames - 1))


def test_similarity_loss_is_the_formula_of_the_spec():
    torch.manual_seed(0)
    hidden, scores = torch.randn(5, 16 * 9, 8), torch.rand(5, 16)
    fresh = torch.tensor([True, False, False, False, False])
    torch.testing.assert_close(
        similarity_loss(hidden, scores, fresh), _spec_loss(hidden, scores), rtol=1e-5, atol=1e-6
    )


def test_similarity_loss_never_compares_two_clips():
    torch.manual_seed(0)
    hidden, scores = torch.randn(5, 16 * 9, 8), torch.rand(5, 16)
    fresh = torch.tensor([True, False, True, False, False])
    expected = (_spec_loss(hidden[:2], scores[:2]) + 2 * _spec_loss(hidden[2:], scores[2:])) / 3
    torch.testing.assert_close(similarity_loss(hidden, scores, fresh), expected)
    assert similarity_loss(hidden, scores, torch.ones(5, dtype=torch.bool)) == 0


def test_similarity_loss_reaches_scores_and_features():
    hidden = torch.randn(3, 16 * 9, 8, requires_grad=True)
    scores = torch.rand(3, 16, requires_grad=True)
    similarity_loss(hidden, scores, torch.tensor([True, False, False])).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert scores.grad is not None
    assert scores.grad.abs().sum() > 0


def _varied_scores(trainer: Trainer) -> None:
    """Give the scorer's last layer weights, so that scores differ between windows."""
    scorer = trainer.model.vision.scorer
    assert scorer is not None
    torch.nn.init.normal_(scorer.w3.weight, std=0.5)


def test_a_batch_encodes_each_clip_as_the_model_does_alone(trainer):
    _varied_scores(trainer)
    examples = train_examples(trainer.config, trainer.model_config, 0, 2)
    examples += next(iter(dev_examples(trainer.config, trainer.model_config, 1, 0.0)))
    with torch.no_grad():
        batch = encode_batch(trainer.model.vision, examples)
        offset = 0
        for example, keep in zip(examples, batch.keeps, strict=True):
            alone = trainer.model.encode(torch.from_numpy(example.frames), example.prune_ratio)
            assert torch.equal(alone.keep, keep)
            stop = offset + len(alone.features)
            torch.testing.assert_close(
                batch.features[offset:stop], alone.features, rtol=1e-4, atol=1e-4
            )
            offset = stop
    assert offset == len(batch.features)


def test_questions_on_a_shared_prefix_get_the_answers_of_separate_prompts(trainer):
    """The training form gives the predictions of `greedy` on the runtime's own prompts."""
    _varied_scores(trainer)
    examples = train_examples(trainer.config, trainer.model_config, 0, 1)
    model, prompts = trainer.model, trainer.sequences._prompts
    windows = trainer.model_config.vision.windows
    with torch.no_grad():
        batch = encode_batch(model.vision, examples)
        sequences = trainer.sequences.build(examples, batch.keeps)
        x = model.language.embed(sequences.ids, batch.features)
        x = model.language.transform(x, sequences.positions, sequences.mask, lambda _, k, v: (k, v))
        together = model.language.lm_head(x.flatten(0, 1)[sequences.predict_at[:, 0]])
        number = 0
        for example in examples:
            encoded = model.encode(torch.from_numpy(example.frames), example.prune_ratio)
            for question in example.questions:
                whole = prompts.build(question.text, [VideoTokens(example.timestamps, windows)])
                stays = whole != trainer.model_config.tokens.im_patch
                stays[~stays] = encoded.keep.numpy().reshape(-1)
                ids = torch.from_numpy(whole[stays])[None]
                alone = model.language(ids, encoded.features, model.visual_groups(ids))[0, -1]
                torch.testing.assert_close(together[number], alone, rtol=1e-3, atol=1e-3)
                number += 1
    assert number == len(together)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_all_parts_receive_gradients(trainer, bfloat16: bool):
    _varied_scores(trainer)
    examples = train_examples(trainer.config, trainer.model_config, 0, 1)
    result = run_batch(
        trainer.model, trainer.labels, trainer.sequences, examples, bfloat16=bfloat16
    )
    result.answer_loss.backward()
    without = {
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    }
    # A key's bias shifts all logits of a query alike, and the first token's row is never looked up.
    assert not {name for name in without if not name.endswith("wk.bias")}
    assert np.isfinite(result.answer_loss.item())
