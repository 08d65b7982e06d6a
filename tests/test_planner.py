"""The plan against what training really takes, and what it says of cards and machines."""

import os
from dataclasses import asdict, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import GPT, GPTConfig, num_parameters
from plan import fit, hours, memory, report
from plan.memory import Training
from run import cards, machine
from run.copies import Copies
from run.cost import flops_per_token
from run.optim import configure_optimizer, moments

SIZE = GPTConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
DRY = replace(SIZE, vocab_size=320, num_hidden_layers=2)  # what the dry runs below plan


def measured(training, batch):
    """Peak bytes of live CPU tensors in a second update of two micro-steps."""
    model = GPT(training.config)
    model.activation_checkpointing = training.checkpointing
    rates = 1e-3, (0.9, 0.95), 0.1
    optimizer = configure_optimizer(model, *rates, training.optimizer, training.dtype)
    copies = Copies(model, training.dtype) if training.copies else None

    def update():
        if copies:
            copies.lend()
        for _ in range(2 if training.accumulates else 1):
            x = torch.randint(
                0, training.config.vocab_size, (batch, training.config.max_position_embeddings)
            )
            with machine.autocast(torch.device("cpu"), training.dtype):
                loss = model(x, x, loss_only=True)[1]
            loss.backward()
            loss = loss.detach()
        if copies:
            copies.take_back()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        update()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, top = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    before = sum(b.nbytes for b in model.buffers()) + 4 * num_parameters(model)
    before += sum(c.nbytes for c in copies.copies) if copies else 0
    return before + 4 * moments(optimizer.param_groups) + top


@pytest.mark.parametrize(
    ("dtype", "dropout", "checkpointing", "accumulates", "batch"),
    [
        (torch.float32, 0.0, False, True, 1),
        (torch.float32, 0.1, True, True, 8),
        (torch.bfloat16, 0.0, False, False, 4),
    ],
)
def test_planned_memory_is_what_an_eager_update_takes(
    dtype, dropout, checkpointing, accumulates, batch
):
    size = replace(SIZE, dropout=dropout)
    training = Training(size, dtype, "cpu", False, checkpointing, accumulates)
    parts = memory.at_peak(training, batch)
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(measured(training, batch), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 8])
def test_planned_memory_with_muon(dtype, batch):
    """One moment of the blocks' matrices, and room for its products where that is the peak."""
    training = Training(replace(SIZE, vocab_size=64), dtype, "cpu", False, False, True, "muon")
    parts = memory.at_peak(training, batch)
    assert sum(parts.values()) == pytest.approx(measured(training, batch), rel=0.05)
    adamw = memory.at_peak(replace(training, optimizer="adamw"), batch)
    assert parts[memory.OPTIMIZER] < 0.6 * adamw[memory.OPTIMIZER]


def test_planned_memory_where_the_vocabulary_is_most_of_it():
    """The uncompiled loss then makes most of the moments of backward, while all layers are kept."""
    size = replace(SIZE, vocab_size=50304, max_position_embeddings=256)
    training = Training(size, torch.float32, "cpu", False, False, False)
    planned = sum(memory.at_peak(training, 2).values())
    assert planned == pytest.approx(measured(training, 2), rel=0.02)


def test_planned_memory_of_the_compiled_graph():
    """Less than eager, more than the parts that are known; checkpointing keeps less."""
    plain = Training(DRY, torch.bfloat16, "cuda", True, False, True)
    eager, saving = replace(plain, compiled=False), replace(plain, checkpointing=True)
    e, p, s = (memory.at_peak(t, 8) for t in (eager, plain, saving))
    logits = 2 * 8 * DRY.max_position_embeddings * DRY.vocab_size
    assert 16 * num_parameters(GPT(DRY)) + logits < sum(p.values()) < sum(e.values())
    assert s[memory.ACTIVATIONS] < 0.5 * p[memory.ACTIVATIONS]


def test_memory_grows_with_batch_and_never_with_checkpointing():
    eager = Training(SIZE, torch.float32, "cpu", False, False, True)
    saving = Training(SIZE, torch.float32, "cpu", False, True, True)
    sums = [sum(memory.at_peak(eager, b).values()) for b in (1, 2, 4, 8)]
    assert sums == sorted(sums)
    assert sum(memory.at_peak(saving, 8).values()) < sums[-1]


