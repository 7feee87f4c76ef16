"""What a call is given beside prompts: pictures, masks, sizes, guidance, frames; checkpoints of one file, and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("typer")

from command_line import failure, run

from dmq_ao.benchmarks import benchmark
from dmq_ao.cli import gallery
from dmq_ao.cli.options import call_conditions
from dmq_ao.config import InvalidFile
from dmq_ao.pipelines import adapter, checkpoints
from dmq_ao.pipelines.adapter import load_pipeline, record_pipeline, sample
from dmq_ao.pipelines.conditions import Conditions
from dmq_ao.pipelines.prompts import call_arguments


class Base(diffusers.DiffusionPipeline):
    """Denoises what it is given; keeps the arguments of its calls."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.calls: list[dict[str, Any]] = []

    @torch.no_grad()
    def draw(self, generator: list[torch.Generator], steps: int, output_type: str, **arguments: Any) -> Any:
        self.calls.append(arguments)
        self.scheduler.set_timesteps(steps)
        x = torch.stack([torch.randn(3, 16, 16, generator=one) for one in generator])
        if "image" in arguments:
            pixels = [torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in arguments["image"]]
            x = 0.5 * x + torch.nn.functional.interpolate(torch.stack(pixels), (16, 16))
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x if output_type == "latent" else x.sigmoid().permute(0, 2, 3, 1).numpy()


class FakeImg2Img(Base):
    def __call__(self, image: Any = None, height: int | None = None, width: int | None = None, generator: Any = None,
                 num_inference_steps: int = 5, output_type: str = "np") -> Any:  # fmt: skip
        more = {"height": height, "width": width}
        return SimpleNamespace(images=self.draw(generator, num_inference_steps, output_type, image=image, **more))


class FakeInpaint(Base):
    def __call__(self, image: Any = None, mask_image: Any = None, generator: Any = None,
                 num_inference_steps: int = 5, output_type: str = "np") -> Any:  # fmt: skip
        arguments = {"image": image, "mask_image": mask_image}
        return SimpleNamespace(images=self.draw(generator, num_inference_steps, output_type, **arguments))


class FakeControlNet(Base):
    def __call__(self, prompt: Any, image: Any = None, negative_prompt: Any = None, guidance_scale: float = 1.0,
                 generator: Any = None, num_inference_steps: int = 5, output_type: str = "np") -> Any:  # fmt: skip
        more = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale, "prompt": prompt}
        return SimpleNamespace(images=self.draw(generator, num_inference_steps, output_type, image=image, **more))


class FakeVideo(Base):
    def __call__(self, batch_size: int = 1, num_frames: int = 2, generator: Any = None, num_inference_steps: int = 5,
                 output_type: str = "np") -> Any:  # fmt: skip
        images = self.draw(generator, num_inference_steps, output_type)
        return SimpleNamespace(frames=np.stack([np.asarray(images)] * num_frames, 1))


Build = Callable[[type[Base]], Base]


