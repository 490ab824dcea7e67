"""plan.py: RADLADS' published times come out of the presets, and what is said to make a run fit does."""

import json
import subprocess
import sys
from functools import cache

import pytest
import runs
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf import launch
from models.cost import KINDS, seconds
from models.outline import outline, teacher_plan
from models.teacher import TeacherConfig, teacher_outline
from pipeline.planning import make_plan, notes
from reports.plan_table import markdown_plan

CONF = runs.REPOSITORY / "conf"
# Hours on 8 x MI300X (RADLADS, arXiv 2505.03005).
RADLADS = {
    "7b": {"align": 0.75, "distill": 5.5, "extend": 1.0},
    "32b": {"align": 2.5, "distill": 27.0, "extend": 3.0},
    "72b": {"align": 7.5, "distill": 54.0, "extend": 6.0},
}
MACHINES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


@pytest.fixture(autouse=True)
def composing():
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def composed(*overrides: str):
    config = compose("plan", overrides=["paths.run_folder=/nowhere", *overrides])
    launch.check(config)
    return config, launch.build(config.hardware, "hardware")


@cache
def plan(*overrides: str) -> dict:
    return make_plan(*composed(*overrides))


def stages(made: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in made["stages"]}


# The Hub's own counts of these models.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("3b", 3_085_938_688), ("7b", 7_615_616_512), ("32b", 32_763_876_352), ("72b", 72_706_203_648)],
)
def test_bundled_shapes_have_the_published_parameters(name: str, parameters: int):
    config = TeacherConfig(path="none/here", revision="main", shape=f"assets/configs/qwen2_5_{name}")
    model = teacher_outline(config)
    assert outline(model, teacher_plan(model)).parameters == parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("size", RADLADS)
def test_the_published_hours_come_out_of_the_presets(size: str):
    found = stages(plan(f"experiment=radlads_qwen2_5_{size}", "hardware=8xmi300x"))
    for name, within in {"align": 0.3, "distill": 0.1, "extend": 0.3}.items():
        assert found[name]["hours"] == pytest.approx(RADLADS[size][name], rel=within), name


def test_72b_needs_167_gb_and_fits_192_but_not_141():
    large = stages(plan("experiment=radlads_qwen2_5_72b", "hardware=8xmi300x"))["distill"]
    static = sum(large["memory_gb"][part] for part in ("teacher", "student", "gradients", "optimizer"))
    assert static == pytest.approx(167, abs=1) and large["fits"] and large["makes_it_fit"] is None
    small = stages(plan("experiment=radlads_qwen2_5_72b", "hardware=8xh200"))["distill"]
    assert not small["fits"] and small["makes_it_fit"] == ["16 devices (hardware.nodes, trainer.num_nodes)"]
    assert stages(plan("experiment=radlads_qwen2_5_72b", "hardware=16xmi300x"))["extend"]["fits"]


def test_arwkv_aligns_at_the_published_rate():
    found = stages(plan("experiment=arwkv_qwen2_5_7b", "hardware=8xh800"))["align"]
    assert found["tokens_per_second"] == pytest.approx(62_000, rel=0.15)


def test_rwkvx_reads_a_billion_tokens_in_80_device_hours():
    found = stages(plan("experiment=rwkvx_3_6b", "hardware=8xh200"))["long_context"]
    assert 8 * found["hours"] == pytest.approx(80, rel=0.1)


def test_the_quickstart_takes_minutes_on_two_cores():
    found = stages(plan("experiment=quickstart", "hardware=cpu_laptop"))
    assert found["align"]["hours"] * 60 == pytest.approx(2.6, rel=0.15)  # as measured beside other work
    assert found["distill"]["hours"] * 60 == pytest.approx(3.05, rel=0.15)
    assert found["select"]["trained"] == 0 and found["select"]["hours"] > 0


SINGLE = ["hardware=1xh200", "strategy=single", "trainer.devices=1"]
LONG = [
    "data.row_length=32768",
    "stage.distill.data.rows_per_device=1",
    "stage.distill.objective.chunk_tokens=128",
]


@pytest.mark.parametrize(
    ("overrides", "stage", "named"),
    [
        (
            ["hardware=8xh100", "trainer.recompute_blocks=false"],
            "distill",
            ["trainer.recompute_blocks=true"],
        ),
        (["hardware=8xh100", "strategy=ddp"], "distill", ["strategy=fsdp"]),
        (
            ["hardware=8xh100", "strategy=ddp", "trainer.recompute_blocks=false"],
            "extend",
            ["trainer.recompute_blocks=true", "strategy=fsdp"],
        ),
        (SINGLE, "distill", ["stage.distill.data.rows_per_device=3", "stage.distill.accumulate=4"]),
        (
            ["hardware=8xh100", "hardware.memory_gib=66", *LONG],
            "distill",
            ["stage.distill.data.cross_documents=true"],
        ),
        (
            ["hardware=8xh100", "hardware.memory_gib=34"],
            "distill",
            ["stage.distill.data.rows_per_device=3", "stage.distill.accumulate=4"],
        ),
        (
            ["hardware=8xh200", "hardware.memory_gib=48.1"],
            "extend",
            ["stage.extend.objective.chunk_tokens=512"],
        ),
        (
            [*SINGLE, "teacher.dtype=float32", "hardware.memory_gib=70"],
            "align",
            ["teacher.dtype=bfloat16"],
        ),
    ],
    ids=["recompute", "shard", "both", "rows", "documents", "fewer rows", "chunk", "teacher"],
)
def test_what_makes_it_fit_makes_it_fit(overrides: list[str], stage: str, named: list[str]):
    given = ["experiment=radlads_qwen2_5_7b", *overrides]
    before = stages(plan(*given))[stage]
    assert not before["fits"] and before["makes_it_fit"] == named
    changed = {word.partition("=")[0] for word in named}
    kept = [override for override in given if override.partition("=")[0] not in changed]
    new = [f"++{word}" if word.startswith("stage.") else word for word in named]
    assert stages(plan(*kept, *new))[stage]["fits"]


