from __future__ import annotations

import dataclasses
import json
import re
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stts_export.calibration.layers import (
    DECODER,
    FORMATS,
    GROUPS,
    HEAD,
    QUANTISED,
    SCORING,
    VISION,
    Format,
    layer_names,
    layers_by_group,
)
from stts_export.calibration.recipe import (
    BLOCKS,
    METHODS,
    Base,
    CalibrationNeeds,
    Gates,
    LayerRule,
    Recipe,
    block_of,
    is_recipe_of,
    recipe_file,
    recipe_names,
)
from stts_export.config import ModelConfig
from stts_export.errors import InputError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_checkpoint" / "config.json"
CONFIG = ModelConfig.from_file(DEMO, has_scorer=True)
BY_GROUP = layers_by_group(CONFIG)
GATES = Gates(15, 0.97, 0.99, 0.02, 0.05)
NAMES = (
    "bf16", "cpu", "fp16", "fp32", "fp8", "h200", "int4", "int8", "nvfp4", "orin", "rtx", "thor",
)  # fmt: skip

HEAD_LINES = "schema: 1\nname: mine\ndescription: d\nbase: fp16\n"
LIMITS = (
    "gates: {min_sqnr: 15, min_jaccard: 0.97, min_cosine: 0.99, max_kl: 0.02, "
    "max_answers_changed: 0.05}\n"
)


def _recipe(*rules: LayerRule, base: Any = "fp16") -> Recipe:
    return Recipe("mine", "d", base, layers=rules, gates=GATES)


def _plan(*rules: LayerRule, config: ModelConfig = CONFIG) -> dict[str, LayerRule]:
    return _recipe(*rules).plan(config)


