"""Measure a trained model: python evaluate.py --task=val --out_dir=out

val        loss on a dataset's whole validation split, in the windows that
           training evaluates in
text       perplexity of the text in --file, by a window that slides; a
           document's start stands before it
hellaswag  accuracy in choosing how a text goes on (arXiv 1905.07830), 10,042
           items
lambada    accuracy in guessing a text's last word (arXiv 1606.06031; OpenAI's
           version), 5,153 items
chat       loss on the answers of conversations, and how many of them the model
           gives word for word when it always takes the likeliest token

Results go to stdout as JSON, and to stderr as a line of a Markdown table. With
--out=PATH the JSON goes to that file and has every item's scores, too.

val counts as training does; the others count as other tools see the exported
model, which has no vocabulary beyond the tokenizer's. HellaSwag and LAMBADA
follow lm-evaluation-harness 0.4, without examples in the prompt (0-shot), and
in float32 give its scores:

- The score of an answer is the sum of the log-likelihoods of its tokens after
  the context. Context and answer are tokenized as one text; blanks at the
  context's end count to the answer. What does not fit in the model's window is
  cut off at the left. An empty context is an end-of-text, or the start token of
  a model that was imported and has one.
- HellaSwag: the context is "activity_label: ctx_a ctx_b", ctx_b capitalised;
  " [title]" becomes ". ", what is in square brackets goes, as do double blanks;
  a blank and an ending follow. acc counts the items whose right ending scores
  best; acc_norm does so after dividing the scores by the endings' lengths in
  characters (as the harness does), acc_bytes in UTF-8 bytes.
- LAMBADA: the context is all but the last word, words being separated by single
  blanks. acc counts the words whose every token is the likeliest; perplexity is
  exp of the mean negative score.
"""

from run import interrupt

if __name__ == "__main__":  # the other imports take seconds
    interrupt.take(interrupt.end)

import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

# Before torch loads OpenMP, as in train.py, for the sake of other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
from tqdm import tqdm

from configurator import configure, refuse, settings_of
from formats import pretrained
from formats.pretrained import Pretrained
from making.scoring import Ids, Question, Score, ask, score, sliding
from run import script
from run.gpu import unused_gpu
from run.machine import Machine, choose_attention, describe, find_machine
from run.settings import at_least, check_folder, check_model
from text.batches import open_split
from text.chat import Template, answering
from text.files import path_of, read_text, write
from text.packing import Conversations
from text.tokenizer import Tokenizer, of_dataset, well_formed
from text.tokens import BEGINS, ID, TokenData, read_meta, split_files
from text.turns import conversation

# what
out_dir = "out"  # folder of a training run; its newest good checkpoint is measured
init_from = "resume"  # resume, PATH (.pt, .shards), hf:FOLDER or hf:USER/NAME
task = "val"  # val, text, chat, hellaswag, lambada
dataset = ""  # of val, chat: folder under data/, or a path with a slash; empty = that trained on
split = "val"  # of chat's dataset: val, train
file = ""  # the text; or chat's, hellaswag's, lambada's items as .jsonl, empty = from the Hub
limit = 0  # only so many items: of hellaswag, lambada the first, of chat drawn; 0 = all
stride = 0  # of text: tokens that the window moves by; 0 = half the model's context
out = ""  # file for the JSON, with every item's scores; empty = stdout, without them
# machine
batch_size = 8  # contexts of the model's length in a batch: memory, not the result, depends on it
device = "auto"  # auto, cpu, mps, cuda, cuda:1
dtype = "float32"  # float32, bfloat16, float16, auto; the harness's scores are float32's

IDLE = {  # settings that are another task's
    "val": ("file", "limit", "stride", "split"),
    "text": ("dataset", "limit", "split"),
    "chat": ("stride",),
    "hellaswag": ("dataset", "stride", "split"),
    "lambada": ("dataset", "stride", "split"),
}
T = TypeVar("T")
DRAW = 2357  # the seed of what is drawn of conversations
HUB = {  # name, configuration and split of what lm-evaluation-harness uses
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
}


# --- tasks


def measure(
    found: Pretrained, questions: Sequence[Question], vocab_size: int, machine: Machine
) -> list[list[Score]]:
    """The scores of each question's answers, with a progress bar on a terminal."""
    model = found.model
    most = batch_size * model.config.max_position_embeddings
    total = sum(q.length() for q in questions)
    bar = tqdm(total=total, unit="token", unit_scale=True, disable=None)
    with bar, machine.autocast:
        return score(model, questions, vocab_size, most, bar.update)


