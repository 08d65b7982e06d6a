"""The cards that are known: speed, memory, links. A new card is a line of CARDS."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

BACKWARD = 0.85  # of the rate of attention that its backward pass reaches, assumed


@dataclass(frozen=True)
class Reach:
    """The shares of its peaks that a card reaches in training, and whose word that is."""

    products: float  # of matrices, of the FLOP/s
    attention: float  # of the FLOP/s, in the forward pass; assumed
    bandwidth: float  # of the bytes/s
    source: str  # of the first
    bandwidth_source: str = "assumed"

    @property
    def int8(self) -> float:
        """Of products in int8, of their own peak: no larger share than others reach; assumed."""
        return min(INT8_REACH, self.products)


GUESS = Reach(0.7, 0.5, 0.9, "a guess")
KNOWN = {
    "RTX 3090": Reach(0.744, 0.6, 0.9, "fitted to the reference run as it is reported"),
    "H200": Reach(0.53, 0.3, 0.86, "fitted to the reference on an H200", "measured by a copy"),
}
# Of the same chip, with other memory
SAME_CHIP = dict.fromkeys(("H100 80GB", "H100 NVL", "H100 PCIe"), "H200")
# Products of narrower models, and of fewer tokens at once, keep no card busy
LEAST_WIDTH, LEAST_TOKENS = 768, 4096
INT8_REACH = 0.56  # of the int8 rate, by products, assumed: 160 of an RTX 3090's 284 TOPS
WORKSTATION = ("RTX 6000 Ada", "RTX A6000")  # called RTX, too


@dataclass(frozen=True)
class Card:
    """A GPU as its maker's data sheet has it, so that it can be planned for without being there.

    Links are bytes/s of a ring all-reduce, each way, and assumed: PCIe 4.0 x16 (12e9 of its 25e9,
    without peer access) and 100 Gbit/s between machines, or NVLink and 8 InfiniBand ports.
    """

    name: str  # the whole one but for the maker, socket, and (if there is one size only) memory
    tflops: float  # dense bf16 (fp16 where half says so), with fp32 accumulation
    memory: int  # GiB
    gb_per_s: float  # of its memory, 1e9 bytes/s
    link: float = 12e9  # to the next card of the machine
    network: float = 12.5e9  # between machines
    half: torch.dtype = torch.bfloat16

    @property
    def bandwidth(self) -> float:
        """Bytes/s of its memory."""
        return self.gb_per_s * 1e9

    @property
    def int8_times(self) -> int:
        """How many times its 16-bit rate its int8 rate is; 0 where Triton has no int8 products.

        GeForce cards add 16-bit products up in float32 at half the rate that their chips have.
        """
        if self.half != torch.bfloat16:
            return 0
        return 4 if self.name.startswith("RTX ") and self.name not in WORKSTATION else 2

    def peak(self, dtype: torch.dtype) -> float:
        """Dense FLOP/s in a type. float32 is TF32, at half the 16-bit rate, where the card has it.

        That is where it has bfloat16, too; older ones have an eighth in float32 itself, through
        which torch makes their bfloat16.
        """
        if dtype == torch.int8:
            return self.int8_times * self.tflops * 1e12
        if self.half == torch.bfloat16:
            slower = 2 if dtype == torch.float32 else 1
        else:
            slower = 1 if dtype == self.half else 8
        return self.tflops * 1e12 / slower


CARDS = (  # a laptop's card of the same number is slower, and has another name
    Card("A10", 125.0, 24, 600),
    Card("A40", 150.0, 48, 696),
    Card("A100 40GB", 312.0, 40, 1555, 230e9, 100e9),
    Card("A100 80GB", 312.0, 80, 2039, 230e9, 100e9),
    Card("A100 PCIe 40GB", 312.0, 40, 1555),
    Card("A100 PCIe 80GB", 312.0, 80, 1935),
    Card("H100 80GB", 989.0, 80, 3350, 370e9, 200e9),
    Card("H100 NVL", 835.0, 94, 3900),
    Card("H100 PCIe", 756.0, 80, 2000),
    Card("H200", 989.0, 141, 4800, 370e9, 200e9),
    Card("L4", 121.0, 24, 300),
    Card("L40S", 362.0, 48, 864),
    Card("RTX 3050", 18.2, 8, 224),
    Card("RTX 3060", 25.5, 12, 360),
    Card("RTX 3060 Ti", 32.4, 8, 448),
    Card("RTX 3070", 40.6, 8, 448),
    Card("RTX 3070 Ti", 43.5, 8, 608),
    Card("RTX 3080", 59.5, 10, 760),
    Card("RTX 3080 Ti", 68.2, 12, 912),
    Card("RTX 3090", 71.0, 24, 936),
    Card("RTX 3090 Ti", 80.0, 24, 1008),
    Card("RTX 4060", 30.2, 8, 272),
    Card("RTX 4060 Ti 8GB", 44.1, 8, 288),
    Card("RTX 4060 Ti 16GB", 44.1, 16, 288),
    Card("RTX 4070", 58.3, 12, 504),
    Card("RTX 4070 SUPER", 71.0, 12, 504),
    Card("RTX 4070 Ti", 80.2, 12, 504),
    Card("RTX 4070 Ti SUPER", 88.2, 16, 672),
    Card("RTX 4080", 97.5, 16, 717),
    Card("RTX 4080 SUPER", 104.4, 16, 736),
    Card("RTX 4090", 165.0, 24, 1008),
    Card("RTX 4090 D", 147.1, 24, 1008),
    Card("RTX 5060 Ti 8GB", 47.4, 8, 448),
    Card("RTX 5060 Ti 16GB", 47.4, 16, 448),
    Card("RTX 5070", 61.7, 12, 672),
    Card("RTX 5070 Ti", 87.9, 16, 896),
    Card("RTX 5080", 112.6, 16, 960),
    Card("RTX 5090", 209.5, 32, 1792),
    Card("RTX 6000 Ada", 364.0, 48, 960),
    Card("RTX A6000", 155.0, 48, 768),
    Card("T4", 65.0, 16, 320, half=torch.float16),
    Card("V100 16GB", 125.0, 16, 900, 100e9, half=torch.float16),
    Card("V100 32GB", 125.0, 32, 900, 100e9, half=torch.float16),
)


def short_name(card: str) -> str:
    """A card's name without maker, memory size and socket: "A100" for NVIDIA A100-SXM4-40GB."""
    maker = r"\b(NVIDIA|GeForce|Tesla|Generation)\b"
    name = re.sub(rf"{maker}|[- ](SXM\d*|\d+ ?GB|HBM\d\w?)\b", " ", card)
    return " ".join(name.replace("-PCIE", " PCIe").split())


