"""Quantisation settings after pruning: the rules that hit a kept expert hit it under its new number.

The matchers here are written from what each quantiser documents, independently of the code under test.
"""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import UnsupportedModelError
from shape_moe.pruning.model_config import pruned_config
from shape_moe.pruning.quantisation import Numbering, check_quantisation, renumber_quantisation
from support.selections import random_selection

QWEN, MIXTRAL = FAMILIES["qwen3_moe"], FAMILIES["mixtral"]
TOTAL = 12
KEPT = {0: (0, 1, 3, 7, 10), 2: (2, 3, 4, 5, 6, 11), 3: tuple(range(TOTAL))}
NUMBERING = Numbering(QWEN, TOTAL, KEPT)


def rewritten(section: Any, numbering: Numbering = NUMBERING) -> Any:
    before = json.dumps(section)
    result = renumber_quantisation(section, numbering, "config.json")
    assert json.dumps(section) == before, "the input is not touched"
    return result


def refused(section: Any, key: str, pattern: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"config\.json: {re.escape(key)} names experts by {re.escape(repr(pattern))}"
    ):
        renumber_quantisation(section, NUMBERING, "config.json")
    with pytest.raises(UnsupportedModelError):
        check_quantisation(section, QWEN, TOTAL, [0, 2, 3], "config.json")


def name(layer: int, expert: int, projection: str = "up_proj", prefix: str = "model.", block: str = "mlp") -> str:
    return f"{prefix}layers.{layer}.{block}.experts.{expert}.{projection}"


def hits(rule: str, module: str) -> bool:
    """Whether a rule hits a module: a regular expression, a glob, or a module's name or a part of it."""
    if rule.startswith(("re:", "+:", "-:")):
        return re.match(rule.split(":", 1)[1], module) is not None
    if any(sign in rule for sign in "*?["):
        return fnmatch.fnmatchcase(module, rule)
    return f".{rule}." in f".{module}."


def check_meaning(old: list[str], new: list[str]) -> None:
    """Every kept expert is hit by as many rules as before, in every layer and projection."""
    for layer, ids in KEPT.items():
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for place, expert in enumerate(ids):
                before = sum(hits(rule, name(layer, expert, projection)) for rule in old)
                after = sum(hits(rule, name(layer, place, projection)) for rule in new)
                assert before == after, (layer, expert, projection)


LITERALS = [
    name(layer, expert, projection)
    for layer in (0, 2, 3)
    for expert in (0, 3, 4, 7, 11)
    for projection in ("up_proj", "down_proj")
]
ALIKE = [
    "lm_head",
    "Linear",
    "model.layers.0.mlp.gate",
    "re:.*experts.*",
    r"re:.*\.experts\.\d+\.down_proj$",
    "*.experts.*",
    r"re:model\.layers\.0\..*",
    "model.layers.2.mlp.experts",
    "*.down_proj",
]


@pytest.mark.parametrize(
    "key",
    [
        "ignore", "modules_to_not_convert", "ignored_layers", "exclude", "exclude_modules", "exclude_layers",
        "llm_int8_skip_modules", "skip_modules", "targets", "modules_to_convert",
    ],
)  # fmt: skip
def test_lists_of_names(key) -> None:
    result = rewritten({"quant_method": "any", key: [*LITERALS, *ALIKE]})
    assert result["quant_method"] == "any"
    assert result[key][-len(ALIKE) :] == ALIKE
    expected = [
        name(layer, KEPT[layer].index(expert), projection)
        for layer in (0, 2, 3)
        for expert in (0, 3, 4, 7, 11)
        if expert in KEPT[layer]
        for projection in ("up_proj", "down_proj")
    ]
    assert result[key][: -len(ALIKE)] == expected
    check_meaning([*LITERALS, *ALIKE], result[key])


