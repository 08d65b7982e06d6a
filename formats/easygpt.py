"""The original EasyGPT's files, and what torch.compile, DDP and nanoGPT make of names."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig

PREFIXES = ("_orig_mod.", "module.", "model.")  # of torch.compile, DDP and Hugging Face
RENAMED_KEYS = {"post_attetion_layernorm": "post_attention_layernorm"}  # EasyGPT's files
RENAMED_ARGS = {"norm_eps": "rms_norm_eps"}


def clean_state_dict(state_dict: dict[str, Tensor], tied: bool = True) -> dict[str, Tensor]:
    """Our key names for a state dict saved by EasyGPT, through torch.compile, DDP or both.

    tied: whether the model's head is its embedding. Raises ValueError when the two then differ.
    """
    clean = {}
    for key, value in state_dict.items():
        while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
            key = key[len(prefix) :]
        for old, new in RENAMED_KEYS.items():
            key = key.replace(old, new)
        if not key.endswith("rotary_emb.inv_freq"):
            clean[key] = value
    if tied and "embed_tokens.weight" in clean:
        table = clean["embed_tokens.weight"]
        head = clean.setdefault("lm_head.weight", table)
        # one memory is one tensor; NaN equals nothing, itself included
        if head.data_ptr() != table.data_ptr() and not torch.equal(head, table):
            raise ValueError("its lm_head and embed_tokens differ (tie_word_embeddings=False?)")
    return clean


def written(
    weights: dict[str, Tensor], config: GPTConfig, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and model_args that EasyGPT's own model.py loads, misspelt key and buffers too.

    weights: without a tied head. Raises ValueError for a model that it cannot represent.
    """
    c, problems = config, []
    if not c.tie_word_embeddings:
        problems.append("an untied head")
    if c.qk_norm:
        problems.append("qk_norm")
    if c.attention_bias != c.mlp_bias:
        problems.append("biases in attention or MLP only")
    if c.num_attention_heads * c.head_dim != c.hidden_size:
        problems.append("heads that do not add up to hidden_size")
    if problems:
        raise ValueError(f"EasyGPT's model does not have {', '.join(problems)}")
    model = {}
    for key, value in weights.items():
        for theirs, ours in RENAMED_KEYS.items():
            key = key.replace(ours, theirs)
        model[key] = value.to(dtype)
    model["lm_head.weight"] = model["embed_tokens.weight"]
    even = torch.arange(0, c.head_dim, 2, dtype=torch.int64).float()
    for layer in range(c.num_hidden_layers):
        key = f"layers.{layer}.self_attn.rotary_emb.inv_freq"
        model[key] = 1.0 / (c.rope_theta ** (even / c.head_dim))
    args = asdict(c)
    for name in ("tie_word_embeddings", "qk_norm", "mlp_bias"):
        del args[name]
    args["bias"], args["norm_eps"] = args.pop("attention_bias"), args.pop("rms_norm_eps")
    return model, args
