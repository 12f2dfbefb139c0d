"""Images and several videos in one prompt: beside transformers, and beside the PyTorch model."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from stts_export.runtime import session as session_module
from stts_export.runtime import vision
from stts_export.runtime.images import image_crops
from stts_export.runtime.prompt import PromptBuilder
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import EncodedClip, EncodedImage, VisualSummary
from stts_export.runtime.writing import png_bytes
from stts_export.tensors import CONNECTOR, VISION_UPPER_FRAMES
from stts_export.tolerances import TOLERANCES, difference
from tests.helpers import GOLDEN, image_ids, picture, random_checkpoint, random_frames
from tests.model.test_images import square_config, theirs, theirs_logits

SIZE = (210, 210)
QUESTION = "What colour is the square?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15x15 patches, so that tokens at the edges of images have missing ones."""
    return random_checkpoint(tmp_path_factory.mktemp("square") / "checkpoint", square_config(15))


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    bundle = tmp_path_factory.mktemp("square") / "bundle"
    bundle_from_checkpoint(checkpoint, bundle, BuildSpec(max_frames=12))
    with Session.open(bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SttsModel:
    return model_from_checkpoint(open_checkpoint(checkpoint))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    file.write_bytes(png_bytes(picture((90, 61))))
    return file


def still(image: NDArray[np.uint8]) -> VideoClip:
    """What `read_video` returns for an image file."""
    return VideoClip(image[None], np.zeros(1), 0.0, 0.0, "x.png", image.shape[:2], is_image=True)


def moving(frames: NDArray[np.uint8]) -> VideoClip:
    """What `read_video` returns for a video."""
    return VideoClip(frames, np.arange(len(frames)) / 2, 1.0, 8.0, "x.mp4", frames.shape[1:3])


_STEPS = ((session_module, "image_crops"), (vision, "encode_image"), (vision, "encode"))


def ids_of(session: Session, visuals: Sequence[EncodedClip | EncodedImage]) -> NDArray[np.int64]:
    """A complete sequence as before pruning, about visuals in any order."""
    config = session.config
    tokens, ids = config.tokens, [7]
    for visual in visuals:
        if isinstance(visual, EncodedImage):
            ids += image_ids(config, [visual.grid]).tolist()[1:-6]
            continue
        for number in range(len(visual.keep)):
            windows = [tokens.im_patch] * config.vision.windows
            ids += [11 + number, tokens.frame_start, *windows, tokens.frame_end]
    return np.array([*ids, 3, 1, 4, 1, 5])


def oracle_logits(
    model: SttsModel,
    ids: NDArray[np.int64],
    parts: Sequence[tuple[NDArray[np.bool_], torch.Tensor]],
) -> NDArray[np.float32]:
    """Last logits of the PyTorch model; parts are (keep, features)."""
    stays = np.ones(len(ids), bool)
    stays[ids == model.config.tokens.im_patch] = np.concatenate([k.ravel() for k, _ in parts])
    compact = torch.from_numpy(ids[stays])[None]
    with torch.no_grad():
        features = torch.cat([features for _, features in parts])
        logits = model.language(compact, features, model.visual_groups(compact))
    return logits[0, -1].numpy()


def oracle_image(model: SttsModel, image: NDArray[np.uint8]) -> torch.Tensor:
    cut = image_crops(image, model.config.vision.image_size, model.config.vision.patch_size)
    with torch.no_grad():
        return model.encode_images(*map(torch.from_numpy, (cut.crops, cut.pooled_patches)))


def near(got: Any, expected: Any, name: str, precision: str = "fp32") -> None:
    limit = TOLERANCES[name, precision]
    assert difference(got, expected, limit.measure) <= limit.limit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [[(300, 517)], [(37, 41)], [(641, 230), (90, 1001)]], ids=str)
def test_logits_equal_those_of_transformers(
    session: Session, checkpoint: Path, sizes: list[tuple[int, int]]
):
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    ids, expected = theirs_logits(theirs(checkpoint), session.config, images)
    encoded = [session.encode_image(image) for image in images]
    near(session.next_token_logits(encoded, ids), expected[-1], "logits")
    answer = session.generate([still(image) for image in images], ids, 1)
    assert answer.token_ids == [int(expected[-1].argmax())]


