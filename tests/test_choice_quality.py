"""Shares of attention on chosen blocks, against plain loops; the bound; the suite `sparse_choice`."""

import json
import math
from pathlib import Path

import attention_checks
import pytest
import torch
from attention_checks import GROUPED, hidden_of, plain_heads, rotary
from evaluations import BUNDLED, SIZE, TEXT, composed, evaluation
from tiny import convert, disturb, packed_ids, random_ids, tiny_teacher
from transformers import AutoTokenizer

from conf.launch import build
from models.choice_quality import WAYS, choice_quality, mixer_quality
from models.config import StudentConfig
from models.layer_plan import LayerPlan
from models.mixers import SparseAttentionMixer, SparseAttentionOptions
from models.student_folder import Student, save_student

TOKENS, LENGTH = 58, 5


def make(**options) -> SparseAttentionMixer:
    chosen = {
        "block_length": LENGTH,
        "top_k": 2,
        "window": 7,
        "pool_blocks": 30,
        "index_width": 32,
        **options,
    }
    return attention_checks.make(SparseAttentionMixer, GROUPED, 0.5, **chosen)


def plain_shares(mixer: SparseAttentionMixer, hidden: torch.Tensor) -> dict[str, list[float]]:
    """Way -> share of attention, mean over heads, of each token of one document that has a choice; but for
    the mixer's own choice."""
    options, positions = mixer.options, rotary(torch.arange(len(hidden))[None])
    with torch.no_grad():
        query, key, _ = plain_heads(mixer, hidden, positions)
    heads, sharing = mixer.shape.heads, mixer.shape.heads // mixer.shape.kv_heads
    lists = heads if options.selector == "published" else mixer.shape.kv_heads
    found: dict[str, list[float]] = {"always": [], "best": [], "mean_key_head": [], "mean_key_list": []}
    for token in range(len(hidden)):
        own, blocks = token // LENGTH, range(token // LENGTH + 1)
        always = {b for b in blocks if b < options.sinks or b >= own - options.near}
        others = [b for b in range(own) if b not in always]
        if len(others) <= options.top_k:
            continue
        mass, mean = torch.zeros(heads, own + 1), torch.zeros(heads, own + 1)
        for head in range(heads):
            keys = key[: token + 1, head // sharing]
            share = torch.softmax(keys @ query[token, head] / math.sqrt(mixer.shape.head_size), 0)
            for b in blocks:
                mass[head, b] = share[b * LENGTH : (b + 1) * LENGTH].sum()
                mean[head, b] = keys[b * LENGTH : (b + 1) * LENGTH].mean(0) @ query[token, head]
        together = [
            [g for g in range(heads) if g * lists // heads == h * lists // heads] for h in range(heads)
        ]
        ranks = {
            "always": (0, mass),
            "best": (options.top_k, torch.stack([mass[list_].mean(0) for list_ in together])),
            "mean_key_head": (options.top_k, mean),
            "mean_key_list": (options.top_k, torch.stack([mean[list_].mean(0) for list_ in together])),
        }
        for way, (count, rank) in ranks.items():
            total = 0.0
            for head in range(heads):
                best = sorted(others, key=rank[head].tolist().__getitem__, reverse=True)[:count]
                total += float(mass[head, [*always, *best]].sum()) / heads
            found[way].append(total)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"selector": "published", "sinks": 0, "window": 1}, {"rope": True, "sinks": 2}],
    ids=["gated", "published", "rope"],
)
def test_shares_are_those_of_plain_loops(options):
    mixer, hidden = make(**options), hidden_of(tokens=TOKENS)
    found = mixer_quality(mixer, hidden, rotary(torch.arange(TOKENS)[None]))
    plain = [plain_shares(mixer, row) for row in hidden]
    assert found.tokens == sum(len(row["best"]) for row in plain) > 0
    for way in plain[0]:
        assert found.mass[way] == pytest.approx(sum(sum(row[way]) for row in plain), rel=1e-5), way
    if mixer.index is None:  # what is published is the choice by mean keys
        assert found.mass["chosen"] == pytest.approx(found.mass["mean_key_head"], rel=1e-6)
    order = [found.mass[way] for way in ("always", "chosen", "best")]
    assert order == sorted(order) and order[0] < order[-1]


