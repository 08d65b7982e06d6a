"""What a trained model does on a GPU, texts, scores and checkpoints, against a CPU."""

import copy
import dataclasses
import json
import re
import threading
from unittest import mock

import numpy as np
import pytest
import torch

from formats import checkpoint, pack, rebuild
from making import compiled, scoring
from making.graphs import record_decode
from making.sampling import left_pad
from model import GPT, GPTConfig
from run.machine import choose_attention
from run.optim import configure_optimizer
from run.saver import Saver

pytestmark = pytest.mark.gpu

SIZE = GPTConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
NEW = 48  # tokens


@pytest.fixture(scope="module")
def model():
    """On the CPU, of weights so large that a text is not one token for ever."""
    torch.manual_seed(0)
    model = GPT(SIZE).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return model


@pytest.fixture
def there(model, where):
    """A copy on the device."""
    found = copy.deepcopy(model).to(where)
    choose_attention(found, torch.float32)
    return found


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(0)
    return [random.integers(0, 257, n).tolist() for n in (3, 30, 1, 17)]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A run's folder with the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"model": model.state_dict(), "model_args": dataclasses.asdict(SIZE)}
    state["tokenizer"] = {"name": "bytes", "vocab_size": 257, "json": None}
    checkpoint.save(folder / "ckpt_1.pt", state)
    return folder


def texts(model, prompts):
    """Greedy continuations of each prompt alone, (prompts, NEW)."""
    device = model.embed_tokens.weight.device
    rows = (torch.tensor([p], device=device) for p in prompts)
    return torch.cat([model.generate(row, NEW, temperature=0)[:, -NEW:] for row in rows]).cpu()


@pytest.fixture(scope="module")
def wanted(model, prompts):
    """The texts of the CPU."""
    found = texts(model, prompts)
    assert all(len(row.unique()) > 10 for row in found), "texts that could not tell a difference"
    return found


# ---------------------------------------------------------------- sampling


def test_greedy_texts_are_those_of_a_cpu(there, prompts, wanted):
    """Prefill, cache, mask and rotary tables on the device."""
    assert torch.equal(texts(there, prompts), wanted)


def test_a_batch_of_different_lengths_is_each_alone(there, prompts, wanted, where):
    """A padded position that is seen, or a row that takes another's place."""
    idx, lengths = left_pad(prompts)
    found = there.generate(idx.to(where), NEW, temperature=0, lengths=lengths.to(where))
    assert torch.equal(found[:, -NEW:].cpu(), wanted)


def test_compiled_texts_are_the_same(there, prompts, wanted, compiler):
    """A compiled token's step that keeps what belongs to an earlier text."""
    assert compiled.compile_decode(there, 64) == ""
    assert torch.equal(texts(there, prompts), wanted)


@pytest.mark.parametrize("compiles", [False, True])
def test_texts_of_a_cuda_graph_are_the_same(compiles, there, prompts, wanted, where, request):
    """One text and a batch of four, of a padded prompt each; a graph plays for all but a few."""
    if where.type != "cuda":
        pytest.skip("CUDA graphs are a GPU's")
    if compiles:
        request.getfixturevalue("compiler")
        assert compiled.compile_decode(there, 64) == compiled.compile_decode(there, 64, 4) == ""
    assert record_decode(there, 64) == record_decode(there, 64, 4) == ""
    played, real = [], torch.cuda.CUDAGraph.replay
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", lambda g: played.append(1) or real(g)):
        assert torch.equal(texts(there, prompts), wanted)
        assert len(played) >= len(prompts) * (NEW - 1)
        idx, lengths = left_pad(prompts)
        for _ in range(2):
            played.clear()
            found = there.generate(idx.to(where), NEW, temperature=0, lengths=lengths.to(where))
            assert torch.equal(found[:, -NEW:].cpu(), wanted) and len(played) == NEW - 1