@pytest.mark.filterwarnings("ignore")
def test_logits_at_the_real_grid_equal_those_of_transformers(golden_bundle: Path):
    """27x27 patches: 9 crops of a landscape, with missing patches at every edge."""
    image = picture((640, 1170))
    with Session.open(golden_bundle, threads=1) as session:
        ids, expected = theirs_logits(theirs(GOLDEN), session.config, [image])
        encoded = session.encode_image(image)
        assert (encoded.crops, encoded.grid[:2]) == (9, (14, 14))
        got = session.next_token_logits(encoded, ids)
        near(got, expected[-1], "logits", session.bundle.manifest.precision)


def test_features_equal_pytorch_in_chunks_of_any_size(
    session: Session, model: SttsModel, monkeypatch: pytest.MonkeyPatch
):
    image = picture((400, 700))
    expected = oracle_image(model, image)
    whole = session.encode_image(image)
    near(whole.features, expected.numpy(), "features")
    assert whole.keep.all()
    assert whole.note == "nothing was removed: images are not pruned"
    assert set(whole.timings) == {"resize", "image", "connector"}
    monkeypatch.setattr("stts_export.runtime.session.LOWER_CHUNK", 2)
    monkeypatch.setattr(vision, "CONNECTOR_CHUNK", 7)
    steps: list[tuple[str, int, int]] = []
    parts = session.encode_image(image, on_progress=lambda *step: steps.append(step))
    near(parts.features, whole.features, "features")
    assert steps[0] == ("image", 2, whole.crops)
    assert steps[-1] == ("image", whole.crops, whole.crops)


def test_order_of_patches(session: Session):
    """Window by window, as `PatchEmbedding` has them."""
    config = session.config.vision
    index = np.array([[0, 1, 15, -1], [3, 225, 226, 449]], np.int32)
    got = vision.in_window_order(index, config)
    assert got.dtype == np.int32
    # Row 1, column 0 of the 15x15 patches is the 4th patch of the first window; column 3 of row 0
    # is the first of the second.
    assert got.tolist() == [[0, 1, 3, -1], [9, 225, 226, 449]]


def test_the_connector_is_opened_for_the_first_image(checkpoint: Path, session: Session):
    with Session.open(session.bundle.folder, threads=1) as fresh:
        fresh.encode(random_frames(1, SIZE), 0.0)
        assert CONNECTOR not in fresh.runners
        fresh.encode_image(picture((20, 20)))
        runner = fresh.runners[CONNECTOR]
        fresh.encode_image(picture((20, 20)))
        assert fresh.runners[CONNECTOR] is runner


def test_several_videos_are_pruned_alone(session: Session, model: SttsModel):
    frames = [random_frames(4, SIZE, seed=1), random_frames(3, SIZE, seed=2)]
    ratios = (0.5, 0.8)
    alone = [session.encode(f, r) for f, r in zip(frames, ratios, strict=True)]
    ids = ids_of(session, alone)
    with torch.no_grad():
        clips = [model.encode(torch.from_numpy(f), r) for f, r in zip(frames, ratios, strict=True)]
    expected = oracle_logits(model, ids, [(c.keep.numpy(), c.features) for c in clips])
    near(session.next_token_logits(alone, ids), expected, "logits")
    answer = session.generate(alone, ids, 2)
    assert answer.token_ids[0] == expected.argmax()
    assert (answer.frames, answer.kept_windows, answer.total_windows) == (7, 50 + 15, 175)
    assert answer.prune_ratio == pytest.approx(1 - 65 / 175)
    assert [visual.kept_windows for visual in answer.visuals] == [50, 15]
    assert [visual.prune_ratio for visual in answer.visuals] == [0.5, 0.8]
    assert answer.note is None


@pytest.mark.parametrize("neighbour", [1, 2, 5])
def test_a_video_does_not_depend_on_its_neighbours(
    session: Session, monkeypatch: pytest.MonkeyPatch, neighbour: int
):
    """Each clip that is encoded on the way to an answer has the features it has alone."""
    frames = random_frames(4, SIZE, seed=3)
    others = random_frames(neighbour, (80, 50), seed=4)
    expected = [session.encode(clip, 0.5).features for clip in (others, frames, frames)]
    seen: list[NDArray[Any]] = []
    encode = vision.encode

    def recorded(*given: Any, **settings: Any) -> vision.VisionOutput:
        out = encode(*given, **settings)
        seen.append(out.features)
        return out

    ids = ids_of(session, [session.encode(clip, 0.5) for clip in (others, frames, frames)])
    monkeypatch.setattr(vision, "encode", recorded)
    answer = session.generate([others, frames, frames], ids, 1, prune_ratio=0.5)
    assert len(seen) == 3
    for got, alone in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(got, alone)
    assert answer.prune_ratio == 0.5


