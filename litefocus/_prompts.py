"""Prompts over time: cross-attention of each stretch of a clip to the prompt that is scheduled there.

Under a schedule, the pipeline's encoding of its prompt is followed by those of the scheduled ones, along the axis of
text tokens; every mask, batch and guidance half comes along. A cross-attention layer takes them apart again: it runs
its own code once for each prompt, on the frames where that prompt counts, and blends the outputs. Group norms too run
once for each part, as if it were a clip of its own, since the moments of a clip of several sounds fit none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litefocus._compile import not_compiled
from litefocus._context import Context
from litefocus._grid import halved
from litefocus._layers import blocks, named_modules, self_attention_layers, unwrapped
from litefocus._registry import Handle, Setting, Wrapper, all_wrapped, current, settings_on, unwrap, wrap
from litefocus._tango import drawn_frames
from litefocus._target import LatentGeometry, latent_geometry, resolve, tango_model

Prompt = str | Sequence[str]

# Methods that encode a call's prompt, its first argument: of AudioLDM 2, and of Tango with and without guidance.
ENCODERS = ("encode_prompt", "encode_text_classifier_free", "encode_text")
# Methods that a call begins with, of AudioLDM 2 and of Tango.
BEGINNINGS = ("check_inputs", "inference")


def schedule_prompts(
    pipe: Any, prompts: Mapping[float, Prompt] | Iterable[tuple[float, Prompt]], fade: float = 2.0
) -> PromptSchedule:
    """Change the prompt on the way through a clip, in place: the call's own holds until the first time.

    From its time on, a prompt fades in over `fade` seconds (raised cosine), and the one before fades out. Every prompt
    is encoded as the call's own is: with its guidance, its negative prompt and its number of waveforms. Prompts act by
    cross-attention, and every part has group norms of its own, as a clip of one prompt has; self-attention joins the
    parts. Where patched layers have a time window, they leave out the far sample, which would bring every part the
    sounds of all others; compiled layers and calls that record gradients keep it. A step costs what it costs without a
    schedule, but for the frames of a fade, on which cross-attention and norms run twice.

    Scheduling again replaces the prompts; `with litefocus.schedule_prompts(pipe, ...):` schedules for the block alone,
    as `patch` does. A call goes by the schedule that was in force when it encoded its prompt. If the last schedule is
    removed during a call, the rest of that call attends to all prompts at once. Compiled UNets run these layers
    uncompiled.

    Args:
        pipe: an AudioLDM 2 pipeline of diffusers, or a Tango, Tango 2 or Mustango object, whose beats and chords stay
            those of the call's own prompt.
        prompts: by the seconds of the clip at which they begin, above 0: a dict, or pairs. Each is a string, or a list
            of one for every prompt of a batch.
        fade: seconds of a transition, at most those between two times. 0 changes from one frame to the next.

    Returns:
        The handle: `handle.remove()` ends the schedule, as `unpatch` does, and so does the end of its `with` block.

    Raises:
        TypeError: for AudioLDM and MusicLDM, whose prompt is one class embedding for the whole clip, for every other
            object, and for times and prompts of another type.
        ValueError: for no prompts, for a time that is not finite, not above 0 or there twice, and for a `fade` that is
            negative, not finite or longer than a part. At the call, before its first step: for a time beyond the clip,
            for a list of another length than the batch, and for `prompt_embeds` instead of a prompt.
        RuntimeError: at the call, if the method that encodes the prompt was replaced after this.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.schedule_prompts(pipe, {1.0: "a fast tabla rhythm"}, fade=0.5):
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (32000,)
    """
    times, texts = _checked_prompts(prompts)
    if isinstance(fade, bool) or not isinstance(fade, (int, float)):
        raise TypeError(f"fade must be a number of seconds, got {fade!r} ({type(fade).__name__})")
    shortest = min((after - before for before, after in itertools.pairwise(times)), default=math.inf)
    if not (0 <= fade < math.inf and fade <= shortest * (1 + 1e-9)):  # 0.3 - 0.1 is below 0.2
        raise ValueError(f"fade must be finite, at least 0 and at most {shortest:g} s, the shortest part, got {fade!r}")
    owner, geometry = owner_of_prompt(pipe), latent_geometry(pipe)
    if owner is None or geometry is None or geometry.mel_frame is None:
        raise TypeError(_unsupported_reason(pipe))
    schedule = Schedule(times, texts, float(fade), geometry, id(owner))
    return PromptSchedule(type(pipe).__name__, schedule, resolve(pipe).unet, owner)


def owner_of_prompt(pipe: Any) -> Any:
    """The object that encodes the prompt of a pipeline, whose UNet attends to it; None without one."""
    pipe = unwrapped(pipe)
    return next((x for x in (pipe, tango_model(pipe)) if any(callable(getattr(x, m, None)) for m in ENCODERS)), None)


def schedule_of(pipe: Any) -> str | None:
    """What is scheduled on a pipeline, in words; None where nothing is."""
    owner = owner_of_prompt(pipe)
    schedule = _schedule_on(owner)
    if schedule is None or not all(all_wrapped(x, "prompts") for x in (owner, *resolve(owner).unet.modules())):
        return None
    return str(schedule)


def _schedule_on(owner: Any) -> Schedule | None:
    """That is in force on what encodes a prompt, and on its UNet, which others may share and unpatch."""
    schedule: Schedule | None = current(owner, "prompts")
    return schedule if schedule is not None and schedule in settings_on(resolve(owner).unet, "prompts") else None


def _checked_prompts(prompts: Any) -> tuple[tuple[float, ...], tuple[Any, ...]]:
    """Times, ascending, and their prompts."""
    try:
        pairs = [(time, text) for time, text in (prompts.items() if isinstance(prompts, Mapping) else prompts)]
    except (TypeError, ValueError):
        raise TypeError(f"prompts must be a dict of seconds and prompts, or pairs of them, got {prompts!r}") from None
    for time, text in pairs:
        if isinstance(time, bool) or not isinstance(time, (int, float)):
            raise TypeError(f"times must be numbers of seconds, got {time!r} ({type(time).__name__})")
        of_batch = text if isinstance(text, (list, tuple)) else [text]
        if not (of_batch and all(isinstance(one, str) for one in of_batch)):
            raise TypeError(f"the prompt at {time:g} s must be a string, or a list of strings, got {text!r}")
        if not (math.isfinite(time) and time > 0):
            raise ValueError(f"times must be finite and above 0 s, where the call's own prompt begins, got {time!r}")
    times = sorted(float(time) for time, _ in pairs)
    if len(set(times)) < max(1, len(times)):
        raise ValueError(f"prompts must not be empty, and no two may begin at the same time, got {prompts!r}")
    texts = {float(time): text if isinstance(text, str) else list(text) for time, text in pairs}
    return tuple(times), tuple(texts[time] for time in times)


def _layers_of_prompts(unet: Any) -> list[tuple[Any, int]]:
    """Cross-attention to the prompt and group norms, and the levels of their grids."""
    to_itself = {layer.attn for layer in self_attention_layers(unet)}
    found: list[tuple[Any, int]] = [(unet.conv_norm_out, 0)] if isinstance(unet.conv_norm_out, nn.GroupNorm) else []
    for prefix, block, level in blocks(unet):
        for name, module in named_modules(block, prefix):
            # Mustango's second and third transformers attend to beats and to chords
            of_music = ".attentions2." in name or ".attentions3." in name
            attends = {"to_q", "to_k"} <= module._modules.keys() and module not in to_itself and not of_music
            if attends or isinstance(module, nn.GroupNorm):
                found.append((module, level))
    return found


def _unsupported_reason(pipe: Any) -> str:
    accepted = "schedule_prompts takes AudioLDM 2 pipelines of diffusers, and Tango, Tango 2 and Mustango objects"
    config = getattr(unwrapped(getattr(pipe, "unet", pipe)), "config", None)
    if getattr(config, "class_embed_type", None) is not None:
        return f"{type(pipe).__name__} has its prompt in a class embedding, one for the whole clip; {accepted}"
    return f"got {'None' if pipe is None else f'an object of type {type(pipe).__name__}'}; {accepted}"


@dataclasses.dataclass(eq=False)
class Schedule(Setting):
    """Arguments of one `schedule_prompts`. times: ascending. prompts: of these times. geometry, owner: of the model."""

    kind = "prompts"
    times: tuple[float, ...]
    prompts: tuple[str | list[str], ...]
    fade: float
    geometry: LatentGeometry
    owner: int

    def __str__(self) -> str:
        parts = (f"{text!r} from {time:g} s" for time, text in zip(self.times, self.prompts, strict=True))
        return f"{', '.join(parts)}, each fading in over {self.fade:g} s"

    def install(self, module: Any) -> None:
        """Wrap the layers of a UNet, or the methods of what encodes its prompt."""
        if hasattr(module, "down_blocks"):
            scope = vars(module).get("_litefocus_scope") or _Scope(module)
            vars(module)["_litefocus_scope"] = scope
            for part, level in _layers_of_prompts(module):
                kind = _Norm if isinstance(part, nn.GroupNorm) else _Attention
                wrap(part, "forward", functools.partial(kind, scope, level))
            return
        for method in (*BEGINNINGS, *ENCODERS):
            if callable(getattr(module, method, None)):
                wrap(module, method, _Beginning if method in BEGINNINGS else _Encoder)

    def uninstall(self, module: Any) -> None:
        """Unwrap them."""
        scope = vars(module).pop("_litefocus_scope", None)
        if scope is not None:
            scope.hook.remove()
        for part in module.modules() if scope is not None else (module,):
            unwrap(part, self.kind)

    def check_length(self, seconds: float) -> None:
        """Raise ValueError where a prompt begins after the end of a clip."""
        if self.times[-1] >= seconds:
            raise ValueError(
                f"a prompt is scheduled at {self.times[-1]:g} s, and the clip ends at {seconds:g} s; make it longer, "
                "or schedule its prompts earlier"
            )

    def weights(self, num_frames: int, frame: float) -> Any:
        """Of every prompt, the call's own first, in every frame: (prompts, num_frames) in float64, columns sum to 1."""
        seconds = (np.arange(num_frames) + 0.5) * frame
        begun = [(seconds - time) / self.fade if self.fade else seconds >= time for time in self.times]
        risen = [0.5 - 0.5 * np.cos(np.pi * np.clip(share, 0, 1)) for share in begun]
        return -np.diff([np.ones(num_frames), *risen, np.zeros(num_frames)], axis=0)


