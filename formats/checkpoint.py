"""Checkpoints: written whole or not at all, checked before they are believed, read without pickle.

A checkpoint is one torch.save file of tensors and plain values, or a folder with the same contents
in parts (sharded.py). Its keys `model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss` and
`config` mean what they mean in nanoGPT's and EasyGPT's files; `tokenizer` and `train_state` are
ours.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from formats.listing import PARTS, checkpoints
from formats.pack import finite
from text.files import SHORT, line_of, reason, replacing


def save(path: Path, saved: dict[str, Any]) -> None:
    """Write `saved` to `path` so that a crash at any moment leaves the old file or the new one.

    Raises OSError when it cannot be written and ValueError when a weight is NaN or infinite; `path`
    is then untouched.
    """
    if not all(map(finite, saved["model"].values())):
        raise ValueError(f"{path} not written: weights are NaN or infinite")
    try:
        with replacing(path) as temp:
            with open(temp, "wb") as file:  # given a path, torch writes its name into the file
                torch.save(saved, file)
            check(temp)
    except (RuntimeError, OSError, ValueError) as e:  # a full disk shows as RuntimeError in torch
        raise OSError(f"could not write {path}: {e}") from e


# what zipfile raises for a damaged file; a name in it that is not UTF-8 is a ValueError
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, OSError, RuntimeError, OverflowError, ValueError),
)


def check(path: Path) -> None:
    """Raises ValueError when `path` is not a whole torch.save file: every CRC in it is verified.

    torch.load itself accepts flipped bits (tried with torch 2.13).
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            # what torch.save never writes, and its reader takes for members without contents
            odd = [
                i.filename
                for i in archive.infolist()
                if i.external_attr & 0x10
                or i.flag_bits & 1
                or i.compress_type != zipfile.ZIP_STORED
                or i.compress_size != i.file_size
            ]
            bad = odd[0] if odd else archive.testzip()
    except DAMAGE as e:
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint ({e})") from e
    if bad:
        raise ValueError(f"{path} is damaged: the checksum of {bad} is wrong")


def load(path: Path, whole: bool = True) -> dict[str, Any]:
    """A checkpoint's contents, tensors on the CPU.

    whole=False leaves the tensors of a folder of shards where they are, for `sharded.read_into`.
    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or holds anything
    but tensors and plain values.
    """
    if path.suffix == PARTS and path.is_dir():
        from formats import sharded  # few need it, and it takes a second

        return (sharded.read if whole else sharded.check)(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    check(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a hostile pickle can fail in any way
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values and was not read; "
            f"loading it could run code that it contains ({reason(e)})"
        ) from e
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds a {type(saved).__name__}, not a checkpoint")
    if "model" not in saved:
        keys = ", ".join(map(str, list(saved)[:3]))
        raise ValueError(
            f"{path} has no 'model' (its keys are {keys}, ...); a bare state dict does not tell "
            "the model's sizes"
        )
    if not isinstance(saved["model"], dict) or not isinstance(saved.get("model_args", {}), dict):
        raise ValueError(f"{path} is not a checkpoint: its 'model' or 'model_args' is no dict")
    if odd := [k for k, v in saved["model"].items() if not is_weight(k, v)]:
        raise ValueError(f"{path} is not a checkpoint: {SHORT.repr(odd[0])} is no plain tensor")
    return saved


def is_weight(name: Any, value: Any) -> bool:
    """Whether an entry of a state dict is a name and a plain tensor of floats, with its numbers."""
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and value.is_floating_point()
        and not value.is_quantized
    )


def of_run(out_dir: Path) -> list[Path]:
    """The checkpoints of a run in a folder, the newest first; nanoGPT's last."""
    nanogpts = out_dir / "ckpt.pt"
    return checkpoints(out_dir) + [nanogpts] * nanogpts.exists()


def load_newest(out_dir: Path, whole: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest good checkpoint of a run: its path, its contents, and what was wrong with newer.

    whole is `load`'s. Raises FileNotFoundError when there is none, ValueError when all are bad.
    """
    paths = of_run(out_dir)
    if out_dir.is_file():
        raise ValueError(
            f"{out_dir} is a file, and a run is a folder; a checkpoint is --init_from={out_dir}"
        )
    if not paths:
        raise FileNotFoundError(
            f"no checkpoint in {out_dir}; train one first (python train.py ... "
            f"--out_dir={out_dir}) or give another --out_dir"
        )
    problems: list[str] = []
    for path in paths:
        try:
            return path, load(path, whole), problems
        except ValueError as e:
            problems.append(line_of(e))
    raise ValueError("no good checkpoint: " + "; ".join(problems))
