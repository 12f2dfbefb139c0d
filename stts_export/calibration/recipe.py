"""Recipes: which number format every group of layers has, and what the result must still do.

A recipe is a YAML file, shipped or the user's own. It names layers by group, by name or by pattern,
so one recipe serves checkpoints of any depth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from stts_export.calibration.layers import (
    FORMATS,
    GROUPS,
    NVFP4_BLOCK,
    QUANTISED,
    Format,
    input_groups,
    layer_names,
    layers_by_group,
    protected_layers,
)
from stts_export.calibration.plain_values import Source, read_section, read_value, read_yaml
from stts_export.config import ModelConfig
from stts_export.errors import InputError, did_you_mean
from stts_export.tensors import KvCache

SCHEMA = 1
"""Version of the recipe format."""

Base = Literal["fp32", "fp16", "bf16"]
Method = Literal["max", "smoothquant", "awq"]

METHODS: dict[Format, tuple[Method, ...]] = {
    "fp8": ("max",),
    "int8": ("max", "smoothquant"),
    "int4": ("awq", "max"),
    "nvfp4": ("max",),
}
"""How nvidia-modelopt finds the scales of a format; the first is the default. It smooths int8 only:
`smoothquant` of other formats is skipped there with a warning."""
ALPHA, BLOCK = 0.5, 128
"""Defaults of `LayerRule.alpha` and `LayerRule.block`."""
BLOCKS = (16, 32, 64, 128)
"""Inputs that may share a scale of int4 weights (tried: ONNX Runtime, TensorRT for RTX)."""

_FOLDER = Path(__file__).parent / "recipes"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Gates:
    """What the quantised model must still do on held-out clips, compared with fp32.

    Raises:
        InputError: a value is outside its range.
    """

    min_sqnr: float
    """dB; signal to quantisation noise at the output of every quantised layer."""
    min_jaccard: float
    """Mean over clips of |A and B| / |A or B|, A and B the kept windows."""
    min_cosine: float
    """Mean cosine similarity of the features, both given fp32's windows."""
    max_kl: float
    """nats; mean KL(fp32 || quantised) of next-token distributions."""
    max_answers_changed: float
    """Share of the held-out answers, 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("min_sqnr", "max_kl"):
            _number(self, name, math.inf)
        for name in ("min_jaccard", "min_cosine", "max_answers_changed"):
            _number(self, name, 1)


@dataclass(frozen=True)
class LayerRule:
    """The format of the layers that it matches, and how their scales are found.

    Raises:
        InputError: a value is not allowed, or has no effect with this format and method.
    """

    match: tuple[str, ...]
    """Each a group (`layers.GROUPS`), a layer's name, or a pattern of names with *, ? and [...]."""
    format: Format
    method: Method | None = None
    """One of `METHODS[format]`, the first of them if not given; None for unquantised formats."""
    alpha: float = ALPHA
    """Of smoothquant: how much of the inputs' range moves to the weights, 0 (none) to 1 (all)."""
    block: int = BLOCK
    """Of int4: most inputs that share a scale, one of `BLOCKS`; see `block_of`."""

    def __post_init__(self) -> None:
        if not self.match or not all(self.match):
            raise InputError(
                f"is {list(self.match)}", where="match", allowed="one group or layer, or more"
            )
        _choice("format", self.format, FORMATS)
        methods = METHODS.get(self.format, ())
        if self.method is None and methods:
            object.__setattr__(self, "method", methods[0])
        elif self.method is not None and self.method not in methods:
            raise InputError(
                f"is {self.method!r}{did_you_mean(str(self.method), methods)}",
                where="method",
                allowed=f"{' or '.join(methods) or 'none'}, as the format is {self.format}",
            )
        _number(self, "alpha", 1)
        if self.block not in BLOCKS:
            allowed = ", ".join(str(block) for block in BLOCKS)
            raise InputError(f"is {self.block}", where="block", allowed=allowed)
        if self.method != "smoothquant" and self.alpha != ALPHA:
            raise InputError(
                f"is {self.alpha:g}", where="alpha", allowed="set for smoothquant only"
            )
        if self.format != "int4" and self.block != BLOCK:
            raise InputError(f"is {self.block}", where="block", allowed="set for int4 only")

    @property
    def quantised(self) -> bool:
        """Whether its layers need scales."""
        return self.format in QUANTISED


