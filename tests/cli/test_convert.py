"""`stts-export convert`, and the checkpoint options of `build`."""

from __future__ import annotations

from pathlib import Path

import pytest

from stts_export.bundle import MANIFEST
from stts_export.checkpoint import open_checkpoint
from stts_export.cli import main
from tests.checkpoint.olmo_folders import olmo_state, write_unsharded
from tests.helpers import random_model


def test_a_training_run_becomes_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    write_unsharded(tmp_path / "run" / "step3-unsharded", olmo_state(random_model()))
    output = tmp_path / "out"
    code = main(
        ["convert", str(tmp_path / "run"), "-o", str(output),
         "--dtype", "bfloat16", "--max-shard-size", "20K"]
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.startswith(f"{output}: 0.")
    assert "has no tokenizer.json" in caplog.text
    assert len(list(output.glob("*.safetensors"))) > 3
    assert open_checkpoint(output).has_scorer


@pytest.mark.parametrize("size", ["0", "x", "4T"])
def test_a_size_that_is_none_is_refused(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str], size: str
):
    output = str(tmp_path / "out")
    assert main(["convert", str(small_checkpoint), "-o", output, "--max-shard-size", size]) == 1
    assert "--max-shard-size: size" in capsys.readouterr().err


def test_what_is_not_there_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(tmp_path / "gone"), "-o", str(tmp_path / "out")]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["build", "convert", "verify"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_bundle: Path, verb: str
):
    arguments = [verb, "./runs/step100", "-o", str(tmp_path / "out")]
    if verb == "verify":
        arguments = [verb, str(small_bundle), "--against", "./runs/step100"]
    assert main(arguments) == 1
    assert "runs/step100: no such folder" in capsys.readouterr().err


def test_an_empty_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["convert", "", "-o", str(tmp_path / "out")])
    assert "pass a folder or a name on the hub" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--revision", "--tokenizer"])
def test_a_bundle_has_its_own_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text('{"schema_version": 3, "graphs": [], "files": {}}')
    arguments = ["build", str(tmp_path / "bundle"), "-o", str(tmp_path / "out"), option, "x"]
    assert main(arguments) == 1
    assert "leave --revision and --tokenizer out" in capsys.readouterr().err
