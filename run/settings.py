"""Whether settings make sense, above all those of a training run: all problems at once."""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from formats.listing import KINDS
from text.files import path_of
from text.tokens import dataset_folder

MOST = {
    "num_hidden_layers": 1000,  # beyond, it would take hours to find that none fit
    "decay_share": 1,
}
CHOICES = {  # setting -> what it may be
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("cosine", "wsd"),
    "parallel": ("ddp", "fsdp", "hsdp"),
    "matmul_dtype": ("auto", "int8"),
}
LEAST = {  # setting -> smallest value
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 1),
    "max_position_embeddings": 1,
    "vocab_size": 0,
    "seed": 0,
    "tokens_per_step": 1,
    "batch_size": 0,
    "max_iters": 0,
    "warmup_iters": 0,
    "decay_share": 0,
    "lr_decay_iters": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "max_skipped": 1,
    "skip_spike": 0,
    "eval_interval": 1,
    "eval_windows": 1,
    "eval_iters": 0,
    "log_interval": 1,
    "checkpoint_interval": 0,
    "milestone_interval": 0,
    "keep_last": 1,
    "time_limit": 0,
    "watchdog_minutes": 0,
    "world_size": 1,
}
# Settings that decide what a run learns; a resumed run warns when one has changed.
DECIDE = (
    *("tokens_per_step", "seed", "max_iters", "dropout", "dtype", "matmul_dtype", "skip_spike"),
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr"),
    *("optimizer", "muon_lr", "lr_schedule", "decay_share"),
    *("weight_decay", "beta1", "beta2", "grad_clip", "deterministic"),
)


def check(settings: Mapping[str, Any]) -> None:
    """Raises ValueError that lists every setting out of range and every pair that does not fit."""
    s = settings
    problems = too_small(s, LEAST)
    problems += [
        f"{n} must be at most {high}, not {s[n]}" for n, high in MOST.items() if s[n] > high
    ]
    for name in ("beta1", "beta2"):
        if not 0 <= s[name] < 1:
            problems.append(f"{name} must be at least 0 and below 1, not {s[name]}")
    if not sys.float_info.min <= s["learning_rate"] < math.inf:  # what is smaller has lost digits
        problems.append(f"learning_rate must be at least 2.3e-308, not {s['learning_rate']}")
    if not 0 <= s["muon_lr"] < math.inf:
        problems.append(f"muon_lr must be positive, or 0 for learning_rate, not {s['muon_lr']}")
    if not s["weight_decay"] < math.inf:
        problems.append(f"weight_decay must be finite, not {s['weight_decay']}")
    if s["decay_lr"] and s["min_lr"] > s["learning_rate"]:
        problems.append(f"min_lr ({s['min_lr']}) is above learning_rate ({s['learning_rate']})")
    if s["compile"].lower() not in ("auto", "true", "false"):
        problems.append(f"compile must be auto, True or False, not {s['compile']!r}")
    for name, known in CHOICES.items():
        if s[name] not in known:
            words = f"{', '.join(known[:-1])} or {known[-1]}"
            problems.append(f"{name} must be {words}, not {s[name]!r}")
    if s["eval_iters"] and not s["batch_size"]:
        problems.append(f"eval_iters={s['eval_iters']} needs a batch_size, or take eval_windows")
    if s["sharded_checkpoints"] and s["parallel"] == "ddp":
        problems.append("sharded_checkpoints needs parallel fsdp or hsdp")
    if not s["checkpoint_minutes"] > 0:
        problems.append(f"checkpoint_minutes must be positive, not {s['checkpoint_minutes']}")
    problems += [f"{name} is empty" for name in ("out_dir", "init_from", "dataset") if not s[name]]
    if problems:
        raise ValueError("settings: " + "; ".join(problems))


def check_folder(dataset: str) -> Path:
    """The folder of a dataset, there or not. Raises ValueError for a file."""
    folder = dataset_folder(dataset)
    if folder.is_file():
        raise ValueError(
            f"dataset={dataset} is a file; its folder is --dataset={folder.parent}{os.sep}"
        )
    return folder


def too_small(settings: Mapping[str, Any], least: Mapping[str, float]) -> list[str]:
    """A line for each setting that is below its least value."""
    return [
        f"{name} must be at least {low}, not {settings[name]}"
        for name, low in least.items()
        if not settings[name] >= low
    ]


