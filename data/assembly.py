"""Parts to train.bin and val.bin, moved piece by piece: the disk holds little more than them once.

Neither an interruption at any moment nor the number of workers changes a byte of the result.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.workers import COPY, MARK, TokenFile, index_of, read_tokens, token_type
from text.files import write
from text.split import Ints, Split, cut_at, is_uneven, split_parts, val_share
from text.tokenizer import StreamDecoder, Tokenizer
from text.tokens import ID

TOO_LITTLE = "the source is one document of a word or two: too little to split"
NEAR = 4096  # tokens in which a new line is looked for, to cut a document there
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
    dtype = token_type(tok)
    paths = [work / f"{number:05d}.bin" for number in facts]
    tables = [index_of(work, number, f) for number, f in facts.items()]
    val_from = first_for_validation(facts.values())
    if limit:
        tables = cut_tables(tables[:val_from], limit) + tables[len(tables[:val_from]) :]
    documents = sum(map(len, tables[:val_from]))
    if documents == 0:
        raise ValueError("the source has no documents")
    if val_from is not None and not sum(map(len, tables[val_from:])):
        raise ValueError("the split for validation has no documents")
    lengths = np.concatenate([table[:, 0] for table in tables])
    fraction = val_share(documents, fraction)
    marker = work / "assembly.json"  # from here on parts that are short or gone have been moved
    if not marker.exists():
        for path, one in zip(paths, facts.values(), strict=True):
            if path.stat().st_size != one["tokens"] * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged: delete {work}")
    if documents == 1 and tok.chat and val_from is None:
        raise ValueError(
            "the source is one conversation, and two are needed: one to learn from, one for val.bin"
            + (f"; --max_tokens={limit} takes no more" if limit else "")
        )
    cut = cut_at(lengths, fraction, seed) if val_from is None and not tok.chat else 0
    if documents == 1 and not cut and val_from is None:
        raise ValueError(TOO_LITTLE)
    if cut:
        if documents > 1:
            share = (lengths.sum() - cut) / lengths.sum()
            print(
                f"val.bin is the end of the text, {share:.2%} of the tokens: documents differ in "
                f"length, and those that --seed={seed} chooses have another share"
            )
        return {"val_fraction": fraction, "splits": split_end(work, paths, tables, tok, cut)}
    split = split_parts([table[:, 0] for table in tables], fraction, seed, val_from)
    if not marker.exists():
        write_val(work / "val.bin", paths, split, dtype)
        (work / "train.bin").write_bytes(b"")
        write(marker, b"{}", MARK)
    edges = np.searchsorted(split.train[:, 0], range(1, len(paths)))
    move_tokens(paths, np.split(split.train[:, 1:], edges), work / "train.bin", dtype)
    sizes = np.concatenate(tables)[:, 1]
    val_bytes = int(sizes[split.chosen].sum())
    known = {
        "train": {
            "documents": len(lengths) - len(split.val),
            "bytes": int(sizes.sum()) - val_bytes,
        },
        "val": {"documents": len(split.val), "bytes": val_bytes},
    }
    found = {name: file_facts(work / f"{name}.bin", dtype, chat=bool(tok.chat)) for name in known}
    splits = {name: {**found[name], **known[name]} for name in known}
    if val_from is not None:
        return {"splits": splits}
    if is_uneven(lengths, split.chosen, fraction):
        share = lengths[split.chosen].sum() / lengths.sum()
        print(
            f"val.bin has {share:.2%} of the tokens, not {fraction:.2%}: documents differ in "
            "length, and whole ones are taken; --val_fraction and --seed choose others"
        )
    return {"val_fraction": fraction, "splits": splits}


def first_for_validation(facts: Iterable[dict[str, Any]]) -> int | None:
    """Which part is the first of a split that is for validation; None: it is cut from training."""
    return next((i for i, f in enumerate(facts) if f["part"].get("val")), None)


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


def split_end(
    work: Path, paths: list[Path], tables: list[Ints], tok: Tokenizer, cut: int
) -> dict[str, Any]:
    """Splits of few documents: what follows about `cut` tokens of all is for validation.

    Inside a document that is from a new line on if one is near, else between two characters, and
    both sides end with end-of-text. Raises ValueError when there is too little to cut.
    """
    dtype = token_type(tok)
    eot = np.array([tok.eot], dtype=dtype)
    marker, train, val = work / "assembly.json", work / "train.bin", work / "val.bin"
    table = np.concatenate(tables)
    ends = np.cumsum(table[:, 0])  # of each document, in tokens of the source
    before = np.cumsum([0, *(int(t[:, 0].sum()) for t in tables)])  # of each part
    if not marker.exists():
        document = int(np.searchsorted(ends, cut, "right"))
        val_bytes = int(table[document:, 1].sum())
        if cut not in ends:
            last = int(ends[document]) - 1  # its end-of-text
            near = tokens_from(paths, before, dtype, cut, min(last, cut + NEAR))
            cut += place_to_cut(near, tok)
            val_bytes -= int(table[document, 1])
            for at in range(cut, last, COPY):
                ids = tokens_from(paths, before, dtype, at, min(last, at + COPY))
                val_bytes += sum(len(tok.token_bytes(i, False)) for i in ids.tolist())
        with TokenFile(val, dtype) as file:
            for at in range(cut, int(before[-1]), COPY):
                file.write(tokens_from(paths, before, dtype, at, min(int(before[-1]), at + COPY)))
            file.sync()
        train.write_bytes(b"")
        write(marker, json.dumps({"cut": cut, "val_bytes": val_bytes}), MARK)
    made = json.loads(marker.read_bytes())
    cut, val_bytes = made["cut"], made["val_bytes"]
    kept = np.clip(cut - before[:-1], 0, np.diff(before))
    ranges = [np.array([[0, n]] if n else np.zeros((0, 2)), dtype=np.int64) for n in kept]
    move_tokens(paths, ranges, train, dtype)
    inside = cut not in ends
    with train.open("r+b") as out:
        out.seek(cut * eot.itemsize)
        if inside:
            out.write(eot.data)
        out.flush()
        os.fsync(out.fileno())
    whole = int(np.searchsorted(ends, cut, "right"))  # documents before the cut
    known = {
        "train": {"documents": whole + inside, "bytes": int(table[:, 1].sum()) - val_bytes},
        "val": {"documents": len(table) - whole, "bytes": val_bytes},
    }
    return {name: {**file_facts(work / f"{name}.bin", dtype), **known[name]} for name in known}


def place_to_cut(near: NDArray[Any], tok: Tokenizer) -> int:
    """How many tokens of a document's rest stay before a cut. Raises ValueError for a short one."""
    decoder, between = StreamDecoder(tok), 0
    for i, token in enumerate(near[:-1].tolist(), 1):
        text = decoder.push(token)
        if text.endswith("\n"):
            return i
        if text and not decoder.in_character and "\ufffd" not in text:
            between = between or i
    if not between:
        raise ValueError(TOO_LITTLE)
    return between


