"""Small conversations and pairs of answers, as files and stores: what the tests of sft and dpo share."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from data_inputs import store_of
from texts import byte_tokenizer

from data.chat import Conversations
from data.datamodule import TextDataModule
from data.token_store import TokenStore, prepare_token_store

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<turn>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes wörld"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no"},
]
WORDS = "list read file open class method return value string number loop index table stack queue".split()


def conversations(count: int = 80) -> list[dict]:
    """Records of one to three rounds, about Python words."""
    records = []
    for number in range(count):
        turns = [{"role": "system", "content": "Answer briefly."}] if number % 3 == 0 else []
        for round_number in range(1 + number % 3):
            word = WORDS[(number + 5 * round_number) % len(WORDS)]
            turns.append({"role": "user", "content": f"What is a {word}?"})
            turns.append({"role": "assistant", "content": f"A {word} is def {word}(x): return {number}."})
        records.append({"messages": turns})
    return records


def pairs(count: int = 60) -> list[dict]:
    """Records in which the chosen answer is code and the rejected one is not."""
    return [
        {
            "prompt": f"Write {WORDS[number % len(WORDS)]} number {number}.",
            "chosen": f"def {WORDS[number % len(WORDS)]}(x):\n    return {number}",
            "rejected": f"No, I would rather not. {number}",
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: list[dict]) -> Path:
    """The records as lines of JSON."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def speaking(template: str | None = PLAIN):
    """A tokenizer of bytes with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def store_in(folder, source, template=PLAIN, tokenizer=None, bad=0.0, **options) -> TokenStore:
    """The token store of a source, small limits given."""
    limits = {"max_bad_share": bad, "max_document_bytes": 10_000, **options}
    return prepare_token_store(source, tokenizer or speaking(template), folder / "cache", **limits)


def chat_file(folder, *records, name="chats.jsonl"):
    return str(write_lines(folder / name, list(records)))


def learned(store, index, tokenizer=None) -> str:
    """The text of a document's learned tokens, a bar between stretches."""
    tokenizer = tokenizer or speaking()
    ids, trained = store.document(index), store.trained_tokens(index)
    cuts = np.flatnonzero(np.diff(trained.astype(int))) + 1
    stretches = zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)
    return "|".join(tokenizer.decode(part.tolist()) for part, flags in stretches if flags[0])


def counting(lengths, every: int = 2) -> TokenStore:
    """Documents whose tokens count up from 1; every so manieth token is learned."""
    store = store_of(lengths)
    tokens = store.tokens + 1
    return TokenStore(tokens, store.ends, {}, (tokens % every == 0).astype(np.uint8))


def module(folder, paths, kind=Conversations, tokenizer=None, **changes):
    source = kind(paths=paths, split="train", validation_share=0.3)
    options = {
        "tokenizer": tokenizer or speaking(),
        "sources": {"chat": source},
        "validation_sources": {"chat": replace(source, split="validation")},
        "weights": {},
        "repeated_share": 0.0,
        "repeat_first_rows": 0,
        "row_length": 256,
        "rows_per_device": 4,
        "validation_rows": 6,
        "copy_rows": 2,
        "copy_passage_length": 8,
        "workers": 0,
        "seed": 1,
        "cache_folder": str(folder / "cache"),
        "max_bad_share": 0.0,
        "max_document_bytes": 10_000,
    }
    return TextDataModule(**{**options, **changes})
