"""What a run will take, before it starts: memory by part, time, disk, and what more cards would do.

Memory is read off the graph that training runs, traced on fake tensors, which have shapes and no
contents: no GPU is needed, and nothing of the model's size is allocated. Every figure here is
computed; only time_steps measures.
"""

import contextlib
import datetime
import functools
import operator
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import runtime
from model import GPT, GPTConfig, num_parameters

PARTS = ("weights", "gradients", "optimizer", "activations", "logits and loss", "workspace")
GIB = 2**30
# Memory that is not in the graph, assumed and not measured. On a GPU: CUDA's context and kernels
# (0.3 to 0.5 GiB), buffers inside kernels, the allocator's gaps. On a CPU: Python and torch.
RESERVE = {"cuda": 1.0 * GIB, "mps": 1.0 * GIB, "cpu": 0.5 * GIB}
CARD_SIZES = (24, 16, 12, 8)  # GiB, of consumer cards
# Share of the peak that training reaches. EasyGPT's reference run is reported with 22.7k tokens/s
# on an RTX 3090, which is 0.68 of that card's peak; for others 0.5 is assumed.
REFERENCE_MFU, ASSUMED_MFU = {"RTX 3090": 0.68}, 0.5
NODE = 8  # cards in one machine
NETWORK = 12.5e9  # bytes/s between machines: 100 Gbit/s
LAYERS = (2, 3)  # depths that are traced; memory grows by the same amount with each layer
VIEWS = {"view", "permute", "slice", "expand", "unsqueeze", "squeeze", "t", "transpose", "select"}
VIEWS |= {"alias", "split", "split_with_sizes", "as_strided", "detach"}
# Operators that the compiler calls as they are: what they read and write exists in memory.
KERNELS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "index_put", "scatter")
KERNELS += ("embedding_dense_backward", "_unsafe_masked_index_put", "_linear_cross_entropy")
KERNELS += ("linear_cross_entropy", "run_and_save_rng_state", "run_with_rng_state")


@dataclass(frozen=True)
class Card:
    """A GPU that can be planned for without being there."""

    name: str  # as in runtime.PEAK_TFLOPS, and a memory size where there are several
    memory: int  # GiB
    link: float = (
        12e9  # bytes/s to the next card of the machine; PCIe 4.0 x16 gives about half of 25
    )
    half: torch.dtype = torch.bfloat16

    @property
    def flops_per_s(self) -> float:
        """What training is assumed to reach: a share of the dense 16-bit peak."""
        share = REFERENCE_MFU.get(self.name, ASSUMED_MFU)
        return share * runtime.PEAK_TFLOPS[runtime.short_name(self.name)] * 1e12


CARDS = (
    *(Card("RTX 3060", 12), Card("RTX 3070", 8), Card("RTX 3080", 10), Card("RTX 3090", 24)),
    *(Card("RTX 3090 Ti", 24), Card("RTX 4060", 8), Card("RTX 4060 Ti", 16), Card("RTX 4070", 12)),
    *(Card("RTX 4080", 16), Card("RTX 4090", 24), Card("RTX 5090", 32), Card("RTX A6000", 48)),
    *(Card("A100 40GB", 40, 250e9), Card("A100 80GB", 80, 250e9), Card("H100 80GB", 80, 400e9)),
    *(Card("H100 PCIe", 80), Card("V100 16GB", 16, 100e9, torch.float16)),
    *(Card("V100 32GB", 32, 100e9, torch.float16), Card("T4", 16, 12e9, torch.float16)),
)


