"""A dataset folder read again: counts, hashes and the range of the ids against its meta.json."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data.assembly import file_facts
from data.workers import COPY
from text.files import SHORT
from text.foreign import LLMC_HEADER
from text.tokenizer import Tokenizer, of_dataset
from text.tokens import BEGINS, ID, read_meta

LLMC_MAGIC = 20240520  # of llm.c's shards of GPT-2 tokens
SHOWN = 40  # tokens at each of three places


def check_folder(out: Path) -> None:
    """Read a dataset folder again and print what it holds. Raises ValueError for any mismatch.

    Without meta.json the bins are taken for what training takes them for, with llm.c's header if
    they have it.
    """
    made, meta = out / "meta.json", read_meta(out)
    if "parts" in meta:
        raise ValueError(f"{out} holds shares that are not merged: --merge=True, then --verify")
    tok = of_dataset(meta, out)
    problems: list[str] = []
    text = (tok.json_text or "").encode()
    if meta.get("tokenizer_sha256") not in (None, hashlib.sha256(text).hexdigest()):
        problems.append("tokenizer.json is not the one that meta.json was written for")
    for name in ("train", "val"):
        problems += check_split(out, name, meta["splits"].get(name, {}), meta["dtype"], tok)
    if problems:
        raise ValueError(f"{out} is damaged: " + "; ".join(problems))
    print(f"{out}: all as it should be" + ("" if made.exists() else " (no meta.json to compare)"))


def check_split(
    out: Path, name: str, facts: dict[str, Any], dtype: str, tok: Tokenizer
) -> list[str]:
    """Print what the files of a split hold; the problems found. facts: what meta.json says."""
    names = facts.get("files", [])
    if not isinstance(names, list) or not all(
        isinstance(f, str) and f == Path(f).name for f in names
    ):
        return [f"{name}: meta.json names no files, but {SHORT.repr(names)}"]
    files = [out / f for f in names]
    files = files or [p for p in [out / f"{name}.bin"] if p.exists()]
    files = files or sorted({*out.glob(f"{name}_*.bin"), *out.glob(f"*_{name}_*.bin")})
    if not files:
        return [f"no {name}.bin"]
    problems: list[str] = []
    chat = tok.chat is not None
    seen = {"tokens": 0, "documents": 0, "max_id": 0, **({"counted": 0} if chat else {})}
    for path in files:
        if not path.stat().st_size:
            return [f"{path.name} is empty"]
        head = np.fromfile(path, dtype="<i4", count=3)
        with_header = len(head) == 3 and head[0] == LLMC_MAGIC
        skip = LLMC_HEADER // np.dtype("uint16").itemsize if with_header else 0
        found = file_facts(path, dtype, skip, chat)
        if skip and found["tokens"] - skip != head[2]:
            problems.append(f"{path.name}: header says {head[2]:,} tokens")
        if found["tokens"] <= skip:
            problems.append(f"{path.name} has no tokens")
            continue
        ids = np.memmap(path, dtype=dtype, mode="r")[skip:]
        seen["tokens"] += len(ids)
        seen["max_id"] = max(seen["max_id"], found["max_id"])
        starts = range(0, len(ids), COPY)
        for a in starts:
            part = ids[a : a + COPY]
            seen["documents"] += int((part & BEGINS != 0 if chat else part == tok.eot).sum())
        if chat:
            seen["counted"] += found["counted"]
        if len(files) == 1 and facts.get("sha256") not in (None, found["sha256"]):
            problems.append(f"{path.name}: sha256 is {found['sha256']}, not {facts['sha256']}")
        for start in np.linspace(0, max(0, len(ids) - SHOWN), 3, dtype=np.int64):
            shown = ids[start : start + SHOWN]
            text = tok.decode((shown & ID if chat else shown).tolist())
            print(f"{path.name} at {start:,}: {text!r}")
    print(f"{name}: " + ", ".join(f"{v:,} {k}" for k, v in seen.items()))
    problems += [
        f"{name}: {seen[k]:,} {k}, but meta.json says {facts[k]:,}"
        for k in seen
        if k in facts and seen[k] != facts[k]
    ]
    if seen["max_id"] >= tok.vocab_size:
        problems.append(f"{name}: id {seen['max_id']} is beyond the {tok.vocab_size} tokens")
    return problems
