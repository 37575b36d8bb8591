"""What devices can do at most, by their makers' data sheets: rates without sparsity, for MFU and for planning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ecgscale.errors import InputError

Arithmetic = Literal["fp32", "tf32", "bf16"]

_GIB = 2**30
_VENDOR_WORDS = {"nvidia", "geforce", "tesla", "amd", "instinct"}


@dataclass(frozen=True)
class Device:
    """A model of accelerator as torch shows it: one GPU, or one of the two dies of an MI250X."""

    name: str
    """Short name: what `--device` takes and tables show."""
    driver_names: tuple[str, ...]
    """Other names: what `torch.cuda.get_device_name` says."""
    bf16_flops: float | None
    """Dense peak FLOP/s of bf16 matrix products that add up in fp32; None: not in hardware."""
    tf32_flops: float | None
    """The same of fp32 matrix products that are rounded to TF32 (`torch.set_float32_matmul_precision("high")`)."""
    fp32_flops: float
    """Peak FLOP/s of fp32 without TF32, which is what PyTorch takes for matrix products where nothing is set."""
    memory_bytes: float
    """Of the device. Data sheets say GB for 2**30 bytes; the driver keeps one or two hundredths of it. Where ECC takes
    its bits from GDDR6 (A10, A40, L4, L40, L40S, T4), it is what torch shows, about a twelfth less."""
    memory_bytes_per_s: float
    """Bandwidth of that memory."""
    link_bytes_per_s: float
    """To the other devices of the machine, in one direction: half of what data sheets say of NVLink or Infinity Fabric;
    of PCIe where there is no such link."""
    watts: float
    """Thermal design power, the highest that the data sheet lets configure."""

    def peak_flops(self, precision: Arithmetic) -> float | None:
        """Dense peak FLOP/s of matrix products in a precision; None where the hardware has none."""
        return {"fp32": self.fp32_flops, "tf32": self.tf32_flops, "bf16": self.bf16_flops}[precision]


def _device(
    name: str,
    *driver_names: str,
    tflops: tuple[float | None, float | None, float],
    memory_gib: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    watts: float,
) -> Device:
    """``tflops`` are those of bf16, TF32 and fp32."""
    bf16, tf32, fp32 = (None if rate is None else rate * 1e12 for rate in tflops)
    assert fp32 is not None
    memory = memory_gib * _GIB, memory_gb_per_s * 1e9
    return Device(name, driver_names, bf16, tf32, fp32, *memory, link_gb_per_s * 1e9, watts)


# Sources: the makers' data sheets and architecture whitepapers. Where a data sheet gives a rate with sparsity, this is
# half of it. The H100's and H200's rates are for their boost clocks; GeForce: with accumulation in fp32.
DEVICES: tuple[Device, ...] = (
    _device("B200", tflops=(2250, 1125, 75), memory_gib=180, memory_gb_per_s=7700, link_gb_per_s=900, watts=1000),
    _device("GB200", tflops=(2500, 1250, 80), memory_gib=186, memory_gb_per_s=8000, link_gb_per_s=900, watts=1200),
    _device("H200", "H200 SXM", tflops=(989.5, 494.7, 67), memory_gib=141, memory_gb_per_s=4800, link_gb_per_s=450,
            watts=700),
    _device("H200 NVL", tflops=(835.5, 417.7, 60), memory_gib=141, memory_gb_per_s=4800, link_gb_per_s=450, watts=600),
    _device("GH200", "GH200 480GB", tflops=(989.5, 494.7, 67), memory_gib=96, memory_gb_per_s=4000, link_gb_per_s=450,
            watts=1000),
    _device("H100 SXM", "H100 80GB HBM3", "H100", "H100 SXM5", tflops=(989.5, 494.7, 67), memory_gib=80,
            memory_gb_per_s=3350, link_gb_per_s=450, watts=700),
    _device("H100 PCIe", tflops=(756.5, 378, 51), memory_gib=80, memory_gb_per_s=2000, link_gb_per_s=300, watts=350),
    _device("H100 NVL", tflops=(835.5, 417.7, 60), memory_gib=94, memory_gb_per_s=3900, link_gb_per_s=300, watts=400),
    _device("A100 80GB", "A100-SXM4-80GB", "A100-SXM-80GB", "A100 SXM 80GB", "A100", tflops=(312, 156, 19.5),
            memory_gib=80, memory_gb_per_s=2039, link_gb_per_s=300, watts=400),
    _device("A100 40GB", "A100-SXM4-40GB", "A100-SXM-40GB", "A100 SXM 40GB", tflops=(312, 156, 19.5), memory_gib=40,
            memory_gb_per_s=1555, link_gb_per_s=300, watts=400),
    _device("A100 80GB PCIe", "A100-PCIE-80GB", tflops=(312, 156, 19.5), memory_gib=80, memory_gb_per_s=1935,
            link_gb_per_s=300, watts=300),
    _device("A100 40GB PCIe", "A100-PCIE-40GB", tflops=(312, 156, 19.5), memory_gib=40, memory_gb_per_s=1555,
            link_gb_per_s=300, watts=250),
    _device("A40", tflops=(149.7, 74.8, 37.4), memory_gib=44.4, memory_gb_per_s=696, link_gb_per_s=56.25, watts=300),
    _device("A30", tflops=(165, 82, 10.3), memory_gib=24, memory_gb_per_s=933, link_gb_per_s=100, watts=165),
    _device("A10", tflops=(125, 62.5, 31.2), memory_gib=22, memory_gb_per_s=600, link_gb_per_s=32, watts=150),
    _device("L40S", tflops=(362, 183, 91.6), memory_gib=44.4, memory_gb_per_s=864, link_gb_per_s=32, watts=350),
    _device("L40", tflops=(181, 90.5, 90.5), memory_gib=44.4, memory_gb_per_s=864, link_gb_per_s=32, watts=300),
    _device("L4", tflops=(121, 60, 30.3), memory_gib=22, memory_gb_per_s=300, link_gb_per_s=32, watts=72),
    _device("V100 SXM2 32GB", "V100-SXM2-32GB", "V100", tflops=(None, None, 15.7), memory_gib=32, memory_gb_per_s=900,
            link_gb_per_s=150, watts=300),
    _device("V100 SXM2 16GB", "V100-SXM2-16GB", tflops=(None, None, 15.7), memory_gib=16, memory_gb_per_s=900,
            link_gb_per_s=150, watts=300),
    _device("V100 PCIe 32GB", "V100-PCIE-32GB", tflops=(None, None, 14), memory_gib=32, memory_gb_per_s=900,
            link_gb_per_s=16, watts=250),
    _device("V100 PCIe 16GB", "V100-PCIE-16GB", tflops=(None, None, 14), memory_gib=16, memory_gb_per_s=900,
            link_gb_per_s=16, watts=250),
    _device("T4", tflops=(None, None, 8.1), memory_gib=14.6, memory_gb_per_s=320, link_gb_per_s=16, watts=70),
    _device("RTX A6000", "A6000", tflops=(154.8, 77.4, 38.7), memory_gib=48, memory_gb_per_s=768, link_gb_per_s=56.25,
            watts=300),
    _device("RTX 6000 Ada", "RTX 6000 Ada Generation", tflops=(364.2, 182.1, 91.1), memory_gib=48, memory_gb_per_s=960,
            link_gb_per_s=32, watts=300),
    _device("RTX 5090", tflops=(209.5, 104.8, 104.8), memory_gib=32, memory_gb_per_s=1792, link_gb_per_s=64, watts=575),
    _device("RTX 4090", tflops=(165.2, 82.6, 82.6), memory_gib=24, memory_gb_per_s=1008, link_gb_per_s=32, watts=450),
    _device("RTX 3090", tflops=(71, 35.6, 35.6), memory_gib=24, memory_gb_per_s=936, link_gb_per_s=56.25, watts=350),
    _device("MI325X", tflops=(1307.4, 653.7, 163.4), memory_gib=256, memory_gb_per_s=6000, link_gb_per_s=448,
            watts=1000),
    _device("MI300X", tflops=(1307.4, 653.7, 163.4), memory_gib=192, memory_gb_per_s=5300, link_gb_per_s=448,
            watts=750),
    # One die of the card: half of the card's rates, memory and power.
    _device("MI250X", "MI250X/MI250", tflops=(191.5, None, 47.9), memory_gib=64, memory_gb_per_s=1638,
            link_gb_per_s=200, watts=280),
)  # fmt: skip


def device_of(name: str) -> Device | None:
    """The device that a driver or a person calls so; None where the table has none of exactly this name.

    Spelling with or without the maker's name, dashes and capitals is the same. Slices of a GPU (MIG) and laptop
    versions have other names, and are not mistaken for the whole one.
    """
    wanted = _words(name)
    for device in DEVICES:
        if wanted in [_words(known) for known in (device.name, *device.driver_names)]:
            return device
    return None


def peak_flops(device_name: str, precision: Arithmetic) -> float | None:
    """Dense peak FLOP/s of a device; None where it is unknown or has no such arithmetic in hardware."""
    device = device_of(device_name)
    return None if device is None else device.peak_flops(precision)


def known_device(name: str, instead: str) -> Device:
    """The device of a name; InputError for an unknown one, which asks for its rates by ``instead``, the keys."""
    device = device_of(name)
    if device is None:
        known = ", ".join(device.name for device in DEVICES)
        raise InputError(f"device {name!r} is in no table; give {instead}, or one of {known}")
    return device


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _VENDOR_WORDS)
