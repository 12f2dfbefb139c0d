"""Writing Hugging Face folders: the same weights, in shards, all or nothing."""

from __future__ import annotations

import json
import logging
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint, save_checkpoint
from stts_export.checkpoint.writing import write_shards
from stts_export.convert import ConvertSpec, checkpoint_from_checkpoint
from stts_export.errors import InputError
from tests.checkpoint.olmo_folders import olmo_config, olmo_state, write_sharded, write_unsharded
from tests.helpers import (
    GOLDEN,
    prompt_ids,
    random_checkpoint,
    random_frames,
    random_model,
    small_config,
)

GOLDEN_OLMO = GOLDEN.with_name("molmo2_stts_tiny_olmo")


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("run") / "step4", olmo_state(random_model()))


def test_the_golden_training_folder_becomes_its_twin(tmp_path: Path):
    spec = ConvertSpec(max_shard_bytes=2**20)
    output = checkpoint_from_checkpoint(GOLDEN_OLMO, tmp_path / "out", spec)
    shards = sorted(output.glob("*.safetensors"))
    assert [shard.name for shard in shards][:2] == [
        f"model-0000{n}-of-0000{len(shards)}.safetensors" for n in (1, 2)
    ]
    assert all(shard.stat().st_size < 2**20 + 50_000 for shard in shards)
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = load_file(GOLDEN / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    assert open_checkpoint(output).config == open_checkpoint(GOLDEN_OLMO).config
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_weights_are_stored_as_asked(tmp_path: Path, step: Path, dtype: str | None):
    output = checkpoint_from_checkpoint(step, tmp_path / "out", ConvertSpec(dtype))
    expected = getattr(torch, dtype or "float32")
    written = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {expected}
    values = json.loads((output / "config.json").read_text())
    assert values["dtype"] == (dtype or "float32")
    loaded = model_from_checkpoint(open_checkpoint(output))
    for ours, theirs in zip(loaded.parameters(), random_model().parameters(), strict=True):
        assert torch.equal(ours, theirs.to(expected).float())


def test_a_tied_head_is_written_out(tmp_path: Path):
    state = olmo_state(random_model(), tied=True)
    folder = write_unsharded(tmp_path / "step1", state, olmo_config(tied=True))
    written = load_file(checkpoint_from_checkpoint(folder, tmp_path / "o") / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], state["transformer.wte.embedding"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_with_the_folder_what_the_plain_model_does(
    tmp_path: Path, tied: bool
):
    from transformers import Molmo2ForConditionalGeneration

    values = small_config(**{"text_config.rope_theta": 5e6 if tied else 1e6})
    model = random_model(values)
    folder = write_sharded(
        tmp_path / "step1", olmo_state(model, tied=tied), olmo_config(values, tied=tied)
    )
    output = checkpoint_from_checkpoint(
        folder, tmp_path / "out", ConvertSpec(max_shard_bytes=30_000)
    )
    theirs, info = Molmo2ForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"]
    assert all("temporal_token_scorer" in name for name in info["unexpected_keys"])
    ours = model_from_checkpoint(open_checkpoint(folder))
    frames = random_frames(2)
    ids = torch.tensor([prompt_ids(ours.config, 2)])
    groups = ours.visual_groups(ids)
    pixels = frames.astype(np.float32) / 255 * 2 - 1
    patches = pixels.reshape(2, 6, 14, 9, 14, 3).swapaxes(2, 3).reshape(2, 54, 588)
    windows = np.arange(54).reshape(2, 3, 3, 3).swapaxes(1, 2).reshape(6, 9)
    with torch.no_grad():
        expected = theirs.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(groups == 0).long(),
            pixel_values_videos=torch.from_numpy(patches),
            video_token_pooling=torch.from_numpy(np.concatenate([windows, windows + 54])),
            video_grids=torch.tensor([[2, 2, 3]]),
        ).logits
        features = ours.encode(torch.from_numpy(frames), 0.0).features
        logits = ours.language(ids, features, groups)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def test_progress_counts_tensors(tmp_path: Path, step: Path):
    calls: list[tuple[str, int, int]] = []
    checkpoint_from_checkpoint(step, tmp_path / "out", on_tensor=lambda *call: calls.append(call))
    total = len(open_checkpoint(step).tensors)
    assert [done for _, done, _ in calls] == list(range(1, total + 1))
    assert {of for _, _, of in calls} == {total}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, step: Path):
    alive = 0
    most = 0

    def watched(load: Any) -> Any:
        def call() -> torch.Tensor:
            nonlocal alive, most
            tensor = load()
            alive += 1
            most = max(most, alive)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(tensor, gone)
            return tensor

        return call

    tensors = [
        replace(tensor, load=watched(tensor.load))
        for tensor in open_checkpoint(step).tensors.values()
    ]
    write_shards(tensors, tmp_path, torch.float16, 10_000)
    assert most == 1


