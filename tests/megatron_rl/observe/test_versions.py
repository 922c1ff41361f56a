"""What a result was made with can be found out anywhere, with and without git."""

import json
import subprocess

from megatron_rl.observe.versions import collect_versions, git_state, package_version


def test_versions_are_json_and_say_what_is_installed():
    versions = json.loads(json.dumps(collect_versions()))
    assert versions["python"].startswith("3.")
    assert versions["packages"]["megatron-core"] == package_version("megatron-core")
    assert versions["machine"]["cpu"] and versions["machine"]["memory_gb"] > 0


def test_a_package_that_is_not_there_is_none():
    assert package_version("no-such-distribution") is None


def test_git_state_tells_a_clean_tree_from_a_changed_one(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "new").touch()
    assert git_state(tmp_path)["modified"] is True