def measure_items(
    found: Pretrained, items: Sequence[tuple[str, list[str]]], machine: Machine
) -> list[list[Score]]:
    """The scores of the answers of each item (context, answers)."""
    window, asked = found.model.config.max_position_embeddings, []
    for i, (context, answers) in enumerate(items, 1):
        try:
            asked.append(ask(found.tok, context, answers, window))
        except ValueError as e:
            raise ValueError(f"{file or task} item {i}: {e}") from e
    questions = [q for parts in asked for q in parts]
    scores = iter(measure(found, questions, found.tok.vocab_size, machine))
    return [[s for _ in parts for s in next(scores)] for parts in asked]


def perplexity(nats: float) -> float | None:
    """exp of it; None where that is beyond all numbers (words in a text without blanks)."""
    return math.exp(nats) if nats < 700 else None


def share(name: str, right: Sequence[bool]) -> dict[str, float]:
    """The share of items that are right, and its standard error."""
    mean = sum(right) / len(right)
    error = math.sqrt(mean * (1 - mean) / max(1, len(right) - 1))
    return {name: mean, f"{name}_stderr": error}


def stream_results(scores: list[list[Score]], tokens: int, nbytes: int) -> dict[str, Any]:
    """Loss in nats per token, bits per byte of text, perplexity per token."""
    nats = -math.fsum(s.loglikelihood for answers in scores for s in answers)
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "loss": nats / tokens,
        "bits_per_byte": nats / nbytes / math.log(2) if nbytes else None,
        "perplexity": perplexity(nats / tokens),
    }


def run_val(found: Pretrained, machine: Machine) -> dict[str, Any]:
    """Loss on the whole validation split; each token but the first is predicted once."""
    folder, size = dataset_of(found), found.model.config
    meta = read_meta(folder)
    if "chat" in meta:
        raise ValueError(f"{folder} holds conversations; write --task=chat")
    if "parts" not in meta:
        split_files(folder, "val")  # raises when there is none
    theirs = of_dataset(meta, folder)
    if problem := pretrained.mismatch(theirs, found.tok):
        raise ValueError(f"{found.path} {problem} ({folder}); choose another --dataset")
    data = TokenData(folder, "val", 1, size.vocab_size)
    ids = data.ids[0] if len(data.ids) == 1 else np.concatenate(data.ids)
    window = size.max_position_embeddings
    scores = measure(found, sliding(ids, window, window), size.vocab_size, machine)
    nbytes = data.nbytes or token_bytes(ids, found.tok)
    return {"data": str(folder), **stream_results(scores, len(ids) - 1, nbytes)}


def dataset_of(found: Pretrained) -> Path:
    """The folder of the dataset that is set, or that a model was trained on."""
    config = found.state.get("config") or {}
    name = dataset or str(config.get("dataset") or "")
    if not name:
        raise ValueError(f"{found.path} does not tell its dataset; write --dataset=NAME")
    return check_folder(name)


def token_bytes(ids: Ids, tok: Tokenizer) -> int:
    """UTF-8 bytes of the text of ids (n,), for bins that no meta.json describes."""
    counts = enumerate(np.bincount(ids).tolist())
    return sum(n * len(tok.token_bytes(i, False)) for i, n in counts if n and i != tok.eot)


