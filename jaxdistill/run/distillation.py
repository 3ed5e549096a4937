"""A method on a task: the programs of its stages, what they cost, and the students they leave."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import partition
from jaxdistill.costs.flops import flops_of
from jaxdistill.errors import UserError
from jaxdistill.methods.recipe import Kit, Recipe, Stage
from jaxdistill.partition import Layout
from jaxdistill.prediction import LossFn
from jaxdistill.run import distributed
from jaxdistill.run.checkpoint import KEPT
from jaxdistill.run.cost import (
    Records,
    Work,
    bytes_a_device,
    bytes_of,
    compiled,
    parameters,
    temporaries_of,
)
from jaxdistill.run.guard import DRIFT, guard_settings
from jaxdistill.run.loop import HealthFn, Trained
from jaxdistill.run.phase import Training, programs
from jaxdistill.run.seeds import key_of
from jaxdistill.run.task import Task
from jaxdistill.run.workdir import flatten, say
from jaxdistill.sampling import unconstrained
from jaxdistill.train import Objective, critic_gradient_of, gradient_of, student_of

HEADS = "discriminator"
"""The one network that is not a copy of the teacher's."""


class Student(NamedTuple):
    """What one stage leaves: the step counts that it serves, its trainable weights (averages), the
    health numbers of these, and what it cost.
    """

    stage: Stage
    trained: Any
    health: dict[str, float]
    iterations: int


@runtime_checkable
class Runner(Protocol):
    """What trains: `run.Run`."""

    flops: Callable[[int], float] | None

    def train(self, training: Training) -> Trained:
        """One training to its end."""


