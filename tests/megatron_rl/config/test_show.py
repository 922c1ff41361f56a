"""`megatron-rl config`: what a configuration resolves to, and where two differ."""

import json

import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.config.load import build, load, to_dict
from megatron_rl.config.schema import Config
from megatron_rl.config.show import as_yaml, differences, named


def test_what_is_shown_can_be_read_back():
    config = load(["experiment=quickstart", "algo.phi=77"])
    assert build(yaml.safe_load(as_yaml(config))) == config


def test_differences_are_the_keys_that_were_set():
    changed = load(["algo.phi=77", "parallel=ep2"])
    found = {key: (left, right) for key, left, right in differences(Config(), changed)}
    assert found["algo.phi"] == (4096, 77)
    assert found["parallel.ep"] == (1, 2)
    assert all(key.startswith(("algo.", "parallel.")) for key in found)
    assert differences(changed, changed) == []


def test_a_run_is_compared_by_its_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(load(["optimizer.lr=0.5"]))))
    assert named(str(tmp_path)).optimizer.lr == 0.5
    assert main(["config", "diff", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.lr" in shown
    assert "0.5" in shown


def test_a_name_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="runs/nothing: neither a run's folder"):
        named("runs/nothing")
