"""Retrieval rows, the measure of exact answers, and the evaluation suite `retrieval`."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from data_inputs import ListSource, store_of, tiny_tokenizer
from evaluations import BUNDLED, TEXT, composed, evaluation
from test_datamodule import equal, module
from transformers import AutoTokenizer

from conf.launch import build
from data.packing import IGNORED
from data.retrieval import NeedleRows, Needles
from data.token_store import TokenStore, prepare_token_store
from models.retrieval import exact_answers
from reports.retrieval_plot import retrieval_maps

PROSE = "\nThe code of {key} is {value}.\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of several lines; none holds an upper-case letter, of which keys are made."""
    texts = tuple(f"def number_{i}(x):\n    return {i} * x\n" * (i + 1) for i in range(40))
    folder = tmp_path_factory.mktemp("store")
    limits = {"max_bad_share": 0.0, "max_document_bytes": 10**6}
    return prepare_token_store(ListSource(texts=texts, name="list"), tiny_tokenizer(), folder, **limits)


def text_of(tokens) -> str:
    return tiny_tokenizer().decode([int(token) for token in tokens])


@pytest.mark.parametrize("template", [Needles.template, PROSE], ids=["code", "prose"])
@pytest.mark.parametrize("needles", [1, 4])
def test_a_row_hides_what_it_asks_for(store, needles, template):
    """The answer follows the question once in the row; only its tokens have labels, and the row is full."""
    rows = Needles(needles=needles, template=template).rows(store, tiny_tokenizer(), 200, seed=1)
    before, after = template.split("{value}")[0], template.split("{value}")[1]
    for index in range(12):
        row = rows.row(index)
        assert row.input_ids.shape == row.labels.shape == row.document_ids.shape == (200,)
        assert not row.document_ids.any()
        answered = np.flatnonzero(row.labels != IGNORED)
        assert answered.tolist() == list(range(200 - len(answered), 200)) and len(answered) >= 2
        assert np.array_equal(row.labels[answered[:-1]], row.input_ids[answered[1:]])
        answer, text = text_of(row.labels[answered]), text_of(row.input_ids[: answered[0] + 1])
        question = text[text.rindex(before.split("{key}")[0]) :]
        key = question.removeprefix(before.split("{key}")[0]).split(" ")[0]
        assert question == before.format(key=key).rstrip(" ") and len(key) == 4
        assert text.count(question) == 2 and text.count(question + answer + after) == 1
        facts = [line for line in text.splitlines() if sum(letter.isupper() for letter in line) >= 8]
        assert len(facts) == len(set(facts)) == needles


def test_rows_depend_on_seed_and_index_alone(store):
    def row(seed: int, index: int) -> bytes:
        return Needles(needles=2).rows(store, tiny_tokenizer(), 120, seed).row(index).input_ids.tobytes()

    assert row(1, 5) == row(1, 5)
    assert len({row(seed, index) for seed in (1, 2) for index in range(4)}) == 8


def test_depths_cover_the_row_evenly_and_are_where_they_say(store):
    rows = Needles().rows(store, tiny_tokenizer(), 400, seed=3)
    depths = [rows.depth(index) for index in range(40)]
    counts = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert counts.min() >= 9 and counts.max() <= 11
    for index in range(40):
        tokens = rows.row(index).input_ids
        text = text_of(tokens)
        asked = text[text.rindex("\n") :]
        place = text.index(asked) / len(text)
        assert -0.25 < place - depths[index] < 0.1  # behind the line break before it, at most 64 tokens off


def test_needles_stand_behind_line_breaks(store):
    rows = Needles(needles=3).rows(store, tiny_tokenizer(), 300, seed=1)
    text = "".join(text_of(rows.row(index).input_ids) for index in range(10))
    facts = [place for place, letter in enumerate(text) if letter.isupper() and text[place - 1] == "\n"]
    behind = [text[: place - 1].rstrip(" ").endswith("\n") for place in facts]
    assert len(facts) == 40 and sum(behind) >= 30  # the other one of each row's four is the question


