"""`run`: how tokens are chosen, streamed and reported."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stts_export import Session
from stts_export.cli import main
from stts_export.runtime import session as session_module
from stts_export.runtime.logits import Sampling
from stts_export.runtime.prompt import PromptBuilder
from tests.helpers import prompt_ids, write_video

QUESTION = "What colour is the square?"
SAMPLING = ["--temperature", "3", "--top-k", "40", "--seed", "2", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples at 2 per second."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.fixture
def ask(text_bundle: Path, video: Path) -> list[str]:
    return ["run", str(text_bundle), str(video), "-p", QUESTION, "--threads", "1"]


@pytest.fixture
def ask_ids(small_bundle: Path, video: Path, tmp_path: Path) -> list[str]:
    with Session.open(small_bundle, threads=1) as session:
        ids = prompt_ids(session.config, 3)
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ids))
    return ["run", str(small_bundle), str(video), "--prompt-ids", str(path), "--threads", "1"]


def _json(arguments: list[str], capsys) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_options_are_those_of_the_library(ask: list[str], text_bundle: Path, video: Path, capsys):
    options = [*SAMPLING, "--top-p", "0.95", "--repetition-penalty", "1.2", "--logprobs", "2"]
    values = _json([*ask, *options], capsys)
    with Session.open(text_bundle, threads=1) as session:
        answer = session.generate(
            video, QUESTION, 16, sampling=Sampling(3.0, 40, 0.95, 1.2, seed=2), logprobs=2
        )
    assert values["token_ids"] == answer.token_ids
    assert values["text"] == answer.text
    assert len(values["logprobs"]) == len(answer.token_ids)
    assert set(values["logprobs"][0]) == {"token_id", "logprob", "text", "top"}
    assert len(values["logprobs"][0]["top"]) == 2
    assert values["finish_reason"] == answer.finish_reason


def test_greedy_is_the_default(ask: list[str], capsys):
    values = _json(ask, capsys)
    assert values["logprobs"] is None
    assert _json([*ask, "--temperature", "0", "--top-p", "0.3"], capsys)["text"] == values["text"]


def test_a_stop_string_ends_the_answer(ask: list[str], capsys):
    whole = _json([*ask, *SAMPLING], capsys)["text"]
    stop = whole[len(whole) // 2 :][:3]
    values = _json([*ask, *SAMPLING, "--stop", "never", "--stop", stop], capsys)
    assert values["text"] == whole[: whole.index(stop)]
    assert values["finish_reason"] == "stop"


def test_streamed_text_is_the_text(ask: list[str], capsys):
    assert main([*ask, *SAMPLING]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert main([*ask, *SAMPLING, "--stream"]) == 0
    streamed = capsys.readouterr().out.splitlines()
    assert streamed[:-1] == plain[:-1]  # the last line has the seconds


def test_a_piece_is_shown_before_the_next_token(
    ask: list[str], capsys, monkeypatch: pytest.MonkeyPatch
):
    real, shown = Session.generate, list[str]()

    def generate(*arguments: Any, on_text: Any, **options: Any) -> Any:
        def watched(piece: str) -> None:
            on_text(piece)
            shown.append(capsys.readouterr().out)
            assert shown[-1] == piece

        return real(*arguments, on_text=watched, **options)

    monkeypatch.setattr(Session, "generate", generate)
    assert main([*ask, *SAMPLING, "--stream"]) == 0
    assert len(shown) > 1


def test_streaming_leaves_stdout_to_the_json_object(ask: list[str], capsys):
    assert main([*ask, *SAMPLING, "--stream", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text"] + "\n" == printed.err


def test_streaming_without_a_tokenizer_prints_ids(ask_ids: list[str], capsys):
    assert main([*ask_ids, "--max-new-tokens", "3", "--stream"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.split() == [
        str(token) for token in _json([*ask_ids, "--max-new-tokens", "3"], capsys)["token_ids"]
    ]


def test_logprobs_for_people(ask: list[str], ask_ids: list[str], capsys):
    assert main([*ask, "--logprobs", "2", "--max-new-tokens", "1"]) == 0
    text, line, *_ = capsys.readouterr().out.splitlines()
    assert repr(text) in line
    assert "; most likely " in line
    assert main([*ask_ids, "--logprobs", "1", "--max-new-tokens", "1"]) == 0
    token, line, *_ = capsys.readouterr().out.splitlines()
    logprob, said, *_ = line.split()
    assert said == f"{token};"
    assert line.endswith(f"{token} {float(logprob):.3f}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "1", "--top-p", "0"], "0 < top_p <= 1"),
        (["--temperature", "1", "--top-k", "-2"], "top_k is -2"),
        (["--temperature", "1", "--seed", "-2"], "seed is -2"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--top-p", "0.9"], "--top-p: 0.9 is of no use"),
        (["--top-k", "3"], "add a temperature, such as --temperature 0.7"),
        (["--seed", "3"], "--seed: 3 is of no use"),
        (["--stop", ""], "none of them empty"),
        (["--logprobs", "-1"], "an integer, 0 (none) or more"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prune-ratio", "1"], "prune ratio 1.0"),
        (["--max-frames", "0"], "max_frames is 0"),
    ],
)
def test_bad_options(
    ask: list[str], capsys, monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
):
    monkeypatch.setattr(session_module, "read_video", None)
    assert main([*ask, *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.count("error:") == 1


def test_stop_strings_need_a_tokenizer(ask_ids: list[str], capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session_module, "read_video", None)
    assert main([*ask_ids, "--stop", "x"]) == 1
    assert "stop needs text" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--stream"], ["--json"], ["--json", "--stream"]], ids=str)
def test_a_terminal_that_cannot_show_the_answer(
    ask: list[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
):
    monkeypatch.setattr(PromptBuilder, "decode", lambda *_: "caf\u00e9 \U0001f986")
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii"))
    assert main([*ask, *options, "--max-new-tokens", "1"]) == 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    shown = r"caf\u00e9 \ud83e\udd86" if "--json" in options else r"caf\xe9 \U0001f986"
    assert shown in raw.getvalue().decode("ascii")


def test_a_stream_that_is_no_file_is_left_alone(ask: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main([*ask, "--max-new-tokens", "1"]) == 0
