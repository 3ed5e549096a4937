"""From a config to the objects of an experiment: the one place where a config's names become the
method's functions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxdistill import adversarial, partition
from jaxdistill.interop import card
from jaxdistill.methods import imagine_flash as flash
from jaxdistill.methods.denoising import denoising
from jaxdistill.methods.endpoint import endpoint
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.prediction import LossFn, check_pair
from jaxdistill.sampling import Constrain, TimeGrid, check_grid
from jaxdistill.schedule import NoiseSchedule
from jaxdistill.tasks.labelled_images import data
from jaxdistill.train import gradient_of

NOISE_SOURCES = {
    "trajectory": flash.trajectory_noise,
    "initial": flash.initial_noise,
    "fresh": flash.fresh_noise,
}
SHIFTS = {
    "none": lambda T: flash.no_shift,
    "power": flash.power_shift,
    "linear": flash.linear_shift,
    "table": flash.table_shift,
}
GAN_LOSSES = {"hinge": adversarial.hinge, "non_saturating": adversarial.non_saturating}


class Experiment(NamedTuple):
    """A config turned into objects. Building one computes nothing heavy and writes nothing."""

    config: ConfigDict
    dataset: data.Dataset
    layout: partition.Layout
    model: nn.Module
    teacher_loss: LossFn
    teacher_tx: optax.GradientTransformation
    student_loss: LossFn
    student_tx: optax.GradientTransformation
    heads: nn.Module
    teacher_sampler: card.Sampler
    student_sampler: card.Sampler
    grids: dict[int, np.ndarray]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h, w, c]."""
        return self.dataset.train.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """Of the data."""
        return len(self.dataset.class_names)

    @property
    def adversarial_on(self) -> bool:
        """Whether there is a discriminator."""
        return self.config.adversarial.weight > 0

    def student_params(self, teacher_params: Any) -> dict[str, Any]:
        """Where the student starts: at the teacher, with fresh discriminator heads."""
        params = {"student": jax.tree.map(jnp.array, teacher_params), "discriminator": {}}
        if self.adversarial_on:
            key, labels = jax.random.key(self.config.seed + 2), jnp.zeros((1,), jnp.int32)
            inputs = teacher_params, jnp.zeros((1, *self.image_shape)), jnp.zeros((1,)), labels
            params["discriminator"] = fresh_heads(
                self.heads, key, partial(self.model.apply, features=True), *inputs, cond=labels
            )
        return params


def make_dataset(block: ConfigDict) -> data.Dataset:
    """{"name", "folder"} -> Dataset. Raises ValueError."""
    makers: dict[str, Callable[[], data.Dataset]] = {
        "digits": data.digits,
        "fashion": lambda: data.fashion_mnist(block["folder"]),
    }
    return card.choose(makers, block["name"], "data.name")()


def make_optimizer(block: ConfigDict | Mapping[str, Any]) -> optax.GradientTransformation:
    """AdamW, clipped, warmed up, cosine to `decay_to` of the rate (default: a fiftieth):
    {"iterations", "learning_rate", "warmup", ...}.
    """
    top, end = block["learning_rate"], block.get("decay_to", 1 / 50)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, top, block["warmup"], max(block["iterations"], block["warmup"] + 1), end * top
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=block["adam_b2"], weight_decay=block["weight_decay"]),
    )


