"""How much memory a training step takes, by part, read off the graph that training runs.

The graph is traced on fake tensors, which have shapes and no contents: no GPU is needed, and
nothing of the model's size is allocated. With torch.compile it is the forward and backward graph
that the code generator gets; without, every operator as autograd calls it.
"""

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import model as model_file
from model import GPT, GPTConfig, num_parameters
from run import int8, machine, muon, optim
from run.copies import Copies, matrices_of

PARTS = ("weights", "gradients", "optimizer", "activations", "logits and loss", "workspace")
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE = PARTS
LAYERS = (3, 4)  # depths that are traced; memory grows by the same amount with each layer
VIEWS = {"view", "permute", "slice", "expand", "unsqueeze", "squeeze", "t", "transpose", "select"}
VIEWS |= {"alias", "split", "split_with_sizes", "as_strided", "detach"}
REDUCTIONS = {"sum", "mean", "amax", "amin"}
# Operators that the compiler calls as they are: what they read and write exists in memory.
KERNELS = (
    *("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "index_put", "scatter"),
    *("embedding_dense_backward", "_unsafe_masked_index_put", "int8_product"),
    *("run_and_save_rng_state", "run_with_rng_state"),
)


@dataclass(frozen=True)
class Training:
    """What decides how much memory a training step takes, but for the micro-batch."""

    config: GPTConfig
    dtype: torch.dtype
    device_type: str  # cuda, cpu or mps
    compiled: bool
    checkpointing: bool  # of activations
    accumulates: bool  # gradients of earlier micro-steps are there
    optimizer: str = "adamw"
    saving: int = 1  # compiled, see machine.save_memory
    ranks: int = 1  # processes, of a device each
    shards: int = 1  # ranks that weights, gradients and moments are spread over; 1: DDP
    matmul_dtype: str = "auto"  # of the blocks' linear layers; or int8
    copying: bool = True  # may have copies of the weights: no process group that wants gradients
    by_layer: bool = False  # each layer is compiled alone: FSDP, of one rank even

    @property
    def chooses(self) -> bool:
        """Whether it saves only as much memory as it has to: a GPU's whole model, compiled."""
        return self.device_type == "cuda" and self.compiled and self.whole

    @property
    def whole(self) -> bool:
        """Whether a graph is of a whole model."""
        return self.shards == 1 and not self.by_layer

    @property
    def copies(self) -> bool:
        """Whether it keeps copies of the weights (run/copies.py) through an update.

        At level 0, and uncompiled, that takes no memory: backward keeps what autocast casts. With
        checkpointing it keeps no casts, so copies would take memory.
        """
        cast = self.dtype != torch.float32 and self.matmul_dtype == "auto" and self.ranks == 1
        has_room = self.saving in (0, 2) if self.chooses else not self.compiled
        return cast and self.copying and has_room and not self.checkpointing

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of machine.save_memory that it may take, from ample memory to little.

        In float16 the sum over pieces could overflow. Level 3 only leaves out the copies.
        """
        if not self.compiled or not self.whole:
            return (self.saving,)
        first = 0 if self.device_type == "cuda" else 1
        if self.dtype == torch.float16:
            return (0, 1)[first:]
        return (first, 2, 3) if replace(self, saving=2).copies else (first, 2)

    @property
    def leanest(self) -> "Training":
        """The same with all memory saved that it may save."""
        return replace(self, saving=self.levels[-1])


def probe(config: GPTConfig) -> int:
    """A micro-batch by which sizes of the model cannot be divided: the smallest such prime from 5.

    A tensor whose numel it divides has the batch among its dimensions, and so grows with it.
    """
    sizes = (
        *(
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
        ),
        *(config.num_key_value_heads, config.head_dim, config.max_position_embeddings, *LAYERS),
    )
    primes = (n for n in range(5, 1000) if all(n % k for k in range(2, n)))
    return next(p for p in primes if all(s % p for s in sizes))


class Ledger:
    """Bytes in use from moment to moment, by part: a fixed share and a share for each window."""

    def __init__(self, config: GPTConfig) -> None:
        self.batch = probe(config)
        self.logits = self.batch * config.max_position_embeddings * config.vocab_size
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

    def passes(self, turn: int) -> tuple[Tensor, Tensor]:
        """The moments of the forward pass, which ends at `turn`, and of the backward pass.

        Each (moments, 2 x parts) float64: fixed bytes, then bytes a window.
        """
        moments = torch.tensor(self.moments, dtype=torch.float64)
        return moments[:turn], moments[turn:]

    def part_of(self, t: Tensor, part: str) -> str:
        """`part`, or the logits' when the tensor has their size."""
        return LOGITS if t.numel() == self.logits else part


@contextlib.contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Make the CPU's attention keep what that of another device does.

    A GPU's kernel keeps q, k, v, its output and a float32 a row, dropout or not. The CPU's keeps
    the same but has no dropout, so a GPU is traced without. mps keeps all T x T scores.
    """
    real = F.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs)

    if device == "cuda":
        with mock.patch.object(F, "scaled_dot_product_attention", without_dropout):
            yield
    elif device == "mps":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


class FusedNorm(torch.autograd.Function):
    """The shapes of a GPU's RMSNorm: one kernel, which keeps its input and a float32 a row.

    A CPU's is several operators, of which one keeps another tensor of the input's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., C), weight (C,) -> as x."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the inputs' shapes."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextlib.contextmanager
