"""What can happen to a run in 90 hours, done to real processes: nothing may be lost but time.

The rows follow one pattern: run the script, hurt it, and compare with the run that nobody hurt.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY

import checkpoint
import runtime

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def start(flags, code=None, **more):
    """The training script as a process of its own, `code` run first in it."""
    script = str(ROOT / "train.py")
    args = [sys.executable, script, *flags]
    if code:
        lines = [
            f"import sys; sys.path.insert(0, {str(ROOT)!r})",
            code,
            f"sys.argv[0] = {script!r}",
        ]
        lines += ["import runpy", f"runpy.run_path({script!r}, run_name='__main__')"]
        args = [sys.executable, "-c", "\n".join(lines), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(path, timeout=60):
    end = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def weights(path):
    return checkpoint.load(path)["model"]


def losses(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["iter"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# 60 updates with dropout and a checkpoint every five
SLOW = ["--max_iters=60", "--eval_interval=20", "--checkpoint_interval=5", "--dropout=0.1"]


@pytest.fixture
def slow_run(tiny):
    return [*tiny, *SLOW]


@pytest.fixture(scope="session")
def whole(dataset, tmp_path_factory):
    """Weights and losses of that run, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    code, _, err = finish(start([f"--dataset={dataset}", f"--out_dir={out}", *TINY, *SLOW]))
    assert code == 0, err
    return weights(out / "ckpt_60.pt"), losses(out)


STEP_SLOWLY = "import torch, time; f = torch.nn.utils.clip_grad_norm_\n" + (
    "torch.nn.utils.clip_grad_norm_ = lambda *a, **k: (time.sleep(0.05), f(*a, **k))[1]"
)


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_go_on(slow_run, tmp_path, whole, name):
    out = tmp_path / "out"
    process = start(slow_run, STEP_SLOWLY)
    wait_for(out / "ckpt_5.pt")
    process.send_signal(getattr(signal, name))
    code, text, err = finish(process)
    assert code == 128 + getattr(signal, name) and err == ""
    assert f"stopped by {name}" in text and "--init_from=resume" in text
    newest = checkpoint.steps_saved(out)[0][0]
    assert max(losses(out)) == newest - 1, "the last completed update is saved"
    code, _, err = finish(start([*slow_run, "--init_from=resume"]))
    assert code == 0, err
    assert equal(weights(out / "ckpt_60.pt"), whole[0]) and losses(out) == whole[1]


@posix
def test_a_signal_under_torchrun_exits_with_0(slow_run, tmp_path):
    """torchrun takes another exit code for a crash and starts the worker anew."""
    process = start(slow_run, STEP_SLOWLY, TORCHELASTIC_RUN_ID="x")
    wait_for(tmp_path / "out" / "ckpt_5.pt")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


@posix
def test_a_signal_stops_within_a_step(tiny, tmp_path):
    """A step of many micro-steps takes longer than the grace that a scheduler gives."""
    slow = "import dataloader, time; f = dataloader.TrainLoader.batch\n"
    slow += "dataloader.TrainLoader.batch = lambda *a: (time.sleep(0.2), f(*a))[1]"
    flags = [*tiny, "--tokens_per_step=32768", "--max_iters=50", "--warmup_iters=0"]
    process = start(flags, slow)  # 256 micro-steps of 0.2 s
    wait_for(tmp_path / "out" / "metrics.jsonl")
    time.sleep(1)
    t0 = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, text, _ = finish(process)
    assert code == 143 and "after 0 updates" in text and time.monotonic() - t0 < 10


@posix
def test_a_second_signal_ends_at_once(tiny, tmp_path):
    stuck = "import checkpoint, time; checkpoint.save = lambda *a: time.sleep(600)"
    process = start(tiny, stuck)
    wait_for(tmp_path / "out" / "config.json")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # the same one, passed on by a supervisor
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process, 10)[0] == 143


