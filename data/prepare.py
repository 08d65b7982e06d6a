"""Text to token files: python data/prepare.py [--source=...] makes data/<dataset>/train.bin.

With no arguments the source is OpenWebText from the Hugging Face Hub, with GPT-2's tokens.
--source=stdlib is the prose inside every Python installation: 2 MB of English, no download.
--source=PATH is your own text: a file, a folder or a pattern of .txt, .jsonl, .parquet and more.
--verify=True checks a folder that is there. Run the same command again after an interruption.

Workers turn each part of the source into a file of tokens in data/<dataset>/parts. When all are
there, they are moved into train.bin piece by piece, so that the disk holds little more than the
tokens once, and neither an interruption nor the number of workers changes a byte.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import sources  # noqa: E402
from parts import (  # noqa: E402
    BATCH,
    COPY,
    Job,
    TokenFile,
    encode_parts,
    enough,
    facts_of,
    index_of,
    read_tokens,
    token_type,
    write_file,
)
from sources import FULL, BadData, Part, Source  # noqa: E402

from configurator import configure  # noqa: E402
from tokenizer import Tokenizer, get_tokenizer  # noqa: E402

# what
source = "hub:Skylion007/openwebtext"  # hub:NAME, stdlib, a file, a folder, or a pattern with *
dataset = ""  # name of the folder under data/ to write, or a path; empty = from the source
tokenizer = "auto"  # gpt2, bytes, PATH of a tokenizer.json, train:8192; auto = gpt2, stdlib bytes
text_column = "text"  # of .jsonl, .parquet and .arrow
separator = ""  # between the documents of a .txt, such as <|endoftext|>; empty = a file is one
subset = ""  # of a Hub dataset that has several
split = "train"  # of a Hub dataset
revision = ""  # of a Hub dataset: branch, tag or commit; empty = the newest, which is recorded
# how much
max_tokens = ""  # stop after so many, such as 100M; empty = all
shards = ""  # 0-7 or 0,3: only these files of the source; 2/8: the third of eight equal shares
merge = False  # put together what --shards=0/8 ... 7/8 have made
# split
val_fraction = 0.0  # of the documents; 0 = 0.0005 as nanoGPT, 0.05 below 100,000 documents
seed = 2357  # of the split, nanoGPT's
# how
num_proc = 0  # worker processes; 0 = one a core
skip_bad = False  # leave damaged files and documents out, and list them in meta.json
overwrite = False  # throw away what is in the folder, complete or not
verify = False  # only check the folder: counts, hashes, range of the ids; show some text

LOCK_ATTEMPTS = 50  # of a share, a tenth of a second apart
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what a lock of somebody else looks like
SYNC_SHARE = 0.02  # of train.bin may be on the disk twice while it grows
TRAIN_ON = 2**27  # characters that --tokenizer=train:N learns from, from the start of the source
LLMC_MAGIC, HEADER = 20240520, 512  # of llm.c's shards; the header in uint16
# Tokens per byte of text, at least: for the free-disk check
TOKENS_PER_BYTE = {"gpt2": 0.2, "bytes": 1.0}


def val_documents(n: int, fraction: float, split_seed: int) -> NDArray[np.int64]:
    """Which of n documents are for validation, in val.bin's order.

    As datasets.train_test_split(test_size=fraction, seed=split_seed, shuffle=True) chooses them,
    but that neither split is ever empty.
    """
    order = np.random.default_rng(split_seed).permutation(n)
    return order[: min(max(1, math.ceil(fraction * n)), n - 1)]


def assemble(
    work: Path, facts: dict[int, dict[str, Any]], tok: Tokenizer, limit: int
) -> dict[str, Any]:
    """Parts to train.bin and val.bin in the parts' folder: what meta.json says of the splits.

    Validation documents stand in the split's order, training documents in the source's (the
    loader shuffles). A run that was killed goes on where it was.
    """
    dtype = token_type(tok.vocab_size)
    paths = [work / f"{number:05d}.bin" for number in facts]
    tables = [index_of(work, number, f) for number, f in facts.items()]
    if limit:
        tables = cut_tables(tables, limit)
    edges = np.cumsum([0] + [len(t) for t in tables])  # first document of each part
    n = int(edges[-1])
    if n == 0:
        raise ValueError("the source has no documents")
    fraction = val_fraction or (0.0005 if n >= 100_000 else 0.05)
    if n == 1:
        k = int(np.argmax(edges > 0)) - 1
        splits = split_one(work, paths[k], *tables[k][0].tolist(), tok, fraction)
        return {"val_fraction": fraction, "splits": splits}
    chosen = val_documents(n, fraction, seed)
    is_val = np.zeros(n, dtype=bool)
    is_val[chosen] = True

    marker = work / "assembly.json"  # from here on parts that are short or gone have been moved
    if not marker.exists():
        for path, one in zip(paths, facts.values(), strict=True):
            if path.stat().st_size != one["tokens"] * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged: delete {work}")
        val = TokenFile(work / "val.bin", dtype)
        ends = [np.cumsum(t[:, 0]) for t in tables]
        for i in chosen:
            k = int(np.searchsorted(edges, i, side="right")) - 1
            end, length = int(ends[k][i - edges[k]]), int(tables[k][i - edges[k], 0])
            for ids in read_tokens(paths[k], dtype, end - length, end):
                val.write(ids)
        val.close()
        (work / "train.bin").write_bytes(b"")
        write_file(marker, b"{}")
    ranges = [
        kept_ranges(t[:, 0], is_val[a:b]) for t, (a, b) in zip(tables, pairwise(edges), strict=True)
    ]
    move_tokens(paths, ranges, work / "train.bin", dtype)
    table = np.concatenate(tables)
    splits = {}
    for name, documents in (("train", table[~is_val]), ("val", table[is_val])):
        known = {"documents": len(documents), "bytes": int(documents[:, 1].sum())}
        splits[name] = {**file_facts(work / f"{name}.bin", dtype), **known}
    return {"val_fraction": fraction, "splits": splits}


def cut_tables(tables: list[NDArray[np.int64]], limit: int) -> list[NDArray[np.int64]]:
    """Only the first documents that have `limit` tokens together."""
    kept, left = [], limit
    for table in tables:
        before = np.cumsum(table[:, 0]) - table[:, 0]
        kept.append(table[before < left])
        left -= int(table[:, 0].sum())
    return kept


def kept_ranges(lengths: NDArray[np.int64], left_out: NDArray[np.bool_]) -> NDArray[np.int64]:
    """First token and end of each run of documents that are not left out: (runs, 2)."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    change = np.flatnonzero(np.diff(np.concatenate([[True], left_out, [True]])))
    return edges[change.reshape(-1, 2)]


