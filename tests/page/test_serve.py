"""The server over real sockets, with a tiny student that reads captions."""

import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import websockets
from PIL import Image
from running import CAPTION, GOLDEN, Running, make_export, open_all
from shell import ROOT, assert_one_error_line, quick, run_command, wait_until

from jaxdistill import serve
from jaxdistill.interop.text_export import TextExport

pytestmark = pytest.mark.long


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_all(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def exports(opened):
    return opened[0]


@pytest.fixture(scope="module")
def running(opened):
    exports, painters = opened
    with Running(painters, serve.describe(str(exports["student"]), painters)) as found:
        yield found


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_images_are_those_of_sample(running, exports, model):
    export, expected = TextExport(exports[model], encoder=GOLDEN), {}
    settings = [
        {"steps": s, "seed": n, "noise_correction": c}
        for s in (1, 3)
        for n in (0, 7)
        for c in (True, False)
    ]
    for setting in settings:
        image = running.image(model=model, **setting)
        same = export([CAPTION], **setting)[0]
        np.testing.assert_allclose(image, same * 255.0, atol=1.0)
        expected[str(setting)] = image.tobytes()
    assert len(set(expected.values())) == 6  # noise correction does nothing at one step


def test_an_export_compiles_once_for_all_calls_of_one_setting(tmp_path):
    export = TextExport(
        make_export(tmp_path / "student", "student", steps=2, guidance=1.5), encoder=GOLDEN
    )
    work = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: work.append(name))
    first = export([CAPTION] * 3, batch_size=2)
    assert "/jax/core/compile/jaxpr_trace_duration" in work
    work.clear()
    assert not np.array_equal(export(["a bag"] * 3, batch_size=2, seed=1), first)
    np.testing.assert_array_equal(export([CAPTION] * 3, batch_size=2), first)
    assert not [name for name in work if name.startswith("/jax/core/compile")]
    # Another setting is another program, and does not put the first one out.
    assert not np.array_equal(export([CAPTION] * 3, batch_size=2, guidance=3.0), first)
    assert not np.array_equal(export([CAPTION] * 3, batch_size=2, noise_correction=False), first)
    work.clear()
    np.testing.assert_array_equal(export([CAPTION] * 3, batch_size=2), first)
    assert not [name for name in work if name.startswith("/jax/core/compile")]


TWO_DEVICES = """
import sys
import numpy as np
from running import CAPTION, GOLDEN
from jaxdistill.page.engine import ExportPainter
from jaxdistill.interop.text_export import TextExport

export = TextExport(sys.argv[1], encoder=GOLDEN)
painter = ExportPainter(export, (1, 3, 4))
print({size: place.mesh.size for size, place in painter._places.items()})
seeds = np.arange(4)
for rows in (1, 3, 4):
    run = painter.start(seeds[:rows], [painter.encode(CAPTION)] * rows, 2, True)
    while run.done < run.of:
        run.advance()
    for seed, image in zip(seeds, run.images()):
        same = export([CAPTION], steps=2, seed=int(seed), noise_correction=True)[0]
        np.testing.assert_allclose(image, 255.0 * same, atol=1.0)
"""


def test_rows_of_a_batch_are_divided_among_devices(exports):
    env = quick("--xla_force_host_platform_device_count=2", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    command = [sys.executable, "-c", TWO_DEVICES, str(exports["student"])]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "{1: 1, 3: 1, 4: 2}"


def test_png_holds_its_settings_and_defaults_are_the_cards(running):
    status, body, headers = running.get("/api/image", {"prompt": f"  {CAPTION} "})
    assert (
        status == 200
        and float(headers["x-milliseconds"]) > 0
        and "default-src 'none'" in headers["content-security-policy"]
    )
    settings = json.loads(Image.open(io.BytesIO(body)).text["jaxdistill"])
    assert settings == {
        "prompt": CAPTION,
        "steps": 3,
        "seed": 0,
        "noise_correction": True,
        "model": "student",
    }


def test_each_of_many_clients_gets_its_own_image(running):
    """Batched with strangers, of several step counts."""
    wanted = [
        {
            "seed": i,
            "steps": 1 + i % 3,
            "prompt": CAPTION if i % 2 else "a green dress above a red bag",
        }
        for i in range(40)
    ]
    alone = [running.image(**w) for w in wanted]

    async def one(session, w):
        answer = await session.run_in_executor(None, lambda: running.image(**w))
        return answer

    async def all_of_them():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(one(loop, w) for w in wanted))

    for found, expected in zip(asyncio.run(all_of_them()), alone, strict=True):
        np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1)


