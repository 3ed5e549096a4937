import json
import os
import shutil
import subprocess
import zlib
from functools import partial
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from fsspec.implementations.local import LocalFileSystem
from shell import TINY, assert_same_bits, flip_bit, folder_bytes, run_command, run_script

from jaxdistill.run import checkpoint
from jaxdistill.run.checkpoint import CheckpointError, Checkpoints, Manifests, export, load_export
from jaxdistill.train import Objective, init_state, train_step

# ------------------------------------------------------------------------------------------ exports


def some_params(seed=0):
    """Nested dictionaries, several types, a scalar, and bit patterns that compare unequal to
    themselves or to 0.
    """
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "Dense_0": {
                "kernel": rng.normal(size=(3, 5)).astype(np.float32),
                "bias": np.array([-0.0, 3.4e38, 1e-42], np.float32),
            },
            "Block": {
                "inner": {
                    "scale": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
                    "count": np.int32(seed),
                }
            },
        },
        "table": rng.integers(0, 255, 9).astype(np.uint8),
    }


CARD = {
    "format": "jaxdistill-export/1",
    "role": "student",
    "sampler": {"times": [1.0, 0.5], "steps": 3},
    "range": [-1.0, 1.0],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "student"
    export(folder, some_params(), CARD)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "student"))


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        load_export(folder)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def test_export_reads_back_bit_for_bit_as_host_arrays(exported):
    params, card = load_export(exported)
    assert_same_bits(params, jax.tree.map(np.asarray, some_params()))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert {k: card[k] for k in CARD} == CARD


def test_card_counts_the_parameters_and_has_a_checksum_for_each_other_file(exported):
    card = json.loads((exported / "card.json").read_text())
    assert card["parameters"]["count"] == sum(
        np.size(leaf) for leaf in jax.tree.leaves(some_params())
    )
    assert card["parameters"]["path"] == "params"
    assert set(card["sha256"]) == set(folder_bytes(exported)) - {"card.json"}


def test_export_of_device_arrays_equals_that_of_host_arrays(tmp_path):
    export(tmp_path / "device", jax.tree.map(jnp.asarray, some_params()), CARD)
    assert_same_bits(load_export(tmp_path / "device")[0], jax.tree.map(np.asarray, some_params()))


def test_export_is_read_by_plain_orbax_in_a_process_without_this_package(exported, tmp_path):
    code = """
import pickle, sys
import jax, numpy, orbax.checkpoint as ocp
params = ocp.StandardCheckpointer().restore(sys.argv[1])
pickle.dump(jax.tree.map(numpy.asarray, params), open(sys.argv[2], "wb"))
"""
    run_script(code, exported / "params", tmp_path / "params.pickle")
    assert_same_bits(
        np.load(tmp_path / "params.pickle", allow_pickle=True),
        jax.tree.map(np.asarray, some_params()),
    )


def test_flipped_bit_in_any_file_of_an_export_is_found_and_the_file_named(copy):
    names = set(folder_bytes(copy)) - {"card.json"}
    assert len(names) > 3
    for name in names:
        whole = (copy / name).read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            flip_bit(copy / name, position)
            refused(copy, copy / name, "damaged")
            (copy / name).write_bytes(whole)
    load_export(copy)


def test_missing_file_of_an_export_is_named(copy):
    for name in set(folder_bytes(copy)) - {"card.json"}:
        (copy / name).rename(copy.parent / "aside")
        refused(copy, copy / name, "missing")
        (copy.parent / "aside").rename(copy / name)
    load_export(copy)


