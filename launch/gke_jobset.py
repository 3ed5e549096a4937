#!/usr/bin/env python3
r"""Print the YAML of a run on a multi-host TPU slice of a GKE cluster (JobSet controller).

    launch/gke_jobset.py --name=sd15 --accelerator=tpu-v4-podslice --topology=2x2x4 \
      --image=my-image --claim=my-claim -- --config=configs/sd15.py --workdir=/runs/sd15

With --commit the workers clone the repository and install it. Without it the image must hold an
installed checkout as its working directory. All workers must be able to write to the claim's
volume; they see it as /runs.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MOUNT = "/runs"
TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
DIMENSIONS = {
    "tpu-v4-podslice": 3,
    "tpu-v5p-slice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v6e-slice": 2,
}
"""Of the topologies of the accelerators we know; others are taken as they are."""


def fail(line: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        fail(
            f"{message}; launch/gke_jobset.py --help lists the options, the run's own flags come"
            " after --"
        )


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the run's flags after --."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = Parser(
        "launch/gke_jobset.py",
        usage="launch/gke_jobset.py --name=NAME --accelerator=TYPE --topology=SHAPE [options]\n"
        "       -- --config=FILE --workdir=/runs/NAME [--config.KEY=VALUE ...]",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=100
        ),
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    add("--name", required=True, metavar="NAME", help="name of the JobSet")
    add("--namespace", default="default", metavar="NAME", help="of Kubernetes (default: default)")
    known = ", ".join(DIMENSIONS)
    add("--accelerator", required=True, metavar="TYPE", help=f"{known}, ...")
    about = "chips of the slice: 2x2x4, 4x4, ..."
    add("--topology", required=True, metavar="SHAPE", help=about)
    add("--chips", default="4", metavar="N", help="chips per worker (default: 4)")
    add("--workers", metavar="N", help="only checked against topology and chips")
    add("--image", metavar="IMAGE", help="container image (default with --commit: python:3.12)")
    add("--commit", metavar="COMMIT", help="all 40 digits; the workers install it")
    add("--repo", metavar="URL", help="where the workers clone from; needed with --commit")
    about = f"PersistentVolumeClaim that the workers see as {MOUNT}"
    add("--claim", metavar="CLAIM", help=about)
    about = "run by each worker before the run, such as a copy of a teacher"
    add("--setup", default="", metavar="COMMAND", help=about)
    about = "of Kubernetes; it must be able to write to the bucket"
    add("--service-account", metavar="NAME", help=about)
    add("--spot", action="store_true", help="use cheaper nodes that may be preempted")
    about = "restarts after preemptions and failures (default: 100)"
    add("--restarts", default="100", metavar="N", help=about)
    add("--apply", action="store_true", help="give the YAML to kubectl instead of printing it")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(words[:at]), words[at + 1 :]


def number(option: str, text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[1-9][0-9]*", text):
        fail(f"{option}={text} must be a whole number of at least 1")
    return int(text)


def check_name(option: str, text: str, longest: int) -> None:
    """A name as Kubernetes takes it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text) or len(text) > longest:
        fail(
            f"{option}={text} must be lower-case letters, digits and -, from a letter on, at most"
            f" {longest} of them"
        )


def workers_of(options: argparse.Namespace) -> int:
    """How many workers the slice has."""
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", options.topology):
        fail(
            f"--topology={options.topology} is not a topology; give one like 2x2x4 (v4,"
            " v5p) or 4x4 (v5e, v6e)"
        )
    sizes = [int(size) for size in options.topology.split("x")]
    wanted = DIMENSIONS.get(options.accelerator, len(sizes))
    given = f"--topology={options.topology}"
    if len(sizes) != wanted:
        fail(
            f"{given} has {len(sizes)} sizes, but {options.accelerator} has {wanted}; give one"
            f" like --topology={'x'.join('4' * wanted)}"
        )
    total, chips = math.prod(sizes), number("--chips", options.chips)
    workers, rest = divmod(total, chips)
    if rest:
        fail(
            f"{given} has {total} chips, which --chips={chips} per worker does not divide; see the"
            " node pool's machine type"
        )
    if options.workers is not None and number("--workers", options.workers) != workers:
        mend = f"leave it out or give {workers}"
        fail(
            f"--workers={options.workers} does not fit {given}, {total} chips, with --chips={chips}"
            f" per worker; {mend}"
        )
    return workers


