"""An agent that lets the model use a calculator: the OpenAI SDK and nothing of this project.

It reads its task from its input, one line of JSON. The SDK finds the gateway by OPENAI_BASE_URL and OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import operator
import sys

import openai

OPERATIONS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
TOOLS = [{"type": "function", "function": {
    "name": "calculate", "description": "The result of one operation on two whole numbers.",
    "parameters": {"type": "object", "required": ["operation", "a", "b"], "properties": {
        "operation": {"type": "string", "enum": sorted(OPERATIONS)},
        "a": {"type": "integer"}, "b": {"type": "integer"}}}}}]
SYSTEM = "Use the calculator for every operation, then give the result in \\boxed{}."
MOST_TURNS = 6


def calculate(arguments: str) -> str:
    """What the model reads: the result, or what is wrong with its call."""
    try:
        asked = json.loads(arguments)
        return str(OPERATIONS[asked["operation"]](int(asked["a"]), int(asked["b"])))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {type(error).__name__}: {error}"


def solve(client: openai.OpenAI, problem: str) -> str:
    """The model's last answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    for _ in range(MOST_TURNS):
        answer = client.chat.completions.create(model="policy", messages=messages, tools=TOOLS).choices[0].message
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [{"role": "tool", "tool_call_id": call.id, "content": calculate(call.function.arguments)}
                     for call in answer.tool_calls]
    return answer.content or ""


if __name__ == "__main__":
    print(solve(openai.OpenAI(), json.loads(sys.stdin.readline())["text"]))
