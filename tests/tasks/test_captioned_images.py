"""Pictures with captions, in the forms that people have them in."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdistill.errors import UserError
from jaxdistill.tasks.text_to_image.data import captioned_images, prompts_of
from jaxdistill.tasks.text_to_image.images import read_picture

RED = np.zeros((4, 6, 3), np.uint8) + np.array([250, 10, 20], np.uint8)


def png(pixels=RED, kind="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def tar(path, files):
    with tarfile.open(path, "w") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))


def by_metadata(folder, name, text):
    (folder / "sub").mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "sub" / "B.JPG").write_bytes(png(255 - RED, "JPEG"))
    (folder / name).write_text(text)


def jsonl(folder):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/B.JPG", "text": "two"}]
    by_metadata(folder, "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))


def table(folder):
    by_metadata(folder, "metadata.csv", "file_name,caption\na.png,one\nsub/B.JPG,two\n")


def beside(folder):
    by_metadata(folder, "a.txt", "one\n")
    (folder / "sub" / "B.caption").write_text("\ufefftwo")
    (folder / ".thumbnail.png").write_bytes(b"")


def tars(folder):
    first = {"00/a.png": png(), "00/a.txt": b"one", "00/a.json": b'{"caption": "other"}'}
    tar(folder / "000.tar", first)
    second = {"b.jpg": png(255 - RED, "JPEG"), "only.txt": b"", "b.json": b'{"text": "two"}'}
    tar(folder / "001.tar", second)


FORMS = {
    "metadata.jsonl": (jsonl, ""),
    "metadata.csv": (table, ""),
    "a text beside each": (beside, ""),
    "a folder of tars": (tars, ""),
    "numbered tars": (tars, "/{000..001}.tar"),
    "listed tars": (tars, "/00{0,1}.tar"),
    "tars by wildcard": (tars, "/*.tar"),
}


@pytest.mark.parametrize("form", FORMS)
def test_captioned_pictures_are_read_in_each_form(form, tmp_path):
    make, pattern = FORMS[form]
    make(tmp_path)
    found = captioned_images(f"{tmp_path}{pattern}")
    assert [image.caption for image in found] == ["one", "two"]
    np.testing.assert_array_equal(found[0].read(), RED)
    np.testing.assert_allclose(found[1].read(), 255 - RED, atol=3)
    assert len({json.dumps(image.stamp) for image in found}) == 2
    assert [p for p in prompts_of(f"{tmp_path}{pattern}") if p] == ["one", "two"]


# --------------------------------------------------------------------------------- kinds of picture


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def kinds():
    clear = np.dstack([RED, np.zeros((4, 6), np.uint8)])
    grey = np.full((4, 6), 100, np.uint8)
    deep = np.full((4, 6), 25600, np.uint16)  # 100 of 255
    palette, cmyk = Image.fromarray(RED).quantize(2), Image.fromarray(RED).convert("CMYK")
    out = {name: io.BytesIO() for name in ("palette", "cmyk")}
    palette.save(out["palette"], "PNG", transparency=0)
    cmyk.save(out["cmyk"], "TIFF")
    return {
        "turned": (png(exif=exif(6), kind="WEBP", lossless=True), RED.transpose(1, 0, 2)),
        "grey": (png(grey), np.full((4, 6, 3), 100)),
        "16 bits": (png(deep), np.full((4, 6, 3), 100)),
        "alpha": (png(clear), np.full((4, 6, 3), 255)),
        "palette": (out["palette"].getvalue(), np.full((4, 6, 3), 255)),
        "cmyk": (out["cmyk"].getvalue(), RED),
    }


@pytest.mark.parametrize("kind", ["turned", "grey", "16 bits", "alpha", "palette", "cmyk"])
def test_a_picture_of_any_kind_becomes_rgb(kind):
    content, expected = kinds()[kind]
    np.testing.assert_allclose(read_picture(io.BytesIO(content), kind), expected, atol=1)


# ---------------------------------------------------------------------------------------- bad input


def no_caption(folder):
    beside(folder)
    (folder / "a.txt").unlink()


def wrong_case(folder):
    (folder / "a.PNG").write_bytes(png())
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")


def heic(folder):
    (folder / "a.heic").write_bytes(b"")
    (folder / "metadata.csv").write_text("file_name,text\na.heic,one\n")


def heic_beside(folder):
    (folder / "a.heic").write_bytes(b"")
    (folder / "a.txt").write_text("one")


def no_name(folder):
    (folder / "metadata.jsonl").write_text('{"image": "a.png", "text": "one"}')


def twice(folder):
    jsonl(folder)
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")


def cut_tar(folder):
    tars(folder)
    (folder / "000.tar").write_bytes((folder / "000.tar").read_bytes()[:700])


def not_a_tar(folder):
    (folder / "000.tar").write_bytes(b"x" * 2000)


def bare_tar(folder):
    tar(folder / "000.tar", {"a.png": png()})


BAD = {
    no_caption: "1 of 2 pictures without a caption, such as a.png",
    wrong_case: "names the picture 'a.png', which is not in .*; there is a.PNG",
    heic: r"a\.heic is a heic picture, which cannot be read",
    heic_beside: r"a\.heic is a heic picture, which cannot be read",
    no_name: 'row 1 names no picture under "file_name", but has image, text',
    twice: "has metadata.jsonl and metadata.csv; leave one",
    cut_tar: r"000\.tar is no whole tar",
    not_a_tar: r"000\.tar is no whole tar",
    bare_tar: r"000\.tar has no caption for a\.png",
    Path.iterdir: "has no pictures",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_pictures_that_cannot_be_used_are_named(make, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=BAD[make]) as failure:
        captioned_images(str(tmp_path))
    assert "\n" not in str(failure.value) and str(tmp_path) in str(failure.value)


def test_half_of_a_character_in_a_tar_is_replaced_and_said(tmp_path, capsys):
    tar(tmp_path / "0.tar", {"a.png": png(), "a.json": b'{"text": "a \\ud83d"}'})
    assert prompts_of(str(tmp_path)) == ["a \ufffd"]
    capsys.readouterr()
    assert captioned_images(str(tmp_path))[0].caption == "a \ufffd"
    assert "0.tar, the caption 'a \\ud83d' has half of a character" in capsys.readouterr().err


def test_tars_that_are_not_there_are_named(tmp_path):
    tars(tmp_path)
    for pattern in ("{000..002}.tar", "x*.tar", "x.tar"):
        with pytest.raises(UserError, match=r"there is no .*/(002|x\*|x)\.tar"):
            captioned_images(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("cut", [0, 20, -30])
def test_a_damaged_picture_is_named_when_it_is_read(cut, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(png(noise)[:cut])
    (tmp_path / "a.txt").write_text("one")
    (image,) = captioned_images(str(tmp_path))
    with pytest.raises(UserError, match=r"picture .*/a\.png cannot be read \("):
        image.read()
