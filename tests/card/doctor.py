"""`python -m tests.card.doctor`: the doctor's checks as a line of JSON, {name: [status, what was found]}."""

from __future__ import annotations

import json

from megatron_rl.doctor import all_checks

if __name__ == "__main__":
    print(json.dumps({check.name: [check.status, check.found] for check in all_checks()}))
