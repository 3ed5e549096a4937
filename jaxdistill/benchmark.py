"""`python -m jaxdistill.benchmark --config=configs/benchmark.py --workdir=DIR`: few-step methods on
one teacher, one table.

Text to image on scenes. Every method gets the same budget in network calls and the same batch; a
killed benchmark goes on where it stopped, and finished students are not trained again. On a CPU
several processes share the work, each on its own cores (`--processes`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from jaxdistill import main, partition, sampling
from jaxdistill.interop import card, sentence_encoder
from jaxdistill.methods.contenders import METHODS, Method, Pairs, Setting, Stage
from jaxdistill.methods.denoising import denoising
from jaxdistill.methods.lightning import pair_states
from jaxdistill.metrics.distances import class_spread
from jaxdistill.models.discriminator import fresh_heads
from jaxdistill.prediction import Denoiser, LossFn
from jaxdistill.run import checkpoint, loop, report, workers
from jaxdistill.run.workdir import train_phase
from jaxdistill.tasks.labelled_images.data import DataError, fashion_mnist
from jaxdistill.tasks.labelled_images.experiment import flatten, make_optimizer, student_of
from jaxdistill.tasks.scenes import scenes
from jaxdistill.tasks.scenes.recognise import (
    SCALE_IMAGES,
    SceneEvaluator,
    SceneRecogniser,
    train_recogniser,
    unit,
)
from jaxdistill.train import TrainState, everything, gradient_of

SHAPE = (scenes.SIDE, scenes.SIDE, 3)

PICTURED = 8
"""Captions in the picture grid."""

Embed = Callable[[Sequence[str]], Any]
"""Captions -> the conditioning of a batch."""

Stream = Callable[[int], dict[str, Any]]
"""Batch i of an endless stream."""


class SceneBatches:
    """An endless shuffled stream of {"x0" float32 [b, h, w, c] in [-1, 1], "cond"}; batch i depends
    on (seed, i) alone.
    """

    def __init__(self, source: Any, embeddings: Embed, batch_size: int, seed: int) -> None:
        self._embeddings = embeddings
        self._batches = (
            grain.MapDataset.source(source)
            .shuffle(seed=seed)
            .repeat()
            .batch(batch_size, batch_fn=list)
        )

    def __call__(self, i: int) -> dict[str, Any]:
        """Batch i."""
        items = self._batches[i]
        images = np.stack([item["image"] for item in items])
        return {
            "x0": images.astype(np.float32) / 127.5 - 1.0,
            "cond": self._embeddings([caption_of(item) for item in items]),
        }


class PairBatches:
    """An endless stream of {"noise", "target" [b, h, w, c], "x0", "cond"} from stored pairs,
    shuffled by `seed`.
    """

    def __init__(
        self, targets: np.ndarray, captions: Sequence[str], embeddings: Embed, size: int, seed: int
    ) -> None:
        self._targets, self._captions, self._embeddings, self._size, self._seed = (
            targets,
            captions,
            embeddings,
            size,
            seed,
        )

    def __call__(self, i: int) -> dict[str, Any]:
        """Batch i."""
        per_epoch = max(1, len(self._targets) // self._size)
        order = np.random.default_rng((self._seed, i // per_epoch)).permutation(len(self._targets))
        rows = np.resize(order[(i % per_epoch) * self._size :], self._size)
        noise = np.asarray(pair_noise(rows))
        targets = self._targets[rows]
        return {
            "noise": noise,
            "target": targets,
            "x0": targets,
            "cond": self._embeddings([self._captions[int(r)] for r in rows]),
        }


def flops_of(function: Any, *inputs: Any) -> float:
    """Of a jitted function, as XLA counts them before it compiles."""
    analysis: Any = function.lower(*inputs).cost_analysis()
    return float(analysis["flops"])


def pair_noise(rows: np.ndarray) -> jax.Array:
    """The noise of the stored pairs `rows`: [n, h, w, c], each a function of its row."""
    return card.noise_of(300, jnp.asarray(rows), SHAPE)


def caption_of(item: Mapping[str, Any]) -> str:
    """The caption of a data source's item."""
    return item["caption"].decode()


