"""Runs the documentation's commands on small input: every ```sh block of README.md and docs/*.md.

    python tests/docs_commands.py [--only=PAGE] [--match=REGEX] [--scratch=DIR] [--jobs=2] [--show]

They run in a scratch folder in which the repository's folders are links, so that runs/ and pictures
land there. A page may use what an earlier one made. SMALL and FLAGS turn a real command into a
small one; one that no rule makes runnable is an error, and so is one that fails. A finished command
is not repeated in the same scratch folder; --show prints the small commands and runs none.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import quick

ROOT = Path(__file__).resolve().parent.parent

FIRST = ("README", "first_student", "your_checkpoint", "your_model", "serving", "benchmark")
"""Pages in this order, then all others."""

SKIPPED = {
    r"pip install ": "the environment has it",
    r"pytest": "a section of .ci/run",
    r"git clone |cd |python3? -m venv |\. |source ": "this is a checkout, with an environment",
}
"""Beginnings of commands that do not run here, and why."""

RUN = (
    r"(\w+=\S* )*python -m jaxdistill\.\w+\b",
    r"python tests/\w+|python -c ",
    r"launch/\w+\.(sh|py)\b",
    r"curl ",
    r"(ls|cat|head|tail|printf|mkdir|export) ",
)
"""Beginnings of those that do, besides STAND_INS."""

STAND_INS = ("gcloud", "kubectl", "docker", "sbatch", "squeue", "scancel", "nvidia-smi")
"""Programs of machines that are not here: a script in their place prints what it is given."""

INPUTS = {
    "stable-diffusion-v1-5": "python tests/folders.py sdxl stable-diffusion-v1-5",
    "fashion-mnist": 'mkdir fashion-mnist && python -c "import pathlib, idx;'
    " idx.write_fashion(pathlib.Path('fashion-mnist'))\"",
    "my-model.safetensors": "python tests/original.py stable-diffusion-v1-5 my-model.safetensors",
    "lcm-lora.safetensors": "python tests/loras.py stable-diffusion-v1-5 lcm-lora.safetensors",
    "style.safetensors": "python tests/loras.py stable-diffusion-v1-5 style.safetensors",
    "prompts.txt": r"printf 'a cat\na dog at a cat\nphoto\n' > prompts.txt",
}
"""What the commands read and a user brings: made small, where one names it."""

VARIABLES = {
    "POD_NAME": "my-pod",
    "POD_ZONE": "us-central2-b",
    "POD_PROJECT": "my-project",
    "POD_TYPE": "v4-32",
    "POD_COMMIT": "0123456789" * 4,
    "POD_REPO": "https://example.org/jaxdistill",
    "BUCKET": "my-bucket",
}
"""What the pages tell to set; a commit, as a checkout with changes cannot be installed."""

SMALL = (
    (r"\bFOLDER\b(?=.*prompts)|(?<=teacher\.folder=)FOLDER\b", "stable-diffusion-v1-5"),
    (r"\bFOLDER\b", "fashion-mnist"),
    (r"\bdocs/results\b", "results"),
    (r"\bJAX_PLATFORMS=\w+ | --distributed\b", ""),
    (r"\bconfigs/digits\.py", "configs/smoke.py"),
    (r"(?<=\.benchmark --config=)configs/benchmark\.py(:\w+)?", "configs/benchmark.py:smoke"),
    (r"\bruns/benchmark-smoke\b", "runs/benchmark"),  # the whole one is as small: once will do
    (r"(\.benchmark .*)--config\.base=\S+ ", r"\1"),  # a teacher as small as its students
    (r"\bconfigs/scenes\.py(?!:)", "configs/scenes.py:imagine_flash"),  # one stage, not three
    (r"\bconfigs/(sd15|sd21|sdxl)\.py", "tests/text_config.py"),
    (r"\bconfigs/tpu_v4\.py(:v5e|:v6e|:sdxl)?", "tests/text_config.py"),
    (r"\bconfigs/gpu\.py(:\w+)?", "tests/text_config.py"),
    (r"(/accelerator\.py) ", r"\1 --quick --parts=attention,parity "),
    (r"--topology=(v4|v5p):\S+", r"--topology=\1:2x2x1"),
    (r"--topology=(v5e|v6e):\S+", r"--topology=\1:2x2"),
    (r"--teacher_steps=\d+", "--teacher_steps=4"),
    (r"(lora_rank|--rank)=\d+", r"\1=4"),
    (r"--num=\d{3,}", "--num=64"),
    (r"(--model=my-model\.safetensors)(?! --like)", r"\1 --like=stable-diffusion-v1-5"),  # tiny
    (r"^(launch/(tpu_vm|slurm)\.sh.*?)( -- .*)?$", r"\1 --dry-run\3"),
)
"""Real input -> small input, one after the other."""

FLAGS = (
    (
        r"\.(main|ablate) .*configs/smoke\.py(:|.*teacher\.path|.*--seeds)|local_pod.*smoke\.py",
        "--config.teacher.iterations=60 --config.eval.extractor_steps=20"
        " --config.eval.samples=180 --config.eval.batch_size=90",
    ),
    (
        r"\.main .*configs/fashion\.py",
        "--config.teacher.iterations=20 --config.teacher.steps=4 --config.student.iterations=6"
        " --config.student.health_every=6 --config.eval.samples=200 --config.eval.batch_size=100"
        " --config.eval.extractor_steps=20 --config.log.health_samples=50",
    ),
    (
        r"\.main .*configs/scenes\.py",
        "--config.compute.unroll=False --config.teacher.steps=4 --config.student.budget=60"
        " --config.student.batch_size=8"
        " --config.data.captions=40 --config.adversarial.pool=20 --config.eval.samples=100"
        " --config.eval.unseen=50 --config.eval.diversity_captions=10 --config.eval.repeats=4"
        " --config.eval.batch_size=50 --config.log.health_samples=70 --config.log.teacher_steps=4",
    ),
    (r"configs/benchmark\.py:smoke", "--config.text.folder=tests/golden/bert"),
    (
        r"configs/benchmark\.py:smoke(?!.*benchmark\.methods)",  # the tests run all
        "--config.benchmark.methods=\"('imagine_flash', 'direct', 'lcm')\"",
    ),
    (r"local_pod.*smoke\.py", "--config.student.iterations=12 --config.student.health_every=12"),
    (
        r"\.main .*tests/text_config\.py .*--plan_for",
        "--config.teacher.folder=stable-diffusion-v1-5 --config.student.batch_size=16",
    ),
    (
        r"\.aot .*tests/text_config\.py",
        "--config.teacher.folder=stable-diffusion-v1-5 --config.compute.dtype=bfloat16"
        " --config.compute.attention=flash",
    ),
    (
        r"\.aot (?!.*--program=(sampler|teacher)|.*--slices)",
        "--config.student.batch_size=24 --config.mesh.data=2 --config.mesh.fsdp=2",
    ),
    (r"\.aot .*--topology=v4(?!.*--(json|slices|program|search))", "--json=plan-v4.json"),
    (
        r"\.aot .*--program=(sampler|teacher)",
        "--config.student.batch_size=8 --config.data.height=128 --config.data.width=128",
    ),
    (r"\.teacher_states ", "--samples=50 --steps=2"),
    (r"\.sample .*/students/", "--text_encoder=tests/golden/bert"),
    (r"\.serve ", "--port=PORT"),
)
"""More flags of small commands that match, in their place at the end."""

IS_SMALL = r"configs/(smoke|scenes|fashion)\.py|configs/benchmark\.py:smoke|tests/text_config\.py"
"""The configs that may run."""
QUICK = (
    r"\.benchmark |\.teacher_states |configs/scenes|(main|local_pod).*tests/text_config|\.compare |"
    r"/accelerator\.py "
)
"""Commands that compile for longer than they run: without XLA's costly passes."""
ADDRESS = r"\b(127\.0\.0\.1|localhost):8000\b"
JSON = r" --json=\S+"
SECONDS = 900