def _read(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return Recipe.load(file)


# What is shipped


def test_shipped_recipes_are_found_by_name_and_by_file():
    assert recipe_names() == NAMES
    folder = ROOT / "calibration" / "recipes"  # what users pass
    for name in NAMES:
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert recipe == Recipe.load(folder / f"{name}.yaml") == Recipe.load(Path(name))
        assert recipe_file(name).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_scorer", [True, False])
def test_shipped_recipes_leave_scores_embedding_and_head_alone(name: str, has_scorer: bool):
    config = ModelConfig.from_file(DEMO, has_scorer=has_scorer)
    recipe = Recipe.load(name)
    plan = recipe.plan(config)
    groups = layers_by_group(config)
    assert not set(plan) & {*groups[SCORING], *groups[HEAD]}
    assert set(plan) <= set(layer_names(config))  # no scorer, no embedding
    assert {rule.format for rule in plan.values()} == set(recipe.formats()) - {recipe.base}
    assert bool(plan) == (name not in ("fp32", "fp16", "bf16"))


@pytest.mark.parametrize(
    ("name", "vision", "decoder"),
    [
        ("cpu", "int8", "int8"),
        ("int8", "int8", "int8"),
        ("int4", None, "int4"),
        ("fp8", "fp8", "fp8"),
        ("nvfp4", "nvfp4", "nvfp4"),
        ("orin", "int8", "int4"),
        ("thor", "fp8", "nvfp4"),
        ("h200", "fp8", "fp8"),
        ("rtx", "fp8", "int4"),
    ],
)
def test_shipped_recipes_say_what_their_names_say(name: str, vision: str | None, decoder: str):
    plan = Recipe.load(name).plan(CONFIG)
    for group, form in ((VISION, vision), (DECODER, decoder)):
        for layer in BY_GROUP[group]:
            assert (plan[layer].format if layer in plan else None) == form, layer


# Plans


def test_the_first_rule_that_matches_decides_and_base_means_no_rule():
    first = LayerRule(("language.blocks.0.*",), "fp16")  # an exemption
    second = LayerRule(("language.blocks.[12].ff_*", "language.blocks.4.ff_out"), "int8")
    third = LayerRule((DECODER,), "int4")
    plan = _plan(first, second, third)
    assert set(plan) == {name for name in BY_GROUP[DECODER] if ".0." not in name}
    assert {name for name, rule in plan.items() if rule is second} == {
        "language.blocks.1.ff_proj", "language.blocks.1.ff_out", "language.blocks.2.ff_proj",
        "language.blocks.2.ff_out", "language.blocks.4.ff_out",
    }  # fmt: skip
    assert list(plan) == [name for name in layer_names(CONFIG) if name in plan]


def test_a_group_that_a_model_lacks_matches_nothing():
    rule = LayerRule((SCORING,), "int8")
    assert set(_plan(rule)) == set(BY_GROUP[SCORING]) != set()
    without = ModelConfig.from_file(DEMO, has_scorer=False)
    assert _plan(rule, config=without) == {}


def test_a_pattern_over_all_leaves_protected_layers_out():
    assert set(_plan(LayerRule(("*",), "fp8"))) == set(layer_names(CONFIG))


@pytest.mark.parametrize("rest", [group for group in GROUPS if group != SCORING])
def test_groups_may_differ(rest: str):
    plan = _plan(LayerRule((rest,), "int8"), LayerRule(("*",), "fp8"))
    assert {name for name, rule in plan.items() if rule.format == "int8"} == set(BY_GROUP[rest])


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("decodr", "layers[1]: 'decodr' matches no layer of this model (did you mean 'decoder'?)"),
        ("vision.block.*", "did you mean 'vision.blocks.*'"),
        ("language.block.3.*", "did you mean 'language.blocks.3.*'"),
        ("vision.blocks.3.attention.wx", "did you mean 'vision.blocks.3.attention.w"),
        ("vision.blocks.9.*", "allowed: scoring, vision, connector, decoder, head, a layer such"),
        ("", "match: is ['']"),
        ("vision.embedding.projection", "'vision.embedding.projection' stays in high precision"),
        ("*embedding*", "stays in high precision: every score depends on it"),
        ("vision.scorer", "stays in high precision: a score decides which windows stay"),
        ("vision.scorer.*", "stays in high precision: a score decides which windows stay"),
        ("vision.scorer.fc1", "stays in high precision: a score decides which windows stay"),
        ("*scorer*", "stays in high precision: a score decides which windows stay"),
    ],
)
def test_what_matches_no_layer_is_named(match: str, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        _plan(LayerRule(("connector",), "int8"), LayerRule((match,), "int8"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (LayerRule(("vision.blocks.3.attention.wk",), "fp8"), LayerRule((VISION,), "int8")),
            "vision.blocks.3.attention.wq is int8 (max) and vision.blocks.3.attention.wk is fp8 "
            "(max), but both read the same tensor",
        ),
        (
            (LayerRule(("vision.connector.w1",), "int8"),),
            "vision.connector.w1 is int8 (max) and vision.connector.w3 is fp16, but both read",
        ),
        (
            (
                LayerRule(("*.wv",), "int8", "smoothquant", 0.7),
                LayerRule((SCORING, VISION), "int8", "smoothquant"),
            ),
            "wq is int8 (smoothquant 0.5) and vision.blocks.0.attention.wv is int8 (smoothquant "
            "0.7)",
        ),
        (
            (
                LayerRule(("*.pooling.wv",), "int8"),
                LayerRule(("connector",), "int8", "smoothquant"),
            ),
            "fix: let one rule match vision.connector.pooling.wk, vision.connector.pooling.wv",
        ),
    ],
)
def test_layers_with_one_input_need_one_rule(rules: tuple[LayerRule, ...], message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        _plan(*rules)


def test_layers_with_inputs_of_their_own_may_differ():
    plan = _plan(
        LayerRule(("vision.connector.pooling.wq", "*.ff_proj"), "fp8"),
        LayerRule(("connector", DECODER), "int8"),
    )
    assert plan["vision.connector.pooling.wq"].format == "fp8"
    assert plan["vision.connector.pooling.wk"].format == "int8"


def test_a_rule_behind_those_that_take_all_its_layers_is_refused():
    message = r"layers\[1\]: has no effect: earlier rules match vision.blocks.4.\* already"
    with pytest.raises(InputError, match=message):
        _plan(LayerRule((VISION,), "fp8"), LayerRule(("vision.blocks.4.*",), "int8"))


@pytest.mark.parametrize(
    ("inputs", "block", "expected"), [(128, 128, 128), (320, 128, 64), (96, 64, 32), (4096, 16, 16)]
)
def test_blocks_divide_the_inputs(inputs: int, block: int, expected: int):
    assert block_of(inputs, block) == expected


def test_a_layer_that_falls_into_small_blocks_is_named():
    with pytest.raises(InputError, match=r"vision\.x: has 1080 inputs, .* blocks of 8 at most"):
        block_of(1080, 128, "vision.x")


# Values


@pytest.mark.parametrize("form", FORMATS)
def test_methods_have_defaults_and_fit_the_format(form: Any):
    allowed = METHODS.get(form, ())
    assert LayerRule(("x",), form).method == (allowed[0] if allowed else None)
    for method in ("max", "smoothquant", "awq"):
        if method in allowed:
            assert LayerRule(("x",), form, method).quantised
        else:
            with pytest.raises(InputError, match=f"as the format is {form}"):
                LayerRule(("x",), form, method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "int8", "base": "fp32"}, "gates: is missing"),
        ({"base": "fp32", "layers": (LayerRule(("x",), "fp8"),)}, "gates: is missing"),
        ({"schema": 2}, "schema: is 2"),
        ({"base": "int8"}, "base: is 'int8'\n  allowed: fp32, fp16, bf16"),
        ({"name": "a/b"}, "name: is 'a/b'"),
        ({"name": ""}, "name: is ''"),
    ],
)
def test_recipes_made_in_python_are_checked_too(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        Recipe(**{"name": "mine", "description": "d", "base": "fp32", **changes})


@pytest.mark.parametrize("name", [entry.name for entry in dataclasses.fields(Gates)])
@pytest.mark.parametrize("value", [-0.001, float("nan"), float("inf"), 1.001])
def test_limits_have_ranges(name: str, value: float):
    if name in ("min_sqnr", "max_kl") and value == 1.001:
        assert getattr(dataclasses.replace(GATES, **{name: value}), name) == value
        return
    with pytest.raises(InputError, match=f"{name}: is {value:g}"):
        dataclasses.replace(GATES, **{name: value})


@pytest.mark.parametrize(
    "changes", [{"clips": 0}, {"held_out": 0}, {"prune_ratio": 1}, {"prune_ratio": -0.1}]
)
def test_needs_have_ranges(changes: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(changes))):
        CalibrationNeeds(**changes)
    assert CalibrationNeeds(1, 1, 0).prune_ratio == 0


