"""The model against Hugging Face's LlamaForCausalLM, and what must hold of any causal model."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

import model as model_file
from making.sampling import left_pad, next_token, stream, window_start
from model import (
    GPT,
    IGNORE_INDEX,
    CrossEntropy,
    GPTConfig,
    RMSNorm,
    apply_rope,
    num_parameters,
    rope_tables,
)
from run.cost import flops_per_token
from run.machine import choose_attention
from run.optim import configure_optimizer

SIZES = {
    "no gqa": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, hidden_size=64),
    "gqa": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=8, hidden_size=48),
    "one kv head": dict(num_attention_heads=6, num_key_value_heads=1, head_dim=10, hidden_size=36),
    "other base": dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, hidden_size=32)
    | dict(rope_theta=500000.0, rms_norm_eps=1e-5),
    "untied": dict(tie_word_embeddings=False),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "qk norm": dict(qk_norm=True, attention_bias=True, tie_word_embeddings=False),
}


def config(**sizes):
    fixed = dict(vocab_size=131, intermediate_size=88, num_hidden_layers=3)
    return GPTConfig(**{**fixed, "max_position_embeddings": 32, **SIZES["gqa"], **sizes})


def model(seed=0, **sizes):
    """A model whose layers outweigh the tied embedding, which else repeats the last token."""
    torch.manual_seed(seed)
    m = GPT(config(**sizes)).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
            elif "proj" in name:
                p.mul_(12)
    return m


def llama(m):
    import transformers

    c = m.config
    family = "Qwen3" if c.qk_norm else "Llama"
    more = {} if c.qk_norm else {"mlp_bias": c.mlp_bias}
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=c.tie_word_embeddings,
            attention_bias=c.attention_bias,
            **more,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    names = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in m.state_dict().items()}
    theirs.load_state_dict(names)
    return theirs


def tokens(m, batch, length, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(m.config.vocab_size, (batch, length), generator=g)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [1, 7, 32])
def test_logits_and_gradients_equal_transformers(name, length):
    ours = model(**SIZES[name])
    theirs = llama(ours)
    x, y = tokens(ours, 2, length), tokens(ours, 2, length, seed=2)
    y[0, 0] = IGNORE_INDEX
    logits, loss = ours(x, y)
    their_logits = theirs(x).logits
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    loss.backward()
    F.cross_entropy(their_logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX).backward()
    their_grads = {k.removeprefix("model."): p.grad for k, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, their_grads[key], rtol=1e-4, atol=1e-5, msg=key)


def test_state_dict_keys_are_llamas():
    """They are an API: published weights carry them for ever."""
    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layer = ["input_layernorm", *attention, "post_attention_layernorm", *mlp]
    keys = ["embed_tokens.weight"]
    keys += [f"layers.{i}.{name}.weight" for i in range(3) for name in layer]
    assert sorted(model().state_dict()) == sorted([*keys, "norm.weight", "lm_head.weight"])


def test_reference_model():
    with torch.device("meta"):
        m = GPT(GPTConfig())
    assert num_parameters(m) == 303_219_712
    with torch.device("meta"):
        untied = GPT(GPTConfig(tie_word_embeddings=False))
    assert num_parameters(untied) == 303_219_712 + 50304 * 1024
    assert flops_per_token(untied) == flops_per_token(m)
    linear = 303_219_712 - 49 * 1024  # all but the norms; the embedding counts once, as the head
    assert flops_per_token(m) == 6 * linear + 12 * 24 * 16 * 64 * 1024


def test_initial_weights():
    options = dict(SIZES["biases"], qk_norm=True, tie_word_embeddings=False)
    m = GPT(config(hidden_size=256, intermediate_size=512, num_hidden_layers=8, **options))
    for name, p in m.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() < 2:
            assert (p == 1).all(), name
        else:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            wanted = 0.02 / math.sqrt(16) if deep else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
    x = tokens(m, 4, 32)
    assert m(x, x.roll(-1, 1))[1].item() == pytest.approx(math.log(131), abs=0.3)


@pytest.mark.parametrize("name", SIZES)
def test_no_position_sees_the_future(name):
    m = model(**SIZES[name])
    x = tokens(m, 1, 20)
    changed = x.clone()
    changed[0, 11] = (x[0, 11] + 1) % 131
    before, after = m(x, x)[0], m(changed, x)[0]
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=0)
    assert ((before[:, 11:] - after[:, 11:]).abs().amax(-1) > 1e-4).all()


def test_rope_depends_on_distance_only():
    cos, sin = (table[:, None] for table in rope_tables(100, 16, 10000.0))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        turned_q = apply_rope(q, cos[i : i + 1], sin[i : i + 1])
        return (turned_q * apply_rope(k, cos[j : j + 1], sin[j : j + 1])).sum().item()

    assert score(7, 3) == pytest.approx(score(96, 92), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(9, 3), abs=1e-2)
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_logits_without_targets_are_the_last_positions():
    m = model()
    x = tokens(m, 3, 9)
    last, none = m(x)
    assert none is None and last.shape == (3, 1, 131)
    torch.testing.assert_close(last, m(x, x)[0][:, -1:])


def test_a_text_longer_than_the_context_is_refused():
    m = model()
    with pytest.raises(ValueError, match="33 tokens .* 32"):
        m(tokens(m, 1, 33))


def test_overfits_one_batch():
    torch.manual_seed(0)
    m = GPT(config())
    optimizer = configure_optimizer(m, 3e-3, (0.9, 0.95), 0.0)
    x, y = tokens(m, 4, 32), tokens(m, 4, 32, seed=2)
    for _ in range(150):
        loss = m(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_weight_decay_is_for_matrices():
    m = model()
    decayed, free = configure_optimizer(m, 1e-3, (0.9, 0.95), 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}
    assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == num_parameters(m)


def test_dropout_only_in_training():
    m = model(dropout=0.5)
    x = tokens(m, 1, 16)
    assert torch.equal(m(x)[0], m(x)[0])
    m.train()
    assert not torch.equal(m(x)[0], m(x)[0])


def test_config_lists_every_problem():
    with pytest.raises(ValueError) as error:
        GPTConfig(head_dim=7, num_key_value_heads=3, vocab_size=0, dropout=1.0)
    for word in ("head_dim", "num_key_value_heads", "vocab_size", "dropout"):
        assert word in str(error.value)


# --- sampling


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [1, 5, 31, 32, 45])
def test_greedy_with_the_cache_equals_without(name, length):
    """To beyond the context, where the window slides."""
    m = model(**SIZES[name])
    x = tokens(m, 2, length)
    greedy = dict(temperature=0, repetition_penalty=1.3)
    cached = m.generate(x, 60, **greedy)
    assert cached.shape == (2, length + 60) and torch.equal(cached[:, :length], x)
    assert torch.equal(cached, m.generate(x, 60, **greedy, use_cache=False))
    assert len(set(cached[0].tolist())) > 5, "a text that repeats one token would prove nothing"


def test_the_cache_takes_what_autocast_computes():
    """A norm's float32 weight must not turn bfloat16 queries and keys into float32."""
    m = model(**SIZES["qk norm"])
    with torch.autocast("cpu", torch.bfloat16):
        assert m.generate(tokens(m, 1, 3), 3, temperature=0).shape == (1, 6)


