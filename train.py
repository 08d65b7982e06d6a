"""Train a GPT: python train.py config/train_gpt.py [--name=value ...]

One flat loop on one device. Every setting below can be set in a config file or as a flag.
Leaves in out_dir: checkpoints, metrics.jsonl, config.json and loss.png.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import runtime
from configurator import configure, settings_of
from dataloader import TokenData, TrainLoader, TrainOrder, eval_batches, key_of, read_meta
from model import GPT, IGNORE_INDEX, GPTConfig, configure_optimizer, flops_per_token, num_parameters
from tokenizer import Tokenizer, get_tokenizer

# the run
out_dir = "out"  # where checkpoints and logs go
init_from = "scratch"  # scratch, resume (newest good checkpoint of out_dir), or PATH of a .pt file
overwrite = False  # let a run from scratch replace the run that out_dir holds
seed = 1337  # of initial weights, data order and dropout
# data
dataset = "openwebtext"  # folder under data/, or a path with a slash
tokens_per_step = 491520  # tokens in one update; accumulation is derived from it
batch_size = 12  # windows in one micro-batch: memory, not the result, depends on it
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
# evaluation, log, checkpoints
eval_interval = 400  # updates
eval_iters = 200  # batches of batch_size windows, the same ones every time
log_interval = 10  # updates
keep_last = 2  # newest checkpoints kept, beside the best
wandb_log = False
wandb_project = "easygpt"
wandb_run_name = ""  # empty = the name of out_dir
# machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16: type of matrix products, by autocast
compile = "auto"  # auto, True, False: torch.compile

ROOT = Path(__file__).resolve().parent
# A CPU run shorter than this costs less uncompiled: compiling takes about a minute and saves a
# fifth of the time, at roughly 1e11 FLOP/s.
CPU_COMPILE_FLOPS = 1e14


@dataclass
class TrainState:
    """What a run must remember beside weights and optimizer to go on as if never stopped.

    Data order and dropout depend on the step alone, so neither has a state of its own.
    """

    iter_num: int = 0  # completed updates
    best_val_loss: float | None = None
    skipped: int = 0  # updates given up for a number that is not finite, in all
    wandb_run_id: str | None = None


def check_settings() -> None:
    """Raises ValueError that lists every setting out of range and every pair that does not fit."""
    least = {"batch_size": 1, "tokens_per_step": 1, "max_iters": 0, "eval_interval": 1}
    least |= {"eval_iters": 1, "log_interval": 1, "keep_last": 1, "warmup_iters": 0}
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


def lr_at(step: int, peak: float, low: float, warmup: int, decay: int) -> float:
    """Learning rate of update `step`, from 0: linear warm-up, then a cosine to `low` at `decay`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay:
        return low
    done = (step - warmup) / (decay - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], autocast: Any) -> float:
    """Loss in nats per token over all batches, with dropout off and one wait for the device."""
    model.eval()
    total = tokens = torch.zeros((), dtype=torch.float64, device=model.cos.device)
    for x, y in batches:
        with autocast:
            _, loss = model(x, y)
        count = (y != IGNORE_INDEX).sum()
        total, tokens = total + loss.double() * count, tokens + count
    model.train()
    return float(total / tokens)


def check_same_tokenizer(saved: dict[str, Any], tok: Tokenizer, path: Path) -> None:
    """Raises ValueError when a checkpoint was trained with other tokens than the dataset has."""
    theirs = saved.get("tokenizer") or {"name": "gpt2", "json": None}  # nanoGPT's files name none
    if (theirs["name"], theirs["json"]) != (tok.name, tok.json_text):
        raise ValueError(
            f"{path} was trained with the tokenizer {theirs['name']!r}, but the dataset is in "
            f"{tok.name!r} or another version of it; prepare the text with the checkpoint's "
            "(data/prepare.py --tokenizer=...)"
        )


