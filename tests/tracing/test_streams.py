"""Several streams through layers that are read once: each is what the model in memory does, whatever interrupts it."""

from __future__ import annotations

import pytest
import torch

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.batches import make_batch
from shape_moe.errors import CheckpointError
from shape_moe.evaluation.by_layers import MaskedStream
from shape_moe.pruning.masks import masked
from shape_moe.tracing import hidden_states, streams
from shape_moe.tracing.streams import Stream, run_streams
from support.data import make_examples
from support.interruptions import stopped_after
from support.selections import random_selection

LAYERS, BATCHES = 4, 3


@pytest.fixture(scope="module")
def snapshot(embedded):
    return open_snapshot(embedded)


@pytest.fixture(scope="module")
def batches():
    examples = make_examples(6, seed=5)
    return [make_batch(examples[i : i + 2], [i, i + 1], 0) for i in range(0, 6, 2)]


@pytest.fixture(scope="module")
def selections(snapshot):
    return [random_selection(snapshot, routing, "ragged", seed=i) for i, routing in enumerate(("drop", "reroute"))]


@pytest.fixture
def model(snapshot):
    return LayeredModel(snapshot, device="cpu", dtype="float32")


class FromLayer(MaskedStream):
    """A mask that begins at a layer."""

    def __init__(self, selection, start: int) -> None:
        super().__init__(selection)
        self.name, self.start = f"{selection.routing} from {start}", start


def asked(selections) -> list[Stream]:
    """The dense one, two masks from the first layer, and a branch at each later one."""
    branches = [FromLayer(selections[start % 2], start) for start in range(1, LAYERS)]
    return [Stream("dense"), *(MaskedStream(selection) for selection in selections), *branches]


def numbers(found):
    return {name: [states.take(number) for number in range(BATCHES)] for name, states in found.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


@pytest.fixture(scope="module")
def expected(snapshot, batches, selections, tmp_path_factory):
    found = run_streams(
        LayeredModel(snapshot, device="cpu", dtype="float32"),
        batches,
        asked(selections),
        tmp_path_factory.mktemp("expected"),
    )
    return numbers(found)


def before_the_norm(model, batch) -> torch.Tensor:
    """What leaves the last layer of a model in memory."""
    seen = []
    hook = model.get_decoder().norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hook.remove()
    return seen[0]


def test_every_stream_is_the_masked_model_bit_for_bit(snapshot, batches, selections, expected) -> None:
    whole = load_model(snapshot, device="cpu", dtype="float32")
    for number, batch in enumerate(batches):
        assert torch.equal(expected["dense"][number], before_the_norm(whole, batch))
        for selection in selections:
            with masked(whole, selection):
                assert torch.equal(expected[selection.digest][number], before_the_norm(whole, batch))


def test_a_branch_is_the_model_that_is_masked_from_there_on(snapshot, batches, selections, expected) -> None:
    from dataclasses import replace

    whole = load_model(snapshot, device="cpu", dtype="float32")
    for start in range(1, LAYERS):
        selection = selections[start % 2]
        later = {layer: ids for layer, ids in selection.layers.items() if layer >= start}
        with masked(whole, replace(selection, layers=later)):
            for number, batch in enumerate(batches):
                found = expected[f"{selection.routing} from {start}"][number]
                assert torch.equal(found, before_the_norm(whole, batch))


@pytest.mark.parametrize("limit", [hidden_states.MEMORY_LIMIT, 0])
def test_layers_are_read_once_for_all_streams(
    limit, snapshot, model, batches, selections, expected, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(hidden_states.HiddenStates.__init__, "__defaults__", (limit,))
    found = run_streams(model, batches, asked(selections), tmp_path)
    assert all(states.on_disk == (limit == 0) for states in found.values())
    assert same(numbers(found), expected)
    once = sum(slot.size for name, slot in snapshot.tensors.items() if name != "model.norm.weight")
    tied = snapshot.config["tie_word_embeddings"]
    head = 0 if tied else snapshot.tensors["lm_head.weight"].size
    assert model.bytes_read == once - head


@pytest.mark.parametrize("limit", [hidden_states.MEMORY_LIMIT, 0])
@pytest.mark.parametrize("calls", [1, 8, 14, 25, 34, 47])
def test_a_run_that_is_stopped_anywhere_goes_on(
    calls, limit, snapshot, model, batches, selections, expected, tmp_path, monkeypatch
) -> None:
    """Before, in and behind every layer, in the branches too; finished layers are not read again."""
    monkeypatch.setattr(hidden_states.HiddenStates.__init__, "__defaults__", (limit,))
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    real = Stream.through
    stopped, done = stopped_after(calls, real)
    monkeypatch.setattr(Stream, "through", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_streams(model, batches, asked(selections), tmp_path)
    reached = done[-1][2]
    again, later = stopped_after(10**6, real)
    monkeypatch.setattr(Stream, "through", again)
    fresh = LayeredModel(snapshot, device="cpu", dtype="float32")
    assert same(numbers(run_streams(fresh, batches, asked(selections), tmp_path)), expected)
    assert later[0][2] in (reached, reached + 1)
    assert len(later) == sum(BATCHES * (3 + min(layer, 3)) for layer in range(later[0][2], LAYERS))


def test_what_another_run_left_is_not_used(snapshot, model, batches, selections, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    stopped, _ = stopped_after(20, Stream.through)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "through", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_streams(model, batches, asked(selections), tmp_path)
    fewer = asked(selections)[:2]
    found = numbers(run_streams(LayeredModel(snapshot, device="cpu", dtype="float32"), batches, fewer, tmp_path))
    assert same(found, {stream.name: expected[stream.name] for stream in fewer})


def test_damage_is_named(model, batches, selections, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    stopped, _ = stopped_after(20, Stream.through)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "through", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_streams(model, batches, asked(selections), tmp_path)
    file = next(tmp_path.glob("stream-001/entering-*"))
    file.write_bytes(file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=f"left in {tmp_path} is damaged; delete that folder"):
        run_streams(model, batches, asked(selections), tmp_path)
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged; delete that folder"):
        run_streams(model, batches, asked(selections), tmp_path)


def test_whoever_looks_at_a_layer_sees_what_enters_it(model, batches, selections, tmp_path) -> None:
    """A branch enters with its parent's states; every stream enters a layer with what it left the last one with."""
    entered = {}

    def look(layer, entering) -> None:
        assert not model.model.get_decoder().layers[layer].input_layernorm.weight.is_meta
        entered[layer] = {name: entering(name, 1).clone() for name in ("dense", "reroute from 1", "reroute from 3")}

    run_streams(model, batches, asked(selections), tmp_path, on_layer=look)
    assert list(entered) == list(range(LAYERS))
    assert torch.equal(entered[1]["reroute from 1"], entered[1]["dense"])
    assert not torch.equal(entered[2]["reroute from 1"], entered[2]["dense"])
    assert torch.equal(entered[3]["reroute from 3"], entered[3]["dense"])


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ([Stream("a"), Stream("a")], "Two streams are called 'a'"),
        ([Stream("a", 2)], "'a' has nothing to start from at layer 2"),
        ([Stream("b", 1, "a"), Stream("a")], "'b' has nothing to start from at layer 1"),
        ([Stream("a"), Stream("b", 3, "a"), Stream("c", 2, "b")], "'c' starts at layer 2, its parent at 3"),
    ],
)
def test_streams_without_a_beginning_are_refused(wanted, complaint, model, batches, tmp_path) -> None:
    with pytest.raises(ValueError, match=complaint):
        run_streams(model, batches, wanted, tmp_path)
