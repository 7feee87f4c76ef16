"""What a pipeline is told: one text or class a seed, the same in any batch; DiT's classes on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer")

from command_line import document, failure, run
from hypothesis import given
from hypothesis import strategies as st

from dmq_ao.pipelines import adapter as diffusers_adapter
from dmq_ao.pipelines.prompts import call_arguments

QUICK = ("--steps", "3", "--samples", "8")


class Painter(diffusers.DiffusionPipeline):
    """Draws from a prompt: a text encoder of no library, and guidance, which doubles the rows."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.told: list[list[str]] = []

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        generator: list[torch.Generator],
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> Any:
        self.told.append(list(prompt))
        self.scheduler.set_timesteps(num_inference_steps)
        text = torch.stack([torch.full((7, 24), len(words) / 10.0) for words in prompt])
        x = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generator])
        for t in self.scheduler.timesteps:
            both = self.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([0 * text, text])).sample
            without, within = both.chunk(2)
            x = self.scheduler.step(without + 2 * (within - without), t, x).prev_sample
        if output_type == "latent":
            return SimpleNamespace(images=x)
        return SimpleNamespace(images=x.sigmoid().permute(0, 2, 3, 1).numpy())


class Filming(Painter):
    """Draws no images."""

    def __call__(self, prompt: list[str], **given: Any) -> Any:
        return {"frames": super().__call__(prompt, **given).images}


class Upscaling(diffusers.DiffusionPipeline):
    """Starts from an image."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self, image: Tensor, num_inference_steps: int = 50) -> Any:
        raise AssertionError("nothing is drawn")


@pytest.fixture
def painter(tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]]) -> Painter:
    return quiet(Painter(tiny_unet2d_condition[0], diffusers.DDIMScheduler()))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def dit_folder(tiny_dit: tuple[nn.Module, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline as DiT's: a thousand classes and one for none."""
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel.from_config({**tiny_dit[0].config, "num_embeds_ada_norm": 1000})
    first, second = (block.norm1.emb for block in dit.transformer_blocks)
    second.load_state_dict(first.state_dict())  # as in the checkpoints that there are
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    labels = {0: "tench, Tinca tinca", 7: "cock"}
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    pipeline = diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler(), id2label=labels)
    pipeline.register_to_config(id2label=labels)
    pipeline.save_pretrained(folder)
    return folder


