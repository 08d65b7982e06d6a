"""Measure a GPU in one go, in at most eight minutes: python bench.py --what=gpu

Each of STEPS runs in a process of its own (python bench_gpu.py STEP SETUP), which tells what it
finds as it finds it, is killed at its limit, and stops no other. All goes to a JSON report at once.
Training is train.py's own main. The process that starts the others leaves the GPU alone: its memory
there would count as theirs.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch

import checkpoint
import dataloader
import planner
import runlog
import runtime
import train  # sets environment variables that the steps get before they load torch
from configurator import overrides, settings_of
from memory import Training
from model import GPT, GPTConfig, choose_attention
from sampling import cache_length, compile_decode
from scoring import Question, score, sliding

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent
GIB = 2**30
MARK = "figures "  # begins a line of them on a step's stdout
VOCABULARY, TINY_VOCABULARY = 50257, 500
TESTS = 1  # this step runs last, in the time that is left
CUDNN = 12  # in this one cuDNN's attention is allowed, which data centres' cards take
SHORTAGE = 9 * GIB  # what step 3 has of the card
AMPLE = 22 * GIB  # free memory with which every micro-batch here fits
TOKENS = 122880  # of an update of the reference: 10 micro-steps
PLANTED = 3  # the update that gets an infinite gradient
MARGIN_S = 20  # of a step's limit, for start and plan: training stops by itself before
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


class Setup(NamedTuple):
    """What a step's process is told."""

    folder: str  # temporary, shared by all steps; the tokens are in data/
    report: str
    device: str
    tiny: bool  # toy sizes: to try the bench, not the machine
    seconds: float  # until the process is killed


# --- what steps are made of


def emit(*facts: str, checks: dict[str, bool] | None = None, **figures: Any) -> None:
    """Tell what has been found: text for people, what has to hold, and figures by name."""
    found = {"facts": facts, "checks": checks or {}, "figures": figures}
    print("\n" + MARK + json.dumps(found), flush=True)


def synchronise(where: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if where.type != "cpu":
        torch.accelerator.synchronize(where)


def memory_figures(where: torch.device, reset: bool = False) -> Figures:
    """Bytes at the peak since the last reset: live tensors, the allocator's gaps, and the context.

    The context is all that is not the allocator's, other programs' too. Nothing for a CPU.
    """
    if where.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(where)
    peak, reserved = torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where)
    context = total - free - torch.cuda.memory_reserved(where)
    if reset:
        torch.cuda.reset_peak_memory_stats(where)
    return {"peak": peak, "gaps": reserved - peak, "context": context}


@contextlib.contextmanager
def shortage(where: torch.device) -> Iterator[None]:
    """Let SHORTAGE be all the memory that there is. A CPU only claims to be out of it."""
    real = dataloader.TrainLoader.batch

    def batch(self: Any, step: int, micro_step: int, rows: int) -> Any:
        if rows > 1:
            raise torch.OutOfMemoryError("planted")
        return real(self, step, micro_step, rows)

    if where.type == "cuda":
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SHORTAGE / total))  # selected before
        yield
    else:
        with mock.patch.object(dataloader.TrainLoader, "batch", batch):
            yield


