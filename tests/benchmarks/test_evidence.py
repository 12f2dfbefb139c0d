from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import evidence
from benchmarks.harness import evidence_work
from benchmarks.harness.evidence_extend import Held
from benchmarks.harness.evidence_jobs import JobError, Processes, Unit, do_all
from benchmarks.harness.evidence_plan import (
    MAIN,
    SCALING,
    VARIANTS,
    ExamSize,
    chosen_variants,
    plain,
    training,
    with_overrides,
)
from benchmarks.harness.evidence_report import report
from benchmarks.harness.evidence_run import Settings, run
from benchmarks.harness.evidence_stats import Evidence
from stts_export.errors import InputError
from stts_export.training.checkpoint_answerer import open_checkpoint_answerer
from stts_export.training.config import (
    DataSettings,
    DevSettings,
    OptimSettings,
    StartSettings,
    TrainConfig,
)
from stts_export.training.evaluation import evaluate
from stts_export.training.exam import synthetic_exam
from stts_export.training.loop import train
from tests.training.small_runs import SHAPE, small_folder

STEPS = 3
CONFIG = TrainConfig(
    output="unused",
    save_every=1,
    data=DataSettings(batch_size=2, micro_batch=2, max_frames=3),
    dev=DevSettings(every=STEPS, clips=2),
    optim=OptimSettings(steps=STEPS, warmup_steps=1),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("base") / "step7", scorer=False)


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    return Settings(
        config=with_overrides(CONFIG, {"pruning.similarity_coefficient": 10.0}),
        config_name="configs/tiny.yaml",
        work=tmp_path / "work",
        seeds=(1, 2),
        variants=tuple(chosen_variants(["main", "unpruned", "refill-off"])),
        base=str(base),
        base_configs=(),
        exam=ExamSize(questions=6, clips=3),
        speed_repeats=1,
    )


