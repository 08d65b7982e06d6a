"""Settings from the command line and from config files, checked by name and type.

A setting is a lower-case global of a script whose default is a bool, int, float or str; the
default fixes its type. `UPPER_CASE` is a constant and `_name` is private: neither can be set.

    python train.py config/train_gpt.py --batch_size=6 --compile=False

Arguments apply from left to right, later ones win. A config file is Python that the user names;
it runs in a namespace of its own and only its values are taken, each checked as a flag is.
"""

import contextlib
import difflib
import io
import math
import os
import runpy
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

Value = bool | int | float | str

BOOLS = {"true": True, "1": True, "yes": True, "on": True}
BOOLS |= {"false": False, "0": False, "no": False, "off": False}

# Names that nanoGPT's and EasyGPT's configs set and that are called something else here.
RENAMED = {
    "block_size": "max_position_embeddings",
    "msx_position_embeddings": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "norm_eps": "rms_norm_eps",
}

FROM_FILES = ("gradient_accumulation_steps",)  # what is said of it depends on a config's values

WIDTH, NOTES_AT = 80, 32  # columns of --help, and where what a setting means begins at the latest

_typed: set[str] = set()  # the settings that were flags of this process's command line


class ConfigError(ValueError):
    """A setting that does not exist or fits nothing, or a value of the wrong type; one line."""

    exit_code = 2


def typed() -> frozenset[str]:
    """The settings that were flags of the command line."""
    return frozenset(_typed)


def refuse(branch: str, *names: str) -> None:
    """Raises ConfigError when one of the settings was typed, since it changes nothing here.

    branch: why it does not, in words that follow "has no effect". What a config file sets is
    never refused: it serves many commands.
    """
    for name in names:
        if name in _typed:
            raise ConfigError(f"--{name} has no effect {branch}; leave it out")


def settings_of(namespace: Mapping[str, Any]) -> dict[str, Value]:
    """The settings among a script's globals: lower-case, public, bool, int, float or str."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name.islower() and type(value) in (bool, int, float, str)
    }


def convert(name: str, value: object, default: Value, where: str) -> Value:
    """`value`, as text from the command line or as a config file's object, in the default's type.

    An int is accepted for a float, `1e4` for an int when it is exact, true/false in any case.
    Raises ConfigError naming the place, the value and the type wanted.
    """
    kind = type(default)
    error = ConfigError(
        f"{where}: {name} is {article(kind)} (default {default!r}), not {value!r}"
        + (f"; write {name}=True or {name}=False" if kind is bool else "")
    )
    if kind is str:
        if isinstance(value, str):
            return value
        if default == "auto" and isinstance(value, bool | int):  # compile = False
            return str(value)
        raise error
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in BOOLS:
            return BOOLS[value.strip().lower()]
        raise error
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise error
    try:
        number = float(value)
        exact = kind is float or number.is_integer()
        if kind is int and isinstance(value, int | str):
            with contextlib.suppress(ValueError):  # "1e4" is an int to a person
                number = int(value)
    except (ValueError, OverflowError):
        raise error from None
    if not exact or number != number:
        raise error
    if kind is int and not -(2**63) <= number < 2**63:
        raise ConfigError(f"{where}: {name}={value} is more than a 64-bit number holds")
    return int(number) if kind is int else number


def article(kind: type) -> str:
    return {bool: "true or false", int: "an int", float: "a float", str: "a text"}[kind]


def unknown(name: str, values: Mapping[str, Any], defaults: Mapping[str, Value]) -> str:
    """What to write instead of `name`; `values` are the settings in force so far."""
    if name == "gradient_accumulation_steps" and "tokens_per_step" in defaults:
        settings = {**defaults, **values}
        factors = [settings["batch_size"], settings["max_position_embeddings"], settings[name]]
        tokens = math.prod(int(f) if str(f).isdigit() else 0 for f in factors) or "..."
        line = f"write tokens_per_step = {tokens}"
        return f"accumulation is derived; {line} (batch x context x accumulation)"
    if RENAMED.get(name) in defaults:
        return f"write {RENAMED[name]} = {values.get(name, '...')}"
    near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "--help lists all settings"


def read_file(path: Path, defaults: Mapping[str, Value]) -> dict[str, Value]:
    """The settings that a config file assigns. Imported modules and functions in it are ignored.

    Raises ConfigError for anything else that is not a setting, and for an error in the file.
    """
    try:
        found = runpy.run_path(str(path))
    except BaseException as e:  # sys.exit() in it, too: it would end the script without a word
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    values: dict[str, Value] = {}
    for name, value in found.items():
        if name.startswith("_") or name.isupper() or callable(value) or type(value) is type(sys):
            continue
        if name not in defaults:
            raise ConfigError(f"{path}: no setting {name!r}: {unknown(name, found, defaults)}")
        values[name] = convert(name, value, defaults[name], str(path))
    return values


def find_file(arg: str, root: Path | None) -> Path:
    """The config file of an argument, looked for in the working directory, then in `root`.

    Raises ConfigError for what is none.
    """
    path = Path(os.path.expanduser(arg))
    places = [path, *([root / path] if root else [])]
    if path.suffix == ".py" and (found := [p for p in places if p.is_file()]):
        return found[0]
    for folder in (p for p in places if p.is_dir()):
        files = ", ".join(str(path / p.name) for p in sorted(folder.glob("*.py")))
        raise ConfigError(f"{arg!r} is a folder; name a config file{files and f': {files}'}")
    if path.suffix != ".py":
        raise ConfigError(f"{arg!r} is neither --name=value nor a config file ending in .py")
    raise ConfigError(f"there is no config file {arg!r}")


def overrides(
    args: Iterable[str], defaults: Mapping[str, Value], root: Path | None = None
) -> dict[str, Value]:
    """The settings that the command line `args` changes, as name -> value.

    `root` is where a relative config file is looked for when the working directory lacks it.
    Raises ConfigError (one line) for an unknown name, a wrong type or a missing file.
    """
    values: dict[str, Value] = {}
    parts = [*split(args, defaults)]
    for _, name, text in parts:  # before a config file is run, which may take its time
        if name in defaults and text is not None:
            convert(name, text, defaults[name], "command line")
        elif name and name not in defaults and name not in FROM_FILES:
            raise ConfigError(f"--{name}: no such setting: {unknown(name, {name: text}, defaults)}")
    for words, name, text in parts:
        if not name:
            values.update(read_file(find_file(words[0], root), defaults))
        elif name not in defaults:
            seen = {**values, name: text}
            raise ConfigError(f"--{name}: no such setting: {unknown(name, seen, defaults)}")
        elif text is None:
            raise ConfigError(f"--{name} needs a value: write --{name}={defaults[name]!r}")
        else:
            values[name] = convert(name, text, defaults[name], "command line")
    return values


def split(
    args: Iterable[str], defaults: Mapping[str, Value]
) -> Iterator[tuple[list[str], str, str | None]]:
    """The command line in parts: their words, the setting's name, and its value as text.

    A config file's has no name. The value is None where it is missing, or the name unknown.
    """
    pending = list(args)
    while pending:
        words = [pending.pop(0)]
        name, equals, text = words[0][2:].partition("=")
        name = name.replace("-", "_")
        if not words[0].startswith("--"):
            yield words, "", None
        elif equals:
            yield words, name, text
        # `--eval_only` and `--batch_size 8` are what fingers type
        elif type(defaults.get(name)) is bool and (not pending or pending[0].lower() not in BOOLS):
            yield words, name, "True"
        elif name in defaults and pending and not pending[0].startswith("--"):
            words.append(pending.pop(0))
            yield words, name, words[1]
        else:
            yield words, name, None


def without(args: Iterable[str], defaults: Mapping[str, Value], *names: str) -> list[str]:
    """A command line without the flags of some settings."""
    return [word for words, name, _ in split(args, defaults) if name not in names for word in words]


def read_notes(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What a script's comments say: of each setting, and as the heading above a group of them.

    The first are by the setting's name, and stand on its lines, in parentheses, too; a heading, by
    the name of its first setting, has the lines right above.
    """
    notes: dict[str, str] = {}
    headings: dict[str, str] = {}
    name, above, last = "", "", 0  # above: comment lines that end at the line `last`
    source = io.StringIO(path.read_text(encoding="utf-8"))
    for token in tokenize.generate_tokens(source.readline):
        line, column = token.start
        text = token.string.lstrip("# ")
        if token.type == tokenize.NAME and column == 0 and not name:
            name = token.string
            if above and line == last + 1:
                headings[name] = above
        elif token.type == tokenize.COMMENT and name:
            notes[name] = f"{notes.get(name, '')} {text}".strip()
        elif token.type == tokenize.COMMENT and column == 0:
            above, last = f"{above} {text}" if line == last + 1 else text, line
        elif token.type == tokenize.NEWLINE:
            name = ""
    return notes, headings


