"""LongCE: its weights and the losses after a short context against plain loops, and runs that cache them."""

import json
import math

import numpy as np
import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from test_datamodule import attach, module
from test_teacher_cache import inputs
from tiny import packed_batch, tiny_student, tiny_teacher

from conf import launch
from data.packing import Row
from data.row_module import BatchShape
from data.teacher_cache import CHECKSUMS, MANIFEST, SHORT_KEY, phase_folders, row_checksum
from data.teacher_cache_writer import TeacherCacheWriter
from models.backbone import hidden_states, output_head
from models.losses import IGNORED
from models.objectives import CrossEntropy, LongCrossEntropy
from models.short_loss import CacheShortLoss, short_losses, student_identity
from models.token_weights import long_weights

ROWS = [[9, 15, -4, 12], [-3, 25, 12]]


def losses_of(model, ids: list[int]) -> list[float]:
    """The loss of each token of one text but the last, in float64."""
    logits = output_head(model)(hidden_states(model, torch.tensor([ids])))[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


def test_weights_and_total_equal_a_plain_loop():
    student, batch = tiny_student(tiny_teacher()), packed_batch(ROWS)
    chosen = batch["labels"] != IGNORED
    hidden = hidden_states(student, batch["input_ids"], batch["document_ids"])[chosen]
    logits = output_head(student)(hidden).double()
    long = torch.nn.functional.cross_entropy(logits, batch["labels"][chosen], reduction="none")
    short = long.detach() + 4 * torch.rand(len(long), generator=torch.Generator().manual_seed(1)).double() - 1
    batch["short_loss"] = torch.zeros(chosen.shape)
    batch["short_loss"][chosen] = short.float()
    plain = [min(math.exp(s - x), 5.0) for s, x in zip(short.tolist(), long.tolist(), strict=True)]
    assert 0 < sum(weight == 5.0 for weight in plain) < len(plain) / 2
    wanted = torch.tensor([weight / (sum(plain) / len(plain)) for weight in plain], dtype=torch.float64)
    assert wanted.mean().item() == pytest.approx(1)
    objective = LongCrossEntropy(short_loss="somewhere", chunk_tokens=7)
    found = objective(student, None, batch)
    torch.testing.assert_close(found.total.double(), (wanted * long).mean(), rtol=1e-5, atol=1e-6)
    assert found.parts["loss"].item() == pytest.approx(long.mean().item(), rel=1e-5)
    assert found.parts["clipped"].item() == pytest.approx(sum(w == 5.0 for w in plain) / len(plain))
    parameters = list(student.parameters())
    theirs = torch.autograd.grad((wanted * long).mean(), parameters)
    for a, b in zip(torch.autograd.grad(found.total, parameters), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_token_that_gains_nothing_weighs_one():
    loss = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64)
    assert long_weights(loss, loss, 5.0).tolist() == [1.0, 1.0, 1.0]
    found = long_weights(torch.tensor([900.0, 1.0]), torch.tensor([0.0, 3.0]), 5.0)
    assert found.tolist() == pytest.approx([5.0, math.exp(-2)])  # no overflow on the way
    student, batch = tiny_student(tiny_teacher()), packed_batch(ROWS)
    with torch.no_grad():
        whole = short_losses(student, batch, 36, 7)  # no row is longer than such a context
    weighted = LongCrossEntropy(short_loss="somewhere")(student, None, {**batch, **whole}).total
    torch.testing.assert_close(weighted, CrossEntropy()(student, None, batch).total)


def test_weights_have_mean_one_over_all_processes(monkeypatch):
    """Two processes with unlike rows: their mean is what one process with all rows has."""
    student, batch = tiny_student(tiny_teacher()), packed_batch(ROWS)
    batch["short_loss"] = 6 * torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(5))
    objective = LongCrossEntropy(short_loss="somewhere")
    together = objective(student, None, batch)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in (0, 1)]
    seen = []
    monkeypatch.setattr("models.ranks.mean", lambda value: seen[-1].append(value.clone()) or value)
    for row in rows:
        seen.append([])
        objective(student, None, row)
    totals = []
    for mine, row in enumerate(rows):
        others = iter(seen[1 - mine])
        monkeypatch.setattr("models.ranks.mean", lambda value, others=others: (value + next(others)) / 2)
        totals.append(objective(student, None, row).total)
    torch.testing.assert_close(sum(totals) / 2, together.total)


