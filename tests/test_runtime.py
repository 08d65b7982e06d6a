"""What the machine is called, and what a card can do at most."""

import pytest

import runtime


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
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_cards_are_known_by_their_whole_name(card, tflops):
    """A laptop's card has the number of a faster one in its name, a T400 that of a T4."""
    assert runtime.PEAK_TFLOPS.get(runtime.short_name(card)) == tflops
