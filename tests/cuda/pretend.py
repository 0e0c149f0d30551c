"""A CUDA device on a machine without one: numbers from the CPU, CUDA's rules about devices, counts of what it does.

    shim.load()                      # before torch is imported
    with pretend() as counts: ...    # device="cuda" works inside; what breaks a rule raises

`Pretend` is a wrapper tensor that says it is on a CUDA device, round a CPU tensor with the numbers. One dispatch mode,
below autograd and autocast, sees every operation: it looks at devices as CUDA's kernels do, counts, computes on the
CPU, and wraps what comes out. The shim gives a CPU build of PyTorch the device guard and the hooks without which
backward passes and autocast("cuda") abort. What `torch.cuda` answers is in queries.py.

Rules. Tensors of two devices do not meet, but for CPU scalars in element-wise operations, which are not written to;
CPU indices of a CUDA tensor, for which the host waits; and copies. A generator is of the device that it draws for.
Collectives take no CPU tensor (NCCL). What has no deterministic kernel fails under full determinism. A copy to pinned
memory that the host did not wait for is not read before an event or a synchronisation.

Counted are kernels (an operation is one; views and memory that is not filled are none; attention is one), copies, and
synchronisations: whatever the host waits for. Not seen: precision, speed, memory and streams of a real device, NCCL.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import counts
import queries
import torch
import torch._dynamo  # here, and not from within a patched torch.cuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


class Pretend(torch.Tensor):
    """A tensor that says it is on the CUDA device; `data_` on the CPU has its numbers."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "Pretend":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=queries.device(),
            requires_grad=False,
        )

    def __init__(self, data: torch.Tensor) -> None:
        self.data_ = data

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretend({self.data_}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # safetensors and tied weights look at addresses.
    def untyped_storage(self) -> Any:
        return self.data_.untyped_storage()

    def storage(self) -> Any:
        return self.data_.storage()

    def data_ptr(self) -> int:
        return self.data_.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:  # torch.save
        _copied("d2h", waits=True, what="to cpu (pickled)")
        return self.data_.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretend":
        if id(self) not in memo:
            new = type(self)(self.data_.clone())
            new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "data_"})
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]


# Copies cross devices; the host may wait.
_ACROSS = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.set_.source_Tensor}
_INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor}
_PUT = {
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
_SCALARS = {
    aten.where.self,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill_.Tensor,
    aten.fill.Tensor,
}  # not marked as element-wise, but they take CPU scalars
# The size of what comes out is known to the device only.
_SIZED_BY_DATA = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
# Without a deterministic kernel, of those that torch.use_deterministic_algorithms lists.
_UNDETERMINED = {aten.cumsum.default, aten.put_.default, aten.histc.default, aten.kthvalue.default, aten.median.dim}
_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten.set_.source_Tensor,
    aten.is_pinned.default,
    aten._local_scalar_dense.default,  # a copy
}

_strict = True
_inside = 0  # of something that is one kernel on a GPU
_in_flight: set[int] = set()  # memory that copies are on their way to
_recording: list[tuple[Any, Any, Any, Any]] | None = None  # what a graph is captured of


def fault(text: str) -> None:
    """What a GPU would refuse."""
    now = counts.now()
    now.note(now.faults, text)
    if _strict:
        raise RuntimeError(f"pretend CUDA device: {text}")


def waited(what: str) -> None:
    """The host waits for all that was asked of the device so far."""
    if _recording is not None:
        fault(f"{what}: the host may not wait while a graph is captured")
    now = counts.now()
    now.note(now.syncs, what)
    arrived()


def arrived() -> None:
    """Copies that were on their way are over."""
    _in_flight.clear()


def _copied(direction: str, waits: bool, what: str) -> None:
    now = counts.now()
    now.note(now.copies, f"{direction}, {'waited for' if waits else 'asynchronous'}")
    if waits:
        waited(what)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, Pretend)]
    on_cpu = [x for x in tensors if not isinstance(x, Pretend) and x.device.type == "cpu"]
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked).type
    for x in on_cpu:
        check_arrived(x)
    if (on_device or target == "cuda") and not _is_view(func) and func not in _ACROSS and not _inside:
        counts.now().kernel(str(func))
    if func.namespace == "c10d":
        _look_at_collective(func, on_cpu)
    elif on_device or target == "cuda":
        _look(func, args, kwargs, on_device, on_cpu, target)
    if target == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func.namespace == "c10d" and "base_" in str(func):  # NCCL looks at numbers of elements only, gloo at shapes
        args = tree_map(lambda x: x.data_.view(-1) if isinstance(x, Pretend) else x, args)
    drawn_by = kwargs.get("generator")
    if drawn_by is not None and drawn_by.device.type == "cuda":
        kwargs = kwargs | {"generator": torch.Generator().set_state(drawn_by.get_state())}
    bare = tree_map(_bare, args), tree_map(_bare, kwargs)
    out = func(*bare[0], **bare[1])
    if _recording is not None and not _is_view(func):
        _recording.append((func, *bare, out))
    if drawn_by is not None:
        drawn_by.set_state(kwargs["generator"].get_state())
    if func is aten._to_copy.default and target == "cpu" and on_device and kwargs.get("non_blocking"):
        out = _pinned(out)  # as CUDA's copy makes it
        _in_flight.add(out.untyped_storage().data_ptr())
    if func in (aten.copy_.default, *_PUT) and not isinstance(args[0], Pretend):
        return args[0]
    stays_there = on_device and target != "cpu" and func is not aten._local_scalar_dense.default
    if not (stays_there or target == "cuda"):
        return out
    if func is aten.detach.default and type(args[0]) is not Pretend:  # a kind of parameter of bitsandbytes'
        return _same_kind(args[0], out)
    known = {id(x.data_): x for x in on_device}  # an operation in place returns its argument

    def wrap(x: Any) -> Any:
        return known[id(x)] if id(x) in known else Pretend(x) if isinstance(x, torch.Tensor) else x

    return tree_map(wrap, out)


