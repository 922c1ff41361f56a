"""Rules of section rollout.engine: each names its key."""

import pytest

from megatron_rl.config.rollout import EngineConfig, RolloutConfig, is_loopback


@pytest.mark.parametrize("options, message", [
    ({"urls": ("http://127.0.0.1:1", "http://node7:1")}, r"names http://node7:1 .*set rollout\.engine\.api_key_env"),
    ({"extra_args": ("--tp-size=2",)}, r"extra_args: --tp-size is set by rollout\.engine\.tp"),
    ({"extra_args": ("--api-key", "secret")}, r"extra_args: --api-key is set by rollout\.engine\.api_key_env"),
    ({"tp": 2, "device": "cpu"}, r"rollout\.engine\.tp=2 needs rollout\.engine\.device=cuda"),
    ({"extra_args": ("--context-length=64",)}, r"extra_args: --context-length is set by rollout\.max_context_tokens"),
    ({"control_timeout_s": 0.0}, r"rollout\.engine\.control_timeout_s=0\.0"),
])
def test_a_rule_names_its_key(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_engines_elsewhere_are_taken_with_a_key_and_here_without():
    EngineConfig(urls=("https://node7:1",), api_key_env="KEY")
    EngineConfig(urls=("http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"))
    assert not is_loopback("0.0.0.0") and not is_loopback(None)


def test_the_engines_cache_holds_one_whole_sequence_and_what_the_engine_keeps():
    """SGLang ends a sequence early when its pool has less than the context (scheduler.py: init_req_max_new_tokens)."""
    assert RolloutConfig(max_context_tokens=512).engine_context_tokens == 518
    assert RolloutConfig(max_context_tokens=512, engine=EngineConfig(max_total_tokens=518)).max_context_tokens == 512
    with pytest.raises(ValueError, match=r"engine\.max_total_tokens=517 is less than .*max_context_tokens=512"):
        RolloutConfig(max_context_tokens=512, engine=EngineConfig(max_total_tokens=517))