def uncompiled_on(device: str) -> Iterator[None]:
    """Make norm and loss do what they do without the compiler on another device than a CPU."""

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
        return out

    with contextlib.ExitStack() as patches:
        if device == "cuda":
            patches.enter_context(mock.patch.object(F, "rms_norm", norm))
        if device != "cpu":
            chunk = model_file.LOSS_CHUNK_GPU
            patches.enter_context(mock.patch.object(model_file, "LOSS_CHUNK", chunk))
        yield


def half(dtype: torch.dtype) -> torch.dtype:
    """What stands in for a type of products where it is traced: float16 is as large as bfloat16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def loss_of(model: Callable[..., Any], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of a micro-step, as train.py computes it."""
    with machine.autocast(torch.device("cpu"), half(dtype)):
        loss: Tensor = model(x, x, loss_only=True)[1]
    return loss


def fake_model(training: Training) -> tuple[GPT, Tensor]:
    """The model and a batch for it; call it inside a FakeTensorMode."""
    model = GPT(training.config)
    model.activation_checkpointing = training.checkpointing
    if training.matmul_dtype == "int8":
        int8.learn_in_int8(model)
    shape = (probe(training.config), training.config.max_position_embeddings)
    return model, torch.zeros(shape, dtype=torch.int64)


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every storage that operators make, until it is freed: the eager graph."""

    def __init__(self, ledger: Ledger, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        part, nbytes = [self.ledger.part_of(t, WORKSPACE)], storage.nbytes()
        self.parts[storage] = part
        self.ledger.book(part[0], nbytes)
        self.ledger.note()
        weakref.finalize(storage, lambda: self.ledger.book(part[0], -nbytes))

    def move(self, t: Tensor, to: str) -> None:
        """What was workspace turns out to be kept."""
        part = self.parts.get(t.untyped_storage(), [""])
        if part[0] == WORKSPACE:
            nbytes = t.untyped_storage().nbytes()
            self.ledger.book(part[0], -nbytes)
            self.ledger.book(to, nbytes)
            part[0] = to


def trace_eager(training: Training) -> tuple[Tensor, Tensor]:
    """Moments of a micro-step run op by op, as Ledger.passes."""
    ledger = Ledger(training.config)
    kind = training.device_type
    with FakeTensorMode(), attention_of(kind), uncompiled_on(kind):
        model, x = fake_model(training)
        if training.accumulates:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        weights = list(model.parameters())
        known = [*weights, *model.buffers(), x, *(p.grad for p in weights if p.grad is not None)]
        if training.copies:
            Copies(model, half(training.dtype)).lend()
            known += model.parameters()
        storages = Storages(ledger, known)

        def keep(t: Tensor) -> Tensor:
            storages.move(t, ACTIVATIONS)
            return t

        def summed(p: Tensor) -> None:
            for weight in weights:
                if weight.grad is not None:
                    storages.move(weight.grad, GRADIENTS)

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(summed)  # type: ignore[no-untyped-call]
        with storages, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = loss_of(model, x, training.dtype)
            ledger.note()
            turn = len(ledger.moments)
            torch.autograd.backward(loss)
    return ledger.passes(turn)


@functools.lru_cache(maxsize=8)
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
    with fake, V.set_fake_mode(fake), attention_of(training.device_type):
        model, x = fake_model(training)
        machine.save_memory(model, training.saving)
        if training.copies:
            Copies(model, half(training.dtype)).lend()
        model.compile(backend=backend)
        torch.autograd.backward(loss_of(model, x, training.dtype))
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
    memory only if it is a reduction, if a kernel that is called as it is reads it, if the graph
    returns it, or if it is read after a further kernel, hence in another loop, and is no larger
    than what it was made of. A loop may write over an input that it is the last to read.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.base: dict[fx.Node, fx.Node] = {}  # whose memory a view looks at
        self.stage: dict[fx.Node, int] = {}  # kernels on the longest way to it
        self.readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            inputs = n.all_input_nodes
            self.base[n] = self.base[inputs[0]] if is_view(n) and inputs else n
            self.stage[n] = max((self.stage[a] + is_kernel(a) for a in inputs), default=0)
            if self.base[n] is n:
                for a in inputs:
                    self.readers[self.base[a]].append(n)
        self.returned = [o for o in tree_leaves(self.nodes[-1].args) if isinstance(o, fx.Node)]
        self.kept = {self.base[o] for o in self.returned}
        self.real: set[fx.Node] = set()
        reads: dict[fx.Node, set[fx.Node]] = {}  # values in memory, through those that are not
        last: dict[fx.Node, fx.Node] = {}
        for n in self.nodes:
            reads[n] = set()
            for a in (self.base[a] for a in n.all_input_nodes):
                reads[n] |= {a} if a in self.real or a.op == "placeholder" else reads[a]
            grown = bytes_of(n) > sum(map(bytes_of, reads[n]))
            later = (
                is_kernel(r) or (self.stage[r] != self.stage[n] and not grown)
                for r in self.readers[n]
            )
            whole = is_kernel(n) or n.target is operator.getitem or op_name(n) in REDUCTIONS
            computed = n.op == "call_function" and self.base[n] is n
            if computed and (whole or n in self.kept or any(later)):
                self.real.add(n)
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
                ledger.book(ledger.part_of(n.meta["val"], parts.get(n, WORKSPACE)), sign * nbytes)

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


def trace_compiled(training: Training) -> tuple[Tensor, Tensor]:
    """Moments of a micro-step of the compiled graph, as Ledger.passes."""
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
    ledger = Ledger(training.config)
    going.book(ledger, {s: ACTIVATIONS for s in saved.values() if s in batch}, set(), set())
    turn = len(ledger.moments)
    ledger.now = [0.0] * len(ledger.now)
    once = {s: n for n, s in saved.items()}  # several views of one memory count once
    parts = {n: ACTIVATIONS for s, n in once.items() if s in batch}
    parts |= dict.fromkeys(coming.kept, GRADIENTS)
    given = {*once.values(), *tangents}
    owned = {n for s, n in once.items() if s not in users}
    coming.book(ledger, parts, given, owned)
    return ledger.passes(turn)


@functools.lru_cache(maxsize=64)
def trace(training: Training) -> tuple[Tensor, Tensor]:
    """The moments of a training whose size is small enough to be traced as it is."""
    return (trace_compiled if training.compiled else trace_eager)(training)


def shallow(training: Training, layers: int) -> Training:
    """The same with other layers, and equal for all whose graphs are: they end at the gradients."""
    config = replace(training.config, num_hidden_layers=layers)
    accumulates = training.accumulates and not training.compiled
    alone = replace(training, config=config, accumulates=accumulates, optimizer="adamw")
    return replace(alone, ranks=1, shards=1, copying=training.copies)


@functools.lru_cache(maxsize=64)
def states(config: GPTConfig, optimizer: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of weights (and buffers), gradients and moments, all float32, and of an update's work.

    AdamW, fused, works in place; Muon's products, of the type that goes with `dtype`, do not.
    """
    with torch.device("meta"):
        model = GPT(config)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    n = 4 * num_parameters(model)
    groups = optim.groups_of(model, optimizer)
    work = [muon.workspace(g["params"], optim.muon_dtype(dtype)) for g in groups if "momentum" in g]
    found = {WEIGHTS: n + buffers, GRADIENTS: n, OPTIMIZER: 4 * optim.moments(groups)}
    return found | {WORKSPACE: sum(work)}


