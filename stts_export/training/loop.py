"""The training loop: a configuration in, a folder of checkpoints out.

Examples, questions and prune ratios of a step depend on the seed and the step's number alone, so a
run that was interrupted continues exactly as if it had not been, on any number of processes.
"""

from __future__ import annotations

import math
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stts_export._version import __version__
from stts_export.errors import InputError, SttsError
from stts_export.files import json_object
from stts_export.machine import machine
from stts_export.training.config import TrainConfig
from stts_export.training.data import DevSet, Questions, dev_set, example_maker, read_questions
from stts_export.training.decoding import BrokenClip
from stts_export.training.examples import Example, LabelledFrames, Question
from stts_export.training.failures import non_finite
from stts_export.training.feed import BrokenLimit, Feed
from stts_export.training.folders import remove_older, step_folders
from stts_export.training.logs import RunLog
from stts_export.training.lora import whole_parameters
from stts_export.training.mixture import step_positions
from stts_export.training.objective import (
    Counts,
    Outcome,
    Trainee,
    WindowLabels,
    mixed_precision,
)
from stts_export.training.parallel import Kind, Parallel, checkpoint_activations, clip_
from stts_export.training.pictures import kept_windows_picture, picture_file
from stts_export.training.sequences import SequenceBuilder
from stts_export.training.start import Start, save_model, start_from, trainable_groups
from stts_export.training.state import STATE_FOLDER, load_state, save_state
from stts_export.training.synthetic import labelled_frames

# Runs a process that has no example of its own through the model, so that all take part.
_FILLER = Example(None, (Question("", "?", "!"),), name="filler")
# A run may be resumed under another value of these: they do not change the steps done so far.
_FREE_KEYS = {
    "output", "threads", "device", "parallel", "log_every", "save_every", "keep_checkpoints",
    "picture_every", "data.micro_batch", "data.workers", "data.max_broken", "dev", "optim.rates",
}  # fmt: skip


def train(
    config_path: Path, output: Path | None = None, resume: bool = False, dry_run: bool = False
) -> Path:
    """Train a model; under torchrun every process calls this.

    Args:
        config_path: YAML file; see `TrainConfig`.
        output: folder of the run, in place of the configuration's.
        resume: continue the run in that folder.
        dry_run: check everything and run one step, but write nothing.

    Returns:
        The folder of the run. It holds `stepN/` checkpoints in the Hugging Face format, `state/`
        to resume from, `log.jsonl`, and curves for TensorBoard.

    Raises:
        InputError: the configuration or data is at fault, the folder already holds a run and
            `resume` was not asked for, it holds none and `resume` was, or it cannot be written to.
        TrainingError: a loss is not finite; its batch was saved.
        KeyboardInterrupt: Ctrl-C ended the run early, with everything saved.
        SystemExit: SIGTERM did.
    """
    config = TrainConfig.from_file(config_path)
    run = output or Path(config.output)
    states = step_folders(run / STATE_FOLDER)
    used = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if resume and not states:
        first = "remove it, and " if used else ""
        raise InputError(
            "holds no run to resume", where=str(run), fix=f"{first}start without --resume"
        )
    if used and not (resume or dry_run):
        way = "pass --resume" if states else "remove it: it holds no run to resume"
        raise InputError(
            "is not empty" if run.is_dir() else "is not a folder",
            where=str(run),
            fix=f"{way}, or pass another folder with --output",
        )
    if resume:
        _check_same(config, run, states[-1])
    if not dry_run:
        _check_writable(run)
    if config.threads:
        torch.set_num_threads(config.threads)
    with Parallel(config.device) as parallel:
        trainer = Trainer(config, run, parallel)
        if resume:
            trainer.load()
        if dry_run:
            trainer.try_one_step()
        else:
            trainer.fit()
    if trainer.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if trainer.stopped_by:
        raise SystemExit(128 + trainer.stopped_by)
    return run


