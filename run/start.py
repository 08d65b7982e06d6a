"""Where a run starts from: scratch, a checkpoint of its own, or another model.

The plan asks the same function.
"""

import contextlib
import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from formats import checkpoint, listing, pretrained, rebuild
from formats.pack import tensors_in
from model import GPT, GPTConfig
from run.log import say
from run.optim import schedule_of, state_of
from run.parallel import share_optimizer
from run.settings import changed
from run.team import Team
from text.chat import question_ids
from text.files import whole
from text.tokenizer import Tokenizer


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
    saving: int = 0  # the level of machine.save_memory that a device's memory asked for


@dataclass
class Start:
    """A run's first model and state. `saved` is a checkpoint's contents, on rank 0 alone."""

    config: GPTConfig
    state: TrainState = field(default_factory=TrainState)
    origin: str = "scratch"  # where the run's first model came from, resumed or not
    path: Path = Path()
    saved: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    scaler: dict[str, Any] | None = None
    parts: dict[str, Any] | None = None  # of a checkpoint that each rank reads its part of

    def check(
        self, as_set: GPTConfig, tok: Tokenizer, now: Mapping[str, Any], typed: Container[str]
    ) -> Tokenizer:
        """Whether the settings fit the checkpoint; warns when a resumed run is not the same.

        tok: the dataset's; returns it with what the checkpoint's model states of its ids. now: as
        in settings.changed; typed: the settings that were flags. Raises ValueError.
        """
        context, prompt = self.config.max_position_embeddings, now["config"]["sample_prompt"]
        if (tokens := len(question_ids(tok, prompt)) if prompt else 0) > context:
            say(f"WARNING  sample_prompt has {tokens} tokens: only the last {context} are read")
        if not self.saved:
            return tok
        tok = check_same_tokenizer(self.saved, tok, self.path)
        if self.origin == "scratch":
            theirs = rebuild.model_config(self.saved, self.path)
            rebuild.check_same_model(theirs, as_set, self.path)
        elif names := other_sizes(self.config, as_set, typed):
            sizes = ", ".join(f"{name} {getattr(self.config, name)}" for name in names)
            flags = " ".join(f"--{name}" for name in names)
            raise ValueError(f"{self.path} has {sizes}, which stays; leave out {flags}")
        if not self.resumed:
            return tok
        if self.state.iter_num > now["config"]["max_iters"]:
            raise ValueError(
                f"{self.path} has {self.state.iter_num} updates already, more than "
                f"max_iters={now['config']['max_iters']}; write a larger --max_iters to go on"
            )
        saved, unread = self.saved["optimizer"], self.path.suffix == listing.PARTS
        made = self.state.iter_num - self.state.skipped
        updates = 0 if unread and not saved.get("state") else made
        check_moments(saved, now["config"]["optimizer"], updates, self.path)
        different = changed(self.saved, now)
        different += rate_changed(self.saved["config"], now["config"], self.state.iter_num)
        if different:
            say(f"WARNING  not the same run as before: {', '.join(different)}")
        return tok

    def shared(self, team: Team, sharded: bool) -> "Start":
        """What rank 0 has found, on all ranks; the contents stay where they are."""
        if self.saved and sharded and self.path.suffix == listing.PARTS:
            needed = {k: self.saved[k] for k in ("model_args", "optimizer")}
            self.parts = {"path": str(self.path), "rest": needed}
        mine = [asdict(self.config), asdict(self.state), self.resumed, self.scaler, self.parts]
        config, state, resumed, scaler, parts = team.share(mine)
        common: dict[str, Any] = {"config": GPTConfig(**config), "state": TrainState(**state)}
        return replace(self, **common, resumed=resumed, scaler=scaler, parts=parts)

    def build(self, rank: int, seed: int) -> GPT:
        """The model on the CPU; only rank 0's weights count, unless each rank reads its own."""
        torch.manual_seed(seed)
        counts = rank == 0 and not self.parts
        with contextlib.nullcontext() if counts else rebuild.SkipInit():
            if self.saved and not self.parts:
                return rebuild.build(self.config, self.saved, self.path)
            return GPT(self.config)

    def restore(
        self, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, team: Team
    ) -> None:
        """Give the optimizer and the scaler their state, and each rank its part of the weights."""
        if self.parts:
            from formats.sharded import read_into  # few need it, and it takes a second

            moments = optimizer if self.resumed else None
            read_into(Path(self.parts["path"]), model, moments, self.parts["rest"])
        elif self.resumed:
            saved = self.saved.get("optimizer", {})
            if team.rank == 0 and not moments_fit(saved, optimizer):
                raise ValueError(f"{self.path}: its optimizer's state is not that of its model")
            # the groups' settings are today's, not those of a file
            share_optimizer(
                team, optimizer, {**optimizer.state_dict(), "state": saved.get("state", {})}
            )
        if self.resumed and self.scaler:
            scaler.load_state_dict(self.scaler)
        self.saved = {}