class PromptSchedule(Handle):
    """The handle that `schedule_prompts` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.schedule_prompts(pipe, {20: "a bell"})
    >>> handle
    <PromptSchedule of AudioLDM2Pipeline: 'a bell' from 20 s, each fading in over 2 s, in force>
    >>> handle.remove()
    """

    _name = "schedule_prompts"


class _Scope:
    """The key under which a thread keeps the encoding of a UNet's call.

    Layers refer to it instead of the UNet, and are copied with it, so that a copy of the UNet has one of its own.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.hook = unet.register_forward_pre_hook(self._begin, with_kwargs=True)

    @not_compiled
    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide from the shapes of its inputs whether a call brings the scheduled prompts.

        RuntimeError if it should and does not, or if the wrapper of a layer is gone.
        """
        encoding = _thread.encodings.get(self)
        if encoding is None:
            return
        caller = None if encoding.awaited is None else encoding.awaited()
        encoding.awaited = None
        encoding.active = bool(encoding.shapes) and encoding.shapes <= {_shape(x) for x in (*args, *kwargs.values())}
        context: Context | None = vars(unet).get("_litefocus_context")  # of its patch
        if context is not None:
            context.attend_near(encoding.active)
        if encoding.active and not all(all_wrapped(part, "prompts") for part in unet.modules()):
            raise RuntimeError(
                "prompts are scheduled, and something has put back the forward of a layer, as hooks do that are "
                "removed; schedule them again, after that"
            )
        if caller is not None and not encoding.active and _runs(caller):
            raise RuntimeError(
                "prompts are scheduled, and do not come with this call: a method that encodes its prompt "
                f"({', '.join(ENCODERS)}) was replaced, or what it returns was changed; schedule them again, after that"
            )


