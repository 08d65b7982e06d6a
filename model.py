"""The whole model in one file: a Llama-style GPT with RMSNorm, RoPE, GQA and SwiGLU.

Module names, state-dict keys and mathematics are those of Hugging Face's LlamaForCausalLM, so
that exporting a checkpoint only adds a prefix to its keys.

Letters used for shapes:
    B batch, T positions in this call, S positions in the key/value cache, V vocab_size,
    C hidden_size, nh num_attention_heads, nkv num_key_value_heads, hd head_dim
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from making.attend import attend_one, past_padding, within
from making.pieces import log_sum, loss_in_pieces, slope
from making.sampling import stream

INIT_STD = 0.02  # GPT-2's; the two projections into the residual stream get less, see GPT.__init__
IGNORE_INDEX = -1  # a target that does not count, as in nanoGPT
LOSS_CHUNK, LOSS_CHUNK_GPU = 2**20, 2**26  # float32 logits at a time uncompiled; a CPU's cache


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model, by default of the 303M reference. Raises ValueError with all problems."""

    vocab_size: int = 50304  # GPT-2's 50,257 padded to a multiple of 64
    hidden_size: int = 1024
    intermediate_size: int = 2560  # of the SwiGLU MLP
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 1024  # the context, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dropout: float = 0.0
    tie_word_embeddings: bool = True  # the head's weight is the embedding's
    qk_norm: bool = False  # RMSNorm on each query and key head: Qwen3 (arXiv 2505.09388)
    attention_bias: bool = False  # of the q, k, v and o projections
    mlp_bias: bool = False  # of the MLP's three projections

    def __post_init__(self) -> None:
        sizes = [f.name for f in fields(self) if f.type in (int, float) and f.name != "dropout"]
        least = {"rope_theta": 1}  # below, the angles overflow
        problems = [
            f"{name} must be above {least.get(name, 0)} and below 2^40, not {getattr(self, name)}"
            for name in sizes
            if not least.get(name, 0) < getattr(self, name) < 2**40
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if problems:
            raise ValueError("model settings: " + "; ".join(problems))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        same = x.dtype == self.weight.dtype  # else in float32: bfloat16 has 8 bits
        wide, weight = (x, self.weight) if same else (x.float(), self.weight.float())
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (length, head_dim) float32.

    Dimension i and i + head_dim/2 turn together, Llama's "rotate half" layout of RoPE
    (arXiv 2104.09864); the angle of a pair is position / theta^(2i / head_dim).
    """
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions. x (B, T, n, hd), cos and sin (T, 1, hd); as x."""
    half = x.size(-1) // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


@dataclass
class KVCache:
    """Keys and values of the positions seen so far: for each layer a tensor (B, nkv, S, hd)."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """S, the positions that there is room for."""
        return self.keys[0].size(2)


class Positions(NamedTuple):
    """Where the tokens of a call stand: what all layers are told beside x."""

    cos: Tensor  # rotary tables of the T positions, (T, 1, hd), or (B, T, 1, hd)
    sin: Tensor
    cache: KVCache | None = None  # then the new keys and values are stored in it
    slots: Tensor | None = None  # at these of its S positions, (T,)
    mask: Tensor | None = None  # (B, 1, T, T or S) bool, True = may look; None = causal


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products with x have: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Attention(nn.Module):
    """Causal self-attention with grouped queries (arXiv 2305.13245).

    num_attention_heads = 8, num_key_value_heads = 2: four query heads share a key/value head,
    which makes the cache and the k, v projections four times smaller.

        q  0 1 2 3 4 5 6 7
           | | | | | | | |
        kv +-- 0 --+-- 1 -+
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.grouped = True  # False: key heads are copied for their queries, see choose_attention
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias)
        norm: type[nn.Module] = RMSNorm if config.qk_norm else nn.Identity  # takes any arguments
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        With a cache a prompt (T > 1) looks at itself; a single token looks at the whole cache.
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nkv, T, hd)
        cos, sin, mask, cache = at.cos, at.sin, at.mask, at.cache
        q = apply_rope(q, cos, sin).transpose(1, 2)  # (B, nh, T, hd), of q read once
        k = apply_rope(k, cos, sin).transpose(1, 2)  # (B, nkv, T, hd)
        if cache is not None and at.slots is not None:
            cache.keys[self.layer].index_copy_(2, at.slots, k)
            cache.values[self.layer].index_copy_(2, at.slots, v)
            if T == 1:
                k, v = cache.keys[self.layer], cache.values[self.layer]  # (B, nkv, S, hd)
                # The query heads that share a key head, as if they were several positions of it:
                # every fast kernel takes that, while few take grouped heads with a mask.
                q = q.view(B, k.size(1), -1, self.head_dim)  # (B, nkv, nh / nkv, hd)
        copies = q.size(1) // k.size(1)
        # no fused kernel of a GeForce card takes grouped heads with a mask
        if copies > 1 and (not self.grouped or (mask is not None and x.is_cuda)):
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        if cache is not None and B == T == 1 and x.is_cpu and torch.compiler.is_compiling():
            assert mask is not None
            y = attend_one(q, k, v, mask)
        else:
            how = {"is_causal": mask is None, "enable_gqa": q.size(1) != k.size(1)}
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, **how)
        y = y.reshape(B, -1, T, self.head_dim)  # (B, nh, T, hd), of any strides before
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(y, self.dropout) if self.training else y


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout, bias = config.dropout, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout) if self.training else x


