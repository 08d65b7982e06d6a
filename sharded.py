"""Checkpoints that every rank writes its part of: for models that no machine can hold whole.

One is a folder, ckpt_<step>.shards: safetensors files, which torch.distributed.checkpoint writes
and reads on any number of ranks, and rest.json with all that is no tensor and with the size and
CRC-32 of each file. A folder without rest.json is not finished. DCP's own format has a pickle.

In the files a weight is called model.NAME, and a state of the optimizer's I-th parameter
optimizer.I.NAME. Tied weights are there once.
"""

import json
import os
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

REST = "rest.json"
HEAD = "model.lm_head.weight"
PIECE = 1 << 24  # bytes of a file read at a time

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
        cuda = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(cuda, False, False, cuda))

    def copy(self, state: dict[str, Any]) -> Copied:
        """This rank's tensors on the CPU, written over those of the last copy, and the rest."""
        optimizer = {k: v for k, v in state["optimizer"].items() if k != "state"}
        copied: Any = self.stager.stage(tensors_of(state))
        return copied, state | {"model": {}, "optimizer": optimizer}

    def save(self, path: Path, copied: Copied) -> None:
        """Write a copy to the folder `path`, which a crash leaves as it was, or complete.

        Raises OSError on all ranks when one of them fails; `path` is then as it was.
        """
        tensors, rest = copied
        temp = path.with_name(path.name + ".tmp")
        problem = ""
        if not all(local(t).isfinite().all() for k, t in tensors.items() if k.startswith("model.")):
            problem = "weights are NaN or infinite"
        if self.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)  # of a process that was killed
        files: dict[str, tuple[int, int]] = {}
        if not any(self.all(problem)):
            try:
                writer = HuggingFaceStorageWriter(str(temp), save_distributed=True)
                save(tensors, storage_writer=writer, process_group=self.group)
                files = self.written(temp, tensors)
            except (CheckpointException, OSError, RuntimeError, ValueError) as e:
                problem = reason(e)
        found = self.all((problem, files))
        if self.rank == 0 and not any(why for why, _ in found):
            rest = rest | {"files": {k: v for _, mine in found for k, v in mine.items()}}
            try:
                put(path, temp, rest)
            except OSError as e:
                problem = str(e)
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
        """Size and CRC-32 of the files of this rank, once they are found to hold its tensors."""
        paths = list(folder.glob(f"shard-{self.rank + 1:05}-*.safetensors"))
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):
                    if not torch.equal(file.get_tensor(name), local(tensors[name])):
                        raise OSError(f"{path} does not hold what was written to it")
        return {path.name: (path.stat().st_size, crc(path)) for path in paths}


def reason(e: BaseException) -> str:
    """An error in one line; of those that ranks have had in DCP, one."""
    if isinstance(e, CheckpointException):
        e = next(iter(e.failures.values()))[0]
    return (str(e) or type(e).__name__).splitlines()[0]


def crc(path: Path) -> int:
    """CRC-32 of a file's contents."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def put(path: Path, temp: Path, rest: dict[str, Any]) -> None:
    """Make the folder temp complete and call it `path`, in place of what has that name."""
    with open(temp / REST, "x", encoding="utf-8") as file:
        json.dump(rest, file)
        file.flush()
        os.fsync(file.fileno())
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)  # a folder cannot take the place of another in one step
    os.replace(temp, path)
    shutil.rmtree(old, ignore_errors=True)


def check(folder: Path) -> dict[str, Any]:
    """What rest.json holds. Raises ValueError when a file is not there, not whole or not intact."""
    try:
        rest = json.loads((folder / REST).read_text(encoding="utf-8"))
        files = {str(k): (int(size), int(crc)) for k, (size, crc) in rest.pop("files").items()}
        if not all(isinstance(rest[k], dict) for k in ("model_args", "optimizer")):
            raise ValueError("model_args or optimizer is no object")
        rest["model"], rest["optimizer"]["state"] = {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder} is not a finished checkpoint ({reason(e)})") from e
    there = {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
    if there != {name: size for name, (size, _) in files.items()}:
        odd = sorted(set(there) ^ set(files)) or [k for k in files if there[k] != files[k][0]]
        raise ValueError(f"{folder} is damaged: {odd[0]} is missing, too many or of another size")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for name, found in zip(files, threads.map(lambda k: crc(folder / k), files), strict=True):
            if found != files[name][1]:
                raise ValueError(f"{folder} is damaged: the checksum of {name} is wrong")
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
        raise ValueError(f"{folder} was not read ({reason(e)})") from e
    return state


def read_into(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, rest: dict[str, Any]
) -> None:
    """Fill each rank's part of a sharded model, and of its optimizer, from a checkpoint.

    rest is what `check` has returned. Raises ValueError for one of another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    known = contents(reader)
    states: dict[int, dict[str, Tensor]] = {}
    if optimizer:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for name, one in known.items():
            kind, i, key = (*name.split(".", 2), "")[:3]
            if kind == "optimizer":
                p = params[int(i)]
                like = p if one.size == p.shape else torch.zeros(one.size)
                states.setdefault(int(i), {})[key] = torch.zeros_like(like, requires_grad=False)
    wanted = tensors_of(
        {
            "model": model.state_dict(),
            "optimizer": {"state": states},
            "model_args": rest["model_args"],
        }
    )
    odd = [k for k, t in wanted.items() if k not in known or known[k].size != t.shape]
    if odd:
        raise ValueError(
            f"{folder} does not fit the model: {odd[0]} is missing or of another shape"
        )
    try:
        load(wanted, storage_reader=reader)
    except CheckpointException as e:
        raise OSError(f"{folder} could not be read ({reason(e)})") from e
    if optimizer:
        groups = rest["optimizer"]["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
