"""What a GPU changes, on any machine: torch's own argument checks, fake tensors, injected errors.

A CPU build of torch has no GPU to ask, so what asks one (`torch.cuda.device_count` and the like) is
replaced, while the checks of arguments stay torch's. Models run on fake CUDA tensors, which have a
device, a type, shapes and strides, and no contents: all but backward works on them.

Every place in the source that tells a GPU from a CPU must be entered here on the GPU's side: a test
names the functions that it enters, is watched while it runs, and one more test compares the names
with what the source has.
"""

import ast
import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

import sample
from formats import checkpoint, pack
from making import compiled, scoring
from model import GPT, GPTConfig
from plan import fit, memory, report
from run import cards, compiling, int8, machine, microbatch, team
from run import script as scripts
from run.gpu import missing_kernels, unused_gpu
from run.machine import choose_attention
from run.start import TrainState
from text import batches
from text.batches import TrainLoader, TrainOrder, eval_batches, split_windows
from text.tokenizer import get_tokenizer
from text.tokens import TokenData

SIZE = GPTConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
CARD = "NVIDIA GeForce RTX 3090"
ROOMS = ("run", "text", "making", "formats", "plan", "data")  # bench has a test of its own
KINDS = {"cpu", "cuda"}
FEW = [(4, 4), (4, 1)]


# ---------------------------------------------------------------- where the source asks


class Sites(ast.NodeVisitor):
    """Conditions on the kind of device: (function, line, expression, its value on CUDA)."""

    def __init__(self, module):
        self.module, self.inside, self.found = module, [], []

    def visit_scope(self, node):
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    visit_FunctionDef = visit_ClassDef = visit_scope

    def add(self, node, on_cuda):
        expression = compile(ast.Expression(node), "<condition>", "eval")
        name = ".".join([self.module, *self.inside])
        self.found.append((name, node.lineno, expression, on_cuda))

    def visit_Compare(self, node):
        operator, sides = node.ops[0], [node.left, *node.comparators]
        named = {s.value for s in sides if isinstance(s, ast.Constant)} & KINDS
        if named and isinstance(operator, ast.Eq | ast.NotEq):
            self.add(node, (named == {"cuda"}) == isinstance(operator, ast.Eq))
        several = node.comparators[0]
        if isinstance(several, ast.Tuple) and isinstance(operator, ast.In | ast.NotIn):
            kinds = {e.value for e in several.elts if isinstance(e, ast.Constant)}
            if kinds & KINDS:
                self.add(node, ("cuda" in kinds) == isinstance(operator, ast.In))
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if node.attr in ("is_cpu", "is_cuda"):
            self.add(node, node.attr == "is_cuda")
        self.generic_visit(node)

    def visit_Call(self, node):
        if ast.unparse(node) == "torch.cuda.is_available()":
            self.add(node, True)
        self.generic_visit(node)


@cache
def sites():
    """By file and line, of all modules."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(p for r in ROOMS for p in ROOT.glob(f"{r}/*.py"))]:
        visitor = Sites(path.stem)
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        for name, line, expression, on_cuda in visitor.found:
            found.setdefault((str(path), line), []).append((name, expression, on_cuda))
    return found


def enters(*names):
    return pytest.mark.enters(*names)


@pytest.fixture(autouse=True)
def watched(request):
    """Fails a test that does not enter, on the GPU's side, all conditions of what it names."""
    names = {name for marker in request.node.iter_markers("enters") for name in marker.args}
    if not names or sys.platform != "linux":  # elsewhere there are no fake tensors on CUDA
        yield
        return
    left = {
        (place, i): f"{name}, line {place[1]}"
        for place, conditions in sites().items()
        for i, (name, _, _) in enumerate(conditions)
        if name in names
    }
    files = {path for (path, _), _ in left}
    assert left, f"no conditions in {names}"

    def look(frame, event, _):
        place = (frame.f_code.co_filename, frame.f_lineno)
        for i, (_, expression, on_cuda) in enumerate(sites().get(place, ())):
            if (place, i) in left and event == "line":
                with contextlib.suppress(Exception):  # a name that has no value yet
                    if bool(eval(expression, frame.f_globals, frame.f_locals)) == on_cuda:
                        left.pop((place, i))
        return look

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: look if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(before)
    assert not left, f"never entered for CUDA: {sorted(left.values())}"


