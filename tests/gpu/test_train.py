"""Real runs of train.py, side by side in processes of their own (conftest.py has their flags)."""

import pytest
import torch

from formats.pack import tensors_in

from .conftest import BATCH, SIZES, UPDATES, WINDOWS
from .job import planned

pytestmark = pytest.mark.gpu

HALF = UPDATES // 2


# The jobs, by name: those that are named by a selected test start with the first one.


@pytest.fixture(scope="session")
def plain(jobs):
    return jobs["plain"]


@pytest.fixture(scope="session")
def eager(jobs):
    return jobs["eager"]


@pytest.fixture(scope="session")
def saving(jobs):
    return jobs["saving"]


@pytest.fixture(scope="session")
def short(jobs):
    return jobs["short"]


@pytest.fixture(scope="session")
def whole(jobs):
    return jobs["whole"]


@pytest.fixture(scope="session")
def halves(jobs):
    return jobs["halves"]


@pytest.fixture(scope="session")
def sharded(jobs):
    return jobs["sharded"]


def assert_compiled(run):
    """It was, and not again once the first update was over."""
    assert "compile  took" in run.out and "compile  failed" not in run.out
    graphs = [u["graphs"] for u in run.updates]
    assert graphs[0] >= 1 and set(graphs) == {graphs[0]}, "compiled again"
    assert run.updates[-1]["symbols"] == 0, "a size became a symbol"


def assert_close(found, wanted, updates, tolerance):
    """Losses of these updates."""
    assert [found[i] for i in updates] == pytest.approx([wanted[i] for i in updates], abs=tolerance)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["plain", "eager", "saving"])
def test_planned_memory_is_what_is_taken(only_cuda, request, name):
    """The plan decides whether a run fits and which batch is advised."""
    compiled, less = name != "eager", name == "saving"
    size = SIZES["cuda"]
    plan = planned(size, torch.bfloat16, compiled, less, BATCH, WINDOWS)
    run = request.getfixturevalue(name)[0]  # which has been at work meanwhile
    assert run.updates[4]["peak"] == pytest.approx(plan, rel=0.1)


def test_activation_checkpointing_takes_less(only_cuda, plain, saving):
    """It computes again, so it had better."""
    assert saving[0].updates[4]["peak"] < 0.95 * plain[0].updates[4]["peak"]


def test_out_of_memory_halves_the_batch_and_keeps_the_run(short, plain):
    """The compiler's own errors for it were taken for a failure to compile."""
    run = short[0]
    assert f"out of memory with batch_size={WINDOWS}" in run.out
    assert "going on with less kept for backward" in run.out, run.out
    assert f"going on with {BATCH} x 2 micro-steps" in run.out, run.out
    assert_compiled(run)
    assert_close(run.losses(), plain[0].losses(), range(4), 0.01)
    assert run.checkpoint(6)["train_state"]["micro_batch"] == BATCH


# ---------------------------------------------------------------- compiled


def test_compiled_training_learns_and_compiles_once(plain):
    """A graph for each of forward with gradients and without, none later; no silent eager run."""
    run = plain[0]
    assert_compiled(run)
    assert run.updates[0]["graphs"] == 2, run.out
    losses = run.losses()
    assert len(losses) == UPDATES and losses[UPDATES - 1] < losses[0] - 1


def test_compiled_and_eager_losses_agree(plain, eager):
    """A kernel that the compiler makes wrong, or casts that it leaves out."""
    assert_close(plain[0].losses(), eager[0].losses(), range(5), 0.02)


def test_activation_checkpointing_computes_the_same(plain, saving):
    """Compiled, the recomputed attention counts as random: the graph gets a generator's state."""
    assert_compiled(saving[0])
    assert_close(saving[0].losses(), plain[0].losses(), range(4), 1e-2)


# ---------------------------------------------------------------- number types


def test_an_infinite_gradient_is_left_out(eager, where):
    """The scale of float16's gradients must go down, weights stay, and the next update count."""
    run = eager[2]
    assert "step      3 | left out, not finite" in run.out
    losses = run.losses()
    assert len(losses) == 6 and losses[5] < losses[0]
    if where.type == "cuda":
        assert run.scales[3] == run.scales[2] / 2 and run.scales[5] == run.scales[3]
        assert run.checkpoint(6)["scaler"]["scale"] == run.scales[5]


# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize("name", ["plain", "eager"])
def test_a_resumed_run_goes_on_as_the_whole(request, name):
    """From the checkpoint in the middle, which was copied while the run went on."""
    first, second = request.getfixturevalue(name)[:2]
    assert f"at {HALF} updates" in second.out
    later = second.losses()
    assert sorted(later) == list(range(HALF, UPDATES))
    assert_close(later, first.losses(), later, 1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deterministic_resumed_run_is_the_same_bit_for_bit(whole, halves, compiled):
    """Atomics in backward, and kernels chosen by timing: each process compiles for itself."""
    first, second = whole[compiled], halves[2 * compiled + 1]
    assert "deterministic" in first.out and f"at {HALF} updates" in second.out
    if compiled:
        assert_compiled(first)
        assert_compiled(second)
    assert first.losses() == second.losses()
    for part in ("model", "optimizer"):
        a, b = (tensors_in(run.checkpoint(UPDATES)[part]) for run in (first, second))
        assert len(a) == len(b) > 10
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_sharded_run_on_one_rank_goes_on(sharded, eager):
    """NCCL, FSDP and checkpoints in parts."""
    first, second = sharded
    assert (first.folder / f"ckpt_{UPDATES}.shards").is_dir()
    assert f"at {HALF} updates" in second.out
    later = second.losses()
    assert sorted(later) == list(range(HALF, UPDATES))
    assert_close(later, first.losses(), later, 1e-3)
    assert_close(first.losses(), eager[0].losses(), range(4), 0.02)
