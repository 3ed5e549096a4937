"""A server in a thread, and tiny exports to serve."""

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn
from PIL import Image

from jaxdistill import serve
from jaxdistill.interop import card, sentence_encoder
from jaxdistill.run import checkpoint

GOLDEN = Path(__file__).parent / "golden" / "bert"
CAPTION = "a red bag above a blue boot"


def make_export(folder: Path, role: str, *, steps: int, guidance: float) -> Path:
    """A random export: images differ by caption, seed, steps and noise correction."""
    encoder = sentence_encoder.load(GOLDEN)
    sampler = {
        "solver": "ddim",
        "grid": "trailing",
        "steps": steps,
        "guidance": guidance,
        "noise_correction": role == "student",
    }
    block = {
        "format": card.FORMAT,
        "role": role,
        "model": {
            "name": "text_unet",
            "channels": (8,),
            "blocks": 1,
            "patch": 4,
            "text_width": 16,
            "time_scale": 1.0,
        },
        "schedule": {
            "name": "scaled_linear",
            "snr_scale": 1.0,
            "zero_terminal_snr": False,
            "num_train_steps": 1000,
        },
        "prediction": "x0",
        "data": {"name": "scenes", "image_shape": [32, 32, 3], "range": [-1.0, 1.0]},
        "text": {"sha256": encoder.hash, "length": 32},
        "sampler": sampler,
    }
    tokens, mask = encoder([CAPTION], length=32, batch_size=1)
    cond = {"tokens": tokens.astype(np.float32), "mask": mask}
    params = jax.jit(card.build_model(block["model"]).init)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), cond
    )
    noisy = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(len(str(path))), a.shape)  # noqa: E731  (its last layer starts at 0)
    checkpoint.export(folder, jax.tree_util.tree_map_with_path(noisy, params), block)
    return folder


class Running:
    """A server in a thread."""

    def __init__(self, painters: dict, info: dict, port: int = 0, **options: float) -> None:
        self.painters, self.info, self.options = painters, info, options
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def start(self) -> "Running":
        self.server = serve.Server(self.painters, self.info, **self.options)
        app = serve.make_app(self.server)
        options = {
            "log_level": "error",
            "ws_max_size": serve.MAX_FRAME,
            "timeout_graceful_shutdown": 2,
        }
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=self.port, **options)
        )
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.server.engine.alive()

    def __enter__(self) -> "Running":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def get(self, path: str, body: object = None) -> tuple[int, bytes, dict]:
        """(status, body, headers)."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"} if data is not None else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def image(self, **request: object) -> np.ndarray:
        status, body, _ = self.get("/api/image", {"prompt": CAPTION, **request})
        assert status == 200, body
        return np.asarray(Image.open(io.BytesIO(body)))


def open_all(folder: Path) -> tuple[dict[str, Path], dict]:
    """(exports, painters) of a tiny student and its teacher."""
    exports = {
        "student": make_export(folder / "student", "student", steps=3, guidance=1.0),
        "teacher": make_export(folder / "teacher", "teacher", steps=8, guidance=2.0),
    }
    return exports, {
        name: serve.open_painter(str(path), (1, 4), encoder=str(GOLDEN))
        for name, path in exports.items()
    }