def test_truncated_file_of_an_export_is_named(copy):
    name = max(set(folder_bytes(copy)) - {"card.json"}, key=lambda n: (copy / n).stat().st_size)
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    refused(copy, copy / name)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"sampler": 1}', "[]", "null", '{"sha256": 5}', '{"sha256": "abc"}', b"\xff\xfe"],
    ids=repr,
)
def test_damaged_card_is_named(copy, text):
    (copy / "card.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(copy, copy / "card.json", "damaged")


def test_flipped_bit_in_the_card_is_found(copy):
    whole, (params, card) = (copy / "card.json").read_bytes(), load_export(copy)
    unseen = []
    for position in range(0, len(whole), 5):
        flip_bit(copy / "card.json", position)
        try:
            found_params, found_card = load_export(copy)
            assert_same_bits(found_params, params)
            if found_card != card:
                unseen.append(whole[max(0, position - 12) : position + 12].decode())
        except CheckpointError as error:
            assert str(copy) in str(error)
        (copy / "card.json").write_bytes(whole)
    assert not unseen, unseen


@pytest.mark.parametrize("place", ["absent", "empty", "a file"])
def test_folder_without_a_card_is_no_export(tmp_path, place):
    folder = tmp_path / "student"
    if place == "empty":
        folder.mkdir()
    elif place == "a file":
        folder.write_text("x")
    why = {"empty": "no card.json", "a file": "it is not a folder"}.get(place, "it does not exist")
    refused(folder, folder, "is not an export: ", why, "student/")


# ----------------------------------------------------------------------- exports that fail half way


def whole_and_equal(folder, seed):
    params, card = load_export(folder)
    assert_same_bits(params, jax.tree.map(np.asarray, some_params(seed)))
    assert card["role"] == "student"


def break_params(monkeypatch, folder):
    def broken(self, directory, *args, **kwargs):
        Path(directory).mkdir()
        (Path(directory) / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", broken)
    return some_params(1), CARD


def break_card(monkeypatch, folder):
    return some_params(1), {**CARD, "bad": object()}


def break_checksums(monkeypatch, folder):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.hashlib, "sha256", broken)
    return some_params(1), CARD


def break_last_move(monkeypatch, folder):
    replace, calls = os.replace, []

    def broken(source, target):
        if Path(target) == folder and not calls:
            calls.append(source)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", broken)
    return some_params(1), CARD


breaks = pytest.mark.parametrize(
    "broken", [break_params, break_card, break_checksums, break_last_move], ids=lambda f: f.__name__
)


@breaks
def test_export_that_fails_half_way_leaves_the_older_one_whole(copy, monkeypatch, broken):
    with monkeypatch.context() as patch:
        params, card = broken(patch, copy)
        with pytest.raises(BaseException):  # noqa: B017  of whatever type
            export(copy, params, card)
    whole_and_equal(copy, 0)
    export(copy, some_params(2), CARD)
    whole_and_equal(copy, 2)
    assert [p.name for p in copy.parent.iterdir()] == ["student"]


@breaks
def test_first_export_that_fails_half_way_leaves_no_folder_that_looks_whole(
    tmp_path, monkeypatch, broken
):
    folder = tmp_path / "student"
    with monkeypatch.context() as patch:
        params, card = broken(patch, folder)
        with pytest.raises(BaseException):  # noqa: B017
            export(folder, params, card)
    assert not folder.exists()


# ----------------------------------------------------------------------------- training checkpoints


def a_state(shape=(3, 2), name="w", seed=7):
    tx = optax.adam(1e-2)
    state = init_state({name: jnp.ones(shape), "b": jnp.zeros(shape[-1])}, tx, jax.random.key(seed))

    def loss(params, teacher, batch, key):
        return (
            jnp.sum(params[name] @ params["b"])
            + jnp.sum((params["b"] - jax.random.normal(key, shape[-1:])) ** 2),
            {},
        )

    for _ in range(3):
        state, _ = train_step(state, None, None, objective=Objective(loss, tx), ema_decay=0.9)
    return state


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, a_state(), {"seconds": 1.5})
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_checkpoint_restores_the_state_bit_for_bit_with_its_typed_key(saved):
    state = a_state()
    like = init_state(
        jax.tree.map(jnp.zeros_like, state.params), optax.adam(1e-2), jax.random.key(0)
    )
    restored, meta = Checkpoints(saved).restore(like)
    assert_same_bits(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.key.dtype == state.key.dtype
    assert np.array_equal(jax.random.normal(restored.key, (4,)), jax.random.normal(state.key, (4,)))
    assert meta == {"seconds": 1.5}


def test_checkpoint_restores_onto_abstract_arrays(saved):
    state = a_state()
    assert_same_bits(Checkpoints(saved).restore(jax.eval_shape(lambda: state))[0], state)


def test_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest is None
    for step in (4, 8, 12):
        checkpoints.save(step, {"w": jnp.full(3, float(step))}, {"at": step})
    checkpoints.save(12, {"w": jnp.zeros(3)}, {"at": 0})  # already there
    checkpoints.close()
    reopened = Checkpoints(tmp_path)
    assert reopened.latest == 12
    restored, meta = reopened.restore({"w": jnp.zeros(3)})
    assert np.array_equal(restored["w"], [12.0, 12.0, 12.0]) and meta == {"at": 12}
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [8, 12]


@pytest.mark.parametrize(
    "other",
    [{"shape": (3, 4)}, {"shape": (5, 2)}, {"name": "v"}],
    ids=["wider", "longer", "renamed"],
)
def test_checkpoint_of_another_model_is_refused_in_one_line(saved, other):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved).restore(a_state(**other))
    text = str(error.value)
    assert "\n" not in text and str(saved) in text and "checkpoint 3" in text and "workdir" in text


