"""Text from a model: python sample.py --out_dir=out --start="Once upon a time"

Text goes to stdout as it is made, everything else to stderr. --interactive asks
for prompts, --chat holds a conversation with a model that was taught to answer;
Ctrl-C then ends an answer, and at the prompt the program.
"""

from run import interrupt

if __name__ == "__main__":  # the other imports take seconds
    interrupt.take(interrupt.end)

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

# Before torch loads OpenMP, as in train.py: beside another program text then comes much faster.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from configurator import configure, refuse, settings_of
from formats import pretrained
from making.compiled import compile_decode, for_few_rows, use_huge_pages
from making.graphs import record_decode
from making.sampling import cache_length, check_sampling, stream
from model import GPT, num_parameters
from run import script
from run.compiling import why_not_compile
from run.gpu import unused_gpu
from run.machine import Machine, choose_attention, describe, find_machine
from run.settings import at_least, check_model
from run.talk import Talk
from text.chat import answering, never
from text.files import path_of, printable, read_text
from text.tokenizer import StreamDecoder, Tokenizer

# what
out_dir = "out"  # folder of a training run; its newest good checkpoint is used
init_from = "resume"  # resume, PATH (.pt, .shards), hf:FOLDER or hf:USER/NAME
start = ""  # the prompt; FILE:path reads it from a file; empty = a new document
num_samples = 3  # texts made
max_new_tokens = 300  # tokens in each
interactive = False  # ask for prompts until an empty line or Ctrl-D
chat = False  # a conversation; a question that a pipe brings is answered alone
system = ""  # of a conversation: what it begins with, such as "Answer in one word."
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


BATCH = 8  # texts that are made at once, of one prompt
SMALL = 16_000_000  # parameters up to which a CPU makes a text sooner in float32 (docs/speed.md)
THREAD_BYTES = 2**24  # of weights, for which a thread of a CPU is worth its waiting for the others
LINE = "-" * 40 + "\n"


def read_prompt(text: str, name: str = "start") -> str:
    """`text`, or the UTF-8 contents of the file that FILE:path names; name: of the setting.

    Raises OSError or ValueError with the path for a file that is not there or not UTF-8.
    """
    if not text.startswith("FILE:"):
        return text
    if text == "FILE:":
        raise ValueError(f"{name}='FILE:' names no file; write --{name}=FILE:PATH")
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


class Writer:
    """Prints rows of tokens as texts, one after the other: the first as it comes."""

    def __init__(self, tok: Tokenizer, heads: Sequence[str]) -> None:
        self.tok, self.count = tok, 0
        self.said: list[int] = []  # the tokens of the first text
        self.decoders = [StreamDecoder(tok) for _ in heads]
        self.waiting = list(heads)  # what is to be printed of each, with what stands before it
        self.going = set(range(len(heads)))
        self.at = 0  # the text that is being printed
        self.print()

    def push(self, tokens: Sequence[int]) -> None:
        """One more token of each row; a row takes no more after one that ends it."""
        for row in sorted(self.going):
            if tokens[row] in self.tok.ends:
                self.end(row)
            else:
                self.count += 1
                self.said += [tokens[row]] * (row == 0)
                self.waiting[row] += self.decoders[row].push(tokens[row])
        self.print()

    def end(self, row: int) -> None:
        self.going.remove(row)
        self.waiting[row] += self.decoders[row].flush() + "\n"

    def print(self) -> None:
        """What can be shown by now."""
        while True:
            put(self.waiting[self.at])
            self.waiting[self.at] = ""
            if self.at in self.going or self.at + 1 == len(self.waiting):
                return
            self.at += 1

    def close(self) -> None:
        """No more tokens come."""
        for row in sorted(self.going):
            self.end(row)
        self.print()


