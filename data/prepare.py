"""Text to token files: python data/prepare.py makes data/<dataset>/train.bin.

With no arguments the source is OpenWebText from the Hugging Face Hub, with
GPT-2's tokens. --source=stdlib is the prose inside every Python installation:
2 MB of English, no download. --source=PATH is your own text: a file, a folder
or a pattern of .txt, .jsonl, .parquet and more. --verify=True checks a folder
that is there. Run the same command again after an interruption.

Workers turn each part of the source into a file of tokens in
data/<dataset>/parts. When all are there, they are moved into train.bin piece by
piece, so that the disk holds little more than the tokens once, and neither an
interruption nor the number of workers changes a byte.
"""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # the second in its workers
    if __name__ == "__main__":
        sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository; it was data/
    from run import interrupt

    interrupt.take(interrupt.end)

import contextlib
import glob
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from configurator import configure, refuse, settings_of
from data import sources
from data.assembly import assemble, publish
from data.parts import FULL, Reading, Source, content, fingerprint, kind
from data.readers import ROWS, SAID, template_fields
from data.sniff import (
    OF_FILES,
    OF_HUB,
    check_separator,
    check_splits,
    no_separator,
    refuse_unfit,
)
from data.splits import no_split
from data.verify import check_folder
from data.vocabulary import train_bpe
from data.workers import (
    BATCH,
    MARK,
    Job,
    check_disk,
    cores,
    encode_parts,
    enough,
    facts_of,
    token_type,
)
from formats import hub
from run import script
from run.folder import Held, Lock
from run.settings import at_least
from text import encoding as encodings
from text import stated
from text.chat import with_chat
from text.files import path_of, read_json, write
from text.tokenizer import Tokenizer, chat_entry, get_tokenizer
from text.tokens import dataset_folder

# what
source = "hub:Skylion007/openwebtext"  # hub:NAME, stdlib, a file, a folder, or a pattern with *
dataset = ""  # name of the folder under data/ to write, or a path; empty = from the source
tokenizer = "auto"  # gpt2, bytes, PATH of a tokenizer.json or its folder, hf:USER/NAME, train:8192
eot = ""  # token between documents, such as <|im_end|>; empty = what the tokenizer's folder states
text_column = "text"  # of files of rows; dots lead inside: data.text
template = ""  # several columns as one text, such as "{title}\n\n{text}"; \n is a new line
separator = ""  # between the documents of a text file, such as <|endoftext|>; empty = a file is one
chat = False  # the rows are conversations: messages, ShareGPT's or Alpaca's, found by looking
encoding = ""  # of text files, such as gb18030 or utf-8:replace; empty = UTF-8
subset = ""  # of a dataset that has several, by its card or in the names of its files
split = "train"  # of a dataset; all = every split is trained on
revision = ""  # of a Hub dataset: branch, tag or commit; empty = the newest, which is recorded
# how much
max_tokens = ""  # stop after so many, such as 100M; empty = all
shards = ""  # 0-7 or 0,3: only these files of the source; 2/8: the third of eight equal shares
merge = False  # put together what --shards=0/8 ... 7/8 have made
# split
val_split = ""  # a split of the dataset to validate on; empty = a part of what is trained on
val_fraction = 0.0  # of the documents; 0 = 0.0005 as nanoGPT, 0.05 below 100,000 documents
seed = 2357  # of the split, nanoGPT's
# how
num_proc = 0  # worker processes; 0 = one a core
skip_bad = False  # leave damaged files and documents out, and list them in meta.json
overwrite = False  # throw away what is in the folder, complete or not
verify = False  # only check the folder: counts, hashes, range of the ids; show some text

OF_MAKING = (
    *("tokenizer", "eot", "max_tokens", "shards", "merge", "val_fraction", "seed", "num_proc"),
    *("skip_bad", "overwrite", "chat"),
)
NAMES = ("gpt2", "bytes")  # of tokenizers that come without a file
LOCK_ATTEMPTS = 50  # of a share, a tenth of a second apart


