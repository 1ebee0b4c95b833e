"""What detcoll asks of a device's driver, in its own words: streams, events, copies, pinned memory.

`detcoll.device.cuda.Cuda` carries it out, and in tests `detcoll.testing.device.StrictDevice`. Handles of streams and
events and addresses are plain whole numbers; devices are numbered as CUDA numbers them for this process. Stream 0 is
the default stream of the current device, 1 the same by another name, and 2 the default stream of the calling thread.

Every method but `on` and those that take a device is called inside ``with driver.on(device):``, with the device that
its handles and addresses belong to. Each raises `detcoll.errors.DeviceError` if the driver refuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from enum import IntEnum


class MemoryType(IntEnum):
    """What kind of memory is at an address, in CUDA's numbers."""

    UNKNOWN = 0  # not known to the driver: ordinary memory of the host
    HOST = 1
    DEVICE = 2
    ARRAY = 3
    UNIFIED = 4


class Driver(ABC):
    """The driver of all devices of this process. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._spare_events: dict[int, list[int]] = {}

    def take_event(self, device: int) -> int:
        """Return an event of a device; one that was given back, if there is one."""
        try:
            return self._spare_events.setdefault(device, []).pop()
        except IndexError:
            return self.event(device)

    def give_event(self, device: int, event: int) -> None:
        """Take back an event that nobody will ask about any more. It may still be due: recording it anew replaces that.

        Takes no lock, so it may be called wherever Python frees memory.
        """
        self._spare_events.setdefault(device, []).append(event)

    @abstractmethod
    def on(self, device: int) -> AbstractContextManager[None]:
        """Make a device current for this thread, and what was current before afterwards.

        Inside, CUDA graphs that other threads capture do not forbid calls. To do so once more inside costs little.

        Raises
        ------
        DeviceError
            If there is no such device, or this process has not begun to use it. A device whose array is at hand is in
            use; detcoll never makes a context by accident.
        """

    @abstractmethod
    def stream(self, device: int) -> int:
        """Make a stream of a device, which does not wait for the default stream."""

    @abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Give a stream up; what it holds is still carried out."""

    @abstractmethod
    def capturing(self, stream: int) -> bool:
        """Tell whether what is queued on a stream becomes part of a CUDA graph, instead of being carried out."""

    @abstractmethod
    def is_idle(self, stream: int) -> bool:
        """Tell whether a stream has carried out all that it holds. It must not be captured: that would end the graph.

        For the default stream of a device that includes what other streams hold that it waits for.
        """

    @abstractmethod
    def event(self, device: int) -> int:
        """Make an event of a device, without times. Prefer `take_event`."""

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Give an event up."""

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """Let an event mark what a stream holds now."""

    @abstractmethod
    def is_past(self, event: int) -> bool:
        """Tell whether all that an event marks has been carried out; so it is for one that was never recorded."""

    @abstractmethod
    def wait_for(self, event: int) -> None:
        """Block until an event is past, however long that takes."""

    @abstractmethod
    def order(self, stream: int, event: int) -> None:
        """Let what is queued on a stream from now on wait for an event."""

    @abstractmethod
    def to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None:
        """Queue a copy from the device. If the host's memory is not pinned, block until it has been carried out."""

    @abstractmethod
    def to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        """Queue a copy to the device. If the host's memory is not pinned, block until it has been read."""

    @abstractmethod
    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new memory of a device, which stays as long as the process."""

    @abstractmethod
    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of the host, for all devices."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """End the pinning of memory, named by its first address. No copy may use it any more."""

    @abstractmethod
    def device_of(self, address: int) -> int:
        """Return the device that memory belongs to."""

    @abstractmethod
    def memory_type(self, address: int) -> MemoryType:
        """Return what kind of memory is at an address."""

    @abstractmethod
    def pci_bus_id(self, device: int) -> str:
        """Return where a device is attached, as the kernel writes it, such as ``"0000:3b:00.0"``."""
