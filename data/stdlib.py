"""The embedded corpus: the prose inside every Python installation."""

import ast
import inspect
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_documents() -> Iterator[str]:
    """The help topics of pydoc and the docstrings of the standard library, repeats left out.

    Files are read with ast, nothing is imported or run. Raises FileNotFoundError where Python
    comes without its .py files (the embeddable one for Windows).
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
    from pydoc_data.topics import topics

    seen = set()
    files.sort(key=lambda p: p.as_posix())
    for text in itertools.chain((topics[t] for t in sorted(topics)), docstrings(files)):
        text = inspect.cleandoc(text).strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def docstrings(files: list[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions, in the order of the files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text