@pytest.mark.parametrize("context", [1, 4, 7, 16, 20, 40])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_short_losses_equal_a_loop_over_tokens(model, context):
    model = tiny_teacher() if model == "teacher" else tiny_student(tiny_teacher())
    batch = packed_batch(ROWS)
    found = short_losses(model, batch, context, 5)["short_loss"]
    assert found.shape == batch["labels"].shape and found.dtype == torch.float32
    for row in range(2):
        documents, ids = batch["document_ids"][row].tolist(), batch["input_ids"][row].tolist()
        for place in range(40):
            if batch["labels"][row, place] == IGNORED:
                assert found[row, place] == 0
                continue
            begin = documents.index(documents[place])
            window = max(0, (place // context - 1) * context)
            text = ids[max(begin, window) : place + 2]
            assert found[row, place].item() == pytest.approx(losses_of(model, text)[-1], abs=2e-5)
            assert place < context or context < place + 1 - window <= 2 * context


def test_the_identity_of_a_student_is_its_weights():
    student = tiny_student(tiny_teacher())
    before = student_identity(student)
    assert student_identity(tiny_student(tiny_teacher())) == before
    with torch.no_grad():
        student.get_output_embeddings().weight[0, 0] += 1e-3
    assert student_identity(student) != before


def test_caches_follow_a_curriculum(tmp_path):
    """Each phase's rows bring what was written on them, also after a resume in the second phase."""
    shapes = [BatchShape(2, 16, 3), BatchShape(2, 32, 2)]

    def data():
        made = attach(module(tmp_path / "tokens"), max_steps=4)
        made.train_on(shapes)
        return made

    folders = phase_folders(tmp_path / "cache", 2)
    for folder, rows, shape in zip(folders, data().rows_by_shape(1), shapes, strict=True):
        described = {"rows_per_part": 4, "data": {**data().row_inputs(), "row_length": shape.row_length}}
        writer = TeacherCacheWriter(folder, described, shape.batches * shape.rows_per_device)
        for number in writer.begin():
            taken = [rows.row(index) for index in writer.rows_of(number)]
            losses = np.stack([row.input_ids / 7 for row in taken])
            sums = np.asarray([row_checksum(row) for row in taken])
            writer.write(number, {"short_loss": losses, CHECKSUMS: sums})
        writer.finish()
    reading = data()
    reading.teach_from(*folders, key=SHORT_KEY)
    batches = list(reading.train_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(3, 16)] * 2 + [(2, 32)] * 2
    for batch in batches:
        torch.testing.assert_close(batch["short_loss"], (batch["input_ids"] / 7).float())
    resumed = reading.train_dataloader()
    resumed.load_state_dict({"rows_consumed": 8})
    assert torch.equal(next(iter(resumed))["short_loss"], batches[3]["short_loss"])
    wrong = data()
    wrong.teach_from(*reversed(folders), key=SHORT_KEY)
    with pytest.raises(
        ValueError, match="objective.short_loss=.*row 0 holds other tokens than the model saw"
    ):
        list(wrong.train_dataloader())
    assert Row._fields == ("input_ids", "labels", "document_ids") and inputs(reading)["data"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LongCrossEntropy(short_loss="x", gamma=0.5), "objective.gamma=0.5 must be at least 1"),
        (lambda: LongCrossEntropy(short_loss="x", short_context=0), "objective.short_context=0"),
        (lambda: LongCrossEntropy(short_loss=""), "objective.short_loss must name the folder"),
        (lambda: CacheShortLoss(name="a", folder="x", by="me"), "stage.a.by='me' is unknown"),
        (lambda: CacheShortLoss(name="a", folder="x", of="a"), "stage.a.of=a must name the stage"),
        (lambda: CacheShortLoss(name="a", folder="x", rows_per_part=0), "stage.a.rows_per_part=0"),
    ],
)
def test_wrong_values_are_refused_with_their_key(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_batch_without_short_losses_is_refused():
    with pytest.raises(ValueError, match="objective.short_loss: this batch brings none"):
        LongCrossEntropy(short_loss="x")(tiny_student(tiny_teacher()), None, packed_batch(ROWS))


# --- runs ---------------------------------------------------------------------------------------------------

FAST = ("callbacks.text_samples=null", "evaluation.decoding_contexts=[]", "trainer.accelerator=cpu")
TABLE = (
    "[{from_tokens:0,row_length:64,rows_per_device:4},{from_tokens:1000,row_length:128,rows_per_device:2}]"
)


def settings(folder) -> tuple[str, ...]:
    return (
        *FAST,
        "data.max_tokens=60000",
        "stage.long_context.tokens=3000",
        f"stage.long_context.curriculum={TABLE}",
        "stage.long_context.warmup_steps=0",
        "stage.long_context.log_every_steps=1",
        "stage.long_context.objective.short_context=16",
        f"stage.long_context.objective.short_loss={folder}",
    )


@pytest.fixture(scope="module", params=["teacher", "student"])
def whole(request, tmp_path_factory):
    """Who predicts, the folder of token stores, of the cache and of the run."""
    place = tmp_path_factory.mktemp(request.param)
    own = (f"stage.cache_short_loss.folder={place / 'short'}", f"stage.cache_short_loss.by={request.param}")
    both = "stages=[cache_short_loss,long_context]"
    given = (both, *own, "stage.cache_short_loss.rows_per_part=5", *settings(place / "short"))
    done = runs.train(place / "outputs", place / "tokens", *given)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, place / "tokens", place / "short", runs.run_folder(place / "outputs")


def test_a_run_trains_from_the_short_losses_that_it_has_written(whole):
    by, _, cache, folder = whole
    manifests = [json.loads((place / MANIFEST).read_text()) for place in phase_folders(cache, 2)]
    assert [manifest["rows"] for manifest in manifests] == [16, 14]
    assert all(manifest["inputs"]["short_context"] == 16 for manifest in manifests)
    assert {manifest["inputs"]["by"] for manifest in manifests} == {by}
    stages = {stage["name"]: stage for stage in runs.summary(folder)["stages"]}
    assert stages["cache_short_loss"]["cached_rows"] == 30
    clipped = [float(v) for (_, _, name), v in runs.losses(folder).items() if name == "long_context/clipped"]
    assert len(clipped) == 11 and 0 <= min(clipped) and max(clipped) < 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], []),
        (["seed=2"], ["data.seed (1 there, 2 here)"]),
        (["stage.long_context.objective.short_context=32"], ["short_context (16 there, 32 here)"]),
        (["stage.long_context.tokens=9000"], ["phase-1 holds 14 rows", "stages=[cache_short_loss] again"]),
        (["stage.long_context.curriculum.1.from_tokens=1500"], ["phases"]),
        (
            ["stage.long_context.objective.short_loss=/nowhere"],
            ["/nowhere", "no such cache", "cache_short_loss"],
        ),
        (["stages=[long_context,cache_short_loss]"], ["put cache_short_loss before long_context"]),
        (
            ["stages=[cache_short_loss]", "stage.cache_short_loss.of=extend"],
            ["stage.cache_short_loss.of=extend is no stage that has objective=long_cross_entropy"],
        ),
    ],
)
def test_a_stale_cache_is_refused_before_a_weight_is_loaded(whole, monkeypatch, overrides, words):
    _, tokens, cache, _ = whole
    monkeypatch.setattr("models.teacher.load_teacher", lambda *_: pytest.fail("weights were loaded"))
    launch.register_resolvers()
    small = (*runs.SMALL, f"paths.cache={tokens}", "paths.run_folder=/nowhere", "stages=[long_context]")
    with initialize_config_dir(version_base="1.3", config_dir=str(runs.REPOSITORY / "conf")):
        config = compose("train", overrides=[*small, *settings(cache), *overrides])
    try:
        launch.check(config)
        message = ""
    except ValueError as error:
        message = launch.plain_message(error)
    assert bool(message) == bool(words), message
    for word in words:
        assert word in message, message


def test_what_another_student_has_said_is_refused(whole):
    by, tokens, cache, folder = whole
    given = ("stages=[long_context]", "student=rwkv6", *settings(cache))
    done = runs.train(folder.parent / by, tokens, *given)
    if by == "teacher":
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 2 and "model.weights" in done.stderr, done.stderr[-2000:]
