"""Parts to train.bin and val.bin, moved piece by piece: the disk holds little more than them once.

Neither an interruption at any moment nor the number of workers changes a byte of the result.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.workers import COPY, MARK, TokenFile, index_of, read_tokens, token_type
from text.files import write
from text.split import Ints, Split, split_parts, val_share
from text.tokenizer import Tokenizer

SYNC_SHARE = 0.02  # of train.bin may be on the disk twice while it grows


def assemble(
    work: Path,
    facts: dict[int, dict[str, Any]],
    tok: Tokenizer,
    limit: int,
    fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Parts to train.bin and val.bin in the parts' folder: what meta.json says of the splits.

    facts: of each part in the source's order, what its .json says; limit: tokens to use, 0 for
    all; fraction and seed of the split as in text/split.py. A run that was killed goes on where it
    was. Raises ValueError for damaged parts, and for a source with nothing to split.
    """
    dtype = token_type(tok.vocab_size)
    paths = [work / f"{number:05d}.bin" for number in facts]
    tables = [index_of(work, number, f) for number, f in facts.items()]
    if limit:
        tables = cut_tables(tables, limit)
    documents = sum(map(len, tables))
    if documents == 0:
        raise ValueError("the source has no documents")
    fraction = val_share(documents, fraction)
    if documents == 1:
        lone = [len(table) for table in tables].index(1)
        length, size = tables[lone][0].tolist()
        splits = split_one(work, paths[lone], length, size, tok, fraction)
        return {"val_fraction": fraction, "splits": splits}
    split = split_parts([table[:, 0] for table in tables], fraction, seed)

    marker = work / "assembly.json"  # from here on parts that are short or gone have been moved
    if not marker.exists():
        for path, one in zip(paths, facts.values(), strict=True):
            if path.stat().st_size != one["tokens"] * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged: delete {work}")
        write_val(work / "val.bin", paths, split, dtype)
        (work / "train.bin").write_bytes(b"")
        write(marker, b"{}", MARK)
    edges = np.searchsorted(split.train[:, 0], range(1, len(paths)))
    move_tokens(paths, np.split(split.train[:, 1:], edges), work / "train.bin", dtype)
    sizes = np.concatenate(tables)[:, 1]
    val_bytes = int(sizes[split.chosen].sum())
    known = {
        "train": {"documents": documents - len(split.val), "bytes": int(sizes.sum()) - val_bytes},
        "val": {"documents": len(split.val), "bytes": val_bytes},
    }
    splits = {name: {**file_facts(work / f"{name}.bin", dtype), **known[name]} for name in known}
    return {"val_fraction": fraction, "splits": splits}


def cut_tables(tables: list[Ints], limit: int) -> list[Ints]:
    """Of the parts' indexes only the first documents that have `limit` tokens together."""
    kept, left = [], limit
    for table in tables:
        before = np.cumsum(table[:, 0]) - table[:, 0]
        kept.append(table[before < left])
        left -= int(table[:, 0].sum())
    return kept


def write_val(path: Path, paths: list[Path], split: Split, dtype: str) -> None:
    """val.bin: a copy of the validation documents of the parts' files."""
    with TokenFile(path, dtype) as val:
        for part, start, end in split.val.tolist():
            for ids in read_tokens(paths[part], dtype, start, end):
                val.write(ids)
        val.sync()


class Moved:
    """Tokens that have been written to `out`; what they came from is cut off once they are safe."""

    def __init__(self, out: BinaryIO, width: int, limit: int) -> None:
        """width: bytes of a token; limit: tokens that may be there twice."""
        self.out, self.width, self.limit = out, width, limit
        self.left: dict[Path, int] = {}  # file -> tokens that it may be cut down to
        self.twice = 0

    def add(self, path: Path, left: int, tokens: int) -> None:
        """`tokens` more of a file: it may be cut down to `left`."""
        self.left[path] = left
        self.twice += tokens
        if self.twice > self.limit:
            self.sync()

    def sync(self) -> None:
        """Onto the disk, then off the files; a file with nothing left is deleted."""
        self.out.flush()
        os.fsync(self.out.fileno())
        for path, tokens in self.left.items():
            if tokens:
                os.truncate(path, tokens * self.width)
            else:
                path.unlink()
        self.left.clear()
        self.twice = 0


