"""A web page that generates clips of up to ten minutes: python examples/app.py [--model cvssp/audioldm2]."""

import argparse
import threading
from typing import Any

import _cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    return _cli.Parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import generate
    import gradio as gr
    import numpy as np


def page(pipe: Any, settings: dict[str, Any]) -> gr.Blocks:
    """The page. `pipe` was patched once, at the start: its attention is fit for every length and every thread."""
    steps, cancelled = settings["steps"], set()  # cancelled: sessions

    def make(prompt: str, seconds: float, seed: int, request: gr.Request, bar=gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        def after(step: int, *_: Any) -> None:
            if request.session_hash in cancelled:
                raise gr.Error("cancelled", print_exception=False)
            bar((step + 1, steps), desc="decoding" if step + 1 == steps else "denoising", unit="steps")

        after(-1)
        _cli.check(wanted := {**settings, "prompt": prompt, "seconds": seconds, "seed": seed})
        clip, took = generate.generate(pipe, wanted, callback=after)
        rate, samples = pipe.vocoder.config.sampling_rate, (clip.clip(-1, 1) * 32767).astype(np.int16)
        return (rate, samples), _cli.spectrograms({prompt: clip}, rate), f"{took:.1f} s, {_cli.peak_memory()}"

    def forget(request: gr.Request) -> None:
        cancelled.discard(request.session_hash)

    def stop(request: gr.Request) -> None:
        cancelled.add(request.session_hash)

    with gr.Blocks(title="litefocus", analytics_enabled=False) as blocks:
        prompt = gr.Textbox(_cli.PROMPT, label="prompt")
        seconds = gr.Slider(1, 600, settings["seconds"], step=1, label="seconds")
        seed = gr.Number(settings["seed"], label="seed", precision=0)
        with gr.Row():
            go, cancel = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
        made = [gr.Audio(label="clip", interactive=False), gr.Plot(label="spectrogram"), gr.Textbox(label="took")]
        # Gradio makes one clip at a time, as it must: the scheduler of a pipeline has a state. The others wait.
        go.click(forget, queue=False).then(make, [prompt, seconds, seed], made, show_progress_on=made[0])
        cancel.click(stop, queue=False)
    return blocks


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        page(generate.load(args)[0], vars(args)).launch(prevent_thread_lock=True, show_error=True)
    threading.Event().wait()


if __name__ == "__main__":
    with _cli.interruptible():
        main()
