"""data/prepare.py against nanoGPT's recipe, and back through the loader."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data import prepare, readers
from text.tokenizer import get_tokenizer
from text.tokens import TokenData

TEXTS = [f"Document {i}: " + "word " * (i % 7) + "don't.\n" for i in range(301)] + ["", "世界 🙂"]


def write_jsonl(path, texts=TEXTS, column="text"):
    lines = [json.dumps({column: t, "other": 1}) + "\n" for t in texts]
    path.write_text("".join(lines), encoding="utf-8")


def write_parquet(path, texts=TEXTS, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=40)


def documents(folder, split):
    """The texts in a bin, by its meta.json."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tok = get_tokenizer(meta["tokenizer"], folder)
    ids = np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"])
    found = []
    while len(ids):
        end = int(np.argmax(ids == meta["eot"]))
        found.append(tok.decode(ids[:end].tolist()))
        ids = ids[end + 1 :]
    return found


def nanogpt(texts, fraction):
    """val.bin and the training documents as nanoGPT's recipe makes them, by `datasets` itself."""
    import datasets

    split = datasets.Dataset.from_dict({"text": texts}).train_test_split(
        test_size=fraction, seed=2357, shuffle=True
    )
    tok = get_tokenizer("gpt2")
    ids = [i for t in split["test"]["text"] for i in [*tok.encode(t), tok.eot]]
    return np.array(ids, dtype=np.uint16).tobytes(), sorted(split["train"]["text"])


@pytest.mark.parametrize("fraction", [0.0005, 0.05, 0.2])
def test_the_split_is_nanogpts(script, tmp_path, fraction):
    write_jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    flags = [f"--source={tmp_path / 'a.jsonl'}", f"--dataset={out}", f"--val_fraction={fraction}"]
    result = script("data/prepare.py", *flags)
    assert result.code == 0, result.err
    val, train = nanogpt(TEXTS, fraction)
    assert (out / "val.bin").read_bytes() == val
    assert sorted(documents(out, "train")) == train


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_prepare_and_loader_agree(script, tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    flags = [f"--source={tmp_path / 'a.jsonl'}", f"--dataset={out}", f"--tokenizer={name}"]
    assert script("data/prepare.py", *flags).code == 0
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    tok = get_tokenizer(name)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == (name, tok.vocab_size, tok.eot)
    total = 0
    for split in ("train", "val"):
        data = TokenData(out, split, 8, tok.vocab_size)
        facts = meta["splits"][split]
        texts = documents(out, split)
        assert data.tokens == facts["tokens"] and len(texts) == facts["documents"]
        assert data.nbytes == facts["bytes"] == sum(len(t.encode()) for t in texts)
        ids = [i for t in texts for i in [*tok.encode(t), tok.eot]]
        assert data.windows(np.array([3]))[0].tolist() == ids[3:12]
        assert facts["max_id"] == max(ids)
        total += len(texts)
    assert total == len(TEXTS)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_folders_files_and_worker_counts_give_the_same_bytes(script, tmp_path):
    """Parts are tokenized in any order and put together in the source's."""
    (tmp_path / "src").mkdir()
    write_jsonl(tmp_path / "src" / "a.jsonl", TEXTS[:100])
    write_parquet(tmp_path / "src" / "b.parquet", TEXTS[100:200])
    write_jsonl(tmp_path / "src" / "c.jsonl", TEXTS[200:])
    write_parquet(tmp_path / "one.parquet")
    made = []
    for name, source, workers in [("x", "src", 1), ("y", "src", 3), ("z", "one.parquet", 1)]:
        flags = [f"--source={tmp_path / source}", f"--dataset={tmp_path / name}"]
        assert script("data/prepare.py", *flags, f"--num_proc={workers}").code == 0
        made.append([(tmp_path / name / f"{s}.bin").read_bytes() for s in ("train", "val")])
    assert made[0] == made[1] == made[2]


def test_an_interrupted_run_goes_on_from_its_finished_parts(script, tmp_path):
    (tmp_path / "src").mkdir()
    write_jsonl(tmp_path / "src" / "a.jsonl", TEXTS[:100])
    (tmp_path / "src" / "b.jsonl").write_text("{broken\n", encoding="utf-8")
    flags = [f"--source={tmp_path / 'src'}", "--num_proc=1"]
    result = script("data/prepare.py", *flags, f"--dataset={tmp_path / 'x'}")
    assert result.code == 1 and "b.jsonl line 1" in result.err
    assert not (tmp_path / "x" / "train.bin").exists()
    stamp = (tmp_path / "x" / "parts" / "00000.json").stat().st_mtime_ns
    write_jsonl(tmp_path / "src" / "b.jsonl", TEXTS[100:])
    part = tmp_path / "x" / "parts" / "00000.json"
    assert part.stat().st_mtime_ns == stamp
    assert script("data/prepare.py", *flags, f"--dataset={tmp_path / 'x'}").code == 0
    assert script("data/prepare.py", *flags, f"--dataset={tmp_path / 'y'}").code == 0
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_one_text_file_is_split_near_its_end(script, tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    flags = [f"--source={tmp_path / 'book.txt'}", f"--dataset={tmp_path / 'out'}"]
    assert script("data/prepare.py", *flags).code == 0
    (train,), (val,) = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == text and 0.03 < len(val) / len(text) < 0.07 and val.startswith("line")


def test_a_tokenizer_json_comes_along(script, tmp_path, trained_json):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "tok.json").write_text(trained_json, encoding="utf-8")
    out = tmp_path / "out"
    flags = [f"--source={tmp_path / 'a.jsonl'}", f"--dataset={out}"]
    assert script("data/prepare.py", *flags, f"--tokenizer={tmp_path / 'tok.json'}").code == 0
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == trained_json
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS)


