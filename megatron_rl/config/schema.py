"""Every key a user can set, its default and its rule. Hydra composes YAML; `load.build` turns it into this.

A default has one home: the field below. YAML files hold differences only. Validation raises ValueError
that names the dotted key; it never repairs. Rules that need two sections live in check.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.algo import AlgoConfig
from megatron_rl.config.data import DataConfig, EvalConfig, SelectConfig
from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.optimizer import OptimizerConfig
from megatron_rl.config.orchestrator import OrchestratorConfig
from megatron_rl.config.pipeline import PipelineConfig
from megatron_rl.config.reward import RewardConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.rules import require
from megatron_rl.config.stage import StageConfig


@dataclass(frozen=True)
class RunConfig:
    """One run: its name, its folder, its length, and how it resumes.

    - name: what the run is called. dir: the folder it writes.
    - steps: optimiser steps on rollouts that the run takes in all.
    - seed: sets prompts, samples, the order of the cut and random weights.
    - save_every_steps: how often a checkpoint is written, besides at the end. keep_checkpoints: how many stay.
    - export_hf: also write a Hugging Face folder at the end, <dir>/hf.
    - resume: `true` goes on from the newest checkpoint. `auto` does so if there is a run in dir, and else begins one.
    - resume_from: go on from the checkpoint of this name (step_00000020). Newer ones are set aside under other names.
    - accept_changes: go on although settings differ that change what is learned, such as algo.phi or the data.
    - async_save: write checkpoints in the background. This costs memory for a copy of the state.
    - max_skipped_in_a_row: a step whose loss or gradient is NaN or infinite changes nothing. More than this many such
      steps in a row end the run.
    - keep_dumps: how many skipped steps stay in <dir>/dumps for `megatron-rl replay-step`, each with the weights; 0
      writes none. dump_steps: optimiser steps (from 1) that are dumped in any case.
    """

    name: str = "rl"
    dir: str = "runs/rl"
    seed: int = 0
    steps: int = 60
    save_every_steps: int = 20
    keep_checkpoints: int = 2
    resume: Literal[False, True, "auto"] = False
    resume_from: str | None = None
    accept_changes: bool = False
    async_save: bool = False
    export_hf: bool = True
    max_skipped_in_a_row: int = 3
    keep_dumps: int = 2
    dump_steps: tuple[int, ...] = ()

    def __post_init__(self):
        require(self.steps >= 1, f"run.steps={self.steps} must be at least 1")
        require(self.save_every_steps >= 1, f"run.save_every_steps={self.save_every_steps} must be at least 1")
        require(self.keep_checkpoints >= 1, f"run.keep_checkpoints={self.keep_checkpoints} must be at least 1")
        for name in ("max_skipped_in_a_row", "keep_dumps"):
            require(getattr(self, name) >= 0, f"run.{name}={getattr(self, name)} must not be negative")
        require(self.resume_from is None or self.resume is not False,
                f"run.resume_from={self.resume_from} needs run.resume=true")


RECOMPUTE_MODULES = ("moe", "shared_experts", "mlp", "core_attn")


@dataclass(frozen=True)
class ModelConfig:
    """The model, and how the trainer holds it.

    - path: a Hugging Face folder (docs/models.md lists the kinds of model).
    - dtype: the type of weights and activations. The optimiser's state is float32.
    - backend: what computes attention and experts (docs/performance.md). `torch`: one call of flash attention for a
      micro-batch (on a CPU SDPA, sequence by sequence) and a grouped product for all experts. `megatron`: SDPA sequence
      by sequence and one expert after the other, in any dtype. `transformer_engine`: Megatron's Transformer Engine
      layers, in bfloat16 on a GPU, if Transformer Engine is installed. `auto`: torch for bfloat16 on a GPU, otherwise
      megatron; never transformer_engine.
    - fp32_lm_head: trainer and engines sum the products of the head in float32 and keep the logits in float32. false:
      both round the logits to dtype.
    - recompute: what the backward pass computes again instead of keeping it. `full`: everything but the inputs of
      layers. `selective`: the parts of a layer that recompute_modules names.
    - recompute_modules: `moe` a layer's router and experts, `shared_experts` those alone, `mlp` the dense layers'
      projections, `core_attn` rotation and attention.
    - expert_bias_rate: how far each optimiser step moves the bias of every expert towards an equal load (arXiv
      2408.15664), in networks that have one (bailing_moe_v2, glm4_moe). 0: the bias stays as it was loaded.
    - mtp: train the layer for multi-token prediction, which lies behind the last one of a bailing_moe_v2 or glm4_moe,
      beside the model (docs/models.md). The model's own update is the same with it and without. It needs
      `num_nextn_predict_layers` 1 and parallel.pp=1. false: an export has the layer as it was.
    - reference_path: the frozen policy of the KL term (Eq. 2). null: the starting weights.
    - architecture: a config.json to check sizes against if the checkpoint is not at hand (`--check`), or the name of
      one that ships with the project: ling_lite, ling_mini_2, ling_flash_2, ling_1t, glm_4_5_air, qwen1_5_moe_a2_7b,
      qwen3_30b_a3b, deepseek_v2_lite, deepseek_v2, deepseek_v3, moonlight_16b_a3b.
    - trust_remote_code: run the Python code that the folder brings along (`auto_map`). false refuses such a folder.
    """

    path: str = ""
    architecture: str | None = None
    reference_path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Literal["auto", "torch", "megatron", "transformer_engine"] = "auto"
    fp32_lm_head: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ("moe", "mlp")
    expert_bias_rate: float = 0.0
    mtp: bool = False
    trust_remote_code: bool = False
    kernels: KernelConfig = field(default_factory=KernelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        require(0 <= self.expert_bias_rate < 1, f"model.expert_bias_rate={self.expert_bias_rate} must be in 0..1")
        unknown = [name for name in self.recompute_modules if name not in RECOMPUTE_MODULES]
        require(not unknown, f"model.recompute_modules: {', '.join(unknown)} is none of {', '.join(RECOMPUTE_MODULES)}")
        require(self.recompute != "selective" or len(self.recompute_modules) > 0,
                "model.recompute=selective with empty model.recompute_modules recomputes nothing; name a module, or "
                "set model.recompute=none")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of Megatron's parallel groups. Data parallelism takes what is left of world_size.

    - world_size: how many ranks train.
    - tp: tensor-parallel size. pp: pipeline stages. vpp: parts of the model on one pipeline rank, interleaved. ep: how
      many ranks share a layer's experts. etp: tensor-parallel size within experts.
    - cp: context-parallel size. It cuts every sequence over that many ranks, and each holds the keys and values of the
      whole micro-batch while a layer computes.
    - sequence_parallel: null means on if tp > 1, because Megatron refuses MoE under TP without it.
    - distributed_optimizer: data-parallel ranks divide the optimiser's state among them.
    - overlap: reduce gradients while the backward pass goes on.
    - overlap_shared_experts: compute the shared expert while rows travel to the ranks of their experts. It needs
      token_dispatcher=alltoall.
    - token_dispatcher: how tokens reach the ranks of their experts. `allgather` sends every token to all of them, which
      suits an ep not above the experts that a token chooses, and pads the ranks' micro-batches to one length.
    """

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1
    sequence_parallel: bool | None = None
    distributed_optimizer: bool = True
    overlap: bool = False
    overlap_shared_experts: bool = False
    token_dispatcher: Literal["alltoall", "allgather"] = "alltoall"

    def __post_init__(self):
        for name in ("world_size", "tp", "pp", "ep", "etp", "cp"):
            require(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)} must be at least 1")
        model_parallel = self.tp * self.pp * self.cp
        require(self.world_size % model_parallel == 0,
                f"parallel.tp*pp*cp={model_parallel} does not divide parallel.world_size={self.world_size}: make it a "
                f"multiple of {model_parallel}, or change parallel.tp={self.tp}, pp={self.pp} or cp={self.cp}")
        expert_parallel = self.ep * self.etp * self.pp
        require(self.world_size % expert_parallel == 0,
                f"parallel.ep*etp*pp={expert_parallel} does not divide parallel.world_size={self.world_size}: make it "
                f"a multiple of {expert_parallel}, or change parallel.ep={self.ep}, etp={self.etp} or pp={self.pp}")
        require(not (self.tp > 1 and self.sequence_parallel is False),
                f"parallel.sequence_parallel=false with parallel.tp={self.tp}: "
                "Megatron trains MoE under tensor parallelism with sequence parallelism only; leave it unset")
        require(self.token_dispatcher == "alltoall" or self.pp == 1,
                f"parallel.token_dispatcher=allgather with parallel.pp={self.pp}: Megatron sends micro-batches of "
                "varying length between stages with alltoall only")
        require(not self.overlap_shared_experts or self.token_dispatcher == "alltoall",
                "parallel.overlap_shared_experts=true with parallel.token_dispatcher=allgather: only alltoall can be "
                "started ahead; leave one of the two out")
        require(not (self.tp == 1 and self.sequence_parallel),
                "parallel.sequence_parallel=true needs parallel.tp > 1; leave it unset")
        require(self.vpp is None or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp > 1")
        require(self.vpp is None or self.vpp > 1,
                f"parallel.vpp={self.vpp} must be at least 2 parts of a rank; leave it unset for one")

    @property
    def dp(self) -> int:
        """Data-parallel size: how many ranks see different sequences."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def use_sequence_parallel(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def token_multiple(self) -> int:
        """What a rank's positions of a micro-batch are padded to: two chunks a sequence under cp, tp shards."""
        return math.lcm(2 if self.cp > 1 else 1, self.tp if self.use_sequence_parallel else 1)


@dataclass(frozen=True)
class BatchConfig:
    """How sequences are packed.

    - tokens_per_microbatch: the most tokens of a packed micro-batch on a rank. Context parallelism spreads a sequence
      over parallel.cp ranks, so a sequence may be that many times longer.
    - logprob_chunk_tokens: the number of tokens whose logits exist at a time.
    """

    tokens_per_microbatch: int = 8192
    logprob_chunk_tokens: int = 1024

    def __post_init__(self):
        require(self.tokens_per_microbatch >= 1,
                f"batch.tokens_per_microbatch={self.tokens_per_microbatch} must be at least 1")
        require(self.logprob_chunk_tokens >= 1,
                f"batch.logprob_chunk_tokens={self.logprob_chunk_tokens} must be at least 1")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: packed, prompt-masked, token-level mean loss, and a checkpoint after every epoch.

    - examples: train on the first examples of `data`, in a new order in every epoch. A prompt with its response may
      have batch.tokens_per_microbatch tokens (times parallel.cp).
    - batch_size: examples of one optimiser step.
    - epochs: how often training goes through the examples.
    - schedule_epochs: length of the learning-rate schedule; null: epochs. If it is longer than epochs, training stops
      early on it, as the report does when it takes an early checkpoint of a long run (Sec. 4.3.2).
    - balance_coef, z_loss_coef: coefficients of the router's losses.
    - export_epochs: also write each epoch as a Hugging Face folder, <run.dir>/epochs/epoch_01 and so on, for
      `megatron-rl select-checkpoint`.
    """

    epochs: int = 3
    schedule_epochs: int | None = None
    examples: int = 4000
    batch_size: int = 16
    balance_coef: float = 0.01
    z_loss_coef: float = 0.0
    export_epochs: bool = False

    def __post_init__(self):
        for name in ("epochs", "examples", "batch_size"):
            require(getattr(self, name) >= 1, f"sft.{name}={getattr(self, name)} must be at least 1")
        for name in ("balance_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"sft.{name}={getattr(self, name)} must not be negative")
        require(self.schedule_epochs is None or self.schedule_epochs >= self.epochs,
                f"sft.schedule_epochs={self.schedule_epochs} is shorter than sft.epochs={self.epochs}")
        require(self.examples >= self.batch_size,
                f"sft.examples={self.examples} is less than one sft.batch_size={self.batch_size}")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch; a last incomplete batch is left out."""
        return self.examples // self.batch_size

    @property
    def schedule_steps(self) -> int:
        return self.steps_per_epoch * (self.schedule_epochs or self.epochs)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True)
