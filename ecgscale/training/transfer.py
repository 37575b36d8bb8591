"""Batches on their way to the device."""

from __future__ import annotations

import torch

from ecgscale.data.batch import ECGBatch


class Transfer:
    """Puts batches on a device. To a GPU they go on a stream of their own.

    So the copy of a pinned batch runs beside what was queued before it, and what is queued afterwards waits for it on
    the GPU, not on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: ECGBatch) -> ECGBatch:
        if self.stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self.stream)
        return moved.used_by(computing)

    def copied(self) -> torch.cuda.Event | None:
        """Comes when all batches so far are on the device; None for a CPU, where nothing is under way."""
        return None if self.stream is None else self.stream.record_event()
