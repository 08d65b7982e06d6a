"""What makes sampling quick, against the plain way: one graph, int8 weights, no waits."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from making import compiled
from making.compiled import FEW_ROWS, compile_decode, for_few_rows
from making.int8 import Int8Linear, quantize
from making.sampling import cache_length, left_pad, stream
from model import GPT, GPTConfig
from run import compiling

SIZE = GPTConfig(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)


def model(**fields):
    torch.manual_seed(0)
    m = GPT(GPTConfig(**{**vars(SIZE), **fields})).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "proj" in name:
                p.mul_(12)
    return m


def prompt(length, batch=1):
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_however_long_the_text_grows(fresh):
    """Prompts of one length and another, past positions 64 and 128, padded or not, new windows."""
    counter = CompileCounter()
    m = model(max_position_embeddings=256)
    plain = m.generate(prompt(5, 2), 300, temperature=0)
    m.decode = torch.compile(m.decode, backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(m.generate(prompt(5, 2), 300, temperature=0), plain)
    assert counter.frame_count == 1
    m.generate(prompt(60, 2), 150, top_k=5)
    m.generate(prompt(1, 2), 200)
    ids, lengths = left_pad([[1], [2, 3, 4]])
    m.generate(ids, 200, lengths=lengths)
    assert counter.frame_count == 1, "recompiled"
    m.generate(prompt(5, 2), 90)
    assert counter.frame_count == 2, "a short text has a short cache"


def test_cache_lengths_are_few():
    assert {cache_length(n, 1024) for n in range(1, 5000)} == {128, 192, 256, 384, 512, 768, 1024}
    assert all(cache_length(n, 100) == 100 for n in (1, 99, 101))
    assert all(cache_length(n, 1024) >= n for n in range(1, 1025))


@pytest.mark.skipif(compiling.why_not_compile(torch.device("cpu")) != "", reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_compiled_text_equals_plain_text(fresh, kind):
    """By inductor itself, with the layers that sample.py takes: logits, and the text in float32."""
    plain, m = model(num_hidden_layers=1), model(num_hidden_layers=1)
    for one in (plain, m):
        if kind == "int8":
            quantize(one)
        one.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    for_few_rows(m)
    assert compile_decode(m, 100) == ""
    if kind == "float32":
        assert torch.equal(
            m.generate(prompt(7), 100, temperature=0), plain.generate(prompt(7), 100, temperature=0)
        )
    logits = []
    for one in (m, plain):
        with torch.no_grad():
            cache = one.new_cache(1, 128)
            one.prefill(prompt(7), cache)
            where = torch.tensor([7]), cache, torch.tensor([0])
            logits.append(one.decode(torch.tensor([[3]]), *where).float())
    near = 1e-5 if kind == "float32" else 0.02 * logits[1].std().item()
    torch.testing.assert_close(*logits, rtol=1e-5, atol=near)


def test_compiled_texts_in_turn_of_two_models_and_of_other_sizes(fresh, monkeypatch):
    """Only the next token of the same text goes without a look at what the graph was made for."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, **_: real(f, backend="aot_eager", dynamic=dynamic)
    )
    models = [model(), model(rms_norm_eps=0.3)]  # a number in the graph
    x = prompt(7)
    plain = [[m.generate(x, n, temperature=0) for m in models] for n in (20, 200)]
    assert not torch.equal(*plain[0])
    batch = models[0].generate(prompt(7, 2), 20, temperature=0)
    for m in models:
        for_few_rows(m)
        assert compile_decode(m, 27) == ""
    skips, stance = [], torch.compiler.set_stance
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda **given: skips.append(given) or stance(**given)
    )
    in_turn = zip(*(stream(m, x, 20, temperature=0) for m in models), strict=True)
    made = torch.tensor([[int(a), int(b)] for a, b in in_turn])
    assert len(skips) == 2 * 18, "of 20 tokens one is the prompt's, and one has the guards"
    for i, m in enumerate(models):
        assert made[:, i].tolist() == plain[0][i][0, 7:].tolist()
        assert torch.equal(m.generate(x, 200, temperature=0), plain[1][i])
    assert torch.equal(models[0].generate(prompt(7, 2), 20, temperature=0), batch)


def test_more_graphs_than_torch_keeps_by_itself(fresh, monkeypatch):
    """Torch's own 8 would end the ninth in an error."""
    real, counter = torch.compile, CompileCounter()

    def counted(f, options, **rest):
        return real(f, backend=counter, **rest)

    monkeypatch.setattr(torch, "compile", counted)
    m = model()
    sizes = sorted({cache_length(n, 512) for n in range(1, 600)})
    for size in sizes:
        assert compile_decode(m, size) == ""
    x = prompt(7, 2)
    for size in sizes:
        m.generate(x, size - 7, temperature=0)
    assert len(sizes) == 5 and counter.frame_count == 10


