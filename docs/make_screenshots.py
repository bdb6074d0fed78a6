"""Pictures of the built site, wide and narrow, light and dark: python docs/make_screenshots.py [SITE [FOLDER]].

Ends with status 1 if a page is wider than its window, has a picture that does not load, shows a formula as raw TeX, or
asks a network for anything.
"""

import re
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browse.conftest import CHROMIUM

DOCS = Path(__file__).parent
PAGES = (
    "index",
    "tutorial",
    "examples",
    "faq",
    "scores",
    "truth",
    "benchmarks",
    "design",
    "from_pydvl",
    "from_kronfluence",
    "howto/own_model",
    "howto/memory",
    "solvers/choose",
    "command-line",
    "reference",
)
WINDOWS = {"wide": (1280, 900), "narrow": (390, 800)}
BROKEN = """() => [
    ...(document.documentElement.scrollWidth > window.innerWidth
        ? [`is ${document.documentElement.scrollWidth} pixels wide in a window of ${window.innerWidth}`] : []),
    ...[...document.images].filter((image) => !image.naturalWidth).map((image) => `lacks ${image.src}`),
    ...[...document.querySelectorAll(".math")].filter((math) => /[\\\\]/.test(math.textContent))
        .map((math) => `shows TeX as it is written: ${math.textContent}`),
]"""


def main(site: Path, folder: Path) -> list[str]:
    """Picture every page; returns what is wrong with them."""
    folder.mkdir(parents=True, exist_ok=True)
    troubles = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in PAGES:
            for window in WINDOWS:
                troubles += taken(browser, site, folder, name, window, "light")
            troubles += taken(browser, site, folder, name, "wide", "dark")
        browser.close()
    return troubles


def taken(
    browser: Browser, site: Path, folder: Path, name: str, window: str, scheme: Literal["light", "dark"]
) -> list[str]:
    """One picture; what is wrong with the page."""
    width, height = WINDOWS[window]
    page: Page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    asked: list[str] = []
    page.route(re.compile("^https?:"), lambda route: (asked.append(f"asks for {route.request.url}"), route.abort()))
    page.goto((site / f"{name}.html").resolve().as_uri())
    found: list[str] = [*page.evaluate(BROKEN), *asked]
    page.screenshot(path=folder / f"{name.replace('/', '-')}-{window}-{scheme}.png", full_page=name != "reference")
    page.close()
    return [f"{name}, {window}, {scheme}: {trouble}" for trouble in found]


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    found = main(*(given + [DOCS / "_build" / "html", DOCS / "_build" / "screenshots"][len(given) :]))
    sys.exit("\n".join(found) or 0)
