"""Train the embedded AudioLDM 2 pipeline from recordings to a folder that `from_pretrained` loads.

    python train.py vae --samples DIR            # log-mel autoencoder
    python train.py vocoder --samples DIR        # log-mel to waveform
    python train.py classifier --samples DIR     # the judge: class and tempo of a waveform
    python train.py embedder --samples DIR       # embeddings for Fréchet distances, from other recordings
    python train.py unet --samples DIR           # the denoiser, on latents of the trained VAE
    python train.py export                       # pipeline/ and classifier.safetensors, fp16
    python figures.py --samples DIR              # the figures of ../README.md, results.json

DIR holds the flac files of Debian's sonic-pi-samples. Every training stage stops after `--minutes`, writes a
checkpoint to `--work` once a minute and goes on from it when started again. The learning rate follows the
time used, so a slower machine ends with fewer steps, not with an unfinished schedule.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
STAGES = ("vae", "vocoder", "classifier", "embedder", "unet", "export")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--samples", type=Path, help="folder with the flac files of sonic-pi-samples")
    add("--work", type=Path, default="work", help="folder for checkpoints (default: %(default)s)")
    add("--minutes", type=float, help="training time (default: what the shipped weights had)")
    add("--scenes", type=int, default=1440, help="training scenes of the UNet (default: %(default)s)")
    add("--output", type=Path, default=HERE.parent / "pipeline", help="export: folder (default: %(default)s)")
    add("--name", default="unet", help="unet, export: name of the checkpoint (default: %(default)s)")
    add("--seed", type=int, default=4, help="unet: seed of the first weights (default: %(default)s)")
    add("--widths", type=int, nargs="+", default=(32, 48, 64, 96), help="unet, export: channels of every level")
    share = "unet: share of the time on half-length clips (default: %(default)s)"
    add("--half-length", type=float, default=0.75, help=share)
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.samples is None and args.stage != "export":
        parser.error("this stage needs --samples: the folder with the flac files of sonic-pi-samples")
    return args


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist
from data import ASIDES, CLASS_NAMES, GRID, STRANGERS, TEMPO_NAMES, Bank, balanced, prompts, scenes, stranger
from diffusers import AudioLDM2Pipeline, AutoencoderKL
from judge import Embedder, Judge
from mel import CLIP_SECONDS, HOP, LOG_FLOOR, N_MELS, LogMel, log_mels
from models import new_pipeline, new_unet, new_vae, new_vocoder
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------------- training loop


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[float], dict[str, Tensor]],
    args: argparse.Namespace,
    *,
    peak_rate: float,
    minutes: float,
    ema_decay: float = 0.998,
) -> nn.Module:
    """Train `model` for `minutes` of wall time and return its exponential moving average.

    `loss_of(progress)` gets the share of the time used and returns named terms; "loss" is minimised.
    """
    work = args.work
    checkpoint = work / f"{name}.pt"
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    step, used = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, used = state["step"], state["used"]

    def save() -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "used": used}
        state["optimiser"] = optimiser.state_dict()
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    budget = 60.0 * minutes
    workers = dist.get_world_size() if dist.is_initialized() else 1
    chief = workers == 1 or dist.get_rank() == 0

    def share(used: float) -> float:
        """Average the workers' weights; return the longest time used, so that all stop at the same step."""
        clock = torch.tensor(used)
        dist.all_reduce(clock, dist.ReduceOp.MAX)
        for weight in model.parameters():
            dist.all_reduce(weight.data)
            weight.data /= workers
        return float(clock)

    bar = tqdm(disable=not chief, total=round(budget), desc=name, unit="s", mininterval=10)
    bar.update(min(round(used), round(budget)))
    shown: dict[str, float] = {}
    saved = logged = used
    elapsed = 0.0
    while used < budget:
        begin = time.monotonic()
        warm = min(1.0, (step + 1) / 200)
        rate = peak_rate * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * used / budget)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        terms = loss_of(used / budget)
        optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        step += 1
        for key, value in terms.items():
            shown[key] = 0.98 * shown.get(key, value.item()) + 0.02 * value.item()
        elapsed += time.monotonic() - begin
        if workers == 1:
            used, elapsed = used + elapsed, 0.0
        elif step % 20 == 0:
            used, elapsed = share(used + elapsed), 0.0
        if chief and used - saved > 60.0:
            save()
            saved = used
        if used - logged > 10.0:
            bar.set_postfix(step=step, **{k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
            bar.update(min(round(used), round(budget)) - bar.n)
            logged = used
    bar.close()
    if chief:
        save()
    return average


def crops(stack: Tensor, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Random windows of `length` frames along axis 2 of (scene, channel, frame, bin), with their places."""
    rng = np.random.default_rng(seed)
    while True:
        places = [(int(rng.integers(len(stack))), int(rng.integers(stack.shape[2] - length + 1))) for _ in range(batch)]
        yield torch.stack([stack[i, :, t : t + length] for i, t in places]), places


# ------------------------------------------------------------------------------------------------------- VAE


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    waves, _ = scenes(Bank(args.samples), 1440, seed=11, on_grid=lambda i: i % 3 > 0)
    mels = log_mels(waves)
    vae = new_vae()
    batches = crops(mels, 64, 4, seed=int(time.time()))

    def loss_of(progress: float) -> dict[str, Tensor]:
        mel, _ = next(batches)
        noise = torch.randn(len(mel), 8, mel.shape[2] // 4, N_MELS // 4)
        out, kl = _vae_pass(vae, mel, noise)
        error = out - mel
        l1 = error.abs().mean()
        return {"loss": l1 + 0.1 * error.square().mean() + 1e-3 * kl, "l1": l1.detach(), "kl": kl.detach()}

    average = fit("vae", vae, loss_of, args, peak_rate=1.5e-3, minutes=args.minutes or 13.0)
    with torch.inference_mode():
        latents = torch.cat([average.encode(mels[i : i + 8]).latent_dist.mean for i in range(0, 360, 8)])
    average.register_to_config(scaling_factor=1.0 / float(latents.std()))
    average.save_pretrained(args.work / "vae")
    print(f"latent std {latents.std():.3f}, mean {latents.mean():.3f}")


def _vae_pass(vae: AutoencoderKL, mel: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    moments = vae.quant_conv(vae.encoder(mel))
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    latent = mean + noise * (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return vae.decoder(vae.post_quant_conv(latent)), kl


# --------------------------------------------------------------------------------------------------- vocoder


class SpectralLoss(nn.Module):
    """Distance of two waveforms (batch, samples): log-mel L1 and, at three resolutions, magnitude and log-magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.mel = LogMel()
        self.sizes = (256, 512, 2048)
        for size in self.sizes:
            self.register_buffer(f"window_{size}", torch.hann_window(size))

    def forward(self, made: Tensor, real: Tensor) -> dict[str, Tensor]:
        mel = (self.mel(made) - self.mel(real)).abs().mean()
        fine = torch.zeros(())
        for size in self.sizes:
            window = getattr(self, f"window_{size}")
            a, b = (self._magnitude(wave, size, window) for wave in (made, real))
            norm = window.sum()
            log = ((a / norm).clamp(min=LOG_FLOOR).log() - (b / norm).clamp(min=LOG_FLOOR).log()).abs().mean()
            fine = fine + log + (a - b).abs().sum() / b.sum().clamp(min=1e-3)
        return {"loss": mel + 0.3 * fine / len(self.sizes), "mel": mel.detach(), "fine": fine.detach()}

    @staticmethod
    def _magnitude(wave: Tensor, size: int, window: Tensor) -> Tensor:
        spectrum = torch.stft(wave, size, size // 4, window=window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def train_vocoder(args: argparse.Namespace) -> None:
    torch.manual_seed(2)
    waves, _ = scenes(Bank(args.samples), 1440, seed=22, on_grid=lambda i: i % 3 > 0)
    mels = log_mels(waves)
    sound = torch.from_numpy(waves)
    vocoder = new_vocoder()
    frames = 48
    batches = crops(mels, frames, 8, seed=int(time.time()))
    distance = SpectralLoss()

    def loss_of(progress: float) -> dict[str, Tensor]:
        mel, places = next(batches)
        real = torch.stack([sound[i, HOP * t : HOP * (t + frames)] for i, t in places])
        return distance(vocoder(mel[:, 0]), real)

    fit("vocoder", vocoder, loss_of, args, peak_rate=1.5e-3, minutes=args.minutes or 52.0)


# ------------------------------------------------------------------------------------------------ classifier


def train_classifier(args: argparse.Namespace) -> None:
    torch.manual_seed(3)
    waves, labels = scenes(Bank(args.samples), 2160, seed=33, on_grid=False)
    sounds = torch.tensor([CLASS_NAMES.index(s) for s, _ in labels])
    tempi = torch.tensor([TEMPO_NAMES.index(t) for _, t in labels])
    judge = Judge(len(CLASS_NAMES), len(TEMPO_NAMES))
    train_judge(judge, "classifier", log_mels(waves), sounds, tempi, args)


def train_embedder(args: argparse.Namespace) -> None:
    torch.manual_seed(5)
    bank, rng = Bank(args.samples), np.random.default_rng(55)
    pairs = [(i, j) for i in range(len(STRANGERS)) for j in range(len(TEMPO_NAMES))] * 10
    waves = np.stack([stranger(bank, STRANGERS[i], TEMPO_NAMES[j], rng) for i, j in pairs])
    sounds, tempi = torch.tensor(pairs).unbind(1)
    embedder = Embedder(len(STRANGERS), len(TEMPO_NAMES))
    train_judge(embedder, "embedder", log_mels(waves), sounds, tempi, args)


def train_judge(judge: Judge, name: str, mels: Tensor, sounds: Tensor, tempi: Tensor, args: argparse.Namespace) -> None:
    """Teach `judge` to tell sounds and tempi of mels (scenes, 1, frames, bins), changed in pitch, colour and noise."""
    rng = np.random.default_rng(int(time.time()))
    entropy = nn.functional.cross_entropy

    def loss_of(progress: float) -> dict[str, Tensor]:
        index = torch.from_numpy(rng.integers(len(mels), size=32))
        mel = mels[index].roll(int(rng.integers(-2, 3)), dims=3)
        tilt = torch.randn(32, 1, 1, 1) * torch.linspace(-0.5, 0.5, N_MELS)
        floor = -11.5 + 5.0 * torch.rand(32, 1, 1, 1)  # a vocoder's silence is not digital silence
        mel = torch.logaddexp(mel + tilt + 0.5 * torch.randn(32, 1, 1, 1), floor) + 0.2 * torch.randn_like(mel)
        sound_logits, tempo_logits = judge(mel)
        terms = {
            "class": entropy(sound_logits, sounds[index], label_smoothing=0.05),
            "tempo": entropy(tempo_logits, tempi[index], label_smoothing=0.05),
        }
        return {"loss": terms["class"] + terms["tempo"], **{k: v.detach() for k, v in terms.items()}}

    average = fit(name, judge, loss_of, args, peak_rate=2e-3, minutes=args.minutes or 5.0, ema_decay=0.99)
    for key, buffer in judge.named_buffers():  # the running statistics of batch norm are not averaged by `fit`
        average.get_buffer(key).copy_(buffer)
    torch.save(average.state_dict(), args.work / f"{name}_average.pt")


# ------------------------------------------------------------------------------------------------------ UNet


def latents_of(args: argparse.Namespace, vae: AutoencoderKL, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Scaled latents (count, 8, 256, 16) of 10.24 s training scenes on the beat grid; kept in --work by the hundred."""
    bank, parts, labels = Bank(args.samples), [], []
    per_part = 360
    for part in tqdm(range(count // per_part), desc="latents"):
        file = args.work / f"latents_{part}.pt"
        if not file.exists():
            waves, _ = scenes(bank, per_part, seed=1000 + part, seconds=2 * CLIP_SECONDS)
            mels = log_mels(waves)
            with torch.inference_mode():
                codes = torch.cat([vae.encode(m).latent_dist.mean for m in mels.split(4)])
            torch.save((codes * vae.config.scaling_factor).half(), file)
        parts.append(torch.load(file, weights_only=True))
        labels += balanced(per_part)
    return torch.cat(parts), labels


@dataclass
class Conditions:
    """What the UNet's cross-attention sees, for every training prompt; row 0 is the empty prompt.

    t5: (prompts, words, T5_DIM), mask: (prompts, words), gpt: (prompts, GPT_TOKENS, GPT_DIM).
    """

    t5: Tensor
    mask: Tensor
    gpt: Tensor
    rows: dict[tuple[str, str], list[int]]

    @classmethod
    def encode(cls, pipe: AudioLDM2Pipeline) -> "Conditions":
        """Encode the whole grammar with the pipeline's own code."""
        texts, rows = [""], {}
        rng = np.random.default_rng(3)
        for pair in balanced(36):
            plain = prompts(*pair)
            asides = [p + ASIDES[int(rng.integers(1, len(ASIDES)))] for p in plain[::2]]
            rows[pair] = list(range(len(texts), len(texts) + len(plain) + len(asides)))
            texts += plain + asides
        parts = []
        with torch.inference_mode():
            for i in range(0, len(texts), 64):
                parts.append(pipe.encode_prompt(texts[i : i + 64], "cpu", 1, False))
        words = max(part[0].shape[1] for part in parts)
        pad = nn.functional.pad
        t5 = torch.cat([pad(part[0], (0, 0, 0, words - part[0].shape[1])) for part in parts])
        mask = torch.cat([pad(part[1], (0, words - part[1].shape[1])) for part in parts])
        return cls(t5.clone(), mask.clone(), torch.cat([part[2] for part in parts]).clone(), rows)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        """The UNet's keyword arguments for these prompts."""
        words = int(self.mask[index].sum(dim=1).max())
        return {
            "encoder_hidden_states": self.gpt[index],
            "encoder_hidden_states_1": self.t5[index, :words],
            "encoder_attention_mask_1": self.mask[index, :words],
        }


def train_unet(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    work = args.work
    vae = AutoencoderKL.from_pretrained(work / "vae")
    latents, labels = latents_of(args, vae, args.scenes)
    unet = new_unet(args.widths)
    pipe = new_pipeline(vae, new_vocoder(), unet)
    conditions = Conditions.encode(pipe)
    kept = pipe.scheduler.alphas_cumprod
    rng = np.random.default_rng([int(time.time()), os.getpid()])
    torch.manual_seed(int(rng.integers(2**31)))
    unet.train()

    def loss_of(progress: float) -> dict[str, Tensor]:
        # Half-length clips first: the same sounds and beats at half the cost. Whole clips for the last quarter.
        frames, size = (64, 8) if progress < args.half_length else (128, 5)
        chosen = rng.integers(len(latents), size=size)
        starts = GRID * rng.integers((latents.shape[2] - frames) // GRID + 1, size=size)
        clean = torch.stack([latents[i, :, t : t + frames] for i, t in zip(chosen, starts, strict=True)]).float()
        rows = [int(rng.choice(conditions.rows[labels[i]])) if rng.random() > 0.1 else 0 for i in chosen]
        steps = torch.from_numpy((np.arange(size) + rng.random(size)) / size * 1000).long().clamp(max=999)
        signal, noise_level = (x[steps].sqrt()[:, None, None, None] for x in (kept, 1.0 - kept))
        noise = torch.randn_like(clean)
        v = unet(signal * clean + noise_level * noise, steps, **conditions.batch(rows)).sample
        error = (v - (signal * noise - noise_level * clean)).square().mean(dim=(1, 2, 3))
        return {"loss": error.mean(), "noisy": error[3 * size // 4 :].mean().detach()}

    fit(args.name, unet, loss_of, args, peak_rate=1e-3, minutes=args.minutes or 112.0, ema_decay=0.998)


# ---------------------------------------------------------------------------------------------------- export


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of all stages as fp16 safetensors; works on unfinished checkpoints too."""
    work = args.work

    def averaged(name: str) -> dict[str, Tensor]:
        return torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)["average"]

    vae, vocoder, unet = AutoencoderKL.from_pretrained(work / "vae"), new_vocoder(), new_unet(args.widths)
    vocoder.load_state_dict(averaged("vocoder"))
    unet.load_state_dict(averaged(args.name))
    folder = args.output
    pipe = new_pipeline(vae, vocoder, unet).to(torch.float16)  # before the folder that its parts come from is removed
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    for file in (index, *folder.glob("*/config.json")):  # fp16 on disk, float32 in memory unless asked otherwise
        config = json.loads(file.read_text())
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in ("dtype", "torch_dtype", "_name_or_path"):
                part.pop(key, None)
        if "architectures" in config:  # a transformers model; both names, for transformers 4 and 5
            config |= {"dtype": "float32", "torch_dtype": "float32"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers 5 has one class per tokenizer; 4 needs the fast one's name
    for name in ("RobertaTokenizer", "T5Tokenizer"):
        index.write_text(index.read_text().replace(f'"{name}"', f'"{name}Fast"'))
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())  # transformers 4 wants a mapping where 5 writes a list
        for key in ("extra_special_tokens", "backend", "is_local", "local_files_only"):
            config.pop(key, None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    names = json.dumps({"classes": CLASS_NAMES, "tempi": TEMPO_NAMES})
    for name in ("classifier", "embedder"):
        if not (work / f"{name}_average.pt").exists():
            continue
        state = torch.load(work / f"{name}_average.pt", weights_only=True)
        half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        save_file(half, HERE / f"{name}.safetensors", metadata={"names": names})
    print(f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB in {folder}")


# ------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    """Run one stage."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # started by torchrun: each worker trains on its own, weights are averaged now and then
        dist.init_process_group("gloo")
    stages = (train_vae, train_vocoder, train_classifier, train_embedder, train_unet, export)
    dict(zip(STAGES, stages, strict=True))[args.stage](args)


if __name__ == "__main__":
    main()