def write_tokens(folder: Path, vocabulary: int) -> None:
    """train.bin and val.bin with frequencies as in text (Zipf's), and meta.json.

    It names the byte tokenizer, which needs no files: nothing here is ever decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    share = 1 / (np.arange(vocabulary) + 2.7)
    rng, splits = np.random.default_rng(0), {}
    for split, tokens in (("train", 6_000_000), ("val", 200_000)):
        ids = rng.choice(vocabulary, tokens, p=share / share.sum())
        ids.astype("<u2").tofile(folder / f"{split}.bin")
        splits[split] = {"tokens": tokens, "max_id": int(ids.max()), "documents": 1}
    meta = {"tokenizer": "bytes", "vocab_size": vocabulary, "dtype": "uint16", "splits": splits}
    runlog.write_text(folder / "meta.json", json.dumps(meta))


def settings_for(setup: Setup, out: str, updates: int, *args: str, **more: Any) -> Figures:
    """All settings of a training run: args as typed, then what a bench needs, `more`, toy sizes."""
    folder, values = Path(setup.folder), DEFAULTS | overrides(args, DEFAULTS, ROOT)
    values |= {"dataset": str(folder / "data"), "out_dir": str(folder / out), "overwrite": True}
    values |= {"device": setup.device, "log_interval": 1, "eval_interval": 10**6, "eval_iters": 2}
    values |= {"checkpoint_minutes": 1e6, "max_iters": updates, "warmup_iters": min(2, updates)}
    values |= {"time_limit": max(1.0, setup.seconds - MARGIN_S) / 60, "compile": "True"}
    return values | more | (TINY if setup.tiny else {})


def log_of(settings: Figures) -> list[Figures]:
    """The records of a run's updates."""
    found = runlog.read_records(Path(settings["out_dir"]) / "metrics.jsonl")
    return [r for r in found if "loss" in r]


def loss_gap(one: Figures, other: Figures) -> float:
    """The largest difference of two runs' losses. Raises ValueError when one has fewer updates."""
    a, b = ([r["loss"] for r in log_of(s)] for s in (one, other))
    return float(max(abs(x - y) for x, y in zip(a, b, strict=True)))


def run_train(
    settings: Figures, hook: Callable[[int], None] = lambda n: None, saves: bool = False
) -> tuple[list[Figures], list[str]]:
    """Train by train.py's main: the log's records of updates, and the lines printed.

    hook is called with the number of each update, when its gradients are there. Without `saves` no
    checkpoint is written: 3.6 GB each would measure the disk.
    """
    clip, count, lines = torch.nn.utils.clip_grad_norm_, itertools.count(), list[str]()

    def clipped(*args: Any, **kwargs: Any) -> Any:
        hook(next(count))
        return clip(*args, **kwargs)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    changes: list[tuple[Any, str, Any]] = [(torch.nn.utils, "clip_grad_norm_", clipped)]
    changes += [(train, "say", say), (runlog, "draw_losses", lambda *_: "")]
    if not saves:
        changes += [(checkpoint, "check_disk", lambda *_, **__: None)]
        changes += [(checkpoint.Saver, n, lambda *_: None) for n in ("save", "save_best")]
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
            runtime.watch(0)
            runtime.unlock_folders()
    return log_of(settings), lines


