"""Folders of checkpoints: local ones, and repositories on the Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from ..files.reading import TAKEN_ALONG, TEXT_FILES, is_folder, user_path
from .published import SIDECAR
from .tensor_files import INDEX_NAME

logger = logging.getLogger(__name__)


WIDTHS_NAME = "elastic_widths.json"
# Whatever is read, the weights beside it, and what exports take along.
HUB_FILES = (
    "config.json",
    SIDECAR,
    WIDTHS_NAME,
    INDEX_NAME,
    *TEXT_FILES,
    "*.safetensors",
    *TAKEN_ALONG,
)
# A snapshot need not be complete without a network: these are not read, or missed when they are.
_SPARED = ("*.safetensors", *TAKEN_ALONG)


def resolve_folder(
    path_or_hub_id: str | Path, revision: str | None = None, files: Sequence[str] = HUB_FILES
) -> Path:
    """The local folder of a checkpoint: the path itself, else a snapshot from the Hub.

    Without a network (or with the Hub client set to offline) the newest snapshot in the Hub
    client's cache is used. The cache is only read.

    Args:
        path_or_hub_id: folder, or ``owner/name``.
        revision: branch, tag or commit, for a Hub id only.
        files: patterns of the files to fetch, for a Hub id only.

    Returns:
        The folder.

    Raises:
        CheckpointError: says everything that was tried.
    """
    path = user_path(path_or_hub_id, "checkpoint: path")
    if is_folder(path):
        if revision is not None:
            raise CheckpointError(
                f"checkpoint: revision must be None for a folder, got {revision!r} for {path}"
            )
        return path
    text = str(path_or_hub_id)
    parts = text.split("/")
    there = os.path.lexists(path)
    if there or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        kind = "a file" if there else "neither (no such folder)"
        raise CheckpointError(
            f"checkpoint: path must be a checkpoint folder or a Hub id owner/name, got "
            f"{shown(text, 300)}, "
            f"which is {kind}"
        )
    return _from_hub(text, revision, files)


def _from_hub(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = repo if revision is None else f"{repo} at revision {revision}"
    arguments: dict[str, Any] = {"revision": revision, "allow_patterns": list(files)}
    try:
        return Path(snapshot_download(repo, **arguments))
    except (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        raise CheckpointError(
            f"checkpoint: {wanted} must be a folder or a readable Hub repository; tried the folder "
            f"{repo} (none) and the Hub: {error}"
        ) from error
    except Exception as error:  # the HTTP client's own errors have no common public base
        online = error
    try:
        arguments["allow_patterns"] = [name for name in files if name not in _SPARED]
        folder = Path(snapshot_download(repo, local_files_only=True, **arguments))
    except Exception as offline:
        raise CheckpointError(
            f"checkpoint: {wanted} must be a folder, on the Hub or in the Hub cache; tried the "
            f"folder {repo} (none), the Hub ({type(online).__name__}: {online}) and the cache "
            f"({type(offline).__name__}: {offline}); connect, or pass a folder"
        ) from offline
    logger.warning(
        "checkpoint: the Hub gave %s; using the cached %s", type(online).__name__, folder
    )
    return folder


def is_download_cache(folder: str | Path) -> bool:
    """True if ``folder`` belongs to a Hub download cache, whose files must not be touched.

    True for ``models--*/snapshots/<commit>`` folders, for anything under the Hub client's cache
    folder, and where config.json is a link into a ``blobs`` folder.
    """
    from huggingface_hub import constants

    folder = Path(folder).expanduser().absolute()
    hub = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    for path in {folder, folder.resolve()}:
        chain = (path, *path.parents)
        if hub in chain or any(p.parent.name == "snapshots" for p in chain[:2]):
            return True
        if any(p.name.startswith(("models--", "datasets--")) for p in chain):
            return True
    config = folder / "config.json"
    return config.is_symlink() and config.resolve().parent.name == "blobs"


def config_folder(config_home: str | Path | None = None) -> Path:
    """Folder of the user's width tables, ``<config_home>/elastic_infer/widths``.

    Args:
        config_home: the user's config folder, None = ``~/.config``.
    """
    home = Path("~/.config").expanduser() if config_home is None else Path(config_home)
    return home / "elastic_infer" / "widths"
