"""How long reports take to open: ``python -m benchmarks.report_opening REPORT.html ...``, wall clock, new browsers."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.support.browser import open_browser

from benchmarks.harness import seconds, write

OPENINGS = 7


def opening(page: Path) -> float:
    """Seconds from asking for a page until its last plot is drawn, in a browser that has never seen it."""
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        browser.screen(1200)
        return seconds(lambda: browser.open(page))


def main() -> None:
    """Measure the reports named, and write."""
    if not sys.argv[1:]:
        raise SystemExit("Name the reports: python -m benchmarks.report_opening REPORT.html ...")
    rows = {}
    for name in sys.argv[1:]:
        page = Path(name)
        times = [opening(page) for _ in range(OPENINGS)]
        size = page.stat().st_size
        rows[page.name] = {"bytes": size, "seconds": median(times), "fastest": min(times), "slowest": max(times)}
    write("report_opening", {"what": f"wall clock, {OPENINGS} new browsers each", "reports": rows})


if __name__ == "__main__":
    main()
