"""nanoGPT's character data: the vocabulary in its meta.pkl, read without running a pickle.

Unpickling can run any code. Here the file's opcodes are walked through by the standard library's
pickletools, which runs nothing, and only those are taken that make dicts, texts and whole numbers.
"""

import json
import pickletools
from pathlib import Path
from typing import Any

FILE = "meta.pkl"
MAX_PICKLE = 2**24  # bytes; a character has about 20
EOT = "<|endoftext|>"  # which nanoGPT's data does not have: a row that is never trained

MARK = object()
VALUES = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"}
VALUES |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
IDLE = {"PROTO", "FRAME"}


def read(path: Path) -> list[str]:
    """The characters of a meta.pkl in the order of their ids.

    Raises ValueError for a file that holds anything but dicts of texts and whole numbers, or no
    such vocabulary, OSError when it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_PICKLE:
        raise ValueError(f"{path} has {size:,} bytes, too many for a vocabulary of characters")
    try:
        meta = plain_value(path.read_bytes())
        ids = meta["stoi"]
        found = sorted(ids, key=ids.__getitem__)
        if [ids[c] for c in found] != list(range(len(found))) or not found:
            raise ValueError("its ids are not 0, 1, 2 ...")
        if not all(isinstance(c, str) and len(c) == 1 for c in found):
            raise ValueError("its texts are not single characters")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        problem = " ".join(str(e).split())[:200]
        raise ValueError(
            f"{path} is not the vocabulary of nanoGPT's character data ({problem}); a pickle can "
            "run code, so nothing else in one is read: prepare the text again with "
            "data/prepare.py --source=PATH --tokenizer=bytes"
        ) from e
    return found


def plain_value(data: bytes) -> Any:
    """The value of a pickle of dicts, texts and whole numbers. Raises ValueError for another."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(MARK)
        elif name == "DICT":
            stack.append(pairs_above_mark(stack))
        elif name == "SETITEMS":
            pairs = pairs_above_mark(stack)
            stack[-1].update(pairs)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
        elif name == "STOP":
            return stack.pop()
        elif name not in IDLE:
            raise ValueError(f"it has the opcode {name}")
    raise ValueError("it has no end")


def pairs_above_mark(stack: list[Any]) -> dict[Any, Any]:
    """The keys and values above the last mark, which are taken off with it."""
    items: list[Any] = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    items.reverse()
    return dict(zip(items[::2], items[1::2], strict=True))


def to_json(characters: list[str]) -> str:
    """A tokenizer.json with those ids, and end-of-text behind them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": len(characters), "content": EOT, **flags, "special": True}],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {c: i for i, c in enumerate([*characters, EOT])},
            "unk_token": "",  # what is unknown is an error
        },
    }
    return json.dumps(spec, ensure_ascii=False)


def alphabet(spec: dict[str, Any]) -> set[str]:
    """The characters of a tokenizer.json that `to_json` has made; empty for another."""
    model = spec.get("model") or {}
    ours = model.get("type") == "WordLevel" and model.get("unk_token") == ""
    return {*model["vocab"]} - {EOT} if ours else set()


def begin(spec: dict[str, Any], eot: int) -> int:
    """What a new document begins with in a tokenizer.json: `eot`, but for these a new line."""
    return int(spec["model"]["vocab"]["\n"]) if "\n" in alphabet(spec) else eot
