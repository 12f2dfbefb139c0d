from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint, save_checkpoint
from stts_export.errors import InputError
from stts_export.model.pruning import Scorer
from stts_export.training.config import (
    DevSettings,
    OptimSettings,
    PruningSettings,
    Rates,
    StartSettings,
    TrainConfig,
)
from stts_export.training.start import Start, save_model, start_from, trainable_groups
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.helpers import random_frames, random_model
from tests.training.small_runs import (
    ALONE,
    SHAPE,
    full_disk,
    small_folder,
    small_run,
    small_values,
)

PARTS = ("language", "vision", "connector", "scorer")


def _start(checkpoint: Path, seed: int = 0, **settings: Any) -> Start:
    start = StartSettings(checkpoint=str(checkpoint), **settings)
    return start_from(small_run(start=start, seed=seed))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _differing(one: nn.Module, other: nn.Module) -> set[str]:
    left, right = _weights(one), _weights(other)
    return {name for name in {**left, **right} if not _same(left.get(name), right.get(name))}


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def test_weights_from_scratch_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = start_from(small_run(seed=5)).model
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(2)
    assert not _differing(one, start_from(small_run(seed=5)).model)
    matrices = {name for name, value in one.named_parameters() if value.dim() == 2}
    changed = _differing(one, start_from(small_run(seed=6)).model)
    assert changed == matrices - {"vision.scorer.w3.weight"}


def test_from_scratch_scores_begin_equal_and_small():
    model = start_from(small_run()).model
    scores, _ = model.choose(torch.from_numpy(random_frames(3, (36, 36))), 0.5)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / (1 + math.exp(3))))


def test_from_scratch_the_configuration_is_that_of_the_run(tmp_path: Path):
    pruning = PruningSettings(trained_ratio=0.7)
    start = start_from(small_run(pruning=pruning))
    assert start.model.training
    save_model(start.model, start, tmp_path / "step1", {"steps": 1}, ALONE)
    opened = open_checkpoint(tmp_path / "step1")
    assert opened.config == start.model.config
    assert opened.config.vision.pruning is not None
    assert opened.config.vision.pruning.trained_prune_ratio == 0.7
    assert not _differing(model_from_checkpoint(opened), start.model)
    assert json.loads((tmp_path / "step1" / "training.json").read_text()) == {"steps": 1}
    assert start.prompts().decode([]) == ""


def test_from_scratch_without_a_scorer(tmp_path: Path):
    config = replace(
        small_run(),
        model=replace(SHAPE, scorer=False),
        pruning=PruningSettings(full_share=1.0),
        dev=DevSettings(prune_ratio=0.0),
    )
    start = start_from(config)
    assert start.model.vision.scorer is None
    save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    opened = open_checkpoint(tmp_path / "step1")
    assert not opened.has_scorer
    assert opened.config.extra["vit_config"]["prune"] is False


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a scorer, and without a word about pruning; read only."""
    folder = small_folder(tmp_path_factory.mktemp("plain") / "plain", scorer=False)
    values = json.loads((folder / "config.json").read_text())
    for key in (
        "prune", "prune_method", "prune_at", "topk", "rescale_bias_min", "prune_from_frame",
        "pruning_in_scorer",
    ):  # fmt: skip
        del values["vit_config"][key]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "LICENSE").write_bytes(b"\xa9 somebody\r\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a scorer at block 0; read only."""
    return small_folder(tmp_path_factory.mktemp("trained") / "trained")


def test_a_plain_model_gets_a_scorer_that_changes_nothing_yet(plain: Path, tmp_path: Path):
    start = _start(plain, prune_at=0)
    before = model_from_checkpoint(open_checkpoint(plain))
    added = _differing(start.model, before)
    assert added == {f"vision.scorer.{name}" for name, _ in _scorer(start).named_parameters()}
    frames = torch.from_numpy(random_frames(3, (36, 36)))
    with torch.no_grad():
        torch.testing.assert_close(
            start.model.encode(frames, 0.0).features, before.encode(frames, 0.0).features
        )
        assert torch.equal(_scorer(start).w3.weight, torch.zeros(1, 24))
    assert start.description == {
        "from": "plain", "scorer": "fresh", "prune_at": 0, "tied_head": False, "train": "all",
    }  # fmt: skip

    save_model(start.model, start, tmp_path / "step3", {"start": start.description}, ALONE)
    opened = open_checkpoint(tmp_path / "step3")
    assert opened.config.vision.pruning is not None
    assert opened.config.vision.pruning.trained_prune_ratio == 0.5
    assert not _differing(model_from_checkpoint(opened), start.model)
    assert (tmp_path / "step3" / "LICENSE").read_bytes() == b"\xa9 somebody\r\n"
    names = {file.name for file in plain.iterdir()} | {"training.json"}
    assert {file.name for file in (tmp_path / "step3").iterdir()} == names


