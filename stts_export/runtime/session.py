"""Opening a bundle and asking it about videos and images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import CONFIG_FOLDER, Bundle
from stts_export.config import ModelConfig
from stts_export.engines import cuda, onnxruntime
from stts_export.engines.cuda import DeviceArray
from stts_export.engines.library import ENGINE_BACKENDS
from stts_export.engines.runner import Engines, backend_of, open_engines
from stts_export.errors import InputError, SttsError
from stts_export.live.turns import SharedRunner, Turns, turns_at_a_time
from stts_export.preprocessing import image_preprocessing
from stts_export.runtime import decoder, planner, vision
from stts_export.runtime.answer_text import AnswerText, OnText, check_stop
from stts_export.runtime.arguments import (
    as_array,
    as_integer,
    as_keep_mask,
    as_ratio,
    as_timestamps,
    host_array,
    too_many_frames,
)
from stts_export.runtime.images import image_crops, image_grid
from stts_export.runtime.logits import Sampling, TokenLogprob, check_sampling, with_text
from stts_export.runtime.prompt import (
    Conversation,
    PromptBuilder,
    Subtitle,
    VideoTokens,
    visual_groups,
)
from stts_export.runtime.resize import check_frames, resize_frames
from stts_export.runtime.sequences import Sequences, TokenSequence
from stts_export.runtime.tokenizer import eos_ids_of
from stts_export.runtime.video import Progress, VideoClip, read_video
from stts_export.runtime.visuals import (
    ClipRequest,
    Encoded,
    EncodedImage,
    ImageRequest,
    Request,
    VisualSummary,
    added_timings,
    as_list,
    check_encoded,
    check_settings,
    summary,
    totals,
)
from stts_export.runtime.visuals import EncodedClip as EncodedClip
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DECODER,
    GATHER_WINDOWS,
    IMAGE_POOL,
    LOWER_CHUNK,
    SELECT_PACK,
    SPLIT,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    variant,
)

if TYPE_CHECKING:
    from stts_export.live.answering import Meter, Observer
    from stts_export.live.sources import Source, SourceOptions
    from stts_export.live.stream import LiveStream

Frames = Any
"""uint8 (T, H, W, 3) RGB: a NumPy array, a list of T frames, or anything with `__dlpack__` or
`__cuda_array_interface__`."""
Image = Any
"""uint8 (height, width, 3) RGB: a NumPy array, or anything on the host with `__dlpack__`."""
Visual = EncodedClip | EncodedImage | VideoClip | Frames | str | Path
"""What a prompt is about; a path names a video or an image."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost."""

    text: str | None
    """Ends before a stop string. None when the bundle has no tokenizer."""
    token_ids: list[int]
    """All that were chosen, with those that spell a stop string; without the one by which the
    model ended its answer."""
    finish_reason: str
    """"stop" when the model or a stop string ended the answer, "length" when max_new_tokens did."""
    frames: int
    """Sampled frames of all videos. Images are not counted, here and in the next three."""
    kept_windows: int
    total_windows: int
    prune_ratio: float
    """Of all videos; where they differ, the fraction of their windows that was removed."""
    note: str | None
    """Why nothing was removed, also from images; None when something was."""
    visuals: tuple[VisualSummary, ...]
    """What became of each video and image, in the order of the prompt."""
    timings: dict[str, float]
    """Seconds per stage."""
    logprobs: list[TokenLogprob] | None = None
    """One per token; None when not asked for."""


