"""A student's folder is rehearsed before the training, and copied without the teacher's modes."""

import errno
import os
import shutil
from types import SimpleNamespace

import folders
import pytest

from jaxdistill.errors import UserError
from jaxdistill.interop import diffusers_folder, families
from jaxdistill.run import checkpoint


@pytest.fixture
def source(tmp_path):
    """A teacher whose files and folders may only be read, with a file that only the copy needs."""
    root = tmp_path / "sd"
    shutil.copytree(folders.folder("sd"), root)
    (root / "vae" / "notes.txt").write_text("x")
    for path in sorted(root.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root.chmod(0o555)
    yield root
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700)


def save(source, target):
    found = families.open_folder(source)
    params = diffusers_folder.load_params(found.network)
    scheduler = {"_class_name": "DDIMScheduler"}
    diffusers_folder.save_student(found, target, params, scheduler=scheduler)


def test_a_copy_can_be_written_and_replaced_though_the_teacher_cannot(source, tmp_path):
    for _ in range(2):
        save(source, tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "notes.txt").is_file()
    modes = {oct(path.stat().st_mode & 0o200) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"0o200"}


def test_a_failed_write_is_one_line_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    save(source, tmp_path / "out")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"cannot write .*out \(the disk is full\)"):
        save(source, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert not (tmp_path / "out.tmp").exists()


def test_what_is_left_is_cleared_whatever_its_modes_and_links_are_not_followed(tmp_path):
    (tmp_path / "kept").mkdir(mode=0o755)
    left = tmp_path / "left" / "a" / "b"
    left.mkdir(parents=True)
    (left / "link").symlink_to(tmp_path / "kept")
    for path in (left, left.parent, left.parent.parent):
        path.chmod(0o000)
    checkpoint.clear(tmp_path / "left")
    assert not (tmp_path / "left").exists()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o755
    checkpoint.clear(tmp_path / "left")


def writable(source):
    for path in (source, source / "vae", *(source / "vae").iterdir()):
        path.chmod(0o700)
    return source


def dangling(source, target):
    (writable(source) / "vae" / "link.json").symlink_to("nowhere")


def pointer(source, target):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    (writable(source) / "vae" / "flax_model.npz").write_text(text)


def taken(source, target):
    (target / "thesis").mkdir(parents=True)


REFUSED = {
    "a link to nowhere": (dangling, r"link\.json cannot be read \(No such file"),
    "a file that was never fetched": (pointer, r"flax_model\.npz is a git-lfs pointer"),
    "something else in its place": (taken, r"out exists and is not a pipeline folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_end_the_export_ends_the_rehearsal(source, tmp_path, name):
    spoil, words = REFUSED[name]
    spoil(source, tmp_path / "out")
    with pytest.raises(UserError, match=words) as failure:
        diffusers_folder.rehearse(families.open_folder(source), tmp_path / "out")
    assert "\n" not in str(failure.value)


def test_the_rehearsal_counts_what_is_copied_and_the_disk_is_asked(source, tmp_path, monkeypatch):
    size = diffusers_folder.rehearse(families.open_folder(source), tmp_path / "out")
    save(source, tmp_path / "out")
    copied = [p for p in (tmp_path / "out").rglob("*") if p.parts[-2] not in ("unet", "scheduler")]
    assert size == sum(p.stat().st_size for p in copied if p.is_file() and p.parent.name != "out")
    checkpoint.check_space(tmp_path, size, "it")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match=r"GB of free disk, but it will need"):
        checkpoint.check_space(tmp_path, size, "it")
