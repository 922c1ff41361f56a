"""PROGRAM: SGLang's own parsers of calls and reasoning, one JSON line in, one out (SGLang 0.5.23).

A process of its own: importing the parsers takes seconds and a quarter of a gigabyte, and the orchestrator knows
nothing of SGLang's code. sglang/srt/function_call/function_call_parser.py: FunctionCallParser,
sglang/srt/parser/reasoning_parser.py: ReasoningParser. It ends when its input does.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import orjson

from megatron_rl.foreign import told


def main() -> None:
    tool_parser, reasoning_parser = (name or None for name in sys.argv[1:3])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what SGLang prints is no answer
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    known = {"tool_call_parser": sorted(FunctionCallParser.ToolCallParserEnum),
             "reasoning_parser": sorted(ReasoningParser.DetectorMap)}
    answers.write(orjson.dumps(known) + b"\n")
    if tool_parser not in (None, *known["tool_call_parser"]):
        return
    if reasoning_parser not in (None, *known["reasoning_parser"]):
        return

    def parse(asked: dict[str, Any]) -> dict[str, Any]:
        content, reasoning, calls = asked["text"], "", []
        if reasoning_parser:
            force = True if asked["opened"] else None
            reasoning, content = ReasoningParser(reasoning_parser, stream_reasoning=False, force_reasoning=force,
                                                 tool_call_parser_active=bool(tool_parser)).parse_non_stream(content)
        if tool_parser and asked["tools"]:
            parser = FunctionCallParser([Tool(**tool) for tool in asked["tools"]], tool_parser)
            content, found = parser.parse_non_stream(content or "")
            calls = [[call.name, call.parameters] for call in found]
        return {"content": content or "", "reasoning": reasoning or "", "calls": calls}

    for line in sys.stdin.buffer:
        try:
            answer = parse(orjson.loads(line))
        except Exception as error:  # noqa: BLE001 -- a parser's fault is the answer; the sampled tokens stay
            answer = {"error": told(error)}
        answers.write(orjson.dumps(answer) + b"\n")


if __name__ == "__main__":
    main()
