"""Measure the project on this machine: python bench.py --what=prepare

Timings are noisy, so variants are run in turn, A B A B, and medians and ratios are printed.

prepare: data/prepare.py against nanoGPT's recipe (datasets.map with encode_ordinary per document,
    then a memory map) and against tiktoken's encode_ordinary_batch alone, on the same text with
    the same number of processes or threads: MB/s, temporary disk, memory. Needs GPT-2's
    vocabulary where tiktoken finds it (a network, or TIKTOKEN_CACHE_DIR).
train: training steps of this model against transformers' Llama of the same shape and --peer's
    models: tokens/s, share of the speed of a large matrix product, peak memory of tensors.
save: updates of the demo's training with a checkpoint among them against updates without.
"""

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The model, torch and datasets are imported where they are used: variants are new processes.
from configurator import configure

what = "prepare"  # what to measure; see above
repeats = 3  # times each variant is run
text = ""  # prepare: a .jsonl of {"text": ...}; empty = the embedded corpus, repeated to 64 MB
num_proc = 2  # prepare: processes or threads of every variant
peer = ""  # train: paths of other model.py files, EasyGPT's or nanoGPT's, with commas between
mode = "both"  # train: eager, compiled or both
dtype = "float32"  # train: or bfloat16, by autocast
layers = 6  # train
hidden = 384  # train
batch = 4  # train: windows in a step
context = 256  # train: tokens in a window
steps = 600  # save: updates of a run

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
        return model, lambda net, x, y: net(x, y)[1]
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

        from model import configure_optimizer

        self.name = f"{Path(name).parent.name if name.endswith('.py') else name}, " + (
            "compiled" if compiled else "eager"
        )
        self.model, self.loss = build(name, shape.size)
        if hasattr(self.model, "configure_optimizers"):
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        else:
            self.optimizer = configure_optimizer(self.model, 1e-3, (0.9, 0.95), 0.1)
        self.net = torch.compile(self.model) if compiled else self.model
        self.x = torch.randint(0, 50257, (shape.batch, shape.context))
        self.y = torch.randint(0, 50257, (shape.batch, shape.context))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.seconds: list[float] = []

    def step(self) -> None:
        """Forward, backward, clip, update."""
        import torch

        import runtime

        runtime.keep_less(self.name.startswith("ours"))  # read by the first step, which compiles
        t0 = time.perf_counter()
        with self.autocast:
            loss = self.loss(self.net, self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - t0)


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
    trainers = [Trainer(n, compiled, shape, dtype) for compiled in modes for n in names]
    for trainer in trainers:
        trainer.step()
        trainer.step()
        print(f"{trainer.name}: first step {trainer.seconds[0]:.1f} s", flush=True)
        trainer.seconds.clear()
    for _ in range(repeats):
        for trainer in trainers:
            for _ in range(3):
                trainer.step()
    flops = flops_per_token(GPT(shape.size)) * batch * context
    top = matmul_peak(dtype)
    print(f"\n{shape}, {dtype}; median of {3 * repeats} steps, in turn")
    print("| model | tokens/s | times the last | of matmul peak | peak tensor MB |")
    print("|---|---|---|---|---|")
    last = trainers[-1].seconds
    for trainer, (compiled, name) in zip(
        trainers, [(c, n) for c in modes for n in names], strict=True
    ):
        seconds = statistics.median(trainer.seconds)
        ratio = statistics.median(b / a for a, b in zip(trainer.seconds, last, strict=True))
        given = f"{name!r}, {compiled}, bench.{shape}, {dtype!r}"
        call = f"import bench; print(bench.peak_memory({given}))"
        peak = int(run(["-c", call], folder).printed.splitlines()[-1]) / 1e6
        print(
            f"| {trainer.name} | {batch * context / seconds:,.0f} | {ratio:.2f} | "
            f"{flops / seconds / top:.0%} | {peak:,.0f} |",
            flush=True,
        )


def bench_save(folder: Path) -> None:
    """What a checkpoint every 25 updates costs a training run on the demo's config.

    One run saves every 50 updates: 25 updates with a save are compared with the 25 after them.
    """
    out = folder / "out"
    flags = [f"--out_dir={out}", f"--max_iters={steps}", "--warmup_iters=10", "--log_interval=1"]
    flags += ["--eval_iters=1", "--eval_interval=1000000", "--checkpoint_interval=50"]
    costs = []
    for i in range(repeats):
        run(["train.py", "config/train_demo.py", *flags], out)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ends = [r["elapsed_s"] for r in map(json.loads, lines) if "loss" in r]
        blocks = [ends[k + 24] - ends[k - 1] for k in range(50, len(ends) - 24, 25)]
        pairs = list(zip(blocks[::2], blocks[1::2], strict=False))
        costs += [with_save / without - 1 for with_save, without in pairs]
        print(f"{i + 1}/{repeats}  {len(pairs)} pairs, {ends[-1]:.1f} s", flush=True)
    low, middle, high = statistics.quantiles(costs, n=4)
    print(
        f"a save every 25 updates costs {middle:+.2%} of the time "
        f"(median of {len(costs)} pairs; quartiles {low:+.2%}, {high:+.2%})"
    )


def main() -> None:
    benches = {"prepare": bench_prepare, "save": bench_save, "train": bench_train}
    if what not in benches:
        raise ValueError(f"what must be {', '.join(benches)}, not {what!r}")
    if mode not in ("eager", "compiled", "both") or dtype not in ("float32", "bfloat16"):
        raise ValueError("mode must be eager, compiled or both, and dtype float32 or bfloat16")
    if repeats < 1 or steps < 100 or num_proc < 1:
        raise ValueError("repeats and num_proc must be at least 1, and steps at least 100")
    with tempfile.TemporaryDirectory() as folder:
        benches[what](Path(folder))


if __name__ == "__main__":
    import runtime

    globals().update(configure(globals()))
    runtime.run(main)