@dataclass(frozen=True)
class CalibrationNeeds:
    """The clips that a recipe asks for.

    Raises:
        InputError: a value is outside its range.
    """

    clips: int = 8
    """Fewest to collect statistics of."""
    held_out: int = 8
    """Fewest for the gates; none of them is calibrated on."""
    prune_ratio: float | None = None
    """Fraction of windows removed meanwhile; None for what the checkpoint was trained with."""

    def __post_init__(self) -> None:
        for name in ("clips", "held_out"):
            if getattr(self, name) < 1:
                raise InputError(f"is {getattr(self, name)}", where=name, allowed="1 or more")
        if self.prune_ratio is not None:
            _number(self, "prune_ratio", 1)
            if self.prune_ratio == 1:
                raise InputError("is 1", where="prune_ratio", allowed="0 or more, below 1")


@dataclass(frozen=True)
class Recipe:
    """Number formats of a whole model.

    Raises:
        InputError: a value is not allowed, or gates are missing.
    """

    name: str
    description: str
    base: Base
    """Of the graphs' inputs and outputs, and of everything that no rule names."""
    kv_cache: KvCache = "base"
    layers: tuple[LayerRule, ...] = ()
    """The first rule that matches a layer decides; layers without one stay at `base`."""
    calibration: CalibrationNeeds = field(default_factory=CalibrationNeeds)
    gates: Gates | None = None
    """None only for a model that nothing of is quantised; it is then not judged."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise InputError(f"is {self.schema}", where="schema", allowed=str(SCHEMA))
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"is {self.name!r}", where="name", allowed="letters, digits, '.', '_' and '-'"
            )
        _choice("base", self.base, get_args(Base))
        _choice("kv_cache", self.kv_cache, get_args(KvCache))
        for index, rule in enumerate(self.layers):
            if rule.format not in (self.base, "fp32", *QUANTISED):
                raise InputError(
                    f"is {rule.format!r} beside base {self.base}",
                    where=f"layers[{index}].format",
                    allowed=", ".join(dict.fromkeys((self.base, "fp32", *QUANTISED))),
                    fix=f"let the base be {rule.format}, and name what stays fp32",
                )
        if self.gates is None and self.needs_scales(self.layers):
            raise InputError(
                "is missing",
                where="gates",
                allowed=f"the limits {', '.join(get_type_hints(Gates))}",
                fix="say what the result must still do; only a recipe that quantises nothing needs "
                "no limits",
            )

    @staticmethod
    def plain(base: Base) -> Recipe:
        """Return the recipe that quantises nothing; unlike the shipped one, no file is read."""
        return Recipe(base, f"{base} throughout", base)

    @staticmethod
    def load(name_or_path: str | Path) -> Recipe:
        """Return a shipped recipe, or read a YAML file.

        Args:
            name_or_path: a name such as "int8", or a file (ends in .yaml or .yml, or exists).

        Raises:
            InputError: there is no such recipe; or the file cannot be read, has an unknown or
                repeated key, lacks one, or has a value that is not allowed.
        """
        name = str(name_or_path)
        path = Path(name_or_path)
        if name in recipe_names():
            path = recipe_file(name)
        else:
            check_recipe_name(name)
        return _recipe(*_read(path))

    @staticmethod
    def from_dict(values: object, where: str) -> Recipe:
        """Build a recipe from plain values.

        Args:
            values: as `to_dict` returns them.
            where: name for error messages.

        Raises:
            InputError: as `load`.
        """
        return _recipe(values, Source(where))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they are written in YAML and JSON."""
        values = dataclasses.asdict(self)
        values["layers"] = [_rule_values(rule) for rule in self.layers]
        if self.calibration.prune_ratio is None:
            del values["calibration"]["prune_ratio"]
        if self.gates is None:
            del values["gates"]
        return values

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal: equal for equal recipes, however written."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def formats(self) -> tuple[Format, ...]:
        """Formats of the base and of the rules, in this order, each once."""
        return tuple(dict.fromkeys((self.base, *(rule.format for rule in self.layers))))

    def plan(self, config: ModelConfig) -> dict[str, LayerRule]:
        """Find the rule of every layer whose format is not the base.

        Args:
            config: of the model.

        Returns:
            Rules by layer, in the order in which the layers run.

        Raises:
            InputError: a rule names no layer of this model, or one that stays as it is; a rule
                comes too late for all that it names; or layers that read the same tensor have
                different rules.
        """
        chosen: dict[str, LayerRule] = {}
        for index, rule in enumerate(self.layers):
            where = f"recipe {self.name}: layers[{index}]"
            matched = [name for text in rule.match for name in _matching(text, config, where)]
            for name in matched:
                chosen.setdefault(name, rule)
            if matched and all(chosen[name] is not rule for name in matched):
                raise InputError(
                    f"has no effect: earlier rules match {', '.join(rule.match)} already",
                    where=where,
                    fix="move it before them, or remove it",
                )
        for group in input_groups(config):
            self._check_shared_input(group, chosen)
        return {
            name: chosen[name]
            for name in layer_names(config)
            if name in chosen and chosen[name].format != self.base
        }

    def needs_scales(self, rules: Iterable[LayerRule]) -> bool:
        """Whether a model has to be calibrated for some of the rules, or for the cache."""
        return self.kv_cache != "base" or any(rule.quantised for rule in rules)

    def _check_shared_input(self, group: tuple[str, ...], chosen: dict[str, LayerRule]) -> None:
        """Refuse layers side by side whose input would have to be quantised in several ways."""
        rest = LayerRule(("*",), self.base)
        first = chosen.get(group[0], rest)
        for name in group[1:]:
            rule = chosen.get(name, rest)
            if _kind(rule) != _kind(first):
                raise InputError(
                    f"{group[0]} is {_kind(first)} and {name} is {_kind(rule)}, but both read the "
                    "same tensor, which is quantised once",
                    where=f"recipe {self.name}",
                    fix=f"let one rule match {', '.join(group)}",
                )


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def check_recipe_name(name: str) -> None:
    """Refuse what is neither a shipped recipe nor a file, without reading it.

    Raises:
        InputError: it is neither.
    """
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml") or path.is_file()
    if not is_file and name not in recipe_names():
        raise _unknown(name)