class ObserveConfig:
    """Where metrics go besides metrics.jsonl, which is always written.

    - wandb: to files under <run.dir>/wandb, to its server, or not at all. project: wandb's project.
    - progress: the display on the terminal.
    - mismatch_alarm: a step warns if the mean difference of engine and trainer log-probabilities exceeds this, in nats.
    - metrics: dotted paths of your own functions. Each takes the judged groups and returns numbers by name, which are
      logged as extra/<name> for every step and as <name> for every evaluation.
    - rollouts: dotted paths of your own functions (step, groups), which are called with the judged groups of each step
      before it trains. If the orchestrator was killed, a step may come twice.
    - loggers: who gets the numbers of every step and evaluation, each in a process of its own: `tensorboard` (files
      under <run.dir>/tensorboard), `mlflow` (where MLFLOW_TRACKING_URI says), `swanlab` (as SWANLAB_MODE says, offline
      by default), or the dotted path of a class of your own (observe/feed.py: Logger). If one fails, the run goes on.
    - samples_per_step: how many judged responses of each step go to samples.jsonl, for the report's table; 0: none.
    - print_samples: every so many steps, print one of them on the terminal; 0: never.
    """

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "megatron_rl"
    progress: bool = True
    mismatch_alarm: float = 0.05
    metrics: tuple[str, ...] = ()
    rollouts: tuple[str, ...] = ()
    loggers: tuple[str, ...] = ()
    samples_per_step: int = 4
    print_samples: int = 0

    def __post_init__(self):
        require(len(set(self.loggers)) == len(self.loggers), "observe.loggers names a logger twice: name it once")
        require(self.samples_per_step >= 0,
                f"observe.samples_per_step={self.samples_per_step} must not be negative")
        require(self.print_samples >= 0, f"observe.print_samples={self.print_samples} must not be negative")
        require(not self.print_samples or self.samples_per_step > 0,
                f"observe.print_samples={self.print_samples} needs observe.samples_per_step of at least 1")
        require(self.mismatch_alarm > 0, f"observe.mismatch_alarm={self.mismatch_alarm} must be positive")


