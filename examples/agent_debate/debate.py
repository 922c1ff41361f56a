"""Two agents debate: each answers, reads what the other said, and answers again. The model speaks for both.

`python -m examples.agent_debate.debate FOLDER [SEED]` writes FOLDER/init (a random model of 0.6M parameters with a
tokenizer and a chat template), FOLDER/sft.jsonl and FOLDER/problems.jsonl. The task is to write a word backwards. The
fine-tuned model guesses six first answers in ten, and follows the other's answer six times in ten.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.agent_calculator.learn import write_start

NAMES = ("A", "B")
LETTERS, LENGTH = "abcdefgh", 4
PROBLEMS, TAUGHT, HONEST = 4000, 1500, 0.4


async def debate(client: Any, task: Mapping[str, Any]) -> float:
    """What a run calls for each response (rollout.agent.kind=python): the share of the last answers that are right."""
    speeches = [opening(name, task["text"]) for name in NAMES]
    first = await asyncio.gather(*(say(client, speech) for speech in speeches))
    for speech, said, heard in zip(speeches, first, reversed(first), strict=True):
        speech += [{"role": "assistant", "content": said}, reply(heard)]
    last = await asyncio.gather(*(say(client, speech) for speech in speeches))
    return sum(said == task["answer"] for said in last) / len(last)


async def say(client: Any, messages: list[dict[str, str]]) -> str:
    answer = await client.chat.completions.create(model="policy", messages=messages, max_tokens=3 * LENGTH)
    return answer.choices[0].message.content or ""


def opening(name: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{name}: {text}"}]


def reply(heard: str) -> dict[str, str]:
    return {"role": "user", "content": f"The other says {heard}. You?"}


def problems(seed: int) -> Iterator[tuple[str, str]]:
    """(text, answer), without end: `abcd backwards`."""
    rng = random.Random(f"problems:{seed}")
    while True:
        word = "".join(rng.choices(LETTERS, k=LENGTH))
        yield f"{word} backwards", word[::-1]


def lessons(tokenizer: Any, seed: int) -> Iterator[dict[str, str]]:
    """Rows of supervised fine-tuning: a first answer, and a second one after hearing the other."""
    rng = random.Random(f"lessons:{seed}")

    def guess() -> str:
        return "".join(rng.choices(LETTERS, k=LENGTH))

    for (text, right), _ in zip(problems(seed + 1000), range(TAUGHT), strict=False):
        speech = opening(rng.choice(NAMES), text)
        said, heard = (right if rng.random() < HONEST else guess() for _ in NAMES)
        yield {"prompt": rendered(tokenizer, speech), "response": said}
        speech += [{"role": "assistant", "content": said}, reply(heard)]
        yield {"prompt": rendered(tokenizer, speech), "response": right if rng.random() < HONEST else heard}


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def write(folder: Path, seed: int) -> None:
    write_start(folder, seed, dict(answered for answered, _ in zip(problems(seed), range(PROBLEMS), strict=False)),
                lessons)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
