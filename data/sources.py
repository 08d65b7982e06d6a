"""Where documents come from: the parts that a source falls into, and the texts of one part.

A part is what one worker turns into a file of tokens: a few small files, a byte range of a .jsonl,
some row groups of a .parquet, or a whole file where there is no way to begin in the middle. The
parts of a source and their order depend on nothing but its files. Archives are streamed, never
extracted.
"""

import ast
import errno
import functools
import glob
import gzip
import inspect
import io
import itertools
import json
import lzma
import re
import shutil
import sysconfig
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from text.files import path_of, utf8_decoder

OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCUMENTS = 8_013_769
KINDS: tuple[str, ...] = (
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".txt",
    ".txt.gz",
    ".arrow",
)
KINDS += (".tar", ".tar.xz", ".tar.gz", ".xz")  # OpenWebText's own download, whole or in pieces
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

MIB = 2**20
SMALLEST_PART = 2 * MIB  # of a source; larger sources have larger parts, about PARTS of them
PARTS = 1024
BLOCK = MIB  # bytes of a .txt read at a time
MAX_LINE = 64 * MIB  # bytes of one .jsonl line, or of one text of a .parquet or .arrow
MAX_MEMBER = 16 * MIB  # bytes of one text in an archive
XZ_MEMORY = 128 * MIB  # for decompression; xz -9 needs 65 MiB
BOMB_RATIO, BOMB_SLACK = 200, 64 * MIB  # text shrinks tenfold at most, repeats aside
# Bytes of text per byte on the disk, about
EXPANSION = {".parquet": 1.4, ".jsonl.gz": 2.5, ".txt.gz": 2.5, ".jsonl.zst": 2.5, ".tar": 2.5}
EXPANSION |= {".xz": 3.0, ".tar.xz": 3.0, ".tar.gz": 2.5}
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk, a quota
HUB_ATTEMPTS = 6  # of a download, with pauses of 1, 2, 4 ... seconds


class BadData(ValueError):
    """Damage in a source: one line that names the file. `--skip_bad` goes on without it."""


# What a reader yields: a text, a text in blocks (a long file), or damage.
Document = str | Iterator[str] | BadData

# What the libraries raise on damaged files; ValueError is also pyarrow's and UnicodeDecodeError.
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)


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


@dataclass(frozen=True)
class Source:
    """All parts of a source; `shards` is the number of its files."""

    name: str
    parts: list[Part]
    shards: int
    revision: str | None = None
    documents: int | None = None  # how many there should be


def text_size(part: Part) -> float:
    """About how many bytes of text a part holds."""
    packed = EXPANSION.get(kind(part.files[0]) or "", 1.0) if part.files else 1.0
    return part.size * packed


def find(name: str, subset: str = "", split: str = "train", revision: str = "") -> Source:
    """The source called "stdlib", "hub:NAME", or a path: a file, a folder or a pattern with *.

    Raises OSError or ValueError, one line with what to type, when there is nothing to read.
    """
    if name == "stdlib":
        return Source(name, [Part((), 0, 2 * MIB)], 1)
    if name.startswith("hub:"):
        return hub_source(name, subset, split, revision)
    path = path_of(name)
    if path.is_dir():
        files = [p for p in path.rglob("*") if not p.name.startswith((".", "cache-"))]
    elif path.exists():
        if kind(name) is None:
            raise ValueError(f"{path} must be one of {', '.join(KINDS)}")
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not files:
            hint = (
                f", or hub:{name} for the Hub's" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
            )
            raise FileNotFoundError(f"no source {name!r}: give a file, a folder or stdlib{hint}")
    files = sorted(p for p in files if kind(p.name) is not None and p.is_file())
    if not files:
        raise ValueError(f"{path} holds no {', '.join(KINDS)} files")
    original = len(files) == 21 and all(p.name.startswith("urlsf_subset") for p in files)
    whole = original or (path.is_dir() and path.resolve().name.lower() == "openwebtext")
    documents = OPENWEBTEXT_DOCUMENTS if whole else None
    return Source(str(path.resolve()), local_parts(files), len(files), None, documents)


def kind(name: str) -> str | None:
    """The longest of KINDS that a file's name ends with."""
    found = [k for k in KINDS if name.lower().endswith(k)]
    return max(found, key=len) if found else None


