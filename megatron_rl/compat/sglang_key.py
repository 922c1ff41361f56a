"""SGLang's server with a key that neither `ps` nor its log shows: `python -m megatron_rl.compat.sglang_key ARGS`.

ARGS are those of `sglang.launch_server` without --api-key; the key comes from the environment variable ENGINE_KEY.
Written for SGLang 0.5.23, which takes a key as an argument only, and logs all arguments
(sglang/srt/entrypoints/engine.py: _server_args_for_logging). Here the argument is added after the process has been
started, where the kernel's list of arguments does not change, and log records hide it. Delete when SGLang reads a key
from the environment and hides it in its log.

As a program, and again in each of SGLang's spawned children; where there is no GPU, through compat/sglang_cpu.py.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys

ENGINE_KEY = "MEGATRON_RL_ENGINE_KEY"  # config/rollout.py: ENGINE_KEY; this package imports nothing of ours
HIDDEN = "(hidden)"


def hide(secret: str) -> None:
    """From here on no log record of this process shows `secret`."""
    make = logging.getLogRecordFactory()

    def hiding(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if secret in f"{record.msg} {record.args}":
            record.msg, record.args = record.getMessage().replace(secret, HIDDEN), None
        return record

    logging.setLogRecordFactory(hiding)


if __name__ in ("__main__", "__mp_main__"):
    hide(os.environ[ENGINE_KEY])
if __name__ == "__main__":
    sys.argv += ["--api-key", os.environ[ENGINE_KEY]]
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        from megatron_rl.compat import sglang_cpu

        sglang_cpu.serve()
    else:
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
