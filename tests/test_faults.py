"""What can happen to a run in 90 hours, done to real processes: nothing may be lost but time.

The rows follow one pattern: run the script, hurt it, and compare with the run that nobody hurt.
`start` runs a script as a process of its own; what breaks inside it is put in by code that runs
before it.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from formats import checkpoint, listing
from run import folder
from run.health import is_spike

if hasattr(signal, "SIGHUP"):  # nohup pytest: the runs would inherit it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def start(flags, code=None, script="train.py", prefix=(), **more):
    """A script as a process of its own, `code` run first in it; prefix: a command that runs it."""
    path = str(ROOT / script)
    args = [sys.executable, path, *flags]
    if code:
        lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", code, f"sys.argv[0] = {path!r}"]
        lines += ["import runpy", f"runpy.run_path({path!r}, run_name='__main__')"]
        args = [sys.executable, "-c", "\n".join(lines), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*prefix, *args], **pipes, text=True, encoding="utf-8", env=env)


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def must(process):
    """The output of a process that has to end well."""
    code, out, err = finish(process)
    assert code == 0, err
    return out


def refused(process, *words):
    """The one line with which a process has to give up."""
    code, _, err = finish(process)
    assert code == 1 and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in err
    return err


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
def whole_out(dataset, tmp_path_factory):
    """The folder of that run, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    must(start([f"--dataset={dataset}", f"--out_dir={out}", *TINY, *SLOW]))
    return out


@pytest.fixture(scope="session")
def whole(whole_out):
    """Its weights and losses."""
    return weights(whole_out / "ckpt_60.pt"), losses(whole_out)


@pytest.fixture
def used(whole_out, tmp_path):
    """A copy of that folder, to be hurt."""
    shutil.copytree(whole_out, tmp_path / "out")
    return tmp_path / "out"


def assert_whole(out, whole):
    """The run in `out` ended as if nothing had happened."""
    assert equal(weights(out / "ckpt_60.pt"), whole[0]) and losses(out) == whole[1]
    assert not list(out.glob("*.tmp"))


STEP_SLOWLY = "import torch, time; f = torch.nn.utils.clip_grad_norm_\n" + (
    "torch.nn.utils.clip_grad_norm_ = lambda *a, **k: (time.sleep(0.05), f(*a, **k))[1]"
)


