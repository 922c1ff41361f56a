"""A rank that says where it stands, and, as rank 1, fails while the other one waits; for test_forked_ranks.py.

Its argument is a file that rank 0 makes when it has spoken: rank 1 fails no earlier, because that ends rank 0.
"""

import os
import sys
import time
from pathlib import Path

print(*sys.argv[1:], *(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")), flush=True)
spoken = Path(sys.argv[1])
if os.environ["RANK"] == "1":
    while not spoken.exists():
        time.sleep(0.01)
    raise ValueError("made up")
spoken.touch()
time.sleep(600)
