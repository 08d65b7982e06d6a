"""What a run will take, before it starts: memory, time, disk, and what more cards would do.

Everything is computed but the time of a few steps, where the device is there and they are short.
The lines say which is which.
"""

import contextlib
import datetime
import shutil
import statistics
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import GPT, num_parameters
from plan import fit, hours, memory
from plan.fit import (
    GIB,
    as_needed,
    largest_batch,
    parts_at_peak,
    peak,
    smallest_change,
    training_of,
)
from plan.hours import NODE
from plan.memory import Training
from run import cards, int8
from run.compiling import why_not_compile
from run.copies import Copies
from run.cost import flops_per_token, model_line
from run.curve import read_curve
from run.folder import check_disk, disk_needed
from run.gpu import unused_gpu
from run.log import say
from run.machine import (
    Machine,
    autocast,
    save_memory,
    select_device,
    select_dtype,
    tune,
)
from run.microbatch import largest_divisor, windows_of_rank
from run.optim import configure_optimizer, groups_of, moments
from run.parallel import check_sharded
from run.settings import check_folder, run_folder
from run.start import TrainState, find_start, model_as_set, source_of
from text.batches import open_split, order_of
from text.tokenizer import of_dataset
from text.tokens import GPT2_VOCAB, read_meta

CARD_SIZES = (24, 16, 12, 8)  # GiB, of consumer cards
CPU_FLOPS = 1e11  # FLOP/s, the order of a few cores
TIMING_S = 120.0  # steps are timed only when they are expected to take less
SAVINGS = (  # what is said of save_memory's levels
    "",
    ", as backward computes norms and SwiGLU again",
    ", as backward computes norms and SwiGLU again and the loss comes in pieces",
    ", as each micro-step casts the weights, backward computes norms and SwiGLU again and the loss "
    "comes in pieces",
)


# ---------------------------------------------------------------- memory


def room_on(device: torch.device, card: cards.Card | None) -> float | None:
    """Bytes less the reserve of a card that is not here, or of this machine's device."""
    return card.memory * GIB - fit.RESERVE["cuda"] if card else fit.room_of(device)


def memory_lines(
    training: Training, batch: int, windows: int, room: float | None, where: str
) -> Iterator[str]:
    """The parts of a rank's memory as a table, against what there is. room excludes the reserve."""
    parts = parts_at_peak(training, batch, windows)
    graph = "compiled" if training.compiled else "eager"
    saving = " and activation checkpointing" if training.checkpointing else ""
    shares = f", of which {training.shards} share a model" if training.shards > 1 else ""
    each = f" on each of {training.ranks} cards{shares}" if training.ranks > 1 else ""
    yield (
        f"memory   at the peak of a step with batch_size={batch}{saving}{each}, computed from the "
        f"{graph} graph:"
    )
    for part, nbytes in [*parts.items(), ("sum", sum(parts.values()))]:
        yield f"  {part:<16}{nbytes / GIB:8.2f} GiB"
    if room is None:
        yield f"  free memory of {where}: unknown"
        return
    reserve = fit.RESERVE[training.device_type]
    verdict = "fits" if sum(parts.values()) <= room else "DOES NOT FIT"
    if verdict == "fits" and training.chooses:
        verdict += SAVINGS[training.saving]
    yield (
        f"  {where}: {(room + reserve) / GIB:.2f} GiB, less {reserve / GIB:.1f} for what is not in "
        f"the graph (assumed): {verdict}"
    )


def card_lines(training: Training, windows: int) -> Iterator[str]:
    """Largest micro-batches on consumer cards, computed for the compiled graph in bfloat16."""
    plain = replace(
        training,
        device_type="cuda",
        dtype=torch.bfloat16,
        compiled=True,
        checkpointing=False,
        saving=1,
    )
    whose = "a card's" if training.ranks > 1 else "the step's"
    yield (
        f"cards    largest batch_size that fits and divides {whose} {windows} windows "
        "(computed, bfloat16, torch.compile):"
    )
    yield "  memory    as it is    with activation_checkpointing"
    for size in CARD_SIZES:
        room = size * GIB - fit.RESERVE["cuda"]
        trainings = (plain, replace(plain, checkpointing=True))
        a, b = (largest_batch(t.leanest, windows, room) or "none" for t in trainings)
        yield f"  {size:>3} GB    {a:>8}    {b:>8}"


