"""Evaluation: scores must be those of transformers one item at a time, and of the harness."""

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TEXT
from torch.nn import functional as F

from formats import checkpoint, rebuild
from making import scoring
from model import GPT, GPTConfig
from text.tokenizer import get_tokenizer

CONTEXT = 96
SIZE = GPTConfig(
    vocab_size=320,  # 257 and padding, which must not count
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
)
BYTES = {"name": "bytes", "vocab_size": 257, "json": None}
MARKS = {"0": "[title] ", "1": "[step] ", "2": "  ", "3": "世界 ", "4": " [title] É"}


def write_checkpoint(out, model, tokenizer=BYTES):
    out.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
    checkpoint.save(out / "ckpt_1.pt", {**state, "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model that has learnt something of TEXT, so that guesses are right."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(list(TEXT.encode()))
    for _ in range(150):
        starts = torch.randint(len(ids) - CONTEXT - 1, (4,))
        rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts.tolist()])
        _, loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    out = tmp_path_factory.mktemp("evaluate") / "out"
    write_checkpoint(out, model)
    return out


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory):
    """A run's folder with a random model of GPT-2's tokens, whose scores depend on the context."""
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(SIZE, vocab_size=50304, num_hidden_layers=1))
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(8)
    out = tmp_path_factory.mktemp("evaluate") / "gpt2"
    write_checkpoint(out, model, {"name": "gpt2", "vocab_size": 50257, "json": None})
    return out


@pytest.fixture
def evaluate(script, tmp_path):
    """Run evaluate.py on a run's folder; the JSON that it wrote."""

    def measure(out, task, *flags):
        file = tmp_path / "results.json"
        where = [f"--out_dir={out}"] if out else []
        flags = [f"--task={task}", f"--out={file}", "--device=cpu", *flags]
        result = script("evaluate.py", *where, *flags)
        assert result.code == 0, result.err
        return json.loads(file.read_text(encoding="utf-8"))

    return measure


@pytest.fixture
def reference(script, tmp_path):
    """The exported folder of a run, and transformers' model and tokenizer from it."""

    def load(out):
        folder = tmp_path / "hf"
        result = script("export.py", f"--out_dir={out}", f"--output={folder}")
        assert result.code == 0, result.err
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return folder, model.eval(), transformers.AutoTokenizer.from_pretrained(folder)

    return load


def sentence(rng, words):
    return " ".join(
        rng.choice(["the", "cat", "sat", "on", "mat", "and", "dog"]) for _ in range(words)
    )


def hellaswag_items(count, longest=40, seed=0):
    """Items in HellaSwag's format: short and long, with its marks, and labels of both its kinds."""
    rng = random.Random(seed)
    items = []
    for i in range(count):
        start = rng.randrange(0, 40) * 51
        cut = start + rng.randrange(20, longest * 5)
        endings = [TEXT[cut : cut + rng.randrange(12, 40)].strip()]
        endings += [sentence(rng, rng.randrange(1, 6)) for _ in range(3)]
        if i % 4 == 0:  # all bad, but not equally so by characters and by bytes
            endings = ["世" * (1 + k) + "q" * rng.randrange(1, 5) for k in range(4)]  # no two equal
            rng.shuffle(endings)
        label = rng.randrange(4)
        endings[0], endings[label] = endings[label], endings[0]
        marks = MARKS.get(str(rng.randrange(6)), "")
        endings[rng.randrange(4)] += " " + marks + "log."
        items.append(
            {
                "ind": i,
                "activity_label": rng.choice(["Cats", "Removing ice", "Été"]),
                "ctx_a": marks + TEXT[start:cut].strip(),
                "ctx_b": rng.choice(["", "the Dog", "[substeps] a man", "é  "]),
                "endings": endings,
                "label": label if i % 2 else str(label),
            }
        )
    return items