def check_flags(flags: Sequence[str], claim: str | None) -> None:
    """Leave where the run's flags lack something, hold what is added here, or put the results where
    they are lost.
    """
    given = dict(flag.split("=", 1) for flag in flags if "=" in flag)
    for flag, after in itertools.pairwise(flags):
        given.setdefault(flag, after)  # --config FILE
    for name in ("--config", "--workdir"):
        if not given.get(name):
            fail(
                f"the run's {name} is missing; give it after --: ... -- --config=configs/sd15.py"
                f" --workdir={MOUNT}/sd15"
            )
    for name in ("--distributed", "--coordinator", "--num_processes", "--process_id"):
        if name in given or name in flags:
            fail(f"{name} is given by this script; leave it out")
    workdir = given["--workdir"]
    if "://" in workdir:
        fail(
            f"--workdir={workdir} must be a folder (checkpoints may go to a bucket); give"
            f" --claim=CLAIM and, after --, --workdir={MOUNT}/NAME"
        )
    if claim is None or not workdir.startswith(f"{MOUNT}/"):
        fail(
            f"--workdir={workdir} is lost when the containers go; give --claim=CLAIM and, after --,"
            f" --workdir={MOUNT}/NAME"
        )


def values_of(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """What the template's <> stand for; None leaves the line out."""
    check_name("--name", options.name, 40)
    check_name("--namespace", options.namespace, 63)
    for option, value in (
        ("--service-account", options.service_account),
        ("--claim", options.claim),
    ):
        if value is not None:
            check_name(option, value, 63)
    if not re.fullmatch(r"[a-z0-9-]+", options.accelerator):
        fail(
            f"--accelerator={options.accelerator} is not an accelerator of GKE; give one like"
            f" {', '.join(DIMENSIONS)}"
        )
    workers = workers_of(options)
    if options.commit is None:
        if options.image is None:
            fail("--image is missing; give an image that holds jaxdistill, or --commit and --repo")
        if options.repo is not None:
            fail(f"--repo={options.repo} needs --commit, the commit that is taken from it")
    else:
        if not re.fullmatch(r"[0-9a-f]{40}", options.commit):
            fail(
                f"--commit={options.commit} must be all 40 digits; `git rev-parse"
                f" {shlex.quote(options.commit)}` prints them"
            )
        if options.repo is None:
            fail("--repo is missing; give the URL from which the workers clone: --repo=https://...")
    restarts = number("--restarts", options.restarts)
    check_flags(flags, options.claim)
    return {
        "NAME": options.name,
        "NAMESPACE": options.namespace,
        "RESTARTS": restarts,
        "WORKERS": workers,
        "SERVICE_ACCOUNT": options.service_account,
        "ACCELERATOR": options.accelerator,
        "TOPOLOGY": options.topology,
        "SPOT": "true" if options.spot else None,
        "IMAGE": options.image or "python:3.12",
        "COMMIT": options.commit or "",
        "REPO": options.repo or "",
        "SETUP": options.setup,
        "CLAIM": options.claim,
        "MOUNT": None if options.claim is None else MOUNT,
        "CHIPS": int(options.chips),
        "FLAGS": list(flags),
    }


def escaped(value: Any) -> Any:
    """Kubernetes reads $(NAME) and $$ in arguments and variables: double each $ to keep it."""
    return value.replace("$", "$$") if isinstance(value, str) else value


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with its values as JSON, which is YAML, too; a list is as many lines."""
    lines = []
    for line in template.splitlines():
        found = None if line.lstrip().startswith("#") else re.search(r"<([A-Z_]+)>", line)
        if found is None:
            lines.append(line)
            continue
        value = values[found[1]]
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                lines.append(line.replace(found[0], json.dumps(escaped(item))))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the YAML, or apply it."""
    words = sys.argv[1:]
    options, flags = parse(words)
    text = fill(TEMPLATE.read_text(), values_of(options, flags))
    if not options.apply:
        print(text, end="")
        return
    command = ["kubectl", "apply", "--filename=-"]
    if options.dry_run:
        asked = [
            word for word in words[: words.index("--")] if word not in ("--apply", "--dry-run")
        ]
        print(f"+ {shlex.join([sys.argv[0], *asked, '--', *flags])} | {shlex.join(command)}")
        return
    if shutil.which("kubectl") is None:
        fail("kubectl is not on the PATH; install it: https://kubernetes.io/docs/tasks/tools/")
    sys.exit(subprocess.run(command, input=text, text=True, check=False).returncode)


if __name__ == "__main__":
    main()
