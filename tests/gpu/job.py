"""Runs of train.py one after the other, in a process of their own: python -m gpu.job SPEC.json

SPEC is {"device", "report", "runs"}; each run has "folder", its out_dir, "flags", and may have

    start        a checkpoint to copy into the folder before
    torchrun     true: in a new process, as the only rank of a team
    fits         B: leave a GPU too little memory for more than B windows, by the plan of memory.py;
                 on a CPU, where nothing can be that short, raise torch's error instead
    windows      of an update, and "size", the model's: for that plan
    peaks        true: have each update's peak of a GPU's memory in the report
    inf_at       U: put an infinity into a gradient of update U, counted from 0

What they said and did goes to SPEC's report, a list with a dict for each run, see `Watch`.
"""

import contextlib
import gc
import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def without_codegen():
    """Have torch.compile trace and call the graphs as they are: seconds on a CPU, not minutes."""
    real = torch.compile

    def traced(model=None, *, options=None, recompile_limit=None, mode=None, **how):
        return real(model, **{**how, "backend": "aot_eager"})

    return mock.patch.object(torch, "compile", traced)


def warm_up(where):
    """Have CUDA make what stays: contexts, and cuBLAS its workspaces, one for each thread.

    The plan leaves them to its reserve, as it does the kernels.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(64, 64, device=where, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    del x
    gc.collect()
    torch.cuda.empty_cache()


def graphs():
    """The number that this process has compiled, those that the plan looks at included."""
    from torch._dynamo.utils import counters  # seconds, which tests that are skipped do not have

    return counters["stats"]["unique_graphs"]


class Watch:
    """Sees each update that a run logs: graphs compiled so far, symbols in them, peak memory."""

    def __init__(self, where, peaks):
        self.where, self.updates, self.scales = where, [], []
        self.peaks = peaks and where.type == "cuda"
        self.symbols = 0  # instead of sizes of inputs
        self.base = 0  # bytes on the GPU before
        torch._dynamo.reset()  # a run of before has compiled nothing for this one
        gc.collect()
        self.graphs_before = graphs()
        if self.peaks:
            warm_up(where)
            self.base = torch.cuda.memory_allocated(where)
            torch.cuda.reset_peak_memory_stats(where)

    def update(self, record):
        seen = {"iter": record["iter"], "loss": record["loss"], "symbols": self.symbols}
        seen["graphs"] = graphs() - self.graphs_before
        if self.peaks:
            seen["peak"] = torch.cuda.max_memory_allocated(self.where) - self.base
            torch.cuda.reset_peak_memory_stats(self.where)
        self.updates.append(seen)

    @contextlib.contextmanager
    def looking(self):
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from plan import memory
        from run import log

        add, create, scale = log.add_record, ShapeEnv.create_symbol, torch.amp.GradScaler.update
        capture = memory.captured

        def add_record(path, record):
            if "loss" in record:
                self.update(record)
            return add(path, record)

        def captured(training):
            before = graphs()
            found = capture(training)
            self.graphs_before += graphs() - before  # not the run's
            return found

        captured.cache_clear = capture.cache_clear

        def create_symbol(env, value, source, *args, **kwargs):
            found = create(env, value, source, *args, **kwargs)
            inner = "unknown_tensor" in repr(source)  # torch's own, as a generator's state
            self.symbols += bool(found.is_Symbol) and not inner  # a static size is a number
            return found

        def update(scaler, *args):
            scale(scaler, *args)
            self.scales.append(scaler.get_scale())

        with (
            mock.patch.object(log, "add_record", add_record),
            mock.patch.object(memory, "captured", captured),
            mock.patch.object(ShapeEnv, "create_symbol", create_symbol),
            mock.patch.object(torch.amp.GradScaler, "update", update),
        ):
            yield


@contextlib.contextmanager
def planted_inf(at):
    """An infinity in a gradient of the update of this number."""
    real, calls = torch.amp.GradScaler.unscale_, iter(range(10**6))

    def unscale_(scaler, optimizer):
        if next(calls) == at:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = torch.inf
        return real(scaler, optimizer)

    with mock.patch.object(torch.amp.GradScaler, "unscale_", unscale_):
        yield


def planned(size, dtype, compiled, checkpointing, batch, windows, most=False):
    """Bytes of a GPU at the peak of an update of so many windows, batch of them at a time.

    most: with all that can be saved, compiled, even where there is room.
    """
    from model import GPTConfig
    from plan import fit
    from plan.memory import Training

    training = Training(GPTConfig(**size), dtype, "cuda", compiled, checkpointing, True).leanest
    if not most:
        room = fit.room_of(torch.device("cuda", torch.cuda.current_device()))
        training = fit.as_needed(training, batch, windows, room)
    return fit.peak(training, batch, windows)


@contextlib.contextmanager
def short_of_memory(where, fits, windows, size):
    """Leave room for `fits` windows at a time, and too little for twice as many."""
    if where.type == "cuda":
        small, large = (
            planned(size, torch.bfloat16, True, False, b, windows, most=True)
            for b in (fits, 2 * fits)
        )
        warm_up(where)
        total = torch.cuda.get_device_properties(where).total_memory
        room = torch.cuda.memory_reserved(where) + 0.4 * small + 0.6 * large  # gaps need some
        torch.cuda.set_per_process_memory_fraction(room / total, where)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0, where)
        return
    from text.batches import TrainLoader

    read, back, sizes = TrainLoader.batch, torch.autograd.backward, []

    def batch(loader, step, micro_step, batch_size):
        sizes.append(batch_size)
        return read(loader, step, micro_step, batch_size)

    def backward(*args, **kwargs):
        """After forward, which has been compiled."""
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return back(*args, **kwargs)

    with (
        mock.patch.object(TrainLoader, "batch", batch),
        mock.patch.object(torch.autograd, "backward", backward),
    ):
        yield


def alone(flags):
    """train.py with these flags in this process: exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["train.py", *flags]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def in_team(flags):
    """The same as the one rank that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *flags], capture_output=True, text=True
    )
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def perform(run, where):
    """One run of a SPEC; what it said and did."""
    flags = [*run["flags"], f"--out_dir={run['folder']}"]
    if "start" in run:
        source, folder = Path(run["start"]), Path(run["folder"])
        folder.mkdir()
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / source.name)
    if run.get("torchrun"):
        return in_team(flags)
    with contextlib.ExitStack() as stack:
        if where.type == "cpu":
            stack.enter_context(without_codegen())
        if "fits" in run:
            stack.enter_context(short_of_memory(where, run["fits"], run["windows"], run["size"]))
        if "inf_at" in run:
            stack.enter_context(planted_inf(run["inf_at"]))
        watch = Watch(where, run.get("peaks", False))
        stack.enter_context(watch.looking())
        done = alone(flags)
    return {**done, "updates": watch.updates, "scales": watch.scales}


def main():
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    where = torch.device(spec["device"])
    report = [perform(run, where) for run in spec["runs"]]
    Path(spec["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
