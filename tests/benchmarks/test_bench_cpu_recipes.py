"""The benchmark of recipes on a CPU runs end to end; times are never checked."""

import json

import pytest

from benchmarks import bench_cpu_recipes
from benchmarks.bench_cpu_recipes import PARTS, RECIPES
from docs import update_tables
from stts_export.calibration.layers import LARGEST
from stts_export.calibration.recipe import Recipe
from tests.helpers import random_model, small_config


def test_a_quick_run_measures_every_part_of_every_recipe(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.json"
    assert bench_cpu_recipes.main(["--quick", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert [row["recipe"] for row in results["rows"]] == list(RECIPES)
    sizes = {row["recipe"]: row["weights"] for row in results["rows"]}
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"]
    assert sizes["cpu"] < sizes["fp32"]
    for row in results["rows"]:
        assert set(row["seconds"]) == set(PARTS)
        assert all(min(one["samples"]) > 0 for one in row["seconds"].values())
        if row["recipe"] == "fp32":
            assert {one["median"] for one in row["speedup"].values()} == {1.0}
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    monkeypatch.setattr(update_tables, "CPU_RECIPES", file)
    table = update_tables.cpu_recipes_table()
    assert all(f"| `{name}` |" in table for name in RECIPES)


@pytest.mark.parametrize(("name", "form"), [("cpu", "int8"), ("int8", "int8"), ("int4", "int4")])
def test_scales_map_the_largest_weight_to_the_largest_value(name, form):
    model = random_model(small_config(**{"text_config.hidden_size": 32}))
    plan = Recipe.load(name).plan(model.config)
    layer = "language.blocks.0.ff_proj"
    made = bench_cpu_recipes.quantised(model, plan)[layer]
    weight = model.get_parameter(f"{layer}.weight").detach().abs()
    assert made.format == form
    assert made.weight_scale.shape == ((len(weight), 1) if form == "int4" else (len(weight),))
    largest = made.weight_scale.max() * LARGEST[made.format]
    assert largest == pytest.approx(float(weight.max()))
    assert (made.input_scale is None) == (form == "int4")
