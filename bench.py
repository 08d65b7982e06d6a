"""Measure the project on this machine: python bench.py --what=prepare

Timings are noisy, so variants are run in turn, A B A B, and medians and ratios are printed.

prepare: data/prepare.py against nanoGPT's recipe (datasets.map with encode_ordinary per document,
    then a memory map) and against tiktoken's encode_ordinary_batch alone, on the same text with
    the same number of processes or threads: MB/s, temporary disk, memory. Needs GPT-2's
    vocabulary where tiktoken finds it (a network, or TIKTOKEN_CACHE_DIR).
train: training steps of this model against transformers' Llama of the same shape and --peer's
    models: tokens/s, share of the speed of a large matrix product, peak memory of tensors.
growth: the same for this model alone, against context, batch and depth.
save: updates of the demo's training with a checkpoint among them against updates without.
decode: greedy text from random weights (--layers=24 --hidden=1024: the reference's shape) against
    transformers' cached generate, --peer's models and, where llama-cpp-python is installed,
    llama.cpp: tokens/s, and the weights read in a second against what memory gives.
load: the batches of the loader against the ways of nanoGPT and EasyGPT.
ranks: training on two processes, a core each, against one on one core, at the same global batch.
startup: from typing a command to train.py's first step and to sample.py's first token.
gpu: all that is planned, promised or assumed about a GPU, in at most eight minutes, and a report to
    send: speed, memory against the plan, out of memory, resuming, decoding and more (bench_gpu.py).
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The model, torch and datasets are imported where they are used: variants are new processes.
from configurator import configure

what = "prepare"  # what to measure; see above
repeats = 3  # times each variant is run
text = ""  # prepare: a .jsonl of {"text": ...}; empty = the embedded corpus, repeated to 64 MB
num_proc = 2  # prepare: processes or threads of every variant
peer = ""  # train, decode: other model.py files, EasyGPT's or nanoGPT's, with commas between
mode = "both"  # train, decode: eager, compiled or both; growth: eager unless compiled
dtype = "float32"  # train: or bfloat16, by autocast; decode: of the weights
layers = 6  # train, decode
hidden = 384  # train, decode
batch = 4  # train: windows in a step
context = 256  # train: tokens in a window
updates = 600  # save: of a run
cases = "1x64,1x512,8x64"  # decode: prompts in a batch x tokens of each
new_tokens = 128  # decode: made after each prompt
steps = ""  # gpu: which steps to run, as 2,8; empty = all
report = "out/gpu.json"  # gpu: the file that results are added to
device = "auto"  # gpu: auto, cuda, cuda:1; cpu with tiny
tiny = False  # gpu: toy sizes, to try the bench itself, be it on a CPU
png = ""  # not prepare, save, gpu: also draw the table into this file

ROOT = Path(__file__).resolve().parent
CORPUS_BYTES, DOCUMENT_BYTES = 64e6, 5000


@dataclass
class Cost:
    """What running a command took."""

    seconds: float
    disk: int  # largest sum of the files in its folder, bytes
    memory: int  # of its largest process, bytes; 0 = unknown (Windows)
    printed: str


def run(command: list[str], folder: Path) -> Cost:
    """Run a command of this repository to its end. Raises ValueError when it fails."""
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, size_of(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    t0 = time.perf_counter()
    call = [sys.executable, "-c", f"import bench; bench.call_and_report({command})"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    seconds = time.perf_counter() - t0
    done.set()
    watcher.join()
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{' '.join(command)} failed: {last}")
    *lines, memory = ended.stdout.strip().splitlines()
    return Cost(seconds, max(peak, size_of(folder)), int(memory), "\n".join(lines))


def call_and_report(command: list[str]) -> None:
    """Run a command and print, last, the peak memory in bytes of its largest process.

    In a small process between: the system counts memory that a process has had before exec.
    """
    code = subprocess.run([sys.executable, *command]).returncode
    memory = 0
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"\n{memory}")
    sys.exit(code)


def size_of(folder: Path) -> int:
    """Bytes of the disk that the files below a folder take; they may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.stat(os.path.join(path, name))
            except OSError:
                continue
            total += stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
    return total


def in_turn(variants: dict[str, Callable[[], Cost]]) -> dict[str, list[Cost]]:
    """Each variant `repeats` times, A B A B."""
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for i in range(repeats):
        for name, variant in variants.items():
            costs[name].append(variant())
            print(f"{i + 1}/{repeats}  {name}: {costs[name][-1].seconds:.2f} s", flush=True)
    return costs


