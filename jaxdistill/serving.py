"""The engine behind `jaxdistill.serve`: waiting requests are drawn together, and a teacher yields to the student between its calls."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import card, sampling
from jaxdistill.pipeline import TextToImage, time_ids
from jaxdistill.text_export import TextExport


class Busy(Exception):
    """The queue is full."""


class Expired(Exception):
    """The request waited longer than its deadline."""


class Cancelled(Exception):
    """A newer request of the same session came."""


@runtime_checkable
class Painter(Protocol):
    """A model whose programs are compiled. Rows of a batch do not depend on one another."""

    sizes: tuple[int, ...]  # of the batches that are compiled for
    size: tuple[int, int]  # height and width of the images
    steps: int
    max_steps: int
    guidance: float
    correct: bool

    def encode(self, caption: str) -> Any:
        """The conditioning of one caption, as host arrays [1, ...]. Raises ValueError in one line."""

    def start(self, seeds: np.ndarray, conds: Sequence[Any], steps: int, correct: bool) -> "Run":
        """A run of len(seeds) rows, at most the largest size."""


@runtime_checkable
class Run(Protocol):
    """A batch on its way."""

    done: int
    of: int

    def advance(self) -> None:
        """One network call."""

    def images(self) -> np.ndarray:
        """uint8 [n, h, w, 3] when done == of."""


class ExportPainter:
    """A small text-conditional export. Image (seed) is that of `jaxdistill.sample --seed=seed --num=1`."""

    def __init__(self, export: TextExport, sizes: Sequence[int], *, max_steps: int = 50) -> None:
        self.export, self.sizes = export, tuple(sorted(sizes))
        settings = export.card["sampler"]
        self.steps, self.guidance = int(settings["steps"]), float(settings["guidance"])
        self.correct, self.max_steps = bool(settings["noise_correction"]), max_steps
        self.size = (export.shape[0], export.shape[1])
        self.params = jax.device_put(export.params)
        self.encode = lru_cache(maxsize=4096)(self._encode)
        shape = export.shape

        def step(params: Any, state: Any, noise: Any, cond: Any, t: Any, t_next: Any, correct: Any) -> Any:
            sampler = export.sampler
            denoiser = sampler.denoiser(params, noise, cond, self.guidance, correct)
            return sampler.step(noise)(denoiser(state.x, t), state, t, t_next)

        draw = jax.jit(jax.vmap(lambda seed: card.noise_of(seed, jnp.arange(1), shape)[0]))
        finish = jax.jit(lambda x: jnp.round(card.to_unit(x) * 255.0).astype(jnp.uint8))
        self._programs: dict[int, tuple[Any, Any, Any]] = {}
        one = self.encode("a")
        for size in self.sizes:
            seeds = np.zeros(size, np.int32)
            noise = draw(seeds)
            cond = jax.tree.map(lambda a, n=size: np.repeat(a, n, axis=0), one)
            state = sampling.start(noise)
            scalar, flag = np.float32(1.0), np.bool_(True)
            advance = jax.jit(step).lower(self.params, state, noise, cond, scalar, scalar, flag).compile()
            self._programs[size] = draw.lower(seeds).compile(), advance, finish.lower(noise).compile()

    def _encode(self, caption: str) -> Any:
        return self.export.encode([caption])

    def start(self, seeds: np.ndarray, conds: Sequence[Any], steps: int, correct: bool) -> "ExportRun":
        """A run of these rows, filled up to the next size."""
        size = next(s for s in self.sizes if s >= len(seeds))
        rows = np.minimum(np.arange(size), len(seeds) - 1)
        cond = jax.tree.map(lambda *parts: np.concatenate([parts[r] for r in rows]), *conds)
        return ExportRun(self, self._programs[size], np.asarray(seeds, np.int32)[rows], cond, steps, correct, len(seeds))


class ExportRun:
    """A batch of `ExportPainter`."""

    def __init__(self, painter: ExportPainter, programs: Any, seeds: Any, cond: Any, steps: int, correct: bool, count: int) -> None:
        self._draw, self._advance, self._finish = programs
        self._params, self._cond, self._correct, self._count = painter.params, cond, np.bool_(correct), count
        grid = np.append(painter.export.sampler.grid(steps), 0.0).astype(np.float32)
        self._times, self.of, self.done = grid, steps, 0
        self._noise = self._draw(seeds)
        self._state = sampling.start(self._noise)

    def advance(self) -> None:
        """One network call."""
        t, t_next = self._times[self.done], self._times[self.done + 1]
        self._state = self._advance(self._params, self._state, self._noise, self._cond, t, t_next, self._correct)
        self.done += 1
        jax.block_until_ready(self._state.x)

    def images(self) -> np.ndarray:
        """uint8 [n, h, w, 3]."""
        return np.asarray(self._finish(self._state.x))[: self._count]


class PipelinePainter:
    """A diffusers folder or a text-to-image student. Image (seed) is that of `jaxdistill.sample --seed=seed --num=1`."""

    def __init__(self, pipe: TextToImage, sizes: Sequence[int]) -> None:
        self.sizes, self.steps, self.guidance = tuple(sorted(sizes)), pipe.steps, pipe.guidance
        self.size, self.max_steps, self.correct = pipe.check(), 1000, pipe.scheduler.noise_correction
        other = pipe.scheduler._replace(noise_correction=not self.correct)
        twin = TextToImage(pipe.folder, pipe.params, other, settings=pipe.settings, share=pipe)
        self.pipes = {self.correct: pipe, not self.correct: twin}
        self.null = pipe.text.negative(None) if self.guidance > 1.0 else {}
        self.encode = lru_cache(maxsize=1024)(self._encode)
        for count in self.sizes:  # compiles
            for correct in self.pipes:
                run = self.start(np.zeros(count, np.int32), [self.encode("a")] * count, 1, correct)
                run.advance()
            run.images()

    def _encode(self, caption: str) -> Any:
        pipe = self.pipes[self.correct]
        return pipe.text([caption]) | ({"time_ids": time_ids(*self.size)[None]} if pipe.folder.xl else {})

    def start(self, seeds: np.ndarray, conds: Sequence[Any], steps: int, correct: bool) -> "PipelineRun":
        """A run of these rows, filled up to the next size."""
        pipe, size = self.pipes[correct], next(s for s in self.sizes if s >= len(seeds))
        rows = np.minimum(np.arange(size), len(seeds) - 1)
        cond = {name: np.concatenate([conds[r][name] for r in rows]) for name in conds[0]}
        noise = np.concatenate([pipe.draw(int(seeds[r]), 0, 1, *self.size) for r in rows])
        return PipelineRun(pipe, noise, cond, self.null, self.guidance, steps, len(seeds))


class PipelineRun:
    """A batch of `PipelinePainter`."""

    def __init__(self, pipe: TextToImage, noise: np.ndarray, cond: Any, null: Any, guidance: float, steps: int, count: int) -> None:
        self._pipe, self._noise, self._cond, self._null, self._guidance, self._count = pipe, jnp.asarray(noise), cond, null, guidance, count
        self._run = pipe.scheduler.run(steps)
        self.done, self.of = 0, len(self._run.times)
        self._state = pipe.scheduler.start(self._noise * self._run.scale)

    def advance(self) -> None:
        """One network call."""
        t, t_next, pipe = self._run.times[self.done], self._run.next_times[self.done], self._pipe
        scale = np.float32(self._guidance)
        self._state = pipe.advance(
            pipe.params, self._state, self._noise, self._cond, self._null, t, t_next, scale, guided=self._guidance > 1.0
        )
        self.done += 1
        jax.block_until_ready(self._state.x)

    def images(self) -> np.ndarray:
        """uint8 [n, h, w, 3]."""
        return np.round(self._pipe.decode(self._state.x)[: self._count] * 255.0).astype(np.uint8)


@dataclass(eq=False)
class Job:
    """One image. `answer` is called once, from the engine's thread, with the image uint8 [h, w, 3] or an exception."""

    model: str
    caption: str
    steps: int
    seed: int
    correct: bool
    answer: Callable[[Any], None]
    progress: Callable[[int, int], None] | None = None
    deadline: float = float("inf")
    cancelled: bool = False
    received: float = field(default_factory=time.monotonic)


