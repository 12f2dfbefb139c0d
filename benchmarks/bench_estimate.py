"""Predicted against measured: files, memory of a build's stages, memory of a session on the CPU.

    python benchmarks/bench_estimate.py --json benchmarks/results/estimate_cpu.json
    python benchmarks/bench_estimate.py --quick        # tiny models; processes outweigh them

For every shape a random checkpoint is built and asked in processes of their own, which sample their
anonymous memory (RssAnon) every two milliseconds; files that are mapped can be dropped by the
system and do not count. Nothing is kept. See README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.timing import machine
from stts_export.calibration.recipe import Recipe
from stts_export.config import ModelConfig
from stts_export.estimate import Estimate, estimate
from stts_export.estimate_report import estimate_json
from stts_export.files import write_json
from stts_export.limits import kept_windows
from stts_export.sizes import graph_bytes
from stts_export.training.config import ModelShape, model_json
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files

_SAMPLE_SECONDS = 0.002
_NEW_TOKENS = 4
_RATIO = 0.0
"""Nothing is removed: frames then fill the calls of vision_upper, which estimates are for."""
LIMIT = 0.15
"""How far an estimate may be off."""


@dataclass(frozen=True)
class Case:
    """A model and what it is asked."""

    name: str
    shape: ModelShape
    vocab_size: int
    precision: str
    """Name of a recipe."""
    frames: int
    text_tokens: int


def _tower(width: int, heads: int, mlp: int, blocks: int, side: int) -> dict[str, Any]:
    return {
        "image_size": 14 * side, "patch_size": 14, "vision_width": width, "vision_heads": heads,
        "vision_mlp": mlp, "vision_blocks": blocks, "prune_at": 2, "taps": (blocks - 1, blocks - 2),
        "connector_mlp": 2 * width,
    }  # fmt: skip


def _decoder(width: int, heads: int, kv_heads: int, mlp: int, layers: int) -> dict[str, Any]:
    return {
        "text_width": width, "text_heads": heads, "text_kv_heads": kv_heads, "text_mlp": mlp,
        "text_layers": layers,
    }  # fmt: skip


_TOKENIZER = build_tokenizer()
"""Of quantised models, which are calibrated with questions; a checkpoint with its size has it."""
_NARROW = ModelShape(**_tower(384, 6, 1536, 8, 27), **_decoder(1024, 16, 4, 3072, 6))
_REAL_TOWER = ModelShape(**_tower(1152, 16, 4304, 7, 27), **_decoder(768, 6, 2, 2048, 3))
_SMALL_GRID = ModelShape(**_tower(768, 12, 3072, 8, 18), **_decoder(1536, 12, 4, 4608, 4))
CASES = (
    Case("narrow", _NARROW, 32_000, "fp32", 16, 1000),
    Case("narrow, half", _NARROW, 32_000, "fp16", 16, 1000),
    Case("narrow, int8", _NARROW, _TOKENIZER[1], "int8", 16, 1000),
    Case("narrow, int4", _NARROW, _TOKENIZER[1], "int4", 16, 1000),
    Case("narrow, cpu", _NARROW, _TOKENIZER[1], "cpu", 16, 1000),
    Case("real tower", _REAL_TOWER, 8_000, "fp32", 12, 500),
    Case("small grid", _SMALL_GRID, 50_000, "fp32", 32, 500),
)
_TINY = ModelShape(**_tower(32, 2, 64, 6, 9), **_decoder(64, 4, 2, 128, 2))
QUICK = (Case("tiny", _TINY, 500, "fp32", 4, 20),)


def values(case: Case) -> dict[str, Any]:
    """The model's `config.json`."""
    made = model_json(case.shape, case.vocab_size, case.frames, _RATIO)
    made["text_config"]["max_position_embeddings"] = 16384
    return made


