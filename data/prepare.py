"""Text to token files: python data/prepare.py [--source=...] makes data/<dataset>/train.bin.

With no arguments the source is OpenWebText from the Hugging Face Hub, with GPT-2's tokens.
--source=stdlib is the prose inside every Python installation: 2 MB of English, no download.
--source=PATH is your own text: a .txt, .jsonl or .parquet file, or a folder of them.

Each source file is tokenized by a worker into a part of its own; finished parts survive an
interruption. Then the parts become train.bin, val.bin and meta.json, each through a temp name.
"""

import ast
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

source = "hub:Skylion007/openwebtext"  # hub:NAME, stdlib, or a path
dataset = ""  # name of the folder under data/ to write, or a path; empty = from the source
tokenizer = "auto"  # gpt2, bytes, a path to a tokenizer.json; auto = gpt2, for stdlib bytes
text_column = "text"  # of .jsonl and .parquet
val_fraction = 0.0  # of the documents; 0 = 0.0005 as nanoGPT, 0.05 below 100,000 documents
seed = 2357  # of the split, nanoGPT's
num_proc = 0  # worker processes; 0 = one a core
overwrite = False  # prepare again what is already complete

KINDS = (".txt", ".jsonl", ".parquet")
OPENWEBTEXT_DOCUMENTS = 8_013_769
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_documents() -> Iterator[str]:
    """The help topics of pydoc and every docstring of the standard library, repeats left out.

    Files are read with ast, nothing is imported or run. Raises FileNotFoundError where Python
    comes without its .py files (the embeddable one for Windows).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        p
        for p in folder.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(p.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .py files, so this Python has no docstrings to read; "
            "use a full installation, or --source=PATH with a text of your own"
        )
    from pydoc_data.topics import topics

    seen = set()
    for text in [text for _, text in sorted(topics.items())] + list(docstrings(files)):
        text = inspect.cleandoc(text).strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def docstrings(files: list[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions, in the order of the files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def file_documents(path: Path, column: str) -> Iterator[str]:
    """The documents of a file: a .txt is one, .jsonl and .parquet hold one a row.

    Raises ValueError naming the file, and the line where there is one.
    """
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield text_of(json.loads(line), column, f"{path} line {number}")
        else:
            yield from parquet_documents(path, column)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {number}: not JSON ({e.msg})") from e


def text_of(row: object, column: str, where: str) -> str:
    """The text of a row. Raises ValueError that lists the columns there are."""
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text in column {column!r} (there: {there}); --text_column=?")
    return text


def parquet_documents(path: Path, column: str) -> Iterator[str]:
    """The texts of a parquet file, a thousand rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {column!r}; it has {', '.join(table.schema_arrow.names)}: "
                "set --text_column"
            )
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield text or ""
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} is truncated or not a parquet file ({e})") from e


def source_files(name: str) -> list[Path]:
    """The files of a path in name order. Raises OSError or ValueError when there are none."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(f"{path} must be one of {', '.join(KINDS)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no source {name!r}: give hub:NAME, stdlib, a file or a folder")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in KINDS)
    if not files:
        raise ValueError(f"{path} holds no {', '.join(KINDS)} files")
    return files


def hub_files(name: str) -> list[Path]:
    """The parquet files of a Hub dataset's training split, downloaded to its cache."""
    try:
        from huggingface_hub import HfApi, hf_hub_download

        listed = HfApi().list_repo_files(name, repo_type="dataset")
        shards = sorted(f for f in listed if f.endswith(".parquet") and "train" in f)
        if not shards:
            raise ValueError(f"the Hub dataset {name} has no train*.parquet files")
        return [Path(hf_hub_download(name, f, repo_type="dataset")) for f in tqdm(shards)]
    except (OSError, RuntimeError) as e:  # huggingface_hub's errors are OSError or httpx's
        raise OSError(
            f"cannot get {name} from the Hub ({type(e).__name__}); set HF_ENDPOINT to a mirror, or "
            f"download it elsewhere and give --source=FOLDER; --source=stdlib needs no network"
        ) from e


