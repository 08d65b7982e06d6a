"""Checkpoints: written whole or not at all, checked before they are believed, read without pickle.

A checkpoint is one torch.save file of tensors and plain values, or a folder with the same contents
in parts (sharded.py). Its keys `model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss` and
`config` mean what they mean in nanoGPT's and EasyGPT's files; `tokenizer` and `train_state` are
ours.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig

PREFIXES = ("_orig_mod.", "module.", "model.")  # of torch.compile, DDP and Hugging Face
RENAMED_KEYS = {"post_attetion_layernorm": "post_attention_layernorm"}  # EasyGPT's files
RENAMED_ARGS = {"norm_eps": "rms_norm_eps"}
SHARDS = ".shards"  # of a folder that holds a checkpoint in parts
KINDS = (".pt", SHARDS)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one.

    Raises OSError when it cannot be written and ValueError when a weight is NaN or infinite; `path`
    is then untouched.
    """
    if not all(map(finite, state["model"].values())):
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


def finite(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU has neither NaN nor infinities.

    By numpy where it can: torch would start as many threads as training has, and the two would
    wait for each other.
    """
    if tensor.dtype == torch.float32:
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(tensor.isfinite().all())


def step_aside() -> None:
    """Let this thread run when the others leave a core idle; where threads have priorities."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where the system and its disk can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network disks cannot
            os.fsync(handle)
        os.close(handle)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list | tuple)
    return [t for part in inner for t in tensors_in(part)] if nested else []


class Packed:
    """A copy of nested dicts and lists on the CPU, its tensors in one piece of memory per type.

    torch.save writes a record per piece, not per tensor: for a small model that is most of its
    time. The pieces are used again by the next copy: new memory takes longer than the copying.

    Sharded tensors are made whole, one at a time, in which all their ranks take part.
    """

    def __init__(self) -> None:
        self.pieces: dict[torch.dtype, Tensor] = {}

    def copy(self, value: Any) -> Any:
        """`value` with its tensors copied; the last copy is written over. Tied ones stay tied."""
        unique = {identity(t): t for t in tensors_in(value)}
        needed: dict[torch.dtype, int] = {}
        for tensor in unique.values():
            needed[tensor.dtype] = needed.get(tensor.dtype, 0) + room_for(tensor)
        for dtype, length in needed.items():
            if dtype not in self.pieces or len(self.pieces[dtype]) != length:
                self.pieces[dtype] = torch.zeros(length, dtype=dtype)
        copies, used = {}, dict.fromkeys(needed, 0)
        for key, tensor in unique.items():
            at = used[tensor.dtype]
            copies[key] = self.pieces[tensor.dtype][at : at + tensor.numel()].view(tensor.shape)
            copies[key].copy_(whole(tensor))
            used[tensor.dtype] += room_for(tensor)

        def replaced(part: Any) -> Any:
            if isinstance(part, Tensor):
                return copies[identity(part)]
            if isinstance(part, dict):
                return {k: replaced(v) for k, v in part.items()}
            return type(part)(map(replaced, part)) if isinstance(part, list | tuple) else part

        return replaced(value)


def take_part(value: Any) -> None:
    """What a rank does for another one's `Packed.copy` of the same value."""
    for tensor in {identity(t): t for t in tensors_in(value)}.values():
        whole(tensor)


