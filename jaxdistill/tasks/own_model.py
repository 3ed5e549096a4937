"""A network of the user's own as a task, and `distill`: any method on it, from a notebook."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdistill import methods, partition, sampling
from jaxdistill.adversarial import FeatureFn
from jaxdistill.errors import UserError
from jaxdistill.interop import card
from jaxdistill.methods.recipe import AdversarialSettings, Kit, SamplerSpec, Stage, settings_block
from jaxdistill.model import Model, full_weights, low_rank
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.names import choose
from jaxdistill.prediction import check_pair
from jaxdistill.run import checkpoint
from jaxdistill.run.distillation import HEADS, Distillation
from jaxdistill.run.loop import (
    HealthFn,
    NonFiniteError,
    Seconds,
    StopSignal,
    Trained,
    read_curve,
)
from jaxdistill.run.phase import Training, programs
from jaxdistill.run.run import Run
from jaxdistill.run.seeds import key_of, seed_of
from jaxdistill.run.workdir import prepare_workdir, say
from jaxdistill.tasks.settings import adversarial_settings, check_config, student_settings

Stream = Callable[[int], Any] | Iterator[Any]
"""Batches: i -> batch i, or an iterator."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is distilled.

    Attributes:
      model: the network, its schedule, and what its output means.
      params: the teacher's parameters, a pytree of arrays; used in float32.
      image_shape: of one image (or latent, or vector), without the batch.
      conds: batches of conditioning, pytrees whose leaves all have as many rows. The rows of the
        first are the batch size.
      null_cond: cond -> null conditioning of the same structure. Needed for guidance alone.
      images: batches (x0, cond) of data, x0 as the teacher was trained on. Without it, methods that
        learn from images get the teacher's own.
      features: (params, x, t, cond) -> the network's hidden states [b, ..., c], a list. Needed by
        methods with a discriminator.
    """

    model: Model
    params: Any
    image_shape: Sequence[int]
    conds: Stream
    null_cond: Callable[[Any], Any] | None = None
    images: Stream | None = None
    features: FeatureFn | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is trained, whatever the method.

    Attributes:
      steps: step counts that are served.
      iterations: of all stages together.
      seed: of all randomness.
      guidance: the teacher's scale, which methods follow where `settings` do not say.
      teacher_steps: network calls of its images: the health numbers', and those of the pool.
      pool: its images where a method learns from them.
      grid, times: of methods on a trajectory: "trailing", or "nested": the first N of `times`.
      warmup, decay_to, weight_decay, adam_b2: of AdamW. decay_to: share of the rate at its end.
      ema_decay: of the averages, which are the student.
      accumulate: micro-batches of a step.
      lora_rank: above 0: low-rank updates of `lora_targets` alone, regular expressions of the ends
        of layers' names. Needs Flax parameters {"params": ...} with kernels.
      adversarial, heads_width: of a discriminator.
      health_every: iterations between health numbers.
      unroll: programs hold a copy of the network for each step, instead of a loop.
    """

    steps: Sequence[int] = (1, 2, 3)
    iterations: int = 1000
    seed: int = 0
    guidance: float = 1.0
    teacher_steps: int = 50
    pool: int = 2048
    grid: str = "trailing"
    times: Sequence[float] = ()
    warmup: int = 50
    decay_to: float = 0.02
    weight_decay: float = 0.0
    adam_b2: float = 0.999
    ema_decay: float = 0.995
    accumulate: int = 1
    lora_rank: int = 0
    lora_targets: Sequence[str] = (".*",)
    adversarial: AdversarialSettings = dataclasses.field(default_factory=AdversarialSettings)
    heads_width: int = 128
    health_every: int = 200
    unroll: bool = False


