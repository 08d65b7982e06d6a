"""What people hand to data/prepare.py: splits, formats, encodings, separators, columns."""

import csv
import gzip
import io
import json
import lzma
import re
import time
import zipfile

import numpy as np
import pytest
from test_prepare import TEXTS, documents, nanogpt, write_jsonl, write_parquet
from test_sources import tar_of, texts_in

from data import splits, vocabulary
from text.encoding import guess, hint
from text.files import read_text
from text.split import cut_at

CHINESE = "那天早上，老人走到海边，看见一条小船停在沙滩上。他想起了很多年以前的事情。" * 40


def run(script, source, out, *flags):
    """data/prepare.py with bytes for tokens."""
    flags = (f"--source={source}", f"--dataset={out}", "--num_proc=1", *flags)
    tokenizer = () if any("--tokenizer" in str(f) for f in flags) else ("--tokenizer=bytes",)
    return script("data/prepare.py", *flags, *tokenizer)


def refused(result, *words):
    """A mistake is one line that has the words."""
    assert result.code in (1, 2) and len(result.err.strip().splitlines()) == 1, result
    for word in words:
        assert word in result.err, result.err


def rows(texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def table(texts, delimiter=","):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    return out.getvalue().encode()


def zip_of(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


# --- splits

PARTED = {"train": TEXTS[:200], "validation": TEXTS[200:250], "test": TEXTS[250:300]}
LAYOUTS = {
    "hub": lambda s: f"data/{s}-00000-of-00001.parquet",
    "short": lambda s: {"validation": "valid"}.get(s, s) + ".jsonl",
    "dev": lambda s: {"validation": "dev"}.get(s, s) + "/part.0.jsonl",
    "c4": lambda s: f"c4-{s}.00000-of-00008.jsonl",
    "wiki": lambda s: f"wiki.{s}.jsonl",
    "last": lambda s: f"corpus_{s}_01.jsonl",
    "csv": lambda s: f"{s}.csv",
    "packed": lambda s: f"{s}.jsonl.gz",
}


def write_parted(folder, layout):
    for split, texts in PARTED.items():
        path = folder / LAYOUTS[layout](split)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            write_parquet(path, texts)
        elif path.suffix == ".csv":
            path.write_bytes(table(texts))
        else:
            path.write_bytes(gzip.compress(rows(texts)) if path.suffix == ".gz" else rows(texts))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_train_split_of_a_copy_is_read(script, tmp_path, layout):
    source = write_parted(tmp_path / "copy", layout)
    result = run(script, source, tmp_path / "out", "--tokenizer=gpt2")
    assert result.code == 0, result.err
    val, train = nanogpt(PARTED["train"], 0.05)
    assert (tmp_path / "out" / "val.bin").read_bytes() == val
    assert sorted(documents(tmp_path / "out", "train")) == train
    assert "1 of split validation (" in result.out and "1 of split test (" in result.out
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert meta["left_out"] == {"of split validation": 1, "of split test": 1}


@pytest.mark.parametrize("layout", ["hub", "short"])
def test_another_split_is_chosen_by_name(script, tmp_path, layout):
    source = write_parted(tmp_path / "copy", layout)
    assert run(script, source, tmp_path / "a", "--split=validation").code == 0
    assert texts_in(tmp_path / "a") == sorted(PARTED["validation"])
    result = run(script, source, tmp_path / "b", "--split=all")
    assert result.code == 0 and "left out" not in result.out
    assert texts_in(tmp_path / "b") == sorted(TEXTS[:300])
    refused(
        run(script, source, tmp_path / "c", "--split=nonsense"),
        "nonsense",
        "test, train, validation",
    )
    refused(run(script, source, tmp_path / "c", "--subset=nonsense"), "nonsense")
    refused(run(script, source, tmp_path / "c", "--revision=nonsense"), "--revision", "this disk")
    assert not (tmp_path / "c" / "train.bin").exists()


@pytest.mark.parametrize("flags", [(), ("--shards=0/1",)])
def test_a_named_split_validates(script, tmp_path, flags):
    """All of the train split is trained on; shares that are not merged read the same."""
    source, out = write_parted(tmp_path / "copy", "hub"), tmp_path / "out"
    assert run(script, source, out, "--val_split=dev", *flags).code == 0
    if flags:
        from text.tokens import TokenData

        data = [TokenData(out, split, 1, 320) for split in ("train", "val")]
        streams = [np.concatenate(d.ids).tobytes() for d in data]
        assert run(script, source, out, "--val_split=dev").code == 0
        assert streams == [(out / f"{s}.bin").read_bytes() for s in ("train", "val")]
    assert documents(out, "train") == PARTED["train"]
    assert documents(out, "val") == PARTED["validation"]
    refused(run(script, source, out, "--val_split=dev", "--val_fraction=0.1"), "--val_fraction")
    refused(run(script, source, tmp_path / "x", "--val_split=train"), "trained on")
    refused(run(script, source, tmp_path / "x", "--val_split=none"), "'none'")
    assert script("data/prepare.py", "--verify=True", f"--dataset={out}").code == 0


def test_a_named_split_with_a_limit_keeps_its_validation(script, tmp_path):
    source = write_parted(tmp_path / "copy", "hub")
    flags = ("--val_split=validation", "--max_tokens=1k")
    assert run(script, source, tmp_path / "out", *flags).code == 0
    assert documents(tmp_path / "out", "val") == PARTED["validation"]
    assert 1000 <= (tmp_path / "out" / "train.bin").stat().st_size / 2 < 1100


def test_what_is_saved_to_disk_has_splits(script, tmp_path):
    import datasets

    parts = {n: datasets.Dataset.from_dict({"text": t}) for n, t in PARTED.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    result = run(script, tmp_path / "saved", tmp_path / "out")
    assert result.code == 0 and "of split test" in result.out, result
    assert texts_in(tmp_path / "out") == sorted(PARTED["train"])
    odd = {"train_sft": parts["train"], "train_gen": parts["test"], "test_sft": parts["test"]}
    datasets.DatasetDict(odd).save_to_disk(tmp_path / "odd")
    refused(run(script, tmp_path / "odd", tmp_path / "x"), "train_sft or train_gen")
    assert run(script, tmp_path / "odd", tmp_path / "y", "--split=train_sft").code == 0
    assert texts_in(tmp_path / "y") == sorted(PARTED["train"])
    parts["test"].save_to_disk(tmp_path / "alone")
    assert run(script, tmp_path / "alone", tmp_path / "z").code == 0
    assert texts_in(tmp_path / "z") == sorted(PARTED["test"])


def test_a_card_says_what_the_splits_and_subsets_are(script, tmp_path):
    folder = tmp_path / "copy"
    for name, texts in {"sample/10BT/000": TEXTS[:50], "data/CC-1/000": TEXTS[50:150]}.items():
        (folder / name).parent.mkdir(parents=True)
        write_parquet(folder / f"{name}.parquet", texts)
    write_parquet(folder / "data" / "held.parquet", TEXTS[150:200])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/*/*\n  - split: test\n    path: data/held.parquet\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
        "---\nwords\n",
        encoding="utf-8",
    )
    assert run(script, folder, tmp_path / "a").code == 0
    assert texts_in(tmp_path / "a") == sorted(TEXTS[50:150])
    assert run(script, folder, tmp_path / "b", "--subset=sample-10BT").code == 0
    assert texts_in(tmp_path / "b") == sorted(TEXTS[:50])
    refused(run(script, folder, tmp_path / "c", "--subset=x"), "default, sample-10BT")


def test_names_that_say_a_split():
    for name in ("train.txt", "a/train/0.txt", "x_train.jsonl", "train-00-of-01.csv", "TRAIN.TXT"):
        assert splits.split_in(name) == "train"
    for name in (
        "dev.txt",
        "valid.en.txt",
        "a.val.jsonl.gz",
        "validation/a.md",
        "en_dev_1.txt",
        "dev-clean/a.txt",
    ):
        assert splits.split_in(name) == "validation"
    for name in (
        "test.csv",
        "eval.jsonl",
        "b/testing/x.txt",
        "Wiki Test2 raw.txt",
        "split=test/p.md",
    ):
        assert splits.split_in(name) == "test"
    for name in ("contest.txt", "trainer.md", "a/developer/b.txt", "values.csv"):
        assert splits.split_in(name) == ""


def test_capitals_begin_the_words_of_a_name():
    for name in (
        "trainData.json",
        "TrainSet.txt",
        "myTrain.txt",
        "a/TRAIN_v2.txt",
        "traindata.txt",
    ):
        assert splits.split_in(name) == "train", name
    for name in ("validData.json", "wikiDev.txt", "DevSet.csv", "devdata.txt", "theValid2.txt"):
        assert splits.split_in(name) == "validation", name
    for name in ("testData.json", "WikiTest.txt", "testdata.txt", "EvalSet.csv"):
        assert splits.split_in(name) == "test", name
    for name in (
        "latestNews.txt",
        "Contest.txt",
        "theGreatest.txt",
        "Developer.txt",
        "aContestB.md",
    ):
        assert splits.split_in(name) == "" and not splits.may_say(name), name


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_word_that_ends_like_a_split_is_mentioned(script, tmp_path, kind):
    names = ["newstrain2014.txt", "newstest2014.txt", "newsdev2014.txt", "latest.txt"]
    source = tmp_path / f"a.{kind}"
    if kind == "zip":
        source.write_bytes(zip_of([(name, "some words\n" * 30) for name in names]))
    else:
        source.mkdir()
        for name in names:
            (source / name).write_text("some words\n" * 30, encoding="utf-8")
    result = run(script, source, tmp_path / "out")
    (line,) = [line for line in result.out.splitlines() if "newstest2014" in line]
    assert "2 whose names" in line and "newsdev2014" in line and "latest" not in line
    assert left_out(tmp_path / "out") == {}


def test_files_beside_a_test_file_are_for_training(script, tmp_path):
    for name, texts in {"a": TEXTS[:100], "test": TEXTS[100:200]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    (tmp_path / "src").mkdir()
    for name in ("a", "test"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "src" / f"{name}.jsonl")
    result = run(script, tmp_path / "src", tmp_path / "out")
    assert result.code == 0 and "of split test (test.jsonl)" in result.out
    assert texts_in(tmp_path / "out") == sorted(TEXTS[:100])
    (tmp_path / "src" / "a.jsonl").unlink()
    refused(run(script, tmp_path / "src", tmp_path / "x"), "'train'", "there is: test")
    assert run(script, tmp_path / "src" / "test.jsonl", tmp_path / "y").code == 0
    refused(run(script, tmp_path / "src" / "test.jsonl", tmp_path / "z", "--split=test"), "--split")


def cached(hub, revisions, main=None):
    """An entry of the Hub's cache as hf download writes it, with copies where that has links."""
    entry = hub / "datasets--u--n"
    (entry / "blobs").mkdir(parents=True)
    for revision, texts in revisions.items():
        blob, folder = entry / "blobs" / revision[::-1], entry / "snapshots" / revision
        blob.write_bytes(rows(texts))
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(blob.read_bytes())
        (folder / "README.md").write_text("---\nconfigs: []\n---\n", encoding="utf-8")
    if main:
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(main, encoding="utf-8")
    return entry


@pytest.mark.parametrize("where", [".", "snapshots", "..", "**/*.jsonl", "../**/*.jsonl"])
def test_one_revision_of_the_hubs_cache_is_read(script, tmp_path, where):
    found = {"aaa": TEXTS[:100], "bbb": TEXTS[:150]}
    for hub, revisions, main in (("a", found, "aaa"), ("b", {"bbb": TEXTS[:150]}, None)):
        entry = cached(tmp_path / hub, revisions, main)
        result = run(script, entry / where, tmp_path / f"o{hub}")
        assert result.code == 0, result.err
        assert texts_in(tmp_path / f"o{hub}") == sorted(revisions[main or "bbb"])
        assert hub == "b" or "bbb" in result.out
    entry = cached(tmp_path / "c", found)
    refused(run(script, entry / where, tmp_path / "oc"), "2 revisions", "aaa, bbb", "--source=")
    assert run(script, entry / "snapshots" / "aaa", tmp_path / "oc").code == 0


def test_a_folder_called_snapshots_is_one_like_any(script, tmp_path):
    for name in ("2023", "2024"):
        (tmp_path / "src" / "snapshots" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "src" / "snapshots" / name / "a.jsonl", [name] * 20)
    assert run(script, tmp_path / "src", tmp_path / "out").code == 0
    assert texts_in(tmp_path / "out") == ["2023"] * 20 + ["2024"] * 20


# --- the share of validation


@pytest.mark.parametrize("sizes", [(1_050_000, 20_000), (20_000, 1_050_000), (300_000, 10, 10, 10)])
def test_few_unequal_files_are_split_by_tokens(script, tmp_path, sizes):
    (tmp_path / "src").mkdir()
    texts = [("a line of text\n" * (size // 15 + 1))[:size] for size in sizes]
    for i, text in enumerate(texts):
        (tmp_path / "src" / f"{i}.txt").write_text(text, encoding="utf-8")
    assert run(script, tmp_path / "src", tmp_path / "out").code == 0
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert "".join([*train, *val]) == "".join(texts)
    share = sum(map(len, val)) / sum(map(len, texts))
    assert 0.024 < share < 0.1, share
    assert script("data/prepare.py", "--verify=True", f"--dataset={tmp_path / 'out'}").code == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert sum(s["bytes"] for s in meta["splits"].values()) == sum(map(len, texts))


def test_where_a_source_is_cut():
    even = np.full(500, 100)
    assert cut_at(even, 0.05, 2357) == 0, "many alike: nanoGPT's split"
    assert cut_at(np.full(5000, 100), 0.05, 2357) == 0
    few = np.array([1_000_000, 500_000, 30_000, 30_000])
    assert cut_at(few, 0.05, 2357) == 1_500_000, "at an edge that is near"
    small = np.array([100_000] + [600] * 10)
    assert cut_at(small, 0.05, 2357) == 100_600, "at the nearest edge, not at the last one"
    assert cut_at(small[::-1], 0.05, 2357) < 106_000 * 0.951, "inside a document where none is near"
    assert 0 < cut_at(np.array([100, 10**6]), 0.05, 2357) < 10**6
    assert cut_at(np.array([10, 5, 7]), 0.05, 2357) == 0, "too little to cut"


@pytest.mark.parametrize(("size", "limit"), [(350, 5000), (9000, 1000), (2600, 1000)])
def test_what_a_limit_has_left_is_what_is_said(script, tmp_path, size, limit):
    write_jsonl(tmp_path / "a.jsonl", ["x" * size] * 40)
    result = run(script, tmp_path / "a.jsonl", tmp_path / "out", f"--max_tokens={limit}")
    made = sum((tmp_path / "out" / f"{s}.bin").stat().st_size // 2 for s in ("train", "val"))
    assert ("taken whole" in result.out) == (made > 2 * limit), result.out
    assert "taken whole" not in result.out or f"there are {made:,}" in result.out


# --- a tokenizer of the text's own


@pytest.mark.parametrize("kind", ["letters", "chinese", "blanks"])
def test_a_line_without_an_end_trains_a_tokenizer(script, tmp_path, kind):
    rng = np.random.default_rng(0)
    alphabet = {"letters": "ACGT", "chinese": CHINESE[:30], "blanks": " \n"}[kind]
    text = "".join(np.array(list(alphabet))[rng.integers(0, len(alphabet), 300_000)])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    t0 = time.perf_counter()
    result = run(script, tmp_path / "a.txt", tmp_path / "out", "--tokenizer=train:400")
    assert result.code == 0 and "learning 400 tokens" in result.out
    assert time.perf_counter() - t0 < 20
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert "".join([*train, *val]) == text


def test_words_are_cut_only_where_they_have_no_end():
    assert [*vocabulary.cut_words("a few words\n" * 100)] == ["a few words\n" * 100]
    pieces = [*vocabulary.cut_words("x" * 1000 + " y")]
    assert "".join(pieces) == "x" * 1000 + " y" and max(map(len, pieces)) <= 258


def test_too_little_text_for_a_vocabulary_is_said(script, tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 500, encoding="utf-8")
    result = run(script, tmp_path / "a.txt", tmp_path / "out", "--tokenizer=train:8192")
    assert result.code == 0 and "WARNING" in result.out and "of 8,192 tokens" in result.out


# --- columns


def test_a_column_that_is_no_text_is_one_line(script, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = {"lists": [["a", "b"]] * 5, "numbers": [1] * 5, "nothing": [None] * 5}
    data = pa.table({**values, "inner": [{"text": "x"}] * 5, "good": ["fine"] * 5})
    pq.write_table(data, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as f, pa.ipc.new_stream(f, data.schema) as w:
        w.write_table(data)
    for name in ("a.parquet", "a.arrow"):
        for column in (*values, "inner"):
            result = run(script, tmp_path / name, tmp_path / "x", f"--text_column={column}")
            refused(result, name, repr(column), "good", "--text_column")
        refused(run(script, tmp_path / name, tmp_path / "x"), "no column 'text'", "good")
        flags = ("--text_column=inner.text", f"--dataset={tmp_path / name[2:]}")
        assert run(script, tmp_path / name, tmp_path / name[2:], *flags).code == 0
        assert texts_in(tmp_path / name[2:]) == ["x"] * 5
        refused(run(script, tmp_path / name, tmp_path / "x", "--text_column=inner.no"), "inner.no")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "json"])
def test_null_is_said_with_its_row(script, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one", "two", None, "four"]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
    elif kind == "arrow":
        schema = pa.table({"text": texts}).schema
        with pa.OSFile(str(path), "wb") as f, pa.ipc.new_file(f, schema) as writer:
            writer.write_table(pa.table({"text": texts}))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in texts]), encoding="utf-8")
    else:
        path.write_bytes(rows(texts))
    refused(run(script, path, tmp_path / "x"), "null", " 3", "--skip_bad=True", "'text'")
    result = run(script, path, tmp_path / "y", "--skip_bad=True")
    assert result.code == 0 and "left out 1" in result.out
    assert texts_in(tmp_path / "y") == ["four", "one", "two"]


def test_a_template_joins_columns(script, tmp_path):
    found = [{"title": f"T{i}", "n": i, "deep": {"text": f"body {i}"}} for i in range(30)]
    wanted = sorted(f"T{i} ({i})\n\nbody {i} {{}}" for i in range(30))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(found), tmp_path / "a.parquet")
    template = "--template={title} ({n})\\n\\n{deep.text} {{}}"
    for name in ("a.jsonl", "a.parquet"):
        result = run(script, tmp_path / name, tmp_path / name[2:], template)
        assert result.code == 0, result.err
        assert texts_in(tmp_path / name[2:]) == wanted
        refused(run(script, tmp_path / name, tmp_path / "x", "--template={no}"), "'no'")
        refused(run(script, tmp_path / name, tmp_path / "x", "--template={title"), "template")
        refused(run(script, tmp_path / name, tmp_path / "x", "--template={title.__class__}"), name)
        refused(run(script, tmp_path / name, tmp_path / "x", "--template={title!r}"), "column")
        refused(run(script, tmp_path / name, tmp_path / "x", template, "--text_column=n"), "--text")


def test_what_help_says_of_templates_is_what_one_types(script, tmp_path):
    (shown,) = re.findall('"([^"]+)"; ', " ".join(script("data/prepare.py", "--help").out.split()))
    found = [{"title": f"T{i}", "text": f"body {i}"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    (tmp_path / "c.py").write_text(f'template = "{shown}"', encoding="utf-8")
    for i, flag in enumerate((f"--template={shown}", tmp_path / "c.py")):
        result = run(script, tmp_path / "a.jsonl", tmp_path / f"o{i}", flag)
        assert result.code == 0, result.err
        assert texts_in(tmp_path / f"o{i}") == sorted(f"T{i}\n\nbody {i}" for i in range(30))


# --- formats


MADE = {
    "a.jsonl.xz": lzma.compress(rows(TEXTS)),
    "a.ndjson": rows(TEXTS),
    "lines.json": rows(TEXTS),
    "lines.json.gz": gzip.compress(rows(TEXTS)),
    "array.json": json.dumps([{"text": t} for t in TEXTS]).encode(),
    "pretty.json": json.dumps([{"text": t} for t in TEXTS], indent=2).encode(),
    "apart.json": b"\n".join(json.dumps({"text": t}, indent=1).encode() for t in TEXTS),
    "texts.json": json.dumps(TEXTS).encode(),
    "a.csv": table(TEXTS),
    "semicolon.csv": table(TEXTS, ";"),
    "tabs.csv.gz": gzip.compress(table(TEXTS, "\t")),
    "quoted.tsv.gz": gzip.compress(table(TEXTS, "\t").replace(b"id\ttext", b'"id"\t"text"', 1)),
    "a.zip": zip_of([("a/1.jsonl", rows(TEXTS[:100])), ("b.csv", table(TEXTS[100:]))]),
    "texts.zip": zip_of([(f"{i:03d}.md", t) for i, t in enumerate(TEXTS)]),
    "a.tar.gz": gzip.compress(tar_of([("1.json.gz", gzip.compress(rows(TEXTS)))])),
    "a.tgz": gzip.compress(tar_of([(f"{i:03d}.text", t.encode()) for i, t in enumerate(TEXTS)])),
    "bom.csv": b"\xef\xbb\xbf" + table(TEXTS),
    "bom.json": b"\xef\xbb\xbf" + rows(TEXTS),
}


@pytest.mark.parametrize("name", MADE)
def test_forms_of_text(script, tmp_path, name):
    (tmp_path / name).write_bytes(MADE[name])
    result = run(script, tmp_path / name, tmp_path / "out", "--tokenizer=gpt2")
    assert result.code == 0, result.err
    val, train = nanogpt(TEXTS, 0.05)
    assert sorted(documents(tmp_path / "out", "train")) == train
    assert (tmp_path / "out" / "val.bin").read_bytes() == val


def test_long_rows_of_json_come_in_pieces(script, tmp_path):
    texts = [f"{i} " + "word [1, {2}] " * 50_000 for i in range(6)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts]), encoding="utf-8")
    assert run(script, tmp_path / "a.json", tmp_path / "out", "--val_fraction=0.2").code == 0
    assert texts_in(tmp_path / "out") == sorted(texts)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b'[{"text": "x"}, {"text": "y"}', ["a.json", "truncated"]),
        ("a.json", b'[{"text": "x"}] {}', ["a.json", "follows"]),
        ("a.json", b'[{"text": "x"}, {"text"', ["a.json", "not JSON"]),
        ("a.json", b'{\n "rows": 1}\n', ["row 1", "rows", "--text_column"]),
        ("a.csv", b"", ["a.csv", "columns"]),
        ("a.csv", b"text,id\nx\n", ["line 2", "1 fields, not 2"]),
        ("a.csv", b'text,id\n"x,1\n', ["line 2"]),
        ("a.csv", b"text,text\nx,y\n", ["several columns"]),
        ("a.zip", zip_of([("a.txt", "x")])[:-30], ["a.zip", "damaged"]),
        ("a.zip", zip_of([("a.pdf", "x")]), ["no documents"]),
        ("a.zip", zip_of([("test.txt", "x")]), ["a.zip", "'train'", "test"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "x",  # a zip has the time in it
)
def test_damaged_forms(script, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    refused(run(script, tmp_path / name, tmp_path / "out"), *words)


def test_a_tsv_has_no_quotes(script, tmp_path):
    texts = [f'"{i} words' if i % 3 else f'{i} "words", and "more"' for i in range(300)]
    lines = "".join(f"{i}\t{t}\n" for i, t in enumerate(texts))
    (tmp_path / "a.tsv").write_text(f"id\ttext\n{lines}", encoding="utf-8")
    result = run(script, tmp_path / "a.tsv", tmp_path / "out")
    assert result.code == 0 and "name it .csv" not in result.out, result
    assert texts_in(tmp_path / "out") == sorted(texts)
    kept = lines + '300\t"the ""last"" words"\n'
    (tmp_path / "b.tsv").write_text(f"id\ttext\n{kept}", encoding="utf-8")
    result = run(script, tmp_path / "b.tsv", tmp_path / "out2")
    assert result.code == 0 and "name it .csv" in result.out and "left out" not in result.out
    assert texts_in(tmp_path / "out2") == sorted([*texts, '"the ""last"" words"'])
    assert left_out(tmp_path / "out2") == {}
    (tmp_path / "c.tsv").write_bytes(table(TEXTS, "\t"))
    refused(run(script, tmp_path / "c.tsv", tmp_path / "out3"), "line 3", "name it .csv")


@pytest.mark.parametrize("bad", ['"open', '"Hello" he said', '"a" "b"'])
def test_a_quote_without_its_other_half_costs_its_line(script, tmp_path, bad):
    lines = [f"{i},text {i}\n" for i in range(300)]
    lines[100] = f"100,{bad}\n"
    (tmp_path / "a.csv").write_text(f"id,text\n{''.join(lines)}", encoding="utf-8")
    refused(run(script, tmp_path / "a.csv", tmp_path / "x"), "line 102", "written twice")
    result = run(script, tmp_path / "a.csv", tmp_path / "out", "--skip_bad=True")
    assert result.code == 0 and "left out 1" in result.out
    assert texts_in(tmp_path / "out") == sorted({f"text {i}" for i in range(300)} - {"text 100"})


@pytest.mark.parametrize(
    ("head", "row"),
    [("id, text", '{}, "a, {}"'), ("id ,text ", '{},"a, {}"'), (" id;\ttext", '{};"a, {}"')],
)
def test_blanks_around_the_names_of_columns(script, tmp_path, head, row):
    lines = "".join(row.format(i, i) + "\n" for i in range(50))
    (tmp_path / "a.csv").write_text(f"{head}\n{lines}", encoding="utf-8")
    result = run(script, tmp_path / "a.csv", tmp_path / "out")
    assert result.code == 0, result.err
    assert texts_in(tmp_path / "out") == sorted(f"a, {i}" for i in range(50))


def test_a_separator_that_is_not_read_is_named(script, tmp_path):
    (tmp_path / "a.csv").write_text("id|text\n1|a\n", encoding="utf-8")
    refused(run(script, tmp_path / "a.csv", tmp_path / "x"), "no column 'text'", "'|'", "tabs")


def test_archives_have_splits_and_strangers(script, tmp_path):
    members = [("d/train.jsonl", rows(TEXTS[:100])), ("d/test.jsonl", rows(TEXTS[100:150]))]
    members += [("d/photo.png", b"\x89PNG"), ("__MACOSX/d/._train.jsonl", b"x")]
    (tmp_path / "a.zip").write_bytes(zip_of(members))
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    for name in ("a.zip", "a.tar"):
        result = run(script, tmp_path / name, tmp_path / name[2:])
        assert result.code == 0, result.err
        assert texts_in(tmp_path / name[2:]) == sorted(TEXTS[:100])
        for words in ("1 .png in an archive", "1 of split test", "1 hidden"):
            assert words in result.out
        meta = json.loads((tmp_path / name[2:] / "meta.json").read_text(encoding="utf-8"))
        assert sum(meta["left_out"].values()) == 3
        assert run(script, tmp_path / name, tmp_path / f"{name}2", "--split=test").code == 0
        assert texts_in(tmp_path / f"{name}2") == sorted(TEXTS[100:150])


ARCHIVES = {
    ".zip": zip_of,
    ".tar": lambda members: tar_of(members),
    ".tar.gz": lambda members: gzip.compress(tar_of(members), 1),
}


def parted(**names):
    """Members of an archive: the rows of a split in each."""
    return [(name, rows(PARTED[split])) for split, name in names.items()]


def left_out(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))["left_out"]


def check_parted(script, source, out, val):
    """A source of the splits of PARTED is read by default, with --split and with --val_split."""
    assert run(script, source, out / "a").code == 0
    assert texts_in(out / "a") == sorted(PARTED["train"])
    assert left_out(out / "a") == {"of split validation": 1, "of split test": 1}
    assert run(script, source, out / "b", "--split=test").code == 0
    assert texts_in(out / "b") == sorted(PARTED["test"])
    assert run(script, source, out / "c", f"--val_split={val}").code == 0
    assert documents(out / "c", "val") == PARTED["validation"]


@pytest.mark.parametrize(
    "name", ["my_training_data.zip", "train_test_valid.tar", "training.tar.gz", "eval.zip", "x.tar"]
)
def test_the_splits_in_an_archive_count_before_its_own_name(script, tmp_path, name):
    members = parted(train="train.jsonl", validation="valid.jsonl", test="test.jsonl")
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name[name.index(".") :]](members))
    check_parted(script, path, tmp_path, "dev")
    assert documents(tmp_path / "c", "train") == PARTED["train"]
    assert left_out(tmp_path / "c") == {"of split test": 1}
    refused(run(script, path, tmp_path / "d", "--split=no"), "'no'", "test, train, validation")
    refused(run(script, path, tmp_path / "d", "--val_split=no"), "'no'", "test, train, validation")
    refused(run(script, path, tmp_path / "d", "--val_split=train"), "trained on")


def test_an_archives_own_name_counts_where_no_name_in_it_says_a_split(script, tmp_path):
    src = tmp_path / "src"
    for split, texts in PARTED.items():
        (src / split).mkdir(parents=True)
        (src / split / "data.zip").write_bytes(zip_of([("part.jsonl", rows(texts))]))
    for flags, split in (((), "train"), (("--split=test",), "test")):
        assert run(script, src, tmp_path / split, *flags).code == 0
        assert texts_in(tmp_path / split) == sorted(PARTED[split])
    assert run(script, src, tmp_path / "v", "--val_split=valid").code == 0
    assert documents(tmp_path / "v", "val") == PARTED["validation"]
    (tmp_path / "test.zip").write_bytes(zip_of([("part.jsonl", rows(PARTED["test"]))]))
    assert run(script, tmp_path / "test.zip", tmp_path / "t").code == 0
    for value in ("train", "all"):
        result = run(script, tmp_path / "test.zip", tmp_path / "u", f"--split={value}")
        refused(result, "--split has no effect")
    result = run(script, tmp_path / "test.zip", tmp_path / "w", "--val_split=validation")
    refused(result, "there is no split 'validation'")


def test_splits_one_level_down(script, tmp_path):
    """In the archives of a folder, and in archives in an archive."""
    tars = [(f"{s}.tar", tar_of([("a.jsonl", rows(texts))])) for s, texts in PARTED.items()]
    src = tmp_path / "src"
    src.mkdir()
    (src / "all.tar").write_bytes(tar_of(tars))
    for source in (src, src / "all.tar"):
        out = tmp_path / f"of_{source.name}"
        check_parted(script, source, out, "validation")
        refused(run(script, source, out / "d", "--val_split=no"), "'no'", "validation")


@pytest.mark.parametrize("kind", [*ARCHIVES, "folder"])
@pytest.mark.parametrize("above", ["", "corpus-1.0/"])
def test_what_tells_about_the_data_is_no_document(script, tmp_path, kind, above):
    members = [("train.jsonl", rows(TEXTS[:200])), ("test.jsonl", rows(TEXTS[200:]))]
    plain = [("a.jsonl", rows(TEXTS[:200]))]
    for number, found in enumerate((members, plain)):
        found = [*found, ("README.md", b"about"), ("LICENSE.txt", b"mine")]
        source = tmp_path / f"{number}{kind}"
        if kind == "folder":
            for name, data in found:
                (source / above).mkdir(parents=True, exist_ok=True)
                (source / above / name).write_bytes(data)
        else:
            source.write_bytes(ARCHIVES[kind]([(above + name, data) for name, data in found]))
        result = run(script, source, tmp_path / f"o{number}")
        assert result.code == 0 and "2 about the data" in result.out, result
        assert texts_in(tmp_path / f"o{number}") == sorted(TEXTS[:200])


@pytest.mark.parametrize("kind", ARCHIVES)
def test_the_same_rows_in_several_kinds_of_files_are_read_once(script, tmp_path, kind):
    members = [("train.csv", table(TEXTS[:200])), ("train.jsonl", rows(TEXTS[:200]))]
    members.append(("test.csv", table(TEXTS[200:])))
    (tmp_path / f"a{kind}").write_bytes(ARCHIVES[kind](members))
    assert run(script, tmp_path / f"a{kind}", tmp_path / "out").code == 0
    assert texts_in(tmp_path / "out") == sorted(TEXTS[:200])
    assert left_out(tmp_path / "out") == {"of other kinds": 1, "of split test": 1}


def test_zips_that_cannot_be_read(script, tmp_path):
    (tmp_path / "bomb.zip").write_bytes(zip_of([("a.txt", bytes(300 * 2**20))]))
    refused(run(script, tmp_path / "bomb.zip", tmp_path / "x"), "a.txt", "bomb")
    for flag, words in ((1, "encrypted"), (1 << 5, "patched"), (1 << 6, "strong encryption")):
        locked = bytearray(zip_of([("a.txt", "some text")]))
        for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
            locked[locked.index(mark) + at] |= flag
        (tmp_path / "locked.zip").write_bytes(locked)
        refused(run(script, tmp_path / "locked.zip", tmp_path / "x"), "locked.zip", words)


def test_what_is_left_out_of_a_folder_is_named(script, tmp_path):
    src = tmp_path / "src"
    (src / ".git").mkdir(parents=True)
    files = {
        "a.txt": "t",
        "b.md": "m",
        "c.TXT": "T",
        "d.text": "x",
        "e.pdf": "%PDF",
        "f.html": "<p>",
    }
    files |= {".git/g.txt": "no", ".h.txt": "no", "i": "no", "j.PDF": "no"}
    for name, text in files.items():
        (src / name).write_text(text, encoding="utf-8")
    (src / "k.json").write_bytes(rows(["json"]))
    (src / "l.csv").write_bytes(table(["csv"]))
    write_parquet(src / "m.parquet", ["parquet"])
    result = run(script, src, tmp_path / "out")
    assert result.code == 0, result.err
    assert texts_in(tmp_path / "out") == sorted(["t", "m", "T", "x", "json", "csv", "parquet"])
    for words in (
        "2 .pdf (e.pdf, j.PDF)",
        "1 .html (f.html)",
        "2 hidden",
        "1 without a suffix (i)",
    ):
        assert words in result.out, result.out
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert meta["left_out"] == {".pdf": 2, ".html": 1, "hidden": 2, "without a suffix": 1}


# --- encodings


FRENCH = "Le garçon a mangé un gâteau à la crème, où était-il passé ? " * 60
JAPANESE = "彼は海辺で小さな船を見た。それは昔のことです。" * 60
TAIWANESE = "那天早上老人走到海邊看見一條小船停在沙灘上他想起了很多年以前的事情" * 60
RUSSIAN = "Однажды утром старик пошёл к морю и увидел маленькую лодку. " * 60
ENCODED = {"gb18030": CHINESE, "big5": TAIWANESE, "utf-16": JAPANESE, "utf-16-le": FRENCH}
ENCODED |= {"shift_jis": JAPANESE, "cp1252": FRENCH, "cp1251": RUSSIAN}


@pytest.mark.parametrize("encoding", ENCODED)
def test_other_encodings_are_read_and_guessed(script, tmp_path, encoding):
    text = ENCODED[encoding]
    data = {
        "a.txt": text,
        "b.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
        "c.csv": f'text,id\r\n"{text}",1\r\n',
    }
    for name, content in data.items():
        path = tmp_path / name
        path.write_bytes(content.encode(encoding))
        flags = (f"--encoding={encoding}", "--val_fraction=0.3")
        result = run(script, path, tmp_path / name[:1], *flags)
        assert result.code == 0, result.err
        found = [d for s in ("train", "val") for d in documents(tmp_path / name[:1], s)]
        assert "".join(found) == text
        if name != "c.csv" and encoding != "cp1252" or name == "a.txt":  # neighbours are as likely
            result = run(script, path, tmp_path / "x")
            refused(result, name, "not UTF-8", "perhaps", "--encoding=")
            guessed = result.err.split("--encoding=")[1].split()[0]
            assert content.encode(encoding).decode(guessed) == content


def test_a_damaged_byte_is_replaced_when_asked(script, tmp_path):
    data = (CHINESE + "ascii " * 100).encode()
    (tmp_path / "a.txt").write_bytes(data[:3001] + data[3002:])
    refused(run(script, tmp_path / "a.txt", tmp_path / "x"), "--encoding=utf-8:replace")
    assert run(script, tmp_path / "a.txt", tmp_path / "y", "--encoding=utf-8:replace").code == 0
    found = "".join(d for s in ("train", "val") for d in documents(tmp_path / "y", s))
    assert "\ufffd" in found and found.endswith("ascii ")
    refused(run(script, tmp_path / "a.txt", tmp_path / "z", "--encoding=nonsense"), "'nonsense'")
    refused(run(script, tmp_path / "a.txt", tmp_path / "z", "--encoding=base64"), "'base64'")
    refused(run(script, tmp_path / "a.txt", tmp_path / "z", "--encoding=big5"), "a.txt", "big5")


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        *((name, "utf-8:replace") for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.csv")),
        *((name, "cp1252:replace") for name in ("a.txt", "a.tar")),
    ],
)
def test_damage_far_behind_utf8_is_replaced_when_asked(script, tmp_path, name, encoding):
    text = CHINESE * 40
    plain = {"a.jsonl": json.dumps({"text": text}, ensure_ascii=False), "a.csv": f"text\n{text}\n"}
    data = plain.get(name.removesuffix(".gz"), text).encode()
    at = data.rindex(text[:5].encode())
    data = data[:at] + b"\xff" + data[at:]
    made = {"a.jsonl.gz": gzip.compress, "a.tar": lambda data: tar_of([("a.txt", data)])}
    (tmp_path / name).write_bytes(made.get(name, bytes)(data))
    result = run(script, tmp_path / name, tmp_path / "out", f"--encoding={encoding}")
    assert result.code == 0, result.err
    found = "".join(d for s in ("train", "val") for d in documents(tmp_path / "out", s))
    assert found.count("\ufffd") == 1 and found[:50] == text[:50]


@pytest.mark.parametrize("text", ["le petit café", "café", "Ã"])
def test_a_last_letter_is_no_sign_of_utf8(script, tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"some more text to split, and more")
    result = run(script, tmp_path, tmp_path / "out", "--encoding=latin-1", "--val_fraction=0.5")
    assert result.code == 0, result.err
    assert text in texts_in(tmp_path / "out")


SAID = (
    ("cp1252", "Les élèves étaient arrivés très tôt à l'école, où le garçon mangeait."),
    ("cp1252", "Não sei o que dizer: é difícil explicar às crianças que a avó já não está."),
    ("cp1252", "En flicka gick på vägen åt skogen för att hälsa på sin mormor."),
    ("cp1252", "El niño comió un plátano. ¿Dónde está la señora? Mañana será otro día."),
    ("cp1252", "Die Mädchen grüßen den Bäcker, der schöne Brötchen hat."),
    ("cp1252", "Hän näki, että tämä päivä jää lyhyeksi. Yö on täällä."),
    ("cp1252", "It’s a “quoted” line — and more… of the same kind."),
    ("cp1250", "Chciałbym zamówić kawę i ciastko. Źle się czuję, więc pójdę do łóżka."),
    ("iso8859-2", "Příliš žluťoučký kůň úpěl ďábelské ódy."),
    ("cp1254", "Bir sabah yaşlı adam denize gitti ve küçük bir kayık gördü, ağladı."),
    ("cp1251", "Однажды утром старик пошёл к морю и увидел маленькую лодку."),
    ("koi8-r", "Однажды утром старик пошёл к морю и увидел маленькую лодку."),
    ("cp1253", "Ένα πρωί ο γέρος πήγε στη θάλασσα και είδε μια μικρή βάρκα."),
    ("gb18030", "那天早上，老人走到海边，看见一条小船停在沙滩上。他想起了很多年以前的事情。"),
    ("cp949", "어느 날 아침 노인은 바다로 가서 작은 배를 보았다. 그는 옛날 일을 떠올렸다."),
    ("euc_jp", "彼は海辺で小さな船を見た。それは昔のことです。"),
)


@pytest.mark.parametrize("before", ["", "Plain English stands before it, for long.\n" * 500])
def test_encodings_are_guessed_from_what_is_not_ascii(before):
    for encoding, text in SAID:
        data = (before + text + "\n").encode(encoding)
        guessed = guess(data)
        assert data.decode(guessed) == before + text + "\n", (encoding, guessed)
        assert "perhaps" in hint(data) and next(c for c in text if not c.isascii()) in hint(data)


def test_a_guess_is_of_what_is_around_the_first_bad_byte(script, tmp_path):
    """Not of the megabyte in which it lies: what is advised would have destroyed the text."""
    text = "Plain English stands before it, for long.\n" * 3000 + CHINESE
    (tmp_path / "a.txt").write_bytes(text.encode("gb18030"))
    refused(run(script, tmp_path / "a.txt", tmp_path / "x"), "那天早上", "--encoding=gb18030")
    (tmp_path / "b.txt").write_bytes("一二三".encode() * 50_000 + b"\xff" + CHINESE.encode())
    refused(run(script, tmp_path / "b.txt", tmp_path / "x"), "--encoding=utf-8:replace")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "cp1252"])
