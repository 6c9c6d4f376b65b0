"""The HTML report: one file that needs nothing besides itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shape_moe.reporting import provenance, summary
from shape_moe.reporting.figures.figure import Section
from shape_moe.reporting.material import Material
from shape_moe.reporting.sections import COSTS, Missing, sections
from shape_moe.reporting.story import Story, stories
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


@dataclass(frozen=True)
class _Chapter:
    """What the page shows of one model: everything, or with other chapters beside it under a heading of its own."""

    place: int
    title: str
    costs: list[Section]
    rest: list[Section]
    missing: list[Missing]
    material: Material

    @classmethod
    def of(cls, place: int, material: Material) -> _Chapter:
        found, missing = sections(material)
        costs, rest = (
            [_numbered(section, place) for section in found if (section.name in COSTS) is cost]
            for cost in (True, False)
        )
        return cls(place, summary.headline(material), costs, rest, missing, material)

    @property
    def sections(self) -> list[Section]:
        return [*self.costs, *self.rest]

    @property
    def suffix(self) -> str:
        return f"-{self.place}" if self.place > 1 else ""

    def documents(self) -> list[dict[str, Any]]:
        """What the page's script needs to draw the figures."""
        return [{**figure.document(), "part": self.place} for section in self.sections for figure in section.figures]

    def content(self) -> dict[str, Any]:
        """What the template needs."""
        material = self.material
        return {
            "place": self.place,
            "suffix": self.suffix,
            "title": self.title,
            "costs": self.costs,
            "rest": self.rest,
            "missing": self.missing,
            "tiles": summary.tiles(material),
            "meaning": summary.meaning(material),
            "facts": provenance.facts(material),
            "commands": provenance.commands(material),
        }


def _numbered(section: Section, place: int) -> Section:
    """A section whose names are its own on the page."""
    if place == 1:
        return section
    figures = tuple(replace(figure, name=f"{figure.name}-{place}") for figure in section.figures)
    return replace(section, name=f"{section.name}-{place}", figures=figures)


def render_report(materials: Material | Sequence[Material]) -> tuple[str, list[str]]:
    """Write the page.

    Args:
        materials: what there is to show, of several models one after the other. Names in it are escaped wherever they
            appear.

    Returns:
        The page, and the names of its sections in their order.
    """
    given = [materials] if isinstance(materials, Material) else list(materials)
    plotly = plotly_script()
    chapters = [_Chapter.of(place, material) for place, material in enumerate(given, start=1)]
    specs = [spec for chapter in chapters for spec in chapter.documents()]
    script, theme_script = _template("report.js"), _template("report_theme.js")
    one = given[0] if len(given) == 1 else None
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
            headline=summary.headline(one) if one else summary.joint_headline(given),
            subline=summary.subline(one) if one else summary.joint_subline(given),
            stories=[story for material in given for story in _told(material, alone=one is not None)],
            warnings=list(dict.fromkeys(text for material in given for text in summary.warnings(material))),
            chapters=[chapter.content() for chapter in chapters],
            version=version("shape-moe"),
        )
    )
    return page, [name for c in chapters for name in (*(s.name for s in c.sections), f"provenance{c.suffix}")]


def _told(material: Material, *, alone: bool) -> list[Story]:
    """The stories of one model; the first says how the model was made where the page's first line does not."""
    found = stories(material)
    if alone or material.opening is None or not found:
        return found
    return [replace(found[0], method=material.opening.method), *found[1:]]


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