class Distilled:
    """A student.

    Attributes:
      params: {steps: its parameters}, of the teacher's structure.
      history: {phase: [{"step", "loss", ...} or {"step", "health/distance_N", ...}, ...]}.
    """

    def __init__(
        self,
        params: Mapping[int, Any],
        history: Mapping[str, list[dict[str, Any]]],
        grids: Mapping[int, np.ndarray],
        program: Callable[..., Any],
    ) -> None:
        self.params, self.history = dict(params), dict(history)
        self._grids, self._program = dict(grids), program

    def sample(self, noise: Any, cond: Any, steps: int) -> jax.Array:
        """Standard normal noise [b, ...], cond with b rows -> images [b, ...]. Raises UserError."""
        if steps not in self.params:
            served = ", ".join(map(str, self.params))
            raise UserError(f"steps = {steps} is not served by this student; use one of {served}")
        return self._program(self.params[steps], noise, cond, self._grids[steps])


def distill(
    problem: Problem,
    method: str = "imagine_flash",
    *,
    settings: Mapping[str, Any] | None = None,
    options: Options | None = None,
    workdir: str | Path | None = None,
) -> Distilled:
    """Distil a teacher by one of `METHODS`.

    Args:
      problem: the teacher and its inputs.
      method: a key of `METHODS`.
      settings: of the method: fields of `METHODS[method].settings`.
      options: of training.
      workdir: folder of checkpoints and curves: the same call resumes there. None trains in memory.

    Raises:
      UserError: in one line, for what cannot be.
      NonFiniteError: a loss is no finite number.
    """
    task = OwnModel(problem, method, settings or {}, options or Options())
    work = task.distillation
    work.check()
    teacher = task.params
    task.prepare()
    if workdir is None:
        memory = InMemory(task.layout)
        students = work.students(memory, teacher, {}, task.health)
        history = memory.history
    else:
        if task.iterators:
            raise UserError(
                "workdir needs streams that are functions of i: iterators do not resume"
            )
        config, folder = task.config, Path(workdir)
        prepare_workdir(folder, config)
        with StopSignal().installed() as stop:
            run = Run(config, folder, stop, task.layout)
            students = work.students(run, teacher, {}, task.health)
        phases = [work.phase(i) for i in range(len(work.recipe.stages))]
        history = {name: read_curve(folder / "curves" / f"{name}.jsonl") for name in phases}
    params: dict[int, Any] = {}
    for student in students:
        merged = jax.device_put(task.weights.merged(student.trained, teacher))
        params |= dict.fromkeys(student.stage.serves, merged)
    return Distilled(dict(sorted(params.items())), history, task.grids, task.program)