def test_cached_greedy_equals_argmax_of_forward():
    m = model()
    x = tokens(m, 1, 4)
    ids = x
    for _ in range(28):
        ids = torch.cat((ids, m(ids)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(m.generate(x, 28, temperature=0), ids)


def test_prompts_of_different_lengths_together_equal_each_alone():
    m = model()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    ids, lengths = left_pad(prompts, pad=77)
    together = m.generate(ids, 20, temperature=0, lengths=lengths, repetition_penalty=1.2)
    for row, prompt in zip(together.tolist(), prompts, strict=True):
        alone = m.generate(torch.tensor([prompt]), 20, temperature=0, repetition_penalty=1.2)
        assert row[7 - len(prompt) :] == alone[0].tolist()


def test_stop_tokens_end_a_row_and_then_the_iteration():
    m = model()
    x = tokens(m, 2, 5)
    greedy = dict(temperature=0, repetition_penalty=1.3)
    free = m.generate(x, 20, **greedy)[:, 5:]
    stops = [free[0, 3].item(), free[1, 6].item()]
    assert stops[0] not in free[0, :3] and stops[1] not in free[1, :6], "chosen seed"
    steps = list(stream(m, x, 20, **greedy, stop_tokens=stops))
    first = [row.index(next(t for t in row if t in stops)) for row in free.tolist()]
    assert len(steps) == max(first) + 1
    rows = torch.stack(steps, 1).tolist()
    for row, end, want in zip(rows, first, free.tolist(), strict=True):
        assert row[: end + 1] == want[: end + 1] and set(row[end:]) == {want[end]}


def test_stream_yields_what_generate_returns_and_a_seed_fixes_it():
    m = model()
    x = tokens(m, 2, 5)

    def generator():
        return torch.Generator().manual_seed(3)

    whole = m.generate(x, 12, top_k=20, generator=generator())
    steps = torch.stack(list(stream(m, x, 12, top_k=20, generator=generator())), 1)
    assert torch.equal(whole[:, 5:], steps)


def test_padding_of_the_vocabulary_is_never_drawn():
    m = model()
    drawn = m.generate(tokens(m, 8, 3) % 100, 25, temperature=5.0, vocab_size=100)
    assert drawn.max() < 100
    assert m.generate(tokens(m, 8, 3), 25, temperature=5.0)[:, 3:].max() >= 100


def test_window_slides_by_half_and_always_fits():
    assert [window_start(n, 8) for n in (1, 8, 9, 12, 13)] == [0, 0, 4, 4, 8]
    for context in (1, 2, 7, 8):
        for n in range(1, 50):
            assert 0 < n - window_start(n, context) <= context


FIVE = torch.tensor([[math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]])


def shares(**settings):
    """How often each of the five tokens is drawn in 4,000 draws."""
    g = torch.Generator().manual_seed(0)
    drawn = next_token(FIVE.repeat(4000, 1), generator=g, **settings)
    return (torch.bincount(drawn, minlength=5) / 4000).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-40}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.566, 0.319, 0.080, 0.035, 0.009]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 0}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_sampling_settings(settings, expected):
    assert shares(**settings) == pytest.approx(expected, abs=0.03)
    assert [s == 0 for s in shares(**settings)] == [e == 0 for e in expected]


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "repetition_penalty"])
def test_filters_equal_transformers(name):
    from transformers import generation

    torch.manual_seed(0)
    logits, ids = torch.randn(4, 50) * 3, torch.randint(50, (4, 9))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    from making import sampling as ours

    mine, theirs = {
        "top_k": (ours.keep_top_k(logits, 7), generation.TopKLogitsWarper(7)),
        "top_p": (ours.keep_top_p(logits, 0.8), generation.TopPLogitsWarper(0.8)),
        "min_p": (ours.keep_min_p(logits, 0.1), generation.MinPLogitsWarper(0.1)),
        "repetition_penalty": (
            ours.penalize(logits, seen, 1.3),
            generation.RepetitionPenaltyLogitsProcessor(1.3),
        ),
    }[name]
    torch.testing.assert_close(mine, theirs(ids, logits.clone()))
    assert not torch.equal(mine, logits)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -5},
        {"top_p": 0.0},
        {"top_p": 2.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_sampling_settings_out_of_range(bad):
    m = model()
    with pytest.raises(ValueError, match=next(iter(bad))):
        m.generate(tokens(m, 1, 3), 5, **bad)


def test_an_empty_prompt_is_refused():
    m = model()
    with pytest.raises(ValueError, match="0 tokens"):
        m.generate(torch.zeros(1, 0, dtype=torch.int64), 5)


def rows_of_logits(dtype):
    """Logits, targets of which some do not count, torch's loss of them and 3 times its gradient."""
    logits = (5 * torch.randn(40, 131)).to(dtype).requires_grad_()
    targets = torch.randint(0, 131, (40,))
    targets[::3] = IGNORE_INDEX
    plain = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX)
    return logits, targets, plain, torch.autograd.grad(3 * plain, logits)[0]


