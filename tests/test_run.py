"""The mechanisms of a run, each alone: stopping, agreeing, halving, saving, health, logs."""

import dataclasses
import json
import math
import signal
import time
import types

import pytest
import torch

from formats import checkpoint, listing
from model import GPT, GPTConfig, num_parameters
from run import compiling, folder
from run import settings as rules
from run import stop as stop_module
from run.agreement import Agreement, ShortElsewhere
from run.curve import Curve, read_curve
from run.evaluation import loss_sums, sample_text
from run.health import Health
from run.log import Log, duration
from run.machine import Machine
from run.microbatch import MicroBatch
from run.optim import configure_optimizer, set_hyperparameters, set_rate
from run.parallel import check_sharded
from run.picture import draw_run, short
from run.records import Wandb, read_records
from run.saver import Saver
from run.start import Start, TrainState, find_start, source_of
from run.stop import Stop, Stopped
from run.team import Team
from text import files
from text.files import printable
from text.tokenizer import get_tokenizer

SIZE = GPTConfig(64, 16, 32, 1, 2, 1, 8, 16)


@pytest.fixture
def stop():
    """A Stop whose signals are given back."""
    numbers = [getattr(signal, name, None) for name in (*Stop.NAMES, "SIGTSTP")]
    before = {number: signal.getsignal(number) for number in numbers if number}
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


class Others(Team):
    """This rank and others, which raise flags in turn: one tuple for each agreement."""

    def __init__(self, *said, rank=0):
        super().__init__(rank=rank, ranks=2, alone=False)
        object.__setattr__(self, "said", list(said))
        object.__setattr__(self, "mine", [])

    def any(self, *flags):
        self.mine.append(flags)
        theirs = self.said.pop(0) if self.said else (False,) * len(flags)
        return tuple(a or b for a, b in zip(flags, theirs, strict=True))

    def share(self, value, source=0):
        return value


def micro_of(stop, tmp_path, team=None, sharded=False, most=4, windows=12, state=None):
    model = GPT(SIZE)
    optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    agreement = Agreement(team or Team(), stop, Saver(tmp_path, keep_last=2))
    return MicroBatch(most, windows, state or TrainState(), model, optimizer, agreement, sharded)


# --- stop


@pytest.mark.parametrize("name", [n for n in Stop.NAMES if hasattr(signal, n)])
def test_a_signal_is_noted_and_named(stop, name):
    number = getattr(signal, name)
    assert not stop.asked() and stop.cause == "" and stop.exit_code() == 0
    signal.raise_signal(number)
    assert stop.asked() and stop.cause == name and stop.exit_code() == 128 + number
    stop.under_torchrun = True
    assert stop.exit_code() == 0, "another code would start the run anew"


def test_the_clock_and_the_end_of_torchrun(stop, monkeypatch):
    stop.time_limit, stop.started = 1.0, time.monotonic() - 61
    assert stop.cause == "time_limit=1.0" and stop.asked()
    stop.time_limit = 2.0
    assert not stop.asked()
    stop.under_torchrun, stop.parent = True, -1
    assert stop.cause == "the end of torchrun"


def test_data_that_shrank_is_a_failure_not_a_crash(stop):
    def check_size():
        raise ValueError("train.bin was cut short")

    stop.data = types.SimpleNamespace(check_size=check_size)
    assert stop.asked() and stop.failure == "train.bin was cut short" and stop.cause == ""


# --- agreement


def test_nobody_leaves_alone(stop, tmp_path):
    saver = Saver(tmp_path, 2)
    Agreement(Others((False, False, False)), stop, saver).reach()
    with pytest.raises(Stopped):
        Agreement(Others((True, False, False)), stop, saver).reach()
    with pytest.raises(ShortElsewhere):
        Agreement(Others((False, False, True)), stop, saver).reach()
    with pytest.raises(ShortElsewhere):  # all do the same: this comes first
        Agreement(Others((True, False, True)), stop, saver).reach()
    Agreement(Others((True, False, False)), stop, saver).reach(short=True)


