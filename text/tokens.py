"""Token files as one stream of tokens, checked before they are believed."""

import bisect
import difflib
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from text import characters
from text.files import SHORT, path_of, read_json, whole
from text.foreign import SCAN, check_finished, check_foreign, open_tokens
from text.split import cut_at, split_parts, val_share

Ints = NDArray[np.int64]
DATA = Path(__file__).resolve().parent.parent / "data"
GPT2_VOCAB = 50257
NUMBER = re.compile("[0-9]+")
LETTERS = 256  # ids below are single bytes for GPT-2: in any text there are others
INDEX_TYPES = ("|u1", "<u2", "<u4", "<u8")  # of a part's .index
LARGEST = 2**40  # tokens or bytes of a document; sums of a part's cannot overflow
SCANS = 64  # pieces of a stream that are read to find its largest id
# Of a token of a conversation: it counts for the loss, a conversation begins with it, a turn does
# that asks; and the bits of its id.
COUNTS, BEGINS, ASKS = 2**31, 2**30, 2**29
ID = ASKS - 1


def dataset_folder(name: str) -> Path:
    """Where a dataset is: a name stands for a folder under data/, with a slash it is a path."""
    path = path_of(name)
    return path if "/" in name or os.sep in name or path.is_absolute() else DATA / name


class Piece(NamedTuple):
    """Tokens of a stream that lie together in a file."""

    path: Path
    first: int  # where in the file's tokens they begin
    ids: NDArray[Any]  # (tokens,) unsigned, a view of the mapped file


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a dataset folder, or what files without one are taken for: GPT-2 in uint16.

    Raises ValueError when it is not what data/prepare.py writes, and when there is none but
    datatrove says that the tokens are not GPT-2's.
    """
    path = folder / "meta.json"
    if path.exists():
        try:
            meta = read_json(path)
            if odd := what_is_odd(meta):
                raise ValueError(", ".join(f"{k} {SHORT.repr(meta.get(k))}" for k in odd))
        except ValueError as e:
            raise ValueError(f"{path} is damaged ({e}); run data/prepare.py again") from e
        return meta
    if not folder.is_dir():
        raise FileNotFoundError(missing(folder))
    if (folder / characters.FILE).exists():
        size = len(characters.read(folder / characters.FILE)) + 1  # and end-of-text
        return {"tokenizer": characters.FILE, "vocab_size": size, "dtype": "uint16", "splits": {}}
    for note in sorted(folder.glob("*/*.ds.metadata"))[:1]:
        first = note.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        name = first.partition("|")[0]
        if "gpt2" not in Path(name).name:
            raise ValueError(
                f"{note} says that the tokenizer is {name}, not gpt2: {path} is needed, "
                "as docs/datatrove.md shows"
            )
    return {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB, "dtype": "uint16", "splits": {}}


def missing(folder: Path, split: str = "train") -> str:
    """What to type where a dataset's folder, or a split in it, is not there."""
    if (folder / "parts").exists():
        return (
            f"{folder} is not finished: run the same data/prepare.py command again to go on "
            "(with --merge=True once all --shards=I/N are there)"
        )
    name = folder.name if folder.parent == DATA else str(folder)
    known = {"openwebtext": "", "stdlib": " --source=stdlib"}
    known |= {"stdlib_chat": " --source=stdlib --chat=True"}
    known |= {"chat": " --source=PATH --chat=True --dataset=chat"}
    flags = known.get(name, f" --source=PATH --dataset={name}")
    there = [p.parent.name for p in sorted(DATA.glob("*/meta.json"))]
    near = ", ".join(difflib.get_close_matches(folder.name, there, 3, 0.5) or there[:5])
    what = f"no {split}.bin in {folder}" if folder.is_dir() else f"there is no dataset {folder}"
    other = f"; there is: {near} (--dataset=...)" if near else ""
    return f"{what}; make it with: python data/prepare.py{flags}{other}"


