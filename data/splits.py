"""Which of a dataset's files are for training: as its card says, or as their names do.

One rule for the Hub and for copies of its datasets on this disk: one split is read, and the others
are named as left out.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.parts import ARCHIVES, content, is_hidden, kind, listed, suffix_of
from text.files import named_reason

NAMES = {  # what people call the splits
    "train": ("train", "training", "trainset", "traindata"),
    "validation": (
        *("validation", "valid", "val", "dev", "heldout", "holdout"),
        *("validset", "valset", "devset", "validdata", "valdata", "devdata"),
    ),
    "test": ("test", "testing", "testset", "testdata", "eval", "evaluation", "evalset", "evaldata"),
}
SPLIT_OF = {word: split for split, words in NAMES.items() for word in words}
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of a name; a capital begins one
ENDS_AS_SPLIT = re.compile("(test|dev|valid|eval)$")
NO_SPLIT = {  # words that end so
    *("latest", "greatest", "fastest", "shortest", "lightest", "brightest", "softest", "smartest"),
    *("sweetest", "cutest", "hottest", "quietest", "neatest", "strictest", "tightest", "contest"),
    *("protest", "attest", "detest", "invalid", "medieval", "primeval", "retrieval"),
}
MAY_SAY = "whose names have a word that ends like one: take out, or rename, what is none of train"
UNNAMED = ""  # the group of the files whose names say no split
OTHER = "*"  # the group of the files of another subset, or of none that a card has
OTHER_KIND = "**"  # the group of the files of other kinds than those that are read
BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
ABOUT = ("readme.md", "readme.txt", "license.md", "license.txt")  # beside the data
ORDER = ("parquet", "arrow", "lines", "json", "table", "text", "tar", "zip")  # what is preferred
MAX_CARD = 2**20  # bytes of a README.md that are looked at
CARD = "README.md"


class Chosen(NamedTuple):
    """The files that are read for training and for validation, and what else there is."""

    train: list[str]
    val: list[str]
    others: dict[str, list[str]]  # by split
    named: bool  # names or a card say which split the files are of
    open: frozenset[str] = frozenset()  # archives whose paths say no split: what is in them may


def split_in(path: str) -> str:
    """The split that a file's path (with /) names, UNNAMED where it names none.

    Any word of the file's name may say it, or of a folder's, the nearest first; case and what
    stands between the words do not matter, and a capital begins a word.
    """
    for piece in reversed(words_of(path)):
        for word in piece:
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return UNNAMED


def words_of(path: str) -> list[list[str]]:
    """The words of a path's folders and of its name, small."""
    name = path[: len(path) - len(kind(path) or "")]
    return [[word.lower() for word in WORD.findall(piece)] for piece in name.split("/")]


def may_say(path: str) -> bool:
    """Whether a path that says no split has a word that ends like one: newstest2014.txt."""
    if split_in(path):
        return False
    words = [word for piece in words_of(path) for word in piece]
    return any(ENDS_AS_SPLIT.search(word) and word not in NO_SPLIT for word in words)


def has_word(word: str, path: str) -> bool:
    """Whether a path has a word, bounded by other than letters and digits, in any case."""
    bounded = rf"(^|[^a-z0-9]){re.escape(word.lower())}([^a-z0-9]|$)"
    return re.search(bounded, path.lower()) is not None


def choose(
    files: list[str], split: str, val_split: str = "", subset: str = "", configs: Any = None
) -> Chosen:
    """The files of the splits that are asked for, of a dataset's `files` (paths with /), in order.

    split: a name, or "all"; val_split: "" for none; configs: the card's. Raises ValueError naming
    what there is.
    """
    groups, place = grouped(files, subset, configs), {f: i for i, f in enumerate(files)}
    rest = sorted({*files} - {f for fs in groups.values() for f in fs})
    unsaid = {f for f in groups.get(UNNAMED, []) if content(f) in ARCHIVES}
    train = [f for fs in groups.values() for f in fs]
    if split != "all":
        train = members_or(groups, split, unsaid)
    val = members_or(groups, val_split, unsaid) if val_split else []
    refuse_both(split, val_split, bool({*train} & {*val} - unsaid))
    used = {*train, *val}
    train, val = sorted({*train}, key=place.__getitem__), sorted({*val}, key=place.__getitem__)
    others = {s: left for s, fs in groups.items() if (left := sorted({*fs} - used))}
    if rest:
        others[OTHER] = rest
    worded = {f for f in unsaid if has_word(split, f) or (val_split and has_word(val_split, f))}
    return Chosen(train, val, others, [*groups] != [UNNAMED], frozenset(unsaid - worded))


