"""Names on the hub, against a small server that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stts_export.checkpoint import check_tensors, hub, open_checkpoint
from stts_export.convert import checkpoint_from_checkpoint
from stts_export.errors import InputError, MissingDependencyError
from tests.helpers import random_checkpoint

_NAME = "someone/Molmo2-Tiny"
_SHA = "0123456789012345678901234567890123456789"


@dataclass
class _Hub:
    """What the server has, and what it was asked for."""

    folder: Path
    status: int = 200
    error: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    folder = random_checkpoint(tmp_path / "repository")
    (folder / "README.md").write_text("hello")
    (folder / "modeling_molmo2.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    (folder / "LICENSE").write_text("terms")
    state = _Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    _point_to(monkeypatch, state.url, tmp_path / "cache")
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def _point_to(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _handler(state: _Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.asked.append(path)
            if state.status != 200:
                return self.send(b"{}", state.status, {"X-Error-Code": state.error})
            if path.startswith(f"/api/models/{_NAME}"):
                return self.send_api(path)
            name = path.rpartition("/")[2]
            if path.startswith(f"/{_NAME}/resolve/") and (state.folder / name).is_file():
                data = (state.folder / name).read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                return self.send(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _SHA})
            return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        def send_api(self, path: str) -> None:
            revision = path.partition("/revision/")[2]
            if revision not in ("", "main", "v1", _SHA):
                return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            files = sorted(state.folder.iterdir())
            values: Any = {
                "id": _NAME,
                "sha": _SHA,
                "siblings": [{"rfilename": f.name, "size": f.stat().st_size} for f in files],
            }
            if "/tree/" in path:
                values = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
            return self.send(json.dumps(values).encode(), 200, {"Content-Type": "application/json"})

        def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler


def test_a_name_is_downloaded_without_code_and_pickles(served: _Hub):
    checkpoint = open_checkpoint(_NAME)
    check_tensors(checkpoint)
    assert checkpoint.name == f"{_NAME}@{_SHA}"
    assert {path.name for path in checkpoint.folder.iterdir()} == {
        "config.json", "model.safetensors", "LICENSE",
    }  # fmt: skip
    assert not [path for path in served.asked if path.endswith((".py", ".bin"))]


def test_a_revision_is_asked_for_and_named(served: _Hub):
    assert open_checkpoint(_NAME, revision="v1").name == f"{_NAME}@{_SHA}"
    assert any(path.endswith("/revision/v1") for path in served.asked)
    with pytest.raises(InputError, match="has no revision v2"):
        open_checkpoint(_NAME, revision="v2")


def test_a_path_that_exists_wins(served: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    random_checkpoint(tmp_path / _NAME)
    assert open_checkpoint(Path(_NAME)).folder == Path(_NAME)
    assert not served.asked


def test_a_tokenizer_comes_without_weights(served: _Hub, small_checkpoint: Path):
    (served.folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(small_checkpoint, tokenizer=_NAME)
    assert "tokenizer.json" in checkpoint.config_files
    assert not [path for path in served.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(("status", "error", "message"), [
    (404, "RepoNotFound", "neither a folder here nor a repository on the hub"),
    (401, "RepoNotFound", "neither a folder here nor a repository on the hub"),
    (403, "GatedRepo", "is gated: its owner must grant access"),
    (500, "", "cannot be downloaded"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_the_hub_refuses_says_how_to_pass_a_folder(
    served: _Hub, monkeypatch: pytest.MonkeyPatch, status: int, error: str, message: str
):
    served.status, served.error = status, error
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(_NAME)
    assert "pass the folder" in str(caught.value)
    assert str(caught.value).startswith(_NAME)


@pytest.mark.parametrize("how", ["unreachable", "offline"])
def test_without_a_network_an_earlier_download_serves(
    served: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    before = open_checkpoint(_NAME).folder
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        _point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert open_checkpoint(_NAME).folder == before
    with pytest.raises(InputError, match="the hub cannot be reached") as error:
        open_checkpoint("someone/else")
    assert "pass the folder" in str(error.value)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_without_a_network_an_incomplete_download_is_named(
    served: _Hub, monkeypatch: pytest.MonkeyPatch, lost: str
):
    (open_checkpoint(_NAME).folder / lost).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="its earlier download lacks") as error:
        open_checkpoint(_NAME)
    assert lost in str(error.value)
    assert "the hub cannot be reached" in str(error.value)


def test_without_a_network_all_shards_of_a_download_are_looked_for(
    served: _Hub, monkeypatch: pytest.MonkeyPatch
):
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (served.folder / "model.safetensors").rename(served.folder / weight_map["a"])
    index = {"weight_map": weight_map}
    (served.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        open_checkpoint(_NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"download lacks model-00002-of-00002\.safetensors, and"):
        open_checkpoint(_NAME)


def test_a_folder_written_from_a_download_says_which_commit(served: _Hub, tmp_path: Path):
    output = checkpoint_from_checkpoint(_NAME, tmp_path / "out")
    values = json.loads((output / "config.json").read_text())
    assert values["_name_or_path"] == f"{_NAME}@{_SHA}"


def test_a_repository_without_safetensors_is_refused(served: _Hub):
    (served.folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no safetensors"):
        open_checkpoint(_NAME)
    assert not [path for path in served.asked if "/resolve/" in path]


def test_a_full_disk_is_found_before_the_download(served: _Hub, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2, 1, 1000))
    with pytest.raises(InputError, match="free in the hub's cache"):
        open_checkpoint(_NAME)
    assert not [path for path in served.asked if "/resolve/" in path]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub") as error:
        open_checkpoint(_NAME)
    assert "stts-export[export]" in str(error.value)
    assert "pass the folder" in str(error.value)


@pytest.mark.parametrize("name", ["/abs/olute", "a/b/c", "plain", "../up", "~/home", "-x/y"])
def test_other_texts_are_paths(name: str):
    assert not hub.is_repository(name)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(name)
