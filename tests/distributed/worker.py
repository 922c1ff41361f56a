"""The processes behind the layout tests: runs the step of cases.py in many layouts and saves what came out.

`python -m tests.distributed.worker RUN FOLDER WORLD_SIZE LAYOUT...` forks WORLD_SIZE ranks after the imports,
so that a group of layouts pays for them once (hide the GPUs: a forked process cannot use CUDA). One rank alone is this
process, and may be on a GPU. FOLDER holds step.pt and the checkpoints; rank 0 writes LAYOUT.pt there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import tests.distributed.cases as cases
import tests.distributed.varlen as varlen
from c3po import C3POLossConfig, StepTotals, c3po_loss, packed_sequence_ids
from megatron_rl import topology
from megatron_rl.batch import by_sample, common_tokens, lay_out, pack, plan_microbatches
from megatron_rl.config.distillation import DistillationConfig, TeacherConfig
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import RECOMPUTE_MODULES, AlgoConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.model import backend, convert
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import Exporter, fill_adapters, load_hf, trained_slots
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.model.router import RoutingCounts
from megatron_rl.model.slots import frozen_names
from megatron_rl.model.te_spec import HAVE_TE
from megatron_rl.rollout.ports import choose_port
from megatron_rl.train_step.optimizer import build_mtp_optimizer, build_optimizer
from megatron_rl.train_step.step import TrainStep
from megatron_rl.train_step.watch import Watch
from megatron_rl.trainer.learner import teach
from megatron_rl.trainer.objective import TokenObjective
from megatron_rl.types import TrainSample
from tests.distributed.lora_cases import LORA_STEP, WITH_VARIANTS, cases_in, drawn_matrix
from tests.distributed.mutations import BREAK
from tests.distributed.networks import (
    BIAS_RATE,
    CHECKPOINT,
    MTP_LAYOUTS,
    MTP_NETWORKS,
    MTP_WITH_VARIANTS,
    SERVED,
    networks_in,
)

Run = Callable[[Path, str, topology.Topology], None]

convert.GATHER_BYTES = 1 << 14  # so that an export of these small networks takes several rounds too


def microbatches_of(step: cases.Step, here: topology.Topology, layout: str, count: int, top_k: int = 0) -> list:
    """This rank's packed micro-batches, with the step's old and reference log-probabilities laid along."""
    samples = [TrainSample(index, step.token_ids[index], step.loss_mask[index], step.old_logprobs[index],
                           step.advantages[index], int(step.loss_mask[index].sum()),
                           None if step.routed_experts is None else step.routed_experts[index],
                           np.arange(len(step.token_ids[index])) // cases.TOKENS_PER_SENTENCE, teacher=0)
               for index in range(len(step.token_ids))]
    plan = plan_microbatches(
        step.lengths, dp_size=here.dp_size, tokens_per_microbatch=cases.TOKEN_CAP, cp_size=here.cp_size,
        align=cases.PACK_MULTIPLE, min_microbatches=count, multiple_of=cases.microbatch_multiple(layout))
    align = {"multiple_of": cases.PACK_MULTIPLE, "cp_size": here.cp_size}
    equal = "token_dispatcher" in cases.LAYOUTS[layout]
    least = common_tokens(plan, step.lengths, **align) if equal else [0] * len(plan[0])
    packed = []
    shape = None if step.routed_experts is None else step.routed_experts[0].shape[1:]
    for members, tokens in zip(plan[here.dp_rank], least, strict=True):
        batch = pack([samples[index] for index in members], **align, cp_rank=here.cp_rank, min_tokens=tokens,
                     device=here.device, experts_shape=shape, top_k=top_k)
        for name in ("old_logprobs", "ref_logprobs"):
            arrays = [getattr(step, name)[index][1:] for index in members]
            setattr(batch, name, lay_out(batch.source, arrays, dtype=np.float32).to(here.device))
        packed.append(batch)
    return packed


def token_loss(batch, logprobs_T, entropy_T):
    return c3po_loss(logprobs_T, batch.old_logprobs, batch.advantages, batch.loss_mask, phi=cases.PHI,
                     config=cases.LOSS, sequence_ids=packed_sequence_ids(batch.cu_seqlens),
                     sentence_ids=batch.sentence_ids, ref_logprobs=batch.ref_logprobs, entropy=entropy_T)


if "TRITON_INTERPRET" not in os.environ:
    import tests.distributed.gpu_operators  # noqa: F401  -- the CPU answers for Triton's kernels

_resolve = backend.resolve


def as_on_a_gpu(options: ModelConfig, *, gpu: bool) -> backend.Backend:
    """backend.resolve, with the attention and the kernels that model.backend=torch has on a GPU."""
    found = _resolve(options, gpu=gpu)
    if found.name != "torch":
        return found
    return replace(found, attention_at_once=True, kernels=replace(found.kernels, logprob="fused", pointwise="triton"))


class Runner:
    """The policy of one layout, freshly loaded, and what can be asked of it."""

    def __init__(self, folder: Path, layout: str, here: topology.Topology, *, distributed_optimizer: bool,
                 overlap: bool = False, recompute: str = "none", checkpoint: str = "norm_head_True",
                 temperature: float = cases.TEMPERATURE, kernels: str = "megatron", dtype: str = "float32",
                 step: str = "step.pt", lora: LoraConfig | None = None, mtp: bool = False,
                 overlap_shared_experts: bool = False):
        parallel = ParallelConfig(**cases.LAYOUTS[layout], distributed_optimizer=distributed_optimizer,
                                  overlap=overlap, overlap_shared_experts=overlap_shared_experts)
        checkpoint = folder / checkpoint
        self.here, self.layout, self.temperature = here, layout, temperature
        options = ModelConfig(path=str(checkpoint), recompute=recompute, recompute_modules=RECOMPUTE_MODULES,
                              dtype=dtype, **cases.KERNELS[kernels], lora=lora or LoraConfig(), mtp=mtp)
        with patch.object(backend, "resolve", as_on_a_gpu):
            self.policy = build_policy(read_config(checkpoint), options, parallel, with_gradients=True)
        load_hf(self.policy, self.here, checkpoint)
        fill_adapters(self.policy, self.here, drawn_matrix)
        optimizer = build_optimizer(self.policy, OptimizerConfig(**cases.OPTIMIZER), parallel)
        mtp_optimizer = build_mtp_optimizer(self.policy, OptimizerConfig(**cases.OPTIMIZER), parallel)
        self.new_step = partial(self._train_step, self.policy, optimizer, mtp_optimizer)
        self.train_step = self.new_step()
        self.adapters = self.policy.adapters is not None
        self.exporter = Exporter(self.policy, self.here)
        self.step: cases.Step = torch.load(folder / step, weights_only=False)

    def _train_step(self, policy, optimizer, mtp_optimizer=None) -> TrainStep:
        return TrainStep(policy, optimizer, self.here, temperature=self.temperature, chunk_tokens=16,
                         mtp_optimizer=mtp_optimizer)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.exporter()}

    def matrices(self) -> dict[str, torch.Tensor]:
        """The adapters' own, whole."""
        return {name: tensor.clone() for name, tensor in Exporter(self.policy, self.here, adapters=True)()}

    def gradients(self, count: int, *, counting_pass: bool = True) -> dict[str, torch.Tensor]:
        """The step's gradients under their Hugging Face names, on rank 0: main_grad exported as if it were weights."""
        batches, counts = self._counted(count)
        return self.gradients_of(batches, counts if counting_pass else None)

    def distilled(self, options: dict[str, str]) -> dict[str, torch.Tensor]:
        """Gradients of the dense term alone, whose teacher is the policy without its NormHead, or with one."""
        config = DistillationConfig({"a": TeacherConfig(checkpoint="x")}, task_reward=False, top_k=cases.TOP_K,
                                    **options)
        algo = AlgoConfig(distillation=config, loss=C3POLossConfig(kl_coef=0.0, entropy_coef=0.0))
        batches = microbatches_of(self.step, self.here, self.layout, 2, cases.TOP_K)
        network = self.policy.config
        other = replace(self.policy, config=replace(network, norm_head=not network.norm_head))
        teach(batches, config, self.train_step, {0: self._train_step(other, None)})
        self.train_step = self.new_step()  # one step owns Megatron's hooks
        totals = StepTotals(phi=cases.PHI, selected_tokens=1, num_responses=1, max_response_tokens=1)
        watch = Watch(self.policy, self.here, batches)  # as the replay of a dumped step does
        gradients = self.gradients_of(batches, None, watch.objective(TokenObjective(algo, totals)),
                                      router_losses=False)
        assert watch.findings == []
        return gradients

    def gradients_of(self, batches: list, counts: RoutingCounts | None, loss=token_loss, *,
                     router_losses: bool = True) -> dict[str, torch.Tensor]:
        self.train_step.backward(batches, loss, balance_coef=router_losses * cases.BALANCE_COEF,
                                 z_loss_coef=router_losses * cases.Z_LOSS_COEF, counts=counts)
        parameters = [parameter for _, parameter in trained_slots(self.policy, self.here)]
        kept = [p.data for p in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad
        frozen = frozen_names(self.policy.config, mtp=self.policy.mtp is not None)
        exporter = Exporter(self.policy, self.here, adapters=self.adapters)
        exported = {name: tensor.clone() for name, tensor in exporter() if name not in frozen}
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
        return exported

    def update(self, count: int) -> dict:
        """Weights after one optimiser step, the step's report, and the names whose replicas differ between ranks."""
        batches, counts = self._counted(count)
        result = self.train_step.update(batches, token_loss, lr=cases.LEARNING_RATE, balance_coef=cases.BALANCE_COEF,
                                        z_loss_coef=cases.Z_LOSS_COEF, counts=counts)
        return {"weights": self.weights(), "gauges": dict(result.gauges), "differing_replicas": self._replicas(),
                "sums": {key: (float(value.sum), float(value.count)) for key, value in result.sums.items()}}

    def logprobs(self, *, norm_head: bool) -> dict[int, torch.Tensor]:
        """fp32 [L-1] of every sequence by its index: what the context-parallel ranks of the last stage hold, added."""
        policy = replace(self.policy, config=replace(self.policy.config, norm_head=norm_head))
        batches = microbatches_of(self.step, self.here, self.layout, 2)
        found = {}
        outputs = self._train_step(policy, None).logprobs(batches)
        for batch, logprobs_T in zip(batches if outputs else [], outputs, strict=True):
            found |= dict(zip(batch.sample_indices, by_sample(batch, logprobs_T), strict=True))
        whole: dict[int, torch.Tensor] = {}
        for tp_rank, part in self.here.gather_objects((self.here.tp_rank, found)):
            for index, value in part.items() if tp_rank == 0 else ():
                whole[index] = whole[index] + value if index in whole else value
        return whole

    def _counted(self, count: int):
        batches = microbatches_of(self.step, self.here, self.layout, count)
        _, counts = self.train_step.count_routing(batches)
        return batches, counts

    def _replicas(self) -> list[str]:
        """Names of parameters whose copies on different ranks are not equal bit for bit."""
        own = {}
        for slot, parameter in trained_slots(self.policy, self.here):
            rank = self.here.tp_rank if slot.over == "tp" else self.here.etp_rank
            own[slot.key, 0 if slot.cut == "none" else rank] = cases.sha256(parameter)
        seen: dict[tuple, set] = {}
        for part in self.here.gather_objects(own):
            for key, digest in part.items():
                seen.setdefault(key, set()).add(digest)
        return sorted(key[0] for key, digests in seen.items() if len(digests) > 1)


def run_layout(folder: Path, layout: str, here: topology.Topology) -> None:
    """All cases of one layout; rank 0 saves them as LAYOUT.pt."""
    result: dict = {"gradients": {}, "mutated": {}, "updated": {}}
    runner = Runner(folder, layout, here, distributed_optimizer=False)
    result["loaded"] = {name: cases.sha256(tensor) for name, tensor in runner.exporter()}
    result["logprobs"] = {norm_head: runner.logprobs(norm_head=norm_head) for norm_head in (True, False)}
    for count in cases.MICROBATCHES:
        result["gradients"][count] = runner.gradients(count)
    result["after_gradients"] = {name: cases.sha256(tensor) for name, tensor in runner.exporter()}
    result["updated"]["plain"] = runner.update(cases.UPDATE_MICROBATCHES)
    load_hf(runner.policy, runner.here, folder / "norm_head_True")
    if cases.microbatch_multiple(layout) == 1:
        result["without_counting_pass"] = runner.gradients(1, counting_pass=False)
    for mutation in cases.mutations(layout):
        with BREAK[mutation](runner):
            result["mutated"][mutation] = runner.gradients(cases.UPDATE_MICROBATCHES)
    for surrogate in cases.SURROGATES if cases.holds_whole_sequences(layout) else ():
        with patch.object(cases, "LOSS", replace(cases.LOSS, surrogate=surrogate)):
            result.setdefault("surrogates", {})[surrogate] = runner.gradients(cases.UPDATE_MICROBATCHES)
    result["distilled"] = {name: runner.distilled(options) for name, options in cases.DISTILLED.items()}
    runner = Runner(folder, layout, here, distributed_optimizer=False, kernels="torch")
    varlen.CALLS.clear()
    result["torch"] = {"gradients": runner.gradients(cases.UPDATE_MICROBATCHES), "calls": len(varlen.CALLS),
                       "layers": sum(len(gpt.decoder.layers) for gpt in runner.policy.gpt_models)}
    for variant, options in cases.VARIANTS.items():
        result["updated"][variant] = Runner(folder, layout, here, **options).update(cases.UPDATE_MICROBATCHES)
    if here.is_main:
        torch.save(result, folder / f"{layout}.pt")


def run_networks(folder: Path, layout: str, here: topology.Topology) -> None:
    """The networks of networks.py in one layout: what came back of the checkpoint, log-probabilities, gradients and a
    step; rank 0 saves them as LAYOUT.networks.pt."""
    results = {}
    for name in networks_in(layout):
        runner = Runner(folder / name, layout, here, distributed_optimizer=False, checkpoint=CHECKPOINT)
        biases = [router.expert_bias for router in runner.policy.routers if router.enable_expert_bias]
        runner.policy.expert_bias_rate = BIAS_RATE if biases else 0.0
        results[name] = {"loaded": {key: cases.sha256(tensor) for key, tensor in runner.exporter()},
                         "logprobs": runner.logprobs(norm_head=runner.policy.config.norm_head),
                         "gradients": runner.gradients(cases.UPDATE_MICROBATCHES),
                         "updated": runner.update(cases.UPDATE_MICROBATCHES)}
    if here.is_main:
        torch.save(results, folder / f"{layout}.networks.pt")


def run_rank(rank: int, run: Run, folder: Path, world_size: int, port: int, layouts: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for layout in layouts:
        here = topology.start(ParallelConfig(**cases.LAYOUTS[layout]), seed=0)
        run(folder, layout, here)
        topology.stop(keep_processes=True)
    topology.stop()


def run_exports(folder: Path, layout: str, here: topology.Topology) -> None:
    """What an engine is to serve: SERVED exported from the layout to folder/NAME/export, and their log-probabilities
    at temperature 1 in LAYOUT.exports.pt."""
    logprobs = {}
    for name in SERVED:
        runner = Runner(folder / name, layout, here, distributed_optimizer=False, checkpoint=CHECKPOINT,
                        temperature=1.0)
        logprobs[name] = runner.logprobs(norm_head=runner.policy.config.norm_head)
        tensors = runner.weights()
        if here.is_main:
            source = folder / name / CHECKPOINT
            write_hf_folder(folder / name / "export", json.loads((source / "config.json").read_text()),
                            tensors.items(), tokenizer_from=source, carried_from=source)
    if here.is_main:
        torch.save(logprobs, folder / f"{layout}.exports.pt")


def run_kernels(folder: Path, layout: str, here: topology.Topology) -> None:
    """The step of step.pt, and that of given.pt with its experts replayed, with each choice of cases.KERNELS_IN; rank 0
    saves them as LAYOUT.kernels.pt."""
    results = {}
    for kernels in cases.KERNELS_IN[layout]:
        interpreted = kernels in cases.INTERPRETED
        recompute = "none" if interpreted else "full"
        runner = Runner(folder, layout, here, distributed_optimizer=False, kernels=kernels, recompute=recompute)
        result = results[kernels] = {"gradients": runner.gradients(cases.UPDATE_MICROBATCHES)}
        if interpreted:
            continue
        result["without_counting_pass"] = runner.gradients(1, counting_pass=False)
        result["updated"] = runner.update(cases.UPDATE_MICROBATCHES)
        load_hf(runner.policy, here, folder / "norm_head_True")
        runner.step = torch.load(folder / "given.pt", weights_only=False)
        result["given"] = runner.gradients(cases.UPDATE_MICROBATCHES)
        result["given_updated"] = runner.update(cases.UPDATE_MICROBATCHES)
    if here.is_main:
        torch.save(results, folder / f"{layout}.kernels.pt")


def run_shared_experts(folder: Path, layout: str, here: topology.Topology) -> None:
    """Gradients and a step of step.pt with the shared expert before the exchange and during it, by kernels and
    recompute; rank 0 saves them as LAYOUT.shared_experts.pt."""
    results = {}
    for kernels, recompute, overlapped in product(("megatron", "torch"), ("none", "full"), (False, True)):
        runner = Runner(folder, layout, here, distributed_optimizer=False, kernels=kernels, recompute=recompute,
                        overlap_shared_experts=overlapped)
        results[kernels, recompute, overlapped] = {
            "gradients": runner.gradients(cases.UPDATE_MICROBATCHES),
            "weights": runner.update(cases.UPDATE_MICROBATCHES)["weights"]}
    if here.is_main:
        torch.save(results, folder / f"{layout}.shared_experts.pt")


def run_bfloat16(folder: Path, layout: str, here: topology.Topology) -> None:
    """The step of bfloat16.pt in bfloat16, with each choice of kernels; rank 0 saves LAYOUT.bfloat16.pt."""
    result: dict = {"mutated": {}, "gradients": {}}
    for kernels in cases.BFLOAT16_KERNELS:
        runner = Runner(folder, layout, here, distributed_optimizer=False, checkpoint="bfloat16", step="bfloat16.pt",
                        dtype="bfloat16", kernels=kernels)
        result["gradients"][kernels] = runner.gradients(cases.UPDATE_MICROBATCHES)
        if kernels == "megatron":
            result["logprobs"] = runner.logprobs(norm_head=True)
            for mutation in cases.BFLOAT16_MUTATIONS:
                if mutation in cases.mutations(layout):
                    with BREAK[mutation](runner):
                        result["mutated"][mutation] = runner.gradients(cases.UPDATE_MICROBATCHES)
    if here.is_main:
        torch.save(result, folder / f"{layout}.bfloat16.pt")


def run_card(backends: Sequence[str], folder: Path, layout: str, here: topology.Topology) -> None:
    """As run_bfloat16, with backends of a GPU; rank 0 saves LAYOUT.card.pt, on the CPU."""
    results = {}
    for kernels in backends:
        runner = Runner(folder, layout, here, distributed_optimizer=False, checkpoint="bfloat16", step="bfloat16.pt",
                        dtype="bfloat16", kernels=kernels)
        gradients, logprobs = runner.gradients(cases.UPDATE_MICROBATCHES), runner.logprobs(norm_head=True)
        results[kernels] = {"gradients": {name: tensor.cpu() for name, tensor in gradients.items()},
                            "logprobs": {index: tensor.cpu() for index, tensor in logprobs.items()}}
    if here.is_main:
        torch.save(results, folder / f"{layout}.card.pt")


def run_lora(folder: Path, layout: str, here: topology.Topology) -> None:
    """The adapters of lora_cases.py in one layout; rank 0 saves what came out as LAYOUT.lora.pt."""
    results = {}
    for name, case in cases_in(layout).items():
        options = {"checkpoint": f"{case.network}/{CHECKPOINT}", "step": f"{case.network}/{LORA_STEP}",
                   "lora": case.lora}
        runner = Runner(folder, layout, here, distributed_optimizer=False, **options)
        norm_head = runner.policy.config.norm_head
        with runner.policy.adapters.off():
            off = runner.logprobs(norm_head=norm_head)
        result = results[name] = {"logprobs": runner.logprobs(norm_head=norm_head), "off": off,
                                  "merged": runner.weights()}
        result["gradients"] = runner.gradients(cases.UPDATE_MICROBATCHES)
        result["updated"] = {"plain": runner.update(cases.UPDATE_MICROBATCHES) | {"adapters": runner.matrices()}}
        result["grouped"] = Runner(folder, layout, here, distributed_optimizer=False, kernels="grouped_mm",
                                 **options).gradients(cases.UPDATE_MICROBATCHES)
        for variant, more in cases.VARIANTS.items() if (layout, name) in WITH_VARIANTS else ():
            runner = Runner(folder, layout, here, **more, **options)
            result["updated"][variant] = runner.update(cases.UPDATE_MICROBATCHES) | {"adapters": runner.matrices()}
    if here.is_main:
        torch.save(results, folder / f"{layout}.lora.pt")


def run_mtp(folder: Path, layout: str, here: topology.Topology) -> None:
    """Each of MTP_NETWORKS with the layer behind the last trained and without; rank 0 saves LAYOUT.mtp.pt."""
    results: dict = {}
    for name in MTP_NETWORKS if layout in MTP_LAYOUTS else ():
        for mtp in (False, True):
            options = {"checkpoint": f"{name}/{CHECKPOINT}", "step": f"{name}/step.pt", "mtp": mtp}
            runner = Runner(folder, layout, here, distributed_optimizer=False, **options)
            result = results.setdefault(name, {})[mtp] = {"loaded": runner.weights(), "updated": {}}
            result["gradients"] = runner.gradients(cases.UPDATE_MICROBATCHES)
            result["updated"]["plain"] = runner.update(cases.UPDATE_MICROBATCHES)
            for variant, more in cases.VARIANTS.items() if layout in MTP_WITH_VARIANTS else ():
                result["updated"][variant] = Runner(folder, layout, here, **more, **options).update(
                    cases.UPDATE_MICROBATCHES)
            if layout in MTP_WITH_VARIANTS:
                load_hf(runner.policy, here, folder / options["checkpoint"])
                result["distilled"] = {name: runner.distilled(more) for name, more in cases.DISTILLED.items()}
    if here.is_main:
        torch.save(results, folder / f"{layout}.mtp.pt")


RUNS = {"mtp": run_mtp, "bfloat16": run_bfloat16, "kernels": run_kernels, "step": run_layout, "networks": run_networks,
        "card": partial(run_card, ["torch", *(["transformer_engine"] if HAVE_TE else [])]),
        "torch_on_card": partial(run_card, ["torch"]),
        "exports": run_exports, "lora": run_lora, "shared_experts": run_shared_experts}


def main(run: Run, folder: str, world_size: str, *layouts: str) -> None:
    """`run` in each layout on world_size forked ranks, or on this one."""
    port = choose_port(None)
    if world_size == "1":
        return run_rank(0, run, Path(folder), 1, port, list(layouts))
    torch.multiprocessing.start_processes(
        run_rank, args=(run, Path(folder), int(world_size), port, list(layouts)), nprocs=int(world_size),
        start_method="fork")


if __name__ == "__main__":
    main(RUNS[sys.argv[1]], *sys.argv[2:])
