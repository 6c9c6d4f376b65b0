"""Everything runs offline, on two threads in all, quietly, and the same every time."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Threads that wait for others give up the processor: else a loaded machine takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import shape_moe  # noqa: F401  # registers pruned checkpoints with Transformers
from shape_moe.embedded_model import embedded_model_path
from support.tiny_models import FAMILIES, make_model, save_model

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "qwen3-30b-a3b"


with suppress(ImportError):  # the environment of the tests with a real vLLM has no hypothesis
    from hypothesis import HealthCheck, settings

    settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("same", settings.get_profile("search"), derandomize=True)
    settings.load_profile("same")  # a busy machine is no fault, and every run tries the same examples
PASSED = os.environ.get("SHAPE_MOE_PASSED")
"""A file that names tests which have passed: they are not run again, so that a long run can go on where it was."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if PASSED and Path(PASSED).is_file():
        done = set(Path(PASSED).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if PASSED and report.when == "call" and report.passed:
        with Path(PASSED).open("a") as stream:
            stream.write(f"{report.nodeid}\n")


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield


@pytest.fixture(scope="session")
def reference() -> Path:
    """Published values and selections, which are not part of the project."""
    if not REFERENCE.is_dir():
        pytest.skip("the published Qwen3-30B-A3B files are not here")
    return REFERENCE


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded model's folder."""
    return embedded_model_path()


@pytest.fixture(scope="session", autouse=True)
def no_time_passes_while_speed_is_measured():
    """On a busy machine less would be judged, which is right there and nothing to test."""
    from shape_moe.jobs import judging_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_plan, "clock", lambda: 0.0)
        yield


@pytest.fixture(scope="session")
def embedded_model(embedded: Path):
    """The embedded model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(embedded)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Saved tiny models by family, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_model(make_model(name), tmp_path_factory.mktemp("model") / name)
        return made[name]

    return get
