"""The whole model in one file: a Llama-style GPT with RMSNorm, RoPE, GQA and SwiGLU.

Module names, state-dict keys and mathematics are those of Hugging Face's LlamaForCausalLM, so
that exporting a checkpoint only adds a prefix to its keys.

Letters used for shapes:
    B batch, T positions in this call, S positions in the key/value cache, V vocab_size,
    C hidden_size, nh num_attention_heads, nkv num_key_value_heads, hd head_dim
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02  # GPT-2's; the two projections into the residual stream get less, see GPT.__init__
IGNORE_INDEX = -1  # a target that does not count, as in nanoGPT
LOSS_CHUNK = 2**20  # float32 logits at a time in the uncompiled loss on a CPU, to stay in its cache


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults are the 303M reference model.

    Raises ValueError with every problem in one line.
    """

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
        problems = []
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be positive, not {getattr(self, name)}")
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
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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
    """Turn queries or keys by their positions. x (B, n, T, hd), cos and sin (T, hd); shape of x."""
    half = x.size(-1) // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, one tensor pair a layer.

    Each is (B, nkv, S, hd) and allocated once. `span` slots are attended to in a call.
    """

    keys: list[Tensor]
    values: list[Tensor]
    span: int = 0


class Attention(nn.Module):
    """Causal self-attention with grouped queries (arXiv 2305.13245).

    num_attention_heads = 8, num_key_value_heads = 2: four query heads share a key/value head,
    which makes the cache and the k, v projections four times smaller.

        q  0 1 2 3 4 5 6 7
           | | | | | | | |
        kv +-- 0 --+-- 1 -+
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.grouped = config.num_key_value_heads != config.num_attention_heads
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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: int = 0,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        With a cache the new keys and values are stored at `positions` (T,) and attention covers
        the cache's first `span` slots. mask (B, 1, T, span) bool, True = may look; None = causal.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nkv, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nkv, T, hd)
        q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            assert positions is not None
            cache.keys[layer].index_copy_(2, positions, k)
            cache.values[layer].index_copy_(2, positions, v)
            k = cache.keys[layer][:, :, : cache.span]
            v = cache.values[layer][:, :, : cache.span]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )  # (B, nh, T, hd)
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        bias = config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); the other arguments are Attention's."""
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, cos, sin, self.layer, cache, positions, mask)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy that keeps the logits for backward, and no float32 copy of them.

    F.cross_entropy keeps their log-probabilities in float32 and makes a gradient in float32. Here
    both exist for some rows at a time, which on a CPU is faster, too.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), targets (N,) int64 -> () float32, in nats per target that counts."""
        counts, targets = targets != IGNORE_INDEX, targets.clamp(min=0)
        ctx.rows = max(1, LOSS_CHUNK * (1 if logits.is_cpu else 64) // logits.size(1))
        lse = torch.cat([part.float().logsumexp(1) for part in logits.split(ctx.rows)])
        ctx.save_for_backward(logits, targets, counts, lse)
        losses = lse - logits.gather(1, targets[:, None])[:, 0]
        return (losses * counts).sum() / counts.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Softmax less 1 at the target, times what the loss is worth."""
        logits, targets, counts, lse = ctx.saved_tensors
        share = (counts * (grad / counts.sum()))[:, None]
        found = torch.empty_like(logits)
        for i in range(0, len(logits), ctx.rows):
            rows = slice(i, i + ctx.rows)
            part = (logits[rows].float() - lse[rows, None]).exp_().mul_(share[rows])
            found[rows] = part.scatter_add_(1, targets[rows, None], -share[rows])
        return found, None


