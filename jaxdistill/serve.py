"""`python -m jaxdistill.serve --model=DIR/student [--teacher=DIR/teacher]`: a page where an image
changes with each keystroke.

`POST /api/image` is the same for programs (JSON in, PNG out; `/openapi.json` describes it);
`/healthz` and `/metrics` are for those who run it.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxdistill.errors import missing_extra
from jaxdistill.run import compilation
from jaxdistill.sample import Parser, kind

try:
    import uvicorn

    from jaxdistill.interop.text_export import TextExport
    from jaxdistill.page.engine import ExportPainter, Painter, PipelinePainter
    from jaxdistill.page.server import MAX_FRAME, Server, describe, make_app
    from jaxdistill.tasks.text_to_image import pipeline
except ModuleNotFoundError as error:
    print(f"error: {missing_extra(error)}", file=sys.stderr)
    sys.exit(2)


def open_painter(folder: str, sizes: Sequence[int], *, encoder: str = "") -> Painter:
    """The compiled programs of an export or a pipeline folder. Raises ValueError in one line."""
    found = kind(Path(folder))
    if found == "label":
        if not (Path(folder) / "card.json").is_file():
            raise ValueError(f"{folder} is no model: it has neither card.json nor model_index.json")
        raise ValueError(f"{folder} draws classes, not text; serve a student that reads captions")
    if found == "pipeline":
        return PipelinePainter(pipeline.load(folder), sizes)
    return ExportPainter(TextExport(folder, encoder=encoder), sizes)


def parser() -> Parser:
    """The flags."""

    def sizes(text: str) -> tuple[int, ...]:
        found = tuple(sorted({int(part) for part in text.split(",")}))
        if found[0] < 1:
            raise ValueError
        return found

    p = Parser(prog="python -m jaxdistill.serve", description=__doc__)
    p.add_argument(
        "--model",
        required=True,
        help="folder of a student that reads captions: an export or a diffusers folder",
    )
    p.add_argument("--teacher", default="", help="folder of its teacher, to be drawn beside it")
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in"
    )
    p.add_argument("--port", type=int, default=8000)
    p.add_argument(
        "--text_encoder",
        default="",
        help="folder of the MiniLM of a benchmark's export; default: the installed package's",
    )
    p.add_argument(
        "--batch_sizes",
        type=sizes,
        default=(1, 4, 16),
        help="images drawn together, such as 1,4,16; each is compiled at start",
    )
    p.add_argument("--queue", type=int, default=256, help="images that may wait")
    p.add_argument("--deadline", type=float, default=30.0, help="seconds that one may wait")
    return p


def check_address(host: str, port: int) -> None:
    """Raise ValueError where nobody can listen there: before minutes of compiling, not after."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen at --host={host} --port={port} ({reason}); choose another port"
        ) from None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> None:
    """Compile, then serve until interrupted."""
    args = parser().parse_args(argv)
    try:
        if not 0 < args.port < 2**16:
            raise ValueError(f"--port must be in 1..65535, got {args.port}")
        if args.queue < 1 or not args.deadline > 0:
            raise ValueError(
                f"--queue must be at least 1 and --deadline above 0, got {args.queue} and"
                f" {args.deadline:g}"
            )
        check_address(args.host, args.port)
        compilation.use_cache()
        # On a CPU each core is a device of its own: XLA's threads gain nothing on networks as small
        # as the benchmark's.
        jax.config.update("jax_num_cpu_devices", min(cores(), max(args.batch_sizes)))
        print("compiling", flush=True)
        painters = {
            "student": open_painter(args.model, args.batch_sizes, encoder=args.text_encoder)
        }
        if args.teacher:
            painters["teacher"] = open_painter(
                args.teacher, args.batch_sizes, encoder=args.text_encoder
            )
            if painters["teacher"].size != painters["student"].size:
                raise ValueError(
                    f"--teacher={args.teacher} draws {painters['teacher'].size}, the student"
                    f" {painters['student'].size}"
                )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {missing_extra(error)}", file=sys.stderr)
        sys.exit(2)
    server = Server(
        painters, describe(args.model, painters), limit=args.queue, deadline=args.deadline
    )
    print(f"http://{args.host}:{args.port}", flush=True)
    uvicorn.run(
        make_app(server),
        host=args.host,
        port=args.port,
        log_level="warning",
        ws_max_size=MAX_FRAME,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
