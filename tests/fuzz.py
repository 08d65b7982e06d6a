"""What reads files of strangers, handed damaged ones: python tests/fuzz.py --minutes=60

Each target has valid files and a function that reads them. Whatever bytes the files have, the
function may only succeed, with what a caller can use, or raise a ValueError or OSError whose text
is one line that names the file; in bounded time and memory.

tests/test_fuzz.py tries a few inputs of each in the suite. This command tries as many as there is
time for, each time others, in processes of their own; it prints the seeds, and keeps the files of
every failure.

    python tests/fuzz.py --minutes=60 --targets=arrow,tokenizer --keep=FOLDER
    python tests/fuzz.py --again=FOLDER/arrow-1     one failure again
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import keyword
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hostile
import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings

import configurator
import evaluate
import export
from bench import gpu_report
from data import parts, prepare, readers, sources, verify, workers
from formats import hf, pretrained, sharded
from model import GPT, GPTConfig
from run import curve, optim, picture, records, start
from run import folder as run_folder
from run import settings as run_settings
from run.machine import find_machine
from run.microbatch import windows_of_rank
from run.team import join
from text import batches
from text.chat import CHATML, Template, with_chat
from text.files import line_of, printable
from text.packing import marked
from text.tokenizer import chat_entry, get_tokenizer, of_dataset
from text.tokens import ID, read_meta
from text.turns import Turn

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SECONDS = 10  # that reading an input may take
READING = parts.Reading()
TALKS = parts.Reading(chat=True)
MEMORY, PER_BYTE = 200 * MIB, 4  # that it may take, and more for each byte of the input
LINE = 2000  # characters of a message
SLICE = 30  # seconds that a target has before the next one, in a long run
SIZE = GPTConfig(300, 8, 16, 1, 2, 1, 4, 32)


class Target(NamedTuple):
    """Valid folders, as bytes by file name; suffixes of the files to hurt; what reads a folder.

    names: words of which an error's text may hold one instead of the folder; mend: what a
    stranger would put right after the damage, such as checksums.
    """

    seeds: Callable[[], list[dict[str, bytes]]]
    hurt: tuple[str, ...]
    read: Callable[[Path], object]
    names: tuple[str, ...] = ()
    mend: Callable[[dict[str, bytes]], dict[str, bytes]] | None = None


# --- valid files


def written(write):
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        paths = sorted(p for p in Path(name).rglob("*") if p.is_file())
        return {p.relative_to(name).as_posix(): p.read_bytes() for p in paths}


def as_json(value):
    return json.dumps(value).encode()


TEXT = "The cat sat on the mat, and the dog's 42 fleas sat on the log.\n" * 3
TEXTS = ["one", "two words", "three \ud83d\ude00 é\n", TEXT]


def model_of(size=SIZE):
    torch.manual_seed(0)
    return GPT(size)


def tokenizer_jsons():
    """tokenizer.json of each kind that people use, small."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    eot = ["<|endoftext|>"]
    quiet = {"special_tokens": eot, "show_progress": False}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, **quiet)
    )
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unknown = {"unk_token": "<unk>", "special_tokens": ["<unk>", *eot], "show_progress": False}
    unigram.train_from_iterator([TEXT], trainers.UnigramTrainer(vocab_size=60, **unknown))
    llama = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    llama.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    llama.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("'", "isolated")]
    )
    words.train_from_iterator(
        [TEXT], trainers.WordLevelTrainer(special_tokens=["<unk>", "[EOS]"], show_progress=False)
    )
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(
        [TEXT],
        trainers.WordPieceTrainer(
            vocab_size=80, special_tokens=["[UNK]", "[EOS]"], show_progress=False
        ),
    )
    ours = hf.tokenizer_json(get_tokenizer("bytes"))
    made = [t.to_str().encode() for t in (bpe, unigram, llama, words, pieces)]
    return [*made, ours.encode()]


def hf_folders():
    model = model_of()
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    [first, *_] = tokenizer_jsons()
    eot = json.loads(first)["added_tokens"][0]["id"]

    def write(folder):
        config = hf.config_json(SIZE, torch.float32, {"eos_token_id": eot})
        (folder / "config.json").write_bytes(as_json(config))
        (folder / "generation_config.json").write_bytes(as_json({"eos_token_id": [eot, 5]}))
        (folder / "tokenizer.json").write_bytes(first)
        tok = get_tokenizer("tokenizer.json", folder)
        more = hf.tokenizer_config(tok, json.loads(first), 32)
        (folder / "tokenizer_config.json").write_bytes(as_json(more))
        hf.write_weights(folder / "model.safetensors", weights, torch.float32)

    whole = written(write)
    half = len(weights) // 2
    parts = {k: v for k, v in whole.items() if k != "model.safetensors"}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    table = {}
    for name, some in zip(names, (list(weights)[:half], list(weights)[half:]), strict=True):
        one = written(
            lambda f, some=some: hf.write_weights(
                f / "x", {k: weights[k] for k in some}, torch.bfloat16
            )
        )
        parts[name] = one["x"]
        table |= {f"model.{k}": name for k in some}
    parts["model.safetensors.index.json"] = as_json({"metadata": {}, "weight_map": table})
    return [whole, parts]


META = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "request": {}}


def token_folders():
    """Of data/prepare.py, whole and in parts, of llm.c and of datatrove."""
    ids = np.array([*TEXT.encode(), 256] * 2)
    splits = {}
    for split in ("train", "val"):
        splits[split] = {"tokens": len(ids), "bytes": 2 * len(TEXT), "documents": 2, "max_id": 256}
    flat = ids.astype("<u2").tobytes()
    made = {"meta.json": as_json(META | {"splits": splits})}
    made |= {"train.bin": flat, "val.bin": flat}
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    llmc = {
        f"{split}_{i}.bin": header.tobytes() + flat for split in ("train", "val") for i in (9, 10)
    }
    wide = {"meta.json": as_json(META | {"dtype": "uint32", "splits": {}})}
    wide |= {f"{split}.bin": ids.astype("<u4").tobytes() for split in ("train", "val")}
    trove = {}
    for split in ("train", "val"):
        trove |= {
            f"{split}/00000_shard.ds": flat,
            f"{split}/00000_shard.ds.metadata": f"gpt2|2\n{len(ids)}\n1 KT".encode(),
            f"{split}/logs/executor.json": as_json({"world_size": 1}),
            f"{split}/logs/completions/00000": b"",
        }
    parts = META | {"parts": 2, "val_fraction": 0.1, "split_seed": 1, "splits": {}}
    shares = {"meta.json": as_json(parts)}
    table = np.array([[len(TEXT) + 1, len(TEXT)]] * 2, dtype="<u2").tobytes()
    for i in range(2):
        facts = {"part": {}, "documents": 2, "tokens": len(ids), "index": "<u2", "width": 2}
        shares |= {f"parts/{i:05d}.json": as_json(facts), f"parts/{i:05d}.index": table}
        shares[f"parts/{i:05d}.bin"] = flat
    return [made, llmc, wide, trove, shares]


ROWS = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)).encode()


def parquets():
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [t.encode("utf-16", "surrogatepass").decode("utf-16") for t in TEXTS]
    columns = [
        (pa.array(texts), {}),
        (pa.array(texts * 30), {"row_group_size": 7, "compression": "zstd"}),
        (pa.array(texts).dictionary_encode(), {"compression": "gzip"}),
        (
            pa.array([*texts, None], pa.large_string()),
            {"compression": "lz4", "write_statistics": True},
        ),
        (pa.array([[t] for t in texts]), {"compression": "none"}),
        (pa.array([b"\xff", b"a"]), {"data_page_version": "2.0", "use_dictionary": False}),
        (pa.array([1, 2]), {"compression": "brotli"}),
        (pa.array([{"a": "b"}]), {"store_schema": False}),
    ]
    found = []
    for column, flags in columns:
        out = io.BytesIO()
        pq.write_table(pa.table({"text": column, "n": list(range(len(column)))}), out, **flags)
        found.append({"a.parquet": out.getvalue()})
    return found


def arrows():
    import pyarrow as pa

    texts = [t.encode("utf-16", "surrogatepass").decode("utf-16") for t in TEXTS]
    columns = [
        pa.array(texts),
        pa.array([*texts, None], pa.large_string()),
        pa.array(texts).dictionary_encode(),
        pa.array(texts).cast(pa.string_view()),
        pa.array([[t] for t in texts]),
        pa.array([{"a": "b"}]),
        pa.array([1, None]),
        pa.array([b"\xff", b"a"]),
        pa.array([None]),
    ]
    found = []
    for i, column in enumerate(columns):
        table = pa.table({"text": column, "n": list(range(len(column)))})
        out = pa.BufferOutputStream()
        kind = pa.ipc.new_stream if i % 2 else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression=[None, "lz4", "zstd"][i % 3])
        with kind(out, table.schema, options=options) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
        found.append({"a.arrow": out.getvalue().to_pybytes()})
    return found


