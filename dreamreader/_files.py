"""Writing files so that an interruption leaves the old file or the new one, never a part."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamreader.errors import InvalidInput


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`, renamed to `path` when the block ends well.

    Args:
        path: the file to write; missing folders are made.

    Returns:
        A context manager whose value is the temporary path. After any exception, Ctrl-C
        included, the temporary file is gone and `path` is what it was.

    Example:
        >>> with replacing("picture.png") as part:
        ...     picture.save(part, format="PNG")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, because a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(target)
        sync(target.parent)  # else a crash may undo the renaming
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a whole file at once or not at all; text is UTF-8.

    Args:
        path: the file to write; missing folders are made, an existing file is replaced.
        content: text or bytes.

    Returns:
        The path written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as part:
        part.write_bytes(data)
    return Path(path)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, renamed to `path` when the block ends well.

    Raises:
        InvalidInput: there is something at `path` already, or it cannot be written.
    """
    target = Path(path)
    if target.exists():
        raise InvalidInput(f"{target} is there already; name a new folder")
    with explain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield part
        with explain_disk_errors(target):
            part.chmod(0o777 & ~_umask())
            sync(part)
            part.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps a second process out of it, until the block ends or we are killed.

    Raises:
        InvalidInput: another one is in it, or the folder cannot be written or locked.
    """
    with explain_disk_errors(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if made:
            sync(folder.parent)
        handle = _open_lock(folder, os.O_RDWR)
    try:
        _lock(handle, folder, exclusive=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def lock_for_reading(folder: Path) -> Iterator[None]:
    """Keeps processes that write out of a folder until the block ends; needs no right to write.

    A folder that has no lock, and in which none can be made, is read as it is.

    Raises:
        InvalidInput: a process writes there, or the folder cannot be locked.
    """
    try:
        handle = _open_lock(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise InvalidInput(f"{folder} cannot be read: {error.strerror}") from error
        yield
        return
    try:
        _lock(handle, folder, exclusive=False)
        yield
    finally:
        os.close(handle)


def _open_lock(folder: Path, flags: int) -> int:
    try:
        # not through a link: what it points to is somebody else's
        return os.open(folder / ".lock", flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidInput(f"{folder / '.lock'} is a link; delete it") from error
        raise


def _lock(handle: int, folder: Path, exclusive: bool) -> None:
    import fcntl  # not on Windows

    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInput(f"{folder}: another process runs here") from None
    except OSError as error:
        raise InvalidInput(
            f"{folder} cannot be locked ({error.strerror}): its file system has no file locks, and "
            "without them two processes could write there; choose a folder on another one"
        ) from error


@contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into an error that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's error only in its text
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
        full[errno.EFBIG] = "a file would exceed the size limit"
        if number in full:
            raise InvalidInput(
                f"{folder}: {full[number]}; what was finished is kept. Make room and run "
                "the same command again to go on"
            ) from error
        reason = str(error) if number is None else os.strerror(number)
        raise InvalidInput(f"{folder} cannot be written: {reason}") from error
