"""Every family of ARCHITECTURES as a parent: its queries, keys and values, its masks, its tensors."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from mixer_checks import (
    assert_calls_equal_the_parallel_forward,
    assert_close,
    assert_documents_are_texts_of_their_own,
)
from tiny import (
    ARWKV,
    FAMILIES,
    HEAD_SIZE,
    LAYERS,
    PARENTS,
    convert,
    disturb,
    packed_batch,
    random_ids,
    student_config,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from models.architectures import ARCHITECTURES, architecture_of, attention_modules
from models.backbone import hidden_states, output_head
from models.calibration import CalibrateMixers
from models.config import StudentConfig
from models.conversion import attention_shape, check_plan
from models.evaluation import batch_metrics
from models.layer_errors import layer_errors
from models.layer_plan import LayerPlan
from models.mixers.heads import HeadMixer
from models.mixers.kept_attention import KeptAttentionOptions
from models.objectives import Align, CrossEntropy, Distill
from models.outline import outline, teacher_plan
from models.student import student_mixers
from models.transfer import fill, origins
from pipeline.planning import expert_notes

# Rotations of longrope depend on the longest text of the call, so the same text may be read in two ways.
STEADY = sorted(set(PARENTS) - {"phi3_longrope"})
NEW = sorted(set(STEADY) - set(FAMILIES))  # the others are read in parts by the tests of mixers
KEPT = {"pure": (), "hybrid": (0, 1)}  # kept: a layer with a window and one without, where there are both
ROTATIONS = ["gemma3_text", "glm4", "phi3", "smollm3"]  # unlike the usual one, or not alike in all layers


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by every name it has."""
    return dict(model.named_parameters(remove_duplicate=False))


def test_every_family_has_an_instance():
    assert {tiny_teacher(name).config.model_type for name in PARENTS} == set(ARCHITECTURES)


# --- queries, keys and values -------------------------------------------------------------------------------


def observed(teacher: PreTrainedModel, ids: Tensor, first_position: int) -> dict[int, SimpleNamespace]:
    """Layer -> hidden states and positions that attention read, and what it made of them: query (times the
    scale of scores) [B,T,H,N], key and value [B,T,G,N]."""
    seen, attention = {}, attention_modules(teacher)
    numbers = {module: index for index, module in attention.items()}

    def spy(module, query, key, value, attention_mask, scaling, **_):
        made = (query * scaling, key, value)
        seen[numbers[module]].made = tuple(heads.transpose(1, 2) for heads in made)
        return torch.zeros_like(query).transpose(1, 2), None

    def read(module, args, kwargs):
        seen[numbers[module]] = SimpleNamespace(
            hidden=kwargs["hidden_states"], positions=kwargs["position_embeddings"]
        )

    AttentionInterface.register("spy", spy)
    teacher.set_attn_implementation("spy")
    for module in attention.values():
        module.register_forward_pre_hook(read, with_kwargs=True)
    positions = first_position + torch.arange(ids.shape[1])[None]
    teacher.base_model(ids, position_ids=positions, use_cache=False)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("parent", PARENTS)
def test_a_mixers_heads_are_the_attentions_own(parent):
    """Norms, rotations, scales and biases of every family, far from position 0."""
    teacher, ids = tiny_teacher(parent), random_ids(2, 12)
    student, _ = convert(teacher, student_config())
    for index, seen in observed(teacher, ids, first_position=29).items():
        mixer = student_mixers(student)[index]
        found = mixer.project_heads(dict.fromkeys("rkv", seen.hidden), seen.positions)
        for ours, theirs in zip(found, seen.made, strict=True):
            assert ours.shape == theirs.shape
            assert_close(ours, theirs, 2e-6)
        scores, wanted = (
            torch.einsum("bihn,bjhn->bhij", read, mixer.repeat_kv(key)) for read, key, _ in (found, seen.made)
        )
        assert_close(scores, wanted, 2e-6)


class Heads(HeadMixer):
    """Projections and nothing more."""

    name, head_sizes = "heads", range(1, 1025)


@torch.no_grad()
@pytest.mark.parametrize("parent", PARENTS)
def test_a_mixer_may_have_key_heads_for_every_query_head(parent):
    """The teacher's, repeated: at the start nothing changes but that they may part."""
    teacher, hidden = tiny_teacher(parent), torch.randn(2, 7, tiny_teacher(parent).config.hidden_size)
    architecture = architecture_of(teacher.config.model_type)
    positions = torch.randn(2, 1, 7, HEAD_SIZE)
    for index, attention in attention_modules(teacher).items():
        shape = attention_shape(attention, architecture)
        options = SimpleNamespace(rope=True)
        shared, apart = Heads(shape, options, index), Heads(shape, options, index, kv_heads=shape.heads)
        for mixer in (shared, apart):
            fill(mixer, dict(attention.named_parameters()), architecture)
        inputs = dict.fromkeys("rkv", hidden)
        wanted, found = (mixer.project_heads(inputs, tuple(positions)) for mixer in (shared, apart))
        assert_close(found[0], wanted[0], 2e-6)
        for ours, theirs in zip(found[1:], wanted[1:], strict=True):
            assert ours.shape[2] == shape.heads
            assert_close(apart.repeat_kv(ours), shared.repeat_kv(theirs), 2e-6)
        assert apart.key.out_features == apart.value.out_features == shape.heads * HEAD_SIZE
        repeated = shape.heads != shape.kv_heads
        assert origins(apart, architecture)["key.weight"].action.endswith("repeated") == repeated
        assert not origins(shared, architecture)["key.weight"].action.endswith("repeated")


