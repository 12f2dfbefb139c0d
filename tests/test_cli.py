"""The command line: exit codes, what goes to which stream, and help for every verb."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from stts_export import __version__, progress
from stts_export.cli import main
from stts_export.cli.common import size_in_bytes
from stts_export.errors import InputError
from stts_export.runtime import overlay, vision
from stts_export.runtime.session import Session
from stts_export.runtime.writing import png_bytes
from tests.helpers import prompt_ids, random_frames
from tests.standins.fixtures import install_cuda

VERBS = ("build", "run", "watch", "inspect", "verify", "train", "eval")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of H.264: five samples at 2 per second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in random_frames(16, (64, 96)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def ids_file(tmp_path: Path, small_bundle: Path) -> Path:
    with Session.open(small_bundle, threads=1) as session:
        ids = prompt_ids(session.config, 5)
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ids))
    return path


def test_run_prints_one_json_object(small_bundle: Path, video: Path, ids_file: Path, capsys):
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file), "--json"]
    assert main([*arguments, "--prune-ratio", "0.5", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert {
        "text", "token_ids", "frames", "kept_windows", "total_windows", "prune_ratio", "timings"
    } <= set(values)  # fmt: skip
    assert (values["frames"], values["kept_windows"], values["total_windows"]) == (5, 15, 30)
    assert len(values["token_ids"]) == 3
    assert "read" in values["timings"]


def test_run_for_people(small_bundle: Path, video: Path, ids_file: Path, tmp_path: Path, capsys):
    overlay = tmp_path / "out.mp4"
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--overlay", str(overlay), "--max-new-tokens", "2"]) == 0
    text = capsys.readouterr().out
    assert "kept 15 of 30 windows in 5 frames (prune ratio 0.5)" in text
    assert "vision_lower" in text
    with av.open(str(overlay)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 5
    assert overlay.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_ratio_zero_says_that_nothing_was_removed(
    small_bundle: Path, video: Path, ids_file: Path, capsys
):
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--prune-ratio", "0"]) == 0
    assert "nothing was removed: the prune ratio is 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prune-ratio", "1"], "0 <= ratio < 1"),
        (["--max-frames", "65"], "up to 64"),
        (["--max-frames", "0"], "max_frames"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--overlay", "out.gif"], ".mp4 or .png"),
        (["--overlay", "no/such/folder/out.mp4"], "existing folder"),
        (["--backend", "openvino"], "onnxruntime"),
        (["--threads", "0"], "threads"),
    ],
)
def test_bad_options_of_run(
    small_bundle: Path, video: Path, ids_file: Path, capsys, options: list[str], text: str
):
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file)]
    assert main([*arguments, *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.count("error:") == 1


def test_bad_files_of_run(
    small_bundle: Path, text_bundle: Path, video: Path, tmp_path: Path, capsys
):
    broken = tmp_path / "ids.json"
    broken.write_text('["a"]')
    cases = [
        ([str(tmp_path), str(video), "-p", "x"], "is not a bundle"),
        ([str(text_bundle), str(tmp_path / "no.mp4"), "-p", "x"], "no.mp4"),
        ([str(text_bundle), str(broken), "-p", "x"], "ids.json"),
        ([str(small_bundle), str(video), "--prompt-ids", str(broken)], "array of integers"),
        ([str(small_bundle), str(video), "-p", "What?"], "without a tokenizer"),
    ]
    for arguments, text in cases:
        assert main(["run", *arguments]) == 1
        printed = capsys.readouterr()
        assert text in printed.err
        assert printed.out == ""


def test_a_truncated_video_is_refused(text_bundle: Path, video: Path, tmp_path: Path, capsys):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert main(["run", str(text_bundle), str(cut), "-p", "x"]) == 1
    assert "cut.mp4" in capsys.readouterr().err


def test_an_empty_question_is_refused(text_bundle: Path, video: Path, capsys):
    for prompt in ("", "  \n"):
        assert main(["run", str(text_bundle), str(video), "-p", prompt]) == 1
        assert "empty" in capsys.readouterr().err


def test_a_question_is_answered_in_text(text_bundle: Path, video: Path, capsys):
    bundle = str(text_bundle)
    arguments = ["run", bundle, str(video), "-p", "What colour is the square?"]
    assert main([*arguments, "--json", "--max-new-tokens", "4"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert isinstance(values["text"], str)
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith(values["text"] + "\n")


def test_a_prompt_is_refused_before_the_video_is_encoded(
    small_bundle: Path, video: Path, ids_file: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vision, "encode", None)
    arguments = ["run", str(small_bundle), str(video)]
    assert main([*arguments, "-p", "What?"]) == 1
    assert "without a tokenizer" in capsys.readouterr().err
    assert main([*arguments, "--prompt-ids", str(ids_file), "--max-frames", "3"]) == 1
    assert "30 window tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "output"),
    [("my.mp4", "my.mp4"), ("my.png", "my.png"), ("my.png", "my.mp4"), ("my.mp4", "link.mp4")],
)
def test_the_input_is_never_written_over(
    small_bundle: Path,
    video: Path,
    ids_file: Path,
    tmp_path: Path,
    capsys,
    source: str,
    output: str,
):
    path = tmp_path / source
    if path.suffix == ".png":
        path.write_bytes(png_bytes(np.zeros((40, 60, 3), np.uint8)))
    else:
        shutil.copy(video, path)
    (tmp_path / "link.mp4").symlink_to(path)
    before = path.read_bytes()
    arguments = ["run", str(small_bundle), str(path), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--overlay", str(tmp_path / output)]) == 1
    printed = capsys.readouterr()
    assert "would be overwritten" in printed.err
    assert printed.out == ""
    assert path.read_bytes() == before


def test_an_older_overlay_is_replaced(
    small_bundle: Path, video: Path, ids_file: Path, tmp_path: Path, capsys
):
    output = tmp_path / "out.png"
    output.write_bytes(b"older")
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file), "--json"]
    assert main([*arguments, "--overlay", str(output), "--max-new-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["overlay"] == [str(output)]
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_overlay_that_fails_does_not_cost_the_answer(
    small_bundle: Path, video: Path, ids_file: Path, tmp_path: Path, capsys,
    monkeypatch: pytest.MonkeyPatch, options: list[str],
):  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise InputError("cannot be written: no space", where="out.png")

    monkeypatch.setattr(overlay, "write_contact_sheet", full)
    output = tmp_path / "out.mp4"
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file), *options]
    assert main([*arguments, "--overlay", str(output), "--max-new-tokens", "2"]) == 1
    printed = capsys.readouterr()
    assert "no space" in printed.err
    if options:
        values = json.loads(printed.out)
        assert len(values["token_ids"]) == 2
        assert values["overlay"] == [str(output)]
    else:
        assert "kept 15 of 30 windows" in printed.out


def test_the_sheet_beside_the_video_is_checked_first(
    small_bundle: Path, video: Path, ids_file: Path, tmp_path: Path, capsys
):
    (tmp_path / "out.png").mkdir()
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--overlay", str(tmp_path / "out.mp4")]) == 1
    printed = capsys.readouterr()
    assert "out.png: cannot be written" in printed.err
    assert printed.out == ""


def test_every_stage_has_a_bar_that_ends_before_the_answer(
    small_bundle: Path, video: Path, ids_file: Path, tmp_path: Path, capsys,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["run", str(small_bundle), str(video), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--overlay", str(tmp_path / "o.mp4"), "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().err.split("\n")
    assert [line.split("] ")[-1].split(":")[0] for line in lines[:-1]] == [
        "read", "vision_lower", "vision_upper", "decode", "overlay"
    ]  # fmt: skip
    assert lines[-1] == ""


def test_ids_nested_too_deep(small_bundle: Path, video: Path, tmp_path: Path, capsys):
    path = tmp_path / "ids.json"
    path.write_text("[" * 100_000)
    assert main(["run", str(small_bundle), str(video), "--prompt-ids", str(path)]) == 1
    assert "ids.json: cannot be read" in capsys.readouterr().err


def test_inspect(small_bundle: Path, capsys):
    assert main(["inspect", str(small_bundle)]) == 0
    text = capsys.readouterr().out
    assert "2x3 windows" in text
    assert "scores float32(frames, 6)" in text
    assert main(["inspect", str(small_bundle), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["graphs"]["vision_upper"]["inputs"][1]["dtype"] == "int32"
    assert values["limits"]["max_frames"] == 64


def test_build_and_its_errors(tmp_path: Path, small_checkpoint: Path, capsys):
    output = tmp_path / "bundle"
    arguments = ["build", str(small_checkpoint), "-o", str(output)]
    assert main([*arguments, "--precision", "int7"]) == 1
    assert "did you mean 'int8'" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none"), "-o", str(output)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "--max-frames", "9"]) == 0
    printed = capsys.readouterr()
    assert "MB, built in" in printed.out
    assert "takes up to 9 frames and 8192 tokens" in printed.out
    assert "vision_lower" in printed.err
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--target", "sm89"], "target sm89 is of no use to onnxruntime"),
        (["--backend", "tensorrt-rtx", "--target", "sm89,sm87"], "target 'sm87'"),
        (["--backend", "tensorrt-rtx"], "pass --target"),
        (["--backend", "tensorrt-rtx", "--memory-limit", "4T"], "4G or 512M"),
        (["--backend", "tensorrt-rtx", "--memory-limit", "-1"], "4G or 512M"),
        (["--backend", "tensorrt-rtx", "--memory-limit", "nan"], "4G or 512M"),
        (["--backend", "tensorrt-rtx", "--memory-limit", "99999999999"], "allowed: up to 9223372"),
        (["--backend", "tensorrt-rtx", "--plugin", "x.so"], "plugin x.so is of no use"),
        ([], "nothing to build: a bundle runs on ONNX Runtime as it is"),
    ],
)
def test_bad_options_of_building_from_a_bundle(
    small_bundle: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch,
    options: list[str], text: str,
):  # fmt: skip
    install_cuda(monkeypatch, driver=0)
    assert main(["build", str(small_bundle), "-o", str(tmp_path / "out"), *options]) == 1
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.err.count("error:") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("4", 4 << 30), ("0.5g", 1 << 29), ("512M", 512 << 20), ("1K", 1024)]
)
def test_sizes_of_memory(text: str, size: int):
    assert size_in_bytes(text, "--memory-limit") == size


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("torch.nn", "pip install 'stts-export[train]'"),
        ("onnxruntime", "pip install 'stts-export[cpu]'"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    capsys, monkeypatch: pytest.MonkeyPatch, name: str, fix: str
):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("stts_export.training.loop.train", missing)
    assert main(["train", "x.yaml"]) == 4
    printed = capsys.readouterr().err
    assert "train: needs the package" in printed
    assert fix in printed


def test_other_import_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise ImportError("cannot import name 'a' from 'b'", name="b")

    monkeypatch.setattr("stts_export.training.loop.train", broken)
    with pytest.raises(ImportError, match="cannot import"):
        main(["train", "x.yaml"])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["build", "x"]])
def test_usage_errors_exit_with_2(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([verb, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: stts-export {verb}" in capsys.readouterr().out


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in VERBS)


def test_the_installed_command_starts():
    command = Path(sys.executable).with_name("stts-export")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"stts-export {__version__}\n"