def lambada_items(count, longest=40, seed=0):
    """Texts whose last word can be guessed, or not; one word; blanks at odd places."""
    rng = random.Random(seed)
    texts = ["cat", "the cat ", " cat", "the cat  sat", "cat\nthe dog\n", "the 世界"]
    while len(texts) < count:
        start = rng.randrange(0, 40) * 51
        words = TEXT[start : start + rng.randrange(20, longest * 5)].split(" ")
        texts.append(" ".join(words[:-1]))
    return [{"text": t} for t in texts]


def write_jsonl(path, items):
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_text(text, encoding="utf-8")
    return path


def one_at_a_time(model, tok, context, answer):
    """Log-likelihood of `answer` after `context`, and whether it is greedy, by transformers."""
    blanks = len(context) - len(context.rstrip())
    ids = tok(context[: len(context) - blanks])["input_ids"]
    whole = tok(context + answer)["input_ids"]
    n = len(whole) - len(ids)
    if not ids:
        whole = [tok.bos_token_id, *whole]
    whole = torch.tensor(whole[-(model.config.max_position_embeddings + 1) :])
    with torch.no_grad():
        logits = model(whole[None, :-1]).logits[0].double()
    found = F.log_softmax(logits, -1)[-n:]
    picked = found[torch.arange(n), whole[-n:]].sum()
    return float(picked), bool((found.argmax(-1) == whole[-n:]).all())


def close(a, b):
    return a == pytest.approx(b, rel=1e-5, abs=1e-4)


# --- HellaSwag and LAMBADA


def test_hellaswag_equals_transformers_one_at_a_time(run, evaluate, reference, tmp_path):
    """Batches, shared contexts, cut contexts and padded rows change no item's scores."""
    items = hellaswag_items(40)
    found = evaluate(run, "hellaswag", f"--file={write_jsonl(tmp_path / 'h.jsonl', items)}")
    _, model, tok = reference(run)
    right = {"acc": [], "acc_norm": [], "acc_bytes": []}

    def clean(text):
        return re.sub("\\[[^]]*]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    for item, record in zip(items, found["records"], strict=True):
        b = item["ctx_b"][:1].upper() + item["ctx_b"][1:].lower()
        context = clean(item["activity_label"] + ": " + item["ctx_a"] + " " + b)
        endings = [clean(e) for e in item["endings"]]
        sums = [one_at_a_time(model, tok, context, " " + e)[0] for e in endings]
        assert close(record["loglikelihoods"], sums)
        for name, length in (
            ("acc", lambda e: 1),
            ("acc_norm", len),
            ("acc_bytes", lambda e: len(e.encode())),
        ):
            scores = [s / length(e) for s, e in zip(sums, endings, strict=True)]
            right[name].append(int(np.argmax(scores)) == int(item["label"]))
            assert record[name] == right[name][-1]
    for name, hits in right.items():
        assert found[name] == pytest.approx(np.mean(hits))
        assert found[f"{name}_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    assert found["items"] == 40 and 0 < found["acc"] < 1
    assert len({*map(tuple, right.values())}) == 3  # else the lengths were not tested


def test_half_a_character_in_an_ending_is_no_error(run, evaluate, tmp_path):
    """JSON can spell a lone surrogate, which UTF-8 has no bytes for: it becomes U+FFFD."""
    items = hellaswag_items(2)
    items[0]["endings"] = [e + "\ud800" for e in items[0]["endings"]]
    items[1] = {**items[0], "endings": [e.replace("\ud800", "\ufffd") for e in items[0]["endings"]]}
    file = tmp_path / "h.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    one, other = evaluate(run, "hellaswag", f"--file={file}")["records"]
    assert one == other


def test_lambada_equals_transformers_one_at_a_time(run, evaluate, reference, tmp_path):
    items = lambada_items(40)
    found = evaluate(run, "lambada", f"--file={write_jsonl(tmp_path / 'l.jsonl', items)}")
    _, model, tok = reference(run)
    sums = []
    for item, record in zip(items, found["records"], strict=True):
        *context, word = item["text"].split(" ")
        nats, greedy = one_at_a_time(model, tok, " ".join(context), " " + word)
        assert close(record["loglikelihood"], nats)
        assert record["acc"] == greedy
        sums.append(nats)
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(sums)), rel=1e-4)
    assert 0.1 < found["acc"] < 1


