"""tile_decoding: VAE (decoder and encoder) and vocoder in tiles of time, against the whole clip at once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AudioLDM2Pipeline
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from support.authors import audiosr, audiosr_batch, authors
from support.decoding import Holder, NormVAE, speecht5
from support.memory import PeakMemory
from support.pipelines import BUILDERS, build, generate
from support.recorder import frames_of, record
from support.settings import hand_in
from torch import Tensor, nn
from transformers import SpeechT5HifiGan

import litefocus
from litefocus import _decoding
from litefocus._decoding import decoding_bytes, tiles_of
from litefocus._target import latent_geometry

EMBEDDED = Path(__file__).parents[1] / "examples" / "embedded" / "pipeline"
SECONDS = 2.56  # of a tile, in most of these tests: 64 latent frames


@pytest.fixture(scope="module")
def embedded(device: torch.device) -> Any:
    pipe = AudioLDM2Pipeline.from_pretrained(EMBEDDED).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clips(embedded: Any) -> Tensor:
    """Two clips of 7.68 s as the VAE gets them, (2, 8, 192, 16): beats, and a tone."""
    latents = embedded(
        ["a fast tabla rhythm", "a slow bell"],
        audio_length_in_s=7.68,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).audios
    return latents / embedded.vae.config.scaling_factor


@pytest.fixture
def pipe(embedded: Any) -> Any:
    """Trained VAE and vocoder, untiled before and after."""
    litefocus.unpatch(embedded)
    yield embedded
    litefocus.unpatch(embedded)


@pytest.fixture
def small(device: torch.device) -> Any:
    return build("AudioLDM 2").to(device)


@pytest.fixture
def latents(device: torch.device) -> Tensor:
    return torch.randn(1, 8, 100, 16, generator=torch.Generator().manual_seed(2)).to(device)


@torch.inference_mode()
def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Log-mel spectrograms (batch, 1, frames, bins)."""
    return pipe.vae.decode(latents).sample


@torch.inference_mode()
def encoded(vae: Any, mels: Tensor) -> Tensor:
    """Means and log variances of the latents' distribution, (batch, 2 * channels, frames, bins)."""
    output = vae.encode(mels)
    return getattr(output, "latent_dist", output).parameters


def assert_near(moments: Tensor, whole: Tensor, at: Tensor) -> None:
    """In standard deviations of each channel; and from one frame to the next, also `at` the seams."""
    errors, deviations = moments - whole, whole.std(dim=(0, 2, 3), keepdim=True)
    assert 0 < (errors / deviations).square().mean(dim=(1, 2, 3)).sqrt().max() < 0.02
    assert (errors / deviations)[:, :, torch.cat([at - 1, at])].square().mean().sqrt() < 0.02
    step, own = ((x[:, :, at] - x[:, :, at - 1]).abs().mean() for x in (moments, whole))
    assert step < 1.01 * own


@torch.inference_mode()
def voiced(pipe: Any, mels: Tensor) -> Tensor:
    """Waveforms (batch, samples)."""
    return pipe.mel_spectrogram_to_waveform(mels)