def test_every_condition_on_the_device_is_entered_by_a_test():
    """A new branch on the kind of device needs a test here that names its function."""
    here = {name for conditions in sites().values() for name, _, _ in conditions}
    tests = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    named = {
        argument.value
        for call in ast.walk(tests)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "enters"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    assert len(here) > 15, "the search itself"
    assert here == named


# ---------------------------------------------------------------- a GPU that is not there


@pytest.fixture
def gpu(monkeypatch):
    """Two RTX 3090s, as far as questions go; what is set is in .current, arguments are checked."""
    index = torch.cuda._utils._get_device_index
    seen = types.SimpleNamespace(
        current=[], capability=(8, 6), archs=["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"]
    )

    def about(value):
        return lambda device=None: (index(device, optional=True), value())[1]

    total = types.SimpleNamespace(total_memory=24 * 2**30)
    for name, replacement in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_arch_list": lambda: seen.archs,
        "get_device_capability": about(lambda: seen.capability),
        "get_device_name": about(lambda: CARD),
        "get_device_properties": about(lambda: total),
        "mem_get_info": about(lambda: (23 * 2**30, 24 * 2**30)),
        "is_bf16_supported": lambda including_emulation=True: seen.capability >= (8, 0),
        "empty_cache": lambda: seen.current.append("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", seen.current.append, raising=False)
    return seen


FAKES = "torch._subclasses.fake_tensor"


@contextlib.contextmanager
def fake_cuda():
    """Fake tensors on "cuda", whose guard is the one of "meta", which does nothing."""
    if sys.platform != "linux":
        pytest.skip("reaches into libc10.so")
    lib = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(lib, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[1] = guards[1], guards[14]
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
            # the first fake tensor of torch 2.11 asks for the driver
            mock.patch(f"{FAKES}.init_gpu_context", lambda *_: None, create=True),
        ):
            yield
    finally:
        guards[1] = before


def fake_model(dtype=torch.float32, **sizes):
    """On the fake GPU; call it inside fake_cuda."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return GPT(replace(SIZE, **sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def fake_ids(*shape):
    return torch.zeros(shape, dtype=torch.int64, device="cuda")


# ---------------------------------------------------------------- devices


@enters("machine.select_device")
def test_a_gpu_has_an_index(gpu):
    """torch.cuda.set_device, real but for its last line, refuses a device without."""
    for name, index in {"auto": 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1}.items():
        device = machine.select_device(name)
        assert device == torch.device("cuda", index) and device.index == index, name
        torch.cuda.set_device(device)
        assert gpu.current == [index, index]
        gpu.current.clear()
        assert unused_gpu(name, device) == ""
    with pytest.raises(ValueError, match=r"cuda:0, cuda:1; write one .* --nproc_per_node=2"):
        machine.select_device("cuda:2")


def test_torch_refuses_a_device_without_an_index(gpu):
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))


@enters("batches.TrainLoader.__init__", "batches.host_tensor")
def test_the_prefetch_thread_starts_and_pins(gpu, dataset, monkeypatch):
    """With the device that select_device gives, for every spelling; its batches are pinned."""
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.shape) or self
    )
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, place, **how: t if place == device else real(t, place, **how)
    )
    device = None
    for name in ("auto", "cuda", "cuda:1"):
        device = machine.select_device(name)
        data = TokenData(dataset, "train", 16, 320)
        order = TrainOrder(data.tokens, 16, 64, 0)
        loader = TrainLoader(data, order, 0, 1, device)
        plain = TrainLoader(data, order, 0, 1, torch.device("cpu"))
        for step in range(3):  # the later ones come from the thread
            for mine, theirs in zip(loader.batch(step, 0, 4), plain.batch(step, 0, 4), strict=True):
                assert torch.equal(mine, theirs)
        x, y = next(eval_batches(data, 4, 2, device))
        assert x.shape == y.shape == (2, 16)
        loader.thread.shutdown()
        assert gpu.current[-1] == device.index and len(gpu.current) >= 2, "each thread has its own"
    assert len(pinned) >= 12


@enters("batches.split_windows")
@pytest.mark.parametrize(("narrow", "numpy"), [(torch.int16, "<u2"), (torch.int32, "<u4")])
def test_ids_are_widened_on_the_gpu_as_on_the_cpu(narrow, numpy):
    """The GPU's way, run on tensors that only say that they are elsewhere."""
    ids = np.array([[0, 1, 40_000, 65_535, 7]], dtype=numpy)

    class Elsewhere(torch.Tensor):
        is_cpu = False

    x, y = split_windows(torch.from_numpy(ids.view(f"i{ids.itemsize}")).as_subclass(Elsewhere))
    assert x.tolist() == ids[:, :-1].tolist() and y.tolist() == ids[:, 1:].tolist()
    with fake_cuda():
        x, y = split_windows(torch.zeros((2, 17), dtype=narrow, device="cuda"))
        assert x.dtype == y.dtype == torch.int64 and x.shape == (2, 16) and x.is_cuda


@enters("machine.select_dtype", "compiling.why_not_compile", "cards.card_of")
@enters("machine.describe", "machine.tune", "machine.release_memory")
@enters("fit.free_memory", "fit.room_of")
def test_what_is_asked_of_a_card(gpu, monkeypatch):
    device = machine.select_device("auto")
    assert machine.select_dtype("auto", device)[0] == torch.bfloat16
    assert machine.select_dtype("float16", device)[0] == torch.float16
    assert cards.peak_flops(device, torch.bfloat16) == 71e12
    assert cards.peak_flops(device, torch.float32) == 35.5e12, "TF32"
    assert machine.describe(device) == "NVIDIA GeForce RTX 3090, 24 GiB"
    assert fit.free_memory(device) == 23 * 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert fit.room_of(device) == 23 * 2**30, "less the reserve, and what the run holds"
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: object())
    assert compiling.why_not_compile(device) == ""
    machine.release_memory(device)
    assert gpu.current[-1] == "empty"
    before = torch.get_float32_matmul_precision()
    machine.tune(device)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)
    assert machine.select_dtype("auto", torch.device("mps"))[0] == torch.float32
    gpu.capability = (7, 5)
    assert machine.select_dtype("auto", device)[0] == torch.float16
    gpu.capability = (6, 1)
    assert "7.0" in compiling.why_not_compile(device)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert "triton" in compiling.why_not_compile(device)


@pytest.mark.parametrize(("name", "expected"), [("cuda:0", "high"), ("cpu", "highest")])
def test_tf32_is_for_cuda_alone(name, expected, monkeypatch):
    """On a CPU the same call changes how some of them multiply float32."""
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        machine.tune(torch.device(name))
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_training_on_a_cpu_leaves_float32_as_it_is(script, tiny):
    assert script("train.py", *tiny, "--max_iters=2").code == 0
    assert torch.get_float32_matmul_precision() == "highest"


