"""Chat templates of the turn formats of several families, written for these tests, and a tokenizer to go with them.

Each writes turns, calls, results and thinking as its family does; the families' long instructions about tools are
shortened. One token per character, and one per special token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|role_end|>", "<|user|>", "<|assistant|>", "<|system|>",
           "<|observation|>", "<role>", "</role>")

TOOLS_SYSTEM = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}{{ '# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}"""
TOOL_RESULT = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"""
CALLS = """\
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or m.content %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}"""
CHATML = TOOLS_SYSTEM + """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content }}""" + CALLS + """{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}""" + TOOL_RESULT + """{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = TOOLS_SYSTEM + """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}""" + CALLS + """{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}""" + TOOL_RESULT + """{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
LLAMA3 = """\
{{- '<|begin_of_text|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if tools and loop.first %}{{ 'Functions:\\n' }}{% for tool in tools %}{{ (tool | tojson) + '\\n' }}
{%- endfor %}{% endif %}
{{- (m.content | trim) + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LING_V1 = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content }}
{%- else %}{{ '<role>' + (m.role | upper) + '</role>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""
RING_V1 = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + m.content.split('</think>')[-1] }}
{%- else %}{{ '<role>' + (m.role | upper) + '</role>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role><think>\\n' }}{% endif %}"""
LING_V2 = """\
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- if tools %}{{ '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\n' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content + '<|role_end|>' }}
{%- elif m.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + m.content }}""" + CALLS + """{{ '<|role_end|>' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|role_end|>' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""
RING_V2 = (LING_V2.replace("thinking off", "thinking on")
           .replace("ASSISTANT</role>' + m.content", "ASSISTANT</role>' + m.content.split('</think>')[-1]")
           .replace("{{ '<role>ASSISTANT</role>' }}", "{{ '<role>ASSISTANT</role><think>\\n' }}"))
GLM45 = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\\n# Tools\\n' }}{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' + m.content }}
{%- elif m.role == 'system' %}{{ '<|system|>\\n' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}{{ '\\n<think>' + m.reasoning_content + '</think>' }}
{%- else %}{{ '\\n<think></think>' }}{% endif %}
{%- if m.content %}{{ '\\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' + value + '</arg_value>' }}{% endfor %}
{{- '\\n</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def tokenizer_with(template: str | None, *, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and newline, then the special tokens. `end` is its end-of-text token."""
    names = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>",
                                   chat_template=template)
