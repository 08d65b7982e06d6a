"""What a model's folder states of its tokenizer: which ids end a text, begin one, and pad it.

tokenizer.json does not say. Three files beside it do, each in its own way, and meta.json beside
a dataset's.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from text.files import read_json

# Beside tokenizer.json, small; config.json is read for its ids alone
FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
KINDS = ("eos", "bos", "pad")


class Marks(NamedTuple):
    """Ids that mean something to a model beyond their text; None and empty where nothing says."""

    eot: int | None  # ends a document
    ends: frozenset[int]  # a text stops at any of them, as in transformers' generate
    bos: int | None
    pad: int | None


def read(folder: Path) -> dict[str, Any]:
    """The files' contents under "tokenizer", "generation", "model" and "dataset"; those there are.

    Of config.json and meta.json only the ids. Raises ValueError for a file that is not JSON.
    """
    found: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one wins
        if (folder / name).is_file():
            tokenizer |= read_json(folder / name)
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    if tokenizer:
        found["tokenizer"] = tokenizer
    if (folder / "generation_config.json").is_file():
        found["generation"] = read_json(folder / "generation_config.json")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        found["model"] = {f"{k}_token_id": config.get(f"{k}_token_id") for k in KINDS}
    if (folder / "meta.json").is_file():
        found["dataset"] = {"eos_token_id": read_json(folder / "meta.json").get("eot")}
    return found


def ids(value: Any, size: int) -> list[int]:
    """Of a number or a list those that are ids of a vocabulary of `size`, in order."""
    values = value if isinstance(value, list | tuple) else [value]
    return [i for i in values if type(i) is int and 0 <= i < size]


def marks(stated: Mapping[str, Any], id_of: Callable[[str], int | None], size: int) -> Marks:
    """What the files state, as ids. id_of: a token's id by its text; size: of the vocabulary.

    A document ends with the token that the dataset's meta.json or tokenizer_config.json names,
    else with the first of config.json's, else of generation_config.json's. A text stops at those
    of generation_config.json, else of config.json, and where a document ends.
    """
    by_id = [stated.get(part) or {} for part in ("dataset", "model", "generation")]
    first: dict[str, int | None] = {}
    for kind in KINDS:
        entry = (stated.get("tokenizer") or {}).get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        named = [id_of(text)] if isinstance(text, str) else []
        dataset, model, generation = (ids(part.get(f"{kind}_token_id"), size) for part in by_id)
        candidates = [*dataset, *named, *model, *generation]
        first[kind] = next((i for i in candidates if i is not None), None)
    _, model, generation = (ids(part.get("eos_token_id"), size) for part in by_id)
    return Marks(first["eos"], frozenset(generation or model), first["bos"], first["pad"])