@enters("team.Team.device", "team.join")
def test_ranks_have_their_own_gpu_and_nccl(gpu, monkeypatch):
    mine = team.Team(rank=1, ranks=2, local_rank=1, local_ranks=2, alone=False)
    assert [mine.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    for name, value in zip(team.VARIABLES, ("1", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    groups = []
    monkeypatch.setattr(team, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    monkeypatch.setattr(
        team.dist, "init_process_group", lambda backend, **_: groups.append(backend)
    )
    assert team.join(1).rank == 1 and groups == ["cpu:gloo,cuda:nccl"]


@enters("sharded.Writer.copy")
def test_parts_are_copied_to_pinned_memory_and_waited_for(monkeypatch):
    """When the tensors are on a GPU; a run on the CPU of such a machine leaves the GPU alone."""
    from formats import sharded

    calls = []

    class Stager:
        def __init__(self, pin_memory):
            calls.append(("pinned", pin_memory))

        def stage(self, tensors, non_blocking):
            calls.append(("stage", non_blocking))
            return tensors

    monkeypatch.setattr(sharded, "StateDictStager", Stager)
    monkeypatch.setattr(sharded.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sharded.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("wait", True)))
    state = {"optimizer": {"state": {}}, "model_args": {"tie_word_embeddings": True}}
    sharded.Writer().copy({**state, "model": {"w": torch.ones(2)}})
    assert calls == [("pinned", False), ("stage", False)]
    calls.clear()
    with fake_cuda():
        writer = sharded.Writer()
        for _ in range(2):
            writer.copy({**state, "model": {"w": torch.ones(2, device="cuda")}})
    assert calls == [("pinned", True), *[("stage", True), ("wait", True)] * 2]


# ---------------------------------------------------------------- a GPU that torch cannot use


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """A machine whose GPU NVIDIA's program knows and torch does not."""

    def set_up(card=f"{CARD}, 580.95.05\n", cuda=None, code=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
        said = subprocess.CompletedProcess([], code, stdout=card, stderr="")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return set_up


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, ["RTX 3090", "built without CUDA", "--torch-backend=auto torch==2."]),
        (
            {"card": f"{CARD}, 535.129.03\n", "cuda": "13.0"},
            ["535.129.03", "too old", "580", "--torch-backend=auto"],
        ),
        ({"cuda": "12.6"}, ["cannot use", "torch.cuda.init()"]),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told_of(refused, found, words):
    refused(**found)
    device = machine.select_device("auto")
    line = unused_gpu("auto", device)
    assert device.type != "cuda" and "\n" not in line
    assert not [word for word in words if word not in line], line
    assert unused_gpu("cpu", device) == "", "asked for"
    with pytest.raises(ValueError, match="device='cuda', but.*RTX 3090"):
        machine.select_device("cuda")


@pytest.mark.parametrize(
    "said",
    [
        "Failed to initialize NVML: Driver/library version mismatch",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
    ],
)
def test_a_driver_that_does_not_work_is_told_of(refused, said):
    refused(card=f"{said}\nmore\n", code=18, cuda="13.0")
    line = unused_gpu("auto", torch.device("cpu"))
    assert said in line and "restart" in line and "\n" not in line


def test_where_there_is_no_gpu_nothing_is_said(refused, monkeypatch):
    refused(card="No devices were found\n", code=6)  # a program without a card
    assert unused_gpu("auto", torch.device("cpu")) == ""
    refused()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert unused_gpu("auto", torch.device("cpu")) == ""
    refused()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert unused_gpu("auto", torch.device("cpu")) == ""


@enters("gpu.unused_gpu")
def test_a_card_without_kernels_is_told_of(gpu):
    """A V100 and a card of tomorrow."""
    for capability, words in {
        (7, 0): "--torch-backend=cu126",
        (11, 0): "--torch-backend=auto torch (in",
    }.items():
        gpu.capability = capability
        assert words in missing_kernels(0)
        device = machine.select_device("auto")
        assert device.type != "cuda" and CARD in unused_gpu("auto", device)
        with pytest.raises(ValueError, match="no kernels"):
            machine.select_device("cuda")
        assert unused_gpu("auto", torch.device("cuda", 0)) == ""


def test_a_usable_gpu_beside_one_without_kernels_is_taken(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(5, 2), (8, 6)][i])
    device = machine.select_device("auto")
    assert device == torch.device("cuda", 1) and unused_gpu("auto", device) == ""


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 1)])
def test_a_card_runs_the_kernels_of_its_generation(gpu, capability):
    gpu.capability = capability
    assert missing_kernels(0) == "" and machine.select_device("auto").type == "cuda"


def test_kernels_that_are_compiled_when_loaded_count(gpu):
    gpu.capability, gpu.archs = (11, 0), ["sm_90", "compute_90"]
    assert missing_kernels(0) == ""


