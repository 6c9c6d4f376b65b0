"""The published selections, made again from the published values: a few seconds on any laptop.

The authors of SHAPE publish their values for Qwen3-30B-A3B and three tasks, and the experts that they kept at keep
rates 0.8 and 0.6 (their repository has no licence, so nothing of it is copied here). This script reads both, selects
from the values with rule ``coverage`` and the tolerance of the paper's search, and says for every layer of every
published selection whether the same experts are kept.

    python examples/paper/selections.py                     # fetches nine small files at a pinned commit
    python examples/paper/selections.py path/to/a/clone     # or reads a clone of their repository

What is fetched is checked against hashes in this file, read, and thrown away.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shape_moe.errors import ShapeMoeError
from shape_moe.interop.selected_experts import read_selected
from shape_moe.scoring.scores import read_scores
from shape_moe.selection.select import SelectOptions, select_from_scores

REPOSITORY, COMMIT = "Alizen-1009/Shapley-Moe", "46ff4a16a3b6018d5f118247c3fa75f611648875"
MODEL = "results/qwen3-30b-a3b"
TASKS, KEEP_RATES = ("gsm8k", "humaneval", "med_mcqa"), (0.8, 0.6)
TOLERANCE = 0.01
"""How close to the keep rate the published search stops."""
SHA256 = {
    "gsm8k": "cdee10dd4182bbb32355095c9633ba66579f00abb5d8ad45de9bfb24e0529375",
    "gsm8k 0.8": "8732f5eb57a1b745a59f6557d8b33eea93c7d916525c05b4bc713c023a66eea7",
    "gsm8k 0.6": "c25056d0d560c0b84e5fc6aac81070e5b395ced009a47b19582c038e28ba62c2",
    "humaneval": "f28a2d34255649410b46984ca142d350c4ea5e9e2a8767f8f2fb3eed7855e0a8",
    "humaneval 0.8": "e1daca28a93dc677012fa0687023d601515641c5beadce91ccd3301d5582a16b",
    "humaneval 0.6": "e080c9f6e8f517bd08f6420eedc94f928c83a85a22244b515d8eb9c0ae7e23fd",
    "med_mcqa": "e487a9730f5250e6c1d4c18ce29f6a5ad9757cb17cc3ae1c0ed70f32be3176b9",
    "med_mcqa 0.8": "20d45bf6d4b48c353a21df8de2f8e35d6b7f4dfcfffb2f0672a6a114f7fbd255",
    "med_mcqa 0.6": "9ae85eb11eca3820054fa57ded6a960851df776c7ece26432cbc1f1ba35939c1",
}
"""Of the published files at :data:`COMMIT`."""


@dataclass(frozen=True)
class Compared:
    """One published selection beside ours.

    Attributes:
        task: what was calibrated on.
        keep: the keep rate asked for.
        published: experts that they keep.
        ours: experts that we keep.
        different: layers that do not keep the same experts.
    """

    task: str
    keep: float
    published: int
    ours: int
    different: tuple[int, ...]


def main(arguments: list[str] | None = None) -> int:
    """Compare all published selections; 0 when every one is ours."""
    parser = argparse.ArgumentParser(description="Make the published selections again from the published values.")
    parser.add_argument("folder", nargs="?", type=Path, help="a clone of the repository, or a folder of its files")
    folder = parser.parse_args(arguments).folder
    try:
        if folder is not None:
            return report(list(compare(folder)), str(folder))
        with tempfile.TemporaryDirectory() as temporary:
            fetch(Path(temporary))
            return report(list(compare(Path(temporary))), f"{REPOSITORY} at {COMMIT[:12]}")
    except (ShapeMoeError, OSError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1


def fetch(folder: Path) -> None:
    """Get the published files, and check that they are those that this script knows.

    Raises:
        OSError: when they cannot be had, or are others.
    """
    for task in TASKS:
        for keep in (None, *KEEP_RATES):
            name, place = (task if keep is None else f"{task} {keep}"), _published(task, keep)
            address = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/{place}"
            with urllib.request.urlopen(address, timeout=60) as reply:  # an address of https
                content = reply.read()
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise OSError(f"{address} is not the published file: its sha256 is another.")
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def compare(folder: Path) -> Iterator[Compared]:
    """Ours beside every published selection of a folder, task by task.

    Raises:
        OSError: when the folder holds none of them.
        ShapeMoeError: when a file is damaged.
    """
    found = [(task, keep) for task in TASKS for keep in KEEP_RATES if _places(folder, task, keep) is not None]
    if not found:
        raise OSError(f"{folder} holds no published values with their selections.")
    for task, keep in found:
        places = _places(folder, task, keep)
        assert places is not None
        published = read_selected(places[1])
        ours = select_from_scores(read_scores(places[0]), SelectOptions(keep, tolerance=TOLERANCE))
        layers = sorted(published.layers.keys() | ours.layers.keys())
        different = tuple(layer for layer in layers if published.layers.get(layer) != ours.layers.get(layer))
        yield Compared(task, keep, published.kept, ours.kept, different)


def report(rows: list[Compared], source: str) -> int:
    """Print what was found; 0 when everything is equal."""
    print(f"Qwen3-30B-A3B, values and selections of {source}; rule coverage, tolerance {TOLERANCE:g}")
    for row in rows:
        told = "the same experts in every layer"
        if row.different:
            told = f"{len(row.different)} layers differ: {', '.join(map(str, row.different))}"
        print(f"  {row.task:9} keep {row.keep:g}: published {row.published:,} experts, ours {row.ours:,}; {told}")
    equal = sum(not row.different for row in rows)
    print(f"{equal} of {len(rows)} published selections are ours, expert for expert.")
    return int(equal != len(rows))


def _published(task: str, keep: float | None) -> str:
    """Where the repository has a task's values, or its selection at a keep rate."""
    if keep is None:
        return f"{MODEL}/shapley_values/{task}_25_shapley.csv"
    rate = str(keep).replace(".", "_")
    return f"{MODEL}/selected_experts/shapley_alpha_per_layer_{task}_25_rate{rate}.json"


def _places(folder: Path, task: str, keep: float) -> tuple[Path, Path] | None:
    """Values and selection in a clone, or under short names in a flat folder; None where one is missing."""
    for values, chosen in (
        (_published(task, None), _published(task, keep)),
        (f"{task}_shapley_values.csv", f"{task}_selected_experts_keep{keep}.json"),
    ):
        if (folder / values).is_file() and (folder / chosen).is_file():
            return folder / values, folder / chosen
    return None


if __name__ == "__main__":
    raise SystemExit(main())
