"""Reading checkpoint folders: what loads, and what is refused in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stts_export.checkpoint import (
    check_tensors,
    model_from_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from stts_export.checkpoint.names import LM_HEAD, SCORER_PREFIX, TOKEN_EMBEDDING
from stts_export.errors import InputError
from tests.helpers import random_checkpoint, random_model, small_config


@pytest.fixture
def folder(tmp_path: Path, small_checkpoint: Path) -> Path:
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def _rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


def _load(folder: Path) -> torch.nn.Module:
    return model_from_checkpoint(open_checkpoint(folder))


def _shard(folder: Path) -> None:
    weights = _weights(folder)
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_what_is_saved_is_what_loads(folder: Path):
    expected = random_model().state_dict()
    loaded = _load(folder).state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_shards_load_like_a_single_file(folder: Path):
    expected = _load(folder).state_dict()
    _shard(folder)
    loaded = _load(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_byte_weights_load_as_fp32(tmp_path: Path, dtype: torch.dtype):
    save_checkpoint(random_model(), tmp_path / "half", dtype)
    model = _load(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_folder_means_its_newest_step(tmp_path: Path):
    for step in (9, 10):
        random_checkpoint(tmp_path / "run" / f"step{step}", seed=step)
    (tmp_path / "run" / "step11").mkdir()  # interrupted while saving
    assert open_checkpoint(tmp_path / "run").folder.name == "step10"


def test_without_scorer_tensors_nothing_is_pruned(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "plain", scorer=False)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.has_scorer
    assert model_from_checkpoint(checkpoint).vision.scorer is None


def test_tensors_decide_over_the_prune_flag(tmp_path: Path):
    values = small_config(**{"vit_config.prune": False})
    assert open_checkpoint(random_checkpoint(tmp_path / "c", values)).has_scorer


def _tie(folder: Path, value: bool | None) -> None:
    """Say in config.json whether the head is the embedding; nothing when None."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("tie_word_embeddings", None)
    if value is not None:
        values["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(values))


def test_a_missing_head_is_the_embedding_where_the_config_says_so(folder: Path):
    weights = _weights(folder)
    del weights[LM_HEAD]
    _rewrite(folder, weights)
    _tie(folder, True)
    state = _load(folder).state_dict()
    assert torch.equal(state["language.lm_head.weight"], weights[TOKEN_EMBEDDING])


@pytest.mark.parametrize("value", [False, None])
def test_a_missing_head_of_an_untied_model_is_named(folder: Path, value: bool | None):
    weights = _weights(folder)
    del weights[LM_HEAD]
    _rewrite(folder, weights)
    _tie(folder, value)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing, and config\.json"):
        open_checkpoint(folder)


def test_a_head_of_its_own_contradicts_a_tied_model(folder: Path):
    _tie(folder, True)
    with pytest.raises(InputError, match=r"is true, but lm_head\.weight differs"):
        open_checkpoint(folder)
    weights = _weights(folder)
    _rewrite(folder, {**weights, LM_HEAD: weights[TOKEN_EMBEDDING].clone()})
    _load(folder)


def test_vision_blocks_above_the_taps_are_left_out(folder: Path):
    weights = _weights(folder)
    prefix = "model.vision_backbone.image_vit.transformer.resblocks."
    above = {k.replace(".4.", ".5."): v.clone() for k, v in weights.items() if prefix + "4." in k}
    assert above
    _rewrite(folder, weights | above)
    _load(folder)


def test_missing_tensors_are_named(folder: Path):
    weights = _weights(folder)
    name = f"{SCORER_PREFIX}mlp.w2.bias"
    del weights[name]
    _rewrite(folder, weights)
    with pytest.raises(InputError) as error:
        _load(folder)
    assert name in str(error.value)
    assert "1 of" in str(error.value)


def test_tensors_of_no_use_are_named(folder: Path):
    _rewrite(folder, _weights(folder) | {"model.surprise.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"no place in this model: model\.surprise\.weight"):
        _load(folder)


def test_a_wrong_shape_names_tensor_file_and_both_shapes(folder: Path):
    weights = _weights(folder)
    weights["model.transformer.ln_f.weight"] = torch.ones(7)
    _rewrite(folder, weights)
    with pytest.raises(InputError) as error:
        _load(folder)
    text = str(error.value)
    assert "ln_f.weight has shape (7,)" in text
    assert "(32,)" in text
    assert "model.safetensors" in text


def test_integer_weights_are_refused(folder: Path):
    weights = _weights(folder)
    weights["model.transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int8)
    _rewrite(folder, weights)
    with pytest.raises(InputError, match="int8"):
        _load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float):
    weights = _weights(folder)
    weights["model.transformer.ln_f.weight"][3] = value
    _rewrite(folder, weights)
    check_tensors(open_checkpoint(folder))
    with pytest.raises(InputError, match=r"ln_f\.weight has NaN or infinite"):
        _load(folder)


def test_a_truncated_file_is_refused(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path):
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        open_checkpoint(folder)


def test_an_index_that_promises_too_much_is_refused(folder: Path):
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"lacks model\.extra"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["not json", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(folder: Path, content: str):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="not a safetensors index"):
        open_checkpoint(folder)


def test_two_sets_of_weights_are_refused(folder: Path):
    single = (folder / "model.safetensors").read_bytes()
    _shard(folder)
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(InputError, match="two sets of weights") as error:
        open_checkpoint(folder)
    assert "remove the one that is not meant" in str(error.value)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/other.safetensors", "..", "", 3])
def test_an_index_names_files_beside_it(folder: Path, file: object):
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.transformer.ln_f.weight"] = file
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"index\.json: (names the shard|is not a safetensors)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "{"])
def test_a_config_that_is_none_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: (cannot be read as|is not a) JSON"):
        open_checkpoint(folder)


def test_pickles_are_never_opened(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (folder / "pytorch_model.bin").write_bytes(payload.encode())
    with pytest.raises(InputError, match=r"pytorch_model\.bin can hold code and is not read"):
        open_checkpoint(folder)
    assert not marker.exists()


@pytest.mark.parametrize("case", ["missing", "file", "empty"])
def test_paths_that_hold_no_checkpoint(tmp_path: Path, case: str):
    path = tmp_path / "x"
    if case == "file":
        path.write_text("")
    elif case == "empty":
        path.mkdir()
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