@pytest.fixture(scope="module")
def trained_json():
    import tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(TEXTS, trainer)
    return tok.to_str()


def test_the_embedded_corpus(script, tmp_path):
    out = tmp_path / "out"
    result = script("data/prepare.py", "--source=stdlib", f"--dataset={out}")
    assert result.code == 0, result.err
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == "tokenizer.json" and meta["splits"]["val"]["documents"] > 100
    assert meta["vocab_size"] == 1024
    assert 1_400_000 < meta["splits"]["train"]["bytes"] < 4_000_000
    texts = documents(out, "train")
    assert len(set(texts)) == len(texts), "no document twice"
    assert any("iterable" in t for t in texts)


def test_a_complete_folder_is_left_alone(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:50])
    flags = [f"--dataset={tmp_path / 'out'}"]
    script("data/prepare.py", *flags, f"--source={tmp_path / 'a.jsonl'}")
    before = (tmp_path / "out" / "train.bin").read_bytes()
    again = script("data/prepare.py", *flags, f"--source={tmp_path / 'a.jsonl'}")
    assert again.code == 0 and "complete already" in again.out
    other = script("data/prepare.py", *flags, f"--source={tmp_path / 'b.jsonl'}")
    assert other.code == 1 and "--overwrite=True" in other.err
    assert (tmp_path / "out" / "train.bin").read_bytes() == before
    flags += [f"--source={tmp_path / 'b.jsonl'}", "--overwrite=True"]
    assert script("data/prepare.py", *flags).code == 0
    assert (tmp_path / "out" / "train.bin").read_bytes() != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"body": "x"}\n', ["a.jsonl line 1", "'text'", "body", "--text_column"]),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', ["a.jsonl line 2"]),
        ("a.jsonl", b'{"text": "x"\n', ["a.jsonl line 1", "JSON"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl", "UTF-8"]),
        ("a.jsonl", b"", ["no documents"]),
        ("a.txt", b"abc \xff", ["a.txt", "UTF-8", "byte 4"]),
        ("a.parquet", b"PAR1 not really", ["a.parquet"]),
        ("a.pdf", b"x", [".txt", ".jsonl"]),
        ("a.csv", b"x", ["a.csv", "'text'", "x", "--text_column"]),
        ("nothing", None, ["nothing"]),
    ],
)
def test_mistakes_get_one_line(script, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    flags = [f"--source={tmp_path / name}", f"--dataset={tmp_path / 'out'}", "--tokenizer=bytes"]
    result = script("data/prepare.py", *flags)
    assert result.code == 1 and result.err.strip().count("\n") == 0, result.err
    for word in words:
        assert word in result.err
    assert not (tmp_path / "out" / "train.bin").exists()


def test_no_network_tells_the_ways_out(script, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    result = script("data/prepare.py", f"--dataset={tmp_path / 'out'}", "--tokenizer=bytes")
    assert result.code == 1
    for word in ("HF_ENDPOINT", "--source=FOLDER", "--source=stdlib", "Skylion007/openwebtext"):
        assert word in result.err


def test_data_and_train_agree_on_the_folder():
    """EasyGPT prepared data/*.bin and trained on data/openwebtext/*.bin."""
    import runpy

    train = runpy.run_path(str(ROOT / "train.py"))
    assert prepare.source.split("/")[-1] == train["dataset"] == "openwebtext"
    assert prepare.dataset_name() == train["dataset"]
    folder = ROOT / "data" / "openwebtext"
    assert prepare.dataset_folder("openwebtext") == train["check_folder"]("openwebtext") == folder


def test_importing_the_script_does_nothing(tmp_path):
    """Nor does making token files wait for torch."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = [*sys.path], [*sys.argv]\n"
        "import data.prepare\n"
        "assert before == (sys.path, sys.argv) and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "--source=nothing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [*tmp_path.iterdir()]


def write_two_files(folder):
    """A source of two parts, for two worker processes."""
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS[:200])
    write_parquet(folder / "b.parquet", TEXTS[200:])
    return folder


@pytest.mark.parametrize("way", ["elsewhere", "link", "module", "library path"])
def test_every_way_to_start_it_finds_the_project(tmp_path, way):
    """From a folder whose files are called as the project's are, and in worker processes, too."""
    here = tmp_path / "here"
    for name in ("data", "run", "text"):
        (here / name).mkdir(parents=True)
    for name in ("sources.py", "workers.py", "configurator.py", "data/sources.py"):
        (here / name).write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    command, env = [str(ROOT / "data" / "prepare.py")], {**os.environ, "PYTHONPATH": ""}
    if way == "link":
        try:
            (here / "p.py").symlink_to(command[0])
        except OSError:
            pytest.skip("no links here")
        command = ["p.py"]
    elif way == "module":
        command = ["-m", "data.prepare"]
    elif way == "library path":
        command, env["PYTHONPATH"] = ["-m", "data.prepare"], str(ROOT)
    source = write_two_files(tmp_path / "src")
    flags = [f"--source={source}", f"--dataset={tmp_path / 'out'}", "--num_proc=2"]
    done = subprocess.run(
        [sys.executable, *command, *flags, "--tokenizer=bytes"],
        cwd=ROOT if way == "module" else here,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS)


def test_the_users_home_is_a_tilde(script, tmp_path, monkeypatch, trained_json):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    write_two_files(tmp_path / "src")
    (tmp_path / "tok.json").write_text(trained_json, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in ("~/src", "~/src/*"):
        flags = [f"--source={source}", "--dataset=~/made/out", "--tokenizer=~/tok.json"]
        result = script("data/prepare.py", *flags, "--num_proc=1", "--overwrite=True")
        assert result.code == 0, result.err
        out = tmp_path / "made" / "out"
        assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS)
    assert script("data/prepare.py", "--dataset=~/made/out", "--verify=True").code == 0
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_ctrl_c_says_how_to_go_on(script, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "a.jsonl")
    flags = [f"--source={tmp_path / 'a.jsonl'}", f"--dataset={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(readers, "documents", interrupted)
        result = script("data/prepare.py", *flags)
    assert result.code == 130
    assert result.err == "prepare.py: interrupted; the same command goes on from here\n"
    assert sorted(p.name for p in (tmp_path / "out" / "parts").iterdir()) == ["plan.json"]
    assert script("data/prepare.py", *flags).code == 0