def make_student_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Of {"student", "discriminator"}: each player its own."""
    return optax.multi_transform(
        {
            "student": make_optimizer(config.student),
            "discriminator": optax.adam(config.adversarial.learning_rate, b1=0.5),
        },
        {"student": "student", "discriminator": "discriminator"},
    )


def make_reconstruction(config: ConfigDict, T: float) -> flash.Reconstruction:
    """The method and shifts blocks -> what the teacher corrects. Raises ValueError."""
    method = config.method
    shift_block = config.shifts[method.shift].to_dict() if method.shift in config.shifts else {}
    return flash.Reconstruction(
        shift=card.choose(SHIFTS, method.shift, "method.shift")(T, **shift_block),
        noise_source=(
            card.choose(NOISE_SOURCES, method.noise, "method.noise") if method.srl else None
        ),
        steps=method.teacher_steps,
        guidance_scale=method.guidance,
        solver=card.choose(card.SOLVERS, method.teacher_solver, "method.teacher_solver"),
    )


def from_student(config: ConfigDict) -> bool:
    """Whether config.method.name asks for a student of one step that learns from one of several
    (`endpoint`), not for Imagine Flash.

    Raises ValueError for a name that is not known, and for settings that such a student cannot
    have.
    """
    if not card.choose(
        {"imagine_flash": False, "endpoint": True},
        config.method.get("name", "imagine_flash"),
        "method.name",
    ):
        return False
    about = (
        "config.method.name = 'endpoint' trains a student of one step on where another student ends"
    )
    if tuple(config.student.steps) != (1,):
        raise ValueError(
            f'{about}; set config.student.steps="(1,)", got {tuple(config.student.steps)}'
        )
    if config.teacher.steps < 2:
        raise ValueError(
            f"{about}; set config.teacher.steps to the several steps of that one, got"
            f" {config.teacher.steps}"
        )
    if config.teacher.guidance != 1.0:
        raise ValueError(
            f"{about}, which needs no guidance; set config.teacher.guidance=1, got"
            f" {config.teacher.guidance:g}"
        )
    if config.adversarial.weight > 0:
        raise ValueError(
            f"{about}, without a discriminator; set config.adversarial.weight=0, got"
            f" {config.adversarial.weight:g}"
        )
    return True


def make_adversary(
    block: ConfigDict,
    features: adversarial.FeatureFn,
    heads: nn.Module,
    schedule: NoiseSchedule,
    constrain: Constrain,
) -> adversarial.Adversary | None:
    """The adversarial block -> the term, or None where its weight is 0. Raises ValueError."""
    gan_loss = card.choose(GAN_LOSSES, block.loss, "adversarial.loss")
    card.choose({"data": 0, "teacher": 0}, block.reals, "adversarial.reals")
    if not block.weight > 0:
        return None
    return adversarial.adversary(
        features,
        heads.apply,
        schedule=schedule,
        weight=block.weight,
        noise_time=adversarial.uniform_time(schedule, block.low, block.high),
        loss=gan_loss,
        constrain=constrain,
    )


def make_student_loss(
    config: ConfigDict,
    network: flash.Model,
    *,
    grids: Sequence[TimeGrid],
    several: Callable[[int], TimeGrid],
    null_cond: Callable[[Any], Any],
    adversary: adversarial.Adversary | None,
    constrain: Constrain,
    adversary_states: str = "all",
    unroll: bool = False,
) -> LossFn:
    """Of config.method.name: Imagine Flash on `grids`, or `endpoint` from a student's steps, at the
    times `several` gives for their number.

    Raises ValueError.
    """
    method = config.method
    if from_student(config):
        grid = several(config.teacher.steps)
        return endpoint(
            network,
            grid=grid,
            correct_noise=method.noise_correction,
            constrain=constrain,
            unroll=unroll,
        )
    return flash.imagine_flash(
        network,
        network,
        grids=grids,
        null_cond=null_cond,
        reconstruction=make_reconstruction(config, network.schedule.T),
        weight=flash.power_weight(network.schedule.T, power=method.weight_power),
        backward=method.backward,
        whole_trajectory=method.whole_trajectory,
        correct_noise=method.noise_correction,
        adversary=adversary,
        adversary_states=adversary_states,
        shortcut=method.shortcut,
        constrain=constrain,
        unroll=unroll,
    )


def student_of(params: Mapping[str, Any]) -> Any:
    """The part of the parameters that is averaged and exported."""
    return params["student"]


def make_cards(config: ConfigDict, dataset: data.Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cards of teacher and student: what a reader needs to run the parameters."""
    common = {
        "format": card.FORMAT,
        "model": {**config.model.to_dict(), "num_classes": len(dataset.class_names)},
        "schedule": config.schedule.to_dict(),
        "prediction": config.prediction,
        "data": {
            "name": dataset.name,
            "image_shape": list(dataset.train.images.shape[1:]),
            "range": [-1.0, 1.0],
            "class_names": list(dataset.class_names),
        },
    }
    teacher, student, method = config.teacher, config.student, config.method
    learned = from_student(config)  # then the teacher is a student, too
    return (
        {
            **common,
            "role": "teacher",
            "sampler": {
                "solver": teacher.solver,
                "grid": teacher.grid,
                "times": list(student.times) if learned else [1.0],
                "steps": teacher.steps,
                "guidance": teacher.guidance,
                "noise_correction": learned and method.noise_correction,
            },
        },
        {
            **common,
            "role": "student",
            "sampler": {
                "solver": "ddim",
                "grid": student.grid,
                "times": list(student.times),
                "steps": max(student.steps),
                "guidance": 1.0,
                "noise_correction": method.noise_correction,
            },
        },
    )


