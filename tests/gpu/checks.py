"""What a session on engines must do, on a GPU or on the stand-ins of one."""

from __future__ import annotations

from typing import Any

import numpy as np

from stts_export import Session
from stts_export.engines.cuda import DeviceArray
from stts_export.runtime import planner
from stts_export.tensors import (
    ACTIVATION,
    DECODER,
    LOWER_CHUNK,
    UPPER_LADDER,
    VISION_LOWER,
    VISION_UPPER,
    past_names,
    present_names,
)
from stts_export.tolerances import TOLERANCES, difference
from tests.gpu.kit import NEW_TOKENS, Expected, clip_frames, prompt_ids


def check_results(session: Session, expected: Expected, ratio: float) -> None:
    """Scores, windows, features, logits and tokens against ONNX Runtime's."""
    precision = session.bundle.manifest.precision
    frames = clip_frames(session)
    clip = session.encode(frames, ratio)
    assert clip.scores is not None
    # The engine's selection is the planner's on the engine's own scores, whatever their rounding.
    windows = session.config.vision.windows
    removed = planner.n_prune(windows, len(frames), ratio)
    np.testing.assert_array_equal(clip.keep, planner.select(clip.scores, removed))
    keep = expected[f"{ratio}/keep"]
    if precision == "fp32":
        np.testing.assert_array_equal(clip.keep, keep)
    else:
        assert (clip.keep != keep).mean() <= 0.005
    if not np.array_equal(clip.keep, keep):
        clip = session.encode(frames, keep=keep)
    assert clip.scores is not None
    prompt = prompt_ids(session)
    got = {
        "scores": clip.scores,
        "packed_features": clip.features,
        "logits": session.next_token_logits(clip, prompt),
    }
    for name, value in got.items():
        limit = TOLERANCES[name, precision]
        reference = expected[f"{ratio}/{name.removeprefix('packed_')}"]
        off = difference(value, reference, limit.measure)
        assert off <= limit.limit, f"{name} is off by {off:.2g} ({limit.measure})"
    if precision == "fp32":
        tokens = session.generate(clip, prompt, NEW_TOKENS).token_ids
        assert tokens == expected[f"{ratio}/tokens"].tolist()


def check_graph_capture(session: Session) -> None:
    """Lower, upper at every step of the ladder, and decode: captured, replayed, the same."""
    for name, inputs, outputs in _calls(session):
        runner, stream = session.runners[name], next(iter(outputs.values())).stream
        runner(inputs, outputs)  # sizes every buffer, and sets shapes
        direct = {key: array.to_host() for key, array in outputs.items()}
        with stream.capture() as graph:
            runner(inputs, outputs)
        for array in outputs.values():
            array.zero()
        graph.launch(stream)
        for key, array in outputs.items():
            np.testing.assert_array_equal(array.to_host(), direct[key], err_msg=f"{name} {key}")
        graph.close()


def _calls(session: Session) -> list[tuple[str, dict[str, Any], dict[str, DeviceArray]]]:
    """Inputs and outputs in device memory, by graph; outputs apart from inputs."""
    config, rng = session.config, np.random.default_rng(3)
    vision, text = config.vision, config.text
    dtype = ACTIVATION[session.bundle.manifest.precision]
    W, D = vision.windows, vision.hidden_size
    patches = W * vision.patches_per_window
    frames = min(LOWER_CHUNK, session.bundle.manifest.limits.max_frames)

    def empty(name: str, shape: tuple[int, ...], kind: Any) -> DeviceArray:
        array: DeviceArray = session.runners[name].zeros(shape, kind)
        return array

    def filled(name: str, values: Any) -> DeviceArray:
        array = empty(name, values.shape, values.dtype)
        array.copy_from_host(values)
        return array

    pictures = clip_frames(session)[:frames]
    calls = [
        (
            VISION_LOWER,
            {
                "frames": filled(VISION_LOWER, pictures),
                "fresh": filled(VISION_LOWER, np.arange(frames) == 0),
                "prev_pooled": empty(VISION_LOWER, (1, W, D), "float32"),
            },
            {
                "hidden": empty(VISION_LOWER, (frames, patches, D), dtype),
                "scores": empty(VISION_LOWER, (frames, W), "float32"),
                "last_pooled": empty(VISION_LOWER, (1, W, D), "float32"),
            },
        )
    ]
    for bins in (step for step in UPPER_LADDER if step <= frames):
        rows = rng.standard_normal((bins, patches, D)).astype(dtype)
        segment = np.repeat(np.arange(bins, dtype=np.int32)[:, None], W, axis=1)
        packed = empty(VISION_UPPER, (bins, W, text.hidden_size), dtype)
        tapped = empty(VISION_UPPER, (bins, patches, D * len(vision.taps)), dtype)
        given = {"bins": filled(VISION_UPPER, rows), "segment": filled(VISION_UPPER, segment)}
        calls.append((VISION_UPPER, given, {"packed_features": packed, "tapped": tapped}))
    return [*calls, _decode_call(session, empty, filled)]


def _decode_call(session: Session, empty: Any, filled: Any) -> Any:
    """One token on an empty cache."""
    text, runner = session.config.text, session.runners[DECODER]
    dtype = ACTIVATION[session.bundle.manifest.precision]
    capacity = runner.cache_capacity or session.bundle.manifest.limits.max_tokens
    shape = (1, text.num_kv_heads, capacity, text.head_dim)
    inputs = {
        "input_ids": filled(DECODER, np.array([[5]])),
        "features": empty(DECODER, (1, text.hidden_size), dtype),
        "visual_group": filled(DECODER, np.array([[-1]], np.int32)),
        "position_ids": empty(DECODER, (1, 1), "int64"),
        "cache_position": empty(DECODER, (1,), "int64"),
    }
    outputs = {"logits": empty(DECODER, (1, text.vocab_size), "float32")}
    for layer in range(text.num_layers):
        for past, present in zip(past_names(layer), present_names(layer), strict=True):
            inputs[past] = empty(DECODER, shape, dtype)
            outputs[present] = (
                inputs[past] if runner.updates_in_place else empty(DECODER, shape, dtype)
            )
    return DECODER, inputs, outputs