def start_model(path: Path, state: dict[str, Any], size: GPTConfig) -> GPT:
    """The model for a fresh run on a checkpoint's weights.

    Sizes are the checkpoint's, dropout ours, and the context the smaller of the two.
    """
    found = checkpoint.model_config(state, path)
    context = min(found.max_position_embeddings, size.max_position_embeddings)
    model = GPT(replace(found, max_position_embeddings=context, dropout=size.dropout))
    checkpoint.load_weights(model, state, path)
    return model


def check_same_model(saved: GPTConfig, size: GPTConfig, path: Path) -> None:
    """Raises ValueError listing the model settings that differ from the checkpoint's."""
    differ = [
        f"{f.name} is {getattr(size, f.name)}, there {getattr(saved, f.name)}"
        for f in fields(GPTConfig)
        if f.name != "dropout" and getattr(size, f.name) != getattr(saved, f.name)
    ]
    if differ:
        raise ValueError(
            f"{path} is of another model, so it cannot be resumed: {'; '.join(differ)}"
        )


def wandb_logger(config: dict[str, Any], state: TrainState) -> Callable[[dict[str, Any]], None]:
    """A function that sends a record to wandb, or does nothing when wandb is off or unwell."""

    def nothing(record: dict[str, Any]) -> None:
        return None

    if not wandb_log:
        return nothing
    try:
        import wandb

        run = wandb.init(
            project=wandb_project,
            name=wandb_run_name or Path(out_dir).name,
            config=config,
            id=state.wandb_run_id,
            resume="allow",
        )
        state.wandb_run_id = run.id
    except Exception as e:  # wandb's errors are many, and none may stop a run
        tqdm.write(f"wandb is off: {type(e).__name__}: {e}".splitlines()[0])
        return nothing

    def log(record: dict[str, Any]) -> None:
        try:
            run.log(record, step=record["iter"])
        except Exception as e:
            tqdm.write(f"wandb: {type(e).__name__}: {e}".splitlines()[0])

    return log


