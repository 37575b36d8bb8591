"""The table of devices: who is found by which name, and that its figures agree with each other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ecgscale.errors import InputError
from ecgscale.training.devices import DEVICES, device_of, known_device, peak_flops


@pytest.mark.parametrize(
    ("driver_name", "name", "bf16_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 312.0),
        ("Tesla V100-SXM2-32GB", "V100 SXM2 32GB", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
        ("AMD Instinct MI300X", "MI300X", 1307.4),
        ("h100", "H100 SXM", 989.5),
    ],
)
def test_devices_are_found_by_the_drivers_name(driver_name, name, bf16_tflops) -> None:
    assert device_of(driver_name).name == name
    assert peak_flops(driver_name, "bf16") == (None if bf16_tflops is None else pytest.approx(bf16_tflops * 1e12))


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10G", "cpu", ""]
)
def test_what_is_no_whole_known_device_is_not_mistaken_for_one(name) -> None:
    assert device_of(name) is None
    assert peak_flops(name, "fp32") is None


def test_an_unknown_device_asks_for_its_rates() -> None:
    with pytest.raises(
        InputError, match=r"device 'X1' is in no table; give engine\.peak_tflops, or one of B200, .*A10"
    ):
        known_device("X1", instead="engine.peak_tflops")


def test_each_name_means_one_device() -> None:
    for device in DEVICES:
        for name in (device.name, *device.driver_names):
            assert device_of(name) is device


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_figures_are_in_the_units_that_are_said(device) -> None:
    """FLOP/s, bytes and bytes per second: rates of real devices lie within these bounds."""
    assert 1e12 < device.peak_flops("fp32") < 2e14
    for faster, slower in (("bf16", "tf32"), ("tf32", "fp32")):
        if device.peak_flops(faster) is not None:
            assert device.peak_flops(faster) >= 0.9 * (device.peak_flops(slower) or 0)
    assert 8 * 2**30 <= device.memory_bytes < 512 * 2**30
    assert 1e9 < device.link_bytes_per_s < device.memory_bytes_per_s < 1e13
    assert 50 < device.watts < 2000


@pytest.mark.parametrize(
    ("said", "rounded"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),  # the new way, which the old one cannot read
    ],
)
def test_convolutions_are_as_exact_as_products(said, rounded) -> None:
    """In a process of its own: the two ways of saying it cannot be taken back together."""
    program = f"import torch; from ecgscale.training.ranks import exact_fp32; {said}; exact_fp32()"
    program += f"; assert torch.backends.cudnn.allow_tf32 is {rounded}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