def train_config(
    setup: Setup,
    config: str,
    updates: int,
    band: float = 0.07,
    hook: Callable[[int], None] = lambda n: None,
    fit: bool = True,
    **more: Any,
) -> Figures:
    """Train a config for a few updates and emit speed, losses, graphs and memory, then the plan.

    band: how far the peak may be from the plan's. fit: with a smaller micro-batch on a card that is
    too small for the config's.
    """
    from torch._dynamo.utils import counters

    where = runtime.select_device(setup.device)
    s = settings_for(setup, "out", updates, f"config/{config}.py", **more)
    vocabulary = dataloader.read_meta(Path(s["dataset"]))["vocab_size"]
    size = dataclasses.replace(size_of(s), vocab_size=-(-vocabulary // 64) * 64)
    windows = s["tokens_per_step"] // size.max_position_embeddings
    number, compiled = runtime.select_dtype(s["dtype"], where)[0], s["compile"] == "True"
    checkpointing = s["activation_checkpointing"]
    training = Training(size, number, where.type, compiled, checkpointing, accumulates=True)
    wanted, room = s["batch_size"], planner.free_memory(where) or math.inf
    room -= planner.RESERVE[where.type]
    if fit and not setup.tiny and room < AMPLE:
        s["batch_size"] = planner.largest_batch(training, windows, room, wanted)
    if s["batch_size"] != wanted:
        emit(f"batch_size {s['batch_size']} instead of {wanted}")
    graphs, start = 0, Figures()

    def each(update: int) -> None:
        nonlocal graphs, start
        if update == 1:  # all is compiled, and the optimizer's moments are there
            graphs, start = counters["stats"]["unique_graphs"], memory_figures(where, reset=True)
        hook(update)

    records, lines = run_train(s, each)
    if not records:
        raise ValueError("no update was finished in time")
    f: Figures = {k: s[k] for k in ("batch_size", "tokens_per_step", "compile")}
    f |= {"updates": len(records), "first_loss": records[0]["loss"]}
    f |= {"last_loss": records[-1]["loss"], "uniform_loss": math.log(vocabulary)}
    f["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in records[len(records) // 3 :])
    f["recompiles"] = counters["stats"]["unique_graphs"] - graphs
    f |= {"lines": lines, "peak_of_start": start.get("peak")} | memory_figures(where)
    facts = [f"{f['tokens_per_s']:,.0f} tokens/s"]
    facts.append(f"loss {f['first_loss']:.3f} to {f['last_loss']:.3f} in {f['updates']} updates")
    facts += [f"peak {f[k] / GIB:.2f} GiB" for k in ("peak",) if k in f]
    emit(*facts, checks=training_checks(f), **f)
    if fit:
        planned = planner.peak(training, s["batch_size"], windows)
        emit(planned=planned, reserve=planner.RESERVE[where.type])
        fits = not any(line.startswith("going on with") for line in lines)
        emit(checks={"fits": fits} | peak_check(f.get("peak"), planned, band))
    return f


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


def card_of(setup: Setup) -> str:
    """The device as the report names it."""
    return runtime.describe(runtime.select_device(setup.device))


def step_2(setup: Setup) -> Figures:
    """The newest figures of step 2 on this card; none before it has run."""
    shown = newest(read_report(Path(setup.report)), card_of(setup), setup.tiny)
    return dict(shown[2]["figures"]) if 2 in shown else {}


def same_first_loss(setup: Setup, f: Figures, most: float) -> dict[str, bool]:
    """Whether the first loss is step 2's; nothing when that is not known."""
    theirs = step_2(setup).get("first_loss")
    text = f"first loss within {most} of step 2's"
    return {text: abs(f["first_loss"] - theirs) < most} if isinstance(theirs, float) else {}


def size_of(settings: Figures) -> GPTConfig:
    """The model's part of train.py's settings, GPT-2's vocabulary where they name none."""
    names = [f.name for f in dataclasses.fields(GPTConfig)]
    return GPTConfig(**{k: settings[k] for k in names if settings.get(k)})


def loud_model(size: GPTConfig, factor: float) -> GPT:
    """A model with random weights so large that its text is not one token for ever."""
    torch.manual_seed(0)
    model = GPT(size).eval()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(factor)
    return model


# --- the steps


def machine(setup: Setup) -> None:
    """Versions, the kernel of attention, the speeds of products and of memory."""
    where, found = runtime.select_device(setup.device), Figures()
    for name in ("triton", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, encoding="utf-8")
        found["driver"] = " ".join(told.stdout.split()[:1])
    emit(**found, cuda=torch.version.cuda, python=sys.version.split()[0], system=sys.platform)
    model = GPT(GPTConfig(num_hidden_layers=1, vocab_size=64)).to(where)
    kernel = choose_attention(model, runtime.select_dtype("auto", where)[0])
    emit(f"{kernel} attention", checks={"flash attention": kernel == "flash"}, kernel=kernel)
    n = 256 if setup.tiny else 8192
    a = torch.randn(n, n, device=where, dtype=torch.bfloat16)
    tflops = 2 * n**3 / min(seconds(where, lambda: a @ a) for _ in range(10)) / 1e12
    emit(f"{tflops:.4g} TFLOP/s", tflops=tflops)
    block = torch.zeros(2**20 if setup.tiny else 2**29, device=where, dtype=torch.bfloat16)
    other = torch.empty_like(block)
    speed = 2 * block.nbytes / min(seconds(where, lambda: other.copy_(block)) for _ in range(10))
    emit(f"{speed / 1e9:.4g} GB/s", copy_gb_per_s=speed / 1e9)


def seconds(where: torch.device, work: Callable[[], object]) -> float:
    """How long a device takes for some work."""
    synchronise(where)
    t0 = time.perf_counter()
    work()
    synchronise(where)
    return time.perf_counter() - t0


def gpu_tests(setup: Setup) -> None:
    """tests/gpu; of a tiny run a part."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return emit("skipped: there is no tests/gpu")
    report = Path(setup.folder, "tests.xml")
    part = ["tests/gpu/test_kernels.py", "--device=cpu"] if setup.tiny else ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", *part, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    n = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    cases = [(c.get("name"), {e.tag for e in c}) for c in suite.iter("testcase")]
    bad = [name for name, tags in cases if {"failure", "error"} & tags]
    failed = n["failures"] + n["errors"]
    line = f"{n['tests'] - failed - n['skipped']} passed, {failed} failed, {n['skipped']} skipped"
    emit(line, *map(str, bad[:5]), checks={"none failed": not failed and n["tests"] > 0}, **n)


def reference(setup: Setup) -> None:
    """The reference run's first 30 updates, or as many as there is time for."""
    f = train_config(setup, "train_gpt", 30, tokens_per_step=TOKENS)
    emit(checks=speed_check(setup, f, 140e3))


def out_of_memory(setup: Setup) -> None:
    """The reference, uncompiled, where its micro-batch does not fit."""
    more: Figures = {"tokens_per_step": TOKENS, "compile": "False"}
    with shortage(runtime.select_device(setup.device)):
        f = train_config(setup, "train_gpt", 2, fit=False, **more)
    going = [line for line in f["lines"] if line.startswith("going on with")]
    emit(*going, checks={"halved": bool(going)} | same_first_loss(setup, f, 0.01))


def resume(setup: Setup) -> None:
    """10 + 10 updates against 20. Deterministic first: cuBLAS reads its variable once."""
    for kind, deterministic in (("deterministic", True), ("default", False)):
        more: Figures = {**SMALL, "deterministic": deterministic, "compile": str(deterministic)}
        whole = settings_for(setup, f"whole {kind}", 20, **more, lr_decay_iters=20)
        parts = settings_for(setup, f"parts {kind}", 20, **more, lr_decay_iters=20)
        for run in (whole, parts | {"max_iters": 10}, parts | {"init_from": "resume"}):
            run_train(run, saves=True)
        a, b = (checkpoint.load_newest(Path(s["out_dir"]))[1]["model"] for s in (whole, parts))
        equal, gap = all(torch.equal(w, b[k]) for k, w in a.items()), loss_gap(whole, parts)
        checks = {"the same bits": equal} if deterministic else {"at most 1e-3": gap <= 1e-3}
        words = f"weights {'the same' if equal else 'NOT the same'} bits"
        emit(f"{kind}: losses differ by {gap:.1e}, {words}", checks=checks, **{f"{kind}_gap": gap})


def uncompiled(setup: Setup) -> None:
    """The reference without torch.compile."""
    more: Figures = {"tokens_per_step": TOKENS, "compile": "False"}
    f = train_config(setup, "train_gpt", 3, **more)
    emit(checks=same_first_loss(setup, f, 0.02))


def recomputed(setup: Setup) -> None:
    """The reference with activation checkpointing."""
    more: Figures = {"tokens_per_step": TOKENS, "activation_checkpointing": True}
    train_config(setup, "train_gpt", 5, 0.1, **more)


def loss_scaling(setup: Setup) -> None:
    """float16 with an infinite gradient in one update. A CPU is made to take float16, too."""
    real, scales, kept = torch.amp.GradScaler.unscale_, list[float](), False
    before = torch.empty(0)

    def unscale(scaler: Any, optimizer: Any) -> None:
        nonlocal kept, before
        p = optimizer.param_groups[0]["params"][1]
        if len(scales) == PLANTED:
            p.grad.view(-1)[0] = math.inf
            before = p.detach().clone()
        elif len(scales) == PLANTED + 1:
            kept = torch.equal(before, p)
        scales.append(scaler.get_scale())
        real(scaler, optimizer)

    taken = mock.patch.object(runtime, "select_dtype", lambda *_: (torch.float16, "tried"))
    settings = settings_for(setup, "out", 10, **SMALL, dtype="float16", compile="False")
    with (
        mock.patch.object(torch.amp.GradScaler, "unscale_", unscale),
        taken if setup.tiny else contextlib.nullcontext(),
    ):
        losses = [r["loss"] for r in run_train(settings)[0]]
    halved = scales[PLANTED + 1] == scales[PLANTED] / 2
    checks = {"the update is left out": kept, "the scale halves": halved}
    checks["training goes on"] = losses[-1] < losses[0]
    emit(f"scales {scales}, loss {losses[0]:.3f} to {losses[-1]:.3f}", checks=checks)


def decode(setup: Setup) -> None:
    """Greedy text of the reference's shape: speeds in bfloat16, equality in float32."""
    from bench import transformers_decoder

    where, prompt, n = runtime.select_device(setup.device), 64, 16 if setup.tiny else 128
    size = size_of((TINY if setup.tiny else {}) | {"max_position_embeddings": 1024})
    ids = torch.randint(0, VOCABULARY, (1, prompt), device=where)

    def speed(name: str, generate: Callable[[Any, int], object]) -> None:
        generate(ids, n)  # compiles and warms up
        whole, first = (
            statistics.median(seconds(where, partial(generate, ids, k)) for _ in range(3))
            for k in (n, 1)
        )
        figures: Figures = {f"{name}_tokens_per_s": (n - 1) / (whole - first)}
        emit(*(f"{name} {per_s:.1f} tokens/s" for per_s in figures.values()), **figures)

    def compared(model: GPT, timed: bool) -> int:
        """Tokens before the first in which compiled text differs."""
        texts = []
        for name in ("eager", "compiled"):
            if name == "compiled" and (problem := compile_decode(model, prompt + n)):
                raise ValueError(f"not compiled: {problem}")
            memory_figures(where, reset=True)
            if timed:
                speed(name, lambda ids, n: model.generate(ids, n, temperature=0))
            texts.append(model.generate(ids, n, temperature=0)[0, prompt:].tolist())
            if timed:
                figures: Figures = memory_figures(where)
                emit(**{f"{name}_{k}": v for k, v in figures.items()})
        return next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), n)

    model = loud_model(size, 6).to(where, torch.bfloat16)
    choose_attention(model, torch.bfloat16)
    cache = 2 * size.num_hidden_layers * size.num_key_value_heads * size.head_dim
    cache *= 2 * cache_length(prompt + n, size.max_position_embeddings)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    emit(f"{compared(model, True)} of {n} tokens alike", planned=weights + cache)
    exact = loud_model(dataclasses.replace(size, num_hidden_layers=2), 6).to(where)
    choose_attention(exact, torch.float32)
    same = compared(exact, False)
    emit(f"{same} in float32", checks={f"{n} alike in float32": same == n})
    if importlib.util.find_spec("transformers"):
        theirs = transformers_decoder(model, Path(setup.folder), torch.bfloat16)
        speed("transformers", theirs.generate)


def evaluation(setup: Setup) -> None:
    """Losses and log-likelihoods of answers in float32, on the device and on the CPU."""
    model = loud_model(size_of(SMALL | (TINY if setup.tiny else {})), 3)
    rng, window = np.random.default_rng(0), model.config.max_position_embeddings
    ids = rng.integers(0, VOCABULARY, 8 * window + 1)
    lines = [rng.integers(0, VOCABULARY, 24) for _ in range(8)]
    asked = [Question(c[:8], [c[8:12], c[12:14], c[14:19], c[19:]]) for c in lines]
    losses, likely = [], []
    for where in (torch.device("cpu"), runtime.select_device(setup.device)):
        choose_attention(model.to(where), torch.float32)
        whole = score(model, sliding(ids, window, window), 50304, 4 * window)
        losses.append(-sum(s.loglikelihood for [s] in whole) / (len(ids) - 1))
        found = score(model, asked, VOCABULARY, 4 * window)
        likely.append([s.loglikelihood for answers in found for s in answers])
    loss_gap = abs(losses[0] - losses[1])
    gap = max(abs(a - b) for a, b in zip(*likely, strict=True))
    text = f"loss {losses[0]:.4f} differs by {loss_gap:.1e}, answers' by {gap:.1e}"
    emit(text, checks={"at most 1e-4": max(loss_gap, gap) <= 1e-4})


def torchrun(setup: Setup) -> None:
    """One rank, FSDP, sharded checkpoints: 5 + 5 updates against 10, which run beside the first."""

    def start(settings: Figures) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=1", "train.py"]
        command += [f"--{k}={v}" for k, v in settings.items() if v != DEFAULTS[k]]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stderr=pipe, text=True, encoding="utf-8")

    def finish(process: subprocess.Popen[str]) -> None:
        said = process.communicate()[1].strip().splitlines()
        if process.returncode:
            raise ValueError(([x for x in said if x.startswith("train.py:")] or said or ["?"])[-1])

    kind = setup.device.partition(":")[0]  # torchrun gives each rank a device of its own
    more: Figures = {**SMALL, "parallel": "fsdp", "sharded_checkpoints": True, "compile": "False"}
    more |= {"lr_decay_iters": 10, "device": kind}
    whole, parts = (settings_for(setup, out, 10, **more) for out in ("whole", "parts"))
    for process in [start(s) for s in (whole, parts | {"max_iters": 5})]:
        finish(process)
    finish(start(parts | {"init_from": "resume"}))
    gap, shards = loss_gap(whole, parts), len(list(Path(parts["out_dir"]).glob("*.shards")))
    checks = {"at most 1e-3": gap <= 1e-3, "sharded checkpoints": shards > 0}
    emit(f"losses differ by {gap:.1e}", checks=checks, gap=gap)