def test_a_late_checkpoint_is_due_on_all_ranks(stop, tmp_path):
    agreement = Agreement(Others((False, True, False)), stop, Saver(tmp_path, 2))
    agreement.reach()
    assert agreement.save_due
    agreement.reach()
    assert not agreement.save_due
    alone = Agreement(Team(), stop, Saver(tmp_path, 2))
    alone.saver.begin(-1, 0, minutes=1.0)
    alone.saver.saved_at -= 61
    alone.reach()
    assert alone.save_due


# --- the micro-batch


def test_a_try_that_does_not_fit_is_made_again_with_half(stop, tmp_path, capsys):
    state = TrainState()
    micro, tried = micro_of(stop, tmp_path, state=state), []
    micro.model.eval()
    for attempt in micro.attempts():
        with attempt:
            done = []
            for i, last in attempt.steps():
                tried.append(micro.size)
                assert attempt.room.numel() == 2 * num_parameters(micro.model)
                if micro.size > 1 and i == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                done.append((i, last))
    assert tried == [4, 4, 2, 2, *[1] * 12] and micro.size == 1 and micro.count == 12
    assert done == [(i, i == 11) for i in range(12)] and attempt.room is None
    assert state.micro_batch == 1 and micro.model.training
    said = capsys.readouterr().out
    assert "batch_size=4: CUDA out of memory" in said and "going on with 1 x 12" in said


def test_no_smaller_one_is_an_error(stop, tmp_path):
    micro = micro_of(stop, tmp_path, most=1)
    with pytest.raises(ValueError, match="out of memory with batch_size=1; use a smaller model"):
        for attempt in micro.attempts():
            with attempt:
                raise MemoryError


def test_what_is_remembered_counts_more_than_the_setting(stop, tmp_path):
    assert micro_of(stop, tmp_path, most=12, state=TrainState(micro_batch=3)).size == 3
    assert micro_of(stop, tmp_path, most=5).size == 4, "the largest divisor of 12"


def test_another_error_is_not_caught(stop, tmp_path):
    micro = micro_of(stop, tmp_path)
    with pytest.raises(KeyError):
        for attempt in micro.attempts():
            with attempt:
                raise KeyError("x")
    assert micro.size == 4


def test_a_rank_that_is_short_takes_the_others_along(stop, tmp_path):
    """The one that is short raises its flag; the other finds it up and tries again, too."""
    for says in ((False, False, False), (False, False, True)):
        short = not says[2]
        micro = micro_of(stop, tmp_path, Others(says))
        for attempt in micro.attempts():
            with attempt:
                for i, _ in attempt.steps():
                    if short and micro.size == 4 and i == 0:
                        raise torch.OutOfMemoryError("CUDA out of memory.")
        assert micro.size == 2
        raised = [flags[2] for flags in micro.agreement.team.mine]
        assert raised == ([True, False] if short else [False, False])


def test_room_that_cannot_be_had_is_memory_that_is_short(stop, tmp_path, monkeypatch):
    """AdamW's moments are more than there is: a smaller batch does not help, a line says so."""
    micro = micro_of(stop, tmp_path)
    monkeypatch.setattr("run.microbatch.moments", lambda groups: 10**15)
    with pytest.raises(ValueError, match="batch_size=1; use a smaller model"):
        for attempt in micro.attempts():
            with attempt:
                next(attempt.steps())


def test_no_room_is_taken_when_the_moments_are_there(stop, tmp_path):
    micro = micro_of(stop, tmp_path)
    for p in micro.model.parameters():
        p.grad = torch.zeros_like(p)
    micro.optimizer.step()
    for attempt in micro.attempts():
        with attempt:
            assert len(list(attempt.steps())) == 3 and attempt.room is None


