"""schedule_prompts: against an oracle that attends to each prompt alone, over the whole clip, and blends by hand."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import types
import weakref
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AudioLDM2Pipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support.embedded import embedded
from support.oracle import Grids
from support.pipelines import build, minimal_unet
from support.recorder import Recorder, record
from support.tango import AudioDiffusion, Tango, TangoVAE, tango_unet
from torch import Tensor, nn

import litefocus
from litefocus._prompts import _layers_of_prompts, schedule_of

FRAME = 0.04  # seconds of a latent frame
LATER = {0.71: "rain", 1.33: "a much longer prompt"}  # between the middles of frames
FADE = 0.35


@pytest.fixture
def pipe() -> Any:
    return build("AudioLDM 2")


@pytest.fixture
def tango() -> Tango:
    torch.manual_seed(0)
    made = Tango(tango_unet())
    litefocus.set_duration(made, 2.28)
    return made


def clip(pipe: Any, prompt: Any = "a hammer", seconds: float = 2.0, **options: Any) -> Tensor:
    """The latents of a call, one for every prompt and waveform."""
    options = {"num_inference_steps": 2, **options}
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipe(
        prompt, audio_length_in_s=seconds, generator=generator, output_type="latent", **options
    ).audios
    return latents


def schedule(pipe: Any) -> litefocus.PromptSchedule:
    """Three prompts in two seconds."""
    return litefocus.schedule_prompts(pipe, LATER, fade=FADE)


def cross_attention(unet: nn.Module) -> list[Attention]:
    """Layers that attend to the prompt, as the library finds them."""
    return [layer for layer, _ in _layers_of_prompts(unet) if isinstance(layer, Attention)]


def clips_of_tango(tango: Tango, **options: Any) -> np.ndarray:
    torch.manual_seed(1)  # Tango draws from the global generator
    return tango.generate("a hammer", steps=2, **options)


# --- the oracle


def share(second: float, begins: list[float], which: int, fade: float) -> float:
    """How much prompt `which` counts at a second of the clip; the first begins before it."""

    def risen(begin: float) -> float:
        if second < begin:
            return 0.0
        return 1.0 if second >= begin + fade else math.sin(math.pi / 2 * (second - begin) / fade) ** 2

    later = risen(begins[which + 1]) if which + 1 < len(begins) else 0.0
    return risen(begins[which]) - later


class Blended:
    """A layer's processor: dense attention of every token to every prompt's context alone, and the sum of their shares.

    contexts: of every prompt, (context, mask or None).
    """

    def __init__(self, name: str, grids: Grids, contexts: list[tuple[Tensor, Tensor | None]], begins: Any, fade: float):
        self.name, self.grids, self.contexts = name, grids, contexts
        self.begins, self.fade = begins, fade

    def __call__(self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, **_: Any) -> Tensor:
        frames, bins = self.grids.found[self.name.split(".transformer_blocks")[0]]
        assert x.shape[1] == frames * bins
        output = torch.zeros_like(x)
        for which, (context, mask) in enumerate(self.contexts):
            added = None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0)[:, None]
            alone = AttnProcessor2_0()(attn, x, context, added)
            for frame in range(frames):
                weight = share((frame + 0.5) * FRAME * 16 / bins, [-1.0, *self.begins], which, self.fade)
                rows = slice(frame * bins, (frame + 1) * bins)
                output[:, rows] += weight * alone[:, rows]
        return output


class BlendedNorm(nn.Module):
    """A group norm: of each prompt, moments of the frames where it counts at all, and the sum of their shares."""

    def __init__(self, norm: nn.GroupNorm, begins: Any, fade: float) -> None:
        super().__init__()
        self.norm, self.begins, self.fade = norm, [-1.0, *begins], fade

    def forward(self, x: Tensor) -> Tensor:
        frames, bins = x.shape[2:]
        output = torch.zeros_like(x)
        for which in range(len(self.begins)):
            shares = [share((t + 0.5) * FRAME * 16 / bins, self.begins, which, self.fade) for t in range(frames)]
            counts = [t for t in range(frames) if shares[t]]
            groups = x.double().unflatten(1, (self.norm.num_groups, -1))
            own = groups[:, :, :, counts]
            mean, var = own.mean(dim=(2, 3, 4), keepdim=True), own.var(dim=(2, 3, 4), keepdim=True, correction=0)
            normal = ((groups - mean) / (var + self.norm.eps).sqrt()).flatten(1, 2)
            normal = normal * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
            output += (normal * torch.tensor(shares, dtype=torch.float64)[:, None]).to(x)
        return output


def oracle(pipe: Any, contexts: list[list[tuple[Tensor, Tensor | None]]], begins: Any, fade: float) -> None:
    """Put it on a UNet. contexts: for every prompt, those of a block's cross-attention layers in turn."""
    unet = pipe.model.unet if hasattr(pipe, "model") else pipe.unet
    grids, slots = Grids(unet), len(contexts[0])
    for name, module in unet.named_modules():
        slot = int(name.split(".attentions.")[1].split(".")[0]) % 3 - 1 if slots > 1 and ".attentions." in name else 0
        if isinstance(module, Attention) and name.endswith("attn2") and slot >= 0:
            module.set_processor(Blended(name, grids, [of[slot] for of in contexts], begins, fade))
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, BlendedNorm(child, begins, fade))


