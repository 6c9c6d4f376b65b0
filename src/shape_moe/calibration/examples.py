"""Records to tokens: chat template, prompt and response, context limits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shape_moe.calibration.records import Message, Record
from shape_moe.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenOptions:
    """How records become tokens.

    Attributes:
        template: apply the tokenizer's chat template where it has one.
        template_args: extra variables of the template, such as ``enable_thinking=False``.
        max_length: cut examples to this many tokens; None refuses what is longer than the context.

    Raises:
        UsageError: for a ``max_length`` below 1.
    """

    template: bool = True
    template_args: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max-length must be at least 1, not {self.max_length}.")


@dataclass(frozen=True)
class Example:
    """A tokenised record.

    Attributes:
        index: the record's index in its source.
        where: the record's place, for messages.
        tokens: token ids, prompt first.
        prompt_length: how many of them are prompt; the rest is response.
        truncated: whether tokens were cut off.
        plain: whether it is a text without prompt and response.
    """

    index: int
    where: str
    tokens: tuple[int, ...]
    prompt_length: int
    truncated: bool = False
    plain: bool = False


class Tokeniser:
    """Turns records into prompts and examples for one model.

    Args:
        tokenizer: the model's tokenizer.
        context: the most tokens that the model takes, None when unknown.
        options: see :class:`TokenOptions`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int | None, options: TokenOptions) -> None:
        self.tokenizer, self.context, self.options = tokenizer, context, options
        self.uses_template = options.template and bool(tokenizer.chat_template)

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
        if not self.uses_template:
            return None
        text = str(self.tokenizer.chat_template)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def prompt(self, record: Record) -> list[int]:
        """Tokens of the prompt alone, ready for the model to continue."""
        if record.text is not None:
            return self._encode(record.text, special=True)
        messages = self._messages(record)
        if messages is None:
            assert record.prompt is not None
            return self._encode(record.prompt, special=True)
        return self._encode(self._render(messages, record, prompt_only=True), special=False)

    def example(self, record: Record, answer: list[int] | None = None) -> Example:
        """Tokens of prompt and response.

        Args:
            record: the record.
            answer: tokens of the response where the model itself gave it.

        Raises:
            DataError: for a record without tokens, or longer than the context when ``max_length`` is not set.
        """
        prompt = self.prompt(record)
        if answer is None:
            answer = self._encode(self._response(record), special=False)
        return self._limited(record, prompt, answer)

    def _limited(self, record: Record, prompt: list[int], answer: list[int]) -> Example:
        tokens = (*prompt, *answer)
        if not tokens:
            raise DataError(f"{record.where}: the record has no tokens.")
        if self.options.max_length is None and self.context is not None and len(tokens) > self.context:
            raise DataError(
                f"{record.where}: {len(tokens):,} tokens are more than the model's context of {self.context:,}; "
                f"--max-length {self.context} cuts such records."
            )
        cut = tokens[: self.limit]
        cut_off, plain = len(cut) < len(tokens), record.text is not None
        return Example(record.index, record.where, cut, min(len(prompt), len(cut)), cut_off, plain)

    def _messages(self, record: Record) -> list[Message] | None:
        """The conversation to render with the template; None where raw text is wanted."""
        if record.messages is not None:
            if not self.uses_template:
                why = "--no-template is set" if self.tokenizer.chat_template else "the tokenizer has none"
                raise DataError(f"{record.where}: messages need a chat template, but {why}.")
            return list(record.messages)
        if not self.uses_template:
            return None
        messages: list[Message] = [{"role": "user", "content": record.prompt}]
        if record.response is not None:
            messages.append({"role": "assistant", "content": record.response})
        return messages

    def _response(self, record: Record) -> str:
        if record.text is not None or record.lacks_response:
            return ""
        messages = self._messages(record)
        if messages is None:
            assert record.response is not None
            return record.response
        head = self._render(messages, record, prompt_only=True)
        whole = self._render(messages, record, prompt_only=False)
        if not whole.startswith(head):
            raise DataError(
                f"{record.where}: the chat template renders the prompt differently once the response follows, so the "
                "two cannot be told apart; use prompt/response records with --no-template, or leave the response out."
            )
        return whole[len(head) :]

    def _render(self, messages: list[Message], record: Record, *, prompt_only: bool) -> str:
        answered = messages[-1]["role"] == "assistant"
        chat = messages[:-1] if prompt_only and answered else messages
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt_only, **self.options.template_args
            )
        except Exception as error:  # templates are programs and raise what they like
            raise DataError(f"{record.where}: the chat template refuses this conversation: {error}") from error
        return str(text)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
