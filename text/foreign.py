"""Token files that others write: llm.c's, datatrove's, and flat ones that nothing describes."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text.encoding import begins_utf8
from text.files import read_json, whole

LLMC_HEADER = 1024  # bytes, 256 int32: magic, version, tokens; of llm.c and modded-nanogpt shards
LLMC_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic and version
LLMC_EVALUATION = 20240522  # the magic of files with questions and answers
SCAN = 16384  # tokens of a file that are looked at together
MIN_TAIL = 256  # tokens that say enough about a file


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


def check_finished(logs: Path) -> None:
    """Raises ValueError when a datatrove task has left no marker in its executor's logging_dir."""
    plan = logs / "executor.json"
    if not plan.exists():  # logged elsewhere: the files' sizes must do
        return
    tasks: Any = read_json(plan).get("world_size")
    if not whole(tasks):
        raise ValueError(f"{plan} does not tell world_size, the number of datatrove's tasks")
    done = {path.name for path in (logs / "completions").glob("[0-9]*")}
    first = next((i for i in range(tasks) if f"{i:05d}" not in done), None)
    if first is not None:  # a number out of a file: of any size
        raise ValueError(
            f"{tasks - len(done)} of {tasks} datatrove tasks are not finished (the first is "
            f"{first}; {logs / 'completions'}): run its script again, it does only those"
        )


def datatrove_note(path: Path) -> tuple[np.dtype[Any], int]:
    """Type and number of a .ds file's tokens, from the .metadata that datatrove writes last.

    Its first line is tokenizer|bytes per token (without the latter in old versions: 2), its second
    the number of tokens. Raises ValueError when it is not there.
    """
    note = path.with_name(f"{path.name}.metadata")
    try:
        first, tokens = note.read_text(encoding="utf-8").splitlines()[:2]
        width = first.rpartition("|")[2].strip() if "|" in first else "2"
        return np.dtype({"2": "<u2", "4": "<u4"}[width]), int(tokens)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(
            f"{note} is missing or damaged, so {path.name} is not finished; run datatrove again "
            "(with save_final_metadata=True, its default)"
        ) from e


def is_text(data: bytes) -> bool:
    """Whether bytes are UTF-8 text; token ids are not, and small ones have zeros in them."""
    return begins_utf8(data) and not any(data.count(c) for c in range(9))


def check_foreign(path: Path, ids: NDArray[Any]) -> None:
    """Raises ValueError when a file that no meta.json describes is not what it is taken for.

    That is: text, uint32 read as uint16, where every second number is 0 or nearly, and a file that
    was given its full size but never filled, where the last twentieth is zeros.
    """
    head, tail = ids[:SCAN], ids[-max(MIN_TAIL, len(ids) // 20) :]
    if len(ids) < MIN_TAIL:
        return
    if is_text(head.tobytes()):
        raise ValueError(
            f"{path} is text, not tokens; give it another name, and make tokens of it with: "
            f"python data/prepare.py --source=PATH --dataset={path.parent}"
        )
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
