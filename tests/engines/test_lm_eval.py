"""lm-evaluation-harness with its vLLM backend: a pruned checkpoint needs no extra flag."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.demo.embedded import EVALUATION_SEED, exact_match
from shape_moe.demo.tasks import examples
from shape_moe.jobs.options import PruneOptions
from shape_moe.jobs.prune import prune
from shape_moe.pruning.masks import masked
from support.engines import environment, needs_vllm
from support.selections import seven_of_eight

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.timeout(900),
]
COUNT = 100
TASK = """
task: addition
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 64, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_scores_are_those_of_transformers(tmp_path, embedded) -> None:
    selection = seven_of_eight()
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    with masked(model, selection):
        tokenizer = AutoTokenizer.from_pretrained(embedded)
        expected = exact_match(model, tokenizer, ["addition"], count=COUNT)["addition"]
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    rows = examples("addition", COUNT, seed=EVALUATION_SEED, held_out=True)
    file = tmp_path / "addition.jsonl"
    file.write_text("".join(json.dumps({**row, "response": row["response"].rstrip("\n")}) + "\n" for row in rows))
    (tmp_path / "addition.yaml").write_text(TASK.format(file=file))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("lm_eval"),
            *("--model", "vllm", "--model_args", f"pretrained={tmp_path / 'out'},dtype=float32,max_model_len=256"),
            *("--tasks", "addition", "--include_path", tmp_path, "--output_path", tmp_path / "results"),
            *("--batch_size", "auto"),
        ],
        env=environment(HF_DATASETS_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["addition"]["exact_match,none"] == pytest.approx(expected)
    assert 0 < expected < 1