def test_gpt2_tokens_across_the_border(evaluate, reference, gpt2_run, tmp_path):
    """Blanks and newlines before the last word, which GPT-2 joins to what follows them or not."""
    texts = ["It is a  hat", "a\n\n hat", "don 't", "x  ", "The meaning of this is 世 界"]
    file = write_jsonl(tmp_path / "l.jsonl", [{"text": t} for t in texts])
    found = evaluate(gpt2_run, "lambada", f"--file={file}")
    _, model, tok = reference(gpt2_run)
    for text, record in zip(texts, found["records"], strict=True):
        *context, word = text.split(" ")
        nats, _ = one_at_a_time(model, tok, " ".join(context), " " + word)
        assert close(record["loglikelihood"], nats)


def test_an_answer_is_tokenized_with_its_context():
    """Here by a tokenizer of pairs of letters, which depend on where they begin."""

    def pairs(text):
        return np.array(
            [int.from_bytes(text[i : i + 2].encode(), "big") for i in range(0, len(text), 2)]
        )

    tok = dataclasses.replace(get_tokenizer("bytes"), encode_piece=pairs)
    context, answer = scoring.encode_pair(tok, "abc", "def")
    assert context == [*pairs("abc")] and answer == [*pairs("ef")]
    assert scoring.encode_pair(tok, " ", "ab") == ([256], [*pairs(" ab")])


def test_batch_size_and_limit_change_no_score(run, evaluate, tmp_path):
    file = write_jsonl(tmp_path / "h.jsonl", hellaswag_items(30))
    many = evaluate(run, "hellaswag", f"--file={file}", "--batch_size=100")["records"]
    few = evaluate(run, "hellaswag", f"--file={file}", "--batch_size=1", "--limit=7")
    assert few["items"] == len(few["records"]) == 7
    for a, b in zip(few["records"], many, strict=False):
        assert close(a["loglikelihoods"], b["loglikelihoods"])


def test_contexts_are_computed_once():
    """An item whose context fits is one row; cut contexts are rows of their own."""
    tok = get_tokenizer("bytes")
    [question] = scoring.ask(tok, "context", [" one", " three"], 20)
    assert question.length() == len("context") + len(" one") + len(" three") - 2
    cut = scoring.ask(tok, "a context of 24 letters.", [" one", " three"], 20)
    assert [len(q.context) + len(q.answers[0]) for q in cut] == [21, 21]
    assert bytes(cut[0].context.tolist()) == b"ntext of 24 letters."[-17:]


def test_rows_are_batched_by_length():
    lengths = [5, 90, 7, 100, 6, 95]
    groups = list(scoring.batches(lengths, 200))
    assert groups == [[3, 5], [1, 2], [4, 0]] or sorted(map(sorted, groups)) == [
        [0, 2, 4],
        [1],
        [3, 5],
    ]
    for group in groups:
        assert len(group) * max(lengths[i] for i in group) <= 200
    assert list(scoring.batches([300, 1], 200)) == [[0], [1]]  # one too long goes alone


# --- val and text


def test_val_equals_the_mean_of_train(script, evaluate, tiny, dataset, tmp_path):
    """Windows that fill the split exactly, all of which training evaluates in."""
    folder = tmp_path / "exact"
    shutil.copytree(dataset, folder)
    ids = np.fromfile(folder / "val.bin", "<u2")[: 62 * 32 + 1]
    ids.tofile(folder / "val.bin")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["splits"]["val"] |= {"tokens": len(ids), "bytes": len(ids)}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    result = script("train.py", *tiny, f"--dataset={folder}", "--eval_iters=16")
    assert result.code == 0, result.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r["val_loss"] for r in records if "val_loss" in r][-1]
    found = evaluate(tmp_path / "out", "val")  # the dataset is the run's own
    assert found["loss"] == pytest.approx(trained, rel=1e-6)
    assert found["tokens"] == 62 * 32


