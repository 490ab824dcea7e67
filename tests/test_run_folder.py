"""The folder of a run: which one goes on, and what keeps it from going on."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoint import facts_path, newest_checkpoint, publish
from conf.outputs import CheckOutputs
from conf.ranks import ProcessFailed, processes
from conf.run_folder import occupied, run_folder, save_config
from reports.journal import Journal


def config(**changes: object) -> DictConfig:
    """The part of a run's config that a resume looks at."""
    stage = {"align": {"tokens": 100, "data": {"rows_per_device": 2}}, "distill": {"tokens": 7}}
    trainer = {"devices": 2, "num_nodes": 1, "precision": "32-true"}
    parts = {"stages": ["align"], "stage": stage, "trainer": trainer, "dry_run": False, "seed": 1}
    made = OmegaConf.create(parts)
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


def test_a_resumed_run_names_the_keys_that_differ(tmp_path: Path):
    save_config(config(), tmp_path)
    with pytest.raises(ValueError, match=r"these keys differ: seed, stage\.align\.tokens\. Give"):
        save_config(config(seed=2, stage__align__tokens=200), tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml").seed == 1


def test_what_changes_no_result_may_differ(tmp_path: Path):
    save_config(config(), tmp_path)
    save_config(config(stage__distill__tokens=8, evaluation={"decoding_contexts": []}), tmp_path)
    fewer = config(trainer__devices=1, stage__align__data__rows_per_device=4)
    save_config(fewer, tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.devices == 1
    with pytest.raises(ValueError, match=r"differ: stage\.align\.data\.rows_per_device\."):
        save_config(config(trainer__devices=1), tmp_path)


@pytest.mark.parametrize("text", ["", "seed: [1", "- 3\n"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged .* init_from="):
        save_config(config(), tmp_path)


def test_a_full_disk_leaves_the_config_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_config(config(), tmp_path)
    before = (tmp_path / "config.yaml").read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        save_config(config(trainer__precision="bf16-mixed"), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before


def test_auto_takes_the_newest_run_that_has_begun_and_not_ended(tmp_path: Path):
    for name, dry in (("1", False), ("2", False), ("3", False), ("4", True)):
        save_config(config(dry_run=dry), tmp_path / "a" / name)
    (tmp_path / "a" / "3" / "summary.json").touch()
    assert run_folder(str(tmp_path), "a", "auto") == str(tmp_path / "a" / "2")
    assert Path(run_folder(str(tmp_path), "b", "auto")).parent == tmp_path / "b"


def test_a_folder_has_one_run_at_a_time(tmp_path: Path):
    with occupied(tmp_path):
        with pytest.raises(ValueError, match="another run is writing"), occupied(tmp_path):
            pass
    (tmp_path / "summary.json").touch()
    with pytest.raises(ValueError, match="is finished"), occupied(tmp_path):
        pass


def test_a_damaged_journal_is_named(tmp_path: Path):
    Journal(tmp_path).note(teacher={"loss": 1.0})
    path = tmp_path / "journal.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"journal\.json is damaged .* init_from="):
        Journal(tmp_path)


@pytest.mark.parametrize("facts", [b"\xff\xfe", b"", b"{}", b"[]", b"null"])
def test_a_checkpoint_with_damaged_facts_is_passed_over(tmp_path: Path, facts: bytes):
    for step in (2, 4):
        unfinished = tmp_path / f"step-{step}.writing"
        unfinished.write_bytes(bytes(step))
        publish(unfinished, tmp_path / f"step-{step}.ckpt", {})
    assert newest_checkpoint(tmp_path) == tmp_path / "step-4.ckpt"
    facts_path(tmp_path / "step-4.ckpt").write_bytes(facts)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2.ckpt"


def test_a_lost_process_is_said_in_a_line(tmp_path: Path):
    settings = OmegaConf.create(
        {
            "strategy": {"name": "ddp"},
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu"},
            "dry_run": False,
        }
    )
    with pytest.raises(ProcessFailed, match="ckpt_path=auto"), processes(settings, tmp_path):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="out of memory"), processes(settings, tmp_path):
        raise RuntimeError("out of memory")


def test_outputs_without_a_place_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    CheckOutputs().on_run_start(OmegaConf.create({"paths": {"outputs": str(tmp_path / "new" / "folder")}}))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        CheckOutputs().on_multirun_start(OmegaConf.create({"paths": {"outputs": str(tmp_path / "file")}}))
    assert caught.value.code == 2
    assert "paths.outputs=" in capsys.readouterr().err
