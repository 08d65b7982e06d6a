"""Hand a trained model to other tools: python export.py --out_dir=out --to=hf

hf       a folder for transformers, vLLM and what else reads the Hub's models
gguf     one file for llama.cpp, Ollama and LM Studio
easygpt  a .pt under the key names of EasyGPT's published files
"""

from run import interrupt

if __name__ == "__main__":  # the other imports take seconds
    interrupt.take(interrupt.end)

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configurator import configure, refuse
from formats import checkpoint, easygpt, gguf, hf, hub, listing, pretrained
from model import GPT, GPTConfig
from run import script
from run.records import read_records
from run.settings import check_model
from text.chat import own_template
from text.files import path_of, write
from text.tokenizer import Tokenizer
from text.tokens import are_facts

# what
out_dir = "out"  # folder of a training run; its newest good checkpoint is exported
init_from = "resume"  # resume, PATH (.pt, .shards), hf:FOLDER or hf:USER/NAME
# as what
to = "hf"  # hf, gguf, easygpt
dtype = "float32"  # float32, bfloat16, float16; for gguf also q8_0
output = ""  # folder or file to write; empty = hf, model-<dtype>.gguf or easygpt.pt in out_dir
license = "unknown"  # of the weights, as the Hub calls it: mit, apache-2.0, cc-by-4.0, ...
push = ""  # USER/NAME on the Hub to upload to; a new repository there is private

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The run's settings that a model card shows; paths and names on this machine are not among them.
CARD_SETTINGS = (
    *("tokens_per_step", "max_iters", "learning_rate", "min_lr", "warmup_iters", "weight_decay"),
    *("beta1", "beta2", "grad_clip", "dropout", "seed"),
)


def published(model: GPT, tok: Tokenizer) -> tuple[dict[str, Tensor], GPTConfig]:
    """A model's weights, a tied head left out, with as many rows as the tokenizer has ids.

    The rows beyond only pad the vocabulary to a multiple of 64. Other tools would sample them, and
    cannot decode what they drew, so they do not get them.
    """
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for key in weights.keys() & {"embed_tokens.weight", "lm_head.weight"}:
        # a copy: torch.save writes all that a view looks into
        weights[key] = weights[key][: tok.vocab_size].clone()
    return weights, replace(model.config, vocab_size=tok.vocab_size)