@dataclass(frozen=True)
class Command:
    """`text` as in the page, `small` as it runs; `why` it does not."""

    page: str
    line: int
    text: str
    small: str
    why: str = ""

    @property
    def made(self) -> list[str]:
        """The folders and files that it leaves."""
        return re.findall(r"--(?:workdir|out|json)=(\S+)", self.small)

    def uses(self, made: str) -> bool:
        return re.search(rf"(^|[\s=\"']){re.escape(made)}($|[\s/\"'.,:])", self.small) is not None


def lines_of(page: str) -> Iterator[tuple[int, str]]:
    """(line, command) of a page's sh blocks."""
    inside, kept, first = False, "", 0
    for number, line in enumerate(page.splitlines(), 1):
        if line.strip().startswith("```"):
            inside = not inside and line.strip() == "```sh"
            continue
        if not inside or not line.strip() or line.lstrip().startswith("#"):
            continue
        first = first or number
        kept += " " + line.strip().removesuffix("\\").rstrip()
        if not line.rstrip().endswith("\\"):
            yield from ((first, part.strip()) for part in kept.split(" && "))
            kept, first = "", 0


def small(text: str) -> str:
    """A command on small input. Raises ValueError where no rule makes it so."""
    if not any(re.match(rule, text) for rule in (*RUN, *(f"{name}( |$)" for name in STAND_INS))):
        raise ValueError("is no command that is known here")
    for pattern, replacement in SMALL:
        text = re.sub(pattern, replacement, text)
    given = text
    for pattern, flags in FLAGS:
        text += f" {flags}" if re.search(pattern, given) else ""
    config = re.search(r"--config[= ](\S+)", text)
    trains = re.match(r"(\w+=\S* )*python -m|launch/local_pod", text)
    if config and trains and not re.match(IS_SMALL, config[1]):
        raise ValueError(f"has no rule that makes {config[1]} small")
    return text


