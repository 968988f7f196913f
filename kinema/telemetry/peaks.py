"""The most that a GPU's matrix units can do, as its maker states it: what MFU is a share of."""

from __future__ import annotations

import re

BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    # The first pattern that fits counts. Dense bf16 with float32 accumulation; where a data sheet
    # states the rate with sparsity alone, half of it.
    (r"\bGB200\b", 2500.0),  # GB200 NVL72 data sheet: 360 PFLOPS sparse of 72 GPUs
    (r"\bB200\b", 2250.0),  # HGX B200 data sheet: 36 PFLOPS sparse of 8 GPUs
    (r"\bH200 NVL\b", 835.5),  # H200 data sheet: 1,671 sparse
    (r"\bH200\b", 989.4),  # H200 data sheet, SXM: as the H100
    (r"\bH100 NVL\b", 835.5),  # H100 data sheet: 1,671 sparse
    (r"\bH100 PCIe\b", 756.5),  # H100 data sheet: 1,513 sparse
    (r"\bH(100|800)\b", 989.4),  # H100 data sheet and architecture paper, SXM
    (r"\bA(100|800)\b", 312.0),  # A100 data sheet
    (r"\bL40S\b", 362.0),  # L40S data sheet
    (r"\bRTX 4090(?! D)\b", 165.2),  # Ada architecture paper, appendix A (float32 accumulation)
)
"""Names as the driver gives them, and TFLOP/s."""


def bf16_tflops(device: str) -> float | None:
    """Dense bf16 (and fp16) TFLOP/s of a whole GPU.

    Args:
        device: name as the driver gives it: "NVIDIA H100 80GB HBM3".

    Returns:
        None for a GPU that is not in the table, and for a part of one (MIG).
    """
    if re.search(r"\bMIG\b", device):
        return None
    return next((peak for name, peak in BF16_TFLOPS if re.search(name, device)), None)
