"""Whether a training run's settings make sense, all problems at once."""

import math
from collections.abc import Mapping
from typing import Any

LEAST = {  # setting -> smallest value
    "tokens_per_step": 1,
    "batch_size": 1,
    "max_iters": 0,
    "warmup_iters": 0,
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
    *("dataset", "tokens_per_step", "seed", "max_iters", "dropout", "dtype"),
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr"),
    *("weight_decay", "beta1", "beta2", "grad_clip", "deterministic"),
)


def check(settings: Mapping[str, Any]) -> None:
    """Raises ValueError that lists every setting out of range and every pair that does not fit."""
    s = settings
    problems = [
        f"{name} must be at least {low}, not {s[name]}"
        for name, low in LEAST.items()
        if not s[name] >= low
    ]
    for name in ("beta1", "beta2"):
        if not 0 <= s[name] < 1:
            problems.append(f"{name} must be at least 0 and below 1, not {s[name]}")
    if not 0 < s["learning_rate"] < math.inf:
        problems.append(f"learning_rate must be positive, not {s['learning_rate']}")
    if s["decay_lr"] and s["min_lr"] > s["learning_rate"]:
        problems.append(f"min_lr ({s['min_lr']}) is above learning_rate ({s['learning_rate']})")
    if s["compile"].lower() not in ("auto", "true", "false"):
        problems.append(f"compile must be auto, True or False, not {s['compile']!r}")
    if s["parallel"] not in ("ddp", "fsdp", "hsdp"):
        problems.append(f"parallel must be ddp, fsdp or hsdp, not {s['parallel']!r}")
    if s["sharded_checkpoints"] and s["parallel"] == "ddp":
        problems.append("sharded_checkpoints needs parallel fsdp or hsdp")
    if not s["checkpoint_minutes"] > 0:
        problems.append(f"checkpoint_minutes must be positive, not {s['checkpoint_minutes']}")
    if not 0 <= s["seed"] < 2**63:
        problems.append(f"seed must be at least 0 and below 2**63, not {s['seed']}")
    if not s["out_dir"]:
        problems.append("out_dir is empty")
    if problems:
        raise ValueError("settings: " + "; ".join(problems))


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
    found = [
        f"{k} {v!r} -> {now['config'][k]!r}"
        for k, v in saved["config"].items()
        if k in DECIDE and now["config"][k] != v
    ]
    before, after = eval_windows(saved["config"]), eval_windows(now["config"])
    if before != after:
        found.append(f"windows of an evaluation {before} -> {after}")
    if saved["data"] != now["data"]:
        found.append("the dataset's contents")
    if saved["dtype"] != now["dtype"]:
        found.append(f"dtype in use {saved['dtype']} -> {now['dtype']}")
    return found
