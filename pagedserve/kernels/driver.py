"""What a GPU needs and torch does not: begun before torch is imported, and done when that is.

Making a context takes the driver some tenths of a second, of which the interpreter sees nothing.
torch and Triton use the process's primary context, which is this. Triton hashes all of its
compiler, hundreds of MB, before it looks into its cache for the first time.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

DRIVER = "libcuda.so.1"


class EarlyContext:
    """The first GPU's primary context, made in a thread of its own; none where there is no GPU.

    What goes wrong is left for torch to find and to say.
    """

    def __init__(self, driver: str = DRIVER) -> None:
        self._name = driver
        self._held: tuple[ctypes.CDLL, int] | None = None
        self._making = threading.Thread(target=self._make, name="cuda", daemon=True)
        self._making.start()

    def give_back(self) -> None:
        """Let go of it, where nothing runs on the GPU: a context takes hundreds of MiB there."""
        self._making.join()
        if self._held is not None:
            driver, device = self._held
            driver.cuDevicePrimaryCtxRelease_v2(device)
            self._held = None

    def _make(self) -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        try:
            driver = ctypes.CDLL(self._name)
        except OSError:
            return
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
            return
        if not driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            self._held = driver, device.value
            hash_compiler()


def hash_compiler() -> None:
    """Have Triton remember its own hash."""
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()
