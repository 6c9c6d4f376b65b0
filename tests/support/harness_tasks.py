"""Local tasks for lm-evaluation-harness over the embedded model's own tasks: YAML with its data beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shape_moe.demo.embedded import EVALUATION_SEED
from shape_moe.demo.tasks import END, examples
from support.data import write_lines

COUNT = 100
CHOICES = 4
_DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
_GENERATION = (
    """
task: {task}
tag: embedded_tag
output_type: generate_until
doc_to_target: "{{{{response}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {longest}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.5}}
"""
    + _DATA
)
_CHOICE = (
    """
task: {task}
tag: embedded_tag
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    + _DATA
)
_GROUP = """
group: embedded_group
task: [embedded_addition, embedded_choice]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true, filter_list: none}]
"""


def addition_rows() -> list[dict[str, str]]:
    """Held-out sums, the same that :func:`shape_moe.demo.embedded.exact_match` asks."""
    rows = examples("addition", COUNT, seed=EVALUATION_SEED, held_out=True)
    return [{**row, "response": row["response"].removesuffix(END)} for row in rows]


def choice_rows() -> list[dict[str, Any]]:
    """Held-out numbers in words; the wrong choices are the answers to the rows that follow."""
    rows = examples("words", COUNT, seed=EVALUATION_SEED, held_out=True)
    answers = [row["response"] for row in rows]
    made = []
    for i, row in enumerate(rows):
        choices = [answers[(i + step) % COUNT] for step in range(1, CHOICES)]
        gold = i % CHOICES
        made.append({"prompt": row["prompt"], "choices": [*choices[:gold], answers[i], *choices[gold:]], "gold": gold})
    return made


def write_tasks(folder: Path, *, longest: int = 64) -> Path:
    """Write ``embedded_addition``, ``embedded_choice`` and a group of both into a folder; gives the folder."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("addition", addition_rows()), ("choice", choice_rows())):
        write_lines(folder / f"{name}.jsonl", rows)
    for name, text in (("addition", _GENERATION), ("choice", _CHOICE)):
        task = text.format(task=f"embedded_{name}", file=folder / f"{name}.jsonl", longest=longest)
        (folder / f"{name}.yaml").write_text(task)
    (folder / "group.yaml").write_text(_GROUP)
    return folder
