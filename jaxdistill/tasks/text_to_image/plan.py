"""Does a job fit a TPU slice that is not here, and how fast can it be? `jaxdistill.aot` has the
flags.

The run's own train step, the student's sampler or a step of the teacher's images is compiled with
the compiler of the TPU (libtpu): memory, arithmetic and communication of one chip.
"""

import importlib.metadata
import importlib.util
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import partition
from jaxdistill.costs import hlo
from jaxdistill.costs.chips import CHIPS, Chip
from jaxdistill.errors import UserError
from jaxdistill.run import cost
from jaxdistill.run.cost import RESERVED, DoesNotFit, bytes_a_device, first_line

KNOWN = (
    "v4:2x2x1, v4:2x2x2, v4:2x2x4, v4:4x4x4, v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16, v5p:2x2x1,"
    " v5p:2x2x2, v5p:4x4x4, v6e:2x2, v6e:4x4, v6e:8x8"
)
"""Topologies that the compiler describes; others of these chips work alike."""

WRITTEN = "*after_optimizations.txt"
"""Of the files that the compiler writes when told to dump: the text of what it made."""


class AotError(UserError):
    """What cannot be planned, in one line."""


def topology(name: str, *, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice, one device a chip.

    Raises AotError for an unknown name or a missing compiler.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not all(part.isdigit() and int(part) > 0 for part in shape.split("x")):
        raise AotError(f"--topology={name} is not known; give CHIP:SHAPE, such as {KNOWN}")
    if importlib.util.find_spec("libtpu") is None:
        raise AotError(
            'libtpu, the compiler, is not installed; run: pip install "jaxdistill[tpu]" (".[tpu]"'
            " in a checkout)"
        )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else it complains at length
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any: else it warns of none
    options: dict[str, Any] = {"topology_name": name}
    if kind in ("v4", "v5p"):
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if slices > 1:
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", **options)
    except Exception as error:  # the library has several
        raise AotError(
            f"--topology={name} cannot be described ({first_line(error)}); choose one of {KNOWN}"
        ) from None
    return CHIPS[kind], list(found.devices)


class Program(NamedTuple):
    """What is compiled: a jitted function, its abstract arguments by kind, and the FLOPs it must
    spend on all devices; `remat_flops` are those with what config.compute.remat computes again.
    """

    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Any]
    analytic_flops: float
    rows: int
    remat_flops: float = 0.0


def text_program(config: ConfigDict, devices: Sequence[Any], stage: str = "") -> Program:
    """The train step of a stage of a text-to-image config, by default the one with the most
    networks. Raises ValueError.
    """
    from jaxdistill.run.phase import programs
    from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

    setup = TextSetup(config, open_teacher(config), devices=devices)
    stages = setup.recipe.stages
    names = {found.name: i for i, found in enumerate(stages)}
    if stage and stage not in names:
        raise ValueError(f"--stage={stage} is not known; choose one of {', '.join(names)}")
    most = max(range(len(stages)), key=lambda i: (len(stages[i].networks), i))
    i = names[stage] if stage else most
    made = programs(setup.distillation.planned(i), setup.layout)
    kinds = setup.distillation.kinds(i)
    flops, again = (setup.step_flops(i, remat=remat) for remat in ("none", config.compute.remat))
    rows = config.student.batch_size
    return Program(made.step, (made.state, kinds["batch"], made.given), kinds, flops, rows, again)


def sampler_program(config: ConfigDict, devices: Sequence[Any]) -> Program:
    """The student's sampler with the decoder: config.student.batch_size images, in the most of
    config.student.steps. Raises ValueError.
    """
    from jaxdistill.interop import diffusers_folder
    from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

    rows = config.student.batch_size
    setup = TextSetup(config, open_teacher(config), devices=devices)
    layout, steps = setup.layout, max(setup.grids)
    place = partition.batch_sharding(layout.mesh)

    noise = jax.ShapeDtypeStruct((rows, *setup.latent_shape), np.float32)
    batch = partition.described((noise, setup.cond_shapes(rows)), place)

    def sample(unet: Any, vae: Any, noise: Any, cond: Any) -> Any:
        with partition.on_mesh(layout):
            return setup.sample(unet, vae, noise, cond, steps=steps)

    unet = layout.describe(setup.frozen(setup.abstract))
    vae = layout.describe(setup.frozen(diffusers_folder.abstract_params(setup.folder.vae)))
    flops = rows * (steps * setup.call_flops() + setup.decode_flops())
    kinds = {"student": unet, "decoder": vae, "batch": batch}
    return Program(jax.jit(sample, out_shardings=place), (unet, vae, *batch), kinds, flops, rows)


