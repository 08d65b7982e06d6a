"""Training by train.py's own main: its settings, what is watched in it, and what has to hold."""

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import train
from bench.commands import ROOT
from bench.gpu_probe import GIB, Figures, Setup, card_of, device_of, emit, memory_figures
from bench.gpu_report import newest, read_report
from configurator import overrides, settings_of
from model import GPTConfig
from plan import fit as plan
from plan.fit import RESERVE, as_needed, largest_batch, peak, room_of
from plan.memory import Training
from run import folder, machine, saver, stop
from run.records import read_records
from text import files
from text.tokens import read_meta

Hook = Callable[[int], None]  # told the number of an update when its gradients are there

VOCABULARY, TINY_VOCABULARY = 50257, 500
AMPLE = 22 * GIB  # free memory with which every micro-batch here fits
MARGIN_S = 20  # of a step's limit, for start and plan: training stops by itself before
REFERENCE = 2  # the step whose figures others are compared with
DEFAULTS: Figures = dict(settings_of(vars(train)))
SMALL: Figures = {
    **{"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 320, "head_dim": 64},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
    **{"batch_size": 8, "tokens_per_step": 4096},
}
TINY: Figures = {
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32},
    **{"batch_size": 4, "tokens_per_step": 256, "learning_rate": 1e-2},
}


# --- data and settings


def write_tokens(path: Path, vocabulary: int) -> None:
    """train.bin and val.bin with frequencies as in text (Zipf's), and meta.json.

    It names the byte tokenizer, which needs no files: nothing here is ever decoded.
    """
    path.mkdir(parents=True, exist_ok=True)
    share = 1 / (np.arange(vocabulary) + 2.7)
    rng, splits = np.random.default_rng(0), {}
    for split, count in (("train", 6_000_000), ("val", 200_000)):
        ids = rng.choice(vocabulary, count, p=share / share.sum())
        ids.astype("<u2").tofile(path / f"{split}.bin")
        splits[split] = {"tokens": count, "max_id": int(ids.max()), "documents": 1}
    meta = {"tokenizer": "bytes", "vocab_size": vocabulary, "dtype": "uint16", "splits": splits}
    files.write(path / "meta.json", json.dumps(meta))


def settings_for(setup: Setup, out: str, updates: int, *args: str, **more: Any) -> Figures:
    """All settings of a training run: args as typed, then what a bench needs, `more`, toy sizes."""
    place, values = Path(setup.folder), DEFAULTS | overrides(args, DEFAULTS, ROOT)
    values |= {"dataset": str(place / "data"), "out_dir": str(place / out), "overwrite": True}
    values |= {"device": setup.device, "log_interval": 1, "reference": "", "compile": "True"}
    values |= {"eval_interval": 10**6, "eval_windows": 24, "checkpoint_minutes": 1e6}
    values |= {"max_iters": updates, "warmup_iters": min(2, updates)}
    values |= {"time_limit": max(1.0, setup.seconds - MARGIN_S) / 60}
    return values | more | (TINY if setup.tiny else {})


def config_of(settings: Figures) -> GPTConfig:
    """The model's part of train.py's settings, GPT-2's vocabulary where they name none."""
    names = [f.name for f in dataclasses.fields(GPTConfig)]
    return GPTConfig(**{k: settings[k] for k in names if settings.get(k)})


# --- a run


