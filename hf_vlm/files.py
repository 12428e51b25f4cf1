"""Files that are whole or not there, and folders that one process holds.

- A file is written under a temporary name, synced to disk, and moved into place: a reader, a kill or a full disk never
  meets half of it.
- A process that writes to a folder holds its lock. The lock ends with the process, however that ends.
"""

import errno
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".hf_vlm.lock"


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def replace_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Writes a file whole or not at all; returns its path.

    Args:
        path: The file; an existing one is replaced, through a link too.
        write: Writes the content to the path that it is given.
    """
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        write(unfinished)
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file whole or not at all; returns its path."""
    return replace_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def hold_folder(folder: str | Path) -> AbstractContextManager:
    """Holds a folder, which is created if it does not exist, against other processes.

    A process may hold a folder several times. Of the ranks of one run only the first holds it.

    Args:
        folder: The folder that the process is about to write to.

    Returns:
        A context that holds the folder until it is left, or until it is deleted.

    Raises:
        ValueError: if another process holds the folder, or it cannot be written to.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return nullcontext()
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, is_singleton=True, thread_local=False, on_acquired=_sign).acquire(blocking=False)
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise ValueError(f"{folder} is in use by {holder}: wait for its end, or choose another folder.") from None
    except NotImplementedError:  # a file system without locks
        return nullcontext()
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return nullcontext()
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another folder.") from error


def _sign(descriptor: int) -> None:
    """Writes who holds the lock into its file."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)


__all__ = ["LOCK_NAME", "hold_folder", "replace_file", "sync", "write_text"]
