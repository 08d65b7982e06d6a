"""Hugging Face's model folders, read and written: config.json, safetensors, tokenizer.json.

Read are Llama and Qwen3, and what differs from a Llama by its name only: Mistral and Ministral
whose window holds the context, and SmolLM3 with positions in all layers. So is Qwen2, which is a
Llama with biases of attention whose last one is zero. Written is a Llama, or a Qwen3 with qk_norm.

A folder comes from a stranger: none of its code runs, no name in it leads out of it, and sizes are
compared with the tensors that are really there before any memory is taken.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from formats import hub
from formats.hub import PREFIX
from formats.others import GPT2, TAKEN, instead
from model import GPT, GPTConfig
from text import stated
from text.chat import CHATML, END, FLAGS, START, own_template, with_chat, with_tokens
from text.files import SHORT, read_json, replacing
from text.tokenizer import Tokenizer, byte_characters, get_tokenizer, gpt2_ranks


class Family(NamedTuple):
    """What a model_type means."""

    architecture: str
    defaults: Mapping[str, Any]  # of transformers' configuration, where they are not Llama's
    biases: tuple[str, ...] = ()  # the settings for biases that it has
    without: str = ""  # the bias of attention that it lacks, which is one of zeros


WINDOW = {"num_key_value_heads": 8, "max_position_embeddings": 2**17, "sliding_window": 4096}
SMOLLM3 = {
    **{"num_key_value_heads": 4, "max_position_embeddings": 2**15, "no_rope_layers": None},
    **{"tie_word_embeddings": True, "rope_theta": 2000000.0},
}
QWEN2 = {"num_key_value_heads": 32, "max_position_embeddings": 2**15, "attention_bias": True}
BIASES = ("attention_bias", "mlp_bias")
FAMILIES = {  # by model_type; all but Qwen3 are Llamas by another name
    "llama": Family("LlamaForCausalLM", {}, BIASES),
    "qwen3": Family("Qwen3ForCausalLM", {"head_dim": 128}, ("attention_bias",)),
    "mistral": Family("MistralForCausalLM", WINDOW),
    "ministral": Family("MinistralForCausalLM", WINDOW),
    "qwen2": Family("Qwen2ForCausalLM", QWEN2, (), "self_attn.o_proj.bias"),
    "smollm3": Family("SmolLM3ForCausalLM", SMOLLM3, BIASES),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
MAX_CONTEXT = 2**20  # tokens; the tables of positions are that long,
MAX_TABLE = 2**27  # numbers in one: a million tokens with heads of 128
# A repository's files that tell whether it is taken; one of weights alone has but the last.
SMALL = (*stated.FILES, "tokenizer.json", "README.md")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def load(name: str) -> tuple[Path, dict[str, Any]]:
    """The model of a folder or Hub repository `hf:NAME`: its folder, and a checkpoint of it.

    The checkpoint has the keys `model` (float32), `model_args` and `tokenizer`, as those that
    train.py writes. Raises ValueError or OSError (one line) for a folder that is incomplete,
    damaged, or of a model that cannot be represented, listing all reasons.
    """
    name = name.removeprefix(PREFIX)
    folder = hub.find(name, SMALL)
    raw = read_json(folder / "config.json")
    config = model_config(raw, str(folder / "config.json"))
    hub.find(name, WEIGHTS)  # gigabytes, which another kind of model is not worth
    weights = read_weights(folder, config, FAMILIES[raw["model_type"]].without)
    tokenizer = read_tokenizer(folder).saved()
    return folder, {"model": weights, "model_args": asdict(config), "tokenizer": tokenizer}


# --- config.json


def model_config(raw: dict[str, Any], where: str) -> GPTConfig:
    """The sizes that a config.json gives, what it omits being transformers' defaults.

    Raises ValueError listing all that this model cannot represent.
    """
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    wanted, defaults, biases, without = family or FAMILIES["llama"]
    raw = {**defaults, **raw}
    problems = unsupported(raw)
    if family is None or (raw.get("architectures") or [wanted]) != [wanted]:
        found = f"{SHORT.repr(raw.get('architectures'))} of model_type {SHORT.repr(kind)}"
        found += f", {GPT2}" if kind == "gpt2" else ""
        problems.insert(0, f"architecture {found}, not {TAKEN}")

    def number(name: str, default: float | None = None, source: Any = raw) -> Any:
        value = source.get(name)
        value = default if value is None else value
        kinds = (int, float) if name in ("rms_norm_eps", "rope_theta") else int
        low = 1 if name == "rope_theta" else 0  # below, the angles overflow
        if isinstance(value, bool) or not isinstance(value, kinds) or not low < value < 2**40:
            problems.append(f"{name} {SHORT.repr(value)}")
            return 1
        return value

    def flag(name: str) -> bool:
        value = raw.get(name) or False if name in (*biases, "tie_word_embeddings") else False
        if not isinstance(value, bool):
            problems.append(f"{name} {SHORT.repr(value)}")
        return bool(value)

    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    rope = rope if isinstance(rope, dict) and "rope_theta" in rope else raw
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    values = {
        "vocab_size": number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("intermediate_size"),
        "num_hidden_layers": number("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", heads),
        "head_dim": number("head_dim", hidden // heads),
        "max_position_embeddings": number("max_position_embeddings", 2048),
        "rms_norm_eps": number("rms_norm_eps", 1e-6),
        "rope_theta": float(number("rope_theta", 10000.0, rope)),
        "tie_word_embeddings": flag("tie_word_embeddings"),
        "qk_norm": kind == "qwen3",
        "attention_bias": bool(without) or flag("attention_bias"),
        "mlp_bias": flag("mlp_bias"),
    }
    if values["max_position_embeddings"] > MAX_CONTEXT:
        problems.append(f"context of {values['max_position_embeddings']}, above {MAX_CONTEXT}")
    elif values["max_position_embeddings"] * values["head_dim"] > MAX_TABLE:
        problems.append(f"head_dim {values['head_dim']} with so long a context")
    if not problems:
        try:
            return GPTConfig(**values)
        except ValueError as e:
            problems.append(str(e))
    raise ValueError(
        f"{where} has what this model cannot represent: {'; '.join(problems)}; {instead(kind)}"
    )


def unsupported(raw: dict[str, Any]) -> list[str]:
    """What a config.json asks for beyond a Llama's sizes, in words."""
    problems = []
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"activation {SHORT.repr(raw['hidden_act'])}")
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            problems.append(f"{name} {SHORT.repr(rope)}")
            continue
        kind = rope.get("rope_type") or rope.get("type")
        if kind not in (None, "default"):
            problems.append(f"rope scaling {SHORT.repr(kind)}")
        elif any(isinstance(v, dict) for v in rope.values()):
            problems.append(f"{name} by kind of layer")
        elif rope.get("partial_rotary_factor", 1) != 1:
            problems.append("rope on a part of each head")
    if raw.get("partial_rotary_factor", 1) != 1:
        problems.append("rope on a part of each head")
    problems += sliding(raw)
    if "no_rope_layers" in raw:  # SmolLM3; by default every fourth layer has none
        turned = raw["no_rope_layers"]
        if not isinstance(turned, list) or not all(turned):
            problems.append("layers without rope")
    if raw.get("quantization_config"):
        problems.append("quantised weights")
    return problems


