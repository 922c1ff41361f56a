"""Logits of models with adapter folders, by peft: `python -m tests.peft_logits OUT TOKENS BASE ADAPTER ...`, in pairs,
saves {ADAPTER: (logits with it, logits of BASE alone, what peft says is missing in it)}.

A process of its own, as tests/transformers_logits.py.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(out: str, tokens: str, *folders: str) -> None:
    ids, found = torch.tensor([json.loads(tokens)]), {}
    for base, adapter in zip(folders[::2], folders[1::2], strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        alone = model(ids).logits[0]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, adapter)
        missing = [str(each.message) for each in seen if "missing" in str(each.message).lower()]
        found[adapter] = (adapted(ids).logits[0], alone, missing)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