def kill_and_resume(flags, out, kills, rng, longest):
    """Kill the run at random moments until it ends by itself; how often it was killed."""
    done = 0
    for _ in range(40 + 3 * kills):
        resume = ["--init_from=resume"] if checkpoint.steps_saved(out) else ["--overwrite=True"]
        process = start([*flags, *resume])
        with contextlib.suppress(subprocess.TimeoutExpired):
            if done < kills:
                process.wait(timeout=rng.uniform(2.0, longest))
        if process.poll() is None and done < kills:
            process.kill()
            done += 1
            finish(process)
            continue
        code, _, err = finish(process)
        assert code == 0, err
        if done >= kills or (out / f"ckpt_{60}.pt").exists():
            return done
    raise AssertionError("the run never ended")


def test_sigkill_at_random_moments(slow_run, tmp_path, whole):
    kill_and_resume(slow_run, tmp_path / "out", 5, random.Random(1), 5.0)
    assert equal(weights(tmp_path / "out" / "ckpt_60.pt"), whole[0])
    assert losses(tmp_path / "out") == whole[1]


@pytest.mark.slow
def test_sigkill_and_flipped_bytes_30_times(slow_run, tmp_path, whole):
    rng = random.Random(2)
    out = tmp_path / "out"
    for _ in range(30):
        kill_and_resume(slow_run, out, 1, rng, 5.0)
        saved = checkpoint.steps_saved(out)
        if len(saved) > 1:  # damage the newest: the one before must do
            data = bytearray(saved[0][1].read_bytes())
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            saved[0][1].unlink()
            saved[0][1].write_bytes(data)
    assert finish(start([*slow_run, "--init_from=resume"]))[0] == 0
    assert equal(weights(out / "ckpt_60.pt"), whole[0]) and losses(out) == whole[1]


DIE_WRITING = """
import os, torch
count, real = 0, torch.save
class Dying:
    def __init__(self, file): self.file, self.left = file, {left}
    def write(self, data):
        self.left -= len(data)
        if self.left < 0: self.file.flush(); os._exit(9)
        return self.file.write(data)
    def __getattr__(self, name): return getattr(self.file, name)
def save(state, file):
    global count
    count += 1
    real(state, Dying(file) if count == 3 else file)
torch.save = save
"""


@pytest.mark.parametrize("left", [0, 1000, 100_000])
def test_dying_while_a_checkpoint_is_written(slow_run, tmp_path, whole, left):
    """nanoGPT is left with the first bytes of its only checkpoint."""
    out = tmp_path / "out"
    assert finish(start(slow_run, DIE_WRITING.format(left=left)))[0] == 9
    assert list(out.glob("*.pt.tmp")) and [s for s, _ in checkpoint.steps_saved(out)] == [5, 0]
    code, _, err = finish(start([*slow_run, "--init_from=resume"]))
    assert code == 0, err
    assert not list(out.glob("*.tmp"))
    assert equal(weights(out / "ckpt_60.pt"), whole[0]) and losses(out) == whole[1]


FULL_DISK = """
import torch
count, real = 0, torch.save
def save(state, file):
    global count
    count += 1
    if 3 <= count <= 5:
        file.write(b"x" * 1000)
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 1000 vs 900")
    real(state, file)
torch.save = save
"""


def test_a_disk_that_fills_up_and_has_room_again(slow_run, tmp_path, whole):
    """torch shows a full disk as RuntimeError."""
    out = tmp_path / "out"
    code, text, err = finish(start(slow_run, FULL_DISK))
    assert code == 0, err
    assert text.count("WARNING") == 3 and "training goes on" in text
    assert equal(weights(out / "ckpt_60.pt"), whole[0])
    assert not list(out.glob("*.tmp"))


@posix
def test_a_file_size_limit_is_a_full_disk(slow_run, tmp_path):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    code, text, err = finish(start([*slow_run, "--max_iters=20"], limit))
    assert code == 1 and "could not write" in err and err.count("\n") == 1
    assert "training goes on" in text and not list((tmp_path / "out").glob("*.pt*"))


