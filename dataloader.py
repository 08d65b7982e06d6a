"""Batches from token files: which tokens a step sees is a pure function of (seed, step).

An epoch cuts the token stream into windows of `context` tokens, with a fresh phase, and visits
each once in a keyed random order that takes no memory. Step s of a run takes the next
tokens_per_step / context windows, whatever the micro-batch size and the number of ranks are, so
nothing about the data needs saving but the step.
"""

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

LLMC_HEADER = 1024  # bytes, 256 int32: magic, version, tokens; of llm.c and modded-nanogpt shards
LLMC_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic and version
LLMC_EVALUATION = 20240522  # the magic of files with questions and answers
GPT2_VOCAB = 50257
FEISTEL_ROUNDS = 6  # even
BLOCK = 4096  # windows whose places in the stream are worked out together
IGNORED = -1  # a target that does not count: the model's IGNORE_INDEX
NUMBER = re.compile("[0-9]+")
MIN_TAIL = 256  # tokens that say enough about a file
SCANS, SCAN = 64, 16384  # pieces of a stream, and tokens in each, read to find its largest id


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
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["dtype"] not in ("uint16", "uint32") or int(meta["vocab_size"]) < 1:
                raise ValueError(f"dtype {meta['dtype']!r}, vocab_size {meta['vocab_size']!r}")
            str(meta["tokenizer"]), dict(meta["splits"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e}); run data/prepare.py again") from e
        found: dict[str, Any] = meta
        return found
    if (folder / "meta.pkl").exists():
        raise ValueError(
            f"{folder / 'meta.pkl'} is a pickle, which can run code, and is not read; "
            "prepare the text again with data/prepare.py"
        )
    for note in sorted(folder.glob("*/*.ds.metadata"))[:1]:
        name = note.read_text(encoding="utf-8").partition("\n")[0].partition("|")[0]
        if "gpt2" not in Path(name).name:
            raise ValueError(
                f"{note} says that the tokenizer is {name}, not gpt2: {path} is needed, "
                "as docs/datatrove.md shows"
            )
    return {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB, "dtype": "uint16", "splits": {}}


def split_files(folder: Path, split: str) -> list[Path]:
    """`<split>.bin`, or shards: `<split>_*.bin`, `*_<split>_*.bin` or datatrove's `<split>/*.ds`.

    Shards are in name order, by the value of numbers in names: 9 comes before 10.
    Raises FileNotFoundError with the command that makes them, ValueError for unfinished ones.
    """
    for pattern in (f"{split}.bin", f"{split}_*.bin", f"*_{split}_*.bin", f"{split}/*.ds"):
        if files := list(folder.glob(pattern)):
            break
    else:
        parts = " (its parts are there: add --merge=True)" if (folder / "parts").exists() else ""
        raise FileNotFoundError(
            f"no {split}.bin in {folder}; make it with: python data/prepare.py "
            f"(or --source=stdlib for a small text that needs no download){parts}"
        )
    if files[0].suffix == ".ds":
        check_finished(folder / split / "logs")
    return sorted(files, key=lambda path: NUMBER.sub(lambda m: m[0].zfill(20), path.name))


def check_finished(logs: Path) -> None:
    """Raises ValueError when a datatrove task has left no marker in its executor's logging_dir."""
    plan = logs / "executor.json"
    if not plan.exists():  # logged elsewhere: the files' sizes must do
        return
    tasks = int(json.loads(plan.read_text(encoding="utf-8"))["world_size"])
    waiting = [i for i in range(tasks) if not (logs / "completions" / f"{i:05d}").exists()]
    if waiting:
        raise ValueError(
            f"{len(waiting)} of {tasks} datatrove tasks are not finished (the first is "
            f"{waiting[0]}; {logs / 'completions'}): run its script again, it does only those"
        )


