"""Checkpoints, programs and JAX's cache in gs://, by the real libraries, against a server that
speaks the protocol; it is not Google's.
"""

import contextlib
import json
import subprocess
import sys
from functools import partial

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import text_config
from shell import ROOT, assert_same_bits, quick
from small import SHAPE, flash, make
from test_distributed import finish, losses, start

from jaxdistill import main, partition
from jaxdistill.errors import UserError
from jaxdistill.methods.recipe import Recipe, SamplerSpec
from jaxdistill.run import checkpoint, loop
from jaxdistill.run.checkpoint import CheckpointError, Checkpoints
from jaxdistill.tasks.estimate import Estimate
from jaxdistill.tasks.text_to_image.task import TextToImageTask
from jaxdistill.train import init_state

ALONE = partition.layout({"data": 1, "fsdp": 1, "smallest": 64})
"""One device."""


@pytest.fixture(scope="module")
def bucket():
    with gcs_server.serving() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs_server.variables(bucket.url).items():
            patch.setenv(name, value)
        yield bucket


def state_of(seed):
    """About a megabyte that does not compress, several types, and a typed key."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(512, 512)).astype(np.float32)),
        "b": jnp.bfloat16(seed),
        "key": jax.random.key(seed),
    }


@pytest.fixture(scope="module")
def saved(bucket):
    """Checkpoints of three steps, of which two are kept."""
    checkpoints = Checkpoints("gs://bucket/saved/student")
    for step in (4, 8, 12):
        checkpoints.save(step, state_of(step), {"seconds": step / 2})
    checkpoints.close()
    return "saved/student"


def restored(folder):
    return Checkpoints(f"gs://bucket/{folder}").restore(jax.eval_shape(lambda: state_of(0)))


def test_what_is_saved_comes_back_in_the_same_bits_with_the_buckets_own_checksums_beside_it(
    bucket, saved
):
    state, meta = restored(saved)
    assert_same_bits(state, state_of(12))
    assert meta == {"seconds": 6.0}
    found = bucket.objects(saved)
    assert {name.partition("/")[0] for name in found} == {"8", "12"}  # the older one is gone
    assert bucket.objects(f"{saved}-objects").keys() == {
        "8.json",
        "12.json",
    }  # and nothing half written beside them
    for step in ("8", "12"):
        manifest = json.loads(bucket.read(f"{saved}-objects/{step}.json"))
        mine = {
            name.removeprefix(f"{step}/"): item
            for name, item in found.items()
            if name.startswith(f"{step}/")
        }
        assert manifest == {
            name: {"size": int(item["size"]), "md5Hash": item["md5Hash"]}
            for name, item in mine.items()
        }
        assert len(manifest) > 8 and max(item["size"] for item in manifest.values()) > 500_000


def test_what_a_killed_save_has_left_is_passed_over_and_replaced(bucket):
    checkpoints = Checkpoints("gs://bucket/killed")
    checkpoints.save(4, state_of(4), {"seconds": 1.0})
    checkpoints.close()
    for name in [
        name for name in bucket.objects("killed") if not name.endswith("commit_success.txt")
    ]:
        bucket.write(f"killed/8/{name.removeprefix('4/')}", bucket.read(f"killed/{name}"))
    left = {
        name for name in bucket.objects("killed") if name.startswith("8/state/ocdbt.process_0/d/")
    }
    checkpoints = Checkpoints("gs://bucket/killed")
    assert left and checkpoints.latest == 4
    checkpoints.save(8, state_of(8), {"seconds": 2.0})
    checkpoints.close()
    assert_same_bits(restored("killed")[0], state_of(8))
    assert not left & bucket.objects("killed").keys()


@pytest.mark.parametrize("change", ["flipped", "missing", "of another step"])
def test_an_object_that_is_not_what_was_saved_is_named_with_the_way_back(bucket, saved, change):
    """Of another step: Orbax's files end in their CRC32C, so that the bucket's own is the same for
    all, and here the sizes are, too.
    """
    found = bucket.objects(saved)
    largest = max(
        (name for name in found if name.startswith("12/")),
        key=lambda name: int(found[name]["size"]),
    )
    name = "12/state/manifest.ocdbt" if change == "of another step" else largest
    whole = bucket.read(f"{saved}/{name}")
    if change == "flipped":
        bucket.write(f"{saved}/{name}", bytes([whole[0] ^ 1]) + whole[1:])
    elif change == "missing":
        bucket.remove(f"{saved}/{name}")
    else:
        other = "8/" + name.removeprefix("12/")
        assert [found[n]["size"] for n in (name, other)] == [str(len(whole))] * 2 and found[name][
            "crc32c"
        ] == found[other]["crc32c"]
        bucket.write(f"{saved}/{name}", bucket.read(f"{saved}/{other}"))
    said = "is missing" if change == "missing" else "is damaged"
    with pytest.raises(
        CheckpointError,
        match=(
            rf"^gs://bucket/{saved}/{name} {said}: .* remove gs://bucket/{saved}/12: .* at step 8$"
        ),
    ):
        restored(saved)
    bucket.write(f"{saved}/{name}", whole)
    assert_same_bits(restored(saved)[0], state_of(12))


# -------------------------------------------------------------------------------------------- a run


def train(folder, workdir, *, steps=6, stop_at=0):
    """The last state of a small training with its checkpoints in a folder; `stop_at`: a signal
    comes in this step.
    """
    model, teacher = make(16, 1)
    stop = loop.StopSignal()

    def batch(i):
        stop.received = "SIGTERM" if i + 1 == stop_at else None
        return {"x0": np.full((4, *SHAPE), i, np.float32), "cond": np.arange(4) % 10}

    place = loop.Place(workdir, stop, ALONE, every=1, checkpoint_every=2, checkpoints=str(folder))
    return small.train(teacher, flash(model), optax.adam(1e-3), batch, steps=steps, place=place)


@pytest.mark.long
def test_a_stop_does_not_show_where_checkpoints_are_in_a_bucket(bucket, tmp_path, capsys):
    expected = train(tmp_path / "checkpoints", tmp_path / "whole")
    with pytest.raises(loop.Stopped, match="saved at step 3 of 6"):
        train("gs://bucket/run", tmp_path / "parts", stop_at=3)
    assert not (tmp_path / "parts" / "checkpoints").exists()
    found = train("gs://bucket/run", tmp_path / "parts")
    assert "student: resumes at step 3 of 6" in capsys.readouterr().out
    assert_same_bits(found, expected)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.long
def test_what_two_processes_save_in_a_bucket_one_restores_in_the_same_bits(bucket, tmp_path):
    workdir = tmp_path / "two"
    finish(workdir, start(workdir, 2, POD_STEPS="30", POD_CHECKPOINTS="gs://bucket/pod"), {0})
    found = bucket.objects("pod/student")
    assert {name.partition("/")[0] for name in found} == {"25", "30"}
    assert {name.split("/")[2] for name in found if name.startswith("30/state/ocdbt.process_")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert json.loads(bucket.read("pod/student-objects/30.json")).keys() == {
        n.removeprefix("30/") for n in found if n.startswith("30/")
    }
    like = jax.eval_shape(
        partial(init_state, tx=optax.adam(1e-4)), {"student": make(64, 2)[1]}, key=jax.random.key(0)
    )
    state, _ = Checkpoints("gs://bucket/pod/student").restore(ALONE.describe(like))
    assert int(state.step) == 30
    expected = np.load(workdir / "student.npz")
    for mine, name in zip(jax.tree.leaves(state.ema_params), expected.files, strict=True):
        np.testing.assert_array_equal(mine, expected[name])


# ---------------------------------------------------------------------------------- what is refused

OBJECTS, NAMES = "/upload/storage/v1/b/bucket/o", "/storage/v1/b/bucket?"


@pytest.mark.costly
@pytest.mark.parametrize(
    ("status", "refused", "words"),
    [
        (403, ("POST", OBJECTS), r"Forbidden: .*/b/bucket/o a-worker does not have the right"),
        (
            403,
            ("GET", NAMES),
            r"403 GET .*/b/bucket\?.* a-worker does not have the right",
        ),  # with which Orbax begins to remove
        (403, ("DELETE", "/"), r"Forbidden: .*a-worker does not have the right"),
        (401, ("GET", "/"), r"Anonymous credentials cannot be refreshed\."),
        (0, ("GET", "/"), r"no answer within 2 s"),
        (0, ("POST", "/"), r"no answer within 2 s"),
    ],
)
def test_a_bucket_that_refuses_is_told_in_one_line_before_anything_is_saved(
    bucket, monkeypatch, status, refused, words
):
    monkeypatch.setattr(checkpoint, "REACH_SECONDS", 2 if not status else 30)
    with gcs_server.refusing(bucket.url, status, refused) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(
            CheckpointError,
            match=rf"^gs://bucket/refused cannot be opened \({words}\); check the bucket's name",
        ) as error:
            Checkpoints("gs://bucket/refused")
    assert "\n" not in str(error.value)
    assert bucket.objects("refused") == {}


def test_a_bucket_that_is_not_there_is_told_and_not_made(bucket):
    with pytest.raises(
        CheckpointError,
        match=r"^gs://typo/run cannot be opened \(404 GET .*/b/typo\?.*check the bucket's name",
    ):
        Checkpoints("gs://typo/run")
    with pytest.raises(OSError, match="404"):
        bucket._ask("GET", "/storage/v1/b/typo")


def test_nobody_waits_for_a_server_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setattr(checkpoint, "REACH_SECONDS", 4)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"gs://bucket/run cannot be opened \(.*Connection refused"
    ):
        Checkpoints("gs://bucket/run")


@pytest.mark.costly
@pytest.mark.parametrize("status", [403, 400])
def test_a_save_that_the_bucket_refuses_is_one_line(bucket, monkeypatch, status):
    """Rights can go while a run is going on.

    The libraries have an OSError for 403, and their own errors for others.
    """
    checkpoints = Checkpoints(f"gs://bucket/lost-{status}")
    checkpoints.save(1, state_of(1), {"seconds": 1.0})
    checkpoints.wait()
    with gcs_server.refusing(bucket.url, status, ("DELETE", "/"), ("POST", "/")) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(
            CheckpointError,
            match=(
                r"^cannot save in gs://bucket/lost-\d+ \(.*the right.*\); fix .* resumes at step"
                r" 1, which is kept$"
            ),
        ):
            checkpoints.save(2, state_of(2), {"seconds": 1.0})
            checkpoints.wait()
        with contextlib.suppress(CheckpointError):
            checkpoints.close()
    monkeypatch.undo()
    assert_same_bits(restored(f"lost-{status}")[0], state_of(1))


def test_a_checkpoint_that_may_not_be_read_is_one_line(bucket, saved, monkeypatch):
    checkpoints = Checkpoints(f"gs://bucket/{saved}")
    with gcs_server.refusing(
        bucket.url, 400, ("GET", "/storage/v1/b/bucket/o/saved%2Fstudent%2F12%2Fmeta")
    ) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(
            CheckpointError,
            match=(
                rf"^checkpoint 12 in gs://bucket/{saved} cannot be read \(a-worker does not .*;"
                r" fix this"
            ),
        ):
            checkpoints.restore(jax.eval_shape(lambda: state_of(0)))


# ------------------------------------------------------------------------------------- JAX's cache


def test_an_object_of_several_requests_is_written_whole(bucket):
    content = np.random.default_rng(0).bytes(12 << 20)
    checkpoint.put_whole(*checkpoint.store("gs://bucket/large/object"), content)
    assert bucket.read("large/object") == content


class Bare(TextToImageTask):
    """A task without a teacher's folder."""

    def __init__(self, config):
        self.config, self.layout, self.recipe = config, ALONE, Recipe((), SamplerSpec())

    def load(self, dtype, **_):
        raise AssertionError("weights are read")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("log.checkpoints", r"^gs://typo/x/student cannot be opened \(404"),
        (
            "compute.compilation_cache",
            r"^config\.compute\.compilation_cache = gs://typo/x cannot be opened \(.*typo",
        ),
    ],
)
def test_a_run_names_its_bucket_before_it_reads_weights(
    bucket, tmp_path, monkeypatch, key, message
):
    monkeypatch.setattr(main, "open_task", Bare)
    monkeypatch.setattr(main, "estimate", lambda *arguments: Estimate([], ""))
    config = text_config.get_config()
    config.update_from_flattened_dict({key: "gs://typo/x"})
    with pytest.raises(UserError, match=message):
        main.run(config, tmp_path)


