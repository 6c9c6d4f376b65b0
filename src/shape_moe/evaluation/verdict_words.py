"""What a verdict is told in: falls, tool calls, free answers and what decided, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from shape_moe.evaluation.falls import CALLS, Fall, FreeAnswers, Outcome
from shape_moe.units import capitalised, counted, kl_at_least, readable_kl, readable_share, share_at_most


def describe_fall(fall: Fall) -> str:
    """One class in a line."""
    dense, pruned = (readable_share(share) for share in fall.shares)
    name = f"{fall.name}: " if fall.name else ""
    text = f"{name}{fall.figure} {dense} -> {pruned}"
    if fall.fall.value < 0:
        text += f", a gain of {_points(-fall.fall.value)}"
    elif fall.fall.value > 0:
        text += f", a fall of {_points(fall.fall.value)}"
    else:
        text += ", no fall"
    high = share_at_most(max(fall.fall.high, 0.0)).removesuffix(" %")
    text += f" (at least {readable_share(fall.fall.low).removesuffix(' %')}, " if fall.fall.low > 0 else " ("
    shown = kl_at_least if fall.kl_is_bound else readable_kl
    kl = "" if fall.kl is None else f", KL {shown(fall.kl)}"
    return f"{text}at most {high}){kl}, {counted(fall.examples, 'example')}"


def describe_calls(outcome: Outcome) -> str:
    """What became of the tool calls of a class, dense beside pruned; empty where there are none."""
    words = {"decision": "right decision to call or not", "name": "right function", "arguments": "equal arguments"}
    words["valid"] = "arguments valid by the schema"
    calls = outcome.calls or {}
    parts = [
        f"{text} {calls[key].dense} -> {calls[key].pruned} of {calls[key].count}"
        for key, text in words.items()
        if key in calls and calls[key].count
    ]
    name = f"{outcome.name}: " if outcome.name else ""
    return f"{name}tool calls, dense -> pruned: {'; '.join(parts)}" if parts else ""


def describe_answers(answers: FreeAnswers) -> str:
    """Free answers in a line."""
    (loops_before, loops), (endless_before, endless) = answers.loops, answers.no_ends
    text = f"{counted(answers.count, 'free answer')}: {loops} {_verb(loops, 'end')} in a loop (dense {loops_before}), "
    text += f"{endless} {'does' if endless == 1 else 'do'} not end (dense {endless_before}); "
    if answers.median_divergence is None:
        return f"{text}all are the dense model's, token for token"
    same, after = answers.count - len(answers.divergences), counted(round(answers.median_divergence), "token")
    return f"{text}{same} {_are(same)} the dense model's, the others part after {after}"


def fallen(fall: Fall) -> str:
    """The fall that decided."""
    dense, pruned = (readable_share(share) for share in fall.shares)
    verb = "fall" if fall.figure == CALLS else "falls"
    text = f"{capitalised(fall.figure)}{in_class(fall.name)} {verb} from {dense} to {pruned} over "
    text += f"{counted(fall.examples, 'example')}: a loss of {readable_share(fall.fall.low)} at least, "
    return f"{text}{share_at_most(fall.fall.high)} at most."


def doubted(fall: Fall, *, less_probable: bool) -> str:
    """That a class may be damaged, and by what one sees it: how probable its answers are, or what was counted."""
    (dense, pruned), likely = (readable_share(share) for share in fall.shares), fall.likelihood
    counts, open_ = counted(fall.examples, "example"), f"a loss of up to {share_at_most(fall.fall.high)}"
    if likely is None or not less_probable:
        return (
            f"Class {fall.name} may be damaged: {fall.figure} falls from {dense} to {pruned} over {counts}, which are "
            f"too few to rule out chance; {open_} is not excluded."
        )
    before, after = (readable_share(share) for share in (likely.dense, likely.pruned))
    known = f", {likely.seen} of them calibrated with" if likely.seen else ""
    return (
        f"Class {fall.name} may be damaged: its right answers have a probability of {after} on average, with the dense "
        f"model {before} ({counted(likely.examples, 'example')}{known}). {capitalised(fall.figure)} over {counts}, "
        f"from {dense} to {pruned}, does not exclude {open_}."
    )


def silent(outcomes: Sequence[Outcome], fall: Fall) -> str:
    """That a model makes no calls any more, where that is so."""
    made = next((outcome.calls or {} for outcome in outcomes if outcome.name == fall.name), {}).get("made")
    return "It calls no tools any more. " if made is not None and made.dense > 0 == made.pruned else ""


def broken(answers: FreeAnswers) -> str:
    """What is wrong with free answers."""
    kinds = ((answers.loops, ("ends in a loop", "end in a loop")), (answers.no_ends, ("does not end", "do not end")))
    parts = [
        f"{after} of {answers.count} free answers {what[after > 1]} ({before} of the dense model's)"
        for (before, after), what in kinds
        if after > before
    ]
    return " and ".join(parts) or f"{answers.healthy.lost} of {answers.count} free answers loop or do not end"


def _verb(count: int, verb: str) -> str:
    return f"{verb}s" if count == 1 else verb


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    shown = readable_share(share).removesuffix(" %")
    return f"{shown} {'point' if shown == '1' else 'points'}"


def class_first(name: str) -> str:
    """A class before what is said of it; nothing where there are none."""
    return f"{name}: " if name else ""


def in_class(name: str) -> str:
    """In which class something is so; nothing where there are none."""
    return f" in {name}" if name else ""


def of_class(name: str) -> str:
    """Of which class something is; nothing where there are none."""
    return f" of {name}" if name else ""
