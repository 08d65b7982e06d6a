"""Parts of a source to files of tokens, by worker processes that may be killed at any moment."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data import readers
from data.parts import BadData, Conversation, Note, Part, Reading, identity, text_size
from text.chat import Template
from text.files import replacing, write
from text.packing import marked
from text.split import Ints
from text.tokenizer import Tokenizer, chatting, get_tokenizer, well_formed

BATCH = 2**20  # characters encoded together
COPY = 2**22  # tokens copied at a time
QUIET_S = 60  # without progress before a line says so
NO_ANSWER = "conversations without an answer"  # a note
LISTED = 100  # damaged documents of a part that meta.json names
SMALL = 16 * 2**20  # bytes of text that are not worth a process
TOKENS_PER_BYTE = {"gpt2": 0.2, "bytes": 1.0}  # of text, at least; 0.1 with other tokenizers
MARK = f".{platform.node()}.{os.getpid()}"  # of temporary files: machines may share a folder


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; the same for all parts."""

    work: str  # folder of the parts
    tokenizer: str
    json_text: str | None
    eot: int
    chat: dict[str, Any] | None  # how conversations are written; None = the source holds text
    reading: Reading
    skip_bad: bool
    limit: int  # tokens after which a part may end


_tok: Tokenizer | None = None
_template: Template | None = None
_counters: Any = None  # documents, bytes and tokens done by all workers together


def start_worker(job: Job, counters: Any) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and end when the parent has ended."""
    global _tok, _template, _counters
    _tok = get_tokenizer(job.tokenizer, json_text=job.json_text, bulk=True, eot=job.eot)
    _tok = chatting(_tok, job.chat)
    _template = Template(_tok) if _tok.chat else None
    _counters = counters
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when its parent has ended, however that was."""
    parent.join()
    os._exit(1)


