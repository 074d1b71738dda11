"""torch.compile(fullgraph=True) of patched UNets. The lengths are multiples of the UNet's total downsampling:
for others diffusers' own forward logs a line, which breaks the graph without litefocus too.
"""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from support.pipelines import audioldm2_unet, audioldm_unet, unet_step
from torch import nn
from torch.fx import GraphModule

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler", "one_sample")
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
    (cached,) = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1._litefocus.grid._built.values()
    assert cached.focus.keys.shape == (16 * 3, 72 + 15 * 7 + 16 * 3)


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
