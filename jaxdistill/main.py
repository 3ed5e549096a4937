"""Distil a teacher into a student that needs one to three network calls.

    python -m jaxdistill.main --config=configs/digits.py --workdir=runs/digits

The config names the task, the teacher and the method. configs/ has smoke (under a minute), digits,
fashion and scenes (small models, trained from scratch), and sd15, sd21, sdxl and tpu_v4 (your
checkpoint). The same command resumes a run that was stopped, and evaluates a finished run again;
with more config.student.iterations it goes on.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint, compilation, distributed
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.loop import StopSignal
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import flatten, prepare_workdir, say, versions
from jaxdistill.tasks import open_task


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """The whole job; returns what results.json holds, {} in processes other than the first.

    Raises UserError, NonFiniteError or Stopped.
    """
    workdir = Path(workdir)
    try:
        task = open_task(config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    prepare_workdir(workdir, config, longer=len(task.recipe.stages) == 1)
    cache = config.compute.compilation_cache
    if "://" in cache:  # JAX only warns, and compiles at each start
        checkpoint.reach(cache, f"config.compute.compilation_cache = {cache}")
    compilation.use_cache(cache)
    if (workdir / "results.json").exists():
        say(f"{workdir} is finished: evaluating it again, after what is missing of its iterations")
    with StopSignal().installed() as stop:
        return task.execute(Run(config, workdir, stop, task.layout))


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
        command = Command(__doc__, processes=True).parse()
        config = command.given_config()
        join(command, config)
        results = run(config, command.folder())
        if results and distributed.is_main():
            folder = command.folder()
            print((folder / "results.md").read_text())
            print(f"in {folder}: results.md, and student/ (python -m jaxdistill.sample draws it)")


if __name__ == "__main__":
    main()
