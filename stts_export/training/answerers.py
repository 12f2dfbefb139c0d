"""Who is asked when accuracy is measured: a bundle, or a checkpoint in PyTorch.

Both see a clip the same way: the part of the tower below the removal runs once, and every ratio and
selector goes on from there. What is kept and how it is averaged is decided in NumPy for both.
Axes: T frames, W windows, G patches of a window, D vision width, C decoder width, K kept windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stts_export import Session
from stts_export.bundle import is_bundle
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.runtime import vision
from stts_export.runtime.planner import n_prune
from stts_export.runtime.prompt import PromptBuilder
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import Encoded, EncodedClip, EncodedImage
from stts_export.training.selectors import (
    Selection,
    after_tower,
    merge,
    needs_hidden,
    select_features,
    select_windows,
)


class Tower(Protocol):
    """A clip's way through the vision side; what several selections share is computed once."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, W)."""

    def scores(self) -> NDArray[np.float32] | None:
        """(T, W) of the scorer; None without one."""

    def hidden(self) -> NDArray[np.float32]:
        """(T*W, D) output of the lower part, averaged over a window's patches."""

    def whole(self) -> NDArray[Any]:
        """(T*W, C) features with nothing removed and no log-bias."""

    def survivors(self, selection: Selection) -> NDArray[Any]:
        """(K, C) features of the upper part on what survives, frame-major."""


class Answerer(Protocol):
    """A model that sees and answers."""

    prompts: PromptBuilder
    max_frames: int
    """Sampled frames of a video at most."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    @property
    def description(self) -> dict[str, Any]:
        """What answers, plain values for JSON."""

    def check_ratio(self, ratio: float) -> None:
        """Refuse a ratio above 0 that it cannot be asked with.

        Raises:
            InputError: it is below the lowest that was built for.
        """

    def read(self, file: Path) -> VideoClip:
        """Read a video at the model's size, or an image at its own.

        Raises:
            InputError: as `read_video`.
        """

    def tower(self, clip: VideoClip) -> Tower:
        """See a video."""

    def image(self, clip: VideoClip) -> EncodedImage:
        """See an image."""

    def answers(
        self, encoded: Encoded | None, prompts: Sequence[str], limits: Sequence[int]
    ) -> list[str]:
        """Answer questions about one visual, or about none, each on its own.

        Args:
            encoded: what was seen.
            prompts: one or more.
            limits: most tokens of each answer.

        Raises:
            InputError: a prompt is too long or contains special tokens, or logits are not finite.
        """


def encode(
    tower: Tower,
    timestamps: NDArray[np.float64],
    ratio: float,
    selector: str,
    rng: np.random.Generator,
) -> EncodedClip:
    """Encode a clip with what a selector keeps of it.

    Args:
        tower: the clip's.
        timestamps: (T,) seconds.
        ratio: fraction of windows to remove.
        selector: one of `SELECTORS`.
        rng: decides for `random`.

    Raises:
        InputError: the model has no scorer, and the selector needs it.
    """
    frames, windows = tower.shape
    count = n_prune(windows, frames, ratio)
    if count == 0:
        selection = Selection(np.ones(tower.shape, dtype=np.bool_))
        features = tower.whole()
    elif after_tower(selector):
        whole = tower.whole()
        selection = select_features(whole, tower.shape, count)
        features = whole[selection.keep.ravel()]
    else:
        selection = select_windows(
            selector,
            tower.shape,
            count,
            scores=tower.scores(),
            hidden=tower.hidden() if needs_hidden(selector) else None,
            rng=rng,
        )
        features = tower.survivors(selection)
    return EncodedClip(None, selection.keep, features, timestamps, ratio, None, {})


class BundleAnswerer:
    """A bundle, answering as it does for its users.

    Args:
        session: of the bundle; stays the caller's to close.
        max_frames: sampled frames of a video at most; the bundle's limit when None.

    Raises:
        InputError: the bundle has no tokenizer, or takes fewer frames.
    """

    def __init__(self, session: Session, max_frames: int | None = None) -> None:
        limits, where = session.bundle.manifest.limits, str(session.bundle.folder)
        if session.prompts is None:
            raise InputError(
                "has no tokenizer, so it cannot be asked in words",
                where=where,
                fix="add tokenizer.json to the checkpoint folder and build again",
            )
        if max_frames is not None and not 1 <= max_frames <= limits.max_frames:
            raise InputError(
                f"max_frames is {max_frames}",
                where=where,
                allowed=f"1..{limits.max_frames}, the bundle's limit",
            )
        self.session = session
        self.prompts = session.prompts
        self.max_frames = limits.max_frames if max_frames is None else max_frames

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.session.config

    @property
    def description(self) -> dict[str, Any]:
        """What answers, plain values for JSON."""
        manifest = self.session.bundle.manifest
        return {"precision": manifest.precision, "backend": self.session.backend}

    def check_ratio(self, ratio: float) -> None:
        """Refuse a ratio below the bundle's lowest; see `Answerer`."""
        lowest = self.session.bundle.manifest.limits.min_prune_ratio
        if ratio < lowest:
            raise InputError(
                f"prune ratio {ratio:g}",
                where=str(self.session.bundle.folder),
                allowed=f"{lowest:g} or more, the bundle's min_prune_ratio",
            )

    def read(self, file: Path) -> VideoClip:
        """Read a video at the model's size, or an image; see `Answerer`."""
        return self.session.read_video(file, self.max_frames)

    def tower(self, clip: VideoClip) -> Tower:
        """See a video."""
        return _BundleTower(self.session, clip.frames)

    def image(self, clip: VideoClip) -> EncodedImage:
        """See an image."""
        return self.session.encode_image(clip)

    def answers(
        self, encoded: Encoded | None, prompts: Sequence[str], limits: Sequence[int]
    ) -> list[str]:
        """Answer questions one by one; see `Answerer`."""
        visuals: list[Encoded] = [] if encoded is None else [encoded]
        answers = []
        for prompt, limit in zip(prompts, limits, strict=True):
            answer = self.session.generate(visuals, prompt, max_new_tokens=limit)
            answers.append(answer.text or "")
        return answers