def half_depth(setup: Setup) -> None:
    """The 12-layer config."""
    f = train_config(setup, "train_gpt_12layer", 12, tokens_per_step=131072)
    emit(checks=speed_check(setup, f, 230e3))


def profiled(setup: Setup) -> None:
    """The reference with cuDNN's attention allowed; its kernels in three updates, by time."""
    from torch.profiler import profile

    profiler: Any = profile()
    kernels = list[Any]()

    def total(event: Any) -> float:
        return float(event.self_device_time_total or event.self_cpu_time_total)

    def hook(update: int) -> None:
        if update == 6:
            profiler.__enter__()
        elif update == 9:
            profiler.__exit__(None, None, None)
            events = list(profiler.key_averages())
            found = [e for e in events if e.device_type.name != "CPU"] or events
            for e in sorted(found, key=total, reverse=True)[:15]:
                kernels.append([e.key[:100], round(total(e) / 1e3, 3), e.count])

    f = train_config(setup, "train_gpt", 12, hook=hook, tokens_per_step=TOKENS)
    if isinstance(theirs := step_2(setup).get("tokens_per_s"), float | int):
        emit(f"{f['tokens_per_s'] / theirs:.2f} of step 2's speed")
    emit(checks={"a table of kernels": bool(kernels)}, kernels_ms_calls=kernels)


