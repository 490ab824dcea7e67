"""The presets for real models: they say what the papers say, and until they train they need no network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from hydra import compose, initialize_config_dir

from conf import launch
from conf.stages import build_stage, stage_data, stage_timeline
from models.conversion import check_plan
from models.mixers import MIXERS, KeptAttentionOptions
from models.teacher import REPOSITORY, TeacherConfig, load_hf_config, load_teacher
from pipeline.planning import make_plan

CONF = runs.REPOSITORY / "conf"
RADLADS = ("radlads_qwen2_5_7b", "radlads_qwen2_5_32b", "radlads_qwen2_5_72b")
PRESETS = (*RADLADS, "arwkv_qwen2_5_7b", "qrwkv6_32b", "rwkvx_3_6b", "hybrid_1_3_qwen2_5_7b")
TINY = "assets/tiny_qwen2"


@pytest.fixture(autouse=True)
def composing():
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def composed(name: str, *overrides: str, config: str = "train"):
    return compose(config, overrides=["paths.run_folder=/nowhere", f"experiment={name}", *overrides])


def rows_per_step(config, stage: str) -> int:
    data = stage_data(config, stage)
    return data.rows_per_device * config.stage[stage].accumulate * config.trainer.devices


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_checked_and_planned_without_its_weights(name: str):
    config = composed(name, "hardware=8xh200", config="plan")
    launch.check(config)
    assert config.name == name and config.trainer.devices == 8 and config.strategy.name == "fsdp"
    made = make_plan(config, launch.build(config.hardware, "hardware"))
    assert [stage["name"] for stage in made["stages"]] == list(config.stages)
    assert all(s["tokens"] > 0.99 * config.stage[s["name"]].get("tokens", -1) for s in made["stages"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_its_command_and_source(name: str):
    head = (CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0].replace("\n# ", " ")
    assert f"python train.py experiment={name}" in head and f"python plan.py experiment={name}" in head
    assert "arXiv" in head and "Published" in head and "Not yet run with this code" in head


@pytest.mark.parametrize("name", RADLADS)
def test_radlads_presets_follow_the_paper(name: str):
    config = composed(name)
    align, distill, extend = (launch.build(config.stage[stage], stage) for stage in config.stages)
    assert (align.tokens, distill.tokens, extend.tokens) == (1e8, 5e8, 1e8)
    assert [stage_data(config, stage).row_length for stage in config.stages] == [512, 512, 16384]
    assert rows_per_step(config, "align") == 32 and rows_per_step(config, "distill") == 96
    steps = [stage_timeline(config, stage, 8) for stage in (align, distill, extend)]
    assert align.rate_at("mixers", 50, steps[0]) == 1e-3 and align.rate_at("mixers", 6102, steps[0]) == 1e-5
    assert align.learning_rate["rest"] == 0 and align.warmup_steps == 50
    for stage, timeline in zip((distill, extend), steps[1:], strict=True):
        for step in (0, 50, timeline.steps):
            assert {stage.rate_at(group, step, timeline) for group in ("mixers", "rest")} == {1e-5}
    for stage in (align, distill, extend):
        options = stage.optimizer.keywords
        assert options["betas"] == [0.9, 0.95] and options["weight_decay"] == 0 and stage.gradient_clip == 1
    assert config.trainer.precision == "bf16-mixed"


def test_the_sizes_differ_in_the_teacher_only():
    teachers = [composed(name).teacher for name in RADLADS]
    assert [teacher.path.rpartition("/")[2] for teacher in teachers] == [
        f"Qwen2.5-{size}-Instruct" for size in ("7B", "32B", "72B")
    ]
    assert all(len(teacher.revision) == 40 for teacher in teachers)


def test_arwkv_has_its_block_and_rows():
    config = composed("arwkv_qwen2_5_7b")
    assert config.student.mixers.rwkv7.token_shift and config.student.mixers.rwkv7.written_key == "raw"
    assert stage_data(config, "align").row_length == 2048
    assert rows_per_step(config, "distill") * 2048 == 96 * 512


def test_rwkvx_keeps_the_order_of_its_recipe():
    config = composed("rwkvx_3_6b")
    assert list(config.stages) == ["align", "distill", "preheat", "cache_short_loss", "long_context"]
    assert config.stage.preheat.tokens == 1.5e9 and config.stage.preheat.learning_rate.rest == 0
    long = stage_data(config, "long_context")
    assert long.row_length == 64000 and long.cross_documents and "pg19" in long.sources.text.path
    assert config.stage.long_context.tokens == 1e9 and config.stage.long_context.learning_rate.rest == 1e-5
    student = launch.build(config.student, "student")
    plan = check_plan(student, load_hf_config(launch.build(config.teacher, "teacher")))
    assert plan == ["rwkv7", "rwkv7", "rwkv7", "sparse"] * 9


def test_qrwkv6_mixes_by_rwkv6():
    config = composed("qrwkv6_32b")
    assert config.student.layer_plan.mixer == "rwkv6"
    assert stage_data(config, "extend").row_length == 16384


def test_the_hybrid_follows_halo():
    config = composed("hybrid_1_3_qwen2_5_7b")
    assert list(config.stages) == ["align", "select", "distill", "extend"] and config.stage.select.keep == 7
    steps = [
        stage_timeline(config, build_stage(config, stage), 8).steps
        for stage in ("align", "distill", "extend")
    ]
    assert [round(count, -2) for count in steps] == [20000, 20000, 500]
    student = launch.build(config.student, "student")
    assert student.options("attention") == KeptAttentionOptions(
        rope=False, gate="full", log_position_scale=True, training_length=16384
    )
    plan = check_plan(student, load_hf_config(launch.build(config.teacher, "teacher")))
    assert plan == ["rwkv7"] * 28 and student.layer_plan.kept == "attention"


STUDENTS = sorted(path.stem for path in (CONF / "student").glob("*.yaml") if "scratch" not in path.stem)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_preset_fits_the_bundled_teacher(name: str):
    config = composed("quickstart", f"student={name}")
    launch.check(config)
    student = launch.build(config.student, "student")
    plan = check_plan(student, load_hf_config(launch.build(config.teacher, "teacher")))
    last = {"hybrid": "attention", "sliding": "sliding_window", "rwkvx": "sparse"}
    rest, added = "rwkv6" if name.startswith("rwkv6") else "rwkv7", {"rwkvx_inserted": ["+sparse"]}
    assert plan == [rest] * 3 + [last.get(name, rest), *added.get(name, [])]


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["student.layer_plan.every=2"], "RARA"),
        (["student.layer_plan.pattern='1:1'", "student.layer_plan.kept=sparse"], "RSRS"),
        (["student.layer_plan.mixer=[2 rwkv6,sliding_window]"], "66W6"),
        (["student.layer_plan.layers=[rwkv7,rwkv6,attention,sliding_window]"], "R6AW"),
        (["student=hybrid", "student.layer_plan.every=null", "student.layer_plan.keep=[0]"], "ARRR"),
        (["student.layer_plan.expansion.every=2"], "RR+SRR+S"),
        (["student.layer_plan.expansion={every: 3, mixer: rwkv6}"], "RRR+6R"),
        (["student.layer_plan.layers=[4 rwkv7,+sparse]"], "RRRR+S"),
    ],
    ids=str,
)
def test_a_plan_on_the_command_line_needs_no_other_key(overrides, wanted):
    config = composed("quickstart", "stages=[distill]", *overrides)
    launch.check(config)
    plan = launch.build(config.student, "student").layer_plan.resolve(4, list(MIXERS))
    letters = {"rwkv7": "R", "rwkv6": "6", "attention": "A", "sliding_window": "W", "sparse": "S"}
    letters |= {f"+{mixer}": f"+{letter}" for mixer, letter in letters.items()}
    assert "".join(letters[name] for name in plan) == wanted


@pytest.mark.parametrize("name", ["minipile", "dclm", "fineweb_edu"])
def test_data_presets_hold_out_what_they_do_not_train_on(name: str):
    config = compose("train", overrides=["paths.run_folder=/nowhere", f"data={name}"])
    data = launch.build(config.data, "data", tokenizer=None)
    trained, held_out = data.sources["text"], data.validation_sources["text"]
    assert (
        len(trained.revision) == 40
        and trained.path == held_out.path
        and trained.revision == held_out.revision
    )
    divided = (trained.split, held_out.split) == ("train", "validation")
    assert divided or trained.dataset_split != held_out.dataset_split


def shaped(**options) -> TeacherConfig:
    return TeacherConfig(**{"path": "no/where", "revision": "main", **options})


def test_the_shape_stands_in_for_a_teacher_that_is_not_here():
    config = shaped(shape="assets/configs/qwen2_5_72b")
    assert config.shape_only and load_hf_config(config).num_hidden_layers == 80
    assert not shaped(path=TINY, shape="assets/configs/qwen2_5_72b").shape_only
    assert load_hf_config(shaped(path=TINY, shape="assets/configs/qwen2_5_72b")).num_hidden_layers == 4


def test_a_shape_of_another_model_is_refused_when_weights_load(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"teacher.shape='assets/configs/qwen2_5_7b'.*num_hidden_layers 28 != 4"
    ):
        load_teacher(shaped(path=TINY, shape="assets/configs/qwen2_5_7b"))
    shutil.copy(REPOSITORY / TINY / "config.json", tmp_path)
    assert load_teacher(shaped(path=TINY, shape=str(tmp_path))).config.num_hidden_layers == 4
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"vocab_size": 2049}))
    with pytest.raises(ValueError, match="vocab_size 2049 != 2048"):
        load_teacher(shaped(path=TINY, shape=str(tmp_path)))


def test_a_shape_that_is_no_folder_is_refused():
    with pytest.raises(ValueError, match="teacher.shape='/nowhere'"):
        shaped(shape="/nowhere")


def test_a_dry_run_of_a_preset_needs_no_network(tmp_path: Path):
    command = [sys.executable, "train.py", "experiment=radlads_qwen2_5_72b", "dry_run=true"]
    done = subprocess.run(
        [*command, f"paths.outputs={tmp_path}"],
        cwd=runs.REPOSITORY,
        env=runs.environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "74,175,520,768 parameters" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
