"""A web page that generates clips of up to ten minutes: python examples/app.py [--model cvssp/audioldm2]."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, wait
from html import escape
from typing import Any

import _cli

PROMPTS = ("a fast tabla rhythm", "a slow drone", "a medium breakbeat", "a slow bell", "a fast robot voice")
LATER = "one a line, after the seconds at which it begins:\n10: a slow drone\n15: a slow bell"
ABOUT = (
    "Describe a sound, and get a clip of up to ten minutes. The longer it is, the more is gained over dense attention."
)
SMALL = f" The model that runs here is small: it knows {', '.join(_cli.SOUNDS)}, each slow, medium or fast."
STYLE = """.bar {background: var(--border-color-primary); border-radius: 4px; margin: 6px 0}
.bar div {background: var(--color-accent); border-radius: 4px; height: 8px; transition: width .2s}
.prompt {font-size: 1.3em; font-weight: bold; overflow-wrap: anywhere}"""

ENDING = threading.Event()  # when set, clips that are being made end


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = _cli.Parser(__doc__)
    parser.add_argument("--port", type=int, default=7860, help="of this machine to serve on (default: %(default)s)")
    parser.add_argument("--share", action="store_true", help="a public address as well, through gradio's servers")
    args = parser.parse_args(argv)
    with _cli.refusing(), socket.socket() as probe:
        if not 1 <= args.port <= 65535:
            raise ValueError(f"port must be between 1 and 65535, got {args.port}")
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", args.port))
        except OSError as error:
            raise ValueError(f"cannot serve on port {args.port}: {error.strerror}") from error
    return args


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import generate
    import gradio as gr
    import numpy as np
    import psutil
    import torch

    import litefocus


class Cancelled(Exception):
    """Nobody waits for the clip any more."""


def page(pipe: Any, args: argparse.Namespace) -> gr.Blocks:
    """The page. `pipe` was patched once, at the start: its attention is fit for every length and every thread."""
    alone = threading.Lock()  # one clip at a time, as it must be: the scheduler of a pipeline has a state
    rate = pipe.vocoder.config.sampling_rate
    pipe.set_progress_bar_config(disable=True)

    def work(settings: dict[str, Any], steps: list[int], stop: threading.Event, job: Future[Any]) -> None:
        """A clip and its seconds into `job`, a number after every step into `steps`; ends soon after `stop` is set."""

        def look(*_: Any) -> None:
            if stop.is_set() or ENDING.is_set():
                raise Cancelled

        try:
            with alone, contextlib.ExitStack() as hooks:
                for part in (pipe.unet, pipe.vae.decoder, pipe.vocoder):
                    for module in part.modules():  # a step of ten minutes of sound takes long
                        hooks.enter_context(module.register_forward_pre_hook(look))
                look()
                if settings["later"]:
                    hooks.enter_context(litefocus.schedule_prompts(pipe, settings["later"]))
                _cli.forget_peak()
                job.set_running_or_notify_cancel()
                job.set_result(generate.generate(pipe, settings, callback=lambda step, *_: steps.append(step)))
        except Exception as error:
            job.set_exception(error)

    def make(*values: Any) -> Iterator[dict[Any, Any]]:
        """What changes on the page. Gradio closes it when the clip is cancelled, or its tab is closed."""
        settings = dict(zip(("prompt", "seconds", "later", "steps", "guidance", "seed"), values, strict=True))
        prompt, nothing = settings["prompt"], {result: gr.Column(visible=False), audio: None, plot: None, figures: ""}
        try:
            _cli.check(settings)
            lines = [line.partition(":") for line in settings["later"].splitlines() if line.strip()]
            settings["later"] = _cli.check_later([(time, text.strip()) for time, _, text in lines], settings["seconds"])
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            yield {**nothing, state: f"⚠️ {escape(str(error))}"}
            return
        unknown = escape(", ".join(_cli.unknown_words(pipe, prompt, *(text for _, text in settings["later"]))))
        note = f"<p>ℹ️ This model does not know: <b>{unknown}</b></p>" if unknown else ""
        steps: list[int] = []
        peak, stop, job = 0, threading.Event(), Future[Any]()
        try:
            threading.Thread(target=work, args=(settings, steps, stop, job), name="clip").start()
            yield {**nothing, state: f"<b>{escape(prompt)}</b>: starting{note}"}
            while not job.done() or not peak:
                wait([job], timeout=0.1)
                if job.running() or job.done():  # else the clip before has not ended
                    peak = max(peak, psutil.Process().memory_info().rss)
                done, of = len(steps), settings["steps"]
                doing = f"step {done} of {of}" if done < of else "decoding"
                bar = f'<div class="bar"><div style="width: {100 * done / of:.0f}%"></div></div>'
                yield {state: f"<b>{escape(prompt)}</b>: {doing}{bar}{note}"}
            clip, took = job.result()
            picture = _cli.spectrograms({"": clip}, rate, size=(6, 2.6))
        except GeneratorExit:
            stop.set()
            print(f"{prompt}: cancelled")
            raise
        except Exception as error:
            traceback.print_exc()
            yield {**nothing, state: f"⚠️ {escape(_cli.first_line(error))}"}
            return
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        told = f"{len(clip) / rate:g} s of sound took {took:.1f} s, at most {peak / 2**30:.2f} GiB of memory"
        print(f"{prompt}: {told}")
        yield {
            state: note,
            result: gr.Column(visible=True),
            figures: f'<div class="prompt">{escape(prompt)}</div>{told}',
            audio: (rate, (clip.clip(-1, 1) * 32767).astype(np.int16)),
            plot: picture,
        }

    with gr.Blocks(title="LiteFocus: long clips of sound from text", analytics_enabled=False) as blocks:
        gr.Markdown(f"# LiteFocus\n\n{ABOUT}{SMALL if args.model == str(_cli.EMBEDDED) else ''}")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(_cli.PROMPT, label="prompt", placeholder="what should sound")
                gr.Examples([[text] for text in PROMPTS], prompt, label="for example")
                seconds = gr.Slider(min(1, args.seconds), max(600, args.seconds), args.seconds, step=1, label="seconds")
                with gr.Accordion("prompts over time", open=False):
                    later = gr.Textbox("", label="later prompts", placeholder=LATER, lines=3)
                with gr.Accordion("advanced", open=False), gr.Row():
                    steps = gr.Number(args.steps, label="steps", precision=0, min_width=90)
                    guidance = gr.Number(args.guidance, label="guidance", min_width=90)
                    seed = gr.Number(args.seed, label="seed", precision=0, min_width=90)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=120)
                    cancel = gr.Button("Cancel", min_width=120)
                state = gr.HTML(min_height=60)
            with gr.Column(scale=3):
                figures = gr.HTML("Your clip will be here.")
                with gr.Column(visible=False) as result:
                    audio = gr.Audio(label="clip", interactive=False, buttons=["download"])
                    plot = gr.Plot(show_label=False, container=False)
        wanted, changed = [prompt, seconds, later, steps, guidance, seed], [state, result, figures, audio, plot]
        events = gr.on([go.click, prompt.submit], make, wanted, changed, show_progress_on=state)
        cancel.click(None, cancels=events)  # after which `events` has failed; an error is shown by `make` itself
        events.failure(lambda: "Cancelled.", None, state, queue=False, show_progress="hidden")
    return blocks


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        options = {"server_port": args.port, "share": args.share, "css": STYLE, "footer_links": []}
        page(generate.load(args)[0], args).launch(prevent_thread_lock=True, show_error=True, **options)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        ENDING.set()
        for thread in threading.enumerate():
            if thread.name == "clip":
                thread.join(60)
        print("\ninterrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # threads of the page's server may abort a usual exit


if __name__ == "__main__":
    with _cli.interruptible():
        main()