class _BundleTower:
    """A clip's way through the graphs of a bundle.

    Args:
        session: of the bundle.
        frames: (T, height, width, 3) uint8 at the model's size.
    """

    def __init__(self, session: Session, frames: NDArray[np.uint8]) -> None:
        self._runners = session.vision_runners()
        self._config = session.config.vision
        self._precision = session.bundle.manifest.precision
        self._frames = frames

    @property
    def shape(self) -> tuple[int, int]:
        """(T, W)."""
        return len(self._frames), self._config.windows

    @cached_property
    def _plain(self) -> Any:
        """(T, W*G, D) in the runners' memory: for nothing to be removed."""
        return self._lower(plain=True)[0]

    @cached_property
    def _biased(self) -> tuple[Any, NDArray[np.float32] | None]:
        """The same with the log-bias, and the scores on the host."""
        if self._config.pruning is None:
            return self._plain, None
        hidden, scores = self._lower(plain=False)
        return hidden, self._runners.lower.to_host(scores)

    def _lower(self, plain: bool) -> tuple[Any, Any]:
        return vision.run_lower(
            self._runners.lower, self._config, self._precision, self._frames, plain
        )

    def scores(self) -> NDArray[np.float32] | None:
        """(T, W) of the scorer; None without one."""
        return self._biased[1]

    def hidden(self) -> NDArray[np.float32]:
        """(T*W, D) output of the lower part, averaged over a window's patches."""
        means: NDArray[np.float32] = self._rows().astype(np.float32).mean(axis=1)
        return means

    def _rows(self) -> NDArray[Any]:
        """(T*W, G, D) output of the lower part on the host."""
        hidden = self._runners.lower.to_host(self._biased[0])
        return hidden.reshape(-1, self._config.patches_per_window, self._config.hidden_size)

    @cached_property
    def _whole(self) -> NDArray[Any]:
        return vision.finish(self._runners, self._config, self._plain, None, 0).features

    def whole(self) -> NDArray[Any]:
        """(T*W, C) features with nothing removed and no log-bias."""
        return self._whole

    def survivors(self, selection: Selection) -> NDArray[Any]:
        """(K, C) features of the upper part on what survives, frame-major."""
        hidden, scores = self._biased
        if selection.merged_into is not None:
            merged = merge(self._rows(), selection).reshape(hidden.shape)
            hidden = self._runners.lower.zeros(merged.shape, merged.dtype)
            self._runners.lower.copy(hidden, merged)
        count = int((~selection.keep).sum())
        return vision.finish(
            self._runners, self._config, hidden, scores, count, keep=selection.keep
        ).features


@contextmanager
def open_answerer(
    source: str | Path,
    *,
    max_frames: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    plugin: Path | None = None,
    revision: str | None = None,
    tokenizer: Path | str | None = None,
) -> Iterator[Answerer]:
    """Open what is to be asked.

    Args:
        source: a bundle, or a checkpoint as for `open_checkpoint`.
        max_frames: sampled frames of a video at most; what the bundle or the checkpoint says when
            None.
        threads: threads within an operator; all cores when None.
        device: "cpu" or "cuda"; as for `Session.open` with a bundle.
        backend: as for `Session.open`; bundles only.
        plugin: as for `Session.open`; bundles only.
        revision: of a checkpoint on the hub.
        tokenizer: folder with the tokenizer files of a checkpoint that has none.

    Raises:
        InputError: nothing readable there, or an argument that is not for it.
        MissingDependencyError: PyTorch for a checkpoint, the back end for a bundle, or a GPU is
            not there.
    """
    is_checkpoint = not is_bundle(Path(source))
    foreign = (
        {"backend": backend, "plugin": plugin}
        if is_checkpoint
        else {"revision": revision, "tokenizer": tokenizer}
    )
    for name, value in foreign.items():
        if value is not None:
            own, other = ("bundle", "checkpoint")[:: -1 if is_checkpoint else 1]
            raise InputError(
                f"{name} {value} is for a {other}",
                where=str(source),
                allowed=f"a {other}; this is a {own}",
                fix="leave it out",
            )
    if is_checkpoint:
        from stts_export.training.checkpoint_answerer import open_checkpoint_answerer

        with open_checkpoint_answerer(
            source,
            max_frames=max_frames,
            threads=threads,
            device=device,
            revision=revision,
            tokenizer=tokenizer,
        ) as answerer:
            yield answerer
    else:
        with Session.open(source, backend, device, threads, plugin) as session:
            yield BundleAnswerer(session, max_frames)
