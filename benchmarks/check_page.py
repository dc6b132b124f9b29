"""Does a page of dynamo-profile work in a browser?  On a phone and a desktop, light and dark, with no network.

    pip install playwright && playwright install chromium
    python benchmarks/check_page.py PAGE.html [--browser PROGRAM] [--screenshots FOLDER]

Prints for every width and colour scheme how wide the content is, how many plots can be seen, and what the page asked
the network for.  Exits 1 if the page is wider than the screen, a plot is missing, cut off or without a description, a
table is cut off without a way to scroll, anything but the page itself is asked for, or the browser complains.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

WIDTHS, HEIGHT = (375, 1280), 900
SCHEMES = ("light", "dark")
LOOK = """() => {
  const seen = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 100 && box.height > 100 && box.left >= 0 && box.right <= window.innerWidth
      && element.checkVisibility({opacityProperty: true, visibilityProperty: true});
  };
  const plots = [...document.querySelectorAll("svg")];
  const cut = [...document.querySelectorAll("table")].filter((table) => {
    const holder = table.closest(".scroll");
    return !holder || (holder.scrollWidth > holder.clientWidth && getComputedStyle(holder).overflowX !== "auto");
  });
  return {
    content: document.documentElement.scrollWidth,
    plots: plots.length,
    visible: plots.filter(seen).length,
    described: plots.filter((plot) => plot.closest("[role=img][aria-label]")).length,
    cut: cut.length,
  };
}"""


def inspect(browser: Any, page_path: Path, width: int, scheme: str, screenshots: Path | None) -> list[str]:
    """Open the page once and print what is seen.

    Args:
        browser: Playwright's.
        page_path: The HTML file.
        width: Of the screen, in pixels.
        scheme: "light" or "dark".
        screenshots: Folder for a picture of the whole page.

    Returns:
        What is wrong.
    """
    requests: list[str] = []
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_path.resolve().as_uri(), wait_until="networkidle")
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    seen = page.evaluate(LOOK)
    if screenshots:
        screenshots.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=screenshots / f"{page_path.stem}-{width}-{scheme}.png", full_page=True)
    page.close()
    others = [url for url in requests if url != page_path.resolve().as_uri() and not url.startswith("data:")]
    print(
        f"{width} px, {scheme}: content {seen['content']} px, {seen['visible']} of {seen['plots']} plots visible, "
        f"{len(others)} requests beyond the page"
    )
    found = {
        "the content is wider than the screen": seen["content"] > width,
        "there is no plot": not seen["plots"],
        "plots are hidden or cut off": seen["visible"] < seen["plots"],
        "plots have no description": seen["described"] < seen["plots"],
        "tables are cut off": seen["cut"],
        f"the page asks for {', '.join(others)}": others,
        f"the browser says {'; '.join(complaints)}": complaints,
    }
    return [f"{width} px, {scheme}: {text}" for text, wrong in found.items() if wrong]


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--browser", type=Path, help="a Chromium (default: playwright's own)")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        sys.exit(f"there is no file {arguments.page}")
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ImportError:
        sys.exit("playwright is missing: pip install playwright && playwright install chromium")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=arguments.browser)
        except playwright.Error as error:
            sys.exit(f"no browser starts: {str(error).splitlines()[0]}")
        wrong = [
            text
            for width in WIDTHS
            for scheme in SCHEMES
            for text in inspect(browser, arguments.page, width, scheme, arguments.screenshots)
        ]
        browser.close()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
