"""Machines that `estimate` knows: how much memory they have, and what runs on them.

Memory is what NVIDIA's data sheet of the module or card prints, taken as 10^9 bytes a GB. The chips
hold more than that (a "16 GB" module 17.2e9 bytes); what firmware, carve-outs and ECC take of it
differs by board and version, so the smaller number is what is planned with. Compute capabilities
are those of NVIDIA's CUDA GPU table. JetPack and TensorRT are what NVIDIA ships for the module.
"""

from __future__ import annotations

from dataclasses import dataclass

from stts_export.engines.library import TENSORRT, TENSORRT_RTX
from stts_export.errors import InputError, did_you_mean

GB = 10**9


@dataclass(frozen=True)
class Device:
    """A machine to plan for."""

    name: str
    """What `--target` takes."""
    label: str
    memory: int
    """Bytes that a process can plan with; of a discrete GPU, its own."""
    unified: bool
    """Whether CPU and GPU share the memory, and with it the system and all else that runs."""
    sm: str | None
    """Streaming multiprocessor version, such as sm87; None without a GPU."""
    backend: str
    """What runs the bundle there if nothing else is asked for."""
    tensorrt: tuple[int, int] | None
    """Version of TensorRT that the module's software brings; None where the user chooses."""
    source: str
    """Where memory, and versions, are taken from."""
    reserve: int | None = None
    """Bytes that are in use already, where they were measured; an allowance when None."""

    @property
    def headroom(self) -> int:
        """Bytes that stay free of the bundle.

        Of shared memory: the system without a desktop, the video decoder's surfaces, the CUDA
        context and the libraries of TensorRT, which a discrete GPU's host holds. Of a discrete GPU:
        CUDA context and kernels. Our choice, not a measurement; the estimates themselves are meant
        to be within 15 %, so a tenth of the memory is kept on top of a fixed part.
        """
        if self.reserve is not None:
            return self.reserve
        fixed = 1_200_000_000 if self.unified else 600_000_000
        return fixed + self.memory // 10

    @property
    def usable(self) -> int:
        """Bytes that a bundle may use."""
        return max(0, self.memory - self.headroom)


_JETPACK_6 = "JetPack 6.2: TensorRT 10.3"
_JETPACK_7 = "JetPack 7.1: TensorRT 10.13"


def _jetson(
    name: str, label: str, gigabytes: int, sm: str, version: tuple[int, int], source: str
) -> Device:
    return Device(name, label, gigabytes * GB, True, sm, TENSORRT, version, source)


def _card(name: str, label: str, gigabytes: int, sm: str, backend: str, source: str) -> Device:
    return Device(name, label, gigabytes * GB, False, sm, backend, None, source)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _jetson("orin-nano-8gb", "Jetson Orin Nano 8GB", 8, "sm87", (10, 3),
                f"Jetson Orin Nano Series Data Sheet: 8 GB LPDDR5; {_JETPACK_6}"),
        _jetson("orin-nx-8gb", "Jetson Orin NX 8GB", 8, "sm87", (10, 3),
                f"Jetson Orin NX Series Data Sheet DS-10712: 8 GB LPDDR5; {_JETPACK_6}"),
        _jetson("orin-nx-16gb", "Jetson Orin NX 16GB", 16, "sm87", (10, 3),
                f"Jetson Orin NX Series Data Sheet DS-10712: 16 GB LPDDR5; {_JETPACK_6}"),
        _jetson("agx-orin-32gb", "Jetson AGX Orin 32GB", 32, "sm87", (10, 3),
                f"Jetson AGX Orin Series Data Sheet: 32 GB LPDDR5; {_JETPACK_6}"),
        _jetson("agx-orin", "Jetson AGX Orin 64GB", 64, "sm87", (10, 3),
                f"Jetson AGX Orin Series Data Sheet: 64 GB LPDDR5; {_JETPACK_6}"),
        _jetson("thor-t4000", "Jetson T4000", 64, "sm110", (10, 13),
                f"Jetson Thor Series Modules Data Sheet: 64 GB LPDDR5X; {_JETPACK_7}"),
        _jetson("thor", "Jetson AGX Thor (T5000)", 128, "sm110", (10, 13),
                f"Jetson Thor Series Modules Data Sheet: 128 GB LPDDR5X; {_JETPACK_7}"),
        Device("dgx-spark", "DGX Spark (GB10)", 128 * GB, True, "sm121", TENSORRT_RTX, None,
               "DGX Spark data sheet: 128 GB LPDDR5x, unified"),
        _card("rtx-3090", "GeForce RTX 3090", 24, "sm86", TENSORRT_RTX,
              "GeForce RTX 3090 specifications: 24 GB GDDR6X"),
        _card("rtx-4060-8gb", "GeForce RTX 4060", 8, "sm89", TENSORRT_RTX,
              "GeForce RTX 4060 specifications: 8 GB GDDR6"),
        _card("rtx-4090", "GeForce RTX 4090", 24, "sm89", TENSORRT_RTX,
              "GeForce RTX 4090 specifications: 24 GB GDDR6X"),
        _card("rtx-5090", "GeForce RTX 5090", 32, "sm120", TENSORRT_RTX,
              "GeForce RTX 5090 specifications: 32 GB GDDR7"),
        _card("rtx-6000-ada", "RTX 6000 Ada", 48, "sm89", TENSORRT_RTX,
              "RTX 6000 Ada Generation data sheet: 48 GB GDDR6"),
        _card("a10", "A10", 24, "sm86", TENSORRT, "A10 data sheet: 24 GB GDDR6"),
        _card("l4", "L4", 24, "sm89", TENSORRT, "L4 data sheet: 24 GB"),
        _card("l40s", "L40S", 48, "sm89", TENSORRT, "L40S data sheet: 48 GB GDDR6"),
        _card("a100-40gb", "A100 40GB", 40, "sm80", TENSORRT, "A100 data sheet: 40 GB HBM2"),
        _card("a100-80gb", "A100 80GB", 80, "sm80", TENSORRT, "A100 data sheet: 80 GB HBM2e"),
        _card("h100", "H100 80GB", 80, "sm90", TENSORRT, "H100 data sheet: 80 GB HBM3"),
        _card("h200", "H200", 141, "sm90", TENSORRT, "H200 data sheet: 141 GB HBM3e"),
        _card("b200", "B200", 180, "sm100", TENSORRT, "DGX B200 data sheet: 1440 GB for 8 GPUs"),
    )
}  # fmt: skip
"""By the name that `--target` takes."""

THIS = "this"
"""The machine that the command runs on."""


def find_device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        InputError: it is not there.
    """
    if name not in DEVICES:
        raise InputError(
            f"target {name!r}{did_you_mean(name, DEVICES)}",
            where="estimate",
            allowed=", ".join((THIS, *DEVICES)),
            fix="for another machine take one with as much memory, or --target this on it",
        )
    return DEVICES[name]