@dataclass
class _Recent:
    """What happened since the last line of the log."""

    since: float = field(default_factory=time.monotonic)
    steps: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that have it."""
        values: dict[str, list[float]] = defaultdict(list)
        for entry in self.steps:
            for name, value in entry.items():
                values[name].append(value)
        shown = {name: float(np.mean(own)) for name, own in values.items()}
        for name in ("tokens", "clips"):
            if name in shown:
                shown[f"{name}_per_second"] = sum(values[name]) / self.seconds
                del shown[name]
        return shown


class Trainer:
    """A model in training, with everything that a checkpoint needs.

    Args:
        config: the run.
        run: its folder; nothing is written before `fit` or `save`.
        parallel: the processes that train together.

    Raises:
        InputError: the start checkpoint, the data, or how a step is divided is at fault.
    """

    def __init__(self, config: TrainConfig, run: Path, parallel: Parallel) -> None:
        self.config = config
        self.run = run
        self.parallel = parallel
        self._share = _share(config, parallel.world)
        questions = read_questions(config)
        self.start: Start = start_from(config)
        model = self.start.model
        self._make = example_maker(config, self.start, questions)
        self.dev_set = self._open_dev_set(questions)
        labels = None
        if config.labels.steps or config.labels.coefficient:
            torch.manual_seed(config.seed + 1)
            labels = WindowLabels(
                model.config.text.hidden_size, model.config.vision.windows, config.data.max_frames
            )
        self.trainee = Trainee(
            model,
            labels,
            SequenceBuilder(self.start.prompts(), config.data.sequence_length),
            selector=config.pruning.selector,
            refill=config.pruning.refill,
            bfloat16=config.optim.bfloat16,
        )
        if config.optim.activation_checkpointing:
            again = partial(mixed_precision, config.optim.bfloat16, parallel.device.type)
            checkpoint_activations(model, again)
        kind: Kind = "fsdp" if config.parallel == "fsdp" else "ddp"
        # The first steps do without the decoder, all others use everything.
        self._wrapped = parallel.wrap(self.trainee, kind, unused=config.labels.steps > 0)
        groups = trainable_groups(model, labels, config)
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=_pair(config.optim.betas), eps=config.optim.eps
        )
        # The bias divides by the spread of a row of scores, so the scorer's gradient has no bound
        # where a row is nearly constant: clipped together it would silence everything else.
        self._clipped: dict[str, list[nn.Parameter]] = {"scorer": [], "rest": []}
        for group in groups:
            self._clipped["scorer" if group["name"] == "scorer" else "rest"] += group["params"]
        self._broken = BrokenLimit(config.data.max_broken)
        self._check_dev()
        self.step = 0
        self.seconds = 0.0
        self.dev: dict[str, float] = {}
        self._signal = 0
        """That this process was sent, if any."""
        self.stopped_by = 0
        """Signal that ends the run after this step, known to all processes."""
        self._recent = _Recent()

    def _open_dev_set(self, questions: Questions) -> DevSet:
        """Each process decodes its own share."""
        rank, world = self.parallel.rank, self.parallel.world
        try:
            own = dev_set(self.config, self.start, questions.dev, rank, world)
        except SttsError as error:
            self.parallel.raise_together(error)
            raise
        self.parallel.raise_together(None)
        return own

    def _check_dev(self) -> None:
        """Refuse questions now that would end the run at its first evaluation."""
        refused = None
        for example in self.dev_set.examples:
            try:
                self.trainee.sequences.length(example)
            except InputError as error:
                where = f"dev: {example.name}"
                refused = refused or InputError(error.message, where=where, allowed=error.allowed)
        self.parallel.raise_together(refused)

    @property
    def parameter_count(self) -> int:
        """Parameters of the model, without those used in training only."""
        return sum(math.prod(whole.shape) for whole in whole_parameters(self.start.model))

    def fit(self) -> None:
        """Train to the configured number of steps, with evaluations and checkpoints on the way.

        An interrupt ends the run after the step it comes in, with everything saved.

        Raises:
            TrainingError: a loss is not finite.
            InputError: too much data is broken, or the run's folder cannot be written to.
        """
        config = self.config
        quiet = not self.parallel.is_main
        with (
            RunLog(self.run, config.optim.steps, done=self.step, quiet=quiet) as log,
            self._feed() as feed,
            self._interrupts(),
        ):
            if self.step == 0:
                log.say(self._introduction())
            if self.step == config.optim.steps:
                log.say(f"all {self.step} steps are done already")
            while self.step < config.optim.steps and not self.stopped_by:
                self._recent.steps.append(self.train_step(feed))
                if self._due(config.log_every):
                    self._report(log)
                if self._due(config.dev.every) and self.step > config.labels.steps:
                    self._say_dev(log)
                if config.picture_every and self._due(config.picture_every):
                    self._draw(log)
                if self._due(config.save_every) or self.stopped_by:
                    self.save()
            if self.step == config.optim.steps:
                self.stopped_by = 0
            if self.stopped_by:
                log.say(f"stopped after step {self.step}; go on with --resume")

    def try_one_step(self) -> None:
        """Run a step of each kind and say what the last one costs; the run's folder is left alone.

        Raises:
            TrainingError: a loss is not finite; its batch lies in a folder of its own.
        """
        self.run = Path(tempfile.mkdtemp(prefix="stts_export_dry_run_"))
        with (
            self._scratch(),
            RunLog(self.run, self.config.optim.steps, quiet=not self.parallel.is_main) as log,
        ):
            log.say(self._introduction())
            for step in sorted({self.step, max(self.step, self.config.labels.steps)}):
                self.step, began = step, time.monotonic()
                with self._feed() as feed:
                    shown = self.train_step(feed)
            took = time.monotonic() - began
            log.say(f"one step: loss {shown['loss']:.3f}, {took:.2f} s; nothing was written")

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """Leave no empty folder."""
        try:
            yield
        finally:
            with suppress(OSError):
                self.run.rmdir()

    def train_step(self, feed: Feed) -> dict[str, float]:
        """Do one optimizer step; returns what the log shows of it.

        Raises:
            TrainingError: a loss is not finite; the model is left as it was before the step.
        """
        factor = rate_factor(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        # Of dropout: the same after a resume, and another one in each process.
        state = np.random.SeedSequence((self.config.seed, self.step, self.parallel.rank))
        torch.manual_seed(int(state.generate_state(1)[0]))
        made: Sequence[Example | BrokenClip] = next(feed)
        if self.step < self.config.labels.steps:
            frames = self._single_frames()
            made = frames.examples()
            shown = self._name_windows(frames)
        else:
            shown = self._answer_questions(made)
        norms = {
            name: clip_(parameters, self.config.optim.gradient_clip)
            for name, parameters in self._clipped.items()
            if parameters
        }
        if not all(math.isfinite(norm) for norm in norms.values()):
            raise self._failed(made, {f"gradient of the {name}": n for name, n in norms.items()})
        self.optimizer.step()
        self.step += 1
        shown["gradient_norm"] = norms.get("rest", 0.0)
        shown["scorer_gradient_norm"] = norms.get("scorer", 0.0)
        return {**shown, "rate": factor}

    def _single_frames(self) -> LabelledFrames:
        """This process's share of a step that names windows."""
        config, parallel = self.config, self.parallel
        vision, count = self.start.model.config.vision, config.labels.frames
        return labelled_frames(vision, config.seed, self.step, count, parallel.rank, parallel.world)

    def _name_windows(self, frames: LabelledFrames) -> dict[str, float]:
        """First steps of a model that cannot see yet: what do windows of single frames show?"""
        loss, right = self._wrapped(frames)
        loss = loss / (self.config.labels.frames * self.start.model.config.vision.windows)
        (loss * self.parallel.world).backward()
        sums = self._sums({"loss": loss.item(), "right": right.sum().item(), "seen": len(right)})
        self._check_finite(frames.examples(), {"loss": sums["loss"]})
        return {"loss": sums["loss"], "accuracy": sums["right"] / max(1, sums["seen"])}

    def _answer_questions(self, made: Sequence[Example | BrokenClip]) -> dict[str, float]:
        known = self._broken.count
        examples = self._usable(made)
        own = Counts.of(examples, self.trainee.sequences)
        news = self._broken.count - known
        sums = self._sums({**own.__dict__, "news": news, "clips": len(examples)})
        if sums["news"]:
            self._share_broken()
        weights = self._weights(sums)
        losses: dict[str, float] = defaultdict(float)
        asked = right = tokens = 0.0
        last: Outcome | None = None
        parts = self._micro_batches(examples)
        for index, part in enumerate(parts):
            with self.parallel.no_sync(index + 1 < len(parts)):
                out = self._wrapped(part or [_FILLER], (self.config.seed, self.step))
                terms = {
                    "answer_loss": out.answer * weights["answers"],
                    "similarity_loss": out.similarity * weights["pairs"],
                    "label_loss": out.label * weights["kept"],
                }
                loss = self._total(terms) * (self.parallel.world if part else 0)
                loss.backward()
            if part:
                for name, term in terms.items():
                    losses[name] += term.item()
                asked, right = asked + len(out.correct), right + out.correct.sum().item()
                tokens += out.packed.tokens
                last = out
        totals = self._sums({**_LOSSES, **losses, "asked": asked, "right": right, "tokens": tokens})
        shown = {name: totals[name] for name in _LOSSES}
        self._check_finite(examples, shown)
        return {
            "loss": float(self._total(shown)),
            **{name: value for name, value in shown.items() if self._counts(name)},
            "accuracy": totals["right"] / max(1.0, totals["asked"]),
            "tokens": totals["tokens"],
            "clips": sums["clips"],
            "broken": float(self._broken.count),
            **({} if last is None else _score_statistics(last)),
        }

    def _counts(self, name: str) -> bool:
        return name != "label_loss" or self.config.labels.coefficient > 0

    def _total(self, terms: Mapping[str, Any]) -> Any:
        return (
            terms["answer_loss"]
            + self.config.pruning.similarity_coefficient * terms["similarity_loss"]
            + self.config.labels.coefficient * terms["label_loss"]
        )

    def _weights(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What makes sums over this process means over all."""
        return {name: 1 / max(1.0, sums[name]) for name in ("answers", "pairs", "kept")}

    def _usable(self, made: Sequence[Example | BrokenClip]) -> list[Example]:
        """Leave out what is broken or does not fit, and count it."""
        examples = []
        for one in made:
            found = one if isinstance(one, BrokenClip) else self._unfit(one)
            if found is not None:
                self._broken.add(found)
            elif isinstance(one, Example):
                examples.append(one)
        return examples

    def _share_broken(self) -> None:
        """Count what is broken over all processes; another epoch may bring it to another one."""
        for reasons in self.parallel.gather(self._broken.reasons):
            self._broken.reasons = {**self._broken.reasons, **reasons}
        self._broken.check()

    def _unfit(self, example: Example) -> BrokenClip | None:
        limit = self.config.data.sequence_length
        try:
            length = self.trainee.sequences.length(example)
        except InputError as error:
            return BrokenClip(example.name, error.message)
        if limit and length > limit:
            reason = f"{length} tokens after removal, sequence_length is {limit}"
            return BrokenClip(example.name, reason)
        return None

    def _micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """As many parts on every process, some perhaps empty."""
        size = self.config.data.micro_batch
        starts = range(0, self._share, size)
        return [list(examples[start : start + size]) for start in starts]

    def _check_finite(self, examples: Sequence[Example], losses: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in losses.values()):
            raise self._failed(examples, losses)

    def _failed(
        self, made: Sequence[Example | BrokenClip], losses: Mapping[str, float]
    ) -> Exception:
        examples = [one for one in made if isinstance(one, Example)]
        return non_finite(self.run, self.step, examples, losses, process=self.parallel.rank)

    def _sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up over all processes, and hear whether one of them was interrupted."""
        asked = {number: float(self._signal == number) for number in _SIGNALS}
        sums = self.parallel.sum({**values, **{number.name: asked[number] for number in asked}})
        came = [number for number in _SIGNALS if sums.pop(number.name)]
        self.stopped_by = self.stopped_by or (came[0] if came else 0)
        return sums

    def evaluate(self) -> dict[str, float]:
        """Measure accuracy on the dev clips, by question type, and over all as `accuracy`.

        An answer is right when each of its tokens is the most likely one, given those before it.
        """
        size, kinds = self.config.data.micro_batch, self.dev_set.types
        most = -(-self.dev_set.total // self.parallel.world)
        right: dict[str, float] = defaultdict(float)
        asked: dict[str, float] = defaultdict(float)
        with self._evaluating():
            for start in range(0, most, size):
                part = self.dev_set.examples[start : start + size]
                out = self._wrapped(part or [_FILLER], (self.config.seed,))
                if part:
                    for kind, correct in zip(out.packed.types, out.correct.tolist(), strict=True):
                        right[kind] += correct
                        asked[kind] += 1
        sums = self.parallel.sum(
            {f"{name}/{kind}": counts[kind] for kind in kinds for name, counts in
             (("right", right), ("asked", asked))}
        )  # fmt: skip
        total = {name: sum(sums[f"{name}/{kind}"] for kind in kinds) for name in ("right", "asked")}
        by_type = {
            kind or "untyped": sums[f"right/{kind}"] / sums[f"asked/{kind}"] for kind in kinds
        }
        self.dev = {"accuracy": total["right"] / max(1.0, total["asked"]), **by_type}
        return self.dev

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.trainee.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.trainee.train()

    def save(self) -> Path:
        """Write a checkpoint folder and the state to resume from; drop the oldest folders.

        Raises:
            InputError: the folder cannot be written to; what was saved before is still there.
        """
        folder = self.run / f"step{self.step}"
        model = self.start.model
        save_model(model, self.start, folder, self.description(), self.parallel)
        extra = {
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "dev": self.dev,
            "broken": self._broken.reasons,
            "recent": {"steps": self._recent.steps, "seconds": self._recent.seconds},
        }
        save_state(self.run, self.step, self._wrapped, self.optimizer, extra, self.parallel)
        remove_older(self.run, self.config.keep_checkpoints, self.parallel)
        return folder

    def load(self) -> None:
        """Continue from the newest state of the run.

        Raises:
            InputError: it cannot be read, or belongs to another configuration.
        """
        extra = load_state(self.run, self._wrapped, self.optimizer, self.parallel)
        assert extra is not None
        self.step, self.seconds, self.dev = extra["step"], extra["seconds"], extra["dev"]
        self._broken.reasons = extra["broken"]
        recent = extra["recent"]
        self._recent = _Recent(time.monotonic() - recent["seconds"], recent["steps"])

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint says about its origin (`training.json`)."""
        config = self.config
        return {
            "stts_export": __version__,
            "torch": torch.__version__,
            "machine": machine(),
            "device": str(self.parallel.device),
            "processes": self.parallel.world,
            "threads": config.threads or torch.get_num_threads(),
            "seed": config.seed,
            "steps": self.step,
            "examples": (self.step - min(self.step, config.labels.steps)) * config.data.batch_size,
            "training_seconds": round(self.seconds + self._recent.seconds),
            "parameters": self.parameter_count,
            "dev_accuracy": {"prune_ratio": config.dev.prune_ratio, **self.dev},
            "start": self.start.description,
            "config": config.to_dict(),
        }

    def _feed(self) -> Feed:
        data, parallel = self.config.data, self.parallel

        def positions(step: int) -> range:
            if step < self.config.labels.steps:
                return range(0)
            return step_positions(step, data.batch_size, parallel.rank, parallel.world)

        steps = range(self.step, self.config.optim.steps)
        return Feed(self._make, positions, steps, workers=data.workers)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step in (
            self.config.optim.steps,
            self.config.labels.steps,
        )

    def _report(self, log: RunLog) -> None:
        recent, now = self._recent, time.monotonic()
        self.seconds += now - recent.since

        def write() -> None:
            means = recent.means()
            log.record(self.step, self.seconds, "train", means)
            log.progress(self.step, means, (now - recent.since) / len(recent.steps))

        self.parallel.on_main(write)
        self._recent = _Recent(now)

    def _say_dev(self, log: RunLog) -> None:
        self.evaluate()
        self.parallel.on_main(lambda: log.record(self.step, self.seconds, "dev", self.dev))
        shown = "  ".join(f"{kind} {share:.2f}" for kind, share in self.dev.items())
        ratio = self.config.dev.prune_ratio
        log.say(f"step {self.step}  dev at prune ratio {ratio:g}: {shown}")

    def _draw(self, log: RunLog) -> None:
        """Picture what is kept of a dev clip of the main process; all take part."""
        example = next((one for one in self.dev_set.examples if one.clip is not None), _FILLER)
        with self._evaluating():
            out = self._wrapped([example], (self.config.seed,))

        def draw() -> None:
            scores = out.encoded.scores[0]
            if scores is None or example.clip is None:
                return
            file = picture_file(self.run, self.step)
            grid = self.start.model.config.vision.window_grid
            keep = out.encoded.keeps[0]
            kept_windows_picture(example.clip, scores.float().cpu().numpy(), keep, grid, file)
            log.picture(self.step, file)

        self.parallel.on_main(draw)

    def _introduction(self) -> str:
        training = sum(p.numel() for group in self._clipped.values() for p in group)
        return (
            f"{self.parameter_count} parameters, {training} in training, on "
            f"{self.parallel.world} x {self.parallel.device.type}; {self.config.optim.steps} steps"
        )

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """End after the step in which Ctrl-C or SIGTERM comes; a second one ends at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._signal = number
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        # As nohup and `&` want it.
        before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
        if current_thread() is not main_thread():
            before = {}  # which alone may set handlers
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOSSES = {"answer_loss": 0.0, "similarity_loss": 0.0, "label_loss": 0.0}


def rate_factor(config: TrainConfig, step: int) -> float:
    """Share of the highest rates in the given 0-based step: linear warm-up, then a cosine."""
    optim = config.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.final_share + (1 - optim.final_share) * (1 + math.cos(math.pi * done)) / 2


def _share(config: TrainConfig, world: int) -> int:
    """Examples of a step that each process has."""
    if config.data.batch_size % world:
        raise InputError(
            f"data.batch_size is {config.data.batch_size} for {world} processes",
            where="training configuration",
            allowed=f"a multiple of {world}",
        )
    if config.labels.steps and config.labels.frames < world:
        raise InputError(
            f"labels.frames is {config.labels.frames} for {world} processes",
            where="training configuration",
            allowed=f"{world} or more",
        )
    return config.data.batch_size // world


def _pair(betas: tuple[float, ...]) -> tuple[float, float]:
    return betas[0], betas[1]


def _score_statistics(out: Outcome) -> dict[str, float]:
    """Summarise the scores of later frames, and the kept share of a frame, over pruned clips."""
    pruned = [
        (own[1:].detach().flatten(), keep.mean(1))
        for own, keep in zip(out.encoded.scores, out.encoded.keeps, strict=True)
        if own is not None and len(own) > 1 and not keep.all()
    ]
    if not pruned:
        return {}
    values: Tensor = torch.cat([scores for scores, _ in pruned]).float().cpu()
    kept = np.concatenate([shares for _, shares in pruned])
    low, high = values.quantile(torch.tensor([0.05, 0.95])).tolist()
    return {
        "score_low": low,
        "score_high": high,
        "score_spread": values.std(correction=0).item(),
        "kept_low": float(kept.min()),
        "kept_high": float(kept.max()),
    }


def _check_writable(run: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run).close()
    except OSError as error:
        raise InputError(
            f"cannot be written to: {error.strerror}",
            where=str(run),
            fix="name a folder that you may write to, with --output",
        ) from None


def _check_same(config: TrainConfig, run: Path, state: Path) -> None:
    saved = json_object(state / "state.json").get("extra", {}).get("config")
    if saved is None:
        return  # damaged, which loading it tells
    before, now = _comparable(saved), _comparable(config.to_dict())
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise InputError(
            f"the run was started with another {', '.join(changed)}",
            where=str(run),
            fix="resume with the configuration it was started with, or begin a new run",
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration to two levels, without what a resumed run may change."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _FREE_KEYS:
            flat.update({f"{key}.{inner}": _listed(entry) for inner, entry in value.items()})
        else:
            flat[key] = _listed(value)
    return {key: value for key, value in flat.items() if key not in _FREE_KEYS}


def _listed(value: Any) -> Any:
    """Tuples as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _listed(entry) for key, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value
