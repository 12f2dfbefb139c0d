"""Recipes on a CPU at the widths of a real model: time of a tower's part, a prefill, a token.

    python benchmarks/bench_cpu_recipes.py --json benchmarks/results/cpu_recipes.json
    python benchmarks/bench_cpu_recipes.py --quick        # a tiny model; its numbers mean nothing

The demo checkpoint is too small to say what a recipe costs: most of its time is not in products.
Here weights are random, and scales map the largest weight to the largest value of a format; neither
changes the time. One thread, CPU time, all recipes in turn in one run. See README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.tables import table
from benchmarks.harness.timing import cpu_time, machine, summary
from stts_export.calibration.layers import LARGEST, LayerQuantization, Numerics
from stts_export.calibration.recipe import LayerRule, Recipe, block_of
from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.files import write_json
from stts_export.graphs.export import export_graph
from stts_export.model.vlm import SttsModel
from stts_export.runtime.decoder import Runner
from stts_export.tensors import ACTIVATION, DATA_FILE, DECODER, VISION_UPPER
from stts_export.training.config import ModelShape, model_json

RECIPES = ("fp32", "fp16", "cpu", "int8", "int4")
"""Of those that ONNX Runtime runs, one for each way in which it treats weights."""
REFERENCE = "fp32"
PARTS = ("tower", "prefill", "token")
_VOCABULARY, _CAPACITY_LEFT = 2000, 64


@dataclass(frozen=True)
class Settings:
    """What is run."""

    shape: ModelShape
    bins: int
    """Of a call of the tower's upper part."""
    prompt: int
    """Tokens of a prefill; a single token follows it."""
    repeats: int


FULL = Settings(
    ModelShape(
        image_size=378, patch_size=14, vision_width=1152, vision_heads=16, vision_mlp=4304,
        vision_blocks=6, prune_at=2, taps=(5, 4), connector_mlp=9728, text_width=2560,
        text_heads=32, text_kv_heads=8, text_mlp=9728, text_layers=2,
    ),
    bins=2,
    prompt=512,
    repeats=5,
)  # fmt: skip
"""Widths of Molmo2-4B; two blocks above the removal and two layers, as all are alike."""
QUICK = Settings(
    ModelShape(
        image_size=126, patch_size=14, vision_width=32, vision_heads=2, vision_mlp=64,
        vision_blocks=6, prune_at=2, taps=(5, 4), connector_mlp=64, text_width=64, text_heads=4,
        text_kv_heads=2, text_mlp=128, text_layers=2,
    ),
    bins=2,
    prompt=16,
    repeats=2,
)  # fmt: skip


def quantised(model: SttsModel, plan: dict[str, LayerRule]) -> dict[str, LayerQuantization]:
    """Scales of a plan's layers from their weights; of inputs for values up to 6."""
    layers = {}
    for name, rule in plan.items():
        weight = model.get_parameter(f"{name}.weight").detach().abs()
        largest = LARGEST[rule.format]
        smooth = None
        if rule.method in ("smoothquant", "awq"):
            smooth = np.ones(weight.shape[1], np.float32)
        if rule.format == "int4":
            block = block_of(weight.shape[1], rule.block)
            scale = weight.unflatten(1, (-1, block)).amax(-1) / largest
            layers[name] = LayerQuantization("int4", scale.numpy(), None, smooth, block)
        else:
            scale = weight.amax(1) / largest
            layers[name] = LayerQuantization(rule.format, scale.numpy(), 6 / largest, smooth)
    return layers


@dataclass(frozen=True)
class Opened:
    """A recipe's graphs."""

    recipe: Recipe
    runners: dict[str, Runner]
    weights: int
    """Bytes of their data files."""


def opened(model: SttsModel, name: str, folder: Path) -> Opened:
    """Export the two graphs that most of the time is spent in, and open them on one thread."""
    recipe = Recipe.load(name)
    plan = recipe.plan(model.config)
    numerics = Numerics(recipe.base, quantised(model, plan))
    files = {graph: export_graph(model, graph, numerics, folder) for graph in GRAPHS}
    converts = onnxruntime.converts_weights(recipe.base, {rule.format for rule in plan.values()})
    return Opened(
        recipe,
        {g: onnxruntime.open_graph(f, threads=1, converts=converts) for g, f in files.items()},
        sum(file.with_name(DATA_FILE).stat().st_size for file in files.values()),
    )


