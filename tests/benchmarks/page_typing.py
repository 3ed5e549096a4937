r"""The page of a running `jaxdistill.serve`: milliseconds from a key to its picture.

    python tests/benchmarks/page_typing.py --url=http://127.0.0.1:8000 \
        --prompt="a red sneaker to the left of a blue bag"

Its pictures are made by docs/pictures.py.
"""

import argparse
import shutil
import statistics
import urllib.parse

from playwright.sync_api import sync_playwright


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--url", required=True)
    p.add_argument("--prompt", required=True)
    p.add_argument("--seed", type=int, default=3)
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
        browser.close()


if __name__ == "__main__":
    main()