def teacher_program(config: ConfigDict, devices: Sequence[Any]) -> Program:
    """A step of the teacher's own images, config.log.batch_size a chip: what a run's preparation
    and health lines draw with.

    Of several hosts each draws by itself, so that it is compiled for the chips of one. Raises
    ValueError.
    """
    from jaxdistill.interop import diffusers_scheduler
    from jaxdistill.tasks.text_to_image import pipeline
    from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

    setup = TextSetup(config, open_teacher(config), devices=devices)
    layout = partition.own_layout(setup.layout, process=devices[0].process_index)
    scheduler = diffusers_scheduler.of_folder(setup.folder, solver=config.teacher.solver or None)
    rows, guided = (
        config.log.batch_size * partition.parts(layout.mesh),
        setup.folder.family.guides(setup.folder, config.teacher.guidance),
    )
    place, whole = partition.batch_sharding(layout.mesh), partition.replicated(layout.mesh)
    teacher = layout.describe(setup.frozen(setup.abstract))
    noise, cond = partition.described(
        (jax.ShapeDtypeStruct((rows, *setup.latent_shape), np.float32), setup.cond_shapes(rows)),
        place,
    )
    null, scalar = partition.described(
        (setup.null_shapes(), jax.ShapeDtypeStruct((), np.float32)), whole
    )
    tokens = setup.folder.family.image_tokens(setup.folder, *setup.size)
    begin = partial(scheduler.begin, run=scheduler.run(config.teacher.steps, tokens))
    # The first step's arguments as the run has them: the solver's state follows the start.
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=place if a.shape == noise.shape else whole
        ),
        jax.eval_shape(begin, noise),
    )
    stepper = pipeline.Stepper(setup.folder, scheduler, layout)
    function = jax.jit(partial(stepper.step, guided=guided))
    flops = rows * setup.call_flops(copies=2 if guided else 1)
    return Program(
        function,
        (teacher, state, pipeline.Inputs(noise, cond, null, scalar), scalar, scalar),
        {"teacher": teacher, "batch": cond},
        flops,
        rows,
    )


PROGRAMS: Mapping[str, Callable[[ConfigDict, Sequence[Any]], Program]] = {
    "step": text_program,
    "sampler": sampler_program,
    "teacher": teacher_program,
}
"""What can be planned: the train step, the student's sampler, or a step of the teacher's images."""


class Compiled(NamedTuple):
    """A program for a slice, compiled."""

    executable: Any
    text: str
    """The optimized HLO of one chip; empty where neither jaxlib nor the compiler gave it."""
    unread: str
    """Why not, in one line, or empty."""
    seconds: float
    """That lowering and compiling took."""