def test_a_deeper_pass_has_its_peak_where_the_layers_have_it():
    """A layer's backward pass, written out, gives 5 up, keeps 3, and takes work on the way."""

    def moments(layers):
        steps = [7.0, 100, -100, *[2.0, 20, -20, -5, 3 - 2] * layers, 4.0]
        return 5 * layers + torch.tensor(steps, dtype=torch.float64).cumsum(0)[:, None]

    for layers in (5, 12):
        found = memory.deeper(moments(3), moments(4), layers - 3)
        assert found.max() == moments(layers).max()
        assert found[[0, -1]].equal(moments(layers)[[0, -1]])


@pytest.mark.slow
@pytest.mark.parametrize("matmul_dtype", ["auto", "int8"])
def test_planned_memory_is_that_of_the_whole_graph(matmul_dtype, monkeypatch):
    """Seven layers continued from a few, and traced as they are; recomputed, loss in pieces."""
    size = replace(SIZE, vocab_size=512, num_hidden_layers=7)  # int8 has no copies
    training = Training(size, torch.bfloat16, "cuda", True, True, True, saving=2)
    training = replace(training, matmul_dtype=matmul_dtype)
    found = [memory.at_peak(training, batch) for batch in (1, 80, 160)]
    monkeypatch.setattr(memory, "LAYERS", (7, 8))
    assert found == [memory.at_peak(training, batch) for batch in (1, 80, 160)]


def test_the_smallest_change_that_fits():
    training = Training(SIZE, torch.float32, "cpu", False, False, True)
    full = fit.peak(training, 8, 24)
    assert fit.smallest_change(training, 8, 24, full) == ""
    assert fit.smallest_change(training, 8, 24, full - 1) == "--batch_size=6"
    one = fit.peak(training, 1, 24)
    change = fit.smallest_change(training, 8, 24, one - 1)
    assert change.startswith("--activation_checkpointing=True --batch_size=")
    assert "num_hidden_layers" not in change
    least = fit.peak(replace(training, checkpointing=True), 1, 24)
    less = fit.smallest_change(training, 8, 24, least - 1)
    assert "--num_hidden_layers=" in less
    assert "smaller hidden_size" in fit.smallest_change(training, 8, 24, 1000)
    assert fit.peak(training, 8, 24) == full  # asking changes no answer


@pytest.mark.parametrize(
    ("name", "found", "gib"),
    [("RTX3090", "RTX 3090", 24), ("rtx-3090-ti", "RTX 3090 Ti", 24), ("a100", "A100 40GB", 40)]
    + [("A100-80GB", "A100 80GB", 80), ("NVIDIA GeForce RTX 4090", "RTX 4090", 24)],
)
def test_cards_by_name(name, found, gib):
    card = cards.find_card(name)
    assert (card.name, card.memory) == (found, gib)


def test_every_card_has_a_peak_and_other_names_are_refused():
    assert all(card.peak(card.half) > 1e13 for card in cards.CARDS)
    assert all(cards.find_card(n) is None for n in ("auto", "cpu", "mps", "cuda", "cuda:1"))
    with pytest.raises(ValueError, match=r"RTX9999.*RTX3090"):
        cards.find_card("RTX9999")


def test_hours_and_speed_of_a_step():
    (line, speed) = report.time_lines(21.6, 491520, 1.04223e15, 15000, "so")
    assert line.split()[1] == "90.0" and speed == "  22,756 tokens/s, 48.25 TFLOP/s: so"


def test_ring_all_reduce():
    """Two cards send all bytes once; many cards, twice; the slowest link counts."""
    card = cards.Card("RTX 3090", 71.0, 24, 936, link=10e9, network=1e9)
    assert hours.ring_seconds(1e9, 1, card) == 0
    assert hours.ring_seconds(1e9, 2, card) == pytest.approx(0.1)
    assert hours.ring_seconds(1e9, 8, card) == pytest.approx(0.175)
    assert hours.ring_seconds(1e9, 64, card) == pytest.approx(2 * 63 / 64)


DRY_RUN = [f"--{name}={value}" for name, value in asdict(DRY).items()]
DRY_RUN += ["--dry_run=True", "--compile=False", "--tokens_per_step=1024", "--batch_size=4"]
DRY_RUN += ["--max_iters=10", "--warmup_iters=0"]


