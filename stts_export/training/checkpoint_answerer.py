"""A checkpoint in PyTorch, asked about clips: many selections and many questions of each.

Axes: T frames, W windows, G patches of a window, D vision width, C decoder width, K kept windows;
N questions, L tokens, P tokens of what all questions of a clip have in common.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export.checkpoint import Checkpoint, model_from_checkpoint, open_checkpoint
from stts_export.config import ModelConfig
from stts_export.errors import InputError, MissingDependencyError
from stts_export.limits import DEFAULT_MAX_FRAMES
from stts_export.model.language import attention_mask
from stts_export.model.vlm import SttsModel
from stts_export.preprocessing import (
    DEFAULT_MAX_FPS,
    ImagePreprocessing,
    image_preprocessing,
    video_preprocessing,
)
from stts_export.runtime import planner
from stts_export.runtime.arguments import as_integer
from stts_export.runtime.images import image_crops
from stts_export.runtime.prompt import PromptBuilder, kept_positions
from stts_export.runtime.video import VideoClip, read_video
from stts_export.runtime.visuals import Encoded, EncodedImage
from stts_export.tensors import IMAGE_POOL, LOWER_CHUNK, UPPER_CHUNK
from stts_export.training.selectors import Selection, merge

_DEVICES = re.compile(r"cpu|cuda(:\d+)?")

CacheObserver = Callable[[int, Tensor, Tensor], None]
"""(layer, keys, values) each (N, kv_heads, L, d), as they are added to the cache."""


class CheckpointAnswerer:
    """A model in PyTorch, in fp32, answering with its most likely tokens.

    Args:
        model: stays where it is, and in the mode that it is in.
        prompts: makes token sequences of texts.
        max_frames: sampled frames of a video at most.
        max_fps: sampled frames a second at most.
        images: how images are cut.
        refill: give a frame that is alone in its bin its removed windows back as context.
    """

    def __init__(
        self,
        model: SttsModel,
        prompts: PromptBuilder,
        max_frames: int,
        *,
        max_fps: float = DEFAULT_MAX_FPS,
        images: ImagePreprocessing | None = None,
        refill: bool = True,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.max_frames = max_frames
        self._max_fps = max_fps
        self._images = images or ImagePreprocessing()
        self.cache_observer: CacheObserver | None = None
        """Sees what is added to caches; for statistics."""
        self._refill = refill
        self._device = _device_of(model)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    @property
    def description(self) -> dict[str, Any]:
        """What answers, plain values for JSON."""
        weights = str(self.model.language.embedding.dtype).removeprefix("torch.")
        return {"dtype": weights, "device": str(self._device)}

    def check_ratio(self, ratio: float) -> None:
        """Refuse nothing: a checkpoint can be asked with any ratio."""

    def read(self, file: Path) -> VideoClip:
        """Read a video at the model's size, or an image; see `answerers.Answerer`."""
        size = self.config.vision.image_size
        return read_video(file, max_frames=self.max_frames, max_fps=self._max_fps, size=size)

    def tower(self, clip: VideoClip) -> CheckpointTower:
        """See a video."""
        return CheckpointTower(self.model, clip.frames, refill=self._refill)

    @torch.inference_mode()
    def image(self, clip: VideoClip) -> EncodedImage:
        """See an image."""
        vision = self.config.vision
        cut = image_crops(
            clip.frames[0],
            vision.image_size,
            vision.patch_size,
            max_crops=self._images.max_crops,
            overlap_margins=self._images.overlap_margins,
            pool=IMAGE_POOL,
        )
        crops, pooled = (
            torch.from_numpy(array).to(self._device) for array in (cut.crops, cut.pooled_patches)
        )
        features = self.model.encode_images(crops, pooled).float()
        return EncodedImage(features.cpu().numpy(), cut.grid, len(cut.crops), {})

    @torch.inference_mode()
    def answers(
        self, encoded: Encoded | None, prompts: Sequence[str], limits: Sequence[int]
    ) -> list[str]:
        """Answer questions about one visual, which is read once for all; see `Answerer`."""
        visuals = [] if encoded is None else [encoded.tokens]
        keep = np.ones(0, np.bool_) if encoded is None else encoded.keep.ravel()
        sequences = []
        for prompt in prompts:
            whole = self.prompts.build(prompt, visuals)
            sequences.append(whole[kept_positions(whole, keep, self.config.tokens.im_patch)])
        most = max(limits)
        self._check_length(max(map(len, sequences)) + most)
        is_visual = np.isin(sequences[0], list(self.config.tokens.visual))
        # Up to the last visual token, behind which every token sees only what comes before it.
        shared = 1 + int(np.flatnonzero(is_visual)[-1]) if is_visual.any() else 1
        cache = _Cache(self.config.text.num_layers, self.cache_observer)
        self._read(cache, sequences[0][:shared], None if encoded is None else encoded.features)
        cache.repeat(len(sequences))
        new = self._continue(cache, [ids[shared:] for ids in sequences], shared, most)
        return [self.prompts.decode(ids[:limit]) for ids, limit in zip(new, limits, strict=True)]

    def _check_length(self, tokens: int) -> None:
        longest = self.config.text.max_position_embeddings
        if tokens > longest:
            raise InputError(
                f"{tokens} tokens of prompt and answer",
                where="prompt",
                allowed=f"{longest}, the checkpoint's max_position_embeddings",
                fix="sample fewer frames",
            )

    def _read(self, cache: _Cache, ids: NDArray[np.int64], features: NDArray[Any] | None) -> None:
        """Put the tokens (P,) of a visual and their features (K, C) into the cache."""
        language = self.model.language
        tokens = torch.from_numpy(ids).to(self._device)[None]
        if features is None:
            x = language.lookup(tokens).float()
        else:
            x = language.embed(tokens, torch.from_numpy(features).to(self._device))
        order = torch.arange(len(ids), device=self._device)[None]
        groups = self.model.visual_groups(tokens)
        mask = attention_mask(order, groups, order, groups, self.config.bidirectional_visual)
        language.transform(x, order, mask, cache.write)

    def _continue(
        self, cache: _Cache, tails: Sequence[NDArray[np.int64]], shared: int, most: int
    ) -> list[list[int]]:
        """Continue N prompts by the most likely tokens.

        Args:
            cache: has P tokens of each.
            tails: (L,) each, what follows them.
            shared: P.
            most: new tokens of each at most.

        Returns:
            New tokens without the one that ends an answer.

        Raises:
            InputError: logits have NaN or infinity.
        """
        language = self.model.language
        lengths = torch.tensor([len(tail) for tail in tails], device=self._device)
        ids = np.zeros((len(tails), int(lengths.max())), dtype=np.int64)
        for row, tail in enumerate(tails):
            ids[row, : len(tail)] = tail
        tokens = torch.from_numpy(ids).to(self._device)
        place = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)
        # A row's padding comes after its tokens: they do not see it, and new ones must not.
        seen = torch.ones(len(tails), shared, dtype=torch.bool, device=self._device)
        causal = place[:, :, None] >= place[:, None, :]
        mask = torch.cat([seen[:, None, :].expand(-1, tokens.shape[1], -1), causal], dim=2)
        seen = torch.cat([seen, place < lengths[:, None]], dim=1)
        x = language.lookup(tokens).float()
        x = language.transform(x, shared + place, mask[:, None], cache.write)
        last = x[torch.arange(len(tails), device=self._device), lengths - 1]
        new: list[list[int]] = [[] for _ in tails]
        ended = [False] * len(tails)
        for step in range(most):
            logits = language.lm_head(last).float()
            if not bool(logits.isfinite().all()):
                raise InputError(
                    "logits are not finite",
                    where="checkpoint",
                    fix="the weights are damaged, or training went wrong: use another checkpoint",
                )
            chosen = logits.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                ended[row] |= token in self.prompts.eos_token_ids
                if not ended[row]:
                    new[row].append(token)
            if all(ended) or step + 1 == most:
                break
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            positions = (shared + lengths + step)[:, None]
            last = language.transform(
                language.lookup(chosen[:, None]).float(),
                positions,
                seen[:, None, None],
                cache.write,
            )[:, 0]
        return new