def seams(frames: int, tiles: int) -> Tensor:
    return torch.tensor([frames * i // tiles for i in range(1, tiles)])


# --- what it changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "count"), [(3.84, 2), (2.56, 3)])
def test_mels_are_those_of_the_whole_clip_without_a_step_at_the_seams(pipe, clips, seconds, count) -> None:
    whole = decoded(pipe, clips)
    with litefocus.tile_decoding(pipe, seconds=seconds):
        mels = decoded(pipe, clips)
    error = (mels - whole).abs()
    assert 0 < error.mean(dim=(1, 2, 3)).max() < 0.02  # nats
    at = 4 * seams(192, count)
    assert error[:, :, torch.cat([at - 1, at])].mean() < 0.02
    step, own = ((x[:, :, at] - x[:, :, at - 1]).abs().mean(dim=(1, 2, 3)) for x in (mels, whole))
    assert (step < 1.03 * own).all()


def test_mels_are_nearer_to_the_whole_clip_than_those_of_the_vaes_own_tiling(pipe, clips) -> None:
    """Which cuts the bins too, in tiles of 5.12 s here."""
    whole = decoded(pipe, clips)
    with litefocus.tile_decoding(pipe, seconds=5.12):
        error = (decoded(pipe, clips) - whole).abs().mean()
    pipe.vae.enable_tiling()
    try:
        assert error < (decoded(pipe, clips) - whole).abs().mean() / 2
    finally:
        pipe.vae.disable_tiling()


def test_no_click_in_the_waveform_at_the_seams(pipe, clips) -> None:
    whole = voiced(pipe, decoded(pipe, clips))
    litefocus.tile_decoding(pipe, seconds=SECONDS)
    waves = voiced(pipe, decoded(pipe, clips))
    for at in 160 * 4 * seams(192, 3):
        step, own = (x[:, at - 160 : at + 160].diff().abs().amax(dim=1) for x in (waves, whole))
        assert (step < 1.1 * own + 1e-3).all()


@pytest.mark.parametrize("tokens", [False, True], ids=["(frames, bins)", "tokens"])
def test_a_group_norm_is_that_of_the_whole_clip(tokens: bool) -> None:
    """Exactly so for the first one, whose input is the clip's: a loud beginning changes how the end is normalised."""
    vae = NormVAE(tokens)
    x = 3 + torch.randn(2, 8, 1001, 4) * torch.linspace(5, 0.1, 1001)[:, None]
    whole = vae.decode(x)
    with litefocus.tile_decoding(Holder(speecht5(), vae), seconds=2, overlap=0.3):
        torch.testing.assert_close(vae.decode(x), whole, atol=1e-5, rtol=1e-5)


def generator(package: str, kind: str, **settings: Any) -> nn.Module:
    """A vocoder of the authors' packages."""
    hifigan = authors(package, "hifigan")
    torch.manual_seed(0)
    config = {
        "resblock": "1",
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "upsample_initial_channel": 32,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "num_mels": 64,
        "sampling_rate": 16000,
    }
    made: nn.Module = getattr(hifigan, kind)(hifigan.AttrDict(config | settings)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


AT_48K = {"upsample_rates": [6, 5, 4, 2, 2], "upsample_kernel_sizes": [12, 10, 8, 4, 4], "num_mels": 256}
VOCODERS = {
    "transformers": speecht5,
    "embedded": lambda: SpeechT5HifiGan.from_pretrained(EMBEDDED / "vocoder").eval(),
    "audioldm": lambda: generator("audioldm", "Generator"),
    "audioldm2": lambda: generator("audioldm2", "Generator_old"),
    "audioldm2, 48 kHz": lambda: generator("audioldm2", "Generator_old", sampling_rate=48000, **AT_48K),
    "audioldm2, second": lambda: generator("audioldm2", "Generator", sampling_rate=48000, **AT_48K),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(params=VOCODERS)
def vocoder(request: pytest.FixtureRequest) -> nn.Module:
    return VOCODERS[request.param]()


def mels_for(vocoder: nn.Module, frames: int) -> Tensor:
    return torch.randn(1, frames, vocoder.conv_pre.in_channels, generator=torch.Generator().manual_seed(1))


def test_the_reach_is_what_a_sample_depends_on(vocoder: nn.Module) -> None:
    """Measured by gradients: which frames a sample in the middle of a clip, or one beside it, changes with."""
    pipe = Holder(vocoder)
    shape = latent_geometry(pipe)
    x = mels_for(vocoder, 101).double().requires_grad_()
    vocoder.double()
    samples = pipe.mel_spectrogram_to_waveform(x).flatten()[shape.hop * 50 : shape.hop * 51]
    samples.sum().backward()
    seen = x.grad.abs().sum(dim=2)[0].nonzero().flatten()
    measured = max(50 - int(seen.min()), int(seen.max()) - 50)
    assert measured <= shape.reach <= measured + 4


@pytest.mark.parametrize("frames", [150, 301])
def test_a_vocoder_in_tiles_differs_by_rounding_alone(vocoder: nn.Module, frames: int) -> None:
    """No bit more: convolutions are computed by other kernels for other lengths, which sum in another order."""
    pipe, mels = Holder(vocoder), mels_for(vocoder, frames)
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        vocoder.to(dtype)
        with torch.inference_mode():
            whole = pipe.mel_spectrogram_to_waveform(mels.to(dtype))
            with litefocus.tile_decoding(pipe, seconds=0.8, overlap=0):
                tiled = pipe.mel_spectrogram_to_waveform(mels.to(dtype))
        torch.testing.assert_close(tiled, whole, atol=rounding * float(whole.abs().max()), rtol=0)


def test_clips_of_one_tile_pass_through(pipe, clips) -> None:
    one = clips[:, :, :64]
    whole = decoded(pipe, one), voiced(pipe, decoded(pipe, one))
    litefocus.tile_decoding(pipe, seconds=2.56)
    mels = decoded(pipe, one)
    assert torch.equal(mels, whole[0])
    assert torch.equal(voiced(pipe, mels), whole[1])


@pytest.mark.parametrize("frames", [64, 65], ids=["one tile", "two tiles"])
def test_what_comes_back_is_of_the_same_type(pipe, clips, frames) -> None:
    x = clips[:1, :, :frames]
    litefocus.tile_decoding(pipe, seconds=2.56)
    with torch.inference_mode():
        mels = pipe.vae.decode(x, return_dict=True, generator=None)
        assert type(mels) is DecoderOutput
        (as_tuple,) = pipe.vae.decode(x, return_dict=False)
        assert torch.equal(mels.sample, as_tuple)
        assert torch.equal(mels.sample, pipe.vae.decode(z=x).sample)
        waves = pipe.mel_spectrogram_to_waveform(mels.sample)
        assert torch.equal(waves, pipe.mel_spectrogram_to_waveform(mel_spectrogram=mels.sample[:, 0]))
    assert mels.sample.shape == (1, 1, 4 * frames, 64)
    assert waves.shape == (1, 640 * frames + 32)  # its first layer adds one frame of five samples
    with pytest.raises(TypeError):
        pipe.vae.decode()


def test_batches(small, latents) -> None:
    """Every clip by itself: with its own norms, and in the memory of one."""
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    batch = torch.cat([latents, 3 * latents.flip(2)])
    alone = torch.cat([decoded(small, one) for one in batch.split(1)])
    recorder = record(small.vae.decoder, "forward")
    torch.testing.assert_close(decoded(small, batch), alone, atol=1e-5, rtol=0)
    assert frames_of(recorder) == [25 + 2 * 5] * 2 * 4 * 2  # windows of one length: twice every tile of every clip
    assert torch.equal(voiced(small, alone), torch.cat([voiced(small, one) for one in alone.split(1)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(small, latents, dtype) -> None:
    whole = decoded(small, latents)
    with litefocus.tile_decoding(small, seconds=1, overlap=0.2):
        tiled = decoded(small, latents)
    small.vae.to(dtype), small.vocoder.to(dtype)
    error = (decoded(small, latents.to(dtype)) - whole).abs().mean()
    with litefocus.tile_decoding(small, seconds=1, overlap=0.2):
        mels = decoded(small, latents.to(dtype))
        waves = voiced(small, mels)
    assert (mels.dtype, waves.dtype) == (dtype, torch.float32)  # the pipeline casts its waveforms
    assert (mels - tiled).abs().mean() < 1.5 * error
    torch.testing.assert_close(waves, voiced(small, mels), atol=1e-2 * float(waves.abs().max()), rtol=0)


def test_gradients_of_the_decoders_weights_are_those_of_the_whole_clip(small, latents) -> None:
    def gradient() -> Tensor:
        weight = small.vae.decoder.conv_in.weight
        return torch.autograd.grad(small.vae.decode(latents).sample.square().mean(), weight)[0]

    whole = gradient()
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    assert torch.equal(gradient(), whole)


def test_gradients_are_those_of_the_whole_clip(small, latents) -> None:
    def gradient() -> Tensor:
        x = latents.clone().requires_grad_()
        mels = small.vae.decode(x).sample
        return torch.autograd.grad(small.mel_spectrogram_to_waveform(mels).square().mean(), x)[0]

    whole = gradient()
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    assert torch.equal(gradient(), whole)


def test_memory_is_that_of_one_tile(pipe, clips) -> None:
    latents, peaks = clips[:1], {}
    for name, frames in (("4 s", 96), ("8 s", 192)):
        for tiles in (None, (1.28, 0.32)):
            if tiles:
                litefocus.tile_decoding(pipe, *tiles)
            with PeakMemory() as vae:
                mels = decoded(pipe, latents[:, :, :frames])
            with PeakMemory() as vocoder:
                voiced(pipe, mels)
            litefocus.unpatch(pipe)
            peaks[name, tiles is None] = peak = max(vae.peak, vocoder.peak)
            assert decoding_bytes(pipe, frames / 25, tiles) == pytest.approx(peak, rel=0.15)
    assert peaks["8 s", True] > 1.9 * peaks["4 s", True]
    assert peaks["8 s", False] < 1.1 * peaks["4 s", False]
    assert decoding_bytes(pipe, 2.0, (2.56, 0.64)) == decoding_bytes(pipe, 2.0)
    assert decoding_bytes(types.SimpleNamespace(unet=None), 10.0) is None


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectrograms(embedded: Any, clips: Tensor) -> Tensor:
    """Log-mel spectrograms of the two clips, (2, 1, 768, 64)."""
    litefocus.unpatch(embedded)
    return decoded(embedded, clips).clone()


@pytest.mark.parametrize(("seconds", "count"), [(3.84, 2), (2.56, 3)])
def test_latents_are_those_of_the_whole_clip_without_a_step_at_the_seams(pipe, spectrograms, seconds, count) -> None:
    whole = encoded(pipe.vae, spectrograms)
    with litefocus.tile_decoding(pipe, seconds=seconds):
        moments = encoded(pipe.vae, spectrograms)
    assert_near(moments, whole, seams(192, count))
    assert torch.equal(encoded(pipe.vae, spectrograms), whole)


@pytest.mark.parametrize("quiet", ["silent from two thirds on", "fading in"])
def test_clips_whose_loudness_changes(pipe, spectrograms, quiet) -> None:
    """Their tiles have other moments than the clip: two passes alone would be off by 0.03 and more."""
    floor, frames = -11.5, torch.linspace(0, 1, 768)[:, None]
    gain = (frames < 2 / 3).float() if quiet.startswith("silent") else frames
    mels = floor + gain.to(spectrograms) * (spectrograms[:1] - floor)
    whole = encoded(pipe.vae, mels)
    sounds = decoded(pipe, whole[:, :8])
    with litefocus.tile_decoding(pipe, seconds=SECONDS):
        assert_near(encoded(pipe.vae, mels), whole, seams(192, 3))
        assert (decoded(pipe, whole[:, :8]) - sounds).abs().mean() < 0.02


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_the_last_latent_frame_depends_on_what_is_too_short_for_one_more(pipe, spectrograms, rest) -> None:
    x = spectrograms[:, :, : 4 * 150 + rest].clone()
    x[:, :, -rest:] += 3
    whole = encoded(pipe.vae, x)
    without = (encoded(pipe.vae, x[:, :, :600]) - whole)[:, :, -1].abs().mean()
    with litefocus.tile_decoding(pipe, seconds=SECONDS):
        moments = encoded(pipe.vae, x)
    assert moments.shape == whole.shape == (2, 16, 150, 16)
    assert (moments - whole)[:, :, -1].abs().mean() < 0.1 * without
    assert_near(moments, whole, seams(150, 3))


@pytest.mark.parametrize("scale", [1, 4])
def test_a_group_norm_of_an_encoder_is_that_of_the_whole_clip(scale: int) -> None:
    vae = NormVAE(scale=scale)
    x = 3 + torch.randn(2, 8, 1003, 4) * torch.linspace(5, 0.1, 1003)[:, None]
    x[:, :, -3:] += 100
    whole = vae.encode(x)
    with litefocus.tile_decoding(Holder(speecht5(), vae), seconds=2, overlap=0.3):
        torch.testing.assert_close(vae.encode(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [256, 259, 260], ids=["one tile", "one tile and a rest", "two tiles"])
def test_what_encoding_returns_is_of_the_same_type(pipe, spectrograms, frames) -> None:
    x = spectrograms[:1, :, :frames]
    whole = encoded(pipe.vae, x)
    litefocus.tile_decoding(pipe, seconds=2.56)
    with torch.inference_mode():
        output = pipe.vae.encode(x)
        assert type(output) is AutoencoderKLOutput
        (as_tuple,) = pipe.vae.encode(x, return_dict=False)
        latents = pipe.vae.encode(x=x, return_dict=True).latent_dist
    for found in (output.latent_dist, as_tuple, latents):
        assert type(found) is DiagonalGaussianDistribution
        assert torch.equal(found.parameters, output.latent_dist.parameters)
        assert (found.parameters.dtype, found.parameters.device) == (whole.dtype, whole.device)
        assert torch.equal(found.mode(), found.parameters[:, :8])
        draw = DiagonalGaussianDistribution(whole).sample(torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.sample(torch.Generator().manual_seed(0)), draw, atol=0.1, rtol=0)
    assert torch.equal(latents.parameters, whole) == (frames < 260)


def test_batches_are_encoded_clip_by_clip(small, device) -> None:
    mels = torch.randn(1, 1, 400, 64, generator=torch.Generator().manual_seed(2)).to(device)
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    batch = torch.cat([mels, 3 * mels.flip(2)])
    alone = torch.cat([encoded(small.vae, one) for one in batch.split(1)])
    recorder = record(small.vae.encoder, "forward")
    torch.testing.assert_close(encoded(small.vae, batch), alone, atol=1e-5, rtol=0)
    assert frames_of(recorder) == [4 * (25 + 2 * 5)] * 2 * 4 * 2


@pytest.mark.parametrize("of", ["spectrogram", "weights"])
def test_gradients_of_encoding_are_those_of_the_whole_clip(small, device, of) -> None:
    mels = torch.randn(1, 1, 400, 64, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    x = mels if of == "spectrogram" else small.vae.encoder.conv_in.weight

    def gradient() -> Tensor:
        return torch.autograd.grad(small.vae.encode(mels).latent_dist.mode().square().mean(), x)[0]

    whole = gradient()
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    assert torch.equal(gradient(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encoding_in_half_precision(small, device, dtype) -> None:
    mels = torch.randn(1, 1, 400, 64, generator=torch.Generator().manual_seed(2)).to(device)
    with litefocus.tile_decoding(small, seconds=1, overlap=0.2):
        tiled = encoded(small.vae, mels)
    whole = encoded(small.vae, mels)
    small.vae.to(dtype)
    error = (encoded(small.vae, mels.to(dtype)) - whole).abs().mean()
    with litefocus.tile_decoding(small, seconds=1, overlap=0.2):
        moments = encoded(small.vae, mels.to(dtype))
    assert moments.dtype == dtype
    assert (moments - tiled).abs().mean() < 1.5 * error


def test_memory_of_encoding_is_that_of_one_tile(pipe, spectrograms) -> None:
    peaks = {}
    for frames in (384, 768):
        for tiles in (False, True):
            if tiles:
                litefocus.tile_decoding(pipe, seconds=1.28, overlap=0.32)
            with PeakMemory() as memory:
                encoded(pipe.vae, spectrograms[:1, :, :frames])
            litefocus.unpatch(pipe)
            peaks[frames, tiles] = memory.peak
    assert peaks[768, False] > 1.9 * peaks[384, False]
    assert peaks[768, True] < 1.1 * peaks[384, True] < 0.7 * peaks[384, False]


def test_a_vae_that_only_decodes(small, latents) -> None:
    """As those that some clients bring, and that nothing is added to."""
    vae = NormVAE()
    vae.encode = None
    with litefocus.tile_decoding(Holder(speecht5(), vae), seconds=1, overlap=0.2):
        assert vae.encode is None
        vae.decode(latents)


# --- whole pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_pipelines(name: str) -> None:
    pipe = build(name)
    nn.init.zeros_(pipe.vae.decoder.mid_block.attentions[0].to_out[0].weight)  # it sees one tile, and is untrained
    whole = generate(pipe, 3.3, steps=1)
    handle = litefocus.tile_decoding(pipe, seconds=1, overlap=0.25)
    short, tiled = generate(pipe, 0.96, steps=1), generate(pipe, 3.3, steps=1)
    assert tiled.shape == whole.shape
    assert tiled.dtype == whole.dtype
    assert 0 < np.abs(tiled - whole).mean() < 0.03 * np.abs(whole).mean()
    handle.remove()
    assert np.array_equal(generate(pipe, 3.3, steps=1), whole)
    assert np.array_equal(generate(pipe, 0.96, steps=1), short)


@pytest.mark.parametrize("first", ["offload", "tiles"])
def test_offload_hooks_run_for_every_tile_at_every_call(first: str, monkeypatch) -> None:
    """The pipeline takes its hooks off and puts them on again before it decodes."""
    pipe = build("AudioLDM 2")
    litefocus.tile_decoding(pipe, seconds=1, overlap=0.2)
    expected = generate(pipe, 3.3, steps=1)
    litefocus.unpatch(pipe)
    hooked = []
    hook = accelerate.hooks.CpuOffload.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.CpuOffload,
        "pre_forward",
        lambda self, module, *args, **kwargs: hooked.append(module) or hook(self, module, *args, **kwargs),
    )
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    litefocus.tile_decoding(pipe, seconds=1, overlap=0.2)
    if first == "tiles":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        hooked.clear()
        assert np.array_equal(generate(pipe, 3.3, steps=1), expected)
        assert (hooked.count(pipe.vae), hooked.count(pipe.vocoder)) == (2 * 4, 4)
    assert tiles_of(pipe) is not None


def test_weights_that_move_to_another_type_and_back(small, latents) -> None:
    litefocus.tile_decoding(small, seconds=1, overlap=0.2)
    expected = decoded(small, latents)
    small.vae.to(torch.float64)
    torch.testing.assert_close(decoded(small, latents.double()), expected.double(), atol=1e-4, rtol=0)
    small.vae.to(torch.float32)
    assert torch.equal(decoded(small, latents), expected)


def test_threads_share_the_tiles(small, latents) -> None:
    litefocus.tile_decoding(small, seconds=0.4, overlap=0.08)
    clips = [latents, 3 * latents.flip(2)]
    expected = [decoded(small, clip) for clip in clips]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        got[i] = decoded(small, clips[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(2))


# --- Tango, and the authors' code ------------------------------------------------------------------------------------


@pytest.fixture
def authors_vae(monkeypatch: pytest.MonkeyPatch) -> Any:
    """AudioLDM's own VAE with its vocoder, which Tango has too, with attention in the middle block; small widths."""
    monkeypatch.setattr(_decoding, "SETTLED", 0.05)  # random weights magnify any change of a norm's moments
    utilities = authors("audioldm", "hifigan.utilities")
    monkeypatch.setitem(utilities.HIFIGAN_16K_64, "upsample_initial_channel", 32)
    torch.manual_seed(0)
    shape = {"double_z": True, "z_channels": 8, "resolution": 256, "in_channels": 1, "out_ch": 1, "ch": 32}
    depth = {"ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    module = authors("audioldm", "variational_autoencoder.autoencoder")
    vae = module.AutoencoderKL(ddconfig=shape | depth, embed_dim=8).eval()
    for parameter in vae.vocoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    nn.init.zeros_(vae.decoder.mid.attn_1.proj_out.weight)  # attention sees one tile, and untrained it averages all
    return vae


def assert_tiled(pipe: Any, decode: Any, voice: Any) -> None:
    """decode and voice: what the client calls, in arrays or tensors."""
    z = torch.randn(2, 8, 80, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = decode(z)
        waves = voice(whole)
        with litefocus.tile_decoding(pipe, seconds=0.96, overlap=0.24) as handle:
            assert "tiles of 0.96 s + 0.24 s on either side, in force" in repr(handle)
            assert (tiles_of(pipe).seconds, tiles_of(pipe).overlap) == (0.96, 0.24)
            mels, tiled = decode(z), voice(whole)
        assert 0 < (mels - whole).abs().mean() < 0.05 * whole.std()
        assert type(tiled) is type(waves)
        assert tiled.dtype == waves.dtype
        assert tiled.shape == waves.shape
        np.testing.assert_allclose(tiled, waves, rtol=0, atol=1 if waves.dtype == np.int16 else 1e-5)
        assert torch.equal(decode(z), whole)


def test_tango(authors_vae: Any) -> None:
    """A plain object with a VAE; `decode_first_stage` of Tango's own copy scales its latent, then calls `decode`."""
    tango = types.SimpleNamespace(vae=authors_vae, model=None)
    assert_tiled(tango, lambda z: tango.vae.decode(1.0 / 0.9227 * z), tango.vae.decode_to_waveform)


def test_latent_diffusion_of_the_authors(authors_vae: Any) -> None:
    kind = authors("audioldm", "ldm").LatentDiffusion
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.first_stage_model, model.scale_factor = authors_vae, 0.9
    assert_tiled(model, model.decode_first_stage, model.mel_spectrogram_to_waveform)


# --- AudioSR, which encodes a clip of any length with two VAEs -------------------------------------------------------


@pytest.fixture(scope="module")
def superres() -> Any:
    return audiosr()


@pytest.mark.parametrize("which", ["of the clip", "of the condition"])
def test_latents_of_audiosr(superres: Any, which: str) -> None:
    """A mel spectrogram of 15.36 s, of a quarter of its bins, through the default overlap."""
    owner, method = superres, "encode_first_stage"
    if which == "of the condition":
        owner, method = superres.cond_stage_models[0].vae, "encode"

    def encode(mels: Tensor) -> Any:
        return getattr(owner, method)(mels)

    mels = audiosr_batch(1536, bins=64)["log_mel_spec"][:, None]
    with torch.inference_mode():
        whole = encode(mels)
        with litefocus.tile_decoding(superres, seconds=5.12) as handle:
            assert "tiles of 5.12 s + 1.28 s on either side" in repr(handle)
            assert tiles_of(superres).overlap == 1.28
            tiled = encode(mels)
        assert type(tiled) is type(whole)
        assert_near(tiled.parameters, whole.parameters, seams(192, 3))
        assert torch.equal(encode(mels).parameters, whole.parameters)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_audiosr_from_clip_to_clip(superres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own `super_resolution` from where a file was read, patched and in two tiles."""
    pipeline = authors("audiosr", "pipeline")
    monkeypatch.setattr(pipeline, "make_batch_for_super_resolution", lambda *_, **__: (audiosr_batch(256), 2.56))
    monkeypatch.setattr(pipeline, "seed_everything", torch.manual_seed)
    monkeypatch.setattr(_decoding, "SETTLED", 0.05)  # random weights magnify any change of a norm's moments
    hand_in(monkeypatch, min_keys_saved=1)

    def generate() -> Any:
        return pipeline.super_resolution(superres, "clip.wav", ddim_steps=2)

    dense = generate()
    litefocus.patch(superres, min_sampled=0)
    focused = generate()
    litefocus.tile_decoding(superres, seconds=1.28, overlap=0.32)
    vae, second = superres.first_stage_model, superres.cond_stage_models[0].vae
    recorders = [record(part, "forward") for part in (vae.encoder, second.encoder, vae.decoder)]
    tiled = generate()
    assert [set(frames_of(recorder)) for recorder in recorders] == [{192}, {192}, {24}]
    assert {layer.state for layer in litefocus.status(superres).layers} == {"focus"}
    assert tiled.shape == dense.shape == (1, 1, 256 * 480 + 16)
    error, far = (np.abs(wave - focused).mean() for wave in (tiled, dense))
    assert 0 < error < 0.2 * far
    litefocus.unpatch(superres)
    assert not any("encode" in vars(module) for module in (vae, second))


# --- the handle ------------------------------------------------------------------------------------------------------


def windows(pipe: Any, latents: Tensor) -> int:
    """Frames of the latent that the VAE's decoder sees at once."""
    recorder = record(pipe.vae.decoder, "forward")
    decoded(pipe, latents)
    del pipe.vae.decoder.forward
    (frames,) = set(frames_of(recorder))
    return frames


def test_removing_restores_what_was_there(small: Any) -> None:
    before = [dict(vars(module)) for module in (small, small.vae, small.vocoder)]
    handle = litefocus.tile_decoding(small)
    assert tiles_of(small).seconds == 10.24
    assert repr(handle) == "<TiledDecoding of AudioLDM2Pipeline: tiles of 10.24 s + 0.64 s on either side, in force>"
    handle.remove()
    assert [dict(vars(module)) for module in (small, small.vae, small.vocoder)] == before
    assert repr(handle).endswith("on either side, not in force>")


def test_what_others_wrap_stays_and_nothing_comes_back(small: Any, latents: Tensor) -> None:
    whole = decoded(small, latents)
    handle = litefocus.tile_decoding(small, seconds=1, overlap=0)
    ours = small.vae.decode
    theirs = record(small.vae, "decode")
    assert windows(small, latents) == 25
    assert tiles_of(small) is not None
    litefocus.tile_decoding(small, seconds=2, overlap=0)  # around theirs, which then sees tiles
    theirs.calls.clear()
    assert windows(small, latents) == 50
    assert frames_of(theirs) == [50] * 4
    handle.remove()
    litefocus.unpatch(small)
    assert small.vae.decode is theirs
    assert torch.equal(decoded(small, latents), whole)
    small.vae.decode = ours  # one of ours that somebody has kept
    assert tiles_of(small) is None
    assert torch.equal(decoded(small, latents), whole)
    litefocus.tile_decoding(small, seconds=1, overlap=0)
    assert windows(small, latents) == 25
    litefocus.unpatch(small)
    assert torch.equal(decoded(small, latents), whole)


def test_tiles_that_somebody_took_away_are_not_reported(small: Any, latents: Tensor) -> None:
    litefocus.tile_decoding(small, seconds=1, overlap=0)
    del small.vae.decode
    assert tiles_of(small) is None
    litefocus.tile_decoding(small, seconds=2, overlap=0)
    assert tiles_of(small).seconds == 2
    assert windows(small, latents) == 50


def test_the_handle_keeps_no_weights_alive(embedded: Any) -> None:
    pipe = Holder(copy.deepcopy(embedded.vocoder), copy.deepcopy(embedded.vae))
    handle = litefocus.tile_decoding(pipe)
    left = [weakref.ref(pipe.vae), weakref.ref(pipe.vocoder)]
    del pipe
    gc.collect()
    assert [module() for module in left] == [None, None]
    handle.remove()
    assert "not in force" in repr(handle)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_decode_on_their_own_weights(small: Any, latents: Tensor, copied: Any) -> None:
    tiled = Holder(small.vocoder, small.vae)
    litefocus.tile_decoding(tiled, seconds=1, overlap=0)
    twin = copied(tiled)
    expected = decoded(small, latents)
    nn.init.zeros_(small.vae.decoder.conv_out.weight)
    assert torch.equal(decoded(twin, latents), expected)


# --- a decoder that is compiled --------------------------------------------------------------------------------------


def compile_decoder(vae: Any) -> None:
    vae.decoder = torch.compile(vae.decoder, backend="eager")


def compile_in_place(vae: Any) -> None:
    vae.decoder.compile(backend="eager")


def compile_a_part(vae: Any) -> None:
    vae.decoder.mid_block = torch.compile(vae.decoder.mid_block, backend="eager")


def compile_vae(vae: Any) -> None:
    vae.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:.*backend.*|.*logg.*|.*mark_dynamic.*")
@pytest.mark.parametrize("compile_it", [compile_decoder, compile_in_place, compile_a_part, compile_vae])
def test_a_compiled_decoder_is_refused_or_decodes_the_whole_clip(compile_it: Any, small: Any, latents: Tensor) -> None:
    """In tiles it would be compiled anew for every length of clip, which torch gives up after a few."""
    torch._dynamo.reset()
    pipe = Holder(small.vocoder, small.vae)
    whole, before = decoded(pipe, latents), vars(pipe.vae).keys()
    handle = litefocus.tile_decoding(pipe, seconds=1, overlap=0)
    assert not torch.equal(decoded(pipe, latents), whole)
    compile_it(pipe.vae)
    with pytest.warns(UserWarning, match="decoding the whole clip at once: the VAE's decoder is compiled"):
        torch.testing.assert_close(decoded(pipe, latents), whole)
    handle.remove()
    with pytest.raises(ValueError, match=r"decoder is compiled, .* tile one that is not compiled"):
        litefocus.tile_decoding(pipe)
    assert tiles_of(pipe) is None
    assert "decode" not in before


@pytest.mark.filterwarnings("ignore:.*backend.*|.*logg.*|.*mark_dynamic.*")
def test_a_compiled_encoder_is_refused_or_encodes_the_whole_clip(small: Any, latents: Tensor) -> None:
    torch._dynamo.reset()
    mels = decoded(small, latents)
    whole = encoded(small.vae, mels)
    with litefocus.tile_decoding(small, seconds=1, overlap=0):
        small.vae.encoder = torch.compile(small.vae.encoder, backend="eager")
        with pytest.warns(UserWarning, match="encoding the whole clip at once: the VAE's encoder is compiled"):
            torch.testing.assert_close(encoded(small.vae, mels), whole)
        decoded(small, latents)  # in tiles, without a warning
    with pytest.raises(ValueError, match=r"encoder is compiled, .* or encode the whole clip at once"):
        litefocus.tile_decoding(small)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "got None, which has no VAE and HiFi-GAN vocoder"),
        (nn.Linear(1, 1), "got an object of type Linear, which has no VAE"),
        (types.SimpleNamespace(vae=nn.Linear(1, 1), vocoder=nn.Linear(1, 1)), "tile_decoding takes AudioLDM"),
    ],
)
def test_objects_without_a_vae_and_a_vocoder(thing: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        litefocus.tile_decoding(thing)
    litefocus.unpatch(thing)
    assert tiles_of(thing) is None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seconds": "10"}, TypeError, r"seconds must be a number, got '10' \(str\)"),
        ({"overlap": True}, TypeError, r"overlap must be a number, got True \(bool\)"),
        ({"seconds": float("nan")}, ValueError, "seconds must be finite, at least one latent frame .* got nan"),
        ({"seconds": float("inf")}, ValueError, "seconds must be finite"),
        ({"seconds": 0, "overlap": 0}, ValueError, r"at least one latent frame \(0.04 s\)"),
        ({"seconds": -3.0}, ValueError, "got -3.0"),
        ({"seconds": 2.0}, ValueError, r"at least four times the overlap \(0.64 s\), got 2.0"),
        ({"overlap": -0.1}, ValueError, "overlap must be finite and at least 0 seconds, got -0.1"),
        ({"overlap": float("nan")}, ValueError, "overlap must be finite"),
    ],
)
def test_settings_out_of_range_change_nothing(small: Any, settings: Any, error: Any, message: str) -> None:
    litefocus.tile_decoding(small, seconds=5)
    with pytest.raises(error, match=message):
        litefocus.tile_decoding(small, **settings)
    assert tiles_of(small).seconds == 5