def tokens_from(paths: list[Path], before: Ints, dtype: str, start: int, stop: int) -> NDArray[Any]:
    """Tokens start .. stop - 1 of parts laid end to end; before: where each begins, and the end."""
    found = [np.zeros(0, dtype=dtype)]
    for path, first, end in zip(paths, before[:-1].tolist(), before[1:].tolist(), strict=True):
        a, b = max(start, first), min(stop, end)
        if a < b:
            found += read_tokens(path, dtype, a - first, b - first)
    return np.concatenate(found)


def file_facts(path: Path, dtype: str, skip: int = 0, chat: bool = False) -> dict[str, Any]:
    """Tokens, sha256 and largest id of a token file; the ids begin after `skip` of header.

    chat: it holds conversations, of which it is also said how many tokens count.
    Raises ValueError when the last token is not whole.
    """
    sha256, largest, counted = hashlib.sha256(), 0, 0
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise ValueError(f"{path} has {size} bytes, not a multiple of {width}: it is unfinished")
    for ids in read_tokens(path, dtype, 0, size // width):
        sha256.update(ids.data)
        if chat:
            counted += int((ids >> 31).sum(dtype=np.int64))
            ids = ids & np.uint32(ID)
        largest = max(largest, int(ids[skip:].max(initial=0)))
        skip = 0
    facts = {"files": [path.name], "tokens": size // width, "sha256": sha256.hexdigest()}
    return {**facts, "max_id": largest, **({"counted": counted} if chat else {})}


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
