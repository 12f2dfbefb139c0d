"""Run a written graph in ONNX Runtime beside the PyTorch module it was traced from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export.calibration.layers import LayerQuantization, Numerics
from stts_export.calibration.rounding import rounded_model
from stts_export.engines import onnxruntime
from stts_export.engines.plugin import PLUGIN_NAME
from stts_export.errors import VerificationError
from stts_export.graphs.cache import round_cache
from stts_export.graphs.modules import module_for
from stts_export.graphs.split import PAIRS
from stts_export.graphs.substitute import substitute
from stts_export.model.pruning import n_prune, pack, select
from stts_export.model.vision import VisionTower
from stts_export.model.vlm import SttsModel
from stts_export.probe import CHECKED_FRAMES, moving_clip
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DATA_FILE,
    DECODER,
    DECOMPOSED,
    GATHER_WINDOWS,
    SELECT_PACK,
    SPLIT,
    VISION_LOWER,
    VISION_UPPER_FRAMES,
    GraphSpec,
    Precision,
    past_names,
    variant,
)
from stts_export.tolerances import TIMES_NOISE, TOLERANCES, difference, quantised_row

_SEED = 20260318
_FP32 = "build with --precision fp32"
_PRUNE_RATIO = 0.5
_PROMPT, _CAPACITY = 17, 23
_TURN = 5  # tokens of the prompt that decoder-split takes at a time; the last turn has fewer


def check_graph(
    spec: GraphSpec,
    numerics: Numerics,
    file: Path,
    model: SttsModel,
) -> None:
    """Compare a graph with the fp32 PyTorch model at several shapes.

    A quantised graph is compared with the model whose layers round as it does (`rounded_model`):
    how far that is from fp32 is what gates are about.

    `gather_windows` is compared with NumPy. `select_pack` is one node that only TensorRT with the
    plugin can run: what is checked is that it has the contract's tensors in their order.

    Raises:
        VerificationError: an output is further away than `tolerances` allows.
    """
    if spec.name == SELECT_PACK:
        _check_plugin_node(spec, file)
        return
    runner, is_substitute = _opened(spec, file)
    if spec.name == GATHER_WINDOWS:
        _check_gather(spec, runner, model)
        return
    graph, _, variant = spec.name.partition("-")
    precision = numerics.precision
    checked = _Checked(spec.name, precision)
    if (numerics.layers or numerics.cache) and _has_scales(file):
        rounded = rounded_model(model, _as_run(numerics.layers, is_substitute), precision)
        if numerics.cache is not None:
            round_cache(rounded, numerics.cache, precision)
        checked = _Checked(spec.name, quantised_row(precision), rounded)
    with torch.no_grad():
        if graph == DECODER:
            _check_decoder(spec, precision, checked, runner, model)
            return
        for inputs in _cases(spec, model):
            given = {t.name: inputs[t.name].numpy().astype(t.dtype) for t in spec.inputs}
            got = runner(given)

            name = graph if variant == DECOMPOSED else spec.name
            checked.compare(got, partial(_results, spec, name, inputs, got), model)


def _as_run(
    layers: Mapping[str, LayerQuantization], is_substitute: bool
) -> Mapping[str, LayerQuantization]:
    """Layers as ONNX Runtime runs them: it does not round inputs to 4 bits."""
    if not is_substitute:
        return layers
    return {
        name: replace(how, input_scale=None) if how.format == "nvfp4" else how
        for name, how in layers.items()
    }


def _results(
    spec: GraphSpec,
    name: str,
    inputs: Mapping[str, Tensor],
    got: Mapping[str, NDArray[Any]],
    model: SttsModel,
) -> dict[str, Tensor]:
    """What a model gives for a graph's outputs, the graph's own scores given."""
    if "scores" in got:
        return _lower(model.vision, inputs, torch.from_numpy(got["scores"]))
    outputs = module_for(name, model)(*(inputs[tensor.name] for tensor in spec.inputs))
    return dict(zip((tensor.name for tensor in spec.outputs), outputs, strict=True))


@dataclass(frozen=True)
class _Checked:
    """What a graph's outputs are compared with."""

    graph: str
    row: str
    """Of `TOLERANCES`."""
    rounded: SttsModel | None = None
    """Rounds as a quantised graph does."""

    def compare(
        self,
        got: Mapping[str, NDArray[Any]],
        results: Callable[[SttsModel], Mapping[str, Tensor]],
        model: SttsModel,
    ) -> None:
        """Compare with what a model gives; refuse what is too far from it."""
        exact = results(model)
        expected = exact if self.rounded is None else results(self.rounded)
        for name, reference in expected.items():
            tolerance = TOLERANCES[name, self.row]
            off = difference(got[name], reference.numpy(), tolerance.measure)
            noise = difference(reference.numpy(), exact[name].numpy(), tolerance.measure)
            limit = max(tolerance.limit, TIMES_NOISE * noise)
            if not off <= limit:
                raise VerificationError(
                    f"{name} {got[name].shape} differs from PyTorch by {off:.2g} "
                    f"({tolerance.measure})",
                    where=f"{self.graph} ({self.row})",
                    allowed=f"{limit:.2g}: {tolerance.reason}",
                    fix="report this export" if self.row == "fp32" else _FP32,
                )


