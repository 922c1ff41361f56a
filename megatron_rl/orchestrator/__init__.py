"""The orchestrator: prompts, engines, rewards, the budget and every decision of a run. No Megatron, no GPU."""
