"""Hours, money and disk of a plan, and what makes a run smaller."""

import itertools
import math

import jax
import pytest
from ml_collections import ConfigDict
from shell import tiny_config

from jaxdistill.costs.chips import CARDS, CHIPS
from jaxdistill.errors import UserError
from jaxdistill.run import cost
from jaxdistill.run.cost import Cost, Place, Rates, Records, Work

V5E = Place(16, "v5e", CHIPS["v5e"], 15 * 2**30)
NOWHERE = Place(1, "abacus", None, None)


def make_cost(flops=1e18, **changes):
    work = [Work("teacher", 0, 5.0, flops / 4), Work("student", 10, 15.0, flops * 3 / 4)]
    found = Cost({"teacher": 7}, {"student": 2**30, "batch": 2**20}, {}, work, [], 64)
    return found._replace(**changes)


def paid(text):
    return float(text.partition("MFU of ")[2].split()[1].replace(",", ""))


def test_the_hours_at_the_whole_peak_are_the_flops_over_it():
    chip = CHIPS["v5e"]
    found = make_cost(flops=chip.flops * 16 * 3600 * 5)
    assert found.hours(V5E, 1.0) == pytest.approx(5.0)
    assert found.hours(V5E, 0.5) == pytest.approx(10.0)
    assert found.hours(V5E._replace(devices=32), 1.0) == pytest.approx(2.5)
    assert found.calls == 20.0


def test_money_is_hours_of_all_devices():
    found = make_cost(flops=CHIPS["v5e"].flops * 16 * 3600 * 5)
    once, twice = (
        next(line for line in cost.run_lines(found, V5E, Rates(1.0, price)) if "time" in line)
        for price in (1.5, 3.0)
    )
    assert paid(once) == 5 * 16 * 1.5 and paid(twice) == 2 * paid(once)
    assert "5 hours on 16 x v5e" in once
    assert "device and hour" not in cost.run_lines(found, V5E, Rates(1.0))[1]


@pytest.mark.parametrize(
    ("found", "place", "why"),
    [
        (make_cost(), NOWHERE, "the peak of abacus is not known"),
        (make_cost(work=[Work("student", 10, None, None)]), V5E, "FLOPs are not counted"),
    ],
)
def test_without_hours_the_reason_is_told_and_no_money(found, place, why):
    line = cost.run_lines(found, place, Rates(0.4, 2.0))[1]
    assert line.endswith(f"no hours, and no money: {why}")
    assert "money" not in cost.run_lines(found, place, Rates(0.4))[1]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (Rates(0.0), "--mfu=0 must be above 0"),
        (Rates(1.1), "--mfu=1.1 must be above 0 and at most 1"),
        (Rates(math.nan), "--mfu=nan"),
        (Rates(0.4, -1.0), "--price_per_hour=-1 must be 0 or more"),
        (Rates(0.4, math.inf), "--price_per_hour=inf"),
        (Rates(0.4, math.nan), "--price_per_hour=nan"),
    ],
)
def test_rates_that_cannot_be_are_one_line(rates, words):
    with pytest.raises(UserError) as found:
        rates.check()
    assert words in str(found.value) and "\n" not in str(found.value)
    assert Rates(1.0, 0.0).check() == (1.0, 0.0)


@pytest.mark.parametrize("name", ["v9:4", "v5e", "v5e:0", "v5e:4x4", "v5e:-1", ":3"])
def test_devices_that_nobody_knows_are_one_line(name):
    with pytest.raises(UserError, match=rf"^--plan_for={name} is not known; give CHIP:COUNT"):
        cost.elsewhere(name)


@pytest.mark.parametrize(
    ("name", "chip", "share"),
    [("v4:8", CHIPS["v4"], 0.97), ("a100-80gb:8", CARDS["A100 80GB"], 0.75)],
)
def test_devices_elsewhere_have_what_a_run_gets_of_their_memory(name, chip, share):
    place = cost.elsewhere(name)
    assert (place.devices, place.chip, place.memory) == (8, chip, int(chip.hbm * share))


def test_what_comes_for_a_time_counts_once():
    """A step's temporaries and the networks of drawing are not there together."""
    found = make_cost(drawing={"vae": 3 * 2**20})
    kept = 2**30 + 2**20
    assert found.needed(None) == found.needed(2**20) == kept + 3 * 2**20
    assert found.needed(2**25) == kept + 2**25
    place = NOWHERE._replace(memory=kept + 2**24)
    assert cost.excess(found, place, 2**23) == "" == cost.excess(found, NOWHERE, 2**60)
    assert "needs 1.03 GiB a device" in cost.excess(found, place, 2**25)
    assert "at least" in cost.lines(found, place, None, Rates())[1]
    assert "at least" not in cost.lines(found, place, 2**23, Rates())[1]


def test_a_cache_of_unknown_length_is_told_by_the_record():
    records = [Records("prompts", None, 2000), Records("pairs", 30, 1000)]
    line = cost.run_lines(make_cost(records=records), V5E, Rates())[-1]
    assert line.endswith("prompts 2 kB each, pairs 30 x 1 kB = 30 kB")


def test_a_step_that_is_compiled_says_what_it_needs_for_a_time():
    """Beside its argument: the product, which is wanted twice, and the result."""
    x = jax.ShapeDtypeStruct((256, 256), "float32")
    one = jax.jit(lambda a: (a @ a) @ (a @ a).T).lower(x)
    assert cost.temporaries_of(cost.compiled(one)) >= 2 * 4 * 256**2
    donated = jax.jit(lambda a: a + 1.0, donate_argnums=0).lower(x)
    assert cost.temporaries_of(cost.compiled(donated)) < 4 * 256**2


# -------------------------------------------------------------------------------------------- knobs


def changes_of(config, devices):
    return [dict(knob.changes) for knob in cost.knobs(config, devices)]


def test_the_knobs_are_those_that_are_left():
    config = tiny_config(**{"student.batch_size": 16})
    config.compute = ConfigDict({"remat": "none", "attention": "auto"})
    assert changes_of(config, 4) == [
        {"compute.remat": "full"},
        {"student.accumulate": 2},
        {"student.batch_size": 8},
        {"mesh.fsdp": 4, "mesh.data": 1},
        {"compute.attention": "flash"},
        {"student.lora_rank": 64},
    ]
    config.compute.update({"remat": "full", "attention": "flash"})
    config.student.lora_rank, config.mesh.fsdp = 8, 4
    config.student.accumulate = 4  # a row a device
    assert changes_of(config, 4) == []


@pytest.mark.parametrize(("devices", "tensor"), list(itertools.product((1, 2, 8), (1, 2))))
def test_no_knob_leaves_a_device_without_a_row(devices, tensor):
    config = tiny_config(**{"student.batch_size": 24})
    config.mesh.tensor = min(devices, tensor)
    for knob in cost.knobs(config, devices):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(dict(knob.changes))
        rows = changed.student.batch_size // changed.student.accumulate
        assert rows % (devices // config.mesh.tensor) == 0 and rows > 0


def test_a_knob_says_what_it_makes_of_what_is_kept():
    config = tiny_config()
    kept = lambda c: {"student": 2**20 * c.student.lora_rank, "batch": 2**20}  # noqa: E731
    text = cost.mends(config, 1, kept)
    assert "--config.student.lora_rank=64 (65 MiB kept; " in text
    assert "--config.student.accumulate=2 (1 MiB kept; temporaries of half the rows" in text

    def refused(changed):
        if changed.student.accumulate > 1:
            raise ValueError("rows do not divide")
        return kept(changed)

    assert "accumulate" not in cost.mends(config, 1, refused)
