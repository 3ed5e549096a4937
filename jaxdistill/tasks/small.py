"""What the tasks with small networks of this package share: labelled images and scenes.

A subclass says what its data, its conditioning and its scores are.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import methods, partition
from jaxdistill.costs.flops import flops_of
from jaxdistill.errors import choose
from jaxdistill.interop import card
from jaxdistill.methods.denoising import denoising
from jaxdistill.methods.recipe import Kit, SamplerSpec, Stage, adamw
from jaxdistill.methods.trajectories import unique_grids
from jaxdistill.model import Model, full_weights, low_rank
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.prediction import LossFn, check_pair
from jaxdistill.run import checkpoint, distributed, inputs, report
from jaxdistill.run.cost import Cost, Records, Work, bytes_a_device
from jaxdistill.run.distillation import Distillation, Student, checkpoints_of, kinds_of
from jaxdistill.run.loop import HealthFn
from jaxdistill.run.phase import Training
from jaxdistill.run.run import Run
from jaxdistill.run.seeds import key_of, seed_of
from jaxdistill.run.workdir import UserError, say
from jaxdistill.sampling import TimeGrid, check_grid
from jaxdistill.tasks.health import Health
from jaxdistill.tasks.settings import (
    REALS,
    adversarial_settings,
    check_config,
    check_grids,
    student_settings,
)
from jaxdistill.train import Objective, gradient_of

Batches = Callable[[int], Any]


class Sampled(NamedTuple):
    """One row of a table: who draws, with how many steps, and at which guidance scale; its
    parameters where they are known.
    """

    model: str
    steps: int
    guidance: float
    sampler: card.Sampler
    params: Any = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        return {"model": self.model, "steps": self.steps, "guidance": self.guidance}

    @property
    def grid(self) -> TimeGrid:
        """Its times."""
        return self.sampler.grid(self.steps)


class SmallTask:
    """A network of `jaxdistill.models.small` on images of one shape; see `run.task.Task`.

    Args:
      config: of the run.
      about: the card's "data": {"name", "image_shape", "range", ...}.
      cond: shapes of one row of conditioning, a pytree.
      text: the card's "text", for networks that read captions.
      devices: how many, to count on; those of this run by default.
      share: a task of the same data. If its network is the same its compiled programs serve as
        well, and losses are not traced in advance.

    Attributes:
      data: what the runs of a list share: data, and the networks of the scores; `made_from()` says
        what they are made from.
      columns: {key of a row: (title, format)} of a run's table.
      shown: keys of the table in a run's picture.
      charted: {key: title} of the scores in a chart of methods.

    Raises:
      ValueError: in one line, for what can be known before any work.
    """

    ranks: Sequence[str] = ("fd", "distance")
    data: Any
    columns: Mapping[str, tuple[str, str]]
    shown: Sequence[str]
    charted: Mapping[str, str]

    def __init__(
        self,
        config: ConfigDict,
        *,
        about: Mapping[str, Any],
        model: Mapping[str, Any],
        cond: Any,
        text: Mapping[str, Any] | None = None,
        share: "SmallTask | None" = None,
        devices: int | None = None,
    ) -> None:
        check_config(config)
        check_grids(config)
        self.config, self.cond = config, cond
        self.image_shape: tuple[int, ...] = tuple(about["image_shape"])
        self.common = {
            "format": card.FORMAT,
            "model": dict(model),
            "schedule": config.schedule.to_dict(),
            "prediction": config.prediction,
            "data": dict(about),
            **({"text": dict(text)} if text else {}),
        }
        self.model = card.build_model(model)
        self.schedule = card.build_schedule(config.schedule.to_dict())
        found = choose(card.PREDICTIONS, config.prediction, "config.prediction")
        self.parameterization, self.target = found
        check_pair(self.schedule, self.parameterization)
        self.layout = partition.layout(config.mesh.to_dict(), devices=devices)
        for phase in ("teacher", "student"):
            name = f"config.{phase}.batch_size"
            partition.check_batch(config[phase].batch_size, self.layout.mesh, name)
        same = share if share and share.common == self.common else None
        x = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        self.abstract: Any = same.abstract if same else card.check_model(self.model, x, cond)
        self.weights = full_weights()
        if rank := config.student.lora_rank:
            key = key_of(config.seed, "lora")
            self.weights = low_rank(key, tuple(config.student.lora_targets), rank)
            jax.eval_shape(self.weights.fresh, self.abstract)  # tells of bad targets
        self._null_cond: Any = self.model.null_cond
        # Jitted, so that a loss of many calls traces the network once.
        apply, features = jax.jit(self.model.apply), partial(self.model.apply, features=True)
        self._network = Model(apply, self.schedule, self.parameterization)
        self._features = jax.jit(features)
        if same:
            self._network, self._features = same._network, same._features
        self._heads = FeatureHeads(config.adversarial.width)
        self._open_method()
        self._programs: dict[Any, Any] = same._programs if same else {}
        self._pool: Any = None
        self._pairs: Any = None
        self.check()
        if not same:
            self.distillation.check()

    def _open_method(self) -> None:
        """The recipe, and the samplers of teacher and student. Raises ValueError."""
        config = self.config
        build = methods.build(config.method.name, config.methods.to_dict())
        self.distillation: Distillation = Distillation(self, build)
        self.recipe = self.distillation.recipe
        learned = self.recipe.learns_from
        if learned and not self.teacher_path:
            raise ValueError(
                f"config.teacher.path is empty, but config.method.name = {config.method.name!r}"
                " needs the student/ folder of a finished run"
            )
        self.teacher_sampler = self._teacher_sampler()
        self.student_sampler = self.sampler("student", self.recipe.sampler, steps=self.shown_steps)
        self.teacher_sampler.grid(self.teacher_sampler.card["sampler"]["steps"])
        self.grids = {n: self.student_sampler.grid(n) for n in self.kit({}).steps}

    @classmethod
    def planned(cls, config: ConfigDict, devices: int | None = None) -> "SmallTask":
        """For its cost, on so many devices. Raises ValueError."""
        return cls(config, devices=devices)  # type: ignore[call-arg]

    # -- what a method asks for (`run.task.Task`)

    def written(self) -> Distillation:
        """Its own: nothing is computed twice."""
        return self.distillation

    def kit(self, null: Any) -> Kit:
        """The network and what the methods share; it has its null conditioning in itself."""
        config = self.config
        return Kit(
            network=self._network,
            null_cond=self._null_cond,
            grid=self.grid,
            features=self._features,
            heads=self._heads.apply,
            student=student_settings(config.student),
            adversarial=adversarial_settings(config.adversarial),
            constrain=partition.constrain_batch(self.layout.mesh),
            unroll=config.compute.unroll,
        )

    def grid(self, spec: SamplerSpec, steps: int) -> TimeGrid:
        """A student's times. Raises ValueError."""
        block = card.sampler_block(spec, steps=steps)
        return check_grid(card.build_grid(block, steps, self.schedule.T), self.schedule.T)

    def frozen(self, tree: Any) -> Any:
        """Float32, as it is trained."""
        return tree

    def null_shapes(self) -> Any:
        """None: the network has it."""
        return {}

    def inside(self, tree: Any) -> Any:
        """Whole over "fsdp"."""
        return self.layout.gathered(tree)

    def student(self, teacher: Any) -> Any:
        """The teacher's weights, or updates of zero."""
        return self.weights.fresh(teacher)

    def cond_shapes(self, rows: int) -> Any:
        """Shapes of a batch's conditioning."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), self.cond
        )

    def batch_shapes(self, stage: Stage) -> dict[str, Any]:
        """Shapes of a batch, on the mesh."""
        rows = self.config.student.batch_size
        images = jax.ShapeDtypeStruct((rows, *self.image_shape), jnp.float32)
        found = {"x0": images, "cond": self.cond_shapes(rows)}
        if stage.data == "pairs":
            found |= {"noise": images, "target": images}
        if stage.reals:
            found |= {"real": images, "real_cond": found["cond"]}
        return partition.described(found, partition.batch_sharding(self.layout.mesh))

    def heads(self, stage: Stage) -> Any:
        """First parameters of the stage's discriminator."""
        key = key_of(self.config.seed, f"discriminator {stage.name}")
        x, t = jnp.zeros((1, *self.image_shape)), jnp.zeros((1,))

        def states_of(*inputs: Any) -> Any:
            return stage.seen(self._features(*inputs))

        inputs = (self.abstract, x, t, self.cond)
        return fresh_heads(self._heads, key, states_of, *inputs, cond=self.cond)

    # -- samplers

    @property
    def shown_steps(self) -> int:
        """Of a student where nobody says how many: 3, or the most that it is trained for."""
        steps = self.config.student.steps
        return max((n for n in steps if n <= 3), default=min(steps))

    def sampler(
        self, role: str, spec: SamplerSpec, *, steps: int, guidance: float = 1.0
    ) -> card.Sampler:
        """A sampler with its card."""
        block = card.sampler_block(spec, steps=steps, guidance=guidance)
        return card.build_sampler({**self.common, "role": role, "sampler": block})

    def _teacher_sampler(self) -> card.Sampler:
        """Of the reference images: the config's, or that of the student in the teacher's place."""
        block, recipe = self.config.teacher, self.recipe
        if recipe.learns_from:
            return self.sampler("teacher", recipe.sampler, steps=recipe.learns_from)
        spec = SamplerSpec(block.solver, block.grid)
        return self.sampler("teacher", spec, steps=block.steps, guidance=block.guidance)

    def program(self, sampler: card.Sampler, guidance: float) -> Callable[..., Any]:
        """(params, noise [b, h, w, c], cond, grid [n]) -> images [b, h, w, c] in [0, 1], jitted
        once for all that ask.
        """
        block = sampler.card["sampler"]
        correct = block["noise_correction"]
        key = ("sample", guidance, block["solver"], correct)
        if key not in self._programs:
            sample = partial(sampler.sample, guidance=guidance, correct_noise=correct)
            self._programs[key] = jax.jit(sample)
        return self._programs[key]

    def draw(
        self, sampled: Sampled, conds: Callable[[np.ndarray], Any], count: int, seed: int
    ) -> np.ndarray:
        """Images [count, h, w, c] in [0, 1]; image i has the noise (seed, i) and conditioning i.

        All processes draw, each its part, and hold all.
        """
        make, blocks = self._blocks(sampled, conds, count, seed)
        return np.concatenate(distributed.divided(blocks, make))[:count]

    def _blocks(
        self, sampled: Sampled, conds: Callable[[np.ndarray], Any], count: int, seed: int
    ) -> tuple[Callable[[int], np.ndarray], int]:
        """Number of a block -> its images, and how many there are. All processes must call it."""
        block = min(self.config.eval.batch_size, count)
        program = self.program(sampled.sampler, sampled.guidance)
        params, grid = self.layout.place(sampled.params), jnp.asarray(sampled.grid)
        params = partition.local(params)

        def make(i: int) -> np.ndarray:
            rows = np.arange(i * block, (i + 1) * block)
            noise = card.noise_of(seed, jnp.asarray(rows), self.image_shape)
            return np.asarray(program(params, noise, conds(np.minimum(rows, count - 1)), grid))

        return make, -(-count // block)

    def student_images(
        self, params: Any, steps: Sequence[int], noise: Any, cond: Any
    ) -> dict[int, np.ndarray]:
        """{steps: images} on the same noise, one trajectory for all that share a grid's prefix."""
        sampler, grids = self.student_sampler, {n: self.grids[n] for n in steps}
        block = sampler.card["sampler"]
        if block["solver"] != "ddim":  # a state of theirs is no shorter sampler's image
            program = self.program(sampler, 1.0)
            drawn = {n: program(params, noise, cond, jnp.asarray(g)) for n, g in grids.items()}
            return {n: np.asarray(images) for n, images in drawn.items()}
        correct = block["noise_correction"]
        if ("visited", correct) not in self._programs:
            visited = partial(sampler.visited, correct_noise=correct)
            self._programs["visited", correct] = jax.jit(visited)
        images: dict[int, np.ndarray] = {}
        for grid in unique_grids(list(grids.values())):
            states = self._programs["visited", correct](params, noise, cond, jnp.asarray(grid))
            shared = [n for n, g in grids.items() if np.array_equal(g, grid[: len(g)])]
            images |= {n: np.asarray(states[n - 1]) for n in shared if n not in images}
        return dict(sorted(images.items()))

    # -- what a subclass says

    def image_batches(self, size: int, seed: int, rows: np.ndarray | None) -> Batches:
        """A process's rows of batch i of the training data: {"x0" in [-1, 1], "cond"}."""
        raise NotImplementedError

    def noise_batches(self, size: int, seed: int, rows: np.ndarray | None) -> Batches:
        """As `image_batches`, where "x0" need only have the shape."""
        return self.image_batches(size, seed, rows)

    def train_conds(self, numbers: np.ndarray) -> Any:
        """Conditioning of training, by number: for pools and pairs; and its name for a cache."""
        raise NotImplementedError

    def conds_key(self) -> Any:
        """What `train_conds` depends on, as JSON."""
        raise NotImplementedError

    def health_conds(self, numbers: np.ndarray) -> Any:
        """Conditioning of the health lines' images, by number."""
        raise NotImplementedError

    def health_groups(self, count: int) -> np.ndarray:
        """Which of these images should differ by their noise alone."""
        raise NotImplementedError

    def quick(self, images: np.ndarray) -> dict[str, float]:
        """Scores on validation for a health line."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError for settings that only this task has."""

    def drawn(self, sampled: Sampled) -> tuple[tuple[np.ndarray, ...], float]:
        """The sets of images that are scored, the pictured ones first, and images a second."""
        raise NotImplementedError

    @property
    def scored(self) -> int:
        """How many images those are."""
        return int(self.config.eval.samples)

    def scores(self, *images: np.ndarray) -> Any:
        """Of `drawn`: a NamedTuple with at least "fd"."""
        raise NotImplementedError

    def captions(self) -> Sequence[str]:
        """Of the first images, which a picture shows."""
        raise NotImplementedError

    def reals(self) -> dict[str, Any]:
        """What real images score: "ceiling" {score: value}, "floor_fd" of two halves of them."""
        raise NotImplementedError

    def protocol(self) -> dict[str, Any]:
        """What scores depend on, beside the sampler: what all tasks have."""
        ev = self.config.eval
        common = {"split": ev.split, "samples": ev.samples, "sampling_seed": ev.seed}
        return {**common, "pixel_range": [0.0, 1.0]}

    def notes(self) -> str:
        """Below a table."""
        raise NotImplementedError

    def write_more(self, folder: Path, served: Mapping[int, Any]) -> None:
        """Files of a run beside its exports."""

    # -- data

    def batches(self, stage: Stage, name: str) -> Batches:
        """This process's rows of a stage's batches."""
        config, size = self.config, self.config.student.batch_size
        seed, rows = seed_of(config.seed, name), partition.process_rows(self.layout.mesh, size)
        pool = config.adversarial.reals == "teacher" and (stage.reals or stage.data == "images")
        if stage.data == "pairs":
            return self.pair_batches(size, seed, rows)
        if not pool:
            make = (
                self.image_batches if stage.reals or stage.data == "images" else self.noise_batches
            )
            data = make(size, seed, rows)
            return (lambda i: with_reals(b := data(i), b)) if stage.reals else data
        reals = self.pool_batches(size, seed_of(config.seed, f"{name} reals"), rows)
        if stage.data == "images":
            return reals
        data = self.noise_batches(size, seed, rows)
        return lambda i: with_reals(data(i), reals(i))

    def prepare(self, run: Run, teacher: Any) -> None:
        """The caches that the method's stages need, made where they are missing."""
        made = {
            name: self._teacher_cache(run, name, what, sampled._replace(params=teacher), count)
            for name, (what, sampled, count) in self.caches.items()
        }
        self._pool, self._pairs = made.get("pool"), made.get("pairs")

    @property
    def caches(self) -> dict[str, tuple[str, Sampled, int]]:
        """The teacher's images that the method's stages need: {name: (what they are, who draws
        them, how many)}.
        """
        config, found = self.config, dict[str, tuple[str, Sampled, int]]()
        guidance = config.teacher.guidance
        wanted = any(stage.reals or stage.data == "images" for stage in self.recipe.stages)
        if config.adversarial.reals == "teacher" and wanted:
            sampled = Sampled("teacher", config.teacher.steps, guidance, self.teacher_sampler)
            found["pool"] = (REALS, sampled, config.adversarial.pool)
        if pairs := self.recipe.pairs:
            choose(card.SOLVERS, pairs.solver, "pairs_solver")
            spec = SamplerSpec(pairs.solver, config.teacher.grid)
            sampler = self.sampler("teacher", spec, steps=pairs.steps)
            sampled = Sampled("teacher", pairs.steps, guidance, sampler)
            found["pairs"] = ("pairs", sampled, self.distillation.pair_count(guidance != 1.0))
        return found

    # -- cost

    def cost(self, *, plan: bool = False) -> Cost:
        """Of a run or, the same, for a plan; but for health lines and the networks of the scores.
        Most of what is traced for it serves the training as well.
        """
        del plan
        work, found = self.distillation, list[Work]()
        rows, kept = self.config.student.batch_size, work.kept(work.largest)
        checkpoints = work.checkpoints()
        if not self.teacher_path:
            teacher = self._teacher_training(lambda i: None, lambda params, step: {})
            batch = self._teacher_batch()
            kinds = kinds_of(teacher, batch, self.layout)
            held = {kind: bytes_a_device(tree) for kind, tree in kinds.items()}
            kept = max(kept, held, key=lambda kinds: sum(kinds.values()))
            checkpoints = [*checkpoints_of(teacher, kinds), *checkpoints]
            key = jax.eval_shape(jax.random.key, 0)
            step = gradient_of(teacher.objective.loss)
            flops = teacher.steps * flops_of(step, self.abstract, None, batch, key)
            found.append(Work("teacher", teacher.steps, flops / work.flops_of_a_call, flops))

        def drawing(name: str, images: int, sampled: Sequence[Sampled]) -> Work:
            one = [len(s.grid) * (2 if s.guidance != 1.0 else 1) for s in sampled]
            calls = images * sum(one) / rows
            return Work(name, 0, calls, calls * work.flops_of_a_call)

        found += [drawing(what, n, [sampled]) for what, sampled, n in self.caches.values()]
        found += work.work()
        found.append(drawing("evaluation", self.scored, self.sampled()))
        record = 2 * 4 * math.prod(self.image_shape) + 8
        records = [Records(what, n, record) for what, _, n in self.caches.values()]
        return Cost(work.networks, kept, {}, found, records, rows, checkpoints)

    def _teacher_batch(self) -> dict[str, Any]:
        """Shapes of a batch of the teacher's training, on the mesh."""
        rows = self.config.teacher.batch_size
        images = jax.ShapeDtypeStruct((rows, *self.image_shape), jnp.float32)
        found = {"x0": images, "cond": self.cond_shapes(rows)}
        return partition.described(found, partition.batch_sharding(self.layout.mesh))

    def _teacher_cache(self, run: Run, name: str, what: str, sampled: Sampled, count: int) -> Any:
        """Records {"noise", "target", "number"} of the teacher's images in [-1, 1]."""
        from jaxdistill.run.record_cache import key_of as cache_key

        seed, size = seed_of(self.config.seed, name), min(self.config.eval.batch_size, 100)
        params = partition.local(self.layout.place(sampled.params))
        program, grid = self.program(sampled.sampler, sampled.guidance), jnp.asarray(sampled.grid)

        def make(numbers: list[int]) -> dict[str, np.ndarray]:
            rows = np.asarray(numbers)
            noise = card.noise_of(seed, jnp.asarray(rows), self.image_shape)
            images = program(params, noise, self.train_conds(rows), grid)
            return {
                "noise": np.asarray(noise),
                "target": np.asarray(images) * 2.0 - 1.0,
                "number": rows.astype(np.int64)[:, None],
            }

        hashed = checkpoint.tree_hash(sampled.params)
        about = [sampled.sampler.card, sampled.guidance, seed, self.conds_key()]
        key = cache_key(hashed, about, count)
        return run.cache(name, key, count, make, what, rows=min(size, count))

    def pool_batches(self, size: int, seed: int, rows: np.ndarray) -> Batches:
        """The teacher's images as data."""
        stream = self._pool.batches(size, seed, rows)

        def batch(i: int) -> dict[str, Any]:
            records = stream(i)
            return {"x0": records["target"], "cond": self.train_conds(records["number"][:, 0])}

        return batch

    def pair_batches(self, size: int, seed: int, rows: np.ndarray) -> Batches:
        """Noises and where the teacher goes from them."""
        stream = self._pairs.batches(size, seed, rows)

        def batch(i: int) -> dict[str, Any]:
            records = stream(i)
            cond = self.train_conds(records["number"][:, 0])
            pairs = {"noise": records["noise"], "target": records["target"]}
            return {**pairs, "x0": records["target"], "cond": cond}

        return batch

    def made_from(self) -> dict[str, inputs.Input]:
        """What a run of this task is made from, by name. Raises UserError."""
        found: dict[str, inputs.Input] = self.data.made_from()
        if self.teacher_path:
            path = Path(self.teacher_path, "card.json")  # has the checksums of all its files
            found["the teacher (config.teacher.path)"] = inputs.files([path])
        return found

    # -- the teacher

    @property
    def teacher_path(self) -> str:
        """Of a finished teacher, "" where one is trained."""
        return self.config.teacher.path

    def teacher(self, run: Run) -> Any:
        """The teacher's parameters, host arrays: from its export, from config.teacher.path, or
        trained.
        """
        folder, given = run.workdir / "teacher", self.teacher_path
        if (folder / "card.json").exists():
            return checkpoint.load_export(folder)[0]
        if given:
            params = self.given_teacher(Path(given))
            checkpoint.export(folder, params, self.teacher_sampler.card)
            return params
        size = self.config.teacher.batch_size
        rows = partition.process_rows(self.layout.mesh, size)
        batches = self.image_batches(size, seed_of(self.config.seed, "teacher"), rows)
        state = run.train(self._teacher_training(batches, self.teacher_health(run))).state
        checkpoint.export(folder, state.ema_params, self.teacher_sampler.card)
        return jax.tree.map(np.asarray, state.ema_params)

    @cached_property
    def _teacher_loss(self) -> LossFn:
        config = self.config.teacher
        return denoising(
            self.model.apply,
            schedule=self.schedule,
            target=self.target,
            null_cond=self._null_cond,
            drop_cond=config.drop_cond,
            time_skew=config.time_skew,
            constrain=partition.constrain_batch(self.layout.mesh),
        )

    def _teacher_training(self, batches: Batches, health: HealthFn) -> Training:
        config = self.config.teacher
        optimizer = adamw(
            config.learning_rate,
            config.iterations,
            warmup=config.warmup,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
        )
        return Training(
            name="teacher",
            objective=Objective(self._teacher_loss, optimizer),
            params=self.first_params,
            shapes=self.abstract,
            key=key_of(self.config.seed, "teacher"),
            batches=batches,
            given=None,
            health=health,
            steps=config.iterations,
            health_every=config.health_every,
            ema_decay=config.ema_decay,
            advice="lower config.teacher.learning_rate and start in a new workdir",
            examples=config.batch_size,
        )

    def first_params(self) -> Any:
        """A fresh network."""
        x, t = jnp.zeros((1, *self.image_shape)), jnp.zeros((1,))
        cond = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.cond)
        return jax.jit(self.model.init)(key_of(self.config.seed, "network"), x, t, cond)

    def teacher_health(self, run: Run) -> HealthFn:
        """Scores and a picture of the teacher at config.log.teacher_steps."""
        count, sampler = self.config.log.health_samples, self.teacher_sampler
        noise, cond = self.health_inputs()
        grid = jnp.asarray(sampler.grid(self.config.log.teacher_steps))
        program = self.program(sampler, sampler.card["sampler"]["guidance"])
        shown = report.counted(len(grid))

        def line(params: Any, step: int) -> dict[str, float]:
            images = np.asarray(program(params, noise, cond, grid))
            path = run.workdir / "samples" / f"teacher_{step:07d}.png"
            report.save_grid(path, images[:100])
            found = self.quick(images)
            text = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
            where = f"teacher {step}/{self.config.teacher.iterations}, {shown}"
            say(f"health  {where}: {text} (validation, {count} images)")
            return found

        return line

    def given_teacher(self, folder: Path) -> Any:
        """The parameters of another run's teacher (or student, where the method learns from one),
        if it is what the config describes. Raises UserError.
        """
        where = f"config.teacher.path={folder}"
        params, found = checkpoint.load_export(folder)
        if found.get("role") not in ("teacher", "student"):
            raise UserError(
                f"{where} holds a {found.get('role')}; give the teacher/ folder of a run"
            )
        mine = json.loads(json.dumps(self.teacher_sampler.card))
        if mine["data"]["image_shape"] != list(found["data"]["image_shape"]):
            raise UserError(
                f"{where} draws images of shape {found['data']['image_shape']}, but the data has"
                f" {mine['data']['image_shape']}; give a teacher of this data"
            )
        for key in ("model", "schedule", "prediction", "text"):
            if mine.get(key) != found.get(key):
                raise UserError(
                    f"{where} was trained with {key} = {found.get(key)}, but the config says"
                    f" {mine.get(key)}; change the config"
                )
        if self.recipe.learns_from:
            if found["role"] != "student":
                name = self.config.method.name
                raise UserError(
                    f"{where} holds a teacher, but config.method.name = {name!r} needs the student/"
                    " folder of a run"
                )
            for key in ("solver", "grid", "times", "noise_correction"):
                here, there = mine["sampler"][key], found["sampler"][key]
                if here != there:
                    raise UserError(
                        f"{where} has sampler.{key} = {there}, but the config says {here}; change"
                        " one of them"
                    )
        return params

    # -- health

    def health_inputs(self) -> tuple[Any, Any]:
        """Noises and conditioning of the health lines."""
        count = self.config.log.health_samples
        noise = card.noise_of(
            seed_of(self.config.seed, "health"), jnp.arange(count), self.image_shape
        )
        return noise, self.health_conds(np.arange(count))

    def health(self, run: Run, teacher: Any) -> Health:
        """The student's lines."""
        sampler, block = self.teacher_sampler, self.teacher_sampler.card["sampler"]
        noise, cond = self.health_inputs()
        program = self.program(sampler, block["guidance"])
        grid = jnp.asarray(sampler.grid(block["steps"]))
        reference = np.asarray(program(teacher, noise, cond, grid))
        text = ", ".join(f"{k} {v:.3f}" for k, v in self.quick(reference).items())
        who = f"teacher, {report.counted(len(grid))}"
        say(f"health  {who}: {text} (validation, {len(reference)} images)")
        base = jax.device_put(teacher)

        def draw(trained: Any, steps: Sequence[int]) -> dict[int, tuple[np.ndarray, None]]:
            merged = self.weights.merged(trained, base)
            images = self.student_images(merged, steps, noise, cond)
            return {n: (drawn, None) for n, drawn in images.items()}

        return Health(
            reference=reference,
            groups=self.health_groups(len(reference)),
            draw=draw,
            folder=run.workdir / "samples",
            quick=self.quick,
        )

    # -- the student

    def students(self, run: Run, teacher: Any) -> list[Student]:
        """Trained, or from the checkpoints. `prepare` first."""
        return self.distillation.students(run, teacher, {}, self.health(run, teacher).of)

    def exported(self, run: Run) -> dict[int, Any]:
        """{steps: parameters} of a finished run's exports, {} where some are missing, or the run
        is to go on.
        """
        found: dict[int, Any] = {}
        wanted = self.config.student.iterations if len(self.recipe.stages) == 1 else 0
        for card_file in run.workdir.glob("student*/card.json"):
            params, about = checkpoint.load_export(card_file.parent)
            if about.get("iterations", wanted) < wanted:
                return {}
            found |= dict.fromkeys(about["serves"], params)
        whole = found.keys() >= set(self.config.student.steps)
        return dict(sorted(found.items())) if whole else {}

    def served(self, run: Run, teacher: Any) -> dict[int, Any]:
        """{steps: parameters} of the students: from their exports, or trained and exported."""
        if found := self.exported(run):
            return found
        self.prepare(run, teacher)
        return self.export(run, self.students(run, teacher), teacher)

    def export(self, run: Run, students: Sequence[Student], teacher: Any) -> dict[int, Any]:
        """student/ and a folder for each stage beside it; {steps: merged parameters}."""
        served: dict[int, Any] = {}
        for student in students:
            params = jax.tree.map(np.asarray, self.weights.merged(student.trained, teacher))
            steps = max(student.stage.serves)
            name = "student" if student is students[0] else f"student_{report.slug(steps)}"
            shown = max((n for n in student.stage.serves if n <= 3), default=steps)
            block = {**self.student_sampler.card["sampler"], "steps": shown}
            about = {"method": self.config.method.name, "iterations": student.iterations}
            about |= {"seed": self.config.seed, "serves": list(student.stage.serves)}
            full = {**self.student_sampler.card, "sampler": block, **about}
            checkpoint.export(run.workdir / name, params, full)
            served |= dict.fromkeys(student.stage.serves, params)
        return dict(sorted(served.items()))

    # -- the run

    def execute(self, run: Run) -> dict[str, Any]:
        """The whole job; returns what results.json holds, {} in processes other than the first."""
        if self.teacher_path and not (run.workdir / "teacher").exists():
            self.given_teacher(Path(self.teacher_path))
        run.check_inputs(self.made_from())
        run.keep_inputs()
        self.data.open(run)
        teacher = self.teacher(run)
        served = self.served(run, teacher)
        # Exports and checkpoints are on disk: a signal from here on may end the process at once.
        run.place.stop.release()
        if distributed.is_main():
            self.write_more(run.workdir, served)
        distributed.barrier("exports are written")
        return self.evaluate(run, teacher, served)

    def sampled(self) -> list[Sampled]:
        """Who is scored, the reference first; without parameters."""
        config, sampler = self.config, self.teacher_sampler
        steps, scale = (sampler.card["sampler"][key] for key in ("steps", "guidance"))
        counts, found = sorted(set(config.student.steps)), list[Sampled]()
        if "teacher" in config.eval.models:
            keys = [(steps, g) for g in (scale, *config.eval.guidances)]
            keys += [(n, scale) for n in counts]
            found += [Sampled("teacher", n, g, sampler) for n, g in dict.fromkeys(keys)]
        if "student" in config.eval.models:
            found += [Sampled("student", n, 1.0, self.student_sampler) for n in counts]
        return found

    def row(
        self, sampled: Sampled, images: tuple[np.ndarray, ...], rate: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Its scores, said as they come, and its first images. `images`, `rate`: of `drawn`."""
        scores = rounded(self.scores(*images)._asdict())
        row = {**sampled.key, **scores, "images_per_second": rate}
        found = [
            f"{key} {form.format(row[key])}"
            for key, (_, form) in self.columns.items()
            if key not in sampled.key and row.get(key) is not None
        ]
        who = f"{sampled.model}, {report.counted(sampled.steps)}, guidance {sampled.guidance:g}"
        say(f"  {who}: {', '.join(found)}")
        return row, images[0][: len(self.captions())]

    def evaluate(self, run: Run, teacher: Any, served: Mapping[int, Any]) -> dict[str, Any]:
        """The table and its picture. All processes draw, the first one scores."""
        config, rows = self.config, list[dict[str, Any]]()
        say(f"evaluation on the {config.eval.split} split")
        with run.timed("evaluation"):
            drawn = []
            for sampled in self.sampled():
                params = teacher if sampled.model == "teacher" else served[sampled.steps]
                drawn.append((sampled, *self.drawn(sampled._replace(params=params))))
            if not distributed.is_main():
                distributed.barrier("results are written")  # who left before would end it
                return {}
            pictures: dict[tuple[str, int], np.ndarray] = {}
            for sampled, images, rate in drawn:
                row, first = self.row(sampled, images, rate)
                rows.append(row)
                pictures.setdefault((sampled.model, sampled.steps), first)  # the reference's
        reference = rows[0] if rows[0]["model"] == "teacher" else None
        for row in rows:
            row["ratio"] = round(row["fd"] / reference["fd"], 4) if reference else None
        reals, protocol = self.reals(), self.protocol()
        name = self.common["data"]["name"]
        results = run.write_results(
            {"rows": rows, "reference": reference, **reals, "protocol": protocol},
            title=f"{name}, {config.method.name}, seed {config.seed}",
            notes=self.notes(),
            columns=self.columns,
        )
        shown = {key: self.columns[key] for key in self.shown}
        path = run.workdir / "results.png"
        report.results_picture(path, results, pictures, shown, self.captions())
        distributed.barrier("results are written")
        return results

    def timed_draw(
        self, sampled: Sampled, conds: Callable[[np.ndarray], Any], count: int, seed: int
    ) -> tuple[np.ndarray, float]:
        """`draw`, and the images a second of all processes, by this one's blocks after the first,
        which compiles; a single one is drawn again.
        """
        make, blocks = self._blocks(sampled, conds, count, seed)
        ends: list[float] = []

        def timed(i: int) -> np.ndarray:
            images = make(i)
            ends.append(time.perf_counter())
            return images

        images = np.concatenate(distributed.divided(blocks, timed))
        if len(ends) == 1:
            ends = [time.perf_counter()]
            timed(0)
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
        rows = len(images) // blocks * distributed.count()
        return images[:count], round(rows / seconds, 1)


def with_reals(batch: Mapping[str, Any], reals: Mapping[str, Any]) -> dict[str, Any]:
    """A batch beside its reals."""
    return {**batch, "real": reals["x0"], "real_cond": reals["cond"]}


def rounded(scores: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {k: None if np.isnan(v) else round(float(v), 5) for k, v in scores.items()}
