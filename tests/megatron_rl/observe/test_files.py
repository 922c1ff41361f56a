"""A file that a later start reads is never half there."""

import os

import pytest

from megatron_rl.observe.files import write_json, write_whole


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_what_stood_there_stays_when_writing_breaks_off(tmp_path, monkeypatch, broken):
    path = tmp_path / "decision.json"
    write_json(path, {"chosen": "epoch_02"})

    def stop(*_):
        raise KeyboardInterrupt

    if broken != "write":
        monkeypatch.setattr(os, broken, stop)
    with pytest.raises(KeyboardInterrupt if broken != "write" else UnicodeEncodeError):
        write_whole(path, "half of it" if broken != "write" else "half of it \ud800")
    assert path.read_text() == '{\n  "chosen": "epoch_02"\n}\n'