def move_tokens(
    paths: list[Path], ranges: list[NDArray[np.int64]], target: Path, dtype: str
) -> None:
    """The token ranges of each file, (runs, 2), one after another into `target`; files end empty.

    Each file is moved from its end to its start and cut off behind what has reached the disk, so
    that there is never much more than one copy, and what is left of the files tells a later call
    where to go on.
    """
    width = np.dtype(dtype).itemsize
    offsets = np.cumsum([0] + [int((r[:, 1] - r[:, 0]).sum()) for r in ranges])
    unsynced_limit = int(SYNC_SHARE * offsets[-1])
    chunk = min(COPY, max(2**15, unsynced_limit // 2))
    moved: dict[Path, int] = {}  # file -> tokens that it may be cut down to
    unsynced = 0
    with target.open("r+b") as out:

        def sync() -> None:
            nonlocal unsynced
            out.flush()
            os.fsync(out.fileno())
            for path, tokens in moved.items():
                if tokens:
                    os.truncate(path, tokens * width)
                else:
                    path.unlink()
            moved.clear()
            unsynced = 0

        for path, runs, offset in zip(paths, ranges, offsets[:-1].tolist(), strict=True):
            before = np.cumsum(runs[:, 1] - runs[:, 0]) - (runs[:, 1] - runs[:, 0])
            end = path.stat().st_size // width if path.exists() else 0
            while end:
                start = max(0, end - chunk)
                (ids,) = read_tokens(path, dtype, start, end)
                first, last = (
                    np.searchsorted(runs[:, 1], start, "right"),
                    int(np.searchsorted(runs[:, 0], end, "left")),
                )
                here = runs[first:last].clip(start, end)
                if len(here):
                    at = offset + before[first] + here[0, 0] - runs[first, 0]
                    out.seek(int(at) * width)
                    out.write(np.concatenate([ids[a - start : b - start] for a, b in here]).data)
                moved[path], end = start, start
                unsynced += len(ids)
                if unsynced > unsynced_limit:
                    sync()
            if not path.exists() or not path.stat().st_size:
                path.unlink(missing_ok=True)
        sync()


def split_one(
    work: Path, path: Path, length: int, size: int, tok: Tokenizer, fraction: float
) -> dict[str, Any]:
    """Splits of a lone document of `length` tokens and `size` bytes: its end is for validation.

    From a new line on if one is near, else between two characters. Its own file becomes train.bin.
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
        val, val_bytes = TokenFile(work / "val.bin", dtype), 0
        for ids in read_tokens(path, dtype, cut, tokens):
            val.write(ids)
            val_bytes += sum(len(tok.token_bytes(i, False)) for i in ids.tolist())
        val.write(eot)
        val.close()
        write_file(marker, json.dumps({"cut": cut, "val_bytes": val_bytes}).encode())
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
    """Tokens, sha256 and largest id of a token file; the ids begin after `skip` of header."""
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

    meta.json first: bins without the right one would be taken for GPT-2 tokens.
    """
    work = out / "parts"
    sign = work / "meta.json"
    data = sign.read_bytes()
    meta: dict[str, Any] = json.loads(data)
    if meta["tokenizer"] == "tokenizer.json":
        write_file(out / "tokenizer.json", (work / "tokenizer.json").read_bytes())
    else:
        (out / "tokenizer.json").unlink(missing_ok=True)  # of what was here before
    write_file(out / "meta.json", data)
    for name in ("val.bin", "train.bin"):
        if (work / name).exists():
            os.replace(work / name, out / name)
    for path in work.iterdir():
        if path != sign and not path.name.startswith("lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sign.unlink()
    return meta


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process may hold the file; the system frees it when that ends, however it ends.

    Raises OSError saying who holds it. A disk without locks is said to be one and has none.
    """
    f = path.open("a+", encoding="utf-8")
    try:
        if sys.platform == "win32":
            import msvcrt

            f.seek(2**20)  # a byte that nobody wants to read
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(f.fileno()), path.stat()):
                raise OSError(errno.EAGAIN, "its holder has just deleted it")
    except OSError as e:
        if e.errno not in HELD:
            print(f"WARNING: no lock on {path} ({e}): start no second run there", file=sys.stderr)
            yield f.close()
            return
        f.seek(0)
        holder = f.read().strip() or "another process"
        f.close()
        raise OSError(
            f"{path.parent.parent} is being prepared by {holder}; wait for it, or choose another "
            "--dataset"
        ) from e
    try:
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield
    finally:
        if sys.platform == "win32":  # which deletes no open file, nor one that others wait for
            f.close()
        with f, contextlib.suppress(OSError):  # unlinked before it is free: no second holder
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: there is more to do
            path.parent.rmdir()
            path.parent.parent.rmdir()


def wait_for(path: Path) -> None:
    """Return when nobody holds the lock `path`. Raises OSError when somebody goes on holding it."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            with lock(path):
                return
        except OSError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0.01, 0.2))


def mine(found: Source) -> tuple[list[int], list[int]]:
    """The parts that `shards` selects for the dataset, and those of them that this run makes.

    Raises ValueError for a share or shard that there is not.
    """
    numbers = list(range(len(found.parts)))
    if not shards:
        return numbers, [] if merge else numbers
    try:
        if "/" in shards:
            i, n = map(int, shards.split("/"))
            if not 0 <= i < n:
                raise ValueError
            return numbers, numbers[i::n]
        chosen: set[int] = set()
        for piece in shards.split(","):
            first, _, last = piece.partition("-")
            chosen.update(range(int(first), int(last or first) + 1))
    except ValueError as e:
        raise ValueError(f"shards must be like 0-7, 0,3 or 2/8, not {shards!r}") from e
    if not chosen or max(chosen) >= found.shards:
        raise ValueError(f"shards={shards}, but the source has shards 0-{found.shards - 1}")
    numbers = [i for i in numbers if found.parts[i].shard in chosen]
    return numbers, [] if merge else numbers


def parse_count(text: str) -> int:
    """100M, 1.5B, 20k or 100_000 as a number; "" is 0. Raises ValueError."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if unit > 1 else text.replace("_", "")) if text else 0.0
        if not 0 <= number < math.inf or (text and number == 0):
            raise ValueError
    except ValueError as e:
        raise ValueError(f"max_tokens must be like 100M or 2B, not {text!r}") from e
    return int(number * unit)


def check_disk(out: Path, todo: list[Part], name: str, limit: int) -> None:
    """Raises OSError when the tokens cannot fit on the disk, by a cautious guess of their size."""
    text = sum(map(sources.text_size, todo))
    width = 4 if name.endswith(".json") else 2
    tokens = text * TOKENS_PER_BYTE.get(name, 0.1)
    need = width * (min(tokens, limit) if limit else tokens)
    need += max((p.size for p in todo if p.repo), default=0) * min(num_proc or cores(), len(todo))
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(
            f"about {need / 1e9:.1f} GB are needed in {out}, but {free / 1e9:.1f} GB are free; "
            "choose another --dataset=PATH, or less with --max_tokens or --shards"
        )


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_bpe(found: Source, size: int, folder: Path) -> str:
    """A byte-level BPE of `size` tokens, end-of-text among them, learnt from the source's start.

    `folder` is for files of the Hub while they are read.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < 257:
        raise ValueError(f"tokenizer=train:{size}: at least 257, the bytes and end-of-text")

    def texts() -> Iterator[str]:
        left = TRAIN_ON
        for part in found.parts:
            for document in sources.documents(part, text_column, separator, folder):
                try:
                    if isinstance(document, BadData):
                        raise document
                    for text in [document] if isinstance(document, str) else document:
                        yield text
                        left -= len(text)
                        if left <= 0:
                            return
                except BadData:
                    if not skip_bad:
                        raise

    tok = HuggingFaceTokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    try:
        tok.train_from_iterator(texts(), trainer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(tok.to_str())


def load_tokenizer(name: str, found: Source, work: Path) -> Tokenizer:
    """The tokenizer of the settings; its tokenizer.json is kept in `work`, trained only once."""
    kept = work / "tokenizer.json"
    if name.startswith("train:"):
        if not name[6:].isdigit():
            raise ValueError(f"tokenizer must be like train:8192, not {name!r}")
        if not kept.exists():
            write_file(kept, train_bpe(found, int(name[6:]), work / "tokenizer.hub").encode())
        return get_tokenizer(str(kept))
    tok = get_tokenizer(name)
    if tok.json_text is not None:
        write_file(kept, tok.json_text.encode())
    return tok


def prepare(out: Path, name: str) -> None:
    """Make the dataset folder, or the parts of a share of it."""
    work, limit = out / "parts", parse_count(max_tokens)
    if (work / "meta.json").exists():
        meta = publish(out)  # the last run was killed at the very end
        if meta.get("request") == request(name):
            print(f"{out} is complete")
            return
    saved = json.loads(p.read_bytes()) if (p := work / "plan.json").exists() else None
    plan = {"format": 1, "batch": BATCH, **request(name)}
    begun = any(work.glob("[0-9]*.json"))
    going_on = saved is not None and saved["plan"] == plan and saved.get("overwrite", False)
    if (overwrite and not going_on) or (saved and saved["plan"] != plan and not begun):
        saved = None
        old = [path for path in work.glob("*") if not path.name.startswith("lock")]
        for path in sorted(old, key=lambda path: path.name == "plan.json"):  # that one last
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (
        not overwrite
        and saved is None
        and (out / "meta.json").exists()
        and (out / "train.bin").exists()
    ):
        meta = json.loads((out / "meta.json").read_bytes())
        if meta.get("request") != request(name):
            raise ValueError(
                f"{out} holds {meta.get('source')!r} or other settings; choose another --dataset, "
                "or replace it with --overwrite=True"
            )
        print(f"{out} is complete already (--overwrite=True prepares it again)")
        return
    if saved is not None and saved["plan"] != plan:
        changed = ", ".join(k for k in plan if plan[k] != saved["plan"].get(k))
        raise ValueError(
            f"{work} holds an unfinished run with another {changed}; finish that, choose another "
            "--dataset, or start over with --overwrite=True"
        )
    found = sources.find(source, subset, split, (saved or {}).get("revision") or revision)
    numbers, here = mine(found)
    kept = {"plan": plan, "revision": found.revision, "overwrite": overwrite or bool(going_on)}
    write_file(work / "plan.json", json.dumps(kept).encode())
    tok = load_tokenizer(name, found, work)
    for path in work.glob("*.tmp"):  # of a run that was killed
        if "/" not in shards:
            path.unlink(missing_ok=True)
    facts = {i: f for i in numbers if (f := facts_of(work, i, found.parts[i])) is not None}
    have = {i: int(f["tokens"]) for i, f in facts.items()}
    todo = {i: found.parts[i] for i in here if i not in have}
    if todo and not enough(have, limit, numbers):
        check_disk(out, [*todo.values()], name, limit)
        job_name = tok.name if tok.json_text is None else "tokenizer.json"
        job = Job(str(work), job_name, tok.json_text, text_column, separator, skip_bad, limit)
        if (work / "assembly.json").exists():
            raise ValueError(f"{source} has changed meanwhile; start over with --overwrite=True")
        encode_parts(todo, have, job, num_proc or cores(), numbers)
    if "/" in shards:
        if not limit:
            describe_parts(out, len(numbers), found, tok, name)
        print(
            f"{work}: {len(here)} of {len(numbers)} parts, share {shards}; with all shares there, "
            "train.py reads them as they stand, and --merge=True makes train.bin of them"
        )
        return
    if limit:
        total = np.cumsum([have.get(i, 0) for i in numbers])
        numbers = numbers[: int(np.searchsorted(total, limit)) + 1]
    missing = [i for i in numbers if i not in have]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(numbers)} parts are missing (the first is {missing[0]}): "
            "run the other --shards=I/N, or no --shards and no --merge to make them here"
        )
    finish(out, numbers, found, tok, name, limit)