@dataclass(frozen=True)
class SlurmConfig:
    """The job that `megatron-rl slurm` submits.

    - partition, account, qos, exclude, gpus_per_node, cpus_per_task (of a rank, and of an engine): as in sbatch.
    - nodes: machines for the ranks. engine_nodes: machines for the engines. 0 lets the engines (rollout.engine.count of
      them) share the trainer's nodes.
    - time_limit: in Slurm's format. signal_lead_s: so many seconds before it, and on preemption, the run saves and is
      requeued.
    - max_restarts: how often the job starts again after a fault of a node, which it then excludes.
    - container: `pyxis` (srun --container-image) or `apptainer` around every rank and engine. container_image: its
      image. container_mounts: the folders it sees (/data:/data).
    - setup: shell lines at the start of the batch script (module load, exports). extra: more #SBATCH lines.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str = "24:00:00"
    nodes: int = 1
    engine_nodes: int = 0
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    signal_lead_s: int = 300
    max_restarts: int = 5
    exclude: str | None = None
    container: Literal["none", "pyxis", "apptainer"] = "none"
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("nodes", "cpus_per_task"):
            require(getattr(self, name) >= 1, f"slurm.{name}={getattr(self, name)} must be at least 1")
        for name in ("engine_nodes", "gpus_per_node", "signal_lead_s", "max_restarts"):
            require(getattr(self, name) >= 0, f"slurm.{name}={getattr(self, name)} must not be negative")
        require(self.container == "none" or self.container_image is not None,
                f"slurm.container={self.container} needs slurm.container_image")


@dataclass(frozen=True)
class Config:
    """One run, whole and validated. Sections are the keys of conf/config.yaml; stages: parts of an RL run in turn."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    orchestrator: OrchestratorConfig = field(default_factory=OrchestratorConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    stages: tuple[StageConfig, ...] = ()

    @property
    def offloads_optimizer(self) -> bool:
        """optimizer.offload, resolved."""
        return self.rollout.engine.colocate if self.optimizer.offload is None else self.optimizer.offload

    @property
    def is_sft(self) -> bool:
        """Whether `plan`, which has no recipe, plans supervised fine-tuning: section sft is not as it is by default."""
        return self.sft != SFTConfig()

    def __post_init__(self):
        total = sum(stage.steps for stage in self.stages)
        require(not self.stages or total == self.run.steps,
                f"run.steps={self.run.steps} must be the sum of the stages' steps, {total}")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages: {', '.join(names)}: two have the same name")
