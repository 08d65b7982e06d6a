"""What a model's folder states of its tokenizer: which ids end a text, begin one, and pad it.

tokenizer.json does not say. Three files beside it do, each in its own way, and meta.json beside
a dataset's.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from text.files import read_json, read_text

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
        tokenizer["chat_template"] = read_text(template)
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


def ids(value: Any, vocabulary: Container[int]) -> list[int]:
    """Of a number or a list those that are ids of a vocabulary, in order."""
    values = value if isinstance(value, list | tuple) else [value]
    return [i for i in values if type(i) is int and i in vocabulary]


def named_token(stated: Mapping[str, Any], kind: str) -> str:
    """The text of the token that a tokenizer's files name for one of KINDS, "" for none."""
    entry = (stated.get("tokenizer") or {}).get(f"{kind}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def marks(stated: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Marks:
    """What the files state, as ids. vocabulary: the ids of tokens by their texts.

    A document ends with the token that the dataset's meta.json or tokenizer_config.json names,
    else with the first of config.json's, else of generation_config.json's. A text stops at those
    of generation_config.json, else of config.json, else where a document ends.
    """
    there = {*vocabulary.values()}
    by_id = [stated.get(part) or {} for part in ("dataset", "model", "generation")]
    first: dict[str, int | None] = {}
    for kind in KINDS:
        text = named_token(stated, kind)
        named = [vocabulary[text]] if text in vocabulary else []
        dataset, model, generation = (ids(part.get(f"{kind}_token_id"), there) for part in by_id)
        first[kind] = next(iter([*dataset, *named, *model, *generation]), None)
    _, model, generation = (ids(part.get("eos_token_id"), there) for part in by_id)
    return Marks(first["eos"], frozenset(generation or model), first["bos"], first["pad"])