CALLS: dict[str, dict[str, Any]] = {
    "guidance": {},
    "no guidance": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": "noise and wind", "guidance_scale": 5.0},
    "two waveforms": {"num_waveforms_per_prompt": 2},
    "a batch": {"prompt": ["a hammer", "a bell that rings"]},
    "everything": {
        "prompt": ["a hammer", "a bell that rings"],
        "num_waveforms_per_prompt": 2,
        "negative_prompt": ["noise", ""],
        "seconds": 2.28,  # 57 frames: odd at every level
    },
}


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "patched"])
@pytest.mark.parametrize("kind", CALLS)
def test_audioldm2_is_that_of_each_prompt_alone(pipe: Any, kind: str, patched: bool) -> None:
    call = CALLS[kind]
    own = call.get("prompt", "a hammer")
    later: dict[float, Any] = dict(LATER)
    if kind == "everything":
        later[1.33] = ["the sea", "a car"]
    slow = copy.deepcopy(pipe)
    if patched:
        for each in (pipe, slow):
            litefocus.patch(each, sparse_ratio=0.05, min_sampled=2)
    plain = clip(slow, **call)
    # what the pipeline encodes for each prompt alone
    contexts = []
    for prompt in (own, *later.values()):
        alone = [prompt] * len(own) if isinstance(own, list) and isinstance(prompt, str) else prompt
        embeds, mask, generated = slow.encode_prompt(
            alone,
            "cpu",
            call.get("num_waveforms_per_prompt", 1),
            call.get("guidance_scale", 3.5) > 1,
            negative_prompt=call.get("negative_prompt"),
        )
        contexts.append([(generated, None), (embeds, mask)])
    oracle(slow, contexts, list(later), FADE)
    expected = clip(slow, **call)
    litefocus.schedule_prompts(pipe, later, fade=FADE)
    torch.testing.assert_close(clip(pipe, **call), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "patched"])
@pytest.mark.parametrize(("guidance", "samples"), [(3, 1), (3, 2), (1, 2)])
def test_tango_is_that_of_each_prompt_alone(tango: Tango, guidance: float, samples: int, patched: bool) -> None:
    slow = copy.deepcopy(tango)
    if patched:
        for each in (tango, slow):
            litefocus.patch(each, sparse_ratio=0.05, min_sampled=2)
    plain = clips_of_tango(slow, guidance=guidance, samples=samples)
    contexts = []
    for prompt in ("a hammer", *LATER.values()):
        if guidance > 1:
            embeds, mask = slow.model.encode_text_classifier_free([prompt], samples)
        else:
            embeds, mask = (x.repeat_interleave(samples, 0) for x in slow.model.encode_text([prompt]))
        contexts.append([(embeds, mask)])
    oracle(slow, contexts, list(LATER), FADE)
    expected = clips_of_tango(slow, guidance=guidance, samples=samples)
    litefocus.schedule_prompts(tango, LATER, fade=FADE)
    got = clips_of_tango(tango, guidance=guidance, samples=samples)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-3)
    assert np.abs(expected - plain).max() > 1e-3


def test_mustangos_beats_and_chords_are_left_alone() -> None:
    unet = tango_unet()
    for block in unet.down_blocks[:3]:
        block.attentions2, block.attentions3 = copy.deepcopy(block.attentions), copy.deepcopy(block.attentions)
    mustango = types.SimpleNamespace(model=AudioDiffusion(unet), vae=TangoVAE())
    litefocus.schedule_prompts(mustango, {5: "rain"})
    wrapped = {name for name, module in unet.named_modules() if "forward" in vars(module) and hasattr(module, "to_q")}
    assert wrapped == {name for name, _ in unet.named_modules() if ".attentions." in name and name.endswith("attn2")}
    assert len(wrapped) == 16


# --- what a schedule does to a clip


def test_the_same_prompt_later_changes_norms_alone(pipe: Any) -> None:
    for module in pipe.unet.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    plain = clip(pipe, num_inference_steps=1)
    litefocus.schedule_prompts(pipe, [(0.7, "a hammer"), (1.3, "a hammer")], fade=0.5)
    torch.testing.assert_close(clip(pipe, num_inference_steps=1), plain, atol=1e-4, rtol=1e-4)