class Distillation:
    """The stages of one method on one task, as programs. Making it computes nothing heavy."""

    def __init__(self, task: Task, build: Callable[[Kit], Recipe]) -> None:
        self.task, self._build = task, build
        self.recipe = build(task.kit({}))
        check_keep_best(task.config.student.keep_best, task.ranks, task.kit({}).steps)
        found = guard_settings(task.config.guard.to_dict()) if "guard" in task.config else None
        self.guard = found if found and found.action != "off" else None
        self._losses: dict[tuple[int, str], LossFn] = {}
        self._iterations: dict[int, int] = {}
        self._flops: dict[int, float] = {}
        self._kinds: dict[int, dict[str, Any]] = {}

    # -- programs

    def loss(self, i: int, part: str = "loss") -> LossFn:
        """A stage's "loss" or "critic" on trainable weights.

        Its second argument is {"teacher", "null"} and, where the stage asks for it, "previous": the
        trainable weights of the stage before. A null conditioning in the program would tie it to
        one text encoder's weights.
        """
        if (i, part) not in self._losses:
            self._losses[i, part] = self._adapted(i, part)
        return self._losses[i, part]

    def _adapted(self, i: int, part: str) -> LossFn:
        task = self.task

        def loss(params: Any, given: Any, batch: Any, key: jax.Array) -> Any:
            with jax.ensure_compile_time_eval():  # tables of the method are numbers
                stage = self._build(task.kit(given["null"])).stages[i]
            base = task.inside(given["teacher"])

            def whole(trained: Any) -> Any:
                return task.weights.variables(task.inside(trained), base)

            networks = {n: p if n == HEADS else whole(p) for n, p in params.items()}
            teacher = base
            if stage.teacher != "teacher":
                previous = jax.lax.stop_gradient(whole(given["previous"]))
                both = {"original": base, "previous": previous}
                teacher = previous if stage.teacher == "previous" else both
            with partition.on_mesh(task.layout):
                found = getattr(stage, part)(networks, teacher, batch, key)
            return _checked(found, f"{self.phase(i)}'s {part}")

        return loss

    def objective(self, i: int, iterations: int) -> Objective:
        """Losses and optimizers of a stage of so many iterations."""
        stage = self.recipe.stages[i]
        repeated = stage.critic_updates > 0
        return Objective(
            loss=self.loss(i),
            tx=stage.optimizers(iterations),
            critic=self.loss(i, "critic") if repeated else None,
            critic_updates=stage.critic_updates,
            averages=stage.averages,
            unroll=self.task.kit({}).unroll,
        )

    # -- shapes

    @cached_property
    def trained_shapes(self) -> Any:
        """Of one network's trainable weights."""
        return jax.eval_shape(self.task.weights.fresh, self.task.abstract)

    def shapes(self, i: int) -> dict[str, Any]:
        """Of all networks of a stage."""
        stage = self.recipe.stages[i]
        return {
            name: jax.eval_shape(lambda: self.task.heads(stage))
            if name == HEADS
            else self.trained_shapes
            for name in stage.networks
        }

    def given_shapes(self, i: int) -> dict[str, Any]:
        """Of the loss's second argument."""
        task, stage = self.task, self.recipe.stages[i]
        found = {"teacher": task.frozen(task.abstract), "null": task.null_shapes()}
        if stage.teacher != "teacher":
            found["previous"] = task.frozen(self.trained_shapes)
        return found

    def check(self) -> None:
        """Trace the stages' losses, the first one's gradient as training will take it, so that a
        mistake shows before the teacher is trained.
        """
        layout = self.task.layout
        for i, stage in enumerate(self.recipe.stages):
            shapes = self.shapes(i), self.given_shapes(i)
            params, given = (layout.describe(tree) for tree in shapes)
            key = layout.describe(jax.eval_shape(jax.random.key, 0))
            batch = self.task.batch_shapes(stage)
            if i:
                jax.eval_shape(self.loss(i), params, given, batch, key)
            else:
                gradient_of(self.loss(i)).trace(params, given, batch, key)

    def check_batch(self) -> None:
        """Raise ValueError where the rows of a micro-batch do not divide as a stage needs them:
        its losses are traced with a network that does nothing.
        """
        task, student = self.task, self.task.config.student
        kit = task.kit({})
        stub = dataclasses.replace(
            kit,
            network=kit.network._replace(apply=lambda params, x, t, cond: x, shares=False),
            null_cond=lambda cond: cond,
            features=lambda params, x, t, cond: [x],
            heads=lambda params, states, cond: states[0].reshape(len(states[0]), -1),
            constrain=unconstrained,
        )
        for stage in self._build(stub).stages:
            shapes = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(
                    (a.shape[0] // student.accumulate, *a.shape[1:]), a.dtype
                ),
                task.batch_shapes(stage),
            )
            networks: dict[str, Any] = {name: {} for name in stage.networks}
            teacher: Any = {"original": {}, "previous": {}} if stage.teacher == "both" else {}
            jax.eval_shape(stage.loss, networks, teacher, shapes, jax.random.key(0))

    # -- cost

    @cached_property
    def networks(self) -> dict[str, int]:
        """Parameters of the teacher and of all that is trained."""
        found = {"teacher": parameters(self.task.abstract)}
        for i in range(len(self.recipe.stages)):
            found |= {name: parameters(tree) for name, tree in self.shapes(i).items()}
        return found

    def kinds(self, i: int) -> dict[str, Any]:
        """What the devices hold while a stage is trained, by kind: arrays without values."""
        if i not in self._kinds:
            batch = self.task.batch_shapes(self.recipe.stages[i])
            self._kinds[i] = kinds_of(self.planned(i), batch, self.task.layout)
        return self._kinds[i]

    @cached_property
    def largest(self) -> int:
        """The stage that keeps most."""
        return max(range(len(self.recipe.stages)), key=lambda i: (sum(self.kept(i).values()), i))

    def kept(self, i: int) -> dict[str, int]:
        """{kind: bytes a device} of a stage."""
        return {kind: bytes_a_device(tree) for kind, tree in self.kinds(i).items()}

    def checkpoints(self) -> list[Records]:
        """Of all stages."""
        stages = range(len(self.recipe.stages))
        return [kept for i in stages for kept in checkpoints_of(self.planned(i), self.kinds(i))]

    def temporaries(self) -> int:
        """Bytes a device of the largest stage's step beside what is kept, from the compiler.
        Training compiles the same program, so that a cache of programs has it then. Raises
        DoesNotFit.
        """
        i = self.largest
        made = programs(self.planned(i, self.iterations(i)), self.task.layout)
        batch = self.task.batch_shapes(self.recipe.stages[i])
        step: Any = made.step
        return temporaries_of(compiled(step.lower(made.state, batch, made.given)))

    def work(self, *, count: bool = True) -> list[Work]:
        """Of the stages; `count` network calls and FLOPs, which traces their losses."""
        found = []
        for i in range(len(self.recipe.stages)):
            n = self.iterations(i)
            calls, flops = (n * self.calls(i), n * self.flops(i)) if count else (None, None)
            found.append(Work(self.phase(i), n, calls, flops))
        return found

    def flops(self, i: int) -> float:
        """Of one iteration: dots and convolutions of all losses and gradients, as written, with
        nothing computed twice.
        """
        if i not in self._flops:
            self._flops[i] = self.task.written().counted(i)
        return self._flops[i]

    def counted(self, i: int) -> float:
        """As `flops`, of this task's own programs."""
        stage = self.recipe.stages[i]
        key = jax.eval_shape(jax.random.key, 0)
        params, batch = self.shapes(i), self.task.batch_shapes(stage)
        inputs = (params, self.given_shapes(i), batch, key)
        found = flops_of(gradient_of(self.loss(i)), *inputs)
        if stage.critic_updates:
            critic = critic_gradient_of(self.loss(i, "critic"))
            found += stage.critic_updates * flops_of(critic, *inputs)
        return found

    @cached_property
    def flops_of_a_call(self) -> float:
        """Of one network call on a batch of the student's."""
        task = self.task.written().task
        batch = task.batch_shapes(self.recipe.stages[0])
        network = task.kit({}).network

        def call(params: Any, x: Any, cond: Any) -> Any:
            return network.apply(params, x, jax.numpy.zeros(x.shape[:1]), cond)

        return flops_of(call, task.abstract, batch["x0"], batch["cond"])

    def calls(self, i: int) -> float:
        """An iteration's cost in network calls on its batch (a gradient costs two more)."""
        return self.flops(i) / self.flops_of_a_call

    def iterations(self, i: int) -> int:
        """Of a stage: its share of config.student.iterations, or of the budget in network calls."""
        if i not in self._iterations:
            self._iterations[i] = self._count_iterations(i)
        return self._iterations[i]

    def _count_iterations(self, i: int) -> int:
        student, stage = self.task.config.student, self.recipe.stages[i]
        if student.iterations:
            return max(1, round(stage.share * student.iterations))
        pairs = self.recipe.pairs.share if self.recipe.pairs else 0.0
        calls = self.calls(i)
        count = max(1, int(stage.share * (1 - pairs) * student.budget / calls))
        say(f"{self.phase(i)}: {calls:.1f} network calls per iteration, {count} iterations")
        return count

    def pair_count(self, guided: bool) -> int:
        """Of the recipe's pairs: as many as their share of the budget pays for or, of a budget in
        iterations, as was said. Raises UserError.
        """
        config, pairs = self.task.config, self.recipe.pairs
        assert pairs is not None
        if config.student.iterations:
            return pairs.number or config.adversarial.pool
        calls = pairs.steps * (2 if guided else 1)
        count = int(pairs.share * config.student.budget * config.student.batch_size / calls)
        if count < 1:
            raise UserError(
                f"config.student.budget = {config.student.budget} is less than one pair"
                f" costs ({calls} network calls); raise it"
            )
        return count

    # -- training

    def phase(self, i: int) -> str:
        """The name of a stage's phase."""
        name = self.recipe.stages[i].name
        return f"student-{name}" if name else "student"

    def first_params(self, i: int, teacher: Any, current: Any) -> dict[str, Any]:
        """Where a stage begins: the student where it stands, its target with it, a fake score as
        the teacher, fresh heads.
        """
        stage, task = self.recipe.stages[i], self.task
        starts: dict[str, Any] = {}
        for name in stage.networks:
            if name == HEADS:
                starts[name] = task.heads(stage)
            elif name == "fake" or current is None:
                starts[name] = task.student(teacher)
            else:
                starts[name] = jax.tree.map(np.array, current)
        return starts

    def training(self, i: int, teacher: Any, null: Any, current: Any, health: HealthFn) -> Training:
        """One stage as a training; `current` is the student before it, None at the first."""
        task, stage, config = self.task, self.recipe.stages[i], self.task.config
        name, iterations = self.phase(i), self.iterations(i)
        given = {"teacher": teacher, "null": null}
        if stage.teacher != "teacher":
            dtype = jax.tree.leaves(task.frozen(self.trained_shapes))[0].dtype
            given["previous"] = jax.tree.map(lambda a: np.asarray(a).astype(dtype), current)
        method = config.method.name
        return dataclasses.replace(
            self.planned(i, iterations),
            params=lambda: self.first_params(i, teacher, current),
            key=key_of(config.seed, name),
            batches=task.batches(stage, name),
            given=given,
            health=health,
            health_every=min(config.student.health_every, max(1, iterations)),
            rank=f"fd_{max(self.watched(i))}" if "fd" in task.ranks else DRIFT,
            mend=mend(config) if self.guard else "",
            advice=f"lower config.methods.{method}'s learning rate and start in a new workdir",
            examples=config.student.batch_size,
        )

    def planned(self, i: int, iterations: int = 1) -> Training:
        """A stage as a training without data or weights, for its programs and what it keeps."""
        student, stage = self.task.config.student, self.recipe.stages[i]
        judged = bool(stage.serves) or stage.judged
        return Training(
            name=self.phase(i),
            objective=self.objective(i, iterations),
            params=dict,
            shapes=self.shapes(i),
            key=jax.random.key(0),
            batches=lambda i: None,
            given=self.given_shapes(i),
            health=lambda averages, step: {},
            steps=iterations,
            health_every=1,
            ema_decay=student.ema_decay,
            ema_of=student_of,
            accumulate=student.accumulate,
            keep_best=keep_best_of(student.keep_best, self.watched(i)) if judged else "",
            guard=self.guard if judged else None,
        )

    def watched(self, i: int) -> Sequence[int]:
        """The step counts that a stage's health line shows."""
        return tuple(self.recipe.stages[i].serves) or (max(self.task.config.student.steps),)

    def students(
        self,
        run: Runner,
        teacher: Any,
        null: Any,
        health: Callable[[str, Sequence[int], int], HealthFn],
    ) -> list[Student]:
        """Train all stages; what serves some number of steps, that of the most steps first.

        `health`: (phase, step counts, iterations) -> the phase's health function.
        """
        found, current = [], None
        for i, stage in enumerate(self.recipe.stages):
            line = health(self.phase(i), self.watched(i), self.iterations(i))
            training = self.training(i, teacher, null, current, line)
            if run.flops is not None:
                training = dataclasses.replace(training, flops=run.flops(i))
            trained = run.train(training)
            current = jax.tree.map(np.asarray, trained.state.ema_params)
            if stage.serves:
                found.append(Student(stage, current, trained.health, int(trained.state.step)))
        distributed.barrier("students are trained")
        return sorted(found, key=lambda student: -max(student.stage.serves))