@pytest.mark.parametrize("name", ["train.py", "sample.py", "evaluate.py"])
def test_scripts_say_it_loudly(script, tiny, tmp_path, refused, name):
    run = script("train.py", *tiny, "--max_iters=1", "--warmup_iters=0")
    assert run.code == 0 and "WARNING" not in run.out
    refused()
    args = {
        "train.py": [*tiny[:1], f"--out_dir={tmp_path / 'other'}", *tiny[2:], "--max_iters=1"],
        "sample.py": [f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=1", "--num_samples=1"],
        "evaluate.py": [f"--out_dir={tmp_path / 'out'}", tiny[0]],
    }[name]
    result = script(name, *args, "--warmup_iters=0" if name == "train.py" else "--device=auto")
    assert result.code == 0, result.err
    if name == "train.py":  # asked for a CPU
        assert "WARNING" not in result.out
        result = script(name, *args, "--warmup_iters=0", "--device=auto", "--overwrite=True")
    assert "built without CUDA" in result.out + result.err


# ---------------------------------------------------------------- the cards


def natural(card):
    """A10 before A40 before A100."""
    parts = re.split(r"(\d+)", card)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def test_every_card_can_be_planned_for_and_stands_in_order():
    names = [c.name for c in cards.CARDS]
    assert names == sorted(names, key=natural)
    peaks = {}
    for card in cards.CARDS:
        peaks.setdefault(cards.short_name(card.name), set()).add(card.tflops)
    assert all(len(found) == 1 for found in peaks.values()), "one speed, whatever the memory"
    for card in cards.CARDS:
        assert cards.find_card(card.name.replace(" ", "")) == card and card.memory >= 8
    assert cards.find_card("RTX4060Ti").memory == 8, "the smallest without a size"


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("NVIDIA RTX 6000 Ada Generation", 364.0), ("NVIDIA L40S", 362.0), ("NVIDIA A10G", None)]
    + [("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2), ("NVIDIA H200", 989.0), ("NVIDIA A10", 125.0)]
    + [("NVIDIA GeForce RTX 4090 D", 147.1), ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", None)],
)
def test_cards_by_the_names_that_drivers_give(card, tflops):
    name = cards.short_name(card)
    found = {c.tflops for c in cards.CARDS if cards.short_name(c.name) == name}
    assert found == ({tflops} if tflops else set())


# ---------------------------------------------------------------- out of memory


class Compilers(RuntimeError):
    """As torch._dynamo.exc.BackendCompilerFailed: the reason is inside, the text may hide it."""

    def __init__(self, inner):
        super().__init__("backend='inductor' raised:")
        self.inner_exception = inner


def accelerator(text, code):
    """As CUDA raises it: torch's type, whose text is what CUDA said."""
    error = torch.AcceleratorError(text, code)
    error.args = (text,)
    return error


def chained(inner):
    error = RuntimeError("Failed running call_function")
    error.__cause__ = inner
    return error


SHORT = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CUDA": accelerator("CUDA error: out of memory", 2),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    "CPU": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "Python": MemoryError(),
    "compiler": Compilers(torch.OutOfMemoryError("CUDA out of memory.")),
    "compiler, Triton": Compilers(RuntimeError("Triton Error [CUDA]: out of memory")),
    "chained": chained(Compilers(torch.OutOfMemoryError("CUDA out of memory."))),
}
OTHER = [
    accelerator("CUDA error: an illegal memory access was encountered", 700),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    Compilers(ImportError("no g++")),
    ValueError("out of memory with batch_size=1; use a smaller model"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
]


def test_every_way_to_say_that_memory_is_short():
    assert [name for name, error in SHORT.items() if not machine.is_oom(error)] == []
    assert [str(error) for error in OTHER if machine.is_oom(error)] == []
    loop = RuntimeError("a")
    loop.__cause__ = loop
    assert not machine.is_oom(loop) and not machine.is_oom(None)


def out_of_memory_above(windows, error, monkeypatch, grad=True):
    """The model's forward raises `error` for a micro-batch of more windows; sizes that it saw."""
    sizes, real = [], GPT.forward

    def forward(self, idx, *args, **kwargs):
        sizes.append(idx.size(0))
        if idx.size(0) > windows and torch.is_grad_enabled() >= grad:
            raise error
        return real(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", forward)
    return sizes


@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("CUDA", "compiler, Triton") else pytest.param(k, marks=pytest.mark.slow)
        for k in SHORT
    ],
)
def test_a_run_halves_whatever_says_it(script, tiny, monkeypatch, kind):
    sizes = out_of_memory_above(2, SHORT[kind], monkeypatch)
    result = script("train.py", *tiny, "--max_iters=2")
    assert result.code == 0, result.err
    assert "out of memory with batch_size=4" in result.out and "2 x 4 micro-steps" in result.out
    assert sizes.count(2) >= 8


@pytest.mark.parametrize("error", OTHER[:3], ids=["access", "resource", "compiler"])
def test_another_error_ends_the_run(script, tiny, monkeypatch, error):
    out_of_memory_above(2, error, monkeypatch)
    with pytest.raises(type(error)):
        script("train.py", *tiny, "--max_iters=2")


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a backend that keeps the shapes of each graph, and may run short.

    Of each graph: the windows of its batch, an int or a symbol, and whether it is a training one.
    """
    seen = types.SimpleNamespace(windows=[], error=None, at_call=False, above=0)
    real = torch.nn.Module.compile
    torch._dynamo.reset()

    def backend(module, inputs):
        ids = next(t for t in inputs if isinstance(t, torch.Tensor) and t.dtype == torch.int64)
        symbols = [s for s in inputs if isinstance(s, torch.SymInt)]
        seen.windows.append(symbols[0] if symbols else ids.size(0))
        short = seen.error is not None and int(ids.size(0)) > seen.above

        def call(*args):
            if short and seen.at_call:
                raise seen.error
            return module.forward(*args)

        if short and not seen.at_call:
            raise seen.error
        return call

    def compile(self, dynamic):
        assert dynamic is False
        real(self, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    with torch._dynamo.config.patch(recompile_limit=2):
        yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("at_call", [True, False], ids=["first called", "compiled"])
@pytest.mark.parametrize("kind", [pytest.param("torch", marks=pytest.mark.slow), "Triton"])
def test_short_of_memory_in_the_first_compiled_step(script, tiny, graphs, kind, at_call):
    """The run halves and stays compiled: uncompiled, the same batch needs more memory still.

    Each new size is compiled once for training and once for evaluation, with numbers for sizes.
    """
    graphs.error, graphs.at_call, graphs.above = SHORT[kind], at_call, 2
    result = script("train.py", *tiny, "--compile=True", "--max_iters=3")
    assert result.code == 0, result.err
    assert "out of memory with batch_size=4" in result.out and "compile  took" in result.out
    assert "failed" not in result.out
    assert all(type(n) is int for n in graphs.windows), graphs.windows
    assert graphs.windows == [4, 4, 2, 2], "the second with the loss in pieces"


def test_short_of_memory_less_is_kept_before_windows_are_halved(script, tiny, graphs, monkeypatch):
    """The first graph keeps all; the second, of as many windows, is another."""

    def none(micro):
        micro.saving, micro.most_saving = 0, 3

    graphs.error, graphs.above = SHORT["Triton"], 2
    monkeypatch.setattr(fit, "settle", lambda *given: none(given[3]))
    result = script("train.py", *tiny, "--compile=True", "--max_iters=3")
    assert result.code == 0, result.err
    kept = result.out.index("going on with less kept for backward; same tokens")
    assert kept < result.out.index("going on with 2 x 4 micro-steps")
    assert graphs.windows == [4, 4, 2, 2]
    (out,) = [f.partition("=")[2] for f in tiny if f.startswith("--out_dir=")]
    assert checkpoint.load(Path(out) / "ckpt_3.pt")["train_state"]["saving"] == 3


def test_a_size_that_is_halved_later_is_compiled_once(script, tiny, graphs, monkeypatch):
    """For training and for evaluation, with numbers for sizes; graphs of the old size are gone.

    Torch keeps a few graphs of a function only, here two, and is silent about the next.
    """
    calls, real = [], batches.TrainLoader.batch

    def batch(self, step, micro_step, size):
        calls.append(size)
        if len(calls) >= 12 and size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, step, micro_step, size)

    monkeypatch.setattr(batches.TrainLoader, "batch", batch)
    result = script("train.py", *tiny, "--compile=True")
    assert result.code == 0, result.err
    assert "going on with 2 x 4 micro-steps" in result.out
    assert all(type(n) is int for n in graphs.windows), graphs.windows
    assert graphs.windows == [4, 4, 2, 2]


def test_short_of_memory_in_an_evaluation_leaves_the_model_training(script, tiny, monkeypatch):
    """Dropout must be on again when the first step is tried again, and in all after it."""
    modes, real = [], GPT.forward

    def forward(self, idx, *args, **kwargs):
        if not self.training and idx.size(0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        modes.append((self.training, torch.is_grad_enabled()))
        return real(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    result = script("train.py", *tiny, "--compile=True", "--max_iters=2", "--dropout=0.1")
    assert result.code == 0 and "going on with 2 x 4" in result.out, result.err
    assert {training for training, grad in modes if grad} == {True}


@pytest.mark.parametrize("kind", SHORT)
def test_a_script_without_a_second_try_ends_in_a_line(capsys, kind):
    def main():
        raise SHORT[kind]

    with pytest.raises(SystemExit, match="1"):
        scripts.run(main)
    said = capsys.readouterr().err
    words = {"Python": "MemoryError", "chained": "Failed running", "compiler": "CUDA out of memory"}
    assert "out of memory: " in said and "; try a smaller" in said and said.count("\n") == 1
    assert words.get(kind, "") in said


class Tensorlike:
    """Stands for what a failed attempt has in memory."""


@pytest.mark.parametrize(
    "how",
    ["eager", "first called", "compiled", "in a circle", "backward", "backward of the rehearsal"],
)
def test_the_memory_of_the_attempt_that_failed_is_free_in_the_next(
    script, tiny, monkeypatch, graphs, how
):
    """An exception that is kept, by a name or by a circle, keeps the tensors of all its frames."""
    held, alive = [], []
    real = batches.TrainLoader.batch

    def batch(self, step, micro_step, size):
        if size > 2:
            mine = Tensorlike()  # a local of a frame of the traceback
            held.append(weakref.ref(mine))
            if how in ("eager", "in a circle"):
                error = torch.OutOfMemoryError("CUDA out of memory.")
                if how == "in a circle":
                    error.itself = error  # as Inductor's, which holds its own frame
                raise error
        else:
            alive.append([ref() is not None for ref in held])
        return real(self, step, micro_step, size)

    back = torch.autograd.backward

    def backward(loss, *args, **kwargs):
        if not alive:  # the first try; its graph hangs on the loss
            held.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        back(loss, *args, **kwargs)

    if how.startswith("backward"):
        monkeypatch.setattr(torch.autograd, "backward", backward)

        def batch(self, step, micro_step, size):
            if size <= 2:
                alive.append([ref() is not None for ref in held])
            return real(self, step, micro_step, size)

    monkeypatch.setattr(batches.TrainLoader, "batch", batch)
    released, release = [], microbatch.release_memory

    def note(device):
        released.append(device.type)
        release(device)

    monkeypatch.setattr(microbatch, "release_memory", note)
    if how in ("first called", "compiled"):
        graphs.error, graphs.at_call, graphs.above = SHORT["torch"], how == "first called", 2
    compiles = how in ("first called", "compiled", "backward of the rehearsal")
    flags = [f"--compile={compiles}"]
    result = script("train.py", *tiny, *flags, "--max_iters=1", "--warmup_iters=0")
    assert result.code == 0 and "going on with 2 x 4" in result.out, result.err
    assert held and released and not any(alive[0])


# ---------------------------------------------------------------- the same bits again


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deterministic_is_on_before_the_first_product_and_off_for_the_next_run(
    script, tiny, monkeypatch, compiled
):
    """What it does on a GPU, only a GPU shows (tests/gpu); a run on a CPU goes on as ever."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    states, real = [], GPT.__init__

    def init(self, config):
        inductor = sys.modules.get("torch._inductor.config")
        on = torch.are_deterministic_algorithms_enabled()
        fills = torch.utils.deterministic.fill_uninitialized_memory
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        states.append((on, bool(inductor and inductor.deterministic), fills, workspace))
        real(self, config)

    monkeypatch.setattr(GPT, "__init__", init)
    if compiled:
        compile = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda m, **how: compile(m, backend="aot_eager", **how)
        )
    tiny = [*tiny, f"--compile={compiled}", "--max_iters=4", "--checkpoint_interval=2"]
    assert "; deterministic" not in script("train.py", *tiny).out
    result = script("train.py", *tiny, "--overwrite=True", "--deterministic=True")
    assert result.code == 0 and "; deterministic" in result.out
    result = script("train.py", *tiny, "--overwrite=True")
    assert result.code == 0 and "; deterministic" not in result.out
    on, off = (True, True, False, ":4096:8"), (False, False)
    assert states[1] == on and states[0][:2] == states[2][:2] == off


