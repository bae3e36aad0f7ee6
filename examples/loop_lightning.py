"""The same with Lightning (pip install lightning): python examples/loop_lightning.py photos.kd gen resnet10t 10"""

import sys
from pathlib import Path

import lightning
import timm
import torch
from torch.nn.functional import cross_entropy, kl_div

import kdcli


class Distilled(lightning.LightningModule):
    """A student that learns from labels and one teacher's logits."""

    def __init__(self, student: torch.nn.Module, teacher: str) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.losses: list[float] = []

    def training_step(self, batch, _index):
        logits = self.student(batch["image"])
        soft = batch["teacher"][self.teacher]["logits"].float().log_softmax(1)
        distilled = kl_div(logits.log_softmax(1), soft, log_target=True, reduction="batchmean")
        loss = cross_entropy(logits, batch["label"], ignore_index=-1) + distilled
        self.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        print(f"epoch {self.current_epoch + 1}: loss {mean:.4f}", flush=True)
        self.losses.clear()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(path: Path, teacher: str, architecture: str, epochs: int) -> None:
    cache = kdcli.open_cache(path)
    student = timm.create_model(architecture, num_classes=len(cache.class_names or ()))
    loader = cache.loader(student=student, teachers={teacher: ["logits"]}, batch_size=32, workers=0)
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,  # the loader has an order of its own
    )  # fmt: skip
    trainer.fit(Distilled(student, teacher), loader)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
