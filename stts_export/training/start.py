"""What a run begins with, which of it learns, and how it leaves.

The weights of a start depend on the configuration alone: new ones are drawn from its seed, without
torch's own generator, and loaded ones from nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from stts_export.checkpoint import Checkpoint, StoredTensor, model_from_checkpoint, open_checkpoint
from stts_export.checkpoint.huggingface import SINGLE
from stts_export.checkpoint.names import checkpoint_name
from stts_export.checkpoint.writing import save_tensors
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.model.pruning import Scorer
from stts_export.model.vlm import SttsModel
from stts_export.runtime.prompt import PromptBuilder
from stts_export.training.config import StartSettings, TrainConfig, model_json
from stts_export.training.folders import whole_folder
from stts_export.training.lora import add_lora, is_adapter, whole_parameters
from stts_export.training.parallel import Parallel
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files

_DEFAULT_PRUNE_AT = 3
# Written anew with every checkpoint.
_OWN_FILES = ("config.json", "training.json")


@dataclass(frozen=True)
class Start:
    """A model before its first step, and what its checkpoints need besides weights."""

    model: SttsModel
    """fp32, on the CPU, in training mode; with adapters for `train: lora`."""
    config_files: Mapping[str, str]
    """Name -> text of the tokenizer, processor and licence files."""
    description: Mapping[str, Any]
    """Where it came from, for `training.json`."""

    def write_config_files(self, folder: Path) -> None:
        """Write the tokenizer, processor and licence files into a folder."""
        for name, text in self.config_files.items():
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))

    def prompts(self) -> PromptBuilder:
        """Return what makes token sequences for this model.

        Raises:
            InputError: the tokenizer does not fit the model.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.write_config_files(folder)
            try:
                return PromptBuilder.from_folder(folder, self.model.config)
            except InputError as error:
                where = (error.where or "").replace(str(folder), str(self.description["from"]))
                raise InputError(
                    error.message, where=where, allowed=error.allowed, fix=error.fix
                ) from None


def start_from(config: TrainConfig) -> Start:
    """Make or load the model of a run; parameters that it leaves as they are, are frozen.

    Raises:
        InputError: the checkpoint cannot be read, is of another architecture, has no tokenizer, or
            does not fit the configuration.
        MissingDependencyError: a package for hub downloads or adapters is not installed.
    """
    start = _from_checkpoint(config) if config.start.checkpoint else _from_scratch(config)
    if config.start.train == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            add_lora(start.model, config.start.lora)
    freeze(start.model, None, config)
    start.model.train()
    return start


def save_model(
    model: SttsModel,
    start: Start,
    folder: Path,
    description: Mapping[str, Any],
    parallel: Parallel,
) -> None:
    """Write a checkpoint in the Hugging Face format, adapters merged; all processes call it.

    Sharded tensors are gathered one by one, and one process writes.

    Args:
        model: of a run that began with `start`.
        start: whose files are written beside the weights.
        folder: `stepN`; replaced if it exists, when the new one is whole.
        description: what `training.json` says.
        parallel: the processes.

    Raises:
        InputError: the disk is full or cannot be written to, or weights are no numbers; what was
            there before stays.
    """
    parallel.reshard()
    with whole_folder(folder, parallel) as partial:
        tensors = [
            StoredTensor(
                checkpoint_name(whole.name), whole.shape, whole.dtype, folder / SINGLE, whole.load
            )
            for whole in whole_parameters(model)
        ]
        _save_together(tensors, model.config, partial, parallel)
        if parallel.is_main:
            start.write_config_files(partial)
            text = json.dumps(description, indent=2) + "\n"
            (partial / "training.json").write_text(text, encoding="utf-8")


def _save_together(
    tensors: list[StoredTensor], config: ModelConfig, folder: Path, parallel: Parallel
) -> None:
    """Write in the main process; the others take part in loading, whether it fails or not."""
    waiting = iter(tensors)

    def load() -> torch.Tensor:
        return next(waiting).load()

    try:
        if parallel.is_main:
            in_turn = [
                StoredTensor(tensor.name, tensor.shape, tensor.dtype, tensor.file, load)
                for tensor in tensors
            ]
            save_tensors(in_turn, config, folder)
    finally:
        if parallel.world > 1:
            for tensor in waiting:
                tensor.load()


