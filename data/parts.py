"""What a source falls into: its files, by kind, cut or joined into parts of similar size.

A part is what one worker turns into a file of tokens: a few small files, a byte range of a .jsonl,
some row groups of a .parquet, or a whole file where there is no way to begin in the middle. The
parts of a source and their order depend on nothing but its files.
"""

import errno
import itertools
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from text.turns import Turn

PACKED = (".gz", ".xz", ".zst")
CONTENTS = {  # what a name may end with, before one of PACKED
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".tar": "tar",
}
WHOLE = {".parquet": "parquet", ".arrow": "arrow", ".zip": "zip", ".tgz": "tar", ".xz": "tar"}
ARCHIVES = ("tar", "zip")  # contents that are files
READ = ".txt, .text, .md, .jsonl, .json, .csv, .tsv (also .gz, .xz, .zst), .parquet, .arrow, "
READ += ".tar or .zip"

MIB = 2**20
SMALLEST_PART = 2 * MIB  # of a source; larger sources have larger parts, about PARTS of them
PARTS = 1024
MARKED = 2**16  # bytes at either end of a file that its mark is of
# Bytes of text per byte on the disk, about
EXPANSION = {".gz": 2.5, ".zst": 2.5, ".xz": 3.0, ".tgz": 2.5, ".zip": 2.5, ".parquet": 1.4}
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk, a quota


class BadData(ValueError):
    """Damage in a source: one line that names the file. `--skip_bad` goes on without it."""


class WrongSetting(ValueError):
    """A column or a split that is not there: a wrong setting, not damage."""