def _scorer(start: Start) -> Scorer:
    assert start.model.vision.scorer is not None
    return start.model.vision.scorer


def test_only_a_fresh_scorer_depends_on_the_seed(plain: Path, trained: Path):
    changed = _differing(_start(plain, 1, prune_at=0).model, _start(plain, 2, prune_at=0).model)
    assert "vision.scorer.w1.weight" in changed
    assert all(name.startswith("vision.scorer.") for name in changed)
    assert not _differing(_start(trained, 1).model, _start(trained, 2).model)


def test_our_own_checkpoint_is_taken_as_it_is(trained: Path):
    start = _start(trained)
    assert not _differing(start.model, model_from_checkpoint(open_checkpoint(trained)))
    assert start.description["scorer"] == "of the checkpoint"
    pruning = start.model.config.vision.pruning
    assert pruning is not None
    assert (pruning.trained_prune_ratio, pruning.prune_at) == (0.5, 0)
    assert not {"config.json", "training.json"} & set(start.config_files)
    start.prompts()


def test_a_new_scorer_at_another_block(trained: Path, tmp_path: Path):
    deeper = small_folder(tmp_path / "deeper", changes={"adapter_config.vit_layers": [-1]})
    start = _start(deeper, prune_at=1, fresh_scorer=True)
    changed = _differing(start.model, model_from_checkpoint(open_checkpoint(deeper)))
    assert changed == {f"vision.scorer.{name}" for name, _ in _scorer(start).named_parameters()}
    assert start.model.vision.config.split_at == 3
    with pytest.raises(InputError, match="scorer was trained at 0") as error:
        _start(deeper, prune_at=1)
    assert "fresh_scorer" in str(error.value)
    with pytest.raises(InputError, match=r"start.prune_at is 1\n.*0 to 0.*reads blocks \(3, 2\)"):
        _start(trained, prune_at=1, fresh_scorer=True)


def test_the_default_block_is_named_when_it_does_not_fit(plain: Path):
    with pytest.raises(InputError, match="is 3 by default"):
        _start(plain)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_current_transformers(plain: Path, tmp_path: Path):
    from transformers import Molmo2Config

    folder = small_folder(tmp_path / "saved", scorer=False)
    values = json.loads((plain / "config.json").read_text())
    Molmo2Config(**values).save_pretrained(folder)
    assert "vision_config" in json.loads((folder / "config.json").read_text())
    start = _start(folder, prune_at=0)
    save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    opened = open_checkpoint(tmp_path / "step1")
    assert opened.has_scorer
    assert opened.config == start.model.config


@pytest.mark.parametrize("said", [True, False])
def test_a_tied_head_stays_the_embedding(tmp_path: Path, said: bool):
    model = random_model(small_values({"tie_word_embeddings": said}))
    with torch.no_grad():
        model.language.lm_head.weight.copy_(model.language.embedding)
    save_checkpoint(model, tmp_path / "tied")
    save_tokenizer_files(build_tokenizer()[0], tmp_path / "tied", 3)

    start = _start(tmp_path / "tied")
    assert start.description["tied_head"] is True
    optimizer = torch.optim.SGD(start.model.parameters(), lr=0.1)
    start.model.language.lm_head(torch.ones(1, 16)).square().sum().backward()
    optimizer.step()
    save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    again = model_from_checkpoint(open_checkpoint(tmp_path / "step1"))
    assert _differing(again, model) == {"language.embedding", "language.lm_head.weight"}
    assert torch.equal(again.language.lm_head.weight, again.language.embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "holds no checkpoint"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "model_type is 'llama'",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(small_values({"text_config.hidden_size": 32}))
            ),
            "has shape",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_trained(tmp_path: Path, change: Any, message: str):
    folder = small_folder(tmp_path / "given")
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        _start(folder)
    assert str(folder) in str(error.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        _start(tmp_path / "nothing")


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path):
    other = {"image_patch_id": 3, "image_high_res_id": 3}
    folder = small_folder(tmp_path / "given", changes=other)
    with pytest.raises(InputError) as error:
        _start(folder).prompts()
    assert error.value.where == "given/tokenizer.json"