@torch.no_grad()
@pytest.mark.parametrize("parent", PARENTS)
def test_softmax_over_a_mixers_heads_is_the_attention(parent):
    """Also windows, caps of scores, the output projection, and which heads share a key."""
    teacher, batch = tiny_teacher(parent), packed_batch([[-3, 13, 8], [24]])
    gated = {"attention": KeptAttentionOptions(gate="low")}  # a gate that starts at 1
    student, _ = convert(teacher, StudentConfig(layer_plan=LayerPlan(keep=(0, 1, 2)), mixers=gated))
    assert len(student_mixers(student)) == LAYERS
    found, wanted = (
        hidden_states(model, batch["input_ids"], batch["document_ids"])[batch["document_ids"] >= 0]
        for model in (student.eval(), teacher)
    )
    assert_close(found, wanted, 2e-5)


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
@pytest.mark.parametrize("parent", PARENTS)
def test_the_table_accounts_for_every_tensor_once(parent, options):
    teacher = tiny_teacher(parent)
    student, rows = convert(teacher, student_config((1,), **options))
    old, new = tensors(teacher), tensors(student)
    assert sorted(row.target for row in rows) == sorted(new)
    ranges: dict[str, list[tuple[int, int]]] = {}
    for row in (row for row in rows if row.source):
        name, _, rest = row.source.partition("[")
        first, _, stop = rest.removesuffix("]").partition(":")
        covered = (int(first), int(stop)) if rest else (0, len(old[name]))
        ranges.setdefault(name, []).append(covered)
        assert torch.equal(new[row.target], old[name][slice(*covered)])
        assert row.action.startswith("kept" if row.source == row.target else "moved")
        assert ("split" in row.action) == bool(rest)
        assert row.shape == str(list(new[row.target].shape))
    for name, tensor in old.items():
        parts = sorted(ranges.pop(name))
        assert [0, *(stop for _, stop in parts)] == [*(first for first, _ in parts), len(tensor)]
    assert not ranges
    assert all(row.action == "new" for row in rows if not row.source)
    tied = old["lm_head.weight"] is old["model.embed_tokens.weight"]
    assert sum("untied" in row.action for row in rows) == (2 if tied else 0)