class TokenFile:
    """A new file of tokens, counted on the way; closed, but not on the disk, where `with` ends."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype, self.tokens = np.dtype(dtype), 0
        self.file = path.open("wb")

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, ids: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.tokens += len(ids)

    def back_to(self, tokens: int) -> None:
        """Forget what comes after the first `tokens`."""
        self.file.seek(tokens * self.dtype.itemsize)
        self.file.truncate()
        self.tokens = tokens

    def sync(self) -> None:
        """What has been written survives a power cut."""
        self.file.flush()
        os.fsync(self.file.fileno())


class PartWriter:
    """Documents of a part to its tokens and its index, texts encoded many together."""

    def __init__(self, tok: Tokenizer, out: TokenFile) -> None:
        self.tok, self.out = tok, out
        self.index: list[Ints] = [np.zeros((0, 2), dtype=np.int64)]  # tokens and bytes of each
        self.batch: list[str] = []
        self.filled = 0  # characters

    def add(self, text: str) -> None:
        """A document."""
        self.batch.append(text)
        self.filled += len(text)
        if self.filled >= BATCH:
            self.flush()
            self.filled = 0

    def add_turns(self, said: Conversation) -> bool:
        """A conversation, with end-of-text behind it; False for one that has nothing to learn.

        Raises BadData for one that the template does not take.
        """
        assert _template is not None
        try:
            ids, counts, asks = _template.encode(said.turns)
        except ValueError as e:
            raise BadData(f"{said.where()}: {e}") from e
        if not counts.any():
            return False
        ends = np.array([] if ids[-1] == self.tok.eot else [self.tok.eot], np.uint32)
        self.out.write(np.concatenate([marked(ids, counts, asks), ends]))
        size, tokens = sum(utf8_bytes(turn.content) for turn in said.turns), len(ids) + len(ends)
        self.index.append(np.array([[tokens, size]]))
        count(1, size, tokens)
        return True

    def add_long(self, blocks: Iterator[str]) -> None:
        """A document that comes in blocks. Raises BadData, and then has added nothing."""
        self.flush()
        start, size = self.out.tokens, 0
        try:
            for piece in self.tok.pieces(blocks):
                ids = self.tok.encode_piece(piece)
                self.out.write(ids)
                size += utf8_bytes(piece)
                count(0, utf8_bytes(piece), len(ids))
            self.out.write(np.array([self.tok.eot]))
        except BadData:
            self.out.back_to(start)
            raise
        self.index.append(np.array([[self.out.tokens - start, size]]))

    def flush(self) -> None:
        """Encode the documents that wait."""
        ids, lengths = self.tok.encode_documents(self.batch)
        sizes = [utf8_bytes(text) for text in self.batch]
        self.out.write(ids)
        self.index.append(np.stack([lengths, sizes], axis=1))
        count(len(sizes), sum(sizes), len(ids))
        self.batch.clear()


def encode_part(number: int, part: Part, job: Job) -> int:
    """Tokenize a part into three files, each complete or not there, the .json last; the tokens.

    N.bin: the ids, end-of-text after each document; N.index: tokens and UTF-8 bytes of each
    document, (documents, 2); N.json: the facts. Raises BadData for damage unless skip_bad.
    """
    tok = _tok
    assert tok is not None
    stem = Path(job.work, f"{number:05d}")
    skipped: dict[str, Any] = {"count": 0, "first": []}
    notes: dict[str, dict[str, Any]] = {}
    with replacing(stem.with_suffix(".bin"), MARK) as temp:
        with TokenFile(temp, token_type(tok)) as out:
            writer = PartWriter(tok, out)
            for document in readers.documents(part, job.reading, stem.with_suffix(".hub")):
                try:
                    if isinstance(document, BadData):
                        raise document
                    if isinstance(document, Note):
                        add_note(notes, document)
                    elif isinstance(document, Conversation):
                        if not writer.add_turns(document):
                            add_note(notes, Note(NO_ANSWER, document.where()))
                        elif form := " and ".join(document.columns):
                            add_note(notes, Note(f"{readers.TALKS} {form}", ""))
                    elif isinstance(document, str):
                        writer.add(document)
                        if not document:
                            add_note(notes, Note(readers.EMPTY, (*part.files, "a text")[0]))
                    else:
                        writer.add_long(document)
                except BadData as e:
                    if not job.skip_bad:
                        raise BadData(f"{e} (--skip_bad=True leaves it out)") from e
                    skipped["count"] += 1
                    skipped["first"] = [*skipped["first"], str(e)][:LISTED]
                if job.limit and out.tokens >= job.limit:
                    break
            writer.flush()
        table = np.concatenate(writer.index)
        kind = np.min_scalar_type(int(table.max(initial=0))).newbyteorder("<").str
        write(stem.with_suffix(".index"), table.astype(kind).tobytes(), MARK)
    facts = {"part": identity(part), "documents": len(table), "tokens": out.tokens}
    facts |= {"index": kind, "width": out.dtype.itemsize, "skipped": skipped, "notes": notes}
    write(stem.with_suffix(".json"), json.dumps(facts), MARK)
    return out.tokens


def add_note(notes: dict[str, dict[str, Any]], note: Note) -> None:
    """Count a note among those of its kind, the first few by name."""
    kept = notes.setdefault(note.what, {"count": 0, "first": []})
    kept["count"] += 1
    if note.name and len(kept["first"]) < LISTED:
        kept["first"].append(note.name)


def count(documents: int, text_bytes: int, tokens: int) -> None:
    """Add to the counters that the parent shows."""
    with _counters.get_lock():
        for i, n in enumerate((documents, text_bytes, tokens)):
            _counters[i] += n


def utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(well_formed(text).encode())


def token_type(tok: Tokenizer) -> str:
    """What a token file holds: little-endian uint16, or uint32 where the ids need it.

    So do conversations, of whose tokens more is said than the id.
    """
    return "<u4" if tok.chat or tok.vocab_size > 2**16 else "<u2"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_disk(out: Path, todo: list[Part], tokenizer: str, limit: int, processes: int) -> None:
    """Raises OSError when the tokens cannot fit on the disk, by a cautious guess of their size.

    tokenizer: its name in the settings; limit: tokens to make, 0 for all.
    """
    text = sum(map(text_size, todo))
    width = 4 if tokenizer.endswith(".json") else 2
    tokens = text * TOKENS_PER_BYTE.get(tokenizer, 0.1)
    need = width * (min(tokens, limit) if limit else tokens)
    need += max((part.size for part in todo if part.repo), default=0) * min(processes, len(todo))
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(
            f"about {need / 1e9:.1f} GB are needed in {out}, but {free / 1e9:.1f} GB are free; "
            "choose another --dataset=PATH, or less with --max_tokens or --shards"
        )


def encode_parts(
    todo: dict[int, Part], have: dict[int, int], job: Job, processes: int, numbers: list[int]
) -> None:
    """Tokenize the parts in worker processes until job.limit tokens are there, with one bar.

    `have`: tokens of finished parts, which grows. The limit counts the parts `numbers` from the
    first on without a gap, so that what is used does not depend on who was fastest. Raises what
    the first part that fails has raised, and OSError when a worker was killed.
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


def facts_of(work: Path, number: int, part: Part) -> dict[str, Any] | None:
    """What a finished part's .json says; None when it is not finished or its source has changed."""
    stem = work / f"{number:05d}"
    try:
        facts: dict[str, Any] = json.loads(stem.with_suffix(".json").read_bytes())
        mine, theirs = identity(part), facts["part"]
        same = {**mine, **theirs} == mine and mine.keys() - theirs.keys() <= {"mark"}
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