def whole(tensor: Any) -> Tensor:
    """A tensor without its shards: a collective call when it has some, as FSDP's have."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return full


def identity(tensor: Any) -> tuple[Any, ...]:
    """Equal for two tensors that are one, as a tied head and its embedding are.

    All ranks of sharded tensors must find the same ones equal, though a rank's shard may be empty.
    A weight's is padded in memory, so that it has an address; an optimizer state is never tied.
    """
    address = tensor.data_ptr()
    if hasattr(tensor, "full_tensor"):
        address = tensor.to_local().untyped_storage().data_ptr() or id(tensor)
    return address, tensor.shape, tensor.stride(), tensor.dtype


def room_for(tensor: Tensor) -> int:
    """Elements to keep for a tensor, so that the next one begins at a multiple of 64 bytes."""
    return -(-tensor.nbytes // 64) * 64 // tensor.element_size()


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, and deletes the old ones.

    The newest `keep_last` stay, those at multiples of `milestone_interval` (0: none), and best.pt.
    A write that fails leaves what was there. `problem` says why the last ckpt_<step>.pt failed, ""
    when it did not; `best_failed` is the same for best.pt; `unsaid` holds all failures until the
    caller takes them out to tell the user. With writes=False nothing is written: a process that is
    not the first of its run only takes part in collecting the state. shards, a sharded.Writer,
    has every process write its part: ckpt_<step>.shards and best.shards.
    """

    def __init__(
        self,
        out_dir: Path,
        keep_last: int,
        milestone_interval: int = 0,
        writes: bool = True,
        shards: Any = None,
    ) -> None:
        self.out_dir, self.keep_last, self.milestone = out_dir, keep_last, milestone_interval
        self.writes, self.shards = writes, shards
        self.suffix = SHARDS if shards else ".pt"
        self.thread = ThreadPoolExecutor(1, "checkpoint", initializer=step_aside)
        self.job: Future[None] | None = None
        self.packed: dict[str, Packed] = {}  # copies of the last state's parts
        self.problem = self.best_failed = ""
        self.unsaid: list[str] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state to the CPU now and write ckpt_<step>.pt soon."""
        self.submit(state, self.write, step)

    def save_best(self, state: dict[str, Any]) -> None:
        """The same for best.pt, a file of its own: one bad disk block cannot spoil two."""
        self.submit(state, self.write_best)

    def submit(self, state: dict[str, Any], write: Callable[..., None], *args: int) -> None:
        self.wait()
        if self.shards:
            self.job = self.thread.submit(write, *args, self.shards.copy(state))
        elif self.writes:
            self.job = self.thread.submit(write, *args, self.copy(state))
        else:
            for part in state.values():
                take_part(part)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Each part in memory of its own: who loads the file and drops one part gets its room."""
        return {k: self.packed.setdefault(k, Packed()).copy(v) for k, v in state.items()}

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self.job is not None:
            self.job.result()
            self.job = None

    def write_best(self, state: Any) -> None:
        self.best_failed = self.try_to_write(f"best{self.suffix}", state)
        if self.writes and not self.best_failed:  # one of the other kind is an older one
            for other in {*KINDS} - {self.suffix}:
                with contextlib.suppress(OSError):
                    remove(self.out_dir / f"best{other}")

    def write(self, step: int, state: Any) -> None:
        self.problem = self.try_to_write(f"ckpt_{step}{self.suffix}", state)
        if self.writes and not self.problem:
            for old, path in steps_saved(self.out_dir)[self.keep_last :]:
                if not self.milestone or old % self.milestone or old == 0:
                    with contextlib.suppress(OSError):  # open in another program; next time then
                        remove(path)

    def try_to_write(self, name: str, state: Any) -> str:
        try:
            (self.shards.save if self.shards else save)(self.out_dir / name, state)
        except (OSError, ValueError) as e:
            self.unsaid.append(str(e))
            return str(e)
        return ""


def check_disk(out_dir: Path, size: int, count: int, log: int) -> None:
    """Raises ValueError when the disk has no room for `count` files of `size` and `log` more bytes.

    The checkpoints that are there count as free: the run will replace them, or has counted them.
    """
    needed = size * count + log
    files = [f for p in checkpoints(out_dir) for f in (p.iterdir() if p.is_dir() else [p])]
    there = {(s.st_dev, s.st_ino): s.st_size for s in (f.stat() for f in files)}
    free = shutil.disk_usage(out_dir).free + sum(there.values())
    if free < needed:
        raise ValueError(
            f"{out_dir} has {free / 1e9:.3f} GB free, but the run needs {needed / 1e9:.3f} GB for "
            f"{count} checkpoints (the last, the milestones, the best, one being written); make "
            "room, choose another --out_dir, --keep_last=1 or fewer milestones"
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
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError, OSError) as e:
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint ({e})") from e
    if bad:
        raise ValueError(f"{path} is damaged: the checksum of {bad} is wrong")


