"""Conversations from files to windows: what is written, packed, weighed and learnt."""

import dataclasses
import gzip
import itertools
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st

from data import stdlib
from data.verify import check_folder
from formats import checkpoint
from model import GPT, IGNORE_INDEX, GPTConfig
from text import packing
from text.batches import TrainLoader, eval_batches, open_split, order_of
from text.chat import Template, with_chat
from text.packing import pack, pieces
from text.tokenizer import get_tokenizer
from text.tokens import ASKS, BEGINS, COUNTS, ID
from text.turns import conversation

CPU = torch.device("cpu")
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]


def rounds(i):
    """A conversation of one to three rounds, of answers of very different length."""
    turns = [{"role": "system", "content": f"Rule {i}."}] if i % 4 == 0 else []
    for n in range(1 + i % 3):
        turns.append({"role": "user", "content": f"Ask {i} {WORDS[n]}?"})
        turns.append({"role": "assistant", "content": " ".join(WORDS[: 1 + (i * 7 + n) % 9])})
    return turns


ROWS = [{"messages": rounds(i)} for i in range(60)]
ALPACA = [{"instruction": f"Add {i}.", "input": "1", "output": str(i + 1)} for i in range(40)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}!"}]}
    for i in range(40)
]


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepare(script, tmp_path):
    """Make a dataset of conversations in bytes; its folder."""

    def run(source, *flags, name="chat"):
        out = tmp_path / name
        what = [f"--source={source}", f"--dataset={out}", "--chat=True"]
        what += [] if any("--tokenizer" in flag for flag in flags) else ["--tokenizer=bytes"]
        what += [] if "--merge=True" in flags else ["--num_proc=1"]  # no processes to wait for
        result = script("data/prepare.py", *what, *flags)
        assert result.code == 0, result.err
        run.said = result.out
        return out

    return run


def stored(folder, split):
    """The conversations of a split: (ids, counts) each, by the bits that docs/chat.md tells."""
    words = np.fromfile(folder / f"{split}.bin", "<u4")
    parts = np.split(words, np.flatnonzero(words >> 30 & 1)[1:])
    return [((p & (2**29 - 1)).tolist(), (p >> 31).tolist()) for p in parts]


def made(rows, tok=None):
    """The same, straight from the rows."""
    template = Template(with_chat(tok or get_tokenizer("bytes")))
    encoded = [template.encode(conversation(row)) for row in rows]
    return [([*e.ids.tolist(), 256], [*e.counts.astype(int).tolist(), 0]) for e in encoded]


def write_kind(folder, kind, rows):
    """The rows as a file of a kind."""
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        return write(path, rows)
    if kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(write(folder / "x", rows).read_bytes()))
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        else:
            with pyarrow.OSFile(str(path), "wb") as f, pyarrow.ipc.new_stream(f, table.schema) as w:
                w.write_table(table)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("rows", [ROWS, ALPACA, SHAREGPT], ids=["messages", "Alpaca", "ShareGPT"])
def test_a_file_becomes_its_conversations(prepare, tmp_path, kind, rows):
    folder = prepare(write_kind(tmp_path, kind, rows))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    both = [*stored(folder, "train"), *stored(folder, "val")]
    assert sorted(both) == sorted(made(rows))
    train = [one for one in made(rows) if one in stored(folder, "train")]
    assert stored(folder, "train") == train, "in the source's order"
    counted = sum(sum(counts) for _, counts in stored(folder, "train"))
    assert meta["splits"]["train"]["counted"] == counted
    assert meta["splits"]["train"]["documents"] == len(stored(folder, "train"))
    assert meta["vocab_size"] == 259 and meta["dtype"] == "uint32"
    check_folder(folder)