class _Encoding:
    """What a call's prompts were encoded to, in its thread.

    shapes: (tokens, width) of the joined contexts; none before they are encoded. awaited: the object whose call has
    begun and has not reached its UNet yet. active: whether the call that runs is that one, and not another's.
    """

    active = True

    def __init__(self, schedule: Schedule, joined: Iterable[Tensor], awaited: weakref.ref[Any] | None) -> None:
        self.schedule, self.awaited = schedule, awaited
        self.shapes = {tuple(x.shape[1:]) for x in joined}
        self._spans: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}

    def spans(self, num_frames: int, level: int, like: Tensor) -> list[tuple[int, int, Tensor]]:
        """Of each prompt, where its frames start and stop on a layer's grid, and its weights there, (frames, 1)."""
        if (num_frames, level) not in self._spans:
            frame = self.schedule.geometry.latent_frame * 2**level  # in seconds
            self.schedule.check_length(num_frames * frame)
            spans = []
            for weights in self.schedule.weights(num_frames, frame):
                start, stop = np.flatnonzero(weights)[[0, -1]] + [0, 1] if weights.any() else (0, 0)
                spans.append((int(start), int(stop), torch.from_numpy(weights[start:stop, None]).to(like)))
            self._spans[num_frames, level] = spans
        return self._spans[num_frames, level]


