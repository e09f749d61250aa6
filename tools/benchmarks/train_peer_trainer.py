"""Peer of the training benchmark: transformers' Trainer with the same DeepSpeed JSON and its own fused AdamW."""

from __future__ import annotations

import deepspeed
from train_case import BETAS, EPSILON, GRADIENT_CLIPPING, LEARNING_RATE, SEED, WEIGHT_DECAY, Case
from train_peers import Recorder, Windows, arguments, new_model
from transformers import Trainer, TrainerCallback, TrainingArguments


class Recording(TrainerCallback):
    """Callback that ends the recorder's steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Called after the optimizer's step."""
        self.recorder.step(state.global_step)


class RecordedTrainer(Trainer):
    """Trainer that keeps the loss of every micro-batch on the device; its own logging would wait for the device."""

    recorder: Recorder

    def training_step(self, *args, **kwargs):
        """Run a micro-batch forward and backward; the loss is divided by the accumulation steps."""
        loss = super().training_step(*args, **kwargs)
        self.recorder.add(loss)
        return loss


def settings(case: Case, deepspeed_json: str, output_dir: str) -> TrainingArguments:
    """Return the Trainer's settings: no evaluation, checkpoint or log, and nothing else that waits for the device."""
    return TrainingArguments(
        output_dir=output_dir,
        deepspeed=deepspeed_json,
        max_steps=case.max_steps,
        per_device_train_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=case.accumulation,
        bf16=case.dtype == "bf16",
        use_cpu=case.device == "cpu",
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=GRADIENT_CLIPPING,
        seed=SEED,
        dataloader_drop_last=True,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train the case."""
    case, folder, run_dir = arguments()
    # As in megaft: DeepSpeed would compile a shared-memory all-reduce for 90 s that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    chosen = settings(case, str(folder / "deepspeed.json"), str(run_dir / "trainer"))
    recorder = Recorder(run_dir, chosen.device)
    trainer = RecordedTrainer(
        new_model(folder), chosen, train_dataset=Windows(folder, case.context_length), callbacks=[Recording(recorder)]
    )
    trainer.recorder = recorder
    trainer.train()
    recorder.close()


if __name__ == "__main__":
    main()
