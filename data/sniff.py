"""What can be said of a source before it is read: settings that do not fit it, and separators."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

from configurator import refuse, typed
from data import archives, splits
from data.members import unread
from data.parts import ARCHIVES, DAMAGE, MIB, BadData, Part, Reading, Source, content
from data.readers import Document, chosen_in, json_values, stream_documents, text_blocks
from data.sources import says_split
from text.files import path_of
from text.tokenizer import EOT_NAMES

LOOKED_THROUGH = 64 * MIB  # characters of a source, for its separator
LOOKED_AT = MIB  # characters of each of the first files, for marks that could be one
FILES = 4
OF_FILES = ("text_column", "template", "separator", "encoding")
OF_HUB = ("subset", "split", "val_split", "revision")


def refuse_unfit(name: str, found: Source, reading: Reading) -> None:
    """Raises ConfigError when a setting that was typed changes nothing for such a source."""
    if name == "stdlib":
        refuse("on the embedded corpus", *OF_FILES, *OF_HUB, "skip_bad")
        return
    contents = {content(f) for part in found.parts for f in part.files}
    archived = bool(contents & {*ARCHIVES})
    if reading.template:
        refuse("beside --template", "text_column")
    if reading.chat and contents == {"text"}:
        raise ValueError(
            f"{name} holds text, not rows; conversations are .jsonl, .json, .csv, .parquet, .arrow"
        )
    if contents == {"text"}:
        refuse("on text files, which have no columns", "text_column", "template")
    if not archived and "text" not in contents:
        refuse("on files of rows: a row is a document", "separator")
    if not contents - {"parquet", "arrow"}:
        refuse("on .parquet and .arrow, which hold UTF-8", "encoding")
    if not name.startswith("hub:"):
        refuse("on files of this disk", "revision")
        if path_of(name).is_file():
            refuse("on a single file", "subset", *(() if archived else ("split", "val_split")))
        elif says_split(path_of(name)):
            refuse("on a pattern that names a split", "split")
    files = [file for part in found.parts for file in part.files]
    if len(files) == 1 and contents == {"text"} and not reading.separator:
        refuse("on one document, the end of which is for validation", "seed")
    if typed() & {"text_column", "template"} and all_texts(found, reading):
        refuse("on rows that are texts and have no columns", "text_column", "template")


def all_texts(found: Source, reading: Reading) -> bool:
    """Whether the files of rows of a source are a few of JSON that begin with a text for a row."""
    files = [file for part in found.parts for file in part.files if not part.start]
    if reading.encoding or len(files) > FILES or any(part.repo for part in found.parts):
        return False
    firsts: list[Any] = []
    for where, f in itertools.chain.from_iterable(map(streams, files)):
        if content(where) != "text" and len(firsts) < FILES:
            json = content(where) in ("lines", "json")
            firsts.append(first_of(json_values(text_blocks(f, where), where)) if json else None)
    return bool(firsts) and all(isinstance(value, str) for value in firsts)


def first_of(values: Iterator[Any]) -> Any:
    """The first value of a .json, None where there is none or it is damaged."""
    try:
        return next(values, None)
    except DAMAGE:  # said when it is read in earnest
        return None


def check_splits(name: str, found: Source, reading: Reading) -> None:
    """Raises ValueError when archives on this disk do not have the split that is asked for.

    Raises ConfigError for one that is typed beside an archive whose own name says it.
    """
    if "split" in typed() and len(found.parts) == 1 and path_of(name).is_file():
        (alone,) = found.parts
        if alone.named and chosen_in(alone.files[0], reading, alone)[0].own:
            refuse("on an archive in which no name says a split", "split")
    for val, split in ((False, reading.split), (True, reading.val_split)):
        parts = [part for part in found.parts if part.val == val]
        kinds = {content(p.files[0]) if p.files and not p.repo else "" for p in parts}
        # that a tar has something for training is seen when it is read: looking takes as long
        if not kinds or not kinds <= {*ARCHIVES} or split == "all":
            continue
        if split == "train" and "tar" in kinds:
            continue
        there = set[str]()
        for part in parts:
            choice, second = chosen_in(part.files[0], reading, part)
            if choice.val if second else choice.train:
                there.clear()
                break
            there |= {*choice.groups}
        if there:
            raise splits.no_split(name, split, there)


def check_separator(name: str, found: Source, reading: Reading) -> None:
    """Raises ValueError when the separator is nowhere in the text, as far as that is seen soon.

    Without one, says which mark in the text could be one.
    """
    here = [(p, f) for p in found.parts for f in p.files if not p.repo]
    if not reading.separator:
        texts = itertools.chain.from_iterable(texts_in(p, f, reading) for p, f in here)
        for where, blocks in itertools.islice(texts, FILES):
            text = next(blocks, "")[:LOOKED_AT]
            if mark := next((m for m in EOT_NAMES if m in text), None):
                print(
                    f"{where} has {mark} in its text, which is read as letters: "
                    f"--separator='{mark}' makes documents of what is between"
                )
                return
        return
    files = [(p, f) for p, f in here if content(f) == "text"]
    seen = 0
    for part, file in files:
        rest = ""
        for block in itertools.chain.from_iterable(b for _, b in texts_in(part, file, reading)):
            if reading.separator in rest + block:
                return
            rest = block[-len(reading.separator) :]
            seen += len(block)
            if seen > LOOKED_THROUGH:
                print(
                    f"the first {seen // MIB} MiB do not have the separator",
                    repr(reading.separator),
                )
                return
    if files and all(content(f) == "text" for p in found.parts for f in p.files):
        raise no_separator(name, reading)


def no_separator(name: str, reading: Reading) -> ValueError:
    """The error for a separator that is not in a source."""
    return ValueError(
        f"the separator {reading.separator!r} does not occur in {name}; write it as it stands in "
        "the text (\\n is a new line), and --overwrite=True if parts of it are made"
    )


def texts_in(part: Part, file: str, reading: Reading) -> Iterator[tuple[str, Iterator[str]]]:
    """Name and text in blocks of a text file, or of those among the first of an archive.

    As far as they can be read.
    """
    whole = Reading(encoding=reading.encoding)
    for where, f in streams(file):
        if content(where) == "text":
            found = stream_documents(f, where, whole, part.start, part.end)
            yield where, until_damage(strings(found))


def streams(file: str) -> Iterator[tuple[str, io.BufferedIOBase]]:
    """Name and bytes of a file, or of the first files of an archive."""
    try:
        if content(file) not in ARCHIVES:
            with archives.unpacked(file) as f:
                yield file, f
            return
        seen = 0
        for member in archives.members(file):
            seen += member.size
            if seen > LOOKED_THROUGH:
                return
            if isinstance(member.stream, BadData | None) or unread(member.path):
                continue
            if content(member.path) not in ARCHIVES:
                yield (
                    member.where,
                    archives.unpacked_stream(member.stream, member.size, member.where),
                )
    except DAMAGE:  # said when it is read in earnest
        return


def until_damage(texts: Iterator[str]) -> Iterator[str]:
    """Texts as far as they can be read."""
    try:
        yield from texts
    except DAMAGE:  # said when it is read in earnest
        return


def strings(documents: Iterator[Document]) -> Iterator[str]:
    """The texts of documents in blocks."""
    for document in documents:
        if isinstance(document, str):
            yield document
        elif isinstance(document, Iterator):
            yield from document
