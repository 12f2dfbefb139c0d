"""Build a bundle of a model of the released size, and watch time, memory and disk from outside.

    python benchmarks/full_size.py --json benchmarks/results/full_size_4b.json
    python benchmarks/full_size.py --shape tiny        # a smoke run; its numbers mean nothing

The checkpoint has random weights, and is written first. Each step runs in a process of its own,
whose memory is sampled by this one. See README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.random_checkpoint import (
    SHAPES,
    checkpoint_bytes,
    config_json,
    tied,
    write_checkpoint,
)
from benchmarks.harness.timing import machine
from benchmarks.harness.watched import watched
from stts_export.errors import SttsError
from stts_export.files import readable_size, write_json
from stts_export.machine import available_memory

LIMIT = {"of_weights": 1.3, "bytes": 10**9}
"""Anonymous memory that a build may need: so often the weights of the largest graph, and this."""
_FRAMES, _TOKENS, _PRUNE_RATIO = 4, 4, 0.5
_PROMPT = 24  # ids of text around the frames
_ROOM = 8 * 10**9
"""Memory that the first session takes to be free: it then has no copies of the weights."""


def run(args: argparse.Namespace, folder: Path, command: str) -> dict[str, Any]:
    """Write the checkpoint, build the bundle, let it answer; returns what `--json` writes."""
    values = config_json(args.shape)
    size = checkpoint_bytes(values)
    _check_space(folder, size)
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    steps = {"checkpoint": _own("--write", args.shape, checkpoint)}
    build = ["build", str(checkpoint), "-o", str(bundle), "--precision", "fp16"]
    steps["build"] = _watched("-m", "stts_export.cli", *build)
    if not args.keep:
        shutil.rmtree(checkpoint)
    answers = {
        "answer": _own("--answer", bundle),
        "answer_with_room": _own("--answer", bundle, "--room", "all"),
    }
    for step in answers.values():
        step.update(json.loads(step.pop("output")))
    files = {
        str(path.relative_to(bundle)): path.stat().st_size
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }
    largest = max(size for name, size in files.items() if name.endswith(".data"))
    for step in steps.values():
        del step["output"]
    return {
        "benchmark": "full_size",
        "command": command,
        "shape": args.shape,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {**machine(), "memory": _memory(), "torch": version("torch")},
        "settings": {
            "precision": "fp16", "frames": _FRAMES, "tokens": _TOKENS, "ratio": _PRUNE_RATIO,
        },
        "checkpoint_bytes": size,
        "bundle_bytes": sum(files.values()),
        "files": files,
        "limit": int(largest * LIMIT["of_weights"] + LIMIT["bytes"]),
        "steps": steps,
        **answers,
    }  # fmt: skip


def _check_space(folder: Path, size: int) -> None:
    """Say what disk is needed: the checkpoint and a bundle, which is smaller."""
    needed = 2 * size + 10**9
    free = shutil.disk_usage(folder).free
    print(
        f"checkpoint {readable_size(size)}, with the bundle {readable_size(needed)} in {folder}; "
        f"{readable_size(free)} free",
        file=sys.stderr,
        flush=True,
    )
    if free < needed:
        raise SttsError(
            f"{readable_size(free)} free",
            where=str(folder),
            allowed=f"{readable_size(needed)}",
            fix="choose another disk with --folder, or --shape tiny",
        )


def _own(*words: str | Path) -> dict[str, Any]:
    """Run a step of this file."""
    return _watched(__file__, *words)


def _watched(*words: str | Path) -> dict[str, Any]:
    return watched([sys.executable, *map(str, words)])


def answer(bundle: Path, room: int | None) -> dict[str, Any]:
    """Open the bundle on ONNX Runtime and answer one prompt of token ids.

    Args:
        bundle: what was built.
        room: memory that the session takes to be free; all that is when None.
    """
    import numpy as np

    from stts_export import Session
    from stts_export.probe import moving_clip

    _begin("[1/3] open")
    free = available_memory() if room is None else room
    seen = patch("stts_export.engines.onnxruntime.available_memory", return_value=free)
    with seen, Session.open(bundle, "onnxruntime") as session:
        config = session.config
        rng = np.random.default_rng(0)
        tokens = config.tokens
        frame = [tokens.frame_start, *[tokens.im_patch] * config.vision.windows, tokens.frame_end]
        text = rng.integers(config.text.vocab_size, size=_PROMPT).tolist()
        _begin("[2/3] encode")
        clip = session.encode(moving_clip(_FRAMES, config.vision.image_size), _PRUNE_RATIO)
        _begin("[3/3] generate")
        said = session.generate(clip, [*(frame * _FRAMES), *text], _TOKENS)
    scores = clip.scores
    assert scores is not None
    return {
        "room": free,
        "prompt_tokens": len(text) + _FRAMES * 2 + clip.kept_windows,
        "new_tokens": len(said.token_ids),
        "scores_from_to": [float(scores[1:].min()), float(scores[1:].max())],
    }


def _begin(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def render(results: dict[str, Any]) -> str:
    """Format results as a table."""
    host = results["machine"]
    lines = [
        f"{host['cpu']}, {host['cores']} cores, {host['memory'] / 1e9:.0f} GB, load "
        f"{host['load_average'][0]}; ONNX Runtime {host['onnxruntime']}, PyTorch {host['torch']}, "
        f"{results['date']}",
        f"{results['shape']}, fp16: checkpoint {results['checkpoint_bytes'] / 1e9:.2f} GB, bundle "
        f"{results['bundle_bytes'] / 1e9:.2f} GB; anonymous memory of the build may reach "
        f"{results['limit'] / 1e9:.2f} GB",
        "",
        f"{'step':<52}  {'seconds':>7}  {'anonymous_gb':>12}  {'file_gb':>7}",
    ]
    answers = {name: results[name] for name in ("answer", "answer_with_room")}
    for name, step in {**results["steps"], **answers}.items():
        lines.append(_row(name, step))
        stages = step["stages"] if len(step["stages"]) > 1 else []
        lines += [_row(f"  {stage['stage']}", stage) for stage in stages]
    return "\n".join(lines)


def _row(name: str, step: dict[str, Any]) -> str:
    return (
        f"{name:<52}  {step['seconds']:7.0f}  {step['peak_anonymous'] / 1e9:12.2f}  "
        f"{step['peak_file'] / 1e9:7.2f}"
    )


def _memory() -> int:
    """Bytes of this machine."""
    fields = Path("/proc/meminfo").read_text(encoding="ascii").split()
    return int(fields[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code, 1 when the limit is not held."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="A build of the released size, watched.")
    parser.add_argument("--shape", choices=SHAPES, default="4b", help="sizes of the model (4b)")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle there")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--write", nargs=2, metavar=("SHAPE", "FOLDER"), help="a step of a run")
    parser.add_argument("--answer", type=Path, metavar="BUNDLE", help="a step of a run")
    parser.add_argument("--room", choices=("little", "all"), default="little", help="of --answer")
    args = parser.parse_args(given)
    if args.write:
        shape, folder = args.write
        write_checkpoint(Path(folder), config_json(shape), tied=tied(shape))
        return 0
    if args.answer:
        print(json.dumps(answer(args.answer, _ROOM if args.room == "little" else None)))
        return 0
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="full_size-", dir=args.folder))
    command = shlex.join(["python", "benchmarks/full_size.py", *given])
    try:
        results = run(args, work, command)
    except SttsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if args.keep:
            print(f"kept in {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(render(results))
    if args.json:
        write_json(args.json, results)
    return 0 if results["steps"]["build"]["peak_anonymous"] <= results["limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
