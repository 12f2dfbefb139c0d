from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.evidence_claims import beats, claims, points
from benchmarks.harness.evidence_plan import MAIN, SCALING, VARIANTS, Variant
from benchmarks.harness.evidence_report import missing_parts, percent, report
from benchmarks.harness.evidence_stats import Difference, Evidence, Mean, Setting
from docs.update_results import DOCUMENT
from stts_export.errors import InputError
from stts_export.training.selectors import SELECTORS, STTS

ROOT = Path(__file__).parents[2]
TYPES = ("colour", "count", "order")
CLIPS, EACH, WINDOWS = 60, 3, 160

Skill = Callable[[str, float, str], float]
"""Variant, ratio, selector -> chance of a right answer."""


def plausible(variant: str, ratio: float, selector: str) -> float:
    """Learned scores lose nothing at 0.5, everything else does."""
    if selector == STTS:
        return 0.9 if ratio <= 0.5 else 0.85
    return 0.9 - 0.4 * ratio


def made_up(
    skill: Skill = plausible,
    seeds: tuple[int, ...] = (1, 2, 3),
    variants: tuple[str, ...] = ("main", "unpruned", "random", "refill-off"),
    scaling: bool = True,
) -> dict[str, Any]:
    """What `benchmarks/evidence.py` writes, with planted accuracies; luck is shared by all."""
    luck = {seed: np.random.default_rng(seed).random(CLIPS * EACH) for seed in seeds}

    def row(variant: str, seed: int, ratio: float, selector: str, frames: int) -> dict[str, Any]:
        marks = luck[seed] < skill(variant, ratio, selector)
        total = frames * 16 * CLIPS
        return {
            "prune_ratio": ratio,
            "selector": selector if ratio else "all windows",
            "kept_windows": total - int(total * ratio),
            "total_windows": total,
            "right": int(marks.sum()),
            "marks": "".join("01"[int(mark)] for mark in marks),
        }

    def evaluations(variant: Variant, seed: int) -> list[dict[str, Any]]:
        rows = [
            row(variant.name, seed, ratio, name, 10)
            for ratio in variant.ratios
            for name in (variant.selectors if ratio else (STTS,))
        ]
        own = {"variant": variant.name, "seed": seed, "refill": variant.refill}
        found = [{**own, "max_frames": None, "rows": rows}]
        if variant.name == MAIN and scaling:
            found += [
                {**own, "max_frames": frames, "rows": [row(MAIN, seed, ratio, STTS, frames)]}
                for frames, ratio in SCALING
            ]
        return found

    used = [VARIANTS[name] for name in variants]
    computer = {"cpu": "a processor", "cores": 2, "load_average": [0.5, 0, 0]}
    spread = {"median": 0.01, "low": 0.009, "high": 0.012}
    times = {"encode": spread, "prefill": spread, "total": spread}
    return {
        "benchmark": "evidence",
        "command": "python benchmarks/evidence.py --base here",
        "machine": computer,
        "torch": "2.13",
        "settings": {
            "seeds": list(seeds),
            "questions": CLIPS * EACH,
            "clips": CLIPS,
            "dtype": "float32",
            "ratios": [0.0, 0.3, 0.5, 0.7, 0.8],
        },
        "config": {"optim": {"steps": 300}, "pruning": {"similarity_coefficient": 10.0}},
        "base": {
            "from_scratch": False,
            "training": {"seed": 1, "steps": 3000, "training_seconds": 1800},
        },
        "runs": [
            {
                "variant": variant.name, "seed": seed, "prune_at": 1, "steps": 300,
                "training_seconds": 240 + seed, "machine": "a processor, 2 cores",
                "dev_accuracy": {"prune_ratio": 0.5, "accuracy": 0.875},
            }
            for variant in used
            for seed in seeds
        ],
        "same_as_main": [],
        "exams": {str(seed): [" ".join(TYPES)] * CLIPS for seed in seeds},
        "chance": {"colour": 0.17, "count": 0.25},
        "evaluations": [one for variant in used for seed in seeds
                        for one in evaluations(variant, seed)],
        "speed": {
            "machine": computer, "torch": "2.13", "seed": 1, "repeats": 20, "frames": [11, 14],
            "rows": [
                {"prune_ratio": 0.0, "selector": "all windows", **times, "speedup": spread},
                {"prune_ratio": 0.5, "selector": STTS, **times,
                 "speedup": {"median": 1.5, "low": 1.4, "high": 1.6}},
            ],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_up()


def _table(text: str, title: str) -> list[list[str]]:
    """Rows of the first table of a section, its header first."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_an_interval_over_seeds_is_student_s():
    mean = Mean((0.8, 0.9, 1.0))
    assert mean.value == pytest.approx(0.9)
    assert mean.reach == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-6)
    assert percent(mean) == "90.0 ± 24.8"
    assert percent(Mean((0.8,))) == "80.0"


def test_accuracies_are_shares_of_marks(results):
    evidence = Evidence(results)
    setting = Setting("main", 0.5, "evs")
    for kind in (*TYPES, "all"):
        shares = []
        for one in results["evaluations"]:
            for row in one["rows"]:
                if (one["variant"], one["max_frames"], row["prune_ratio"], row["selector"]) == (
                    "main", None, 0.5, "evs",
                ):  # fmt: skip
                    marks = (
                        row["marks"][TYPES.index(kind) :: EACH] if kind in TYPES else row["marks"]
                    )
                    shares.append(marks.count("1") / len(marks))
        assert evidence.accuracy(setting, kind).by_seed == pytest.approx(shares)


def _two(first: np.ndarray, second: np.ndarray, per_clip: int) -> Evidence:
    """Evidence of one seed in which learned scores have the first marks, random the second."""
    results = made_up(seeds=(1,), variants=("main",), scaling=False)
    results["exams"] = {"1": [" ".join(["count"] * per_clip)] * (len(first) // per_clip)}
    rows = results["evaluations"][0]["rows"]
    kept = [row for row in rows if (row["prune_ratio"], row["selector"]) in
            ((0.5, STTS), (0.5, "random"))]  # fmt: skip
    for row, marks in zip(kept, (first, second), strict=True):
        row |= {"marks": "".join("01"[int(mark)] for mark in marks), "right": int(marks.sum())}
    results["evaluations"][0]["rows"] = kept
    return Evidence(results)


ONE, OTHER = Setting("main", 0.5, STTS), Setting("main", 0.5, "random")


def test_a_paired_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(4)
    first, second = (rng.random(400) < share for share in (0.8, 0.7))
    found = _two(first, second, 1).difference(ONE, OTHER)
    gain = first.astype(float) - second
    assert found.value == pytest.approx(gain.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * gain.std() / 20, rel=0.05)


def test_questions_about_one_clip_do_not_count_as_independent():
    rng = np.random.default_rng(4)
    first, second = (rng.random(100) < share for share in (0.8, 0.7))
    alone = _two(first, second, 1).difference(ONE, OTHER)
    repeated = _two(first.repeat(4), second.repeat(4), 4).difference(ONE, OTHER)
    assert repeated == alone


def test_what_is_alike_differs_by_nothing():
    marks = np.random.default_rng(4).random(100) < 0.5
    found = _two(marks, marks.copy(), 2).difference(ONE, OTHER)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_order_of_sides_only_changes_the_sign(results):
    evidence = Evidence(results)
    there, back = evidence.difference(ONE, OTHER), evidence.difference(OTHER, ONE)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    assert len(there.by_seed) == 3


@pytest.mark.parametrize("damage", [{"marks": "101"}, {"right": 1}])
def test_marks_that_do_not_fit_are_refused(damage: Mapping[str, Any]):
    results = made_up()
    results["evaluations"][0]["rows"][0] |= damage
    with pytest.raises(InputError, match="do not fit the questions of seed 1"):
        Evidence(results)


def test_results_of_something_else_are_refused():
    with pytest.raises(InputError, match=r"is not of benchmarks/evidence\.py"):
        Evidence({"benchmark": "bench_stream"})


def _verdicts(skill: Skill) -> dict[str, str]:
    lines = list(claims(Evidence(made_up(skill))))
    found = [re.fullmatch(r"\* \*\*(.+?)\*\*: (.+?)\. [+-].*", line) for line in lines]
    return {match[2]: match[1] for match in found if match}


BEAT_RANDOM = "learned scores beat random windows (`random`) at 0.5"
CLEARLY = "learned scores clearly beat random windows (`random`) at 0.8"
KEEP = "at 0.5 they lose at most one point against the same model unpruned"


def test_claims_hold_where_they_are_planted():
    found = _verdicts(plausible)
    assert found[BEAT_RANDOM] == "Holds"
    assert found[CLEARLY] == "Holds"
    assert found[KEEP] == "Holds"
    assert found["10 frames at 0.5 beat 5 frames unpruned, at equal tokens"] == "Not shown"


@pytest.mark.parametrize(
    ("learned", "other", "claim", "verdict"),
    [
        (0.6, 0.7, BEAT_RANDOM, "Fails"),
        (0.7, 0.7, BEAT_RANDOM, "Not shown"),
        (0.74, 0.71, CLEARLY, "Fails in part"),
        (0.80, 0.71, CLEARLY, "Holds"),
    ],
)
def test_a_claim_fails_where_it_should(learned: float, other: float, claim: str, verdict: str):
    found = _verdicts(lambda _, ratio, name: learned if name == STTS else other)
    assert found[claim] == verdict


def test_a_claim_needs_every_seed():
    assert beats(Difference(0.06, 0.02, 0.1, (0.2, 0.02, -0.04)))[0] == "Not shown"
    assert beats(Difference(0.06, 0.02, 0.1, (0.1, 0.06, 0.02)))[0] == "Holds"


@pytest.mark.parametrize(
    ("lost", "verdict"),
    [(0.0, "Holds"), (0.012, "Holds on these questions"), (0.02, "Not shown"), (0.1, "Fails")],
)
def test_what_is_lost_against_unpruned_is_judged(lost: float, verdict: str):
    assert _verdicts(lambda _, ratio, name: 0.8 - lost * (ratio > 0))[KEEP] == verdict


def test_a_failed_claim_says_so_in_words():
    text = report(Evidence(made_up(lambda _, ratio, name: 0.5 if name == STTS else 0.7)))
    line = next(line for line in text.splitlines() if BEAT_RANDOM in line)
    assert line.startswith("* **Fails**")
    assert line.endswith("the other one is better.")


def test_the_main_table_has_every_ratio_and_selector(results):
    evidence = Evidence(results)
    header, _, *rows = _table(report(evidence), "Accuracy against prune ratio")
    assert header == ["prune ratio", "windows of a clip", *(f"`{name}`" for name in SELECTORS)]
    assert [row[0] for row in rows] == ["0", "0.3", "0.5", "0.7", "0.8"]
    assert rows[2][1] == "80.0 of 160.0"
    for row in rows:
        for name, cell in zip(SELECTORS, row[2:], strict=True):
            assert cell == percent(evidence.accuracy(Setting("main", float(row[0]), name)))


def test_every_table_is_whole_and_names_command_and_machine(results):
    text = report(Evidence(results))
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        widths = {len(row.split(" | ")) for row in table.splitlines()}
        assert len(widths) == 1, table
    for section in text.split("\n## ")[1:]:
        if "\n|" in section:
            assert results["command"] in section.split("\n|")[-1], section[:60]
            assert "a processor" in section.split("\n|")[-1], section[:60]


def test_what_was_added_later_stands_with_its_command_where_it_is_shown():
    results = made_up(seeds=(1,), scaling=False)
    assert "another machine" not in report(Evidence(results))
    for run in results["runs"]:
        if run["variant"] == "refill-off":
            run["machine"] = "another processor"
    computer = {**results["machine"], "cpu": "another processor"}
    more = {
        "command": "python benchmarks/evidence.py --extend it", "date": "2026-12-01",
        "machine": computer, "torch": "2.14", "variants": ["refill-off"],
    }  # fmt: skip
    sections = report(Evidence({**results, "extensions": [more]})).split("\n## ")
    added = (
        "Added on 2026-12-01: `refill-off`; PyTorch 2.14, another processor, 2 cores; "
        "`python benchmarks/evidence.py --extend it`."
    )
    assert [one.split("\n")[0] for one in sections if added in one] == [
        "Ablations",
        "Training runs",
    ]
    elsewhere = "Trained on another machine than `main`: `refill-off`."
    assert [one.split("\n")[0] for one in sections if elsewhere in one] == ["Ablations"]
    assert elsewhere not in report(Evidence(made_up()))


def test_what_is_not_there_is_listed_as_not_run():
    evidence = Evidence(made_up(variants=("main", "random"), scaling=False))
    text = report(evidence)
    missing = text.split("## Not run\n")[1]
    for name in VARIANTS:
        assert (f"* `{name}`:" in missing) == (name not in ("main", "random"))
    assert "more frames at equally many tokens" in missing
    assert "## More frames" not in text
    assert "results_frames.png" not in text
    assert "Molmo2-4B" in missing


def test_a_variant_that_is_main_itself_is_said_to_be():
    results = made_up()
    results["same_as_main"] = ["aux-reference"]
    line = next(one for one in missing_parts(Evidence(results)) if "aux-reference" in one)
    assert line.endswith("this is `main` itself")


def test_one_seed_has_no_interval_over_seeds():
    text = report(Evidence(made_up(seeds=(4,))))
    assert "±" not in "".join("".join(row) for row in _table(text, "Ablations"))


def test_unequal_numbers_of_windows_are_refused():
    results = made_up()
    results["evaluations"][0]["rows"][3]["kept_windows"] += 1
    with pytest.raises(InputError, match="unequal numbers of windows"):
        report(Evidence(results))


def test_differences_carry_their_sign():
    assert [points(share) for share in (0.0123, -0.0123, -0.00001, 0.0)] == [
        "+1.2", "-1.2", "+0.0", "+0.0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(results, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("docs")
    file = folder / "evidence.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    DOCUMENT.main(["--results", str(file), "--folder", str(folder)], None)
    return file, folder


def test_pictures_are_drawn_and_small(written):
    _, folder = written
    pictures = {path.name for path in folder.glob("*.png")}
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert pictures == set(re.findall(r"\]\((.+?\.png)\)", text))
    assert len(pictures) == 3
    for name in pictures:
        assert 10_000 < (folder / name).stat().st_size < 150_000, name


def test_a_check_fails_when_anything_is_older_than_the_results(written, tmp_path: Path):
    file, folder = written
    assert DOCUMENT.outdated(file, folder) == []
    other = tmp_path / "other.json"
    other.write_text(json.dumps(made_up(seeds=(4, 5))), encoding="utf-8")
    names = ["results.md", "results_ratio.png", "results_types.png", "results_frames.png"]
    assert DOCUMENT.outdated(other, folder) == names
    with pytest.raises(SystemExit, match=r"results\.md, .*: run python docs/update_results\.py"):
        DOCUMENT.main(["--check", "--results", str(other), "--folder", str(folder)], None)
    assert not (tmp_path / "results.md").exists()


def test_without_results_nothing_is_written(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"run python benchmarks/evidence\.py first"):
        DOCUMENT.main(["--results", str(tmp_path / "no.json"), "--folder", str(tmp_path)], None)
    assert list(tmp_path.iterdir()) == []


def test_the_document_shows_the_stored_results():
    document = ROOT / "docs" / DOCUMENT.name
    assert DOCUMENT.results.exists() == document.exists()
    if document.exists():
        assert DOCUMENT.outdated(DOCUMENT.results, document.parent) == []
