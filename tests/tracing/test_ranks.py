"""Two processes that share a calibration set make the trace of one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from shape_moe.architectures.host_memory import host_memory
from shape_moe.calibration.batches import batches
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.jobs.way import check_shared
from shape_moe.tracing.ranks import Ranks
from shape_moe.tracing.trace import load_trace
from support.data import make_examples, write_lines


def test_every_batch_belongs_to_one_process_and_a_fold_to_one_alone() -> None:
    todo = list(batches(make_examples(21), 2, 0))
    shares = [Ranks(rank, 3).share(todo) for rank in range(3)]
    assert sorted(id(batch) for share in shares for batch in share) == sorted(id(batch) for batch in todo)
    folds = [{int(fold) for batch in share for fold in batch.folds} for share in shares]
    assert [len(found) for found in folds] == [3, 3, 2]
    assert set.union(*folds) == set(range(8))
    assert [b for b in todo if any(b is mine for mine in shares[1])] == shares[1]  # in the same order
    assert Ranks().share(todo) == todo


def test_more_processes_than_folds_are_refused() -> None:
    with pytest.raises(UsageError, match="9 processes share 8 folds"):
        Ranks(0, 9)
    with pytest.raises(UsageError, match="fill 3 folds: start 3 processes at most"):
        Ranks(0, 4).share(list(batches(make_examples(3), 2, 0)))


def test_what_cannot_be_shared(embedded, monkeypatch) -> None:
    options = ExampleOptions(DataOptions("data.jsonl"))
    check_shared(options, Ranks(0, 2))
    with pytest.raises(UsageError, match="without torchrun"):
        check_shared(replace(options, engine="vllm"), Ranks(0, 2))
    with pytest.raises(UsageError, match="--skip-bad does not go with torchrun"):
        check_shared(replace(options, answers=AnswerOptions(skip_bad=True)), Ranks(0, 2))
    alone = host_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory() == pytest.approx(alone / 4, rel=0.2)


def test_two_processes_equal_one(embedded, tmp_path) -> None:
    rows = [*examples("sorting", 7, seed=1), *examples("words", 6, seed=2)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module"]
    command += ["shape_moe", "trace", embedded, "--data", data, "--device", "cpu", "--dtype", "float32", "--stream"]
    command += ["--batch-size", "3", "-o", tmp_path / "both"]
    threads = str(torch.get_num_threads())  # the last bits depend on them
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "LOGLEVEL": "ERROR"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    both = load_trace(tmp_path / "both")
    options = ExampleOptions(
        DataOptions(str(data)), device="cpu", dtype="float32", answers=AnswerOptions(batch_size=3), stream=False
    )
    one = trace(embedded, options, tmp_path / "one")
    assert (both.info.examples, both.info.tokens, both.info.classes) == (13, one.info.tokens, one.info.classes)
    assert both.info.source["records"] == one.info.source["records"]
    for layer, table in one.coalitions.items():
        np.testing.assert_array_equal(both.coalitions[layer].members, table.members)
        np.testing.assert_array_equal(both.coalitions[layer].counts, table.counts)
    assert set(both.statistics) == set(one.statistics)
    for name in one.statistics:
        np.testing.assert_allclose(both.statistics[name], one.statistics[name], rtol=1e-12, atol=1e-15)
    assert done.stdout.count("13 examples") == 1