def at_least(settings: Mapping[str, Any], **least: float) -> None:
    """Raises ValueError that names each setting below its least value."""
    if problems := too_small(settings, least):
        raise ValueError("; ".join(problems))


def idle(settings: Mapping[str, Any], in_team: bool) -> Iterator[tuple[str, list[str]]]:
    """The settings that change nothing in a run of these, for configurator.refuse, and why.

    A plan takes the command line of the run that it is for, wherever that is to run.
    """
    s, runs = settings, not settings["dry_run"]
    if not s["decay_lr"]:
        names = ["min_lr", "warmup_iters", "lr_schedule", "lr_decay_iters", "decay_share"]
        yield "with decay_lr=False, which keeps the peak", names
    elif s["lr_schedule"] == "cosine":
        yield "with lr_schedule=cosine, which falls from the warm-up on", ["decay_share"]
    if s["optimizer"] == "adamw":
        yield "with optimizer=adamw", ["muon_lr"]
    if s["eval_iters"]:
        yield f"with eval_iters={s['eval_iters']}, which counts in batches", ["eval_windows"]
    if not s["wandb_log"]:
        yield "without --wandb_log=True", ["wandb_project", "wandb_run_name"]
    if s["overwrite"] and s["init_from"] in ("resume", "auto"):
        yield f"with init_from={s['init_from']}, which goes on with a run", ["overwrite"]
    if runs:
        yield "without --dry_run=True", ["world_size"]
    if runs and not in_team:
        yield "in one process; start it by torchrun", ["parallel", "sharded_checkpoints"]


def check_model(init_from: str, out_dir: str) -> None:
    """Raises ValueError where no trained model is named, or out_dir is not a run's folder."""
    if init_from in ("", "scratch", "auto"):
        raise ValueError(
            f"init_from={init_from!r} is no trained model; write resume, the PATH of a .pt, "
            "hf:FOLDER or hf:USER/NAME"
        )
    if init_from == "resume":
        run_folder(out_dir)


def run_folder(out_dir: str) -> Path:
    """The folder of a run, there or not. Raises ValueError for what cannot be one."""
    path = path_of(out_dir)
    if path.suffix in KINDS and path.exists():
        raise ValueError(
            f"out_dir={out_dir} is a checkpoint, not the folder of a run; write "
            f"--out_dir={path.parent}, or --init_from={path} for this one"
        )
    check_way(f"out_dir={out_dir}", path)
    return path


def check_way(what: str, folder: Path) -> None:
    """Raises ValueError when there can be no such folder, since the path leads to a file."""
    if files := [p for p in (folder, *folder.parents) if p.is_file()]:
        raise ValueError(f"{what}: {files[0]} is a file, not a folder; choose another")


def eval_windows(settings: Mapping[str, Any]) -> int:
    """Windows of an evaluation; nanoGPT's eval_iters, where it is set, counts batches of them.

    A checkpoint of before has no eval_windows among its settings.
    """
    iters, windows = settings["eval_iters"], settings.get("eval_windows", 0)
    return int(iters * settings["batch_size"] if iters else windows)


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes a resumed run another one than the checkpoint's, for the user to read.

    Both have the keys config (the settings), data and dtype, as a checkpoint has them.
    """
    before = {"matmul_dtype": "auto"} | saved["config"]  # an older checkpoint has none
    found = [
        f"{k} {v!r} -> {now['config'][k]!r}"
        for k, v in before.items()
        if k in DECIDE and now["config"][k] != v
    ]
    had, has = eval_windows(saved["config"]), eval_windows(now["config"])
    if had != has:
        found.append(f"windows of an evaluation {had} -> {has}")
    was, comes = (dataset_folder(str(s["config"].get("dataset"))).name for s in (saved, now))
    if was != comes:  # however it is spelt
        found.append(f"dataset {was!r} -> {comes!r}")
    if saved["data"] != now["data"]:
        found.append("the dataset's contents")
    if now["config"]["dropout"] and saved["config"]["batch_size"] != now["config"]["batch_size"]:
        found.append("the masks of dropout, since batch_size is another")
    if saved["dtype"] != now["dtype"]:
        found.append(f"dtype in use {saved['dtype']} -> {now['dtype']}")
    return found