class Block(nn.Module):
    """One layer: attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), at)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy that keeps the logits for backward, and no float32 copy of them.

    Its gradient is known: softmax less 1 at the target. Compiled, that is one loop over the logits;
    uncompiled, some rows at a time. F.cross_entropy keeps log-probabilities in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, spend: bool) -> Tensor:
        """logits (N, V), targets (N,) int64 -> () float32, in nats per target that counts.

        spend: backward writes the gradient over the logits, which nobody else reads.
        """
        counts, targets = targets != IGNORE_INDEX, targets.clamp(min=0)
        if torch.compiler.is_compiling():
            lse = log_sum(logits)[:, 0]
        else:
            ctx.rows = max(1, (LOSS_CHUNK if logits.is_cpu else LOSS_CHUNK_GPU) // logits.size(1))
            starts = range(0, len(logits), ctx.rows)
            lse = torch.cat([logits[i : i + ctx.rows].float().logsumexp(1) for i in starts])
        ctx.save_for_backward(logits, targets, counts, lse)
        ctx.spend = spend
        losses = lse - logits.gather(1, targets[:, None])[:, 0]
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Softmax less 1 at the target, times what the loss is worth."""
        logits, targets, counts, lse = ctx.saved_tensors
        share = (counts * (grad / counts.sum().clamp(min=1)))[:, None]
        if torch.compiler.is_compiling():
            return (slope(logits, lse[:, None], targets) * share).to(logits.dtype), None, None
        found = logits if ctx.spend else torch.empty_like(logits)
        for i in range(0, len(logits), ctx.rows):
            rows = slice(i, i + ctx.rows)
            part = (logits[rows].float() - lse[rows, None]).exp_().mul_(share[rows])
            found[rows] = part.scatter_add_(1, targets[rows, None], -share[rows])
        return found, None, None


