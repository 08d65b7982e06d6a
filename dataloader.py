"""Batches from token files: which tokens a step sees is a pure function of (seed, step).

An epoch cuts the token stream into windows of `context` tokens, with a fresh phase, and visits
each once in a keyed random order that takes no memory. Step s of a run takes the next
tokens_per_step / context windows, whatever the micro-batch size and the number of ranks are, so
nothing about the data needs saving but the step.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

LLMC_HEADER_INTS = 256  # llm.c and modded-nanogpt shards: int32 header, then uint16 tokens
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
GPT2_VOCAB = 50257
FEISTEL_ROUNDS = 6
IGNORED = -1  # a target that does not count: the model's IGNORE_INDEX
SCANS, SCAN = 64, 16384  # pieces of a file, and tokens in each, read to find its largest id


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a dataset folder, or what bins without one are taken for: GPT-2 in uint16.

    Raises ValueError when the file is not what data/prepare.py writes.
    """
    path = folder / "meta.json"
    if (folder / "meta.pkl").exists() and not path.exists():
        raise ValueError(
            f"{folder / 'meta.pkl'} is a pickle, which can run code, and is not read; "
            "prepare the text again with data/prepare.py"
        )
    if not path.exists():
        return {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB, "dtype": "uint16", "splits": {}}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["dtype"] not in ("uint16", "uint32") or int(meta["vocab_size"]) < 1:
            raise ValueError(f"dtype {meta['dtype']!r}, vocab_size {meta['vocab_size']!r}")
        str(meta["tokenizer"]), dict(meta["splits"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}); run data/prepare.py again") from e
    found: dict[str, Any] = meta
    return found


def split_files(folder: Path, split: str) -> list[Path]:
    """`<split>.bin`, or the shards `<split>_*.bin` (or `*_<split>_*.bin`) in name order.

    Raises FileNotFoundError with the command that makes them.
    """
    one = folder / f"{split}.bin"
    shards = [one] if one.exists() else sorted(folder.glob(f"{split}_*.bin"))
    shards = shards or sorted(folder.glob(f"*_{split}_*.bin"))
    if not shards:
        raise FileNotFoundError(
            f"no {split}.bin in {folder}; make it with: python data/prepare.py "
            f"(or --source=stdlib for a small text that needs no download)"
        )
    return shards


def open_tokens(path: Path, dtype: str) -> NDArray[Any]:
    """A token file as a read-only memory map, (tokens,) of `dtype`; llm.c's header is skipped.

    Raises ValueError when the size does not fit the type or the header.
    """
    size = path.stat().st_size
    head = np.fromfile(path, dtype="<i4", count=3)
    header = LLMC_HEADER_INTS * 4
    if len(head) == 3 and head[0] == LLMC_MAGIC and size >= header:
        if head[1] != LLMC_VERSION or size != header + 2 * int(head[2]):
            raise ValueError(
                f"{path}: llm.c header says version {head[1]}, {head[2]} tokens, "
                f"but the file has {size} bytes; it is damaged or unfinished"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=header)
    width = np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(
            f"{path} has {size} bytes, not a multiple of {width} ({dtype} tokens); "
            "it is unfinished or not a token file: run data/prepare.py again"
        )
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


