"""Keeps two processes from writing the same file or folder at the same time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def only_writer(path: Path, *, folder: bool = False) -> Iterator[None]:
    """Hold a lock on the file `path` (or on the folder `path`, which is made if it is missing).

    The lock belongs to the process, so a process that is killed leaves none. Its file, ``.<name>.lock`` beside the file
    or ``.lock`` in the folder, is removed at the end, and so is a folder that was made for it and is empty.

    Raises BlockingIOError if another process holds the lock, and another OSError if nothing can be written there.
    """
    import filelock  # imported here, so that importing var_kernels loads only what the reference needs

    file = path / ".lock" if folder else path.with_name(f".{path.name}.lock")
    is_new = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()  # filelock would take some of the reasons why this fails for a lock of another process
    lock = filelock.FileLock(str(file))
    try:
        lock.acquire(timeout=0)
        while not file.exists():  # the one who held it has removed it: a lock on a file without a name locks nobody out
            lock.release()
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing to it", str(path)) from None
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # removed while the lock is held, so that it is not the lock of another process
            file.unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # it is not empty
                file.parent.rmdir()