def is_recipe_of(name_or_path: str, built: Mapping[str, Any]) -> bool:
    """Whether a bundle was built from a recipe: that of its name, or a file with its content.

    Args:
        name_or_path: see `Recipe.load`.
        built: `Manifest.recipe`.

    Raises:
        InputError: it is a file that is not a recipe.
    """
    if name_or_path == built.get("name"):
        return True
    path = Path(name_or_path)
    if name_or_path in recipe_names() or not path.is_file():
        return False
    return Recipe.load(path).digest() == Recipe.from_dict(built, "the bundle").digest()


def recipe_file(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        InputError: none has this name.
    """
    if name not in recipe_names():
        raise _unknown(name)
    return _FOLDER / f"{name}.yaml"


def block_of(inputs: int, block: int, layer: str | None = None) -> int:
    """Inputs of an int4 layer that share a scale.

    Args:
        inputs: of the layer.
        block: most that may share one, a power of two.
        layer: its name, for the message.

    Returns:
        The largest power of two up to `block` that divides `inputs`.

    Raises:
        InputError: it is below 16: scales would take more room than the weights are worth, and
            back ends have no kernels.
    """
    shared = min(block, inputs & -inputs)
    if shared < BLOCKS[0]:
        raise InputError(
            f"has {inputs} inputs, which fall into blocks of {shared} at most; int4 needs blocks "
            f"of {BLOCKS[0]} or more",
            where=layer,
            fix="give this layer another format, such as int8, by a rule before the one for int4",
        )
    return shared


def check_nvfp4(inputs: int, layer: str) -> None:
    """Refuse a layer whose inputs do not fall into blocks of nvfp4.

    Raises:
        InputError: they do not.
    """
    if inputs % NVFP4_BLOCK:
        raise InputError(
            f"has {inputs} inputs, and nvfp4 needs blocks of {NVFP4_BLOCK}",
            where=layer,
            allowed=f"a multiple of {NVFP4_BLOCK}",
            fix="give this layer another format, such as fp8, by a rule before the one for nvfp4",
        )


def _unknown(name: str) -> InputError:
    names = recipe_names()
    return InputError(
        f"there is no recipe {name!r}{did_you_mean(Path(name).stem, names)}",
        allowed=f"{', '.join(names)}, or a YAML file",
    )


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            f"is {value!r}{did_you_mean(str(value), allowed)}",
            where=name,
            allowed=", ".join(allowed),
        )


def _number(section: object, name: str, high: float) -> None:
    """Refuse values outside [0, high] and infinity; keep others as float, for equal digests."""
    value = getattr(section, name)
    if not (0 <= value <= high and value < math.inf):
        allowed = "0 or more" if high == math.inf else f"0 to {high:g}"
        raise InputError(f"is {value:g}", where=name, allowed=allowed)
    object.__setattr__(section, name, float(value))


def _kind(rule: LayerRule) -> str:
    """What must be equal for layers with the same input."""
    if rule.method is None:
        return rule.format
    if rule.format == "int4":
        return f"{rule.format} ({rule.method}, block {rule.block})"
    alpha = f" {rule.alpha:g}" if rule.method == "smoothquant" else ""
    return f"{rule.format} ({rule.method}{alpha})"


def _rule_values(rule: LayerRule) -> dict[str, Any]:
    values: dict[str, Any] = {"match": list(rule.match), "format": rule.format}
    if rule.method is not None:
        values["method"] = rule.method
    if rule.method == "smoothquant":
        values["alpha"] = rule.alpha
    if rule.format == "int4":
        values["block"] = rule.block
    return values


def _matching(text: str, config: ModelConfig, where: str) -> tuple[str, ...]:
    """Layers that a group, a name or a pattern means; none for a group that this model lacks."""
    groups = layers_by_group(config)
    if text in groups:
        return groups[text]
    names = layer_names(config)
    matched = tuple(name for name in names if fnmatchcase(name, text))
    if matched:
        return matched
    for name, reason in protected_layers(config).items():
        if fnmatchcase(name, text) or fnmatchcase(text, name) or text == name.removesuffix(".*"):
            raise InputError(
                f"{text!r} stays in high precision: {reason}",
                where=where,
                fix="remove it from the recipe",
            )
    parents = {name.rsplit(".", dots)[0] + ".*" for name in names for dots in (1, 2, 3)}
    raise InputError(
        f"{text!r} matches no layer of this model"
        f"{did_you_mean(text, (*GROUPS, *sorted(parents), *names))}",
        where=where,
        allowed=f"{', '.join(GROUPS)}, a layer such as {names[-2]}, or a pattern of names",
    )


def _read(file: Path) -> tuple[object, Source]:
    if not file.exists():
        raise InputError(
            f"no such file{did_you_mean(file.stem, recipe_names())}",
            where=str(file),
            fix=f"pass a YAML file, or a shipped recipe: {', '.join(recipe_names())}",
        )
    return read_yaml(file)


def _recipe(values: object, source: Source) -> Recipe:
    # The version comes first: a recipe of another one may differ in anything else.
    if isinstance(values, Mapping) and "schema" in values:
        schema = read_value(int, values["schema"], source, ("schema",))
        if schema != SCHEMA:
            raise InputError(
                f"is {schema}",
                where=source.place(("schema",)),
                allowed=f"{SCHEMA}, the version that this release reads",
            )
    elif isinstance(values, Mapping):
        raise InputError(
            "schema is missing", where=source.place(()), fix=f"add the line schema: {SCHEMA}"
        )
    recipe: Recipe = read_section(Recipe, values, source)
    return recipe