def test_val_scores_the_end_of_the_split_too(run, evaluate, dataset, tmp_path):
    found = evaluate(run, "val", f"--dataset={dataset}")
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    path = run / "ckpt_1.pt"
    model = rebuild.load_model(path, checkpoint.load(path))
    nats, n = 0.0, len(ids) - 1
    for start in range(0, n, CONTEXT):
        first = min(start, n - CONTEXT)
        rows = ids[first : first + CONTEXT + 1][None]
        with torch.no_grad():
            logits, _ = model(rows[:, :-1], rows[:, 1:])
        losses = F.cross_entropy(logits[0].double(), rows[0, 1:], reduction="none")
        nats += float(losses[start - first :].sum())
    assert n % CONTEXT and found["tokens"] == n
    assert found["loss"] == pytest.approx(nats / n, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2000, rel=1e-6)


def test_val_counts_the_bytes_of_bins_without_meta_json(evaluate, gpt2_run, tmp_path):
    """nanoGPT's: GPT-2's ids, end-of-text between documents. Also in several shards."""
    texts, tok = ["Hello  world, é 世界", "the cat\n" * 40], get_tokenizer("gpt2")
    ids, _ = tok.encode_documents(texts)
    (tmp_path / "data").mkdir()
    ids[:50].astype("<u2").tofile(tmp_path / "data" / "val_0.bin")
    ids[50:].astype("<u2").tofile(tmp_path / "data" / "val_1.bin")
    found = evaluate(gpt2_run, "val", f"--dataset={tmp_path / 'data'}")
    assert found["bytes"] == sum(len(t.encode()) for t in texts)
    assert found["tokens"] == len(ids) - 1
    assert 0 < found["bits_per_byte"] < found["loss"] / math.log(2)


def by_sliding(model, ids, stride):
    """Log-likelihood of each of ids but the first, in windows written down one after another."""
    context, n, nats = model.config.max_position_embeddings, len(ids), []
    start = 0
    while len(nats) < n - 1:
        start = min(start, max(0, n - 1 - context))
        window = torch.tensor(ids[start : start + context + 1])
        with torch.no_grad():
            found = F.log_softmax(model(window[None, :-1]).logits[0].double(), -1)
        for i in range(len(window) - 1):
            if start + i == len(nats):
                nats.append(float(found[i, window[i + 1]]))
        start += stride
    return nats