def run_text(found: Pretrained, machine: Machine) -> dict[str, Any]:
    """Perplexity of a text file, each token scored once."""
    path, tok = path_of(file), found.tok
    text = read_text(path)
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to measure")
    window = found.model.config.max_position_embeddings
    step = stride or max(1, window // 2)
    if step > window:
        raise ValueError(f"stride must be at most the model's context, {window}, not {stride}")
    ids = np.concatenate([tok.prompt(""), tok.encode_array(text)])
    scores = measure(found, sliding(ids, window, step), tok.vocab_size, machine)
    results = stream_results(scores, len(ids) - 1, len(text.encode()))
    words = len(text.split())
    per_word = perplexity(results["loss"] * results["tokens"] / words) if words else None
    return {"data": str(path), "stride": step, **results, "word_perplexity": per_word}


def run_hellaswag(found: Pretrained, machine: Machine) -> dict[str, Any]:
    """Accuracy in choosing the right ending."""
    where, items = read_items(check_hellaswag)
    asked = [hellaswag_item(item) for item in items]
    pairs = [(context, [f" {e}" for e in endings]) for context, endings in asked]
    records: list[dict[str, Any]] = []
    scored = measure_items(found, pairs, machine)
    for item, (_, endings), scores in zip(items, asked, scored, strict=True):
        sums = [s.loglikelihood for s in scores]
        gold = int(item["label"])
        lengths = {
            "acc": [1] * len(sums),
            "acc_norm": [len(e) for e in endings],
            "acc_bytes": [len(well_formed(e).encode()) for e in endings],
        }
        hits = {name: best(sums, by) == gold for name, by in lengths.items()}
        records.append({"label": gold, "loglikelihoods": sums, **hits})
    shares: dict[str, float] = {}
    for name in ("acc", "acc_norm", "acc_bytes"):
        shares |= share(name, [r[name] for r in records])
    return {"data": where, "items": len(items), **shares, "records": records}


def best(sums: Sequence[float], lengths: Sequence[int]) -> int:
    """Which score is highest by length; the first of equals. An answer without length has none."""
    by_length = [s / n if n else -math.inf for s, n in zip(sums, lengths, strict=True)]
    return by_length.index(max(by_length))


def hellaswag_item(item: dict[str, Any]) -> tuple[str, list[str]]:
    """The context and the endings as they are put to the model."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return tidy(context), [tidy(e) for e in item["endings"]]


def tidy(text: str) -> str:
    """HellaSwag's text without the marks that WikiHow's pages left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def run_lambada(found: Pretrained, machine: Machine) -> dict[str, Any]:
    """Accuracy in guessing the last word, and its perplexity."""
    where, items = read_items(check_lambada)
    parts = [item["text"].rpartition(" ") for item in items]
    pairs = [(context, [f" {word}"]) for context, _, word in parts]
    scores = [s for [s] in measure_items(found, pairs, machine)]
    nats = -math.fsum(s.loglikelihood for s in scores) / len(scores)
    return {
        "data": where,
        "items": len(items),
        **share("acc", [s.greedy for s in scores]),
        "perplexity": perplexity(nats),
        "records": [{"loglikelihood": s.loglikelihood, "acc": s.greedy} for s in scores],
    }


def run_chat(found: Pretrained, machine: Machine) -> dict[str, Any]:
    """Loss on the answers of conversations, and how many a greedy model gives word for word."""
    tok, window = answering(found.tok, found.path), found.model.config.max_position_embeddings
    assert tok.chat is not None
    where, conversations = conversations_of(found, tok)
    questions, is_first, left_out = list[Question](), list[bool](), 0
    for ids, counts in conversations:
        edges = np.flatnonzero(np.diff(counts.astype(np.int8), prepend=0, append=0))
        for i, (a, b) in enumerate(edges.reshape(-1, 2).tolist()):
            if not 0 < a or b - a > window:
                left_out += 1
                continue
            questions.append(Question(ids[max(0, b - window - 1) : a], [ids[a:b]]))
            is_first.append(i == 0)
    if not questions:
        raise ValueError(f"{where} has no answer that fits in a context of {window} tokens")
    scores = measure(found, questions, tok.vocab_size, machine)
    right = [one.greedy for [one] in scores]
    answers = [q.answers[0].tolist() for q in questions]
    texts = [tok.decode(ids[:-1] if ids[-1] == tok.chat.end else ids) for ids in answers]
    firsts = [good for good, first in zip(right, is_first, strict=True) if first]
    return {
        "data": where,
        "conversations": len(conversations),
        "answers": len(questions),
        **({"left_out": left_out} if left_out else {}),
        **stream_results(scores, sum(map(len, answers)), sum(len(t.encode()) for t in texts)),
        **share("exact", right),
        **(share("exact_first", firsts) if firsts else {}),
        "records": [
            {"answer": text, "loglikelihood": one.loglikelihood, "exact": one.greedy}
            for text, [one] in zip(texts, scores, strict=True)
        ],
    }


def conversations_of(found: Pretrained, tok: Tokenizer) -> tuple[str, list[tuple[Ids, Ids]]]:
    """Where the conversations are from, and the ids of each with a mark on those that count."""
    if file:
        template, path = Template(tok), path_of(file)
        made: list[tuple[Ids, Ids]] = []
        for number, item in drawn([*items_of(path)]):
            try:
                ids, counts, _ = template.encode(conversation(item))
            except ValueError as e:
                raise ValueError(f"{path} line {number}: {e}") from e
            made.append((ids.astype(np.int64), counts))
        return str(path), made
    folder = dataset_of(found)
    meta = read_meta(folder)
    if "chat" not in meta:
        raise ValueError(f"{folder} holds text; choose a --dataset of conversations, or a --file")
    if problem := pretrained.mismatch(of_dataset(meta, folder), tok):
        raise ValueError(f"{found.path} {problem} ({folder}); choose another --dataset")
    data = open_split(folder, split, found.model.config.max_position_embeddings, tok.vocab_size)
    assert isinstance(data, Conversations)
    begins = data.places(BEGINS).tolist()
    chosen = drawn([*pairwise([*begins, data.tokens])])
    words = [data.stretch(begin, end) for begin, end in chosen]
    return f"{folder}, {split}", [((w & ID).astype(np.int64), w >> 31 > 0) for w in words]


def drawn(items: list[T]) -> list[T]:
    """All of them, or `limit` that are drawn, the same ones every time, in their order."""
    if not limit or limit >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(DRAW).sample(range(len(items)), limit))]


TASKS = {
    **{"val": run_val, "text": run_text, "chat": run_chat},
    **{"hellaswag": run_hellaswag, "lambada": run_lambada},
}