class Benchmark:
    """One teacher and its students in one workdir; data, recogniser and teacher may come from
    `config.base`, another's workdir.
    """

    def __init__(self, config: ConfigDict, workdir: Path, stop: loop.StopSignal) -> None:
        self.config, self.workdir, self.stop = config, workdir, stop
        self.base = Path(config.base) if config.base else workdir
        # What can be made again stands beside the teacher, unless that is an export alone.
        self.caches = self.base if (self.base / "scenes").exists() else workdir
        self.layout = partition.layout()
        self.constrain = partition.constrain_batch(self.layout.mesh)
        encoder = sentence_encoder.load(config.text.folder)
        with self.claim("scenes", folder=self.caches):
            self.sources = scenes.open_scenes(
                config.data.source, self.caches / "scenes", scale=config.data.scale
            )
            self.captions = {
                split: [caption_of(item) for item in source]
                for split, source in self.sources.items()
            }
            everything = [c for captions in self.captions.values() for c in captions]
            self.embeddings = sentence_encoder.cached_embeddings(
                encoder,
                everything,
                self.caches / "text",
                length=config.text.length,
                watch=partial(self.watched, "captions"),
            )
        self.setting = setting_of(
            config, self.constrain, {"sha256": encoder.hash, "length": config.text.length}
        )
        self.model, self.schedule = self.setting.model, self.setting.schedule
        self.null_cond: Any = self.setting.null_cond
        self.target = card.PREDICTIONS[config.prediction][1]
        self.programs: dict[tuple[float, str, bool], Any] = {}
        self.call_flops = 0.0  # of one forward call on a student's batch, counted at the first need
        (workdir / "samples").mkdir(exist_ok=True)

    # -- shared work

    @contextmanager
    def claim(self, name: str, *, folder: Path | None = None, wait: bool = True) -> Iterator[bool]:
        """Whether this process has `name` to itself inside the block: at once, or with `wait` as
        soon as no other has it.

        The system ends the claim of a process that dies. Raises `loop.Stopped` where a signal comes
        while it waits.
        """
        folder = (folder or self.workdir) / "claims"
        folder.mkdir(exist_ok=True)
        lock, told = FileLock(folder / f"{name}.lock"), False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1.0 if wait else 0.0)
            except Timeout:
                if not wait:
                    yield False
                    return
                self.heed_stop()
                if not told:
                    main.say(f"{name}: waiting for another process")
                    told = True
        try:
            yield True
        finally:
            lock.release()

    def heed_stop(self) -> None:
        """Raise `loop.Stopped` after a signal: where no training step would see it.

        What is finished is kept.
        """
        if self.stop.received:
            raise loop.Stopped(
                f"stopped by {self.stop.received}; start the same command again to go on"
            )

    def watched(self, name: str, steps: Iterable[int]) -> Iterator[int]:
        """The steps of a long work, with a progress bar where it takes more than ten seconds, ended
        by a signal.
        """
        for step in loop.tqdm(steps, desc=name, mininterval=10, delay=10):
            self.heed_stop()
            yield step

    def share(self, tasks: Mapping[str, Callable[[], None]]) -> None:
        """Do the tasks that no other process is at; then those that others were at, which is
        nothing where they finished them.
        """
        others = []
        for name, task in tasks.items():
            with self.claim(name, wait=False) as mine:
                if mine:
                    task()
                else:
                    others.append(name)
        for name in others:
            with self.claim(name):
                tasks[name]()

    # -- scores

    def labels(self, split: str, count: int) -> np.ndarray:
        """Labels int [count, 5] of the split's first captions."""
        return np.stack(
            [self.sources[split][i]["labels"] for i in range(min(count, len(self.sources[split])))]
        )

    def images(self, split: str, count: int) -> np.ndarray:
        """uint8 [count, h, w, 3], the split's first."""
        return np.stack(
            [self.sources[split][i]["image"] for i in range(min(count, len(self.sources[split])))]
        )

    def recogniser(self) -> SceneRecogniser:
        """Trained at the first start, then read from the workdir."""
        block, folder = self.config.recogniser, self.base / "recogniser"
        size: dict[str, Any] = {"channels": tuple(block.channels), "features": block.features}
        if (folder / "card.json").exists():
            return SceneRecogniser(
                checkpoint.load_export(folder)[0], unit(self.images("train", SCALE_IMAGES)), **size
            )
        print("recogniser: training", flush=True)
        # On every composition: one that never saw a pair would call its garment by its colour.
        garments = fashion_mnist(self.config.data.source).train
        images, labels = scenes.every_composition(
            scenes.make_sprites(garments.images, garments.labels), len(self.sources["train"]), 0
        )
        made = train_recogniser(
            images,
            labels,
            unit(self.images("train", SCALE_IMAGES)),
            steps=block.steps,
            batch_size=block.batch_size,
            learning_rate=block.learning_rate,
            **size,
        )
        checkpoint.export(
            folder,
            made.params,
            {
                "format": card.FORMAT,
                "role": "recogniser",
                "hash": made.hash,
                "recogniser": block.to_dict(),
            },
        )
        return made

    def evaluator(self, recogniser: SceneRecogniser, split: str) -> SceneEvaluator:
        """Scores against a split of real scenes; unseen compositions are test scenes'."""
        ev = self.config.eval
        garments = fashion_mnist(self.config.data.source)
        part = garments.validation if split == "validation" else garments.test
        sprites = scenes.make_sprites(part.images, part.labels)
        rng = np.random.default_rng(1)
        parsed = [scenes.parse(c) for c in self.captions[split][: ev.diversity_captions]]
        real = np.stack(
            [scenes.render(scene, sprites, rng) for scene in parsed for _ in range(ev.repeats)]
        )
        return SceneEvaluator(
            recogniser,
            unit(self.images(split, len(self.sources[split]))),
            self.labels(split, len(self.sources[split])),
            self.labels("unseen", len(self.sources["unseen"])),
            repeats=ev.repeats,
            spread=class_spread(unit(real), np.arange(len(real)) // ev.repeats),
        )

    def score(
        self,
        evaluator: SceneEvaluator,
        key: Mapping[str, Any],
        program: Any,
        params: Any,
        grid: np.ndarray,
    ) -> dict[str, Any]:
        """Sample with the split's captions, score, and keep the first images."""
        ev = self.config.eval
        split, count = ev.split, ev.samples
        params = self.layout.place(params)  # as in training, for one program
        draw = partial(self.draw, program, params, grid)
        draw(self.captions[split][:1], ev.seed)  # compiles
        began = time.perf_counter()
        images = draw(self.captions[split][:count], ev.seed)
        rate = len(images) / (time.perf_counter() - began)
        path = self.picture_path(key)
        path.parent.mkdir(exist_ok=True)
        np.save(path, (images[:PICTURED] * 255.0 + 0.5).astype(np.uint8))
        unseen = draw(self.captions["unseen"][: min(count, ev.unseen)], ev.seed + 1)
        repeated = draw(
            [c for c in self.captions[split][: ev.diversity_captions] for _ in range(ev.repeats)],
            ev.seed + 2,
        )
        scores = evaluator(images, unseen, repeated)._asdict()
        return {k: None if np.isnan(v) else round(v, 5) for k, v in scores.items()} | {
            "images_per_second": round(rate, 1)
        }

    # -- sampling

    def draw(
        self, program: Any, params: Any, grid: np.ndarray, captions: Sequence[str], seed: int
    ) -> np.ndarray:
        """Images [n, h, w, c] in [0, 1] of the captions, in blocks of config.eval.batch_size; image
        i has noise (seed, i).
        """
        block, out = self.config.eval.batch_size, []
        for i in self.watched("images", range(0, len(captions), block)):
            rows = list(captions[i : i + block])
            cond = self.embeddings(rows + [rows[-1]] * (block - len(rows)))
            out.append(
                np.asarray(
                    program(params, card.draw_noise(seed, i, block, SHAPE), cond, jnp.asarray(grid))
                )[: len(rows)]
            )
        return np.concatenate(out)

    def denoiser(self, params: Any, cond: Any, guidance: float = 1.0) -> Denoiser:
        """The network of these parameters for one batch, guided above 1."""
        return self.setting.network.guided(params, cond, self.null_cond, guidance)

    def sample_fn(self, sampler: card.Sampler, *, guidance: float = 1.0) -> Any:
        """(params, noise [b, h, w, c], cond, grid [n]) -> images [b, h, w, c] in [0, 1], jitted
        once for all that ask.
        """
        block = sampler.card["sampler"]
        key = (guidance, block["solver"], block["noise_correction"])
        if key not in self.programs:
            self.programs[key] = jax.jit(
                partial(sampler.sample, guidance=guidance, correct_noise=block["noise_correction"])
            )
        return self.programs[key]

    # -- teacher

    def teacher_sampler(self, solver: str = "ddim") -> card.Sampler:
        """The teacher's sampler with its card."""
        block = self.config.teacher
        sampler = {
            "solver": solver,
            "grid": block.grid,
            "steps": block.steps,
            "guidance": block.guidance,
            "noise_correction": False,
        }
        return card.build_sampler(self.setting.export_card("teacher", sampler))

    def init_params(self, seed: int) -> Any:
        """Fresh parameters."""
        cond = self.embeddings(self.captions["train"][:1])
        return jax.jit(self.model.init)(
            jax.random.key(seed), jnp.zeros((1, *SHAPE)), jnp.zeros((1,)), cond
        )

    def teacher(self, evaluator: SceneEvaluator) -> Any:
        """The teacher's parameters, from its export or trained."""
        folder, config = self.base / "teacher", self.config.teacher
        if (folder / "card.json").exists():
            return checkpoint.load_export(folder)[0]
        loss = denoising(
            self.model.apply,
            schedule=self.schedule,
            target=self.target,
            null_cond=self.null_cond,
            drop_cond=config.drop_cond,
            time_skew=config.time_skew,
            constrain=self.constrain,
        )
        tx = make_optimizer(config)
        sampler = self.teacher_sampler()
        program = self.sample_fn(sampler, guidance=config.guidance)
        health = self.health(
            "teacher", evaluator, program, [sampler.grid(self.config.log.teacher_steps)]
        )
        batches = SceneBatches(self.sources["train"], self.embeddings, config.batch_size, 0)
        state = self.train(
            "teacher",
            self.init_params(0),
            jax.random.key(0),
            loss,
            tx,
            config.ema_decay,
            batches,
            None,
            config.iterations,
            config.health_every,
            health,
        )
        checkpoint.export(folder, state.ema_params, sampler.card)
        return jax.tree.map(np.asarray, state.ema_params)

    def health(
        self, name: str, evaluator: SceneEvaluator, program: Any, grids: Sequence[np.ndarray]
    ) -> loop.HealthFn:
        """FD and all-right on validation captions, and a picture, for each grid."""
        count = self.config.log.health_samples
        captions = self.captions["validation"][:count]

        def report_health(params: Any, step: int) -> dict[str, float]:
            numbers: dict[str, float] = {}
            pictures = []
            for grid in grids:
                images = self.draw(program, params, grid, captions, 100)
                found = evaluator.quick(images)
                numbers |= {f"{k}_{len(grid)}": v for k, v in found.items()}
                pictures.append(images[:20])
            text = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
            main.say(f"health  {name} {step}: {text} on validation ({count} images)")
            report.save_grid(
                self.workdir / "samples" / f"{name.replace('/', '-')}_{step:07d}.png",
                np.concatenate(pictures),
                columns=20,
            )
            return numbers

        return report_health

    def train(
        self,
        name: str,
        params: Any,
        key: jax.Array,
        loss: LossFn,
        tx: optax.GradientTransformation,
        ema_decay: float,
        batches: Callable[[int], Any],
        teacher_params: Any,
        steps: int,
        health_every: int,
        health: loop.HealthFn,
        ema_of: Callable[[Any], Any] = everything,
    ) -> TrainState:
        """The loop of `jaxdistill.run.loop` on the mesh."""
        trained, seconds = train_phase(
            name,
            lambda: params,
            params,
            key,
            loss,
            tx,
            batches,
            teacher_params,
            health,
            layout=self.layout,
            ema_decay=ema_decay,
            ema_of=ema_of,
            steps=steps,
            health_every=health_every,
            log=self.config.log,
            workdir=self.workdir,
            stop=self.stop,
            advice="lower the learning rate",
        )
        path = self.workdir / "seconds.json"
        with self.claim("seconds"):
            known = json.loads(path.read_text()) if path.exists() else {}
            checkpoint.write_json(path, {**known, name: round(seconds.total, 1)})
        return trained

    # -- methods

    def make(self, name: str) -> Callable[[int], Method]:
        """Iterations of a stage with share 1 -> Method. Raises ValueError for an unknown name."""
        return partial(
            choose_method(self.config, name), self.setting, self.config.method_settings[name]
        )

    # -- students

    def calls_per_step(self, stage: Stage, batch: Any, teacher: Any, params: Any) -> float:
        """The cost of one iteration in network calls on its batch: FLOPs of loss and gradient over
        those of one forward call.

        Loops are unrolled in the methods' losses, so that the compiler's count holds them whole.
        The inputs are placed as in training, which then has no need to trace the loss again.
        """
        layout, key = self.layout, jax.random.key(0)
        if not self.call_flops:
            t = jnp.ones((len(batch["x0"]),))
            self.call_flops = flops_of(
                self.setting.network.apply, params["student"], batch["x0"], t, batch["cond"]
            )
        inputs = (
            layout.describe(params),
            layout.describe(teacher),
            partition.put_batch(batch, layout.mesh),
            layout.place(key),
        )
        return flops_of(gradient_of(stage.loss), *inputs) / self.call_flops

    def group_params(self, stage: Stage, student: Any, teacher: Any, seed: int) -> dict[str, Any]:
        """Start of each group: the student where it stands, a target or a fake score as the
        teacher, fresh heads.
        """
        params: dict[str, Any] = {}
        for group in stage.groups:
            if group == "discriminator":
                cond = self.embeddings(self.captions["train"][:1])
                inputs = teacher, jnp.zeros((1, *SHAPE)), jnp.zeros((1,)), cond

                def states_of(*inputs: Any) -> Any:
                    states = self.setting.features(*inputs)
                    return pair_states(states, states) if stage.pair_states else states

                params[group] = fresh_heads(
                    self.setting.heads, jax.random.key(seed + 2), states_of, *inputs, cond=None
                )
            else:
                params[group] = jax.tree.map(jnp.array, teacher if group == "fake" else student)
        return params

    def pairs(self, teacher: Any, pairs: Pairs) -> tuple[np.ndarray, list[str]]:
        """Teacher images in [-1, 1] from noises and train captions, made once: as many as their
        share of the budget pays for.
        """
        block, student = self.config.teacher, self.config.student
        calls = pairs.steps * (1 if block.guidance == 1.0 else 2)
        count = int(pairs.share * student.budget * student.batch_size / calls)
        if count < 1:
            raise ValueError(
                f"pairs_share = {pairs.share:g} of the budget does not pay for one image of {calls}"
                " network calls; raise it"
            )
        # Named by the sampler: variants on one base may have others.
        path = (
            self.caches
            / f"pairs-{count}-{pairs.solver}-{block.grid}-{pairs.steps}-{block.guidance:g}.npy"
        )
        captions = [self.captions["train"][i % len(self.captions["train"])] for i in range(count)]
        with self.claim("pairs", folder=self.caches):
            if not path.exists():
                sampler, teacher = self.teacher_sampler(pairs.solver), self.layout.place(teacher)
                program = self.sample_fn(sampler, guidance=block.guidance)
                grid, size, out = jnp.asarray(sampler.grid(pairs.steps)), 64, []
                for i in self.watched("pairs", range(0, count, size)):
                    rows = np.arange(i, i + size)
                    cond = self.embeddings([captions[r % count] for r in rows])
                    out.append(np.asarray(program(teacher, pair_noise(rows), cond, grid)))
                temporary = path.with_suffix(".tmp.npy")
                np.save(temporary, np.concatenate(out)[:count] * 2.0 - 1.0)
                temporary.replace(path)
        return np.load(path), captions

    def student(
        self, name: str, seed: int, teacher: Any, evaluator: SceneEvaluator
    ) -> dict[int, Any]:
        """{step count: parameters} of one method, trained or from the exports."""
        config, method = self.config, self.make(name)(1)
        current, result = teacher, dict[int, Any]()
        pairs: Any = None
        size = config.student.batch_size
        if method.pairs:
            pairs = self.pairs(teacher, method.pairs)
        for i, stage in enumerate(method.stages):
            label = f"{name}-{seed}" + (f"-{stage.name}" if stage.name else "")
            folder = self.workdir / "students" / label
            previous = {
                "teacher": teacher,
                "previous": current,
                "both": {"original": teacher, "previous": current},
            }[stage.teacher]
            if (folder / "card.json").exists():
                current = checkpoint.load_export(folder)[0]
            else:
                batches: Stream = SceneBatches(
                    self.sources["train"], self.embeddings, size, seed + 1
                )
                if stage.data == "pairs":
                    targets, captions = pairs
                    batches = PairBatches(targets, captions, self.embeddings, size, seed)
                params = self.group_params(stage, current, teacher, seed)
                cost = self.calls_per_step(stage, batches(0), previous, params)
                iterations = max(
                    1,
                    int(
                        stage.share
                        * (1 - (method.pairs.share if method.pairs else 0))
                        * config.student.budget
                        / cost
                    ),
                )
                stage = (
                    self.make(name)(iterations).stages[i]._replace(loss=stage.loss)
                )  # which has been traced
                main.say(f"{label}: {cost:.1f} network calls an iteration, {iterations} iterations")
                program, grid = self.sample_fn(method.sampler), method.sampler.grid
                health = self.health(
                    label,
                    evaluator,
                    program,
                    [grid(n) for n in stage.serves or (max(config.student.steps),)],
                )
                every = max(1, iterations // 4)
                state = self.train(
                    label,
                    params,
                    jax.random.key(seed + 1),
                    stage.loss,
                    stage.tx,
                    config.student.ema_decay,
                    batches,
                    previous,
                    iterations,
                    every,
                    health,
                    student_of,
                )
                about = {
                    "method": name,
                    "seed": seed,
                    "calls_an_iteration": round(cost, 2),
                    "iterations": iterations,
                }
                block = dict(method.sampler.card["sampler"])
                if stage.serves and block["steps"] not in stage.serves:
                    block["steps"] = max(stage.serves)
                checkpoint.export(
                    folder, state.ema_params, {**method.sampler.card, "sampler": block, **about}
                )
                current = jax.tree.map(np.asarray, state.ema_params)
            result |= {n: current for n in stage.serves}
        return dict(sorted(result.items()))

    # -- the whole

    def scored(self, rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> bool:
        """Whether the rows hold all step counts of a method's seed."""
        found = {row["steps"] for row in rows if (row["method"], row["seed"]) == (name, seed)}
        return found >= {n for stage in self.make(name)(1).stages for n in stage.serves}

    def unscored(self) -> int:
        """How many students are still to be trained or scored."""
        path = self.workdir / "rows.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return sum(
            not self.scored(rows, name, seed)
            for name in self.config.methods
            for seed in self.config.seeds
        )

    def prepare(self) -> tuple[SceneRecogniser, SceneEvaluator, Any]:
        """Recogniser, scores on validation, the teacher's parameters: trained at the first start."""
        with self.claim("teacher", folder=self.caches):
            recogniser = self.recogniser()
            validation = self.evaluator(recogniser, "validation")
            return recogniser, validation, self.teacher(validation)

    def run(
        self,
        prepared: tuple[SceneRecogniser, SceneEvaluator, Any] | None = None,
        *,
        helper: bool = False,
    ) -> dict[str, Any]:
        """Teacher, students, scores, files; a `helper` leaves the files to another process, and its
        result is empty.

        `prepared` is what `prepare` gave, where it has been called.
        """
        config = self.config
        recogniser, validation, teacher = prepared or self.prepare()
        split = config.eval.split
        evaluator = self.evaluator(recogniser, split)
        path = self.workdir / "rows.json"
        protocol = {
            "split": split,
            "recogniser_sha256": recogniser.hash,
            "samples": config.eval.samples,
            "sampling_seed": config.eval.seed,
            "pixel_range": [0.0, 1.0],
        }

        def known_rows() -> list[Any]:
            stored: dict[str, Any] = (
                json.loads(path.read_text())
                if path.exists()
                else {"protocol": protocol, "rows": []}
            )
            if stored["protocol"] != protocol:
                raise main.UserError(
                    f"{path} holds rows of another protocol ({stored['protocol']}); remove it or"
                    " use another workdir"
                )
            unknown = {row["method"] for row in stored["rows"]} - {"teacher", *config.methods}
            if unknown:
                raise main.UserError(
                    f"{path} holds rows of {sorted(unknown)[0]}, which config.methods does not"
                    " name; take them out or add it"
                )
            return stored["rows"]

        def add_row(key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> None:
            if not any(all(row[k] == v for k, v in key.items()) for row in known_rows()):
                row = {**key, **make()}
                main.say("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
                with self.claim("rows"):
                    checkpoint.write_json(
                        path, {"protocol": protocol, "rows": [*known_rows(), row]}
                    )

        def score_teacher(guidance: float, count: int) -> None:
            sampler = self.teacher_sampler()
            program = self.sample_fn(sampler, guidance=guidance)
            key = {"method": "teacher", "seed": 0, "steps": count, "guidance": guidance}
            add_row(key, partial(self.score, evaluator, key, program, teacher, sampler.grid(count)))

        def make_student(name: str, seed: int) -> None:
            if self.scored(known_rows(), name, seed):
                return  # rows.json alone is enough: of a finished student nothing else is needed
            method = self.make(name)(1)
            students = self.student(name, seed, teacher, validation)
            program = self.sample_fn(method.sampler)
            for count, params in students.items():
                key = {"method": name, "seed": seed, "steps": count, "guidance": 1.0}
                add_row(
                    key,
                    partial(
                        self.score, evaluator, key, program, params, method.sampler.grid(count)
                    ),
                )

        known_rows()
        guidances = dict.fromkeys((config.teacher.guidance, *config.eval.guidances))
        samplers = [(g, config.teacher.steps) for g in guidances] + [
            (config.teacher.guidance, n) for n in config.student.steps
        ]
        tasks = {
            f"teacher-{guidance:g}-{count}": partial(score_teacher, guidance, count)
            for guidance, count in samplers
        }
        self.share(
            tasks
            | {
                f"{name}-{seed}": partial(make_student, name, seed)
                for seed in config.seeds
                for name in config.methods
            }
        )
        if helper:
            return {}
        rows = self.in_order(known_rows())
        seconds = self.workdir / "seconds.json"
        results = {
            "rows": rows,
            "reference": next(
                r for r in rows if r["method"] == "teacher" and r["steps"] == config.teacher.steps
            ),
            "ceiling": {k: round(v, 4) for k, v in evaluator.ceiling().items()},
            "floor_fd": round(evaluator.floor_fd(), 5),
            "protocol": protocol,
            "seconds": json.loads(seconds.read_text()) if seconds.exists() else {},
            "config": json.loads(config.to_json()),
            "versions": main.versions(),
        }
        with self.claim("results"):
            checkpoint.write_json(self.workdir / "results.json", results)
            (self.workdir / "results.md").write_text(table(results))
            shown = self.pictured(rows)
            report.methods_picture(
                self.workdir / "results.png",
                results,
                self.captions[split][:PICTURED],
                shown,
                chart=config.chart.to_dict(),
            )
        return results

    def in_order(self, rows: Sequence[Any]) -> list[Any]:
        """Rows in the order of the config: processes that share the work add them as they finish."""
        methods, teacher = ["teacher", *self.config.methods], self.config.teacher

        def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
            reference = (row["steps"] != teacher.steps, row["guidance"] != teacher.guidance)
            return (
                methods.index(row["method"]),
                row["seed"],
                *reference,
                row["guidance"],
                row["steps"],
            )

        return sorted(rows, key=place)

    def picture_path(self, key: Mapping[str, Any]) -> Path:
        """Where the first images of a row are kept."""
        return (
            self.workdir
            / "pictures"
            / f"{key['method']}-{key['seed']}-{key['steps']}-{key['guidance']:g}.npy"
        )

    def pictured(self, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], np.ndarray]:
        """{(method, steps): its first images [c, h, w, ch]}: the reference, and each method's first
        seed at 3 steps (or the most below).
        """
        config, shown = self.config, dict[tuple[str, int], np.ndarray]()
        wanted = [("teacher", config.teacher.steps, 0)]
        count = max((n for n in config.student.steps if n <= 3), default=min(config.student.steps))
        wanted += [(name, count, config.seeds[0]) for name in config.methods if config.seeds]
        for method, steps, seed in wanted:
            row = next(
                r for r in rows if (r["method"], r["steps"], r["seed"]) == (method, steps, seed)
            )
            path = self.picture_path(row)
            blank = np.full(
                (min(PICTURED, config.eval.samples), *SHAPE), 127, np.uint8
            )  # where rows.json alone was carried here
            shown[method, steps] = (np.load(path) if path.exists() else blank).astype(
                np.float32
            ) / 255.0
        return shown


SHOWN = (
    "fd",
    "precision",
    "recall",
    "colour",
    "garment",
    "relation",
    "all_right",
    "unseen_all_right",
    "diversity",
)


def table(results: Mapping[str, Any]) -> str:
    """results.md: mean ± standard deviation over seeds."""
    reference, groups = results["reference"], dict[tuple[str, int], list[Mapping[str, Any]]]()
    for row in results["rows"]:
        groups.setdefault((row["method"], row["steps"]), []).append(row)
    lines = [
        "| method | steps | seeds | FD / teacher's | " + " | ".join(SHOWN) + " |",
        "|" + "---|" * (4 + len(SHOWN)),
    ]
    for (method, steps), rows in groups.items():

        def shown(values: Sequence[float], digits: int = 3) -> str:
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            return f"{np.mean(values):.{digits}f}{spread}"

        cells = [shown([r[k] for r in rows]) for k in SHOWN]
        ratio = shown([r["fd"] / reference["fd"] for r in rows], 2)
        lines.append(f"| {method} | {steps} | {len(rows)} | {ratio} | " + " | ".join(cells) + " |")
    ceiling = ", ".join(f"{k} {v:.3f}" for k, v in results["ceiling"].items())
    protocol = results["protocol"]
    return (
        f"# Few-step methods on scenes, {protocol['split']} split\n\n"
        + "\n".join(lines)
        + f"\n\n{protocol['samples']:,} samples a row; two halves of the real scenes are"
        f" {results['floor_fd']:.3f} apart. Real scenes score {ceiling}. Recogniser"
        f" {protocol['recogniser_sha256']}; {results['versions']['machine']}.\n"
    )


def setting_of(
    config: ConfigDict, constrain: sampling.Constrain, text: Mapping[str, Any]
) -> Setting:
    """What the config's methods share. Raises ValueError."""
    model, schedule = (
        card.build_model(config.model.to_dict()),
        card.build_schedule(config.schedule.to_dict()),
    )
    parameterization, _ = card.choose(card.PREDICTIONS, config.prediction, "config.prediction")
    return Setting(
        config, model, schedule, parameterization, constrain, image_shape=SHAPE, text=text
    )


def choose_method(config: ConfigDict, name: str) -> Callable[[Setting, ConfigDict, int], Method]:
    """The method of that name, or the one that the settings of a variant name.

    Raises ValueError.
    """
    settings = config.method_settings
    if name not in settings:
        raise ValueError(
            f"config.methods holds {name!r}, which config.method_settings does not know; it has"
            f" {', '.join(sorted(settings))}"
        )
    return card.choose(
        METHODS, settings[name].get("method", name), f"config.method_settings.{name}.method"
    )


SHARED = ("data.scale", "text.length", "model", "schedule", "prediction", "teacher", "recogniser")
"""Parts of the config that a benchmark and its base must have in common."""

FREE = ("teacher.guidance", "teacher.steps", "teacher.grid", "teacher.health_every")
"""Keys of these parts that may differ: how the teacher is sampled and watched, not what it is."""


def check_base(config: ConfigDict) -> None:
    """Raise ValueError where config.base holds no teacher, or one of other settings."""
    if not config.base:
        return
    folder = Path(config.base)
    for part in ("config.json", "teacher/card.json", "recogniser/card.json"):
        if not (folder / part).exists():
            raise ValueError(
                f"config.base = {config.base} has no {part}; give the workdir of a benchmark that"
                " has trained its teacher"
            )
    there = flatten(json.loads((folder / "config.json").read_text()))
    here = flatten(json.loads(config.to_json()))
    for key in sorted(there.keys() | here.keys()):
        shared = (
            any(key == part or key.startswith(part + ".") for part in SHARED) and key not in FREE
        )
        if shared and there.get(key) != here.get(key):
            raise ValueError(
                f"config.base = {config.base} was made with {key} = {there.get(key)}, here it is"
                f" {here.get(key)}"
            )


def check(config: ConfigDict) -> None:
    """Raise ValueError for what can be known before any work."""
    if not config.student.steps or min(config.student.steps) < 1:
        raise ValueError(
            "config.student.steps must hold step counts of at least 1, got"
            f" {tuple(config.student.steps)}"
        )
    setting = setting_of(config, sampling.unconstrained, {})
    for name in config.methods:
        build = choose_method(config, name)
        try:
            build(setting, config.method_settings[name], 1)
        except ValueError as error:
            raise ValueError(f"config.method_settings.{name}: {error}") from error
    check_base(config)
    if config.eval.samples <= config.recogniser.features:
        raise ValueError(
            f"config.eval.samples = {config.eval.samples} is too few for a Frechet distance of"
            f" {config.recogniser.features} features; at least {config.recogniser.features + 1} are"
            " needed"
        )
    card.choose({"validation": 0, "test": 0}, config.eval.split, "config.eval.split")
    card.choose(report.CHARTS, config.chart.kind, "config.chart.kind")
    if config.chart.kind == "axis":
        for name in config.methods:
            report.on_axis(name, config.chart.axis)


PROCESSES = flags.DEFINE_integer(
    "processes",
    0,
    "Processes that share the work on a CPU, each on its own cores; 0: one a core, at most 4.",
)
HELPER = flags.DEFINE_integer(
    "helper", 0, "Set by the command itself: the process that this one helps."
)


def processes_of() -> int:
    """How many processes --processes asks for. Raises ValueError where that cannot be."""
    wanted, cpu = PROCESSES.value, jax.default_backend() == "cpu"
    if wanted < 0:
        raise ValueError(f"--processes must be at least 0, got {wanted}")
    if wanted > 1 and not cpu:
        raise ValueError(
            f"--processes = {wanted} shares the cores of a CPU; a {jax.default_backend()} takes one"
            " process"
        )
    return wanted or (min(len(workers.cores()), workers.MOST) if cpu else 1)


def keep_programs(folder: Path) -> None:
    """Compile once what several processes run; a cache that the environment names has precedence."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()  # what was compiled before has settled that there is none


QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Flags of XLA's CPU compiler: kernels without MLIR, and a program in one piece.

The TPU's compiler ends a process that has them.
"""


def choose_optimizations(config: ConfigDict) -> None:
    """Leave XLA's costly passes out where config.optimize is False, before anything is compiled."""
    if not config.optimize:
        jax.config.update("jax_disable_most_optimizations", True)
        if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
            os.environ["XLA_FLAGS"] = (
                f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
            )  # which the other processes inherit


def cli() -> None:
    """Parse the flags and run."""
    main.parse_flags()
    logging.set_verbosity(logging.FATAL)  # as in main
    config = main.given_config()
    workdir = Path(main.WORKDIR.value)
    try:
        choose_optimizations(config)
        check(config)
        count = processes_of()
        main.prepare_workdir(workdir, config)
        with loop.StopSignal().installed() as stop:
            if HELPER.value:
                workers.end_with(HELPER.value)
            if HELPER.value or count > 1:
                keep_programs(workdir / "cache")
            bench = Benchmark(config, workdir, stop)
            if HELPER.value:
                bench.run(helper=True)
                return
            count, prepared = min(count, bench.unscored()), None
            if count > 1:
                prepared = bench.prepare()  # one training is faster with all cores
                main.say(
                    f"{count} processes share the rest; all but the first write to"
                    f" {workdir / 'logs'}"
                )
                workers.run(
                    [
                        sys.executable,
                        "-m",
                        "jaxdistill.benchmark",
                        *sys.argv[1:],
                        f"--helper={os.getpid()}",
                    ],
                    count,
                    workdir / "logs",
                    stop,
                )
                bench.heed_stop()
            results = bench.run(prepared)  # what a process that failed has left, and the files
    except loop.Stopped as stopped:
        print(stopped)
        return
    except (main.UserError, loop.NonFiniteError, DataError, ValueError) as error:
        if HELPER.value:
            print(
                f"process {os.getpid()} has failed: {error}"
            )  # the error is that of the process it helps, which comes to the same place
            sys.exit(2)
        main.fail(str(error))
    print(table(results))


if __name__ == "__main__":
    with main.full_disk_is_one_line():
        cli()