def sliding(raw: dict[str, Any]) -> list[str]:
    """What is wrong with a config.json's attention windows; one that holds the context is none."""
    layers, window = raw.get("layer_types") or [], raw.get("sliding_window")
    kinds = set(map(str, layers)) if isinstance(layers, list) else {"unknown"}
    always = raw.get("model_type") in ("mistral", "ministral") and window is not None
    if kinds - {"full_attention", "sliding_attention"}:
        return [f"attention of the kinds {SHORT.repr(layers)}"]
    used = always or raw.get("use_sliding_window") or "sliding_attention" in kinds
    context = raw.get("max_position_embeddings")
    holds = type(window) is int and type(context) is int and window >= context
    return [f"attention in a sliding window of {SHORT.repr(window)}"] if used and not holds else []


def config_json(config: GPTConfig, dtype: torch.dtype, ids: dict[str, Any]) -> dict[str, Any]:
    """config.json for a model: Llama, or Qwen3 where queries and keys are normalised.

    ids: as from token_ids. In the words of transformers 4, which 5, vLLM and llama.cpp read, too.
    Raises ValueError when neither has the model's features.
    """
    family = "qwen3" if config.qk_norm else "llama"
    if config.qk_norm and config.mlp_bias:
        raise ValueError("qk_norm and mlp_bias together are in no family of Hugging Face's models")
    sizes = asdict(config)
    del sizes["dropout"], sizes["qk_norm"]
    if config.qk_norm:
        del sizes["mlp_bias"]
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **sizes,
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# --- safetensors


