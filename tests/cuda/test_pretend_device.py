"""The rules of the pretend device, each on a line or two: what a GPU refuses, what it waits for, what it launches."""

import pytest

# x: float [6] on the device; cpu: the same on the CPU.
REFUSED = {
    "mixed devices": ("x + cpu", "expected all tensors on one device"),
    "a CPU mask": ("torch.where(cpu > 1, x, 0)", "expected all tensors on one device"),
    "a CPU weight": ("torch.nn.functional.linear(x, torch.ones(2, 6))", "expected all tensors on one device"),
    "a CPU scalar in a product of matrices": ("torch.stack([x.sum(), torch.tensor(1.0)])", "one device"),
    "a CPU scalar that is written to": ("torch.tensor(1.0).add_(x.sum())", "one device"),
    "a CPU tensor indexed by the device's": ("cpu[x.long()]", "indexed by one of cuda"),
    "a CPU value put in": ("x.index_put_((torch.tensor([0, 1], device='cuda'),), torch.ones(2))", "put into"),
    "lists that mix devices": ("torch._foreach_add([x, x], [x, cpu])", "expected all tensors on one device"),
    "numpy of it": ("x.numpy()", "can't convert cuda:0 device type tensor to numpy"),
    "a CPU generator": (
        "torch.rand(3, device='cuda', generator=torch.Generator())",
        "'cuda' device type for generator",
    ),
    "a float cumsum under determinism": (
        "torch.use_deterministic_algorithms(True)\nx.cumsum(0)",
        "no deterministic kernel",
    ),
    "memory that a copy is on its way to": ("y = x.to('cpu', non_blocking=True)\n(y + 1).sum()", "was read before"),
    "the same, as a list": ("y = x.to('cpu', non_blocking=True)\ny.tolist()", "was read before"),
    "the same, in memory of one's own": (
        "y = torch.empty(6, pin_memory=True)\ny.copy_(x, non_blocking=True)\ny.tolist()",
        "was read before",
    ),
}

# code, value, synchronisations, kernels
TAKEN = {
    "a CPU scalar in an element-wise operation": ("(x * torch.tensor(2.0)).sum() is None", "False", 0, 2),
    "a CPU index, which is waited for": ("x[torch.tensor([1, 2])].device", "cuda:0", 1, 1),
    "an index that is there": ("x[torch.arange(2, device='cuda')].shape", "torch.Size([2])", 0, 2),
    "a mask as an index": ("x[x > 3].shape", "torch.Size([2])", 1, 2),
    "nonzero": ("(x > 3).nonzero().shape", "torch.Size([2, 1])", 1, 2),
    "item": ("x.sum().item()", "15.0", 1, 1),
    "a truth": ("bool(x.sum() > 3)", "True", 1, 2),
    "a list": ("x.tolist()", "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]", 1, 0),
    "a slice and a view": ("x[1:].view(5, 1).shape", "torch.Size([5, 1])", 0, 0),
    "memory that is not filled": ("torch.empty(3, device='cuda').shape", "torch.Size([3])", 0, 0),
    "numbers to the device": ("torch.tensor([1, 2], device='cuda').device", "cuda:0", 1, 0),
    "ordinary memory to the device, not waited for": ("cpu.to('cuda', non_blocking=True).device", "cuda:0", 1, 0),
    "pinned memory to the device": ("cpu.pin_memory().to('cuda', non_blocking=True).device", "cuda:0", 0, 0),
    "pinned memory is known": ("(cpu.pin_memory().is_pinned(), cpu.is_pinned())", "(True, False)", 0, 0),
    "an asynchronous copy and an event": (
        "y = x.to('cpu', non_blocking=True)\ne = torch.cuda.Event()\ne.record()\n(e.query(), e.query(), y.tolist()[2])",
        "(False, True, 2.0)",
        0,
        0,
    ),
    "an asynchronous copy and a synchronisation": (
        "y = x.to('cpu', non_blocking=True)\ntorch.cuda.synchronize()\ny.tolist()[2]",
        "2.0",
        1,
        0,
    ),
    "a generator": (
        "g = torch.Generator('cuda').manual_seed(3)\na = torch.rand(3, device='cuda', generator=g)\n"
        "g.manual_seed(3)\nbool((a == torch.rand(3, device='cuda', generator=g)).all())",
        "True",
        1,
        4,
    ),
    "an integer cumsum under determinism": (
        "torch.use_deterministic_algorithms(True)\nx.long().cumsum(0).shape",
        "torch.Size([6])",
        0,
        2,
    ),
    "lists of several types": (
        "torch.nn.utils.get_total_norm([x, x.bfloat16(), x.double()]).device",
        "cuda:0",
        0,
        None,
    ),
    "a file read onto the device": (
        "import io\nf = io.BytesIO()\ntorch.save({'x': x, 'n': [x]}, f)\nf.seek(0)\n"
        "torch.load(f, map_location='cuda')['n'][0].device",
        "cuda:0",
        None,
        None,
    ),
    "a module keeps its parameters when it is moved": (
        "m = torch.nn.Linear(6, 1)\np = m.weight\nm.to('cuda')\n(p is m.weight, p.device.type, type(m(x)).__name__)",
        "(True, 'cuda', 'Pretend')",
        2,
        1,
    ),
    "the gradient of what is trained": (
        "m = torch.nn.Linear(6, 1, device='cuda')\nm(x).sum().backward()\nm.weight.grad.tolist()",
        "[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]",
        1,
        None,
    ),
    "autocast": (
        "w = torch.ones(6, 6, device='cuda')\n"
        "with torch.autocast('cuda', torch.bfloat16): y = x.unsqueeze(0) @ w\ny.dtype",
        "torch.bfloat16",
        0,
        4,
    ),
    "the old autocast": (
        "import warnings\nwarnings.simplefilter('ignore')\n"
        "with torch.cuda.amp.autocast(dtype=torch.float16): y = x.unsqueeze(0) @ x.unsqueeze(1)\ny.dtype",
        "torch.float16",
        0,
        None,
    ),
    "attention, one kernel each way": (
        "q = torch.ones(1, 2, 3, 4, device='cuda', requires_grad=True)\n"
        "y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()\n"
        "y.backward()\nq.grad.shape",
        "torch.Size([1, 2, 3, 4])",
        0,
        None,
    ),
    "fp16's scaler leaves a step out": (
        "m = torch.nn.Linear(6, 1, device='cuda')\no = torch.optim.AdamW(m.parameters(), fused=True)\n"
        "s = torch.amp.GradScaler('cuda')\nbefore = m.weight.tolist()\ns.scale(m(x * float('inf')).sum()).backward()\n"
        "s.step(o); s.update()\n(before == m.weight.tolist(), s.get_scale())",
        "(True, 32768.0)",
        None,
        None,
    ),
}


@pytest.fixture(scope="module")
def report(cuda):
    codes = {name: row[0] for name, row in (REFUSED | TAKEN).items()}
    report = cuda.run("snippets", codes=codes)
    assert report.end == "ok", report.said
    return report


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(report, name):
    fault = report.facts[name]["fault"]
    assert fault is not None
    assert REFUSED[name][1] in fault
    if not fault.startswith("TypeError"):
        assert [row for row in report.faults if row[0] == name]


@pytest.mark.parametrize("name", TAKEN)
def test_what_it_takes(report, name):
    _, value, syncs, kernels = TAKEN[name]
    assert report.facts[name] == {"fault": None, "value": value}
    assert syncs is None or report.n_syncs(name) == syncs, report.lines("syncs")
    assert kernels is None or report.n_kernels(name) == kernels, report.lines("kernels")