class MadeUp:
    """Workers that only pretend, and write down what they were asked."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, bool]] = []
        self.worked: list[dict[str, Any]] = []
        self.stopped = False
        self.failing = ""
        self.last_step = STEPS
        self.windows = (27, 54)
        self.max_frames = 3

    def train(self, config: Path, run: Path, *, resume: bool, log: Path) -> None:
        name = run.parent.name
        if name == self.failing:
            raise JobError("ended with exit code 1", where=name)
        self.trained.append((name, resume))
        values = TrainConfig.from_file(config)
        write_step(run, self.last_step, values)

    def work(self, task: Mapping[str, Any], log: Path) -> dict[str, Any]:
        self.worked.append(dict(task))
        if task["kind"] == "examine":
            items = evidence_work.exam_of(task).items
            asked = [[question.type for question in item.questions] for item in items]
            count = sum(map(len, asked))
            kept, total = self.windows
            rows = [
                {
                    "prune_ratio": ratio,
                    "selector": name if ratio else "all windows",
                    "kept_windows": kept,
                    "total_windows": total,
                    "right": {"all": 1},
                    "marks": "1".ljust(count, "0"),
                }
                for ratio in task["ratios"]
                for name in (task["selectors"] if ratio else [""])
            ]
            known = {
                "chance": {"count": 0.25}, "max_frames": self.max_frames, "dtype": "float32",
            }  # fmt: skip
            return {"rows": rows, "asked": asked, **known}
        if task["kind"] == "speed":
            return {"repeats": 1, "frames": [3], "rows": []}
        return {"clips": 3}

    def stop(self) -> None:
        self.stopped = True


def write_step(run: Path, step: int, config: TrainConfig, *, state: bool = False) -> None:
    """What a training run leaves behind."""
    if state:
        (run / "state" / f"step{step}").mkdir(parents=True)
        return
    if config.start.checkpoint and not run.parent.name.startswith("base"):
        (run / f"step{step}").mkdir(parents=True)
    else:
        small_folder(run / f"step{step}", scorer=config.model.scorer)
    values = {
        "steps": step, "examples": 2 * step, "training_seconds": 60, "machine": "a machine",
        "dev_accuracy": {"prune_ratio": 0.5, "accuracy": 0.5}, "torch": "2",
        "seed": config.seed, "parameters": 9, "start": {"prune_at": 1},
    }  # fmt: skip
    (run / f"step{step}" / "training.json").write_text(json.dumps(values))


def _quiet(words: str) -> None:
    pass


def test_runs_and_examinations_are_done_once(settings: Settings):
    workers = MadeUp()
    first = run(settings, workers, "a command", _quiet)
    names = {f"{name}-seed{seed}" for name in ("main", "unpruned", "refill-off") for seed in (1, 2)}
    assert {name for name, _ in workers.trained} == names
    assert len(workers.trained) == len(names)
    asked = [task for task in workers.worked if task["kind"] == "examine"]
    frames = len({frames for frames, _ in SCALING})
    assert len(asked) == 2 * (1 + frames) + 2 + 2
    assert {task["refill"] for task in asked if "refill-off" in task["checkpoint"]} == {False}
    assert all(task["refill"] for task in asked if "refill-off" not in task["checkpoint"])
    again = MadeUp()
    assert run(settings, again, "a command", _quiet) == first
    assert (again.trained, again.worked) == ([], [])


def test_each_seed_has_runs_and_test_clips_of_its_own(settings: Settings):
    workers = MadeUp()
    results = run(settings, workers, "", _quiet)
    for task in workers.worked:
        if task["kind"] == "examine":
            assert f"-seed{task['seed']}/" in task["checkpoint"]
    exams = [evidence_work.exam_of(task) for task in workers.worked if task["kind"] == "clips"]
    first, second = ({item.seed for item in exam.items} for exam in exams)
    assert not first & second
    assert {exam.split for exam in exams} == {"test"}
    for name in ("main-seed1", "main-seed2"):
        config = TrainConfig.from_file(settings.work / name / "config.yaml")
        assert config.seed == int(name[-1])
        assert config.threads == 1
    assert set(results["exams"]) == {"1", "2"}


def test_other_questions_are_asked_anew_and_nothing_is_trained_again(settings: Settings):
    run(settings, MadeUp(), "", _quiet)
    workers = MadeUp()
    run(replace(settings, exam=ExamSize(questions=5, clips=3)), workers, "", _quiet)
    assert workers.trained == []
    kinds = {task["kind"] for task in workers.worked}
    assert kinds == {"clips", "examine", "speed"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim.weight_decay": 0.1}, "config.optim.weight_decay"),
        ({"dev.clips": 3, "log_every": 7}, "config.dev.clips, config.log_every"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    settings: Settings, change: dict[str, Any], named: str
):
    run(settings, MadeUp(), "", _quiet)
    workers = MadeUp()
    with pytest.raises(InputError, match=f"main-seed1: holds a run with another {named}"):
        run(replace(settings, config=with_overrides(settings.config, change)), workers, "", _quiet)
    assert workers.trained == []


def test_another_base_in_the_same_folder_is_refused(settings: Settings, tmp_path: Path):
    run(settings, MadeUp(), "", _quiet)
    other = small_folder(tmp_path / "other", scorer=False, changes={"vit_config.prune_at": 1})
    workers = MadeUp()
    with pytest.raises(InputError, match="holds a run with another base\n"):
        run(replace(settings, base=str(other)), workers, "", _quiet)
    assert workers.trained == []


def test_the_same_base_elsewhere_is_the_same(settings: Settings, tmp_path: Path):
    run(settings, MadeUp(), "", _quiet)
    moved = small_folder(tmp_path / "moved", scorer=False)
    workers = MadeUp()
    run(replace(settings, base=str(moved)), workers, "", _quiet)
    assert workers.trained == []


def test_a_folder_of_something_else_is_left_alone(settings: Settings):
    (settings.work / "main-seed2").mkdir(parents=True)
    (settings.work / "main-seed2" / "thesis.txt").touch()
    with pytest.raises(InputError, match="main-seed2: holds something else"):
        run(settings, MadeUp(), "", _quiet)
    assert (settings.work / "main-seed2" / "thesis.txt").exists()


def test_an_interrupted_training_goes_on_and_an_unsaved_one_begins_anew(settings: Settings):
    workers = MadeUp()
    workers.last_step = STEPS - 1
    with pytest.raises(JobError, match="main, seed 1: stopped before step 3"):
        run(settings, workers, "", _quiet)
    saved = settings.work / "main-seed1" / "run"
    write_step(saved, STEPS - 1, settings.config, state=True)
    unsaved = settings.work / "main-seed2" / "run"
    unsaved.mkdir(parents=True, exist_ok=True)
    (unsaved / "log.jsonl").touch()
    said: list[str] = []
    workers = MadeUp()
    run(settings, workers, "", said.append)
    assert ("main-seed1", True) in workers.trained
    assert ("main-seed2", False) in workers.trained
    assert not (unsaved / "log.jsonl").exists()
    assert any(line.startswith("main, seed 1: training from step 2 of 3") for line in said)
    assert said[-2].endswith("refill-off, seed 2: done; nothing left")


def test_a_run_that_fails_ends_everything(settings: Settings):
    workers = MadeUp()
    workers.failing = "main-seed2"
    with pytest.raises(JobError, match="exit code 1"):
        run(settings, workers, "", _quiet)
    assert workers.stopped
    assert [name for name, _ in workers.trained] in (
        ["main-seed1"],
        ["main-seed1", "unpruned-seed1"],
    )


def test_two_jobs_run_at_once():
    both = threading.Barrier(2, timeout=20)

    def meet() -> None:
        both.wait()

    units = [Unit(name, False, meet) for name in "ab"]
    said: list[str] = []
    do_all("runs", [*units, Unit("c", True, lambda: None)], 2, MadeUp(), said.append)
    assert said[0] == "runs: 1 of 3 are there already"
    assert said[-1].endswith("nothing left")


def test_a_base_with_a_scorer_is_refused(settings: Settings, tmp_path: Path):
    trained = small_folder(tmp_path / "trained")
    with pytest.raises(InputError, match="has a scorer already"):
        run(replace(settings, base=str(trained)), MadeUp(), "", _quiet)


def test_values_that_do_not_go_together_are_refused_before_any_work(settings: Settings):
    workers = MadeUp()
    variants = (VARIANTS[MAIN], replace(VARIANTS["aux-0"], overrides={"optim.steps": 0}))
    with pytest.raises(InputError, match=r"optim\.steps is 0"):
        run(replace(settings, variants=variants), workers, "", _quiet)
    assert (workers.trained, workers.worked) == ([], [])


def test_from_scratch_every_seed_has_its_own_base(settings: Settings):
    unpruned = with_overrides(CONFIG, {"pruning.full_share": 1.0, "dev.prune_ratio": 0.0})
    first = replace(unpruned, model=replace(SHAPE, scorer=False))
    second = with_overrides(CONFIG, {"start.checkpoint": "replaced", "pruning.selector": "random"})
    workers = MadeUp()
    start = StartSettings(checkpoint="replaced", fresh_scorer=True)
    fresh = replace(settings.config, start=start)
    both = replace(settings, config=fresh, base=None, base_configs=(first, second))
    results = run(both, workers, "", _quiet)
    trained = [name for name, _ in workers.trained][:4]
    assert trained == ["base1-seed1", "base2-seed1", "base1-seed2", "base2-seed2"]
    for seed in (1, 2):
        own = TrainConfig.from_file(settings.work / f"base2-seed{seed}" / "config.yaml")
        assert own.start.checkpoint.endswith(f"base1-seed{seed}/run/step{STEPS}")
        own = TrainConfig.from_file(settings.work / f"main-seed{seed}" / "config.yaml")
        assert own.start.checkpoint.endswith(f"base2-seed{seed}/run/step{STEPS}")
    assert results["base"]["from_scratch"]


def test_a_base_begins_from_scratch_and_goes_on(settings: Settings):
    going_on = with_overrides(CONFIG, {"start.checkpoint": "somewhere"})
    for configs in ((going_on,), (CONFIG, CONFIG)):
        with pytest.raises(InputError, match=r"start\.checkpoint of configuration"):
            run(replace(settings, base=None, base_configs=configs), MadeUp(), "", _quiet)


def test_a_variant_that_changes_nothing_is_not_run(settings: Settings):
    config = with_overrides(settings.config, {"pruning.similarity_coefficient": 0.5})
    variants = tuple(chosen_variants(["main", "aux-0", "aux-reference"]))
    workers = MadeUp()
    results = run(replace(settings, config=config, variants=variants), workers, "", _quiet)
    assert {run["variant"] for run in results["runs"]} == {"main", "aux-0"}
    assert results["same_as_main"] == ["aux-reference"]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_a_variant_differs_from_main_where_it_says(variant):
    made = training(variant, CONFIG, 4, Path("base"), "hash", Path("work")).identity["config"]
    main = training(VARIANTS[MAIN], CONFIG, 4, Path("base"), "hash", Path("work"))
    for key, value in variant.overrides.items():
        section, _, name = key.partition(".")
        assert made[section][name] == value
        main.identity["config"][section][name] = value
    expected = main.identity["config"]
    for key, value in variant.overrides.items():
        section, _, name = key.partition(".")
        expected[section][name] = value
    assert made == expected
    assert variant.refill is not False or made["pruning"]["refill"] is False
    if made["pruning"]["selector"] != "stts":
        assert variant.selectors == (made["pruning"]["selector"],)


def test_more_frames_are_compared_at_no_more_tokens():
    for frames, ratio in SCALING:
        tokens = frames * (1 - ratio)
        assert any(
            not other_ratio and few == pytest.approx(tokens) for few, other_ratio in SCALING
        ), (frames, ratio)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1,x"], "seeds '1,x'"),
        (["--seeds", "2,2"], "seeds '2,2'"),
        (["--seeds", "0"], "seeds '0'"),
        (["--variants", "main,aux0"], "unknown variant 'aux0' (did you mean 'aux-0'?)"),
        (["--variants", "tome"], "main is not among the variants"),
        (["--config", "no.yaml"], "no.yaml: no such file"),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.json"
    config = tmp_path / "config.yaml"
    config.write_text("output: unused\n")
    given = ["--base", "nowhere", "-o", str(output), "--config", str(config), *words]
    assert evidence.main(given) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_process_that_fails_shows_what_it_said(tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text("output: unused\nlearning: fast\n")
    with pytest.raises(JobError, match="exit code 1") as failed:
        Processes().train(config, tmp_path / "run", resume=False, log=tmp_path / "train.log")
    assert "unknown key 'learning'" in failed.value.message


def test_processes_that_are_stopped_end_and_no_more_begin(tmp_path: Path, base: Path):
    config = tmp_path / "config.yaml"
    text = f"output: unused\nstart: {{checkpoint: {base}}}\noptim: {{steps: 100000}}\n"
    config.write_text(
        text + "dev: {every: 100000, clips: 1}\ndata: {batch_size: 1, micro_batch: 1}"
    )
    workers = Processes()
    log = tmp_path / "train.log"

    def work() -> None:
        workers.train(config, tmp_path / "run", resume=False, log=log)

    def ends() -> None:
        with pytest.raises(JobError, match="go on with --resume"):
            work()

    thread = threading.Thread(target=ends)
    thread.start()
    deadline = time.monotonic() + 60
    while not (log.exists() and "steps" in log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    workers.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert list((tmp_path / "run" / "state").glob("step*")), log.read_text()
    with pytest.raises(JobError, match="was not begun"):
        work()


Results = dict[str, Any]
NEW = tuple(chosen_variants(["refill-off"], with_main=False))


@pytest.fixture
def first(settings: Settings) -> Results:
    """Results of main and unpruned alone."""
    variants = tuple(chosen_variants(["main", "unpruned"]))
    return run(replace(settings, variants=variants), MadeUp(), "the first", _quiet)


def held(results: Results, folder: Path) -> Held:
    file = folder / "results.json"
    file.write_text(json.dumps(results))
    return Held.read(file)


def test_an_extension_is_what_one_command_for_all_would_have_found(
    settings: Settings, first: Results, tmp_path: Path
):
    workers = MadeUp()
    elsewhere = replace(settings, work=tmp_path / "elsewhere", variants=NEW)
    both = run(replace(elsewhere, extends=held(first, tmp_path)), workers, "the second", _quiet)
    assert {name for name, _ in workers.trained} == {"refill-off-seed1", "refill-off-seed2"}
    assert {task["kind"] for task in workers.worked} == {"clips", "examine"}
    at_once = run(settings, MadeUp(), "the first", _quiet)
    for made in (both, at_once):
        del made["date"], made["machine"]
    extensions = both.pop("extensions")
    assert both == at_once
    assert [(one["command"], one["variants"]) for one in extensions] == [
        ("the second", ["refill-off"])
    ]
    assert all(extensions[0][key] for key in ("date", "machine", "torch"))


def test_extensions_follow_each_other_and_one_may_be_main_itself(
    settings: Settings, first: Results, tmp_path: Path
):
    second = replace(settings, variants=NEW, extends=held(first, tmp_path))
    results = run(second, MadeUp(), "the second", _quiet)
    same = (replace(VARIANTS["aux-0"], overrides={"pruning.similarity_coefficient": 10.0}),)
    third = replace(settings, variants=same, extends=held(results, tmp_path))
    workers = MadeUp()
    both = run(third, workers, "the third", _quiet)
    assert workers.trained == []
    assert [one["command"] for one in both["extensions"]] == ["the second", "the third"]
    assert both["same_as_main"] == ["aux-0"]
    with pytest.raises(InputError, match="holds aux-0 already"):
        run(replace(third, extends=held(both, tmp_path)), workers, "", _quiet)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seeds": (1, 3)}, r"seeds is \[1, 3\]\n  allowed: seeds \[1, 2\], as in the results"),
        ({"exam": ExamSize(5, 3)}, "questions is 5\n  allowed: questions 6"),
        ({"exam": ExamSize(6, 2, 1)}, "clips is 2; level is 1\n"),
        ({"config": CONFIG}, "similarity_coefficient is 0.5\n  allowed: .* 10.0,"),
        ({"variants": tuple(VARIANTS.values())}, "holds main, unpruned already\n  .*: random, "),
    ],
)
def test_an_extension_that_does_not_fit_is_refused_before_any_work(
    settings: Settings, first: Results, tmp_path: Path, asked: dict[str, Any], message: str
):
    workers = MadeUp()
    more = replace(settings, variants=NEW, extends=held(first, tmp_path))
    with pytest.raises(InputError, match=f"^--extend .*results.json: .*{message}"):
        run(replace(more, **asked), workers, "", _quiet)
    assert (workers.trained, workers.worked) == ([], [])


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("settings", "ratios", [0.0, 0.4], r"ratios is \[0.0, 0.3, .*\n  allowed: .*0.4\]"),
        ("settings", "clips_code", "other", "the test clips of seed 1, 2 are not those"),
        ("exams", "2", ["count", "order", "last"], "the test clips of seed 2 are not those"),
        ("base", "sha256", {"1": 64 * "0"}, "sha256 of the base of seed 1 is .{12}; .*: .* 0{12};"),
        ("config", "threads", 7, "threads is 0\n  allowed: threads 7"),
    ],
)
def test_results_of_other_clips_or_another_base_are_not_extended(
    settings: Settings, first: Results, tmp_path: Path,
    part: str, key: str, value: object, message: str,
):  # fmt: skip
    workers = MadeUp()
    before = held(first, tmp_path)
    other = Held(before.file, {**first, part: {**first[part], key: value}}, (), before.windows)
    with pytest.raises(InputError, match=f"(?s)^--extend .*{message}"):
        run(replace(settings, variants=NEW, extends=other), workers, "", _quiet)
    assert (workers.trained, workers.worked) == ([], [])


def test_clips_of_before_their_code_was_written_down_are_told_by_what_was_asked(
    settings: Settings, first: Results, tmp_path: Path
):
    del first["settings"]["clips_code"]
    more = replace(settings, variants=NEW, extends=held(first, tmp_path))
    results = run(more, MadeUp(), "", _quiet)
    assert "clips_code" not in results["settings"]
    results["extensions"][0]["clips_code"] = "other"
    aux = tuple(chosen_variants(["aux-0"], with_main=False))
    more = replace(settings, variants=aux, extends=held(results, tmp_path))
    with pytest.raises(InputError, match="the test clips of seed 1, 2 are not those"):
        run(more, MadeUp(), "", _quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (27, 55)}, "27 of 55 windows were kept .*\n  allowed: 27 of 54"),
        ({"windows": (26, 54)}, "26 of 54 windows were kept .*\n  allowed: 27 of 54"),
        ({"max_frames": 4}, "max_frames is 4\n  allowed: max_frames 3"),
    ],
)
def test_answers_about_other_windows_are_not_added(
    settings: Settings, first: Results, tmp_path: Path, change: dict[str, Any], message: str
):
    workers = MadeUp()
    vars(workers).update(change)
    more = replace(settings, variants=NEW, extends=held(first, tmp_path))
    with pytest.raises(InputError, match=message):
        run(more, workers, "", _quiet)


def test_bases_trained_anew_are_held_against_the_results(settings: Settings, tmp_path: Path):
    unpruned = with_overrides(CONFIG, {"pruning.full_share": 1.0, "dev.prune_ratio": 0.0})
    scratch = replace(unpruned, model=replace(SHAPE, scorer=False))
    fresh = replace(settings.config, start=StartSettings(checkpoint="replaced", fresh_scorer=True))
    first = replace(
        settings, config=fresh, base=None, base_configs=(scratch,),
        variants=tuple(chosen_variants(["main"])),
    )  # fmt: skip
    results = run(first, MadeUp(), "", _quiet)
    more = replace(first, variants=NEW, extends=held(results, tmp_path))
    assert run(more, MadeUp(), "", _quiet)["extensions"]
    results["base"]["sha256"]["2"] = 64 * "0"
    more = replace(more, work=tmp_path / "elsewhere", extends=held(results, tmp_path))
    workers = MadeUp()
    with pytest.raises(InputError, match="sha256 of the base of seed 2 is"):
        run(more, workers, "", _quiet)
    assert [name for name, _ in workers.trained] == ["base1-seed1", "base1-seed2"]


def test_the_command_extends_its_own_file_whole_or_not_at_all(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    workers = MadeUp()
    monkeypatch.setattr(evidence, "Processes", lambda: workers)
    file = tmp_path / "results.json"

    def command(output: str, *words: str) -> int:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(plain({**CONFIG.to_dict(), "output": output})))
        given = ["--base", str(base), "--config", str(config), "--seeds", "1,2",
                 "--questions", "6", "--clips", "3", "--work", str(tmp_path / "work")]  # fmt: skip
        return evidence.main([*given, "-o", str(file), *words])

    assert command("here", "--variants", "main") == 0
    before = file.read_bytes()
    extend = ("--variants", "refill-off,aux-0", "--extend", str(file))
    workers.failing = "refill-off-seed2"
    assert command("there", *extend) == 1
    assert file.read_bytes() == before
    workers.failing = ""
    assert command("there", *extend) == 0
    results = json.loads(file.read_text())
    assert results["command"] == json.loads(before)["command"]
    assert results["extensions"][0]["variants"] == ["aux-0", "refill-off"]
    assert f"--extend {file}" in results["extensions"][0]["command"]
    assert Evidence(results).variants == ("main", "aux-0", "refill-off")
    after = file.read_bytes()
    capsys.readouterr()
    assert command("there", *extend) == 1
    assert "holds aux-0, refill-off already" in capsys.readouterr().err
    assert file.read_bytes() == after
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no such file"),
        ({"benchmark": "stream"}, "is not of benchmarks/evidence.py"),
        ({"config": {}}, "is damaged, or of another version: KeyError('output')"),
        ({"date": None}, "is damaged: see date"),
        ({"runs": []}, "is damaged: see runs"),
        ({"exams": {}}, "is damaged, or of another version: KeyError('1')"),
        ({"exams": {"1": [], "2": []}}, "do not fit the questions of seed 1"),
    ],
)
def test_what_is_not_results_is_not_extended(
    first: Results, tmp_path: Path, change: dict[str, Any] | None, message: str
):
    file = tmp_path / "results.json"
    if change is not None:
        file.write_text(json.dumps({**first, **change}))
    with pytest.raises(InputError) as refused:
        Held.read(file)
    assert message in refused.value.message
    assert refused.value.where == f"--extend {file}"


class InThisProcess:
    """Workers that really work, without processes."""

    def train(self, config: Path, run: Path, *, resume: bool, log: Path) -> None:
        train(config, run, resume)

    def work(self, task: Mapping[str, Any], log: Path) -> dict[str, Any]:
        told, result = log.with_suffix(".task"), log.with_suffix(".result")
        log.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(task))
        assert evidence_work.main([str(told), str(result)]) == 0
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def stop(self) -> None:
        pass


def test_everything_in_miniature(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """Real training, real H.264 clips, real answers, of a model that knows nothing."""
    small = replace(
        settings,
        config=replace(settings.config, save_every=STEPS),
        seeds=(3,),
        variants=tuple(chosen_variants(["main", "refill-off"])),
        exam=ExamSize(questions=4, clips=2),
    )
    opened: list[tuple[str, int | None, bool]] = []

    def recorded(
        checkpoint: str, *, max_frames: int | None = None, refill: bool = True, **more: Any
    ):
        opened.append((Path(checkpoint).parents[1].name, max_frames, refill))
        return open_checkpoint_answerer(checkpoint, max_frames=max_frames, refill=refill, **more)

    monkeypatch.setattr(evidence_work, "open_checkpoint_answerer", recorded)
    results = run(small, InThisProcess(), "a command", _quiet)
    frames = sorted({frames for frames, _ in SCALING})
    speed = ("main-seed3", None, True)
    assert opened == [
        ("main-seed3", None, True), *(("main-seed3", count, True) for count in frames),
        ("refill-off-seed3", None, False), speed,
    ]  # fmt: skip
    found = Evidence(json.loads(json.dumps(results)))
    assert found.questions == 4
    assert found.clips == 2
    main = [one for one in results["evaluations"] if one["variant"] == "main"]
    rows = {(row["prune_ratio"], row["selector"]): row for row in main[0]["rows"]}
    assert len(rows) == 1 + 4 * 5
    for ratio in (0.3, 0.5, 0.7, 0.8):
        kept = {row["kept_windows"] for (own, _), row in rows.items() if own == ratio}
        assert len(kept) == 1, "all selectors keep equally many"
    timed = {(row["prune_ratio"], row["selector"]) for row in results["speed"]["rows"]}
    assert len(timed) == 1 + 4 * 3
    assert {run["variant"]: run["prune_at"] for run in results["runs"]} == {
        "main": 0, "refill-off": 0,
    }  # fmt: skip
    assert "## Speed beside it" in report(found)
    with open_checkpoint_answerer(settings.work / "main-seed3" / "run", threads=1) as answerer:
        plain = evaluate(answerer, synthetic_exam(4, 2, seed=3), ratios=[0.5], selectors=["tome"])
    assert plain["rows"][0]["marks"] == rows[0.5, "tome"]["marks"]
    assert plain["rows"][0]["kept_windows"] == rows[0.5, "tome"]["kept_windows"]
