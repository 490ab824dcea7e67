"""Continues texts, or talks: `python generate.py model=<run folder or Hugging Face folder> prompt="def"`.

Prints the texts, how fast they came, and how much state a row holds; writes generations.jsonl.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from conf import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Checks, loads, and continues prompts or talks."""
    launch.check_complete(config)
    launch.quieten()
    from models.chat import Chat, ChatTemplate
    from models.generation import Generator
    from models.generation_options import GenerationOptions
    from models.student_folder import model_folder
    from pipeline.generation import check_request, folder_tokenizer, placed_model, read_prompts, read_template

    values = OmegaConf.to_container(config, resolve=True)
    options = GenerationOptions(**{field.name: values[field.name] for field in fields(GenerationOptions)})
    check_request(config)
    prompts = [] if config.chat else read_prompts(config.prompt, config.prompts)
    template_text = read_template(config.chat_template)
    folder = model_folder(config.model)
    tokenizer = folder_tokenizer(folder)
    template = ChatTemplate(tokenizer, template_text, config.system) if config.chat else None
    model = placed_model(folder, attention=config.attention, device=config.device, dtype=config.dtype)
    generator = Generator(model, tokenizer)
    with (Path(config.paths.run_folder) / "generations.jsonl").open("w", encoding="utf-8") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        if template is not None:
            talk(Chat(generator, template, options), keep)
        else:
            write(generator, prompts, options, keep, stream=config.stream)


def write(generator: Any, prompts: list[str], options: Any, keep: Callable, *, stream: bool) -> None:
    """Continues the prompts and shows each text; with `stream` while it comes."""
    from models.generation import Cost

    total, many = Cost(), len(prompts) * options.samples > 1
    for texts, cost in generator.generate(
        prompts, options, show=(lambda _, piece: say(piece)) if stream else None
    ):
        total.add(cost)
        for text in texts:
            keep(text.facts())
            if many:
                say(f"--- {text.prompt}\n")
            say("\n" if stream else f"{text.text}\n")
    say(f"\n{summary(total)}\n")


def talk(chat: Any, keep: Callable) -> None:
    """Answers line after line until /exit or the end of the input; Ctrl-C breaks off an answer, or ends."""
    while True:
        line = ask()
        message = line.strip()
        if not line or message == "/exit":
            say("\n")
            return
        if message == "/reset":
            chat.reset()
            say("The conversation is forgotten.\n")
        elif message:
            try:
                answer, cost, reused = chat.reply(message, show=say)
            except KeyboardInterrupt:
                say("\n(interrupted; neither message nor answer is kept)\n")
                continue
            keep({**answer.facts(), "reused_tokens": reused})
            say(f"\n[{summary(cost, '; ')}; {reused} of {answer.prompt_tokens} tokens were read before]\n")


def ask() -> str:
    """The next line that the user types; empty at the end of the input and after Ctrl-C."""
    say("> ")
    try:
        return sys.stdin.readline()
    except KeyboardInterrupt:
        return ""


def summary(cost: Any, separator: str = "\n") -> str:
    """What generating has cost, in words."""
    parts = [
        f"{name}: {tokens:,} tokens in {seconds:.2f} s"
        + (f", {tokens / seconds:,.0f} tokens/s" if tokens else "")
        for name, tokens, seconds in (
            ("prefill", cost.prefill_tokens, cost.prefill_seconds),
            ("decode", cost.decode_tokens, cost.decode_seconds),
        )
    ]
    growth = {None: "one token shows no growth", 0: "does not grow"}
    grows = growth.get(cost.growth) or f"grows by {cost.growth:,.0f} bytes per token"
    return separator.join([*parts, f"state: {cost.state_bytes:,} bytes per row, {grows}"])


def say(text: str) -> None:
    """Prints exactly this, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    launch.register_resolvers()
    main()