@pytest.mark.parametrize("length", [1, 50, CONTEXT - 1, CONTEXT, CONTEXT + 1, 400])
@pytest.mark.parametrize("stride", [0, 1, 31, CONTEXT])
def test_text_equals_transformers_in_sliding_windows(
    run, evaluate, reference, tmp_path, length, stride
):
    text = ("Ünd the cat\r\n" + TEXT).encode()[: length + 1].decode(errors="ignore")
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as data/prepare.py reads it
    found = evaluate(run, "text", f"--file={file}", f"--stride={stride}")
    _, model, _ = reference(run)
    nats = by_sliding(model, [256, *text.encode()], stride or CONTEXT // 2)
    assert found["tokens"] == found["bytes"] == len(text.encode()) == len(nats)
    assert found["loss"] == pytest.approx(-np.mean(nats), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    per_word = math.exp(-sum(nats) / len(text.split()))
    assert found["word_perplexity"] == pytest.approx(per_word, rel=1e-3)


def test_a_text_without_blanks_has_no_perplexity_per_word(run, evaluate, tmp_path):
    """exp of the loss of a word of 2,000 bytes is beyond all floats."""
    (tmp_path / "text.txt").write_text("世" * 700, encoding="utf-8")
    found = evaluate(run, "text", f"--file={tmp_path / 'text.txt'}")
    assert found["word_perplexity"] is None and found["bytes"] == 2100
    (tmp_path / "text.txt").write_text(" \n", encoding="utf-8")
    assert evaluate(run, "text", f"--file={tmp_path / 'text.txt'}")["word_perplexity"] is None


# --- the command


def test_json_on_stdout_and_a_table_line_on_stderr(run, script, tmp_path):
    file = write_jsonl(tmp_path / "h.jsonl", hellaswag_items(5))
    result = script("evaluate.py", f"--out_dir={run}", "--task=hellaswag", f"--file={file}")
    found = json.loads(result.out)
    assert "records" not in found and found["parameters"] > 10000
    head, _, line = [row for row in result.err.splitlines() if row.startswith("|")]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["acc_norm"] == f"{found['acc_norm']:.4f} ± {found['acc_norm_stderr']:.4f}"


def test_models_from_hugging_faces_folders(run, script, evaluate, reference, tmp_path):
    """The exported model, without the vocabulary's padding, has the same scores."""
    file = write_jsonl(tmp_path / "l.jsonl", lambada_items(12))
    before = evaluate(run, "lambada", f"--file={file}")
    folder, _, _ = reference(run)
    after = evaluate("", "lambada", f"--file={file}", f"--init_from=hf:{folder}")
    for a, b in zip(after["records"], before["records"], strict=True):
        assert close(a["loglikelihood"], b["loglikelihood"])
    result = script("evaluate.py", f"--init_from=hf:{folder}")
    assert result.code == 1 and "--dataset=NAME" in result.err


GOOD = json.dumps(hellaswag_items(1)[0])


def spoilt(**changes):
    return json.dumps({**hellaswag_items(1)[0], **changes})


@pytest.mark.parametrize(
    "task, text, message",
    [
        ("text", b"", "is empty"),
        ("text", b"\xff\xfe", "not UTF-8"),
        ("hellaswag", b"", "has no items"),
        ("hellaswag", b"\n\n", "has no items"),
        ("hellaswag", f"{GOOD}\n{GOOD[:-5]}".encode(), "line 2 is not JSON"),
        ("hellaswag", b"[" * 100000, "line 1 is not JSON"),
        ("hellaswag", b"[1]", "line 1: not an object"),
        ("hellaswag", b'{"ctx_a": 1}', "line 1: no text 'activity_label'"),
        ("hellaswag", spoilt(endings=["a", 1]).encode(), "no list of texts 'endings'"),
        ("hellaswag", spoilt(endings=[]).encode(), "no list of texts 'endings'"),
        ("hellaswag", spoilt(label="").encode(), "label ''"),
        ("hellaswag", spoilt(label=4).encode(), "label 4"),
        ("hellaswag", spoilt(label=-1).encode(), "label -1"),
        ("hellaswag", spoilt(endings=["a" * 200] * 4).encode(), "item 1: an answer of 201 tokens"),
        ("lambada", b'{"text": ""}', "line 1: no text 'text'"),
        ("lambada", b'{"text": 3}', "line 1: no text 'text'"),
    ],
)
def test_bad_files_end_in_one_line(run, script, tmp_path, task, text, message):
    (tmp_path / "file").write_bytes(text)
    result = script(
        "evaluate.py", f"--out_dir={run}", f"--task={task}", f"--file={tmp_path / 'file'}"
    )
    *_, last = result.err.splitlines()
    assert result.code == 1 and message in last and result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task=mmlu"], "task must be val, text, chat, hellaswag, lambada"),
        (["--task=text"], "--file=PATH"),
        (["--task=text", "--file=nowhere.txt"], "there is no file nowhere.txt"),
        (["--task=lambada", "--limit=-1"], "limit must be at least 0, not -1"),
        (["--batch_size=0"], "batch_size must be at least 1, not 0"),
        (["--task=text", "--file=README.md", "--stride=97"], "stride must be at most"),
        (["--out=nowhere/x.json"], "there is no folder nowhere; make it"),
        (["--out=README.md/x"], "there is no folder README.md"),
        (["--out=docs"], "write --out=docs/results.json"),
        (["--dataset=docs/plan.md"], "docs/plan.md is a file; its folder is --dataset=docs/"),
        (["--init_from=nowhere.pt"], "no checkpoint nowhere.pt"),
        ([], "does not tell its dataset"),
        (["--dataset=nowhere/data"], "there is no dataset nowhere/data"),
    ],
)
def test_bad_settings_end_in_one_line(run, script, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    where = [] if any("init_from" in flag for flag in flags) else [f"--out_dir={run}"]
    result = script("evaluate.py", *where, *flags)
    assert result.code == 1 and message in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_another_tokenizers_dataset_is_refused(run, script, tmp_path):
    np.arange(500, dtype="<u2").tofile(tmp_path / "val.bin")  # no meta.json: GPT-2
    result = script("evaluate.py", f"--out_dir={run}", f"--dataset={tmp_path}")
    assert result.code == 1 and "choose another --dataset" in result.err.splitlines()[-1]


def test_the_hub(run, evaluate, script, monkeypatch):
    """Its items are scored as a file's are, and no network is one line."""
    items = lambada_items(9)
    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return datasets.Dataset.from_list(items)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = evaluate(run, "lambada", "--limit=8")
    assert asked == [(("EleutherAI/lambada_openai", "default"), {"split": "test"})]
    assert found["items"] == 8 and found["data"] == "EleutherAI/lambada_openai"

    def offline(*args, **more):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    result = script("evaluate.py", f"--out_dir={run}", "--task=hellaswag")
    last = result.err.splitlines()[-1]
    assert result.code == 1 and "Rowan/hellaswag (ConnectionError: no network at all)" in last
    assert "--file=PATH" in last


# --- lm-evaluation-harness

HELLASWAG = """\
task: my_endings
dataset_path: json
dataset_kwargs: {data_files: {test: /path/to/items.jsonl}}
test_split: test
output_type: multiple_choice
process_docs: !function protocol.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""


def readmes_task():
    """The task file that README.md shows, which is LAMBADA's protocol."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"^    task: my_words\n(?:    .*\n)+", text, flags=re.M)[0]
    return re.sub("^    ", "", lines, flags=re.M)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="pip install lm_eval")
