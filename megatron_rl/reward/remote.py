"""A judge on another machine: programs go to a server that speaks SandboxFusion's protocol (POST /run_code).

The server isolates and limits the programs. What is right is still decided here.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.reward import RemoteConfig
from megatron_rl.reward.requests import FAILURES, attempts, failure_of
from megatron_rl.reward.sandbox import Limits, Outcome, out_of_memory

__all__ = ["Remote", "RemoteProgram"]


@dataclass(frozen=True)
class Remote:
    """reward.sandbox=remote. RuntimeError, naming the URL, if the server does not answer after the retries."""

    config: RemoteConfig

    def check(self) -> None:
        """Runs one program. RuntimeError that names reward.remote.url if that fails."""
        outcome = self.program("python", {"main.py": "print(6 * 7)"}, Limits(), compile_s=5)(b"", 1 << 16)
        if outcome.stdout.strip() != b"42":
            raise RuntimeError(f"reward.remote.url={self.config.url} does not run programs: {outcome.message}")

    def program(self, language: str, sources: Mapping[str, str], limits: Limits, *, compile_s: int) -> RemoteProgram:
        """`sources`: the first is the program, the rest lie beside it; Python's harness is started by its name."""
        (first, code), *rest = sources.items()
        return RemoteProgram(self.config, {
            "code": code, "language": language, "compile_timeout": compile_s, "run_timeout": limits.idle_s,
            "memory_limit_MB": limits.memory_mb,
            "files": {name: base64.b64encode(text.encode()).decode() for name, text in rest}}, limits, compile_s)


@dataclass(frozen=True)
class RemoteProgram:
    """One program of a remote judge; each call is a request, which compiles again."""

    config: RemoteConfig
    request: Mapping[str, Any]
    limits: Limits
    compile_s: int

    def __call__(self, stdin: bytes, output_bytes: int) -> Outcome:
        answer = self._post({**self.request, "stdin": stdin.decode(errors="replace")})
        compiled, ran = answer.get("compile_result"), answer.get("run_result")
        if compiled is not None and (compiled["status"] != "Finished" or compiled["return_code"] != 0):
            return _outcome(compiled, "compile_error", output_bytes)
        if ran is None:
            raise RuntimeError(f"{self.config.url}: no run_result ({answer.get('status')}: {answer.get('message')})")
        return _outcome(ran, "runtime_error", output_bytes)

    def _post(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer.

        Failures that may pass (busy, unreachable, its own errors) are tried again, with growing pauses.
        """
        body, failure = json.dumps(content).encode(), ""
        headers = {"Content-Type": "application/json"} | self._key()
        for _ in attempts(self.config.retries):
            request = urllib.request.Request(f"{self.config.url.rstrip('/')}/run_code", body,
                                             headers)
            try:
                with urllib.request.urlopen(request, timeout=self._patience_s) as response:
                    answer = json.loads(response.read())
            except FAILURES as error:
                failure, may_pass = failure_of(error)
                if not may_pass:
                    break
            else:
                if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                    return answer
                failure = f"{answer}"[:200]
        raise RuntimeError(f"reward.remote.url={self.config.url} did not judge a program: {failure}")

    def _key(self) -> dict[str, str]:
        """Read when it is used, because a key in the configuration would be written to every run's folder."""
        name = self.config.key_env
        if name is None:
            return {}
        if not os.environ.get(name):
            raise RuntimeError(f"reward.remote.key_env={name}: the environment variable {name} is not set")
        return {"Authorization": f"Bearer {os.environ[name]}"}

    @property
    def _patience_s(self) -> float:
        return self.config.timeout_s + self.limits.idle_s + self.compile_s


def _outcome(result: Mapping[str, Any], failed: str, output_bytes: int) -> Outcome:
    stdout = (result.get("stdout") or "").encode()
    stderr = (result.get("stderr") or "").encode()
    if result["status"] == "TimeLimitExceeded":
        status = "timeout"
    elif len(stdout) > output_bytes:
        status = "output_limit"
    elif result["status"] == "Finished" and result.get("return_code") == 0:
        status = "ok"
    else:
        text = stderr.decode(errors="replace")
        syntax = not text.startswith("Traceback") and "SyntaxError: " in text
        status = "memory_limit" if out_of_memory(stderr) else "compile_error" if syntax else failed
    return Outcome(status, stdout[:output_bytes], stderr, result.get("execution_time") or 0.0)
