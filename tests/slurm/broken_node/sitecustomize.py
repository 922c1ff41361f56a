"""First on the path of a job, it makes rank 1 end as it does on a GPU whose memory has failed."""

import os
import sys

if os.environ.get("SLURM_PROCID") == "1" and "rank" in sys.orig_argv:
    print("RuntimeError: CUDA error: uncorrectable ECC error encountered", file=sys.stderr, flush=True)
    os._exit(1)
