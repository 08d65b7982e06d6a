"""What the machine is called, what a card can do at most, and where a model's memory lies."""

import copy
import mmap
from pathlib import Path
from unittest import mock

import pytest
import torch

from making import compiled
from making.int8 import quantize
from model import GPT, GPTConfig
from run import cards, machine


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("Tesla T4", 65.0),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", 147.1),
        ("NVIDIA H100 NVL", 835.0),
    ],
)
def test_cards_are_known_by_their_whole_name(card, tflops):
    """A laptop's card has the number of a faster one in its name, a T400 that of a T4."""
    name = cards.short_name(card)
    assert next((c.tflops for c in cards.CARDS if cards.short_name(c.name) == name), None) == tflops


@pytest.mark.parametrize(
    ("avx512", "amx", "amd", "taken"),
    [
        (False, False, False, torch.float32),
        (False, False, True, torch.float32),
        (True, False, False, torch.float32),
        (True, False, True, torch.bfloat16),
        (True, True, False, torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(monkeypatch, avx512, amx, amd, taken):
    """AVX-512's instructions had half the speed of float32 on an Intel Xeon without AMX."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(machine, "is_amd", lambda: amd)
    found = machine.select_dtype("auto", torch.device("cpu"))
    assert found[0] == taken and ("no fast" in found[1]) == (taken == torch.float32)
    assert machine.select_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16


@pytest.mark.parametrize("told", ["AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "Intel", ""])
def test_whose_cpu_it_is(monkeypatch, told):
    """By Windows, which has no /proc, and by Linux."""
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", told)
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=FileNotFoundError))
    assert machine.is_amd() == ("AMD" in told)
    monkeypatch.delenv("PROCESSOR_IDENTIFIER")
    for maker in ("AuthenticAMD", "GenuineIntel"):
        file = mock.mock_open(read_data=f"processor : 0\nvendor_id : {maker}\n")
        monkeypatch.setattr("builtins.open", file)
        assert machine.is_amd() == (maker == "AuthenticAMD")


@pytest.mark.parametrize("kind", ["tied", "int8"])
def test_a_model_moves_to_large_pages_unchanged(kind):
    """Every weight and table, once each, side by side; where there are no such pages, nothing."""
    size = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
    model = GPT(GPTConfig(**size)).eval()
    if kind == "int8":
        quantize(model)
    idx = torch.arange(9)[None]
    logits, before = model(idx)[0], copy.deepcopy(model.state_dict())
    compiled.use_huge_pages(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(idx)[0], logits)
    if kind == "tied":
        assert model.lm_head.weight is model.embed_tokens.weight
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        tensors = [*model.parameters(), *model.buffers()]
        first, last = (f(tensors, key=torch.Tensor.data_ptr) for f in (min, max))
        room = sum(t.nbytes + 63 for t in tensors)
        assert last.data_ptr() + last.nbytes - first.data_ptr() <= room
        assert first.data_ptr() % 2**21 == 0


def test_a_tensor_that_is_not_on_a_cpu_stays_where_it_is():
    model = torch.nn.Linear(8, 8)
    model.weight = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    bias = model.bias.clone()
    compiled.use_huge_pages(model)
    assert model.weight.is_meta and torch.equal(model.bias, bias)


def test_a_system_without_large_pages_keeps_the_model_where_it_is(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    model = torch.nn.Linear(8, 8)
    place = model.weight.data_ptr()
    compiled.use_huge_pages(model)
    assert model.weight.data_ptr() == place
