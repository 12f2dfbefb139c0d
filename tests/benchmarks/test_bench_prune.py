"""The benchmark runs end to end and counts what ONNX Runtime computes; times are never checked."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import bench_prune
from benchmarks.harness import cost
from benchmarks.harness.clips import moving_clip
from benchmarks.harness.model import graphs, model_config
from stts_export.runtime import planner, vision
from stts_export.tensors import (
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    graph_file,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FRAMES = 5


@pytest.fixture(scope="module")
def config():
    return model_config(quick=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def folder(config, cache):
    return graphs(config, cache)


def count_operations(file, feeds, tmp_path):
    """Operations of the products that ONNX Runtime really ran, from the shapes in its profile."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    counted: Counter[str] = Counter()
    for event in events:
        if not event["name"].endswith("_kernel_time"):
            continue
        kind = event["args"]["op_name"]
        shapes = [next(iter(s.values())) for s in event["args"]["input_type_shape"]]
        (out,) = (next(iter(s.values())) for s in event["args"]["output_type_shape"][:1])
        if "MatMul" in kind or kind == "Gemm":
            counted["linear"] += 2 * math.prod(out) * shapes[0][-1]
        elif kind == "Attention":
            query, key = shapes[0], shapes[1]
            assert len(query) == len(key) == 4
            counted["attention"] += 4 * math.prod(query) * key[2]
        else:
            assert "Attention" not in kind
            assert "Conv" not in kind
    return cost.Cost(counted["linear"], counted["attention"])


@pytest.fixture(scope="module")
def keep(config):
    rng = np.random.default_rng(5)
    scores = bench_prune.random_scores(rng, FRAMES, config.vision.windows, 1.0)
    return planner.select(scores, planner.n_prune(config.vision.windows, FRAMES, 0.5))


def random_hidden(config, rows, windows):
    shape = (rows, windows * config.vision.patches_per_window, config.vision.hidden_size)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_lower_cost_is_what_runs(config, folder, tmp_path):
    feeds = {
        "frames": moving_clip(FRAMES, config.vision.image_size),
        "fresh": np.arange(FRAMES) == 0,
        "prev_pooled": np.zeros((1, config.vision.windows, config.vision.hidden_size), np.float32),
    }
    counted = count_operations(folder / graph_file(VISION_LOWER), feeds, tmp_path)
    assert cost.lower(config, FRAMES) == counted


def test_upper_cost_of_frames_is_what_runs(config, folder, keep, tmp_path):
    groups = [group.gather_window.shape for group in planner.group_frames(keep)]
    assert len(groups) > 1
    counted = cost.Cost()
    for m, n in groups:
        feeds = {"bins": random_hidden(config, m, n)}
        counted += count_operations(folder / graph_file(VISION_UPPER_FRAMES), feeds, tmp_path)
    assert cost.upper(config, [n for m, n in groups for _ in range(m)]) == counted


def test_upper_cost_of_bins_is_what_runs(config, folder, keep, tmp_path):
    plan = planner.pack(keep)
    feeds = {
        "bins": random_hidden(config, len(plan.segment), config.vision.windows),
        "segment": plan.segment,
    }
    counted = count_operations(folder / graph_file(VISION_UPPER), feeds, tmp_path)
    assert cost.upper(config, [config.vision.windows] * len(plan.segment)) == counted


def test_prefill_cost_is_what_runs(config, folder, keep, tmp_path):
    ids = bench_prune.prompt_ids(config, keep)
    assert np.count_nonzero(ids == config.tokens.im_patch) == keep.sum()
    text, capacity = config.text, len(ids) + 3
    session = ort.InferenceSession(folder / graph_file(DECODER))
    cache = np.zeros((1, text.num_kv_heads, capacity, text.head_dim), np.float32)
    feeds = {value.name: cache for value in session.get_inputs() if "past" in value.name}
    feeds |= {
        "input_ids": ids[None],
        "features": np.zeros((int(keep.sum()), text.hidden_size), np.float32),
        "visual_group": np.where(ids == config.tokens.im_patch, 0, -1).astype(np.int32)[None],
        "position_ids": np.arange(len(ids))[None],
        "cache_position": np.zeros(1, np.int64),
    }
    counted = count_operations(folder / graph_file(DECODER), feeds, tmp_path)
    expected = cost.prefill(config, len(ids), capacity)
    rope = counted.linear - expected.linear  # angles: a product of positions with frequencies
    assert counted.attention == expected.attention
    assert 0 <= rope <= 2 * len(ids) * text.head_dim


def test_layouts_give_the_same_features(config, folder, keep):
    opened = bench_prune.Graphs.open(config, folder)
    hidden = random_hidden(config, FRAMES, config.vision.windows)
    by_bins = bench_prune.run_bins(opened.upper_bins, hidden, planner.pack(keep), config)
    by_frames = vision.run_upper(
        opened.upper_frames, hidden, planner.group_frames(keep), int(keep.sum()), config.vision
    )
    np.testing.assert_allclose(by_bins, by_frames, atol=1e-5)


def test_random_scorer_tells_windows_apart(config, folder):
    opened = bench_prune.Graphs.open(config, folder)
    clip = moving_clip(16, config.vision.image_size)
    _, scores = vision.run_lower(opened.lower, config.vision, "fp32", clip, False)
    assert scores is not None
    assert scores.std() > 0.1
    assert len(np.unique(scores)) > 0.9 * scores.size


def test_quick_run(cache, folder, tmp_path):
    output = tmp_path / "bench.json"
    script = BENCHMARKS / "bench_prune.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--cache", cache, "--json", output],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(output.read_text(encoding="utf-8"))
    assert done.stdout == bench_prune.render(results) + "\n"
    assert results["command"].startswith("python benchmarks/bench_prune.py --quick")
    assert results["machine"]["onnxruntime"] == ort.__version__

    cases = {(row["frames"], row["prune_ratio"]): row for row in results["tower"]}
    assert set(cases) == {(n, r) for n in (2, 4) for r in (0, 0.3, 0.5, 0.7)}
    for (frames, ratio), row in cases.items():
        removed = planner.n_prune(results["model"]["vision"]["windows"], frames, ratio)
        assert row["kept_windows"] == row["total_windows"] - removed
        assert row["kept_windows"] <= row["computed_windows"] <= row["total_windows"]
        gain = row["against_ratio_0"]["tower"]
        work = sum(sum(row["gflop"][part].values()) for part in ("vision_lower", "vision_upper"))
        full = sum(
            sum(cases[frames, 0]["gflop"][part].values())
            for part in ("vision_lower", "vision_upper")
        )
        assert gain["bound"] == pytest.approx(full / work)
        assert gain["ratio_of_bound"] == pytest.approx(gain["speedup"]["median"] / gain["bound"])
        if ratio == 0:
            assert gain["speedup"]["median"] == gain["bound"] == 1
    assert [row["layout"] for row in results["layouts"]] == ["frames", "bins"]
    assert results["layouts_feature_difference"] < 1e-4
    assert {row["frames_per_call"] for row in results["chunks"]} == {1, 2}
    assert {(row["frames"], row["layout"]) for row in results["planner"]} == {
        (n, layout) for n in (8, 16) for layout in ("frames", "bins")
    }


@pytest.mark.parametrize(
    "arguments", [["--frames", "0"], ["--frames", "64"], ["--ratios", "1"], ["--repeats", "0"]]
)
def test_bad_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_prune.main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_readme_shows_the_stored_run(capsys):
    stored = BENCHMARKS / "results" / "bench_prune_cpu.json"
    bench_prune.main(["--show", str(stored)])
    shown = capsys.readouterr().out
    assert shown in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