class Step(NamedTuple):
    """A name, the seconds it may take, and what its process does."""

    name: str
    seconds: int
    work: Callable[[Setup], None]


STEPS = (
    Step("machine", 14, machine),
    Step("tests/gpu", 36, gpu_tests),
    Step("reference", 113, reference),
    Step("out of memory", 25, out_of_memory),
    Step("resume", 42, resume),
    Step("uncompiled", 22, uncompiled),
    Step("activation checkpointing", 45, recomputed),
    Step("float16", 18, loss_scaling),
    Step("decoding", 50, decode),
    Step("evaluation", 17, evaluation),
    Step("torchrun", 28, torchrun),
    Step("12 layers", 35, half_depth),
    Step("cuDNN, profile", 35, profiled),
)


# --- running them


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a step and, but on Windows, what it has started."""
    with contextlib.suppress(OSError):  # it has ended
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_step(number: int, setup: Setup) -> dict[str, Any]:
    """What a step found, as far as it came; "note" says why it came no further, or is ""."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(setup.folder, "inductor"))
    environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"  # test what consumer cards have
    if number == CUDNN:
        del environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"]
    command = [sys.executable, str(ROOT / "bench_gpu.py"), str(number), json.dumps(setup._asdict())]
    out, err = (Path(setup.folder, f"{number}.{name}") for name in ("out", "err"))
    found: dict[str, Any] = {"facts": [], "checks": {}, "figures": {}, "note": ""}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # so that all it starts can be killed with it
        )
        try:
            if code := process.wait(setup.seconds):
                found["note"] = f"exit code {code}"
        except subprocess.TimeoutExpired:
            found["note"] = f"timed out after {setup.seconds:.0f} s"
        finally:
            end(process)
    said = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if found["note"].startswith("exit") and said:
        found["note"] = said[-1][:300]
    if found["note"]:
        found["said"] = said[-20:]
    for line in out.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # cut short; NaN, which is not JSON, is a text
                told = json.loads(line.removeprefix(MARK), parse_constant=str)
                found["facts"] += told["facts"]
                found["checks"] |= told["checks"]
                found["figures"] |= told["figures"]
    return found


