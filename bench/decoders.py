"""Ways to make greedy text: those of sample.py, transformers, other model.py files, llama.cpp."""

import copy
import dataclasses
import functools
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
from making.graphs import record_decode
from making.int8 import quantize
from making.sampling import cache_length
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
    """sample.py's ways: as it is and compiled, of `modes`.

    On a CPU each comes in int8, too; on a GPU the compiled one as a CUDA graph, too. Raises
    ValueError where nothing can be compiled.
    """
    kinds, on_gpu = [("ours", model)], model.embed_tokens.weight.is_cuda
    if not on_gpu:
        int8 = copy.deepcopy(model)
        quantize(int8)
        kinds.append(("ours, int8", int8))
    found = []
    for kind, one in kinds:
        if not on_gpu:
            for_few_rows(one)
            use_huge_pages(one)
        for compiled in modes:
            for recorded in (False, True) if compiled and on_gpu else (False,):
                net = copy.copy(one)  # with the same tensors
                with torch.inference_mode():  # as sample.py
                    problem = compile_decode(net, new_tokens) if compiled else ""
                if problem:
                    raise ValueError(f"nothing can be compiled here: {problem}")
                name = f"{kind}, {'compiled' if compiled else 'eager'}{', graph' * recorded}"
                found.append(Decoder(name, likeliest(net, recorded), linear_bytes(one)))
    return found


def likeliest(net: GPT, recorded: bool = False) -> Generate:
    """Our own loop, greedy; recorded: a CUDA graph for each size of text, made at its first.

    Raises ValueError where it cannot be recorded.
    """
    sizes = set()

    @torch.inference_mode()
    def generate(ids: Tensor, n: int) -> list[int]:
        size = cache_length(ids.size(1) + n, net.config.max_position_embeddings), len(ids)
        if recorded and n > 1 and size not in sizes:  # one token needs no step
            sizes.add(size)
            if problem := record_decode(net, *size):
                raise ValueError(f"a token's step cannot be recorded: {problem}")
        row: list[int] = net.generate(ids, n, temperature=0)[0].tolist()
        return row[ids.size(1) :]

    return generate


def transformers_decoders(model: GPT, folder: Path, dtype: torch.dtype) -> list[Decoder]:
    """Its cached generate, with the same weights in a type, on the same device.

    On a GPU also with a cache of one length, for which transformers compiles by itself.
    """
    from transformers import LlamaForCausalLM  # few have it, and it takes seconds

    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    settings = json.dumps(hf.config_json(model.config, dtype, {"eos_token_id": 0}))
    (folder / "config.json").write_text(settings, encoding="utf-8")
    hf.write_weights(folder / "model.safetensors", weights, dtype)
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    theirs: Any = LlamaForCausalLM.from_pretrained(folder, **how)
    theirs.to(model.embed_tokens.weight.device)

    def generate(ids: Tensor, n: int, **more: str) -> list[int]:
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)
        row: list[int] = made[0, ids.size(1) :].tolist()
        return row

    found = [Decoder("transformers", generate, linear_bytes(theirs))]
    if model.embed_tokens.weight.is_cuda:
        static = functools.partial(generate, cache_implementation="static")
        found.append(Decoder("transformers, static", static, linear_bytes(theirs)))
    return found


def peer_decoder(path: str, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The generate of another model.py, with random weights of its own."""
    net = build(path, config)[0].eval().to(device, dtype)

    def generate(ids: Tensor, n: int) -> list[int]:
        with torch.no_grad():
            row: list[int] = net.generate(ids, n, top_k=1)[0, ids.size(1) :].tolist()
        return row

    return Decoder(Path(path).parent.name, generate, linear_bytes(net))


def llama_cpp_decoders(model: GPT, folder: Path, dtype: str) -> list[Decoder]:
    """llama.cpp on the same weights, as they are and in 8 bits; none where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    import llama_cpp

    on_gpu = model.embed_tokens.weight.is_cuda
    if on_gpu and not llama_cpp.llama_supports_gpu_offload():
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
        generate = by_llama_cpp(path, config.max_position_embeddings, on_gpu)
        found.append(Decoder(f"llama.cpp {kind}", generate, path.stat().st_size, batches=False))
    return found


def by_llama_cpp(path: Path, context: int, on_gpu: bool) -> Generate:
    """llama.cpp's loop on a file, with as many threads as torch has, or all layers on the GPU."""
    import llama_cpp

    threads = torch.get_num_threads()
    how: dict[str, Any] = {
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": -1 if on_gpu else 0,
    }
    llama: Any = llama_cpp.Llama(str(path), n_ctx=context, verbose=False, **how)

    def generate(ids: Tensor, n: int) -> list[int]:
        llama.reset()  # else a prompt seen before costs nothing
        stream = llama.generate(ids[0].tolist(), temp=0.0)
        return [token for _, token in zip(range(n), stream, strict=False)]

    return generate