def help_text(path: Path, doc: str | None, defaults: Mapping[str, Value]) -> str:
    """What `--help` prints: the script's docstring, then each setting, default and comment."""
    notes, headings = read_notes(path)
    flags = {name: f"  --{name}={value!r}" for name, value in defaults.items()}
    at = min(NOTES_AT, max(map(len, flags.values()), default=0) + 2)
    lines = []
    for name, flag in flags.items():
        lines += ["", headings[name]] if name in headings else []
        note = textwrap.wrap(notes.get(name, ""), WIDTH - at, break_on_hyphens=False)
        if len(flag) + 2 > at:  # it has a line of its own
            note.insert(0, "")
        rows = zip_longest([flag], note, fillvalue="")
        lines += [f"{left:<{at}}{right}".rstrip() for left, right in rows]
    room = "" if path.parent == Path(__file__).resolve().parent else f"{path.parent.name}/"
    usage = f"python {room}{path.name} [CONFIG.py ...] [--name=value ...]"
    return "\n".join([(doc or "").strip(), "", usage, *([] if headings else [""]), *lines])


def show(text: str) -> None:
    """Print a text to a reader who may leave before its end, as `head` does."""
    try:
        print(text, flush=True)
    except OSError:  # what is left would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configure(namespace: Mapping[str, Any], args: list[str] | None = None) -> dict[str, Value]:
    """A script's one call: what to change in its globals, from sys.argv.

    `--help` prints and exits with 0; a mistake is one line on stderr and exit code 2.
    """
    args = sys.argv[1:] if args is None else args
    path = Path(namespace["__file__"]).resolve()
    defaults = settings_of(namespace)
    if any(arg in ("-h", "--help") for arg in args):
        show(help_text(path, namespace.get("__doc__"), defaults))
        sys.exit(0)
    try:
        values = overrides(args, defaults, path.parent)
    except ConfigError as e:
        fail(path.name, str(e))
    _typed.clear()
    _typed.update(name for _, name, _ in split(args, defaults) if name)
    return values


def fail(script: str, message: str) -> NoReturn:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(ConfigError.exit_code)