class Session:
    """An opened bundle. Use it as a context manager; not safe to share between threads."""

    def __init__(
        self,
        bundle: Bundle,
        runners: dict[str, decoder.Runner],
        prompts: PromptBuilder | None,
        engines: Engines | None = None,
        open_graph: Callable[[str], decoder.Runner] | None = None,
        slots: int = 1,
    ) -> None:
        self.bundle = bundle
        self.runners = runners
        """What runs, by graph; empty when closed."""
        self.backend = engines.backend if engines else onnxruntime.NAME
        """What runs the graphs."""
        self._engines = engines
        self._streams: list[LiveStream] = []
        self._turns = Turns(slots)
        self._open_graph = open_graph
        """For graphs that most sessions do not need; None when all are there from the start."""
        self.prompts = prompts
        """Makes token sequences of texts; None without a tokenizer."""
        folder = bundle.folder / CONFIG_FOLDER
        self._images = image_preprocessing(folder, bundle.config.vision)
        self._eos_ids = (
            prompts.eos_token_ids
            if prompts
            else eos_ids_of(bundle.folder / CONFIG_FOLDER, self._sequences.vocabulary)
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

            manifest = opened.manifest
            converts = onnxruntime.converts_weights(
                manifest.precision, set(manifest.formats.values())
            )

            def open_graph(name: str) -> decoder.Runner:
                return onnxruntime.open_graph(
                    opened.graph(name), device=device, threads=threads, converts=converts
                )

            runners = {name: open_graph(name) for name in (VISION_LOWER, VISION_UPPER_FRAMES)}
            runners[DECODER] = open_graph(variant(DECODER, SPLIT))
            return Session(
                opened, runners, prompts, open_graph=open_graph, slots=turns_at_a_time(threads)
            )
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
        """End streams, release graphs and memory; the session cannot be used afterwards."""
        for stream in self._streams:
            stream.close()
            stream.wait_for_graphs()  # engines must not go while one is in a call
        self._streams.clear()
        self.runners = {}
        self._open_graph = None
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._eos_ids

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text and answers have one, not token ids only."""
        return self.prompts is not None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.bundle.config

    def read_video(
        self, path: str | Path, max_frames: int | None = None, on_progress: Progress | None = None
    ) -> VideoClip:
        """Sample a video file at the model's size; see `runtime.video.read_video`.

        An image keeps its own size, and is for `encode_image`.
        """
        self._check_open()
        return read_video(
            path,
            max_frames=self._frame_limit(max_frames),
            max_fps=self.bundle.manifest.limits.max_fps,
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
            InputError: wrong shape or type, too many frames, a ratio outside the limits, an image.
        """
        self._check_free()
        if refill not in get_args(vision.Refill):
            raise InputError(
                f"refill is {refill!r}",
                where="encode",
                allowed=" or ".join(get_args(vision.Refill)),
            )
        request = self._request(frames, prune_ratio, timestamps, keep)
        return self._encode_clip(request, refill, on_progress)

    def encode_image(
        self,
        image: Image | VideoClip | str | Path,
        *,
        on_progress: vision.OnProgress | None = None,
    ) -> EncodedImage:
        """Run the vision side on one image: the whole picture, and overlapping crops of it.

        Nothing is ever removed from an image.

        Args:
            image: uint8 (height, width, 3) RGB at any size, on the host; what `read_video` returned
                for an image file; or the file.
            on_progress: called with (stage, done, total) as chunks of crops finish.

        Raises:
            InputError: no image, or the model's size cannot be cut into the crops that its
                `preprocessor_config.json` asks for.
        """
        self._check_free()
        if isinstance(image, (str, Path)):
            image = self.read_video(image)
        return self._encode_image(self._image_request(image), on_progress)

    def generate(
        self,
        clip: Visual | Sequence[Visual],
        prompt: Conversation | TokenSequence,
        max_new_tokens: int = 64,
        *,
        prune_ratio: float | None = None,
        max_frames: int | None = None,
        subtitles: Sequence[Subtitle] = (),
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int = 0,
        on_token: decoder.OnToken | None = None,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer a question about a clip, an image, or several of them.

        Args:
            clip: a clip or image that is encoded (encode once, ask many), frames, or a video or
                image file; or a list of these in the order of the prompt. Each video is pruned
                and packed alone. A list of pictures is the frames of one clip, an empty list is
                for a prompt of text alone.
            prompt: a question, turns, each (role, text) or {"role": role, "content": text}, or
                token ids: the complete sequence as before pruning, one `im_patch` id per window of
                a video and token of an image.
            max_new_tokens: upper limit of the answer's length.
            prune_ratio: see `encode`; for clips that are not encoded yet, each by itself.
            max_frames: upper limit of sampled frames; for each video file.
            subtitles: of the one video that the prompt is about, a question or turns.
            sampling: how tokens are chosen. The most likely ones when None, whatever the
                checkpoint's `generation_config.json` says, so that answers repeat.
            stop: texts that end the answer, which does not contain them.
            logprobs: how many of the most likely tokens to report beside each chosen one; 0: none.
                They are of the model's own distribution, before penalty and temperature.
            on_token: called with every new token id.
            on_text: called with pieces of the answer's text, which they make up, as they become
                final: not within a character, and not what may still become a stop string.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        self._check_free()
        sampling = check_sampling(sampling)
        max_new_tokens = as_integer(max_new_tokens, "max_new_tokens")
        logprobs = as_integer(logprobs, "logprobs", least=0)
        text = self.answer_text(stop, on_text)
        visuals = self._visuals(clip, prompt, prune_ratio, max_frames, subtitles)
        ready = self._prepare(visuals, prompt, max_new_tokens, prune_ratio, max_frames, subtitles)
        out = decoder.generate(
            self.runners[DECODER],
            self._cache(len(ready.ids) + max_new_tokens),
            ready.ids,
            visual_groups(ready.ids, self.config.tokens.visual),
            self._features(ready.encoded),
            max_new_tokens=max_new_tokens,
            eos_ids=self._eos_ids,
            positions=ready.positions,
            sampling=sampling,
            logprobs=logprobs,
            text=text,
            on_token=on_token,
        )
        return self._answer(ready.encoded, out, text, ready.timings)

    def stream(
        self,
        source: str | Path | Source | None = None,
        *,
        name: str | None = None,
        options: SourceOptions | None = None,
        observer: Observer | None = None,
        meter: Meter | None = None,
        **settings: Any,
    ) -> LiveStream:
        """Open a stream: frames come in, answers to a standing question come out.

        Several streams of one session share its graphs fairly. While any is open the session
        itself encodes and answers nothing.

        Args:
            source: a video file, a folder of images, an address (rtsp, http, ...), a camera such
                as /dev/video0, "gst:" and a GStreamer pipeline; None: the caller pushes frames.
            name: in events; the source without credentials when None.
            options: how the source is read.
            observer: called with every answer and its frames.
            meter: gets the times of stages.
            settings: fields of `live.settings.StreamSettings`: `prompt`, `every`, `window`,
                `latency`, `mode`, ...

        Raises:
            InputError: a setting is out of range, the prompt does not fit the bundle, or there is
                no such source.
        """
        from stts_export.live.stream import open_stream

        self._check_open()
        self._streams = [
            stream for stream in self._streams if stream.uses_graphs or not stream.is_over
        ]
        taken = [stream.name for stream in self._streams]
        stream = open_stream(
            self._shared, self._turns, taken, name, source, options, observer, meter, settings
        )
        self._streams.append(stream)
        return stream

    def _shared(self, party: int) -> Session:
        """View of this session in which every call of a graph is a turn."""
        view = copy.copy(self)
        view.runners = {
            graph: SharedRunner(runner, self._turns, party)
            for graph, runner in self.runners.items()
        }
        view._streams = []
        return view

    def check_window(
        self,
        timestamps: NDArray[np.float64],
        prune_ratio: float,
        prompt: Conversation,
        max_new_tokens: int,
    ) -> None:
        """Refuse a prompt that would not fit about so many frames.

        Args:
            timestamps: (T,) of the frames.
            prune_ratio: that they are pruned with.
            prompt: as for `generate`.
            max_new_tokens: as for `generate`.

        Raises:
            InputError: it has more tokens than the bundle takes.
        """
        ratio, count, note = self.removal(len(timestamps), prune_ratio)
        windows = self.config.vision.windows
        unread = np.empty((len(timestamps), 0, 0, 3), np.uint8)
        request = ClipRequest(unread, timestamps, windows, ratio, count, None, note)
        self._sequences.check([request], prompt, max_new_tokens, ())

    def device_frame(self, frame: object) -> DeviceArray:
        """Take a frame (height, width, 3) in the memory of a GPU as (1, height, width, 3).

        Raises:
            InputError: this back end takes none there, or it is no frame at the model's size.
        """
        array = self._on_this_device(frame)
        check_frames(array, dimensions=(3,), where="frame")
        frames = array.reshape(1, *array.shape)
        self._check_device_size(frames)
        return frames

    def check_prompt(
        self,
        clip: Visual | Sequence[Visual],
        prompt: Conversation | TokenSequence,
        max_new_tokens: int = 64,
        *,
        prune_ratio: float | None = None,
        subtitles: Sequence[Subtitle] = (),
        stop: str | Sequence[str] = (),
        logprobs: int = 0,
    ) -> None:
        """Refuse, before the work of encoding a clip, what `generate` would refuse after it.

        Args:
            clip: as for `generate`. Files are not read: with one among them only what hangs on none
                is checked.
            prompt: as for `generate`.
            max_new_tokens: as for `generate`.
            prune_ratio: as for `encode`.
            subtitles: as for `generate`.
            stop: as for `generate`.
            logprobs: as for `generate`.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        self._check_open()
        max_new_tokens = as_integer(max_new_tokens, "max_new_tokens")
        as_integer(logprobs, "logprobs", least=0)
        self.answer_text(stop)
        visuals = self._visuals(clip, prompt, prune_ratio, None, subtitles)
        if any(map(_is_file, visuals)):
            return
        requests = self._requests(visuals, prune_ratio)
        self._sequences.check(requests, prompt, max_new_tokens, subtitles)

    def next_token_logits(
        self,
        clip: Visual | Sequence[Visual],
        prompt: Conversation | TokenSequence,
        *,
        prune_ratio: float | None = None,
        max_frames: int | None = None,
        subtitles: Sequence[Subtitle] = (),
    ) -> NDArray[np.float32]:
        """Logits (V,) of the first token of an answer, for scoring choices or comparing models.

        Args:
            clip: as for `generate`.
            prompt: as for `generate`.
            prune_ratio: as for `generate`.
            max_frames: as for `generate`.
            subtitles: as for `generate`.

        Raises:
            InputError: the prompt does not fit the clip or the model, or the clip is at fault.
        """
        self._check_free()
        visuals = self._visuals(clip, prompt, prune_ratio, max_frames, subtitles)
        ready = self._prepare(visuals, prompt, 0, prune_ratio, max_frames, subtitles)
        ids, runner = ready.ids, self.runners[DECODER]
        cache = self._cache(len(ids))
        groups = visual_groups(ids, self.config.tokens.visual)
        features = self._features(ready.encoded)
        return decoder.step(runner, cache, ids, groups, features, ready.positions)

    @property
    def _sequences(self) -> Sequences:
        return Sequences(self.bundle, self.prompts)

    def _cache(self, capacity: int) -> decoder.KVCache:
        manifest = self.bundle.manifest
        runner = self.runners[DECODER]
        return decoder.KVCache(runner, self.config, manifest.precision, capacity, manifest.kv_cache)

    def vision_runners(self) -> vision.Runners:
        """Graphs of the vision side."""
        get = self.runners.get
        return vision.Runners(
            self.runners[VISION_LOWER],
            upper_frames=get(VISION_UPPER_FRAMES),
            upper=get(VISION_UPPER),
            select_pack=get(SELECT_PACK),
            gather_windows=get(GATHER_WINDOWS),
            connector=get(CONNECTOR),
        )

    def _check_open(self) -> None:
        """Check that the session is not closed."""
        if not self.runners:
            raise InputError(
                "the session is closed",
                where=str(self.bundle.folder),
                fix="open the bundle again, and use the session within its `with` block",
            )

    def _check_free(self) -> None:
        """Check that the session is open and its graphs are not a stream's."""
        self._check_open()
        if any(stream.uses_graphs for stream in self._streams):
            raise InputError(
                "the session has open streams, which use its graphs",
                where=str(self.bundle.folder),
                fix="ask the stream, end its `with` block first, or open the bundle once more",
            )

    def answer_text(
        self, stop: str | Sequence[str], on_text: OnText | None = None
    ) -> AnswerText | None:
        """Return what makes the text of an answer, or None without a tokenizer.

        Args:
            stop: as for `generate`.
            on_text: as for `generate`.

        Raises:
            InputError: a stop text is none or cannot be in an answer, or there is no tokenizer for
                what was asked.
        """
        stops = check_stop(stop)
        if self.prompts is not None:
            self.prompts.check_stop(stops)
            return AnswerText(self.prompts.decode, stops, on_text)
        if stops or on_text:
            raise InputError(
                f"{'stop' if stops else 'on_text'} needs text, but the checkpoint came without a "
                "tokenizer",
                where=str(self.bundle.folder),
                allowed="on_token, which gets token ids",
                fix="add tokenizer.json to the checkpoint folder and build again",
            )
        return None

    def _answer(
        self,
        encoded: Sequence[Encoded],
        out: decoder.Continuation,
        text: AnswerText | None,
        timings: dict[str, float],
    ) -> Answer:
        logprobs = out.logprobs
        if logprobs is not None and self.prompts is not None:
            logprobs = [with_text(entry, self.prompts.decode) for entry in logprobs]
        visuals = tuple(map(summary, encoded))
        videos = totals(visuals)
        return Answer(
            text=text.text if text else None,
            token_ids=out.token_ids,
            finish_reason=out.finish_reason,
            frames=videos.frames,
            kept_windows=videos.kept_windows,
            total_windows=videos.total_windows,
            prune_ratio=videos.prune_ratio,
            note=videos.note,
            visuals=visuals,
            timings={
                **added_timings([timings, *(visual.timings for visual in encoded)]),
                "prefill": out.prefill_seconds,
                "decode": out.decode_seconds,
            },
            logprobs=logprobs,
        )

    def _visuals(
        self,
        clip: Visual | Sequence[Visual],
        prompt: Conversation | TokenSequence,
        prune_ratio: float | None,
        max_frames: int | None,
        subtitles: Sequence[Subtitle],
    ) -> list[Any]:
        """Split what a prompt is about; check what can be before files are read."""
        visuals = as_list(clip)
        if prune_ratio is not None:  # of no effect on images, but not to be nonsense there
            planner.n_prune(self.config.vision.windows, 1, as_ratio(prune_ratio))
        if max_frames is not None:
            self._frame_limit(max_frames)
        check_settings(visuals, prune_ratio, max_frames)
        if any(map(_is_file, visuals)):
            unread = VideoTokens(np.zeros(1), self.config.vision.windows)
            self._sequences.complete(prompt, [unread] * len(visuals), subtitles)
        return visuals

    def _frame_limit(self, max_frames: int | None) -> int:
        limit = self.bundle.manifest.limits.max_frames
        frames = limit if max_frames is None else as_integer(max_frames, "max_frames")
        if frames > limit:
            raise too_many_frames(frames, limit)
        return frames

    def _prepare(
        self,
        visuals: list[Any],
        prompt: Conversation | TokenSequence,
        max_new_tokens: int,
        prune_ratio: float | None,
        max_frames: int | None,
        subtitles: Sequence[Subtitle],
    ) -> _Ready:
        """Read files, check all, encode one after the other; empties `visuals`."""
        timings: dict[str, float] = {}
        for index, visual in enumerate(visuals):
            if _is_file(visual):
                started = time.perf_counter()
                visuals[index] = self.read_video(visual, max_frames)
                timings["read"] = timings.get("read", 0.0) + time.perf_counter() - started
        requests = self._requests(visuals, prune_ratio)
        self._sequences.check(requests, prompt, max_new_tokens, subtitles)
        visuals.clear()
        encoded: list[Encoded] = []
        while requests:  # the pixels of one that is encoded are not held
            encoded.append(self._encoded(requests.pop(0)))
        ids, positions = self._sequences.compact(prompt, encoded, max_new_tokens, subtitles)
        return _Ready(encoded, ids, positions, timings)

    def _requests(self, visuals: Sequence[Any], prune_ratio: float | None) -> list[Request]:
        """Check what is to be encoded, and what is encoded already."""
        config, dtype = self.config, ACTIVATION[self.bundle.manifest.precision]
        requests: list[Request] = []
        for visual in visuals:
            if isinstance(visual, (EncodedClip, EncodedImage)):
                check_encoded(visual, config.vision.windows, config.text.hidden_size, dtype)
                requests.append(visual)
            elif isinstance(visual, VideoClip) and visual.is_image:
                requests.append(self._image_request(visual))
            else:
                requests.append(self._request(visual, prune_ratio, None, None))
        return requests

    def _encoded(self, request: Request) -> Encoded:
        if isinstance(request, ClipRequest):
            return self._encode_clip(request, "reference", None)
        if isinstance(request, ImageRequest):
            return self._encode_image(request, None)
        return request

    def _encode_clip(
        self,
        request: ClipRequest,
        refill: vision.Refill,
        on_progress: vision.OnProgress | None,
    ) -> EncodedClip:
        started = time.perf_counter()
        sized: NDArray[np.uint8] | DeviceArray = request.frames
        if isinstance(sized, np.ndarray):
            sized = resize_frames(sized, self.config.vision.image_size)
        resized = time.perf_counter()
        out = vision.encode(
            self.vision_runners(),
            self.config.vision,
            self.bundle.manifest.precision,
            sized,
            request.count,
            refill=refill,
            keep=request.mask,
            on_progress=on_progress,
        )
        return EncodedClip(
            scores=out.scores,
            keep=out.keep,
            features=out.features,
            timestamps=request.timestamps,
            prune_ratio=request.prune_ratio,
            note=request.note,
            timings={"resize": resized - started, **out.timings},
        )

    def _image_request(self, image: object) -> ImageRequest:
        """Check an image."""
        if isinstance(image, VideoClip):
            if not image.is_image:
                raise InputError(
                    "is a video", where=image.source, allowed="an image", fix="use `encode`"
                )
            image = image.frames[0]
        pixels = host_array(image, "image", "uint8 (height, width, 3) in RGB order")
        return ImageRequest(pixels, image_grid(pixels, **self._cutting()))

    def _cutting(self) -> dict[str, Any]:
        """How images are cut, as arguments of `image_crops`."""
        return {
            "size": self.config.vision.image_size,
            "patch_size": self.config.vision.patch_size,
            "max_crops": self._images.max_crops,
            "overlap_margins": self._images.overlap_margins,
            "pool": IMAGE_POOL,
        }

    def _encode_image(
        self, request: ImageRequest, on_progress: vision.OnProgress | None
    ) -> EncodedImage:
        if self._open_graph is not None and CONNECTOR not in self.runners:
            self.runners[CONNECTOR] = self._open_graph(CONNECTOR)
        started = time.perf_counter()
        cut = image_crops(request.image, **self._cutting())
        seconds = time.perf_counter() - started
        features, timings = vision.encode_image(
            self.vision_runners(),
            self.config.vision,
            self.bundle.manifest.precision,
            cut.crops,
            cut.pooled_patches,
            width=self.config.text.hidden_size,
            chunk=min(LOWER_CHUNK, self.bundle.manifest.limits.max_frames),
            on_progress=on_progress,
        )
        timings = {"resize": seconds, **timings}
        return EncodedImage(features, cut.grid, len(cut.crops), timings)

    def _features(self, encoded: Sequence[Encoded]) -> NDArray[Any]:
        """Features of everything in order, (K, C); a row of zeros where there is nothing."""
        if not encoded:
            dtype = ACTIVATION[self.bundle.manifest.precision]
            return np.zeros((1, self.config.text.hidden_size), dtype)
        return np.concatenate([visual.features for visual in encoded])

    def _request(
        self,
        clip: Frames | VideoClip,
        prune_ratio: float | None,
        timestamps: Sequence[float] | NDArray[np.float64] | None,
        keep: NDArray[np.bool_] | None,
    ) -> ClipRequest:
        """Check a clip and what is asked for it."""
        if isinstance(clip, VideoClip):
            if clip.is_image:
                raise InputError(
                    "is an image", where=clip.source, allowed="a video", fix="use `encode_image`"
                )
            timestamps = clip.timestamps if timestamps is None else timestamps
            clip = clip.frames
        frames = self._frame_array(clip)
        limit = self.bundle.manifest.limits.max_frames
        if len(frames) > limit:
            raise too_many_frames(len(frames), limit)
        times = as_timestamps(timestamps, len(frames))
        windows = self.config.vision.windows
        if keep is None:
            if prune_ratio is not None:
                prune_ratio = as_ratio(prune_ratio)
            ratio, count, note = self.removal(len(frames), prune_ratio)
            return ClipRequest(frames, times, windows, ratio, count, None, note)
        if prune_ratio is not None:
            raise InputError(
                f"prune_ratio {prune_ratio!r} together with a keep mask",
                where="encode",
                allowed="one of the two: the mask decides what is removed",
            )
        mask = as_keep_mask(keep, (len(frames), windows))
        count = int(mask.size - mask.sum())
        note = None if count else "nothing was removed: the given mask keeps everything"
        return ClipRequest(frames, times, windows, count / mask.size, count, mask, note)

    def _frame_array(self, frames: object) -> NDArray[np.uint8] | DeviceArray:
        """Return (T, height, width, 3), given as one array or as T of them."""
        if isinstance(frames, (list, tuple)):
            if any(map(cuda.is_on_device, frames)):
                raise InputError(
                    f"a {type(frames).__name__} of frames in the memory of a GPU",
                    where="frames",
                    allowed="one array of T frames there, or a list of frames on the host",
                )
            frames = as_array(frames, "frames")
        if cuda.is_on_device(frames):
            return self._device_frames(frames)
        array = host_array(
            frames,
            "frames",
            "uint8 (T, height, width, 3) in RGB order, or what `read_video` returned",
        )
        check_frames(array)
        return array

    def _device_frames(self, frames: object) -> DeviceArray:
        array = self._on_this_device(frames)
        check_frames(array)
        self._check_device_size(array)
        return array

    def _on_this_device(self, frames: object) -> DeviceArray:
        if self._engines is None:
            raise InputError(
                "the frames lie in the memory of a GPU",
                where="frames",
                allowed="frames on the host, for back end onnxruntime",
                fix="copy them to the host, or open the bundle with backend='tensorrt'",
            )
        return cuda.from_device(frames, self._engines.stream)

    def _check_device_size(self, array: DeviceArray) -> None:
        size = self.config.vision.image_size
        if array.shape[1:3] != size:
            raise InputError(
                f"frames of {array.shape[1]} x {array.shape[2]} pixels in the memory of the GPU",
                where="frames",
                allowed=f"{size[0]} x {size[1]}, the model's size",
                fix="resize them on the GPU, or pass frames on the host, which are resized here",
            )

    def removal(self, frames: int, prune_ratio: float | None) -> tuple[float, int, str | None]:
        """Return the ratio in force, the windows to remove, and why there are none.

        Args:
            frames: T of a clip.
            prune_ratio: what was asked for.

        Raises:
            InputError: the bundle does not take the ratio.
        """
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
        if ratio < lowest:
            raise InputError(
                f"prune ratio {ratio}",
                where=str(self.bundle.folder),
                allowed=f"{lowest} or more, the bundle's min_prune_ratio",
                fix="raise the ratio, or build with a lower --min-prune-ratio",
            )
        if ratio == 0:
            return ratio, 0, "nothing was removed: the prune ratio is 0"
        if count == 0:
            short = f"{frames} x {windows} windows x {ratio} is less than one window"
            return ratio, 0, f"nothing was removed: {short}"
        return ratio, count, None


@dataclass(frozen=True)
class _Ready:
    """A prompt for the decoder."""

    encoded: list[Encoded]
    ids: NDArray[np.int64]
    """(L,) compact."""
    positions: NDArray[np.int64]
    """(L,) rotary ones."""
    timings: dict[str, float]
    """Seconds that reading files took."""


def _backend(bundle: Bundle, backend: str | None) -> str:
    """Return the back end to open: the one asked for, or the first that was built for."""
    built = list(dict.fromkeys(backend_of(target) for target in bundle.manifest.targets))
    if not built:
        raise InputError(
            f"has graphs only: ONNX Runtime has no kernels for {bundle.manifest.precision_name}",
            where=str(bundle.folder),
            fix=f"stts-export build {bundle.folder} -o NEW_BUNDLE --backend "
            f"{' or '.join(ENGINE_BACKENDS)}",
        )
    if (backend or built[0]) not in built:
        raise InputError(
            f"was not built for back end {backend!r}",
            where=str(bundle.folder),
            allowed=" or ".join(built),
            fix=f"stts-export build {bundle.folder} -o NEW_BUNDLE --backend {backend}"
            if backend in ENGINE_BACKENDS
            else None,
        )
    return backend or built[0]


def _is_file(visual: object) -> bool:
    return isinstance(visual, (str, Path))