def encode_part(
    path: Path | None, part: Path, name: str, json_text: str | None, column: str, halves: bool
) -> tuple[int, int]:
    """Tokenize one source file (None: the embedded corpus) into `part`; documents and tokens.

    Writes part.bin (ids), part.lengths (uint32 tokens of each document) and last part.json,
    which says that the part is complete. `halves` cuts a lone document in two for the split.
    """
    tok = get_tokenizer(name, json_text=json_text)
    dtype = dtype_of(tok.vocab_size)
    lengths, byte_counts, largest = [], [], 0
    texts = stdlib_documents() if path is None else file_documents(path, column)
    if halves:
        (text,) = texts
        cut = text.rfind("\n", 0, int(len(text) * 0.95)) + 1 or int(len(text) * 0.95)
        texts = iter((text[:cut], text[cut:]))
    with part.with_suffix(".bin").open("wb") as f:
        for text in texts:
            ids = np.array([*tok.encode(text), tok.eot], dtype=dtype)
            f.write(ids.tobytes())
            lengths.append(len(ids))
            byte_counts.append(len(text.encode("utf-8", errors="replace")))
            largest = max(largest, int(ids.max()))
    np.array([lengths, byte_counts], dtype="<u4").tofile(part.with_suffix(".lengths"))
    facts = {"documents": len(lengths), "tokens": sum(lengths), "max_id": largest}
    write_text(part.with_suffix(".json"), json.dumps(facts))
    return len(lengths), sum(lengths)


def dtype_of(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temp = path.with_name(path.name + ".tmp")
    with temp.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


class Bin:
    """A token file under a temporary name, with its hash; `done` puts it in place."""

    def __init__(self, path: Path) -> None:
        self.path, self.temp = path, path.with_name(path.name + ".tmp")
        self.file = self.temp.open("wb")
        self.sha256 = hashlib.sha256()
        self.facts = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0}

    def add(self, ids: np.ndarray[Any, Any], documents: int, text_bytes: int) -> None:
        data = ids.tobytes()
        self.file.write(data)
        self.sha256.update(data)
        facts = self.facts
        facts["tokens"] += len(ids)
        facts["documents"] += documents
        facts["bytes"] += text_bytes
        facts["max_id"] = max(facts["max_id"], int(ids.max(initial=0)))

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"files": [self.path.name], **self.facts, "sha256": self.sha256.hexdigest()}

    def done(self) -> None:
        os.replace(self.temp, self.path)


def val_documents(n: int, fraction: float, split_seed: int) -> np.ndarray[Any, Any]:
    """Which documents are for validation, in the order in which val.bin holds them.

    As datasets.train_test_split(test_size=fraction, seed=split_seed, shuffle=True) chooses them.
    """
    return np.random.default_rng(split_seed).permutation(n)[: math.ceil(fraction * n)]


def assemble(
    parts: list[Path], out: Path, dtype: str, fraction: float
) -> tuple[dict[str, Any], list[Bin], float]:
    """Parts to train.bin and val.bin under temporary names: splits for meta.json, files, fraction.

    Validation documents stand in the split's order, training documents in the source's (the
    loader shuffles). A part is deleted as soon as it has been copied, so that the disk holds
    little more than the tokens once.
    """
    tables = [np.fromfile(p.with_suffix(".lengths"), dtype="<u4").reshape(2, -1) for p in parts]
    n = sum(t.shape[1] for t in tables)
    if n == 0:
        raise ValueError("the source has no documents")
    fraction = fraction or (0.0005 if n >= 100_000 else 0.05)
    chosen = np.array([1]) if n == 2 else val_documents(n, fraction, seed)
    place = {int(doc): i for i, doc in enumerate(chosen)}
    held: list[tuple[np.ndarray[Any, Any], int] | None] = [None] * len(place)
    train, val, first = Bin(out / "train.bin"), Bin(out / "val.bin"), 0
    for part, (lengths, byte_counts) in zip(parts, tables, strict=True):
        tokens = np.fromfile(part.with_suffix(".bin"), dtype=dtype)
        ends = np.cumsum(lengths, dtype=np.int64)
        if len(tokens) != (ends[-1] if len(ends) else 0):
            raise ValueError(f"{part.with_suffix('.bin')} is damaged; delete it and start again")
        keep = np.ones(len(tokens), dtype=bool)
        mine = [i for i in range(len(lengths)) if first + i in place]
        for i in mine:
            span = slice(int(ends[i]) - int(lengths[i]), int(ends[i]))
            held[place[first + i]] = tokens[span].copy(), int(byte_counts[i])
            keep[span] = False
        text_bytes = int(byte_counts.sum(dtype=np.int64)) - sum(int(byte_counts[i]) for i in mine)
        train.add(tokens[keep], len(lengths) - len(mine), text_bytes)
        first += len(lengths)
    for item in held:
        assert item is not None
        val.add(item[0], 1, item[1])
    return {"train": train.close(), "val": val.close()}, [val, train], fraction


