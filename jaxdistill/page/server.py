"""What the page and programs talk to: a web application over the engine.

`/` is the page and `/ws` its requests; `POST /api/image` is one image for a program; `/healthz` and
`/metrics` are for those who run it.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException

import jaxdistill
from jaxdistill.errors import NotFinite
from jaxdistill.page.engine import Busy, Cancelled, Engine, Expired, ExportPainter, Job, Painter

PAGE = Path(__file__).parent
FILES = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
MAX_PROMPT, MAX_COUNT, MAX_FRAME, MAX_UNREAD = 2000, 9, 32_768, 1024
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Prompt = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT)
]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ImageRequest(BaseModel):
    """One image."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Prompt
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    seed: Seed = 0
    noise_correction: bool | None = None
    model: Literal["student", "teacher"] = "student"


class Frame(BaseModel):
    """A request of the page: images of `count` seeds, by the student, the teacher or both."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[int, Field(ge=0, lt=2**53)]
    prompt: Prompt
    steps: Annotated[int, Field(ge=1, le=1000)]
    seed: Seed = 0
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    noise_correction: bool = True
    student: bool = True
    teacher: bool = False


def line_of(error: ValidationError | RequestValidationError) -> str:
    """The first thing that is wrong with a request, as one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def png_of(image: np.ndarray, settings: dict[str, Any]) -> bytes:
    """The image as PNG with its settings inside, under "jaxdistill"."""
    info, out = PngInfo(), io.BytesIO()
    info.add_text("jaxdistill", json.dumps(settings))
    Image.fromarray(image).save(out, "PNG", pnginfo=info)
    return out.getvalue()


class Meters:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.images = Counter(
            "jaxdistill_images",
            "Images by model and outcome.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "jaxdistill_image_seconds", "From request to image.", ["model"], registry=self.registry
        )
        self.sessions = Gauge("jaxdistill_sessions", "Open pages.", registry=self.registry)
        self.waiting = Gauge("jaxdistill_waiting", "Queued images.", registry=self.registry)


def outcome_of(found: Any) -> tuple[str, int, str]:
    """(code, HTTP status, message) of an exception from the engine."""
    if isinstance(found, Busy):
        return "busy", 503, "the server is busy; try again in a moment"
    if isinstance(found, Expired):
        return "deadline", 504, "the request waited too long; try again in a moment"
    if isinstance(found, Cancelled):
        return "cancelled", 503, "the server is shutting down"
    if isinstance(found, NotFinite):
        return "failed", 500, str(found)
    if isinstance(found, ValueError):
        return "invalid", 422, str(found).splitlines()[0]
    return "failed", 500, "drawing failed; the server's log says why"