def freeze(model: SttsModel, labels: nn.Module | None, config: TrainConfig) -> None:
    """Let only those parameters have gradients that the configuration trains.

    Comes before copies are made of the model (`Parallel.wrap`).
    """
    rates = _rates(config)
    for part, name, parameter in _parameters(model, labels):
        included = {
            "all": True,
            "scorer": part == "scorer",
            "lora": part in ("scorer", "labels") or is_adapter(name),
        }
        parameter.requires_grad_(rates[part] > 0 and included[config.start.train])


def trainable_groups(
    model: SttsModel, labels: nn.Module | None, config: TrainConfig
) -> list[dict[str, Any]]:
    """Group what learns, for AdamW, and freeze the rest.

    Args:
        model: as it will be trained: under FSDP after `Parallel.wrap`.
        labels: heads that exist in training only; they learn at the decoder's rate.
        config: rates of the parts, weight decay, and what is trained.

    Returns:
        Groups with the keys "params", "weight_decay" (0 for vectors and scalars), "name" (language,
        vision, connector, scorer or labels) and "rate", the highest learning rate. A part has up
        to two, and none if it is frozen.

    Raises:
        InputError: nothing learns.
    """
    freeze(model, labels, config)
    groups: list[dict[str, Any]] = []
    for part, rate in _rates(config).items():
        own = [
            parameter
            for owner, _, parameter in _parameters(model, labels)
            if owner == part and parameter.requires_grad
        ]
        matrices = [parameter for parameter in own if parameter.dim() >= 2]
        others = [parameter for parameter in own if parameter.dim() < 2]
        for params, decay in ((matrices, config.optim.weight_decay), (others, 0.0)):
            if params:
                groups.append({"params": params, "weight_decay": decay, "name": part, "rate": rate})
    if not groups:
        raise InputError(
            f"nothing is trained: {config.optim.rates} with start.train: {config.start.train}",
            where="training configuration",
            fix="give a part that start.train includes a rate in optim.rates",
        )
    return groups


def initialise(model: SttsModel, generator: torch.Generator) -> None:
    """Draw all weights; norms stay as they are, at one."""
    for name, parameter in model.named_parameters():
        if name.startswith("vision.scorer."):
            continue
        if parameter.dim() == 2:
            std = _std(name, parameter)
            if "embedding" in name:
                std = 0.2 if name.endswith("positional") else 0.05
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if model.vision.scorer is not None:
        initialise_scorer(model.vision.scorer, generator)


def initialise_scorer(scorer: Scorer, generator: torch.Generator) -> None:
    """Draw a scorer's weights.

    Its last layer begins at weight 0 and bias -3: scores then start equal and small, and do not
    saturate before the similarity loss has spread them.
    """
    for name, parameter in scorer.named_parameters():
        if parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=_std(name, parameter), generator=generator)
        else:
            nn.init.zeros_(parameter)
    nn.init.zeros_(scorer.w3.weight)
    nn.init.constant_(scorer.w3.bias, -3.0)


def _std(name: str, matrix: nn.Parameter) -> float:
    """Of a matrix (out, in): in^-1/2, and half of it where the result is added to its input."""
    residual = name.endswith(("wo.weight", "w2.weight", "attn_out.weight", "ff_out.weight"))
    return (0.5 if residual else 1.0) / float(matrix.shape[1]) ** 0.5


def _rates(config: TrainConfig) -> dict[str, float]:
    rates = config.optim.rates
    return {
        "language": rates.language,
        "vision": rates.vision,
        "connector": rates.connector,
        "scorer": rates.scorer,
        "labels": rates.language,
    }