def kinds_of(training: Training, batch: Any, layout: Layout) -> dict[str, Any]:
    """What the devices hold during a training, by kind: arrays without values, with their
    places.
    """
    made = programs(training, layout)
    state = made.state
    trained = (
        state.params if isinstance(training.objective.tx, Mapping) else {"teacher": state.params}
    )
    return {
        **trained,
        "average": state.ema_params,
        "optimizer": state.opt_state,
        "frozen": made.given,
        "batch": batch,
    }


def checkpoints_of(training: Training, kinds: Mapping[str, Any]) -> list[Records]:
    """What a training leaves on disk: the newest states, and its best line where it keeps one.
    `kinds`: of `kinds_of`.
    """
    state = {kind: tree for kind, tree in kinds.items() if kind not in ("frozen", "batch")}
    name, guard = training.name, training.guard
    found = [Records(f"checkpoints of {name}", KEPT, bytes_of(state))]
    if training.keep_best or (guard and guard.acts):
        best = state if guard and guard.returns else kinds["average"]
        found.append(Records(f"best line of {name}", 1, bytes_of(best)))
    return found


def _checked(found: Any, name: str) -> Any:
    """What a loss returned. Raises UserError unless it is a scalar and a dict of them."""
    value, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(metrics, Mapping) or not hasattr(value, "shape") or value.shape:
        said = jax.tree.map(np.shape, found)
        raise UserError(f"{name} must return (scalar, dict of scalars), got shapes {said}")
    return found