def test_images_beside_videos_in_any_order_of_ids(session: Session, model: SttsModel):
    frames, image = random_frames(3, SIZE, seed=5), picture((130, 100))
    clip, seen = session.encode(frames, 0.5), session.encode_image(image)
    with torch.no_grad():
        expected_clip = model.encode(torch.from_numpy(frames), 0.5)
    of_clip = (expected_clip.keep.numpy(), expected_clip.features)
    of_image = (seen.keep, oracle_image(model, image))
    orders: list[list[tuple[EncodedClip | EncodedImage, Any]]] = [
        [(seen, of_image), (clip, of_clip)],
        [(clip, of_clip), (seen, of_image), (clip, of_clip)],
    ]
    for order in orders:
        visuals, parts = [visual for visual, _ in order], [part for _, part in order]
        ids = ids_of(session, visuals)
        expected = oracle_logits(model, ids, parts)
        near(session.next_token_logits(visuals, ids), expected, "logits")


def test_images_are_listed_and_not_counted_among_windows(session: Session):
    image = picture((130, 100))
    clip, seen = session.encode(random_frames(2, SIZE), 0.5), session.encode_image(image)
    answer = session.generate([seen, clip], ids_of(session, [seen, clip]), 1)
    assert (answer.frames, answer.kept_windows, answer.total_windows) == (2, 25, 50)
    tokens, why = len(seen.features), "nothing was removed: images are not pruned"
    assert answer.visuals == (
        VisualSummary("image", seen.crops, tokens, tokens, 0.0, why),
        VisualSummary("video", 2, 25, 50, 0.5, None),
    )
    assert answer.note is None
    alone = session.generate(seen, ids_of(session, [seen]), 1, prune_ratio=0.5)
    assert (alone.frames, alone.total_windows, alone.prune_ratio) == (0, 0, 0.0)
    assert alone.note == why


def test_a_prompt_of_text_alone(session: Session, model: SttsModel, speaking: Session):
    ids = np.array([5, 6, 7, 8])
    answer = session.generate([], ids, 3)
    none = torch.zeros(1, session.config.text.hidden_size)
    with torch.no_grad():
        assert answer.token_ids == model.greedy(torch.from_numpy(ids), none, 3)
    assert (answer.frames, answer.total_windows, answer.visuals) == (0, 0, ())
    assert answer.note == "nothing was removed: the prompt is about no video"
    assert speaking.generate((), QUESTION, 2).text is not None


def test_questions_about_images_and_videos(speaking: Session, photo: Path):
    frames, image = random_frames(3, (48, 48)), picture((70, 90))
    clip, seen = speaking.encode(frames, 0.5), speaking.encode_image(image)
    prompts = PromptBuilder.from_folder(speaking.bundle.folder / "config", speaking.config)
    ids = prompts.build(QUESTION, [seen.tokens, clip.tokens])
    expected = speaking.next_token_logits([seen, clip], ids)
    got = speaking.next_token_logits([seen, clip], QUESTION)
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(InputError, match="an image comes after a video"):
        speaking.generate([clip, seen], QUESTION, 2)
    from_file = speaking.encode_image(photo)
    np.testing.assert_array_equal(
        from_file.features, speaking.encode_image(picture((90, 61))).features
    )
    answer = speaking.generate([photo, photo, frames], QUESTION, 2, prune_ratio=0.25)
    assert [visual.kind for visual in answer.visuals] == ["image", "image", "video"]
    assert (answer.prune_ratio, answer.kept_windows) == (0.25, 36)
    assert {"read", "image", "connector", "vision_lower", "prefill"} <= set(answer.timings)


def test_lists_of_pictures_are_one_clip(session: Session):
    pictures = list(random_frames(3, SIZE))
    one = session.encode(np.stack(pictures), 0.0)
    ids = ids_of(session, [one])
    answer = session.generate(pictures, ids, 2, prune_ratio=0.0)
    assert answer.frames == 3
    two = session.generate([np.stack(pictures)] * 2, ids_of(session, [one, one]), 2)
    assert [visual.frames for visual in two.visuals] == [3, 3]


