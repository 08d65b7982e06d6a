"""The embedded corpus: the prose inside every Python installation, and questions about it."""

import ast
import inspect
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from text.turns import ASSISTANT, USER, Turn

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Modules that nobody asks about, and one that repeats another
NOT_ASKED = {"lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "distutils", "ntpath"}
RENAMED = {"posixpath": "os.path"}
SHORTEST, LONGEST = 15, 100  # letters of a sentence that is an answer
SENTENCE = re.compile(r"(.+?[.!?])(?=\s|$)")
WHAT = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Can you tell me what {} does?",
    "I found {} in some code. What does it do?",
    "Describe {} in a sentence.",
    "What happens when I call {}?",
    "I want to use {}. What is it good for?",
)
HOW = (
    "What are its arguments?",
    "Which arguments does it take?",
    "What do I pass to it?",
)
ROUNDS = 4  # conversations in which a function is
AT_ONCE = 3  # functions in a conversation, at most
HOW_SHARE = 0.5  # of them that are asked for their arguments, too


def python_files() -> list[Path]:
    """The .py files of the standard library, in order.

    Raises FileNotFoundError where Python comes without them (the embeddable one for Windows).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p for p in folder.rglob("*.py") if not SKIPPED_FOLDERS & {*p.relative_to(folder).parts}
    ]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .py files, so this Python has no docstrings to read; "
            "use a full installation, or --source=PATH with a text of your own"
        )
    return sorted(files, key=lambda p: p.as_posix())


def stdlib_documents() -> Iterator[str]:
    """The help topics of pydoc and the docstrings of the standard library, repeats left out.

    Files are read with ast, nothing is imported or run. Raises as python_files.
    """
    files = python_files()
    from pydoc_data.topics import topics

    seen = set()
    for text in itertools.chain((topics[t] for t in sorted(topics)), docstrings(files)):
        text = inspect.cleandoc(text).strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def parsed(path: Path) -> ast.Module | None:
    """What a file of Python says; None for one of the few that are broken on purpose."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None


def docstrings(files: list[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions, in the order of the files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        if (tree := parsed(path)) is None:
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


class Function(NamedTuple):
    """What is asked about a function of the standard library."""

    name: str  # as one writes it: json.dumps
    does: str  # the first sentence of its docstring
    takes: str  # its arguments, as a sentence


def functions() -> Iterator[Function]:
    """The public functions of modules whose docstrings begin with a short sentence."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in python_files():
        parts = [*path.relative_to(folder).with_suffix("").parts]
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not all(p.isidentifier() and p[0] != "_" for p in parts) or {*parts} & NOT_ASKED:
            continue
        module = ".".join(RENAMED.get(p, p) for p in parts)
        for node in tree.body if (tree := parsed(path)) else []:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            found = SENTENCE.match(text)
            name = f"{module}.{node.name}"
            if found and SHORTEST <= len(found[1]) <= LONGEST and name not in seen:
                seen.add(name)
                yield Function(name, found[1], takes(node.args))


def takes(args: ast.arguments) -> str:
    """A sentence that lists a function's arguments."""
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    if len(names) < 2:
        return f"It takes {names[0] if names else 'no arguments'}."
    return f"It takes {', '.join(names[:-1])} and {names[-1]}."


def stdlib_conversations() -> Iterator[list[Turn]]:
    """Questions about the functions of the standard library, and what their docstrings answer.

    One to three functions a conversation; each comes in ROUNDS of them, asked for in other words
    each time. The same ones for the same Python. Raises as python_files.
    """
    known, chance = [*functions()], random.Random(0)
    for n in range(ROUNDS):
        left = chance.sample(range(len(known)), len(known))
        while left:
            turns: list[Turn] = []
            for i in [left.pop() for _ in range(min(len(left), chance.randint(1, AT_ONCE)))]:
                asked = WHAT[(i + n * len(WHAT) // ROUNDS) % len(WHAT)].format(known[i].name)
                turns += [Turn(USER, asked), Turn(ASSISTANT, known[i].does)]
                if chance.random() < HOW_SHARE:
                    turns += [Turn(USER, chance.choice(HOW)), Turn(ASSISTANT, known[i].takes)]
            yield turns
