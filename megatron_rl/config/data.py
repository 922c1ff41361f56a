"""Sections `data`, `eval` and `select`: where prompts come from, what is measured, which SFT checkpoint is chosen."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from megatron_rl.config.rules import require, require_real_breaks

_FILE = ("path", "on_error", "domain")
_COLUMNS = ("prompt_key", "answer_key", "response_key", "domain_key", "id_key")
_RENDERING = ("template", "prompt_prefix", "prompt_suffix", "split", "shuffle")
KEYS: dict[str, tuple[str, ...]] = {
    "jsonl": (*_FILE, *_COLUMNS, *_RENDERING),
    "function": (*_FILE, *_COLUMNS, *_RENDERING),
    **dict.fromkeys(("parquet", "hf_dataset"), (*_FILE, "hf_split", *_COLUMNS, *_RENDERING)),
    **dict.fromkeys(("gsm8k", "aime", "gpqa", "livecodebench"), (*_FILE, *_RENDERING)),
    "reasoning_gym": ("task", "task_config", "size", "seed", *_RENDERING),
    "human_eval": _RENDERING,
    "chains": ("task_config", "size", "seed", *_RENDERING),
    "arithmetic": ("size", "seed", *_RENDERING),
    "mix": ("mix", "weights", "curriculum", "split", "shuffle"),
}
"""data.source -> the keys that it reads. Every other one is refused when it is set."""


@dataclass(frozen=True)
class CurriculumStage:
    """A part of data.curriculum.

    - weights: the ratio in which this part draws from the sections of data.mix.
    - prompts: how many prompts this part draws; null for the last part, which has no end.
    """

    weights: dict[str, float] = field(default_factory=dict)
    prompts: int | None = None

    def __post_init__(self):
        require(self.prompts is None or self.prompts >= 1,
                f"data.curriculum.prompts={self.prompts} must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from; docs/data.md describes the files.

    - source: `jsonl`, `parquet` (a file, or a folder of files) and `hf_dataset` (a folder that Dataset.save_to_disk
      wrote) read files. `gsm8k`, `aime`, `gpqa` and `livecodebench` read those benchmarks' own files. `function` asks a
      function of yours for rows. `reasoning_gym` generates a task of that package. `human_eval` is built in, and so are
      the generators of the quick start (`chains`) and of the SmolLM2 example (`arithmetic`). `mix` draws from several
      sections.
    - path: the file or folder; for `function` the dotted path package.module.function of a function without arguments.
      hf_split: which split, if a folder holds several.
    - task: which task `reasoning_gym` generates. task_config: its options; `chains` with {max_operands: 20} makes
      longer sums, of uneven lengths, and {max_operands: 80, tail: 1} few of them very long.
    - mix: the sections of a `mix`, by name. weights: the ratio in which it draws from them; empty: that of their sizes.
      curriculum: parts with weights of their own, one after the other, instead of weights.
    - size, seed: how many problems a generator makes, and from which seed.
    - prompt_key, answer_key, domain_key, id_key: the columns of the rows; dots lead into nested ones
      (reward_model.ground_truth). response_key: the column of a worked answer, for SFT. domain: the domain of rows
      without one.
    - on_error: `stop` refuses a file with bad rows and lists them all; `skip` leaves them out, counts and logs them.
    - template: `plain` sends the prompt as it is; `chat` uses the tokenizer's chat template. prompt_prefix,
      prompt_suffix: texts that `plain` puts around the prompt.
    - split: a fixed eighth of all problem texts, chosen by hash, is `heldout`; the rest is `train`. The seed does not
      matter, so two sources with these splits share no problem. Generators draw until the text is in the split.
    - shuffle: a new order in every epoch.

    A key that the source does not read is refused if it is set.
    """

    source: Literal["jsonl", "parquet", "hf_dataset", "function", "gsm8k", "aime", "gpqa", "livecodebench",
                    "reasoning_gym", "human_eval", "chains", "arithmetic", "mix"] = "jsonl"
    path: str | None = None
    hf_split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    response_key: str | None = None
    domain_key: str | None = None
    id_key: str | None = None
    domain: str = "math"
    task: str | None = None
    task_config: dict[str, object] = field(default_factory=dict)
    size: int = 20000
    seed: int = 7
    split: Literal["train", "heldout", "all"] = "all"
    template: Literal["plain", "chat"] = "plain"
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    shuffle: bool = True
    mix: dict[str, DataConfig] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    curriculum: tuple[CurriculumStage, ...] = ()

    def __post_init__(self):
        self._refuse_unread()
        require(self.source != "reasoning_gym" or self.task is not None,
                "data.source=reasoning_gym needs data.task (a reasoning-gym dataset name, e.g. data.task=chain_sum)")
        require(self.size >= 1, f"data.size={self.size} must be at least 1")
        for name in ("prompt_prefix", "prompt_suffix"):
            require_real_breaks(f"data.{name}", getattr(self, name))
        self._check_mix()

    def _refuse_unread(self) -> None:
        read = KEYS[self.source]
        for each in fields(self):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            value = getattr(self, each.name)
            require(each.name in ("source", "mix", *read) or value == default,
                    f"{each.name}={value!r} is not read by source={self.source}, which reads {', '.join(read)}: leave "
                    f"it out{', or set it in the sections of data.mix' * (self.source == 'mix')} (if an experiment "
                    f"sets it: {each.name}={json.dumps(default)})")

    def _check_mix(self) -> None:
        require(bool(self.mix) == (self.source == "mix"),
                f"data.source={self.source} with data.mix of {len(self.mix)} section(s): a mix needs data.source=mix "
                "and its sections under data.mix")
        for name, part in self.mix.items():
            require(part.source != "mix", f"data.mix.{name}.source=mix: a section of a mix cannot be a mix")
            require(part.shuffle, f"data.mix.{name}.shuffle=false is not read: set data.shuffle, which holds for all")
            require(self.split in ("all", part.split) or part.split == "all",
                    f"data.mix.{name}.split={part.split}, but data.split={self.split} holds for all sections: keep one")
        require(not (self.weights and self.curriculum),
                "data.weights and data.curriculum are both set; keep one (stages have their own weights)")
        for key, weights in [("data.weights", self.weights), *(
                (f"data.curriculum[{i}].weights", stage.weights) for i, stage in enumerate(self.curriculum))]:
            unknown = sorted(weights.keys() - self.mix.keys())
            require(not unknown,
                    f"{key} names {', '.join(unknown)}; data.mix has {', '.join(self.mix) or 'no section'}")
            require(not weights or (min(weights.values()) >= 0 and sum(weights.values()) > 0),
                    f"{key}={weights} must not be negative, and one of them must be positive")
        for i, stage in enumerate(self.curriculum):
            require((stage.prompts is None) == (i == len(self.curriculum) - 1),
                    f"data.curriculum[{i}].prompts={stage.prompts}: every stage but the last needs a number of prompts")