@posix
@pytest.mark.parametrize(
    "name",
    [
        "SIGTERM",
        "SIGINT",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGHUP")),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(slow_run, tmp_path, whole, name):
    out = tmp_path / "out"
    process = start(slow_run, STEP_SLOWLY)
    wait_for(out / "ckpt_5.pt")
    process.send_signal(getattr(signal, name))
    code, text, err = finish(process)
    assert code == 128 + getattr(signal, name) and err == ""
    assert f"stopped by {name}" in text and "--init_from=resume" in text
    newest = listing.steps_saved(out)[0][0]
    assert max(losses(out)) == newest - 1, "the last completed update is saved"
    must(start([*slow_run, "--init_from=resume"]))
    assert_whole(out, whole)


@posix
def test_a_signal_under_torchrun_exits_with_0(slow_run, tmp_path):
    """torchrun takes another exit code for a crash and starts the worker anew."""
    process = start(slow_run, STEP_SLOWLY, TORCHELASTIC_RUN_ID="x")
    wait_for(tmp_path / "out" / "ckpt_5.pt")
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in must(process)
    assert listing.steps_saved(tmp_path / "out")[0][0] >= 5


@posix
def test_a_worker_whose_torchrun_was_killed_saves_and_ends(slow_run, tmp_path):
    """It would train on as an orphan, in the way of the next run."""
    out = tmp_path / "out"
    code = "import subprocess, sys\n" + (
        "subprocess.run(sys.argv[1:], stdout=open(sys.argv[-1][10:] + '.txt', 'w'))"
    )
    worker = [sys.executable, str(ROOT / "train.py"), *slow_run]
    worker += ["--max_iters=100000", f"--out_dir={out}"]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "PYTHONUNBUFFERED": "1"}
    parent = subprocess.Popen([sys.executable, "-c", code, *worker], env=env)
    wait_for(out / "ckpt_5.pt")
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while (out / ".lock").read_text(encoding="utf-8") and time.monotonic() < end:
        time.sleep(0.05)
    assert "stopped by the end of torchrun" in (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert listing.steps_saved(out)[0][0] == max(losses(out)) + 1


SLOW_BATCH = "import time; from text import batches; f = batches.TrainLoader.batch\n" + (
    "batches.TrainLoader.batch = lambda *a: (time.sleep(0.2), f(*a))[1]"
)
SLOW_EVALUATION = "import time; from text import batches; f = batches.split_windows\n" + (
    "batches.split_windows = lambda *a: (time.sleep(0.2), f(*a))[1]"
)


@posix
@pytest.mark.parametrize("slowness", [SLOW_BATCH, SLOW_EVALUATION])
def test_a_signal_stops_within_a_step_and_within_an_evaluation(tiny, tmp_path, slowness):
    """Either can take longer than the grace that a scheduler gives."""
    flags = ["--tokens_per_step=32768", "--max_iters=50", "--warmup_iters=0"]  # 256 micro-steps
    flags += (
        ["--eval_iters=2"] if slowness == SLOW_BATCH else ["--eval_iters=200", "--batch_size=1"]
    )
    process = start([*tiny, *flags], slowness)
    seen = "metrics.jsonl" if slowness == SLOW_BATCH else "ckpt_0.pt"
    wait_for(tmp_path / "out" / seen)
    time.sleep(1)
    t0 = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, text, _ = finish(process)
    assert code == 143 and "after 0 updates" in text and time.monotonic() - t0 < 8
    assert checkpoint.load(tmp_path / "out" / "ckpt_0.pt")["iter_num"] == 0


@posix
def test_a_second_signal_ends_at_once(tiny, tmp_path):
    stuck = "import time; from formats import checkpoint; f = time.sleep; "
    stuck += "checkpoint.save = lambda *a: f(600)"
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


def in_a_terminal(args):
    """A process with a terminal of its own, and the terminal's other end."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        args,
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    return process, ours


@posix
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal(slow_run, tmp_path, whole, nohup):
    """The run saves and stops; with nohup it goes on, though it can print no more."""
    out = tmp_path / "out"
    before = ["import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"] * nohup
    path = str(ROOT / "train.py")
    lines = ["import sys, runpy", f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {path!r}"]
    lines += [*before, STEP_SLOWLY, f"runpy.run_path({path!r}, run_name='__main__')"]
    process, terminal = in_a_terminal([sys.executable, "-c", "\n".join(lines), *slow_run])
    while not (out / "ckpt_5.pt").exists():
        os.read(terminal, 10000)
    os.close(terminal)
    code = process.wait(60)
    if nohup:
        assert code == 0
    else:
        assert code == 129 and max(losses(out)) == listing.steps_saved(out)[0][0] - 1
        must(start([*slow_run, "--init_from=resume"]))
    assert_whole(out, whole)


@posix
def test_a_hung_data_source_ends_the_run(slow_run, tmp_path, whole):
    """A read from a dead network drive returns never, and no signal reaches the main thread."""
    hang = "import time; from text import batches; f = batches.TrainLoader.batch\n" + (
        "batches.TrainLoader.batch = lambda self, step, *a: "
        "(time.sleep(600 if step == 33 else 0), f(self, step, *a))[1]"
    )
    code, _, err = finish(start([*slow_run, "--watchdog_minutes=0.1"], hang))
    assert code == 1 and "Timeout" in err and "train.py" in err, err
    assert listing.steps_saved(tmp_path / "out")[0][0] == 30
    must(start([*slow_run, "--init_from=resume"]))
    assert_whole(tmp_path / "out", whole)


@posix
def test_a_paused_run_is_not_a_hung_one(slow_run, tmp_path, whole):
    """Ctrl-Z, and fg after a while."""
    process = start([*slow_run, "--watchdog_minutes=0.1"], STEP_SLOWLY)
    wait_for(tmp_path / "out" / "ckpt_5.pt")
    process.send_signal(signal.SIGTSTP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    must(process)
    assert_whole(tmp_path / "out", whole)


@posix
def test_a_data_file_that_is_cut_short_meanwhile(slow_run, tmp_path, dataset, whole):
    """Reading beyond its new end would be a bus error without a word."""
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    flags = [*slow_run, f"--dataset={folder}"]
    process = start(flags, STEP_SLOWLY)
    wait_for(tmp_path / "out" / "ckpt_5.pt")
    os.truncate(folder / "train.bin", 10_000)
    refused(process, "train.bin was cut short", "updates so far are saved", "--init_from=resume")
    newest = listing.steps_saved(tmp_path / "out")[0][0]
    assert newest >= 5 and max(losses(tmp_path / "out")) == newest - 1
    shutil.copy(dataset / "train.bin", folder)
    must(start([*flags, "--init_from=resume"]))
    assert_whole(tmp_path / "out", whole)


@posix
def test_a_record_that_does_not_fit_takes_no_other_with_it(tmp_path):
    code = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
from run import records
path, (_, hard) = pathlib.Path(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
print([bool(records.add_record(path, {"iter": i, "text": "x" * 20})) for i in range(4)])
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(records.add_record(path, {"iter": 9}))
print([r["iter"] for r in records.read_records(path)])
"""
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["[False, False, True, True]", "", "[0, 1, 9]"]


def test_time_limit_saves_and_stops(tiny, tmp_path):
    text = must(start([*tiny, "--max_iters=100000", "--time_limit=0.15"]))
    assert "stopped by time_limit=0.15" in text and "--init_from=resume" in text
    newest = listing.steps_saved(tmp_path / "out")[0][0]
    assert 0 < newest < 100000 and max(losses(tmp_path / "out")) == newest - 1


# --- kills and damage


def kill_and_resume(flags, out, kills, rng, longest):
    """Kill the run at random moments until it ends by itself; how often it was killed."""
    done = 0
    for _ in range(40 + 3 * kills):
        resume = ["--init_from=resume"] if listing.steps_saved(out) else ["--overwrite=True"]
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
    assert_whole(tmp_path / "out", whole)


@pytest.mark.slow
def test_sigkill_and_flipped_bytes_30_times(slow_run, tmp_path, whole):
    rng = random.Random(2)
    out = tmp_path / "out"
    for _ in range(30):
        kill_and_resume(slow_run, out, 1, rng, 5.0)
        saved = listing.steps_saved(out)
        if len(saved) > 1:  # damage the newest: the one before must do
            data = bytearray(saved[0][1].read_bytes())
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            saved[0][1].unlink()
            saved[0][1].write_bytes(data)
    must(start([*slow_run, "--init_from=resume"]))
    assert_whole(out, whole)


def damage(data, how, rng):
    """A checkpoint's bytes, hurt."""
    if how == "empty":
        return b""
    if how == "half":
        return data[: len(data) // 2]
    if how == "ten bytes short":
        return data[:-10]
    if how == "a zero block":  # what a file system leaves after a power cut
        return data[:80_000] + bytes(4096) + data[84_096:]
    if how == "flipped bits":
        bad = bytearray(data)
        for _ in range(20):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        return bytes(bad)
    return b"not a checkpoint"


HURTS = ["empty", "half", "ten bytes short", "a zero block", "flipped bits", "text"]


@pytest.mark.parametrize("how", HURTS)
def test_a_damaged_checkpoint_is_passed_over(slow_run, used, whole, how):
    newest = used / "ckpt_60.pt"
    newest.write_bytes(damage(newest.read_bytes(), how, random.Random(how)))
    text = must(start([*slow_run, "--init_from=resume"]))
    assert "passed over" in text and "ckpt_60.pt" in text and "at 55 updates" in text
    assert_whole(used, whole)
    assert (used / "ckpt_60.pt.damaged").exists(), "kept, should someone want to look at it"


def test_only_damaged_checkpoints(slow_run, used):
    """Nothing is trained, nothing is deleted."""
    for path in used.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:5000])
    err = refused(start([*slow_run, "--init_from=resume"]), "no good checkpoint")
    assert all(name in err for name in ("ckpt_60.pt", "ckpt_55.pt", "best.pt"))
    assert len(list(used.glob("*.pt"))) == 3
    refused(start([f"--out_dir={used}"], script="sample.py"), "ckpt_60.pt", "truncated")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_strangers_pickle_is_not_run(slow_run, tmp_path, used, script):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    for path in used.glob("*.pt"):
        torch.save({"model": Evil(), "train_state": {}}, path)
    flags = [*slow_run, "--init_from=resume"] if script == "train.py" else [f"--out_dir={used}"]
    refused(start(flags, script=script), "could run code", "ckpt_60.pt")
    assert not (tmp_path / "pwned").exists()


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
    real(state, Dying(file) if count == 4 else file)  # 0, best, 5, 10
torch.save = save
"""


@pytest.mark.parametrize("left", [0, pytest.param(100_000, marks=pytest.mark.slow)])
def test_dying_while_a_checkpoint_is_written(slow_run, tmp_path, whole, left):
    """nanoGPT is left with the first bytes of its only checkpoint."""
    out = tmp_path / "out"
    assert finish(start(slow_run, DIE_WRITING.format(left=left)))[0] == 9
    assert list(out.glob("*.pt.tmp")) and [s for s, _ in listing.steps_saved(out)] == [5, 0]
    must(start([*slow_run, "--init_from=resume"]))
    assert_whole(out, whole)


FULL_DISK = """
import os, torch
count, real = 0, torch.save
def save(state, file):
    global count
    count += 1
    filler = os.path.join(os.path.dirname(file.name), "filler")
    if count == 4:
        with open(filler, "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)): pass
            except OSError: pass
    if count == 7: os.unlink(filler)
    real(state, file)
torch.save = save
"""


def on_a_small_disk(folder, size):
    """The command that runs another with a disk of its own at `folder`; skips where it may not.

    What is on that disk at the end is copied to the folder that the disk hides.
    """
    folder.mkdir()
    (folder.parent / "kept").mkdir()
    lines = (
        'd="$0"; exec 3<"$d/../kept"; mount -t tmpfs -o size=' + size + ' none "$d" || exit 99; '
    )
    lines += '"$@"; code=$?; cp -r "$d"/out/. /proc/self/fd/3/; exit $code'
    prefix = ["unshare", "-Urm", "sh", "-c", lines, str(folder)]
    try:
        works = subprocess.run([*prefix, "mkdir", f"{folder}/out"], capture_output=True).returncode
    except FileNotFoundError:
        works = 1
    if works:
        pytest.skip("this user may not mount a tmpfs")
    return prefix


@posix
def test_a_disk_that_fills_up_and_has_room_again(slow_run, tmp_path, whole):
    """torch shows a full disk as RuntimeError, nanoGPT dies of it with half a file."""
    prefix = on_a_small_disk(tmp_path / "small", "2m")
    flags = [*slow_run, f"--out_dir={tmp_path / 'small' / 'out'}"]
    text = must(start(flags, FULL_DISK, prefix=prefix))
    assert text.count("training goes on without a new checkpoint") == 3, text
    kept = tmp_path / "kept"
    assert equal(weights(kept / "ckpt_60.pt"), whole[0]) and not list(kept.glob("*.tmp"))


@posix
def test_a_disk_too_small_for_the_run_is_known_before_it(slow_run, tmp_path):
    prefix = on_a_small_disk(tmp_path / "small", "1m")
    flags = [*slow_run, f"--out_dir={tmp_path / 'small' / 'out'}"]
    refused(start(flags, prefix=prefix), "0.001 GB free", "needs 0.001 GB", "--keep_last=1")


@posix
def test_a_file_size_limit_is_a_full_disk(slow_run, tmp_path):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    code, text, err = finish(start([*slow_run, "--max_iters=20"], limit))
    assert code == 1 and "could not write" in err and err.count("\n") == 1
    assert "training goes on" in text and not list((tmp_path / "out").glob("*.pt*"))


def test_the_disk_check_counts_milestones(script, tiny, used, monkeypatch):
    """And does not count the bytes of one file twice that has two names."""

    def train(free, *more):
        usage = shutil._ntuple_diskusage(9, 5, int(free * size))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return script("train.py", *tiny, "--init_from=resume", "--max_iters=61", *more)

    size = (used / "ckpt_60.pt").stat().st_size  # a little more than weights and moments
    assert "16 checkpoints" in train(9, "--milestone_interval=5").err
    assert train(1).code == 0  # three are there, four are needed
    best = used / "best.pt"
    best.unlink()
    os.link(used / "ckpt_60.pt", best)
    result = train(1, "--max_iters=62")
    assert result.code == 1 and "--keep_last=1" in result.err and result.err.count("\n") == 1


def test_a_best_checkpoint_that_cannot_be_written_is_not_forgotten(tiny, tmp_path):
    """Worse ones may not stand in for it, and later better ones must be written."""
    full = "from formats import checkpoint; f = checkpoint.save\ndef save(path, state):\n" + (
        "    if path.name == 'best.pt' and state['iter_num'] == 6: raise OSError('disk full')\n"
        "    f(path, state)\ncheckpoint.save = save"
    )
    text = must(start(tiny, full))
    assert "disk full; training goes on" in text
    best = checkpoint.load(tmp_path / "out" / "best.pt")
    assert best["iter_num"] == 12
    records = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert best["best_val_loss"] == json.loads(records[-1])["val_loss"], "its own loss"


def test_checkpoints_by_time_and_milestones(script, tiny, tmp_path):
    flags = ["--eval_interval=1000", "--max_iters=20", "--milestone_interval=5"]
    assert script("train.py", *tiny, *flags).code == 0
    assert [s for s, _ in listing.steps_saved(tmp_path / "out")] == [20, 15, 10, 5]
    flags = ["--eval_interval=1000", "--checkpoint_minutes=1e-9", "--overwrite=True"]
    assert script("train.py", *tiny, *flags, "--keep_last=9").code == 0
    assert len(listing.steps_saved(tmp_path / "out")) == 9


# --- memory


OOM = """
import torch, model
real = model.GPT.forward
def forward(self, idx, *args, **kwargs):
    if idx.size(0) > {fits}: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1")
    return real(self, idx, *args, **kwargs)
model.GPT.forward = forward
"""


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_run(script, tiny, tmp_path):
    """nanoGPT's users halve the batch by hand, and with it the tokens of a step."""
    assert script("train.py", *tiny).code == 0
    want = losses(tmp_path / "out")
    code, text, err = finish(start([*tiny, "--overwrite=True"], OOM.format(fits=1)))
    assert code == 0, err
    assert "going on with 2 x 4" in text and "going on with 1 x 8" in text
    got = losses(tmp_path / "out")
    assert got.keys() == want.keys()
    assert [got[i] for i in got] == pytest.approx([want[i] for i in got], rel=1e-4)


def test_not_even_one_window_fits(tiny):
    refused(start(tiny, OOM.format(fits=0)), "out of memory with batch_size=1", "smaller model")


def test_what_fits_in_memory_is_remembered(script, tiny, tmp_path):
    """A resumed run does not try the size again that failed, unless the user sets another."""
    must(start(tiny, OOM.format(fits=2)))
    again = [*tiny, "--init_from=resume"]
    text = must(start([*again, "--max_iters=13"], OOM.format(fits=2)))
    assert "out of memory" not in text and "(2 x 32 x 4 micro-steps)" in text
    text = script("train.py", *again, "--max_iters=14", "--batch_size=8").out
    assert "(8 x 32 x 1 micro-steps)" in text
    assert checkpoint.load(tmp_path / "out" / "ckpt_14.pt")["train_state"]["micro_batch"] == 0


# --- numbers


BAD_GRADIENT = """
import torch.nn.utils as utils
real, calls = utils.clip_grad_norm_, []
def clip(parameters, limit):
    parameters = list(parameters)
    calls.append(1)
    if len(calls) in {bad}:
        parameters[3].grad[0, 0] = float("{number}")
    return real(parameters, limit)
utils.clip_grad_norm_ = clip
"""


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_a_step_with_a_bad_gradient_is_left_out(tiny, tmp_path, number):
    """clip_grad_norm_ spreads one infinite gradient as NaN over all weights."""
    text = must(start(tiny, BAD_GRADIENT.format(bad=(4, 5), number=number)))
    assert text.count("left out, not finite") == 2 and "2 updates left out" in text
    state = checkpoint.load(tmp_path / "out" / "ckpt_12.pt")
    assert all(bool(t.isfinite().all()) for t in state["model"].values())
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}
    assert state["train_state"]["skipped"] == 2


def test_a_run_whose_updates_were_all_left_out_goes_on(script, tiny, tmp_path):
    """As float16's first ones may be, while it looks for its scale: there are no moments yet."""
    must(start([*tiny, "--max_iters=2"], BAD_GRADIENT.format(bad=(1, 2), number="inf")))
    result = script("train.py", *tiny, "--init_from=resume", "--max_iters=3")
    assert result.code == 0, result.err
    state = checkpoint.load(tmp_path / "out" / "ckpt_3.pt")["optimizer"]["state"]
    assert {int(s["step"]) for s in state.values()} == {1}


BAD_LOSS = """
import model
real, calls = model.GPT.forward, []
def forward(self, idx, *args, **kwargs):
    logits, loss = real(self, idx, *args, **kwargs)
    calls.append(self.training)
    return logits, loss * float("nan") if sum(calls) > 14 else loss
model.GPT.forward = forward
"""


def test_a_loss_that_stays_nan_ends_the_run(tiny, tmp_path):
    """nanoGPT trains on to the end, and saves nothing but NaN."""
    out = tmp_path / "out"
    flags = [*tiny, "--max_skipped=3", "--checkpoint_interval=1"]
    code, text, err = finish(start(flags, BAD_LOSS))
    assert code == 1 and err.count("\n") == 1 and "3 updates in a row" in err, err
    assert text.count("left out, not finite: loss nan") == 3
    report = json.loads((out / "bad_step.json").read_text(encoding="utf-8"))
    assert report["iter"] == 9 and len(report["windows"]) == 8
    last = listing.steps_saved(out)[0][1]
    assert all(bool(t.isfinite().all()) for t in weights(last).values())
    must(start([*tiny, "--init_from=resume"]))


def test_a_checkpoint_with_bad_weights_is_never_written(tmp_path):
    bad = {"model": {"w": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(ValueError, match="NaN"):
        checkpoint.save(tmp_path / "a.pt", bad)
    assert not os.listdir(tmp_path)


def test_loss_spikes_are_left_out_when_asked(script, tiny, tmp_path):
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
    refused(start([*tiny, "--overwrite=True"]), f"pid {first.pid} on ", "--out_dir")
    assert first.poll() is None
    first.kill()
    finish(first)
    text = must(start([*slow_run, "--max_iters=300", "--init_from=resume"]))
    assert "took over" in text and f"pid {first.pid}" in text


def test_a_lock_is_given_back(tmp_path):
    assert folder.lock(tmp_path) == ""
    with pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        folder.lock(tmp_path)
    folder.unlock()
    assert folder.lock(tmp_path) == ""
    folder.unlock()


@posix
def test_a_file_system_without_locks(tiny, tmp_path):
    """Some network drives: the run goes on, and says what it could not make sure of."""
    none = "import fcntl\ndef flock(*a): raise OSError(37, 'No locks available')\n"
    text = must(start([*tiny, "--max_iters=2"], none + "fcntl.flock = flock"))
    assert "cannot be locked (No locks available)" in text
    assert listing.steps_saved(tmp_path / "out")[0][0] == 2


def test_a_used_folder_is_not_overwritten(slow_run, used, whole):
    ways = ("--init_from=resume", "--out_dir", "--overwrite=True")
    refused(start([*slow_run, "--seed=5"]), *ways)
    base = f"--init_from={used / 'ckpt_60.pt'}"
    refused(start([*slow_run, base, "--overwrite=True"]), "--out_dir")
    assert_whole(used, whole)


# --- files


@posix
def test_links_in_the_folder_are_replaced_not_followed(tiny, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious", encoding="utf-8")
    for name in ("ckpt_6.pt", "ckpt_6.pt.tmp", "best.pt", "best.pt.tmp", "metrics.jsonl"):
        (out / name).symlink_to(victim)
    for name in ("config.json", "config.json.tmp", "loss.png"):
        (out / name).symlink_to(victim)
    must(start([*tiny, "--overwrite=True"]))
    assert victim.read_text(encoding="utf-8") == "precious"
    assert checkpoint.load(out / "ckpt_6.pt")["iter_num"] == 6
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(victim)
    refused(start([*tiny, "--overwrite=True"]), ".lock")
    assert victim.read_text(encoding="utf-8") == "precious"


@posix
def test_files_have_the_users_umask_and_no_secrets(tiny, tmp_path):
    secrets = {"WANDB_API_KEY": "hush-hush-1", "HF_TOKEN": "hush-hush-2"}
    text = must(start(tiny, "import os; os.umask(0o077)", **secrets))
    out = tmp_path / "out"
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o600}
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert "hush" not in text and not any(b"hush" in p.read_bytes() for p in out.iterdir())


def test_resuming_with_other_settings_warns(slow_run, used):
    flags = [*slow_run, "--init_from=resume", "--max_iters=61", "--seed=2", "--batch_size=8"]
    text = must(start(flags))
    assert "WARNING" in text and "seed 1337 -> 2" in text and "max_iters 60 -> 61" in text
    assert "windows of an evaluation 8 -> 16" in text


def test_a_half_written_line_of_the_log_is_dropped(slow_run, used, whole):
    (used / "ckpt_60.pt").unlink()
    with (used / "metrics.jsonl").open("a", encoding="utf-8") as f:
        f.write('{"iter": 3, "lo')
    must(start([*slow_run, "--init_from=resume"]))
    assert_whole(used, whole)
    assert sorted(losses(used)) == list(range(60))


@posix
@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/nothing"])
def test_a_folder_that_cannot_be_written(tiny, place):
    refused(start([*tiny, f"--out_dir={place}"]), place)


@posix
def test_a_read_only_folder(tiny, tmp_path):
    prefix = on_a_small_disk(tmp_path / "small", "2m")
    prefix[4] = prefix[4].replace("-o size=2m", "-o ro,size=2m")
    flags = [*tiny, f"--out_dir={tmp_path / 'small' / 'out'}"]
    code, _, err = finish(start(flags, prefix=prefix))
    assert code == 1 and err.splitlines()[0].startswith("train.py: ") and "Read-only" in err, err


def test_out_dir_is_a_file(tiny, tmp_path):
    (tmp_path / "out").write_text("precious", encoding="utf-8")
    refused(start(tiny), "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "precious"


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def wrong_id(folder):
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[7] = 60000
    ids.tofile(folder / "train.bin")
    (folder / "meta.json").unlink()


@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (lambda folder: (folder / "train.bin").unlink(), ["train.bin", "python data/prepare.py"]),
        (lambda folder: (folder / "val.bin").unlink(), ["val.bin", "python data/prepare.py"]),
        (cut("train.bin", 0), ["train.bin has 0 bytes"]),
        (cut("train.bin", 20_001), ["train.bin has 20001 bytes", "uint16"]),
        (cut("train.bin", 20_000), ["train.bin has 10,000 tokens", "meta.json"]),
        (cut("meta.json", 20), ["meta.json is damaged"]),
        (wrong_id, ["60000", "50304"]),
    ],
)
def test_hurt_data_is_known_before_the_run(tiny, tmp_path, dataset, hurt, words):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    hurt(folder)
    refused(start([*tiny, f"--dataset={folder}"]), *words)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init_from=resume"], ["no checkpoint", "python train.py"]),
        (["--init_from=nowhere.pt"], ["no checkpoint nowhere.pt"]),
        (["--device=cuda:7"], ["cuda:7", "--device=auto"]),
        (["--tokens_per_step=250"], ["tokens_per_step=250", "224 or 256"]),
        (["--eval_windows=0", "--beta1=-1"], ["eval_windows must be at least 1", "beta1"]),
    ],
)
def test_mistakes_cost_a_line_and_no_work(tiny, tmp_path, flags, words):
    refused(start([*tiny, *flags]), *words)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_a_checkpoint_that_does_not_fit(slow_run, used, tmp_path, whole):
    """Another model's sizes are listed; nanoGPT's file and bare weights are called so."""
    flags = [*slow_run, "--init_from=resume", "--hidden_size=48", "--num_hidden_layers=3"]
    refused(start(flags), "hidden_size is 48, there 32", "num_hidden_layers is 3, there 2")
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": False}
    other = {"transformer.wte.weight": torch.ones(320, 32)}
    torch.save({"model": other, "model_args": args, "iter_num": 1}, tmp_path / "nano.pt")
    torch.save(other, tmp_path / "bare.pt")
    for name, word in (("nano.pt", "nanoGPT"), ("bare.pt", "bare state dict")):
        flags = [f"--init_from={tmp_path / name}"]
        refused(start(flags, script="sample.py"), name, word)
    assert_whole(used, whole)