def test_a_table_is_alpacas(prepare, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\n" + "".join(f"Add {i}.,{i}\n" for i in range(30)))
    folder = prepare(path)
    rows = [{"instruction": f"Add {i}.", "output": str(i)} for i in range(30)]
    assert sorted([*stored(folder, "train"), *stored(folder, "val")]) == sorted(made(rows))


@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".tsv", ".zip"])
def test_a_bad_row_of_a_table_costs_its_row(prepare, tmp_path, kind):
    lines = [f"Add {i}.,{i}" for i in range(40)]
    lines[20] = "Add."
    text = "instruction , output\n" + "".join(f"{line}\n" for line in lines)
    text = text.replace(",", "\t") if kind == ".tsv" else text
    path = tmp_path / f"a{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("a.csv", text)
    else:
        path.write_bytes(gzip.compress(text.encode()) if kind == ".csv.gz" else text.encode())
    folder = prepare(path, "--skip_bad=True")
    assert len(stored(folder, "train")) + len(stored(folder, "val")) == 39
    assert "line 22: 1 fields, not 2" in prepare.said


def test_a_bad_conversation_of_a_table_costs_its_row(prepare, tmp_path):
    path = tmp_path / "a.csv"
    turns = json.dumps(MESSAGES).replace('"', '""')
    rows = [f'"{turns}"'] * 40
    rows[20] = f'"{turns.replace("assistant", "tool")}"'
    path.write_text("messages\n" + "".join(f"{row}\n" for row in rows))
    folder = prepare(path, "--skip_bad=True")
    assert len(stored(folder, "train")) + len(stored(folder, "val")) == 39
    assert f"{path} line 22: messages[1] has the role 'tool'" in prepare.said


@pytest.mark.parametrize("names", ["title,body", "question"])
def test_a_table_without_conversations_names_its_columns(script, tmp_path, names):
    path = tmp_path / "a.csv"
    path.write_text(f"{names}\n" + f"{names}\n" * 9)
    what = [f"--source={path}", f"--dataset={tmp_path / 'd'}", "--chat=True", "--tokenizer=bytes"]
    result = script("data/prepare.py", *what)
    assert result.code == 1 and names.split(",")[-1] in result.err, result.err


def test_a_file_of_lines_is_not_counted_for_its_names(prepare, tmp_path, monkeypatch):
    """Each part would read all that is before it."""
    from data import parts, readers

    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    monkeypatch.setattr(readers, "lines_before", None)
    prepare(write(tmp_path / "a.jsonl", ROWS))


def test_only_so_many_tokens_are_taken(prepare, tmp_path):
    folder = prepare(write(tmp_path / "a.jsonl", ROWS), "--max_tokens=2k")
    both = [*stored(folder, "train"), *stored(folder, "val")]
    assert 2000 <= sum(len(ids) for ids, _ in both) < 2500
    assert sorted(both) == sorted(made(ROWS[: len(both)]))


def test_another_split_validates(prepare, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "train.jsonl", ROWS[:50])
    write(source / "test.jsonl", ROWS[50:])
    folder = prepare(source, "--val_split=test")
    assert stored(folder, "val") == made(ROWS[50:])
    assert stored(folder, "train") == made(ROWS[:50])


def test_the_embedded_conversations(prepare, monkeypatch):
    known = [*stdlib.functions()]  # once: it parses the standard library
    assert len(known) > 500 and len({f.name for f in known}) == len(known)
    assert all(f.does[-1] in ".!?" and f.takes[-1] == "." for f in known)
    join = next(f for f in known if f.name == "os.path.join")
    assert join.does.startswith("Join two or more pathname components")
    assert join.takes == "It takes a and *p."
    monkeypatch.setattr(stdlib, "functions", lambda: iter(known))
    rows = [*stdlib.stdlib_conversations()]
    folder = prepare("stdlib", "--tokenizer=bytes")
    both = [*stored(folder, "train"), *stored(folder, "val")]
    assert sorted(both) == sorted(made([{"messages": [t._asdict() for t in r]} for r in rows]))
    assert {len(turns) for turns in rows} == {2, 4, 6, 8, 10, 12} and len(rows) > 1000
    asked = [
        turn.content for turns in rows for turn in turns[::2] if turn.content not in stdlib.HOW
    ]
    assert len(asked) == stdlib.ROUNDS * len(known) == len({*asked}), "in other words each time"


def test_the_form_is_said(prepare, tmp_path):
    prepare(write(tmp_path / "a.jsonl", [*ROWS, *ALPACA]))
    assert "60 conversations by the column messages" in prepare.said
    assert "40 conversations by the column instruction and output" in prepare.said


