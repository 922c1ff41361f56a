"""`python -m tests.gpu.pretended_worker FOLDER WORLD_SIZE LAYOUT...`: pretended_ranks.main on a pretended GPU.

Two files, because torch must believe in the GPU before megatron_rl is imported.
"""

from __future__ import annotations

import importlib
import sys

from tests.gpu import pretended_runtime

if __name__ == "__main__":
    pretended_runtime.install()
    importlib.import_module("tests.gpu.pretended_ranks").main(*sys.argv[1:])