def test_drawn_texts_come_again_with_their_seed(there, where):
    """The generator is the device's own."""

    def draw(seed):
        generator = torch.Generator(where).manual_seed(seed)
        start = torch.tensor([[5]], device=where)
        settings = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
        return there.generate(start, 20, 1.0, generator=generator, **settings).tolist()

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("compiles", [False, True])
def test_sample_prints_text(compiles, script, saved, where, request):
    """In the type of the card; grouped heads once failed at the second token."""
    args = [f"--out_dir={saved}", f"--device={where.type}", "--dtype=bfloat16", "--num_samples=2"]
    if compiles:
        request.getfixturevalue("compiler")
        args.append("--compile=True")
    seen = script("sample.py", *args, "--start=the cat", "--max_new_tokens=20")
    assert seen.code == 0, seen.err
    assert seen.out.count("the cat") == 2 and "bfloat16" in seen.err
    made = int(re.search(r"(\d+) tokens, \S+ tokens/s", seen.err)[1])
    assert made > 4 and len(seen.out) > 2 * len("the cat") + 40 + made / 4
    if compiles and where.type == "cuda":
        assert int(re.search(r"one CUDA graph of (-?\d+) MiB", seen.err)[1]) > 0


# ---------------------------------------------------------------- scores


def test_validation_loss_is_that_of_a_cpu(script, saved, dataset, where, tmp_path):
    """evaluate.py as a user runs it."""
    found = []
    for device in (where.type, "cpu"):
        args = ["--task=val", f"--out_dir={saved}", f"--dataset={dataset}", f"--device={device}"]
        seen = script("evaluate.py", *args, f"--out={tmp_path / 'out.json'}")
        assert seen.code == 0, seen.err
        found.append(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_scores_are_those_of_a_cpu(there, model):
    """Several answers in a row, texts of many lengths in a batch."""
    random = np.random.default_rng(0)

    def ids(n):
        return random.integers(0, 257, n)

    questions = [scoring.Question(ids(n), [ids(1 + n % 5), ids(4)]) for n in range(1, 40, 3)]
    questions += scoring.sliding(ids(500), 128, 64)
    mine, theirs = (scoring.score(m, questions, 257, 512) for m in (there, model))
    for a, b in zip(mine, theirs, strict=True):
        assert [s.greedy for s in a] == [s.greedy for s in b]
        likely = [s.loglikelihood for s in b]
        assert [s.loglikelihood for s in a] == pytest.approx(likely, rel=1e-4)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_of_the_step_it_was_asked_at(there, where, tmp_path, monkeypatch):
    """It is copied while the GPU is still busy, and written when training has gone on."""
    write, gone_on = checkpoint.save, threading.Event()

    def late(*args):
        assert gone_on.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "save", late)
    optimizer = configure_optimizer(there, 1e-2, (0.9, 0.95), 0.1)
    x = torch.randint(257, (4, 128), device=where)

    def update():
        there(x, x, loss_only=True)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    saver = Saver(tmp_path, keep_last=4)
    wanted = []
    for step in range(3):
        for _ in range(2):
            update()
        weights = {name: p.clone() for name, p in there.state_dict().items()}
        moments = {i: s["exp_avg"].clone() for i, s in optimizer.state_dict()["state"].items()}
        wanted.append((weights, moments))
        busy = torch.ones(1024, 1024, device=where)
        for _ in range(50 if where.type == "cuda" else 1):
            busy = busy @ busy
        state = {"model": there.state_dict(), "optimizer": optimizer.state_dict()}
        saver.wait()
        gone_on.clear()
        saver.save(step, {**state, "model_args": dataclasses.asdict(SIZE)})
        update()
        with torch.no_grad():
            for p in there.parameters():
                p.add_(1)
        gone_on.set()
    saver.wait()
    assert not saver.problem
    for step, (weights, moments) in enumerate(wanted):
        path = tmp_path / f"ckpt_{step}.pt"
        found = checkpoint.load(path)
        assert all(not t.is_cuda for t in pack.tensors_in(found))
        loaded = rebuild.load_model(path, found).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], t.cpu()) for name, t in weights.items())
        back = found["optimizer"]["state"]
        assert all(torch.equal(back[i]["exp_avg"], t.cpu()) for i, t in moments.items())
