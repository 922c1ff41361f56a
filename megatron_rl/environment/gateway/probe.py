"""Whether a chat template only ever appends, tried before a run on short conversations.

A template is append-only if a longer conversation's text begins with the shorter one's text and goes on with what
Rendering.after says. Many cut the thinking out of earlier answers, so that a model would read other tokens than it
sampled. Such a template is refused with the place where it differs, or used with history=keep_thinking: the earlier
thinking stays where it was sampled, and only what comes after an answer must be as the template writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message
from megatron_rl.environment.gateway.rendering import History, Options, Rendering

SHOWN = 60
"""Characters that a diff shows on either side."""
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "Weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _said(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def _calls(*places: str) -> list[dict[str, Any]]:
    return [{"id": f"call_{place}", "type": "function",
             "function": {"name": "weather", "arguments": {"place": place}}} for place in places]


def _result(place: str, text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": f"call_{place}"}


SYSTEM = {"role": "system", "content": "Be brief about it."}
CONVERSATIONS: Mapping[str, tuple[list[Message], Options]] = {
    "plain": ([_user("First?"), _said("One."), _user("Second?"), _said("Two."), _user("Third?")], Options()),
    "system": ([SYSTEM, _user("First?"), _said("One."), _user("Second?")], Options()),
    "empty": ([_user("First?"), _said(""), _user(""), _said("Two."), _user("Third?")], Options()),
    "tools": ([_user("Rome?"), _said("", tool_calls=_calls("Rome")), _result("Rome", "sunny"), _said("Sun."),
               _user("Thanks.")], Options((TOOL,))),
    "parallel_tools": ([_user("Both?"), _said("", tool_calls=_calls("Rome", "Oslo")), _result("Rome", "sunny"),
                        _result("Oslo", "snowy"), _said("Sun, snow."), _user("Thanks.")], Options((TOOL,))),
    "thinking": ([_user("First?"), _said("One.", reasoning_content="I think."), _user("Second?"),
                  _said("Two.", reasoning_content="I thought."), _user("Third?")],
                 Options(extra={"enable_thinking": True})),
    "no_thinking": ([_user("First?"), _said("One."), _user("Second?")], Options(extra={"enable_thinking": False})),
}


@dataclass
class Findings:
    """breaks: conversation -> the diff. unsupported: conversation -> why the template cannot render it."""

    breaks: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


def probe(rendering: Rendering, history: History) -> Findings:
    """Tries every conversation; what a template cannot render is no break, and is refused when it is asked for."""
    findings = Findings()
    for name, (messages, options) in CONVERSATIONS.items():
        try:
            lost = _lost(rendering, messages, options)
            if lost:
                findings.unsupported[name] = f"the template leaves out {lost!r}"
            elif broken := _first_break(rendering, messages, options, history):
                findings.breaks[name] = broken
        except RequestError as error:
            findings.unsupported[name] = str(error)
    return findings


def checked(tokenizer: Any, history: History) -> tuple[Rendering, Findings]:
    """The rendering of a tokenizer's template. ValueError shows where a template is not as `history` needs it."""
    try:
        rendering = Rendering(tokenizer)
    except RequestError as error:
        raise ValueError(f"rollout.agent: {error}") from error
    findings = probe(rendering, history)
    if "plain" in findings.unsupported:
        raise ValueError(f"rollout.agent: the chat template cannot render a plain conversation: "
                         f"{findings.unsupported['plain']}")
    if not findings.breaks:
        return rendering, findings
    diffs = "\n".join(f"conversation {name!r}: {diff}" for name, diff in findings.breaks.items())
    other = ""
    if history == "append" and not probe(rendering, "keep_thinking").breaks:
        other = ("\nrollout.agent.history=keep_thinking is exact with this template: what was sampled stays, also the "
                 "thinking that the template would cut out of earlier answers")
    raise ValueError(f"rollout.agent.history={history}: the chat template is not append-only, so later turns would "
                     f"not begin with the tokens that were sampled\n{diffs}{other}")


def _lost(rendering: Rendering, messages: list[Message], options: Options) -> str | None:
    """The first text of a message, or name of a tool, that the template does not write."""
    names = [tool["function"]["name"] for tool in options.tools]
    asked = _where_asked(messages)
    for earlier, place in zip([0, *asked], asked, strict=False):
        text = rendering.render(messages[:place], options)
        told = [message["content"] for message in messages[earlier:place] if message["role"] != "assistant"]
        for wanted in (*told, *names):
            if wanted not in text:
                return wanted
    return None


def _where_asked(messages: list[Message]) -> list[int]:
    """How many messages the model reads before each of its answers, and before the one that would come next."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"] + [len(messages)]


def _first_break(rendering: Rendering, messages: list[Message], options: Options, history: History) -> str | None:
    """How the conversation, put together turn by turn, first differs from the template's; None: nowhere."""
    asked = _where_asked(messages)
    text = rendering.render(messages[:asked[0]], options)
    for last, place in zip(asked[:-1], asked[1:], strict=True):
        new = messages[last + 1:place]
        whole, closed = rendering.render(messages[:place], options), rendering.render(messages[:last + 1], options,
                                                                                      opens=False)
        follows = rendering.turn(new, options)
        if history == "keep_thinking":
            if not whole.endswith(follows):
                return _diff(follows, whole[-len(follows):])
            continue
        if not closed.startswith(text):
            return _diff(text, closed)
        text = closed + follows
        if whole != text:
            return _diff(text, whole)
    return None


def _diff(appended: str, template: str) -> str:
    """The first place at which two texts differ, with what stands around it."""
    same = next((place for place, (one, two) in enumerate(zip(appended, template, strict=False)) if one != two),
                min(len(appended), len(template)))
    begin = max(same - SHOWN, 0)
    return (f"they differ at character {same}, after {appended[begin:same]!r}\n"
            f"  what was read and sampled goes on: {appended[same:same + SHOWN]!r}\n"
            f"  what the template writes:          {template[same:same + SHOWN]!r}")