def judge(found: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether a step passed, None for one that was skipped, and what was missed."""
    missed = "; ".join(name for name, holds in found["checks"].items() if not holds)
    if found["note"] or missed:
        return False, "; ".join(filter(None, (found["note"], missed)))
    return (True if found["checks"] else None), ""


def read_report(path: Path) -> list[dict[str, Any]]:
    """The results so far. Raises ValueError for a file that is not such a report."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all({"step", "card", "tiny", "figures"} <= set(r) for r in found):
            raise ValueError("not a list of results")
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is no report of this bench ({e}); choose another --report") from e
    return list(found)


def newest(results: Iterable[dict[str, Any]], card: str, tiny: bool) -> dict[int, dict[str, Any]]:
    """The last result of each step on a card, in the steps' order."""
    found = {r["step"]: r for r in results if r["card"] == card and r["tiny"] == tiny}
    return dict(sorted(found.items()))


def chosen_steps(text: str) -> list[int]:
    """The steps of 2,8, all for "", the tests last. Raises ValueError for others."""
    names = text.replace(" ", "").split(",") if text.strip() else map(str, range(len(STEPS)))
    numbers = {int(n) if n.isdecimal() else -1 for n in names}
    if not numbers <= set(range(len(STEPS))):
        known = ", ".join(f"{i} {s.name}" for i, s in enumerate(STEPS))
        raise ValueError(f"steps must be numbers with commas between, not {text!r}: {known}")
    return sorted(numbers, key=lambda n: (n == TESTS, n))


def chosen_device(device: str, tiny: bool) -> str:
    """auto is cuda, or cpu with tiny. Raises ValueError when there is nothing to measure."""
    there = torch.cuda.is_available()
    name = ("cuda" if there else "cpu") if device == "auto" else device
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not there):
        raise ValueError(f"device={device!r}, but there is no such GPU; write --device=auto")
    if kind == "cpu" and not tiny:
        raise ValueError(
            f"device={device!r} is no GPU here, and a CPU would take days; to try the bench itself "
            "write --device=cpu --tiny=True"
        )
    return name


