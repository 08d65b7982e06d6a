"""What a run tells while it goes on: lines, records of metrics.jsonl, a bar."""

import contextlib
import time
from pathlib import Path

from tqdm import tqdm

from run.curve import Curve
from run.records import Record, Wandb, add_record
from run.team import is_first
from text.files import printable


def say(line: str) -> None:
    """Print a line above the progress bar; a full disk or a lost terminal stops no run."""
    if is_first():
        with contextlib.suppress(OSError):
            tqdm.write(line)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


class Log:
    """The lines and records of updates and evaluations, with the speed between two of them.

    first: the update that the run goes on from; curve: of a run to compare with.
    """

    def __init__(
        self,
        out: Path,
        rank: int,
        wandb: Wandb,
        first: int,
        max_iters: int,
        log_interval: int,
        curve: Curve | None = None,
    ) -> None:
        self.metrics, self.rank, self.wandb = out / "metrics.jsonl", rank, wandb
        self.first, self.max_iters, self.interval = first, max_iters, log_interval
        self.curve = curve
        hide = None if rank == 0 else True  # None: where there is no terminal
        self.bar = tqdm(total=max_iters, initial=first, disable=hide, unit="step", leave=False)
        self.started = self.begun = time.perf_counter()
        self.updating: float | None = None  # since the first update; what is before it comes once
        self.seconds, self.steps = 0.0, 0  # of the updates since the last line
        self.measure(0, 0.0, 0.0)

    def measure(self, tokens_per_step: int, flops: float, peak: float) -> None:
        """What speeds are computed from: tokens and operations of an update, FLOP/s of all cards.

        peak is 0 where it is not known.
        """
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak

    def put(self, record: Record, line: str) -> None:
        """A record, and a line for people."""
        if self.rank == 0:
            for text in (line, add_record(self.metrics, record), self.wandb.log(record)):
                if text:
                    say(text)

    def begin(self) -> None:
        """An update begins."""
        self.begun = time.perf_counter()
        self.updating = self.updating or self.begun

    def update(self, step: int, loss: float, rate: float, grad_norm: float) -> None:
        """An update is over; one in log_interval is told."""
        now = time.perf_counter()
        self.seconds, self.steps = self.seconds + now - self.begun, self.steps + 1
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.update()
        if step % self.interval:
            return
        speed = self.steps * self.tokens_per_step / self.seconds
        flops = self.steps * self.flops / self.seconds
        taken = now - (self.updating or self.begun)
        left = (self.max_iters - step - 1) * taken / (step + 1 - self.first)
        mfu = flops / self.peak if self.peak else None
        self.put(
            {
                "iter": step,
                "tokens": (step + 1) * self.tokens_per_step,
                "loss": loss,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens_per_s": round(speed),
                "tflops": flops / 1e12,
                "mfu": mfu,
                "elapsed_s": round(now - self.started, 3),
            },
            f"step {step:>6} | loss {loss:.4f} | lr {rate:.2e} | norm {grad_norm:.2f} | "
            f"{speed:,.0f} tok/s | {flops / 1e12:.2f} TFLOP/s"
            + ("" if mfu is None else f" {mfu:.1%} MFU")
            + f" | {duration(left)} left",
        )
        self.seconds, self.steps = 0.0, 0

    def evaluation(
        self, step: int, val_loss: float, per_byte: float | None, best: bool, text: str = ""
    ) -> None:
        """A validation loss in nats per token, in bits per byte where that is known, and a text."""
        tokens = step * self.tokens_per_step
        record: Record = {"iter": step, "tokens": tokens, "val_loss": val_loss}
        line = f"step {step:>6} | val loss {val_loss:.4f}"
        if per_byte is not None:
            record["val_bits_per_byte"] = per_byte
            line += f" | {per_byte:.4f} bits per byte"
        expected = self.curve.at(tokens) if self.curve else None
        if expected is not None:
            record["over_reference"] = val_loss - expected
            line += f" | {val_loss - expected:+.4f} to the reference's {expected:g}"
        line += " | best" if best else ""
        if text:
            record["sample"] = text
            line += f"\nstep {step:>6} | sample: {printable(' '.join(text.split()))}"
        self.put(record, line)

    def close(self) -> None:
        """Take the bar away."""
        with contextlib.suppress(OSError):
            self.bar.close()