def request(name: str) -> dict[str, Any]:
    """The settings that a dataset's bytes depend on."""
    what = {"source": source, "subset": subset, "split": split, "revision": revision}
    what |= {"tokenizer": name, "text_column": text_column, "separator": separator}
    part = {"max_tokens": max_tokens, "shards": "" if "/" in shards else shards}
    return {**what, **part, "val_fraction": val_fraction, "seed": seed}


def description(found: Source, tok: Tokenizer, name: str) -> dict[str, Any]:
    """What meta.json says of any dataset; what the splits hold comes on top."""
    meta: dict[str, Any] = {
        "format": 1,
        "tokenizer": tok.name,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "dtype": "uint16" if tok.vocab_size <= 2**16 else "uint32",
        "source": source,
        "revision": found.revision,
        "split_seed": seed,
        "request": request(name),
    }
    if tok.json_text is not None:
        meta["tokenizer_sha256"] = hashlib.sha256(tok.json_text.encode()).hexdigest()
    return meta


def describe_parts(out: Path, parts: int, found: Source, tok: Tokenizer, name: str) -> None:
    """A meta.json with which the loader reads the parts before they are merged.

    The same whichever share writes it; its "parts" says how many there will be.
    """
    meta = description(found, tok, name) | {"partial": False, "parts": parts}
    meta |= {"val_fraction": val_fraction, "splits": {}}
    if tok.json_text is not None:
        write_file(out / "tokenizer.json", tok.json_text.encode())
    write_file(out / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def finish(
    out: Path, numbers: list[int], found: Source, tok: Tokenizer, name: str, limit: int
) -> None:
    """Parts to a complete dataset folder."""
    work = out / "parts"
    facts = {i: f for i in numbers if (f := facts_of(work, i, found.parts[i])) is not None}
    assert len(facts) == len(numbers)
    skipped = [f["skipped"] for f in facts.values() if f["skipped"]["count"]]
    tokens = sum(f["tokens"] for f in facts.values())
    meta = description(found, tok, name)
    meta["partial"] = len(numbers) < len(found.parts) or bool(limit and tokens > limit)
    meta["skipped"] = skipped
    meta |= assemble(work, facts, tok, limit)
    write_file(work / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    publish(out)
    documents = sum(meta["splits"][s]["documents"] for s in ("train", "val"))
    if found.documents not in (None, documents) and not meta["partial"]:
        print(
            f"WARNING: {documents:,} documents, but this source should have {found.documents:,}; "
            "losses on its val.bin cannot be compared with others'"
        )
    for one in skipped:
        print(f"left out {one['count']}: {'; '.join(one['first'][:3])}")
    for s, f in meta["splits"].items():
        print(f"{out / s}.bin: {f['tokens']:,} tokens, {f['documents']:,} documents")


def check_folder(out: Path) -> None:
    """Read a dataset folder again and print what it holds. Raises ValueError for any mismatch.

    Without meta.json the bins are taken for GPT-2 tokens, with llm.c's header if they have it.
    """
    made = out / "meta.json"
    meta: dict[str, Any] = {"tokenizer": "gpt2", "dtype": "uint16", "splits": {}}
    if made.exists():
        try:
            meta = json.loads(made.read_text(encoding="utf-8"))
            np.dtype(meta["dtype"]), str(meta["tokenizer"]), dict(meta["splits"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{made} is not what data/prepare.py writes ({e!r})") from e
    if "parts" in meta:
        raise ValueError(f"{out} holds shares that are not merged: --merge=True, then --verify")
    tok = get_tokenizer(meta["tokenizer"], out)
    problems: list[str] = []
    text = (tok.json_text or "").encode()
    if meta.get("tokenizer_sha256") not in (None, hashlib.sha256(text).hexdigest()):
        problems.append("tokenizer.json is not the one that meta.json was written for")
    for name in ("train", "val"):
        facts = meta["splits"].get(name, {})
        files = [out / f for f in facts.get("files", [])]
        files = files or [p for p in [out / f"{name}.bin"] if p.exists()]
        files = files or sorted({*out.glob(f"{name}_*.bin"), *out.glob(f"*_{name}_*.bin")})
        if not files:
            problems.append(f"no {name}.bin")
            continue
        seen = {"tokens": 0, "documents": 0, "max_id": 0}
        for path in files:
            head = np.fromfile(path, dtype="<i4", count=3)
            skip = HEADER if len(head) == 3 and head[0] == LLMC_MAGIC else 0
            found = file_facts(path, meta["dtype"], skip)
            if skip and found["tokens"] - skip != head[2]:
                problems.append(f"{path.name}: header says {head[2]:,} tokens")
            ids = np.memmap(path, dtype=meta["dtype"], mode="r")[skip:]
            seen["tokens"] += len(ids)
            seen["max_id"] = max(seen["max_id"], found["max_id"])
            starts = range(0, len(ids), COPY)
            seen["documents"] += sum(int((ids[a : a + COPY] == tok.eot).sum()) for a in starts)
            if len(files) == 1 and facts.get("sha256") not in (None, found["sha256"]):
                problems.append(f"{path.name}: sha256 is {found['sha256']}, not {facts['sha256']}")
            for start in np.linspace(0, max(0, len(ids) - 40), 3, dtype=np.int64):
                print(f"{path.name} at {start:,}: {tok.decode(ids[start : start + 40].tolist())!r}")
        print(f"{name}: " + ", ".join(f"{v:,} {k}" for k, v in seen.items()))
        problems += [
            f"{name}: {seen[k]:,} {k}, but meta.json says {facts[k]:,}"
            for k in seen
            if k in facts and seen[k] != facts[k]
        ]
        if seen["max_id"] >= tok.vocab_size:
            problems.append(f"{name}: id {seen['max_id']} is beyond the {tok.vocab_size} tokens")
    if problems:
        raise ValueError(f"{out} is damaged: " + "; ".join(problems))
    print(f"{out}: all as it should be" + ("" if made.exists() else " (no meta.json to compare)"))


def main() -> None:
    where = Path(source.removeprefix("hub:"))
    while glob.has_magic(where.name):
        where = where.parent
    stem = (where if source.startswith("hub:") else where.resolve()).name
    named = dataset or stem.removesuffix(sources.kind(stem) or "") or "data"
    out = Path(named) if "/" in named or os.sep in named else ROOT / "data" / named
    if verify:
        return check_folder(out)
    if overwrite and "/" in shards:
        raise ValueError(
            f"--overwrite=True would delete what other shares have made; delete {out} by hand, once"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    name = tokenizer
    if name == "auto":
        name = "bytes" if source == "stdlib" else "gpt2"
    (out / "parts").mkdir(parents=True, exist_ok=True)
    share = f"-{shards.replace('/', '-of-')}" if "/" in shards else ""
    with contextlib.ExitStack() as locks:
        whole = out / "parts" / "lock"
        if not share:
            locks.enter_context(lock(whole))
            for other in (out / "parts").glob("lock-*"):
                locks.enter_context(lock(other))
        else:
            locks.enter_context(lock(out / "parts" / f"lock{share}"))
            wait_for(whole)  # nobody is making the whole; the other shares ask the same
        prepare(out, name)


if __name__ == "__main__":
    globals().update(configure(globals()))
    try:
        main()
    except (ValueError, OSError) as e:
        if sys.flags.dev_mode:
            raise
        full = getattr(e, "errno", None) in FULL
        more = "; make room, and run the same command again to go on from here" if full else ""
        print(f"prepare.py: {' '.join(str(e).split())}{more}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
