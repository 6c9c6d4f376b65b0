"""``shape-moe inspect``: what a model weighs, and what fits your memory."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from shape_moe.cli.console import plain_table
from shape_moe.cli.flags import MemoryFlags, ModelArgument, OutputFlags, RevisionFlag
from shape_moe.jobs.inspect import Inspection, inspect_model
from shape_moe.units import named_share, readable_share, readable_size

HELPS = {"fit": "Say with which precision and keep rate the model fits this memory (such as 24GiB), KV cache included."}


def inspect(
    model: ModelArgument,
    memory: MemoryFlags,
    hub: RevisionFlag,
    output: OutputFlags,
) -> int:
    """Show a model's MoE layers, bytes per expert and size at each keep rate; no weight is read.

    Example: shape-moe inspect Qwen/Qwen3-30B-A3B --fit 24GiB --context 16k --concurrency 8
    """
    talk = output.output()
    found = inspect_model(
        model,
        revision=hub.revision,
        fit=memory.size(),
        context=memory.tokens(),
        concurrency=memory.concurrency,
    )
    for note in found.snapshot.notes:
        talk.warn(note)
    talk.result(_document(found), lambda console: _show(console, found))
    return 0 if found.fits_somehow else 1


def _document(found: Inspection) -> dict[str, Any]:
    moe, size = found.snapshot.moe, found.size
    return {
        "model": found.snapshot.name,
        "family": moe.family.model_type,
        "layers": found.snapshot.moe_layers,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "gate_scale": moe.has_gate_scale,
        "quantisation": found.snapshot.quantisation.label if found.snapshot.quantisation else None,
        "bytes": size.total,
        "bytes_of_experts": size.experts,
        "bytes_per_expert": size.experts / size.num_experts,
        "bytes_at_keep": {str(keep): size_at for keep, size_at in found.sizes.items()},
        "device_bytes": found.device_bytes,
        "kv_cache_bytes": found.kv_bytes,
        "fits": [vars(fit) for fit in found.fits],
    }


def _show(console: Console, found: Inspection) -> None:
    moe, size, layers = found.snapshot.moe, found.size, found.snapshot.moe_layers
    dense = moe.num_layers - len(layers)
    console.print(f"[bold]{escape(found.snapshot.name)}[/bold]  {moe.family.model_type}")
    console.print(
        f"{len(layers)} MoE layers{f' and {dense} dense' if dense else ''}, {moe.num_experts} experts each, "
        f"{moe.top_k} per token; {readable_size(size.experts / size.num_experts)} per expert"
    )
    if moe.has_gate_scale:
        console.print(
            "Gate weights are not renormalised: with --routing reroute they grow by what is removed, unless "
            "--gate-scale trained keeps their size"
        )
    dtypes = ", ".join(f"{dtype} {readable_size(count)}" for dtype, count in size.dtypes.items())
    share = size.experts / size.total
    if (quantisation := found.snapshot.quantisation) is not None:
        why = f"; not dequantised here: {quantisation.label} {quantisation.refusal}" if quantisation.refusal else ""
        console.print(f"Quantised: {escape(quantisation.label + why)}")
    console.print(f"{readable_size(size.total)} on disk ({dtypes}), {readable_share(share)} of it routed experts")
    console.print()
    table = plain_table("keep", "weights", "saved")
    for keep, size_at in found.sizes.items():
        saved = size.total - size_at
        less = f"{readable_size(saved)} ({readable_share(saved / size.total)})" if saved else "nothing"
        table.add_row(named_share(keep), readable_size(size_at), less)
    console.print(table)
    if found.fits:
        _show_fits(console, found)


def _show_fits(console: Console, found: Inspection) -> None:
    assert found.device_bytes is not None
    assert found.kv_bytes is not None
    console.print()
    device, cache = readable_size(found.device_bytes), readable_size(found.kv_bytes)
    console.print(f"Within {device}, of which a tenth is left to the runtime and {cache} to the KV cache:")
    table = plain_table("precision", "dense weights", "dense fits", "largest keep", "weights then")
    for fit in found.fits:
        keep = "none" if fit.keep is None else named_share(int(fit.keep * 1000) / 1000)  # rounded down: it has to fit
        then = "" if fit.weights_bytes is None else readable_size(fit.weights_bytes)
        table.add_row(fit.precision, readable_size(fit.dense_bytes), "yes" if fit.dense_fits else "no", keep, then)
    console.print(table)
    whole = [fit.precision for fit in found.fits if fit.dense_fits]
    if "as stored" in whole:
        console.print("The model fits as it is: there is no need to prune it.")
    elif whole:
        console.print(
            f"The unpruned model already fits at {whole[0]}: compare that with pruning before you decide "
            "(estimated from weight counts; the quantised model must exist or be made)."
        )
    elif not found.fits_somehow:
        console.print(
            "It does not fit at any precision or keep rate: lower --context or --concurrency, or use a larger device."
        )
