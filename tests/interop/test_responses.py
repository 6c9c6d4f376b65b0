"""Responses of inference servers become the trace that the tracer itself would have made."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.examples import Example
from shape_moe.demo.tasks import examples as task_examples
from shape_moe.errors import DataError, UsageError
from shape_moe.interop import responses
from shape_moe.interop.responses import read_responses
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import check_selection
from shape_moe.tracing.trace import Trace
from support.data import make_examples, trace_model, write_lines
from support.served import (
    int32,
    npy,
    random_ids,
    routed_ids,
    sglang_response,
    usage,
    vllm_response,
)
from support.tiny_models import make_model

ENCODINGS = ("vllm", "meta_info", "sgl_ext", "sglext", "native")


def encode(array: np.ndarray, prompt: int, encoding: str) -> dict:
    if encoding == "vllm":
        return vllm_response(array, prompt=prompt)
    return sglang_response(array, prompt, encoding)


def assert_same_routing(found: Trace, expected: Trace) -> None:
    """Coalition tables and token counts are equal, number by number.

    What was sampled last never went through the model, but it is what the token before it predicts; the tracer, which
    is given the tokens that did, cannot know of it.
    """
    assert found.info.layers == expected.info.layers
    columns = 4 if expected.info.engine == "transformers" else 8
    for layer, table in expected.coalitions.items():
        np.testing.assert_array_equal(found.coalitions[layer].members, table.members)
        counts = found.coalitions[layer].counts[:, :columns]
        np.testing.assert_array_equal(counts, table.counts[:, :columns])
    for name in ("tokens", "layer_tokens"):
        ours, theirs = found.statistics[name], expected.statistics[name]
        if expected.info.engine == "transformers":
            ours, theirs = ((array[:, :, 0::2] + array[:, :, 1::2]) for array in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int64


def check_against_tracer(model, todo: list[Example], snapshot, encodings, file) -> list[Trace]:
    expected = trace_model(model, todo, batch_size=1)
    ids = [routed_ids(model, example, seed=example.index) for example in todo]
    found = []
    for encoding in encodings:
        rows = [encode(array, e.prompt_length, encoding) for array, e in zip(ids, todo, strict=True)]
        found.append(read_responses(write_lines(file, rows), snapshot))
        assert_same_routing(found[-1], expected)
        assert found[-1].info.engine == ("vllm" if encoding == "vllm" else "sglang")
    return [expected, *found]


def test_equals_the_tracer(family: str, checkpoint, tmp_path) -> None:
    """Every family, dense layers among them; ids come in another order than the tracer's."""
    todo = make_examples(10, seed=3)
    snapshot = open_snapshot(checkpoint(family))
    _, found, _ = check_against_tracer(make_model(family), todo, snapshot, ("vllm", "sgl_ext"), tmp_path / "r.jsonl")
    assert found.info.examples == 10
    assert found.info.tokens == {
        "prompt": sum(e.prompt_length for e in todo),
        "response": sum(len(e.tokens) - e.prompt_length for e in todo),
    }


