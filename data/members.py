"""Which files of an archive are read: the rules of a folder's, without keeping all their names."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from data import archives, splits
from data.archives import CLEANED
from data.parts import DAMAGE, content, is_hidden, kind, suffix_of

IN_ARCHIVES = ("text", "lines", "json", "table", "tar")  # what can be read as a stream


class Sort(NamedTuple):
    """All that a path says for the rules: files that are alike in it are read or left out alike."""

    split: str
    content: str
    asked: tuple[str, ...]  # the splits that are asked for by a word of its own
    about: int  # folders above it, if it is called as what tells about data; else -1


class Choice:
    """What is read of the files of an archive: one file of each sort stands for all of them."""

    def __init__(self, paths: Iterable[str], split: str, val_split: str, named: bool) -> None:
        """named: the archive's own path says its split, which counts where no path in it does."""
        self.words = [s for s in (split, val_split) if s and s not in splits.NAMES]
        first: dict[Sort, str] = {}
        folder: list[str] | None = None
        for path in paths:
            if unread(path):
                continue
            above = path.split("/")[:-1]
            folder = above if folder is None else [*os.path.commonprefix([folder, above])]
            first.setdefault(self.sort(path), path)
        self.depth = len(folder or [])
        if all(sort.about == self.depth for sort in first):
            self.depth = -2  # nothing else is there to be told about
        names = [path for sort, path in first.items() if sort.about != self.depth]
        groups = self.groups = splits.grouped(names, "", None)
        self.own = named and [*groups] == [splits.UNNAMED]
        whole = self.own or split == "all"
        train = names if whole else found(groups, split)
        val = [f for f in found(groups, val_split) if f not in train] if val_split else []
        others = {s: [f for f in fs if f not in {*train, *val}] for s, fs in groups.items()}
        chosen = splits.Chosen(train, val, others, [*groups] != [splits.UNNAMED])
        chosen = splits.of_one_kind(chosen)
        sorts = {path: sort for sort, path in first.items()}
        self.train = {sorts[path] for path in chosen.train}
        self.val = {sorts[path] for path in chosen.val}
        self.why = {sorts[f]: why for why, fs in splits.reasons(chosen).items() for f in fs}

    def sort(self, path: str) -> Sort:
        """What a path says."""
        asked = tuple(word for word in self.words if splits.has_word(word, path))
        about = path.count("/") if splits.tells(path) else -1
        return Sort(splits.split_in(path), content(path), asked, about)

    def left_out(self, path: str) -> str:
        """Why a file is not read, "" for one that is, for training or for validation."""
        if why := unread(path):
            return why
        sort = self.sort(path)
        if sort.about == self.depth:
            return "about the data"
        return self.why.get(sort, "")

    def reads(self, path: str, val: bool) -> bool:
        """Whether a file is read, for validation or for training."""
        return not unread(path) and self.sort(path) in (self.val if val else self.train)


def found(groups: dict[str, list[str]], split: str) -> list[str]:
    """The files of a split, none where it is not there."""
    try:
        return splits.members(groups, split)
    except ValueError:
        return []


def unread(path: str) -> str:
    """Why a file of an archive is never read, "" for one that may be."""
    if is_hidden(path):
        return "hidden"
    if kind(path) is None or content(path) not in IN_ARCHIVES:
        return f"{suffix_of(path)} in an archive"
    if path.split("/")[-1] in splits.BOOKKEEPING:
        return "of the datasets library"
    return ""


def choice(file: str, split: str, val_split: str, named: bool) -> Choice:
    """What is read of an archive. It is looked through for that, as far as it is not damaged."""
    return Choice(paths(file) if kind(file) != CLEANED else (), split, val_split, named)


def paths(file: str) -> Iterable[str]:
    """The paths of the files in an archive, as far as it can be read."""
    try:
        for member in archives.members(file):
            if member.stream is not None:
                yield member.path
    except DAMAGE:  # said when it is read in earnest
        return