async def until(ws, kind: str, number: int, model: str = "student") -> list[dict]:
    """The frames up to one of that kind."""
    seen = []
    while True:
        seen.append(json.loads(await asyncio.wait_for(ws.recv(), 30)))
        if (seen[-1]["kind"], seen[-1]["id"], seen[-1].get("model", model)) == (
            kind,
            number,
            model,
        ):
            return seen


def test_page_gets_student_then_teacher_on_the_same_seeds(running):
    async def talk():
        async with websockets.connect(running.url.replace("http", "ws") + "/ws") as ws:
            frame = {
                "id": 1,
                "prompt": CAPTION,
                "steps": 2,
                "seed": 5,
                "count": 3,
                "noise_correction": False,
                "teacher": True,
            }
            await ws.send(json.dumps(frame))
            return await until(ws, "done", 1, "teacher")

    seen = asyncio.run(talk())
    images = {(f["model"], f["index"]): f for f in seen if f["kind"] == "image"}
    assert {(m, i) for m in ("student", "teacher") for i in range(3)} == set(images)
    order = [f["model"] for f in seen if f["kind"] == "done"]
    assert order == ["student", "teacher"] and any(f["kind"] == "progress" for f in seen)
    for (model, index), frame in images.items():
        assert frame["seed"] == 5 + index
        steps = {"steps": 2} if model == "student" else {}
        np.testing.assert_allclose(
            pixels(frame["png"]),
            running.image(model=model, seed=5 + index, noise_correction=False, **steps),
            atol=1,
        )


def test_newer_request_replaces_the_older_one(running):
    async def talk():
        async with websockets.connect(running.url.replace("http", "ws") + "/ws") as ws:
            for i in range(30):
                await ws.send(
                    json.dumps(
                        {
                            "id": i,
                            "prompt": CAPTION,
                            "steps": 3,
                            "seed": i,
                            "count": 9,
                            "teacher": True,
                        }
                    )
                )
            return await until(ws, "done", 29, "teacher")

    def drawn() -> float:
        lines = running.get("/metrics")[1].decode().splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith('jaxdistill_images_total{model="teacher",outcome="drawn"}')
        )

    before = drawn()
    seen = asyncio.run(talk())
    assert (
        sum(f["kind"] == "image" and f["model"] == "teacher" for f in seen) == 9
    )  # those of the last alone
    assert (
        9 <= drawn() - before <= 20
    )  # of 270 that were asked for; a batch may have been on its way
    assert not any(f["kind"] == "error" for f in seen)


class Slow:
    """A painter whose images take their time."""

    sizes, size, steps, max_steps, guidance, correct = (1,), (2, 2), 1, 3, 1.0, False
    counts, offered, choice = (), (1, 2, 3), True

    def __init__(self) -> None:
        self.go = threading.Event()

    def encode(self, caption: str) -> str:
        if caption == "bad":
            raise ValueError("caption is bad\nindeed")
        return caption

    def start(self, seeds, conds, steps, correct):
        return SlowRun(self, conds[0], steps)


class SlowRun:
    def __init__(self, painter: Slow, caption: str, steps: int) -> None:
        self.painter, self.caption, self.done, self.of = painter, caption, 0, steps

    def advance(self) -> None:
        assert self.painter.go.wait(20)
        if self.caption == "broken":
            raise RuntimeError("the weights melted")
        self.done += 1

    def images(self) -> np.ndarray:
        return np.zeros((1, 2, 2, 3), np.uint8)


def test_a_model_of_certain_step_counts_offers_and_takes_those_alone():
    painter = Slow()
    painter.steps, painter.max_steps, painter.counts = 4, 8, (1, 2, 4, 8)
    painter.offered = painter.counts
    painter.go.set()
    with Running({"student": painter}, serve.describe("x", {"student": painter})) as running:
        info = json.loads(running.get("/api/info")[1])
        assert (info["steps"], info["default_steps"]) == ([1, 2, 4, 8], 4)
        status, body, _ = running.get("/api/image", {"prompt": "a", "steps": 3})
        assert status == 422 and "steps: one of 1, 2, 4, 8, got 3" in body.decode()
        assert running.get("/api/image", {"prompt": "a", "steps": 2})[0] == 200


