"""Conversations as turns, in the forms that rows of data have them."""

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from text.files import SHORT

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    **{name: name for name in (SYSTEM, USER, ASSISTANT)},
    "developer": SYSTEM,  # OpenAI's newer word
    **{"human": USER, "prompter": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT},
    "model": ASSISTANT,
}
COLUMNS = ("messages", "conversations", "conversation")  # of turns
TURNS = (("role", "content"), ("from", "value"))  # the fields of one
PARTS = ("text", "input_text", "output_text")  # of a content, by OpenAI's names
PAIRS = (
    *(("instruction", "output"), ("instruction", "response")),  # Alpaca's, Dolly's
    *(("prompt", "completion"), ("question", "answer")),
)
MORE = ("system", "input", "context", "history")  # Alpaca's and Dolly's, beside a pair
CHAT_COLUMNS = (*COLUMNS, *itertools.chain(*PAIRS), *MORE)


class Turn(NamedTuple):
    """What one of ROLES' values says."""

    role: str
    content: str


def conversation(row: Mapping[str, Any], used: tuple[str, ...] = ()) -> list[Turn]:
    """The turns of a row of data. Raises ValueError saying what in it is no conversation.

    Either a column of turns, as the Hub, OpenAI and ShareGPT have it, with a `system` beside it, or
    the two columns of a question and its answer, as Alpaca has it with its `input`, `system` and
    `history`. used: its columns_of, where they are known.
    """
    used = used or columns_of(row)
    if len(used) > 1:
        return alpaca(row, *used)
    turns, system = turns_in(row[used[0]], used[0]), system_in(row)
    if system and turns and turns[0].role == SYSTEM:
        if turns[0] != system[0]:
            raise ValueError(f"{used[0]} begins with another system's turn than the column system")
        return turns
    return [*system, *turns]


def columns_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row that its conversation is in. Raises ValueError as above."""
    return conversation_columns([name for name in row if row[name] is not None], row)


def conversation_columns(names: Iterable[str], there: Iterable[Any] = ()) -> tuple[str, ...]:
    """Which of a row's columns that hold something are its conversation: one, or a pair.

    there: all its columns, for the message. Raises ValueError where none are.
    """
    names, there = [*names], [*there]
    for used in (*((column,) for column in COLUMNS), *PAIRS):
        if {*used} <= {*names}:
            return used
    empty = ", ".join(str(name) for name in there if name not in names)
    raise ValueError(
        f"no column {' or '.join(COLUMNS[:2])} and no {' and '.join(PAIRS[0])}; there are "
        f"{', '.join([*map(str, there or names)][:9]) or 'none'}"
        + (f" (nothing in {empty[:200]})" if empty else "")
    )


def turns_in(value: Any, column: str) -> list[Turn]:
    """The turns of a column: a list of objects, or that as JSON. Raises ValueError as above."""
    value = from_json(value, column) if isinstance(value, str) else value
    return [turn_in(one, f"{column}[{i}]") for i, one in enumerate(listed(value, column, "turns"))]


def from_json(text: str, where: str) -> Any:
    """What a text says in JSON. Raises ValueError as above."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is a text, and not one in JSON ({e})") from e


def plain(value: Any) -> Any:
    """A value as JSON would have it: an array, as some readers of files make, becomes a list."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def listed(value: Any, where: str, of: str) -> list[Any]:
    """A list, whatever kind of one a file's reader makes. Raises ValueError as above."""
    found = plain(value)
    if not isinstance(found, list | tuple):
        raise ValueError(f"{where} is no list of {of} but {SHORT.repr(found)}")
    return list(found)


def turn_in(value: Any, where: str) -> Turn:
    """A turn of a column. Raises ValueError as above."""
    for role, content in TURNS:
        if isinstance(value, Mapping) and value.get(role) is not None and content in value:
            known = ROLES.get(str(value[role]).lower())
            if known is None:
                raise ValueError(f"{where} has the role {SHORT.repr(value[role])}")
            if tools := [k for k in ("tool_calls", "function_call") if value.get(k)]:
                raise ValueError(f"{where} has {tools[0]}, not read")
            if value.get("weight") not in (None, 1):  # OpenAI's, of what is not to be learnt
                raise ValueError(f"{where} has a weight, {SHORT.repr(value['weight'])}, not read")
            return Turn(known, words(value[content], f"{where}.{content}"))
    raise ValueError(f"{where} has no role and content: {SHORT.repr(value)}")


def words(value: Any, where: str) -> str:
    """A content: a text, or OpenAI's list of parts that are texts. Raises ValueError as above."""
    if isinstance(value, str):
        return value
    parts = plain(value)
    if isinstance(parts, list | tuple) and all(map(is_text, parts)):
        return "".join(part["text"] for part in parts)
    raise ValueError(f"{where} is no text but {SHORT.repr(parts)}")


def is_text(part: Any) -> bool:
    """Whether a part of a content is a text: not an image, whatever text stands beside it."""
    known = isinstance(part, Mapping) and part.get("type", "text") in PARTS
    return known and isinstance(part.get("text"), str)


def alpaca(row: Mapping[str, Any], asked: str, answered: str) -> list[Turn]:
    """The turns of a row with a column each for question and answer. Raises ValueError as above.

    An empty answer is none: in such data it is a hole, and not to be learnt.
    """
    given = {k: row[k] for k in MORE if row.get(k) is not None}
    more = [words(given.get(k, ""), k) for k in ("input", "context")]
    turns, history = system_in(row), given.get("history", [])
    if isinstance(history, str):  # as a table has it
        history = from_json(history, "history") if history.strip() else []
    for i, pair in enumerate(listed(history, "history", "pairs")):
        both = plain(pair)
        if not isinstance(both, list | tuple) or len(both) != 2:
            raise ValueError(f"history[{i}] is no pair: {SHORT.repr(both)}")
        for role, text in zip((USER, ASSISTANT), both, strict=True):
            turns.append(Turn(role, words(text, f"history[{i}]")))
    question = "\n\n".join([words(row[asked], asked), *filter(None, more)])
    answer = words(row[answered], answered)
    return [*turns, Turn(USER, question), *([Turn(ASSISTANT, answer)] if answer else [])]


def system_in(row: Mapping[str, Any]) -> list[Turn]:
    """The turn of a row's column `system`, if it has any. Raises ValueError as above."""
    text = words(row["system"], "system") if row.get("system") is not None else ""
    return [Turn(SYSTEM, text)] if text else []