# ---------------------------------------------------------------- the model on fake tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@enters("model.CrossEntropy.forward")
def test_forward_and_loss(dtype):
    """Under autocast, with the types and strides that a GPU gets; up to the first value read."""
    with fake_cuda():
        model = fake_model().train()
        device = torch.device("cuda", 0)
        x = fake_ids(3, 32)
        with machine.autocast(device, dtype), torch.no_grad():
            _, loss = model(x, x, loss_only=True)
            logits, _ = model(x, x)
            cache = model.new_cache(2, 32)
            assert model.prefill(fake_ids(2, 5), cache).dtype == dtype
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device == device
        assert logits.dtype == dtype == cache.keys[0].dtype
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        assert scaler.scale(loss).device == device
        made = fake_model(dtype=dtype).generate(fake_ids(2, 5), 4, temperature=0)
        assert made.shape == (2, 9) and made.is_cuda


@pytest.mark.parametrize("heads", [(16, 4), (4, 4), (4, 1)])
@pytest.mark.parametrize("padded", [True, False])
@enters("model.Attention.forward")
def test_a_mask_on_cuda_never_meets_grouped_heads(heads, padded):
    """No fused kernel of a GeForce card takes both; torch would multiply whole matrices."""
    calls, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **how):
        calls.append((attn_mask is not None, q.shape, k.shape, how["enable_gqa"]))
        return real(q, k, v, attn_mask=attn_mask, **how)

    with fake_cuda(), mock.patch.object(F, "scaled_dot_product_attention", attention):
        model = fake_model(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=16)
        lengths = torch.tensor([5, 7], device="cuda") if padded else None
        with torch.no_grad():
            model.generate(fake_ids(2, 7), 3, temperature=0, lengths=lengths)
            segments = torch.ones((2, 7), dtype=torch.int64, device="cuda")
            with mock.patch.object(torch.Tensor, "__bool__", lambda t: True):
                scoring.hidden_states(model, fake_ids(2, 7), fake_ids(2, 7), segments)
    masked = [(q, k, gqa) for mask, q, k, gqa in calls if mask]
    assert len(masked) == 2 * (2 + 1 + padded), "two layers: two tokens, the scores, the prompt"
    assert all(q[1] == k[1] and not gqa for q, k, gqa in masked)
    plain = [(q, k, gqa) for mask, q, k, gqa in calls if not mask]
    assert len(plain) == 2 * (not padded)
    assert all((q[1], k[1], gqa) == (*heads, heads[0] != heads[1]) for q, k, gqa in plain)


