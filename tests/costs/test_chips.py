"""The table of chips, from which a run's MFU comes."""

from types import SimpleNamespace

import pytest

from jaxdistill.costs import chips


def of_kind(kind):
    return chips.of_device(SimpleNamespace(device_kind=kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),  # a part of a card has a part of its peak
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_its_whole_name(kind, name):
    found = of_kind(kind)
    assert (found and found.name) == name


def test_every_kind_is_one_chip():
    known = [*chips.CHIPS.values(), *chips.CARDS.values()]
    kinds = [kind for chip in known for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) and all(chip.kinds for chip in known)
    for chip in known:
        assert all(of_kind(kind) is chip for kind in chip.kinds)


def test_a_plan_is_for_tpus_only():
    assert set(chips.CHIPS) == {"v4", "v5e", "v5p", "v6e"}