def move_tokens(paths: list[Path], ranges: list[Ints], target: Path, dtype: str) -> None:
    """The token ranges of each file, (runs, 2), one after another into `target`; files end empty.

    Each file is moved from its end to its start and cut off behind what has reached the disk, so
    that there is never much more than one copy, and what is left of the files tells a later call
    where to go on.
    """
    width = np.dtype(dtype).itemsize
    offsets = np.cumsum([0] + [int((r[:, 1] - r[:, 0]).sum()) for r in ranges])
    limit = int(SYNC_SHARE * offsets[-1])
    chunk = min(COPY, max(2**15, limit // 2))
    with target.open("r+b") as out:
        moved = Moved(out, width, limit)
        for path, runs, offset in zip(paths, ranges, offsets[:-1].tolist(), strict=True):
            before = np.cumsum(runs[:, 1] - runs[:, 0]) - (runs[:, 1] - runs[:, 0])
            end = path.stat().st_size // width if path.exists() else 0
            while end:
                start = max(0, end - chunk)
                (ids,) = read_tokens(path, dtype, start, end)
                first = int(np.searchsorted(runs[:, 1], start, "right"))
                last = int(np.searchsorted(runs[:, 0], end, "left"))
                here = runs[first:last].clip(start, end)
                if len(here):
                    at = offset + before[first] + here[0, 0] - runs[first, 0]
                    out.seek(int(at) * width)
                    out.write(np.concatenate([ids[a - start : b - start] for a, b in here]).data)
                end = start
                moved.add(path, start, len(ids))
            if not path.exists() or not path.stat().st_size:
                path.unlink(missing_ok=True)
        moved.sync()


def split_one(
    work: Path, path: Path, length: int, size: int, tok: Tokenizer, fraction: float
) -> dict[str, Any]:
    """Splits of a lone document of `length` tokens and `size` bytes: its end is for validation.

    From a new line on if one is near, else between two characters. Its own file becomes train.bin.
    Raises ValueError when it is too short.
    """
    dtype, tokens = token_type(tok.vocab_size), length - 1  # without end-of-text
    eot = np.array([tok.eot], dtype=dtype)
    marker, train = work / "assembly.json", work / "train.bin"
    if not marker.exists():
        cut = tokens - math.ceil(fraction * tokens)
        near = [i for ids in read_tokens(path, dtype, cut, min(tokens, cut + 4096)) for i in ids]
        texts = [tok.decode([token]) for token in near[:-1]]
        ends = [i for i, t in enumerate(texts) if t.endswith("\n")]
        ends += [i for i, t in enumerate(texts) if not t.endswith("\ufffd")]
        if not ends:
            raise ValueError("the source is one document of a word or two: too little to split")
        cut += ends[0] + 1
        val_bytes = 0
        with TokenFile(work / "val.bin", dtype) as val:
            for ids in read_tokens(path, dtype, cut, tokens):
                val.write(ids)
                val_bytes += sum(len(tok.token_bytes(i, False)) for i in ids.tolist())
            val.write(eot)
            val.sync()
        write(marker, json.dumps({"cut": cut, "val_bytes": val_bytes}), MARK)
    made = json.loads(marker.read_bytes())
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(made["cut"] * eot.itemsize)
            file.seek(0, os.SEEK_END)
            file.write(eot.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, train)
    sizes = {"train": size - made["val_bytes"], "val": made["val_bytes"]}
    return {
        name: {**file_facts(work / f"{name}.bin", dtype), "documents": 1, "bytes": nbytes}
        for name, nbytes in sizes.items()
    }


def file_facts(path: Path, dtype: str, skip: int = 0) -> dict[str, Any]:
    """Tokens, sha256 and largest id of a token file; the ids begin after `skip` of header.

    Raises ValueError when the last token is not whole.
    """
    sha256, largest = hashlib.sha256(), 0
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise ValueError(f"{path} has {size} bytes, not a multiple of {width}: it is unfinished")
    for ids in read_tokens(path, dtype, 0, size // width):
        sha256.update(ids.data)
        largest = max(largest, int(ids[skip:].max(initial=0)))
        skip = 0
    facts = {"files": [path.name], "tokens": size // width, "sha256": sha256.hexdigest()}
    return {**facts, "max_id": largest}


def publish(out: Path) -> dict[str, Any]:
    """Put the finished files in place and delete the parts; meta.json of the parts is the sign.

    meta.json first: bins without the right one would be taken for GPT-2 tokens. Returns it.
    """
    work = out / "parts"
    sign = work / "meta.json"
    data = sign.read_bytes()
    meta: dict[str, Any] = json.loads(data)
    if meta["tokenizer"] == "tokenizer.json":
        write(out / "tokenizer.json", (work / "tokenizer.json").read_bytes(), MARK)
    else:
        (out / "tokenizer.json").unlink(missing_ok=True)  # of what was here before
    write(out / "meta.json", data, MARK)
    for name in ("val.bin", "train.bin"):
        if (work / name).exists():
            os.replace(work / name, out / name)
    for path in work.iterdir():
        if path != sign and not path.name.startswith("lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sign.unlink()
    return meta
