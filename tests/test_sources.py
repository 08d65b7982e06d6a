"""Every kind of source, interruptions, shares, and damage: data/prepare.py at scale."""

import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import ROOT
from hostile import zstd
from test_prepare import TEXTS, documents, nanogpt, write_jsonl, write_parquet

from data import parts, readers, sources, workers
from data.parts import Part, Reading, Source
from text.tokenizer import get_tokenizer

BINS = ("train.bin", "val.bin")
MANY = [f"Document {i}. " + "some words and 42 more; " * (5 + i % 90) for i in range(6000)]


def contents(folder):
    return [(folder / name).read_bytes() for name in (*BINS, "meta.json")]


def prepare(script, source, out, *flags):
    return script("data/prepare.py", f"--source={source}", f"--dataset={out}", *flags)


def texts_in(folder):
    return sorted(documents(folder, "train") + documents(folder, "val"))


def tar_of(members, mode="w"):
    """A tar of (name, bytes or TarInfo)."""
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f.getvalue()


def openwebtext_tar(texts, per_xz=40):
    """As the original download: a tar of .xz files, each a tar of .txt."""
    members = [(f"{i:05d}.txt", t.encode()) for i, t in enumerate(texts)]
    return tar_of(
        [
            (f"openwebtext/s-{i}_data.xz", lzma.compress(tar_of(members[i : i + per_xz])))
            for i in range(0, len(members), per_xz)
        ]
    )