class Engine:
    """One thread that draws. The student's jobs go first; the teacher's advance one call at a time between them."""

    def __init__(self, painters: dict[str, Painter], *, limit: int = 256) -> None:
        self.painters, self.limit = painters, limit
        self._waiting: dict[str, collections.deque[Job]] = {name: collections.deque() for name in painters}
        self._slow: tuple[list[Job], Run] | None = None
        self._ready, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy where `limit` of its model wait."""
        with self._ready:
            queue = self._waiting[job.model]
            if self._closed or sum(not j.cancelled for j in queue) >= self.limit:
                raise Busy
            queue.append(job)
            self._ready.notify()

    def waiting(self) -> int:
        """Images that wait."""
        return sum(len(queue) for queue in self._waiting.values())

    def alive(self) -> bool:
        """Whether images are drawn."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Answer what waits with Cancelled, and end the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(timeout=30)

    def _take(self, model: str) -> list[Job]:
        """The oldest job of a model and those that can be drawn with it."""
        queue, now = self._waiting[model], time.monotonic()
        taken: list[Job] = []
        kept: list[Job] = []
        most = max(self.painters[model].sizes)
        while queue:
            job = queue.popleft()
            if job.cancelled:
                job.answer(Cancelled())
            elif job.deadline < now:
                job.answer(Expired())
            elif len(taken) < most and (not taken or (job.steps, job.correct) == (taken[0].steps, taken[0].correct)):
                taken.append(job)
            else:
                kept.append(job)
        queue.extend(kept)
        return taken

    def _begin(self, model: str, jobs: list[Job]) -> tuple[list[Job], Run] | None:
        painter, good, conds = self.painters[model], [], []
        for job in jobs:
            try:
                conds.append(painter.encode(job.caption))
                good.append(job)
            except ValueError as error:
                job.answer(error)
        if not good:
            return None
        return good, painter.start(np.asarray([j.seed for j in good]), conds, good[0].steps, good[0].correct)

    def _work(self) -> None:
        fast, *slow = self.painters
        while True:
            with self._ready:
                while not (self._closed or self._slow or any(self._waiting.values())):
                    self._ready.wait()
                if self._closed:
                    left = [j for queue in self._waiting.values() for j in queue] + (self._slow[0] if self._slow else [])
                    break
                jobs = self._take(fast)
                if not jobs and not self._slow and slow:
                    jobs, model = self._take(slow[0]), slow[0]
                else:
                    model = fast
            try:
                self._draw(model, fast, jobs)
            except Exception as error:  # one batch fails, the server lives
                for job in jobs + (self._slow[0] if self._slow and not jobs else []):
                    job.answer(error)
                if not jobs:
                    self._slow = None
        for job in left:
            job.answer(Cancelled())

    def _draw(self, model: str, fast: str, jobs: list[Job]) -> None:
        begun = self._begin(model, jobs) if jobs else None
        if begun and model == fast:
            run = begun[1]
            while run.done < run.of:
                run.advance()
            for job, image in zip(begun[0], run.images(), strict=True):
                job.answer(image)
            return
        self._slow = begun or self._slow
        if not self._slow:
            return
        jobs, run = self._slow
        if all(job.cancelled for job in jobs):
            self._slow = None
            for job in jobs:
                job.answer(Cancelled())
            return
        run.advance()
        for job in jobs:
            if job.progress and not job.cancelled:
                job.progress(run.done, run.of)
        if run.done == run.of:
            self._slow = None
            for job, image in zip(jobs, run.images(), strict=True):
                job.answer(image)
