"""The command line: exit codes, what goes to which stream, and help for every verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from stts_export import __version__
from stts_export.cli import main
from stts_export.runtime.session import Session
from tests.helpers import prompt_ids, random_frames

VERBS = ("build", "run", "inspect", "verify", "train", "eval")


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


def test_bad_files_of_run(small_bundle: Path, video: Path, tmp_path: Path, capsys):
    broken = tmp_path / "ids.json"
    broken.write_text('["a"]')
    cases = [
        ([str(tmp_path), str(video), "-p", "x"], "is not a bundle"),
        ([str(small_bundle), str(tmp_path / "no.mp4"), "-p", "x"], "no.mp4"),
        ([str(small_bundle), str(broken), "-p", "x"], "ids.json"),
        ([str(small_bundle), str(video), "--prompt-ids", str(broken)], "array of integers"),
        ([str(small_bundle), str(video), "-p", "What?"], "without a tokenizer"),
    ]
    for arguments, text in cases:
        assert main(["run", *arguments]) == 1
        printed = capsys.readouterr()
        assert text in printed.err
        assert printed.out == ""


def test_a_truncated_video_is_refused(small_bundle: Path, video: Path, tmp_path: Path, capsys):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert main(["run", str(small_bundle), str(cut), "-p", "x"]) == 1
    assert "cut.mp4" in capsys.readouterr().err


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
    assert "fp32 or fp16" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none"), "-o", str(output)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "--max-frames", "9"]) == 0
    printed = capsys.readouterr()
    assert "MB, built in" in printed.out
    assert "vision_lower" in printed.err
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_eval_refuses_ratios_that_are_no_numbers(small_bundle: Path, capsys):
    assert main(["eval", str(small_bundle), "--prune-ratio", "a"]) == 1
    assert "prune ratios 'a'" in capsys.readouterr().err


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


def test_an_image_is_never_pruned(small_bundle: Path, tmp_path: Path, capsys):
    from stts_export.runtime.writing import png_bytes

    image = tmp_path / "picture.png"
    image.write_bytes(png_bytes(np.zeros((40, 60, 3), np.uint8)))
    with Session.open(small_bundle, threads=1) as session:
        ids = prompt_ids(session.config, 1)
    ids_file = tmp_path / "ids.json"
    ids_file.write_text(json.dumps(ids))
    arguments = ["run", str(small_bundle), str(image), "--prompt-ids", str(ids_file)]
    assert main([*arguments, "--prune-ratio", "0.5"]) == 0
    assert "images are not pruned" in capsys.readouterr().out
