"""Conversations to tokens, by a chat template.

The template is ChatML's, unless a model was imported with its own. A turn is a role and its content
between two tokens of their own:

    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

What counts for the loss is the assistant's content and the token that ends its turn.
"""

import functools
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from text import stated
from text.tokenizer import Ids, Tokenizer, chatting, well_formed
from text.turns import ASSISTANT, USER, Turn

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
# Of an added token that is none of a text
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
NO_END = "its chat template has no special token at the end of an answer"


class Encoded(NamedTuple):
    """A conversation's tokens, and what is known of each: (tokens,) all three."""

    ids: Ids
    counts: NDArray[np.bool_]  # for the loss
    begins: NDArray[np.bool_]  # a turn that asks begins with it; the first token is one


def with_chat(tok: Tokenizer) -> Tokenizer:
    """The tokenizer with a way to write conversations: its model's own, else ChatML.

    ChatML's two tokens are those of the vocabulary, where it has them, else the next ids. Raises
    ValueError for a template or a vocabulary with which that cannot be.
    """
    added: dict[str, int] = {}
    if (template := own_template(tok)) in ("", CHATML):
        template, there = CHATML, special_tokens(tok)
        for name in (START, END):
            if name not in there:
                added[name] = tok.vocab_size + len(added)
        if tok.json_text is not None:
            with_tokens(tok.json_text, added)
    names = {i: name for name, i in special_tokens(tok).items()}
    # transformers has no bos_token but a named one
    marks = {kind: stated.named_token(tok.stated, kind) for kind in ("bos", "eos")}
    marks["eos"] = marks["eos"] or names.get(tok.eot, "")
    entry = {"template": template, "added": added, "end": 0, **marks}  # the end is found out
    try:
        entry["end"] = Template(chatting(tok, entry)).end
    except ValueError as e:
        if template == CHATML:
            raise
        hint = "without it, in tokenizer_config.json or chat_template.jinja, it gets ChatML"
        raise ValueError(f"{e}; {hint}") from e
    return chatting(tok, entry)


def with_tokens(json_text: str, added: Mapping[str, int]) -> str:
    """A tokenizer.json with more special tokens. Raises ValueError where they get other ids."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    spec = json.loads(json_text)
    there = {token["content"]: token for token in spec.get("added_tokens") or []}
    if plain := [name for name in added if name in there or name in vocabulary_of(spec)]:
        raise ValueError(
            f"its tokenizer.json has {plain[0]}, but not as a special token, so that any text may "
            'have it; write "special": true there'
        )
    more = [{"id": i, "content": name, **FLAGS} for name, i in added.items()]
    spec["added_tokens"] = [*there.values(), *more]
    made = json.dumps(spec, ensure_ascii=False)
    ids = HuggingFaceTokenizer.from_str(made).token_to_id
    if wrong := [name for name, i in added.items() if ids(name) != i]:
        raise ValueError(
            f"its tokenizer.json has ids without a token below {max(added.values())}, where "
            f"{wrong[0]} would be put; give them tokens of their own"
        )
    return made


def vocabulary_of(spec: dict[str, Any]) -> Container[str]:
    """The tokens of a tokenizer.json's model by their texts; none of a kind without texts."""
    vocab = (spec.get("model") or {}).get("vocab")
    return vocab if isinstance(vocab, dict) else ()


def own_template(tok: Tokenizer) -> str:
    """The chat template that an imported model's files state, "" for none."""
    template = (tok.stated.get("tokenizer") or {}).get("chat_template")
    if isinstance(template, list):  # several by name, as transformers 4 wrote them
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else ""
    return template if isinstance(template, str) else ""


