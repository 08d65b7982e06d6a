"""Device, batches, attention's kernels, and the model's numbers against those of a CPU."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from making import scoring
from model import GPT, IGNORE_INDEX, GPTConfig
from run import cards, int8, machine
from run.copies import Copies
from run.machine import choose_attention
from text.batches import TrainLoader, TrainOrder, host_tensor
from text.tokens import TokenData

pytestmark = pytest.mark.gpu

FAST = [  # what needs no T x T scores in memory
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
HEADS = [(16, 4), (4, 4), (4, 1)]
TYPES = [torch.bfloat16, torch.float32]


def size(heads, key_heads, **fields):
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 128}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    return GPTConfig(**sizes | fields)


def ready(where, dtype, heads, key_heads):
    """A model as sample.py has it: its weights in the type that they are used in."""
    torch.manual_seed(0)
    model = GPT(size(heads, key_heads)).eval().to(where, dtype)
    choose_attention(model, dtype)
    return model


# ---------------------------------------------------------------- device and batches


def test_a_device_has_its_number(where):
    """`cuda` without one: torch.cuda.set_device refused it in the thread that reads batches."""
    names = ("auto", "cuda", "cuda:0") if where.type == "cuda" else ("auto", "cpu")
    for name in names:
        assert machine.select_device(name) == where, name


def test_batches_are_those_of_a_cpu(where, dataset):
    """Many are on their way at once; memory that is used again too early would mix them up."""
    data = TokenData(dataset, "train", 64, 257)
    order = TrainOrder(data.tokens, 64, 64 * 12, 1337)
    chosen = machine.select_device(where.type)

    def batches(device):
        loader = TrainLoader(data, order, 0, 1, device)
        steps = [loader.batch(step, micro, 4) for step in range(30) for micro in range(3)]
        return torch.stack([torch.stack(pair) for pair in steps])

    mine = batches(chosen)
    assert mine.device == where and len(mine.unique(dim=0)) == len(mine)
    assert torch.equal(mine.cpu(), batches(torch.device("cpu")))


def test_batches_leave_from_pinned_memory(only_cuda, where):
    """What is not pinned is copied with a wait for the GPU."""
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert host_tensor(rows, where).is_pinned()


def test_a_card_is_described(where):
    """A name that nobody has thought of must not stop a run."""
    assert where.type != "cuda" or "GiB" in machine.describe(where)
    peak = cards.peak_flops(where, torch.bfloat16)
    assert peak is None or 1e13 < peak < 1e16
    if where.type == "cuda" and "H100" in torch.cuda.get_device_name(where):
        assert peak and peak > 7e14, "the card that is rented most often"


def test_out_of_memory_is_recognised(where):
    """By whatever error: of a card with no room, inside the compiler's, of cuBLAS."""
    with pytest.raises(RuntimeError) as short:
        torch.empty(2**40 if where.type == "cuda" else 2**60, dtype=torch.uint8, device=where)
    outer = RuntimeError("backend='inductor' raised")
    outer.inner_exception = short.value
    for e in (short.value, outer, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")):
        assert machine.is_oom(e)
    for e in (ValueError("out of range"), RuntimeError("CUDA error: device-side assert triggered")):
        assert not machine.is_oom(e)


# ---------------------------------------------------------------- attention


@pytest.fixture
def key_heads(monkeypatch):
    """The number of key heads in each call of attention."""
    found, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, **how):
        found.append(k.size(1))
        return real(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return found


def test_training_runs_flash_attention_without_copies_of_heads(where, key_heads):
    """Else the reference trains at half its speed, and with three times the keys in memory."""
    if where.type == "cuda" and torch.cuda.get_device_capability(where) < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    model = GPT(size(16, 4)).to(where)
    assert choose_attention(model, torch.bfloat16) == "flash"
    x = torch.randint(320, (2, 128), device=where)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), machine.autocast(where, torch.bfloat16):
        model(x, x, loss_only=True)[1].backward()
    assert key_heads == [4, 4]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "few"), HEADS)
def test_a_padded_prompt_and_its_tokens_need_no_score_matrix(where, dtype, heads, few):
    """With a mask and grouped heads torch falls to plain products in silence, or has no kernel."""
    model = ready(where, dtype, heads, few)
    x = torch.randint(320, (3, 21), device=where)
    pad = torch.tensor([0, 5, 20], device=where)
    more = torch.randint(320, (3, 1), device=where)

    @torch.no_grad()
    def logits(rows, pad):
        """After the prompt, and after one more token."""
        cache = model.new_cache(len(rows), 64)
        first = model.prefill(rows[:, :-1], cache, pad)
        position = torch.tensor([rows.size(1) - 1], device=where)
        known = rows.new_zeros(len(rows)) if pad is None else pad
        return torch.stack([first, model.decode(rows[:, -1:], position, cache, known)])

    rows = torch.cat((x, more), 1)
    with sdpa_kernel(FAST):
        found = logits(rows, pad)
    with sdpa_kernel(SDPBackend.MATH):
        alone = [logits(row[None, n:], None) for row, n in zip(rows, pad.tolist(), strict=True)]
    error = (found - torch.cat(alone, 1)).float().norm() / found.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "few"), HEADS)
