"""Files: where a path leads, text that comes in, and how a file is written. Imports no torch."""

import codecs
import contextlib
import io
import json
import os
import reprlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from text import encoding

MAX_JSON = 2**27  # bytes; the largest tokenizer.json that people use has 35 MB
LINE = 2000  # characters of a message; what a file holds may be of any length
SHORT = reprlib.Repr()  # for values in messages
SHORT.maxstring = 80


def path_of(text: str) -> Path:
    """A path as a person types it: ~ is the home folder; what is no user's stays as it is."""
    return Path(os.path.expanduser(text))


def utf8_decoder() -> io.IncrementalNewlineDecoder:
    """How all text comes in: as UTF-8, without a byte order mark, its newlines as \\n."""
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), True)


def read_text(path: Path) -> str:
    """The text in a file. Raises OSError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    data = path.read_bytes()
    try:
        return utf8_decoder().decode(data, final=True)
    except UnicodeDecodeError as e:
        guessed = encoding.perhaps(data, encoding.guess(data))
        raise ValueError(
            f"{path} is not UTF-8 text (byte {e.start}){guessed}; save it as UTF-8"
        ) from e


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError or OSError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: not read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def whole(value: Any, low: int = 0, high: int = 2**48) -> bool:
    """Whether a value out of a file is an int within bounds."""
    return type(value) is int and low <= value <= high


@contextlib.contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """The path of a new, empty file, which takes the place of `path` at the end.

    So that a crash at any moment leaves the old file or the whole new one; what is raised inside
    leaves the old one, too. A link that stands in the way is deleted. mark: part of the new
    file's name, for writers of one path in several processes.
    """
    temp = path.with_name(f"{path.name}{mark}.tmp")
    try:
        temp.unlink(missing_ok=True)
        with open(temp, "xb"):
            pass
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def write(path: Path, contents: str | bytes, mark: str = "") -> None:
    """Write a small file whole or not at all, text as UTF-8; mark as in `replacing`."""
    data = contents.encode() if isinstance(contents, str) else contents
    with replacing(path, mark) as temp:
        temp.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where the system and its disk can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network disks cannot
            os.fsync(handle)
        os.close(handle)


def printable(text: str, keep: str = "") -> str:
    """A text for a terminal: control characters, but those in `keep`, are dots.

    They would ring a bell, move the cursor, or have the terminal do what a text says.
    """
    control = {c for c in text if unicodedata.category(c) in ("Cc", "Cs")}
    return "".join("·" if c in control and c not in keep else c for c in text)


def line_of(e: BaseException) -> str:
    """What an error says, as a user reads it: one line, its middle left out if it is long."""
    line = printable(" ".join(str(e).split()))
    return line if len(line) <= LINE else f"{line[: LINE - 500]} ... {line[-490:]}"


def reason(e: BaseException) -> str:
    """What an error says, in one line; the compiler's own says what is inside."""
    e = getattr(e, "inner_exception", None) or e
    return next(iter(str(e).strip().splitlines()), "") or type(e).__name__


def named_reason(e: BaseException) -> str:
    """The same behind the kind of the error, for those of other libraries."""
    e = getattr(e, "inner_exception", None) or e
    return f"{type(e).__name__}: {reason(e)}"