def read_weights(folder: Path, config: GPTConfig, without: str = "") -> dict[str, Tensor]:
    """The model's tensors under our names, in float32; zeros for a Family's bias `without`.

    Raises ValueError naming what is missing, left over, of another shape or type, or not finite.
    """
    paths = weight_files(folder)
    wanted = check_headers(paths, folder, config, without)
    weights = {}
    for path in paths:
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if our_key(key) in wanted:
                    weights[our_key(key)] = file.get_tensor(key).float()
    bad = [k for k, v in weights.items() if not bool(v.isfinite().all())]
    if bad:
        raise ValueError(f"weights in {folder}: {bad[0]} is NaN or infinite")
    absent = [k for k in wanted if without and k.endswith(without)]
    return weights | {k: torch.zeros(config.hidden_size) for k in absent}


def check_headers(paths: list[Path], folder: Path, config: GPTConfig, without: str) -> set[str]:
    """The names of the model's tensors, once the files' headers have shown them all to be there.

    All but those that end in `without`, if that is not empty, which must not be there.
    Raises ValueError naming what is missing, left over, or of another shape or type.
    """
    shapes: dict[str, list[int]] = {}
    problems = []
    for path in paths:
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if our_key(key) in shapes:
                    problems.append(f"{SHORT.repr(key)} twice")
                if part.get_dtype() not in DTYPES:
                    problems.append(f"{SHORT.repr(key)} in {part.get_dtype()}")
                shapes[our_key(key)] = part.get_shape()
    # a layer has nine tensors or more: sizes made up in config.json end here, before they cost
    if len(shapes) < 9 * config.num_hidden_layers:
        raise ValueError(f"{folder} has {len(shapes)} tensors, too few for its config.json")
    try:
        with torch.device("meta"):
            wanted = {k: list(v.shape) for k, v in GPT(config).state_dict().items()}
    except (RuntimeError, OverflowError) as e:
        raise ValueError(f"{folder} has sizes in config.json that no memory holds") from e
    optional = {k for k in shapes if k.endswith("rotary_emb.inv_freq")}  # of old exports
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    lacked = {k for k in wanted if without and k.endswith(without)}
    problems += [f"no {k}" for k in wanted if k not in shapes and k not in optional | lacked]
    known = (wanted.keys() - lacked) | optional
    problems += [f"{SHORT.repr(k)}, unknown" for k in shapes if k not in known]
    for key in wanted:
        if key in shapes and shapes[key] != wanted[key]:
            problems.append(f"{key} of {shapes[key]}, not {wanted[key]}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"weights in {folder}: {', '.join(problems[:4])}{more}")
    return set(wanted)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names. Raises ValueError or OSError."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.is_file():
        return [path]
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; weights in pickles (pytorch_model.bin) are not "
            "read: save them anew with save_pretrained of transformers"
        )
    table = read_json(index).get("weight_map")
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    bad = [n for n in names if not re.fullmatch(r"[\w-][\w.-]{,99}\.safetensors", n)]
    if bad or not names:
        raise ValueError(f"{index} names {SHORT.repr(bad[0]) if bad else 'no files'}: not read")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its index names")
    return [folder / name for name in names]


