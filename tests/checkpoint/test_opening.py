"""From a path to a checkpoint: formats, steps of runs, and tokenizers from elsewhere."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.checkpoint import open_checkpoint, stored
from stts_export.errors import InputError
from stts_export.runtime.prompt import PromptBuilder
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.checkpoint.olmo_folders import olmo_config, olmo_state, write_sharded
from tests.helpers import random_checkpoint, random_model, small_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with tokenizer files, and the id of its first special token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made, size = build_tokenizer()
    save_tokenizer_files(made, folder, 64)
    return folder, size


def _run(folder: Path, first: int, *, scorer: bool = True) -> Path:
    """An olmo folder whose special tokens begin at the id."""
    values = small_config(**{"text_config.vocab_size": first})
    for key, value in list(values.items()):
        if key.endswith("_id") and isinstance(value, int):
            values[key] = value - 512 + first
    state = olmo_state(random_model(values, scorer=scorer))
    config = olmo_config(values, mm_preprocessor__use_frame_special_tokens=False)
    return write_sharded(folder, state, config)


def test_a_tokenizer_from_elsewhere_completes_an_olmo_folder(
    tmp_path: Path, tokenizer: tuple[Path, int]
):
    files, first = tokenizer
    (files / "processor_config.json").write_text('{"use_frame_special_tokens": true}')
    checkpoint = open_checkpoint(_run(tmp_path / "step1", first), tokenizer=files)
    with checkpoint.config_folder() as folder:
        builder = PromptBuilder.from_folder(folder, checkpoint.config)
        assert {path.name for path in folder.iterdir()} == set(checkpoint.config_files)
    # What the run says about its processors wins over the folder's.
    assert not builder.layout.frame_tokens
    assert str((files / "tokenizer.json").resolve()) in checkpoint.stats()


def test_errors_about_files_that_were_made_name_their_source(
    tmp_path: Path, tokenizer: tuple[Path, int]
):
    checkpoint = open_checkpoint(_run(tmp_path / "step1", 500), tokenizer=tokenizer[0])
    with pytest.raises(InputError) as error, checkpoint.config_folder() as folder:
        PromptBuilder.from_folder(folder, checkpoint.config)
    assert str(tokenizer[0] / "tokenizer.json") in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, small_checkpoint: Path):
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        open_checkpoint(small_checkpoint, tokenizer=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(small_checkpoint, tokenizer=tmp_path / "gone")


def test_a_revision_is_for_the_hub(small_checkpoint: Path):
    with pytest.raises(InputError, match="leave --revision out for a folder"):
        open_checkpoint(small_checkpoint, revision="main")


def test_a_folder_that_is_no_checkpoint_says_what_would_be(tmp_path: Path):
    (tmp_path / "step1").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint") as error:
        open_checkpoint(tmp_path)
    assert "olmo training run" in str(error.value)


def test_a_bundle_is_built_from_an_olmo_folder(
    tmp_path: Path, tokenizer: tuple[Path, int], caplog: pytest.LogCaptureFixture
):
    files, first = tokenizer
    step = _run(tmp_path / "run" / "step7", first, scorer=False)
    caplog.set_level(logging.WARNING)
    output = bundle_from_checkpoint(
        tmp_path / "run", tmp_path / "bundle", BuildSpec(max_frames=4), tokenizer=files
    )
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["source"] == step.name
    assert not manifest["has_scorer"]
    assert "has no scorer: the bundle will remove nothing" in caplog.text
    assert (output / "config" / "tokenizer.json").exists()


def test_another_config_means_another_build(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")
    before = open_checkpoint(folder).stats()
    assert open_checkpoint(folder).stats() == before
    (folder / "generation_config.json").write_text("{}")
    assert open_checkpoint(folder).stats() != before


def test_equal_sizes_and_times_do_not_make_a_checkpoint_the_same(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")
    before = open_checkpoint(folder)
    stats = before.stats()
    copied = Path(shutil.copytree(folder, tmp_path / "d"))
    assert open_checkpoint(copied).stats() != stats
    # Written in place: path, inode, size and time stay, as with `cp -p`.
    file = folder / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = open_checkpoint(folder).stats()
    digests = [values[str(file.resolve())][-1] for values in (stats, now)]
    assert digests[0] != digests[1]
    with pytest.raises(InputError, match=r"was changed while it was read: .*model\.safetensors"):
        before.check_unchanged(stats)
    file.unlink()
    with pytest.raises(InputError, match="was changed while it was read"):
        before.check_unchanged(stats)


def test_samples_between_the_ends_of_a_large_file_count(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2**22))
    digest = stored._digest(file)
    with file.open("r+b") as opened:
        opened.seek(2**21)
        opened.write(b"x")
    assert stored._digest(file) != digest


def test_the_folder_one_stands_in_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(random_checkpoint(tmp_path / "c"))
    assert open_checkpoint(".").name == "c"


@pytest.mark.parametrize("name", ["./runs/step100", "../runs/step100", "runs/step100/"])
def test_what_is_written_as_a_path_is_none_on_the_hub(name: str):
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(name)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(Path(name))


def test_an_unfinished_step_names_the_newest_whole_one(tmp_path: Path, tokenizer: tuple[Path, int]):
    for number in (1, 2, 3):
        _run(tmp_path / f"step{number}", tokenizer[1])
    (tmp_path / "step3" / "model_and_optim" / ".metadata").unlink()
    with pytest.raises(InputError, match="the checkpoint was not finished") as error:
        open_checkpoint(tmp_path)
    assert f"or pass {tmp_path / 'step2'}, the newest step that is whole" in str(error.value)