def _same_kind(x: Pretend, data: torch.Tensor) -> Pretend:
    new = Pretend.__new__(type(x), data)
    new.__dict__.update(x.__dict__ | {"data_": data})
    return new


def _bare(x: Any) -> Any:
    return x.data_ if isinstance(x, Pretend) else x


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, pin_memory=True).copy_(x)


@cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return (alias is not None and not alias.is_write) or func in _NO_KERNEL


@cache
def _written(func: Any) -> list[int]:
    """Which arguments an operation writes to."""
    arguments = func._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def _look_at_collective(func: Any, on_cpu: list[torch.Tensor]) -> None:
    if "barrier" in str(func):  # NCCL's takes a tensor of its own
        waited("barrier")
    elif on_cpu:
        fault(f"{func}: NCCL takes no CPU tensor, found {_shape(on_cpu[0])}")


def _look(
    func: Any, args: Any, kwargs: dict[str, Any], on_device: list[Pretend], on_cpu: list[torch.Tensor], target: Any
) -> None:
    if func in _UNDETERMINED and args[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
        fault(f"{func}: CUDA has no deterministic kernel for it")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        fault(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    if func is aten._local_scalar_dense.default or func is aten.equal.default:
        waited("item")
    elif func is aten._to_copy.default:
        _look_at_copy(args[0], target or args[0].device.type, bool(kwargs.get("non_blocking")), None)
    elif func is aten.copy_.default:
        to, source = args[:2]
        asynchronous = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        _look_at_copy(source, to.device.type, asynchronous, to)
    elif func in _INDEX or func in _PUT:
        _look_at_index(func, args)
    elif func not in _ACROSS:
        if func in _SIZED_BY_DATA or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            waited("nonzero")
        _look_at_devices(func, args, on_device, on_cpu)


def _look_at_copy(source: torch.Tensor, to: str, asynchronous: bool, into: torch.Tensor | None) -> None:
    from_cpu, to_cpu = not isinstance(source, Pretend), to == "cpu"
    if from_cpu and not to_cpu:
        _copied("h2d", not (asynchronous and is_pinned(source)), "h2d")
    elif to_cpu and not from_cpu:
        free = asynchronous and (into is None or is_pinned(into))
        _copied("d2h", not free, "to cpu")
        if free and into is not None:
            _in_flight.add(into.untyped_storage().data_ptr())
    elif not from_cpu and not _inside:
        counts.now().kernel("copy")


def _look_at_index(func: Any, args: Any) -> None:
    whole = args[0]
    for index in (i for i in args[1] if i is not None):
        there = isinstance(index, Pretend)
        if there and not isinstance(whole, Pretend):
            fault(f"{func}: a CPU tensor {_shape(whole)} indexed by one of cuda")
        if not there and isinstance(whole, Pretend):
            _copied("h2d", waits=True, what="h2d index")
        if index.dtype in (torch.bool, torch.uint8):
            waited("nonzero (mask index)")
    if func in _PUT and isinstance(args[2], Pretend) != isinstance(whole, Pretend) and args[2].dim():
        fault(f"{func}: a value on {args[2].device.type} put into a tensor on {whole.device.type}")


def _look_at_devices(func: Any, args: Any, on_device: list[Pretend], on_cpu: list[torch.Tensor]) -> None:
    if not on_device:
        return
    written = [args[i] for i in _written(func) if i < len(args)]
    takes_scalars = (
        torch.Tag.pointwise in func.tags or func in _SCALARS or "foreach" in str(func) or "fused" in str(func)
    )
    for x in on_cpu:
        if x.dim() or not takes_scalars or any(x is y for y in written):
            fault(f"{func}: expected all tensors on one device, found {_shape(x)} on cpu beside cuda")


def _shape(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}".removeprefix("torch.")


def is_pinned(x: torch.Tensor) -> bool:
    """Whether a CPU tensor's memory was asked for as pinned."""
    return bool(torch.ops.aten.is_pinned(x))


def check_arrived(x: torch.Tensor) -> None:
    """A fault where a copy into this tensor may still be on its way."""
    if _in_flight and x.layout == torch.strided and x.untyped_storage().data_ptr() in _in_flight:
        fault("memory that an asynchronous copy was on its way to was read before an event or a synchronisation")


class CUDAGraph:
    """Kernels with the memory that they read and write. A replay is one launch and runs no Python of the program."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded: list[tuple[Any, Any, Any, Any]] = []
        self.kernels = 0

    def replay(self) -> None:
        """All of them again, on the same memory."""
        counts.now().kernel("graph")
        counts.now().call("kernel in a graph", self.kernels)
        for func, args, kwargs, out in self.recorded:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@contextlib.contextmanager
def _graph(graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """torch.cuda.graph. A real device runs nothing yet; here kernels run once, and what captures restores its state."""
    global _recording
    before = counts.now().n_kernels()
    _recording = graph.recorded
    try:
        yield
    finally:
        _recording = None
        graph.kernels = counts.now().n_kernels() - before


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def one_kernel(name: str) -> Iterator[None]:
    """What happens inside is one kernel on a GPU."""
    global _inside
    if not _inside:
        counts.now().kernel(name)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def _get_data(x: torch.Tensor) -> torch.Tensor:
    return Pretend(x.data_) if isinstance(x, Pretend) else torch._C.TensorBase.data.__get__(x)


def _set_data(x: torch.Tensor, new: torch.Tensor) -> None:
    """x.data = new, which may be on the other device."""
    torch._C.TensorBase.data.__set__(x, new)
    if isinstance(new, Pretend):
        if not isinstance(x, Pretend):
            x.__class__ = _kind(type(x)) if type(x) is not torch.Tensor else Pretend
        x.data_ = new.data_


def _make_subclass(make: Any) -> Any:
    """Parameters of kinds of their own (bitsandbytes') over tensors of the device."""

    def made(cls: Any, data: torch.Tensor, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        if not isinstance(data, Pretend):
            return make(cls, data, requires_grad, **options)
        new = Pretend.__new__(cls if issubclass(cls, Pretend) else _kind(cls), data.data_)
        new.data_ = data.data_
        return new.requires_grad_(requires_grad)

    return staticmethod(made)


@cache
def _kind(cls: Any) -> Any:
    return type(cls)(cls.__name__, (cls, Pretend), {"__init__": lambda *_, **__: None})


class _Attention(torch.autograd.Function):
    """Attention by its formula, counted as one kernel each way."""

    @staticmethod
    def forward(ctx: Any, sdpa: Any, options: dict[str, Any], q: Any, k: Any, v: Any, mask: Any) -> Any:
        ctx.sdpa, ctx.options = sdpa, options
        ctx.autocast = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}
        ctx.save_for_backward(q, k, v, mask)
        with one_kernel("attention"):
            return sdpa(q, k, v, mask, **options)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        *parts, mask = ctx.saved_tensors
        autocast = torch.autocast("cuda", **ctx.autocast, cache_enabled=False)
        with one_kernel("attention backward"), torch.enable_grad(), autocast:
            parts = [x.detach().requires_grad_() for x in parts]
            grads = torch.autograd.grad(ctx.sdpa(*parts, mask, **ctx.options), parts, grad)
        return None, None, *grads, None


def _attention(sdpa: Any) -> Any:
    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if not isinstance(query, Pretend):
            return sdpa(query, key, value, attn_mask, **options)
        return _Attention.apply(sdpa, options, query, key, value, attn_mask)

    return attention


def _reads_memory(method: Any) -> Any:
    """Of CPU tensors, past the dispatcher."""

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        check_arrived(self)
        return method(self, *args, **kwargs)

    return read


@contextlib.contextmanager
def pretend(strict: bool = True) -> Iterator[counts.Counts]:
    """There is a CUDA device inside the block. strict: what breaks a rule raises; it is counted either way."""
    global _strict
    _strict = strict
    _in_flight.clear()
    functional = torch.nn.functional
    patches = [*queries.patches(waited, arrived)]
    patches += [(functional, "scaled_dot_product_attention", _attention(functional.scaled_dot_product_attention))]
    graphs = {"graph_pool_handle": lambda: None, "CUDAGraph": CUDAGraph, "graph": _graph}
    patches += [(torch.cuda, name, new) for name, new in graphs.items()]
    patches += [(torch.Tensor, "data", property(_get_data, _set_data))]
    patches += [(torch.Tensor, "_make_subclass", _make_subclass(torch.Tensor._make_subclass))]
    patches += [(torch.Tensor, name, _reads_memory(getattr(torch.Tensor, name))) for name in ("tolist", "numpy")]
    with contextlib.ExitStack() as stack:
        for owner, name, new in patches:
            stack.callback(_undo(owner, name))
            setattr(owner, name, new)
        # torch.tensor(x, device="cuda") is made on the CPU, then moved by an operation that the mode sees.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to() keeps the parameters' identity, as on a GPU: an optimizer may hold them already.
        future = torch.__future__
        stack.callback(future.set_swap_module_params_on_conversion, future.get_swap_module_params_on_conversion())
        future.set_swap_module_params_on_conversion(True)
        with _Mode():
            yield counts.fresh()


def _undo(owner: Any, name: str) -> Any:
    if name in vars(owner):
        old = vars(owner)[name]
        return lambda: setattr(owner, name, old)
    return lambda: delattr(owner, name)
