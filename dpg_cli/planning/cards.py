"""Cards by name, for predictions where none is at hand: what their makers' data sheets say.

Figures are those of the data sheets and white papers of NVIDIA (H100 and H200 SXM, A100 SXM 80 GB, L40S, Ada white paper for the
4090): memory in 10⁹ bytes, dense rates without sparsity, bfloat16 with float32 sums. Sheets name peaks. The share of a peak that
these passes reach (`EFFICIENCY`) and what a layer's launches take when one token is written (`LAUNCH`) are assumptions:
no figure here was measured on a card.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpg_cli.errors import UsageError, suggestion
from dpg_cli.planning.job import Device

EFFICIENCY = 0.4  # assumed, of the float32 rate
LAUNCH = 1e-3  # assumed, seconds that Python and the launches of a layer take, whatever its size
FREE = 0.93  # of a card's memory: the driver's own, and what an allocator cannot use, are the rest


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Attributes:
        name: as users say it.
        memory: bytes.
        float32, bfloat16: operations a second, dense.
        bandwidth: bytes a second of its memory.
        link, far_link: bytes a second to another card of the node (one direction), and to another node.
    """

    name: str
    memory: float
    float32: float
    bfloat16: float
    bandwidth: float
    link: float
    far_link: float = 50e9

    def device(self) -> Device:
        """As the cost model takes it."""
        return Device(
            self.name, self.memory, self.float32, EFFICIENCY, self.bandwidth, self.link, self.far_link, launch=LAUNCH
        )

    def about(self) -> str:
        """Where its figures come from, in a line."""
        return (
            f"{self.name} by its data sheet: {self.memory / 1e9:g} GB, float32 at {self.float32 / 1e12:g} TFLOP/s, "
            f"{self.bandwidth / 1e12:g} TB/s; {EFFICIENCY:.0%} of that rate and {1e3 * LAUNCH:g} ms a layer and written "
            "token are assumed, not measured"
        )


CARDS = {
    card.name: card
    for card in (
        Card("H100", 80e9, 67e12, 989e12, 3.35e12, 450e9),
        Card("H200", 141e9, 67e12, 989e12, 4.8e12, 450e9),
        Card("A100", 80e9, 19.5e12, 312e12, 2.039e12, 300e9),
        Card("L40S", 48e9, 91.6e12, 362e12, 0.864e12, 32e9),
        Card("4090", 24e9, 82.6e12, 165e12, 1.008e12, 32e9),
    )
}


def card_of(name: str) -> Card:
    """The card of that name, however it is written.

    Raises:
        UsageError: naming those that are known.
    """
    known = {card.lower(): card for card in CARDS}
    plain = name.strip().lower().removeprefix("nvidia").strip(" -_").removeprefix("rtx").strip(" -_")
    if plain not in known:
        raise UsageError(f"No card {name[:40]!r} is known.", suggestion(name, list(CARDS), "Cards"))
    return CARDS[known[plain]]
