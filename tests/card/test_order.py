"""`make test-gpu` goes through the parts in order, and says why it skips what it cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.card.place import NO_CARD
from tests.distributed.conftest import REPOSITORY

pytestmark = pytest.mark.slow

ORDER = (
    "test_the_doctor_misses_nothing",
    "test_the_kernels_are_those_of_float64",
    "test_a_backend_keeps_the_error_budget_of_bfloat16",
    "test_a_slice_of_ling_lite_trains_in_the_memory_of_the_plan",
    "test_an_engine_answers_with_the_log_probabilities_of_its_weights",
    "test_published_weights_arrive_bit_for_bit",
    "test_a_colocated_engine_gives_its_memory_up_and_gets_it_back",
    "test_a_step_trains_publishes_and_is_saved",
    "test_the_run_goes_on_from_its_checkpoint",
)
"""What comes later needs what comes before."""


def test_without_a_card_every_part_is_skipped_in_order_and_says_so():
    makefile = (REPOSITORY / "Makefile").read_text()
    (command,) = re.findall(r"MEGATRON_RL_TEST_GPU=1 \$\(VENV\)/python (-m pytest .*) \$\(ARGS\)", makefile)
    assert "--session-timeout=480" in command
    done = subprocess.run([sys.executable, *command.split(), "-p", "no:cacheprovider"], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "MEGATRON_RL_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400"})
    assert done.returncode == 0, done.stdout
    ran = re.findall(r"^tests/card/\S+::(\w+)\S* (\w+) (.*?) +\[", done.stdout, flags=re.MULTILINE)
    assert list(dict.fromkeys(name for name, *_ in ran)) == list(ORDER)
    assert {outcome for _, outcome, _ in ran} == {"SKIPPED"}
    assert {reason for *_, reason in ran} == {f"({NO_CARD})"}
    assert re.search(rf"=+ {len(ran)} skipped, \d+ deselected in ", done.stdout)


def test_the_page_lists_the_files_in_this_order():
    listed = re.findall(r"^\| `(test_\d_\w+\.py)` \|", (REPOSITORY / "docs" / "gpu.md").read_text(), flags=re.MULTILINE)
    assert listed == sorted(path.name for path in (REPOSITORY / "tests" / "card").glob("test_[0-9]_*.py"))
