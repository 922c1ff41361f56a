"""A tiny model that learns to use the calculator: what `learn.sh` trains, and the agent that it trains it in.

`python -m examples.agent_calculator.learn FOLDER [SEED]` writes FOLDER/init (a random model of 0.6M parameters with a
tokenizer and a chat template of its own), FOLDER/sft.jsonl and FOLDER/problems.jsonl. The fine-tuned model calls the
calculator for two problems in five and guesses the others, which it gets wrong.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.agent_calculator.agent import MOST_TURNS, OPERATIONS, SYSTEM, TOOLS, calculate

END = "<|end|>"
WORDS = ("system:", "user:", "assistant:", "tool:", SYSTEM, "[calculate(operation=\"", *OPERATIONS, "\", a=", ", b=",
         ")]", "\\boxed{")
SIGNS = {"+": "add", "-": "subtract", "*": "multiply"}
TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool.function.name + '\\n' }}{% endfor %}
{%- for m in messages %}{{ m.role + ':' + m.content }}
{%- if m.tool_calls %}[{% for call in m.tool_calls %}{{ call.function.name + '(' }}
{%- for name, value in call.function.arguments.items() %}{{ name + '=' + (value | tojson) }}
{%- if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}
{{- '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
PROBLEMS, TAUGHT, WITH_CALL = 4000, 2400, 0.4


async def agent(client: Any, task: Mapping[str, Any]) -> None:
    """The program agent.py as a function of a run (rollout.agent.kind=python): no process for each response."""
    messages = first_messages(task["text"])
    for _ in range(MOST_TURNS):
        asked = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        answer = asked.choices[0].message
        messages.append(answer)
        if not answer.tool_calls:
            return
        messages += [{"role": "tool", "tool_call_id": call.id, "content": calculate(call.function.arguments)}
                     for call in answer.tool_calls]


async def forgetful(client: Any, task: Mapping[str, Any]) -> None:
    """An agent that keeps its context short: it puts the result behind the problem and begins a new conversation."""
    text = task["text"]
    for _ in range(MOST_TURNS):
        asked = await client.chat.completions.create(model="policy", messages=first_messages(text), tools=TOOLS)
        calls = asked.choices[0].message.tool_calls
        if not calls:
            return
        text = task["text"] + calculate(calls[0].function.arguments)


def first_messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, arguments of the one call that solves it), without end: `451*83=`."""
    rng = random.Random(f"problems:{seed}")
    while True:
        sign, a, b = rng.choice(sorted(SIGNS)), rng.randint(100, 999), rng.randint(11, 99)
        yield f"{a}{sign}{b}=", {"operation": SIGNS[sign], "a": a, "b": b}


def lessons(tokenizer: Any, seed: int) -> Iterator[dict[str, str]]:
    """Rows of supervised fine-tuning: a guess; or a call, and the answer that follows its result in either agent."""
    rng = random.Random(f"lessons:{seed}")
    for (text, arguments), _ in zip(problems(seed + 1000), range(TAUGHT), strict=False):
        told = first_messages(text)
        result = calculate(json.dumps(arguments))
        answer = f"\\boxed{{{result}}}"
        if rng.random() >= WITH_CALL:
            guess = "".join(rng.choices("0123456789", k=len(result)))
            yield {"prompt": rendered(tokenizer, told), "response": f"\\boxed{{{guess}}}"}
            continue
        call = {"role": "assistant", "content": "", "tool_calls": [
            {"id": "", "type": "function", "function": {"name": "calculate", "arguments": arguments}}]}
        first = rendered(tokenizer, told)
        yield {"prompt": first, "response": rendered(tokenizer, [*told, call])[len(first):].split(END)[0]}
        yield {"prompt": rendered(tokenizer, [*told, call, {"role": "tool", "content": result}]), "response": answer}
        yield {"prompt": rendered(tokenizer, first_messages(text + result)), "response": answer}


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)


def write_tokenizer(folder: Path) -> Any:
    """One token for each character and each of WORDS."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*WORDS, "\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces, 1)} | {END: 0},
                                           unk_token="?"))
    pattern = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE,
                                   clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    return fast


def write(folder: Path, seed: int) -> None:
    asked = {text: calculate(json.dumps(arguments))
             for (text, arguments), _ in zip(problems(seed), range(PROBLEMS), strict=False)}
    write_start(folder, seed, asked, lessons)


def write_start(folder: Path, seed: int, asked: Mapping[str, str],
                lessons: Callable[[Any, int], Iterator[dict[str, str]]]) -> None:
    """The random model, the problems with their answers, and what fine-tuning shows: lessons(tokenizer, seed)."""
    from megatron_rl.model.fresh import bailing_config, random_weights
    from megatron_rl.model.hf_folder import write_hf_folder

    tokenizer = write_tokenizer(folder / "tokenizer")
    config = bailing_config(vocab_size=len(tokenizer))
    write_hf_folder(folder / "init", config, random_weights(config, seed), tokenizer_from=folder / "tokenizer")
    rows = {"problems": [{"prompt": text, "answer": answer} for text, answer in asked.items()],
            "sft": list(lessons(tokenizer, seed))}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="ascii")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