def strides_of(kernel, q, k, v):
    """Of the output of torch's fused attention on a GPU, by its shape function."""
    q, k, v = (t.to("meta") for t in (q, k, v))
    if k.size(1) != q.size(1) and kernel != "flash":
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    aten = torch.ops.aten
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v)[0].stride()
    if kernel == "efficient":
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0].stride()
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].stride()


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "transposed"])
@pytest.mark.parametrize(
    "heads", [(16, 4), *(pytest.param(h, marks=pytest.mark.slow) for h in FEW)]
)
def test_text_is_the_same_whatever_the_strides_of_attention(kernel, heads, monkeypatch):
    """Memory-efficient attention, of RTX 30 and 40, has its output's heads beside each other."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model = GPT(replace(SIZE, **sizes)).eval()
    x, lengths = torch.randint(0, 320, (2, 6)), torch.tensor([4, 6])
    expected = model.generate(x, 6, temperature=0, lengths=lengths)
    loss = model(x, x, loss_only=True)[1]
    real, found = F.scaled_dot_product_attention, set()

    def attention(q, k, v, **how):
        y = real(q, k, v, **how)
        if kernel == "transposed":
            return y.transpose(1, 2).contiguous().transpose(1, 2)
        strides = strides_of(kernel, q, k, v)
        found.add((tuple(y.shape), strides))
        return torch.empty_strided(y.shape, strides, dtype=y.dtype).copy_(y)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert torch.equal(model.generate(x, 6, temperature=0, lengths=lengths), expected)
    torch.testing.assert_close(model(x, x, loss_only=True)[1], loss)
    if kernel == "transposed":
        torch._dynamo.reset()
        plain = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, options, **how: plain(f, backend="aot_eager", **how)
        )
        assert compiled.compile_decode(model, 12) == ""
        assert torch.equal(model.generate(x, 6, temperature=0, lengths=lengths), expected)
        torch._dynamo.reset()
    if kernel == "efficient" and heads == (16, 4):
        assert ((2, 4, 4, 16), (256, 16, 64, 1)) in found, "a token's four heads, side by side"


@enters("compiled.use_huge_pages", "sample.prepare", "sample.main")
def test_a_model_for_text_goes_to_the_gpu_as_it_is(gpu, monkeypatch):
    """Neither layers for few rows nor large pages, which are a CPU's; int8 is refused."""
    monkeypatch.setattr(sample, "choose_attention", lambda model, number: "")
    moved = []
    monkeypatch.setattr(GPT, "to", lambda self, *to: moved.append(to))
    with fake_cuda():
        model = fake_model()
        sample.prepare(model, machine.Machine(torch.device("cuda", 0), torch.bfloat16, ""))
        assert moved == [(torch.device("cuda", 0), torch.bfloat16)]
        assert type(model.lm_head) is torch.nn.Linear
        compiled.use_huge_pages(model)
        assert model.embed_tokens.weight.is_cuda
    monkeypatch.setattr(sample, "quantize", "int8")
    with pytest.raises(ValueError, match="quantize must be int8, on a CPU"):
        sample.main()