def test_each_prompt_runs_on_its_frames_alone(pipe: Any) -> None:
    """Rows of every call of every layer: a fade's twice, all others once."""
    layers = cross_attention(pipe.unet)
    for attn in layers:
        attn.set_processor(Recorder(attn.processor))
    clip(pipe, num_inference_steps=1)
    plain = [attn.processor.calls[0][0][1].shape[1] for attn in layers]
    assert max(plain) == 25 * 8
    for fade in (0, 0.32):
        for attn in layers:
            attn.processor.calls.clear()
        with litefocus.schedule_prompts(pipe, {0.64: "rain", 1.28: "wind"}, fade=fade):
            clip(pipe, num_inference_steps=1)
        for attn, tokens in zip(layers, plain, strict=True):
            calls = attn.processor.calls
            assert len(calls) == 3
            bins = {25 * 8: 8, 13 * 4: 4, 7 * 2: 2}[tokens]
            twice = 2 * bins * bins // 2 if fade else 0  # 8, 4 or 2 halves of a fade of 8 latent frames, two times
            assert sum(args[1].shape[1] for args, _ in calls) == tokens + twice


def test_a_part_shorter_than_a_frame_of_a_coarse_level(pipe: Any) -> None:
    litefocus.schedule_prompts(pipe, {1.0: "rain", 1.04: "wind"}, fade=0.0)
    litefocus.schedule_prompts(pipe, {1.0: "rain", 1.04: "wind"}, fade=0.04)
    assert clip(pipe).isfinite().all()


def test_the_embedded_pipeline_turns_from_one_sound_to_the_other() -> None:
    """By latents: in each part nearer to the clip of its prompt alone, from the same noise, than to the other one."""
    pipe = embedded()
    options: dict[str, Any] = {"seconds": 10.24, "num_inference_steps": 6}
    bell, tabla = clip(pipe, "a slow bell", **options), clip(pipe, "a fast tabla rhythm", **options)
    with litefocus.patch(pipe), litefocus.schedule_prompts(pipe, {4: "a fast tabla rhythm"}):
        turned = clip(pipe, "a slow bell", **options)

    def distance(other: Tensor, part: slice) -> float:
        return float((turned - other)[:, :, part].square().mean())

    before, after = slice(0, 90), slice(170, None)
    assert 4 * distance(bell, before) < distance(tabla, before)
    assert 4 * distance(tabla, after) < distance(bell, after)


# --- in force and off again


def attributes(pipe: Any) -> list[str]:
    """Everything of ours, on any module."""
    found = [name for name in vars(pipe) if "litefocus" in name]
    found += [name for name in ("check_inputs", "encode_prompt") if name in vars(pipe)]
    for part in (pipe.unet, pipe.vae, pipe.vocoder, pipe.text_encoder):
        for module in part.modules():
            found += [name for name in vars(module) if "litefocus" in name or name == "forward"]
            assert not {**module._forward_pre_hooks, **module._forward_hooks}
    return found


def test_without_a_schedule_all_is_as_before(pipe: Any) -> None:
    plain = clip(pipe)
    processors = [attn.processor for attn in cross_attention(pipe.unet)]
    handle = schedule(pipe)
    changed = clip(pipe)
    handle.remove()
    assert torch.equal(clip(pipe), plain)
    with schedule(pipe):
        assert torch.equal(clip(pipe), changed)
    assert torch.equal(clip(pipe), plain)
    schedule(pipe)
    litefocus.unpatch(pipe)
    assert torch.equal(clip(pipe), plain)
    assert not attributes(pipe)
    assert [attn.processor for attn in cross_attention(pipe.unet)] == processors
    assert not torch.equal(changed, plain)


def test_the_newest_schedule_counts_and_blocks_end(pipe: Any) -> None:
    def alone(prompt: str) -> Tensor:
        with litefocus.schedule_prompts(copy.deepcopy(pipe), {1.0: prompt}) as handle:
            return clip(handle._modules[1]())

    expected = {prompt: alone(prompt) for prompt in ("rain", "wind")}
    assert not torch.equal(expected["rain"], expected["wind"])
    first = litefocus.schedule_prompts(pipe, {1.0: "rain"})
    with litefocus.schedule_prompts(pipe, {1.0: "wind"}):
        assert torch.equal(clip(pipe), expected["wind"])
        with pytest.raises(RuntimeError, match="this schedule_prompts was taken off, or was entered before"):
            litefocus.schedule_prompts(pipe, {1.0: "sea"}).remove() or first.remove() or first.__enter__()
        assert torch.equal(clip(pipe), expected["wind"])
    assert not attributes(pipe)


