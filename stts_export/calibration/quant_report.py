"""How far a quantised model is from fp32: the report that a build leaves in its bundle.

Read and drawn without PyTorch; `gates.measure` makes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import json_object, whole

GATES_FILE = "reports/quantization.json"
"""Below a bundle."""
PICTURE_FILE = "reports/quantization.png"
"""Below a bundle."""

SQNR = "sqnr"
JACCARD = "jaccard"
NEAR_THRESHOLD = "windows near the threshold"
COSINE = "cosine"
KL = "kl"
ANSWERS_CHANGED = "answers changed"
CHECKS = (SQNR, JACCARD, NEAR_THRESHOLD, COSINE, KL, ANSWERS_CHANGED)

_AT_LEAST = (SQNR, JACCARD, COSINE)
_UNITS = {SQNR: " dB", NEAR_THRESHOLD: " in score", KL: " nats"}
_ROWS, _BARS = 20, 30
"""Layers in the table and in the picture; the rest are better than these."""
_MOST_USED = 1.5
"""Where bars of checks end: beyond it a limit is missed, and by how much is written."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class LayerError:
    """Output of one linear layer, with the errors of all layers before it."""

    layer: str
    graph: str
    """It was measured in."""
    format: str
    sqnr: float
    """dB, 10 log10(sum ref^2 / sum (ref - got)^2) over all rows; inf if equal, -inf if the
    quantised output is not finite."""
    rows: int
    """Compared, of all clips together."""


@dataclass(frozen=True)
class GateCheck:
    """One limit and what was measured."""

    name: str
    """One of `CHECKS`."""
    got: float
    limit: float
    """`got` has to be at least this for SQNR, Jaccard and cosine, at most this otherwise."""
    passed: bool
    detail: str
    """The worst clip or layer; empty when there is none to name."""

    @staticmethod
    def compare(name: str, got: float, limit: float, detail: str = "") -> GateCheck:
        """Make a check of a measurement; NaN never passes."""
        passed = got >= limit if name in _AT_LEAST else got <= limit
        return GateCheck(name, float(got), float(limit), bool(passed), detail)

    @property
    def used(self) -> float:
        """How much of the allowed error was made: above 1 is a failure, NaN if not finite.

        Cosine and Jaccard count from 1, SQNR in dB.
        """
        got, limit = self.got, self.limit
        if self.name == SQNR:
            got, limit = limit, got
        elif self.name in _AT_LEAST:
            got, limit = 1 - got, 1 - limit
        if not math.isfinite(got) or math.isnan(limit):
            return math.nan
        if got <= 0:
            return 0.0
        return got / limit if limit > 0 else math.inf

    def line(self) -> str:
        """Return the check as text."""
        unit = _UNITS.get(self.name, "")
        bound = "at least" if self.name in _AT_LEAST else "at most"
        detail = f" ({self.detail})" if self.detail else ""
        mark = "ok  " if self.passed else "FAIL"
        return f"{mark} {self.name}: {self.got:.4g}{unit}, {bound} {self.limit:.4g}{unit}{detail}"


@dataclass(frozen=True)
class AnswerPair:
    """What both models said about a clip, each with the windows that it chose itself."""

    clip: str
    prompt: str
    fp32: str
    quantised: str | None
    """None if its logits were not finite."""


