"""A GPU that is not there: tensors on a CPU pose as tensors on a GPU, the host code takes the GPU's branches, and
kernels are specialised as for it, but neither compiled nor launched (what they would write stays as allocated).

    with FakeGpu() as gpu:
        with gpu.record() as found:
            contrastive_loss(a, b, 10.0).backward()
        found.launches, found.calls, found.num_kernels
        host_us(lambda: contrastive_loss(a, b, 10.0))

Everything is undone on leaving. Kernels bound to the interpreter are none that a driver could launch: see `FAKED`.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels._device import HAS_TRITON, INTERPRETED

FAKED = HAS_TRITON and not INTERPRETED
PROCESSORS = {80: 108, 90: 132, 100: 148}
# ATen calls that the host waits in, for a value or for a size that depends on values
WAITS = set(
    "_local_scalar_dense is_nonzero item nonzero nonzero_static argwhere masked_select equal _unique2 unique_dim "
    "unique_consecutive bincount".split()
)
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# calls that launch nothing on a GPU, views apart
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
# by file of our package: what it reads there was made on the host and kept there
ON_HOST = ("multi_tensor/table.py", "multi_tensor/paths.py", "mmkernels/_device.py")


class Waited(AssertionError):
    """The host would wait for the device here."""


@dataclass(frozen=True)
class Launched:
    """A kernel's launch."""

    kernel: str
    grid: tuple[int, int, int]
    key: str  # what is compiled anew where it differs
    device: int
    stream: int


@dataclass
class Recorded:
    """What a block asked of the device.

    Attributes:
        launches: of Triton kernels, in order.
        aten: calls of ATen by name, those within our registered ops too.
        views: of those, the ones that compute nothing: views, and allocations.
        waits: where the host would have waited, where that is no error.
        order: calls of ATen, and "wait", in order.
    """

    launches: list[Launched] = field(default_factory=list)
    aten: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    @property
    def num_calls(self) -> int:
        """ATen calls of every kind, and launches."""
        return self.aten.total() + len(self.launches)

    @property
    def num_kernels(self) -> int:
        """ATen calls that compute or copy something, and launches: about the kernels that a GPU runs."""
        return self.num_calls - self.views.total()

    @property
    def keys(self) -> set[tuple[str, str]]:
        return {(x.kernel, x.key) for x in self.launches}