def test_a_run_that_nothing_helps_is_said_to_have_no_remedy():
    single = ["strategy=single", "trainer.devices=1"]
    made = plan("experiment=radlads_qwen2_5_72b", "hardware=cpu_laptop", *single)
    assert all(not stage["fits"] and stage["makes_it_fit"] is None for stage in made["stages"])
    assert "No switch makes it fit" in markdown_plan(made, "python plan.py")


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_is_complete(machine: str):
    hardware = launch.build(compose(f"hardware/{machine}").hardware, "hardware")
    devices = hardware.devices * hardware.nodes
    for kind in KINDS:
        peak = devices * hardware.peak("bf16-mixed") * hardware.utilisation[kind]
        assert seconds(peak, kind, hardware, devices, "bf16-mixed") == pytest.approx(1)
    assert hardware.capacity > 2**33 and hardware.peak("32-true") <= hardware.peak("bf16-mixed")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hardware.utilisation.align=1.5"], ["hardware.utilisation", "1.5"]),
        (["+hardware.utilisation.sleep=0.5"], ["hardware.utilisation", "sleep"]),
        (["hardware.devices=0"], ["hardware.devices=0"]),
        (["hardware.memory_gib=1"], ["hardware.memory_gib=1"]),
        (["hardware.price_per_device_hour=-1"], ["price_per_device_hour"]),
        (["~hardware.peak_flops.32-true"], ["hardware.peak_flops", "32-true"]),
        (["experiment=pretrain_tiny_teacher"], ["teacher.path", "plan.py"]),
        (["+hardware.gpus=8"], ["hardware", "gpus"]),
    ],
)
def test_a_bad_machine_is_refused_in_words_that_name_it(overrides: list[str], words: list[str]):
    with pytest.raises(Exception) as caught:
        plan(*overrides)
    message = launch.plain_message(caught.value)
    assert all(word in message for word in words), message


def test_optimiser_state_and_precision_count():
    key = "stage.distill.optimizer"
    without = [f"{key}._target_=torch.optim.SGD", f"~{key}.betas", f"~{key}.eps"]
    assert stages(plan("experiment=quickstart", *without))["distill"]["memory_gb"]["optimizer"] == 0
    memory = stages(plan("experiment=quickstart"))["distill"]["memory_gb"]
    assert memory["optimizer"] == pytest.approx(2 * memory["gradients"])
    half = stages(plan("experiment=quickstart", "teacher.dtype=bfloat16"))["distill"]["memory_gb"]
    assert half["teacher"] == memory["teacher"] / 2


def test_a_curriculum_is_priced_entry_by_entry():
    entries = ((0, 4096, 4), (40_000_000, 16384, 1))
    names = ("from_tokens", "row_length", "rows_per_device")
    table = [dict(zip(names, entry, strict=True)) for entry in entries]
    base = ["experiment=radlads_qwen2_5_7b", "hardware=8xmi300x"]
    written = str(table).replace("'", "").replace(" ", "")
    both = stages(plan(*base, f"stage.extend.curriculum={written}"))["extend"]
    whole = {}
    for length, rows in ((4096, 4), (16384, 1)):
        one = f"[{{from_tokens:0,row_length:{length},rows_per_device:{rows}}}]"
        whole[length] = stages(plan(*base, f"stage.extend.curriculum={one}"))["extend"]
    parts = {part["row_length"]: part["tokens"] for part in both["curriculum"]}
    assert sum(parts.values()) == both["tokens"] and 40_000_000 <= parts[4096] < 40_000_000 + 2**17
    expected = sum(whole[length]["flops_per_token"] * tokens for length, tokens in parts.items())
    assert both["flops"] == pytest.approx(expected)
    assert both["total_gb"] == max(one["total_gb"] for one in whole.values())


def test_notes_say_where_config_and_machine_differ():
    (said,) = notes(*composed("experiment=radlads_qwen2_5_7b", "hardware=16xmi300x"))
    assert "trainer.num_nodes=2" in said and "2 times" in said
    (said,) = notes(*composed("experiment=quickstart", "hardware=8xh100"))
    assert "strategy=fsdp" in said and "trainer.devices=8" in said
    assert not notes(*composed("experiment=radlads_qwen2_5_7b", "hardware=8xmi300x"))


def test_the_script_writes_what_it_says(tmp_path):
    overrides = ["experiment=radlads_qwen2_5_7b", "hardware=8xh100", f"paths.outputs={tmp_path}"]
    options = {"cwd": runs.REPOSITORY, "env": runs.environment(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "plan.py", *overrides], **options)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("plan/*")
    written = json.loads((folder / "plan.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == ["align", "distill", "extend"]
    assert written["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in written["stages"]))
    page = (folder / "plan.md").read_text()
    assert "experiment=radlads_qwen2_5_7b" in page and "all-gather buffers" in page
    assert "8 x H100" in done.stdout and "distill" in done.stdout


def test_a_plan_is_a_dry_run():
    config, _ = composed()
    assert OmegaConf.select(config, "dry_run") is True
