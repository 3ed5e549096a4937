"""The schema of all configs: one block a subsystem, with the defaults that no task changes.

Every key can be set as --config.key=value. What a method can be told is in `config.methods`, by the
name of the method; `--config.method.name=` chooses one.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.methods import METHODS
from jaxdistill.methods.recipe import settings_block, settings_from


def base(task: str, *, guidance: float) -> ConfigDict:
    """A config whose teacher is drawn from at this guidance scale; the methods follow it."""
    config = ConfigDict()
    config.task = task  # labelled_images | scenes | text_to_image
    config.seed = 0  # of parameters, batches and noise; not of splits or feature extractors
    config.data = ConfigDict()
    config.teacher = ConfigDict({"guidance": guidance})
    config.method = ConfigDict({"name": "imagine_flash"})  # a key of config.methods
    config.methods = methods(config)
    config.student = ConfigDict(
        {
            "iterations": 1000,  # of all stages together
            "budget": 0,  # instead: network calls on a batch (a gradient counts two more)
            "batch_size": 64,
            "accumulate": 1,  # micro-batches a step: one is in memory at a time
            "warmup": 50,  # steps, at most a tenth of a stage's
            "decay_to": 0.02,  # share of the rate at which its cosine ends; 1: no decay
            "weight_decay": 0.0,
            "adam_b2": 0.999,
            "ema_decay": 0.995,
            "steps": (1, 2, 3),  # step counts that are served
            # Of a trajectory: nested (the first N of times) | listed (times has a list for each N)
            # | trailing.
            "grid": "trailing",
            "times": (),  # shares of T, decreasing from 1
            "health_every": 200,
            "keep_best": "",  # a health number, as fd_3: export the averages of its best step
            "lora_rank": 0,  # above 0: train low-rank updates of lora_targets only
            "lora_targets": (".*",),  # regular expressions of the ends of layers' names
        }
    )
    # Of the student's health lines, against the teacher's images of the same noises.
    config.guard = ConfigDict(
        {
            # off | warn | stop, with the best line's weights | rollback to them, at a lower rate.
            "action": "stop",
            "lines": 2,  # wrong ones in a row before it acts
            "rollbacks": 2,  # at most; then it stops
            "rate": 0.3,  # factor on the learning rates at each
            # How far a number may be: a difference; of a ratio r the x of 1/(1+x) < r < 1+x; of fd
            # and distance the rise from their lowest, as a share of it.
            "limits": {
                "fd": 0.5,  # on validation, where the task has it
                "distance": 1.0,  # of pixels to the teacher's
                "brightness": 0.1,  # the mean, of [0, 1]
                "contrast": 0.35,  # the standard deviation within an image
                "colour": 0.5,  # the largest less the smallest channel
                "detail": 1.0,  # the energy of pixels against their neighbours
                "diversity": 0.3,  # the distance of two images of one prompt or class
                "channel_mean": 0.5,  # of a latent channel, in its standard deviations
                "channel_spread": 0.4,  # its standard deviation
            },
        }
    )
    config.adversarial = ConfigDict(
        {
            "loss": "hinge",  # hinge | non_saturating
            "learning_rate": 1e-3,
            "width": 128,  # of a head
            "states": "all",  # of a row's states, which it judges: all | one at random
            "low": 0.0,  # noise levels, shares of T
            "high": 1.0,
            "reals": "data",  # data | teacher: for discriminators, and methods that need images
            "pool": 2000,  # the teacher's images that stand for reals
        }
    )
    config.compute = ConfigDict(
        {
            "unroll": False,  # a copy of the network for each step: faster for convolutions on CPU
            "compilation_cache": "",  # folder or gs://bucket/path; default: the user's cache folder
        }
    )
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices that divide the batch; -1: all that the others leave
            "fsdp": 1,  # devices that divide the batch, parameters, averages and optimizer state
            "tensor": 1,  # devices that divide layers
            "smallest": 65536,  # arrays of fewer elements are copied
            "rules": (),  # before `jaxdistill.partition.RULES`
        }
    )
    config.log = ConfigDict({"every": 50, "checkpoint_every": 500})
    return config


def methods(config: ConfigDict) -> ConfigDict:
    """The settings of all methods, as their papers have them; `guidance` follows the teacher's."""
    blocks = ConfigDict()
    for name, method in METHODS.items():
        blocks[name] = ConfigDict(
            settings_block(settings_from(method.settings, {}, f"config.methods.{name}"))
        )
    for block in (*blocks.values(), blocks.matched.flash, blocks.matched.matching):
        follow(config, block)
    return blocks


