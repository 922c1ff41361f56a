"""What a model reads: a first request through the chat template, later ones as what comes after the tokens so far.

The text that a template puts after an answer is found by rendering a short conversation whose answer is a mark: what
follows the mark is the end of that turn, the new messages and the beginning of the next turn. So no sampled text is
ever rendered again. Before the first request `probe` shows whether the template agrees (probe.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message

History = Literal["append", "keep_thinking"]
MARK = f"answer{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Options:
    """What a request adds to its messages. extra: chat_template_kwargs (enable_thinking and the like)."""

    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] | None = None

    def shared(self) -> list[Any]:
        return [list(self.tools), dict(self.extra or {})]


class Rendering:
    """The tokenizer's chat template. TemplateError of a template becomes a RequestError."""

    def __init__(self, tokenizer: Any):
        if tokenizer.chat_template is None:
            raise ValueError("rollout.agent needs a chat template, and the tokenizer has none: add "
                             "chat_template.jinja to the folder of model.path")
        self._tokenizer = tokenizer
        special = [*tokenizer.all_special_tokens,
                   *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)]
        self._special = sorted(set(special), key=len, reverse=True)
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(token) for token in self._special)
        self._tail = self._after_mark([_user(), _answer()], Options(), opens=False)
        self._closing = next((token for token in self._special if self._tail.startswith(token)), "")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token, and what the template ends a turn with, if that is one token."""
        own = self._tokenizer.convert_tokens_to_ids(self._closing) if self._closing else None
        return tuple(sorted({self._tokenizer.eos_token_id} | ({own} if own is not None else set())))

    def end_of_turn(self, sampled: Sequence[int]) -> str:
        """The special token that ends `sampled`, as text; empty if none does."""
        if not len(sampled) or int(sampled[-1]) not in self._special_ids:
            return ""
        return self._tokenizer.convert_ids_to_tokens(int(sampled[-1]))

    def render(self, messages: Sequence[Message], options: Options, *, opens: bool = True) -> str:
        """opens: the text ends where the model begins to answer."""
        extra = {"tools": list(options.tools)} if options.tools else {}
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opens, **{**(options.extra or {}), **extra})
        except (TemplateError, TypeError, KeyError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def after(self, messages: Sequence[Message], options: Options, *, end: str) -> str:
        """What follows an answer: the rest of its turn, `messages`, and the beginning of the next answer.

        end: the end token that was sampled, as text, which takes the place of the template's; empty if none was.
        """
        follows = self._tail + self.turn(messages, options)
        return follows.removeprefix(self._closing or end) if end else follows

    def turn(self, messages: Sequence[Message], options: Options) -> str:
        """`messages` after a whole turn of the assistant, and the beginning of the next answer."""
        base = [_user(), _answer(messages)]
        closed = self._after_mark(base, options, opens=False)
        whole = self._after_mark([*base, *messages], options, opens=True)
        if not whole.startswith(closed):
            raise RequestError("the chat template writes an answer in another way once messages follow: after it "
                               f"{closed!r}, then {whole[:len(closed) + 20]!r}")
        return whole[len(closed):]

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], *, with_special: bool) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_special)

    def _after_mark(self, messages: Sequence[Message], options: Options, *, opens: bool) -> str:
        text = self.render(messages, options, opens=opens)
        _, mark, after = text.rpartition(MARK)
        if not mark:
            raise RequestError("the chat template leaves out the text of an answer")
        return after


def _user() -> Message:
    return {"role": "user", "content": "question"}


def _answer(followed_by: Sequence[Message] = ()) -> Message:
    """An answer that ends with the mark: its text, or the argument of the last call if tools answer it."""
    results = [message for message in followed_by if message["role"] == "tool"]
    if not results:
        return {"role": "assistant", "content": MARK}
    return {"role": "assistant", "content": "", "tool_calls": [
        {"id": message["tool_call_id"], "type": "function",
         "function": {"name": "function", "arguments": {"argument": MARK}}} for message in results]}