ONE_BIT = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_plain_one(dtype):
    """By inductor itself: value and gradient, with targets that do not count."""
    logits, targets, plain, expected = rows_of_logits(dtype)
    for spend in (False, True):
        ours = torch.compile(CrossEntropy.apply, fullgraph=True)(logits, targets, spend)
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(plain.item(), rel=1e-6)
        found = torch.autograd.grad(3 * ours, logits)[0]
        torch.testing.assert_close(found, expected, rtol=ONE_BIT[dtype], atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 131 * 7, 2**22])
def test_the_uncompiled_loss_is_the_plain_one(monkeypatch, chunk, dtype):
    """Value and gradient, whatever the number of rows at a time, with targets that do not count."""
    monkeypatch.setattr(model_file, "LOSS_CHUNK", chunk)
    logits, targets, plain, expected = rows_of_logits(dtype)
    for spend in (False, True):
        ours = CrossEntropy.apply(logits, targets, spend)
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(plain.item(), rel=1e-6)
        found = torch.autograd.grad(3 * ours, logits, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, rtol=ONE_BIT[dtype], atol=1e-8)
        assert (found.data_ptr() == logits.data_ptr()) == spend
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.backward()  # once more: what it needs is gone, and it says so


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_pieces_is_the_loss(compiled, dtype):
    """Value and gradients, of pieces that are not of one size; some targets do not count."""
    found = []
    for pieces in (1, 3):
        torch._dynamo.reset()
        torch.manual_seed(0)
        m, idx = model(), torch.randint(0, 131, (2, 16))
        targets = idx.masked_fill(idx % 3 == 0, IGNORE_INDEX)
        m.loss_pieces = pieces
        if compiled:
            m.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                alone = m(idx, targets, loss_only=True)[1]
            loss = m(idx, targets, loss_only=True)[1]
        (3 * loss).backward()
        found.append([alone, loss.detach(), *(p.grad for p in m.parameters())])
    torch._dynamo.reset()
    rate = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= rate * a.norm()


