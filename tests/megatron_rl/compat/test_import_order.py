"""Torch is adapted for Megatron when megatron.core is imported, and not before. Each case needs its own process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATCHED = "torch.cuda.current_device.__module__ == 'megatron_rl.compat.megatron_cpu'"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)


def test_pure_modules_leave_torch_alone():
    done = python("import sys, torch, megatron_rl.model.hf_folder, megatron_rl.model.slots, megatron_rl.batch\n"
                  f"assert not {PATCHED}\n"
                  "assert 'megatron.core' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_module_that_imports_megatron_finds_torch_adapted():
    done = python("import torch, megatron_rl.train_step.logprobs\n"
                  f"assert {PATCHED} or torch.cuda.is_available()")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_megatron_imported_too_early_is_an_error_that_says_what_to_do():
    done = python("import sys, torch, types\ntorch.cuda.is_available = lambda: False\n"
                  "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\nimport megatron_rl")
    assert "import megatron_rl before megatron.core" in done.stderr


@pytest.mark.slow
def test_megatron_leaves_wandb_alone_and_a_run_can_have_it():
    done = python("import sys, megatron_rl.train_step.logprobs\n"
                  "assert 'wandb' not in sys.modules\n"
                  "import wandb")
    assert done.returncode == 0, done.stderr


def test_a_process_that_judges_responses_does_without_torch():
    done = python("import sys, megatron_rl.reward, megatron_rl.reward.judges, math_verify\n"
                  "assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
