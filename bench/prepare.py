"""Text to tokens in three ways: python bench/prepare.py [--text=FILE.jsonl]

data/prepare.py stands against nanoGPT's recipe (datasets.map with
encode_ordinary for each document, then a memory map) and against tiktoken's
encode_ordinary_batch alone, on the same text with the same number of processes
or threads: MB/s, temporary disk, memory. GPT-2's vocabulary has to be where
tiktoken finds it (a network, or TIKTOKEN_CACHE_DIR).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import json
import random
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from bench.commands import Cost, run
from bench.rounds import in_turn, median, ratio
from bench.settings import check
from configurator import configure
from run import script
from text.files import path_of

text = ""  # a .jsonl of {"text": ...}; empty = the embedded corpus, repeated to 64 MB
num_proc = 2  # processes or threads of every way
repeats = 3  # times each way is run

RECIPE, OURS, ALONE = "nanoGPT's recipe", "data/prepare.py", "tiktoken alone"
CORPUS_BYTES, DOCUMENT_BYTES = 64e6, 5000


def write_corpus(path: Path) -> None:
    """The embedded corpus in random order, again and again, as a .jsonl.

    Several docstrings make a document, so that documents have OpenWebText's mean length.
    """
    from data.stdlib import stdlib_documents

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


def megabytes_of(source: Path) -> float:
    """MB of text in a .jsonl."""
    with source.open(encoding="utf-8") as f:
        return sum(len(json.loads(line)["text"].encode()) for line in f) / 1e6


def fresh(out: Path) -> Path:
    """The folder without anything in it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def prepared(source: Path, processes: int, out: Path) -> Cost:
    """What data/prepare.py takes."""
    flags = [f"--source={source}", f"--dataset={fresh(out)}", f"--num_proc={processes}"]
    return run(["data/prepare.py", *flags, "--tokenizer=gpt2", "--val_fraction=0.0005"], out)


def by_recipe(source: Path, processes: int, out: Path) -> Cost:
    """What nanoGPT's recipe takes."""
    command = ["-m", "bench.others", "nanogpt", str(source), str(processes), str(fresh(out))]
    return run(command, out)


def by_tiktoken(source: Path, processes: int, out: Path) -> Cost:
    """What tiktoken takes; the seconds are those of the encoding alone."""
    command = ["-m", "bench.others", "tiktoken", str(source), str(processes)]
    cost = run(command, fresh(out))
    return replace(cost, seconds=float(cost.printed.splitlines()[-1]))


class Bins(NamedTuple):
    """What a way has made."""

    size: int  # bytes of train.bin and val.bin together
    val: bytes


def bins_of(out: Path) -> Bins:
    """What is in a folder."""
    size = sum((out / f"{split}.bin").stat().st_size for split in ("train", "val"))
    return Bins(size, (out / "val.bin").read_bytes())


def print_table(costs: dict[str, list[Cost]], megabytes: float, made: dict[str, Bins]) -> None:
    """Medians of what has been measured."""
    seconds = {name: [c.seconds for c in found] for name, found in costs.items()}
    print(f"\n{megabytes:.3g} MB of text")
    print("| way | MB/s | times the recipe | peak disk / bins | MB of its largest process |")
    print("|---|---|---|---|---|")
    for name, found in costs.items():
        if found:
            speed, times = megabytes / median(seconds[name]), ratio(seconds[RECIPE], seconds[name])
            disk = max(c.disk for c in found) / made[RECIPE].size
            memory = max(c.memory for c in found) / 1e6
            print(f"| {name} | {speed:.1f} | {times:.2f} | {disk:.2f} | {memory:.0f} |")
    if costs[ALONE]:
        share = ratio(seconds[ALONE], seconds[OURS])
        print(f"\ndata/prepare.py, end to end, has {share:.0%} of the speed of tiktoken alone")


def main() -> None:
    check(repeats=repeats, num_proc=num_proc)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        if text:
            source = path_of(text).resolve()
            if not source.is_file():
                raise ValueError(f"text={text}: there is no file {source}; write a .jsonl's PATH")
        else:
            write_corpus(source)
        megabytes = megabytes_of(source)
        ways = {RECIPE: by_recipe, OURS: prepared, ALONE: by_tiktoken}
        calls = {name: partial(way, source, num_proc, out) for name, way in ways.items()}
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        made: dict[str, Bins] = {}
        try:
            for turn, name, cost in in_turn(calls, repeats):
                print(f"{turn}  {name}: {cost.seconds:.2f} s", flush=True)
                if name != ALONE:
                    made[name] = bins_of(out)
                costs[name].append(cost)
                if name == OURS and made[RECIPE] != made[OURS]:
                    raise ValueError("the two have made different bins")
        finally:
            print_table(costs, megabytes, made)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