def test_the_loss_alone_is_the_same_loss_with_the_same_gradients():
    m, idx = model(), torch.randint(0, 131, (2, 16))
    (logits, loss), (nothing, alone) = m(idx, idx), m(idx, idx, loss_only=True)
    assert logits.shape == (2, 16, 131) and nothing is None and torch.equal(alone, loss)
    for a, b in zip(*(torch.autograd.grad(x, m.parameters()) for x in (loss, alone)), strict=True):
        assert torch.equal(a, b)


def saved_bytes(m, idx):
    """Bytes that autograd keeps between forward and backward, weights aside."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in m.parameters()}

    def note(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = m(idx, idx)[1]
    return sum(kept.values()), loss


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_keeps_less_and_computes_the_same(dropout):
    """Losses and gradients equal to the bit, dropout included; most of what blocks keep is gone."""
    m, idx = model(dropout=dropout).train(), torch.randint(0, 131, (4, 32))
    bytes_kept, losses, gradients = [], [], []
    for m.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        m.zero_grad()
        kept, loss = saved_bytes(m, idx)
        loss.backward()
        bytes_kept.append(kept)
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in m.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert bytes_kept[1] < 0.4 * bytes_kept[0], bytes_kept


def test_activation_checkpointing_in_a_compiled_graph():
    """It stays one graph, whose losses are the plain model's."""
    m, idx = model().train(), torch.randint(0, 131, (4, 32))
    plain = m(idx, idx)[1]
    m.activation_checkpointing = True
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    loss = compiled(idx, idx)[1]
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize("shares", [True, False])
def test_attention_copies_key_heads_only_where_no_fast_kernel_shares_them(monkeypatch, shares):
    """As on CUDA in float32; the result is the same either way."""
    m = model(**SIZES["gqa"]).eval()
    assert choose_attention(m, torch.float32) == "flash"  # torch's on a CPU
    idx = tokens(m, 2, 9)
    before = m(idx, idx)[1]

    def chosen(q, k, v, mask, dropout, causal, enable_gqa):
        assert k.size(1) == (q.size(1) // 4 if enable_gqa else q.size(1))
        return SDPBackend.EFFICIENT_ATTENTION.value if shares or not enable_gqa else 0

    monkeypatch.setattr(torch, "_fused_sdp_choice", chosen)
    assert choose_attention(m, torch.float32) == "efficient"
    seen = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: (seen.append(k.size(1)), real(q, k, v, **more))[1],
    )
    torch.testing.assert_close(m(idx, idx)[1], before)
    assert set(seen) == {2 if shares else 8}


@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        (None, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # which could overflow
    ],
)
def test_the_residual_stream_under_autocast(dtype, stream):
    m = model()
    seen = []
    for block in m.layers:
        block.register_forward_hook(lambda block, given, out: seen.extend((given[0], out)))
    x = torch.randint(0, 100, (2, 8))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = m(x, x)[1]
    assert {t.dtype for t in seen} == {stream} and loss.dtype == torch.float32


def test_a_norm_computes_in_float32():
    """A weight of 1 + 1/512 is none of bfloat16's numbers: rounded first, it would be 1."""
    norm = RMSNorm(64, 1e-6)
    norm.weight.data.fill_(1 + 1 / 512)
    torch.manual_seed(0)
    x = torch.randn(1000, 64).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + 1 / 512)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact) / exact).abs().max() < 2**-8
    shift = ((out.double() - exact) * exact.sign()).mean() / exact.abs().mean()
    assert abs(shift) < 1 / 4096, "unbiased"