def card_of(device: torch.device) -> Card | None:
    """The card of a device, None for one that is not in the table and for a CPU."""
    if device.type != "cuda":
        return None
    name = short_name(torch.cuda.get_device_name(device))
    return next((c for c in CARDS if short_name(c.name) == name), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Its dense FLOP/s in a type, None where it is not known."""
    card = card_of(device)
    return card.peak(dtype) if card else None


def find_card(name: str) -> Card | None:
    """The card of a name, blanks, hyphens and case aside: RTX3090, a100-80gb.

    None for auto, cpu, mps, cuda and cuda:N. A name without the memory size means the smallest.
    Raises ValueError that lists the cards for any other name.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    if name.partition(":")[0] in ("auto", "cpu", "mps", "cuda"):
        return None
    wanted = plain(name.replace("NVIDIA", "").replace("GeForce", ""))
    found = [c for c in CARDS if plain(c.name) == wanted]
    found += [c for c in CARDS if plain(short_name(c.name)) == wanted]
    if not found:
        known = [c.name.replace(" ", "") for c in CARDS]
        near = difflib.get_close_matches(name.upper(), known, n=5, cutoff=0.5) or known
        raise ValueError(
            f"device={name!r} is no device and no card of run/cards.py; near: {', '.join(near)}"
        )
    return found[0]


def reach_of(card: Card, dtype: torch.dtype) -> Reach:
    """What is known of a card, or of one with the same chip, or else a guess."""
    name = SAME_CHIP.get(card.name, card.name)
    found = KNOWN.get(name, GUESS)
    if name != card.name:
        found = replace(found, bandwidth_source="assumed")
    return replace(found, source="a guess") if dtype == torch.float32 else found