def test_a_conversation_without_an_answer_is_left_out_and_named(prepare, tmp_path):
    rows = [*ROWS, {"messages": [{"role": "user", "content": "Hello?"}]}, {"messages": []}]
    folder = prepare(write(tmp_path / "a.jsonl", rows))
    assert len(stored(folder, "train")) + len(stored(folder, "val")) == len(ROWS)
    assert "left out 2 conversations without an answer: " in prepare.said
    assert "a.jsonl line 61" in prepare.said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no"}, "no column messages or conversations and no instruction and output"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0] has the role 'tool'"),
        ({"messages": "[" * 99999}, "messages is a text, and not one in JSON"),
        ([1, 2], "a list instead of a row with columns"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(script, prepare, tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [*ROWS[:30], row, *ROWS[30:]])
    what = [f"--source={path}", f"--dataset={tmp_path / 'd'}", "--chat=True", "--tokenizer=bytes"]
    result = script("data/prepare.py", *what)
    assert result.code == 1 and result.err.count("\n") == 1
    assert f"{path} line 31: " in result.err and message in result.err
    folder = prepare(path, "--skip_bad=True")
    assert len(stored(folder, "train")) + len(stored(folder, "val")) == len(ROWS)
    assert f"left out 1: {path} line 31: " in prepare.said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text_column=text"], "--text_column has no effect with --chat=True"),
        (["--template={a}"], "--template has no effect with --chat=True"),
        (["--separator=x"], "--separator has no effect"),
    ],
)
def test_settings_that_mean_nothing_are_refused(script, tmp_path, flags, words):
    path = write(tmp_path / "a.jsonl", ROWS)
    what = [f"--source={path}", f"--dataset={tmp_path / 'd'}", "--chat=True", "--tokenizer=bytes"]
    result = script("data/prepare.py", *what, *flags)
    assert result.code == 2 and words in result.err


def test_text_files_hold_no_conversations(script, tmp_path):
    (tmp_path / "a.txt").write_text("Hello there. " * 99)
    what = [f"--source={tmp_path / 'a.txt'}", f"--dataset={tmp_path / 'd'}", "--chat=True"]
    result = script("data/prepare.py", *what, "--tokenizer=bytes")
    assert result.code == 1 and "holds text, not rows" in result.err, result.err


def test_a_parquet_without_conversations_names_its_columns(script, tmp_path):
    path = write_kind(tmp_path, ".parquet", [{"title": "a", "body": "b"}] * 9)
    what = [f"--source={path}", f"--dataset={tmp_path / 'd'}", "--chat=True", "--tokenizer=bytes"]
    result = script("data/prepare.py", *what)
    assert result.code == 1 and "there are title, body" in result.err, result.err


@pytest.mark.parametrize("uneven", [False, True])
def test_shares_are_read_as_they_will_be_merged(prepare, tmp_path, monkeypatch, uneven):
    from data import parts

    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = prepare(path, name="whole")
    if uneven:  # by whole conversations, whatever they weigh
        write(path, [*ROWS, {"question": "x" * 20_000, "answer": "y"}])
        whole = prepare(path, name="uneven")
    for i in range(3):
        folder = prepare(path, f"--shards={i}/3", name="shares")
    sizes = 64, 320
    before = {s: open_split(folder, s, *sizes) for s in ("train", "val")}
    windows = {s: d.windows(np.arange(d.count)) for s, d in before.items()}
    prepare(path, "--merge=True", name="shares")
    for split in ("train", "val"):
        assert (folder / f"{split}.bin").read_bytes() == (whole / f"{split}.bin").read_bytes()
        after = open_split(folder, split, *sizes)
        assert (after.windows(np.arange(after.count)) == windows[split]).all()


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_verify_sees_a_changed_mark(prepare, tmp_path, at):
    """Whatever bit of whatever byte it is: the ids' and those that say what counts."""
    folder = prepare(write(tmp_path / "a.jsonl", ROWS))
    data = bytearray((folder / "train.bin").read_bytes())
    data[400 + at] ^= 0x80
    (folder / "train.bin").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="sha256"):
        check_folder(folder)