def what_is_odd(meta: dict[str, Any]) -> list[str]:
    """Keys of a meta.json whose values data/prepare.py does not write."""
    splits, fraction = meta.get("splits"), meta.get("val_fraction")
    of_splits = splits.values() if isinstance(splits, dict) else [None]
    holds = {
        "tokenizer": isinstance(meta.get("tokenizer"), str),
        "vocab_size": whole(meta.get("vocab_size"), 1, 2**32),
        "dtype": meta.get("dtype") in ("uint16", "uint32"),
        "splits": all(isinstance(f, dict) and are_facts(f) for f in of_splits),
        "chat": "chat" not in meta or meta.get("dtype") == "uint32",
        "eot": "chat" not in meta or whole(meta.get("eot"), 0, ID),
    }
    if "parts" in meta:
        holds["parts"] = whole(meta["parts"], 1)
        holds["val_fraction"] = isinstance(fraction, int | float) and 0 <= fraction < 1
        holds["split_seed"] = whole(meta.get("split_seed"))
    return [key for key, good in holds.items() if not good]


def are_facts(facts: dict[str, Any]) -> bool:
    """Whether what meta.json says of a split, if anything, can be true."""
    known = [facts[k] for k in ("bytes", "documents", "max_id") if facts.get(k) is not None]
    return not facts or (whole(facts.get("tokens")) and all(map(whole, known)))


def split_files(folder: Path, split: str) -> list[Path]:
    """`<split>.bin`, or shards: `<split>_*.bin`, `*_<split>_*.bin` or datatrove's `<split>/*.ds`.

    Shards are in name order, by the value of numbers in names: 9 comes before 10.
    Raises FileNotFoundError with the command that makes them, ValueError for unfinished ones.
    """
    for pattern in (f"{split}.bin", f"{split}_*.bin", f"*_{split}_*.bin", f"{split}/*.ds"):
        if files := list(folder.glob(pattern)):
            break
    else:
        raise FileNotFoundError(missing(folder, split))
    if files[0].suffix == ".ds":
        check_finished(folder / split / "logs")
    return sorted(files, key=lambda path: NUMBER.sub(lambda m: m[0].zfill(20), path.name))


def unmerged(folder: Path, split: str, meta: dict[str, Any]) -> tuple[list[Piece], int]:
    """A split of the parts that --shards=I/N has made, as --merge=True would write it.

    Returns the pieces and their UTF-8 text bytes.
    Raises FileNotFoundError for missing parts, ValueError for damaged ones.
    """
    work, count = folder / "parts", int(meta["parts"])
    if (work / "assembly.json").exists():
        raise ValueError(f"merging {work} was interrupted: run data/prepare.py --merge=True again")
    there = {path.stem for path in work.glob("[0-9]*.json")}
    first = next((i for i in range(count) if f"{i:05d}" not in there), None)
    if first is not None:  # a number out of a file: of any size
        raise FileNotFoundError(
            f"{count - len(there)} of {count} parts are missing in {work} (the first is "
            f"{first:05d}); run the other --shards=I/N of data/prepare.py"
        )
    stems = [work / f"{i:05d}" for i in range(count)]
    parts = [open_part(stem, meta["dtype"]) for stem in stems]
    sizes = np.concatenate([part.table[:, 1] for part in parts])  # bytes of each document
    lengths = [part.table[:, 0] for part in parts]
    val_from = next((i for i, part in enumerate(parts) if part.val), None)
    documents = sum(map(len, lengths[:val_from]))
    if documents < 2:
        raise ValueError(f"{work} holds {documents} documents; to split one takes --merge=True")
    fraction = val_share(documents, meta["val_fraction"])
    whole_ones = val_from is not None or "chat" in meta
    if not whole_ones and cut_at(np.concatenate(lengths), fraction, meta["split_seed"]):
        raise ValueError(
            f"{work} holds few documents of very unequal length; to split them takes --merge=True"
        )
    where = split_parts(lengths, fraction, meta["split_seed"], val_from)
    pieces = [
        Piece(stems[part].with_suffix(".bin"), start, parts[part].ids[start:end])
        for part, start, end in (where.val if split == "val" else where.train).tolist()
    ]
    val_bytes = int(sizes[where.chosen].sum())
    return pieces, val_bytes if split == "val" else int(sizes.sum()) - val_bytes