def tar_of(members):
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"comment": name}
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def archives():
    import gzip
    import lzma

    inner = tar_of([("a.txt", TEXT.encode()), ("b.txt", b"two\n\n\n\nlines")])
    whole = tar_of([("x/" + "long" * 40 + ".xz", lzma.compress(inner)), ("c.txt", b"three")])
    made = {
        ".tar": whole,
        ".tar.xz": lzma.compress(whole),
        ".tar.gz": gzip.compress(whole, mtime=0),
    }
    made[".xz"] = lzma.compress(inner)
    splits = [("d/train.txt", b"one"), ("d/test.tar", inner), ("d/README.md", b"about")]
    made[".tgz"] = gzip.compress(tar_of(splits), mtime=0)
    return [{f"a{suffix}": data} for suffix, data in made.items()]


def lines():
    import gzip

    made = {
        ".jsonl": ROWS,
        ".jsonl.gz": gzip.compress(ROWS, mtime=0),
        ".jsonl.zst": hostile.zstd(ROWS),
    }
    return [{f"a{suffix}": data} for suffix, data in made.items()]


def talks():
    """Conversations in all their forms, as rows of JSON, of a table and of Arrow."""
    import pyarrow
    import pyarrow.parquet

    asked, said = {"role": "user", "content": "Hi <|im_end|>"}, {"role": "gpt", "content": ""}
    parts_of = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}
    rows = [
        {"messages": [{"role": "system", "content": "Be."}, asked, parts_of, asked, said]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
        {"messages": json.dumps([asked, said])},
    ]
    packed = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"messages": [asked, said]}] * 3)
    pyarrow.parquet.write_table(table, packed)
    lines = b"".join(as_json(row) + b"\n" for row in rows)
    csv = b'question,answer,history\na,b,\n"c\nd",e,"[[""f"", ""g""]]"\n'
    files = {
        "a.jsonl": lines,
        "a.json": as_json(rows),
        "a.csv": csv,
        "a.parquet": packed.getvalue(),
    }
    return [{name: data} for name, data in files.items()]


CHAT = with_chat(get_tokenizer("bytes"))
TEMPLATES = (
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ '[' + m.role + ']' + m.content | trim }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}",
)


def talk_folders():
    """Of data/prepare.py --chat=True."""
    turns = [
        Turn("user", "Hi"),
        Turn("assistant", "Hello."),
        Turn("user", "a"),
        Turn("assistant", "b"),
    ]
    words = np.concatenate([marked(*Template(CHAT).encode(turns)), np.array([CHAT.eot])] * 3)
    flat = words.astype("<u4").tobytes()
    facts = {"tokens": len(words), "bytes": 9, "documents": 3, "max_id": 258, "counted": 30}
    meta = META | {"vocab_size": 259, "dtype": "uint32", "eot": 256}
    meta |= {"chat": chat_entry(CHAT.chat), "splits": {"train": facts, "val": facts}}
    return [{"meta.json": as_json(meta), "train.bin": flat, "val.bin": flat}]


def templates():
    """A tokenizer with a chat template beside it, as models of Hugging Face's have it."""
    tokenizer = tokenizer_jsons()[0]
    return [
        {
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": as_json({"eos_token": "<|endoftext|>", "chat_template": text}),
        }
        for text in TEMPLATES
    ]


def rows_of_tables():
    """csv, tsv, json as a list and as one object after another, and zips of them and others."""
    import zipfile

    table = "n,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS[:2]))
    rows = [json.loads(line) for line in ROWS.splitlines()]
    found = [{"a.csv": table.encode()}, {"a.tsv": table.replace(",", "\t").encode()}]
    found += [{"a.json": as_json(rows)}, {"a.json": ROWS}, {"a.json": as_json(rows[0])}]
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", packed) as archive:
            for name, data in {"a.csv": table, "b/c.txt": TEXT, "d.jsonl": ROWS}.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        found.append({"a.zip": out.getvalue()})
    return found


def characters_of():
    """nanoGPT's character data."""
    import pickle

    letters = sorted({*TEXT})
    ids = {c: i for i, c in enumerate(letters)}
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": ids}
    flat = np.array([ids[c] for c in TEXT], "<u2").tobytes()
    made = {"train.bin": flat, "val.bin": flat}
    return [made | {"meta.pkl": pickle.dumps(meta, p)} for p in (0, 2, 4)]


def plain():
    import gzip

    data = ("\ufeff" + TEXT).encode()
    return [{"a.txt": data}, {"a.txt.gz": gzip.compress(data, mtime=0)}]


