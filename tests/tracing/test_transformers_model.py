"""The tracer leaves logits and model as they are, and refuses what it cannot see."""

from __future__ import annotations

import copy

import pytest
import torch

from shape_moe.architectures import sites
from shape_moe.architectures.sites import find_sites
from shape_moe.calibration.batches import batches, make_batch
from shape_moe.errors import ShapeMoeError, UnsupportedModelError
from shape_moe.tracing.batch_context import BatchContext
from shape_moe.tracing.experts import RECORDER_ATTRIBUTE
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_examples
from support.tiny_models import make_config, make_model


def plain_logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_logits_are_bit_identical_to_grouped_mm(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    todo = list(batches(make_examples(9), 4, 0))
    expected = [plain_logits(model, batch) for batch in todo]
    tracer = ModelTracer(model)
    with tracer.attached():
        found = [tracer.add(batch) for batch in todo]
    assert tracer.implementation == "grouped_mm"
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_model_is_given_back_as_it_was(implementation: str) -> None:
    model = make_model("qwen3_moe").train()
    model.set_experts_implementation(implementation)
    modules = {name: (type(m), dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    tracer = ModelTracer(model)
    tracer.run(batches(make_examples(4), 4, 0))
    assert model.config._experts_implementation == implementation
    assert model.training
    for name, module in model.named_modules():
        assert modules[name] == (type(module), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        assert not hasattr(module, RECORDER_ATTRIBUTE)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_model_is_given_back_after_an_error() -> None:
    model = make_model("qwen3_moe")
    tracer = ModelTracer(model)
    with pytest.raises(RuntimeError, match="stop"), tracer.attached():
        raise RuntimeError("stop")
    assert model.config._experts_implementation == "grouped_mm"
    plain_logits(model, make_batch(make_examples(1), [0], 0))


def test_where_grouped_mm_cannot_run_the_models_own_forward_gives_the_logits(monkeypatch) -> None:
    model = make_model("qwen3_moe")
    batch = make_batch(make_examples(5), range(5), 0)
    whole = ModelTracer(model)
    whole.run([batch])
    model.set_experts_implementation("eager")
    expected = plain_logits(model, batch)

    def refuse(_self):
        raise ValueError

    monkeypatch.setattr(type(model), "_grouped_mm_can_dispatch", refuse)
    tracer = ModelTracer(model)
    assert tracer.implementation == "eager"
    with tracer.attached():
        assert torch.equal(tracer.add(batch), expected)
    for layer, table in tracer.coalitions().items():
        assert (table.counts == whole.coalitions()[layer].counts).all()


def test_forward_passes_outside_add_leave_no_trace() -> None:
    model = make_model("qwen3_moe")
    batch = make_batch(make_examples(3), range(3), 0)
    tracer = ModelTracer(model)
    with tracer.attached():
        tracer.add(batch)
        plain_logits(model, batch)
        assert tracer.failure(batch) is None
    assert (
        tracer.statistics()["layer_tokens"].sum(axis=(1, 2, 3)).tolist()
        == [sum(len(e.tokens) for e in batch.examples)] * 2
    )


def test_segments_must_fit_the_tokens() -> None:
    model = make_model("qwen3_moe")
    batch, short = (make_batch(make_examples(count), range(count), 0) for count in (3, 2))
    tracer = ModelTracer(model)
    with tracer.attached():
        for recorder in tracer.recorders:
            recorder.start(BatchContext.of(short))
        with pytest.raises(ShapeMoeError, match="tokens where the batch has"):
            plain_logits(model, batch)


def test_nan_weights_are_named() -> None:
    model = make_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[:] = float("nan")
    batch = make_batch(make_examples(3), range(3), 0)
    tracer = ModelTracer(model)
    with pytest.raises(ShapeMoeError, match="Layer .*not finite.*NaN"):
        tracer.run([batch])
    with tracer.attached():
        assert tracer.failure(batch) == "its logits are not finite"


def test_wrong_facts_are_noticed() -> None:
    """The self-check: the experts' input must be the norm of the residual stream that was recorded."""
    model = make_model("qwen3_moe")
    for layer in model.model.layers:
        layer.post_attention_layernorm, layer.input_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        layer.forward = _swapped_forward.__get__(layer)
    with pytest.raises(ShapeMoeError, match="facts do not fit"):
        ModelTracer(model).run([make_batch(make_examples(2), range(2), 0)])


def _swapped_forward(self, hidden_states, **kwargs):
    mixed, _ = self.self_attn(hidden_states=self.post_attention_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + mixed
    return hidden_states + self.mlp(self.input_layernorm(hidden_states))


def test_dense_layers_have_no_row() -> None:
    tracer = ModelTracer(make_model("qwen3_moe"))
    assert tracer.layers == (0, 2)
    assert ModelTracer(make_model("deepseek_v2")).layers == (1, 2)


def test_fused_kernels_are_refused() -> None:
    model = make_model("gpt_oss")
    model._use_kernels = True
    with pytest.raises(UnsupportedModelError, match="use_kernels=False"):
        find_sites(model)


@pytest.mark.parametrize(
    ("name", "word"), [("Mxfp4GptOssExperts", "Mxfp4Config"), ("FP8Experts", "FineGrainedFP8Config")]
)
def test_fused_quantised_experts_are_refused(name: str, word: str) -> None:
    model = make_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type(name, (type(experts),), {})
    with pytest.raises(UnsupportedModelError, match=word):
        find_sites(model)


def test_experts_without_the_interface_are_refused() -> None:
    model = make_model("qwen3_moe")
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with pytest.raises(UnsupportedModelError, match="use_experts_implementation"):
        find_sites(model)


def test_families_name_the_transformers_that_they_need(monkeypatch) -> None:
    monkeypatch.setattr(sites, "version", lambda _name: "5.19.0")
    assert find_sites(make_model("qwen3_moe"))
    with pytest.raises(UnsupportedModelError, match=r"granitemoe needs Transformers 5\.23 or newer.*this is 5\.19\.0"):
        find_sites(make_model("granitemoe"))


def test_dense_and_unknown_models_are_refused() -> None:
    import transformers

    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"This model \(llama\) has no experts: there is nothing to prune"):
        ModelTracer(llama)
    config = make_config("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(UnsupportedModelError, match="dense"):
        find_sites(transformers.AutoModelForCausalLM.from_config(config))
