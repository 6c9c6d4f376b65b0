"""Options that say how experts are valued and chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.values import parse_layers, parse_protect, share_option
from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.layer_curves import LayerCurves, load_curves
from shape_moe.selection.method import PUBLISHED, Method, check_gate_scale_name, routing_for
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.token_weights import token_weights

CHOICE_PANEL = "Choosing experts"
GATE_SCALE_HELP = (
    "How large the kept experts' gate weights are under reroute, in families that do not renormalise them. survivors: "
    "they grow by what was removed, as in any stock model (the default); trained: they keep the size that the model "
    "was trained with (target ragged)."
)


@dataclass
class WeightFlags:
    """What counts when experts are valued."""

    prompt_weight: Annotated[
        float | None,
        typer.Option(
            help="How much a prompt token counts. Default: as the scorer has it; 1 beside --response-weight.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    response_weight: Annotated[
        float | None,
        typer.Option(
            help="How much a response token counts. Default: as the scorer has it; 1 beside --prompt-weight.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    predicting_weight: Annotated[
        float | None,
        typer.Option(
            help="How much a token counts whose next token belongs to the response. Scorers contribution and "
            "replacement use 1, and 0.25 for all others; the published ones count all tokens alike.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    other_weight: Annotated[
        float | None,
        typer.Option(
            help="How much every other token counts; goes with --predicting-weight.", rich_help_panel=CHOICE_PANEL
        ),
    ] = None
    pool_classes: Annotated[
        bool,
        typer.Option(
            "--pool-classes",
            help="Add the classes of a mixed data set up, as published, instead of keeping each class's best experts.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = False

    def options(self, seed: int) -> ScoreOptions:
        """The scoring options that these flags describe."""
        weights = token_weights(
            {
                "prompt": self.prompt_weight,
                "response": self.response_weight,
                "predicting": self.predicting_weight,
                "other": self.other_weight,
            }
        )
        return ScoreOptions(weights, seed, pool_classes=self.pool_classes)


@dataclass
class ScoreFlags(WeightFlags):
    """How experts are valued."""

    scorer: Annotated[
        str | None,
        typer.Option(
            help="How experts are valued; shape-moe score --list explains them. Default: shape.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None

    @property
    def named(self) -> str:
        """The scorer, the published one where none is named."""
        return self.scorer or PUBLISHED.scorer


@dataclass
class SelectFlags:
    """How the budget is spent."""

    method: Annotated[
        str | None,
        typer.Option(
            metavar="SCORER/RULE, ROUTING",
            help="Scorer, rule, routing, target and gate scale in one, as results spell it: 'reap/uniform, reroute, "
            "stock'.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    rule: Annotated[
        str | None,
        typer.Option(
            help="How layers share the experts that are kept: coverage (the same share of value in each; the "
            "default), uniform (the same number), global (values compared across layers), measured (by what each "
            "layer's cut costs, see --curves).",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    routing: Annotated[
        str | None,
        typer.Option(
            help="What happens to tokens that the router sends to a removed expert. drop: the router is unchanged, "
            "and the expert's place stays empty; reroute: the router chooses among the kept experts. "
            "Default: drop; reroute for target stock.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    gate_scale: Annotated[
        str | None,
        typer.Option(
            help=GATE_SCALE_HELP,
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            help="ragged (each layer keeps as many experts as it needs; the default) or stock (the same number in "
            "every layer: loads in any tool).",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    curves: Annotated[
        Path | None,
        typer.Option(
            metavar="CURVES",
            help="Layer curves from shape-moe measure, for rule measured; prune makes them where they are left out.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        share_option(
            "--tolerance",
            "1%",
            help="Choose as the paper's search does, which stops this close to --keep, such as 1% or 0.01.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    skip_layers: Annotated[
        str | None,
        typer.Option(help="Layers that keep every expert, for example 0,1,47.", rich_help_panel=CHOICE_PANEL),
    ] = None
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Experts to keep whatever their value, written LAYER:EXPERT,EXPERT; can be repeated.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    multiple_of: Annotated[
        int,
        typer.Option(help="Every pruned layer keeps a multiple of this many experts.", rich_help_panel=CHOICE_PANEL),
    ] = 1
    allow_rounding: Annotated[
        bool,
        typer.Option(
            "--allow-rounding",
            help="Where --keep cannot be met, take the next smaller rate that can.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = False

    def spelled_out(self, score: ScoreFlags) -> tuple[SelectFlags, ScoreFlags]:
        """These flags and those of the scorer, with what ``--method`` says in their places.

        Raises:
            UsageError: for what is no method, and where one of its words is given by its own flag as well.
        """
        if self.method is None:
            return self, score
        own = {"--scorer", "--rule", "--routing", "--gate-scale", "--target"}
        twice = [name for name in (*changed_flags(score), *changed_flags(self)) if name in own]
        if twice:
            raise UsageError(f"--method says that already: leave {', '.join(twice)} out.")
        method = Method.parse(self.method)
        named = replace(
            self,
            method=None,
            rule=method.rule,
            routing=method.routing,
            target=method.target,
            gate_scale=method.gate_scale,
        )
        return named, replace(score, scorer=method.scorer)

    def options(self, keep: float, score: ScoreFlags, seed: int) -> SelectOptions:
        """The options that these flags describe; a method must be spelled out before."""
        target = self.target or "ragged"
        scale = check_gate_scale_name(self.gate_scale or "survivors")
        return SelectOptions(
            keep=keep,
            method=Method(
                score.named, self.rule or "coverage", routing_for(target, self.routing, scale), target, scale
            ),
            scoring=score.options(seed),
            tolerance=self.tolerance,
            skip_layers=parse_layers(self.skip_layers),
            protect=parse_protect(self.protect),
            multiple_of=self.multiple_of,
            allow_rounding=self.allow_rounding,
            curves=None if self.curves is None else self._curves(self.curves),
        )

    def _curves(self, file: Path) -> LayerCurves:
        if self.rule != "measured":
            raise UsageError("--curves goes with --rule measured.")
        return load_curves(file)
