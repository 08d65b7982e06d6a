"""The steps of bench/gpu.py, each in a process of its own: python -m bench.gpu_steps NUMBER SETUP

A step tells what it finds as it finds it. The process that starts the others leaves the GPU alone:
its memory there would count as theirs.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from bench.commands import ROOT
from bench.decoders import transformers_decoders
from bench.gpu_probe import (
    Figures,
    Setup,
    card_of,
    device_of,
    driver,
    emit,
    memory_figures,
    quickest,
    seconds,
    shortage,
)
from bench.gpu_training import (
    DEFAULTS,
    REFERENCE,
    SMALL,
    TINY,
    VOCABULARY,
    config_of,
    loss_gap,
    of_reference,
    run_train,
    same_first_loss,
    settings_for,
    speed_check,
    train_config,
)
from bench.models import loud_model
from formats import checkpoint
from making.compiled import compile_decode
from making.graphs import record_decode
from making.sampling import cache_length
from making.scoring import Question, score, sliding
from model import GPT, GPTConfig
from run import int8, machine, script
from run.machine import choose_attention

TOKENS = 122880  # of an update of the reference: 10 micro-steps
UPDATES = 30  # of it
INT8_UPDATES, INT8_GAP = 20, 0.1  # and how far its loss may then be from bfloat16's
CHECKED_ROWS = 32  # of each int8 product, against int64
PLANTED = 3  # the update that gets an infinite gradient
PROFILED = range(6, 9)  # updates
KERNELS = 15  # of the profile's table


def speeds(setup: Setup) -> None:
    """Versions, the kernel of attention, the speeds of products and of memory."""
    device, found = device_of(setup), Figures()
    for name in ("triton", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["driver"] = driver()
    emit(**found, cuda=torch.version.cuda, python=sys.version.split()[0], system=sys.platform)
    model = GPT(GPTConfig(num_hidden_layers=1, vocab_size=64)).to(device)
    kernel = choose_attention(model, machine.select_dtype("auto", device)[0])
    emit(f"{kernel} attention", checks={"flash attention": kernel == "flash"}, kernel=kernel)
    n = 256 if setup.tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    tflops = 2 * n**3 / quickest(device, lambda: a @ a) / 1e12
    emit(f"{tflops:.4g} TFLOP/s", tflops=tflops)
    block = torch.zeros(2**20 if setup.tiny else 2**29, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(block)
    speed = 2 * block.nbytes / quickest(device, lambda: other.copy_(block))
    emit(f"{speed / 1e9:.4g} GB/s", copy_gb_per_s=speed / 1e9)


def gpu_tests(setup: Setup) -> None:
    """tests/gpu; of a tiny run a part."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return emit("skipped: there is no tests/gpu")
    written = Path(setup.folder, "tests.xml")
    part = ["tests/gpu/test_kernels.py", "--device=cpu"] if setup.tiny else ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", *part, f"--junitxml={written}"]
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    suite = ElementTree.parse(written).getroot().find("testsuite")
    assert suite is not None
    n = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    cases = [(c.get("name"), {e.tag for e in c}) for c in suite.iter("testcase")]
    bad = [name for name, tags in cases if {"failure", "error"} & tags]
    failed = n["failures"] + n["errors"]
    line = f"{n['tests'] - failed - n['skipped']} passed, {failed} failed, {n['skipped']} skipped"
    emit(line, *map(str, bad[:5]), checks={"none failed": not failed and n["tests"] > 0}, **n)


def reference(setup: Setup) -> None:
    """The reference run's first 30 updates, or as many as there is time for."""
    f = train_config(setup, "train_gpt", UPDATES, tokens_per_step=TOKENS)
    emit(checks=speed_check(setup, f, 140e3))


def out_of_memory(setup: Setup) -> None:
    """The reference, uncompiled, where its micro-batch does not fit."""
    more: Figures = {"tokens_per_step": TOKENS, "compile": "False"}
    with shortage(device_of(setup)):
        f = train_config(setup, "train_gpt", 2, fit=False, **more)
    going = [line for line in f["lines"] if line.startswith("going on with")]
    emit(*going, checks={"halved": bool(going)} | same_first_loss(setup, f, 0.01))


def resume(setup: Setup) -> None:
    """10 + 10 updates against 20. Deterministic first: cuBLAS reads its variable once."""
    for kind, deterministic in (("deterministic", True), ("default", False)):
        more: Figures = {**SMALL, "deterministic": deterministic, "compile": str(deterministic)}
        whole = settings_for(setup, f"whole {kind}", 20, **more, lr_decay_iters=20)
        parts = settings_for(setup, f"parts {kind}", 20, **more, lr_decay_iters=20)
        for settings in (whole, parts | {"max_iters": 10}, parts | {"init_from": "resume"}):
            run_train(settings, saves=True)
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