def write_source(folder, kind, texts):
    path = folder / f"source{kind}"
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif kind == ".jsonl.zst":
        path.write_bytes(zstd(lines))
    elif kind == ".parquet":
        write_parquet(path, texts)
    elif kind == ".tar":
        path.write_bytes(openwebtext_tar(texts))
    elif kind == ".arrow":
        import datasets

        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved", num_shards=3)
        return folder / "saved"
    else:
        path.mkdir()
        for i, text in enumerate(texts):
            if kind == ".txt":
                (path / f"{i:04d}.txt").write_bytes(text.encode())
            else:
                (path / f"{i:04d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".tar", ".txt", ".txt.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_nanogpts_split(script, tmp_path, kind):
    texts = [t.strip() for t in TEXTS]  # what the clean-up of OpenWebText's archives leaves
    source = write_source(tmp_path, kind, texts)
    result = prepare(script, source, tmp_path / "out", "--num_proc=1", "--val_fraction=0.05")
    assert result.code == 0, result.err
    val, train = nanogpt(texts, 0.05)
    assert (tmp_path / "out" / "val.bin").read_bytes() == val
    assert sorted(documents(tmp_path / "out", "train")) == train
    assert not (tmp_path / "out" / "parts").exists()


def test_openwebtexts_clean_up(script, tmp_path):
    (tmp_path / "a.tar").write_bytes(openwebtext_tar(["\n a\n\n\n\nb\n\nc \n", "second"]))
    assert prepare(script, tmp_path / "a.tar", tmp_path / "out").code == 0
    assert texts_in(tmp_path / "out") == ["a\n\nb\n\nc", "second"]


def test_parts_of_a_file_hold_each_document_once(tmp_path):
    """Byte ranges and row groups: all documents in order, whatever the size of a part."""
    write_jsonl(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet")
    with pytest.MonkeyPatch.context() as patch:
        for size in (50, 333, 1000, 10**6):
            patch.setattr(parts, "SMALLEST_PART", size)
            for name in ("a.jsonl", "a.parquet"):
                cut = sources.find(str(tmp_path / name), Reading()).parts
                assert len(cut) > 3 or size > 1000
                found = [d for p in cut for d in readers.documents(p, Reading(), tmp_path)]
                assert found == TEXTS


def test_separated_documents(script, tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|end|>\ntwo\n\n<|end|>\n<|end|>three", encoding="utf-8")
    flags = ["--separator=<|end|>", "--tokenizer=bytes"]
    assert prepare(script, tmp_path / "a.txt", tmp_path / "out", *flags).code == 0
    assert texts_in(tmp_path / "out") == ["one", "three", "two"]


def test_a_long_text_file_is_read_in_blocks(script, tmp_path):
    """Characters, and \\r\\n, that lie across the edges of blocks; ids as of the whole."""
    text = "\ufeff" + ("x" * 37 + "é世🙂 don't  stop\r\n") * 60_000
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_bytes(text.encode())
    (tmp_path / "src" / "b.txt").write_bytes(b"short")
    (tmp_path / "src" / "c.txt").write_bytes(b"shorter")
    assert prepare(script, tmp_path / "src", tmp_path / "out", "--num_proc=1").code == 0
    clean = text[1:].replace("\r\n", "\n")
    (train,), (rest, *others) = [documents(tmp_path / "out", split) for split in ("train", "val")]
    assert train + rest == clean and others == ["short", "shorter"]
    tok = get_tokenizer("gpt2")
    ids = [np.fromfile(tmp_path / "out" / name, dtype="<u2") for name in BINS]
    whole = np.array([*tok.encode(clean), tok.eot], dtype="<u2").tobytes()
    assert ids[0][:-1].tobytes() + ids[1].tobytes()[: len(whole) - 2 * (len(ids[0]) - 1)] == whole


def run(*args, **kwargs):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs
    )


def killed_runs(tmp_path, kills):
    """Kill -9 at random moments, with another number of workers each time, then finish."""
    write_jsonl(tmp_path / "a.jsonl", MANY)
    source = f"--source={tmp_path / 'a.jsonl'}"
    t0 = time.perf_counter()
    assert run(source, f"--dataset={tmp_path / 'whole'}", "--num_proc=1").wait() == 0
    took = time.perf_counter() - t0
    rng = random.Random(1)
    out = tmp_path / "killed"
    for i in range(kills):
        process = run(source, f"--dataset={out}", f"--num_proc={1 + i % 3}", "--overwrite=False")
        time.sleep(rng.uniform(0.1, 1.1) * took)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "train.bin").exists():
            whole = tmp_path / "whole"
            assert all((out / b).read_bytes() == (whole / b).read_bytes() for b in BINS)
            shutil.rmtree(out)
    process = run(source, f"--dataset={out}", "--num_proc=2")
    assert process.wait() == 0, process.stderr.read()
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_and_started_again(tmp_path):
    killed_runs(tmp_path, 3)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    killed_runs(tmp_path, 20)


@pytest.mark.parametrize(
    ("kind", "at"),
    [(".jsonl", at) for at in (1, 2, 5, 8, 13, 16, 20, 31, 72, 78, 82, 85)]
    + [(".jsonl.gz", at) for at in (7, 11, 12, 14, 17, 23, 39)],
)
def test_killed_while_putting_together(script, tmp_path, kind, at):
    """Stopped at a file operation of the second half, it ends with the same bytes."""
    texts = MANY[:3000] if kind == ".jsonl" else MANY[:1000]  # two parts, and one in many pieces
    killed_second_half(script, tmp_path, write_source(tmp_path, kind, texts), at)


@pytest.mark.parametrize("at", [1, 5, 7, 8, 11, 12, 14])
def test_killed_while_splitting_a_lone_document(script, tmp_path, at):
    (tmp_path / "a.txt").write_text("\n".join(MANY[:50]), encoding="utf-8")
    killed_second_half(script, tmp_path, tmp_path / "a.txt", at)


def killed_second_half(script, tmp_path, source, at):
    assert prepare(script, source, tmp_path / "whole", "--num_proc=1").code == 0
    out = tmp_path / "out"
    assert prepare(script, source, out, "--num_proc=1", "--shards=0/1").code == 0
    calls = 0

    class Killed(BaseException):
        pass

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > at:
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "truncate", counted(os.truncate))
        patch.setattr("pathlib.Path.unlink", counted(type(out).unlink))
        try:
            prepare(script, source, out, "--merge=True")
        except Killed:
            assert not (out / "train.bin").exists() or contents(out) == contents(tmp_path / "whole")
    assert prepare(script, source, out, "--num_proc=1").code == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", *BINS]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
