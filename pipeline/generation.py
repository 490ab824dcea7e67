"""What generate.py needs before it generates: its prompts, the tokenizer and the model of a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.student_folder import load_model
from models.teacher import DTYPES

DEVICES = ("auto", "cpu", "cuda")
# A folder with none of these would get an empty tokenizer, without a word.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
CHAT_ONLY = ("system", "chat_template")


def check_request(config: Any) -> None:
    """Holds the keys of generate.py against each other, before anything is loaded.

    Args:
        config: with the keys chat, prompt, prompts, stream, samples, system, chat_template, device, dtype.

    Raises:
        ValueError: for keys that contradict each other or would not be read.
    """
    given = [key for key in ("prompt", "prompts") if config[key] is not None]
    if config.chat and given:
        raise ValueError(
            f"{given[0]}= has no effect with chat=true, which reads what you type; leave it out."
        )
    if not config.chat and len(given) != 1:
        raise ValueError(
            "prompt, prompts: give one of the two, prompt='...' or prompts=<file>, or set chat=true; "
            f"{'both are' if given else 'neither is'} given."
        )
    for key in CHAT_ONLY:
        if config[key] is not None and not config.chat:
            raise ValueError(f"{key}= has no effect without chat=true; set chat=true or leave it out.")
    if config.chat and config.samples != 1:
        raise ValueError(f"samples={config.samples} has no effect with chat=true; leave it at 1.")
    if config.stream and not config.chat and (config.prompts is not None or config.samples != 1):
        raise ValueError("stream=true shows one text; give prompt= and samples=1, or set stream=false.")
    if config.device not in DEVICES:
        raise ValueError(f"device={config.device!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here; set device=cpu or device=auto.")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")


def read_prompts(prompt: Any, file: str | None) -> list[str]:
    """The prompts of a request.

    Args:
        prompt: one prompt, or None.
        file: else a file of them: one per line (blank lines left out), or with the ending .jsonl one object
            with a `prompt` per line.

    Raises:
        ValueError: for a missing or empty file, or a line that holds no prompt.
    """
    if file is None:
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt={prompt!r} must be a text; quote a number: 'prompt=\"42\"'.")
        return [prompt]
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"prompts={file}: there is no such file.")
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts={file} is empty; write one prompt per line.")
    if path.suffix != ".jsonl":
        return [line.rstrip("\r") for _, line in lines]
    return [_prompt_of(line, f"prompts={file}, line {number}") for number, line in lines]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is no UTF-8 text ({error}).") from error


def _prompt_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error}).") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{place} has no text in a field `prompt`; write {{"prompt": "..."}}.')
    return prompt


def read_template(file: str | None) -> str | None:
    """The text of a chat template file; None where none is given.

    Raises:
        ValueError: where the file is missing.
    """
    if file is None:
        return None
    if not Path(file).is_file():
        raise ValueError(f"chat_template={file}: there is no such file.")
    return Path(file).read_text(encoding="utf-8")


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: where the folder has none, a damaged one, or one with more tokens than the model has
            embeddings.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the tokenizer "
            "files of the model that it was made from."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ValueError(f"model: config.json or tokenizer of {folder} cannot be read: {error}") from error
    embeddings = hf_config.get_text_config().vocab_size
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        raise ValueError(
            f"model: the tokenizer of {folder} has {tokens} tokens, the model embeds {embeddings}; they do "
            "not belong together."
        )
    return tokenizer


def placed_model(folder: Path, *, attention: str, device: str, dtype: str) -> PreTrainedModel:
    """A model in evaluation mode on its device.

    Only the weights change their type: tables such as rotary frequencies stay exact, and so do the states of
    recurrent layers.

    Args:
        folder: student or Hugging Face folder.
        attention: `sdpa` or `eager`.
        device: `auto` takes a GPU where torch finds one.
        dtype: of the weights.

    Raises:
        ValueError: where the folder has no weights that can be loaded.
    """
    try:
        model = load_model(folder, attention)
    except OSError as error:
        raise ValueError(f"model: the weights of {folder} cannot be loaded: {error}") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    usable = device != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if usable else "cpu").requires_grad_(False)