# Files


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "is None\n  allowed: a mapping"),
        ("- 1", "", "is [1]"),
        ("schema: 1\nname: [", ":2", "cannot be read as YAML: "),
        ("schema: 1\n--- {}", "", "cannot be read as YAML: but found another document"),
        ("name: !!python/object:x y", "", "could not determine a constructor"),
        ("name: mine", "", "schema is missing\n  fix: add the line schema: 1"),
        ("schema: 2\nnew_key: 1", ":1: schema", "is 2\n  allowed: 1, the version"),
        ("name: x\nschema: 1.0", ":2: schema", "is 1.0\n  allowed: an integer"),
        ("schema: true", ":1: schema", "is True"),
        ("schema: 1", ": name", "is missing"),
        (HEAD_LINES + "nam: x", ":5: nam", "unknown key (did you mean 'name'?)"),
        (HEAD_LINES + "yes: x", ": True", "unknown key"),
        (HEAD_LINES + "name: x", ":5: name", "stands twice"),
        (HEAD_LINES + "gates:\n  max_kl: 1\n  max_kl: 2", ":7: gates.max_kl", "stands twice"),
        (HEAD_LINES + "calibration: {clip: 4}", ":5: calibration.clip", "did you mean 'clips'"),
        (
            HEAD_LINES + "layers:\n- match: vision\n  format: fp8\n- match: decoder\n  frmat: fp8",
            ":9: layers[1].frmat",
            "unknown key (did you mean 'format'?)\n  allowed: match, format, method, alpha, block",
        ),
        (HEAD_LINES + "layers:\n- match: vision", ":6: layers[0].format", "is missing"),
        (HEAD_LINES + LIMITS.replace("max_kl: 0.02, ", ""), ":5: gates.max_kl", "is missing"),
        (HEAD_LINES + "gates:\n\n  max_kl: 1", ":5: gates.min_sqnr", "is missing"),
        (
            f"{HEAD_LINES}layers: [{{match: vision, format: int8}}]",
            ": gates",
            "is missing\n  allowed: the limits min_sqnr, min_jaccard",
        ),
        # another type
        ("schema: 1\nname: no", ":2: name", "is False\n  allowed: a text\n  fix: YAML reads yes"),
        ("schema: 1\nname: 8", ":2: name", "is 8\n  allowed: a text\n  fix: put a text that"),
        (HEAD_LINES.replace("fp16", "off"), ":4: base", "is False"),
        (HEAD_LINES + "kv_cache: null", ":5: kv_cache", "is None\n  allowed: a text"),
        (HEAD_LINES + "layers: {match: vision}", ":5: layers", "allowed: a list"),
        (HEAD_LINES + "layers: [vision]", ":5: layers[0]", "a mapping of keys"),
        (HEAD_LINES + "layers: [{match: {a: 1}, format: fp8}]", ":5: layers[0].match", "a list of"),
        (HEAD_LINES + "layers: [{match: [on], format: fp8}]", ":5: layers[0].match[0]", "is True"),
        (HEAD_LINES + "calibration: {clips: 1.5}", ":5: calibration.clips", "an integer"),
        (HEAD_LINES + "calibration: {clips: yes}", ":5: calibration.clips", "is True"),
        (HEAD_LINES + "calibration: {prune_ratio: x}", ":5: calibration.prune_ratio", "a number"),
        (HEAD_LINES + LIMITS.replace("0.02", "2e-2"), ":5: gates.max_kl", "write 1.0e-3"),
        (HEAD_LINES + LIMITS.replace("0.02", "no"), ":5: gates.max_kl", "is False"),
        (HEAD_LINES + LIMITS.replace("0.02", "1" + "0" * 400), ":5: gates.max_kl", "a number"),
        # what YAML 1.1 takes for other numbers
        (HEAD_LINES + "calibration: {clips: 010}", ":5: calibration.clips", "is 010\n  allowed"),
        (HEAD_LINES + "calibration: {clips: 1_0}", ":5: calibration.clips", "is 1_0"),
        (HEAD_LINES + "calibration: {clips: 1:30}", ":5: calibration.clips", "is 1:30"),
        (HEAD_LINES + LIMITS.replace("0.02", ".inf"), ":5: gates.max_kl", "is .inf"),
        # not allowed
        (HEAD_LINES.replace("fp16", "fp17"), ":4: base", "is 'fp17' (did you mean 'fp16'?)"),
        (HEAD_LINES + "kv_cache: fp8", ":5: kv_cache", "allowed: base, int8"),
        (HEAD_LINES + LIMITS.replace("0.97", "97"), ":5: gates.min_jaccard", "is 97"),
        (HEAD_LINES + "calibration: {clips: 0}", ":5: calibration.clips", "1 or more"),
        *(
            (f"{HEAD_LINES}layers:\n- {{match: {rule}}}\n{LIMITS}", f":6: layers[0]{key}", message)
            for rule, key, message in [
                ("[], format: int8", ".match", "is []"),
                ("x, format: int16", ".format", "is 'int16' (did you mean 'int"),
                ("x, format: int8, method: smothquant", ".method", "did you mean 'smoothquant'"),
                ("x, format: fp8, method: smoothquant", ".method", "allowed: max, as the format"),
                ("x, format: fp16, method: max", ".method", "allowed: none, as the format is fp16"),
                ("x, format: int8, alpha: 0.4", ".alpha", "set for smoothquant only"),
                ("x, format: int8, method: smoothquant, alpha: 2", ".alpha", "allowed: 0 to 1"),
                ("x, format: int4, block: 48", ".block", "allowed: 16, 32, 64, 128"),
                ("x, format: int4, block: 256", ".block", "is 256"),
                ("x, format: int8, block: 64", ".block", "set for int4 only"),
            ]
        ),
    ],
)
def test_mistakes_are_named_with_place_and_line(
    tmp_path: Path, text: str, place: str, message: str
):
    with pytest.raises(InputError) as raised:
        _read(tmp_path, text)
    error = raised.value
    assert error.where is not None
    if place:
        assert error.where == f"{tmp_path / 'mine.yaml'}{place}"
    else:
        assert error.where.startswith(str(tmp_path / "mine.yaml"))
    assert message in str(error)