@pytest.mark.parametrize("ratio", [1.0, -1, "0.5"])
def test_a_ratio_that_images_do_not_need_is_checked_all_the_same(session: Session, ratio: Any):
    seen = session.encode_image(picture((20, 20)))
    with pytest.raises(InputError, match="prune ratio"):
        session.generate(still(picture((20, 20))), ids_of(session, [seen]), 1, prune_ratio=ratio)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((2, 20, 20, 3), np.uint8), "uint8"),
        (np.zeros((20, 20, 4), np.uint8), "uint8"),
        (np.zeros((20, 20, 3), np.float32), "uint8"),
        (np.zeros((20, 0, 3), np.uint8), "uint8"),
        (None, "got NoneType"),
        ([[1]], "got list"),
    ],
)
def test_images_of_a_wrong_kind(session: Session, image: Any, text: str):
    with pytest.raises(InputError, match=text):
        session.encode_image(image)


def test_videos_and_images_have_verbs_of_their_own(session: Session):
    with pytest.raises(InputError, match=r"is an image\n.*\n.*encode_image"):
        session.encode(still(picture((20, 20))))
    video = VideoClip(random_frames(2), np.arange(2.0), 10.0, 2.0, "x.mp4", (84, 126))
    with pytest.raises(InputError, match="is a video"):
        session.encode_image(video)