def test_a_text_that_is_read_whole_is_guessed_too(tmp_path, encoding):
    """evaluate.py --task=text, and a FILE: of sample.py."""
    text = FRENCH if encoding == "cp1252" else CHINESE
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text") as e:
        read_text(tmp_path / "a.txt")
    assert f"perhaps {encoding}, '{text[:5]}" in str(e.value) and "save it as UTF-8" in str(e.value)
    (tmp_path / "b.txt").write_bytes(b"\x00\xff\x01")
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_text(tmp_path / "b.txt")


def test_guesses():
    assert guess("text".encode("utf-16")) == "utf-16" and guess("text".encode("utf-32")) == "utf-32"
    assert (
        guess(b"") == "" and guess(b"some text \xff" * 1 + b"more of it " * 200) == "utf-8:replace"
    )


# --- separators

STORIES = [f"Story {i}\nof some words" for i in range(50)]


@pytest.mark.parametrize("typed", ["<|endoftext|>", "\\n\\n", "\n\n", "\\n---\\n", "\r\n\r\n"])
def test_separators_as_people_type_them(script, tmp_path, typed):
    joint = {"<|endoftext|>": "\n<|endoftext|>\n", "\\n---\\n": "\n---\n"}.get(typed, "\n\n")
    (tmp_path / "a.txt").write_bytes(joint.join(STORIES).replace("\n", "\r\n").encode())
    result = run(script, tmp_path / "a.txt", tmp_path / "out", f"--separator={typed}")
    assert result.code == 0, result.err
    assert texts_in(tmp_path / "out") == sorted(STORIES)


