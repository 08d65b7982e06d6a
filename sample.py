"""Text from a model: python sample.py --out_dir=out --start="Once upon a time"

Text goes to stdout as it is made, everything else to stderr. --interactive asks
for prompts; Ctrl-C then ends an answer, and at the prompt the program.
"""

from run import interrupt

if __name__ == "__main__":  # the other imports take seconds
    interrupt.take(interrupt.end)

import itertools
import os
import sys
import time
from collections.abc import Iterator

# Before torch loads OpenMP, as in train.py: beside another program text then comes much faster.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from configurator import configure, refuse, settings_of
from formats import pretrained
from making.compiled import compile_decode, for_few_rows, use_huge_pages
from making.sampling import cache_length, check_sampling, stream
from model import GPT
from run import script
from run.compiling import why_not_compile
from run.gpu import unused_gpu
from run.machine import Machine, choose_attention, describe, find_machine
from run.settings import at_least, check_model
from text.files import path_of, printable, read_text
from text.tokenizer import StreamDecoder, Tokenizer

# what
out_dir = "out"  # folder of a training run; its newest good checkpoint is used
init_from = "resume"  # resume, PATH (.pt, .shards), hf:FOLDER or hf:USER/NAME
start = ""  # the prompt; FILE:path reads it from a file; empty = a new document
num_samples = 3  # texts made
max_new_tokens = 300  # tokens in each
interactive = False  # ask for prompts until an empty line or Ctrl-D
# how
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model has it
top_k = 200  # draw among the k likeliest; 0 = off
top_p = 1.0  # draw among the likeliest that make up this share; 1 = off
min_p = 0.0  # draw among those at least this share as likely as the likeliest; 0 = off
repetition_penalty = 1.0  # above 1: tokens already in the text become less likely
seed = 1337  # of the draws
# machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16: of the weights and of the computation
quantize = ""  # int8: weights in 8 bits, on a CPU; the rest is in dtype; empty = off
compile = False  # compile a token's step; 303M: a minute for each length of cache, later seconds


def read_prompt(text: str) -> str:
    """`text`, or the UTF-8 contents of the file that FILE:path names.

    Raises OSError or ValueError with the path for a file that is not there or not UTF-8.
    """
    if not text.startswith("FILE:"):
        return text
    if text == "FILE:":
        raise ValueError("start='FILE:' names no file; write --start=FILE:PATH")
    return read_text(path_of(text[len("FILE:") :]))


def put(text: str) -> None:
    """Print text: to a file or a pipe as it is, to a terminal so that it survives."""
    shown = printable(text, keep="\n\t") if sys.stdout.isatty() else text
    print(shown, end="", flush=True)


def prompt_ids(tok: Tokenizer, text: str, model: GPT) -> list[int]:
    """The tokens of a prompt; a new document for an empty one. Too long: the end that fits."""
    ids = tok.prompt(text)
    context = model.config.max_position_embeddings
    if len(ids) > context:
        print(f"prompt of {len(ids)} tokens: only the last {context} are read", file=sys.stderr)
        ids = ids[-context:]
    return ids


def write(pieces: Iterator[torch.Tensor], tok: Tokenizer) -> int:
    """Print a row of tokens as text as they come, up to one that ends it; how many there were."""
    decoder = StreamDecoder(tok)
    count = 0
    try:
        for token in pieces:
            number = int(token)  # waits for the device
            if number in tok.ends:
                break
            count += 1
            put(decoder.push(number))
    finally:
        put(decoder.flush() + "\n")
    return count


def prompts() -> Iterator[str]:
    """The prompts to answer: `start` num_samples times, or what is typed."""
    if not interactive:
        yield from itertools.repeat(read_prompt(start), num_samples)
        return
    print("a prompt and Enter; an empty line ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def prepare(model: GPT, machine: Machine) -> None:
    """Bring the model to the device and its weights into the type that they are used in."""
    if quantize:
        from making.int8 import quantize as to_int8

        to_int8(model)
    model.to(machine.device, machine.dtype)
    choose_attention(model, machine.dtype)
    if machine.device.type == "cpu":
        for_few_rows(model)
        use_huge_pages(model)


def compile_for(model: GPT, length: int) -> bool:
    """Compile the step that makes a token, for a cache of `length`; says how that went."""
    print(f"compiling for a cache of {length} tokens: ", end="", file=sys.stderr, flush=True)
    t0 = time.perf_counter()
    problem = compile_decode(model, length)
    took = f"done in {time.perf_counter() - t0:.0f} s"
    print(f"failed, going on without ({problem})" if problem else took, file=sys.stderr)
    return not problem


def check() -> None:
    """Raises ValueError for settings out of range, and for flags that change nothing."""
    check_model(init_from, out_dir)
    if init_from != "resume":
        refuse(f"with init_from={init_from}", "out_dir")
    if interactive:
        refuse("with interactive=True, which asks for prompts", "start", "num_samples")
    if temperature == 0:
        how = ("top_k", "top_p", "min_p", "seed")
        refuse("with temperature=0, which draws nothing", *how)
    elif top_k == 1:
        refuse("with top_k=1, which draws nothing", "temperature", "top_p", "min_p", "seed")
    at_least(settings_of(globals()), num_samples=1, max_new_tokens=1, top_k=0, seed=0)
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)


def main() -> None:
    check()
    if not interactive:
        read_prompt(start)
    machine = find_machine(device, dtype)
    on = machine.device.type
    if quantize not in ("", "int8") or (quantize and on != "cpu"):
        raise ValueError(f"quantize must be int8, on a CPU, or empty, not {quantize!r} on {on}")
    if why := unused_gpu(device, machine.device):
        print(f"WARNING  on the {on}: {why}", file=sys.stderr)
    path, model, tok, _, lines = pretrained.load(init_from, out_dir)
    for line in lines:
        print(line, file=sys.stderr)
    prepare(model, machine)
    kind = f"{quantize + ' and ' if quantize else ''}{machine.dtype}".replace("torch.", "")
    print(f"{path}, {tok.name} tokens, {kind}, {describe(machine.device)}", file=sys.stderr)

    generator = torch.Generator(machine.device).manual_seed(seed)
    made, took_s = 0, 0.0
    compiles, compiled = compile, set[int]()  # lengths of the cache
    if compile and (problem := why_not_compile(machine.device)):
        compiles = False
        print(f"not compiled: {problem}", file=sys.stderr)
    for i, text in enumerate(prompts()):
        try:
            if i and not interactive:
                print("-" * 40)
            ids = torch.tensor([prompt_ids(tok, text, model)], device=machine.device)
            length = cache_length(
                ids.size(1) + max_new_tokens, model.config.max_position_embeddings
            )
            if compiles and length not in compiled:
                compiles = compile_for(model, length)
                compiled.add(length)
            put(text)
            t0 = time.perf_counter()
            tokens = stream(
                model,
                ids,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                vocab_size=tok.vocab_size,
                generator=generator,
            )
            made += write(tokens, tok)
            took_s += time.perf_counter() - t0
        except KeyboardInterrupt:  # which ends an answer alone
            if not interactive:
                raise
    print(f"{made} tokens, {made / max(took_s, 1e-9):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
