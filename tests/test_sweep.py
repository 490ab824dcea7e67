"""Sweeps: the number a trial hands over, failed trials, the study that goes on, table, picture, launchers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sweeps import MIXERS, summary, write_trial

from conf import launch
from pipeline import study, sweep
from reports.metric_key import expected, find, higher_is_better
from reports.sweep_trials import FAILURE_FILE

CONF = str(runs.REPOSITORY / "conf")
QUICK = (
    "stages=[align]",
    "stage.align.tokens=1024",
    "callbacks.text_samples=null",
    "evaluation.decoding_contexts=[]",
    "data.validation_rows=2",
    "data.copy_rows=2",
)


@pytest.fixture
def composed():
    """Composes train.yaml as the sweep's own process does, Hydra's part included."""
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=CONF):

        def make(*overrides: str, hydra: dict | None = None):
            config = compose("train", overrides=list(overrides), return_hydra_config=True)
            for key, value in (hydra or {}).items():
                OmegaConf.update(config, f"hydra.{key}", value, merge=False, force_add=True)
            HydraConfig.instance().set_config(config)
            return config

        yield make
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("stages.distill.kl", 0.2),
        ("stages.-1.loss", 3.0),
        ("stages.0.kl", 0.9),
        ("teacher.copy_gain", 1.8),
        ("student.state_bytes_per_row", 4096.0),
        ("seed", 1.0),
    ],
)
def test_a_metric_key_leads_to_its_number(key: str, number: float):
    assert find(summary(), key) == number


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("stages.distil.kl", ["distil", "align, distill", "index"]),
        ("stages.2.kl", ["no '2'"]),
        ("stages.-3.kl", ["no '-3'"]),
        ("stages.distill.klx", ["stages.distill has no 'klx'", "top1_agreement"]),
        ("stage.distill.kl", ["no 'stage'", "stages"]),
        ("stages.distill", ["is no number"]),
        ("student.layer_plan.0", ["is no number"]),
        ("seed.x", ["seed has no 'x'"]),
    ],
)
def test_a_wrong_metric_key_is_refused_with_what_there_is(key: str, words: list[str]):
    with pytest.raises(ValueError) as caught:
        find(summary(), key)
    assert all(word in str(caught.value) for word in [f"optimized_metric={key}", *words]), caught.value


def test_what_a_run_will_measure_is_known_beforehand():
    measured = expected(["align", "distill"], with_teacher=True, with_transfer=True)
    assert [stage["name"] for stage in measured["stages"]] == ["transfer", "align", "distill"]
    assert set(summary()["stages"][0]) <= set(measured["stages"][0])
    alone = expected(["pretrain"], with_teacher=False, with_transfer=False)
    assert find(alone, "stages.pretrain.loss") == 0
    with pytest.raises(ValueError, match="not measured"):
        find(alone, "teacher.loss")
    assert higher_is_better("stages.-1.copy_gain") and not higher_is_better("stages.-1.kl")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optimized_metric=stages.align.kl", "stages=[distill]"],
            ["stages has no 'align'", "transfer, distill"],
        ),
        (["optimized_metric=stages.-1.los"], ["no 'los'", "loss"]),
        (["ckpt_path=auto"], ["ckpt_path", "every trial", "without -m"]),
        (["ckpt_path=a,b"], ["ckpt_path", "every trial"]),
        (["stage.select.keep=1,2"], ["stage.select.keep", "no effect"]),
        (["hparams_search=optuna", "stages=[align]"], [MIXERS, "no effect", "distill"]),
        (["hparams_search=optuna", "optimized_metric=null"], ["optimized_metric", "stages.-1.kl"]),
        (["hparams_search=optuna", "dry_run=true"], ["dry_run=true", "needs results"]),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_its_first_trial(composed, capsys, overrides, words):
    config = composed(*(o for o in overrides if "," not in o), hydra={"overrides.task": overrides})
    with pytest.raises(SystemExit) as exit:
        sweep.SweepSummary("nowhere").on_multirun_start(config)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and all(word in message for word in words), message


def test_a_search_without_m_is_refused(composed, capsys):
    with pytest.raises(SystemExit):
        sweep.SweepSummary("nowhere").on_run_start(composed("hparams_search=optuna"))
    assert "-m" in capsys.readouterr().err
    sweep.SweepSummary("nowhere").on_run_start(composed("hparams_search=optuna", "ckpt_path=somewhere"))
    sweep.SweepSummary("nowhere").on_run_start(composed())


def test_the_sweeper_gets_a_finite_number_or_nothing(composed, tmp_path: Path):
    config = composed("optimized_metric=stages.-1.kl", f"paths.run_folder={tmp_path}")
    for kl, value in ((0.25, 0.25), (float("nan"), None), (float("inf"), None)):
        (tmp_path / "summary.json").write_text(json.dumps(summary(kl=kl)))
        assert sweep.optimized_value(config) == value
    (tmp_path / "summary.json").write_text(json.dumps(summary(kl=None)))
    with pytest.raises(ValueError, match="stages.-1.kl is no number"):
        sweep.optimized_value(config)
    config.optimized_metric = None
    assert sweep.optimized_value(config) is None


def test_the_exit_code_is_that_of_this_commands_trials(composed, tmp_path: Path):
    failed = write_trial(tmp_path / "monday" / "0", "seed=1")
    (failed / FAILURE_FILE).write_text("no memory\n")
    write_trial(tmp_path / "tuesday" / "0", "seed=2", result=summary())
    sweep.SweepSummary(str(tmp_path)).on_multirun_end(composed(f"hydra.sweep.dir={tmp_path}/tuesday"))
    assert "monday/0,failed" in (tmp_path / "sweep.csv").read_text()
    with pytest.raises(SystemExit) as exit:
        sweep.SweepSummary(str(tmp_path)).on_multirun_end(composed(f"hydra.sweep.dir={tmp_path}/monday"))
    assert exit.value.code == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("seed=-1 is wrong."), "seed=-1 is wrong."),
        (RuntimeError("no memory"), "RuntimeError: no memory"),
    ],
)
def test_an_error_fails_the_trial_and_not_the_sweep(composed, tmp_path: Path, error: Exception, text: str):
    def main(config):
        raise error

    trial = {"mode": RunMode.MULTIRUN, "runtime.output_dir": str(tmp_path / "0")}
    config = composed(hydra=trial)
    assert launch.plain_errors(main)(config) is None
    assert (tmp_path / "0" / FAILURE_FILE).read_text() == f"{text}\n"
    # Without the callback nobody would tell of the failure; outside a sweep it ends the command.
    for change in ({"callbacks": {}}, {"mode": RunMode.RUN}):
        config = composed(hydra=trial | change)
        with pytest.raises((SystemExit, RuntimeError)):
            launch.plain_errors(main)(config)


def test_a_study_refuses_trials_that_cannot_be_compared(composed, tmp_path: Path):
    common = ("hparams_search=optuna", f"paths.outputs={tmp_path}", "name=x")
    study.prepare_study(composed(*common))
    assert (tmp_path / "sweeps/x/optuna/study.db").exists()
    study.prepare_study(composed(*common, "trainer.threads=1", "hydra.sweeper.n_trials=7"))
    for other, key in (
        ("stage.distill.tokens=9999", "stage"),
        ("optimized_metric=stages.-1.loss", "optimized_metric"),
        ("hydra.sweeper.direction=maximize", "hydra.sweeper.direction"),
    ):
        with pytest.raises(ValueError, match=f"study_name=optuna.*differ: {key}\\."):
            study.prepare_study(composed(*common, other))
    study.prepare_study(composed(*common, "stage.distill.tokens=9999", "hydra.sweeper.study_name=other"))


def test_the_slurm_preset_asks_for_what_it_says(composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, body in (
        ("srun", "exit 0"),
        ("sbatch", f'cp "${{@: -1}}" {tmp_path}/script; echo a stand-in >&2; exit 1'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ("hydra.launcher.partition=fast", "hydra.launcher.timeout_min=30", "hydra.launcher.mem_gb=9")
    config = composed(
        "hydra/launcher=slurm",
        "strategy=fsdp",
        "trainer.devices=4",
        f"hydra.sweep.dir={tmp_path}/sweep",
        *options,
    )
    launcher = instantiate(config.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=None, config=config)
    with pytest.raises(Exception, match="a stand-in"):
        launcher.launch([["seed=1"], ["seed=2"]], initial_job_idx=0)
    script = (tmp_path / "script").read_text()
    for option in ("partition=fast", "time=30", "mem=9GB", "gpus-per-node=4", "nodes=1", "ntasks-per-node=1"):
        assert f"#SBATCH --{option}\n" in script, script
    assert "#SBATCH --array=0-1%2\n" in script


SCRIPT = """
import os, sys
import hydra
sys.path.insert(0, {root!r})
from conf import launch

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="train")
@launch.plain_errors
def main(config):
    print("threads", os.environ.get("OMP_NUM_THREADS"), "process", os.getpid(), flush=True)
    if config.seed == 1:
        raise RuntimeError("one fails")

