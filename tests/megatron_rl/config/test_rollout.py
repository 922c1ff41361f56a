"""Rules of section rollout.engine: each names its key."""

import pytest

from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig, is_loopback
from megatron_rl.rollout.engine_command import draw_key, engine_key


@pytest.mark.parametrize("options, message", [
    ({"api_key_env": ""}, r"rollout\.engine\.api_key_env is empty"),
    ({"extra_args": ("--tp-size=2",)}, r"extra_args: --tp-size is set by rollout\.engine\.tp"),
    ({"extra_args": ("--api-key", "secret")}, r"extra_args: --api-key is set by rollout\.engine\.api_key_env"),
    ({"tp": 2, "device": "cpu"}, r"rollout\.engine\.tp=2 needs rollout\.engine\.device=cuda"),
    ({"extra_args": ("--context-length=64",)}, r"extra_args: --context-length is set by rollout\.max_context_tokens"),
    ({"control_timeout_s": 0.0}, r"rollout\.engine\.control_timeout_s=0\.0"),
])
def test_a_rule_names_its_key(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_the_engines_cache_holds_one_whole_sequence_and_what_the_engine_keeps():
    """SGLang ends a sequence early when its pool has less than the context (scheduler.py: init_req_max_new_tokens)."""
    assert RolloutConfig(max_context_tokens=512).engine_context_tokens == 518
    assert RolloutConfig(max_context_tokens=512, engine=EngineConfig(max_total_tokens=518)).max_context_tokens == 512
    with pytest.raises(ValueError, match=r"engine\.max_total_tokens=517 is less than .*max_context_tokens=512"):
        RolloutConfig(max_context_tokens=512, engine=EngineConfig(max_total_tokens=517))


@pytest.mark.parametrize("url", ["https://node7:1", "http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"])
@pytest.mark.parametrize("variable", [ENGINE_KEY, "THEIR_KEY"])
def test_every_engine_that_runs_already_needs_a_key_on_loopback_too(url, variable, monkeypatch):
    monkeypatch.setenv(variable, "secret")
    engine = EngineConfig(urls=(url,), api_key_env=variable)
    assert engine_key(engine) == "secret"
    monkeypatch.delenv(variable)
    draw_key(engine)  # only for engines that we start
    with pytest.raises(ValueError, match=rf"api_key_env={variable}: that environment variable is not set"):
        engine_key(engine)


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True),
                                                ("::1", True), ("0.0.0.0", False), ("node7", False), (None, False)])
def test_what_is_loopback(host, expected):
    assert is_loopback(host) is expected