# --- windows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 60))
def test_windows_hold_whole_pieces(lengths, room):
    window = pack(np.array(lengths), room)
    filled = np.bincount(window, weights=lengths)
    assert filled.max() <= room and filled.min() > 0
    assert len(filled) <= 2 * np.sum(lengths) // room + 1, "no two of them would fit in one"


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=30))
def test_pieces_are_cut_where_a_turn_asks(conversations):
    """conversations: lengths of the exchanges of each."""
    room = 40
    ends = np.cumsum([n for one in conversations for n in one])
    asks = np.concatenate([[0], ends[:-1]])
    firsts = np.cumsum([0, *map(len, conversations)])[:-1]
    starts, lengths, cut, long = pieces(asks[firsts], asks, int(ends[-1]), room)
    assert {*starts.tolist()} <= {*asks.tolist()} and lengths.max() <= room
    assert cut == sum(len(one) > 1 and sum(one) > room for one in conversations)
    lost = sum(max(0, n - room) for one in conversations for n in one)
    assert lengths.sum() == ends[-1] - lost
    assert (long > 0) == (lost > 0)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        stop = start + length
        inside = {*asks[firsts].tolist()} & {*range(start + 1, stop)}
        assert not inside, "a piece is of one conversation"
        assert stop in {*ends.tolist()} or length == room


@pytest.fixture
def folder(prepare, tmp_path):
    """ROWS in bytes."""
    return prepare(write(tmp_path / "a.jsonl", ROWS))


@pytest.mark.parametrize("context", [64, 200, 1000])
def test_windows_begin_with_a_conversation_and_what_counts_is_predicted_once(folder, context):
    data = open_split(folder, "train", context, 320)
    words = np.fromfile(folder / "train.bin", "<u4")
    rows = data.windows(np.arange(data.count))
    assert rows.shape == (data.count, context + 1)
    assert (rows[:, 0] & ID == 257).all(), "the first of a turn"
    assert ((rows & BEGINS > 0).sum(1) == np.diff(data.edges)).all() and (rows[:, 0] & BEGINS).all()
    counted = rows[:, 1:] & COUNTS > 0
    assert (counted.sum(1) == data.counts).all() and data.counts.min() > 0
    if context == 1000:  # nothing is cut
        assert counted.sum() == (words & COUNTS > 0).sum()
        kept = sorted((words & ~np.uint32(ASKS)).tolist())
        filled = [i for row in rows.tolist() for i in row if i != 256]
        assert sorted(filled) == [i for i in kept if i != 256]
    found = [
        i for ids, counts in stored(folder, "train") for i, c in zip(ids, counts, strict=True) if c
    ]
    assert {*(rows[:, 1:][counted] & ID).tolist()} <= {*found}


def test_answers_beyond_the_context_are_named(folder):
    with pytest.raises(ValueError, match="no answer that begins within a context of 8 tokens"):
        open_split(folder, "train", 8, 320)


@pytest.mark.parametrize("eot", [400_000, 320, "x", -1])
def test_a_meta_that_cannot_be_is_refused(folder, eot):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eot": eot}))
    with pytest.raises(ValueError, match="eot|400000"):
        open_split(folder, "train", 100, 320)


def test_a_long_stream_is_looked_at_in_blocks(folder, monkeypatch):
    whole = open_split(folder, "train", 100, 320)
    for block in (1, 7, 1000):
        monkeypatch.setattr(packing, "BLOCK", block)
        again = open_split(folder, "train", 100, 320)
        assert (again.counts == whole.counts).all() and again.said == whole.said
        assert (again.windows(np.arange(3)) == whole.windows(np.arange(3))).all()


def test_targets_are_what_counts(folder):
    data = open_split(folder, "train", 100, 320)
    loader = TrainLoader(data, order_of(data, 400, 7), 0, 1, CPU)
    x, y, segments = loader.batch(0, 0, 4)
    rows = data.windows(loader.starts(0, 0, 4))
    assert (x.numpy() == rows[:, :-1] & ID).all()
    expected = np.where(rows[:, 1:] & COUNTS, (rows[:, 1:] & ID).astype(np.int64), IGNORE_INDEX)
    assert (y.numpy() == expected).all()
    assert (segments.numpy() == (rows[:, :-1] & BEGINS > 0).cumsum(1)).all()
    seen = [y for _, y, _ in eval_batches(data, 1000, 3, CPU)]
    assert sum(int((y != IGNORE_INDEX).sum()) for y in seen) == data.counts.sum()


