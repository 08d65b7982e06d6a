"""Train a GPT: python train.py config/train_gpt.py [--name=value ...]

One flat loop, on one device, or under torchrun on many. Every setting below can
be set in a config file or as a flag. Leaves in out_dir: checkpoints,
metrics.jsonl, config.json and loss.png.
"""

from run import interrupt

if __name__ == "__main__":  # the other imports take seconds
    interrupt.take(interrupt.end)

import json
import os
import platform
import shlex
import sys

# Before torch loads OpenMP: its threads spin while they wait, which on a CPU shared with any other
# program made small models 30 times slower (docs/speed.md has what this number costs).
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
from torch import Tensor, nn

from configurator import configure, refuse, settings_of, typed, without
from model import num_parameters
from plan.fit import settle
from run import folder, int8, optim, script
from run.agreement import Agreement
from run.cards import peak_flops
from run.compiling import compile_or_say_why
from run.cost import flops_per_token, model_line
from run.curve import read_curve
from run.evaluation import Evaluation, loss_sums, sample_text
from run.gpu import unused_gpu
from run.health import Health
from run.log import Log, say
from run.machine import Machine, choose_attention, find_machine, make_deterministic, tune
from run.microbatch import MicroBatch, windows_of_rank
from run.parallel import check_sharded, replicate, set_sync, shard
from run.picture import draw_run
from run.records import Wandb
from run.saver import Saver
from run.settings import check, check_folder, idle, run_folder
from run.settings import eval_windows as windows_to_read
from run.start import Start, contents, find_start, model_as_set, source_of
from run.stop import Stop, Stopped
from run.team import in_team, join, one_voice, run_team
from text import files
from text.batches import TrainLoader, key_of, open_split, order_of
from text.tokenizer import of_dataset
from text.tokens import read_meta, taken_for

# the run
out_dir = "out"  # folder where checkpoints and logs go
init_from = "scratch"  # scratch, resume, auto (resume or scratch), PATH, hf:FOLDER, hf:USER/NAME
overwrite = False  # let a new run replace the run that out_dir holds
seed = 1337  # of initial weights, data order and dropout
# data
dataset = "openwebtext"  # folder under data/, or a path with a slash
tokens_per_step = 491520  # tokens in one update; accumulation is derived from it
batch_size = 12  # the most windows at once, 0 = as fit: for memory; updates do not depend on it
# model (the defaults are the 303M reference)
vocab_size = 0  # 0 = the tokenizer's, rounded up to a multiple of 64
hidden_size = 1024  # numbers that a token is between two layers
intermediate_size = 2560  # numbers inside each MLP, which is a SwiGLU
num_hidden_layers = 24  # blocks of attention and MLP
num_attention_heads = 16  # query heads of a layer
num_key_value_heads = 4  # key and value heads of a layer; query heads share them evenly
head_dim = 64  # numbers of a head, an even number
max_position_embeddings = 1024  # context, tokens
rope_theta = 10000.0  # base of the rotary positions' wavelengths
rms_norm_eps = 1e-6  # added to the mean square in RMSNorm
dropout = 0.0  # 0 for pretraining, 0.1 and more for small data seen many times
tie_word_embeddings = True  # the head's weight is the embedding's
qk_norm = False  # RMSNorm on queries and keys, as Qwen3
attention_bias = False  # biases in the projections of attention
mlp_bias = False  # biases in the MLP
# optimizer
optimizer = "adamw"  # adamw, or muon: for the matrices inside the blocks, AdamW for the rest
max_iters = 15000  # updates of the whole run, those before a resume included
learning_rate = 3.2e-4  # the peak
muon_lr = 0.0  # the peak of the matrices that Muon updates; 0 = learning_rate
min_lr = 3.2e-5  # where the rate ends; a tenth of the peak
warmup_iters = 800  # updates of a linear rise to the peak
lr_schedule = "cosine"  # cosine, or wsd: the peak stays, and the last updates fall in a line
decay_share = 0.2  # how much of the updates the rate of wsd falls in
lr_decay_iters = 0  # updates until min_lr is reached; 0 = max_iters
decay_lr = True  # False: always the peak, no warm-up
weight_decay = 0.1  # on tensors of 2 or more dimensions
beta1 = 0.9  # of AdamW: how much of the mean gradient an update keeps
beta2 = 0.95  # the same of the mean squared gradient
grad_clip = 1.0  # largest gradient norm; 0 = off
max_skipped = 10  # updates in a row with a loss or gradient that is not finite before giving up
skip_spike = 0.0  # leave out an update whose loss is this many deviations above the last; 0 = off
# evaluation, log, checkpoints
eval_interval = 400  # updates between evaluations
eval_windows = 2400  # windows of validation text, the same ones every time
eval_iters = 0  # nanoGPT's: eval_iters x batch_size windows instead; 0 = eval_windows
sample_prompt = ""  # a text to go on with at each evaluation, to read along; empty = none
reference = ""  # metrics.jsonl of a run to compare with, as assets/curves/easygpt.jsonl
log_interval = 10  # updates between lines of the log
checkpoint_interval = 0  # updates between checkpoints; 0 = at evaluations
checkpoint_minutes = 15.0  # and at the latest after this time
keep_last = 2  # newest checkpoints kept, beside the best
milestone_interval = 0  # keep the checkpoints at multiples of this for ever; 0 = none
sharded_checkpoints = False  # with fsdp or hsdp: folders of which each rank writes its part
time_limit = 0.0  # minutes after which to save and stop; 0 = none
watchdog_minutes = 30.0  # without a micro-step before the run counts as hung and ends; 0 = never
wandb_log = False  # send the log to wandb, too
wandb_project = "easygpt"  # its project there
wandb_run_name = ""  # its name there; empty = the name of out_dir
# machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16: type of matrix products, by autocast
matmul_dtype = "auto"  # of the blocks: auto = dtype; int8 for GeForce cards, experimental
parallel = "ddp"  # under torchrun: ddp (whole models), fsdp (sharded), hsdp (sharded per machine)
compile = "auto"  # auto, True, False: torch.compile
deterministic = False  # on CUDA: a resumed run is the same bit for bit, as on a CPU; slower
activation_checkpointing = False  # compute each block twice: less memory, a third more operations
# a plan instead of a run
dry_run = False  # print what the run will take; device may then be a card's name, as RTX3090
world_size = 1  # cards to plan for, with a card's name as the device


