"""Training folders of olmo: what loads, that nothing in them runs, and what is refused."""

from __future__ import annotations

import collections
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from stts_export.checkpoint import (
    check_tensors,
    model_from_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from tests.checkpoint.olmo_folders import (
    olmo_config,
    olmo_state,
    read_metadata,
    write_config,
    write_metadata,
    write_sharded,
    write_unsharded,
)
from tests.helpers import GOLDEN, random_model, small_config

GOLDEN_OLMO = GOLDEN.with_name("molmo2_stts_tiny_olmo")
_HEAD = "transformer.ff_out.weight"
_NORM = "transformer.ln_f.weight"


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


@pytest.fixture
def sharded(tmp_path: Path, model: SttsModel) -> Path:
    return write_sharded(tmp_path / "step3", olmo_state(model), ranks=3)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN_OLMO, tmp_path / "golden"))


def _assert_same(loaded: SttsModel, expected: SttsModel) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_golden_folder_has_the_weights_and_the_model_of_its_twin():
    ours, theirs = open_checkpoint(GOLDEN_OLMO), open_checkpoint(GOLDEN)
    _assert_same(model_from_checkpoint(ours), model_from_checkpoint(theirs))
    # The reference's converter was told another length than the training run had.
    longest = theirs.config.text.max_position_embeddings
    text = replace(ours.config.text, max_position_embeddings=longest)
    assert replace(ours.config, text=text) == theirs.config
    assert ours.has_scorer


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_pieces_of_several_ranks_are_put_together(tmp_path: Path, model: SttsModel, ranks: int):
    folder = write_sharded(tmp_path / "step1", olmo_state(model), ranks=ranks)
    checkpoint = open_checkpoint(folder)
    _assert_same(model_from_checkpoint(checkpoint), model)
    assert {file.name for file in checkpoint.files} == {
        ".metadata", "config.yaml", *(f"__{rank}_0.distcp" for rank in range(ranks)),
    }  # fmt: skip


def test_pieces_split_along_any_axis_are_put_together(tmp_path: Path, model: SttsModel):
    state = olmo_state(model)
    weight = state.pop(_HEAD)
    cut = {"a": weight[:100, :20], "b": weight[100:, :20], "c": weight[:, 20:]}
    folder = write_sharded(tmp_path / "step1", {**state, **cut})
    metadata = read_metadata(folder)
    whole = metadata.state_dict_metadata["model.a"]
    whole.size = weight.shape
    whole.chunks = []
    for name, offsets in (("a", (0, 0)), ("b", (100, 0)), ("c", (0, 20))):
        entry = metadata.state_dict_metadata.pop(f"model.{name}")
        info = metadata.storage_data.pop(MetadataIndex(f"model.{name}", (0, 0)))
        metadata.storage_data[MetadataIndex(f"model.{_HEAD}", offsets)] = info
        del entry
        whole.chunks.append(ChunkStorageMetadata(torch.Size(offsets), cut[name].shape))
    metadata.state_dict_metadata[f"model.{_HEAD}"] = whole
    write_metadata(folder, metadata)
    _assert_same(model_from_checkpoint(open_checkpoint(folder)), model)


def test_what_torch_itself_saves_loads(tmp_path: Path, model: SttsModel):
    state = {f"model.{name}": tensor for name, tensor in olmo_state(model).items()}
    write_config(tmp_path / "step1", olmo_config())
    writer = FileSystemWriter(tmp_path / "step1" / "model_and_optim")
    with pytest.warns(UserWarning, match="single process"):
        save(state, storage_writer=writer, no_dist=True)
    _assert_same(model_from_checkpoint(open_checkpoint(tmp_path / "step1")), model)


def test_an_unsharded_checkpoint_loads(tmp_path: Path, model: SttsModel):
    folder = write_unsharded(tmp_path / "step1-unsharded", olmo_state(model))
    _assert_same(model_from_checkpoint(open_checkpoint(folder)), model)


@pytest.mark.parametrize("write", [write_sharded, write_unsharded])
def test_names_lose_what_wrappers_added(tmp_path: Path, model: SttsModel, write: Any):
    state = {
        "_orig_mod." + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): tensor
        for name, tensor in olmo_state(model).items()
    }
    _assert_same(model_from_checkpoint(open_checkpoint(write(tmp_path / "step1", state))), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_sharded, write_unsharded])