class Planted:
    """GradScaler.unscale_ with an infinite gradient in one update."""

    def __init__(self) -> None:
        self.real = torch.amp.GradScaler.unscale_
        self.scales: list[float] = []  # of each update
        self.before = torch.empty(0)
        self.kept = False  # the weights, by the update

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """In its place."""
        p = optimizer.param_groups[0]["params"][1]
        if len(self.scales) == PLANTED:
            p.grad.view(-1)[0] = math.inf
            self.before = p.detach().clone()
        elif len(self.scales) == PLANTED + 1:
            self.kept = torch.equal(self.before, p)
        self.scales.append(scaler.get_scale())
        self.real(scaler, optimizer)


def loss_scaling(setup: Setup) -> None:
    """float16 with an infinite gradient in one update. A CPU is made to take float16, too."""
    planted = Planted()
    taken = mock.patch.object(machine, "select_dtype", lambda *_: (torch.float16, "tried"))
    settings = settings_for(setup, "out", 10, **SMALL, dtype="float16", compile="False")
    with (
        mock.patch.object(torch.amp.GradScaler, "unscale_", lambda *args: planted.unscale(*args)),
        taken if setup.tiny else contextlib.nullcontext(),
    ):
        losses = [r["loss"] for r in run_train(settings)[0]]
    scales = planted.scales
    halved = scales[PLANTED + 1] == scales[PLANTED] / 2
    checks = {"the update is left out": planted.kept, "the scale halves": halved}
    checks["training goes on"] = losses[-1] < losses[0]
    emit(f"scales {scales}, loss {losses[0]:.3f} to {losses[-1]:.3f}", checks=checks)


def emit_speed(name: str, generate: Callable[[Tensor, int], object], ids: Tensor, n: int) -> float:
    """Tell and return the tokens/s of a way to make n tokens after the first, of three texts."""
    generate(ids, n)  # compiles and warms up
    whole, first = (
        statistics.median(seconds(ids.device, partial(generate, ids, k)) for _ in range(3))
        for k in (n, 1)
    )
    per_s = (n - 1) / (whole - first)
    figures: Figures = {f"{name}_tokens_per_s": per_s}
    emit(f"{name} {per_s:.1f} tokens/s", **figures)
    return per_s


def alike(model: GPT, ids: Tensor, n: int, speeds: dict[str, float] | None = None) -> int:
    """How many of n tokens come before the first that is not the same in all our ways.

    These are eager, compiled and, on a GPU, graph. speeds: their tokens/s are told, and put there.
    """
    texts, prompt = [], ids.size(1)

    def generate(ids: Tensor, n: int) -> Tensor:
        return model.generate(ids, n, temperature=0)

    for name in ("eager", "compiled", *["graph"] * ids.is_cuda):
        if name == "compiled" and (problem := compile_decode(model, prompt + n)):
            raise ValueError(f"not compiled: {problem}")
        if name == "graph" and (problem := record_decode(model, prompt + n)):
            raise ValueError(f"no CUDA graph: {problem}")
        memory_figures(ids.device, reset=True)
        if speeds is not None:
            speeds[name] = emit_speed(name, generate, ids, n)
        texts.append(generate(ids, n)[0, prompt:].tolist())
        if speeds is not None:
            figures: Figures = memory_figures(ids.device)
            emit(**{f"{name}_{k}": v for k, v in figures.items()})
    return next((i for i, made in enumerate(zip(*texts, strict=True)) if len({*made}) > 1), n)


def decode(setup: Setup) -> None:
    """Greedy text of the reference's shape: speeds in bfloat16, equality in float32."""
    device, prompt, n = device_of(setup), 64, 16 if setup.tiny else 128
    config = config_of((TINY if setup.tiny else {}) | {"max_position_embeddings": 1024})
    ids = torch.randint(0, VOCABULARY, (1, prompt), device=device)
    model = loud_model(config, 6).to(device, torch.bfloat16)
    choose_attention(model, torch.bfloat16)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache *= 2 * cache_length(prompt + n, config.max_position_embeddings)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    speeds: dict[str, float] = {}
    emit(f"{alike(model, ids, n, speeds)} of {n} tokens alike", planned=weights + cache)
    if "graph" in speeds:
        times = speeds["graph"] / speeds["compiled"]
        emit(f"graph {times:.2f} times compiled")
    exact = loud_model(dataclasses.replace(config, num_hidden_layers=2), 6).to(device)
    choose_attention(exact, torch.float32)
    same = alike(exact, ids, n)
    emit(f"{same} in float32", checks={f"{n} alike in float32": same == n})
    if importlib.util.find_spec("transformers"):
        found = transformers_decoders(model, Path(setup.folder), torch.bfloat16)
        theirs = max(emit_speed(d.name, d.generate, ids, n) for d in found)
        emit(f"{max(speeds.values()) / theirs:.2f} times transformers")