@pytest.mark.parametrize(
    "key", ["dynamic", "extra_config", "layer_config", "layer_quant_config", "quantized_layers", "quant_config"]
)
def test_tables_by_name(key) -> None:
    section = {key: {rule: {"bits": "4", "sym": True, "group": [32]} for rule in [*LITERALS, *ALIKE]}}
    result = rewritten(section)
    assert all(value == {"bits": "4", "sym": True, "group": [32]} for value in result[key].values())
    check_meaning(list(section[key]), list(result[key]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.0.mlp.experts.3", "layers.0.mlp.experts.2"),
        ("layers.0.mlp.experts.3.up_proj", "layers.0.mlp.experts.2.up_proj"),
        ("model.layers.0.mlp.experts.10.up_proj.weight", "model.layers.0.mlp.experts.4.up_proj.weight"),
        ("model.language_model.layers.2.mlp.experts.11.w1", "model.language_model.layers.2.mlp.experts.5.w1"),
        ("model.layers.0.block_sparse_moe.experts.7.w2", "model.layers.0.block_sparse_moe.experts.3.w2"),
        ("model.layers.0.feed_forward.experts.7", "model.layers.0.feed_forward.experts.3"),
        ("model.layers.0.mlp.experts.2.up_proj", None),
        ("layers.2.mlp.experts.0", None),
        ("model.layers.1.mlp.experts.2.up_proj", "model.layers.1.mlp.experts.2.up_proj"),
        ("model.layers.3.mlp.experts.9.up_proj", "model.layers.3.mlp.experts.9.up_proj"),
        ("model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
    ],
)  # fmt: skip
def test_spellings_of_a_name(old, new) -> None:
    """With and without the prefix, other block names, module or weight; also under keys that nobody knows."""
    assert rewritten({"ignore": ["x", old]}) == {"ignore": ["x"] + ([new] if new else [])}
    assert rewritten({"surprise": {"deeper": [old]}}) == {"surprise": {"deeper": [new] if new else []}}
    assert rewritten({"surprise": {old: 1, "x": 2}}) == {"surprise": ({new: 1} if new else {}) | {"x": 2}}


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*experts\.(1|2)\..*", r"re:.*\.experts\.7\.down_proj", r"re:model\.layers\.0\.mlp\.experts\.[0-3]\..*",
        r"re:.*experts\.\d\..*", r"re:.*\.1\..*_proj", "*.experts.7.*", "*experts.1*",
        "model.layers.*.mlp.experts.[0-3].*", "*.?.up_proj", "experts.7",
        "mlp.experts.7.up_proj", "experts.{0..7}", "model.layers.0.mlp.experts.0-7",
        "model.layers.0.mlp.experts_7", "7.up_proj", r".*experts\.(3|4)\..*", "experts[1]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["ignore", "exclude_modules", "modules_to_not_convert"])
def test_patterns_that_tell_experts_apart(key, pattern) -> None:
    refused({key: ["lm_head", pattern]}, key, pattern)


@pytest.mark.parametrize("sign", ["+:", "-:", ""])
def test_gptq_dynamic(sign) -> None:
    refused({"dynamic": {sign + r".*\.experts\.[1-3]\..*": {"bits": 8}}}, "dynamic", sign + r".*\.experts\.[1-3]\..*")
    alike = {sign + r".*\.experts\.\d+\.(up|gate)_proj.*": {"bits": 8}, sign + r".*layers\.[0-9]\..*experts.*": {}}
    assert rewritten({"dynamic": alike}) == {"dynamic": alike}


def test_compressed_tensors_groups() -> None:
    weights = {"num_bits": 4, "strategy": "group"}
    section = {
        "config_groups": {
            "group_0": {"targets": [name(0, 3), "Linear"], "weights": {"num_bits": 4, "strategy": "group"}}
        },
        "ignore": [r"re:.*mlp\.gate$", name(2, 11)],
    }
    result = rewritten(section)
    assert result["config_groups"]["group_0"]["targets"] == [name(0, 2), "Linear"]
    assert result["config_groups"]["group_0"]["weights"] == weights
    assert result["ignore"] == [r"re:.*mlp\.gate$", name(2, 5)]
    refused(
        {"config_groups": {"group_1": {"targets": [r"re:.*experts\.(1|2)\..*"]}}},
        "config_groups.group_1.targets",
        r"re:.*experts\.(1|2)\..*",
    )


def test_names_in_every_layer_count_when_they_name_every_expert() -> None:
    """GPTQ's lists of the modules in a block name all experts, without a layer."""
    every = [f"mlp.experts.{expert}.{part}" for expert in range(TOTAL) for part in ("up_proj", "gate_proj")]
    result = rewritten({"modules_in_block_to_quantize": [["self_attn.q_proj"], every]})
    assert result["modules_in_block_to_quantize"] == [["self_attn.q_proj"], every]  # layer 3 still has all of them
    fewer = Numbering(QWEN, TOTAL, {0: (1, 4), 2: (0, 2, 5)})
    result = rewritten({"modules_in_block_to_quantize": [every]}, fewer)
    assert result["modules_in_block_to_quantize"] == [every[:6]]
    refused({"modules_in_block_to_quantize": [every[:-1]]}, "modules_in_block_to_quantize", every[1])


def test_what_names_no_module_stays() -> None:
    section = {
        "bits": 4, "quant_method": "gptq", "version": "0.1.2", "group_size": "128", "scale": None, "desc_act": False,
        "dataset": ["c4 7", "1.3"], "meta": {"quantizer": ["gptqmodel:2.0"], "7": {"3": "10"}}, "damp": 0.1,
    }  # fmt: skip
    assert rewritten(section) == section


def test_nothing_is_refused_where_no_expert_goes() -> None:
    everything = Numbering(QWEN, TOTAL, {0: range(TOTAL)})
    section = {"ignore": [r"re:.*experts\.(1|2)\..*", name(0, 3)]}
    assert rewritten(section, everything) == section


def test_block_names_of_the_family() -> None:
    """Mixtral's block has one name on disk and another in the model: patterns may use either."""
    numbering = Numbering(MIXTRAL, 8, {0: (1, 3)})
    for pattern in (r"re:.*block_sparse_moe\.experts\.3\..*", r"re:.*mlp\.experts\.3\.w1"):
        with pytest.raises(UnsupportedModelError):
            rewritten({"ignore": [pattern]}, numbering)


_PIECES = st.sampled_from(["1", "[0-4]", r"\d+", r"\d", "(0|3)", ".*", "1?", r"\d\d"])


@given(
    st.lists(
        st.one_of(
            st.builds(name, st.integers(0, 4), st.integers(0, TOTAL - 1), st.sampled_from(["up_proj", "down_proj"])),
            st.builds(lambda piece: rf"re:.*\.experts\.{piece}\.up_proj", _PIECES),
            st.builds(lambda piece: rf"re:model\.layers\.{piece}\.mlp\.experts\..*", _PIECES),
            st.sampled_from(["*.experts.*", "*.experts.?.*", "*.experts.??.*", "model.layers.0.*"]),
        ),
        max_size=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_rules_are_the_same_afterwards_or_refused(rules) -> None:
    """Brute force: for every kept expert, the rules that hit its old name are those that hit its new one."""
    try:
        result = rewritten({"ignore": rules})["ignore"]
    except UnsupportedModelError:
        counts = [
            tuple(hits(rule, name(layer, expert, projection)) for expert in range(TOTAL))
            for rule in rules
            if rule.startswith(("re:", "*", "model.layers.0.*"))
            for layer in (0, 2)
            for projection in ("gate_proj", "up_proj", "down_proj")
        ]
        assert any(len(set(row)) > 1 for row in counts), "only patterns that tell experts apart are refused"
        return
    check_meaning(rules, result)


def test_the_configuration_is_rewritten_as_a_whole(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("qwen3_moe"))
    selection = random_selection(snapshot, "drop", "ragged")
    kept = selection.layers[0]
    section = {
        "dynamic": {name(0, kept[2]): {"bits": 8}},
        "ignore": [name(0, kept[1]), "lm_head"],
    }
    config = {**snapshot.config, "quantization_config": section}
    found = pruned_config(config, snapshot.moe, selection, "ragged")["quantization_config"]
    assert found == {"dynamic": {name(0, 2): {"bits": 8}}, "ignore": [name(0, 1), "lm_head"]}