# --- files


def check_hellaswag(item: dict[str, Any]) -> str:
    """What is wrong with an item, or ""."""
    names = ("activity_label", "ctx_a", "ctx_b")
    if missing := [n for n in names if not isinstance(item.get(n), str)]:
        return f"no text {missing[0]!r}"
    endings = item.get("endings")
    if not isinstance(endings, list) or not endings or not all(type(e) is str for e in endings):
        return "no list of texts 'endings'"
    if str(item.get("label")) not in map(str, range(len(endings))):
        return f"label {item.get('label')!r} is not the number of an ending (a test split?)"
    return ""


def check_lambada(item: dict[str, Any]) -> str:
    """What is wrong with an item, or ""."""
    return "" if isinstance(item.get("text"), str) and item["text"].strip() else "no text 'text'"


def read_items(check: Callable[[dict[str, Any]], str]) -> tuple[str, list[dict[str, Any]]]:
    """Where the task's items are from, and the first `limit` of them, checked.

    Raises OSError or ValueError naming the line.
    """
    if not file:
        return hub_items(*HUB[task])
    path = path_of(file)
    items: list[dict[str, Any]] = []
    for number, item in items_of(path):
        if limit and len(items) == limit:
            break
        if problem := check(item):
            raise ValueError(f"{path} line {number}: {problem}; this is no item of {task}")
        items.append(item)
    return str(path), items


def items_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl, with the numbers of their lines. Raises ValueError."""
    seen = False
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} line {number} is not JSON ({e})") from e
        if not isinstance(item, dict):
            raise ValueError(f"{path} line {number}: not an object; this is no item of {task}")
        seen = True
        yield number, item
    if not seen:
        raise ValueError(f"{path} has no items")


def hub_items(name: str, configuration: str | None, split: str) -> tuple[str, list[dict[str, Any]]]:
    """The items of a Hub dataset."""
    import datasets

    try:
        data = datasets.load_dataset(name, configuration, split=split)
    except Exception as e:  # the Hub's, the network's and the disk's errors have no common class
        reason = " ".join(str(e).split())[:200]
        raise OSError(
            f"the Hub did not give {name} ({type(e).__name__}: {reason}); download its items as "
            ".jsonl and write --file=PATH, or set HF_ENDPOINT to a mirror"
        ) from e
    items = data.select(range(min(limit or len(data), len(data))))
    return name, list(items)


# --- results


def show(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(results: dict[str, Any]) -> str:
    """Head and line of a Markdown table; errors stand behind what they are of."""
    cells: dict[str, str] = {}
    for name, value in results.items():
        if name.endswith("_stderr"):
            cells[name.removesuffix("_stderr")] += f" ± {value:.4f}"
        elif name != "records":
            cells[name] = show(value)
    rows = [list(cells), ["---"] * len(cells), list(cells.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check() -> None:
    """Raises ValueError for settings that do not fit, and for flags that change nothing."""
    if task not in TASKS:
        raise ValueError(f"task must be {', '.join(TASKS)}, not {task!r}")
    refuse(f"with task={task}", *IDLE[task])
    if task == "chat" and file:
        refuse("beside --file", "dataset", "split")
    if split not in ("val", "train"):
        raise ValueError(f"split must be val or train, not {split!r}")
    if init_from != "resume":
        refuse(f"with init_from={init_from}", "out_dir")
    at_least(settings_of(globals()), limit=0, stride=0, batch_size=1)
    if task == "text" and not file:
        raise ValueError("the text to measure is missing; write --file=PATH")
    target = path_of(out)
    if out and target.is_dir():
        raise ValueError(f"out={out} is a folder; write --out={target / 'results.json'}")
    if out and not target.parent.is_dir():
        raise ValueError(
            f"out={out}: there is no folder {target.parent}; make it, or choose another"
        )
    check_model(init_from, out_dir)


def main() -> None:
    check()
    machine = find_machine(device, dtype)
    if why := unused_gpu(device, machine.device):
        print(f"WARNING  on the {machine.device.type}: {why}", file=sys.stderr)
    found = pretrained.load(init_from, out_dir)
    for line in found.lines:
        print(line, file=sys.stderr)
    found.model.to(machine.device)
    choose_attention(found.model, machine.dtype)
    print(f"{found.path}, {found.tok.name} tokens, {describe(machine.device)}", file=sys.stderr)
    started = time.perf_counter()
    results = {
        "model": str(found.path),
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "task": task,
        "dtype": str(machine.dtype).removeprefix("torch."),
        **TASKS[task](found, machine),
    }
    results["seconds"] = round(time.perf_counter() - started, 2)
    print(table(results), file=sys.stderr)
    if out:
        write(path_of(out), json.dumps(results, indent=2) + "\n")
    else:
        results.pop("records", None)
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