class OpenPart(NamedTuple):
    """A part that data/prepare.py has made."""

    ids: NDArray[Any]  # (tokens,)
    table: Ints  # (documents, 2): tokens and UTF-8 bytes of each
    val: bool  # of a split that is for validation as it is


def open_part(stem: Path, dtype: str) -> OpenPart:
    """The files of a part. Raises ValueError when they do not fit together."""
    path = stem.with_suffix(".bin")
    try:
        facts = read_json(stem.with_suffix(".json"))
        if facts.get("index") not in INDEX_TYPES or not whole(facts.get("tokens")):
            raise ValueError("its .json is none of data/prepare.py's")
        table = np.fromfile(stem.with_suffix(".index"), dtype=facts["index"])
        table = table.reshape(-1, 2).astype(np.int64)
        ids = open_tokens(path, dtype) if facts["tokens"] else np.zeros(0, dtype)
        sane = ((table >= 0) & (table <= LARGEST)).all()
        if not sane or not len(ids) == facts["tokens"] == table[:, 0].sum():
            raise ValueError("another length than its .json or .index says")
        val = bool(facts["part"].get("val"))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise ValueError(
            f"{path} is damaged ({e}); delete {stem}.json and run its --shards=I/N again"
        ) from e
    return OpenPart(ids, table, val)


def taken_for(folder: Path, ids: NDArray[Any]) -> str:
    """What a folder without meta.json is taken for, with what speaks against it; "" with one.

    ids: (tokens,) of its first file.
    """
    if (folder / "meta.json").exists():
        return ""
    if (folder / characters.FILE).exists():
        return f"{folder} has the meta.pkl of nanoGPT's character data: its ids are characters"
    line, largest = f"{folder} has no meta.json: taken for GPT-2 tokens in uint16", ids[:SCAN].max()
    if largest >= LETTERS:
        return line
    return (
        f"{line}. WARNING: no id is above {largest}, so they look like letters or bytes; with the "
        "meta.pkl that came with them, or prepared with --tokenizer=bytes, they are known"
    )


def larger_share(meta: dict[str, Any], context: int) -> str:
    """A val_fraction with which both splits hold a window, as a piece of a message; "" for none."""
    tokens = sum(int(s.get("tokens", 0)) for s in meta["splits"].values())
    share = 1.1 * (context + 1) / max(1, tokens)
    if not 0 < share <= 0.5 or "val_fraction" not in meta:
        return ""
    up = math.ceil(100 * share) / 100
    return f", or data/prepare.py --val_fraction={up:g} --overwrite=True"