def test_two_byte_weights_load_as_fp32(
    tmp_path: Path, model: SttsModel, write: Any, dtype: torch.dtype
):
    state = {name: tensor.to(dtype) for name, tensor in olmo_state(model).items()}
    checkpoint = open_checkpoint(write(tmp_path / "step1", state))
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}
    loaded = model_from_checkpoint(checkpoint)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float())


@pytest.mark.parametrize(("tied", "theta"), [(True, 5e6), (False, 1e6)], ids=["4B", "8B"])
@pytest.mark.parametrize("write", [write_sharded, write_unsharded])
def test_both_formats_give_the_same_model(tmp_path: Path, write: Any, tied: bool, theta: float):
    values = small_config(**{"text_config.rope_theta": theta})
    expected = random_model(values)
    if tied:
        with torch.no_grad():
            expected.language.lm_head.weight.copy_(expected.language.embedding)
    save_checkpoint(expected, tmp_path / "hf")
    write(tmp_path / "olmo", olmo_state(expected, tied=tied), olmo_config(values, tied=tied))
    theirs, ours = (open_checkpoint(tmp_path / name) for name in ("hf", "olmo"))
    assert ours.config == theirs.config
    assert ours.config.text.rope_theta == theta
    _assert_same(model_from_checkpoint(ours), model_from_checkpoint(theirs))


def test_one_tensor_loads_without_the_others(sharded: Path, model: SttsModel):
    stored = open_checkpoint(sharded).parameters()["language.norm.weight"]
    for file in (sharded / "model_and_optim").glob("*.distcp"):
        size = file.stat().st_size
        with file.open("r+b") as shard:
            places = [place.start for _, place in _pieces(stored) if place.file == file]
            for start in range(0, size, 64):
                if not any(start - 64 <= place <= start + 1024 for place in places):
                    shard.seek(start)
                    shard.write(b"\0" * min(64, size - start))
    assert torch.equal(stored.load(), model.language.norm.weight)


def _pieces(stored: Any) -> Any:
    return stored.load.__self__.pieces


def test_large_tensors_of_one_file_are_mapped_and_the_file_stays_as_it_is(tmp_path: Path):
    state = {"transformer.wte.embedding": torch.arange(2**19, dtype=torch.float32)}
    folder = write_unsharded(tmp_path / "step1", {**olmo_state(random_model()), **state})
    before = (folder / "model.pt").read_bytes()
    tensor = open_checkpoint(folder).tensors["model.transformer.wte.embedding"].load()
    assert "model.pt" in Path("/proc/self/maps").read_text()
    assert torch.equal(tensor, state["transformer.wte.embedding"])
    tensor.zero_()
    assert (folder / "model.pt").read_bytes() == before


def test_without_scorer_tensors_nothing_is_pruned(tmp_path: Path):
    plain = random_model(scorer=False)
    checkpoint = open_checkpoint(write_sharded(tmp_path / "step1", olmo_state(plain)))
    assert not checkpoint.has_scorer
    _assert_same(model_from_checkpoint(checkpoint), plain)


def test_the_newest_step_of_a_run_is_taken(tmp_path: Path, model: SttsModel):
    state = olmo_state(model)
    for name in ("step2", "step10"):
        write_sharded(tmp_path / "run" / name, state)
    write_unsharded(tmp_path / "run" / "step10-unsharded", state)
    (tmp_path / "run" / "step11").mkdir()  # interrupted before anything was saved
    write_config(tmp_path / "run", olmo_config())
    assert open_checkpoint(tmp_path / "run").folder.name == "step10"
    write_unsharded(tmp_path / "run" / "step12-unsharded", state)
    assert open_checkpoint(tmp_path / "run").folder.name == "step12-unsharded"


# What is broken is refused when the folder is opened, before any work.


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_the_metadata_is_refused_by_name_and_does_not_run(sharded: Path, tmp_path: Path):
    marker = tmp_path / "ran"
    write_metadata(sharded, {"state_dict_metadata": {}, "x": _Evil(marker)})
    with pytest.raises(InputError, match=r"holds an object of (posix|nt)\.system") as error:
        open_checkpoint(sharded)
    assert ".metadata" in str(error.value)
    assert not marker.exists()