def load(path: Path, whole: bool = True) -> dict[str, Any]:
    """A checkpoint's contents, tensors on the CPU.

    whole=False leaves the tensors of a folder of shards where they are, for `sharded.read_into`.
    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or holds anything
    but tensors and plain values.
    """
    if path.suffix == SHARDS and path.is_dir():
        import sharded  # few need it, and it takes a second

        return (sharded.read if whole else sharded.check)(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    check(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a hostile pickle can fail in any way
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values and was not read; "
            f"loading it could run code that it contains ({reason(e)})"
        ) from e
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    if "model" not in state:
        keys = ", ".join(map(str, list(state)[:3]))
        raise ValueError(
            f"{path} has no 'model' (its keys are {keys}, ...); a bare state dict does not tell "
            "the model's sizes"
        )
    if not isinstance(state["model"], dict) or not isinstance(state.get("model_args", {}), dict):
        raise ValueError(f"{path} is not a checkpoint: its 'model' or 'model_args' is no dict")
    return state


def reason(e: BaseException) -> str:
    """What an error says, in one line."""
    return (str(e) or type(e).__name__).splitlines()[0]


def checkpoints(out_dir: Path) -> list[Path]:
    """Every checkpoint of a run in a folder."""
    best = (out_dir / f"best{suffix}" for suffix in KINDS)
    return [path for _, path in steps_saved(out_dir)] + [path for path in best if path.exists()]


def holds_run(out_dir: Path) -> bool:
    """Whether a folder has a checkpoint, by whatever name."""
    return any(any(out_dir.glob(f"*{suffix}")) for suffix in KINDS)


def remove(path: Path) -> None:
    """Delete a checkpoint, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(out_dir: Path) -> None:
    """Finish or remove what a process that was killed while it wrote has left in a folder."""
    for suffix in KINDS:
        for temp in out_dir.glob(f"*{suffix}.tmp"):
            remove(temp)
    for old in out_dir.glob(f"*{SHARDS}.old"):  # its successor was to take its place
        if old.with_suffix("").exists():
            remove(old)
        else:
            os.replace(old, old.with_suffix(""))


def steps_saved(out_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints ckpt_<step> in a folder, newest first."""
    found = []
    for path in out_dir.glob("ckpt_*"):
        if match := re.fullmatch(r"ckpt_(\d+)\.(pt|shards)", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def load_newest(out_dir: Path, whole: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest good checkpoint of a run: its path, its contents, and what was wrong with newer.

    whole is `load`'s. Raises FileNotFoundError when there is none, ValueError when all are bad.
    """
    nanogpts = out_dir / "ckpt.pt"
    paths = checkpoints(out_dir) + [nanogpts] * nanogpts.exists()
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
        head = clean.setdefault("lm_head.weight", table)
        # one memory is one tensor; NaN equals nothing, itself included
        if head.data_ptr() != table.data_ptr() and not torch.equal(head, table):
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


class SkipInit(TorchFunctionMode):
    """Inside it torch.nn.init does nothing: for models whose weights are loaded right after.

    Random numbers for 303M parameters take seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build(size: GPTConfig, state: dict[str, Any], path: Path) -> GPT:
    """A model of this size with a checkpoint's weights, on the CPU. Raises as load_weights does."""
    with SkipInit():
        model = GPT(size)
    load_weights(model, state, path)
    return model


def check_same_model(saved: GPTConfig, size: GPTConfig, path: Path) -> None:
    """Raises ValueError listing the model settings that differ from the checkpoint's."""
    differ = [
        f"{f.name} is {getattr(size, f.name)}, there {getattr(saved, f.name)}"
        for f in dataclasses.fields(GPTConfig)
        if f.name != "dropout" and getattr(size, f.name) != getattr(saved, f.name)
    ]
    if differ:
        raise ValueError(
            f"{path} is of another model, so it cannot be resumed: {'; '.join(differ)}"
        )


def load_model(path: Path, state: dict[str, Any]) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError as above."""
    model = build(model_config(state, path), state, path)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError(f"{path} has NaN or infinite weights: that run went wrong")
    return model.eval()
