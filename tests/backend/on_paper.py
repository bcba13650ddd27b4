"""Prints, as JSON, the code that Inductor would run on an H100 for a small private step. Needs no GPU; runs nothing.

The step is traced on the CPU. When Inductor takes over a graph, the graph's values are given the device of a GPU, and
torch and Triton are told of an H100 that is not there. What would be compiled and run afterwards is never called.
"""

import argparse
import json
import types
from typing import Any

import torch
from torch import fx, nn

GPU = torch.device("cuda", 0)
generated: list[str] = []


class Stop(Exception):
    """The code is there, and nothing can run it."""


def pretend() -> None:
    """An H100, as far as code generation asks."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, total_memory=80 << 30,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip

    class Device:
        def __init__(self, *ignored: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *ignored: Any) -> None:
            pass

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_device_capability": (9, 0), "get_device_name": properties.name, "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "is_current_stream_capturing": False,
        "mem_get_info": (70 << 30, 80 << 30), "_lazy_init": None, "set_rng_state": None, "synchronize": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    torch.cuda.device = Device

    import triton.runtime.driver as driver
    from triton.backends.compiler import GPUTarget

    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: GPU,
            get_device_interface=lambda: torch.cuda,
        )
    )


pretend()  # before Inductor is imported, which keeps what it finds

import torch._inductor.compile_fx as compile_fx  # noqa: E402
from torch._guards import detect_fake_mode  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.output_code import CompiledFxGraph  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402


def moved(gm: fx.GraphModule) -> list[Any]:
    """Gives all values of a graph the device of a GPU, in place; returns its inputs."""
    mode = detect_fake_mode([n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"])
    inputs = []
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": GPU}
            value = node.meta.get("val")
            if node.op == "placeholder":
                if isinstance(value, torch.Tensor):
                    memory = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                    value = FakeTensor(mode, memory, GPU)
                inputs.append(value)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                value = node.target(*args, **kwargs)
            node.meta["val"] = value
    gm.recompile()
    return inputs


class OnPaper(CompiledFxGraph):
    """Stands for compiled code: gives zeros in the place of the forward's results."""

    def __init__(self, results: list[Any]) -> None:
        self.results, self._boxed_call, self._time_taken_ns = results, True, 0
        self.fx_kwargs, self._fx_graph_cache_key = {}, None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __call__(self, inputs: Any) -> list[Any]:
        if len(generated) > 1:
            raise Stop
        return [torch.zeros(r.shape, dtype=r.dtype) if isinstance(r, torch.Tensor) else r for r in self.results]

    def post_compile(self, *ignored: Any) -> None:
        pass


def generate(self: Any, gm: fx.GraphModule, example_inputs: Any, inputs_to_check: Any, settings: Any) -> OnPaper:
    results = [n.meta["val"] if isinstance(n, fx.Node) else n for n in gm.graph.output_node().args[0]]
    try:
        as_usual(self, gm, moved(gm), inputs_to_check, settings)
    except Stop:
        pass
    return OnPaper(results)


def keep(self: Any) -> None:
    code = self.codegen()[0]
    generated.append(getattr(code, "value", code))
    raise Stop


as_usual = compile_fx._InProcessFxCompile.codegen_and_compile
compile_fx._InProcessFxCompile.codegen_and_compile = generate
GraphLowering.compile_to_module = GraphLowering._compile_to_module = keep


class Model(nn.Module):
    """An embedding, a normalised linear layer without bias and a head of odd width; the loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(512, 256), nn.LayerNorm(256)
        self.up, self.head = nn.Linear(256, 512, bias=False), nn.Linear(512, 1031)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.up(self.norm(self.table(ids))).relu())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return loss.view(ids.shape).mean(1)


class Blocks(nn.Module):
    """So many residual blocks: a norm, a linear layer and another one, all with biases."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table, self.norms = nn.Embedding(512, 256), nn.ModuleList(nn.LayerNorm(256) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(256, 512) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(512, 256) for _ in range(count))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(up(norm(x)).relu())
        return (x.square().mean(2) * labels).mean(1)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clipping")
    parser.add_argument("strategy")
    parser.add_argument("--blocks", type=int, help="a model of so many blocks")
    parser.add_argument("--triton", action="store_true", help="without the kernels of kernels/hopper")
    parser.add_argument("--limit", type=float, help="of the peak of memory, below which layers share launches")
    parser.add_argument("--parts", action="store_true", help="make products in parts where the peak is lower for it")
    parser.add_argument("--early", action="store_true", help="print too what is compiled early: names and errors")
    arguments = parser.parse_args(given)

    from flashdp_compile.compat import early
    from flashdp_compile.kernels import hopper, tuning
    from flashdp_compile.passes.late import group_layers, store_by_samples

    begun = []

    def begin(kernel: Any, device: Any, given: tuple[Any, ...], settings: Any) -> None:
        if arguments.early:
            begun.append(kernel)
            compile_early(kernel, device, given, settings)

    compile_early, early.compile_early = early.compile_early, begin
    if arguments.triton:
        hopper.available = lambda device: False
    if not arguments.parts:
        store_by_samples.LARGE = 1.0
    if arguments.limit is not None:
        group_layers.LIMIT = arguments.limit
    tuning._table()["sm_90"]["outer_store"]["16"][0][-1] = 8  # wide tiles for a product that is cut into so few
    model = Blocks(arguments.blocks) if arguments.blocks else Model()
    write(model, clipping=arguments.clipping, norm_strategy=arguments.strategy)
    errors = {k.fn.__name__: [repr(f.exception()) for f in early.under_way(k)] for k in begun}
    print(json.dumps([*generated, errors]))


def write(model: nn.Module, **options: str) -> None:
    """Leaves the code of a step in `generated`."""
    ids = torch.randint(0, 512, (16, 512))
    options = {**options, "expected_batch_size": 16}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            compiled(ids, ids).mean().backward()
    except Stop:
        pass


def prepare() -> None:
    """Writes the code of a step that nobody reads: Inductor has loaded then what it needs for every one."""
    from flashdp_compile.compat import early

    compile_early, early.compile_early = early.compile_early, lambda *ignored: None  # no threads in what is forked
    write(Model())
    early.compile_early = compile_early
    generated.clear()
    torch._dynamo.reset()


if __name__ == "__main__":
    main()
