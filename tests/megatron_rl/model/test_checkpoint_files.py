"""Which checkpoint a run goes on from, and what is said when it is damaged or of another model. No rank is started."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_rl.config.schema import RunConfig
from megatron_rl.model import checkpoint_files as files

MODEL = {"hidden_size": 64, "num_experts": 8, "max_position_embeddings": 512}


def save(run_dir: Path, step: int, *, keep: int = 9, allowed=lambda: None) -> Path:
    """A checkpoint of two files, written as Checkpoints does."""
    folder = run_dir / "checkpoints"
    partial = folder / f"{files.step_name(step)}.partial"
    partial.mkdir(parents=True)
    entries = {}
    for name in ("rank_00000.safetensors", "loop.json"):
        with files.writing(partial / name) as file:
            file.write(f"{name} of step {step}".encode())
        entries[name] = file.entry
    manifest = {"format": files.FORMAT, "step": step, "model": MODEL, "files": entries}
    files.commit(partial, folder / files.step_name(step), manifest, keep=keep, allowed=allowed)
    return folder / files.step_name(step)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def resume(run_dir: Path, resume_from: str | None = None) -> RunConfig:
    return RunConfig(dir=str(run_dir), resume=True, resume_from=resume_from)


def test_the_newest_is_chosen_and_an_unfinished_one_never(tmp_path):
    assert files.choose(resume(tmp_path)) is None
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_00000011.partial").mkdir()
    assert files.choose(resume(tmp_path)) == newest
    assert files.step_of(newest) == 10


def test_a_start_that_is_overtaken_while_it_waits_for_the_disk_changes_nothing(tmp_path, monkeypatch):
    """A file server may be away for minutes, and meanwhile the run starts elsewhere."""
    older, sync = [save(tmp_path, step) for step in (1, 2)], files.sync

    def check() -> None:
        if overtaken:
            raise OSError("overtaken")

    overtaken, late = [], []
    monkeypatch.setattr(files, "sync", lambda folder: [sync(folder), overtaken.append(1) if late.pop(0) else None])
    for late_at, stay in ((0, older), (1, [*older, older[0].with_name(files.step_name(3))])):
        overtaken.clear()
        late[:] = [number == late_at for number in range(2)]  # the disk's answers before and after the first rename
        with pytest.raises(OSError, match="overtaken"):
            save(tmp_path, 3, keep=1, allowed=check)
        assert [path.name for path in stay] == [name for name in names(tmp_path) if not name.endswith(".partial")]
        files.clean(tmp_path / "checkpoints")


def test_checkpoints_of_an_earlier_run_are_not_built_upon_unasked(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(ValueError, match="resume=true, or choose another run.dir"):
        files.choose(RunConfig(dir=str(tmp_path)))


def test_another_one_is_taken_when_asked_for_by_name(tmp_path):
    old = save(tmp_path, 2)
    save(tmp_path, 4)
    assert files.choose(resume(tmp_path, "step_00000002")) == old
    with pytest.raises(ValueError, match="run.resume_from=step_00000003: .* holds step_00000002, step_00000004"):
        files.choose(resume(tmp_path, "step_00000003"))
    with pytest.raises(ValueError, match="run.resume_from=step_00000002 needs run.resume=true"):
        RunConfig(resume_from="step_00000002")


def test_going_back_sets_newer_ones_aside_and_loses_nothing(tmp_path):
    old = save(tmp_path, 2)
    for _ in range(2):  # twice: names never collide
        save(tmp_path, 4)
        files.set_aside_after(old)
    assert names(tmp_path) == ["step_00000002", "step_00000004.aside1", "step_00000004.aside2"]
    assert files.saved_steps(tmp_path / "checkpoints") == [2]


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000006", "step_00000008"]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    save(tmp_path, 2)
    for name in ("step_00000004.partial", "step_00000001.dropped"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "loop.json").write_text("{")
    files.clean(tmp_path / "checkpoints")
    assert names(tmp_path) == ["step_00000002"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "cut_short": ("rank_00000.safetensors", cut, r"rank_00000.safetensors has 29 bytes, 32 were written"),
    "missing": ("loop.json", Path.unlink, r"loop.json is missing"),
    "no_manifest": ("manifest.json", Path.unlink, r"manifest.json is missing"),
    "cut_manifest": ("manifest.json", cut, r"manifest.json or manifest.sha256 beside it has changed"),
    "no_sum": ("manifest.sha256", Path.unlink, r"manifest.sha256 is missing"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_names_the_file_and_the_last_good_checkpoint(tmp_path, name, damage, message):
    save(tmp_path, 2)
    damaged = save(tmp_path, 4)
    damage(damaged / name)
    with pytest.raises(files.DamagedCheckpoint, match=f"step_00000004/{message}") as raised:
        files.check_resume(resume(tmp_path), MODEL)
    assert "the last good checkpoint is step_00000002: go on from it with resume=true run.resume_from=step_00000002" \
        in str(raised.value)
    files.check_resume(resume(tmp_path, "step_00000002"), MODEL)  # asked for, it is used
    assert names(tmp_path) == ["step_00000002", "step_00000004"]  # and nothing was lost


def test_a_changed_byte_is_found_by_its_checksum(tmp_path):
    checkpoint = save(tmp_path, 2)
    file = checkpoint / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b"step 2", b"step 3"))
    manifest = files.read_manifest(checkpoint)
    files.check_sums(checkpoint, manifest, ["loop.json"])
    with pytest.raises(files.DamagedCheckpoint, match="rank_00000.safetensors has changed since it was written"):
        files.check_sums(checkpoint, manifest, manifest["files"])


def test_advice_passes_over_other_damaged_ones(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    four, six = (tmp_path / "checkpoints" / files.step_name(step) for step in (4, 6))
    (four / "loop.json").write_bytes((four / "loop.json").read_bytes().replace(b"4", b"5"))
    assert "run.resume_from=step_00000002" in files.advice(six)
    cut(six.parent / "step_00000002" / "loop.json")
    assert files.advice(six) == "no earlier checkpoint is whole: begin again in another run.dir"


def test_a_checkpoint_of_another_model_names_the_keys(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(ValueError, match="of another model than model.path: hidden_size is 64 there and 96 here; "
                                         "num_experts is 8 there and 4 here; give its model.path") as raised:
        files.check_resume(resume(tmp_path), {**MODEL, "hidden_size": 96, "num_experts": 4})
    assert not isinstance(raised.value, files.DamagedCheckpoint)
    files.check_resume(resume(tmp_path), {**MODEL, "max_position_embeddings": 1024})  # no shape follows from it


def test_what_no_network_had_when_a_checkpoint_was_written_has_its_default_there(tmp_path):
    save(tmp_path, 2)
    files.check_resume(resume(tmp_path), {**MODEL, "score_function": "softmax"})
    with pytest.raises(ValueError, match="model.path: score_function is softmax there and sigmoid here; give"):
        files.check_resume(resume(tmp_path), {**MODEL, "score_function": "sigmoid"})


def test_another_format_is_refused(tmp_path):
    checkpoint = save(tmp_path, 2)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    (checkpoint / "manifest.sha256").write_text(
        subprocess.run(["sha256sum", "manifest.json"], cwd=checkpoint, capture_output=True, text=True).stdout)
    with pytest.raises(ValueError, match="manifest.json: format 99, this version reads format 3"):
        files.read_manifest(checkpoint)
