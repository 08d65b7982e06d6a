"""Which encoding a text has that is not UTF-8: a guess, and its bytes as UTF-8."""

import codecs
import io
import re
from collections import Counter
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
DAMAGED = 2  # bytes that are damage rather than a text in another encoding
LETTERS = {  # beyond ASCII, of each language that an encoding was made for
    "cp1252": (
        "àâæçéèêëîïôœùûü",  # French
        "áéíóúüñºª",  # Spanish
        "áâãàçéêíóôõúüºª",  # Portuguese
        "àáèéêìíîòóùúç",  # Italian
        "àçèéíïòóúü",  # Catalan
        "äöüßé",  # German
        "åäöéšž",  # Swedish, Finnish
        "æøåéèêòóô",  # Danish, Norwegian
        "ëïéèêöüáó",  # Dutch
        "áéíóúýðþæö",  # Icelandic
    ),
    "cp1250": (
        "ąćęłńóśźż",  # Polish
        "áčďéěíňóřšťúůýžäĺľŕô",  # Czech, Slovak
        "áéíóöőúüű",  # Hungarian
        "čćđšž",  # Croatian, Slovene
        "ăâîşţ",  # Romanian
    ),
    "cp1254": ("çğıöşüâîû",),  # Turkish
    "cp1257": ("āčēģīķļņšūž", "ąčęėįšųūž", "äöüõšž"),  # Latvian, Lithuanian, Estonian
}
LETTERS["iso8859-2"] = LETTERS["cp1250"]
SIGNS = "“”‘’„‚‹›«»–—…•€£¥§°©®™¿¡·×±½¼¾²³´"
PLAUSIBLE = 0.95  # of the characters beyond ASCII of a text in one of these languages
USUAL = (  # encodings that people have: others are guessed more often than they are met
    *("gb18030", "big5", "cp932", "euc_jp", "cp949", "koi8_r", "koi8_u", "cp866", "cp874"),
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258"),
    *("iso8859_2", "iso8859_5", "iso8859_7", "utf_16", "utf_32"),
)
SAMPLE = 24  # characters that show how a guess reads


def guess(data: bytes) -> str:
    """The name of the encoding that bytes look like around the first that is not UTF-8.

    "" for no idea.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            return name
    data = near(data)
    if not data:
        return ""
    zeros = [data[i::2].count(0) for i in range(2)]
    if sum(zeros) > len(data) / 4:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(not c.isascii() for c in text) - bad
    if bad <= max(1, FEW * good) < good:
        return "utf-8" + REPLACE
    shares = {name: plausible(data, name) for name in LETTERS}
    if max(shares.values()) >= PLAUSIBLE:
        return max(shares, key=shares.__getitem__)
    if bad <= min(DAMAGED, len(text) / 1000):
        return "utf-8" + REPLACE
    # a moment, and only where something is wrong
    from charset_normalizer import from_bytes

    found = list(from_bytes(beyond_ascii(data), cp_isolation=[*USUAL]))
    found.sort(key=lambda match: len(KANA.findall(str(match))) < len(str(match)) / 10)
    name = SAME.get(found[0].encoding, found[0].encoding).replace("_", "-") if found else ""
    return name or ("utf-8" + REPLACE if bad <= len(text) / 1000 else "")


def near(data: bytes) -> bytes:
    """What is around the first byte that is not UTF-8, from the start of a line on if one is near.

    The number of bytes before it is even, for encodings with two bytes a character.
    """
    try:
        data.decode("utf-8")
        at = 0
    except UnicodeDecodeError as e:
        at = e.start
    start = max(0, at - LOOKED_AT)
    start = max(start, data.find(b"\n", start, at) + 1) if start else 0
    return data[start - start % 2 : at + LOOKED_AT]


def beyond_ascii(data: bytes) -> bytes:
    """The lines that are not ASCII alone, which tell nothing."""
    return b"\n".join(line for line in data.split(b"\n") if not line.isascii())


def plausible(data: bytes, name: str) -> float:
    """The share of the characters beyond ASCII that fit, when bytes are read in an encoding.

    That is: they are of one language that it was made for, and stand in words with other letters,
    or alone; or they are signs.
    """
    try:
        text = data.decode(name).replace("\xa0", " ")
    except UnicodeDecodeError:
        return 0.0
    letters: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", text):
        beyond = [c for c in word if not c.isascii()]
        if len(word) == 1 or len(beyond) < 0.7 * len(word):
            letters.update(c.lower() for c in beyond)
    known = max(sum(letters[c] for c in language) for language in LETTERS[name])
    signs = len(re.findall(f"(?<![{SIGNS}])[{SIGNS}](?![{SIGNS}])", text))
    return (known + signs) / max(1, sum(not c.isascii() for c in text))


def hint(data: bytes) -> str:
    """What to type for bytes that are not UTF-8, to go behind a message."""
    name = guess(data)
    if name == "utf-8" + REPLACE:
        return "; the rest is: add --encoding=utf-8:replace for U+FFFD in its place"
    return f"{perhaps(data, name)}: add --encoding={name}" if name else "; add --encoding=..."


def perhaps(data: bytes, name: str) -> str:
    """What bytes look like that are not UTF-8, for a message; "" for no idea."""
    known = name and name != "utf-8" + REPLACE
    return f"; it is perhaps {name}, {sample(data, name)!r}" if known else ""


def sample(data: bytes, name: str) -> str:
    """How the first of bytes that are not ASCII read in an encoding, with what is around them."""
    text = near(data).decode(name, "replace")
    first = re.search(r"[^\0-\x7f\ufeff]", text)
    at = max(0, first.start() - SAMPLE // 2) if first else 0
    return " ".join(text[at : at + SAMPLE].split())


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