class GPT(nn.Module):
    """Embedding, layers, final norm and head, whose weight is the embedding's unless untied."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: backward computes each block anew
        self.loss_pieces = 1  # more: with loss_only no more than a piece of the logits is in memory
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Every layer adds two terms to the residual stream; dividing by the root of their number
        # keeps its variance at initialisation independent of depth, as in GPT-2.
        residual_std = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=residual_std)
            elif p.dim() >= 2:
                nn.init.normal_(p, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        loss_only: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, and the loss when there are targets.

        idx (B, T) int64. targets (B, T) int64, IGNORE_INDEX where nothing is to be predicted.
        segments (B, T): tokens with different numbers do not see each other; None = all do.
        With targets: logits (B, T, V), from which no gradient flows, and the mean cross-entropy in
        nats per token. loss_only: None and the loss; the gradient of the logits then takes no
        memory of its own. Without targets: logits (B, 1, V) of the last position only, and None.
        Raises ValueError for more tokens than the context has.
        """
        T, context = idx.size(1), self.config.max_position_embeddings
        if T > context:
            raise ValueError(f"{T} tokens do not fit in a context of {context}")
        x = F.dropout(self.embed_tokens(idx), self.config.dropout, self.training)
        x = self.walk(x, Positions(self.cos[:T, None], self.sin[:T, None], mask=within(segments)))
        if targets is None:
            return self.lm_head(self.norm(x[:, -1:])), None
        x, wanted = self.norm(x), targets.reshape(-1)
        if loss_only and self.loss_pieces > 1:
            how = self.lm_head.weight, wanted, IGNORE_INDEX, self.loss_pieces
            return None, loss_in_pieces(x.to(compute_dtype(x)), *how)
        logits: Tensor = self.lm_head(x)
        loss: Tensor = CrossEntropy.apply(logits.flatten(0, 1), wanted, loss_only)  # type: ignore[no-untyped-call]
        # Logits with a gradient would have a compiled backward read zeros of their size.
        return None if loss_only else logits.detach(), loss

    def at(self, slots: Tensor, cache: KVCache | None, mask: Tensor | None) -> Positions:
        """The positions `slots`, (T,) or (B, T), for `walk`."""
        cos, sin = self.cos[slots].unsqueeze(-2), self.sin[slots].unsqueeze(-2)
        return Positions(cos, sin, cache, slots, mask)

    def walk(self, x: Tensor, at: Positions) -> Tensor:
        """Through all layers, x (B, T, C) -> (B, T, C)."""
        dtype = compute_dtype(x)
        x = x.bfloat16() if dtype == torch.bfloat16 else x  # half to move; float16 would overflow
        at = at._replace(cos=at.cos.to(dtype), sin=at.sin.to(dtype))
        for block in self.layers:
            if self.activation_checkpointing and self.training:
                again = self.config.dropout > 0  # drop the same values when computed anew
                x = checkpoint(block, x, at, use_reentrant=False, preserve_rng_state=again)
            else:
                x = block(x, at)
        return x

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` positions for `batch` rows, in the type attention runs in."""
        c, weight = self.config, self.embed_tokens.weight
        dtype = compute_dtype(weight)
        shape = (2 * c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)
        empty = [torch.zeros(shape[1:], dtype=dtype, device=weight.device) for _ in range(shape[0])]
        return KVCache(empty[::2], empty[1::2])

    def prefill(self, idx: Tensor, cache: KVCache, pad: Tensor | None = None) -> Tensor:
        """Logits (B, V) after a prompt idx (B, T), which fills the cache from its start.

        The first pad (B,) tokens of a row are padding; None = no padding anywhere.
        """
        slots = torch.arange(idx.size(1), device=idx.device)
        if len(slots) == 1:
            idx = idx.clone(memory_format=torch.contiguous_format)  # a graph is of these strides
            return self.decode(idx, slots, cache, idx.new_zeros(len(idx)))
        mask = None if pad is None else past_padding(slots, pad)
        return self.next_logits(idx, slots, cache, mask)

    def decode(self, idx: Tensor, position: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        """Logits (B, V) after one more token idx (B, 1), whose slot of the cache is position (1,).

        Attention covers the whole cache behind a mask, so that one graph serves as the text grows.
        """
        slots = torch.arange(cache.length, device=idx.device)
        mask = (slots <= position) & (slots >= pad[:, None, None, None])  # (B, 1, 1, S)
        return self.next_logits(idx, position, cache, mask)

    def next_logits(
        self, idx: Tensor, slots: Tensor, cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        """Logits (B, V) after the last of idx (B, T), whose slots of the cache are (T,)."""
        x = self.walk(self.embed_tokens(idx), self.at(slots, cache, mask))
        logits: Tensor = self.lm_head(self.norm(x[:, -1]))
        return logits

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, **settings: Any
    ) -> Tensor:
        """nanoGPT's call: idx (B, T) and the new tokens, (B, T + new), new <= max_new_tokens.

        `stream` makes them, one after the other, and has the settings, such as top_k.
        """
        tokens = stream(self, idx, max_new_tokens, temperature, **settings)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the model; a tied embedding and head count once."""
    return sum(p.numel() for p in model.parameters())
