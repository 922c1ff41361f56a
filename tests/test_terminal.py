"""What a terminal of 80, 100 and 140 columns shows, as tmux has it on its screen. tests/golden/terminal holds it; after
a change that is meant, `python -m tests.test_terminal` writes it again."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_rl.recipes.quickstart import make_random_model
from tests.terminal_scenes import SCENES

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "terminal"
COLUMNS = (80, 100, 140)
END = "the scene has been played"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")]


def screen(scene: str, columns: int, folder: Path) -> str:
    """What stands on tmux's screen, and above it, when the scene has been played."""
    tmux = ["tmux", "-L", f"{scene}-{columns}-{os.getpid()}", "-f", "/dev/null"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "LANG": "C.UTF-8", "PYTHONPATH": paths}
    environment.pop("COLUMNS", None)
    command = shlex.join([sys.executable, "-W", "ignore", "-m", "tests.terminal_scenes", scene])
    subprocess.run([*tmux, "-u", "new-session", "-d", "-x", str(columns), "-y", "80", "-s", scene,
                    f"{command}; echo {END}; exec sleep 600"],
                   cwd=folder, env=environment, check=True)
    try:
        deadline, shown = time.monotonic() + 300, ""
        while END not in shown:  # on the screen, which tmux paints a moment after a program has written
            assert time.monotonic() < deadline, f"{scene} does not end"
            time.sleep(0.1)
            shown = subprocess.run([*tmux, "capture-pane", "-p", "-S", "-", "-t", scene], capture_output=True,
                                   text=True, check=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    return "\n".join(line.rstrip() for line in shown[:shown.index(END)].rstrip().splitlines()) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    make_random_model(folder / "model", seed=0, num_hidden_layers=2)
    return folder


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scene", SCENES)
def test_a_screen_is_as_it_was(scene, columns, folder):
    shown = screen(scene, columns, folder)
    assert max(map(len, shown.splitlines())) <= columns
    assert shown == (GOLDEN / f"{scene}_{columns}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        make_random_model(Path(name) / "model", seed=0, num_hidden_layers=2)
        for scene in SCENES:
            for columns in COLUMNS:
                (GOLDEN / f"{scene}_{columns}.txt").write_text(screen(scene, columns, Path(name)), encoding="utf-8")