def _groups(
    config: TrainConfig, start: Start, labels: nn.Module | None = None
) -> dict[tuple[str, float], dict[str, Any]]:
    groups = trainable_groups(start.model, labels, config)
    return {(group["name"], group["weight_decay"]): group for group in groups}


def test_groups_by_part_and_decay():
    rates = Rates(language=1.0, vision=2.0, connector=3.0, scorer=4.0)
    config = small_run(optim=OptimSettings(rates=rates, weight_decay=0.1))
    start, labels = start_from(config), nn.Linear(16, 3)
    groups = _groups(config, start, labels)
    assert set(groups) == {(part, decay) for part in (*PARTS, "labels") for decay in (0.1, 0.0)}
    assert {name: group["rate"] for (name, _), group in groups.items()} == {
        "language": 1.0, "vision": 2.0, "connector": 3.0, "scorer": 4.0, "labels": 1.0,
    }  # fmt: skip
    assert all((p.dim() >= 2) == (d > 0) for (_, d), g in groups.items() for p in g["params"])
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    everything = [*start.model.parameters(), *labels.parameters()]
    assert sorted(grouped) == sorted(map(id, everything))
    scorer = {id(p) for p in _scorer(start).parameters()}
    assert {id(p) for d in (0.1, 0.0) for p in groups["scorer", d]["params"]} == scorer
    torch.optim.AdamW(list(groups.values()), lr=0.0)


def test_a_part_without_a_rate_is_frozen():
    config = small_run(optim=OptimSettings(rates=Rates(language=0.0, vision=0.0)))
    start, labels = start_from(config), nn.Linear(16, 3)
    assert not start.model.language.embedding.requires_grad  # before anything is wrapped
    assert {name for name, _ in _groups(config, start, labels)} == {"connector", "scorer"}
    frozen = [*start.model.language.parameters(), *start.model.vision.blocks.parameters()]
    assert not any(parameter.requires_grad for parameter in (*frozen, *labels.parameters()))


def test_the_scorer_alone(trained: Path):
    config = small_run(start=StartSettings(checkpoint=str(trained), train="scorer"))
    start = start_from(config)
    assert {name for name, _ in _groups(config, start, nn.Linear(16, 3))} == {"scorer"}
    learning = {name for name, value in start.model.named_parameters() if value.requires_grad}
    assert learning == {f"vision.scorer.{name}" for name, _ in _scorer(start).named_parameters()}


def test_nothing_to_train_is_refused(trained: Path):
    config = small_run(
        start=StartSettings(checkpoint=str(trained), train="scorer"),
        optim=OptimSettings(rates=Rates(scorer=0.0)),
    )
    with pytest.raises(InputError, match="nothing is trained"):
        _groups(config, start_from(config))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path):
    start = start_from(small_run())
    save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    (tmp_path / "step0.partial").mkdir()  # of a run that was killed
    with full_disk(20_000), pytest.raises(InputError, match="cannot be written: File too") as error:
        save_model(start.model, start, tmp_path / "step2", {}, ALONE)
    assert str(tmp_path / "step2") in str(error.value)
    assert f"{tmp_path / 'step1'} is whole" in str(error.value)
    assert [child.name for child in tmp_path.iterdir()] == ["step1"]
    assert not _differing(model_from_checkpoint(open_checkpoint(tmp_path)), start.model)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path):
    start = start_from(small_run())
    save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    with torch.no_grad():
        start.model.language.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"ln_f\.weight has NaN"):
        save_model(start.model, start, tmp_path / "step1", {}, ALONE)
    open_checkpoint(tmp_path / "step1")
    assert [child.name for child in tmp_path.iterdir()] == ["step1"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path):
    start = start_from(small_run())
    for steps in (1, 2):
        save_model(start.model, start, tmp_path / "step1", {"steps": steps}, ALONE)
    assert json.loads((tmp_path / "step1" / "training.json").read_text()) == {"steps": 2}
    assert [child.name for child in tmp_path.iterdir()] == ["step1"]
