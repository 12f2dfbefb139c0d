from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stts_export import cli
from stts_export.errors import InputError
from stts_export.runtime.planner import n_prune
from stts_export.training.clips import TYPES, split_seed
from stts_export.training.evaluation import choose_questions, evaluate, random_keep, table


def test_five_hundred_questions_from_250_clips_are_balanced():
    chosen = choose_questions(500, 250)
    assert len({test.clip.seed for test in chosen}) == 250
    assert all(test.clip.seed >= split_seed("test", 0) for test in chosen)
    counts = Counter(question.type for test in chosen for question in test.questions)
    assert sum(counts.values()) == 500
    assert set(counts) == set(TYPES)
    assert min(counts.values()) >= 80
    assert all(len(set(test.questions)) == len(test.questions) for test in chosen)


def test_another_seed_asks_about_other_clips():
    first = {test.clip.seed for test in choose_questions(20, 10)}
    other = {test.clip.seed for test in choose_questions(20, 10, seed=10)}
    assert not first & other


def test_too_many_questions_are_refused():
    with pytest.raises(InputError, match="2 clips have"):
        choose_questions(50, 2)


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.95])
def test_random_windows_are_as_many_and_spare_the_first_frame(ratio: float):
    keep = random_keep(9, 16, ratio, np.random.default_rng(0))
    kept = 9 * 16 - n_prune(16, 9, ratio)
    assert keep.sum() == kept
    assert keep[0].sum() == min(16, kept)
    other = random_keep(9, 16, ratio, np.random.default_rng(1))
    assert not np.array_equal(keep, other)


def test_random_windows_are_uniform_over_the_later_frames():
    rng = np.random.default_rng(0)
    share = np.mean([random_keep(5, 16, 0.5, rng)[1:] for _ in range(500)], axis=0)
    assert abs(share.mean() - 0.375) < 0.01
    assert np.abs(share - share.mean()).max() < 0.1


def test_the_back_end_is_chosen_as_by_run(
    text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = evaluate(
        text_bundle, questions=1, clips=1, ratios=[0.5], selectors=["stts"], backend="onnxruntime"
    )
    assert results["backend"] == "onnxruntime"
    words = ["eval", str(text_bundle), "--questions", "1", "--clips", "1"]
    assert cli.main([*words, "--backend", "tensorrt"]) == 1
    assert "was not built for back end 'tensorrt'" in capsys.readouterr().err
    plugin = ["--plugin", str(tmp_path / "p.so")]
    assert cli.main([*words, *plugin]) == 1
    assert "plugins of tensorrt only" in capsys.readouterr().err
    again = cli.eval._command(cli._parser().parse_args([*words, *plugin, "--backend", "tensorrt"]))
    assert shlex.split(again)[-4:] == ["--backend", "tensorrt", *plugin]


def test_table_shows_every_row_and_type():
    accuracy = dict.fromkeys(TYPES, 0.5) | {"all": 0.5}
    text = table(
        {
            "rows": [{"prune_ratio": 0.5, "selector": "stts", "accuracy": accuracy}],
            "questions": dict.fromkeys(TYPES, 10) | {"all": 50},
            "chance": dict.fromkeys(TYPES, 0.25),
        }
    )
    lines = text.splitlines()
    assert [name for name in TYPES if name in lines[0]] == list(TYPES)
    assert "stts" in lines[1]
    assert lines[-1].split() == ["questions", *["10"] * len(TYPES), "50"]
