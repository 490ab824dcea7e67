"""Trains a byte-level BPE tokenizer, for teachers that are trained from scratch."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.documents import DocumentSource
from data.quarantine import Quarantine

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_bpe_tokenizer(
    source: DocumentSource, vocabulary_size: int, max_length: int, quarantine_folder: Path
) -> PreTrainedTokenizerFast:
    """Trains on a source's documents; any text can be encoded, and decoding gives it back byte for byte.

    Args:
        source: the documents.
        vocabulary_size: entries, the three special tokens and 256 bytes included.
        max_length: the model's longest row in tokens, stored with the tokenizer.
        quarantine_folder: where bad documents go.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    quarantine = Quarantine(quarantine_folder)
    tokenizer.train_from_iterator((document.text for document in source.documents(quarantine)), trainer)
    quarantine.finish()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=max_length
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def symbol_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A vocabulary of symbols for synthetic data: token n is written `<n>`; `<0>` ends texts, pads, and
    stands for whatever is no symbol.

    Args:
        vocabulary_size: entries.

    Raises:
        ValueError: for fewer than 2.
    """
    if vocabulary_size < 2:
        raise ValueError(f"tokenizer.vocabulary_size={vocabulary_size} must be at least 2.")
    symbols = {f"<{number}>": number for number in range(vocabulary_size)}
    tokenizer = Tokenizer(models.WordLevel(symbols, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<0>", eos_token="<0>", pad_token="<0>"
    )
