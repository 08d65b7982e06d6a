"""Data order: what nanoGPT and EasyGPT get wrong on resume and on a change of batch size."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataloader import (
    IGNORED,
    TokenData,
    TrainLoader,
    TrainOrder,
    eval_batches,
    permute,
    split_windows,
)

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


def test_shards_read_as_one_stream(tmp_path):
    """Also llm.c's shards, which carry a header."""
    tokens = np.arange(300, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    for i, (a, b) in enumerate([(0, 100), (100, 103), (103, 300)]):
        header[:3] = 20240520, 1, b - a
        with open(tmp_path / f"fineweb_train_{i:06d}.bin", "wb") as f:
            f.write(header.tobytes() + tokens[a:b].tobytes())
    data = TokenData(tmp_path, "train", 10, 50257)
    assert data.tokens == 300
    for start in (0, 95, 99, 100, 101, 289):
        assert data.windows(np.array([start]))[0].tolist() == list(range(start, start + 11))


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
    ],
)
def test_bad_token_files(tmp_path, content, words):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        TokenData(tmp_path, "train", 16, 1000)
    for word in [*words, "train.bin"]:
        assert word in str(error.value)


def test_missing_data_tells_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python data/prepare\.py"):
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
