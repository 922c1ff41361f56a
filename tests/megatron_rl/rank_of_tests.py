"""A rank that says where it stands, and, as rank 1, fails while the other one waits; for test_forked_ranks.py."""

import os
import sys
import time

print(*sys.argv[1:], *(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")), flush=True)
if os.environ["RANK"] == "1":
    raise ValueError("made up")
time.sleep(600)
