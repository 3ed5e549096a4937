"""Serve a page where the image changes with each keystroke, and an HTTP API.

    python -m jaxdistill.serve --model=runs/scenes/student --teacher=runs/scenes/teacher

Programs use POST /api/image (JSON in, PNG out; described at /openapi.json). Operators use /healthz
and /metrics.
"""

import os
import socket
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdistill.errors import missing_extra
from jaxdistill.interop import NOTHING, Beside, add_flags, beside, check_unused, explain_path
from jaxdistill.run import compilation
from jaxdistill.run.help import Parser
from jaxdistill.sample import kind

try:
    import uvicorn

    from jaxdistill.interop import known_students
    from jaxdistill.interop.known_students import Described, Known
    from jaxdistill.interop.text_export import TextExport
    from jaxdistill.page.engine import ExportPainter, Painter, PipelinePainter
    from jaxdistill.page.server import MAX_FRAME, Server, describe, make_app
    from jaxdistill.tasks.text_to_image import pipeline
except ModuleNotFoundError as error:
    print(f"error: {missing_extra(error)}", file=sys.stderr)
    sys.exit(2)


def open_painter(
    folder: str,
    sizes: Sequence[int],
    *,
    encoder: str = "",
    files: Beside = NOTHING,
    known: Known | Described | None = None,
    size: tuple[int, int] | None = None,
) -> Painter:
    """The compiled programs of an export or a pipeline folder, which draws in its own size if None.

    Raises ValueError in one line.
    """
    found = kind(Path(folder))
    if isinstance(known, Known) and found != "pipeline":
        raise ValueError(f"--as={known.name}: {folder} is no pipeline; leave it out")
    if found == "label":
        if not (Path(folder) / "card.json").is_file():
            raise ValueError(explain_path(folder))
        raise ValueError(f"{folder} draws classes, not text; give a student that reads text")
    print(f"{folder}: loading, and compiling for each batch size", flush=True)
    if found == "pipeline":
        height, width = size or (None, None)
        call = {"height": height, "width": width}
        pipe = pipeline.load(folder, beside=files, known=known, call=call)
        return PipelinePainter(pipe, sizes, size=size)
    return ExportPainter(TextExport(folder, encoder=encoder), sizes)


def parser() -> Parser:
    """The flags."""

    def sizes(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            raise ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,4,16")
        return tuple(sorted({int(part) for part in parts}))

    p = Parser(__doc__, "--model=FOLDER")
    add = p.add_argument
    about = "an export that reads text, a diffusers folder, or a .safetensors checkpoint"
    add("--model", required=True, metavar="FOLDER", help=about)
    add("--teacher", default="", metavar="FOLDER", help="its teacher, drawn beside it")
    about = "address to listen at; 0.0.0.0 lets other machines in"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=about)
    add("--port", type=int, default=8000, metavar="N", help="port to listen at")
    about = "images drawn together; each size is compiled at start (default: 1,4,16)"
    add("--batch_sizes", type=sizes, default=(1, 4, 16), metavar="N,N", help=about)
    add("--queue", type=int, default=256, metavar="N", help="images that may wait")
    about = "how long an image may wait"
    add("--deadline", type=float, default=30.0, metavar="SECONDS", help=about)
    add_flags(p, p)
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
                f"--queue must be at least 1 and --deadline above 0 seconds, got {args.queue} and"
                f" {args.deadline:g}"
            )
        check_address(args.host, args.port)
        compilation.use_cache()
        # On a CPU each core is a device of its own: XLA's threads gain nothing on networks as small
        # as the benchmark's.
        jax.config.update("jax_num_cpu_devices", min(cores(), max(args.batch_sizes)))
        compilation.check_devices()
        files = beside(args, args.model, args.teacher)
        options: dict[str, Any] = {"encoder": args.text_encoder, "files": files}
        for path in filter(None, (args.model, args.teacher)):
            if kind(Path(path)) != "pipeline":
                check_unused(args, path)
        known = known_students.of(getattr(args, "as"), (), files)
        student = open_painter(args.model, args.batch_sizes, known=known, **options)
        painters = {"student": student}
        if args.teacher:
            options["size"] = painters["student"].size
            painters["teacher"] = open_painter(args.teacher, args.batch_sizes, **options)
            if painters["teacher"].size != painters["student"].size:
                raise ValueError(
                    f"--teacher={args.teacher} draws {painters['teacher'].size} pixels, but the"
                    f" student draws {painters['student'].size}; give the teacher of this student"
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
