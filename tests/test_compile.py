"""torch.compile of patched UNets: no graph break, and the sample of the step. The lengths are multiples of the UNet's
total downsampling: for others diffusers' own forward logs a line, which breaks the graph without litefocus too.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from support.pipelines import audioldm2_unet, audioldm_unet, unet_step
from support.small import (
    APART,
    assert_apart,
    assert_same,
    authors_unet,
    compiled,
    first_sample,
    latent,
    patch,
    run,
    self_attention,
    small_unet,
    states,
    step,
    text,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig
from litefocus._grid import NUM_SAMPLES

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LENGTHS = (32, 48, 64)
PAPER = LiteFocusConfig.paper()
WEIGHTED = LiteFocusConfig(min_sampled=2)
# A larger UNet breaks its graph in the same places, and takes three times as long to compile.
ONE_LEVEL = {
    "channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


@pytest.fixture(params=["AudioLDM", "AudioLDM 2"])
def unet(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "AudioLDM":
        return audioldm_unet(**ONE_LEVEL).to(device)
    return audioldm2_unet(
        **ONE_LEVEL | {"mid_block_type": "UNetMidBlock2DCrossAttn"}, cross_attention_dim=((None, 18, 32),)
    ).to(device)


class CountUNets:
    """A backend that runs graphs as they are, and counts those of a UNet: the hook in front of it has one of its own,
    which is empty.
    """

    def __init__(self) -> None:
        self.unets = self.hooks = 0

    def __call__(self, graph: GraphModule, example_inputs: list[Any]) -> GraphModule:
        if len(graph.graph.nodes) > 1:
            self.unets += 1
        else:
            self.hooks += 1
        return graph


@pytest.mark.parametrize(
    ("unet", "config", "warm", "dynamic"),
    [
        ("AudioLDM", WEIGHTED, False, None),
        ("AudioLDM", PAPER, True, None),
        pytest.param("AudioLDM", WEIGHTED, True, True, marks=pytest.mark.slow),
        # twice as long to compile, through the same layers
        pytest.param("AudioLDM 2", WEIGHTED, True, None, marks=pytest.mark.slow),
    ],
    ids=["patched, then compiled", "run, then compiled", "run, then compiled with dynamic shapes", "AudioLDM 2"],
    indirect=["unet"],
)
def test_compiles_without_a_graph_break(unet, config, warm, dynamic) -> None:
    litefocus.patch(unet, config, freq_bins=16)
    expected = {frames: unet_step(unet, frames) for frames in LENGTHS}
    if not warm:
        litefocus.patch(unet, config, freq_bins=16)  # anew: no length has been seen
    backend = CountUNets()
    compiled = torch.compile(unet, fullgraph=True, backend=backend, dynamic=dynamic)
    for _ in range(2):
        for frames in LENGTHS:
            torch.testing.assert_close(unet_step(compiled, frames), expected[frames], rtol=1e-4, atol=1e-5)
    assert backend.unets == len(LENGTHS)  # one compilation a length, none when it comes again
    assert backend.hooks <= len(LENGTHS)


@pytest.mark.parametrize("unet", ["AudioLDM"], indirect=True)
def test_patches_and_unpatches_what_is_compiled_already(unet) -> None:
    dense = unet_step(unet, 32)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(unet_step(compiled, 32), dense)
    litefocus.patch(compiled, WEIGHTED, freq_bins=16)
    patched = unet_step(compiled, 32)
    assert (patched - dense).abs().max() > 1e-4
    assert torch.equal(patched, unet_step(unet, 32))
    assert litefocus.status(compiled).layers == litefocus.status(unet).layers
    litefocus.unpatch(compiled)
    assert torch.equal(unet_step(compiled, 32), dense)


@pytest.mark.slow  # one layer of it is compiled below
def test_inductor_with_time_windows(device: torch.device) -> None:
    torch.manual_seed(0)
    unet = audioldm_unet(**ONE_LEVEL).to(device)
    litefocus.patch(unet, PAPER, freq_bins=16, time_window=8, far_sampled=3, reweight=True)
    expected = unet_step(unet, 160)
    torch.testing.assert_close(unet_step(torch.compile(unet, fullgraph=True), 160), expected, rtol=1e-4, atol=1e-5)
    *_, cached = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1._litefocus.grid._built.values()
    assert cached.focus.keys.shape == (NUM_SAMPLES, 16 * 3, 72 + 15 * 7 + 16 * 3)


def test_inductor_with_dynamic_lengths() -> None:
    """One layer, since a whole UNet takes minutes to compile: right at every length, compiled once for each."""
    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    config = LiteFocusConfig.paper(time_window=8, far_sampled=3, reweight=True)
    layer.set_processor(LiteFocusAttnProcessor(layer.processor, layer="mid", freq_bins=8, config=config))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for _ in range(2):
            for frames in (100, 80, 130):
                x = torch.randn(2, frames * 8, 16)
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


# --- the sample of a step --------------------------------------------------------------------------------------------

TIMESTEPS = (0, 2, 3, 6)  # of all four samples


def wrapped(unet: Any, fullgraph: bool = True) -> Callable[..., Any]:
    compiled = torch.compile(unet, fullgraph=fullgraph, backend="eager")
    return lambda *args, **kwargs: compiled(*args, **kwargs)  # torch's wrapper has no truth value


def in_place(unet: Any) -> Callable[..., Any]:
    unet.compile(fullgraph=True, backend="eager")
    return unet


def forward_alone(unet: Any) -> Callable[..., Any]:
    unet.forward = torch.compile(unet.forward, fullgraph=True, backend="eager")
    return unet


def past_hooks(unet: Any) -> Callable[..., Any]:
    compiled_forward: Callable[..., Any] = torch.compile(unet.forward, fullgraph=True, backend="eager")
    return compiled_forward


ways = pytest.mark.parametrize("way", [wrapped, in_place, forward_alone, past_hooks])


def patched(make: Callable[[], Any] = small_unet) -> Any:
    unet = make()
    patch(unet)
    return unet


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "make"),
    [
        (wrapped, small_unet),
        (in_place, small_unet),
        (forward_alone, small_unet),
        pytest.param(wrapped, authors_unet, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_unet_takes_the_sample_of_the_step(way: Any, make: Callable[[], Any]) -> None:
    unet, eager = patched(make), patched(make)
    call = way(unet)
    for mode in (torch.no_grad, torch.inference_mode):
        counts = []
        with mode():
            for timestep in (*TIMESTEPS, *TIMESTEPS):
                assert_same(step(unet, timestep=timestep, call=call), step(eager, timestep=timestep))
                counts.append(graphs())
        assert counts[1] == counts[-1]  # the authors' code sets a flag at its first call
    assert states(unet) == {"focus"}


@ways
def test_where_gradients_are_recorded_a_compiled_unet_keeps_the_first_sample(way: Any) -> None:
    unet = patched()
    assert_apart(run(unet), first_sample())
    call = way(unet)
    assert_same(step(unet, call=call).detach(), first_sample())
    assert_same(run(unet, latent().requires_grad_(), call=call), first_sample())


@pytest.mark.parametrize(
    ("way", "of_text"),
    [*itertools.product([wrapped, in_place, forward_alone], [False, True]), (past_hooks, False)],  # which see the text
)
def test_a_compiled_unet_has_the_gradients_of_a_checkpointed_loss(way: Any, of_text: bool) -> None:
    """A reentrant checkpoint calls the UNet where gradients are off, and again where they are on."""
    call, start = way(patched()), (text() if of_text else latent()).requires_grad_()

    def output(z: Tensor) -> Tensor:
        result: Tensor = call(*((latent(), torch.tensor(3), z) if of_text else (z, torch.tensor(3), text()))).sample
        return result

    checkpointed = checkpoint(output, start, use_reentrant=True)
    torch.testing.assert_close(checkpointed, output(start))
    assert_same(checkpointed.detach(), first_sample())


def test_a_checkpointed_call_does_not_end_the_rotation() -> None:
    unet, eager = patched(), patched()
    call = wrapped(unet)
    for timestep in TIMESTEPS:
        assert_same(run(unet, latent().requires_grad_(), call=call), first_sample())
        assert_same(run(unet, timestep=timestep, call=call), run(eager, timestep=timestep))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch's compiler, where it breaks off
@pytest.mark.parametrize("teacher_first", [False, True])
def test_a_step_of_distillation_compiled_whole(teacher_first: bool) -> None:
    """Calls of one UNet with and without gradients in one graph, then a graph break."""

    def distill(unet: Any, timestep: int) -> list[Tensor]:
        outputs = [step(unet, timestep=timestep)] if not teacher_first else []
        with torch.no_grad():
            outputs.append(step(unet, timestep=timestep))
        if teacher_first:
            outputs.append(step(unet, timestep=timestep))
        torch._dynamo.graph_break()
        return [output * 2 for output in outputs]

    unet, eager = patched(), patched()
    compiled_step = torch.compile(distill, backend="eager")
    for timestep in TIMESTEPS:
        for got, expected in zip(compiled_step(unet, timestep), distill(eager, timestep), strict=True):
            assert_same(got.detach(), expected.detach())


def test_layers_that_are_compiled_apart_from_the_timestep_keep_the_first_sample() -> None:
    """By themselves, also after their UNet was compiled, or behind a graph break."""
    unet, expected = patched(), patched()
    for attn in self_attention(expected).values():
        attn._litefocus.grid.num_samples = 1
    run(expected)  # layers know their grid from the last call
    run(unet, call=wrapped(unet))
    torch._dynamo.reset()
    (layer,) = self_attention(unet).values()
    tokens = torch.randn(1, 24 * 16, 8)
    with torch.no_grad():
        assert_same(compiled(layer)(tokens), next(iter(self_attention(expected).values()))(tokens))
    for where in ("time_proj", "conv_in", "down_blocks.0.resnets.0"):
        torch._dynamo.reset()
        broken = patched()
        broken.get_submodule(where).register_forward_hook(lambda *_: torch._dynamo.graph_break())
        call = wrapped(broken, fullgraph=False)
        run(broken, call=call)
        count = graphs()
        for timestep in TIMESTEPS:
            assert_same(run(broken, timestep=timestep, call=call), run(expected, timestep=timestep))
        assert graphs() == count
    unet.down_blocks[0].compile(fullgraph=True, backend="eager")
    for timestep in TIMESTEPS:
        assert_same(run(unet, timestep=timestep), run(expected, timestep=timestep))


def test_threads_on_a_compiled_unet_do_not_mix_their_steps() -> None:
    unet, eager = patched(), patched()
    call = wrapped(unet)
    run(unet, call=call)
    expected = {timestep: run(eager, timestep=timestep) for timestep in TIMESTEPS}
    assert all(
        (one - other).abs().max() > APART for t, one in expected.items() for u, other in expected.items() if t < u
    )
    with ThreadPoolExecutor(len(TIMESTEPS)) as workers:
        together = workers.map(lambda timestep: run(unet, timestep=timestep, call=call), 5 * TIMESTEPS)
        for timestep, output in zip(5 * TIMESTEPS, together, strict=True):
            assert_same(output, expected[timestep])
    assert graphs() == 1
