"""What may differ between a run and its continuation, and what would make another experiment of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.config.show import differences, flat

PASSING = ("run.resume", "run.resume_from", "run.accept_changes", "run.dir", "orchestrator.port", "rollout.engine.urls",
           "rollout.engine.router", "reward.remote.url", "reward.remote.key_env", "reward.judge.url",
           "reward.judge.key_env")
"""Keys of one start: nothing of the run depends on them."""
FREE = (
    "run.name", "run.save_every_steps", "run.keep_checkpoints", "run.async_save", "run.export_hf",
    "run.max_skipped_in_a_row", "run.keep_dumps", "run.dump_steps", "parallel.", "batch.", "model.recompute",
    "model.backend", "model.kernels.", "model.architecture", "optimizer.offload", "rollout.concurrency",
    "rollout.request_timeout_s", "rollout.retries", "rollout.max_failed_fraction", "rollout.environment_threads",
    "rollout.agent.concurrency",
    "rollout.agent.host", "rollout.agent.port", "rollout.publish", "rollout.verify_checksums",
    "rollout.probe_tolerance", "rollout.bucket_bytes", "rollout.engine.", "orchestrator.", "reward.workers",
    "reward.remote.timeout_s", "reward.remote.retries", "reward.judge.timeout_s", "reward.judge.retries", "eval.",
    "select.", "observe.", "slurm.", "pipeline.", "sft.export_epochs",
)
"""Keys, or beginnings of keys, that say how a run is done, watched and kept, and not what it learns."""
NOT_FREE = ("rollout.engine.dtype", "rollout.engine.deterministic", "rollout.engine.extra_args")


def changed(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of all that differs, but for PASSING."""
    return [row for row in differences(before, now) if not _passes(row[0]) and not _same_file(*row)]


def changes_experiment(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """Those of `changed` that change what the run learns."""
    found = [row for row in changed(before, now) if _matters(row[0], before)]
    phi = [config.algo.phi_global(config.parallel.dp) for config in (before, now)]
    if phi[0] != phi[1] and before.algo.phi == now.algo.phi:  # algo.scope=per_dp_rank in another layout
        found.append(("algo.phi over the cluster", phi[0], phi[1]))
    return found


def settings(raw: dict[str, Any]) -> dict[str, Any]:
    """A written configuration as {dotted key: value}, without PASSING."""
    return {key: value for key, value in flat(raw).items() if not _passes(key)}


def _passes(key: str) -> bool:
    """Whether it is one of PASSING, or where a teacher's servers are this time."""
    return key.startswith(PASSING) or (key.startswith("algo.distillation.teachers.")
                                       and key.endswith((".urls", ".api_key_env")))


def _matters(key: str, before: Config) -> bool:
    if key in ("run.steps", "sft.epochs"):  # more of the same, unless the learning rate looks at the end
        optimizer, stretched = before.optimizer, key == "run.steps" or before.sft.schedule_epochs is None
        return stretched and (optimizer.schedule != "constant" or optimizer.warmup_fraction is not None)
    return key in NOT_FREE or not key.startswith(FREE)


def _same_file(key: str, before: Any, now: Any) -> bool:
    """Two ways to write one place."""
    return (key.endswith(("path", "folder", "rubric", "checkpoint")) and isinstance(before, str)
            and isinstance(now, str) and Path(before).resolve() == Path(now).resolve())
