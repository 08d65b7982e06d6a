"""What several measurements check of their settings, and the lists in them."""

from text.files import path_of

MODES = {"eager": [False], "compiled": [True], "both": [False, True]}  # -> compiled or not
DTYPES = ("float32", "bfloat16")
LITGPT = "litgpt"


def check(mode: str = "both", dtype: str = "float32", png: str = "", **counts: int) -> None:
    """Raises ValueError for a mode, type or picture that is none, and for a count below 1.

    hidden, where it is one of the counts, is a multiple of 64.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be eager, compiled or both, not {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
        if name == "hidden" and count % 64:
            raise ValueError(f"hidden must be a multiple of 64, not {count}")
    if png and (path_of(png).suffix.lower() != ".png" or not path_of(png).parent.is_dir()):
        raise ValueError(f"png must be a name.png in a folder that is there, not {png!r}")


def peers(paths: str) -> list[str]:
    """The files of a setting with commas between, whatever folder a process will run in.

    litgpt stands for that package. Raises ValueError for a file that is not there.
    """
    found = []
    for name in filter(None, map(str.strip, paths.split(","))):
        path = path_of(name).resolve()
        if name != LITGPT and not path.is_file():
            raise ValueError(f"peer: there is no file {path}; write litgpt, or a model.py's PATH")
        found.append(name if name == LITGPT else str(path))
    return found
