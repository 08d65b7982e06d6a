"""Checkpoints: written whole or not at all, checked before they are believed, read without pickle.

A checkpoint is one torch.save file of tensors and plain values. Its keys `model`, `optimizer`,
`model_args`, `iter_num`, `best_val_loss` and `config` mean what they mean in nanoGPT's and
EasyGPT's files; `tokenizer` and `train_state` are ours.
"""

import contextlib
import dataclasses
import os
import pickle
import re
import shutil
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig

PREFIXES = ("_orig_mod.", "module.", "model.")  # of torch.compile, DDP and Hugging Face
RENAMED_KEYS = {"post_attetion_layernorm": "post_attention_layernorm"}  # EasyGPT's files
RENAMED_ARGS = {"norm_eps": "rms_norm_eps"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one.

    Raises OSError when it cannot be written and ValueError when a weight is NaN or infinite; `path`
    is then untouched.
    """
    if not all(bool(t.isfinite().all()) for t in state["model"].values()):
        raise ValueError(f"{path} not written: weights are NaN or infinite")
    temp = path.with_name(path.name + ".tmp")
    try:
        temp.unlink(missing_ok=True)  # "x" below never follows a link that stands there
        with open(temp, "xb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        check(temp)
        os.replace(temp, path)
        sync_folder(path.parent)
    except (RuntimeError, OSError, ValueError) as e:  # a full disk shows as RuntimeError in torch
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {e}") from e


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; a link that stands there is not followed."""
    temp = path.with_name(path.name + ".tmp")
    temp.unlink(missing_ok=True)
    with open(temp, "x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_cpu(value: Any, seen: dict[tuple[int, torch.Size], Tensor] | None = None) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and shared with nobody.

    Tied tensors stay tied, so that they are written once.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape)
        if key not in seen or value.numel() == 0:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {k: to_cpu(v, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(v, seen) for v in value)
    return value


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, and deletes the old ones.

    The newest `keep_last` stay, those at multiples of `milestone_interval` (0: none), and best.pt.
    A write that fails leaves what was there; `problem` then says why until one succeeds.
    """

    def __init__(self, out_dir: Path, keep_last: int, milestone_interval: int = 0) -> None:
        self.out_dir, self.keep_last, self.milestone = out_dir, keep_last, milestone_interval
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.jobs: list[Future[None]] = []
        self.problem = ""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state to the CPU now and write ckpt_<step>.pt soon."""
        self.wait()
        self.jobs.append(self.thread.submit(self.write, step, to_cpu(state)))

    def mark_best(self, step: int) -> None:
        """Give the checkpoint of `step` the name best.pt as well, once it has been written."""
        self.jobs.append(self.thread.submit(self.name_best, step))

    def wait(self) -> None:
        """Return when nothing is being written."""
        while self.jobs:
            self.jobs.pop(0).result()

    def name_best(self, step: int) -> None:
        path = self.out_dir / f"ckpt_{step}.pt"
        try:
            if path.exists():
                link(path, self.out_dir / "best.pt")
        except OSError as e:
            self.problem = f"could not write best.pt: {e}"

    def write(self, step: int, state: dict[str, Any]) -> None:
        try:
            save(self.out_dir / f"ckpt_{step}.pt", state)
        except (OSError, ValueError) as e:
            self.problem = str(e)
            return
        self.problem = ""
        for old, path in steps_saved(self.out_dir)[self.keep_last :]:
            if not self.milestone or old % self.milestone or old == 0:
                with contextlib.suppress(OSError):  # open in another program; next time then
                    path.unlink()


def link(path: Path, name: Path) -> None:
    """Give a checkpoint a second name, which stays when the first is deleted; no bytes are copied.

    On file systems without hard links it is copied.
    """
    temp = name.with_name(name.name + ".tmp")
    temp.unlink(missing_ok=True)
    try:
        os.link(path, temp)
    except OSError:
        shutil.copyfile(path, temp)
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
    os.replace(temp, name)
    temp.unlink(missing_ok=True)  # renaming onto another name of the same file does nothing
    sync_folder(name.parent)


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
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError, OSError) as e:
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint ({e})") from e
    if bad:
        raise ValueError(f"{path} is damaged: the checksum of {bad} is wrong")


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or holds anything
    but tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    check(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as e:
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values and was not read; "
            f"loading it could run code that it contains ({str(e).splitlines()[0]})"
        ) from e
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    if "model" not in state:
        keys = ", ".join(map(str, list(state)[:3]))
        raise ValueError(
            f"{path} has no 'model' (its keys are {keys}, ...); a bare state dict does not tell "
            "the model's sizes"
        )
    return state


def steps_saved(out_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints ckpt_<step>.pt in a folder, newest first."""
    found = []
    for path in out_dir.glob("ckpt_*.pt"):
        if match := re.fullmatch(r"ckpt_(\d+)\.pt", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def load_newest(out_dir: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest good checkpoint of a run: its path, its contents, and what was wrong with newer.

    Raises FileNotFoundError when there is none, ValueError when all are bad.
    """
    paths = [path for _, path in steps_saved(out_dir)]
    paths += [p for p in (out_dir / "best.pt", out_dir / "ckpt.pt") if p.exists()]
    if not paths:
        raise FileNotFoundError(
            f"no checkpoint in {out_dir}; train one first (python train.py ... "
            f"--out_dir={out_dir}) or give another --out_dir"
        )
    problems: list[str] = []
    for path in paths:
        try:
            return path, load(path), problems
        except ValueError as e:
            problems.append(str(e))
    raise ValueError("no good checkpoint: " + "; ".join(problems))


def clean_state_dict(state_dict: dict[str, Tensor], tied: bool = True) -> dict[str, Tensor]:
    """Our key names for a state dict saved by EasyGPT, through torch.compile, DDP or both.

    tied: whether the model's head is its embedding. Raises ValueError when the two then differ.
    """
    clean = {}
    for key, value in state_dict.items():
        while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
            key = key[len(prefix) :]
        for old, new in RENAMED_KEYS.items():
            key = key.replace(old, new)
        if not key.endswith("rotary_emb.inv_freq"):
            clean[key] = value
    if tied and "embed_tokens.weight" in clean:
        table = clean["embed_tokens.weight"]
        if not torch.equal(clean.setdefault("lm_head.weight", table), table):
            raise ValueError("its lm_head and embed_tokens differ (tie_word_embeddings=False?)")
    return clean


def model_config(state: dict[str, Any], path: Path) -> GPTConfig:
    """The sizes of the model in a checkpoint.

    Raises ValueError naming the fields that are missing or that this model does not have.
    """
    given: dict[str, Any] = state.get("model_args") or {}
    args = {RENAMED_ARGS.get(k, k): v for k, v in given.items()}
    if not args:
        raise ValueError(f"{path} has no 'model_args': it does not tell the model's sizes")
    if args.pop("bias", False):  # EasyGPT's name for both
        args |= {"attention_bias": True, "mlp_bias": True}
    fields = {f.name: f for f in dataclasses.fields(GPTConfig)}
    needed = {"vocab_size", "hidden_size", "num_hidden_layers"}
    problems = {"it lacks": sorted(needed - set(args)), "it has": sorted(set(args) - set(fields))}
    if any(problems.values()):
        raise ValueError(f"{path} is of another kind of model: {listing(problems)}")
    return GPTConfig(**args)


def listing(problems: dict[str, list[str]]) -> str:
    """Several lists of names as one readable line, long ones shortened."""
    parts = []
    for words, names in problems.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            parts.append(f"{words} {', '.join(names[:4])}{more}")
    return "; ".join(parts)


def load_weights(model: GPT, state: dict[str, Any], path: Path) -> None:
    """Copy a checkpoint's weights into the model.

    Raises ValueError listing every key that is missing, left over or of another shape.
    """
    try:
        given = clean_state_dict(state["model"], model.config.tie_word_embeddings)
    except ValueError as e:
        raise ValueError(f"{path} does not fit the model: {e}") from e
    wanted = model.state_dict()
    shapes = {k: (tuple(given[k].shape), tuple(wanted[k].shape)) for k in wanted if k in given}
    problems = {
        "it lacks": [k for k in wanted if k not in given],
        "it also has": [k for k in given if k not in wanted],
        "other shapes:": [f"{k} is {a}, not {b}" for k, (a, b) in shapes.items() if a != b],
    }
    if any(problems.values()):
        raise ValueError(f"{path} does not fit the model: {listing(problems)}")
    model.load_state_dict(given)


def load_model(path: Path, state: dict[str, Any]) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError as above."""
    model = GPT(model_config(state, path))
    load_weights(model, state, path)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError(f"{path} has NaN or infinite weights: that run went wrong")
    return model.eval()