def rate_changed(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """A line when the learning rate of update `step` is not what it would have been before."""
    kept = {k: before[k] for k in now if type(before.get(k)) is type(now[k])}
    try:
        was, comes = (schedule_of({**now, **s}).at(step) for s in (kept, now))
    except (ArithmeticError, ValueError):  # numbers out of a file
        return []
    same = math.isclose(was, comes, rel_tol=1e-6)
    return [] if same else [f"rate of the next update {was:.3g} -> {comes:.3g}"]


def moments_fit(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state as it comes out of a file is that of the optimizer's parameters."""
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        return False
    numbers = [numbers_of(g) for g in groups]
    if numbers != [g["params"] for g in optimizer.state_dict()["param_groups"]]:
        return False
    known = [state_of(g, p.shape) for g in optimizer.param_groups for p in g["params"]]
    return set(states) <= set(range(len(known))) and all(
        isinstance(state, dict)
        and state.keys() == known[i].keys()
        and all(checkpoint.is_weight(k, v) for k, v in state.items())
        and all(tuple(v.shape) == tuple(known[i][k]) for k, v in state.items())
        for i, state in states.items()
    )


def numbers_of(group: Any) -> list[int] | None:
    """The parameters of an optimizer's group out of a file, by number; None for what is none."""
    numbers = group.get("params") if isinstance(group, dict) else None
    return numbers if isinstance(numbers, list) and all(map(whole, numbers)) else None


def source_of(init_from: str, out: Path) -> str:
    """What init_from comes to: auto is resume where there is a run, else scratch."""
    if init_from != "auto":
        return init_from
    return "resume" if listing.checkpoints(out) else "scratch"


def find_start(
    source: str,
    out: Path,
    as_set: GPTConfig,
    batch_size: int,
    tok: Tokenizer | None = None,
    whole: bool = True,
) -> Start:
    """Where the run starts from; as_set is the model that the settings describe.

    A model that is read keeps its sizes; its context may be cut, dropout is as set, and its
    vocabulary grows where `tok`, the dataset's, has more ids for conversations. whole=False leaves
    the tensors of a folder of parts where they are. Raises ValueError or OSError.
    """
    if source == "scratch":
        return Start(as_set)
    path, saved, problems = pretrained.read(source, str(out), whole)
    for problem in problems:
        say(f"passed over: {problem}")
    kept = saved.get("train_state")
    config = replace(rebuild.model_config(saved, path), dropout=as_set.dropout)
    if source == "resume" and not can_be_resumed(saved):
        raise ValueError(
            f"{path} is of no run that can be resumed; start a new one from it: --init_from={path} "
            "and another --out_dir"
        )
    if source != "resume":
        context = min(config.max_position_embeddings, as_set.max_position_embeddings)
        config = replace(config, max_position_embeddings=context)
        if tok and tok.chat and tok.words <= config.vocab_size < tok.vocab_size:
            if as_set.vocab_size < tok.vocab_size:
                raise ValueError(
                    f"vocab_size={as_set.vocab_size} is less than the dataset's {tok.vocab_size} "
                    "ids; leave --vocab_size out"
                )
            if path.suffix == listing.PARTS:
                raise ValueError(
                    f"{path} has no rows for the tokens of conversations, and is not enlarged; "
                    f"make a folder of it: python export.py --init_from={path} --to=hf "
                    "--output=FOLDER, and start from that: --init_from=hf:FOLDER"
                )
            say(
                f"model    {path} has {config.vocab_size} rows for tokens: "
                f"{as_set.vocab_size} from now on, for those of conversations"
            )
            config = replace(config, vocab_size=as_set.vocab_size)
        return Start(config, origin=source, path=path, saved=saved)
    known = {f.name for f in fields(TrainState)}
    state = TrainState(**{k: v for k, v in (kept or {}).items() if k in known})
    if saved["config"]["batch_size"] != batch_size:
        state.micro_batch = state.saving = 0  # the user knows better
    origin = saved["config"]["init_from"]
    return Start(config, state, origin, path, saved, resumed=True, scaler=saved.get("scaler"))


def can_be_resumed(saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has all that `contents` gives it, in the types that it has there."""
    state, config, optimizer = (saved.get(k) for k in ("train_state", "config", "optimizer"))
    if not (isinstance(state, dict) and isinstance(config, dict) and isinstance(optimizer, dict)):
        return False
    losses, best, run = (state.get(k) for k in ("recent_losses", "best_val_loss", "wandb_run_id"))
    counts = (
        state.get("iter_num"),
        *(state.get(k, 0) for k in ("skipped", "micro_batch", "saving")),
    )
    windows = [config.get(k, 0) for k in ("batch_size", "eval_iters", "eval_windows")]
    return (
        all(map(whole, (*counts, *windows)))
        and {"batch_size", "eval_iters"} <= config.keys()
        and isinstance(saved.get("scaler"), dict | None)
        and isinstance(losses if losses is not None else [], list)
        and all(isinstance(x, int | float) for x in losses or [])
        and isinstance(best, int | float | None)
        and isinstance(run, str | None)
        and isinstance(config.get("init_from"), str)
        and isinstance(saved.get("data"), dict)
        and isinstance(saved.get("dtype"), str)
        and not tensors_in([config, saved["data"]])
    )


def model_as_set(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> GPTConfig:
    """The model that the settings describe, its vocabulary that of a dataset's meta.json."""
    given = {f.name: settings[f.name] for f in fields(GPTConfig)}
    vocabulary = settings["vocab_size"] or -(-int(meta["vocab_size"]) // 64) * 64
    return GPTConfig(**given | {"vocab_size": vocabulary})


def other_sizes(theirs: GPTConfig, as_set: GPTConfig, typed: Container[str]) -> list[str]:
    """The sizes that were typed and are not those of a model that is there, which keeps its own."""
    names = [f.name for f in fields(GPTConfig) if f.name in typed]
    return [name for name in names if getattr(theirs, name) != getattr(as_set, name)]


def check_moments(saved: Mapping[str, Any], name: str, updates: int, path: Path) -> None:
    """Raises ValueError when the state in a checkpoint is not that of the optimizer `name`.

    updates: how many have made it, those left out aside; 0 when it is not read.
    """
    try:
        kept, groups = saved["state"], saved["param_groups"]
        if not isinstance(kept, dict) or not isinstance(groups, list):  # a tensor has a length, too
            raise TypeError
        theirs = "muon" if any("momentum" in group for group in groups) else "adamw"
        names = {i: {*state_of(group)} for group in groups for i in numbers_of(group) or []}
        fits = {i: set(m) for i, m in kept.items()} == (names if updates > 0 else {})
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        theirs, fits = name, False
    if theirs != name or not fits:
        another = f"write --optimizer={theirs}, or " if theirs != name else ""
        raise ValueError(
            f"{path} has the state of another optimizer than {name}, so it cannot be resumed with "
            f"it; {another}start a new run from it: --init_from={path} and another --out_dir"
        )


def check_same_tokenizer(saved: Mapping[str, Any], tok: Tokenizer, path: Path) -> Tokenizer:
    """The dataset's tokenizer `tok` with what a checkpoint's model states of its ids.

    Raises ValueError when the model was trained with other tokens than the dataset has, or when
    its texts end with others than the dataset's documents.
    """
    theirs = pretrained.tokenizer_of(saved, path)
    if problem := pretrained.mismatch(tok, theirs):
        raise ValueError(
            f"{path} {problem}; prepare the text with the checkpoint's tokenizer "
            "(data/prepare.py --tokenizer=..., and --eot=...)"
        )
    kept = {k: getattr(theirs, k) for k in ("ends", "bos", "pad", "stated")}
    if tok.chat:
        kept["ends"] |= {tok.chat.end}
    else:  # a model that answers, and goes on with text
        kept |= {k: getattr(theirs, k) for k in ("chat", "vocab_size")}
    if theirs.guessed:
        say(f"data     {path} states no end-of-text: it is the dataset's, {tok.shown(tok.eot)}")
        kept["ends"] = tok.ends
    return replace(tok, **kept)


def contents(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """All that a checkpoint holds; facts: what stays the same in a run."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "model_args": asdict(model.config),
        "iter_num": state.iter_num,
        "best_val_loss": state.best_val_loss,
        "train_state": asdict(state),
        **facts,
    }