def draw_losses(metrics: Path, image: Path) -> None:
    """Plot training and validation loss against tokens from metrics.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write("no loss.png: matplotlib is not installed")
        return
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        if points:
            label = {"loss": "training", "val_loss": "validation"}[key]
            axes.plot(*zip(*points, strict=True), style, label=label, lw=1, ms=3)
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=150)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


def main() -> None:
    # --- settings, device, data: everything that can be wrong is found before any work
    config = settings_of(globals())
    check_settings()
    rank, ranks = 0, 1
    where = runtime.select_device(device)
    number, why = runtime.select_dtype(dtype, where)
    autocast = runtime.autocast(where, number)
    folder = Path(dataset) if os.sep in dataset or "/" in dataset else ROOT / "data" / dataset
    meta = read_meta(folder)
    tok: Tokenizer = get_tokenizer(meta["tokenizer"], folder)
    size = GPTConfig(
        **{f.name: config[f.name] for f in fields(GPTConfig) if f.name != "vocab_size"},
        vocab_size=vocab_size or -(-int(meta["vocab_size"]) // 64) * 64,
    )
    out = Path(out_dir)
    if init_from == "scratch" and not overwrite and checkpoint.steps_saved(out):
        raise ValueError(
            f"{out} holds a run already; go on with it (--init_from=resume), choose another "
            "--out_dir, or replace it (--overwrite=True)"
        )

    # --- model
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.manual_seed(seed)
    saved: dict[str, Any] = {}
    state = TrainState()
    if init_from == "resume":
        path, saved, problems = checkpoint.load_newest(out)
        for problem in problems:
            tqdm.write(f"passed over: {problem}")
        check_same_tokenizer(saved, tok, path)
        check_same_model(checkpoint.model_config(saved, path), size, path)
        model = GPT(size)
        checkpoint.load_weights(model, saved, path)
        if "train_state" not in saved:
            raise ValueError(f"{path} cannot be resumed, only started from: --init_from={path}")
        state = TrainState(**saved["train_state"])
    elif init_from == "scratch":
        model = GPT(size)
    else:
        path = Path(init_from)
        start = checkpoint.load(path)
        check_same_tokenizer(start, tok, path)
        model = start_model(path, start, size)
        size = model.config
        del start
    context = size.max_position_embeddings
    micro_steps = accumulation(tokens_per_step, batch_size, context, ranks)
    train_data = TokenData(folder, "train", context, size.vocab_size)
    val_data = TokenData(folder, "val", context, size.vocab_size)
    order = TrainOrder(train_data.tokens, context, tokens_per_step, seed)
    loader = TrainLoader(train_data, order, rank, ranks, where)
    out.mkdir(parents=True, exist_ok=True)
    model.to(where)
    optimizer = configure_optimizer(model, learning_rate, (beta1, beta2), weight_decay)
    scaler = torch.amp.GradScaler(where.type, enabled=number == torch.float16)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    saved = {}

    # --- a line for each fact that the user may want to check
    flops_per_step = flops_per_token(model) * tokens_per_step
    peak = runtime.peak_flops(where)
    tqdm.write(
        f"model    {num_parameters(model):,} parameters, context {context}, vocab {size.vocab_size}"
    )
    tqdm.write(
        f"data     {folder}: {train_data.tokens:,} training tokens ({tok.name}), "
        f"{val_data.tokens:,} for validation"
    )
    tqdm.write(
        f"run      {max_iters:,} updates of {tokens_per_step:,} tokens ({batch_size} x {context} x "
        f"{micro_steps} micro-steps), {order.epochs(max_iters):.2f} epochs, seed {seed}"
    )
    tqdm.write(f"machine  {runtime.describe(where)}; {number} ({why})".replace("torch.", ""))
    if state.iter_num:
        tqdm.write(f"resumed  {path} at {state.iter_num} updates")

    # --- compile, with one guarded step: torch.compile fails when it is first called, not before
    def micro_loss(step: int, micro_step: int) -> Tensor:
        x, y = loader.batch(step, micro_step, batch_size)
        with autocast:
            loss: Tensor = model(x, y)[1]
        scaler.scale(loss / micro_steps).backward()
        return loss.detach()

    def eval_data() -> Iterable[tuple[Tensor, Tensor]]:
        return eval_batches(val_data, eval_windows, batch_size, where, rank, ranks)

    eval_windows = eval_iters * batch_size
    why_not = runtime.why_not_compile(where)
    pays = where.type == "cuda" or flops_per_step * max_iters >= CPU_COMPILE_FLOPS
    if compile.lower() == "true" or (compile.lower() == "auto" and not why_not and pays):
        t0 = time.perf_counter()
        model.compile()
        try:
            micro_loss(state.iter_num, 0)
            mean_loss(model, [next(iter(eval_data()))], autocast)
            tqdm.write(f"compile  took {time.perf_counter() - t0:.0f} s")
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {e}".splitlines()[0][:120]
            tqdm.write(f"compile  failed, training uncompiled ({reason})")
            model._compiled_call_impl = None
            model.train()
        optimizer.zero_grad(set_to_none=True)
    elif compile.lower() == "auto":
        tqdm.write(f"compile  off: {why_not or 'the run is too short for it to pay'}")

    # --- logs
    metrics = out / "metrics.jsonl"
    kept = []
    if init_from == "resume" and metrics.exists():
        kept = [
            line
            for line in metrics.read_text(encoding="utf-8").splitlines()
            if json.loads(line)["iter"] < state.iter_num
        ]
    if init_from != "resume":
        for _, old in checkpoint.steps_saved(out):
            old.unlink()
        (out / "best.pt").unlink(missing_ok=True)
    metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    send = wandb_logger(config, state)

    def log(record: dict[str, Any], line: str) -> None:
        tqdm.write(line)
        with metrics.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        send(record)

    def save() -> Path:
        path = out / f"ckpt_{state.iter_num}.pt"
        contents = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": asdict(size),
            "iter_num": state.iter_num,
            "best_val_loss": state.best_val_loss,
            "config": config,
            "tokenizer": {"name": tok.name, "vocab_size": tok.vocab_size, "json": tok.json_text},
            "train_state": asdict(state),
            "scaler": scaler.state_dict(),
        }
        checkpoint.save(path, contents)
        for _, old in checkpoint.steps_saved(out)[keep_last:]:
            old.unlink()
        return path

    # --- the loop
    bar = tqdm(total=max_iters, initial=state.iter_num, disable=None, unit="step", leave=False)
    started, first = time.perf_counter(), state.iter_num
    clock_s, clock_steps, skipped_in_a_row = 0.0, 0, 0
    model.train()
    while True:
        step = state.iter_num
        if step % eval_interval == 0 or step == max_iters:
            path = save()
            val_loss = mean_loss(model, eval_data(), autocast)
            record = {"iter": step, "tokens": step * tokens_per_step, "val_loss": val_loss}
            line = f"step {step:>6} | val loss {val_loss:.4f}"
            if val_data.nbytes:
                per_byte = val_loss * val_data.tokens / val_data.nbytes / math.log(2)
                record["val_bits_per_byte"] = per_byte
                line += f" | {per_byte:.4f} bits per byte"
            if math.isfinite(val_loss) and val_loss < (state.best_val_loss or math.inf):
                state.best_val_loss = val_loss
                checkpoint.link(path, out / "best.pt")
                line += " | best"
            log(record, line)
        if step == max_iters:
            break

        t0 = time.perf_counter()
        rate = learning_rate
        if decay_lr:
            rate = lr_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(key_of(seed, step, rank) % 2**63)  # dropout of this step, resumed or not
        loss_sum = torch.zeros((), device=where)
        for micro_step in range(micro_steps):
            # The model's loss is a mean over its micro-batch. Gradients add up over micro-batches,
            # so each is divided by their number: the sum is then the gradient of the mean over
            # the whole step, whatever the micro-batch size.
            loss_sum += micro_loss(step, micro_step)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        loss, grad_norm = torch.stack((loss_sum / micro_steps, norm)).tolist()  # the one wait
        if math.isfinite(loss) and math.isfinite(grad_norm):
            scaler.step(optimizer)
            skipped_in_a_row = 0
        else:
            state.skipped += 1
            skipped_in_a_row += 1
            tqdm.write(f"step {step:>6} | skipped: loss {loss}, gradient norm {grad_norm}")
            if skipped_in_a_row >= max_skipped:
                raise ValueError(
                    f"{skipped_in_a_row} updates in a row were not finite, the last at step {step}"
                    f"; the last good checkpoint is in {out}. Try a lower learning_rate"
                )
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock_s, clock_steps = clock_s + time.perf_counter() - t0, clock_steps + 1
        state.iter_num += 1
        bar.update()
        if step % log_interval == 0:
            speed = clock_steps * tokens_per_step / clock_s
            flops = clock_steps * flops_per_step / clock_s
            left = (time.perf_counter() - started) / (step + 1 - first) * (max_iters - step - 1)
            record = {"iter": step, "tokens": (step + 1) * tokens_per_step, "loss": loss}
            record |= {"lr": rate, "grad_norm": grad_norm, "tokens_per_s": round(speed)}
            record |= {"tflops": flops / 1e12, "mfu": flops / peak if peak else None}
            share = f" {flops / peak:.1%} MFU" if peak else ""
            log(
                record,
                f"step {step:>6} | loss {loss:.4f} | lr {rate:.2e} | norm {grad_norm:.2f} | "
                f"{speed:,.0f} tok/s | {flops / 1e12:.2f} TFLOP/s{share} | "
                f"{duration(left)} left",
            )
            clock_s, clock_steps = 0.0, 0
    bar.close()
    draw_losses(metrics, out / "loss.png")
    tqdm.write(f"done: best val loss {state.best_val_loss}, {out}")


if __name__ == "__main__":
    globals().update(configure(globals()))
    runtime.run(main)
