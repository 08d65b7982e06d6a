"""A model out of a checkpoint's contents."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from formats.easygpt import RENAMED_ARGS, clean_state_dict
from formats.hf import MAX_CONTEXT, MAX_TABLE
from formats.others import gpt2_refusal
from model import GPT, GPTConfig
from text.files import SHORT


def model_config(saved: dict[str, Any], path: Path) -> GPTConfig:
    """The sizes of the model in a checkpoint.

    Raises ValueError naming the fields that are missing or that this model does not have.
    """
    given: dict[Any, Any] = saved.get("model_args") or {}
    args = {RENAMED_ARGS.get(str(k), str(k)): v for k, v in given.items()}
    if not args:
        raise ValueError(f"{path} has no 'model_args': it does not tell the model's sizes")
    if {"n_layer", "n_embd"} <= args.keys():
        raise ValueError(gpt2_refusal(f"{path}, which nanoGPT wrote,"))
    if args.pop("bias", False):  # EasyGPT's name for both
        args |= {"attention_bias": True, "mlp_bias": True}
    fields = {f.name: f for f in dataclasses.fields(GPTConfig)}
    needed = {"vocab_size", "hidden_size", "num_hidden_layers"}
    problems = {"it lacks": sorted(needed - set(args)), "it has": sorted(set(args) - set(fields))}
    if any(problems.values()):
        raise ValueError(f"{path} is of another kind of model: {in_words(problems)}")
    odd = [f"{k} {SHORT.repr(v)}" for k, v in args.items() if not fits(v, fields[k].type)]
    if odd:
        raise ValueError(f"{path} has sizes that no model has: {', '.join(odd)}")
    try:
        config = GPTConfig(**args)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    # the weights do not show these, and they take memory
    positions = config.max_position_embeddings
    if positions > MAX_CONTEXT or positions * config.head_dim > MAX_TABLE:
        raise ValueError(f"{path} has a context of {positions}, which is not made room for")
    return config


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a file is of a field's type, and no number beyond all sizes."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else int) and -1 < value < 2**40


def in_words(problems: dict[str, list[str]]) -> str:
    """Several lists of names as one readable line, long ones shortened."""
    parts = []
    for words, names in problems.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            parts.append(f"{words} {', '.join(names[:4])}{more}")
    return "; ".join(parts)


def weights_of(saved: dict[str, Any], config: GPTConfig, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, once they are known to be those of a model of these sizes.

    Before any memory is taken. Raises ValueError listing every key that is missing, left over or of
    another shape.
    """
    try:
        given = clean_state_dict(saved["model"], config.tie_word_embeddings)
    except ValueError as e:
        raise ValueError(f"{path} does not fit the model: {e}") from e
    # a layer has nine tensors or more: numbers made up in model_args end here, before they cost
    if 1000 + len(given) < config.num_hidden_layers:
        raise ValueError(f"{path} has {len(given)} tensors, too few for its model_args")
    try:
        with torch.device("meta"):
            wanted = GPT(config).state_dict()
    except (RuntimeError, OverflowError) as e:
        raise ValueError(f"{path} has sizes in model_args that no memory holds") from e
    shapes = {k: (tuple(given[k].shape), tuple(wanted[k].shape)) for k in wanted if k in given}
    problems = {
        "it lacks": [k for k in wanted if k not in given],
        "it also has": [k for k in given if k not in wanted],
        "other shapes:": [f"{k} is {a}, not {b}" for k, (a, b) in shapes.items() if a != b],
    }
    if any(problems.values()):
        raise ValueError(f"{path} does not fit the model: {in_words(problems)}")
    # numbers may be shared, as a tied head's are, but not made of next to nothing
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in given.values()}
    if sum(t.nbytes for t in given.values()) > 3 * sum(stored.values()):
        raise ValueError(f"{path} repeats a few numbers as large weights: not read")
    return given


class SkipInit(TorchFunctionMode):
    """Inside it torch.nn.init does nothing: for models whose weights are loaded right after.

    Random numbers for 303M parameters take seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build(config: GPTConfig, saved: dict[str, Any], path: Path) -> GPT:
    """A model of these sizes with a checkpoint's weights, on the CPU. Raises as weights_of.

    Its vocabulary may have more rows than the checkpoint's, which begin as the mean of those.
    """
    rows = model_config(saved, path).vocab_size
    theirs = dataclasses.replace(config, vocab_size=min(rows, config.vocab_size))
    with SkipInit():
        weights, model = weights_of(saved, theirs, path), GPT(config)
    if config.vocab_size > rows:
        for key in weights.keys() & {"embed_tokens.weight", "lm_head.weight"}:
            more = weights[key].mean(0).expand(config.vocab_size - rows, -1)
            weights[key] = torch.cat((weights[key], more))
    model.load_state_dict(weights)
    return model


def check_same_model(saved: GPTConfig, config: GPTConfig, path: Path) -> None:
    """Raises ValueError listing the model settings that differ from the checkpoint's."""
    differ = [
        f"{f.name} is {getattr(config, f.name)}, there {getattr(saved, f.name)}"
        for f in dataclasses.fields(GPTConfig)
        if f.name != "dropout" and getattr(config, f.name) != getattr(saved, f.name)
    ]
    if differ:
        raise ValueError(
            f"{path} is of another model, so it cannot be resumed: {'; '.join(differ)}"
        )


def load_model(path: Path, saved: dict[str, Any]) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError as above."""
    model = build(model_config(saved, path), saved, path)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError(f"{path} has NaN or infinite weights: that run went wrong")
    return model.eval()