def median_ratio(a: list[Cost], b: list[Cost]) -> float:
    """Median over the rounds of a's seconds / b's."""
    return statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=True))


def nanogpt_recipe(source: str, out: str, processes: int) -> None:
    """The recipe of nanoGPT's data/openwebtext/prepare.py, on a .jsonl instead of the Hub."""
    import numpy as np
    import tiktoken
    from datasets import load_dataset

    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(row: dict[str, str]) -> dict[str, object]:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    rows = load_dataset(
        "json", data_files=source, split="train", cache_dir=f"{out}/cache", num_proc=processes
    )
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, name in (("train", "train"), ("test", "val")):
        found = splits[split].map(tokenize, remove_columns=["text"], num_proc=processes)
        total = int(np.sum(found["len"], dtype=np.uint64))
        bins = np.memmap(f"{out}/{name}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at, shards = 0, min(1024, len(found))
        for i in range(shards):
            shard = found.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            bins[at : at + len(ids)] = ids
            at += len(ids)
        bins.flush()


def raw_tiktoken(source: str, threads: int) -> None:
    """Print the seconds that encode_ordinary_batch alone takes for all documents of a .jsonl."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    with open(source, encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f]
    t0 = time.perf_counter()
    for i in range(0, len(texts), 1000):
        encoding.encode_ordinary_batch(texts[i : i + 1000], num_threads=threads)
    print(time.perf_counter() - t0)


def write_corpus(path: Path) -> None:
    """The embedded corpus in random order, again and again, as a .jsonl.

    Several docstrings make a document, so that documents have OpenWebText's mean length.
    """
    sys.path.append(str(ROOT / "data"))
    from sources import stdlib_documents

    texts, rng = list(stdlib_documents()), random.Random(0)
    with path.open("w", encoding="utf-8") as f:
        while f.tell() < CORPUS_BYTES:
            rng.shuffle(texts)
            joined = ""
            for one in texts:
                joined += one + "\n\n"
                if len(joined) > DOCUMENT_BYTES:
                    f.write(json.dumps({"text": joined}) + "\n")
                    joined = ""


def bench_prepare(folder: Path) -> None:
    """Print a table of what the ways from text to train.bin cost."""
    source = Path(text).resolve() if text else folder / "corpus.jsonl"
    if not text:
        write_corpus(source)
    with source.open(encoding="utf-8") as f:
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in f) / 1e6
    out = folder / "out"

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out

    def ours() -> Cost:
        flags = [f"--source={source}", f"--dataset={fresh()}", f"--num_proc={num_proc}"]
        return run(["data/prepare.py", *flags, "--tokenizer=gpt2", "--val_fraction=0.0005"], out)

    def recipe() -> Cost:
        call = f"import bench; bench.nanogpt_recipe({str(source)!r}, {str(fresh())!r}, {num_proc})"
        return run(["-c", call], out)

    def raw() -> Cost:
        call = f"import bench; bench.raw_tiktoken({str(source)!r}, {num_proc})"
        cost = run(["-c", call], fresh())
        cost.seconds = float(cost.printed.strip().splitlines()[-1])
        return cost

    bins: dict[str, int] = {}
    val: dict[str, bytes] = {}

    def seen(name: str, variant: Callable[[], Cost]) -> Callable[[], Cost]:
        def call() -> Cost:
            cost = variant()
            bins[name] = sum((out / f"{s}.bin").stat().st_size for s in ("train", "val"))
            val[name] = (out / "val.bin").read_bytes()
            return cost

        return call

    variants = {"nanoGPT's recipe": seen("recipe", recipe), "data/prepare.py": seen("ours", ours)}
    costs = in_turn(variants | {"tiktoken alone": raw})
    if val["recipe"] != val["ours"] or bins["recipe"] != bins["ours"]:
        raise ValueError("the two have made different bins")
    print(f"\n{megabytes:.0f} MB of text, {num_proc} processes or threads, val.bin the same")
    print("| way | MB/s | times the recipe | peak disk / bins | MB of its largest process |")
    print("|---|---|---|---|---|")
    for name, found in costs.items():
        seconds = statistics.median(c.seconds for c in found)
        ratio = median_ratio(costs["nanoGPT's recipe"], found)
        disk = max(c.disk for c in found) / bins["ours"]
        memory = max(c.memory for c in found) / 1e6
        print(f"| {name} | {megabytes / seconds:.1f} | {ratio:.2f} | {disk:.2f} | {memory:.0f} |")
    share = median_ratio(costs["tiktoken alone"], costs["data/prepare.py"])
    print(f"\ndata/prepare.py, end to end, has {share:.0%} of the speed of tiktoken alone")


@dataclass(frozen=True)
class Shape:
    """What a training benchmark runs."""

    layers: int
    hidden: int
    batch: int
    context: int

    @property
    def size(self) -> Any:
        """Our GPTConfig: heads of 64, a third as many for keys and values, GPT-2's vocabulary."""
        from model import GPTConfig

        heads = self.hidden // 64
        return GPTConfig(
            vocab_size=50304,
            hidden_size=self.hidden,
            intermediate_size=5 * self.hidden // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=next(n for n in (heads // 3, heads // 4, 1) if n and not heads % n),
            max_position_embeddings=self.context,
        )


def build(name: str, size: Any) -> tuple[Any, Any]:
    """A model by its name (ours, transformers, or a peer's file) and its loss of (net, x, y)."""
    import torch

    torch.manual_seed(0)
    if name == "ours":
        from model import GPT

        model: Any = GPT(size)
        return model, lambda net, x, y: net(x, y, loss_only=True)[1]
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        import hf

        model = LlamaForCausalLM(
            LlamaConfig(**hf.config_json(size, torch.float32, 0), attn_implementation="sdpa")
        )
        return model, lambda net, x, y: net(input_ids=x, labels=x, use_cache=False).loss
    spec = importlib.util.spec_from_file_location("peer", name)
    if spec is None or spec.loader is None:
        raise ValueError(f"peer must be the path of a model.py, not {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module
    spec.loader.exec_module(module)
    ours = dataclasses.asdict(size)
    nanogpt = {"block_size": "max_position_embeddings", "n_layer": "num_hidden_layers"}
    nanogpt |= {
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "norm_eps": "rms_norm_eps",
    }
    known = {f.name: nanogpt.get(f.name, f.name) for f in dataclasses.fields(module.GPTConfig)}
    given = {name: ours[field] for name, field in known.items() if field in ours}
    if "bias" in known:
        given["bias"] = False
    return module.GPT(module.GPTConfig(**given)), lambda net, x, y: net(x, y)[1]


class Trainer:
    """A model that makes training steps on random tokens."""

    def __init__(self, name: str, compiled: bool, shape: Shape, dtype: str) -> None:
        import torch

        import runtime
        from model import configure_optimizer

        if name == "ours":  # as train.py has it
            runtime.keep_freed_memory()
            runtime.keep_less()
        self.model, self.loss = build(name, shape.size)
        if hasattr(self.model, "configure_optimizers"):
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        else:
            self.optimizer = configure_optimizer(self.model, 1e-3, (0.9, 0.95), 0.1)
        self.net = torch.compile(self.model) if compiled else self.model
        self.x = torch.randint(0, 50257, (shape.batch, shape.context))
        self.y = torch.randint(0, 50257, (shape.batch, shape.context))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def step(self) -> float:
        """Forward, backward, clip, update; the seconds that they took."""
        import torch

        t0 = time.perf_counter()
        with self.autocast:
            loss = self.loss(self.net, self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - t0


class Runner:
    """A Trainer in a process of its own, so that what it sets is not the others'."""

    def __init__(self, name: str, compiled: bool, shape: Shape, dtype: str) -> None:
        short = Path(name).parent.name if name.endswith(".py") else name
        self.name = f"{short}, {'compiled' if compiled else 'eager'}"
        given = f"{name!r}, {compiled}, bench.{shape}, {dtype!r}"
        call = f"import bench, runtime; runtime.run(lambda: bench.make_steps({given}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", call],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.seconds: list[float] = []

    def step(self) -> None:
        """One more step, once it is its turn. Raises ValueError when the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(file=self.process.stdin, flush=True)
            self.seconds.append(float(self.process.stdout.readline()))
        except (OSError, ValueError) as e:
            raise ValueError(f"{self.name} made no step; its error is above") from e

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def make_steps(name: str, compiled: bool, shape: Shape, dtype: str) -> None:
    """Make a training step for each line of stdin, and print its seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print, too
    trainer = Trainer(name, compiled, shape, dtype)
    for _ in sys.stdin:
        print(trainer.step(), file=answers, flush=True)


def peak_memory(name: str, compiled: bool, shape: Shape, dtype: str) -> int:
    """Largest sum of live CPU tensors, bytes, in three training steps, weights and all included.

    From the allocator's events that the profiler records, so that compiled code counts, too.
    """
    from torch.profiler import ProfilerActivity, profile

    if compiled:
        Trainer(name, compiled, shape, dtype).step()  # compiling allocates, too; its result is kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = Trainer(name, compiled, shape, dtype)
        for _ in range(3):
            trainer.step()
    events = seen.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product on this CPU, the best of ten."""
    import torch

    a = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    times = []
    for _ in range(10):
        t0 = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - t0)
    return 2 * 2048**3 / min(times)


def bench_train(folder: Path) -> None:
    """Print a table of training speed and memory against transformers and --peer's models."""
    from model import GPT, flops_per_token

    shape = Shape(layers, hidden, batch, context)
    names = ["ours", "transformers", *filter(None, peer.split(","))]
    modes = {"eager": [False], "compiled": [True], "both": [False, True]}[mode]
    kinds = [(n, compiled) for compiled in modes for n in names]
    runners = run_in_turn([(n, compiled, shape) for n, compiled in kinds])
    flops = flops_per_token(GPT(shape.size)) * batch * context
    top = matmul_peak(dtype)
    print(f"\n{shape}, {dtype}; median of {3 * repeats} steps, in turn")
    print("| model | tokens/s | times the last | of matmul peak | peak tensor MB |")
    print("|---|---|---|---|---|")
    last, bars = runners[-1].seconds, []
    for runner, (name, compiled) in zip(runners, kinds, strict=True):
        seconds = statistics.median(runner.seconds)
        ratio = statistics.median(b / a for a, b in zip(runner.seconds, last, strict=True))
        peak = measured_peak(name, compiled, shape, folder)
        bars.append((runner.name, batch * context / seconds))
        print(
            f"| {runner.name} | {batch * context / seconds:,.0f} | {ratio:.2f} | "
            f"{flops / seconds / top:.0%} | {peak / 1e6:,.0f} |",
            flush=True,
        )
    picture(png, f"training, tokens/s, {shape}, {dtype}", bars)


def run_in_turn(kinds: Sequence[tuple[str, bool, Shape]]) -> list[Runner]:
    """Two steps of each that do not count, then `repeats` rounds of three."""
    with contextlib.ExitStack() as running:
        runners = []
        for kind in kinds:  # one starts when the last has compiled
            runner = running.enter_context(Runner(*kind, dtype))
            runners.append(runner)
            runner.step()
            runner.step()
            print(f"{runner.name}: first step {runner.seconds[0]:.1f} s", flush=True)
            runner.seconds.clear()
        for _ in range(repeats):
            for runner in runners:
                for _ in range(3):
                    runner.step()
    return runners


def measured_peak(name: str, compiled: bool, shape: Shape, folder: Path) -> int:
    """peak_memory, in bytes, of a process of its own."""
    given = f"{name!r}, {compiled}, bench.{shape}, {dtype!r}"
    found = run(["-c", f"import bench; print(bench.peak_memory({given}))"], folder)
    return int(found.printed.strip().splitlines()[-1])


def bench_growth(folder: Path) -> None:
    """Print how speed and memory of training change with context, batch and depth."""
    base, compiled = Shape(layers, hidden, batch, context), mode == "compiled"
    sweeps = {
        "context": [base.context * n // 2 for n in (1, 2, 4, 8)],
        "batch": [max(1, base.batch * n // 4) for n in (1, 2, 4, 8)],
        "layers": [max(1, base.layers * n // 2) for n in (1, 2, 4)],
    }
    shapes = {
        (name, n): dataclasses.replace(base, **{name: n})
        for name, numbers in sweeps.items()
        for n in numbers
    }
    each = list(dict.fromkeys(shapes.values()))
    speeds = {}
    for s in each:
        (runner,) = run_in_turn([("ours", compiled, s)])
        speeds[s] = s.batch * s.context / statistics.median(runner.seconds)
    peaks = {s: measured_peak("ours", compiled, s, folder) / 1e6 for s in each}
    print(f"\n{base}, {dtype}, {'compiled' if compiled else 'eager'}, one changed at a time")
    print("| changed | tokens/s | peak tensor MB |")
    print("|---|---|---|")
    for (name, n), shape in shapes.items():
        print(f"| {name} {n} | {speeds[shape]:,.0f} | {peaks[shape]:,.0f} |")
    if not png:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, (name, numbers) in enumerate(sweeps.items()):
        for row, (label, values) in enumerate((("tokens/s", speeds), ("peak MB", peaks))):
            axes = grid[row][column]
            axes.plot(numbers, [values[shapes[name, n]] for n in numbers], "o-")
            axes.set_ylim(0, 1.1 * max(values.values()))
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label)
        grid[1][column].set_xlabel(name)
        grid[1][column].set_xticks(numbers)
        grid[1][column].tick_params("x", labelsize=8)
    figure.suptitle(
        f"training: hidden {hidden}, else {base.layers} layers, batch {base.batch}, "
        f"context {base.context}; {dtype}, {'compiled' if compiled else 'eager'}"
    )
    figure.savefig(png, dpi=120)


def bench_save(folder: Path) -> None:
    """What a checkpoint every 25 updates costs a training run on the demo's config.

    Of each 25 updates the first 12, with the save and its writing, are compared with the next 12.
    """
    out = folder / "out"
    flags = [f"--out_dir={out}", f"--max_iters={updates}", "--warmup_iters=10", "--log_interval=1"]
    flags += ["--eval_iters=1", "--eval_interval=1000000", "--checkpoint_interval=25"]
    costs = []
    for i in range(repeats):
        run(["train.py", "config/train_demo.py", *flags], out)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ends = [r["elapsed_s"] for r in map(json.loads, lines) if "loss" in r]
        starts = range(25, len(ends) - 24, 25)
        for k in starts:
            more = (ends[k + 11] - ends[k - 1]) - (ends[k + 23] - ends[k + 11])
            costs.append(more / (ends[k + 24] - ends[k - 1]))
        print(f"{i + 1}/{repeats}  {len(starts)} saves, {ends[-1]:.1f} s", flush=True)
    low, middle, high = statistics.quantiles(costs, n=4)
    print(
        f"a save every 25 updates costs {middle:+.2%} of the time "
        f"(median of {len(costs)} saves; quartiles {low:+.2%}, {high:+.2%})"
    )


@dataclass
class Decoder:
    """A way to make text."""

    name: str
    generate: Callable[[Any, int], Sequence[int]]  # prompts (B, T), new tokens -> first row's
    weight_bytes: int  # read to make a token of every prompt
    batches: bool = True  # takes several prompts at once


def bench_ranks(folder: Path) -> None:
    """Two ranks on two cores against one rank on one core; the same updates of the same tokens."""
    import numpy as np

    os.environ["OMP_NUM_THREADS"] = "1"
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50000, 100_000).astype("<u2").tofile(
            folder / f"{split}.bin"
        )
    size = dataclasses.asdict(Shape(layers, hidden, batch, context).size)
    flags = [f"--{name}={value}" for name, value in size.items()]
    flags += [f"--dataset={folder}", f"--batch_size={batch}", "--compile=False", "--device=cpu"]
    flags += [f"--tokens_per_step={4 * batch * context}", f"--dtype={dtype}", "--log_interval=1"]
    flags += ["--max_iters=5", "--warmup_iters=1", "--eval_iters=1", "--overwrite=True"]
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for ranks, medians in speeds.items():
            out = folder / f"out{ranks}"
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            run([*start[: 4 * (ranks > 1)], "train.py", *flags, f"--out_dir={out}"], out)
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found = [r["tokens_per_s"] for r in map(json.loads, lines) if "loss" in r]
            medians.append(statistics.median(found[1:]))
            print(f"{ranks} ranks: {medians[-1]:,.0f} tokens/s", flush=True)
    ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
    print(f"two ranks have {ratio:.2f} times the speed of one (median of {repeats})")


def linear_bytes(model: Any) -> int:
    """Bytes of the weights that a token is multiplied by, whatever the layers are called."""
    weights = {id(m.weight): m.weight for m in model.modules() if "Linear" in type(m).__name__}
    return sum(w.numel() * w.element_size() for w in weights.values())


def our_decoders(model: Any) -> list[Decoder]:
    """sample.py's ways: as it is, and compiled; each in int8, too."""
    import runtime
    from quantization import quantize
    from sampling import compile_decode, for_few_rows

    int8 = copy.deepcopy(model)
    quantize(int8)
    for one in (model, int8):
        for_few_rows(one)
        runtime.use_huge_pages(one)
    found = []
    for kind, one in (("", model), (", int8", int8)):
        for how in ("eager", "compiled"):
            if mode not in (how, "both"):
                continue
            net = copy.copy(one)  # with the same tensors
            if how == "compiled" and (problem := compile_decode(net, new_tokens)):
                raise ValueError(f"{how} is not possible here: {problem}")

            def generate(ids: Any, n: int, net: Any = net) -> list[int]:
                row: list[int] = net.generate(ids, n, temperature=0)[0].tolist()
                return row[ids.size(1) :]

            found.append(Decoder(f"ours{kind}, {how}", generate, linear_bytes(one)))
    return found


def transformers_decoder(model: Any, folder: Path, number: Any) -> Decoder:
    """Its cached generate, with the same weights in the type `number`, on the same device."""
    import torch
    from transformers import LlamaForCausalLM

    import hf

    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    settings = json.dumps(hf.config_json(model.config, number, 0))
    (folder / "config.json").write_text(settings, encoding="utf-8")
    hf.write_weights(folder / "model.safetensors", weights, number)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=number, attn_implementation="sdpa")
    theirs.to(model.embed_tokens.weight.device)

    def generate(ids: Any, n: int) -> Sequence[int]:
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        row: list[int] = made[0, ids.size(1) :].tolist()
        return row

    return Decoder("transformers", generate, linear_bytes(theirs))


def peer_decoder(path: str, size: Any) -> Decoder:
    """The generate of another model.py, with random weights of its own."""
    import torch

    net = build(path, size)[0].eval().to(getattr(torch, dtype))

    def generate(ids: Any, n: int) -> Sequence[int]:
        with torch.no_grad():
            row: list[int] = net.generate(ids, n, top_k=1)[0, ids.size(1) :].tolist()
        return row

    return Decoder(Path(path).parent.name, generate, linear_bytes(net))


def llama_cpp_decoders(model: Any, folder: Path) -> list[Decoder]:
    """llama.cpp on the same weights, as they are and in 8 bits; none where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    import llama_cpp
    import torch

    import gguf_writer
    import hf
    from tokenizer import get_tokenizer

    tok = get_tokenizer("gpt2")
    tokens = hf.byte_level_bpe(json.loads(hf.tokenizer_json(tok)))
    assert tokens is not None
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][: tok.vocab_size]
    size = dataclasses.replace(model.config, vocab_size=tok.vocab_size)
    found = []
    for kind in (dtype, "q8_0"):
        path = folder / f"{kind}.gguf"
        gguf_writer.write(path, weights, size, tokens, tok.eot, kind, "random", "mit")
        context, threads = size.max_position_embeddings, torch.get_num_threads()
        llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

        def generate(ids: Any, n: int, llama: Any = llama) -> Sequence[int]:
            llama.reset()  # else a prompt seen before costs nothing
            stream = llama.generate(ids[0].tolist(), temp=0.0)
            return [token for _, token in zip(range(n), stream, strict=False)]

        found.append(Decoder(f"llama.cpp {kind}", generate, path.stat().st_size, batches=False))
    return found


def read_bandwidth() -> float:
    """Bytes/s at which this CPU sums up 256 MB in the pages of sample.py's weights; best of ten."""
    import torch

    import runtime

    block, times = torch.nn.Module(), []
    block.data = torch.nn.Buffer(torch.ones(1 << 26))
    runtime.use_huge_pages(block)
    for _ in range(10):
        t0 = time.perf_counter()
        block.data.sum()
        times.append(time.perf_counter() - t0)
    return 4 * block.data.numel() / min(times)


def bench_decode(folder: Path) -> None:
    """Print a table of the ways to make text for each of `cases`."""
    import torch

    from model import GPT

    shapes = [[int(n) for n in case.split("x")] for case in cases.split(",")]
    longest = max(prompt for _, prompt in shapes) + new_tokens
    torch.manual_seed(0)
    model = GPT(Shape(layers, hidden, 1, max(1024, longest)).size).eval()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(6)  # untouched, a model with a tied head repeats its last token for ever
    number = getattr(torch, dtype)
    model.to(number)
    decoders = [transformers_decoder(model, folder, number), *our_decoders(model)]
    decoders += [peer_decoder(path, model.config) for path in filter(None, peer.split(","))]
    decoders += llama_cpp_decoders(model, folder)
    bars = []
    for rows, prompt in shapes:
        fit = [d for d in decoders if d.batches or rows == 1]
        print(f"\n{rows} x {prompt} tokens, then {new_tokens} new ones", flush=True)
        times = decode_times(fit, torch.randint(0, 50257, (rows, prompt)), new_tokens)
        bars += decode_table(fit, times, rows, f"{rows} x {prompt}")
    picture(png, f"new tokens/s, {layers} layers, hidden {hidden}, {dtype}", bars)


def decode_times(decoders: list[Decoder], ids: Any, n: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds to the first token and to the n-th, in turn; the first row's tokens are compared."""
    texts = {d.name: d.generate(ids, n) for d in decoders}  # compiles
    times: dict[str, list[tuple[float, float]]] = {d.name: [] for d in decoders}
    for _ in range(repeats):
        for d in decoders:
            t0 = time.perf_counter()
            d.generate(ids, 1)
            t1 = time.perf_counter()
            d.generate(ids, n)
            times[d.name].append((t1 - t0, time.perf_counter() - t1))
    first = texts[decoders[0].name]
    for name, text in texts.items():
        same = next((i for i, (a, b) in enumerate(zip(text, first, strict=True)) if a != b), n)
        print(f"{name}: {same} of {n} tokens as {decoders[0].name}'s before the first other one")
    return times


def decode_table(
    decoders: list[Decoder], times: dict[str, list[tuple[float, float]]], rows: int, case: str
) -> list[tuple[str, float]]:
    """Print the table of one case; its bars. Ratios are medians over the rounds."""
    n, top, bars = new_tokens, read_bandwidth(), []
    reference = times[decoders[0].name]
    print(f"memory gives {top / 1e9:.1f} GB/s")
    print(
        "| way | first token, s | tokens/s | times transformers | after the first: tokens/s "
        "| times transformers | MB of weights a step | of memory's speed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for d in decoders:
        mine = times[d.name]
        first, whole = (statistics.median(t) for t in zip(*mine, strict=True))
        step = statistics.median((b - a) / (n - 1) for a, b in mine)
        ratio = statistics.median(b / y for (_, y), (_, b) in zip(mine, reference, strict=True))
        later = statistics.median(
            (b - a) / (y - x) for (x, y), (a, b) in zip(mine, reference, strict=True)
        )
        print(
            f"| {d.name} | {first:.2f} | {rows * n / whole:.1f} | {ratio:.2f} | {rows / step:.1f} "
            f"| {later:.2f} | {d.weight_bytes / 1e6:.0f} | {d.weight_bytes / step / top:.0%} |",
            flush=True,
        )
        bars.append((f"{d.name}, {case}", rows * n / whole))
    return bars


def picture(path: str, title: str, bars: list[tuple[str, float]]) -> None:
    """Draw labelled values as horizontal bars into a PNG; nothing without a path."""
    if not path:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([label for label, _ in bars], [value for _, value in bars])
    axes.bar_label(drawn, fmt="{:,.3g}", padding=2)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def bench_load(folder: Path) -> None:
    """Print what a batch of 12 x 1024 tokens costs, read in each way from 200 MB on disk."""
    import numpy as np
    import torch

    from dataloader import TokenData, TrainLoader, TrainOrder, split_windows

    rows, length, batches = 12, 1024, 80
    ids = np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16)
    ids.tofile(folder / "train.bin")
    torch.set_num_threads(1)
    data = TokenData(folder, "train", length, 50304)
    order = TrainOrder(data.tokens, length, 40 * rows * length, 0)
    loader = TrainLoader(data, order, 0, 1, torch.device("cpu"))
    kept = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")

    def stacked(bins: Any) -> Any:
        starts = torch.randint(len(bins) - length, (rows,))
        return [
            torch.stack(
                [torch.from_numpy(bins[i + k : i + k + length].astype(np.int64)) for i in starts]
            )
            for k in (0, 1)
        ]

    ways: dict[str, Callable[[int], Any]] = {
        "a memory map for each batch, rows stacked (EasyGPT, nanoGPT)": lambda i: stacked(
            np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        ),
        "one memory map, rows stacked": lambda i: stacked(kept),
        "ours, read": lambda i: loader.read(*divmod(i, 40), rows),
        "ours, read and widened to int64": lambda i: split_windows(
            loader.read(*divmod(i, 40), rows)
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(10 * repeats):
        for name, way in ways.items():
            t0 = time.perf_counter()
            for i in range(turn * batches, (turn + 1) * batches):
                way(i)
            times[name].append((time.perf_counter() - t0) / batches)
    first = next(iter(times.values()))
    print(f"{rows} x {length} tokens, one thread; medians of {10 * repeats} x {batches} batches")
    print("| way | microseconds | of the first |")
    print("|---|---|---|")
    for name, mine in times.items():
        share = statistics.median(a / b for a, b in zip(mine, first, strict=True))
        print(f"| {name} | {statistics.median(mine) * 1e6:.0f} | {share:.3f} |")
    picture(
        png, "microseconds a batch", [(k, statistics.median(v) * 1e6) for k, v in times.items()]
    )


def seconds_until(command: list[str], sign: str, environment: dict[str, str]) -> float:
    """From starting a script until `sign` stands in what it prints. Raises ValueError if never."""
    t0 = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        seen = b""
        while sign.encode() not in seen:
            more = process.stdout.read1()
            if not more:
                raise ValueError(f"{' '.join(command)} failed: {seen.decode()[-300:]}")
            seen += more
        seconds = time.perf_counter() - t0
        process.stdout.read()
    return seconds


def bench_startup(folder: Path) -> None:
    """Print the seconds to the first step and the first token, with a compiler's cache and without.

    The model is the demo's, its data the embedded corpus.
    """
    data, out = folder / "data", folder / "out"
    run(["data/prepare.py", "--source=stdlib", f"--dataset={data}"], data)
    train = ["train.py", "config/train_demo.py", f"--dataset={data}", f"--out_dir={out}"]
    train += ["--max_iters=1", "--warmup_iters=0", "--eval_iters=1", "--log_interval=1"]
    sample = ["sample.py", f"--out_dir={out}", "--num_samples=1"]
    sample += ["--max_new_tokens=1", "--device=cpu"]
    ways = {
        "python -c 'import torch'": (["-c", "import torch; print('ready')"], "ready"),
        "train.py": ([*train, "--compile=False"], "| loss"),
        "train.py --compile=True": ([*train, "--compile=True"], "| loss"),
        "sample.py": (sample, "tokens/s"),
        "sample.py --quantize=int8": ([*sample, "--quantize=int8"], "tokens/s"),
        "sample.py --compile=True": ([*sample, "--compile=True"], "tokens/s"),
    }
    bars = []
    print("| from typing it to its first step or token | first time, s | later, s |")
    print("|---|---|---|")
    for name, (command, sign) in ways.items():
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / name.replace(" ", "_"))}
        cold, *warm = (seconds_until(command, sign, cache) for _ in range(repeats + 1))
        later = statistics.median(warm)
        print(f"| {name} | {cold:.1f} | {later:.1f} |", flush=True)
        bars += [(f"{name}, first time", cold), (f"{name}, later", later)]
    picture(png, "seconds from typing to the first step or token", bars)


def bench_gpu(folder: Path) -> None:
    """Print a line of each step on a GPU when it is done, and tables at last."""
    from bench_gpu import run

    run(folder, steps, report, device, tiny)


def main() -> None:
    benches = {
        **{"prepare": bench_prepare, "train": bench_train, "decode": bench_decode},
        **{
            "growth": bench_growth,
            "load": bench_load,
            "startup": bench_startup,
            "save": bench_save,
            "ranks": bench_ranks,
            "gpu": bench_gpu,
        },
    }
    if what not in benches:
        raise ValueError(f"what must be {', '.join(benches)}, not {what!r}")
    if mode not in ("eager", "compiled", "both") or dtype not in ("float32", "bfloat16"):
        raise ValueError("mode must be eager, compiled or both, and dtype float32 or bfloat16")
    if new_tokens < 2 or not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", cases):
        raise ValueError(
            "new_tokens must be at least 2, and cases BATCHxPROMPT with commas between, not "
            f"{new_tokens} and {cases!r}"
        )
    if repeats < 1 or updates < 100 or num_proc < 1:
        raise ValueError("repeats and num_proc must be at least 1, and updates at least 100")
    with tempfile.TemporaryDirectory() as folder:
        benches[what](Path(folder))


if __name__ == "__main__":
    import runtime

    globals().update(configure(globals()))
    runtime.run(main)