def _has_scales(file: Path) -> bool:
    """Whether a graph rounds to a format."""
    return any(node.op_type == "DequantizeLinear" for node in ir.load(file).graph)


def _lower(tower: VisionTower, inputs: Mapping[str, Tensor], scores: Tensor) -> dict[str, Tensor]:
    """Outputs of `vision_lower`, what comes after the scores given the graph's own.

    The bias magnifies rounding of scores where a row of them is nearly constant.
    """
    x = tower.before_scoring(inputs["frames"])
    expected, last_pooled = tower.score(x, inputs["fresh"], inputs["prev_pooled"])
    hidden = tower.after_scoring(x, scores, inputs["fresh"])
    return {"hidden": hidden, "scores": expected, "last_pooled": last_pooled}


def _opened(spec: GraphSpec, file: Path) -> tuple[onnxruntime.Runner, bool]:
    """Open a graph; `decoder-split` with turns so short that the prompt takes several.

    Returns:
        What runs it, and whether that is a substitute for formats without kernels.
    """
    model = ir.load(file)
    is_split = spec.name == variant(DECODER, SPLIT)
    if is_split:
        pairs = model.graph.initializers[PAIRS]
        pairs.const_value = ir.tensor(np.array([_TURN * _CAPACITY]), name=PAIRS)
    if substitute(model):
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder) / file.name
            ir.save(model, whole, external_data=DATA_FILE)
            return onnxruntime.open_graph(whole, lean=True), True
    if not is_split:
        return onnxruntime.open_graph(file, lean=True), False
    # Beside the other, so that it finds its weights.
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=file.suffix) as short:
        ir.save(model, short.name)
        return onnxruntime.open_graph(Path(short.name), lean=True), False


def _check_plugin_node(spec: GraphSpec, file: Path) -> None:
    nodes = [
        (node.op_type, [v and v.name for v in node.inputs], [v.name for v in node.outputs])
        for node in ir.load(file).graph
    ]
    inputs, outputs = ([tensor.name for tensor in side] for side in (spec.inputs, spec.outputs))
    if nodes != [(PLUGIN_NAME, inputs, outputs)]:
        raise VerificationError(
            f"has {nodes}",
            where=spec.name,
            allowed=f"one {PLUGIN_NAME} from {inputs} to {outputs}",
            fix="report this export",
        )


def _check_gather(spec: GraphSpec, runner: onnxruntime.Runner, model: SttsModel) -> None:
    rng = np.random.default_rng(_SEED)
    vision = model.config.vision
    W, D = vision.windows, vision.hidden_size
    hidden = rng.standard_normal((CHECKED_FRAMES, W * vision.patches_per_window, D))
    hidden = hidden.astype(spec.inputs[0].dtype)
    plan = rng.integers(0, CHECKED_FRAMES * W, (CHECKED_FRAMES - 2, W), dtype=np.int32)
    got = runner({"hidden": hidden, "gather_window": plan})["bins"]
    expected = hidden.reshape(CHECKED_FRAMES * W, -1)[plan].reshape(len(plan), -1, D)
    if not np.array_equal(got, expected):
        raise VerificationError(
            f"bins {got.shape} are other windows than the plan says",
            where=spec.name,
            allowed="exactly the gathered rows",
            fix="report this export",
        )


