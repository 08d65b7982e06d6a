"""Other ways from text to tokens: python -m bench.others nanogpt|tiktoken FILE COUNT [OUT]"""

import json
import sys
import time

import numpy as np
import tiktoken


def nanogpt(source: str, processes: int, out: str) -> None:
    """The recipe of nanoGPT's data/openwebtext/prepare.py, on a .jsonl instead of the Hub."""
    from datasets import load_dataset  # seconds, and memory that the other way does not need

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


def tiktoken_alone(source: str, threads: int) -> None:
    """Print the seconds that encode_ordinary_batch takes for all documents of a .jsonl."""
    encoding = tiktoken.get_encoding("gpt2")
    with open(source, encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f]
    t0 = time.perf_counter()
    for i in range(0, len(texts), 1000):
        encoding.encode_ordinary_batch(texts[i : i + 1000], num_threads=threads)
    print(time.perf_counter() - t0)


if __name__ == "__main__":
    kind, path, count, *rest = sys.argv[1:]
    if kind == "nanogpt":
        nanogpt(path, int(count), *rest)
    else:
        tiktoken_alone(path, int(count))
