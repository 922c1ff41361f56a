"""A fixed prompt whose log-probabilities trainer and engines must agree on after every publish."""

from __future__ import annotations

import numpy as np

from megatron_rl.batch import by_sample
from megatron_rl.config.schema import Config
from megatron_rl.topology import Topology
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.learner import PolicyLearner, packed_microbatches
from megatron_rl.types import TrainSample

PROBE_TOKENS = 48


class Probe:
    """A call is collective and returns the trainer's log-probabilities of `token_ids`, fp32 [L-1], at temperature 1.

    Rank 0 gets them, other ranks get None. The tokens are drawn once from the vocabulary.
    """

    def __init__(self, learner: PolicyLearner, config: Config, topology: Topology):
        network = learner.policy.config
        length = min(PROBE_TOKENS, config.rollout.max_context_tokens - 1)
        self.token_ids = np.random.default_rng(0).integers(network.vocab_size, size=length).astype(np.int32)
        self._policy, self._topology = learner.policy, topology
        # the engine reports log-probabilities of its input at temperature 1, whatever it samples at
        self._step = TrainStep(learner.policy, learner.optimizer, topology, temperature=1.0,
                               chunk_tokens=config.batch.logprob_chunk_tokens)
        sample = TrainSample(index=0, token_ids=self.token_ids, loss_mask=np.arange(length) > 0,
                             rollout_logprobs=np.zeros(length, np.float32), advantage=0.0,
                             num_response_tokens=length - 1)
        self._microbatches = packed_microbatches([sample], config, topology, network)

    def __call__(self) -> np.ndarray | None:
        mine, here = None, self._topology
        outputs = self._step.logprobs(self._microbatches, self._policy)
        if here.is_last_stage and here.tp_rank == 0:
            for batch, logprobs_T in zip(self._microbatches, outputs, strict=True):
                if batch.sample_indices:
                    mine = by_sample(batch, logprobs_T)[0].cpu().numpy()
        parts = [part for part in here.gather_objects(mine) if part is not None]
        return np.sum(parts, axis=0) if here.is_main else None