def run(folder: Path, steps: str, report: str, device: str, tiny: bool) -> None:
    """Run steps, print each result when it is known, and then tables; raises ValueError at last.

    A step may also take the time that those before it and those not asked for leave.
    """
    numbers, path, where = chosen_steps(steps), Path(report).resolve(), chosen_device(device, tiny)
    results = read_report(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    runlog.write_text(path, json.dumps(results, indent=1))  # what cannot be written fails now
    write_tokens(folder / "data", TINY_VOCABULARY if tiny else VOCABULARY)
    left, card, failed = float(sum(s.seconds for s in STEPS)), "unknown", []
    for i, number in enumerate(numbers):
        step, t0 = STEPS[number], time.monotonic()
        later = sum(STEPS[n].seconds for n in numbers[i + 1 :])
        setup = Setup(str(folder), str(path), where, tiny, left - later)
        found = run_step(number, setup)
        took = time.monotonic() - t0
        left -= min(took, setup.seconds)
        card = found["figures"].get("card", card)
        passed, missed = judge(found)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        row = {"step": number, "name": step.name, "card": card, "tiny": tiny, "date": now}
        row |= {"torch": torch.__version__, "seconds": round(took, 1), "passed": passed}
        results.append(row | {"missed": missed} | found)
        runlog.write_text(path, json.dumps(results, indent=1))
        words = {True: "passed", False: f"NOT PASSED ({missed})", None: "skipped"}[passed]
        facts = "; ".join(found["facts"])
        print(f"{number:>2} {step.name}, {took:.0f} s: {words}: {facts}", flush=True)
        failed += [f"{number} {step.name}"] * (passed is False)
    shown = newest(results, card, tiny)
    print("\n".join(["", *table(shown), "", *memory_table(shown)]))
    if failed:
        raise ValueError(f"not passed: {', '.join(failed)}; the figures are in {path}")


def table(shown: dict[int, dict[str, Any]]) -> Iterator[str]:
    """The newest results in Markdown."""
    first = next(iter(shown.values()))
    versions = {"torch": first["torch"]} | shown.get(0, first)["figures"]
    known = ("torch", "cuda", "driver", "triton", "transformers")
    yield ", ".join([first["card"], *(f"{k} {versions[k]}" for k in known if versions.get(k))])
    yield "\n| step | what | measured | expected | passed | s |\n|---|---|---|---|---|---|"
    for n, r in shown.items():
        word = {True: "yes", False: f"**no**: {r['missed']}", None: "skipped"}[r["passed"]]
        cells = [str(n), r["name"], "; ".join(r["facts"]), "; ".join(r["checks"]), word]
        yield f"| {' | '.join(c.replace('|', '/') for c in cells)} | {r['seconds']:.0f} |"


def memory_table(shown: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Planned and measured peaks in GiB, and what the planner's reserve should be."""
    rows = {r["name"]: r["figures"] for r in shown.values() if "planned" in r["figures"]}
    eager = {name: f.get("peak", f.get("eager_peak")) for name, f in rows.items()}
    if not any(eager.values()):
        return
    yield "| memory, GiB | batch | planned | measured | ratio | context | allocator's gaps |"
    yield "|---|---|---|---|---|---|---|"
    beyond = [0.0]
    for name, f in rows.items():
        peak, part = eager[name], "" if "peak" in f else "eager_"
        if peak:
            rest = f[f"{part}context"], f[f"{part}gaps"]
            beyond.append(sum(rest) / GIB)
            sizes = (f["planned"], peak, GIB * peak / f["planned"], *rest)
            cells = " | ".join(f"{x / GIB:.3f}" for x in sizes)
            yield f"| {name} | {f.get('batch_size', 1)} | {cells} |"
    reserve = planner.RESERVE["cuda"] / GIB
    yield f"\nbeyond live tensors at most {max(beyond):.2f} GiB; the planner reserves {reserve:.2f}"


def main(number: int, setup: Setup) -> None:
    """A step, in the process made for it."""
    real = torch.compile

    def traced(model: Any = None, **how: Any) -> Any:
        how = {k: how[k] for k in ("dynamic", "fullgraph", "backend") if k in how}
        return real(model, **{"backend": "aot_eager"} | how)

    def work() -> None:
        emit(card=card_of(setup))
        STEPS[number].work(setup)

    # toy sizes take minutes to compile, but moments to be traced
    without_codegen = mock.patch.object(torch, "compile", traced)
    with without_codegen if setup.tiny else contextlib.nullcontext():
        runtime.run(work)


if __name__ == "__main__":
    main(int(sys.argv[1]), Setup(**json.loads(sys.argv[2])))