def test_dry_run_on_this_machine(script, dataset, tmp_path):
    out = tmp_path / "out"
    seen = script("train.py", *DRY_RUN, f"--dataset={dataset}", f"--out_dir={out}", "--device=cpu")
    assert seen.code == 0, seen.err
    for word in ("parameters", "epochs", "FLOP", "workspace", "fits", "measured", "hours", "disk"):
        assert word in seen.out
    assert not out.exists()


def test_dry_run_without_data_for_a_card_that_is_not_here(script, tmp_path):
    gone = f"{tmp_path}{os.sep}nothing"
    args = [*DRY_RUN, f"--dataset={gone}", f"--out_dir={tmp_path}/out", "--device=RTX3090"]
    seen = script("train.py", *args, "--world_size=4", "--activation_checkpointing=True")
    assert seen.code == 0, seen.err
    assert "not there yet" in seen.out and "nothing timed" in seen.out and "NVIDIA" not in seen.out
    rows = [line.split() for line in seen.out.splitlines() if "efficiency" not in line]
    assert [r[0] for r in rows if r and r[0] in ("1", "2", "4")] == ["1", "2", "4"]
    assert not list(tmp_path.iterdir())


def test_the_verdict_of_several_cards_is_theirs(script, tmp_path, monkeypatch):
    """DDP's buckets are counted, and shards fit where whole models do not."""
    training = Training(DRY, torch.bfloat16, "cuda", False, False, True, ranks=4)
    shards = replace(training, shards=4)
    ddp, fsdp, one = (fit.peak(t, 1, 8) for t in (training, shards, replace(training, ranks=1)))
    assert fsdp < one < ddp and ddp - one == 4 * num_parameters(GPT(DRY))
    assert fsdp < fit.peak(replace(shards, shards=2), 1, 8), "hsdp of two machines"
    room = (ddp + fsdp) / 2
    with monkeypatch.context() as patched:
        patched.setattr(fit, "peak", lambda t, *_: fsdp if t.shards > 1 else ddp)
        assert fit.smallest_change(training, 1, 8, room) == "--parallel=fsdp --batch_size=1"
        half = replace(training, dtype=torch.float16)
        assert "fsdp" not in fit.smallest_change(half, 1, 8, room), "which takes no float16"
        assert fit.smallest_change(shards, 1, 8, room) == ""
    args = [*DRY_RUN, f"--dataset={tmp_path}/none", f"--out_dir={tmp_path}/out", "--device=RTX3090"]
    fsdp = [*args, "--world_size=2", "--parallel=fsdp", "--batch_size=2"]
    seen = script("train.py", *fsdp)
    assert seen.code == 0, seen.err
    assert "on each of 2 cards, of which 2 share a model," in seen.out
    assert "gathered layers" in seen.out and "DDP's buckets" not in seen.out
    assert "(2 x 64 x 4 micro-steps x 2 cards)" in seen.out
    for wrong, word in (("--dtype=float16", "float16"), ("--sample_prompt=a", "sample_prompt")):
        seen = script("train.py", *fsdp, wrong)
        assert seen.code == 1 and word in seen.err, "as the run itself"


def test_how_a_run_is_shared_out():
    settings = {"compile": "False", "activation_checkpointing": False, "optimizer": "adamw"}
    settings["matmul_dtype"] = "auto"
    here = machine.Machine(torch.device("cpu"), torch.float32, "")
    shards = {
        parallel: fit.training_of(
            settings | {"parallel": parallel}, DRY, here, 0.0, "", 8, 4
        ).shards
        for parallel in ("ddp", "fsdp", "hsdp")
    }
    assert shards == {"ddp": 1, "fsdp": 8, "hsdp": 4}


def test_a_plan_beyond_the_calendar(script, dataset, tmp_path):
    args = [*DRY_RUN, f"--dataset={dataset}", f"--out_dir={tmp_path}/out", "--device=RTX3090"]
    seen = script("train.py", *args, "--max_iters=99999999999999999")
    assert seen.code == 1 and "beyond the calendar" in seen.out
    assert "GB of log" in seen.err and "a larger --log_interval" in seen.err