class Session:
    """One open page: its newest request, and what is still to be sent of it."""

    def __init__(self, app: "Server", socket: WebSocket) -> None:
        self.app, self.socket, self.jobs = app, socket, list[Job]()
        self.outgoing: asyncio.Queue[tuple[int, dict[str, Any], np.ndarray | None]] = (
            asyncio.Queue()
        )
        self.newest = -1
        self.pending: Frame | None = None
        self.asked = asyncio.Event()

    async def run(self) -> None:
        """Until the page is closed."""
        tasks = [asyncio.create_task(part()) for part in (self.send, self.receive, self.work)]
        self.app.meters.sessions.inc()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.app.meters.sessions.dec()

    def cancel(self) -> None:
        """Drop the request before."""
        for job in self.jobs:
            job.cancelled = True
        self.jobs = []
        while not self.outgoing.empty():
            self.outgoing.get_nowait()

    async def receive(self) -> None:
        """Frames until the page is closed."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            number = -1
            try:
                raw = json.loads(message.get("text") or "")
                number = raw["id"] if isinstance(raw, dict) and type(raw.get("id")) is int else -1
                frame = Frame.model_validate(raw)
                self.app.check("student", frame.steps)
            except ValidationError as error:
                self.refuse(number, line_of(error))
            except (ValueError, RecursionError) as error:
                text = (
                    "a frame must be JSON text"
                    if isinstance(error, (json.JSONDecodeError, RecursionError))
                    else str(error)
                )
                self.refuse(number, text)
            else:
                self.pending = frame
                self.asked.set()

    async def work(self) -> None:
        """Begin the newest request. Of those that came at once the older ones are never begun."""
        while True:
            await self.asked.wait()
            self.asked.clear()
            if self.pending is not None:
                self.begin(self.pending)

    def refuse(self, number: int, message: str) -> None:
        """An error that is the page's own; a page that reads none of them gets no more."""
        if self.outgoing.qsize() >= MAX_UNREAD:
            return
        self.outgoing.put_nowait(
            (number, {"kind": "error", "code": "invalid", "message": message}, None)
        )

    def begin(self, frame: Frame) -> None:
        """Queue the images of a request in place of the one before."""
        self.cancel()
        self.newest = frame.id
        for model in [name for name in self.app.painters if getattr(frame, name)]:
            painter, own = self.app.painters[model], model == "student"
            request = ImageRequest.model_construct(
                prompt=frame.prompt,
                model=model,
                steps=frame.steps if own else painter.steps,
                noise_correction=frame.noise_correction if own else painter.correct,
            )
            left = [frame.count]
            for index in range(frame.count):
                seed = (frame.seed + index) % 2**32
                self.queue(frame.id, request.model_copy(update={"seed": seed}), index, left)

    def queue(self, number: int, request: ImageRequest, index: int, left: list[int]) -> None:
        """Queue image `index` of frame `number`; `left` counts those that are not drawn yet."""
        app, loop, began = self.app, asyncio.get_running_loop(), time.monotonic()
        model, settings = request.model, request.model_dump()

        def say(body: dict[str, Any], image: np.ndarray | None = None) -> None:
            message = (number, {"model": model, **body}, image)
            loop.call_soon_threadsafe(self.outgoing.put_nowait, message)

        def answer(found: Any) -> None:
            app.count(model, found, began)
            milliseconds = round(1000 * (time.monotonic() - began), 2)
            if isinstance(found, Cancelled):
                return
            if isinstance(found, Exception):
                code, _, message = outcome_of(found)
                say({"kind": "error", "code": code, "message": message})
                return
            shown = {"index": index, "seed": request.seed, "milliseconds": milliseconds}
            say({"kind": "image", **shown, "settings": settings}, found)
            left[0] -= 1
            if not left[0]:
                say({"kind": "done", "milliseconds": milliseconds})

        def progress(done: int, of: int) -> None:
            say({"kind": "progress", "done": done, "of": of})

        job = app.job(request, answer, progress if model == "teacher" and index == 0 else None)
        self.jobs.append(job)
        try:
            app.engine.submit(job)
        except Busy as error:
            answer(error)

    async def send(self) -> None:
        """Frames of the newest request; those of older ones are dropped."""
        while True:
            number, body, image = await self.outgoing.get()
            if number not in (self.newest, -1) and body["kind"] != "error":
                continue
            if image is not None:
                png = await asyncio.to_thread(png_of, image, body.pop("settings"))
                body["png"] = base64.b64encode(png).decode()
            await self.socket.send_text(json.dumps({"id": number, **body}))