def planned(pages: Sequence[Path]) -> list[Command]:
    """The commands of all pages. Leaves with those for which there is no rule."""
    found, wrong = [], []
    for page in pages:
        name = str(page.relative_to(ROOT))
        for line, text in lines_of(page.read_text()):
            why = next((why for rule, why in SKIPPED.items() if re.match(rule, text)), "")
            try:
                found.append(Command(name, line, text, text if why else small(text), why))
            except ValueError as error:
                wrong.append(f"{name}:{line}: {text}: {error}; see tests/docs_commands.py")
    if wrong:
        sys.exit("\n".join(wrong))
    return found


def pages() -> list[Path]:
    """In the order in which they may use each other's runs."""
    first = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in FIRST)]
    found = [page for page in first if page.exists()]
    return found + [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in found]


def units(commands: Sequence[Command]) -> list[list[Command]]:
    """What runs in one go: a command, or a server and the page's commands that ask it."""
    found: list[list[Command]] = []
    for command in commands:
        last = found[-1][0] if found else command
        asks = last.page == command.page and "jaxdistill.serve" in last.small
        if asks and re.search(ADDRESS, command.small):
            found[-1].append(command)
        else:
            found.append([command])
    return found


class Scratch:
    """The folder in which commands run."""

    def __init__(self, folder: Path, lanes: int) -> None:
        self.folder = folder.resolve()
        self.done_file = self.folder / "done.json"
        for name in ("configs", "docs", "launch", "pretrained", "tests"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(ROOT / name)
        bin_ = self.folder / "bin"
        bin_.mkdir(exist_ok=True)
        for name in STAND_INS:
            (bin_ / name).write_text('#!/bin/sh\necho "+ ${0##*/} $*"\n')
            (bin_ / name).chmod(0o755)
        self.done = json.loads(self.done_file.read_text()) if self.done_file.exists() else {}
        cores = sorted(os.sched_getaffinity(0))
        self.cores = [cores[lane::lanes] or cores for lane in range(lanes)]
        paths = [
            Path(part).resolve() for part in os.environ.get("PYTHONPATH", "").split(":") if part
        ]
        kept = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax-cache"), **VARIABLES}
        self.environment = {**kept, **os.environ} | {
            "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(map(str, paths)),
            "JAX_PLATFORMS": "cpu",
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def prepare(self, commands: Sequence[Command]) -> None:
        """Make the inputs that commands name."""
        environment = self.environment | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        for name, command in INPUTS.items():
            named = any(name in c.small for c in commands)
            if named and not (self.folder / name).exists():
                subprocess.run(
                    ["bash", "-euc", command], cwd=self.folder, env=environment, check=True
                )

    def start(self, text: str, log: Path, lane: int) -> subprocess.Popen:
        environment = dict(self.environment)
        if re.search(QUICK, text):
            environment |= quick.VARIABLES
        with log.open("w") as output:
            return subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, self.cores[lane]),
            )

    def run(self, unit: Sequence[Command], number: int, lane: int) -> str:
        """Run a unit; the end of the log where it fails, or nothing."""
        server = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            for i, command in enumerate(unit):
                text = re.sub(
                    ADDRESS, f"127.0.0.1:{port}", command.small.replace("PORT", str(port))
                )
                log = self.folder / f"log-{number}-{i}"
                begin = time.monotonic()
                process = self.start(text, log, lane)
                if "jaxdistill.serve" in text:
                    server = process
                    code = probe(f"http://127.0.0.1:{port}", process)
                else:
                    code = process.wait(SECONDS)
                if code:
                    return f"{command.page}:{command.line}: exit code {code}: {text}\n" + tail(log)
                seconds = time.monotonic() - begin
                self.done[command.small] = seconds
                print(f"{seconds:6.1f} s  {command.page}:{command.line}  {text}", flush=True)
        except subprocess.TimeoutExpired:
            kill(process)
            return (
                f"{command.page}:{command.line}: not finished after {SECONDS} s: {text}\n"
                + tail(log)
            )
        finally:
            if server is not None:
                kill(server)
        return ""