def test_short_forms_and_anchors(tmp_path: Path):
    recipe = _read(
        tmp_path,
        HEAD_LINES + "layers:\n- &a {match: vision, format: int8, method: smoothquant}\n"
        "- {<<: *a, match: [decoder, head], alpha: 1}\ncalibration: {prune_ratio: 0}\n" + LIMITS,
    )
    assert recipe.layers == (
        LayerRule((VISION,), "int8", "smoothquant", 0.5),
        LayerRule((DECODER, HEAD), "int8", "smoothquant", 1.0),
    )
    assert recipe.calibration == CalibrationNeeds(8, 8, 0.0)
    assert recipe.gates == GATES


_BOMB = "&a0 [x]\n" + "".join(f"- &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))


@pytest.mark.parametrize(
    "text", ["name: &a [*a]", f"name: {'[' * 700}{']' * 700}", f"name:\n- {_BOMB}"]
)
def test_hostile_nesting_ends(tmp_path: Path, text: str):
    with pytest.raises(InputError, match=r"mine\.yaml"):
        _read(tmp_path, f"schema: 1\n{text}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9", "there is no recipe 'int9' (did you mean 'int8'?)\n  allowed: bf16, cpu, fp16"),
        ("", "there is no recipe ''"),
        ("calibration/recipes/int8", "(did you mean 'int8'?)"),
        ("itn8.yml", "itn8.yml: no such file (did you mean 'int8'?)"),
        ("folder.yaml", "folder.yaml: cannot be read as YAML"),
        ("binary.yaml", "binary.yaml: cannot be read as YAML"),
    ],
)
def test_recipes_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=re.escape(message)):
        Recipe.load(name)


