"""Continuing texts: prompts in batches as if alone, draws, stop strings, streaming, chunks, and refusals."""

from dataclasses import replace

import pytest
import torch
from texts import PROMPTS, TURN, VOCABULARY, byte_tokenizer, speak_plainly, speaking_model
from tiny import LiveBytes
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
from transformers import RepetitionPenaltyLogitsProcessor as TheirPenalty

from models.generation import Generation, Generator, prefill
from models.generation_options import GenerationOptions
from models.row_text import RowText
from models.sampling import RepetitionPenalty, row_seed, samplers

GREEDY = GenerationOptions(max_new_tokens=12)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.2)


@pytest.fixture(scope="module", params=["teacher", "pure", "hybrid"])
def generator(request) -> Generator:
    return Generator(speaking_model(request.param), byte_tokenizer())


@pytest.fixture(scope="module")
def pure() -> Generator:
    return Generator(speaking_model("pure"), byte_tokenizer())


def texts(generator: Generator, prompts: list[str], options: GenerationOptions) -> list[Generation]:
    return [text for batch, _ in generator.generate(prompts, options) for text in batch]


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_prompt_is_continued_in_a_batch_as_if_alone(generator, options):
    together = texts(generator, PROMPTS, options)
    assert together == [texts(generator, [prompt], options)[0] for prompt in PROMPTS]
    assert together == texts(generator, PROMPTS, replace(options, batch_size=3))
    assert together[::-1] == texts(generator, PROMPTS[::-1], options)
    assert [text.prompt_tokens for text in together] == [len(prompt.encode()) for prompt in PROMPTS]
    assert len({tuple(text.ids) for text in together}) == len(PROMPTS)


def test_greedy_text_is_the_argmax_of_the_whole_forward_without_running_it(generator):
    read = []
    hook = generator.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = texts(generator, [PROMPTS[1]], GREEDY)[0]
    hook.remove()
    ids = torch.tensor([generator.tokenizer(PROMPTS[1])["input_ids"]])
    for token in found.ids:
        assert generator.model(ids).logits[0, -1].argmax() == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert read == [found.prompt_tokens - 1] + [1] * 12


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_read_in_chunks_gives_the_same_text(generator, chunk):
    for options in (GREEDY, DRAWN):
        assert texts(generator, PROMPTS, replace(options, prefill_chunk=chunk)) == texts(
            generator, PROMPTS, options
        )


def test_chunks_bound_the_memory_of_a_long_prompt(generator):
    ids = torch.randint(256, (1, 800), generator=torch.Generator().manual_seed(0))
    mask, peaks = torch.ones_like(ids), {}
    for chunk in (32, 800):
        with LiveBytes() as memory, torch.no_grad():
            assert prefill(generator.model, ids, mask, generator.new_cache(), chunk) == 799
        peaks[chunk] = memory.peak
    assert peaks[32] < 0.6 * peaks[800]


def test_the_cost_counts_real_tokens_and_tells_how_the_state_grows(generator):
    ((_, cost),) = generator.generate(PROMPTS, GREEDY)
    lengths = [len(prompt.encode()) for prompt in PROMPTS]
    assert cost.prefill_tokens == sum(lengths) - len(PROMPTS)  # the last token of each begins the decoding
    assert cost.decode_tokens == 12 * len(PROMPTS)
    assert cost.prefill_seconds > 0 and cost.decode_seconds > 0
    layers = [mixer for mixer in generator.model.model.layers if hasattr(mixer.self_attn, "q_proj")]
    assert cost.growth == len(layers) * 2 * 32 * 4  # keys and values of one head of 32, 4 bytes each
    ((_, one),) = generator.generate(["a"], replace(GREEDY, max_new_tokens=1))
    assert one.growth is None and one.prefill_tokens == 0


# --- draws --------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_texts_and_another_one_others(pure):
    options = replace(DRAWN, samples=3)
    found = texts(pure, PROMPTS[:2], options)
    assert found == texts(pure, PROMPTS[:2], options)
    assert len({text.text for text in found}) == 6
    assert found[3] == texts(pure, [PROMPTS[1]], DRAWN)[0]
    assert found[:3] == texts(pure, [PROMPTS[0]] * 3, DRAWN)
    other = texts(pure, PROMPTS[:2], replace(options, seed=2))
    assert all(a.ids != b.ids for a, b in zip(found, other, strict=True))
    assert row_seed(1, "a", 0) == row_seed(1, "a", 0) != row_seed(1, "a", 1)
    assert row_seed(1, "a", 0) != row_seed(1, "b", 0)


