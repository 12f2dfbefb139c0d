"""Opening a bundle and asking it about video."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import CONFIG_FOLDER, Bundle
from stts_export.config import ModelConfig
from stts_export.engines import cuda, onnxruntime
from stts_export.engines.cuda import DeviceArray
from stts_export.engines.runner import BACKENDS, Engines, backend_of, open_engines
from stts_export.errors import InputError, SttsError
from stts_export.runtime import decoder, planner, vision
from stts_export.runtime.prompt import (
    Conversation,
    PromptBuilder,
    check_question,
    keep_tokens,
    visual_groups,
)
from stts_export.runtime.resize import check_frames, resize_frames
from stts_export.runtime.tokenizer import eos_ids_of
from stts_export.runtime.video import Progress, VideoClip, read_video
from stts_export.tensors import (
    DECODER,
    GATHER_WINDOWS,
    SELECT_PACK,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
)

DEFAULT_FPS = 2.0
"""Frames per second assumed for arrays without timestamps: the model's own sampling rate."""

Frames = Any
"""uint8 (T, H, W, 3) RGB: a NumPy array, a list of T frames, or anything with `__dlpack__` or
`__cuda_array_interface__`."""
TokenSequence = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Request:
    """A clip to encode, checked."""

    frames: NDArray[np.uint8] | DeviceArray
    timestamps: NDArray[np.float64]
    prune_ratio: float
    count: int
    """Windows to remove."""
    keep: NDArray[np.bool_] | None
    """Decides in place of the scores."""
    note: str | None
    """Why nothing will be removed, or None when something will."""


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
        self,
        bundle: Bundle,
        runners: dict[str, decoder.Runner],
        prompts: PromptBuilder | None,
        engines: Engines | None = None,
    ) -> None:
        self.bundle = bundle
        self.runners = runners
        """What runs, by graph; empty when closed."""
        self.backend = engines.backend if engines else onnxruntime.NAME
        """What runs the graphs."""
        self._engines = engines
        self._prompts = prompts
        self._vocabulary = bundle.config.text.vocab_size + bundle.config.text.additional_vocab_size
        self._eos_ids = (
            prompts.eos_token_ids
            if prompts
            else eos_ids_of(bundle.folder / CONFIG_FOLDER, self._vocabulary)
        )

    @staticmethod
    def open(
        bundle: str | Path,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        plugin: str | Path | None = None,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: folder written by `stts-export build`.
            backend: "onnxruntime", "tensorrt" or "tensorrt-rtx"; the first one the bundle was
                built for when None.
            device: "cpu" or "cuda" for ONNX Runtime, the CPU when None; "cuda" or "cuda:N" for
                engines, the first GPU when None.
            threads: threads within an operator, all cores when None; not for engines.
            plugin: library of plugins for tensorrt, in place of the one that would be found.

        Raises:
            InputError: no bundle, a damaged one, or a back end or machine it was not built for.
            MissingDependencyError: the back end, a driver or a GPU is not there.
        """
        opened = Bundle.open(Path(bundle))
        config_folder = opened.folder / CONFIG_FOLDER
        prompts = None
        if (config_folder / "tokenizer.json").exists():
            prompts = PromptBuilder.from_folder(config_folder, opened.config)
        chosen = _backend(opened, backend)
        if chosen == onnxruntime.NAME:
            if plugin is not None:
                raise InputError(
                    f"plugin {plugin}", where=chosen, allowed="plugins of tensorrt only"
                )
            runners: dict[str, decoder.Runner] = {
                name: onnxruntime.open_graph(opened.graph(name), device=device, threads=threads)
                for name in (VISION_LOWER, VISION_UPPER_FRAMES, DECODER)
            }
            return Session(opened, runners, prompts)
        try:
            engines = open_engines(
                opened.folder,
                opened.manifest.targets,
                chosen,
                device=device,
                threads=threads,
                plugin=None if plugin is None else Path(plugin),
            )
        except SttsError as error:
            asked = backend is not None or plugin is not None
            if not asked and onnxruntime.NAME in opened.manifest.targets:
                way_out = f"--backend {onnxruntime.NAME}"
                error.fix = f"{error.fix}; or use {way_out}" if error.fix else f"use {way_out}"
            raise
        return Session(opened, dict(engines.runners), prompts, engines)

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
        """Release graphs and memory; the session cannot be used afterwards."""
        self.runners = {}
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._eos_ids

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.bundle.config

    def read_video(
        self, path: str | Path, max_frames: int | None = None, on_progress: Progress | None = None
    ) -> VideoClip:
        """Sample a video file at the model's size; see `runtime.video.read_video`."""
        self._check_open()
        limits = self.bundle.manifest.limits
        frames = limits.max_frames if max_frames is None else _integer(max_frames, "max_frames")
        if frames > limits.max_frames:
            raise _too_many_frames(frames, limits.max_frames)
        return read_video(
            path,
            max_frames=frames,
            max_fps=limits.max_fps,
            size=self.config.vision.image_size,
            on_progress=on_progress,
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
            frames: uint8 (T, H, W, 3) RGB at any size: an array of NumPy or of any library with
                DLPack, a list of T frames, or what `read_video` returned. In the memory of a GPU
                (`__dlpack__` or `__cuda_array_interface__`) for engines only, and at the model's
                size.
            prune_ratio: fraction of windows to remove, in [0, 1); the one the model was trained
                with when None.
            timestamps: (T,) seconds, never descending, for the prompt; 2 frames per second are
                assumed when None.
            refill: "reference" (as trained) or "off" (kept windows only).
            keep: (T, windows) decides in place of scores and `prune_ratio`, for comparisons; the
                clip's `prune_ratio` is then what it amounts to.
            on_progress: called with (stage, done, total) as chunks finish.

        Raises:
            InputError: wrong shape or type, too many frames, a ratio outside the limits.
        """
        self._check_open()
        started = time.perf_counter()
        if refill not in get_args(vision.Refill):
            raise InputError(
                f"refill is {refill!r}",
                where="encode",
                allowed=" or ".join(get_args(vision.Refill)),
            )
        request = self._request(frames, prune_ratio, timestamps, keep)
        sized: NDArray[np.uint8] | DeviceArray = request.frames
        if isinstance(sized, np.ndarray):
            sized = resize_frames(sized, self.config.vision.image_size)
        resized = time.perf_counter()
        out = vision.encode(
            self._vision_runners(),
            self.config.vision,
            self.bundle.manifest.precision,
            sized,
            request.count,
            refill=refill,
            keep=request.keep,
            on_progress=on_progress,
        )
        timings = {"resize": resized - started, **out.timings}
        return EncodedClip(
            scores=out.scores,
            keep=out.keep,
            features=out.features,
            timestamps=request.timestamps,
            prune_ratio=request.prune_ratio,
            note=request.note,
            timings=timings,
        )

    def generate(
        self,
        clip: EncodedClip | VideoClip | Frames | str | Path,
        prompt: Conversation | TokenSequence,
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
            max_frames: upper limit of sampled frames; for a video file.
            on_token: called with every new token id.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        self._check_open()
        _check_settings(clip, prune_ratio, max_frames)
        max_new_tokens = _integer(max_new_tokens, "max_new_tokens")
        timings: dict[str, float] = {}
        if isinstance(clip, (str, Path)):
            started = time.perf_counter()
            clip = self.read_video(clip, max_frames)
            timings["read"] = time.perf_counter() - started
        if not isinstance(clip, EncodedClip):
            self.check_prompt(clip, prompt, max_new_tokens, prune_ratio=prune_ratio)
            clip = self.encode(clip, prune_ratio)
        ids = self._compact_ids(prompt, clip, max_new_tokens)
        out = decoder.generate(
            self.runners[DECODER],
            self.config,
            self.bundle.manifest.precision,
            ids,
            visual_groups(ids, self.config.tokens.visual),
            clip.features,
            max_new_tokens=max_new_tokens,
            eos_ids=self._eos_ids,
            on_token=on_token,
        )
        return self._answer(clip, out, timings)

    def check_prompt(
        self,
        clip: VideoClip | Frames,
        prompt: Conversation | TokenSequence,
        max_new_tokens: int = 64,
        *,
        prune_ratio: float | None = None,
    ) -> None:
        """Refuse, before the work of encoding a clip, what `generate` would refuse after it.

        Args:
            clip: as for `encode`.
            prompt: as for `generate`.
            max_new_tokens: as for `generate`.
            prune_ratio: as for `encode`.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        self._check_open()
        max_new_tokens = _integer(max_new_tokens, "max_new_tokens")
        request = self._request(clip, prune_ratio, None, None)
        ids = self._token_ids(prompt, request.timestamps)
        all_windows = np.ones((len(request.frames), self.config.vision.windows), dtype=np.bool_)
        keep_tokens(ids, all_windows, self.config.tokens.im_patch)
        kept = all_windows.size - request.count
        self._check_length(len(ids) - request.count, max_new_tokens, kept)

    def next_token_logits(
        self,
        clip: EncodedClip,
        prompt: Conversation | TokenSequence,
    ) -> NDArray[np.float32]:
        """Logits (V,) of the first token of an answer, for scoring choices or comparing models."""
        self._check_open()
        ids = self._compact_ids(prompt, clip, 1)
        precision = self.bundle.manifest.precision
        runner = self.runners[DECODER]
        cache = decoder.KVCache(runner, self.config, precision, len(ids))
        groups = visual_groups(ids, self.config.tokens.visual)
        return decoder.step(runner, cache, ids, groups, clip.features)

    def _vision_runners(self) -> vision.Runners:
        get = self.runners.get
        return vision.Runners(
            self.runners[VISION_LOWER],
            upper_frames=get(VISION_UPPER_FRAMES),
            upper=get(VISION_UPPER),
            select_pack=get(SELECT_PACK),
            gather_windows=get(GATHER_WINDOWS),
        )

    def _check_open(self) -> None:
        if not self.runners:
            raise InputError(
                "the session is closed",
                where=str(self.bundle.folder),
                fix="open the bundle again, and use the session within its `with` block",
            )

    def _answer(
        self, clip: EncodedClip, out: decoder.Continuation, timings: dict[str, float]
    ) -> Answer:
        return Answer(
            text=self._prompts.decode(out.token_ids) if self._prompts else None,
            token_ids=out.token_ids,
            finish_reason=out.finish_reason,
            frames=len(clip.keep),
            kept_windows=clip.kept_windows,
            total_windows=clip.total_windows,
            prune_ratio=clip.prune_ratio,
            note=clip.note,
            timings={
                **timings,
                **clip.timings,
                "prefill": out.prefill_seconds,
                "decode": out.decode_seconds,
            },
        )

    def _request(
        self,
        clip: Frames | VideoClip,
        prune_ratio: float | None,
        timestamps: Sequence[float] | NDArray[np.float64] | None,
        keep: NDArray[np.bool_] | None,
    ) -> _Request:
        """Check a clip and what is asked for it."""
        is_image = isinstance(clip, VideoClip) and clip.is_image
        if isinstance(clip, VideoClip):
            timestamps = clip.timestamps if timestamps is None else timestamps
            clip = clip.frames
        frames = self._frame_array(clip)
        limit = self.bundle.manifest.limits.max_frames
        if len(frames) > limit:
            raise _too_many_frames(len(frames), limit)
        times = _timestamps(timestamps, len(frames))
        if keep is None:
            if prune_ratio is not None:
                prune_ratio = _ratio(prune_ratio)
            ratio, count, note = self._removal(len(frames), prune_ratio, is_image)
            return _Request(frames, times, ratio, count, None, note)
        if prune_ratio is not None:
            raise InputError(
                f"prune_ratio {prune_ratio!r} together with a keep mask",
                where="encode",
                allowed="one of the two: the mask decides what is removed",
            )
        mask = _keep_mask(keep, (len(frames), self.config.vision.windows))
        count = int(mask.size - mask.sum())
        note = None if count else "nothing was removed: the given mask keeps everything"
        return _Request(frames, times, count / mask.size, count, mask, note)

    def _frame_array(self, frames: object) -> NDArray[np.uint8] | DeviceArray:
        """Return (T, height, width, 3), given as one array or as T of them."""
        if isinstance(frames, (list, tuple)):
            if any(map(cuda.is_on_device, frames)):
                raise InputError(
                    f"a {type(frames).__name__} of frames in the memory of a GPU",
                    where="frames",
                    allowed="one array of T frames there, or a list of frames on the host",
                )
            frames = _array(frames, "frames")
        if isinstance(frames, np.ndarray):
            check_frames(frames)
            return frames
        if cuda.is_on_device(frames):
            return self._device_frames(frames)
        if not hasattr(frames, "__dlpack__"):
            raise InputError(
                f"got {type(frames).__name__}",
                where="frames",
                allowed="uint8 (T, height, width, 3) in RGB order: a NumPy array, one with DLPack, "
                "or what `read_video` returned",
            )
        try:
            array: NDArray[Any] = np.from_dlpack(frames)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the {type(frames).__name__} cannot be read through DLPack: {error}",
                where="frames",
                fix="pass a NumPy array",
            ) from None
        check_frames(array)
        return array

    def _device_frames(self, frames: object) -> DeviceArray:
        if self._engines is None:
            raise InputError(
                "the frames lie in the memory of a GPU",
                where="frames",
                allowed="frames on the host, for back end onnxruntime",
                fix="copy them to the host, or open the bundle with backend='tensorrt'",
            )
        array = cuda.from_device(frames, self._engines.stream)
        check_frames(array)
        size = self.config.vision.image_size
        if array.shape[1:3] != size:
            raise InputError(
                f"frames of {array.shape[1]} x {array.shape[2]} pixels in the memory of the GPU",
                where="frames",
                allowed=f"{size[0]} x {size[1]}, the model's size",
                fix="resize them on the GPU, or pass frames on the host, which are resized here",
            )
        return array

    def _compact_ids(
        self,
        prompt: Conversation | TokenSequence,
        clip: EncodedClip,
        max_new_tokens: int,
    ) -> NDArray[np.int64]:
        """Return the prompt without the tokens of removed windows, checked for length."""
        ids = self._token_ids(prompt, clip.timestamps)
        ids = keep_tokens(ids, clip.keep, self.config.tokens.im_patch)
        self._check_length(len(ids), max_new_tokens, clip.kept_windows)
        return ids

    def _removal(
        self, frames: int, prune_ratio: float | None, is_image: bool
    ) -> tuple[float, int, str | None]:
        """Return the ratio in force, the windows to remove, and why there are none."""
        windows, pruning = self.config.vision.windows, self.config.vision.pruning
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
        self, prompt: Conversation | TokenSequence, timestamps: NDArray[np.float64]
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
            check_question(text)
            return self._prompts.build(text, timestamps, self.config.vision.windows)
        ids = _array(prompt, "prompt")
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise InputError(
                f"token ids of shape {ids.shape} and type {ids.dtype}",
                where="prompt",
                allowed="a flat sequence of integers, not empty",
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()}",
                where="prompt",
                allowed=f"0..{self._vocabulary - 1}",
            )
        return ids.astype(np.int64)

    def _check_length(self, prompt: int, max_new_tokens: int, kept: int) -> None:
        limit = self.bundle.manifest.limits.max_tokens
        if prompt + max_new_tokens > limit:
            raise InputError(
                f"{prompt} prompt tokens ({kept} of them windows) "
                f"and {max_new_tokens} new ones are {prompt + max_new_tokens}",
                where="prompt",
                allowed=f"{limit} tokens",
                fix="raise the prune ratio, sample fewer frames, or shorten the prompt",
            )