def test_a_dry_run_that_does_not_fit_says_what_does(script, tmp_path, monkeypatch):
    room = fit.peak(Training(DRY, torch.bfloat16, "cuda", False, False, True), 2, 16)
    monkeypatch.setattr(fit, "RESERVE", {"cuda": 24 * fit.GIB - room})
    args = [*DRY_RUN, f"--dataset={tmp_path}/none", f"--out_dir={tmp_path}/out", "--device=RTX3090"]
    seen = script("train.py", *args)
    assert seen.code == 1
    assert "DOES NOT FIT" in seen.out and "hours" in seen.out
    assert "smallest change that fits: --batch_size=2\n" in seen.err


def test_the_rate_of_a_card_is_its_types():
    """float32 is TF32, at half the rate; a card without it has an eighth, and so in bfloat16."""
    rates = [[cards.find_card(n).peak(t) for t in TYPES] for n in ("RTX3090", "V100-16GB")]
    assert rates == [[71e12, 35.5e12], [15.625e12, 15.625e12]]
    assert cards.find_card("V100-16GB").peak(torch.float16) == 125e12


TYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("name", "near"), [("RTX3099", "RTX3090"), ("rtx 4080ti", "RTX4080"), ("H10", "H100")]
)
def test_a_card_with_a_slip_in_its_name(name, near):
    with pytest.raises(ValueError, match=f"no card .* near: .*{near}") as error:
        cards.find_card(name)
    assert str(error.value).count(",") < 6


def test_a_plan_of_a_resumed_run_is_for_what_is_left(script, tiny):
    """In the demo's size on a card: not all updates, and TF32 where the run is in float32."""
    assert script("train.py", *tiny, "--max_iters=6").code == 0
    flags = [*tiny, "--init_from=resume", "--dry_run=True", "--device=RTX3090"]
    result = script("train.py", *flags)
    assert result.code == 0, result.err
    assert "resumed  at 6 updates; 6 are left" in result.out and "hours for 6 updates" in result.out
    assert "ms at 74% of 35.5 TFLOP/s" in result.out
    assert "more than products so small reach" in result.out and "waits for the CPU" in result.out
    result = script("train.py", *flags, "--init_from=scratch", "--dtype=bfloat16", "--world_size=2")
    assert "hours for 12 updates" in result.out and "ms at 74% of 71 TFLOP/s" in result.out


def test_what_is_known_of_a_cards_speed():
    """Only of the type in which it was measured; a card of the same chip is not another guess."""
    half, whole = torch.bfloat16, torch.float32
    h200, h100, pcie, new = (cards.find_card(n) for n in ("H200", "H100", "H100PCIe", "RTX4090"))
    assert "measured" in cards.reach_of(h200, half).bandwidth_source
    assert cards.reach_of(h100, half).bandwidth_source == "assumed"
    reached = [c.peak(half) * cards.reach_of(c, half).products for c in (h200, h100, pcie)]
    assert reached[0] == reached[1] > reached[2], "the slower clock"
    assert cards.reach_of(new, half) == cards.GUESS
    assert cards.reach_of(h200, whole).source == "a guess"
    assert all(100 < c.gb_per_s < 10_000 for c in cards.CARDS)


def test_the_time_of_a_plan():
    """FLOP are flops_per_token's, but for the half of the scores that attention leaves out.

    Bytes count where they are many, and the CPU where the GPU has little to do.
    """
    card, size = cards.find_card("RTX3090"), replace(DRY, num_hidden_layers=3)
    small = Training(size, torch.bfloat16, "cuda", True, False, True)

    def seconds(batch=64, card=card, layers=3, **more):
        config = replace(size, num_hidden_layers=layers)
        return hours.micro_step(replace(small, config=config, **more), batch, card)

    scores = 12 * 3 * size.num_attention_heads * size.head_dim * size.max_position_embeddings
    products, peak = flops_per_token(GPT(size)) - scores, card.peak(torch.bfloat16)
    tokens, reach = 64 * size.max_position_embeddings, cards.reach_of(card, torch.bfloat16)
    calm = replace(card, gb_per_s=1e9)
    halves = scores / 2 * (1 / 3 + 5 / 6 / cards.BACKWARD)
    for saving in (0, 1, 3):
        times = seconds(card=calm, saving=saving)
        assert times.products * reach.products * peak == pytest.approx(tokens * products, rel=1e-6)
        assert times.attention * reach.attention * peak == pytest.approx(tokens * halves, rel=1e-6)
    assert seconds(1).waits and not seconds(4096).waits
    assert seconds(4096).loops == pytest.approx(2 * seconds(2048).loops, rel=0.01)
    half = replace(card, gb_per_s=card.gb_per_s / 2)
    assert seconds(4096, half).loops == pytest.approx(2 * seconds(4096).loops)
    three, four, eight = (seconds(4096, layers=n).loops for n in (3, 4, 8))
    assert eight - four == pytest.approx(4 * (four - three))
    assert seconds(4096, saving=0).loops < seconds(4096).loops
    assert seconds(4096, checkpointing=True).products > 1.2 * seconds(4096).products
    adamw, muon = (hours.update(replace(small, optimizer=n), 4096, 2, card) for n in OPTIMIZERS)
    assert 2 * seconds(4096).total < adamw < muon
    assert hours.update(replace(small, compiled=False), 4096, 2, card) > 3 * adamw