class TokenData:
    """One split of a dataset folder: its files read as one stream of tokens.

    `tokens` is the length of the stream; `nbytes` its UTF-8 text bytes, None when unknown.
    Raises FileNotFoundError or ValueError for missing, damaged or foreign files, for a stream too
    short for one window of `context` + 1 tokens, and for ids that `vocab_size` does not cover.
    """

    def __init__(self, folder: Path, split: str, context: int, vocab_size: int) -> None:
        meta = read_meta(folder)
        files = split_files(folder, split)
        self.sizes = {path: path.stat().st_size for path in files}  # bytes
        self.maps = [open_tokens(path, meta["dtype"]) for path in files]
        self.ends = np.cumsum([len(m) for m in self.maps])
        self.tokens = int(self.ends[-1])
        self.context = context
        facts = meta["splits"].get(split, {})
        self.nbytes: int | None = facts.get("bytes")
        if facts and facts["tokens"] != self.tokens:
            raise ValueError(
                f"{files[0]} has {self.tokens:,} tokens but meta.json says {facts['tokens']:,}; "
                "run data/prepare.py again"
            )
        if self.tokens < context + 1:
            raise ValueError(
                f"{files[0]} has {self.tokens:,} tokens, fewer than one window of {context} + 1; "
                "use more text or a smaller max_position_embeddings"
            )
        largest = facts.get("max_id") or self.sampled_max()
        if largest >= vocab_size:
            raise ValueError(
                f"{files[0]} holds token id {largest}, but the model's vocab_size is {vocab_size}; "
                "set vocab_size to cover the tokenizer, or check that the file is what you think"
            )

    def check_size(self) -> None:
        """Raises ValueError when a file has shrunk: reading its end would kill the process."""
        for path, size in self.sizes.items():
            if path.exists() and path.stat().st_size < size:
                raise ValueError(f"{path} was cut short while it was read; put the whole file back")

    def sampled_max(self) -> int:
        """The largest id in SCANS pieces of each file, for bins that no meta.json describes."""
        largest = 0
        for tokens in self.maps:
            for start in np.linspace(0, max(0, len(tokens) - SCAN), SCANS, dtype=np.int64):
                largest = max(largest, int(tokens[start : start + SCAN].max()))
        return largest

    def windows(self, starts: Ints) -> NDArray[Any]:
        """Tokens [start, start + context] of each start: (n,) -> (n, context + 1), unsigned."""
        span = np.arange(self.context + 1)
        if len(self.maps) == 1:
            found: NDArray[Any] = self.maps[0][starts[:, None] + span]
            return found
        return np.stack([self.window(int(start)) for start in starts])

    def window(self, start: int) -> NDArray[Any]:
        """Tokens [start, start + context], which may lie in several files."""
        i = int(np.searchsorted(self.ends, start, side="right"))
        at, left, pieces = start - int(self.ends[i]) + len(self.maps[i]), self.context + 1, []
        while left:
            pieces.append(self.maps[i][at : at + left])
            left, at, i = left - len(pieces[-1]), 0, i + 1
        return np.concatenate(pieces)


def mix(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A well-mixed 64-bit hash of each number (splitmix64's finaliser), keyed."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
    low_bits, high_bits = bits // 2, bits - bits // 2
    keys = [key_of(key, i) for i in range(FEISTEL_ROUNDS)]

    def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low_n, high_n = np.uint64(low_bits), np.uint64(high_bits)
        for i, round_key in enumerate(keys):
            low, high = x & ((np.uint64(1) << low_n) - np.uint64(1)), x >> low_n
            if i % 2:
                low ^= mix(high, round_key) & ((np.uint64(1) << low_n) - np.uint64(1))
            else:
                high ^= mix(low, round_key) & ((np.uint64(1) << high_n) - np.uint64(1))
            x = (high << low_n) | low
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
    """(B, T + 1) int16 or int32 -> inputs and targets, each (B, T) int64, on the same device.

    The integers travel narrow, a quarter of the bytes over the bus, and signed, since torch has
    few operations on unsigned types; the mask makes them the unsigned ids that they are.
    """
    ids = tokens.long() & (2 ** (8 * tokens.element_size()) - 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


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
        self.pending: tuple[tuple[int, int, int], Future[Tensor]] | None = None

    def read(self, step: int, micro_step: int, batch_size: int) -> Tensor:
        """Windows (B, T + 1) in signed integers on the host, pinned when they go to CUDA."""
        first = (micro_step * self.ranks + self.rank) * batch_size
        windows = self.data.windows(self.order.starts(step, first, batch_size))
        tokens = torch.from_numpy(windows.view(f"i{windows.itemsize}"))
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

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

    At most `windows` of them, spread evenly over the split; ranks take turns. A last batch that
    is not full is filled up with windows whose targets are all IGNORED, so that there is one shape.
    """
    n = (data.tokens - 1) // data.context
    index = np.arange(min(windows, n)) * n // min(windows, n)
    starts = index[rank::ranks] * data.context
    for i in range(0, len(starts), batch_size):
        rows = data.windows(np.resize(starts[i : i + batch_size], batch_size))
        x, y = split_windows(torch.from_numpy(rows.view(f"i{rows.itemsize}")).to(device))
        y[len(starts) - i :] = IGNORED
        yield x, y