class Server:
    """The engine with what the page and programs are told."""

    def __init__(
        self,
        painters: dict[str, Painter],
        info: dict[str, Any],
        *,
        limit: int = 256,
        deadline: float = 30.0,
    ) -> None:
        self.painters, self.info, self.deadline, self.meters = painters, info, deadline, Meters()
        self.engine = Engine(painters, limit=limit)
        self.meters.waiting.set_function(self.engine.waiting)

    def check(self, model: str, steps: int) -> None:
        """Raise ValueError for a step count that the model has no use for."""
        most, counts = self.painters[model].max_steps, self.painters[model].counts
        if counts and steps not in counts:
            raise ValueError(f"steps: one of {', '.join(map(str, counts))}, got {steps}")
        if steps > most:
            raise ValueError(f"steps: at most {most}, got {steps}")

    def count(self, model: str, found: Any, began: float) -> None:
        """One image more."""
        outcome = outcome_of(found)[0] if isinstance(found, Exception) else "drawn"
        self.meters.images.labels(model, outcome).inc()
        if outcome == "drawn":
            self.meters.seconds.labels(model).observe(time.monotonic() - began)

    def job(
        self,
        request: ImageRequest,
        answer: Callable[[Any], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> Job:
        """A request whose steps and noise correction are said, for the engine."""
        assert request.steps is not None and request.noise_correction is not None
        return Job(
            request.model,
            request.prompt,
            request.steps,
            request.seed,
            request.noise_correction,
            answer,
            progress,
            time.monotonic() + self.deadline,
        )

    async def image(self, request: ImageRequest) -> Response:
        """One image for a program."""
        if request.model not in self.painters:
            raise ValueError("model: no teacher is served here; start the server with --teacher")
        painter = self.painters[request.model]
        steps = painter.steps if request.steps is None else request.steps
        correct = painter.correct if request.noise_correction is None else request.noise_correction
        self.check(request.model, steps)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(found: Any) -> None:
            if not future.done():
                future.set_result(found)

        def answer(found: Any) -> None:
            self.count(request.model, found, began)
            loop.call_soon_threadsafe(settle, found)

        settings = {"steps": steps, "noise_correction": correct}
        job = self.job(request.model_copy(update=settings), answer)
        try:
            self.engine.submit(job)
            found = await future
        except Busy as error:
            self.count(request.model, error, began)
            found = error
        finally:
            job.cancelled = True  # the client may have left
        if isinstance(found, Exception):
            code, status, message = outcome_of(found)
            return JSONResponse(
                {"code": code, "message": message},
                status,
                {"Retry-After": "1"} if status == 503 else None,
            )
        png = await asyncio.to_thread(png_of, found, request.model_dump() | settings)
        return Response(
            png,
            media_type="image/png",
            headers={"X-Milliseconds": f"{1000 * (time.monotonic() - began):.2f}"},
        )


def make_app(server: Server) -> FastAPI:
    """The web application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(
        title="jaxdistill",
        version=jaxdistill.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    add_errors(app)
    add_page(app, server)
    add_programs(app, server)
    return app


def add_errors(app: FastAPI) -> None:
    """The headers of every answer, and one line for what a client can mend."""

    @app.middleware("http")
    async def headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"code": "invalid", "message": line_of(error)}, 422)

    @app.exception_handler(HTTPException)
    async def unreadable(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"code": "invalid", "message": str(error.detail)}, error.status_code)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"code": "invalid", "message": str(error).splitlines()[0]}, 422)


def add_page(app: FastAPI, server: Server) -> None:
    """The page's files and its socket."""
    files = {name: (PAGE / name).read_bytes() for name in FILES}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(files["index.html"], media_type="text/html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return (
            Response(files[name], media_type=FILES[name])
            if name in files
            else Response(status_code=404)
        )

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        origin = socket.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != socket.headers.get("host"):
            await socket.close(1008)  # another site's page
            return
        await socket.accept()
        await Session(server, socket).run()


def add_programs(app: FastAPI, server: Server) -> None:
    """What programs ask for."""

    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        """What is served here."""
        return server.info

    @app.post(
        "/api/image",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, 503: {}, 504: {}},
    )
    async def image(request: ImageRequest) -> Response:
        """One image as PNG, its settings inside."""
        return await server.image(request)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Whether images are drawn."""
        alive = server.engine.alive()
        return JSONResponse({"ok": alive}, 200 if alive else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(server.meters.registry), media_type=CONTENT_TYPE_LATEST)


def describe(folder: str, painters: dict[str, Painter]) -> dict[str, Any]:
    """What the page is told."""
    student, teacher = painters["student"], painters.get("teacher")
    examples, hint = ["a photo of a cat", "a watercolour of a lighthouse at dusk"], ""
    if isinstance(student, ExportPainter) and student.export.card["data"]["name"] == "scenes":
        from jaxdistill.tasks.scenes import scenes

        pairs = [
            ("red", "sneaker", "blue", "bag"),
            ("green", "dress", "white", "trousers"),
            ("purple", "coat", "yellow", "boot"),
        ]
        shown = [
            scenes.Scene(scenes.AXES[i % 2], pair[:2], pair[2:]) for i, pair in enumerate(pairs)
        ]
        examples = [scenes.captions(scene)[0] for scene in shown]
        hint = (
            f"Two garments and where they are. Colours: {', '.join(scenes.COLOURS)}. Garments:"
            f" {', '.join(scenes.GARMENTS)}."
        )
    path = Path(folder).resolve()
    return {
        "name": path.name,
        "version": jaxdistill.__version__,
        "steps": list(student.offered),
        "default_steps": min(student.steps, max(student.offered)),
        "noise_correction": {"default": student.correct, "choice": student.choice},
        "image": {"height": student.size[0], "width": student.size[1]},
        "examples": examples,
        "hint": hint,
        "teacher": {"steps": teacher.steps, "guidance": teacher.guidance} if teacher else None,
        "counts": [1, 4, 9],
        "max_prompt": MAX_PROMPT,
    }