# --- the same function --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("parent", PARENTS)
def test_an_all_attention_plan_is_the_teacher(parent):
    teacher = tiny_teacher(parent)
    student, _ = convert(teacher, student_config(tuple(range(LAYERS))))
    ids, packed, mask = random_ids(2, 24), packed_batch([[-3, 13, 8], [24]]), torch.ones(2, 24).long()
    mask[1, :9] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    found, wanted = (
        (
            model(ids).logits,
            model(ids, **inputs).logits[mask.bool()],
            hidden_states(model, packed["input_ids"], packed["document_ids"]),
        )
        for model in (student.eval(), teacher)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert layer_errors(student, teacher, [packed]) == [0.0] * LAYERS


@pytest.mark.parametrize(
    "parent, keep", [*((name, "hybrid") for name in NEW), *((name, "pure") for name in ROTATIONS)]
)
def test_packing_padding_and_decoding_change_nothing(parent, keep):
    """Masks with windows, in one call and through the cache, whose layers with a window forget."""
    model = tiny_student(tiny_teacher(parent), KEPT[keep], noise=0.05)
    assert_left_padding_is_passed_over(model)
    model.set_experts_implementation("eager")  # the other one has no float64
    model.double()
    assert_documents_are_texts_of_their_own(model)
    assert_calls_equal_the_parallel_forward(model)


@torch.no_grad()
def assert_left_padding_is_passed_over(student: PreTrainedModel) -> None:
    """Read in two calls, a row padded on the left gives what it gives alone. (Padding that a text goes on
    after would count in windows, there as in transformers.)"""
    ids, mask, cache = random_ids(2, 24), torch.ones(2, 24).long(), DynamicCache(config=student.config)
    mask[0, :9] = 0
    found = torch.cat(
        [
            student(
                ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            ).logits
            for begin, end in ((0, 15), (15, 24))
        ],
        dim=1,
    )
    for row, real in enumerate(mask.bool()):
        assert_close(found[row, real], student(ids[row, real][None]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("parent", NEW)
def test_generation_of_a_padded_batch_is_the_full_forward_of_each_row(parent, keep):
    student = tiny_student(tiny_teacher(parent), KEPT[keep], noise=0.05)
    ids, mask = random_ids(2, 11), torch.ones(2, 11).long()
    mask[0, :5] = 0
    found = student.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    for row in range(2):
        text = ids[row][mask[row].bool()]
        for _ in range(8):
            text = torch.cat([text, student(text[None]).logits[0, -1:].argmax(-1)])
        assert found[row, 11:].tolist() == text[-8:].tolist()


# --- stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("parent", PARENTS)
def test_a_few_steps_lower_both_losses(parent, keep):
    teacher, batch = tiny_teacher(parent), packed_batch([[-3, 12, 9]])
    student, _ = convert(teacher, student_config(KEPT[keep]))
    for objective in (Align(), Distill()):
        optimizer, losses = torch.optim.Adam(student.parameters(), 2e-4), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = objective(student, teacher, batch).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(after < before for before, after in pairwise(losses)), losses
    assert all(p.grad.abs().max() > 0 for p in attention_modules(student)[2].receptance.parameters())


@torch.no_grad()
def test_losses_and_metrics_know_the_cap_of_logits():
    teacher, batch = tiny_teacher("gemma2"), packed_batch([[20]])
    ids, labels = batch["input_ids"], batch["labels"]
    logits = teacher(ids).logits
    assert torch.equal(output_head(teacher)(hidden_states(teacher, ids)), logits)
    assert logits.abs().max() < teacher.config.final_logit_softcapping
    wanted = torch.nn.functional.cross_entropy(logits[0], labels[0])
    assert_close(CrossEntropy()(teacher, None, batch).total, wanted)
    assert batch_metrics(teacher, teacher, batch).means()["loss"] == pytest.approx(float(wanted), rel=1e-5)
    student = tiny_student(teacher)
    both = [model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student)]
    kl = (both[0].exp() * (both[0] - both[1])).sum(-1).mean()
    assert_close(Distill()(student, teacher, batch).parts["kl"], kl)


# --- plans and refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", PARENTS)
def test_every_parent_can_be_planned_for(parent):
    """Without weights, as plan.py and dry runs make models."""
    real = tiny_teacher(parent)
    with torch.device("meta"):
        teacher = tiny_teacher(parent)
    plan = check_plan(student_config((1,)), teacher.config)
    assert plan == ["rwkv7", "attention", "rwkv7"]
    student, rows = convert(teacher, student_config((1,)))
    assert rows == convert(real, student_config((1,)))[1]
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    counted = outline(teacher, teacher_plan(teacher))
    assert counted == outline(real, teacher_plan(real))
    assert counted.parameters == sum(p.numel() for p in real.parameters())
    assert counted.inner == counted.head_size * teacher.config.num_attention_heads
    assert outline(student, plan).mixers == sum(
        p.numel() for mixer in student_mixers(student).values() for p in mixer.parameters()
    )


def test_experts_that_a_token_does_not_meet_cost_no_time():
    teacher = tiny_teacher("qwen3_moe")
    counted, expert = outline(teacher, teacher_plan(teacher)), 3 * 24 * teacher.config.hidden_size
    assert counted.idle == 2 * 2 * expert  # two of four experts, in two of three layers
    dense = [p.numel() for name, p in teacher.model.named_parameters() if "experts" not in name]
    embedding = teacher.get_input_embeddings().weight.numel()
    assert counted.multiplied == sum(dense) - embedding + 2 * 2 * expert
    assert counted.feed_forward_width == 2 * 24
    (said,) = expert_notes(counted)
    assert f"{1 - counted.idle / counted.parameters:.0%} of the teacher's parameters" in said


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("parent, size", [("gemma2", 256), ("phi3", 24)])
def test_head_sizes_that_no_operator_has_are_divided_or_filled_up(parent, size, mixer):
    """Gemma's 256, and what Phi-3's 96 are to the operators' 128."""
    narrow = {"hidden_size": 2 * size} if parent == "phi3" else {"head_dim": size}
    teacher, config = (
        tiny_teacher(parent, **narrow),
        StudentConfig(layer_plan=LayerPlan(layers=[mixer] * LAYERS)),
    )
    student, _ = convert(teacher, config)
    assert {mixer.shape.head_size for mixer in student_mixers(student).values()} == {size}
    batch = packed_batch([[-3, 12, 9]])
    if mixer == "rwkv7":
        found = CalibrateMixers(name="calibrate").calibrate(student, teacher, [batch])[0]
        assert {row.head for row in found} == set(range(teacher.config.num_attention_heads))
    for objective in (Align(), Distill()):
        loss = objective(student, teacher, batch).total
        loss.backward()
        assert loss.isfinite()
    disturb(student, 0.05)
    assert_left_padding_is_passed_over(student)
    assert_documents_are_texts_of_their_own(student.double())
    assert_calls_equal_the_parallel_forward(student)