def run_records():
    rows = [{"iter": i, "tokens": 100 * i, "loss": 5.0 - i, "lr": 1e-3} for i in range(4)]
    rows = [{**r, "grad_norm": 1.0, "tokens_per_s": 10.0, "mfu": 0.1} for r in rows]
    rows += [{"iter": i, "tokens": 100 * i, "val_loss": 5.0 - i} for i in range(0, 4, 2)]
    return [{"metrics.jsonl": b"".join(as_json(r) + b"\n" for r in rows)}]


def state_of(model, tokenizer, name="adamw"):
    optimizer = optim.configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1, name)
    x = torch.zeros(1, 4, dtype=torch.int64)
    model(x, x)[1].backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = start.TrainState(iter_num=3)
    config = {"batch_size": 4, "init_from": "scratch", "eval_iters": 0, "eval_windows": 8}
    config |= {"dataset": "x", "learning_rate": 1e-3, "optimizer": name}
    splits = {"train": {"tokens": 100, "documents": 2, "bytes": 99}}
    facts = {"config": config, "data": splits, "dtype": "torch.float32", "tokenizer": tokenizer}
    return start.contents(model, optimizer, scaler, state, facts)


def checkpoints():
    [first, *_] = tokenizer_jsons()
    ours = {"name": "bytes", "vocab_size": 257, "json": None}
    theirs = {"name": "tokenizer.json", "vocab_size": 290, "json": first.decode()}
    untied = GPTConfig(**{**vars(SIZE), "tie_word_embeddings": False, "attention_bias": True})
    found = []
    for size, tokenizer, name in ((SIZE, ours, "muon"), (untied, theirs, "adamw")):
        out = io.BytesIO()
        torch.save(state_of(model_of(size), tokenizer, name), out)
        found.append({"ckpt_3.pt": out.getvalue()})
    return found


def checkpoints_in_parts():
    """Checkpoints in parts, as ranks write them."""
    import torch.distributed as dist

    model = model_of()
    state = state_of(model, {"name": "bytes", "vocab_size": 257, "json": None})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        writer = sharded.Writer()
        save = lambda f: writer.save(f / "ckpt_3.shards", writer.copy(state))  # noqa: E731
        return [written(save)]
    finally:
        dist.destroy_process_group()


def summed(files):
    """Parts whose rest.json has their sizes and checksums."""
    files = dict(files)
    [name] = [n for n in files if n.endswith("rest.json")]
    there = {Path(n).name: (len(d), zlib.crc32(d)) for n, d in files.items() if n != name}
    with contextlib.suppress(ValueError, RecursionError):
        rest = json.loads(files[name])
        if isinstance(rest, dict):
            files[name] = as_json(rest | {"files": there})
    return files