# ---------------------------------------------------------------- time


def timed_step(
    training: Training, device: torch.device, batch: int, micro_steps: int, repeats: int = 3
) -> float:
    """Measured seconds of an update: a few micro-steps (the median) and the optimizer's step."""
    tune(device)
    model = GPT(training.config).to(device)
    model.activation_checkpointing = training.checkpointing
    int8.begin(training.matmul_dtype, model, training.dtype)
    rates = 1e-4, (0.9, 0.95), 0.1
    optimizer = configure_optimizer(model, *rates, training.optimizer, training.dtype)
    shape = (batch, training.config.max_position_embeddings)
    x = torch.randint(0, training.config.vocab_size, shape, device=device)
    context = autocast(device, training.dtype)
    if training.compiled:
        save_memory(model, training.saving)
        model.compile()
    copies = Copies(model, training.dtype) if training.copies else None
    if copies:
        copies.lend()

    def micro() -> None:
        with context:
            loss = model(x, x, loss_only=True)[1]
        torch.autograd.backward(loss)

    def update() -> None:
        if copies:
            copies.take_back()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if copies:
            copies.lend()

    def seconds(work: Callable[[], None]) -> float:
        t0 = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - t0

    for work in (micro, update):  # the first ones compile and allocate
        work()
    return micro_steps * statistics.median(seconds(micro) for _ in range(repeats)) + seconds(update)


def time_lines(step_s: float, tokens: int, flops: float, steps: int, how: str) -> Iterator[str]:
    """Hours, the date on which a run that starts now would end, tokens/s."""
    seconds = steps * step_s
    until = "beyond the calendar"
    with contextlib.suppress(OverflowError):
        end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        until = f"until {end:%Y-%m-%d %H:%M} if started now"
    yield f"time     {seconds / 3600:,.1f} hours for {steps:,} updates of {step_s:.3g} s, {until}"
    yield f"  {tokens / step_s:,.0f} tokens/s, {flops / step_s / 1e12:.2f} TFLOP/s: {how}"


def rate_lines(training: Training, batch: int, card: cards.Card) -> Iterator[str]:
    """What a micro-step's time is made of, and how fast the card is taken to be."""
    times, config = hours.micro_step(training, batch, card), training.config
    reach = cards.reach_of(card, training.dtype)
    peak = f"{card.peak(training.dtype) / 1e12:g} TFLOP/s"
    small = batch * config.max_position_embeddings < cards.LEAST_TOKENS
    small = small or config.hidden_size < cards.LEAST_WIDTH
    source = "more than products so small reach" if small else reach.source
    int8_peak = f"{card.peak(torch.int8) / 1e12:g} TOPS"
    rows = (
        ("products", times.products, reach.products, peak, source),
        ("int8", times.int8, reach.int8, int8_peak, "assumed"),
        ("attention", times.attention, reach.attention, peak, "assumed"),
        ("loops", times.loops, reach.bandwidth, f"{card.gb_per_s:g} GB/s", reach.bandwidth_source),
    )
    yield f"  a micro-step, {1e3 * times.total:,.0f} ms, from its graph:"
    for name, seconds, share, most, word in (row for row in rows if row[1]):
        yield f"    {name:<10}{1e3 * seconds:8.1f} ms at {share:.0%} of {most} ({word})"
    if times.waits:
        each = f"{1e6 * hours.KERNEL_S:g} us"
        yield f"    the GPU waits for the CPU: {times.kernels:,.0f} kernels, {each} each (assumed)"
    if not training.compiled:
        yield (
            f"    uncompiled training takes {hours.UNCOMPILED:g} times as long (measured once, on "
            "an H200)"
        )


