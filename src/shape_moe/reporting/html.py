"""The HTML report: one file that needs nothing besides itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shape_moe.reporting import provenance, summary
from shape_moe.reporting.material import Material
from shape_moe.reporting.sections import COSTS, sections
from shape_moe.reporting.story import stories
from shape_moe.reporting.theme import DARK, LIGHT, css_variables
from shape_moe.text import printable

_TEMPLATES = Path(__file__).parent / "templates"


def plotly_script() -> str:
    """The plotting library's JavaScript."""
    from plotly.offline import get_plotlyjs

    return _script_of(get_plotlyjs)


@cache
def _script_of(read: Callable[[], str]) -> str:
    """What the library reads from several megabytes of its files, once."""
    return str(read())


def render_report(material: Material) -> tuple[str, list[str]]:
    """Write the page.

    Args:
        material: what there is to show. Names in it are escaped wherever they appear.

    Returns:
        The page, and the names of its sections in their order.
    """
    plotly = plotly_script()
    found, missing = sections(material)
    specs = [figure.document() for section in found for figure in section.figures]
    script, theme_script = _template("report.js"), _template("report_theme.js")
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            policy=_policy(plotly, script, theme_script),
            style=Markup(_style()),  # noqa: S704 -- the package's own file
            theme_script=Markup(theme_script),  # noqa: S704 -- the package's own file
            script=Markup(script),  # noqa: S704 -- the package's own file
            plotly=Markup(plotly),  # noqa: S704 -- the library's file
            data=Markup(embedded_json(specs)),  # noqa: S704 -- cannot end its element, see there
            headline=summary.headline(material),
            subline=summary.subline(material),
            tiles=summary.tiles(material),
            warnings=summary.warnings(material),
            meaning=summary.meaning(material),
            stories=stories(material),
            costs=[section for section in found if section.name in COSTS],
            rest=[section for section in found if section.name not in COSTS],
            missing=missing,
            facts=provenance.facts(material),
            commands=provenance.commands(material),
            version=version("shape-moe"),
        )
    )
    return page, [*(section.name for section in found), "provenance"]


def embedded_json(content: Any) -> str:
    """JSON for the inside of a script element, which nothing in it can end.

    Numbers that JSON lacks become null, control characters are spelled out.
    """
    text = json.dumps(_shown(content), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _shown(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, dict):
        return {key: _shown(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_shown(value) for value in content]
    return content


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("shape_moe.reporting"),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(content: Any) -> Any:
    """Text without control characters; what is markup of our own stays."""
    return printable(content) if isinstance(content, str) and not isinstance(content, Markup) else content


@cache
def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _style() -> str:
    """Styles with the palettes: the light one, and the dark one where the reader or the reader's system wants it."""
    light, dark = css_variables(LIGHT), css_variables(DARK)
    return "\n".join(
        [
            f":root {{ color-scheme: light; {light} }}",
            "@media screen and (prefers-color-scheme: dark) {",
            f":root:not([data-theme=light], .printing) {{ color-scheme: dark; {dark} }}",
            "}",
            f"@media screen {{ :root[data-theme=dark]:not(.printing) {{ color-scheme: dark; {dark} }} }}",
            _template("report.css"),
        ]
    )


def _policy(*scripts: str) -> str:
    """A content security policy: these very scripts, inline styles, and nothing from anywhere."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
