"""What is looked at before a run with teachers starts (algo.distillation): their checkpoints and their vocabularies."""

from __future__ import annotations

import dataclasses

from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import read_config
from megatron_rl.model.hf_folder import HFReader, check_checkpoint
from megatron_rl.model.network import check_layout
from megatron_rl.model.tokenizer import load_tokenizer, token_texts
from megatron_rl.rollout.teachers import check_same_vocabulary, key_of, vocabulary_hash


def check_teachers(config: Config, tokenizer) -> None:
    """ValueError for a teacher whose checkpoint is not whole or has another vocabulary than the student, or whose
    servers' key is not there.

    Teachers on servers are asked when the orchestrator starts (Teachers.check_vocabulary).
    """
    for name, teacher in config.algo.distillation.teachers.items():
        key_of(name, teacher)
    size, top_k = read_config(config.model.path).vocab_size, config.algo.distillation.top_k
    if top_k > size:
        raise ValueError(f"algo.distillation.top_k={top_k} is more than the {size} tokens of model.path")
    for key, folder in config.algo.distillation.checkpoints.items():
        network = read_config(folder, key=key)
        check_layout(network, config.parallel)
        check_checkpoint(network, HFReader(folder, key=key))
        theirs = load_tokenizer(dataclasses.replace(config.model, path=folder))
        check_same_vocabulary(f"{key}={folder}", vocabulary_hash(token_texts(tokenizer)),
                              vocabulary_hash(token_texts(theirs)))
        # rows without a token: the student may sample one that the teacher lacks, and a teacher may name one
        require(network.vocab_size == size or (network.vocab_size > size and not top_k),
                f"{key}={folder} has {network.vocab_size} rows in its head (vocab_size), and model.path has {size}: "
                "another model, or with more rows algo.distillation.top_k=0")
