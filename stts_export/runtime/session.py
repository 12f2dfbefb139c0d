"""Opening a bundle and asking it about video."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import CONFIG_FOLDER, Bundle
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import json_object
from stts_export.runtime import decoder, planner, vision
from stts_export.runtime.prompt import Conversation, PromptBuilder, keep_tokens, visual_groups
from stts_export.runtime.resize import check_frames, resize_frames
from stts_export.runtime.video import VideoClip, read_video
from stts_export.tensors import DECODER, VISION_LOWER, VISION_UPPER_FRAMES

DEFAULT_FPS = 2.0
"""Frames per second assumed for arrays without timestamps: the model's own sampling rate."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedClip:
    """The vision side of a clip, ready for any number of questions."""

    scores: NDArray[np.float32] | None
    """(T, W) in (0, 1), high = important; None when the model has no scorer."""
    keep: NDArray[np.bool_]
    """(T, W): windows that survived."""
    features: NDArray[Any]
    """(K, C), frame-major, in the bundle's type."""
    timestamps: NDArray[np.float64]
    """(T,) seconds."""
    prune_ratio: float
    note: str | None
    """Why nothing was removed, or None when something was."""
    timings: dict[str, float]
    """Seconds per stage."""

    @property
    def kept_windows(self) -> int:
        """K: windows that survived."""
        return len(self.features)

    @property
    def total_windows(self) -> int:
        """T * W: windows of the clip."""
        return self.keep.size


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost."""

    text: str | None
    """None when the bundle has no tokenizer."""
    token_ids: list[int]
    finish_reason: str
    """"stop" when the model ended its answer, "length" when max_new_tokens did."""
    frames: int
    kept_windows: int
    total_windows: int
    prune_ratio: float
    note: str | None
    """Why nothing was removed, or None when something was."""
    timings: dict[str, float]
    """Seconds per stage."""


class Session:
    """An opened bundle. Use it as a context manager; not safe to share between threads."""

    def __init__(
        self, bundle: Bundle, runners: dict[str, decoder.Runner], prompts: PromptBuilder | None
    ) -> None:
        self.bundle = bundle
        self._runners = runners
        self._prompts = prompts
        self._eos_ids = prompts.eos_token_ids if prompts else _eos_ids(bundle)

    @staticmethod
    def open(
        bundle: str | Path,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: folder written by `stts-export build`.
            backend: "onnxruntime"; the first one the bundle was built for when None.
            device: "cpu" or "cuda"; the CPU when None.
            threads: threads within an operator; all cores when None.

        Raises:
            InputError: no bundle, a damaged one, or a back end it was not built for.
            MissingDependencyError: the back end is not installed.
        """
        from stts_export.engines import onnxruntime

        opened = Bundle.open(Path(bundle))
        targets = opened.manifest.targets
        if (backend or targets[0]) not in targets:
            raise InputError(
                f"was not built for back end {backend!r}",
                where=str(bundle),
                allowed=" or ".join(targets),
            )
        runners: dict[str, decoder.Runner] = {
            name: onnxruntime.open_graph(opened.graph(name), device=device, threads=threads)
            for name in (VISION_LOWER, VISION_UPPER_FRAMES, DECODER)
        }
        config_folder = opened.folder / CONFIG_FOLDER
        prompts = None
        if (config_folder / "tokenizer.json").exists():
            prompts = PromptBuilder.from_folder(config_folder, opened.config)
        return Session(opened, runners, prompts)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs; the session cannot be used afterwards."""
        self._runners = {}

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.bundle.config

    def read_video(self, path: str | Path, max_frames: int | None = None) -> VideoClip:
        """Sample a video file at the model's size; see `runtime.video.read_video`."""
        limit = self.bundle.manifest.limits.max_frames
        if max_frames is not None and max_frames > limit:
            raise _too_many_frames(max_frames, limit)
        return read_video(
            path,
            max_frames=limit if max_frames is None else max_frames,
            size=self.config.vision.image_size,
        )

    def encode(
        self,
        frames: Frames | VideoClip,
        prune_ratio: float | None = None,
        timestamps: Sequence[float] | NDArray[np.float64] | None = None,
        *,
        refill: vision.Refill = "reference",
        keep: NDArray[np.bool_] | None = None,
        on_progress: vision.OnProgress | None = None,
    ) -> EncodedClip:
        """Run the vision side on one clip.

        Args:
            frames: uint8 (T, H, W, 3) RGB at any size, or what `read_video` returned.
            prune_ratio: fraction of windows to remove, in [0, 1); the one the model was trained
                with when None.
            timestamps: (T,) seconds, for the prompt; 2 frames per second are assumed when None.
            refill: "reference" (as trained) or "off" (kept windows only).
            keep: (T, windows) decides in place of the scores, for comparisons; `prune_ratio` is
                then what it amounts to.
            on_progress: called with (stage, done, total) as chunks finish.

        Raises:
            InputError: wrong shape or type, too many frames, a ratio outside the limits.
        """
        started = time.perf_counter()
        is_image = isinstance(frames, VideoClip) and frames.is_image
        if isinstance(frames, VideoClip):
            timestamps = frames.timestamps if timestamps is None else timestamps
            frames = frames.frames
        check_frames(frames)
        limit = self.bundle.manifest.limits.max_frames
        if len(frames) > limit:
            raise _too_many_frames(len(frames), limit)
        times = _timestamps(timestamps, len(frames))
        ratio, count, note = self._removal(len(frames), prune_ratio, is_image, keep)
        frames = resize_frames(frames, self.config.vision.image_size)
        resized = time.perf_counter()
        out = vision.encode(
            self._runners[VISION_LOWER],
            self._runners[VISION_UPPER_FRAMES],
            self.config.vision,
            self.bundle.manifest.precision,
            frames,
            count,
            refill=refill,
            keep=keep,
            on_progress=on_progress,
        )
        timings = {"resize": resized - started, **out.timings}
        return EncodedClip(out.scores, out.keep, out.features, times, ratio, note, timings)

    def generate(
        self,
        clip: EncodedClip | VideoClip | Frames | str | Path,
        prompt: Conversation | Sequence[int] | NDArray[np.integer[Any]],
        max_new_tokens: int = 64,
        *,
        prune_ratio: float | None = None,
        max_frames: int | None = None,
        on_token: decoder.OnToken | None = None,
    ) -> Answer:
        """Answer a question about a clip.

        Args:
            clip: an encoded clip (encode once, ask many), frames, or a video file.
            prompt: a question, (role, text) turns, or token ids: the complete sequence as before
                pruning, one `im_patch` id per window.
            max_new_tokens: upper limit of the answer's length.
            prune_ratio: see `encode`; for clips that are not encoded yet.
            max_frames: upper limit of sampled frames, for a video file.
            on_token: called with every new token id.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        extra: dict[str, float] = {}
        if isinstance(clip, (str, Path)):
            started = time.perf_counter()
            clip = self.read_video(clip, max_frames)
            extra["read"] = time.perf_counter() - started
        if not isinstance(clip, EncodedClip):
            clip = self.encode(clip, prune_ratio)
        if max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}", where="generate", allowed=">= 1"
            )
        ids = self._compact_ids(prompt, clip, max_new_tokens)
        out = decoder.generate(
            self._runners[DECODER],
            self.config,
            self.bundle.manifest.precision,
            ids,
            visual_groups(ids, self.config.tokens.visual),
            clip.features,
            max_new_tokens=max_new_tokens,
            eos_ids=self._eos_ids,
            on_token=on_token,
        )
        timings = {
            **extra, **clip.timings, "prefill": out.prefill_seconds, "decode": out.decode_seconds
        }  # fmt: skip
        return Answer(
            text=self._prompts.decode(out.token_ids) if self._prompts else None,
            token_ids=out.token_ids,
            finish_reason=out.finish_reason,
            frames=len(clip.keep),
            kept_windows=clip.kept_windows,
            total_windows=clip.total_windows,
            prune_ratio=clip.prune_ratio,
            note=clip.note,
            timings=timings,
        )

    def next_token_logits(
        self,
        clip: EncodedClip,
        prompt: Conversation | Sequence[int] | NDArray[np.integer[Any]],
    ) -> NDArray[np.float32]:
        """Logits (V,) of the first token of an answer, for scoring choices or comparing models."""
        ids = self._compact_ids(prompt, clip, 1)
        precision = self.bundle.manifest.precision
        cache = decoder.KVCache(self.config, precision, len(ids))
        groups = visual_groups(ids, self.config.tokens.visual)
        return decoder.step(self._runners[DECODER], cache, ids, groups, clip.features)

    def _compact_ids(
        self,
        prompt: Conversation | Sequence[int] | NDArray[np.integer[Any]],
        clip: EncodedClip,
        max_new_tokens: int,
    ) -> NDArray[np.int64]:
        """Return the prompt without the tokens of removed windows, checked for length."""
        ids = keep_tokens(self._token_ids(prompt, clip), clip.keep, self.config.tokens.im_patch)
        self._check_length(len(ids), max_new_tokens, clip)
        return ids

    def _removal(
        self,
        frames: int,
        prune_ratio: float | None,
        is_image: bool,
        keep: NDArray[np.bool_] | None,
    ) -> tuple[float, int, str | None]:
        """Return the ratio in force, the windows to remove, and why there are none."""
        windows, pruning = self.config.vision.windows, self.config.vision.pruning
        if keep is not None:
            return _forced_removal(keep, (frames, windows))
        if pruning is None:
            if prune_ratio:
                raise InputError(
                    f"prune ratio {prune_ratio}",
                    where=str(self.bundle.folder),
                    allowed="0: the checkpoint has no scorer, so nothing can be pruned",
                )
            return 0.0, 0, "nothing was removed: the checkpoint has no scorer"
        ratio = pruning.trained_prune_ratio if prune_ratio is None else prune_ratio
        count = planner.n_prune(windows, frames, ratio)
        lowest = self.bundle.manifest.limits.min_prune_ratio
        if ratio < lowest and not is_image:
            raise InputError(
                f"prune ratio {ratio}",
                where=str(self.bundle.folder),
                allowed=f"{lowest} or more, the bundle's min_prune_ratio",
                fix="raise the ratio, or build with a lower --min-prune-ratio",
            )
        if is_image:
            return 0.0, 0, "nothing was removed: images are not pruned"
        if ratio == 0:
            return ratio, 0, "nothing was removed: the prune ratio is 0"
        if count == 0:
            short = f"{frames} x {windows} windows x {ratio} is less than one window"
            return ratio, 0, f"nothing was removed: {short}"
        return ratio, count, None

    def _token_ids(
        self,
        prompt: Conversation | Sequence[int] | NDArray[np.integer[Any]],
        clip: EncodedClip,
    ) -> NDArray[np.int64]:
        """Return the complete sequence as before pruning."""
        if _is_text(prompt):
            if self._prompts is None:
                raise InputError(
                    "the prompt is text, but the checkpoint came without a tokenizer",
                    where=str(self.bundle.folder),
                    allowed="token ids, the complete sequence as before pruning",
                    fix="add tokenizer.json to the checkpoint folder and build again",
                )
            text: Conversation = prompt  # type: ignore[assignment]
            return self._prompts.build(text, clip.timestamps, self.config.vision.windows)
        ids = np.asarray(prompt)
        limit = self.config.text.vocab_size + self.config.text.additional_vocab_size
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise InputError(
                f"token ids of shape {ids.shape} and type {ids.dtype}",
                where="prompt",
                allowed="a flat sequence of integers, not empty",
            )
        if ids.min() < 0 or ids.max() >= limit:
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()}",
                where="prompt",
                allowed=f"0..{limit - 1}",
            )
        return ids.astype(np.int64)

    def _check_length(self, prompt: int, max_new_tokens: int, clip: EncodedClip) -> None:
        limit = self.bundle.manifest.limits.max_tokens
        if prompt + max_new_tokens > limit:
            raise InputError(
                f"{prompt} prompt tokens ({clip.kept_windows} of them windows) "
                f"and {max_new_tokens} new ones are {prompt + max_new_tokens}",
                where="prompt",
                allowed=f"{limit} tokens",
                fix="raise the prune ratio, sample fewer frames, or shorten the prompt",
            )


def _is_text(prompt: object) -> bool:
    """A question or (role, text) turns, rather than token ids."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], (list, tuple)):
        return any(isinstance(part, str) for part in prompt[0])
    return isinstance(prompt, str)


