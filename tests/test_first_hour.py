"""The mistakes of a first hour, at 80 columns: each is refused before anything starts, with exit code 2, the key or
file at fault, and what to do about it."""

import shlex
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.recipes.quickstart import make_random_model

RL, SFT = "rl experiment=quickstart model.path=model", "sft experiment=quickstart_sft model.path=model"
FILE = "rl model.path=model data.source=jsonl"

MISTAKES = {
    # the command
    "a misspelt command": ("rll experiment=quickstart", "rll", "choose from"),
    "a key with dashes": (f"{RL} --algo.phi=3", "--algo.phi=3", "written key=value, without dashes"),
    "a key with a space": (f"{RL} algo.phi 3", "algo.phi", "section.key=value"),
    "an option that is not there": ("quickstart --resum", "--resum", "megatron-rl quickstart --help"),
    "a shell without completion": ("completion fish", "fish", "bash"),
    # keys
    "a misspelt key": (f"{RL} run.step=3", "run.step", "did you mean run.steps?"),
    "a misspelt key of SFT": (f"{SFT} sft.epoch=3", "sft.epoch", "did you mean sft.epochs?"),
    "a key without its section": (f"{RL} phi=3", "phi", "did you mean algo.phi?"),
    "the old name of a section": (f"{RL} c3po.phi=3", "c3po", "algo"),
    "a word for a number": (f"{RL} algo.phi=many", "algo.phi='many'", "must be int"),
    "a broken number": (f"{RL} optimizer.lr=1e-3x", "optimizer.lr='1e-3x'", "must be float"),
    "a number that cannot be": (f"{RL} algo.phi=0", "algo.phi=0", "at least 1 token"),
    "a negative rate": (f"{RL} optimizer.lr=-1", "optimizer.lr=-1.0", "must be positive"),
    "a temperature of zero": (f"{RL} rollout.temperature=0", "rollout.temperature=0.0", "must be positive"),
    "a choice that is not there": (f"{RL} rollout.publish=nccl", "rollout.publish=nccl", "tensor, broadcast, disk"),
    "yes for true": (f"{RL} run.resume=yes", "run.resume=yes", "false, true, auto"),
    "on for a mode": (f"{RL} observe.wandb=on", "observe.wandb=on", "did you mean online?"),
    "a type that is not trained": (f"{RL} model.dtype=float16", "model.dtype=float16", "did you mean bfloat16?"),
    "a misspelt experiment": ("rl experiment=quikstart model.path=model", "experiment=quikstart", "mean quickstart?"),
    "a misspelt pipeline": ("pipeline experiment=ring_lite_tinny", "ring_lite_tinny", "did you mean ring_lite_tiny?"),
    "a misspelt algorithm": (f"{RL} algo=c3p0", "algo=c3p0", "did you mean c3po?"),
    "a layout that is not shipped": (f"{RL} parallel=ep3", "parallel=ep3", "ep2"),
    # the model
    "the quick start not run yet": ("rl experiment=quickstart", "model.path=runs/quickstart/sft/hf", "make quickstart"),
    "a misspelt folder": (f"{RL}l", "model.path=modell", "give a Hugging Face folder"),
    "a name of the hub": (f"{RL[:-5]}inclusionAI/Ling-lite", "model.path=inclusionAI/Ling-lite", "Hugging Face folder"),
    "a file for a folder": (f"{RL[:-5]}own.jsonl", "model.path=own.jsonl", "give a Hugging Face folder"),
    "a model that is not there to evaluate": ("evaluate model.path=modell", "model.path=modell", "Hugging Face folder"),
    "a backend without its device": (f"{RL} model.backend=transformer_engine", "model.backend=transformer_engine",
                                     "leave it at auto"),
    # layouts and sizes
    "an expert split that does not divide": (f"{RL} parallel.ep=3 parallel.world_size=3", "parallel.ep=3",
                                             "1, 2, 4, 8 would"),
    "a tensor split that does not fit": (f"{RL} parallel.tp=3 parallel.world_size=3", "parallel.world_size=3",
                                         "multiple of"),
    "ranks that do not divide": (f"{RL} parallel.tp=2 parallel.world_size=3", "parallel.tp", "multiple of 2"),
    "a plan that does not divide": ("plan experiment=ring_lite_rl_stage1 parallel.tp=3", "parallel.world_size=256",
                                    "multiple of 3"),
    "a rank that is not there": ("rehearse experiment=ring_lite_rl_stage1 rank=999", "rank=999", "0 to 255"),
    "nodes that do not divide": ("slurm --dry-run experiment=quickstart model.path=model slurm.nodes=3 "
                                 "parallel.world_size=4", "slurm.nodes=3", "equally many ranks"),
    "a budget that cannot be met": (f"{RL} algo.phi=1000000", "algo.phi", "raise rollout.prompts_per_step"),
    "one response to a prompt": (f"{RL} rollout.responses_per_prompt=1", "rollout.responses_per_prompt=1",
                                 "at least 2"),
    "no room for a prompt": (f"{RL} rollout.max_response_tokens=128", "rollout.max_response_tokens=128",
                             "rollout.max_context_tokens=128"),
    "a stale collector without a correction": (f"{RL} rollout.collector=async", "rollout.collector=async",
                                               "algo.mismatch=tis"),
    "examples that do not fit": (f"{SFT} batch.tokens_per_microbatch=8", "chains-train-7-0",
                                 "raise batch.tokens_per_microbatch"),
    # rewards and functions
    "a misspelt scorer": (f"{RL} reward.routes.math=math_verfy", "reward.routes.math=math_verfy", "mean math_verify?"),
    "a reward that is not there": (f"{RL} reward.routes.math=own_judge.absent", "reward.routes.math=own_judge.absent",
                                   "module own_judge has no absent"),
    "a reward that returns a text": (f"{RL} reward.routes.math=own_judge.text", "reward.routes.math=own_judge.text",
                                     "not a number between"),
    "a reward that raises": (f"{RL} reward.routes.math=own_judge.boom", "reward.routes.math=own_judge.boom",
                             "KeyError: 'answers'"),
    "a reward of the wrong arguments": (f"{RL} reward.routes.math=own_judge.none", "reward.routes.math=own_judge.none",
                                        "takes 0 positional arguments"),
    "a metric that is not there": (f"{RL} observe.metrics=[own_judge.words]", "observe.metrics=own_judge.words",
                                   "has no words"),
    # data
    "a data file that is not there": (f"{FILE} data.path=absent.jsonl", "data.path=absent.jsonl", "looked in"),
    "no data file": (FILE, "data.source=jsonl", "needs data.path"),
    "an empty data file": (f"{FILE} data.path=empty.jsonl", "data.path=empty.jsonl", "holds no problem"),
    "a torn line": (f"{FILE} data.path=torn.jsonl", "torn.jsonl:2", "data.on_error=skip"),
    "other columns": (f"{FILE} data.path=question.jsonl", "question.jsonl:1", "set data.prompt_key"),
    "a source that is not there": (f"{FILE[:-5]}csv data.path=own.jsonl", "data.source=csv", "jsonl, parquet"),
    "a template that the tokenizer lacks": (f"{FILE} data.path=own.jsonl data.template=chat", "data.template=chat",
                                            "set data.template=plain"),
    "a domain without a scorer": (f"{FILE} data.path=own.jsonl data.domain=chemistry", "reward.routes.chemistry",
                                  "set it to"),
    "SFT on problems without answers": (f"{SFT} data.source=jsonl data.path=own.jsonl", "own.jsonl:2",
                                        "data.response_key"),
    # folders
    "resume where no run is": (f"{RL} run.resume=true run.dir=nowhere", "run.dir=nowhere", "resume=auto"),
    "a run below a file": (f"{RL} run.dir=own.jsonl/run", "own.jsonl", "is a file, not a folder"),
    "an address without http": (f"{RL} 'rollout.engine.urls=[localhost:30000]'", "rollout.engine.urls", "http://"),
    "a report of nothing": ("report nowhere", "nowhere/metrics.jsonl", "not the directory of a run"),
    "a dump of nothing": ("replay-step nowhere", "nowhere", "<run.dir>/dumps"),
    "an ablation that is not there": ("ablate fig10 --check", "fig10", "fig7_8_c3po_vs_grpo"),
    "epochs that were not exported": ("select-checkpoint select.folder=nowhere", "select.folder=nowhere",
                                      "sft.export_epochs=true"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the newcomer stands: a model, some files, a reward."""
    folder = tmp_path_factory.mktemp("hour")
    make_random_model(folder / "model", seed=0, num_hidden_layers=2)
    row = '{"prompt": "1+1=", "answer": "2"}\n'
    for name, text in {
        "own.jsonl": row + '{"prompt": "1+2=", "answer": "3"}\n', "torn.jsonl": row + '{"prompt": "1+2=",\n',
        "question.jsonl": '{"question": "1+1=", "solution": "2"}\n', "empty.jsonl": "",
        "own_judge.py": "def text(prompt, response): return 'good'\n"
                        "def boom(prompt, response): raise KeyError('answers')\n"
                        "def none(): return 1\n",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_starts(mistake, folder, monkeypatch, capsys):
    line, at_fault, remedy = MISTAKES[mistake]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    try:
        code = main(shlex.split(line))
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2, printed
    said = printed.err[printed.err.index("megatron-rl"):]
    assert at_fault in said and remedy in said, said
    assert "Traceback" not in printed.err and all(len(line) <= 80 for line in printed.out.splitlines()), printed.out
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_there_are_as_many_mistakes_as_a_first_hour_has():
    assert len(MISTAKES) >= 44
