"""Records to tokens: chat template, which tokens are response, context limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shape_moe.architectures.config_file import with_text_part
from shape_moe.calibration.chat import ChatTemplate
from shape_moe.calibration.records import Record
from shape_moe.calibration.schema import Message
from shape_moe.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last"]
Span = tuple[int, int]


@dataclass(frozen=True)
class TokenOptions:
    """How records become tokens.

    Attributes:
        template: apply the chat template where there is one.
        template_args: extra variables of the template, such as ``enable_thinking=False``.
        max_length: cut examples to this many tokens; None refuses what is longer than the context.
        turns: which turns of the assistant count as response: ``all`` or the ``last``.
        chat_template: text of a chat template instead of the tokenizer's own.
        tokenizer: folder of a tokenizer instead of the model's own.

    Raises:
        UsageError: for a ``max_length`` below 1, and for other ``turns``.
    """

    template: bool = True
    template_args: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    turns: str = "all"
    chat_template: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max-length must be at least 1, not {self.max_length}.")
        if self.turns not in ("all", "last"):
            raise UsageError(f"turns must be all or last, not {self.turns!r}.")
        if self.chat_template is not None and not self.template:
            raise UsageError("A chat template is given and switched off (--no-template): leave one of them out.")


@dataclass(frozen=True)
class Example:
    """A tokenised record.

    Attributes:
        index: the record's index in its source.
        where: the record's place, for messages.
        tokens: token ids.
        spans: half-open ranges of tokens that are response, in order, without overlap; all others are prompt.
        truncated: whether tokens were cut off.
        plain: whether it is a text without prompt and response.
        group: class of the record, None without classes.
        lost: how many response tokens were cut off.
    """

    index: int
    where: str
    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    truncated: bool = False
    plain: bool = False
    group: str | None = None
    lost: int = 0

    def __post_init__(self) -> None:
        edges = [edge for span in self.spans for edge in span]
        if edges != sorted(edges) or any(begin == end for begin, end in self.spans):
            raise ValueError(f"{self.where}: spans {self.spans} are empty, overlap or are out of order.")
        if edges and not 0 <= edges[0] <= edges[-1] <= len(self.tokens):
            raise ValueError(f"{self.where}: spans {self.spans} leave the {len(self.tokens)} tokens.")

    @classmethod
    def answered(
        cls, index: int, where: str, tokens: Sequence[int], prompt_length: int, *, group: str | None = None
    ) -> Example:
        """An example of one prompt and one response: all tokens from ``prompt_length`` on."""
        spans = ((prompt_length, len(tokens)),) if prompt_length < len(tokens) else ()
        return cls(index, where, tuple(tokens), spans, group=group)

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the last response: what the model would be asked. All of them without one."""
        return self.spans[-1][0] if self.spans else len(self.tokens)

    @property
    def response(self) -> tuple[int, ...]:
        """Tokens of the last response."""
        return self.tokens[slice(*self.spans[-1])] if self.spans else ()

    @property
    def response_tokens(self) -> int:
        """How many tokens are response."""
        return sum(end - begin for begin, end in self.spans)