def test_sharded_each_batch_of_an_evaluation_is_agreed_on(stop, tmp_path):
    micro = micro_of(stop, tmp_path, Others(), sharded=True)
    for attempt in micro.attempts():
        with attempt:
            assert list(attempt.checked(range(3))) == [0, 1, 2]
    assert len(micro.agreement.team.mine) == 3


def test_a_compiler_that_fails_beside_a_rank_that_is_short(stop, tmp_path, monkeypatch):
    """Both try again with half: the one uncompiled, the other as it was."""
    micro = micro_of(stop, tmp_path, Others((False, False, True)))
    tried = []

    def rehearsed(micro, *_):
        tried.append((micro.size, micro.compiled))
        if len(tried) == 1:
            raise ImportError("no g++")

    monkeypatch.setattr(compiling, "rehearse", rehearsed)
    monkeypatch.setattr(compiling, "compile_parts", lambda *_: [])
    machine = Machine(torch.device("cpu"), torch.float32, "")
    compiling.compile_or_say_why("True", 1.0, micro, micro.model, None, None, machine)
    assert tried == [(4, True), (2, False)] and micro.size == 2


@pytest.mark.parametrize("sharded", [True, False])
def test_out_of_memory_in_an_exchange_cannot_be_tried_again(stop, tmp_path, sharded):
    micro = micro_of(stop, tmp_path, Others(), sharded)
    with pytest.raises(ValueError, match="while ranks exchange numbers; go on with --init_from"):
        for attempt in micro.attempts():
            with attempt:
                for i, last in attempt.steps():
                    if last or (sharded and i == 0):
                        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_asked_to_end_it_skips_to_the_agreement(stop, tmp_path):
    """An update can take longer than the grace after a signal; nobody computes what is dropped."""
    micro, done = micro_of(stop, tmp_path), []
    with pytest.raises(Stopped):
        for attempt in micro.attempts():
            with attempt:
                for i, _ in attempt.steps():
                    done.append(i)
                    signal.raise_signal(signal.SIGINT)
    assert done == [0]


def test_sharded_ranks_agree_before_the_first_exchange(stop, tmp_path):
    micro, done = micro_of(stop, tmp_path, Others(), sharded=True), []
    for attempt in micro.attempts():
        with attempt:
            assert attempt.room is None, "each has a part of the moments only"
            for i, _ in attempt.steps():
                assert attempt.met
                done.append(i)
    assert done == [0, 1, 2]


def test_an_evaluation_ends_when_asked(stop, tmp_path):
    micro, read = micro_of(stop, tmp_path), []
    with pytest.raises(Stopped):
        for attempt in micro.attempts():
            with attempt:
                for batch in attempt.checked(range(9)):
                    read.append(batch)
                    if batch == 3:
                        signal.raise_signal(signal.SIGINT)
                attempt.agree()
    assert read == [0, 1, 2, 3]


# --- saving


def test_when_a_checkpoint_is_due(tmp_path):
    saver = Saver(tmp_path, keep_last=2, milestone_interval=50)
    saver.begin(-1, 20, minutes=1.0)
    assert [n for n in range(1, 101) if saver.is_due(n)] == [20, 40, 50, 60, 80, 100]
    assert saver.lacks(0, Team()) and not saver.is_late()
    saver.saved_at -= 61
    assert saver.is_late()
    saver.save(7, {"model": {"w": torch.ones(2)}})
    saver.wait()
    assert not saver.is_late() and not saver.lacks(7, Team()) and saver.lacks(8, Team())
    saver.problem = "disk full"
    assert saver.lacks(7, Team()), "it is tried again"
    saver.problem = ""
    assert saver.lacks(7, Others((True,))), "another rank's did not"


def test_the_best_one_that_was_not_written_does_not_count(tmp_path):
    saver, state, team = Saver(tmp_path, 2), TrainState(), Team()
    assert saver.is_best(state, 3.0, team) and state.best_val_loss == 3.0
    assert not saver.is_best(state, 3.5, team)
    assert saver.is_best(state, 2.0, team) and state.best_val_loss == 2.0
    saver.best_failed = "disk full"
    assert saver.is_best(state, 2.5, team), "better than what is on the disk"
    saver.best_failed = ""
    assert not saver.is_best(state, 2.6, team)