def test_busy_late_wrong_and_broken_requests_are_told_apart():
    painter = Slow()
    with Running({"student": painter}, {"name": "slow"}, limit=2, deadline=0.5) as running:
        answers: dict[str, tuple] = {}
        threads = []
        for name in ("first", "second", "third"):

            def ask(name: str = name) -> None:
                answers[name] = running.get("/api/image", {"prompt": name})

            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            time.sleep(0.15)  # one is being drawn, then two wait
        status, body, headers = running.get("/api/image", {"prompt": "fourth"})
        assert (
            status == 503 and json.loads(body)["code"] == "busy" and headers["retry-after"] == "1"
        )
        time.sleep(0.6)
        painter.go.set()
        for thread in threads:
            thread.join(20)
        assert answers["first"][0] == 200 and [answers[n][0] for n in ("second", "third")] == [
            504,
            504,
        ]
        assert json.loads(answers["second"][1])["code"] == "deadline"
        status, body, _ = running.get("/api/image", {"prompt": "bad"})
        assert (status, json.loads(body)) == (422, {"code": "invalid", "message": "caption is bad"})
        status, body, _ = running.get("/api/image", {"prompt": "broken"})
        assert status == 500 and "melted" not in body.decode()
        assert (
            running.get("/api/image", {"prompt": "again"})[0] == 200
            and running.get("/healthz")[0] == 200
        )
        text = running.get("/metrics")[1].decode()
        for outcome in ("busy", "deadline", "invalid", "failed", "drawn"):
            assert f'outcome="{outcome}"' in text, outcome


def test_only_the_pages_files_are_served(running):
    assert (
        running.get("/")[0]
        == running.get("/static/app.js")[0]
        == running.get("/static/style.css")[0]
        == 200
    )
    for path in (
        "/static/../serve.py",
        "/static/..%2fserve.py",
        "/static/%2e%2e/%2e%2e/pyproject.toml",
        "/static//etc/passwd",
        "/page/x",
    ):
        assert running.get(path)[0] == 404, path
    schema = json.loads(running.get("/openapi.json")[1])
    assert (
        "/api/image" in schema["paths"]
        and "image/png" in schema["paths"]["/api/image"]["post"]["responses"]["200"]["content"]
    )


def test_pages_of_other_sites_get_no_socket(running):
    async def talk(origin):
        async with websockets.connect(running.url.replace("http", "ws") + "/ws", origin=origin):
            return True

    assert asyncio.run(talk(running.url))
    with pytest.raises(websockets.exceptions.InvalidStatus):
        asyncio.run(talk("http://elsewhere.example"))


