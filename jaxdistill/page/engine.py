"""The engine behind `jaxdistill.serve`: waiting requests are drawn together, and a teacher yields
to the student between its calls.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import sampling
from jaxdistill.errors import NotFinite
from jaxdistill.interop import card
from jaxdistill.interop.families.family import FlowFamily
from jaxdistill.interop.text_export import TextExport
from jaxdistill.tasks.text_to_image.pipeline import Inputs, TextToImage, served

OFFERED: tuple[int, ...] = (1, 2, 3)
"""Step counts of the page for a model that was made for no certain ones."""


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
    counts: tuple[int, ...]  # the only step counts; empty: all up to max_steps
    offered: tuple[int, ...]  # those of the page
    guidance: float
    correct: bool
    choice: bool  # whether noise correction changes anything

    def encode(self, caption: str) -> Any:
        """The conditioning of one caption, as host arrays [1, ...].

        Raises ValueError in one line.
        """

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


class Rollout:
    """A sampler's loop, one call at a time.

    step: (state, t, t_next) -> state; finish: x -> uint8 images, of which the first `count` were
    asked for.
    """

    def __init__(
        self,
        state: Any,
        times: np.ndarray,
        next_times: np.ndarray,
        *,
        step: Callable[..., Any],
        finish: Callable[[Any], Any],
        count: int,
    ) -> None:
        self._state, self._times, self._next, self._step, self._finish, self._count = (
            state,
            times,
            next_times,
            step,
            finish,
            count,
        )
        self.done, self.of = 0, len(times)

    def advance(self) -> None:
        """One network call."""
        self._state = self._step(self._state, self._times[self.done], self._next[self.done])
        self.done += 1
        jax.block_until_ready(self._state.x)

    def images(self) -> np.ndarray:
        """uint8 [n, h, w, 3]."""
        return np.asarray(self._finish(self._state.x))[: self._count]


def filled(
    sizes: Sequence[int], seeds: np.ndarray, conds: Sequence[Any]
) -> tuple[int, np.ndarray, Any]:
    """(size, seeds [size], conditioning [size, ...]): the rows, the last one repeated up to the
    next of the sorted sizes.
    """
    size = next(s for s in sizes if s >= len(seeds))
    rows = np.minimum(np.arange(size), len(seeds) - 1)
    return (
        size,
        np.asarray(seeds, np.uint32)[rows],
        jax.tree.map(lambda *parts: np.concatenate([parts[r] for r in rows]), *conds),
    )


def places(sizes: Sequence[int]) -> dict[int, NamedSharding]:
    """For each batch size the most of this process's devices that divide its rows evenly, as the
    sharding of those rows.
    """
    devices = jax.local_devices()
    counts = {size: max(n for n in range(1, len(devices) + 1) if size % n == 0) for size in sizes}
    return {
        size: NamedSharding(Mesh(np.asarray(devices[:n]), ("rows",)), PartitionSpec("rows"))
        for size, n in counts.items()
    }


class ExportPainter:
    """A small text-conditional export.

    Image (seed) is that of `jaxdistill.sample --seed=seed --num=1`.

    A batch's rows are divided among the devices of this process.
    """

    def __init__(self, export: TextExport, sizes: Sequence[int], *, max_steps: int = 50) -> None:
        self.export, self.sizes = export, tuple(sorted(sizes))
        settings = export.card["sampler"]
        self.steps, self.guidance = int(settings["steps"]), float(settings["guidance"])
        self.correct, self.max_steps = bool(settings["noise_correction"]), max_steps
        self.choice = True
        self.counts: tuple[int, ...] = ()
        self.offered: tuple[int, ...] = OFFERED
        self.size = (export.shape[0], export.shape[1])
        self.encode = lru_cache(maxsize=4096)(self._encode)
        shape = export.shape

        def step(
            params: Any, state: Any, noise: Any, cond: Any, t: Any, t_next: Any, correct: Any
        ) -> Any:
            sampler = export.sampler
            denoiser = sampler.denoiser(params, noise, cond, self.guidance, correct)
            return sampler.step(noise)(denoiser(state.x, t), state, t, t_next)

        advance = jax.jit(step)
        draw = jax.jit(jax.vmap(lambda seed: card.noise_of(seed, jnp.arange(1), shape)[0]))
        finish = jax.jit(
            lambda x: (
                jnp.round(card.to_unit(x) * 255.0).astype(jnp.uint8),
                jnp.isfinite(x).all(),
            )
        )
        self._places = places(self.sizes)
        whole = {
            size: NamedSharding(place.mesh, PartitionSpec()) for size, place in self._places.items()
        }
        copies = {place: jax.device_put(export.params, place) for place in set(whole.values())}
        self._params = {size: copies[place] for size, place in whole.items()}
        self._programs: dict[int, tuple[Any, Any, Any]] = {}
        one, scalar, flag = self.encode("a"), np.float32(1.0), np.bool_(True)
        for size in self.sizes:
            _, *rows = filled((size,), np.zeros(1, np.uint32), [one])
            seeds, cond = jax.device_put(rows, self._places[size])
            noise = draw(seeds)
            compiled = advance.lower(
                self._params[size], sampling.start(noise), noise, cond, scalar, scalar, flag
            ).compile()
            self._programs[size] = (
                draw.lower(seeds).compile(),
                compiled,
                finish.lower(noise).compile(),
            )

    def _encode(self, caption: str) -> Any:
        return self.export.encode([caption])

    def start(self, seeds: np.ndarray, conds: Sequence[Any], steps: int, correct: bool) -> Rollout:
        """A run of these rows, filled up to the next size."""
        size, *rows = filled(self.sizes, seeds, conds)
        draw, advance, finish = self._programs[size]
        numbers, cond = jax.device_put(rows, self._places[size])
        noise, flag = draw(numbers), np.bool_(correct)
        times = np.append(self.export.sampler.grid(steps), 0.0).astype(np.float32)

        def step(state: Any, t: Any, t_next: Any) -> Any:
            return advance(self._params[size], state, noise, cond, t, t_next, flag)

        def finished(x: Any) -> Any:
            images, finite = finish(x)
            if not finite:
                raise NotFinite(card.NOT_FINITE)
            return images

        return Rollout(
            sampling.start(noise),
            times[:-1],
            times[1:],
            step=step,
            finish=finished,
            count=len(seeds),
        )


class PipelinePainter:
    """A diffusers folder or a text-to-image student.

    Image (seed) is that of `jaxdistill.sample --seed=seed --num=1`.
    """

    def __init__(
        self, pipe: TextToImage, sizes: Sequence[int], *, size: tuple[int, int] | None = None
    ) -> None:
        self.sizes, self.steps, self.guidance = tuple(sorted(sizes)), pipe.steps, pipe.guidance
        height, width = size or (None, None)
        self.size = pipe.check(height=height, width=width)
        self.correct = pipe.scheduler.noise_correction
        self.max_steps, self.counts = pipe.scheduler.run.most, pipe.scheduler.run.counts
        self.offered = self.counts or served(pipe.settings) or OFFERED
        self.choice = not isinstance(pipe.folder.family, FlowFamily)  # there it is the identity
        self.pipes = {self.correct: pipe, not self.correct: pipe}
        if self.choice:
            other = pipe.scheduler._replace(noise_correction=not self.correct)
            twin = TextToImage(pipe.folder, pipe.params, other, settings=pipe.settings, share=pipe)
            self.pipes[not self.correct] = twin
        self.null = pipe.text.negative(None) if pipe.guides(self.guidance) else {}
        self.encode = lru_cache(maxsize=1024)(self._encode)
        for count in self.sizes:  # compiles
            for correct in self.pipes:
                zeros, conds = np.zeros(count, np.uint32), [self.encode("a")] * count
                run = self.start(zeros, conds, self.steps, correct)
                run.advance()
            run.images()

    def _encode(self, caption: str) -> Any:
        pipe = self.pipes[self.correct]
        sized = pipe.folder.family.at_size(pipe.folder, *self.size)
        return pipe.text([caption]) | {name: values[None] for name, values in sized.items()}

    def start(self, seeds: np.ndarray, conds: Sequence[Any], steps: int, correct: bool) -> Rollout:
        """A run of these rows, filled up to the next size."""
        pipe = self.pipes[correct]
        _, numbers, cond = filled(self.sizes, seeds, conds)
        noise = jnp.asarray(np.concatenate([pipe.draw(int(n), 0, 1, *self.size) for n in numbers]))
        tokens = pipe.folder.family.image_tokens(pipe.folder, *self.size)
        run, guided = pipe.scheduler.run(steps, tokens), pipe.guides(self.guidance)
        inputs = Inputs(noise, cond, self.null, np.float32(self.guidance))

        def step(state: Any, t: Any, t_next: Any) -> Any:
            return pipe.advance(pipe.params, state, inputs, t, t_next, guided=guided)

        def finish(x: Any) -> np.ndarray:
            return np.round(pipe.decode(x) * 255.0).astype(np.uint8)

        state = pipe.scheduler.begin(noise, run)
        return Rollout(state, run.times, run.next_times, step=step, finish=finish, count=len(seeds))


@dataclass(eq=False)
class Job:
    """One image.

    `answer` is called once, from the engine's thread, with the image uint8 [h, w, 3] or an
    exception.
    """

    model: str
    caption: str
    steps: int
    seed: int
    correct: bool
    answer: Callable[[Any], None]
    progress: Callable[[int, int], None] | None = None
    deadline: float = float("inf")
    cancelled: bool = False


class Engine:
    """One thread that draws.

    The student's jobs go first; the teacher's advance one call at a time between them.
    """

    def __init__(self, painters: dict[str, Painter], *, limit: int = 256) -> None:
        self.painters, self.limit = painters, limit
        self._waiting: dict[str, collections.deque[Job]] = {
            name: collections.deque() for name in painters
        }
        self._slow: tuple[list[Job], Run] | None = None
        self._ready, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy where `limit` of its model wait."""
        with self._ready:
            queue = self._waiting[job.model]
            if (
                len(queue) >= self.limit
            ):  # only now: a look at every job for every job would hold all pages up
                dropped = [j for j in queue if j.cancelled]
                kept = [j for j in queue if not j.cancelled]
                queue.clear()
                queue.extend(kept)
                self._fail(dropped, Cancelled())
            if self._closed or len(queue) >= self.limit:
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
            elif len(taken) < most and (
                not taken or (job.steps, job.correct) == (taken[0].steps, taken[0].correct)
            ):
                taken.append(job)
            else:
                kept.append(job)
        queue.extend(kept)
        return taken

    def _begin(self, model: str, jobs: list[Job]) -> tuple[list[Job], Run] | None:
        """A run of the jobs whose captions can be read; the others are answered."""
        painter, good, conds = self.painters[model], list[Job](), list[Any]()
        for job in jobs:
            try:
                conds.append(painter.encode(job.caption))
                good.append(job)
            except Exception as error:
                self._fail([job], error)
        try:
            return (
                (
                    good,
                    painter.start(
                        np.asarray([j.seed for j in good]), conds, good[0].steps, good[0].correct
                    ),
                )
                if good
                else None
            )
        except Exception as error:
            self._fail(good, error)
            return None

    def _advance(self, jobs: list[Job], run: Run, *, calls: int) -> bool:
        """At most so many network calls more.

        Whether the batch is over: every job is then answered.
        """
        if all(job.cancelled for job in jobs):
            self._fail(jobs, Cancelled())
            return True
        try:
            for _ in range(min(calls, run.of - run.done)):
                run.advance()
            for job in jobs:
                if job.progress and not job.cancelled:
                    job.progress(run.done, run.of)
            if run.done < run.of:
                return False
            images = list(run.images())
        except Exception as error:
            self._fail(jobs, error)
        else:
            for job, image in zip(jobs, images, strict=True):
                job.answer(image)
        return True

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Answer with an exception; the log has those that are nobody's request's fault.

        One batch fails, the server lives.
        """
        if not isinstance(error, (ValueError, Cancelled)):
            logging.error("drawing failed", exc_info=error)
        for job in jobs:
            job.answer(error)

    def _work(self) -> None:
        fast, *slow = self.painters
        while True:
            with self._ready:
                while not (self._closed or self._slow or any(self._waiting.values())):
                    self._ready.wait()
                if self._closed:
                    break
                model, jobs = fast, self._take(fast)
                if not jobs and not self._slow and slow:
                    model, jobs = slow[0], self._take(slow[0])
            begun = self._begin(model, jobs) if jobs else None
            if begun and model == fast:
                self._advance(*begun, calls=begun[1].of)
                continue
            self._slow = begun or self._slow
            if self._slow and self._advance(*self._slow, calls=1):
                self._slow = None
        left = [job for queue in self._waiting.values() for job in queue] + (
            self._slow[0] if self._slow else []
        )
        self._fail(left, Cancelled())
