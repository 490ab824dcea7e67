"""Inserted decoder layers: silent at first, unseen by what compares with the teacher, and there everywhere
else."""

import dataclasses

import mixer_checks
import pytest
import torch
from exported import exported_class, greedy, written
from tiny import (
    ARWKV,
    LAYERS,
    SLIDING,
    convert,
    disturb,
    packed_batch,
    random_ids,
    tiny_teacher,
)
from torch import Tensor
from transformers import PreTrainedModel

from models import architectures
from models.align import aligned_layers
from models.architectures import attention_modules, decoder_layers
from models.backbone import hidden_states
from models.calibration import CalibrateMixers
from models.config import StudentConfig
from models.conversion import build_student, check_plan, restore_attention
from models.layer_errors import layer_errors, why_not_comparable
from models.layer_plan import Expansion, LayerPlan, with_names
from models.losses import ALIGNMENT_LOSSES, IGNORED
from models.mixers import MIXERS, RWKV7Options
from models.objectives import Align, Distill
from models.selection import SelectLayers
from models.student import (
    aligned_mixers,
    inserted_layers,
    parameter_groups,
    student_mixers,
    teacher_places,
)
from models.student_folder import Student, load_student, save_student

PARENTS = (
    "gemma2",
    "gemma3_text",
    "glm4",
    "llama_biased",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2_tied",
    "qwen2_windows",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
ROWS = [[-3, 11, 9, 5], [28]]
BLOCK = "model.layers.2."  # what every=2 inserts into three layers
# `every` and the places of what it inserts into three layers.
EVERY = {1: (1, 3, 5), 2: (2,), 3: (3,)}


def config_of(every: int | None = 2, mixer: str = "sparse", keep=(1,), **options) -> StudentConfig:
    """RWKV-7 and kept layers, and inserted ones."""
    expansion = Expansion(every=every, mixer=mixer)
    return StudentConfig(layer_plan=LayerPlan(keep=keep, expansion=expansion), **options)


def expanded(teacher: PreTrainedModel, config: StudentConfig, noise: float = 0.05) -> Student:
    """A student away from its start, so that no part of it is silent."""
    plan = check_plan(config, teacher.config)
    model, _ = convert(teacher, config)
    disturb(model, noise)
    return Student(model.eval(), plan, config)


def pair_of(teacher: PreTrainedModel, **options) -> list[PreTrainedModel]:
    """The students with and without inserted layers."""
    return [convert(teacher, config_of(every, **options))[0].eval() for every in (2, None)]


def labelled() -> dict[str, Tensor]:
    batch = packed_batch(ROWS)
    assert (batch["labels"] != IGNORED).any()
    return batch


# --- the start ----------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_same_logits(models: list[PreTrainedModel]) -> None:
    """Bit for bit, over plain rows and rows of several documents."""
    ids, packed = random_ids(2, 20), packed_batch(ROWS)
    assert torch.equal(*(model(ids).logits for model in models))
    assert torch.equal(*(hidden_states(m, packed["input_ids"], packed["document_ids"]) for m in models))


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("family", PARENTS)
def test_an_inserted_layer_hands_on_what_it_gets(family, every):
    teacher = tiny_teacher(family)
    models = [convert(teacher, config_of(each))[0].eval() for each in (every, None)]
    assert inserted_layers(models[0]) == EVERY[every] and inserted_layers(models[1]) == ()
    assert len(decoder_layers(models[0])) == LAYERS + len(EVERY[every]) == models[0].config.num_hidden_layers
    assert teacher.config.num_hidden_layers == len(decoder_layers(teacher)) == LAYERS
    assert_same_logits(models)


@pytest.mark.parametrize("start", ["transfer", "random_mixers", "random"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_can_be_inserted_at_any_start(mixer, start):
    options = {"mixers": {"rwkv7": RWKV7Options(**ARWKV, induction_layers=[1])}, "start": start}
    models = pair_of(tiny_teacher("qwen3"), mixer=mixer, keep=(2,), **options)
    assert_same_logits(models)
    others = [[dict(layer.named_parameters()) for layer in decoder_layers(model)] for model in models]
    for place, tensors in zip(teacher_places(models[0]), others[1], strict=True):
        assert all(torch.equal(others[0][place][name], tensor) for name, tensor in tensors.items())
    banks = [m for m, mixer in student_mixers(models[0]).items() if getattr(mixer, "induction", None)]
    assert banks == [1], "of the layer with that number, not of the one made from it"


def test_the_last_layer_may_be_an_inserted_one_and_several_may_follow_each_other():
    teacher, layers = tiny_teacher(), ["rwkv7", "2 +sparse", "attention", "rwkv7", "+rwkv6"]
    plan = LayerPlan(layers=layers)
    models = [
        convert(teacher, StudentConfig(layer_plan=given))[0].eval()
        for given in (plan, LayerPlan(layers=["rwkv7", "attention", "rwkv7"]))
    ]
    assert inserted_layers(models[0]) == (1, 2, 5) and teacher_places(models[0]) == [0, 3, 4]
    assert_same_logits(models)


@pytest.mark.parametrize("start", ["transfer", "random_mixers", "random"])
@pytest.mark.parametrize("mixer", ["sparse", "rwkv7", "attention"])
@pytest.mark.parametrize("family", ["llama_biased", "qwen2_tied", "phi3", "qwen3_moe", "olmo2"])
def test_the_table_accounts_for_every_tensor(family, mixer, start):
    teacher = tiny_teacher(family)
    student, rows = convert(teacher, config_of(mixer=mixer, start=start))
    old, new = dict(teacher.named_parameters(remove_duplicate=False)), dict(student.named_parameters())
    assert sorted(row.target for row in rows if row.target) == sorted(new)
    assert {row.source.partition("[")[0] for row in rows if row.source} == set(old)
    for row in rows:
        action = row.action.partition(",")[0]
        in_block = row.target.startswith(BLOCK)
        assert action in ({"copied", "zero"} if in_block else {"kept", "moved"}) | {"new", "random"}
        assert row.shape == str(list(new[row.target].shape))
        if action in ("zero", "new"):
            assert not row.source and bool(new[row.target].any()) <= (action == "new")
        elif row.action in ("kept", "moved", "copied") and "[" not in row.source:
            assert torch.equal(new[row.target], old[row.source]), row
    silent = {row.target.removeprefix(BLOCK) for row in rows if row.action == "zero"}
    assert {name for name in silent if name.endswith("down_proj.weight") or name.endswith("down_proj")}
    assert {name for name in silent if name in ("self_attn.output.weight", "self_attn.o_proj.weight")}
    copied = {row.source for row in rows if row.action.startswith("copied")}
    assert all(source.startswith("model.layers.1.") for source in copied), "the layer before the block"
    assert bool(copied) == (start != "random")


# --- one architecture, everywhere ---------------------------------------------------------------------------


@pytest.fixture(params=["qwen3-sparse", "gemma2-sparse", "qwen2_windows-sliding_window", "qwen3_moe-rwkv7"])
def student(request) -> Student:
    """Kept attention stands behind an inserted layer, so its place in a cache is not its number."""
    family, mixer = request.param.split("-")
    return expanded(tiny_teacher(family), config_of(mixer=mixer, keep=(2,)))


def test_training_prefill_and_decoding_are_one_function(student):
    mixer_checks.assert_calls_equal_the_parallel_forward(student.model)
    mixer_checks.assert_documents_are_texts_of_their_own(student.model)
    if not getattr(student.model.config, "sliding_window", None):  # which counts padding, in any model
        mixer_checks.assert_padding_is_passed_over(student.model)


def test_it_generates(student):
    mixer_checks.assert_search_with_a_cache_equals_search_without(student.model)


def test_it_comes_back_from_disk(student, tmp_path):
    save_student(tmp_path / "student", student, mixer_checks.NoTokenizer())
    loaded = load_student(tmp_path / "student")
    assert loaded.plan == student.plan and inserted_layers(loaded.model) == (2,)
    places = {place: mixer.layer_index for place, mixer in student_mixers(loaded.model).items()}
    assert list(places) == list(places.values())
    ids = random_ids(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(ids).logits, student.model(ids).logits)


def test_its_export_is_the_student(student, tmp_path):
    folder = written(tmp_path / "export", student)
    other = exported_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    assert other.config.num_hidden_layers == LAYERS + 1 and other.config.layer_plan == student.plan
    ids = random_ids(2, 20)
    with torch.no_grad():
        mixer_checks.assert_close(other(ids).logits, student.model(ids).logits)
    continued = other.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert continued.tolist() == greedy(student.model, ids, 6).tolist()
    assert "4 layers, 1 of them inserted," in (folder / "README.md").read_text()
    assert load_student(folder).plan == student.plan


def test_the_kind_of_each_layer_is_in_the_config():
    config = {family: convert(tiny_teacher(family), config_of(every=1))[0].config for family in PARENTS}
    teacher = tiny_teacher("gemma2").config.layer_types
    assert config["gemma2"].layer_types == [kind for kind in teacher for _ in range(2)]
    assert SLIDING in teacher and tiny_teacher("gemma2").config.layer_types == teacher
    assert config["smollm3"].no_rope_layers == [1, 1, 0, 0, 1, 1]
    assert config["qwen3_moe"].mlp_only_layers == [2, 3]


def test_every_second_layer_with_experts_stays_one(tmp_path):
    student = expanded(
        tiny_teacher("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[]), config_of(every=1)
    )
    kinds = [type(layer.mlp).__name__ for layer in decoder_layers(student.model)]
    assert kinds == [kinds[0]] * 2 + [kinds[2]] * 2 + [kinds[0]] * 2 and kinds[0] != kinds[2]
    save_student(tmp_path / "student", student, mixer_checks.NoTokenizer())
    loaded = load_student(tmp_path / "student").model
    assert [type(layer.mlp).__name__ for layer in decoder_layers(loaded)] == kinds


def test_an_inserted_attention_follows_the_models_config():
    student, _ = convert(tiny_teacher(), config_of(mixer="attention"))
    assert attention_modules(student)[2].config is student.config
    assert attention_modules(student)[2].layer_idx == 2


# --- what compares with the teacher -------------------------------------------------------------------------


def test_alignment_passes_inserted_layers_by():
    teacher, batch = tiny_teacher(), labelled()
    models, options = pair_of(teacher, mixer="rwkv7"), {"layer_weights": [1, 5, 3]}
    found = [aligned_layers(m, teacher, batch, ALIGNMENT_LOSSES["l2"], **options) for m in models]
    assert list(found[0].layers) == [0, 2] and teacher_places(models[0]) == [0, 1, 3]
    assert found[0].layers == found[1].layers and torch.equal(found[0].total, found[1].total)
    for aligned, model in zip(found, models, strict=True):
        aligned.total.backward()
        mixers = student_mixers(model)
        trained = [place for place, mixer in mixers.items() if mixer.key.weight.grad is not None]
        assert trained == [teacher_places(model)[number] for number in (0, 2)]
    gradients = [[p.grad for m in aligned_mixers(model).values() for p in m.parameters()] for model in models]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True) if pair[0] is not None)


@pytest.mark.parametrize("by", ["kl", "copy", "alignment", "recall", "uniform"])
def test_selection_scores_the_teachers_layers(by):
    teacher, batch = tiny_teacher(), labelled()
    stage = SelectLayers(name="select", by=by, keep=1, task=object())
    rows = dict.fromkeys(("plain", "copies", "retrieval"), [batch])
    models = pair_of(teacher, mixer="rwkv7", keep=())
    before = [dict(attention_modules(model)) for model in models]
    scores = [stage.scores(model, teacher, [0, 1, 2], rows) for model in models]
    assert list(scores[0]) == [0, 1, 2] and scores[0] == scores[1]
    assert [dict(attention_modules(model)) for model in models] == before
    assert stage.choose(scores[0]) == stage.choose(scores[1])


def test_calibration_sets_the_teachers_layers():
    teacher, batches = tiny_teacher(), [labelled()]
    stage = CalibrateMixers(name="calibrate", fit_passes=1)
    models = pair_of(teacher, mixer="rwkv7", keep=())
    silent = [p.detach().clone() for p in decoder_layers(models[0])[2].parameters()]
    tables = [stage.calibrate(model, teacher, batches) for model in models]
    assert tables[0] == tables[1] and {row.layer for row in tables[0][0]} == {0, 1, 2}
    assert all(map(torch.equal, silent, decoder_layers(models[0])[2].parameters()))
    assert_same_logits(models)


def test_layer_errors_are_of_the_teachers_layers():
    teacher = tiny_teacher()
    models = pair_of(teacher)
    assert why_not_comparable(models[0], teacher) is None
    found = [layer_errors(model, teacher, [labelled()]) for model in models]
    assert len(found[0]) == LAYERS and found[0] == found[1]


@pytest.mark.parametrize("kept", ["attention", "sliding_window"])
def test_layers_get_their_attention_back_by_the_teachers_numbers(kept, tmp_path):
    """Behind an inserted layer its place in a cache is another one; so is that of a mixer in its stead."""
    teacher, plan = tiny_teacher("qwen3"), LayerPlan(kept=kept, expansion=Expansion(every=1))
    student = expanded(teacher, StudentConfig(layer_plan=plan))
    restore_attention(student.model, teacher, [1, 2], trainable=True, config=student.config)
    names = with_names(student.plan, {1: kept, 2: kept})
    assert names == ["rwkv7", "+sparse", kept, "+sparse", kept, "+sparse"]
    mixer_checks.assert_calls_equal_the_parallel_forward(student.model.eval())
    save_student(tmp_path / "student", student._replace(plan=names), mixer_checks.NoTokenizer())
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(
            load_student(tmp_path / "student").model.eval()(ids).logits, student.model(ids).logits
        )


# --- learning -----------------------------------------------------------------------------------------------


def test_an_inserted_layer_learns_from_its_ends_inwards():
    """At first gradients reach its two zero projections alone; after a step they reach all of it."""
    teacher, batch = tiny_teacher(), labelled()
    student, _ = convert(teacher, config_of(mixer="sliding_window"))
    groups, layer = parameter_groups(student), decoder_layers(student)[2]
    assert set(groups["inserted"]) == set(layer.parameters())
    optimizer = torch.optim.SGD(groups["inserted"], 0.1)
    ends = {"self_attn.output.weight", "mlp.down_proj.weight"}
    moving = []
    for _ in range(2):
        optimizer.zero_grad()
        Distill()(student, teacher, batch).total.backward()
        moving.append({name for name, p in layer.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moving[0] == ends
    still = {name for name, _ in layer.named_parameters()} - moving[1]
    assert still <= {"self_attn.key.bias"}, "a shift of all keys changes no softmax"


def test_distillation_gets_better_with_inserted_layers_alone():
    teacher, batch = tiny_teacher(), labelled()
    student, _ = convert(teacher, config_of(every=1, keep=()))
    optimizer, losses = torch.optim.Adam(parameter_groups(student)["inserted"], 3e-3), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = Distill()(student, teacher, batch).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_family_without_a_known_output_is_refused(monkeypatch):
    unknown = dataclasses.replace(architectures.ARCHITECTURES["qwen2"], feed_forward_output=())
    monkeypatch.setitem(architectures.ARCHITECTURES, "qwen2", unknown)
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="layers cannot be inserted into 'qwen2'.*feed_forward_output"):
        check_plan(config_of(), teacher.config)
    with pytest.raises(ValueError, match="layers cannot be inserted into 'qwen2'"):
        build_student(teacher, config_of(), ["rwkv7", "+sparse", "rwkv7", "rwkv7"])
    assert check_plan(config_of(None), teacher.config) == ["rwkv7", "attention", "rwkv7"]


def test_a_first_value_of_an_inserted_layer_is_refused():
    plan = LayerPlan(layers=["attention", "+rwkv7", "2 rwkv7"])
    config = StudentConfig(layer_plan=plan, mixers={"rwkv7": RWKV7Options(value_residual=True)})
    with pytest.raises(ValueError, match="the first rwkv7 layer is an inserted one.*value_residual=false"):
        check_plan(config, tiny_teacher().config)
    check_plan(StudentConfig(layer_plan=plan), tiny_teacher().config)


def test_alignment_of_inserted_layers_alone_is_refused():
    teacher = tiny_teacher()
    student, _ = convert(teacher, config_of(keep=(0, 1, 2)))
    assert student_mixers(student) and not aligned_mixers(student)
    with pytest.raises(ValueError, match="nothing to align"):
        Align()(student, teacher, labelled())