def _backend(bundle: Bundle, backend: str | None) -> str:
    """Return the back end to open: the one asked for, or the first that was built for."""
    built = list(dict.fromkeys(backend_of(target) for target in bundle.manifest.targets))
    if (backend or built[0]) not in built:
        raise InputError(
            f"was not built for back end {backend!r}",
            where=str(bundle.folder),
            allowed=" or ".join(built),
            fix=f"stts-export build {bundle.folder} -o NEW_BUNDLE --backend {backend}"
            if backend in BACKENDS
            else None,
        )
    return backend or built[0]


def _is_text(prompt: object) -> bool:
    """A question or (role, text) turns, rather than token ids."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], tuple):
        return True
    return isinstance(prompt, str)


def _integer(value: object, name: str) -> int:
    """Return a number that counts something, 1 or more."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}", where=name, allowed="an integer >= 1")
    return int(value)


def _ratio(value: object) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(
            f"prune ratio {value!r}", where="prune_ratio", allowed="a number, 0 <= ratio < 1"
        )
    return float(value)


def _array(values: object, where: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(
            "the parts differ in shape", where=where, allowed="an array, or equally long sequences"
        ) from None


def _check_settings(clip: object, prune_ratio: float | None, max_frames: int | None) -> None:
    """Refuse settings of steps that were done already."""
    if prune_ratio is not None and isinstance(clip, EncodedClip):
        raise InputError(
            f"prune_ratio {prune_ratio!r} for a clip that is encoded already",
            where="generate",
            fix="give the ratio to `encode`",
        )
    if max_frames is not None and not isinstance(clip, (str, Path)):
        raise InputError(
            f"max_frames {max_frames!r} for a clip that is sampled already",
            where="generate",
            fix="give the limit to `read_video`, or pass the video file",
        )


def _timestamps(
    given: Sequence[float] | NDArray[np.float64] | None, frames: int
) -> NDArray[np.float64]:
    if given is None:
        return np.arange(frames) / DEFAULT_FPS
    times = _array(given, "timestamps")
    allowed = "one finite number of seconds per frame, 0 or more, not descending"
    if times.shape != (frames,) or times.dtype.kind not in "iuf":
        raise InputError(
            f"timestamps of shape {times.shape} and type {times.dtype} for {frames} frames",
            where="timestamps",
            allowed=allowed,
        )
    times = times.astype(np.float64)
    if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
        raise InputError(f"the times are {times.tolist()}", where="timestamps", allowed=allowed)
    return times


def _keep_mask(given: object, shape: tuple[int, int]) -> NDArray[np.bool_]:
    keep = _array(given, "keep")
    if keep.shape != shape or keep.dtype != np.bool_ or not keep.any():
        raise InputError(
            f"a keep mask of shape {keep.shape} and type {keep.dtype}",
            where="keep",
            allowed=f"bool {shape} with at least one window",
        )
    return keep


def _too_many_frames(frames: int, limit: int) -> InputError:
    return InputError(
        f"{frames} frames",
        where="max_frames",
        allowed=f"up to {limit}, the limit this bundle was built with",
        fix=f"sample fewer frames, or build with --max-frames {frames}",
    )