def test_conversations_that_share_a_window_need_no_score_matrix(where, dtype, heads, few):
    """Forward and backward in training, and the gradient of conversations apart."""
    model = ready(where, torch.float32, heads, few).train()
    choose_attention(model, dtype)
    x = torch.randint(320, (2, 97), device=where)
    segments = (torch.arange(96, device=where) // 32).expand(2, 96)

    def gradient(kernels, rows, numbers):
        model.zero_grad()
        with sdpa_kernel(kernels), machine.autocast(where, dtype):
            model(rows[:, :-1], rows[:, 1:], numbers, loss_only=True)[1].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    found = gradient(FAST, x, segments)
    apart = torch.cat([x[:, i : i + 33] for i in (0, 32, 64)])
    wanted = gradient(SDPBackend.MATH, apart, None)
    error = (found - wanted).norm() / wanted.norm()
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "few"), HEADS)
def test_questions_with_several_answers_need_no_score_matrix(where, dtype, heads, few):
    """The same for the mask of HellaSwag's endings, which do not see each other."""
    model = ready(where, torch.float32, heads, few)
    choose_attention(model, dtype)
    ids = np.random.default_rng(0).integers(0, 320, 60)
    together = [scoring.Question(ids[:20], [ids[20:29], ids[29:33], ids[33:60]])]
    apart = [scoring.Question(together[0].context, [answer]) for answer in together[0].answers]

    def score(questions):
        with machine.autocast(where, dtype):
            return [s.loglikelihood for q in scoring.score(model, questions, 320, 512) for s in q]

    with sdpa_kernel(FAST):
        found = score(together)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = score(apart)
    assert found == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 5e-3)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("heads", "few"), [(4, 4), (4, 2)])
def test_loss_and_gradients_are_those_of_a_cpu(where, heads, few):
    """In float32 with all its bits: a kernel that is wrong on a GPU shows here."""
    torch.manual_seed(0)
    model = GPT(size(heads, few, qk_norm=True))
    x = torch.randint(320, (4, 128))
    y = torch.where(torch.rand(4, 128) < 0.1, IGNORE_INDEX, x.roll(-1, 1))

    def numbers(device):
        there = copy.deepcopy(model).to(device)
        choose_attention(there, torch.float32)
        loss = there(x.to(device), y.to(device), loss_only=True)[1]
        loss.backward()
        return {"loss": loss.detach().cpu()} | {
            name: p.grad.cpu() for name, p in there.named_parameters()
        }

    mine, theirs = numbers(where), numbers("cpu")
    for name, number in theirs.items():
        assert number.norm() > 0
        assert (mine[name] - number).norm() < 1e-4 * number.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_with_copies_of_the_weights_have_the_same_bits(where, dtype):
    """Of two micro-steps. Plain attention and no atomic sums, but for the embedding's own."""
    torch.manual_seed(0)
    model = GPT(size(4, 2, qk_norm=True)).to(where)
    ids = torch.randint(320, (2, 4, 128)).to(where)

    def gradients(copied):
        there = copy.deepcopy(model)
        copies = Copies(there, dtype)
        if copied:
            copies.lend()
        for x in ids:
            with sdpa_kernel(SDPBackend.MATH), machine.autocast(where, dtype):
                loss = there(x, x, loss_only=True)[1]
            loss.backward()
        assert (there.layers[0].mlp.up_proj.weight.dtype == dtype) == copied
        return [loss.detach(), *(weight.grad for weight in copies.weights)]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.fixture
def kernel(where):
    """Of the int8 product; skips on a card that has none."""
    if why := int8.why_not(where, None):
        pytest.skip(why)
    return int8.int8_product


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(4096, 2560, 1024), (100, 256, 2560), (1, 33, 1041), (777, 64, 64)]
)
def test_an_int8_product_has_the_bits_of_a_cpu(where, kernel, dtype, rows, n, k):
    torch.manual_seed(0)
    a, b = (torch.randint(-127, 128, (r, k), dtype=torch.int8) for r in (rows, n))
    scales = torch.rand(rows, 1), torch.rand(n, 1)
    wanted = int8.int8_product(a, b, *scales, dtype)
    found = kernel(a.to(where), b.to(where), *(s.to(where) for s in scales), dtype)
    assert found.device == where and torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_learning_in_int8_is_that_of_a_cpu(where, kernel, compiled):
    """Nearly: a number at the border between two levels may fall on either side."""
    torch.manual_seed(0)
    model = GPT(size(4, 2))
    int8.learn_in_int8(model)
    x = torch.randint(320, (4, 128))

    def numbers(device, compiled):
        there = copy.deepcopy(model).to(device)
        choose_attention(there, torch.float32)
        net = torch.compile(there, fullgraph=True) if compiled else there
        loss = net(x.to(device), x.to(device), loss_only=True)[1]
        loss.backward()
        return [loss.detach().cpu(), *(p.grad.cpu() for p in there.parameters())]

    pairs = zip(numbers(where, compiled), numbers("cpu", False), strict=True)
    assert all((mine - theirs).norm() < 1e-2 * theirs.norm() for mine, theirs in pairs)
