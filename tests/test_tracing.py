"""Tracers and exporters: whatever they make of a layer or a patched UNet, its focus sets are constants. Exported graphs
hold the first sample, torch.compile's hold all, and choose by the timestep.

Each of them meets lengths that have run before (a warm cache) and such that have not (a cold one): then the sample is
drawn while the tracer looks on. Calls of one graph that differ from each other would be another sample at every call.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from support.pipelines import minimal_unet
from support.settings import one_sample
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig
from litefocus._compile import assume_constant_result, mark_static
from litefocus._context import timestep_hash as draw_of
from litefocus._grid import NUM_SAMPLES as DRAWS

# not the first of a layer's samples, if no tracer looks on
STEP = 7
# few keys, so that two samples differ by much
CONFIG = LiteFocusConfig(min_sampled=2, sparse_ratio=0.05)
BINS, FRAMES = 8, 50

Traced = Callable[..., Tensor]
Tracer = Callable[[nn.Module, tuple[Tensor, ...]], Traced]

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # the jit says that shapes become constants, and that it is no longer the way to go
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # decompositions of exported graphs use deprecated parts of torch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Layer(nn.Module):
    """One attention layer with a processor of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(query_dim=16, heads=2, dim_head=8)
        processor = LiteFocusAttnProcessor(self.attn.processor, layer="mid", freq_bins=BINS, config=CONFIG)
        self.attn.set_processor(processor)
        self.inputs = (torch.randn(2, FRAMES * BINS, 16), torch.tensor(STEP))

    def forward(self, states: Tensor, timestep: Tensor) -> Tensor:
        return self.attn(states) + timestep


class PatchedUNet(nn.Module):
    """A whole UNet, as small as they come: two self-attention layers. Its output is a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = minimal_unet()
        litefocus.patch(self.unet, CONFIG, freq_bins=BINS)
        self.inputs = (torch.randn(2, 2, FRAMES, BINS), torch.tensor(STEP))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states=None, return_dict=False)[0]


def expected(model: nn.Module) -> Callable[..., Tensor]:
    """A copy that runs as it is, with the first sample at every step, as exported graphs do."""
    twin = copy.deepcopy(model)
    one_sample(twin)
    return twin


def nodes(traced: Any) -> list[str]:
    """The names of all operations in a graph, those of nested graphs too."""
    if isinstance(traced, torch.jit.ScriptModule):
        return [node.kind() for node in traced.inlined_graph.nodes()]
    graphs = [module for module in traced.modules() if isinstance(module, fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.graph.nodes]


def export(strict: bool) -> Tracer:
    def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Traced:
        return torch.export.export(model, inputs, strict=strict).module()

    return trace


def jit(model: nn.Module, inputs: tuple[Tensor, ...]) -> Traced:
    return torch.jit.trace(model, inputs, check_trace=False)


def symbolically(mode: str) -> Tracer:
    def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Traced:
        return make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)

    return trace


def dynamo(model: nn.Module, inputs: tuple[Tensor, ...]) -> Traced:
    """The graph that torch.compile hands to its backend, beside what it compiles."""
    graphs = []

    def backend(graph: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(*inputs)
    compiled.modules = lambda: graphs
    return compiled


TRACERS: dict[str, Tracer] = {
    "export": export(strict=False),
    "export strict": export(strict=True),
    "jit": jit,
    "make_fx": symbolically("real"),
    "make_fx fake": symbolically("fake"),
    "make_fx symbolic": symbolically("symbolic"),
    "compile": dynamo,
}


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("kind", [Layer, PatchedUNet])
@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@torch.no_grad()
def test_focus_sets_are_constants_of_every_graph(tracer: Tracer, kind: type[nn.Module], cache: str) -> None:
    model = kind().eval()
    if cache == "warm":
        model(*model.inputs)
    first = expected(model)
    eager = model if tracer is dynamo else first
    state = torch.get_rng_state()
    traced = tracer(model, model.inputs)
    assert torch.equal(torch.get_rng_state(), state)
    other_step = (torch.randn_like(model.inputs[0]), torch.tensor(3))
    for inputs in (model.inputs, model.inputs, model.inputs, other_step):
        torch.testing.assert_close(traced(*inputs), eager(*inputs), rtol=1e-4, atol=1e-5)
    found = nodes(traced)
    assert any("scaled_dot_product" in name for name in found)
    assert not any("rand" in name or "bernoulli" in name or "multinomial" in name for name in found)
    # and tracing leaves nothing behind that a later call would use
    rotated = model(*model.inputs)
    assert torch.equal(rotated, kind().eval()(*model.inputs))
    if kind is PatchedUNet:
        assert (rotated - first(*model.inputs)).abs().max() > 1e-3


def test_the_steps_of_these_tests_have_two_samples_and_not_the_first() -> None:
    with torch.no_grad():
        assert len({draw_of(STEP) % DRAWS, draw_of(3) % DRAWS, 0}) == 3


# --- saved and loaded again -------------------------------------------------------------------------------------------


def through_export(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Traced:
    torch.export.save(torch.export.export(model, inputs), path / "model.pt2")
    return torch.export.load(path / "model.pt2").module()


def through_jit(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Traced:
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path / "model.pt")
    return torch.jit.load(path / "model.pt")


def through_fx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Traced:
    torch.save(make_fx(model)(*inputs), path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@pytest.mark.parametrize("kind", [Layer, PatchedUNet])
@pytest.mark.parametrize("reloaded", [through_export, through_jit, through_fx])
@torch.no_grad()
def test_a_saved_graph_is_the_same_after_loading(reloaded, kind: type[nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    eager = expected(model)
    loaded = reloaded(model, model.inputs, tmp_path)
    for _ in range(3):
        torch.testing.assert_close(loaded(*model.inputs), eager(*model.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@torch.no_grad()
def test_ahead_of_time(tmp_path: Path) -> None:
    model = Layer().eval()
    eager = expected(model)
    exported = torch.export.export(model, model.inputs)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for _ in range(3):
        torch.testing.assert_close(loaded(*model.inputs), eager(*model.inputs), rtol=1e-4, atol=1e-5)


# --- the private names of the compiler --------------------------------------------------------------------------------


def test_a_constant_function_is_marked_as_torch_marks_it() -> None:
    def theirs() -> None: ...

    def ours() -> None: ...

    assert torch.compiler.assume_constant_result(theirs) is theirs
    assert assume_constant_result(ours) is ours
    assert vars(ours) == vars(theirs) != {}


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_a_static_tensor_is_marked_as_torch_marks_it(shape: tuple[int, ...]) -> None:
    ours, theirs = torch.zeros(shape), torch.zeros(shape)
    mark_static(ours)
    torch._dynamo.mark_static(theirs)
    marks = vars(ours)
    assert {name: marks.get(name) for name in vars(theirs)} == vars(theirs)
    assert (vars(theirs) == {}) == (shape == ())
