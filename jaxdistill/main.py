"""Distil a teacher into a student that needs one to three network calls.

    python -m jaxdistill.main --config=configs/digits.py --workdir=runs/digits

The config names the task, the teacher and the method. configs/ has smoke (under a minute), digits,
fashion and scenes (small models, trained from scratch), and sd15, sdxl, sd3, flux and their like
(your checkpoint), tpu_v4 and gpu (the same on such machines). The same command resumes a run that
was stopped, and evaluates a finished run again; with more config.student.iterations it goes on.
--plan tells what a run will cost.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint, compilation, cost, distributed
from jaxdistill.run.cli import Command, define_rates, one_line_errors
from jaxdistill.run.loop import StopSignal
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import flatten, prepare_workdir, say, versions
from jaxdistill.tasks import open_task, plan_task
from jaxdistill.tasks.estimate import estimate

RATES = cost.Rates()


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    about = "tell what the run will cost, and end: no weights are read, no workdir is needed"
    flags.DEFINE_bool("plan", False, about, flag_values=values)
    about = "CHIP:COUNT: with --plan, devices that are not here, such as v5e:16"
    flags.DEFINE_string("plan_for", None, about, flag_values=values)
    define_rates(values)


def opened(opener: Callable[..., Any], *arguments: Any) -> Any:
    """A task. Raises UserError for what cannot be."""
    try:
        return opener(*arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def run(config: ConfigDict, workdir: str | Path, *, rates: cost.Rates = RATES) -> dict[str, Any]:
    """The whole job; returns what results.json holds, {} in processes other than the first.

    Raises UserError, NonFiniteError or Stopped.
    """
    workdir = Path(workdir)
    task = opened(open_task, config)
    cache = config.compute.compilation_cache
    if "://" in cache:  # JAX only warns, and compiles at each start
        checkpoint.reach(cache, f"config.compute.compilation_cache = {cache}")
    compilation.use_cache(cache)
    found = estimate(config, task, cost.here(), rates)
    if not distributed.everyone(not found.refusal):
        raise UserError(found.refusal or "the run does not fit the devices of another process")
    prepare_workdir(workdir, config, longer=len(task.recipe.stages) == 1)
    for line in found.lines:
        say(line)
    if (workdir / "results.json").exists():
        say(f"{workdir} is finished: evaluating it again, after what is missing of its iterations")
    with StopSignal().installed() as stop:
        return task.execute(Run(config, workdir, stop, task.layout))


def plan(config: ConfigDict, elsewhere: str | None, rates: cost.Rates) -> None:
    """Print what a run will cost; exit code 1 where it does not fit. Raises UserError."""
    compilation.check_devices()
    place = cost.elsewhere(elsewhere) if elsewhere else cost.here()
    compilation.use_cache(config.compute.compilation_cache)
    task = opened(plan_task, config, place.devices if elsewhere else None)
    found = estimate(config, task, place, rates, plan=True)
    print(*found.lines, sep="\n")
    if found.refusal:
        print(f"error: {found.refusal}", file=sys.stderr)
        sys.exit(1)


def join(command: Command, config: ConfigDict) -> None:
    """Join the other processes, which must agree on config and code. Raises UserError."""
    given = (command.coordinator, command.num_processes, command.process_id)
    distributed.start(*given, detect=command.distributed)
    compilation.check_devices()
    about = {f"config.{k}": v for k, v in flatten(json.loads(config.to_json())).items()}
    same = {"workdir": command.workdir, "the code": distributed.code_hash()}
    distributed.check_same({**about, **same, **versions(machine=False)})


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(__doc__, processes=True, define=define).parse()
        rates = command.rates()
        config = command.given_config(writes=not command.plan)
        if command.plan:
            plan(config, command.plan_for, rates)
            return
        if command.plan_for:
            raise UserError(f"--plan_for={command.plan_for} goes with --plan; add it")
        join(command, config)
        results = run(config, command.folder(), rates=rates)
        if results and distributed.is_main():
            folder = command.folder()
            print((folder / "results.md").read_text())
            print(f"in {folder}: results.md, and student/ (python -m jaxdistill.sample draws it)")


if __name__ == "__main__":
    main()
