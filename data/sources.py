"""Where documents come from: the Hub, a file or a folder here, or the embedded corpus.

What is found is said: which files are read, which are left out and why.
"""

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

from data.hub import OPENWEBTEXT, OPENWEBTEXT_DOCUMENTS, hub_source
from data.parts import (
    ARCHIVES,
    MIB,
    READ,
    Part,
    Reading,
    Source,
    content,
    kind,
    listed,
    local_parts,
)
from data.splits import (
    OTHER_KIND,
    Chosen,
    choose,
    doubtful,
    folder_configs,
    is_named,
    of_one_kind,
    readable,
    reasons,
    refuse_both,
    split_in,
)
from text.files import path_of


def find(
    name: str,
    reading: Reading,
    subset: str = "",
    revision: str = "",
    val_split: str = "",
    out: Path | None = None,
) -> Source:
    """The source called "stdlib", "hub:NAME", or a path: a file, a folder or a pattern with *.

    out: the folder of the dataset that is made, which is none of the source. Raises OSError or
    ValueError, one line with what to type, when there is nothing to read.
    """
    if name == "stdlib":
        return Source(name, [Part((), 0, 2 * MIB)], 1)
    if not name:
        raise ValueError("source is empty; write --source=PATH, hub:USER/NAME or stdlib")
    if name.startswith("hub:"):
        found = hub_source(name, subset, reading.split, revision, val_split)
        if isinstance(found, Source):
            return found
        repo = name.removeprefix("hub:")
        local = local_source(found, reading, subset, val_split, out, whole=repo == OPENWEBTEXT)
        said = [f"the Hub does not answer: the copy in {found} is read", *local.said]
        return replace(local, name=name, revision=found.name, said=said)
    path = path_of(name)
    if not path.exists() and not glob.has_magic(name):
        hint = f", or hub:{name} for the Hub's" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise FileNotFoundError(f"no source {name!r}: give a file, a folder or stdlib{hint}")
    if path.is_file():
        if kind(path.name) is None:
            raise ValueError(f"{path} must be {READ}")
        return file_source(path, reading, val_split)
    return local_source(path, reading, subset, val_split, out)


def file_source(path: Path, reading: Reading, val_split: str) -> Source:
    """A single file; an archive may hold a split for validation, too."""
    parts = local_parts([path], reading)
    if content(path.name) in ARCHIVES:
        refuse_both(reading.split, val_split)
        named = bool(split_in(path.name)) and not val_split
        parts = [replace(part, named=named) for part in parts]
        parts += [replace(part, shard=1, val=True) for part in parts if val_split]
    return Source(str(path.resolve()), parts, 1)


def local_source(
    path: Path,
    reading: Reading,
    subset: str,
    val_split: str,
    out: Path | None,
    whole: bool = False,
) -> Source:
    """The files of a folder or pattern. whole: it is a copy of all of OpenWebText."""
    asked, (path, told) = path, one_revision(path)
    base = path
    if path.is_dir():
        paths = files_below(path)
    else:
        base = pattern_base(path)
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if not p.is_dir()]
    if out is not None:
        if base.resolve() == out.resolve():
            raise ValueError(f"{path} is the dataset's own folder; choose another --dataset")
        if base.resolve() in out.resolve().parents:
            paths = [p for p in paths if out.resolve() not in p.resolve().parents]
    there, left = of_one_revision(base, [p for p in sorted(paths) if p.is_file()])
    if odd := sorted({*paths} - {*there}):
        left["that are no files (links to nothing, pipes)"] = below(base, odd)
    names, others = readable(below(base, there))
    left |= others
    if not names:
        some = f"; there is: {listed(left)}" if left else ""
        raise ValueError(f"{path} holds no {READ} files{some}")
    try:
        if says_split(path):
            if val_split or subset or reading.split not in ("train", "all"):
                raise ValueError(
                    "a pattern that names a split takes no --split, --val_split or --subset: name "
                    "the folder"
                )
            chosen = choose(names, "all")._replace(named=False, open=frozenset())
        else:
            chosen = choose(names, reading.split, val_split, subset, folder_configs(base))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    chosen = of_one_kind(chosen)
    left |= reasons(chosen)
    files = [base / n for n in chosen.train]
    original = len(files) == 21 and all(p.name.startswith("urlsf_subset") for p in files)
    whole |= original or (path.is_dir() and path.resolve().name.lower() == "openwebtext")
    parts = with_names(local_parts(files, reading), chosen.train, chosen)
    for part in with_names(
        local_parts([base / n for n in chosen.val], reading), chosen.val, chosen
    ):
        parts.append(replace(part, shard=part.shard + len(files), val=True))
    said = [*told, f"{path}: {counted(chosen.train)} for training"]
    if chosen.val:
        said[-1] += f", {counted(chosen.val)} for validation"
    said += doubtful(chosen)
    if left:
        said.append(f"left out: {listed(left)}")
    if chosen.others.keys() - {OTHER_KIND}:
        said.append("--split=NAME reads another split, --split=all all of them")
    documents = OPENWEBTEXT_DOCUMENTS if whole else None
    return Source(str(asked.resolve()), parts, len(files), None, documents, said, left)