def compiled(program: Program) -> Compiled:
    """Lower and compile the program. Raises DoesNotFit, AotError."""
    with tempfile.TemporaryDirectory(prefix="jaxdistill-aot-") as folder:
        began = time.perf_counter()
        lowered = program.function.lower(*program.arguments)
        told = "compiling for the slice: minutes, and up to an hour or more at full size"
        print(told, file=sys.stderr, flush=True)
        executable = _compile(lowered, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds = time.perf_counter() - began
        try:
            return Compiled(executable, executable.as_text(), "", seconds)
        except jax.errors.JaxRuntimeError as error:
            # jaxlib has the program parsed anew for its text, and a libtpu of another time may
            # write what it does not know. The compiler's own text needs no parser.
            found = [path.read_text() for path in Path(folder).glob(WRITTEN)]
            text = max(found, key=len, default="")
            return Compiled(executable, text, "" if text else first_line(error), seconds)


def _compile(lowered: Any, options: Mapping[str, Any]) -> Any:
    try:
        return cost.compiled(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        raise AotError(f"the compiler refused the program: {first_line(error)}") from None


def measure(program: Program, chip: Chip, devices: int) -> dict[str, Any]:
    """Compile the program and count it: the report as JSON values.

    Raises DoesNotFit, AotError.
    """
    executable, text, unread, seconds = compiled(program)
    memory = executable.memory_analysis()
    arguments = {kind: bytes_a_device(tree) for kind, tree in program.kinds.items()}
    needed = memory.argument_size_in_bytes + cost.temporaries_of(executable)
    return {
        "chip": chip.name,
        "chips": devices,
        "rows": program.rows,
        "rows_a_chip": program.rows / devices,
        "memory_gib": {
            **{kind: round(size / 2**30, 4) for kind, size in arguments.items()},
            "temporaries": round(memory.temp_size_in_bytes / 2**30, 4),
            "program": round(memory.generated_code_size_in_bytes / 2**30, 4),
            "needed": round(needed / 2**30, 4),
            "chip": round(chip.hbm / 2**30, 4),
        },
        "fits": needed <= chip.hbm * (1 - RESERVED),
        "analytic_flops_a_chip": program.analytic_flops / devices,
        **(counted(hlo.count(text), program, chip, devices) if text else {"unread": unread}),
        "compile_seconds": round(seconds, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def counted(counts: hlo.Counts, program: Program, chip: Chip, devices: int) -> dict[str, Any]:
    """What the compiled text of one chip says, as JSON values: FLOPs, bytes and the times that they
    take at least.
    """
    times = {
        "compute": counts.flops / chip.flops,
        "memory": counts.bytes / chip.bandwidth,
        "interconnect": (
            sum(size for kind, size in counts.collectives.items() if kind != hlo.NETWORK)
            / chip.interconnect
        ),
    }
    if hlo.NETWORK in counts.collectives:
        times["network"] = counts.collectives[hlo.NETWORK] / chip.network
    bound = max(times, key=lambda name: times[name])
    analytic, again = program.analytic_flops / devices, program.remat_flops / devices
    return {
        "flops_a_chip": counts.flops,
        "flops_ratio": round(counts.flops / analytic, 4),
        **({"flops_ratio_of_remat": round(counts.flops / again, 4)} if again else {}),
        "bytes_a_chip": counts.bytes,
        "collective_bytes_a_chip": dict(counts.collectives),
        "gathered": gathered(counts),
        "unknown_loops": counts.unknown_loops,
        "roofline_ms": {name: round(1e3 * value, 3) for name, value in times.items()},
        "bound": bound,
        "step_ms_at_least": round(1e3 * times[bound], 3),
        "rows_a_second_a_chip_at_most": round(program.rows / devices / times[bound], 3),
        "mfu_at_most": round(analytic / chip.flops / times[bound], 4),
    }


def gathered(counts: hlo.Counts) -> list[dict[str, Any]]:
    """The all-gathers, largest first: what is gathered, and where it comes from."""
    ranked = sorted(counts.gathers, key=lambda g: -g.bytes * g.times)[:8]
    return [
        {
            "shape": g.shape,
            "mib": round(g.bytes / 2**20, 3),
            "times": g.times,
            "op": g.op_name[-120:],
        }
        for g in ranked
    ]


def kinds_of(report: Mapping[str, Any]) -> list[str]:
    """The kinds that make up the memory of a report."""
    return [kind for kind in report["memory_gib"] if kind not in ("needed", "chip")]


def text_of(report: Mapping[str, Any]) -> str:
    """The report as lines for a reader."""
    memory = report["memory_gib"]
    gib = ", ".join(f"{kind} {memory[kind]:.2f}" for kind in kinds_of(report))
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    counts = _counted_lines if "unread" not in report else _uncounted_lines
    lines = {
        "GiB per chip": gib,
        "": f"{memory['needed']:.2f} of {memory['chip']:.0f}: {verdict}",
        **counts(report),
    }
    head = (
        f"{report['topology']}: {report['compiled']}, {report['chips']} chips, {report['rows']}"
        f" rows, {report['rows_a_chip']:g} per chip"
    )
    gathers = [
        f"  {'gathered':20} {gather['shape']} {gather['mib']:.1f} MiB x {gather['times']:g}"
        for gather in report.get("gathered", [])[:3]
    ]
    return "\n".join([head, *(f"  {name:20} {line}" for name, line in lines.items()), *gathers])


def _counted_lines(report: Mapping[str, Any]) -> dict[str, str]:
    sent = sorted(report["collective_bytes_a_chip"].items())
    collectives = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in sent) or "none"
    roofline = ", ".join(f"{name} {value:.1f}" for name, value in report["roofline_ms"].items())
    unknown, again = report["unknown_loops"], report.get("flops_ratio_of_remat")
    with_remat = f" ({again:.3f} x with what remat computes again)" if again else ""
    return {
        "FLOPs per chip": (
            f"{report['flops_a_chip']:.4g}, {report['flops_ratio']:.3f} x the analytic count"
            f"{with_remat}"
        ),
        "bytes per chip": (
            f"{report['bytes_a_chip']:.4g} through main memory; collectives: {collectives}"
        ),
        "roofline, ms": f"{roofline}: bound by {report['bound']}",
        "at most": (
            f"{report['rows_a_second_a_chip_at_most']:g} rows/s per chip, MFU"
            f" {report['mfu_at_most']:.2f}"
        ),
        "compiled in": f"{report['compile_seconds']:.0f} s",
    } | ({"note": f"{unknown} loops of unknown length were counted once"} if unknown else {})


def _uncounted_lines(report: Mapping[str, Any]) -> dict[str, str]:
    return {
        "analytic FLOPs": f"{report['analytic_flops_a_chip']:.4g} per chip",
        "compiled in": f"{report['compile_seconds']:.0f} s",
        "note": (
            f"jaxlib cannot read what libtpu compiled ({report['unread']}): no counts and times,"
            " only the memory"
        ),
    }


def search(
    make: Callable[[int], Program], chip: Chip, devices: int, step: int, limit: int = 1024
) -> tuple[int, dict[str, Any] | None]:
    """The most rows a chip, in multiples of `step`, that fit, with their report; (0, None) where
    not even `step` do.
    """

    def attempt(rows: int) -> dict[str, Any] | None:
        try:
            report = measure(make(rows * devices), chip, devices)
        except DoesNotFit:
            print(f"{rows} rows per chip: does not fit", flush=True)
            return None
        fits = "fits" if report["fits"] else "does not fit"
        print(f"{rows} rows per chip: {report['memory_gib']['needed']:.2f} GiB, {fits}", flush=True)
        return report if report["fits"] else None

    best, found, rows = 0, None, step
    while rows <= limit and (report := attempt(rows)):
        best, found, rows = rows, report, rows * 2
    low, high = best // step, rows // step
    while high - low > 1:
        middle = (low + high) // 2
        if report := attempt(middle * step):
            low, best, found = middle, middle * step, report
        else:
            high = middle
    return best, found


def plan(
    config: ConfigDict,
    name: str,
    *,
    find: bool,
    slices: int,
    program: str = "step",
    stage: str = "",
) -> dict[str, Any]:
    """The report of one of PROGRAMS on a topology.

    `stage`: of a method in several, for "step". Raises UserError, DoesNotFit.
    """
    if config.get("task") != "text_to_image":
        raise AotError(
            "jaxdistill.aot plans text-to-image configs only, such as configs/tpu_v4.py"
            " or configs/sd15.py"
        )
    chip, devices = topology(name, slices=slices)

    def make(rows: int) -> Program:
        changed = config.copy_and_resolve_references()
        changed.student.batch_size = rows
        try:
            if program == "step":
                return text_program(changed, devices, stage)
            return PROGRAMS[program](changed, devices)
        except ValueError as error:
            raise UserError(str(error)) from error

    if find:
        step = int(config.student.accumulate)  # a micro-batch then has a row a chip
        rows, report = search(make, chip, len(devices), step)
        if report is None:
            raise DoesNotFit(f"not even {step} rows per chip fit on {name}", "")
        print(
            f"the largest batch: {rows} rows per chip, config.student.batch_size ="
            f" {rows * len(devices)}"
        )
    else:
        found = make(config.student.batch_size)
        mesh = jax.tree.leaves(found.arguments)[0].sharding.mesh
        report = measure(found, chip, mesh.size)
    return {
        "topology": name if slices == 1 else f"{slices} x {name}",
        "compiled": program,
        **report,
    }


def run_lines(config: ConfigDict, name: str, slices: int, rates: cost.Rates) -> list[str]:
    """Work, time, money and disk of the whole run on a topology. Raises ValueError."""
    from jaxdistill.tasks.text_to_image.setup import TextSetup

    chip, devices = topology(name, slices=slices)
    place = cost.Place(len(devices), chip.name, chip, None)
    return cost.run_lines(TextSetup.planned(config, devices).cost(plan=True), place, rates)


def largest_buffers(report: str, count: int = 8) -> list[str]:
    """The lines of the compiler's out-of-memory report that name the largest buffers; its first
    lines where it names none.
    """
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    sizes = [i for i, line in enumerate(lines) if line.startswith("Size:")]
    if not sizes:
        return [
            f"  {line[:200]}"
            for line in lines[1 : 1 + count]
            if "Traceback" not in line and "traceback" not in line
        ]
    found = []
    for i in sizes[:count]:
        near = lines[i : i + 8]
        shape, source = (
            next((line for line in near if line.startswith(word)), "")
            for word in ("Shape:", "Operator:")
        )
        found.append("  " + "  ".join(part[:120] for part in (lines[i], shape, source) if part))
    return found