def open_tokens(path: Path, dtype: str) -> NDArray[Any]:
    """A token file as a read-only memory map, (tokens,) of `dtype`, or of what the file says.

    Raises ValueError when the size does not fit the type, llm.c's header or datatrove's note.
    """
    size, offset, kind = path.stat().st_size, 0, np.dtype(dtype).newbyteorder("<")
    head = np.fromfile(path, dtype="<i4", count=3).tolist()
    if path.suffix == ".ds":
        kind, tokens = datatrove_note(path)
        if size != tokens * kind.itemsize:
            raise ValueError(
                f"{path} has {size} bytes, not {tokens} tokens of {kind.itemsize} bytes as its "
                ".metadata says; run datatrove again"
            )
    elif head[:1] == [LLMC_EVALUATION]:
        raise ValueError(f"{path} is an evaluation file of llm.c, questions and answers, not text")
    elif size >= LLMC_HEADER and head[0] in [magic for magic, _ in LLMC_TYPES]:
        offset = LLMC_HEADER
        kind = np.dtype(LLMC_TYPES.get((head[0], head[1]), kind))
        if (head[0], head[1]) not in LLMC_TYPES or size != offset + kind.itemsize * head[2]:
            raise ValueError(
                f"{path}: llm.c header says version {head[1]}, {head[2]} tokens, "
                f"but the file has {size} bytes; it is damaged or unfinished"
            )
    elif size == 0 or size % kind.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, not a multiple of {kind.itemsize} ({dtype} tokens); "
            "it is unfinished or not a token file: run data/prepare.py again"
        )
    if size == offset:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", offset=offset).view(np.ndarray)


def datatrove_note(path: Path) -> tuple[np.dtype[Any], int]:
    """Type and number of a .ds file's tokens, from the .metadata that datatrove writes last.

    Its first line is tokenizer|bytes per token (without the latter in old versions: 2), its second
    the number of tokens. Raises ValueError when it is not there.
    """
    note = path.with_name(f"{path.name}.metadata")
    try:
        first, tokens = note.read_text(encoding="utf-8").splitlines()[:2]
        width = int(first.rpartition("|")[2]) if "|" in first else 2
        return np.dtype(f"<u{width}"), int(tokens)
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(
            f"{note} is missing or damaged, so {path.name} is not finished; run datatrove again "
            "(with save_final_metadata=True, its default)"
        ) from e