def _runs(owner: Any) -> bool:
    """Whether a method of `owner` is on the stack: a call that has failed awaits nothing any more."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_locals.get("self") is not owner:
        frame = frame.f_back
    return frame is not None


class _Thread(threading.local):
    """Of one thread: what its last call under a schedule has encoded, by UNet; `encodes`, whether it does so now."""

    encodes = False

    def __init__(self) -> None:
        self.encodings: weakref.WeakKeyDictionary[_Scope, _Encoding] = weakref.WeakKeyDictionary()


_thread = _Thread()


class _Wrapper(Wrapper):
    """Does something else while prompts are scheduled."""

    kind = Schedule.kind

    @property
    def schedule(self) -> Schedule | None:
        """In force, None if this wrapper does not act."""
        return _schedule_on(self.owner) if self.acts else None

    @property
    def scope(self) -> _Scope:
        """Of its UNet."""
        scope: _Scope = vars(resolve(self.owner).unet)["_litefocus_scope"]
        return scope


class _Beginning(_Wrapper):
    """Around a method that a call begins with: checks the length of the clip before anything is computed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        schedule = self.schedule
        if schedule is not None:
            given = inspect.signature(getattr(type(self.owner), self.method)).bind(self.owner, *args, **kwargs)
            seconds = given.arguments.get("audio_length_in_s")
            if seconds is None and (frames := drawn_frames(self.owner)) is not None:
                seconds = frames * schedule.geometry.latent_frame
            if seconds is not None:
                schedule.check_length(seconds)
            # before the method, which may come to the UNet
            _thread.encodings[self.scope] = _Encoding(schedule, (), weakref.ref(self.owner))
        return self.call(*args, **kwargs)


