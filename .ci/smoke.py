"""An installed package, away from the repository: import, patch, run, restore."""

import runpy

import torch
from diffusers import UNet2DConditionModel

import litefocus

unet = UNet2DConditionModel(
    in_channels=8,
    out_channels=8,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
).eval()
inputs = torch.randn(1, 8, 128, 16), 1, torch.randn(1, 3, 4)
with torch.no_grad():
    dense = unet(*inputs).sample
    with litefocus.patch(unet):
        assert not torch.equal(unet(*inputs).sample, dense)
    assert torch.equal(unet(*inputs).sample, dense)
assert "site-packages" in litefocus.__file__, litefocus.__file__
runpy.run_module("litefocus", run_name="__main__")
