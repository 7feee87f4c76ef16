"""Calibrate in forked processes, kill them at random moments, resume until done: ``killed.py FOLDER TRIALS SEED``.

It imports, records and prepares once. Only children calibrate; each leaves the bytes of what it saved.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from plain import Plain, contents, plain_samples, seeded, small

import dmq_ao
from dmq_ao.config import BlockReconstruction


def main(folder: Path, trials: int, seed: int) -> None:
    torch.set_num_threads(1)
    model = seeded(Plain)
    samples = plain_samples(model)
    recipe = dataclasses.replace(dmq_ao.recipes.default("w4a8"), allocation=None, blocks=BlockReconstruction())
    recipe = small(recipe, steps=8)
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    dice = random.Random(seed)

    def start(name: str) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            dmq_ao.calibrate(prepared, samples, progress=False, state_dir=folder / "state", max_memory=100_000)
            dmq_ao.save(dmq_ao.convert(prepared, "reference"), folder / name)
            code = 0
        finally:
            os._exit(code)

    begun = time.monotonic()
    assert os.waitpid(start("uninterrupted"), 0)[1] == 0
    seconds = time.monotonic() - begun
    expected, kills, resumed = contents(folder / "uninterrupted"), 0, 0
    for trial in range(trials):
        shutil.rmtree(folder / "state")
        status = first = 1
        while status:
            resumed += (folder / "state").exists() and any((folder / "state").rglob("*.safetensors"))
            child = start(f"trial{trial}")
            time.sleep(dice.uniform(0.02, 0.9) * seconds)
            if first or dice.random() < 0.7:
                os.kill(child, signal.SIGKILL)
                kills += 1
            first = 0
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
        assert contents(folder / f"trial{trial}") == expected, f"trial {trial}: other bytes"
        left = [path.name for path in (folder / "state").rglob("*.partial")]
        assert not left, left
    print(trials, kills, resumed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