@given(
    st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_a_seed_has_the_same_prompt_in_any_batch(prompts: list[str], seeds: list[int], size: int) -> None:
    class Takes:
        def __call__(self, prompt: list[str]) -> None: ...

    whole = call_arguments(Takes(), seeds, prompts)["prompt"]
    parts = [call_arguments(Takes(), seeds[i : i + size], prompts)["prompt"] for i in range(0, len(seeds), size)]
    assert [text for part in parts for text in part] == whole
    assert dict(zip(seeds, whole, strict=True)) == {seed: prompts[seed % len(prompts)] for seed in seeds}


def test_recording_takes_prompts_in_turn(painter: Painter) -> None:
    samples = diffusers_adapter.record_pipeline(
        painter, num_samples=24, steps=3, trajectories=4, batch_size=2, prompt=["a", "blue fox", "sea"], seed=1
    )
    assert painter.told == [["blue fox", "sea"], ["a", "blue fox"]]
    text = samples.inputs["encoder_hidden_states"]
    assert sorted({round(float(x), 4) for x in text[:, 0, 0]}) == [0.0, 0.1, 0.3, 0.8]


def test_images_depend_on_the_seed_and_its_prompt_alone(painter: Painter) -> None:
    prompts = ["a", "a blue fox"]
    images = diffusers_adapter.sample(painter, range(4), steps=2, prompt=prompts, batch_size=3)
    assert images.shape == (4, 4, 16, 16)
    for seed in range(4):
        alone = diffusers_adapter.sample(painter, [seed], steps=2, prompt=prompts[seed % 2])
        torch.testing.assert_close(alone[0], images[seed], rtol=1e-4, atol=1e-5)


def test_one_text_is_for_all(painter: Painter) -> None:
    assert call_arguments(painter, [3, 4], "sea") == {"prompt": ["sea", "sea"]}


def test_pipelines_say_what_they_want(painter: Painter, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="Painter needs a prompt; give one"):
        diffusers_adapter.record_pipeline(painter, num_samples=2)
    plain = quiet(diffusers.DDPMPipeline(tiny_unet2d[0], diffusers.DDPMScheduler()))
    assert call_arguments(plain, [5, 6, 7], None) == {"batch_size": 3}
    with pytest.raises(ValueError, match="DDPMPipeline does not take a prompt; leave it out"):
        call_arguments(plain, [0], ["a"])
    with pytest.raises(ValueError, match=r"Upscaling needs image: a picture, .* or 'noise' .* dmq_ao.record"):
        call_arguments(Upscaling(tiny_unet2d[0]), [0], None)


def test_what_draws_no_images_can_be_recorded_but_not_shown(painter: Painter) -> None:
    filming = quiet(Filming(painter.unet, painter.scheduler))
    samples = diffusers_adapter.record_pipeline(filming, num_samples=4, steps=2, prompt="a", trajectories=2)
    assert len(samples) == 4
    with pytest.raises(TypeError, match="Filming returns frames, not images"):
        diffusers_adapter.sample(filming, [0], steps=2, prompt="a")


def test_classes_by_seed_number_and_name(dit_folder: Path) -> None:
    pipeline = diffusers_adapter.load_pipeline(dit_folder)
    assert call_arguments(pipeline, [3, 1002], None) == {"class_labels": [3, 2]}
    assert call_arguments(pipeline, [0, 1, 2], ["207", "cock", "Tinca tinca"]) == {"class_labels": [207, 7, 0]}
    for wrong in ("1000", "fox", "-1"):
        with pytest.raises(
            ValueError, match="takes class numbers 0 to 999 or one of 3 names, such as 'Tinca tinca'; got"
        ):
            call_arguments(pipeline, [0], wrong)


@pytest.mark.parametrize(("classes", "more"), [(10, {"class_labels": [2, 3]}), (None, {})])
def test_a_pipeline_that_counts_and_may_draw_classes(classes: int | None, more: dict[str, Any]) -> None:
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    assert call_arguments(pipeline, [2, 13], None) == {"batch_size": 2, **more}


@pytest.fixture(scope="module")
def full(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The pipeline of classes, quantized on two of them in float32, and the report of the command."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "classes.txt").write_text("207\n\ncock\n", encoding="utf-8")
    prompts = ("--prompt", f"@{folder}/classes.txt")
    return folder / "out", document("quantize", dit_folder, "-o", folder / "out", *QUICK, "--embeddings", *prompts)


def test_a_pipeline_of_classes_from_quantize_to_compare(
    dit_folder: Path, full: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, report = full
    predicted = document("quantize", dit_folder, *QUICK, "--embeddings", "--dry-run")
    assert predicted["mean_bits"] == pytest.approx(report["mean_bits"], rel=1e-2)
    written = json.loads((out / "report.json").read_text())
    assert written["sampling"]["prompt"] == ["207", "cock"]
    tables = [layer for layer in report["layers"] if layer["kind"] == "embedding table"]
    assert [(layer["status"], layer["weight_bits"]) for layer in tables] == [("quantized", 8)]
    drawn = document(
        "sample", out, "-o", tmp_path / "grid.png", "--num", 3, "--steps", 2, "--prompt", 3, "--prompt", 4
    )
    assert Path(drawn["files"][0]).is_file()
    compared = document("compare", dit_folder, out, "--images", 2, "--steps", 2)
    [row] = compared["variants"]
    assert row["one_step_error"] < 0.1


def test_a_pipeline_in_bfloat16_stays_so(dit_folder: Path, full: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    half = tmp_path / "half"
    document("quantize", dit_folder, "-o", half, *QUICK, "--bits", "w8a8", "--dtype", "bfloat16")
    pipeline = diffusers_adapter.load_pipeline(half)
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16,) * 2
    assert diffusers_adapter.sample(quiet(pipeline), [0], steps=2).dtype == torch.float32
    [row] = document("compare", dit_folder, half, "--images", 2, "--steps", 2)["variants"]
    assert row["one_step_error"] < 0.1
    assert "must have the same dtype" in failure(1, "compare", dit_folder, half, full[0])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (("--prompt", "fox"), "DiTPipeline takes class numbers 0 to 999"),
        (("--prompt", "@no_such_file.txt"), "no_such_file.txt cannot be read as text"),
        (("--prompt", "@{empty}"), "is empty; write one prompt a line"),
    ],
)
def test_wrong_prompts_are_usage_errors(prompt: tuple[str, str], words: str, dit_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    given = [text.replace("{empty}", str(empty)) for text in prompt]
    assert words in failure(2, "quantize", dit_folder, "--dry-run", *given)


def test_help_says_how_prompts_are_given() -> None:
    assert "TEXT|@FILE" in run("quantize", "--help").stdout
