"""Gates: how far a quantised model is from fp32 on clips that nothing was fitted to.

Scores, windows and answers are each model's own. Whatever comes after the selection is compared
given the windows that fp32 keeps, as otherwise it would be of other windows.
Axes: T frames, W windows of a frame, K kept windows, C decoder width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stts_export.calibration.distances import SquareSums, cosines, divergence, flips
from stts_export.calibration.layers import SCORING, layer_names, layers_by_group
from stts_export.calibration.observing import Observations, graph_of, observed, tapped
from stts_export.calibration.quant_report import (
    ANSWERS_CHANGED,
    COSINE,
    JACCARD,
    KL,
    NEAR_THRESHOLD,
    SQNR,
    AnswerPair,
    GateCheck,
    LayerError,
    QuantReport,
)
from stts_export.calibration.recipe import Gates
from stts_export.config import ModelConfig
from stts_export.errors import InputError, did_you_mean
from stts_export.machine import return_freed_memory
from stts_export.model.language import attention_mask
from stts_export.runtime import planner
from stts_export.runtime.decoder import NotFiniteError
from stts_export.runtime.prompt import kept_positions
from stts_export.runtime.session import Session
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import EncodedClip
from stts_export.tolerances import TOLERANCES, quantised_row
from stts_export.training.answerers import Answerer, BundleAnswerer, Tower
from stts_export.training.checkpoint_answerer import CheckpointAnswerer
from stts_export.training.selectors import Selection

IN_PYTORCH = "PyTorch, rounding as the graphs do"

OnClip = Callable[[int, int], None]
"""(clips that are done, of how many)."""

_NEW_TOKENS = 16


class HeldOutClip(Protocol):
    """What is asked; `clips.CalibrationClip` is one."""

    @property
    def video(self) -> Path:
        """File."""

    @property
    def prompt(self) -> str:
        """Question."""

    @property
    def name(self) -> str:
        """For the report."""


def measure(
    reference: CheckpointAnswerer,
    candidate: BundleAnswerer | CheckpointAnswerer,
    clips: Sequence[HeldOutClip],
    *,
    ratio: float,
    layers: Mapping[str, str],
    gates: Gates,
    recipe_name: str,
    base: str = "fp32",
    max_new_tokens: int = _NEW_TOKENS,
    threads: int | None = None,
    on_clip: OnClip | None = None,
) -> QuantReport:
    """Compare a quantised model with fp32, one clip after the other.

    A candidate whose numbers are not finite misses its limits; that is no error.

    Args:
        reference: the model in fp32.
        candidate: the same model quantised: a bundle on ONNX Runtime, or in PyTorch a model that
            rounds as the graphs do.
        clips: held out from calibration.
        ratio: fraction of windows to remove; of no effect without a scorer.
        layers: format by layer; these are compared.
        gates: limits.
        recipe_name: for the report.
        base: format of everything else, for the report.
        max_new_tokens: of each answer at most.
        threads: within an operator, for the graphs that show their layers.
        on_clip: called after each clip.

    Raises:
        InputError: there are no clips, or one is unreadable or an image; the models or layers do
            not fit each other; the bundle runs on another back end or takes no such ratio; or a
            prompt does not fit the model.
    """
    _check(reference, candidate, clips, layers, ratio)
    config = reference.config
    errors = {layer: SquareSums() for layer in layers}
    found: list[_Compared] = []
    measured_in = IN_PYTORCH
    with ExitStack() as stack:
        comparison = _Comparison(reference, candidate, errors, ratio, max_new_tokens)
        if isinstance(candidate, BundleAnswerer):
            measured_in = candidate.session.backend
            if layers:
                opened = tapped(candidate.session, layers, threads)
                comparison.tapped = stack.enter_context(opened)
        for done, clip in enumerate(clips, start=1):
            found.append(comparison.run(clip))
            return_freed_memory()
            if on_clip:
                on_clip(done, len(clips))
    ranked = _ranked(errors, layers, config)
    return QuantReport(
        recipe=recipe_name,
        precision=tuple(dict.fromkeys(layers.values())),
        base=base,
        prune_ratio=ratio if config.vision.pruning else 0.0,
        clips=len(found),
        kept_windows=sum(int(one.keep.sum()) for one in found),
        total_windows=sum(one.keep.size for one in found),
        measured_in=measured_in,
        layers=ranked,
        checks=(
            *_sqnr_check(ranked, config, gates),
            *_checks(found, gates, _score_noise(layers, base, config)),
        ),
        score_error=max(one.score_error for one in found),
        flipped=sum(one.flipped for one in found),
        answers=tuple(one.answers for one in found),
    )


def _check(
    reference: CheckpointAnswerer,
    candidate: Answerer,
    clips: Sequence[HeldOutClip],
    layers: Mapping[str, str],
    ratio: float,
) -> None:
    """Refuse, before any work, what cannot be compared."""
    if not clips:
        raise InputError("there are no held-out clips", where="gates", allowed="one clip, or more")
    if reference.config != candidate.config:
        raise InputError(
            "the two models have different configurations",
            where="gates",
            allowed="a model and the same one quantised",
        )
    names = layer_names(reference.config)
    for layer in layers:
        if layer not in names:
            raise InputError(
                f"there is no layer {layer!r}{did_you_mean(layer, names)}", where="gates"
            )
    planner.n_prune(reference.config.vision.windows, 1, ratio)
    candidate.check_ratio(ratio)


@dataclass(frozen=True)
class _Compared:
    """A clip in both models."""

    name: str
    keep: NDArray[np.bool_]
    """(T, W) of fp32."""
    score_error: float
    """Largest; 0 when nothing was scored."""
    flipped: int
    jaccard: float
    distance: float
    """Of a flipped window from the threshold, at most; in score."""
    cosines: NDArray[np.float64]
    """(K,)."""
    kl: float
    answers: AnswerPair

    @property
    def is_scored(self) -> bool:
        """Whether windows were removed by score."""
        return not self.keep.all()


@dataclass
class _Comparison:
    """Compares clip by clip."""

    reference: CheckpointAnswerer
    candidate: BundleAnswerer | CheckpointAnswerer
    errors: Mapping[str, SquareSums]
    """Of the layers, of all clips so far."""
    ratio: float
    max_new_tokens: int
    tapped: tuple[Session, Observations] | None = None
    """Of a bundle, what shows its layers, and where; None without layers."""

    def run(self, asked: HeldOutClip) -> _Compared:
        """Compare a clip, and count the errors of its layers."""
        clip = self.reference.read(asked.video)
        if clip.is_image:
            raise InputError("is an image", where=str(asked.video), allowed="a video")
        prompt, gapped = asked.prompt, _is_gapped(self.candidate)
        with observed(self.reference.model, self.errors) as rows:
            tower: Tower = self.reference.tower(clip)
            scores, keep = self._choose(tower)
            expected = self._encode(tower, clip, keep)
            logits = _next_logits(self.reference, expected, prompt, gapped)
        tower = self.candidate.tower(clip)
        if isinstance(self.candidate, CheckpointAnswerer):
            with observed(self.candidate.model, self.errors) as got_rows:
                got_scores, got_keep = self._choose(tower)
                got = self._encode(tower, clip, keep)
                got_logits = _next_logits(self.candidate, got, prompt, gapped)
            self._count_errors(rows, got_rows)
        else:
            got_scores, got_keep = self._choose(tower)
            got = self._encode(tower, clip, keep)
            got_logits = _bundle_logits(self.candidate.session, got, prompt)
        own = got if np.array_equal(keep, got_keep) else self._encode(tower, clip, got_keep)
        del tower  # it holds the output of the lower part
        if self.tapped is not None:
            session, got_rows = self.tapped
            again = BundleAnswerer(session, self.candidate.max_frames).tower(clip)
            _bundle_logits(session, self._encode(again, clip, keep), prompt)
            self._count_errors(rows, got_rows)
        error, distance = flips(scores, keep, got_scores, got_keep)
        return _Compared(
            name=asked.name,
            keep=keep,
            score_error=error,
            flipped=int((keep != got_keep).sum()),
            jaccard=float((keep & got_keep).sum() / (keep | got_keep).sum()),
            distance=distance,
            cosines=cosines(expected.features, got.features),
            kl=divergence(logits, got_logits),
            answers=self._answers(asked, expected, own),
        )

    def _count_errors(self, expected: Observations, got: Observations) -> None:
        rows, got_rows = expected.take(), got.take()
        for layer, sums in self.errors.items():
            sums.add(rows[layer], got_rows[layer])

    def _choose(self, tower: Tower) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Scores (T, W), None when nothing is removed, and the model's own windows."""
        frames, windows = tower.shape
        count = 0
        if self.reference.config.vision.pruning is not None:
            count = planner.n_prune(windows, frames, self.ratio)
        if count == 0:
            return None, np.ones(tower.shape, dtype=np.bool_)
        scores = tower.scores()
        assert scores is not None
        return scores, planner.select(scores, count)

    def _encode(self, tower: Tower, clip: VideoClip, keep: NDArray[np.bool_]) -> EncodedClip:
        """The clip with the windows of a mask."""
        features = tower.whole() if keep.all() else tower.survivors(Selection(keep))
        return EncodedClip(None, keep, features, clip.timestamps, self.ratio, None, {})

    def _answers(self, asked: HeldOutClip, expected: EncodedClip, own: EncodedClip) -> AnswerPair:
        """Greedy answers, each with its model's own windows."""
        prompt, limit = asked.prompt, self.max_new_tokens
        if _is_gapped(self.candidate):
            said = _gapped_answer(self.reference, expected, prompt, limit)
        else:
            said = self.reference.answers(expected, [prompt], [limit])[0]
        # Of what PyTorch refuses, only logits that are not finite are left: the rest is the same
        # for both models, and the reference has passed.
        refused = InputError if isinstance(self.candidate, CheckpointAnswerer) else NotFiniteError
        try:
            got = self.candidate.answers(own, [prompt], [limit])[0]
        except refused:
            got = None
        return AnswerPair(asked.name, prompt, said, got)