def test_past_the_limit_the_model_is_as_before(fresh, monkeypatch):
    real = torch.compile

    def plainly(f, options, **rest):
        return real(f, backend="eager", **rest)

    monkeypatch.setattr(torch, "compile", plainly)
    monkeypatch.setattr(compiled, "GRAPHS", 2)
    m, plain = model(), model()
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [compile_decode(m, length) for length in (128, 192)] == ["", ""]
        assert "limit" in compile_decode(m, 256).lower()
    x = prompt(7)
    assert torch.equal(m.generate(x, 40, temperature=0), plain.generate(x, 40, temperature=0))
    assert m.decode.__func__ is GPT.decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_multiplied_in_another_order_to_the_same_end(fresh, bias, dtype):
    """Products and gradients, whatever the number of rows; compiled, too."""
    plain = torch.nn.Linear(96, 40, bias=bias, dtype=dtype)
    exact = dtype == torch.float32
    near = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 0.02, "atol": 0.02}
    quick = copy.deepcopy(plain)
    for_few_rows(quick)
    assert quick.weight is not plain.weight and type(quick) is not type(plain)
    compiled = torch.compile(quick, backend="aot_eager", dynamic=False)
    for shape in ((96,), (1, 96), (2, 1, 96), (FEW_ROWS, 96), (FEW_ROWS + 1, 96)):
        x = torch.randn(shape, dtype=dtype)
        for layer in (quick, compiled):
            torch.testing.assert_close(layer(x), plain(x), **near)
        a, b = (torch.autograd.grad(m(x).square().sum(), m.weight)[0] for m in (quick, plain))
        # in bfloat16 y is rounded before its bias is added, too, and then squared
        atol = 1e-5 if exact else 0.02 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=near["rtol"], atol=atol)


@pytest.mark.parametrize("outputs", [1, 3, 6])
def test_one_row_of_few_outputs(fresh, outputs):
    """Compiled, the weight is read in four parts; here they are fewer, or of different sizes."""
    for plain in (torch.nn.Linear(96, outputs), Int8Linear(torch.nn.Linear(96, outputs))):
        quick, x = copy.deepcopy(plain), torch.randn(1, 96).bfloat16().float()
        for_few_rows(torch.nn.ModuleList([quick]))
        compiled = torch.compile(quick, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), plain(x), rtol=2**-8, atol=1e-2)


def test_a_model_for_few_rows_makes_the_same_text():
    m, other = model(), model()
    for_few_rows(other)
    assert torch.nn.Linear not in {type(c) for c in other.modules()}
    assert other.state_dict().keys() == m.state_dict().keys()
    assert other.lm_head.weight is other.embed_tokens.weight
    x = prompt(7, 3)
    assert torch.equal(m.generate(x, 60, temperature=0), other.generate(x, 60, temperature=0))


def test_a_compiler_that_fails_leaves_the_model_as_it_was(fresh, monkeypatch):
    def broken(*args, **kwargs):
        def call(*args):
            raise RuntimeError("no\nwork today")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    m = model()
    assert compile_decode(m, 100) == "RuntimeError: no"
    assert m.generate(prompt(3), 4).shape == (1, 7)


def test_int8_weights_are_within_half_a_level_and_products_near():
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[5] *= 1000
    packed = Int8Linear(linear)
    back = packed.weight.float() * packed.scale.float()[:, None]
    levels = linear.weight.abs().amax(1, keepdim=True) / 127
    # half a level from rounding, and 127 times the error of a scale in bfloat16 at the largest
    assert ((back - linear.weight).abs() <= levels * (0.51 + 127 * 2**-9)).all()
    assert packed.weight.dtype == torch.int8
    x = torch.randn(2, 35, 96)  # a prompt: nothing is rounded but the weight
    torch.testing.assert_close(packed(x), F.linear(x, back, linear.bias), rtol=1e-5, atol=1e-3)
    for shape in ((96,), (1, 96), (2, 3, 96), (63, 96)):
        x = torch.randn(shape)
        y = packed(x)
        assert y.dtype == torch.float32 and y.shape == (*shape[:-1], 40)
        want = F.linear(x.bfloat16().float(), back, linear.bias)
        torch.testing.assert_close(y, want, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("inputs", [8, 40, 100])
def test_int8_of_inputs_that_the_kernel_does_not_divide(inputs):
    """It reads past the end of the weight there: a crash, if one is lucky."""
    packed = Int8Linear(torch.nn.Linear(inputs, 24))
    back = packed.weight.float() * packed.scale.float()[:, None]
    for shape in ((inputs,), (3, inputs), (70, inputs)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), F.linear(x, back, packed.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["untied", "biases", "tied"])
def test_int8_logits_are_near(kind):
    """Within 6% of the spread of the logits, root mean square, where bfloat16 has 3%."""
    fields = {"untied": {"tie_word_embeddings": False}, "tied": {}}
    fields["biases"] = {"attention_bias": True, "mlp_bias": True}
    m, x = model(**fields[kind]), prompt(40, 3)

    def last_logits(one):
        with torch.no_grad():
            return one.prefill(x, one.new_cache(3, 64)).float()

    want = last_logits(m)
    half, int8 = model(**fields[kind]).bfloat16(), model(**fields[kind])
    quantize(int8)
    int8.bfloat16()  # both roundings at once
    kinds = {type(c) for c in int8.modules()}
    assert Int8Linear in kinds and torch.nn.Linear not in kinds
    errors = [((last_logits(o) - want).std() / want.std()).item() for o in (half, int8)]
    assert 0 < errors[0] < 0.03 and errors[1] < 0.06, errors
    assert int8.generate(x, 30).shape == (3, 70)


def test_a_token_waits_for_the_device_only_with_stop_tokens(waits):
    m, settings = model(), dict(top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    m.generate(prompt(5, 2), 20, **settings)
    assert not waits
    assert len(list(stream(m, prompt(5, 2), 20, stop_tokens=[130], temperature=0))) == 20
    assert len(waits) == 20