# --- health


def test_updates_that_are_left_out_are_counted_in_a_row(capsys):
    state = TrainState()
    health = Health(state, skip_spike=0.0, max_skipped=2)
    assert health.is_good(0, 3.0, 1.0) and not health.is_good(1, math.nan, 1.0)
    assert not health.is_hopeless() and health.is_good(2, 3.0, 1.0)
    assert not health.is_good(3, 3.0, math.inf) and not health.is_good(4, 3.0, math.nan)
    assert health.is_hopeless() and state.skipped == 3 and state.recent_losses == []
    assert capsys.readouterr().out.count("left out, not finite") == 3


def test_giving_up_leaves_the_step_behind(tmp_path):
    health = Health(TrainState(), 0.0, 1)
    assert not health.is_good(9, math.nan, 1.0)
    with pytest.raises(ValueError, match="1 updates in a row .* at step 9 .*bad_step.json"):
        health.give_up(tmp_path, 9, math.nan, 1.0, [5, 6], Saver(tmp_path, 2), Team())
    assert json.loads((tmp_path / "bad_step.json").read_text())["windows"] == [5, 6]


# --- logs


def test_one_update_in_log_interval_is_told_with_the_mean_speed(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = Log(tmp_path, 0, Wandb(False, "", "", {}, None), 0, 9, 2)
    log.measure(1000, 5e12, 1e13)
    for step in range(4):
        log.begin()
        now[0] += 1 + step
        log.update(step, 3.0 - step, 1e-3, 0.5)
    log.evaluation(4, 2.5, None, best=True)
    log.evaluation(4, 2.5, 1.25, best=False)
    log.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["iter"] for r in records] == [0, 2, 4, 4]
    assert records[0]["tokens_per_s"] == 1000 and records[1]["tokens_per_s"] == 400
    assert records[1]["mfu"] == pytest.approx(0.2) and records[1]["tokens"] == 3000
    assert records[1]["elapsed_s"] == 6.0
    assert "val_bits_per_byte" not in records[2] and records[3]["val_bits_per_byte"] == 1.25
    lines = capsys.readouterr().out.splitlines()
    assert "20.0% MFU | 0:00:12 left" in lines[1] and lines[2].endswith("| best")
    assert duration(3723.9) == "1:02:03"


