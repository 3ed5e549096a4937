"""Chips: peak arithmetic, memory and interconnect, from the vendors' public pages (November 2026).

TPUs: the system-architecture pages. Of v4's data-center network they say nothing: v5p's stands for
it. NVIDIA GPUs: the data sheets, dense (half of what they give with sparsity).
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One chip. flops: of bfloat16, a second; hbm: bytes; bandwidth: of the memory, interconnect:
    of all links, both bytes a second.

    `network`: its share of the data-center network between slices, bytes a second, 0 where that is
    the machine's. `kinds` are the device kinds under which JAX knows it.
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
"""TPUs, for which `jaxdistill.aot` plans."""


def _card(name: str, tera: int, gib: int, memory: int, links: int, *kinds: str) -> Chip:
    return Chip(name, tera * 1e12, gib * 2**30, memory * 1e9, links * 1e9, 0.0, kinds)


CARDS = {
    chip.name: chip
    for chip in (
        _card("A100 40GB", 312, 40, 1555, 600, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        _card("A100 80GB", 312, 80, 2039, 600, "NVIDIA A100-SXM4-80GB"),
        _card("A100 80GB PCIe", 312, 80, 1935, 600, "NVIDIA A100 80GB PCIe"),
        _card("H100", 989, 80, 3350, 900, "NVIDIA H100 80GB HBM3"),
        _card("H100 PCIe", 756, 80, 2000, 600, "NVIDIA H100 PCIe"),
        _card("H200", 989, 141, 4800, 900, "NVIDIA H200"),
        _card("L4", 121, 24, 300, 64, "NVIDIA L4"),
        # Of its two peaks the one that adds up in float32, as XLA does.
        _card("RTX 4090", 165, 24, 1008, 64, "NVIDIA GeForce RTX 4090"),
    )
}
"""NVIDIA GPUs whose peaks are known here; links are NVLink, or PCIe where there is none."""


KNOWN = {name.lower().replace(" ", "-"): chip for name, chip in {**CHIPS, **CARDS}.items()}
"""All, by names for a command line: v5e, h100, a100-80gb."""


def of_device(device: Any) -> Chip | None:
    """The chip that a device of JAX is, or None where it is not known here."""
    return next((chip for chip in KNOWN.values() if device.device_kind in chip.kinds), None)
