"""Fine-tuning on conversations and pairs: what is learned of a file of them, what is refused, whole runs."""

from pathlib import Path

import pytest
import runs
import torch
from chats import conversations, pairs, write_lines
from hydra import compose, initialize_config_dir
from texts import VOCABULARY, byte_tokenizer
from tiny import tiny_student, tiny_teacher

from conf import launch
from conf.stages import build_stage, build_stage_data
from data.chat import Conversations
from data.loader import collate
from data.token_store import prepare_token_store
from data.whole_rows import WholeDocuments
from models.objectives import CrossEntropy

CONF = runs.REPOSITORY / "conf"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_loss_is_that_of_each_answer_given_what_stands_before_it(tmp_path: Path):
    """From the file to the loss, against the model asked about every conversation alone: no label is shifted
    twice, no header learned, no neighbour seen."""
    records = conversations(7)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = Conversations(paths=str(write_lines(tmp_path / "chats.jsonl", records)))
    limits = {"max_bad_share": 0.0, "max_document_bytes": 10_000}
    store = prepare_token_store(source, tokenizer, tmp_path / "cache", **limits)
    rows = WholeDocuments(store, 400, 1, "error", "key")
    batch = collate([rows.row(index) for index in range(rows.rows_per_epoch)])
    assert batch["document_ids"].max() > 0  # rows hold several conversations
    model = tiny_student(tiny_teacher(vocab_size=VOCABULARY, layers=2))
    logs, count = 0.0, 0
    for record in records:
        text, learned = "", []
        for turn in record["messages"]:
            text += f"{turn['role']}: "
            start = len(tokenizer.encode(text))
            text += f"{turn['content']}<turn>"
            if turn["role"] == "assistant":
                learned += range(start, len(tokenizer.encode(text)))
            text += "\n"
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            said = model(ids).logits.log_softmax(-1)[0]
        logs += sum(said[place - 1, ids[0, place]].item() for place in learned)
        count += len(learned)
    terms = CrossEntropy(chunk_tokens=64)(model, None, batch)
    assert (batch["labels"] >= 0).sum() == count
    assert terms.parts["loss"].item() == pytest.approx(-logs / count, rel=1e-5)


# --- configs ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that name small files for both stages."""
    return overrides(tmp_path)


def overrides(folder: Path) -> tuple[str, ...]:
    """Both stages on files of their own, of which a fifth is held out."""
    chats = write_lines(folder / "chats.jsonl", conversations())
    answers = write_lines(folder / "pairs.jsonl", pairs())
    named = {"stage.sft.data.sources.chat": chats, "stage.dpo.data.sources.pairs": answers}
    paths = [f"{key}.paths=[{path}]" for key, path in named.items()]
    return *paths, *(f"{key}.validation_share=0.2" for key in named)


def composed(*extra: str):
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("train", overrides=["paths.run_folder=/nowhere", *extra])


def test_the_stages_read_their_own_data_and_no_other(files):
    config = composed(
        "stages=[align,sft,dpo]", *files, "data.row_length=256", "stage.dpo.data.row_length=128"
    )
    launch.check(config)
    for name, source, length in (("sft", "chat", 256), ("dpo", "pairs", 128)):
        data = build_stage_data(config, name, tokenizer=None)
        assert list(data.sources) == list(data.validation_sources) == [source]
        trained, held_out = data.sources[source], data.validation_sources[source]
        assert (trained.split, held_out.split) == ("train", "validation")
        assert (trained.paths, trained.validation_share) == (held_out.paths, held_out.validation_share)
        assert (data.row_length, data.rows_per_device) == (length, config.data.rows_per_device)
    assert list(build_stage_data(config, "align", tokenizer=None).sources) == ["stdlib"]
    assert build_stage(config, "sft").data["row_length"] == 256


def test_other_data_can_be_chosen_for_a_stage(files):
    config = composed("stages=[sft]", "data@stage.sft.data=embedded", "stage.sft.data.row_length=64")
    launch.check(config)
    assert list(build_stage_data(config, "sft", tokenizer=None).sources) == ["stdlib"]


