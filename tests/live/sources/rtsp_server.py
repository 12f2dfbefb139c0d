"""A real RTSP server: GStreamer's, run with the interpreter that has its bindings.

    /usr/bin/python3 rtsp_server.py VIDEO PORT [--user NAME --password WORD --auth basic|digest]

It serves VIDEO, H.264 in MP4, at rtsp://127.0.0.1:PORT/live in real time, from its start for every
client, and prints one line when it listens.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any


def _protect(rtsp: Any, rtsp_server: Any, server: Any, factory: Any, options: Any) -> None:
    auth = rtsp_server.RTSPAuth()
    token = rtsp_server.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    if options.auth == "basic":
        auth.set_supported_methods(rtsp.RTSPAuthMethod.BASIC)
        auth.add_basic(rtsp_server.RTSPAuth.make_basic(options.user, options.password), token)
    else:
        auth.set_supported_methods(rtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(options.user, options.password, token)
    server.set_auth(auth)
    permissions = rtsp_server.RTSPPermissions()
    permissions.add_permission_for_role("viewer", "media.factory.access", True)
    permissions.add_permission_for_role("viewer", "media.factory.construct", True)
    factory.set_permissions(permissions)


def main() -> None:
    gi = importlib.import_module("gi")
    for name in ("Gst", "GstRtsp", "GstRtspServer"):
        gi.require_version(name, "1.0")
    gst, glib, rtsp, rtsp_server = (
        importlib.import_module(f"gi.repository.{name}")
        for name in ("Gst", "GLib", "GstRtsp", "GstRtspServer")
    )
    parser = argparse.ArgumentParser()
    parser.add_argument("video")
    parser.add_argument("port")
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--auth", default="basic")
    options = parser.parse_args()

    gst.init(None)
    server = rtsp_server.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(options.port)
    factory = rtsp_server.RTSPMediaFactory()
    factory.set_launch(
        f'( filesrc location="{options.video}" ! qtdemux ! h264parse '
        "! rtph264pay name=pay0 pt=96 config-interval=-1 )"
    )
    if options.user:
        _protect(rtsp, rtsp_server, server, factory, options)
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        raise SystemExit(f"port {options.port} is taken")
    print("listening", flush=True)
    glib.MainLoop().run()


if __name__ == "__main__":
    main()
