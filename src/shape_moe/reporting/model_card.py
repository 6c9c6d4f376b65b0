"""The model card (README.md) of a pruned checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shape_moe.architectures.families import FAMILIES
from shape_moe.evaluation.verdict import Verdict
from shape_moe.reporting.opening import Opening, short_name
from shape_moe.reporting.series import Series
from shape_moe.selection.selection import Selection
from shape_moe.text import in_code, in_markdown
from shape_moe.tracing.trace import Trace
from shape_moe.units import readable_share, readable_size


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        model: name of the original.
        bytes_before: size of its tensors.
        bytes_after: size of the pruned checkpoint's tensors.
        selection: what is kept.
        target: ``ragged`` or ``stock``.
        trace: the trace, where there was one.
        left_out: what the original has and this checkpoint has not, beside experts; sentences.
        verdict: what pruning did to the model, None where it was not judged.
        forgotten: what it did to general prompts, line by line; empty where they were not asked.
        file: name of the GGUF file, None for a folder.
        series: the models that were made together with it, itself among them; None where it was made alone.
    """

    model: str
    bytes_before: int
    bytes_after: int
    selection: Selection
    target: str
    trace: Trace | None
    left_out: tuple[str, ...] = ()
    verdict: Verdict | None = None
    forgotten: tuple[str, ...] = ()
    file: str | None = None
    series: Series | None = None

    @property
    def opening(self) -> Opening:
        """What a reader must know first."""
        samples = self.trace.info.examples if self.trace is not None else None
        sizes = (self.bytes_before, self.bytes_after)
        return Opening.of(self.model, self.selection, sizes, samples, self.verdict)


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write ``README.md`` into a checkpoint."""
    (folder / "README.md").write_text(render_card(facts), encoding="utf-8")


def render_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    environment = Environment(
        loader=PackageLoader("shape_moe.reporting"),
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: see finalize  # noqa: S701
        finalize=_as_it_is,
    )
    selection = facts.selection
    counts = sorted(len(ids) for ids in selection.layers.values())
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", facts.model) and not Path(facts.model).exists()
    family = FAMILIES.get(selection.family or "")
    slots = (
        "the same; a pruned expert's slot adds nothing" if selection.routing == "drop" else "the same, among kept ones"
    )
    judged = [*(facts.verdict.lines() if facts.verdict is not None else ()), *facts.forgotten]
    return environment.get_template(
        "model_card.md.jinja"
    ).render(
        title=f"{short_name(facts.model)}, pruned to {readable_share(selection.keep)} of its experts",
        model=facts.model if is_hub_id else short_name(facts.model),
        base_model=Markup(facts.model) if is_hub_id else None,  # noqa: S704  # letters, digits, dashes, dots
        selection=selection,
        counts=str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}",
        top_k=selection.top_k,
        per_token=slots,
        bytes_before=facts.bytes_before,
        bytes_after=facts.bytes_after,
        trace=facts.trace.info if facts.trace else None,
        target=facts.target,
        file=facts.file,
        left_out=facts.left_out,
        series=[Markup(line) for line in facts.series.table()] if facts.series else [],  # noqa: S704  # escaped there
        method=facts.opening.method,
        smaller=facts.opening.size,
        verdict=facts.verdict.headline if facts.verdict is not None else "",
        lines=[Markup(line) for line in judged[1:]],  # noqa: S704  # in a code block
        stock_class=family.stock_class if family else "the original's class",
        version=version("shape-moe"),
        size=readable_size,
        share=readable_share,
        code=lambda text: Markup(in_code(text)),  # noqa: S704  # safe in Markdown
    )


def _as_it_is(content: Any) -> Any:
    """Foreign text (names of files, say) shows in Markdown as it is."""
    return in_markdown(content) if isinstance(content, str) and not isinstance(content, Markup) else content
