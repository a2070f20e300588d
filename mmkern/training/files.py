"""Files and texts that somebody else may have written: only regular files are opened, none is read without a limit."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFBIG, EINVAL
from io import BufferedReader
from pathlib import Path

SETTINGS = 1 << 20  # bytes of a configuration or a manifest: a thousand times what they need
JSON = 1 << 26  # bytes of a checkpoint's JSON: a tokenizer of 2^20 tokens has 60 MB
TABLE = 1 << 30  # bytes of a table of samples, which is held in memory
TENSORS = 1 << 36  # bytes of a safetensors file: AdamW's state of the largest model (2^32 weights) has 2^35
LINE = 1 << 20  # characters of a line of word vectors
LOCK = ".lock"


class Refused(ValueError):
    """Something that the user can mend; one line that names the file, the setting or the option."""


class DataError(Refused):
    """What is to be learned from cannot be read."""


class TrainingError(Refused):
    """Training cannot start or go on."""


def text(value: str, where: str) -> str:
    """The text, if it is one.

    Raises:
        DataError: it has a surrogate without its other half, which no tokenizer and no file takes.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: is no Unicode text, it has half a surrogate pair: {value!a}") from None
    return value


def opened(path: Path) -> BufferedReader:
    """A regular file, open for reading; a pipe or a device is refused (OSError) and not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte in the name
        raise OSError(EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(EINVAL, "is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read(path: Path, most: int) -> bytes:
    """The content of a regular file; OSError where it has more than `most` bytes."""
    with opened(path) as file:
        content = b"" if (size := os.fstat(file.fileno()).st_size) > most else file.read(most + 1)
    if (size := max(size, len(content))) > most:
        raise OSError(EFBIG, f"has {size} bytes, of which at most {most} are read", str(path))
    return content


def write(path: Path, content: str) -> None:
    """Writes UTF-8; a kill leaves the file whole, as it was or as it is to be."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(content, encoding="utf-8", errors="xmlcharrefreplace")  # no letter of a name can stop it
    os.replace(partial, path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; the kernel lets go however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            # of the process, and not of those it forks: a loader that outlives a kill -9 holds nothing
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TrainingError(f"{folder}: another process is training in this folder") from None
        yield
