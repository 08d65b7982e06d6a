"""Where documents come from: the Hub, a file or a folder here, or the embedded corpus.

What is found is said: which files are read, which are left out and why.
"""

import glob
import re
from dataclasses import replace
from pathlib import Path

from data.hub import OPENWEBTEXT, OPENWEBTEXT_DOCUMENTS, hub_source
from data.parts import (
    MIB,
    READ,
    Part,
    Reading,
    Source,
    content,
    is_hidden,
    kind,
    listed,
    local_parts,
    suffix_of,
)
from data.splits import CARD, choose, folder_configs, is_card, split_in
from text.files import path_of

BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find(
    name: str,
    reading: Reading,
    subset: str = "",
    revision: str = "",
    val_split: str = "",
) -> Source:
    """The source called "stdlib", "hub:NAME", or a path: a file, a folder or a pattern with *.

    Raises OSError or ValueError, one line with what to type, when there is nothing to read.
    """
    if name == "stdlib":
        return Source(name, [Part((), 0, 2 * MIB)], 1)
    if name.startswith("hub:"):
        found = hub_source(name, subset, reading.split, revision, val_split)
        if isinstance(found, Source):
            return found
        repo = name.removeprefix("hub:")
        local = local_source(found, reading, subset, val_split, whole=repo == OPENWEBTEXT)
        said = [f"the Hub does not answer: the copy in {found} is read", *local.said]
        return replace(local, name=name, revision=found.name, said=said)
    path = path_of(name)
    if not path.exists() and not glob.has_magic(name):
        hint = f", or hub:{name} for the Hub's" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise FileNotFoundError(f"no source {name!r}: give a file, a folder or stdlib{hint}")
    if path.is_file():
        if kind(path.name) is None:
            raise ValueError(f"{path} must be {READ}")
        return Source(str(path.resolve()), local_parts([path], reading), 1)
    return local_source(path, reading, subset, val_split)


def local_source(
    path: Path, reading: Reading, subset: str, val_split: str, whole: bool = False
) -> Source:
    """The files of a folder or pattern. whole: it is a copy of all of OpenWebText."""
    base = path
    while glob.has_magic(str(base)):
        base = base.parent
    if path.is_dir():
        paths = [p for p in path.rglob("*") if p.is_file()]
    else:
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
    names, left = readable(base, [p.relative_to(base).as_posix() for p in sorted(paths)])
    if not names:
        some = f"; there is: {listed(left)}" if left else ""
        raise ValueError(f"{path} holds no {READ} files{some}")
    if not path.is_dir() and len({split_in(n) for n in names}) == 1:
        chosen = choose(names, "all")  # a pattern that says itself which
    else:
        try:
            chosen = choose(names, reading.split, val_split, subset, folder_configs(base))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    left |= {f"of split {s}" if s else "of no split": fs for s, fs in chosen.others.items()}
    files = [base / n for n in chosen.train]
    original = len(files) == 21 and all(p.name.startswith("urlsf_subset") for p in files)
    whole |= original or (path.is_dir() and path.resolve().name.lower() == "openwebtext")
    parts = local_parts(files, reading)
    for part in local_parts([base / n for n in chosen.val], reading):
        parts.append(replace(part, shard=part.shard + len(files), val=True))
    said = [f"{path}: {counted(chosen.train)} for training"]
    if chosen.val:
        said[0] += f", {counted(chosen.val)} for validation"
    if left:
        said.append(f"left out: {listed(left)}")
    if chosen.others:
        said.append("--split=NAME reads another split, --split=all all of them")
    documents = OPENWEBTEXT_DOCUMENTS if whole else None
    counts = {why: len(fs) for why, fs in left.items()}
    where = str(path.resolve())
    return Source(where, parts, len(files), None, documents, said, counts, chosen.named)


def readable(base: Path, names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Of the files of a folder those that hold text, and the others by why they are left out."""
    kept: list[str] = []
    left: dict[str, list[str]] = {}
    for name in names:
        if is_hidden(name):
            left.setdefault("hidden", []).append(name)
        elif kind(name) is None:
            left.setdefault(suffix_of(name), []).append(name)
        elif name.split("/")[-1] in BOOKKEEPING:
            left.setdefault("of the datasets library", []).append(name)
        else:
            kept.append(name)
    rows = any(content(n) != "text" for n in kept)
    about = [n for n in kept if n.split("/")[-1] == CARD and (rows or is_card(base / n))]
    if about and len(about) < len(kept):
        left["about the data"] = about
        kept = [n for n in kept if n not in about]
    return kept, left


def counted(files: list[str]) -> str:
    """How many files of each kind there are: "3 .jsonl, 1 .md"."""
    kinds = [kind(f) or "" for f in files]
    return ", ".join(f"{kinds.count(k)} {k}" for k in sorted({*kinds}))
