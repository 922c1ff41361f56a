"""Section `rollout.agent`: a program of the user's that talks to the model in the middle of a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.rules import require

GATEWAY_KEY = "MEGATRON_RL_GATEWAY_KEY"


@dataclass(frozen=True)
class AgentConfig:
    """An agent that talks to the model through OpenAI's or Anthropic's SDK, one for each response (docs/agents.md).

    - kind: `command` starts a program. `python` calls an async function. `http` starts nothing: environment servers of
      yours fetch sessions from the gateway. null: no agent.
    - command: the program and its arguments. function: the dotted path of the async function.
    - concurrency: how many run at a time.
    - timeout_s: seconds that one may take; with `http` also how long a session waits to be fetched.
    - sequences: what one session trains. `concat`: the path to the turn that was answered last. `individual`: each
      turn once. Each further conversation or branch is then a sequence of its own with the same advantage.
    - history: `append` needs a chat template under which a longer conversation begins with the text of a shorter one.
      `keep_thinking` takes templates that cut the thinking out of earlier answers, and keeps it.
    - tool_call_parser, reasoning_parser: SGLang's names of its parsers of calls and thinking. null: an answer is handed
      on as it was sampled.
    - host, port: where the gateway listens. null: a free port. Every request needs the key of a session.
    - key_env: the environment variable that holds the gateway's own key. Whoever has it may open sessions.
    - max_messages, max_body_bytes: limits of one request.
    """

    kind: Literal["command", "python", "http"] | None = None
    command: tuple[str, ...] = ()
    function: str | None = None
    concurrency: int = 32
    timeout_s: float = 600.0
    sequences: Literal["concat", "individual"] = "concat"
    history: Literal["append", "keep_thinking"] = "append"
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    key_env: str = GATEWAY_KEY
    max_messages: int = 1000
    max_body_bytes: int = 4 << 20

    def __post_init__(self):
        for kind, key in (("command", "command"), ("python", "function")):
            given = bool(getattr(self, key))
            require(given or self.kind != kind, f"rollout.agent.kind={kind} needs rollout.agent.{key}")
            require(not given or self.kind == kind,
                    f"rollout.agent.{key} is read with rollout.agent.kind={kind}, and that is {self.kind}")
        require(self.kind != "http" or self.port is not None,
                "rollout.agent.kind=http needs rollout.agent.port, at which environment servers find the gateway")
        require(bool(self.key_env), f"rollout.agent.key_env is empty: leave it at {GATEWAY_KEY}")
        require(self.sequences == "concat" or self.kind is not None,
                f"rollout.agent.sequences={self.sequences} is read with a rollout.agent.kind, and that is None")
        for key in ("concurrency", "max_messages", "max_body_bytes"):
            require(getattr(self, key) >= 1, f"rollout.agent.{key}={getattr(self, key)} must be at least 1")
        require(self.timeout_s > 0, f"rollout.agent.timeout_s={self.timeout_s} must be positive")
        require(self.port is None or 1 <= self.port <= 65535, f"rollout.agent.port={self.port} must lie in 1 to 65535")