class _Cache:
    """Keys and values of the tokens before, by layer; every call adds its own.

    Args:
        layers: of the decoder.
        observer: sees what every call adds.
    """

    def __init__(self, layers: int, observer: CacheObserver | None = None) -> None:
        self._observer = observer
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (N, kv_heads, L, d) each; returns those of all tokens."""
        if self._observer is not None:
            self._observer(layer, key, value)
        before = self._layers[layer]
        if before is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        self._layers[layer] = key, value
        return key, value

    def repeat(self, count: int) -> None:
        """Make one sequence the beginning of `count`."""
        for layer, pair in enumerate(self._layers):
            assert pair is not None
            self._layers[layer] = (
                pair[0].expand(count, -1, -1, -1),
                pair[1].expand(count, -1, -1, -1),
            )


class CheckpointTower:
    """A clip's way through the vision tower of a model; gives what `SttsModel.encode` gives.

    Args:
        model: in fp32.
        frames: (T, height, width, 3) uint8 at the model's size.
        refill: as in `planner.pack`.
    """

    def __init__(self, model: SttsModel, frames: NDArray[np.uint8], *, refill: bool = True) -> None:
        self._vision = model.vision
        self._config = model.config.vision
        self._refill = refill
        self._frames = torch.from_numpy(frames).to(_device_of(model))

    @property
    def shape(self) -> tuple[int, int]:
        """(T, W)."""
        return len(self._frames), self._config.windows

    @cached_property
    def _before(self) -> Tensor:
        """(T, W*G, D) before scoring."""
        parts = self._frames.split(LOWER_CHUNK)
        return torch.cat([self._vision.before_scoring(part) for part in parts])

    def _after(self, scores: Tensor, fresh: Tensor) -> Tensor:
        """(T*W, G, D) output of the lower part."""
        parts = zip(*(one.split(LOWER_CHUNK) for one in (self._before, scores, fresh)), strict=True)
        hidden = torch.cat([self._vision.after_scoring(*part) for part in parts])
        return hidden.reshape(-1, self._config.patches_per_window, self._config.hidden_size)

    @cached_property
    def _plain(self) -> Tensor:
        """(T*W, G, D) for nothing to be removed."""
        if self._config.pruning is None:
            parts = [self._vision.lower_plain(part) for part in self._frames.split(LOWER_CHUNK)]
            return torch.cat(parts).reshape(
                -1, self._config.patches_per_window, self._config.hidden_size
            )
        fresh = torch.ones(len(self._frames), dtype=torch.bool, device=self._frames.device)
        nothing = torch.zeros(self.shape, device=self._frames.device)
        return self._after(nothing, fresh)

    @cached_property
    def _biased(self) -> tuple[Tensor, NDArray[np.float32] | None]:
        """(T*W, G, D) with the log-bias, and the scores."""
        if self._config.pruning is None:
            return self._plain, None
        fresh = torch.zeros(len(self._frames), dtype=torch.bool, device=self._frames.device)
        fresh[0] = True
        width = self._config.hidden_size
        before = torch.zeros(1, self._config.windows, width, device=self._frames.device)
        scores = self._vision.score(self._before, fresh, before)[0]
        return self._after(scores, fresh), scores.cpu().numpy()

    @torch.inference_mode()
    def scores(self) -> NDArray[np.float32] | None:
        """(T, W) of the scorer; None without one."""
        return self._biased[1]

    @torch.inference_mode()
    def hidden(self) -> NDArray[np.float32]:
        """(T*W, D) output of the lower part, averaged over a window's patches."""
        means: NDArray[np.float32] = self._biased[0].mean(1).cpu().numpy()
        return means

    @cached_property
    def _whole(self) -> NDArray[np.float32]:
        return self._upper(self._plain, np.ones(self.shape, dtype=np.bool_))

    @torch.inference_mode()
    def whole(self) -> NDArray[np.float32]:
        """(T*W, C) features with nothing removed and no log-bias."""
        return self._whole

    @torch.inference_mode()
    def survivors(self, selection: Selection) -> NDArray[np.float32]:
        """(K, C) features of the upper part on what survives, frame-major."""
        rows = self._biased[0]
        if selection.merged_into is not None:
            merged = merge(rows.cpu().numpy(), selection)
            rows = torch.from_numpy(merged).to(rows.device)
        return self._upper(rows, selection.keep)

    def _upper(self, rows: Tensor, keep: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Run on frames of equal window count, which needs no mask; rows (T*W, G, D)."""
        width = self._vision.connector.w2.out_features
        features = torch.empty(int(keep.sum()), width, device=rows.device)
        for group in planner.group_frames(keep, refill=self._refill):
            step = max(1, UPPER_CHUNK * self._config.windows // group.gather_window.shape[1])
            for start in range(0, len(group.gather_window), step):
                part = slice(start, start + step)
                gather = torch.from_numpy(group.gather_window[part]).to(rows.device)
                bins = rows[gather].flatten(1, 2)  # (m, n, G, D) -> (m, n*G, D)
                target = group.feature_row[part]
                found = self._vision.upper(bins)[torch.from_numpy(target >= 0)].float()
                features[torch.from_numpy(target[target >= 0])] = found
        return features.cpu().numpy()


@contextmanager
def open_checkpoint_answerer(
    source: str | Path,
    *,
    max_frames: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    tokenizer: Path | str | None = None,
    refill: bool = True,
) -> Iterator[CheckpointAnswerer]:
    """Load a checkpoint.

    Args:
        source: as for `answerers.open_answerer`, and so are all others but the last.
        max_frames: sampled frames of a video at most.
        threads: within an operator.
        device: "cpu", "cuda" or "cuda:N".
        revision: of a checkpoint on the hub.
        tokenizer: folder with tokenizer files.
        refill: as for `CheckpointAnswerer`, for comparisons.

    Raises:
        InputError: as `answerers.open_answerer`.
        MissingDependencyError: the GPU is not there.
    """
    place = _device(device)
    opened = open_checkpoint(source, revision=revision, tokenizer=tokenizer)
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else as_integer(threads, "threads"))
    try:
        model = model_from_checkpoint(opened).to(place)
        yield answerer_of(opened, model, max_frames, refill=refill)
    finally:
        torch.set_num_threads(before)


def answerer_of(
    source: Checkpoint, model: SttsModel, max_frames: int | None = None, *, refill: bool = True
) -> CheckpointAnswerer:
    """Let a model answer with what its checkpoint says about prompts and pictures.

    Args:
        source: where the model comes from.
        model: of the checkpoint, or made from it.
        max_frames: sampled frames of a video at most; what the checkpoint says when None.
        refill: as for `CheckpointAnswerer`.

    Raises:
        InputError: the checkpoint has no tokenizer, or `max_frames` is not positive.
    """
    with source.config_folder() as folder:
        prompts = PromptBuilder.from_folder(folder, source.config)
        video = video_preprocessing(folder, source.config.vision)
        images = image_preprocessing(folder, source.config.vision)
    if max_frames is None:
        max_frames = video.num_frames or DEFAULT_MAX_FRAMES
    return CheckpointAnswerer(
        model,
        prompts,
        as_integer(max_frames, "max_frames"),
        max_fps=video.max_fps,
        images=images,
        refill=refill,
    )


def _device_of(model: SttsModel) -> torch.device:
    """Return where a model runs: where its norms are, as matrices may still be on the disk."""
    return model.language.norm.weight.device


def _device(name: str | None) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: there is no such kind.
        MissingDependencyError: no GPU can be used.
    """
    if name is not None and not _DEVICES.fullmatch(name):
        raise InputError(f"device {name!r}", where="device", allowed="cpu, cuda or cuda:N")
    place = torch.device(name or "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "PyTorch finds no GPU",
            where=f"device {name}",
            fix="install a CUDA build of PyTorch and a driver, or use --device cpu",
        )
    return place
