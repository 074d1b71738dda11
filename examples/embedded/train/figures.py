"""Measure the exported pipeline: reconstruction errors, and what the judge hears in real and generated clips.

    python figures.py --samples DIR                 # everything; writes results.json
    python figures.py --only native --clips 36      # generated clips of native length alone

Generated clips go the whole road: prompt, denoiser, VAE, vocoder, waveform, log-mel, judge.
"""

import argparse
import json
import platform
import time
from pathlib import Path

HERE = Path(__file__).parent
LONG = 8  # long clips are this many times the native length


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=Path, help="folder with the flac files of sonic-pi-samples (for the real scenes)")
    add("--pipeline", type=Path, default=HERE.parent / "pipeline")
    add("--only", choices=("real", "native", "long"), help="one part; results.json keeps the rest")
    add("--clips", type=int, default=108, help="native-length clips (default: %(default)s)")
    add("--long-clips", type=int, default=12, help="8x clips (default: %(default)s)")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=5.0)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args(argv)
    if args.samples is None and args.only in (None, "real"):
        parser.error("the real scenes need --samples")
    return args


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

import diffusers
import numpy as np
import torch
import transformers
from data import CLASS_NAMES, TEMPO_NAMES, Bank, Wave, balanced, prompts, scenes
from diffusers import AudioLDM2Pipeline
from judge import window_probabilities
from mel import CLIP_SAMPLES, CLIP_SECONDS, log_mels
from tqdm import tqdm


def reconstruction(pipe: AudioLDM2Pipeline, waves: Wave) -> dict[str, float]:
    """Mean absolute log-mel error, in nats, of real scenes through the VAE, the vocoder, and both."""
    real = log_mels(waves)
    with torch.inference_mode():
        decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(m).latent_dist.mean).sample for m in real.split(8)])
        made, both = (torch.cat([pipe.vocoder(m[:, 0]) for m in mels.split(8)]) for mels in (real, decoded))
    return {
        "vae_l1": float((decoded - real).abs().mean()),
        "vocoder_l1": float((log_mels(made.numpy()) - real).abs().mean()),
        "vae_and_vocoder_l1": float((log_mels(both.numpy()) - real).abs().mean()),
    }


def score(waves: Wave, labels: list[tuple[str, str]]) -> dict[str, object]:
    """Share of 5.12 s windows (side by side) whose class and tempo the judge hears as labelled; errors per class."""
    class_right, tempo_right, mistakes = [], [], []
    for wave, (sound, tempo) in zip(waves, labels, strict=True):
        heard, pace = window_probabilities(wave, hop=CLIP_SAMPLES)
        for i, j in zip(heard.argmax(dim=1).tolist(), pace.argmax(dim=1).tolist(), strict=True):
            class_right.append(CLASS_NAMES[i] == sound)
            tempo_right.append(TEMPO_NAMES[j] == tempo)
            if not (class_right[-1] and tempo_right[-1]):
                mistakes.append(f"{tempo} {sound} heard as {TEMPO_NAMES[j]} {CLASS_NAMES[i]}")
    count = {text: mistakes.count(text) for text in sorted(set(mistakes), key=mistakes.count, reverse=True)}
    return {
        "windows": len(class_right),
        "class": float(np.mean(class_right)),
        "tempo": float(np.mean(tempo_right)),
        "mistakes": count,
    }


def generate(
    pipe: AudioLDM2Pipeline, count: int, times: int, args: argparse.Namespace, batch: int
) -> tuple[Wave, list[tuple[str, str]]]:
    """`count` clips of `times` the native length, class and tempo balanced, phrasings drawn from the grammar."""
    rng = np.random.default_rng(args.seed)
    labels = balanced(36)
    if count % 36:  # a tempo for every class, then the next
        labels = [(s, TEMPO_NAMES[(i + j) % 3]) for j in range(3) for i, s in enumerate(CLASS_NAMES)]
    labels = [labels[i % 36] for i in range(count)]
    texts = [str(rng.choice(prompts(*pair))) for pair in labels]
    clips = []
    for i in tqdm(range(0, count, batch), desc=f"{times} x {CLIP_SECONDS} s"):
        out = pipe(
            texts[i : i + batch],
            audio_length_in_s=times * CLIP_SECONDS,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(args.seed + i),
        )
        clips.append(np.asarray(out.audios, dtype=np.float32))
    return np.concatenate(clips), labels


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    pipe = AudioLDM2Pipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}

    if args.only in (None, "real"):
        bank = Bank(args.samples)
        unseen, labels = scenes(bank, 144, seed=990_001, split="held_out", on_grid=False)
        known, known_labels = scenes(bank, 144, seed=990_002, on_grid=False)
        results["reconstruction of held-out scenes"] = reconstruction(pipe, unseen)
        results["real, held-out recordings"] = score(unseen, labels)
        results["real, training recordings, unseen seeds"] = score(known, known_labels)
    for part, count, times, batch in (("native", args.clips, 1, 12), ("long", args.long_clips, LONG, 1)):
        if args.only in (None, part):
            begin = time.perf_counter()
            clips, labels = generate(pipe, count, times, args, batch)
            used = time.perf_counter() - begin
            entry = score(clips, labels) | {"clips": count, "steps": args.steps, "guidance": args.guidance}
            results[f"generated, {times} x {CLIP_SECONDS} s"] = entry | {"seconds_per_clip": used / count}
    results["measured"] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": "2-core x86-64 virtual machine, AVX2, no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    for name, entry in results.items():
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in entry.items()}
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
