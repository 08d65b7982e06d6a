"""Train a GPT: python train.py config/train_gpt.py [--name=value ...]

One flat loop, on one device, or under torchrun on many. Every setting below can be set in a config
file or as a flag. Leaves in out_dir: checkpoints, metrics.jsonl, config.json and loss.png.
"""

import contextlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

# Before torch loads OpenMP: its threads spin while they wait, which on a CPU shared with any other
# program made small models 30 times slower. Spinning this long cost the demo 2% on an idle one, a
# tenth of it 35%; beside another program the demo then had 0.5 times the speed of a tenth.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Before torch makes its allocator: what is freed on a GPU serves blocks of any size. WSL's drivers
# fail with it (pytorch 192330). The other variable is the name that torch 2.9 and older know.
if (
    sys.platform == "linux"
    and "microsoft" not in platform.release().lower()
    and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import distributed
import pretrained
import runlog
import runtime
from configurator import configure, settings_of
from dataloader import TokenData, TrainLoader, TrainOrder, eval_batches, key_of, read_meta
from model import (
    GPT,
    IGNORE_INDEX,
    GPTConfig,
    choose_attention,
    configure_optimizer,
    flops_per_token,
    num_parameters,
)
from tokenizer import Tokenizer, get_tokenizer

# the run
out_dir = "out"  # where checkpoints and logs go
init_from = (
    "scratch"  # scratch, resume (out_dir's newest), auto (either), PATH, hf:FOLDER or hf:USER/NAME
)
overwrite = False  # let a run from scratch replace the run that out_dir holds
seed = 1337  # of initial weights, data order and dropout
# data
dataset = "openwebtext"  # folder under data/, or a path with a slash
tokens_per_step = 491520  # tokens in one update; accumulation is derived from it
batch_size = 12  # windows in one micro-batch: for memory; updates do not depend on it
# model (the defaults are the 303M reference)
vocab_size = 0  # 0 = the tokenizer's, rounded up to a multiple of 64
hidden_size = 1024
intermediate_size = 2560
num_hidden_layers = 24
num_attention_heads = 16
num_key_value_heads = 4
head_dim = 64
max_position_embeddings = 1024  # context, tokens
rope_theta = 10000.0
rms_norm_eps = 1e-6
dropout = 0.0  # 0 for pretraining, 0.1 and more for small data seen many times
tie_word_embeddings = True  # the head's weight is the embedding's
qk_norm = False  # RMSNorm on queries and keys, as Qwen3
attention_bias = False
mlp_bias = False
# optimizer: AdamW
max_iters = 15000  # updates
learning_rate = 3.2e-4  # peak
min_lr = 3.2e-5  # a tenth of the peak
warmup_iters = 800  # linear, from 0
lr_decay_iters = 0  # updates until min_lr is reached; 0 = max_iters
decay_lr = True  # False: always the peak, no warm-up
weight_decay = 0.1  # on tensors of 2 or more dimensions
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest gradient norm; 0 = off
max_skipped = 10  # updates in a row with a loss or gradient that is not finite before giving up
skip_spike = 0.0  # leave out an update whose loss is this many deviations above the last; 0 = off
# evaluation, log, checkpoints
eval_interval = 400  # updates
eval_iters = 200  # batches: eval_iters x batch_size windows, the same ones every time
log_interval = 10  # updates
checkpoint_interval = 0  # updates between checkpoints; 0 = at evaluations
checkpoint_minutes = 15.0  # and at the latest after this time
keep_last = 2  # newest checkpoints kept, beside the best
milestone_interval = 0  # keep the checkpoints at multiples of this for ever; 0 = none
sharded_checkpoints = False  # with fsdp or hsdp: folders of which each rank writes its part
time_limit = 0.0  # minutes after which to save and stop; 0 = none
watchdog_minutes = 30.0  # without a micro-step before the run counts as hung and ends; 0 = never
wandb_log = False
wandb_project = "easygpt"
wandb_run_name = ""  # empty = the name of out_dir
# machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16: type of matrix products, by autocast
parallel = "ddp"  # under torchrun: ddp (whole models), fsdp (sharded), hsdp (sharded per machine)
compile = "auto"  # auto, True, False: torch.compile
deterministic = False  # on CUDA: a resumed run is the same bit for bit, as on a CPU; slower
activation_checkpointing = False  # compute each block twice: less memory, a third more operations
# a plan instead of a run
dry_run = False  # print what the run will take; device may then be a card's name, as RTX3090
world_size = 1  # cards to plan for

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent
# A CPU run shorter than this costs less uncompiled: compiling takes about a minute and saves a
# fifth of the time, at roughly 1e11 FLOP/s.
CPU_COMPILE_FLOPS = 1e14
# Settings that decide what a run learns; a resumed run warns when one has changed.
RUN_SETTINGS = (
    *("dataset", "tokens_per_step", "seed", "max_iters", "dropout", "dtype"),
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr"),
    *("weight_decay", "beta1", "beta2", "grad_clip", "deterministic"),
)
SPIKE_WINDOW = 100  # losses that skip_spike looks back on
ELSEWHERE = "another rank is out of memory"


@dataclass
class TrainState:
    """What a run must remember beside weights and optimizer to go on as if never stopped.

    Data order and dropout depend on the step alone, so neither has a state of its own.
    """

    iter_num: int = 0  # completed updates
    best_val_loss: float | None = None
    skipped: int = 0  # updates left out, in all
    recent_losses: list[float] = field(default_factory=list)  # for skip_spike
    wandb_run_id: str | None = None
    micro_batch: int = 0  # windows that fit in memory when batch_size does not; 0 = it does


def check_settings() -> None:
    """Raises ValueError that lists every setting out of range and every pair that does not fit."""
    least = {"batch_size": 1, "tokens_per_step": 1, "max_iters": 0, "eval_interval": 1}
    least |= {"eval_iters": 1, "log_interval": 1, "keep_last": 1, "warmup_iters": 0}
    least |= {"checkpoint_interval": 0, "milestone_interval": 0, "skip_spike": 0, "time_limit": 0}
    least |= {"watchdog_minutes": 0, "world_size": 1}
    least |= {"lr_decay_iters": 0, "max_skipped": 1, "grad_clip": 0, "weight_decay": 0, "min_lr": 0}
    problems = [
        f"{name} must be at least {low}, not {globals()[name]}"
        for name, low in least.items()
        if not globals()[name] >= low
    ]
    for name in ("beta1", "beta2"):
        if not 0 <= globals()[name] < 1:
            problems.append(f"{name} must be at least 0 and below 1, not {globals()[name]}")
    if not 0 < learning_rate < math.inf:
        problems.append(f"learning_rate must be positive, not {learning_rate}")
    if decay_lr and min_lr > learning_rate:
        problems.append(f"min_lr ({min_lr}) is above learning_rate ({learning_rate})")
    if decay_lr and warmup_iters > (lr_decay_iters or max_iters) > 0:
        problems.append(
            f"warmup_iters ({warmup_iters}) is beyond the decay's end "
            f"({lr_decay_iters or max_iters} updates)"
        )
    if compile.lower() not in ("auto", "true", "false"):
        problems.append(f"compile must be auto, True or False, not {compile!r}")
    if parallel not in ("ddp", "fsdp", "hsdp"):
        problems.append(f"parallel must be ddp, fsdp or hsdp, not {parallel!r}")
    if sharded_checkpoints and parallel == "ddp":
        problems.append("sharded_checkpoints needs parallel fsdp or hsdp")
    if not checkpoint_minutes > 0:
        problems.append(f"checkpoint_minutes must be positive, not {checkpoint_minutes}")
    if not 0 <= seed < 2**63:
        problems.append(f"seed must be at least 0 and below 2**63, not {seed}")
    if not out_dir:
        problems.append("out_dir is empty")
    if problems:
        raise ValueError("settings: " + "; ".join(problems))


def accumulation(tokens: int, batch: int, context: int, ranks: int) -> int:
    """Micro-steps a rank makes in one update. Raises ValueError naming the nearest that work."""
    micro = batch * context * ranks
    if tokens % micro:
        low = max(1, tokens // micro) * micro
        raise ValueError(
            f"tokens_per_step={tokens} is not a multiple of batch_size x context x ranks = "
            f"{batch} x {context} x {ranks} = {micro}; nearest: --tokens_per_step={low} or "
            f"{low + micro}"
        )
    return tokens // micro


def smaller_batch(batch: int, windows: int) -> int:
    """The largest micro-batch of at most half of `batch` that divides a rank's `windows` of a step.

    Raises ValueError when there is nothing below 1.
    """
    if batch == 1:
        raise ValueError(
            "out of memory with batch_size=1; use a smaller model or max_position_embeddings"
        )
    return next(b for b in range(batch // 2, 0, -1) if windows % b == 0)


def is_spike(loss: float, recent: list[float], deviations: float) -> bool:
    """Whether a loss stands out of the last SPIKE_WINDOW ones by so many standard deviations."""
    if not deviations or len(recent) < SPIKE_WINDOW:
        return False
    return loss > statistics.fmean(recent) + deviations * statistics.stdev(recent)


def lr_at(step: int, peak: float, low: float, warmup: int, decay: int) -> float:
    """Learning rate of update `step`, from 0: linear warm-up, then a cosine to `low` at `decay`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay:
        return low
    done = (step - warmup) / (decay - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


@torch.no_grad()
def loss_sums(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Any,
    go_on: Callable[[], bool] = lambda: True,
) -> Tensor:
    """Sum of losses in nats, and number of tokens, over all batches: (2,) float64 on the CPU.

    With dropout off and one wait for the device. It ends when `go_on`, asked before each batch,
    says no.
    """
    model.eval()
    losses = []
    for x, y in batches:
        if not go_on():
            break
        with autocast:
            _, loss = model(x, y, loss_only=True)
        losses.append(torch.stack((loss.float(), (y != IGNORE_INDEX).sum().float())))
    model.train()
    if not losses:
        return torch.zeros(2, dtype=torch.float64)
    mean, tokens = torch.stack(losses).cpu().double().unbind(1)  # mps has no float64
    # a batch without a target, as ranks may get, has a mean of NaN
    return torch.stack((torch.where(tokens > 0, mean * tokens, 0).sum(), tokens.sum()))


def check_same_tokenizer(saved: dict[str, Any], tok: Tokenizer, path: Path) -> None:
    """Raises ValueError when a checkpoint was trained with other tokens than the dataset has."""
    theirs = saved.get("tokenizer") or {"name": "gpt2", "json": None}  # nanoGPT's files name none
    if not pretrained.same_ids(get_tokenizer(theirs["name"], json_text=theirs["json"]), tok):
        raise ValueError(
            f"{path} was trained with the tokenizer {theirs['name']!r}, but the dataset is in "
            f"{tok.name!r} or another version of it; prepare the text with the checkpoint's "
            "(data/prepare.py --tokenizer=...)"
        )


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes a resumed run another one than the checkpoint's, for the user to read."""
    changed = [
        f"{k} {v!r} -> {now['config'][k]!r}"
        for k, v in saved["config"].items()
        if k in RUN_SETTINGS and now["config"][k] != v
    ]
    before, after = (c["eval_iters"] * c["batch_size"] for c in (saved["config"], now["config"]))
    if before != after:
        changed.append(f"windows of an evaluation {before} -> {after}")
    if saved["data"] != now["data"]:
        changed.append("the dataset's contents")
    if saved["dtype"] != now["dtype"]:
        changed.append(f"dtype in use {saved['dtype']} -> {now['dtype']}")
    return changed


def say(line: str) -> None:
    """Print a line above the progress bar; a full disk or a lost terminal stops no run."""
    if distributed.is_first():
        with contextlib.suppress(OSError):
            tqdm.write(line)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


def why_uncompiled(where: torch.device, flops: float, cannot: str) -> str:
    """Why a run of so many FLOP is not compiled; "" when it is. cannot: why it could not be."""
    if compile.lower() != "auto":
        return "" if compile.lower() == "true" else "as set"
    short = where.type != "cuda" and flops < CPU_COMPILE_FLOPS
    return cannot or ("the run is too short for it to pay" if short else "")


def data_folder() -> Path:
    """Where the dataset is: under data/, or at a path."""
    return Path(dataset) if os.sep in dataset or "/" in dataset else ROOT / "data" / dataset


def size_as_set(meta: dict[str, Any]) -> GPTConfig:
    """The model that the settings describe, its vocabulary that of a dataset's meta.json."""
    given = {f.name: globals()[f.name] for f in fields(GPTConfig)}
    vocabulary = vocab_size or -(-int(meta["vocab_size"]) // 64) * 64
    return GPTConfig(**given | {"vocab_size": vocabulary})


def starts_from(out: Path) -> str:
    """What init_from comes to: auto is resume where there is a run, else scratch."""
    if init_from != "auto":
        return init_from
    return "resume" if checkpoint.holds_run(out) else "scratch"


def claim_folder(out: Path, source: str) -> None:
    """Lock the run's folder. Raises ValueError when a run that it holds would be replaced."""
    out.mkdir(parents=True, exist_ok=True)
    if line := runtime.lock_folder(out):
        say(line)
    if source not in ("scratch", "resume") and Path(source).parent.resolve() == out.resolve():
        raise ValueError(
            f"a new run from {source} would replace it: choose another --out_dir, or "
            "--init_from=resume to go on with that run"
        )
    if source != "resume" and not overwrite and checkpoint.holds_run(out):
        raise ValueError(
            f"{out} holds a run already; go on with it (--init_from=resume), choose another "
            "--out_dir, or replace it (--overwrite=True)"
        )


def tidy_folder(out: Path, metrics: Path, resumed_at: int | None) -> None:
    """Remove what a run of before has left: another one's files, or what came after resumed_at."""
    checkpoint.tidy(out)
    if resumed_at is None:
        for old in [*checkpoint.checkpoints(out), metrics]:
            checkpoint.remove(old)
        return
    runlog.keep_records(metrics, resumed_at)
    for found, newer in checkpoint.steps_saved(out):
        if found > resumed_at:  # passed over for damage
            damaged = newer.with_name(newer.name + ".damaged")
            checkpoint.remove(damaged)
            os.replace(newer, damaged)


def disk_needed(parameters: int) -> dict[str, int]:
    """Of a run: bytes of a checkpoint, number of them, bytes of the log."""
    milestones = max_iters // milestone_interval if milestone_interval else 0
    return {  # weights and two moments in float32; a record has 300 bytes
        "size": 12 * parameters,
        "count": keep_last + milestones + 2,
        "log": 300 * (max_iters // log_interval + max_iters // eval_interval),
    }


def plan() -> None:
    """Print what the run would take, and write nothing.

    Raises ValueError with the smallest change that fits when it does not fit.
    """
    import planner  # of no use to a run

    check_settings()
    card = planner.find_card(device)
    where = torch.device("cuda") if card else runtime.select_device(device)
    if card and dtype == "auto":
        number, why = card.half, "the card computes in it"
    else:
        number, why = runtime.select_dtype(dtype, where)
    folder = data_folder()
    size = size_as_set(read_meta(folder))
    source = starts_from(Path(out_dir))
    if source != "scratch":
        path, start, _ = pretrained.read(source, out_dir, whole=False)
        size = checkpoint.model_config(start, path)
        if source != "resume":
            least = min(size.max_position_embeddings, max_position_embeddings)
            size = replace(size, max_position_embeddings=least)
        size = replace(size, dropout=dropout)
        del start
    context = size.max_position_embeddings
    micro_steps = accumulation(tokens_per_step, batch_size, context, 1)
    with torch.device("meta"):
        empty = GPT(size)
    flops = flops_per_token(empty) * tokens_per_step * max_iters
    compiled = not why_uncompiled(where, flops, "" if card else runtime.why_not_compile(where))
    training = planner.Training(
        size, number, where.type, compiled, activation_checkpointing, accumulates=micro_steps > 1
    )
    name = f"{card.name}, not here" if card else runtime.describe(where)
    say(
        f"model    {num_parameters(empty):,} parameters, context {context}, vocab {size.vocab_size}"
    )
    say(planner.data_line(folder, training, tokens_per_step, max_iters))
    say(f"machine  {name}; {number} ({why})".replace("torch.", ""))
    if not card and (problem := runtime.unused_gpu(device, where)):
        say(f"WARNING  planned for the {where.type}: {problem}")
    there, disk = planner.existing(Path(out_dir)), disk_needed(num_parameters(empty))
    say(planner.disk_line(there, **disk))
    for line in planner.plan(
        training, where, card, batch_size, tokens_per_step, max_iters, world_size
    ):
        say(line)
    checkpoint.check_disk(there, **disk)


def main() -> None:
    if dry_run:
        return plan()
    # --- settings, device, folders: everything that can be wrong is found before any work
    started = time.monotonic()
    stop = runtime.Stop()
    config = settings_of(globals())
    check_settings()
    team = distributed.join(max(30, watchdog_minutes or 24 * 60))
    rank, ranks = team.rank, team.ranks
    runtime.make_deterministic(deterministic)
    where = runtime.select_device(team.device(device))
    number, why = runtime.select_dtype(dtype, where)
    sharded = parallel != "ddp" and not team.alone
    if sharded and number == torch.float16:
        raise ValueError(f"parallel={parallel} takes bfloat16 or float32; write --dtype=float32")
    autocast = runtime.autocast(where, number)
    folder = data_folder()
    meta = read_meta(folder)
    tok: Tokenizer = get_tokenizer(meta["tokenizer"], folder)
    size = size_as_set(meta)
    out = Path(out_dir)
    source = starts_from(out)
    if rank == 0:
        claim_folder(out, source)

    # --- where the run starts from
    state = TrainState()
    path, start = out, dict[str, Any]()  # a checkpoint and its contents, on rank 0
    origin = source
    resumed = source == "resume" and rank == 0
    if resumed:
        path, start, problems = pretrained.read(source, out_dir, whole=not sharded)
        for problem in problems:
            say(f"passed over: {problem}")
        if "train_state" not in start:
            raise ValueError(f"{path} cannot be resumed, only started from: --init_from={path}")
        check_same_tokenizer(start, tok, path)
        origin = start["config"]["init_from"]
        theirs = checkpoint.model_config(start, path)
        if origin == "scratch":
            checkpoint.check_same_model(theirs, size, path)
        size = replace(theirs, dropout=dropout)  # a run from a checkpoint has that one's sizes
        known = {f.name for f in fields(TrainState)}
        state = TrainState(**{k: v for k, v in start["train_state"].items() if k in known})
        now = {"config": config, "data": meta["splits"], "dtype": str(number)}
        if changed := changed_settings(start, now):
            say(f"WARNING  not the same run as before: {', '.join(changed)}")
        if start["config"]["batch_size"] != batch_size:
            state.micro_batch = 0  # the user knows better
    elif source != "scratch" and rank == 0:
        path, start, _ = pretrained.read(source, out_dir, whole=not sharded)
        check_same_tokenizer(start, tok, path)
        theirs = checkpoint.model_config(start, path)
        least = min(theirs.max_position_embeddings, size.max_position_embeddings)
        size = replace(theirs, max_position_embeddings=least, dropout=dropout)
    # only rank 0 has read it
    shards = None
    if start and sharded and path.suffix == checkpoint.SHARDS:  # each rank reads its part
        needed = {k: start[k] for k in ("model_args", "optimizer")}
        shards = {"path": str(path), "rest": needed}
    facts = team.share([asdict(size), asdict(state), resumed, start.get("scaler"), shards])
    size, state, resumed, scaling, shards = (
        GPTConfig(**facts[0]),
        TrainState(**facts[1]),
        *facts[2:],
    )
    context = size.max_position_embeddings
    micro_batch = state.micro_batch or batch_size
    micro_steps = accumulation(tokens_per_step, micro_batch, context, ranks)
    train_data = TokenData(folder, "train", context, size.vocab_size)
    val_data = TokenData(folder, "val", context, size.vocab_size)
    order = TrainOrder(train_data.tokens, context, tokens_per_step, seed)
    loader = TrainLoader(train_data, order, rank, ranks, where)

    # --- model and optimizer
    runtime.tune(where)
    torch.manual_seed(seed)
    # rank 0's go to all, unless each reads its own
    with contextlib.nullcontext() if rank == 0 and not shards else checkpoint.SkipInit():
        model = checkpoint.build(size, start, path) if start and not shards else GPT(size)
    if rank == 0:
        checkpoint.check_disk(out, **disk_needed(num_parameters(model)))
    flops_per_step = flops_per_token(model) * tokens_per_step
    model.activation_checkpointing = activation_checkpointing
    net: torch.nn.Module = model
    if sharded:
        distributed.shard(model, model.layers, team, where, number, parallel == "hsdp")
    else:
        model.to(where)
        net = model if team.alone else distributed.replicate(model)
    kernel = choose_attention(model, number)
    optimizer = configure_optimizer(model, learning_rate, (beta1, beta2), weight_decay)
    scaler = torch.amp.GradScaler(where.type, enabled=number == torch.float16)
    if shards:
        from sharded import read_into  # few need it, and it takes a second

        read_into(Path(shards["path"]), model, optimizer if resumed else None, shards["rest"])
    elif resumed:
        distributed.share_optimizer(team, optimizer, start.get("optimizer", {}))
    if resumed:
        for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
            group.update(weight_decay=decay, betas=(beta1, beta2))  # as set, not as saved
        if scaling:
            scaler.load_state_dict(scaling)
    start = {}

    # --- a line for each fact that the user may want to check
    peak = (runtime.peak_flops(where) or 0) * ranks
    say(
        f"model    {num_parameters(model):,} parameters, context {context}, vocab {size.vocab_size}"
    )
    say(
        f"data     {folder}: {train_data.tokens:,} training tokens ({tok.name}), "
        f"{val_data.tokens:,} for validation"
    )
    by_ranks = f" x {ranks} ranks" if ranks > 1 else ""
    say(
        f"run      {max_iters:,} updates of {tokens_per_step:,} tokens ({micro_batch} x {context} "
        f"x {micro_steps} micro-steps{by_ranks}), {order.epochs(max_iters):.2f} epochs, seed {seed}"
    )
    if not (folder / "meta.json").exists():
        say(f"data     {folder} has no meta.json: taken for GPT-2 tokens in uint16")
    machine = f"{ranks} x {runtime.describe(where)}" if ranks > 1 else runtime.describe(where)
    line = f"machine  {machine}; {number} ({why}); {kernel} attention"
    line += "; deterministic" if deterministic else ""
    say(line.replace("torch.", ""))
    if why := runtime.unused_gpu(device, where):
        say(f"WARNING  training on the {where.type}: {why}")
    if resumed:
        say(f"resumed  {path} at {state.iter_num} updates")

    # --- what a step is made of
    eval_windows = eval_iters * batch_size
    failure = ""  # why this rank cannot go on
    saved_at, save_due = time.monotonic(), False
    met = False  # ranks have agreed to exchange numbers: nothing can be called off any more

    def go_on() -> bool:
        """Before each micro-step: the run is alive, and has nobody asked it to end?"""
        nonlocal failure
        runtime.watch(60 * watchdog_minutes)
        try:  # to read beyond a file's new end would end the process
            train_data.check_size()
        except (ValueError, OSError) as e:
            failure = str(e)
        late = time_limit and time.monotonic() - started > 60 * time_limit
        return not (stop.cause or failure or late)

    def agree(short: bool = False) -> bool:
        """Once a step or evaluation, before ranks exchange their numbers: do all of them go on?

        short: this rank is out of memory. Raises OutOfMemoryError when another one is.
        """
        nonlocal save_due, met
        late = time.monotonic() - saved_at > 60 * checkpoint_minutes
        ended, save_due, elsewhere = team.any(not go_on(), late, short)
        if elsewhere and not short:
            raise torch.OutOfMemoryError(ELSEWHERE)
        met = not ended and not team.alone
        return not ended

    def micro_loss(step: int, micro_step: int, last: bool = False) -> Tensor:
        x, y = loader.batch(step, micro_step, micro_batch)
        distributed.set_sync(net, last, micro_steps == 1)
        with autocast:
            loss: Tensor = net(x, y, loss_only=True)[1]
        scaler.scale(loss / micro_steps).backward()
        return loss.detach()

    def val_batches() -> Iterable[tuple[Tensor, Tensor]]:
        return eval_batches(val_data, eval_windows, micro_batch, where, rank, ranks)

    def spare_memory() -> Tensor | None:
        """The first update allocates AdamW's moments, too late to try again: room for them now."""
        if optimizer.state or sharded:
            return None
        return torch.empty(2 * num_parameters(model), device=where)

    def evaluate() -> Tensor | None:
        distributed.set_sync(net, last=True, only=True)
        # sharded, each batch is an exchange
        sums = loss_sums(model, val_batches(), autocast, agree if sharded else go_on)
        return team.sum(sums) if agree() else None

    def in_memory(work: Callable[[], T]) -> T:
        """`work` again with half the micro-batch, and twice the micro-steps, until it fits."""
        nonlocal micro_batch, micro_steps, met
        while True:
            met = False
            try:
                return work()
            except Exception as e:
                if not runtime.is_oom(e):
                    raise
                if met or sharded:
                    raise ValueError(
                        f"out of memory with batch_size={micro_batch} while ranks exchange "
                        "numbers; go on with --init_from=auto and a smaller --batch_size"
                    ) from e
                why_short = runtime.first_line(e)[:120]  # a name for e would keep its memory
                say(f"out of memory with batch_size={micro_batch}: {why_short}")
                if str(e) != ELSEWHERE:
                    agree(short=True)
            optimizer.zero_grad(set_to_none=True)
            model.train()  # it may have happened in an evaluation
            if not why_not:
                torch.compiler.reset()  # graphs of the old size are of no use, and have a limit
            runtime.release_memory(where)
            windows = tokens_per_step // (context * ranks)
            micro_batch = state.micro_batch = smaller_batch(micro_batch, windows)
            micro_steps = windows // micro_batch
            say(f"going on with {micro_batch} x {micro_steps} micro-steps; same tokens")

    # --- compile, with one guarded step: torch.compile fails when it is first called, not before
    def first_step() -> None:
        room = spare_memory()
        micro_loss(state.iter_num, 0, last=sharded)  # gradients not exchanged would be kept
        loss_sums(model, [next(iter(val_batches()))], autocast)
        del room
        agree()

    why_not = why_uncompiled(where, flops_per_step * max_iters, runtime.why_not_compile(where))
    if not why_not:
        t0 = time.perf_counter()
        runtime.keep_less()
        compiled = list(model.layers) if sharded else [model]
        for part in compiled:
            part.compile(dynamic=False)  # else a second size has symbols instead of numbers
        try:
            in_memory(first_step)
            say(f"compile  took {time.perf_counter() - t0:.0f} s")
        except ValueError:  # not even one window fits
            raise
        except Exception as e:
            kind = type(getattr(e, "inner_exception", e)).__name__  # torch's own names the backend
            reason = f"{kind}: {runtime.first_line(e)}"[:120]
            say(f"compile  failed, training uncompiled ({reason})")
            for part in compiled:
                part._compiled_call_impl = None
            model.train()
            agree()
        optimizer.zero_grad(set_to_none=True)
        runtime.release_memory(where)  # of a compiler that failed
    else:
        if compile.lower() == "auto":
            say(f"compile  off: {why_not}")
        if not team.alone:  # what does not fit is found while nobody waits for an exchange
            in_memory(first_step)
            optimizer.zero_grad(set_to_none=True)

    # --- logs and checkpoints
    metrics = out / "metrics.jsonl"
    if rank == 0:
        tidy_folder(out, metrics, state.iter_num if resumed else None)
        runlog.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    name = wandb_run_name or out.name
    wandb = runlog.Wandb(wandb_log and rank == 0, wandb_project, name, config, state.wandb_run_id)
    state.wandb_run_id = wandb.run_id
    if wandb.problem:
        say(wandb.problem)
    writer = None
    if sharded_checkpoints and sharded:
        from sharded import Writer

        writer = Writer()
    saver = checkpoint.Saver(out, keep_last, milestone_interval, rank == 0, writer)
    last_saved, saved_at = state.iter_num if resumed else -1, time.monotonic()

    def log(record: dict[str, Any], line: str) -> None:
        if rank:
            return
        for text in (line, runlog.add_record(metrics, record), wandb.log(record)):
            if text:
                say(text)

    def contents() -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "model_args": asdict(size),
            "iter_num": state.iter_num,
            "best_val_loss": state.best_val_loss,
            "config": config | {"init_from": origin},
            "dtype": str(number),
            "data": meta["splits"],
            "tokenizer": {"name": tok.name, "vocab_size": tok.vocab_size, "json": tok.json_text},
            "train_state": asdict(state),
        }

    def save() -> None:
        nonlocal last_saved, saved_at
        if team.any(last_saved != state.iter_num or bool(saver.problem)) == (True,):
            saver.save(state.iter_num, contents())
            last_saved, saved_at = state.iter_num, time.monotonic()

    # --- the loop
    hide = None if rank == 0 else True  # None: where there is no terminal
    bar = tqdm(total=max_iters, initial=state.iter_num, disable=hide, unit="step", leave=False)
    loop_started, first = time.perf_counter(), state.iter_num
    clock_s, clock_steps, left_out = 0.0, 0, 0  # left_out: updates in a row
    best_before = state.best_val_loss  # of the best one before the last
    model.train()
    while True:
        step = state.iter_num
        while saver.unsaid:
            say(f"WARNING  {saver.unsaid.pop(0)}; training goes on without a new checkpoint")
        at_eval = step % eval_interval == 0 or step >= max_iters
        if (
            at_eval
            or (checkpoint_interval and step % checkpoint_interval == 0)
            or (milestone_interval and step % milestone_interval == 0)
            or save_due
        ):
            save()  # before evaluation: what fails there costs nothing
        if at_eval:
            sums = in_memory(evaluate)
            if sums is None:
                break  # asked to end; what was evaluated is evaluated again on resume
            val_loss = float(sums[0] / sums[1])
            record = {"iter": step, "tokens": step * tokens_per_step, "val_loss": val_loss}
            line = f"step {step:>6} | val loss {val_loss:.4f}"
            if val_data.nbytes:
                per_byte = val_loss * val_data.tokens / val_data.nbytes / math.log(2)
                record["val_bits_per_byte"] = per_byte
                line += f" | {per_byte:.4f} bits per byte"
            if saver.best_failed:
                state.best_val_loss = best_before
            if team.share(val_loss < (state.best_val_loss or math.inf)):
                best_before, state.best_val_loss = state.best_val_loss, val_loss
                saver.save_best(contents())
                line += " | best"
            log(record, line)
        if step >= max_iters:
            break

        t0 = time.perf_counter()
        rate = learning_rate
        if decay_lr:
            rate = lr_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters)
        for group in optimizer.param_groups:
            group["lr"] = rate

        def accumulate(step: int = step) -> Tensor | None:
            """Mean loss of the step, its gradients left in the parameters; None when stopped."""
            torch.manual_seed(key_of(seed, step, rank) % 2**63)  # dropout, resumed or not
            total = torch.zeros((), device=where)
            room = spare_memory()
            for micro_step in range(micro_steps):
                last = micro_step == micro_steps - 1
                going = go_on()
                if micro_step == (0 if sharded else micro_steps - 1) and not agree():
                    return None
                if not (last or sharded or going):
                    continue  # a step can take longer than the grace after a signal
                # The model's loss is a mean over its micro-batch. Gradients add up over
                # micro-batches, so each is divided by their number: the sum is then the gradient
                # of the mean over the whole step, whatever the micro-batch size.
                total += micro_loss(step, micro_step, last)
            del room
            return total / micro_steps

        mean = in_memory(accumulate)
        if mean is None:
            break
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        mean = team.sum(mean) / ranks
        numbers = torch.stack((mean, checkpoint.whole(norm)))
        loss, grad_norm = numbers.tolist()  # the step's one wait for the device
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and is_spike(loss, state.recent_losses, skip_spike)
        if finite and not spike:
            scaler.step(optimizer)
            left_out = 0
        else:
            state.skipped += 1
            left_out += 1
            why = "a spike" if spike else "not finite"
            say(f"step {step:>6} | left out, {why}: loss {loss}, gradient norm {grad_norm}")
            if left_out >= max_skipped:
                windows = order.starts(step, 0, tokens_per_step // context).tolist()
                report = {"iter": step, "loss": loss, "grad_norm": grad_norm, "windows": windows}
                if rank == 0:
                    runlog.write_text(out / "bad_step.json", json.dumps(report))
                saver.wait()
                team.share(None)  # not before rank 0 has written: who ends in an error ends all
                raise ValueError(
                    f"{left_out} updates in a row were left out, the last at step {step} ({why}); "
                    f"the last good checkpoint is in {out}, the step's windows in bad_step.json. "
                    "Try a lower learning_rate"
                )
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if skip_spike and finite:
            state.recent_losses = [*state.recent_losses, loss][-SPIKE_WINDOW:]
        clock_s, clock_steps = clock_s + time.perf_counter() - t0, clock_steps + 1
        state.iter_num += 1
        with contextlib.suppress(OSError):  # the terminal may be gone
            bar.update()
        if step % log_interval == 0:
            speed = clock_steps * tokens_per_step / clock_s
            flops = clock_steps * flops_per_step / clock_s
            steps_per_s = (step + 1 - first) / (time.perf_counter() - loop_started)
            record = {"iter": step, "tokens": (step + 1) * tokens_per_step, "loss": loss}
            record |= {"lr": rate, "grad_norm": grad_norm, "tokens_per_s": round(speed)}
            record |= {"tflops": flops / 1e12, "mfu": flops / peak if peak else None}
            record["elapsed_s"] = round(time.perf_counter() - loop_started, 3)
            share = f" {flops / peak:.1%} MFU" if peak else ""
            log(
                record,
                f"step {step:>6} | loss {loss:.4f} | lr {rate:.2e} | norm {grad_norm:.2f} | "
                f"{speed:,.0f} tok/s | {flops / 1e12:.2f} TFLOP/s{share} | "
                f"{duration((max_iters - step - 1) / steps_per_s)} left",
            )
            clock_s, clock_steps = 0.0, 0

    # --- the end, by itself or by a signal
    save()
    saver.wait()
    with contextlib.suppress(OSError):
        bar.close()
    said = (saver.problem, saver.best_failed, failure, stop.cause)
    problem, best_failed, failure, cause = map(team.first, said)
    if problem:
        raise OSError(f"{problem}; the updates since the last checkpoint are lost")
    if best_failed:
        raise OSError(f"{best_failed}; all updates are saved, but the best one is older")
    again = shlex.join([*team.launcher(), *sys.argv, "--init_from=resume"])  # later flags win
    if failure:
        raise ValueError(f"{failure}. The {state.iter_num} updates so far are saved; then: {again}")
    if state.iter_num < max_iters:
        cause = cause or f"time_limit={time_limit}"
        say(f"stopped by {cause} after {state.iter_num} updates, all saved; go on: {again}")
    else:
        if rank == 0 and (line := runlog.draw_losses(metrics, out / "loss.png")):
            say(line)
        best = f"best val loss {state.best_val_loss:.4f}, " if state.best_val_loss else ""
        say(f"done: {best}{state.skipped} updates left out, all in {out}")
    sys.exit(stop.exit_code())


if __name__ == "__main__":
    with distributed.one_voice():
        globals().update(configure(globals()))
    runtime.run(lambda: distributed.run(main))
