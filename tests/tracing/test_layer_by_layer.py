"""A trace made layer by layer is the trace of the whole model, byte for byte, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from shape_moe.architectures.host_memory import host_memory
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError, ShapeMoeError, UsageError
from shape_moe.jobs import way
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.progress import Silent
from shape_moe.tracing import hidden_states, layer_by_layer, streams
from shape_moe.tracing.hidden_states import HiddenStates
from support.data import write_lines
from support.interruptions import press_ctrl_c, stopped_after
from support.tiny_models import make_model, save_model

BATCHES = 8
"""One example of each of eight folds is alone in its batch, or with the only other one."""
ROOT = Path(__file__).parents[2]


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    rows = [*examples("sorting", 7, seed=1), *examples("words", 6, seed=2)]
    return str(write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", rows))


@pytest.fixture(scope="session")
def family_model(embedded, tmp_path_factory):
    """A tiny model of a family with the embedded model's tokenizer."""
    made = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = save_model(make_model(family, vocab_size=320), tmp_path_factory.mktemp("families") / family)
            AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return get


def options(data: str, **changes) -> ExampleOptions:
    entries = {"data": DataOptions(data), "device": "cpu", "dtype": "float32", "answers": AnswerOptions(batch_size=3)}
    return ExampleOptions(**{**entries, **changes})


def made(model, out: Path, asked: ExampleOptions) -> dict[str, bytes]:
    """The bytes of a trace's numbers by file name."""
    trace(model, asked, out)
    files = [out / "statistics.safetensors", *sorted((out / "coalitions").iterdir())]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="session")
def expected(embedded, data, tmp_path_factory) -> dict[str, bytes]:
    """The embedded model's trace, made with the whole model in memory."""
    return made(embedded, tmp_path_factory.mktemp("whole") / "trace", options(data, stream=False))


def test_every_family_gives_the_same_bytes(family, family_model, data, tmp_path) -> None:
    model = family_model(family)
    streamed = made(model, tmp_path / "streamed", options(data, stream=True))
    assert streamed == made(model, tmp_path / "whole", options(data, stream=False))
    documents = [json.loads((tmp_path / name / "trace.json").read_text()) for name in ("streamed", "whole")]
    for document in documents:
        for changing in ("source", "traced_files", "versions"):
            document.pop(changing)
    assert documents[0] == documents[1]


@pytest.mark.parametrize("limit", [hidden_states.MEMORY_LIMIT, 0])
def test_the_embedded_model_gives_the_same_bytes(limit, embedded, data, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hidden_states.HiddenStates.__init__, "__defaults__", (limit,))
    assert made(embedded, tmp_path / "t", options(data, stream=True)) == expected
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "coalitions",
        "statistics.safetensors",
        "trace.json",
    ]


def test_a_trace_in_memory_alone_is_the_same(embedded, data, expected, tmp_path) -> None:
    trace(embedded, options(data, stream=True)).save(tmp_path)
    assert (tmp_path / "statistics.safetensors").read_bytes() == expected["statistics.safetensors"]


def test_every_byte_is_read_once_and_the_head_never(embedded, data, tmp_path, monkeypatch) -> None:
    read = []
    real = layer_by_layer.LayeredModel

    class Watched(real):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            read.append(self)

    monkeypatch.setattr(layer_by_layer, "LayeredModel", Watched)
    made(embedded, tmp_path / "t", options(data, stream=True, answers=AnswerOptions(batch_size=1)))
    (model,) = read
    needed = sum(slot.size for name, slot in model.snapshot.tensors.items() if name != "model.norm.weight")
    assert model.bytes_read == needed