@pytest.fixture
def build(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> Build:
    def make(kind: type[Base]) -> Base:
        pipeline = kind(tiny_unet2d[0], diffusers.DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and something else."""
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 12), colour).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_a_folder_are_taken_in_turn(build: Build, folder: Path) -> None:
    pipeline = build(FakeImg2Img)
    samples = record_pipeline(pipeline, num_samples=6, steps=2, trajectories=3, prompt=Conditions(image=str(folder)))
    assert len(samples) == 6
    assert [one.getpixel((0, 0)) for one in pipeline.calls[0]["image"]] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert pipeline.calls[0]["image"][0].size == (20, 12)
    images = sample(pipeline, [0, 1], steps=2, prompt=Conditions(image=str(folder / "0.png"), height=8, width=24))
    assert images.shape == (2, 3, 16, 16)
    assert {one.size for one in pipeline.calls[-1]["image"]} == {(24, 8)}
    assert pipeline.calls[-1]["height"] == 8


def test_noise_is_of_the_seed_and_of_the_denoisers_size(build: Build) -> None:
    pipeline = build(FakeInpaint)
    arguments = [call_arguments(pipeline, seeds, Conditions(image="noise", mask="noise")) for seeds in ([3, 4], [4])]
    side = pipeline.unet.config.sample_size
    assert arguments[0]["image"][1].size == (side, side)
    assert arguments[0]["image"][1].tobytes() == arguments[1]["image"][0].tobytes()
    assert arguments[0]["image"][0].tobytes() != arguments[0]["image"][1].tobytes()
    assert (arguments[0]["mask_image"][0].mode, set(arguments[0]["mask_image"][0].tobytes())) == ("L", {0, 255})


def test_a_controlnet_without_a_name_of_its_own_takes_image(build: Build) -> None:
    pipeline = build(FakeControlNet)
    conditions = Conditions("a", control_image="noise", negative_prompt="b", guidance_scale=3.5)
    arguments = call_arguments(pipeline, [0, 1], conditions)
    assert arguments["prompt"] == ["a", "a"]
    assert arguments["negative_prompt"] == ["b", "b"]
    assert arguments["guidance_scale"] == 3.5
    assert len(arguments["image"]) == 2
    with pytest.raises(ValueError, match="takes one image; leave image or control_image out"):
        call_arguments(pipeline, [0], Conditions("a", control_image="noise", image="noise"))


@pytest.mark.parametrize(
    ("kind", "conditions", "words"),
    [
        (FakeImg2Img, Conditions(), "FakeImg2Img needs image: a picture, a folder of them, or 'noise'"),
        (FakeInpaint, Conditions(image="noise"), r"needs mask: .*--mask\)"),
        (FakeControlNet, Conditions("a"), "FakeControlNet needs image"),
        (
            FakeImg2Img,
            Conditions(image="noise", mask="noise"),
            "does not take mask_image; leave it out. It takes",
        ),
        (FakeVideo, Conditions(guidance_scale=2.0, height=8), "does not take guidance_scale, height"),
        (FakeImg2Img, Conditions(image="nowhere"), r"nowhere is no picture and no folder of \.png"),
        (FakeImg2Img, Conditions(image=__file__), "is no picture that can be read"),
    ],
)
def test_what_does_not_fit_is_said(kind: type[Base], conditions: Conditions, words: str, build: Build) -> None:
    with pytest.raises(ValueError, match=words):
        call_arguments(build(kind), [0], conditions)


def test_videos_are_drawn_and_written(build: Build, tmp_path: Path) -> None:
    videos = sample(build(FakeVideo), [4, 5], steps=2, prompt=Conditions(num_frames=3))
    assert videos.shape == (2, 3, 3, 16, 16)
    files = gallery.write_images(videos, [4, 5], tmp_path / "videos")
    assert [file.name for file in files] == ["seed_4.gif", "seed_5.gif"]
    with Image.open(files[0]) as first:
        assert first.size == (16, 16)
    [grid] = gallery.write_images(videos, [4, 5], tmp_path / "grid.png")
    assert grid.read_bytes().startswith(b"\x89PNG")


def test_options_become_conditions(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert call_conditions(["a"], image=None) == ["a"]
    pipeline = build(FakeImg2Img)
    monkeypatch.setattr(adapter, "load_pipeline", lambda source, **options: pipeline)
    size = ("--height", 8, "--width", 8)
    result = run("sample", "x", "-o", tmp_path / "a", "--num", 1, "--steps", 2, "--image", "noise", *size)
    assert result.exit_code == 0, result.stderr
    assert pipeline.calls[-1]["width"] == 8
    refused = run("sample", "x", "-o", tmp_path / "b", "--num", 1)
    assert refused.exit_code == 2
    assert "FakeImg2Img needs image" in " ".join(refused.stderr.split())


def test_a_report_says_what_the_calls_were_given() -> None:
    assert Conditions("a").describe() == "a"
    assert Conditions(["a"], height=8).describe() == {"prompt": ["a"], "height": 8}


def test_a_checkpoint_of_one_file(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, pipeline = tmp_path / "model.safetensors", build(FakeImg2Img)
    file.write_bytes(b"")
    asked = []

    class Known:
        @staticmethod
        def from_single_file(path: str, dtype: torch.dtype) -> Base:
            asked.append((path, dtype))
            return pipeline

    monkeypatch.setattr(checkpoints, "_pipeline_class", lambda path: Known)
    assert load_pipeline(file) is pipeline
    assert asked == [(str(file), torch.float32)]
    monkeypatch.undo()
    with pytest.raises(InvalidFile, match="does not load it as a whole pipeline"):
        load_pipeline(file)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InvalidFile, match=r"only \.safetensors checkpoints are read, others can hold code"):
        load_pipeline(tmp_path / "model.ckpt")


def test_lora_weights_are_fused_or_refused(build: Build) -> None:
    pipeline: Any = build(FakeImg2Img)
    with pytest.raises(ValueError, match="FakeImg2Img takes no LoRA weights; leave them out"):
        checkpoints.fuse_lora(pipeline, "x")
    steps = []
    pipeline.load_lora_weights = steps.append
    pipeline.fuse_lora = lambda: steps.append("fuse")
    pipeline.unload_lora_weights = lambda: steps.append("unload")
    checkpoints.fuse_lora(pipeline, "x")
    assert steps == ["x", "fuse", "unload"]

    def missing(path: str) -> None:
        raise ValueError("PEFT backend is required for this method.")

    pipeline.load_lora_weights = missing
    with pytest.raises(ValueError, match="does not take these LoRA weights .* install with: pip install peft"):
        checkpoints.fuse_lora(pipeline, "x")


class LDMSuperResolutionFake(Base):
    """Takes a tensor of pictures, or a single one, as the pipeline that it is called after."""

    def __call__(self, image: Any = None, batch_size: int = 1, generator: Any = None,
                 num_inference_steps: int = 5, output_type: str = "np") -> Any:  # fmt: skip
        if not isinstance(image, Tensor):
            raise TypeError("no tensor")
        self.calls.append({"pictures": image, "batch_size": batch_size})
        return SimpleNamespace(images=self.draw(generator, num_inference_steps, output_type))


def test_a_pipeline_that_takes_tensors_alone_gets_one(build: Build, folder: Path) -> None:
    pipeline = build(LDMSuperResolutionFake)
    conditions = Conditions(image=str(folder), height=40, width=64)
    sample(pipeline, [0, 1, 2], steps=2, prompt=conditions)
    pictures = pipeline.calls[0]["pictures"]
    assert pictures.shape == (3, 3, 32, 64)
    assert pictures[:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1], [1, -1, -1]]  # red, blue, red
    assert "height" not in call_arguments(pipeline, [0], conditions)
    noise = Conditions(image="noise", height=32, width=32)
    assert len(record_pipeline(pipeline, num_samples=4, steps=2, prompt=noise)) == 4
    with pytest.raises(ValueError, match=r"become \[\(0, 0\)\] pixels, .* of 32 or more: give height and width"):
        call_arguments(pipeline, [0], Conditions(image=str(folder)))
    Image.new("RGB", (64, 32)).save(folder / "2.png")
    Image.new("RGB", (32, 32)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"become \[\(32, 32\), \(64, 32\)\] pixels, and the pipeline takes one size"):
        call_arguments(pipeline, [2, 3], Conditions(image=str(folder)))
    with pytest.raises(ValueError, match="LDMSuperResolutionFake needs image: .*--image"):
        call_arguments(pipeline, [0], None)


def test_benchmark_records_with_the_same_options(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline, loaded = build(FakeImg2Img), []

    def load(source: str, **options: Any) -> Any:
        loaded.append(options)
        return pipeline

    monkeypatch.setattr(benchmark, "load_pipeline", load)
    monkeypatch.setattr(benchmark, "_convert", lambda *rest: 1 / 0)
    size = Conditions(image="noise", height=24, width=8)
    with pytest.raises(ZeroDivisionError):
        benchmark.run_benchmark("x", "w8a8", prompt=size, lora=tmp_path, say=lambda _: None)
    assert {picture.size for picture in pipeline.calls[0]["image"]} == {(8, 24)}
    assert loaded == [{"lora": tmp_path}]


@pytest.mark.parametrize("options", [("--prompt", "a"), ("--image", "noise"), ("--height", 8), ("--lora", "x")])
def test_benchmark_refuses_what_would_have_no_effect(options: tuple[Any, ...]) -> None:
    words = failure(1, "benchmark", "cifar-unet", *options)
    assert "cifar-unet is called with noise, of its own sizes; leave out prompt, pictures" in words


def test_benchmark_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda model, bits, **rest: asked.append(rest) or {})
    monkeypatch.setattr("dmq_ao.cli.output.benchmark_text", lambda report: "")
    pictures = ("--image", "noise", "--mask", "noise", "--control-image", "noise", "--height", 8, "--width", 16)
    words = ("--prompt", "a", "--negative-prompt", "b", "--guidance-scale", 2, "--num-frames", 3, "--lora", "x")
    assert run("benchmark", "m", *pictures, *words).exit_code == 0
    all_of_them = Conditions(["a"], "b", 2.0, "noise", "noise", "noise", 8, 16, 3)
    assert (asked[0]["prompt"], asked[0]["lora"]) == (all_of_them, Path("x"))
