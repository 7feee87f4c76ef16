"""Train the bundled demo denoiser: an unconditional DDIM pipeline on Fashion-MNIST, 28x28 grey images.

    python examples/train_demo_denoiser.py --data fashion_mnist.npz --out build/demo_denoiser

``--data`` is an npz with ``x_train`` [60000, 28, 28] uint8 (Fashion-MNIST, MIT licence, as packed by Keras). The run
is seeded and resumable: every batch is a function of (seed, step), and ``--state`` keeps weights, moving average and
Adam moments as safetensors. Ctrl-C loses at most ``--save-every`` steps; the same command goes on from there.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm


def build() -> DDIMPipeline:
    """The untrained pipeline: skip concatenations, attention at 14x14 and 7x7, 2.3 million weights."""
    unet = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True))


def load_images(path: Path) -> Tensor:
    """[N, 1, 28, 28] float32 in [-1, 1]."""
    with np.load(path) as data:
        return torch.from_numpy(data["x_train"]).float().div_(127.5).sub_(1).unsqueeze(1)


def batch(images: Tensor, scheduler: DDIMScheduler, size: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, timesteps and noise of one step: a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = images[torch.randint(len(images), (size,), generator=generator)]
    flip = torch.rand(size, 1, 1, 1, generator=generator) < 0.5
    chosen = torch.where(flip, chosen.flip(-1), chosen)
    noise = torch.randn(chosen.shape, generator=generator)
    timestep = torch.randint(1000, (size,), generator=generator)
    return scheduler.add_noise(chosen, noise, timestep), timestep, noise


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_state(
    folder: Path, step: int, weights: dict[str, Tensor], average: dict[str, Tensor], adam: torch.optim.Adam
) -> None:
    """Write one file under a temporary name, then rename it: a kill leaves the last whole state."""
    moments = {
        f"{kind}.{name}": adam.state[parameter][kind]
        for name, parameter in zip(average, adam.param_groups[0]["params"], strict=True)
        for kind in ("exp_avg", "exp_avg_sq")
    }
    tensors = (
        {f"weight.{k}": v for k, v in weights.items()} | {f"average.{k}": v for k, v in average.items()} | moments
    )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "state.safetensors.partial"
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    os.replace(partial, folder / "state.safetensors")


def load_state(folder: Path, unet: UNet2DModel, average: dict[str, Tensor], adam: torch.optim.Adam) -> int:
    """Put a saved state back; returns the step to go on from (0 without a state)."""
    file = folder / "state.safetensors"
    if not file.exists():
        return 0
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        step = int(opened.metadata()["step"])
    state = load_file(file)
    unet.load_state_dict({k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")})
    for name, parameter in unet.named_parameters():
        average[name].copy_(state[f"average.{name}"])
        adam.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device),
        }
    return step


def save_pipeline(pipe: DDIMPipeline, average: dict[str, Tensor], out: Path) -> None:
    """The moving average as an fp16 diffusers folder."""
    pipe.unet.load_state_dict({name: value.cpu() for name, value in average.items()})
    pipe.to("cpu").to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)


def main() -> None:
    """Train, saving the state as it goes, and write the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with x_train [N, 28, 28] uint8")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--state", type=Path, help="where to keep the training state (default: OUT-state)")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    state = args.state or args.out.with_name(args.out.name + "-state")

    torch.manual_seed(args.seed)
    pipe = build()
    unet = pipe.unet.to(args.device).to(memory_format=torch.channels_last).train()
    images = load_images(args.data)
    average = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    adam = torch.optim.Adam(unet.parameters(), lr=args.lr)
    start = load_state(state, unet, average, adam)
    running, log = None, []
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step")):
        noisy, timestep, noise = (
            x.to(args.device) for x in batch(images, pipe.scheduler, args.batch_size, args.seed, step)
        )
        adam.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), timestep).sample
        loss = (predicted.float() - noise).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(state, step + 1, unet.state_dict(), average, adam)
            log.append({"step": step + 1, "loss": running})
            (state / "log.json").write_text(json.dumps(log))
    save_pipeline(pipe, average, args.out)
    print(f"wrote {args.out} after {args.steps} steps")


if __name__ == "__main__":
    main()
