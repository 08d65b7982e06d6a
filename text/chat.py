"""Conversations: the forms that they come in, and the tokens that they become.

The template is ChatML's, unless a model was imported with its own. A turn is a role and its content
between two tokens of their own:

    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

What counts for the loss is the assistant's content and the token that ends its turn.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from text.files import SHORT
from text.tokenizer import Ids, Tokenizer, chatting, well_formed

START, END = "<|im_start|>", "<|im_end|>"  # as files name the tokens; in a text they are letters
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Lone surrogates stand in no text, since UTF-8 has none: marks of where a content begins and ends
# in what a template makes of it, and one inside the names of tokens that a content spells.
OPEN, CLOSE, SPELT = "\udc80", "\udc81", "\udc82"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
NO_END = "its chat template has no special token at the end of an answer"
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


def conversation(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of a row of data. Raises ValueError saying what in it is no conversation.

    Either a column of turns, as the Hub, OpenAI and ShareGPT have it, or the two columns of a
    question and its answer, as Alpaca has it with its `input`, `system` and `history`.
    """
    used = columns_of(row)
    return turns_in(row[used[0]], used[0]) if len(used) == 1 else alpaca(row, *used)


def columns_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row that its conversation is in. Raises ValueError as above."""
    return conversation_columns([name for name in row if row[name] is not None], row)


def conversation_columns(names: Iterable[str], there: Iterable[Any] = ()) -> tuple[str, ...]:
    """Which of a row's columns that hold something are its conversation: one, or a pair.

    there: all its columns, for the message. Raises ValueError where none are.
    """
    names = [*names]
    for used in (*((column,) for column in COLUMNS), *PAIRS):
        if {*used} <= {*names}:
            return used
    raise ValueError(
        f"no column {' or '.join(COLUMNS[:2])} and no {' and '.join(PAIRS[0])}; there are "
        f"{', '.join([*map(str, there or names)][:9]) or 'none'}"
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
    given = {k: row[k] for k in MORE if row.get(k) is not None}
    system, *more = (words(given.get(k, ""), k) for k in ("system", "input", "context"))
    turns = [Turn(SYSTEM, system)] if system else []
    for i, pair in enumerate(listed(given.get("history", []), "history", "pairs")):
        both = plain(pair)
        if not isinstance(both, list | tuple) or len(both) != 2:
            raise ValueError(f"history[{i}] is no pair: {SHORT.repr(both)}")
        for role, text in zip((USER, ASSISTANT), both, strict=True):
            turns.append(Turn(role, words(text, f"history[{i}]")))
    question = "\n\n".join([words(row[asked], asked), *filter(None, more)])
    return [*turns, Turn(USER, question), Turn(ASSISTANT, words(row[answered], answered))]


class Encoded(NamedTuple):
    """A conversation's tokens, and what is known of each: (tokens,) all three."""

    ids: Ids
    counts: NDArray[np.bool_]  # for the loss
    begins: NDArray[np.bool_]  # a turn that asks begins with it; the first token is one


def with_chat(tok: Tokenizer) -> Tokenizer:
    """The tokenizer with a way to write conversations: its model's own, else ChatML.

    ChatML's two tokens are those of the vocabulary, where it has them, else the next ids.
    """
    added: dict[str, int] = {}
    if not (template := own_template(tok)):
        template, there = CHATML, special_tokens(tok)
        for name in (START, END):
            if name not in there:
                added[name] = tok.vocab_size + len(added)
    names = {i: name for name, i in special_tokens(tok).items()}
    stated = tok.stated.get("tokenizer") or {}
    marks = {}
    for kind, i in (("bos", tok.bos), ("eos", tok.eot)):
        named = stated.get(f"{kind}_token")
        named = named.get("content") if isinstance(named, dict) else named
        marks[kind] = named if isinstance(named, str) else names.get(-1 if i is None else i, "")
    entry = {"template": template, "added": added, "end": 0, **marks}  # the end is found out
    entry["end"] = Template(chatting(tok, entry)).end
    return chatting(tok, entry)