def prepare(out: Path, name: str) -> None:
    """Make the dataset folder, or the parts of a share of it, with the tokenizer `name`."""
    work, limit, asked = out / "parts", parse_count(max_tokens), request(name)
    form = 1 if name in NAMES or name.startswith("train:") else 2  # 2: end-of-text as stated
    plan = {"format": form, "batch": BATCH, **asked}
    if (work / "meta.json").exists() and publish(out).get("request") == asked:
        print(f"{out} is complete")  # the last run was killed at the very end
        return
    saved = unfinished(work, plan, overwrite)
    if saved is None and not overwrite and is_complete(out, asked):
        print(f"{out} is complete already (--overwrite=True prepares it again)")
        return

    how = reading()
    at = (saved or {}).get("revision") or revision
    found = sources.find(source, how, subset, at, val_split, out)
    refuse_unfit(source, found, how)
    if not merge:
        for line in found.said:
            print(line)
        check_splits(source, found, how)
        check_separator(source, found, how)
    numbers, here = selected(found, shards, merge)
    anew = overwrite or bool(saved and saved.get("overwrite"))
    begun = {"plan": plan, "revision": found.revision, "overwrite": anew}
    write(work / "plan.json", json.dumps(begun), MARK)
    tok = load_tokenizer(name, found, work)
    if chat:
        try:
            tok = with_chat(tok)
        except ValueError as e:
            raise ValueError(f"tokenizer={name}: {e}") from e
    for path in work.glob("*.tmp"):  # of a run that was killed
        if "/" not in shards:
            path.unlink(missing_ok=True)

    facts = {i: f for i in numbers if (f := facts_of(work, i, found.parts[i])) is not None}
    have = {i: int(f["tokens"]) for i, f in facts.items()}
    train = [i for i in numbers if not found.parts[i].val]
    for chosen, most in ((train, limit), ([i for i in numbers if i not in train], 0)):
        todo = {i: found.parts[i] for i in chosen if i in here and i not in have}
        if todo and not enough(have, most, chosen):
            processes = num_proc or cores()
            check_disk(out, [*todo.values()], name, most, processes)
            job_name = tok.name if tok.json_text is None else "tokenizer.json"
            entry = chat_entry(tok.chat) if tok.chat else None
            job = Job(str(work), job_name, tok.json_text, tok.eot, entry, how, skip_bad, most)
            if (work / "assembly.json").exists():
                raise ValueError(f"{source} is not what it was; start over with --overwrite=True")
            encode_parts(todo, have, job, processes, chosen)

    meta = description(found, tok, name)
    if "/" in shards:
        if not limit:
            describe_parts(out, len(numbers), meta, tok)
        print(
            f"{work}: {len(here)} of {len(numbers)} parts, share {shards}; with all shares there, "
            "train.py reads them as they stand, and --merge=True makes train.bin of them"
        )
        return
    if limit:
        total = np.cumsum([have.get(i, 0) for i in train])
        used = train[: int(np.searchsorted(total, limit)) + 1]
        numbers = [*used, *(i for i in numbers if found.parts[i].val)]
    missing = [i for i in numbers if i not in have]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(numbers)} parts are missing (the first is {missing[0]}): "
            "run the other --shards=I/N, or no --shards and no --merge to make them here"
        )
    finish(out, numbers, found, tok, meta, limit)


def reading() -> Reading:
    """The settings that say how texts are read. Raises ValueError for one that cannot be."""
    if encoding:
        encodings.check(encoding)
    texts = text_column, unescaped(template), unescaped(separator), encoding
    how = Reading(*texts, chat, split, val_split)
    if template:
        template_fields(how.template)
    if chat:
        refuse("with --chat=True, which finds the columns", "text_column", "template")
    return how


def unescaped(text: str) -> str:
    """A text as a person types it: \\n is a new line, \\t a tab, and a backslash is two."""
    known = {"\\n": "\n", "\\t": "\t", "\\\\": "\\", "\\r\\n": "\n", "\r\n": "\n"}
    return re.sub(r"\\r\\n|\r\n|\\[nt\\]", lambda m: known[m[0]], text)


def request(name: str) -> dict[str, Any]:
    """The settings that a dataset's bytes depend on; some only where they are set."""
    what = {"source": source, "subset": subset, "split": split, "revision": revision}
    what |= {"tokenizer": name, "text_column": text_column, "separator": separator}
    newer: dict[str, Any] = {"eot": eot, "template": template, "encoding": encoding}
    newer |= {"val_split": val_split, "chat": chat}
    what |= {k: v for k, v in newer.items() if v}  # datasets of before do not have them
    amount = {"max_tokens": max_tokens, "shards": "" if "/" in shards else shards}
    return {**what, **amount, "val_fraction": val_fraction, "seed": seed}


