"""vLLM engines and servers in processes of their own, and their answers held against Transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from support.tiny_models import random_tokens

_FOUND = importlib.util.find_spec("vllm")
needs_vllm = pytest.mark.skipif(_FOUND is None, reason="vLLM is not installed")
ENGINE = Path(__file__).parents[1] / "engines" / "engine.py"
PROMPTS, PROMPT_LENGTH, ANSWER_LENGTH = 32, 12, 32
MARGIN, TOLERANCE = 1e-3, 1e-4
_STARTUP_SECONDS = 400


class EngineResult(NamedTuple):
    """What an engine answered, and the shapes and bytes of its expert parameters, rank by rank."""

    answers: list[dict[str, Any]]
    experts: list[dict[str, tuple[list[int], int]]]


def environment(tensor_parallel: int = 1, **more: str) -> dict[str, str]:
    """Variables for a small engine on two cores."""
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tensor_parallel == 2 else {}
    path = os.pathsep.join([str(ENGINE.parent), os.environ.get("PYTHONPATH", "")])
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **small, **binding, **more}


def stock_python(folder: Path) -> Path:
    """An interpreter for an environment with everything that is installed beside this package, but not the package.

    Args:
        folder: a new folder for the environment; use it with the variables of :func:`stock_environment`.
    """
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    for installed in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}:
        for entry in installed.iterdir():
            if "shape_moe" not in entry.name:
                (packages / entry.name).symlink_to(entry)
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


def stock_environment(variables: dict[str, str]) -> dict[str, str]:
    """The variables without those that lead to this package or decide about its plugin."""
    ours = ("PYTHONHOME", "PYTHONPATH", "VLLM_PLUGINS")
    kept = {name: value for name, value in variables.items() if name not in ours and not name.startswith("SHAPE_MOE_")}
    return {**kept, "PYTHONPATH": str(ENGINE.parent)}


def engine_options(family: str, mode: str = "eager", tensor_parallel: int = 1) -> dict[str, Any]:
    """Options of ``vllm.LLM`` for a tiny model."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": mode == "eager",
        "tensor_parallel_size": tensor_parallel,
        "max_model_len": 128,
        "max_num_seqs": PROMPTS,
        "skip_tokenizer_init": True,
    }
    if family.startswith("deepseek"):
        # vLLM's kernel for rotary embeddings on CPU is wrong for part of a head, with the stock model too, and its
        # AMX kernels for latent attention take no float32.
        custom = ["all" if mode == "eager" else "none", "-rotary_embedding"]
        options |= {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": custom}}
    return options


def prompts(count: int = PROMPTS) -> list[list[int]]:
    """Random prompts."""
    return random_tokens(count, PROMPT_LENGTH).tolist()


def start_engine(
    folder: Path, model: Path, options: dict[str, Any], *, stock: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run one engine over :func:`prompts` to its end, whatever that is.

    Args:
        folder: for the job and its result.
        model: the model.
        options: of ``vllm.LLM``.
        stock: the interpreter of an environment without this package, see :func:`stock_python`.
        variables: of the environment.
    """
    known = environment(options.get("tensor_parallel_size", 1), **variables)
    job = {"model": str(model), "options": options, "prompts": prompts(), "max_tokens": ANSWER_LENGTH}
    (folder / "job.json").write_text(json.dumps(job))
    return subprocess.run(
        [str(stock or sys.executable), str(ENGINE), str(folder / "job.json"), str(folder / "result.json")],
        env=stock_environment(known) if stock else known,
        capture_output=True,
        text=True,
        timeout=_STARTUP_SECONDS,
        check=False,
    )


def run_engine(
    folder: Path,
    model: Path,
    options: dict[str, Any],
    *,
    stock: Path | None = None,
    refusal: str | None = None,
    **variables: str,
) -> EngineResult:
    """Run one engine over :func:`prompts` as :func:`start_engine` does; its output is shown when it fails.

    Where it fails with the words of ``refusal``, which say that this vLLM has no kernel for the processor, the test is
    skipped.
    """
    done = start_engine(folder, model, options, stock=stock, **variables)
    if done.returncode and refusal is not None and refusal in done.stdout + done.stderr:
        pytest.skip(f"this vLLM cannot do it on this processor: {refusal}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return EngineResult(**json.loads((folder / "result.json").read_text()))


def assert_same_answers(model: torch.nn.Module, answers: list[dict[str, Any]]) -> None:
    """Greedy tokens and their log-probabilities equal the model's, in each answer up to the first near-tie.

    One teacher-forced pass over each answer decides it: greedy generation gives the answer exactly when every token
    is the most likely one given those before it.
    """
    compared, worst = 0, 0.0
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert len(answer["tokens"]) == ANSWER_LENGTH
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer["tokens"]])).logits[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(-1)
        top = rows.topk(2).values
        for row, best, token, logprob in zip(rows, top, answer["tokens"], answer["logprobs"], strict=True):
            if best[0] - best[1] < MARGIN:
                break
            assert int(row.argmax()) == token
            worst, compared = max(worst, abs(float(row[token]) - logprob)), compared + 1
    assert worst <= TOLERANCE
    assert compared >= PROMPTS * ANSWER_LENGTH / 2


@contextmanager
def server(command: list[str], log: Path) -> Iterator[str]:
    """A server on 127.0.0.1 for the time of a test: the base address of its OpenAI-compatible interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment(), stdout=stream, stderr=stream
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(address, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(log.read_text())
