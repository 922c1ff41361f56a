"""What is looked at before anything is started: every ValueError here costs seconds, not hours."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_rl.batch import check_hooks
from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.check import Sizes, check_gloo, check_rl
from megatron_rl.config.load import build, read_json
from megatron_rl.config.resume import changed, changes_experiment
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.foreign import load_function
from megatron_rl.model.adapter_folder import ADAPTER_FOLDER, check_adapter_place, identity, read_adapters, why_not_peft
from megatron_rl.model.adapters import check_lora, check_served, count_trained
from megatron_rl.model.architectures import HF_FILES, parse_config, read_config
from megatron_rl.model.backend import check_backend, resolve
from megatron_rl.model.checkpoint_files import check_resume, choose
from megatron_rl.model.hf_folder import HFReader, check_checkpoint, check_export, refuse_code
from megatron_rl.model.network import Network, check_layout
from megatron_rl.model.slots import count_parameters
from megatron_rl.observe.own import OwnMetrics
from megatron_rl.observe.say import warn
from megatron_rl.observe.sinks import CONFIG, check_logger
from megatron_rl.orchestrator import stages
from megatron_rl.orchestrator.own_evaluations import check_evaluations
from megatron_rl.preflight_gpu import check_transformer_engine
from megatron_rl.reward.route import Routes
from megatron_rl.rollout.environment import load_environment
from megatron_rl.rollout.scratch import check_tmpdir

__all__ = ["check_backends", "check_data", "check_devices", "check_folders", "check_functions", "check_memory",
           "check_reference", "check_sft_data", "network_of", "refuse_earlier_run", "sizes_of", "validate",
           "warn_of_seen_problems", "warn_of_shared_gpus"]

GENERATED_LOOKED_AT = 16
"""Problems of a generator that are made before the start: they are made on access, and checked then."""
MADE_BY = {"runs/quickstart/": "`make quickstart` makes it",
           "models/smollm2-moe": "`megatron-rl convert smollm2 models/smollm2-moe` makes it"}
"""Beginnings of model.path that the project's own experiments name, and where that model comes from."""


def network_of(config: Config) -> Network:
    """The network that the configuration names: model.path's, or model.architecture's when that is all there is.

    ValueError when neither is there, or when they disagree.
    """
    at_hand = model_is_here(config)
    if config.model.architecture is None:
        if not config.model.path:
            raise ValueError("model.path is not set: give a checkpoint's folder, "
                             "or an experiment that names one (experiment=quickstart)")
        for begins, how in MADE_BY.items():
            if not at_hand and config.model.path.startswith(begins):
                raise ValueError(f"model.path={config.model.path} is not there yet: {how}")
        return read_config(config.model.path)
    shipped = HF_FILES / f"{config.model.architecture}.json"
    path = shipped if shipped.is_file() else Path(config.model.architecture)
    if not path.is_file():
        raise ValueError(f"model.architecture={config.model.architecture}: no such file, and no shipped one of that "
                         f"name (there are {', '.join(sorted(p.stem for p in HF_FILES.glob('*.json')))})")
    declared = parse_config(read_json(path), str(path))
    if at_hand and read_config(config.model.path) != declared:
        raise ValueError(f"model.path={config.model.path} is not the network of "
                         f"model.architecture={config.model.architecture}")
    return declared


def validate(config: Config, *, start: bool, exports: bool = True) -> Sizes:
    """All rules that need no rank. start: the checkpoint must be here (False: --check, which looks at it if it is).

    exports: the run may end with a Hugging Face folder.
    """
    network = network_of(config)
    check_functions(config)
    if start or (config.model.path and any(Path(config.model.path).glob("*.safetensors"))):
        check_folders(config, exports=exports and config.run.export_hf)
    check_layout(network, config.parallel)
    check_backends(config, network)
    if config.rollout.publish == "adapter":
        check_served(config.model.lora, network)
    sizes = sizes_of(network)
    for each in stages.stage_configs(config):
        check_rl(each, sizes)
    return sizes