@pytest.mark.parametrize("tiled_first", [True, False])
def test_tiles_and_schedules_do_not_disturb_each_other(tiled_first: bool, pipe: Any) -> None:
    """Both wrap methods of the pipeline itself."""
    vocoder, before = record(pipe.vocoder, "forward"), attributes(pipe)
    switches = [lambda: litefocus.tile_decoding(pipe, seconds=1.28, overlap=0.08), lambda: schedule(pipe)]
    handles = [switch() for switch in (switches if tiled_first else switches[::-1])]
    tiles, prompts = handles if tiled_first else handles[::-1]
    prompts.remove()
    assert litefocus.status(pipe).tiles is not None
    pipe("a hammer", audio_length_in_s=3.0, num_inference_steps=1)
    assert len(vocoder.calls) > 1
    schedule(pipe)
    tiles.remove()
    assert schedule_of(pipe) is not None
    vocoder.calls.clear()
    pipe("a hammer", audio_length_in_s=3.0, num_inference_steps=1)
    assert len(vocoder.calls) == 1
    litefocus.unpatch(pipe)
    assert attributes(pipe) == before


def test_patches_and_schedules_do_not_disturb_each_other(pipe: Any) -> None:
    dense = clip(pipe)
    patch = litefocus.patch(pipe, sparse_ratio=0.05, min_sampled=2)
    patched = clip(pipe)
    handle = schedule(pipe)
    both = clip(pipe)
    assert {layer.state for layer in litefocus.status(pipe, 30).layers if layer.freq_bins == 8} == {"focus"}
    patch.remove()
    scheduled = clip(pipe)
    litefocus.patch(pipe, sparse_ratio=0.05, min_sampled=2)
    assert torch.equal(clip(pipe), both)
    handle.remove()
    assert torch.equal(clip(pipe), patched)
    litefocus.unpatch(pipe)
    assert torch.equal(clip(pipe), dense)
    assert len({float(x.sum()) for x in (dense, patched, both, scheduled)}) == 4


def test_status_and_the_handle_say_which_prompt_when(pipe: Any, tango: Tango) -> None:
    assert litefocus.status(pipe).prompts is None
    handle = litefocus.schedule_prompts(pipe, [(45, "thunder"), (20, ["rain", "wind"])], fade=2)
    told = "['rain', 'wind'] from 20 s, 'thunder' from 45 s, each fading in over 2 s"
    assert litefocus.status(pipe).prompts == told
    assert f"prompts: {told}" in repr(litefocus.status(pipe)).splitlines()
    assert repr(handle) == f"<PromptSchedule of AudioLDM2Pipeline: {told}, in force>"
    handle.remove()
    assert repr(handle) == f"<PromptSchedule of AudioLDM2Pipeline: {told}, not in force>"
    assert "prompts:" not in repr(litefocus.status(pipe))
    litefocus.schedule_prompts(tango, {1: "rain"}, fade=0.5)
    assert litefocus.status(tango).prompts == "'rain' from 1 s, each fading in over 0.5 s"
    litefocus.unpatch(tango)
    assert schedule_of(tango) is None
    assert not [name for name in vars(tango.model) if name.startswith(("encode", "_litefocus"))]


def test_a_handle_keeps_nothing_alive() -> None:
    pipe = build("AudioLDM 2")
    handle = schedule(pipe)
    clip(pipe)
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
    assert repr(handle).endswith("not in force>")


def test_copies_go_on_and_are_their_own(pipe: Any) -> None:
    plain = clip(pipe)
    schedule(pipe)
    changed = clip(pipe)
    twin = copy.deepcopy(pipe)
    litefocus.unpatch(pipe)
    assert torch.equal(clip(pipe), plain)
    assert torch.equal(clip(twin), changed)
    unet = pickle.loads(pickle.dumps(twin.unet))
    litefocus.unpatch(twin)
    assert torch.equal(clip(twin), plain)
    assert not attributes(twin)
    litefocus.unpatch(unet)
    assert not [name for module in unet.modules() for name in vars(module) if name == "forward"]


# --- others wrap or replace what is wrapped


def wrap_encoder(pipe: Any) -> Any:
    """As a cache of encodings does."""
    return record(pipe, "encode_prompt")


def wrap_check(pipe: Any) -> Any:
    return record(pipe, "check_inputs")


def wrap_layers(pipe: Any) -> Any:
    """As accelerate's hooks do."""
    return [record(layer, "forward") for layer, _ in _layers_of_prompts(pipe.unet)][-1]