def _cases(spec: GraphSpec, model: SttsModel) -> Iterator[dict[str, Tensor]]:
    """Inputs of several sizes; of a decomposed form one, as its original has passed them all."""
    generator = torch.Generator().manual_seed(_SEED)
    graph, _, variant = spec.name.partition("-")
    first = -1 if variant == DECOMPOSED else 0
    vision = model.config.vision
    W, G = vision.windows, vision.patches_per_window
    frames = torch.from_numpy(moving_clip(CHECKED_FRAMES, vision.image_size))
    if graph == VISION_LOWER:
        prev = torch.zeros(1, W, vision.hidden_size)
        for start, stop in ((0, 1), (0, CHECKED_FRAMES), (2, 4))[first:]:
            fresh = torch.arange(start, stop) == 0
            if vision.pruning and start > 0:
                before = model.vision.before_scoring(frames[start - 1 : start])
                _, prev = model.vision.score(before, torch.tensor([True]), prev)
            yield {"frames": frames[start:stop], "fresh": fresh, "prev_pooled": prev}
        return
    if graph == CONNECTOR:
        yield from _pooled(spec, generator)
        return
    hidden = model.vision.lower_plain(frames)
    if spec.name == VISION_UPPER_FRAMES:
        for count, slots in ((1, 1), (3, (W + 1) // 2), (2, W)):
            yield {"bins": hidden[:count, : slots * G]}
        return
    scores = torch.rand(CHECKED_FRAMES, W, generator=generator)
    plan = pack(select(scores, n_prune(W, CHECKED_FRAMES, _PRUNE_RATIO)))
    bins = hidden.unflatten(1, (W, G)).flatten(0, 1)[plan.gather_window].flatten(1, 2)
    for count in sorted({1, len(bins)})[first:]:
        yield {"bins": bins[:count], "segment": plan.segment[:count]}


def _pooled(spec: GraphSpec, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Tokens of patches from anywhere, some with patches missing: with -1 in any place."""
    patches, pooled = spec.inputs
    for rows, tokens in ((1, 1), (54, 20)):
        index = torch.randint(0, rows, (tokens, int(pooled.shape[1])), generator=generator)
        missing = torch.rand(index.shape, generator=generator) < 0.3
        missing[:, -1] &= ~missing.all(1)
        features = torch.randn(rows, int(patches.shape[1]), generator=generator)
        yield {
            "patches": features,
            "pooled_patches": torch.where(missing, -1, index).to(torch.int32),
        }


def _last_logits(
    logits: Callable[[SttsModel], Tensor], token: int, model: SttsModel
) -> dict[str, Tensor]:
    return {"logits": logits(model)[:, token]}


def _check_decoder(
    spec: GraphSpec,
    precision: Precision,
    checked: _Checked,
    runner: onnxruntime.Runner,
    model: SttsModel,
) -> None:
    """Prefill a prompt with visual tokens, then decode token by token on the graph's own cache."""
    generator = torch.Generator().manual_seed(_SEED)
    text, tokens = model.config.text, model.config.tokens
    prompt, total, patches = _PROMPT, 20, 5
    ids = torch.randint(0, text.vocab_size, (1, total), generator=generator)
    ids[0, 1 : patches + 3] = tokens.im_patch
    ids[0, 1], ids[0, patches + 2] = tokens.frame_start, tokens.frame_end
    groups = model.visual_groups(ids)
    features = torch.randn(patches, text.hidden_size, generator=generator)
    # With a gap, so that positions taken from the order of tokens would be found out.
    positions = torch.arange(total)[None] + 2 * (torch.arange(total) > patches)

    @cache
    def logits(model: SttsModel) -> Tensor:
        return model.language(ids, features, groups, positions)

    dtype = ACTIVATION[precision]
    cache_shape = (1, text.num_kv_heads, _CAPACITY, text.head_dim)
    caches = [np.zeros(cache_shape, tensor.dtype) for tensor in spec.outputs[1:]]
    names = [name for layer in range(text.num_layers) for name in past_names(layer)]
    rows = features.numpy().astype(dtype)
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        call = {
            "input_ids": ids[:, start:stop].numpy(),
            "features": rows,
            "visual_group": groups[:, start:stop].numpy().astype(np.int32),
            "position_ids": positions[:, start:stop].numpy(),
            "cache_position": np.array([start]),
        }
        got = runner({**call, **dict(zip(names, caches, strict=True))})
        checked.compare(got, partial(_last_logits, logits, stop - 1), model)
        caches = [got[tensor.name] for tensor in spec.outputs[1:]]
        rows = np.zeros((1, text.hidden_size), dtype)
