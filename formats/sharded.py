"""Checkpoints that every rank writes its part of: when no machine can hold a whole one.

One is a folder, ckpt_<step>.shards: safetensors files, which torch.distributed.checkpoint writes
and reads on any number of ranks, and rest.json with all that is no tensor and with the size and
CRC-32 of each file. A folder without rest.json is not finished. DCP's own format has a pickle.

In the files a weight is called model.NAME, and a state of the optimizer's I-th parameter
optimizer.I.NAME. Tied weights are there once.
"""

import json
import os
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from formats.pack import finite
from text.files import reason, sync_folder

REST = "rest.json"
HEAD = "model.lm_head.weight"
PIECE = 1 << 24  # bytes of a file read at a time
FILE = 1 << 29  # bytes of a file after which the next one begins: it is built in memory

Copied = tuple[dict[str, Tensor], dict[str, Any]]


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `model` and `optimizer` by their names in the files."""
    found = {f"model.{name}": t for name, t in state["model"].items()}
    if state["model_args"]["tie_word_embeddings"]:
        found.pop(HEAD, None)
    for i, states in state["optimizer"]["state"].items():
        found |= {f"optimizer.{i}.{name}": t for name, t in states.items()}
    return found


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class Writer:
    """Copies a state to the CPU and writes the copy; all ranks call its methods in one order."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        # of its own, since a thread uses it while training exchanges numbers
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self.stager: StateDictStager | None = None

    def copy(self, state: dict[str, Any]) -> Copied:
        """This rank's tensors on the CPU, written over those of the last copy, and the rest."""
        optimizer = {k: v for k, v in state["optimizer"].items() if k != "state"}
        tensors = tensors_of(state)
        on_gpu = local(next(iter(tensors.values()))).is_cuda
        # not DefaultStager, which in torch 2.11 can be used once
        self.stager = self.stager or StateDictStager(pin_memory=on_gpu)
        copied: Any = self.stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return copied, state | {"model": {}, "optimizer": optimizer}

    def save(self, path: Path, copied: Copied) -> None:
        """Write a copy to the folder `path`, which a crash leaves as it was, or complete.

        Raises OSError on all ranks when one of them fails; `path` is then as it was.
        """
        tensors, rest = copied
        temp = path.with_name(path.name + ".tmp")
        problem = ""
        if not all(finite(local(t)) for k, t in tensors.items() if k.startswith("model.")):
            problem = "weights are NaN or infinite"
        if self.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)  # of a process that was killed
        files: dict[str, tuple[int, int]] = {}
        if not any(self.all(problem)):
            try:
                writer = HuggingFaceStorageWriter(str(temp), numbers(tensors), 1, True)
                # all is on the CPU; to copy ahead from a GPU it would open the first one
                writer.per_thread_copy_ahead = 0
                save(tensors, storage_writer=writer, process_group=self.group)
                files = self.written(temp, tensors)
            except (Exception, CheckpointException) as e:
                problem = failure(e)
        found = self.all((problem, files))
        if self.rank == 0 and not any(why for why, _ in found):
            rest = rest | {"files": {k: v for _, mine in found for k, v in mine.items()}}
            try:
                put(path, temp, rest)
            except Exception as e:
                problem = failure(e)
        if problem := next(filter(None, self.all(problem)), ""):
            if self.rank == 0:
                shutil.rmtree(temp, ignore_errors=True)
            raise OSError(f"could not write {path}: {problem}")

    def all(self, value: Any) -> list[Any]:
        """A value of every rank, on every rank; all wait for each other."""
        found = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, value, group=self.group)
        return found

    def written(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Size and CRC-32 of this rank's files, once they hold its tensors, bit for bit."""
        paths = list(folder.glob(f"shard-{self.rank + 1:05}-*.safetensors"))
        for path in paths:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            with safe_open(path, "pt") as there:
                for name in list(there.keys()):
                    if not np.array_equal(bits(there.get_tensor(name)), bits(tensors[name])):
                        raise OSError(f"{path} does not hold what was written to it")
        return {path.name: (path.stat().st_size, crc(path)) for path in paths}


def numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """For each tensor the number of its file, from 1."""
    found, used = {}, 0
    for name, tensor in tensors.items():
        found[name] = 1 + used // FILE
        used += local(tensor).nbytes
    return found


def bits(tensor: Any) -> Any:
    """The bytes of this rank's part, as a NumPy array: torch's threads are training's."""
    return local(tensor).contiguous().reshape(-1).view(torch.uint8).numpy()


def failure(e: BaseException) -> str:
    """An error in one line; of those that ranks have had in DCP, one."""
    if isinstance(e, CheckpointException):
        e = next(iter(e.failures.values()))[0]
    return reason(e)


def crc(path: Path) -> int:
    """CRC-32 of a file's contents."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def put(path: Path, temp: Path, rest: dict[str, Any]) -> None:
    """Make the folder temp complete and call it `path`, in place of what has that name.

    Raises OSError when a rank's file is not here, or a name cannot be changed.
    """
    wanted = {name: size for name, (size, _) in rest["files"].items()}
    for wait_s in (0.1, 1, 5, 0):  # other machines' files may take a moment to be seen
        if sizes(temp) == wanted:
            break
        time.sleep(wait_s)
    else:
        raise OSError(f"{temp} has not the files of all ranks; do all see the same file system?")
    with open(temp / REST, "x", encoding="utf-8") as file:
        json.dump(rest, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temp)
    old = path.with_name(path.name + ".old")
    if path.exists():  # a folder cannot take the place of another in one step
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(temp, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file with tensors."""
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def check(folder: Path) -> dict[str, Any]:
    """What rest.json holds. Raises ValueError when a file is not there, not whole or not intact."""
    try:
        rest = json.loads((folder / REST).read_text(encoding="utf-8"))
        files = {str(k): (int(size), int(crc)) for k, (size, crc) in rest.pop("files").items()}
        if not all(isinstance(rest[k], dict) for k in ("model_args", "optimizer")):
            raise ValueError("model_args or optimizer is no object")
        rest["model"], rest["optimizer"]["state"] = {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{folder} is not a finished checkpoint ({failure(e)})") from e
    try:
        there = sizes(folder)
        if there != {name: size for name, (size, _) in files.items()}:
            odd = sorted(set(there) ^ set(files)) or [k for k in files if there[k] != files[k][0]]
            raise ValueError(f"{odd[0]} is missing, too many or of another size")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            sums = dict(zip(files, threads.map(lambda k: crc(folder / k), files), strict=True))
        if bad := next((k for k, found in sums.items() if found != files[k][1]), ""):
            raise ValueError(f"the checksum of {bad} is wrong")
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} is damaged: {failure(e)}") from e
    return dict(rest)


def contents(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """What tensors a folder's files hold, and in which parts."""
    known: Any = reader.read_metadata().state_dict_metadata
    return dict(known)


def read(folder: Path) -> dict[str, Any]:
    """A whole checkpoint on the CPU of this process alone, in the form that a .pt file has.

    Raises ValueError as `check` does, and for files that are none of ours.
    """
    state = check(folder)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        tensors = {}
        for name, one in contents(reader).items():
            sizes = [chunk.sizes.numel() for chunk in one.chunks]
            if sum(sizes) != one.size.numel():  # before memory of a size that a file claims
                raise ValueError(f"parts of {name} are missing")
            tensors[name] = torch.empty(one.size, dtype=one.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process is alone
            load(tensors, storage_reader=reader, no_dist=True)
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            if kind == "model":
                state["model"][key] = tensor
            else:
                i, _, key = key.partition(".")
                state["optimizer"]["state"].setdefault(int(i), {})[key] = tensor
    except (Exception, CheckpointException) as e:  # a hostile file can fail in any way
        raise ValueError(f"{folder} was not read ({failure(e)})") from e
    return state


def read_into(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, rest: dict[str, Any]
) -> None:
    """Fill each rank's part of a sharded model, and of its optimizer, from a checkpoint.

    rest is what `check` has returned. Raises ValueError for one of another model.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        known = contents(reader)
        states = moments(known, optimizer) if optimizer else {}
        wanted = tensors_of(
            {"model": model.state_dict(), "optimizer": {"state": states}}
            | {"model_args": rest["model_args"]}
        )
        odd = [k for k, t in wanted.items() if k not in known or known[k].size != t.shape]
        if odd:
            raise ValueError(f"{odd[0]} is missing or of another shape")
        load(wanted, storage_reader=reader)
        if optimizer:
            groups = optimizer.state_dict()["param_groups"]  # today's, not those of a file
            optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (Exception, CheckpointException) as e:
        raise ValueError(f"{folder} does not fit the model or was not read: {failure(e)}") from e


def moments(
    known: dict[str, TensorStorageMetadata], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """Room for the states that a checkpoint has for an optimizer's parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, one in known.items():
        kind, i, key = (*name.split(".", 2), "")[:3]
        if kind == "optimizer":
            p = params[int(i)]
            like = p if one.size == p.shape else torch.zeros(one.size)
            states.setdefault(int(i), {})[key] = torch.zeros_like(like, requires_grad=False)
    return states
