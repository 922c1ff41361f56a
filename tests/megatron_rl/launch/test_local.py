"""What the launcher says and follows, without starting ranks (tests/engine/test_runs.py does that)."""

import json

import pytest

from megatron_rl.launch import local
from megatron_rl.observe.jsonl import keep_rows


def test_the_first_traceback_is_shown_not_what_followed_from_it(tmp_path):
    log = tmp_path / "trainer.log"
    earlier = b"Traceback (most recent call last):\n  File old.py\nValueError: of an earlier run\n"
    log.write_bytes(earlier + b"loading\n[rank0]: Traceback (most recent call last):\n"
                    b"[rank0]:   File \"data.py\", line 3\n"
                    b"[rank0]: ValueError: problems.jsonl:2: no column 'answer'\n"
                    b"Traceback (most recent call last):\n  File \"torch/run.py\"\nChildFailedError: it failed\n")
    words = local.last_words(log, len(earlier))
    assert "problems.jsonl:2: no column 'answer'" in words
    assert "earlier run" not in words
    assert words.index("problems.jsonl:2") < 120


TORCHRUN_SAYS = """Traceback (most recent call last):
  File "torch/distributed/run.py"
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
[0]:
  exitcode  : -9 (pid: 5631)  (SIGKILL)
"""
ANOTHER_RANK_SAYS = """Traceback (most recent call last):
  File "loop.py", line 3
RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29344
rank 1 (pid 24884) ended with exitcode: -9 ; the other ranks were ended with it
"""


@pytest.mark.parametrize("said", [TORCHRUN_SAYS, ANOTHER_RANK_SAYS])
def test_a_rank_killed_for_memory_is_said_in_words(said, tmp_path):
    log = tmp_path / "trainer.log"
    log.write_text(said)
    assert "batch.tokens_per_microbatch" in local.last_words(log, 0)


def test_without_a_traceback_the_last_lines_are_shown(tmp_path):
    log = tmp_path / "trainer.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert local.last_words(log, 0).splitlines() == [f"line {i}" for i in range(92, 100)]


@pytest.mark.parametrize("saved", [None, 2])
def test_progress_follows_a_run_that_goes_on(tmp_path, saved):
    """However much is written between two looks, and whatever was in the log before."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 10.0**step} for step in range(1, 6)]  # each line longer than the one before
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines[:3]))
    follower = local.JsonlTail(path, saved)
    assert follower.new_rows() == []
    keep_rows(path, lambda row: row["step"] <= (saved or 0))
    going_on = saved or 0
    with path.open("a") as file:
        file.write("".join(lines[going_on:4]) + lines[4][:5])
    assert follower.new_rows() == rows[going_on:4]  # the half line waits
    with path.open("a") as file:
        file.write(lines[4][5:])
    assert follower.new_rows() == rows[4:]


def test_progress_shows_the_first_rows_of_a_new_run(tmp_path):
    follower = local.JsonlTail(tmp_path / "eval.jsonl", None)
    assert follower.new_rows() == []
    (tmp_path / "eval.jsonl").write_text('{"step": 0}\n')
    assert follower.new_rows() == [{"step": 0}]


def test_no_disk_space_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(OSError, match=rf"run.dir={tmp_path}: .* MiB free, at least .* choose another run.dir"):
        local.check_disk(tmp_path)


WORDS = {  # last words of the ranks -> what may be advised when step 40 was saved, and when nothing was
    "ValueError: sft.examples=9: problems.jsonl:2: no column 'answer'": "mend the cause first. Then ",
    "megatron_rl.data.rows.BadRow: x\nValueError: the answer is no number": "mend the cause first. Then ",
    "AssertionError: tokens": "mend the cause first. Then ",
    "RuntimeError: Connection closed by peer": "",
    "OSError: [Errno 28] No space left on device": "",
    "a rank was killed (SIGKILL), most likely because memory ran out: lower batch.tokens_per_microbatch": "",
    "megatron_rl.sync.publish.PublishError: no engine answered": "",
}


@pytest.mark.parametrize("words", WORDS)
def test_only_what_the_failure_allows_is_advised(words, tmp_path):
    said = local.how_to_go_on(tmp_path, words)
    assert said.startswith("the same command would end the same way: mend the cause first. Then ") == bool(WORDS[words])
    assert said.endswith("no checkpoint had been written yet: the same command begins again")
    (tmp_path / "metrics.jsonl").touch()  # which the same command alone would refuse
    assert local.how_to_go_on(tmp_path, words).endswith("the same command begins again with resume=true")
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)
    said = local.how_to_go_on(tmp_path, words)
    assert said.endswith("the same command with resume=true goes on") and "last checkpoint is step 40" in said
    assert ("mend the cause first" in said) == bool(WORDS[words])


def test_a_damaged_checkpoint_has_its_own_advice_and_no_other(tmp_path):
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)
    words = "DamagedCheckpoint: damaged checkpoint: loop.json is missing; go on with resume=true run.resume_from=step_1"
    assert "resume=true" not in local.how_to_go_on(tmp_path, words)


@pytest.mark.parametrize("error", [ValueError("no such key"), OSError(28, "full", "/x"), OSError(), ValueError()])
def test_what_goes_wrong_after_the_start_is_a_failed_run(error):
    with pytest.raises(local.RunFailed) as raised, local.after_start():
        raise error
    assert str(raised.value) == (str(error) or type(error).__name__) != ""


def test_resume_advice_names_the_newest_checkpoint(tmp_path):
    assert "no checkpoint had been written yet" in local.how_to_resume(tmp_path)
    for name in ("step_00000020", "step_00000040", "step_00000060.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "step 40" in local.how_to_resume(tmp_path)