def prompts(tok: Tokenizer, model: GPT, talk: Talk | None) -> Iterator[tuple[str, list[int], int]]:
    """The prompts to answer, with their ids, and in how many texts: `start`, or what is typed."""
    if talk:
        for ids in talk.questions():
            yield "", ids, 1
        return
    if not interactive:
        text = read_prompt(start)
        for first in range(0, num_samples, BATCH):
            yield text, prompt_ids(tok, text, model), min(BATCH, num_samples - first)
        return
    if sys.stdin is None:
        raise ValueError("there is no keyboard and no pipe to read prompts from; write --start=...")
    print("a prompt and Enter; an empty line ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line, prompt_ids(tok, line, model), 1


def prepare(model: GPT, machine: Machine) -> Machine:
    """Bring the model to the device and its weights into the type that they are used in.

    Returns the machine as it is used. A CPU has float32 for a small model, unless a type is set,
    and as many threads as the weights are worth, unless OMP_NUM_THREADS is set.
    """
    on_cpu = machine.device.type == "cpu"
    if on_cpu and dtype == "auto" and not compile and num_parameters(model) <= SMALL:
        machine = replace(machine, dtype=torch.float32)
    if quantize:
        from making.int8 import quantize as to_int8

        to_int8(model)
    model.to(machine.device, machine.dtype)
    choose_attention(model, machine.dtype)
    if on_cpu:
        for_few_rows(model)
        nbytes = use_huge_pages(model)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), max(1, nbytes // THREAD_BYTES)))
    return machine


def compile_for(model: GPT, length: int, rows: int, cannot: str) -> str:
    """Compile the step that makes a token a row, for a cache of `length`; says how that went.

    On a GPU it becomes one CUDA graph, compiled or not. cannot: why it is not to be compiled; what
    is returned is why it was not, "" when it was.
    """
    print(f"compiling for a cache of {length} tokens: ", end="", file=sys.stderr, flush=True)
    t0 = time.perf_counter()
    failed = "" if cannot else compile_decode(model, length, rows)
    said = f"not compiled ({cannot})" if cannot else f"done in {time.perf_counter() - t0:.0f} s"
    said = f"failed, going on without ({failed})" if failed else said
    if model.embed_tokens.weight.is_cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        problem = record_decode(model, length, rows)
        more = f"one CUDA graph of {(torch.cuda.memory_reserved() - before) / 2**20:.0f} MiB"
        said += f", no CUDA graph ({problem})" if problem else f", {more}"
    print(said, file=sys.stderr)
    return cannot or failed


def check() -> None:
    """Raises ValueError for settings out of range, and for flags that change nothing."""
    check_model(init_from, out_dir)
    if init_from != "resume":
        refuse(f"with init_from={init_from}", "out_dir")
    if interactive:
        refuse("with interactive=True, which asks for prompts", "start", "num_samples")
    if chat:
        refuse("with chat=True, which asks", "start", "num_samples", "interactive")
    else:
        refuse("without --chat=True", "system")
    if temperature == 0:
        how = ("top_k", "top_p", "min_p", "seed")
        refuse("with temperature=0, which draws nothing", *how)
    elif top_k == 1:
        refuse("with top_k=1, which draws nothing", "temperature", "top_p", "min_p", "seed")
    at_least(settings_of(globals()), num_samples=1, max_new_tokens=1, top_k=0, seed=0)
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)


def main() -> None:
    check()
    if not interactive and not chat:
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
    talk = None
    if chat:
        context, begin = model.config.max_position_embeddings, read_prompt(system, "system")
        talk = Talk(answering(tok, path), context, max_new_tokens, begin)
    machine = prepare(model, machine)
    kind = f"{quantize + ' and ' if quantize else ''}{machine.dtype}".replace("torch.", "")
    print(f"{path}, {tok.name} tokens, {kind}, {describe(machine.device)}", file=sys.stderr)
    answer(model, talk.tok if talk else tok, machine, talk)


@torch.inference_mode()
def answer(model: GPT, tok: Tokenizer, machine: Machine, talk: Talk | None = None) -> None:
    """Print the texts of every prompt, and how fast they came."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    made, took_s = 0, 0.0
    compiled = set[tuple[int, int]]()  # lengths of the cache and rows
    on_gpu = machine.device.type == "cuda"
    cannot = why_not_compile(machine.device) if compile else ""
    if cannot and not on_gpu:
        print(f"not compiled: {cannot}", file=sys.stderr)
    greedy = temperature == 0 or top_k == 1
    context, left_out = model.config.max_position_embeddings, never(tok, chat)
    for i, (text, prompt, texts) in enumerate(prompts(tok, model, talk)):
        writer = None
        try:
            rows = 1 if greedy else texts  # of equal texts one is made
            ids = torch.tensor([prompt] * rows, device=machine.device)
            most = min(max_new_tokens, context - len(prompt)) if talk else max_new_tokens
            length = cache_length(ids.size(1) + most, context)
            if compile and (on_gpu or not cannot) and (length, rows) not in compiled:
                cannot = compile_for(model, length, rows, cannot)
                compiled.add((length, rows))
            apart = i > 0 and not interactive and not talk
            heads = [LINE * (apart or row > 0) + text for row in range(texts)]
            t0 = time.perf_counter()
            tokens = stream(
                model,
                ids,
                most,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                vocab_size=tok.vocab_size,
                never=left_out,
                generator=generator,
            )
            with contextlib.closing(Writer(tok, heads)) as writer:
                for token in tokens:
                    writer.push(token.expand(texts).tolist())  # waits for the device
                    if not writer.going:
                        break
            made += writer.count * rows // texts
            took_s += time.perf_counter() - t0
        except KeyboardInterrupt:  # which ends an answer alone
            if not interactive and not (talk and sys.stdin and sys.stdin.isatty()):
                raise
        finally:
            if talk:
                talk.heard(tok.decode(writer.said) if writer else "")
    print(f"{made} tokens, {made / max(took_s, 1e-9):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