def main() -> None:
    hub = source.removeprefix("hub:") if source.startswith("hub:") else ""
    stem = hub.split("/")[-1] if hub else Path(source).stem
    named = dataset or stem
    out = Path(named) if "/" in named or os.sep in named else ROOT / "data" / named
    name = tokenizer
    if name == "auto":
        name = "bytes" if source == "stdlib" else "gpt2"
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    made = out / "meta.json"
    if made.exists() and (out / "train.bin").exists() and not overwrite:
        meta = json.loads(made.read_text(encoding="utf-8"))
        if meta.get("source") != source:
            raise ValueError(
                f"{out} holds {meta.get('source')!r}; choose another --dataset, or --overwrite=True"
            )
        print(f"{out} is complete already (--overwrite=True prepares it again)")
        return
    tok = get_tokenizer(name)  # fails early, with the way out
    files: list[Path | None] = [None]  # the embedded corpus
    if source != "stdlib":
        files = [*(hub_files(hub) if hub else source_files(source))]
    halves = len(files) == 1 and files[0] is not None and files[0].suffix == ".txt"

    work = out / "parts"
    work.mkdir(parents=True, exist_ok=True)
    parts = [work / f"{i:05d}" for i in range(len(files))]
    missing = [i for i, p in enumerate(parts) if not p.with_suffix(".json").exists()]
    documents = tokens = 0
    jobs = [(files[i], parts[i], name, tok.json_text, text_column, halves) for i in missing]
    bar = tqdm(total=len(files), initial=len(files) - len(jobs), unit="file", disable=None)
    if len(jobs) == 1:
        encode_part(*jobs[0])
    elif jobs:
        context = multiprocessing.get_context("spawn")  # the same on every system
        workers = min(num_proc or os.cpu_count() or 1, len(jobs))
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for done in as_completed([pool.submit(encode_part, *job) for job in jobs]):
                documents, tokens = documents + done.result()[0], tokens + done.result()[1]
                bar.set_postfix(documents=f"{documents:,}", tokens=f"{tokens:,}")
                bar.update()
    bar.close()

    splits, bins, fraction = assemble(parts, out, dtype_of(tok.vocab_size), val_fraction)
    count = splits["train"]["documents"] + splits["val"]["documents"]
    if "openwebtext" in source.lower() and hub and count != OPENWEBTEXT_DOCUMENTS:
        print(f"WARNING: {count:,} documents, but OpenWebText has {OPENWEBTEXT_DOCUMENTS:,}")
    if tok.json_text is not None:
        write_text(out / "tokenizer.json", tok.json_text)
    meta = {
        "format": 1,
        "tokenizer": tok.name,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "dtype": "uint16" if tok.vocab_size <= 2**16 else "uint32",
        "source": source,
        "revision": None,
        "split_seed": seed,
        "val_fraction": fraction,
        "partial": False,
        "splits": splits,
    }
    # meta.json first: bins without the right one would be taken for GPT-2 tokens
    write_text(made, json.dumps(meta, indent=2) + "\n")
    for file in bins:
        file.done()
    for path in [*work.iterdir()]:
        path.unlink()
    work.rmdir()
    for split, facts in splits.items():
        print(f"{out / split}.bin: {facts['tokens']:,} tokens, {facts['documents']:,} documents")


if __name__ == "__main__":
    globals().update(configure(globals()))
    try:
        main()
    except (ValueError, OSError) as e:
        if sys.flags.dev_mode:
            raise
        print(f"prepare.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
