"""Conversations: the forms that they come in, and the tokens that they become.

The template is ChatML's. A turn is a role and its content between two tokens of their own:

    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

What counts for the loss is the assistant's content and the token that ends its turn.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from text.files import SHORT
from text.tokenizer import Ids, Tokenizer

START, END = "<|im_start|>", "<|im_end|>"  # as files name the tokens; in a text they are letters
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
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))


class Turn(NamedTuple):
    """What one of ROLES' values says."""

    role: str
    content: str


def conversation(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of a row of data. Raises ValueError saying what in it is no conversation.

    Either a column of turns, as the Hub, OpenAI and ShareGPT have it, or the two columns of a
    question and its answer, as Alpaca has it with its `input`, `system` and `history`.
    """
    for column in COLUMNS:
        if row.get(column) is not None:
            return turns_in(row[column], column)
    for asked, answered in PAIRS:
        if row.get(asked) is not None and row.get(answered) is not None:
            return alpaca(row, asked, answered)
    raise ValueError(
        f"no column {' or '.join(COLUMNS[:2])} and no {' and '.join(PAIRS[0])}; there are "
        f"{', '.join([*map(str, row)][:9]) or 'none'}"
    )


def turns_in(value: Any, column: str) -> list[Turn]:
    """The turns of a column: a list of objects, or that as JSON. Raises ValueError as above."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{column} is a text, and not one in JSON ({e})") from e
    return [turn_in(one, f"{column}[{i}]") for i, one in enumerate(listed(value, column, "turns"))]


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
    """The turns of a row with a column each for question and answer. Raises ValueError as above."""
    given = {k: row[k] for k in ("system", "input", "history") if row.get(k) is not None}
    system, more = (words(given.get(k, ""), k) for k in ("system", "input"))
    turns = [Turn(SYSTEM, system)] if system else []
    for i, pair in enumerate(listed(given.get("history", []), "history", "pairs")):
        both = plain(pair)
        if not isinstance(both, list | tuple) or len(both) != 2:
            raise ValueError(f"history[{i}] is no pair: {SHORT.repr(both)}")
        for role, text in zip((USER, ASSISTANT), both, strict=True):
            turns.append(Turn(role, words(text, f"history[{i}]")))
    question = words(row[asked], asked)
    question = f"{question}\n\n{more}" if more else question
    return [*turns, Turn(USER, question), Turn(ASSISTANT, words(row[answered], answered))]


class Template:
    """Turns to tokens, and which of them count; start and end: the ids around a turn."""

    def __init__(self, tok: Tokenizer, start: int, end: int) -> None:
        self.tok = tok
        self.start, self.end = np.array([start], np.uint32), np.array([end], np.uint32)
        self.between = tok.encode_array("\n")
        self.head = tok.encode_array(f"{ASSISTANT}\n")

    def turn(self, turn: Turn) -> tuple[Ids, NDArray[np.bool_]]:
        """A turn's ids, with the newline after it, and a bool each: what counts.

        Role and content are encoded as one text, as by a program that encodes the whole
        conversation. A token that has letters of both belongs to the content.
        """
        ids = self.tok.encode_array(f"{turn.role}\n{turn.content}")
        counts = np.zeros(len(ids) + 2 + len(self.between), dtype=np.bool_)
        if turn.role == ASSISTANT:
            alike = [a == b for a, b in zip(self.head, ids, strict=False)]
            before = alike.index(False) if False in alike else len(alike)
            counts[1 + before : len(ids) + 2] = True
        return np.concatenate([self.start, ids, self.end, self.between]), counts

    def encode(self, turns: Iterable[Turn]) -> tuple[Ids, NDArray[np.bool_]]:
        """A conversation's ids, and a bool each: what counts for the loss."""
        parts = [self.turn(turn) for turn in turns]
        none = np.zeros(0, np.uint32), np.zeros(0, np.bool_)
        ids, counts = zip(none, *parts, strict=True)
        return np.concatenate(ids), np.concatenate(counts)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids after which the assistant's answer comes."""
        ids: list[int] = np.concatenate([self.encode(turns)[0], self.start, self.head]).tolist()
        return ids
