"""`attnzoo doctor`."""

from __future__ import annotations

import argparse

import torch

from attnzoo import registry
from attnzoo.cli.zoo import table
from attnzoo.train.folder import versions
from attnzoo.train.hardware import choose_precision, device_name, peak_flops


def doctor_command(options: argparse.Namespace) -> int:
    """Print versions, devices, and the implementation of every variant here with its reason."""
    print(table([name, version] for name, version in versions().items()))
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    for device in devices:
        precision, reason = choose_precision("auto", device)
        peak = peak_flops(device)
        speed = f"{peak / 1e12:.0f} bf16 TFLOP/s at best" if peak else "peak speed unknown, so no MFU"
        print(f"{device}: {device_name(device)}; {precision} ({reason}); {speed}")
    print()
    print(table(_implementations(devices[0])))
    return 0


def _implementations(device: torch.device) -> list[list[str]]:
    rows = [["variant", "implementation", "because"]]
    for name in registry.list_variants():
        with device:
            mixer = registry.create(name, dim=64, num_heads=4)
        rows.append([name, mixer.impl, mixer.impl_reason])
    return rows