def test_the_embedded_model_on_its_task(embedded, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    todo = []
    for i, record in enumerate(task_examples("sorting", 9, seed=4)):
        prompt, response = (tokenizer(record[key]).input_ids for key in ("prompt", "response"))
        todo.append(Example.answered(i, f"example {i}", (*prompt, *response), len(prompt)))
    expected, found, *_ = check_against_tracer(model, todo, open_snapshot(embedded), ENCODINGS, tmp_path / "r.jsonl")
    for scorer in ("shape", "frequency"):
        np.testing.assert_array_equal(score_trace(found, scorer).values, score_trace(expected, scorer).values)


@pytest.fixture(scope="module")
def snapshot(checkpoint):
    """16 experts, 4 per token, layer 1 of 3 dense."""
    return open_snapshot(checkpoint("qwen3_moe"))


def make_rows(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [vllm_response(random_ids(rng, int(rng.integers(4, 9)), 3, 16, 4), prompt=3) for _ in range(count)]


def test_shape_and_frequency_select_and_other_scorers_refuse(snapshot, tmp_path) -> None:
    trace = read_responses(write_lines(tmp_path / "r.jsonl", make_rows(16)), snapshot)
    assert trace.info.fingerprint == fingerprint(snapshot)
    assert trace.info.canary == []
    for scorer in ("shape", "frequency"):
        selection = select_from_trace(trace, SelectOptions(keep=0.5, method=Method(scorer)))
        check_selection(selection)
        assert selection.kept == 16
        assert selection.stability is not None
        assert selection.fingerprint == fingerprint(snapshot)
    for scorer in ("reap", "contribution", "gating", "ean", "easy-ep"):
        with pytest.raises(UsageError, match=f"'{scorer}' needs .* made by vllm does not hold; use scorer 'shape'"):
            select_from_trace(trace, SelectOptions(keep=0.5, method=Method(scorer)))


def test_provenance_holds_no_text(snapshot, tmp_path) -> None:
    trace = read_responses(write_lines(tmp_path / "r.jsonl", make_rows(3)), snapshot)
    assert trace.info.source["served_as"] == ["served"]
    assert trace.info.source["content_hash"].startswith("sha256:")
    assert "What the model said" not in json.dumps(asdict(trace.info))


def test_memory_is_bounded_by_counting_on_the_way(snapshot, tmp_path, monkeypatch) -> None:
    file = write_lines(tmp_path / "r.jsonl", make_rows(40))
    whole = read_responses(file, snapshot)
    monkeypatch.setattr(responses, "_COMPACT_ROWS", 20)
    assert_same_routing(read_responses(file, snapshot), whole)


def test_choices_share_their_prompt(snapshot, tmp_path) -> None:
    rng = np.random.default_rng(0)
    prompt = random_ids(rng, 3, 3, 16, 4)
    both = [np.concatenate([prompt, random_ids(rng, n, 3, 16, 4)]) for n in (2, 5)]
    trace = read_responses(write_lines(tmp_path / "r.jsonl", [vllm_response(*both, prompt=3)]), snapshot)
    assert trace.info.tokens == {"prompt": 3.0, "response": 7.0}
    assert trace.info.examples == 1
    assert trace.statistics["layer_tokens"].sum(axis=(1, 3)).tolist() == [[2, 1, 0, 7]] * 2


def test_one_token_of_output_leaves_the_prompt_alone(snapshot, tmp_path) -> None:
    ids = random_ids(np.random.default_rng(0), 5, 3, 16, 4)
    trace = read_responses(write_lines(tmp_path / "r.jsonl", [vllm_response(ids, prompt=5)]), snapshot)
    assert trace.info.tokens == {"prompt": 5.0, "response": 0.0}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", ">u2"])
def test_any_integer_type(snapshot, tmp_path, dtype) -> None:
    ids = random_ids(np.random.default_rng(0), 6, 3, 16, 4)
    found, expected = (
        read_responses(write_lines(tmp_path / "r.jsonl", [vllm_response(ids, prompt=2, dtype=kind)]), snapshot)
        for kind in (dtype, "uint8")
    )
    assert_same_routing(found, expected)


def test_column_major_arrays(snapshot, tmp_path) -> None:
    ids = random_ids(np.random.default_rng(0), 6, 3, 16, 4)
    response = vllm_response(ids, prompt=2)
    expected = read_responses(write_lines(tmp_path / "a.jsonl", [response]), snapshot)
    response = with_ids(response, np.asfortranarray(ids.astype("uint8")))
    assert_same_routing(read_responses(write_lines(tmp_path / "b.jsonl", [response]), snapshot), expected)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_both_engines_agree_and_every_token_counts_once(request, tmp_path_factory, lengths, seed) -> None:
    snapshot = request.getfixturevalue("snapshot")
    rng = np.random.default_rng(seed)
    arrays = [(prompt, random_ids(rng, prompt + response, 3, 16, 4)) for prompt, response in lengths]
    folder = tmp_path_factory.mktemp("served")
    traces = [
        read_responses(write_lines(folder / encoding, [encode(a, p, encoding) for p, a in arrays]), snapshot)
        for encoding in ("vllm", "native")
    ]
    assert_same_routing(*traces)
    total = sum(prompt + response for prompt, response in lengths)
    for row, table in enumerate(traces[0].coalitions.values()):
        assert table.counts[:, :2].sum() == total
        assert traces[0].statistics["tokens"][row].sum() == 4 * total
        even = sum(sum(length) for i, length in enumerate(lengths) if i % 2 == 0)
        assert table.counts[:, 2:4].sum() == even
        predicting = [len(lengths), sum(response for _, response in lengths)]
        assert table.counts[:, 4:6].sum(axis=0).tolist() == predicting


# --- malformed ------------------------------------------------------------------------------------------------------


def ids_of(response: dict) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(response["choices"][0]["routed_experts"])))


def with_ids(response: dict, array: np.ndarray) -> dict:
    response["choices"][0]["routed_experts"] = npy(array)
    return response


def changed(response: dict, token: int, layer: int, slot: int, value: int, dtype="int32") -> dict:
    array = ids_of(response).astype(dtype)
    array[token, layer, slot] = value
    return with_ids(response, array)


def payload(response: dict, value) -> dict:
    response["choices"][0]["routed_experts"] = value
    return response