@pytest.mark.parametrize(
    ("stage", "extra", "message"),
    [
        ("sft", ["data.sources.chat.paths=[]"], r"stage\.sft\.data\.sources\..*\.paths is empty"),
        ("dpo", ["data.sources.pairs.paths=[]"], r"stage\.dpo\.data\.sources\..*\.paths is empty"),
        ("sft", ["data.sources.chat.paths=[/nowhere]"], r"stage\.sft\.data\..*'/nowhere' names no file"),
        ("sft", ["data.workers=x"], r"stage\.sft\.data\.workers=x must be a whole number"),
        ("dpo", ["data.rows_per_device=3"], r"stage\.dpo\.data\.rows_per_device=3 must be a multiple of 2"),
        ("dpo", ["data.cache_folder=null"], r"stage\.dpo\.data\.cache_folder=None must be a text"),
        ("dpo", ["objective.beta=0"], r"objective\.beta=0 must be positive"),
        ("sft", ["curriculum=[{from_tokens: 0, row_length: 64, rows_per_device: 1}]"], "sft.curriculum"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(files, stage, extra, message):
    own = [part for part in files if part.startswith(f"stage.{stage}.")]
    with pytest.raises(ValueError, match=message):
        launch.check(composed(f"stages=[{stage}]", *own, *(f"++stage.{stage}.{part}" for part in extra)))


def test_pairs_must_come_as_pairs():
    with pytest.raises(
        ValueError, match=r"stage\.dpo\.objective compares pairs.*data@stage\.dpo\.data=preferences"
    ):
        launch.check(composed("stages=[dpo]", "data@stage.dpo.data=embedded"))


# --- runs ---------------------------------------------------------------------------------------------------

SHORT = (
    "stages=[distill,sft,dpo]",
    "stage.sft.tokens=3072",
    "stage.dpo.tokens=3072",
    "stage.dpo.learning_rate={mixers: 3e-5, rest: 1e-5}",
    "stage.dpo.objective.beta=0.5",
    "stage.dpo.validate_every_steps=3",
    "evaluation.decoding_contexts=[]",
    "callbacks.text_samples=null",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A cache of tokens, and the overrides of a short run."""
    folder = tmp_path_factory.mktemp("inputs")
    return folder / "cache", (*SHORT, *overrides(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs) -> Path:
    """The folder of an uninterrupted run."""
    outputs = tmp_path_factory.mktemp("finished")
    done = runs.train(outputs, inputs[0], *inputs[1])
    assert done.returncode == 0, done.stderr
    return runs.run_folder(outputs)


def logged(folder: Path, metric: str) -> list[float]:
    """A metric's values, step by step."""
    values = {int(step): float(v) for (_, step, name), v in runs.losses(folder).items() if name == metric}
    return [values[step] for step in sorted(values)]


def test_a_run_is_tuned_on_conversations_and_then_on_pairs(finished):
    summary = runs.summary(finished)
    assert [stage["name"] for stage in summary["stages"]] == ["transfer", "distill", "sft", "dpo"]
    margins, losses = logged(finished, "dpo/reward_margin"), logged(finished, "dpo/loss")
    assert margins[0] == 0 and losses[0] == pytest.approx(
        0.693147, abs=1e-6
    )  # the student is its own reference
    assert margins[-1] > 0.05 and losses[-1] < losses[0]
    held_out = logged(finished, "dpo/validation_reward_margin")
    assert len(held_out) == 2 and held_out[-1] > held_out[0] > 0
    checked = logged(finished, "dpo/validation_accuracy")
    assert 0.5 < checked[-1] <= 1
    assert (finished / "plots" / "loss.png").exists()


@pytest.mark.slow
def test_resume_after_kills_is_bit_exact(finished, inputs, tmp_path):
    cache, given = inputs
    runs.train_and_kill(tmp_path, cache, "sft/step-2.ckpt", *given, "ckpt_path=auto")
    runs.train_and_kill(tmp_path, cache, "dpo/step-4.ckpt", *given, "ckpt_path=auto")
    done = runs.train(tmp_path, cache, *given, "ckpt_path=auto")
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    assert runs.losses(runs.run_folder(tmp_path)) == runs.losses(finished)


@pytest.mark.slow
def test_a_finished_student_is_tuned_by_itself(finished, inputs, tmp_path):
    cache, given = inputs
    only = [part for part in given if not part.startswith(("stages=", "stage.sft"))]
    done = runs.train(tmp_path, cache, *only, "stages=[dpo]", f"init_from={finished}")
    assert done.returncode == 0, done.stderr
    assert logged(runs.run_folder(tmp_path), "dpo/reward_margin")[0] == 0  # against the student it began with


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(finished, inputs, tmp_path, strategy):
    cache, given = inputs
    pair = ("trainer.accelerator=cpu", "trainer.devices=2", "data.rows_per_device=2", f"strategy={strategy}")
    done = runs.train(tmp_path, cache, *given, *pair)
    assert done.returncode == 0, done.stderr[-2000:]
    found, wanted = runs.losses(runs.run_folder(tmp_path)), runs.losses(finished)
    assert found.keys() == wanted.keys()
    trained = [key for key in wanted if key[2].split("/")[1] in ("loss", "accuracy", "reward_margin")]
    assert len(trained) > 20
    for key in trained:
        assert float(found[key]) == pytest.approx(float(wanted[key]), rel=1e-4, abs=2e-5), key
