"""What is written down is what happens: README commands, its example and its tables."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from benchmarks.harness.model import full_size_config
from stts_export.cli import main
from stts_export.engines.engine_build import trtexec
from stts_export.engines.network import EngineJob
from stts_export.tensors import SELECT_PACK, graph_file, graph_specs, profiles

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIVE = (ROOT / "docs" / "live.md").read_text(encoding="utf-8")
TENSORRT = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
DOCUMENTS = [
    path
    for folder in (".", "docs", "benchmarks", "trt_plugins")
    for path in ROOT.glob(f"{folder}/*.md")
]


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _commands(text: str) -> list[list[str]]:
    blocks = _blocks("bash", text)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a user has after `make demo`."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "demo.log").write_text(done.stdout)
    return folder


def test_the_demo_answers_and_shows_what_was_pruned(workplace: Path):
    log = (workplace / "demo.log").read_text()
    answers = re.findall(
        r"\n\$ stts-export run [^\n]*\n([^\n]+)\n.*?\(the generator's answer: ([^)]+)\)",
        log, flags=re.DOTALL,
    )  # fmt: skip
    assert len(answers) >= 5
    assert sum(got == expected for got, expected in answers) >= 0.7 * len(answers)
    for kind in ("stills", "events", "motion"):
        assert (workplace / "demo_out" / f"{kind}_overlay.mp4").stat().st_size > 0
        assert (workplace / "demo_out" / f"{kind}_overlay.png").stat().st_size > 0


def test_readme_commands_and_example_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(workplace)
    commands = _commands(README)
    verbs = {"build", "inspect", "run", "verify", "watch", "doctor", "estimate", "convert"}
    assert {command[1] for command in commands} == verbs
    for command in commands:
        assert command[0] == "stts-export"
        assert main(command[1:]) == 0, (command, capsys.readouterr().err)
    capsys.readouterr()
    (example,) = _blocks("python")
    script = workplace / "example.py"
    script.write_text(example)
    runpy.run_path(str(script))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(re.fullmatch(r"\w+ \d+/\d+ windows", line) for line in printed)


def test_commands_and_example_of_the_live_guide_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(workplace)
    bundle = workplace / "demo_bundle"
    if not bundle.exists():  # the README's first command builds it
        bundle.symlink_to(workplace / "demo_out" / "bundle")
    commands = _commands(LIVE)
    assert len(commands) == 3
    for command in commands:
        assert command[0] == "stts-export"
        assert main(command[1:]) == 0, (command, capsys.readouterr().err)
    assert (workplace / "live-1.png").exists()
    capsys.readouterr()
    (example,) = _blocks("python", LIVE)
    script = workplace / "live.py"
    script.write_text(example)
    runpy.run_path(str(script))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 2
    assert all(re.fullmatch(r"[\d.]+-[\d.]+ s: .+, \d+/\d+ windows", line) for line in printed)


def test_commands_of_the_tensorrt_guide_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(workplace)
    commands = _commands(TENSORRT)
    assert len(commands) == 3
    for command in commands:
        assert command[0] == "stts-export"
        assert main(command[1:]) == 0, (command, capsys.readouterr().err)
    shown = capsys.readouterr().out
    assert "vision_upper engine, tensorrt-rtx" in shown
    assert "for sm120" in shown


def test_the_trtexec_line_of_the_guide_is_ours():
    """The line written by hand has the options and shapes of the one that `build` prints."""
    (written,) = re.findall(r"^    (trtexec .*?[^\\]\n)", TENSORRT, flags=re.MULTILINE | re.DOTALL)
    config = full_size_config()
    spec = graph_specs(config, "fp16")[SELECT_PACK]
    bundle = Path("BUNDLE")
    job = EngineJob(
        "tensorrt",
        spec,
        bundle / "onnx" / graph_file(SELECT_PACK),
        bundle / "engines" / "select_pack.engine",
        profiles(spec, config, max_frames=128, max_tokens=1),
        plugin=bundle / "plugins" / "libstts_plugins.so",
    )
    ours = _options(trtexec(job, bundle, "10.3.0"))
    theirs = _options(written.replace("\\\n", " "))
    assert theirs.keys() == ours.keys()
    for name in ("--minShapes", "--optShapes", "--maxShapes", "--saveEngine"):
        assert theirs[name] == ours[name]


def _options(command: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in shlex.split(command)[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in (path.read_text(encoding="utf-8") for path in DOCUMENTS):
        for target in re.findall(r"(?:^ *|`)make ([\w-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_cmake_presets_exist():
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
    known = {
        preset["name"] for kind in ("configure", "test") for preset in presets[f"{kind}Presets"]
    }
    for text in (path.read_text(encoding="utf-8") for path in DOCUMENTS):
        assert set(re.findall(r"--preset (\w[\w-]*)", text)) <= known


@pytest.mark.parametrize("script", ["update_tables.py", "update_precision.py"])
def test_tables_come_from_recorded_results(script: str):
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / script, "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_readme_s_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_links_and_named_files_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for name in re.findall(
        r"`((?:stts_export|docs|tests|benchmarks|configs|trt_plugins)/[\w./-]+)`", text
    ):
        assert (ROOT / name).exists() or (document.parent / name).exists(), name


def test_every_extra_in_the_readme_is_defined():
    extras = metadata("stts-export").get_all("Provides-Extra")
    assert extras is not None
    named = {
        extra
        for group in re.findall(r"stts-export\[([\w,-]+)\]", README + TENSORRT + LIVE)
        for extra in group.split(",")
    }
    assert named <= set(extras)
