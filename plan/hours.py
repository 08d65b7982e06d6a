"""How long a training step takes on a card that is not here, read off the graph that training runs.

FLOP and bytes of its kernels are counted. The shares of its peaks that a card reaches are fitted,
measured or assumed, and run/cards.py says which.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from model import GPT, num_parameters
from plan import memory
from plan.memory import Lifetimes, Training, is_kernel, op_name
from run import cards, muon, optim

PRODUCTS, INT8, ATTENTION, LOOPS = "products", "int8", "attention", "loops"
KERNEL_S = 5e-6  # of a CPU's work to launch a kernel, assumed: a small model's GPU waits for it
OPERATOR = 10  # launches that a call of an operator of ours takes as long as, in Python; assumed
NODE = 8  # cards in one machine, assumed
UNCOMPILED = 3.5  # times as long as compiled, measured once, on an H200
# Bytes of a parameter that an update moves: the norm of its gradient, the clipped gradient, and
# weight, gradient and moments, read and written by AdamW. Muon's are taken to be as many.
UPDATE_BYTES = 4 + 8 + 28
SUM_BYTES = 12  # of a parameter, when a micro-step's gradient is added to the others
COPY_BYTES, COPY_SUM_BYTES = 6, 10  # of one that has a copy in 16 bits: to make it, and to add


@dataclass(frozen=True)
class Kernel:
    """FLOP and bytes of a kernel, or of several loops, in a micro-step."""

    kind: str
    flops: float
    nbytes: float
    share: float = 1.0  # of the rate of its kind that it reaches
    count: int = 1

    def seconds(self, card: cards.Card, dtype: torch.dtype) -> float:
        """On a card: it computes while it reads."""
        reach = cards.reach_of(card, dtype)
        shares = {PRODUCTS: reach.products, ATTENTION: reach.attention, INT8: reach.int8}
        share = self.share * shares.get(self.kind, 1.0)
        computes = self.flops / (share * card.peak(torch.int8 if self.kind == INT8 else dtype))
        return max(computes, self.nbytes / (reach.bandwidth * card.bandwidth))


# ---------------------------------------------------------------- what is done


def flops_of(name: str, shapes: list[torch.Size]) -> float:
    """Of a product of two tensors, or of causal attention with queries of a shape.

    Queries are the first tensor, and in the backward pass the second, which has 2.5 times as much.
    """
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = shapes[-2:]
        return 2.0 * math.prod(a) * b[-1]
    if name == "int8_product":
        a, b = shapes[:2]
        return 2.0 * math.prod(a) * b[0]
    if "attention" in name:
        backward = "backward" in name
        queries = shapes[1] if backward else shapes[0]
        return 4.0 * math.prod(queries) * queries[-2] / 2 * (2.5 if backward else 1)
    return 0.0


def kernel_of(name: str, shapes: list[torch.Size], nbytes: float, grown: float) -> Kernel:
    """An operator that is called as it is. grown: times as many windows as were traced."""
    flops = flops_of(name, shapes) * grown
    if "attention" in name:
        return Kernel(ATTENTION, flops, nbytes, cards.BACKWARD if "backward" in name else 1.0)
    if name == "int8_product":
        return Kernel(INT8, flops, nbytes, count=OPERATOR)
    return Kernel(PRODUCTS if flops else LOOPS, flops, nbytes)


def tensors(n: fx.Node) -> list[Tensor]:
    """All tensors of a value, but for a random generator's state of unknown length."""
    found = [t for t in tree_leaves(n.meta.get("val")) if isinstance(t, Tensor)]
    return [t for t in found if isinstance(t.numel(), int)]


def sizer(training: Training, batch: int) -> Callable[[fx.Node], float]:
    """A function that tells the bytes of a traced value with `batch` windows."""
    traced = memory.probe(training.config)

    def nbytes(n: fx.Node) -> float:
        found = 0.0
        for t in tensors(n):
            grown = batch / traced if t.numel() % traced == 0 else 1.0
            found += t.numel() * t.element_size() * grown
        return found

    return nbytes


class Loops:
    """The fused loops of a compiled graph: what each of them reads and writes.

    Loops run between two kernels that wait for each other. A value that only loops read is computed
    again in each, unless it is smaller than what it is made of. A value that no kernel waits for is
    made in the loop that shares most of its inputs.
    """

    def __init__(self, graph: fx.Graph, nbytes: Callable[[fx.Node], float]) -> None:
        life = Lifetimes(graph)
        self.nbytes = nbytes
        values = [n for n in life.nodes if life.base[n] is n]
        end = max(life.stage.values())
        latest: dict[fx.Node, int] = {}
        for n in reversed(values):
            after = (latest[r] - is_kernel(n) for r in life.readers[n] if r.op != "output")
            latest[n] = min(after, default=end)
        self.reads: dict[fx.Node, set[fx.Node]] = {}
        written: list[fx.Node] = []
        self.kernels: list[fx.Node] = []
        there: set[fx.Node] = {n for n in life.nodes if n.op == "placeholder"}
        for n in values:
            self.reads[n] = set()
            for a in (life.base[a] for a in n.all_input_nodes):
                self.reads[n] |= {a} if a in there else self.reads[a]
            if n not in life.real:
                continue
            called = is_kernel(n) or n.target is operator.getitem
            smaller = nbytes(n) < sum(map(nbytes, self.reads[n]))
            if called or n in life.kept or smaller or any(map(is_kernel, life.readers[n])):
                there.add(n)
            if is_kernel(n):
                self.kernels.append(n)
            elif not called and n in there:
                written.append(n)
        self.groups: dict[int, tuple[set[fx.Node], set[fx.Node]]] = {}  # read and written
        for n in sorted(written, key=lambda n: latest[n] > life.stage[n]):
            stages = range(life.stage[n], latest[n] + 1) if latest[n] > life.stage[n] else ()
            at = max((s for s in stages if s in self.groups), key=self.shared(n), default=None)
            read, made = self.groups.setdefault(life.stage[n] if at is None else at, (set(), set()))
            read |= self.reads[n]
            made.add(n)

    def shared(self, n: fx.Node) -> Callable[[int], float]:
        """A function that tells the bytes that a value is made of and a stage's loops have."""

        def of_stage(stage: int) -> float:
            read, made = self.groups[stage]
            return sum(map(self.nbytes, self.reads[n] & (read | made)))

        return of_stage

    def all(self) -> Iterator[Kernel]:
        """The loops."""
        for read, made in self.groups.values():
            yield Kernel(LOOPS, 0.0, sum(map(self.nbytes, read | made)), count=len(made))