def test_conversations_of_a_window_do_not_see_each_other(folder):
    """The loss of a packed window is that of its conversations alone."""
    data = open_split(folder, "train", 400, 320)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SIZE, max_position_embeddings=400))
    rows = data.windows(np.arange(3)).astype(np.int64)
    x, y, segments = (torch.from_numpy(a) for a in split(rows))
    together = model(x, y, segments, loss_only=True)[1]
    nats = count = 0
    for row in rows:
        edges = [*np.flatnonzero(row & BEGINS).tolist(), len(row)]
        assert len(edges) > 2
        for a, b in itertools.pairwise(edges):
            x, y, _ = (torch.from_numpy(t) for t in split(row[None, a:b]))
            counted = int((y != IGNORE_INDEX).sum())
            nats += float(model(x, y, loss_only=True)[1].detach()) * counted
            count += counted
    assert float(together.detach()) == pytest.approx(nats / count, rel=1e-5)
    plain, _ = model(x, x)
    one, _ = model(x, x, torch.ones_like(x))
    assert torch.allclose(plain, one, atol=1e-5)


def split(rows):
    """Inputs, targets and segments of windows, as numpy says it."""
    ids, targets = rows & ID, np.where(rows & COUNTS, rows & ID, IGNORE_INDEX)
    return ids[:, :-1], targets[:, 1:], (rows & BEGINS > 0).cumsum(1)[:, :-1]


def test_an_epoch_sees_each_window_once(folder):
    data = open_split(folder, "train", 64, 320)
    order, n = order_of(data, 64, 3), data.count
    starts = np.concatenate([order.starts(step, 0, 1) for step in range(2 * n)])
    for epoch in (starts[:n], starts[n:]):
        assert sorted(epoch.tolist()) == [*range(n)]
    assert starts[:n].tolist() != starts[n:].tolist()
    assert order.epochs(n) == 1


SIZE = GPTConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=100,
)


