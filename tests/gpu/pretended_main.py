"""`python -m tests.gpu.pretended_main MODULE ARGUMENT...`: a module's command line on a pretended GPU (pretended.py).

It ends as the module does, or with 1 and the findings if a GPU would have refused something. With TRITON_INTERPRET=1
Triton's kernels run in the interpreter; else plain torch answers for them, which is faster (gpu_operators.py).
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

from tests.gpu import pretended, pretended_runtime


def run(module: str) -> None:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    pretended_runtime.install()
    importlib.import_module("tests.distributed.varlen")
    if "TRITON_INTERPRET" not in os.environ:
        importlib.import_module("tests.distributed.gpu_operators")
    del sys.argv[0]
    with pretended.Watch() as watch:
        run(sys.argv[0])
    print(f"on the pretended GPU: {watch.operations} operations", *pretended.found, sep="\n", file=sys.stderr)
    sys.exit(bool(pretended.found))
