"""A conversation with a model on a terminal, or one question by a pipe."""

import json
import re
import sys
from collections.abc import Iterator, Sequence

from text.chat import Template
from text.files import path_of
from text.tokenizer import Tokenizer
from text.turns import ASSISTANT, SYSTEM, USER, Turn

COMMANDS = "/reset forgets what was said, /save [FILE] writes it, /quit ends"
COMMAND = re.compile(r"/([a-z]+)(?:\s+(\S.*))?")
FILE = "chat.jsonl"  # that /save writes
LEAST = 4  # a question leaves this share of the context, one in so many, to its answer


class Talk:
    """What was said so far, and what of it the model is asked with.

    Raises ValueError for a `system` that leaves no room in the context.
    """

    def __init__(self, tok: Tokenizer, context: int, most: int, system: str) -> None:
        """most: tokens of an answer."""
        self.tok, self.template = tok, Template(tok)
        self.context, self.room = context, min(most, context // LEAST)
        self.begin = [Turn(SYSTEM, system)] if system else []
        self.turns: list[Turn] = []  # those that are asked with
        self.said: list[Turn] = []  # all of them
        if system:
            try:
                full = self.size([Turn(USER, "")]) > context - self.room
            except ValueError as e:
                raise ValueError(f"{e}; leave --system out") from e
            if full:
                raise ValueError(f"system has too many tokens for a context of {context}")

    def size(self, turns: Sequence[Turn]) -> int:
        """Tokens of the prompt that asks with these turns behind the system's."""
        return len(self.template.prompt([*self.begin, *turns]))

    def ask(self, text: str) -> list[int]:
        """The ids to go on with after a question; the oldest turns go where there is no room.

        Raises ValueError for a question that does not fit at all, which is then not asked.
        """
        turns, dropped = [*self.turns, Turn(USER, text)], 0
        while (size := self.size(turns)) > self.context - self.room:
            following = (i for i, turn in enumerate(turns) if i and turn.role == USER)
            if (cut := next(following, None)) is None:
                raise ValueError(
                    f"a question of {size} tokens leaves no room in a context of {self.context}"
                )
            turns, dropped = turns[cut:], dropped + cut
        if dropped:
            say(f"the context is full: the {dropped} oldest turns are forgotten")
        self.turns = turns
        self.said.append(turns[-1])
        return self.template.prompt([*self.begin, *turns])

    def heard(self, text: str) -> None:
        """The answer, or as much of it as there was time for."""
        self.turns.append(Turn(ASSISTANT, text))
        self.said.append(self.turns[-1])

    def questions(self) -> Iterator[list[int]]:
        """The ids to answer: of what is typed, commands aside, or of all that a pipe brings."""
        if sys.stdin is None or not sys.stdin.isatty():
            if not (text := sys.stdin.read().strip() if sys.stdin else ""):
                raise ValueError("the pipe brings no question; write echo QUESTION | python ...")
            yield self.ask(text)
            return
        say(f"ask and Enter; {COMMANDS}")
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            text = line.strip()
            if command := COMMAND.fullmatch(text):
                if command[1] == "quit":
                    return
                self.obey(command[1], command[2] or "")
            elif text:
                try:
                    yield self.ask(text)
                except ValueError as e:
                    say(str(e))

    def obey(self, command: str, rest: str) -> None:
        """/reset or /save."""
        if command == "reset" and not rest:
            self.turns.clear()
            self.said.clear()
            say("nothing was said")
        elif command == "save" and not self.said:
            say("nothing was said, and nothing is saved")
        elif command == "save":
            path = path_of(rest or FILE)
            messages = [turn._asdict() for turn in [*self.begin, *self.said]]
            try:
                with path.open("a", encoding="utf-8") as f:
                    f.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                say(f"{len(messages)} turns are one more line of {path}")
            except (OSError, ValueError) as e:
                say(f"not saved: {e}")
        else:
            say(f"no command /{command} {rest}".rstrip() + f"; {COMMANDS}")


def say(line: str) -> None:
    """To the user, aside from the answers."""
    print(line, file=sys.stderr, flush=True)
