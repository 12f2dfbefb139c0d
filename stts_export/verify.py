"""Does a bundle keep the windows that the trained model keeps, and say the same?

Each clip runs through the PyTorch model in fp32 (the oracle) and through the bundle. Scores and
selection are compared on their own; all later stages are compared given the oracle's windows and
the bundle's scores, whose rounding the rescaled bias may magnify without bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stts_export import repro
from stts_export.bundle import Bundle
from stts_export.engines import onnxruntime
from stts_export.errors import InputError, MissingDependencyError
from stts_export.probe import moving_clip
from stts_export.runtime import planner, vision
from stts_export.runtime.decoder import NotFiniteError, Runner
from stts_export.runtime.resize import resize_frames
from stts_export.runtime.session import EncodedClip, Session
from stts_export.tensors import SELECT_PACK, VISION_LOWER, VISION_UPPER
from stts_export.tolerances import TOLERANCES, Tolerance, difference

if TYPE_CHECKING:
    from stts_export.model.vlm import SttsModel

MAX_FLIPPED = 0.005
"""Share of windows that a precision other than fp32 may decide otherwise."""
BUILT_IN_FRAMES = (1, 5, 12)
_RATIOS = (0.0, 0.5, 0.8)
_TEXT_TOKENS = 12
_NEW_TOKENS = 8
_FRAME_TOKENS = 3  # a stand-in for the timestamp, and the frame's start and end


@dataclass(frozen=True)
class Check:
    """One comparison of one clip."""

    clip: str
    prune_ratio: float
    name: str
    measure: str
    got: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """All comparisons; `passed` when each of them is within its limit."""

    bundle: str
    checkpoint: str
    precision: str
    backend: str = onnxruntime.NAME
    checks: list[Check] = field(default_factory=list)
    repro: list[str] = field(default_factory=list)
    """Folders that reproduce differences with polygraphy, worst first."""

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its limit."""
        return all(check.passed for check in self.checks)

    def worst_by_name(self) -> list[tuple[str, bool, float, float, str]]:
        """Per kind of check the one nearest to its limit, or furthest above it.

        Returns:
            Rows of name with measure, whether all passed, got, limit, and the clip it was on.
        """
        rows = []
        for name in dict.fromkeys(check.name for check in self.checks):
            same = [check for check in self.checks if check.name == name]
            worst = max(same, key=lambda check: (not check.passed, check.got - check.limit))
            where = f"worst of {len(same)}: {worst.clip}, ratio {worst.prune_ratio:g}"
            label = f"{name} ({worst.measure})"
            rows.append((label, worst.passed, worst.got, worst.limit, where))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `got` is None where a result was not finite."""
        values = {"passed": self.passed, **asdict(self)}
        for check in values["checks"]:
            if not math.isfinite(check["got"]):
                check["got"] = None
        return values


def verify(
    bundle: Path,
    checkpoint: Path | str,
    videos: Sequence[Path] = (),
    *,
    backend: str | None = None,
    plugin: Path | None = None,
    keep_repro: Path | None = None,
    revision: str | None = None,
) -> Report:
    """Compare a bundle with the checkpoint it was built from.

    Args:
        bundle: folder of the bundle; its files are compared with their hashes first.
        checkpoint: the trained model, see `checkpoint.open_checkpoint`.
        videos: files to compare on; built-in clips when empty.
        backend: as for `Session.open`.
        plugin: as for `Session.open`.
        keep_repro: new folder for files that reproduce a difference with polygraphy; not made
            when all agrees.
        revision: of a checkpoint on the hub.

    Raises:
        InputError: bundle or checkpoint cannot be read, or are of different architecture.
        VerificationError: a file of the bundle was changed.
        MissingDependencyError: torch, the back end, or polygraphy if asked for, is not installed.
    """
    if keep_repro is not None:
        repro.check_folder(keep_repro)
    opened = Bundle.open(bundle)
    opened.check_hashes()
    model = _load(checkpoint, revision)
    if model.config != opened.config:
        raise InputError(
            "was built from a checkpoint with another configuration",
            where=str(bundle),
            allowed=f"a bundle built from {checkpoint}",
        )
    with Session.open(bundle, backend, plugin=plugin) as session:
        report = Report(str(bundle), str(checkpoint), opened.manifest.precision, session.backend)
        masked = _MaskedUpper(opened) if session.backend == onnxruntime.NAME else None
        comparisons = [
            _Comparison(report, session, masked, model, name, frames, ratio)
            for name, frames in _clips(session, videos)
            for ratio in _ratios(opened, len(frames))
        ]
        for comparison in comparisons:
            comparison.run()
        if keep_repro is not None and not report.passed:
            found = _worst_calls(comparisons, session, masked)
            folders = repro.write_repro(keep_repro, opened, session.backend, found)
            report.repro.extend(map(str, folders))
    if not report.checks:
        raise InputError(
            f"no clip fits into {opened.manifest.limits.max_tokens} tokens",
            where=str(bundle),
            fix="pass a shorter file with --video",
        )
    return report


def _worst_calls(
    comparisons: Sequence[_Comparison], session: Session, masked: _MaskedUpper | None
) -> list[repro.Difference]:
    """Run the worst clip of every kind of failed check again and compare graph by graph."""
    report = comparisons[0].report
    failed: dict[str, Check] = {}
    for check in sorted(report.checks, key=lambda check: check.got, reverse=True):
        if not check.passed:
            failed.setdefault(check.name, check)
    wanted = {(check.clip, check.prune_ratio) for check in failed.values()}
    calls: list[repro.Call] = []
    session.runners.update(
        {name: repro.Recorder(name, runner, calls) for name, runner in session.runners.items()}
    )
    if masked is not None:
        masked.upper = repro.Recorder(VISION_UPPER, masked.upper, calls)
    found: list[repro.Difference] = []
    for comparison in comparisons:
        if (comparison.clip, comparison.ratio) in wanted:
            comparison.repeat()
            model, precision = comparison.model, comparison.session.bundle.manifest.precision
            compared = (repro.compare_call(call, model, precision) for call in calls)
            found += [entry for entry in compared if entry is not None]
            calls.clear()
    return found


def _ratios(bundle: Bundle, frames: int) -> list[float]:
    """Ratios that the bundle accepts and at which the prompt of a clip fits."""
    limits, vision = bundle.manifest.limits, bundle.config.vision
    wanted = {0.0}
    if vision.pruning:
        trained = vision.pruning.trained_prune_ratio
        wanted = {ratio for ratio in (*_RATIOS, trained) if ratio >= limits.min_prune_ratio}
        wanted.add(limits.min_prune_ratio)
    text = frames * _FRAME_TOKENS + _TEXT_TOKENS + _NEW_TOKENS
    total = frames * vision.windows
    positions = bundle.config.text.max_position_embeddings
    if bundle.manifest.positions == "gapped" and total + text > positions:
        return []
    return [
        ratio
        for ratio in sorted(wanted)
        if total - planner.n_prune(vision.windows, frames, ratio) + text <= limits.max_tokens
    ]


class _MaskedUpper:
    """The bundle's `vision_upper`, which sessions on the CPU leave to other back ends."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.lower: Runner = onnxruntime.open_graph(bundle.graph(VISION_LOWER))
        self.upper: Runner = onnxruntime.open_graph(bundle.graph(VISION_UPPER))

    def features(self, frames: NDArray[np.uint8], keep: NDArray[np.bool_]) -> NDArray[Any]:
        """Features (K, C) of kept windows, by way of bins and segments."""
        config, precision = self.bundle.config.vision, self.bundle.manifest.precision
        hidden, _ = vision.run_lower(self.lower, config, precision, frames, bool(keep.all()))
        plan = planner.pack(keep)
        windows = hidden.reshape(keep.size, -1)
        rows = []
        for gather, segment in zip(plan.gather_window, plan.segment, strict=True):
            bins = windows[gather].reshape(1, -1, config.hidden_size)
            rows.append(self.upper({"bins": bins, "segment": segment[None]})["packed_features"][0])
        return np.concatenate(rows)[plan.kept_slot]


