"""What the command line says to words that it does not know."""

import pytest

from megatron_rl import commands
from megatron_rl.cli import main


@pytest.mark.parametrize(("words", "said"), [
    (["rl", "--lr", "1e-5"], "rl does not take --lr: see megatron-rl rl --help (keys are written key=value"),
    (["doctor", "all"], "doctor does not take all: see megatron-rl doctor --help"),
    (["plan", "--gpu-memory", "-5"], "argument --gpu-memory: -5 must be positive"),
    (["data", "difficulty", "--out", "x", "--samples", "0"], "argument --samples: 0 must be at least 1")])
def test_words_that_no_command_takes_are_answered_with_its_help(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["replay-step", "nowhere"], "nowhere is not the dump of a step"),
    (["select-checkpoint"], "select.folder is not set"),
    (["report", "nowhere", "--out", "/"], "--out / is a folder"),
    (["report", "nowhere"], "nowhere is not the directory of a run"),
    (["config", "diff", __file__], f"{__file__} is not JSON"),
    (["evaluate", "runs"], "override 'runs' must look like section.key=value")])
def test_a_wrong_input_ends_with_exit_code_2_and_one_line(words, said, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("error", "code", "said"), [
    (KeyboardInterrupt(), 130, "stopped"), (commands.RunInterrupted(), 130, "stopped"),
    (commands.RunInterrupted("stopped; step 4"), 130, "stopped; step 4"), (ValueError(), 2, "ValueError"),
    (OSError(), 2, "OSError"), (FileNotFoundError(2, "No such file", "x"), 2, "No such file: 'x'"),
    (commands.RunFailed(), 1, "RunFailed"), (commands.RunFailed("engine gone"), 1, "engine gone")])
def test_every_end_has_its_exit_code_and_says_something(error, code, said, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "doctor", fail)
    assert main(["doctor"]) == code
    err = capsys.readouterr().err
    assert err.startswith("megatron-rl: ") and said in err and err.strip() != "megatron-rl:"
