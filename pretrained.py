"""A trained model and its tokenizer, from a run, a .pt file or Hugging Face's folders."""

from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import hf
from model import GPT
from tokenizer import Tokenizer, get_tokenizer


class Pretrained(NamedTuple):
    """What a script needs of a model that has been trained."""

    path: Path  # the file or folder that it came from
    model: GPT  # on the CPU, in evaluation mode
    tok: Tokenizer
    state: dict[str, Any]  # the rest of the checkpoint
    problems: list[str]  # what was wrong with newer checkpoints


def load(init_from: str, out_dir: str) -> Pretrained:
    """The model that the settings `init_from` and `out_dir` name.

    init_from is "resume" for the newest good checkpoint of out_dir, the path of a .pt file, or
    hf:FOLDER or hf:USER/NAME. Raises ValueError or OSError (one line) when there is none, it is
    damaged, or its tokenizer has ids that the model lacks.
    """
    problems: list[str] = []
    if init_from == "resume":
        path, state, problems = checkpoint.load_newest(Path(out_dir))
    elif init_from.startswith(hf.PREFIX):
        path, state = hf.load(init_from)
    else:
        path = Path(init_from)
        state = checkpoint.load(path)
    model = checkpoint.load_model(path, state)
    saved = state.get("tokenizer") or {"name": "gpt2", "json": None}  # nanoGPT's files have none
    tok = get_tokenizer(saved["name"], json_text=saved["json"])
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.config.vocab_size}, but its tokenizer {tok.name!r} "
            f"has {tok.vocab_size} ids: it was trained with another one"
        )
    rest = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
    return Pretrained(path, model, tok, rest, problems)