if __name__ == "__main__":
    launch.register_resolvers()
    main()
"""


def test_parallel_trials_share_the_processors(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(runs.REPOSITORY), conf=CONF))
    environment = {key: value for key, value in runs.environment().items() if key != "OMP_NUM_THREADS"}
    options = ("-m", "hydra/launcher=local_parallel", "seed=1,2", f"paths.outputs={tmp_path}")
    options = {"args": [sys.executable, str(script), *options], "env": environment, "cwd": runs.REPOSITORY}
    done = subprocess.run(**options, capture_output=True, text=True, timeout=120)
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("threads")]
    assert len(said) == 2 and len({words[3] for words in said}) == 2, done.stdout + done.stderr
    assert all(int(words[1]) == max((os.cpu_count() or 1) // 2, 1) for words in said)
    assert done.returncode == 1 and "trial 0 failed: RuntimeError: one fails" in done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_grid_goes_on_after_a_failed_trial(tmp_path: Path, cache: Path):
    done = runs.train(tmp_path, cache, "-m", *QUICK, "seed=-1,1")
    assert done.returncode == 1, done.stderr
    (folder,) = tmp_path.glob("sweeps/quickstart/*")
    failed, finished = list(csv.DictReader((folder / "sweep.csv").open()))
    assert failed["status"] == "failed" and "seed=-1" in failed["reason"] and finished["status"] == "finished"
    stage = runs.summary(folder / "1")["stages"][-1]
    for key in ("loss", "kl", "top1_agreement", "copy_gain"):
        assert float(finished[key]) == stage[key]
    assert (folder / "sweep.md").exists() and (folder / "sweep.png").exists()
    assert "Error: seed=-1" in done.stderr and "Traceback" not in done.stdout + done.stderr
    assert "2 trials: 1 failed, 1 finished." in done.stdout
    (folder / "sweep.csv").unlink()
    again = [sys.executable, "-m", "pipeline.sweep", str(folder)]
    subprocess.run(again, cwd=runs.REPOSITORY, check=True, capture_output=True)
    assert len(list(csv.DictReader((folder / "sweep.csv").open()))) == 2


def test_a_search_goes_on_with_its_study_and_survives_failures(tmp_path: Path, cache: Path):
    import optuna

    # With this seed the sampler draws -1 first and then 1; in the second command it begins again.
    search = (
        "hparams_search=optuna",
        "hydra.sweeper.params=null",
        "hydra.sweeper.sampler.seed=0",
        "seed=choice(1,-1)",
    )
    for n_trials in (2, 1):
        done = runs.train(tmp_path, cache, "-m", *QUICK, *search, f"hydra.sweeper.n_trials={n_trials}")
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
    (folder,) = tmp_path.glob("sweeps/quickstart/*")
    found = optuna.load_study(study_name="optuna", storage=f"sqlite:///{folder}/study.db").trials
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert len(found) == len(rows) == 3
    assert [trial.state.name for trial in found] == ["FAIL", "COMPLETE", "FAIL"]
    assert [row["status"] for row in rows] == ["failed", "finished", "failed"]
    assert [row["seed"] for row in rows] == ["-1", "1", "-1"]
    assert [trial.params["seed"] for trial in found] == [-1, 1, -1]
    kl = runs.summary(folder / rows[1]["trial"])["stages"][-1]["kl"]
    assert found[1].value == kl == float(rows[1]["stages.-1.kl"])


def test_the_presets_compose_together(composed):
    config = composed("hparams_search=optuna", "hydra/launcher=local_parallel", "hydra.launcher.n_jobs=3")
    assert config.hydra.sweeper.n_jobs == 3
    assert composed("hparams_search=optuna").hydra.sweeper.n_jobs == 1
    assert OmegaConf.select(composed(), "optimized_metric") is None