def step_gradient(data, batch, ranks, step=0):
    """The gradient and the loss of an update, as train.py adds them up on so many ranks."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    windows, mean = 8, 0.0
    order = order_of(data, windows * 100, 5)
    for rank in range(ranks):
        loader = TrainLoader(data, order, rank, ranks, CPU)
        count = windows // (batch * ranks)
        for i in range(count):
            loss = model(*loader.batch(step, i, batch), loss_only=True)[1]
            divisor = loader.divisor(step, i, batch)
            (loss / divisor / ranks).backward()  # ranks' gradients are averaged
            mean += float(loss.detach()) / divisor / ranks
    return torch.cat([p.grad.flatten() for p in model.parameters()]), mean


@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_an_update_weighs_counted_tokens_alike(folder, batch, ranks):
    """Gradient and loss of micro-batches and ranks of unequal counts are those of one batch."""
    data = open_split(folder, "train", 100, 320)
    counts = data.counts[order_of(data, 800, 5).starts(0, 0, 8)]
    assert len({*counts.tolist()}) > 3, "or the mean of means would do"
    whole, loss = step_gradient(data, 8, 1)
    parts, same = step_gradient(data, batch, ranks)
    assert (parts - whole).norm() < 1e-6 * whole.norm()
    assert abs(same - loss) < 1e-6 * loss


def test_a_micro_batch_in_which_nothing_counts_adds_nothing(folder, monkeypatch):
    data = open_split(folder, "train", 100, 320)
    loader = TrainLoader(data, order_of(data, 800, 5), 0, 1, CPU)
    monkeypatch.setattr(data, "counts", np.where(np.arange(data.count) == 0, 0, data.counts))
    model = GPT(SIZE)
    x = torch.zeros(2, 9, dtype=torch.int64)
    for spend in (False, True):
        loss = model(x, torch.full_like(x, IGNORE_INDEX), loss_only=spend)[1]
        assert loss.item() == 0
        loss.backward()
    model.loss_pieces = 3
    loss = model(x, torch.full_like(x, IGNORE_INDEX), loss_only=True)[1]
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())
    loader.starts = lambda step, first, count: np.arange(first, first + count)
    assert loader.divisor(0, 0, 1) == float("inf") and 0 / loader.divisor(0, 0, 1) == 0


# --- a run


FAST = [flag for flag in TINY if not flag.startswith(("--max_pos", "--eval_iters", "--tokens"))]
FAST += ["--max_position_embeddings=96", "--tokens_per_step=768", "--eval_windows=20"]


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["iter"], r.get("loss"), r.get("val_loss")) for r in records]


def test_a_run_learns_to_answer_and_goes_on_where_it_stopped(folder, script, tmp_path):
    flags = [f"--dataset={folder}", *FAST, "--compile=False"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = script("train.py", *flags, f"--out_dir={whole}", "--sample_prompt=Ask 1 one?")
    assert result.code == 0, result.err
    assert "conversations in" in result.out and " -> " in result.out
    found = losses(whole)
    assert found[-1][2] < found[0][2] - 0.3
    for batch in (4, 2):  # the same run bit for bit, and the same but for the order of sums
        first = [f"--out_dir={parts}", f"--batch_size={batch}", "--overwrite=True"]
        script("train.py", *flags, *first, "--max_iters=7", "--lr_decay_iters=12")
        again = [f"--out_dir={parts}", "--init_from=resume", f"--batch_size={batch}"]
        result = script("train.py", *flags, *again)
        assert result.code == 0, result.err
        mine, theirs = (checkpoint.load(f / "ckpt_12.pt")["model"] for f in (parts, whole))
        for name, weight in theirs.items():
            if batch == 4:
                assert torch.equal(mine[name], weight), name
            else:
                torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4)


def test_a_vocabulary_without_room_grows(script, prepare, tmp_path):
    """From text in 320 tokens of its own to conversations: two more ids, and the model keeps its
    others."""
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    text, base = tmp_path / "text", tmp_path / "base"
    flags = [f"--source={tmp_path / 'a.txt'}", f"--dataset={text}", "--tokenizer=train:320"]
    assert script("data/prepare.py", *flags).code == 0
    result = script("train.py", f"--dataset={text}", f"--out_dir={base}", *FAST)
    assert result.code == 0, result.err
    rows = write(tmp_path / "a.jsonl", ROWS)
    chat = prepare(rows, f"--tokenizer={text / 'tokenizer.json'}")
    out = tmp_path / "out"
    start = f"--init_from={base / 'best.pt'}"
    flags = [f"--dataset={chat}", f"--out_dir={out}", *FAST, start]
    result = script("train.py", *flags)
    assert result.code == 0, result.err
    assert "320 rows for tokens: 384 from now on" in result.out
    from formats import pretrained

    before, after = (pretrained.load(str(f / "best.pt"), "") for f in (base, out))
    assert after.model.config == dataclasses.replace(before.model.config, vocab_size=384)
    assert after.tok.vocab_size == 322 and after.tok.chat.end == 321
    assert after.tok.chat.end in after.tok.ends
    result = script("train.py", *flags, "--init_from=resume", "--max_iters=13")
    assert result.code == 0, result.err
    # and on plain text again: it can still answer
    result = script(
        "train.py",
        f"--dataset={text}",
        f"--out_dir={tmp_path / 'o'}",
        *FAST,
        f"--init_from={out / 'best.pt'}",
    )
    assert result.code == 0, result.err
    assert pretrained.load(str(tmp_path / "o" / "best.pt"), "").tok.chat == after.tok.chat


def test_new_rows_begin_as_the_mean_of_the_others():
    from pathlib import Path

    from formats.rebuild import build

    torch.manual_seed(0)
    old = GPT(dataclasses.replace(SIZE, tie_word_embeddings=False))
    saved = {"model": old.state_dict(), "model_args": dataclasses.asdict(old.config)}
    new = build(dataclasses.replace(old.config, vocab_size=384), saved, Path("x.pt"))
    for name in ("embed_tokens", "lm_head"):
        a, b = getattr(old, name).weight, getattr(new, name).weight
        assert torch.equal(b[:320], a)
        assert torch.allclose(b[320:], a.mean(0).expand(64, -1))
