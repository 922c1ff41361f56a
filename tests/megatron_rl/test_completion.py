"""The completion script does in a real bash what a user expects of the tab key."""

import subprocess

import pytest

from megatron_rl.cli import parser
from megatron_rl.completion import script


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(script("bash", parser()))

    def complete(line: str) -> list[str]:
        done = subprocess.run(["bash", "--norc", "-c", f"""source {path}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
_megatron_rl; printf '%s\\n' "${{COMPREPLY[@]}}" """], capture_output=True, text=True)
        assert not done.stderr, done.stderr
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(("line", "offered"), [
    ("megatron-rl sl", ["slurm"]),
    ("megatron-rl data de", ["dedup", "decontaminate"]),
    ("megatron-rl rl algo.ph", ["algo.phi="]),
    ("megatron-rl rl --che", ["--check"]),
    ("megatron-rl rehearse ran", ["rank=", "ranks="]),
    ("megatron-rl rehearse ranks=", ["stages"]),
    ("megatron-rl rl parallel=tp2 algo=gr", ["grpo"]),
    ("megatron-rl rl --check algo.cutoff=", ["token", "response"]),
    ("megatron-rl slurm run.async_save=t", ["true"]),
    ("megatron-rl completion z", ["zsh"])])
def test_the_tab_key_offers(bash, line, offered):
    assert bash(line) == offered


def test_after_a_command_that_takes_no_keys_files_are_offered(bash):
    assert "conf" in bash("megatron-rl report con")


def test_zsh_reads_the_same_script_through_its_own_bash_completion():
    text = script("zsh", parser())
    assert "bashcompinit" in text and text.endswith(script("bash", parser()).split("keys=", 1)[1])
