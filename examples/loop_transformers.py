"""The same with transformers' Trainer, which makes its own loader of a map-style data set:

python examples/loop_transformers.py photos.kd gen 64 10      (pip install 'kdcli[transformers]')
"""

import sys
import tempfile
from pathlib import Path

import transformers
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import default_collate

import kdcli


class Distiller(transformers.Trainer):
    """Labels and one teacher's logits."""

    teacher: str

    def compute_loss(self, model, inputs, return_outputs=False, **_more):
        outputs = model(pixel_values=inputs["image"])
        soft = inputs["teacher"][self.teacher]["logits"].float().log_softmax(1)
        distilled = kl_div(outputs.logits.log_softmax(1), soft, log_target=True, reduction="batchmean")
        loss = cross_entropy(outputs.logits, inputs["label"], ignore_index=-1) + distilled
        return (loss, outputs) if return_outputs else loss


class NextViews(transformers.TrainerCallback):
    """Every epoch shows the next of the cached views."""

    def __init__(self, images) -> None:
        self.images = images

    def on_epoch_begin(self, args, state, control, **_more) -> None:
        self.images.set_epoch(round(state.epoch or 0))


def main(path: Path, teacher: str, side: int, epochs: int) -> None:
    cache = kdcli.open_cache(path)
    images = cache.images(student=side, teachers={teacher: ["logits"]})
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        num_labels=len(cache.class_names or ()),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3, report_to=[],
            save_strategy="no", logging_strategy="epoch", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = Distiller(
            transformers.ResNetForImageClassification(config), arguments, default_collate, images,
            callbacks=[NextViews(images)],
        )  # fmt: skip
        trainer.teacher = teacher
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