def draws(count: int, **options) -> torch.Tensor:
    """[5] how often each of five tokens of given probabilities is drawn."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    ids = torch.full((count, 1), 4)
    processors = samplers(ids, torch.ones_like(ids), range(count), **settings)
    scores = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02]).log().repeat(count, 1)
    return processors(ids, scores).argmax(1).bincount(minlength=5) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.08, 0.02]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.85}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (
            {"temperature": 0.5},
            [0.16 / 0.2968, 0.09 / 0.2968, 0.04 / 0.2968, 0.0064 / 0.2968, 0.0004 / 0.2968],
        ),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities(options, expected):
    found, expected = draws(4000, **options), torch.tensor(expected)
    assert (found - expected).abs().max() < 0.03  # about four standard deviations of a share of 4000
    assert torch.equal(found == 0, expected == 0) or options.get("temperature") == 0.5


def test_the_repetition_penalty_is_the_common_one_and_passes_over_padding():
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    prompts, mask = torch.tensor([[0, 0, 3, 5], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours, theirs, more = RepetitionPenalty(1.5, prompts, mask), TheirPenalty(1.5), torch.tensor([[7], [8]])
    for ids in (prompts, torch.cat([prompts, more], 1)):
        found = ours(ids, scores)
        assert torch.equal(found[0], theirs(ids[:1, 2:], scores[:1])[0])
        assert torch.equal(found[1], theirs(ids[1:], scores[1:])[0])
    plain, varied = GREEDY, replace(GREEDY, repetition_penalty=5.0, max_new_tokens=30)
    generator = Generator(speaking_model("pure"), byte_tokenizer())
    (before,), (after,) = (texts(generator, ["a"], replace(o, max_new_tokens=30)) for o in (plain, varied))
    assert len(set(after.ids)) > len(set(before.ids))


# --- how a text ends ----------------------------------------------------------------------------------------


def test_a_text_ends_before_its_stop_string_and_the_others_go_on():
    tokenizer = byte_tokenizer()
    generator = Generator(speak_plainly(speaking_model("hybrid"), tokenizer), tokenizer)
    whole = texts(generator, PROMPTS, replace(GREEDY, max_new_tokens=20))
    stop = [whole[0].text[6:9], whole[2].text[3:5]]
    found = texts(generator, PROMPTS, replace(GREEDY, max_new_tokens=20, stop=stop))
    for text, before in zip(found, whole, strict=True):
        places = [place for s in stop if (place := before.text.find(s)) >= 0]
        assert text.text == before.text[: min(places, default=20)]
        assert text.finish_reason == ("stop" if places else "length")
        assert text.ids == before.ids[: len(text.ids)]
    assert found[0].finish_reason == found[2].finish_reason == "stop"
    assert len(found[0].ids) < 20 and found[0].text != ""
    assert {text.finish_reason for text in found} == {"stop", "length"}


def test_a_text_ends_at_an_end_token_and_says_so(pure):
    whole = texts(pure, PROMPTS, DRAWN)
    end = whole[1].ids[4]
    tokenizer, model = byte_tokenizer(), speaking_model("pure")
    model.generation_config.eos_token_id = [261, end]
    found = texts(Generator(model, tokenizer), PROMPTS, DRAWN)
    assert found[1].finish_reason == "eos" and found[1].ids == whole[1].ids[: whole[1].ids.index(end) + 1]
    assert found[1].text == tokenizer.decode(found[1].ids[:-1])
    for text, before in zip(found, whole, strict=True):
        assert text.ids == before.ids[: len(text.ids)]
        assert (text.finish_reason == "eos") == (end in before.ids)


def test_a_stop_string_that_is_a_special_token_is_found(pure):
    model, tokenizer = speaking_model("pure"), byte_tokenizer()
    before, turn = texts(pure, ["a"], GREEDY)[0].ids, tokenizer.convert_tokens_to_ids(TURN)
    model.lm_head.weight.data[turn] = 1.01 * model.lm_head.weight.data[before[5]]  # a little more likely
    generator = Generator(model, tokenizer)
    silent, heard = (texts(generator, ["a"], replace(GREEDY, stop=stop))[0] for stop in ([], [TURN]))
    assert silent.ids[: len(heard.ids)] == heard.ids and heard.ids[-1] == turn
    assert silent.finish_reason == "length" and heard.finish_reason == "stop" and TURN not in silent.text


def test_settings_that_come_with_a_model_change_nothing(pure):
    model = speaking_model("pure")
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=5.0, min_new_tokens=40)
    assert texts(Generator(model, byte_tokenizer()), PROMPTS, GREEDY) == texts(pure, PROMPTS, GREEDY)


# --- characters and streaming -------------------------------------------------------------------------------


def spoken(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[RowText, list[str]]:
    """A row that takes the tokens, and what could be shown after each."""
    row, shown, length = RowText(tokenizer, stop, {}), [], 0
    for token in ids:
        if row.reason is None:
            row.add(token)
            shown.append(row.text[length : row.safe_length()])
            length = row.safe_length()
    row.close()
    return row, [*shown, row.text[length:]]


def test_characters_split_over_tokens_are_shown_whole():
    text = "naïve 🙂 日本語 e\u0301 end"
    tokenizer = byte_tokenizer((("n", "a"), ("Ġ", "ð")))  # " ð" is a blank and the first byte of 🙂
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    row, shown = spoken(tokenizer, ids)
    assert row.text == "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown) and sum(map(bool, shown)) > 10
    cut, shown = spoken(tokenizer, ids[: ids.index(tokenizer.encode("日")[0]) + 2])
    assert cut.text == "".join(shown) == "naïve 🙂 \ufffd" and cut.reason == "length"


def test_any_bytes_give_the_text_of_all_tokens_decoded_at_once():
    tokenizer = byte_tokenizer()
    for seed in range(20):
        ids = torch.randint(len(tokenizer), (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        row, shown = spoken(tokenizer, ids)
        assert row.text == "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_may_begin_a_stop_string_is_held_back():
    row, shown = spoken(byte_tokenizer(), byte_tokenizer().encode("abSTxSTOPyz"), ("STOP", "zzz"))
    assert (row.text, row.reason) == ("abSTx", "stop")
    assert shown == ["a", "b", "", "", "STx", "", "", "", "", ""]
    row, shown = spoken(byte_tokenizer(), byte_tokenizer().encode("abST"), ("STOP",))
    assert (row.text, row.reason, shown[-1]) == ("abST", "length", "ST")


def test_the_streamed_text_is_the_text(generator):
    tokenizer = byte_tokenizer()
    plain = Generator(speak_plainly(speaking_model("hybrid"), tokenizer), tokenizer)
    for speaker, stop in ((generator, ()), (plain, (texts(plain, [PROMPTS[1]], GREEDY)[0].text[5:8],))):
        pieces, options = [], replace(GREEDY, stop=stop)
        ((found, _),) = speaker.generate(
            [PROMPTS[1]], options, show=lambda row, piece, p=pieces: p.append(piece)
        )
        assert len(pieces) > 1
        assert "".join(pieces) == found[0].text == texts(speaker, [PROMPTS[1]], options)[0].text


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must"),
        ({"temperature": -0.1}, "temperature=-0.1 must"),
        ({"temperature": "hot"}, "temperature='hot' must"),
        ({"temperature": float("nan")}, "temperature=nan must"),
        ({"top_p": 0, "temperature": 1}, "top_p=0 must"),
        ({"top_p": 1.1, "temperature": 1}, "top_p=1.1 must"),
        ({"top_k": -1, "temperature": 1}, "top_k=-1 must"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must"),
        ({"seed": -1}, "seed=-1 must"),
        ({"samples": True}, "samples=True must"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must"),
        ({"stop": "END"}, "stop='END' must be a list"),
        ({"stop": [""]}, "stop=.* none empty"),
        ({"top_k": 5}, "top_k=5 has no effect with temperature=0"),
        ({"top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
        ({"samples": 2}, "samples=2 has no effect with temperature=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


def test_texts_that_a_model_cannot_hold_are_refused(pure, caplog):
    with pytest.raises(ValueError, match="prompt: '' has no tokens"):
        texts(pure, [""], GREEDY)
    options = {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 20, "vocab_size": VOCABULARY}
    learned = Generator(GPT2LMHeadModel(GPT2Config(**options)), byte_tokenizer())
    assert len(texts(learned, ["hello"], GREEDY)[0].ids) == 12
    with pytest.raises(ValueError, match="max_new_tokens=12 leads to a text of 23 tokens"):
        texts(learned, ["hello", "hello world"], GREEDY)
    assert len(texts(pure, ["a" * 1020], GREEDY)[0].ids) == 12
    assert "positions end at 1024" in caplog.text
    with pytest.raises(ValueError, match="model: architecture 'mamba' takes no cache"):
        Generator(MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1)), byte_tokenizer())
