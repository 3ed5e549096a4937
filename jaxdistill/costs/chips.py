"""TPU chips: peak arithmetic, memory and interconnect, from the vendor's public system-architecture
pages (November 2026).

Of v4's data-center network they say nothing: v5p's stands for it.
"""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """One chip. flops: of bfloat16, a second; hbm: bytes; bandwidth: of the memory, interconnect:
    of all links, both bytes a second.

    `network`: its share of the data-center network between slices, bytes a second. `kinds` are the
    device kinds under which JAX knows it.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    interconnect: float
    network: float
    kinds: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1228e9, 300e9, 6.25e9, ("TPU v4",)),
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, ("TPU v5", "TPU v5p")),
        Chip("v6e", 918e12, 32 * 2**30, 1640e9, 448e9, 12.5e9, ("TPU v6 lite", "TPU v6e")),
    )
}


def of_device(device: jax.Device) -> Chip | None:
    """The chip that a device is, or None where it is no TPU known here."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
