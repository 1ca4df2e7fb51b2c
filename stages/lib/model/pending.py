"""Numbers on their way from the GPU: asked for where they arise, read when nobody has to wait for them."""

import time

import torch


class Moment:
    """A point in the work that the GPU was given so far; without a GPU, the time."""

    def __init__(self) -> None:
        self._clock = time.monotonic()
        self._event = None
        if torch.cuda.is_available():
            # A blocking wait leaves the core to the thread that lays out the next bins.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()

    def wait(self) -> None:
        """Until the GPU has come so far."""
        if self._event:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds that the GPU took from there to here, its idle time among them; waits until it is here."""
        if not self._event:
            return self._clock - earlier._clock
        self.wait()
        return float(earlier._event.elapsed_time(self._event)) / 1000  # type: ignore[union-attr]


class Numbers:
    """A step's loss and gradient norm, and when the GPU was through with the step.

    Args:
        step: from 1. learning_rate: the one it took.
        values: [2 or more], loss in nats, norm, and what else is asked for, on the device.
    """

    def __init__(self, step: int, learning_rate: float, values: torch.Tensor) -> None:
        self.step, self.learning_rate = step, learning_rate
        # A copy to other than pinned memory would wait for the GPU. The moment is behind it on the same stream.
        self._host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self.ended = Moment()

    def read(self) -> tuple[float, ...]:
        """Loss, gradient norm, and what else was asked for; waits until they are there."""
        self.ended.wait()
        return tuple(self._host.tolist())
