"""Packed files as streams in bounded memory, and what lies in archives.

Nothing is written to disk.
"""

import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.parts import DAMAGE, MIB, BadData, content, is_hidden, kind

BLOCK = MIB  # bytes read at a time
XZ_MEMORY = 128 * MIB  # for decompression; xz -9 needs 65 MiB
BOMB_RATIO, BOMB_SLACK = 200, 64 * MIB  # text shrinks tenfold at most, repeats aside
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1  # a bit of a zip member's flags
CLEANED = ".xz"  # the suffix of the pieces, tars in truth, of OpenWebText's own download


class Member(NamedTuple):
    """A file of an archive, or of a tar in it."""

    path: str  # from the archive on, with /
    where: str  # for people: ARCHIVE:FILE
    size: int  # bytes that it has in there
    stream: Any  # its bytes; None for a link, which is not followed; BadData for a damaged tar


def members(file: str) -> Iterator[Member]:
    """All files of an archive in its order, and those of tars in it in their place.

    OpenWebText's pieces are not opened. Raises the libraries' errors where the archive is damaged.
    """
    if content(file) == "zip":
        yield from through(zip_members(file), "", file)
    else:
        with unpacked(file) as f:
            yield from through(tar_members(f, file), "", file)


def through(found: Iterator[tuple[str, int, Any]], above: str, where: str) -> Iterator[Member]:
    """Files of an archive, and those of tars among them; above: the path that leads to it."""
    for name, size, stream in found:
        member = Member(f"{above}{name}", f"{where}:{name}", size, stream)
        inner = kind(name) not in (None, CLEANED) and content(name) == "tar"
        if stream is None or not inner or is_hidden(name):
            yield member
            continue
        try:
            tar = tar_members(unpacked_stream(stream, size, member.where), member.where)
            yield from through(tar, f"{member.path}/", member.where)
        except DAMAGE as e:
            yield member._replace(stream=damage(member.where, e))


def damage(where: str, e: Exception) -> BadData:
    """An error of a library as one line that names the file."""
    if isinstance(e, BadData):
        return e
    text = " ".join(str(e).split()) or type(e).__name__
    if text.startswith(where):
        return BadData(text)
    return BadData(f"{where} is damaged or truncated: {text[:200]}")


def unpacked(file: str) -> io.BufferedIOBase:
    """A file's bytes, decompressed by its suffix, in bounded memory."""
    size = Path(file).stat().st_size
    return unpacked_stream(open(file, "rb"), size, file)  # noqa: SIM115


def unpacked_stream(f: Any, size: int, where: str) -> io.BufferedIOBase:
    """The bytes of a stream that has `size` bytes itself, decompressed by the suffix of `where`."""
    suffix = "." + where.lower().rsplit(".", 1)[-1]
    if suffix in (".gz", ".tgz"):
        packed = gzip.GzipFile(fileobj=f)
        return io.BufferedReader(Unpacked(packed.read1, size, where, f.close))
    if suffix == ".xz":
        return unpacked_xz(f, size, where)
    if suffix == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(f, "r"), "zstd")
        return io.BufferedReader(Unpacked(stream.read, size, where, stream.close))
    return f if isinstance(f, io.BufferedReader) else io.BufferedReader(f)


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


def tar_members(f: io.BufferedIOBase, where: str) -> Iterator[tuple[str, int, Any]]:
    """Name, size and stream of a tar's files; None for the stream of a link, which is not followed.

    Raises BadData where it ends too early. Files are looked at by name alone. A tar that was cut
    between two members reads like a shorter one, so the two zero blocks at its end are asked for,
    and the stream is read to its own end.
    """
    tail = Tail(f)
    stream_of = {"fileobj": tail, "mode": "r|", "tarinfo": SmallHeader}
    with tarfile.open(**stream_of) as tar:  # type: ignore[call-overload]
        for member in tar:
            if member.isreg():
                stream = tar.extractfile(member)
                assert stream is not None
                yield member.name.replace("\\", "/"), member.size, stream
            elif not member.isdir():
                yield member.name, 0, None
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


def zip_members(file: str) -> Iterator[tuple[str, int, Any]]:
    """Path, packed size and stream of a zip's files, in its order; None for a link's stream.

    A bad one raises when it is read.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.filename or member.is_dir():
                continue
            name = member.filename.replace("\\", "/")  # some Windows programs write the other
            link = stat.S_ISLNK(member.external_attr >> 16)
            yield name, member.compress_size, None if link else ZipStream(archive, member, file)


class ZipStream(io.RawIOBase):
    """A member of a zip, opened when it is first read. Raises BadData for one that cannot be."""

    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: str) -> None:
        self.archive, self.member, self.where = archive, member, f"{file}:{member.filename}"
        self.stream: Any = None
        self.left = BOMB_RATIO * member.compress_size + BOMB_SLACK

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.stream is None:
            if self.member.flag_bits & ENCRYPTED:
                raise BadData(f"{self.where} is encrypted")
            if self.member.compress_type not in ZIP_METHODS:
                raise BadData(f"{self.where} is packed by method {self.member.compress_type}")
            self.stream = self.archive.open(self.member)
        data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise BadData(f"{self.where} unpacks to far more than text can: a decompression bomb?")
        buffer[: len(data)] = data
        return len(data)