def items():
    swag = {"activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "label": "1"}
    swag["endings"] = ["eats. [title] It [x] is", "sleeps"]
    last = {"text": "the cat sat on the mat"}
    return [
        {
            "hellaswag.jsonl": (as_json(swag) + b"\n") * 3,
            "lambada.jsonl": (as_json(last) + b"\n") * 3,
        }
    ]


def reports():
    figures = {"planned": 2**30, "peak": 2**29, "context": 1, "gaps": 2, "card": "RTX"}
    row = {"step": 2, "name": "speed", "card": "RTX", "tiny": False, "date": "2026", "torch": "2"}
    row |= {"seconds": 1.5, "passed": True, "missed": "", "facts": ["a"], "checks": {"b": True}}
    rows = [row | {"figures": figures, "note": ""}, row | {"step": 0, "figures": {"cuda": "13"}}]
    return [{"gpu.json": as_json(rows)}]


# --- what reads them


def read_hf(folder):
    """A model as every script takes it, and as export.py writes it again."""
    found = pretrained.load(f"hf:{folder}", "")
    use(found)
    weights, size = export.published(found.model, found.tok)
    export.dtype = "float32"
    for name, trained in (("trained", True), ("imported", False)):
        export.to_hf(folder / name, weights, size, found.tok, "", trained)
        for path in (folder / name).glob("*.json"):
            json.loads(path.read_bytes())


def use(found):
    """What scripts do with a model and its tokenizer."""
    assert all(bool(p.isfinite().all()) for p in found.model.parameters())
    use_tokenizer(found.tok)
    x = torch.tensor([found.tok.encode("The cat")[:8] or [found.tok.eot]])
    with torch.no_grad():
        size = found.model.config
        found.model(x[:, : size.max_position_embeddings] % size.vocab_size)


def use_tokenizer(tok):
    """What every script asks of a tokenizer."""
    assert 0 <= tok.eot < tok.vocab_size < 2**32
    for text in ("The cat's é \U0001f600\n", "", " ", "\ud800", "<|endoftext|> [EOS]</s>"):
        ids = tok.encode_array(text)
        assert ids.dtype == np.uint32 and (ids < tok.vocab_size).all()
        assert isinstance(tok.decode(ids.tolist()), str)
    some = {0, 1, 2, tok.eot, tok.vocab_size - 1, *range(0, min(tok.vocab_size, 400), 7)}
    assert isinstance(tok.decode(some), str)
    assert all(
        isinstance(tok.token_bytes(i, first), bytes) for i in some for first in (True, False)
    )
    hf.known(tok)
    spec = json.loads(hf.tokenizer_json(tok))
    assert isinstance(hf.tokenizer_config(tok, spec, 32)["eos_token"], str)


def read_tokenizer(folder):
    use_tokenizer(get_tokenizer("tokenizer.json", folder))


def read_tokens(folder):
    """What train.py and evaluate.py ask of a dataset folder."""
    meta = read_meta(folder)
    of_dataset(meta, folder)
    size = start.model_as_set({**vars(SIZE), "vocab_size": 0}, meta)
    for split in ("train", "val"):
        data = batches.open_split(folder, split, 8, size.vocab_size)
        order = batches.order_of(data, 16, 1)
        ids = data.windows(order.starts(0, 0, 2))
        assert (ids & ID if data.packed else ids).max() < size.vocab_size
        data.check_size()
        per_byte = data.bits_per_byte(1.0)
        assert per_byte is None or 0 < per_byte < math.inf
        for x, *_ in batches.eval_batches(data, 4, 2, torch.device("cpu")):
            assert int(x.max()) < size.vocab_size
    json.dumps(meta["splits"])


def check_tokens(folder):
    """python data/prepare.py --verify=True, and a second prepare.py over what is there."""
    prepare.is_complete(folder, {})
    with contextlib.redirect_stdout(io.StringIO()):
        verify.check_folder(folder)


def read_documents(folder, reading, use):
    """Every document of a source, as a worker of data/prepare.py reads them, to `use`."""
    for path in sorted(folder.iterdir()):
        found = sources.find(str(path), reading)
        for part in found.parts:
            for document in readers.documents(part, reading, folder):
                try:
                    if isinstance(document, parts.BadData):
                        raise document
                    if not isinstance(document, parts.Note):
                        use(document)
                except parts.BadData as e:
                    complain(e, (str(folder),))


def read_source(folder):
    """Every text of a source."""
    tok = get_tokenizer("bytes")

    def use(document):
        for text in [document] if isinstance(document, str) else document:
            assert type(text) is str
            assert len(tok.encode_documents([text])[0]) == workers.utf8_bytes(text) + 1

    read_documents(folder, READING, use)


def read_talks(folder):
    """Every conversation of a source, and its tokens."""
    template = Template(CHAT)

    def use(document):
        ids, counts, begins = template.encode(document.turns)
        assert len(ids) == len(counts) == len(begins)
        names = sum(int((ids == i).sum()) for i in template.special.values())
        assert names == 2 * len(document.turns) and str(folder) in document.where()

    read_documents(folder, TALKS, use)


def read_template(folder):
    """A stranger's tokenizer and chat template, as a conversation is written with them."""
    try:
        tok = with_chat(get_tokenizer("tokenizer.json", folder))
        for text in ("Hi", "", " <|im_end|>\n", "<|endoftext|>"):
            turns = [Turn("user", text), Turn("assistant", text)]
            ids, counts, _ = Template(tok).encode(turns)
            assert ids.max() < tok.vocab_size and ids[counts][-1] == tok.chat.end
            Template(tok).prompt(turns[:1])
        json.loads(hf.tokenizer_json(tok))
    except ValueError as e:  # whoever asks for it names the model
        raise ValueError(f"{folder}: {e}") from e


def read_metrics(folder):
    """A run's records: taken up by a resumed run, compared with, and told in a model card."""
    metrics = folder / "metrics.jsonl"
    found = curve.read_curve(str(metrics))
    assert all(math.isfinite(v) for v in found.losses)
    for tokens in (0, 1, 100, 150, 10**9):
        at = found.at(tokens)
        assert at is None or math.isfinite(at)
    model = model_of()
    tok = get_tokenizer("bytes")
    assert isinstance(export.model_card("x", {"iter_num": 3}, SIZE, 5, tok, folder), str)
    assert model.config == SIZE
    records.keep_records(metrics, 3)


def read_picture(folder):
    assert isinstance(picture.draw_run(folder / "metrics.jsonl", folder / "loss.png"), str)


def read_checkpoint(folder):
    """A checkpoint as sample.py, export.py and a resumed train.py take it."""
    [path] = [p for p in folder.iterdir() if p.suffix in (".pt", ".shards")]
    found = pretrained.load(str(path), "")
    use(found)
    weights, config = export.published(found.model, found.tok)
    state = found.state
    assert isinstance(export.model_card("x", state, config, 5, found.tok, folder), str)
    begun = start.find_start("resume", folder, found.model.config, 4)
    config = found.state.get("config")
    muon = isinstance(config, dict) and str(config.get("optimizer")) == "muon"
    name = "muon" if muon else "adamw"
    now = {"config": run_defaults() | {"optimizer": name}, "data": {}, "dtype": "torch.float32"}
    with contextlib.redirect_stdout(io.StringIO()):
        begun.check(found.model.config, found.tok, now, set())
    team = join(30)
    begun = begun.shared(team, False)
    model = begun.build(0, 0)
    optimizer = optim.configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1, name)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    begun.restore(model, optimizer, scaler, team)
    optim.set_hyperparameters(optimizer, (0.9, 0.95), 0.1)
    x = torch.zeros(1, min(4, model.config.max_position_embeddings), dtype=torch.int64)
    model(x, x)[1].backward()
    optimizer.step()
    json.dumps(begun.state.__dict__)