def test_code_in_a_shard_is_refused_by_name_and_does_not_run(
    tmp_path: Path, model: SttsModel, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "ran"
    state = olmo_state(model)
    saved = torch.save
    evil = {"tensor": state[_NORM], "x": _Evil(marker)}
    monkeypatch.setattr(
        torch, "save", lambda t, f: saved(evil if torch.equal(t, state[_NORM]) else t, f)
    )
    folder = write_sharded(tmp_path / "step1", state)
    with pytest.raises(InputError, match=r"holds an object of (posix|nt)\.system"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_code_in_an_unsharded_file_is_refused_by_name_and_does_not_run(
    tmp_path: Path, model: SttsModel
):
    marker = tmp_path / "ran"
    folder = write_unsharded(tmp_path / "step1", {**olmo_state(model), "x": _Evil(marker)})
    with pytest.raises(InputError, match=r"holds an object of (posix|nt)\.system"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_foreign_classes_are_named(tmp_path: Path, model: SttsModel):
    state = {**olmo_state(model), "config": collections.Counter()}
    folder = write_unsharded(tmp_path / "step1", state)
    with pytest.raises(InputError, match=r"an object of collections\.Counter, which is not read"):
        open_checkpoint(folder)


def test_a_pickle_cannot_change_what_later_ones_are_read_with(sharded: Path):
    file = sharded / "model_and_optim" / ".metadata"
    whole = file.read_bytes()
    # Sets an attribute of the class that stands for Metadata.
    attack = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
        b"N}\x8c\x13state_dict_metadata\x94}s\x86b."
    )
    file.write_bytes(attack)
    with pytest.raises(InputError):
        open_checkpoint(sharded)
    file.write_bytes(whole)
    check_tensors(open_checkpoint(sharded))


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({})])
def test_metadata_that_is_none_is_refused(sharded: Path, content: bytes):
    (sharded / "model_and_optim" / ".metadata").write_bytes(content)
    with pytest.raises(InputError, match=r"\.metadata: (cannot be read|does not describe)"):
        open_checkpoint(sharded)


def test_an_interrupted_save_is_named(sharded: Path):
    (sharded / "model_and_optim" / ".metadata").unlink()
    with pytest.raises(InputError, match="without it the checkpoint was not finished"):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_refused(golden: Path):
    shard = golden / "model_and_optim" / "__0_3.distcp"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"__0_3\.distcp: is truncated: \d+ bytes"):
        open_checkpoint(golden)


def test_a_shard_of_other_content_is_refused(golden: Path):
    shard = golden / "model_and_optim" / "__0_3.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(InputError, match=r"__0_3\.distcp: cannot be read"):
        open_checkpoint(golden)


def test_all_missing_shards_are_named(golden: Path):
    for number in (1, 4):
        (golden / "model_and_optim" / f"__0_{number}.distcp").unlink()
    with pytest.raises(InputError) as error:
        open_checkpoint(golden)
    assert "2 of 6 shards are missing: __0_1.distcp, __0_4.distcp" in str(error.value)


def test_a_shard_outside_the_folder_is_refused(sharded: Path):
    metadata = read_metadata(sharded)
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    write_metadata(sharded, metadata)
    with pytest.raises(InputError, match=r"names the shard '\.\./\.\./secret'"):
        open_checkpoint(sharded)


def test_an_entry_that_is_no_tensor_is_named(sharded: Path):
    metadata = read_metadata(sharded)
    metadata.state_dict_metadata["model.step"] = metadata.state_dict_metadata["optim.param_groups"]
    write_metadata(sharded, metadata)
    with pytest.raises(InputError, match=r"model\.step is not a tensor"):
        open_checkpoint(sharded)


def _change_chunks(folder: Path, change: Any) -> None:
    metadata = read_metadata(folder)
    change(metadata, metadata.state_dict_metadata[f"model.{_HEAD}"].chunks)
    write_metadata(folder, metadata)


def test_a_piece_that_is_not_stored_is_named(sharded: Path):
    def change(metadata: Any, chunks: Any) -> None:
        del metadata.storage_data[MetadataIndex(f"model.{_HEAD}", chunks[1].offsets)]

    _change_chunks(sharded, change)
    with pytest.raises(InputError, match=r"ff_out\.weight lacks its piece at \(171, 0\)"):
        open_checkpoint(sharded)


def test_a_piece_that_is_not_listed_is_noticed(sharded: Path):
    _change_chunks(sharded, lambda _, chunks: chunks.pop())
    with pytest.raises(InputError, match=r"the pieces of .*ff_out\.weight hold \d+ of \d+ values"):
        open_checkpoint(sharded)


def test_overlapping_pieces_are_refused(sharded: Path):
    def change(metadata: Any, chunks: Any) -> None:
        chunks[1].offsets = torch.Size((170, 0))

    _change_chunks(sharded, change)
    with pytest.raises(InputError, match=r"the pieces of .*ff_out\.weight overlap"):
        open_checkpoint(sharded)