def _eos_ids(bundle: Bundle) -> frozenset[int]:
    """Tokens that end an answer of a bundle without a tokenizer; none when it names none."""
    path = bundle.folder / CONFIG_FOLDER / "generation_config.json"
    value = json_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return frozenset(token for token in ids if isinstance(token, int))


def _timestamps(
    given: Sequence[float] | NDArray[np.float64] | None, frames: int
) -> NDArray[np.float64]:
    if given is None:
        return np.arange(frames) / DEFAULT_FPS
    times = np.asarray(given, dtype=np.float64)
    if times.shape != (frames,) or not np.isfinite(times).all():
        raise InputError(
            f"timestamps of shape {times.shape} for {frames} frames",
            where="timestamps",
            allowed="one finite number of seconds per frame",
        )
    return times


def _forced_removal(
    keep: NDArray[np.bool_], shape: tuple[int, int]
) -> tuple[float, int, str | None]:
    if keep.shape != shape or keep.dtype != np.bool_ or not keep.any():
        raise InputError(
            f"a keep mask of shape {keep.shape} and type {keep.dtype}",
            where="keep",
            allowed=f"bool {shape} with at least one window",
        )
    count = int(keep.size - keep.sum())
    note = None if count else "nothing was removed: the given mask keeps everything"
    return count / keep.size, count, note


def _too_many_frames(frames: int, limit: int) -> InputError:
    return InputError(
        f"{frames} frames",
        where="max_frames",
        allowed=f"up to {limit}, the limit this bundle was built with",
        fix=f"sample fewer frames, or build with --max-frames {frames}",
    )