def test_scores_are_lm_evaluation_harness_s(run, evaluate, reference, tmp_path):
    """Item by item, with its own preparation of HellaSwag's items, in its own process."""
    items = [{**item, "label": str(item["label"])} for item in hellaswag_items(60)]
    files = {
        "hellaswag": write_jsonl(tmp_path / "h.jsonl", items),
        "lambada": write_jsonl(tmp_path / "l.jsonl", lambada_items(60)),
    }
    ours = {task: evaluate(run, task, f"--file={file}") for task, file in files.items()}
    folder, _, _ = reference(run)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "protocol.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    for name, text in (("hellaswag", HELLASWAG), ("lambada", readmes_task())):
        text = re.sub(r"/path/to/\S+\.jsonl", files[name].as_posix(), text)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--batch_size", "8"]
    command += ["--tasks", "my_endings,my_words", "--include_path", str(tasks)]
    command += ["--log_samples", "--output_path", str(tmp_path / "theirs")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    theirs = {}
    named = {"hellaswag": "my_endings", "lambada": "my_words"}
    for name in files:
        [path] = (tmp_path / "theirs").rglob(f"samples_{named[name]}_*.jsonl")
        lines = path.read_text(encoding="utf-8").split("\n")
        samples = [json.loads(line) for line in lines if line]
        theirs[name] = sorted(samples, key=lambda s: s["doc_id"])
    [path] = (tmp_path / "theirs").rglob("results_*.json")
    summary = json.loads(path.read_text(encoding="utf-8"))["results"]
    for a, b in zip(ours["hellaswag"]["records"], theirs["hellaswag"], strict=True):
        assert close(a["loglikelihoods"], [float(r[0][0]) for r in b["resps"]])
        for metric in ("acc", "acc_norm", "acc_bytes"):
            assert a[metric] == bool(b[metric])
    for a, b in zip(ours["lambada"]["records"], theirs["lambada"], strict=True):
        assert close(a["loglikelihood"], float(b["resps"][0][0][0]))
        assert a["acc"] == bool(b["acc"])
    for name, metric in (
        *(("hellaswag", m) for m in ("acc", "acc_stderr", "acc_norm", "acc_bytes")),
        *(("lambada", m) for m in ("acc", "perplexity")),
    ):
        key = f"{metric},none"
        assert ours[name][metric] == pytest.approx(summary[named[name]][key], rel=1e-5)
