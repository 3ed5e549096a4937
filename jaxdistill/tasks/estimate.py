"""A run's cost before it starts: lines for a reader, and why the run does not fit."""

from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxdistill.run import cost
from jaxdistill.run.cost import Place, Rates
from jaxdistill.tasks import plan_task


class Estimate(NamedTuple):
    """`refusal`: one line, "" where the run fits."""

    lines: list[str]
    refusal: str


def estimate(
    config: ConfigDict, task: Any, place: Place, rates: Rates, *, plan: bool = False
) -> Estimate:
    """Of a task, on whose devices a run is or would be. No weights are read.

    A run compiles only where a cache keeps the program for its training.
    """
    found = task.cost(plan=plan)
    temporaries, report = None, ""
    compiles = place.compiles and (
        plan
        or bool(
            jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        )
    )
    if compiles and not cost.excess(found, place, None):
        try:
            temporaries = task.distillation.temporaries()
        except cost.DoesNotFit as error:
            report = str(error)
    excess = report or cost.excess(found, place, temporaries)
    refusal = excess and f"{excess}; try {knobs_of(config, place.devices)}"
    return Estimate(cost.lines(found, place, temporaries, rates), refusal)


def knobs_of(config: ConfigDict, devices: Any) -> str:
    """What would make a step smaller, and what it would keep then: on so many devices, or on
    those.
    """

    def kept(changed: ConfigDict) -> dict[str, int]:
        work = plan_task(changed, devices).distillation
        return work.kept(work.largest)

    return cost.mends(config, devices if isinstance(devices, int) else len(devices), kept)