def mend(config: ConfigDict) -> str:
    """What there is to change, of the method's own settings, where a student goes wrong."""
    name = config.method.name
    settings = flatten(config.methods.to_dict().get(name, {}))
    flat = {f"config.methods.{name}.{k}": v for k, v in settings.items()}
    found = [f"{k}=trajectory" for k, v in flat.items() if k.endswith(".noise") and v == "fresh"]
    found += [f"a lower {k}" for k, v in flat.items() if k.endswith("adversarial_weight") and v]
    rates = [f"a lower {k}" for k in flat if k.endswith(".learning_rate")]
    return " or ".join([*found, "a lower learning rate"] if found or not rates else rates)


def keep_best_of(name: str, steps: Sequence[int]) -> str:
    """config.student.keep_best, where its number of steps is one of these; else nothing."""
    return name if name and int(name.rpartition("_")[2]) in steps else ""


def check_keep_best(name: str, numbers: Sequence[str], steps: Sequence[int]) -> None:
    """Raise ValueError where config.student.keep_best is none of the health numbers that are lower
    for a better student.
    """
    known = [f"{number}_{n}" for number in numbers for n in steps]
    if name and name not in known:
        raise ValueError(
            f"config.student.keep_best = {name!r} is not known; choose one of {', '.join(known)},"
            " or '' for the last averages"
        )
