"""Calibrated starts: what is read off attention, what is set in mixers, and what a run keeps of it."""

import csv
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from tiny import HEAD_SIZE, convert, packed_batch, packed_ids, student_config, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from conf import launch
from models.architectures import attention_modules
from models.backbone import document_mask, has_documents
from models.calibration import (
    CalibrateMixers,
    scale_heads,
    set_half_life,
    set_rate,
)
from models.config import StudentConfig
from models.head_facts import attention_reach, observe
from models.induction import read_copies
from models.layer_plan import LayerPlan
from models.mixers import RWKV6Options
from models.student import student_mixers
from pipeline.calibration import TABLE

ROWS = [[-3, 11, 9, 5], [4, 15, -2, 7], [28]]
HALF_LIVES = torch.tensor([5.0, 40.0], dtype=torch.float64)
ALONE = {"induction": False, "decay": False, "rate": False, "scale": False}


def rwkv6_config(**options) -> StudentConfig:
    return StudentConfig(layer_plan=LayerPlan(mixer="rwkv6"), mixers={"rwkv6": RWKV6Options(**options)})


CONFIGS = {"rwkv7": student_config, "rwkv6": rwkv6_config}


def fresh(teacher: PreTrainedModel, mixer: str = "rwkv7", **options) -> PreTrainedModel:
    """A student right after transfer."""
    return convert(teacher, CONFIGS[mixer](**options))[0]


@contextmanager
def operands_of(mixer):
    """The operator's inputs r, log_w, k, v, ... of the newest call."""
    usual, seen = mixer.over_rows, []

    def record(*inputs, **options):
        seen[:] = inputs
        return usual(*inputs, **options)

    mixer.over_rows = record
    yield seen
    del mixer.over_rows