def read_gguf(folder):
    """A GGUF file of a stranger's tokenizer, settings and names, read back."""
    from gguf import GGUFReader

    config = unquoted(folder / "names.json")
    tok = get_tokenizer("tokenizer.json", folder)
    if tok.vocab_size > 400:  # more than the model has: pretrained.load refuses it
        return
    size = GPTConfig(**{**vars(SIZE), "vocab_size": tok.vocab_size})
    weights, size = export.published(model_of(size), tok)
    export.dtype, export.license = "float32", str(config.get("license"))
    out = folder / "model.gguf"
    export.to_gguf(out, weights, size, tok, str(config.get("name")))
    read = GGUFReader(out)
    texts = read.fields["tokenizer.ggml.tokens"]
    assert len(texts.data) == tok.vocab_size
    assert len(read.tensors) == len(weights)


def read_items(folder):
    """HellaSwag's and LAMBADA's items, from the file to the figures."""
    machine = find_machine("cpu", "float32")
    found = pretrained.Pretrained(folder, model_of(), get_tokenizer("bytes"), {}, [])
    for task in ("hellaswag", "lambada"):
        evaluate.task, evaluate.file = task, str(folder / f"{task}.jsonl")
        results = evaluate.TASKS[task](found, machine)
        assert 0 <= results["acc"] <= 1
        json.dumps(results)


def read_report(folder):
    """The tables that bench/gpu.py makes of results that are there."""
    found = gpu_report.read_report(folder / "gpu.json")
    for card in [r["card"] for r in found]:
        shown = gpu_report.newest(found, card, False)
        assert all(isinstance(line, str) for line in gpu_report.table(shown))
        assert all(isinstance(line, str) for line in gpu_report.memory_table(shown))


def unquoted(path):
    """The object in a JSON file that carries values to a target; empty for no such thing."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def read_lock(path):
    try:
        assert isinstance(run_folder.lock(path), str)
    finally:
        run_folder.unlock()


def run_defaults():
    """train.py's settings, without running it."""
    import train

    return configurator.settings_of(vars(train))


def settings_files():
    chosen = {k: v for k, v in run_defaults().items() if k not in ("out_dir", "dry_run")}
    return [{"settings.json": as_json(chosen)}]


def read_settings(folder):
    """A config file whose values are these, and what train.py makes of its settings."""
    defaults = run_defaults()
    values = unquoted(folder / "settings.json")
    path = folder / "config.py"
    names = {k: v for k, v in values.items() if k.isidentifier() and not keyword.iskeyword(k)}
    body = "nan, inf = float('nan'), float('inf')\n"
    body += "".join(f"{k} = {v!r}\n" for k, v in names.items())
    path.write_text(body + "del nan, inf\n", encoding="utf-8", errors="surrogatepass")
    s = {**defaults, **configurator.overrides([str(path)], defaults)}
    typed = [f"--{k}={v}" for k, v in names.items()]
    s = {**s, **configurator.overrides(typed, defaults)}
    run_settings.check(s)
    size = start.model_as_set(s, META)
    run_settings.eval_windows(s)
    assert all(v >= 0 for v in run_folder.disk_needed(s, 1000).values())
    schedule = optim.schedule_of(s)
    assert all(0 <= schedule.at(n) < math.inf for n in (0, 1, s["warmup_iters"], s["max_iters"]))
    windows_of_rank(s["tokens_per_step"], size.max_position_embeddings, 1)


