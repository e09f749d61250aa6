"""Settings of `megaft validate`."""

import json

import tyro

from megaft.commands.validate import ValidateConfig

GLOBAL_BATCH_SIZE = 16


def settings_of(model, texts, folder, *flags, stage=2, world_size=1, **keys):
    settings = {"train_batch_size": GLOBAL_BATCH_SIZE, "train_micro_batch_size_per_gpu": 2, **keys}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings | {"zero_optimization": {"stage": stage}}))
    arguments = [
        f"--deepspeed-config={path}",
        f"--model.path={model}",
        f"--data.train={texts[0]}",
        f"--data.valid={texts[1]}",
        "--data.context-length=32",
        f"--run.dir={folder / 'run'}",
        "--run.max-steps=10",
        f"--world-size={world_size}",
    ]
    return tyro.cli(ValidateConfig, args=[*arguments, *flags])
