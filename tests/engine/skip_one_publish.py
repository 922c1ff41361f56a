"""An orchestrator that forgets to publish version 2: `python -m tests.engine.skip_one_publish CONFIG.json`."""

import sys

from megatron_rl.config.load import from_json
from megatron_rl.orchestrator import main
from megatron_rl.orchestrator.weights import PublishedWeights

PUBLISH = PublishedWeights.publish


async def forgetful(weights: PublishedWeights, version: int) -> None:
    if version != 2:
        await PUBLISH(weights, version)


if __name__ == "__main__":
    PublishedWeights.publish = forgetful
    main.run(from_json(sys.argv[1]))