def scaling_lines(
    training: Training, most: int, windows: int, card: cards.Card, room: float
) -> Iterator[str]:
    """A table of 1 card to all ranks of a training, which take at most so many windows at once.

    most: 0 = as many as are fastest. FSDP moves as many bytes as DDP: weights in 16 bits twice,
    gradients in float32 once.
    """
    yield f"scaling  computed, not measured; {card.name}"
    yield (
        "  cards  batch_size x micro-steps  DDP GiB  FSDP GiB  compute s   comm. s    tokens/s"
        "  efficiency"
    )
    rounded, world_size = False, training.ranks
    for count in sorted({*(2**i for i in range(world_size.bit_length())), world_size}):
        each = windows_of_card(windows, count)
        several = replace(training, ranks=count, shards=1)
        micro = largest_divisor(each, most or fit.at_once(several, each, room))
        mark = " " if each * count == windows else "*"
        rounded = rounded or mark == "*"
        several = as_needed(several, micro, each, room)
        shards = replace(several, shards=count, saving=1)
        ddp, fsdp = (peak(t, micro, each) / GIB for t in (several, shards))
        compute, comm = hours.step(several, micro, each // micro, card)
        tokens = each * count * training.config.max_position_embeddings / (compute + comm)
        yield (
            f"  {count:>5}{mark} {micro:>10} x {each // micro:<11}  {ddp:>7.1f}  "
            f"{f'{fsdp:.1f}' if count > 1 else '-':>8}  {compute:>9.3f}  {comm:>8.3f}  "
            f"{tokens:>10,.0f}  {compute / (compute + comm):>10.0%}"
        )
    state = memory.states(training.config, training.optimizer, training.dtype)
    gradients = state[memory.GRADIENTS]
    yield (
        f"  assumed: {card.link / 1e9:g} GB/s between the {NODE} cards of a machine, "
        f"{card.network / 1e9:g} GB/s between machines, {gradients / 1e9:.2f} GB of float32 "
        "gradients in one ring all-reduce a step, none of it hidden behind computing"
    )
    if rounded:
        yield (
            f"  * {windows} windows do not divide by the cards; computed for the nearest "
            "tokens_per_step that does"
        )


# ---------------------------------------------------------------- the plan


def data_line(
    folder: Path, training: Training, tokens_per_step: int, steps: int, assumed: bool
) -> str:
    """How often the run reads the data at hand. assumed: its vocabulary is, where it is not."""
    context = training.config.max_position_embeddings
    try:
        data = open_split(folder, "train", context, training.config.vocab_size)
    except FileNotFoundError as e:
        vocabulary = f"; a vocabulary of {training.config.vocab_size:,} is assumed" * assumed
        return f"data     not there yet, epochs unknown{vocabulary}: {e}"
    epochs = order_of(data, tokens_per_step, 0).epochs(steps)
    return f"data     {folder}: {data.tokens:,} training tokens, {epochs:.2f} epochs"


def existing(folder: Path) -> Path:
    """The nearest folder above that exists already, or the folder itself."""
    folder = folder.resolve()
    return folder if folder.exists() else existing(folder.parent)


def disk_line(folder: Path, size: int, count: int, log: int) -> str:
    """What a run writes at most, as folder.check_disk takes it."""
    return (
        f"disk     {count} checkpoints of {size / 1e9:.3g} GB and {log / 1e6:.3g} MB of log at "
        f"most; {shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    )


def windows_of_card(windows: int, cards: int) -> int:
    """Those of a step that each of several cards takes; the nearest where they do not divide."""
    return max(1, round(windows / cards))


def plan(
    training: Training,
    device: torch.device,
    card: cards.Card | None,
    most: int,
    windows_per_step: int,
    steps: int,
    state: TrainState,
) -> Iterator[str]:
    """Lines on memory, cards, time and scaling; card is planned for instead of device.

    most: windows at once, 0 = as many as are fastest. steps: updates of the whole run. state: of a
    resumed one. Raises ValueError at the end, with the smallest change that fits, when the run does
    not fit.
    """
    context, ranks = training.config.max_position_embeddings, training.ranks
    windows = windows_of_card(windows_per_step, ranks)
    room, done = room_on(device, card), state.iter_num
    batch = largest_divisor(windows, most or fit.at_once(training, windows, room))
    micro_steps, tokens = windows // batch, windows * ranks * context
    with torch.device("meta"):
        flops = flops_per_token(GPT(training.config)) * tokens
    if batch < most:
        whose = "a card's" if ranks > 1 else "a"
        yield f"run      batch_size={batch}, which divides the {windows} windows of {whose} step"
    if done:
        yield f"resumed  at {done:,} updates; {steps - done:,} are left"
    by_ranks = f" x {ranks} cards" if ranks > 1 else ""
    yield (
        f"run      {steps:,} updates of {tokens:,} tokens ({batch} x {context} x "
        f"{micro_steps} micro-steps{by_ranks}), {steps * tokens / 1e9:.3g} B tokens, "
        f"{flops:.3g} FLOP each"
    )
    training = as_needed(training, batch, windows, room, state.saving)
    name = card.name if card else "free memory"
    yield from memory_lines(training, batch, windows, room, name)
    yield from card_lines(training, windows)
    change = smallest_change(training, batch, windows, room) if room is not None else ""

    short = training.device_type != "cpu" or 5 * flops / micro_steps / CPU_FLOPS < TIMING_S
    if card:
        step_s, how = sum(hours.step(training, batch, micro_steps, card)), "computed, nothing timed"
    elif short and not change:
        step_s = timed_step(training, device, batch, micro_steps)
        how = "measured on a few micro-steps and an update"
    else:
        step_s = flops / CPU_FLOPS
        how = f"computed from a guess; not timed: {'does not fit' if change else 'takes too long'}"
    yield from time_lines(step_s, tokens, flops, steps - done, how)
    if card:
        yield from rate_lines(training, batch, card)
    if ranks > 1 and card and room is not None:
        yield from scaling_lines(training, most, windows_per_step, card, room)
    if change:
        raise ValueError(f"the run does not fit in memory; the smallest change that fits: {change}")


def report(settings: Mapping[str, Any], typed: Container[str]) -> None:
    """Print what the run of a training script's settings would take, and write nothing.

    typed: the settings that were flags. Raises ValueError with the smallest change that fits when
    it does not fit.
    """
    s = settings
    card = cards.find_card(s["device"])
    device = torch.device("cuda") if card else select_device(s["device"])
    if card and s["dtype"] == "auto":
        machine = Machine(device, card.half, "the card computes in it")
    else:
        machine = Machine(device, *select_dtype(s["dtype"], device))
    data, out = check_folder(s["dataset"]), run_folder(s["out_dir"])
    read_curve(s["reference"])
    source = source_of(s["init_from"], out)
    meta: Mapping[str, Any] = {"vocab_size": GPT2_VOCAB}  # a model from scratch needs no data yet
    if data.is_dir() or source != "scratch":
        meta = read_meta(data)
    as_set = model_as_set(s, meta)
    tok = of_dataset(meta, data) if "chat" in meta else None
    start = find_start(source, out, as_set, s["batch_size"], tok, whole=False)
    if start.saved:
        now = {"config": s, "data": meta["splits"], "dtype": str(machine.dtype)}
        start.check(as_set, of_dataset(meta, data), now, typed)
    config, context = start.config, start.config.max_position_embeddings
    windows = windows_of_rank(s["tokens_per_step"], context, 1)
    with torch.device("meta"):
        empty = GPT(config)
    flops = flops_per_token(empty) * s["tokens_per_step"] * s["max_iters"]
    cannot, ranks = "" if card else why_not_compile(device), s["world_size"]
    if ranks > 1 and not card:
        raise ValueError(f"world_size={ranks} needs a card to plan for, as --device=RTX3090")
    int8.check(s["matmul_dtype"], device, s["compile"], card)
    if ranks > 1 and s["parallel"] != "ddp":
        check_sharded(s["parallel"], machine.dtype, s["sample_prompt"])
    training = training_of(s, config, machine, flops, cannot, ranks, min(NODE, ranks))
    say(model_line(empty))
    assumed = source == "scratch" and not s["vocab_size"]
    tokens = windows_of_card(windows, ranks) * ranks * context
    say(data_line(data, training, tokens, s["max_iters"], assumed))
    name = f"{card.name}, not here" if card else ""
    say(f"machine  {machine.line(name=name)}")
    if not card and (problem := unused_gpu(s["device"], device)):
        say(f"WARNING  planned for the {device.type}: {problem}")
    numbers = num_parameters(empty) + moments(groups_of(empty, s["optimizer"]))
    there, disk = existing(out), disk_needed(s, numbers)
    say(disk_line(there, **disk))
    if tokens != s["tokens_per_step"]:
        say(f"run      --tokens_per_step={tokens}, the nearest that {ranks} cards can share out")
    sizes = start.state.micro_batch or s["batch_size"], windows, s["max_iters"]
    for line in plan(training, device, card, *sizes, start.state):
        say(line)
    check_disk(there, **disk)
