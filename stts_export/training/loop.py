"""The training loop: a configuration in, a folder of checkpoints out.

Clips, questions and prune ratios of a step depend on the seed and the step's number alone, so a
run that was interrupted continues exactly as if it had not been.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stts_export._version import __version__
from stts_export.checkpoint import save_checkpoint
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.machine import machine
from stts_export.model.vlm import SttsModel
from stts_export.runtime.prompt import PromptBuilder
from stts_export.training.batches import (
    Example,
    SequenceBuilder,
    dev_examples,
    labelled_frames,
    train_examples,
)
from stts_export.training.clips import TOP_LEVEL
from stts_export.training.config import TrainConfig, model_json
from stts_export.training.objective import StepResult, WindowLabels, label_batch, run_batch
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files

STATE_FILE = "train_state.pt"
LOG_FILE = "log.jsonl"
DEV_RATIO = 0.5
# A run may be resumed under another value of these: they do not change the steps done so far, as
# long as the cooldown has not begun.
_FREE_KEYS = (
    "output", "threads", "log_every", "dev_every", "dev_clips", "keep_checkpoints", "optim.steps",
)  # fmt: skip


def train(
    config_path: Path, output: Path | None = None, resume: bool = False, dry_run: bool = False
) -> Path:
    """Train a model from scratch.

    Args:
        config_path: YAML file; see `TrainConfig`.
        output: folder of the run, in place of the configuration's.
        resume: continue the run in that folder.
        dry_run: check everything and run one step, but write nothing.

    Returns:
        The folder of the run. It holds `stepN/` checkpoints in the Hugging Face format,
        `train_state.pt` to resume from, and `log.jsonl`.

    Raises:
        InputError: the configuration is at fault, the folder already holds a run and `resume` was
            not asked for, or it holds none and `resume` was.
    """
    config = TrainConfig.from_file(config_path)
    run = output or Path(config.output)
    state_file = run / STATE_FILE
    if resume and not state_file.exists():
        raise InputError("holds no run to resume", where=str(run), fix="start without --resume")
    if not (resume or dry_run) and run.exists() and any(run.iterdir()):
        raise InputError(
            "is not empty", where=str(run), fix="pass --resume, or another folder with --output"
        )
    torch.set_num_threads(config.threads)
    trainer = Trainer(config, run)
    if dry_run:
        result = trainer.train_step()
        _say(f"{trainer.parameter_count} parameters, loss {result['loss']:.3f}; nothing written")
        return run
    if resume:
        trainer.load_state(state_file)
    run.mkdir(parents=True, exist_ok=True)
    trainer.fit()
    return run


class Trainer:
    """A model in training, with everything that a checkpoint needs.

    Args:
        config: the run.
        run: its folder; nothing is written before `fit` or `save`.
    """

    def __init__(self, config: TrainConfig, run: Path) -> None:
        self.config = config
        self.run = run
        self.tokenizer, vocab_size = build_tokenizer()
        values = model_json(config.model, vocab_size, config.data.max_frames, DEV_RATIO)
        self.model_config = ModelConfig.from_dict(values, has_scorer=True)
        torch.manual_seed(config.seed)
        self.model = SttsModel(self.model_config)
        self.labels = WindowLabels(
            self.model_config.text.hidden_size,
            self.model_config.vision.windows,
            config.data.max_frames,
        )
        initialise(self.model)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer_files(self.tokenizer, Path(folder), config.data.max_frames)
            prompts = PromptBuilder.from_folder(Path(folder), self.model_config)
        self.sequences = SequenceBuilder(prompts)
        self.optimizer = _optimizer(config, [self.model, self.labels])
        self.step = 0
        self.level = 0
        self.seconds = 0.0
        self.dev: dict[str, float] = {}
        self.dev_level = 0

    @property
    def parameter_count(self) -> int:
        """Parameters of the model, without those used in training only."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def train_step(self) -> dict[str, float]:
        """Do one optimizer step; return what the log shows of it."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        in_first_stage = self.step < self.config.optim.label_steps
        loss, shown = self._label_losses() if in_first_stage else self._answer_losses()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._clip_gradients()
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.item(), "rate": rate, **shown}

    def _clip_gradients(self) -> None:
        """Clip the scorer apart from the rest.

        The bias divides by the spread of a row of scores, so the scorer's gradient has no bound
        where a row is nearly constant; clipped together it would silence everything else.
        """
        assert self.model.vision.scorer is not None
        scorer = list(self.model.vision.scorer.parameters())
        own = {id(parameter) for parameter in scorer}
        both = [*self.model.parameters(), *self.labels.parameters()]
        rest = [parameter for parameter in both if id(parameter) not in own]
        for group in (scorer, rest):
            nn.utils.clip_grad_norm_(group, self.config.optim.gradient_clip)

    def _label_losses(self) -> tuple[Tensor, dict[str, float]]:
        """First stage: what do the windows of single frames show?"""
        batch = labelled_frames(self.config, self.model_config, self.step)
        bfloat16 = self.config.optim.bfloat16
        loss, right = label_batch(self.model.vision, self.labels, batch, bfloat16=bfloat16)
        return loss, {"shape_accuracy": right.float().mean().item()}

    def _answer_losses(self) -> tuple[Tensor, dict[str, float]]:
        """Second stage: questions about clips."""
        config = self.config
        examples = train_examples(config, self.model_config, self.step, self.level)
        result = self._run(examples)
        loss = (
            result.answer_loss
            + config.pruning.similarity_coefficient * result.similarity_loss
            + config.optim.label_coefficient * result.label_loss
        )
        return loss, {
            "answer_loss": result.answer_loss.item(),
            "similarity_loss": result.similarity_loss.item(),
            "label_loss": result.label_loss.item(),
            "accuracy": result.correct.float().mean().item(),
            **_score_statistics(result),
        }

    def fit(self) -> None:
        """Train to the configured number of steps, with evaluations and checkpoints on the way."""
        config = self.config
        recent: list[dict[str, float]] = []
        mark = time.monotonic()
        while self.step < config.optim.steps:
            recent.append(self.train_step())
            stage_ends = self.step in (config.optim.label_steps, config.optim.steps)
            if self.step % config.log_every == 0 or stage_ends:
                now = time.monotonic()
                self.seconds += now - mark
                self._log(recent, (now - mark) / len(recent))
                mark, recent = now, []
            if self.step % config.dev_every == 0 or stage_ends:
                if self.step > config.optim.label_steps:
                    self.evaluate()
                    self._advance_level()
                self.save()

    def evaluate(self) -> dict[str, float]:
        """Measure accuracy on dev clips of the current level at ratio 0.5, by question type."""
        right: dict[str, list[bool]] = defaultdict(list)
        with torch.no_grad():
            for examples in dev_examples(self.config, self.model_config, self.level, DEV_RATIO):
                result = self._run(examples)
                for kind, correct in zip(result.types, result.correct.tolist(), strict=True):
                    right[kind].append(correct)
        self.dev = {kind: sum(answers) / len(answers) for kind, answers in sorted(right.items())}
        self.dev_level = self.level
        self._record({"dev": self.dev, "level": self.level})
        shown = "  ".join(f"{kind} {share:.2f}" for kind, share in self.dev.items())
        _say(f"step {self.step}  dev at level {self.level}: {shown}")
        return self.dev

    def save(self) -> Path:
        """Write a checkpoint folder and the state to resume from; drop the oldest folders."""
        folder = self.run / f"step{self.step}"
        partial = self.run / f"step{self.step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_checkpoint(self.model, partial)
        save_tokenizer_files(self.tokenizer, partial, self.config.data.max_frames)
        text = json.dumps(self.description(), indent=2) + "\n"
        (partial / "training.json").write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "level": self.level,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "labels": self.labels.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.run / f"{STATE_FILE}.partial")
        os.replace(self.run / f"{STATE_FILE}.partial", self.run / STATE_FILE)
        for old in _step_folders(self.run)[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        return folder

    def load_state(self, path: Path) -> None:
        """Continue from a state that `save` wrote.

        Raises:
            InputError: it cannot be read, or belongs to another configuration.
        """
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises whatever the unpickler meets
            raise InputError(f"cannot be read: {error}", where=str(path)) from None
        saved, own = _comparable(state["config"]), _comparable(self.config.to_dict())
        changed = sorted(key for key in own if saved.get(key) != own[key])
        if changed:
            raise InputError(
                f"the run was started with another {', '.join(changed)}",
                where=str(path),
                fix="resume with the configuration it was started with, or begin a new run",
            )
        self.model.load_state_dict(state["model"])
        self.labels.load_state_dict(state["labels"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.level = state["step"], state["level"]
        self.seconds = state["seconds"]

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint says about its origin (`training.json`)."""
        return {
            "stts_export": __version__,
            "torch": torch.__version__,
            "machine": machine(),
            "threads": self.config.threads,
            "seed": self.config.seed,
            "steps": self.step,
            "clips": self.step * self.config.data.clips_per_step,
            "training_seconds": round(self.seconds),
            "parameters": self.parameter_count,
            "dev_accuracy": {"prune_ratio": DEV_RATIO, "level": self.dev_level, **self.dev},
            "config": self.config.to_dict(),
        }

    def _run(self, examples: Sequence[Example]) -> StepResult:
        bfloat16 = self.config.optim.bfloat16
        return run_batch(self.model, self.labels, self.sequences, examples, bfloat16=bfloat16)

    def _advance_level(self) -> None:
        """Begin the next level when this one is mastered, or when it is time."""
        if self.level == TOP_LEVEL:
            return
        mean = sum(self.dev.values()) / len(self.dev)
        late = self.step >= self.config.data.advance_after[self.level]
        if mean >= self.config.data.advance_at or late:
            self.level += 1
            _say(f"step {self.step}  level {self.level} begins (mean dev accuracy {mean:.2f})")

    def _log(self, recent: Sequence[Mapping[str, float]], pace: float) -> None:
        means = {key: float(np.mean([entry[key] for entry in recent])) for key in recent[0]}
        means["seconds_per_step"] = pace
        self._record({"level": self.level, **means})
        minutes = (self.config.optim.steps - self.step) * pace / 60
        _say(
            f"step {self.step}/{self.config.optim.steps}  level {self.level}"
            f"  {_summary(means)}  {pace:.2f} s/step  {minutes:.0f} min left"
        )

    def _record(self, values: Mapping[str, Any]) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        with (self.run / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": self.step, "seconds": self.seconds, **values}) + "\n")


def initialise(model: SttsModel) -> None:
    """Draw weights from torch's generator.

    The scorer's last layer begins at weight 0 and bias -3: scores then start equal and small, and
    do not saturate before the similarity loss has spread them.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.05
            if "embedding" not in name:
                residual = name.endswith(
                    ("wo.weight", "w2.weight", "attn_out.weight", "ff_out.weight")
                )
                std = (0.5 if residual else 1.0) / parameter.shape[1] ** 0.5
            if name.endswith("positional"):
                std = 0.2
            nn.init.trunc_normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    scorer = model.vision.scorer
    if scorer is not None:
        nn.init.zeros_(scorer.w3.weight)
        nn.init.constant_(scorer.w3.bias, -3.0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the given 0-based step: linear warm-up, constant, linear descent."""
    optim = config.optim
    warm = (step + 1) / max(1, optim.warmup_steps)
    cool = (optim.steps - step) / (optim.cooldown_share * optim.steps)
    return optim.learning_rate * min(1.0, warm, cool)


def _optimizer(config: TrainConfig, modules: Sequence[nn.Module]) -> torch.optim.AdamW:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": config.optim.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.optim.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def _score_statistics(result: StepResult) -> dict[str, float]:
    """Summarise the scores of later frames, and the kept share of a frame, over a batch."""
    scores = torch.cat([own[1:].detach().flatten() for own in result.encoded.scores])
    shares = [keep.float().mean(1) for keep in result.encoded.keeps if not bool(keep.all())]
    kept = torch.cat(shares) if shares else torch.ones(1)
    low, high = scores.quantile(torch.tensor([0.05, 0.95])).tolist()
    return {
        "score_low": low,
        "score_high": high,
        "score_spread": scores.std().item(),
        "kept_low": kept.min().item(),
        "kept_high": kept.max().item(),
    }


def _summary(means: Mapping[str, float]) -> str:
    """Write the part of a progress line that differs between the stages."""
    if "answer_loss" not in means:
        return f"labels: loss {means['loss']:.3f}  shape {means['shape_accuracy']:.2f}"
    return (
        f"loss {means['loss']:.3f} (answer {means['answer_loss']:.3f}"
        f" similarity {means['similarity_loss']:.4f} label {means['label_loss']:.3f})"
        f"  accuracy {means['accuracy']:.2f}"
        f"  scores {means['score_low']:.3f}..{means['score_high']:.3f}"
        f" spread {means['score_spread']:.3f}"
        f"  kept/frame {means['kept_low']:.2f}..{means['kept_high']:.2f}"
    )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration, without what a resumed run may change."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": entry for inner, entry in value.items()})
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if key not in _FREE_KEYS}


def _step_folders(run: Path) -> list[Path]:
    steps = [
        (int(match[1]), child)
        for child in run.iterdir()
        if (match := re.fullmatch(r"step(\d+)", child.name))
    ]
    return [child for _, child in sorted(steps)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