CACHED = """
import collections, sys
import jax, jax.numpy as jnp, text_config
from jaxdistill import main, partition
from jaxdistill.methods.recipe import Recipe, SamplerSpec
from jaxdistill.tasks.estimate import Estimate
found = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: found.update([event.rpartition("/")[2]]))
class Task:
    layout, recipe = partition.layout(), Recipe((), SamplerSpec())
    def __init__(self, config):
        pass
    def execute(self, run):
        jax.jit(lambda x: jnp.tanh(x @ x.T))(jnp.ones((8, 8))).block_until_ready()
main.open_task, main.estimate = Task, lambda *arguments: Estimate([], "")
config = text_config.get_config()
config.compute.compilation_cache = "gs://bucket/xla"
main.run(config, sys.argv[1])
print(found["cache_hits"], found["cache_misses"])
"""


@pytest.mark.long
def test_a_second_start_finds_its_programs_in_the_bucket(bucket, tmp_path):
    environment = {
        k: v
        for k, v in quick(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}").items()
        if k != "JAX_COMPILATION_CACHE_DIR"
    }
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", CACHED, str(tmp_path)]
        output = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout
        hits, misses = map(int, output.split())
        found.append((hits, misses))
        assert any("jit" in name and name.endswith("-cache") for name in bucket.objects("xla"))
    (_, compiled), (hits, misses) = found
    assert compiled >= 1 and hits >= compiled and misses == 0
