"""`megatron-rl select-checkpoint` on two checkpoints, each served by a real engine."""

import json
import math

import pytest
from safetensors.torch import load_file, save_file

from megatron_rl import cli
from megatron_rl.recipes.quickstart import make_random_model

pytestmark = pytest.mark.slow


def test_entropies_are_those_of_the_policies_and_the_rule_chooses(tmp_path):
    """A head of zeros makes every token as likely as any: entropy ln 96. Three times the head: a good deal less."""
    for epoch, factor in ((1, 0.0), (2, 3.0)):
        folder = tmp_path / "sft" / "epochs" / f"epoch_{epoch:02d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_random_model(folder, seed=0, num_hidden_layers=2)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] *= factor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["select-checkpoint", "experiment=quickstart", f"select.folder={tmp_path / 'sft'}",
                     f"run.dir={tmp_path / 'rl'}", "select.problems=8", "select.samples=4", "select.entropy_low=4.5",
                     "select.entropy_high=4.6", "rollout.max_response_tokens=24",
                     "reward.routes.math=tests.rewards.brevity"]) == 0
    decision = json.loads((tmp_path / "rl" / "selection" / "decision.json").read_text())
    uniform, peaked = decision["candidates"]
    print(f"entropy: uniform {uniform['entropy']:.5f} (exactly {math.log(96):.5f}), peaked {peaked['entropy']:.3f}")
    assert uniform["entropy"] == pytest.approx(math.log(96), abs=1e-4)
    assert peaked["entropy"] < uniform["entropy"] - 0.1
    assert decision["chosen"] == uniform["path"] and (tmp_path / "rl" / "selection" / "selection.png").is_file()
