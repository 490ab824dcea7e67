"""Every config composes; what is wrong is refused in plain words before anything heavy is loaded."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf import launch

CONF = runs.REPOSITORY / "conf"
RUN_FOLDER = "paths.run_folder=/nowhere"  # Hydra knows its own folder only inside a run


@pytest.fixture(autouse=True)
def composing():
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def refusal(*overrides: str) -> str:
    """What a user reads when a config is refused."""
    with pytest.raises(Exception) as caught:
        launch.check(compose("train", overrides=[RUN_FOLDER, *overrides]))
    return launch.plain_message(caught.value)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiments_compose_and_pass_the_checks(experiment: str):
    config = compose("train", overrides=[RUN_FOLDER, f"experiment={experiment}"])
    launch.check(config)
    OmegaConf.to_container(config, resolve=True)
    if config.trainer.devices == 1:  # a step of a preset for eight has more tokens than debug=fast
        for debug in ("fast", "overfit"):
            overrides = [RUN_FOLDER, f"experiment={experiment}", f"debug={debug}"]
            launch.check(compose("train", overrides=overrides))


@pytest.mark.parametrize(
    "group", ["student", "debug", "logger", "kernel", "data", "strategy", "trainer", "callbacks"]
)
def test_every_choice_of_a_group_composes(group: str):
    extra = {
        "files": ["data.sources.text.paths=[README.md]"],
        "chat": ["data.sources.chat.paths=[README.md]"],
        "preferences": ["data.sources.pairs.paths=[README.md]"],
        "hub": ["teacher.path=x", "teacher.revision=y"],
    }
    for choice in choices(group):
        if choice.endswith("_from_scratch"):
            continue  # go with teacher=none: the experiments pretrain_tiny_teacher and mqar
        overrides = [f"{group}={choice}", *extra.get(choice, [])]
        launch.check(compose("train", overrides=[RUN_FOLDER, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[]"], ["stages is empty"]),
        (["stages=[align,distil]"], ["distil", "unknown", "distill"]),
        (["stages=[align,align]"], ["twice"]),
        (["init_from=/nowhere"], ["init_from=/nowhere", "no finished student"]),
        (["ckpt_path=/nowhere"], ["ckpt_path=/nowhere", "auto"]),
        (["seed=-1"], ["seed=-1"]),
        (["teacher.path=/nowhere"], ["teacher.path", "/nowhere", "teacher.revision"]),
        (["teacher.dtype=float8"], ["teacher.dtype", "bfloat16"]),
        (["teacher.attention=fast"], ["teacher.attention", "sdpa"]),
        (["teacher=none"], ["stage.calibrate needs a teacher", "teacher=tiny_qwen2"]),
        (["student.start=copy"], ["student.start", "random_mixers"]),
        (["student.layer_plan.keep=[9]"], ["student.layer_plan.keep", "9", "4 layers"]),
        (["student.layer_plan.layers=[rwkv7,attention]"], ["2 entries", "4 layers"]),
        (["student.layer_plan.mixer=rwkv9"], ["rwkv9", "unknown", "rwkv7"]),
        (["student.layer_plan.kept=rwkv9"], ["rwkv9", "unknown", "attention"]),
        (["student.layer_plan.keep=[0]", "student.layer_plan.every=2"], ["keep and every", "null"]),
        (["student.layer_plan.pattern=3"], ["student.layer_plan.pattern", "a text"]),
        (["student.layer_plan.file=nowhere"], ["student.layer_plan.file=nowhere", "there is no"]),
        (["student.mixers.attention.gate=wide"], ["student.mixers.attention.gate", "wide", "silu"]),
        (["student.mixers.rwkv7.gate=wide"], ["gate", "wide", "low"]),
        (["student.mixers.rwkv7.rate_range=3"], ["rate_range", "(0, 2]"]),
        (["stage.distill.tokens=0"], ["stage.distill.tokens=0"]),
        (["stage.distill.schedule=step"], ["stage.distill.schedule", "cosine"]),
        (["stage.distill.learning_rate.mixers=-1"], ["stage.distill.learning_rate", "negative"]),
        (["stage.distill.objective.temperature=0"], ["temperature=0", "positive"]),
        (["stage.align.objective.loss=l3"], ["l3", "relative"]),
        (["+stage.align.tokenz=5"], ["stage.align", "tokenz"]),
        (["+data.rows=5"], ["data", "rows"]),
        (["+stage.align.data.row_lenght=5"], ["stage.align.data", "row_lenght", "row_length"]),
        (["data.rows_per_device=0"], ["data.rows_per_device=0"]),
        (["data.repeated_share=2"], ["data.repeated_share=2"]),
        (["data=files"], ["data.sources.text.paths", "need a value"]),
        (["data=files", "data.sources.text.paths=[/nowhere]"], ["data.sources", "/nowhere"]),
        (["stage.select.keep=0", "stages=[select]"], ["stage.select.keep=0"]),
        (["kernel.wkv7=fastest"], ["fastest", "chunked"]),
        (["trainer.devices=2"], ["trainer.devices=2", "strategy=single"]),
        (["trainer.precision=16"], ["trainer.precision=16", "bf16-mixed"]),
        (["trainer.threads=-1"], ["trainer.threads=-1", "from 0 on"]),
        (["name="], ["name=", "must be a text"]),
        (["seed=one"], ["seed=one", "whole number"]),
        (["stages=align"], ["stages=[align]", "list"]),
        (["stage.align.tokens=nan"], ["stage.align.tokens=nan", "a number"]),
        (["stage.align.learning_rate.mixers=inf"], ["stage.align.learning_rate.mixers=inf", "a number"]),
        (["stage.align.accumulate=two"], ["stage.align.accumulate=two", "whole number"]),
        (["stage.distill.tokens=5"], ["stage.distill.tokens=5", "one optimiser step"]),
        (["stage.distill.objective.chunk_tokens=0"], ["stage.distill", "chunk_tokens=0"]),
        (["stages=[align,select]", "stage.select.keep=5"], ["stage.select.keep=5", "4 replaced"]),
        (["data.row_length=1.5"], ["data.row_length=1.5", "whole number"]),
        (["data.workers=-1"], ["data.workers=-1"]),
        (["data.sources.stdlib.validation_share=nan"], ["data.sources.stdlib.validation_share=nan"]),
        (["callbacks.checkpoint.keep=0"], ["callbacks.checkpoint.keep=0"]),
        (["+callbacks.samples.prompts=[a]"], ["callbacks.samples has options but no _target_"]),
        (["callbacks.checkpoint.every_steps=-1"], ["callbacks.checkpoint.every_steps=-1"]),
        (["callbacks.stop_on_signal.signals=[SIGKILL]"], ["callbacks.stop_on_signal", "SIGKILL"]),
        (["callbacks.stop_on_signal.signals=SIGTERM"], ["callbacks.stop_on_signal.signals=SIGTERM", "list"]),
        (["evaluation.decoding_contexts=[8,4]"], ["evaluation.decoding_contexts[1]=4", "from 9 on"]),
        (["evaluation.decoding_tokens=0"], ["evaluation.decoding_tokens=0"]),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_in_words_that_name_it(overrides: list[str], words: list[str]):
    message = refusal(*overrides)
    for word in words:
        assert word in message, message
    assert "Traceback" not in message and len(message) < 700


@pytest.mark.parametrize(
    ("override", "stages", "words"),
    [
        ("stage.distill.tokens=5", "[align]", ["stage.distill.tokens=5", "no effect", "distill"]),
        ("student.start=random", "[align]", ["student.start=random", "no effect", "init_from"]),
        ("student=rwkv7_arwkv", "[align]", ["student=rwkv7_arwkv", "no effect", "init_from"]),
    ],
)
def test_an_override_without_effect_is_refused(override: str, stages: str, words: list[str]):
    config = compose("train", overrides=[RUN_FOLDER, f"stages={stages}", "init_from=/somewhere", override])
    with pytest.raises(ValueError) as caught:
        launch.check_overrides(config, ["seed=3", "stage.align.tokens=9", override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_refusal_loads_nothing_heavy_and_exits_with_2():
    program = (
        "import sys\nsys.argv = ['train.py', 'stages=[distil]']\n"
        "import runpy\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as exit:\n    print('code', exit.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=runs.REPOSITORY,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert "code 2 False" in done.stdout, done.stdout + done.stderr
    assert "Error: stages" in done.stderr


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+logger.wandb.api_key=hush", "logger.wandb.api_key"),
        ("+data.sources.stdlib.token=hush", "data.sources.stdlib.token"),
        ("name=see-hush-hush-12345", "name"),  # the value of a variable that is named like a secret
    ],
)
def test_a_secret_is_refused_and_not_repeated(override: str, key: str, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hush-hush-12345")
    with pytest.raises(ValueError, match="secret") as refused:
        launch.check(compose("train", overrides=[RUN_FOLDER, override]))
    assert key in str(refused.value) and "hush" not in str(refused.value)


def test_a_misspelt_override_is_refused_by_name():
    program = [sys.executable, "train.py", "stage.align.tokenz=5"]
    options = {"cwd": runs.REPOSITORY, "env": runs.environment(), "capture_output": True, "text": True}
    done = subprocess.run(program, **options)
    assert done.returncode != 0 and "tokenz" in done.stderr


SCRIPTS = ("train", "eval", "generate", "export", "plan", "benchmark")
PLACEHOLDERS = {
    "<run folder>": "outputs",
    "<folder>": "outputs",
    "<sweep folder>": "outputs",
    "<commit>": "main",
    "<file>": "chat.jinja",
}
# `python x.py ...` or `torchrun ... x.py ...`, on a line of its own up to its comment, or between backticks.
# Each of these has a test of its own, or needs a GPU.
OTHER_PROGRAMS = (
    "pipeline.sweep",
    "pipeline.token_efficiency",
    "pipeline.long_context_curves",
    "kernels.fused.measure",
    "kernels.bench.sparse",
    "pip",
    "venv",
)
COMMAND = re.compile(
    r"(?:^ +|`)(?:[\w./]*python|torchrun(?: --[\w=]+)+) (?:-m )?([\w.]+)((?:(?! {2,}| *#)[^`\n])*)",
    re.MULTILINE,
)


def documented_commands() -> list[str]:
    """Every command of the README and the other pages that starts Python."""
    root = runs.REPOSITORY
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    found = {(m[1], m[2].strip()) for page in pages for m in COMMAND.finditer(page.read_text())}
    return sorted(" ".join(pair).strip() for pair in found)


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_compose(command: str):
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    assert "<" not in command
    script, *arguments = shlex.split(command)
    if script in OTHER_PROGRAMS:
        return
    assert script.removesuffix(".py") in SCRIPTS
    overrides = [argument for argument in arguments if argument not in ("-m", "--cfg", "job")]
    for choice in _first_choices(overrides):
        compose(script.removesuffix(".py"), overrides=choice)


def _first_choices(overrides: list[str]) -> list[list[str]]:
    """A sweep's values one after the other, so that each composes."""
    swept = [o for o in overrides if re.fullmatch(r"[\w./@+~]+=[^\[\{'\"]*,.*", o)]
    if not swept:
        return [overrides]
    longest = max(len(o.partition("=")[2].split(",")) for o in swept)
    return [
        [_nth(o, index) if o in swept else o for o in overrides] for index in range(longest)
    ]  # fmt: skip


def _nth(override: str, index: int) -> str:
    key, _, values = override.partition("=")
    options = values.split(",")
    return f"{key}={options[index % len(options)]}"


def test_the_readme_is_covered():
    assert any("experiment=quickstart" in command for command in documented_commands())
    assert Path(CONF / "train.yaml").exists()