OPTIMIZERS = ("adamw", "muon")


@pytest.mark.slow
@pytest.mark.parametrize(("saving", "gigabytes"), [(0, 31.37), (2, 32.85), (3, 37.38)])
def test_the_bytes_of_the_reference_are_those_of_the_generated_code(saving, gigabytes):
    """Of the loops that torch 2.11 writes for an RTX 3090, 12 x 1,024 tokens (docs/speed.md)."""
    training = Training(GPTConfig(), torch.bfloat16, "cuda", True, False, True, saving=saving)
    found = []
    for layers in memory.LAYERS:
        kernels = hours.kernels_of(memory.shallow(training, layers), 12)
        found.append(sum(k.nbytes for k in kernels if k.kind == hours.LOOPS))
    moved = found[0] + (24 - memory.LAYERS[0]) * (found[1] - found[0])
    assert moved == pytest.approx(gigabytes * 1e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "norm", "batch", "gib"), [("adamw", False, 12, 10.5), ("muon", True, 6, 7.0)]
)
def test_consumer_cards_have_the_memory(optimizer, norm, batch, gib):
    """The reference on a card of 12 GB, and by the recipe on one of 8, less the reserve."""
    size = replace(GPTConfig(), qk_norm=norm)
    training = Training(size, torch.bfloat16, "cuda", True, False, True, optimizer, saving=3)
    assert fit.peak(training, batch, 480) < gib * fit.GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "batch", "micro_steps", "measured"),
    [
        ({}, 12, 10, 203_743),
        ({"checkpointing": True}, 12, 10, 164_120),
        ({"optimizer": "muon"}, 16, 8, 345_395),
    ],
)
def test_the_speed_of_an_h200_is_what_was_measured(more, batch, micro_steps, measured, monkeypatch):
    """Of the first one the share of products was fitted; the others are predicted.

    There were no copies of the weights yet.
    """
    monkeypatch.setattr(Training, "copies", False)
    half = more.get("optimizer") == "muon"
    size = replace(GPTConfig(), num_hidden_layers=12 if half else 24, qk_norm=half)
    training = Training(size, torch.bfloat16, "cuda", True, False, True, saving=0)
    card = cards.find_card("H200")
    step = hours.update(replace(training, **more), batch, micro_steps, card)
    assert batch * micro_steps * 1024 / step == pytest.approx(measured, rel=0.025)


def test_a_card_with_the_memory_keeps_all_for_backward():
    """The faster way, where it fits; never on a CPU, uncompiled, or where nobody knows the room.

    The copies of the weights go last: more than a layer's casts, which have to be somewhere.
    """
    size = replace(DRY, vocab_size=4096)
    training = Training(size, torch.bfloat16, "cuda", True, False, True)
    whole, less, least = (fit.peak(replace(training, saving=n), 8, 16) for n in (0, 2, 3))
    assert whole > less > least, "of a model in which logits are much"
    assert memory.copied(size) < less - least <= 2 * memory.copied(size)

    def saving(room, training=training):
        return fit.as_needed(training, 8, 16, room).saving

    assert [saving(room) for room in (whole, whole - 1, less - 1, least - 1)] == [0, 2, 3, 3]
    assert saving(least, replace(training, dtype=torch.float16)) == 1
    assert saving(None) == 1
    assert saving(whole, replace(training, compiled=False)) == 1
    assert saving(whole, replace(training, device_type="cpu")) == 1
