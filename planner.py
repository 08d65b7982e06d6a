"""What a run will take, before it starts: memory by part, time, disk, and what more cards would do.

Memory is read off the graph that training runs, traced on fake tensors, which have shapes and no
contents: no GPU is needed, and nothing of the model's size is allocated. Every figure here is
computed; only time_steps measures.
"""

import contextlib
import functools
import math
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
# Memory that is not in the graph. On a GPU: CUDA's context and kernels (0.3 to 0.5 GiB), buffers
# inside kernels, the allocator's gaps. On a CPU: Python and torch. An assumption, not a measurement.
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
KERNELS += ("embedding_dense_backward", "_linear_cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True)
class Card:
    """A GPU that can be planned for without being there."""

    name: str  # as in runtime.PEAK_TFLOPS, and a memory size where there are several
    memory: int  # GiB
    link: float = 12e9  # bytes/s to the next card of the machine; PCIe 4.0 x16 gives about half of 25
    half: torch.dtype = torch.bfloat16

    @property
    def peak(self) -> float:
        """Dense 16-bit FLOP/s."""
        return runtime.PEAK_TFLOPS[runtime.short_name(self.name)] * 1e12

    @property
    def mfu(self) -> float:
        """The share of the peak that is assumed for training."""
        return REFERENCE_MFU.get(self.name, ASSUMED_MFU)


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


def fake_model(training: Training, layers: int) -> tuple[GPT, Tensor]:
    """A model of so many layers and a batch for it; call it inside a FakeTensorMode."""
    model = GPT(replace(training.size, num_hidden_layers=layers))
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


def trace_eager(training: Training, layers: int) -> list[Tensor]:
    """Moments of the forward pass and of both halves of the backward pass, run operator by operator.

    Each (moments, 2 x parts) float64: fixed bytes, then bytes a window.
    """
    ledger = Ledger(training.size)
    with FakeTensorMode(), flash_attention(training.kind):
        model, x = fake_model(training, layers)
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
            loss.backward()
    moments = torch.tensor(ledger.moments, dtype=torch.float64)
    half = (turn + len(moments)) // 2
    return [moments[:turn], moments[turn:half], moments[half:]]


def captured(training: Training, layers: int) -> tuple[fx.Graph, fx.Graph]:
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
        model, x = fake_model(training, layers)
        model.compile(backend=backend)
        micro_step(model, x, training.dtype).backward()
    torch._dynamo.reset()  # a real run starts with nothing compiled
    forward, backward = found
    return forward, backward


def op_name(n: fx.Node) -> str:
    """mm for aten.mm.default; "" for what is not an operator."""
    return getattr(n.target, "__name__", "").partition(".")[0] if n.op == "call_function" else ""


def is_kernel(n: fx.Node) -> bool:
    return op_name(n).startswith(KERNELS)


def is_view(n: fx.Node) -> bool:
    if n.target is operator.getitem:
        return not is_kernel(n.all_input_nodes[0])
    return op_name(n) in VIEWS


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
            value = n.meta.get("val")
            if isinstance(value, Tensor):
                part = ledger.part_of(value, parts.get(n, PARTS[5]))
                ledger.book(part, sign * value.numel() * value.element_size())

        for n in given:
            book(n, 1)
        ledger.note()
        for n in self.nodes:
            if n not in self.real:
                continue
            dying = [d for d in self.dying[n] if d in given or d in self.real]
            if not is_kernel(n) and n.target is not operator.getitem:
                spent = (d for d in dying if d in owned or d in self.real)
                if reused := next((d for d in spent if same_bytes(d, n)), None):
                    book(reused, -1)
                    dying.remove(reused)
            book(n, 1)
            ledger.note()
            for d in dying + [n] * (n in self.unread):
                book(d, -1)


def same_bytes(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.numel() * x.element_size() == y.numel() * y.element_size()


def trace_compiled(training: Training, layers: int) -> list[Tensor]:
    """As trace_eager, of the compiled graph."""
    forward, backward = captured(training, layers)
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
def trace(training: Training, layers: int) -> list[Tensor]:
    return (trace_compiled if training.compiled else trace_eager)(training, layers)


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
        fixed[PARTS[1]] = 0
    layers = training.size.num_hidden_layers
    depths = LAYERS if layers > max(LAYERS) else (layers,)
    candidates = [{PARTS[1]: float(states(training.size)[PARTS[1]])} | fixed]  # the optimizer's
    for segments in zip(*(trace(training, d) for d in depths), strict=True):
        peaks = []
        for moments in segments:
            used = moments[:, : len(PARTS)] + windows * moments[:, len(PARTS) :]
            peaks.append(used[used.sum(1).argmax()])
        more = (layers - depths[0]) * (peaks[-1] - peaks[0])
        at_peak = dict(zip(PARTS, (peaks[0] + more).tolist(), strict=True))
        candidates.append({p: at_peak[p] + fixed.get(p, 0) for p in PARTS})
    candidates[0] = dict.fromkeys(PARTS, 0.0) | fixed | {PARTS[1]: states(training.size)[PARTS[1]]}
    return max(candidates, key=lambda parts: sum(parts.values()))