def test_truncated_checkpoint_is_refused_in_one_line(saved):
    for path in (saved / "3" / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved).restore(a_state())
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_unfinished_checkpoint_is_ignored_and_cleaned_up(saved):
    unfinished = saved / "5.orbax-checkpoint-tmp-123"
    unfinished.mkdir()
    (unfinished / "half").write_text("x")
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest == 3
    assert_same_bits(checkpoints.restore(a_state())[0], a_state())
    assert not unfinished.exists()


def test_json_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "results.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_flipped_bit_in_a_checkpoint_is_refused_with_the_way_back(tmp_path):
    """Orbax restores most of them without a word."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (4, 8, 12):
        checkpoints.save(step, a_state(seed=step), {"seconds": 1.0})
    checkpoints.close()
    assert sorted(p.stem for p in (tmp_path / "run-sha256").iterdir()) == [
        "12",
        "8",
    ]  # as many as are kept
    files = [
        p for p in sorted((tmp_path / "run" / "12").rglob("*")) if p.is_file() and p.stat().st_size
    ]
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        flip_bit(path)
        with pytest.raises(
            CheckpointError,
            match=r"is damaged: .* remove .*run/12: the run then resumes at step 8$",
        ) as error:
            Checkpoints(tmp_path / "run").restore(a_state())
        assert str(path) in str(error.value)
        path.write_bytes(whole)
    files[0].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoints(tmp_path / "run").restore(a_state())
    shutil.rmtree(tmp_path / "run" / "12")
    assert_same_bits(Checkpoints(tmp_path / "run").restore(a_state())[0], a_state(seed=8))


def test_a_checkpoint_without_a_manifest_is_taken_and_gets_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(4, a_state(), {"seconds": 1.0})
    checkpoints.close()
    shutil.rmtree(tmp_path / "run-sha256")
    again = Checkpoints(tmp_path / "run")
    assert_same_bits(again.restore(a_state())[0], a_state())
    again.close()
    assert (tmp_path / "run-sha256" / "4.json").is_file()


class Store(LocalFileSystem):
    """A disk that answers as an object store does: with checksums of its own."""

    kind = "crc32c"
    cachable = False

    def info(self, path, **options):
        found = super().info(path, **options)
        if found["type"] == "file" and self.kind:
            found[self.kind] = str(zlib.crc32(Path(found["name"]).read_bytes()))
        return found


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Checkpoints of three steps in what they take for a bucket; Orbax writes to no other here."""

    def manifests_of(folder):
        return Manifests(
            Store(), folder, f"{folder}-objects", partial(checkpoint.object_sums, Store())
        )

    monkeypatch.setattr(checkpoint, "manifests_of", manifests_of)
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (4, 8, 12):
        checkpoints.save(step, a_state(seed=step), {"seconds": 1.0})
    checkpoints.close()
    return tmp_path / "run"


def test_a_buckets_manifests_name_each_object_with_its_size_and_the_stores_checksum(bucket):
    folder = bucket.with_name("run-objects")
    assert sorted(p.name for p in folder.iterdir()) == ["12.json", "8.json"]
    for step in ("8", "12"):
        expected = {
            n: {"size": len(raw), "crc32c": str(zlib.crc32(raw))}
            for n, raw in folder_bytes(bucket / step).items()
        }
        assert json.loads((folder / f"{step}.json").read_text()) == expected and len(expected) > 3


