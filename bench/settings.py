"""What several measurements check of their settings, and the lists in them."""

from pathlib import Path

MODES = {"eager": [False], "compiled": [True], "both": [False, True]}  # -> compiled or not
DTYPES = ("float32", "bfloat16")


def check(mode: str = "both", dtype: str = "float32", **counts: int) -> None:
    """Raises ValueError for a mode or a type that is none, and for a count below 1."""
    if mode not in MODES:
        raise ValueError(f"mode must be eager, compiled or both, not {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def peers(paths: str) -> list[str]:
    """The files of a setting with commas between, whatever folder a process will run in."""
    return [str(Path(path.strip()).resolve()) for path in paths.split(",") if path.strip()]