# --- sampling


def test_nan_weights_are_called_so(tmp_path, whole_out):
    state = checkpoint.load(whole_out / "best.pt")
    state["model"]["norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "bad.pt")
    refused(start([f"--init_from={tmp_path / 'bad.pt'}"], script="sample.py"), "NaN", "bad.pt")


@posix
def test_ctrl_c_while_sampling_keeps_the_text(whole_out, heeded):
    slow = "import time; from making import sampling; f = sampling.next_token\n"
    slow += "sampling.next_token = lambda *a: (time.sleep(0.05), f(*a))[1]"
    flags = [f"--out_dir={whole_out}", "--start=the cat", "--device=cpu", "--max_new_tokens=10000"]
    process = start(flags, slow, script="sample.py")
    seen = process.stdout.read(12)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and seen.startswith("the cat") and "interrupted" in err
    assert "Traceback" not in err


@posix
def test_a_reader_that_goes_away_while_sampling(whole_out):
    """python sample.py | head -c 20"""
    flags = [f"--out_dir={whole_out}", "--device=cpu", "--max_new_tokens=3000"]
    process = start(flags, script="sample.py")
    process.stdout.read(20)
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert code in (1, 141) and "Traceback" not in err and "Exception ignored" not in err


# --- wandb


FAKE_WANDB = """
import json, pathlib
log = pathlib.Path(__file__).with_suffix(".txt")
class Run:
    id = "run-7"
    def log(self, record, step):
        with log.open("a") as f: f.write(json.dumps({"step": step, **record}) + "\\n")
def init(**settings):
    with log.open("a") as f: f.write(json.dumps(settings) + "\\n")
    return Run()
"""


def test_a_resumed_run_goes_on_with_its_wandb_run(tiny, tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB, encoding="utf-8")
    flags = [*tiny, "--wandb_log=True", "--wandb_project=p"]
    must(start(flags, PYTHONPATH=str(tmp_path), WANDB_API_KEY="hush-hush"))
    must(
        start([*flags, "--init_from=resume", "--max_iters=13"], PYTHONPATH=str(tmp_path)),
    )
    text = (tmp_path / "wandb.txt").read_text(encoding="utf-8")
    inits = [r for r in map(json.loads, text.splitlines()) if "project" in r]
    assert [(r["id"], r["resume"]) for r in inits] == [(None, "allow"), ("run-7", "allow")]
    assert inits[0]["project"] == "p" and inits[0]["config"]["learning_rate"] == 1e-2
    assert "hush" not in text
    steps = [r["step"] for r in map(json.loads, text.splitlines()) if "loss" in r]
    assert steps == list(range(13))


@pytest.mark.parametrize("at", ["init", "log"])
def test_wandb_that_fails_stops_no_run(tiny, tmp_path, at):
    broken = FAKE_WANDB.replace(f"def {at}(", f"def {at}(*a, **k): raise OSError('no net')\ndef x(")
    if at == "log":
        broken = FAKE_WANDB.replace(
            "        with log", "        raise OSError('no net')\n        with log", 1
        )
    (tmp_path / "wandb.py").write_text(broken, encoding="utf-8")
    text = must(start([*tiny, "--wandb_log=True"], PYTHONPATH=str(tmp_path)))
    assert "OSError: no net" in text and len(losses(tmp_path / "out")) == 12


# --- the archive reader


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
    assert listing.steps_saved(tmp_path / "out")[0][0] == 12, done.stderr


@posix
def test_ctrl_c_while_python_ends_changes_nothing(tmp_path):
    """All is done by then, and Python calls no handler any more."""
    code = (
        "import os, signal; from run import interrupt; interrupt.take(interrupt.end)\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        "        kill(pid, 2)\n"
        "late = Late()\n"
        "import sys; sys.late = late\n"  # is deleted with the last modules
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