GRAPHS = (VISION_UPPER, DECODER)


def calls(one: Opened, config: ModelConfig, settings: Settings) -> dict[str, dict[str, Any]]:
    """Inputs of each part; every window of the tower is there, and belongs to one frame."""
    rng, dtype = np.random.default_rng(0), np.dtype(ACTIVATION[one.recipe.base])
    vision = config.vision
    patches = vision.windows * vision.patches_per_window
    hidden = rng.standard_normal((settings.bins, patches, vision.hidden_size)).astype(dtype)
    return {
        "tower": {
            "bins": hidden,
            "segment": np.zeros((settings.bins, vision.windows), np.int32),
        },
        "prefill": _tokens(config, dtype, settings.prompt, 0, settings.prompt),
        "token": _tokens(config, dtype, 1, settings.prompt, settings.prompt),
    }


def _tokens(
    config: ModelConfig, dtype: np.dtype[Any], count: int, start: int, prompt: int
) -> dict[str, NDArray[Any]]:
    text, rng = config.text, np.random.default_rng(start)
    cache = (1, text.num_kv_heads, prompt + _CAPACITY_LEFT, text.head_dim)
    return {
        "input_ids": rng.integers(0, _VOCABULARY, (1, count)),
        "features": np.zeros((1, text.hidden_size), dtype),
        "visual_group": np.full((1, count), -1, np.int32),
        "position_ids": np.arange(start, start + count)[None],
        "cache_position": np.array([start]),
        **{
            f"past_key_values.{layer}.{side}": np.zeros(cache, dtype)
            for layer in range(text.num_layers)
            for side in ("key", "value")
        },
    }


def run(settings: Settings, command: str, scratch: Path | None = None) -> dict[str, Any]:
    """Measure, and return what `--json` writes."""
    torch.manual_seed(0)
    frames = 16  # says how long a clip may be, no more
    values = model_json(settings.shape, _VOCABULARY, frames, 0.5)
    values["text_config"]["max_position_embeddings"] = 4096
    config = ModelConfig.from_dict(values, has_scorer=True)
    model = SttsModel(config).eval()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        recipes = {name: opened(model, name, Path(folder) / name) for name in RECIPES}
        inputs = {name: calls(one, config, settings) for name, one in recipes.items()}
        seconds: dict[str, dict[str, list[float]]] = {
            name: {part: [] for part in PARTS} for name in RECIPES
        }
        for turn in range(settings.repeats + 1):
            for name, one in recipes.items():
                for part in PARTS:
                    graph = VISION_UPPER if part == "tower" else DECODER
                    _, spent = cpu_time(partial(one.runners[graph], inputs[name][part]))
                    if turn:  # the first makes room
                        seconds[name][part].append(spent)
    return {
        "benchmark": "bench_cpu_recipes",
        "command": command,
        "quick": settings == QUICK,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "settings": asdict(settings),
        "rows": [
            {
                "recipe": name,
                "weights": recipes[name].weights,
                "seconds": {part: summary(seconds[name][part]) for part in PARTS},
                "speedup": {part: _speedup(seconds, name, part) for part in PARTS},
            }
            for name in RECIPES
        ],
    }


def _speedup(seconds: dict[str, dict[str, list[float]]], name: str, part: str) -> dict[str, Any]:
    """Time of the reference over a recipe's, turn by turn."""
    pairs = zip(seconds[REFERENCE][part], seconds[name][part], strict=True)
    return summary([reference / own for reference, own in pairs])


def render(results: dict[str, Any]) -> str:
    """Format results as a table."""
    host = results["machine"]
    rows = [
        [
            row["recipe"], f"{row['weights'] / 1e6:.0f}",
            *(
                f"{1e3 * row['seconds'][part]['median']:.1f}/{row['speedup'][part]['median']:.2f}x"
                for part in PARTS
            ),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    header = f"recipe MB {' '.join(f'{part},ms/speedup' for part in PARTS)}"
    lines = [f"{host['cpu']}, one thread, load {host['load_average'][0]}; {results['date']}"]
    return "\n".join([*lines, *table(header, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results")
    parser.add_argument("--scratch", type=Path, help="folder for graphs; 5 GB, the system's own")
    args = parser.parse_args(given)
    command = shlex.join(["python", "benchmarks/bench_cpu_recipes.py", *given])
    results = run(QUICK if args.quick else FULL, command, args.scratch)
    print(render(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