class TokenData:
    """One split of a dataset folder: its files read as one stream of tokens.

    `tokens` is the length of the stream; `nbytes` its UTF-8 text bytes, None when unknown.
    Raises FileNotFoundError or ValueError for missing, damaged or foreign files, for a stream too
    short for one window of `context` + 1 tokens, and for ids that `vocab_size` does not cover.
    """

    packed = False  # windows are stretches of the stream, in which all tokens count
    said = ""  # a line on what it holds, for the user

    def __init__(self, folder: Path, split: str, context: int, vocab_size: int) -> None:
        meta = read_meta(folder)
        facts = meta["splits"].get(split, {})
        self.context, self.vocab_size = context, vocab_size
        self.nbytes: int | None = facts.get("bytes")
        if "parts" in meta:
            self.pieces, self.nbytes = unmerged(folder, split, meta)
        else:
            files = split_files(folder, split)
            self.pieces = [Piece(path, 0, open_tokens(path, meta["dtype"])) for path in files]
        self.sizes = {p.path: p.path.stat().st_size for p in self.pieces}  # bytes
        self.ids = [piece.ids for piece in self.pieces]
        self.begins = [0, *itertools.accumulate(len(ids) for ids in self.ids)]
        self.tokens = self.begins[-1]
        self.dtype = np.result_type(*{ids.dtype.newbyteorder("=") for ids in self.ids})
        path = self.pieces[0].path
        if facts and facts["tokens"] != self.tokens:
            raise ValueError(
                f"{path} has {self.tokens:,} tokens but meta.json says {facts['tokens']:,}; "
                "run data/prepare.py again"
            )
        self.check(path, meta)
        if facts.get("max_id", 0) >= vocab_size:
            raise ValueError(self.too_large(facts["max_id"], str(path)))
        if "max_id" not in facts and not self.packed:
            for piece in self.pieces if "parts" not in meta else []:
                check_foreign(piece.path, piece.ids)
            n = min(SCAN, self.tokens)
            self.windows(np.linspace(0, self.tokens - n, SCANS, dtype=np.int64), n)

    def check(self, path: Path, meta: dict[str, Any]) -> None:
        """Raises ValueError when the stream, whose first file is `path`, has no window."""
        if self.tokens < self.context + 1:
            share = larger_share(meta, self.context)
            raise ValueError(
                f"{path} has {self.tokens:,} tokens, fewer than one window of {self.context} + 1; "
                f"use more text, a smaller --max_position_embeddings{share}"
            )

    @property
    def count(self) -> int:
        """How many windows there are that have no token in common."""
        return (self.tokens - 1) // self.context

    def eval_starts(self, windows: int) -> Ints:
        """Of at most so many of those windows, spread evenly over the split."""
        n = min(windows, self.count)
        return np.arange(n) * self.count // n * self.context

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per token in bits per byte of text; None where the bytes are unknown.

        Those that count in conversations are.
        """
        if self.packed or not self.nbytes:
            return None
        return loss * self.tokens / self.nbytes / math.log(2)

    def check_size(self) -> None:
        """Raises ValueError when a file has shrunk: reading its end would kill the process."""
        for path, size in self.sizes.items():
            if path.exists() and path.stat().st_size < size:
                raise ValueError(f"{path} was cut short while it was read; put the whole file back")

    def windows(self, starts: Ints, length: int | None = None) -> NDArray[Any]:
        """Tokens [start, start + context] of each start: (n,) -> (n, context + 1), unsigned.

        Or `length` tokens of each. Raises ValueError, naming file and place, for an id that
        vocab_size does not cover: a GPU would end the run without a word on where it came from.
        """
        length = length or self.context + 1
        found = np.empty((len(starts), length), dtype=self.dtype)
        for start, row in zip(starts.tolist(), found, strict=True):
            self.read(start, row)
        if found.max() >= self.vocab_size:
            row, column = divmod(int(found.argmax()), length)
            self.refuse(int(found.max()), int(starts[row]) + column)
        return found

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, (length,), with the tokens from `start` on."""
        i = bisect.bisect_right(self.begins, start) - 1
        at, filled = start - self.begins[i], 0
        while filled < len(out):  # more than once when it goes on in the next file
            ids = self.ids[i][at : at + len(out) - filled]
            out[filled : filled + len(ids)] = ids
            at, filled, i = 0, filled + len(ids), i + 1

    def stretch(self, begin: int, end: int) -> NDArray[Any]:
        """The tokens begin .. end - 1."""
        out = np.empty(end - begin, self.dtype)
        self.read(begin, out)
        return out

    def refuse(self, largest: int, place: int) -> NoReturn:
        """Raises ValueError for an id that vocab_size does not cover, at a place of the stream."""
        i = bisect.bisect_right(self.begins, place) - 1
        at = self.pieces[i].first + place - self.begins[i]
        raise ValueError(self.too_large(largest, f"{self.pieces[i].path} at token {at:,}"))

    def too_large(self, largest: int, where: str) -> str:
        return (
            f"{where} holds token id {largest}, but the model's vocab_size is {self.vocab_size}; "
            "set vocab_size to cover the tokenizer, or check that the file is what you think"
        )
