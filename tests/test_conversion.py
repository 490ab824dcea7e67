"""Making a student: every tensor accounted for, the teacher untouched, and refusals in words."""

import copy

import pytest
import torch
from tiny import (
    ARWKV,
    FAMILIES,
    HEAD_SIZE,
    LAYERS,
    VOCABULARY,
    convert,
    disturb,
    packed_batch,
    random_ids,
    student_config,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from models.architectures import Architecture, architecture_of, attention_modules, replace_attention
from models.backbone import hidden_states
from models.config import StudentConfig, options_from, plain_options
from models.conversion import attention_shape, build_student, check_plan, restore_attention
from models.layer_plan import LayerPlan
from models.mixers import Mixer, RWKV7Options
from models.student import count_parameters, student_mixers
from models.student_folder import Student, load_student, save_student

ALL_ATTENTION = ["attention"] * LAYERS
KEEPS = {"pure": (), "keep_middle": (1,), "all": (0, 1, 2)}


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by every name it has."""
    return dict(model.named_parameters(remove_duplicate=False))


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_accounts_for_every_tensor_once(family, options, keep):
    teacher = tiny_teacher(family)
    student, rows = convert(teacher, student_config(KEEPS[keep], **options))
    old, new = tensors(teacher), tensors(student)
    assert sorted(row.source for row in rows if row.source) == sorted(old)
    assert sorted(row.target for row in rows if row.target) == sorted(new)
    assert not [row for row in rows if row.action == "dropped"], (
        "these families have a place for every tensor"
    )
    tied = old["lm_head.weight"] is old["model.embed_tokens.weight"]
    for row in rows:
        action, _, untied = row.action.partition(", ")
        assert row.shape == str(list((new if row.target else old)[row.target or row.source].shape))
        assert (untied == "untied") == (
            tied and row.source in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if row.source:
            assert action == ("kept" if row.source == row.target else "moved")
            assert torch.equal(new[row.target], old[row.source])
        else:
            assert action == "new" and row.target not in old


@pytest.mark.parametrize("start", ["random_mixers", "random"])
@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3", "llama_biased"])
def test_the_table_tells_the_truth_about_other_starts(family, start):
    teacher = tiny_teacher(family)
    student, rows = convert(teacher, student_config((1,), start=start))
    old, new = tensors(teacher), tensors(student)
    assert sorted(row.source for row in rows if row.source) == sorted(old)
    assert sorted(row.target for row in rows if row.target) == sorted(new)
    mixers = [f"model.layers.{index}.self_attn." for index in (0, 2)]
    for row in (row for row in rows if row.source):
        inherited = start == "random_mixers" and not any(row.target.startswith(prefix) for prefix in mixers)
        assert row.action.partition(",")[0] == ("kept" if inherited else "random")
        assert torch.equal(new[row.target], old[row.source]) == inherited, row
    receptance = attention_modules(student)[0].receptance
    assert 0.9 < receptance.weight.std() / teacher.config.initializer_range < 1.1
    assert receptance.bias is None or (receptance.bias == 0).all()
    again, _ = convert(teacher, student_config((1,), start=start))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))


def test_a_tensor_without_a_place_is_reported_as_dropped():
    teacher = tiny_teacher()
    attention_modules(teacher)[0].register_parameter("sinks", torch.nn.Parameter(torch.ones(2)))
    _, rows = convert(teacher, student_config())
    assert [row.source for row in rows if row.action == "dropped"] == ["model.layers.0.self_attn.sinks"]
    assert next(row for row in rows if row.action == "dropped").target == ""


# --- the models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_all_attention_plan_reproduces_the_teacher_exactly(family):
    teacher = tiny_teacher(family)
    student, _ = convert(teacher, student_config((0, 1, 2)))
    student.eval()
    ids, mask, packed = (
        random_ids(2, 20),
        torch.ones(2, 20, dtype=torch.int64),
        packed_batch([[-3, 9, 8], [20]]),
    )
    mask[1, :6] = 0
    with torch.no_grad():
        assert torch.equal(student(ids).logits, teacher(ids).logits)
        padded = [
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
            for model in (student, teacher)
        ]
        assert torch.equal(padded[0].logits[mask.bool()], padded[1].logits[mask.bool()])
        found = [
            hidden_states(model, packed["input_ids"], packed["document_ids"]) for model in (student, teacher)
        ]
        assert torch.equal(*found)
    assert student_mixers(student) == {}


@pytest.mark.parametrize("start", ["transfer", "random_mixers", "random"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_the_teacher_is_as_before(family, start):
    teacher = tiny_teacher(family)
    ids = random_ids(1, 12)
    before, config = copy.deepcopy(teacher.state_dict()), copy.deepcopy(teacher.config.to_dict())
    logits = teacher(ids).logits
    student, _ = convert(teacher, student_config((1,), start=start))
    student(ids).logits.pow(2).mean().backward()
    disturb(student, 1.0)
    assert teacher.config.to_dict() == config
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(teacher(ids).logits, logits)
    assert not teacher.training and not any(
        p.requires_grad or p.grad is not None for p in teacher.parameters()
    )
    assert not any(isinstance(module, Mixer) for module in teacher.modules())
    assert not teacher.base_model._forward_pre_hooks
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    assert tied == (family == "qwen2_tied")
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_the_student_is_trainable_in_float32_with_a_head_of_its_own():
    teacher = tiny_teacher("qwen2_tied").to(torch.bfloat16)
    student, _ = convert(teacher, student_config((1,)))
    assert student.training and all(
        p.requires_grad and p.dtype == torch.float32 for p in student.parameters()
    )
    assert student.get_output_embeddings().weight is not student.get_input_embeddings().weight
    assert student.config.tie_word_embeddings is False
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert (
        count_parameters(teacher)
        == count_parameters(student)
        - sum(tensor.numel() for name, tensor in tensors(student).items() if name not in tensors(teacher))
        + sum(p.numel() for i in (0, 2) for p in attention_modules(teacher)[i].parameters())
        - VOCABULARY * 2 * HEAD_SIZE
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_read_from_the_attention(family):
    teacher = tiny_teacher(family)
    shape = attention_shape(attention_modules(teacher)[0], architecture_of(teacher.config.model_type))
    assert (shape.heads, shape.head_size, shape.hidden_size) == (2, HEAD_SIZE, teacher.config.hidden_size)
    assert shape.kv_heads == (2 if family == "llama" else 1)
    assert (
        shape.query_bias
        == shape.key_bias
        == shape.value_bias
        == (family in ("qwen2", "qwen2_tied", "llama_biased"))
    )
    assert shape.output_bias == (family == "llama_biased")
    assert shape.query_norm == shape.key_norm == (family == "qwen3")


def test_transfer_starts_nearer_to_the_teacher_than_random_mixers():
    teacher, ids = tiny_teacher(), random_ids(2, 30)
    with torch.no_grad():
        wanted = attention_outputs(teacher, ids)
        distances = {}
        for start in ("transfer", "random_mixers"):
            student, _ = convert(teacher, student_config(start=start))
            found = attention_outputs(student, ids)
            distances[start] = sum(
                1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(found, wanted, strict=True)
            )
    assert distances["transfer"] < 0.8 * distances["random_mixers"]


def attention_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    outputs = []
    handles = [
        module.register_forward_hook(lambda m, args, output: outputs.append(output[0]))
        for module in attention_modules(model).values()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return outputs


# --- attention given back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_restored_attention_is_the_teachers(trainable):
    teacher, ids = tiny_teacher("qwen3"), random_ids(2, 16)
    student, _ = convert(teacher, student_config())
    student.eval()
    with torch.no_grad():
        before = student(ids).logits
        taken = restore_attention(student, teacher, [0, 1, 2], trainable=trainable)
        assert torch.equal(student(ids).logits, teacher(ids).logits)
    for index, module in attention_modules(student).items():
        theirs = attention_modules(teacher)[index]
        assert (module is theirs) == (not trainable)
        assert all(p.requires_grad == trainable and p.dtype == torch.float32 for p in module.parameters())
    assert set(taken) == {0, 1, 2} and all(isinstance(module, Mixer) for module in taken.values())
    replace_attention(student, taken)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, before)


def test_restoring_one_layer_makes_the_student_that_kept_it():
    teacher, ids = tiny_teacher(), random_ids(2, 16)
    restored, _ = convert(teacher, student_config())
    restore_attention(restored, teacher, [1], trainable=True)
    kept, _ = convert(teacher, student_config((1,)))
    with torch.no_grad():
        for index, mixer in student_mixers(kept).items():
            mixer.load_state_dict(student_mixers(restored)[index].state_dict())
        assert torch.equal(restored(ids).logits, kept(ids).logits)


class NoTokenizer:
    def save_pretrained(self, folder) -> None:
        """Nothing to write."""


@pytest.mark.parametrize("restored", [[], [0], [0, 1], [2]], ids=str)
@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3"])
def test_a_saved_student_comes_back_also_after_a_change_of_plan(family, options, restored, tmp_path):
    """The first RWKV layer has no value residual; a plan that changes may make another layer the first."""
    teacher, config, ids = tiny_teacher(family), student_config(**options), random_ids(2, 16)
    student = tiny_student(teacher, **options)
    restore_attention(student, teacher, restored, trainable=True)
    plan = ["attention" if index in restored else "rwkv7" for index in range(LAYERS)]
    save_student(tmp_path / "student", Student(student, plan, config), NoTokenizer())
    loaded = load_student(tmp_path / "student")
    assert loaded.plan == plan and loaded.config.options("rwkv7") == config.options("rwkv7")
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(ids).logits, student(ids).logits)


# --- refusals -----------------------------------------------------------------------------------------------


def test_an_unknown_family_is_refused_in_words():
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=80,
    )
    with pytest.raises(ValueError, match="'gpt_neox' is unknown.*llama, .*qwen3.*ARCHITECTURES"):
        check_plan(student_config(), config)
    with pytest.raises(ValueError, match="'gpt_neox' is unknown"):
        build_student(GPTNeoXForCausalLM(config), student_config(), ["rwkv7"] * 2)


def test_an_unsupported_head_size_is_refused_in_words():
    small = tiny_teacher(num_attention_heads=4, head_dim=20)
    refusal = "rwkv7 needs a head size up to 512 that is a multiple of 8; the teacher has 20. Keep attention"
    with pytest.raises(ValueError, match=refusal):
        check_plan(student_config(), small.config)
    with pytest.raises(ValueError, match=refusal):
        convert(small, student_config())
    assert check_plan(student_config((0, 1, 2)), small.config) == ALL_ATTENTION


def test_a_checked_plan_is_the_resolved_plan():
    config = tiny_teacher("qwen3").config  # its heads are wider than hidden_size / heads
    assert check_plan(student_config((-1,)), config) == ["rwkv7", "rwkv7", "attention"]
    with pytest.raises(ValueError, match="student.layer_plan.keep"):
        check_plan(student_config((3,)), config)


def test_a_wrong_entry_of_a_family_is_named():
    attention = attention_modules(tiny_teacher())[0]
    with pytest.raises(ValueError, match="has no 'query_projection'; correct its entry in ARCHITECTURES"):
        attention_shape(attention, Architecture(query="query_projection"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": "warm"}, "student.start='warm' is unknown; choose one of transfer, random_mixers, random"),
        ({"mixers": {"rwkv9": RWKV7Options()}}, "student.mixers: 'rwkv9' is unknown; choose from rwkv7"),
        ({"mixers": {"rwkv7": {"gate": "low"}}}, "student.mixers.rwkv7 needs `_target_: RWKV7Options`"),
    ],
)
def test_a_wrong_student_is_refused_with_its_key(options, message):
    with pytest.raises(ValueError) as error:
        StudentConfig(layer_plan=LayerPlan(), **options)
    assert message in str(error.value)


def test_options_survive_as_plain_data():
    options = RWKV7Options(**ARWKV, gate="full", rate_range=2.0)
    assert options_from("rwkv7", plain_options(options)) == options
    assert StudentConfig(layer_plan=LayerPlan()).options("rwkv7") == RWKV7Options()
