"""Every family of teachers on disk: as it comes, as a student, exported."""

import pytest
import torch
from exported import assert_close, exported_class, written
from mixer_checks import NoTokenizer
from tiny import PARENTS, convert, random_ids, student_config, tiny_student, tiny_teacher
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from models.conversion import check_plan
from models.hf.export import export_config
from models.hf.modeling import TransmuteForCausalLM
from models.student_folder import Student, load_student, save_student
from models.teacher import TeacherConfig, load_hf_config, load_teacher

EXPORTED = ("gemma2", "gemma3_text", "glm4", "mistral", "olmo2", "phi3", "qwen3_moe", "smollm3")


@torch.no_grad()
@pytest.mark.parametrize("parent", PARENTS)
def test_a_saved_student_and_its_export_come_back(parent, tmp_path):
    """Bit for bit; the exported model has the parent's masks, caps and scales as well."""
    teacher, config, ids = tiny_teacher(parent), student_config((0, 1)), random_ids(2, 20)
    student = Student(tiny_student(teacher, (0, 1)), ["attention", "attention", "rwkv7"], config)
    save_student(tmp_path / "student", student, NoTokenizer())
    loaded = load_student(tmp_path / "student")
    wanted = student.model(ids).logits
    assert torch.equal(loaded.model.eval()(ids).logits, wanted)
    exported = TransmuteForCausalLM(export_config(student)).eval()
    exported.load_state_dict(student.model.state_dict())
    assert torch.equal(exported(ids).logits, wanted)


@torch.no_grad()
def test_a_teacher_in_16_bits_makes_the_student_that_is_loaded_again(tmp_path):
    """Its embeddings' factor is rounded there; the student's is that of its config."""
    tiny_teacher("gemma2").save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "teacher"), dtype="bfloat16"))
    rounded = teacher.get_input_embeddings()
    assert float(rounded.embed_scale) != pytest.approx(rounded.scalar_embed_scale, rel=1e-4)
    student, _ = convert(teacher, student_config((0, 1)))
    ids = random_ids(1, 9)
    parts = Student(student.eval(), ["attention", "attention", "rwkv7"], student_config((0, 1)))
    save_student(tmp_path / "student", parts, NoTokenizer())
    loaded = load_student(tmp_path / "student").model.eval()
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@torch.no_grad()
def test_capped_scores_are_never_left_to_sdpa(tmp_path):
    teacher, ids = tiny_teacher("gemma2"), random_ids(1, 12)
    wanted = teacher(ids).logits
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(TeacherConfig(path=str(tmp_path)))
    assert loaded.config._attn_implementation == "eager" and torch.equal(loaded(ids).logits, wanted)
    loaded.set_attn_implementation("sdpa")
    assert (loaded(ids).logits - wanted).abs().max() > 1e-3, "sdpa knows caps now: keep_score_caps may go"


@torch.no_grad()
@pytest.mark.parametrize("parent", EXPORTED)
def test_an_export_gives_the_students_logits(parent, tmp_path):
    """A hybrid with a layer of each kind, on rows with padding on the left and in its own words."""
    config, plan = student_config((0, 1)), ["attention", "attention", "rwkv7"]
    student = Student(tiny_student(tiny_teacher(parent), (0, 1)), plan, config)
    folder = written(tmp_path / parent, student)
    exported = exported_class(folder).from_pretrained(folder).eval()
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :9] = 0
    found, wanted = (
        model(ids, attention_mask=mask).logits[mask.bool()] for model in (exported, student.model)
    )
    assert_close(found, wanted)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found, wanted = (
        model.generate(ids, attention_mask=mask, **options) for model in (exported, student.model)
    )
    assert found.tolist() == wanted.tolist()
    assert torch.equal(load_student(folder).model.eval()(ids).logits, student.model(ids).logits)


@torch.no_grad()
def test_a_student_with_all_attention_is_still_a_folder_of_its_family(tmp_path):
    """Experts are written as modules hold them; transformers reads that as well."""
    config, ids = student_config((0, 1, 2)), random_ids(1, 9)
    student = Student(tiny_student(tiny_teacher("qwen3_moe"), (0, 1, 2)), ["attention"] * 3, config)
    save_student(tmp_path / "student", student, NoTokenizer())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(plain(ids).logits, student.model(ids).logits)


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@torch.no_grad()
def test_the_language_model_of_a_larger_one_is_taken_as_the_refusal_says(tmp_path):
    text = tiny_teacher("gemma3_text").config.to_dict()
    images = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=VISION | images, mm_tokens_per_image=4)
    whole, ids = Gemma3ForConditionalGeneration(config).eval(), random_ids(1, 9)
    with pytest.raises(ValueError, match="'gemma3' reads more than text.*'gemma3_text'"):
        check_plan(student_config(), config)
    alone = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path)
    named = TeacherConfig(path=str(tmp_path))
    assert check_plan(student_config(), load_hf_config(named)) == ["rwkv7"] * 3
    assert torch.equal(load_teacher(named)(ids).logits, whole(ids).logits)
