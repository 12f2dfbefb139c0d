"""How pictures and frames stand in a prompt: the special tokens around their `<im_patch>`.

A checkpoint's `processor_config.json` has switches for it; all of them are honoured or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import json_object

IM_PATCH = "<im_patch>"
_IM_START, _IM_END, _IM_COL = "<im_start>", "<im_end>", "<im_col>"
_LOW_RES_START = "<low_res_im_start>"
_FRAME_START, _FRAME_END = "<frame_start>", "<frame_end>"

_FILE = "processor_config.json"
# Switches whose other value gives prompts that are not implemented.
_FIXED = {
    "video_use_col_tokens": False,
    "use_low_res_token_for_global_crops": False,
    "time_mode": "per-frame-compact",
}
_BOOLEANS = (
    "image_use_col_tokens",
    "use_single_crop_col_tokens",
    "use_single_crop_start_token",
    "use_frame_special_tokens",
    "per_frame_special_token",
)


@dataclass(frozen=True)
class PromptLayout:
    """Special tokens around visual ones; the defaults are those of Molmo2's processor."""

    frame_tokens: bool = True
    """`<frame_start>` and `<frame_end>` for video; else `<im_start>` and `<im_end>`."""
    around_each_frame: bool = True
    """One pair of them around every frame; else one around all frames and their times."""
    image_columns: bool = True
    """`<im_col>` after every row of an image's high-resolution part."""
    overview_columns: bool = True
    """`<im_col>` after every row of the whole image at low resolution."""
    overview_start: bool = True
    """The low-resolution part begins with `<low_res_im_start>`; else with `<im_start>`."""

    def frame_names(self) -> tuple[str, str]:
        """Return the tokens before and after the windows of a frame."""
        return (_FRAME_START, _FRAME_END) if self.frame_tokens else (_IM_START, _IM_END)

    def image_names(self) -> set[str]:
        """Return the special tokens that an image needs."""
        names = {_IM_START, _IM_END, IM_PATCH}
        if self.overview_start:
            names.add(_LOW_RES_START)
        if self.image_columns or self.overview_columns:
            names.add(_IM_COL)
        return names

    def image_text(self, grid: tuple[int, int, int, int]) -> str:
        """Return the tokens of an image, the overview first.

        Args:
            grid: rows and columns of tokens of the overview, then of the high-resolution part.
        """
        rows, columns, high_rows, high_columns = grid
        start = _LOW_RES_START if self.overview_start else _IM_START
        overview = (IM_PATCH * columns + _IM_COL * self.overview_columns) * rows
        high = (IM_PATCH * high_columns + _IM_COL * self.image_columns) * high_rows
        return f"{start}{overview}{_IM_END}{_IM_START}{high}{_IM_END}"

    def video_text(self, timestamps: list[float], windows: int) -> str:
        """Return the frames of a video, each with its time before it.

        Args:
            timestamps: seconds, one per frame.
            windows: windows of a frame.
        """
        start, end = self.frame_names()
        if self.around_each_frame:
            frame = f"{start}{IM_PATCH * windows}{end}"
            return " ".join(f"{seconds:.1f} {frame}" for seconds in timestamps)
        frames = " ".join(f"{seconds:.1f} {IM_PATCH * windows}" for seconds in timestamps)
        return f"{start}{frames}{end}"


def prompt_layout(folder: Path, config: ModelConfig) -> PromptLayout:
    """Read a folder's `processor_config.json`; absent or null keys have the processor's defaults.

    `per_frame_special_token` is a switch of the training code alone, which its own folders keep.

    Args:
        folder: a checkpoint folder or a bundle's `config/`.
        config: the model of that folder; it decides about frame tokens where the file is silent.

    Raises:
        InputError: a switch has the wrong type, asks for a prompt that is not implemented, or
            contradicts `config.json`.
    """
    path = folder / _FILE
    values = {key: value for key, value in json_object(path).items() if value is not None}
    for key in _BOOLEANS:
        _boolean(values, key, path)
    for key, allowed in _FIXED.items():
        if isinstance(allowed, bool):
            _boolean(values, key, path)
        if values.get(key, allowed) != allowed:
            shown = str(values[key]).lower() if isinstance(allowed, bool) else repr(values[key])
            raise InputError(
                f"{key} is {shown}",
                where=str(path),
                allowed=str(allowed).lower() if isinstance(allowed, bool) else repr(allowed),
                fix="the prompts it asks for are not implemented",
            )
    columns = values.get("image_use_col_tokens", True)
    return PromptLayout(
        frame_tokens=_frame_tokens(values, config, path),
        around_each_frame=values.get("per_frame_special_token", True),
        image_columns=columns,
        overview_columns=values.get("use_single_crop_col_tokens", columns),
        overview_start=values.get("use_single_crop_start_token", True),
    )


def _boolean(values: dict[str, Any], key: str, path: Path) -> None:
    if not isinstance(values.get(key, False), bool):
        raise InputError(f"{key} is {values[key]!r}", where=str(path), allowed="true or false")


def _frame_tokens(values: dict[str, Any], config: ModelConfig, path: Path) -> bool:
    wanted: bool = values.get("use_frame_special_tokens", config.use_frame_special_tokens)
    if wanted != config.use_frame_special_tokens and "use_frame_special_tokens" in config.extra:
        raise InputError(
            f"use_frame_special_tokens is {wanted}, config.json says "
            f"{config.use_frame_special_tokens}",
            where=str(path),
            fix="set both files to what the model was trained with",
        )
    return wanted
