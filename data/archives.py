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
from typing import Any

from data.parts import MIB, BadData

BLOCK = MIB  # bytes read at a time
XZ_MEMORY = 128 * MIB  # for decompression; xz -9 needs 65 MiB
BOMB_RATIO, BOMB_SLACK = 200, 64 * MIB  # text shrinks tenfold at most, repeats aside
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1  # a bit of a zip member's flags


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


def zip_names(file: str) -> list[str]:
    """The names of a zip's files, in its order; no links."""
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if m.filename and not m.is_dir()]
    return [name_of(m) for m in members if not stat.S_ISLNK(m.external_attr >> 16)]


def name_of(member: zipfile.ZipInfo) -> str:
    """The path of a member, with / also where Windows programs wrote another."""
    return member.filename.replace("\\", "/")


def zip_members(file: str, names: set[str]) -> Iterator[tuple[str, int, Any]]:
    """Name, packed size and stream of those files of a zip. A bad one raises when it is read."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if name_of(member) not in names:
                continue
            yield name_of(member), member.compress_size, ZipStream(archive, member, file)


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