def test_a_file_needs_no_ending_and_a_shipped_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for file in ("recipe", "int8"):
        Path(file).write_text(HEAD_LINES + LIMITS, encoding="utf-8")
    assert Recipe.load("recipe").name == "mine"
    assert Recipe.load("int8").name == "int8"
    with pytest.raises(InputError, match="no recipe 'int9'"):
        recipe_file("int9")


# Round trips

_shares = st.floats(0, 1)
_positive = st.floats(0, 1e6)


@st.composite
def _rules(draw: st.DrawFn, base: Base) -> LayerRule:
    form = draw(st.sampled_from((base, "fp32", *QUANTISED)))
    method = draw(st.sampled_from(METHODS[form])) if form in QUANTISED else None
    match = draw(st.lists(st.text(string.ascii_letters + "*?[].0", min_size=1), min_size=1))
    rule = LayerRule(tuple(match), form, method)
    if method == "smoothquant":
        return dataclasses.replace(rule, alpha=draw(_shares))
    if form == "int4":
        return dataclasses.replace(rule, block=draw(st.sampled_from(BLOCKS)))
    return rule


def _of_base(base: Base) -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        description=st.text(),
        base=st.just(base),
        kv_cache=st.sampled_from(("base", "int8")),
        layers=st.lists(_rules(base), max_size=3).map(tuple),
        calibration=st.builds(
            CalibrationNeeds,
            clips=st.integers(1, 10**6),
            held_out=st.integers(1, 10**6),
            prune_ratio=st.none() | st.floats(0, 1, exclude_max=True),
        ),
        gates=st.builds(Gates, _positive, _shares, _shares, _positive, _shares),
    )


