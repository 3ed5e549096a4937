"""The page of `jaxdistill.serve` in a browser: typing, switches, a teacher, a restart."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from running import Running, open_all

from jaxdistill import serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium: install Debian's `chromium`, or set CHROMIUM"
    ),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    exports, painters = open_all(tmp_path_factory.mktemp("exports"))
    with Running(painters, serve.describe(str(exports["student"]), painters)) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, running):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page = context.new_page()
    page.errors = []
    page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
    page.on(
        "dialog", lambda dialog: (page.errors.append(f"dialog {dialog.message}"), dialog.dismiss())
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(running.url + "/#prompt=a+red+bag&seed=7&lock=1&steps=3&correction=1")
    page.wait_for_selector("#student img[data-request]")
    yield page
    context.close()
    away = "WebSocket connection", "ERR_CONNECTION_REFUSED"
    assert not [e for e in page.errors if not any(word in e for word in away)], page.errors


def shown(page, model: str = "student") -> np.ndarray:
    """The pixels of the model's first picture, read from the page."""
    # blob: URLs are no `connect-src` of the page: drawn on a canvas instead, once the newest is
    # decoded.
    script = """async (s) => {
      const i = document.querySelector(s), c = document.createElement("canvas");
      const decoded = () => i.decode().then(() => true, () => false);
      for (let n = 0; n < 300 && !(await decoded()); n++)
        await new Promise((r) => setTimeout(r, 10));
      c.width = i.naturalWidth; c.height = i.naturalHeight;
      const x = c.getContext("2d"); x.drawImage(i, 0, 0);
      return [c.width, c.height, ...x.getImageData(0, 0, c.width, c.height).data]; }"""
    width, height, *values = page.evaluate(script, f"#{model} img")
    return np.asarray(values, int).reshape(height, width, 4)[..., :3]


def wait_for(page, running, model: str = "student", **request: object) -> None:
    """Until the page shows the picture that a program gets for the request."""
    expected = running.image(model=model, **request).astype(int)
    for _ in range(200):
        if page.locator(f"#{model} img[data-request]").count():
            found = shown(page, model)
            if found.shape == expected.shape and np.abs(found - expected).max() <= 1:
                return
        page.wait_for_timeout(50)
    raise AssertionError(f"the page never showed the picture of {request}")


def test_the_picture_changes_while_typing_and_ends_with_the_caption(page, running):
    caption = "a blue boot above a bag"
    page.fill("#caption", "")
    expect(page.locator("#status")).to_have_text("Type a caption.")
    seen = set()
    for letter in caption:
        page.locator("#caption").press_sequentially(letter)
        page.wait_for_timeout(40)
        seen.add(shown(page).tobytes())
    assert len(seen) >= 5
    wait_for(page, running, prompt=caption, seed=7, steps=3, noise_correction=True)
    expect(page.locator("#student .time")).to_contain_text("ms from the key")


def test_steps_and_noise_correction_switch(page, running):
    for steps in (1, 2, 3):
        page.check(f"#steps-{steps}")
        wait_for(page, running, prompt="a red bag", seed=7, steps=steps, noise_correction=True)
    page.uncheck("#correction")
    wait_for(page, running, prompt="a red bag", seed=7, steps=3, noise_correction=False)


def test_the_teacher_comes_after_the_student_on_the_same_seed(page, running):
    wait_for(page, running, prompt="a red bag", seed=7, steps=3, noise_correction=True)
    assert (
        page.locator("#teacher img[data-request]").count() == 0
    )  # it begins when the typing pauses
    wait_for(page, running, "teacher", prompt="a red bag", seed=7)
    times = [page.locator(f"#{m} .time").inner_text() for m in ("student", "teacher")]
    assert times[0].startswith("3 steps, ") and times[1].startswith("8 steps, ")


def test_the_student_does_not_draw_again_for_the_teacher(page, running):
    page.fill("#caption", "a green coat")
    wait_for(page, running, "teacher", prompt="a green coat", seed=7)
    asked = [
        int(page.locator(f"#{model} img").get_attribute("data-request"))
        for model in ("student", "teacher")
    ]
    assert asked[0] < asked[1]
    expect(page.locator("#student .time")).to_contain_text("ms from the key")


def test_a_grid_holds_following_seeds(page, running):
    page.check("#counts-4")
    expect(page.locator("#student img[data-request]")).to_have_count(4)
    page.wait_for_function(
        "new Set([...document.querySelectorAll('#student img')].map((i) => i.dataset.request)).size"
        " === 1"
    )
    assert [alt.get_attribute("alt")[-1] for alt in page.locator("#student img").all()] == [
        "7",
        "8",
        "9",
        "0",
    ]


def test_the_page_survives_a_restart(page, running):
    running.stop()
    expect(page.locator("#status")).to_contain_text("The server is away. Trying again in")
    page.fill("#caption", "a green coat")
    running.start()
    wait_for(page, running, prompt="a green coat", seed=7, steps=3, noise_correction=True)
    expect(page.locator("#status")).to_have_text("", timeout=10_000)
    assert page.input_value("#caption") == "a green coat"


def test_a_caption_is_text_never_markup(page, running):
    caption = "<img src=x onerror=alert(1)>"
    page.fill("#caption", caption)
    wait_for(page, running, prompt=caption, seed=7, steps=3, noise_correction=True)
    page.wait_for_selector("#history button")
    assert page.locator("#history button").first.get_attribute("title").startswith(caption)
    assert page.locator("img[src=x]").count() == 0


def test_keys_alone_are_enough(page, running):
    page.keyboard.press("Alt+1")
    wait_for(page, running, prompt="a red bag", seed=7, steps=1, noise_correction=True)
    page.keyboard.press("Alt+l")  # unlocked: Enter takes another seed
    page.focus("#caption")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('seed').value !== '7'")
    reached = set()
    page.focus("#caption")
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.textContent.slice(0, 5)"
            )
        )
    assert {
        "steps-1",
        "counts-1",
        "seed",
        "again",
        "lock",
        "correction",
        "with-teacher",
        "download",
    } <= reached, reached


def test_nothing_overflows_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 44


def test_download_and_history_keep_the_picture_and_its_settings(page, running):
    page.wait_for_selector("#history button")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a-red-bag-7.png"
    image = Image.open(io.BytesIO(download.value.path().read_bytes()))
    expected = running.image(prompt="a red bag", seed=7, steps=3, noise_correction=True)
    np.testing.assert_allclose(np.asarray(image).astype(int), expected.astype(int), atol=1)
    assert '"seed": 7' in image.text["jaxdistill"]
    page.fill("#caption", "a white dress")
    page.check("#steps-1")
    wait_for(page, running, prompt="a white dress", seed=7, steps=1, noise_correction=True)
    assert "prompt=a+white+dress" in page.url and "steps=1" in page.url
    page.locator("#history button").last.click()
    assert page.input_value("#caption") == "a red bag" and page.is_checked("#steps-3")
    wait_for(page, running, prompt="a red bag", seed=7, steps=3, noise_correction=True)