def predict(case: Case) -> Estimate:
    """What `estimate` says; of a sequence of exactly the tokens that will be there."""
    config = ModelConfig.from_dict(values(case), has_scorer=True)
    return estimate(
        config,
        precision=case.precision,
        max_frames=case.frames,
        max_tokens=sequence(case, config),
        min_prune_ratio=_RATIO,
    )


def sequence(case: Case, config: ModelConfig) -> int:
    """Tokens of the prompt after removal and of the answer."""
    kept = kept_windows(config, case.frames, _RATIO)
    return kept + 3 * case.frames + case.text_tokens + _NEW_TOKENS


# --- In a process of its own --------------------------------------------------------------------


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """Highest anonymous memory of this process since it was entered, or last taken."""

    def __init__(self) -> None:
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, _anonymous())

    def take(self) -> int:
        """Return the highest and begin anew."""
        highest = max(self._highest, _anonymous())
        self._highest = 0
        return highest


def measure_build(case: Case, folder: Path) -> dict[str, Any]:
    """Build a bundle of random weights; peak by stage, and sizes of its files."""
    import torch

    from stts_export.build import BuildSpec, bundle_from_checkpoint
    from stts_export.checkpoint import save_checkpoint
    from stts_export.model.vlm import SttsModel

    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not checkpoint.is_dir():
        torch.manual_seed(0)
        config = ModelConfig.from_dict(values(case), has_scorer=True)
        model = SttsModel(config).eval()
        if case.vocab_size == _TOKENIZER[1]:
            model = model.bfloat16()  # fp32 weights would be mapped, and not count
        save_checkpoint(model, checkpoint)
        if case.vocab_size == _TOKENIZER[1]:
            save_tokenizer_files(_TOKENIZER[0], checkpoint, max_frames=case.frames)
        return {}
    stages: dict[str, int] = {}
    names: list[str] = []
    with Peak() as peak:

        def on_stage(stage: str, _number: int, _total: int) -> None:
            taken = peak.take()
            if names:
                stages[names[-1]] = taken
            names.append(stage.partition(":")[0])

        spec = BuildSpec(precision=case.precision, max_frames=case.frames)
        # Random weights pass no gate.
        bundle_from_checkpoint(checkpoint, bundle, spec, on_stage=on_stage, force=True)
        stages[names[-1]] = peak.take()
    graphs = bundle / "onnx"
    files = {
        str(file.relative_to(graphs)): file.stat().st_size
        for file in sorted(graphs.rglob("*"))
        if file.is_file()
    }
    return {"stages": stages, "files": files}


def measure_session(case: Case, folder: Path) -> dict[str, Any]:
    """Encode a clip and answer, twice; peak when opened, of encoding, of the answer."""
    import numpy as np

    from stts_export import Session

    rng = np.random.default_rng(0)
    with Peak() as peak, Session.open(folder / "bundle", threads=2) as session:
        opened = peak.take()
        vision, tokens = session.config.vision, session.config.tokens
        frames = rng.integers(0, 256, (case.frames, *vision.image_size, 3), dtype=np.uint8)
        ids: list[int] = []
        for _ in range(case.frames):
            ids += [1, tokens.frame_start, *[tokens.im_patch] * vision.windows, tokens.frame_end]
        ids += rng.integers(case.vocab_size, size=case.text_tokens).tolist()
        encoded = answered = 0
        for _ in range(2):  # the arena grows once more when a shape comes again
            clip = session.encode(frames, _RATIO)
            encoded = max(encoded, peak.take())
            session.generate(clip, ids, _NEW_TOKENS)
            answered = max(answered, peak.take())
        return {"opened": opened, "encoded": encoded, "answered": answered}


