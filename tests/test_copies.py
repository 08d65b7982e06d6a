"""Copies of the weights through an update: the same bits, and nothing left of them afterwards."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from model import GPT, GPTConfig
from plan import memory, report
from plan.memory import Training
from run import machine, microbatch
from run.agreement import Agreement
from run.copies import Copies, matrices_of
from run.evaluation import loss_sums
from run.optim import configure_optimizer
from run.saver import Saver
from run.start import TrainState
from run.stop import Stop, Stopped
from run.team import Team

SIZE = GPTConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
)
HALF = torch.bfloat16
CPU = torch.device("cpu")
AUTOCAST = machine.autocast(CPU, HALF)
FORMS = {
    "as it is": {},
    "norms and biases": {"qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "a head of its own": {"tie_word_embeddings": False},
    "dropout": {"dropout": 0.1},
}
HOW = {
    "all kept": lambda model: machine.save_memory(model, 0),
    "memory saved, and the loss in pieces": lambda model: machine.save_memory(model, 2),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Several add the embedding's gradient in any order, compiled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def tokens(n=2):
    return torch.randint(0, SIZE.vocab_size, (n, SIZE.max_position_embeddings))


def backward(model, ids, dtype=HALF, scaler=None):
    with machine.autocast(CPU, dtype):
        loss = model(ids, ids, loss_only=True)[1]
    (scaler.scale(loss / 3) if scaler else loss / 3).backward()
    return loss.item()


def trained(size, copied, backend="", first=None, how="all kept", dtype=HALF):
    """Losses and weights after three updates of three micro-steps. first: what is done before."""
    torch.manual_seed(0)
    model = GPT(size)
    HOW[how](model)
    optimizer = configure_optimizer(model, 1e-2, (0.9, 0.95), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    scale = scaler.get_scale()
    copies = Copies(model, dtype) if copied else None
    if backend:
        model.compile(dynamic=False, backend=backend)
    if first:
        first(model, copies)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        if copies:
            copies.lend()
        losses += [backward(model, tokens(), dtype, scaler) for _ in range(3)]
        if copies:
            copies.take_back()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale, "no update was left out"
        optimizer.zero_grad(set_to_none=True)
    return losses, dict(model.named_parameters())


def assert_same(found, expected):
    assert found[0] == expected[0]
    for (name, a), (same, b) in zip(found[1].items(), expected[1].items(), strict=True):
        assert name == same and a.dtype == torch.float32 and torch.equal(a, b), name


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_without_copies(form, how):
    size = replace(SIZE, **FORMS[form])
    assert_same(trained(size, True, how=how), trained(size, False, how=how))


def test_the_bits_of_scaled_float16_are_those_without_copies():
    found, expected = (trained(SIZE, copied, dtype=torch.float16) for copied in (True, False))
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_without_copies_compiled(form, how):
    """But for one, of which backward keeps other tensors, and so rounds others.

    That moves losses as much as compiling does, 0.003 here.
    """
    size = replace(SIZE, **FORMS[form])
    found = trained(size, True, "inductor", how=how)
    torch._dynamo.reset()
    expected = trained(size, False, "inductor", how=how)
    if form == "norms and biases" and how.startswith("memory saved"):
        assert found[0] == pytest.approx(expected[0], abs=0.005)
    else:
        assert_same(found, expected)


def test_lending_again_makes_no_other_graph():
    counter = CompileCounterWithBackend("aot_eager")
    assert_same(trained(SIZE, True, counter), trained(SIZE, False))
    assert counter.frame_count == 1


def test_what_is_copied():
    """The layers' matrices, and not the head, whose gradient in pieces is float32."""
    for tied in (True, False):
        model = GPT(replace(SIZE, tie_word_embeddings=tied))
        copies = Copies(model, HALF)
        assert len(copies.weights) == 7 * SIZE.num_hidden_layers
        copies.lend()
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        assert all((kind == HALF) == ("_proj" in name) for name, kind in kinds.items())
        copies.take_back()
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_backward_pass_that_failed_half_way_leaves_nothing():
    """Nor an update that was left: both would be added to the next one's gradients."""

    def fail(model, copies):
        def short(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        copies.lend()
        hook = model.layers[0].register_full_backward_hook(short)
        with pytest.raises(torch.OutOfMemoryError):
            backward(model, tokens())
        assert all(weight.grad is not None for weight in copies.weights[7:])
        copies.copies[0].grad = torch.ones_like(copies.copies[0])  # as autograd may leave it
        hook.remove()
        copies.take_back()
        model.zero_grad(set_to_none=True)

    assert_same(trained(SIZE, True, first=fail), trained(SIZE, False))


# --- in a run


@pytest.fixture
def micro(tmp_path):
    model = GPT(SIZE)
    optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    stop = Stop.__new__(Stop)  # takes no signals
    agreement = Agreement(Team(), stop, Saver(tmp_path, keep_last=2))
    agreement.asked = lambda: False
    agreement.reach = lambda short=False: None
    micro = microbatch.MicroBatch(4, 8, TrainState(), model, optimizer, agreement)
    micro.copies = Copies(model, HALF)
    return micro


def kinds(micro):
    return {m.weight.dtype for m in matrices_of(micro.model)}


@pytest.mark.parametrize("leaves", [None, Stopped, ValueError])
def test_a_try_lends_them_and_takes_them_back(micro, leaves):
    def work():
        for attempt in micro.attempts():
            with attempt:
                assert kinds(micro) == {torch.float32}
                for _ in attempt.steps():
                    assert kinds(micro) == {HALF}
                    if leaves:
                        raise leaves
        assert kinds(micro) == {torch.float32}

    if leaves:
        with pytest.raises(leaves):
            work()
    else:
        work()
    assert kinds(micro) == {torch.float32}


def test_a_try_that_is_short_of_memory(micro, capsys):
    """Uncompiled the copies stay, for they take nothing; compiled the least memory is without."""
    for compiled, kept in ((False, True), (True, False)):
        micro.compiled, micro.saving, micro.most_saving = compiled, 2, 3
        for i, attempt in enumerate(micro.attempts()):
            with attempt:
                for _ in attempt.steps():
                    if not i:
                        raise torch.OutOfMemoryError("CUDA out of memory.")
            assert kinds(micro) == {torch.float32}
        assert (micro.copies is not None) is kept
    assert micro.saving == micro.state.saving == 3 and micro.size == 2


def test_an_evaluation_with_them_finds_the_same_loss(micro):
    batches = [(ids, ids) for ids in (tokens(), tokens())]
    plain = loss_sums(micro.model, batches, AUTOCAST)
    for attempt in micro.attempts():
        with attempt:
            found = loss_sums(micro.model, attempt.checked(iter(batches)), AUTOCAST)
            assert kinds(micro) == {HALF}
    assert torch.equal(found, plain)


def losses_of(script, flags):
    result = script("train.py", *flags)
    assert result.code == 0, result.err
    (out,) = [f.partition("=")[2] for f in flags if f.startswith("--out_dir=")]
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    return [{k: v for k, v in r.items() if "loss" in k or "norm" in k} for r in records]


@pytest.mark.parametrize("how", [[], ["--deterministic=True", "--optimizer=muon"]])
def test_a_run_in_bfloat16_has_copies_and_the_same_numbers(script, tiny, monkeypatch, how):
    """Every figure of the log, and none in float32."""
    lent, real = [], Copies.lend
    monkeypatch.setattr(Copies, "lend", lambda copies: (lent.append(copies.dtype), real(copies)))
    flags = [*tiny, "--dtype=bfloat16", "--overwrite=True", *how]
    found = losses_of(script, flags)
    assert set(lent) == {HALF} and len(lent) > 12
    monkeypatch.setattr(Training, "copies", False)
    lent.clear()
    assert losses_of(script, flags) == found and found and not lent
    monkeypatch.undo()


def test_float32_has_none(script, tiny, monkeypatch):
    monkeypatch.setattr(Copies, "lend", lambda copies: pytest.fail("lent"))
    losses_of(script, tiny)


def test_which_runs_have_them():
    """One rank's, in 16 bits, where they take no memory or there is enough."""
    plain = Training(SIZE, HALF, "cuda", True, False, True)
    assert [replace(plain, saving=level).copies for level in range(4)] == [True, False, True, False]
    assert plain.levels == (0, 2, 3)
    half = replace(plain, saving=0, dtype=torch.float16)
    assert half.copies and half.levels == (0, 1)
    assert replace(half, device_type="mps").levels == (1,)
    assert replace(plain, compiled=False).copies
    by_layer = replace(plain, by_layer=True, copying=False)  # FSDP of one rank
    assert not by_layer.copies and by_layer.levels == (1,) and not by_layer.chooses
    on_cpu = replace(plain, device_type="cpu", saving=2)  # as after a resume
    assert not on_cpu.copies and on_cpu.levels == (1, 2)
    for other in (
        {"dtype": torch.float32},
        {"matmul_dtype": "int8"},
        {"ranks": 2},
        {"copying": False},
        {"checkpointing": True},
    ):
        without = replace(plain, saving=0, **other)
        assert not without.copies and without.levels == (0, 2)
        assert not replace(without, compiled=False).copies


@pytest.mark.slow
def test_copies_take_nothing_where_backward_would_keep_its_own():
    """As with two ranks, which have none."""
    size = replace(SIZE, hidden_size=256, intermediate_size=512)
    for compiled in (True, False):
        ours = Training(size, HALF, "cuda", compiled, False, True, saving=0)
        a, b = (sum(memory.at_peak(replace(ours, ranks=n), 128).values()) for n in (1, 2))
        assert a == pytest.approx(b, rel=0.01)


def test_the_update_that_a_plan_times_has_gradients(monkeypatch):
    """The weights' own, as in a run: without them an optimizer has nothing to do."""
    seen, real = [], nn.utils.clip_grad_norm_

    def clip(parameters, most):
        parameters = list(parameters)
        seen.append([p.grad is not None and p.dtype == torch.float32 for p in parameters])
        return real(parameters, most)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    training = Training(SIZE, HALF, "cpu", False, False, True)
    assert report.timed_step(training, torch.device("cpu"), 2, 4, repeats=1) > 0
    assert len(seen) == 2 and all(map(all, seen))
