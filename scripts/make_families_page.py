"""Write docs/families.md, the list of model families, from the facts about them. Run it by ``make docs``."""

from __future__ import annotations

from pathlib import Path

from shape_moe.jobs.families import FamilySupport, families

FILE = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = """# Model families

<!-- Written by scripts/make_families_page.py from the facts about families (make docs); changes here are lost. -->

COUNTS

- **full**: `tests/conformance` (the first nine: all of `tests/`) traces a tiny random model of the family and compares
  its statistics with a slow computation in float64, cuts it in both routings, writes it with equal counts (stock) and
  with different ones (ragged), and loads it again with and without this package: the logits are those of the original
  with its experts masked by hand.
- **structure tested**: the same without statistics: its experts are cut by a selection that was made in another way.
- **refused**: by name, with the reason.

`shape-moe families` prints this list. A checkpoint with equal counts is served by whatever serves the original; the
vLLM plugin serves different counts per layer for the families marked so, and no other.
[Add a model](add-a-model.md) says how a family is added.

| family | grade | class | vLLM, ragged | GGUF | remarks |
| --- | --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The whole page."""
    known = families()
    count = {grade: sum(found.grade == grade for found in known) for grade in ("full", "structure tested", "refused")}
    counts = (
        f"{count['full'] + count['structure tested']} model families are known, {count['full']} of them in full; "
        f"{count['refused']} more are refused."
    )
    return HEAD.replace("COUNTS", counts) + "".join(_row(found) for found in known)


def _row(found: FamilySupport) -> str:
    served, file = ("yes" if supported else "" for supported in (found.vllm, found.gguf))
    name = f"`{found.model_class}`" if found.model_class else ""
    return f"| `{found.model_type}` | {found.grade} | {name} | {served} | {file} | {' '.join(found.remarks)} |\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
