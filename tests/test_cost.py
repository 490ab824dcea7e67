"""The cost model: its operations and bytes are those of the code."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.architectures import decoder_layers
from models.backbone import hidden_states
from models.config import StudentConfig
from models.cost import Work, flops_per_token, kind_of, operator_flops
from models.layer_plan import Expansion, LayerPlan
from models.memory import (
    ATTENTION_BYTES,
    FEED_FORWARD_BYTES,
    LOGIT_BYTES,
    MIXER_BYTES,
    Setting,
    make_it_fit,
    memory,
)
from models.mixers import rwkv7
from models.objectives import Align, CrossEntropy, Distill
from models.outline import outline, teacher_plan
from models.parallelize import recompute_blocks
from models.stage import freeze_all_but
from models.student import count_parameters, parameter_groups, student_mixers
from models.teacher import TeacherConfig, teacher_outline

TINY = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
TOKENS = 64


def models(recompute: bool = False):
    teacher = tiny.tiny_teacher("qwen2", vocab_size=400, **TINY)
    student, _ = tiny.convert(teacher, tiny.student_config(backend="chunked"))
    if recompute:
        recompute_blocks(student)
    return teacher, student


class MatrixProducts(TorchDispatchMode):
    """Counts the operations of matrix products, forward and backward; `count` is their sum."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.count += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def linear_flops(work: Work) -> float:
    """The model's figure without its operators, which are no plain matrix products."""
    teacher = operator_flops(work.teacher, work.row_length) if work.asks_teacher else 0.0
    passes = 3 if work.kind == "align" or not work.recompute else 4
    return flops_per_token(work) - teacher - passes * operator_flops(work.student, work.row_length)


@pytest.mark.parametrize(
    ("objective", "recompute", "rest"),
    [
        (Align(), False, False),
        (Distill(), False, True),
        (Distill(), True, True),
        (CrossEntropy(), False, True),
        (CrossEntropy(), True, True),
        (CrossEntropy(), True, False),
    ],
    ids=["align", "distill", "distill-recompute", "ce", "ce-recompute", "ce-recompute-mixers"],
)
def test_flops_are_those_of_the_matrix_products(monkeypatch, objective, recompute: bool, rest: bool):
    teacher, student = models(recompute)
    groups = parameter_groups(student)
    trained = groups["mixers"] + (groups["rest"] if rest else [])
    freeze_all_but(student, trained)
    ids = torch.randint(400, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids, "document_ids": torch.zeros(1, TOKENS, dtype=torch.int32)}
    # A stand-in for the operator: the matrix products of its plain torch form are not what a kernel does.
    monkeypatch.setattr(rwkv7, "wkv7", lambda r, w, k, v, a, b, **_: (r + w + k + v + a + b, None))
    with MatrixProducts() as products:
        objective(student, teacher, batch).total.backward()
    work = Work(
        kind=kind_of(objective),
        student=outline(student, ["rwkv7"] * tiny.LAYERS),
        teacher=outline(teacher, teacher_plan(teacher)),
        asks_teacher=objective.needs_teacher,
        rest_trained=rest,
        row_length=TOKENS,
        recompute=recompute,
    )
    assert work.trained == sum(parameter.numel() for parameter in trained)
    assert products.count / TOKENS == pytest.approx(linear_flops(work) - spared(work, student), rel=0.01)


def spared(work: Work, student) -> float:
    """What the rules of thumb count and the code does not do: gradients of inputs that need none, and the
    last map of a layer, at which torch stops computing again."""
    names = ("receptance", "key", "value", "decay.down", "rate.down", "gate.down")
    mixers = student_mixers(student).values()
    reading = [sum(m.get_submodule(name).weight.numel() for name in names) for m in mixers]
    if work.kind == "align":
        return 2 * sum(reading)
    last = work.recompute * sum(layer.mlp.down_proj.weight.numel() for layer in decoder_layers(student))
    return 2 * (last + (not work.rest_trained) * reading[0])


def test_flops_follow_the_rules_of_thumb():
    teacher = teacher_outline(
        TeacherConfig(path="no/where", revision="main", shape="assets/configs/qwen2_5_7b")
    )
    shape = outline(teacher, teacher_plan(teacher))
    every = shape.parameters - shape.embedding
    kl = Work(kind="distill", student=shape, teacher=shape, recompute=True)
    assert flops_per_token(kl) == pytest.approx(10 * every, rel=0.03)
    ce = Work(kind="cross_entropy", student=shape, recompute=True)
    assert flops_per_token(ce) == pytest.approx(8 * every, rel=0.03)
    long = operator_flops(shape, 16384) / (2 * every)
    assert long == pytest.approx(0.23, abs=0.01) and operator_flops(shape, 512) / (2 * every) < 0.01


