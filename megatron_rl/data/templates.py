"""Problem text or chat messages -> what the model reads: one string and its token ids."""

from __future__ import annotations

from typing import Any, Protocol

from jinja2 import TemplateError

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.problems import Message

__all__ = ["ChatTemplate", "PlainTemplate", "Template", "build_template"]


class Template(Protocol):
    """Renders one problem. ValueError if the problem does not fit the template."""

    def render(self, text: str | tuple[Message, ...]) -> str: ...


class PlainTemplate:
    """prompt_prefix + text + prompt_suffix, nothing else (no special tokens)."""

    def __init__(self, prefix: str, suffix: str):
        self._prefix, self._suffix = prefix, suffix

    def render(self, text: str | tuple[Message, ...]) -> str:
        if not isinstance(text, str):
            raise ValueError("the prompt is a list of chat messages: data.template=plain takes text; "
                             "set data.template=chat")
        return self._prefix + text + self._suffix


class ChatTemplate:
    """The tokenizer's chat template with the generation prompt; prefix and suffix wrap the last message."""

    def __init__(self, tokenizer: Any, prefix: str, suffix: str):
        if tokenizer.chat_template is None:
            raise ValueError("data.template=chat, but the tokenizer has no chat template; "
                             "set data.template=plain or add chat_template.jinja to the folder of model.path")
        self._tokenizer = tokenizer
        self._prefix, self._suffix = prefix, suffix

    def render(self, text: str | tuple[Message, ...]) -> str:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(m) for m in text]
        messages[-1]["content"] = self._prefix + messages[-1]["content"] + self._suffix
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def build_template(config: DataConfig, tokenizer: Any) -> Template:
    """The template named by data.template. ValueError if the tokenizer has no chat template."""
    if config.template == "chat":
        return ChatTemplate(tokenizer, config.prompt_prefix, config.prompt_suffix)
    return PlainTemplate(config.prompt_prefix, config.prompt_suffix)
