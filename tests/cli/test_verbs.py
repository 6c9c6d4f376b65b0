"""The command as a user types it: results on stdout, the rest on stderr, exit codes, one sentence per mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from support.cli import refused
from support.data import write_lines

VERBS = ("inspect", "trace", "convert", "merge", "score", "select", "sweep", "prune", "serve", "verify", "evaluate")
VERBS += ("presets", "experiment", "report", "demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 30, seed=1)))


@pytest.fixture(scope="module")
def traced(embedded, data, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("trace") / "t")
    assert run(["trace", str(embedded), "--data", data, "-o", folder, "-q", "--device", "cpu"]) == 0
    return folder


def as_json(result: tuple[int, str, str]) -> dict:
    code, out, _ = result
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(call, verb) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert f"Example: shape-moe {verb}" in " ".join(out.split())


def test_version_and_bare_command(call) -> None:
    assert call("--version")[1].startswith("shape-moe 0.")
    code, out, err = call()
    assert "prune" in out + err
    assert code == 2


def test_inspect(call, embedded) -> None:
    found = as_json(call("inspect", embedded, "--fit", "5MiB", "--context", "256", "--json"))
    assert (found["layers"], found["num_experts"], found["top_k"]) == ([0, 1, 2, 3], 32, 4)
    assert found["bytes_at_keep"]["1.0"] == found["bytes"]
    stored, _, fp8, _ = found["fits"]
    assert not stored["dense_fits"]
    assert 0 < stored["keep"] < 1
    assert fp8["dense_fits"]
    assert stored["weights_bytes"] + found["kv_cache_bytes"] <= 0.9 * found["device_bytes"]
    code, out, err = call("inspect", embedded, "--fit", "5MiB", "--context", "256")
    assert code == 0
    assert err == ""
    assert "The unpruned model already fits at fp8" in " ".join(out.split())
    assert "no need to prune" in call("inspect", embedded, "--fit", "1GiB")[1]
    code, out, _ = call("inspect", embedded, "--fit", "1MiB", "--context", "1k")
    assert code == 1
    assert "It does not fit at any precision or keep rate" in " ".join(out.split())


def test_the_chain_of_verbs(call, embedded, data, traced, tmp_path) -> None:
    """trace, merge, score, select, prune and verify hand over to each other."""
    second = tmp_path / "second"
    found = as_json(call("trace", embedded, "--data", data, "--samples", 5, "-o", second, "--json", "-q"))
    assert found["examples"] == 5
    merged = as_json(call("merge", traced, second, "--weight", "1", "--weight", "2", "-o", tmp_path / "both", "--json"))
    assert merged["examples"] == 35
    values = tmp_path / "values.csv"
    code, out, err = call("score", tmp_path / "both", "--csv", values)
    assert code == 0
    assert "best experts" in out
    assert f"Wrote {values}" in err
    by_trace = as_json(call("select", tmp_path / "both", "--keep", "0.6", "-o", tmp_path / "s.json", "--json"))
    by_table = as_json(call("select", values, "--keep", "0.6", "--json"))
    assert by_trace["layers"] == by_table["layers"]
    assert sum(len(ids) for ids in by_trace["layers"].values()) == 77
    assert by_trace["stability"]["agreement"] > 0.5
    pruned = as_json(
        call("prune", embedded, "--selection", tmp_path / "s.json", "-o", tmp_path / "out", "--json", "-q")
    )
    assert pruned["kept"] == 77
    assert pruned["logits"]["mean_kl"] < 1e-9
    code, out, _ = call("verify", tmp_path / "out", "--original", embedded)
    assert code == 0
    assert out.count("ok ") == 6
    assert as_json(call("verify", tmp_path / "out", "--json", "-q"))["passed"] is True
    with (tmp_path / "out" / "config.json").open("a") as stream:
        stream.write(" ")
    code, out, _ = call("verify", tmp_path / "out", "-q")
    assert code == 1
    assert "FAILED" in out


def test_report(call, embedded, traced, tmp_path) -> None:
    call("select", traced, "--keep", "0.6", "-o", tmp_path / "s.json", "-q")
    base = ("report", traced, "--selection", tmp_path / "s.json", "--model", embedded, "-o", tmp_path / "r.html")
    found = as_json(call(*base, "--json"))
    assert found == {
        "report": str(tmp_path / "r.html"),
        "sections": ["layers", "values", "agreement", "coverage", "coalitions", "provenance"],
        "bytes": (tmp_path / "r.html").stat().st_size,
    }
    refused(call(*base), 2, "exists", "--force")
    code, out, err = call(*base, "--force")
    assert code == 0
    assert "MiB: layers, values" in out
    assert "Writing the report" in err
    refused(call("report", tmp_path / "nothing", "-o", tmp_path / "x.html"), 2, "There is no folder or file")
    refused(call("report", traced, "--sweep", tmp_path, "-o", tmp_path / "x.html"), 1, "sweep.json is missing")
    assert not (tmp_path / "x.html").exists()


def test_prune_in_one_go(call, embedded, data, tmp_path) -> None:
    code, out, err = call(
        "prune", embedded, "--data", data, "--keep", "0.8", "--preset", "paper", "-o", tmp_path / "out"
    )
    assert code == 0
    text = " ".join(out.split())
    assert "Method: shape/coverage, drop, ragged, 25 calibration examples (the published SHAPE method)." in text
    assert "(4 layers of 32 experts): 19 % smaller, from 6.47 MiB to " in text
    assert "102 of 128 experts kept." in text
    assert out.splitlines()[-1] == f"  shape-moe report {tmp_path / 'out'} -o report.html"
    assert "Two halves of the data agree on" in text
    assert "Every tensor equals its slice of the original" in text
    assert "Logits equal those of the masked original" in text
    assert "--target stock" in text
    assert "Tracing" in err
    trace = json.loads((tmp_path / "out" / "shape" / "trace" / "trace.json").read_text())
    assert trace["examples"] == 25  # the published method's number


def test_fit_chooses_the_keep_rate(call, embedded, traced, tmp_path) -> None:
    found = as_json(
        call("prune", embedded, "--trace", traced, "--fit", "5MiB", "--context", 256, "-o", tmp_path / "o", "--json")
    )
    size = sum(f.stat().st_size for f in (tmp_path / "o").glob("*.safetensors"))
    assert 0.55 < found["keep"] < 0.75
    assert size < 0.9 * 5 * 2**20
    refused(
        call("prune", embedded, "--trace", traced, "--fit", "100KiB", "-o", tmp_path / "p"),
        2,
        "No keep rate fits",
        "--context",
    )


def test_stock_target_and_rounding(call, embedded, traced, tmp_path) -> None:
    stock = ("prune", embedded, "--trace", traced, "--target", "stock", "-o", tmp_path / "out", "-q")
    refused(
        call(*stock, "--keep", "0.6"),
        2,
        "equal counts in every layer",
        "76 (0.5938) and 80 (0.6250)",
        "--allow-rounding",
    )
    code, out, _ = call(*stock, "--keep", "0.6", "--allow-rounding")
    assert code == 0
    assert "Loads in any tool that loads the original" in out
    refused(
        call(*stock[:-3], "-o", tmp_path / "b", "--keep", "0.5", "--routing", "drop"), 2, "stock needs routing reroute"
    )


def test_options_reach_the_selection(call, traced) -> None:
    found = as_json(
        call(
            *("select", traced, "--keep", "0.5", "--json", "--scorer", "contribution", "--rule", "global"),
            *(
                "--routing",
                "reroute",
                "--protect",
                "1:3,5",
                "--protect",
                "2:0",
                "--skip-layers",
                "3",
                "--multiple-of",
                "4",
            ),
            *("--prompt-weight", "0.1", "--response-weight", "2"),
        )
    )
    assert (found["scorer"], found["rule"], found["routing"]) == ("contribution", "global", "reroute")
    assert {3, 5} <= set(found["layers"]["1"])
    assert 0 in found["layers"]["2"]
    assert len(found["layers"]["3"]) == 32
    assert all(len(ids) % 4 == 0 for ids in found["layers"].values())
    assert found["options"] == {"prompt": 0.1, "response": 2.0, "seed": 0}
    assert sum(len(ids) for ids in found["layers"].values()) == 64


def test_a_method_is_typed_as_results_spell_it(call, embedded, traced, tmp_path) -> None:
    select = ("select", traced, "--keep", "0.5", "--json")
    spelled = as_json(call(*select, "--method", "reap/uniform, reroute, stock"))
    words = ("--scorer", "reap", "--rule", "uniform", "--routing", "reroute", "--target", "stock")
    assert spelled == as_json(call(*select, *words))
    method = ("--method", "reap/uniform")
    refused(call(*select, *method, "--rule", "global"), 2, "--method says that already: leave --rule out")
    refused(call(*select, "--method", "reap/"), 2, "'reap/' is not a method")
    sweep = ("sweep", embedded, "--trace", traced, *method)
    refused(call(*sweep, "--scorer", "shape"), 2, "--method says that already: leave --scorer out")
    call("select", traced, "--keep", "0.6", "-o", tmp_path / "s.json", "-q")
    prune = ("prune", embedded, "-o", tmp_path / "out", "--selection", tmp_path / "s.json")
    refused(call(*prune, *method), 2, "leave --method out")


def test_scorers_are_listed(call) -> None:
    code, out, _ = call("score", "--list")
    assert code == 0
    assert all(name in out for name in ("shape", "contribution", "reap", "easy-ep", "random"))
    assert "reap" in as_json(call("score", "--list", "--json"))


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_keep_rates(call, embedded, traced, tmp_path) -> None:
    base = ("prune", embedded, "--trace", traced, "-o", tmp_path / "out")
    for keep in ("0", "1.5", "-1"):
        refused(call(*base, "--keep", keep), 2, "above 0 and at most 1")
    refused(call(*base), 2, "No keep rate is safe for every model: give --keep")
    for keep in ("much", "nan"):
        refused(call(*base, "--keep", keep), 2, "--keep takes a share")
    refused(call("select", traced, "--keep", "0"), 2, "above 0 and at most 1")
    refused(call("select", traced, "--keep", "0.02", "--routing", "reroute"), 2, "floor of 4 experts per layer")
    assert list(tmp_path.iterdir()) == []


def test_contradictions(call, embedded, traced, data, tmp_path) -> None:
    base = ("prune", embedded, "-o", tmp_path / "out", "--keep", "0.6")
    refused(call(*base), 2, "Calibration data is missing: give --data")
    refused(
        call(*base, "--trace", traced, "--data", data, "--no-judge", "--scorer", "shape"),
        2,
        "already: leave --data out",
    )
    refused(call(*base, "--trace", traced, "--map", "prompt=q", "--no-template"), 2, "leave --map, --no-template out")
    refused(call(*base, "--trace", traced, "--fit", "1GiB"), 2, "--keep and --fit exclude each other")
    call("select", traced, "--keep", "0.6", "-o", tmp_path / "s.json", "-q")
    selection = ("prune", embedded, "-o", tmp_path / "out", "--selection", tmp_path / "s.json")
    refused(call(*selection, "--keep", "0.6"), 2, "exclude each other")
    refused(call(*selection, "--scorer", "reap", "--rule", "global"), 2, "leave --scorer, --rule out")
    refused(call(*selection, "--trace", traced), 2, "exclude each other")
    refused(call(*base, "--trace", traced, "--preset", "best"), 2, "no preset 'best'")
    for job in (("select", traced, "--keep", "0.6", "-o"), ("score", traced, "--csv")):
        refused(call(*job, tmp_path / "s.json"), 2, "exists; choose another output, or replace it with --force")
        refused(call(*job, tmp_path, "--force"), 2, "is a folder; choose a file")
        refused(call(*job, tmp_path / "none" / "s"), 2, "There is no folder", "make it")
    assert call("select", traced, "--keep", "0.5", "-o", tmp_path / "s.json", "-q", "--force")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["keep_asked"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_values_that_cannot_be_read(call, embedded, traced, data, tmp_path) -> None:
    refused(call("inspect", embedded, "--fit", "huge"), 2, "'huge' is not a size; write something like 24GiB")
    refused(call("inspect", embedded, "--fit", "1GiB", "--context", "long"), 2, "not a number of tokens")
    for verb in (
        ("inspect", embedded),
        ("sweep", embedded, "--data", "x"),
        ("prune", embedded, "--keep", "0.5", "-o", "o"),
    ):
        refused(call(*verb, "--context", "1k", "--concurrency", 2), 2, "--context and --concurrency count with --fit")
    refused(call("select", traced, "--keep", "0.6", "--protect", "abc"), 2, "LAYER:EXPERT,EXPERT")
    refused(call("select", traced, "--keep", "0.6", "--skip-layers", "x"), 2, "layer indices")
    refused(call("select", traced, "--keep", "0.6", "--skip-layers", "9"), 2, "Layer 9 is not an MoE layer")
    refused(
        call("select", traced, "--keep", "0.6", "--rule", "best"), 2, "there are coverage, global, measured, uniform"
    )
    refused(call("select", traced, "--keep", "0.6", "--scorer", "best"), 2, "no scorer 'best'")
    refused(call("select", traced, "--keep", "0.6", "--routing", "maybe"), 2, "drop or reroute")
    refused(call("select", traced, "--keep", "0.6", "--target", "round"), 2, "ragged or stock")
    refused(call("select", traced, "--keep", "0.6", "--prompt-weight", "-1"), 2, "must not be negative")
    base = ("trace", embedded, "--data", data, "-o", tmp_path / "t")
    refused(call(*base, "--map", "prompt"), 2, "--map takes NAME=VALUE")
    refused(call(*base, "--samples", "0"), 2, "samples must be at least 1")
    refused(call(*base, "--batch-size", "0"), 2, "batch-size must be at least 1")
    refused(call("frobnicate"), 2, "No such command 'frobnicate'")
    refused(call("demo", "--task", "cooking"), 2, "no task 'cooking'; there are addition")


def test_models_that_cannot_be_used(call, embedded, data, tmp_path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "llama")
    job = ("--data", data, "--keep", "0.6", "-o", tmp_path / "out")
    refused(call("prune", tmp_path / "llama", *job), 1, "This model (llama) has no experts")
    refused(call("inspect", tmp_path / "llama"), 1, "This model (llama) has no experts")
    refused(call("prune", tmp_path / "nowhere", *job), 1, "There is no model folder")
    dense = shutil.copytree(embedded, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_local_experts": 0}))
    refused(call("prune", dense, *job), 1, "This model has no experts")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints(call, embedded, data, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(embedded).save_pretrained(tmp_path / "m", max_shard_size="2MB")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "m")
    job = ("prune", tmp_path / "m", "--data", data, "--keep", "0.6", "-o", tmp_path / "out")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(call(*job), 1, shard.name, "truncated or damaged; download or copy it again")
    shard.unlink()
    refused(call(*job), 1, shard.name, "is missing")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_nan_weights(call, embedded, data, tmp_path) -> None:
    model = shutil.copytree(embedded, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(call("trace", model, "--data", data, "-o", tmp_path / "t", "-q"), 1, "Layer 1", "not finite", "NaN")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_traces_of_other_models(call, embedded, traced, tmp_path) -> None:
    model = shutil.copytree(embedded, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][0, 0] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = ("prune", model, "--trace", traced, "--keep", "0.6", "-o", tmp_path / "out")
    refused(call(*job), 1, "was made from another model: its routers differ", "Trace this model anew")
    refused(call(*job, "--force"), 1, "was made from another model")


def test_malformed_data(call, embedded, tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    job = ("trace", embedded, "--data", file, "-o", tmp_path / "t")
    file.write_text('{"text": "a"}\n{"question": "b"}\n')
    refused(call(*job), 1, f"{file}, line 2", "needs one of the fields text, prompt, messages", "--map prompt=question")
    file.write_text("")
    refused(call(*job), 1, "holds no records")
    refused(call("trace", embedded, "--data", tmp_path / "x.jsonl", "-o", tmp_path / "t"), 1, "There is no file")
    assert not (tmp_path / "t").exists()


def test_outputs_in_the_way(call, embedded, traced, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refused(
        call("prune", embedded, "--trace", traced, "--keep", "0.6", "-o", tmp_path / "out"), 2, "not empty", "--force"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    refused(call("verify", tmp_path / "out"), 1, "not a checkpoint written by shape-moe")
    refused(call("select", tmp_path / "out", "--keep", "0.6"), 1, "is not a trace")


def test_full_disk(call, embedded, traced, tmp_path, monkeypatch) -> None:
    import errno

    from shape_moe.pruning import checkpoint

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "copy_file_range", full)
    job = ("prune", embedded, "--trace", traced, "--keep", "0.6", "-o", tmp_path / "out", "-q")
    refused(call(*job), 1, "is full", "run the same command again")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert call(*job)[0] == 0


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "shape_moe", "select", "none", "--keep", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "above 0 and at most 1" in result.stderr


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch) -> None:
    from shape_moe.cli import inspect

    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(inspect, "inspect_model", broken)
    with pytest.raises(ZeroDivisionError):
        run(["inspect", "x"])


def test_out_of_memory_is_one_sentence(call, monkeypatch) -> None:
    from shape_moe.cli import inspect

    def broken(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(inspect, "inspect_model", broken)
    refused(call("inspect", "x"), 1, "ran out of memory; lower --batch-size")