class _Kernel:
    """In a compiled kernel's place."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, key: str, gpu: "FakeGpu") -> None:
        self.name, self.key, self.gpu = name, key, gpu

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *_: Any) -> None:
        self.gpu.launches.append(Launched(self.name, (x, y, z), self.key, self.gpu.current, stream))


class _Event:
    """In a CUDA event's place."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeGpu:
    """An NVIDIA GPU of an architecture, sm_90 unless another is asked for, as a context."""

    def __init__(self, arch: int = 90) -> None:
        self.arch, self.current, self.is_capturing = arch, 0, False
        self.launches: list[Launched] = []
        self.streams: dict[int, int] = {}
        """By device, its current stream; 7 more than the device's number unless set."""
        self._patch = pytest.MonkeyPatch()
        self._faked: set[Any] = set()

    def __enter__(self) -> "FakeGpu":
        try:
            self._pose()
            self._drive()
            self._library = torch.library.Library("aten", "IMPL")
            for name, product in (("mm.dtype", _mm), ("mm.dtype_out", _mm), ("addmm.dtype", _addmm)):
                self._library.impl(name, product, "CPU")
            self._library.impl("addmm.dtype_out", _addmm, "CPU")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        for kernel in self._faked:
            for device in [d for d in kernel.device_caches if d < 0]:
                del kernel.device_caches[device]
        if hasattr(self, "_library"):
            self._library._destroy()

    def _pose(self) -> None:
        set_to, cuda = self._patch.setattr, torch.cuda
        set_to(Tensor, "is_cuda", True)
        set_to(Tensor, "is_cpu", False)
        set_to(cuda, "device", self._device)
        set_to(cuda, "current_device", lambda: self.current)
        set_to(cuda, "current_stream", lambda device=None: self.stream(self.current))
        set_to(cuda, "Event", _Event)
        set_to(cuda, "is_available", lambda: True)
        set_to(cuda, "_lazy_init", lambda: None)
        set_to(cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        set_to(cuda, "get_device_capability", lambda device=None: divmod(self.arch, 10))
        found = SimpleNamespace(
            name="fake", major=self.arch // 10, minor=self.arch % 10, total_memory=141 << 30, warp_size=32,
            multi_processor_count=PROCESSORS[self.arch], shared_memory_per_block_optin=227 << 10,
        )  # fmt: skip
        set_to(cuda, "get_device_properties", lambda device=None: found)
        set_to(cuda, "mem_get_info", lambda device=None: (139 << 30, 141 << 30))

    def _drive(self) -> None:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 (takes longer than torch)
        from triton.runtime import jit  # noqa: PLC0415
        from triton.runtime.driver import driver  # noqa: PLC0415

        gpu = self

        class Driver:
            # of a cache of its own: below zero there is no device
            get_current_target = staticmethod(lambda: GPUTarget("cuda", gpu.arch, 32))
            get_current_device = staticmethod(lambda: -1 - gpu.current)
            get_current_stream = staticmethod(lambda device: gpu.stream(-1 - device))
            get_active_torch_device = staticmethod(lambda: torch.device("cuda", gpu.current))

        def do_compile(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> _Kernel:
            gpu._faked.add(kernel)
            compiled = kernel.device_caches[device][0][key] = _Kernel(kernel.fn.__name__, key, gpu)
            return compiled

        self._patch.setattr(driver, "_active", Driver())
        self._patch.setattr(jit.JITFunction, "_do_compile", do_compile)

    def stream(self, device: int) -> int:
        return self.streams.get(device, 7 + device)

    @contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before, index = self.current, device if isinstance(device, int) else torch.device(device).index
        self.current = before if index is None else index
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def record(self, *, may_wait: bool = False, device: int | None = None) -> Iterator[Recorded]:
        """Records the block; what the host would wait for is an error, or noted where it `may_wait`.

        Args:
            may_wait: whether it may wait.
            device: tensors say that they lie on this device ("cuda", device), and go where they are sent to it.
        """
        found, first = Recorded(), len(self.launches)
        with pytest.MonkeyPatch.context() as patch:
            _refuse_reads(patch, found, may_wait)
            if device is not None:
                _say_device(patch, torch.device("cuda", device))
            try:
                with _Counting(found, may_wait):
                    yield found
            finally:
                found.launches = self.launches[first:]


class _Counting(TorchDispatchMode):
    """Counts ATen calls, within registered ops too, and sends what is made "on the GPU" to the CPU."""

    def __init__(self, found: Recorded, may_wait: bool) -> None:
        super().__init__()
        self.found, self.may_wait = found, may_wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (opdef := OPDEFS.get(func._schema.name)) is not None:
            with self:
                return opdef._init_fn(*args, **kwargs)
        if func._can_decompose():  # what a registered op's body calls is not taken apart by autograd
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if _waits(name, args):
            _wait(self.found, self.may_wait, name)
        self.found.aten[name] += 1
        self.found.order.append(name)
        if func.is_view or name in ALLOCATIONS or name in ("detach", "lift_fresh"):
            self.found.views[name] += 1
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "cuda":
            kwargs["device"] = torch.device("cpu")
        return args[0] if name == "_pin_memory" else func(*args, **kwargs)


def _waits(name: str, args: Sequence[Any]) -> bool:
    is_mask = name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    sizes = name == "repeat_interleave" and isinstance(args[0], Tensor)
    return is_mask or sizes or name in WAITS


def _wait(found: Recorded, may_wait: bool, name: str, of_host: Sequence[str] = ON_HOST) -> None:
    frame: Any = sys._getframe(1)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    where = "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if where.rsplit(":", 1)[0].endswith(tuple(of_host)):
        return
    found.order.append("wait")
    found.waits.append(f"{name} at {where}")
    if not may_wait:
        raise Waited(found.waits[-1])


def _refuse_reads(patch: pytest.MonkeyPatch, found: Recorded, may_wait: bool) -> None:
    """Reads that reach no dispatcher, or none that says so: of a tensor on a CPU they copy nothing."""

    def refused(
        call: Callable[..., Any], name: str, is_read: Callable[..., bool], of_host: Sequence[str] = ON_HOST
    ) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            if is_read(*args, **kwargs):
                _wait(found, may_wait, name, of_host)
            return call(*args, **kwargs)

        return checked

    def always(*_: Any, **__: Any) -> bool:
        return True

    def to_host(_: Tensor, *args: Any, **kwargs: Any) -> bool:
        asked = [x for x in (*args[:1], kwargs.get("device")) if isinstance(x, str | torch.device)]
        # of a device that is not named by a literal: that of the tensors, which pose
        return any(x == "cpu" for x in asked if isinstance(x, str)) and not kwargs.get("non_blocking", False)

    def uploads(*_: Any, device: Any = None, **__: Any) -> bool:
        return isinstance(device, torch.device) or device not in (None, "cpu")

    for name in ("cpu", "numpy", "tolist"):
        patch.setattr(Tensor, name, refused(getattr(Tensor, name), name, always))
    patch.setattr(Tensor, "to", refused(Tensor.to, "to('cpu')", to_host))
    patch.setattr(torch.cuda, "synchronize", refused(lambda *_: None, "torch.cuda.synchronize", always))
    patch.setattr(_Event, "synchronize", refused(lambda *_: None, "torch.cuda.Event.synchronize", always, ()))
    # from memory that is not pinned
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, refused(getattr(torch, name), f"torch.{name} of numbers on the device", uploads))


def _say_device(patch: pytest.MonkeyPatch, device: torch.device) -> None:
    real = Tensor.to

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        kwargs = {k: torch.device("cpu") if isinstance(a, torch.device) else a for k, a in kwargs.items()}
        return real(x, *args, **kwargs)

    patch.setattr(Tensor, "to", to)
    patch.setattr(Tensor, "device", property(lambda x: device))


def _mm(x: Tensor, y: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    found = torch.mm(x.to(out_dtype), y.to(out_dtype))
    return found if out is None else out.copy_(found)


def _addmm(
    x: Tensor, y: Tensor, z: Tensor, out_dtype: torch.dtype, *, beta: Any = 1, alpha: Any = 1, out: Tensor | None = None
) -> Tensor:
    found = torch.addmm(x, y.to(out_dtype), z.to(out_dtype), beta=beta, alpha=alpha)
    return found if out is None else out.copy_(found)


@contextmanager
def without_data(gpu: FakeGpu) -> Iterator[None]:
    """Tensors on "meta" take the real host code of our registered ops, not their shapes' functions: sizes of any kind,
    and every read of a value an error of torch's own."""
    real, autocast = {}, torch.autocast
    with pytest.MonkeyPatch.context() as patch:
        for name, opdef in list(OPDEFS.items()):
            if name.startswith("mmkernels::"):
                real[name] = opdef
                patch.setattr(opdef, "_abstract_fn", opdef._init_fn)
        patch.setattr(torch, "autocast", lambda kind, **k: nullcontext() if kind == "meta" else autocast(kind, **k))
        yield


def host_us(call: Callable[[], Any], repeats: int = 40, warmups: int = 5) -> float:
    """The median time of a call on the host, CPU time of the thread: what a GPU would wait for if it were faster.
    Of small tensors, so that the CPU's own computing of ATen calls is little. A real launch adds some microseconds."""
    for _ in range(warmups):
        call()
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - start)
    return median(times) / 1000


def host_times(calls: dict[str, Callable[[], Any]], rounds: int = 5, repeats: int = 20) -> dict[str, float]:
    """`host_us` of several calls beside each other, in turns, the least of the rounds' medians."""
    found = [{name: host_us(call, repeats, 3) for name, call in calls.items()} for _ in range(rounds)]
    return {name: min(x[name] for x in found) for name in calls}
