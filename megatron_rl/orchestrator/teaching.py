"""What is looked at before a run with teachers starts (algo.distillation): their checkpoints and their vocabularies."""

from __future__ import annotations

import dataclasses

from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import read_config
from megatron_rl.model.hf_folder import HFReader, check_checkpoint
from megatron_rl.model.tokenizer import load_tokenizer, token_texts
from megatron_rl.rollout.teachers import check_same_vocabulary, vocabulary_hash


def check_teachers(config: Config, tokenizer) -> None:
    """ValueError for a teacher whose checkpoint is not whole or has another vocabulary than the student.

    Teachers on servers are asked when the orchestrator starts (Teachers.check_vocabulary).
    """
    for name, teacher in config.algo.distillation.teachers.items():
        if teacher.checkpoint is not None:
            key = f"algo.distillation.teachers.{name}.checkpoint"
            check_checkpoint(read_config(teacher.checkpoint), HFReader(teacher.checkpoint, key=key))
            theirs = load_tokenizer(dataclasses.replace(config.model, path=teacher.checkpoint))
            check_same_vocabulary(f"{key}={teacher.checkpoint}", vocabulary_hash(token_texts(tokenizer)),
                                  vocabulary_hash(token_texts(theirs)))
