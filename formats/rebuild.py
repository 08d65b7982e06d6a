"""A model out of a checkpoint's contents."""

import dataclasses
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from formats.easygpt import RENAMED_ARGS, clean_state_dict
from formats.others import gpt2_refusal
from model import GPT, GPTConfig


def model_config(saved: dict[str, Any], path: Path) -> GPTConfig:
    """The sizes of the model in a checkpoint.

    Raises ValueError naming the fields that are missing or that this model does not have.
    """
    given: dict[str, Any] = saved.get("model_args") or {}
    args = {RENAMED_ARGS.get(k, k): v for k, v in given.items()}
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
    return GPTConfig(**args)


def in_words(problems: dict[str, list[str]]) -> str:
    """Several lists of names as one readable line, long ones shortened."""
    parts = []
    for words, names in problems.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            parts.append(f"{words} {', '.join(names[:4])}{more}")
    return "; ".join(parts)


def load_weights(model: GPT, saved: dict[str, Any], path: Path) -> None:
    """Copy a checkpoint's weights into the model.

    Raises ValueError listing every key that is missing, left over or of another shape.
    """
    try:
        given = clean_state_dict(saved["model"], model.config.tie_word_embeddings)
    except ValueError as e:
        raise ValueError(f"{path} does not fit the model: {e}") from e
    wanted = model.state_dict()
    shapes = {k: (tuple(given[k].shape), tuple(wanted[k].shape)) for k in wanted if k in given}
    problems = {
        "it lacks": [k for k in wanted if k not in given],
        "it also has": [k for k in given if k not in wanted],
        "other shapes:": [f"{k} is {a}, not {b}" for k, (a, b) in shapes.items() if a != b],
    }
    if any(problems.values()):
        raise ValueError(f"{path} does not fit the model: {in_words(problems)}")
    model.load_state_dict(given)


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
    """A model of these sizes with a checkpoint's weights, on the CPU. Raises as load_weights."""
    with SkipInit():
        model = GPT(config)
    load_weights(model, saved, path)
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