def refuse_both(split: str, val_split: str, shared: bool = False) -> None:
    """Raises ValueError when validation would be of what is trained on; shared: files of both."""
    same = split in (val_split, "all") or SPLIT_OF.get(split, split) == SPLIT_OF.get(val_split)
    if val_split and (same or shared):
        raise ValueError(f"val_split={val_split} is what is trained on, too: name another split")


def is_named(path: str, chosen: Chosen) -> bool:
    """Whether a file is an archive that its own path, or a card, has put in the split."""
    return content(path) in ARCHIVES and path not in chosen.open


def members_or(groups: Mapping[str, list[str]], split: str, archives: set[str]) -> list[str]:
    """The files of a split; where no path says it, archives that may have some."""
    try:
        return members(groups, split)
    except ValueError:
        if not archives:
            raise
        return [*archives]


def members(groups: Mapping[str, list[str]], split: str) -> list[str]:
    """The files of a split. Where nothing is for training by name, what has no name is."""
    alias = SPLIT_OF.get(split, split)
    for name in (split, alias):
        if name and name in groups:
            return groups[name]
    if near := [s for s in groups if has_word(split, s)]:
        if len(near) > 1:
            raise ValueError(f"several splits are called {split!r}: --split={' or '.join(near)}")
        return groups[near[0]]
    if found := [f for fs in groups.values() for f in fs if has_word(split, f)]:
        return found
    if alias == "train" and groups.get(UNNAMED):
        return groups[UNNAMED]
    raise no_split("", split, groups)


def no_split(name: str, split: str, groups: Iterable[str]) -> ValueError:
    """The error for a split that is not in a source called `name`, which may be empty."""
    there = ", ".join(s or "files without a split in their names" for s in sorted(groups))
    where = f"{name}: " if name else ""
    return ValueError(
        f"{where}there is no split {split!r}; there is: {there} (--split=all reads all)"
    )


def grouped(files: list[str], subset: str, configs: Any) -> dict[str, list[str]]:
    """Files by split: as a card's configs say, else by their names.

    Raises ValueError when a subset has to be chosen, or is not there.
    """
    by_config = {name: g for name, g in declared(files, configs).items() if any(g.values())}
    if by_config:
        name = subset or next((n for n in ("default", *by_config) if n in by_config), "")
        if name not in by_config or (not subset and name != "default" and len(by_config) > 1):
            some = ", ".join([*by_config][:20])
            problem = f"there is no subset {subset!r}; there is: " if subset else "choose one of "
            raise ValueError(f"{problem}{some}: --subset=...")
        return by_config[name]
    if subset:
        files = [f for f in files if has_word(subset, f)]
        if not files:
            raise ValueError(f"no file has the subset {subset!r} in its name")
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(split_in(file), []).append(file)
    return groups