@dataclass(frozen=True)
class BenchmarkConfig:
    """One of eval.benchmarks.

    - problems: take the first so many of its problems; null: all of them.
    - samples: responses to each problem; null: eval.samples_per_problem.
    """

    data: DataConfig = field(default_factory=DataConfig)
    samples: int | None = None
    problems: int | None = None

    def __post_init__(self):
        for name in ("samples", "problems"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"eval.benchmarks.{name}={value} must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on a held-out set and on benchmarks, during training and by `megatron-rl evaluate`.

    - data: where held-out problems come from. null: the held-out split of the training data, under eval.seed.
    - problems: size of the held-out set, its first problems; all of them if there are fewer; 0: no held-out set.
    - benchmarks: more sets, by name. Without a held-out set and benchmarks nothing is evaluated.
    - samples_per_problem: accuracy is the mean over them (avg@n); pass@k and maj@k go up to their number.
    - bootstrap_resamples: resamples behind the intervals. seed: fixes the held-out problems and the resamples.
    - functions: dotted paths of your own async functions (ask, step) -> numbers by name, where `await ask(text, n)`
      gives n responses. The numbers are logged as own/<name>. docs/extending.md has an example.
    - function_timeout_s: seconds that one of `functions` may take. Later its numbers are missing.
    - every_steps: how often training evaluates; 0: only at its ends.
    - temperature, top_p, max_response_tokens (null: that of `rollout`): how samples are drawn.
    """

    data: DataConfig | None = None
    problems: int = 256
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    functions: tuple[str, ...] = ()
    function_timeout_s: float = 600.0
    samples_per_problem: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int | None = None
    every_steps: int = 10
    seed: int = 99
    bootstrap_resamples: int = 2000

    def __post_init__(self):
        require(not self.functions or bool(self.problems or self.benchmarks),
                "eval.functions go with an evaluation: set eval.problems or eval.benchmarks")
        require(self.function_timeout_s > 0, f"eval.function_timeout_s={self.function_timeout_s} must be positive")
        require(self.samples_per_problem >= 1,
                f"eval.samples_per_problem={self.samples_per_problem} must be at least 1")
        require(self.problems >= 0, f"eval.problems={self.problems} must not be negative (0: no held-out set)")
        for name, data in [("data", self.data), *(
                (f"benchmarks.{name}.data", benchmark.data) for name, benchmark in self.benchmarks.items())]:
            for key in ("weights", "curriculum"):
                require(data is None or not getattr(data, key),
                        f"eval.{name}.{key} is not read: problems are evaluated in the ratio of the sections' sizes; "
                        "leave it out")
            require(data is None or data.shuffle,
                    f"eval.{name}.shuffle=false is not read: problems are evaluated in their order; leave it out")
        require("held-out" not in self.benchmarks, "eval.benchmarks.held-out: that name is taken")
        require(self.max_response_tokens is None or self.max_response_tokens >= 1,
                f"eval.max_response_tokens={self.max_response_tokens} must be at least 1")
        require(self.temperature >= 0, f"eval.temperature={self.temperature} must not be negative (0: greedy)")
        require(0 < self.top_p <= 1, f"eval.top_p={self.top_p} must lie in (0, 1]")
        require(self.every_steps >= 0,
                f"eval.every_steps={self.every_steps} must not be negative (0: only at the ends)")


@dataclass(frozen=True)
class SelectConfig:
    """`megatron-rl select-checkpoint`: the SFT checkpoint from which RL starts (Sec. 4.3.2).

    - folder: an SFT run with sft.export_epochs. problems: each of its epochs answers the first so many RL prompts.
      samples: how often it answers each.
    - rule: `entropy` considers the epochs whose policy entropy lies in a band. If there is none, it takes the epoch
      nearest to the band. `pass_at_1` and `pass_at_k` take the best of all epochs. prefer: by what `entropy` chooses
      among the epochs in the band.
    - entropy_low, entropy_high: the band, in nats per token.
    """

    folder: str = ""
    problems: int = 128
    samples: int = 8
    rule: Literal["entropy", "pass_at_1", "pass_at_k"] = "entropy"
    prefer: Literal["pass_at_1", "pass_at_k"] = "pass_at_k"
    entropy_low: float = 0.3
    entropy_high: float = 0.5

    def __post_init__(self):
        for name in ("problems", "samples"):
            require(getattr(self, name) >= 1, f"select.{name}={getattr(self, name)} must be at least 1")
        require(self.rule != "pass_at_k" or self.samples > 1,
                "select.rule=pass_at_k with select.samples=1 chooses by pass_at_1: raise select.samples")
        require(0 <= self.entropy_low < self.entropy_high,
                f"select.entropy_low={self.entropy_low} must lie below select.entropy_high={self.entropy_high}")