@enters("compiled.compile_decode")
def test_a_row_times_a_weight_becomes_a_loop_of_the_gpu(monkeypatch):
    """Inductor makes it one where it tunes kernels; on a CPU the option is left out."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(how["options"]) or f)
    with fake_cuda():
        assert compiled.compile_decode(fake_model(), 40) == ""
    assert compiled.compile_decode(GPT(SIZE), 40) == ""
    assert [o.get("coordinate_descent_tuning", False) for o in asked] == [True, False]


@enters("sample.compile_for")
@pytest.mark.parametrize(
    ("cannot", "fails", "unrecorded", "said"),
    [
        ("", "", "", "done in 0 s, one CUDA graph of 3 MiB"),
        ("", "", "no room", "done in 0 s, no CUDA graph (no room)"),
        ("no triton", "", "", "not compiled (no triton), one CUDA graph of 3 MiB"),
        ("", "no luck", "", "failed, going on without (no luck), one CUDA graph of 3 MiB"),
        ("", "no luck", "no room", "without (no luck), no CUDA graph (no room)"),
    ],
)
def test_a_step_becomes_a_cuda_graph(cannot, fails, unrecorded, said, monkeypatch, capsys):
    """Compiled or not, and whatever fails is told."""
    asked, reserved = [], iter([2**20, 2**22])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("emptied"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
    monkeypatch.setattr(sample, "compile_decode", lambda *size: asked.append(size[1:]) or fails)
    monkeypatch.setattr(sample, "record_decode", lambda *size: asked.append(size[1:]) or unrecorded)
    with fake_cuda():
        assert sample.compile_for(fake_model(), 40, 3, cannot) == cannot or fails
    assert asked == [(40, 3)] * (not cannot) + ["emptied", (40, 3)]
    assert capsys.readouterr().err.endswith(said + "\n")


@enters("sample.answer")
def test_a_step_is_recorded_where_nothing_compiles(monkeypatch, capsys):
    """Windows has no Triton; without a GPU a line says so and nothing is tried."""
    given = []
    monkeypatch.setattr(sample, "compile", True)
    monkeypatch.setattr(sample, "why_not_compile", lambda device: "no triton")
    monkeypatch.setattr(sample, "prompts", lambda *all: iter([("ab", [97, 98], 2)]))
    monkeypatch.setattr(sample, "compile_for", lambda *all: given.append(all[1:]) or all[3])
    monkeypatch.setattr(sample, "stream", lambda *all, **how: iter([]))
    monkeypatch.setattr(torch, "Generator", mock.MagicMock())
    with fake_cuda():
        gpu_machine = machine.Machine(torch.device("cuda", 0), torch.bfloat16, "")
        sample.answer(fake_model(), get_tokenizer("bytes"), gpu_machine)
    assert given == [(64, 2, "no triton")] and "not compiled" not in capsys.readouterr().err
    cpu = machine.Machine(torch.device("cpu"), torch.float32, "")
    sample.answer(GPT(SIZE), get_tokenizer("bytes"), cpu)
    assert len(given) == 1 and "not compiled: no triton" in capsys.readouterr().err


def test_key_heads_are_copied_where_only_that_is_fused(monkeypatch):
    """torch's choice is asked on the GPU alone; here it answers as a GPU before Ampere does."""
    asked = []

    def choice(q, k, v, mask, dropout, causal, enable_gqa):
        asked.append((q.shape[1], k.shape[1], enable_gqa))
        return (SDPBackend.MATH if enable_gqa else SDPBackend.EFFICIENT_ATTENTION).value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    with fake_cuda():
        model = fake_model()
        assert choose_attention(model, torch.float16) == "efficient"
        assert asked == [(4, 2, True), (4, 4, False)]
        assert not model.layers[0].self_attn.grouped
        with torch.no_grad():
            assert model(fake_ids(1, 8))[0].shape == (1, 1, 320)


# ---------------------------------------------------------------- int8