def find_card(name: str) -> Card | None:
    """The card of a name, blanks, hyphens and case aside: RTX3090, a100-80gb. None if unknown.

    A name without the memory size means the smallest.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    wanted = plain(name.replace("NVIDIA", "").replace("GeForce", ""))
    exact = [c for c in CARDS if plain(c.name) == wanted]
    loose = [c for c in CARDS if plain(runtime.short_name(c.name)) == wanted]
    return next(iter(exact + loose), None)


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Training:
    """What decides how much memory a training step takes, but for the micro-batch."""

    size: GPTConfig
    dtype: torch.dtype
    kind: str  # of device: cuda, cpu or mps
    compiled: bool
    checkpointing: bool  # of activations
    accumulates: bool  # gradients of earlier micro-steps are there


def probe(size: GPTConfig) -> int:
    """A micro-batch by which sizes of the model cannot be divided: the smallest such prime from 5.

    A tensor whose numel it divides has the batch among its dimensions, and so grows with it.
    """
    sizes = (size.vocab_size, size.hidden_size, size.intermediate_size, size.num_attention_heads)
    sizes += (size.num_key_value_heads, size.head_dim, size.max_position_embeddings, *LAYERS)
    primes = (n for n in range(5, 1000) if all(n % k for k in range(2, n)))
    return next(p for p in primes if all(s % p for s in sizes))


class Ledger:
    """Bytes in use from moment to moment, by part: a fixed share and a share for each window."""

    def __init__(self, size: GPTConfig) -> None:
        self.batch = probe(size)
        self.logits = self.batch * size.max_position_embeddings * size.vocab_size
        self.now = [0.0] * (2 * len(PARTS))
        self.moments: list[list[float]] = []

    def book(self, part: str, nbytes: int) -> None:
        """Add nbytes, negative when they are freed, to a part."""
        i = PARTS.index(part)
        if nbytes % self.batch:
            self.now[i] += nbytes
        else:
            self.now[i + len(PARTS)] += nbytes / self.batch

    def note(self) -> None:
        """Keep this moment."""
        self.moments.append(self.now.copy())

    def part_of(self, t: Tensor, part: str) -> str:
        """`part`, or the logits' when the tensor has their size."""
        return PARTS[4] if t.numel() == self.logits else part


@contextlib.contextmanager
def flash_attention(kind: str) -> Iterator[None]:
    """On a GPU, attention keeps q, k, v, its output and a float32 a row, dropout or not.

    The CPU has a kernel that keeps the same, but none with dropout, for which it would keep all
    T x T scores: trace it without, when a GPU is meant.
    """
    real = F.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs)

    if kind == "cpu":
        yield
    else:
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            yield


