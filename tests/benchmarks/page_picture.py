r"""The page of a running `jaxdistill.serve`: milliseconds from a key to its picture, and pictures
once the teacher has finished.

    python tests/benchmarks/page_picture.py --url=http://127.0.0.1:8000 \
        --prompt="a red bag above a blue boot" --out=docs/results/page.png

Beside --out, page.png for instance: page_four.png (four seeds of both) and page_phone.png (a narrow
dark screen).
"""

import argparse
import shutil
import statistics
import urllib.parse
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


def beside(out: str, name: str) -> str:
    """page.png -> page_NAME.png."""
    path = Path(out)
    return str(path.with_stem(f"{path.stem}_{name}"))


def drawn(page: Page, count: int) -> None:
    """Wait until student and teacher have drawn so many pictures of the newest request."""
    page.wait_for_function(
        """(count) => ["student", "teacher"].every((model) => {
          const found = document.querySelectorAll(`#${model} .grid:not(.stale) img[data-request]`);
          return found.length === count && document.querySelector("#teacher progress").hidden;
        })""",
        arg=count,
        timeout=300_000,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--url", required=True)
    p.add_argument("--prompt", required=True)
    p.add_argument("--seed", type=int, default=3)
    p.add_argument("--out", required=True)
    args = p.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        asked = {"prompt": args.prompt, "seed": args.seed, "lock": 1}
        page.goto(f"{args.url}/#{urllib.parse.urlencode(asked)}")
        page.wait_for_selector("#student img[data-request]")
        page.uncheck("#with-teacher")
        page.fill("#caption", "")
        times = []
        for letter in args.prompt:
            before = page.evaluate("document.querySelector('#student img').dataset.request")
            (
                page.keyboard.type(letter)
                if times
                else page.locator("#caption").press_sequentially(letter)
            )
            if letter != " ":  # a space at the end asks for the same picture
                page.wait_for_function(
                    "(b) => document.querySelector('#student img').dataset.request !== b",
                    arg=before,
                )
                times.append(
                    float(page.locator("#student .time").inner_text().split(", ")[2].split()[0])
                )
            page.wait_for_timeout(80)
        print(
            f"{len(times)} keys, 3 steps: median {statistics.median(times):g} ms from key to"
            f" picture, at most {max(times):g} ms"
        )
        page.check("#with-teacher")
        drawn(page, 1)
        page.wait_for_selector("#history button")
        page.screenshot(path=args.out)
        page.check("#counts-4")
        drawn(page, 4)
        page.screenshot(path=beside(args.out, "four"))
        phone = browser.new_page(
            viewport={"width": 390, "height": 780}, color_scheme="dark", device_scale_factor=2
        )
        phone.goto(page.url.replace("count=4", "count=1"))
        drawn(phone, 1)
        phone.screenshot(path=beside(args.out, "phone"))
        browser.close()


if __name__ == "__main__":
    main()