def open_weights(path: Path) -> Any:
    """A safetensors file, its header checked against its size. Raises ValueError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({e})") from e


def our_key(key: str) -> str:
    return key.removeprefix("model.")


def write_weights(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """model.safetensors of our weights under Llama's names.

    The same weights give the same bytes. Raises ValueError when one does not fit in `dtype`.
    """
    tensors = {}
    for key, value in weights.items():
        name = key if key.startswith("lm_head") else f"model.{key}"
        tensors[name] = value.to(dtype).contiguous()
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{key} does not fit in {dtype}; write --dtype=bfloat16")
    try:
        with replacing(path) as temp:
            mode = temp.stat().st_mode  # the user's umask; safetensors 0.8 leaves files at 0600
            save_file(tensors, temp, metadata={"format": "pt"})
            os.chmod(temp, mode)
    except (SafetensorError, OSError) as e:
        raise OSError(f"could not write {path}: {e}") from e


# --- tokenizer.json


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; ours by name where it is GPT-2's or bytes, so that ids agree."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    spec = read_json(path)  # not too large, and an object
    tok = without_chat(get_tokenizer(path.name, folder, own=True))
    return tok if adds_tokens(spec) else known(tok)


def without_chat(tok: Tokenizer) -> Tokenizer:
    """A tokenizer whose last two tokens are those that teaching it ChatML here has added.

    They become its `chat` again, so that it is the one that it was before; others stay.
    """
    if own_template(tok) != CHATML or tok.json_text is None:
        return tok
    spec = json.loads(tok.json_text)
    added, last = {START: tok.vocab_size - 2, END: tok.vocab_size - 1}, (START, END)
    theirs = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
    words = spec["model"].get("vocab")
    if {k: theirs.get(k) for k in last} != added or any(k in words for k in last):
        return tok
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in last]
    size, text = tok.vocab_size - 2, json.dumps(spec, ensure_ascii=False)
    return with_chat(
        replace(tok, json_text=text, vocab_size=size, ends=tok.ends - {size, size + 1})
    )


def known(tok: Tokenizer) -> Tokenizer:
    """Our GPT-2 or bytes for a tokenizer.json that gives the same ids and ends documents alike.

    What else a model's files state is kept; other tokenizers are returned as they are.
    """
    name = {257: "bytes", 50257: "gpt2"}.get(tok.words)
    if name is None or tok.json_text is None or tok.eot != tok.words - 1:
        return tok
    try:
        ours = get_tokenizer(name)
    except OSError:  # GPT-2's vocabulary is not at hand: the file's serves
        return tok
    same = byte_level_bpe(json.loads(tokenizer_json(ours))) == byte_level_bpe(
        json.loads(tok.json_text)
    )
    kinds = ("vocab_size", "ends", "begin", "bos", "pad", "stated", "guessed", "chat")
    kept = {k: getattr(tok, k) for k in kinds}
    return replace(ours, **kept) if same else tok


def adds_tokens(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts tokens of its own before or behind a text."""
    steps = json.dumps(spec.get("post_processor"))
    return any(f'"{kind}Processing"' in steps for kind in ("Template", "Bert", "Roberta"))


def ids_alone(json_text: str) -> dict[str, Any]:
    """Of a tokenizer.json what decides a text's ids, here where nothing is added or cut off."""
    without = ("version", "post_processor", "truncation", "padding")
    return {k: v for k, v in json.loads(json_text).items() if k not in without}


class ByteLevelBPE(NamedTuple):
    """What decides the ids that a tokenizer of GPT-2's kind gives."""

    vocab: dict[str, int]  # in GPT-2's stand-in characters, see tokenizer.byte_characters
    merges: list[list[str]]
    special: list[int]  # ids that no text has
    added: list[int]  # ids whose text is taken out of a text before it is split


def byte_level_bpe(spec: dict[str, Any]) -> ByteLevelBPE | None:
    """The contents of a tokenizer.json of GPT-2's kind and pattern, None for another."""
    model, pre = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if (
        model.get("type", "BPE") != "BPE"  # GPT-2's own file does not say
        or "merges" not in model
        or pre.get("type") != "ByteLevel"
        or pre.get("add_prefix_space", True)
        or not pre.get("use_regex", True)
        or spec.get("normalizer")
        or any(model.get(k) for k in odd)
        or not byte_characters().keys() <= model["vocab"].keys()  # else some text is unknown
    ):
        return None
    added = {t["content"]: (t["id"], t["special"]) for t in spec.get("added_tokens") or []}
    vocab = {**model["vocab"], **{text: i for text, (i, _) in added.items()}}
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    special = sorted(i for i, is_special in added.values() if is_special)
    plain = sorted(i for i, is_special in added.values() if not is_special)
    return ByteLevelBPE(vocab, merges, special, plain)


def tokenizer_json(tok: Tokenizer) -> str:
    """A tokenizer.json that gives a tokenizer's ids: its own, or one made for GPT-2 and bytes.

    With the tokens of conversations, if those are not its own. Raises ValueError as with_tokens.
    """
    text = made_json(tok.name, tok.eot) if tok.json_text is None else tok.json_text
    return with_tokens(text, tok.chat.added) if tok.chat and tok.chat.added else text