@pytest.mark.parametrize("limit", [hidden_states.MEMORY_LIMIT, 0])
@pytest.mark.parametrize("calls", [1, 12, 18, 31])
def test_an_interrupted_trace_goes_on(calls, limit, embedded, data, expected, tmp_path, monkeypatch) -> None:
    """Stopped in each of the four layers, and what was finished is not done again."""
    monkeypatch.setattr(hidden_states.HiddenStates.__init__, "__defaults__", (limit,))
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    real = layer_by_layer._Traced.through
    stopped, _ = stopped_after(calls, real)
    monkeypatch.setattr(layer_by_layer._Traced, "through", stopped)
    with pytest.raises(KeyboardInterrupt):
        trace(embedded, options(data, stream=True), tmp_path / "t")
    again, done = stopped_after(10**6, real)
    monkeypatch.setattr(layer_by_layer._Traced, "through", again)
    assert made(embedded, tmp_path / "t", options(data, stream=True)) == expected
    assert len(done) == (4 - calls // BATCHES) * BATCHES
    assert not (tmp_path / "t.partial").exists()


def test_ctrl_c_finishes_the_layer_and_saves_it(embedded, data, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e-9)  # but for this, only the first layer would be saved
    real = streams._Run._layer
    layers = []

    def pressed(self, layer):
        layers.append(layer)
        if layer == 2 and len(layers) == 3:
            press_ctrl_c()
        real(self, layer)

    monkeypatch.setattr(streams._Run, "_layer", pressed)
    with pytest.raises(KeyboardInterrupt):
        trace(embedded, options(data, stream=True), tmp_path / "t")
    assert made(embedded, tmp_path / "t", options(data, stream=True)) == expected
    assert layers == [0, 1, 2, 3]


_KILLED = """
import os, signal
from shape_moe.tracing import layer_by_layer, streams
from shape_moe.cli.main import main
real, calls = layer_by_layer._Traced.through, []
streams.SAVE_SHARE = 1e9
def killed(self, model, layer, batch, hidden):
    calls.append(layer)
    if calls.count(2) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, model, layer, batch, hidden)
layer_by_layer._Traced.through = killed
main()
"""


def test_sigkill_in_a_layer_and_the_same_command_again(embedded, data, expected, tmp_path) -> None:
    """The whole command: killed inside the third layer, then run again."""
    arguments = ["trace", str(embedded), "--data", data, "--device", "cpu", "--dtype", "float32", "--batch-size", "3"]
    arguments += ["--stream", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the last bits depend on them

    def run(program, out):
        command = [sys.executable, *program, *arguments, str(tmp_path / out)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    killed = run(["-c", _KILLED], "t")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((tmp_path / "t.partial" / "so-far-layers" / "done.json").read_text())["layers"] == 2
    again = run(["-m", "shape_moe"], "t")
    assert again.returncode == 0, again.stderr
    for file in [Path("statistics.safetensors"), *(Path("coalitions") / f"layer-{i:03d}.parquet" for i in range(4))]:
        assert (tmp_path / "t" / file).read_bytes() == expected[file.name]


def test_a_damaged_unfinished_trace_is_named(embedded, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    stopped, _ = stopped_after(18, layer_by_layer._Traced.through)
    monkeypatch.setattr(layer_by_layer._Traced, "through", stopped)
    with pytest.raises(KeyboardInterrupt):
        trace(embedded, options(data, stream=True), tmp_path / "t")
    (states,) = (tmp_path / "t.partial" / "so-far-layers").glob("*/entering-*")
    states.write_bytes(states.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match="What an interrupted run left in .*so-far-layers is damaged; delete that folder"
    ):
        trace(embedded, options(data, stream=True), tmp_path / "t")


def test_a_failing_example_is_named(embedded, tmp_path) -> None:
    """One token's embedding is not a number, and one record has that token."""
    model = shutil.copytree(embedded, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][ord("%")] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = [*examples("sorting", 9, seed=1), {"prompt": "a%b=", "response": "b"}]
    source = str(write_lines(tmp_path / "data.jsonl", rows))
    with pytest.raises(ShapeMoeError, match=r"Tracing failed at [^,]*data.jsonl, line 10: Layer 0: .*not finite"):
        trace(model, options(source, stream=True))
    with pytest.raises(ShapeMoeError, match=r"Without --stream, --skip-bad leaves it out"):
        trace(model, options(source, stream=True, answers=AnswerOptions(batch_size=3, skip_bad=True)))


def little_memory(monkeypatch, free: int) -> None:
    from shape_moe.architectures import loading

    monkeypatch.setattr(loading, "host_memory", lambda: free)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_free_memory_decides_and_it_is_said(embedded, data, expected, tmp_path, monkeypatch) -> None:
    little_memory(monkeypatch, 8 * 2**20)
    told = Notes()
    trace(embedded, options(data), tmp_path / "little", progress=told)
    assert "The model is read layer by layer: it needs 12.94 MiB, 8.00 MiB are free (--no-stream tries to hold it " in (
        " ".join(told.notes)
    )
    assert (tmp_path / "little" / "statistics.safetensors").read_bytes() == expected["statistics.safetensors"]
    little_memory(monkeypatch, 3 * 2**30)
    told = Notes()
    monkeypatch.setattr(layer_by_layer.LayerByLayer, "fill", lambda *_: pytest.fail("streamed"))
    trace(embedded, options(data), tmp_path / "much", progress=told)
    assert "The whole model is held in memory: it needs 12.94 MiB, 3.00 GiB are free." in told.notes


def test_an_interrupted_trace_goes_on_its_way_whatever_is_free_now(embedded, data, expected, tmp_path, monkeypatch):
    little_memory(monkeypatch, 8 * 2**20)
    real = layer_by_layer._Traced.through
    stopped, _ = stopped_after(BATCHES + 1, real)
    monkeypatch.setattr(layer_by_layer._Traced, "through", stopped)
    with pytest.raises(KeyboardInterrupt):
        trace(embedded, options(data), tmp_path / "t")
    monkeypatch.setattr(layer_by_layer._Traced, "through", real)
    little_memory(monkeypatch, 3 * 2**30)
    told = Notes()
    trace(embedded, options(data), tmp_path / "t", progress=told)
    assert "Continuing layer by layer, as the interrupted run began." in told.notes
    assert (tmp_path / "t" / "statistics.safetensors").read_bytes() == expected["statistics.safetensors"]


def test_prompts_are_answered_where_the_model_fits_and_refused_where_not(embedded, tmp_path, monkeypatch) -> None:
    rows = [{"prompt": row["prompt"]} for row in examples("words", 4, seed=2)]
    source = str(write_lines(tmp_path / "prompts.jsonl", rows))
    asked = options(source, answers=AnswerOptions(max_new_tokens=32, batch_size=3))
    streamed = trace(embedded, replace(asked, stream=True), tmp_path / "streamed")
    whole = trace(embedded, replace(asked, stream=False), tmp_path / "whole")
    assert streamed.info.tokens == whole.info.tokens
    assert streamed.info.tokens["response"] > 0
    files = [tmp_path / name / "statistics.safetensors" for name in ("streamed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    little_memory(monkeypatch, 8 * 2**20)
    with pytest.raises(ShapeMoeError, match=r"4 prompts without a response.*--responses-from.*--max-new-tokens 0"):
        trace(embedded, asked)
    alone = trace(embedded, options(source, answers=AnswerOptions(max_new_tokens=0)))
    assert alone.info.tokens["response"] == 0


def test_what_goes_with_what(embedded_model, data) -> None:
    with pytest.raises(UsageError, match="not about --engine vllm"):
        options(data, stream=True, engine="vllm")
    with pytest.raises(UsageError, match="--engine stream is what --stream means"):
        options(data, stream=False, engine="stream")
    model, tokenizer = embedded_model
    with pytest.raises(UsageError, match="live model is in memory already"):
        trace(model, options(data, stream=True), tokenizer=tokenizer)


def test_a_model_that_cannot_be_read_layer_by_layer_is_held_whole(embedded, data, tmp_path, monkeypatch) -> None:
    little_memory(monkeypatch, 8 * 2**20)
    monkeypatch.setattr(way, "why_not_layered", lambda _: "its weights are odd")
    told = Notes()
    with pytest.raises(ShapeMoeError, match="does not fit into memory"):
        trace(embedded, options(data), tmp_path / "t", progress=told)
    assert "The model is not read layer by layer, because its weights are odd." in told.notes


@pytest.mark.parametrize("limit", [10**9, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_what_was_put(limit, dtype, tmp_path) -> None:
    shapes = [(2, 5, 8), (1, 3, 8)]
    states = HiddenStates(shapes, dtype, tmp_path, limit)
    assert states.on_disk == (limit == 0)
    first, second = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    for generation, values in enumerate((first, second)):
        for number, value in enumerate(values):
            states.put(number, value)
        states.turn(generation)
        assert all(torch.equal(states.take(number), value) for number, value in enumerate(values))
    states.save()
    states.tidy()
    assert [file.name for file in tmp_path.iterdir()] == ["entering-001.states"]
    assert (tmp_path / "entering-001.states").stat().st_size == 104 * dtype.itemsize
    again = HiddenStates(shapes, dtype, tmp_path, limit)
    again.restore(1)
    assert all(torch.equal(again.take(number), value) for number, value in enumerate(second))


def test_limits_of_control_groups_count(tmp_path) -> None:
    """Both versions, and a limit that stands above the process's own group; file cache is free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "sys/fs/cgroup/box/inner"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n")
    for folder, most in ((group, "max"), (group.parent, "5000000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("3000000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 600000\n")
    assert host_memory(tmp_path) == 2_600_000
    old = tmp_path / "sys/fs/cgroup/memory/jobs"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000000\n")
    (old / "memory.usage_in_bytes").write_text("1500000\n")
    (old / "memory.stat").write_text("total_inactive_file 100000\n")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/jobs\n1:cpu:/x\n")
    assert host_memory(tmp_path) == 600_000
    (old / "memory.usage_in_bytes").write_text("2500000\n")
    assert host_memory(tmp_path) == 0


def test_ulimit_counts() -> None:
    code = (
        "import resource, psutil; from shape_moe.architectures.host_memory import host_memory;"
        "used = psutil.Process().memory_info().vms; limit = used + 50_000_000;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); print(host_memory())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 20_000_000 < int(found.stdout) <= 25_000_000  # the files are mapped as well
