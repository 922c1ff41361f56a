"""SGLang's server, which answers nobody without a key that neither `ps` nor its log shows:
`python -m megatron_rl.compat.sglang_key ARGS`.

ARGS are those of `sglang.launch_server` without --api-key; the key comes from the environment variable ENGINE_KEY,
which only the process's own user can read (/proc/PID/environ). Written for SGLang 0.5.23. What is adapted:
 - SGLang takes a key as an argument only, and logs all arguments (sglang/srt/entrypoints/engine.py:
   _server_args_for_logging). Here the argument is added after the process has been started, where the kernel's list of
   arguments does not change, and log records hide it. Delete when SGLang reads a key from the environment.
 - SGLang leaves /health*, /ready*, /metrics*, OPTIONS and web sockets open (sglang/srt/utils/auth.py:
   decide_request_auth). Here they ask for the key too; /health_generate makes the engine work. Delete when it has an
   option for that.
 - The store of its torch.distributed group listens on loopback (loopback_store.py).

As a program, and again in each of SGLang's spawned children; where there is no GPU, through compat/sglang_cpu.py.
"""

from __future__ import annotations

import logging
import os
import runpy
import secrets
import sys

ENGINE_KEY = "MEGATRON_RL_ENGINE_KEY"  # config/rollout.py: ENGINE_KEY; this package imports nothing of ours
HIDDEN = "(hidden)"


class KeyRequired:
    """ASGI: whatever does not carry the key is answered 401, a web socket closed."""

    def __init__(self, app, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "Unauthorized"}'
            await send({"type": "http.response.start", "status": 401,
                        "headers": [(b"content-type", b"application/json"),
                                    (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})


def hide(secret: str) -> None:
    """From here on no log record of this process shows `secret`."""
    make = logging.getLogRecordFactory()

    def hiding(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if secret in f"{record.msg} {record.args}":
            record.msg, record.args = record.getMessage().replace(secret, HIDDEN), None
        return record

    logging.setLogRecordFactory(hiding)


def guard(result, app, **_) -> None:
    """After SGLang's own add_api_key_middleware, so that this one is asked first."""
    app.add_middleware(KeyRequired, key=os.environ[ENGINE_KEY])


def serve() -> None:
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        from megatron_rl.compat import sglang_cpu

        sglang_cpu.prepare()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.auth.add_api_key_middleware", guard, HookType.AFTER)
    sys.argv += ["--api-key", os.environ[ENGINE_KEY]]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)


if __name__ in ("__main__", "__mp_main__"):
    hide(os.environ[ENGINE_KEY])

    from megatron_rl.compat.gloo_device import share_gloo_device
    from megatron_rl.compat.loopback_store import use_loopback_stores

    use_loopback_stores()
    share_gloo_device()
if __name__ == "__main__":
    serve()