def run_train(
    settings: Figures, hook: Hook = lambda update: None, saves: bool = False
) -> tuple[list[Figures], list[str]]:
    """Train by train.py's main: the log's records of updates, and the lines printed.

    Without `saves` no checkpoint is written: 3.6 GB each would measure the disk.
    """
    clip, count, lines = torch.nn.utils.clip_grad_norm_, itertools.count(), list[str]()

    def clipped(*args: Any, **kwargs: Any) -> Any:
        hook(next(count))
        return clip(*args, **kwargs)

    def write(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    changes: list[tuple[Any, str, Any]] = [(torch.nn.utils, "clip_grad_norm_", clipped)]
    changes += [(tqdm, "write", write), (train, "draw_run", lambda *_: "")]
    if not saves:
        changes += [(folder, "check_disk", lambda *_, **__: None)]
        changes += [(saver.Saver, name, lambda *_: None) for name in ("save", "save_best")]
    torch.compiler.reset()
    with contextlib.ExitStack() as patches:
        for change in changes:
            patches.enter_context(mock.patch.object(*change))
        vars(train).update(settings)
        try:
            train.main()
        except SystemExit as e:
            if e.code:
                raise
        finally:
            stop.watch(0)
            folder.unlock()
    return log_of(settings), lines


def log_of(settings: Figures) -> list[Figures]:
    """The records of a run's updates."""
    found = read_records(Path(settings["out_dir"]) / "metrics.jsonl")
    return [r for r in found if "loss" in r]


def loss_gap(one: Figures, other: Figures) -> float:
    """The largest difference of two runs' losses. Raises ValueError when one has fewer updates."""
    a, b = ([r["loss"] for r in log_of(s)] for s in (one, other))
    return float(max(abs(x - y) for x, y in zip(a, b, strict=True)))


# --- a config's run, measured


class Watch:
    """Counts graphs and memory anew from the second update on.

    All is compiled then, and the optimizer's moments are there.
    """

    def __init__(self, device: torch.device, hook: Hook) -> None:
        from torch._dynamo.utils import counters  # seconds, which the other steps do not have

        self.device, self.hook, self.stats = device, hook, counters["stats"]
        self.graphs, self.start = 0, Figures()

    def __call__(self, update: int) -> None:
        if update == 1:
            self.graphs = self.stats["unique_graphs"]
            self.start = memory_figures(self.device, reset=True)
        self.hook(update)

    def figures(self) -> Figures:
        """What has come since then, and the peak before."""
        recompiles = self.stats["unique_graphs"] - self.graphs
        found = {"recompiles": recompiles, "peak_of_start": self.start.get("peak")}
        return found | memory_figures(self.device)


def train_config(
    setup: Setup,
    config: str,
    updates: int,
    band: float = 0.07,
    hook: Hook = lambda update: None,
    fit: bool = True,
    **more: Any,
) -> Figures:
    """Train a config for a few updates and emit speed, losses, graphs and memory, then the plan.

    band: how far the peak may be from the plan's. fit: with a smaller micro-batch on a card that is
    too small for the config's.
    """
    device = device_of(setup)
    s = settings_for(setup, "out", updates, f"config/{config}.py", **more)
    vocabulary = read_meta(Path(s["dataset"]))["vocab_size"]
    training, windows = training_of(s, device, vocabulary)
    wanted = s["batch_size"]
    if fit and not setup.tiny:
        s["batch_size"] = batch_that_fits(training, windows, wanted, device)
    if s["batch_size"] != wanted:
        emit(f"batch_size {s['batch_size']} instead of {wanted}")
    training = as_needed(training, s["batch_size"], windows, room_of(device))
    watch = Watch(device, hook)
    records, lines = run_train(s, watch)
    if not records:
        raise ValueError("no update was finished in time")
    f: Figures = {k: s[k] for k in ("batch_size", "tokens_per_step", "compile")}
    f |= {"updates": len(records), "first_loss": records[0]["loss"]}
    f |= {"last_loss": records[-1]["loss"], "uniform_loss": math.log(vocabulary)}
    f["losses"] = [r["loss"] for r in records]
    f["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in records[len(records) // 3 :])
    f |= {"lines": lines} | watch.figures()
    facts = [f"{f['tokens_per_s']:,.0f} tokens/s"]
    facts.append(f"loss {f['first_loss']:.3f} to {f['last_loss']:.3f} in {f['updates']} updates")
    facts += [f"peak {f[k] / GIB:.2f} GiB" for k in ("peak",) if k in f]
    emit(*facts, checks=training_checks(f), **f)
    if fit:
        planned = peak(training, s["batch_size"], windows)
        emit(planned=planned, reserve=RESERVE[device.type])
        fits = not any(line.startswith("going on with") for line in lines)
        emit(checks={"fits": fits} | peak_check(f.get("peak"), planned, band))
    return f


def training_of(settings: Figures, device: torch.device, vocabulary: int) -> tuple[Training, int]:
    """What the plan has to know of a run, and the windows of an update."""
    config = dataclasses.replace(config_of(settings), vocab_size=-(-vocabulary // 64) * 64)
    where = machine.Machine(device, *machine.select_dtype(settings["dtype"], device))
    training = plan.training_of(settings, config, where, 0.0, "")  # compiled as set
    return training, settings["tokens_per_step"] // config.max_position_embeddings


def batch_that_fits(training: Training, windows: int, wanted: int, device: torch.device) -> int:
    """`wanted`, or on a small card as many windows at once as the plan gives it."""
    room = room_of(device) or math.inf
    return largest_batch(training.leanest, windows, room, wanted) if room < AMPLE else wanted


# --- what has to hold


def training_checks(f: Figures) -> dict[str, bool]:
    """What has to hold for every training run."""
    compiles = any(line.startswith("compile  took") for line in f["lines"])
    uniform = f"first loss about {f['uniform_loss']:.1f}"
    checks = {uniform: abs(f["first_loss"] - f["uniform_loss"]) < 0.5}
    if f["updates"] >= 9:
        checks["falling"] = f["last_loss"] < f["first_loss"]
    if f["compile"] == "True":
        checks |= {"torch.compile works": compiles, "no recompile": not f["recompiles"]}
    return checks


def peak_check(peak: int | None, planned: float, band: float) -> dict[str, bool]:
    """Whether the peak is what was planned, but for a share; nothing where it is not known."""
    if peak is None:
        return {}
    return {f"peak within {band:.0%} of {planned / GIB:.2f} GiB": abs(peak / planned - 1) <= band}


def speed_check(setup: Setup, f: Figures, least: float) -> dict[str, bool]:
    """Whether an H100 has as many tokens/s; nothing for other cards."""
    if setup.tiny or "H100" not in card_of(setup):
        return {}
    return {f"{least:,.0f} tokens/s": f["tokens_per_s"] >= least}


def of_reference(setup: Setup) -> Figures:
    """The newest figures of the reference's step on this card; none before it has run."""
    shown = newest(read_report(Path(setup.report)), card_of(setup), setup.tiny)
    return dict(shown[REFERENCE]["figures"]) if REFERENCE in shown else {}


def same_first_loss(setup: Setup, f: Figures, most: float) -> dict[str, bool]:
    """Whether the first loss is the reference's; nothing when that is not known."""
    theirs = of_reference(setup).get("first_loss")
    text = f"first loss within {most} of step {REFERENCE}'s"
    return {text: abs(f["first_loss"] - theirs) < most} if isinstance(theirs, float) else {}