@pytest.mark.parametrize("wrap", [wrap_encoder, wrap_check, wrap_layers])
def test_a_wrapper_that_comes_later_leaves_the_schedule_in_force(wrap: Any, pipe: Any) -> None:
    plain = clip(pipe)
    handle = schedule(pipe)
    changed = clip(pipe)
    recorder = wrap(pipe)
    assert torch.equal(clip(pipe), changed)
    assert recorder.calls
    assert schedule_of(pipe) is not None
    handle.remove()
    assert torch.equal(clip(pipe), plain)
    schedule(pipe)  # around the wrapper, inside of which the first one stays
    assert torch.equal(clip(pipe), changed)
    assert torch.equal(clip(copy.deepcopy(pipe)), changed)
    litefocus.unpatch(pipe)
    assert torch.equal(clip(pipe), plain)


def replace_encoder(owner: Any, method: str) -> None:
    setattr(owner, method, types.MethodType(getattr(type(owner), method), owner))


def delete_encoder(owner: Any, method: str) -> None:
    delattr(owner, method)


def change_encoding(owner: Any, method: str) -> None:
    before = getattr(owner, method)
    setattr(owner, method, lambda *args, **kwargs: [x[:, :-1] for x in before(*args, **kwargs)])


@pytest.mark.parametrize("change", [replace_encoder, delete_encoder, change_encoding])
@pytest.mark.parametrize("model", ["pipe", "tango"])
def test_a_call_that_would_ignore_the_schedule_is_an_error(change: Any, model: str, request: Any) -> None:
    pipe = request.getfixturevalue(model)
    owner, method, run = {
        "pipe": (pipe, "encode_prompt", clip),
        "tango": (getattr(pipe, "model", None), "encode_text_classifier_free", clips_of_tango),
    }[model]
    schedule(pipe)
    changed = run(pipe)
    change(owner, method)
    with pytest.raises(RuntimeError, match="prompts are scheduled, and do not come with this call: a method that"):
        run(pipe)
    if change is not change_encoding:
        assert schedule_of(pipe) is None
    if change is not change_encoding:
        schedule(pipe)
        assert (run(pipe) == changed).all()


def beside(pipe: Any) -> Any:
    """Another pipeline of the same parts."""
    other = AudioLDM2Pipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize(
    "options",
    [{"prompt": ["a", "b", "c"]}, {"callback_steps": 0}, {"num_inference_steps": 2000}, {"latents": "none"}],
    ids=str,
)
def test_a_call_that_failed_disturbs_no_other(options: dict[str, Any], pipe: Any) -> None:
    """Before its prompt is encoded, then, and before the first step."""
    other = beside(pipe)
    plain = clip(other)
    litefocus.schedule_prompts(pipe, {1.0: ["rain", "wind"]})
    with pytest.raises((ValueError, AttributeError)):
        clip(pipe, **{"prompt": ["a", "b"], **options})
    assert torch.equal(clip(other), plain)


def test_pipelines_on_one_unet_keep_their_schedules(pipe: Any) -> None:
    other = beside(pipe)
    plain = clip(pipe)
    litefocus.schedule_prompts(pipe, {1.0: "rain"})  # without its handle
    rain = clip(pipe)
    for prompt in ("wind", "sea"):
        litefocus.schedule_prompts(other, {1.0: prompt})
    assert torch.equal(clip(pipe), rain)
    litefocus.unpatch(pipe)
    litefocus.unpatch(other)
    with litefocus.schedule_prompts(pipe, {1.0: "rain"}):
        handle = litefocus.schedule_prompts(other, {1.0: "rain"})  # of another request
    assert torch.equal(clip(pipe), plain)
    assert torch.equal(clip(other), rain)
    handle.remove()
    assert not attributes(pipe)
    assert not attributes(other)


def test_a_call_of_the_unet_in_between_does_not_end_the_schedule(pipe: Any) -> None:
    """A callback makes a preview, say."""
    contexts = pipe.encode_prompt("a short one", "cpu", 1, True)[0::2]

    def preview(*_: Any) -> None:
        x = torch.ones(2, 8, 50, 16)
        previews.append(pipe.unet(x, 7, contexts[1], encoder_hidden_states_1=contexts[0], return_dict=False)[0])

    previews: list[Tensor] = []
    with torch.no_grad():
        preview()
    schedule(pipe)
    changed = clip(pipe)
    assert torch.equal(clip(pipe, callback=preview), changed)
    assert all(torch.equal(preview, previews[0]) for preview in previews)
    assert len(previews) == 3


def accelerate_hooks(unet: nn.Module) -> Any:
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    return lambda: accelerate.hooks.remove_hook_from_module(unet, recurse=True)


def forward_set(unet: nn.Module) -> Any:
    def back() -> None:
        del unet.conv_norm_out.forward

    return back