def test_too_little_disk_is_known_before_the_run(script, tiny, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 1000))
    result = script("train.py", *tiny)
    assert result.code == 1 and "GB free" in result.err and "--keep_last=1" in result.err


def test_time_limit_saves_and_stops(script, tiny, tmp_path):
    result = script("train.py", *tiny, "--max_iters=100000", "--time_limit=0.05")
    assert result.code == 0, result.err
    assert "stopped by time_limit=0.05" in result.out
    newest = checkpoint.steps_saved(tmp_path / "out")[0][0]
    assert 0 < newest < 100000 and max(losses(tmp_path / "out")) == newest - 1


def test_checkpoints_by_time_and_milestones(script, tiny, tmp_path):
    flags = ["--eval_interval=1000", "--max_iters=20", "--milestone_interval=5"]
    assert script("train.py", *tiny, *flags).code == 0
    assert [s for s, _ in checkpoint.steps_saved(tmp_path / "out")] == [20, 15, 10, 5]
    flags = ["--eval_interval=1000", "--checkpoint_minutes=1e-9", "--overwrite=True"]
    assert script("train.py", *tiny, *flags, "--keep_last=9").code == 0
    assert len(checkpoint.steps_saved(tmp_path / "out")) == 9


# --- memory


OOM = """
import torch, model
real = model.GPT.forward
def forward(self, idx, targets=None):
    if idx.size(0) > {fits}: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1")
    return real(self, idx, targets)
model.GPT.forward = forward
"""


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_run(tiny, tmp_path):
    """nanoGPT's users halve the batch by hand, and with it the tokens of a step."""
    assert finish(start(tiny))[0] == 0
    want = losses(tmp_path / "out")
    code, text, err = finish(start([*tiny, "--overwrite=True"], OOM.format(fits=1)))
    assert code == 0, err
    assert "going on with 2 x 4" in text and "going on with 1 x 8" in text
    got = losses(tmp_path / "out")
    assert got.keys() == want.keys()
    assert [got[i] for i in got] == pytest.approx([want[i] for i in got], rel=1e-4)


def test_not_even_one_window_fits(tiny):
    code, _, err = finish(start(tiny, OOM.format(fits=0)))
    assert code == 1 and "out of memory with batch_size=1" in err and err.count("\n") == 1


# --- numbers


def test_a_step_with_a_bad_gradient_is_left_out(script, tiny, tmp_path, monkeypatch):
    """clip_grad_norm_ spreads one infinite gradient as NaN over all weights."""
    import torch.nn.utils as utils

    real, calls = utils.clip_grad_norm_, []

    def clip(parameters, limit):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) in (4, 5):
            parameters[3].grad[0, 0] = float("inf") if len(calls) == 4 else float("nan")
        return real(parameters, limit)

    monkeypatch.setattr(utils, "clip_grad_norm_", clip)
    result = script("train.py", *tiny)
    assert result.code == 0, result.err
    assert result.out.count("left out, not finite") == 2 and "2 updates left out" in result.out
    state = checkpoint.load(tmp_path / "out" / "ckpt_12.pt")
    assert all(bool(t.isfinite().all()) for t in state["model"].values())
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}
    assert state["train_state"]["skipped"] == 2


