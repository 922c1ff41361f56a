"""Section `rollout`: what is sampled, by which engines, and how weights reach them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from megatron_rl.config.agent import AgentConfig
from megatron_rl.config.rules import require, require_real_breaks

ENGINE_KEY = "MEGATRON_RL_ENGINE_KEY"
"""The environment variable that holds the key of engines that we start."""
ENGINE_KEEPS = 6
"""Positions of its context that SGLang 0.5.23 never fills. A prompt must leave 7 of --context-length (tp_worker.py:
get_worker_info, managers/utils.py: validate_input_length), a whole sequence 2 (scheduler.py: init_req_max_new_tokens).
A request that goes on has up to rollout.max_context_tokens - 1 tokens, so the engine's context is 6 longer."""
PROBE_TOLERANCES = {"float32": 0.01, "bfloat16": 2.0}
"""Defaults of rollout.probe_tolerance, in nats: far above rounding, far below what other weights do to a prompt."""
RESERVED_FLAGS = {"--api-key": "rollout.engine.api_key_env", "--tp": "rollout.engine.tp",
                  "--tp-size": "rollout.engine.tp", "--tensor-parallel-size": "rollout.engine.tp",
                  "--base-gpu-id": "rollout.engine.first_gpu", "--host": "rollout.engine.host",
                  "--port": "rollout.engine.port", "--context-length": "rollout.max_context_tokens"}


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches `host`, as far as its name tells."""
    return host is not None and (host in ("localhost", "::1") or host.startswith("127."))


@dataclass(frozen=True)
class EngineConfig:
    """The SGLang servers.

    - count: how many servers the run starts, unless urls are given.
    - urls: servers that run already, which are used as they are. Start them with --context-length
      rollout.max_context_tokens + 6.
    - host, port: where a started server listens. Without a port a free one is found.
    - tp: GPUs of one server, which divides the model among them. first_gpu: the first GPU of the first server on a
      machine; the others follow. The trainer's ranks take the GPUs from 0 on, so leave them room, or set colocate.
    - colocate: engines and ranks share the GPUs. The engines give up all GPU memory while the trainer trains. Servers
      of `urls` need --enable-memory-saver.
    - router: `local` starts an sglang-router (a package of its own), a URL names one. It chooses an engine for each
      request. Without one, a request goes to the engine with the fewest requests. router_policy: how the router
      chooses.
    - api_key_env: the environment variable that holds the servers' key. Every server asks for a key, on loopback too,
      because any local user could otherwise give it other weights. If the variable is not set, each run draws a key for
      the servers that it starts. For `urls`, set it to the key that they were started with (--api-key). Keys are never
      written down. Whoever can read the network between two machines can read the key, unless the URLs are https.
    - device: where a server computes. `auto`: on GPUs if the machine has them. dtype: the type of its weights; null:
      model.dtype.
    - max_running_requests: requests that a server works on at a time. max_total_tokens: tokens of its key-value cache;
      null: SGLang's choice. mem_fraction_static: share of GPU memory for weights and cache.
    - threads: threads of a server on a CPU; null: SGLang's choice. extra_args: more of the server's flags.
    - start_timeout_s: how long a server has until it answers. stop_timeout_s: how long it has to end.
    - health_interval_s: how often a server is checked. hang_timeout_s: how long it may be silent before it is killed
      and started again. max_restarts: how often each may be started again without an hour of service in between.
    - wait_timeout_s: how long a request waits for a server that holds the current weights. control_timeout_s: how long
      pausing, joining a broadcast and the like may take.
    - deterministic: a response depends on its own seed alone, at a cost of speed.
    """

    urls: tuple[str, ...] = ()
    count: int = 1
    host: str = "127.0.0.1"
    tp: int = 1
    first_gpu: int = 0
    colocate: bool = False
    router: str | None = None
    router_policy: Literal["cache_aware", "round_robin", "random"] = "cache_aware"
    api_key_env: str = ENGINE_KEY
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    port: int | None = None
    max_running_requests: int = 256
    max_total_tokens: int | None = 65536
    mem_fraction_static: float = 0.5
    start_timeout_s: float = 1800.0
    stop_timeout_s: float = 30.0
    health_interval_s: float = 2.0
    hang_timeout_s: float = 30.0
    wait_timeout_s: float = 600.0
    control_timeout_s: float = 60.0
    max_restarts: int = 5
    threads: int = 1
    deterministic: bool = False
    extra_args: tuple[str, ...] = ()

    def __post_init__(self):
        require(0 < self.mem_fraction_static < 1,
                f"rollout.engine.mem_fraction_static={self.mem_fraction_static} must lie between 0 and 1")
        require(self.count >= 1, f"rollout.engine.count={self.count} must be at least 1")
        require(self.port is None or self.count == 1,
                f"rollout.engine.port={self.port} is one port for rollout.engine.count={self.count} servers: leave it "
                "unset to have free ones found")
        require(self.port is None or 1 <= self.port <= 65535, f"rollout.engine.port={self.port} must lie in 1 to 65535")
        routers = () if self.router in (None, "local") else (self.router,)
        for url in (*self.urls, *routers):
            require(urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname),
                    f"{'rollout.engine.router' if url in routers else 'rollout.engine.urls'}: {url!r} must look like "
                    "http://127.0.0.1:30000")
        require(len(set(self.urls)) == len(self.urls), "rollout.engine.urls names an engine twice")
        require(self.tp >= 1, f"rollout.engine.tp={self.tp} must be at least 1")
        require(self.first_gpu >= 0, f"rollout.engine.first_gpu={self.first_gpu} must not be negative")
        require(self.tp == 1 or self.device != "cpu", f"rollout.engine.tp={self.tp} needs rollout.engine.device=cuda")
        for flag, key in RESERVED_FLAGS.items():
            require(not any(arg.split("=")[0] == flag for arg in self.extra_args),
                    f"rollout.engine.extra_args: {flag} is set by {key}")
        require(bool(self.api_key_env), "rollout.engine.api_key_env is empty: name the environment variable that holds "
                f"the servers' key, or leave it at {ENGINE_KEY}")
        require(self.max_restarts >= 0, f"rollout.engine.max_restarts={self.max_restarts} must not be negative")
        for name in ("health_interval_s", "hang_timeout_s", "wait_timeout_s", "control_timeout_s"):
            require(getattr(self, name) > 0, f"rollout.engine.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class PassRateConfig:
    """Dynamic pass rating: prompts are drawn by how often the policy solves them, instead of epoch by epoch.

    A prompt whose groups were right in a share p is drawn with weight max(floor, 4 p (1 - p)), and with weight `floor`
    if p is not between low and high. A prompt that was never judged has weight 1. The formula is ours (docs/data.md).

    - enabled: draw in this way. Sections of a data.mix keep their ratio; the draws are within each.
    - low, high: the band of pass rates that is worth sampling.
    - floor: the weight of prompts outside it. Above 0, so that they come back when the policy has changed.
    - memory: weight of the earlier groups of a prompt in its running pass rate.
    """

    enabled: bool = False
    low: float = 0.1
    high: float = 0.9
    floor: float = 0.05
    memory: float = 0.5

    def __post_init__(self):
        require(0 <= self.low < self.high <= 1,
                f"rollout.pass_rate.low={self.low} and high={self.high}: 0 <= low < high <= 1")
        require(0 < self.floor <= 1, f"rollout.pass_rate.floor={self.floor} must lie in (0, 1]")
        require(0 <= self.memory < 1, f"rollout.pass_rate.memory={self.memory} must lie in [0, 1)")


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for one step, by which engines, and how weights reach them.

    - prompts_per_step, responses_per_prompt: what a step samples. pass_rate: which prompts it draws.
    - max_response_tokens: limit of a response. max_context_tokens: limit of a response with its prompt.
    - temperature: divides the logits in sampling. top_p: samples among the likeliest tokens of this share. stop: texts
      that end a response, besides the end token.
    - collector: `sync` samples every response of the step's prompts. `budgeted` stops as soon as the groups first in
      order fill algo.phi (needs algo.order=groups). `partial` samples a fixed number of tokens per step and carries
      unfinished responses on. `async` samples ahead while the trainer trains.
    - budget_tokens: response tokens that `partial` samples per step; null: Phi of the step. slice_tokens: the tokens of
      one request of `partial`. retention_steps: how many steps `partial` carries an unfinished response.
    - max_staleness: how many steps `async` may sample ahead.
    - overprovision: `budgeted` keeps this many times the groups in flight that it expects to need.
    - environment: dotted path of a function that answers the model when it stops (rollout/environment.py). All turns
      and answers together have max_response_tokens.
    - max_turns: turns of the model in one response; the environment answers at most max_turns - 1 times.
    - environment_threads: how many calls of the environment run at a time. environment_timeout_s: seconds for one
      answer.
    - agent: a program of yours that asks the model, instead of a function that answers it.
    - concurrency: requests in flight over all engines. request_timeout_s: seconds that one may take. retries: how often
      a failed one is sent again.
    - max_failed_fraction: the share of a step's responses that may fail before the run ends. A response fails if an
      engine cannot give it, the environment cannot continue it, or the judge cannot judge it. Below the share, failed
      responses are counted and train nothing.
    - publish: how weights travel. `adapter` sends the matrices of model.lora alone, beside the engines' model.path
      (docs/lora.md). bucket_bytes: bytes that are sent at a time.
    - verify_checksums: each engine proves by checksums what each of its tensor-parallel ranks holds. null: as far as
      these can be predicted (sync/engines_verified counts the engines). What cannot is said once.
    - probe_tolerance: by how much, in nats, an engine's log-probabilities of a fixed prompt may differ from the
      trainer's after a publish (sync/probe_max_abs). Beyond it the engine serves nothing and is sent the weights again.
      If no engine passes in three attempts, the run ends. null: 0.01, or 2 if trainer or engine compute in bfloat16.
    """

    collector: Literal["sync", "budgeted", "partial", "async"] = "sync"
    prompts_per_step: int = 32
    responses_per_prompt: int = 8
    pass_rate: PassRateConfig = field(default_factory=PassRateConfig)
    max_response_tokens: int = 80
    max_context_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    environment: str | None = None
    max_turns: int = 8
    environment_timeout_s: float = 10.0
    environment_threads: int = 32
    agent: AgentConfig = field(default_factory=AgentConfig)
    overprovision: float = 1.25
    budget_tokens: int | None = None
    slice_tokens: int = 256
    retention_steps: int = 4
    max_staleness: int = 1
    concurrency: int = 256
    request_timeout_s: float = 600.0
    retries: int = 3
    max_failed_fraction: float = 0.5
    publish: Literal["tensor", "broadcast", "disk", "adapter"] = "tensor"
    verify_checksums: bool | None = None
    probe_tolerance: float | None = None
    bucket_bytes: int = 512 * 1024 * 1024
    engine: EngineConfig = field(default_factory=EngineConfig)

    def probe_limit(self, model_dtype: str) -> float:
        """probe_tolerance, or its default for the less exact of the two dtypes."""
        if self.probe_tolerance is not None:
            return self.probe_tolerance
        return PROBE_TOLERANCES["bfloat16" if "bfloat16" in (model_dtype, self.engine.dtype) else "float32"]

    def __post_init__(self):
        for name in ("prompts_per_step", "responses_per_prompt", "max_response_tokens", "concurrency", "slice_tokens",
                     "retention_steps", "max_turns", "environment_threads"):
            require(getattr(self, name) >= 1, f"rollout.{name}={getattr(self, name)} must be at least 1")
        for text in self.stop:
            require_real_breaks("rollout.stop", text)
        require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must lie in (0, 1]")
        require(self.max_response_tokens < self.max_context_tokens,
                f"rollout.max_response_tokens={self.max_response_tokens} leaves no room for a prompt in "
                f"rollout.max_context_tokens={self.max_context_tokens}")
        most = self.engine.max_total_tokens
        require(bool(self.engine.urls) or most is None or most >= self.engine_context_tokens,
                f"rollout.engine.max_total_tokens={most} is less than one sequence may take: "
                f"rollout.max_context_tokens={self.max_context_tokens} and {ENGINE_KEEPS} that the engine keeps for "
                "itself; raise it, or set null to leave it to SGLang")
        require(self.overprovision >= 1, f"rollout.overprovision={self.overprovision} must be at least 1")
        require(self.budget_tokens is None or self.budget_tokens >= 1,
                f"rollout.budget_tokens={self.budget_tokens} must be at least 1 token")
        for name in ("request_timeout_s", "bucket_bytes"):
            require(getattr(self, name) > 0, f"rollout.{name}={getattr(self, name)} must be positive")
        require(self.retries >= 0, f"rollout.retries={self.retries} must not be negative")
        require(0 <= self.max_failed_fraction <= 1,
                f"rollout.max_failed_fraction={self.max_failed_fraction} must lie in [0, 1]")
        require(self.probe_tolerance is None or self.probe_tolerance > 0,
                f"rollout.probe_tolerance={self.probe_tolerance} must be positive")
        require(self.max_staleness >= 0, f"rollout.max_staleness={self.max_staleness} must not be negative")
        require(self.environment_timeout_s > 0,
                f"rollout.environment_timeout_s={self.environment_timeout_s} must be positive")
        require(not (self.engine.colocate and self.collector == "async" and self.max_staleness > 0),
                f"rollout.engine.colocate=true with rollout.max_staleness={self.max_staleness}: engines that gave "
                "up their memory cannot sample while the trainer trains; use another collector than async")
        if self.publish == "adapter":
            engine, instead = self.engine, "; use rollout.publish=tensor, broadcast or disk"
            require(engine.tp == 1, f"rollout.publish=adapter with rollout.engine.tp={engine.tp}: nobody has tried "
                    f"adapters on a model that several GPUs share{instead}")
            require(not engine.colocate, "rollout.publish=adapter with rollout.engine.colocate=true: an engine that "
                    f"gave up its memory has lost the weights that adapters stand beside{instead}")
            require(engine.router is None, f"rollout.publish=adapter with rollout.engine.router={engine.router}: the "
                    f"requests that we send to a router do not name the newest adapter{instead}")
            require(self.collector in ("sync", "budgeted"), f"rollout.publish=adapter with rollout.collector="
                    f"{self.collector}: SGLang keeps an adapter until the responses that it samples have ended, and "
                    f"says of none which one sampled it{instead}, or rollout.collector=sync or budgeted")
        require(not (self.environment and self.agent.kind),
                f"rollout.environment={self.environment} with rollout.agent.kind={self.agent.kind}: one of them "
                "speaks with the model; leave the other out")
        require(not (self.collector == "partial" and self.agent.kind == "http"),
                "rollout.agent.kind=http with rollout.collector=partial: the workers of an environment server would be "
                "held by conversations that wait for the next step; use kind command or python, or another collector")
        require(not (self.collector == "partial" and self.environment),
                f"rollout.environment={self.environment} with rollout.collector=partial: turns are not carried from "
                "step to step; use another collector")
        require(not (self.collector == "partial" and self.stop),
                "rollout.stop with rollout.collector=partial: a stop string that a slice cuts in two would not be "
                "seen; end responses by the tokenizer's end-of-text token")

    @property
    def engine_context_tokens(self) -> int:
        """--context-length of the engines: prompt and response may have max_context_tokens, to the last token."""
        return self.max_context_tokens + ENGINE_KEEPS
