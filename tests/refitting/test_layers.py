"""The pass over the layers, against whole forward passes of the masked model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import shape_moe
from shape_moe.architectures.live_layers import LiveLayers
from shape_moe.architectures.sites import decoder_layers, find_sites, live_moe_config
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.batches import batches
from shape_moe.errors import UnsupportedModelError, UsageError
from shape_moe.refitting import layers as layers_module
from shape_moe.refitting.layers import RefitPass, RefitRequest
from shape_moe.refitting.refitted import LayerFiles
from shape_moe.refitting.seen import down_inputs
from support.closeness import FLOAT32, relative_error
from support.data import make_examples
from support.selections import random_selection
from support.tiny_models import FAMILIES, make_model


def todo(count: int = 24, batch_size: int = 5):
    return list(batches(make_examples(count), batch_size, 0))


def double_model(name):
    """A model in float64, which the grouped experts implementation does not know."""
    model = make_model(name, dtype=torch.float64)
    model.set_experts_implementation("eager")
    return model


def refitted(model, selection, given=None, files=None, **request):
    engine = LiveLayers(model)
    with engine.attached():
        return RefitPass(engine, selection, given or todo(), RefitRequest(**request), files).run()


def streams(model, given) -> dict[int, torch.Tensor]:
    """What every decoder layer gives for the real tokens of all batches, in whole forward passes."""
    found: dict[int, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, number=number: found.setdefault(number, []).append(out))
        for number, layer in decoder_layers(model).items()
    ]
    with torch.no_grad():
        for batch in given:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    masks = [batch.attention_mask > 0 for batch in given]
    return {n: torch.cat([t[m] for t, m in zip(parts, masks, strict=True)]) for n, parts in found.items()}


def lengths_before_blocks(model, given) -> dict[int, torch.Tensor]:
    """``|h_t|`` of the dense model by layer."""
    found: dict[int, list[torch.Tensor]] = {}
    hooks = [
        site.residual_norm.register_forward_hook(
            lambda _m, args, _o, n=site.layer: found.setdefault(n, []).append(args[0].norm(dim=-1))
        )
        for site in find_sites(model)
    ]
    with torch.no_grad():
        for batch in given:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat([t[b.attention_mask > 0] for t, b in zip(p, given, strict=True)]) for n, p in found.items()}


def token_weights(given) -> torch.Tensor:
    """1 where the next token of the example is response, else 0.25, from the examples themselves."""
    found = []
    for batch in given:
        for example in batch.examples:
            response = {i for begin, end in example.spans for i in range(begin, end)}
            found += [1.0 if t + 1 in response else 0.25 for t in range(len(example.tokens))]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("routing", ["drop", "reroute"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_says_what_whole_passes_of_the_refitted_model_show(name, routing, checkpoint) -> None:
    """The reported residuals are those of the dense stream and the masked model's, whole and end to end."""
    selection = random_selection(open_snapshot(checkpoint(name)), routing, "ragged")
    model = double_model(name)
    given = todo()
    result = refitted(model, selection, given)
    assert [said.layer for said in result.layers] == list(selection.layers)
    dense, lengths = streams(model, given), lengths_before_blocks(model, given)
    weights, c = token_weights(given), live_moe_config(model).residual_scale
    out = torch.arange(len(weights)) % 10 == 9
    for said in result.layers:
        below = {layer: found for layer, found in result.weights.items() if layer < said.layer}
        for limit, (fitted, kept_out) in (
            (below, (said.before, said.held_out_before)),
            ({**below, said.layer: result.weights.get(said.layer)}, (said.after, said.held_out_after)),
        ):
            used = {layer: found for layer, found in limit.items() if found is not None}
            with shape_moe.masked(model, selection, weights=used):
                pruned = streams(model, given)
            missing = (dense[said.layer] - pruned[said.layer]) / c
            squares = weights * missing.square().sum(1) / lengths[said.layer].square()
            assert fitted == pytest.approx(float(squares[~out].sum()), rel=1e-8)
            assert kept_out == pytest.approx(float(squares[out].sum()), rel=1e-8)
        assert said.tokens == int((~out).sum())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_the_residual_falls_where_the_model_is_linear_as_the_solver_says(name, checkpoint, monkeypatch) -> None:
    """The residual in the model as it runs is the one that the solver predicted from its own products."""
    selection = random_selection(open_snapshot(checkpoint(name)), "reroute", "ragged")
    predicted = {}
    real = layers_module.solve

    def solve(problem, rho, store, **options):
        fit = real(problem, rho, store, **options)
        predicted[len(predicted)] = fit
        return fit

    monkeypatch.setattr(layers_module, "solve", solve)
    result = refitted(double_model(name), selection, rho=3.0)
    first = result.layers[0]
    fits = [fit for fit in predicted.values() if fit.before == pytest.approx(first.before)]
    assert first.rho is not None
    assert any(
        first.after == pytest.approx(fit.after, rel=1e-9)
        and first.held_out_after == pytest.approx(fit.held_out_after, rel=1e-9)
        for fit in fits
    )
    assert first.after < first.before


