"""Folders of Hugging Face's kind: one on this machine, or the Hub's cache's. Imports no torch."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from text.files import named_reason, path_of

PREFIX = "hf:"  # of a folder's path or a Hub name among the values of settings
NAME = r"[\w.-]+/[\w.-]+"  # USER/NAME


def find(name: str, patterns: Iterable[str]) -> Path:
    """The folder `name`, or the copy of the Hub's repository USER/NAME in the Hub's cache.

    patterns: the files that are downloaded. Raises OSError.
    """
    if name and path_of(name).is_dir():
        return path_of(name)
    if not re.fullmatch(NAME, name) or path_of(name).exists():
        raise FileNotFoundError(f"there is no folder {name!r} (from the Hub: hf:USER/NAME)")
    from huggingface_hub import snapshot_download

    # a repository of one .pt has none of the small files, which is no news for the user
    logging.getLogger("huggingface_hub._snapshot_download").addFilter(tells_more)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as e:  # the Hub's, the network's and the disk's errors have no common class
        raise OSError(
            f"there is no folder {name!r}, and the Hub did not give it: {named_reason(e)}"
        ) from e


def tells_more(record: logging.LogRecord) -> bool:
    """Whether a warning of the Hub's package says more than that a pattern has matched nothing."""
    return not record.getMessage().startswith("No files matched")


def listing(name: str, folder: Path) -> list[str]:
    """The files of what `find` has found at `folder`: all of a repository's, here or not."""
    if path_of(name).is_dir():
        return sorted(p.name for p in folder.iterdir())
    try:
        from huggingface_hub import HfApi

        return sorted(HfApi().list_repo_files(name))
    except Exception:  # no network: those in the cache will do
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