def _parameters(model: SttsModel, labels: nn.Module | None) -> list[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) of everything."""
    found = []
    for name, parameter in model.named_parameters():
        tower, inner, *_ = name.split(".")
        part = inner if tower == "vision" and inner in ("scorer", "connector") else tower
        found.append((part, name, parameter))
    named = [] if labels is None else labels.named_parameters()
    return found + [("labels", name, parameter) for name, parameter in named]


def _from_scratch(config: TrainConfig) -> Start:
    tokenizer, vocab_size = build_tokenizer()
    frames = config.data.max_frames
    values = model_json(config.model, vocab_size, frames, config.pruning.trained_ratio)
    values["vit_config"]["prune"] = config.model.scorer
    with torch.random.fork_rng(devices=[]):
        model = SttsModel(ModelConfig.from_dict(values, has_scorer=config.model.scorer))
    initialise(model, _generator(config))
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer_files(tokenizer, folder, frames)
        texts = {file.name: _text(file) for file in sorted(folder.iterdir())}
    return Start(model, texts, {"from": "scratch"})


def _from_checkpoint(config: TrainConfig) -> Start:
    settings = config.start
    checkpoint = open_checkpoint(settings.checkpoint, revision=settings.revision or None)
    if "tokenizer.json" not in checkpoint.config_files:
        raise InputError(
            "holds no tokenizer.json",
            where=str(checkpoint.folder),
            fix="copy the tokenizer files of its model into it, or make a folder that has both: "
            "stts-export convert CHECKPOINT -o FOLDER --tokenizer NAME",
        )
    fresh = settings.fresh_scorer or not checkpoint.has_scorer
    model_config = _pruning_config(checkpoint, config, fresh)
    state = model_from_checkpoint(checkpoint).state_dict()
    with torch.device("meta"):
        model = SttsModel(model_config)
    scorer = model.vision.scorer
    assert scorer is not None
    if fresh:
        scorer.to_empty(device="cpu")
        initialise_scorer(scorer, _generator(config))
        own = {f"vision.scorer.{name}": value for name, value in scorer.state_dict().items()}
        state = {**state, **own}
    model.load_state_dict(state, assign=True)
    language = model.language
    tied = torch.equal(language.lm_head.weight, language.embedding)
    if tied:  # folders of tied models hold a copy and do not say so (spec 3.3): they learn as one
        language.lm_head.weight = language.embedding
    texts = {
        name: source if isinstance(source, str) else _text(source)
        for name, source in checkpoint.config_files.items()
        if name not in _OWN_FILES
    }
    pruning = model_config.vision.pruning
    assert pruning is not None
    description = {
        "from": checkpoint.name,
        "scorer": "fresh" if fresh else "of the checkpoint",
        "prune_at": pruning.prune_at,
        "tied_head": tied,
        "train": settings.train,
    }
    return Start(model, texts, description)


def _pruning_config(checkpoint: Checkpoint, config: TrainConfig, fresh: bool) -> ModelConfig:
    """Return the checkpoint's configuration, with a scorer and the ratio of the run."""
    values = deepcopy(checkpoint.config.extra)
    vit = values["vision_config" if "vision_config" in values else "vit_config"]
    prune_at = _prune_at(checkpoint, config.start, vit.get("prune_at", _DEFAULT_PRUNE_AT), fresh)
    vit.setdefault("rescale_bias_min", math.exp(-2))
    vit.update(
        prune=True,
        prune_method="scorer",
        prune_at=prune_at,
        topk=config.pruning.trained_ratio,
        prune_from_frame=0,
        pruning_in_scorer=True,
    )
    where = str(checkpoint.folder / "config.json")
    return ModelConfig.from_dict(values, has_scorer=True, where=where)


def _prune_at(checkpoint: Checkpoint, settings: StartSettings, stored: int, fresh: bool) -> int:
    asked = settings.prune_at if settings.prune_at >= 0 else stored
    if not fresh and asked != stored:
        raise InputError(
            f"start.prune_at is {asked}, and the checkpoint's scorer was trained at {stored}",
            where="training configuration",
            allowed=f"{stored}, or -1",
            fix="add fresh_scorer: true to begin with a new one",
        )
    taps = checkpoint.config.vision.taps
    if min(taps) <= asked + 1:
        raise InputError(
            f"start.prune_at is {asked}" + (" by default" if settings.prune_at < 0 else ""),
            where="training configuration",
            allowed=f"0 to {min(taps) - 2}: the connector reads blocks {taps}, all of which must "
            "lie above prune_at + 1",
        )
    return asked


def _text(file: Path) -> str:
    """Return a file's bytes as text that `write_config_files` turns back into them."""
    try:
        return file.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from None


def _generator(config: TrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)
