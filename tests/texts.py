"""A tokenizer of bytes and tiny models that speak its tokens: what the tests of generated text share."""

import tokenizers
from tiny import ARWKV, tiny_student, tiny_teacher
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END, TURN = "<end>", "<turn>"
VOCABULARY = 264  # a few more than the tokenizer has, as many models have
# Tokens of one byte, so that every other character and every stop string spans several.
PROMPTS = ["a", "hello wörld", "the quick brown fox 🙂 jumps", "the quick"]
MODELS = {
    "teacher": lambda teacher: teacher,
    "pure": lambda teacher: tiny_student(teacher, **ARWKV),
    "hybrid": lambda teacher: tiny_student(teacher, (1,)),
}


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Every byte is a token; `<end>` ends a text, `<turn>` is special as well.

    Args:
        merges: pairs of tokens that make one more.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])
    }
    tokenizer = Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(TURN, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def speaking_model(kind: str) -> PreTrainedModel:
    """A random model of one of MODELS over the bytes."""
    return MODELS[kind](tiny_teacher(vocab_size=VOCABULARY))


def speak_plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Makes a greedy model write printable ASCII alone: the other tokens' scores become 0, and some of those
    left is above."""
    plain = {chr(code) for code in range(33, 127)}
    for token, index in tokenizer.get_vocab().items():
        if token not in plain:
            model.lm_head.weight.data[index] = 0
    model.lm_head.weight.data[len(tokenizer) :] = 0
    return model