@enters("int8.why_not", "int8.check")
def test_a_card_learns_in_int8_from_ampere_on_with_triton(gpu, monkeypatch, capsys):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(int8.importlib.util, "find_spec", lambda name: object())
    int8.check("int8", device, "auto")
    assert capsys.readouterr().out == "", "an RTX 3090 has four times the rate"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    int8.check("int8", device, "auto")
    assert "the A100 has 2 times the rate" in capsys.readouterr().out
    for name, known in (("NVIDIA GeForce RTX 3080 Laptop GPU", True), ("NVIDIA B200", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        int8.check("int8", device, "auto")
        assert ("the rate that a NVIDIA B200 has" in capsys.readouterr().out) != known
    monkeypatch.setattr(int8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton: pip install triton; leave it out"):
        int8.check("int8", device, "auto")
    int8.check("auto", device, "auto")
    gpu.capability = (7, 5)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 .*, not 7\.5; leave"):
        int8.check("int8", device, "auto")


@enters("int8.begin")
def test_the_tiles_of_each_product_are_chosen_before_the_first_step(gpu, monkeypatch, capsys):
    asked, real = set(), int8.int8_product

    def product(a, b, a_scale, b_scale, dtype):
        asked.add((len(b), a.size(1), dtype))
        return real(a, b, a_scale, b_scale, dtype)

    monkeypatch.setattr(int8, "int8_product", product)
    with fake_cuda():
        int8.begin("int8", fake_model(), torch.bfloat16)
    shapes = {(64, 64), (32, 64), (64, 32), (96, 64), (64, 96)}
    assert asked == {(n, k, torch.bfloat16) for n, k in shapes}
    assert gpu.current[-1] == "empty" and "tiles of 5 products chosen" in capsys.readouterr().out
    monkeypatch.setattr(int8, "int8_product", mock.Mock(side_effect=RuntimeError("no gcc")))
    with fake_cuda(), pytest.raises(ValueError, match="fails here .*no gcc.*; leave it out"):
        int8.begin("int8", fake_model(), torch.bfloat16)


def test_a_step_on_cuda_takes_int8_products():
    with fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        model = fake_model().train()
        int8.learn_in_int8(model)
        logits, loss = model(fake_ids(2, 16), fake_ids(2, 16))
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


# ---------------------------------------------------------------- plans, saving, compiling


@enters("cards.find_card", "memory.attention_of", "compiling.why_uncompiled")
def test_a_plan_for_cuda():
    """Traced as a GPU keeps it: the same with and without dropout, whose mask no kernel keeps."""
    training = memory.Training(SIZE, torch.bfloat16, "cuda", True, False, True)
    planned = sum(memory.at_peak(training, 4).values())
    assert planned > 0 and cards.find_card("cuda:1") is None
    lines = list(report.memory_lines(training, 4, 8, 23e9, "free memory"))
    assert "fits" in lines[-1] and "1.0 for what is not in the graph" in lines[-1]
    assert compiling.why_uncompiled("auto", torch.device("cuda", 0), 1.0, "") == ""
    assert "short" in compiling.why_uncompiled("auto", torch.device("cpu"), 1.0, "")


@enters("memory.Training.chooses", "memory.Training.levels")
def test_a_run_keeps_what_its_card_has_room_for(gpu, monkeypatch, capsys):
    """23 GiB are free, and no more is kept than 22 can hold."""
    where = machine.Machine(torch.device("cuda", 0), torch.bfloat16, "")
    monkeypatch.setattr(fit, "why_not_compile", lambda device: "")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    settings = {"compile": "auto", "activation_checkpointing": False, "optimizer": "adamw"}
    settings |= {"parallel": "ddp", "matmul_dtype": "auto"}

    def saved(needed, before=0, where=where, settings=settings, ranks=1, alone=True):
        """The level of a run of which one before the resume had `before`."""
        monkeypatch.setattr(fit, "peak", lambda *_: needed() * fit.GIB)  # or it traces
        micro = types.SimpleNamespace(model=GPT(SIZE), size=4, windows=8, copies=None)
        micro.state, micro.sharded = TrainState(saving=before), settings["parallel"] != "ddp"
        several = team.Team(ranks=ranks, local_ranks=ranks, alone=alone)
        fit.settle(settings, 1e9, where, micro, several)
        assert micro.state.saving == (before if micro.sharded else micro.saving)
        assert (micro.copies is None) == (not alone or micro.saving in (1, 3))
        return micro.saving

    assert saved(lambda: 22) == 0 and saved(lambda: 22.1) == 3
    assert saved(lambda: 22, before=2) == 2, "or a resumed run would differ"
    monkeypatch.setattr(team.Team, "most", lambda team, *n: n)
    assert saved(lambda: 22, alone=False) == 0, "torchrun with one process has DDP, too"
    assert saved(lambda: 22.1, alone=False) == 2, "which is all, without copies"
    shards = settings | {"parallel": "fsdp"}
    for ranks in (1, 2):
        for needed in (22, 23):
            found = saved(lambda n=needed: n, settings=shards, ranks=ranks, alone=False)
            assert found == 1, "each layer is compiled alone"
    assert saved(lambda: 1 / 0) == 3 and "ZeroDivisionError" in capsys.readouterr().out
    half = machine.Machine(torch.device("cuda", 0), torch.float16, "")
    assert saved(lambda: 22.1, before=2, where=half) == 1, "a sum over pieces could overflow"


@enters("fit.at_once")
def test_the_fastest_micro_batch_that_fits(monkeypatch):
    """A larger one spares fixed costs; not when it has to save memory, unless it is much larger."""

    def peak(training, batch, windows):  # or it traces
        copies = training.saving == 2
        return (4 + copies / 2 + batch / (2 if training.saving > 1 else 1)) * fit.GIB

    monkeypatch.setattr(fit, "peak", peak)
    training = memory.Training(GPTConfig(), torch.bfloat16, "cuda", True, False, True)

    def chosen(gib, training=training):
        return fit.at_once(training, 480, gib * fit.GIB)

    assert [chosen(gib) for gib in (3, 5, 6, 10, 16, 28)] == [1, 1, 3, 10, 20, 24]
    normed = replace(training, config=GPTConfig(qk_norm=True))
    assert chosen(16, normed) == 12, "saving costs more where norms are computed again"
    assert fit.at_once(training, 480, None) == 480
    assert chosen(6, replace(training, compiled=False)) == 2, "nothing is saved uncompiled"
    cpu = replace(training, device_type="cpu")
    assert [chosen(gib, cpu) for gib in (3, 6, 100)] == [1, 2, 16], "16,384 tokens are enough"


@enters("memory.uncompiled_on")
def test_the_plan_of_uncompiled_training_is_what_an_h200_took():
    """A norm keeps something else there than on a CPU, and the loss takes more rows at a time."""
    size = GPTConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    training = memory.Training(size, torch.bfloat16, "cuda", False, False, True)
    assert fit.peak(training, 8, 16) == pytest.approx(959_566_336, rel=0.01)


@pytest.mark.slow
def test_the_plan_of_the_reference_is_what_an_h200_took(monkeypatch):
    """All kept for backward, and with activation checkpointing; the rest is cuBLAS' buffers.

    There were no copies of the weights yet.
    """
    monkeypatch.setattr(memory.Training, "copies", False)
    whole = memory.Training(GPTConfig(), torch.bfloat16, "cuda", True, False, True, saving=0)
    assert fit.peak(whole, 12, 120) == pytest.approx(15_392_350_720, rel=0.01)
    saving = replace(whole, checkpointing=True)
    assert fit.peak(saving, 12, 120) == pytest.approx(6_991_135_232, rel=0.015)


@enters("report.timed_step.seconds", "report.plan")
def test_steps_of_a_plan_are_timed_after_the_device_is_done(gpu, monkeypatch):
    """However short; each time is taken when the GPU has finished, not when it has been asked."""
    device, waits = torch.device("cuda", 0), []

    class Small(GPT):
        def to(self, place):
            return self

    monkeypatch.setattr(report, "GPT", Small)
    idle = types.SimpleNamespace(step=lambda: None)  # a real one asks for the GPU's stream
    monkeypatch.setattr(report, "configure_optimizer", lambda *_: idle)
    monkeypatch.setattr(report, "memory_lines", lambda *_: ())  # fake tensors ask for a real GPU
    monkeypatch.setattr(report, "card_lines", lambda *_: ())
    monkeypatch.setattr(report, "smallest_change", lambda *_: "")
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, device: real(*args))
    monkeypatch.setattr(report, "autocast", lambda device, dtype: contextlib.nullcontext())
    training = memory.Training(SIZE, torch.float32, "cuda", False, False, True)
    lines = list(
        report.plan(
            training, device, None, 2, 256 // SIZE.max_position_embeddings, 10, TrainState()
        )
    )
    assert any("measured on a few micro-steps" in line for line in lines)
    assert waits == [device] * 4


def test_the_savers_copy_is_of_the_moment_it_was_asked():
    """Tensors that are elsewhere are whole and on the CPU when save returns; training goes on."""

    class Elsewhere(torch.Tensor):
        """Says that it is on a GPU."""

        @property
        def device(self):
            return torch.device("cuda", 0)

    packed = pack.Packed()
    weight = torch.arange(6.0).as_subclass(Elsewhere)
    copy = packed.copy({"model": {"w": weight, "tied": weight}, "step": 3})
    weight.as_subclass(torch.Tensor).add_(1)
    assert copy["model"]["w"].device.type == "cpu" and copy["step"] == 3
    assert copy["model"]["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["model"]["w"] is copy["model"]["tied"]


# ---------------------------------------------------------------- the tests that need a GPU


@pytest.mark.parametrize(
    "which", [["-k", "compiles_once"], pytest.param([], marks=pytest.mark.slow)]
)
def test_the_tests_of_a_gpu_run_on_a_cpu(which):
    """So that what fails on somebody's card is the card's, and not the tests' own code."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--device=cpu", *which]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