def check_folders(config: Config, *, exports: bool) -> None:
    """ValueError when model.path or model.reference_path is no whole checkpoint, or run.dir cannot be a folder.

    Also when loading the model would run code that model.trust_remote_code=false forbids, and, if the run exports,
    when its Hugging Face folder could not be written at the end.
    """
    refuse_code(config.model.path, trusted=config.model.trust_remote_code)
    check_checkpoint(read_config(config.model.path), HFReader(config.model.path), mtp=config.model.mtp)
    check_reference(config)
    if config.model.lora.path is not None:
        read_adapters(config.model, read_config(config.model.path))
    run_dir = Path(config.run.dir)
    require(run_dir.is_dir() or not run_dir.exists(), f"run.dir={run_dir} is a file: name a folder")
    if exports and config.model.lora.on:
        check_adapter_place(run_dir / ADAPTER_FOLDER, config.model, read_config(config.model.path))
    if exports:
        try:
            check_export(run_dir / "hf", read_json(Path(config.model.path) / "config.json"), config.model.path,
                         mtp=config.model.mtp)
        except ValueError as error:
            raise ValueError(f"model.path={config.model.path} could not be exported at the end (run.export_hf): "
                             f"{error}") from error


def check_reference(config: Config) -> None:
    """ValueError when the KL term's frozen policy is no whole checkpoint of the same network."""
    reference = config.model.reference_path
    if reference is not None and config.algo.loss.kl_coef > 0:
        check_checkpoint(read_config(config.model.path), HFReader(reference, key="model.reference_path"))


def sizes_of(network: Network) -> Sizes:
    return Sizes(network.max_position_embeddings, *count_parameters(network))


def check_backends(config: Config, network: Network) -> None:
    """ValueError for a backend that cannot take the network, and for what needs GPUs.

    There are GPUs if there are some here or slurm.gpus_per_node is set.
    """
    check_backend(config.model, network, config.parallel, gpu=_on_gpus(config))
    check_lora(config.model, network, gpu=_on_gpus(config))
    if config.model.backend == "transformer_engine" and torch.cuda.is_available():  # a login node need not have it
        check_transformer_engine(config.model.backend)
    check_gpu_parts(config)


def model_rows(config: Config, network: Network) -> list[tuple[str, str]]:
    """(name, value) rows of a summary: what model.lora trains, whether peft loads its folder, and what model.backend
    and model.kernels resolve to where the ranks will run."""
    lora, rows = config.model.lora, [("backend", str(resolve(config.model, gpu=_on_gpus(config))))]
    if lora.on:
        trained, total = count_trained(network, lora), count_parameters(network)[0]
        rows.insert(0, ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, experts {lora.experts}: {trained:,} "
                                f"parameters train, {trained / total:.2%} of the model's"))
        if (why := why_not_peft(network, lora)) is not None:
            rows.insert(1, ("adapter folder", f"not for peft, which {why} and gives other logits, some without a "
                                              "warning; use run.dir/hf (docs/lora.md)"))
    return rows


def _on_gpus(config: Config) -> bool:
    return torch.cuda.is_available() or config.slurm.gpus_per_node > 0


def check_gpu_parts(config: Config) -> None:
    """ValueError for a kernel or a layout that needs GPUs, unless there are some here or slurm.gpus_per_node is set."""
    if _on_gpus(config):
        return
    check_gloo(config.parallel)
    if os.environ.get("TRITON_INTERPRET") != "1":
        for name, choice in asdict(config.model.kernels).items():
            require(choice != "triton",
                    f"model.kernels.{name}=triton needs a GPU, and this machine has none; leave it at auto")


def check_devices(config: Config) -> None:
    """ValueError when TMPDIR is too long, or this machine has too few GPUs for the ranks or none for what needs one."""
    check_tmpdir()
    ranks = config.parallel.world_size
    if not torch.cuda.is_available():
        check_gpu_parts(config)
        return
    found = torch.cuda.device_count()
    require(ranks <= found, f"parallel.world_size={ranks} ranks need a GPU each, and this machine has {found}: choose "
            "a smaller layout (parallel=single), or several machines (`megatron-rl slurm`)")