def test_a_separator_that_is_not_there(script, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(STORIES), encoding="utf-8")
    refused(
        run(script, tmp_path / "a.txt", tmp_path / "x", "--separator=<|end|>"), "does not occur"
    )
    (tmp_path / "a.tar").write_bytes(tar_of([("a.txt", b"one two"), ("b.txt", b"three")]))
    result = run(script, tmp_path / "a.tar", tmp_path / "y", "--separator=<|end|>")
    refused(result, "does not occur", "--overwrite=True")
    assert not (tmp_path / "y" / "train.bin").exists()
    write_jsonl(tmp_path / "a.jsonl")
    refused(run(script, tmp_path / "a.jsonl", tmp_path / "z", "--separator=x"), "--separator")
    (tmp_path / "b.txt").write_text("the only one, and some more words<|end|>", encoding="utf-8")
    assert run(script, tmp_path / "b.txt", tmp_path / "w", "--separator=<|end|>").code == 0


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>", "<|im_end|>"])
def test_a_mark_in_the_text_is_mentioned(script, tmp_path, mark):
    (tmp_path / "a.txt").write_text(f"\n{mark}\n".join(STORIES), encoding="utf-8")
    result = run(script, tmp_path / "a.txt", tmp_path / "out")
    assert result.code == 0 and f"--separator='{mark}'" in result.out
    (tmp_path / "b.txt").write_text("\n".join(STORIES), encoding="utf-8")
    assert "--separator" not in run(script, tmp_path / "b.txt", tmp_path / "out2").out


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a.txt.gz"])
def test_what_is_empty_between_separators_is_counted(script, tmp_path, name):
    data = "##".join(["", "one", "", "two", "\n\n", "three", ""]).encode() * 10
    made = {"a.zip": lambda data: zip_of([("b.md", data)]), "a.txt.gz": gzip.compress}
    (tmp_path / name).write_bytes(made.get(name, bytes)(data))
    result = run(script, tmp_path / name, tmp_path / "out", "--separator=##")
    assert result.code == 0 and "left out 29 empty texts between separators" in result.out, result
    assert left_out(tmp_path / "out") == {"empty texts between separators": 29}
    assert texts_in(tmp_path / "out") == sorted(["one", "two", "three"] * 10)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_empty_rows_are_documents_as_nanogpts_are_and_are_mentioned(script, tmp_path, name):
    texts = [*TEXTS[:50], "", *TEXTS[50:100], ""]
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / name
    if name == "a.parquet":
        write_parquet(path, texts)
    elif name == "a.txt":
        for i, text in enumerate(texts):
            path.with_name(f"{i:03d}.txt").write_text(text, encoding="utf-8")
    else:
        made = {"a.csv": table(texts), "a.jsonl": rows(texts), "a.json": json.dumps(texts).encode()}
        path.write_bytes(made[name])
    result = run(script, tmp_path / "src", tmp_path / "out", "--tokenizer=gpt2")
    assert result.code == 0 and "2 empty texts, each a document" in result.out, result
    assert "left out" not in result.out and left_out(tmp_path / "out") == {}
    val, train = nanogpt(texts, 0.05)
    assert (tmp_path / "out" / "val.bin").read_bytes() == val
    assert sorted(documents(tmp_path / "out", "train")) == train


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "nested.tar"])
def test_a_mark_in_the_text_of_an_archive_is_mentioned(script, tmp_path, name):
    text = "\n<|endoftext|>\n".join(STORIES).encode()
    members = [("README.md", b"about"), ("stories.txt", text)]
    made = {"a.zip": zip_of, "nested.tar": lambda m: tar_of([("inner.tar", tar_of(m))])}
    made["a.tar.gz"] = lambda m: gzip.compress(tar_of([*m, ("b.txt.gz", gzip.compress(b"plain"))]))
    (tmp_path / name).write_bytes(made[name](members))
    result = run(script, tmp_path / name, tmp_path / "out")
    assert result.code == 0 and "--separator='<|endoftext|>'" in result.out, result
    flags = ("--separator=<|endoftext|>",)
    result = run(script, tmp_path / name, tmp_path / "out2", *flags)
    assert "--separator" not in result.out and {*STORIES} <= {*texts_in(tmp_path / "out2")}