BROKEN = {
    "not JSON": (lambda r: None, "not valid JSON"),
    "a list": (lambda r: [], "must be a JSON object"),
    "no choices": (lambda r: {**r, "choices": []}, "no choices"),
    "no experts": (lambda r: payload(r, None), "no routed_experts; start the server with --enable-return"),
    "experts of one choice": (lambda r: {**r, "choices": [*r["choices"], {"index": 1}]}, "no routed_experts"),
    "no usage": (lambda r: {**r, "usage": None}, "no usage with prompt_tokens"),
    "usage of another type": (
        lambda r: {**r, "usage": {**usage(3, 1), "prompt_tokens": "3"}},
        "no usage with prompt_tokens",
    ),
    "not base64": (lambda r: payload(r, "!" + r["choices"][0]["routed_experts"]), "not base64"),
    "cut off": (lambda r: payload(r, r["choices"][0]["routed_experts"][:-8]), "not a whole array of integers"),
    "pickled": (lambda r: payload(r, base64.b64encode(b"\x93NUMPY\x07\x00").decode()), "not a readable .npy"),
    "floats": (lambda r: with_ids(r, ids_of(r).astype("float32")), "not a whole array of integers"),
    "a layer missing": (lambda r: with_ids(r, ids_of(r)[:, 1:]), r"\(tokens, 3, 4\); is this the model"),
    "another k": (lambda r: with_ids(r, ids_of(r)[:, :, :2]), r"\(tokens, 3, 4\); is this the model"),
    "two axes": (lambda r: with_ids(r, ids_of(r)[0]), "has shape"),
    "a token missing": (lambda r: with_ids(r, ids_of(r)[1:]), "3 prompt and .* its prompt included"),
    "a token too many": (lambda r: {**r, "usage": usage(3, 1)}, "3 prompt and 1 response tokens"),
    "several prompts": (
        lambda r: {**r, "choices": r["choices"] * 2, "usage": usage(6, 2 * r["usage"]["completion_tokens"])},
        "in 2 choices",
    ),
    "id too large": (lambda r: changed(r, 1, 2, 0, 16), "token 1 has expert 16 in layer 2, but experts are 0 to 15"),
    "negative id": (lambda r: changed(r, 0, 0, 3, -1), "token 0 has expert -1 in layer 0"),
    "an id twice": (
        lambda r: changed(r, 2, 0, 0, int(ids_of(r)[2, 0, 1])),
        "token 2 has an expert twice in layer 0",
    ),
    "raw of another model": (lambda r: payload(r, int32(ids_of(r)[:1, :, :3])), "not whole tokens of 3 layers"),
    "mixed encodings": (
        lambda r: {
            **r,
            "choices": [*r["choices"], {"index": 1, "routed_experts": int32(ids_of(r))}],
            "usage": usage(3, 2 * r["usage"]["completion_tokens"]),
        },
        "encoded in different ways",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_malformed_response_is_named_and_can_be_skipped(snapshot, tmp_path, how) -> None:
    rows = make_rows(5, seed=1)
    break_it, message = BROKEN[how]
    lines = [json.dumps(row) for row in rows]
    broken = break_it(make_rows(5, seed=1)[2])
    lines[2] = "{broken" if broken is None else json.dumps(broken)
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"r\.jsonl, line 3: .*{message}"):
        read_responses(file, snapshot)
    found = read_responses(file, snapshot, skip_bad=True)
    assert list(found.info.source["skipped"]) == [f"{file}, line 3"]
    good = write_lines(tmp_path / "good.jsonl", rows[:2] + rows[3:])
    assert_same_routing(found, read_responses(good, snapshot))


def test_dense_layers_are_not_looked_at(snapshot, tmp_path) -> None:
    ids = random_ids(np.random.default_rng(0), 6, 3, 16, 4)
    found = read_responses(write_lines(tmp_path / "a.jsonl", [vllm_response(ids, prompt=2)]), snapshot)
    ids[:, 1] = 0
    expected = read_responses(write_lines(tmp_path / "b.jsonl", [vllm_response(ids, prompt=2)]), snapshot)
    assert_same_routing(found, expected)
    assert found.info.layers == (0, 2)


def test_a_header_that_claims_terabytes_is_refused_at_once(snapshot, tmp_path) -> None:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 3, 4)}
    np.lib.format.write_array_header_1_0(stream, header)
    row = payload(make_rows(1)[0], base64.b64encode(stream.getvalue() + b"0" * 12).decode())
    with pytest.raises(DataError, match="not a whole array"):
        read_responses(write_lines(tmp_path / "r.jsonl", [row]), snapshot)


def test_files_without_a_usable_response(snapshot, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="it has no responses"):
        read_responses(tmp_path / "empty.jsonl", snapshot)
    file = write_lines(tmp_path / "r.jsonl", [{"choices": []}])
    with pytest.raises(DataError, match=r"No response .* could be used; the first reason: .* line 1"):
        read_responses(file, snapshot, skip_bad=True)


def test_two_engines_in_one_file(snapshot, tmp_path) -> None:
    ids = random_ids(np.random.default_rng(0), 6, 3, 16, 4)
    file = write_lines(tmp_path / "r.jsonl", [encode(ids, 2, "vllm"), encode(ids, 2, "native")])
    with pytest.raises(DataError, match="line 2: this response is of sglang, those before are of vllm"):
        read_responses(file, snapshot, skip_bad=True)
