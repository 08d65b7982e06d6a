"""Data order: what nanoGPT and EasyGPT get wrong on resume and on a change of batch size."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from text import tokens
from text.batches import IGNORED, TrainLoader, TrainOrder, eval_batches, permute, split_windows
from text.split import split_parts, val_documents, val_share
from text.tokens import TokenData, read_meta, taken_for

CPU = torch.device("cpu")


def make(folder, tokens, split="train", dtype="uint16", meta=None):
    np.asarray(tokens, dtype=dtype).tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps({"dtype": dtype, **meta}), encoding="utf-8")


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_permute_is_a_function_of_each_position_alone():
    n = 10**9 + 7  # far more than could be listed
    some = np.array([0, 5, n - 1, 123456789])
    together = permute(some, n, 42)
    assert [int(permute(some[i : i + 1], n, 42)[0]) for i in range(4)] == together.tolist()
    assert together.max() < n and len(set(together.tolist())) == 4


def test_permute_looks_random():
    """Neighbours land apart, and another key gives another order."""
    a, b = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (a == b).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.15
    assert (np.abs(np.diff(a)) == 1).mean() < 0.02


@pytest.mark.parametrize(
    ("order", "step", "first", "starts"),
    [
        ((9_035_582_198, 1024, 491520, 1337), 0, 0, [4799931522, 2532148354, 4699151490]),
        ((9_035_582_198, 1024, 491520, 1337), 14999, 1, [4906912898, 944353410]),
        ((1_000_003, 256, 2048, 0), 7, 2, [389487, 108143, 905071]),
        ((5000, 16, 512, 2357), 0, 0, [3483, 2363, 2331, 4523]),
        ((5000, 16, 512, 2357), 14999, 1, [3452, 4844]),
    ],
)
def test_the_order_of_windows_never_changes(order, step, first, starts):
    """A run that another version began goes on with the same data: numbers of the first version."""
    order = TrainOrder(*order)
    assert order.starts(step, first, len(starts)).tolist() == starts
    loader = TrainLoader(None, order, 0, 1, CPU)  # which works the steps out in blocks
    assert loader.starts(step + 1, 0, 2).tolist() == order.starts(step + 1, 0, 2).tolist()
    assert loader.starts(step, first, len(starts)).tolist() == starts


@given(
    tokens=st.integers(9, 400),
    windows=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    context=st.integers(1, 8),
)
def test_an_epoch_sees_each_window_once(tokens, windows, seed, context):
    order = TrainOrder(tokens, context, windows * context, seed)
    n = order.windows_per_epoch
    steps = -(-2 * n // windows)
    starts = np.concatenate([order.starts(s, 0, windows) for s in range(steps)])
    assert starts.min() >= 0 and starts.max() + context + 1 <= tokens
    for epoch in (starts[:n], starts[n : 2 * n]):
        assert len(set(epoch.tolist())) == n, "without replacement"
        assert len(set((epoch % context).tolist())) == 1, "one phase: the windows are disjoint"


@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 4), (4, 2)])
def test_a_step_has_the_same_tokens_for_every_batch_size_and_rank_count(tmp_path, batch, ranks):
    make(tmp_path, np.random.default_rng(0).integers(0, 100, 999))
    data = TokenData(tmp_path, "train", 16, 128)
    order = TrainOrder(data.tokens, 16, 8 * 16, seed=3)

    def step_windows(step, batch, ranks):
        rows = []
        for micro_step in range(8 // (batch * ranks)):
            for rank in range(ranks):
                x, y = TrainLoader(data, order, rank, ranks, CPU).batch(step, micro_step, batch)
                rows += [tuple(row) for row in torch.cat((x, y), 1).tolist()]
        return rows

    for step in (0, 5, 11):
        assert step_windows(step, batch, ranks) == step_windows(step, 8, 1)


def test_batches_do_not_depend_on_what_was_read_before(tmp_path):
    """A resumed run that starts at step 7 sees what the uninterrupted run saw at step 7."""
    make(tmp_path, np.arange(1000) % 97)
    data = TokenData(tmp_path, "train", 10, 128)
    order = TrainOrder(data.tokens, 10, 40, seed=0)
    through = TrainLoader(data, order, 0, 1, CPU)
    seen = {(s, m): through.batch(s, m, 2)[0] for s in range(9) for m in range(2)}
    fresh = TrainLoader(data, order, 0, 1, CPU)
    assert torch.equal(fresh.batch(7, 1, 2)[0], seen[7, 1])
    assert torch.equal(through.batch(3, 0, 2)[0], seen[3, 0])  # and it can go back
    assert not torch.equal(seen[0, 0], seen[7, 0])


def test_targets_are_inputs_shifted_by_one(tmp_path):
    make(tmp_path, np.arange(500))
    data = TokenData(tmp_path, "train", 16, 500)
    x, y = TrainLoader(data, TrainOrder(500, 16, 64, 0), 0, 1, CPU).batch(0, 0, 4)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 65535), ("uint32", 4_000_000_000)])
def test_large_ids_survive(dtype, top):
    tokens = np.array([[0, 1, top]], dtype=dtype)
    x, y = split_windows(torch.from_numpy(tokens.view(f"i{tokens.itemsize}")))
    assert x.tolist() == [[0, 1]] and y.tolist() == [[1, top]]


def test_uint32_by_meta(tmp_path):
    meta = {"tokenizer": "tokenizer.json", "vocab_size": 70002, "splits": {}}
    make(tmp_path, [70000, 3, 70001], dtype="uint32", meta=meta)
    assert TokenData(tmp_path, "train", 2, 70002).windows(np.array([0])).tolist() == [
        [70000, 3, 70001]
    ]


@given(
    cuts=st.lists(st.integers(0, 300), max_size=12),
    starts=st.lists(st.integers(0, 289), min_size=1, max_size=9),
)
@example(cuts=list(range(20, 300, 20)), starts=[0, 150, 289])
def test_shards_read_as_one_stream(tmp_path_factory, cuts, starts):
    """Windows may lie in many shards; 10 comes after 9, as nobody pads by hand."""
    folder, edges = tmp_path_factory.mktemp("shards"), [0, *sorted({*cuts} - {0, 300}), 300]
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        make(folder, np.arange(a, b), f"train_{i}")
    data = TokenData(folder, "train", 10, 50257)
    assert data.tokens == 300
    expected = [list(range(start, start + 11)) for start in starts]
    assert data.windows(np.array(starts)).tolist() == expected


def llmc(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=dtype).tobytes())


@pytest.mark.parametrize(
    ("kind", "ids"), [((20240520, 1, "<u2"), [7, 50256]), ((20240801, 7, "<u4"), [7, 128000])]
)
def test_llmc_shards(tmp_path, kind, ids):
    """GPT-2's are uint16 and Llama 3's uint32; the header says so, with or without meta.json."""
    for i in range(3):
        llmc(tmp_path / f"fineweb_train_{i:06d}.bin", [*ids, i], *kind)
    found = TokenData(tmp_path, "train", 8, 128256).windows(np.array([0]))
    assert found.tolist() == [[*ids, 0, *ids, 1, *ids, 2]]


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    llmc(tmp_path / "train.bin", [5, 128000] * 200, 20240801, 7, "<u4")
    for size in (50304, 128000):
        with pytest.raises(ValueError, match=rf"token id 128000, .*vocab_size is {size};"):
            TokenData(tmp_path, "train", 8, size)
    assert TokenData(tmp_path, "train", 8, 128001).tokens == 400


def datatrove(folder, tokens, name="00000_00000_doc_shuffled.ds", size=2, tokenizer="gpt2"):
    """What datatrove 0.10.1 leaves of one output file (test_datatrove runs the package itself)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, dtype=f"<u{size}").tofile(folder / name)
    np.array([len(tokens)], dtype="<u8").tofile(folder / f"{name}.index")
    note = f"{tokenizer}|{size}\n{len(tokens)}\n{len(tokens) / 1000:.1f} kT"
    (folder / f"{name}.metadata").write_text(note, encoding="utf-8")


