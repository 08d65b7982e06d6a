"""The same run on several processes: real ones, under torchrun, on CPUs with gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY

from formats import checkpoint, easygpt, listing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo and signals as on Linux")

# 50 updates of 12 windows, which 1, 2, 3 and 4 ranks can share; a checkpoint at 30 stays. At TINY's
# own learning rate the run is chaotic: after 25 updates the last bit of a sum shows in the loss.
SIZES = [*TINY, "--batch_size=1", "--tokens_per_step=384", "--max_iters=50", "--eval_iters=7"]
SIZES += ["--eval_interval=25", "--milestone_interval=30", "--learning_rate=1e-3", "--min_lr=1e-4"]


def torchrun(ranks, *flags, code="", out=None, launcher=()):
    """Start train.py on several ranks; `code` runs first in each of them."""
    path = ROOT / "train.py"
    if code:
        path = out.with_name(f"{out.name}_wrapped.py")
        head = f"import os, sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\n"
        path.write_text(
            f"{head}{code}\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n",
            encoding="utf-8",
        )
    command = [sys.executable, "-m", "torch.distributed.run", *(launcher or ["--standalone"])]
    command += [f"--nproc_per_node={ranks}", str(path), *flags]
    if out:
        command.append(f"--out_dir={out}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, encoding="utf-8", env=env)


def without_torchrun(*flags, out):
    """The folder of a run of train.py in a process alone, once it has ended well."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--out_dir={out}"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def finish(process):
    text, err = process.communicate(timeout=600)
    return process.returncode, text, err


def must(process):
    code, text, err = finish(process)
    assert code == 0, err
    return text


def said(err):
    """What the ranks themselves have written, not torchrun."""
    return [line for line in err.splitlines() if "train.py: " in line]


def losses(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {(r["iter"], k): r[k] for r in map(json.loads, lines) for k in r if "loss" in k}


def assert_same_run(out, whole):
    """Losses, training and validation, and the final weights, to 1e-5."""
    got, want = losses(out), losses(whole)
    assert got.keys() == want.keys()
    assert [got[k] for k in want] == pytest.approx(list(want.values()), rel=1e-5)
    a, b = (checkpoint.load(folder / "ckpt_50.pt") for folder in (out, whole))
    assert a["model"].keys() == b["model"].keys()
    for name, weight in b["model"].items():
        torch.testing.assert_close(a["model"][name], weight, rtol=1e-5, atol=1e-5)
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()


@pytest.fixture(scope="session")
def flags(dataset):
    return [f"--dataset={dataset}", *SIZES]


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory):
    """The folder of the run in one process."""
    return without_torchrun(*flags, out=tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="session")
def on_two(flags, tmp_path_factory):
    """The folder of the run on two ranks."""
    out = tmp_path_factory.mktemp("two") / "out"
    text = must(torchrun(2, *flags, out=out))
    assert "(1 x 32 x 6 micro-steps x 2 ranks)" in text and text.count("step      3 |") == 1
    return out


