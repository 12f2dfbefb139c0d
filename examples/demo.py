"""What `make demo` runs: checkpoint to bundle to answers about a real video file.

Everything it does is a command that can be typed; each is printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from stts_export.cli import main as stts_export
from stts_export.training.clips import make_clip, split_seed
from stts_export.training.rendering import write_mp4

CHECKPOINT = Path(__file__).parent / "demo_checkpoint"
CLIP_KINDS = ("stills", "events", "motion")


def run(*arguments: str | Path) -> None:
    """Print a command and run it; its failure is the demo's."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ stts-export {shlex.join(words)}", flush=True)
    code = stts_export(words)
    if code:
        sys.exit(code)


def main() -> None:
    """Build the bundle, film clips that training never saw, and ask about them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_out"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    bundle = output / "bundle"
    run("build", CHECKPOINT, "-o", bundle, "--force")
    run("inspect", bundle)
    for number, kind in enumerate(CLIP_KINDS):
        clip = make_clip(split_seed("test", number), kind=kind)
        video = output / f"{kind}.mp4"
        write_mp4(clip, video)
        print(f"\n# {video}: {clip.duration:g} s of H.264, made by the clip generator")
        overlay: list[str | Path] = ["--overlay", output / f"{kind}_overlay.mp4"]
        first_of_type = {question.type: question for question in reversed(clip.questions)}
        for question in first_of_type.values():
            run("run", bundle, video, "-p", question.text, "--prune-ratio", "0.5", *overlay)
            print(f"(the generator's answer: {question.answer})")
            overlay = []
    print(f"\nLook at {output}/*_overlay.mp4 and {output}/*_overlay.png for what was pruned.")


if __name__ == "__main__":
    main()