def build(config: ConfigDict) -> Experiment:
    """Check the whole config and make its functions.

    Raises ValueError with one clear line for what cannot be.
    """
    check_numbers(config)
    if from_student(config) and not config.teacher.path:
        raise ValueError(
            "config.teacher.path is empty: config.method.name = 'endpoint' needs the student/"
            " folder of a finished run"
        )
    dataset = make_dataset(config.data)
    check_counts(config, dataset)
    layout = partition.layout(config.mesh.to_dict())
    mesh = layout.mesh
    teacher_card, student_card = make_cards(config, dataset)
    teacher_sampler, student_sampler = (
        card.build_sampler(teacher_card),
        card.build_sampler(student_card),
    )
    model, schedule = teacher_sampler.model, teacher_sampler.schedule
    parameterization, target = card.PREDICTIONS[config.prediction]
    check_pair(schedule, parameterization)
    image_shape = dataset.train.images.shape[1:]
    card.check_model(model, image_shape)
    for phase in ("teacher", "student"):
        partition.check_batch(config[phase].batch_size, mesh, f"config.{phase}.batch_size")
    teacher_sampler.grid(config.teacher.steps)
    grids = {
        n: check_grid(student_sampler.grid(n), schedule.T) for n in sorted(config.student.steps)
    }
    check_keep_best(config.student.keep_best, ("fd", "distance"), grids)

    constrain = partition.constrain_batch(mesh)
    null_cond: Any = model.null_cond
    teacher_loss = denoising(
        model.apply,
        schedule=schedule,
        target=target,
        null_cond=null_cond,
        drop_cond=config.teacher.drop_cond,
        constrain=constrain,
    )
    heads = FeatureHeads(config.adversarial.width)
    network = flash.Model(model.apply, schedule, parameterization)
    student_loss = make_student_loss(
        config,
        network,
        grids=list(grids.values()),
        several=teacher_sampler.grid,
        null_cond=null_cond,
        adversary=make_adversary(
            config.adversarial, partial(model.apply, features=True), heads, schedule, constrain
        ),
        constrain=constrain,
        unroll=config.method.unroll,
    )
    student_tx = make_student_optimizer(config)
    experiment = Experiment(
        config,
        dataset,
        layout,
        model,
        teacher_loss,
        make_optimizer(config.teacher),
        student_loss,
        student_tx,
        heads,
        teacher_sampler,
        student_sampler,
        grids,
    )
    check_student_step(experiment)
    return experiment


def check_keep_best(name: str, numbers: Sequence[str], steps: Iterable[int]) -> None:
    """Raise ValueError where config.student.keep_best is none of the health numbers that are lower
    for a better student.
    """
    known = [f"{number}_{n}" for number in numbers for n in steps]
    if name and name not in known:
        raise ValueError(
            f"config.student.keep_best = {name!r} is not known; use one of {', '.join(known)}, or"
            " '' for the last averages"
        )