def test_the_time_left_leaves_out_what_comes_before_the_first_update(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = Log(tmp_path, 0, Wandb(False, "", "", {}, None), 0, 61, 1)
    log.measure(1000, 5e12, 0)
    now[0] += 50  # the evaluation of step 0
    log.begin()
    now[0] += 1
    log.update(0, 3.0, 1e-3, 0.5)
    assert capsys.readouterr().out.endswith("| 0:01:00 left\n")
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["elapsed_s"] == 51.0


def test_a_sample_in_the_log_is_a_line_that_terminals_survive():
    assert printable("a\x07b\x1b[2J\x00 ü世\n\x08\x85 c\r", keep="\n") == "a·b·[2J· ü世\n·· c·"
    assert printable("a\u3000b\u200d\u00a0") == "a\u3000b\u200d\u00a0", "no control characters"


def test_another_rank_says_and_writes_nothing(tmp_path, capsys):
    log = Log(tmp_path, 1, Wandb(False, "", "", {}, None), 0, 9, 1)
    log.measure(1000, 5e12, 0)
    log.begin()
    log.update(0, 3.0, 1e-3, 0.5)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_a_curve_is_read_between_points_that_are_close():
    """Never across 4,000 to 14,800 updates of the original's, nor to the first update from none."""
    curve = read_curve("assets/curves/easygpt.jsonl")
    step = 491520
    assert curve.at(0) == 11.0 and curve.at(400 * step) == 4.95 and curve.at(14800 * step) == 2.887
    assert 3.2 < curve.at(3200 * step) < 3.34 and curve.at(600 * step) == pytest.approx(4.441, 1e-3)
    assert curve.at(200 * step) is None and curve.at(8000 * step) is None
    assert curve.at(15000 * step) is None and read_curve("") is None


def test_a_curve_that_is_none_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no curve nowhere.jsonl"):
        read_curve("nowhere.jsonl")
    (tmp_path / "a.jsonl").write_text('{"tokens": 1, "loss": 2}\nnot json\n')
    with pytest.raises(ValueError, match="no lines with tokens and val_loss"):
        read_curve(str(tmp_path / "a.jsonl"))


def test_an_evaluation_says_how_far_it_is_from_the_reference(tmp_path, capsys):
    curve = Curve([0, 1000], [5.0, 4.0])
    log = Log(tmp_path, 0, Wandb(False, "", "", {}, None), 0, 9, 1, curve)
    log.measure(500, 5e12, 0)
    log.evaluation(2, 4.25, None, False, "a text\nof two lines")
    log.evaluation(1, 4.25, None, False)
    at, between = read_records(tmp_path / "metrics.jsonl")
    assert at["over_reference"] == 0.25 and "over_reference" not in between
    assert at["sample"] == "a text\nof two lines"
    said = capsys.readouterr().out
    assert "+0.2500 to the reference's 4" in said and "sample: a text of two lines\n" in said


def test_the_picture_of_a_run(tmp_path):
    """Of a run with all there is, and of one that had hardly begun."""
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    records = [{"iter": 0, "tokens": 0, "val_loss": 5.0}]
    assert draw_run(metrics, image) == "" and image.stat().st_size > 1000
    for i in range(20):
        records.append({"iter": i, "tokens": 1000 * i, "loss": 5 - i / 10, "lr": 1e-3})
        records[-1] |= {"grad_norm": 1.0, "tokens_per_s": 2000, "mfu": 0.5}
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert draw_run(metrics, image, Curve([0, 9000, 10**9], [5.0, 4.0, 3.0])) == ""
    assert image.stat().st_size > 10_000
    assert [short(n) for n in (950, 1500, 2.5e5, 7.37e9, 0)] == [
        "950",
        "1.5k",
        "250k",
        "7.37B",
        "0",
    ]


def test_a_text_of_the_run_touches_no_random_number(tmp_path):
    tok, model = get_tokenizer("bytes"), GPT(dataclasses.replace(SIZE, vocab_size=320, dropout=0.5))
    machine = Machine(torch.device("cpu"), torch.float32, "")
    before = torch.get_rng_state()
    texts = {sample_text(model.train(), tok, "ab", machine) for _ in range(2)}
    assert len(texts) == 1 and texts.pop().startswith("ab")
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_a_text_that_does_not_fit_in_memory_stops_no_run(monkeypatch, capsys):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = GPT(dataclasses.replace(SIZE, vocab_size=320))
    monkeypatch.setattr(model, "new_cache", short)
    machine = Machine(torch.device("cpu"), torch.float32, "")
    assert sample_text(model, get_tokenizer("bytes"), "ab", machine) == "ab" and model.training
    assert "no text: CUDA out of memory" in capsys.readouterr().out


def test_what_sharded_models_cannot_do_is_refused():
    check_sharded("fsdp", torch.bfloat16, "")
    with pytest.raises(ValueError, match="parallel=fsdp takes bfloat16 or float32"):
        check_sharded("fsdp", torch.float16, "")
    with pytest.raises(ValueError, match="sample_prompt needs a whole model.*--sample_prompt="):
        check_sharded("hsdp", torch.bfloat16, "Return the")


# --- where a run starts


def test_a_start_from_scratch_is_the_model_as_set(tmp_path):
    assert source_of("auto", tmp_path) == "scratch" and source_of("x.pt", tmp_path) == "x.pt"
    start = find_start("scratch", tmp_path, SIZE, 4).shared(Team(), sharded=False)
    assert (start.config, start.origin, start.resumed) == (SIZE, "scratch", False)
    model = start.build(0, seed=0)
    assert all(p.std() > 0 for p in model.parameters() if p.dim() > 1)


def test_a_start_from_a_checkpoint_keeps_its_sizes(tmp_path):
    model = GPT(SIZE)
    saved = {"model": model.state_dict(), "model_args": vars(SIZE) | {"dropout": 0.3}}
    config = {"init_from": "hf:x", "batch_size": 4, "eval_iters": 0}
    saved |= {"iter_num": 7, "best_val_loss": 2.0, "config": config}
    saved |= {"optimizer": {}, "data": {}, "dtype": "torch.float32"}
    saved |= {"train_state": {"iter_num": 7, "micro_batch": 2, "of_the_future": 1}}
    checkpoint.save(tmp_path / "ckpt_7.pt", saved)
    other = GPTConfig(64, 16, 32, 1, 2, 1, 8, 8, dropout=0.1)
    start = find_start("resume", tmp_path, other, 4)
    assert start.resumed and start.state == TrainState(iter_num=7, micro_batch=2)
    other_batch = find_start("resume", tmp_path, other, 8)
    assert other_batch.state.micro_batch == 0, "the user knows better"
    assert start.config.max_position_embeddings == 16 and start.config.dropout == 0.1
    assert start.origin == "hf:x" and start.path == tmp_path / "ckpt_7.pt"
    start = find_start(str(tmp_path / "ckpt_7.pt"), tmp_path, other, 4)
    assert not start.resumed and start.state == TrainState()
    assert start.config.max_position_embeddings == 8, "may be cut"
    again = start.build(0, seed=0)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("more", [{}, {"config": None}, {"train_state": [1]}])
def test_a_foreign_checkpoint_is_no_run_to_resume(tmp_path, more):
    saved = {"model": GPT(SIZE).state_dict(), "model_args": vars(SIZE), "config": {}, **more}
    checkpoint.save(tmp_path / "ckpt_7.pt", saved)
    with pytest.raises(
        ValueError, match="of no run that can be resumed; start a new one from it: --init_from"
    ):
        find_start("resume", tmp_path, SIZE, 4)


def test_a_run_from_a_checkpoint_does_not_replace_it(tmp_path, monkeypatch):
    """However its path is spelt, and whatever overwrite says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for source in ("~/a/ckpt_3.pt", str(tmp_path / "a" / "ckpt_3.pt"), "~/a"):
        with pytest.raises(ValueError, match="would replace it"):
            folder.claim(tmp_path / "a", source, overwrite=True)
        folder.unlock()


def test_other_ranks_do_not_draw_weights(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Start(SIZE).build(1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


# --- smaller ones


def test_the_optimizer_takes_what_is_set_now():
    optimizer = configure_optimizer(GPT(SIZE), 1e-3, (0.9, 0.95), 0.1)
    set_hyperparameters(optimizer, (0.8, 0.9), 0.2)
    set_rate(optimizer, 5e-4)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.9)}
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4}


def test_a_loss_over_nothing_is_nothing():
    assert loss_sums(GPT(SIZE), [], None).tolist() == [0, 0]


def test_settings_are_checked_all_at_once():
    import train
    from configurator import settings_of

    good = settings_of(vars(train))
    rules.check(good)
    assert set(rules.LEAST) <= set(good) and set(rules.DECIDE) <= set(good)
    assert rules.eval_windows(good) == 2400 == rules.eval_windows(good | {"eval_iters": 200})
    bad = good | {"max_iters": -1, "beta1": 1.0, "min_lr": 1.0, "seed": -1, "out_dir": ""}
    with pytest.raises(ValueError) as e:
        rules.check(bad)
    assert all(word in str(e.value) for word in ("max_iters", "beta1", "min_lr (1.0)", "seed"))
    assert "\n" not in str(e.value) and "out_dir is empty" in str(e.value)


def test_the_settings_block_and_the_models_defaults_are_the_same():
    """They stand twice on purpose: the settings for who trains, GPTConfig for who reads."""
    import train

    fields = {f.name: f.default for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"}
    assert {name: getattr(train, name) for name in fields} == fields


def test_a_lock_is_one_process_at_a_times(tmp_path):
    lock = folder.Lock(tmp_path / "lock")
    with pytest.raises(folder.Held, match="pid "):
        folder.Lock(tmp_path / "lock")
    lock.free()
    assert (tmp_path / "lock").read_text() == ""
    lock = folder.Lock(tmp_path / "lock")
    assert lock.holder == "" and lock.problem == ""
    lock.free(delete=True)
    assert not (tmp_path / "lock").exists()


def test_a_dead_holder_is_named(tmp_path):
    (tmp_path / "lock").write_text("pid 7 on somewhere")
    lock = folder.Lock(tmp_path / "lock")
    assert lock.holder == "pid 7 on somewhere"
    lock.free()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, "first")
    with pytest.raises(KeyError), files.replacing(path) as temp:
        temp.write_text("half")
        raise KeyError
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    files.write(path, b"second", mark=".7")
    assert path.read_bytes() == b"second" and len(list(tmp_path.iterdir())) == 1


def test_text_that_comes_in_is_utf8_or_refused(tmp_path):
    for data in ("ä\nb\n", "\ufeffä\r\nb\r\n", "ä\rb\r"):  # as editors save the same text
        (tmp_path / "t").write_bytes(data.encode())
        assert files.read_text(tmp_path / "t") == "ä\nb\n"
    (tmp_path / "t").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8 text .byte 0."):
        files.read_text(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        files.read_text(tmp_path / "u")


def test_home_is_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert files.path_of("~/runs/a") == tmp_path / "runs" / "a"


def test_a_folder_tells_its_checkpoints(tmp_path):
    for name in ("ckpt_9.pt", "ckpt_10.pt", "ckpt_x.pt", "best.pt", "ckpt_3.pt.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert [step for step, _ in listing.steps_saved(tmp_path)] == [10, 9]
    assert [p.name for p in listing.checkpoints(tmp_path)] == ["ckpt_10.pt", "ckpt_9.pt", "best.pt"]


GOOD = '{"tokens": 1000, "val_loss": 3.5}'


@pytest.mark.parametrize(
    "bad",
    [
        '{"tokens": 2000, "val_loss": NaN}',
        '{"tokens": 2000, "val_loss": null}',
        '{"tokens": 2000, "val_loss": "3"}',
        '{"tokens": -1, "val_loss": 3}',
        '{"tokens": 2e3, "val_loss": 3}',
        '{"tokens": true, "val_loss": 3}',
        '{"tokens": 2000, "val_loss": 1e400}',
        '{"tokens": 2000, "val_loss": -Infinity}',
        '{"tokens": 1' + "0" * 400 + ', "val_loss": 3}',
    ],
)
def test_a_curve_with_a_line_that_is_none_is_told(tmp_path, bad):
    path = tmp_path / "curve.jsonl"
    path.write_text(f"{GOOD}\n{bad}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"curve.jsonl line 2: no curve .* take that line out$"):
        read_curve(str(path))
    path.write_text(f'{GOOD}\n[1]\n{{"iter": 1}}\n{{"cut', encoding="utf-8")
    assert read_curve(str(path)) == Curve([1000], [3.5])


def test_a_curve_that_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.jsonl is not UTF-8"):
        read_curve(str(tmp_path / "a.jsonl"))


def test_a_watchdog_beyond_all_clocks_is_none():
    stop_module.watch(math.inf)
    stop_module.watch(1e300)
