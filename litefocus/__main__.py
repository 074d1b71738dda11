"""`python -m litefocus`: versions, devices and supported pipelines, for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform

import diffusers
import torch

import litefocus

PIPELINES = ("AudioLDMPipeline", "AudioLDM2Pipeline", "MusicLDMPipeline")


def main() -> None:
    """Print the report."""
    print(f"litefocus {litefocus.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(gpus) or 'no GPU'}, CPU with {torch.get_num_threads()} threads")
    for name in PIPELINES:
        print(f"diffusers.{name}: {'supported' if hasattr(diffusers, name) else 'not in this diffusers'}")
    print("Tango, Mustango, ConsistencyTTA, the authors' audioldm and audioldm2: supported, see README.md")


if __name__ == "__main__":
    main()