@pytest.mark.parametrize("hook", [accelerate_hooks, forward_set])
def test_layers_that_lost_their_wrappers_are_an_error(hook: Any, pipe: Any) -> None:
    """Hooks that were there before put back what they had replaced."""
    unhook = hook(pipe.unet)
    schedule(pipe)
    changed = clip(pipe)
    unhook()
    assert schedule_of(pipe) is None
    with pytest.raises(RuntimeError, match="something has put back the forward of a layer"):
        clip(pipe)
    schedule(pipe)
    assert torch.equal(clip(pipe), changed)


def test_a_shallow_copy_has_its_own_schedule(pipe: Any) -> None:
    plain = clip(pipe)
    handle = litefocus.schedule_prompts(pipe, {1.0: "rain"})
    rain = clip(pipe)
    twin = copy.copy(pipe)
    second = litefocus.schedule_prompts(twin, {1.0: "wind"})
    assert torch.equal(clip(pipe), rain)
    handle.remove()
    assert not torch.equal(clip(twin), rain)
    litefocus.schedule_prompts(twin, {1.0: "rain"})
    assert torch.equal(clip(twin), rain)
    assert torch.equal(clip(pipe), plain)
    second.remove()


def test_patched_layers_leave_out_far_samples_under_a_schedule(pipe: Any) -> None:
    """So that no part has the others' sounds. `near` of other calls, and calls with gradients, keep them."""
    few = {"time_window": 16, "sparse_ratio": 0.1, "min_sampled": 2}
    litefocus.patch(pipe, far_sampled=0, **few)
    with schedule(pipe):
        near = clip(pipe, seconds=4.0)
    litefocus.unpatch(pipe)
    litefocus.patch(pipe, far_sampled=8, **few)
    with_far = clip(pipe, seconds=4.0)
    with schedule(pipe):
        assert torch.equal(clip(pipe, seconds=4.0), near)
    assert torch.equal(clip(pipe, seconds=4.0), with_far)
    grids = [layer.grid for layer in (getattr(x, "_litefocus", None) for x in pipe.unet.modules()) if layer]
    assert any(key[3] for grid in grids for key in grid._built)


def test_two_tangos_on_one_unet(tango: Tango) -> None:
    other = copy.copy(tango)
    other.model = copy.copy(tango.model)
    other.model._modules = dict(tango.model._modules)
    schedule(other)
    changed = clips_of_tango(other)
    first = schedule(tango)
    litefocus.tile_decoding(tango, seconds=2.0, overlap=0.1)
    first.remove()
    assert litefocus.status(tango).tiles is not None
    litefocus.unpatch(tango.vae)
    assert schedule_of(tango) is None
    assert (clips_of_tango(other) == changed).all()


def test_another_pipeline_on_the_same_unet_is_not_scheduled(pipe: Any) -> None:
    other = beside(pipe)
    plain = clip(other, "abcdefghijkl")
    tokens = [len(pipe.tokenizer_2(text).input_ids) for text in ("abcde", "abcdefghijkl")]
    assert 2 * tokens[0] == tokens[1]  # as many as two prompts have together
    first = litefocus.schedule_prompts(pipe, {1.0: "abcde"})
    changed = clip(pipe, "abcd")
    assert torch.equal(clip(other, "abcdefghijkl"), plain)
    second = litefocus.schedule_prompts(other, {1.0: "rain"})
    assert not torch.equal(clip(other, "abcdefghijkl"), plain)
    assert torch.equal(clip(pipe, "abcd"), changed)
    second.remove()
    assert torch.equal(clip(other, "abcdefghijkl"), plain)
    litefocus.unpatch(other)  # the UNet of both
    assert schedule_of(pipe) is None
    assert not torch.equal(clip(pipe, "abcd"), changed)
    first.remove()
    assert not attributes(pipe)


