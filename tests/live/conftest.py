from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.sources.helpers import RtspServer, encode

_PROBE = (
    "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
)
_INSTALL = (
    "sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good gstreamer1.0-plugins-bad "
    "gstreamer1.0-libav gir1.2-gst-rtsp-server-1.0 python3-gi"
)


def _require(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        if os.environ.get("CI"):
            pytest.fail(f"GStreamer is missing: {_INSTALL}")
        pytest.skip(f"needs GStreamer: {_INSTALL}")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def gstreamer() -> None:
    _require(["gst-inspect-1.0", "avdec_h264"])


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 s at 25 frames a second."""
    return encode(tmp_path_factory.mktemp("rtsp") / "long.mp4", 1000)


@pytest.fixture
def rtsp(long_clip: Path) -> Iterator[Callable[..., RtspServer]]:
    """Starts RTSP servers."""
    _require(["/usr/bin/python3", "-c", _PROBE])
    servers: list[RtspServer] = []

    def start(*arguments: str, video: Path = long_clip) -> RtspServer:
        servers.append(RtspServer(video, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
