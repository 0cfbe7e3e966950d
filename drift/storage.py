"""Checkpoints on disk: written whole or not at all, and known to be whole when they are read."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from drift.contract import ConfigError, StorageError

# What disks without second names say to one: mounted buckets, exFAT, some network mounts.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_TEMPORARY = ".tmp"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files under another name in the same folder, syncs and renames them."""

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the file, or leaves what was there.

        Raises:
            StorageError: where it cannot be written.
        """
        target = Path(path)
        # Once: a folder that was there and is gone is a lost mount, and a new one would be on another disk.
        if target.parent not in self._folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(target.parent)
        with replacing(target) as new, new.open("wb") as file:
            torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when all is well and is removed when it is not.

    Raises:
        StorageError: where it cannot be written.
    """
    new = temporary(path)
    try:
        yield new
        sync(new)
        new.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # of a lost mount
            new.unlink(missing_ok=True)
        raise storage_error(path, error) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def temporary(path: Path) -> Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def leftovers(folder: Path) -> list[Path]:
    """The files that a process which was killed while writing left behind in a folder."""
    return sorted(folder.glob(f".*{_TEMPORARY}"))


def storage_error(path: Path, error: BaseException) -> StorageError:
    """The error to raise where a checkpoint cannot be written; torch wraps what the system said."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    words = cause.strerror if isinstance(cause, OSError) else None
    reason = words or str(cause or error).partition("\n")[0]
    kept = "the one before is kept" if path.exists() else "there is none before it"
    return StorageError(
        f"{path}: the checkpoint cannot be written ({reason}); {kept}; free space or mount the disk again, "
        "then go on with --resume auto, or set checkpoint.dirpath to another disk"
    )


def require_folder(key: str, folder: str | Path) -> None:
    """Makes a folder to write to; raises ConfigError, under a setting's key, where that cannot be."""
    reason = _no_folder(Path(folder))
    if reason:
        raise ConfigError(
            f"{key} is {str(folder)!r}: it cannot be made ({reason}); name a folder that can be written to"
        )


def require_file(key: str, path: str) -> None:
    """Makes the folder of a file to write; raises ConfigError, under its key, where that cannot be."""
    reason = "it is a folder" if Path(path).is_dir() else _no_folder(Path(path).parent)
    if reason:
        raise ConfigError(
            f"{key} is {path!r}: it cannot be written ({reason}); name a file in a folder that can be "
            "written to"
        )


def _no_folder(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"


def sync(path: Path) -> None:
    """Has the system write a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(old: Path, new: Path) -> None:
    """Gives a checkpoint a second name, in place of what had it; both stay when one is replaced.

    Where the disk knows no second names, it loses the first: to be called before another takes that.
    """
    first = temporary(new)
    first.unlink(missing_ok=True)
    try:
        first.hardlink_to(old)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        old.replace(first)
    first.replace(new)
    sync(new.parent)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in words; None where every byte is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        return f"it is cut short or no checkpoint ({type(error).__name__})"
    return None if part is None else f"its bytes have changed since it was written ({part})"