def declared(files: list[str], configs: Any) -> dict[str, dict[str, list[str]]]:
    """The files of each split of each subset that a card's configs name; {} where it has none.

    configs: as in a card's metadata, written by a stranger: what is not understood is passed over.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        data, base = config.get("data_files"), config.get("data_dir")
        base = f"{base.strip('/')}/" if isinstance(base, str) and base.strip("/") else ""
        groups: dict[str, list[str]] = {}
        for split, patterns in split_patterns(data):
            groups.setdefault(split, []).extend(matching(files, [base + p for p in patterns]))
        if data is None and base:
            for file in matching(files, [f"{base}**"]):
                groups.setdefault(split_in(file), []).append(file)
        found[str(config.get("config_name") or "default")] = groups
    return found


def split_patterns(data: Any) -> Iterable[tuple[str, list[str]]]:
    """(split, patterns) of the forms that data_files has in a card."""
    if isinstance(data, str):
        yield "train", [data]
    elif isinstance(data, dict):
        for split, patterns in data.items():
            yield str(split), texts_in(patterns)
    elif isinstance(data, list):
        for one in data:
            if isinstance(one, str):
                yield "train", [one]
            elif isinstance(one, dict):
                yield str(one.get("split", "train")), texts_in(one.get("path"))


def texts_in(value: Any) -> list[str]:
    """A text, or the texts in a list."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def matching(files: list[str], patterns: list[str]) -> list[str]:
    """The files that a card's patterns name: * stops at /, ** does not; a folder is all in it."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = []
    for pattern in patterns:
        pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[\w-]+\])", pattern.removeprefix("./").rstrip("/"))
        regex = "".join(
            known.get(p) or (p if p[:1] == "[" and p[-1:] == "]" else re.escape(p)) for p in pieces
        )
        try:
            one = re.compile(f"{regex}(/.*)?" if len(pieces) == 1 else regex)
        except re.error:  # a range such as [9-1]
            continue
        found += [f for f in files if one.fullmatch(f) and f not in found]
    return found


def folder_configs(folder: Path) -> Any:
    """The configs of a dataset in a folder: of its card, or of a DatasetDict saved to disk."""
    saved, card = folder / "dataset_dict.json", folder / CARD
    try:
        if saved.is_file():
            names = texts_in(json.loads(saved.read_bytes()).get("splits"))
            return [{"data_files": [{"split": n, "path": f"{n}/**"} for n in names]}]
        if card.is_file() and is_card(card):
            from huggingface_hub import metadata_load

            return (metadata_load(card) or {}).get("configs")
    except Exception as e:  # a stranger's file, and yaml's errors are of no common class
        where = saved if saved.is_file() else card
        raise ValueError(
            f"{where} is not understood ({named_reason(e)}); mend it or take it away, or name the "
            "files by a pattern"
        ) from e
    return None


def is_card(path: Path) -> bool:
    """Whether a file is the card of a dataset: a README.md that begins with metadata."""
    if path.name != CARD or path.stat().st_size > MAX_CARD:
        return False
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"---")


def readable(names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Of the files of a dataset those that hold text, and the others by why they are left out."""
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
    folders = [n.split("/")[:-1] for n in kept]
    depth = len(os.path.commonprefix(folders))
    about = [n for n in kept if tells(n) and n.count("/") == depth]
    if about and len(about) < len(kept):
        left["about the data"] = about
        kept = [n for n in kept if n not in about]
    return kept, left


def doubtful(chosen: Chosen) -> list[str]:
    """A line that names what is trained on though its name may say another split, if there is."""
    if names := [name for name in chosen.train if may_say(name)]:
        return [f"trained on, though a split may be meant: {listed({MAY_SAY: names})}"]
    return []


def tells(path: str) -> bool:
    """Whether a file is called as what tells about data is, such as README.md."""
    return path.lower().split("/")[-1] in ABOUT


def of_one_kind(chosen: Chosen) -> Chosen:
    """The files of a dataset with splits in the kind that is preferred alone.

    Other kinds hold the same rows again, or what is told about them.
    """
    if not chosen.named or not chosen.train:
        return chosen
    best = min(map(content, chosen.train), key=ORDER.index)
    train = [f for f in chosen.train if content(f) == best]
    val = [f for f in chosen.val if content(f) == best] or chosen.val
    rest = [f for f in [*chosen.train, *chosen.val] if f not in {*train, *val}]
    others = {**chosen.others, OTHER_KIND: rest} if rest else chosen.others
    return chosen._replace(train=train, val=val, others=others)


def reasons(chosen: Chosen) -> dict[str, list[str]]:
    """The files that were not chosen, by why they are left out."""
    names = {UNNAMED: "of no split", OTHER: "of another subset", OTHER_KIND: "of other kinds"}
    return {names.get(s, f"of split {s}"): files for s, files in chosen.others.items()}
