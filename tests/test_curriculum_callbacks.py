"""What a curriculum needs callbacks for: each alone, and what is refused before training."""

import logging
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from runs import REPOSITORY
from test_stage import PEAK, stage
from tiny import tiny_student, tiny_teacher

from callbacks.context_curriculum import ContextCurriculum
from callbacks.preheat import Preheat
from conf import launch
from conf.stages import build_stage, check_callbacks
from models.architectures import decoder_layers
from models.distill_module import ConversionModule
from models.objectives import CrossEntropy
from models.student import student_mixers

SHAPE = {"row_length": 16, "rows_per_device": 2}
FROZEN = dict.fromkeys(("mixers", "rest"), 0.0)


def module(student, entries: list[dict], **changes) -> ConversionModule:
    """A module whose stage has a table."""
    entries = [{"from_step": 4 * index, **SHAPE, **entry} for index, entry in enumerate(entries)]
    config = stage(curriculum=entries, objective=CrossEntropy(), warmup_steps=0, **changes)
    timeline = config.timeline(row_length=1, rows_per_device=1, devices=1)
    return ConversionModule(student, None, config, tokenizer=None, timeline=timeline, tokens_before=0)


def begin(callback, made: ConversionModule, *steps: int) -> list[dict]:
    """Lets a callback see the beginning of some steps, and returns what it has logged."""
    said: list[dict] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: said.append({**metrics, "step": step + 1}))
    callback.setup(None, made, "fit")
    for step in steps:
        trainer = SimpleNamespace(global_step=step, loggers=[logger])
        for batch in range(2):
            callback.on_train_batch_start(trainer, made, None, batch)
    return said


@pytest.fixture
def inserted():
    """A student with one inserted layer."""
    student = tiny_student(tiny_teacher(), (1,))
    decoder_layers(student)[2].inserted = True
    return student


def test_preheat_freezes_and_thaws_alone(inserted, caplog):
    made = module(inserted, [{"learning_rate": FROZEN}, {}])
    new, every = (sum(p.numel() for p in m.parameters()) for m in (decoder_layers(inserted)[2], inserted))
    with caplog.at_level(logging.INFO):
        begin(Preheat(), made, 0, 3)
        assert {id(p) for p in inserted.parameters() if p.requires_grad} == {
            id(p) for p in decoder_layers(inserted)[2].parameters()
        }
        assert "preheat ends" not in caplog.text
        begin(Preheat(), made, 4)
    assert all(p.requires_grad for p in inserted.parameters())
    assert f"preheat ends at step 4: {new:,} parameters trained before, {every:,} from here on" in caplog.text
    caplog.clear()
    begin(Preheat(), made, 2)  # a resume within a phase
    assert not any(p.requires_grad for p in student_mixers(inserted)[0].parameters())
    begin(Preheat(), made, 6)
    assert all(p.requires_grad for p in inserted.parameters()) and not caplog.text


def test_preheat_refuses_phases_in_which_nothing_would_train():
    made = module(tiny_student(tiny_teacher()), [{}, {"learning_rate": FROZEN}])
    with pytest.raises(ValueError, match=r"stage\.distill\.curriculum\[1\] trains inserted, index alone"):
        Preheat().setup(None, made, "fit")
    rates = {"mixers": 0.0, "rest": 0.0, "inserted": 1e-3}
    with pytest.raises(ValueError, match=r"no parameter in the groups .*\(inserted\).* one of mixers, rest"):
        module(tiny_student(tiny_teacher()), [{}], learning_rate=rates)


def test_the_curriculum_sets_attention_alone_and_says_each_phase_once(inserted):
    mixers = list(student_mixers(inserted).values())
    mixers[0].dense = False  # as sparse mixers have; the others have no such choice
    made = module(inserted, [{"attention": "dense"}, {"row_length": 32}])
    callback, seen = ContextCurriculum(), []
    for step in (0, 3, 4, 9):  # the callback of the first attempt
        seen += begin(callback, made, step) if step == 0 else []
        callback.on_train_batch_start(SimpleNamespace(global_step=step, loggers=[]), made, None, 0)
        assert mixers[0].dense == (step < 4)
    assert not hasattr(mixers[1], "dense")
    assert seen == [
        {"distill/row_length": 16, "distill/rows_per_device": 2, "distill/dense_attention": 1, "step": 0}
    ]
    assert not begin(ContextCurriculum(), made, 2) and mixers[0].dense  # a resume within a phase
    said = begin(ContextCurriculum(), made, 3, 4, 5)
    assert [(line["step"], line["distill/row_length"]) for line in said] == [(4, 32)]
    mixers[0].dense = True
    callback.on_fit_end(None, made)
    assert not mixers[0].dense


def test_a_stage_without_a_table_attends_sparsely_and_says_nothing(inserted):
    mixer = student_mixers(inserted)[0]
    mixer.dense = True  # left by a stage that was stopped
    config = stage(objective=CrossEntropy())
    timeline = config.timeline(row_length=10, rows_per_device=1, devices=1)
    options = {"tokenizer": None, "timeline": timeline, "tokens_before": 0}
    made = ConversionModule(inserted, None, config, **options)
    assert not begin(ContextCurriculum(), made, 0, 1) and not mixer.dense


@pytest.mark.parametrize(
    ("entry", "missing", "words"),
    [
        (
            "attention: dense",
            "context_curriculum",
            ["attention=dense", "+callbacks.context_curriculum."],
        ),
        ("learning_rate: {rest: 0.0}", "preheat", ["learning_rate of 0", "+callbacks.preheat._target_"]),
        ("warmup_steps: 0", "preheat", []),
        ("learning_rate: {rest: 1e-6}", "preheat", []),
    ],
)
def test_a_table_without_its_callback_is_refused(entry, missing, words):
    launch.register_resolvers()
    rows = "row_length: 16, rows_per_device: 2"
    given = f"stage.extend.curriculum=[{{from_step: 0, {rows}}}, {{from_step: 3, {rows}, {entry}}}]"
    rate = "stage.extend.schedule=linear"
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        config = compose("train", overrides=["stages=[extend]", given, rate, "stage.extend.tokens=400"])
    made = build_stage(config, "extend")
    callbacks = {"context_curriculum": ContextCurriculum(), "preheat": Preheat()}
    check_callbacks(config, made, callbacks)
    callbacks.pop(missing)
    if not words:
        check_callbacks(config, made, callbacks)
        return
    with pytest.raises(ValueError) as error:
        check_callbacks(config, made, callbacks)
    assert all(word in str(error.value) for word in ["stage.extend.curriculum[1]", *words]), error.value


def test_rates_of_the_whole_stage_need_no_callback():
    config = stage(learning_rate={**PEAK, "rest": 0.0}, curriculum=[{"from_step": 0, **SHAPE}])
    assert not config.freezing_phases(config.timeline(row_length=1, rows_per_device=1, devices=1))