def executor(logs, tasks, finished):
    """The executor's logging_dir: its settings, and a marker for each finished task."""
    (logs / "completions").mkdir(parents=True)
    text = json.dumps({"tasks": tasks, "world_size": tasks})
    (logs / "executor.json").write_text(text, encoding="utf-8")
    for rank in finished:
        (logs / "completions" / f"{rank:05d}").touch()


@pytest.mark.parametrize(("size", "top"), [(2, 50256), (4, 128000)])
def test_datatroves_files_are_read_as_they_are(tmp_path, size, top):
    """Also when more tasks than input files have left empty ones."""
    datatrove(tmp_path / "train", range(100), size=size)
    datatrove(tmp_path / "train", [], "00001_unshuffled.ds", size)
    datatrove(tmp_path / "train", [top, *range(101, 120)], "00002_00000_doc_shuffled.ds", size)
    datatrove(tmp_path / "val", range(30), size=size)
    if size == 2:  # as versions before uint32 wrote it
        note = tmp_path / "val" / "00000_00000_doc_shuffled.ds.metadata"
        note.write_text("gpt2\n30\n30 T", encoding="utf-8")
    executor(tmp_path / "train" / "logs", 3, range(3))
    train = TokenData(tmp_path, "train", 9, 2**17)
    assert train.tokens == 120
    assert train.windows(np.array([95]))[0].tolist() == [*range(95, 100), top, *range(101, 105)]
    assert TokenData(tmp_path, "val", 9, 2**17).tokens == 30