def unfinished(work: Path, plan: dict[str, Any], anew: bool) -> dict[str, Any] | None:
    """plan.json of the run that was begun in `work` and goes on; None for a new one.

    What lies there is deleted when it is to be made anew, and when no part of another plan is
    made. Raises ValueError when some are.
    """
    path = work / "plan.json"
    saved: dict[str, Any] | None = json.loads(path.read_bytes()) if path.exists() else None
    same = saved is not None and saved["plan"] == plan
    made = any(work.glob("[0-9]*.json"))
    going_on = same and saved is not None and bool(saved.get("overwrite"))  # with a new one
    if (anew and not going_on) or (saved is not None and not same and not made):
        old = [path for path in work.glob("*") if not path.name.startswith("lock")]
        for path in sorted(old, key=lambda path: path.name == "plan.json"):  # that one last
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    if saved is not None and not same:
        keys = [*plan, *(saved["plan"].keys() - plan.keys())]
        changed = ", ".join(k for k in keys if plan.get(k) != saved["plan"].get(k))
        raise ValueError(
            f"{work} holds an unfinished run with another {changed}; finish that, choose another "
            "--dataset, or start over with --overwrite=True"
        )
    return saved


def is_complete(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the dataset is there. Raises ValueError when it is another one."""
    there = [path for path in (out / "train.bin", out / "val.bin") if path.exists()]
    if there and not (out / "meta.json").exists():
        raise ValueError(
            f"{there[0]} is there, without a meta.json: another program made it; choose another "
            "--dataset, or replace it with --overwrite=True"
        )
    if not (out / "meta.json").exists() or not (out / "train.bin").exists():
        return False
    meta = read_json(out / "meta.json")
    known = meta.get("request")
    if known != asked:
        if not source.startswith("hub:"):  # what would change nothing is said to be that
            with contextlib.suppress(OSError):
                how = reading()
                found = sources.find(source, how, subset, revision, val_split, out)
                refuse_unfit(source, found, how)
        known = known if isinstance(known, dict) else {}
        keys = [k for k in {**asked, **known} if asked.get(k) != known.get(k)]
        raise ValueError(
            f"{out} holds {meta.get('source')!r} or other settings ({', '.join(keys)}); choose "
            "another --dataset, or replace it with --overwrite=True"
        )
    before = meta.get("fingerprint")
    if before is None or source.startswith("hub:") or not path_of(source).exists():
        return True
    if fingerprint(sources.find(source, reading(), subset, revision, val_split, out)) != before:
        raise ValueError(
            f"{out} is complete, but was made of other files than {source} holds now; choose "
            "another --dataset, or replace it with --overwrite=True"
        )
    return True


def selected(found: Source, chosen: str, merging: bool) -> tuple[list[int], list[int]]:
    """The parts that --shards selects for the dataset, and those of them that this run makes.

    Raises ValueError for a share or shard that there is not.
    """
    numbers = list(range(len(found.parts)))
    if not chosen:
        return numbers, [] if merging else numbers
    try:
        if "/" in chosen:
            i, n = map(int, chosen.split("/"))
            if not 0 <= i < n:
                raise ValueError
            return numbers, numbers[i::n]
        files: set[int] = set()
        for piece in chosen.split(","):
            first, _, last = piece.partition("-")
            files.update(range(int(first), int(last or first) + 1))
    except ValueError as e:
        raise ValueError(f"shards must be like 0-7, 0,3 or 2/8, not {chosen!r}") from e
    if not files or max(files) >= found.shards:
        raise ValueError(f"shards={chosen}, but the source has shards 0-{found.shards - 1}")
    parts = found.parts
    numbers = [i for i in numbers if parts[i].val or parts[i].shard in files]
    return numbers, [] if merging else numbers


def parse_count(text: str) -> int:
    """100M, 1.5B, 20k or 100_000 as a number; "" is 0. Raises ValueError."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if unit > 1 else text.replace("_", "")) if text else 0.0
        if not 0 <= number < math.inf or (text and number == 0):
            raise ValueError
    except ValueError as e:
        raise ValueError(f"max_tokens must be like 100M or 2B, not {text!r}") from e
    return int(number * unit)


def load_tokenizer(name: str, found: Source, work: Path) -> Tokenizer:
    """The tokenizer of the settings; its tokenizer.json is kept in `work`, trained only once.

    Documents end with the token that `eot` names, else with what the files beside the
    tokenizer.json state; of a model on the Hub only these small files are downloaded.
    """
    kept = work / "tokenizer.json"
    if name.startswith("train:"):
        if not name[6:].isdigit():
            raise ValueError(f"tokenizer must be like train:8192, not {name!r}")
        if not kept.exists():
            folder = work / "tokenizer.hub"
            how = reading()  # the embedded corpus has the same tokens for its conversations
            how = replace(how, chat=False) if source == "stdlib" else how
            text = train_bpe(found, int(name[6:]), how, folder, skip_bad)
            write(kept, text, MARK)
        return get_tokenizer(str(kept))
    if name in NAMES:
        return get_tokenizer(name)
    path = path_of(name)
    if name.startswith(hub.PREFIX):
        path = hub.find(name.removeprefix(hub.PREFIX), (*stated.FILES, "tokenizer.json"))
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"there is no tokenizer.json in {path}; transformers makes one of other files: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    path = path / "tokenizer.json" if path.is_dir() else path
    tok = get_tokenizer(str(path), eot=eot or None)
    if tok.guessed:
        print(f"{tok.guess} (else --eot=)")
    assert tok.json_text is not None
    write(kept, tok.json_text, MARK)
    return tok


def description(found: Source, tok: Tokenizer, name: str) -> dict[str, Any]:
    """What meta.json says of any dataset; what the splits hold comes on top."""
    meta: dict[str, Any] = {
        "format": 1,
        "tokenizer": tok.name,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "dtype": np.dtype(token_type(tok)).name,
        "source": source,
        "revision": found.revision,
        "split_seed": seed,
        "fingerprint": fingerprint(found),
        "request": request(name),
    }
    if tok.chat:
        meta["chat"] = chat_entry(tok.chat)
    if tok.json_text is not None:
        meta["tokenizer_sha256"] = hashlib.sha256(tok.json_text.encode()).hexdigest()
    return meta


def describe_parts(out: Path, parts: int, meta: dict[str, Any], tok: Tokenizer) -> None:
    """A meta.json with which the loader reads the parts before they are merged.

    The same whichever share writes it; its "parts" says how many there will be.
    """
    meta = meta | {"partial": False, "parts": parts, "val_fraction": val_fraction, "splits": {}}
    if tok.json_text is not None:
        write(out / "tokenizer.json", tok.json_text, MARK)
    write(out / "meta.json", json.dumps(meta, indent=2) + "\n", MARK)


def finish(
    out: Path, numbers: list[int], found: Source, tok: Tokenizer, meta: dict[str, Any], limit: int
) -> None:
    """Parts to a complete dataset folder; `meta` is its description."""
    work = out / "parts"
    facts = {i: f for i in numbers if (f := facts_of(work, i, found.parts[i])) is not None}
    assert len(facts) == len(numbers)
    skipped = [f["skipped"] for f in facts.values() if f["skipped"]["count"]]
    tokens = sum(f["tokens"] for i, f in facts.items() if not found.parts[i].val)
    meta["partial"] = len(numbers) < len(found.parts) or bool(limit and tokens > limit)
    meta["skipped"] = skipped
    notes = noted(facts.values())
    if not notes.pop("separators", None) and separator and not limit:
        raise no_separator(source, reading())
    if not notes.pop(ROWS, None) and archives_alone(found):
        refuse("on archives without files of rows", "text_column", "template")
    refuse_empty(work, facts, found, notes)
    dropped = {why: note["count"] for why, note in notes.items() if not why.startswith(SAID)}
    meta["left_out"] = {why: len(files) for why, files in found.left_out.items()} | dropped
    meta |= assemble(work, facts, tok, limit, val_fraction, seed)
    write(work / "meta.json", json.dumps(meta, indent=2) + "\n", MARK)
    publish(out)
    documents = sum(meta["splits"][s]["documents"] for s in ("train", "val"))
    if found.documents not in (None, documents) and not meta["partial"]:
        print(
            f"WARNING: {documents:,} documents, but this source should have {found.documents:,}; "
            "losses on its val.bin cannot be compared with others'"
        )
    for one in skipped:
        print(f"left out {one['count']}: {'; '.join(one['first'][:3])}")
    for why, note in notes.items():
        verb = "" if why.startswith(SAID) else "left out "
        names = ", ".join(note["first"][:3])
        print(f"{verb}{note['count']} {why}{names and f': {names}'}")
    used = sum(meta["splits"][s]["tokens"] for s in ("train", *(() if val_split else ("val",))))
    if limit and used > 2 * limit:
        print(f"max_tokens={max_tokens}, but documents are taken whole: there are {used:,}")
    what = "conversations" if chat else "documents"
    for s, f in meta["splits"].items():
        counted = f", {f['counted']:,} of them count" if chat else ""
        print(f"{out / s}.bin: {f['tokens']:,} tokens{counted}, {f['documents']:,} {what}")


def refuse_empty(work: Path, facts: dict[int, Any], found: Source, notes: dict[str, Any]) -> None:
    """Raises ValueError when there are no documents for training, or for a split that validates."""
    for val, asked in ((False, split), (True, val_split)):
        mine = [f["documents"] for i, f in facts.items() if found.parts[i].val == val]
        if any(mine) or not mine:
            continue
        for i in facts:  # so that they stand in nobody's way
            if not facts[i]["documents"]:
                (work / f"{i:05d}.json").unlink()
        groups = [why.removeprefix("of split ") for why in notes if why.startswith("of split ")]
        if groups:
            raise no_split(source, asked, groups)
        left = "; ".join(
            f"{n['count']} {why}: {', '.join(n['first'][:3])}" for why, n in notes.items()
        )
        where = f"the split {asked!r} of {source}" if val else source
        raise ValueError(f"{where} has no documents{left and f' (left out: {left})'}")


def archives_alone(found: Source) -> bool:
    """Whether a source is only archives."""
    return {content(f) for part in found.parts for f in part.files} in ({"tar"}, {"zip"})


def noted(facts: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The notes of all parts together: how many of each kind, and the first by name."""
    notes: dict[str, dict[str, Any]] = {}
    for one in facts:
        for why, note in one.get("notes", {}).items():
            kept = notes.setdefault(why, {"count": 0, "first": []})
            kept["count"] += note["count"]
            kept["first"] += note["first"]
    return notes


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Only one process may hold the lock `path`, which is deleted at the end, with empty folders.

    Raises ValueError saying who holds it. A disk without locks is said to be one and has none.
    """
    try:
        lock = Lock(path)
    except Held as e:
        raise ValueError(
            f"{path.parent.parent} is being prepared by {e}; wait for it, or choose another "
            "--dataset"
        ) from e
    if lock.problem:
        line = f"WARNING: no lock on {path} ({lock.problem}): start no second run there"
        print(line, file=sys.stderr)
    try:
        lock.write(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.free(delete=True)
        with contextlib.suppress(OSError):  # not empty: there is more to do
            path.parent.rmdir()
            path.parent.parent.rmdir()


def wait_for(path: Path) -> None:
    """Return when nobody holds the lock `path`. Raises ValueError when somebody goes on with it."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            with held(path):
                return
        except (ValueError, OSError):
            if attempt == LOCK_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0.01, 0.2))


@contextlib.contextmanager
def with_a_way_on() -> Iterator[None]:
    """Say when the disk is full, memory is short or Ctrl-C was pressed how to go on from there."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise OSError(f"{e}; make room, and run the same command again to go on from here") from e
    except MemoryError as e:
        raise OSError(
            "out of memory; run the same command again to go on, with a smaller --num_proc"
        ) from e
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def dataset_name() -> str:
    """What the dataset of a source is called: as its folder or file, or as the Hub's repository."""
    if source == "stdlib" and chat:  # beside the text of the same source
        return "stdlib_chat"
    where = path_of(source.removeprefix("hub:"))
    while glob.has_magic(where.name):
        where = where.parent
    stem = (where if source.startswith("hub:") else where.resolve()).name
    return stem.removesuffix(stem[len(stem) - len(kind(stem) or "") :]) or "data"


@with_a_way_on()
def main() -> None:
    at_least(settings_of(globals()), num_proc=0, seed=0)
    out = dataset_folder(dataset or dataset_name())
    if verify:
        refuse("with --verify=True", *OF_FILES, *OF_HUB, *OF_MAKING)
        if dataset:
            refuse("with --verify=True beside --dataset", "source")
        return check_folder(out)
    if merge:
        refuse("with --merge=True, which reads no text", "num_proc", "skip_bad", "overwrite")
        if "/" in shards:
            raise ValueError("--merge=True takes all shares: leave --shards out")
    if val_split:
        refuse("beside --val_split", "val_fraction", "seed")
    if overwrite and "/" in shards:
        raise ValueError(
            f"--overwrite=True would delete what other shares have made; delete {out} by hand, once"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    name = tokenizer
    if name == "auto":
        name = "train:1024" if source == "stdlib" else "gpt2"
    if name in NAMES or name.startswith("train:"):
        refuse(f"with --tokenizer={name}, whose end-of-text is its own", "eot")
    work = out / "parts"
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        if "/" in shards:
            locks.enter_context(held(work / f"lock-{shards.replace('/', '-of-')}"))
            wait_for(work / "lock")  # nobody is making the whole; the other shares ask the same
        else:
            locks.enter_context(held(work / "lock"))
            for other in work.glob("lock-*"):
                locks.enter_context(held(other))
        prepare(out, name)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