@dataclass(frozen=True)
class QuantReport:
    """A quantised model on held-out clips, compared with fp32."""

    recipe: str
    """Name of the recipe."""
    precision: tuple[str, ...]
    """Formats of the layers that were compared."""
    base: str
    """Format of everything else."""
    prune_ratio: float
    clips: int
    kept_windows: int
    """That fp32 kept, of all clips together."""
    total_windows: int
    measured_in: str
    """What ran the quantised model: "onnxruntime", or PyTorch that rounds as the graphs do."""
    layers: tuple[LayerError, ...]
    """Worst first."""
    checks: tuple[GateCheck, ...]
    score_error: float
    """Largest absolute difference of a window's score; 0 when nothing is scored."""
    flipped: int
    """Windows decided otherwise, of all clips together."""
    answers: tuple[AnswerPair, ...]

    @property
    def passed(self) -> bool:
        """Whether every check is within its limit."""
        return not self.missed()

    def missed(self) -> tuple[GateCheck, ...]:
        """Return the checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        An `sqnr` that is infinite (equal outputs) is None; any other number that JSON does not
        have is text: "nan", "inf" or "-inf".
        """
        values = {"passed": self.passed, **asdict(self)}
        values["score_error"] = _written(self.score_error)
        for layer in values["layers"]:
            layer["sqnr"] = None if layer["sqnr"] == math.inf else _written(layer["sqnr"])
        for check in values["checks"]:
            check["got"], check["limit"] = _written(check["got"]), _written(check["limit"])
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> QuantReport:
        """Read what `to_dict` returned.

        Args:
            values: plain values.
            where: file, for the message.

        Raises:
            InputError: something is missing, or has a value of another kind.
        """
        try:
            return _report(values)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"is no quantisation report: {reason}",
                where=where,
                fix="build the bundle again with `stts-export build`",
            ) from None

    @staticmethod
    def load(bundle: Path, precision: str) -> QuantReport:
        """Read the report of a bundle.

        Args:
            bundle: its folder.
            precision: of the bundle, for the message.

        Raises:
            InputError: it has none, or one that cannot be read.
        """
        file = bundle / GATES_FILE
        values = json_object(file)
        if not values:
            raise InputError(
                f"is {precision} and has no {GATES_FILE}: nothing in it was compared with fp32",
                where=str(bundle),
                allowed="a bundle that was built from a recipe",
                fix="stts-export build CHECKPOINT -o BUNDLE --precision int8 measures it",
            )
        return QuantReport.from_dict(values, str(file))

    def lines(self, *, verbose: bool = False) -> list[str]:
        """Return the report as text: layers, worst first, then the checks.

        Args:
            verbose: all layers, and all answers that changed.
        """
        shown = self.layers if verbose else self.layers[:_ROWS]
        lines = [
            f"{self.recipe}: {', '.join(self.precision) or 'no layer'} on {self.base}, "
            f"{self.clips} held-out clips, {self.kept_windows} of {self.total_windows} windows "
            f"kept, measured in {self.measured_in}",
        ]
        if shown:
            lines += ["", *_table(shown)]
        if len(shown) < len(self.layers):
            lines.append(f"... {len(self.layers) - len(shown)} better ones")
        lines += ["", *(check.line() for check in self.checks)]
        lines.append(
            f"largest score error {self.score_error:.2g}, {self.flipped} windows decided otherwise"
        )
        changed = [pair for pair in self.answers if pair.fp32 != pair.quantised] if verbose else []
        for pair in changed:
            lines += [f"{pair.clip}: {pair.prompt}", f"  fp32:      {pair.fp32!r}"]
            lines.append(f"  quantised: {pair.quantised!r}")
        return lines

    def write_picture(self, path: Path) -> None:
        """Draw the layers and the checks.

        Args:
            path: PNG to write; its folder is made.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # without pyplot it draws by Agg
        except ImportError as error:
            raise MissingDependencyError(
                f"a picture needs matplotlib ({error})",
                where=str(path),
                fix="pip install 'stts-export[quantize]'",
            ) from None
        bars = max(1, len(self.layers[:_BARS]))
        figure = Figure(figsize=(13, 2.2 + 0.22 * max(bars, 8)), layout="constrained")
        layers, checks = figure.subplots(1, 2, width_ratios=(1.6, 1))
        _draw_layers(layers, self)
        _draw_checks(checks, self.checks)
        figure.suptitle(
            f"{self.lines()[0]}: {'within all limits' if self.passed else 'LIMITS MISSED'}",
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            figure.savefig(partial, format="png", dpi=110)


def _table(layers: tuple[LayerError, ...]) -> list[str]:
    names, graphs, formats = (
        max(len(title), *(len(getattr(layer, title)) for layer in layers))
        for title in ("layer", "graph", "format")
    )
    head = f"{'layer':<{names}}  {'graph':<{graphs}}  {'format':<{formats}}  SQNR, dB     rows"
    return [head] + [
        f"{layer.layer:<{names}}  {layer.graph:<{graphs}}  {layer.format:<{formats}}  "
        f"{layer.sqnr:>8.1f}  {layer.rows:>7}"
        for layer in layers
    ]


def _draw_layers(axes: Any, report: QuantReport) -> None:
    shown = report.layers[:_BARS]
    limit = next((check.limit for check in report.checks if check.name == SQNR), 0.0)
    finite = [layer.sqnr for layer in shown if math.isfinite(layer.sqnr)]
    longest = max([*finite, limit, 1.0])
    lengths = [min(layer.sqnr, longest) if layer.sqnr > -math.inf else 0.0 for layer in shown]
    colours = ["tab:blue" if layer.sqnr >= limit else "tab:red" for layer in shown]
    axes.barh(range(len(shown)), lengths, color=colours)
    for place, layer in enumerate(shown):
        axes.text(max(lengths[place], 0), place, f" {layer.sqnr:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [f"{one.layer} ({one.format})" for one in shown], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"limit {limit:g} dB")
    axes.set_xlim(left=min([0.0, *lengths]), right=1.1 * longest)
    axes.set_xlabel("SQNR of the layer's output, dB")
    axes.set_title(f"worst {len(shown)} of {len(report.layers)} layers", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")


def _draw_checks(axes: Any, checks: tuple[GateCheck, ...]) -> None:
    used = [_MOST_USED if math.isnan(check.used) else check.used for check in checks]
    lengths = [min(part, _MOST_USED) for part in used]
    colours = ["tab:blue" if check.passed else "tab:red" for check in checks]
    axes.barh(range(len(checks)), lengths, color=colours, alpha=0.6)
    for place, check in enumerate(checks):
        axes.text(0.02, place, f"{check.got:.4g} / {check.limit:.4g}", va="center", fontsize=8)
    axes.set_yticks(range(len(checks)), [check.name for check in checks], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, _MOST_USED)
    axes.set_xlabel("part of the allowed error (got / limit)")
    axes.set_title("checks", fontsize=9)


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _report(values: Mapping[str, Any]) -> QuantReport:
    return QuantReport(
        recipe=_plain(values, "recipe", str),
        precision=_many(values, "precision", _text),
        base=_plain(values, "base", str),
        prune_ratio=_number(values, "prune_ratio"),
        clips=_plain(values, "clips", int),
        kept_windows=_plain(values, "kept_windows", int),
        total_windows=_plain(values, "total_windows", int),
        measured_in=_plain(values, "measured_in", str),
        layers=_many(values, "layers", _layer),
        checks=_many(values, "checks", _check),
        score_error=_number(values, "score_error"),
        flipped=_plain(values, "flipped", int),
        answers=_many(values, "answers", _answer),
    )


def _layer(values: Any) -> LayerError:
    equal = values["sqnr"] is None
    return LayerError(
        _plain(values, "layer", str),
        _plain(values, "graph", str),
        _plain(values, "format", str),
        math.inf if equal else _number(values, "sqnr"),
        _plain(values, "rows", int),
    )


def _check(values: Any) -> GateCheck:
    name = _plain(values, "name", str)
    if name not in CHECKS:
        raise ValueError(f"there is no check {name!r}")
    return GateCheck(
        name,
        _number(values, "got"),
        _number(values, "limit"),
        _plain(values, "passed", bool),
        _plain(values, "detail", str),
    )


def _answer(values: Any) -> AnswerPair:
    clip, prompt, fp32 = (_plain(values, name, str) for name in ("clip", "prompt", "fp32"))
    said = values["quantised"]
    return AnswerPair(clip, prompt, fp32, None if said is None else _text(said))


def _plain(values: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value:
    value = values[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is {json.dumps(value)}")
    return value


def _text(value: object) -> str:
    return _plain({"text": value}, "text", str)


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{name} is {json.dumps(value)}")
    return float(value)


def _many(
    values: Mapping[str, Any], name: str, read: Callable[[Any], _Value]
) -> tuple[_Value, ...]:
    listed = values[name]
    if isinstance(listed, (list, tuple)):
        return tuple(read(value) for value in listed)
    raise ValueError(f"{name} is {json.dumps(listed)}")
