"""A token's step as a CUDA graph, on a stand-in for CUDA's: what is recorded is played on a CPU.

Played again, a recorded call reads and writes the tensors of its first time, as a CUDA graph does.
"""

import contextlib

import pytest
import test_sampling_speed as speed
import torch
from test_sampling_speed import prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from making.compiled import compile_decode
from making.graphs import record_decode
from making.sampling import left_pad, stream


class Graph:
    """torch.cuda.CUDAGraph: the calls of a stretch, with the memory of what they took and gave."""

    made: list["Graph"] = []

    def __init__(self):
        self.calls, self.played, self.shared = [], 0, None
        Graph.made.append(self)

    def pool(self):
        return self.shared or self

    def replay(self):
        self.played += 1
        for call, args, kwargs, gave in self.calls:
            now = call(*args, **kwargs)
            for old, new in zip(tree_leaves(gave), tree_leaves(now), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """torch.cuda.graph."""

    def __init__(self, graph, pool=None, stream=None):
        super().__init__()
        self.graph = graph
        graph.shared, graph.stream = pool, stream

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        gave = call(*args, **(kwargs or {}))
        self.graph.calls.append((call, args, kwargs or {}, gave))
        return gave


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())


def model():
    return speed.model(max_position_embeddings=192)


def test_texts_are_those_of_the_plain_way():
    """One after the other, from one token on, past the context, padded; of other sizes, too."""
    plain, m = model(), model()
    assert record_decode(m, 100) == record_decode(m, 190, 3) == ""
    ids, lengths = left_pad([[1], [2, 3, 4], [5] * 9])
    for x, n, more in (
        *((prompt(7), 100, {}), (prompt(1), 90, {}), (prompt(60), 50, {})),
        *((prompt(7, 3), 400, {}), (ids, 170, {"lengths": lengths})),
        *((prompt(7, 2), 60, {}), (prompt(7), 150, {})),  # not recorded
    ):
        played = sum(g.played for g in Graph.made)
        wanted = plain.generate(x, n, temperature=0, **more)
        assert torch.equal(m.generate(x, n, temperature=0, **more), wanted)
        played = sum(g.played for g in Graph.made) - played
        if len(x) == 2 or n == 150:
            assert played == 0
        else:  # all tokens but those that follow a prompt or a new window
            assert n - 5 <= played <= n
    assert len(wanted.unique()) > 20, "texts that could not tell a difference"


def test_a_token_takes_one_launch_of_the_graph(monkeypatch):
    """And three copies into what it reads, one of the logits."""
    monkeypatch.setattr(Graph, "replay", lambda graph: None)
    m = model()
    assert record_decode(m, 100) == ""
    with torch.no_grad():
        cache = m.new_cache(1, 128)
        m.prefill(prompt(7), cache)
        tokens = prompt(1), torch.tensor([7]), torch.tensor([0])
        with Capture(Graph()) as seen:
            m.decode(tokens[0], tokens[1], cache, tokens[2])
    named = [call.overloadpacket.__name__ for call, *_ in seen.graph.calls]
    assert named == ["copy_"] * 3 + ["clone"]


def test_two_texts_at_a_time_do_not_share_a_cache():
    """The second goes the plain way; logits that are kept stay as they were."""
    plain, m = model(), model()
    assert record_decode(m, 100) == ""
    prompts = prompt(7), prompt(20)
    streams = [stream(m, x, 40, temperature=0) for x in prompts]
    made = torch.tensor([[int(a), int(b)] for a, b in zip(*streams, strict=True)])
    for i, x in enumerate(prompts):
        assert made[:, i].tolist() == plain.generate(x, 40, temperature=0)[0, x.size(1) :].tolist()
    assert Graph.made[0].played == 39
    with torch.no_grad():
        cache = m.new_cache(1, 128)
        assert all(not t.any() for t in cache.keys + cache.values), "left of an earlier text"
        given = torch.tensor([3]), cache, torch.tensor([0])
        first = m.decode(torch.tensor([[5]]), *given)
        kept = first.clone()
        m.decode(torch.tensor([[9]]), *given)
    assert torch.equal(first, kept)
    assert Graph.made[0].played == 41


def test_recorded_once_more_and_compiled_between(monkeypatch):
    """As sample.py does for each length: compile, record, compile, record."""
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    plain, m = model(), model()
    for length in (100, 180, 100):
        assert compile_decode(m, length) == record_decode(m, length) == ""
        x = prompt(7)
        wanted = plain.generate(x, length - 7, temperature=0)
        assert torch.equal(m.generate(x, length - 7, temperature=0), wanted)
    assert [g.played for g in Graph.made] == [92, 172, 92]
    assert Graph.made[1].pool() is Graph.made[2].pool() is Graph.made[0]
    assert len({g.stream for g in Graph.made}) == 1, "which those of one pool must share"


def test_a_graph_that_fails_leaves_the_model_as_it_was(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    plain, m, other = model(), model(), model()
    decode = m.decode
    assert record_decode(other, 100) == ""
    monkeypatch.setattr(torch.cuda, "graph", broken)
    assert record_decode(m, 100) == "RuntimeError: operation not permitted"
    assert record_decode(other, 190) == "RuntimeError: operation not permitted"
    assert m.decode == decode
    x = prompt(7)
    wanted = plain.generate(x, 60, temperature=0)
    for one in (m, other):
        assert torch.equal(one.generate(x, 60, temperature=0), wanted)
    assert not Graph.made[0].played, "a graph whose memory has been given back"


def test_a_graph_of_inference_mode_is_left_alone_outside():
    """Its tensors could not be written there."""
    plain, m, x = model(), model(), prompt(7)
    wanted = plain.generate(x, 60, temperature=0)
    with torch.inference_mode():
        assert record_decode(m, 100) == ""
        assert torch.equal(m.generate(x, 60, temperature=0), wanted)
    assert Graph.made[0].played == 59
    assert torch.equal(m.generate(x, 60, temperature=0), wanted)
    assert Graph.made[0].played == 59
    assert record_decode(m, 100) == ""
    with torch.inference_mode():
        assert torch.equal(m.generate(x, 60, temperature=0), wanted)
    assert Graph.made[1].played == 59