def test_pieces_outside_the_tensor_are_refused(sharded: Path):
    def change(metadata: Any, chunks: Any) -> None:
        chunks[2].offsets = torch.Size((400, 0))

    _change_chunks(sharded, change)
    with pytest.raises(InputError, match="reach outside it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("what", ["dtype", "shape"])
def test_a_shard_that_contradicts_the_metadata_is_refused(sharded: Path, what: str):
    metadata = read_metadata(sharded)
    entry = metadata.state_dict_metadata[f"model.{_NORM}"]
    if what == "dtype":
        entry.properties.dtype = torch.float16
    else:
        entry.size = torch.Size((64,))
        for index, chunk in enumerate(entry.chunks):
            (key,) = (
                key for key in metadata.storage_data
                if key.fqn == f"model.{_NORM}" and key.offset == chunk.offsets
            )  # fmt: skip
            info = metadata.storage_data.pop(key)
            rows = (22, 22, 20)
            chunk.offsets, chunk.sizes = torch.Size((index * 22,)), torch.Size((rows[index],))
            metadata.storage_data[MetadataIndex(f"model.{_NORM}", chunk.offsets)] = info
    write_metadata(sharded, metadata)
    with pytest.raises(InputError, match=r"by \.metadata"):
        open_checkpoint(sharded)


def test_a_truncated_unsharded_file_is_refused(tmp_path: Path, model: SttsModel):
    folder = write_unsharded(tmp_path / "step1", olmo_state(model))
    file = folder / "model.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_checkpoint(folder)


def test_an_unsharded_file_in_the_old_format_is_refused(tmp_path: Path, model: SttsModel):
    folder = write_unsharded(tmp_path / "step1", {})
    torch.save(olmo_state(model), folder / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="the zip format"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("state", "message"), [
    ({}, "is not a state dict"),
    ({"step": 3, "x": torch.ones(2)}, "step is not a tensor"),
])  # fmt: skip
def test_an_unsharded_file_of_other_things_is_refused(tmp_path: Path, state: Any, message: str):
    with pytest.raises(InputError, match=message):
        open_checkpoint(write_unsharded(tmp_path / "step1", state))


def test_missing_tensors_are_named(tmp_path: Path, model: SttsModel):
    state = olmo_state(model)
    del state[_NORM]
    checkpoint = open_checkpoint(write_sharded(tmp_path / "step1", state))
    with pytest.raises(InputError, match=r"1 of \d+ tensors are missing: model\.transformer\.ln_f"):
        check_tensors(checkpoint)


def test_tensors_of_no_use_are_named(tmp_path: Path, model: SttsModel):
    state = {**olmo_state(model), "ema.weight": torch.ones(2)}
    checkpoint = open_checkpoint(write_sharded(tmp_path / "step1", state))
    with pytest.raises(InputError, match=r"no place in this model: model\.ema\.weight"):
        check_tensors(checkpoint)


@pytest.mark.parametrize(("value", "message"), [
    (torch.ones(7), r"ln_f\.weight has shape \(7,\)"),
    (torch.ones(32, dtype=torch.int8), "has type int8"),
])  # fmt: skip
def test_wrong_shapes_and_types_are_refused(
    tmp_path: Path, model: SttsModel, value: torch.Tensor, message: str
):
    state = {**olmo_state(model), _NORM: value}
    checkpoint = open_checkpoint(write_sharded(tmp_path / "step1", state))
    with pytest.raises(InputError, match=message):
        check_tensors(checkpoint)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, model: SttsModel):
    state = olmo_state(model)
    state[_NORM][3] = float("nan")
    checkpoint = open_checkpoint(write_sharded(tmp_path / "step1", state))
    with pytest.raises(InputError, match=r"ln_f\.weight has NaN or infinite"):
        model_from_checkpoint(checkpoint)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_contradicts_the_configuration_is_refused(
    tmp_path: Path, model: SttsModel, tied: bool
):
    state = olmo_state(model, tied=not tied)
    folder = write_sharded(tmp_path / "step1", state, olmo_config(tied=tied))
    with pytest.raises(InputError, match=f"weight_tying is {str(tied).lower()}, but"):
        open_checkpoint(folder)


def test_a_missing_config_is_named(sharded: Path):
    (sharded / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml: is missing"):
        open_checkpoint(sharded)