FORMS = {
    "letters": r"[A-Z]{4}",
    "numbers": r"[1-9][0-9]{6}",
    "words": r"[a-z]+-[a-z]+",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


@pytest.mark.parametrize("haystack", ["text", "noise"])
@pytest.mark.parametrize(("keys", "values"), [("words", "numbers"), ("words", "uuid"), ("uuid", "letters")])
def test_keys_values_and_haystack_are_of_the_kinds_asked_for(store, haystack, keys, values):
    task = Needles(
        needles=3, haystack=haystack, keys=keys, values=values, template="\nAbout {key}: {value}.\n"
    )
    rows, facts = task.rows(store, tiny_tokenizer(), 500, seed=1), set()
    form = re.compile(rf"\nAbout ({FORMS[keys]}): ({FORMS[values]})\.\n")
    for index in range(4):
        row = rows.row(index)
        text, answer = text_of(row.input_ids), text_of(row.labels[row.labels != IGNORED])
        found = form.findall(text)
        assert len({key for key, _ in found}) == len({value for _, value in found}) == len(found) == 3
        question = text[text.rindex("\nAbout ") :]
        assert any(question.startswith(f"\nAbout {key}:") and answer.strip() == value for key, value in found)
        assert ("kettle" in text) == (haystack == "noise") and ("return" in text) == (haystack == "text")
        facts |= set(found)
    assert len(facts) == 12  # new ones in every row


def tokens_before_the_answer(rows: NeedleRows, index: int) -> tuple[int, int]:
    """How many tokens of a row stand before the asked needle, and how many would if it stood last."""
    row = rows.row(index).input_ids.tolist()
    first = int(np.flatnonzero(rows.row(index).labels != IGNORED)[0])
    question = next(
        row[start : first + 1]
        for start in range(first, 0, -1)
        if text_of(row[start : first + 1])[:2] == "\n<"
    )
    starts = [i for i in range(first) if row[i : i + len(question)] == question]
    end = text_of(row[starts[0] :]).index("\n", 1) + 1
    size = next(n for n in range(len(question), 99) if len(text_of(row[starts[0] : starts[0] + n])) >= end)
    return starts[0], starts[-1] - size


@pytest.mark.parametrize("needles", [1, 5])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_given_depth_is_exact_to_the_token(store, needles, depth):
    """So many of the tokens before the question, the needle's own left out, stand before the needle."""
    task = Needles(needles=needles, depth=depth, template="\n<{key}> is {value}\n")
    rows = task.rows(store, tiny_tokenizer(), 400, seed=5)
    for index in range(5):
        before, most = tokens_before_the_answer(rows, index)
        assert before == round(depth * most)
        assert rows.row(index).input_ids.shape == (400,) and rows.depth(index) == depth


def test_a_pass_key_needs_no_key(store):
    task = Needles(
        template="\nThe pass key is {value}.\n", haystack="noise", values="numbers", value_length=5
    )
    row = task.rows(store, tiny_tokenizer(), 200, seed=1).row(0)
    answer = text_of(row.labels[row.labels != IGNORED])
    assert re.fullmatch(r" ?[1-9][0-9]{4}", answer)
    assert text_of(row.input_ids).count(f"\nThe pass key is{answer}.\n") == 1


@pytest.mark.parametrize("name", ["needles", "passkey", "niah_1", "niah_2", "niah_3", "niah_multikey"])
def test_the_tasks_of_the_configs_are_those_of_their_names(name: str):
    config = composed("suite=long_context", "model=nowhere", f"+retrieval@extra={name}")
    task = build(config.extra, "extra")
    wanted = {
        "needles": (1, "text", "letters", "letters"),
        "passkey": (1, "noise", "letters", "numbers"),
        "niah_1": (1, "noise", "words", "numbers"),
        "niah_2": (1, "text", "words", "numbers"),
        "niah_3": (1, "text", "words", "uuid"),
        "niah_multikey": (4, "text", "words", "numbers"),
    }
    assert (task.needles, task.haystack, task.keys, task.values) == wanted[name]


def test_short_documents_are_joined_and_empty_ones_left_out():
    rows = NeedleRows(Needles(), store_of([1, 9, 1, 9]), tiny_tokenizer(), 100, seed=1)
    assert rows.row(0).input_ids.shape == (100,)
    kept = {index for index in range(20) if index not in (0, 9, 10, 19)}  # ends of text are left out
    labels = rows.row(0)
    answer = int((labels.labels != IGNORED).sum())
    assert len(set(labels.input_ids.tolist()) & kept) > answer
    with pytest.raises(ValueError, match="empty"):
        NeedleRows(Needles(), store_of([1, 1]), tiny_tokenizer(), 100, seed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"needles": 0}, "needles=0"),
        ({"template": "{value} is {key}"}, "template="),
        ({"template": "{key}"}, "template="),
        ({"template": "{key} {key} {value}"}, "template="),
        ({"characters": "AAB"}, "characters="),
        ({"characters": "ABC", "key_length": 1}, "key_length=1"),
        ({"value_length": 27}, "value_length=27"),
        ({"needles": 8, "value_length": 1}, "value_length=1"),
        ({"haystack": "hay"}, "haystack='hay' is unknown; choose one of text, noise"),
        ({"keys": "names"}, "keys='names' is unknown; choose one of letters"),
        ({"values": "uuid", "value_length": 8}, "value_length=8 has no effect on uuid"),
        ({"needles": 500, "keys": "words", "values": "uuid"}, "too few different words"),
        ({"values": "numbers", "value_length": 1, "needles": 2}, "value_length=1 gives too few"),
        ({"needles": 2, "template": "it is {value}"}, "a single needle may do without"),
        ({"depth": 1.1}, "depth=1.1"),
    ],
)
def test_bad_tasks_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Needles(**options)


def test_rows_too_short_for_the_needles_are_refused_early_and_late(store):
    task = Needles(needles=8)
    with pytest.raises(ValueError, match="suite.row_lengths=64"):
        task.check_row_length(64, "suite.row_lengths")
    task.check_row_length(256, "suite.row_lengths")
    with pytest.raises(ValueError, match="rows of 40 tokens"):
        task.rows(store, tiny_tokenizer(), 40, seed=1).row(0)


