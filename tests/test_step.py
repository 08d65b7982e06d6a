"""What a training step costs by its structure: graphs, recompiles, memory kept, waits."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.decomposition import select_decomp_table

from model import GPT, GPTConfig
from text.batches import eval_batches, split_windows
from text.tokens import TokenData

SIZE = GPTConfig(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
B, T = 3, 32


def tokens():
    return torch.randint(0, SIZE.vocab_size, (B, T))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_for_training_and_one_for_evaluation(dataset):
    """No graph break (fullgraph would raise), and no recompile after the first step of each."""
    counter = CompileCounter()
    data = TokenData(dataset, "val", T, SIZE.vocab_size)
    model = torch.compile(GPT(SIZE), backend=counter, fullgraph=True)
    for _ in range(3):
        for _ in range(4):
            ids = torch.randint(SIZE.vocab_size, (B, T + 1), dtype=torch.int16)
            model(*split_windows(ids), loss_only=True)[1].backward()
        model.eval()
        with torch.no_grad():
            for x, y in eval_batches(data, 2 * B - 1, B, torch.device("cpu")):  # the last one short
                model(x, y, loss_only=True)
                assert x.stride() == y.stride() == (T + 1, 1), "as training has them"
        model.train()
    assert counter.frame_count == 2


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", torch.bfloat16), ("float32", None)])
def test_backward_keeps_no_float32_copy_of_the_logits(dtype, kept):
    """As inductor sees the graph: under autocast only bfloat16 logits, in float32 only one."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition

    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, example: make_boxed_func(graph.forward),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = torch.compile(GPT(SIZE), backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(tokens(), tokens())[1]
    loss.backward()
    (output,) = (n for n in graphs[0].graph.nodes if n.op == "output")
    nodes = {n for n in output.args[0] if isinstance(n, torch.fx.Node)}
    nodes = {n for n in nodes if n.target is not torch.ops.aten.alias.default}  # no copies
    large = [n.meta["val"] for n in nodes if n.meta["val"].numel() >= B * T * SIZE.vocab_size]
    assert [t.dtype for t in large] == [kept or torch.float32]


def test_the_uncompiled_backward_keeps_no_float32_copy_of_the_logits():
    kept = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with note, torch.autocast("cpu", torch.bfloat16):
        GPT(SIZE)(tokens(), tokens())
    large = {t.data_ptr(): t.dtype for t in kept if t.numel() >= B * T * SIZE.vocab_size}
    assert list(large.values()) == [torch.bfloat16]


def test_a_step_waits_for_the_device_once(script, tiny, waits):
    """One call for an update, logged or not."""
    counts = []
    for updates in (4, 10):
        waits.clear()
        more = [f"--max_iters={updates}", "--lr_decay_iters=12", "--eval_interval=100"]
        assert script("train.py", *tiny, *more, "--overwrite=True").code == 0
        counts.append(list(waits))
    assert len(counts[1]) - len(counts[0]) == 6, (counts[0], counts[1])