def micro_step(
    net: nn.Module,
    batch: tuple[Tensor, ...],
    divisor: float,
    machine: Machine,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Forward and backward of a micro-batch: its mean loss, (), without a graph."""
    with machine.autocast:
        loss: Tensor = net(*batch, loss_only=True)[1]
    # Gradients add up over micro-batches, each divided by their number, or as its counted tokens
    # weigh: the sum is the gradient of the mean over the whole step, whatever the micro-batch is.
    scaler.scale(loss / divisor).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def main() -> None:
    settings = settings_of(globals())
    check(settings)
    for why, names in idle(settings, in_team()):
        refuse(why, *names)
    if dry_run:
        from plan.report import report  # of no use to a run

        return report(settings, typed())

    # --- who and where: everything that can be wrong is found before any work
    stop = Stop(time_limit, watchdog_minutes)
    team = join(max(30, watchdog_minutes or 24 * 60))
    rank, ranks = team.rank, team.ranks
    make_deterministic(deterministic)
    machine = find_machine(team.device(device), dtype)
    int8.check(matmul_dtype, machine.device, compile)
    sharded = parallel != "ddp" and not team.alone
    if sharded:
        check_sharded(parallel, machine.dtype, sample_prompt)
    out, data = run_folder(out_dir), check_folder(dataset)
    meta, curve = read_meta(data), read_curve(reference)
    tok = of_dataset(meta, data)
    as_set = model_as_set(settings, meta)
    source = source_of(init_from, out)
    if rank == 0 and (line := folder.claim(out, source, overwrite)):
        say(line)

    # --- where the run starts from: rank 0 reads it, unless each rank reads its part
    now = {"config": settings, "data": meta["splits"], "dtype": str(machine.dtype)}
    start = Start(as_set)
    if rank == 0:
        start = find_start(source, out, as_set, batch_size, tok, whole=not sharded)
        tok = start.check(as_set, tok, now, typed())
    start = start.shared(team, sharded)
    state, context = start.state, start.config.max_position_embeddings
    windows = windows_of_rank(tokens_per_step, context, ranks)
    train_data = open_split(data, "train", context, start.config.vocab_size)
    val_data = open_split(data, "val", context, start.config.vocab_size)
    order = order_of(train_data, tokens_per_step, seed)
    loader = TrainLoader(train_data, order, rank, ranks, machine.device)
    stop.data = train_data  # looked at before each micro-step
    evaluation = Evaluation(val_data, windows_to_read(settings), machine.device, team)

    # --- model and optimizer
    tune(machine.device)
    model = start.build(rank, seed)
    name = str(settings["optimizer"])  # the setting; from here on the word is the thing
    if rank == 0:
        numbers = num_parameters(model) + optim.moments(optim.groups_of(model, name))
        folder.check_disk(out, **folder.disk_needed(settings, numbers))
    flops = flops_per_token(model) * tokens_per_step
    model.activation_checkpointing = activation_checkpointing
    net: nn.Module = model
    if sharded:
        shard(model, model.layers, team, machine.device, machine.dtype, parallel == "hsdp")
    else:
        model.to(machine.device)
        net = model if team.alone else replicate(model)
    kernel = choose_attention(model, machine.dtype)
    int8.begin(matmul_dtype, model, machine.dtype)
    rates = learning_rate, (beta1, beta2), weight_decay
    optimizer = optim.configure_optimizer(model, *rates, name, machine.dtype, muon_lr)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    start.restore(model, optimizer, scaler, team)
    schedule = optim.schedule_of(settings)

    # --- what keeps the run alive, and what it leaves behind
    in_parts = sharded_checkpoints and sharded
    saver = Saver(out, keep_last, milestone_interval, rank == 0, in_parts)
    agreement = Agreement(team, stop, saver)
    micro = MicroBatch(batch_size, windows, state, model, optimizer, agreement, sharded)
    settle(settings, flops * max_iters, machine, micro, team)
    health = Health(state, skip_spike, max_skipped)

    # --- a line for each fact that the user may want to check
    say(model_line(model))
    say(
        f"data     {data}: {train_data.tokens:,} training tokens ({tok.name}), "
        f"{val_data.tokens:,} for validation"
    )
    what = f"{max_iters:,} updates of {tokens_per_step:,} tokens ({micro.line(context, ranks)})"
    say(f"run      {what}, {order.epochs(max_iters):.2f} epochs, seed {seed}")
    if micro.note:
        say(f"run      {micro.note}")
    if decay_lr and schedule.warmup < warmup_iters:
        say(f"run      warmup_iters={schedule.warmup}, not {warmup_iters}: a tenth of the decay")
    if line := train_data.said or taken_for(data, train_data.ids[0]):
        say(f"data     {line}")
    if eval_iters or evaluation.count < evaluation.windows:
        say(f"run      {evaluation.line(eval_iters)}")
    say(f"machine  {machine.line(ranks)}; {kernel} attention{'; deterministic' * deterministic}")
    if why := unused_gpu(device, machine.device):
        say(f"WARNING  training on the {machine.device.type}: {why}")
    if start.resumed:
        say(f"resumed  {start.path} at {state.iter_num} updates")

    # --- compile, with one guarded step, and only then touch what is on the disk
    compile_or_say_why(compile, flops * max_iters, micro, net, loader, evaluation, machine)
    if rank == 0:
        folder.tidy(out, state.iter_num if start.resumed else None)
        files.write(out / "config.json", json.dumps(settings, indent=2) + "\n")
    name = wandb_run_name or out.name
    wandb = Wandb(wandb_log and rank == 0, wandb_project, name, settings, state.wandb_run_id)
    state.wandb_run_id = wandb.run_id
    if wandb.problem:
        say(wandb.problem)
    log = Log(out, rank, wandb, state.iter_num, max_iters, log_interval, curve)
    log.measure(tokens_per_step, flops, ranks * (peak_flops(machine.device, machine.dtype) or 0))
    origin = settings | {"init_from": start.origin}
    facts = now | {"config": origin, "tokenizer": tok.saved()}  # of every checkpoint
    saver.begin(state.iter_num if start.resumed else -1, checkpoint_interval, checkpoint_minutes)

    # --- the loop
    model.train()
    try:
        while True:
            step = state.iter_num
            saver.tell()
            at_eval = step % eval_interval == 0 or step >= max_iters
            due = at_eval or saver.is_due(step) or agreement.save_due
            if due and saver.lacks(step, team):  # before what may fail
                saver.save(step, contents(model, optimizer, scaler, state, facts))
            if at_eval:
                for attempt in micro.attempts():  # again with half the windows when memory is short
                    with attempt:
                        set_sync(net, last=True, only=True)  # weights come and go with each batch
                        batches = attempt.checked(evaluation.batches(micro.size))
                        sums = loss_sums(model, batches, machine.autocast)
                        attempt.agree()
                        total, tokens = team.sum(sums).tolist()
                val_loss = total / tokens
                best = saver.is_best(state, val_loss, team)
                if best:
                    saver.save_best(contents(model, optimizer, scaler, state, facts))
                shown = sample_prompt and rank == 0
                text = sample_text(model, tok, sample_prompt, machine) if shown else ""
                log.evaluation(step, val_loss, val_data.bits_per_byte(val_loss), best, text)
            if step >= max_iters:
                break

            log.begin()
            rate = schedule.at(step)
            optim.set_rate(optimizer, rate)
            for attempt in micro.attempts():
                with attempt:
                    torch.manual_seed(key_of(seed, step, rank) % 2**63)  # dropout, resumed or not
                    mean = torch.zeros((), device=machine.device)
                    for i, last in attempt.steps():
                        set_sync(net, last, micro.count == 1)  # gradients travel with the last
                        batch = loader.batch(step, i, micro.size)
                        divisor = loader.divisor(step, i, micro.size)
                        loss = micro_step(net, batch, divisor, machine, scaler)
                        mean += loss * (micro.count / divisor)
                    mean /= micro.count
            scaler.unscale_(optimizer)
            norm = optim.clip_gradients(model, grad_clip)
            mean = team.sum(mean) / ranks
            step_loss, grad_norm = torch.stack((mean, norm)).tolist()  # the step's one wait
            if health.is_good(step, step_loss, grad_norm):
                scaler.step(optimizer)
            elif health.is_hopeless():
                starts = order.starts(step, 0, tokens_per_step // context).tolist()
                health.give_up(out, step, step_loss, grad_norm, starts, saver, team)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.iter_num += 1
            log.update(step, step_loss, rate, grad_norm)
    except Stopped:
        pass  # the unfinished step or evaluation is done again by the resumed run

    # --- the end, by itself or because somebody asked
    if saver.lacks(state.iter_num, team):
        saver.save(state.iter_num, contents(model, optimizer, scaler, state, facts))
    saver.wait()
    log.close()
    problem, best_failed = team.first(saver.problem), team.first(saver.best_failed)
    failure, cause = team.first(stop.failure), team.first(stop.cause)
    if problem:
        raise OSError(f"{problem}; the updates since the last checkpoint are lost")
    if best_failed:
        raise OSError(f"{best_failed}; all updates are saved, but the best one is older")
    flags = without(sys.argv[1:], settings, "init_from", "overwrite")
    again = shlex.join([*team.launcher(), sys.argv[0], *flags, "--init_from=resume"])
    if failure:
        raise ValueError(f"{failure}. The {state.iter_num} updates so far are saved; then: {again}")
    if state.iter_num < max_iters:
        say(f"stopped by {cause} after {state.iter_num} updates, all saved; go on: {again}")
    else:
        if rank == 0 and (line := draw_run(log.metrics, out / "loss.png", curve)):
            say(line)
        best_line = f"best val loss {state.best_val_loss:.4f}, " if state.best_val_loss else ""
        say(f"done: {best_line}{state.skipped} updates left out, all in {out}")
    sys.exit(stop.exit_code())


if __name__ == "__main__":
    with one_voice():
        globals().update(configure(globals()))
    script.run(lambda: run_team(main))