@functools.lru_cache(maxsize=64)
def copied(config: GPTConfig) -> int:
    """Numbers that run/copies.py has copies of."""
    with torch.device("meta"):
        return sum(m.weight.numel() for m in matrices_of(GPT(config)))


def deeper(shallow: Tensor, deep: Tensor, more: int) -> Tensor:
    """The moments of a pass that can be its peak, with `more` layers than the shallower of two.

    Both are (moments, 2 x parts), of depths that differ by one. The deeper has the moments of a
    layer more, beside those of its other layers: so what comes before is compared from the
    beginning and the rest from the end. There what is in use grows with each layer by the same
    amount, and in a layer between the two it lies between theirs.
    """
    n, layer = len(shallow), len(deep) - len(shallow)
    steps, deep_steps = shallow.diff(dim=0), deep.diff(dim=0)
    begin = (steps != deep_steps[: n - 1]).any(1).cumsum(0)  # steps before that are others
    end = (steps != deep_steps[layer:]).any(1).cumsum(0)
    others = begin + end[-1] - end  # wherever the further layer is thought to be
    fewest = (others == others.min()).nonzero().flatten()
    before = int(fewest[len(fewest) // 2]) + 1
    aligned = torch.cat([deep[:before], deep[before + layer :]])
    return shallow + more * (aligned - shallow)


def at_peak(training: Training, batch: int) -> dict[str, float]:
    """Bytes by part at the moment of a training step, of so many windows, when most are in use.

    The graph of a deep model is traced at two depths, and continued.
    """
    update = dict(states(training.config, training.optimizer, training.dtype))
    if training.copies:
        update[WEIGHTS] += training.dtype.itemsize * copied(training.config)
    fixed = dict(update, **{WORKSPACE: 0})
    if not training.accumulates:
        fixed[GRADIENTS] = 0  # the backward pass makes them
    layers = training.config.num_hidden_layers
    if layers <= max(LAYERS):
        passes = trace(shallow(training, layers))
    else:
        few, one_more = (trace(shallow(training, d)) for d in LAYERS)
        more = layers - LAYERS[0]
        passes = deeper(few[0], one_more[0], more), deeper(few[1], one_more[1], more)
    candidates = [dict.fromkeys(PARTS, 0.0) | update]
    for moments in passes:
        used = moments[:, : len(PARTS)] + batch * moments[:, len(PARTS) :]
        parts = dict(zip(PARTS, used[used.sum(1).argmax()].tolist(), strict=True))
        candidates.append({p: parts[p] + fixed.get(p, 0) for p in PARTS})
    return max(candidates, key=lambda parts: sum(parts.values()))
