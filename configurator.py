"""Settings from the command line and from config files, checked by name and type.

A setting is a lower-case global of a script whose default is a bool, int, float or str; the
default fixes its type. `UPPER_CASE` is a constant and `_name` is private: neither can be set.

    python train.py config/train_gpt.py --batch_size=6 --compile=False

Arguments apply from left to right, later ones win. A config file is Python that the user names;
it runs in a namespace of its own and only its values are taken, each checked as a flag is.
"""

import difflib
import io
import math
import runpy
import sys
import tokenize
from collections.abc import Iterable, Mapping
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


_typed: set[str] = set()  # the settings that were flags of this process's command line


class ConfigError(ValueError):
    """A setting that does not exist or fits nothing, or a value of the wrong type; one line."""


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
        if kind is int and isinstance(value, int | str):
            try:
                return int(value)
            except ValueError:
                pass  # "1e4" is an int to a person
        number = float(value)
        exact = kind is float or number.is_integer()
    except (ValueError, OverflowError):
        raise error from None
    if not exact or number != number:
        raise error
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
    except Exception as e:
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    values: dict[str, Value] = {}
    for name, value in found.items():
        if name.startswith("_") or name.isupper() or callable(value) or type(value) is type(sys):
            continue
        if name not in defaults:
            raise ConfigError(f"{path}: no setting {name!r}: {unknown(name, found, defaults)}")
        values[name] = convert(name, value, defaults[name], str(path))
    return values


def overrides(
    args: Iterable[str], defaults: Mapping[str, Value], root: Path | None = None
) -> dict[str, Value]:
    """The settings that the command line `args` changes, as name -> value.

    `root` is where a relative config file is looked for when the working directory lacks it.
    Raises ConfigError (one line) for an unknown name, a wrong type or a missing file.
    """
    values: dict[str, Value] = {}
    pending = list(args)
    while pending:
        arg = pending.pop(0)
        if not arg.startswith("--"):
            path = Path(arg)
            if path.suffix != ".py":
                raise ConfigError(
                    f"{arg!r} is neither --name=value nor a config file ending in .py"
                )
            if not path.is_file() and root is not None and (root / path).is_file():
                path = root / path
            if not path.is_file():
                raise ConfigError(f"there is no config file {arg!r}")
            values.update(read_file(path, defaults))
            continue
        name, equals, text = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name not in defaults:
            seen = {**values, name: text}
            raise ConfigError(f"--{name}: no such setting: {unknown(name, seen, defaults)}")
        if not equals:  # `--eval_only` and `--batch_size 8` are what fingers type
            if type(defaults[name]) is bool and (not pending or pending[0].lower() not in BOOLS):
                text = "True"
            elif pending and not pending[0].startswith("--"):
                text = pending.pop(0)
            else:
                raise ConfigError(f"--{name} needs a value: write --{name}={defaults[name]!r}")
        values[name] = convert(name, text, defaults[name], "command line")
    return values


def comments(path: Path) -> dict[str, str]:
    """The trailing comment of each top-level assignment in a script, by name."""
    found: dict[str, str] = {}
    name = ""
    source = io.StringIO(path.read_text(encoding="utf-8"))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        elif token.type == tokenize.COMMENT and name and token.line[:1] not in "# ":
            found[name] = token.string.lstrip("# ")
        elif token.type == tokenize.NEWLINE:
            name = ""
    return found


def help_text(path: Path, doc: str | None, defaults: Mapping[str, Value]) -> str:
    """What `--help` prints: the script's docstring, then each setting, default and comment."""
    notes = comments(path)
    rows = [(f"  --{name}={value!r}", notes.get(name, "")) for name, value in defaults.items()]
    width = min(44, max((len(flag) for flag, _ in rows), default=0))
    lines = [f"{flag:<{width}}  {note}".rstrip() for flag, note in rows]
    room = "" if path.parent == Path(__file__).resolve().parent else f"{path.parent.name}/"
    usage = f"python {room}{path.name} [CONFIG.py ...] [--name=value ...]"
    return "\n".join([(doc or "").strip(), "", usage, "", *lines])


def configure(namespace: Mapping[str, Any], args: list[str] | None = None) -> dict[str, Value]:
    """A script's one call: what to change in its globals, from sys.argv.

    `--help` prints and exits with 0; a mistake is one line on stderr and exit code 2.
    """
    args = sys.argv[1:] if args is None else args
    path = Path(namespace["__file__"]).resolve()
    defaults = settings_of(namespace)
    if any(arg in ("-h", "--help") for arg in args):
        print(help_text(path, namespace.get("__doc__"), defaults))
        sys.exit(0)
    try:
        values = overrides(args, defaults, path.parent)
    except ConfigError as e:
        fail(path.name, str(e))
    _typed.clear()
    flags = (arg[2:].partition("=")[0] for arg in args if arg.startswith("--"))
    _typed.update(name.replace("-", "_") for name in flags)
    return values


def fail(script: str, message: str) -> NoReturn:
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(2)
