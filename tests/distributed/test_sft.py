"""Supervised fine-tuning is what plain torch does, in every layout, and RL goes on from exactly its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_rl.config.load import load, to_dict
from megatron_rl.launch.local import rank_environment, run_ranks
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.ports import choose_port
from tests.distributed.cases import relative_error
from tests.distributed.sft_reference import batches, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH = 3
LAYOUTS = ("single", "ep2", "tp2", "single_small", "dp2_small", "ep2_small", "pp2_small", "tp2_small")
"""Values of `parallel`. `_small` has small micro-batches, so that several make up a step."""
SMALL_TOKENS = 64
TOLERANCE = 2e-4  # of how far a weight moved in the epoch; measured: at most 5e-5


def configuration(folder: Path, layout: str):
    parallel, _, small = layout.partition("_")
    packing = [f"batch.tokens_per_microbatch={SMALL_TOKENS}"] if small else []
    return load(["experiment=quickstart_sft", f"parallel={parallel}", *packing, f"run.dir={folder / layout}",
                 f"model.path={folder / 'init'}", "sft.batch_size=6", f"sft.examples={6 * STEPS_PER_EPOCH}",
                 "sft.epochs=2", "sft.schedule_epochs=4", "sft.export_epochs=true", "sft.balance_coef=0.5",
                 "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "optimizer.warmup_steps=0",
                 "optimizer.warmup_fraction=0.1", "optimizer.min_lr_ratio=0.0", "observe.progress=false"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_random_model(folder / "init", seed=3)
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, list[dict]]:
    for layout in LAYOUTS:
        run_ranks("sft", configuration(folder, layout))
    return {layout: [json.loads(line) for line in (folder / layout / "metrics.jsonl").read_text().splitlines()]
            for layout in LAYOUTS}


@pytest.fixture(scope="module")
def reference(folder) -> tuple[list[float], dict]:
    """Losses of the first epoch and the weights after it, in float64."""
    weights = load_file(folder / "init" / "model.safetensors")
    return train(configuration(folder, "single"), weights,
                 json.loads((folder / "init" / "config.json").read_text()), steps=STEPS_PER_EPOCH)


def test_three_steps_lose_what_plain_torch_loses(reference, rows):
    expected, _ = reference
    assert expected[0] - expected[2] > 0.01  # it learns, so that a step that is wrong shows in the next
    for layout in LAYOUTS:
        found = [row["train/loss"] for row in rows[layout][:3]]
        print(f"{layout}: largest difference {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
        assert found == pytest.approx(expected, abs=1e-5), layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_moves_every_weight_as_plain_torch_does(layout, folder, reference, rows):
    """Whatever the layout, and with one micro-batch or several: no part of the loss is taken per micro-batch."""
    start = load_file(folder / "init" / "model.safetensors")
    found = load_file(folder / layout / "epochs" / "epoch_01" / "model.safetensors")
    assert found.keys() == reference[1].keys()
    errors = {name: relative_error(found[name], expected, expected - start[name].double())
              for name, expected in reference[1].items()}
    worst = max(errors, key=errors.get)
    print(f"{layout}: {worst} {errors[worst]:.1e}")
    assert errors[worst] < TOLERANCE, worst


def test_rl_starts_from_an_epochs_folder_with_equal_logprobs(folder, rows):
    """The fourth step's loss is what the weights after epoch 1 say of its examples, before they change."""
    config = configuration(folder, "single")
    exported = folder / "ep2" / "epochs" / "epoch_01"
    rl = load(["experiment=quickstart", "parallel=single", f"model.path={exported}", "algo.loss.kl_coef=0",
               "rollout.max_context_tokens=128", "data.split=train"])
    path, out = folder / "rl.json", folder / "logprob.json"
    path.write_text(json.dumps(to_dict(rl)))
    environment = rank_environment() | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                                        "MASTER_PORT": str(choose_port(None))}
    chosen = map(str, batches(config)[STEPS_PER_EPOCH])
    subprocess.run([sys.executable, "-m", "tests.distributed.sft_reference", str(path), str(out), *chosen],
                   cwd=ROOT, env=environment, check=True, timeout=600)
    logprob, loss = json.loads(out.read_text()), rows["ep2"][STEPS_PER_EPOCH]["train/loss"]
    print(f"mean log-probability: RL {logprob:.8f}, SFT {-loss:.8f}")
    assert -logprob == pytest.approx(loss, abs=1e-6)


def test_every_epoch_leaves_a_folder_and_the_last_is_the_result(folder, rows):
    last = load_file(folder / "single" / "epochs" / "epoch_02" / "model.safetensors")
    result = load_file(folder / "single" / "hf" / "model.safetensors")
    first = load_file(folder / "single" / "epochs" / "epoch_01" / "model.safetensors")
    assert all(last[name].equal(result[name]) for name in result)
    assert any(not first[name].equal(result[name]) for name in result)