def kept_bytes(layers: int, tokens: int, keep: bool, precision: str, **shape) -> int:
    """Bytes that graphs hold after a student's forward pass, every storage counted once."""
    teacher = tiny.tiny_teacher("qwen2", layers=layers, **shape)
    student, _ = tiny.convert(teacher, tiny.student_config(keep=range(layers) if keep else ()))
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        hidden_states(student, tiny.random_ids(1, tokens))
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("precision", FEED_FORWARD_BYTES)
@pytest.mark.parametrize("keep", [False, True], ids=["mixer", "attention"])
def test_activation_bytes_are_those_that_graphs_hold(keep: bool, precision: str):
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape["intermediate_size"] = 1024
    sizes = [(layers, tokens) for layers in (1, 2) for tokens in (64, 128)]
    kept = {size: kept_bytes(*size, keep, precision, **shape) for size in sizes}
    per_token = (kept[2, 128] - kept[2, 64] - kept[1, 128] + kept[1, 64]) / 64
    mixing = ATTENTION_BYTES if keep else MIXER_BYTES
    assert mixing * 512 + FEED_FORWARD_BYTES[precision] * 1024 == pytest.approx(per_token, rel=0.12)


@pytest.mark.parametrize("objective", [Distill, CrossEntropy])
def test_logit_bytes_are_those_at_the_peak(objective):
    teacher = tiny.tiny_teacher("qwen2", layers=1, vocab_size=4000)
    student, _ = tiny.convert(teacher, tiny.student_config())
    ids = tiny.random_ids(1, 512)
    batch = {"input_ids": ids, "labels": ids, "document_ids": torch.zeros(1, 512, dtype=torch.int32)}
    peaks = []
    for chunk in (128, 256):
        with tiny.LiveBytes() as live:
            objective(chunk_tokens=chunk)(student, teacher, batch)
        peaks.append(live.peak)
    each = (peaks[1] - peaks[0]) / 128 / 4000
    assert LOGIT_BYTES[kind_of(objective())] == pytest.approx(each, rel=0.1)


def test_a_setting_that_fits_is_left_alone():
    teacher, student = models()
    shapes = {"student": outline(student, ["rwkv7"] * 3), "teacher": outline(teacher, ["attention"] * 3)}
    work = Work(kind="distill", **shapes)
    options = {"rows": 4, "accumulate": 1, "chunk_tokens": 512, "teacher_bytes": 4, "optimizer_bytes": 8.0}
    setting = Setting(devices=1, strategy="single", precision="32-true", masked=True, **options)
    assert make_it_fit(work, setting, 1e12) == (work, setting)


def test_inserted_layers_cost_what_they_are():
    """All passes of distillation and their own memory; nothing in alignment, which passes them by."""
    teacher, outlines = tiny.tiny_teacher(), []
    for every in (None, 2):
        plan = LayerPlan(expansion=Expansion(every=every, mixer="sliding_window"))
        student, _ = tiny.convert(teacher, StudentConfig(layer_plan=plan))
        outlines.append(outline(student, plan.resolve(tiny.LAYERS, ["rwkv7", "sliding_window"])))
    plain, grown = outlines
    block = count_parameters(decoder_layers(student)[2])
    assert (plain.inserted, grown.inserted) == (0, block) and grown.mixers == plain.mixers
    assert grown.parameters - plain.parameters == grown.multiplied - plain.multiplied == block
    shape = outline(teacher, teacher_plan(teacher))
    align = [flops_per_token(Work(kind="align", student=each, teacher=shape)) for each in outlines]
    assert align[0] == align[1]
    work = [Work(kind="distill", student=each, teacher=shape, row_length=TOKENS) for each in outlines]
    added = flops_per_token(work[1]) - flops_per_token(work[0])
    assert added == pytest.approx(3 * (2 * block + 2 * TOKENS * grown.inner))
    alone = replace(work[1], mixers_trained=False, rest_trained=False)
    assert alone.trained == block
    spared = 2 * (grown.multiplied - block) + 2 * grown.head
    assert flops_per_token(work[1]) - flops_per_token(alone) == pytest.approx(spared)
    options = {"rows": 4, "accumulate": 1, "chunk_tokens": 512, "teacher_bytes": 4, "optimizer_bytes": 8.0}
    setting = Setting(devices=1, strategy="single", precision="32-true", masked=False, **options)
    without, needed = (memory(each, setting) for each in work)
    assert needed["student"] - without["student"] == 4 * block
    assert needed["activations"] > without["activations"]
