"""The floating-point operations a second that a worker's device can do at most: what MFU is a fraction of.

On a GPU it is the figure of its data sheet, for dense matrices in the arithmetic of the training. A CPU has no such
figure that it keeps, because its clock falls with its load: there the speed at which one core multiplies matrices is
measured, and every thread of the worker counts as such a core.
"""

from __future__ import annotations

import functools
import math
import re
import time

import torch

TERA = 1e12

OF_GPUS: dict[str, dict[str, float]] = {
    r"V100S-PCIE.*": {"float16": 130, "float32": 16.4},
    r"V100-PCIE.*|V100-FHHL.*": {"float16": 112, "float32": 14},
    r"V100-SXM.*": {"float16": 125, "float32": 15.7},
    r"T4": {"float16": 65, "float32": 8.1},
    r"A10": {"bfloat16": 125, "float16": 125, "tf32": 62.5, "float32": 31.2},
    r"A10G": {"bfloat16": 70, "float16": 70, "tf32": 35, "float32": 31.5},
    r"A30": {"bfloat16": 165, "float16": 165, "tf32": 82, "float32": 10.3},
    r"A40": {"bfloat16": 149.7, "float16": 149.7, "tf32": 74.8, "float32": 37.4},
    r"A100[ -].*|A800[ -].*": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    r"RTX A6000": {"bfloat16": 154.8, "float16": 154.8, "tf32": 77.4, "float32": 38.7},
    r"RTX 3090": {"bfloat16": 71, "float16": 71, "tf32": 35.6, "float32": 35.6},
    r"RTX 3090 Ti": {"bfloat16": 80, "float16": 80, "tf32": 40, "float32": 40},
    r"L4": {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3},
    r"L40": {"bfloat16": 181, "float16": 181, "tf32": 90.5, "float32": 90.5},
    r"L40S": {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6},
    r"RTX 6000 Ada Generation": {"bfloat16": 364.2, "float16": 364.2, "tf32": 182.1, "float32": 91.1},
    r"RTX 4080": {"bfloat16": 97.5, "float16": 97.5, "tf32": 48.7, "float32": 48.7},
    r"RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6},
    r"RTX 5090": {"bfloat16": 209.5, "float16": 209.5, "tf32": 104.8, "float32": 104.8},
    r"H100 PCIe": {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51},
    r"H100 NVL|H200 NVL": {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60},
    r"H100 \d+GB HBM.*|H200|GH200 .*": {"bfloat16": 989, "float16": 989, "tf32": 494, "float32": 67},
    r"B200": {"bfloat16": 2250, "float16": 2250, "tf32": 1125, "float32": 75},
    r"GB200": {"bfloat16": 2500, "float16": 2500, "tf32": 1250, "float32": 80},
}
"""The name of a GPU without its brand -> TFLOPS for dense matrices, half of what data sheets tell "with sparsity"; of
half precision with sums in float32, as torch makes them. From NVIDIA's data sheets and white papers of each product. A
name must match as a whole: a part of a GPU (MIG) or one for laptops is another."""

BRANDS = re.compile(r"^(NVIDIA |Tesla |Quadro |GeForce )+")

SECONDS = 0.02
"""For which each size is multiplied on a CPU, once a process. No larger one is tried once a multiplication takes longer
than half of it: float16 is emulated on most CPUs, at 4 GFLOPS."""

SIZES = (128, 256, 512, 1024)
"""Rows of the square matrices, of which the fastest counts."""


def find(device: torch.device, kind: str) -> float | None:
    """FLOPs a second of this device in an arithmetic: float32, tf32, bfloat16 or float16; None if they are unknown."""
    if device.type == "cuda":
        return of_name(torch.cuda.get_device_name(device), kind)
    return torch.get_num_threads() * _of_core(kind) if device.type == "cpu" else None


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def of_name(name: str, kind: str) -> float | None:
    """The data sheet's FLOPs a second of a GPU, by its name in torch; None if it is unknown."""
    plain = BRANDS.sub("", name)
    known = next((row for pattern, row in OF_GPUS.items() if re.fullmatch(pattern, plain) and "MIG" not in plain), {})
    return TERA * known[kind] if kind in known else None


def arithmetic(device: torch.device, *, autocast: str, weights: torch.dtype) -> str:
    """The arithmetic in which a training multiplies matrices: of autocast (no, bf16, fp16), else of the weights."""
    if autocast != "no":
        return {"bf16": "bfloat16", "fp16": "float16"}[autocast]
    kind = str(weights).removeprefix("torch.")
    is_tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if kind == "float32" and is_tf32 else kind


@functools.cache
def _of_core(kind: str) -> float:
    """The fastest of many multiplications on one thread: several would wait for each other where others compute, too.

    It draws no random number and puts the threads back, so that weights are the same without it.
    """
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    threads, most = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        for size in SIZES:
            matrix = torch.ones((size, size), dtype=dtype)
            matrix @ matrix  # the first call of a size prepares
            fastest, end = math.inf, time.perf_counter() + SECONDS
            while (started := time.perf_counter()) < end:
                matrix @ matrix
                fastest = min(fastest, time.perf_counter() - started)
            most = max(most, 2 * size**3 / fastest)
            if fastest > SECONDS / 2:
                break
    finally:
        torch.set_num_threads(threads)
    return most
