"""docs/pictures.py: what is drawn from committed results, and the files it leaves."""

import numpy as np
import paths
import pytest
from paths import ROOT
from PIL import Image, ImageColor


@pytest.fixture(scope="module")
def pictures():
    return paths.module("docs/pictures.py")


def test_quality_has_the_numbers_of_the_tables(pictures):
    found, reference, noise = pictures.curves(ROOT / "docs/results")
    matched = [found["matched"][steps] for steps in (1, 2, 3, 4)]
    assert [len(fds) for fds in matched] == [6] * 4
    # docs/results/scenes_headline.md, "FD of all" and "/ teacher's 50 steps".
    np.testing.assert_allclose(np.mean(matched, axis=1), [1.070, 0.898, 0.888, 0.964], atol=6e-4)
    spread = np.std(matched, axis=1, ddof=1)
    np.testing.assert_allclose(spread, [0.055, 0.042, 0.055, 0.067], atol=6e-4)
    assert (round(reference, 2), round(noise, 2)) == (0.92, 0.10)
    trained = {name: len(by_steps[1]) for name, by_steps in found.items()}
    others = {name: 3 for name in pictures.OTHERS} | {"dmd2_faithful": 1}
    assert trained == {"teacher": 1, "matched": 6, "imagine_flash": 3, **others}


def test_quality_is_drawn_in_light_and_dark(pictures, tmp_path):
    pictures.main(["quality", f"--out={tmp_path}"])
    for name, theme in pictures.THEMES.items():
        image = Image.open(tmp_path / f"quality-{name}.png").convert("RGB")
        assert image.width <= 1600 and image.height < image.width
        colours = {colour for _, colour in image.getcolors(256)}
        wanted = {ImageColor.getrgb(c) for c in (theme.surface, theme.text, theme.ours)}
        assert image.getpixel((0, 0)) == ImageColor.getrgb(theme.surface)
        assert all(min(np.abs(np.subtract(a, b)).max() for b in colours) <= 8 for a in wanted)


def test_a_missing_run_is_said_in_a_line(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pictures.main(["trajectory", f"--out={tmp_path}", f"--run={tmp_path / 'none'}"])
    assert "is no finished run; make one with" in capsys.readouterr().err