def check_numbers(config: ConfigDict) -> None:
    """Raise ValueError for numbers that no constructor checks."""
    flat = flatten(config.to_dict())
    for name, value in flat.items():
        if isinstance(value, float) and not np.isfinite(value):
            raise ValueError(f"config.{name} must be a finite number, got {value}")
    for name in ("seed", "eval.seed"):
        if name in flat and not 0 <= flat[name] < 2**31:
            raise ValueError(f"config.{name} must be in 0..{2**31 - 1}, got {flat[name]}")
    positive = (
        "teacher.iterations",
        "teacher.steps",
        "student.iterations",
        "method.teacher_steps",
        "eval.samples",
        "eval.batch_size",
        "log.every",
        "teacher.health_every",
        "student.health_every",
        "log.checkpoint_every",
        "log.health_samples",
        "log.health_prompts",
        "log.batch_size",
        "log.teacher_steps",
        "adversarial.width",
        "adversarial.pool",
    )
    for name in positive:
        if name in flat and flat[name] < 1:
            raise ValueError(f"config.{name} must be at least 1, got {flat[name]}")
    for name in ("teacher.learning_rate", "student.learning_rate", "adversarial.learning_rate"):
        if name in flat and not flat[name] > 0:
            raise ValueError(f"config.{name} must be above 0, got {flat[name]}")
    for name in ("teacher.ema_decay", "student.ema_decay"):
        if name in flat and not 0 <= flat[name] < 1:
            raise ValueError(f"config.{name} must be in [0, 1), got {flat[name]}")
    if not 0 <= flat.get("student.decay_to", 0.0) <= 1:
        raise ValueError(
            "config.student.decay_to must be in [0, 1] (1: no decay), got"
            f" {flat['student.decay_to']:g}"
        )
    if not config.student.steps or min(config.student.steps) < 1:
        raise ValueError(
            "config.student.steps must hold step counts of at least 1, got"
            f" {tuple(config.student.steps)}"
        )
    drop_cond = flat.get(
        "teacher.drop_cond", 1.0
    )  # a given teacher is taken to know the null conditioning
    if not 0 <= drop_cond <= 1:
        raise ValueError(f"config.teacher.drop_cond must be in [0, 1], got {drop_cond}")
    scales = [
        ("method.guidance", config.method.guidance),
        ("teacher.guidance", config.teacher.guidance),
    ]
    for name, scale in [*scales, *(("eval.guidances", g) for g in flat.get("eval.guidances", ()))]:
        if scale < 0:
            raise ValueError(f"config.{name} must be at least 0 (1 = none), got {scale:g}")
        if scale != 1.0 and drop_cond == 0:
            raise ValueError(
                f"config.{name} = {scale:g} needs a teacher trained with"
                " config.teacher.drop_cond > 0"
            )
    if config.adversarial.weight < 0:
        raise ValueError(
            "config.adversarial.weight must be at least 0 (0 switches the term off), got"
            f" {config.adversarial.weight:g}"
        )
    if not 0 <= config.adversarial.low < config.adversarial.high <= 1:
        raise ValueError(
            "config.adversarial needs 0 <= low < high <= 1 (shares of T), "
            f"got low={config.adversarial.low:g}, high={config.adversarial.high:g}"
        )
    if "eval" not in config:
        return
    if not config.eval.models:
        raise ValueError(
            "config.eval.models must name what to score: 'teacher', 'student' or both, got ()"
        )
    nested = ("nested",)
    for phase, extra in (("teacher", nested if from_student(config) else ()), ("student", nested)):
        card.choose(dict.fromkeys((*extra, *card.GRIDS)), config[phase].grid, f"{phase}.grid")
    for name in config.eval.models:
        card.choose({"teacher": 0, "student": 0}, name, "eval.models")
    features = config.eval.features
    for name in ("eval.samples", "log.health_samples"):
        block, key = name.split(".")
        if config[block][key] <= features:
            raise ValueError(
                f"config.{name} = {config[block][key]} is too few for a Frechet distance of"
                f" {features} features; at least {features + 1} are needed"
            )


def scored_split(config: ConfigDict, dataset: data.Dataset) -> data.Split:
    """The split that config.eval.split names. Raises ValueError."""
    return card.choose(
        {"test": dataset.test, "validation": dataset.validation}, config.eval.split, "eval.split"
    )


def check_counts(config: ConfigDict, dataset: data.Dataset) -> None:
    """Raise ValueError where the metrics cannot be computed from so few images."""
    count, features = len(scored_split(config, dataset).labels), config.eval.features
    if features >= count // 2:
        raise ValueError(
            f"config.eval.features = {features} is too many for halves of the {count}"
            f" {config.eval.split} images; at most {count // 2 - 1} can be used"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def check_student_step(experiment: Experiment) -> None:
    """Trace the student's gradient as training will take it, so that a mistake shows before the
    teacher is trained.
    """
    layout, size = experiment.layout, experiment.config.student.batch_size
    x0, labels = jnp.zeros((1, *experiment.image_shape)), jnp.zeros((1,), jnp.int32)
    teacher = jax.eval_shape(experiment.model.init, jax.random.key(0), x0, jnp.zeros((1,)), labels)
    trees = (
        jax.eval_shape(experiment.student_params, teacher),
        teacher,
        jax.eval_shape(jax.random.key, 0),
    )
    params, teacher, key = (layout.describe(tree) for tree in trees)
    place = partition.batch_sharding(layout.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype, sharding=place)
        for name, array in (("x0", x0), ("cond", labels))
    }
    gradient_of(experiment.student_loss).trace(params, teacher, batch, key)