def test_two_ranks_make_the_same_run(on_two, whole):
    assert_same_run(on_two, whole)
    assert sorted(p.name for p in on_two.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--parallel=fsdp"]])
def test_one_rank_in_bfloat16_makes_the_same_run(flags, tmp_path, more):
    """DDP and FSDP want the gradients of the weights, not of copies."""
    kind = [*flags, "--dtype=bfloat16", "--max_iters=8", "--milestone_interval=0"]
    alone, grouped = tmp_path / "alone", tmp_path / "grouped"
    must(torchrun(1, *kind, *more, out=grouped))
    got, want = losses(grouped), losses(without_torchrun(*kind, out=alone))
    assert got.keys() == want.keys()
    assert list(got.values()) == pytest.approx(list(want.values()), abs=0.01)


@pytest.mark.slow
def test_two_ranks_weigh_answers_alike(script, tmp_path):
    """Conversations of very different length: ranks and micro-batches have unequal counts."""
    rows = [
        {"question": f"{i}?" * (1 + i % 5), "answer": "word " * (1 + i * i % 23)} for i in range(90)
    ]
    source, data = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    what = [f"--source={source}", f"--dataset={data}", "--tokenizer=bytes", "--chat=True"]
    assert script("data/prepare.py", *what).code == 0
    flags = [f"--dataset={data}", *SIZES, "--max_position_embeddings=160", "--max_iters=6"]
    flags += ["--tokens_per_step=1920", "--eval_interval=3", "--milestone_interval=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert script("train.py", *flags, f"--out_dir={one}", "--batch_size=3").code == 0
    must(torchrun(2, *flags, out=two))
    got, want = losses(two), losses(one)
    assert got.keys() == want.keys() and len(want) == 9
    assert [got[k] for k in want] == pytest.approx(list(want.values()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_more_ranks_and_shards_make_the_same_run(flags, whole, tmp_path, ranks, parallel):
    must(torchrun(ranks, *flags, f"--parallel={parallel}", out=tmp_path / "out"))
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_compiled_ranks_make_the_same_run(flags, whole, tmp_path, parallel):
    """The whole model in DDP's case, each layer in FSDP's."""
    flags = [*flags, "--compile=True", f"--parallel={parallel}"]
    assert "compile  took" in must(torchrun(2, *flags, out=tmp_path / "out"))
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sharded_checkpoints=True"]])
def test_two_machines_with_a_whole_model_each_make_the_same_run(flags, whole, tmp_path, more):
    """HSDP, two torchruns meeting at a port as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        torchrun(
            2, *flags, "--parallel=hsdp", *more, out=tmp_path / "out",
            launcher=["--nnodes=2", f"--node_rank={i}", "--rdzv_backend=c10d", "--rdzv_id=x",
                      f"--rdzv_endpoint=localhost:{port}"],
        )
        for i in range(2)
    ]  # fmt: skip
    assert "x 4 ranks" in "".join([must(node) for node in nodes])
    assert_same_run(end_of(tmp_path / "out"), whole)


def cut(whole, out):
    """A copy of a run's folder as it was after 30 updates."""
    out.mkdir()
    for name in ("ckpt_30.pt", "metrics.jsonl"):
        (out / name).write_bytes((whole / name).read_bytes())
    return out


def test_saved_on_two_ranks_resumed_on_one(on_two, flags, script, tmp_path):
    out = cut(on_two, tmp_path / "out")
    result = script("train.py", *flags, "--init_from=auto", f"--out_dir={out}")
    assert result.code == 0 and "resumed" in result.out, result.err
    assert_same_run(out, on_two)


@pytest.mark.slow
def test_saved_on_two_ranks_resumed_on_three_with_shards(on_two, flags, tmp_path):
    """Three do not divide the weights' rows: the shards are uneven."""
    out = cut(on_two, tmp_path / "out")
    text = must(torchrun(3, *flags, "--init_from=resume", "--parallel=fsdp", out=out))
    assert "resumed" in text
    assert_same_run(out, on_two)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_saved_in_shards_resumed_without(flags, whole, tmp_path, ranks):
    first = tmp_path / "first"
    must(torchrun(2, *flags, "--parallel=fsdp", out=first))
    out = cut(first, tmp_path / "out")
    must(torchrun(ranks, *flags, "--init_from=resume", out=out))
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_saved_on_two_ranks_resumed_on_more(on_two, flags, tmp_path, ranks):
    out = cut(on_two, tmp_path / "out")
    must(torchrun(ranks, *flags, "--init_from=resume", out=out))
    assert_same_run(out, on_two)
    if ranks == 2:
        a, b = (checkpoint.load(f / "ckpt_50.pt")["model"] for f in (out, on_two))
        assert all(torch.equal(a[k], b[k]) for k in b), "as many ranks: bit for bit"


AT_STEP = """
import signal
from text import batches
real = batches.TrainLoader.batch
def batch(self, step, micro_step, batch_size):
    if os.environ["RANK"] == "1" and (step, micro_step) == (37, 2):
        {do}
    return real(self, step, micro_step, batch_size)
batches.TrainLoader.batch = batch
"""


def test_a_killed_worker_is_restarted_from_the_last_checkpoint(on_two, flags, tmp_path):
    """torchrun starts all workers again; --init_from=auto makes them go on."""
    kill = "if os.environ['TORCHELASTIC_RESTART_COUNT'] < '2': os.kill(os.getpid(), signal.SIGKILL)"
    out = tmp_path / "out"
    process = torchrun(
        2, *flags, "--init_from=auto", code=AT_STEP.format(do=kill), out=out,
        launcher=["--standalone", "--max-restarts=3"],
    )  # fmt: skip
    code, text, err = finish(process)
    assert code == 0, err
    assert text.count("resumed ") == 2 and "Traceback" not in err
    assert_same_run(out, on_two)
    a, b = (checkpoint.load(f / "ckpt_50.pt")["model"] for f in (out, on_two))
    assert all(torch.equal(a[k], b[k]) for k in b), "as many ranks: bit for bit"


def test_a_signal_to_one_rank_stops_all(flags, tmp_path):
    """Within the step, which is dropped; what is saved is the last complete one, and once."""
    out = tmp_path / "out"
    usr1 = AT_STEP.format(do="os.kill(os.getpid(), signal.SIGUSR1)")
    text = must(torchrun(2, *flags, code=usr1, out=out))
    assert "stopped by SIGUSR1 after 37 updates" in text
    assert "torchrun --standalone --nproc_per_node=2" in text and "--init_from=resume" in text
    assert listing.steps_saved(out)[0][0] == 37
    assert max(step for step, _ in losses(out)) == 36
    assert (out / ".lock").read_text(encoding="utf-8") == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_stops_all(flags, tmp_path, name):
    out = tmp_path / "out"
    slowly = AT_STEP.format(do="pass") + "\nimport time; f = torch.nn.utils.clip_grad_norm_\n"
    slowly = f"import torch\n{slowly}" + (
        "torch.nn.utils.clip_grad_norm_ = lambda *a, **k: (time.sleep(0.3), f(*a, **k))[1]"
    )
    process = torchrun(2, *flags, code=slowly, out=out)
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, text, err = finish(process)  # torchrun itself ends with its own traceback
    assert f"stopped by {name}" in text and not said(err)
    newest = listing.steps_saved(out)[0][0]
    assert newest < 50
    assert max([-1, *(step for step, k in losses(out) if k == "loss")]) == newest - 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--tokens_per_step=352", "11 windows of 32 tokens, which 2 processes"),
        pytest.param("--max_skipped=0", "must be at least 1", marks=pytest.mark.slow),
        pytest.param("--device=cuda:1", "choose GPUs by", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_line_from_one_rank(flags, tmp_path, flag, words):
    code, _, err = finish(torchrun(2, *flags, flag, out=tmp_path / "out"))
    (line,) = said(err)
    assert code == 1 and words in line


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_wrong_on_one_rank_is_one_line(flags, tmp_path, rank):
    """The others notice that it is gone, and leave the word to it."""
    wrong = AT_STEP.format(do="raise ValueError('its disk is broken')")
    out = tmp_path / "out"
    wrong = wrong.replace('== "1"', f'== "{rank}"')
    code, _, err = finish(torchrun(2, *flags, code=wrong, out=out))
    (line,) = said(err)
    assert code == 1 and line.endswith("its disk is broken"), err


@pytest.mark.slow
def test_out_of_memory_on_one_rank_halves_the_micro_batch_of_all(flags, whole, tmp_path):
    code = """
import torch, model
real = model.GPT.forward
def forward(self, idx, *args, **kwargs):
    if idx.size(0) > 1 and os.environ["RANK"] == "1": raise torch.OutOfMemoryError("CUDA: no")
    return real(self, idx, *args, **kwargs)
model.GPT.forward = forward
"""
    out = tmp_path / "out"
    text = must(torchrun(2, *flags, "--batch_size=2", "--eval_iters=4", code=code, out=out))
    assert "another rank is out of memory" in text and "going on with 1 x 6" in text
    got, want = ([v for (_, k), v in losses(f).items() if k == "loss"] for f in (out, whole))
    assert got == pytest.approx(want, rel=1e-5)


COUNT = """
import collections, json
from torch.profiler import ProfilerActivity, profile
train, argv, found = {train!r}, sys.argv, []
for parallel, batch in (("ddp", 6), ("ddp", 1), ("fsdp", 6), ("fsdp", 2)):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(len(found))  # a group of its own
    sys.argv = [*argv, f"--parallel={{parallel}}", f"--batch_size={{batch}}"]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        try:
            runpy.run_path(train, run_name="__main__")
        except SystemExit:
            pass
    moved = collections.Counter()
    for e in seen.events():
        if e.name == "gloo:all_reduce" and parallel == "ddp" and e.input_shapes[0] > [8]:
            moved["reduced"] += e.input_shapes[0][0]
        elif e.name == "c10d::_reduce_scatter_base_":
            moved["reduced"] += e.input_shapes[1][0]
        elif e.name == "c10d::_allgather_base_":
            moved["gathered"] += e.input_shapes[0][0]
    found.append(moved)
if os.environ["RANK"] == "0":
    print("FOUND", json.dumps(found))
sys.exit(0)
"""


@pytest.mark.slow
def test_a_step_exchanges_each_gradient_once_whatever_the_accumulation(flags, whole, tmp_path):
    """Counted in the profiler's events: 1, 3 and 6 micro-steps a rank; 2 updates."""
    model = checkpoint.load(whole / "ckpt_50.pt")["model"]
    size = sum(t.numel() for name, t in model.items() if name != "lm_head.weight")
    more = ["--max_iters=2", "--warmup_iters=0", "--eval_iters=1", "--overwrite=True"]
    code = COUNT.format(train=str(ROOT / "train.py"))
    text = must(torchrun(2, *flags, *more, code=code, out=tmp_path / "out"))
    (line,) = [line for line in text.splitlines() if line.startswith("FOUND")]
    found = json.loads(line[6:])
    assert [f["reduced"] for f in found[:2]] == [2 * size] * 2
    # a sharded run has its first micro-step once more, which tries out the memory
    assert [f["reduced"] for f in found[2:]] == [3 * size] * 2
    # with several micro-steps a block's weights are gathered once a step, not twice
    assert found[3]["gathered"] < found[2]["gathered"]


SHARDED = ["--parallel=fsdp", "--sharded_checkpoints=True", "--init_from=auto"]


@pytest.fixture(scope="session")
def in_shards(flags, tmp_path_factory):
    """The folder of the run on two ranks of which each writes its part of a checkpoint."""
    out = tmp_path_factory.mktemp("shards") / "out"
    must(torchrun(2, *flags, *SHARDED, out=out))
    return out


def test_shards_hold_what_a_file_holds(in_shards, whole):
    names = {p.name.replace(".shards", ".pt") for p in in_shards.iterdir()}
    assert names == {p.name for p in whole.iterdir()}
    for name in ("ckpt_50", "best"):
        a = checkpoint.load(in_shards / f"{name}.shards")
        b = checkpoint.load(whole / f"{name}.pt")
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] for k in ("iter_num", "model_args", "tokenizer", "data"))
        theirs = easygpt.clean_state_dict(a["model"])
        torch.testing.assert_close(theirs, dict(b["model"]), rtol=1e-5, atol=1e-5)
        assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
        for i, states in b["optimizer"]["state"].items():
            torch.testing.assert_close(a["optimizer"]["state"][i], states, rtol=1e-4, atol=1e-5)
    sizes = [p.stat().st_size for p in (in_shards / "ckpt_50.shards").glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes), "each rank has written its part"


def cut_shards(source, out):
    """As `cut`, of a run whose checkpoints are folders."""
    out.mkdir()
    shutil.copytree(source / "ckpt_30.shards", out / "ckpt_30.shards")
    (out / "metrics.jsonl").write_bytes((source / "metrics.jsonl").read_bytes())
    return out


def end_of(out):
    """The last checkpoint as a .pt for assert_same_run."""
    folder = out / "ckpt_50.shards"
    if folder.exists():
        state = checkpoint.load(folder)
        state["model"] = easygpt.clean_state_dict(state["model"])
        checkpoint.save(out / "ckpt_50.pt", state)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, []), (2, ["--parallel=ddp"]), (2, SHARDED), (3, SHARDED), (3, ["--parallel=fsdp"])],
)
def test_saved_in_parts_resumed_on_any_number(in_shards, flags, whole, tmp_path, ranks, more):
    """Parts into parts of another number, into whole models, and from there into one file."""
    out = cut_shards(in_shards, tmp_path / "out")
    text = must(torchrun(ranks, *flags, "--init_from=resume", *more, out=out))
    assert "resumed" in text and "ckpt_30.shards at 30 updates" in text
    assert (out / "ckpt_50.shards").exists() == (more == SHARDED)
    assert_same_run(end_of(out), whole)