@pytest.mark.parametrize("change", ["missing", "resized", "changed", "added"])
def test_an_object_that_is_not_what_was_saved_is_named_with_the_way_back(bucket, change):
    path = max(
        (p for p in (bucket / "12" / "state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    if change == "missing":
        path.rename(bucket.parent / "away")
    elif change == "resized":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "changed":
        flip_bit(path)
    else:
        path = path.with_name("another")
        path.write_bytes(b"x")
    said = "missing" if change == "missing" else "damaged"
    with pytest.raises(
        CheckpointError,
        match=rf"{path.name} is {said}: .* remove .*run/12: the run then resumes at step 8$",
    ) as error:
        Checkpoints(bucket).restore(a_state())
    assert str(path) in str(error.value)
    shutil.rmtree(bucket / "12")
    assert_same_bits(Checkpoints(bucket).restore(a_state())[0], a_state(seed=8))


def test_a_bucket_that_cannot_be_asked_is_one_line(bucket, monkeypatch):
    def refuse(self, path, **options):
        raise RuntimeError("Forbidden: 403\nat length")

    monkeypatch.setattr(Store, "cat_file", refuse)
    with pytest.raises(
        CheckpointError,
        match=(
            r"run/12 cannot be compared with its checksums \(Forbidden: 403 at length\); fix this"
        ),
    ):
        Checkpoints(bucket).restore(a_state())


def test_sums_of_the_bytes_go_before_those_of_an_objects_labels():
    class Listed:
        def find(self, folder, detail):
            return {
                "b/run/4/a": {"size": 3, "etag": "E", "md5Hash": "M", "crc32c": "C"},
                "b/run/4/d/b": {"size": 4, "etag": "E", "crc32c": "C"},
                "b/run/4/c": {"size": 5, "ETag": "T"},
                "b/run/4/e": {"size": 6},
            }

    found = checkpoint.object_sums(Listed(), "b/run/4")
    assert found == {
        "a": {"size": 3, "md5Hash": "M"},
        "d/b": {"size": 4, "crc32c": "C"},
        "c": {"size": 5, "ETag": "T"},
        "e": {"size": 6},
    }
    # A store that is none of this machine's disks.
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/run/8/state/x": b"abc", "/bucket/run/8/y": b""})
    assert checkpoint.object_sums(store, "/bucket/run/8") == {
        "state/x": {"size": 3},
        "y": {"size": 0},
    }
    manifests = checkpoint.manifests_of("memory://bucket/run")
    manifests.keep({"8"})
    assert (
        store.ls("/bucket/run-objects", detail=False) == ["/bucket/run-objects/8.json"]
        and manifests.differing("8") == {}
    )
    store.pipe("/bucket/run/8/y", b"1")
    store.rm("/bucket/run/8/state/x")
    assert manifests.differing("8") == {"state/x": "is missing", "y": "is damaged"}


# -------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A function: bytes -> the mount point of a file system of that size."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        found = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
            capture_output=True,
            text=True,
        )
        if found.returncode:
            pytest.skip(
                f"no file system of a few megabytes can be mounted here: {found.stderr.strip()}"
            )
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_keeps_the_checkpoint_before_and_says_so(small_disk):
    folder = small_disk(1_800_000) / "checkpoints" / "x"
    state = {
        "a": jnp.asarray(np.random.default_rng(0).normal(size=250_000).astype(np.float32))
    }  # about 900 kB each
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {"seconds": 1.0})
    with pytest.raises(
        CheckpointError,
        match=(
            r"the disk is full\); fix this and run the same command again: it resumes at step 1"
        ),
    ):
        for step in (2, 3):
            checkpoints.save(step, state, {"seconds": 1.0})
            checkpoints.wait()
    again = Checkpoints(folder)
    assert again.latest == 1
    assert_same_bits(again.restore(state)[0], state)


def test_export_on_a_full_disk_leaves_the_older_one(small_disk):
    folder = small_disk(1_400_000)
    old, new = (
        {"a": np.random.default_rng(i).normal(size=250_000).astype(np.float32)} for i in range(2)
    )
    export(folder / "student", old, {"role": "old"})
    with pytest.raises(CheckpointError, match=r"student \(the disk is full\)"):
        export(folder / "student", new, {"role": "new"})
    params, card = load_export(folder / "student")
    assert card["role"] == "old" and not (folder / "student.tmp").exists()
    assert_same_bits(params, old)


@pytest.mark.long
def test_run_on_a_full_disk_is_one_line(small_disk):
    folder = small_disk(600_000)
    found = run_command("jaxdistill.main", f"--config={TINY}", f"--workdir={folder / 'run'}")
    # Threads of Orbax may trace back before it: the last line is ours.
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 2 and last.startswith("error: ") and "the disk is full" in last, (
        found.stderr
    )