# What the libraries raise on damaged files; ValueError is also pyarrow's and UnicodeDecodeError.
DAMAGE = (
    *(OSError, EOFError, ValueError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
    *(struct.error, OverflowError, NotImplementedError),  # zipfile's, too
)


@dataclass(frozen=True)
class Reading:
    """The settings that say how texts are read from files."""

    column: str = "text"  # of rows; dots lead into what lies inside
    template: str = ""  # how a row's columns make a text; empty = the column alone
    separator: str = ""  # between the documents of a text file; empty = a file is one
    encoding: str = ""  # of text files; empty = UTF-8
    chat: bool = False  # rows are conversations
    split: str = "train"  # of what lies in an archive
    val_split: str = ""  # the same, for validation; empty = it is cut from what is for training


@dataclass(frozen=True)
class Part:
    """A part of a source: what one worker turns into a file of tokens."""

    files: tuple[str, ...]  # paths; empty for the embedded corpus
    shard: int  # which file of the source it belongs to, in name order
    size: int  # bytes on disk, for progress
    start: int = 0  # first byte of a .jsonl, first row group of a .parquet
    end: int = 0  # one past the last; 0 = all
    repo: str = ""  # Hub dataset that the file is downloaded from
    revision: str = ""  # commit of the Hub dataset
    val: bool = False  # of the split that --val_split names
    named: bool = False  # an archive that its own path, or a card, puts in the split
    mark: int = 0  # of what the files hold, as far as their first and last bytes tell


@dataclass(frozen=True)
class Source:
    """All parts of a source; `shards` is the number of its files for training."""

    name: str
    parts: list[Part]
    shards: int
    revision: str | None = None
    documents: int | None = None  # how many there should be
    said: list[str] = field(default_factory=list)  # what was chosen and what was left out
    left_out: dict[str, list[str]] = field(default_factory=dict)  # files not read, by why


class Conversation(NamedTuple):
    """A row that is a conversation."""

    turns: list[Turn]
    columns: tuple[str, ...]  # that it is in; none where it is made up
    where: Callable[[], str]  # its name for messages, which may take a look at the file


class Note(NamedTuple):
    """What a reader tells beside documents: something left out, or a separator that was there."""

    what: str
    name: str


def kind(name: str) -> str | None:
    """The suffix by which a file is read, such as ".jsonl.gz"; None for one that is not."""
    low = name.lower()
    packed = next((p for p in PACKED if low.endswith(p)), "")
    inner = next((c for c in CONTENTS if low.removesuffix(packed).endswith(c)), None)
    if inner is not None:
        return inner + packed
    return next((w for w in WHOLE if low.endswith(w)), None)


def content(name: str) -> str:
    """What a file that is read holds: text, lines, json, table, parquet, arrow, tar or zip."""
    suffix = kind(name) or ""
    return WHOLE.get(suffix) or CONTENTS["." + suffix.split(".")[1]]


def text_size(part: Part) -> float:
    """About how many bytes of text a part holds."""
    if not part.files:
        return part.size
    return part.size * EXPANSION.get("." + part.files[0].lower().rsplit(".", 1)[-1], 1.0)


def local_parts(files: list[Path], reading: Reading) -> list[Part]:
    """Files cut or joined into parts of similar size, in order."""
    sizes = [p.stat().st_size for p in files]
    size = max(SMALLEST_PART, sum(sizes) // PARTS)
    parts: list[Part] = []
    for shard, (path, length) in enumerate(zip(files, sizes, strict=True)):
        whole = Part((str(path),), shard, length, mark=mark_of(path, length))
        last = parts[-1] if parts else None
        suffix, small = kind(path.name), last is not None and last.size + length <= size
        if suffix in (".jsonl", ".ndjson") and length > size and not reading.encoding:
            edges = [*range(0, length - size // 2, size), length]
            parts += [
                replace(whole, start=a, end=b, size=b - a) for a, b in itertools.pairwise(edges)
            ]
        elif suffix == ".parquet" and length > size:
            parts += parquet_parts(whole, size)
        elif last and small and not last.end and is_plain_text(path) and is_plain_text(last):
            parts[-1] = replace(
                last,
                files=(*last.files, str(path)),
                size=last.size + length,
                mark=zlib.crc32(whole.mark.to_bytes(4, "little"), last.mark),
            )
        else:
            parts.append(whole)
    return parts


def mark_of(path: Path, size: int) -> int:
    """A checksum of the first and the last bytes of a file: an edit shows, mostly."""
    try:
        with open(path, "rb") as f:
            head = f.read(MARKED)
            f.seek(max(len(head), size - MARKED))
            return zlib.crc32(f.read(MARKED), zlib.crc32(head))
    except OSError:  # said when it is read
        return 0


def is_plain_text(file: Path | Part) -> bool:
    """Whether a file, or the files of a part, hold text and are not packed: many make a part."""
    name = file.files[0] if isinstance(file, Part) else file.name
    return CONTENTS.get(kind(name) or "") == "text"


def parquet_parts(whole: Part, size: int) -> list[Part]:
    """Row groups joined until a part has `size` bytes of text. A damaged file is one part."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(whole.files[0]) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            weights = [g.total_byte_size for g in groups]
    except (OSError, ValueError, pyarrow.ArrowException):
        return [whole]
    edges, filled = [0], 0
    for i, weight in enumerate(weights):
        if filled and filled + weight > size:
            edges.append(i)
            filled = 0
        filled += weight
    edges.append(len(weights))
    total = max(1, sum(weights))
    return [
        replace(whole, start=a, end=b, size=whole.size * sum(weights[a:b]) // total)
        for a, b in itertools.pairwise(edges)
    ]


def is_hidden(name: str) -> bool:
    """Whether a path below a source is hidden, or of a cache of the datasets library."""
    pieces = name.split("/")
    hidden = any(p[:1] == "." and p.strip(".") or p == "__MACOSX" for p in pieces)
    return hidden or pieces[-1].startswith("cache-")


def listed(left_out: dict[str, list[str]]) -> str:
    """Files by why they are left out, counted and the first few named; "" for none."""
    pieces = []
    for why, names in left_out.items():
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        pieces.append(f"{len(names)} {why} ({first})")
    return "; ".join(pieces)


def suffix_of(name: str) -> str:
    """A file's suffix for people: ".pdf", or "without a suffix"."""
    return Path(name).suffix.lower() or "without a suffix"


def fingerprint(found: Source) -> str:
    """What must be the same for a finished dataset to be that of a source, wherever it lies."""
    parts = [(p.shard, p.start, [Path(f).name for f in p.files], p.size) for p in found.parts]
    marks = [p.mark for p in found.parts]
    return f"{zlib.crc32(repr((parts, marks)).encode()):08x}"


def identity(part: Part) -> Any:
    """What must be the same for a finished part to be used again, as JSON holds it."""
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(part).items()}
    for later in ("val", "named"):  # as it was before there were these
        if not facts[later]:
            del facts[later]
    return facts