def evaluation(setup: Setup) -> None:
    """Losses and log-likelihoods of answers in float32, on the device and on the CPU."""
    model = loud_model(config_of(SMALL | (TINY if setup.tiny else {})), 3)
    rng, window = np.random.default_rng(0), model.config.max_position_embeddings
    ids = rng.integers(0, VOCABULARY, 8 * window + 1)
    lines = [rng.integers(0, VOCABULARY, 24) for _ in range(8)]
    asked = [Question(c[:8], [c[8:12], c[12:14], c[14:19], c[19:]]) for c in lines]
    losses, likely = [], []
    for device in (torch.device("cpu"), device_of(setup)):
        choose_attention(model.to(device), torch.float32)
        whole = score(model, sliding(ids, window, window), 50304, 4 * window)
        losses.append(-sum(s.loglikelihood for [s] in whole) / (len(ids) - 1))
        found = score(model, asked, VOCABULARY, 4 * window)
        likely.append([s.loglikelihood for answers in found for s in answers])
    gap_of_loss = abs(losses[0] - losses[1])
    gap = max(abs(a - b) for a, b in zip(*likely, strict=True))
    text = f"loss {losses[0]:.4f} differs by {gap_of_loss:.1e}, answers' by {gap:.1e}"
    emit(text, checks={"at most 1e-4": max(gap_of_loss, gap) <= 1e-4})


def start_rank(settings: Figures) -> subprocess.Popen[str]:
    """train.py as the one rank of a torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["train.py", *(f"--{k}={v}" for k, v in settings.items() if v != DEFAULTS[k])]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stderr=pipe, text=True, encoding="utf-8")


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for it. Raises ValueError with what train.py said when it fails."""
    said = process.communicate()[1].strip().splitlines()
    if process.returncode:
        raise ValueError(([x for x in said if x.startswith("train.py:")] or said or ["?"])[-1])


def torchrun(setup: Setup) -> None:
    """One rank, FSDP, sharded checkpoints: 5 + 5 updates against 10, which run beside the first."""
    kind = setup.device.partition(":")[0]  # torchrun gives each rank a device of its own
    more: Figures = {**SMALL, "parallel": "fsdp", "sharded_checkpoints": True, "compile": "False"}
    more |= {"lr_decay_iters": 10, "device": kind}
    whole, parts = (settings_for(setup, out, 10, **more) for out in ("whole", "parts"))
    for process in [start_rank(s) for s in (whole, parts | {"max_iters": 5})]:
        finish(process)
    finish(start_rank(parts | {"init_from": "resume", "overwrite": False}))
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
        if update == PROFILED.start:
            profiler.__enter__()
        elif update == PROFILED.stop:
            profiler.__exit__(None, None, None)
            events = list(profiler.key_averages())
            found = [e for e in events if e.device_type.name != "CPU"] or events
            for e in sorted(found, key=total, reverse=True)[:KERNELS]:
                kernels.append([e.key[:100], round(total(e) / 1e3, 3), e.count])

    f = train_config(setup, "train_gpt", 12, hook=hook, tokens_per_step=TOKENS)
    if isinstance(theirs := of_reference(setup).get("tokens_per_s"), float | int):
        emit(f"{f['tokens_per_s'] / theirs:.2f} of step {REFERENCE}'s speed")
    emit(checks={"a table of kernels": bool(kernels)}, kernels_ms_calls=kernels)