def own_template(tok: Tokenizer) -> str:
    """The chat template that an imported model's files state, "" for none."""
    stated = (tok.stated.get("tokenizer") or {}).get("chat_template")
    if isinstance(stated, list):  # several by name, as transformers 4 wrote them
        named = [t for t in stated if isinstance(t, dict) and t.get("name") == "default"]
        stated = named[0].get("template") if named else ""
    return stated if isinstance(stated, str) else ""


def special_tokens(tok: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that no text has, by their names."""
    added = tok.chat.added if tok.chat else {}
    if tok.json_text is None:
        return {"<|endoftext|>": tok.eot, **added}
    spec = json.loads(tok.json_text)
    found = {t["content"]: t["id"] for t in spec.get("added_tokens") or [] if t.get("special")}
    return {**found, **added}


def never(tok: Tokenizer, answering: bool) -> list[int]:
    """The ids that are not to be drawn: in an answer the special ones that do not end it, in a text
    those that conversations added."""
    if not answering:
        return sorted(tok.chat.added.values()) if tok.chat else []
    return sorted({*special_tokens(tok).values()} - tok.ends)


@functools.cache
def compiled(template: str) -> Callable[..., str]:
    """A Jinja template as transformers compiles it, in a sandbox. Raises ValueError."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what an assistant says: it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    env.globals["raise_exception"] = fail
    try:
        made = env.from_string(template)
    except (TemplateError, RecursionError) as e:
        raise ValueError(f"its chat template is no template of Jinja's ({e})") from e

    def render(**values: Any) -> str:
        try:
            return made.render(**values)
        except Exception as e:  # of any kind, as it computes
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"its chat template takes no such conversation ({reason})") from e

    return render


class Template:
    """Conversations to tokens, by a tokenizer that has a way to write them (see `with_chat`).

    Raises ValueError for a template that cannot be compiled or whose answers have no end.
    """

    def __init__(self, tok: Tokenizer) -> None:
        assert tok.chat is not None
        self.tok, self.own = tok, tok.chat.template != CHATML
        self.special = special_tokens(tok)
        names = sorted(self.special, key=len, reverse=True)
        self.names = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.render = compiled(tok.chat.template)
        self.values = {
            "bos_token": tok.chat.bos,
            "eos_token": tok.chat.eos,
            "enable_thinking": False,  # Qwen3's: an answer begins at once
        }
        probe = self.encode([Turn(USER, "Hi"), Turn(ASSISTANT, "Hi")])
        self.end = int(probe.ids[probe.counts][-1])  # of an answer
        if self.own:
            self.check(probe.ids.tolist())

    def check(self, ids: list[int]) -> None:
        """Raises ValueError where a text in pieces has other ids than as a whole."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        text = self.rendered([Turn(USER, "Hi"), Turn(ASSISTANT, "Hi")], False)
        whole = HuggingFaceTokenizer.from_str(str(self.tok.json_text))
        if whole.encode(text, add_special_tokens=False).ids != ids:
            raise ValueError("its tokenizer has other ids for the pieces of a conversation")

    def rendered(self, turns: Sequence[Turn], asks: bool) -> str:
        """What the template makes of turns; asks: it ends where an answer begins."""
        messages = [turn._asdict() for turn in turns]
        return self.render(messages=messages, add_generation_prompt=asks, **self.values)

    def spelt(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns in which the names of special tokens are none, and that are UTF-8."""
        return [
            turn._replace(content=self.names.sub(spelt, well_formed(turn.content)))
            for turn in turns
        ]

    def marked(self, turns: Sequence[Turn]) -> str:
        """The text of `spelt` turns with marks around the contents.

        Raises ValueError when the template changes a content beyond the blanks around it.
        """
        text = self.rendered([*map(inside, turns)], False)
        if self.own:
            plain = self.rendered(turns, False)
            if MARKS.sub("", text) != plain:
                found = [self.as_taken(turns, i, plain) for i in range(len(turns))]
                text = self.rendered([*map(inside, found)], False)
            if MARKS.sub("", text) != plain:
                raise ValueError("its chat template changes what is said")
        if [text.count(mark) for mark in (OPEN, CLOSE)] != [len(turns)] * 2:
            raise ValueError("its chat template leaves out what is said, or repeats it")
        return text

    def as_taken(self, turns: Sequence[Turn], i: int, plain: str) -> Turn:
        """A turn without those blanks around its content that the template takes off.

        plain: the text of all turns. Raises ValueError where it is not blanks that it changes.
        """
        for taken in (str, lambda s: s.lstrip("\n"), lambda s: s.strip("\n"), str.strip):
            turn = turns[i]._replace(content=taken(turns[i].content))
            text = self.rendered([*turns[:i], inside(turn), *turns[i + 1 :]], False)
            if MARKS.sub("", text) == plain:
                return turn
        raise ValueError("its chat template changes what is said")

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """A conversation's tokens.

        What stands between two special tokens is encoded as one text, as by a program that encodes
        the whole conversation. A token with letters of an answer and of what is before it counts.
        Raises ValueError for what the template does not take.
        """
        if not turns:
            return Encoded(np.zeros(0, np.uint32), np.zeros(0, np.bool_), np.zeros(0, np.bool_))
        walk = Walk(self, turns)
        for i, piece in enumerate(self.names.split(self.marked(self.spelt(turns)))):
            walk.token(self.special[piece]) if i % 2 else walk.text(piece)
        if walk.counting:
            raise ValueError(NO_END)
        ids, counts = np.concatenate(walk.ids), np.concatenate(walk.counts)
        begins = np.zeros(len(ids), np.bool_)
        begins[[0, *walk.begins]] = True
        return Encoded(ids, counts, begins)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids after which the assistant's answer comes. Raises ValueError as `encode`."""
        ids: list[int] = []
        for i, piece in enumerate(self.names.split(self.rendered(self.spelt(turns), True))):
            ids += [self.special[piece]] if i % 2 else self.tok.encode(piece.replace(SPELT, ""))
        return ids


