"""Logits of transformers' own models: `python -m tests.transformers_logits OUT TOKENS FOLDER...` saves them by folder.

A process of its own: torch as it is adapted for Megatron on a CPU confuses from_pretrained.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(out: str, tokens: str, *folders: str) -> None:
    ids = torch.tensor([json.loads(tokens)])
    models = {folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders}
    for folder, model in models.items():
        with open(f"{folder}/config.json") as file:
            assert type(model).__name__ == json.load(file)["architectures"][0]
    torch.save({folder: model(ids).logits[0] for folder, model in models.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
