"""The prompts and examples that a configuration names, checked against its model and its scorers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.reward import ShapingConfig
from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.data import Limits, PromptSource, build_prompts, heldout
from megatron_rl.model.architectures import read_config
from megatron_rl.reward import RewardPool
from megatron_rl.types import Prompt

LISTED_EXAMPLES = 20


def prompt_source(config: Config, data: DataConfig, tokenizer, rewards: RewardPool | None = None) -> PromptSource:
    """The prompts of `data`. rewards: every row of a file must hold what its scorer needs."""
    rollout = config.rollout

    def check(prompt: Prompt) -> None:
        rewards.check(prompt)
        if data is config.data:
            check_effort(prompt, config.reward.shaping)

    return build_prompts(data, tokenizer, Limits(
        max_prompt_tokens=rollout.max_context_tokens - rollout.max_response_tokens,
        vocabulary_size=read_config(config.model.path).vocab_size, check=None if rewards is None else check))


def check_effort(prompt: Prompt, shaping: Sequence[ShapingConfig]) -> None:
    """ValueError if the prompt names a thinking effort that a term of reward.shaping with efforts does not have."""
    effort = prompt.metadata.get("effort")
    for each in shaping:
        if each.efforts and effort is not None and effort not in list(each.efforts):  # a list has no hash
            raise ValueError(f"its effort is {effort!r}, but the efforts of reward.shaping: {each.term} are "
                             f"{', '.join(each.efforts)}")


def sft_source(config: Config, tokenizer) -> PromptSource:
    """The examples of supervised fine-tuning, all of them checked.

    ValueError if there are too few, or one has no response, is too long, or holds a token that the model does not know.
    """
    network = read_config(config.model.path)
    room = min(config.batch.tokens_per_microbatch * config.parallel.cp, network.max_position_embeddings)
    source = build_prompts(config.data, tokenizer, Limits(vocabulary_size=network.vocab_size, max_example_tokens=room))
    if len(source) < config.sft.examples:
        raise ValueError(f"sft.examples={config.sft.examples}, but data has {len(source)} examples: set "
                         f"sft.examples={len(source)} or give more")
    if objections := source.objections(config.sft.examples):
        listed = "\n  ".join(objections[:LISTED_EXAMPLES])
        raise ValueError(f"{len(objections)} example(s) cannot be trained on, the first of them:\n  {listed}")
    return source


def heldout_data(config: Config) -> DataConfig:
    """eval.data, or the training data's held-out split under eval.seed."""
    if config.eval.data is not None:
        return config.eval.data
    return heldout(config.data, seed=config.eval.seed, size=config.eval.problems)