TARGETS = {
    "hf": Target(hf_folders, (".json", ".safetensors"), read_hf),
    "tokenizer": Target(
        lambda: [{"tokenizer.json": text} for text in tokenizer_jsons()], (".json",), read_tokenizer
    ),
    "tokens": Target(token_folders, ("",), read_tokens),
    "talks": Target(talks, ("",), read_talks),
    "talk tokens": Target(talk_folders, ("",), read_tokens),
    "talk verify": Target(talk_folders, ("",), check_tokens),
    "template": Target(templates, ("_config.json",), read_template),
    "verify": Target(lambda: token_folders()[:3], ("",), check_tokens),
    "parquet": Target(parquets, ("",), read_source),
    "arrow": Target(arrows, ("",), read_source),
    "archive": Target(archives, ("",), read_source),
    "jsonl": Target(lines, ("",), read_source),
    "txt": Target(plain, ("",), read_source),
    "tables": Target(rows_of_tables, ("",), read_source),
    "characters": Target(characters_of, ("",), read_tokens),
    "metrics": Target(run_records, ("",), read_metrics),
    "picture": Target(run_records, ("",), read_picture),
    "checkpoint": Target(checkpoints, ("",), read_checkpoint),
    "shards": Target(checkpoints_in_parts, ("",), read_checkpoint, mend=summed),
    # what a message names there: the tokenizer, which came in a model that was named before
    "gguf": Target(
        lambda: [
            {"tokenizer.json": text, "names.json": as_json({"name": "a", "license": "mit"})}
            for text in (tokenizer_jsons()[0], tokenizer_jsons()[-1])
        ],
        ("",),
        read_gguf,
        ("its tokenizer.json",),
    ),
    "items": Target(items, ("",), read_items),
    "report": Target(reports, ("",), read_report),
    "lock": Target(lambda: [{".lock": b"pid 5 on host"}], ("",), read_lock),
    "settings": Target(
        settings_files, ("",), read_settings, ("settings", "command line", "--", "tokens_per_step")
    ),
}


# --- one input


class Badly(Exception):
    """A message that no user can use."""


def complain(error, names):
    """Raises Badly unless an error's text, as a script prints it, is one line that names a file."""
    line = line_of(error)
    if not any(name in line for name in names):
        raise Badly(f"names no file: {type(error).__name__}: {line[:300]}") from error
    if len(line) > LINE or line != printable(line):
        raise Badly(f"{len(line)} characters: {line[:300]!r}") from error


def place(error):
    """Where in the repository an error comes from, for telling failures apart."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "tests" not in f.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.name}: {last.line}"


def peak(reset=False):
    """The most memory that this process has had since the last reset, in bytes; 0 if unknown."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def put_files(files, folder):
    """The files of an input, in a folder that holds nothing else."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Tried(NamedTuple):
    """What reading an input came to."""

    problem: str  # empty: it succeeded, or was refused as it should be
    kind: str  # of the problem, for telling them apart
    refused: bool
    seconds: float
    memory: int  # bytes beyond the files


def tried(target, files, folder):
    """Read an input of a target."""
    put_files(files, folder)
    before, t0, refused = peak(reset=True), time.monotonic(), False
    problem = kind = ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            target.read(folder)
        except (ValueError, OSError) as e:
            refused = True
            try:
                complain(e, (str(folder), *target.names))
            except Badly as bad:
                problem, kind = str(bad), f"{bad.args[0][:12]} {place(e)}"
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            problem = f"{type(e).__name__}: {str(e)[:500]} at {place(e)}"
            kind = f"{type(e).__name__} {place(e)}"
    seconds, size = time.monotonic() - t0, sum(map(len, files.values()))
    memory = max(0, peak() - before - size)
    if seconds > SECONDS:
        problem, kind = problem or f"took {seconds:.0f} s", kind or "slow"
    if memory > MEMORY + (PER_BYTE - 1) * size:
        problem, kind = problem or f"took {memory // MIB} MiB", kind or "large"
    if len(said) > 3:
        problem, kind = problem or f"{len(said)} warnings: {said[0].message}", kind or "warnings"
    return Tried(problem, kind, refused, seconds, memory)


@contextlib.contextmanager
def workplace():
    """An empty folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        yield Path(name).resolve()


def inputs(target):
    """Hypothesis' strategy for a target's folders."""
    seeds = target.seeds()
    found = hostile.folders(seeds, target.hurt)
    return hostile.mended(found, target.mend) if target.mend else found


# --- the long run