def test_a_prompt_is_refused_before_anything_is_encoded(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    image, frames = still(picture((130, 100))), random_frames(2, SIZE)
    seen, clip = session.encode_image(image), session.encode(frames, 0.5)
    ids = ids_of(session, [seen, clip])
    monkeypatch.setattr(vision, "encode", None)
    monkeypatch.setattr(vision, "encode_image", None)
    session.check_prompt([image, frames], ids, 2, prune_ratio=0.5)
    total = len(seen.features) + 50
    with pytest.raises(InputError, match=f"is about has {total + 50} windows"):
        session.generate([image, frames, frames], ids, 2)
    with pytest.raises(InputError, match="new ones are"):
        session.generate([image, frames], ids, 10**6)


def test_images_are_cut_when_they_are_encoded(session: Session, monkeypatch: pytest.MonkeyPatch):
    """And what is encoded is let go: pixels of one visual at a time, beyond what was read."""
    steps: list[str] = []
    real = {name: getattr(module, name) for module, name in _STEPS}
    pixels: list[weakref.ref[NDArray[np.uint8]]] = []

    def read(path: str, **_: Any) -> VideoClip:
        clip = still(picture((130, 100))) if path == "x.png" else moving(random_frames(2, SIZE))
        pixels.append(weakref.ref(clip.frames if clip.frames.base is None else clip.frames.base))
        return clip

    def recorded(name: str) -> Callable[..., Any]:
        def call(*given: Any, **settings: Any) -> Any:
            held = sum(reference() is not None for reference in pixels)
            steps.append(f"{name}, {held} held")
            return real[name](*given, **settings)

        return call

    for module, name in _STEPS:
        monkeypatch.setattr(module, name, recorded(name))
    monkeypatch.setattr(session_module, "read_video", read)
    image, clip = session.encode_image(picture((130, 100))), session.encode(random_frames(2, SIZE))
    files, ids = ["x.png", "x.png", "x.mp4"], ids_of(session, [image, image, clip])
    steps.clear()
    session.check_prompt([read(name) for name in files], ids, 1)
    assert not steps
    pixels.clear()
    session.generate(files, ids, 1)
    assert steps == [
        "image_crops, 3 held", "encode_image, 3 held",
        "image_crops, 2 held", "encode_image, 2 held",
        "encode, 1 held",
    ]  # fmt: skip


def test_features_that_nobody_reads_stay_where_they_are(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    bound: list[set[str]] = []
    upper = session.runners[VISION_UPPER_FRAMES]

    class Watched:
        zeros = staticmethod(upper.zeros)

        def __call__(self, inputs: Any, in_place: Any = None) -> Any:
            outputs = upper(inputs, in_place)
            bound.append(set(in_place))
            assert not outputs
            return outputs

    monkeypatch.setitem(session.runners, VISION_UPPER_FRAMES, Watched())
    session.encode_image(picture((400, 700)))
    assert {"tapped", "packed_features"} in bound


def test_what_another_bundle_encoded(session: Session, speaking: Session):
    image, frames = picture((130, 100)), random_frames(2, SIZE)
    seen: list[Any] = [session.encode_image(image), session.encode(frames, 0.5)]
    ids = ids_of(session, seen)
    for index, visual in enumerate(seen):
        width, kind = session.config.text.hidden_size, ("image", "clip")[index]
        half, narrow, short = (
            dataclasses.replace(visual, features=features)
            for features in (
                visual.features.astype(np.float16), visual.features[:, 1:], visual.features[1:]
            )
        )  # fmt: skip
        for other, what in (
            (half, "float16"),
            (narrow, rf"shape \(\d+, {width - 1}\)"),
            (short, rf"shape \({len(visual.features) - 1}, "),
        ):
            given = [*seen[:index], other, *seen[index + 1 :]]
            for ask in (session.generate, session.check_prompt, session.next_token_logits):
                with pytest.raises(InputError, match=f"an encoded {kind} with .*{what}") as error:
                    ask(given, ids)
                assert error.match(rf"\(\d+, {width}\) of type float32")
    with pytest.raises(InputError, match="of frames in 16 windows"):
        session.generate(speaking.encode(random_frames(2, (48, 48)), 0.5), ids)


def test_settings_beside_images(session: Session, photo: Path):
    seen, ratio = session.encode_image(photo), 0.5
    ids = ids_of(session, [seen])
    expected = session.generate(seen, ids, 2).token_ids
    for image in (seen, session.read_video(photo), photo):
        got = session.generate(image, ids, 2, prune_ratio=ratio, max_frames=4)
        assert got.token_ids == expected
        with pytest.raises(InputError, match="max_frames is 0"):
            session.generate(image, ids, 2, max_frames=0)
        with pytest.raises(InputError, match="13 frames"):
            session.generate(image, ids, 2, max_frames=13)
        with pytest.raises(InputError, match="prune ratio 1"):
            session.generate(image, ids, 2, prune_ratio=1.0)
        with pytest.raises(InputError, match="prune ratio 'x'"):
            session.generate(image, ids, 2, prune_ratio="x")  # type: ignore[arg-type]


def test_what_helps_too_many_images(session: Session):
    seen = session.encode_image(picture((130, 100)))
    limit = session.bundle.manifest.limits.max_tokens
    ids = [1] * (limit - len(seen.features)) + ids_of(session, [seen]).tolist()
    with pytest.raises(InputError, match="shorten the prompt") as error:
        session.generate(seen, ids, 1)
    assert "ratio" not in str(error.value)
    assert "frames" not in str(error.value)


def test_settings_that_come_too_late_for_one_of_several(session: Session):
    clip, seen = session.encode(random_frames(2, SIZE), 0.5), session.encode_image(picture((9, 9)))
    ids = ids_of(session, [seen, clip])
    with pytest.raises(InputError, match="for a clip that is encoded already"):
        session.generate([seen, clip], ids, 1, prune_ratio=0.5)
    with pytest.raises(InputError, match="for a clip that is sampled already"):
        session.generate([seen, random_frames(2, SIZE)], ids, 1, max_frames=4)


def test_ids_for_another_order_of_the_visuals(session: Session):
    clip, seen = session.encode(random_frames(2, SIZE), 0.5), session.encode_image(picture((9, 9)))
    ids = ids_of(session, [seen, clip])
    session.check_prompt([seen, clip], ids, 1)
    for ask in (session.generate, session.check_prompt, session.next_token_logits):
        with pytest.raises(InputError, match="do not fit visual 1 of 2, a video of 2 x 25 windows"):
            ask([clip, seen], ids)


def test_stop_strings_that_no_answer_can_have(speaking: Session):
    clip = speaking.encode(random_frames(2), 0.5)
    for ask in (speaking.generate, speaking.check_prompt):
        with pytest.raises(InputError, match=r"contains the special token <\|im_end\|>"):
            ask(clip, QUESTION, 2, stop=["x", "red<|im_end|>"])


@pytest.mark.parametrize("lines", ["0 1 x", [(0, 1, "x")], [None], 3])
def test_what_is_no_list_of_subtitles(speaking: Session, lines: Any):
    clip = speaking.encode(random_frames(2), 0.5)
    with pytest.raises(InputError, match=r"^subtitles: the subtitles are "):
        speaking.generate(clip, QUESTION, 2, subtitles=lines)


def test_towers_too_small_for_the_margins_of_crops(small_bundle: Path):
    with (
        Session.open(small_bundle, threads=1) as session,
        pytest.raises(InputError, match="model input of 84 x 126 pixels"),
    ):
        session.encode_image(picture((20, 20)))