def test_datatroves_unfinished_tasks_are_refused(tmp_path):
    """A task that was killed has left a file, with no marker and mostly with no .metadata."""
    train = tmp_path / "train"
    datatrove(train, range(100))
    datatrove(train, range(50), "00001_unshuffled.ds")
    executor(train / "logs", 4, [0, 3])
    with pytest.raises(ValueError, match=r"2 of 4 datatrove tasks .*first is 1;.*run its script"):
        TokenData(tmp_path, "train", 9, 50304)
    for rank in (1, 2):
        (train / "logs" / "completions" / f"{rank:05d}").touch()
    assert TokenData(tmp_path, "train", 9, 50304).tokens == 150
    (train / "00001_unshuffled.ds").write_bytes(bytes(98))
    with pytest.raises(ValueError, match="98 bytes, not 50 tokens of 2 bytes"):
        TokenData(tmp_path, "train", 9, 50304)
    (train / "00001_unshuffled.ds.metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata is missing or damaged"):
        TokenData(tmp_path, "train", 9, 50304)


def test_another_tokenizer_of_datatrove_needs_a_meta_json(tmp_path):
    datatrove(tmp_path / "train", range(100), tokenizer="HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(ValueError, match=r"SmolLM2-135M, not gpt2: .*meta\.json is needed"):
        TokenData(tmp_path, "train", 9, 50304)
    meta = {"tokenizer": "tokenizer.json", "vocab_size": 49152, "dtype": "uint16", "splits": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert TokenData(tmp_path, "train", 9, 49152).tokens == 100


TEXTS = [f"Document {i}: " + "word " * (i % 7) for i in range(150)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four files, one of a single document and one of none."""
    folder = tmp_path_factory.mktemp("source")
    for i, texts in enumerate((TEXTS[:60], TEXTS[60:61], [], TEXTS[61:])):
        lines = [json.dumps({"text": t}) + "\n" for t in texts]
        (folder / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_shares(script, source, out, *flags, shares=3):
    """What --shares=I/N of data/prepare.py leave, on one machine, with nothing merged."""
    for i in range(shares):
        result = script(
            "data/prepare.py", f"--source={source}", f"--dataset={out}", f"--shards={i}/3", *flags
        )
        assert result.code == 0, result.err


def stream(data):
    return data.windows(np.array([0]), data.tokens)[0]


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.4])
def test_unmerged_shares_read_as_their_merged_result(script, tmp_path, source, fraction):
    """The same documents for validation, in the same order; the same text for training."""
    flags = [f"--val_fraction={fraction}", "--tokenizer=bytes", "--num_proc=1"]
    make_shares(script, source, tmp_path / "open", *flags)
    merged = tmp_path / "merged"
    assert script("data/prepare.py", f"--source={source}", f"--dataset={merged}", *flags).code == 0
    for split in ("train", "val"):
        data, one = (TokenData(tmp_path / name, split, 9, 320) for name in ("open", "merged"))
        assert stream(data).tobytes() == (merged / f"{split}.bin").read_bytes()
        assert data.nbytes == one.nbytes is not None
        starts = np.arange(one.tokens - 9)
        assert (data.windows(starts) == one.windows(starts)).all()
        with pytest.raises(ValueError, match="token id 256") as error:
            TokenData(tmp_path / "open", split, 9, 256)
        path, place = re.match(r"(\S+) at token ([\d,]+) holds", str(error.value)).groups()
        assert np.fromfile(path, dtype="<u2")[int(place.replace(",", ""))] == 256


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=8).filter(
        lambda parts: sum(map(len, parts)) > 1
    ),
    fraction=st.floats(0.001, 0.999),
)
@example(lengths=[[], [3], [], [1, 1], []], fraction=0.5)
def test_the_split_has_each_token_once(lengths, fraction):
    """Against lists: validation in the split's order, training in the source's, runs in a part."""
    tokens = [[(i, j) for j in range(sum(part))] for i, part in enumerate(lengths)]
    documents = []
    for part, ids in zip(lengths, tokens, strict=True):
        ends = np.cumsum(part, dtype=int).tolist()
        documents += [ids[end - n : end] for end, n in zip(ends, part, strict=True)]
    found = split_parts([np.array(part, dtype=np.int64) for part in lengths], fraction, 7)

    def read(rows):
        return [token for part, a, b in rows.tolist() for token in tokens[part][a:b]]

    chosen = val_documents(len(documents), fraction, 7).tolist()
    assert found.chosen.tolist() == chosen and 0 < len(chosen) < len(documents)
    assert read(found.val) == [t for i in chosen for t in documents[i]]
    others = [d for i, d in enumerate(documents) if i not in chosen]
    assert read(found.train) == [t for d in others for t in d]
    assert len(found.train) <= len(chosen) + len(lengths), "neighbours together"


def test_few_documents_give_more_of_them_for_validation():
    assert [val_share(n, 0.0) for n in (2, 99_999, 100_000)] == [0.05, 0.05, 0.0005]
    assert val_share(100_000, 0.3) == val_share(2, 0.3) == 0.3


def test_missing_and_damaged_shares_are_named(script, tmp_path, source):
    flags = ["--val_fraction=0.0", "--tokenizer=bytes", "--num_proc=1"]
    make_shares(script, source, tmp_path, *flags, shares=2)
    with pytest.raises(FileNotFoundError, match=r"1 of 4 parts are missing .*00002.*--shards=I/N"):
        TokenData(tmp_path, "train", 9, 320)
    make_shares(script, source, tmp_path, *flags)
    part = tmp_path / "parts" / "00003.bin"
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00003\.bin is damaged"):
        TokenData(tmp_path, "train", 9, 320)
    (tmp_path / "parts" / "00001.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"00001\.bin is damaged .*--shards=I/N again"):
        TokenData(tmp_path, "train", 9, 320)


def test_evaluation_windows_are_fixed_disjoint_and_of_one_shape(tmp_path):
    make(tmp_path, np.arange(105), "val")
    data = TokenData(tmp_path, "val", 10, 128)
    first, again = (list(eval_batches(data, 7, 3, CPU)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert {x.shape for x, _ in first} == {(3, 10)}
    counted = [row.tolist() for x, y in first for row in y if (row != IGNORED).all()]
    starts = [row[0] - 1 for row in counted]
    assert len(starts) == 7 and len(set(starts)) == 7 and all(s % 10 == 0 for s in starts)
    assert max(starts) >= 80, "spread over the split"
    everything = list(eval_batches(data, 1000, 4, CPU))
    assert sum(int((y != IGNORED).sum()) for _, y in everything) == 100


def test_ranks_share_the_evaluation(tmp_path):
    make(tmp_path, np.arange(105), "val")
    data = TokenData(tmp_path, "val", 10, 128)

    def counted(**kwargs):
        return [t for _, y in eval_batches(data, 8, 2, CPU, **kwargs) for t in y.flatten().tolist()]

    parts = [counted(rank=r, ranks=2) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(counted())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes"]),
        (b"abc", ["3 bytes", "not a multiple"]),
        (b"\1\0" * 16, ["16 tokens", "16 + 1"]),
        (b"\1\0" * 40 + b"\xff\xff" + b"\1\0" * 40, ["65535", "vocab_size is 1000"]),
        (np.array([20240520, 1, 99], dtype="<i4").tobytes() + b"\0" * 1100, ["llm.c", "99"]),
        (np.array([20240520, 2, 38], dtype="<i4").tobytes() + b"\0" * 1088, ["version 2"]),
        (np.array([20240522, 1, 99], dtype="<i4").tobytes() + b"\0" * 1100, ["evaluation file"]),
        (np.arange(999, dtype="<u4").tobytes(), ["uint32", "meta.json", '"dtype": "uint32"']),
        ((np.arange(999, dtype="<u4") + 65000).tobytes(), ["uint32"]),
        (b"\0\0" * 1000, ["zeros", "unfinished"]),
        (b"\1\1" * 100_000 + b"\0\0" * 5_500, ["the last 5,275 of 105,500", "unfinished"]),
    ],
)
def test_bad_token_files(tmp_path, content, words):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        TokenData(tmp_path, "train", 16, 1000)
    for word in [*words, "train.bin"]:
        assert word in str(error.value)


@pytest.mark.parametrize("top", [2, 64, 256, 50257])
@pytest.mark.parametrize("seed", range(3))
def test_no_good_file_is_taken_for_a_bad_one(tmp_path, top, seed):
    """Skewed as text is, from two symbols (nanoGPT's char datasets have 65) to GPT-2's."""
    rng = np.random.default_rng(seed)
    tokens = (top * rng.random(30_000) ** 3).astype(np.uint16)
    make(tmp_path, np.concatenate([tokens, np.zeros(200), [1]]))
    assert TokenData(tmp_path, "train", 16, 50304).tokens == 30_201
    gap = np.zeros(17_000)  # a long run of zeros, but not up to the end
    make(tmp_path, np.concatenate([np.tile(tokens, 17), gap, tokens[:10_000]]))
    assert TokenData(tmp_path, "train", 16, 50304).tokens == 537_000


def test_an_id_that_no_sample_meets_is_caught_when_it_is_read(tmp_path):
    """On a GPU the embedding would end the run with an assertion that names nothing."""
    tokens = np.ones(10_000_000, dtype=np.uint16)
    tokens[3_450_000] = 60000
    for i, shard in enumerate(np.split(tokens, 10)):
        make(tmp_path, shard, f"train_{i}")
    data = TokenData(tmp_path, "train", 16, 50304)
    words = r"train_3\.bin at token 450,000 holds token id 60000, .*vocab_size is 50304"
    with pytest.raises(ValueError, match=words):
        data.windows(np.array([5, 3_449_990]))


def test_batches_for_a_gpu_are_pinned(tmp_path, monkeypatch):
    """Without it a copy waits for the GPU; training and evaluation go the same way."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: t if k["non_blocking"] else None)
    make(tmp_path, np.arange(500))
    data = TokenData(tmp_path, "train", 16, 500)
    cuda = torch.device("cuda")
    TrainLoader(data, TrainOrder(500, 16, 64, 0), 0, 1, cuda).read(0, 0, 4)
    next(eval_batches(data, 4, 2, cuda))
    assert pinned == [(4, 17), (2, 17)]


def test_missing_data_tells_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python data/prepare\.py"):
        TokenData(tmp_path, "train", 16, 1000)


def test_missing_data_beside_parts_tells_to_merge(tmp_path):
    (tmp_path / "parts").mkdir()
    with pytest.raises(FileNotFoundError, match="--merge=True"):
        TokenData(tmp_path, "train", 16, 1000)


def test_a_changed_file_and_a_pickle_are_refused(tmp_path):
    facts = {"train": {"tokens": 100, "bytes": 99, "max_id": 96}}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "splits": facts}
    make(tmp_path, np.arange(99) % 97, meta=meta)
    with pytest.raises(ValueError, match="99 tokens but meta.json says 100"):
        TokenData(tmp_path, "train", 16, 320)
    (tmp_path / "meta.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(b"anything")
    with pytest.raises(ValueError, match="pickle"):
        TokenData(tmp_path, "train", 16, 320)


def test_text_called_train_bin_is_refused_and_letters_are_doubted(tmp_path):
    for text in ("To be, or not to be. " * 200, "那天早上老人走到海边。" * 200):
        (tmp_path / "train.bin").write_bytes(text.encode()[: len(text.encode()) // 2 * 2])
        with pytest.raises(ValueError, match="is text, not tokens"):
            TokenData(tmp_path, "train", 16, 50304)
    make(tmp_path, np.arange(9000) % 95)
    data = TokenData(tmp_path, "train", 16, 50304)
    assert "no id is above 94" in taken_for(tmp_path, data.ids[0])
    make(tmp_path, np.arange(9000))
    line = taken_for(tmp_path, TokenData(tmp_path, "train", 16, 50304).ids[0])
    assert "GPT-2 tokens" in line and "WARNING" not in line


def test_a_dataset_that_is_not_there_is_the_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "DATA", tmp_path)
    for name in ("stories", "web"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").touch()
    with pytest.raises(FileNotFoundError, match="--dataset=storys; there is: stories ") as e:
        read_meta(tmp_path / "storys")
    assert "there is no dataset" in str(e.value)
    with pytest.raises(FileNotFoundError, match=r"no train.bin .*--source=PATH --dataset=web"):
        tokens.split_files(tmp_path / "web", "train")
    for name, flags in (("stdlib", " --source=stdlib"), ("openwebtext", "")):
        with pytest.raises(FileNotFoundError, match=f"prepare.py{flags}; there is"):
            read_meta(tmp_path / name)
    (tmp_path / "web" / "parts").mkdir()
    with pytest.raises(FileNotFoundError, match="is not finished: run the same"):
        tokens.split_files(tmp_path / "web", "train")


def test_a_short_validation_says_which_share_is_enough(tmp_path):
    facts = {"train": {"tokens": 19_000}, "val": {"tokens": 802, "max_id": 9}}
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "splits": facts, "val_fraction": 0.05}
    make(tmp_path, np.arange(802) % 10, split="val", meta=meta)
    with pytest.raises(ValueError, match="--val_fraction=0.06 --overwrite=True"):
        TokenData(tmp_path, "val", 1024, 50304)
    facts["train"]["tokens"] = 1100
    make(tmp_path, np.arange(802) % 10, split="val", meta=meta)
    with pytest.raises(ValueError, match="use more text") as e:
        TokenData(tmp_path, "val", 1024, 50304)
    assert "--val_fraction" not in str(e.value)