def _bundle_logits(session: Session, clip: EncodedClip, prompt: str) -> NDArray[np.float32]:
    """Logits (V,) of the first token of an answer; NaN where the session refuses them."""
    try:
        return session.next_token_logits(clip, prompt)
    except NotFiniteError:
        return np.full(session.config.text.vocab_size, np.nan, np.float32)


def _is_gapped(candidate: Answerer) -> bool:
    """Whether tokens keep the positions that they have before removal."""
    if isinstance(candidate, BundleAnswerer):
        return candidate.session.bundle.manifest.positions == "gapped"
    return False


def _compact(
    answerer: CheckpointAnswerer, clip: EncodedClip, prompt: str, gapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (L,) without those of removed windows, and their rotary positions (L,)."""
    whole = answerer.prompts.build(prompt, [clip.tokens])
    kept = kept_positions(whole, clip.keep.ravel(), answerer.config.tokens.im_patch)
    device = answerer.model.language.norm.weight.device
    places = kept if gapped else np.arange(len(kept))
    return torch.from_numpy(whole[kept]).to(device), torch.from_numpy(places).to(device)


@torch.inference_mode()
def _next_logits(
    answerer: CheckpointAnswerer, clip: EncodedClip, prompt: str, gapped: bool
) -> NDArray[np.float32]:
    """Logits (V,) of the first token of an answer; the head runs on the last token only."""
    model, language = answerer.model, answerer.model.language
    ids, places = (one[None] for one in _compact(answerer, clip, prompt, gapped))
    features = torch.from_numpy(clip.features).to(ids.device)
    order, groups = torch.arange(ids.shape[1], device=ids.device)[None], model.visual_groups(ids)
    mask = attention_mask(order, groups, order, groups, model.config.bidirectional_visual)
    x = language.transform(
        language.embed(ids, features), places, mask, lambda _, key, value: (key, value)
    )
    logits: NDArray[np.float32] = language.lm_head(x[:, -1])[0].float().cpu().numpy()
    return logits


@torch.inference_mode()
def _gapped_answer(answerer: CheckpointAnswerer, clip: EncodedClip, prompt: str, limit: int) -> str:
    """Greedy answer with gaps in the positions, which `CheckpointAnswerer.answers` has not."""
    ids, places = _compact(answerer, clip, prompt, gapped=True)
    features = torch.from_numpy(clip.features).to(ids.device)
    new = answerer.model.greedy(ids, features, limit, places)
    ends = [index for index, token in enumerate(new) if token in answerer.prompts.eos_token_ids]
    return answerer.prompts.decode(new[: ends[0]] if ends else new)


def _ranked(
    errors: Mapping[str, SquareSums], layers: Mapping[str, str], config: ModelConfig
) -> tuple[LayerError, ...]:
    """Worst first; of equal ones the first to run."""
    found = [
        LayerError(layer, graph_of(layer, config), layers[layer], sums.decibels(), sums.rows)
        for layer, sums in errors.items()
    ]
    order = layer_names(config)
    return tuple(sorted(found, key=lambda one: (one.sqnr, order.index(one.layer))))


def _sqnr_check(
    ranked: Sequence[LayerError], config: ModelConfig, gates: Gates
) -> tuple[GateCheck, ...]:
    """The lowest SQNR, and the first layer that is too low: errors go on from there."""
    if not ranked:
        return ()
    low = {one.layer for one in ranked if one.sqnr < gates.min_sqnr}
    detail = f"worst: {ranked[0].layer}, {ranked[0].format}"
    if low:
        first = next(layer for layer in layer_names(config) if layer in low)
        detail += f"; {len(low)} too low, {first} runs first"
    return (GateCheck.compare(SQNR, ranked[0].sqnr, gates.min_sqnr, detail),)


def _checks(found: Sequence[_Compared], gates: Gates, noise: float) -> Iterator[GateCheck]:
    scored = [one for one in found if one.is_scored]
    if scored:
        worst = min(scored, key=lambda one: one.jaccard)
        mean = float(np.mean([one.jaccard for one in scored]))
        detail = f"worst: {worst.name}, {worst.jaccard:.4g}, {worst.flipped} windows"
        yield GateCheck.compare(JACCARD, mean, gates.min_jaccard, detail)
        yield _near_threshold(scored, noise)
    where = min(found, key=lambda one: _nan_first(float(one.cosines.min())))
    token = int(np.argmin(where.cosines))  # NaN counts as lowest
    mean = float(np.concatenate([one.cosines for one in found]).mean())
    detail = f"worst: {where.name}, token {token}, {where.cosines[token]:.4g}"
    yield GateCheck.compare(COSINE, mean, gates.min_cosine, detail)
    where = max(found, key=lambda one: one.kl)
    mean = float(np.mean([one.kl for one in found]))
    yield GateCheck.compare(KL, mean, gates.max_kl, f"worst: {where.name}, {where.kl:.4g}")
    changed = [one.name for one in found if one.answers.fp32 != one.answers.quantised]
    detail = f"{len(changed)} of {len(found)}" + (f": {', '.join(changed[:3])}" if changed else "")
    share = len(changed) / len(found)
    yield GateCheck.compare(ANSWERS_CHANGED, share, gates.max_answers_changed, detail)


def _score_noise(layers: Mapping[str, str], base: str, config: ModelConfig) -> float:
    """How far formats may move a score; not what was measured, which explains any flip."""
    scoring = not set(layers).isdisjoint(layers_by_group(config)[SCORING])
    return TOLERANCES["scores", quantised_row(base) if scoring else base].limit


def _near_threshold(scored: Sequence[_Compared], noise: float) -> GateCheck:
    """Rounding of scores moves only windows near the threshold; anything else is a mistake."""
    worst = max(scored, key=lambda one: one.distance)
    error = max(one.score_error for one in scored)
    detail = f"worst: {worst.name}; largest score error {error:.2g}, {noise:.2g} are allowed"
    check = GateCheck.compare(NEAR_THRESHOLD, worst.distance, 2 * noise, detail)
    return check if math.isfinite(error) else replace(check, passed=False)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value
