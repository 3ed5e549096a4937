"""A picture of the page of a running `jaxdistill.serve`, once the teacher has finished.

python tests/benchmarks/page_picture.py --url=http://127.0.0.1:8000 --prompt="a red bag above a blue boot" --out=docs/results/page.png
"""

import argparse
import shutil
import urllib.parse

from playwright.sync_api import sync_playwright


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--url", required=True)
    p.add_argument("--prompt", required=True)
    p.add_argument("--seed", type=int, default=3)
    p.add_argument("--out", required=True)
    args = p.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(f"{args.url}/#{urllib.parse.urlencode({'prompt': args.prompt, 'seed': args.seed, 'lock': 1})}")
        page.wait_for_selector("#teacher .grid:not(.stale) img[data-request]", timeout=120_000)
        page.wait_for_selector("#history button")
        page.screenshot(path=args.out)
        browser.close()


if __name__ == "__main__":
    main()
