"""A GPU that is pretended: tensors that say they are on `cuda:0` or `mps:0`, with their numbers on the CPU.

    with pretended("cuda:0") as device:
        model.to("cuda:0").generate(…)
        device.waits                        what made the CPU wait for the device, and at which line

It raises where devices mix, and where MPS is given float64. The kernels are the CPU's, so that results can be compared
with it. Only a forward runs: autograd asks for streams, which no build for the CPU has.
"""

import contextlib
import ctypes
import functools
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
INSTEAD = {}  # what the CPU has no kernel of
if hasattr(aten.mm, "dtype"):  # since torch 2.8
    INSTEAD[aten.mm.dtype] = lambda a, b, dtype: a.to(dtype) @ b.to(dtype)
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # by device type, what sets the current device
CUDA, MPS, META = 1, 13, 14  # device types


class There(torch.Tensor):
    """A tensor on the pretended device; `raw` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device):
        if device.type == "mps" and raw.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        kind = dict(dtype=raw.dtype, device=device, strides=raw.stride(), storage_offset=raw.storage_offset())
        with torch.inference_mode(False):  # a view of a tensor from outside that mode may not be of it
            there = torch.Tensor._make_wrapper_subclass(cls, raw.size(), **kind)
        there.raw = raw
        return there

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise RuntimeError(f"{operator}: the pretended device is off")

    def __repr__(self) -> str:
        return f"There({self.raw})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: dict) -> "There":
        copy = self.detach().clone()
        memo[id(self)] = copy = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return copy

    def tolist(self) -> list:
        return self.cpu().tolist()


def each(function, x):
    """x with every tensor in it, also in lists, replaced by what the function makes of it."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)(each(function, y) for y in x) if isinstance(x, (list, tuple)) else x


def tensors(x) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    each(found.append, x)
    return found


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.raw if isinstance(x, There) else x


@functools.cache
def is_composite(operator) -> bool:
    return operator._can_decompose()


class Device(TorchDispatchMode):
    def __init__(self, name: str):
        super().__init__()
        self.device = torch.device(name)
        self.waits: list[str] = []

    def wait(self, what: str) -> None:
        """The CPU waits for the device."""
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
        line = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else ""
        self.waits.append(f"{what}, {line}")

    def is_here(self, device) -> bool:
        return device is not None and torch.device(device).type == self.device.type

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_composite(operator):  # in inference mode such operators arrive whole
            with self:
                return operator.decompose(*args, **kwargs)
        there = [x for x in tensors((args, *kwargs.values())) if isinstance(x, There)]
        to_cpu = "device" in kwargs and not self.is_here(kwargs["device"])
        if not there and not self.is_here(kwargs.get("device")):
            return operator(*args, **kwargs)
        self.check(operator, args, kwargs, to_cpu)

        options = {name: each(raw, x) for name, x in kwargs.items()}
        if "device" in options:
            options["device"] = torch.device("cpu")
        call = lambda *args: INSTEAD.get(operator, operator)(*args, **options)  # noqa: E731
        out = call(*each(raw, args))
        if to_cpu:
            return out
        known = {id(x.raw): x for x in there}  # an operator in place returns what it was given
        wrap = lambda x: known[id(x)] if id(x) in known else There(x, self.device)  # noqa: E731
        return each(wrap, out)

    def check(self, operator, args, kwargs, to_cpu: bool) -> None:
        """Count a wait; raise where devices mix."""
        elsewhere = [x for x in tensors((args, *kwargs.values())) if not isinstance(x, There)]
        if operator in WAITS:
            self.wait(operator.name())
        elif operator in COPIES:
            if to_cpu or elsewhere:
                self.wait("a copy between the devices")
        elif operator in INDEXED:
            for x in tensors(args[1]):
                if isinstance(x, There) and not isinstance(args[0], There):
                    raise RuntimeError("a tensor on the CPU by an index that is not")
                if not isinstance(x, There) or x.dtype == torch.bool:
                    self.wait("an index on the CPU, or of booleans")
            if any(not isinstance(x, There) for x in tensors(args[2:])):
                self.wait("a value on the CPU")
        elif any(x.dim() for x in elsewhere):
            raise RuntimeError(f"{operator}: {self.device} and cpu mix, at {[tuple(x.shape) for x in elsewhere]}")


class First(TorchFunctionMode):
    """`x.to("cuda")` is `x.to("cuda:0")`: torch would ask for the current device, which nothing sets here."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def is_bare(self, x) -> bool:
        return isinstance(x, (str, torch.device)) and str(x) == self.device.type

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            args = [self.device if self.is_bare(x) else x for x in args]
        return function(*args, **(kwargs or {}))


def attention(q, k, v, mask=None, dropout=0.0, is_causal=False, enable_gqa=False):
    """Stands for F.scaled_dot_product_attention, which looks for a kernel of the device before it can be seen."""
    return aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, is_causal, enable_gqa=enable_gqa)[0]


@contextlib.contextmanager
def pretended(name: str):
    """A `Device` of that name, cuda:0 or mps:0, inside the block."""
    device, tensor, cuda = Device(name), torch.tensor, name == "cuda:0"
    library = ctypes.CDLL(next(str(path) for path in Path(torch.__file__).parent.glob("lib/libc10.*")))
    guards = (ctypes.c_void_p * 20).in_dll(library, GUARDS)
    changes = {
        "torch.tensor": lambda data, device=None, **kind: tensor(data, **kind).to(device or "cpu"),
        "torch.__future__._overwrite_module_params_on_conversion": True,  # a moved parameter is another object
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: cuda,
        "torch.cuda.is_initialized": lambda: cuda,
        "torch.cuda.is_bf16_supported": lambda **how: cuda,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.synchronize": lambda: device.wait("synchronize"),
        "torch.backends.mps.is_available": lambda: not cuda,
        "torch.backends.mps.is_macos_or_newer": lambda *version: True,
        "torch.mps.synchronize": lambda: device.wait("synchronize"),
    }
    with contextlib.ExitStack() as stack:
        for kind in (CUDA, MPS):
            stack.callback(guards.__setitem__, kind, guards[kind])
            guards[kind] = guards[META]  # for which there is nothing to set
        for changed, value in changes.items():
            stack.enter_context(patch(changed, value))
        stack.enter_context(First(device.device))
        yield stack.enter_context(device)