# --- flags without effect

FIT = {
    "a.txt": ("separator", "encoding"),
    "a.jsonl": ("text_column", "template", "encoding"),
    "a.parquet": ("text_column", "template"),
    "stdlib": (),
}
TYPED = {
    "text_column": "body", "template": "{text}", "separator": "word", "encoding": "utf-8",
    "subset": "en", "split": "train", "val_split": "test", "revision": "main",
}  # fmt: skip


@pytest.mark.parametrize("name", FIT)
def test_no_flag_is_ignored_by_a_source(script, tmp_path, name):
    (tmp_path / "a.txt").write_text("some word and\nanother\n" * 50, encoding="utf-8")
    for write, file in ((write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")):
        write(tmp_path / file)
        write(tmp_path / f"body.{file}", column="body")
    for flag, value in TYPED.items():
        source = name if name == "stdlib" else tmp_path / name
        if flag == "text_column" and flag in FIT[name]:
            source = tmp_path / f"body.{name}"
        result = run(script, source, tmp_path / flag, f"--{flag}={value}")
        if flag in FIT[name]:
            assert result.code == 0, (flag, result.err)
        else:
            refused(result, f"--{flag} has no effect")
            assert result.code == 2 and not (tmp_path / flag / "train.bin").exists()


def test_no_flag_is_ignored_beside_a_complete_dataset(script, tmp_path):
    """It is not said to be another dataset because of a flag that would change nothing."""
    write_jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    assert run(script, tmp_path / "a.jsonl", out).code == 0
    for flag in ("--eot=x", "--revision=main", "--separator=x", "--subset=x", "--split=test"):
        refused(run(script, tmp_path / "a.jsonl", out, flag), flag.split("=")[0] + " has no effect")
    for flag in ("--val_fraction=0.5", "--encoding=cp1252"):
        words = ("other settings", flag[2:].split("=")[0], "--overwrite=True")
        refused(run(script, tmp_path / "a.jsonl", out, flag), *words)
    assert run(script, tmp_path / "a.jsonl", out).code == 0, "the same command again"
    flags = ("--verify=True", f"--source={tmp_path / 'a.jsonl'}")
    refused(script("data/prepare.py", *flags, f"--dataset={out}"), "--source has no effect")


def test_no_flag_is_ignored_by_a_pattern_that_names_a_split(script, tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:100])
    for pattern, split in (("test*", "train"), ("train*", "all"), ("test*", "test")):
        flags = (tmp_path / f"{pattern}.jsonl", tmp_path / "out", f"--split={split}")
        refused(run(script, *flags), "--split", "pattern")
    assert run(script, tmp_path / "*.jsonl", tmp_path / "out", "--split=all").code == 0


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.zip"])
@pytest.mark.parametrize("flag", ["--text_column=foo", "--template={a} {b}"])
def test_no_column_is_asked_for_of_rows_that_are_texts(script, tmp_path, name, flag):
    data = json.dumps(TEXTS).encode()
    made = {"a.json": data, "a.json.gz": gzip.compress(data), "a.zip": zip_of([("b.json", data)])}
    made["a.jsonl"] = "\n".join(map(json.dumps, TEXTS)).encode()
    (tmp_path / name).write_bytes(made[name])
    refused(run(script, tmp_path / name, tmp_path / "x", flag), "has no effect on rows that are")
    assert run(script, tmp_path / name, tmp_path / "y").code == 0


def test_a_seed_that_chooses_nothing(script, tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 3000, encoding="utf-8")
    refused(run(script, tmp_path / "a.txt", tmp_path / "x", "--seed=1"), "--seed has no effect")
    (tmp_path / "b.txt").write_text("a line of text\n" * 20, encoding="utf-8")
    for name in ("a", "b"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").rename(tmp_path / "src" / f"{name}.txt")
    result = run(script, tmp_path / "src", tmp_path / "y", "--seed=1")
    assert result.code == 0 and "val.bin is the end of the text, 5" in result.out
    assert "--seed=1" in result.out


def test_no_flag_is_ignored_where_nothing_is_read(script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    assert run(script, tmp_path / "a.jsonl", tmp_path / "out").code == 0
    from configurator import settings_of
    from data import prepare

    kept = {"source", "dataset", "verify"}
    for flag, value in settings_of(vars(prepare)).items():
        typed = {bool: True, int: 1, float: 0.5, str: "x"}[type(value)]
        if flag not in kept:
            flags = (f"--dataset={tmp_path / 'out'}", "--verify=True", f"--{flag}={typed}")
            refused(script("data/prepare.py", *flags), f"--{flag} has no effect")
    for flag in ("--num_proc=1", "--skip_bad=True", "--overwrite=True"):
        base = (f"--source={tmp_path / 'a.jsonl'}", f"--dataset={tmp_path / 'out2'}")
        refused(script("data/prepare.py", *base, "--merge=True", flag), "--merge=True", flag[:10])
    refused(run(script, tmp_path / "a.jsonl", tmp_path / "o", "--num_proc=-1"), "num_proc", "-1")