def run_mixer(mixer, tokens: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    with operands_of(mixer) as seen, torch.no_grad():
        mixer(torch.randn(2, tokens, mixer.shape.hidden_size, generator=generator))
    return seen


# --- what is read -------------------------------------------------------------------------------------------


def test_a_head_that_sees_the_token_before_and_one_that_sees_all_alike():
    document_ids = packed_ids([[-2, 4, 3]])
    mask = document_mask(document_ids, 9)[0, 0]
    alike = mask / mask.sum(-1, keepdim=True)
    before = torch.zeros(9, 9)
    for token in range(9):
        before[token, token - 1 if token and mask[token, token - 1] else token] = 1
    distance, entropy, choosing = attention_reach(torch.stack([before, alike])[None], document_ids)
    assert choosing == 5  # of 7 tokens, two begin a document
    assert distance.tolist() == pytest.approx([5, 0.5 + 1 + 1.5 + 0.5 + 1])
    assert entropy.tolist() == pytest.approx([0, 5])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama_biased"])
def test_distances_are_those_of_the_transferred_queries_and_keys(family):
    """softmax(r k) is the teacher's attention as long as nothing has been trained."""
    teacher, batch = tiny_teacher(family), packed_batch(ROWS)
    mixers = student_mixers(fresh(teacher))
    found = observe(mixers, teacher, [batch], probabilities=True)
    document_ids, inputs = batch["document_ids"], {}
    for index, module in attention_modules(teacher).items():
        module.register_forward_hook(
            lambda _, args, kwargs, output, index=index: inputs.update({index: kwargs}), with_kwargs=True
        )
    positions = torch.cat([torch.arange(abs(n)) for row in ROWS for n in row]).view(3, -1)
    mask = document_mask(document_ids, 28)
    with torch.no_grad():
        teacher(batch["input_ids"], attention_mask=mask, position_ids=positions)
    real = (document_ids >= 0)[:, None]
    for index, mixer in mixers.items():
        hidden = inputs[index]["hidden_states"]
        receptance, key, _ = mixer.project_heads(
            dict.fromkeys("rkv", hidden), inputs[index]["position_embeddings"]
        )
        key = key.repeat_interleave(receptance.shape[2] // key.shape[2], dim=2)
        scores = torch.einsum("bthn,bshn->bhts", receptance, key).masked_fill(~mask, -math.inf)
        places = torch.arange(28.0)
        distance = ((places - scores.softmax(-1) @ places) * real).sum((0, 2)) / real.sum()
        torch.testing.assert_close(found[index].mean_distance, distance.double(), rtol=1e-4, atol=1e-4)


def test_the_teacher_is_as_before():
    teacher = tiny_teacher()
    batch = packed_batch(ROWS)
    before = teacher(batch["input_ids"]).logits
    observe(student_mixers(fresh(teacher)), teacher, [batch], probabilities=True)
    assert teacher.config._attn_implementation == "sdpa"
    assert torch.equal(teacher(batch["input_ids"]).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in attention_modules(teacher).values())


def test_rows_of_a_batch_and_its_padding_make_no_difference():
    teacher = tiny_teacher()
    mixers, batch = student_mixers(fresh(teacher)), packed_batch(ROWS)
    whole = observe(mixers, teacher, [batch], probabilities=True)
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in (2, 0, 1)]
    apart = observe(mixers, teacher, rows, probabilities=True)
    changed = {**batch, "input_ids": torch.where(batch["document_ids"] < 0, 7, batch["input_ids"])}
    padded = observe(mixers, teacher, [changed], probabilities=True)
    assert has_documents(batch["document_ids"])
    for index in mixers:
        for first, second, third in zip(whole[index], apart[index], padded[index], strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-6)


# --- what is set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", CONFIGS)
def test_a_head_forgets_half_in_its_half_life(mixer):
    chosen = student_mixers(fresh(tiny_teacher(), mixer))[1]
    reached = set_half_life(chosen, HALF_LIVES)
    log_w = run_mixer(chosen)[1]
    kept = (log_w.double() * HALF_LIVES[:, None]).exp()
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(reached, HALF_LIVES)


@pytest.mark.parametrize(("mixer", "fastest"), [("rwkv7", math.log(2) / 0.6), ("rwkv6", math.log(2) / 5)])
def test_a_half_life_out_of_reach_becomes_the_nearest(mixer, fastest):
    chosen = student_mixers(fresh(tiny_teacher(), mixer))[0]
    reached = set_half_life(chosen, torch.tensor([0.0, math.inf], dtype=torch.float64))
    assert reached.tolist() == pytest.approx([fastest, math.log(2) * 1e6])
    log_w = run_mixer(chosen)[1]
    assert torch.isfinite(chosen.decay.bias).all()
    assert (-math.log(2) / log_w[0, 0, :, 0]).tolist() == pytest.approx(reached.tolist(), rel=1e-3)


@pytest.mark.parametrize("reach", [0.5, 1.0, 2.0])
def test_the_rate_is_the_one_asked_for_within_its_range(reach):
    chosen = student_mixers(fresh(tiny_teacher(), rate_range=reach))[1]
    reached = set_rate(chosen, torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert reached.tolist() == pytest.approx([0.3, min(0.7, 0.99 * reach)])
    *_, removed, written = run_mixer(chosen)
    rates = -(written * removed).sum(-1) / removed.square().sum(-1)
    torch.testing.assert_close(rates, reached.float().expand_as(rates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"group_norm": True, "bonus": True, "gate": "full"}], ids=str)
def test_a_scale_multiplies_what_its_head_adds(options):
    teacher = tiny_teacher("llama_biased")
    mixer, hidden = student_mixers(fresh(teacher, **options))[0], torch.randn(1, 9, 2 * HEAD_SIZE)
    bias = torch.zeros(2 * HEAD_SIZE) if mixer.output.bias is None else mixer.output.bias
    with torch.no_grad():
        mixer.output.weight[:, HEAD_SIZE:] = 0  # the second head adds nothing
        plain = mixer(hidden)[0] - bias
        scale_heads(mixer, torch.tensor([3.0, 7.0], dtype=torch.float64))
        torch.testing.assert_close(mixer(hidden)[0] - bias, 3 * plain, atol=1e-5, rtol=1e-5)


def test_the_scale_is_the_least_squares_one():
    teacher = tiny_teacher()
    mixers = student_mixers(fresh(teacher))
    facts = observe(mixers, teacher, [packed_batch(ROWS)], probabilities=False)[1]
    value = mixers[1].value
    with torch.no_grad():
        value.weight.mul_(4)
        value.bias.mul_(4)
    louder = observe(mixers, teacher, [packed_batch(ROWS)], probabilities=False)[1]
    assert (facts.scale > 0.1).all() and (facts.scale < 10).all()
    torch.testing.assert_close(louder.product / louder.energy, facts.product / facts.energy / 4)
    torch.testing.assert_close(louder.scale, (facts.scale / 4).clamp_min(0.1))


# --- the stage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", CONFIGS)
def test_each_switch_changes_its_own_parameters(mixer):
    teacher, batches = tiny_teacher(), [packed_batch(ROWS)]
    parts = {"decay": "decay.bias", "rate": "rate.bias", "scale": "output.weight"}
    for switch, name in parts.items():
        student, before = (fresh(teacher, mixer) for _ in range(2))
        stage = CalibrateMixers(name="calibrate", **{**ALONE, switch: True})
        rows, tokens = stage.calibrate(student, teacher, batches)
        changed = {
            key.partition("self_attn.")[2]
            for (key, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
            if not torch.equal(new, old)
        }
        assert changed == ({name} if hasattr(student_mixers(student)[0], name.partition(".")[0]) else set())
        assert tokens == 0 and [(row.layer, row.head) for row in rows] == [(i // 2, i % 2) for i in range(6)]
        assert all((row.scale is not None) == (switch == "scale") for row in rows)
        assert all((row.half_life_tokens is not None) == (switch == "decay") for row in rows)


def test_a_fit_brings_every_layer_nearer_and_counts_its_tokens():
    teacher, batches = tiny_teacher(), [packed_batch(ROWS), packed_batch(ROWS, seed=4)]
    student = fresh(teacher)
    rows, tokens = CalibrateMixers(name="calibrate", fit_passes=4).calibrate(student, teacher, batches)
    assert tokens == 4 * 2 * 3 * 28
    start = CalibrateMixers(name="calibrate").calibrate(fresh(teacher), teacher, batches)[0]
    assert all(row.layer_error_after < old.layer_error_after for row, old in zip(rows, start, strict=True))
    again = fresh(teacher)
    CalibrateMixers(name="calibrate", fit_passes=4).calibrate(again, teacher, batches)
    assert all(torch.equal(x, y) for x, y in zip(student.parameters(), again.parameters(), strict=True))


def test_layers_with_induction_heads_are_found_and_their_banks_started(monkeypatch):
    teacher, batches = tiny_teacher(), [packed_batch(ROWS)]
    ids = torch.arange(20).repeat(2, 2)
    copies = [{"input_ids": ids, "document_ids": torch.zeros_like(ids, dtype=torch.int32)}]
    scores = {index: x.scores for index, x in read_copies(range(3), teacher, copies).items()}
    best = max(scores, key=lambda index: float(scores[index].max()))
    border = float(scores[best].max())
    for module in ("models.calibration", "models.induction"):
        monkeypatch.setattr(f"{module}.SCORE", border)
    stage = CalibrateMixers(name="calibrate")
    found = stage.find_induction(fresh(teacher), teacher, copies)
    assert list(found) == [best]
    assert CalibrateMixers(name="calibrate", induction=False).find_induction(None, teacher, copies) == {}
    student = fresh(teacher, induction_layers=[best], induction_heads=1)
    rows, _ = stage.calibrate(student, teacher, batches, found, copies)
    chosen = (scores[best] >= border).tolist()
    for row in rows:
        if row.layer != best:
            assert row.induction_score is None
            continue
        assert row.induction_score == pytest.approx(float(scores[best][row.head]))
        assert (row.scale == 1.0) == chosen[row.head]
    assert (student_mixers(student)[best].induction.output.weight != 0).any()


def test_attention_of_a_hybrid_is_left_alone():
    teacher = tiny_teacher()
    student = fresh(teacher, keep=[1])
    kept = [p.clone() for p in attention_modules(student)[1].parameters()]
    rows, _ = CalibrateMixers(name="calibrate").calibrate(student, teacher, [packed_batch(ROWS)])
    assert {row.layer for row in rows} == {0, 2}
    assert all(map(torch.equal, attention_modules(student)[1].parameters(), kept))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[align,calibrate]"], ["stages: calibrate", "align", "put it first"]),
        (["stages=[calibrate]", "student.layer_plan.keep=[0,1,2,3]"], ["stage.calibrate", "layer_plan"]),
        (["stages=[calibrate]", "stage.calibrate.rows=0"], ["stage.calibrate.rows=0", "at least 1"]),
        (["stages=[calibrate]", "stage.calibrate.fit_passes=-1"], ["stage.calibrate.fit_passes=-1"]),
        (["stages=[calibrate]", "stage.calibrate.fit_learning_rate=0"], ["_rate=0", "fit_passes=0"]),
        (
            ["stages=[calibrate]", *(f"stage.calibrate.{name}=false" for name in ALONE)],
            ["stage.calibrate", "leave the stage out"],
        ),
        (["stages=[calibrate]", "stage.calibrate.decay=often"], ["stage.calibrate.decay=often"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(overrides: list[str], words: list[str]):
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(runs.REPOSITORY / "conf")):
        config = compose("train", overrides=["paths.run_folder=/nowhere", *overrides])
        with pytest.raises(ValueError) as caught:
            launch.check(config)
    for word in words:
        assert word in str(caught.value)


def finished(outputs: Path, cache: Path, *overrides: str) -> Path:
    done = runs.train(
        outputs,
        cache,
        "stages=[calibrate,align]",
        "stage.calibrate.rows=6",
        "stage.calibrate.rate=true",
        "stage.calibrate.fit_passes=2",
        "evaluation.decoding_contexts=[]",
        "callbacks.text_samples=null",
        *overrides,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return runs.run_folder(outputs)


def test_a_run_keeps_the_table_and_counts_the_tokens(tmp_path):
    folder = finished(tmp_path, tmp_path / "cache")
    table = list(csv.DictReader((folder / TABLE).open()))
    assert [(row["layer"], row["head"]) for row in table] == [
        (str(layer), str(head)) for layer in range(4) for head in range(4)
    ]
    assert all(float(cell) >= 0 for row in table for name, cell in row.items() if name != "induction_score")
    transfer, calibrate, align = runs.summary(folder)["stages"]
    assert calibrate["tokens"] == 2 * 6 * 128 and calibrate["kl"] < transfer["kl"]
    assert align["kl"] < calibrate["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_calibrate_like_one(tmp_path, strategy):
    one = finished(tmp_path / "one", tmp_path / "cache", "data.rows_per_device=4", "stage.calibrate.rows=8")
    two = finished(
        tmp_path / strategy,
        tmp_path / "cache",
        "data.rows_per_device=2",
        "stage.calibrate.rows=8",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        f"strategy={strategy}",
    )
    for first, second in zip(runs.summary(one)["stages"], runs.summary(two)["stages"], strict=True):
        assert second["kl"] == pytest.approx(first["kl"], rel=1e-5)
        assert second["tokens"] == first["tokens"]
    tables = [list(csv.DictReader((folder / TABLE).open())) for folder in (one, two)]
    for first, second in zip(*tables, strict=True):
        assert [name for name in first if not first[name]] == [name for name in second if not second[name]]
        numbers = [{name: float(cell) for name, cell in row.items() if cell} for row in (first, second)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