def test_a_full_disk_in_the_middle_loses_nothing(script, tmp_path):
    """At a limit on file sizes, which shows as a full disk does, in parts and in assembly."""
    import resource

    source, out = write_source(tmp_path, ".jsonl.gz", MANY[:1000]), tmp_path / "out"
    assert prepare(script, source, tmp_path / "whole", "--num_proc=1").code == 0
    size = (tmp_path / "whole" / "train.bin").stat().st_size

    def limited(limit):
        flags = [f"--source={source}", f"--dataset={out}"]
        return subprocess.run(
            [sys.executable, ROOT / "data" / "prepare.py", *flags],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    for limit in (size // 4, size * 9 // 10):
        full = limited(limit)
        assert full.returncode == 1 and len(full.stderr.strip().splitlines()) == 1
        assert "make room" in full.stderr and not (out / "train.bin").exists()
    assert limited(2 * size).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_tokenizer_trained_on_hub_files_deletes_only_its_own_folder(
    script, tmp_path, monkeypatch
):
    """It once deleted the folder that the user was in."""
    import huggingface_hub

    def download(repo, name, local_dir, **where):
        path = write_source(tmp_path / "hub", ".jsonl", MANY[:50])
        os.makedirs(local_dir, exist_ok=True)
        return shutil.copy(path, os.path.join(local_dir, name))

    (tmp_path / "hub").mkdir()
    found = [Part((f"{i}.jsonl",), i, 10_000, repo="a/b", revision="1") for i in range(2)]
    monkeypatch.setattr(sources, "hub_source", lambda name, *a: Source(name, found, 2, "1"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    (tmp_path / "here" / "precious").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--tokenizer=train:300", "--num_proc=1"]
    result = prepare(script, "hub:a/b", tmp_path / "out", *flags)
    assert result.code == 0, result.err
    assert os.listdir(tmp_path / "here") == ["precious"]
    assert len(texts_in(tmp_path / "out")) == 100
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "tokenizer.json", *BINS]


def test_an_arrow_file_with_offsets_that_lead_out_of_it(script, tmp_path):
    """It once ended the process."""
    import pyarrow

    table = pyarrow.table({"text": ["word " * 20] * 50})
    path = tmp_path / "a.arrow"
    with pyarrow.OSFile(str(path), "wb") as f, pyarrow.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table)
    data = bytearray(path.read_bytes())
    at = data.index(np.array([100, 200], dtype="<i4").tobytes())  # ends of the first two texts
    data[at : at + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(data)
    result = prepare(script, path, tmp_path / "out", "--num_proc=1")
    assert result.code == 1 and "a.arrow is damaged" in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("kind", ["parquet", "tar.gz", "jsonl"])
def test_bombs_stay_small_in_memory(tmp_path, kind):
    """Few bytes that stand for 400 MB of text; a name of 200 MB, a line of 100 MB."""
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, ["a" * 500_000, "b" * 500_000] * 400)
    elif kind == "jsonl":
        path.write_bytes(b"[" * 100_000_000)
    else:
        info = tarfile.TarInfo("x" * 200_000_000)
        path.write_bytes(gzip.compress(tar_of([(info.name, b"text")]), 1))
    code = (
        "import re, resource, runpy, sys; sys.argv[0] = 'data/prepare.py'\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: print(e.code)\n"
        "own = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))"
    )
    flags = [f"--source={path}", f"--dataset={tmp_path / 'out'}", "--num_proc=1", "--max_tokens=1M"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--tokenizer=bytes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    assert peak < 500_000, f"{peak} kB: {done.stdout} {done.stderr}"
    if kind != "parquet":
        assert done.stdout.split()[0] == "1" and len(done.stderr.strip().splitlines()) == 1


def test_progress_says_how_far_it_is_and_what_is_slow(capsys, monkeypatch):
    monkeypatch.setattr(workers, "QUIET_S", -1)

    class Counters(list):
        def get_obj(self):
            return self

    counters = Counters([0, 0, 0])
    show = workers.Progress(100, counters)
    counters[:] = [1, 80, 20]
    show.finished(Part(("a.jsonl.gz",), 0, 40))
    counters[:] = [2, 160, 40]  # half of the second part's text, by the first's measure
    show([1])
    show([1])
    lines = capsys.readouterr().err.splitlines()
    assert "40.0%, 1 documents" in lines[0] and "80.0%, 2 documents" in lines[1]
    assert "no new tokens" in lines[2] and "at parts 1" in lines[2]


def test_shares_and_merge_give_the_same_bytes(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", MANY)
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    assert prepare(script, source, tmp_path / "whole", "--num_proc=1").code == 0
    for share in ("2/3", "0/3"):
        assert prepare(script, source, out, f"--shards={share}", "--num_proc=1").code == 0
    early = prepare(script, source, out, "--merge=True")
    assert early.code == 1 and "parts are missing" in early.err
    assert prepare(script, source, out, "--shards=1/3", "--num_proc=1").code == 0
    assert prepare(script, source, out, "--merge=True").code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_chosen_shards_and_max_tokens_are_partial(script, tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(4):
        write_parquet(tmp_path / "src" / f"{i}.parquet", TEXTS[i * 50 : i * 50 + 50])
    write_jsonl(tmp_path / "many.jsonl", MANY)
    flags = ["--shards=1-2", "--tokenizer=bytes"]
    assert prepare(script, tmp_path / "src", tmp_path / "a", *flags).code == 0
    assert texts_in(tmp_path / "a") == sorted(TEXTS[50:150])
    made = []
    for processes in (1, 3):
        flags = ["--max_tokens=200k", f"--num_proc={processes}", "--tokenizer=gpt2"]
        result = prepare(script, tmp_path / "many.jsonl", tmp_path / f"b{processes}", *flags)
        assert result.code == 0, result.err
        made.append(contents(tmp_path / f"b{processes}"))
    assert made[0] == made[1]
    tokens = sum(len(b) for b in made[0][:2]) // 2
    assert 200_000 <= tokens < 201_000
    for name in ("a", "b1"):
        meta = json.loads((tmp_path / name / "meta.json").read_text(encoding="utf-8"))
        assert meta["partial"]
    for wrong in ("--shards=3-9", "--shards=x", "--shards=3/3", "--max_tokens=many"):
        assert prepare(script, tmp_path / "src", tmp_path / "c", wrong).code == 1


def test_a_second_run_of_the_folder_is_refused(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "out" / "parts").mkdir(parents=True)
    code = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); from data import prepare\n"
        "with prepare.held(pathlib.Path(sys.argv[2])): print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "out" / "parts" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, ROOT, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        result = prepare(script, tmp_path / "a.jsonl", tmp_path / "out")
        assert result.code == 1 and f"process {holder.pid} on" in result.err
        assert "wait for it, or choose another --dataset" in result.err
    finally:
        holder.kill()
        holder.wait()
    assert prepare(script, tmp_path / "a.jsonl", tmp_path / "out").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["meta.json", *BINS]


def truncated(data):
    return data[: len(data) * 2 // 3]


def cut_between_members(data):
    """A tar without its end mark, as a download that stopped at an unlucky place."""
    return data[: data.rstrip(b"\0").__len__() // 512 * 512 + 512]


GOOD = ["a good text", "another one", "the third"] * 30
LINES = "".join(json.dumps({"text": t}) + "\n" for t in GOOD).encode()
INNER = tar_of([(f"{i}.txt", t.encode()) for i, t in enumerate(GOOD)])
LINK = tarfile.TarInfo("link.txt")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc/passwd"
DEVICE = tarfile.TarInfo("device.txt")
DEVICE.type = tarfile.CHRTYPE


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl.gz", truncated(gzip.compress(LINES, mtime=0)), ["a.jsonl.gz", "truncated"]),
        ("a.jsonl.gz", b"not gzip at all", ["a.jsonl.gz"]),
        ("a.jsonl.zst", truncated(zstd(os.urandom(30000).hex().encode())), ["a.jsonl.zst"]),
        ("a.txt.gz", truncated(gzip.compress(os.urandom(9000).hex().encode())), ["a.txt.gz"]),
        ("a.tar", openwebtext_tar(GOOD)[:900], ["a.tar"]),
        ("a.tar", cut_between_members(INNER), ["a.tar", "truncated"]),
        ("a.tar.xz", lzma.compress(INNER)[:-8], ["a.tar.xz", "truncated"]),
        ("a.tar", tar_of([("x.xz", lzma.compress(INNER)[:-8])]), ["a.tar:x.xz", "truncated"]),
        ("a.tar", tar_of([("x.txt", b"ok"), ("y.txt", b"\xff\xfe")]), ["a.tar:y.txt", "UTF-8"]),
        (
            "a.tar",
            tar_of([("x.xz", lzma.compress(tar_of([("x.txt", bytes(17 * 2**20))])))]),
            ["16 MiB"],
        ),
        ("a.tar", tar_of([("x.xz", lzma.compress(bytes(200 * 2**20)))]), ["a.tar:x.xz"]),
        ("a.jsonl.gz", gzip.compress(bytes(100 * 2**20)), ["a.jsonl.gz", "bomb"]),
        ("a.jsonl", LINES + b'{"text": null}\n', ["line 91", "'text'"]),
        ("a.jsonl", LINES + b'{"text": "\xff"}\n', ["line 91", "UTF-8"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "x",  # the bytes differ from process to process
)
def test_damage_is_named_and_can_be_left_out(script, tmp_path, name, data, words):
    """One line, no train.bin; --skip_bad keeps the rest and says what it left out."""
    (tmp_path / "src").mkdir()
    write_jsonl(tmp_path / "src" / "0.jsonl", TEXTS[:100])
    (tmp_path / "src" / name).write_bytes(data)
    write_jsonl(tmp_path / "src" / "z.jsonl", TEXTS[100:200])
    flags = ["--tokenizer=bytes", "--num_proc=1"]
    result = prepare(script, tmp_path / "src", tmp_path / "out", *flags)
    assert result.code == 1 and result.err.strip().count("\n") == 0, result.err
    for word in words:
        assert word in result.err
    assert not (tmp_path / "out" / "train.bin").exists()
    result = prepare(script, tmp_path / "src", tmp_path / "out", *flags, "--skip_bad=True")
    assert result.code == 0, result.err
    assert "left out " in result.out
    found = texts_in(tmp_path / "out")
    assert set(TEXTS[:200]) <= set(found)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    (skipped,) = meta["skipped"]
    assert skipped["count"] <= 2 and words[0] in skipped["first"][0]


def test_a_damaged_parquet_in_the_middle(script, tmp_path):
    (tmp_path / "src").mkdir()
    for name in "abc":
        write_parquet(tmp_path / "src" / f"{name}.parquet")
    data = (tmp_path / "src" / "b.parquet").read_bytes()
    (tmp_path / "src" / "b.parquet").write_bytes(truncated(data))
    flags = ["--tokenizer=bytes", "--num_proc=1"]
    result = prepare(script, tmp_path / "src", tmp_path / "out", *flags)
    assert result.code == 1 and "b.parquet" in result.err
    (tmp_path / "src" / "b.parquet").write_bytes(data)
    assert prepare(script, tmp_path / "src", tmp_path / "out", *flags).code == 0
    assert texts_in(tmp_path / "out") == sorted(TEXTS * 3)


def test_a_hostile_tar_touches_nothing(script, tmp_path):
    evil = [("../evil.txt", b"one"), ("/tmp/evil.txt", b"two"), ("l", LINK), ("d", DEVICE)]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.tar").write_bytes(tar_of([*evil, ("good.txt", b"three")]))
    before = {p for p in tmp_path.rglob("*")}
    flags = ["--tokenizer=bytes", "--num_proc=1"]
    assert prepare(script, tmp_path / "src", tmp_path / "out", *flags).code == 0
    assert texts_in(tmp_path / "out") == ["one", "three", "two"]
    new = {p for p in tmp_path.rglob("*")} - before
    assert {p.name for p in new} == {"out", "meta.json", *BINS}
    assert not os.path.exists("/tmp/evil.txt")


def test_wrong_column_and_empty_sources(script, tmp_path):
    write_parquet(tmp_path / "a.parquet", column="body")
    result = prepare(script, tmp_path / "a.parquet", tmp_path / "out", "--skip_bad=True")
    assert result.code == 1 and "body" in result.err and "--text_column" in result.err
    (tmp_path / "empty").mkdir()
    assert "holds no" in prepare(script, tmp_path / "empty", tmp_path / "out").err
    (tmp_path / "b.jsonl").write_bytes(b"\n\n")
    assert "no documents" in prepare(script, tmp_path / "b.jsonl", tmp_path / "o2").err


def test_verify(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    prepare(script, tmp_path / "a.jsonl", out, "--num_proc=1")
    good = script("data/prepare.py", "--verify=True", f"--dataset={out}")
    assert good.code == 0 and "as it should be" in good.out and "Document" in good.out
    data = bytearray((out / "train.bin").read_bytes())
    data[1000] ^= 1
    (out / "train.bin").write_bytes(data)
    bad = script("data/prepare.py", "--verify=True", f"--dataset={out}")
    assert bad.code == 1 and "sha256" in bad.err
    (out / "train.bin").write_bytes(data[:-2])
    bad = script("data/prepare.py", "--verify=True", f"--dataset={out}")
    assert bad.code == 1 and "tokens, but meta.json says" in bad.err
    (out / "meta.json").unlink()
    np.array([50300], dtype="<u2").tofile(out / "val.bin")
    bad = script("data/prepare.py", "--verify=True", f"--dataset={out}")
    assert bad.code == 1 and "50300" in bad.err


def test_own_tokenizer_is_trained_once_and_the_same(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", MANY[:400])
    flags = ["--tokenizer=train:300", "--num_proc=1"]
    for name in ("x", "y"):
        assert prepare(script, tmp_path / "a.jsonl", tmp_path / name, *flags).code == 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    meta = json.loads((tmp_path / "x" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("tokenizer.json", 300)
    assert texts_in(tmp_path / "x") == sorted(MANY[:400])
    assert script("data/prepare.py", "--verify=True", f"--dataset={tmp_path / 'x'}").code == 0


def test_too_little_disk_is_said_at_the_start(script, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", MANY)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = prepare(script, tmp_path / "a.jsonl", tmp_path / "out")
    assert result.code == 1 and "GB are free" in result.err and "--max_tokens" in result.err