@pytest.mark.parametrize("name", FAMILIES)
def test_what_enters_a_down_projection_gives_the_experts_output(name) -> None:
    model = make_model(name)
    site = find_sites(model)[0]
    experts = site.experts
    hidden = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for expert in (0, 3):
        with torch.no_grad():
            entering = down_inputs(experts, expert, hidden)
            weight = experts.down_proj[expert]
            ours = entering @ (weight if experts.is_transposed else weight.T)
            ours = ours + experts.down_proj_bias[expert] if experts.has_bias else ours
            theirs = experts(hidden, torch.full((6, 1), expert), torch.ones(6, 1))
        assert relative_error(ours, theirs) <= FLOAT32


def test_a_mask_with_weights_gives_the_model_back_bit_for_bit(checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint("gpt_oss")), "drop", "ragged")
    model = make_model("gpt_oss")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = refitted(model, selection, rho=3.0)
    assert result.weights
    with shape_moe.masked(model, result.applied_to(selection)):
        for layer, found in result.weights.items():
            experts = model.model.layers[layer].mlp.experts
            kept = selection.layers[layer]
            assert torch.equal(experts.down_proj[kept], found.weight)
            assert torch.equal(experts.down_proj_bias[kept], found.bias)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_keeping_everything_changes_nothing(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("qwen3_moe"))
    moe = snapshot.moe
    selection = random_selection(snapshot, "drop", "ragged")
    everything = {layer: list(range(moe.num_experts)) for layer in selection.layers}
    result = refitted(make_model("qwen3_moe"), replace(selection, layers=everything))
    assert result.weights == {}
    assert [(said.rho, said.before, said.after) for said in result.layers] == [(None, 0.0, 0.0)] * len(everything)


def test_the_same_calibration_gives_the_same_bits_and_an_interrupted_refit_goes_on(checkpoint, tmp_path) -> None:
    selection = random_selection(open_snapshot(checkpoint("qwen2_moe")), "reroute", "ragged")
    whole = refitted(make_model("qwen2_moe"), selection, rho=3.0)
    model, engine = make_model("qwen2_moe"), None
    engine = LiveLayers(model)

    def stop(done: int) -> None:
        counted.append(done)
        if len(counted) == 2:
            raise KeyboardInterrupt

    counted: list[int] = []
    with pytest.raises(KeyboardInterrupt), engine.attached():
        RefitPass(engine, selection, todo(), RefitRequest(rho=3.0), LayerFiles(tmp_path)).run(stop)
    assert len(list(tmp_path.glob("layer-*.json"))) == 2
    again = refitted(make_model("qwen2_moe"), selection, files=LayerFiles(tmp_path), rho=3.0)
    assert again.layers == whole.layers
    assert again.digest == whole.digest
    assert refitted(make_model("qwen2_moe"), selection, rho=3.0).digest == whole.digest
    assert refitted(make_model("qwen2_moe"), selection, rho=30.0).digest != whole.digest


def test_a_layer_that_would_not_generalise_takes_a_stronger_ridge_or_none(checkpoint) -> None:
    """Random tokens and few of them: what is reported never rises on the tokens that were kept out."""
    selection = random_selection(open_snapshot(checkpoint("qwen3_moe")), "reroute", "ragged")
    result = refitted(make_model("qwen3_moe"), selection, todo(6), rho=0.001)
    for said in result.layers:
        if said.rho is None:
            assert said.layer not in result.weights
            assert said.held_out_after == said.held_out_before
        else:
            assert said.rho in (0.001, 0.01, 0.1)
            assert said.held_out_after < said.held_out_before
    assert any(said.rho != 0.001 for said in result.layers)
    assert any("more examples" in line for line in result.lines())


@pytest.mark.parametrize("changes", [{"after": ("norm",)}, {"latent": ("down", "up")}, {"not_layered": "it is odd"}])
def test_families_that_are_not_linear_layer_by_layer_are_refused(checkpoint, monkeypatch, changes) -> None:
    selection = random_selection(open_snapshot(checkpoint("qwen3_moe")), "drop", "ragged")
    moe = live_moe_config(make_model("qwen3_moe"))
    odd = replace(moe, family=replace(moe.family, **changes))
    monkeypatch.setattr(layers_module, "live_moe_config", lambda _model: odd)
    with pytest.raises(UnsupportedModelError, match="A refit is not possible for qwen3_moe"):
        refitted(make_model("qwen3_moe"), selection)


def test_weights_of_another_selection_are_refused(checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint("qwen3_moe")), "drop", "ragged")
    model = make_model("qwen3_moe")
    weights = refitted(model, selection, rho=3.0).weights
    layer = next(iter(weights))
    cut = replace(selection, layers={**selection.layers, layer: selection.layers[layer][:-1]})
    with pytest.raises(UsageError, match="another model or selection"), shape_moe.masked(model, cut, weights=weights):
        pass


def test_bfloat16_weights_are_judged_as_they_are_stored(checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint("qwen3_moe")), "reroute", "ragged")
    model = make_model("qwen3_moe")
    result = refitted(model, selection, rho=3.0, stored=torch.bfloat16)
    assert all(found.weight.dtype == torch.bfloat16 for found in result.weights.values())
    said = result.layers[0]
    given = todo()
    with shape_moe.masked(model, selection, weights={said.layer: result.weights[said.layer]}):
        pruned = streams(model, given)[said.layer]
    missing = (streams(model, given)[said.layer] - pruned).double()
    squares = token_weights(given) * missing.square().sum(1) / lengths_before_blocks(model, given)[said.layer] ** 2
    out = torch.arange(len(squares)) % 10 == 9
    assert said.held_out_after == pytest.approx(float(squares[out].sum()), rel=1e-3)
