"""sglang-router with a key that `ps` does not show: `python -m megatron_rl.compat.router_key ARGS`.

ARGS are those of `sglang_router.launch_router` without --api-key; the key comes from the environment. Written for
sglang-router 0.3.2, which takes it as an argument only. Requests, and the list of engines, then need the key; its
health, model list and server information stay open. Delete when it reads a key from the environment.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_rl.compat.sglang_key import ENGINE_KEY

if __name__ == "__main__":
    sys.argv += ["--api-key", os.environ[ENGINE_KEY]]
    runpy.run_module("sglang_router.launch_router", run_name="__main__", alter_sys=False)