def int8_product(rows: int, n: int, k: int, device: torch.device) -> tuple[bool, float, float]:
    """Whether a product of random int8 numbers is exact, and seconds: its own, and bfloat16's."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (r, k), generator=draw, dtype=torch.int8) for r in (rows, n))
    scales = [torch.rand(r, 1, generator=draw) for r in (rows, n)]
    there = [t.to(device) for t in (a, b, *scales)]
    found = int8.int8_product(*there, torch.bfloat16)[-CHECKED_ROWS:].cpu()
    wanted = (a[-CHECKED_ROWS:].long() @ b.long().t()).float() * scales[0][-CHECKED_ROWS:]
    wanted = (wanted * scales[1].t()).bfloat16()
    wide = [t.bfloat16() for t in there[:2]]
    mine = quickest(device, lambda: int8.int8_product(*there, torch.bfloat16))
    return torch.equal(found, wanted), mine, quickest(device, lambda: wide[0] @ wide[1].t())


def int8_training(setup: Setup) -> None:
    """Each int8 product of the reference, exact and timed, and its first updates with them."""
    device = device_of(setup)
    if why := int8.why_not(device, None):
        return emit(f"skipped: {why}")
    config = config_of(TINY if setup.tiny else {})
    with torch.device("meta"):
        shapes = int8.shapes_of(GPT(dataclasses.replace(config, num_hidden_layers=1)))
    rows, exact, speeds = 64 if setup.tiny else 12288, True, dict[str, list[float]]()
    for n, k in shapes:
        same, mine, theirs = int8_product(rows, n, k, device)
        exact = exact and same
        speeds[f"{n} x {k}"] = [2 * rows * n * k / mine / 1e12, theirs / mine]
    words = (f"{shape} {tops:.4g} TOPS, {x:.2f}x bfloat16" for shape, (tops, x) in speeds.items())
    emit(*words, checks={"exact": exact}, tops_and_times_bfloat16=speeds)
    more: Figures = {"tokens_per_step": TOKENS, "lr_decay_iters": UPDATES, "matmul_dtype": "int8"}
    f, theirs_of = train_config(setup, "train_gpt", INT8_UPDATES, **more), of_reference(setup)
    if isinstance(speed := theirs_of.get("tokens_per_s"), float | int):
        emit(f"{f['tokens_per_s'] / speed:.2f} of step {REFERENCE}'s speed")
    pairs = list(zip(f["losses"], theirs_of.get("losses", ()), strict=False))[-1:]
    for ours, theirs in pairs:
        gap = abs(ours - theirs) if isinstance(theirs, float) else math.nan  # NaN is a text there
        within = {f"within {INT8_GAP} of step {REFERENCE}'s loss": gap <= INT8_GAP}
        emit(f"the last losses differ by {gap:.1e}", checks=within, gap=gap)


def beside_others(setup: Setup) -> None:
    """The reference's training steps beside transformers' and other projects': bench/train.py."""
    shape = {"layers": 24, "hidden": 1024, "batch": 12, "context": 1024, "micro_steps": 4}
    how = {"mode": "compiled", "dtype": "bfloat16", "repeats": 4}
    if setup.tiny:
        shape = {"layers": 1, "hidden": 64, "batch": 1, "context": 32}
        how = {"mode": "eager", "repeats": 1}
    flags = shape | how | {"device": setup.device, "peer": setup.peer}
    command = [sys.executable, "bench/train.py", *(f"--{k}={v}" for k, v in flags.items())]
    found: dict[str, float] = {}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, text=True, encoding="utf-8"
    ) as process:
        for line in process.stdout or ():
            cells = [cell.strip() for cell in line.strip("| \n").split(" | ")]
            if line.startswith("| ") and ", " in cells[0]:
                name, speed = cells[0].partition(",")[0], float(cells[1].replace(",", ""))
                found[name] = speed
                figures: Figures = {f"{name}_tokens_per_s": speed}
                emit(f"{name} {speed:,.0f} tokens/s", **figures)
    others = {k: v for k, v in found.items() if k != "ours"}
    fastest = found.get("ours", 0.0) > max(others.values(), default=math.inf)
    emit(checks={"ours is the fastest": fastest or setup.tiny and len(found) > 1})


class Step(NamedTuple):
    """A name, the seconds it may take, and what its process does."""

    name: str
    seconds: int
    work: Callable[[Setup], None]


STEPS = (
    Step("machine", 14, speeds),
    Step("tests/gpu", 60, gpu_tests),
    Step("reference", 113, reference),
    Step("out of memory", 25, out_of_memory),
    Step("resume", 42, resume),
    Step("uncompiled", 30, uncompiled),
    Step("activation checkpointing", 75, recomputed),
    Step("float16", 18, loss_scaling),
    Step("decoding", 140, decode),
    Step("evaluation", 17, evaluation),
    Step("torchrun", 28, torchrun),
    Step("12 layers", 67, half_depth),
    Step("cuDNN, profile", 35, profiled),
    Step("beside others", 150, beside_others),
    Step("int8", 140, int8_training),
)
TESTS = 1  # this step runs last, in the time that is left
CUDNN = 12  # in this one cuDNN's attention is allowed, which data centres' cards take
OTHERS = 13  # this one is left out unless it is asked for


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
        script.run(work)


if __name__ == "__main__":
    main(int(sys.argv[1]), Setup(**json.loads(sys.argv[2])))
