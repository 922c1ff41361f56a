"""`python -m tests.gpu.te_worker FOLDER WORLD_SIZE LAYOUT...`: te_ranks.main on a pretended GPU.

TE_FOLDER in the environment is a folder that holds the package (`make test-te`), if the environment itself does not.
"""

from __future__ import annotations

import importlib
import os
import sys

from tests.gpu import pretended_runtime

if __name__ == "__main__":
    pretended_runtime.install()
    if folder := os.environ.get("TE_FOLDER"):
        sys.path.append(folder)
    importlib.import_module("tests.gpu.te_ranks").main(*sys.argv[1:])