def test_every_thread_has_what_it_encoded(pipe: Any) -> None:
    """Each in a block of its own; the other's block begins, and ends, between a thread's encoding and its step."""
    x, barrier = torch.randn(2, 8, 50, 16, generator=torch.Generator().manual_seed(0)), threading.Barrier(2)

    def step(embeds: Tensor, mask: Tensor, generated: Tensor) -> Tensor:
        with torch.no_grad():
            return pipe.unet(
                x, 7, generated, encoder_hidden_states_1=embeds, encoder_attention_mask_1=mask, return_dict=False
            )[0]

    def encode() -> tuple[Tensor, ...]:
        with torch.no_grad():
            encoded: tuple[Tensor, ...] = pipe.encode_prompt("a hammer", "cpu", 1, True)
        return encoded

    expected, got = {}, {}
    prompts = {"one": {0.7: "rain"}, "two": {0.5: "wind", 1.5: "rain"}}
    for name, later in prompts.items():
        with litefocus.schedule_prompts(pipe, later, fade=0.3):
            expected[name] = step(*encode())

    def work(name: str) -> None:
        if name == "two":
            barrier.wait()
        with litefocus.schedule_prompts(pipe, prompts[name], fade=0.3):
            encoded = encode()
            barrier.wait()
            if name == "one":
                barrier.wait()  # "two" has encoded by now
            got[name] = step(*encoded)
            if name == "one":
                barrier.wait()
        if name == "two":
            barrier.wait()

    workers = [threading.Thread(target=work, args=(name,)) for name in prompts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for name, output in expected.items():
        assert torch.equal(got[name], output)
    assert not torch.equal(expected["one"], expected["two"])
    assert not attributes(pipe)


# --- beside others


def test_compiled_unets_follow_the_schedule(pipe: Any) -> None:
    plain = clip(pipe)
    with schedule(pipe):
        changed = clip(pipe)
    torch._dynamo.reset()
    for module in pipe.unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(backend="eager")
    torch.testing.assert_close(clip(pipe), plain)
    with schedule(pipe):
        torch.testing.assert_close(clip(pipe), changed)
        with litefocus.schedule_prompts(pipe, {0.7: "a hammer"}, fade=FADE):
            assert (clip(pipe) - changed).abs().max() > 0.1
        torch.testing.assert_close(clip(pipe), changed)
    torch.testing.assert_close(clip(pipe), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_part", ["unet", "blocks"])
def test_compiled_parts_see_whether_a_call_is_scheduled(compiled_part: str, pipe: Any) -> None:
    """Calls of others, a warm-up say, come first, and in between."""
    plain = clip(pipe)
    handle = schedule(pipe)
    changed = clip(pipe)
    handle.remove()
    if compiled_part == "unet":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        for module in pipe.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.compile(backend="eager")
    other = beside(pipe)
    handle = schedule(pipe)
    for _ in range(2):
        torch.testing.assert_close(clip(other), plain)
        torch.testing.assert_close(clip(pipe), changed)
    handle.remove()
    torch.testing.assert_close(clip(pipe), plain)
    torch._dynamo.reset()


def test_offloading_changes_nothing(pipe: Any) -> None:
    schedule(pipe)
    changed = clip(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(clip(pipe), changed)
    pipe.remove_all_hooks()
    assert torch.equal(clip(pipe), changed)


def test_other_processors_run_too(pipe: Any) -> None:
    """A layer runs its own code, whatever that is."""
    schedule(pipe)
    changed = clip(pipe)
    pipe.enable_attention_slicing()
    torch.testing.assert_close(clip(pipe), changed, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # by what diffusers does for a checkpoint
@pytest.mark.parametrize("patched", [False, True])
def test_gradients_flow_with_and_without_checkpoints(patched: bool, tango: Tango) -> None:
    if patched:
        litefocus.patch(tango, time_window=16, sparse_ratio=0.1, min_sampled=2)
    schedule(tango)
    with torch.no_grad():
        embeds, mask = tango.model.encode_text_classifier_free(["a hammer"], 1)
    unet, grads = tango.model.unet.train(), []
    for checkpoints in (False, True):
        unet.enable_gradient_checkpointing() if checkpoints else unet.disable_gradient_checkpointing()
        x = torch.randn(
            2, 8, 100 if patched else 50, 16, generator=torch.Generator().manual_seed(0), requires_grad=True
        )
        unet(x, 7, embeds, encoder_attention_mask=mask).sample.square().sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


# --- errors


@pytest.mark.parametrize(
    ("prompts", "fade", "kind", "message"),
    [
        ({}, 2, ValueError, r"prompts must not be empty, and no two may begin at the same time, got {}"),
        ("rain", 2, TypeError, "prompts must be a dict of seconds and prompts, or pairs of them, got 'rain'"),
        (7, 2, TypeError, "prompts must be a dict of seconds and prompts, or pairs of them, got 7"),
        ({"20": "rain"}, 2, TypeError, r"times must be numbers of seconds, got '20' \(str\)"),
        ({True: "rain"}, 2, TypeError, r"times must be numbers of seconds, got True \(bool\)"),
        ({0: "rain"}, 2, ValueError, "times must be finite and above 0 s, where the call's own prompt begins, got 0"),
        ({-1.0: "rain"}, 2, ValueError, "got -1.0"),
        ({math.nan: "rain"}, 2, ValueError, "got nan"),
        ([(20, "rain"), (20.0, "wind")], 2, ValueError, r"no two may begin at the same time, got \[\(20, 'rain'\)"),
        ({20: 5}, 2, TypeError, "the prompt at 20 s must be a string, or a list of strings, got 5"),
        ({20: ["rain", None]}, 2, TypeError, r"got \['rain', None\]"),
        ({20: []}, 2, TypeError, r"got \[\]"),
        ({20: "rain"}, -1, ValueError, "fade must be finite, at least 0 and at most inf s, the shortest part, got -1"),
        ({20: "rain"}, math.inf, ValueError, "got inf"),
        ({20: "rain"}, "2", TypeError, r"fade must be a number of seconds, got '2' \(str\)"),
        ({20: "rain", 21.5: "wind"}, 2, ValueError, "at most 1.5 s, the shortest part, got 2"),
    ],
)
def test_mistakes_are_told_at_once(pipe: Any, prompts: Any, fade: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        litefocus.schedule_prompts(pipe, prompts, fade=fade)
    assert not attributes(pipe)


CLASS = "has its prompt in a class embedding, one for the whole clip; schedule_prompts takes AudioLDM 2 pipelines"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("AudioLDM"), f"AudioLDMPipeline {CLASS}"),
        (lambda: build("MusicLDM"), f"MusicLDMPipeline {CLASS}"),
        (lambda: build("AudioLDM").unet, f"UNet2DConditionModel {CLASS}"),
        (lambda: minimal_unet(), "got an object of type UNet2DConditionModel; schedule_prompts takes AudioLDM 2"),
        (lambda: None, "got None; schedule_prompts takes AudioLDM 2 pipelines of diffusers, and Tango, Tango 2"),
        (lambda: nn.Linear(1, 1), "got an object of type Linear; schedule_prompts takes"),
    ],
)
def test_other_objects_are_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        litefocus.schedule_prompts(make(), {20: "rain"})


@pytest.fixture
def encodings(pipe: Any) -> Recorder:
    """What was encoded: nothing, where an error comes before any work."""
    return record(pipe, "encode_prompt")


def test_a_time_beyond_the_clip_is_told_before_anything_is_encoded(pipe: Any, encodings: Recorder) -> None:
    litefocus.schedule_prompts(pipe, {1.0: "rain", 2.0: "wind"}, fade=0.5)
    with pytest.raises(ValueError, match="a prompt is scheduled at 2 s, and the clip ends at 2 s; make it longer, or"):
        clip(pipe, seconds=2)
    assert not encodings.calls
    clip(pipe, seconds=2.04)
    with pytest.raises(ValueError, match=r"scheduled at 2 s, and the clip ends at 1\.6 s"):  # by its latents
        clip(pipe, seconds=3, latents=torch.randn(1, 8, 40, 16))


def test_a_time_beyond_the_clip_of_tango(tango: Tango) -> None:
    encodings = record(tango.model, "encode_text")
    litefocus.schedule_prompts(tango, {3: "rain", 12: "wind"})
    with pytest.raises(ValueError, match=r"a prompt is scheduled at 12 s, and the clip ends at 2\.28 s"):
        clips_of_tango(tango)
    litefocus.set_duration(tango, None)
    with pytest.raises(ValueError, match=r"the clip ends at 10\.24 s"):
        clips_of_tango(tango)
    assert not encodings.calls
    draw = tango.model.prepare_latents
    tango.model.prepare_latents = lambda *args: draw(*args)[:, :, :100]  # somebody's own length, which the UNet shows
    with pytest.raises(ValueError, match="the clip ends at 4 s"):
        clips_of_tango(tango)
    litefocus.schedule_prompts(tango, {3: "rain"})
    assert len(clips_of_tango(tango)) > 4 * 16000 - 1


def test_calls_that_do_not_fit_are_told_before_anything_is_encoded(pipe: Any, encodings: Recorder) -> None:
    embeds, mask, generated = pipe.encode_prompt("a hammer", "cpu", 1, False)
    encodings.calls.clear()
    litefocus.schedule_prompts(pipe, {1.0: ["rain", "wind"]})
    with pytest.raises(ValueError, match=r"2 prompts are scheduled at once, \['rain', 'wind'\], and the call brings 1"):
        clip(pipe)
    with pytest.raises(ValueError, match="and the call brings 3"):
        clip(pipe, ["a", "b", "c"])
    with pytest.raises(ValueError, match="this call brings prompt_embeds instead of a prompt"):
        clip(pipe, None, prompt_embeds=embeds, attention_mask=mask, generated_prompt_embeds=generated)
    assert not encodings.calls
    assert len(clip(pipe, ["a", "b"])) == 2


def test_merged_tokens_are_refused(pipe: Any) -> None:
    schedule(pipe)
    embeds, *_ = pipe.encode_prompt("a hammer", "cpu", 1, False)
    attn = next(attn for attn in cross_attention(pipe.unet) if attn.to_k.in_features == embeds.shape[2])
    with pytest.raises(ValueError, match="33 tokens of a cross-attention layer are not a grid of 8 frequency bins"):
        attn(torch.randn(1, 33, attn.to_q.in_features), encoder_hidden_states=embeds)
    assert attn(torch.randn(1, 33, attn.to_q.in_features), embeds[:, :3]).shape == (1, 33, attn.to_q.in_features)
