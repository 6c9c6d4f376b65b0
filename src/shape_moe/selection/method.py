"""A method: how experts are valued, how layers share the budget, how tokens are routed, and what it is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shape_moe.errors import UsageError
from shape_moe.selection.rules import get_rule

Routing = Literal["drop", "reroute"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
TARGETS = ("ragged", "stock")
"""What a selection can be made for: any counts, or what a stock model can be (equal counts, rerouted)."""


@dataclass(frozen=True)
class Method:
    """One way to choose experts, at any keep rate.

    Its spelling, ``str(method)``, is ``shape/coverage, drop`` or ``reap/uniform, reroute, stock``, wherever a method
    is shown or written as text; :meth:`parse` reads it.

    Attributes:
        scorer: how experts are valued.
        rule: how layers share the budget: ``coverage``, ``uniform`` or ``global``.
        routing: ``drop`` or ``reroute``.
        target: ``ragged``, or ``stock``, which a selection satisfies by equal counts in every layer and ``reroute``.
    """

    scorer: str = "shape"
    rule: str = "coverage"
    routing: Routing = "drop"
    target: str = "ragged"

    def __str__(self) -> str:
        return f"{self.pair}, {self.routing}" + (f", {self.target}" if self.target != "ragged" else "")

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
        target = words.pop() if words and words[-1] in TARGETS else cls.target
        routing = words.pop() if words else usual_routing(target)
        if words or not scorer or (slash and not rule):
            raise UsageError(f"{text!r} is not a method; write SCORER/RULE, ROUTING, as shape/coverage, drop.")
        method = cls(scorer, rule or cls.rule, check_routing(routing), target)
        method.check()
        return method

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Method:
        """Out of an object with the attributes' names as keys, whatever else it has.

        Raises:
            UsageError: for a routing that does not exist.
        """
        routing = check_routing(str(found["routing"]))
        return cls(str(found["scorer"]), str(found["rule"]), routing, str(found.get("target") or cls.target))

    def check(self) -> None:
        """Refuse what does not exist or does not go together; scorers are looked up when they are used.

        Raises:
            UsageError: naming what is wrong.
        """
        get_rule(self.rule)
        check_routing(self.routing)
        if self.target not in TARGETS:
            raise UsageError(f"Target must be {' or '.join(TARGETS)}, not {self.target!r}.")
        if self.equal_counts and self.routing != "reroute":
            raise UsageError("Target stock needs routing reroute: a stock model knows no dropped slots.")


PUBLISHED = Method()
"""The method that SHAPE was published with."""
PUBLISHED_SAMPLES = 25
"""How many examples it was calibrated with."""


def check_routing(name: str) -> Routing:
    """A routing by its name.

    Raises:
        UsageError: for an unknown name.
    """
    for routing in ROUTINGS:
        if name == routing:
            return routing
    raise UsageError(f"Routing must be {' or '.join(ROUTINGS)}, not {name!r}.")


def routing_for(target: str, name: str | None) -> Routing:
    """The routing that is named, or what the target is routed by where none is.

    Raises:
        UsageError: for an unknown name.
    """
    return usual_routing(target) if name is None else check_routing(name)


def usual_routing(target: str) -> Routing:
    """What a target is routed by where nothing else is said."""
    return "reroute" if target == "stock" else "drop"