def follow(config: ConfigDict, block: ConfigDict) -> None:
    """Let a method's guidance be the teacher's, until it is set."""
    if "guidance" in block:
        block.guidance = config.teacher.get_oneway_ref("guidance")


def small_teacher(config: ConfigDict, **changes: Any) -> None:
    """The teacher's block of tasks that train one."""
    config.model = ConfigDict()  # {"name", ...}: a constructor of `jaxdistill.models.small`
    config.schedule = ConfigDict(
        {
            "name": "cosine",  # cosine | flow | linear | scaled_linear | cosine_betas
            "snr_scale": 1.0,  # factor on alpha/sigma, > 0
            "zero_terminal_snr": False,  # of the discrete schedules; the continuous ones have it
            "num_train_steps": 1000,  # of the discrete schedules
        }
    )
    config.prediction = "v"  # eps | v | x0 | flow
    config.teacher.update(
        {
            "path": "",  # teacher/ folder of another run: used instead of training one
            "iterations": 5000,
            "health_every": 1000,  # steps between health lines
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup": 200,  # steps
            "weight_decay": 0.0,
            "adam_b2": 0.999,
            "ema_decay": 0.999,
            "drop_cond": 0.1,  # share of conditionings that are dropped, for guidance
            "time_skew": 1.0,  # above 1: more of the batch near T
            "solver": "ddim",  # ddim | dpm_solver_pp_2m
            "grid": "trailing",  # trailing | leading | linspace
            "steps": 50,  # network calls of the reference sampler
            **changes,
        }
    )
    config.log.update({"health_samples": 500, "teacher_steps": 20})  # of the health lines


def compared(config: ConfigDict, methods: Sequence[str]) -> None:
    """The block of `jaxdistill.benchmark`."""
    config.benchmark = ConfigDict(
        {
            "methods": tuple(methods),  # keys of config.methods
            "seeds": (0, 1, 2),  # of the students; the teacher is trained once, with config.seed
            # Of results.png: methods against steps | variants against the first one | axis: by a
            # number in the names, CURVE_AXIS_100.
            "chart": {"kind": "methods", "axis": "", "label": ""},
        }
    )


def chosen(config: ConfigDict, name: str, *, file: str, sizes: Sequence[str] = ()) -> ConfigDict:
    """The config with the method of that name; "one" is endpoint: a student of one step from a
    finished one of several, whose folder takes the teacher's place.

    Raises ValueError for a name that is none; `sizes` are what else the file knows.
    """
    name = {"": config.method.name, "one": "endpoint"}.get(name, name)
    if name not in config.methods:
        known = ", ".join((f"configs/{file}.py", *(f":{key}" for key in (*sizes, *METHODS, "one"))))
        raise ValueError(f"configs/{file}.py:{name} is not known; choose one of {known}")
    config.method.name = name
    if name == "endpoint":
        config.student.steps = (1,)
        config.student.decay_to = 0.02  # its target stands still
    return config


def divided(config: ConfigDict, rows: int, devices: int) -> ConfigDict:
    """The config with a batch of about so many rows a device: of each grid that shares a
    micro-batch a device must have rows.
    """
    student, matching = config.student, config.methods.matched.matching
    grids = {"matched": len(matching.counts), "tdm": len(student.steps)}.get(config.method.name, 1)
    parts = max(1, rows // grids)
    student.batch_size = parts * grids * devices
    student.accumulate = min(student.accumulate, parts)
    return config
