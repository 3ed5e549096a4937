"""A network of the user's own as a task."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import methods, partition, sampling
from jaxdistill.errors import UserError, choose
from jaxdistill.interop import card
from jaxdistill.methods.recipe import (
    Kit,
    Pairs,
    SamplerSpec,
    Stage,
    settings_block,
)
from jaxdistill.model import Model, full_weights, low_rank
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.prediction import check_pair
from jaxdistill.run import checkpoint
from jaxdistill.run.cost import Cost
from jaxdistill.run.distillation import HEADS, Distillation
from jaxdistill.run.loop import HealthFn
from jaxdistill.run.seeds import key_of, seed_of
from jaxdistill.run.workdir import say
from jaxdistill.tasks.own_model.problem import Options, Problem, following, no_null, peeked
from jaxdistill.tasks.settings import adversarial_settings, check_config, student_settings


class OwnModel:
    """See `run.task.Task`. Raises UserError."""

    ranks: Sequence[str] = ()

    def __init__(
        self, problem: Problem, method: str, settings: Mapping[str, Any], options: Options
    ) -> None:
        if jax.process_count() > 1:
            raise UserError("distill runs as one process; use jaxdistill.main for several")
        self.problem, self.options = problem, options
        self.params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem.params)
        if bad := checkpoint.not_finite(self.params):
            raise UserError(f"problem.params: {bad} has values that are not finite (NaN, infinite)")
        self.abstract = jax.eval_shape(lambda: self.params)
        self.image_shape = tuple(problem.image_shape)
        self.conds, self.first = peeked(problem.conds, "conds")
        self.cond = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.first))
        self.images = peeked(problem.images, "images")[0] if problem.images is not None else None
        self.iterators = any(isinstance(s, Iterator) for s in (problem.conds, problem.images))
        self.rows = len(jax.tree.leaves(self.cond)[0])
        self.layout, self.weights = partition.layout(), full_weights()
        self._heads = FeatureHeads(options.heads_width)
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
                f"{method} trains a discriminator on the network's hidden states; give"
                " problem.features, or set adversarial_weight = 0 in settings if it has one"
            )
        self.distillation.check_batch()
        self.grids = {n: self.grid(self.recipe.sampler, n) for n in self.kit({}).steps}

    def cost(self, *, on_disk: bool) -> Cost:
        """Of its trainings, which are in memory or on disk; without the teacher's images and the
        health numbers. Calls and FLOPs are those of dots and convolutions, and not counted for a
        network that has none.
        """
        work = self.distillation
        kept, counts = work.kept(work.largest), work.flops_of_a_call > 0
        checkpoints = work.checkpoints() if on_disk else []
        done = work.work(count=counts)
        return Cost(work.networks, kept, {}, done, [], self.rows, checkpoints)

    # -- what a method asks for (`run.task.Task`)

    def written(self) -> Distillation:
        """Its own: nothing is computed twice."""
        return self.distillation

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
        cond = jax.tree.map(jnp.asarray, self.first)

        def states_of(*inputs: Any) -> Any:
            return stage.seen(features(*inputs))

        return fresh_heads(self._heads, key, states_of, self.abstract, x, t, cond, cond=cond)

    # -- data

    def batches(self, stage: Stage, name: str) -> Callable[[int], Any]:
        """Batches of a stage; `prepare` first."""
        seed, x0 = seed_of(self.config.seed, name), np.zeros((self.rows, *self.image_shape), "f4")

        def images(i: int) -> tuple[Any, Any]:
            if self.images is not None:
                return self.images(i)
            drawn = self.drawn(seed, i)
            return drawn["target"], drawn["cond"]

        def batch(i: int) -> dict[str, Any]:
            if stage.data == "pairs":
                drawn = self.drawn(seed, i)
                return {**drawn, "x0": drawn["target"]}
            if stage.data == "images":
                return dict(zip(("x0", "cond"), images(i), strict=True))
            reals = dict(zip(("real", "real_cond"), images(i), strict=True)) if stage.reals else {}
            return {"x0": x0, "cond": self.conds(i), **reals}

        return batch

    def prepare(self) -> None:
        """Draw the teacher's images where the method's stages learn from them."""
        stages, options = self.recipe.stages, self.options
        images = any(stage.reals or stage.data == "images" for stage in stages)
        if self.recipe.pairs is None and not (images and self.images is None):
            return
        pairs = self.recipe.pairs or Pairs(0.0, 0, "ddim", options.teacher_steps)
        count = self.distillation.pair_count(False) if self.recipe.pairs else options.pool
        count = -(-count // self.rows)
        say(f"the teacher draws {count * self.rows} images, {pairs.steps} steps each")
        key = key_of(options.seed, "pool")
        shape = (self.rows, *self.image_shape)
        blocks = []
        for i in range(count):
            noise, cond = jax.random.normal(jax.random.fold_in(key, i), shape), self.conds(i)
            target = self.teacher_images(noise, cond, pairs.solver, pairs.steps)
            blocks.append(jax.device_get({"noise": noise, "target": target, "cond": cond}))
        self._pool = jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)

    def drawn(self, seed: int, i: int) -> dict[str, Any]:
        """Random rows {"noise", "target", "cond"} of the teacher's images, by (seed, i)."""
        generator, count = np.random.default_rng((seed, i)), len(self._pool["noise"])
        numbers = generator.integers(count, size=self.rows)
        return jax.tree.map(lambda a: a[numbers], self._pool)

    # -- images

    @cached_property
    def program(self) -> Callable[..., jax.Array]:
        """The student's sampler, jitted: (params, noise, cond, grid) -> images."""
        return jax.jit(partial(self.sample, self.recipe.sampler, 1.0))

    @cached_property
    def teacher_program(self) -> Callable[..., jax.Array]:
        """The teacher's, with its guidance: (solver, params, noise, cond, grid) -> images."""

        def sample(solver: str, *inputs: Any) -> jax.Array:
            return self.sample(SamplerSpec(solver), self.options.guidance, *inputs)

        return jax.jit(sample, static_argnums=0)

    def teacher_images(self, noise: Any, cond: Any, solver: str, steps: int) -> jax.Array:
        """From these noises. Raises ValueError for an unknown solver."""
        choose(card.SOLVERS, solver, "pairs_solver")
        grid = self.grid(SamplerSpec(), steps)
        return self.teacher_program(solver, self.params, noise, cond, grid)

    def sample(
        self, spec: SamplerSpec, scale: float, params: Any, noise: Any, cond: Any, grid: Any
    ) -> jax.Array:
        """Where a sampler ends."""
        kit = self.kit({})
        schedule = kit.network.schedule
        denoiser = kit.network.guided(params, cond, kit.null_cond, scale)
        if spec.solver == "consistency":
            f = sampling.boundary_function(schedule, kit.network.parameterization)
            denoiser = f(denoiser)
        if spec.noise_correction:
            denoiser = sampling.noise_correction(noise, schedule.T)(denoiser)
        solver = card.SOLVERS.get(spec.solver)
        step = solver(schedule) if solver else sampling.renoise(schedule, sampling.keys_of(noise))
        return sampling.rollout(step, denoiser, sampling.start(noise), grid)[0].x

    def health(self, phase: str, steps: Sequence[int], last: int) -> HealthFn:
        """On fixed noises: distance_N, root mean square, of the student's images of N steps from
        the teacher's; and spread_N, theirs over the batch as a share of the teacher's.
        """
        shape = (self.rows, *self.image_shape)
        noise = jax.random.normal(key_of(self.options.seed, "health"), shape)
        if several := self.recipe.learns_from:  # a student stands in the teacher's place
            grid = self.grid(self.recipe.sampler, several)
            wanted = self.program(self.params, noise, self.first, grid)
        else:
            wanted = self.teacher_images(noise, self.first, "ddim", self.options.teacher_steps)

        def line(trained: Any, step: int) -> dict[str, float]:
            params, numbers = self.weights.merged(trained, self.params), {}
            for n in steps:
                grid = self.grid(self.recipe.sampler, n)
                drawn = self.program(params, noise, self.first, grid)
                numbers[f"distance_{n}"] = float(jnp.sqrt(jnp.mean((drawn - wanted) ** 2)))
                spreads = [float(jnp.mean(jnp.std(x, axis=0))) for x in (drawn, wanted)]
                numbers[f"spread_{n}"] = spreads[0] / spreads[1]
            text = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
            say(f"health  {phase} {step}: {text}")
            return numbers

        return line
