"""Checkpoints on the Hugging Face hub, downloaded into its usual cache."""

from __future__ import annotations

import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stts_export.checkpoint.huggingface import INDEX, SINGLE
from stts_export.checkpoint.stored import some
from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import json_object, readable_size

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors",)
# Neither pickles nor code.
_CONFIG = (
    "*.json", "tokenizer*", "*.txt", "*.jinja", "*.model", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_FOLDER = "or download it elsewhere and pass the folder"


def is_repository(name: str) -> bool:
    """Whether a text has the form of a name on the hub: OWNER/NAME."""
    return _NAME.fullmatch(name) is not None


def download(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Download what a build needs, or find it in the cache.

    Args:
        name: OWNER/NAME on the hub.
        revision: branch, tag or commit; the main branch when None.
        weights: whether the weights are wanted.

    Returns:
        The folder in the cache; its name is the commit.

    Raises:
        InputError: there is no such repository or revision, it is gated, there is no network, or
            it does not fit on the disk.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise MissingDependencyError(
            f"is no folder here, and to look for it on the hub needs huggingface_hub: {error}",
            where=name,
            fix=f"pip install 'stts-export[export]', {_FOLDER}",
        ) from None
    patterns = [*(_WEIGHTS if weights else ()), *_CONFIG]
    at = f" at revision {revision}" if revision else ""
    try:
        try:
            found = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception as error:  # the HTTP client's own errors: no network, or a cut one
            return _cached(hub, name, revision, patterns, weights, error)
        _check(hub, found, name, patterns, weights, Path(constants.HF_HUB_CACHE))
        # By its name first: the cache keeps which commit that is, for when there is no network.
        folder = hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        if Path(folder).name != found.sha:  # the branch has moved since it was checked
            folder = hub.snapshot_download(name, revision=found.sha, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise InputError(
            "is gated: its owner must grant access first",
            where=name,
            fix=f"ask for access on the hub and log in with `hf auth login`, {_FOLDER}",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"has no revision {revision}", where=name, allowed="a branch, a tag or a commit"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            "is neither a folder here nor a repository on the hub that can be read",
            where=name,
            fix=f"check the name; a private one needs `hf auth login`, {_FOLDER}",
        ) from None
    except InputError:
        raise
    except Exception as error:  # of the hub, of its HTTP client, or of the disk
        raise InputError(
            f"cannot be downloaded{at}: {_first_line(error)}",
            where=name,
            fix=f"try again, {_FOLDER}",
        ) from None
    return Path(folder)


def _cached(
    hub: Any,
    name: str,
    revision: str | None,
    patterns: list[str],
    weights: bool,
    error: Exception,
) -> Path:
    """Take an earlier download when there is no network."""
    fix = "connect to the network, or pass the folder of a copy"
    try:
        folder = Path(
            hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except Exception as found:
        # Newer clients know that a download is incomplete; otherwise nothing is in the cache.
        known = getattr(found, "snapshot_path", None)
        if known is None:
            raise InputError(
                f"is no folder here, and the hub cannot be reached: {_first_line(error)}",
                where=name,
                fix=fix,
            ) from None
        folder = Path(known)
    missing = _missing(folder, weights)
    if missing:
        raise InputError(
            f"its earlier download lacks {some(missing)}, and the hub cannot be reached: "
            f"{_first_line(error)}",
            where=name,
            fix=fix,
        ) from None
    return folder


def _missing(folder: Path, weights: bool) -> list[str]:
    """Files that a download needs and a folder of the cache does not have."""
    if not weights:
        needed = {"config.json"}
    elif (folder / INDEX).exists():
        shards = json_object(folder / INDEX).get("weight_map")
        named = shards.values() if isinstance(shards, dict) else ()
        needed = {"config.json", *(name for name in named if isinstance(name, str))}
    else:
        needed = {"config.json", SINGLE}
    return sorted(file for file in needed if not (folder / file).exists())


def _check(
    hub: Any, found: Any, name: str, patterns: list[str], weights: bool, cache: Path
) -> None:
    """Refuse a repository without safetensors, and one that the disk cannot hold."""
    files = [
        file
        for file in found.siblings or ()
        if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
    ]
    if weights and not any(file.rfilename.endswith(".safetensors") for file in files):
        raise InputError(
            "has no safetensors",
            where=name,
            allowed="a Hugging Face Molmo2 repository; other formats only as a folder",
        )
    needed = sum(
        file.size or 0
        for file in files
        if not isinstance(hub.try_to_load_from_cache(name, file.rfilename, revision=found.sha), str)
    )
    cache = Path(os.path.realpath(cache))
    free = shutil.disk_usage(next(part for part in (cache, *cache.parents) if part.exists())).free
    if free < needed:
        raise InputError(
            f"{readable_size(free)} free in the hub's cache",
            where=str(cache),
            allowed=f"{readable_size(needed)} for {name}",
            fix="free some space, or set HF_HOME to a folder on another disk",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
