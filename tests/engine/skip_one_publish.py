"""One rank of a run that forgets to publish version 2: `python -m tests.engine.skip_one_publish CONFIG.json`."""

import sys

from megatron_rl import loop, topology
from megatron_rl.config.load import from_json
from megatron_rl.observe import Timers
from megatron_rl.recipes import stages
from megatron_rl.recipes.rl import build_run


class Forgetful:
    """Publishes every version but the second."""

    def __init__(self, weights):
        self._weights = weights

    def publish(self, version: int) -> None:
        if version != 2:
            self._weights.publish(version)


if __name__ == "__main__":
    config = from_json(sys.argv[1])
    with build_run(stages.current(config)) as parts:
        loop.run(config, rollouts=parts.rollouts, learner=parts.learner, weights=Forgetful(parts.weights),
                 record=parts.record, timers=Timers(), first_step=parts.first_step)
    topology.stop()
