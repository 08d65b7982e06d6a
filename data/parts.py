"""Parts of a source to files of tokens, by worker processes that may be killed at any moment."""

import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sources
from numpy.typing import NDArray
from sources import BadData, Part, text_size
from tqdm import tqdm

from tokenizer import Tokenizer, get_tokenizer

Ints = NDArray[np.int64]

BATCH = 2**20  # characters encoded together
COPY = 2**22  # tokens copied at a time
QUIET_S = 60  # without progress before a line says so
LISTED = 100  # damaged documents of a part that meta.json names
SMALL = 16 * 2**20  # bytes of text that are not worth a process


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; the same for all parts."""

    work: str  # folder of the parts
    tokenizer: str
    json_text: str | None
    column: str
    separator: str
    skip_bad: bool
    limit: int  # tokens after which a part may end


_tok: Tokenizer | None = None
_counters: Any = None  # documents, bytes and tokens done by all workers together


def start_worker(job: Job, counters: Any) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and end when the parent has ended."""
    global _tok, _counters
    _tok = get_tokenizer(job.tokenizer, json_text=job.json_text, bulk=True)
    _counters = counters
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


class TokenFile:
    """Tokens appended to a file, counted on the way."""

    def __init__(self, path: Path, dtype: str, tokens: int = 0) -> None:
        """Goes on after the first `tokens` of the file; 0 starts it anew."""
        self.path, self.dtype, self.tokens = path, np.dtype(dtype), tokens
        self.file = path.open("r+b" if tokens else "wb")
        self.back_to(tokens)

    def back_to(self, tokens: int) -> None:
        """Forget what comes after the first `tokens`."""
        self.file.seek(tokens * self.dtype.itemsize)
        self.file.truncate()
        self.tokens = tokens

    def write(self, ids: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.tokens += len(ids)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def encode_part(number: int, part: Part, job: Job) -> int:
    """Tokenize a part into three files, each complete or not there, the .json last; the tokens.

    N.bin: the ids, end-of-text after each document; N.index: tokens and UTF-8 bytes of each
    document, (documents, 2); N.json: the facts. Raises BadData for damage unless skip_bad.
    """
    tok = _tok
    assert tok is not None
    stem = Path(job.work, f"{number:05d}")
    temp = stem.with_suffix(f".{platform.node()}.{os.getpid()}.tmp")
    out = TokenFile(temp, token_type(tok.vocab_size))
    index: list[NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
    skipped: dict[str, Any] = {"count": 0, "first": []}
    batch: list[str] = []
    filled = 0

    def add(ids: NDArray[Any], lengths: Any, sizes: list[int]) -> None:
        out.write(ids)
        index.append(np.stack([lengths, sizes], axis=1))
        count(len(sizes), sum(sizes), len(ids))

    def flush() -> None:
        add(*tok.encode_documents(batch), [utf8_bytes(text) for text in batch])
        batch.clear()

    try:
        folder = stem.with_suffix(".hub")
        for document in sources.documents(part, job.column, job.separator, folder):
            bad: BadData | None = None
            if isinstance(document, str):
                batch.append(document)
                filled += len(document)
            elif isinstance(document, BadData):
                bad = document
            else:  # a long text in blocks
                flush()
                begin, size = out.tokens, 0
                try:
                    for piece in tok.pieces(document):
                        ids = tok.encode_piece(piece)
                        out.write(ids)
                        size += utf8_bytes(piece)
                        count(0, utf8_bytes(piece), len(ids))
                    out.write(np.array([tok.eot]))
                    index.append(np.array([[out.tokens - begin, size]]))
                except BadData as e:
                    bad = e
                    out.back_to(begin)
            if bad is not None:
                if not job.skip_bad:
                    raise bad
                skipped["count"] += 1
                skipped["first"] = [*skipped["first"], str(bad)][:LISTED]
            if filled >= BATCH:
                flush()
                filled = 0
            if job.limit and out.tokens >= job.limit:
                break
        flush()
        out.close()
        table = np.concatenate(index)
        kind = np.min_scalar_type(int(table.max(initial=0))).newbyteorder("<").str
        write_file(stem.with_suffix(".index"), table.astype(kind).tobytes())
        os.replace(temp, stem.with_suffix(".bin"))
        facts = {"part": identity(part), "documents": len(table), "tokens": out.tokens}
        facts |= {"index": kind, "width": out.dtype.itemsize, "skipped": skipped}
        write_file(stem.with_suffix(".json"), json.dumps(facts).encode())
        return out.tokens
    except BaseException:
        out.file.close()
        temp.unlink(missing_ok=True)
        raise


def count(documents: int, text_bytes: int, tokens: int) -> None:
    """Add to the counters that the parent shows."""
    with _counters.get_lock():
        for i, n in enumerate((documents, text_bytes, tokens)):
            _counters[i] += n


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def token_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, even when the power fails."""
    temp = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    with temp.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


def encode_parts(
    todo: dict[int, Part], have: dict[int, int], job: Job, processes: int, numbers: list[int]
) -> None:
    """Tokenize the parts in worker processes until job.limit tokens are there, with one bar.

    `have`: tokens of finished parts. The limit counts the parts `numbers` from the first on
    without a gap, so that what is used does not depend on who was fastest.
    """
    context = multiprocessing.get_context("spawn")  # the same on every system, safe with threads
    counters = context.Array("q", 3)
    workers = min(processes, len(todo))
    show = Progress(sum(p.size for p in todo.values()), counters)
    if workers == 1 and sum(map(text_size, todo.values())) < SMALL:  # a process would take longer
        start_worker(job, counters)
        for number, part in todo.items():
            if enough(have, job.limit, numbers):
                break
            have[number] = encode_part(number, part, job)
            show.finished(part)
        show.close()
        return
    pool = ProcessPoolExecutor(workers, context, start_worker, (job, counters))
    running: dict[Future[int], int] = {}
    queue = list(todo)
    try:
        while running or (queue and not enough(have, job.limit, numbers)):
            while queue and len(running) < workers + 1 and not enough(have, job.limit, numbers):
                number = queue.pop(0)
                running[pool.submit(encode_part, number, todo[number], job)] = number
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                have[number] = future.result()
                show.finished(todo[number])
            show([*running.values()])
    except BrokenProcessPool as e:
        raise OSError(
            "a worker was killed (out of memory?); run the same command again to go on, with a "
            "smaller --num_proc"
        ) from e
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        show.close()


def enough(have: dict[int, int], limit: int, numbers: list[int]) -> bool:
    """Whether the finished parts before the first that is not hold `limit` tokens."""
    tokens = 0
    for number in numbers if limit else []:
        if tokens >= limit or number not in have:
            break
        tokens += have[number]
    return bool(limit) and tokens >= limit


class Progress:
    """One bar over the bytes of the source, and a line now and then when nothing moves.

    Where there is no terminal (a scheduler's log) the bar is a line every minute.
    """

    def __init__(self, total: int, counters: Any) -> None:
        self.counters, self.total = counters, total
        self.lines = not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=self.lines)
        self.t0 = self.moved = self.said = time.monotonic()
        self.seen = self.done = self.read = 0

    def finished(self, part: Part) -> None:
        """A part is done: what it took tells how far the others are."""
        self.done += part.size
        self.read = self.counters.get_obj()[1]
        self([])

    def __call__(self, running: list[int]) -> None:
        # without the lock, which a worker that was killed may hold for ever
        documents, text_bytes, tokens = self.counters.get_obj()[:]
        now = time.monotonic()
        if tokens != self.seen:
            self.seen, self.moved = tokens, now
        elif running and now - self.moved > QUIET_S:
            names = ", ".join(map(str, sorted(running)[:8]))
            self.say(f"no new tokens for {now - self.moved:.0f} s; at parts {names}")
            self.moved = now
        seconds = max(now - self.t0, 1e-3)
        # Text bytes are known as they come, bytes of the (packed) source only part by part.
        per_byte = self.done / self.read if self.read else 1.0
        at = min(self.total, max(self.done, int(text_bytes * per_byte)))
        facts = (
            f"{documents:,} documents, {text_bytes / 1e6 / seconds:.1f} MB/s, "
            f"{tokens / seconds:,.0f} tokens/s"
        )
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update(at - self.bar.n)
        if self.lines and now - self.said > QUIET_S:
            self.said = now
            left = seconds * (self.total - at) / max(1, at) / 60
            self.say(f"{at / max(1, self.total):.1%}, {facts}, about {left:.0f} min left")

    def say(self, line: str) -> None:
        """Above the bar, or where there is none."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def identity(part: Part) -> Any:
    """What must be the same for a finished part to be used again, as JSON holds it."""
    return json.loads(json.dumps(asdict(part)))


def facts_of(work: Path, number: int, part: Part) -> dict[str, Any] | None:
    """What a finished part's .json says; None when it is not finished or its source has changed."""
    stem = work / f"{number:05d}"
    try:
        facts: dict[str, Any] = json.loads(stem.with_suffix(".json").read_bytes())
        same = facts["part"] == identity(part)
        width = 2 * np.dtype(facts["index"]).itemsize
        same &= stem.with_suffix(".index").stat().st_size == facts["documents"] * width
        if not (work / "assembly.json").exists():  # from then on the tokens are on the move
            same &= stem.with_suffix(".bin").stat().st_size == facts["tokens"] * facts["width"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # torn when the power failed
        return None
    return facts if same else None


def index_of(work: Path, number: int, facts: dict[str, Any]) -> Ints:
    """Tokens and bytes of each document of a finished part: (documents, 2)."""
    table = np.fromfile(work / f"{number:05d}.index", dtype=facts["index"])
    if len(table) != 2 * facts["documents"] or table[::2].sum(dtype=np.int64) != facts["tokens"]:
        raise ValueError(f"{work / f'{number:05d}.index'} is damaged: delete {work}")
    return table.reshape(-1, 2).astype(np.int64)


def read_tokens(path: Path, dtype: str, start: int, stop: int) -> Iterator[NDArray[Any]]:
    """Tokens start .. stop - 1 of a file, in arrays of at most COPY."""
    width = np.dtype(dtype).itemsize
    for at in range(start, stop, COPY):
        n = min(COPY, stop - at)
        ids = np.fromfile(path, dtype=dtype, count=n, offset=at * width)
        if len(ids) != n:
            raise ValueError(f"{path} is shorter than its index says: delete {path.parent}")
        yield ids
