"""Section `orchestrator`: the process that samples, judges and decides, and how long others wait for it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.rules import require

RUN_KEY = "MEGATRON_RL_RUN_KEY"
"""The environment variable that holds the key of one run: the orchestrator and the ranks inherit it."""


@dataclass(frozen=True)
class OrchestratorConfig:
    """The orchestrator of an RL run: one process without a GPU. The trainer's ranks ask it what to do.

    - host, port: where it listens. On one machine that is loopback; a Slurm job names the first node. Without a port a
      free one is found. Every request carries the key of the run.
    - wait_timeout_s: how long the trainer waits for an orchestrator that does not answer.
    - max_restarts: how often an orchestrator that was killed or hangs is started again.
    - hang_timeout_s: how long an orchestrator or a rank may be silent before it counts as hung. A hung rank ends the
      run.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    wait_timeout_s: float = 600.0
    max_restarts: int = 5
    hang_timeout_s: float = 45.0

    def __post_init__(self):
        require(self.port is None or 1 <= self.port <= 65535, f"orchestrator.port={self.port} must lie in 1 to 65535")
        for name in ("wait_timeout_s", "hang_timeout_s"):
            require(getattr(self, name) > 0, f"orchestrator.{name}={getattr(self, name)} must be positive")
        require(self.max_restarts >= 0, f"orchestrator.max_restarts={self.max_restarts} must not be negative")
