from __future__ import annotations

from pathlib import Path

import pytest

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.training.config import (
    DataSettings,
    LabelSettings,
    SourceSettings,
    TrainConfig,
    model_json,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def _read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return TrainConfig.from_file(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path):
    config = TrainConfig.from_file(path)
    values = model_json(config.model, 400, config.data.max_frames, 0.5)
    shape = ModelConfig.from_dict(values, has_scorer=config.model.scorer)
    assert (shape.vision.pruning is not None) == config.model.scorer


def test_defaults_fill_what_is_not_said(tmp_path: Path):
    assert _read(tmp_path, "output: runs/x") == TrainConfig(output="runs/x")


def test_every_value_survives_the_way_through_plain_data(tmp_path: Path):
    text = """
        output: x
        model: {taps: [4, 5]}
        optim: {steps: 700, rates: {scorer: 1}, betas: [0.5, 0]}
        data:
          sources:
            - {kind: synthetic, level_steps: [0, 5, 6]}
            - {kind: file, path: a.jsonl, weight: 3}
    """
    config = _read(tmp_path, text)
    assert config.model.taps == (4, 5)
    assert config.optim.betas == (0.5, 0.0)
    assert config.data.sources == (
        SourceSettings(level_steps=(0, 5, 6)),
        SourceSettings("file", 3.0, path="a.jsonl"),
    )
    plain = config.to_dict()
    assert plain["optim"]["steps"] == 700
    assert type(plain["optim"]["rates"]["scorer"]) is float
    assert plain["data"]["sources"][1]["path"] == "a.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "run.yaml: output is missing"),
        ("output: ''", "output is ''"),
        ("", "is None"),
        ("- 1", "a mapping"),
        ("output: [", "cannot be read as YAML"),
        ("output: x\noutput: y", "the key 'output' stands twice"),
        ("output: x\noptim:\n  steps: 300\n  steps: 400", "the key 'steps' stands twice"),
        ("output: x\nsed: 1", "unknown key 'sed' \\(did you mean 'seed'\\?\\)"),
        ("output: x\n1: 1", "unknown key 1"),
        ("output: x\noptim: {step: 1}", "optim: unknown key 'step' \\(did you mean 'steps'\\?\\)"),
        ("output: x\noptim: {rates: {visoin: 1}}", "optim: rates: unknown key 'visoin'"),
        ("output: x\nstart: {lora: {rnk: 1}}", "start: lora: unknown key 'rnk'"),
        ("output: x\ndata: {sources: [{kid: file}]}", "sources\\[0\\]: unknown key 'kid'"),
        # values of another type
        ("output: 3", "output: is 3"),
        ("output: x\nseed: one", "seed: is 'one'"),
        ("output: x\nseed: null", "seed: is None"),
        ("output: x\nseed: true", "seed: is True"),
        ("output: x\nseed: 1.5", "seed: is 1.5"),
        ("output: x\nmodel: 3", "model: is 3"),
        ("output: x\nmodel: {taps: 5}", "a list of integers"),
        ("output: x\nmodel: {taps: [5, x]}", "taps: is 'x'"),
        ("output: x\npruning: {refill: 1}", "refill: is 1\n  allowed: true or false"),
        ("output: x\noptim: {rates: {scorer: 1e-3}}", "write 1.0e-3"),
        ("output: x\noptim: {eps: .nan}", "eps: is nan"),
        ("output: x\noptim: {weight_decay: .inf}", "weight_decay: is inf"),
        ("output: x\noptim: {betas: [0.9]}", "two numbers"),
        ("output: x\ndata: {sources: 3}", "a list of sources"),
        ("output: x\ndata: {sources: []}", "one source or more"),
        # out of range
        ("output: x\nseed: -1", "seed is -1"),
        ("output: x\nseed: 50", "seed is 50\n  allowed: below 50"),
        ("output: x\nlog_every: 0", "log_every is 0"),
        ("output: x\nkeep_checkpoints: 0", "keep_checkpoints is 0"),
        ("output: x\nparallel: tensor", "ddp or fsdp"),
        ("output: x\ndevice: tpu", "auto, cpu or cuda"),
        ("output: x\nmodel: {patch_size: 0}", "patch_size is 0"),
        ("output: x\nmodel: {image_size: 100}", "a multiple of 30"),
        ("output: x\nmodel: {taps: [5, 2]}", "blocks above prune_at \\+ 1 = 2"),
        ("output: x\nmodel: {taps: [4, 3]}", "the last one"),
        ("output: x\nmodel: {vision_heads: 5}", "a divisor of 96"),
        ("output: x\nmodel: {text_kv_heads: 3}", "a divisor of text_heads"),
        ("output: x\npruning: {max_ratio: 1.0}", "0 < min_ratio <= max_ratio < 1"),
        ("output: x\npruning: {min_ratio: 0.9}", "0 < min_ratio <= max_ratio < 1"),
        ("output: x\npruning: {full_share: 1.1}", "full_share is 1.1"),
        ("output: x\npruning: {selector: best}", "stts, random, uniform-frames, tome, evs"),
        ("output: x\npruning: {similarity_coefficient: -1}", "0 or more"),
        ("output: x\ndata: {batch_size: 0}", "data.batch_size is 0"),
        ("output: x\ndata: {batch_size: 6, micro_batch: 4}", "a multiple of micro_batch = 4"),
        ("output: x\ndata: {workers: -1}", "data.workers is -1"),
        ("output: x\ndata: {sources: [{weight: 0}]}", "weight is 0"),
        ("output: x\ndata: {sources: [{level_steps: [0, 9, 3]}]}", "three ascending steps"),
        ("output: x\ndata: {sources: [{kind: hub}]}", "synthetic or file"),
        ("output: x\ndev: {clips: 0}", "dev.clips is 0"),
        ("output: x\ndev: {prune_ratio: 1.0}", "dev.prune_ratio is 1.0"),
        ("output: x\noptim: {steps: 0}", "optim.steps is 0"),
        (f"output: x\noptim: {{eps: 1{'0' * 400}}}", "a number"),
        ("output: x\nseed: 50", "others draw the same clips"),
        ("output: x\nmodel: {patch_size: 0}", "model.patch_size is 0"),
        ("output: x\ndata: {sources: [{split: train}]}", "no effect on kind: synthetic"),
        ("output: x\noptim: {gradient_clip: 0}", "gradient_clip is 0"),
        ("output: x\noptim: {final_share: 2}", "final_share is 2"),
        (
            "output: x\noptim: {rates: {language: 0, vision: 0, connector: 0, scorer: 0}}",
            "one of them above 0",
        ),
        ("output: x\nstart: {checkpoint: c, train: some}", "all, scorer, lora"),
        ("output: x\nstart: {checkpoint: c, prune_at: -2}", "start.prune_at is -2"),
        ("output: x\nstart: {checkpoint: c, train: lora, lora: {rank: 0}}", "rank is 0"),
        # contradictions
        ("output: x\nlabels: {steps: 9}\noptim: {steps: 9}", "below optim.steps = 9"),
        ("output: x\nstart: {checkpoint: c}\nmodel: {text_layers: 9}", "has a shape already"),
        ("output: x\nstart: {train: scorer}", "as the run starts from scratch"),
        ("output: x\nstart: {prune_at: 2}", "absent: start.checkpoint is"),
        ("output: x\nstart: {fresh_scorer: true}", "absent: start.checkpoint is"),
        ("output: x\nstart: {checkpoint: c, lora: {rank: 2}}", "absent: start.train is all"),
        ("output: x\ndata: {sources: [{kind: file}]}", "set for kind: file only"),
        ("output: x\ndata: {sources: [{path: a}]}", "set for kind: file only"),
        ("output: x\ndata: {sources: [{media: a}]}", "no effect on kind: synthetic"),
        ("output: x\ndata: {sources: [{allow_missing: 1}]}", "no effect on kind: synthetic"),
        (
            "output: x\ndata: {sources: [{kind: file, path: a, easier_share: 0.5}]}",
            "no effect on kind: file",
        ),
        ("output: x\ndev: {media: a}", "absent: dev.path is"),
        (
            "output: x\nlabels: {steps: 1}\ndata: {sources: [{}, {kind: file, path: a}]}",
            "only synthetic clips have it",
        ),
        ("output: x\nmodel: {scorer: false}", "pruning.full_share is 0.15\n  allowed: 1, as model"),
        (
            "output: x\nmodel: {scorer: false}\npruning: {full_share: 1}",
            "dev.prune_ratio is 0.5\n  allowed: 0, as model.scorer is false",
        ),
        (
            "output: x\nmodel: {scorer: false}\npruning: {full_share: 1}\ndev: {prune_ratio: 0}\n"
            "picture_every: 5",
            "picture_every is 5",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message) as raised:
        _read(tmp_path, text)
    assert (raised.value.where or "").startswith(str(tmp_path / "run.yaml"))


def test_sections_may_be_merged(tmp_path: Path):
    sources = "[&a {weight: 2, max_questions: 3}, {<<: *a, weight: 1}]"
    one, other = _read(tmp_path, f"output: x\ndata: {{sources: {sources}}}").data.sources
    assert (one.weight, other.weight, other.max_questions) == (2, 1, 3)


def test_a_model_without_a_scorer_is_trained_without_removal(tmp_path: Path):
    text = "output: x\nmodel: {scorer: false}\npruning: {full_share: 1}\ndev: {prune_ratio: 0}"
    assert not _read(tmp_path, text).model.scorer


def test_files_beside_synthetic_clips(tmp_path: Path):
    text = "output: x\ndata: {sources: [{}, {kind: file, path: a, layout: llava, media: m}]}"
    assert _read(tmp_path, text).data.sources[1].layout == "llava"


@pytest.mark.parametrize("make", ["missing", "folder", "binary"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, make: str):
    path = tmp_path / "none.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"no such file|cannot be read") as raised:
        TrainConfig.from_file(path)
    assert raised.value.where == str(path)


def test_sections_made_in_python_are_checked_too():
    with pytest.raises(InputError, match=r"data\.workers is -1"):
        DataSettings(workers=-1)
    with pytest.raises(InputError, match="labels"):
        TrainConfig("x", labels=LabelSettings(steps=10**6))
