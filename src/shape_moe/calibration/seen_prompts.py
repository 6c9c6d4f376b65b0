"""Which prompts a calibration set has asked: told by salted hashes that a trace keeps instead of text."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shape_moe.calibration.records import Record, prompt_hash
from shape_moe.errors import CheckpointError

SALT_KEY, PROMPTS_KEY = "salt", "prompts"
"""In a trace's source: the salt, and the hashes of its records' prompts in the order of the records."""


def new_salt() -> str:
    """A salt for one trace: hashes of different traces cannot be matched, and no table of hashes helps to guess."""
    return secrets.token_hex(16)


def salted_hash(record: Record, salt: str) -> str:
    """16 hex digits of what a record asks, salted; an empty salt gives the hashes that the first traces kept.

    Args:
        record: the record; only its prompt counts, see :func:`shape_moe.calibration.records.prompt_hash`.
        salt: the trace's salt.
    """
    plain = prompt_hash(record)
    return hashlib.sha256(f"{salt}:{plain}".encode()).hexdigest()[:16] if salt else plain


@dataclass(frozen=True)
class SeenPrompts:
    """The prompts of one or several calibration sets: ``record in seen`` says whether one of them has asked it.

    Attributes:
        parts: of every set its salt and its hashes.
        complete: whether every set names its prompts; where not, a record that is not in may have been seen.
    """

    parts: tuple[tuple[str, frozenset[str]], ...] = ()
    complete: bool = True

    @classmethod
    def of_source(cls, source: Mapping[str, Any]) -> SeenPrompts:
        """What a trace's ``source`` names, each part of a merged one with its own salt.

        Raises:
            CheckpointError: when the source is not what a trace holds.
        """
        merged = source.get("merged")
        if merged is not None:
            if not isinstance(merged, list) or not all(isinstance(part, Mapping) for part in merged):
                raise CheckpointError("A trace's source is damaged: 'merged' must be a list of sources.")
            found = [cls.of_source(part) for part in merged]
            return cls(tuple(p for seen in found for p in seen.parts), all(seen.complete for seen in found))
        if PROMPTS_KEY not in source:
            return cls(complete=False)
        salt, prompts = source.get(SALT_KEY, ""), source[PROMPTS_KEY]
        if not isinstance(salt, str) or not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise CheckpointError("A trace's source is damaged: its salt and prompts must be texts.")
        return cls(((salt, frozenset(prompts)),))

    @classmethod
    def of_records(cls, records: Collection[Record]) -> SeenPrompts:
        """What records ask that are at hand."""
        return cls((("", frozenset(prompt_hash(record) for record in records)),))

    @classmethod
    def of_salts(cls, found: Mapping[str, Collection[str]] | None) -> SeenPrompts:
        """What :meth:`by_salt` gave; None where nobody knows."""
        if found is None:
            return cls(complete=False)
        return cls(tuple((salt, frozenset(hashes)) for salt, hashes in found.items()))

    def and_of(self, found: Mapping[str, Collection[str]] | None) -> SeenPrompts:
        """These prompts and those that :meth:`by_salt` gave for something else; None adds nothing."""
        return replace(self, parts=(*self.parts, *self.of_salts(found).parts))

    def by_salt(self) -> dict[str, list[str]] | None:
        """The hashes, ascending, by their salt; None where not all are known."""
        if not self.complete:
            return None
        found: dict[str, set[str]] = {}
        for salt, hashes in self.parts:
            found.setdefault(salt, set()).update(hashes)
        return {salt: sorted(hashes) for salt, hashes in sorted(found.items())}

    def with_records(self, records: Collection[Record]) -> SeenPrompts:
        """These prompts and those of records, salted as the last of these are."""
        salt = self.parts[-1][0] if self.parts else new_salt()
        return replace(self, parts=(*self.parts, (salt, frozenset(salted_hash(record, salt) for record in records))))

    def __contains__(self, record: Record) -> bool:
        return any(salted_hash(record, salt) in hashes for salt, hashes in self.parts)

    def count(self, records: Collection[Record]) -> int:
        """How many records ask what has been asked."""
        return sum(record in self for record in records)
