"""Where compiled libraries and measurements are kept, and whether code may be loaded from there.

This module needs the standard library only, because `build.py` uses it as a script as well, without the package.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_roots() -> Iterator[Path]:
    """The directories in which a compiled library may be, in the order in which they are looked at.

    ``VAR_KERNELS_CACHE`` is the only one if it is set. Else it is ``var_kernels`` in the user's cache directory, if the
    user has one, and then a directory of this user for temporary files.
    """
    explicit = os.environ.get("VAR_KERNELS_CACHE")
    # os.path.expanduser leaves "~" as it is for a user without a home, such as one that only `docker run -u` knows;
    # Path.home raises RuntimeError.
    home = os.path.expanduser("~")
    if explicit:
        path = os.path.expanduser(explicit)
        if path.startswith("~"):
            raise OSError(f"VAR_KERNELS_CACHE: expected a directory, got {explicit!r}, and there is no such home")
        yield Path(path).resolve()
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if os.path.isabs(caches):
        yield Path(caches, "var_kernels")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        temporary = tempfile.gettempdir()
    except OSError:  # there is no directory for temporary files
        return
    yield Path(temporary, f"var_kernels-{user}")


def cache_root() -> Path:
    """The first of :func:`cache_roots` that this user can write to, else the last one. Raises OSError if there is none.
    """
    roots = list(cache_roots())
    if not roots:
        raise OSError("there is no directory to keep compiled kernels in: set VAR_KERNELS_CACHE")
    return next(filter(_can_write, roots), roots[-1])


def _can_write(path: Path) -> bool:
    """Whether the directory `path` is there and writable, or can be made."""
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises an error below an unreadable directory
        path = path.parent
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def private_directory(path: Path) -> Path:
    """`path`, which is made for this user alone if it is missing. Raises OSError if others can write to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_shared(path)
    return path


def refuse_shared(path: Path) -> None:
    """Raise OSError if another user than this one and root can replace what is at `path`.

    Code of another user would run with the rights of this one. In a directory with the sticky bit, only the owner of a
    file can replace it.
    """
    if not hasattr(os, "getuid"):
        return
    user, found = os.geteuid(), os.stat(path)
    # Many systems give each user a group of the same number, to which nobody else belongs.
    writers = stat.S_IWOTH | (0 if found.st_gid == found.st_uid else stat.S_IWGRP)
    strangers = {found.st_uid, os.lstat(path).st_uid} - {user, 0}  # lstat: somebody else may have set a symbolic link
    if strangers or (found.st_mode & writers and not (path.is_dir() and found.st_mode & stat.S_ISVTX)):
        raise PermissionError(f"other users can write to {path}, so no code is loaded from there")