def search(name, seed, seconds, keep):
    """In a process of its own: try inputs until the time is over; prints counts as JSON lines."""
    faulthandler.enable()
    target, end = TARGETS[name], time.monotonic() + seconds
    counts = collections.Counter()
    most = {"seconds": 0.0, "memory": 0}
    kinds = set()
    now = keep / f"{name}-now"
    now.mkdir(parents=True, exist_ok=True)
    for files in target.seeds():  # what is loaded at first use counts as nobody's memory
        assert not (bad := tried(target, files, now)).problem, bad

    def one(files):
        if time.monotonic() > end:
            return
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        found = tried(target, files, now)
        faulthandler.cancel_dump_traceback_later()
        counts.update(inputs=1, refused=found.refused)
        most["seconds"] = max(most["seconds"], found.seconds)
        most["memory"] = max(most["memory"], found.memory)
        if found.problem and found.kind not in kinds:
            kinds.add(found.kind)
            place = keep / f"{name}-{seed}-{len(kinds)}"
            put_files(files, Path(shutil.copytree(now, place, dirs_exist_ok=True)))
            tell(problem=found.problem, kept=str(place), kind=found.kind)

    strategy = inputs(target)
    while time.monotonic() < end:
        seed += 1
        test = settings(
            max_examples=300,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(hypothesis.seed(seed)(given(strategy)(one)))
        test()
        tell(**counts, **most, seed=seed)
    shutil.rmtree(now)


def tell(**facts):
    print(json.dumps(facts), flush=True)


class Figures:
    """What a target's processes have found."""

    def __init__(self):
        self.inputs = self.refused = 0
        self.seconds, self.memory = 0.0, 0
        self.failures = {}  # folder by kind

    def run(self, name, seed, seconds, keep):
        """Search a target for so long, in as many processes as that takes; prints failures."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 5:
            command = [sys.executable, __file__, f"--search={name}", f"--seed={seed}"]
            command += [f"--seconds={left}", f"--keep={keep}"]
            log = keep / f"{name}.log"
            with log.open("wb") as err:
                child = subprocess.run(command, stdout=subprocess.PIPE, stderr=err, text=True)
            last = {}
            for facts in map(json.loads, child.stdout.splitlines()):
                if "problem" in facts:
                    self.failed(facts["kind"], facts["kept"], facts["problem"])
                else:
                    last = facts
            self.inputs += last.get("inputs", 0)
            self.refused += last.get("refused", 0)
            self.seconds = max(self.seconds, last.get("seconds", 0))
            self.memory = max(self.memory, last.get("memory", 0))
            if child.returncode:
                place = keep / f"{name}-{seed}-ended"
                with contextlib.suppress(OSError):
                    shutil.move(keep / f"{name}-now", place)
                said = log.read_text(errors="replace").strip().splitlines()
                said = [line[:200] for line in said if not line.startswith("while generating")]
                words = " | ".join([*said[:2], *said[-2:]])
                self.failed(f"ended {seed}", str(place), f"exit code {child.returncode}: {words}")
            seed += 1_000_000

    def failed(self, kind, place, problem):
        if kind not in self.failures:
            self.failures[kind] = place
            print(f"  FAILED {place}: {problem}", flush=True)

    def line(self, name):
        return (
            f"{name:12} {self.inputs:>8,} inputs, {self.refused:>8,} refused, "
            f"{len(self.failures)} failures, at most {self.seconds:.2f} s and "
            f"{self.memory / MIB:.0f} MiB"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names with commas between")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--keep", default="", help="folder for inputs that fail")
    parser.add_argument("--again", default="", help="a folder of an input that failed")
    parser.add_argument("--search", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.again:
        kept = Path(flags.again)
        paths = [p for p in kept.rglob("*") if p.is_file()]
        files = {p.relative_to(kept).as_posix(): p.read_bytes() for p in paths}
        with workplace() as folder:
            put_files(files, folder)
            return TARGETS[kept.name.partition("-")[0]].read(folder)
    keep = Path(flags.keep or tempfile.mkdtemp(prefix="fuzz")).resolve()
    keep.mkdir(parents=True, exist_ok=True)
    if flags.search:
        return search(flags.search, flags.seed, flags.seconds, keep)
    names = flags.targets.split(",")
    print(f"--seed={flags.seed} --keep={keep}", flush=True)
    figures = {name: Figures() for name in names}
    rounds = math.ceil(flags.minutes * 60 / len(names) / SLICE)
    for i in range(rounds):
        for name, found in figures.items():
            found.run(name, flags.seed + 1000 * i, 60 * flags.minutes / len(names) / rounds, keep)
            print(found.line(name), flush=True)
    sys.exit(1 if any(found.failures for found in figures.values()) else 0)


if __name__ == "__main__":
    main()