class GPT(nn.Module):
    """Embedding, layers, final norm and head, whose weight is the embedding's unless untied."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: backward computes each block anew
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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the loss when there are targets.

        idx (B, T) int64. targets (B, T) int64, IGNORE_INDEX where nothing is to be predicted.
        With targets: logits (B, T, V), from which no gradient flows, and the mean cross-entropy in
        nats per token. Without: logits (B, 1, V) of the last position only, and None.
        Raises ValueError when T exceeds max_position_embeddings.
        """
        T, context = idx.size(1), self.config.max_position_embeddings
        if T > context:
            raise ValueError(f"{T} tokens do not fit in a context of {context}")
        x = F.dropout(self.embed_tokens(idx), self.config.dropout, self.training)
        for block in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(
                    *(block, x, self.cos[:T], self.sin[:T]),
                    use_reentrant=False,
                    preserve_rng_state=self.config.dropout > 0,  # drop the same values again
                )
            else:
                x = block(x, self.cos[:T], self.sin[:T])
        if targets is None:
            logits: Tensor = self.lm_head(self.norm(x[:, -1:]))
            return logits, None
        logits = self.lm_head(self.norm(x))
        rows, wanted = logits.view(-1, logits.size(-1)), targets.reshape(-1)
        loss: Tensor
        if torch.compiler.is_compiling():  # which makes one pass of it
            loss = F.cross_entropy(rows.float(), wanted, ignore_index=IGNORE_INDEX)
        else:
            loss = CrossEntropy.apply(rows, wanted)  # type: ignore[no-untyped-call]
        # Logits with a gradient would have a compiled backward read zeros of their size.
        return logits.detach(), loss

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` positions for `batch` rows, in the type attention runs in."""
        weight = self.embed_tokens.weight
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        c = self.config
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        empty = [
            torch.zeros(shape, dtype=dtype, device=weight.device)
            for _ in range(2 * c.num_hidden_layers)
        ]
        return KVCache(empty[::2], empty[1::2])

    def decode(
        self, idx: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, V) after the last of idx (B, T), whose places in the cache are positions (T,).

        mask is Attention's; None means that idx fills the cache from its start.
        """
        x = self.embed_tokens(idx)
        cos, sin = self.cos[positions], self.sin[positions]
        for block in self.layers:
            x = block(x, cos, sin, cache, positions, mask)
        logits: Tensor = self.lm_head(self.norm(x[:, -1]))
        return logits

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        lengths: Tensor | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,) int64, up to max_new_tokens times.

        idx (B, T) int64, T >= 1. Prompts of different lengths stand at the right, padded at the
        left (see `left_pad`); lengths (B,) counts each row's real tokens. A row that has produced
        one of stop_tokens repeats it; when all rows have, the iteration ends. Ids from vocab_size
        on (padding of the embedding) are never drawn. Settings are as in `next_token`.

        Text longer than the context goes on in a window that slides by half the context; rows of
        different lengths slide together.
        Raises ValueError for a setting out of range or an empty prompt.
        """
        B, T = idx.shape
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if T == 0 or max_new_tokens < 0:
            raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones make no text")
        device, context = idx.device, self.config.max_position_embeddings
        ids = F.pad(idx, (0, max_new_tokens))
        pad = torch.zeros_like(idx[:, 0]) if lengths is None else T - lengths.to(device)
        is_prompt = torch.arange(T, device=device) >= pad[:, None]  # (B, T)
        counts = torch.zeros(B, self.config.vocab_size, dtype=torch.int32, device=device)
        seen = counts.scatter_add_(1, idx, is_prompt.int()) > 0
        stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        cache, start = None, -1
        for n in range(T, T + max_new_tokens):
            new_start = window_start(n, context)
            if cache is None or new_start != start or not use_cache:
                start = new_start
                cache = self.new_cache(B, min(context, T + max_new_tokens - start))
                first = 0  # position in the window of the first token to compute
            else:
                first = n - 1 - start
            cache.span = n - start
            columns = torch.arange(cache.span, device=device)
            positions = columns[first:]
            mask = None
            if first > 0 or lengths is not None:
                causal = columns <= positions[:, None]  # (T, span)
                real = columns >= (pad - start)[:, None, None, None]  # (B, 1, 1, span)
                # padding looks at itself: a row that sees nothing would be NaN and spread
                mask = causal & real | (columns == positions[:, None])
            logits = self.decode(ids[:, start + first : n], positions, cache, mask)
            token = next_token(
                logits[:, :vocab_size],
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seen[:, :vocab_size],
                generator,
            )
            token = torch.where(done, ids[:, n - 1], token)
            ids[:, n] = token
            seen.scatter_(1, token[:, None], True)
            yield token
            if len(stops):
                done |= torch.isin(token, stops)
                if bool(done.all()):
                    return

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        lengths: Tensor | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """idx (B, T) followed by what `stream` yields: (B, T + new), new <= max_new_tokens."""
        tokens = self.stream(
            idx,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            stop_tokens,
            lengths,
            vocab_size,
            generator,
            use_cache,
        )
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


def window_start(length: int, context: int) -> int:
    """First token that is visible when the next of `length` tokens is predicted.

    0 while the text fits; past that the window moves by half the context at a time, so that the
    cache is rebuilt once in context/2 tokens and not at every token.
    """
    half = max(1, context // 2)
    return max(0, math.ceil((length - context) / half)) * half


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts as one (B, T) int64 tensor, each at the right of its row, and their lengths (B,)."""
    width = max(len(p) for p in prompts)
    rows = [[pad] * (width - len(p)) + list(p) for p in prompts]
    return torch.tensor(rows), torch.tensor([len(p) for p in prompts])


def check_sampling(
    temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float
) -> None:
    """Raises ValueError that lists every sampling setting out of range."""
    problems = []
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k is not None and top_k < 0:
        problems.append(f"top_k must be 0 (off) or more, not {top_k}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1 (off), not {top_p}")
    if not 0 <= min_p <= 1:
        problems.append(f"min_p must be at least 0 (off) and at most 1, not {min_p}")
    if not 0 < repetition_penalty < math.inf:
        problems.append(f"repetition_penalty must be positive, not {repetition_penalty}")
    if problems:
        raise ValueError("sampling settings: " + "; ".join(problems))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the text less likely (arXiv 1909.05858). (B, V), seen (B, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k likeliest of each row stay; the rest become -inf. (B, V) -> (B, V)."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities reach p stay (arXiv 1904.09751). (B, V) -> (B, V)."""
    ordered, order = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the likelier tokens: 0 for the first, always kept
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest stay (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row: logits (B, V) -> (B,) int64.

    In order: repetition penalty on the `seen` (B, V) tokens, temperature (0 takes the likeliest),
    top-k, top-p, min-p, one draw. 0, None and 1 switch a step off.
    """
    logits = logits.float()
    if repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    # the largest first becomes 0: a tiny temperature then gives -inf beside it, never inf - inf
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the model; a tied embedding and head count once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: GPT) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 for each weight that a token is multiplied by (every nn.Linear, the head included, the
    embedding look-up not) and 12 L nh hd T for attention scores and values, the causal half not
    discounted: the convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT.
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    c = model.config
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * c.max_position_embeddings
    return 6 * weights + 12 * attention


def configure_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on tensors of 2 or more dimensions: no norms or biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
