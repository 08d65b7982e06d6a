"""A trained model and its tokenizer, from a run, a .pt file or Hugging Face's folders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from formats import checkpoint, hf, hub, listing, others, rebuild
from model import GPT
from text.chat import own_template
from text.files import SHORT, path_of
from text.tokenizer import Tokenizer, from_saved


class Pretrained(NamedTuple):
    """What a script needs of a model that has been trained."""

    path: Path  # the file or folder that it came from
    model: GPT  # on the CPU, in evaluation mode
    tok: Tokenizer
    state: dict[str, Any]  # the rest of the checkpoint
    lines: list[str]  # what a user should know of it


def read(
    init_from: str, out_dir: str, whole: bool = True
) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that the settings name: its path, contents, and what was wrong with newer.

    init_from is "resume" for the newest good checkpoint of out_dir, a run's folder for its, the
    path of a .pt file or a .shards folder, or Hugging Face's: hf:FOLDER, hf:USER/NAME (safetensors,
    or else one .pt file) or the path of a folder's model.safetensors. whole=False leaves shards
    where they are, as checkpoint.load has it.
    Raises ValueError or OSError (one line) when there is none or it is damaged.
    """
    if init_from == "resume":
        return checkpoint.load_newest(path_of(out_dir), whole)
    path, name = path_of(init_from), init_from.removeprefix(hub.PREFIX)
    if others.GPT2_NAMES.fullmatch(name) and not path_of(name).exists():
        raise ValueError(others.gpt2_refusal(init_from))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        init_from = f"{hub.PREFIX}{path.parent}"
    if init_from.startswith(hub.PREFIX):
        file = lone_checkpoint(init_from.removeprefix(hub.PREFIX))
        return (file, checkpoint.load(file, whole), []) if file else (*hf.load(init_from), [])
    if path.is_dir() and path.suffix != listing.PARTS:
        return read_folder(path, whole)
    if not path.exists() and path.suffix not in listing.KINDS:
        hint = f"; from the Hub: hf:{init_from}" if re.fullmatch(hub.NAME, init_from) else ""
        raise FileNotFoundError(f"there is no checkpoint {path}{hint}")
    return path, checkpoint.load(path, whole), []


def read_folder(path: Path, whole: bool) -> tuple[Path, dict[str, Any], list[str]]:
    """What `read` returns of a folder: of a run, or with one .pt file. Raises as it does."""
    if (path / "config.json").is_file() and list(path.glob("*.safetensors")):
        also = ", or the path of one of its .pt files" if any(path.glob("*.pt")) else ""
        raise ValueError(f"{path} holds a model of Hugging Face's: write hf:{path}{also}")
    if checkpoint.of_run(path):
        return checkpoint.load_newest(path, whole)
    if file := lone_checkpoint(str(path)):
        return file, checkpoint.load(file, whole), []
    raise ValueError(
        f"{path} is a folder without a checkpoint; write hf:{path} if it is a model of Hugging "
        "Face's, or the path of a .pt file"
    )


def lone_checkpoint(name: str) -> Path | None:
    """The .pt file of a folder or of the Hub's USER/NAME, if it has no safetensors.

    None where it has, or has no .pt file. Raises ValueError for several .pt files.
    """
    folder = hub.find(name, hf.SMALL)
    if any(folder.glob("*.safetensors")):  # in the cache, too: one question less
        return None
    files = hub.listing(name, folder)
    found = [file for file in files if file.endswith(".pt")]
    if not found or any(file.endswith(".safetensors") for file in files):
        return None
    if len(found) > 1:
        raise ValueError(
            f"{name} has {len(found)} .pt files ({', '.join(found[:8])}); download one, and write "
            "--init_from=PATH"
        )
    return hub.find(name, found) / found[0]


def load(init_from: str, out_dir: str) -> Pretrained:
    """The model and tokenizer that the settings name, as `read` takes them.

    Raises ValueError or OSError, too, when the tokenizer has ids that the model lacks.
    """
    path, state, problems = read(init_from, out_dir)
    state.pop("optimizer", None)  # two thirds of the memory
    model = rebuild.load_model(path, state)
    tok = tokenizer_of(state, path, own=not trained(state))
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.config.vocab_size}, but its tokenizer {tok.name!r} "
            f"has {tok.vocab_size} ids: it was trained with another one"
        )
    rest = {k: v for k, v in state.items() if k != "model"}
    lines = [f"passed over: {problem}" for problem in problems]
    if tok.guessed:
        lines.append(f"{tok.guess} (else write eos_token in its tokenizer_config.json)")
    return Pretrained(path, model, tok, rest, lines)


def tokenizer_of(saved: Mapping[str, Any], path: Path, own: bool = False) -> Tokenizer:
    """The tokenizer that a checkpoint carries or names; own: as in get_tokenizer.

    Raises ValueError naming the checkpoint, OSError when GPT-2's vocabulary is not to be had.
    """
    entry = saved.get("tokenizer")
    if entry is not None and not isinstance(entry, dict):
        raise ValueError(f"{path} names no tokenizer, but {SHORT.repr(entry)}")
    if entry and entry.get("json") is None and entry.get("name") not in ("gpt2", "bytes"):
        name = SHORT.repr(entry.get("name"))
        raise ValueError(f"{path} names the tokenizer {name}, but does not carry it")
    try:
        return from_saved(entry, own=own)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def trained(state: dict[str, Any]) -> bool:
    """Whether a checkpoint's model was trained here, or by nanoGPT's loop; else it was imported.

    Fine-tuning counts: its text had no start tokens, whatever the imported model's tokenizer adds,
    so that neither a prompt nor an export of the result gets any. What the model states of its ids
    is kept all the same.
    """
    entry = state.get("tokenizer")
    return "iter_num" in state or not (isinstance(entry, dict) and entry.get("stated"))


def mismatch(data: Tokenizer, model: Tokenizer) -> str:
    """Why a dataset is not in a model's tokens, in words that follow the model's name; "" if it is.

    They are the same be it by name or as a tokenizer.json, and whatever that adds to a text. The
    documents have to end with an id that ends the model's texts, if it states one.
    """
    a, b = hf.known(data), hf.known(model)
    texts = [tok.json_text and hf.ids_alone(tok.json_text) for tok in (a, b)]
    if a.name != b.name or texts[0] != texts[1]:
        return (
            f"has the tokenizer {model.name!r}, but the dataset is in {data.name!r} or another "
            "version of it"
        )
    if data.eot not in model.ends and not model.guessed:
        ends = " or ".join(map(model.shown, sorted(model.ends)))
        return f"ends a text with {ends}, but the dataset's documents end with {a.shown(data.eot)}"
    template = model.chat.template if model.chat else own_template(model)
    another = model.chat is not None and data.chat != model.chat
    if data.chat and template and (another or data.chat.template != template):
        return "writes conversations with another chat template than the dataset"
    return ""
