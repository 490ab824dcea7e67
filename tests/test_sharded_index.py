"""A sharded student whose index alone trains: its loss does not leave its unit through the unit's output."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from mixer_checks import student_of
from tiny import packed_batch, tiny_teacher
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from models.mixers import SparseAttentionOptions
from models.objectives import Align, CrossEntropy
from models.parallelize import connect, process_mesh, shard
from models.student import parameter_groups


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(student: PreTrainedModel, teacher: PreTrainedModel, objective: Align | CrossEntropy) -> list:
    """Of all parameters that train."""
    terms = objective(student, teacher, packed_batch([[24], [20, 4]]))
    terms.total.backward()
    found = [p.grad for p in student.parameters() if p.requires_grad]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


@pytest.mark.parametrize("trained", [("index",), ("index", "mixers"), ("index", "mixers", "rest")], ids=str)
@pytest.mark.parametrize("objective", [Align(), CrossEntropy()], ids=["align", "cross_entropy"])
def test_its_gradients_are_those_of_a_whole_student(objective, trained, group):
    options = SparseAttentionOptions(block_length=4, window=5, top_k=1, index_width=16)
    found = []
    for sharded in (False, True):
        student, teacher = student_of("sparse", options), tiny_teacher()
        student.requires_grad_(False)
        for name in trained:
            for parameter in parameter_groups(student)[name]:
                parameter.requires_grad_(True)
        if sharded:
            for model in (student, teacher):
                shard(model, "cpu", process_mesh("cpu"))
                connect(model)
        found.append(gradients(student, teacher, objective))
    assert len(found[0]) == len(found[1]) > 0
    for whole, gathered in zip(*found, strict=True):
        assert (whole is None) == (gathered is None)
        if whole is not None:
            torch.testing.assert_close(gathered, whole)
