"""One pruned model, written into its folder: weights, model card, artifacts and manifest, checked as it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shape_moe.jobs.closing import card_facts
from shape_moe.jobs.judgement import Judgement
from shape_moe.jobs.prune_run import PruneRun
from shape_moe.jobs.sliced_imatrix import write_sliced
from shape_moe.pruning.canary import Canary, CanaryResult
from shape_moe.pruning.logits import check_logits
from shape_moe.reporting.model_card import CardFacts, write_card
from shape_moe.reporting.series import Series
from shape_moe.selection.selection import Selection
from shape_moe.serving.manifest import write_manifest
from shape_moe.workspace import write_json


@dataclass(frozen=True)
class PrunedModel:
    """What is known of a pruned model before it is written.

    Attributes:
        selection: what it keeps.
        judgement: what pruning did to it, None where it was not judged.
        canary: what the masked original answers, None where it could not be asked.
        logits_skipped: why it was not asked.
        left_out: what the original has and it has not, beside experts; sentences.
        file: the GGUF file that it will be, None for a folder.
    """

    selection: Selection
    judgement: Judgement | None
    canary: Canary | None
    logits_skipped: str | None
    left_out: tuple[str, ...] = ()
    file: Path | None = None

    def facts(self, run: PruneRun, size: int, series: Series | None = None) -> CardFacts:
        """What its card tells.

        Args:
            run: the job.
            size: bytes of its tensors.
            series: the models that were made together with it.
        """
        sizes = (run.snapshot.total_bytes, size)
        name = run.snapshot.name
        return card_facts(name, sizes, self.selection, run.trace, self.left_out, self.judgement, self.file, series)

    def rejected(self, run: PruneRun) -> bool:
        """Whether it is not as good as it was required to be."""
        required = run.options.judgement.require if run.options.judgement is not None else None
        judgement = self.judgement
        return required is not None and judgement is not None and not judgement.verdict.satisfies(required)


def write_weights(run: PruneRun, made: PrunedModel, folder: Path) -> tuple[int, dict[str, str], CanaryResult | None]:
    """Write the weights and compare their answers with the masked original's.

    Returns:
        Bytes of its tensors, known hashes of its files, and the comparison, None where there was none.

    Raises:
        ShapeMoeError: when a file cannot be written, or differs from what it should be.
    """
    artifacts = folder / "shape"
    artifacts.mkdir(parents=True, exist_ok=True)
    made.selection.save(artifacts / "selection.json")
    written = run.writer.write(run.snapshot, made.selection, folder, run.progress)
    logits = None
    if made.canary is not None:
        made.canary.save(artifacts / "canary.json")
        logits = check_logits(made.canary, written.path, run.options.device, run.options.dtype, run.progress)
    return written.size, written.hashes, logits


def describe(run: PruneRun, made: PrunedModel, folder: Path, facts: CardFacts, hashes: dict[str, str]) -> None:
    """Write what lies beside the weights: card, judgement, imatrix, and the manifest over all of it."""
    if run.imatrix is not None:
        write_sliced(run.imatrix, run.snapshot, made.selection, folder if made.file is not None else folder / "shape")
    write_card(folder, facts)
    if made.judgement is not None:
        write_json(folder / "shape" / "judgement.json", made.judgement.to_document())
    write_manifest(folder, run.snapshot, run.target, hashes, canary_missing=made.logits_skipped)
