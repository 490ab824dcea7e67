"""Weights & Biases: one wandb run through a kill and a resume, tags, no secret, and nobody ever asked."""

import json
import os
from pathlib import Path

import pytest
import runs
import wandb_files
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf, open_dict

from callbacks import provenance
from callbacks.panels import PanelLogger
from callbacks.wandb_run import RunIdentity
from conf import launch
from pipeline.loggers import check_loggers, describe_run

SECRETS = {"SOME_SERVICE_TOKEN": "hush-hush-12345", "remote": "murmur-24680"}
WANDB = (
    "logger=wandb",
    "logger.wandb.offline=true",
    "logger.wandb.tags=[mine]",
    "callbacks.dashboard.every_steps=4",
    "stages=[align,select]",
    "evaluation.decoding_contexts=[]",
    "ckpt_path=auto",
)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The folder of a run that was killed in its first stage and then resumed, both times offline."""
    outputs, cache = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_SERVICE_TOKEN", SECRETS["SOME_SERVICE_TOKEN"])
        patch.setenv("GIT_CONFIG_COUNT", "1")
        patch.setenv("GIT_CONFIG_KEY_0", "remote.origin.url")
        patch.setenv("GIT_CONFIG_VALUE_0", f"https://someone:{SECRETS['remote']}@git.example.org/x.git")
        patch.delenv("WANDB_DATA_DIR", raising=False)
        runs.train_and_kill(outputs, cache, "align/step-6.ckpt", *WANDB)
        done = runs.train(outputs, cache, *WANDB)
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    return runs.run_folder(outputs)


@pytest.fixture(scope="module")
def attempts(resumed: Path) -> list[Path]:
    """The `.wandb` file of each attempt, in order."""
    return sorted(resumed.glob("wandb/offline-run-*/*.wandb"))


def test_a_resumed_run_is_the_same_wandb_run(resumed: Path, attempts: list[Path]):
    identity = json.loads((resumed / "wandb_run.json").read_text())["id"]
    assert [path.name for path in attempts] == [f"run-{identity}.wandb"] * 2
    started = [
        record.run for path in attempts for record in wandb_files.records(path) if record.HasField("run")
    ]
    assert [run.run_id for run in started] == [identity] * 2 and all(run.resume for run in started)
    assert list(started[0].tags) == ["mine"] and started[0].git.commit


def test_history_goes_on_where_it_was_and_repeats_nothing_with_another_value(attempts: list[Path]):
    first, second = (wandb_files.histories(path) for path in attempts)
    steps = [row["_step"] for row in [*first, *second]]
    assert steps == sorted(set(steps))
    before, after = (
        {row["trainer/tokens"]: row["losses/align/total"] for row in rows if "losses/align/total" in row}
        for rows in (first, second)
    )
    assert before and set(before) <= {512 * step for step in range(1, 11)}
    assert set(after) >= {512 * step for step in range(6, 11)}, "from the step of the checkpoint on"
    repeated = before.keys() & after.keys()
    assert {tokens: before[tokens] for tokens in repeated} == {tokens: after[tokens] for tokens in repeated}


def test_held_out_results_and_charts_of_every_stage(resumed: Path, attempts: list[Path]):
    rows, stages = wandb_files.histories(attempts[-1]), runs.summary(resumed)["stages"]
    held_out = [(row["trainer/tokens"], row["held_out/loss"]) for row in rows if "held_out/loss" in row]
    assert held_out == [
        (tokens, stage["loss"]) for tokens, stage in zip((0, 5120, 5120), stages, strict=True)
    ]
    names = {name for row in rows for name in row}
    charts = {"loss", "loss_by_position", "kl_by_position", "layer_scores"}
    assert {f"charts/{name}_table" for name in charts} <= names
    assert {
        "alignment/align/layer_0",
        "alignment/align/heat_map",
        "samples/align",
        "held_out/stages",
    } <= names
    files = attempts[-1].parent / "files" / "media"
    assert len(list(files.glob("images/alignment/align/heat_map_*.png"))) == 2  # at steps 8 and 10
    summary = wandb_files.summary(attempts[-1])
    for name in ("loss", "kl", "gap_recovered", "copy_gain"):
        assert summary[f"held_out/{name}"] == stages[-1][name]
        assert summary[f"held_out/align/{name}"] == stages[1][name]
    assert summary["teacher/loss"] == runs.summary(resumed)["teacher"]["loss"]
    assert summary["student/layer_plan"].split().count("attention") == 1


def test_provenance_is_complete_and_holds_no_secret(resumed: Path, attempts: list[Path]):
    for path in attempts:
        ((name, files),) = wandb_files.artifacts(path, "provenance").items()
        assert name.startswith("provenance-")
        assert set(files) == {"config.yaml", "environment.json", "transfer.csv"}
        assert all(path.parent in file.parents for file in files.values()), "the offline folder is complete"
    assert files["transfer.csv"].read_text() == (resumed / "transfer.csv").read_text()
    environment = json.loads(files["environment.json"].read_text())
    assert environment["git"]["remote"] == "https://git.example.org/x.git"
    assert OmegaConf.load(files["config.yaml"]).stages == ["align", "select"]
    config = wandb_files.config(attempts[-1])
    assert config["stage"]["align"]["tokens"] == 5120
    for file in (path for path in resumed.rglob("*") if path.is_file()):
        content = file.read_bytes()
        assert not [secret for secret in SECRETS.values() if secret.encode() in content], file
    tables = [path for attempt in attempts for path in wandb_files.artifacts(attempt, "run_table").values()]
    assert tables and all(resumed in file.parents for table in tables for file in table.values())


@pytest.fixture
def offline(monkeypatch):
    """No key, no network, and a wandb that starts anew before and after the test."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_DATA_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def test_an_unreachable_server_stops_nothing(offline, tmp_path, caplog):
    import wandb

    offline.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    offline.setenv("WANDB_API_KEY", "a" * 40)
    logger = PanelLogger(run_folder=tmp_path, init_timeout_s=1)
    logger.check()
    with pytest.raises(RuntimeError, match="of the run itself"), logger.running():
        assert "kept offline" in caplog.text
        logger.log_metrics({"align/loss": 1.5}, step=0)
        raise RuntimeError("of the run itself")
    assert "WANDB_DATA_DIR" not in os.environ
    wandb.teardown()  # waits until everything is in the file
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["losses/align/loss"] for row in wandb_files.histories(path)] == [1.5]
    assert [r.exit.exit_code for r in wandb_files.records(path) if r.HasField("exit")] == [1]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"a" * 40 in file.read_bytes()]