def answering(tok: Tokenizer, where: object) -> Tokenizer:
    """The tokenizer of a model that answers, with its way to write conversations.

    Raises ValueError, naming where it is from, for one that was not taught to.
    """
    if not tok.chat and not own_template(tok):
        raise ValueError(
            f"{where} goes on with a text, it was not taught to answer: fine-tune it with "
            "config/finetune_chat.py"
        )
    try:
        return tok if tok.chat else with_chat(tok)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def special_tokens(tok: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that no text has, by their names."""
    added = tok.chat.added if tok.chat else {}
    if tok.json_text is None:
        return {"<|endoftext|>": tok.eot, **added}
    spec = json.loads(tok.json_text)
    tokens = [t for t in spec.get("added_tokens") or [] if t.get("special") and t["content"]]
    return {**{t["content"]: t["id"] for t in tokens}, **added}


def question_ids(tok: Tokenizer, text: str) -> list[int]:
    """What a model goes on with after a text: as a question, where it was taught to answer."""
    return Template(tok).prompt([Turn(USER, text)]) if tok.chat else tok.prompt(text)


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
    env.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    env.globals["raise_exception"] = fail
    try:
        made = env.from_string(template)
    except Exception as e:  # Python's own compiler has its limits, too
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"its chat template is no template of Jinja's ({reason})") from e

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
        if not self.special:
            raise ValueError(NO_END)
        names = sorted(self.special, key=len, reverse=True)
        self.names = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.render = compiled(tok.chat.template)
        self.values = {
            "bos_token": tok.chat.bos,
            "eos_token": tok.chat.eos,
            "enable_thinking": False,  # Qwen3's: an answer begins at once
            "tools": None,
            "documents": None,
        }
        probe = self.encode([Turn(USER, "Hi"), Turn(ASSISTANT, "Hi")])
        self.end = int(probe.ids[probe.counts][-1])  # of an answer
        if self.own and tok.json_text is not None:
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
            turn._replace(content=self.names.sub(broken, well_formed(turn.content)))
            for turn in turns
        ]

    def marked(self, turns: Sequence[Turn]) -> str:
        """The text of `spelt` turns with marks around the contents.

        Raises ValueError when the template changes a content beyond the blanks around it.
        """
        text, found = self.rendered([*map(inside, turns)], False), [*turns]
        if self.own:
            plain = self.rendered(turns, False)
            if MARKS.sub("", text) != plain:
                found = [self.as_taken(turns, i, plain) for i in range(len(turns))]
                text = self.rendered([*map(inside, found)], False)
            said = re.findall(f"{OPEN}([^{CLOSE}]*){CLOSE}", text)
            if MARKS.sub("", text) != plain or (
                len(said) == len(found) and said != contents(found)
            ):
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
        head = None  # what stands before an answer
        parts = re.split(f"([{OPEN}{CLOSE}])", piece.replace(SPELT, ""))
        for i, part in enumerate(parts):
            if part == OPEN:
                if self.counting:
                    raise ValueError(NO_END)
                self.open, turn = True, next(self.said)
                if turn.role == ASSISTANT:
                    self.counting, head = True, "".join(parts[0:i:2])
                elif self.ended:
                    self.begins.append(self.length if self.next is None else self.next)
                self.ended, self.next = False, None
            elif part == CLOSE:
                self.open = False
        if not (text := "".join(parts[::2])):
            return
        ids = self.tok.encode_array(text)
        counts = np.zeros(len(ids), np.bool_)
        if head is not None:
            alike = [a == b for a, b in zip(self.tok.encode_array(head), ids, strict=False)]
            counts[alike.index(False) if False in alike else len(alike) :] = True
        self.add(ids, counts)


def contents(turns: Sequence[Turn]) -> list[str]:
    """What is said in turns."""
    return [turn.content for turn in turns]


def inside(turn: Turn) -> Turn:
    """A turn with marks around its content."""
    return turn._replace(content=f"{OPEN}{turn.content}{CLOSE}")


def broken(match: re.Match[str]) -> str:
    """The name of a token with a mark in it, so that it is none."""
    return f"{SPELT}{match[0]}" if len(match[0]) < 2 else f"{match[0][0]}{SPELT}{match[0][1:]}"