def pattern_base(path: Path) -> Path:
    """The folder that a pattern begins with."""
    while glob.has_magic(str(path)):
        path = path.parent
    return path


def says_split(path: Path) -> bool:
    """Whether a source is a pattern that says itself which split its files are of."""
    pattern = path.relative_to(pattern_base(path)).as_posix()
    return not path.is_dir() and bool(split_in(pattern))


def one_revision(path: Path) -> tuple[Path, list[str]]:
    """A folder itself, or the snapshot of an entry of the Hub's cache, and what is said of that."""
    entry = path.parent if path.name == "snapshots" else path
    found = revisions(entry) if path.is_dir() else []
    if not found:
        return path, []
    chosen = revision_of(entry, found)
    others = "".join(f", not {name}" for name in found if name != chosen)
    return entry / "snapshots" / chosen, [f"{entry}: revision {chosen} is read{others}"]


def revisions(entry: Path) -> list[str]:
    """The snapshots in a folder that is an entry of the Hub's cache; [] for one that is none."""
    if not (entry / "snapshots").is_dir() or not (entry / "blobs").is_dir():
        return []
    return sorted(p.name for p in (entry / "snapshots").iterdir() if p.is_dir())


def revision_of(entry: Path, found: list[str]) -> str:
    """Which of an entry's snapshots is read: that of refs/main, or the only one.

    Raises ValueError naming them when that is not known.
    """
    main = entry / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if len(found) == 1 or named in found:
        return named if named in found else found[0]
    raise ValueError(
        f"{entry} has {len(found)} revisions ({', '.join(found)}) and no refs/main that names one: "
        f"name it, such as --source={entry / 'snapshots' / found[0]}"
    )


def of_one_revision(base: Path, paths: list[Path]) -> tuple[list[Path], dict[str, list[str]]]:
    """Files without those of other revisions where entries of the Hub's cache lie below a source.

    The second is what is left out. Raises ValueError where one has to be chosen.
    """
    revision: dict[tuple[str, ...], str] = {}  # of each entry that was met
    kept: list[Path] = []
    others: list[Path] = []
    for path in paths:
        inside = path.relative_to(base).parts
        at = inside.index("snapshots") if "snapshots" in inside[:-1] else -1
        if at >= 0 and inside[:at] not in revision:
            entry = base.joinpath(*inside[:at])
            found = revisions(entry)
            revision[inside[:at]] = revision_of(entry, found) if found else ""
        other = at >= 0 and revision[inside[:at]] not in ("", inside[at + 1])
        (others if other else kept).append(path)
    return kept, {"of another revision": below(base, others)} if others else {}


def with_names(parts: list[Part], names: list[str], chosen: Chosen) -> list[Part]:
    """Parts of the files `names`; archives among them know whether their paths say the split."""
    return [replace(p, named=is_named(names[p.shard], chosen)) for p in parts]


def files_below(folder: Path) -> list[Path]:
    """All that lies below a folder but folders, behind links to folders, too.

    Raises OSError for a folder that cannot be read.
    """
    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found += [Path(here, name) for name in names]
    return found


def below(base: Path, paths: list[Path]) -> list[str]:
    """Paths as they are from a folder on, with /."""
    return [path.relative_to(base).as_posix() for path in paths]


def fail(e: OSError) -> None:
    """What os.walk has met is not passed over."""
    raise e


def counted(files: list[str]) -> str:
    """How many files of each kind there are: "3 .jsonl, 1 .md"."""
    kinds = [kind(f) or "" for f in files]
    return ", ".join(f"{kinds.count(k)} {k}" for k in sorted({*kinds}))