class Tokeniser:
    """Turns records into prompts and examples for one model.

    Args:
        tokenizer: the model's tokenizer.
        context: the most tokens that the model takes, None when unknown.
        options: see :class:`TokenOptions`.
        vocabulary: rows of the model's embedding, None when unknown.
        stops: ids of tokens that end an answer, beside the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        options: TokenOptions,
        *,
        vocabulary: int | None = None,
        stops: frozenset[int] = frozenset(),
    ) -> None:
        self.tokenizer, self.context, self.options = tokenizer, context, options
        self.vocabulary, self.stops = vocabulary, stops
        self.uses_template = options.template and bool(options.chat_template or tokenizer.chat_template)
        self._chat = ChatTemplate(tokenizer, options.chat_template, options.template_args)
        self._told: set[str] = set()

    def fresh_notes(self) -> list[str]:
        """What was done to conversations, each once: what has not been asked for before."""
        fresh = [note for note in self._chat.notes if note not in self._told]
        self._told.update(fresh)
        return fresh

    @property
    def limit(self) -> int | None:
        """The most tokens of an example: ``max_length`` or the context, whichever is smaller; None for no limit."""
        limits = [limit for limit in (self.options.max_length, self.context) if limit is not None]
        return min(limits) if limits else None

    def room(self, prompt_length: int, wanted: int) -> int:
        """How many of ``wanted`` answer tokens fit behind a prompt."""
        return wanted if self.limit is None else max(0, min(wanted, self.limit - prompt_length))

    @property
    def template_hash(self) -> str | None:
        """sha256 of the chat template in use, None where none is."""
        return self._chat.hash if self.uses_template else None

    def prompt(self, record: Record) -> list[int]:
        """Tokens of the prompt alone, ready for the model to continue."""
        if record.text is not None:
            return self._encode(record.text, special=True)
        messages = self._messages(record)
        if messages is None:
            assert record.prompt is not None
            return self._encode(record.prompt, special=True)
        return self._encode(self._chat.prompt(messages, record.tools, record.where), special=False)

    def example(self, record: Record, answer: list[int] | None = None) -> Example:
        """Tokens of a record, and which of them are response.

        Args:
            record: the record.
            answer: tokens of the response where the model itself gave it.

        Raises:
            DataError: for a record without tokens, with tokens that the model's embedding lacks, or longer than the
                context when ``max_length`` is not set.
        """
        tokens, spans = self._tokens(record, answer or [])
        if not tokens:
            raise DataError(f"{record.where}: the record has no tokens.")
        self._check_vocabulary(record, tokens)
        if self.options.max_length is None and self.context is not None and len(tokens) > self.context:
            raise DataError(
                f"{record.where}: {len(tokens):,} tokens are more than the model's context of {self.context:,}; "
                f"--max-length {self.context} cuts such records."
            )
        cut = tokens[: self.limit]
        kept = tuple((begin, min(end, len(cut))) for begin, end in spans if begin < len(cut))
        lost = sum(end - begin for begin, end in spans) - sum(end - begin for begin, end in kept)
        return Example(
            record.index,
            record.where,
            tuple(cut),
            kept,
            truncated=len(cut) < len(tokens),
            plain=record.text is not None,
            group=record.group,
            lost=lost,
        )

    def _tokens(self, record: Record, answer: list[int]) -> tuple[list[int], list[Span]]:
        """All tokens of a record, and the spans of response among them."""
        messages = self._messages(record)
        if messages is None:
            prompt = self.prompt(record)
            given = self._encode(record.response, special=False) if record.response else []
            tokens, spans = [*prompt, *given], [(len(prompt), len(prompt) + len(given))]
        else:
            tokens, spans = self._conversation(messages, record)
        if answer:
            spans = spans if self.options.turns == "all" else []
            spans = [*spans, (len(tokens), len(tokens) + len(answer))]
            tokens = [*tokens, *answer]
        return tokens, _joined(spans)

    def _conversation(self, messages: list[Message], record: Record) -> tuple[list[int], list[Span]]:
        every = self.options.turns == "all"
        if self._chat.marks_answers:
            found = self._chat.masked(messages, record.tools, record.where)
            if found is not None:
                tokens, mask = found
                spans = _runs(mask)
                self._chat.said("The chat template marks what the assistant writes; that is the response.")
                return tokens, spans if every or not spans else self._last_turn(spans, messages, record, tokens)
        written = self._chat.conversation(messages, record.tools, record.where, all_turns=every)
        tokens, spans = self._located(written.text, written.spans)
        end = self.tokenizer.eos_token_id
        if not written.ends and isinstance(end, int) and tokens and tokens[-1] not in {end, *self.stops}:
            self._chat.said("The chat template writes no end of an answer: the end-of-sequence token stands for it.")
            tokens, spans = [*tokens, end], [*spans[:-1], (spans[-1][0], len(tokens) + 1)]
        return tokens, spans

    def _last_turn(self, spans: list[Span], messages: list[Message], record: Record, tokens: list[int]) -> list[Span]:
        """Of marked spans those of the last turn."""
        if messages[-1]["role"] != "assistant":
            return spans[-1:]
        head = self._encode(self._chat.prompt(messages, record.tools, record.where), special=False)
        shared = next((i for i, pair in enumerate(zip(head, tokens, strict=False)) if pair[0] != pair[1]), len(head))
        return [span for span in spans if span[1] > shared] or spans[-1:]

    def _located(self, text: str, places: Sequence[tuple[int, int]]) -> tuple[list[int], list[Span]]:
        """Tokens of a text, and the spans of tokens that begin inside ranges of characters."""
        last = places[-1][0] if places else len(text)
        if not self.tokenizer.is_fast:
            return self._by_pieces(text, places)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = found["offset_mapping"]
        if any(begin < last < end for begin, end in offsets):
            return self._by_pieces(text, places)  # the model would be asked before a token ends
        spans = []
        for begin, end in places:
            inside = [i for i, (first, after) in enumerate(offsets) if begin <= first < end and after > first]
            if inside:
                spans.append((inside[0], inside[-1] + 1))
        return list(found["input_ids"]), spans

    def _by_pieces(self, text: str, places: Sequence[tuple[int, int]]) -> tuple[list[int], list[Span]]:
        """The same with each range a text of its own."""
        tokens: list[int] = []
        spans, done = [], 0
        for begin, end in places:
            tokens += self._encode(text[done:begin], special=False)
            start = len(tokens)
            tokens += self._encode(text[begin:end], special=False)
            spans.append((start, len(tokens)))
            done = end
        return [*tokens, *self._encode(text[done:], special=False)], spans

    def _messages(self, record: Record) -> list[Message] | None:
        """The conversation to render with the template; None where raw text is wanted."""
        if record.messages is not None:
            if not self.uses_template:
                why = "--no-template is set" if not self.options.template else "the tokenizer has none"
                raise DataError(
                    f"{record.where}: messages need a chat template, but {why}; give one with --chat-template FILE."
                )
            return list(record.messages)
        if not self.uses_template or record.text is not None:
            return None
        messages: list[Message] = [{"role": "user", "content": record.prompt}]
        if record.response is not None:
            messages.append({"role": "assistant", "content": record.response})
        return messages

    def _check_vocabulary(self, record: Record, tokens: Sequence[int]) -> None:
        largest = max(tokens)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{record.where}: token id {largest:,} ({token!r}) is beyond the model's embedding of "
                f"{self.vocabulary:,} rows: the tokenizer is not the one of these weights."
            )

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return (
            list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids) if text or special else []
        )


def tokeniser_of(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any], options: TokenOptions) -> Tokeniser:
    """The tokeniser for a model of this configuration: its context, its embedding, and what ends its answers."""
    config = with_text_part(config)
    ends = config.get("eos_token_id")
    stops = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    rows = config.get("vocab_size")
    context = config.get("max_position_embeddings")
    return Tokeniser(tokenizer, context, options, vocabulary=rows, stops=stops)


def _runs(mask: Sequence[int]) -> list[Span]:
    """Ranges of ones."""
    spans: list[Span] = []
    for place, value in enumerate(mask):
        if value and spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        elif value:
            spans.append((place, place + 1))
    return spans


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans without empty ones, and without overlap."""
    found: list[Span] = []
    for begin, end in spans:
        start = max(begin, found[-1][1]) if found else begin
        if end > start:
            found.append((start, end))
    return found
