"""A trained model and its tokenizer, from a run, a .pt file or Hugging Face's folders."""

from pathlib import Path
from typing import Any, NamedTuple

from formats import checkpoint, hf, listing, rebuild
from model import GPT
from text.files import path_of
from text.tokenizer import Tokenizer, get_tokenizer


class Pretrained(NamedTuple):
    """What a script needs of a model that has been trained."""

    path: Path  # the file or folder that it came from
    model: GPT  # on the CPU, in evaluation mode
    tok: Tokenizer
    state: dict[str, Any]  # the rest of the checkpoint
    problems: list[str]  # what was wrong with newer checkpoints


def read(
    init_from: str, out_dir: str, whole: bool = True
) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that the settings name: its path, contents, and what was wrong with newer.

    init_from is "resume" for the newest good checkpoint of out_dir, the path of a .pt file or a
    .shards folder, or Hugging Face's: hf:FOLDER, hf:USER/NAME or the path of a folder's
    model.safetensors. whole=False leaves shards where they are, as checkpoint.load has it.
    Raises ValueError or OSError (one line) when there is none or it is damaged.
    """
    if init_from == "resume":
        return checkpoint.load_newest(path_of(out_dir), whole)
    path = path_of(init_from)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        init_from = f"{hf.PREFIX}{path.parent}"
    if init_from.startswith(hf.PREFIX):
        return *hf.load(init_from), []
    if path.is_dir() and path.suffix != listing.PARTS:
        raise ValueError(f"{path} is a folder; write hf:{path} if it is a model of Hugging Face's")
    return path, checkpoint.load(path, whole), []


def load(init_from: str, out_dir: str) -> Pretrained:
    """The model and tokenizer that the settings name, as `read` takes them.

    Raises ValueError or OSError, too, when the tokenizer has ids that the model lacks.
    """
    path, state, problems = read(init_from, out_dir)
    state.pop("optimizer", None)  # two thirds of the memory
    model = rebuild.load_model(path, state)
    saved = state.get("tokenizer") or {"name": "gpt2", "json": None}  # nanoGPT's files have none
    tok = get_tokenizer(saved["name"], json_text=saved["json"])
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.config.vocab_size}, but its tokenizer {tok.name!r} "
            f"has {tok.vocab_size} ids: it was trained with another one"
        )
    rest = {k: v for k, v in state.items() if k != "model"}
    return Pretrained(path, model, tok, rest, problems)


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers are one, be it once by name and once as a tokenizer.json."""
    a, b = hf.known(a), hf.known(b)
    return (a.name, a.json_text) == (b.name, b.json_text)