def test_a_weight_that_does_not_fit_is_named_and_nothing_is_left(tmp_path: Path):
    model = random_model()
    with torch.no_grad():
        model.language.embedding[0, 0] = 1e6
    save_checkpoint(model, tmp_path / "c")
    with pytest.raises(InputError, match=r"wte\.embedding does not fit into float16"):
        checkpoint_from_checkpoint(tmp_path / "c", tmp_path / "out", ConvertSpec("float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path):
    state = olmo_state(random_model())
    state["transformer.ln_f.weight"][0] = float("inf")
    folder = write_sharded(tmp_path / "step1", state)
    with pytest.raises(InputError, match=r"ln_f\.weight has NaN or infinite"):
        checkpoint_from_checkpoint(folder, tmp_path / "out")


def test_nothing_is_replaced(tmp_path: Path, step: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already; nothing is ever replaced"):
        checkpoint_from_checkpoint(step, tmp_path / "out")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").touch()
    with pytest.raises(InputError, match="not an unfinished conversion"):
        checkpoint_from_checkpoint(step, tmp_path / "other")
    assert (tmp_path / "other.partial" / "mine").exists()


def test_what_a_killed_run_left_is_written_anew(tmp_path: Path, step: Path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "convert.unfinished").touch()
    (partial / "model-00009-of-00009.safetensors").write_bytes(b"half")
    output = checkpoint_from_checkpoint(step, tmp_path / "out")
    assert not partial.exists()
    assert sorted(path.name for path in output.glob("*.safetensors")) == ["model.safetensors"]
    assert not (output / "convert.unfinished").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, step: Path):
    def interrupt(name: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint_from_checkpoint(step, tmp_path / "out", on_tensor=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_second_conversion_to_the_same_folder_is_refused(tmp_path: Path, step: Path):
    refusals: list[str] = []

    def again(name: str, done: int, total: int) -> None:
        if done == 5:
            with pytest.raises(InputError, match="another build or conversion is writing") as error:
                checkpoint_from_checkpoint(step, tmp_path / "out")
            refusals.append(str(error.value))

    output = checkpoint_from_checkpoint(step, tmp_path / "out", on_tensor=again)
    assert len(refusals) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not {path.name for path in output.iterdir()} & {"build.lock", "convert.unfinished"}
    model_from_checkpoint(open_checkpoint(output))


def test_a_checkpoint_that_changes_meanwhile_is_one_error(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")

    def replace_weights(name: str, done: int, total: int) -> None:
        if done == 5:
            save_checkpoint(random_model(seed=1), folder)

    with pytest.raises(InputError, match=r"was changed while it was read: .*model\.safetensors"):
        checkpoint_from_checkpoint(folder, tmp_path / "out", on_tensor=replace_weights)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_run_of_ours_keeps_what_lies_beside_its_weights(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "run" / "step2")
    for name in ("training.json", "tokenizer_config.json", "LICENSE"):
        (folder / name).write_text('{"seed": 3}')
    output = checkpoint_from_checkpoint(tmp_path / "run", tmp_path / "out", ConvertSpec("float16"))
    for name in ("training.json", "tokenizer_config.json", "LICENSE"):
        assert (output / name).read_text() == '{"seed": 3}'
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, output)]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_full_disk_is_found_before_the_work(
    tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2, 1, 1000))
    with pytest.raises(InputError, match=r"0\.0 MB free") as error:
        checkpoint_from_checkpoint(step, tmp_path / "out")
    assert "for this checkpoint" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_output_lies_outside_the_checkpoint(step: Path):
    with pytest.raises(InputError, match="overlaps the checkpoint"):
        checkpoint_from_checkpoint(step, step / "out")


def test_what_transformers_would_compute_otherwise_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    state = olmo_state(random_model(scorer=False))
    folder = write_sharded(tmp_path / "step1", state, olmo_config(bi_directional_attn=None))
    output = checkpoint_from_checkpoint(folder, tmp_path / "out")
    assert "transformers has no such setting" in caplog.text
    assert "has no scorer: the folder holds the plain model" in caplog.text
    assert "--tokenizer adds one" in caplog.text
    assert not open_checkpoint(output).config.bidirectional_visual


def test_code_files_are_neither_copied_nor_pointed_to(tmp_path: Path):
    values = small_config(auto_map={"AutoConfig": "configuration_molmo2.Molmo2Config"})
    save_checkpoint(random_model(values), tmp_path / "c")
    (tmp_path / "c" / "configuration_molmo2.py").write_text("raise SystemExit")
    (tmp_path / "c" / "LICENSE").write_text("terms")
    output = checkpoint_from_checkpoint(tmp_path / "c", tmp_path / "out")
    assert {path.name for path in output.iterdir()} == {
        "config.json", "model.safetensors", "LICENSE",
    }  # fmt: skip
    assert "auto_map" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("values", [{"dtype": "int8"}, {"max_shard_bytes": 0}])
def test_nonsense_is_refused(values: dict[str, Any]):
    with pytest.raises(InputError):
        ConvertSpec(**values)