_recipes = st.sampled_from(get_args(Base)).flatmap(_of_base)


@settings(deadline=None, max_examples=60)
@given(_recipes)
def test_recipes_survive_plain_data_and_yaml(recipe: Recipe):
    values = recipe.to_dict()
    assert Recipe.from_dict(json.loads(json.dumps(values)), "here") == recipe
    with tempfile.TemporaryDirectory() as folder:
        read = _read(Path(folder), yaml.safe_dump(values, sort_keys=False))
    assert read == recipe
    assert read.digest() == recipe.digest()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_survive_plain_data(name: str):
    recipe = Recipe.load(name)
    assert Recipe.from_dict(recipe.to_dict(), "here") == recipe


def test_digests_tell_recipes_apart_and_not_how_they_are_written(tmp_path: Path):
    digests = {Recipe.load(name).digest() for name in NAMES}
    assert len(digests) == len(NAMES)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    one = _read(tmp_path, HEAD_LINES + LIMITS).digest()
    other = _read(tmp_path, "# c\n" + LIMITS.replace("15", "15.0") + HEAD_LINES).digest()
    assert one == other
    assert one == Recipe("mine", "d", "fp16", gates=Gates(15, 0.97, 0.99, 0.02, 0.05)).digest()
    changed = _read(tmp_path, HEAD_LINES + LIMITS.replace("0.05", "0.04")).digest()
    assert changed != one


def test_from_dict_names_the_place_without_lines():
    values = _recipe(LayerRule((VISION,), "int8")).to_dict()
    values["layers"][0]["methd"] = values["layers"][0].pop("method")
    message = r"meta\.json: layers\[0\]\.methd: unknown key \(did you mean 'method'\?\)"
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(values, "meta.json")


@pytest.mark.parametrize(("base", "form"), [("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_there_is_one_half_precision_in_a_recipe(base: Base, form: Format):
    rules = (LayerRule((DECODER,), form),)
    with pytest.raises(InputError, match=rf"layers\[0\]\.format: is '{form}' beside base {base}"):
        Recipe("mine", "", base, layers=rules)
    assert Recipe("mine", "", "bf16", layers=(LayerRule((DECODER,), "fp32"),)).plan(CONFIG)


def test_layers_with_one_input_have_one_size_of_blocks():
    attention = "vision.blocks.3.attention"
    rules = (
        LayerRule((f"{attention}.wq",), "int4", block=32),
        LayerRule((f"{attention}.w[kv]",), "int4", block=16),
    )
    gates = Recipe.load("int4").gates
    with pytest.raises(InputError, match=r"wq is int4 \(awq, block 32\) and .*wk is .*block 16"):
        Recipe("mine", "", "fp16", layers=rules, gates=gates).plan(CONFIG)


def test_a_bundle_s_recipe_is_known_by_name_and_by_content(tmp_path: Path):
    built = Recipe.load("int8").to_dict()
    assert is_recipe_of("int8", built)
    assert not is_recipe_of("fp8", built)
    assert not is_recipe_of(str(tmp_path / "none.yaml"), built)
    file = tmp_path / "mine.yaml"
    shutil.copyfile(recipe_file("int8"), file)
    assert is_recipe_of(str(file), built)
    file.write_text(file.read_text().replace("min_sqnr: 15", "min_sqnr: 14"))
    assert not is_recipe_of(str(file), built)
    assert is_recipe_of("mine", {**built, "name": "mine"})