def warn_of_shared_gpus(config: Config, *, slurm: bool = False) -> None:
    """A line where ranks and engines would hold memory of the same GPU at the same time, here or in a Slurm job."""
    engine, job = config.rollout.engine, config.slurm
    ranks = config.parallel.world_size // (job.nodes if slurm else 1)  # on one machine
    on_gpus = job.gpus_per_node > 0 and job.engine_nodes == 0 if slurm else torch.cuda.is_available()
    if on_gpus and not engine.urls and engine.device != "cpu" and not engine.colocate and engine.first_gpu < ranks:
        apart = f"rollout.engine.first_gpu={ranks}" + (" or slurm.engine_nodes" if slurm else "")
        warn(f"ranks and engines share GPU {engine.first_gpu}, where an engine takes rollout.engine."
             f"mem_fraction_static={engine.mem_fraction_static} of the memory; set {apart} for GPUs of its own, or "
             "rollout.engine.colocate=true to take turns")


def check_start(config: Config) -> None:
    """What a start of RL is refused for that asks neither for a GPU nor for an engine, beside `validate`."""
    refuse_earlier_run(config)
    check_resume(config.run, asdict(read_config(config.model.path)), identity(config.model.lora, config.model.path),
                 mtp=config.model.mtp)
    check_data(config)
    warn_of_seen_problems(config)


def check_functions(config: Config) -> None:
    """Find every function of the user's that runs in the orchestrator or in a rank; try those that take tensors."""
    OwnMetrics(config.observe.metrics)
    for path in config.observe.rollouts:
        load_function("observe.rollouts", path)
    for path in config.observe.loggers:
        check_logger(path)
    for each in stages.stage_configs(config):
        check_evaluations(each.eval)
        check_hooks(each.algo, each.reward.shaping)


def check_sft_start(config: Config) -> None:
    """check_start of supervised fine-tuning."""
    for path in config.observe.loggers:
        check_logger(path)
    check_folders(config, exports=config.run.export_hf or config.sft.export_epochs)
    refuse_earlier_run(config)
    check_resume(config.run, asdict(read_config(config.model.path)), identity(config.model.lora, config.model.path),
                 mtp=config.model.mtp)
    check_sft_data(config)


def check_from_afar(config: Config) -> None:
    """What of check_start can be looked at where the model is not: the run's folder and names, no row of data."""
    refuse_earlier_run(config)
    for each in stages.stage_configs(config):
        load_environment(each.rollout.environment)
        Routes({domain: name for domain, name in each.reward.routes.items() if name != "code"})  # needs a sandbox here


def model_is_here(config: Config) -> bool:
    return bool(config.model.path) and (Path(config.model.path) / "config.json").is_file()


def check_sft_data(config: Config) -> None:
    """Read the examples before ranks are started. ValueError as the parts raise it."""
    with quick_imports():
        from megatron_rl.model.tokenizer import load_tokenizer
        from megatron_rl.prompts import sft_source

    sft_source(config, load_tokenizer(config.model))


def check_data(config: Config, *, training: bool = True) -> None:
    """Read prompts, templates, reward routes and environment before anything is started. ValueError as they raise it.

    training=False: those of the evaluation alone.
    """
    check_tmpdir()
    with quick_imports():
        from megatron_rl.environment.agents import check_agent
        from megatron_rl.model.tokenizer import load_tokenizer
        from megatron_rl.orchestrator.evaluation import HELD_OUT, evaluation_data, number_evaluated
        from megatron_rl.orchestrator.teaching import check_teachers
        from megatron_rl.prompts import prompt_source
        from megatron_rl.reward import RewardPool

    for each in stages.stage_configs(config):
        load_environment(each.rollout.environment)
    require(training or bool(evaluation_data(config)),
            "eval.problems=0 without eval.benchmarks leaves nothing to evaluate: set one of them")
    tokenizer = load_tokenizer(config.model)
    for each in stages.stage_configs(config):
        check_agent(each.rollout.agent, tokenizer)
        if training:
            check_teachers(each, tokenizer)
    met: frozenset[str] = frozenset()
    for each in stages.stage_configs(config):
        with RewardPool(each.reward) as rewards:
            trained: frozenset[str] = frozenset()
            for name, data in (*[("", each.data)][:training], *evaluation_data(each).items()):
                source = prompt_source(each, data, tokenizer, rewards)
                rewards.check_domains(source.domains)
                if objections := source.objections(GENERATED_LOOKED_AT):
                    raise ValueError(f"data.source={data.source}: {objections[0]}")
                _try_rewards(rewards, source)
                if not name:
                    each.algo.distillation.check_domains(source.domains)
                    trained, met = source.questions(), met | source.domains
                elif told := number_evaluated(each, name, len(source))[1]:
                    warn(told)
                own = name and (name != HELD_OUT or each.eval.data is not None)  # else warn_of_seen_problems
                if own and (seen := len(trained & source.questions())):
                    warn(f"{seen} of the {len(source)} problems of the {name} set are among those that are trained on")
    for each in stages.stage_configs(config) if training else ():
        each.algo.distillation.check_routes(met)


