"""`python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x2`: does the job fit, and
how fast can it be?

Compiles the run's own train step, or the student's sampler, for a TPU slice that is not here, and
reports memory, arithmetic and communication (`costs.plan`). No TPU, no weights and no prompts are
needed; without config.teacher.folder the published architecture config.teacher.architecture stands
for the teacher.
"""

import json
import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from jaxdistill import main
from jaxdistill.costs import plan
from jaxdistill.run import checkpoint
from jaxdistill.run.workdir import missing_extra

TOPOLOGY = flags.DEFINE_string("topology", None, f"CHIP:SHAPE, as {plan.KNOWN}.")
SLICES = flags.DEFINE_integer(
    "slices", 1, "Slices of that topology, joined by the data-center network."
)
JSON = flags.DEFINE_string("json", None, "File for the report as JSON.")
PROGRAM = flags.DEFINE_enum(
    "program",
    "step",
    list(plan.PROGRAMS),
    "The train step; the student's sampler of config.student.batch_size images, decoded; or a step"
    " of the teacher's images, config.log.batch_size a chip, of the chips of one host.",
)
SEARCH = flags.DEFINE_bool(
    "search", False, "Find the largest batch a chip that fits; compiles several times."
)


def check_flags() -> None:
    """End with one line where flags are missing or do not go together."""
    if TOPOLOGY.value is None:
        main.fail(f"--topology is missing: CHIP:SHAPE, as {plan.KNOWN}")
    if JSON.value and not Path(JSON.value).resolve().parent.is_dir():
        main.fail(f"--json={JSON.value}: the folder {Path(JSON.value).parent} does not exist")
    if SEARCH.value and PROGRAM.value == "teacher":
        main.fail(
            "--search looks for config.student.batch_size: leave it out, and set"
            " --config.log.batch_size, the teacher's images a chip"
        )
    if SLICES.value < 1:
        main.fail(f"--slices must be at least 1, got {SLICES.value}")


def cli() -> None:
    """Print the report; exit code 1 where the job does not fit, 2 for a mistake."""
    main.parse_flags()
    check_flags()
    config = main.given_config(workdir=False)
    jax.config.update("jax_platforms", "cpu")  # the devices of this machine play no part
    try:
        report = plan.plan(
            config, TOPOLOGY.value, find=SEARCH.value, slices=SLICES.value, program=PROGRAM.value
        )
    except plan.DoesNotFit as error:
        lines = plan.largest_buffers(error.report)
        print(f"error: {error}; {plan.knobs(config)}", *lines, sep="\n", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        main.fail(missing_extra(error))
    except (ValueError, OSError) as error:
        main.fail(str(error))
    print(plan.text_of(report))
    if JSON.value:
        command = shlex.join(["python", "-m", "jaxdistill.aot", *sys.argv[1:]])
        whole = {"command": command, **report, "config": json.loads(config.to_json())}
        checkpoint.write_json(Path(JSON.value), whole)
    if not report["fits"]:
        memory = report["memory_gib"]
        largest = sorted(plan.kinds_of(report), key=lambda kind: -memory[kind])
        lines = [f"  {kind}: {memory[kind]:.2f} GiB" for kind in largest]
        print(*lines, sep="\n", file=sys.stderr)
        print(
            f"error: {memory['needed']} GiB a chip do not fit; {plan.knobs(config)}",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    cli()
