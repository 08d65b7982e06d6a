"""The Hub's models, tokenizers and datasets, by a server that stands for it; folders, and slips."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
import yaml
from conftest import ROOT
from test_export import BYTES, SIZE, save
from test_imports import CASES, make_model
from test_prepare import TEXTS, documents, nanogpt, write_parquet
from test_sources import texts_in

from formats import checkpoint, easygpt, pretrained
from model import GPT


@pytest.fixture
def hub(tmp_path):
    """Repositories as name -> {file: bytes}, their address, and the files that were asked for.

    A dataset's name begins with datasets/, and its README.md may be a card.
    """
    repositories, asked = {}, []
    sha = "a" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            for name, files in repositories.items():
                file = path.removeprefix(f"/{name}/resolve/{sha}/")
                api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
                if path.startswith(f"{api}/tree"):
                    kinds = {"type": "file", "oid": sha}
                    tree = [{**kinds, "path": f, "size": len(d)} for f, d in files.items()]
                    return self.send(
                        json.dumps(tree).encode(), {"Content-Type": "application/json"}
                    )
                if path.startswith(api) and "/refs" not in path:
                    siblings = [{"rfilename": f, "size": len(d)} for f, d in files.items()]
                    card = yaml.safe_load(
                        files.get("README.md", b"").removeprefix(b"---").partition(b"\n---")[0]
                    )
                    about = {"id": name, "sha": sha, "siblings": siblings, "cardData": card}
                    if not isinstance(card, dict):
                        del about["cardData"]
                    return self.send(
                        json.dumps(about).encode(), {"Content-Type": "application/json"}
                    )
                if file in files:
                    if self.command == "GET":
                        asked.append(file)
                    tag = {"ETag": f'"{len(files[file]):040d}"', "X-Repo-Commit": sha}
                    return self.send(files[file], tag)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def send(self, data, headers):
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield repositories, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Run a script in a process of its own, which asks that server."""
    env = {**os.environ, "HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def go(name, *flags):
        command = [sys.executable, ROOT / name, *map(str, flags)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    return go


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def published(tmp_path):
    """The bytes of a checkpoint as the original EasyGPT published its own: GPT-2's tokens."""
    size = SIZE.__class__(**{**vars(SIZE), "vocab_size": 50304, "num_hidden_layers": 1})
    size = SIZE.__class__(**{**vars(size), "num_attention_heads": 2, "num_key_value_heads": 1})
    size = SIZE.__class__(**{**vars(size), "hidden_size": 8, "head_dim": 4})
    torch.manual_seed(0)
    model, args = easygpt.written(
        dict(list(GPT(size).state_dict().items())[:-1]), size, torch.float32
    )
    checkpoint.save(
        tmp_path / "p.pt", {"model": model, "model_args": args, "iter_num": 5, "config": {}}
    )
    return (tmp_path / "p.pt").read_bytes()


def test_a_repository_with_one_pt_file_is_taken(hub, run, published, tmp_path):
    """As the original's published weights are; what is exported lands not in the Hub's cache."""
    hub[0]["me/original"] = {"README.md": b"hello", "out/ckpt_best.pt": published}
    result = run("export.py", "--init_from=hf:me/original", "--out_dir=mine")
    assert result.returncode == 0 and "50257 gpt2 tokens" in result.stdout, result.stderr
    assert (tmp_path / "mine" / "hf" / "config.json").exists()


@pytest.mark.slow
def test_several_pt_files_are_named(hub, run, published):
    hub[0]["me/original"] = {"other.pt": published, "out/ckpt_best.pt": published}
    result = run("sample.py", "--init_from=hf:me/original")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "2 .pt files (other.pt, out/ckpt_best.pt)" in result.stderr


@pytest.mark.slow
def test_a_pt_file_beside_safetensors_is_left_alone(hub, run, tmp_path):
    case = CASES["Llama 2"]
    make_model(tmp_path / "model", case, case.make())
    files = hub[0]["me/llama"] = files_of(tmp_path / "model") | {"optimizer.pt": b"state"}
    result = run("sample.py", "--init_from=hf:me/llama", "--max_new_tokens=3", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert "optimizer.pt" not in hub[2] and "model.safetensors" in hub[2]
    files["config.json"] = json.dumps({"model_type": "gpt2"}).encode()
    hub[0]["me/gpt"] = files
    hub[2].clear()
    result = run("sample.py", "--init_from=hf:me/gpt")
    assert result.returncode == 1 and "learned positions" in result.stderr
    assert "model.safetensors" not in hub[2], "gigabytes for nothing"


def test_a_tokenizer_of_the_hub_takes_its_small_files_alone(hub, run, tmp_path):
    case = CASES["chat eos, pad is the usual end of text"]
    make_model(tmp_path / "model", case, case.make())
    hub[0]["me/chat"] = files_of(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n' * 300, encoding="utf-8")
    flags = ["--source=a.jsonl", f"--dataset={tmp_path / 'ds'}", "--num_proc=1"]
    result = run("data/prepare.py", *flags, "--tokenizer=hf:me/chat")
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "ds" / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == "tokenizer.json" and meta["eot"] == 2
    assert (tmp_path / "ds" / "tokenizer.json").read_bytes() == hub[0]["me/chat"]["tokenizer.json"]
    assert sorted({*hub[2]}) == [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    ]


# --- folders


def test_a_folder_with_one_pt_file_is_taken(script, tmp_path):
    save(tmp_path / "out", SIZE)
    (tmp_path / "out" / "ckpt_1.pt").rename(tmp_path / "out" / "mine.pt")
    for name in (tmp_path / "out", f"hf:{tmp_path / 'out'}"):
        path, _, _ = pretrained.read(str(name), "")
        assert path == tmp_path / "out" / "mine.pt"
    shutil.copy(tmp_path / "out" / "mine.pt", tmp_path / "out" / "other.pt")
    for name in (tmp_path / "out", f"hf:{tmp_path / 'out'}"):
        result = script("sample.py", f"--init_from={name}")
        assert result.code == 1 and "2 .pt files (mine.pt, other.pt)" in result.err


def test_a_runs_folder_is_its_newest_good_checkpoint(script, tiny, tmp_path):
    assert script("train.py", *tiny).code == 0
    out = tmp_path / "out"
    for name in ("sample.py", "export.py"):
        flags = ["--max_new_tokens=2"] if name == "sample.py" else []
        result = script(name, f"--init_from={out}", *flags)
        assert result.code == 0, result.err
        assert "ckpt_12.pt" in result.out + result.err
    assert (out / "hf" / "model.safetensors").exists()
    (out / "ckpt_12.pt").write_bytes(b"damaged")
    flags = [*tiny, f"--init_from={out}", f"--out_dir={tmp_path / 'next'}"]
    result = script("train.py", *flags)
    assert result.code == 0 and "passed over" in result.out + result.err
    state = checkpoint.load(tmp_path / "next" / "ckpt_12.pt")
    assert state["config"]["init_from"] == str(out) and state["iter_num"] == 12
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name != ".lock"}
    result = script("train.py", *tiny, f"--init_from={out}", "--overwrite=True")
    assert result.code == 1 and "--init_from=resume" in result.err
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name in before}


def test_a_folder_with_a_run_and_a_model_is_ambiguous(script, tmp_path):
    save(tmp_path / "out", SIZE)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).write_bytes(b"{}")
    result = script("sample.py", f"--init_from={tmp_path / 'out'}")
    assert result.code == 1 and "hf:" in result.err and ".pt" in result.err


# --- slips

GPT2 = ["learned positions, LayerNorm, GELU", "--init_from=hf:HuggingFaceTB/SmolLM2-135M"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", GPT2),
        ("gpt2-medium", GPT2),
        ("hf:gpt2-xl", GPT2),
        ("openai-community/gpt2", GPT2),
        ("hf:openai-community/gpt2-large", GPT2),
        ("some/model", ["no checkpoint some/model", "hf:some/model"]),
        ("word", ["no checkpoint word"]),
        ("a/ckpt_9.pt", ["no checkpoint a/ckpt_9.pt"]),
        ("empty", ["empty is a folder without a checkpoint"]),
    ],
)
@pytest.mark.parametrize("name_of", ["sample.py", "train.py"])
def test_names_that_are_no_model_get_an_answer(
    script, tmp_path, monkeypatch, dataset, name_of, name, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    flags = [f"--dataset={dataset}"] if name_of == "train.py" else []
    result = script(name_of, f"--init_from={name}", *flags)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    for word in words:
        assert word in result.err
    assert ("from the Hub" in result.err) == (name == "some/model")


def test_a_checkpoint_of_nanogpt_is_named_as_one(script, tmp_path, dataset):
    args = dict(
        n_layer=2, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=50304, dropout=0.0
    )
    state = {"model": {"transformer.wte.weight": torch.zeros(4, 8)}, "model_args": args}
    state |= {"optimizer": {}, "iter_num": 7, "best_val_loss": torch.tensor(3.0), "config": {}}
    (tmp_path / "out").mkdir()
    torch.save(state, tmp_path / "out" / "ckpt.pt")
    for name in ("resume", tmp_path / "out" / "ckpt.pt", tmp_path / "out"):
        out = tmp_path / ("out" if name == "resume" else "new")
        for command in ("train.py", "sample.py"):
            flags = [f"--dataset={dataset}"] if command == "train.py" else []
            flags += [f"--out_dir={out}"] if command == "train.py" or name == "resume" else []
            result = script(command, f"--init_from={name}", *flags)
            assert result.code == 1 and len(result.err.splitlines()) == 1
            for word in ("ckpt.pt, which nanoGPT wrote", *GPT2):
                assert word in result.err


def test_where_an_export_goes(script, tmp_path):
    save(tmp_path / "out", SIZE, BYTES)
    out = [f"--out_dir={tmp_path / 'out'}"]
    for to, file in (("gguf", "model-f32.gguf"), ("easygpt", "easygpt.pt")):
        if to == "easygpt":
            continue  # SIZE is none of its models; the path is found first
        for where in (f"{tmp_path / 'new'}/", str(tmp_path / "new")):
            result = script("export.py", *out, f"--to={to}", f"--output={where}")
            assert result.code == 0, result.err
            assert (tmp_path / "new" / file).is_file()
            (tmp_path / "new" / file).unlink()
    (tmp_path / "file").write_bytes(b"mine")
    for to, where in (
        ("hf", tmp_path / "file"),
        ("hf", tmp_path / "file" / "inside"),
        ("gguf", f"{tmp_path / 'file'}/"),
        ("gguf", tmp_path / "file" / "a.gguf"),
    ):
        result = script("export.py", *out, f"--to={to}", f"--output={where}")
        assert result.code == 1 and f"{tmp_path / 'file'} is a file" in result.err, (to, where)
        assert len(result.err.splitlines()) == 1
    assert (tmp_path / "file").read_bytes() == b"mine"
    result = script("sample.py", f"--out_dir={tmp_path / 'out' / 'ckpt_1.pt'}")
    assert result.code == 1 and f"--init_from={tmp_path / 'out' / 'ckpt_1.pt'}" in result.err


# --- datasets

FLAGS = ("--dataset=out", "--num_proc=1", "--overwrite=True")


@pytest.fixture
def words(hub, tmp_path):
    """A dataset of three files for training, and others."""
    files = {}
    for i in range(3):
        write_parquet(tmp_path / "p", TEXTS[i * 100 : i * 100 + 100])
        files[f"plain_text/train-{i:05d}-of-00003.parquet"] = (tmp_path / "p").read_bytes()
    write_parquet(tmp_path / "p", TEXTS[:20])
    files["plain_text/validation-00000-of-00001.parquet"] = (tmp_path / "p").read_bytes()
    files |= {"README.md": b"hello", "plain_text/test-00000-of-00001.parquet": b"not wanted"}
    hub[0]["datasets/me/words"] = files
    return files


def test_files_are_downloaded_read_and_deleted(hub, run, words, tmp_path):
    result = run("data/prepare.py", "--source=hub:me/words", f"--dataset={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    val, _ = nanogpt(TEXTS[:300], 0.05)
    out = tmp_path / "out"
    assert texts_in(out) == sorted(TEXTS[:300]) and (out / "val.bin").read_bytes() == val
    assert json.loads((out / "meta.json").read_text(encoding="utf-8"))["revision"] == "a" * 40
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert not list((tmp_path / "home").rglob("*.parquet"))
    assert sorted(hub[2]) == [f for f in sorted(words) if "train" in f]
    for said in ("1 of split validation (", "1 of split test (plain_text/test"):
        assert said in result.stdout


def test_the_hub_and_a_copy_of_it_are_read_alike(hub, run, words, tmp_path):
    for name, data in words.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    for flags in ((), ("--split=validation",), ("--val_split=validation",)):
        for source, out in (("hub:me/words", "a"), (tmp_path / "copy", "b")):
            where = (f"--source={source}", f"--dataset={tmp_path / out}", "--tokenizer=bytes")
            result = run("data/prepare.py", *where, *flags, "--overwrite=True", "--num_proc=1")
            assert result.returncode == 0, result.stderr
        for name in ("train.bin", "val.bin"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_archive_of_the_hub_holds_splits(hub, run, tmp_path):
    parts = {"train": TEXTS[:50], "valid": TEXTS[50:80], "test": TEXTS[80:100]}
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        for split, texts in parts.items():
            archive.writestr(
                f"{split}.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)
            )
    hub[0]["datasets/me/packed"] = {"data.zip": (tmp_path / "z").read_bytes()}
    where = ("--source=hub:me/packed", f"--dataset={tmp_path}/out", "--tokenizer=bytes")
    result = run("data/prepare.py", *where, "--num_proc=1", "--val_split=validation")
    assert result.returncode == 0 and "1 of split test" in result.stdout, result.stderr
    assert documents(tmp_path / "out", "train") == parts["train"]
    assert documents(tmp_path / "out", "val") == parts["valid"]


def test_a_card_of_the_hub_names_subsets(hub, run, tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/*/*\n"
    card += "- config_name: sample-10BT\n  data_files:\n  - split: train\n"
    card += "    path: sample/10BT/*\n---\n"
    write_parquet(tmp_path / "p", TEXTS[:50])
    write_parquet(tmp_path / "q", TEXTS[50:150])
    hub[0]["datasets/me/web"] = {
        "README.md": card.encode(),
        "sample/10BT/000_00000.parquet": (tmp_path / "p").read_bytes(),
        "data/CC-MAIN-1/000_00000.parquet": (tmp_path / "q").read_bytes(),
    }
    for subset, texts in (("sample-10BT", TEXTS[:50]), ("", TEXTS[50:150])):
        flags = (f"--subset={subset}",) if subset else ()
        where = (f"--dataset={tmp_path}/out", "--tokenizer=bytes", "--overwrite=True")
        result = run("data/prepare.py", "--source=hub:me/web", *where, *flags)
        assert result.returncode == 0, result.stderr
        assert texts_in(tmp_path / "out") == sorted(texts)
    result = run("data/prepare.py", "--source=hub:me/web", *where, "--subset=fr")
    assert result.returncode == 1 and "default, sample-10BT" in result.stderr


def test_a_copy_in_the_cache_is_found_without_a_network(hub, run, words, tmp_path):
    words["plain_text/test-00000-of-00001.parquet"] = words[
        "plain_text/validation-00000-of-00001.parquet"
    ]
    fetch = "import huggingface_hub as h; h.snapshot_download('me/words', repo_type='dataset')"
    (tmp_path / "fetch.py").write_text(fetch, encoding="utf-8")
    done = run(tmp_path / "fetch.py")
    assert done.returncode == 0, done.stderr
    del hub[0]["datasets/me/words"]
    where = ("--source=hub:me/words", f"--dataset={tmp_path}/out", "--num_proc=1")
    result = run("data/prepare.py", *where)
    assert result.returncode == 0, result.stderr
    assert texts_in(tmp_path / "out") == sorted(TEXTS[:300])
    assert "the Hub does not answer: the copy in" in result.stdout
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert meta["revision"] == "a" * 40
    assert run("data/prepare.py", *where).stdout.endswith("prepares it again)\n")
    (blobs,) = (tmp_path / "home").glob("hub/datasets--me--words/blobs")
    (blobs / "x.incomplete").write_bytes(b"half")
    result = run("data/prepare.py", *where, "--overwrite=True")
    assert result.returncode == 1 and "hf download me/words" in result.stdout