def micro_step(model: Callable[..., Any], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of a micro-step, as train.py computes it."""
    with runtime.autocast(torch.device("cpu"), dtype):
        loss: Tensor = model(x, x)[1]
    return loss


def fake_model(training: Training) -> tuple[GPT, Tensor]:
    """The model and a batch for it; call it inside a FakeTensorMode."""
    model = GPT(training.size)
    model.activation_checkpointing = training.checkpointing
    shape = (probe(training.size), training.size.max_position_embeddings)
    return model, torch.zeros(shape, dtype=torch.int64)


class Storages(TorchDispatchMode):
    """Books every storage that operators make, until it is freed: the eager graph."""

    def __init__(self, ledger: Ledger, known: list[Tensor]) -> None:
        super().__init__()
        self.ledger = ledger
        self.parts: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        for t in known:  # is there before, and counted elsewhere
            self.parts[t.untyped_storage()] = [""]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage() not in self.parts:
                self.add(t)
        return out

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        part, nbytes = [self.ledger.part_of(t, PARTS[5])], storage.nbytes()
        self.parts[storage] = part
        self.ledger.book(part[0], nbytes)
        self.ledger.note()
        weakref.finalize(storage, lambda: self.ledger.book(part[0], -nbytes))

    def move(self, t: Tensor, to: str) -> None:
        """What was workspace turns out to be kept."""
        part = self.parts.get(t.untyped_storage(), [""])
        if part[0] == PARTS[5]:
            nbytes = t.untyped_storage().nbytes()
            self.ledger.book(part[0], -nbytes)
            self.ledger.book(to, nbytes)
            part[0] = to


def trace_eager(training: Training) -> list[Tensor]:
    """Moments of the forward pass and of both halves of the backward pass, run op by op.

    Each (moments, 2 x parts) float64: fixed bytes, then bytes a window.
    """
    ledger = Ledger(training.size)
    with FakeTensorMode(), flash_attention(training.kind):
        model, x = fake_model(training)
        if training.accumulates:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        known = [*model.parameters(), *model.buffers(), x]
        known += [p.grad for p in model.parameters() if p.grad is not None]
        storages = Storages(ledger, known)

        def keep(t: Tensor) -> Tensor:
            storages.move(t, PARTS[3])
            return t

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: storages.move(p.grad, PARTS[1]))
        with storages, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = micro_step(model, x, training.dtype)
            ledger.note()
            turn = len(ledger.moments)
            torch.autograd.backward(loss)
    moments = torch.tensor(ledger.moments, dtype=torch.float64)
    half = (turn + len(moments)) // 2
    return [moments[:turn], moments[turn:half], moments[half:]]


def captured(training: Training) -> tuple[fx.Graph, fx.Graph]:
    """The forward and backward graph that torch.compile hands to its code generator."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    found: list[fx.Graph] = []

    def note(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(gm.graph)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=note,
        partition_fn=partition_fn,
        decompositions=select_decomp_table,
    )
    torch._dynamo.reset()
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # what is not fake are states of dropout
    with fake, V.set_fake_mode(fake), flash_attention(training.kind):
        model, x = fake_model(training)
        model.compile(backend=backend)
        torch.autograd.backward(micro_step(model, x, training.dtype))
    torch._dynamo.reset()  # a real run starts with nothing compiled
    forward, backward = found
    return forward, backward


def op_name(n: fx.Node) -> str:
    """mm for aten.mm.default; "" for what is not an operator."""
    return getattr(n.target, "__name__", "").partition(".")[0] if n.op == "call_function" else ""


def is_kernel(n: fx.Node) -> bool:
    return op_name(n).startswith(KERNELS)


def is_view(n: fx.Node) -> bool:
    name = op_name(n.all_input_nodes[0] if n.target is operator.getitem else n)
    return name in VIEWS


class Lifetimes:
    """Which values of a compiled graph take memory, and when, by the compiler's rules.

    Element-wise operators and reductions are fused into loops: what one of them makes exists in
    memory only if a kernel that is called as it is reads it, if the graph returns it, or if it is
    read after a further kernel, hence in another loop. A loop may write over an input that it is
    the last to read.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.base: dict[fx.Node, fx.Node] = {}  # whose memory a view looks at
        self.stage: dict[fx.Node, int] = {}  # kernels on the longest way to it
        readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            inputs = n.all_input_nodes
            self.base[n] = self.base[inputs[0]] if is_view(n) and inputs else n
            self.stage[n] = max((self.stage[a] + is_kernel(a) for a in inputs), default=0)
            if self.base[n] is n:
                for a in inputs:
                    readers[self.base[a]].append(n)
        self.returned = [o for o in tree_leaves(self.nodes[-1].args) if isinstance(o, fx.Node)]
        self.kept = {self.base[o] for o in self.returned}
        self.real = {
            n
            for n in self.nodes
            if n.op == "call_function"
            and self.base[n] is n
            and (
                is_kernel(n)
                or n.target is operator.getitem
                or n in self.kept
                or any(is_kernel(r) or self.stage[r] != self.stage[n] for r in readers[n])
            )
        }
        reads: dict[fx.Node, set[fx.Node]] = {}  # values in memory, through those that are not
        last: dict[fx.Node, fx.Node] = {}
        for n in self.nodes:
            reads[n] = set()
            for a in (self.base[a] for a in n.all_input_nodes):
                reads[n] |= {a} if a in self.real or a.op == "placeholder" else reads[a]
            if n in self.real or n.op == "output":
                last |= dict.fromkeys(reads[n], n)
        self.dying: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for value, n in last.items():
            if value not in self.kept:
                self.dying[n].append(value)
        self.unread = self.real - set(last) - self.kept

    def book(
        self, ledger: Ledger, parts: dict[fx.Node, str], given: set[fx.Node], owned: set[fx.Node]
    ) -> None:
        """Walk through the graph. given: inputs that are freed after use; owned: may be reused.

        parts names the part of values; the others are workspace.
        """

        def book(n: fx.Node, sign: int) -> None:
            if nbytes := bytes_of(n):
                ledger.book(ledger.part_of(n.meta["val"], parts.get(n, PARTS[5])), sign * nbytes)

        for n in given:
            book(n, 1)
        ledger.note()
        for n in self.nodes:
            if n not in self.real:
                continue
            dying = [d for d in self.dying[n] if d in given or d in self.real]
            if not is_kernel(n) and n.target is not operator.getitem:
                spent = (d for d in dying if d in owned or d in self.real)
                if reused := next((d for d in spent if bytes_of(d) == bytes_of(n)), None):
                    book(reused, -1)
                    dying.remove(reused)
            book(n, 1)
            ledger.note()
            for d in dying + [n] * (n in self.unread):
                book(d, -1)


def bytes_of(n: fx.Node) -> int:
    """Of a value; 0 for what is no tensor, and for a random generator's state of unknown length."""
    value = n.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(value.numel(), int):
        return 0
    return value.numel() * value.element_size()


def trace_compiled(training: Training) -> list[Tensor]:
    """As trace_eager, of the compiled graph."""
    forward, backward = captured(training)
    going, coming = Lifetimes(forward), Lifetimes(backward)
    inputs = [n for n in coming.nodes if n.op == "placeholder"]
    tangents = [n for n in inputs if n.name.startswith("tangents")]
    by_name = {n.name: n for n in going.nodes}
    saved = {n: by_name[n.name] for n in inputs if n.name in by_name}
    # a view that is saved keeps what it looks at; parameters and buffers are counted elsewhere
    saved = {n: going.base[s] for n, s in saved.items() if going.base[s].op != "placeholder"}
    outputs = going.returned[: len(going.returned) - (len(inputs) - len(tangents))]
    users = {going.base[o] for o in outputs}

    batch: set[fx.Node] = set()  # values that depend on the tokens
    for n in going.nodes:
        value = n.meta.get("val")
        tokens = n.op == "placeholder" and getattr(value, "dtype", None) == torch.int64
        if tokens or any(a in batch for a in n.all_input_nodes):
            batch.add(n)
    ledger = Ledger(training.size)
    going.book(ledger, {s: PARTS[3] for s in saved.values() if s in batch}, set(), set())
    turn = len(ledger.moments)
    ledger.now = [0.0] * len(ledger.now)
    once = {s: n for n, s in saved.items()}  # several views of one memory count once
    parts = {n: PARTS[3] for s, n in once.items() if s in batch}
    parts |= dict.fromkeys(coming.kept, PARTS[1])
    given = {*once.values(), *tangents}
    owned = {n for s, n in once.items() if s not in users}
    coming.book(ledger, parts, given, owned)
    moments = torch.tensor(ledger.moments, dtype=torch.float64)
    half = (turn + len(moments)) // 2
    return [moments[:turn], moments[turn:half], moments[half:]]


@functools.lru_cache(maxsize=64)
def trace(training: Training) -> list[Tensor]:
    """The moments of a training whose size is small enough to be traced as it is."""
    return (trace_compiled if training.compiled else trace_eager)(training)


def shallow(training: Training, layers: int) -> Training:
    """The same with other layers, and equal for all whose graphs are."""
    size = replace(training.size, num_hidden_layers=layers)
    return replace(training, size=size, accumulates=training.accumulates and not training.compiled)


def states(size: GPTConfig) -> dict[str, int]:
    """Bytes of weights (and buffers), gradients and AdamW's two moments, all float32."""
    with torch.device("meta"):
        model = GPT(size)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    n = 4 * num_parameters(model)
    return {PARTS[0]: n + buffers, PARTS[1]: n, PARTS[2]: 2 * n}


def memory(training: Training, windows: int) -> dict[str, float]:
    """Bytes by part at the moment of a training step when most are in use.

    The graph is traced at two depths. Its peaks in the forward pass, in the half of the backward
    pass where activations are most, and in the half where gradients are most, grow with each layer
    by the same amount.
    """
    fixed = states(training.size)
    if not training.accumulates:
        fixed[PARTS[1]] = 0  # the backward pass makes them
    layers = training.size.num_hidden_layers
    depths = LAYERS if layers > max(LAYERS) else (layers,)
    update = dict.fromkeys(PARTS, 0.0) | states(training.size)  # AdamW, fused, works in place
    candidates = [update]
    for segments in zip(*(trace(shallow(training, d)) for d in depths), strict=True):
        peaks = []
        for moments in segments:
            used = moments[:, : len(PARTS)] + windows * moments[:, len(PARTS) :]
            peaks.append(used[used.sum(1).argmax()])
        more = (layers - depths[0]) * (peaks[-1] - peaks[0])
        at_peak = dict(zip(PARTS, (peaks[0] + more).tolist(), strict=True))
        candidates.append({p: at_peak[p] + fixed.get(p, 0) for p in PARTS})
    return max(candidates, key=lambda parts: sum(parts.values()))


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def divisors(n: int) -> list[int]:
    """In rising order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def peak(training: Training, batch: int, windows: int) -> float:
    """Bytes at the peak of a step of so many windows, batch of them at a time."""
    return total(memory(replace(training, accumulates=batch < windows), batch))


def largest_batch(training: Training, windows: int, room: float, most: int = 0) -> int:
    """The largest micro-batch (of at most `most`) that divides a step's windows and fits in `room`.

    0 when none does.
    """
    batches = [b for b in divisors(windows) if b <= (most or windows)]
    return max((b for b in batches if peak(training, b, windows) <= room), default=0)


def smallest_change(training: Training, batch: int, windows: int, room: float) -> str:
    """What to type so that a run fits in `room` bytes; "" when it does as it is.

    In this order: a smaller micro-batch that divides a step's windows, activation checkpointing,
    fewer layers. Raises ValueError when not even one layer fits.
    """
    if peak(training, batch, windows) <= room:
        return ""
    if found := largest_batch(training, windows, room, batch):
        return f"--batch_size={found}"
    training = replace(training, checkpointing=True)
    if found := largest_batch(training, windows, room, batch):
        return f"--activation_checkpointing=True --batch_size={found}"
    for layers in range(training.size.num_hidden_layers - 1, 0, -1):
        size = replace(training.size, num_hidden_layers=layers)
        if peak(replace(training, size=size), 1, windows) <= room:
            flags = "--activation_checkpointing=True --batch_size=1"
            return f"--num_hidden_layers={layers} {flags}"
    raise ValueError(
        f"not even one layer fits in {room / GIB:.1f} GiB; take a smaller hidden_size, "
        "max_position_embeddings or vocabulary"
    )


def free_memory(device: torch.device) -> float | None:
    """Bytes that a run on a device of this machine could use; None where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    with contextlib.suppress(OSError, StopIteration):  # Linux
        with open("/proc/meminfo", encoding="utf-8") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
        return float(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: all there is
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def memory_lines(training: Training, batch: int, room: float | None, where: str) -> list[str]:
    """The parts of a run's memory as a table, against what there is. room excludes the reserve."""
    parts = memory(training, batch)
    graph = "compiled" if training.compiled else "eager"
    kept = ", activation checkpointing" if training.checkpointing else ""
    lines = [
        f"memory   at the peak of a step with batch_size={batch}, computed from the {graph} graph "
        f"in {str(training.dtype).removeprefix('torch.')}{kept}:"
    ]
    lines += [f"  {part:<16}{nbytes / GIB:8.2f} GiB" for part, nbytes in parts.items()]
    lines.append(f"  {'sum':<16}{total(parts) / GIB:8.2f} GiB")
    reserve = RESERVE[training.kind] / GIB
    if room is None:
        return [*lines, f"  free memory of {where}: unknown"]
    verdict = "fits" if total(parts) <= room else "DOES NOT FIT"
    return [
        *lines,
        f"  {where}: {room / GIB + reserve:.2f} GiB less {reserve:.1f} for what is not in the "
        f"graph (assumed): {verdict}",
    ]


def card_lines(training: Training, windows: int) -> list[str]:
    """Largest micro-batches on consumer cards, computed for the compiled graph in bfloat16."""
    plain = replace(training, kind="cuda", dtype=torch.bfloat16, compiled=True, checkpointing=False)
    saving = replace(plain, checkpointing=True)
    lines = [
        f"cards    largest batch_size that divides the step's {windows} windows, computed for "
        "bfloat16 and torch.compile",
        "  memory      as it is    with activation_checkpointing",
    ]
    for size in CARD_SIZES:
        room = size * GIB - RESERVE["cuda"]
        found = [largest_batch(t, windows, room) for t in (plain, saving)]
        a, b = (str(n) if n else "none fits" for n in found)
        lines.append(f"  {size:>3} GB  {a:>12}  {b:>12}")
    return lines


# ---------------------------------------------------------------- time


def share_of_peak(card: Card) -> str:
    """What the computed time of a card rests on."""
    share = REFERENCE_MFU.get(card.name)
    peak = runtime.PEAK_TFLOPS[runtime.short_name(card.name)]
    source = "as EasyGPT's reference run is reported with" if share else "a guess"
    return f"{share or ASSUMED_MFU:.0%} of {card.name}'s {peak:g} TFLOP/s ({source})"


def time_steps(
    micro: Callable[[], None], update: Callable[[], None], device: torch.device, repeats: int = 3
) -> tuple[float, float]:
    """Measured seconds of a micro-step (median) and of an update, after one of each to warm up."""

    def seconds(work: Callable[[], None]) -> float:
        t0 = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - t0

    seconds(micro)
    seconds(update)
    micro_s = statistics.median(seconds(micro) for _ in range(repeats))
    return micro_s, seconds(update)


def speed_lines(
    step_s: float, tokens_per_step: int, flops_per_step: float, steps: int, how: str
) -> list[str]:
    """Tokens/s, hours and the date on which a run that starts now would end."""
    hours = steps * step_s / 3600
    end = datetime.datetime.now() + datetime.timedelta(hours=hours)
    return [
        f"time     {hours:,.1f} hours for {steps:,} updates of {step_s:.3g} s, until "
        f"{end:%Y-%m-%d %H:%M} if started now",
        f"  {tokens_per_step / step_s:,.0f} tokens/s, {flops_per_step / step_s / 1e12:.2f} "
        f"TFLOP/s; {how}; evaluations and checkpoints not counted",
    ]


def ring_seconds(nbytes: float, cards: int, link: float) -> float:
    """Time of a ring all-reduce: each card sends and receives 2 (n - 1) / n of the bytes."""
    slowest = link if cards <= NODE else min(link, NETWORK)
    return 2 * (cards - 1) / cards * nbytes / slowest


def scaling_lines(
    training: Training,
    batch: int,
    windows: int,
    flops_per_window: float,
    flops_per_s: float,
    link: float,
    world_size: int,
) -> list[str]:
    """A table of 1 to world_size cards under data parallelism (DDP).

    Gradients, in float32, are reduced once a step and nothing of that is hidden behind the backward
    pass: the least efficiency that these links give.
    """
    gradients = states(training.size)[PARTS[1]]
    context = training.size.max_position_embeddings
    lines = [
        f"scaling  computed, not measured: DDP on cards of {flops_per_s / 1e12:.1f} TFLOP/s each",
        "  cards  batch_size  micro-steps  GiB a card   compute s      comm s    tokens/s  "
        "efficiency",
    ]
    counts = sorted({*(2**i for i in range(world_size.bit_length())), world_size})
    rounded = False
    for cards in counts:
        each = max(1, round(windows / cards))
        mark = "*" if each * cards != windows else " "
        rounded = rounded or mark == "*"
        micro = max(b for b in divisors(each) if b <= batch)
        needed = peak(training, micro, each) / GIB
        compute = each * flops_per_window / flops_per_s
        comm = ring_seconds(gradients, cards, link)
        tokens = each * cards * context / (compute + comm)
        lines.append(
            f"  {cards:>5}{mark} {micro:>10}  {each // micro:>11}  {needed:>10.2f}  "
            f"{compute:>10.3f}  {comm:>10.3f}  {tokens:>10,.0f}  {compute / (compute + comm):>9.1%}"
        )
    lines.append(
        f"  assumed: {link / 1e9:.0f} GB/s between cards of a machine ({NODE}), "
        f"{NETWORK / 1e9:.1f} GB/s between machines; {gradients / 1e9:.2f} GB of float32 gradients "
        "in one ring all-reduce a step, none of it hidden behind computing"
    )
    if rounded:
        lines.append(
            f"  * the step's {windows} windows do not divide by the cards; computed for the nearest "
            "number that does, which takes another tokens_per_step"
        )
    return lines