def test_junk_gets_an_error_and_harms_nobody(running):
    """10,000 frames and bodies of wrong types, sizes and encodings; cut connections."""
    r = random.Random(0)
    good = {
        "id": 1,
        "prompt": CAPTION,
        "steps": 1,
        "seed": 1,
        "count": 1,
        "noise_correction": True,
        "student": True,
        "teacher": False,
    }
    values = [
        None,
        -1,
        2**70,
        1.5,
        "x" * 5000,
        "",
        [],
        {},
        True,
        "\ud800",
        "<img src=x>",
        "\x00",
        float("inf"),
    ]

    def junk() -> object:
        kind = r.randrange(4)
        if kind == 0:
            return {**good, r.choice(list(good)): r.choice(values)}
        if kind == 1:
            return r.choice([[], 3, None, "x", {}, {"id": 1}, {**good, "more": 1}])
        if kind == 2:
            return bytes(r.randrange(256) for _ in range(r.randrange(60)))
        return json.dumps(good)[: r.randrange(80)]

    async def talk():
        answered, opened = 0, 0
        while opened < 45:
            opened += 1
            async with websockets.connect(running.url.replace("http", "ws") + "/ws") as ws:
                for _ in range(200):
                    found = junk()
                    await ws.send(found if isinstance(found, (bytes, str)) else json.dumps(found))
                if r.random() < 0.3:
                    ws.transport.abort()
                    continue
                await ws.send(json.dumps({**good, "id": 7}))
                answered += bool(await until(ws, "done", 7))
        return answered

    assert asyncio.run(talk()) >= 15
    for _ in range(1000):
        found = junk()
        body = (
            found
            if isinstance(found, bytes)
            else found.encode()
            if isinstance(found, str)
            else json.dumps(found).encode()
        )
        status, answer, _ = running.get("/api/image", body)
        assert status in (400, 422) and len(json.loads(answer)["message"].splitlines()) == 1, (
            body,
            answer,
        )
    with socket.create_connection(("127.0.0.1", running.port)) as cut:
        cut.sendall(b"POST /api/image HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert running.get("/api/image", {"prompt": CAPTION})[0] == 200
    assert "jaxdistill_sessions 0.0" in running.get("/metrics")[1].decode()
    assert running.server.engine.waiting() == 0


def ws_frame(
    payload: bytes,
    *,
    opcode: int = 1,
    final: bool = True,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """A client's frame as RFC 6455 has it, or a wrong one; `length` is what it claims."""
    size = len(payload) if length is None else length
    head = bytes([opcode | (0x80 if final else 0)])
    head += (
        bytes([(0x80 if masked else 0) | size])
        if size < 126
        else bytes([(0x80 if masked else 0) | 126]) + size.to_bytes(2, "big")
    )
    return head + (b"\0\0\0\0" if masked else b"") + payload


def raw_socket(port: int) -> socket.socket:
    """A websocket opened by hand."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    key = base64.b64encode(bytes(16)).decode()
    raw.sendall(
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection:"
        f" Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += raw.recv(1)
    assert b" 101 " in head.splitlines()[0]
    return raw


def rest_of(raw: socket.socket) -> bytes:
    """Everything until the server closes."""
    found = b""
    while part := raw.recv(4096):
        found += part
    return found


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (ws_frame(b"\xff\xfe{"), 1007),  # no UTF-8
        (ws_frame(b"{}", masked=False), 1002),
        (ws_frame(b"{}", opcode=3), 1002),  # a reserved opcode
        (ws_frame(b"more", opcode=0), 1002),  # the rest of a message that never began
        (ws_frame(b"x" * 300, opcode=9), 1002),  # a ping too long
        (ws_frame(b"", length=serve.MAX_FRAME + 1), 1009),
    ],
)
def test_broken_frames_close_their_own_socket(running, frame, code):
    with raw_socket(running.port) as raw:
        raw.sendall(frame)
        assert rest_of(raw)[-200:].find(code.to_bytes(2, "big")) >= 0


def test_half_frames_and_clients_that_never_read_hold_nobody_up(running):
    """Half a frame, a message without its end, a header without its end, and a page that asks for
    ever and never reads.
    """
    ask = json.dumps({"id": 1, "prompt": CAPTION, "steps": 1, "count": 9}).encode()
    lazy = [raw_socket(running.port) for _ in range(6)]
    for i, raw in enumerate(lazy):
        if i % 3 == 0:
            raw.sendall(ws_frame(ask)[: 5 + i])
        elif i % 3 == 1:
            raw.sendall(ws_frame(ask[:20], final=False))
        else:
            raw.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                for number in range(1000):
                    raw.sendall(ws_frame(ask.replace(b'"id": 1', f'"id": {number}'.encode())))
    head = socket.create_connection(("127.0.0.1", running.port))
    head.sendall(b"POST /api/image HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    began = time.monotonic()
    assert running.get("/api/image", {"prompt": CAPTION, "steps": 1})[0] == 200
    assert time.monotonic() - began < 10.0
    for raw in (*lazy, head):
        raw.close()
    wait_until(
        lambda: "jaxdistill_sessions 0.0" in running.get("/metrics")[1].decode(),
        seconds=60,
        what="the sockets to be let go",
    )
    wait_until(
        lambda: running.server.engine.waiting() == 0, seconds=20, what="their images to be dropped"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=nowhere"], ["nowhere does not exist; give a pipeline folder"]),
        (["--model=STUDENT", "--port=99999"], ["--port", "99999"]),
        (["--model=STUDENT", "--batch_sizes=0"], ["--batch_sizes"]),
        (["--model=STUDENT", "--port=TAKEN"], ["--port", "in use"]),
    ],
)
def test_bad_flags_are_one_line(flags, words, exports, running):
    flags = [f.replace("TAKEN", str(running.port)) for f in flags]
    assert_one_error_line(
        run_command(
            "jaxdistill.serve", *(f.replace("STUDENT", str(exports["student"])) for f in flags)
        ),
        *words,
    )
