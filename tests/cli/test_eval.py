"""`eval`: what it takes, what it writes, and what it refuses before any work."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from stts_export import cli
from stts_export.cli import main
from stts_export.training import answerers, evaluation
from tests.helpers import write_video

SETTINGS = ["--questions", "2", "--clips", "1", "--level", "0", "--threads", "1"]


@pytest.fixture
def words(text_bundle: Path) -> list[str]:
    return ["eval", str(text_bundle), *SETTINGS, "--prune-ratio", "0,0.5"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    write_video(tmp_path / "x.mp4")
    entry = {"video": "x.mp4", "question": "Which?", "answer": "b", "choices": ["a", "b"]}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(entry), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_results_are_printed_and_written(
    text_bundle: Path, words: list[str], tmp_path: Path, capsys, kind: str
):
    if kind == "checkpoint":
        words[1] = str(text_bundle.with_name("text_checkpoint"))
    output = tmp_path / "new" / "r.json"
    assert main([*words, "--json", "-o", str(output)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == results
    assert [row["selector"] for row in results["rows"]] == [
        "all windows", "stts", "random", "uniform-frames", "tome", "evs",
    ]  # fmt: skip
    own = {"precision": "fp32", "backend": "onnxruntime"}
    assert results.items() >= (own if kind == "bundle" else {"device": "cpu"}).items()
    assert "cores" in results["machine"]
    again = shlex.split(results["command"])
    assert again[:3] == ["stts-export", *words[:2]]
    parsed = cli._parser().parse_args(again[1:])
    assert (parsed.questions, parsed.clips, parsed.level, parsed.prune_ratio) == (2, 1, 0, "0,0.5")


def test_without_json_there_is_a_table(words: list[str], capsys):
    assert main([*words, "--selector", "evs", "--data", "synthetic:dev"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ratio  windows")
    assert lines[2].startswith(" 0.50  evs")
    assert len(lines) == 5


def test_questions_of_a_file(text_bundle: Path, questions: Path, capsys):
    words = ["eval", str(text_bundle), "--data", str(questions), "--threads", "1", "--json"]
    assert main([*words, "--max-frames", "2", "--selector", "tome", "--prune-ratio", "0.5"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["data"] == str(questions)
    assert results["max_frames"] == 2
    assert results["questions"] == {"all": 1}
    assert [row["total_windows"] for row in results["rows"]] == [32]


def test_broken_files_are_left_out_when_allowed(text_bundle: Path, questions: Path, capsys):
    text = questions.read_text(encoding="utf-8")
    for name in ("y.mp4", "z.mp4"):
        text += "\n" + json.dumps({"video": name, "question": "Q?", "answer": "b"})
    questions.write_text(text, encoding="utf-8")
    questions.with_name("y.mp4").write_bytes(b"")
    words = ["eval", str(text_bundle), "--data", str(questions), "--threads", "1"]
    words += ["--prune-ratio", "0"]
    assert main(words) == 1
    assert "1 of 3 files is missing" in capsys.readouterr().err
    questions.with_name("z.mp4").write_bytes(b"")
    assert main([*words, "--max-broken", "1"]) == 1
    assert "2 of 3 clips cannot be read" in capsys.readouterr().err
    assert main([*words, "--max-broken", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("broken: ") == 2
    assert "y.mp4" in out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prune-ratio", "a"], "prune ratios 'a'"),
        (["--prune-ratio", "0.5,1"], "prune ratio 1.0"),
        (["--selector", "stts,rnadom"], "unknown selector 'rnadom' (did you mean 'random'?)"),
        (["--selector", ""], "unknown selector ''"),
        (["--level", "7"], "level is 7"),
        (["--data", "synthetic:train"], "split 'train'"),
        (["--questions", "0"], "questions is 0"),
        (["--questions", "500", "--clips", "1"], "1 clips have"),
        (["--layout", "jsonl"], "--layout: jsonl is of no use with synthetic"),
        (["--media", "x"], "--media: x is of no use with synthetic"),
        (["--split", "x"], "--split: x is of no use with synthetic"),
        (["--max-broken", "1"], "--max-broken: 1 is of no use with synthetic"),
        (["--data", "gone.jsonl"], "--level: 0 is of no use with gone.jsonl"),
        (["-o", "/proc/x/r.json"], "/proc/x/r.json: cannot be written"),
        (["-o", "."], ".: cannot be written"),
    ],
)
def test_bad_options_are_one_message_before_the_model_is_opened(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys, options: list[str], text: str
):
    monkeypatch.setattr(answerers, "open_answerer", None)
    assert main([*words, *options]) == 1
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("error:") == 1


def test_a_file_that_is_not_there_is_named(text_bundle: Path, capsys):
    assert main(["eval", str(text_bundle), "--data", "gone.jsonl"]) == 1
    assert "gone.jsonl: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--backend", "tensorrt"], "was not built for back end 'tensorrt'"),
        (["--plugin", "p.so"], "plugins of tensorrt only"),
        (["--max-frames", "9"], "max_frames is 9"),
        (["--revision", "main"], "revision main is for a checkpoint"),
        (["--tokenizer", "x"], "tokenizer x is for a checkpoint"),
        (["--device", "gpu"], "device 'gpu'"),
    ],
)
def test_what_the_bundle_does_not_take_is_refused(
    words: list[str], capsys, options: list[str], text: str
):
    assert main([*words, *options]) == 1
    assert text in capsys.readouterr().err
    again = cli.eval._command(cli._parser().parse_args([*words, *options]))
    assert set(options) <= set(shlex.split(again))


def test_there_has_to_be_a_model(capsys):
    assert main(["eval", "gone", *SETTINGS]) == 1
    assert "gone: no such folder" in capsys.readouterr().err


def test_results_are_printed_before_they_are_written(
    words: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"rows": []})
    monkeypatch.setattr(cli.eval, "write_json", full)
    assert main([*words, "--json", "-o", str(tmp_path / "new" / "r.json")]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"] == []
    assert "No space left on device" in printed.err