def test_what_passes_the_early_check_has_room(store):
    for needles in (1, 3, 9):
        task, length = Needles(needles=needles), 1
        while True:
            try:
                task.check_row_length(length, "key")
                break
            except ValueError:
                length += 1
        assert task.rows(store, tiny_tokenizer(), length, seed=1).row(0).input_ids.shape == (length,)


def test_the_data_module_asks_of_training_or_of_held_out_documents(tmp_path: Path):
    """Held-out batches are the same for every seed, and no text of one split is in the other's."""
    splits = ("train", "validation")
    sources = {
        split: {"list": ListSource(texts=tuple(f"{split} {number}\n" * 30 for number in range(9)))}
        for split in splits
    }
    made = []
    for seed in (1, 2):
        options = {"validation_sources": sources["validation"], "row_length": 48, "seed": seed}
        data = module(tmp_path, sources=sources["train"], **options)
        made += [data.retrieval_batches(Needles(), 7, held_out=one, row_length=64) for one in (False, True)]
    train, held_out, other, again = made
    for batches, split in zip((train, held_out), splits, strict=True):
        assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
        for batch in batches:
            assert set(batch) == {"input_ids", "labels", "document_ids", "depths"}
            assert batch["input_ids"].shape == batch["labels"].shape == (len(batch["depths"]), 64)
            text = "".join(map(text_of, batch["input_ids"]))
            assert split in text and not any(word in text for word in splits if word != split)
    assert equal(held_out, again) and not equal(train, other)
    assert data.retrieval_batches(Needles(), 1)[0]["input_ids"].shape == (1, 48)


# --- the suite ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder and the facts of an evaluation of the bundled teacher, beside itself."""
    folder = tmp_path_factory.mktemp("retrieval")
    for number in range(30):
        (folder / f"{number}.txt").write_text(TEXT * 20 + f"# {number}\n")
    done = evaluation(
        f"model={BUNDLED}",
        f"teacher_folder={BUNDLED}",
        "suite=retrieval",
        "suite.row_lengths=[96,128]",
        "suite.rows=12",
        "data=files",
        f"data.sources.text.paths=[{folder}]",
        "data.sources.text.validation_share=0.3",
        f"paths.outputs={folder}",
        f"paths.cache={folder / 'cache'}",
    )
    assert done.returncode == 0, done.stderr
    assert "needles_4, 128 tokens" in done.stdout
    (output,) = folder.glob("eval/*/eval.json")
    return output.parent, json.loads(output.read_text())


def test_the_suite_tells_accuracy_by_task_length_and_depth(evaluated):
    folder, facts = evaluated
    names = {f"needles_{needles}_{length}" for needles in (1, 4) for length in (96, 128)}
    assert set(facts["figures"]) == names
    assert facts["figures"] == facts["teacher_figures"]  # the same model on the same rows
    assert facts["figures"]["needles_1_128"] > 0.5  # an untrained model has 0
    for who in ("model", "teacher"):
        cells = facts["retrieval"][who]
        assert [(cell["task"], cell["row_length"]) for cell in cells] == [
            (f"needles_{needles}", length) for needles in (1, 4) for length in (96, 128)
        ]
        for cell in cells:
            assert len(cell["by_depth"]) == 4
            assert sum(cell["by_depth"]) / 4 == pytest.approx(cell["accuracy"], abs=0.2)
    for task in ("needles_1", "needles_4"):
        assert (folder / "plots" / f"{task}.png").stat().st_size > 0
        assert f"plots/{task}.png" in (folder / "eval.md").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite.rows=0", "suite.rows=0"),
        ("suite.depths=0", "suite.depths=0"),
        ("suite.row_lengths=[]", "suite.row_lengths is empty"),
        ("suite.row_lengths=[16]", "suite.row_lengths=16 is too short"),
        ("suite.tasks.needles_4.needles=0", "needles=0"),
    ],
)
def test_bad_suites_are_refused_before_any_weight(override, words):
    config = composed("suite=retrieval", "model=nowhere", override)
    with pytest.raises(ValueError, match=words):
        build(config.suite, "suite")


def test_maps_can_be_drawn_with_gaps_and_for_one_model(tmp_path: Path):
    shares = [[1.0, None, 0.25], [0.5, math.nan, 0.0]]
    for maps in ({"model": shares}, {"model": shares, "teacher": shares}):
        path = tmp_path / f"{len(maps)}.png"
        retrieval_maps(path, maps=maps, row_lengths=[128, 4096], task="needles")
        assert path.stat().st_size > 0


@pytest.mark.slow
def test_the_bundled_teacher_can_do_the_task():
    """What makes the task a measure for its students: with one fact in 256 tokens it is mostly right."""
    from models.student_folder import load_model

    config = composed("suite=retrieval", "model=nowhere")
    data = build(config.data, "data", tokenizer=AutoTokenizer.from_pretrained(BUNDLED))
    batches = data.retrieval_batches(Needles(), 32, held_out=True, row_length=256)
    exact = exact_answers(load_model(Path(BUNDLED)), batches)
    assert sum(exact) / len(exact) > 0.6