def _try_rewards(rewards, source) -> None:
    """One judgement by each function of the user's own that judges one of the first problems."""
    firsts = {}
    for place in range(min(GENERATED_LOOKED_AT, len(source))):
        prompt = source.prompt(place)
        firsts.setdefault(prompt.domain, prompt)
    for prompt in firsts.values():
        rewards.try_out(prompt)


def check_memory(config: Config) -> None:
    """Before anything is started: ValueError where what the ranks hold all along exceeds this machine's memory.

    That part of the plan is exact. Where only the peak exceeds it, which is an estimate, a line says so. In every
    stage, since one may have teachers or a reference of its own.
    """
    from megatron_rl.plan import check_fits

    ranks, network = config.parallel.world_size, read_config(config.model.path)
    texts = [check_fits(network, each, ranks=ranks, machine="this machine", which=f"parallel.world_size={ranks} ranks")
             for each in stages.stage_configs(config)]
    for text in dict.fromkeys(text for text in texts if text is not None):
        warn(text)


def warn_of_seen_problems(config: Config) -> None:
    """A line where the held-out set is part of what is trained on."""
    data = config.data
    parts = data.mix.values() if data.mix and data.split == "all" else [data]
    if config.eval.problems and config.eval.data is None and any(part.split != "train" for part in parts):
        warn("the held-out problems are among those that are trained on: set data.split=train, or give others in "
             "eval.data")


def refuse_earlier_run(config: Config) -> None:
    """Before an engine is started or a file is written: an existing run is only continued on request, and as it was."""
    run_dir = Path(config.run.dir)
    metrics = run_dir / "metrics.jsonl"
    if not config.run.resume:
        if metrics.is_file() and metrics.stat().st_size:
            raise ValueError(f"{metrics} holds an earlier run: continue it with resume=true, or choose another run.dir")
        return
    begun = (run_dir / CONFIG).is_file() or metrics.is_file() or choose(config.run) is not None
    require(begun or config.run.resume == "auto", f"run.resume=true, but run.dir={run_dir} holds no run: correct "
            "run.dir, or begin one with resume=auto")
    if begun and choose(config.run) is None:
        warn(f"run.dir={run_dir} holds no checkpoint yet: the run begins at its start")
    if (run_dir / CONFIG).is_file():
        _compare_with(read_json(run_dir / CONFIG), config)


def _compare_with(written: dict, config: Config) -> None:
    """Says what a continuation changes. ValueError for what changes the experiment, unless that is accepted."""
    try:
        before = build(written)
    except ValueError as error:
        raise ValueError(f"run.dir={config.run.dir} was begun by another version, whose {CONFIG} this one cannot "
                         f"read ({error}): choose another run.dir") from error
    differing = changed(before, config)
    for key, old, new in differing:
        warn(f"the run goes on with another {key}: {json.dumps(old)} -> {json.dumps(new)}")
    refused = [f"{key} was {json.dumps(old)} and is {json.dumps(new)}"
               for key, old, new in changes_experiment(before, config)]
    if refused and not config.run.accept_changes:
        raise ValueError(f"run.dir={config.run.dir} was begun with other settings, and these change what is learned: "
                         f"{'; '.join(refused)}. Give the earlier values, choose another run.dir, or set "
                         "run.accept_changes=true to go on all the same")