def to_hf(
    folder: Path,
    weights: dict[str, Tensor],
    config: GPTConfig,
    tok: Tokenizer,
    card: str,
    trained: bool,
) -> list[str]:
    """Write the folder; the names of its files. A folder that holds other things is refused.

    trained: by us; else the model was imported, and its tokenizer keeps its own behaviour.
    """
    text = hf.tokenizer_json(tok)
    text = hf.trained_json(text) if trained else text
    spec, context = json.loads(text), config.max_position_embeddings
    contents = {
        "config.json": hf.config_json(config, DTYPES[dtype], hf.token_ids(tok, trained)),
        "generation_config.json": hf.generation_config(tok, trained),
        "tokenizer_config.json": hf.tokenizer_config(tok, spec, context, trained),
    }
    model = {"config.json", "model.safetensors", "tokenizer.json"}
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    interrupted = {name.removesuffix(".tmp") for name in names} <= {*model, *contents}
    if not interrupted and not model <= names:
        raise ValueError(f"{folder} holds other files; choose another --output, new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    hf.write_weights(folder / "model.safetensors", weights, DTYPES[dtype])
    for name, value in contents.items():
        write(folder / name, json.dumps(value, indent=2) + "\n")
    write(folder / "tokenizer.json", text)
    write(folder / "README.md", card)
    return ["model.safetensors", "tokenizer.json", "README.md", *contents]


def to_gguf(
    file: Path, weights: dict[str, Tensor], config: GPTConfig, tok: Tokenizer, name: str
) -> None:
    """Write the file. Raises ValueError for a tokenizer that llama.cpp would not recognise."""
    tokens = hf.byte_level_bpe(json.loads(hf.tokenizer_json(tok)))
    if tokens is None:
        raise ValueError(
            "its tokenizer.json is not a byte-level BPE with GPT-2's pattern, the one that is "
            "written to GGUF here; export it with --to=hf and run llama.cpp's convert_hf_to_gguf.py"
        )
    gguf.write(file, weights, config, tokens, tok, dtype, name, license)


def target_path(run: Path) -> Path:
    """The folder or file to write: `output`, or in the run's folder.

    A file goes into an `output` that is a folder or ends like one. Raises ValueError for a file
    that stands where a folder is to be.
    """
    names = {"hf": "hf", "gguf": f"model-{gguf.FILE_TYPES[dtype][1]}.gguf", "easygpt": "easygpt.pt"}
    target = path_of(output) if output else run / names[to]
    is_folder = target.is_dir() or output.endswith(("/", os.sep))
    if to != "hf" and output and is_folder:
        target = target / names[to]
    folders = [target, *target.parents] if to == "hf" else [*target.parents]
    if blocked := next((p for p in folders if p.exists() and not p.is_dir()), None):
        raise ValueError(
            f"{blocked} is a file, and a folder is to be there; choose another --output"
        )
    if to != "hf" and target.is_dir():
        raise ValueError(
            f"{target} is a folder, and a file is to be there; choose another --output"
        )
    return target


def model_card(
    name: str, state: dict[str, Any], config: GPTConfig, parameters: int, tok: Tokenizer, run: Path
) -> str:
    """README.md of the folder: what the model is, what it was trained on and how, and its curve.

    run is the folder of the training run, whose metrics.jsonl and loss.png are used if present.
    """
    settings = state["config"] if isinstance(state.get("config"), dict) else {}
    splits = state["data"] if isinstance(state.get("data"), dict) else {}
    lines = ["---", f"license: {json.dumps(license)}", "library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags: [easygpt]", "---", "", f"# {name}", ""]
    does = "continues text; it was not taught to follow instructions or to be safe"
    chats = tok.chat is not None or bool(own_template(tok))
    does = "answers in conversations; it was not taught to be safe" if chats else does
    lines += [f"A language model of {parameters:,} parameters. It {does}."]
    lines += [f"Number type of the weights: {dtype}.", ""]
    lines += table("model", {k: v for k, v in asdict(config).items() if k != "dropout"})
    lines += table("tokenizer", {"kind": tok.name, "ids": tok.vocab_size, "end of text": tok.eot})
    if "dataset" in settings:
        data = {"dataset": Path(str(settings["dataset"])).name}
        for split, found in splits.items():
            if not isinstance(found, dict) or not are_facts(found):
                continue
            data[split] = ", ".join(
                f"{found[k]:,} {k}" for k in ("tokens", "documents", "bytes") if found.get(k)
            )
        lines += table("data", data)
        lines += table("training", {k: settings[k] for k in CARD_SETTINGS if k in settings})
    losses = [r for r in read_losses(run) if r["iter"] <= state.get("iter_num", -1)]
    if losses:
        every = max(1, len(losses) // 10)
        shown = [*losses[:-1:every], losses[-1]]
        lines += ["| updates | tokens | validation loss, nats per token |", "|---|---|---|"]
        lines += [f"| {r['iter']:,} | {r['tokens']:,} | {r['val_loss']:.4f} |" for r in shown]
        lines += [
            "",
            *(["![Loss of the run](loss.png)", ""] if (run / "loss.png").exists() else []),
        ]
    lines += ["```python", "from transformers import pipeline", ""]
    lines += [f'write = pipeline("text-generation", model="{push or "PATH OF THIS FOLDER"}")']
    prompt = '"Once upon a time"'
    prompt = '[{"role": "user", "content": "What is 2 + 2?"}]' if chats else prompt
    lines += [f'print(write({prompt}, max_new_tokens=100)[0]["generated_text"])', "```", ""]
    if pretrained.trained(state) and not chats:
        lines += [
            "In training documents were separated by end-of-text, so a new one starts from it."
        ]
    if not tok.stated.get("tokenizer") and not chats:
        lines += [
            "`<|endoftext|>` and its like in a text are read as text (`split_special_tokens`)."
        ]
    lines += [""]
    return "\n".join(lines)


def table(title: str, rows: dict[str, Any]) -> list[str]:
    """Markdown lines of a table of two columns."""
    return [f"| {title} | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""]


def read_losses(run: Path) -> list[dict[str, Any]]:
    """The records with a validation loss in a run's metrics.jsonl."""
    needed = ("iter", "tokens", "val_loss")
    found = read_records(run / "metrics.jsonl")
    return [r for r in found if None not in map(r.get, needed)]


def upload(target: Path, names: list[str]) -> str:
    """Upload a folder's files `names`, or one file, to the repository `push`; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(push, private=True, exist_ok=True)
        if target.is_dir():
            api.upload_folder(repo_id=push, folder_path=target, allow_patterns=names)
        else:
            api.upload_file(repo_id=push, path_or_fileobj=target, path_in_repo=target.name)
    except Exception as e:  # the Hub's and the network's errors have no common class
        reason = " ".join(str(e).split())[:200]
        raise OSError(f"{target} is written, but not uploaded: {type(e).__name__}: {reason}") from e
    return str(url)


def main() -> None:
    if to not in ("hf", "gguf", "easygpt"):
        raise ValueError(f"to must be hf, gguf or easygpt, not {to!r}")
    known = [*DTYPES, "q8_0"] if to == "gguf" else [*DTYPES]
    if dtype not in known:
        raise ValueError(f"dtype must be {', '.join(known)} for --to={to}, not {dtype!r}")
    if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ValueError(f"push must be USER/NAME, not {push!r}")
    if to == "easygpt":
        refuse("with to=easygpt, whose files name none", "license")
    check_model(init_from, out_dir)
    path, model, tok, state, lines = pretrained.load(init_from, out_dir)
    for line in lines:
        print(line, file=sys.stderr)
    ours = path.suffix in listing.KINDS and not init_from.startswith(hub.PREFIX)  # no cache's
    if init_from != "resume" and (ours or output):
        refuse(f"with init_from={init_from}", "out_dir")
    run = path.parent if ours else path_of(out_dir)
    target = target_path(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights, config = published(model, tok)
    name = push.split("/")[-1] or (path if path.is_dir() and not ours else run).resolve().name
    names: list[str] = []
    if to == "hf":
        parameters = sum(w.numel() for w in weights.values())
        card = model_card(name, state, config, parameters, tok, run)
        names = to_hf(target, weights, config, tok, card, pretrained.trained(state))
        if "![Loss" in card:
            shutil.copyfile(run / "loss.png", target / "loss.png")
            names.append("loss.png")
    elif to == "gguf":
        to_gguf(target, weights, config, tok, name)
    else:
        renamed, args = easygpt.written(weights, config, DTYPES[dtype])
        kept: dict[str, Any] = {"model": renamed, "model_args": args}
        kept |= {k: state[k] for k in ("iter_num", "best_val_loss", "tokenizer") if k in state}
        checkpoint.save(target, kept)
    print(f"{path} -> {target}: {dtype}, {config.vocab_size} {tok.name} tokens")
    if push:
        print(f"uploaded to {upload(target, names)}")


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