class _Encoder(_Wrapper):
    """Around a method that encodes a prompt: encodes the scheduled ones as well, and joins what it returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        schedule = None if _thread.encodes else self.schedule  # one of these methods may call another
        outer = vars(self.owner).get("encode_text_classifier_free")
        if schedule is None or (self.method == "encode_text" and not isinstance(outer, _Encoder)):
            return self.call(*args, **kwargs)  # a replaced encode_text_classifier_free would take them for one prompt
        own = args[0] if args else kwargs.pop("prompt", None)
        if own is None:
            raise ValueError(
                "prompts are scheduled, and this call brings prompt_embeds instead of a prompt; pass the prompt, which "
                "is encoded together with the scheduled ones"
            )
        scope = self.scope
        begun = _thread.encodings.pop(scope, None)
        awaited = None if begun is None else begun.awaited
        _thread.encodes = True
        try:
            prompts = [own, *(_like(prompt, own) for prompt in schedule.prompts)]
            encoded = [self.call(prompt, *args[1:], **kwargs) for prompt in prompts]
        finally:
            _thread.encodes = False
        joined = tuple(_joined(tensors) for tensors in zip(*encoded, strict=True))
        _thread.encodings[scope] = _Encoding(schedule, (x for x in joined if x.ndim == 3), awaited)
        return joined


def _like(prompt: str | list[str], own: str | list[str]) -> str | list[str]:
    """A scheduled prompt in the form of the call's own: a string, or as many in a list."""
    count = 1 if isinstance(own, str) else len(own)
    each = [prompt] * count if isinstance(prompt, str) else prompt
    if len(each) != count:
        raise ValueError(f"{len(each)} prompts are scheduled at once, {each!r}, and the call brings {count}")
    return each[0] if isinstance(own, str) else each


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Contexts (batch, tokens, width) or their masks (batch, tokens), one after the other, all of the longest's tokens.

    The zeros that fill up a mask hide those of its context. Contexts without one have as many tokens for each prompt.
    """
    longest = max(x.shape[1] for x in tensors)
    return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in tensors], dim=1)


def _shape(x: Any) -> tuple[int, ...]:
    """(tokens, width) of a context."""
    return tuple(x.shape[1:]) if isinstance(x, Tensor) else ()


class _Layer(Wrapper):
    """Around `forward` of a layer on a grid of frames, which runs once for every prompt."""

    kind = Schedule.kind

    def __init__(self, scope: _Scope, level: int, owner: Any, method: str) -> None:
        super().__init__(owner, method)
        self.scope, self.level = scope, level

    @property
    def encoding(self) -> _Encoding | None:
        """Of the call that runs."""
        encoding = _thread.encodings.get(self.scope) if self.acts else None
        return encoding if encoding is not None and encoding.active else None

    def blended(
        self, encoding: _Encoding, x: Tensor, dim: int, bins: int, run: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """Run `run(number, part)` on each prompt's frames of `x`, and cross-fade. A frame is `bins` long in `dim`."""
        parts: list[Tensor] = []
        end = 0
        spans = encoding.spans(x.shape[dim] // bins, self.level, x)
        for number, (start, stop, weight) in enumerate(spans):
            if start == stop:
                continue
            part = run(number, x.narrow(dim, start * bins, (stop - start) * bins))
            if (fade := (end - start) * bins) > 0:  # these frames belong to the prompt before, too
                before = parts.pop()
                kept, fading_out = torch.split(before, [before.shape[dim] - fade, fade], dim)
                fading_in, part = torch.split(part, [fade, part.shape[dim] - fade], dim)
                share = weight[: end - start].repeat_interleave(bins, dim=0).to(part)
                parts += [kept, torch.lerp(fading_out, fading_in, share)]
            parts.append(part)
            end = stop
        return torch.cat(parts, dim=dim)


class _Norm(_Layer):
    """Around a group norm over (batch, channels, frames, bins)."""

    @not_compiled
    def __call__(self, x: Tensor) -> Any:
        encoding = self.encoding
        if encoding is None or x.ndim != 4:
            return self.call(x)
        return self.blended(encoding, x, 2, 1, lambda _, part: self.call(part))


class _Attention(_Layer):
    """Around cross-attention. Calls with other contexts than those of the schedule pass unchanged."""

    @not_compiled
    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """hidden_states: (batch, frames * bins, channels). attention_mask: of the context, (batch, 1, tokens)."""
        encoding = self.encoding
        if encoding is None or encoder_hidden_states is None or _shape(encoder_hidden_states) not in encoding.shapes:
            return self.call(hidden_states, encoder_hidden_states, attention_mask, **others)
        bins = halved(encoding.schedule.geometry.freq_bins, self.level)
        if hidden_states.shape[1] % bins:
            raise ValueError(
                f"{hidden_states.shape[1]} tokens of a cross-attention layer are not a grid of {bins} frequency bins, "
                "so no time belongs to them; prompts cannot be scheduled where tokens are merged"
            )
        count = len(encoding.schedule.times) + 1
        contexts = encoder_hidden_states.chunk(count, dim=1)
        masks = [None] * count if attention_mask is None else attention_mask.chunk(count, dim=-1)

        def run(number: int, rows: Tensor) -> Any:
            return self.call(rows, contexts[number], masks[number], **others)

        return self.blended(encoding, hidden_states, 1, bins, run)
