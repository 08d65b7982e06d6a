"""Which encoding a text has that is not UTF-8: a guess, and its bytes as UTF-8."""

import codecs
import io
import re
from typing import Any

LOOKED_AT = 2**16  # bytes
MARKS = (  # what a text may begin with, the longer first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAME = {"gb2312": "gb18030", "gbk": "gb18030", "big5hkscs": "big5", "ascii": ""}
REPLACE = ":replace"  # behind an encoding: what is none of it becomes U+FFFD
KANA = re.compile("[\u3041-\u3096]")  # in a tenth of any Japanese text, and in no other
FEW = 0.01  # of the characters beyond ASCII that may be damage in a text that is UTF-8


def guess(data: bytes) -> str:
    """The name of the encoding that bytes look like, "" for no idea."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return name
    data = data[:LOOKED_AT]
    if not data:
        return ""
    zeros = [data[i::2].count(0) for i in range(2)]
    if sum(zeros) > len(data) / 4:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    text = data.decode("utf-8", "replace")
    beyond = sum(not c.isascii() for c in text)
    bad = text.count("\ufffd")
    if bad <= max(1, FEW * beyond) < beyond or bad <= len(text) / 1000:
        return "utf-8" + REPLACE
    from charset_normalizer import from_bytes  # a moment, and only where something is wrong

    found = list(from_bytes(data))
    found.sort(key=lambda match: len(KANA.findall(str(match))) < len(str(match)) / 10)
    return SAME.get(found[0].encoding, found[0].encoding).replace("_", "-") if found else ""


def hint(data: bytes) -> str:
    """What to type for bytes that are not UTF-8, to go behind a message."""
    name = guess(data)
    if name == "utf-8" + REPLACE:
        return "; the rest is: add --encoding=utf-8:replace for U+FFFD in its place"
    return f"; it looks like {name}: add --encoding={name}" if name else "; add --encoding=..."


def check(encoding: str) -> None:
    """Raises ValueError for a name that is not an encoding of text."""
    try:
        known = codecs.lookup(encoding.removesuffix(REPLACE))
        "".encode(known.name)  # some codecs are not of text
    except (LookupError, ValueError) as e:
        raise ValueError(
            f"there is no encoding {encoding!r}; write one that Python knows, such as gb18030, "
            "big5, shift_jis, cp1252, utf-16"
        ) from e


def begins_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8 as far as they go: the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def of(head: bytes, asked: str) -> str:
    """The encoding to read a text in that begins with `head`: the one asked for, or UTF-8.

    What has characters beyond ASCII and is UTF-8 is nothing else. A last byte alone says nothing:
    it could begin a character that is cut, or be the last letter of the text.
    """
    name, replace, _ = asked.partition(REPLACE)
    if codecs.lookup(name).name in ("utf-8", "utf-8-sig"):
        return asked
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return asked
    return asked if text.isascii() else "utf-8" + replace


class AsUtf8(io.RawIOBase):
    """The bytes of a text in another encoding, as UTF-8. Raises ValueError where it is not."""

    def __init__(self, f: Any, encoding: str, where: str) -> None:
        self.f, self.where, self.name = f, where, encoding.removesuffix(REPLACE)
        errors = "replace" if encoding.endswith(REPLACE) else "strict"
        self.decoder = codecs.getincrementaldecoder(self.name)(errors)
        self.waiting, self.seen, self.ended = b"", 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting and not self.ended:
            data = self.f.read(len(buffer))
            self.seen += len(data)
            self.ended = not data
            try:
                text = self.decoder.decode(data, final=self.ended)
            except UnicodeError as e:
                near = max(0, self.seen - len(data))
                raise ValueError(
                    f"{self.where} is not {self.name} text (after byte {near}){hint(data)}"
                ) from e
            self.waiting = text.encode("utf-8", "replace")
        out, self.waiting = self.waiting[: len(buffer)], self.waiting[len(buffer) :]
        buffer[: len(out)] = out
        return len(out)

    def close(self) -> None:
        if not self.closed:
            self.f.close()
        super().close()