def local_parts(files: list[Path]) -> list[Part]:
    """Files cut or joined into parts of similar size, in order."""
    sizes = [p.stat().st_size for p in files]
    size = max(SMALLEST_PART, sum(sizes) // PARTS)
    parts: list[Part] = []
    for shard, (path, length) in enumerate(zip(files, sizes, strict=True)):
        whole = Part((str(path),), shard, length)
        last = parts[-1] if parts else None
        if kind(path.name) == ".jsonl" and length > size:
            edges = [*range(0, length - size // 2, size), length]
            parts += [
                replace(whole, start=a, end=b, size=b - a) for a, b in itertools.pairwise(edges)
            ]
        elif kind(path.name) == ".parquet" and length > size:
            parts += parquet_parts(whole, size)
        elif kind(path.name) == ".txt" and last and last.size + length <= size and not last.end:
            if kind(last.files[0]) == ".txt":
                parts[-1] = replace(last, files=(*last.files, str(path)), size=last.size + length)
            else:
                parts.append(whole)
        else:
            parts.append(whole)
    return parts


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


def hub_source(name: str, subset: str, split: str, revision: str) -> Source:
    """The files of a Hub dataset's split; the revision is pinned to the commit that it names now.

    Raises OSError when the Hub does not answer, ValueError when it has no such files.
    """
    from huggingface_hub import HfApi

    repo = name.removeprefix("hub:")
    problem = None
    for at in [revision] if revision else ["", "refs/convert/parquet"]:
        try:
            info = HfApi().dataset_info(repo, revision=at or None, files_metadata=True, timeout=20)
        except Exception as e:  # OSError, httpx's and huggingface_hub's own
            problem = problem or e
            continue
        found = {f.rfilename: f.size or 0 for f in info.siblings or []}
        chosen = choose(list(found), subset, split)
        if any(f"partial-{split}/" in f for f in chosen):
            print(
                f"WARNING: the Hub has converted only a part of {repo}; you get no more than that"
            )
        if chosen:
            parts = [
                Part((f,), i, found[f], repo=repo, revision=str(info.sha))
                for i, f in enumerate(chosen)
            ]
            documents = OPENWEBTEXT_DOCUMENTS if repo.lower() == OPENWEBTEXT.lower() else None
            return Source(name, parts, len(parts), info.sha, documents)
    if problem is not None:
        raise OSError(
            f"cannot get {repo} from the Hub ({type(problem).__name__}); set HF_ENDPOINT to a "
            f"mirror, or download it elsewhere (hf download {repo} --repo-type=dataset "
            "--local-dir=FOLDER) and give --source=FOLDER; --source=stdlib needs no network"
        ) from problem
    raise ValueError(
        f"{repo} on the Hub has no files for split {split!r}"
        + (f" of {subset!r}" if subset else "")
        + f" in {', '.join(KINDS[:4])}; see its page for --split and --subset"
    )


def choose(files: list[str], subset: str, split: str) -> list[str]:
    """The files of one split (and subset) in a Hub repository, of its first kind in KINDS.

    Raises ValueError when there are several subsets and none was named.
    """

    def has(word: str, file: str) -> bool:
        return re.search(rf"(^|[/_.-]){re.escape(word)}([/_.-]|$)", file) is not None

    for suffix in KINDS:
        found = sorted(f for f in files if kind(f) == suffix and (not subset or has(subset, f)))
        named = [f for f in found if has(split, f)]
        other = any(has(s, f) for f in found for s in ("train", "validation", "test"))
        found = named or ([] if other else found)
        folders = sorted({f.split("/")[0] for f in found if "/" in f} - {split})
        if len(folders) > 1 and not subset:
            raise ValueError(
                f"several subsets ({', '.join(folders[:20])}): choose one, --subset=..."
            )
        if found:
            return found
    return []


def fetch(part: Part, folder: Path) -> tuple[Path, bool]:
    """A Hub file on this disk: its path, and whether it was downloaded into `folder` for us.

    A file in the Hub's cache is used where it lies. A cut download goes on where it stopped.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    (name,) = part.files
    cached = try_to_load_from_cache(part.repo, name, revision=part.revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached), False
    for attempt in range(HUB_ATTEMPTS):
        try:
            where: dict[str, Any] = {"repo_type": "dataset", "revision": part.revision}
            return Path(hf_hub_download(part.repo, name, local_dir=folder, **where)), True
        except Exception as e:  # OSError, httpx's and huggingface_hub's own
            if getattr(e, "errno", None) in FULL:
                raise
            if attempt == HUB_ATTEMPTS - 1:
                raise OSError(
                    f"cannot download {name} of {part.repo} ({type(e).__name__}); run the same "
                    "command again to go on from here, or set HF_ENDPOINT to a mirror"
                ) from e
            time.sleep(2**attempt)
    raise AssertionError


def documents(part: Part, column: str, separator: str, folder: Path) -> Iterator[Document]:
    """The documents of a part in order, damage among them as BadData.

    Reading goes on after a bad document, and with the next file after a damaged one. `folder` is
    where a Hub file is put; it is deleted when it has been read. Raises ValueError when the
    column is not there, FileNotFoundError, and OSError when a download fails.
    """
    if not part.files:
        yield from stdlib_documents()
    elif part.repo:
        path, ours = fetch(part, folder)
        yield from file_documents(replace(part, files=(str(path),)), str(path), column, separator)
        if ours:
            assert folder.suffix == ".hub", "made for this and nothing else"
            shutil.rmtree(folder, ignore_errors=True)
    else:
        for file in part.files:
            yield from file_documents(part, file, column, separator)


def file_documents(part: Part, file: str, column: str, separator: str) -> Iterator[Document]:
    """The documents of one file; see `documents`."""
    suffix = kind(file) or ""
    try:
        if suffix.startswith(".parquet"):
            yield from parquet_documents(file, column, part.start, part.end)
        elif suffix == ".arrow":
            yield from arrow_documents(file, column)
        elif suffix.startswith(".jsonl"):
            yield from jsonl_documents(file, column, part.start, part.end)
        elif suffix.startswith(".txt"):
            yield from txt_documents(file, separator)
        else:
            with unpacked(file) as f:
                yield from archive_documents(f, file)
    except (FileNotFoundError, PermissionError, ColumnMissing):
        raise
    except DAMAGE as e:
        yield damage(file, e)


class ColumnMissing(ValueError):
    """The text column is not in the file: a wrong setting, not damage."""


def damage(where: str, e: Exception) -> BadData:
    """An error of a library as one line that names the file."""
    if isinstance(e, BadData):
        return e
    text = " ".join(str(e).split()) or type(e).__name__
    return BadData(f"{where} is damaged or truncated: {text[:200]}")


def txt_documents(file: str, separator: str) -> Iterator[Document]:
    """A text file is one document, or several with `separator` between them."""
    with unpacked(file) as f:
        blocks = text_blocks(f, file)
        if separator:
            yield from separated(blocks, separator)
            return
        try:
            head = list(itertools.islice(blocks, 2))
        except DAMAGE as e:
            yield damage(file, e)
            return
        yield "".join(head) if len(head) < 2 else itertools.chain(head, blocks)


def text_blocks(f: io.BufferedIOBase, file: str) -> Iterator[str]:
    """UTF-8 text in blocks, without a byte order mark, newlines as \\n. Raises BadData."""
    utf8 = utf8_decoder()
    seen = 0
    while True:
        try:
            data = f.read(BLOCK)
            seen += len(data)
            text = utf8.decode(data, final=not data)
        except UnicodeDecodeError as e:
            place = seen - len(e.object) + e.start
            raise BadData(f"{file} is not UTF-8 text ({e.reason} at byte {place})") from e
        except DAMAGE as e:
            raise damage(file, e) from e
        if text:
            yield text
        if not data:
            return


def separated(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Texts between separators, blank lines around them taken off, empty ones left out."""
    rest = ""
    for block in blocks:
        *texts, rest = (rest + block).split(separator)
        if len(rest) > MAX_LINE:
            raise BadData(
                f"a text of more than {MAX_LINE // MIB} MiB without the separator {separator!r}"
            )
        yield from (text for text in (t.strip("\n") for t in texts) if text)
    if rest.strip("\n"):
        yield rest.strip("\n")


def jsonl_documents(file: str, column: str, start: int, end: int) -> Iterator[Document]:
    """One document a line, of the lines that begin in bytes start .. end - 1; blank ones left out.

    Lone surrogates (\\ud800 in JSON) become U+FFFD when they are encoded.
    """
    with unpacked(file) as f:
        at, number = start, 0
        if start:  # the line that the byte before belongs to is the previous part's
            f.seek(start - 1)
            at = start - 1 + skip_line(f, end - start + 1)
        while not end or at < end:
            line = f.readline(MAX_LINE + 1)
            if not line:
                return
            at, number = at + len(line), number + 1
            if len(line) > MAX_LINE:
                at += skip_line(f)
                yield BadData(
                    f"{line_name(file, start, number)}: a line of more than {MAX_LINE // MIB} MiB; "
                    "very long texts are read in pieces from .txt files"
                )
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row[column]
                if not isinstance(text, str):
                    raise TypeError
                yield text
            except UnicodeDecodeError as e:
                yield BadData(f"{line_name(file, start, number)}: not UTF-8 text ({e.reason})")
            except (ValueError, RecursionError) as e:
                yield BadData(f"{line_name(file, start, number)}: not JSON ({e})")
            except (KeyError, TypeError, IndexError):
                there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                where = line_name(file, start, number)
                yield BadData(
                    f"{where}: no text in column {column!r} (there: {there}); set --text_column"
                )


def skip_line(f: io.BufferedIOBase, enough: float = float("inf")) -> int:
    """Read to the end of the line, or so far that at least `enough` bytes are read: how many."""
    read = 0
    while (piece := f.readline(MIB)) and not piece.endswith(b"\n"):
        read += len(piece)
        if read >= enough:
            return read
    return read + len(piece)


def line_name(file: str, start: int, number: int) -> str:
    """ "FILE line N" of the number-th line read by a part that begins at byte `start`."""
    return f"{file} line {number + lines_before(file, start) if start else number}"


@functools.lru_cache(1)
def lines_before(file: str, start: int) -> int:
    """Lines of a file that begin before byte `start`."""
    lines, left = 0, start - 1
    with open(file, "rb") as f:
        while left and (block := f.read(min(MIB, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines + 1


def parquet_documents(file: str, column: str, start: int, end: int) -> Iterator[Document]:
    """The texts of row groups start .. end - 1, about 16 MiB in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        check_column(file, column, pyarrow.parquet.read_schema(file).names)
        # as a dictionary a text that is repeated is in memory once, however hostile the file
        with pyarrow.parquet.ParquetFile(file, read_dictionary=[column]) as table:
            for i in range(start, end or table.num_row_groups):
                group = table.metadata.row_group(i)
                row_bytes = group.total_byte_size // max(1, group.num_rows) + 1
                rows = min(1000, max(1, 16 * MIB // row_bytes))
                columns: dict[str, Any] = {"columns": [column], "row_groups": [i]}
                for batch in table.iter_batches(rows, use_threads=False, **columns):
                    yield from texts_of(batch.column(0), file)
    except pyarrow.ArrowException as e:
        raise damage(file, e) from e


def arrow_documents(file: str, column: str) -> Iterator[Document]:
    """The texts of an Arrow file, as datasets.save_to_disk writes it (stream) or pyarrow (file)."""
    import pyarrow

    try:
        with pyarrow.memory_map(file) as memory:
            try:
                reader = pyarrow.ipc.open_stream(memory)
                batches: Iterable[Any] = reader
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(memory)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            check_column(file, column, reader.schema.names)
            for batch in batches:
                values = batch.column(column)
                # offsets that lead out of the file would crash the process; as bytes, so that
                # text that is not UTF-8 is one bad row and not a bad file
                raw = {pyarrow.string(): pyarrow.binary()}.get(values.type)
                raw = {pyarrow.large_string(): pyarrow.large_binary()}.get(values.type, raw)
                (values.view(raw) if raw else values).validate(full=True)
                yield from texts_of(values, file)
    except pyarrow.ArrowException as e:
        raise damage(file, e) from e


def check_column(file: str, column: str, names: list[str]) -> None:
    if column not in names:
        raise ColumnMissing(
            f"{file} has no column {column!r}; it has {', '.join(names)}: set --text_column"
        )


def texts_of(values: Any, file: str) -> Iterator[Document]:
    """The texts of an Arrow array, one in memory at a time; what is not text is damage."""
    for value in values:
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            yield BadData(f"{file}: a row with not UTF-8 text")
            continue
        if isinstance(text, str) and len(text) <= MAX_LINE:
            yield text
        elif isinstance(text, str):
            yield BadData(f"{file}: a row with {len(text) // MIB} MiB of text, more than is read")
        else:
            what = "null" if text is None else type(text).__name__
            yield BadData(f"{file}: a row with {what} instead of text")


def archive_documents(f: io.BufferedIOBase, where: str) -> Iterator[Document]:
    """The texts of a tar: its .txt files, and those in .xz files in it that are tars themselves.

    In the archive's order, as the script that came with OpenWebText read them, with the same
    clean-up. Only regular files are looked at, by name alone, and nothing is written to disk.
    """
    for name, size, member in tar_members(f, where):
        if name.endswith(".xz"):
            try:
                inner = unpacked_xz(member, size, f"{where}:{name}")
                yield from archive_documents(inner, f"{where}:{name}")
            except DAMAGE as e:
                yield damage(f"{where}:{name}", e)
        elif name.endswith(".txt"):
            data = member.read(MAX_MEMBER + 1)
            if len(data) > MAX_MEMBER:
                yield BadData(f"{where}:{name}: a text of more than {MAX_MEMBER // MIB} MiB")
                continue
            try:
                yield re.sub("\n\n\n+", "\n\n", data.decode("utf-8")).strip()
            except UnicodeDecodeError as e:
                yield BadData(f"{where}:{name} is not UTF-8 text ({e.reason} at byte {e.start})")


def tar_members(f: io.BufferedIOBase, where: str) -> Iterator[tuple[str, int, Any]]:
    """Name, size and stream of a tar's regular files. Raises BadData where it ends too early.

    A tar that was cut between two members reads like a shorter one, so the two zero blocks at
    its end are asked for, and the stream is read to its own end.
    """
    tail = Tail(f)
    stream_of = {"fileobj": tail, "mode": "r|", "tarinfo": SmallHeader}
    with tarfile.open(**stream_of) as tar:  # type: ignore[call-overload]
        for member in tar:
            if member.isreg():
                stream = tar.extractfile(member)
                assert stream is not None
                yield member.name, member.size, stream
            tar.members = []  # tarfile keeps every header otherwise
    while tail.read(BLOCK):
        pass
    if tail.last != bytes(1024):
        raise BadData(f"{where} is truncated: the end mark of the tar is missing")


class SmallHeader(tarfile.TarInfo):
    """A header of a tar. Long names and the like are read into memory whole: not beyond 1 MiB."""

    def _proc_member(self, tar: Any) -> Any:
        extra = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)
        if self.type in (*extra, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) and self.size > MIB:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class Tail:
    """A stream that remembers its last 1024 bytes."""

    def __init__(self, f: io.BufferedIOBase) -> None:
        self.f, self.last = f, b""

    def read(self, size: int = -1) -> bytes:
        data = self.f.read(size)
        self.last = (self.last + data[-1024:])[-1024:]
        return data


def unpacked(file: str) -> io.BufferedIOBase:
    """A file's bytes, decompressed by its suffix, in bounded memory."""
    size = Path(file).stat().st_size
    suffix = "." + file.lower().rsplit(".", 1)[-1]
    if suffix == ".gz":
        packed = gzip.open(file, "rb")  # noqa: SIM115
        return io.BufferedReader(Unpacked(packed.read1, size, file, packed.close))
    if suffix == ".xz":
        return unpacked_xz(open(file, "rb"), size, file)  # noqa: SIM115
    if suffix == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd")
        return io.BufferedReader(Unpacked(stream.read, size, file, stream.close))
    return open(file, "rb")


def unpacked_xz(f: Any, size: int, where: str) -> io.BufferedIOBase:
    """The bytes of an .xz stream that has `size` bytes itself."""
    state = lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(count: int) -> bytes:
        nonlocal state
        while True:
            if state.eof:  # more streams may follow, after zeros
                rest = (state.unused_data or f.read(2**16)).lstrip(b"\0")
                if not rest:
                    return b""
                state = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            else:
                rest = f.read(2**16) if state.needs_input else b""
                if state.needs_input and not rest:
                    raise EOFError("the compressed data end too early")
            data = state.decompress(rest, max_length=count)
            if data:
                return data

    return io.BufferedReader(Unpacked(read, size, where, f.close), 2**18)


class Unpacked(io.RawIOBase):
    """Decompressed bytes. Raises BadData when they are far more than text could be."""

    def __init__(
        self, read: Callable[[int], bytes], size: int, where: str, close: Callable[[], None]
    ) -> None:
        self.source, self.where, self.finish = read, where, close
        self.left = BOMB_RATIO * size + BOMB_SLACK

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise BadData(f"{self.where} unpacks to far more than text can: a decompression bomb?")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.finish()
        super().close()


def stdlib_documents() -> Iterator[str]:
    """The help topics of pydoc and the docstrings of the standard library, repeats left out.

    Files are read with ast, nothing is imported or run. Raises FileNotFoundError where Python
    comes without its .py files (the embeddable one for Windows).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p for p in folder.rglob("*.py") if not SKIPPED_FOLDERS & {*p.relative_to(folder).parts}
    ]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .py files, so this Python has no docstrings to read; "
            "use a full installation, or --source=PATH with a text of your own"
        )
    from pydoc_data.topics import topics

    seen = set()
    files.sort(key=lambda p: p.as_posix())
    for text in itertools.chain((topics[t] for t in sorted(topics)), docstrings(files)):
        text = inspect.cleandoc(text).strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def docstrings(files: list[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions, in the order of the files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text
