"""Which checkpoints test_checkpoint.py saves, and in which layouts each of them is resumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import tests.distributed.cases as cases
from megatron_rl.config.lora import LoraConfig

LOOP_STATE, ROLLOUTS = {"updates_done": 2}, {"prompts": {"position": 7}, "carried": [np.arange(5, dtype=np.int32)]}


@dataclass(frozen=True)
class Case:
    """network: the name under which the layouts' folder holds the network and its step. "": the network of cases.py.

    offload: as in a colocated run, optimizer.offload, and gradients that are released after each step.
    """

    layout: str
    network: str = ""
    distributed: bool = True
    dtype: str = "float32"
    kernels: str = "megatron"
    lora: LoraConfig = LoraConfig()
    offload: bool = False
    mtp: bool = False

    @property
    def name(self) -> str:
        parts = {self.layout: True, self.network: self.network, "plain": not self.distributed,
                 "bf16": self.dtype == "bfloat16", self.kernels: self.kernels != "megatron", "lora": self.lora.on,
                 "mtp": self.mtp, "offload": self.offload}
        return "_".join(part for part, said in parts.items() if said)

    @property
    def world_size(self) -> int:
        return cases.LAYOUTS[self.layout]["world_size"]


LORA = LoraConfig(rank=4, experts="shared_outer")
SOURCES = (Case("one"), Case("ep2"), Case("ep2", distributed=False), Case("ep2", dtype="bfloat16"),
           Case("tp2_pp2_ep2"), Case("cp2"), Case("ep2", kernels="torch"),
           Case("ep2", lora=LORA), Case("ep2", dtype="bfloat16", offload=True),
           Case("tp2_pp2_ep2", distributed=False, dtype="bfloat16"),
           Case("tp2_pp2_ep2", distributed=False, dtype="bfloat16", offload=True), Case("ep2", offload=True),
           Case("ep2", "deepseek_v2"), Case("ep2", "bailing_v2", mtp=True))
TARGETS = {
    "one": tuple(Case(name) for name in ("one", "ep2", "tp2_ep2")),
    "ep2": (*(Case(name) for name in cases.UP_TO_FOUR_RANKS if "token_dispatcher" not in cases.LAYOUTS[name]),
            Case("tp2_ep2", distributed=False),
            Case("ep2", kernels="torch")),
    "ep2_plain": (Case("tp2_ep2"), Case("pp2_ep2", distributed=False)),
    "ep2_bf16": (Case("tp2_ep2", dtype="bfloat16"), Case("ep2", distributed=False, dtype="bfloat16"),
                 Case("ep2", dtype="bfloat16", offload=True)),
    "ep2_bf16_offload": (Case("ep2", dtype="bfloat16"), Case("ep2", dtype="bfloat16", offload=True),
                         Case("tp2_ep2", distributed=False, dtype="bfloat16", offload=True)),
    "cp2": (Case("cp2"), Case("ep2", distributed=False)),
    "ep2_torch": (Case("tp2_ep2"),),
    "ep2_lora": tuple(Case(name, lora=LORA) for name in ("ep2", "tp2", "pp2", "tp2_etp2", "tp2_pp2_ep2")),
    "ep2_deepseek_v2": tuple(Case(name, "deepseek_v2") for name in ("ep2", "tp2_ep2", "pp2")),
    "ep2_bailing_v2_mtp": (*(Case(name, "bailing_v2", mtp=True) for name in ("ep2", "tp2_ep2", "cp2")),
                           Case("ep2", "bailing_v2", mtp=True, offload=True)),
    "tp2_pp2_ep2": tuple(Case(name) for name in ("tp2_pp2_ep2", "ep2", "one")),
}
PAIRS = [(source.name, target) for source in SOURCES for target in TARGETS.get(source.name, ())]
