"""Opening and running a bundle needs NumPy, PyAV, tokenizers and a back end: nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.helpers import prompt_ids

_FORBIDDEN = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "yaml")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter where the forbidden packages do not exist."""
    blocker = f"""
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {_FORBIDDEN!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Blocker())
    """
    script = textwrap.dedent(blocker) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_bundle_runs_in_a_bare_environment(small_bundle: Path):
    from stts_export.bundle import Bundle

    ids = prompt_ids(Bundle.open(small_bundle).config, 3)
    done = _run(f"""
    import numpy as np
    from stts_export import Session
    with Session.open({str(small_bundle)!r}, threads=1) as s:
        clip = s.encode(np.zeros((3, 50, 70, 3), np.uint8), prune_ratio=0.5)
        print(s.generate(clip, {ids!r}, 2).kept_windows)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9"


def test_importing_loads_no_back_end():
    done = _run("""
    import json, stts_export
    print(json.dumps([name for name in ("onnxruntime", "onnx", "torch") if name in sys.modules]))
    """)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_building_there_is_refused_with_the_command_that_fixes_it(tmp_path: Path):
    done = _run(f"""
    from stts_export.cli import main
    sys.exit(main(["build", {str(tmp_path / "c")!r}, "-o", {str(tmp_path / "b")!r}]))
    """)
    assert done.returncode == 4, done.stderr
    assert "pip install 'stts-export[cpu,export]'" in done.stderr


def test_training_there_is_refused_with_the_command_that_fixes_it():
    done = _run("""
    from stts_export.cli import main
    sys.exit(main(["train", "x.yaml"]))
    """)
    assert done.returncode == 4, done.stderr
    assert "pip install 'stts-export[train]'" in done.stderr


def test_off_posix_only_what_writes_folders_is_refused(small_bundle: Path, tmp_path: Path):
    def without_locks(*words: str) -> subprocess.CompletedProcess[str]:
        return _run(f"""
        class NoLocks:
            def find_spec(self, name, path=None, target=None):
                if name == "fcntl":
                    raise ModuleNotFoundError("No module named 'fcntl'", name=name)

        sys.modules.pop("fcntl", None)
        sys.meta_path.insert(0, NoLocks())
        from stts_export.cli import main
        sys.exit(main({list(words)!r}))
        """)

    for verb in ("inspect", "estimate"):
        done = without_locks(verb, str(small_bundle))
        assert done.returncode == 0, done.stderr
    done = without_locks("build", str(tmp_path / "c"), "-o", str(tmp_path / "b"))
    assert done.returncode == 4, done.stderr
    assert "POSIX" in done.stderr