def check_foreign(path: Path, ids: NDArray[Any]) -> None:
    """Raises ValueError when a file that no meta.json describes is not what it is taken for.

    That is: uint32 read as uint16, where every second number is 0 or nearly, and a file that was
    given its full size but never filled, where the last twentieth is zeros.
    """
    head, tail = ids[:SCAN], ids[-max(MIN_TAIL, len(ids) // 20) :]
    if len(ids) < MIN_TAIL:
        return
    if ids.itemsize == 2 and 16 * np.quantile(head[1::2], 0.9) < np.median(head[::2]):
        raise ValueError(
            f"{path} looks like uint32 tokens read as uint16; say so in {path.parent}"
            '/meta.json: {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint32", '
            '"splits": {}}'
        )
    starts = np.linspace(0, max(0, len(tail) - SCAN), 4, dtype=np.int64)
    if not any(tail[i : i + SCAN].any() for i in starts):
        raise ValueError(
            f"{path}: the last {len(tail):,} of {len(ids):,} tokens are zeros; it is unfinished: "
            "prepare it again"
        )


def unmerged(folder: Path, split: str, meta: dict[str, Any]) -> tuple[list[Piece], int]:
    """A split of the parts that --shards=I/N has made, as --merge=True would write it.

    The documents for validation are chosen as data/prepare.py does, in that order; training has
    the others, in the source's order. Returns the pieces and their UTF-8 text bytes.
    Raises FileNotFoundError for missing parts, ValueError for damaged ones.
    """
    work, count, dtype = folder / "parts", int(meta["parts"]), meta["dtype"]
    if (work / "assembly.json").exists():
        raise ValueError(f"merging {work} was interrupted: run data/prepare.py --merge=True again")
    stems = [work / f"{i:05d}" for i in range(count)]
    missing = [stem.name for stem in stems if not stem.with_suffix(".json").exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {count} parts are missing in {work} (the first is {missing[0]}); "
            "run the other --shards=I/N of data/prepare.py"
        )
    files, tables = [], []
    for stem in stems:
        path = stem.with_suffix(".bin")
        try:
            facts = json.loads(stem.with_suffix(".json").read_bytes())
            table = np.fromfile(stem.with_suffix(".index"), dtype=facts["index"])
            tables.append(table.reshape(-1, 2).astype(np.int64))
            files.append(open_tokens(path, dtype) if facts["tokens"] else np.zeros(0, dtype))
            if not len(files[-1]) == facts["tokens"] == tables[-1][:, 0].sum():
                raise ValueError("another length than its .json or .index says")
        except (OSError, ValueError, KeyError) as e:
            raise ValueError(
                f"{path} is damaged ({e}); delete {stem}.json and run its --shards=I/N again"
            ) from e
    first = np.cumsum([0] + [len(table) for table in tables])  # document of each part
    n, (lengths, sizes) = int(first[-1]), np.concatenate(tables).T
    if n < 2:
        raise ValueError(f"{work} holds {n} documents; to split one takes --merge=True")
    fraction = meta["val_fraction"] or (0.0005 if n >= 100_000 else 0.05)
    order = np.random.default_rng(meta["split_seed"]).permutation(n)
    chosen = order[: min(max(1, math.ceil(fraction * n)), n - 1)]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    if split == "val":
        begins, ends = chosen, chosen + 1
    else:
        cuts = np.unique(np.concatenate([chosen, chosen + 1, first]))
        kept = ~np.isin(cuts[:-1], chosen)
        begins, ends = cuts[:-1][kept], cuts[1:][kept]
    pieces = []
    for part, a, b in zip(
        np.searchsorted(first, begins, side="right") - 1, edges[begins], edges[ends], strict=True
    ):
        a, b = int(a - edges[first[part]]), int(b - edges[first[part]])
        pieces.append(Piece(stems[part].with_suffix(".bin"), a, files[part][a:b]))
    val_bytes = int(sizes[chosen].sum())
    return pieces, val_bytes if split == "val" else int(sizes.sum()) - val_bytes


class TokenData:
    """One split of a dataset folder: its files read as one stream of tokens.

    `tokens` is the length of the stream; `nbytes` its UTF-8 text bytes, None when unknown.
    Raises FileNotFoundError or ValueError for missing, damaged or foreign files, for a stream too
    short for one window of `context` + 1 tokens, and for ids that `vocab_size` does not cover.
    """

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
        if self.tokens < context + 1:
            raise ValueError(
                f"{path} has {self.tokens:,} tokens, fewer than one window of {context} + 1; "
                "use more text or a smaller max_position_embeddings"
            )
        if facts.get("max_id", 0) >= vocab_size:
            raise ValueError(self.too_large(facts["max_id"], str(path)))
        if "max_id" not in facts:
            for piece in self.pieces if "parts" not in meta else []:
                check_foreign(piece.path, piece.ids)
            n = min(SCAN, self.tokens)
            self.windows(np.linspace(0, self.tokens - n, SCANS, dtype=np.int64), n)

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
            i = bisect.bisect_right(self.begins, start) - 1
            at, filled = start - self.begins[i], 0
            while filled < length:  # more than once when it goes on in the next file
                ids = self.ids[i][at : at + length - filled]
                row[filled : filled + len(ids)] = ids
                at, filled, i = 0, filled + len(ids), i + 1
        if found.max() >= self.vocab_size:
            row, column = divmod(int(found.argmax()), length)
            place = int(starts[row]) + column
            i = bisect.bisect_right(self.begins, place) - 1
            at = self.pieces[i].first + place - self.begins[i]
            where = f"{self.pieces[i].path} at token {at:,}"
            raise ValueError(self.too_large(int(found.max()), where))
        return found

    def too_large(self, largest: int, where: str) -> str:
        return (
            f"{where} holds token id {largest}, but the model's vocab_size is {self.vocab_size}; "
            "set vocab_size to cover the tokenizer, or check that the file is what you think"
        )


def mix(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A well-mixed 64-bit hash of each number (splitmix64's finaliser), keyed."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.lru_cache(maxsize=64)
def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key, (number + 0x9E3779B97F4A7C15) % 2**64)
    return int(key[0])


def permute(positions: Ints, n: int, key: int) -> Ints:
    """Where a random permutation of range(n), chosen by `key`, sends each position.

    A Feistel network permutes the smallest 2^bits >= n; results of n or more are sent on until
    they fall below n (cycle walking), which keeps it a permutation of range(n). O(1) memory.
    """
    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    keys = [key_of(key, i) for i in range(FEISTEL_ROUNDS)]

    def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = x & low_mask, x >> low_bits
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= mix(low, even) & high_mask
            low ^= mix(high, odd) & low_mask
        x = (high << low_bits) | low
        return x

    x = scramble(positions.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = scramble(x[outside])
    return x.astype(np.int64)


@dataclass(frozen=True)
class TrainOrder:
    """Which windows of the training stream a step takes."""

    tokens: int  # in the stream
    context: int
    tokens_per_step: int
    seed: int

    @property
    def windows_per_epoch(self) -> int:
        """Windows that fit whatever the phase is: at least 1."""
        return max(1, (self.tokens - self.context) // self.context)

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through the data."""
        return steps * self.tokens_per_step / self.context / self.windows_per_epoch

    def starts(self, step: int, first: int, count: int) -> Ints:
        """First tokens of the step's windows first .. first + count - 1: (count,)."""
        n = self.windows_per_epoch
        index = step * (self.tokens_per_step // self.context) + first + np.arange(count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(index // n):
            here = index // n == epoch
            key = key_of(self.seed, int(epoch))
            phases = min(self.context, self.tokens - n * self.context)
            starts[here] = permute(index[here] % n, n, key) * self.context + key % phases
        return starts


def split_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) int16 or int32 -> inputs and targets, (B, T) int64, two views of one tensor.

    The integers travel narrow, a quarter of the bytes over the bus, and signed, since torch has
    few operations on unsigned types; the mask makes them the unsigned ids that they are.
    """
    bits = 8 * tokens.element_size()
    if tokens.is_cpu:  # which can read them as unsigned, in two thirds of the time
        wide = tokens.view({16: torch.uint16, 32: torch.uint32}[bits]).long()
    else:
        wide = tokens.long().bitwise_and_(2**bits - 1)
    return wide[:, :-1], wide[:, 1:]


def host_tensor(windows: NDArray[Any], device: torch.device) -> Tensor:
    """The same bits in signed integers on the host, pinned when they go to CUDA."""
    tokens = torch.from_numpy(windows.view(f"i{windows.itemsize}"))
    return tokens.pin_memory() if device.type == "cuda" else tokens


class TrainLoader:
    """Micro-batches of a rank, the next one read by a thread while this one is used."""

    def __init__(
        self, data: TokenData, order: TrainOrder, rank: int, ranks: int, device: torch.device
    ) -> None:
        self.data, self.order, self.device = data, order, device
        self.rank, self.ranks = rank, ranks
        # the current GPU is each thread's own, and pinning would else open a context on the first
        on_gpu = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=on_gpu)
        self.block: tuple[int, Ints] = (-1, np.zeros(0, dtype=np.int64))
        self.pending: tuple[tuple[int, int, int], Future[Tensor]] | None = None

    def starts(self, step: int, first: int, count: int) -> Ints:
        """As order.starts, out of a block of steps done at once: a small array costs as much."""
        windows = self.order.tokens_per_step // self.order.context
        steps = max(1, BLOCK // windows)
        number, at = step // steps, step % steps * windows + first
        block = self.block  # the prefetching thread may replace it meanwhile
        if block[0] != number:
            block = (number, self.order.starts(number * steps, 0, steps * windows))
            self.block = block
        return block[1][at : at + count]

    def read(self, step: int, micro_step: int, batch_size: int) -> Tensor:
        """Windows (B, T + 1) in signed integers on the host, pinned when they go to CUDA."""
        first = (micro_step * self.ranks + self.rank) * batch_size
        return host_tensor(self.data.windows(self.starts(step, first, batch_size)), self.device)

    def batch(self, step: int, micro_step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64 on the device; a pure function of the arguments."""
        wanted = (step, micro_step, batch_size)
        if self.pending is not None and self.pending[0] == wanted:
            tokens = self.pending[1].result()
        else:
            tokens = self.read(*wanted)
        windows_per_step = self.order.tokens_per_step // self.order.context
        micro_steps = windows_per_step // (batch_size * self.ranks)
        following = (*divmod(step * micro_steps + micro_step + 1, micro_steps), batch_size)
        self.pending = (following, self.thread.submit(self.read, *following))
        return split_windows(tokens.to(self.device, non_blocking=True))


def eval_batches(
    data: TokenData,
    windows: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same disjoint windows of a split at every call, as inputs and targets (B, T) int64.

    At most `windows` of them, spread evenly over the split; ranks take turns, and have as many
    batches as each other. A last batch that is not full is filled up with windows whose targets
    are all IGNORED, so that there is one shape.
    """
    n = (data.tokens - 1) // data.context
    index = np.arange(min(windows, n)) * n // min(windows, n)
    starts = index[rank::ranks] * data.context
    for i in range(0, -(-len(index) // ranks), batch_size):
        rows = data.windows(np.resize(starts[i : i + batch_size], batch_size))
        tokens = host_tensor(rows, device).to(device, non_blocking=True)
        # y in memory of its own, but with the strides that training's has, for the compiler
        (x, _), (_, y) = split_windows(tokens), split_windows(tokens)
        y[len(starts) - i :] = IGNORED
        yield x, y
