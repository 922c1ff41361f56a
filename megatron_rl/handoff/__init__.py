"""What the orchestrator and the trainer say to each other: JSON commands and safetensors bodies, nothing pickled."""

from megatron_rl.handoff.body import dump, load
from megatron_rl.handoff.shard import UpdateShard, cut_into_shards, read_shard, schedule, write_shard

__all__ = ["UpdateShard", "cut_into_shards", "dump", "load", "read_shard", "schedule", "write_shard"]
