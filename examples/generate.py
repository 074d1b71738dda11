"""Generate a clip with an AudioLDM-style pipeline and LiteFocus attention, and write it as a wav file.

python examples/generate.py                                     # 20 s from the embedded pipeline
python examples/generate.py "a slow drone" --at 30 "a slow bell" --seconds 60 --compare
python examples/generate.py "rain on a tin roof" --model cvssp/audioldm2 --steps 200 --offload    # a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

import _cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = _cli.Parser(__doc__, sound="clip.wav")
    parser.add_argument("prompt", nargs="?", default=_cli.PROMPT, help="what should sound (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--no-patch", action="store_true", help="dense attention, without litefocus")
    mode.add_argument("--compare", action="store_true", help="dense and patched: times, two clips and one png")
    parser.add_argument("--runs", type=int, help="of --compare, for its medians (default: 3)")
    parser.add_argument("--step-cache", type=int, metavar="N", help="deep layers at one of N steps, by DeepCache")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import torch

    import litefocus


def load(args: argparse.Namespace) -> tuple[Any, litefocus.Patch]:
    """The pipeline that the completed options ask for, decoding in tiles and patched, and the patch."""
    pipe = _cli.load_pipeline(args.model, args.device, args.dtype, args.offload)
    if args.tile_decoding:
        litefocus.tile_decoding(pipe)
    return pipe, litefocus.patch(pipe, args.config)


def generate(pipe: Any, settings: dict[str, Any], **options: Any) -> tuple[Any, float]:
    """Samples of one clip, and the seconds that it took. `options` are of the pipeline's call."""
    started = time.perf_counter()
    if settings["guidance"] is not None:
        options["guidance_scale"] = settings["guidance"]
    audio = pipe(
        settings["prompt"],
        audio_length_in_s=settings["seconds"],
        num_inference_steps=settings["steps"],
        generator=torch.Generator("cpu").manual_seed(settings["seed"]),
        **options,
    ).audios[0]
    return audio.astype("float32"), time.perf_counter() - started


def compare(pipe: Any, config: litefocus.LiteFocusConfig, settings: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Clips and seconds of dense attention and of LiteFocus, turn by turn, `settings["runs"]` times each."""
    clips, took = {}, {"dense": [], "litefocus": []}
    for run in range(1, (runs := settings["runs"] or 3) + 1):
        for name in took:
            with litefocus.patch(pipe, config) if name == "litefocus" else contextlib.nullcontext():
                pipe.set_progress_bar_config(desc=f"{name}, warming up", leave=False)
                generate(pipe, {**settings, "steps": 1})  # warm: focus sets, kernels and memory are there
                pipe.set_progress_bar_config(desc=f"{name} {run} of {runs}")
                clips[name], seconds = generate(pipe, settings)
                took[name].append(seconds)
    return clips, took


def main(argv: list[str] | None = None) -> None:
    """Generate, write and say what it took."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        pipe, patch = load(args)
        if args.step_cache:
            _cli.cache_steps(pipe, args.step_cache)
        if args.at:
            litefocus.schedule_prompts(pipe, args.at, fade=args.fade)
        bound = litefocus.status(pipe, seconds=args.seconds).flops.ratio
    _cli.note_unknown_words(pipe, args.prompt, *(prompt for _, prompt in args.at))
    if args.no_patch or args.compare:
        patch.remove()
    if args.compare:
        clips, took = compare(pipe, args.config, vars(args))
    else:
        name = "dense" if args.no_patch else "litefocus"
        clip, seconds = generate(pipe, vars(args))
        clips, took = {name: clip}, {name: [seconds]}
    _cli.write(clips, took, pipe.vocoder.config.sampling_rate, bound, args)


if __name__ == "__main__":
    with _cli.interruptible():
        main()