class Walk:
    """The way through the pieces of a conversation's text, which makes its tokens."""

    def __init__(self, template: Template, turns: Sequence[Turn]) -> None:
        self.tok, self.said = template.tok, iter(turns)
        self.ids: list[Ids] = []
        self.counts: list[NDArray[np.bool_]] = []
        self.begins: list[int] = []  # first tokens of turns that ask after an answer
        self.length = 0  # tokens so far
        self.counting = self.open = self.ended = False  # in an answer, in a content, behind one
        self.next: int | None = None  # the first token behind an answer's end

    def add(self, ids: Ids, counts: NDArray[np.bool_]) -> None:
        """More tokens."""
        self.ids.append(ids)
        self.counts.append(counts)
        self.length += len(ids)

    def token(self, i: int) -> None:
        """A special token: the first behind an answer ends it, and counts."""
        if self.counting and self.open:
            raise ValueError("its chat template has a token inside what is said")
        if self.ended and self.next is None:
            self.next = self.length
        self.ended |= self.counting
        self.add(np.array([i], np.uint32), np.array([self.counting]))
        self.counting = False

    def text(self, piece: str) -> None:
        """What stands between two special tokens, with its marks."""
        before, head = self.counting, None  # head: what stands before an answer
        parts = re.split(f"([{OPEN}{CLOSE}])", piece.replace(SPELT, ""))
        for i, part in enumerate(parts):
            if part == OPEN:
                if self.counting:
                    raise ValueError(NO_END)
                self.open, turn = True, next(self.said)
                if turn.role == ASSISTANT:
                    self.counting, head = True, "".join(parts[0:i:2])
                elif self.next is not None:
                    self.begins.append(self.next)
                self.ended, self.next = False, None
            elif part == CLOSE:
                self.open = False
        if not (text := "".join(parts[::2])):
            return
        ids = self.tok.encode_array(text)
        counts = np.full(len(ids), before)
        if head is not None:
            alike = [a == b for a, b in zip(self.tok.encode_array(head), ids, strict=False)]
            counts[alike.index(False) if False in alike else len(alike) :] = True
        self.add(ids, counts)


def inside(turn: Turn) -> Turn:
    """A turn with marks around its content."""
    return turn._replace(content=f"{OPEN}{turn.content}{CLOSE}")


def spelt(match: re.Match[str]) -> str:
    """The name of a token with a mark in it."""
    return f"{match[0][0]}{SPELT}{match[0][1:]}"
