"""Ways to make greedy text: those of sample.py, transformers, other model.py files, llama.cpp."""

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.models import build, linear_bytes
from formats import gguf, hf
from making.compiled import compile_decode, for_few_rows, use_huge_pages
from making.int8 import quantize
from model import GPT, GPTConfig
from text.tokenizer import get_tokenizer

Generate = Callable[[Tensor, int], Sequence[int]]  # prompts (B, T), new tokens -> first row's


@dataclass
class Decoder:
    """A way to make text."""

    name: str
    generate: Generate
    weight_bytes: int  # read to make a token of every prompt
    batches: bool = True  # takes several prompts at once


def our_decoders(model: GPT, modes: Sequence[bool], new_tokens: int) -> list[Decoder]:
    """sample.py's ways: as it is and compiled, of `modes`; each in int8, too.

    Raises ValueError where nothing can be compiled.
    """
    int8 = copy.deepcopy(model)
    quantize(int8)
    found = []
    for kind, one in (("ours", model), ("ours, int8", int8)):
        for_few_rows(one)
        use_huge_pages(one)
        for compiled in modes:
            net = copy.copy(one)  # with the same tensors
            if compiled and (problem := compile_decode(net, new_tokens)):
                raise ValueError(f"nothing can be compiled here: {problem}")
            name = f"{kind}, {'compiled' if compiled else 'eager'}"
            found.append(Decoder(name, likeliest(net), linear_bytes(one)))
    return found


def likeliest(net: GPT) -> Generate:
    """Our own loop, greedy."""

    def generate(ids: Tensor, n: int) -> list[int]:
        row: list[int] = net.generate(ids, n, temperature=0)[0].tolist()
        return row[ids.size(1) :]

    return generate


def transformers_decoder(model: GPT, folder: Path, dtype: torch.dtype) -> Decoder:
    """Its cached generate, with the same weights in a type, on the same device."""
    from transformers import LlamaForCausalLM  # few have it, and it takes seconds

    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    settings = json.dumps(hf.config_json(model.config, dtype, {"eos_token_id": 0}))
    (folder / "config.json").write_text(settings, encoding="utf-8")
    hf.write_weights(folder / "model.safetensors", weights, dtype)
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    theirs: Any = LlamaForCausalLM.from_pretrained(folder, **how)
    theirs.to(model.embed_tokens.weight.device)

    def generate(ids: Tensor, n: int) -> list[int]:
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        row: list[int] = made[0, ids.size(1) :].tolist()
        return row

    return Decoder("transformers", generate, linear_bytes(theirs))


def peer_decoder(path: str, config: GPTConfig, dtype: torch.dtype) -> Decoder:
    """The generate of another model.py, with random weights of its own."""
    net = build(path, config)[0].eval().to(dtype)

    def generate(ids: Tensor, n: int) -> list[int]:
        with torch.no_grad():
            row: list[int] = net.generate(ids, n, top_k=1)[0, ids.size(1) :].tolist()
        return row

    return Decoder(Path(path).parent.name, generate, linear_bytes(net))


def llama_cpp_decoders(model: GPT, folder: Path, dtype: str) -> list[Decoder]:
    """llama.cpp on the same weights, as they are and in 8 bits; none where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    tok = get_tokenizer("gpt2")
    tokens = hf.byte_level_bpe(json.loads(hf.tokenizer_json(tok)))
    assert tokens is not None
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][: tok.vocab_size]
    config = dataclasses.replace(model.config, vocab_size=tok.vocab_size)
    found = []
    for kind in (dtype, "q8_0"):
        path = folder / f"{kind}.gguf"
        gguf.write(path, weights, config, tokens, tok, kind, "random", "mit")
        generate = by_llama_cpp(path, config.max_position_embeddings)
        found.append(Decoder(f"llama.cpp {kind}", generate, path.stat().st_size, batches=False))
    return found


def by_llama_cpp(path: Path, context: int) -> Generate:
    """llama.cpp's loop on a file, with as many threads as torch has."""
    import llama_cpp

    threads = torch.get_num_threads()
    llama: Any = llama_cpp.Llama(
        str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def generate(ids: Tensor, n: int) -> list[int]:
        llama.reset()  # else a prompt seen before costs nothing
        stream = llama.generate(ids[0].tolist(), temp=0.0)
        return [token for _, token in zip(range(n), stream, strict=False)]

    return generate
