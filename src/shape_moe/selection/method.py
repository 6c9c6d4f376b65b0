"""A method: how experts are valued, how layers share the budget, how tokens are routed, and what it is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shape_moe.architectures.moe_config import GATE_SCALES, GateScale, MoeConfig, check_gate_scale
from shape_moe.errors import UsageError, one_of
from shape_moe.selection.rules import get_rule

Routing = Literal["drop", "reroute"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
TARGETS = ("ragged", "stock")
"""What a selection can be made for: any counts, or what a stock model can be (equal counts, rerouted)."""


@dataclass(frozen=True)
class Method:
    """One way to choose experts, at any keep rate.

    Its spelling, ``str(method)``, is ``shape/coverage, drop``, ``reap/uniform, reroute, stock`` or
    ``shape/coverage, reroute, trained``, wherever a method is shown or written as text; :meth:`parse` reads it.

    Attributes:
        scorer: how experts are valued.
        rule: how layers share the budget: ``coverage``, ``uniform`` or ``global``.
        routing: ``drop`` or ``reroute``.
        target: ``ragged``, or ``stock``, which a selection satisfies by equal counts in every layer and ``reroute``.
        gate_scale: ``survivors`` or ``trained``: how large gate weights are under ``reroute`` where routers do not
            renormalise them; see :data:`shape_moe.architectures.moe_config.GateScale`.
    """

    scorer: str = "shape"
    rule: str = "coverage"
    routing: Routing = "drop"
    target: str = "ragged"
    gate_scale: GateScale = "survivors"

    def __str__(self) -> str:
        unusual = {self.target: "ragged", self.gate_scale: "survivors"}
        return ", ".join((self.pair, self.routing, *(word for word, usual in unusual.items() if word != usual)))

    @property
    def routed(self) -> str:
        """How tokens are routed, as in the spelling: ``drop``, ``reroute`` or ``reroute, trained``."""
        return self.routing if self.gate_scale == "survivors" else f"{self.routing}, {self.gate_scale}"

    @property
    def pair(self) -> str:
        """Scorer and rule alone, as ``shape/coverage``."""
        return f"{self.scorer}/{self.rule}"

    @property
    def equal_counts(self) -> bool:
        """Whether every layer must keep the same number."""
        return self.target == "stock"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read a spelling; what it leaves out (the rule, all after a comma) is as usual.

        Raises:
            UsageError: for anything else, and for a rule, routing or target that does not exist.
        """
        pair, *words = (part.strip() for part in text.split(","))
        scorer, slash, rule = pair.partition("/")
        scale = check_gate_scale_name(words.pop()) if words and words[-1] in GATE_SCALES else cls.gate_scale
        target = words.pop() if words and words[-1] in TARGETS else cls.target
        routing = words.pop() if words else usual_routing(target, scale)
        if words or not scorer or (slash and not rule):
            raise UsageError(f"{text!r} is not a method; write SCORER/RULE, ROUTING, as shape/coverage, drop.")
        method = cls(scorer, rule or cls.rule, check_routing(routing), target, scale)
        method.check()
        return method

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Method:
        """Out of an object with the attributes' names as keys, whatever else it has.

        Raises:
            UsageError: for a routing or a gate scale that does not exist.
        """
        routing = check_routing(str(found["routing"]))
        scale = check_gate_scale_name(str(found.get("gate_scale") or cls.gate_scale))
        return cls(str(found["scorer"]), str(found["rule"]), routing, str(found.get("target") or cls.target), scale)

    def check(self) -> None:
        """Refuse what does not exist or does not go together; scorers are looked up when they are used.

        Raises:
            UsageError: naming what is wrong.
        """
        get_rule(self.rule)
        check_routing(self.routing)
        one_of(self.target, TARGETS, "Target")
        if self.equal_counts and self.routing != "reroute":
            raise UsageError("Target stock needs routing reroute: a stock model knows no dropped slots.")
        check_gate_scale_name(self.gate_scale)
        if self.gate_scale == "trained" and self.routing != "reroute":
            raise UsageError(
                "Gate scale trained goes with routing reroute: with drop the router is unchanged, and its weights are "
                "those that the model was trained with anyway."
            )
        if self.gate_scale == "trained" and self.equal_counts:
            raise UsageError(
                "Gate scale trained goes with target ragged: a stock model takes the softmax over the experts that it "
                "has."
            )


PUBLISHED = Method()
"""The method that SHAPE was published with."""
PUBLISHED_SAMPLES = 25
"""How many examples it was calibrated with."""


def check_routing(name: str) -> Routing:
    """A routing by its name.

    Raises:
        UsageError: for an unknown name.
    """
    return one_of(name, ROUTINGS, "Routing")


def check_gate_scale_name(name: str) -> GateScale:
    """A gate scale by its name.

    Raises:
        UsageError: for an unknown name.
    """
    return one_of(name, GATE_SCALES, "Gate scale")


def read_routed(text: str) -> tuple[Routing, GateScale]:
    """A routing with its gate scale, from the spelling of :attr:`Method.routed`.

    Raises:
        UsageError: for anything else.
    """
    name, comma, scale = (part.strip() for part in text.partition(","))
    method = Method(routing=check_routing(name), gate_scale=check_gate_scale_name(scale) if comma else "survivors")
    method.check()
    return method.routing, method.gate_scale


def check_for_model(method: Method, moe: MoeConfig) -> None:
    """Refuse what means nothing for a model.

    Raises:
        UsageError: for a gate scale that would change nothing there.
    """
    check_gate_scale(method.gate_scale, moe.family, moe.renormalises)


def gate_scales(moe: MoeConfig, routing: Routing, target: str) -> tuple[GateScale, ...]:
    """The gate scales that a selection of a model can have, the one to try first coming first.

    Args:
        moe: the model's routed experts.
        routing: ``drop`` or ``reroute``.
        target: ``ragged`` or ``stock``.
    """
    both = moe.has_gate_scale and routing == "reroute" and target == "ragged"
    return ("trained", "survivors") if both else ("survivors",)


def routing_for(target: str, name: str | None, scale: GateScale = "survivors") -> Routing:
    """The routing that is named, or what target and gate scale are routed by where none is.

    Raises:
        UsageError: for an unknown name.
    """
    return usual_routing(target, scale) if name is None else check_routing(name)


def usual_routing(target: str, scale: GateScale = "survivors") -> Routing:
    """What a target and a gate scale are routed by where nothing else is said."""
    return "reroute" if target == "stock" or scale == "trained" else "drop"
