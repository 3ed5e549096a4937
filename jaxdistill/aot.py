"""Tell whether a text-to-image run fits a TPU slice, and how fast it can be, without a TPU.

    python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x4

Compiles the run's own programs for the slice and reports memory, arithmetic and communication. It
needs no weights and no prompts: without config.teacher.folder the teacher is the published
architecture config.teacher.architecture.
"""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint
from jaxdistill.run.cli import Command, define_rates, one_line_errors
from jaxdistill.tasks.estimate import knobs_of
from jaxdistill.tasks.text_to_image import plan

NEEDED = "--topology=CHIP:SHAPE"


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    about = f"CHIP:SHAPE: such as {plan.KNOWN}"
    flags.DEFINE_string("topology", None, about, flag_values=values)
    about = "slices of that topology, joined by the data-centre network"
    flags.DEFINE_integer("slices", 1, about, flag_values=values)
    flags.DEFINE_string("json", None, "FILE: gets the report as JSON", flag_values=values)
    about = (
        "NAME: step, the train step; sampler, the student's of config.student.batch_size images;"
        " teacher, a sampler step of the teacher's images, config.log.batch_size per chip"
    )
    flags.DEFINE_enum("program", "step", list(plan.PROGRAMS), about, flag_values=values)
    about = "NAME: the stage to compile, of a method in several stages (default: the largest)"
    flags.DEFINE_string("stage", "", about, flag_values=values)
    about = "find the largest batch per chip that fits; compiles several times"
    flags.DEFINE_bool("search", False, about, flag_values=values)
    define_rates(values)


def check_flags(command: Command) -> None:
    """Raise UserError where flags are missing or do not go together."""
    if command.topology is None:
        raise UserError(f"--topology is missing; give CHIP:SHAPE, such as {plan.KNOWN}")
    if command.json and not Path(command.json).resolve().parent.is_dir():
        raise UserError(
            f"--json={command.json}: the folder {Path(command.json).parent} does not exist"
        )
    if command.search and command.program == "teacher":
        raise UserError(
            "--search looks for config.student.batch_size; leave it out and set"
            " --config.log.batch_size, the teacher's images per chip"
        )
    if command.slices < 1:
        raise UserError(f"--slices must be at least 1, got {command.slices}")


def main() -> None:
    """Print the report; exit code 1 where the job does not fit, 2 for a mistake."""
    with one_line_errors():
        command = Command(__doc__, workdir=False, needed=NEEDED, define=define).parse()
        check_flags(command)
        rates = command.rates()
        config = command.given_config()
        jax.config.update("jax_platforms", "cpu")  # the devices of this machine play no part
        options = {"find": command.search, "slices": command.slices, "stage": command.stage}
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own waits for the compiler
        try:
            report = plan.plan(config, command.topology, program=command.program, **options)
        except plan.DoesNotFit as error:
            lines = plan.largest_buffers(error.report)
            tried = knobs(config, command)
            print(f"error: {error}; try {tried}", *lines, sep="\n", file=sys.stderr)
            sys.exit(1)
        finally:
            signal.signal(signal.SIGINT, before)
        show(report, config, command.json)
        if command.program == "step":
            print(*plan.run_lines(config, command.topology, command.slices, rates), sep="\n")
        if not report["fits"]:
            memory = report["memory_gib"]
            largest = sorted(plan.kinds_of(report), key=lambda kind: -memory[kind])
            lines = [f"  {kind}: {memory[kind]:.2f} GiB" for kind in largest]
            needed = f"error: {memory['needed']} GiB per chip do not fit"
            print(*lines, f"{needed}; try {knobs(config, command)}", sep="\n", file=sys.stderr)
            sys.exit(1)


def knobs(config: ConfigDict, command: Command) -> str:
    """What would make a step smaller."""
    return knobs_of(config, plan.topology(command.topology, slices=command.slices)[1])


def show(report: dict[str, Any], config: ConfigDict, path: str | None) -> None:
    """Print the report and write it."""
    print(plan.text_of(report))
    if path:
        command = shlex.join(["python", "-m", "jaxdistill.aot", *sys.argv[1:]])
        whole = {"command": command, **report, "config": json.loads(config.to_json())}
        checkpoint.write_json(Path(path), whole)


if __name__ == "__main__":
    main()
