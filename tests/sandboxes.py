"""Marks for tests that need the sandbox or a compiler; where there is none they skip and say how to get it."""

import shutil

import pytest

from megatron_rl.reward.languages import LANGUAGES
from megatron_rl.reward.sandbox import Bubblewrap


def _failure() -> str:
    try:
        Bubblewrap().check()
    except RuntimeError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(_failure()), reason=_failure() or "the sandbox runs")


def needs_language(language: str) -> pytest.MarkDecorator:
    tool = LANGUAGES[language].needs
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}: apt-get install g++ default-jdk-headless")