def kernels_of(training: Training, batch: int) -> Iterator[Kernel]:
    """The kernels of a micro-step of the compiled graph."""
    nbytes, grown = sizer(training, batch), batch / memory.probe(training.config)
    for graph in memory.captured(training):
        loops = Loops(graph, nbytes)
        yield from loops.all()
        for n in loops.kernels:
            given = [a for a in n.args if isinstance(a, fx.Node)]
            shapes = [t.shape for a in given for t in tensors(a)]
            moved = sum(map(nbytes, loops.reads[n])) + nbytes(n)
            if "index_put" in op_name(n):  # in its place: a table of which few rows change
                moved -= 2 * nbytes(n)
            inner = (a.__name__ for a in n.args if isinstance(a, torch._ops.OpOverload))
            name = next(inner, op_name(n))  # of what runs with another random state
            yield kernel_of(name.partition(".")[0], shapes, moved, grown)


# ---------------------------------------------------------------- how long it takes


@dataclass(frozen=True)
class Times:
    """Seconds of a micro-step, by kind of kernel, and about the number of kernels."""

    products: float
    int8: float  # products in int8
    attention: float
    loops: float
    kernels: float  # at most: each loop makes one value

    @property
    def works(self) -> float:
        """Of the GPU."""
        return self.products + self.int8 + self.attention + self.loops

    @property
    def waits(self) -> bool:
        """Whether the GPU waits for the CPU, which launches."""
        return self.kernels * KERNEL_S > self.works

    @property
    def total(self) -> float:
        """The slower of both counts."""
        return max(self.works, self.kernels * KERNEL_S)


@functools.lru_cache(maxsize=64)
def times_of(training: Training, batch: int, card: cards.Card) -> Times:
    """Of a training whose size is small enough to be traced as it is."""
    found = dict.fromkeys((PRODUCTS, INT8, ATTENTION, LOOPS), 0.0)
    count = 0
    for kernel in kernels_of(training, batch):
        found[kernel.kind] += kernel.seconds(card, training.dtype)
        count += kernel.count
    return Times(**found, kernels=float(count))


def micro_step(training: Training, batch: int, card: cards.Card) -> Times:
    """Of a training, compiled. It grows with each layer by the same amount, as memory does."""
    layers, plain = training.config.num_hidden_layers, replace(training, compiled=True)
    depths = memory.LAYERS if layers > max(memory.LAYERS) else (layers,)
    found = [times_of(memory.shallow(plain, depth), batch, card) for depth in depths]
    pairs = zip(astuple(found[0]), astuple(found[-1]), strict=True)
    return Times(*(a + (layers - depths[0]) * (b - a) for a, b in pairs))


def update(training: Training, batch: int, micro_steps: int, card: cards.Card) -> float:
    """Seconds of an update of so many micro-steps on one card."""
    with torch.device("meta"):
        model = GPT(training.config)
    matrices = [
        p.shape
        for group in optim.groups_of(model, training.optimizer)
        for p in group["params"]
        if "momentum" in group
    ]
    turned = Kernel(PRODUCTS, muon.operations(matrices), 0.0)
    copied = memory.copied(training.config) if training.copies else 0
    alone = num_parameters(model) - copied  # the first gradient of these is taken as it comes
    moved = Kernel(
        LOOPS,
        0.0,
        UPDATE_BYTES * num_parameters(model)
        + (micro_steps - 1) * SUM_BYTES * alone
        + (micro_steps * COPY_SUM_BYTES + COPY_BYTES) * copied,
    )
    times = 1.0 if training.compiled else UNCOMPILED
    return (
        micro_steps * times * micro_step(training, batch, card).total
        + turned.seconds(card, optim.muon_dtype(training.dtype))
        + moved.seconds(card, training.dtype)
    )


def ring_seconds(nbytes: float, count: int, card: cards.Card) -> float:
    """Time of a ring all-reduce: each card sends and receives 2 (n - 1) / n of the bytes."""
    slowest = card.link if count <= NODE else min(card.link, card.network)
    return 2 * (count - 1) / count * nbytes / slowest


def step(training: Training, batch: int, micro_steps: int, card: cards.Card) -> tuple[float, float]:
    """Seconds of an update of all ranks: to compute, and to exchange gradients."""
    state = memory.states(training.config, training.optimizer, training.dtype)
    ring = ring_seconds(state[memory.GRADIENTS], training.ranks, card)
    return update(training, batch, micro_steps, card), ring
