"""Which chat templates only append, how one that does not is refused, and what is put after an answer."""

from __future__ import annotations

import pytest

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.probe import CONVERSATIONS, checked, probe
from megatron_rl.environment.gateway.rendering import Options, Rendering
from tests.megatron_rl.environment.templates import (
    CHATML,
    GLM45,
    LING_V1,
    LING_V2,
    LLAMA3,
    QWEN3,
    RING_V1,
    RING_V2,
    tokenizer_with,
)

TOOLS = {"tools", "parallel_tools"}
TABLE = {  # template: (end of text, conversations that break `append`, those that cannot be rendered)
    "chatml": (CHATML, "<|im_end|>", set(), set()),
    "llama3": (LLAMA3, "<|eot_id|>", set(), {"parallel_tools"}),
    "qwen3": (QWEN3, "<|im_end|>", {"plain", "system", "empty", "tools", "parallel_tools", "thinking", "no_thinking"},
              set()),
    "ling_v1": (LING_V1, "<|endoftext|>", set(), TOOLS),
    "ring_v1": (RING_V1, "<|endoftext|>", {"plain", "system", "empty", "thinking", "no_thinking"}, TOOLS),
    "ling_v2": (LING_V2, "<|role_end|>", set(), set()),
    "ring_v2": (RING_V2, "<|role_end|>",
                {"plain", "system", "empty", "tools", "parallel_tools", "thinking", "no_thinking"}, set()),
    "glm45": (GLM45, "<|endoftext|>", {"thinking"}, set()),
}


def rendering_of(name: str) -> Rendering:
    template, end, *_ = TABLE[name]
    return Rendering(tokenizer_with(template, end=end))


@pytest.mark.parametrize("name", TABLE)
def test_the_probe_tells_the_known_templates_apart(name):
    _, _, breaks, unsupported = TABLE[name]
    found = probe(rendering_of(name), "append")
    assert set(found.breaks) == breaks
    assert set(found.unsupported) == unsupported
    assert not probe(rendering_of(name), "keep_thinking").breaks, "what follows an answer is the same everywhere"


def test_a_template_that_cuts_thinking_is_refused_with_the_place_and_the_way_out():
    with pytest.raises(ValueError) as refused:
        checked(tokenizer_with(QWEN3), "append")
    text = str(refused.value)
    assert "conversation 'thinking'" in text
    assert "what was read and sampled goes on: '<think>\\nI think." in text
    assert "what the template writes:          'One.<|im_end|>" in text
    assert "rollout.agent.history=keep_thinking is exact with this template" in text
    assert checked(tokenizer_with(QWEN3), "keep_thinking")[1].breaks == {}


NUMBERED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (messages | length | string) + '\\n' }}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}
{{- '<|im_start|>assistant ' + (messages | length | string) + '\\n' }}{% endif %}"""
LAST_OPEN = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- if not loop.last or m.role != 'assistant' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_a_template_without_an_exact_mode_is_refused_in_both():
    """It counts the messages, so earlier turns change with every later one."""
    with pytest.raises(ValueError, match="not append-only") as refused:
        checked(tokenizer_with(NUMBERED), "append")
    assert "keep_thinking is exact" not in str(refused.value)


def test_a_template_that_leaves_a_last_answer_open_is_known():
    """The end of its turn is part of what follows an answer."""
    assert checked(tokenizer_with(LAST_OPEN), "append")[1].breaks == {}
    follows = "\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"
    rendering, user = Rendering(tokenizer_with(LAST_OPEN)), [{"role": "user", "content": "B"}]
    assert rendering.after(user, Options(), end="") == "<|im_end|>" + follows
    assert rendering.after(user, Options(), end="<|im_end|>") == follows


def test_a_template_that_wants_a_user_is_asked_as_an_agent_asks():
    """Nobody asks for an answer to a system prompt alone; Qwen3.5's template raises there."""
    wants_user = "{% if messages | map(attribute='role') | select('equalto', 'user') | list == [] %}" \
        "{{ raise_exception('No user query found in messages.') }}{% endif %}"
    found = probe(Rendering(tokenizer_with(wants_user + CHATML)), "append")
    assert not found.unsupported and not found.breaks


@pytest.mark.parametrize("template, says", [
    (None, "the tokenizer has none"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the text of an answer"),
    ("{{ raise_exception('no') }}", "the chat template refuses these messages: no"),
    ("{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out 'First"),
], ids=["none", "answers_dropped", "raises", "users_dropped"])
def test_a_template_that_cannot_hold_a_conversation_is_refused(template, says):
    with pytest.raises(ValueError, match=says):
        checked(tokenizer_with(template), "append")


@pytest.mark.parametrize(("name", "end", "follows"), [
    ("chatml", "<|im_end|>", "\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"),
    ("chatml", "", "<|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", "<|im_end|>", "\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"),
    ("llama3", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nB<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("llama3", "", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nB<|eot_id|>"
                      "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("ling_v1", "<|endoftext|>", "<role>HUMAN</role>B<role>ASSISTANT</role>"),
    ("ring_v1", "<|endoftext|>", "<role>HUMAN</role>B<role>ASSISTANT</role><think>\n"),
    ("ling_v2", "", "<|role_end|><role>HUMAN</role>B<|role_end|><role>ASSISTANT</role>"),
    ("ring_v2", "<|role_end|>", "<role>HUMAN</role>B<|role_end|><role>ASSISTANT</role><think>\n"),
    ("glm45", "<|user|>", "\nB<|assistant|>"),  # GLM ends its turns with the name of who speaks next
    ("llama3", "<|eom_id|>", "<|start_header_id|>user<|end_header_id|>\n\nB<|eot_id|>"
                             "<|start_header_id|>assistant<|end_header_id|>\n\n"),
])
def test_what_follows_an_answer(name, end, follows):
    """The newline after an end token is there once, and an end token that was sampled is not repeated."""
    assert rendering_of(name).after([{"role": "user", "content": "B"}], Options(), end=end) == follows


def test_results_of_parallel_calls_follow_as_one_message():
    messages, options = CONVERSATIONS["parallel_tools"]
    assert rendering_of("chatml").after(messages[2:4], options, end="<|im_end|>") == (
        "\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nsnowy\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n")


def test_what_a_template_refuses_is_the_requests_fault():
    messages, options = CONVERSATIONS["parallel_tools"]
    with pytest.raises(RequestError, match="only single tool-calls at once"):
        rendering_of("llama3").after(messages[2:4], options, end="<|im_end|>")


@pytest.mark.parametrize(("name", "tokens"), [
    ("chatml", {"<|im_end|>"}), ("ling_v1", {"<|endoftext|>"}), ("llama3", {"<|eot_id|>"})])
def test_an_answer_stops_at_the_end_of_text_and_at_the_templates_own_end(name, tokens):
    template, end, *_ = TABLE[name]
    tokenizer = tokenizer_with(template, end=end)
    assert set(Rendering(tokenizer).stop_token_ids) == set(tokenizer.convert_tokens_to_ids(sorted(tokens)))
    other = Rendering(tokenizer_with(CHATML, end="<|endoftext|>"))
    assert set(other.stop_token_ids) == set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
