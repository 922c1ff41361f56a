"""Every shipped recipe: a model that follows the prompt to the letter is right, and one that answers wrongly is not.

A recipe is an experiment of conf/ or the evaluation in docs/data.md. Its sections are taken as they are. Files that a
user has to bring are written here, some rows in the columns of their source.
"""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_rl.config.data import DataConfig
from megatron_rl.config.load import load
from megatron_rl.config.reward import RewardConfig
from megatron_rl.data.sources import Limits, build_source
from megatron_rl.reward.route import Routes
from megatron_rl.types import Prompt

EXPERIMENTS = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml") if path.stem != "none")
WORKED = {"examples/table3_domain_conflict/code.jsonl", "examples/table3_domain_conflict/science.jsonl",
          "examples/ring_lite_tiny/general.jsonl", "examples/ring_lite_tiny/replay.jsonl",
          "examples/ring_mini/low.jsonl", "examples/ring_mini/high.jsonl"}
SOLUTION = "print(sum(map(int, input().split())))"
CASES = [{"input": "1 2\n", "output": "3\n"}]
BROUGHT = {  # what a user brings: source and domain -> rows
    ("jsonl", "math"): [
        {"prompt": text, "problem": text, "answer": answer, "response": f"so \\boxed{{{said}}}"}
        for text, answer, said in [("Half of one?", "\\frac{1}{2}", "0.5"), ("Solve x-3>0.", "x>3", "(3,\\infty)")]],
    ("jsonl", "science"): [{"prompt": "How long?", "answer": "5 km"}, {"prompt": "Ion?", "answer": "Na^+"}],
    ("jsonl", "code"): [{"prompt": "Add two numbers.", "answer": SOLUTION, "language": "python", "mode": "stdin",
                         "tests": CASES}],
    ("gsm8k", "math"): [{"question": "How many?", "answer": "Half of 2,400.\n#### 1,200"}],
    ("aime", "math"): [{"problem": "How many?", "answer": "033", "id": 1}],
    ("gpqa", "math"): [{"Question": f"Unit {i}?", "Correct Answer": "newton", "Incorrect Answer 1": "metre",
                        "Incorrect Answer 2": "kelvin", "Incorrect Answer 3": "a lux", "Record ID": str(i)}
                       for i in range(12)],
    ("livecodebench", "code"): [{"question_content": "Add.", "starter_code": "", "public_test_cases": json.dumps(CASES),
                                 "question_id": "1"}]}


class NoTokenizer:
    """What a template needs of a tokenizer: the messages' own text."""

    chat_template, eos_token_id = "{}", 0

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(message["content"] for message in messages)


def leaves(config):
    return [leaf for part in config.mix.values() for leaf in leaves(part)] if config.mix else [config]


def sections(name):
    """(DataConfig, RewardConfig) of everything that a recipe trains on or is evaluated on."""
    if name == "docs/data.md":
        text = next(block for block in re.findall(r"```\n(.*?)```", Path(name).read_text("utf-8"), re.DOTALL)
                    if "benchmarks:" in block)
        return [(DataConfig(**each["data"]), RewardConfig())
                for each in yaml.safe_load(text)["eval"]["benchmarks"].values()]
    config = load([f"experiment={name}"])
    found = [*leaves(config.data), *(each.data for each in config.eval.benchmarks.values())]
    return [(leaf, config.reward) for leaf in found if leaf.path or leaf.source in ("chains", "arithmetic")]


def brought(config, folder):
    """The section over a file that is there: a shipped one with its worked responses, or one written here."""
    if config.path is None:
        return dataclasses.replace(config, size=40)
    if config.path in WORKED:
        return dataclasses.replace(config, response_key="response")
    rows = BROUGHT[config.source, config.domain]
    path = folder / f"{config.source}_{config.domain}.{'csv' if config.source == 'gpqa' else 'jsonl'}"
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(config, path=str(path), split="all")


def followed(prompt: Prompt, answer: str) -> list[str]:
    """The responses of a model that does what the prompt says, with `answer`; none if it says nothing."""
    said = prompt.text
    options = dict(re.findall(r"^([A-D])\) (.*)$", said, re.MULTILINE))
    if options:
        forms = [answer, f"({answer})", f"{answer}) {options.get(answer)}", f"The answer is {answer}.",
                 f"\\text{{{answer}}}", f"\\text{{({answer}) {options.get(answer)}}}"]
        boxed = [f"thus \\boxed{{{form}}}." for form in forms]
        return boxed if "\\boxed{}" in said else [
            *forms[:4], *(f"Some thought.\n\n{form}" for form in forms[:4]), *boxed]
    if "\\boxed{}" in said:
        return [f"Step by step,\n\\boxed{{{answer}}}", f"thus $\\boxed{{{answer}}}$.", f"\\[\\boxed{{ {answer} }}\\]"]
    if "code block" in said:
        return [f"Here it is:\n```python\n{answer}\n```\n"]
    if said.endswith(" ="):
        return [f" {answer}", f" {answer}\n"]
    return []


@pytest.mark.parametrize("name", [*EXPERIMENTS, "docs/data.md"])
def test_who_follows_the_prompt_to_the_letter_is_right(name, tmp_path):
    judged = 0
    for config, reward in sections(name):
        section = brought(config, tmp_path)
        source = build_source(section, NoTokenizer(), Limits())
        routes = Routes(reward.routes, dataclasses.replace(reward, sandbox="unsafe"))
        for index in range(min(len(source), 40)):
            prompt = source.prompt(index)
            if prompt.domain not in reward.routes:  # SFT on answers that nothing judges
                continue
            solution = SOLUTION if prompt.domain == "code" and "code block" in prompt.text else prompt.answer
            right, wrong = followed(prompt, solution), followed(prompt, "C" if prompt.answer == "D" else "D")
            if section.response_key or section.source == "chains":  # the form is learnt from worked responses
                token_ids = source.sft_example(index)[1][:-1]
                right, wrong = [bytes(token_ids).decode()], ["\\boxed{D}", "D"]
            assert right, f"{name}: the prompt of {section.source} {config.path} does not say how to answer"
            scorer = routes.scorer(prompt.domain)
            assert [text for text in right if not scorer.score(prompt, text).correct] == []
            assert [text for text in wrong if scorer.score(prompt, text).value] == []
            judged += 1
    assert judged or "sft" in name or not sections(name)  # the pipeline names the data
