"""An export behaves as its source does, and what could end it is found before a run starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.config.schema import ModelConfig
from megatron_rl.launch.local import engines_for
from megatron_rl.model.hf_folder import HF_FILES, write_hf_folder
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from tests.tiny_models import write_tiny_bailing

KEPT = ["generation_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
        "qwen.tiktoken", "tokenization_mine.py", "modeling_mine.py", "preprocessor_config.json",
        "processor_config.json", "LICENSE", "additional_chat_templates/tool_use.jinja"]
LEFT = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "training_args.bin",
        "pytorch_model.bin.index.json", "consolidated.00.pth", "weights.gguf", "README.md", ".gitattributes",
        "trainer_state.json", "epoch.json"]


@pytest.fixture
def source(tmp_path) -> Path:
    return write_tiny_bailing(tmp_path / "source")


def exported(source: Path, target: Path) -> Path:
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    return write_hf_folder(target, config, weights.items(), tokenizer_from=source)


def test_everything_that_makes_the_models_behaviour_is_kept_byte_by_byte(source, tmp_path):
    ours = {file.name for file in source.iterdir()}
    for name in (*KEPT, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"the {name} of the source")
    for target in (tmp_path / "new", tmp_path / "new"):  # the second replaces the first, templates and all
        folder = exported(source, target)
        assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {*KEPT, *ours}
        for name in (*KEPT, "tokenizer.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_end_tokens_and_chat_template_reach_transformers(source, tmp_path):
    from transformers import GenerationConfig

    (source / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": true}')
    (source / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    folder = exported(source, tmp_path / "new")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]
    said = load_tokenizer(ModelConfig(path=str(folder))).apply_chat_template([{"role": "user", "content": "1+1"}],
                                                                             tokenize=False)
    assert said == "<1+1>"


def test_code_of_the_source_stays_named_and_other_code_does_not(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    named = {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig", "AutoModelForCausalLM": "modeling_mine.Model",
             "AutoModel": "modeling_elsewhere.Model", "AutoTokenizer": "somebody/repository--tokenization.T"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    (source / "modeling_mine.py").write_text("class Model: ...")
    (source / "configuration_bailing_moe.py").write_text("# the source's own")
    folder = exported(source, tmp_path / "new")
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        key: named[key] for key in ("AutoConfig", "AutoModelForCausalLM")}
    assert (folder / "configuration_bailing_moe.py").read_text() == "# the source's own"


def name_code(folder: Path, file: str, code: object, auto: str = "AutoConfig") -> None:
    raw = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**raw, "auto_map": {auto: code}}))


CODE = {
    "configuration": ("config.json", "configuration_mine.Config", "configuration_mine.py"),
    "model": ("config.json", "modeling_mine.Model", "modeling_mine.py"),
    "tokenizer": ("tokenizer_config.json", ["tokenization_mine.Slow", None], "tokenization_mine.py"),
    "processor": ("processor_config.json", "processing_mine.Processor", "processing_mine.py"),
    "elsewhere": ("config.json", "somebody/repository--modeling.Model", "somebody/repository--modeling.py"),
    "a changed copy of ours": ("config.json", "configuration_bailing_moe.BailingMoeConfig",
                               "configuration_bailing_moe.py"),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_of_a_folder_is_refused_by_the_files_name_and_never_runs(source, tmp_path, kind, capsys):
    file, code, named = CODE[kind]
    name_code(source, file, code)
    ran = tmp_path / "ran"
    if "/" not in named:
        (source / named).write_text(f"open({str(ran)!r}, 'w')")
    message = f"auto_map of {file} names {named}, code that engine and tokenizer would run"
    for command in ("rl", "sft", "evaluate"):
        assert main([command, f"model.path={source}", f"run.dir={tmp_path / 'run'}"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    config = load([f"model.path={source}"])
    with pytest.raises(ValueError, match="set model.trust_remote_code=true"):
        load_tokenizer(config.model)
    with pytest.raises(ValueError, match="set model.trust_remote_code=true"), \
            engines_for(config, config.model.path, tmp_path / "engine.log"):
        pass
    assert not ran.exists()


def test_code_runs_when_it_is_trusted_and_ours_needs_no_trust(source):
    load_tokenizer(ModelConfig(path=str(source)))
    assert (source / "configuration_bailing_moe.py").read_bytes() == (
        HF_FILES / "configuration_bailing_moe.py").read_bytes()
    name_code(source, "tokenizer_config.json", ["tokenization_mine.Mine", "tokenization_mine.Mine"],
              "AutoTokenizer")
    (source / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    mine = True\n")
    assert load_tokenizer(ModelConfig(path=str(source), trust_remote_code=True)).mine


def test_engines_that_start_together_copy_the_code_of_a_folder_into_folders_of_their_own(tmp_path):
    """transformers copies it in place, so that of two that share the copy one may find it empty."""
    code = "import os; print(os.environ['HF_MODULES_CACHE'])"  # which transformers reads
    engines = [EngineProcess([sys.executable, "-c", code], dict(os.environ), port=choose_port(None),
                             log_path=tmp_path / f"{number}.log", start_timeout_s=240.0, stop_timeout_s=5.0)
               for number in range(2)]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine._process.wait(240)
        engine.kill()
    first, second = (engine.log_path.read_text().split()[-1] for engine in engines)
    assert first != second and not Path(first).parent.exists(), "what is copied goes with the engine"


def no_dtype(source: Path, run: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))


def odd_dtype(source: Path, run: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float64"}))


def no_tokenizer(source: Path, run: Path) -> None:
    for file in source.glob("tokenizer*"):
        file.unlink()


def thesis_in_place(source: Path, run: Path) -> None:
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "thesis.tex").write_text("years of work")


def file_in_place(source: Path, run: Path) -> None:
    run.mkdir()
    (run / "hf").write_text("years of work")


OBSTACLES = {no_dtype: "torch_dtype=None must be one of", odd_dtype: "torch_dtype='float64' must be one of",
             no_tokenizer: "no tokenizer files there", thesis_in_place: "not replaced, because it is no Hugging Face",
             file_in_place: "is a file, not a folder"}


@pytest.mark.parametrize("command", [["rl"], ["rl", "--check"], ["sft"], ["convert", "roundtrip"]], ids=" ".join)
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_what_would_end_the_export_is_found_before_anything_starts(source, tmp_path, obstacle, command, capsys):
    run = tmp_path / "run"
    obstacle(source, run)
    assert main([*command, f"model.path={source}", f"run.dir={run}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"model.path={source} could not be exported at the end" in said and OBSTACLES[obstacle] in said


def test_a_full_disk_is_found_before_anything_starts(source, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert main(["rl", "--check", f"model.path={source}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "1,000 are free on that disk" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_exports_nothing_asks_for_no_dtype(source, tmp_path, capsys):
    no_dtype(source, tmp_path / "run")
    assert main(["rl", "--check", f"model.path={source}", f"run.dir={tmp_path / 'run'}", "run.export_hf=false",
                 "data.source=chains"]) == 0
