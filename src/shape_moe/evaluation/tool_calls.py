"""Tool calls of answers, compared with those that were right, and checked against the functions' JSON schemas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shape_moe.evaluation.falls import DENSE_REACHES, Pairs
from shape_moe.evaluation.tool_call_formats import Calls, ToolCall, Tools, schemas_of


def call_problem(call: ToolCall, tools: Tools) -> str | None:
    """What is wrong with a call, None where it fits the function's JSON schema.

    Raises:
        ValueError: when the schema is no JSON schema, so that nothing can be said.
    """
    from jsonschema import SchemaError, ValidationError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if call.problem is not None:
        return call.problem
    schemas = schemas_of(tools)
    if call.name not in schemas:
        return f"there is no function {call.name!r}"
    schema = dict(schemas[call.name])
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
        kind(schema, registry=Registry()).validate(dict(call.arguments or {}))  # nothing is fetched
    except ValidationError as error:
        return str(error.message)
    except (SchemaError, Unresolvable, RecursionError) as error:
        raise ValueError(f"the parameters of {call.name} are not a JSON schema: {error}") from error
    return None


@dataclass(frozen=True)
class CallMatch:
    """One answer beside the calls that were right.

    Attributes:
        wanted: whether a call was right.
        made: whether the answer makes one.
        name: whether the functions are the right ones.
        arguments: whether their arguments are, too.
        valid: whether all calls fit the schemas, None where those say nothing.
    """

    wanted: bool
    made: bool
    name: bool
    arguments: bool
    valid: bool | None

    @property
    def right(self) -> bool:
        """Whether no call was made where none was right, else whether the calls are the right ones."""
        return self.arguments if self.wanted else not self.made


def match_calls(reference: Calls, made: Calls, tools: Tools) -> CallMatch:
    """Compare an answer's calls with the right ones; the order of several does not count."""
    readable = all(call.problem is None for call in made)
    name = Counter(call.name for call in made) == Counter(call.name for call in reference)
    arguments = readable and sorted(call.key for call in made) == sorted(call.key for call in reference)
    try:
        valid: bool | None = bool(made) and all(call_problem(call, tools) is None for call in made)
    except ValueError:
        valid = None
    return CallMatch(bool(reference), bool(made), name, arguments, valid)


@dataclass(frozen=True)
class ToolExample:
    """What both models did with one example that offers tools.

    Attributes:
        tools: the functions offered.
        reference: the calls of the data's answer, None where it has no answer.
        dense: the dense model's calls.
        pruned: the pruned model's.
    """

    tools: Tools
    reference: Calls | None
    dense: Calls
    pruned: Calls


def compare_calls(examples: Sequence[ToolExample]) -> dict[str, Pairs]:
    """Count what both models got right.

    Right is what the data's answer does, where it has one and the dense model itself is right in half of these
    examples or more, else what the dense model does.

    Returns:
        By aspect: ``right`` (the decision to call, and the calls where some were right) and ``decision`` over all
        examples; ``made`` (any call), ``name``, ``arguments`` and ``valid`` (by the schema) over those where a call was
        right. Empty without examples.
    """
    if not examples:
        return {}
    own = [(e, match_calls(e.reference, e.dense, e.tools)) for e in examples if e.reference is not None]
    by_data = sum(match.right for _, match in own) >= DENSE_REACHES * len(own)
    matches = []
    for example in examples:
        reference = example.reference if by_data and example.reference is not None else example.dense
        pair = (match_calls(reference, made, example.tools) for made in (example.dense, example.pruned))
        matches.append(tuple(pair))
    wanted = [pair for pair in matches if pair[0].wanted]
    checked = [pair for pair in wanted if all(match.valid is not None for match in pair)]

    def count(pairs: list[tuple[CallMatch, ...]], aspect: Callable[[CallMatch], bool]) -> Pairs:
        return Pairs.of([aspect(dense) for dense, _ in pairs], [aspect(pruned) for _, pruned in pairs])

    return {
        "right": count(matches, lambda match: match.right),
        "decision": count(matches, lambda match: match.made == match.wanted),
        "made": count(wanted, lambda match: match.made),
        "name": count(wanted, lambda match: match.name),
        "arguments": count(wanted, lambda match: match.arguments),
        "valid": count(checked, lambda match: bool(match.valid)),
    }
