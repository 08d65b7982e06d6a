"""The models that are compared, of one shape: ours, transformers' Llama, other model.py files."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.settings import LITGPT
from formats import hf
from model import GPT, GPTConfig

Loss = Callable[[Any, Tensor, Tensor], Any]  # of a network, inputs and targets (B, T)

# What other projects call our settings.
NANOGPT = {
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "norm_eps": "rms_norm_eps",
}


class Shape(NamedTuple):
    """Of a model, and of the batches that it is trained on."""

    layers: int
    hidden: int
    batch: int  # windows in a step
    context: int  # tokens in a window

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context

    @property
    def config(self) -> GPTConfig:
        """Ours: heads of 64, a third as many for keys and values, GPT-2's vocabulary."""
        heads = self.hidden // 64
        return GPTConfig(
            vocab_size=50304,
            hidden_size=self.hidden,
            intermediate_size=5 * self.hidden // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=next(n for n in (heads // 3, heads // 4, 1) if n and not heads % n),
            max_position_embeddings=self.context,
        )


def build(name: str, config: GPTConfig) -> tuple[Any, Loss]:
    """A model with random weights by its name (ours, transformers, or a peer's file), and its loss.

    Raises ValueError or OSError for a file that is no model.py.
    """
    torch.manual_seed(0)
    if name == "ours":
        return GPT(config), lambda net, x, y: net(x, y, loss_only=True)[1]
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM  # few have it, and it takes seconds

        settings = hf.config_json(config, torch.float32, {}) | {"attn_implementation": "sdpa"}
        llama = LlamaForCausalLM(LlamaConfig(**settings))
        return llama, lambda net, x, y: net(input_ids=x, labels=x, use_cache=False).loss
    if name == LITGPT:
        return litgpt(config), lambda net, x, y: F.cross_entropy(net(x).flatten(0, 1), y.flatten())
    peer = load_peer(name)
    ours = dataclasses.asdict(config)
    known = {f.name: NANOGPT.get(f.name, f.name) for f in dataclasses.fields(peer.GPTConfig)}
    given = {theirs: ours[field] for theirs, field in known.items() if field in ours}
    if "bias" in known:
        given["bias"] = False
    return peer.GPT(peer.GPTConfig(**given)), lambda net, x, y: net(x, y)[1]


def litgpt(config: GPTConfig) -> Any:
    """The package's model of our shape. Raises ValueError where it is not installed."""
    try:
        from litgpt.config import Config
        from litgpt.model import GPT as LitGPT
    except ImportError as e:
        raise ValueError(f"peer=litgpt: {e}; pip install litgpt") from e
    sizes = Config(
        block_size=config.max_position_embeddings,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=config.rms_norm_eps,
        parallel_residual=False,
        n_head=config.num_attention_heads,
        head_size=config.head_dim,
        n_query_groups=config.num_key_value_heads,
        rope_base=int(config.rope_theta),
        rotary_percentage=1.0,
        intermediate_size=config.intermediate_size,
        mlp_class_name="LLaMAMLP",
        bias=False,
    )
    net = LitGPT(sizes)
    net.lm_head.weight = net.transformer.wte.weight  # tied, as ours
    return net


def load_peer(path: str) -> ModuleType:
    """Another project's model.py as a module."""
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"peer must be the path of a model.py, not {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and dataclasses.is_dataclass(getattr(module, "GPTConfig", 0))):
        raise ValueError(f"peer={path} has no GPT with a GPTConfig, as nanoGPT's model.py has")
    return module


def loud_model(config: GPTConfig, factor: float) -> GPT:
    """Our model with random weights so large that its text is not one token for ever."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(factor)
    return model


def linear_bytes(model: Any) -> int:
    """Bytes of the weights that a token is multiplied by, whatever the layers are called."""
    weights = {id(m.weight): m.weight for m in model.modules() if "Linear" in type(m).__name__}
    return sum(w.numel() * w.element_size() for w in weights.values())