@functools.cache
def made_json(name: str, end: int) -> str:
    """A tokenizer.json for "gpt2" or "bytes", whose end-of-text has the id `end`."""
    ranks = gpt2_ranks() if name == "gpt2" else {bytes([i]): i for i in range(256)}
    eot = "<|endoftext|>"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = True  # GPT-2's pieces; for bytes they change nothing
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": end, "content": eot, **FLAGS}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**{visible(k): v for k, v in ranks.items()}, eot: end},
            "merges": [[visible(part) for part in pair] for pair in merges_of(ranks)],
        },
    }
    return json.dumps(spec, ensure_ascii=False)


def visible(token: bytes) -> str:
    """A token in GPT-2's stand-in characters."""
    return token.decode("latin-1").translate(VISIBLE)


VISIBLE = {ord(byte): stand_in for stand_in, byte in byte_characters().items()}


def merges_of(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The pair that makes each token of several bytes, in the order of rank.

    It is what the merges of lower rank leave of the token's bytes.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[i] < rank, "a vocabulary that merges could not have made"
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


# --- what stands beside the weights, for other tools
#
# trained: the model was trained here. Else it was imported, and keeps what it came with.


def token_ids(tok: Tokenizer, trained: bool) -> dict[str, Any]:
    """What is in config.json: after training here a document begins where another one ended.

    A pad token is there if one was, since transformers gives its embedding no gradient.
    """
    ids = range(tok.vocab_size)
    pad = stated.ids((tok.stated.get("model") or {}).get("pad_token_id"), ids)
    ends = sorted(tok.ends, key=lambda i: (i != tok.eot, i))
    return {
        "bos_token_id": tok.eot if tok.bos is None and trained else tok.bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        **({"pad_token_id": pad[0]} if pad else {}),
    }


def generation_config(tok: Tokenizer, trained: bool) -> dict[str, Any]:
    """generation_config.json: what stops transformers' generate."""
    if not trained and tok.stated.get("generation"):
        return dict(tok.stated["generation"])
    pad = tok.eot if tok.pad is None else tok.pad
    return token_ids(tok, trained) | {"pad_token_id": pad}


def trained_json(text: str) -> str:
    """A tokenizer.json that adds, cuts off and pads nothing, as in training here."""
    spec = json.loads(text)
    if not (adds_tokens(spec) or spec.get("truncation") or spec.get("padding")):
        return text
    kept = None if adds_tokens(spec) else spec.get("post_processor")
    plain = {"truncation": None, "padding": None, "post_processor": kept}
    return json.dumps(spec | plain, ensure_ascii=False)


def tokenizer_config(
    tok: Tokenizer, spec: dict[str, Any], context: int, trained: bool = True
) -> dict[str, Any]:
    """tokenizer_config.json: nothing is added to a text, and special tokens in it are text.

    spec: the tokenizer.json. Without split_special_tokens transformers would take "<|endoftext|>"
    in a text for the token. A chat template writes such marks as text, though, so with one they are
    tokens. Without add_bos_token llama.cpp's converter would have some kinds begin a text with one.
    """
    theirs = dict(tok.stated.get("tokenizer") or {})
    if theirs and not trained:
        theirs.pop("auto_map", None)  # names Python files, which are not here
        return theirs
    vocab = spec["model"]["vocab"]  # text -> id, or Unigram's list of [text, score]
    texts = dict(enumerate(t for t, _ in vocab)) if isinstance(vocab, list) else {}
    texts |= {i: text for text, i in vocab.items()} if isinstance(vocab, dict) else {}
    texts |= {t["id"]: t["content"] for t in spec.get("added_tokens") or []}
    template = tok.chat.template if tok.chat else theirs.get("chat_template")
    begins = tok.eot if tok.bos is None and trained else tok.bos
    bos, eos = "" if begins is None else texts.get(begins, ""), texts[tok.eot]
    if tok.chat:  # as its template has had them
        bos, eos = tok.chat.bos, tok.chat.eos or eos
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": bos} if bos else {}),
        "eos_token": eos,
        **({"pad_token": texts[tok.pad]} if tok.pad in texts else {}),
        **({"add_bos_token": False, "add_eos_token": False} if trained else {}),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not template,
        **({"chat_template": template} if template else {}),
    }
