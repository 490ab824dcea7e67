"""Pairs of answers: every shape is read, both answers are learned, and pairs stay together."""

import pytest
from chats import (
    MARKED,
    PLAIN,
    TALK,
    chat_file,
    conversations,
    counting,
    learned,
    module,
    pairs,
    speaking,
    store_in,
)

from data.chat import Conversations
from data.loader import collate
from data.preferences import Preferences
from data.whole_rows import OneByOne, Pairs

ASKED = [{"role": "user", "content": "hi"}]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": "hi", "chosen": [*ASKED, said("yes")], "rejected": [*ASKED, said("no")]},
        {"chosen": [*ASKED, said("yes")], "rejected": [*ASKED, said("no")]},
    ],
    ids=["texts", "prompt_of_turns", "answers_of_turns", "prompt_twice", "prompt_in_answers"],
)
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["added", "marked"])
def test_pairs_of_every_shape_are_the_same_two_documents(tmp_path, record, template):
    store = store_in(tmp_path, Preferences(paths=chat_file(tmp_path, record)), template)
    assert [speaking().decode(store.document(i)) for i in (0, 1)] == [
        f"user: hi<turn>\nassistant: {answer}<turn>\n" for answer in ("yes", "no")
    ]
    assert [learned(store, i) for i in (0, 1)] == ["yes<turn>", "no<turn>"]
    assert store.manifest["quarantine"]["good"] == 1


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["added", "marked"])
def test_what_was_answered_before_the_pair_is_not_learned(tmp_path, template):
    record = {"prompt": TALK[:3], "chosen": "good", "rejected": "bad"}
    store = store_in(tmp_path, Preferences(paths=chat_file(tmp_path, record)), template)
    assert [learned(store, i) for i in (0, 1)] == ["good<turn>", "bad<turn>"]


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"prompt": "hi", "chosen": "yes"}, "missing_field", "no ['rejected']"),
        ({"prompt": "hi", "chosen": "yes", "rejected": "yes"}, "no_answer", "are the same"),
        ({"chosen": "yes", "rejected": "no"}, "missing_field", "no 'prompt'"),
        ({"prompt": "hi", "chosen": 3, "rejected": "no"}, "missing_field", "a list of turns"),
    ],
)
def test_bad_pairs_are_set_aside(tmp_path, record, reason, words):
    source = Preferences(paths=chat_file(tmp_path, *pairs(1), record))
    store = store_in(tmp_path, source, bad=0.5)
    assert len(store) == 2 and store.manifest["quarantine"]["bad"] == {reason: 1}
    assert words in open(store.manifest["quarantine"]["file"]).read()


def test_pairs_lie_side_by_side(caplog):
    groups = Pairs(
        counting([4, 5, 6, 30, 3, 2, 9]), 10, 1, "drop", "key"
    )  # the second is too long, the last alone
    assert groups.rows_per_epoch == 2 and "1 of 3 pairs" in caplog.text
    rows = OneByOne(groups, 2)
    seen = [rows.row(index) for index in range(8)]
    firsts = [int(row.input_ids[0]) for row in seen]
    assert set(zip(firsts[::2], firsts[1::2], strict=True)) == {(1, 5), (46, 49)}
    assert sorted(firsts[:4]) == sorted(firsts[4:]) == [1, 5, 46, 49]
    batch = collate(seen)
    lengths = {1: 4, 5: 5, 46: 3, 49: 2}
    assert (batch["document_ids"] >= 0).sum(1).tolist() == [lengths[first] for first in firsts]
    assert batch["document_ids"].max() == 0
    with pytest.raises(ValueError, match="curriculum: conversations and pairs"):
        rows.split(2, 20)


def test_pairs_of_several_sources_are_mixed_as_pairs(tmp_path):
    data = module(tmp_path, chat_file(tmp_path, *pairs()), kind=Preferences)
    others = [{**pair, "prompt": "other " + pair["prompt"]} for pair in pairs()]
    more = Preferences(paths=chat_file(tmp_path, *others, name="more.jsonl"))
    both = module(
        tmp_path,
        chat_file(tmp_path, *pairs()),
        kind=Preferences,
        sources={**data.sources, "more": more},
        weights={"more": 3.0},
    )
    rows, decode, other = both.train_rows(), both.tokenizer.decode, 0
    for index in range(0, 40, 2):
        texts = [decode(rows.row(i).input_ids[rows.row(i).document_ids == 0]) for i in (index, index + 1)]
        prompts = [text.partition("assistant: ")[0] for text in texts]
        assert prompts[0] == prompts[1] and "def " in texts[0] and "No, I" in texts[1]
        other += "other" in prompts[0]
    assert other == 15
    assert [len(batch["input_ids"]) for batch in data.validation_batches(rows=3)] == [2]  # whole pairs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_device": 3}, r"data\.rows_per_device=3 must be a multiple of 2"),
        ({"repeat_first_rows": 5}, r"data\.repeat_first_rows=5 must be a multiple of 2"),
        ({"repeated_share": 0.5}, r"data\.repeated_share=0\.5 must be 0"),
    ],
)
def test_what_would_part_a_pair_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, chat_file(tmp_path, *pairs()), kind=Preferences, **changes)
    with pytest.raises(ValueError, match="mix pairs with other documents"):
        chats = {"chat": Conversations(paths=chat_file(tmp_path, *conversations(), name="c.jsonl"))}
        module(tmp_path, chat_file(tmp_path, *pairs()), kind=Preferences, sources=chats)