@pytest.mark.slow
def test_a_file_resumed_in_parts(on_two, flags, tmp_path):
    out = cut(on_two, tmp_path / "out")
    must(torchrun(2, *flags, *SHARDED, out=out))
    assert_same_run(end_of(out), on_two)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(2, []), (3, ["--parallel=fsdp"]), (2, SHARDED)])
def test_muon_on_ranks_and_shards_makes_the_same_run(flags, tmp_path, ranks, more):
    """Ranks turn whole matrices. From 30 updates on again, in one process: moments come back."""
    flags = [*flags, "--optimizer=muon", "--muon_lr=2e-3", "--lr_schedule=wsd", "--decay_share=0.5"]
    whole, out = without_torchrun(*flags, out=tmp_path / "whole"), tmp_path / "out"
    must(torchrun(ranks, *flags, *more, out=out))
    again = (cut_shards if more == SHARDED else cut)(out, tmp_path / "again")
    assert_same_run(end_of(out), whole)
    must(torchrun(1, *flags, "--init_from=resume", out=again))
    assert_same_run(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--parallel=fsdp"], SHARDED])
def test_int8_on_ranks_and_shards_learns_the_same(flags, tmp_path, more):
    """Nearly: a last bit that differs may move a number to the next of 255 levels."""
    flags = [*flags, "--matmul_dtype=int8"]
    whole, out = without_torchrun(*flags, out=tmp_path / "whole"), tmp_path / "out"
    must(torchrun(2, *flags, *more, out=out))
    again = (cut_shards if more == SHARDED else cut)(out, tmp_path / "again")
    must(torchrun(1, *flags, "--init_from=resume", out=again))
    want = list(losses(whole).values())
    for folder in (out, again):
        assert list(losses(folder).values()) == pytest.approx(want, abs=2e-3)


WRITTEN = """
import signal
from formats import sharded
real = sharded.Writer.written
def written(self, folder, tensors):
    if os.environ["RANK"] == "1" and folder.name.startswith("ckpt_{step}"):
        {do}
    return real(self, folder, tensors)
sharded.Writer.written = written
"""


@pytest.mark.slow
def test_killed_while_parts_are_written(flags, whole, tmp_path):
    """Rank 1 dies after it has written its part of one checkpoint, before rank 0 names it."""
    kill = (
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = torchrun(
        2, *flags, *SHARDED, code=WRITTEN.format(step=50, do=kill), out=tmp_path / "out",
        launcher=["--standalone", "--max-restarts=1"],
    )  # fmt: skip
    text, out = must(process), tmp_path / "out"
    assert text.count("resumed ") == 1 and not list(out.glob("*.tmp"))
    assert_same_run(end_of(out), whole)


@pytest.mark.slow
def test_one_rank_that_cannot_write_its_part_stops_nothing(flags, whole, tmp_path):
    """All ranks learn of it, keep the old checkpoints, say so once, and save the next one."""
    code = WRITTEN.format(step=30, do="raise OSError(28, 'No space left on device')")
    out = tmp_path / "out"
    text = must(torchrun(2, *flags, *SHARDED, code=code, out=out))
    assert text.count("No space left on device; training goes on without a new checkpoint") == 1
    names = {p.name for p in out.glob("*.shards*")}
    assert names == {"ckpt_25.shards", "ckpt_50.shards", "best.shards"}
    assert_same_run(end_of(out), whole)


@pytest.mark.slow
def test_a_new_run_from_parts_with_a_smaller_context(in_shards, flags, tmp_path):
    short = ["--max_position_embeddings=16", "--max_iters=3", "--eval_interval=3"]
    short.append(f"--init_from={in_shards / 'best.shards'}")
    found = []
    for ranks, more in ((2, SHARDED[:2]), (1, [])):
        out = tmp_path / str(ranks)
        assert "context 16" in must(torchrun(ranks, *flags, *more, *short, out=out))
        found.append(list(losses(out).values()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


PEAK = """
import json, torch
from run import parallel
from run import team
from dataclasses import replace
from plan import fit, memory
from run import machine
from torch.profiler import ProfilerActivity, profile
from model import GPT, GPTConfig
from run.optim import configure_optimizer
team, found = team.join(5), []
size = GPTConfig(vocab_size=1024, hidden_size=128, intermediate_size=320, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64)
for dtype in (torch.float32, torch.bfloat16):
    for micro in (1, 3):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model = GPT(size)
            parallel.shard(model, model.layers, team, torch.device("cpu"), dtype, False)
            optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
            for _ in range(3):
                for i in range(micro):
                    x = torch.randint(1024, (2, 64))
                    parallel.set_sync(model, i == micro - 1, micro == 1)
                    with machine.autocast(torch.device("cpu"), dtype):
                        loss = model(x, x, loss_only=True)[1]
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        live, lives = 0, []
        for e in sorted(events, key=lambda e: e.start_ns()):
            live += e.nbytes()
            lives.append(live)
        training = memory.Training(size, dtype, "cpu", False, False, micro > 1)
        training = replace(training, ranks=team.ranks, shards=team.ranks)
        planned = fit.peak(training, 2, 2 * micro)
        found.append(max(lives[2 * len(lives) // 3 :]) / planned)
if team.rank == 0:
    print("FOUND", json.dumps(found))
sys.exit(0)
"""


@pytest.mark.slow
def test_the_planned_memory_of_shards_is_what_a_rank_takes(tmp_path):
    """Of the last step; the plan takes the largest moments for one, and ranks free with delay."""
    text = must(torchrun(2, code=PEAK, out=tmp_path / "out"))
    shares = json.loads(text.split("FOUND ")[1].splitlines()[0])
    assert len(shares) == 4 and all(0.55 < share < 1.15 for share in shares), shares
