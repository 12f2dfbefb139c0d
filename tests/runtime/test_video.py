from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stts_export.errors import InputError
from stts_export.runtime import completeness, demux, frame_index
from stts_export.runtime.resize import resize_frames
from stts_export.runtime.sampling import sample_times
from stts_export.runtime.video import oriented, play, read_video

HEIGHT, WIDTH = 64, 96
BITS = 8


def _picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame that shows its number in binary, as vertical stripes; the lower half is red."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], dtype=np.uint8)
    stripes = bits[np.arange(width) * BITS // width] * 255
    frame = np.repeat(np.broadcast_to(stripes, (height, width))[..., None], 3, axis=2)
    frame[height // 2 :] = (200, 20, 20)
    return frame


def _number(frame: np.ndarray) -> int:
    """Read the number from a frame of any size."""
    height, width = frame.shape[:2]
    columns = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    levels = frame[height // 4, columns].mean(axis=-1)
    return sum(1 << bit for bit, level in enumerate(levels) if level > 127)


def _encode(
    path: Path,
    count: int = 30,
    *,
    rate: int | Fraction = 10,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    format: str | None = None,
) -> Path:
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.options = {"g": "12", "bf": "2", "threads": "1"} if codec == "libx264" else {}
        stream.options = stream.options | (options or {})
        if time_base:
            stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(*rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(_picture(number, *size), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts = pts[number] if pts else number
            frame.time_base = time_base or Fraction(1) / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _numbers(frames: np.ndarray) -> list[int]:
    return [_number(frame) for frame in frames]


def _brute_force(path: Path, max_frames: int) -> tuple[np.ndarray, list[int]]:
    """The reference's rule on all decoded frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base, rate = stream.time_base, stream.average_rate
        decoded = [
            (frame.pts, frame.duration, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(stream)
        ]
    starts = np.array([float(pts * base) for pts, *_ in decoded])
    last_pts, last_duration, _ = decoded[-1]
    end = float((last_pts + (last_duration or round(1 / rate / base))) * base)
    times = sample_times(end - starts[0], max_frames)
    ends = np.append(starts[1:], end)
    chosen = np.searchsorted(ends, times + starts[0], side="right")
    chosen = np.minimum(chosen, len(decoded) - 1)
    return times, [_number(decoded[place][2]) for place in chosen]


# 30 frames at 10 fps, at most 2 samples a second, and the end.
EVERY_HALF_SECOND = [0, 5, 10, 15, 20, 25, 29]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain.mp4", {}),
        ("all_key.mp4", {"options": {"g": "1", "bf": "0"}}),
        ("open_gop.mp4", {"options": {"x264-params": "open-gop=1:keyint=8:bframes=3"}}),
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("clip.mov", {"codec": "mpeg4"}),
        ("clip.avi", {"codec": "mpeg4"}),
        ("b_frames_without_pts.avi", {}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
        ("ten_bit.mp4", {"pixels": "yuv420p10le"}),
        ("full_chroma.mp4", {"pixels": "yuv444p"}),
        ("odd_size.mp4", {"pixels": "yuv444p", "size": (61, 97)}),
        ("lossless.mkv", {"codec": "ffv1", "pixels": "bgr0"}),
        ("palette.gif", {"codec": "gif", "pixels": "rgb8"}),
        ("faststart.mp4", {"container_options": {"movflags": "faststart"}}),
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(tmp_path, name, settings):
    path = _encode(tmp_path / name, **settings)
    clip = read_video(path, max_frames=64)
    assert clip.timestamps.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert _numbers(clip.frames) == EVERY_HALF_SECOND
    assert clip.frames.shape[1:] == (*clip.source_size, 3)
    assert (clip.fps, clip.duration, clip.is_image) == (10, 3.0, False)
    assert clip.source == str(path)


def test_colours_are_those_of_ffmpeg(tmp_path):
    path = _encode(tmp_path / "clip.mp4")
    clip = read_video(path, max_frames=2)
    red = clip.frames[:, HEIGHT * 3 // 4].reshape(-1, 3).astype(int)
    assert np.abs(red - (200, 20, 20)).max() <= 8


def test_gray(tmp_path):
    path = _encode(tmp_path / "gray.mkv", codec="ffv1", pixels="gray")
    clip = read_video(path, max_frames=64)
    assert _numbers(clip.frames) == EVERY_HALF_SECOND
    assert (clip.frames[..., 0] == clip.frames[..., 2]).all()


@pytest.mark.parametrize("max_frames", [1, 2, 3, 5, 7, 31, 200])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "clip.mkv"])
def test_equals_brute_force(tmp_path, name, max_frames):
    path = _encode(tmp_path / name, 47, rate=Fraction(30000, 1001))
    times, numbers = _brute_force(path, max_frames)
    clip = read_video(path, max_frames=max_frames)
    np.testing.assert_array_equal(clip.timestamps, times)
    assert _numbers(clip.frames) == numbers


@pytest.mark.parametrize("seed", range(4))
def test_variable_frame_rate_equals_brute_force(tmp_path, seed):
    gaps = np.random.default_rng(seed).integers(1, 900, 40)
    pts = (np.cumsum(gaps) - gaps[0]).tolist()
    path = _encode(tmp_path / "vfr.mp4", 40, pts=pts, time_base=Fraction(1, 1000))
    times, numbers = _brute_force(path, 25)
    clip = read_video(path, max_frames=25)
    np.testing.assert_array_equal(clip.timestamps, times)
    assert _numbers(clip.frames) == numbers


def test_a_long_gap_shows_the_frame_before_it(tmp_path):
    pts = [0, 100, 200, 2200, 2300]
    path = _encode(tmp_path / "gap.mkv", 5, pts=pts, time_base=Fraction(1, 1000))
    assert _numbers(read_video(path, max_frames=64).frames) == [0, 2, 2, 2, 2, 4]


@pytest.mark.parametrize("name", ["late.ts", "late.mkv", "late.mp4"])
def test_times_count_from_the_first_frame(tmp_path, name):
    pts = [number + 70 for number in range(30)]
    path = _encode(tmp_path / name, pts=pts)
    clip = read_video(path, max_frames=64)
    assert clip.duration == pytest.approx(3.0)
    assert _numbers(clip.frames) == EVERY_HALF_SECOND


def test_raw_stream_is_read_at_the_assumed_rate(tmp_path):
    path = _encode(tmp_path / "clip.h264", 50, format="h264")
    clip = read_video(path, max_frames=64)
    assert (clip.fps, clip.duration) == (25.0, 2.0)
    assert _numbers(clip.frames) == [0, 12, 25, 37, 49]


def test_one_frame(tmp_path):
    clip = read_video(_encode(tmp_path / "one.mp4", 1), max_frames=64)
    assert clip.timestamps.tolist() == [0.0, 0.1]
    assert not clip.is_image


def test_resized_frames_equal_resize_frames(tmp_path):
    path = _encode(tmp_path / "clip.mp4")
    full = read_video(path, max_frames=5)
    small = read_video(path, max_frames=5, size=(42, 56))
    np.testing.assert_array_equal(small.frames, resize_frames(full.frames, (42, 56)))
    assert small.source_size == (HEIGHT, WIDTH)


def test_progress(tmp_path):
    calls: list[tuple[int, int]] = []
    path = _encode(tmp_path / "clip.mp4")
    read_video(path, max_frames=5, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("rotation", "turn"),
    [
        ((90, False, False), lambda frame: np.rot90(frame)),
        ((180, False, False), lambda frame: np.rot90(frame, 2)),
        ((-90, False, False), lambda frame: np.rot90(frame, -1)),
        ((0, True, False), lambda frame: frame[:, ::-1]),
        ((0, False, True), lambda frame: frame[::-1]),
    ],
)
def test_rotation(tmp_path, rotation, turn):
    plain = _encode(tmp_path / "plain.mov", 3, codec="png", pixels="rgb24")
    upright = read_video(plain, max_frames=1)
    path = _encode(tmp_path / "turned.mov", 3, codec="png", pixels="rgb24", rotation=rotation)
    turned = read_video(path, max_frames=1)
    np.testing.assert_array_equal(turned.frames[0], turn(upright.frames[0]))
    assert turned.source_size == turned.frames.shape[1:3]


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_rotation_of_a_frame_with_side_data_that_pyav_does_not_know(angle):
    class Frame:
        rotation = angle

        @property
        def side_data(self) -> dict:
            raise ValueError("37 is not a valid Type")

        def to_ndarray(self, **_: object) -> np.ndarray:
            return _picture(5)

    turned = oriented(Frame())  # type: ignore[arg-type]
    np.testing.assert_array_equal(turned, np.rot90(_picture(5), angle // 90))


def _skipping_read(path: Path, monkeypatch, max_frames: int) -> tuple[list[int], int]:
    """Read a clip; return its numbers and how many frames were decoded."""
    decoded = 0
    original = demux._decode

    def counting(stream, packet):
        nonlocal decoded
        frames = original(stream, packet)
        decoded += len(frames)
        return frames

    monkeypatch.setattr(demux, "_decode", counting)
    return _numbers(read_video(path, max_frames=max_frames).frames), decoded


@pytest.mark.parametrize("gop", ["keyint=12", "open-gop=1:keyint=12:bframes=3"])
@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts"])
def test_far_samples_are_reached_without_decoding_all(tmp_path, monkeypatch, name, gop):
    path = _encode(tmp_path / name, 250, options={"x264-params": gop})
    numbers, decoded = _skipping_read(path, monkeypatch, max_frames=4)
    assert numbers == _brute_force(path, 4)[1]
    assert decoded < 80


def test_near_samples_are_decoded_in_one_go(tmp_path):
    path = _encode(tmp_path / "clip.mp4", 60)
    index = demux.VideoFile(path).index_packets()
    assert index is not None
    assert (np.diff(np.flatnonzero(index.packets_for(index.keys[::6]))) == 1).all()
    runs = index.packets_for(index.keys[[0, 59]])
    assert np.diff(np.flatnonzero(runs)).max() >= frame_index._MIN_SKIP


def test_damage_in_the_middle_leaves_the_other_frames(tmp_path):
    path = _encode(tmp_path / "clip.mkv", codec="ffv1", pixels="bgr0", options={"slicecrc": "1"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
        place = data.index(bytes(packet))
        data[place : place + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    numbers = _numbers(read_video(path, max_frames=64).frames)
    assert numbers[0] == 0
    assert numbers[-1] == 29
    assert len(numbers) == 7


def _write_image(path: Path, codec: str, pixels: str) -> Path:
    return _encode(path, 1, rate=1, codec=codec, pixels=pixels)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("one.png", "png", "rgb24"),
        ("one%03d.png", "png", "rgb24"),
        ("one.jpg", "mjpeg", "yuvj420p"),
        ("one.bmp", "bmp", "bgr24"),
        ("one.gif", "gif", "rgb8"),
        ("one.webp", "libwebp", "yuv420p"),
        ("one.avif", "libsvtav1", "yuv420p"),
    ],
)
def test_image(tmp_path, name, codec, pixels):
    path = _write_image(tmp_path / name.replace("%03d", "001"), codec, pixels)
    path = path.rename(tmp_path / name)
    clip = read_video(path, max_frames=64, size=(32, 48))  # a size is for videos
    assert clip.is_image
    assert clip.timestamps.tolist() == [0.0]
    assert clip.frames.shape == (1, HEIGHT, WIDTH, 3)
    assert clip.source_size == (HEIGHT, WIDTH)
    assert _numbers(clip.frames) == [0]


def test_play_yields_every_frame_with_its_time(tmp_path):
    count, shown = play(_encode(tmp_path / "clip.avi"))
    times, frames = zip(*shown, strict=True)
    assert count == 30
    assert _numbers(np.stack(frames)) == list(range(30))
    np.testing.assert_allclose(times, np.arange(30) / 10, atol=1e-9)


def test_play_leaves_frames_out_evenly(tmp_path):
    count, shown = play(_encode(tmp_path / "clip.mp4"), max_frames=12)
    times, frames = zip(*shown, strict=True)
    assert count == len(frames) == 10
    assert _numbers(np.stack(frames)) == list(range(0, 30, 3))
    np.testing.assert_allclose(times, np.arange(0, 30, 3) / 10, atol=1e-9)


def test_name_that_looks_like_a_url(tmp_path, monkeypatch):
    _encode(tmp_path / "http:clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read_video("http:clip.mp4", max_frames=3).frames) == 3


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.mp4: there is no such file"):
        read_video(tmp_path / "gone.mp4", max_frames=8)


def test_folder(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_video(tmp_path, max_frames=8)


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match=r"empty\.mp4: the file is empty"):
        read_video(tmp_path / "empty.mp4", max_frames=8)


@pytest.mark.parametrize("name", ["notes.mp4", "notes.txt"])
def test_text_file(tmp_path, name):
    (tmp_path / name).write_text("a red square moves to the left\n" * 50)
    with pytest.raises(InputError, match="is not a video or an image"):
        read_video(tmp_path / name, max_frames=8)


def test_playlist_cannot_reach_other_places(tmp_path):
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InputError, match=r"list\.m3u8"):
        read_video(tmp_path / "list.m3u8", max_frames=8)


def _add_audio(container: av.container.OutputContainer) -> None:
    stream = container.add_stream("aac", rate=8000, layout="mono")
    for start in range(0, 8000, 1000):
        samples = np.sin(np.arange(start, start + 1000) / 10)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def test_audio_only(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        _add_audio(container)
    with pytest.raises(InputError, match="has no video stream, only audio"):
        read_video(path, max_frames=8)


def test_cover_picture_is_not_a_video(tmp_path):
    path = tmp_path / "song.mka"
    png = _write_image(tmp_path / "cover.png", "png", "rgb24").read_bytes()
    with av.open(str(path), "w", format="matroska") as container:
        container.add_attachment("cover.png", "image/png", png)
        _add_audio(container)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(InputError, match="has no video stream, only audio, parts of pictures"):
        read_video(path, max_frames=8)


def test_unsupported_codec(tmp_path):
    path = _encode(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(InputError, match="codec is not supported") as caught:
        read_video(path, max_frames=8)
    assert "ffmpeg -i clip.mp4" in str(caught.value)


def test_stream_without_frames(tmp_path):
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        container.start_encoding()
    with pytest.raises(InputError, match=r"none\.mkv: no frame can be decoded"):
        read_video(path, max_frames=8)


def test_broken_image(tmp_path):
    path = _write_image(tmp_path / "one.png", "png", "rgb24")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"one\.png: the picture is damaged or cut off"):
        read_video(path, max_frames=8)


def _save(path: Path, **options: Any) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one.jpg", {}),
        ("one.jpg", {"progressive": True}),
        ("one.jpg", {"restart_marker_rows": 1}),
        ("one.gif", {}),
        ("one.png", {}),
        ("one.webp", {}),
        ("one.bmp", {}),
        ("one.tif", {}),
    ],
)
def test_picture_that_is_cut_off(tmp_path, name, options, share):
    path = _save(tmp_path / name, **options)
    assert read_video(path, max_frames=8).is_image
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match="cut off") as caught:
        read_video(path, max_frames=8)
    assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize("name", ["one.jpg", "one.gif"])
def test_picture_without_its_end_mark(tmp_path, name):
    path = _save(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content + b"\0\0 and more")
    assert read_video(path, max_frames=8).is_image
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{name}: the picture is cut off"):
        read_video(path, max_frames=8)


def test_animation_that_is_cut_off(tmp_path):
    path = _encode(tmp_path / "clip.gif", codec="gif", pixels="rgb8")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut off"):
        read_video(path, max_frames=8)


def test_the_end_mark_of_a_preview_is_not_that_of_the_picture(tmp_path):
    path = _save(tmp_path / "one.jpg")
    content = path.read_bytes()
    preview = b"\xff\xe1\x00\x08Exif\xff\xd9"
    path.write_bytes(content[:2] + preview + b"\xff" + content[2:])
    assert read_video(path, max_frames=8).is_image
    path.write_bytes(content[:2] + preview + content[2:-2])
    with pytest.raises(InputError, match=r"one\.jpg: the picture is cut off"):
        read_video(path, max_frames=8)


def test_picture_that_is_damaged(tmp_path):
    path = _save(tmp_path / "one.jpg")
    content = path.read_bytes()
    path.write_bytes(content[:-800] + content[-2:])
    with pytest.raises(InputError, match=r"one\.jpg: the picture is damaged or cut off"):
        read_video(path, max_frames=8)


def test_truncated_without_index(tmp_path):
    path = _encode(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"index \(moov\) is missing"):
        read_video(path, max_frames=8)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.mov"])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_truncated_says_what_can_be_read(tmp_path, name, share):
    options = {} if name.endswith("mkv") else {"movflags": "faststart"}
    path = _encode(tmp_path / name, 200, container_options=options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match="the file is cut off") as caught:
        read_video(path, max_frames=8)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    whole = sum(not packet.is_corrupt for packet in packets)
    readable = float(str(caught.value).split("cut off: ")[1].split(" of 20.0 s")[0])
    assert readable == pytest.approx(whole / 10, abs=0.4)  # frames in between may be missing
    assert f"ffmpeg -i {name} -c copy OUT" in str(caught.value)


def test_matroska_of_unknown_size_is_not_cut_off(tmp_path):
    path = _encode(tmp_path / "live.mkv", container_options={"live": "1"})
    assert completeness.matroska_ends_early(path) is False
    assert len(read_video(path, max_frames=5).frames) == 5


def test_matroska_may_state_a_long_last_frame(tmp_path):
    path = _encode(tmp_path / "clip.mkv")
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3
    data[place : place + 8] = struct.pack(">d", 9000.0)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.duration == 9_000_000
    assert read_video(path, max_frames=64).duration == pytest.approx(3.0)


@pytest.mark.parametrize("head", [b"", b"\x1a\x45\xdf\xa3\x84abcd", b"RIFF"])
def test_other_files_have_no_matroska_size(tmp_path, head):
    (tmp_path / "file").write_bytes(head)
    assert completeness.matroska_ends_early(tmp_path / "file") is None


def test_repaired_file_can_be_read(tmp_path):
    """What the message suggests works: copying the packets that are left."""
    path = _encode(tmp_path / "clip.mp4", 200, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    repaired = tmp_path / "repaired.mp4"
    with av.open(str(path)) as source, av.open(str(repaired), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and not packet.is_corrupt:
                packet.stream = stream
                target.mux(packet)
    assert _numbers(read_video(repaired, max_frames=3).frames)[0] == 0


def test_data_lost_after_the_index_says_what_can_be_read(tmp_path):
    path = _encode(tmp_path / "clip.mov", 100, codec="png", pixels="rgb24")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        half = data.index(bytes(packets[50]))
        end = data.index(bytes(packets[99])) + packets[99].size
    data[half:end] = bytes(end - half)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cut off: 5\.0 of 10\.0 s can be read"):
        read_video(path, max_frames=8)


def test_no_message_of_ffmpeg_reaches_the_terminal(tmp_path, capfd):
    path = _encode(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    capfd.readouterr()
    with pytest.raises(InputError):
        read_video(path, max_frames=8)
    assert capfd.readouterr() == ("", "")


def test_bad_limits(tmp_path):
    path = _encode(tmp_path / "clip.mp4", 3)
    with pytest.raises(InputError, match="max_frames is 0"):
        read_video(path, max_frames=0)
    with pytest.raises(InputError, match="size is"):
        read_video(path, max_frames=1, size=(0, 4))