def test_without_a_key_nobody_is_asked(offline, tmp_path):
    offline.setenv("NETRC", str(tmp_path / "netrc"))
    offline.setattr("builtins.input", lambda *arguments: pytest.fail("asked for a key"))
    config = small_config("logger=wandb")
    with pytest.raises(ValueError, match=r"logger\.wandb: no API key.*logger\.wandb\.offline=true"):
        check_loggers(config)
    check_loggers(small_config("logger=wandb", "logger.wandb.offline=true"))
    offline.setenv("WANDB_MODE", "offline")
    check_loggers(config)


def small_config(*overrides: str, sweep: str | None = None):
    """The quickstart's config; with `sweep` as a job of the sweep in that folder."""
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(runs.REPOSITORY / "conf")):
        given = ["experiment=quickstart", "paths.run_folder=/nowhere", *overrides]
        config = compose("train", overrides=given, return_hydra_config=True)
    with open_dict(config):
        config.hydra.mode = "MULTIRUN" if sweep else "RUN"
        config.hydra.sweep.dir = sweep or "unused"
        config.hydra.runtime.output_dir = "/nowhere"
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


@pytest.fixture
def hydra_config():
    yield
    HydraConfig.instance().cfg = None


def test_tags_and_group_come_from_the_config(hydra_config):
    alone = describe_run(small_config(), Path("outputs/quickstart/now"))
    assert alone["tags"] == ["tiny_qwen2", "rwkv7", "quickstart", "align", "select", "distill"]
    assert (alone["name"], alone["group"], alone["job_type"]) == ("quickstart now", None, "train")
    config = small_config("student=rwkv7_arwkv", "stages=[distill]", sweep="outputs/sweeps/quickstart/then")
    swept = describe_run(config, Path("outputs/sweeps/quickstart/then/0"))
    assert swept["tags"] == ["tiny_qwen2", "rwkv7_arwkv", "quickstart", "distill"]
    assert (swept["group"], swept["job_type"]) == ("quickstart/then", "sweep")
    continued = describe_run(small_config("init_from=/elsewhere"), Path("x"))
    assert "rwkv7" not in continued["tags"], "the student of another run is not the one of the config"


def test_what_the_user_says_wins(tmp_path):
    logger = PanelLogger(run_folder=tmp_path, offline=True, tags=[], group="mine")
    logger.describe(tags=["a"], group="b", name="c")
    assert (logger._options["tags"], logger._options["group"], logger._options["name"]) == ([], "mine", "c")
    with pytest.raises(ValueError, match=r"logger\.wandb\.tags.*\[word\]"):
        PanelLogger(run_folder=tmp_path, tags="word")
    with pytest.raises(ValueError, match=r"logger\.wandb\.finish_timeout_s=0"):
        PanelLogger(run_folder=tmp_path, finish_timeout_s=0)


def test_other_ranks_do_not_talk_to_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setenv("WANDB_MODE", "online")
    logger = PanelLogger(run_folder=tmp_path)
    logger.check()
    with logger.running():
        logger.log_metrics({"align/loss": 1.0}, step=0)
        logger.experiment.log({"anything": 1})
    assert not list(tmp_path.iterdir())


def test_steps_go_on_after_a_kill(tmp_path):
    first = RunIdentity(tmp_path)
    assert [first.take_step() for _ in range(3)] == [0, 1, 2]
    second = RunIdentity(tmp_path)
    assert second.id == first.id and second.take_step() == 3
    assert RunIdentity(tmp_path / "other").id != first.id


def test_secrets_in_configs_are_hidden(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "hf_abcdefgh12345")
    config = {
        "teacher": {"hub_token": "x1", "path": "https://user:pass@host/model", "eos_token": "</s>"},
        "mixers": [{"written_key": "unit"}, "hf_abcdefgh12345"],
        "password": None,
        "tokens": 10,
    }
    assert provenance.hide_secrets_in(config) == {
        "teacher": {"hub_token": "***", "path": "https://***@host/model", "eos_token": "</s>"},
        "mixers": [{"written_key": "unit"}, "***"],
        "password": None,
        "tokens": 10,
    }
    command = ["train.py", "student.mixers.rwkv7.written_key=raw", "+hub.token=x2", "--key", "x3"]
    assert provenance.hide_secrets(command) == [*command[:2], "+hub.token=***", "--key", "***"]