def test_a_checkpoint_with_bad_weights_is_never_written(tmp_path):
    bad = {"model": {"w": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(ValueError, match="NaN"):
        checkpoint.save(tmp_path / "a.pt", bad)
    assert not os.listdir(tmp_path)


def test_loss_spikes_are_left_out_when_asked(script, tiny, tmp_path):
    import runpy

    is_spike = runpy.run_path(str(ROOT / "train.py"))["is_spike"]
    calm = [3.0 + 0.01 * (i % 7) for i in range(100)]
    assert is_spike(4.0, calm, 6.0) and not is_spike(3.05, calm, 6.0)
    assert not is_spike(4.0, calm, 0.0) and not is_spike(4.0, calm[:50], 6.0)
    flags = ["--max_iters=110", "--skip_spike=0.001", "--max_skipped=1000", "--eval_interval=55"]
    flags += ["--learning_rate=1e-9", "--min_lr=1e-9"]  # the loss only wobbles
    result = script("train.py", *tiny, *flags)
    assert result.code == 0 and "left out, a spike" in result.out
    state = checkpoint.load(tmp_path / "out" / "ckpt_110.pt")["train_state"]
    assert len(state["recent_losses"]) == 100 and state["skipped"] > 0


# --- one run a folder


@pytest.mark.skipif(sys.platform == "win32", reason="the message is the same")
def test_two_runs_in_one_folder(slow_run, tiny, tmp_path):
    first = start([*slow_run, "--max_iters=2000"], STEP_SLOWLY)
    wait_for(tmp_path / "out" / "ckpt_5.pt")
    code, _, err = finish(start([*tiny, "--overwrite=True"]))
    assert code == 1 and f"pid {first.pid}" in err and err.count("\n") == 1
    first.kill()
    finish(first)
    code, text, err = finish(start([*slow_run, "--max_iters=10", "--init_from=resume"]))
    assert code == 0 and "took over" in text and f"pid {first.pid}" in text


def test_a_lock_is_given_back(tmp_path):
    assert runtime.lock_folder(tmp_path) == ""
    with pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        runtime.lock_folder(tmp_path)
    runtime.unlock_folders()
    assert runtime.lock_folder(tmp_path) == ""
    runtime.unlock_folders()


# --- files


@posix
def test_links_in_the_folder_are_replaced_not_followed(script, tiny, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious", encoding="utf-8")
    for name in ("ckpt_6.pt.tmp", "best.pt", "best.pt.tmp", "metrics.jsonl", "config.json"):
        (out / name).symlink_to(victim)
    (out / "loss.png").symlink_to(victim)
    assert script("train.py", *tiny, "--overwrite=True").code == 0
    assert victim.read_text(encoding="utf-8") == "precious"


def test_resuming_with_other_settings_warns(script, tiny):
    script("train.py", *tiny)
    result = script("train.py", *tiny, "--init_from=resume", "--max_iters=14", "--seed=2")
    assert result.code == 0 and "WARNING" in result.out
    assert "seed 1337 -> 2" in result.out and "max_iters 12 -> 14" in result.out


def test_a_half_written_line_of_the_log_is_dropped(script, tiny, tmp_path):
    script("train.py", *tiny)
    with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as f:
        f.write('{"iter": 3, "lo')
    assert script("train.py", *tiny, "--init_from=resume", "--max_iters=13").code == 0
    assert sorted(losses(tmp_path / "out")) == list(range(13))


@pytest.mark.parametrize("flag", ["--out_dir=/dev/null/x", "--out_dir=/proc/nothing"])
@posix
def test_a_folder_that_cannot_be_written(script, tiny, flag):
    result = script("train.py", *tiny, flag)
    assert result.code == 1 and result.err.count("\n") == 1


def test_flips_that_an_archive_reader_could_miss(tmp_path):
    """A member marked as a folder reads as no bytes: weights would be whatever memory held."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(64.0)}})
    good = path.read_bytes()
    at = good.index(b"PK\x01\x02")
    flips = [(at + 38, 0x10), (at + 8, 0x01), (at + 10, 0x08), (at + 42, 0x01)]
    for place, bit in flips:
        bad = bytearray(good)
        bad[place] ^= bit
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.pt"):
            checkpoint.load(path)


def test_a_disk_full_of_log_stops_no_run(tiny, tmp_path):
    """nohup python train.py > train.log, on the disk that fills up."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        args = [sys.executable, str(ROOT / "train.py"), *tiny]
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert checkpoint.steps_saved(tmp_path / "out")[0][0] == 12, done.stderr


def test_out_dir_is_a_file(script, tiny, tmp_path):
    (tmp_path / "out").write_text("x", encoding="utf-8")
    result = script("train.py", *tiny)
    assert result.code == 1 and "out" in result.err and result.err.count("\n") == 1