_QUANTISED_FEATURES = Tolerance(
    "l2", 0.3, "rounding of layers on a clip unlike those of calibration; gates are about real ones"
)

_QUANTISED_LOGITS = Tolerance(
    "l2",
    0.5,
    "the same, on prompts of random tokens; a decoder that computes something else is at 1",
)


class _Comparison:
    """One clip at one ratio."""

    def __init__(
        self,
        report: Report,
        session: Session,
        masked: _MaskedUpper | None,
        model: SttsModel,
        clip: str,
        frames: NDArray[np.uint8],
        ratio: float,
    ) -> None:
        self.report = report
        self.session = session
        self.masked = masked
        self.model = model
        self.clip = clip
        self.frames = frames
        self.ratio = ratio
        manifest = session.bundle.manifest
        rounded = {name for name, kind in manifest.formats.items() if kind != "fp32"}
        self.rounds_features = any(name.startswith("vision.") for name in rounded)
        self.rounds = bool(rounded) or manifest.kv_cache == "int8"

    def run(self) -> None:
        import torch

        frames = torch.from_numpy(self.frames)
        clip = self.session.encode(self.frames, self.ratio)
        chosen, bundle_scores = None, None
        if clip.scores is not None:
            with torch.no_grad():
                scores, chosen = self.model.choose(frames, self.ratio)
            keep = chosen.numpy()
            self._compare("scores", clip.scores, scores.numpy())
            self._compare_windows(clip.keep, keep, scores.numpy(), clip.scores)
            if SELECT_PACK in self.session.runners:
                self._compare_planners(clip)
            if not np.array_equal(clip.keep, keep):
                clip = self.session.encode(self.frames, keep=keep)
            bundle_scores = torch.from_numpy(clip.scores)
        with torch.no_grad():
            oracle = self.model.encode(frames, self.ratio, keep=chosen, scores=bundle_scores)
        keep, features = oracle.keep.numpy(), oracle.features.numpy()
        self._compare("packed_features", clip.features, features)
        if self.masked is not None:
            masked = self.masked.features(self.frames, keep)
            self._compare("packed_features", masked, features, "packed_features of vision_upper")
        if SELECT_PACK in self.session.runners and not keep.all():
            planned = self.session.encode(self.frames, keep=keep).features
            self._compare("packed_features", planned, features, "packed_features of gather_windows")
        ids = _prompt(self.model, keep)
        with torch.no_grad():
            compact = torch.from_numpy(ids[ids >= 0])
            groups = self.model.visual_groups(compact[None])
            is_gapped = self.session.bundle.manifest.positions == "gapped"
            places = torch.from_numpy(np.flatnonzero(ids >= 0)) if is_gapped else None
            batch = None if places is None else places[None]
            logits = self.model.language(compact[None], oracle.features, groups, batch)
            greedy = self.model.greedy(compact, oracle.features, _NEW_TOKENS, places)
        full = np.where(ids < 0, self.model.config.tokens.im_patch, ids)
        got = self._logits(clip, full)
        last = logits[0, -1].numpy()
        self._compare("logits", np.full_like(last, np.nan) if got is None else got, last)
        if self.report.precision == "fp32" and not self.rounds:
            self._compare_tokens(clip, full, greedy)

    def _logits(self, clip: EncodedClip, prompt: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Logits of the first new token; None where they are not finite."""
        try:
            return self.session.next_token_logits(clip, prompt)
        except NotFiniteError:
            return None

    def repeat(self) -> None:
        """Run every graph of this comparison again, without comparing."""
        import torch

        clip = self.session.encode(self.frames, self.ratio)
        keep = clip.keep
        if clip.scores is not None:
            with torch.no_grad():
                keep = self.model.choose(torch.from_numpy(self.frames), self.ratio)[1].numpy()
            clip = self.session.encode(self.frames, keep=keep)
        if self.masked is not None:
            self.masked.features(self.frames, keep)
        ids = _prompt(self.model, keep)
        full = np.where(ids < 0, self.model.config.tokens.im_patch, ids)
        self._logits(clip, full)

    def _compare(
        self, name: str, got: NDArray[Any], reference: NDArray[Any], label: str | None = None
    ) -> None:
        tolerance = TOLERANCES[name, self.report.precision]
        if self.rounds and name == "logits":
            tolerance = _QUANTISED_LOGITS
        elif self.rounds_features and name == "packed_features":
            tolerance = _QUANTISED_FEATURES
        off = difference(got, reference, tolerance.measure)
        self._add(label or name, tolerance.measure, off, tolerance.limit)

    def _compare_windows(
        self,
        got: NDArray[np.bool_],
        keep: NDArray[np.bool_],
        scores: NDArray[np.float32],
        got_scores: NDArray[np.float32],
    ) -> None:
        """Windows decided otherwise: none in fp32; elsewhere few, and only near the threshold."""
        flipped = got != keep
        exact = self.report.precision == "fp32"
        self._add("windows flipped", "share", float(flipped.mean()), 0 if exact else MAX_FLIPPED)
        if exact or not flipped.any():
            return
        error = float(np.abs(got_scores - scores).max())
        raised = scores.copy()
        raised[0] = planner.FIRST_FRAME_SCORE
        threshold = float(raised[keep].min())
        distance = float(np.abs(raised - threshold)[flipped].max())
        self._add("flips near threshold", "score distance", distance, 2 * error)

    def _compare_planners(self, clip: EncodedClip) -> None:
        """The graph that selects against the planner, given the same scores."""
        assert clip.scores is not None
        planned = planner.select(clip.scores, clip.total_windows - clip.kept_windows)
        share = float((planned != clip.keep).mean())
        self._add("windows unlike the planner's", "share", share, 0)

    def _compare_tokens(
        self, clip: EncodedClip, prompt: NDArray[np.int64], greedy: list[int]
    ) -> None:
        try:
            got = self.session.generate(clip, prompt, len(greedy)).token_ids
        except NotFiniteError:
            got = None
        ends = [index for index, token in enumerate(greedy) if token in self.session.eos_token_ids]
        expected = greedy[: ends[0]] if ends else greedy
        self._add("greedy tokens differ", "flag", 0.0 if got == expected else 1.0, 0)

    def _add(self, name: str, measure: str, got: float, limit: float) -> None:
        check = Check(self.clip, self.ratio, name, measure, got, limit, got <= limit)
        self.report.checks.append(check)


def _load(checkpoint: Path | str, revision: str | None) -> SttsModel:
    try:
        from stts_export.checkpoint import check_tensors, open_checkpoint, streamed_model
    except ImportError as error:
        raise MissingDependencyError(
            f"comparing with a checkpoint needs a package that is not installed: {error}",
            where="verify",
            fix="pip install 'stts-export[cpu,train]'",
        ) from None
    source = open_checkpoint(checkpoint, revision=revision)
    check_tensors(source)
    return streamed_model(source)


def _clips(session: Session, videos: Sequence[Path]) -> list[tuple[str, NDArray[np.uint8]]]:
    if videos:
        clips = ((str(path), session.read_video(path).frames) for path in videos)
        # An image keeps its own size, and is compared as the one frame of a clip.
        size = session.config.vision.image_size
        return [(name, resize_frames(frames, size)) for name, frames in clips]
    limit = session.bundle.manifest.limits.max_frames
    size = session.config.vision.image_size
    lengths = sorted({min(frames, limit) for frames in BUILT_IN_FRAMES})
    return [(f"built-in, {frames} frames", moving_clip(frames, size)) for frames in lengths]


def _prompt(model: SttsModel, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A sequence as before pruning, with -1 in place of the removed windows' ids."""
    rng = np.random.default_rng(1)
    tokens = model.config.tokens
    words = np.setdiff1d(np.arange(model.config.text.vocab_size), tokens.visual)
    text = rng.choice(words, (len(keep) + 1, _TEXT_TOKENS))
    sequence: list[int] = []
    for frame, chosen in zip(keep, text, strict=False):
        windows = np.where(frame, tokens.im_patch, -1).tolist()
        sequence += [int(chosen[0]), tokens.frame_start, *windows, tokens.frame_end]
    return np.array(sequence + text[-1].tolist(), dtype=np.int64)