# --- Both sides ---------------------------------------------------------------------------------


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case and compare it with what was predicted."""
    planned = predict(case)
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        step = [sys.executable, __file__, *(["--quick"] if args.quick else [])]
        step += ["--case", case.name, "--folder", temporary]
        _child([*step, "--measure", "build"])  # writes the checkpoint
        built = _child([*step, "--measure", "build"])
        asked = _child([*step, "--measure", "session"])
    rows = list(_rows(case, planned, built, asked))
    settings = estimate_json(planned)["settings"]
    return {"case": case.name, "settings": settings, "tokens": planned.tokens,
            "shape": asdict(case.shape), "vocab_size": case.vocab_size, "rows": rows}  # fmt: skip


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _rows(
    case: Case, planned: Estimate, built: dict[str, Any], asked: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    config = ModelConfig.from_dict(values(case), has_scorer=True)
    recipe = Recipe.load(case.precision)
    sizes = graph_bytes(config, recipe.base, rules=recipe.plan(config))
    for folder in dict.fromkeys(file.partition("/")[0] for file in sizes):
        yield _row("file", folder, *(
            sum(size for file, size in side.items() if file.startswith(f"{folder}/"))
            for side in (sizes, built["files"])
        ))  # fmt: skip
    for stage in planned.stages:
        name = stage.name.partition(":")[0]
        yield _row("build", name, stage.memory, built["stages"][name])
    opened = [part for part in planned.parts if part.when in ("always", "open")]
    yield _row("session", "opened", sum(part.bytes for part in opened), asked["opened"])
    for when, measured in (("encode", "encoded"), ("answer", "answered")):
        held = sum(part.bytes for part in planned.parts if part.when in ("always", "called", when))
        yield _row("session", measured, held, asked[measured])


def _row(kind: str, name: str, predicted: int, measured: int) -> dict[str, Any]:
    return {"kind": kind, "name": name, "predicted": predicted, "measured": measured,
            "off": predicted / measured - 1 if measured else 0.0}  # fmt: skip


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure every case and return what `--json` writes."""
    return {
        "benchmark": "bench_estimate",
        "command": command,
        "quick": args.quick,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "limit": LIMIT,
        "cases": [run_case(case, args) for case in _cases(args) if args.only in (None, case.name)],
    }


def _cases(args: argparse.Namespace) -> tuple[Case, ...]:
    return QUICK if args.quick else CASES


def render(results: dict[str, Any]) -> str:
    """Format results as a table."""
    host = results["machine"]
    lines = [f"{host['cpu']}, {host['cores']} cores, load {host['load_average'][0]}; "
             f"{results['date']}"]  # fmt: skip
    for case in results["cases"]:
        settings = case["settings"]
        lines.append(
            f"{case['case']}: {settings['precision']}, {settings['max_frames']} frames, "
            f"{case['tokens']} tokens"
        )
        lines += [
            f"  {row['kind']:8} {row['name']:15} {row['predicted'] / 1e6:9.1f} MB predicted  "
            f"{row['measured'] / 1e6:9.1f} MB measured  {100 * row['off']:+6.1f} %"
            for row in case["rows"]
        ]
    return "\n".join(lines)


def within_limit(results: dict[str, Any]) -> bool:
    """Whether every estimate of memory and file size is within `LIMIT`."""
    rows = [row for case in results["cases"] for row in case["rows"]]
    large = [row for row in rows if row["measured"] > 1e6]
    return all(abs(row["off"]) <= LIMIT for row in large)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code, 1 when an estimate is too far off."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Estimates against measurements.")
    parser.add_argument("--quick", action="store_true", help="a tiny model; always exit code 0")
    parser.add_argument("--only", help="one case, by name")
    parser.add_argument("--scratch", type=Path, help="where checkpoints and bundles are written")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=("build", "session"), help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.measure:
        case = next(case for case in _cases(args) if case.name == args.case)
        measure = measure_build if args.measure == "build" else measure_session
        print(json.dumps(measure(case, args.folder)))
        return 0
    results = run(args, shlex.join(["python", "benchmarks/bench_estimate.py", *given]))
    print(render(results))
    if args.json:
        write_json(args.json, results)
    return 0 if args.quick or within_limit(results) else 1


if __name__ == "__main__":
    sys.exit(main())
