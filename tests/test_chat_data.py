"""Conversations and pairs of answers: which tokens are learned, and how they lie in rows."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
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
from texts import TURN

from data.chat import Conversations, HubConversations
from data.preferences import Preferences
from data.quarantine import BadDataError
from data.token_store import open_token_store
from data.whole_rows import WholeDocuments, best_fit

IN_WORDS = PLAIN.replace("<turn>\n", "\n\n")
WITHOUT_PROMPT = PLAIN.partition("{% if add")[0]
# Shows what was thought in the last turn only, as templates of reasoning models do.
FORGETS = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<turn>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (PLAIN, "yes wörld<turn>|no<turn>"),
        (MARKED, "yes wörld<turn>|no<turn>"),
        (MARKED.replace("content }}{% endgen", "content }}<turn>\n{% endgen"), "yes wörld<turn>|no<turn>"),
        (IN_WORDS, "yes wörld\n\n|no\n\n"),
        (WITHOUT_PROMPT, "yes wörld<turn>|no<turn>"),
    ],
    ids=["added", "marked", "marked_with_end", "ends_in_words", "no_prompt"],
)  # fmt: skip
def test_answers_and_the_ends_of_their_turns_are_learned(tmp_path, template, wanted):
    store = store_in(tmp_path, Conversations(paths=chat_file(tmp_path, {"messages": TALK})), template)
    assert learned(store, 0) == wanted
    tokenizer = speaking(template)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert store.document(0).tolist() == tokenizer.encode(text, add_special_tokens=False)  # nothing is added


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers(tmp_path):
    (tmp_path / "chat.jinja").write_text(IN_WORDS)
    paths = chat_file(tmp_path, {"messages": TALK})
    own = Conversations(paths=paths, chat_template=str(tmp_path / "chat.jinja"))
    assert learned(store_in(tmp_path, own, template=None), 0) == "yes wörld\n\n|no\n\n"
    (tmp_path / "chat.jinja").write_text(PLAIN)
    assert learned(store_in(tmp_path, own, template=None), 0) == "yes wörld<turn>|no<turn>"  # no stale cache


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path):
    paths = chat_file(tmp_path, {"messages": TALK})
    with pytest.raises(
        ValueError, match=r"data\.sources\..*chat_template: the template shows .*generation %"
    ):
        store_in(tmp_path, Conversations(paths=paths), FORGETS)
    single = Conversations(paths=chat_file(tmp_path, {"messages": TALK[:2]}, name="single.jsonl"))
    assert learned(store_in(tmp_path, single, FORGETS), 0) == "<think>yes wörld<turn>"


def test_a_tokenizer_without_a_template_is_refused_with_the_module(tmp_path):
    with pytest.raises(
        ValueError, match=r"sources\.chat\.chat_template: this tokenizer has no chat template"
    ):
        module(tmp_path, chat_file(tmp_path, *conversations()), tokenizer=speaking(None))


def test_sharegpt_is_read_by_a_mapping(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    source = Conversations(
        paths=chat_file(tmp_path, {"conversations": turns}),
        **{"messages": "conversations", "role": "from", "content": "value"},
        roles={"human": "user", "gpt": "assistant"},
    )
    store = store_in(tmp_path, source)
    assert speaking().decode(store.document(0)) == "user: hi<turn>\nassistant: yes<turn>\n"
    assert learned(store, 0) == "yes<turn>"
    assert hash(source) == hash(replace(source))  # stores are kept by source


def test_every_reader_gives_the_same_tokens(tmp_path):
    records = conversations(9)
    plain = chat_file(tmp_path, *records)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "chats.jsonl").read_bytes()))
    table = pyarrow.Table.from_pylist([{"id": 7, **record, "score": 0.5} for record in records])
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    hub = HubConversations(path="json", data_files=plain)
    sources = [Conversations(paths=str(path)) for path in (plain, packed, tmp_path / "chats.parquet")]
    stores = [store_in(tmp_path, source) for source in [*sources, hub]]
    for store in stores:
        assert len(store) == 9
        assert np.array_equal(store.tokens, stores[0].tokens)
        assert np.array_equal(store.trained, stores[0].trained)
    with pytest.raises(
        ValueError, match=r"none of \['talk'\]; its columns are \['id', 'messages', 'score'\]"
    ):
        store_in(tmp_path, replace(sources[2], messages="talk"))


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"text": "x"}, "missing_field", "no 'messages'; the fields are"),
        ({"messages": "hi"}, "missing_field", "a list of turns"),
        ({"messages": []}, "missing_field", "a list of turns"),
        ({"messages": ["hi"]}, "missing_field", "turn 1 is no object"),
        ({"messages": [{"role": "user"}]}, "missing_field", "turn 1 has no text in 'content'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "missing_field", "turn 1 has no text in 'role'"),
        ({"messages": [*TALK[:3], {"role": "assistant", "content": " "}]}, "empty", "turn 4 is an empty"),
        ({"messages": TALK[:1]}, "no_answer", "the roles are ['user']"),
        ({"messages": [{"role": "system", "content": "x"}, *TALK]}, "refused_by_template", "no system role"),
    ],
)  # fmt: skip
def test_bad_conversations_are_set_aside_with_a_reason(tmp_path, record, reason, words):
    source = Conversations(paths=chat_file(tmp_path, {"messages": TALK}, record))
    store = store_in(tmp_path, source, STRICT, bad=0.5)
    assert len(store) == 1 and store.manifest["quarantine"]["bad"] == {reason: 1}
    (kept,) = map(json.loads, open(store.manifest["quarantine"]["file"]))
    assert kept["reason"] == reason and words in kept["detail"] and kept["origin"].endswith(":2")
    with pytest.raises(BadDataError, match="1 of 2 documents"):
        store_in(tmp_path, source, STRICT)


def test_damaged_masks_are_noticed(tmp_path):
    source = Conversations(paths=chat_file(tmp_path, {"messages": TALK}))
    store_in(tmp_path, source)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    with (folder / "trained.bin").open("ab") as file:
        file.write(b"1")
    with pytest.raises(ValueError, match="differs from its manifest; delete the folder"):
        open_token_store(folder)
    (folder / "trained.bin").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        open_token_store(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "cut"}, r"too_long='cut' is unknown; choose from drop, error, split"),
        ({"roles": ["human"]}, r"roles=\['human'\] must name roles, as in \{human: user"),
        ({"chat_template": "nowhere.jinja"}, r"chat_template=nowhere\.jinja: there is no such file"),
        ({"paths": []}, r"paths is empty"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=r"data\.sources\.<name>\." + message):
        Conversations(**{"paths": chat_file(tmp_path, *conversations()), **options})
    if "too_long" in options:
        with pytest.raises(ValueError, match="choose from drop, error"):
            Preferences(paths=chat_file(tmp_path, *pairs()), too_long="split")


# --- rows ---------------------------------------------------------------------------------------------------


def test_labels_are_the_next_tokens_that_are_learned():
    # Two documents, tokens 1 2 3 4 5 and 6 7 8; the even ones are learned.
    row = WholeDocuments(counting([5, 3]), 10, 1, "error", "key").row(0)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert row.labels.tolist() == [2, -100, 4, -100, -100, -100, 8, -100, -100, -100]
    assert row.document_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert [part.dtype for part in row] == [np.int64, np.int64, np.int32]
    crossed = WholeDocuments(counting([5, 3]), 10, 1, "error", "key", cross_documents=True).row(0)
    assert crossed.document_ids.tolist() == [0] * 8 + [-1] * 2
    assert crossed.labels.tolist() == row.labels.tolist()  # a first token is never learned


def test_an_epoch_holds_every_conversation_once_and_whole():
    lengths = np.random.default_rng(0).integers(2, 40, 200)
    rows = WholeDocuments(counting(lengths), 64, 3, "error", "key")
    assert rows.rows_per_epoch <= 1.03 * lengths.sum() / 64  # little padding
    for epoch in (0, 1):
        found = []
        for index in range(rows.rows_per_epoch):
            row = rows.row(epoch * rows.rows_per_epoch + index)
            for number in range(row.document_ids.max() + 1):
                piece = row.input_ids[row.document_ids == number]
                assert np.array_equal(piece, np.arange(piece[0], piece[-1] + 1))
                found.append((int(piece[0]), len(piece)))
        starts = np.cumsum(lengths) - lengths + 1
        assert sorted(found) == list(zip(starts.tolist(), lengths.tolist(), strict=True))
    again = WholeDocuments(counting(lengths), 64, 3, "error", "key")
    orders = [[again.row(e * rows.rows_per_epoch + i).input_ids[0] for i in range(9)] for e in (0, 1)]
    assert orders[0] == [rows.row(i).input_ids[0] for i in range(9)] and orders[0] != orders[1]


def test_best_fit_never_overfills():
    lengths = np.array([7, 3, 5, 5, 2, 8, 10])
    rows = best_fit(lengths, 10)
    assert np.bincount(rows, weights=lengths).tolist() == [10, 10, 10, 10]
    assert len(best_fit(np.array([], np.int64), 10)) == 0


def test_what_is_too_long_is_said_and_never_cut_in_silence(caplog):
    store = counting([4, 30, 6], every=1)
    rows = WholeDocuments(store, 10, 1, "drop", "k.too_long")
    assert rows.rows_per_epoch == 1 and rows.row(0).input_ids.max() == 40
    assert (
        "1 of 3 conversations (33.33%) have more than data.row_length=10 tokens, the longest 30"
        in caplog.text
    )
    assert "k.too_long=drop: they are left out" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 .*raise data\.row_length, or set k\.too_long=drop"):
        WholeDocuments(store, 10, 1, "error", "k.too_long")
    with pytest.raises(ValueError, match="k.too_long=drop leaves no conversation"):
        WholeDocuments(store, 3, 1, "drop", "k.too_long")


def test_a_split_conversation_loses_no_label():
    store = counting([4, 30, 6], every=1)
    rows = WholeDocuments(store, 10, 1, "split", "key")
    labels = [label for index in range(rows.rows_per_epoch) for label in rows.row(index).labels if label >= 0]
    assert sorted(labels) == [*range(2, 5), *range(6, 35), *range(36, 41)]
    sparse = WholeDocuments(counting([30], every=25), 10, 1, "split", "key")
    assert sparse.rows_per_epoch == 1  # stretches in which nothing is learned are left out


# --- the data module ----------------------------------------------------------------------------------------


def test_the_module_trains_and_validates_on_answers(tmp_path):
    data = module(tmp_path, chat_file(tmp_path, *conversations()))
    rows, decode = data.train_rows(), data.tokenizer.decode
    for index in range(20):
        row = rows.row(index)
        for number in range(row.document_ids.max() + 1):
            here = row.document_ids == number
            assert decode(row.input_ids[here]).startswith(("user: ", "system: "))
            spoken = decode(row.labels[here][row.labels[here] >= 0])
            assert spoken.startswith("A ") and spoken.endswith(TURN)
    held_out = data.validation_batches()
    assert sum(len(batch["input_ids"]) for batch in held_out) == 6
    assert all((batch["labels"] >= 0).any(1).all() for batch in held_out)
    assert data.copy_batches()