def probe(url: str, server: subprocess.Popen) -> int:
    """Wait for the page, and ask it for a picture; 1 where there is none."""
    asked = urllib.request.Request(
        f"{url}/api/image",
        json.dumps({"prompt": "a red bag above a blue boot", "steps": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(SECONDS):
        if server.poll() is not None:
            return server.returncode or 1
        try:
            with urllib.request.urlopen(url, timeout=60) as page:
                assert b"<html" in page.read()
            with urllib.request.urlopen(asked, timeout=60) as image:
                return int(not image.read().startswith(b"\x89PNG"))
        except (ConnectionError, urllib.error.URLError):
            time.sleep(1)
    return 1


def kill(process: subprocess.Popen) -> None:
    """End a command's processes."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def run_all(scratch: Scratch, found: Sequence[Sequence[Command]], lanes: int) -> str:
    """Run units, as many at once as there are lanes; each waits for those before it whose files it
    uses. What the first failure said, or nothing.
    """
    waiting = list(enumerate(found))
    running: dict[Future, tuple[int, Sequence[Command], int]] = {}
    failed = ""

    def blocked(unit: Sequence[Command], before: Sequence[Sequence[Command]]) -> bool:
        return any(
            b.uses(made) or made in b.made
            for other in before
            for a in other
            for made in a.made
            for b in unit
        )

    with ThreadPoolExecutor(lanes) as pool:
        while running or (waiting and not failed):
            free = set(range(lanes)) - {lane for *_, lane in running.values()}
            before = [unit for _, unit, _ in running.values()]
            for entry in [] if failed else list(waiting):
                number, unit = entry
                if free and not blocked(unit, before):
                    lane = free.pop()
                    waiting.remove(entry)
                    running[pool.submit(scratch.run, unit, number, lane)] = number, unit, lane
                before.append(unit)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)
                failed = failed or future.result()
    scratch.done_file.write_text(json.dumps(scratch.done, indent=1))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a page, as README.md or docs/plans.md")
    parser.add_argument("--match", default="", help="only small commands that match")
    parser.add_argument("--scratch", type=Path, help="is kept")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once, each on its cores")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    commands = planned([ROOT / options.only] if options.only else pages())
    commands = [c for c in commands if re.search(options.match, c.small)]
    if options.show:
        print("\n".join(c.small for c in commands if not c.why))
        return
    with tempfile.TemporaryDirectory(prefix="docs-commands-") as kept:
        scratch = Scratch(options.scratch or Path(kept), options.jobs)
        seen = dict(scratch.done)
        # A plan that another page asks for with a report.
        seen |= {
            without: 0.0 for c in commands if (without := re.sub(JSON, "", c.small)) != c.small
        }
        rest = []
        for c in commands:
            if c.why or c.small in seen:
                why = c.why or "runs elsewhere"
                print(f"     not  {c.page}:{c.line}  {c.text}: {why}", flush=True)
            else:
                rest.append(c)
            if "jaxdistill.serve" not in c.small and not re.search(ADDRESS, c.small):
                seen[c.small] = 0.0
        scratch.prepare(rest)
        begin = time.monotonic()
        failed = run_all(scratch, units(rest), options.jobs)
        print(f"{time.monotonic() - begin:6.1f} s in all", flush=True)
    sys.exit(failed or None)


if __name__ == "__main__":
    main()
