"""Muon against a plain float64 reference, and what a run makes of it."""

import math
from dataclasses import replace

import pytest
import torch
from test_train import equal, records, weights
from torch.utils.flop_counter import FlopCounterMode

from formats import checkpoint
from model import GPT, GPTConfig, num_parameters
from run import muon
from run.optim import configure_optimizer, groups_of, moments, set_rate

SIZE = GPTConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=16,
    qk_norm=True,
    attention_bias=True,
)
RATES = 1e-2, (0.9, 0.95), 0.1
POLAR = (  # arXiv 2505.16932, before its margin of 1%
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def turned(matrix):
    """The polynomial of the paper on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (1.02 * s.square().sum().sqrt() + 1e-6)
    for a, b, c in POLAR:
        s = a / 1.01 * s + b / 1.01**3 * s**3 + c / 1.01**5 * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8)])
def test_a_matrix_is_turned_as_the_paper_does(shape):
    torch.manual_seed(0)
    given = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e5])[:, None, None]
    found = muon.orthogonal(given)
    want = torch.stack([turned(m) for m in given])
    torch.testing.assert_close(found[1:].double(), want[1:], rtol=2e-4, atol=2e-4)
    values = torch.linalg.svdvals(found[1:])
    assert values.max() < 1.2 and values.median() > 0.85
    assert shape == (24, 24) or values.min() > 0.8, (
        "but for a square one's smallest, all are near 1"
    )
    low = muon.orthogonal(given.bfloat16())
    assert low.dtype == torch.bfloat16 and (low[1:].double() - want[1:]).abs().max() < 0.1
    assert muon.orthogonal(torch.zeros(1, *shape)).eq(0).all()


def reference(params, matrices, gradients, own):
    """The updates of NorMuon's paper and of AdamW, in float64, one matrix at a time."""
    peak, (beta1, beta2), decay = RATES
    params = {name: p.detach().double().clone() for name, p in params.items()}
    means = {name: torch.zeros_like(p) for name, p in params.items()}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    for step, grads in enumerate(gradients, 1):
        for name, p in params.items():
            g = grads[name].double()
            rate = (own if name in matrices else peak) / step
            if p.dim() >= 2:
                p *= 1 - rate * decay
            if name in matrices:
                means[name] = 0.95 * means[name] + 0.05 * g
                update = turned(0.05 * g + 0.95 * means[name])
                squares[name] = 0.95 * squares[name] + 0.05 * (update**2).mean(1, keepdim=True)
                update = update / (squares[name].sqrt() + 1e-8)
                p -= rate * 0.2 * math.sqrt(p.numel()) / update.norm() * update
                continue
            means[name] = beta1 * means[name] + (1 - beta1) * g
            squares[name] = beta2 * squares[name] + (1 - beta2) * g**2
            mean, square = means[name] / (1 - beta1**step), squares[name] / (1 - beta2**step)
            p -= rate * mean / (square.sqrt() + 1e-8)
    return params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("at_once", "own"), [(2**25, 0.0), (3000, 3e-3), (1, 0.0)])
def test_updates_are_those_of_a_plain_reference(monkeypatch, tied, at_once, own):
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    torch.manual_seed(1)
    model = GPT(replace(SIZE, tie_word_embeddings=tied))
    params = dict(model.named_parameters())
    matrices = {n for n, p in params.items() if n.startswith("layers") and p.dim() == 2}
    assert len(matrices) == 7 * 3
    gradients = [{n: torch.randn_like(p) for n, p in params.items()} for _ in range(4)]
    want = reference(params, matrices, gradients, own or RATES[0])
    optimizer = configure_optimizer(model, *RATES, "muon", muon_lr=own)
    for step, grads in enumerate(gradients, 1):
        for name, p in params.items():
            p.grad = grads[name].clone()
        set_rate(optimizer, RATES[0] / step)
        optimizer.step()
        assert all(params[n].grad is None for n in matrices), "spent"
        optimizer.zero_grad(set_to_none=True)
    for name, p in params.items():
        torch.testing.assert_close(p.double(), want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_has_no_gradient_stays():
    model = GPT(SIZE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = configure_optimizer(model, *RATES, "muon")
    model.layers[1].self_attn.q_proj.weight.grad = torch.randn(32, 32)
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["layers.1.self_attn.q_proj.weight"]


def test_its_state_is_half_of_adamws():
    model = GPT(SIZE)
    inner = [p for p in model.layers.parameters() if p.dim() == 2]
    everything, fewer = num_parameters(model), sum(p.numel() - p.size(0) for p in inner)
    assert moments(groups_of(model, "adamw")) == 2 * everything
    assert moments(groups_of(model, "muon")) == 2 * everything - fewer
    optimizer = configure_optimizer(model, *RATES, "muon")
    x = torch.zeros(1, 8, dtype=torch.int64)
    model(x, x, loss_only=True)[1].backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
    assert sum(t.numel() for t in kept) == moments(optimizer.param_groups)


def test_under_a_loss_scale_an_update_that_is_not_finite_is_left_out():
    model = GPT(SIZE)
    optimizer = configure_optimizer(model, *RATES, "muon", torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.zeros(1, 8, dtype=torch.int64)
    for bad in (True, False):
        scaler.scale(model(x, x, loss_only=True)[1]).backward()
        if bad:
            model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        same = [torch.equal(p, before[n]) for n, p in model.named_parameters()]
        assert all(same) if bad else not any(same)
    assert scaler.get_scale() == 2.0


# --- in a run


def test_a_run_learns_and_saves_one_moment_of_the_matrices(script, tiny, tmp_path):
    result = script("train.py", *tiny, "--optimizer=muon", "--max_iters=40")
    assert result.code == 0, result.err
    first, *_, last = records(tmp_path, "val_loss")
    assert last < first - 0.5
    saved = checkpoint.load(tmp_path / "out" / "ckpt_40.pt")["optimizer"]
    assert {frozenset(state) for state in saved["state"].values()} == {
        frozenset({"momentum_buffer", "row_squares"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }


@pytest.mark.parametrize(("first", "then"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_goes_on_with_its_own_optimizer_alone(script, tiny, tmp_path, first, then):
    assert script("train.py", *tiny, f"--optimizer={first}").code == 0
    path = tmp_path / "out" / "ckpt_12.pt"
    before = weights(path)
    more = ["--init_from=resume", "--max_iters=14"]
    result = script("train.py", *tiny, *more, f"--optimizer={then}")
    assert result.code == 1 and result.err.count("\n") == 1
    for words in (f"--optimizer={first}", f"--init_from={path}", f"another optimizer than {then}"):
        assert words in result.err
    assert equal(weights(path), before)
    result = script("train.py", *tiny, *more, f"--optimizer={first}")
    assert result.code == 0, result.err
    new = [f"--init_from={path}", f"--out_dir={tmp_path / 'new'}", f"--optimizer={then}"]
    assert script("train.py", *tiny, *new).code == 0


def test_what_is_no_optimizer_and_no_schedule_is_told(script, tiny):
    result = script("train.py", *tiny, "--optimizer=sgd", "--lr_schedule=linear", "--decay_share=2")
    assert result.code == 1
    for words in ("adamw or muon, not 'sgd'", "cosine or wsd, not 'linear'", "at most 1, not 2"):
        assert words in result.err


def test_the_operations_of_an_update_are_those_that_are_counted():
    model = GPT(GPTConfig(64, 32, 80, 2, 2, 1, 16, 16))
    optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1, "muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    shapes = [p.shape for g in optimizer.param_groups for p in g["params"] if "momentum" in g]
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon.operations(shapes) == counter.get_total_flops() > 0