class OwnModel:
    """See `run.task.Task`. Raises UserError."""

    stacked = ""

    def __init__(
        self, problem: Problem, method: str, settings: Mapping[str, Any], options: Options
    ) -> None:
        if jax.process_count() > 1:
            raise UserError("distill is one process; several are jaxdistill.main's")
        self.problem, self.options = problem, options
        self.params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem.params)
        self.abstract = jax.eval_shape(lambda: self.params)
        self.image_shape = tuple(problem.image_shape)
        self.conds, self.cond = peeked(problem.conds, "conds")
        self.images = peeked(problem.images, "images")[0] if problem.images is not None else None
        self.iterators = any(isinstance(s, Iterator) for s in (problem.conds, problem.images))
        self.rows = len(jax.tree.leaves(self.cond)[0])
        self.layout, self.weights = partition.layout(), full_weights()
        self._heads = FeatureHeads(options.heads_width)
        self._pool: Any = None
        try:
            self._build(method, settings)
        except ValueError as error:  # these checks know the commands' names
            names = {f"config.methods.{method}": "settings", "config.method.name": "method"}
            names |= {"config.student.batch_size": "rows of conds", "config.student.": "options."}
            names |= {"config.": "options."}
            text = str(error)
            for theirs, ours in names.items():
                text = text.replace(theirs, ours)
            raise UserError(text) from None

    def _build(self, method: str, settings: Mapping[str, Any]) -> None:
        """The config and the recipe. Raises ValueError."""
        problem, options = self.problem, self.options
        kind = choose(methods.METHODS, method, "config.method.name").settings
        own = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
        adversarial = settings_block(own.pop("adversarial"))
        followed = following(kind, settings, options.guidance)
        self.config = ConfigDict(
            {
                "seed": options.seed,
                "method": {"name": method},
                "methods": {method: followed},
                "teacher": {"steps": options.teacher_steps, "guidance": options.guidance},
                "student": {**own, "batch_size": self.rows, "budget": 0, "keep_best": ""},
                "adversarial": {**adversarial, "pool": options.pool, "reals": "data"},
                "log": {"every": 50, "checkpoint_every": 500},
                "hash": checkpoint.tree_hash(self.params),
            }
        )
        check_config(self.config)
        check_pair(problem.model.schedule, problem.model.parameterization)
        partition.check_batch(self.rows, self.layout.mesh, "config.student.batch_size")
        if options.lora_rank:
            if not isinstance(problem.params, Mapping) or "params" not in problem.params:
                raise ValueError('options.lora_rank needs Flax parameters, {"params": ...}')
            key = key_of(options.seed, "lora")
            self.weights = low_rank(key, tuple(options.lora_targets), options.lora_rank)
            jax.eval_shape(self.weights.fresh, self.abstract)
        self.distillation = Distillation(self, methods.build(method, {method: followed}))
        self.recipe = self.distillation.recipe
        if problem.features is None and any(HEADS in s.networks for s in self.recipe.stages):
            raise ValueError(
                f"{method} trains a discriminator on the network's hidden states: give"
                " problem.features, or set adversarial_weight to 0 in settings where it has one"
            )
        self.distillation.check_batch()
        self.grids = {n: self.grid(self.recipe.sampler, n) for n in self.kit({}).steps}

    # -- what a method asks for

    def kit(self, null: Any) -> Kit:
        """The network and what the methods share."""
        problem = self.problem
        return Kit(
            network=self._network,
            null_cond=problem.null_cond or no_null,
            grid=self.grid,
            features=problem.features or (lambda *inputs: []),
            heads=self._heads.apply,
            student=student_settings(self.config.student),
            adversarial=adversarial_settings(self.config.adversarial),
            constrain=partition.constrain_batch(self.layout.mesh),
            unroll=self.options.unroll,
        )

    @cached_property
    def _network(self) -> Model:
        # Jitted, so that a loss of many calls traces the network once.
        return self.problem.model._replace(apply=jax.jit(self.problem.model.apply))

    def grid(self, spec: SamplerSpec, steps: int) -> np.ndarray:
        """A student's times. Raises ValueError."""
        T = self.problem.model.schedule.T
        return sampling.check_grid(
            card.build_grid(card.sampler_block(spec, steps=steps), steps, T), T
        )

    def frozen(self, tree: Any) -> Any:
        """Float32, as it is trained."""
        return tree

    def null_shapes(self) -> Any:
        """None: the function has it."""
        return {}

    def inside(self, tree: Any) -> Any:
        """As it is: the mesh has no "fsdp"."""
        return tree

    def student(self, teacher: Any) -> Any:
        """The teacher's weights, or updates of zero."""
        return self.weights.fresh(teacher)

    def batch_shapes(self, stage: Stage) -> dict[str, Any]:
        """Shapes of a batch, on the mesh."""
        x = jax.ShapeDtypeStruct((self.rows, *self.image_shape), jnp.float32)
        found: dict[str, Any] = {"x0": x, "cond": self.cond}
        found |= {"noise": x, "target": x} if stage.data == "pairs" else {}
        found |= {"real": x, "real_cond": self.cond} if stage.reals else {}
        return partition.described(found, partition.batch_sharding(self.layout.mesh))

    def heads(self, stage: Stage) -> Any:
        """First parameters of the stage's discriminator."""
        features = self.kit({}).features
        key = key_of(self.options.seed, f"discriminator {stage.name}")
        x, t = jnp.zeros((self.rows, *self.image_shape)), jnp.zeros((self.rows,))

        def states_of(*inputs: Any) -> Any:
            return stage.seen(features(*inputs))

        return fresh_heads(
            self._heads, key, states_of, self.abstract, x, t, self.cond, cond=self.cond
        )

    # -- data

    def batches(self, stage: Stage, name: str) -> Callable[[int], Any]:
        """Batches of a stage."""
        x0 = np.zeros((self.rows, *self.image_shape), np.float32)
        pairs = self.pool_batches(seed_of(self.options.seed, name)) if self._pool else None
        if stage.data == "pairs":
            assert pairs is not None
            return pairs

        def data(i: int) -> tuple[Any, Any]:
            if self.images is not None:
                x0, cond = self.images(i)
                return x0, cond
            assert pairs is not None
            drawn = pairs(i)
            return drawn["x0"], drawn["cond"]

        if stage.data == "images":
            return lambda i: dict(zip(("x0", "cond"), data(i), strict=True))
        if not stage.reals:
            return lambda i: {"x0": x0, "cond": self.conds(i)}
        names = ("real", "real_cond")
        return lambda i: {
            "x0": x0,
            "cond": self.conds(i),
            **dict(zip(names, data(i), strict=True)),
        }

    @property
    def guided(self) -> bool:
        """Whether the teacher's images take two rows of conditioning a call."""
        return self.options.guidance != 1.0

    def prepare(self) -> None:
        """The teacher's own images, where a stage learns from some and none were given, or from
        pairs: in memory, each beside the noise it comes from.
        """
        stages, pairs = self.recipe.stages, self.recipe.pairs
        wanted = any(stage.reals or stage.data == "images" for stage in stages)
        if not pairs and (not wanted or self.images is not None):
            return
        count = self.distillation.pair_count(self.guided) if pairs else self.options.pool
        steps = pairs.steps if pairs else self.options.teacher_steps
        solver = choose(card.SOLVERS, pairs.solver, "pairs_solver") if pairs else sampling.ddim
        draw = self.teacher_program(solver)
        grid = self.grid(SamplerSpec(), steps)
        key, made = key_of(self.options.seed, "pool"), []
        for i in tqdm(range(-(-count // self.rows)), desc="the teacher's images"):
            noise = jax.random.normal(jax.random.fold_in(key, i), (self.rows, *self.image_shape))
            cond = self.conds(i)
            made.append((noise, draw(self.params, noise, cond, grid), cond))
        self._pool = jax.tree.map(lambda *a: np.concatenate(a)[:count], *made)

    def pool_batches(self, seed: int) -> Callable[[int], Any]:
        """Rows of the pool, shuffled anew each epoch."""
        noise, target, cond = self._pool
        count = len(noise)

        def batch(i: int) -> dict[str, Any]:
            rows = []
            for n in range(i * self.rows, (i + 1) * self.rows):
                order = np.random.default_rng((seed, n // count)).permutation(count)
                rows.append(int(order[n % count]))
            return {
                "noise": noise[rows],
                "target": target[rows],
                "x0": target[rows],
                "cond": jax.tree.map(lambda a: a[rows], cond),
            }

        return batch

    # -- sampling

    def teacher_program(self, solver: Callable[..., sampling.Step]) -> Callable[..., jax.Array]:
        """(params, noise, cond, grid) -> the teacher's images."""
        model, null = self._network, self.problem.null_cond or no_null

        def draw(params: Any, noise: Any, cond: Any, grid: Any) -> jax.Array:
            denoiser = model.guided(params, cond, null, self.options.guidance)
            step = solver(model.schedule)
            return sampling.rollout(step, denoiser, sampling.start(noise), grid)[0].x

        return jax.jit(draw)

    @cached_property
    def program(self) -> Callable[..., jax.Array]:
        """(params, noise, cond, grid) -> the student's images."""
        model, spec = self._network, self.recipe.sampler
        T = model.schedule.T

        def draw(params: Any, noise: Any, cond: Any, grid: Any) -> jax.Array:
            denoiser = model.denoiser(params, cond)
            step = sampling.ddim(model.schedule)
            if spec.solver == "consistency":
                denoiser = sampling.consistency_function(T)(denoiser)
            if spec.solver != "ddim":
                step = sampling.renoise(model.schedule, sampling.keys_of(noise))
            elif spec.noise_correction:
                denoiser = sampling.noise_correction(noise, T)(denoiser)
            return sampling.rollout(step, denoiser, sampling.start(noise), grid)[0].x

        return jax.jit(draw)

    @cached_property
    def reference(self) -> tuple[Any, Any, Any]:
        """Noise, conditioning and the teacher's images of the health numbers."""
        noise = jax.random.normal(
            key_of(self.options.seed, "health"), (self.rows, *self.image_shape)
        )
        if steps := self.recipe.learns_from:
            grid = self.grid(self.recipe.sampler, steps)
            return noise, self.cond, self.program(self.params, noise, self.cond, grid)
        draw, spec = self.teacher_program(sampling.ddim), SamplerSpec()
        grid = self.grid(spec, self.options.teacher_steps)
        return noise, self.cond, draw(self.params, noise, self.cond, grid)

    def health(self, phase: str, steps: Sequence[int], last: int) -> HealthFn:
        """{"distance_N": root-mean-square distance to the teacher's images of the same noise}."""
        del last

        def line(trained: Any, step: int) -> dict[str, float]:
            noise, cond, images = self.reference
            params = self.weights.merged(trained, self.params)
            drawn = {n: self.program(params, noise, cond, self.grids[n]) for n in steps}
            found = {
                f"distance_{n}": float(jnp.sqrt(jnp.mean((x - images) ** 2)))
                for n, x in drawn.items()
            }
            text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            say(f"health  {phase} {step}: {text}")
            return found

        return line


class InMemory:
    """Trains without a workdir: nothing is written, and nothing resumes."""

    flops: Callable[[int], float] | None = None

    def __init__(self, layout: partition.Layout) -> None:
        self._layout = layout
        self.history: dict[str, list[dict[str, Any]]] = {}

    def train(self, training: Training) -> Trained:
        """One training to its end. Raises NonFiniteError."""
        layout, made = self._layout, programs(training, self._layout)
        state = made.start(layout.place(training.params()), key=training.key)
        given, records = layout.place(training.given), list[dict[str, Any]]()
        health: dict[str, float] = {}
        for i in tqdm(range(training.steps), desc=training.name):
            batch = partition.put_batch(training.batches(i), layout.mesh)
            state, metrics = made.step(state, batch, given)
            last = i + 1 == training.steps
            if (i + 1) % LOGGED == 0 or last:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                    raise NonFiniteError(
                        f"{training.name} step {i}: the loss or its gradient is no finite number;"
                        " lower the method's learning rate"
                    )
                records.append({"step": i + 1, **values})
            if (i + 1) % training.health_every == 0 or last:
                health = dict(training.health(state.ema_params, i + 1))
                records.append({"step": i + 1, **{f"health/{k}": v for k, v in health.items()}})
        self.history[training.name] = records
        return Trained(state, Seconds(0.0, 0.0), health)


LOGGED = 50
"""Steps between two records of the history."""


def peeked(stream: Stream, name: str) -> tuple[Callable[[int], Any], Any]:
    """A stream as a function of i, and its first batch. Raises UserError."""
    if not isinstance(stream, Iterator):
        first = stream(0)
        if not jax.tree.leaves(first):
            raise UserError(f"problem.{name} gives batches without arrays")
        return stream, first
    seen: list[Any] = [next(stream)]

    def batch(i: int) -> Any:
        # In order, whoever asks: an iterator has no position.
        return seen.pop() if seen else next(stream)

    return batch, seen[0]


def no_null(cond: Any) -> Any:
    """Raise UserError: guidance was asked for."""
    raise UserError("guidance other than 1 needs problem.null_cond: cond -> null conditioning")


def following(kind: Any, settings: Mapping[str, Any], guidance: float) -> dict[str, Any]:
    """A method's settings whose guidance is the teacher's, where they do not say."""
    block = dict(settings)
    for field in dataclasses.fields(kind):
        default = getattr(kind(), field.name)
        if field.name == "guidance":
            block.setdefault("guidance", guidance)
        elif dataclasses.is_dataclass(default) and isinstance(block.get(field.name, {}), Mapping):
            block[field.name] = following(type(default), block.get(field.name, {}), guidance)
    return block
