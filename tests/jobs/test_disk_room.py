"""Whether the disk has room is decided by the share that is kept, before anything is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safetensors import safe_open

from shape_moe.errors import ShapeMoeError
from shape_moe.jobs import prune as job
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from support.selections import seven_of_eight


def test_what_is_kept_must_fit(embedded, tmp_path, monkeypatch) -> None:
    selection = seven_of_eight()
    sizes = {"experts": 0, "rest": 0}
    with safe_open(embedded / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dictionary
            tensor = tensors.get_tensor(name)
            sizes["experts" if ".experts." in name else "rest"] += tensor.numel() * tensor.element_size()
    needed = sizes["rest"] + sizes["experts"] * selection.keep + job._DISK_MARGIN
    free = {"bytes": int(needed) - 2}
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=0, free=free["bytes"]))
    options = PruneOptions(device="cpu", check_logits=False)
    with pytest.raises(ShapeMoeError, match="The pruned checkpoint needs about"):
        prune(embedded, tmp_path / "out", options, selection=selection)
    assert list(tmp_path.iterdir()) == []
    free["bytes"] = int(needed) + 2
    prune(embedded, tmp_path / "out", options, selection=selection)
    assert (tmp_path / "out" / "config.json").is_file()
