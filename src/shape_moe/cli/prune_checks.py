"""Which flags of ``shape-moe prune`` go together, and what is left to the tool where nothing is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shape_moe.cli.choice_flags import ScoreFlags, SelectFlags
from shape_moe.cli.data_flags import DataFlags, KeepAlsoFlag
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.quality_flags import HeldOutFlags
from shape_moe.errors import UsageError
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs.select import AUTO
from shape_moe.selection.rules import budget_for
from shape_moe.selection.selection import Selection


def is_automatic(preset: str | None, select: SelectFlags, score: ScoreFlags, limit: Limit | None) -> bool:
    """Whether the method is left to the tool: nothing names one."""
    if score.scorer is not None:
        return score.scorer == AUTO
    return limit is None and preset is None and not (select.rule or select.tolerance or select.curves)


def check_rate_options(rates: Sequence[float], fit: str | None, selection: Path | None, limit: Limit | None) -> None:
    """Refuse a rate that is none, and more or less than one way to say how much is kept."""
    options = {"--keep": rates, "--fit": fit, "--selection": selection, "--max-kl or --max-drop": limit}
    given = [option for option, value in options.items() if value]
    for rate in rates:
        budget_for(rate, 1)  # a rate that is none is refused before anything else is said
    if not given:
        raise UsageError(
            "No keep rate is safe for every model: give --keep (such as 0.8), --fit (such as 24GiB), or a limit "
            "(--max-drop 1%) that finds one."
        )
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give one of them.")


def check_target(target: str | None, selection: Selection) -> None:
    """Refuse a target that a selection was not made for."""
    if target is not None and target != selection.target:
        raise UsageError(f"The selection was made for target {selection.target}; select again with --target {target}.")


def refuse_ignored(
    data: DataFlags,
    general: KeepAlsoFlag,
    select: SelectFlags,
    score: ScoreFlags,
    judged_by: HeldOutFlags,
    trace: Path | None,
    selection: Path | None,
    *,
    chooses: bool,
    judge: bool,
) -> None:
    """Refuse options that would change nothing, because a trace or a selection has decided already.

    With a trace and candidates to judge (``chooses``), the data options say where held-out examples come from; where
    the result is judged (``judge``), which examples it is judged by.
    """
    if trace is not None and selection is not None:
        raise UsageError("--trace and --selection exclude each other; give one of them.")
    if trace is None and selection is None:
        return
    if general.keep_also:
        raise UsageError("--keep-also has no effect on a finished trace or selection: give it to shape-moe trace.")
    if chooses and selection is None:
        data.refuse_unread(judged_by.held_out)
        return
    decided = "--selection" if selection is not None else "--trace"
    ignored = [] if data.data and judge else changed_flags(data)
    if selection is not None:
        ignored += changed_flags(score) + [name for name in changed_flags(select) if name != "--target"]
    if ignored:
        raise UsageError(f"{decided} has decided that already: leave {', '.join(ignored)} out.")
