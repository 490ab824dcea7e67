"""generate.py from the command line's side: conversations, prompt files, folders, and what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from texts import PROMPTS, TURN, VOCABULARY, byte_tokenizer, speak_plainly, speaking_model
from tiny import convert, student_config, tiny_teacher
from transformers import PreTrainedTokenizerBase

import generate
from models.chat import Chat, ChatTemplate
from models.generation import Cost, Generator
from models.generation_options import GenerationOptions
from models.student_folder import Student, save_student
from pipeline.generation import check_request, folder_tokenizer, placed_model, read_prompts, read_template

GREEDY = GenerationOptions(max_new_tokens=10)
MESSAGES = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
TEMPLATE = MESSAGES + "{% if add_generation_prompt %}assistant: {% endif %}"
LOUD = TEMPLATE.replace("m.content", "(m.content | upper)")  # an answer reads otherwise on the next turn


@pytest.fixture(scope="module", params=["teacher", "pure", "hybrid"])
def plain(request) -> Generator:
    """Writes ASCII alone, so that a text has one way to be written in tokens."""
    tokenizer = byte_tokenizer()
    return Generator(speak_plainly(speaking_model(request.param), tokenizer), tokenizer)


# --- conversations ------------------------------------------------------------------------------------------


def conversation(generator: Generator, template: str, *, forget: bool = False) -> list[tuple[str, int]]:
    """Three answers, each with the number of tokens that needed no reading."""
    chat = Chat(generator, ChatTemplate(generator.tokenizer, template, "Be kind."), GREEDY)
    answers = []
    for message in ("hi", "and then?", "why"):
        if forget:
            chat._cache = None
        answer, cost, reused = chat.reply(message)
        assert cost.prefill_tokens == answer.prompt_tokens - reused - 1
        answers.append((answer.text, reused))
    return answers


def test_a_kept_state_gives_the_answers_of_a_conversation_read_anew(plain):
    kept, anew = conversation(plain, TEMPLATE), conversation(plain, TEMPLATE, forget=True)
    assert [text for text, _ in kept] == [text for text, _ in anew]
    assert len({text for text, _ in kept}) == 3
    first = len("system: Be kind.\nuser: hi\nassistant: ") + 2  # and two turns' ends
    assert [reused for _, reused in kept][:2] == [0, first + 9]  # 10 new tokens; the last is not read yet
    assert kept[2][1] > kept[1][1] and [reused for _, reused in anew] == [0, 0, 0]


def test_the_state_is_not_kept_where_the_conversation_reads_otherwise(plain):
    answers = conversation(plain, LOUD)
    assert answers == conversation(plain, LOUD, forget=True)
    assert any(text != text.upper() for text, _ in answers)


def test_an_answer_is_the_continuation_of_the_rendered_conversation(plain):
    chat = Chat(plain, ChatTemplate(plain.tokenizer, TEMPLATE), GREEDY)
    first, _, _ = chat.reply("hi")
    second, _, _ = chat.reply("you")
    text = f"user: hi<turn>\nassistant: {first.text}<turn>\nuser: you<turn>\nassistant: "
    ((alone,), _) = next(plain.generate([text], GREEDY))
    assert alone.text == second.text and alone.prompt_tokens == second.prompt_tokens
    chat.reset()
    assert chat.reply("hi")[0] == first


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(plain):
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    chat = Chat(plain, ChatTemplate(plain.tokenizer, TEMPLATE), GREEDY)
    chat.reply("hi")
    with pytest.raises(KeyboardInterrupt):
        chat.reply("stop me", show=interrupt)
    found = chat.reply("you")[0]
    fresh = Chat(plain, ChatTemplate(plain.tokenizer, TEMPLATE), GREEDY)
    fresh.reply("hi")
    assert found == fresh.reply("you")[0]


def test_the_end_of_a_turn_is_read_from_the_template():
    tokenizer = byte_tokenizer()
    template = ChatTemplate(tokenizer, TEMPLATE)
    assert (template.end_ids, template.stop) == ({tokenizer.convert_tokens_to_ids(TURN): "eos"}, [])
    in_words = ChatTemplate(tokenizer, TEMPLATE.replace("<turn>", " ###"))
    assert (in_words.end_ids, in_words.stop) == ({}, ["###"])
    without = ChatTemplate(tokenizer, TEMPLATE.replace("<turn>", ""))
    assert (without.end_ids, without.stop) == ({}, [])
    tokenizer.chat_template = TEMPLATE
    assert ChatTemplate(tokenizer, None, "S").text([{"role": "user", "content": "x"}], answer=True) == (
        "system: S<turn>\nuser: x<turn>\nassistant: "
    )


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "chat=true: this tokenizer has no chat template; set chat_template=<file.jinja>"),
        ("{% for m in messages %}{{ m.content", None, "chat_template: the template cannot show"),
        ("{{ messages[0].content }}", None, "chat_template: it leaves out what the assistant said"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            + TEMPLATE,
            "Be kind.",
            "chat_template: .*no system role.*leave `system` out",
        ),
    ],
)
def test_templates_that_cannot_show_a_conversation_are_refused(template, system, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(byte_tokenizer(), template, system)


# --- requests and folders -----------------------------------------------------------------------------------


def request(*overrides: str) -> DictConfig:
    """The config of generate.py."""
    with initialize_config_dir(version_base="1.3", config_dir=str(runs.REPOSITORY / "conf")):
        return compose("generate", overrides=["model=none", "paths.run_folder=/nowhere", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "prompt, prompts: give one of the two.*neither is given"),
        (("prompt=a", "prompts=b.txt"), "prompt, prompts: give one of the two.*both are given"),
        (("prompt=a", "chat=true"), "prompt= has no effect with chat=true"),
        (("prompts=a", "chat=true"), "prompts= has no effect with chat=true"),
        (("prompt=a", "system=b"), "system= has no effect without chat=true"),
        (("prompt=a", "chat_template=b"), "chat_template= has no effect without chat=true"),
        (("chat=true", "samples=2"), "samples=2 has no effect with chat=true"),
        (("prompts=a", "stream=true"), "stream=true shows one text"),
        (("prompt=a", "stream=true", "samples=2"), "stream=true shows one text"),
        (("prompt=a", "device=tpu"), "device='tpu' is unknown"),
        (("prompt=a", "dtype=int8"), "dtype='int8' is unknown"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_request(request(*overrides))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: torch finds no GPU"):
        check_request(request("prompt=a", "device=cuda"))


def test_prompt_files(tmp_path):
    lines, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_bytes("\ufefffirst \r\n\n  é🙂\u2028x\n".encode())
    assert read_prompts(None, str(lines)) == ["first ", "  é🙂\u2028x"]
    records.write_text('{"prompt": "two\\nlines", "id": 3}\n\n{"prompt": "b"}\n')
    assert read_prompts(None, str(records)) == ["two\nlines", "b"]
    assert read_prompts("one", None) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "prompts=.*a.txt is empty"),
        ("a.txt", b" \n\n", "prompts=.*a.txt is empty"),
        ("a.txt", b"na\xefve", "prompts=.*a.txt is no UTF-8 text"),
        ("a.jsonl", b"\n", "prompts=.*a.jsonl is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no text in a field `prompt`"),
        ("a.jsonl", b'{"prompt": ""}', "line 1 has no text"),
        ("a.jsonl", b'["a"]', "line 1 has no text"),
        ("a.jsonl", b"\nhello", "line 2 is no JSON"),
        (None, b"", "there is no such file"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(None, str(tmp_path / (name or "none.txt")))


def test_what_is_no_prompt_is_refused():
    for prompt in ("", 42):
        with pytest.raises(ValueError, match=f"prompt={prompt!r} must be a text"):
            read_prompts(prompt, None)
    with pytest.raises(ValueError, match="chat_template=nowhere.jinja: there is no such file"):
        read_template("nowhere.jinja")


def saved_student(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int = VOCABULARY) -> Path:
    """A run folder with a hybrid student in it."""
    config = student_config((1,))
    model, _ = convert(tiny_teacher(vocab_size=vocabulary), config)
    student = Student(model, ["rwkv7", "attention", "rwkv7"], config)
    save_student(folder / "student", student, tokenizer, stage="distill")
    return folder


def test_folders_without_a_fitting_tokenizer_are_refused(tmp_path):
    large = saved_student(tmp_path / "large", byte_tokenizer(), vocabulary=200) / "student"
    with pytest.raises(ValueError, match="model: the tokenizer of .* has 25. tokens, the model embeds 200"):
        folder_tokenizer(large)
    (large / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="model: config.json or tokenizer of .* cannot be read"):
        folder_tokenizer(large)
    (large / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="model: .*student has no tokenizer"):
        folder_tokenizer(large)


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(folder)
    tiny_teacher(vocab_size=VOCABULARY).config.save_pretrained(folder)
    assert folder_tokenizer(folder).encode("a") == byte_tokenizer().encode("a")
    with pytest.raises(ValueError, match="model: the weights of .*model cannot be loaded"):
        placed_model(folder, attention="sdpa", device="cpu", dtype="float32")


def test_only_weights_change_their_type(tmp_path):
    folder = saved_student(tmp_path, byte_tokenizer()) / "student"
    options = {"attention": "sdpa", "device": "cpu"}
    exact = placed_model(folder, dtype="float32", **options)
    rough = placed_model(folder, dtype="bfloat16", **options)
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
    frequencies = [model.model.rotary_emb.inv_freq for model in (exact, rough)]
    assert torch.equal(*frequencies) and frequencies[1].dtype == torch.float32
    ids = torch.tensor([byte_tokenizer().encode(PROMPTS[2])])
    wanted, found = exact(ids).logits, rough(ids).logits.float()
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    ((text,), cost) = next(Generator(rough, byte_tokenizer()).generate(["hello"], GREEDY))
    assert len(text.ids) == 10 and cost.state_bytes > 0


# --- the script ---------------------------------------------------------------------------------------------


def generated(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def test_the_script_continues_a_file_of_prompts(tmp_path, capsys):
    run = saved_student(tmp_path / "run", byte_tokenizer())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    keys = [f"model={run}", f"prompts={prompts}", f"paths.run_folder={tmp_path}", "max_new_tokens=9"]
    generate.main(request(*keys, "temperature=0.8", "samples=2", "batch_size=3", "seed=5"))
    found, shown = generated(tmp_path), capsys.readouterr().out
    model = placed_model(run / "student", attention="sdpa", device="cpu", dtype="float32")
    options = GenerationOptions(max_new_tokens=9, temperature=0.8, samples=2, seed=5)
    ((wanted, cost),) = Generator(model, byte_tokenizer()).generate(PROMPTS, options)
    assert found == [text.facts() for text in wanted]
    assert set(found[0]) == {"prompt", "text", "tokens", "finish_reason", "prompt_tokens"}
    assert [line["prompt"] for line in found] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(f"--- {text.prompt}\n{text.text}\n" in shown for text in wanted)
    lines = shown.rstrip().split("\n")[-3:]
    assert lines[0].startswith(f"prefill: {cost.prefill_tokens} tokens in ") and "tokens/s" in lines[0]
    assert lines[1].startswith("decode: 72 tokens in ") and "tokens/s" in lines[1]
    assert lines[2].startswith("state: ") and lines[2].endswith("bytes per row, grows by 256 bytes per token")


def test_the_script_streams_what_it_writes(tmp_path, capsys):
    run = saved_student(tmp_path / "run", byte_tokenizer())
    keys = [f"model={run}", "prompt=hello", f"paths.run_folder={tmp_path}", "max_new_tokens=9"]
    shown = []
    for stream in ("true", "false"):
        generate.main(request(*keys, f"stream={stream}"))
        shown.append(capsys.readouterr().out.rpartition("\nprefill")[0])
    assert shown[0] == shown[1] == generated(tmp_path)[0]["text"] + "\n"


def test_the_script_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        generate.main(request("prompt=a", "temperature=-1"))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: temperature=-1 must be") and error.count("\n") == 1


def test_talking_over_standard_input(tmp_path, capsys, monkeypatch):
    run, template = saved_student(tmp_path / "run", byte_tokenizer()), tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    keys = [f"model={run}", "chat=true", f"chat_template={template}", f"paths.run_folder={tmp_path}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nyou\n/reset\nhi\n/exit\nnever\n"))
    generate.main(request(*keys, "max_new_tokens=9"))
    first, second, again = generated(tmp_path)
    assert [line["prompt"] for line in (first, second, again)] == ["hi", "you", "hi"]
    assert again == first and second["prompt_tokens"] > first["prompt_tokens"]
    shown = capsys.readouterr().out
    assert f"> {first['text']}\n[prefill: " in shown and "The conversation is forgotten." in shown
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))  # the input ends without /exit
    generate.main(request(*keys, "max_new_tokens=9"))
    assert generated(tmp_path) == [first]


def test_the_bundled_teacher_talks_from_the_command_line(tmp_path):
    keys = [
        "model=assets/tiny_qwen2",
        "chat=true",
        "system=s",
        "max_new_tokens=5",
        f"paths.outputs={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, "generate.py", *keys],
        cwd=runs.REPOSITORY,
        env=runs.environment(),
        input="import os\nagain\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("generate/*/generations.jsonl")
    assert [line["prompt"] for line in generated(file.parent)] == ["import os", "again"]
    assert done.stdout.count("[prefill: ") == 2 and "grows by 4,096 bytes per token" in done.stdout


def test_the_summary_says_whether_the_state_grows():
    cost = Cost(prefill_tokens=10, prefill_seconds=0.5, decode_tokens=3, decode_seconds=1.5, state_bytes=4096)
    told = generate.summary(cost).split("\n")
    assert told[:2] == ["prefill: 10 tokens in 0.50 s, 20 tokens/s", "decode: 3 tokens in 1.50 s, 2 tokens/s"]
    assert told[2] == "state: 4,096 bytes per row, one token shows no growth"
    cost.add(Cost(decode_tokens=1, decode_seconds=0.5, state_bytes=5000, growth=0.0))
    assert generate.summary(cost, "; ").endswith(
        "decode: 4 tokens in 2.00 s, 2 tokens/s; state: 5,000 bytes per row, does not grow"
    )
    assert generate.summary(Cost(growth=1024.0)).startswith("prefill: 0 tokens in 0.00 s\n")