def test_the_bound_holds_on_every_row_and_can_be_broken(monkeypatch):
    mixer, hidden = make(), hidden_of(tokens=TOKENS)
    found = mixer_quality(mixer, hidden, None)
    assert found.rows == 2 * TOKENS * GROUPED.heads and found.beyond == 0 and 0 < found.nearest <= 1
    attend = SparseAttentionMixer.attend

    def worse(self, *arguments):
        output, share = attend(self, *arguments)
        return output + 3, share

    monkeypatch.setattr(SparseAttentionMixer, "attend", worse)
    broken = mixer_quality(mixer, hidden, None)
    assert broken.beyond > 0 and broken.nearest > 1


def test_where_everything_is_seen_there_is_nothing_to_choose():
    assert mixer_quality(make(top_k=20), hidden_of(tokens=TOKENS), None) is None


PLAN = ["rwkv7", "sparse", "attention"]


def sparse_student() -> Student:
    sparse = SparseAttentionOptions(block_length=4, window=5, top_k=2)
    config = StudentConfig(layer_plan=LayerPlan(layers=PLAN), mixers={"sparse": sparse})
    model, _ = convert(tiny_teacher(vocab_size=SIZE), config)
    disturb(model, 0.1)
    return Student(model.eval(), PLAN, config)


def test_rows_add_up():
    student, ids = sparse_student().model, random_ids(3, 60)
    documents = packed_ids([[60]] * 3)
    whole = choice_quality(student, [{"input_ids": ids, "document_ids": documents}])[1]
    parts = choice_quality(
        student,
        [{"input_ids": i[None], "document_ids": d[None]} for i, d in zip(ids, documents, strict=True)],
    )
    assert set(parts) == {1} and parts[1].tokens == whole.tokens and parts[1].rows == whole.rows
    for way in WAYS:
        assert parts[1].mass[way] == pytest.approx(whole.mass[way], rel=1e-5)
    assert parts[1].nearest == pytest.approx(whole.nearest, rel=1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number}.txt").write_text(TEXT * 20 + f"# {number}\n")
    return folder


def run(text: Path, model: str | Path, *overrides: str):
    return evaluation(
        f"model={model}",
        "suite=sparse_choice",
        "suite.rows=2",
        "data=files",
        f"data.sources.text.paths=[{text}]",
        "data.sources.text.validation_share=0.3",
        f"paths.outputs={text}",
        f"paths.cache={text / 'cache'}",
        *overrides,
    )


def test_the_suite_tells_and_draws(text, tmp_path):
    save_student(tmp_path / "student", sparse_student(), AutoTokenizer.from_pretrained(BUNDLED))
    done = run(text, tmp_path / "student", "suite.row_length=100")
    assert done.returncode == 0, done.stderr
    (output,) = text.glob("eval/*/eval.json")
    facts = json.loads(output.read_text())
    (layer,) = facts["sparse_choice"]
    assert layer["layer"] == 1 and 0 < layer["always"] < layer["chosen"] <= layer["best"] <= 1
    assert facts["figures"]["mean_chosen"] == layer["chosen"] and facts["figures"]["layer_1_beyond"] == 0
    assert (output.parent / "plots" / "sparse_choice.png").stat().st_size > 0
    short = run(text, tmp_path / "student", "suite.row_length=16")
    assert short.returncode == 2 and "suite.row_length=16: layer 1 sees whole rows" in short.stderr


def test_a_model_without_sparse_layers_is_refused(text):
    done = run(text, BUNDLED)
    assert done.returncode == 2 and "the model has no sparse layer" in done.stderr
    with pytest.raises(ValueError, match="suite.rows=0"):
        build(composed("suite=sparse_choice", "model=nowhere", "suite.rows=0").suite, "suite")
